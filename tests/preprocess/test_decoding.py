"""Damaged, huge and odd pictures are read rightly or refused with one error."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.fuzz_records import fuzz
from benchmarks.large_records import (
  black_png,
  bmp_of_runs,
  by_pillow,
  icon,
  icon_that_lies,
  pixels,
  plain_ppm,
  ppm_of_few_levels,
  tile_that_lies,
  tiled_tiff,
)
from contrastive_jax.preprocess.decoding import DecodeError, from_bytes
from contrastive_jax.preprocess.images import center_crop, composite, decode, premultiply, resize, straight


def stored(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def png_of(width, height, depth=8, colour=2, interlaced=0, stream=b"", palette=b""):
  """A PNG whose header promises a size, whatever its stream holds."""
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
  chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(stream)), (b"IEND", b"")]
  chunks = chunks if palette else [chunks[0], *chunks[2:]]
  body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
  return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("width", "height"), [(65500, 65500), (30000, 30000), (4000, 4000), (65500, 100)])
def test_a_jpeg_that_lies_about_its_size_is_refused(width, height):
  data = stored(Image.new("RGB", (8, 8)), "JPEG")
  at = data.index(b"\xff\xc0") + 5
  with pytest.raises(DecodeError, match=f"{width}x{height}"):
    decode(data[:at] + struct.pack(">HH", height, width) + data[at + 4 :])


@pytest.mark.parametrize(("width", "height"), [(30000, 30000), (9000, 9000), (1, 2**30), (1, 2**24)])
def test_a_picture_that_takes_too_much_memory_is_refused_before_it_is_decoded(width, height):
  with pytest.raises(DecodeError):
    decode(png_of(width, height))


@pytest.mark.parametrize(
  "file",
  [
    icon_that_lies("ICO", black_png(5500)),
    icon_that_lies("ICNS", black_png(5500)),
    icon_that_lies("ICO", struct.pack("<IiiHH", 40, 9000, 18000, 1, 1) + bytes(24 + 8 + 9000 * 1128)),
    tile_that_lies(9000),
  ],
  ids=["PNG in ICO", "PNG in ICNS", "bitmap in ICO", "tile of TIFF"],
)
def test_what_a_file_holds_counts_and_not_what_it_promises(file):
  with pytest.raises(DecodeError, match=r"would take [\d,]+ MB to decode"):
    decode(file)


@pytest.mark.parametrize("maker", [by_pillow("QOI"), by_pillow("DDS"), plain_ppm, ppm_of_few_levels, bmp_of_runs])
def test_formats_that_are_decoded_in_python_are_read_and_count_their_buffers(maker):
  assert straight(maker(1 << 12)).shape == (64, 64, 3)
  # The header alone is read.
  head, side = maker(1 << 12), 4000
  for old, new in ((b"P3 64 64", b"P3 4000 4000"), (b"P6 64 64", b"P6 4000 4000")):
    head = head.replace(old, new)
  for order, at in (("<", 12), (">", 4), ("<", 18)):
    kinds = {12: b"DDS ", 4: b"qoif", 18: b"BM"}
    if head.startswith(kinds[at]):
      head = head[:at] + struct.pack(order + "II", side, side) + head[at + 8 :]
  with pytest.raises(DecodeError, match="4000x4000 pixels would take"):
    decode(head)


@pytest.mark.parametrize("maker", [icon("ICO", 256), icon("ICNS", 1024), tiled_tiff])
def test_icons_and_tiles_of_usual_sizes_are_read(maker):
  with Image.open(io.BytesIO(maker(1 << 18))) as opened:
    expected = np.asarray(opened)
  np.testing.assert_array_equal(straight(maker(1 << 18)), expected)


def test_pages_that_another_program_draws_are_refused_whatever_their_name(tmp_path):
  path = tmp_path / "picture.png"
  Image.new("RGB", (9, 7), "red").save(path, "EPS")
  with pytest.raises(DecodeError):
    decode(path)


def test_a_picture_without_pixels_is_refused():
  with pytest.raises(DecodeError, match="0x3 pixels"):
    decode(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("pixels", [np.full((4, 4), 200.0, np.float32), np.full((4, 4), 200, np.int32)])
def test_pixels_without_a_known_white_are_refused(pixels):
  with pytest.raises(DecodeError, match="none is known to be white"):
    decode(stored(Image.fromarray(pixels), "TIFF"))


def test_sixteen_bits_of_a_tiff_are_scaled():
  deep = np.array([[0, 257, 32768, 65535]], np.uint16)
  np.testing.assert_array_equal(decode(stored(Image.fromarray(deep), "TIFF"))[..., 0], [[0, 1, 128, 255]])


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_large_pictures_come_out_in_parts_as_pillow_makes_them_whole(mode, turn, rng):
  levels = rng.integers(0, 256, (1300, 1700, 4), np.uint8)
  if mode == "I;16":
    image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
  elif mode == "P":
    image = Image.fromarray(levels[..., 0], "P")
    image.putpalette(rng.bytes(768))
  else:
    image = Image.fromarray(levels).convert(mode)
  exif = Image.Exif()
  exif[0x0112] = turn
  # Palettes and greys are transparent by a table or a level beside the pixels.
  options = {"P": {"transparency": rng.bytes(256)}, "L": {"transparency": 9}}.get(mode, {})
  kind = "TIFF" if mode == "CMYK" else "PNG"
  data = stored(image, kind, exif=exif, **(options | ({} if kind == "TIFF" else {"compress_level": 0})))
  # Pillow turns a TIFF itself, so that what it makes of one without an orientation is compared with.
  options = options if kind == "PNG" else {}
  with Image.open(io.BytesIO(stored(image, kind, **options))) as opened:
    transparent = opened.mode in ("RGBA", "LA") or "transparency" in opened.info
    expected = np.asarray(opened.convert("RGBA" if transparent else "RGB"))
  if mode == "I;16":
    expected = np.repeat(levels[..., :1], 3, axis=2)
  assert transparent == (mode in ("RGBA", "LA", "P", "L"))
  np.testing.assert_array_equal(straight(data), np.rot90(expected, -1) if turn == 6 else expected)


@pytest.mark.parametrize("thin", ["wide", "tall"])
def test_large_thin_pictures_come_out_whole(thin):
  expected = pixels((1 << 21) + 77, 3, thin)
  np.testing.assert_array_equal(straight(by_pillow("PNG", thin=thin, compress_level=1)((1 << 21) + 77)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_large_greys_of_sixteen_bits_are_scaled(kind, order, rng):
  deep = rng.integers(0, 65536, (1100, 1200), np.uint16)
  if kind == "PPM":
    data = b"P5 1200 1100 65535\n" + deep.astype(">u2").tobytes()
  else:
    body = deep.astype(order + "u2").tobytes()
    tags = [(256, 1200), (257, 1100), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1100), (279, len(body))]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    data = mark + struct.pack(order + "I", 8 + len(body)) + body + struct.pack(order + "H", 9) + entries + bytes(4)
  np.testing.assert_array_equal(straight(data), np.repeat(np.round(deep / 257).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_garbage_in_the_metadata_does_not_cost_the_picture(kind, rng):
  picture = rng.integers(0, 256, (6, 9, 3), np.uint8)
  options = {"lossless": True} if kind == "WEBP" else {}
  exif = b"" if kind == "TIFF" else b"Exif\x00\x00" + rng.bytes(60)
  data = stored(Image.fromarray(picture), kind, **options, **({"exif": exif} if exif else {}))
  np.testing.assert_array_equal(decode(data), picture)


def test_large_transparent_pictures_are_put_on_a_background_as_small_ones_are(rng):
  pixels = rng.integers(0, 256, (700, 900, 4), np.uint8)
  for background in ((255, 255, 255), (10, 20, 30)):
    found = decode(pixels, background)
    np.testing.assert_array_equal(found, composite(premultiply(pixels), background))
    alpha = pixels[..., 3:] / 255
    assert np.abs(found - (pixels[..., :3] * alpha + np.array(background) * (1 - alpha))).max() <= 1


def test_thin_pictures_are_cropped_as_others_are(rng):
  strip = np.repeat(rng.integers(0, 256, (1, 20_000, 3), np.uint8), 3, axis=0)
  middle = center_crop(np.ascontiguousarray(strip[:, 9_900:10_100]), 96)
  assert np.abs(center_crop(strip, 96).astype(int) - middle).max() <= 1
  tall = np.full((2_000_000, 2, 3), 77, np.uint8)
  assert (resize(tall, 32, 32) == 77).all()


@pytest.mark.parametrize("exif", [bytes(200), b"\xff" * 200, b"II*\0\x08\0\0\0" + b"\x03\0\x12\x01\x02\0" * 20])
@pytest.mark.parametrize("turns", [1, 6])
def test_an_avif_is_read_and_turned_whatever_its_exif_holds(exif, turns, rng):
  sound = Image.Exif()
  sound[0x0112], sound[0x010F] = turns, "maker" * 60
  options = {"exif": sound.tobytes(), "speed": 10}
  data = stored(Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)), "AVIF", **options)
  at = data.rindex(sound.tobytes()[6:10])
  odd = data[:at] + exif + data[at + len(exif) :]
  assert decode(odd).shape == ((6, 9, 3) if turns == 1 else (9, 6, 3))
  np.testing.assert_array_equal(decode(odd), decode(data))


ODD_CHUNKS = {
  b"gAMA": b"\0\0",
  b"pHYs": b"\0",
  b"cHRM": bytes(5),
  b"sRGB": b"",
  b"fcTL": bytes(10),
  b"iCCP": b"x\0\0junk",
  b"eXIf": b"MM",
  b"zTXt": b"key\0\0" + zlib.compress(bytes(1 << 24)),
}


@pytest.mark.parametrize("checksum", [None, b"\1\2\3\4"])
@pytest.mark.parametrize("kind", ODD_CHUNKS)
def test_a_png_is_read_whatever_the_chunks_hold_that_are_not_its_pixels(kind, checksum, rng):
  picture = rng.integers(0, 256, (6, 9, 4), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  data, body = stored(Image.fromarray(picture), "PNG", exif=exif.tobytes()), ODD_CHUNKS[kind]
  odd = struct.pack(">I", len(body)) + kind + body + (checksum or struct.pack(">I", zlib.crc32(kind + body)))
  found = decode(data[:33] + odd + data[33:], background=None)
  # Of two blocks of EXIF either may be heard.
  turned = decode(data, background=None)
  assert np.array_equal(found, turned) or (
    kind == b"eXIf" and np.array_equal(found, decode(Image.fromarray(picture), None))
  )


@pytest.mark.parametrize("chunk", [b"PLTE", b"tRNS", b"IDAT"])
@pytest.mark.parametrize("letter", range(4))
def test_a_png_whose_pixels_are_named_wrongly_is_refused(chunk, letter, rng):
  picture = Image.fromarray(rng.integers(0, 256, (6, 9), np.uint8), "P")
  picture.putpalette(rng.bytes(768))
  data = bytearray(stored(picture, "PNG", transparency=bytes(range(256))))
  data[data.index(chunk) + letter] ^= 0x20
  with pytest.raises(DecodeError):
    decode(bytes(data))


def test_damage_gives_a_picture_or_one_error():
  counts = fuzz(600)
  assert len(counts) == 18 and all(count["read"] for count in counts.values())
  refused = {kind for kind, count in counts.items() if count["refused"]}
  # Damage of nothing but metadata never costs a picture; GIF and TIFF cannot do without theirs.
  assert refused == set(counts) - {f"{kind} metadata" for kind in ("PNG", "JPEG", "WEBP", "AVIF")}


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png"])
def test_a_path_that_no_file_can_have_is_a_bad_record(path):
  with pytest.raises(DecodeError, match="no file can have the path"):
    decode(path)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_colours_of_jpeg_2000_are_refused_since_pillow_makes_white_black(bits):
  levels = (np.linspace(0, 1, 64)[None, :, None] * (2**bits - 1)).round().repeat(32, 0).repeat(3, 2)
  written, data = cv2.imencode(
    ".jp2", levels.astype(np.uint8 if bits == 8 else np.uint16), [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
  )
  assert written
  if bits == 8:
    np.testing.assert_array_equal(decode(data.tobytes()), levels)
  else:
    for source in (data.tobytes(), Image.open(io.BytesIO(data.tobytes()))):
      with pytest.raises(DecodeError, match="JPEG 2000 have 16 bits"):
        decode(source)
  grey = levels[..., 0].astype(np.uint8 if bits == 8 else np.uint16)
  written, data = cv2.imencode(".jp2", grey, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
  white = 255 if bits == 8 else 65535
  assert np.abs(decode(data.tobytes())[..., 0] - grey * (255 / white)).max() <= 0.5


def test_signed_pixels_of_a_tiff_are_refused():
  data = bytearray(stored(Image.fromarray(np.zeros((2, 2), np.uint8)), "TIFF", tiffinfo={339: 1}))
  entry = data.index(struct.pack("<HHI", 339, 3, 1))
  assert decode(bytes(data)).shape == (2, 2, 3)
  data[entry + 8] = 2
  with pytest.raises(DecodeError, match="signed integers"):
    decode(bytes(data))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
  ("colour", "depth", "channels"),
  [(0, 1, 1), (0, 2, 1), (0, 8, 1), (0, 16, 1), (2, 8, 3), (2, 16, 3), (3, 4, 1), (4, 8, 2), (6, 8, 4)],
)
def test_a_png_whose_stream_lacks_a_row_is_refused(colour, depth, channels, interlaced, rng):
  """Pillow makes the rows black that are not there, and says nothing."""
  grid = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
  for width, height in [(1, 1), (1, 7), (5, 3), (9, 2), (16, 16), *rng.integers(1, 20, (6, 2)).tolist()]:
    samples = rng.integers(1, 2 ** min(depth, 8), (height, width, channels)).astype(np.uint8)
    stream = b""
    for left, top, right, down in grid if interlaced else [(0, 0, 1, 1)]:
      part = samples[top::down, left::right]
      if part.size:
        bits = part.reshape(len(part), -1, 1)
        bits = np.unpackbits(bits, axis=2)[..., 8 - depth :] if depth < 8 else bits.repeat(depth // 8, axis=2)
        rows = np.packbits(bits.reshape(len(part), -1), axis=1) if depth < 8 else bits.reshape(len(part), -1)
        stream += b"".join(b"\0" + row.tobytes() for row in rows)
    told = {"depth": depth, "colour": colour, "interlaced": interlaced}
    told["palette"] = bytes(range(48)) if colour == 3 else b""
    for whole in (stream, bytes(len(stream))):
      assert decode(png_of(width, height, stream=whole, **told)).shape == (height, width, 3)
    for held in (len(stream) - 1, len(stream) // 2):
      with pytest.raises(DecodeError, match=r"before its last row|not a picture"):
        decode(png_of(width, height, stream=stream[:held], **told))


def test_a_png_whose_pixels_changed_is_refused_at_every_byte():
  """Pillow compares no checksum of pixels, and would show others."""
  rng = np.random.default_rng(0)
  out = io.BytesIO()
  Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(out, "PNG")
  whole = out.getvalue()
  start, stop = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
  from_bytes(whole)
  for at in range(start, stop):
    with pytest.raises(DecodeError):
      from_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
