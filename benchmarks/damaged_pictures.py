"""Small pictures of six formats, damaged at seeded places of their header, their metadata or their body.

Where only metadata are damaged the pixels are whole, and a reader owes them. PNG's checksums are mended after each
second damage, so that what is wrong is met by the parser behind them.
"""

import dataclasses
import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF")
PARTS = ("header", "metadata", "body")
_MODES = {"JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L"), "AVIF": ("RGB", "RGBA"), "WEBP": ("RGB", "RGBA")}
_OTHER_MODES = ("RGB", "RGBA", "L", "P", "1", "LA", "I;16")
# Bytes of a value of each EXIF type, two of which do not exist, and tags that readers look at.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 0: 1, 99: 1}
_ORIENTATION = 0x0112
_TAGS = (_ORIENTATION, 0x0100, 0x0103, 0x010F, 0x011A, 0x0128, 0x0132, 0x014A, 0x0201, 0x0202, 0x02BC, 0x8769, 0x8825)
_TAGS += (0x9286, 0x927C, 0xA005)


@dataclasses.dataclass(frozen=True)
class Damaged:
  """A damaged file.

  Attributes:
    data: the file.
    kind: its format, of `FORMATS`.
    part: what is damaged, of `PARTS`.
    whole: the file before, where the pixels are not damaged and have to be read; None else.
  """

  data: bytes
  kind: str
  part: str
  whole: bytes | None = None


def damaged(kind: str, rng: np.random.Generator) -> Damaged:
  """Returns a small picture of a format that is damaged somewhere."""
  whole = _picture(kind, rng)
  part = PARTS[rng.integers(3)]
  if part == "metadata" and kind not in ("GIF", "TIFF"):
    # The damaged block has the length of the sound one, so that nothing else of the file has to change.
    sound = _sound_exif()[len(b"Exif\0\0") :]
    assert whole.count(sound) == 1, f"{kind}: the EXIF block is not where it should be"
    data = whole.replace(sound, _exif(rng, len(sound)))
    return Damaged(_checked(data) if kind == "PNG" else data, kind, part, whole)
  # A GIF's extensions and a TIFF's tags are what the decoder needs, which may refuse them.
  first, reach = {"header": (0, 64), "metadata": _tags(kind, whole), "body": (0, len(whole))}[part]
  data = _scribbled(whole, first, reach, rng)
  return Damaged(_checked(data) if kind == "PNG" and rng.integers(2) else data, kind, part)


def _picture(kind: str, rng: np.random.Generator) -> bytes:
  """Returns a picture of one or several frames, with EXIF where the format has a place of its own for it."""
  height, width = rng.integers(1, 40, 2)
  modes = _MODES.get(kind, _OTHER_MODES)
  mode = modes[rng.integers(len(modes))]
  frames = []
  for _ in range(rng.integers(1, 4) if kind not in ("JPEG", "AVIF") else 1):
    levels = rng.integers(0, 256, (height, width, 4), np.uint8)
    deep = levels[..., 0].astype(np.uint16) * 257
    frames.append(Image.fromarray(deep) if mode == "I;16" else Image.fromarray(levels).convert(mode))
  options = {"TIFF": {"compression": (None, "tiff_lzw", "tiff_adobe_deflate")[rng.integers(3)]}}
  options |= {"JPEG": {"progressive": bool(rng.integers(2))}, "WEBP": {"lossless": bool(rng.integers(2))}}
  options |= {"AVIF": {"speed": 10}}
  file = io.BytesIO()
  exif = {} if kind == "GIF" else {"exif": _sound_exif()}
  several = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
  frames[0].save(file, kind, **exif, **several, **options.get(kind, {}))
  return file.getvalue()


@functools.cache
def _sound_exif() -> bytes:
  """Returns a block of one long text, as it stands in every file."""
  exif = Image.Exif()
  exif[0x010F] = "maker" * 40
  return exif.tobytes()


def _exif(rng: np.random.Generator, length: int) -> bytes:
  """Returns an EXIF block of tags of all types, counts and offsets, often with an orientation; or noise."""
  if not rng.integers(8):
    return rng.bytes(length)
  order = "<>"[rng.integers(2)]
  directories, at = [], 8
  for _ in range(rng.integers(1, 3)):
    count = int(rng.integers(1, 6))
    entries = []
    for _ in range(count):
      tag = _ORIENTATION if not rng.integers(3) else int(_TAGS[rng.integers(len(_TAGS))])
      kind = int(list(_TYPE_BYTES)[rng.integers(len(_TYPE_BYTES))])
      # Mostly one value, or few; now and then none, or more than there is.
      values = (1, 1, 2, 7, 0, 300, 2**32 - 1)[rng.integers(7)]
      value = (int(rng.integers(12)), int(rng.integers(length)), 8, 2**32 - 1)[rng.integers(4)]
      entries.append(struct.pack(order + "HHII", tag, kind, values, value))
    at += 2 + 12 * count
    following = (0, at + 4, 8, int(rng.integers(2**16)))[rng.integers(4)]
    directories.append(struct.pack(order + "H", count) + b"".join(entries) + struct.pack(order + "I", following))
    at += 4
  mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
  block = mark + struct.pack(order + "I", 8) + b"".join(directories)
  block = (block + rng.bytes(length))[:length]
  return _scribbled(block, 0, length, rng, cut=False) if rng.integers(2) else block


def _tags(kind: str, data: bytes) -> tuple[int, int]:
  """Returns where a GIF has its extensions and a TIFF its tags."""
  if kind == "GIF":
    return max(0, data.find(b"!")), max(0, data.find(b"!")) + 32
  first = struct.unpack(("<" if data[:2] == b"II" else ">") + "I", data[4:8])[0]
  return first, first + 250


def _scribbled(data: bytes, first: int, stop: int, rng: np.random.Generator, cut: bool = True) -> bytes:
  """Flips, replaces, inserts or, where `cut`, cuts bytes at some places of a range; without `cut` the length stays."""
  changed = bytearray(data)
  for _ in range(rng.integers(1, 6)):
    at = int(rng.integers(min(first, len(changed) - 1), min(stop, len(changed))))
    what = rng.integers(5 if cut else 3)
    if what < 3:
      changed[at] = (changed[at] ^ (1 << int(rng.integers(8))), int(rng.integers(256)), 255)[what]
    elif what == 3:
      changed[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(9)))
    elif len(changed) > 2:
      del changed[max(2, at) :]
    if len(changed) < 3:
      break
  return bytes(changed)


def _checked(png: bytes) -> bytes:
  """Puts the right checksum behind every chunk of a PNG that is there as a whole."""
  mended, at = bytearray(png), 8
  while at + 12 <= len(mended):
    stop = at + 8 + struct.unpack(">I", mended[at : at + 4])[0]
    if stop + 4 > len(mended):
      break
    mended[stop : stop + 4] = struct.pack(">I", zlib.crc32(mended[at + 4 : stop]))
    at = stop + 4
  return bytes(mended)
