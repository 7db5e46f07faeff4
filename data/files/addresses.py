"""Paths of this machine and addresses of others, put together alike."""

import os
import posixpath

from data.files.servers import scheme


def is_local(file: str) -> bool:
  """Says whether a file is on this machine."""
  return not scheme(file)


def is_folder(place: str) -> bool:
  """Says whether a place is a folder of this machine; those of buckets are named by patterns."""
  return is_local(place) and os.path.isdir(place)


def joined(folder: str, name: str) -> str:
  """Returns the path or address of a file that is named from a folder; a whole path or address stays as it is.

  Examples:
    >>> joined("s3://photos/a.index", "../000.tar"), joined("photos", "/data/000.tar")
    ('s3://photos/000.tar', '/data/000.tar')
  """
  if scheme(name) or os.path.isabs(name):
    return name
  if is_local(folder):
    return os.path.normpath(os.path.join(folder, name))
  start, rest = folder.split("://", 1)
  return f"{start}://{posixpath.normpath(posixpath.join(rest, name))}"


def whole(file: str) -> str:
  """Returns the whole path of a file of this machine, and an address as it is."""
  return os.path.abspath(file) if is_local(file) else file
