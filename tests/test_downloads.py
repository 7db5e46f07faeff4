"""Weights and tokenizers behind addresses are those of the files there, copied once and again when they change."""

import os

import fsspec
import jax
import numpy as np
import pytest

from contrastive_jax import downloads
from contrastive_jax.errors import UserError
from contrastive_jax.interop import imports
from contrastive_jax.preprocess import tokenizers
from tests import servers
from tests.interop import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.extra]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  return checkpoints.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "contrastive_jax"


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  assert (one.name, one.config, one.tokenizer.fingerprint) == (other.name, other.config, other.tokenizer.fingerprint)


def test_a_folder_in_a_bucket_imports_as_the_folder_itself(models, cache, monkeypatch):
  with servers.s3(monkeypatch):
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("models")
    for family, kind in (("siglip", "huggingface"), ("open_clip", "open_clip"), ("bert", "huggingface")):
      files.put(f"{models[family]}/", f"models/{family}/", recursive=True)
      assert_same(imports.read(f"{kind}:s3://models/{family}"), imports.read(f"{kind}:{models[family]}"))
    kept = sorted(path.stat().st_mtime_ns for path in cache.rglob("*"))
    imports.read("huggingface:s3://models/siglip")
    assert sorted(path.stat().st_mtime_ns for path in cache.rglob("*")) == kept
    # Of the same size, so that nothing but its version tells it from the one before.
    weights = files.cat_file("models/siglip/model.safetensors")
    files.pipe_file("models/siglip/model.safetensors", weights[:-4] + b"\0\0\0\0")
    changed = imports.read("huggingface:s3://models/siglip")
    with pytest.raises(AssertionError):
      assert_same(changed, imports.read(f"huggingface:{models['siglip']}"))
    with pytest.raises(UserError, match="huggingface=s3://models/none is not there"):
      imports.read("huggingface:s3://models/none")
    with pytest.raises(UserError, match=r"model\.safetensors is a file: name a folder"):
      imports.read("open_clip:s3://models/siglip/model.safetensors")


def test_files_of_the_web_are_read_as_files_of_this_machine(models, cache):
  pytest.importorskip("aiohttp")
  folder = models["big_vision"]
  with servers.web(folder) as address:
    there = imports.read(f"big_vision:{address}/model.npz?download=true", f"file:{address}/tokenizer.json")
    assert_same(there, imports.read(f"big_vision:{folder / 'model.npz'}", f"file:{folder / 'tokenizer.json'}"))
    copies = [path for path in cache.rglob("*") if path.is_file()]
    assert sorted(path.name for path in copies) == ["model.npz", "tokenizer.json"]
    # A copy that something has cut is made again.
    os.truncate(copies[0], 10)
    assert (
      downloads.file("x", f"{address}/{copies[0].name}{'?download=true' * (copies[0].suffix == '.npz')}") == copies[0]
    )
    assert copies[0].read_bytes() == (folder / copies[0].name).read_bytes()
    with pytest.raises(UserError, match="is no file: name one that is there"):
      tokenizers.load(f"file:{address}/none.json")
    with pytest.raises(UserError, match="no web address lists its files"):
      imports.read(f"huggingface:{address}/model")
  with pytest.raises(UserError, match="cannot be used now"):
    tokenizers.load(f"file:{address}/tokenizer.json")
