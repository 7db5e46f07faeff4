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
  (folder / "d.mp4").touch()
  (folder / "clips.csv").write_text("file,caption\nc.mp4,bad\nd.mp4,missing\n")
  source = ClipSource(folder)
  (folder / "d.mp4").unlink()
  with pytest.raises(DecodeError):
    source[0]
  with pytest.raises(FileNotFoundError):
    source[1]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("other.txt", "", "no table of clips: write clips.jsonl or clips.csv"),
    ("clips.jsonl", '{"file": "a.gif", "caption": "x"}\n{"file": "a.gif"}', "row 2 of"),
    ("clips.jsonl", "a.gif", "clips.jsonl cannot be read"),
    ("clips.jsonl", '{"file": "a.gif", "caption": "x"}\n{"file": "a.g', "line 2 of .* is no JSON"),
    ("clips.jsonl", '{"file": "a.gif", "caption": []}', "row 1 of"),
    ("clips.jsonl", '{"file": "a.gif", "caption": 7}', "row 1 of .* int 7"),
    ("clips.jsonl", '{"file": "a.gif", "caption": {"en": "x"}}', "row 1 of .* dict"),
    ("clips.jsonl", '{"file": "a.gif", "caption": ["x", " "]}', "row 1 of"),
    ("clips.jsonl", '{"file": "a.gif", "caption": "\\ud800"}', "row 1 of .* lone surrogate"),
    ("clips.jsonl", '{"file": "a.gif", "caption": "x", "caption": "y"}', "'caption' more than once"),
    ("clips.jsonl", '{"file": 3, "caption": "x"}', "row 1 of .* has no 'file' but a int"),
    ("clips.jsonl", '{"file": "a\\u0000.gif", "caption": "x"}', "row 1 of .* NUL"),
    ("clips.jsonl", '{"file": "http://a.org/a.gif", "caption": "x"}', "row 1 of .* an address"),
    ("clips.jsonl", '{"file": "b/a.gif", "caption": "x"}', "1 of the 1 clips of .* are missing, such as 'b/a.gif'"),
    ("clips.jsonl", '{"file": ".", "caption": "x"}', "1 of the 1 clips of .* are missing"),
    ("clips.csv", "", "no column 'file'"),
    ("clips.csv", "file,caption\n", "no rows"),
    ("clips.csv", "file,caption\na.gif,\n", "row 1 of"),
    ("clips.csv", "file,caption\na.gif,a dog, running\n", "row 1 of .* more fields"),
    ("clips.csv", "name,caption\na.gif,x\n", "no column 'file'"),
    ("clips.csv", b"file,caption\na.gif,caf\xe9\n", "cannot be read"),
  ],
)
def test_a_wrong_table_is_refused(folder, name, text, message):
  (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError, match=message) as refused:
    ClipSource(folder)
  assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
  "content",
  [
    "file;caption\na.gif;grey\n".encode("utf-8-sig"), "file\tcaption\r\na.gif\tgrey\r\n".encode("utf-16"),
    b'caption,file\n"grey",./a.gif\n',
  ],
)  # fmt: skip
def test_tables_are_read_as_programs_save_them(folder, content):
  (folder / "clips.csv").write_bytes(content)
  source = ClipSource(folder)
  assert len(source) == 1 and source.text(0).captions == ("grey",) and source[0].image.count == 3
