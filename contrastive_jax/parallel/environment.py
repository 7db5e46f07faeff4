"""The environment variables of a job of several processes, read once and refused by name."""

import ipaddress
import re
from collections.abc import Mapping
from typing import NamedTuple

from contrastive_jax.errors import UserError, nearest

_PREFIX = "CJAX_"
_THREE = ("CJAX_COORDINATOR", "CJAX_PROCESSES", "CJAX_PROCESS")
_KNOWN = ("CJAX_MULTIHOST", *_THREE)
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


class Job(NamedTuple):
  """A job as one process joins it; None leaves it to JAX to find out."""

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


def job(environment: Mapping[str, str]) -> Job | None:
  """Returns the job that the environment describes, or None for a process of its own.

  Raises:
    UserError: for an unknown variable, a value that is none, or variables that do not go together.
  """
  check_names(environment)
  several = _truth(environment, "CJAX_MULTIHOST")
  given = [name for name in _THREE if environment.get(name, "").strip()]
  if not given:
    return Job() if several else None
  if len(given) < len(_THREE):
    missing = ", ".join(name for name in _THREE if name not in given)
    raise UserError(f"{', '.join(given)} is set but {missing} is not: a job of several processes needs all three")
  if several is False:
    raise UserError(
      f"CJAX_MULTIHOST={environment['CJAX_MULTIHOST']} contradicts {', '.join(given)}: unset one or the others"
    )
  processes = _whole(environment, "CJAX_PROCESSES", 1, 1_000_000)
  process = _whole(environment, "CJAX_PROCESS", 0, processes - 1)
  return Job(_address(environment), processes, process)


def check_names(environment: Mapping[str, str]) -> None:
  """Raises a `UserError` for a variable that begins as ours do and is not one of them."""
  for name in sorted(environment):
    if name.upper().startswith(_PREFIX) and name not in _KNOWN:
      raise UserError(
        f"the environment variable {name} is unknown{nearest(name.upper(), _KNOWN)}: known are {', '.join(_KNOWN)}"
      )


def _truth(environment: Mapping[str, str], name: str) -> bool | None:
  """Reads the truth value of a variable; None where it is unset or empty."""
  text = environment.get(name, "").strip().lower()
  if text not in (*_TRUE, *_FALSE):
    raise UserError(f"{name}={environment[name]} is neither true nor false: write 1 or 0")
  return None if not text else text in _TRUE


def _whole(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
  text = environment[name].strip()
  if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
    raise UserError(f"{name}={environment[name]} must be a whole number from {least} to {most}")
  return int(text)


def _address(environment: Mapping[str, str]) -> str:
  """Reads the coordinator as host:port, with an IPv6 address in brackets."""
  text = environment["CJAX_COORDINATOR"].strip()
  wrong = UserError(
    f"CJAX_COORDINATOR={environment['CJAX_COORDINATOR']} must be host:port with a port from 1 to 65535, such as"
    " node0:1234, 10.0.0.1:1234 or [fd00::1]:1234"
  )
  found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text)
  if not found or not 1 <= int(found[3]) <= 65535:
    raise wrong
  if found[1]:
    try:
      ipaddress.IPv6Address(found[1])
    except ValueError:
      raise wrong from None
  return text
