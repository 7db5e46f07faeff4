"""Checks the fields of a config, and that only those differ on resume which may."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from contrastive_jax import upgrades
from contrastive_jax.errors import UserError
from contrastive_jax.models.presets import model_config
from contrastive_jax.objectives import term_options
from contrastive_jax.training.checkpoint import has_checkpoint
from contrastive_jax.training.fields import check_fields, checked_config
from contrastive_jax.training.ranges import check_ranges

_HOW_BLOCKS_RUN = ("remat", "unroll", "attention_kernel")
# What may differ when a run is resumed: where and how it runs and what it reports, not what it computes.
_FREE_ON_RESUME = (
  "mesh.",
  *(f"model.{tower}.transformer.{name}" for tower in ("image", "text") for name in _HOW_BLOCKS_RUN),
  "accumulation",
  "log_",
  "checkpoint_",
  "eval_every",
  "evals",
  "final_evals",
  "profile_steps",
  "wandb_project",
  "workdir_mirror",
  "init_model",
  "schedule.on_growth",
  "on_nonfinite",
  "max_skipped_steps",
  "data.threads",
  "data.workers",
  "data.prefetch_bytes",
  "data.cache_",
  "data.data_dir",
  "data.max_bad_share",
)


def check_names_and_numbers(config: ConfigDict) -> None:
  """Raises a `UserError` for a field that no config has, one that is missing, of another type or out of its range."""
  content = as_json(config)
  check_fields(content)
  check_ranges(content)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _with_all_fields(content: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config in which fields of towers and losses that it leaves out, or has got since, have their defaults."""
  model = dataclasses.asdict(model_config(content))
  del model["dtype"]
  given = content.get("loss_options", {})  # Imported weights have none.
  options = {
    term: {name: option.default for name, option in known.items()} | given.get(term, {})
    for term, known in term_options().items()
  }
  return json.loads(json.dumps({**content, "model": model, "loss_options": options}))


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Returns the resolved config as JSON would give it back."""
  return json.loads(config.to_json())


def check_resume(workdir: Path, config: ConfigDict, saved: Mapping[str, Any] | None = None) -> bool:
  """Compares the config with the one that `workdir` was started with, once there is a checkpoint.

  Args:
    workdir: the run directory.
    config: the config that the command gives.
    saved: the config that the restored checkpoint holds; None is that of `config.json`, for checkpoints of older
      versions and before one is read.

  Returns:
    Whether the data changed: then the rest of the run is a new segment.

  Raises:
    UserError: for a field that may not differ, with both values.
  """
  if not has_checkpoint(workdir) or (saved is None and not (workdir / "config.json").exists()):
    return False  # What a start that failed left behind binds nobody.
  started = checked_config(workdir) if saved is None else upgrades.config(saved, f"the checkpoint of {workdir}")
  if "total_steps" not in started:
    raise UserError(
      f"{workdir} holds imported weights and no run: name another --workdir, and start from them with"
      f" --config.init_from={workdir}"
    )
  old, new = (dict(_flat(_with_all_fields(content))) for content in (started, as_json(config)))
  # A field that did not exist then and is off now changes nothing.
  compared = {*old, *(name for name, value in new.items() if value)}
  changed = [name for name in sorted(compared) if old.get(name) != new.get(name)]
  data_changed = False
  for name in changed:
    if name.startswith(_FREE_ON_RESUME):
      continue
    if name.startswith("data."):
      data_changed = True
    elif name != "total_steps":
      start_anew = f"start a new run from its weights with --config.init_from={workdir} and another --workdir"
      try:
        check_ranges({name: old.get(name)})
      except UserError as error:
        raise UserError(
          f"{workdir} cannot go on, since it was started by an older version and now {error}: {start_anew}"
        ) from None
      raise UserError(
        f"{workdir} was started with {name}={old.get(name)!r}, not {new.get(name)!r}: give the old value, or"
        f" {start_anew}"
      )
    elif new[name] < old[name]:
      raise UserError(f"total_steps={new[name]} is less than the {old[name]} of {workdir}: a run may only grow")
  return data_changed
