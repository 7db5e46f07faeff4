"""The examples in docstrings give what they show, and public functions on arrays have one."""

import doctest
import importlib
import inspect

import pytest

MODULES = [
  "contrastive_jax.evaluation.calibration",
  "contrastive_jax.evaluation.choices",
  "contrastive_jax.evaluation.diagnostics",
  "contrastive_jax.evaluation.multilabel",
  "contrastive_jax.evaluation.retrieval",
  "contrastive_jax.evaluation.zero_shot",
  "contrastive_jax.models.attention",
  "contrastive_jax.models.positions",
  "contrastive_jax.models.pooling",
  "contrastive_jax.preprocess.images",
  "contrastive_jax.preprocess.native",
  "contrastive_jax.preprocess.packing",
  "contrastive_jax.preprocess.rows",
  "contrastive_jax.preprocess.views",
  "data.mixture",
  "data.sources",
]
# An example would not make these clearer, or would need a model.
WITHOUT = {
  *("fuse_heads", "split_heads", "SelfAttention", "AttentionPool"),
  *("classifier", "evaluate_choices", "evaluate_multilabel", "evaluate_retrieval", "evaluate_zero_shot"),
  *("modality_separability", "pair_diagnostics"),
  *("decode", "straight", "flatten", "trim", "in_square", "unpatchify", "join", "Views"),
  *("Placement", "PackedGrids", "PackedTexts", "place_texts"),
  *("Drawn", "drawn", "Text", "Example", "Source"),
}


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
