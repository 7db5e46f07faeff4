"""Decoding of pictures: within a budget of memory, upright, and with one error for whatever a decoder raises."""

import contextlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from contrastive_jax.preprocess import formats, png

# What decoding a single picture may take, its file included. The estimates below are measured upper bounds.
MAX_BYTES = 295_000_000
# Larger files are not even read: no picture of affordable size needs more.
MAX_FILE_BYTES = 100_000_000
# Bytes for each pixel: the decoded picture and its 8-bit RGB.
_BYTES_A_PIXEL = 8
# What the formats' own decoders need beside that.
_FORMAT_BYTES = {"WEBP": 11, "AVIF": 10, "JPEG2000": 21, "GIF": 3, "TIFF": 6, "JPEG": 9, "MPO": 9}
_FORMAT_BYTES |= {"HEIF": 13, "JXL": 15, "SGI": 2}
# Formats that Pillow decodes in Python, QOI and plain PPM among them, are put together in buffers of their own.
_PYTHON_BYTES = 12
# What is multiplied by alpha, put on white and brought into a square.
_TRANSPARENT_BYTES = 8
_TURNED_BYTES = 4
# Pillow keeps a pointer for each row of an image and of its conversion, and fills rows up to four bytes. OpenCV keeps
# a weight for each column that it reduces.
_BYTES_A_ROW, _BYTES_A_COLUMN = 24, 12
# Rows worked on at once where numbers are wider than a pixel.
_STRIP_PIXELS = 1 << 20

_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_EXIF_SEGMENT, _EXIF_START = 0xE1, b"Exif\0\0"
_ICO = b"\0\0\1\0"
# The entry of a metadata item, in the second or third version, up to its type.
_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT, _WHITE_IS_ZERO = 258, 262, 277, 322, 323, 0
_SAMPLE_FORMAT, _SIGNED = 339, 2
# The beginning of the stream within a JPEG 2000: its levels are told 42 bytes from here on.
_HEAD_BYTES, _CODESTREAM = 1 << 20, b"\xff\x4f\xff\x51"
# Where PNG, JPEG 2000 and the stream within it tell their size.
_SIZES = re.compile(rb"(?:IHDR|ihdr|\xff\x4f\xff\x51.{4})(.{8})", re.DOTALL)


class DecodeError(ValueError):
  """The record itself is bad, and reading it again would not help. I/O errors are left as they are."""


def read_file(path: str | os.PathLike) -> bytes:
  """Reads a file that is to be decoded.

  Raises:
    DecodeError: if it is larger than `MAX_FILE_BYTES`, or nothing can have such a path.
    OSError: if it cannot be read.
  """
  try:
    file = open(path, "rb")  # noqa: SIM115 - closed below.
  except ValueError:  # A null character, or a lone surrogate that stands for no byte.
    raise DecodeError(f"no file can have the path {os.fspath(path)!a}") from None
  with file:
    _check_file(os.fstat(file.fileno()).st_size)
    return file.read()


def from_bytes(data: bytes) -> np.ndarray:
  """Decodes the bytes of a file to uint8 `[height, width, 3 or 4]`, alpha not multiplied.

  Raises:
    DecodeError: whatever the decoder raises, and for what would take more than `MAX_BYTES`.
  """
  _check_file(len(data))
  # OpenCV decodes JPEG several times faster than PIL, but fills what a truncated file lacks with grey, so that only
  # files with their end marker take this path; it has its own idea of CMYK, so these do not take it either.
  if data[:2] == b"\xff\xd8" and b"\xff\xd9" in data[-64:] and b"Adobe" not in data[:4096]:
    _check_jpeg(data)
    try:
      # OpenCV takes an orientation of any type for a short integer, so that its own is not used.
      how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
      pixels = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    except cv2.error:
      pixels = None
    if pixels is not None:
      return _turned(pixels, _jpeg_orientation(data))
  _check_icon(data)
  try:
    return _with_pillow(data, len(data))
  except DecodeError:
    raise
  except Exception as error:  # Decoders raise what they like for damaged files: SyntaxError, struct.error, KeyError ...
    # They also refuse whole pictures for odd metadata.
    plain = _without_metadata(data)
    if plain != data:
      with contextlib.suppress(Exception):
        return _with_pillow(plain, len(data) + len(plain))
    remedy = formats.remedy(data)
    raise DecodeError(f"not a picture that can be decoded here: {remedy}") if remedy else undecodable(error) from error


