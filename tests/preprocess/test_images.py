"""Every way a picture is stored gives the pixels that were put in."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.preprocess.images import (
  DecodeError,
  center_crop,
  composite,
  decode,
  patchify,
  premultiply,
  resize,
  trim,
  unpatchify,
)

FINE = {"quality": 95, "subsampling": 0}  # Of a JPEG.


@pytest.fixture
def picture():
  """A smooth picture, which JPEG keeps to a few levels."""
  y, x = np.mgrid[:24, :32]
  return np.stack([y * 8, x * 6, 200 - y * 3 - x * 2], axis=2).astype(np.uint8)


def stored(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_file_formats(picture, kind, tmp_path):
  options = {"WEBP": {"lossless": True}, "JPEG": FINE}.get(kind, {})
  data = stored(Image.fromarray(picture), kind, **options)
  tolerance = {"JPEG": 12, "GIF": 40}.get(kind, 0)
  path = tmp_path / "picture"
  path.write_bytes(data)
  for source in (data, path, str(path)):
    decoded = decode(source)
    assert decoded.dtype == np.uint8 and decoded.shape == (24, 32, 3)
    assert np.abs(decoded.astype(int) - picture).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "packed TIFF", "AVIF"])
def test_orientation_is_undone(picture, kind, orientation):
  turn = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3),
  }[orientation]  # fmt: skip
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {
    "JPEG": FINE, "WEBP": {"lossless": True}, "packed TIFF": {"compression": "tiff_lzw"}, "AVIF": {"quality": 100},
  }.get(kind, {})  # fmt: skip
  data = stored(Image.fromarray(np.ascontiguousarray(turn(picture))), kind.split()[-1], exif=exif, **options)
  decoded = decode(data)
  assert decoded.shape == picture.shape
  assert np.abs(decoded.astype(int) - picture).max() <= {"JPEG": 12, "AVIF": 12}.get(kind, 0)


# Type and count of the tag, its bytes in a little-endian file, and the orientation that they mean.
MISTYPED = {
  "byte": (1, 1, b"\6", 6),
  "short": (3, 1, struct.pack("<H", 6), 6),
  "long": (4, 1, struct.pack("<I", 6), 6),
  "signed": (9, 1, struct.pack("<i", -6), 1),
  "rational": (5, 1, struct.pack("<II", 6, 1), 6),
  "rational of nothing": (5, 1, struct.pack("<II", 6, 0), 1),
  "float": (11, 1, struct.pack("<f", 6.0), 6),
  "between": (11, 1, struct.pack("<f", 6.5), 1),
  "double": (12, 1, struct.pack("<d", 6.0), 6),
  "text": (2, 2, b"6\0", 1),
  "none": (3, 1, struct.pack("<H", 0), 1),
  "nine": (3, 1, struct.pack("<H", 9), 1),
  "unknown type": (99, 1, struct.pack("<I", 6), 1),
  "huge count": (3, 2**32 - 1, struct.pack("<I", 26), 1),
}


@pytest.mark.parametrize("name", MISTYPED)
@pytest.mark.parametrize("endian", ["II", "MM"])
def test_an_orientation_of_another_type_means_the_same_in_every_format(name, endian):
  kind, count, value, orientation = MISTYPED[name]
  order = "<" if endian == "II" else ">"
  width = {3: 2, 4: 4, 5: 4, 9: 4, 11: 4, 12: 8, 99: 4}.get(kind, 1)
  if endian == "MM":
    value = b"".join(value[k : k + width][::-1] for k in range(0, len(value), width))
  inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", 26)
  entry = struct.pack(order + "HHI", 0x0112, kind, count) + inline
  blob = endian.encode() + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4) + (value if len(value) > 4 else b"")
  picture = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], 32, 1).repeat(3, 2))
  upright = np.asarray(picture if orientation == 1 else picture.transpose(Image.Transpose.ROTATE_270))
  segment = b"Exif\0\0" + blob
  for mode in ("RGB", "CMYK"):
    jpeg = stored(picture.convert(mode), "JPEG", **FINE)
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    decoded = decode(jpeg)
    assert decoded.shape == upright.shape and np.abs(decoded.astype(int) - upright).max() < 30
  png = stored(picture, "PNG")
  chunk = b"eXIf" + blob
  png = png[:33] + struct.pack(">I", len(blob)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
  np.testing.assert_array_equal(decode(png), upright)
  np.testing.assert_array_equal(decode(stored(picture, "WEBP", lossless=True, exif=blob)), upright)


def test_cmyk_jpeg(picture):
  decoded = decode(stored(Image.fromarray(picture).convert("CMYK"), "JPEG"))
  assert np.abs(decoded.astype(int) - picture).max() <= 20


def test_grey_and_two_level_pictures(picture):
  grey = picture[..., 0]
  np.testing.assert_array_equal(decode(stored(Image.fromarray(grey), "PNG")), np.dstack([grey] * 3))
  np.testing.assert_array_equal(decode(grey), np.dstack([grey] * 3))
  np.testing.assert_array_equal(decode(grey[..., None]), np.dstack([grey] * 3))
  bits = decode(stored(Image.fromarray(grey > 90), "PNG"))
  np.testing.assert_array_equal(bits, np.dstack([np.where(grey > 90, 255, 0)] * 3))


def test_sixteen_bits_are_scaled_not_wrapped():
  deep = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
  expected = np.round(deep / 257).astype(np.uint8)
  for source in (deep, stored(Image.fromarray(deep), "PNG")):
    np.testing.assert_array_equal(decode(source), np.dstack([expected] * 3))


def test_transparency_is_composited_or_kept():
  pixels = np.zeros((2, 2, 4), np.uint8)
  pixels[..., 0], pixels[..., 3] = 200, [[0, 51], [102, 255]]
  alpha = pixels[..., 3:] / 255
  for background in ((255, 255, 255), (10, 20, 30)):
    expected = pixels[..., :3] * alpha + np.array(background) * (1 - alpha)
    for source in (pixels, Image.fromarray(pixels), stored(Image.fromarray(pixels), "PNG")):
      assert np.abs(decode(source, background) - expected).max() <= 1
  kept = decode(pixels, background=None)
  assert kept.shape == (2, 2, 4)
  assert np.abs(kept[..., :3] - pixels[..., :3] * alpha).max() <= 0.5
  np.testing.assert_array_equal(composite(premultiply(pixels)), decode(pixels))


def test_a_transparent_palette_colour_is_transparent():
  image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
  image.putpalette([255, 0, 0, 0, 255, 0])
  decoded = decode(stored(image, "PNG", transparency=0))
  np.testing.assert_array_equal(decoded, [[[255, 255, 255], [0, 255, 0]]])


@pytest.mark.parametrize(
  "source",
  [b"", b"no picture", b"\xff\xd8 nor this \xff\xd9", np.zeros((2, 2, 7), np.uint8), np.zeros((2, 2), np.float32)],
)
def test_what_is_no_picture_is_a_bad_record(source):
  with pytest.raises(DecodeError):
    decode(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_a_bad_record(picture, kind):
  with pytest.raises(DecodeError):
    decode(stored(Image.fromarray(picture), kind)[:-30])


def test_a_missing_file_is_an_input_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    decode(tmp_path / "nothing.png")


def test_resizing_keeps_a_gradient_and_averages_detail(picture):
  small = resize(picture, 12, 16)
  assert np.abs(small.astype(int) - picture.reshape(12, 2, 16, 2, 3).mean(axis=(1, 3))).max() <= 8
  board = np.indices((64, 64)).sum(axis=0) % 2 * 255
  grey = resize(np.dstack([board.astype(np.uint8)] * 3), 8, 8)
  assert np.abs(grey.astype(int) - 128).max() < 12


@pytest.mark.parametrize(("height", "width"), [(24, 32), (32, 24), (5, 70), (16, 16)])
def test_the_middle_square_is_cut(height, width):
  image = np.zeros((height, width, 3), np.uint8)
  image[height // 2, :] = 255
  assert center_crop(image, 16).shape == (16, 16, 3)
  wide = np.zeros((16, 48, 3), np.uint8)
  wide[:, 16:32] = 255
  assert (center_crop(wide, 16) == 255).all()


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 4), (6, 9, 3), (4, 4, 4), (5, 7, 1)])
def test_patches_are_tiles_in_row_major_order(rng, height, width, patch):
  images = rng.integers(0, 256, (3, height, width, 3), np.uint8)
  batch = patchify(images, patch)
  for k, (t, y, x) in enumerate(batch.coords[1]):
    tile = images[1, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
    assert t == 0
    np.testing.assert_array_equal(batch.patches[1, k].reshape(patch, patch, 3), tile)
  assert (batch.coords == batch.coords[0]).all() and batch.coords.dtype == np.int16
  np.testing.assert_array_equal(unpatchify(batch, patch), images)


def test_patches_must_tile():
  with pytest.raises(ValueError, match="5 pixels do not tile images of 8x8"):
    patchify(np.zeros((1, 8, 8, 3), np.uint8), 5)


@pytest.mark.parametrize("box", [(2, 10, 3, 6), (0, 20, 8, 9), (5, 6, 0, 20)])
def test_a_drawing_is_cut_to_its_own_square(box):
  top, bottom, left, right = box
  pixels = np.zeros((20, 20, 4), np.uint8)
  pixels[top:bottom, left:right] = 255
  cut = trim(pixels)
  side = max(bottom - top, right - left)
  assert cut.shape == (side, side, 4)
  assert cut.astype(int).sum() == pixels.astype(int).sum()
  rows, columns = np.nonzero(cut[..., 3])
  assert abs(rows.min() - (side - 1 - rows.max())) <= 1 and abs(columns.min() - (side - 1 - columns.max())) <= 1


def test_nothing_is_not_cut():
  assert trim(np.zeros((5, 7, 4), np.uint8)).shape == (5, 7, 4)
