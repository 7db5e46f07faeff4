"""The parts of a PNG: a file without its side notes, and whether its stream holds every row."""

import math
import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that say nothing of the pixels. Others stay, since one whose name is damaged may be the palette.
_SIDE_CHUNKS = (
  b"cHRM",
  b"gAMA",
  b"iCCP",
  b"sBIT",
  b"sRGB",
  b"cICP",
  b"mDCV",
  b"cLLI",
  b"bKGD",
  b"hIST",
  b"pHYs",
  b"sPLT",
)
_SIDE_CHUNKS += (b"tIME", b"iTXt", b"tEXt", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"oFFs", b"pCAL", b"sCAL", b"caBX")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# (first column, first row, step of columns, step of rows) of the seven passes of an interlaced picture.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_UNPACKED_AT_ONCE = 1 << 20


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
  """Yields (kind, where the chunk begins, where it ends), as far as they follow each other."""
  at = len(SIGNATURE)
  while at + 12 <= len(data):
    length, kind = struct.unpack_from(">I4s", data, at)
    yield kind, at, at + 12 + length
    at += 12 + length


def without_side_notes(data: bytes) -> bytes:
  """Returns the PNG of its pixels and its orientation alone; an orientation that is damaged is left out too."""
  kept, end = [SIGNATURE], len(SIGNATURE)
  for kind, at, stop in chunks(data):
    damaged = kind == b"eXIf" and struct.pack(">I", zlib.crc32(data[at + 4 : stop - 4])) != data[stop - 4 : stop]
    if kind not in _SIDE_CHUNKS and not damaged:
      kept.append(data[at:stop])
    end = stop
  return b"".join([*kept, data[end:]])


def damaged_chunk(data: bytes) -> str:
  """Returns the kind of the first chunk that the pixels depend on whose checksum differs; "" where there is none.

  Pillow compares none of those of the pixels, and shows other pixels in their place.
  """
  for kind, at, stop in chunks(data):
    # A chunk that is cut has no checksum; whoever decodes says that it is.
    needed = kind in (b"IHDR", b"PLTE", b"IDAT", b"tRNS") and stop <= len(data)
    if needed and zlib.crc32(memoryview(data)[at + 4 : stop - 4]) != int.from_bytes(data[stop - 4 : stop], "big"):
      return kind.decode()
  return ""


def ends_early(data: bytes) -> bool:
  """Says whether the stream of a PNG that can be decoded holds fewer bytes than its rows take.

  Pillow leaves such rows black and says nothing.
  """
  wanted, held = None, 0
  stream = zlib.decompressobj()
  for kind, at, stop in chunks(data):
    if kind == b"IHDR":
      wanted = _stream_bytes(data[at + 8 : at + 21])
    elif kind == b"IDAT" and wanted is not None:
      part = data[at + 8 : stop - 4]
      while part and held < wanted and not stream.eof:
        try:
          held += len(stream.decompress(part, _UNPACKED_AT_ONCE))
        except zlib.error:  # A wrong checksum after the rows, since the picture could be decoded.
          return False
        part = stream.unconsumed_tail
  return wanted is not None and held < wanted


def _stream_bytes(header: bytes) -> int:
  """Bytes of all rows before they are compressed, each with one byte for its filter."""
  width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
  bits = depth * _CHANNELS.get(colour, 1)
  total = 0
  for left, top, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
    columns, rows = math.ceil((width - left) / right), math.ceil((height - top) / down)
    if columns > 0 and rows > 0:
      total += rows * (1 + math.ceil(columns * bits / 8))
  return total
