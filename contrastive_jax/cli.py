"""What the command-line tools share: a user's mistake is one sentence and exit code 2, never a traceback.

Other exit codes: 3 after a loss, gradient or state that is not finite; 4 when a file or a checkpoint cannot be written,
and the same command goes on once it can; 130 after SIGINT and 143 after SIGTERM, with the steps so far saved.
"""

import ast
import errno
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from contrastive_jax.errors import SaveError, UserError
from contrastive_jax.parallel import environment

USER_ERROR, WRITE_ERROR, INTERRUPTED = 2, 4, 130
# What a disk or a network file system says when a file cannot be written, and no mistake of ours.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def run(main: Callable[[], None]) -> None:
  """Parses the flags and runs `main`; exits with 2 and one sentence after a user's mistake."""

  def guarded(arguments: list[str]) -> None:
    if len(arguments) > 1:
      _fail(f"unexpected argument '{arguments[1]}': options start with --")
    # Orbax and absl report every save at level info; warnings are what a user must see.
    logging.set_verbosity(logging.WARNING)
    try:
      environment.check_names(os.environ)
      main()
    except SaveError as error:
      # Tasks of the failed save still wait in threads, and Python's end would print a traceback for each.
      print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
      sys.stdout.flush()
      for child in multiprocessing.active_children():
        child.terminate()
      os._exit(error.exit_code)
    except UserError as error:
      _fail(error, error.exit_code)
    except KeyboardInterrupt:
      _fail("interrupted", INTERRUPTED)
    except OSError as error:
      if error.errno not in WRITE_ERRORS:
        raise
      where = f"{error.filename}: " if error.filename else ""
      _fail(f"{where}{error.strerror}; mend that and run the same command again", WRITE_ERROR)

  # Names of files may hold what a terminal cannot show; that must not end what has been computed.
  sys.stdout.reconfigure(errors="backslashreplace")
  app.run(guarded, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  try:
    return flags.FLAGS(_underscored(arguments, flags.FLAGS))
  except SystemExit:
    raise
  # Flag parsing loads and overrides the config file: absl, ml_collections, the import system and the config itself
  # each raise their own kinds.
  except Exception as error:
    _fail(_first_sentence(error))


def _underscored(arguments: list[str], defined: Container[str]) -> list[str]:
  """Spells the flags that are written with dashes, `--find-max-batch`, as they are named, `--find_max_batch`.

  A `~` at the beginning of the config's path is the home folder.
  """

  def spelled(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if name == "--config":
      value = os.path.expanduser(value)  # A shell does this only at the beginning of a word.
    plain = name.lstrip("-").replace("-", "_")
    known = plain in defined or (plain.startswith("no") and plain[2:] in defined)
    return f"--{plain}{equals}{value}" if name.startswith("--") and known else argument

  return [spelled(argument) for argument in arguments]


def _first_sentence(error: Exception) -> str:
  text = str(error)
  if text.startswith(("'", '"')):
    text = ast.literal_eval(text)  # A KeyError shows the repr of its message.
  unknown = re.match(r"""["']*(\w+)['"]*\s+Did you mean "(\w+)\"""", text)
  if unknown:
    return f"--config has no field '{unknown[1]}' (did you mean '{unknown[2]}'?)"
  unknown = re.fullmatch(r"""["']*(\w+)["']*""", text)
  if unknown:
    return f"--config has no field '{unknown[1]}': see configs/common.py for the fields"
  if "Traceback" in text:
    # A config file that raised: what it said stands at the end, behind the name of the exception.
    return re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
  return " ".join(text.split())


def config_value(flag: flags.FlagHolder) -> Any:
  """The config that a `DEFINE_config_file` flag loaded.

  Raises:
    UserError: if the flag was not given or its file cannot be loaded.
  """
  try:
    config = flag.value
    if config is not None:
      config.keys()  # A file that failed to load says so at the first use.
  except OSError:
    given = next((word for word in sys.argv if word.startswith(f"--{flag.name}=")), f"--{flag.name}")
    raise UserError(f"{given} cannot be loaded: name a file such as configs/emoji.py") from None
  if config is None:
    raise UserError(f"--{flag.name} is missing: name a file such as --{flag.name}=configs/emoji.py")
  return config


def _fail(message: object, code: int = USER_ERROR) -> None:
  print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
  sys.exit(code)
