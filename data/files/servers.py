"""What is asked of S3, of Google Cloud Storage and of HTTP servers, and how their answers are judged.

An answer of other bytes than were asked, of fewer, or of another version of the file is refused here: no server is
trusted to have done what it was asked. What another attempt may mend is a `Fault`; every other error is final.
"""

import dataclasses
import errno
import importlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync

from contrastive_jax import stores
from contrastive_jax.errors import UserError

# Module and class of each kind of server, and the package to install for it.
_SYSTEMS = {
  "s3": ("s3fs.core", "S3FileSystem", "s3fs"),
  "gs": ("gcsfs.core", "GCSFileSystem", "gcsfs"),
  "http": ("fsspec.implementations.http", "HTTPFileSystem", "aiohttp"),
}
# Packages whose errors are about the connection or the answer, and not mistakes in the code here.
_CLIENTS = {"aiohttp", "aiobotocore", "asyncio", "botocore", "gcsfs", "google", "requests", "urllib3"}
# The client of each kind of server in each process. Those of a parent are kept in a child, where closing their
# connections would disturb the parent.
_clients: dict[tuple[str, int], Any] = {}
# Held while a client is made and answers for the first time, which imports modules: a fork waits for it, since a module
# that another thread of the parent was importing can never be imported in the child.
_starting = threading.RLock()
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)
# Of the refusals, those that may be gone at the next attempt: a request timed out, came too early, or was one too many.
_PASSING = {408, 425, 429}


@dataclasses.dataclass(frozen=True)
class Facts:
  """The size of a file, and what tells its versions apart.

  Attributes:
    size: number of bytes.
    stamp: a text that changes when the file does: the time of modification in nanoseconds on this machine, the ETag or
      the generation elsewhere; "" where a server says nothing of the kind.
  """

  size: int
  stamp: str


class Fault(OSError):
  """An answer that another attempt may mend.

  Attributes:
    kind: a short name of what went wrong, such as "HTTP 503", "stalled" or "short answer".
  """

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind


def scheme(file: str) -> str:
  """Returns the kind of server that an address names: "s3", "gs" or "http"; "" for a path on this machine.

  Raises:
    UserError: if the address is of another kind.
  """
  kind = stores.scheme(file)
  if not kind:
    return ""
  if kind not in ("s3", "gs", "http", "https"):
    raise UserError(
      f"{file} is an address of the kind {kind}://: name a file of this machine, or one by s3://, gs://, https:// or"
      " http://"
    )
  return kind.removesuffix("s") if kind == "https" else kind


def facts(file: str, seconds: float) -> Facts:
  """Asks a server for the facts of a file.

  Args:
    file: address of the file.
    seconds: how long the answer may take.

  Raises:
    Fault: if another attempt may help.
    FileNotFoundError: if there is no such file.
    PermissionError: if it may not be read.
    UserError: if the server refuses for another reason, or a package is missing.
  """
  return _asked(file, _FACTS, seconds=seconds)


def fetch(file: str, offset: int, size: int, stamp: str, seconds: float) -> bytes:
  """Asks a server for bytes of a file, and returns exactly these.

  Args:
    file: address of the file.
    offset: number of the first byte.
    size: number of bytes, at least one.
    stamp: the version of the file that is wanted; "" takes any.
    seconds: how long the answer may take.

  Raises:
    Fault: if another attempt may help.
    FileNotFoundError: if there is no such file.
    PermissionError: if it may not be read.
    UserError: if the file is too short, is of another version, or the server refuses for another reason.
  """
  try:
    return _asked(file, _RANGES, offset, size, stamp, seconds=seconds)
  except FileNotFoundError:
    if stamp and scheme(file) == "gs":  # Which knows one version of the file, and says nothing of others.
      raise _changed(file) from None
    raise


def found(pattern: str, seconds: float) -> list[str]:
  """Returns the files of a bucket that a pattern with `*`, `?` or `[...]` fits.

  Raises:
    Fault: if another attempt may help.
    UserError: if the server gives no lists of files.
  """
  kind = scheme(pattern)
  if kind == "http":
    raise UserError(f"{pattern} has a *, and HTTP servers give no lists of files: name them in braces, as {{000..123}}")
  names = _asked(pattern, {kind: _listed}, seconds=seconds)
  return [f"{kind}://{name}" for name in names]


