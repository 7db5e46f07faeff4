"""Every command in README, docs/ and help texts can be run: its script, flags, config file and config fields exist."""

import ast
import functools
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from tests import runs

PAGES = [runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("*.md"))]
SCRIPTS = [runs.ROOT / f"{name}.py" for name in ("train", "eval", "plan", "convert", "embed", "distill")]
MODULES = [*sorted((runs.ROOT / "benchmarks").glob("*.py")), *sorted((runs.ROOT / "data").glob("*.py"))]
# A word of an example that stands for the reader's own file or number.
OPTIONAL = re.compile(r"\[[^\]]*\]$|\s\[(--[^\]]*)\]")


def commands_of(text: str) -> list[str]:
  """The commands that begin with `python` or `make`, joined where a backslash continues them, comments cut off."""
  joined = re.sub(r"\\\n\s*", " ", text)
  found = []
  for line in joined.splitlines():
    for part in (line.strip(), *re.findall(r"`([^`]+)`", line)):
      if re.match(r"(\.venv(-plan)?/bin/)?(python (-m )?[\w./]+|make [a-z-]+$|plan\.py --)", part):
        found.append(re.sub(r"\s+#.*", "", part).replace("...", ""))
  return found


def examples() -> list[tuple[str, str]]:
  """(where it stands, command) of every example."""
  found = [(page.name, command) for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))]
  for path in (*SCRIPTS, *MODULES):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found += [(path.name, command) for command in commands_of(docstring)]
  return list(dict.fromkeys(found))


@functools.cache
def flags_of(script: str) -> frozenset[str]:
  """Names of the flags that a script defines, read from its source."""
  path = runs.ROOT / script if script.endswith(".py") else runs.ROOT / f"{script.replace('.', '/')}.py"
  return frozenset(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", path.read_text(encoding="utf-8")))


@functools.cache
def config_of(path: str) -> ConfigDict:
  spec = importlib.util.spec_from_file_location("config_of_an_example", runs.ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def require_field(config: ConfigDict, dotted: str) -> None:
  for name in dotted.split("."):
    assert name in config, f"no field {dotted}"
    config = config[name]


EXAMPLES = examples()


def test_there_are_examples():
  assert len(EXAMPLES) > 30
  assert {"README.md", "evaluation.md", "eval.py", "train.py"} <= {where for where, _ in EXAMPLES}


@pytest.mark.parametrize(("where", "command"), EXAMPLES)
def test_the_example_names_what_exists(where, command):
  words = shlex.split(re.sub(r"[\[\]](?=--|$|\s)", " ", command.replace("[--", " --")))
  if words[0] == "make":
    assert re.search(rf"^{words[1]}:", (runs.ROOT / "Makefile").read_text(), re.MULTILINE)
    return
  words = words[1:] if words[0].endswith("python") else words
  if words[0] == "-c":
    return
  module = words[0] == "-m"
  script, arguments = (words[1], words[2:]) if module else (words[0], words[1:])
  if module and script not in ("pip", "pytest"):
    assert importlib.util.find_spec(script)
  if script in ("pip", "pytest"):
    return
  assert module or (runs.ROOT / script).is_file()
  given = dict(re.match(r"--([\w.-]+)=?(.*)", word.rstrip("]")).groups() for word in arguments if word.startswith("--"))
  config = given.get("config")
  for name in given:
    field = name.removeprefix("config.")
    if field == name:
      known = flags_of(script)
      assert name in known or name.removeprefix("no") in known, f"{script} has no --{name}"
    elif config:
      require_field(config_of(config), field)
  if config:
    assert (runs.ROOT / config).is_file()


@pytest.mark.parametrize("path", [*SCRIPTS], ids=lambda path: path.name)
def test_no_script_defines_a_flag_with_a_dash(path):
  assert not re.findall(r"DEFINE_\w+\(\s*\"\w+-", path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_shows_the_examples(path):
  shown = subprocess.run([sys.executable, path.name, "--help"], cwd=runs.ROOT, capture_output=True, text=True)
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
  assert docstring.splitlines()[0] in shown.stdout
