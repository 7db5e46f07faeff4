"""embed.py writes what the model gives, in the order of the ids, and leaves out what cannot be read."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embed
from contrastive_jax.errors import UserError


class Averaging:
  """Embeds an image by its mean colour, a text by its length."""

  class config:
    embed_dim = 3

  def encode_image(self, paths):
    from contrastive_jax.preprocess.images import decode

    return np.stack([decode(path).mean((0, 1)) for path in paths]).astype(np.float32)

  def encode_text(self, texts):
    return np.array([[len(text)] * 3 for text in texts], np.float32)


@pytest.fixture
def folder(tmp_path):
  """Three pictures of plain colour, one of them broken, below a folder."""
  (tmp_path / "images" / "below").mkdir(parents=True)
  for name, level in (("a.png", 10), ("below/c.PNG", 30)):
    Image.fromarray(np.full((4, 5, 3), level, np.uint8)).save(tmp_path / "images" / name, "PNG")
  (tmp_path / "images" / "b.jpg").write_bytes(b"no picture")
  (tmp_path / "images" / "notes.txt").write_text("not an image")
  return tmp_path


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_unreadable_images_are_left_out_and_named(folder, chunk, monkeypatch):
  monkeypatch.setattr(embed, "_CHUNK", chunk)
  ids, items = embed.images(folder / "images")
  assert ids == ["a.png", "b.jpg", "below/c.PNG"]
  assert embed.write(folder / "out.parquet", Averaging(), ids, items) == ["b.jpg"]
  table = pq.read_table(folder / "out.parquet")
  assert table["id"].to_pylist() == ["a.png", "below/c.PNG"]
  assert table["embedding"].to_pylist() == [[10.0] * 3, [30.0] * 3]


def test_a_table_names_images_beside_it_and_their_ids(folder):
  (folder / "table.csv").write_text("path,id\nimages/below/c.PNG,last\nimages/a.png,first\n")
  ids, items = embed.images(folder / "table.csv")
  assert not embed.write(folder / "out" / "e.npy", Averaging(), ids, items)
  np.testing.assert_array_equal(np.load(folder / "out" / "e.npy")[:, 0], [30, 10])
  assert (folder / "out" / "e.ids.txt").read_text().splitlines() == ["last", "first"]
  (folder / "table.jsonl").write_text(json.dumps({"file": "a.png"}))
  with pytest.raises(UserError, match=r"row 1 of .* has no 'path'"):
    embed.images(folder / "table.jsonl")


def test_texts_come_from_lines_or_a_column(tmp_path):
  (tmp_path / "captions.txt").write_text("one\nthree\n")
  ids, items = embed.texts(tmp_path / "captions.txt")
  embed.write(tmp_path / "t.parquet", Averaging(), ids, items)
  table = pq.read_table(tmp_path / "t.parquet")
  assert table["id"].to_pylist() == ["1", "2"]
  assert [row[0] for row in table["embedding"].to_pylist()] == [3.0, 5.0]
  with pytest.raises(UserError, match="does not exist"):
    embed.texts(tmp_path / "missing.txt")


def test_lines_end_where_editors_end_them(tmp_path):
  """Captions hold what Python calls line boundaries; Windows and spreadsheets leave marks of their own."""
  (tmp_path / "captions.txt").write_bytes("\ufeffone\r\ntwo\u2028halves\n".encode())
  assert embed.texts(tmp_path / "captions.txt") == (["1", "2"], ["one", "two\u2028halves"])
  (tmp_path / "captions.jsonl").write_text('{"text": "two\u2028halves", "id": 7}\n', encoding="utf-8")
  assert embed.texts(tmp_path / "captions.jsonl") == (["7"], ["two\u2028halves"])
  (tmp_path / "captions.csv").write_bytes("\ufefftext\none\n".encode())
  assert embed.texts(tmp_path / "captions.csv") == (["1"], ["one"])


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.parquet", "bad.txt"])
def test_a_damaged_list_is_one_sentence(tmp_path, name):
  (tmp_path / name).write_bytes(b"{\xff")
  with pytest.raises(UserError, match="cannot be read"):
    embed.texts(tmp_path / name)


def test_an_interrupted_run_leaves_nothing(tmp_path):
  class Interrupted(Averaging):
    def encode_text(self, texts):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    embed.write(tmp_path / "t.parquet", Interrupted(), ["1"], ["one"])
  assert not list(tmp_path.iterdir())
