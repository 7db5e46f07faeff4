"""Files of embeddings hold what the model gives, in the order of the ids, and leave out what cannot be read."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from data import embedding_files, listings


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
  monkeypatch.setattr(embedding_files, "CHUNK", chunk)
  ids, items = listings.images(folder / "images")
  assert ids == ["a.png", "b.jpg", "below/c.PNG"]
  assert embedding_files.write(folder / "out.parquet", Averaging(), ids, items) == ["b.jpg"]
  table = pq.read_table(folder / "out.parquet")
  assert table["id"].to_pylist() == ["a.png", "below/c.PNG"]
  assert table["embedding"].to_pylist() == [[10.0] * 3, [30.0] * 3]


def test_a_table_names_images_beside_it_and_their_ids(folder):
  (folder / "table.csv").write_text("path,id\nimages/below/c.PNG,last\nimages/a.png,first\n")
  ids, items = listings.images(folder / "table.csv")
  assert not embedding_files.write(folder / "out" / "e.npy", Averaging(), ids, items)
  np.testing.assert_array_equal(np.load(folder / "out" / "e.npy")[:, 0], [30, 10])
  assert (folder / "out" / "e.ids.txt").read_text().splitlines() == ["last", "first"]
  (folder / "table.jsonl").write_text(json.dumps({"file": "a.png"}))
  with pytest.raises(UserError, match=r"row 1 of .* has no 'path'"):
    listings.images(folder / "table.jsonl")


def test_texts_come_from_lines_or_a_column(tmp_path):
  (tmp_path / "captions.txt").write_text("one\nthree\n")
  ids, items = listings.texts(tmp_path / "captions.txt")
  embedding_files.write(tmp_path / "t.parquet", Averaging(), ids, items)
  table = pq.read_table(tmp_path / "t.parquet")
  assert table["id"].to_pylist() == ["1", "2"]
  assert [row[0] for row in table["embedding"].to_pylist()] == [3.0, 5.0]
  with pytest.raises(UserError, match="does not exist"):
    listings.texts(tmp_path / "missing.txt")


def test_an_interrupted_run_leaves_nothing(tmp_path):
  class Interrupted(Averaging):
    def encode_text(self, texts):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    embedding_files.write(tmp_path / "t.parquet", Interrupted(), ["1"], ["one"])
  assert not list(tmp_path.iterdir())


PICTURES = {
  "a.PNG": "PNG", "b.avif": "AVIF", "c.jp2": "JPEG2000", "d.ppm": "PPM", "e.Tga": "TGA", "f.ico": "ICO",
  "g.jfif": "JPEG", "h.BMP": "BMP", "i.tiff": "TIFF", "j.WebP": "WEBP", "k.gif": "GIF", "l.jpe": "JPEG", "m.pgm": "PPM",
  "n.dds": "DDS",  "o.pcx": "PCX", "plain": "PNG", "sent by telephone.HEIC": "JPEG",
}  # fmt: skip


def test_every_type_that_the_decoder_reads_is_embedded(tmp_path):
  for name, kind in PICTURES.items():
    Image.fromarray(np.full((16, 16, 3), 120, np.uint8)).save(tmp_path / name, kind)
  Image.new("RGB", (8, 8)).save(tmp_path / "thumbnail of a raw.dng", "TIFF")
  for name in ("x.heic", "y.HEIC", "z.jxl", "notes.txt", "film.mpg", "Makefile"):
    (tmp_path / name).write_bytes(b"anything")
  (tmp_path / "folder.png").mkdir()
  ids, items = listings.images(tmp_path)
  assert ids == sorted(PICTURES)
  assert not embedding_files.write(tmp_path / "out.npy", Averaging(), ids, items)
  np.testing.assert_allclose(np.load(tmp_path / "out.npy"), 120, atol=3)
  assert listings.unopened(tmp_path) == {
    ".heic": (2, "pillow-heif"),
    ".jxl": (1, "pillow-jxl-plugin"),
    ".dng": (1, "rawpy"),
  }


def test_what_the_embeddings_come_from_is_written_with_them(tmp_path):
  about = {"model": "runs/emoji", "step": "7", "version": "1"}
  embedding_files.write(tmp_path / "t.parquet", Averaging(), ["1"], ["one"], about)
  metadata = pq.read_schema(tmp_path / "t.parquet").metadata
  assert {key.decode(): value.decode() for key, value in metadata.items()} == {
    f"contrastive_jax.{key}": value for key, value in about.items()
  }
  embedding_files.write(tmp_path / "t.npy", Averaging(), ["1"], ["one"], about)
  assert json.loads((tmp_path / "t.about.json").read_text()) == about