def _asked(file: str, questions: Mapping[str, Callable[..., Any]], *arguments: Any, seconds: float) -> Any:
  """Puts the question of the file's kind of server, and tells errors that may pass from those that will not."""
  kind, path = scheme(file), urlsplit(file).path
  if not path.strip("/") or path.endswith("/"):
    raise UserError(f"{file} is a folder or a bucket, and files are needed: name those in it")

  def ask(client: Any) -> Any:
    return sync(client.loop, questions[kind], client, file, *arguments, timeout=seconds)

  key = kind, os.getpid()
  try:
    if key not in _clients:
      with _starting:
        if key not in _clients:
          client = _new_client(kind)
          try:
            return ask(client)
          finally:
            _clients[key] = client
    return ask(_clients[key])
  except (Fault, UserError):
    raise
  except TimeoutError:
    raise Fault("stalled", f"{_host(file)} did not answer within {seconds:g} s") from None
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file) from None
  except PermissionError as error:
    raise PermissionError(errno.EACCES, _said(error), file) from None
  except Exception as error:
    if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
      raise
    if str(error).startswith("Forbidden: "):  # As the client of Google Cloud Storage says it.
      raise PermissionError(errno.EACCES, _said(error), file) from None
    if "Credential" in type(error).__name__:
      raise UserError(
        f"{file} cannot be read without credentials ({_said(error)}): set them as the tools of the service want them,"
        " or FSSPEC_S3_ANON=true or FSSPEC_GCS_TOKEN=anon where anybody may read"
      ) from None
    raise _refusal(file, _status(error), _said(error)) from error


def _new_client(kind: str) -> Any:
  module, name, package = _SYSTEMS[kind]
  try:
    system = getattr(importlib.import_module(module), name)
  except ImportError as error:
    address = {"s3": "s3://", "gs": "gs://", "http": "https:// and http://"}[kind]
    raise UserError(
      f"files at {address} need the package {package} ({error}): run pip install -r requirements-remote.txt"
    ) from None
  return system(skip_instance_cache=True, use_listings_cache=False)


async def _s3_facts(system: Any, file: str) -> Facts:
  answer = await system._call_s3("head_object", **_s3_object(system, file))
  return Facts(answer["ContentLength"], answer["ETag"])


async def _s3_range(system: Any, file: str, offset: int, size: int, stamp: str) -> bytes:
  condition = {"IfMatch": stamp} if stamp else {}
  asked = f"bytes={offset}-{offset + size - 1}"
  answer = await system._call_s3("get_object", **_s3_object(system, file), Range=asked, **condition)
  async with answer["Body"] as body:
    if stamp and answer["ETag"] != stamp:
      raise _changed(file)
    _require_range(file, answer.get("ContentRange"), answer["ContentLength"], offset, size)
    return _whole(file, await body.read(), size)


def _s3_object(system: Any, file: str) -> dict[str, str]:
  bucket, key, version = system.split_path(file)
  return {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})


async def _gs_facts(system: Any, file: str) -> Facts:
  found = await system._get_object(file)
  return Facts(found["size"], found["generation"])


