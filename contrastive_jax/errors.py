"""What a user of the command line did wrong, said in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake the user can mend: the message names the field, its value and what would work."""

  exit_code = 2


class NonFiniteError(UserError):
  """The loss, its gradient or the parameters are infinite or not a number; the message says where to look."""

  exit_code = 3


class SaveError(UserError):
  """A checkpoint could not be written; the message names the last good one."""

  exit_code = 4


def nearest(name: str, options: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the closest of `options`, or "" when nothing is close."""
  matches = difflib.get_close_matches(name, [str(option) for option in options], n=1)
  return f" (did you mean '{matches[0]}'?)" if matches else ""


def require_known(field: str, name: str, options: Iterable[str]) -> None:
  """Raises a `UserError` that lists `options` and names the nearest when `name` is not one of them."""
  known = [str(option) for option in options]
  if name not in known:
    raise UserError(f"{field}='{name}' is unknown{nearest(name, known)}: choose one of {', '.join(known)}")
