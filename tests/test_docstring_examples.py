"""The examples in docstrings give what they show, and public functions on arrays have one."""

import doctest
import importlib
import inspect
import re

import pytest

from tests import runs

# Modules whose public functions and classes have an example, but for those of `WITHOUT`.
MODULES = [
  "contrastive_jax.evaluation.calibration",
  "contrastive_jax.evaluation.choices",
  "contrastive_jax.evaluation.diagnostics",
  "contrastive_jax.evaluation.gradients",
  "contrastive_jax.evaluation.multilabel",
  "contrastive_jax.evaluation.retrieval",
  "contrastive_jax.evaluation.zero_shot",
  "contrastive_jax.losses.alignment",
  "contrastive_jax.losses.clusters",
  "contrastive_jax.losses.cross_correlation",
  "contrastive_jax.losses.distillation",
  "contrastive_jax.losses.prototypes",
  "contrastive_jax.losses.queue",
  "contrastive_jax.losses.cacr",
  "contrastive_jax.losses.cwcl",
  "contrastive_jax.losses.decoupled",
  "contrastive_jax.losses.distillation",
  "contrastive_jax.losses.gated",
  "contrastive_jax.losses.gram",
  "contrastive_jax.losses.hard_negatives",
  "contrastive_jax.losses.mann_whitney",
  "contrastive_jax.losses.margin",
  "contrastive_jax.losses.mixup",
  "contrastive_jax.losses.mochi",
  "contrastive_jax.losses.multi_view",
  "contrastive_jax.losses.sigmoid",
  "contrastive_jax.losses.soft_targets",
  "contrastive_jax.losses.softmax",
  "contrastive_jax.losses.spread",
  "contrastive_jax.losses.sorting",
  "contrastive_jax.models.attention",
  "contrastive_jax.models.pooling",
  "contrastive_jax.models.positions",
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
  *("fuse_heads", "split_heads", "by_head", "project", "runs_in_rows", "SelfAttention", "AttentionPool"),
  *("classifier", "evaluate_choices", "evaluate_multilabel", "evaluate_retrieval", "evaluate_zero_shot"),
  *("modality_separability", "pair_diagnostics", "GradientProfile"),
  *("Earlier", "Queue"),
  *("decode", "straight", "flatten", "trim", "in_square", "unpatchify", "join", "Views"),
  *("Placement", "PackedGrids", "PackedTexts", "place_texts"),
  *("Drawn", "drawn", "Text", "Example", "Source"),
}


def modules_with_examples():
  files = [
    path.relative_to(runs.ROOT) for room in ("contrastive_jax", "data") for path in (runs.ROOT / room).rglob("*.py")
  ]
  shown = [path for path in sorted(files) if " >>> " in (runs.ROOT / path).read_text(encoding="utf-8")]
  return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in shown]


def public(module):
  return {
    name: value
    for name, value in vars(module).items()
    if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
  }


def examples_of(module, name, value):
  # Without the module: the type checks of the tests wrap functions, which then seem to come from elsewhere.
  found = doctest.DocTestFinder(exclude_empty=True).find(value, name, module=False, globs=dict(vars(module)))
  return [test for test in found if test.examples]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_give_what_they_show(name):
  module, runner, told = importlib.import_module(name), doctest.DocTestRunner(verbose=False), []
  for each, value in public(module).items():
    for test in examples_of(module, each, value):
      runner.run(test, out=told.append)
  assert runner.tries and not runner.failures, "".join(told)


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_site_shows_examples_as_code(name):
  source = inspect.getsource(importlib.import_module(name))
  assert not re.search(r"\n\n *>>> ", source), "an example stands below a line 'Examples:'"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_on_arrays_have_an_example(name):
  module = importlib.import_module(name)
  missing = [each for each, value in public(module).items() if not examples_of(module, each, value)]
  assert not set(missing) - WITHOUT
