"""What weights come in: wrapped names, scalars with an axis, broken numbers, and files that are something else."""

import io
import json
import shutil
import struct
import tarfile
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from contrastive_jax.errors import UserError
from contrastive_jax.interop import checkpoint_files, imports, keymap
from tests.interop.checkpoints import read

FILES = {
  "clip": "model.safetensors",
  "siglip": "model.safetensors",
  "siglip2": "model.safetensors",
  "open_clip": "open_clip_model.safetensors",
}


@pytest.fixture
def copy(sources, tmp_path):
  """Copies the checkpoint of a family with its arrays changed."""

  def make(family: str, change):
    folder = tmp_path / family
    shutil.copytree(sources[family], folder)
    path = folder / FILES[family]
    save_file(change(load_file(path)), path)
    return folder

  return make


def renamed(rename):
  return lambda arrays: {rename(name): array for name, array in arrays.items()}


def assert_same(one, other) -> None:
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("family", ["clip", "siglip", "open_clip"])
@pytest.mark.parametrize(
  "prefix",
  [
    "module.",
    "_orig_mod.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module.",
    "clip.model._orig_mod.",
  ],
)
def test_wrapped_names_are_taken(family, prefix, copy, sources):
  found = read(family, copy(family, renamed(lambda name: prefix + name)))
  assert_same(found.params, read(family, sources[family]).params)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "module._orig_mod"])
def test_parts_of_a_model_may_be_wrapped(wrapper, copy, sources):
  def rename(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"model.{first}.{wrapper}.{rest}" if rest else f"model.{first}"

  assert_same(read("clip", copy("clip", renamed(rename))).params, read("clip", sources["clip"]).params)


def test_two_names_of_one_parameter_are_refused(copy):
  folder = copy("clip", lambda arrays: arrays | {f"module.{name}": array.copy() for name, array in arrays.items()})
  with pytest.raises(UserError, match="which are one parameter"):
    read("clip", folder)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "open_clip"])
def test_a_scalar_may_have_axes(family, shape, copy, sources):
  def change(arrays):
    return {
      name: array.reshape(shape) if name in ("logit_scale", "logit_bias") else array for name, array in arrays.items()
    }

  assert_same(read(family, copy(family, change)).params, read(family, sources[family]).params)


@pytest.mark.parametrize("family", ["clip", "open_clip"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_bias_that_the_config_does_not_mention_is_taken(family, shape, copy):
  folder = copy(family, lambda arrays: arrays | {"logit_bias": np.full(shape, -7.5, np.float32)})
  found = read(family, folder)
  assert found.config.init_logit_bias is not None
  assert found.params["logit_bias"] == -7.5 and found.params["logit_bias"].shape == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", sorted(FILES))
def test_weights_that_are_not_finite_are_named(family, value, copy):
  chosen = []

  def change(arrays):
    chosen.extend(sorted(name for name in arrays if arrays[name].ndim == 2)[:3])
    for name in chosen:
      arrays[name].flat[-1] = value
    return arrays

  with pytest.raises(UserError, match=r"holds 3 weights of \d+ that are not finite: ") as raised:
    read(family, copy(family, change))
  assert all(name in str(raised.value) for name in chosen)


def test_numbers_beyond_float32_and_whole_numbers_are_no_weights(copy):
  large = copy("clip", lambda arrays: arrays | {"logit_scale": np.float64(1e300)[...]})
  with pytest.raises(UserError, match=r"1 weights of \d+ that are not finite: logit_scale"):
    read("clip", large)
  shutil.rmtree(large)
  scale = copy("clip", lambda arrays: arrays | {"logit_scale": np.float32(200)[...]})
  with pytest.raises(UserError, match="has the logarithm 200 of its logit scale"):
    read("clip", scale)
  shutil.rmtree(scale)
  whole = copy("clip", lambda arrays: arrays | {"logit_scale": np.int32(3)[...]})
  with pytest.raises(UserError, match=r"no floating-point numbers: logit_scale \(int32\)"):
    read("clip", whole)


def test_misfits_are_counted_and_named(copy):
  def change(arrays):
    names = sorted(name for name in arrays if "layer_norm" in name)
    for name in names[:2]:
      arrays[f"{name}_"] = arrays.pop(name)
    arrays["logit_scale"] = np.zeros(2, np.float32)
    return arrays

  with pytest.raises(UserError) as raised:
    read("clip", copy("clip", change))
  for part in ("2 missing: ", "(there is ", "2 unexpected: ", "1 of another shape: logit_scale [2] instead of []"):
    assert part in str(raised.value)


def test_a_config_of_a_giant_is_refused_before_its_arrays_are_described(sources, tmp_path):
  folder = tmp_path / "giant"
  shutil.copytree(sources["clip"], folder)
  config = json.loads((folder / "config.json").read_text())
  config["text_config"] |= {"hidden_size": 2**16, "intermediate_size": 2**20, "num_hidden_layers": 2**20}
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="and its config describes a model of"):
    read("clip", folder)


def zipped(**files: bytes) -> bytes:
  content = io.BytesIO()
  with zipfile.ZipFile(content, "w") as archive:
    for name, data in files.items():
      archive.writestr(zipfile.ZipInfo(name), data)  # Dated 1980 and not now: the bytes are part of the names of tests.
  return content.getvalue()


def tarred() -> bytes:
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("tensors"))
  return content.getvalue()


