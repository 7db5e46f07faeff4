"""Checks that a host can hold the batches of a run, from their shapes alone, before anything is read or compiled."""

import contextlib
import math
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from contrastive_jax.errors import UserError
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import host_share
from contrastive_jax.schedule.extras import NO_EXTRAS, Extras
from contrastive_jax.schedule.segments import Segment
from contrastive_jax.schedule.shapes import abstract_batches

# A batch is put together out of the parts that threads or workers read, and both exist for a moment.
COPIES = 2


class Limit(NamedTuple):
  """A number of bytes of host memory, and the name of what sets the limit."""

  size: int
  of: str


def memory_limit(root: Path = Path("/")) -> Limit:
  """Returns the memory that this process may use: the machine's, or less where a cgroup or `ulimit` says so.

  Args:
    root: the folder in which `proc` and `sys` are found.
  """
  limits = [Limit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine")]
  for file in _cgroup_files(root):
    with contextlib.suppress(OSError, ValueError):  # The file may be absent, or say "max".
      limits.append(Limit(int(file.read_text()), f"the control group of this process ({file})"))
  for kind, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
    soft, _ = resource.getrlimit(kind)
    if soft != resource.RLIM_INFINITY:
      limits.append(Limit(soft, f"this process ({name})"))
  return min(limit for limit in limits if limit.size > 0)


def _cgroup_files(root: Path) -> list[Path]:
  """Lists files that may limit the memory of this process: of its control group and all above, in both versions."""
  files = [root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory/memory.limit_in_bytes"]
  with contextlib.suppress(OSError):
    for line in (root / "proc/self/cgroup").read_text().splitlines():
      _, controllers, path = line.split(":", 2)
      if controllers not in ("", "memory") and "memory" not in controllers.split(","):
        continue
      top, name = ("sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("sys/fs/cgroup", "memory.max")
      group = Path(path.lstrip("/"))
      files += [root / top / above / name for above in (group, *group.parents)]
  return list(dict.fromkeys(files))


def batch_bytes(segment: Segment, model: DualEncoderConfig, mesh: Mesh, extras: Extras = NO_EXTRAS) -> int:
  """Returns the bytes of the largest batch of a segment, over all hosts."""
  kinds = abstract_batches(segment, model, mesh, extras)
  return max(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) for batch in kinds)


def check_host_memory(
  segments: Sequence[Segment],
  model: DualEncoderConfig,
  mesh: Mesh,
  extras: Extras = NO_EXTRAS,
  *,
  limit: Limit | None = None,
) -> None:
  """Compares the batches of a run with the memory of this host.

  Args:
    segments: the segments of the run.
    model: the sizes of the towers, and so those of patches and captions.
    mesh: the mesh that batches are placed on; each host reads its share.
    extras: what the batches bring beside images, captions and keys.
    limit: memory of this host; None asks the machine.

  Raises:
    UserError: for a batch of which this host cannot hold its share.
  """
  size, of = memory_limit() if limit is None else limit
  hosts = host_share(mesh)[1]
  for segment in segments:
    needed = COPIES * batch_bytes(segment, model, mesh, extras) // hosts
    if needed > size:
      stage = f" of stage '{segment.name}'" if segment.name else ""
      share = f" of each of {hosts} hosts" if hosts > 1 else ""
      fits = segment.batch_size * size // needed
      raise UserError(
        f"batch_size={segment.batch_size}{stage} needs {_gib(needed)} of memory{share} for the images and captions of a"
        f" step, and {of} has {_gib(size)}: use at most about {_rounded(fits)} pairs"
      )


def _gib(size: int) -> str:
  return f"{size / 2**30:,.1f} GiB"


def _rounded(pairs: int) -> int:
  """Returns the largest power of two that is not above a number of pairs, and at least 1."""
  return 1 << max(pairs.bit_length() - 1, 0)