def _with_pillow(data: bytes, file_bytes: int) -> np.ndarray:
  if data.startswith(png.SIGNATURE) and (kind := png.damaged_chunk(data)):
    raise DecodeError(f"the PNG is damaged: the checksum of its {kind} differs")
  with Image.open(io.BytesIO(data), formats=formats.decoded()) as image:
    pixels = from_pil(image, file_bytes)
    # To unpack the stream again takes as long as decoding, so that only pictures that may lack rows are looked at.
    if image.format == "PNG" and (image.info.get("interlace") or _ends_in_zeros(image)) and png.ends_early(data):
      raise DecodeError("the stream of the PNG ends before its last row")
    return pixels


def _ends_in_zeros(image: Image.Image) -> bool:
  return not np.any(np.asarray(image.crop((0, image.height - 1, *image.size))))


def _without_metadata(data: bytes) -> bytes:
  """Returns a PNG of its pixels and its orientation, or an AVIF or HEIC whose EXIF nobody finds.

  The orientation of the latter two is a property of the picture, and not that of its EXIF.
  """
  if data[4:8] == b"ftyp":
    return _EXIF_ITEM.sub(rb"\1none", data)
  return png.without_side_notes(data) if data.startswith(png.SIGNATURE) else data


def undecodable(error: Exception, what: str = "picture") -> DecodeError:
  """Makes the one error that stands for all that decoders raise."""
  # Pillow names the buffer that it reads, whose address differs from run to run.
  said = re.sub(r" ?<_io\.BytesIO[^>]*>", "", " ".join(str(error).split()))[:200]
  article = "an" if what[0] in "aeiou" else "a"
  return DecodeError(f"not {article} {what} that can be decoded ({type(error).__name__}{': ' if said else ''}{said})")


def from_pil(image: Image.Image, file_bytes: int = 0) -> np.ndarray:
  """Converts a PIL image to upright uint8 `[height, width, 3 or 4]`, alpha not multiplied.

  16-bit grey levels are scaled so that 65535 (or the largest value of the bits that a TIFF names) is white. Pictures of
  32-bit integers or floats have no such value and are refused.

  Args:
    image: any image, decoded or not yet.
    file_bytes: number of bytes that its file takes in memory.

  Raises:
    DecodeError: if it takes too much memory or has pixels without a known white.
  """
  if not image.width or not image.height:
    raise DecodeError(f"the picture has {image.width}x{image.height} pixels")
  _check_levels(image)
  orientation = orientation_of(image)
  transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
  each = _BYTES_A_PIXEL + _FORMAT_BYTES.get(image.format or "", 0)
  each += _TRANSPARENT_BYTES * transparent + _TURNED_BYTES * (orientation != 1)
  each += _PYTHON_BYTES * any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
  upright = orientation == 1
  rows = image.height if upright else image.height + image.width
  sides = rows * _BYTES_A_ROW + (image.width if upright else max(image.size)) * _BYTES_A_COLUMN
  needed = image.width * image.height * each + sides + file_bytes + _tile_bytes(image)
  check_affordable(needed, f"{image.width}x{image.height} pixels")
  deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
  if image.mode in ("I", "F") and not deep:
    kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
    raise DecodeError(f"the pixels are {kind}, of which none is known to be white: save 8 or 16 bits")
  image.load()
  orientation = orientation_of(image)  # Pillow turns a TIFF itself, when it is loaded.
  if orientation != 1:
    image = _with_source(image.transpose(_TURNS[orientation]), image)
  if deep:
    return _in_strips(image, 3, lambda strip: _grey(strip, image))
  mode = "RGBA" if transparent else "RGB"
  return _in_strips(image, len(mode), lambda strip: np.asarray(strip if strip.mode == mode else strip.convert(mode)))


