"""What a user of the command line did wrong, said in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake the user can mend: the message names the field, its value and what would work."""


def nearest(name: str, options: Iterable[str]) -> str:
  """Returns " (did you mean 'x'?)" for the closest of `options`, or "" when nothing is close."""
  matches = difflib.get_close_matches(name, [str(option) for option in options], n=1)
  return f" (did you mean '{matches[0]}'?)" if matches else ""


def require_known(field: str, name: str, options: Iterable[str]) -> None:
  """Raises a `UserError` that lists `options` and names the nearest when `name` is not one of them."""
  known = [str(option) for option in options]
  if name not in known:
    raise UserError(f"{field}='{name}' is unknown{nearest(name, known)}: choose one of {', '.join(known)}")
