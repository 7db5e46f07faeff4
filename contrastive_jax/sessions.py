"""The sessions of a run: when each began, how long it took, and its hardware, versions, commit and command.

`sessions.json` in the run directory holds one object for each time that `train.py` worked on the run, oldest first.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from contrastive_jax.errors import UserError
from contrastive_jax.runs import read_json, sealed, unsealed, write_atomically

log = logging.getLogger(__name__)

FILE = "sessions.json"
# The packages whose versions decide what a run computes.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "pillow")


class Session:
  """One session, written when it begins and again whenever the run reaches a logged step.

  A session that is killed keeps the time of its last logged step. A file that cannot be written never stops a run: the
  session is then missing from the report.
  """

  def __init__(self, workdir: Path, *, began: float, start: int, devices: Sequence[jax.Device]):
    """Begins a session.

    Args:
      workdir: the run directory.
      began: `time.monotonic()` when the command began.
      start: the step at which the session begins.
      devices: all devices of the run.
    """
    self._path, self._earlier, self._clock = workdir / FILE, read(workdir), began
    spent = time.monotonic() - began
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=spent)
    self._record: dict[str, Any] = {
      "started": started.isoformat(timespec="seconds"),
      "seconds": round(spent, 1),
      "start": start,
      "step": start,
      "command": shlex.join(["python", *sys.argv]),
      "hardware": hardware(devices),
      "versions": versions(),
      "commit": commit(),
    }
    self._write()

  def reach(self, step: int) -> None:
    """Notes that the run has made `step` updates."""
    self._record |= {"step": step, "seconds": round(time.monotonic() - self._clock, 1)}
    self._write()

  def _write(self) -> None:
    # A full disk is reported by whatever has to be written, and so is a run directory that is gone: none is made here.
    if not self._path.parent.is_dir():
      return
    with contextlib.suppress(OSError):
      records = [sealed(record) for record in (*self._earlier, self._record)]
      write_atomically(self._path, json.dumps(records, indent=2) + "\n")


def read(workdir: Path) -> list[dict[str, Any]]:
  """Reads the sessions of a run, oldest first; those whose record is damaged are left out, which a warning says."""
  path = workdir / FILE
  try:
    found = read_json(path) if path.exists() else []
  except (UserError, OSError) as error:
    log.warning("The sessions of the run are left out: %s.", error)
    return []
  wanted = {"started": str, "seconds": int | float, "start": int, "step": int, "command": str, "hardware": str}
  wanted |= {"versions": dict, "commit": str}
  sound = []
  for each in found if isinstance(found, list) else [found]:
    with contextlib.suppress(ValueError):
      record = unsealed(each)
      if all(isinstance(record.get(name), kind) for name, kind in wanted.items()):
        sound.append(record)
        continue
    log.warning("%s: a session is left out, its record is damaged.", path)
  return sound


def hardware(devices: Sequence[jax.Device]) -> str:
  """Describes the devices, and the processor where they are its cores: "8 TPU v5 lite" or "2 cores of AMD EPYC"."""
  hosts = len({device.process_index for device in devices})
  on_hosts = f" on {hosts} hosts" if hosts > 1 else ""
  if devices[0].platform != "cpu":
    return f"{len(devices)} {devices[0].device_kind}{on_hosts}"
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  emulated = f", as {len(devices)} devices" if len(devices) > 1 else ""
  return f"{cores} core{'s' * (cores > 1)} of {_processor()}{emulated}{on_hosts}"


def _processor() -> str:
  """Returns the marketing name of the processor, where the system tells it."""
  try:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError):
    lines = []
  names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
  """Lists the versions of Python, of the system and of the packages that decide what a run computes."""
  found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def commit() -> str:
  """Returns the git commit of the checkout that the library runs from, marked where files differ; "" elsewhere."""
  root = Path(__file__).resolve().parents[1]
  if not (root / ".git").exists():
    return ""

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
  except (OSError, subprocess.SubprocessError):
    return ""


def facts(sessions: Sequence[dict[str, Any]]) -> dict[str, str]:
  """Makes the report's facts about the sessions of a run, by label."""
  if not sessions:
    return {}
  total = duration(sum(session["seconds"] for session in sessions))
  said = {
    "Started": _when(sessions[0]["started"]),
    "Time": total if len(sessions) == 1 else f"{total} in {len(sessions)} sessions",
    "Hardware": "; then ".join(dict.fromkeys(session["hardware"] for session in sessions)),
    "Versions": "; then ".join(
      dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in session["versions"].items()) for session in sessions
      )
    ),
  }
  commits = list(dict.fromkeys(session["commit"] for session in sessions if session["commit"]))
  return said | ({"Commit": "; then ".join(commits)} if commits else {})


def commands(sessions: Sequence[dict[str, Any]]) -> list[str]:
  """Returns the commands that make the run again, in order, each once."""
  return list(dict.fromkeys(session["command"] for session in sessions))


def _when(started: str) -> str:
  try:
    return f"{datetime.datetime.fromisoformat(started):%d %B %Y, %H:%M} UTC".removeprefix("0")
  except ValueError:
    return started


def duration(seconds: float) -> str:
  """Writes a duration in its two largest units.

  Examples:
    >>> duration(42.0), duration(320.0), duration(11100.0), duration(187200.0)
    ('42 s', '5 min 20 s', '3 h 05 min', '2 d 4 h')
  """
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min {whole % 60:02} s"
  minutes = round(seconds / 60)
  if minutes < 24 * 60:
    return f"{minutes // 60} h {minutes % 60:02} min"
  hours = round(seconds / 3600)
  return f"{hours // 24} d {hours % 24} h"
