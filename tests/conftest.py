"""Eight CPU devices for every test, and a cache of compiled programs for the commands that tests start."""

import getpass
import os
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests start the commands as a user does, on one device, and each would compile the same small programs again.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"contrastive_jax_tests_{getpass.getuser()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Under nohup and in the background they are ignored, by all commands that tests start as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Of several CPU devices, a program from the cache is wrong: see `contrastive_jax.parallel.mesh`.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)
