"""Config files and overrides: a user's mistake is a sentence, and what code raises keeps its file and line."""

import subprocess
import sys
import textwrap

import pytest

from contrastive_jax import cli
from contrastive_jax.errors import UserError
from tests import runs


def write(path, *lines):
  body = "\n".join(f"  {line}" for line in lines)
  path.write_text(
    f"from configs import common\n\n\ndef get_config():\n  config = common.get_config()\n{body}\n  return config\n"
  )
  return path


RAISED = {
  "KeyError": "{}['batch_size']",
  "IndexError": "[][3]",
  "TypeError": "len(3)",
  "ValueError": "int('x')",
  "AttributeError": "config.optimizer.lr += 1",
  "FileNotFoundError": "open('/nowhere/at/all')",
  "ZeroDivisionError": "1 / 0",
  "ModuleNotFoundError": "import no_such_module",
}


@pytest.mark.parametrize("kind", RAISED)
def test_what_a_config_file_raises_is_not_made_a_sentence(kind, tmp_path):
  path = write(tmp_path / "mine.py", RAISED[kind])
  with pytest.raises(cli.ConfigFileError) as raised:
    cli._ConfigFileParser().parse(str(path))
  cause = raised.value.__cause__
  assert type(cause).__name__ == kind
  frames = cause.__traceback__
  lines = []
  while frames:
    lines.append((frames.tb_frame.f_code.co_filename, frames.tb_lineno))
    frames = frames.tb_next
  assert (str(path), 6) in lines


SCRIPT = """
import subprocess, sys
sys.argv[0] = "train.py"
from contrastive_jax import cli
from contrastive_jax.training.run import Run
CONFIG = cli.define_config("what to run")
def main():
  if cli.config_value(CONFIG).name == "broken":
    {}["ours"]
  if CONFIG.value.name == "closed":
    subprocess.run(["./README.md"])  # Permission to run a text is denied to anybody.
  Run.from_config(CONFIG.value)
cli.run(main)
"""


def run(*arguments):
  done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=runs.ROOT, capture_output=True, text=True)
  return done.returncode, done.stderr.strip()


def test_the_traceback_of_a_config_file_is_shown(tmp_path):
  path = write(tmp_path / "mine.py", "pass", "[][3]")
  code, said = run(f"--config={path}")
  assert code == 1
  assert f'File "{path}", line 7, in get_config' in said
  assert said.endswith("IndexError: list index out of range")


@pytest.mark.parametrize(
  ("line", "code", "end"),
  [
    ("raise SystemExit('set DATA first')", 1, "set DATA first"),
    ("raise SystemExit(7)", 7, ""),
    ("raise SystemExit", 2, "the file ended Python before it gave a config"),
    ("config.data.sources = {'tfds/name/big.v2': 1.0}", 1, '{"mine": {"name": "tfds/name/big.v2", "weight": 1.0}}'),
  ],
)
def test_a_config_file_that_ends_python_is_no_success(line, code, end, tmp_path):
  done, said = run(f"--config={write(tmp_path / 'mine.py', line)}")
  assert done == code and said.endswith(end)


@pytest.mark.slow
def test_an_error_of_ours_keeps_its_traceback():
  code, said = run("--config=configs/emoji.py", "--config.name=broken")
  assert code == 1 and said.endswith("KeyError: 'ours'") and "no field" not in said


@pytest.mark.slow
def test_a_place_that_this_user_may_not_use_is_a_sentence():
  code, said = run("--config=configs/emoji.py", "--config.name=closed")
  assert code == 2 and said.startswith("train.py: ./README.md: Permission denied; allow this user to")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--config.batchsize=64"], "has no field 'batchsize' (did you mean 'batch_size'?)"),
    (["--config.optimizer.lr=3"], "has no field 'optimizer.lr' (did you mean 'learning_rate'?)"),
    (["--config.data.sources.twemojis=2"], "data.sources has no entry 'twemojis' (did you mean 'twemoji'?)"),
    (["--config.objective.sigmoid=1"], "lacks objective.sigmoid: give all of objective"),
    (["--config.curriculum[2].steps=3"], "curriculum has 0 items, so there is no curriculum[2]"),
    (["--config.curriculum.0.steps=3"], "is no name of a field"),
    (["--config.seed.x=3"], "seed has no fields"),
    (["--config.=3"], "is no name of a field"),
    (["--config.batch_size=1.5"], "--config.batch_size=1.5 must be a whole number"),
    (["--config.batch_size="], "--config.batch_size= must be a whole number"),
    (["--config.optimizer.learning_rate=1e-3e"], "--config.optimizer.learning_rate=1e-3e must be a number"),
    (["--config.log_sample_ids=maybe"], "--config.log_sample_ids=maybe must be True or False"),
    (["--config.optimizer=adamw"], "--config.optimizer=adamw must be a part with the fields name, learning_rate"),
    (["--config.frozen=('image/',"], "--config.frozen=('image/', must be a list of texts"),
    (["--config.loss_options.softmax.tile=none"], "softmax.tile=none must be a whole number or None"),
    (["--config.data.sources=3"], "--config.data.sources=3 must be a mapping of names"),
    (["--config.optimizer={'name':'adamw'}"], "the config lacks optimizer.learning_rate"),
    (["--nosuch=3"], "Unknown command line flag 'nosuch'"),
    (["stray"], "unexpected argument 'stray'"),
  ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_a_sentence(arguments, sentence):
  code, said = run("--config=configs/emoji.py", *arguments)
  assert code == 2 and sentence in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
  ("name", "content", "sentence"),
  [
    ("nowhere.py", None, "nowhere.py does not exist"),
    ("mine.json", "{}", "is not a Python file"),
    ("mine.py", "x = 3", "has no function get_config"),
    ("mine.py", "def get_config():\n  return None", "returned NoneType: return a ConfigDict"),
    ("mine.py:tiny", "def get_config():\n  return None", r"does not take the arguments \['tiny'\]"),
    (
      "mine.py",
      """
      from configs import common
      def get_config():
        return common.model('siglip_b16', vision={'imagesize': 64})
      """,
      r"mine\.py, line 4: model\.image\.imagesize is not a field \(did you mean 'image_size'\?\)",
    ),
  ],
)
def test_a_file_that_is_no_config_is_a_sentence(name, content, sentence, tmp_path):
  if content is not None:
    (tmp_path / name.partition(":")[0]).write_text(textwrap.dedent(content))
  with pytest.raises(UserError, match=sentence):
    cli._ConfigFileParser().parse(str(tmp_path / name))


def test_a_config_may_take_an_argument(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from ml_collections import ConfigDict\ndef get_config(name):\n  return ConfigDict({'name': name})\n"
  )
  assert cli._ConfigFileParser().parse(f"{tmp_path / 'mine.py'}:tiny").name == "tiny"
