"""The labels of an evaluation set are read when it is first scored; mistakes are said when it is opened."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.unreadable import UnreadableSet
from data import tasks
from data.sources import stores
from data.sources.answers import GLANCE

COUNT = 60


class Late(tfds.core.GeneratorBasedBuilder):
  """Splits of small pictures: with labels, without any as many test splits are, and with labels on a few records."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(4, 4, 3)),
      "label": tfds.features.ClassLabel(names=["even", "odd"]),
      "captions": tfds.features.Sequence(tfds.features.Text()),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {
      "labelled": self._some(lambda k: k % 2),
      "unlabelled": self._some(lambda k: -1),
      # The records that a glance sees have labels, most of the others have none.
      "deceptive": self._some(lambda k: 0 if k % 4 == 0 else -1),
    }

  def _some(self, label):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    for k in range(COUNT):
      found = label(k)
      said = [f"picture {k}"] if found >= 0 else []
      yield k, {"image": io.BytesIO(file.getvalue()), "label": found, "captions": said}

  def _generate_examples(self):
    raise NotImplementedError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  Late(data_dir=folder, file_format="array_record").download_and_prepare()
  return str(folder)


@pytest.fixture
def reads(monkeypatch):
  """The numbers of the records that are read."""
  read, numbers = stores.read, []

  def counted(records, index, name):
    numbers.append(index)
    return read(records, index, name)

  monkeypatch.setattr(stores, "read", counted)
  return numbers


@pytest.mark.parametrize("name", ["tfds/late@labelled", "tfds/late@labelled:caption_key=captions"])
def test_records_are_read_once_and_when_they_are_needed(name, data_dir, reads):
  read = tasks.opened(name, data_dir)
  assert len(reads) <= GLANCE
  reads.clear()
  scored = read()
  assert reads == list(range(COUNT)) and scored.name == name
  if "caption_key" in name:
    assert scored.captions == [f"picture {k}" for k in range(COUNT)]
  else:
    np.testing.assert_array_equal(scored.labels, np.arange(COUNT) % 2)
  reads.clear()
  assert read() is scored and not reads


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("tfds/absent", "not in .*, prepare it with"),
    ("tfds/late@tset", "no split 'tset'"),
    ("tfds/late@labelled:label_key=lable", "did you mean 'label'"),
    ("tfds/late@labelled:image_key=label", "holds no pictures"),
    ("tfds/late@labelled:caption_key=label:image_key=captions", "holds no pictures"),
    ("tfds/late@unlabelled", "has no labels, name another split"),
    ("tfds/late@unlabelled:caption_key=captions", "60 of 60 records without a caption in 'captions'"),
  ],
)
def test_mistakes_are_said_when_a_set_is_opened(name, said, data_dir):
  with pytest.raises(UserError, match=said):
    tasks.opened(name, data_dir)


@pytest.mark.parametrize("ending", ["", ":caption_key=captions"])
def test_what_no_glance_shows_is_said_when_the_set_is_scored(ending, data_dir):
  read = tasks.opened(f"tfds/late@deceptive{ending}", data_dir)
  with pytest.raises(UnreadableSet, match="45 of 60 records"):
    read()