def safetensors_of(header: dict, data: bytes = b"\0" * 16) -> bytes:
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2]}
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("empty.safetensors", b"", "is empty"),
    ("empty.pt", b"", "is empty"),
    ("zeros.bin", b"\0" * 64, "zeros alone"),
    ("pointer.safetensors", LFS, "git lfs pull"),
    ("pointer.bin", LFS, "git lfs pull"),
    ("pointer.npz", LFS, "git lfs pull"),
    ("page.pt", b"<!DOCTYPE html><html></html>", "web page"),
    ("page.npz", b"\n <html>", "web page"),
    ("legacy.pt", LEGACY, r"PyTorch before version 1\.6.*torch\.save\(torch\.load\('legacy\.pt'"),
    ("legacy.bin", LEGACY, r"PyTorch before version 1\.6"),
    ("ancient.pth", tarred(), "tar archive"),
    ("module.pt", b"\x80\x04\x95\x10\0\0\0", "is a pickle"),
    ("script.pt", zipped(**{"m/data.pkl": b".", "m/code/a.py": b"", "m/constants.pkl": b"."}), "TorchScript.*jit"),
    ("other.pt", zipped(**{"word/document.xml": b""}), "zip archive without weights"),
    ("cut.pt", zipped(**{"a/data.pkl": b"x" * 100})[:80], "cut off or damaged"),
    ("keras.bin", b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "Keras or TensorFlow"),
    ("tf_model.h5", b"\x89HDF\r\n\x1a\n", "from_tf=True"),
    ("flax_model.msgpack", b"\x82\xa6params\x80", "Flax model.*from_flax=True"),
    ("flax.bin", b"\x82\xa6params\x80", "Flax model"),
    ("model.onnx", b"\x08\x07", "ONNX"),
    ("model.gguf", b"GGUF\3", "GGUF"),
    ("model.ckpt.index", b"\0\0\1\2", "TensorFlow checkpoint"),
    ("one.npy", b"\x93NUMPY\1\0", "one NumPy array"),
    ("packed.pt", b"\x1f\x8b\x08rest", "compressed with gzip"),
    ("packed.safetensors", b"\x28\xb5\x2f\xfdrest", "compressed with zstd"),
    ("renamed.pt", safetensors_of({"x": F32 | {"data_offsets": [0, 8]}}, b"\0" * 8), r"\.safetensors holds: rename"),
    ("renamed.safetensors", zipped(**{"x.npy": b""}), r"\.npz holds: rename"),
    ("notes.txt", b"hello", "ends in '.txt'"),
    ("overlap.safetensors", safetensors_of({n: F32 | {"data_offsets": [0, 8]} for n in "ab"}), "cannot be read: "),
    ("beyond.safetensors", safetensors_of({"a": F32 | {"data_offsets": [0, 800]}}), "cannot be read: "),
    ("hole.safetensors", safetensors_of({"a": F32 | {"data_offsets": [8, 16]}}), "cannot be read: "),
    ("shape.safetensors", safetensors_of({"a": {**F32, "shape": [2**60], "data_offsets": [0, 8]}}), "cannot be read: "),
    ("dtype.safetensors", safetensors_of({"a": {**F32, "dtype": "F31", "data_offsets": [0, 8]}}), "cannot be read: "),
    ("eight.safetensors", safetensors_of({"a": {**F32, "dtype": "F8_E4M3", "data_offsets": [0, 2]}}, b"11"), "F8_E4M3"),
    ("header.safetensors", struct.pack("<Q", 2**62) + b"{}", "cannot be read: "),
    ("none.safetensors", safetensors_of({}, b""), "holds no arrays"),
  ],
)
def test_a_file_says_what_it_is(name, content, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as raised:
    checkpoint_files.read(tmp_path / name)
  assert "\n" not in str(raised.value)


def test_a_folder_of_another_format_says_how_it_becomes_readable(sources, tmp_path):
  for index, (name, message) in enumerate(
    {
      "flax_model.msgpack": "from_flax=True",
      "tf_model.h5": "from_tf=True",
      "adapter_model.safetensors": "merge_and_unload",
      "saved_model.pb": "SavedModel",
      "model.onnx": "ONNX",
    }.items()
  ):
    folder = tmp_path / str(index)
    shutil.copytree(sources["clip"], folder)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=f"has no weights.*{name} is .*{message}"):
      read("clip", folder)


