"""Plans every shipped config and writes the table of docs/scaling.md.

.venv-plan/bin/python -m benchmarks.plans [--only=v5e]    # ten minutes on two cores; `make plan` makes the environment
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.progress import track

from contrastive_jax.planning import report

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"

# Arguments of plan.py, a row each.
ROWS = (
  "--config=configs/siglip_b16.py --topology=v5e:16x16",
  "--config=configs/siglip_b16.py --topology=h100:8 --config.accumulation=2",
  "--config=configs/siglip_b16.py --topology=h100:8x8",
  "--config=configs/siglip_l16.py --topology=v5e:16x16",
  "--config=configs/siglip_l16.py --topology=h100:8 --config.accumulation=4",
  "--config=configs/siglip_l16.py --topology=h100:8x8",
  "--config=configs/siglip_so400m.py --topology=v5e:16x16",
  "--config=configs/siglip_so400m.py --topology=h100:8 --config.accumulation=32",
  "--config=configs/siglip_so400m.py --topology=h100:8x8",
  "--config=configs/clip_b32.py --topology=v5e:16x16",
  "--config=configs/clip_b32.py --topology=h100:8",
  "--config=configs/clip_b16.py --topology=v5e:16x16",
  "--config=configs/clip_b16.py --topology=h100:8 --config.accumulation=2",
  "--config=configs/clip_l14.py --topology=v5e:16x16",
  "--config=configs/clip_l14.py --topology=h100:8 --config.accumulation=4",
)

ONLY = flags.DEFINE_string("only", "", "Plans only rows that contain this; the others keep what was found before.")
PLANS = flags.DEFINE_string("plans", str(ROOT / "runs" / "plans"), "Where the plans are kept, as JSON.")


def main(_: Sequence[str]) -> None:
  for row in track([row for row in ROWS if ONLY.value in row], "Planning"):
    path_of(row).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "plan.py", *row.split(), f"--output={path_of(row)}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  text = DOCUMENT.read_text()
  before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
  DOCUMENT.write_text(f"{before}\n{table()}\n{after}")


def path_of(row: str) -> Path:
  """Returns where the plan of a row is kept."""
  kept = "".join(letter if letter.isalnum() else "_" for letter in row.replace("--config=configs/", ""))
  return Path(PLANS.value) / f"{kept}.json"


def table() -> str:
  """Returns the rows that were planned, as Markdown; each behind its arguments."""
  lines = [
    "| arguments of `plan.py` | pairs a device | GiB of state, batch | GiB at peak | verdict | compiled / model FLOPs"
    " | GiB sent | ms a step, at best | pairs/s | bound on MFU |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in ROWS:
    if path_of(row).exists():
      cells = [f"`{row}`", *_cells(json.loads(path_of(row).read_text()))]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _cells(plan: dict[str, Any]) -> list[str]:
  memory = plan["memory"]
  over = -memory["headroom_bytes"] / report.GIB
  pairs = f"{plan['batch_size'] // plan['devices']}"
  if plan["accumulation"] > 1:
    pairs = f"{pairs} in {plan['accumulation']} parts"
  cells = [
    pairs,
    f"{memory['arguments_bytes'] / report.GIB:.1f}",
    f"{memory['peak_bytes'] / report.GIB:.1f}",
    "fits" if memory["fits"] else f"does not fit by {over:.1f} GiB",
  ]
  if "flops" not in plan:
    return [*cells, "", "", "", "", ""]
  time = plan["time"]
  return [
    *cells,
    f"{plan['flops']['compiled_over_model']:.2f}",
    f"{sum(row['bytes'] for row in plan['collectives']) / report.GIB:.2f}",
    f"{1e3 * time['step_seconds']:,.0f}",
    f"{time['pairs_per_second']:,.0f}",
    f"{time['mfu_bound']:.0%}",
  ]


if __name__ == "__main__":
  app.run(main)
