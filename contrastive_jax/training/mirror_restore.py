"""Brings the run that a mirror holds into a run directory on a new machine."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from contrastive_jax import paths, runs
from contrastive_jax.announcements import say
from contrastive_jax.bad_records import RETRY_DELAYS
from contrastive_jax.errors import UserError
from contrastive_jax.parallel import distributed
from contrastive_jax.run_lock import RunLock
from contrastive_jax.stores import Store, patiently
from contrastive_jax.training.checkpoint import finished_steps
from contrastive_jax.training.mirror_layout import (
  OWN,
  RUN,
  Misfit,
  complete_steps,
  described,
  identity,
  manifest,
)

log = logging.getLogger(__name__)

# Without these a run cannot go on.
_NEEDED = ("config.json", "tokenizer/")


def restore(store: Store, workdir: Path, check: Callable[[Path], object]) -> None:
  """Brings the run that a mirror holds into a run directory without checkpoints; all processes call it together.

  The newest checkpoint whose files are what their checksums say is taken, and a warning names the file of any that are
  not. The directory is as it was until all of it has been read.

  Args:
    store: the mirror.
    workdir: the run directory, which all processes share.
    check: raises a `UserError` for a run directory that the config does not go on with. It is called with one that has
      the small files and an empty checkpoint, before anything large is read.

  Raises:
    UserError: if the mirror cannot be read, holds a run that `check` refuses, lacks a file, or has no checkpoint whose
      files fit; or if the processes do not share the directory.
  """
  if distributed.from_main(bool(finished_steps(workdir / "checkpoints"))):
    return
  refusal, step = "", None
  with RunLock(workdir):
    if distributed.is_main():
      try:
        step = _restore(store, workdir, check)
      except (UserError, Misfit) as error:
        refusal = str(error)
    refusal, step = distributed.from_main([refusal, step])
  if refusal:
    raise UserError(refusal)
  if step is not None:
    say(f"{workdir} was restored from step {step} of {store.address}.")
    _require_shared(workdir, step)


def _require_shared(workdir: Path, step: int) -> None:
  """Raises a `UserError` on all processes if one of them does not see what the main one has restored."""
  if not distributed.is_several():
    return
  for delay in (*RETRY_DELAYS, None):
    (missing,) = distributed.any_of(step not in finished_steps(workdir / "checkpoints"))
    if not missing:
      return
    if delay is None:
      raise UserError(
        f"{workdir} was restored by the main process and is not there for all: name one that all hosts share"
      )
    time.sleep(delay)


def _restore(store: Store, workdir: Path, check: Callable[[Path], object]) -> int | None:
  """Restores on the main process; returns the step, or None where the mirror holds no checkpoint."""
  about = patiently(store, lambda: identity(store), passes=(Misfit,))
  steps = patiently(store, lambda: complete_steps(store)) if about else []
  if not steps:
    return None
  staging = workdir / OWN / "restoring"
  shutil.rmtree(staging, ignore_errors=True)
  try:
    names = about["files"]
    lacking = [need for need in _NEEDED if not any(name.startswith(need) for name in names)]
    if lacking:
      raise UserError(f"{store.address} lacks {lacking[0]} of its run: put it back, or name another workdir_mirror")
    for name in names:
      try:
        patiently(store, lambda name=name: store.get(name, staging / name), passes=(FileNotFoundError,))
      except FileNotFoundError:
        raise UserError(
          f"{store.address} lacks {name} of its run: put it back, or name another workdir_mirror"
        ) from None
    empty = staging / "checkpoints" / str(steps[-1])
    empty.mkdir(parents=True)
    try:
      check(staging)
    except UserError as error:
      weights = f"init_from={staging} and another --workdir"
      said = str(error).replace(weights, "init_from=FOLDER, a copy of it, and another workdir_mirror")
      raise UserError(said.replace(str(staging), store.address)) from None
    empty.rmdir()
    step = _restore_newest(store, steps, staging)
    # What is left out is beyond the run from now on, which does not make the mirror one of a run that is further.
    left_out = [other for other in steps if other > step]
    runs.write_object(workdir / RUN, {"run": about["run"], **({"left_out": left_out} if left_out else {})})
    _put_in_place(staging, workdir, names, step)
    return step
  finally:
    shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(OSError):
      staging.parent.rmdir()  # Unless it holds more, as it does once the run is there.


def _restore_newest(store: Store, steps: Iterable[int], staging: Path) -> int:
  """Fetches the newest checkpoint that is what its manifest says, and returns its step."""
  misfits = []
  for step in sorted(steps, reverse=True):
    target = staging / "checkpoints" / str(step)
    try:
      say(f"Restoring step {step} from {store.address}.")
      for name, expected in manifest(store, step).items():
        _fetch(store, f"checkpoints/{step}/{name}", target / name, expected)
      return step
    except Misfit as error:
      shutil.rmtree(target, ignore_errors=True)
      misfits.append(str(error))
      log.warning("%s: step %d of the mirror is left out.", error, step)
  raise UserError(f"{store.address} has no checkpoint that can be restored; of the newest, {misfits[0]}")


def _fetch(store: Store, name: str, target: Path, expected: Mapping[str, Any]) -> None:
  try:
    patiently(store, lambda: store.get(name, target), passes=(FileNotFoundError,))
  except FileNotFoundError:
    raise Misfit(f"{store.address}/{name} is missing") from None
  found = described(target)
  if found != dict(expected):
    what = "size" if found["size"] != expected.get("size") else "checksum"
    raise Misfit(f"{store.address}/{name} is not what was written (its {what} differs)")


def _put_in_place(staging: Path, workdir: Path, names: Iterable[str], step: int) -> None:
  """Moves what was restored into the run directory; the checkpoint, which makes it a run, comes last."""
  # Of a start that made no checkpoint, as its tokenizer may be another.
  shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
  for name in names:
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    (staging / name).replace(workdir / name)
  source, target = (folder / "checkpoints" / str(step) for folder in (staging, workdir))
  for file in paths.files_below(source):
    with file.open("rb") as written:
      os.fsync(written.fileno())
  target.parent.mkdir(exist_ok=True)
  source.replace(target)
