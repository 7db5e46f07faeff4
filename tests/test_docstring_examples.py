"""The examples in docstrings give what they show, and public functions on arrays have one."""

import doctest
import importlib
import inspect

import pytest

MODULES = [
  "contrastive_jax.models.attention",
  "contrastive_jax.models.positions",
  "contrastive_jax.models.pooling",
]
# Functions that an example would not make clearer.
WITHOUT = {"fuse_heads", "split_heads", "SelfAttention", "AttentionPool"}


def public(module):
  return {
    name: value
    for name, value in vars(module).items()
    if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
  }


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_give_what_they_show(name):
  module = importlib.import_module(name)
  finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(verbose=False)
  missing, told = [], []
  for each, value in public(module).items():
    # Without the module: the type checks of the tests wrap functions, which then seem to come from elsewhere.
    found = [test for test in finder.find(value, each, module=False, globs=dict(vars(module))) if test.examples]
    if not found and each not in WITHOUT and not (inspect.isclass(value) and issubclass(value, Exception)):
      missing.append(each)
    for test in found:
      runner.run(test, out=told.append)
  assert not runner.failures, "".join(told)
  assert not missing
