"""Functions on embeddings take arrays of any kind by position, and refuse what their signatures do not say."""

import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import (
  calibration,
  choices,
  diagnostics,
  multilabel,
  probes,
  retrieval,
  tasks,
  zero_shot,
)

CLASSES, GROUPS = 6, 9


class Series:
  """What a shuffled pandas Series or DataFrame does: brackets look up labels, conversion goes by position."""

  def __init__(self, values):
    self.values, self.shape, self.dtype = values, values.shape, values.dtype
    self.order = np.random.default_rng(5).permutation(len(values))

  def __array__(self, dtype=None, copy=None):
    return np.array(self.values, dtype=dtype)

  def __len__(self):
    return len(self.values)

  def __getitem__(self, label):
    return self.values[self.order[label]]

  def __eq__(self, other):
    raise AssertionError("positions only")

  __hash__ = None


def unit(rng, *shape):
  rows = rng.normal(size=shape).astype(np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def problem():
  rng = np.random.default_rng(3)
  return {
    "train": unit(rng, 60, 8),
    "test": unit(rng, 40, 8),
    "weights": unit(rng, CLASSES, 8),
    "train_labels": np.arange(60) % CLASSES,
    "test_labels": rng.integers(0, CLASSES, 40),
    "guesses": rng.integers(0, CLASSES, 40),
    "train_group": np.arange(60) % GROUPS,
    "test_group": np.arange(40) % GROUPS,
    "confidence": rng.random(40),
    "hit": rng.random(40) > 0.5,
    "scores": rng.normal(size=(40, CLASSES)),
    "shown": rng.random((40, CLASSES)) > 0.5,
    "choice_images": unit(rng, 4, 2, 8),
    "choice_captions": unit(rng, 4, 2, 8),
  }


GROUPED = ["test", "train", "test_group", "train_group"]
PROBED = ["train", "train_labels", "test", "test_labels"]
FUNCTIONS = {
  "few_shot": (["train_labels"], lambda labels: probes.few_shot(labels, 3)),
  "linear_probe": (PROBED, lambda *rows: probes.linear_probe(*rows, classes=CLASSES, epochs=1)),
  "best_weight_decay": (PROBED, lambda *rows: probes.best_weight_decay(*rows, classes=CLASSES, epochs=1)),
  "knn_probe": (PROBED, lambda *rows: probes.knn_probe(*rows, classes=CLASSES, k=5)),
  "recall_at_k": (GROUPED, retrieval.recall_at_k),
  "top_k": (["test", "train"], lambda *rows: retrieval.top_k(*rows, k=3)),
  "predict": (["test", "weights"], lambda *rows: zero_shot.predict(*rows, logit_scale=9.0, k=3)),
  "balanced_accuracy": (["guesses", "test_labels"], zero_shot.balanced_accuracy),
  "accuracy_of_draws": (
    ["test", "weights", "test_labels"],
    lambda *rows: zero_shot.accuracy_of_draws(*rows, classes_per_draw=3, draws=4),
  ),
  "alignment": (GROUPED, diagnostics.alignment),
  "cross_uniformity": (GROUPED, diagnostics.cross_uniformity),
  "uniformity": (["test"], diagnostics.uniformity),
  "tolerance": (["test", "test_labels"], diagnostics.tolerance),
  "modality_gap": (["test", "train"], diagnostics.modality_gap),
  "modality_separability": (["test", "train"], diagnostics.modality_separability),
  "pair_diagnostics": (GROUPED, lambda *rows: diagnostics.pair_diagnostics(*rows, thorough=True, most=20)),
  "global_auc": (GROUPED, calibration.global_auc),
  "expected_calibration_error": (["confidence", "hit"], calibration.expected_calibration_error),
  "average_precision": (["scores", "shown"], multilabel.average_precision),
  "choice_accuracy": (["choice_images", "choice_captions"], choices.choice_accuracy),
}


def numbers(found):
  if isinstance(found, dict):
    return np.array(list(found.values()))
  return np.concatenate([np.ravel(part) for part in found]) if isinstance(found, tuple) else np.asarray(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_of_every_kind_are_taken_by_position(name):
  """A stand-in for pandas answers brackets by another order, as a shuffled Series does."""
  fields, function = FUNCTIONS[name]
  rows = [problem()[field] for field in fields]
  expected = numbers(function(*rows))
  for convert in (Series, np.ndarray.tolist, jnp.asarray, list):
    np.testing.assert_allclose(numbers(function(*map(convert, rows))), expected, rtol=1e-5, atol=1e-6)


def spoilt(array):
  """What is no such array, by what is said of it."""
  where = np.arange(array.size).reshape(array.shape) == 3
  yield "shape", array[..., None]
  yield "shape", array.ravel()[0]
  yield "not", array.astype(complex)
  yield "not", array.astype(str)
  yield "mask", np.ma.array(array, mask=where)
  yield "dict", dict(enumerate(array))
  yield "NumPy", [array.tolist(), [3]]
  objects = array.astype(object)
  objects[where] = None
  yield "None, not one of", objects
  if array.dtype.kind == "f":
    yield "finite", np.where(where, np.nan, array)
    yield "finite", np.where(where, -np.inf, array)
    yield "not", (array * 9).astype(int)
  else:
    yield "not", array.astype(np.float64)
    yield "not", np.where(where, np.nan, array)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_signature_does_not_say_is_refused_by_name(name):
  fields, function = FUNCTIONS[name]
  rows = [problem()[field] for field in fields]
  for position, array in enumerate(rows):
    for said, wrong in spoilt(array):
      with pytest.raises(UserError, match=said):
        function(*rows[:position], wrong, *rows[position + 1 :])


@pytest.mark.parametrize(
  ("name", "field", "change", "said"),
  [
    ("recall_at_k", "train_group", lambda group: group[:-1], "has 59 gallery, gallery has 60"),
    ("linear_probe", "test", lambda rows: rows[:, :-1], "test has 7 dim, train has 8"),
    ("linear_probe", "test_labels", lambda labels: labels + 1, "test_labels run from 1 to 6, there are 6 classes"),
    ("knn_probe", "train_labels", lambda labels: labels - 1, "train_labels run from -1 to 4"),
    ("knn_probe", "test_labels", lambda labels: labels.astype(np.uint64) - 1, "there are 6 classes"),
    ("accuracy_of_draws", "weights", lambda rows: rows[:-1], "there are 5 classes"),
    ("few_shot", "train_labels", lambda labels: labels[:0], "0 labels"),
    ("few_shot", "train_labels", lambda labels: labels - 1, "from -1 on"),
    ("expected_calibration_error", "confidence", lambda shares: 100 * shares, "from 0 to 1"),
  ],
)
def test_sizes_and_ranges_are_those_of_the_problem(name, field, change, said):
  fields, function = FUNCTIONS[name]
  rows = problem() | {field: change(problem()[field])}
  with pytest.raises(ValueError, match=said):
    function(*(rows[name] for name in fields))


def test_groups_of_64_bits_stay_apart():
  """As floating-point numbers, which NumPy makes of int64 and uint64 together, both groups would be one."""
  rows = np.eye(2, dtype=np.float32)
  one, other = np.array([2**62, 2**62 + 1]), np.array([2**62 + 1, 2**62], np.uint64)
  assert retrieval.recall_at_k(rows, rows, one, other, ks=(1, 2)) == {"recall@1": 0.0, "recall@2": 1.0}
  assert diagnostics.alignment(rows, rows, one, other) == pytest.approx(2.0)
  high = np.array([2**63, 2**63 + 1], np.uint64)
  assert retrieval.recall_at_k(rows, rows, high, high, ks=(1,)) == {"recall@1": 1.0}


def test_sets_refuse_labels_that_are_missing_or_no_integers():
  labels = np.array([1, 0, 2])
  images, said = [np.zeros((2, 2, 3), np.uint8)] * 3, {"classes": ["a", "b", "c"], "templates": ["{}"]}
  assert tasks.LabelledSet("set", images, labels.astype(object), **said).labels.dtype == np.int64
  missing = labels.astype(object)
  missing[1] = None
  for wrong in (np.ma.array(labels, mask=[0, 1, 0]), missing, labels.astype(float), labels.astype(str), labels > 0):
    with pytest.raises(UserError, match="set: labels"):
      tasks.LabelledSet("set", images, wrong, **said)
  with pytest.raises(UserError, match="set: labels is int64"):
    tasks.MultiLabelSet("set", images, np.ones((3, 3), int), **said)


@pytest.mark.slow
def test_columns_of_pandas_are_arrays_like_any_other():
  pandas = pytest.importorskip("pandas")
  labels = pandas.Series(problem()["test_labels"], index=np.random.default_rng(2).permutation(40) + 3)
  test, train = (pandas.DataFrame(problem()[name]).sample(frac=1, random_state=1) for name in ("test", "weights"))
  rows = test.to_numpy(), train.to_numpy(), labels.to_numpy()
  _, function = FUNCTIONS["accuracy_of_draws"]
  for column in (labels, labels.astype("Int64"), labels.astype("category"), labels.array):
    np.testing.assert_array_equal(function(test, train, column), function(*rows))
  with pytest.raises(UserError, match="not integers"):
    function(test, train, labels.astype("Int64").where(labels > 0))
