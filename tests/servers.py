"""Servers on the loopback address that speak the protocols of object stores, and the web's."""

import contextlib
import functools
import http.server
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# How long a request is held that a test never lets go.
_HELD_SECONDS = 600


class Gate:
  """A WSGI application in front of another, which holds the requests that a test names.

  Attributes:
    holds: says of a method and a path whether the request is held.
    reached: is set when one is.
  """

  def __init__(self, application: Callable):
    self._application = application
    self.holds: Callable[[str, str], bool] = lambda method, path: False
    self.reached, self._open = threading.Event(), threading.Event()

  def __call__(self, environ, start_response):
    if self.holds(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
      self.reached.set()
      self._open.wait(_HELD_SECONDS)
      start_response("503 Service Unavailable", [])
      return [b""]
    return self._application(environ, start_response)

  def let_go(self) -> None:
    """Ends the requests that are held, unanswered as far as the store is concerned, and holds no more."""
    self.holds = lambda method, path: False
    self._open.set()


@contextlib.contextmanager
def s3(patch: pytest.MonkeyPatch) -> Iterator[Gate]:
  """Serves S3 by moto, and points this process and those that it starts to it."""
  server, serving = pytest.importorskip("moto.server"), pytest.importorskip("werkzeug.serving")
  pytest.importorskip("s3fs")
  gate = Gate(server.DomainDispatcherApplication(server.create_backend_app))
  made = serving.make_server("127.0.0.1", 0, gate, threaded=True)
  made.daemon_threads = True
  thread = threading.Thread(target=made.serve_forever, daemon=True)
  thread.start()
  # All its servers of a process share what they hold.
  urllib.request.urlopen(f"http://127.0.0.1:{made.server_port}/moto-api/reset", data=b"").close()
  patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server_port}")
  for name, value in (("ACCESS_KEY_ID", "tests"), ("SECRET_ACCESS_KEY", "tests"), ("DEFAULT_REGION", "us-east-1")):
    patch.setenv(f"AWS_{name}", value)
  try:
    yield gate
  finally:
    gate.let_go()
    made.shutdown()
    thread.join()


@contextlib.contextmanager
def gcs(patch: pytest.MonkeyPatch) -> Iterator[None]:
  """Serves Google Cloud Storage by gcp-storage-emulator, with the bucket "bucket"."""
  emulator = pytest.importorskip("gcp_storage_emulator.server")
  pytest.importorskip("gcsfs")
  made = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
  made.start()
  patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{made._api._httpd.server_port}")
  try:
    yield
  finally:
    made.stop()


@contextlib.contextmanager
def web(folder: Path) -> Iterator[str]:
  """Serves a folder and yields its address."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
      pass

  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
  threading.Thread(target=made.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{made.server_port}"
  finally:
    made.shutdown()


def wait_until(condition: Callable[[], object], process=None, seconds: float = 600) -> None:
  """Waits for a condition, or fails when the process has ended before it."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert process is None or process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.02)
