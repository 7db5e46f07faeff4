"""Options of other libraries' configs: each is honoured by the importer, must hold, or has no effect.

One table per kind of file lists all options that the library knows. `check` refuses what a table does not allow, and
names the option and its value: a config is never read as if an option were not there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from contrastive_jax.errors import UserError, nearest

# Options named in an error about one that is unknown; more would be unreadable.
_NAMED = 40
# No tower has more of anything; a damaged number is refused before arrays of its size are described.
_LARGEST = 2**24


@dataclasses.dataclass(frozen=True)
class Kind:
  """The values that an option may have.

  Attributes:
    words: the words for them in an error, such as "a whole number from 1 on".
    holds: a function that says whether a value is one of them.
  """

  words: str
  holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _is_numbers(value: Any) -> bool:
  values = value if isinstance(value, list) else [value]
  return bool(values) and all(_is_number(item) for item in values)


COUNT = Kind(f"a whole number from 1 to {_LARGEST}", _is_count)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
EPS = Kind("a number above 0 and below 1", lambda value: _is_number(value) and 0 < value < 1)
NUMBER = Kind("a finite number", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object with options", lambda value: isinstance(value, Mapping))
LIST = Kind("a list", lambda value: isinstance(value, list))
CHANNELS = Kind("a number or one number a channel", _is_numbers)
ANY = Kind("anything", lambda value: True)


def optional(kind: Kind) -> Kind:
  """Returns the kind of the same values, or null, which stands for the default."""
  return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


@dataclasses.dataclass(frozen=True)
class Honoured:
  """The importer reads the option.

  Attributes:
    kind: the values that it can read.
    how: the use that it makes of them.
  """

  kind: Kind
  how: str


@dataclasses.dataclass(frozen=True)
class Required:
  """Only these values can be imported; another is refused.

  Attributes:
    values: the allowed values, among which an empty value and null count as equal.
    why: the consequence of another value, as a clause that follows the value in the error.
  """

  values: tuple[Any, ...]
  why: str


@dataclasses.dataclass(frozen=True)
class Ignored:
  """The option has no effect on embeddings.

  Attributes:
    why: the reason that it has none.
  """

  why: str


Option = Honoured | Required | Ignored
Table = Mapping[str, Option]

# Why an option changes no embedding, where files of several libraries have such options.
TRAINING = Ignored("only training reads it")
INITIAL = Ignored("the weights hold what was learned")
RECORD = Ignored("it records where the file comes from")


def check(config: Any, table: Table, *, source: str, within: str = "") -> None:
  """Refuses a config with an option that the table does not know, or with a value that it does not allow.

  Args:
    config: the content of a JSON file, or of a part of it.
    table: the table of all options that the file may have.
    source: where the config comes from, for errors.
    within: the part of the file, such as "vision_config", for errors.

  Raises:
    UserError: naming the option and its value.
  """
  if not isinstance(config, Mapping):
    raise UserError(f"{source} has {within or 'a config'} that is {_shown(config)} and not an object with options")
  for name, value in config.items():
    where = f"{within}.{name}" if within else name
    option = table.get(name)
    if option is None:
      known = ", ".join(sorted(table)[:_NAMED]) + (", ..." if len(table) > _NAMED else "")
      raise UserError(
        f"{source} has the unknown option {where}={_shown(value)}{nearest(name, table)}: remove it if it has no effect;"
        f" known are {known}"
      )
    if isinstance(option, Honoured) and not option.kind.holds(value):
      raise UserError(f"{source} has {where}={_shown(value)}, which must be {option.kind.words}")
    if isinstance(option, Required) and not any(_same(value, allowed) for allowed in option.values):
      allowed = " or ".join(_shown(allowed) for allowed in option.values)
      raise UserError(f"{source} has {where}={_shown(value)}, {option.why}: only {allowed} can be imported")


def check_choice(name: str, value: Any, choices: Iterable[str], *, source: str) -> None:
  """Refuses a value that is not among the choices, naming the nearest of them."""
  known = list(choices)
  if not isinstance(value, str) or value not in known:
    raise UserError(f"{source} has {name}={_shown(value)}{nearest(str(value), known)}: known are {', '.join(known)}")


def _same(value: Any, allowed: Any) -> bool:
  if isinstance(value, bool) or isinstance(allowed, bool):
    return value is allowed
  # An empty list, object or text says as little as null does.
  return value == allowed or (value in (None, {}, [], "") and allowed is None)


def _shown(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 120 else f"{shown[:117]}..."
