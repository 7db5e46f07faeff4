"""How a mirror of a run directory is laid out, and how its own files are read.

A mirror holds the files of the run directory under their own names, and in its folder `mirror` what says which of them
are whole: `run.json` names the run and its small files, and `<step>.json` lists the files of a checkpoint with their
sizes and SHA-256. That is written last, after all of them: a checkpoint without one was never finished and is none.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from contrastive_jax import runs
from contrastive_jax.stores import Store, patiently

# The folder, there and in the run directory, of what belongs to the mirror and not to the run.
OWN = "mirror"
RUN = f"{OWN}/run.json"


class Misfit(Exception):
  """A file that is not what its manifest says; the message is a whole sentence without its end."""


def read(store: Store, name: str) -> dict[str, Any] | None:
  """Reads an object with a digest of itself; None where there is none.

  Raises:
    Misfit: if it is damaged.
  """
  content = store.read(name)
  if content is None:
    return None
  try:
    return runs.unsealed(json.loads(content))
  except ValueError as error:
    said = "it holds no JSON" if isinstance(error, json.JSONDecodeError) else error
    raise Misfit(f"{store.address}/{name} is damaged, {said}") from None


def identity(store: Store) -> dict[str, Any] | None:
  """Returns the content of `run.json`: "run" and "session", ids both, and "files"; None where there is no mirror.

  Raises:
    Misfit: if it is damaged.
  """
  content = read(store, RUN)
  if content is None:
    return None
  files = content.get("files")
  if not isinstance(content.get("run"), str) or not isinstance(files, list):
    raise Misfit(f"{store.address}/{RUN} names no run")
  relative(files, f"{store.address}/{RUN}")
  return content


def complete_steps(store: Store) -> list[int]:
  """Returns the steps of the complete checkpoints of a mirror, ascending."""
  found = (re.fullmatch(r"([0-9]+)\.json", name) for name in store.files(OWN))
  return sorted(int(match[1]) for match in found if match)


def manifest(store: Store, step: int) -> dict[str, Any]:
  """Returns size and SHA-256 of each file of a complete checkpoint.

  Raises:
    Misfit: if it is damaged.
    UserError: if it cannot be read now.
  """
  name = f"{OWN}/{step}.json"
  content = patiently(store, lambda: read(store, name), passes=(Misfit,)) or {}
  if not isinstance(content.get("files"), dict) or not content["files"]:
    raise Misfit(f"{store.address}/{name} lists no files")
  relative(content["files"], f"{store.address}/{name}")
  return content["files"]


def relative(names: Iterable[Any], source: str) -> None:
  """Raises `Misfit` where one of the names that a file of the mirror gives leads out of the folder that it is for."""
  for name in names:
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts:
      raise Misfit(f"{source} names the file {name!r}, which no run has")


def described(path: Path) -> dict[str, Any]:
  """Returns the size and the SHA-256 of a file."""
  with path.open("rb") as file:
    return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
