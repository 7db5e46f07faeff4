"""The library installs and imports on its own, without the repository around it."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import contrastive_jax
from contrastive_jax.interop import imports
from tests import runs
from tests.interop import checkpoints


def test_importing_it_loads_only_what_is_used():
  program = (
    "import sys, contrastive_jax\n"
    "loaded = lambda *names: [name for name in names if name in sys.modules]\n"
    "assert {'Model', 'load', 'train'} <= set(dir(contrastive_jax)) and not loaded('jax', 'flax', 'numpy')\n"
    "assert not hasattr(contrastive_jax, 'tarin')\n"
    "assert contrastive_jax.Model.__name__ == 'Model'\n"
    "assert not loaded('orbax.checkpoint', 'contrastive_jax.training')\n"
    "assert callable(contrastive_jax.load)\n"
    "assert not loaded('contrastive_jax.training.config', 'contrastive_jax.training.loop', 'tensorboardX')\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=runs.ROOT)


def imported(*patterns):
  """Names of the third-party packages that the files import, anywhere in them."""
  found = set()
  for path in (path for pattern in patterns for path in runs.ROOT.glob(pattern)):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        found.update(alias.name.partition(".")[0] for alias in node.names)
      elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        found.add(node.module.partition(".")[0])
  own = {"contrastive_jax", "data", "configs", "benchmarks", *(path.stem for path in runs.ROOT.glob("*.py"))}
  return found - sys.stdlib_module_names - own


def plain(requirement):
  return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def distributions(names):
  """The distribution of each package; one that is not installed goes by its own name."""
  known = importlib.metadata.packages_distributions()
  return {name: {plain(each) for each in known.get(name, [name])} for name in names}


def test_the_dependencies_are_what_the_library_imports():
  project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
  listed, extras = {plain(each) for each in project["dependencies"]}, project["optional-dependencies"]
  needed = distributions(imported("contrastive_jax/**/*.py"))
  optional = {plain(each) for each in extras["wandb"]}
  missing = [name for name, found in needed.items() if not found & (listed | optional)]
  unused = listed - {each for found in needed.values() for each in found}
  assert not missing and not unused
  for name in optional:
    assert name not in listed
  commands = distributions(imported("data/**/*.py", "configs/*.py", "*.py"))
  data = {plain(each) for each in (*extras["data"], *extras["cluster"])}
  # The digits of scikit-learn are made by a command of their own, which says what it needs.
  del commands["sklearn"]
  assert not [name for name, found in commands.items() if not found & (listed | data)]


@pytest.mark.slow
def test_a_command_that_was_copied_out_of_the_checkout_knows_the_version(tmp_path):
  shutil.copy(runs.ROOT / "embed.py", tmp_path)
  imports.save(imports.Imported("small", *checkpoints.model("siglip_ti16"), checkpoints.tokenizer()), tmp_path / "run")
  (tmp_path / "texts.txt").write_text("a dog\n")
  command = [sys.executable, "embed.py", "--workdir=run", "--texts=texts.txt", "--output=out.npy"]
  subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(runs.ROOT)})
  about = json.loads((tmp_path / "out.about.json").read_text())
  assert about["version"] == contrastive_jax.__version__


@pytest.mark.slow
def test_it_installs_without_data_and_configs(tmp_path):
  target = tmp_path / "site"
  command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(runs.ROOT)]
  subprocess.run(command, check=True)
  program = (
    "import sys, contrastive_jax\n"
    f"assert contrastive_jax.__file__.startswith({str(target)!r})\n"
    "from contrastive_jax import losses\n"
    "from contrastive_jax.evaluation import report\n"
    "from contrastive_jax.training import config, loop\n"
    "assert losses.OBJECTIVES and contrastive_jax.load\n"
    "assert not any(name.split('.')[0] in ('data', 'configs', 'tensorflow', 'torch') for name in sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env={"PYTHONPATH": str(target)})
  assert (target / "contrastive_jax" / "evaluation" / "report.html.j2").is_file()
  (installed,) = importlib.metadata.distributions(name="contrastive_jax", path=[str(target)])
  assert installed.version == contrastive_jax.__version__
