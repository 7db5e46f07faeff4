"""Files of single records as large as one likes: pictures of many formats, moving pictures, and files that lie."""

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

# Makes a file of about so many pixels.
Maker = Callable[[int], bytes]
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# (first row, first column, rows apart, columns apart) of PNG's seven passes.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def pixels(count: int, channels: int, thin: str = "") -> np.ndarray:
  """Returns uint8 `[height, width, channels]` of repeated noise: a square, or `thin` is "tall", "wide" or "half"."""
  side, half = max(1, int(count**0.5)), max(1, int((count / 2) ** 0.5))
  height, width = {"": (side, side), "tall": (count, 1), "wide": (1, count), "half": (half, 2 * half)}[thin]
  tile = np.random.default_rng(0).integers(0, 256, (min(64, height), min(64, width), channels), np.uint8)
  copies = -(-height // tile.shape[0]), -(-width // tile.shape[1]), 1
  return np.tile(tile, copies)[:height, :width]


def by_pillow(kind: str, mode: str = "RGB", thin: str = "", turned: bool = False, frames: int = 1, **options) -> Maker:
  """Returns a maker of what Pillow writes."""

  def make(count: int) -> bytes:
    if mode in ("I;16", "I", "F"):
      levels = pixels(count, 1, thin)[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
      image = Image.fromarray(levels * 3 if mode == "I;16" else levels)
    else:
      channels = {"L": 1, "P": 1, "1": 1, "RGB": 3, "CMYK": 4, "RGBA": 4, "LA": 4}[mode]
      levels = pixels(count, channels, thin)
      image = Image.fromarray(levels[..., 0] if channels == 1 else levels, "CMYK" if mode == "CMYK" else None)
      if mode == "P":
        image.putpalette(np.arange(768).astype(np.uint8).tobytes())
      elif image.mode != mode:
        image = image.convert(mode)
    several = {"save_all": True, "append_images": [_changed(image, k) for k in range(1, frames)]} if frames > 1 else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, kind, **several, **options, **({"exif": exif.tobytes()} if turned else {}))
    return file.getvalue()

  return make


def _changed(image: Image.Image, number: int) -> Image.Image:
  return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT if number % 2 else Image.Transpose.FLIP_TOP_BOTTOM)


def interlaced_png(count: int) -> bytes:
  """Returns a PNG of RGBA in seven passes, which Pillow and OpenCV read but do not write."""
  levels = pixels(count, 4)
  packer = zlib.compressobj(1)
  packed = []
  for top, left, down, across in _PASSES:
    part = levels[top::down, left::across].reshape(-1, len(range(left, levels.shape[1], across)) * 4)
    for start in range(0, len(part), 256):
      rows = np.pad(part[start : start + 256], ((0, 0), (1, 0)))  # Filter 0 before each row.
      packed.append(packer.compress(rows.tobytes()))
  body = b"".join(packed) + packer.flush()
  return png(levels.shape[1], levels.shape[0], depth=8, colour=6, interlaced=True, body=body)


def deep_png(count: int) -> bytes:
  """Returns a PNG of 16 bits a channel, RGBA."""
  levels = pixels(count, 8)
  packer = zlib.compressobj(1)
  rows = [packer.compress(b"\0" + row.tobytes()) for row in levels]
  return png(levels.shape[1], levels.shape[0], depth=16, colour=6, body=b"".join(rows) + packer.flush())


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, interlaced: bool = False, body: bytes) -> bytes:
  """Returns a PNG of a header and a compressed body."""
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
  chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
  return _SIGNATURE + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
  )


