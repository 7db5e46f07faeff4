"""A second place for a run directory, such as a bucket, that is kept like it while the run goes on."""

import dataclasses
import json
import logging
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from contrastive_jax import paths, runs
from contrastive_jax.announcements import say
from contrastive_jax.errors import SaveError, UserError
from contrastive_jax.parallel import distributed
from contrastive_jax.stores import WRITABLE, Store, patiently, reason, scheme
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

# What a resumed run, a report and an evaluation read beside the checkpoints.
PATTERNS = (
  *("config.json", "tokenizer/*", "metrics.jsonl", "sample_ids.jsonl", "sessions.json", "*bad_records.jsonl"),
  *("nonfinite_ids.json", "wandb_id.txt", "events.*", "eval/*", "report.html"),
)
# Seconds before each further attempt while the run goes on; the last one is repeated.
_DELAYS = (1.0, 5.0, 20.0, 60.0)
# Seconds before each further attempt at the end of the run, after which it is given up.
_LAST_DELAYS = (1.0, 5.0, 20.0)
# The file of a checkpoint that no other has alike, even of the same step.
_METADATA = "_CHECKPOINT_METADATA"


def store_of(address: str, workdir: Path) -> Store:
  """Returns the place that `workdir_mirror` names.

  Raises:
    UserError: if nothing can be written to such a place, or it is the run directory or lies within it, or round it.
  """
  field = "workdir_mirror"
  if not scheme(address):
    place, own = paths.folder_to_write(field, address).resolve(), workdir.resolve()
    if place == own or place in own.parents or own in place.parents:
      raise UserError(f"{field}={address} and the run directory {workdir} share a folder: name a place outside it")
    return Store(field, address)
  if scheme(address) not in WRITABLE:
    kinds = ", ".join(f"{kind}://" for kind in WRITABLE)
    raise UserError(f"{field}={address} is no place that a run can be written to: name a folder, or one of {kinds}")
  return Store(field, address)


class _TakenOver(Exception):
  """Another start of the run writes to the mirror; the message is a whole sentence without its end."""


@dataclasses.dataclass(frozen=True)
class _Frozen:
  """A finished checkpoint whose files stay as they are until it has been copied.

  Attributes:
    folder: the folder that holds them.
    names: the names of its files within it.
    linked: whether they are links of ours, so that they stay when the run removes the checkpoint.
  """

  folder: Path
  names: tuple[str, ...]
  linked: bool


