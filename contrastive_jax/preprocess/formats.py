"""Formats of pictures that Pillow decodes here, with its plug-ins where they are installed."""

import contextlib
import functools
import importlib
import io
from pathlib import Path

from PIL import Image

# Formats that Pillow recognises but does not decode by itself, or that are not pictures.
_NOT_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Formats that hold a file of another, whose size shows only once it is decoded; FITS may unpack to any size as well.
_NOT_PICTURES |= {"BLP", "FITS", "FPX", "IPTC", "MIC"}
# What a file without a telling suffix may be: the other formats begin with bytes that any file may begin with.
_MARKED = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")
# What opens pictures that Pillow does not, by the suffixes of their files.
PACKAGES = {
  **dict.fromkeys((".heic", ".heif", ".hif", ".heics", ".heifs"), "pillow-heif"),
  ".jxl": "pillow-jxl-plugin",
  **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "rawpy"),
  **dict.fromkeys((".svg", ".svgz"), "resvg-py"),
}
# How files of these formats are mostly called. A telephone's MPO is a JPEG with others behind it.
_USUAL = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


@functools.cache
def add_plugins() -> None:
  """Lets Pillow open HEIC and JPEG XL where pillow-heif and pillow-jxl-plugin are installed; once a process."""
  # A plug-in that does not fit this Pillow raises what it likes: its pictures are then among those that nothing opens.
  with contextlib.suppress(Exception):
    importlib.import_module("pillow_heif").register_heif_opener()
  with contextlib.suppress(Exception):
    importlib.import_module("pillow_jxl")  # Registers itself.


@functools.cache
def decoded() -> tuple[str, ...]:
  """Returns Pillow's names of the formats that are decoded here, in the order in which Pillow tries them."""
  add_plugins()
  Image.init()
  return tuple(name for name in dict.fromkeys(Image.ID) if name in Image.OPEN and name not in _NOT_PICTURES)


@functools.cache
def suffixes() -> frozenset[str]:
  """Returns the suffixes, in lower case, of the pictures that are decoded here."""
  names = decoded()
  return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in names)


def size_of(data: bytes) -> tuple[int, int] | None:
  """Returns width and height of an encoded picture, as it is stored, without decoding it; None if it is no picture."""
  header = _header(data)
  return header and header[1]


def suffix_of(data: bytes) -> str:
  """Returns the suffix that a file with these bytes should have, such as ".jpg"; "" if they are no picture."""
  header = _header(data)
  return _suffix(header[0]) if header else ""


def _header(data: bytes) -> tuple[str, tuple[int, int]] | None:
  """Returns Pillow's name of the format and the size that the header of a picture tells."""
  try:
    with Image.open(io.BytesIO(data), formats=decoded()) as image:
      return image.format or "", image.size
  except Exception:  # Pillow raises what it likes for damaged files.
    return None


@functools.cache
def _suffix(name: str) -> str:
  known = sorted(suffix for suffix, other in Image.registered_extensions().items() if other == name)
  usual = _USUAL.get(name, f".{name.lower()}")
  return usual if usual in known or name in _USUAL else next(iter(known), "")


def is_picture(path: Path) -> bool:
  """Says whether a file is read as a picture: by its suffix in any case, or by its content where that says nothing."""
  known = path.suffix.lower()
  if known in suffixes():
    return True
  # A raw photograph begins as a TIFF does, of its thumbnail; telephones call a JPEG .heic.
  if PACKAGES.get(known) == "rawpy" or not path.is_file():
    return False
  try:
    with Image.open(path, formats=[name for name in _MARKED if name in Image.OPEN]):
      return True
  except Exception:  # Any file may stand here, and Pillow raises what it likes.
    return False


def package_for(path: Path) -> str:
  """Returns the package that decodes a type of picture which cannot be decoded here; "" for anything else."""
  package = PACKAGES.get(path.suffix.lower(), "")
  return "" if not package or is_picture(path) else package


def remedy(data: bytes) -> str:
  """Says of an encoded picture that nothing here opens which package would; "" where none is known."""
  if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
    return "it is HEIC: pip install pillow-heif"
  if data.startswith(_JXL_STARTS) and "JXL" not in Image.OPEN:
    return "it is JPEG XL: pip install pillow-jxl-plugin"
  return ""