def tiled_tiff(count: int) -> bytes:
  """Returns a TIFF of RGB in tiles of 256 x 256, deflated."""
  across = max(1, int(count**0.5) // 256)
  tile = zlib.compress(np.tile(pixels(4096, 3), (4, 4, 1)).tobytes(), 1)
  tiles = across * across
  side, at = across * 256, 8
  offsets_at = at + len(tile)
  sizes_at = offsets_at + 4 * tiles
  directory_at = sizes_at + 4 * tiles
  bits_at = directory_at + 2 + 12 * 10 + 4
  tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, bits_at), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3)]
  tags += [(322, 3, 1, 256), (323, 3, 1, 256)]
  # Few tiles stand in the tags themselves.
  tags += [(324, 4, tiles, at if tiles == 1 else offsets_at), (325, 4, tiles, len(tile) if tiles == 1 else sizes_at)]
  directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
  # All tiles are the same bytes of the file.
  lists = struct.pack(f"<{tiles}I", *[at] * tiles) + struct.pack(f"<{tiles}I", *[len(tile)] * tiles)
  return b"II*\0" + struct.pack("<I", directory_at) + tile + lists + directory + struct.pack("<HHH", 8, 8, 8)


def video(codec: str, container: str, frames: int = 24) -> Maker:
  """Returns a maker of videos."""

  def make(count: int) -> bytes:
    levels = pixels(count, 3)
    even = levels[: levels.shape[0] // 16 * 16 or 16, : levels.shape[1] // 16 * 16 or 16]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
      stream = output.add_stream(codec, rate=Fraction(8))
      stream.height, stream.width, stream.pix_fmt = even.shape[0], even.shape[1], "yuv420p"
      for k in range(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(even, 8 * k, axis=1)), format="rgb24")
        output.mux(stream.encode(frame))
      output.mux(stream.encode())
    return file.getvalue()

  return make


def icon(kind: str, most: int) -> Maker:
  """Returns a maker of icons, whose sides have at most so many pixels."""

  def make(count: int) -> bytes:
    side = min(most, int(count**0.5))
    file = io.BytesIO()
    Image.fromarray(pixels(side * side, 4)).save(file, kind, **({"sizes": [(side, side)]} if kind == "ICO" else {}))
    return file.getvalue()

  return make