def _in_strips(image: Image.Image, channels: int, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
  """Converts a decoded image to pixels a part at a time: a whole copy for each step of it is never made."""
  width, height = image.size
  if width * height <= _STRIP_PIXELS:
    return convert(image)
  pixels = np.empty((height, width, channels), np.uint8)
  columns = min(width, _STRIP_PIXELS)
  rows = _STRIP_PIXELS // columns
  for top in range(0, height, rows):
    for left in range(0, width, columns):
      box = (left, top, min(left + columns, width), min(top + rows, height))
      pixels[box[1] : box[3], box[0] : box[2]] = convert(image.crop(box))
  return pixels


def orientation_of(image: Image.Image) -> int:
  """Returns the EXIF orientation, from 1 to 8; 1 where there is none that can be read, whatever the other tags hold."""
  return _orientation(image.getexif)


def _orientation(read: Callable[[], Image.Exif]) -> int:
  """Returns the orientation as a whole number of any of the types that EXIF has for numbers."""
  try:
    value: Any = read().get(_ORIENTATION, 1)
    if isinstance(value, tuple | bytes) and len(value) == 1:
      value = value[0]
    if not isinstance(value, str | bytes) and float(value) in _TURNS:
      return int(value)
  except Exception:  # Metadata that nobody can read leave the picture as it is.
    return 1
  return 1


def _jpeg_orientation(data: bytes) -> int:
  parts = [data[at:stop] for marker, at, stop in _jpeg_segments(data) if marker == _EXIF_SEGMENT]
  exif = b"".join(part.removeprefix(_EXIF_START) for part in parts if part.startswith(_EXIF_START))
  if not exif:
    return 1
  found = Image.Exif()

  def read() -> Image.Exif:
    found.load(_EXIF_START + exif)
    return found

  return _orientation(read)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Undoes an EXIF orientation."""
  if orientation in (2, 4):
    return cv2.flip(pixels, 1 if orientation == 2 else 0)
  if orientation in (3, 6, 8):
    turns = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return cv2.rotate(pixels, turns[orientation])
  if orientation in (5, 7):
    pixels = cv2.transpose(pixels)
    return pixels if orientation == 5 else cv2.flip(pixels, -1, pixels)  # In place: no third copy.
  return pixels


def eight_bits(values: np.ndarray, white: int = 65535) -> np.ndarray:
  """Scales integers from 0 to `white` to the nearest of 256 levels, some rows at a time."""
  levels = np.empty(values.shape, np.uint8)
  rows = max(1, _STRIP_PIXELS // max(1, values[:1].size))
  for start in range(0, len(values), rows):
    strip = np.minimum(values[start : start + rows].astype(np.uint32), white)
    levels[start : start + rows] = (strip * 255 + white // 2) // white
  return levels


def check_affordable(needed: int, what: str) -> None:
  """Raises a `DecodeError` when decoding would take more memory than one record may."""
  if needed > MAX_BYTES:
    raise DecodeError(f"{what} would take {needed / 1e6:,.0f} MB to decode, more than {MAX_BYTES / 1e6:,.0f} MB")


def _check_file(size: int) -> None:
  if size > MAX_FILE_BYTES:
    raise DecodeError(f"a file of {size / 1e6:,.0f} MB is more than the {MAX_FILE_BYTES / 1e6:,.0f} MB of one picture")


def _tile_bytes(image: Image.Image) -> int:
  """Bytes of a whole tile of a TIFF, which is unpacked at once, however little of it lies within the picture."""
  if image.format != "TIFF":
    return 0
  tags: Any = getattr(image, "tag_v2", {})
  width, height, samples = (tags.get(tag, least) for tag, least in ((_TILE_WIDTH, 0), (_TILE_HEIGHT, 0), (_SAMPLES, 1)))
  bits = tags.get(_BITS_PER_SAMPLE, (8,))
  bits = max(bits) if isinstance(bits, tuple) else bits
  if not all(isinstance(number, int) for number in (width, height, samples, bits)):
    return 0  # The decoder says what is wrong.
  return width * height * max(4, samples * -(-bits // 8))


def _check_levels(image: Image.Image) -> None:
  """Refuses levels that Pillow makes others of: it rounds the white of deep colours up to black, and drops signs."""
  file = getattr(image, "fp", None)  # None once it is decoded.
  data, start = b"", -1
  if image.format == "JPEG2000" and image.mode not in ("L", "I;16") and file is not None:
    place = file.tell()
    file.seek(0)
    data = file.read(_HEAD_BYTES)
    file.seek(place)
    start = data.find(_CODESTREAM)
  if start >= 0:
    count = int.from_bytes(data[start + 40 : start + 42])
    deepest = max((1 + (depth & 0x7F) for depth in data[start + 42 : start + 42 + 3 * count : 3]), default=8)
    if deepest > 8:
      raise DecodeError(f"the colours of the JPEG 2000 have {deepest} bits, which cannot be read right: save 8 bits")
  tags: Any = getattr(image, "tag_v2", {})
  if image.format == "TIFF" and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
    raise DecodeError("the pixels are signed integers, of which none is known to be white: save 8 or 16 bits")


def _check_icon(data: bytes) -> None:
  """Checks the pictures within an icon, of which Pillow decodes one as soon as the file is opened."""
  if data[:4] not in (b"icns", _ICO):
    return
  sizes = [struct.unpack(">II", found[1]) for found in _SIZES.finditer(data)]
  if data[:4] == _ICO:
    for entry in range(6, min(len(data) - 15, 6 + 16 * int.from_bytes(data[4:6], "little")), 16):
      at = int.from_bytes(data[entry + 12 : entry + 16], "little")
      kind, fields = int.from_bytes(data[at : at + 4], "little"), data[at + 4 : at + 12]
      if kind < 1 << 10 and len(fields) == 8:  # A bitmap, whose header tells its own length, holds a mask below.
        width, height = struct.unpack("<HH", fields[:4]) if kind == 12 else struct.unpack("<ii", fields)
        sizes.append((abs(width), abs(height) // 2))
  for width, height in sizes:
    needed = width * height * (_BYTES_A_PIXEL + _TRANSPARENT_BYTES) + height * _BYTES_A_ROW + len(data)
    check_affordable(needed, f"an icon of {width}x{height} pixels")


def _check_jpeg(data: bytes) -> None:
  """Checks what a JPEG says of its size before anything is decoded."""
  try:
    frame = _jpeg_frame(data)
  except (struct.error, IndexError, ZeroDivisionError):
    frame = None
  if frame is None:
    return  # The decoder says what is wrong.
  kind, height, width, components = frame
  if not components or not height or not width:
    return
  largest = max(h * v for h, v in components)
  samples = sum(h * v for h, v in components) / max(1, largest)  # For each pixel, chroma subsampled.
  # A progressive file keeps all coefficients, 16 bits each; the picture and a turned or resized copy are always there.
  each = 7 + (2 * samples if kind == 2 else 0)
  check_affordable(int(height * width * each) + len(data), f"{width}x{height} pixels")
  # Huffman codes take a bit for each block at the least: a file with less was cut or lies, and would come out grey.
  if kind <= 2 and len(data) * 8 < height * width * samples / 64:
    raise DecodeError(f"{len(data):,} bytes cannot hold {width}x{height} pixels")


def _jpeg_frame(data: bytes) -> tuple[int, int, int, list[tuple[int, int]]] | None:
  """Returns (kind of frame, height, width, sampling factors of each component) of the first frame header."""
  for marker, at, _ in _jpeg_segments(data):
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      height, width, count = struct.unpack_from(">HHB", data, at + 1)
      factors = [data[at + 7 + 3 * k] for k in range(count)]
      return marker - 0xC0, height, width, [(factor >> 4, factor & 15) for factor in factors]
  return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields (marker, where its content begins, where it ends) of the segments before the first scan."""
  at = 2
  while at + 4 <= len(data):
    if data[at] != 0xFF:
      at += 1
      continue
    marker = data[at + 1]
    if marker == 0xFF:
      at += 1
    elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
      at += 2
    elif marker in (0xD9, 0xDA):
      return
    else:
      stop = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
      yield marker, at + 4, stop
      at = stop


def _with_source(turned: Image.Image, image: Image.Image) -> Image.Image:
  """Keeps what the conversion of a turned image has to know of its file."""
  for name in ("tag_v2", "format"):
    if hasattr(image, name):
      setattr(turned, name, getattr(image, name))
  return turned


def _grey(image: Image.Image, source: Image.Image) -> np.ndarray:
  """Levels of 16 bits, or of as many as the TIFF says that they are of, as three equal channels."""
  tags: Any = getattr(source, "tag_v2", {})
  bits = tags.get(_BITS_PER_SAMPLE, (16,))
  bits = int(bits[0] if isinstance(bits, tuple) else bits)
  values = np.asarray(image)
  levels = eight_bits(values.clip(0, None) if values.dtype.kind == "i" else values, 2 ** min(max(bits, 9), 16) - 1)
  if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    levels = 255 - levels
  return np.repeat(levels[..., None], 3, axis=2)
