"""An HTTP server of files in memory that answers ranges, and fails in ways drawn from a seed."""

import os
import random
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What can go wrong: an error of the server, no answer at all or half of one, a connection that is reset or closed after
# half of the bytes (with and without a length that would tell), the whole file or other bytes than those asked for.
FAULTS = ("500", "503", "stalls", "stalls halfway", "resets", "cuts", "cuts unsaid", "ignores Range", "other bytes")


class FlakyServer:
  """Serves files on the loopback address while it is entered.

  Attributes:
    files: content of each file, which may be changed meanwhile.
    requests: the (file, Range) that was asked in each request, in their order.
    failed: how often each fault was put into an answer.
  """

  def __init__(self, files: Mapping[str, bytes], faults: Sequence[str] = (), rate: float = 0.0, seed: int = 0):
    """Draws nothing yet.

    Args:
      files: content of each file by its name.
      faults: the faults, of `FAULTS`, that are drawn from with equal chances.
      rate: the share of answers with a fault.
      seed: seed of the draws.
    """
    self.files = dict(files)
    self.requests: list[tuple[str, str | None]] = []
    self.failed: Counter[str] = Counter()
    self._faults, self._rate, self._draw = tuple(faults), rate, random.Random(seed)
    self._lock, self._closing = threading.Lock(), threading.Event()

  def __enter__(self) -> "FlakyServer":
    handler = type("Handler", (_Handler,), {"served": self})
    self._server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._closing.set()
    self._server.shutdown()
    self._server.server_close()

  def address(self, name: str) -> str:
    """Returns the address of a file."""
    return f"http://127.0.0.1:{self._server.server_port}/{name}"

  def next_fault(self, name: str, asked: str | None) -> str:
    """Draws the fault of an answer; "" for none."""
    with self._lock:
      self.requests.append((name, asked))
      fault = self._draw.choice(self._faults) if self._faults and self._draw.random() < self._rate else ""
      if fault:
        self.failed[fault] += 1
      return fault

  def stall(self) -> None:
    """Waits until the server is closed."""
    self._closing.wait()


class _Server(ThreadingHTTPServer):
  def handle_error(self, request, client_address) -> None:
    """Says nothing of clients that have left; other errors are shown."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  served: FlakyServer

  def log_message(self, *_) -> None:
    pass

  def do_GET(self) -> None:
    name, asked = self.path.lstrip("/"), self.headers.get("Range")
    fault = self.served.next_fault(name, asked)
    content = self.served.files.get(name)
    if fault in ("500", "503") or content is None:
      self._answer(int(fault) if fault in ("500", "503") else 404, b"no file")
      return
    if fault == "stalls":
      self.served.stall()
      return
    tag = {"ETag": f'"{hash(content):x}"'}
    parts = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
    if not parts or fault == "ignores Range":
      self._answer(200, content, tag)
      return
    first, stop = int(parts[1]), min(int(parts[2]) + 1, len(content))
    if first >= len(content):
      self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
      return
    if fault == "other bytes":  # As many as were asked, from another place.
      moved = first - 1 if first else 1
      first, stop = moved, stop - first + moved
    self._answer(206, content[first:stop], tag | {"Content-Range": f"bytes {first}-{stop - 1}/{len(content)}"}, fault)

  def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, fault: str = "") -> None:
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if fault == "cuts unsaid":
      self.send_header("Connection", "close")
    else:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    half = fault in ("stalls halfway", "resets", "cuts", "cuts unsaid")
    try:
      self.wfile.write(body[: len(body) // 2] if half else body)
    except OSError:  # The client has left.
      self.close_connection = True
    if half:
      self.close_connection = True
    if fault == "stalls halfway":
      self.served.stall()
    elif fault == "resets":
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      os.close(self.connection.detach())
