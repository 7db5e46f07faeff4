"""Patterns that name many files: ranges and lists in braces, as in a shell, and `*`."""

import glob
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import bracex

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from data.files.servers import scheme

# Names of one pattern; more are taken for a slip in a range.
MOST_NAMES = 10_000_000
# Servers are asked for so many files at once.
_AT_ONCE = 32


def expand(
  pattern: str,
  *,
  field: str,
  is_there: Callable[[str], bool],
  found: Callable[[str], list[str]],
) -> list[str]:
  """Returns the files that a pattern names, sorted and each once.

  A file of this machine that is really called so is itself, whatever its name holds.

  Args:
    pattern: a path or an address, with `{000..123}`, `{a,b}`, `*`, `?` or `[...]`. Over HTTP only braces are patterns.
    field: flag or config field that holds it, which errors name.
    is_there: a function that says whether a file is in its place.
    found: a function that returns the files of a bucket that fit an address with `*`.

  Raises:
    UserError: if a file that is named is missing or a folder, if no file fits, or the pattern is too large.
  """
  files: set[str] = set()
  named: list[str] = []
  for name in _without_braces(pattern, field):
    kind = scheme(name)
    path = name if kind else str(paths.typed(field, name))
    if kind == "http" and "*" not in path:
      named.append(path)
    elif glob.has_magic(path) and not (kind == "" and os.path.lexists(path)):
      fitting = found(path) if kind else [each for each in glob.glob(path, recursive=True) if not os.path.isdir(each)]
      if not fitting:
        raise UserError(f"{field}={pattern} names no file, since none fits {name}: name some that are there")
      files.update(fitting)
    else:
      named.append(path)
  named = sorted(set(named) | {file for file in files if not scheme(file)})
  missing = _missing(named, is_there)
  if missing:
    count = f"{len(missing):,} of them are" if len(missing) > 1 else "one of them is"
    raise UserError(
      f"{field}={pattern} names {len(files.union(named)):,} files, and {count} not there, the first being {missing[0]}:"
      " put it there, or name those that are"
    )
  return sorted(files.union(named))


def _without_braces(pattern: str, field: str) -> list[str]:
  """Returns what the braces of a pattern stand for."""
  if not pattern.strip() or (not scheme(pattern) and os.path.lexists(os.path.expanduser(pattern))):
    return [pattern]
  try:
    return bracex.expand(pattern, limit=MOST_NAMES)
  except bracex.ExpansionLimitException:
    raise UserError(f"{field}={pattern} names more than {MOST_NAMES:,} files: mend its range") from None


def _missing(files: list[str], is_there: Callable[[str], bool]) -> list[str]:
  pool = ThreadPoolExecutor(_AT_ONCE if any(map(scheme, files)) else 1)
  try:
    return [file for file, there in zip(files, pool.map(is_there, files), strict=True) if not there]
  finally:
    pool.shutdown(cancel_futures=True)
