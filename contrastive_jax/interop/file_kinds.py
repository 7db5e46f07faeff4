"""Recognises files that are not what their names promise, and says how the weights in them become readable."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from contrastive_jax.errors import UserError

_COMPRESSED = {
  b"\x1f\x8b": "gzip",
  b"BZh": "bzip2",
  b"\xfd7zXZ": "xz",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"7z\xbc\xaf": "7z",
}
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
# By the end of a file's name: formats of weights that are not read, and what makes them readable.
_CONVERSIONS = {
  ".msgpack": "a Flax model: load it in transformers (from_flax=True), then model.save_pretrained(NEW_FOLDER)",
  ".h5": "a Keras or TensorFlow model: load it in transformers (from_tf=True), then model.save_pretrained(NEW_FOLDER)",
  ".pb": "a TensorFlow SavedModel: save the weights of the model as safetensors",
  ".data-00000-of-00001": "a TensorFlow checkpoint: save the weights of the model as safetensors",
  ".ckpt.index": "a TensorFlow checkpoint: save the weights of the model as safetensors",
  ".onnx": "an ONNX graph: save the weights of the model that it was made from as safetensors",
  ".gguf": "a GGUF file of quantized weights: take the model that it was made from",
  ".npy": "one NumPy array: a checkpoint holds many, by name",
  ".pkl": "a pickle, which can run any code: save the weights as safetensors",
  ".pickle": "a pickle, which can run any code: save the weights as safetensors",
  ".joblib": "a pickle, which can run any code: save the weights as safetensors",
}
# Weights that change those of another model, and are nothing alone.
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def require_readable(path: Path, suffixes: Sequence[str]) -> None:
  """Refuses a file whose bytes are not those of the format that its suffix promises.

  Args:
    path: path of the file.
    suffixes: the suffixes of the formats that are read.

  Raises:
    UserError: in one sentence that says what the file is and what to do with it.
  """
  try:
    with path.open("rb") as file:
      head = file.read(512)
  except OSError as error:
    raise UserError(f"{path} cannot be opened: {error.strerror}") from error
  what = _foreign(path, head)
  if what is None:
    found = _format(path, head)
    if path.suffix not in suffixes:
      what = f"ends in '{path.suffix}': a checkpoint ends in {', '.join(suffixes)}"
    elif found and path.suffix not in found:
      what = f"holds what a file that ends in {found[0]} holds: rename it"
  if what is not None:
    raise UserError(f"{path} {what}")


def foreign_text(path: Path) -> str | None:
  """Says what a file is where text was expected; None where it may be text."""
  try:
    with path.open("rb") as file:
      return _foreign(path, file.read(512))
  except OSError as error:
    return f"cannot be opened: {error.strerror}"


def conversion_of_folder(folder: Path) -> str:
  """Names the weights in a folder that are not read, as the end of a sentence."""
  names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
  for name in names:
    if name in _ADAPTERS:
      return f"; {name} is an adapter (LoRA): merge it into its model with peft's merge_and_unload, and save that"
    for end, what in _CONVERSIONS.items():
      if name.endswith(end):
        return f"; {name} is {what}"
  return ""


def _foreign(path: Path, head: bytes) -> str | None:
  if not head:
    return "is empty (0 bytes): copy it again"
  if not head.strip(b"\0"):
    return "begins with zeros alone, as an interrupted download does: copy it again"
  if head.startswith(b"version https://git-lfs"):
    return "is a pointer of git-lfs and not the file itself: run `git lfs pull` in its folder, or download it again"
  start = head.lstrip().lower()
  if start.startswith((b"<!doctype", b"<html", b"<?xml")):
    return "is a web page and not the file itself: download it again"
  for magic, name in _COMPRESSED.items():
    if head.startswith(magic):
      return f"is compressed with {name}: unpack it"
  if head.startswith(b"\x89HDF"):
    return f"is {_CONVERSIONS['.h5']}"
  if head.startswith(b"GGUF"):
    return f"is {_CONVERSIONS['.gguf']}"
  if head.startswith(b"\x93NUMPY"):
    return f"is {_CONVERSIONS['.npy']}"
  if head[257:262] == b"ustar":
    return "is a tar archive: unpack it, or save a checkpoint of PyTorch before 1.0 again"
  # PyTorch began files with this number before version 1.6.
  if b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in head[:32]:
    return (
      "is a pickled file of PyTorch before version 1.6: write it anew with PyTorch by"
      f" torch.save(torch.load('{path.name}', map_location='cpu'), 'NEW{path.suffix}')"
    )
  if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
    return "is a pickle, which can run any code: load it where it was made, and save the weights as safetensors"
  if path.name.endswith(".msgpack") or (0x80 < head[0] < 0x90 and 0xA0 < head[1:2][0] < 0xC0):
    return f"is {_CONVERSIONS['.msgpack']}"
  for end, what in _CONVERSIONS.items():
    if path.name.endswith(end):
      return f"is {what}"
  if head.startswith(b"PK"):
    return _archive(path)
  return None


def _archive(path: Path) -> str | None:
  """Names a zip archive that holds no weights as PyTorch or NumPy write them."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
    return f"is cut off or damaged ({error}): copy it again"
  if any("/code/" in name or name.endswith("constants.pkl") for name in names):
    return (
      "is a TorchScript archive, as OpenAI published CLIP: write its weights with PyTorch by"
      f" torch.save(torch.jit.load('{path.name}', map_location='cpu').state_dict(), 'NEW{path.suffix}')"
    )
  if not any(name.endswith(("data.pkl", ".npy")) for name in names):
    return "is a zip archive without weights: unpack it"
  return None


def _format(path: Path, head: bytes) -> tuple[str, ...] | None:
  """Returns the suffixes of the format of some bytes, as far as these tell."""
  if head.startswith(b"PK"):
    with zipfile.ZipFile(path) as archive:
      return _TORCH if any(name.endswith("data.pkl") for name in archive.namelist()) else (".npz",)
  # A header of JSON behind its length in eight bytes.
  return (".safetensors",) if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8 else None
