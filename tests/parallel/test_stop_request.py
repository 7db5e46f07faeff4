"""Which signals ask a run to stop, and with which code it then ends."""

import os
import signal

import pytest

from contrastive_jax.parallel.distributed import StopRequest
from contrastive_jax.parallel.mesh import MeshSpec


@pytest.fixture
def handlers():
  """Puts back the handlers of signals."""
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  yield before
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_asks_to_stop(name, code, handlers):
  with StopRequest(MeshSpec().make()) as stop:
    assert not stop.agree()
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.agree() and stop.exit_code == code
  assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_closed_terminal_may_say_so_twice(handlers):
  with StopRequest(MeshSpec().make()) as stop:
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGHUP)
    assert stop.agree() and stop.exit_code == 129


def test_a_run_under_nohup_outlives_its_terminal(handlers):
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with StopRequest(MeshSpec().make()) as stop:
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.agree()
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
