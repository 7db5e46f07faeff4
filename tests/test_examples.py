"""Every command in README, docs/ and help texts can be run: its script, flags, config file and config fields exist."""

import ast
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from contrastive_jax.training import config as run_config
from tests import runs

PAGES = [runs.ROOT / "README.md", runs.ROOT / "CONTRIBUTING.md", *sorted((runs.ROOT / "docs").glob("*.md"))]
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
    # Not by its name alone: there are a convert.py and a data/convert.py.
    found += [(path.relative_to(runs.ROOT).as_posix(), command) for command in commands_of(docstring)]
  return list(dict.fromkeys(found))


@functools.cache
def flags_of(script: str) -> frozenset[str]:
  """Names of the flags that a script defines, read from its source."""
  path = runs.ROOT / script if script.endswith(".py") else runs.ROOT / f"{script.replace('.', '/')}.py"
  source = path.read_text(encoding="utf-8")
  for module in re.findall(r"adopt_module_key_flags\((\w+)\)", source):
    source += (runs.ROOT / "data" / f"{module}.py").read_text(encoding="utf-8")
  config = {"config"} if "define_config(" in source else set()
  return frozenset(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)) | config


@functools.cache
def config_of(config: str) -> ConfigDict:
  path, *argument = config.split(":", 1)
  spec = importlib.util.spec_from_file_location("config_of_an_example", runs.ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*argument)


def require_field(config: ConfigDict, dotted: str) -> None:
  for name in dotted.split("."):
    assert name in config, f"no field {dotted}"
    config = config[name]


EXAMPLES = examples()


def test_readme_lists_every_field_that_may_change_on_resume():
  readme = (runs.ROOT / "README.md").read_text(encoding="utf-8")
  table = readme.partition("### What may change when a run resumes")[2].partition("\nUntil a run")[0]
  for field in run_config._FREE_ON_RESUME:
    written = field + "*" if field.endswith(("_", ".")) else field
    assert f"`{written}`" in table, field


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
    assert (runs.ROOT / config.partition(":")[0]).is_file()


@pytest.mark.parametrize("path", [*SCRIPTS], ids=lambda path: path.name)
def test_no_script_defines_a_flag_with_a_dash(path):
  assert not re.findall(r"DEFINE_\w+\(\s*\"\w+-", path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_shows_the_examples(path):
  shown = subprocess.run([sys.executable, path.name, "--help"], cwd=runs.ROOT, capture_output=True, text=True)
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
  assert docstring.splitlines()[0] in shown.stdout
  assert shown.returncode == 0


# What makes a run of an example short; the examples themselves stay as they are written.
_TINY_RUN = [
  "--config.total_steps=1",
  "--config.schedule.warmup_steps=0",
  "--config.batch_size=8",
  "--config.final_evals=()",
  "--config.evals=()",
  "--config.eval_every=0",
  "--config.model.text.vocab_size=512",
  "--config.model.embed_dim=16",
  "--config.model.image.transformer.depth=1",
  "--config.model.text.transformer.depth=1",
]
_TINY_PLAN = [
  "--topology=cpu:2",
  "--config.mesh.fsdp=1",
  "--config.batch_size=8",
  *(f"--config.model.{tower}.transformer.depth=1" for tower in ("image", "text")),
]
# Files that the examples name and nobody has here: their flags are checked above.
_NOT_HERE = ("--from=big_vision:", "--from=open_clip:")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
  """A folder in which the repository's commands are typed, with the files that the examples name."""
  desk = tmp_path_factory.mktemp("desk")
  for path in runs.ROOT.iterdir():
    if path.name not in ("runs", ".git", ".venv", "tests"):
      (desk / path.name).symlink_to(path)
  (desk / "FOLDER").mkdir()
  Image.new("RGB", (40, 30), (200, 30, 30)).save(desk / "FOLDER" / "a.png")
  (desk / "FOLDER" / "a.txt").write_text("red\n")
  (desk / "TABLE.csv").write_text("path,id\nFOLDER/a.png,red\n")
  (desk / "captions.txt").write_text("a cat\na dog\n")
  compiled = {"JAX_COMPILATION_CACHE_DIR": str(desk / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  environment = {**os.environ, **compiled, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

  def typed(command: str) -> subprocess.Popen:
    words = [sys.executable, *shlex.split(command)[1:]]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=desk, env=environment, **options)

  typed.folder = desk
  return typed


def done(processes: dict[str, subprocess.Popen]) -> None:
  """Waits for commands, and shows what a failed one said."""
  for command, process in processes.items():
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, f"{command}\n{said}"


@pytest.mark.slow
def test_the_examples_of_the_help_texts_run(desk):
  """In the order in which one needs what another makes, a few at a time."""
  written = {where: [] for where, _ in EXAMPLES}
  for where, command in EXAMPLES:
    written[where].append(re.sub(r"\s*\[--[^\]]*\]", "", command))
  tiny = " ".join(_TINY_RUN)
  (train,) = written["train.py"]
  beside_another = [command for command in written["eval.py"] if "runs/seed1" in command]
  assert beside_another
  digits = "python -m data.digits --data_dir=runs/tfds"  # As README has it.
  assert ("README.md", digits) in EXAMPLES
  clip = "python train.py --config=configs/emoji_clip.py --workdir=runs/emoji_clip"
  first = {command: desk(f"{command} {tiny}") for command in (train, clip)}
  done(first | {digits: desk(digits)})
  scored = [command for command in written["eval.py"] if command not in beside_another]
  # Not distill.py's, which embeds thousands of pictures: its flags and fields are checked above.
  rest = [*scored, *written["embed.py"]]
  # What is exported is a folder of its own, which the import then reads.
  export = next(command for command in written["convert.py"] if "--to=huggingface:" in command)
  rest.append(export.replace(":FOLDER", ":EXPORTED"))
  rest += [f"{command} {' '.join(_TINY_PLAN)}" for command in written["plan.py"]]
  for at in range(0, len(rest), 3):
    done({command: desk(command) for command in rest[at : at + 3]})
  for command in written["convert.py"]:
    if command != export and not any(prefix in command for prefix in _NOT_HERE):
      done({command: desk(command.replace(":FOLDER", ":EXPORTED"))})
  shutil.copytree(desk.folder / "runs/emoji", desk.folder / "runs/seed1")  # In place of one more run.
  done({command: desk(command) for command in beside_another})


@pytest.mark.parametrize(("where", "command"), [pair for pair in EXAMPLES if "--config." in pair[1]])
def test_the_values_of_an_example_fit_the_fields(where, command, monkeypatch):
  """Parsed as the command line is, but for the flags that a script has beside its config."""
  words = shlex.split(command.replace("[", "").replace("]", ""))
  given = [word for word in words if word.startswith("--config")]
  parsed = flags.FlagValues()
  config = config_flags.DEFINE_config_file("config", None, flag_values=parsed)
  monkeypatch.chdir(runs.ROOT)
  monkeypatch.setattr(sys, "argv", ["example", *given])  # Where ml_collections looks for overrides.
  parsed(sys.argv)
  assert config.value is not None
