"""Errors that a user can mend, said in one sentence."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
  """A mistake the user can mend: the message names the field, its value and what would work."""

  exit_code = 2


class NonFiniteError(UserError):
  """The loss, its gradient or the parameters are infinite or not a number; the message says where to look."""

  exit_code = 3


class SaveError(UserError):
  """A checkpoint could not be written; the message names the last good one."""

  exit_code = 4


def closest(name: str, options: Iterable[str]) -> str | None:
  """Returns the option that a misspelt name most likely means, or None when nothing is close.

  A name may be the initials of an option, such as "lr", resemble it in its letters, or be one of its words.
  """
  known = list(dict.fromkeys(str(option) for option in options))
  if name in known:
    return name
  asked = name.lower().replace("-", "_")
  initials = [option for option in known if len(asked) > 1 and _initials(option) == asked]
  plain = {option.lower().replace("-", "_"): option for option in reversed(known)}
  alike = [plain[match] for match in difflib.get_close_matches(asked, plain, n=1)]
  parts = [option for option in known if asked in option.split("_")]
  return next(iter([*initials, *alike, *parts]), None)


def _initials(option: str) -> str:
  return "".join(word[:1] for word in option.split("_"))


def nearest(name: str, options: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the closest of `options`, or "" when nothing is close."""
  match = closest(name, options)
  return f" (did you mean '{match}'?)" if match is not None else ""


@contextlib.contextmanager
def fields_of(where: str) -> Iterator[None]:
  """Gives fields their whole names in an error about them, which knows them as arguments: "tile=0" lies at `where`."""
  try:
    yield
  except UserError as error:
    raise UserError(re.sub(r"(?<![\w.])(\w+)=", rf"{where}.\1=", str(error))) from None


def require_known(field: str, name: str, options: Iterable[str]) -> None:
  """Raises a `UserError` that lists `options` and names the nearest when `name` is not one of them."""
  known = [str(option) for option in options]
  if name not in known:
    raise UserError(f"{field}={name!r} is unknown{nearest(name, known)}: choose one of {', '.join(known)}")
