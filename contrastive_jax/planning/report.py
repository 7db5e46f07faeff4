"""Writes a plan as a table that people read."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from contrastive_jax.planning.run_costs import LEFT_OUT

GIB = 2**30


def render(plan: dict[str, Any]) -> Group:
  """Writes the table of a plan, and those of its kernels and collectives."""
  table = Table(title=_title(plan), show_header=False, title_justify="left")
  table.add_column(style="bold")
  table.add_column(overflow="fold")
  for name, value in rows(plan):
    table.add_row(name, value)
  tables = [table]
  if plan.get("kernels"):
    tables.append(_kernels(plan["kernels"]))
  if plan.get("collectives"):
    tables.append(_collectives(plan["collectives"]))
  return Group(*tables)


def _kernels(found: list[dict[str, Any]]) -> Table:
  table = Table(title="What takes the most time of a step on a device", title_justify="left")
  for column in ("where", "pass", "kind", "runs", "cycles", "ms", "share", "TFLOP", "bytes"):
    table.add_column(column, justify="left" if column in ("where", "pass", "kind") else "right", overflow="fold")
  for row in found:
    table.add_row(
      row["scope"], row["pass"], row["kind"], f"{row['runs']:,.0f}", f"{row['cycles']:,.0f}" if row["cycles"] else "",
      f"{1e3 * row['seconds']:.2f}", f"{row['share']:.1%}", f"{row['flops'] / 1e12:.3f}" if row["flops"] else "",
      size(row["bytes"]),
    )  # fmt: skip
  return table


def _collectives(found: list[dict[str, Any]]) -> Table:
  sent = Table(title="What a device sends in a step", title_justify="left")
  for column in ("where", "what", "times", "bytes", "largest array", "at best"):
    sent.add_column(column, justify="left" if column in ("where", "what") else "right")
  for row in found:
    sent.add_row(
      row["part"], row["kind"], f"{row['count']:,}", size(row["bytes"]), size(row["largest_bytes"]),
      f"{1e3 * row['seconds']:.2f} ms" if row["seconds"] else "",
    )  # fmt: skip
  return sent


def render_cost(cost: dict[str, Any]) -> Group:
  """Writes the table of what a run costs, or its planned part, as `run_costs.cost` returns it."""
  table = Table(title="What will it cost, at best?", title_justify="left")
  columns = ["stage", "steps", "pairs", "hours", "chip-hours"]
  for column in columns if cost["chip_hour_price"] is None else [*columns, "price"]:
    table.add_column(column, justify="left" if column == "stage" else "right")
  totals = [{"stage": "together", **cost["total"]}] if len(cost["stages"]) > 1 else []
  for row in cost["stages"] + totals:
    numbers = [_short(row[field]) for field in ("hours", "chip_hours", "price") if field in row]
    table.add_row(row["stage"], f"{row['steps']:,.0f}", _short(row["pairs"]), *numbers)
  return Group(table, Text(f"Steps at their bound, {LEFT_OUT}."))


def _short(amount: int | float | None) -> str:
  """Writes a number with three digits or all of those before the point; from a million on in millions or billions."""
  if amount is None:
    return "unknown"
  for unit, factor in ((" billion", 1e9), (" million", 1e6)):
    if amount >= factor:
      return f"{amount / factor:,.4g}{unit}"
  return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"


def _title(plan: dict[str, Any]) -> str:
  stage = f", stage {plan['stage']}" if plan["stage"] else ""
  return f"{plan['config']}{stage} on {plan['topology']}: {plan['devices']} x {plan['chip']}"


def rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
  """Lists the names and values of a plan."""
  memory = plan["memory"]
  accumulated = f", in {plan['accumulation']} micro-batches" if plan["accumulation"] > 1 else ""
  found = [
    ("mesh", ", ".join(f"{axis} {length}" for axis, length in plan["mesh"].items())),
    ("batch", f"{plan['batch_size']:,} pairs, {plan['batch_size'] / plan['devices']:g} a device{accumulated}"),
    ("images", "{:,} rows of {:,} tokens".format(*plan["image_rows"])),
    ("parameters", f"{plan['parameters']:,}"),
    ("parameters a device", size(plan["parameter_bytes"])),
    ("optimiser a device", size(plan["optimizer_bytes"])),
    ("memory a device", _memory(memory)),
    ("verdict", verdict(memory)),
  ]
  if "flops" in plan:
    flops = plan["flops"]
    found += [
      ("model FLOPs", f"{flops['model']:.3e} a step"),
      (
        "compiled FLOPs",
        f"{flops['compiled']:.3e} a step, {flops['compiled_over_model']:.2f} x the model's ({_shares(flops)})",
      ),
    ]
    found.append(("precision", _precision(flops)))
    if plan["kernels_not_counted"]:
      unknown = f"{plan['kernels_not_counted']}, of attention in long rows: FLOPs and times do not hold theirs"
      found.append(("kernels not counted", unknown))
    found += _time(plan["time"])
  return [*found, ("compiled in", f"{plan['compile_seconds']:.0f} s")]


def _shares(flops: dict[str, Any]) -> str:
  return ", ".join(f"{part} {amount / flops['compiled']:.1%}" for part, amount in flops["by_part"].items() if amount)


def _precision(flops: dict[str, Any]) -> str:
  return ", ".join(f"{name} {amount / flops['compiled']:.2%}" for name, amount in flops["by_dtype"].items())


def _memory(memory: dict[str, Any]) -> str:
  names = {"arguments": "state and batch", "temporaries": "temporaries", "code": "code"}
  parts = [f"{label} {size(memory[f'{use}_bytes'])}" for use, label in names.items() if memory.get(f"{use}_bytes")]
  return f"{size(memory['peak_bytes'])}: {', '.join(parts)}"


def verdict(memory: dict[str, Any]) -> str:
  """Says whether a step fits, and by how much."""
  if memory["fits"] is None:
    return "unknown: say how much a device has with --memory"
  usable = f"{size(memory['chip_bytes'])} less {size(memory['reserve_bytes'])} for the runtime"
  if memory["fits"]:
    return f"fits {usable}, {size(memory['headroom_bytes'])} to spare"
  return f"DOES NOT FIT {usable}: {size(-memory['headroom_bytes'])} too much"


def _time(time: dict[str, Any]) -> list[tuple[str, str]]:
  if time["estimate"] is None:
    return []
  return [
    ("computing", f"{1e3 * time['computing_seconds']:.0f} ms ({time['estimate']})"),
    ("of which", ", ".join(f"{kind} {share:.1%}" for kind, share in time["computing_shares"].items())),
    ("sending", f"{1e3 * time['sending_seconds']:.0f} ms (bytes over links at full bandwidth)"),
    ("step, at best", f"{1e3 * time['step_seconds']:.0f} ms, {time['pairs_per_second']:,.0f} pairs/s"),
    ("bound on MFU", f"{time['mfu_bound']:.1%}"),
  ]


def size(amount: float) -> str:
  """Writes a number of bytes in the unit that suits it."""
  for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
    if abs(amount) >= factor:
      return f"{amount / factor:.2f} {unit}"
  return f"{amount:.0f} B"
