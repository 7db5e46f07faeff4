"""Eight CPU devices for every test, set once before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng() -> np.random.Generator:
  return np.random.default_rng(0)
