"""Sets that are folders: pictures in `images/` beside the table that their authors publish."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.tasks import ChoiceSet
from data import tasks


def grey(path, i):
  """A picture whose brightness says which one it is."""
  Image.fromarray(np.full((6 + i, 5, 3), 20 * i, np.uint8)).save(path, "PNG")


def karpathy(folder, name="flickr30k"):
  """Three pictures, two of them to test on."""
  (folder / name / "images").mkdir(parents=True)
  rows = []
  for i, split in enumerate(("test", "train", "test")):
    grey(folder / name / "images" / f"{i}.png", i)
    said = [{"raw": f"caption {k}, of {i}", "tokens": []} for k in range(5)]
    rows.append({"filename": f"{i}.png", "split": split, "sentences": said})
  (folder / name / f"dataset_{name}.json").write_text(json.dumps({"images": rows, "dataset": name}))


def test_flickr30k_is_a_folder_with_karpathys_table(tmp_path):
  karpathy(tmp_path)
  read = tasks.load("flickr30k", str(tmp_path))
  assert read.name == "flickr30k" and read.image_group.tolist() == [0, 1]
  assert read.captions == [f"caption {k}, of {i}" for i in (0, 2) for k in range(5)]
  assert read.caption_group.tolist() == [0] * 5 + [1] * 5
  assert (read.images[1] == 40).all() and read.images[1].shape == (8, 5, 3)
  assert tasks.load("flickr30k@train", str(tmp_path)).captions[0] == "caption 0, of 1"
  with pytest.raises(UserError, match="no split 'val', it has test, train"):
    tasks.load("flickr30k@val", str(tmp_path))
  (tmp_path / "flickr30k" / "images" / "2.png").unlink()
  with pytest.raises(UserError, match=r"2\.png and 0 more pictures"):
    tasks.load("flickr30k", str(tmp_path))


def sugarcrepe(folder, subset="swap_obj"):
  """Three instances with two pictures; numbers are strings and may have gaps, as in the published tables."""
  (folder / "sugarcrepe" / "images").mkdir(parents=True)
  for i in (4, 7):
    grey(folder / "sugarcrepe" / "images" / f"{i:012}.jpg", i)
  said = [{"caption": f"true {n}", "negative_caption": f"false {n}"} for n in range(3)]
  rows = {str(2 * n): {"filename": f"{i:012}.jpg", **said[n]} for n, i in enumerate((7, 4, 7))}
  (folder / "sugarcrepe" / f"{subset}.json").write_text(json.dumps(rows))


def test_sugarcrepe_is_a_folder_with_its_tables(tmp_path):
  sugarcrepe(tmp_path)
  read = tasks.load("sugarcrepe/swap_obj", str(tmp_path))
  assert isinstance(read, ChoiceSet) and read.name == "sugarcrepe/swap_obj"
  assert read.captions == [[f"true {n}", f"false {n}"] for n in range(3)]
  assert [int(image[0, 0, 0]) for image in read.images] == [140, 80, 140]
  with pytest.raises(UserError, match=r"'sugarcrepe' is not in .*images and SugarCrepe's table as .*/add_att\.json"):
    tasks.load("sugarcrepe/add_att", str(tmp_path))
  with pytest.raises(UserError, match="'sugarcrepe/swap_obj' has no split 'train', it has test"):
    tasks.load("sugarcrepe/swap_obj@train", str(tmp_path))
  (tmp_path / "sugarcrepe" / "images" / f"{7:012}.jpg").unlink()
  with pytest.raises(UserError, match=r"07\.jpg and 0 more pictures of sugarcrepe are missing"):
    tasks.load("sugarcrepe/swap_obj", str(tmp_path))


def winoground(folder):
  """Two instances, one a line, in the published fields."""
  (folder / "winoground" / "images").mkdir(parents=True)
  lines = []
  for n in range(2):
    row = {"id": n, "tag": "Object", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
    for k in (0, 1):
      row |= {f"caption_{k}": f"caption {k} of {n}", f"image_{k}": f"ex_{n}_img_{k}"}
      grey(folder / "winoground" / "images" / f"ex_{n}_img_{k}.png", 1 + 2 * n + k)
    lines.append(json.dumps(row))
  (folder / "winoground" / "examples.jsonl").write_text("\n".join(lines) + "\n")


def test_winoground_is_a_folder_with_its_table(tmp_path):
  winoground(tmp_path)
  read = tasks.load("winoground", str(tmp_path))
  assert isinstance(read, ChoiceSet) and read.name == "winoground"
  assert read.captions == [[f"caption {k} of {n}" for k in (0, 1)] for n in (0, 1)]
  assert [int(image[0, 0, 0]) for image in read.images] == [20, 40, 60, 80]


@pytest.mark.parametrize(
  ("name", "table", "text"),
  [
    ("winoground", "examples.jsonl", '{"image_0": "a"}'),
    ("winoground", "examples.jsonl", "not JSON"),
    ("sugarcrepe/swap_obj", "swap_obj.json", '[{"filename": "a.jpg"}]'),
    ("sugarcrepe/swap_obj", "swap_obj.json", '{"0": {"filename": "a.jpg", "caption": "a"}}'),
    ("flickr30k", "dataset_flickr30k.json", '{"images": [{"split": "test"}]}'),
    ("winoground", "examples.jsonl", ""),
    ("winoground", "examples.jsonl", '{"image_0": "a", "image_1": "b", "caption_0": "x", "caption_1": null}'),
    ("sugarcrepe/swap_obj", "swap_obj.json", '{"0": {"filename": 3, "caption": "a", "negative_caption": "b"}}'),
    ("flickr30k", "dataset_flickr30k.json", '{"images": [{"split": null, "filename": "a", "sentences": []}]}'),
    ("flickr30k", "dataset_flickr30k.json", "[" * 100_000),
  ],
)
def test_another_table_is_an_error(name, table, text, tmp_path):
  folder = tmp_path / name.partition("/")[0]
  folder.mkdir()
  (folder / table).write_text(text)
  with pytest.raises(UserError, match=re.escape(f"{folder / table} ") + "(is not|has no rows).* table"):
    tasks.load(name, str(tmp_path))
