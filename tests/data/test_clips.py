"""A folder of clips with a table of captions."""

import json

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import DecodeError
from contrastive_jax.preprocess.video import Clip
from data.sources import Source
from data.sources.clips import ClipSource


@pytest.fixture
def folder(tmp_path):
  for name, level in (("a.gif", 40), ("b.gif", 200)):
    frames = [Image.fromarray(np.full((6, 8, 3), level + 5 * k, np.uint8)) for k in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
  return tmp_path


ROWS = [
  {"file": "a.gif", "caption": ["it brightens", "grey"]},
  {"file": "b.gif", "caption": "light moves left"},
  {"file": "a.gif", "caption": "grey"},
]


def test_rows_of_one_file_are_one_sample(folder):
  (folder / "clips.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
  source = ClipSource(folder)
  assert isinstance(source, Source) and len(source) == 2 and source.name == f"clips/{folder}"
  first, second = source[0], source[1]
  assert first.text.captions == ("it brightens", "grey") and second.text.captions == ("light moves left",)
  assert first.text == source.text(0) and first.text.group != second.text.group
  assert isinstance(first.image, Clip) and first.image.count == 3
  assert first.image.read([2])[0, 0, 0, 0] == pytest.approx(50, abs=2)
  assert first.flip and not second.flip
  assert [first.id, second.id] == [0, 1]


def test_a_csv_says_the_same(folder):
  (folder / "clips.csv").write_text('file,caption\na.gif,"it brightens, slowly"\nb.gif,light\na.gif,grey\n')
  source = ClipSource(folder)
  assert source.text(0).captions == ("it brightens, slowly", "grey") and source.text(1).captions == ("light",)


def test_a_bad_file_is_bad_for_good_and_a_missing_one_is_not(folder):
  (folder / "c.mp4").write_bytes(b"no video" * 20)
  (folder / "clips.csv").write_text("file,caption\nc.mp4,bad\nd.mp4,missing\n")
  source = ClipSource(folder)
  with pytest.raises(DecodeError):
    source[0]
  with pytest.raises(FileNotFoundError):
    source[1]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("other.txt", "", "no table of clips: write clips.jsonl or clips.csv"),
    ("clips.jsonl", '{"file": "a.gif", "caption": "x"}\n{"file": "a.gif"}', "row 2 of"),
    ("clips.jsonl", "a.gif", "row 1 of"),
    ("clips.jsonl", '{"file": "a.gif", "caption": []}', "row 1 of"),
    ("clips.csv", "file,caption\na.gif,\n", "row 1 of"),
    ("clips.csv", "name,caption\na.gif,x\n", "row 1 of"),
  ],
)
def test_a_wrong_table_is_refused(folder, name, text, message):
  (folder / name).write_text(text)
  with pytest.raises(UserError, match=message):
    ClipSource(folder)
