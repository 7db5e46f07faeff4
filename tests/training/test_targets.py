"""The cache of a teacher's embeddings: every sample's own under any numbering, and what is missing by name."""

import pickle

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.training.run import Run
from contrastive_jax.training.targets import TargetCache, describe, has_source, write_source
from tests import tiny

DIM = 7


def embeddings(rng, count):
  rows = rng.normal(size=(count, DIM))
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def cache(tmp_path, rng):
  """Two sources whose samples were read in no order, and what each sample's embedding is."""
  describe(tmp_path, {"teacher": "runs/teacher", "step": 3})
  known = {}
  for name, ids in (("one", rng.permutation(50)), ("tfds/two", 1000 + 7 * rng.permutation(30))):
    rows = embeddings(rng, len(ids))
    chunks = [(ids[start : start + 8], rows[start : start + 8]) for start in range(0, len(ids), 8)]
    # A sample that is met again later: what was first read of it counts.
    chunks.append((ids[:2], -rows[:2]))
    assert write_source(tmp_path, name, chunks, "float16") == len(ids)
    known |= {(name, int(number)): row for number, row in zip(ids, rows, strict=True)}
  return tmp_path, known


@pytest.mark.parametrize("id_base", [{"one": 0, "tfds/two": 1 << 40}, {"tfds/two": 0, "one": 1 << 40}])
def test_every_sample_finds_its_own(cache, id_base, rng):
  path, known = cache
  keys = [key for key in known for _ in range(2)]
  rng.shuffle(keys)
  ids = np.array([id_base[name] + number for name, number in keys])
  targets = TargetCache(path, id_base).lookup(ids)
  assert targets.text is None and targets.image.dtype == np.float32
  np.testing.assert_allclose(targets.image, [known[key] for key in keys], atol=1e-3)
  np.testing.assert_allclose(np.linalg.norm(targets.image, axis=1), 1, atol=1e-6)


def test_single_precision_keeps_all_digits(tmp_path, rng):
  rows = embeddings(rng, 20)
  describe(tmp_path, {})
  write_source(tmp_path, "one", [(np.arange(20), rows)], "float32")
  np.testing.assert_allclose(TargetCache(tmp_path, {"one": 5}).lookup(np.arange(5, 25)).image, rows, rtol=1e-6)


def test_what_is_missing_is_named(cache):
  path, _ = cache
  two = {"one": 0, "tfds/two": 1 << 40}
  with pytest.raises(UserError, match="no target of sample 1001 of source 'tfds/two'"):
    TargetCache(path, two).lookup(np.array([3, (1 << 40) + 1001]))
  with pytest.raises(UserError, match="no target of sample 50 of source 'one'"):
    TargetCache(path, two).lookup(np.array([50]))
  with pytest.raises(UserError, match="no targets of source 'three'"):
    TargetCache(path, {**two, "three": 2 << 40})
  with pytest.raises(UserError, match="is no cache of targets"):
    TargetCache(path / "one", two)
  with pytest.raises(UserError, match="holds targets of another teacher"):
    describe(path, {"teacher": "runs/teacher", "step": 4})


def junk(data):
  return b"junk" * len(data)


@pytest.mark.parametrize("file", ["teacher.json", "one/ids.npy", "one/image.npy"])
@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: d[:7] + b"\xff" + d[8:], junk])
def test_damage_is_one_sentence_that_names_the_file(cache, file, damage):
  path, _ = cache
  (path / file).write_bytes(damage((path / file).read_bytes()))
  with pytest.raises(UserError, match=r"\A[^\n]+\Z") as error:
    describe(path, {"teacher": "runs/teacher", "step": 3})
    TargetCache(path, {"one": 0}).lookup(np.arange(50))
  assert str(path / file) in str(error.value)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 300.0])
def test_targets_of_another_length_than_one_are_refused(tmp_path, wrong, rng):
  rows = embeddings(rng, 20)
  rows[3, 2] = wrong
  describe(tmp_path, {})
  write_source(tmp_path, "one", [(np.arange(20), rows)], "float32")
  assert len(TargetCache(tmp_path, {"one": 0}).lookup(np.array([2, 4])).image) == 2
  with pytest.raises(UserError, match="length is not 1"):
    TargetCache(tmp_path, {"one": 0}).lookup(np.arange(20))


@pytest.mark.parametrize(("ids", "shape"), [([1, 0], (2, 7)), ([0, 1], (3, 7)), ([0, 1], (2,)), ([0, 1], (2, 0))])
def test_files_that_do_not_belong_together_are_refused(tmp_path, ids, shape):
  describe(tmp_path, {})
  (tmp_path / "one").mkdir()
  np.save(tmp_path / "one" / "ids.npy", np.array(ids))
  np.save(tmp_path / "one" / "image.npy", np.ones(shape, np.float32))
  with pytest.raises(UserError, match=r"do not fit|ascending"):
    TargetCache(tmp_path, {"one": 0})


def test_a_source_that_was_interrupted_is_not_there(tmp_path, rng):
  def chunks():
    yield np.arange(4), embeddings(rng, 4)
    raise OSError("the disk went away")

  describe(tmp_path, {})
  with pytest.raises(OSError, match="went away"):
    write_source(tmp_path, "one", chunks())
  assert not has_source(tmp_path, "one")
  write_source(tmp_path, "one", [(np.arange(4), embeddings(rng, 4))])
  assert has_source(tmp_path, "one")


def test_it_travels_to_worker_processes_without_its_embeddings(tmp_path, rng):
  describe(tmp_path, {})
  write_source(tmp_path, "one", [(np.arange(2000), embeddings(rng, 2000))])
  cache = TargetCache(tmp_path, {"one": 0})
  parcel = pickle.dumps(cache)
  assert len(parcel) < 1000
  np.testing.assert_array_equal(pickle.loads(parcel).lookup(np.arange(9)).image, cache.lookup(np.arange(9)).image)


@pytest.mark.parametrize("content", ['{"teacher": "runs/a"}', '{"dim": "24"}', '{"dim": 0}'])
def test_targets_of_no_known_size_are_one_sentence(content, tmp_path):
  (tmp_path / "teacher.json").write_text(content)
  config = tiny.get_config()
  config.objective = {"softmax": 1.0, "distill_features": 1.0}
  config.distillation.targets = str(tmp_path)
  with pytest.raises(UserError, match=r"teacher\.json has dim=.* put back what distill\.py wrote"):
    Run.from_config(config)
