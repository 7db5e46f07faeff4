"""A batch that a host cannot hold is refused from its shapes, with a number of pairs that would do."""

import dataclasses
import re

import jax
import pytest

from configs import emoji
from contrastive_jax.errors import UserError
from contrastive_jax.objectives import make_objective
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.segments import Rows, Segment
from contrastive_jax.training import host_memory
from contrastive_jax.training.host_memory import Limit
from contrastive_jax.training.run import Run, check_pairs
from tests import tiny

MESH = MeshSpec().make(jax.devices()[:1])
GIB = 2**30


def segment(**options):
  fixed = {"steps": 5, "batch_size": 64, "sources": (("noto", 1.0),), "resolution": 32, **options}
  return Segment(**fixed)


def written_out(pairs, rows, length, patch_dim, *, packed=False, clips=1, text=8):
  """Bytes of patches, coordinates, segments and places of images; of tokens and masks of captions, and of keys."""
  image = rows * length * (patch_dim * clips + 3 * 2 + (2 if packed else 0)) + (8 * pairs if packed else 0)
  return image + pairs * (text * 4 + text + 16)


MODEL = Run.from_config(tiny.get_config()).model


@pytest.mark.parametrize(
  ("made", "expected"),
  [
    (segment(), written_out(64, 64, 4, 768)),
    (segment(batch_size=5_000_000), written_out(5_000_000, 5_000_000, 4, 768)),
    (segment(resolution=64), written_out(64, 64, 16, 768)),
    (
      segment(resolution=Resolution("native", max_tokens=16), rows=Rows(3, 32), pack_pairs=8),
      written_out(64, 8 * 3, 32, 768, packed=True),
    ),
  ],
)
def test_bytes_of_a_batch(made, expected):
  assert host_memory.batch_bytes(made, MODEL, MESH) == expected


def test_the_largest_kind_of_batch_counts():
  lengths = Resolution("naflex", lengths=(4, 9, 16))
  made, longest = segment(resolution=lengths), segment(resolution=Resolution("naflex", lengths=(16,)))
  assert host_memory.batch_bytes(made, MODEL, MESH) == host_memory.batch_bytes(longest, MODEL, MESH)


@pytest.mark.parametrize("pairs", [5_000_000, 50_000_000, 2**31 - 1])
def test_what_cannot_be_held_is_one_sentence_and_what_it_advises_fits(pairs):
  limit = Limit(19 * GIB, "this machine")
  config = tiny.get_config()
  config.batch_size = pairs
  with pytest.raises(UserError, match=rf"batch_size={pairs} needs [\d,.]+ GiB of memory .* has 19\.0 GiB") as refused:
    host_memory.check_host_memory(Run.from_config(config).segments, MODEL, MESH, limit=limit)
  config.batch_size = int(re.search(r"at most about (\d+) pairs", str(refused.value))[1])
  host_memory.check_host_memory(Run.from_config(config).segments, MODEL, MESH, limit=limit)


def test_stages_are_named_and_hosts_share(monkeypatch):
  stages = segment(name="small"), segment(name="large", batch_size=1_000_000)
  needed = host_memory.COPIES * host_memory.batch_bytes(stages[1], MODEL, MESH)
  with pytest.raises(UserError, match="of stage 'large'"):
    host_memory.check_host_memory(stages, MODEL, MESH, limit=Limit(needed - 1, "this machine"))
  monkeypatch.setattr(host_memory, "host_share", lambda mesh: (0, 4))
  host_memory.check_host_memory(stages, MODEL, MESH, limit=Limit(needed // 4, "this machine"))
  with pytest.raises(UserError, match="of each of 4 hosts"):
    host_memory.check_host_memory(stages, MODEL, MESH, limit=Limit(needed // 4 - 1, "this machine"))


def test_shipped_batches_can_be_held_by_a_host_of_a_pod():
  config = emoji.get_config()
  Run.from_config(config).check_host_memory(MESH)


def test_the_machine_has_what_it_says():
  with open("/proc/meminfo") as file:
    total = int(file.readline().split()[1]) * 1024
  assert 0 < host_memory.memory_limit().size <= total


@pytest.mark.parametrize(
  ("files", "limit"),
  [
    ({"sys/fs/cgroup/memory.max": "max\n"}, None),
    ({"sys/fs/cgroup/memory.max": "1048576\n"}, 2**20),
    ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "2097152\n"}, 2**21),
    ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "4096", "sys/fs/cgroup/a/b/memory.max": ""}, 4096),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "", "sys/fs/cgroup/a/b/memory.max": "8192"}, 8192),
    ({"proc/self/cgroup": "9:memory:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "16384"}, 16384),
    ({"proc/self/cgroup": "9:cpu:/x\n", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "16384"}, None),
    ({"sys/fs/cgroup/memory.max": "nonsense"}, None),
  ],
)  # fmt: skip
def test_control_groups_limit_memory(files, limit, tmp_path):
  for name, content in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
  found = host_memory.memory_limit(tmp_path)
  plain = host_memory.memory_limit(tmp_path / "nothing")
  assert found.size == (limit or plain.size)
  assert ("control group" in found.of) == bool(limit)


@pytest.mark.parametrize(
  "terms",
  [{"softmax": 1.0}, {"individual_temperatures": 1.0}, {"barlip": 1.0}, {"sigmoid": 1.0, "distill_similarity": 0.5}],
)
def test_one_pair_has_nothing_to_be_compared_with(terms):
  made = segment(batch_size=1)
  with pytest.raises(UserError, match="batch_size=1 leaves nothing to compare a pair with"):
    check_pairs((segment(), made), make_objective(terms, {}))
  check_pairs((segment(), dataclasses.replace(made, batch_size=2)), make_objective(terms, {}))
  check_pairs((made,), make_objective({"sigmoid": 1.0}, {}))
  config = tiny.get_config()
  config.batch_size = 1
  with pytest.raises(UserError, match="use at least 2"):
    Run.from_config(config)