@pytest.mark.parametrize(
  "pickled",
  [
    b"\x80\x02}r\xff\xff\xff\x7f.",  # An index of the memo that the reader in C makes room for.
    b"\x80\x02X\xff\xff\xff\x7fa.",
    b"\x80\x02cos\nsystem\n.",
    b"\x80\x02](" + b"(" * 1000,
    b"\x80\x02h\x05.",
    b"\x80\x02Q.",
    b"\x80\xff.",
    b"",
  ],
)
def test_a_damaged_pickle_takes_neither_time_nor_memory(pickled, tmp_path):
  (tmp_path / "a.pt").write_bytes(zipped(**{"a/data.pkl": pickled}))
  with pytest.raises(UserError, match="cannot be read: ") as raised:
    checkpoint_files.read(tmp_path / "a.pt")
  assert "\n" not in str(raised.value)


def sharded(folder, listed=None, left_out=()) -> None:
  arrays = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  shards = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(arrays)}
  for shard in set(shards.values()) - set(left_out):
    save_file({name: array for name, array in arrays.items() if shards[name] == shard}, folder / shard)
  (folder / "model.safetensors.index.json").write_text(json.dumps(listed(shards) if listed else {"weight_map": shards}))


@pytest.mark.parametrize(
  ("listed", "left_out", "message"),
  [
    (None, ["model-1.safetensors"], "model-1.safetensors does not exist"),
    (lambda shards: {}, (), "has no weight_map"),
    (lambda shards: {"weight_map": dict.fromkeys(shards, 3)}, (), "has no weight_map"),
    (lambda shards: {"weight_map": dict.fromkeys(shards, "../x.safetensors")}, (), "not in its folder"),
    (lambda shards: {"weight_map": dict.fromkeys(shards, "model-0.safetensors")}, (), "does not hold"),
    (lambda shards: {"weight_map": dict(list(shards.items())[4:])}, (), "also holds"),
  ],
)
def test_shards_are_those_of_their_index(listed, left_out, message, sources, tmp_path):
  whole = tmp_path / "whole"
  shutil.copytree(sources["clip"], whole)
  sharded(whole)
  assert_same(read("clip", whole).params, read("clip", sources["clip"]).params)
  shutil.copytree(sources["clip"], tmp_path / "broken")
  sharded(tmp_path / "broken", listed, left_out)
  with pytest.raises(UserError, match=message):
    read("clip", tmp_path / "broken")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (LFS, "git lfs pull"),
    (b"[1, 2]", "not an object with options"),
    (b'"text"', "not an object with options"),
    (b'{"a": 1, "a": 2}', "names 'a' twice"),
    (b"\xef\xbb\xbf{}", "is not JSON"),
    ("{}".encode("utf-16"), "is not JSON"),
    (b'{"a": ' + b"[" * 100_000, "is not JSON"),
    (b'{"a": 1', "is not JSON"),
  ],
)
def test_a_config_that_is_no_object_says_so(content, message, sources, tmp_path):
  folder = tmp_path / "folder"
  shutil.copytree(sources["clip"], folder)
  (folder / "config.json").write_bytes(content)
  with pytest.raises(UserError, match=message):
    read("clip", folder)


