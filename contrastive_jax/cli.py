"""The frame of the command-line tools: a user's mistake is one sentence and exit code 2, never a traceback.

Other exit codes: 3 after a loss, gradient or state that is not finite; 4 when a file or a checkpoint cannot be written,
and the same command resumes once it can; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM, with the steps so far
saved.
"""

import errno
import importlib.util
import inspect
import logging
import multiprocessing
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from contrastive_jax import paths, terminal
from contrastive_jax.errors import SaveError, UserError, nearest
from contrastive_jax.parallel import distributed, environment
from contrastive_jax.training import fields

# Flags that this module defines are listed in the help of the script that asks for them.
flags.disclaim_key_flags()

USER_ERROR, WRITE_ERROR, INTERRUPTED = 2, 4, 130
# What a disk or a network file system says when a file cannot be written, and no mistake of ours.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def run(main: Callable[..., None], *, named: bool = False) -> None:
  """Parses the flags and runs `main`; exits with 2 and one sentence after a user's mistake.

  Args:
    main: what runs then.
    named: whether arguments that are no flags are given to `main`, each as one of its own; otherwise they are mistakes.
  """

  def guarded(arguments: list[str]) -> None:
    names = arguments[1:] if named else []
    if len(arguments) > 1 and not named:
      _fail(f"unexpected argument '{arguments[1]}': options start with --")
    # Orbax and absl report every save at level info; warnings are what a user must see.
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
      environment.check_names(os.environ)
      main(*names)
    except SaveError as error:
      # Tasks of the failed save still wait in threads, and Python's end would print a traceback for each.
      print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
      sys.stdout.flush()
      for child in multiprocessing.active_children():
        child.kill()  # Data workers ignore what asks them to end.
      distributed.leave()
      os._exit(error.exit_code)
    except UserError as error:
      _fail(error, error.exit_code)
    except KeyboardInterrupt:
      _fail("interrupted", INTERRUPTED)
    except OSError as error:
      if isinstance(error, PermissionError) and error.filename:
        _fail(f"{error.filename}: {error.strerror}; allow this user to read and write there, or name another path")
      if error.errno not in WRITE_ERRORS:
        raise
      where = f"{error.filename}: " if error.filename else ""
      _fail(f"{where}{error.strerror}; mend that and run the same command again", WRITE_ERROR)

  before = sys.stderr
  sys.stdout, sys.stderr = terminal.lasting(sys.stdout, 1), terminal.lasting(sys.stderr, 2)
  for handler in logging.root.handlers:
    # What an import has set up; absl takes its place where it finds it on standard error, else each line comes twice.
    if isinstance(handler, logging.StreamHandler) and handler.stream is before:
      handler.setStream(sys.stderr)
  app.run(guarded, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  try:
    return flags.FLAGS(_underscored(arguments, flags.FLAGS))
  except SystemExit:
    sys.exit(0)  # absl ends --help with 1, as if it had failed.
  except ConfigFileError as error:
    # What a config file raised is a mistake in code, and is shown as Python shows it.
    cause = error.__cause__
    if isinstance(cause, SystemExit) and not cause.code:
      _fail(f"--config={error}: the file ended Python before it gave a config")
    way_out = _with_dot(str(cause))
    if way_out != str(cause):
      cause.add_note(way_out)
    raise cause from None
  except flags.Error as error:
    # absl wraps what a parser raises; ours say which file or flag they are about.
    said = error.__context__ if isinstance(error.__context__, UserError) else error
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.removeprefix("no").startswith("config."):
      said = "--config is missing: name a file such as --config=configs/emoji.py"
    said = " ".join(str(said).split())
    way_out = _with_dot(said)
    if way_out == said and isinstance(error, flags.IllegalFlagValueError):
      way_out = _of_another_type(said) or said
    _fail(way_out)
  except Exception as error:
    # A value that a field refuses is told by ml_collections with errors of Python.
    if not _was_raised_by(error, ml_collections):
      raise
    _fail(_with_dot(" ".join(str(error.args[0] if error.args else error).split())))


def _of_another_type(said: str) -> str | None:
  """Returns the sentence about a value that a field of the config cannot have, in place of what Python says of it."""
  found = re.match(r"flag --config\.(\S+?)=(.*?): ", said, flags=re.DOTALL)
  kind = fields.kind_in_words(found[1]) if found else None
  return kind and f"--config.{found[1]}={found[2]} must be {kind}"


def _with_dot(said: str) -> str:
  """Returns ml_collections' message about a name, with the way out where it refuses the dot in one."""
  refused = re.search(r"does not accept dots in field names .*but the key (.+) contains one", said)
  if not refused:
    return said
  return (
    f"--config: the name '{refused[1]}' holds a dot, which no field may: write it as a value under a label of yours, "
    f'such as {{"mine": {{"name": "{refused[1]}", "weight": 1.0}}}}'
  )


def _was_raised_by(error: Exception, package: types.ModuleType) -> bool:
  """Says whether the innermost frame of an error lies in a package."""
  *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
  return Path(package.__file__).parent in Path(innermost.f_code.co_filename).parents


def _underscored(arguments: list[str], defined: Container[str]) -> list[str]:
  """Spells the flags that are written with dashes, `--find-max-batch`, as they are named, `--find_max_batch`."""

  def spelled(argument: str) -> str:
    name, equals, value = argument.partition("=")
    plain = name.lstrip("-").replace("-", "_")
    known = plain in defined or (plain.startswith("no") and plain[2:] in defined)
    return f"--{plain}{equals}{value}" if name.startswith("--") and known else argument

  return [spelled(argument) for argument in arguments]


def define_config(help_text: str) -> flags.FlagHolder:
  """Defines `--config=FILE` and `--config.<field>=<value>`; `config_value` returns the config."""
  holder = config_flags.DEFINE_config_file("config", None, help_text)
  flags.FLAGS["config"].parser = _ConfigFileParser()
  return holder


def config_value(flag: flags.FlagHolder) -> Any:
  """Returns the config that `define_config` loaded.

  Raises:
    UserError: if the flag was not given.
  """
  if flag.value is None:
    raise UserError(f"--{flag.name} is missing: name a file such as --{flag.name}=configs/emoji.py")
  return flag.value


class ConfigFileError(Exception):
  """A config file, or code that it calls, raised the error that is this one's cause."""


class _ConfigFileParser(flags.ArgumentParser):
  """Loads a config file. absl and ml_collections would make sentences without file and line of what it raises."""

  def parse(self, path: str) -> Any:
    name, *argument = path.split(":", 1)
    file = paths.typed("--config", name)
    if not file.is_file():
      near = nearest(file.stem, (other.stem for other in file.parent.glob("*.py"))) if file.parent.is_dir() else ""
      what = "is a folder" if file.is_dir() else "does not exist"
      raise UserError(f"--config={name} {what}{near}: name a file such as configs/emoji.py")
    if file.suffix != ".py":
      raise UserError(f"--config={name} is not a Python file: name one such as configs/emoji.py")
    try:
      spec = importlib.util.spec_from_file_location("config_file", file)
      module = importlib.util.module_from_spec(spec)
      sys.modules[spec.name] = module
      spec.loader.exec_module(module)
      make = getattr(module, "get_config", None)
      if make is None:
        raise UserError("it has no function get_config: define one, as configs/emoji.py does")
      try:
        inspect.signature(make).bind(*argument)
      except TypeError as error:
        raise UserError(f"get_config() does not take the arguments {argument}: {error}") from None
      config = make(*argument)
      if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() returned {type(config).__name__}: return a ConfigDict, as configs/emoji.py does")
    except UserError as error:
      walked = traceback.walk_tb(error.__traceback__)
      lines = [line for frame, line in walked if Path(frame.f_code.co_filename).absolute() == file.absolute()]
      raise UserError(f"{name}{f', line {lines[-1]}' if lines else ''}: {error}") from None
    except (Exception, SystemExit) as error:
      raise ConfigFileError(name) from error
    config.lock()
    for override in _overrides(flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)):
      _check_override(config, override)
    return config


def _overrides(arguments: Sequence[str]) -> list[str]:
  """Returns the names of the fields that `--config.<field>=<value>` sets."""
  found = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in arguments[1:])
  return list(dict.fromkeys(match[1] for match in found if match))


def _check_override(config: ConfigDict, override: str) -> None:
  """Raises a `UserError` when the command line sets a field that the config does not have."""
  try:
    parts = config_path.split(override)
  except ValueError:
    raise UserError(f"--config.{override} is no name of a field: see configs/common.py for the fields") from None
  node, walked = config, ""
  for part in parts:
    full = f"{walked}[{part!r}]" if isinstance(part, int) else f"{walked}.{part}".lstrip(".")
    if isinstance(node, ConfigDict):
      if part not in node:
        raise UserError(f"--config.{override}: {fields.unknown_field(full, node)}")
      node = node[part]
    elif isinstance(node, list | tuple) and isinstance(part, int):
      if not -len(node) <= part < len(node):
        raise UserError(f"--config.{override}: {walked} has {len(node)} items, so there is no {full}")
      node = node[part]
    else:
      raise UserError(f"--config.{override}: {walked} has no fields")
    walked = full


def _fail(message: object, code: int = USER_ERROR) -> None:
  print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
  sys.exit(code)