def plain_ppm(count: int) -> bytes:
  """Returns a PPM whose numbers are written out, with two bytes for most of them."""
  side = max(1, int(count**0.5))
  row = b" ".join(b"%d" % level for level in pixels(64, 1).ravel() % 10)
  return b"P3 %d %d 255\n" % (side, side) + b"\n".join([row] * -(-3 * side * side // 64))


def ppm_of_few_levels(count: int) -> bytes:
  """Returns a PPM of 100 levels, which have to be scaled."""
  levels = pixels(count, 3) % 100
  return b"P6 %d %d 99\n" % (levels.shape[1], levels.shape[0]) + levels.tobytes()


def bmp_of_runs(count: int) -> bytes:
  """Returns a BMP of a palette, whose rows are runs of one colour."""
  runs = max(1, int(count**0.5) // 64)
  body = (b"\x40\x05" * runs + b"\0\0") * (64 * runs) + b"\0\1"
  header = struct.pack("<IiiHHIIiiII", 40, 64 * runs, 64 * runs, 1, 8, 1, len(body), 0, 0, 256, 0) + bytes(1024)
  return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body


def black_png(side: int) -> bytes:
  """Returns a PNG whose body is all there and small, since it is black."""
  packer = zlib.compressobj(1)
  return png(side, side, body=b"".join([packer.compress(bytes(1 + 3 * side)) for _ in range(side)]) + packer.flush())


def icon_that_lies(kind: str, inner: bytes) -> bytes:
  """Returns an icon of 64 x 64 pixels in an ICO, or 128 x 128 in an ICNS, that holds another picture."""
  if kind == "ICO":
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(inner), 22) + inner
  return struct.pack(">4sI4sI", b"icns", 16 + len(inner), b"ic07", 8 + len(inner)) + inner


def tile_that_lies(side: int) -> bytes:
  """Returns a TIFF of 100 x 100 pixels in one large tile."""
  data = tiled_tiff(65536)
  packer = zlib.compressobj(1)
  tile = b"".join([packer.compress(bytes(3 * side)) for _ in range(side)]) + packer.flush()
  at = struct.unpack("<I", data[4:8])[0]
  tags = [
    list(struct.unpack_from("<HHII", data, at + 2 + 12 * k)) for k in range(struct.unpack_from("<H", data, at)[0])
  ]
  start = 8 + len(tile)
  new = {256: 100, 257: 100, 258: start, 322: side, 323: side, 324: 8, 325: len(tile)}
  directory = b"".join(struct.pack("<HHII", *tag[:3], new.get(tag[0], tag[3])) for tag in tags)
  depths = struct.pack("<HHH", 8, 8, 8)
  return b"II*\0" + struct.pack("<I", start + 6) + tile + depths + struct.pack("<H", len(tags)) + directory + bytes(4)


def jpeg_that_lies(count: int) -> bytes:
  """Returns a JPEG of 8 x 8 pixels whose header promises 65500 x 65500."""
  file = io.BytesIO()
  Image.new("RGB", (8, 8)).save(file, "JPEG")
  data = file.getvalue()
  at = data.index(b"\xff\xc0") + 5
  return data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]


PICTURES: dict[str, Maker] = {
  "PNG RGB": by_pillow("PNG", compress_level=1),
  "PNG RGBA": by_pillow("PNG", "RGBA", compress_level=1),
  "PNG RGBA, turned": by_pillow("PNG", "RGBA", turned=True, compress_level=1),
  "PNG RGBA, twice as wide as high": by_pillow("PNG", "RGBA", thin="half", compress_level=1),
  "PNG palette": by_pillow("PNG", "P", compress_level=1),
  "PNG palette, transparent": by_pillow("PNG", "P", transparency=0, compress_level=1),
  "PNG grey and alpha": by_pillow("PNG", "LA", compress_level=1),
  "PNG grey 16 bits": by_pillow("PNG", "I;16", compress_level=1),
  "PNG RGBA 16 bits": deep_png,
  "PNG RGBA interlaced": interlaced_png,
  "PNG animated": by_pillow("PNG", "RGBA", frames=3, compress_level=1),
  "PNG one pixel wide": by_pillow("PNG", thin="tall", compress_level=1),
  "PNG one pixel high": by_pillow("PNG", thin="wide", compress_level=1),
  "JPEG baseline": by_pillow("JPEG", quality=60),
  "JPEG baseline 4:4:4, turned": by_pillow("JPEG", turned=True, quality=60, subsampling=0),
  "JPEG progressive": by_pillow("JPEG", quality=60, progressive=True),
  "JPEG progressive 4:4:4": by_pillow("JPEG", quality=60, progressive=True, subsampling=0),
  "JPEG grey": by_pillow("JPEG", "L", quality=60),
  "JPEG CMYK": by_pillow("JPEG", "CMYK", quality=60),
  "JPEG CMYK progressive, turned": by_pillow("JPEG", "CMYK", quality=60, progressive=True, turned=True),
  "WebP": by_pillow("WEBP", method=0),
  "WebP lossless RGBA": by_pillow("WEBP", "RGBA", lossless=True, method=0, quality=0),
  "WebP animated": by_pillow("WEBP", "RGBA", frames=3, lossless=True, method=0, quality=0),
  "GIF": by_pillow("GIF", "P"),
  "GIF transparent": by_pillow("GIF", "P", transparency=0),
  "GIF animated": by_pillow("GIF", "P", frames=3),
  "TIFF strips": by_pillow("TIFF"),
  "TIFF strips LZW RGBA": by_pillow("TIFF", "RGBA", compression="tiff_lzw"),
  "TIFF strips RGBA, turned": by_pillow("TIFF", "RGBA", turned=True, compression="tiff_adobe_deflate"),
  "TIFF one strip": by_pillow("TIFF", compression="tiff_lzw", strip_size=1 << 30),
  "TIFF JPEG in one strip": by_pillow("TIFF", compression="jpeg", strip_size=1 << 30),
  "TIFF tiles": tiled_tiff,
  "TIFF CMYK": by_pillow("TIFF", "CMYK", compression="tiff_lzw"),
  "TIFF grey 16 bits": by_pillow("TIFF", "I;16", compression="tiff_lzw"),
  "TIFF bits": by_pillow("TIFF", "1", compression="group4"),
  "TIFF pages": by_pillow("TIFF", frames=3, compression="tiff_lzw"),
  "TIFF one pixel wide": by_pillow("TIFF", thin="tall", compression="tiff_lzw"),
  "TIFF one pixel high": by_pillow("TIFF", thin="wide", compression="tiff_lzw"),
  "TIFF 32-bit integers": by_pillow("TIFF", "I", compression="tiff_lzw"),
  "TIFF floats": by_pillow("TIFF", "F", compression="tiff_lzw"),
  "AVIF": by_pillow("AVIF", speed=10, quality=40),
  "AVIF RGBA": by_pillow("AVIF", "RGBA", speed=10, quality=40, subsampling="4:4:4"),
  "JPEG 2000": by_pillow("JPEG2000"),
  "JPEG 2000 RGBA": by_pillow("JPEG2000", "RGBA"),
  "ICO": icon("ICO", 256),
  "ICNS": icon("ICNS", 1024),
  "PPM": by_pillow("PPM"),
  "PGM 16 bits": by_pillow("PPM", "I;16"),
  "PPM plain": plain_ppm,
  "PPM of 100 levels": ppm_of_few_levels,
  "TGA": by_pillow("TGA", "RGBA", compression="tga_rle"),
  "BMP": by_pillow("BMP"),
  "BMP of runs": bmp_of_runs,
  "QOI": by_pillow("QOI"),
  "PCX": by_pillow("PCX"),
  "SGI": by_pillow("SGI"),
  "DDS": by_pillow("DDS", "RGBA"),
}
LIES: dict[str, Maker] = {
  "PNG header of 65535 x 65535": lambda _: png(65535, 65535, body=zlib.compress(b"")),
  "PNG header of 1 x 2**31 - 1": lambda _: png(1, 2**31 - 1, body=zlib.compress(b"")),
  "PNG header of 9000 x 9000": lambda _: png(9000, 9000, body=zlib.compress(bytes(1 << 20))),
  "ICO of a PNG of 9000 x 9000": lambda _: icon_that_lies("ICO", black_png(9000)),
  "ICNS of a PNG of 9000 x 9000": lambda _: icon_that_lies("ICNS", black_png(9000)),
  "TIFF tile of 16000 x 16000": lambda _: tile_that_lies(16000),
  "JPEG header of 65500 x 65500": jpeg_that_lies,
  "GIF header of 65535 x 65535": lambda _: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6) + b";",
  "PPM header of 60000 x 60000": lambda _: b"P6 60000 60000 255\n" + bytes(64),
  "BMP header of 40000 x 40000": lambda _: (
    b"BM" + struct.pack("<IHHI", 118, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 40000, 40000, 1, 24, *[0] * 6)
  ),
  "TGA header of 65535 x 65535": lambda _: bytes([0, 0, 10] + [0] * 9) + struct.pack("<HH", 65535, 65535) + b"\x20\x08",
}
MOVING: dict[str, Maker] = {
  "clip GIF": by_pillow("GIF", "P", frames=12),
  "clip WebP": by_pillow("WEBP", "RGBA", frames=12, method=0, quality=0),
  "clip PNG": by_pillow("PNG", "RGBA", frames=12, compress_level=1),
  "clip MPEG-4": video("mpeg4", "mp4"),
  "clip H.264": video("libx264", "mp4"),
  "clip VP9": video("libvpx-vp9", "webm"),
}
