"""Reading a checkpoint so that nothing that differs from what was written goes unnoticed, by all processes alike."""

import errno
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from contrastive_jax import runs
from contrastive_jax.bad_records import RETRY_DELAYS
from contrastive_jax.errors import UserError
from contrastive_jax.parallel import distributed

log = logging.getLogger(__name__)

# Errors of the file system that say that a file is not what was written. Any other may be gone at the next attempt.
_WRONG_FILES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EOVERFLOW}


class Damaged(Exception):
  """A fault of a checkpoint, said as the end of a sentence."""


def _is_transient(error: BaseException | None) -> bool:
  """Says whether an error is one of the file system, the network or a lock, and not of the content of a file.

  TensorStore raises a ValueError that quotes the number of such an error, or the status of a remote store.
  """
  while error is not None:
    said = str(error)
    number = error.errno if isinstance(error, OSError) else None
    quoted = re.search(r"OS error (\d+)", said)
    if quoted and not isinstance(error, OSError):
      number = int(quoted[1])
    if number is not None or isinstance(error, OSError):
      return number not in _WRONG_FILES
    if re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b", said):
      return True
    error = error.__cause__ or error.__context__
  return False


def _together(read: Callable[[], Any], step: int) -> Any:
  """Returns what each process reads, or raises on all of them when one cannot: none goes on alone.

  Args:
    read: a function that reads this process' part of a checkpoint and waits for no other process.
    step: step of the checkpoint.

  Raises:
    Damaged: if what a process read is not what was written.
    UserError: if a process cannot read its part, after several attempts of all.
  """
  several = distributed.is_several()
  for delay in (*RETRY_DELAYS, None):
    result, damage, trouble = None, "", ""
    try:
      result = read()
    except (jax.errors.JaxRuntimeError, UserError, MemoryError):
      raise  # An accelerator without memory damages nothing.
    except Exception as error:  # Orbax, TensorStore, JSON and the file system each have their own.
      said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
      # What other processes can see may come to this one later, on a file system that they share.
      missing = several and delay is not None and isinstance(error, FileNotFoundError)
      damage, trouble = ("", said) if _is_transient(error) or missing else (said, "")
    damaged, troubled = distributed.any_of(bool(damage), bool(trouble)) if several else (bool(damage), bool(trouble))
    if not troubled:
      break
    if delay is None:
      raise UserError(
        f"checkpoint {step} cannot be read now ({trouble or 'another process says so'}) and is left as it is: mend that"
        " and run the same command again"
      )
    log.warning("Checkpoint %d cannot be read (%s); trying again.", step, trouble or "on another process")
    time.sleep(delay)
  if damaged:
    raise Damaged(damage or "another process cannot read its part")
  return result


@jax.jit
def _sums(tree: Any) -> Any:
  """Computes for each leaf the sum of its bits and whether it is finite; compiled once for trees of the same shapes."""

  def add(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    width = jnp.dtype(leaf.dtype).itemsize
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(width, 4)}"))
    finite = jnp.all(jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else True
    return jnp.stack([jnp.sum(bits.astype(jnp.uint32)), jnp.asarray(finite, jnp.uint32)])

  return jax.tree.map(add, tree)


def checksum(state: Any) -> tuple[dict[str, int], list[str]]:
  """Computes a number for each leaf, and the names of the leaves that are not finite, in one pass.

  The number changes with any of its bits but not with how the leaf is sharded.

  The sum of the bits, read as unsigned integers modulo 2^32. Integer addition is associative, so every mesh agrees.
  """
  paths = jax.tree_util.tree_leaves_with_path(jax.device_get(_sums(state)))
  named = {jax.tree_util.keystr(path): value for path, value in paths}
  return {name: int(value[0]) for name, value in named.items()}, [name for name in named if not named[name][1]]


def plain_name(name: str) -> str:
  """Returns `opt_state/1/count` of `['opt_state'][1].count`: named tuples are read back as dictionaries."""
  return "/".join(re.findall(r"[^\[\]'.]+", name))


def _alone() -> ocp.Context:
  """Makes the context of a process that reads by itself.

  Orbax would have each process wait for the others, of which one may have found an error.
  """
  context = ocp.Context()
  context.multiprocessing.primary_host = jax.process_index()
  context.multiprocessing.active_processes = {jax.process_index()}
  return context


def verified(directory: Path, step: int, choose: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
  """Reads leaves of a checkpoint and compares each with its checksum; all processes together, with the same outcome.

  Args:
    directory: the directory of the checkpoints.
    step: step of the checkpoint.
    choose: a function from the tree that the checkpoint describes to the tree that is read, with placeholders for the
      rest.

  Returns:
    The tree that was read, and its metadata: what it holds beside the arrays.

  Raises:
    Damaged: if anything of it cannot be read, or was not written so.
    UserError: if it cannot be read now, for a reason that is not in it.
  """
  path = directory / str(step)

  def describe() -> tuple[dict[str, Any], Any]:
    with _alone():
      described = ocp.checkpointables_metadata(path)
    return dict(described.custom_metadata), choose(described.metadata["state"])

  def load() -> Any:
    with _alone():
      return ocp.load_checkpointables(path, {"state": wanted})["state"]

  metadata, wanted = _together(describe, step)
  restored = _together(load, step)
  expected, written = metadata.pop("checksum", None), metadata.pop("digest", None)
  if not isinstance(expected, dict):
    raise Damaged("its metadata holds no checksums")
  if written is not None and runs.digest([expected, metadata]) != written:
    raise Damaged("its metadata is not what was written")
  expected = {plain_name(name): value for name, value in expected.items()}
  read, left_out = {}, set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
    name = plain_name(jax.tree_util.keystr(path))
    if leaf is ocp.PLACEHOLDER:
      left_out.add(name)
    else:
      read[name] = leaf
  found, not_finite = checksum(read)
  found = {plain_name(name): value for name, value in found.items()}
  wrong = [name for name in sorted({*expected, *found} - left_out) if found.get(name) != expected.get(name)]
  if wrong:
    more = f" and those of {len(wrong) - 1} more leaves differ" if len(wrong) > 1 else " differs"
    raise Damaged(f"the checksum of {wrong[0]}{more}")
  if not_finite:
    raise Damaged(f"{plain_name(not_finite[0])} is not finite, nor are {len(not_finite) - 1} more leaves")
  return restored, metadata
