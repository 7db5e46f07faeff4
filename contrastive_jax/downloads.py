"""Files of other machines, copied once into a cache on this one and read there like any others.

The cache is `contrastive_jax` in `$XDG_CACHE_HOME`, or in `~/.cache`. What is copied is kept by its address and by what
the store says of its version, so that a file that was replaced there is copied anew. Nothing is ever removed from it.
"""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.stores import WEB, Store, patiently, scheme, version


def cache() -> Path:
  """Returns the folder of the cache, which need not be there."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contrastive_jax"


def file(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a file: what was typed where that is a path, and a copy of it where it is an address.

  Args:
    field: flag or config field that holds it.
    text: the path or the address.

  Raises:
    UserError: as `paths.typed` does for a path; for an address if no file is there or it cannot be read.
  """
  if not scheme(text):
    return paths.typed(field, text)
  store = Store(field, text)
  about = patiently(store, store.about)
  if about is None:
    raise UserError(f"{field}={store.address} is no file: name one that is there")
  return _copied(store, {"": about})


def folder(field: str, text: str | os.PathLike) -> Path:
  """Returns the path of a folder: what was typed where that is a path, and a copy of all in it where it is an address.

  Args:
    field: flag or config field that holds it.
    text: the path or the address.

  Raises:
    UserError: as `paths.typed` does for a path; for an address if nothing is below it, it cannot be read, or it is one
      of the web, where nobody says which files lie in a folder.
  """
  if not scheme(text):
    return paths.typed(field, text)
  store = Store(field, text)
  if scheme(text) in WEB:
    raise UserError(
      f"{field}={store.address} cannot be read as a folder, since no web address lists its files: copy them here, or to"
      " a bucket, and name that"
    )
  found = patiently(store, store.files)
  if not found:
    is_file = patiently(store, store.about) is not None
    raise UserError(f"{field}={store.address} {'is a file' if is_file else 'is not there'}: name a folder with files")
  return _copied(store, found)


def _copied(store: Store, found: dict) -> Path:
  """Returns the path of a copy of files, which are copied where the cache does not have them as they are now."""
  for name, about in found.items():
    if about.get("size") is None:
      raise UserError(f"{store.field}={store.address} does not say how large {name or 'it'} is: copy it here by hand")
  versions = [store.address, *(f"{name} {version(about)}" for name, about in sorted(found.items()))]
  entry = cache() / hashlib.sha256("\n".join(versions).encode()).hexdigest()[:20]
  name = store.address.rpartition("/")[2]
  copy = entry / (name.partition("?")[0] if scheme(store.address) in WEB else name)
  if entry.is_dir() and not _wrong(copy, found):
    return copy
  shutil.rmtree(entry, ignore_errors=True)
  partial = paths.beside(entry, uuid.uuid4().hex)
  try:
    for name in found:
      patiently(store, lambda name=name: store.get(name, _at(partial / copy.name, name)))
    wrong = _wrong(partial / copy.name, found)
    if wrong:
      raise UserError(f"{store.field}={store.address} did not come whole ({Path(wrong[0]).name}): run it again")
    try:
      partial.replace(entry)
    except OSError:
      if not entry.is_dir():
        raise  # Else another process was the first.
  except OSError as error:
    raise UserError(
      f"{cache()} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
    ) from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return copy


def _at(copy: Path, name: str) -> Path:
  return copy / name if name else copy


def _wrong(copy: Path, found: dict) -> list[str]:
  """Returns the paths of the copy where there is no file, or one of another size than it should have."""
  paths_there = [(_at(copy, name), about["size"]) for name, about in found.items()]
  return [str(path) for path, size in paths_there if not path.is_file() or path.stat().st_size != size]