def test_bare_names_stay_as_they_are():
  arrays = {name: np.zeros(1) for name in ("visual.proj", "logit_scale", "transformer.resblocks.0.ln_1.weight")}
  assert keymap.unwrapped(arrays, source="it").keys() == arrays.keys()


def big_vision_changed(sources, tmp_path, change):
  folder = tmp_path / "big_vision"
  shutil.copytree(sources["big_vision"], folder)
  with np.load(folder / "model.npz") as file:
    arrays = {name: file[name] for name in file.files}
  np.savez(folder / "model.npz", **change(arrays))
  return folder


PATCHES, IMAGE_POSITIONS = "params/img/embedding/kernel", "params/img/pos_embedding"
QUERY = "params/txt/Encoder_0/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a: {n: v for n, v in a.items() if n != PATCHES}, "has no img/embedding/kernel"),
    (
      lambda a: a | {PATCHES: a[PATCHES].reshape(-1)},
      r"img/embedding/kernel of the shape \[\d+\], which must have 4 axes",
    ),
    (lambda a: a | {PATCHES: a[PATCHES][:, :2]}, "only squares are read"),
    (lambda a: a | {IMAGE_POSITIONS: a[IMAGE_POSITIONS][:, :15]}, "15 of them: only squares"),
    (lambda a: a | {IMAGE_POSITIONS: a[IMAGE_POSITIONS][0]}, "must have 3 axes"),
    (lambda a: a | {"params/txt/Embed_0/embedding": np.zeros((0, 16), np.float32)}, "must have 2 axes"),
    (lambda a: a | {QUERY: a[QUERY][None]}, "query/kernel of the shape .* must have 3 axes"),
    (lambda a: {n.replace("encoderblock_0", "encoderblock"): v for n, v in a.items()}, "scan=False"),
    (lambda a: a | {"params/img/cls": np.zeros((1, 1, 16), np.float32)}, "class token"),
    (lambda a: a | {"params/img/extra": np.zeros(3, np.float32)}, "1 unexpected: img/extra"),
    (lambda a: a | {"params/t": np.float32(np.nan)[...]}, "not finite: t"),
    (lambda a: a | {"params/t": np.array("ten")}, r"no floating-point numbers: t \("),
    (lambda a: a | {"params/b": np.array([object()])}, "cannot be read"),
    (lambda a: a | {"params/t": np.zeros(1, "V4")}, r"no floating-point numbers: t \(\|V4\)"),
    (lambda a: a | {"params/t": np.zeros(1, ml_dtypes.float8_e4m3fn)}, "no floating-point numbers: t"),
  ],
)
def test_big_vision_files_that_do_not_fit_are_refused(change, message, sources, tmp_path):
  with pytest.raises(UserError, match=message):
    read("big_vision", big_vision_changed(sources, tmp_path, change))


def test_big_visions_scalars_may_have_no_axis(sources, tmp_path):
  def change(arrays):
    return {name: array.reshape(()) if array.size == 1 else array for name, array in arrays.items()}

  plain = read("big_vision", sources["big_vision"])
  assert_same(read("big_vision", big_vision_changed(sources, tmp_path, change)).params, plain.params)


def test_weights_of_big_vision_are_not_those_of_open_clip(sources, tmp_path):
  folder = tmp_path / "folder"
  shutil.copytree(sources["open_clip"], folder)
  shutil.copy(sources["big_vision"] / "model.npz", folder)
  with pytest.raises(UserError, match=r"import it as big_vision:.*model\.npz"):
    imports.read(f"open_clip:{folder / 'model.npz'}")


def test_captions_are_mended_where_open_clip_mends_them(sources):
  """It does so before it hands them to any tokenizer; transformers hands them on as they are."""
  odd = ["a  dog", " a\ndog ", "a &amp;amp; b", "\N{RIGHT SINGLE QUOTATION MARK}s"]
  for family, as_one in (("open_clip", ["a dog", "a dog", "a & b", "'s"]), ("clip", odd)):
    tokenizer = read(family, sources[family]).tokenizer
    np.testing.assert_array_equal(tokenizer(odd, 16)[0], tokenizer(as_one, 16)[0])
  plain = read("clip", sources["clip"]).tokenizer
  assert not np.array_equal(plain(odd[:1], 16)[0], plain(["a dog"], 16)[0])
