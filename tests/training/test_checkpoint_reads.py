"""What cannot be read now is read again and never set aside; several processes take the same checkpoint."""

import errno
import functools
import inspect
import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.training import verification
from contrastive_jax.training.checkpoint import Checkpoints, restore_params
from contrastive_jax.training.state import TrainState
from tests import runs

IO_ERROR = OSError(errno.EIO, os.strerror(errno.EIO))
TRANSIENT = [
  IO_ERROR,
  OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
  PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
  TimeoutError("timed out"),
  ValueError("FAILED_PRECONDITION: Error reading local file: [OS error 5: EIO Input/output error]"),
  ValueError("UNAVAILABLE: the store does not answer"),
]
DAMAGE = [
  FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
  ValueError("NOT_FOUND: Error opening: [OS error 2: ENOENT No such file or directory]"),
  ValueError("DATA_LOSS: the checksum of a chunk is wrong"),
  KeyError("state"),
]


def state(step=0, value=0.0):
  params = {"image": {"kernel": jnp.full((4, 3), value)}}
  return TrainState(step=jnp.int32(step), params=params, opt_state={})


@pytest.fixture
def run(tmp_path):
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    for step in (1, 2):
      checkpoints.save(state(step, step / 2), {})
    checkpoints.wait()
  return tmp_path


@pytest.fixture
def fail(monkeypatch):
  """Has reads of a step fail so many times, and counts the attempts."""
  monkeypatch.setattr(verification, "RETRY_DELAYS", (0.01, 0.01, 0.01))

  def fail_at(call, error, times, step=2):
    original, attempts = getattr(ocp, call), []

    @functools.wraps(original)
    def failing(path, *arguments, **options):
      if path.name == str(step):
        attempts.append(path)
        if len(attempts) <= times:
          raise error
      return original(path, *arguments, **options)

    monkeypatch.setattr(ocp, call, failing)
    return attempts

  return fail_at


def restored(run):
  with Checkpoints(run / "checkpoints") as checkpoints:
    return int(checkpoints.restore(state())[0].step)


def test_a_sound_checkpoint_is_read_without_a_word(run, caplog):
  assert restored(run) == restore_params(run, None).step == 2
  assert not caplog.records


CALLS = pytest.mark.parametrize("call", ["checkpointables_metadata", "load_checkpointables"])


@CALLS
@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_an_error_that_heals_costs_no_checkpoint(call, error, run, fail):
  attempts = fail(call, error, times=2)
  assert restored(run) == 2 and len(attempts) == 3
  assert not list((run / "checkpoints").glob("*damaged*"))


@CALLS
@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_an_error_that_stays_ends_in_one_sentence_and_moves_nothing(call, error, run, fail):
  attempts = fail(call, error, times=99)
  said = re.escape("checkpoint 2 cannot be read now") + ".*is left as it is: .* run the same command again$"
  for read in (restored, lambda run: restore_params(run, None)):
    with pytest.raises(UserError, match=said):
      read(run)
  assert len(attempts) == 2 * 4
  assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir()) == ["1", "2"]


@CALLS
@pytest.mark.parametrize("error", DAMAGE, ids=str)
def test_damage_is_not_read_again(call, error, run, fail):
  attempts = fail(call, error, times=99)
  assert restored(run) == 1 and len(attempts) == 1
  assert (run / "checkpoints" / "2.damaged").is_dir()


def test_errors_of_tensorstore_are_told_apart_by_their_number(run):
  """The error is TensorStore's own, from files that loop: what stands there was not written."""
  manifest = next((run / "checkpoints" / "2" / "state").rglob("manifest.ocdbt"))
  manifest.unlink()
  manifest.symlink_to(manifest.name)
  assert restored(run) == 1


TOGETHER = """
import sys, json, errno, os
import jax, jax.numpy as jnp
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec
import orbax.checkpoint.experimental.v1 as ocp
from contrastive_jax.errors import UserError
from contrastive_jax.parallel import distributed
from contrastive_jax.training import checkpoint, verification
from contrastive_jax.training.state import TrainState

distributed.initialize()
workdir, fault = Path(sys.argv[1]), json.loads(sys.argv[2])
verification.RETRY_DELAYS = (0.05, 0.05)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

def state(step, value):
  whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
  make = lambda: (jnp.full((8, 3), value, jnp.float32), jnp.int32(step))
  kernel, number = jax.jit(make, out_shardings=(split, whole))()
  return TrainState(step=number, params={"image": {"kernel": kernel}}, opt_state={})

with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
  for step in (1, 2):
    checkpoints.save(state(step, step / 2), {})
  checkpoints.wait()
call, error, process, times = fault
original, attempts = getattr(ocp, call), []
def failing(path, *arguments):
  result = original(path, *arguments)  # Orbax numbers its operations as they begin, and fails after that.
  attempts.append(path.name)
  if path.name == "2" and attempts.count("2") <= times and jax.process_index() == process:
    raise {"EIO": OSError(errno.EIO, "input/output error"), "ENOENT": FileNotFoundError(errno.ENOENT, "no such file"),
           "damage": ValueError("DATA_LOSS")}[error]
  return result
setattr(ocp, call, failing)
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, 0))
try:
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    restored, _ = checkpoints.restore(abstract)
    print("RESTORED", int(restored.step), attempts.count("2"))
    checkpoints.save(state(9, 9.0), {})
    checkpoints.wait()
except UserError as error:
  print("REFUSED", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
  ("call", "error", "times", "said", "left"),
  [
    ("load_checkpointables", "damage", 99, "RESTORED 1 1", {"1", "2.damaged", "9"}),
    ("load_checkpointables", "EIO", 1, "RESTORED 2 2", {"1", "2", "9"}),
    ("checkpointables_metadata", "ENOENT", 1, "RESTORED 2 2", {"1", "2", "9"}),
    ("checkpointables_metadata", "ENOENT", 99, "RESTORED 1 3", {"1", "2.damaged", "9"}),
    ("load_checkpointables", "EIO", 99, "REFUSED checkpoint 2 cannot be read now", {"1", "2"}),
  ],
)
def test_two_processes_take_the_same_checkpoint(call, error, times, said, left, process, tmp_path):
  fault = json.dumps([call, error, process, times])

  def start_one(**environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **environment}
    command = [sys.executable, "-c", TOGETHER, str(tmp_path), fault]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=runs.ROOT, env={**environment, "PYTHONPATH": "."}, **pipes)

  outputs = [runs.finish(process) for process in runs.start_together(start_one, 2)]
  for output in outputs:
    assert said in output, output
  assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == left


@pytest.mark.parametrize("step", ["2", 2.0, True, [1]])
def test_a_step_that_is_no_whole_number_is_refused_as_such(step, run):
  """True is no step 1, and 2.0 is no folder."""
  unchecked = inspect.unwrap(restore_params)  # Outside of tests nothing compares arguments with their types.
  with pytest.raises(UserError, match="must be a whole number"):
    unchecked(run, step)
