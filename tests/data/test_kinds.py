"""Kinds of sources: what an entry of `data.sources` may say of a set, and what is refused."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.schedule.stages import source_options
from data import build, kinds


def square(shade):
  file = io.BytesIO()
  Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(file, "PNG")
  return io.BytesIO(file.getvalue())


class Coloured(tfds.core.GeneratorBasedBuilder):
  """Four squares with a title and a colour."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    features = {
      "photo": tfds.features.Image(shape=(4, 4, 3)),
      "title": tfds.features.Text(),
      "colour": tfds.features.ClassLabel(names=["red", "blue"]),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {"photo": square(i), "title": f"square {i}", "colour": i % 2}


class Plain(Coloured):
  """The same with the features `image` and `caption`."""

  def _info(self):
    features = {"image": tfds.features.Image(shape=(4, 4, 3)), "caption": tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _generate_examples(self, count):
    for i, record in super()._generate_examples(count):
      yield i, {"image": record["photo"], "caption": record["title"]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("sets"))
  for builder in (Coloured, Plain):
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
  return folder


def config(data_dir="", **sources):
  made = common.get_config()
  made.data.data_dir, made.data.sources = data_dir, sources
  return made


CLASSES = {"image_key": "photo", "caption_key": "colour", "templates": ("a {} square",)}


def test_sets_of_other_features_splits_and_templates_mix(data_dir):
  mixed = config(
    data_dir,
    plain={"name": "tfds/plain", "weight": 2.0},
    titles={"name": "tfds/coloured@train[1:]", "image_key": "photo", "caption_key": "title", "flip": False},
    classes={"name": "tfds/coloured", "split": "test", **CLASSES},
  )
  plain, titles, classes = build.open_sources(
    mixed, ["tfds/plain", "tfds/coloured@train[1:]", "tfds/coloured"]
  ).values()
  assert [len(source) for source in (plain, titles, classes)] == [4, 3, 2]
  assert plain.text(2).captions == titles.text(1).captions == ("square 2",)
  assert classes.text(1).captions == ("a blue square",)
  assert plain[0].flip and classes[0].flip and not titles[0].flip


def test_a_set_is_scored_by_the_features_that_it_was_trained_on(data_dir):
  mixed = config(data_dir, a={"name": "tfds/coloured@train[1:]", **CLASSES}, plain={"name": "tfds/plain"})
  for given in (mixed, mixed.to_dict()):
    named = {"image_key": "photo", "caption_key": "colour"}
    for task in ("tfds/coloured@test", "tfds/coloured"):
      assert kinds.hints(given, task) == named | {"templates": CLASSES["templates"]}
    assert kinds.hints(given, "tfds/plain") == {"image_key": "image", "caption_key": "caption"}
    assert kinds.hints(given, "tfds/coloured_other") == {"image_key": "image", "caption_key": "caption"}
  assert kinds.hints({"model": {}}, "tfds/plain") == {}


def test_a_stage_has_the_options_that_the_run_gives_its_sets():
  staged = config(a={"name": "tfds/a", "caption_key": "title"})
  staged.curriculum = (common.stage("one", 1, sources={"tfds/a": 1.0}), common.stage("two", 0, sources={"noto": 1.0}))
  assert source_options(staged) == {"tfds/a": {"caption_key": "title"}, "noto": {}}
  staged.curriculum = (common.stage("one", 0, sources={"b": {"name": "tfds/a", "caption_key": "words"}}),)
  with pytest.raises(UserError, match=r"curriculum\.0\.sources gives 'tfds/a' the options .*'words'.*make them equal"):
    source_options(staged)


@pytest.mark.parametrize(
  ("entry", "said"),
  [
    ({"name": "tfds/a", "wieght": 1}, "option 'wieght': it takes name, weight, terms, image_key"),
    ({"name": "tfds/a", "captoin_key": "x"}, "did you mean 'caption_key'"),
    ({"name": "noto", "flip": True}, "'noto' the option 'flip': it takes name, weight, terms$"),
    ({"name": "clips/a", "caption_key": "x"}, "it takes name, weight, terms, flip$"),
    ({"name": "tfds/a", "flip": "no"}, "flip='no', which must be True or False"),
    ({"name": "tfds/a", "flip": 1}, "flip=1, which must be True or False"),
    ({"name": "tfds/a", "caption_key": ""}, "caption_key='', which must be a text that is not empty"),
    ({"name": "tfds/a", "templates": "a {}"}, "takes a list of texts, got one str"),
    ({"name": "tfds/a", "templates": ()}, "templates of 'tfds/a' in data.sources is empty"),
    ({"name": "tfds/a", "templates": ("a dog",)}, "write {} exactly once"),
    ({"name": "tfds/a@train", "split": "test"}, "give the split in one of the two"),
    ({"name": "tdfs/a"}, "tfds/<set>"),
    ({"name": "twemojy"}, "did you mean 'twemoji'"),
  ],
)
def test_entries_that_no_set_understands_are_refused(entry, said):
  with pytest.raises(UserError, match=said):
    build.open_sources(config(label=entry), [entry["name"]])
