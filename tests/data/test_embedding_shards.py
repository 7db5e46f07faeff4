"""Embeddings of a set in shards: of every sample its own, and after a kill or a flipped bit those that are left."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import decode
from data import embedding_shards
from data.sources.folder import open_folder

COUNT = 11


class Averaging:
  """Embeds an image by its mean colour and a text by its length; `calls` counts the images and texts."""

  calls = 0

  class config:
    embed_dim = 3

  def encode_image(self, images):
    found = np.stack([decode(image).mean((0, 1)) for image in images]).astype(np.float32)
    self.calls += len(found)
    return found

  def encode_text(self, texts):
    self.calls += len(texts)
    return np.array([[len(text)] * 3 for text in texts], np.float32)


@pytest.fixture
def photos(tmp_path):
  """Pictures of plain colour, number 4 damaged and number 5 without a caption."""
  folder = tmp_path / "photos"
  folder.mkdir()
  for number in range(COUNT):
    Image.fromarray(np.full((4, 5, 3), 9 * number, np.uint8)).save(folder / f"{number:02d}.png")
    (folder / f"{number:02d}.txt").write_text("a" * (number + 1) + "\nab" * (number == 2))
  (folder / "04.png").write_bytes(b"no picture")
  (folder / "05.txt").write_text(" \n")
  return folder


def embedded(photos, folder, model=None, **options):
  options = {"shard_rows": 4, "about": {"model": "runs/a"}, **options}
  return list(embedding_shards.write(folder, model or Averaging(), open_folder(str(photos)), **options))


def rows_of(folder):
  tables = [pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]
  return {
    key: value
    for table in tables
    for key, value in zip(*(table[name].to_pylist() for name in ("id", "embedding")), strict=True)
  }


def test_images_and_texts_have_their_own_embeddings(photos, tmp_path):
  shards = embedded(photos, tmp_path / "images")
  assert [(shard.rows, shard.left_out, shard.kept) for shard in shards] == [(4, 0, False), (3, 1, False), (3, 0, False)]
  assert rows_of(tmp_path / "images") == {f"{k:02d}.png": [9.0 * k] * 3 for k in range(COUNT) if k != 4}
  shards = embedded(photos, tmp_path / "texts", of="texts")
  assert [(shard.rows, shard.left_out) for shard in shards] == [(5, 0), (3, 1), (3, 0)]
  expected = {f"{k:02d}.png#0": [k + 1.0] * 3 for k in range(COUNT) if k != 5} | {"02.png#1": [2.0] * 3}
  assert rows_of(tmp_path / "texts") == expected
  for folder, name in (("images", "04.png"), ("texts", "05.png")):
    (listed,) = (tmp_path / folder).glob("*.bad_records.jsonl")
    assert listed.name == "000001.parquet.bad_records.jsonl" and name in listed.read_text()


class Killed(Averaging):
  def encode_image(self, images):
    if self.calls >= 4:
      raise KeyboardInterrupt
    return super().encode_image(images)


def test_whole_shards_are_kept_and_no_others(photos, tmp_path):
  folder = tmp_path / "out"
  with pytest.raises(KeyboardInterrupt):
    embedded(photos, folder, Killed())
  assert [path.name for path in folder.iterdir()] == ["000000.parquet"]
  model = Averaging()
  assert [shard.kept for shard in embedded(photos, folder, model)] == [True, False, False] and model.calls == 6
  whole = rows_of(folder)
  file = folder / "000002.parquet"
  data = file.read_bytes()
  for at in range(0, len(data), max(1, len(data) // 40)):
    file.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
    embedded(photos, folder)
    assert rows_of(folder) == whole, at
  (photos / "00.png").rename(photos / "03x.png")  # Samples move from one shard into another.
  (photos / "00.txt").rename(photos / "03x.txt")
  embedded(photos, folder)
  assert rows_of(folder).keys() == (whole.keys() - {"00.png"}) | {"03x.png"}


def test_other_requests_and_files_are_refused(photos, tmp_path):
  folder = tmp_path / "out"
  embedded(photos, folder)
  for options, said in (
    ({"about": {"model": "runs/b"}}, "written with model='runs/a', and now it is 'runs/b'"),
    ({"of": "texts"}, "written with of='images', and now it is 'texts'"),
    ({"shard_rows": 3}, "written with samples='0:4 of 11', and now it is '0:3 of 11'"),
    ({"shard_rows": 8}, r"holds 000002.parquet, which is no shard of this request: name another folder"),
  ):
    with pytest.raises(UserError, match=said):
      embedded(photos, folder, **options)
  assert not any(shard.kept for shard in embedded(photos, folder, of="texts", overwrite=True))
