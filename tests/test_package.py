"""The library installs and imports on its own, without the repository around it."""

import subprocess
import sys

import pytest

from tests import runs


def test_importing_it_loads_only_what_is_used():
  program = (
    "import sys, contrastive_jax\n"
    "loaded = lambda *names: [name for name in names if name in sys.modules]\n"
    "assert {'Model', 'load'} <= set(dir(contrastive_jax)) and not loaded('jax', 'flax', 'numpy')\n"
    "assert not hasattr(contrastive_jax, 'train')\n"
    "assert contrastive_jax.Model.__name__ == 'Model'\n"
    "assert not loaded('orbax.checkpoint', 'contrastive_jax.training')\n"
    "assert callable(contrastive_jax.load)\n"
    "assert not loaded('contrastive_jax.training.config', 'contrastive_jax.training.loop', 'tensorboardX')\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=runs.ROOT)


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
