"""Eight CPU devices for every test, and one cache of compiled programs, set once before JAX starts."""

import getpass
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests start the commands as a user does, and each would compile the same small programs again.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"contrastive_jax_tests_{getpass.getuser()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)