async def _gs_range(system: Any, file: str, offset: int, size: int, stamp: str) -> bytes:
  url = system.url(file, generation=stamp or None)
  headers, content = await system._call("GET", url, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
  if stamp and headers.get("x-goog-generation", stamp) != stamp:
    raise _changed(file)
  _require_range(file, headers.get("Content-Range"), len(content), offset, size)
  return _whole(file, content, size)


async def _http_facts(system: Any, file: str) -> Facts:
  # Not by HEAD, which signed addresses refuse, and which does not tell whether parts can be had.
  async with await _http_get(system, file, 0, 1) as answer:
    stated = answer.headers.get("Content-Range")
    if answer.status == 416:  # The file is empty.
      total = stated and re.fullmatch(r"bytes \*/(0)", stated)
    else:
      _require_ok(file, answer.status)
      if stated:
        _require_range(file, stated, None, 0, 1)
      length = answer.headers.get("Content-Length", "")
      total = re.fullmatch(r"bytes 0-0/(\d+)", stated) if stated else re.fullmatch(r"(\d+)", length)
    if not total:
      raise UserError(f"{file} is of unknown size, which its server does not tell: copy it to a server that does")
    return Facts(int(total[1]), _http_stamp(answer))


async def _http_range(system: Any, file: str, offset: int, size: int, stamp: str) -> bytes:
  async with await _http_get(system, file, offset, size) as answer:
    _require_ok(file, answer.status)
    if stamp and _http_stamp(answer) != stamp:
      raise _changed(file)
    length = answer.headers.get("Content-Length")
    _require_range(file, answer.headers.get("Content-Range"), int(length) if length else None, offset, size)
    return _whole(file, await answer.read(), size)


async def _http_get(system: Any, file: str, offset: int, size: int) -> Any:
  session = await system.set_session()
  options = dict(system.kwargs)
  asked = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
  options["headers"] = {**options.get("headers", {}), **asked}
  return await session.get(system.encode_url(file), **options)


def _http_stamp(answer: Any) -> str:
  return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


async def _listed(system: Any, pattern: str) -> list[str]:
  entries = await system._glob(pattern, detail=True)
  return [name for name, entry in entries.items() if entry["type"] == "file"]


_FACTS = {"s3": _s3_facts, "gs": _gs_facts, "http": _http_facts}
_RANGES = {"s3": _s3_range, "gs": _gs_range, "http": _http_range}


def _require_ok(file: str, status: int) -> None:
  if status in (404, 410):
    raise FileNotFoundError(file)
  if status in (401, 403):
    raise PermissionError(errno.EACCES, f"HTTP {status}", file)
  if status not in (200, 206):
    raise _refusal(file, status, f"HTTP {status}")


def _require_range(file: str, stated: str | None, length: int | None, offset: int, size: int) -> None:
  """Refuses an answer that does not say that it holds the bytes that were asked.

  Args:
    file: address of the file.
    stated: the Content-Range of the answer; None where it has none and holds the whole file.
    length: the number of bytes in the answer, where that is known.
    offset: number of the first byte that was asked.
    size: number of bytes that were asked.
  """
  if stated is None:
    if offset == 0 and length == size:
      return
    raise Fault("range ignored", f"{_host(file)} answers with whole files where parts are asked")
  parts = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", stated.strip())
  if not parts or int(parts[1]) != offset or int(parts[2]) > offset + size - 1:
    raise Fault("other bytes", f"{_host(file)} was asked for {size} bytes from {offset} on and answers with {stated!r}")
  if parts[3] != "*" and int(parts[3]) < offset + size:
    raise too_short(file, int(parts[3]), offset + size)


def _whole(file: str, content: bytes, size: int) -> bytes:
  if len(content) != size:
    raise Fault("short answer", f"{_host(file)} gave {len(content)} bytes of the {size} that were asked")
  return content


def too_short(file: str, size: int, needed: int) -> UserError:
  """Returns the error of a file that ends before the bytes that are asked of it."""
  return UserError(
    f"{file} has {size:,} bytes, and bytes up to {needed:,} are asked of it: it is cut or has changed, put it back or"
    " index it again"
  )


def _changed(file: str) -> UserError:
  return UserError(f"{file} has changed or is gone since it was first looked at: put it back, or start again")


def _refusal(file: str, status: int | None, said: str) -> Exception:
  """Returns the error of an answer that is none."""
  if status == 412:
    return _changed(file)
  if status == 416:
    return UserError(f"{file} does not have the bytes that are asked of it: it is cut or has changed, put it back")
  if status is not None and 300 <= status < 500 and status not in _PASSING:
    return UserError(f"{file} is refused by its server ({said}): mend the address or the rights to read it")
  return Fault(f"HTTP {status}" if status else "connection", said)


def _status(error: BaseException) -> int | None:
  """Returns the HTTP status that a server of S3 or of Google Cloud Storage answered with, if it did."""
  for each in (error, error.__cause__):
    response = getattr(each, "response", None)
    if isinstance(response, Mapping):
      return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
  code = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
  return int(code) if str(code).isdecimal() else None


def _said(error: BaseException) -> str:
  return " ".join(f"{type(error).__name__} {error}".split())[:300]


def _host(file: str) -> str:
  """Returns the server or the bucket of an address."""
  parts = urlsplit(file)
  return f"{parts.scheme}://{parts.netloc}"