class Mirror:
  """Keeps a mirror like a run directory, in a thread of the main process, until the `with` block ends.

  `update` makes a hard link of each file of a new checkpoint and returns; everything else is the thread's. A place that
  fails is tried again, more and more rarely, and warned of. A checkpoint that was not copied when the next one comes is
  left out, so that a slow place holds the disk space of two checkpoints and not more. Only the end waits, until the
  mirror is complete or has failed for good.
  """

  def __init__(self, store: Store | None, workdir: Path, *, keep_last: int, keep_every: int):
    """Prepares a mirror.

    Args:
      store: the place; None keeps no mirror.
      workdir: the run directory, which the caller has locked.
      keep_last: number of the newest checkpoints that are kept there, as in `Checkpoints`.
      keep_every: the number of steps at whose multiples checkpoints are kept there for ever; 0 keeps none of them.
    """
    self._store, self._workdir = store, workdir
    self._keep_last, self._keep_every = keep_last, keep_every
    self._snapshot = workdir / OWN / "partial"
    self._sent: dict[str, tuple[int, int]] = {}
    self._listed: list[str] = []
    # The steps of the run, those of them that wait to be copied or are being copied, and those that are there.
    self._lock = threading.Lock()
    self._steps: list[int] = []
    self._frozen: dict[int, _Frozen] = {}
    self._copying: int | None = None
    self._copied: set[int] = set()
    self._due, self._closing = threading.Event(), threading.Event()
    self._trouble = self._taken_over = ""
    self._patient = True
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Mirror":
    refusal = ""
    if self._store is not None and distributed.is_main():
      try:
        patiently(self._store, self._claim, passes=(Misfit,))
      except (UserError, Misfit) as error:
        refusal = str(error)
    refusal = distributed.from_main(refusal) if self._store is not None else ""
    if refusal:
      raise UserError(refusal)
    if self._store is not None and distributed.is_main():
      self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
      self._thread.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_) -> None:
    failed = ""
    if self._thread is not None and (kind is None or issubclass(kind, UserError)):
      failed = self._finish(patient=kind is None)
      shutil.rmtree(self._snapshot, ignore_errors=True)
    if kind is None and self._store is not None:
      failed = distributed.from_main(failed)
      if failed:
        raise SaveError(failed)
    elif failed:
      log.warning("%s", failed)  # What ended the run says more.

  def update(self) -> None:
    """Has the mirror brought up to date; called while no checkpoint is being written or removed.

    Raises:
      SaveError: if another start of the run has taken the mirror over.
    """
    if self._thread is None:
      return
    if self._taken_over:
      raise SaveError(self._taken_over)
    with self._lock:
      self._steps = finished_steps(self._workdir / "checkpoints")
      for step in set(self._steps) - self._copied - set(self._frozen):
        self._frozen[step] = self._freeze(step)
      late = sorted(set(self._frozen) - {self._copying})[:-1]
      for step in late:
        if step not in self._steps and not self._is_kept_for_good(step):
          self._release(step)
    self._due.set()

  def _is_kept_for_good(self, step: int) -> bool:
    return bool(self._keep_every) and step % self._keep_every == 0

  def _freeze(self, step: int) -> _Frozen:
    folder, links = self._workdir / "checkpoints" / str(step), self._snapshot / str(step)
    names = tuple(path.relative_to(folder).as_posix() for path in paths.files_below(folder))
    try:
      shutil.copytree(folder, links, copy_function=os.link)
      return _Frozen(links, names, linked=True)
    except (shutil.Error, OSError):  # A file system without hard links.
      shutil.rmtree(links, ignore_errors=True)
      return _Frozen(folder, names, linked=False)

  def _release(self, step: int) -> None:
    """Lets go of a checkpoint; the space of large files may take a while to be given back."""
    frozen = self._frozen.pop(step)
    if frozen.linked:
      threading.Thread(target=shutil.rmtree, args=(frozen.folder, True), name="mirror space", daemon=True).start()

  def _finish(self, *, patient: bool) -> str:
    """Waits until the mirror holds all of the run; returns why it does not."""
    self._patient = patient
    self._closing.set()
    self._due.set()
    self._thread.join(1.0)
    if self._thread.is_alive():
      say(f"Waiting until {self._store.address} holds all of the run.")
      self._thread.join()
    if self._taken_over:
      return self._taken_over
    return self._trouble and (
      f"{self._workdir} is whole and its mirror {self._store.address} is not ({self._trouble}): mend that and run the"
      " same command again"
    )

  def _claim(self) -> None:
    """Makes the mirror this start's, or refuses one of another run."""
    store, workdir = self._store, self._workdir
    there, stored = identity(store), workdir / RUN
    here = runs.read_object(stored) if stored.exists() else {}
    steps, complete = finished_steps(workdir / "checkpoints"), complete_steps(store)
    if there is None and not store.is_empty():
      raise UserError(f"workdir_mirror={store.address} holds files and no mirror of a run: name an empty place")
    if complete:  # What a start without a checkpoint left there binds nobody.
      if here.get("run") != there["run"]:
        raise UserError(
          f"workdir_mirror={store.address} mirrors another run than that of {workdir}: name another place, or go on"
          " with that run in an empty --workdir"
        )
      newest, left_out = max(steps, default=-1), here.get("left_out", ())
      ahead = [step for step in complete if step > newest and step not in left_out]
      ahead = [step for step in ahead if not any((workdir / "checkpoints").glob(f"{step}.damaged*"))]
      if ahead:
        raise UserError(
          f"workdir_mirror={store.address} is at step {ahead[-1]} of the run and {workdir} at {max(steps, default=0)}:"
          " go on from there in an empty --workdir, or name another place"
        )
    name = here.get("run") or (there["run"] if there else uuid.uuid4().hex)
    if not here:
      runs.write_object(stored, {"run": name})
    self._listed = there["files"] if there else []
    self._about = {"run": name, "session": uuid.uuid4().hex}
    self._write_about()
    shutil.rmtree(self._snapshot, ignore_errors=True)

  def _write_about(self) -> None:
    self._write(RUN, {**self._about, "files": self._listed})

  def _write(self, name: str, content: Mapping[str, Any]) -> None:
    self._store.write(name, json.dumps(runs.sealed(content)) + "\n")

  def _work(self) -> None:
    last = False
    while not last:
      self._due.wait()
      self._due.clear()
      last = self._closing.is_set()
      delays = iter(_LAST_DELAYS if self._patient else ()) if last else _forever(_DELAYS)
      while True:
        try:
          self._bring_up_to_date()
          self._trouble = ""
          break
        except _TakenOver as error:
          self._taken_over = str(error)
          log.warning("%s", error)
          return
        except Exception as error:  # Each client has errors of its own, and so has a directory that is gone.
          self._trouble = reason(error)
        delay = next(delays, None)
        if delay is None:
          break
        log.warning(
          "The mirror %s could not be brought up to date (%s): trying again in %.0f s.",
          *(self._store.address, self._trouble, delay),
        )
        if last:
          time.sleep(delay)
        elif self._closing.wait(delay):
          break  # The last attempts follow at once.

  def _bring_up_to_date(self) -> None:
    """Copies what the mirror lacks, the newest checkpoint first, and removes what the run has no longer."""
    if not self._workdir.is_dir():
      raise FileNotFoundError(f"{self._workdir} is gone")
    self._confirm()
    while True:
      with self._lock:
        step = self._copying = max(self._frozen, default=None)
        frozen = self._frozen.get(step)
      try:
        # Before the checkpoint, so that the rows there reach at least as far as it does.
        self._send_files()
        if step is None:
          break
        self._send(step, frozen)
        with self._lock:
          self._copied.add(step)
          self._release(step)
      finally:
        self._copying = None
    self._remove_old()

  def _confirm(self) -> None:
    """Raises if another start of the run writes to the mirror: this one must not mix its files with the other's."""
    found = identity(self._store)
    if found is None or found.get("session") != self._about["session"]:
      what = "was removed" if found is None else "was taken over by another start of the run"
      raise _TakenOver(
        f"{self._store.address} {what} while this one worked on it, which writes nothing more there: run one of them at"
        " a time"
      )

  def _send_files(self) -> None:
    names = sorted({path for pattern in PATTERNS for path in self._workdir.glob(pattern) if path.is_file()})
    for path in names:
      name, status = path.relative_to(self._workdir).as_posix(), path.stat()
      if self._sent.get(name) == (status.st_size, status.st_mtime_ns):
        continue
      copy = self._snapshot / "files" / name
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, copy)
      if copy.suffix == ".jsonl":
        _cut_to_whole_lines(copy)
      self._store.put(copy, name)
      copy.unlink()
      self._sent[name] = status.st_size, status.st_mtime_ns
    listed = [path.relative_to(self._workdir).as_posix() for path in names]
    if listed != self._listed:
      self._confirm()
      self._listed = listed
      self._write_about()

  def _send(self, step: int, frozen: _Frozen) -> None:
    """Copies a checkpoint that is not there, or is there as another that the run had at this step."""
    marker, target = f"{OWN}/{step}.json", f"checkpoints/{step}"
    try:
      if self._is_there(step, described(frozen.folder / _METADATA)):
        return
      written = {name: described(frozen.folder / name) for name in frozen.names}
      self._store.remove(marker)
      self._store.remove(target)  # What an upload that was killed has left.
      for name in written:
        self._store.put(frozen.folder / name, f"{target}/{name}")
    except FileNotFoundError:
      if frozen.linked or (self._workdir / target).is_dir():
        raise
      log.warning("%s: step %d was removed here before it was copied to the mirror.", self._workdir, step)
      return
    if self._store.sizes(target) != {name: about["size"] for name, about in written.items()}:
      raise OSError(f"step {step} is not there as it was written")
    self._confirm()
    self._write(marker, {"files": written})

  def _is_there(self, step: int, metadata: Mapping[str, Any]) -> bool:
    """Says whether the mirror has this checkpoint, by its metadata: should another file differ, one is damaged."""
    if step not in complete_steps(self._store):
      return False
    try:
      return manifest(self._store, step).get(_METADATA) == metadata
    except Misfit:
      return False

  def _remove_old(self) -> None:
    """Removes from the mirror what the run keeps no longer, what goes beyond it, and what uploads left unfinished."""
    with self._lock:
      here = {*self._steps}
    if not here:
      return
    complete = complete_steps(self._store)
    of_the_run = [step for step in complete if step <= max(here)]
    kept = {*here, *of_the_run[-self._keep_last :], *filter(self._is_kept_for_good, of_the_run)}
    begun = {name.partition("/")[0] for name in self._store.files("checkpoints")}
    for step in {*complete, *(int(name) for name in begun if name.isdecimal())} - kept:
      self._store.remove(f"{OWN}/{step}.json")
      self._store.remove(f"checkpoints/{step}")


def _forever(delays: tuple[float, ...]) -> Iterator[float]:
  yield from delays
  while True:
    yield delays[-1]


def _cut_to_whole_lines(path: Path) -> None:
  """Cuts off a row that was being written when the file was copied."""
  if path.stat().st_size:
    with path.open("r+b") as file:
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
      file.truncate(end)
