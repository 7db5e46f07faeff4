"""Stand-in for local files until the remote layer comes."""

import dataclasses
import glob
import os
from pathlib import Path
from typing import BinaryIO

import bracex

from contrastive_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Facts:
  size: int
  stamp: str


def is_local(file: str) -> bool:
  return "://" not in file


def join(folder: str, name: str) -> str:
  return name if "://" in name or name.startswith("/") else os.path.normpath(f"{folder}/{name}")


def whole(name: str) -> str:
  return os.path.abspath(name) if is_local(name) else name


def expand(pattern: str) -> list[str]:
  named = bracex.expand(pattern)
  found = sorted({file for each in named for file in (glob.glob(each) if glob.has_magic(each) else [each])})
  missing = [file for file in found if not os.path.exists(file)]
  if missing:
    raise UserError(f"{len(missing)} of {len(found)} files of {pattern} are missing, such as {missing[0]}")
  if not found:
    raise UserError(f"{pattern} names no file")
  return [whole(each) for each in found]


def facts(file: str) -> Facts:
  stat = os.stat(file)
  return Facts(stat.st_size, str(stat.st_mtime_ns))


def read(file: str, offset: int, size: int) -> bytes:
  with open(file, "rb") as opened:
    data = os.pread(opened.fileno(), size, offset)
  if len(data) != size:
    raise OSError(f"{file} is short")
  return data


def opened(file: str) -> BinaryIO:
  return open(file, "rb")


def local_copy(file: str) -> Path:
  if not os.path.isfile(file):
    raise FileNotFoundError(2, "No such file", file)
  return Path(file)


def is_folder(name: str) -> bool:
  return os.path.isdir(name)
