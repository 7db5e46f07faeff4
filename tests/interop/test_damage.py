"""Damaged and foreign files of importers: the same model, or one sentence; never a traceback, never another model.

DAMAGE_CASES=400 python -m pytest tests/interop/test_damage.py    # 9,600 damaged files instead of 576
"""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from tests.interop.checkpoints import read


def one_sentence(error: UserError) -> bool:
  text = str(error)
  return bool(text) and "\n" not in text and "Traceback" not in text and len(text) < 2500


def cut(content: bytes, rng: np.random.Generator) -> bytes:
  return content[: int(rng.integers(0, len(content)))]


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
  damaged = bytearray(content)
  # Beginnings hold what the rest is read by.
  end = len(content) if rng.random() < 0.3 else min(len(content), 600)
  damaged[int(rng.integers(0, end))] ^= 1 << int(rng.integers(0, 8))
  return bytes(damaged)


# Of each kind of damage, for each family.
CASES = int(os.environ.get("DAMAGE_CASES", "24"))
FAMILIES = ("clip", "siglip", "siglip2", "open_clip", "big_vision", "bert", "pieces", "merges")
ODD_VALUES = (None, "x", -1, 0, 1.5, [], {}, True, [1, 2], {"a": 1}, 10**12, "nan")


def rewritten(content: bytes, rng: np.random.Generator) -> bytes:
  """JSON with one name removed or misspelt, or one value of another type."""
  try:
    tree = json.loads(content)
  except ValueError:
    return flipped(content, rng)
  places = []

  def walk(node):
    if isinstance(node, dict):
      places.extend((node, name) for name in list(node)[:40])
    if isinstance(node, dict | list):
      for child in list(node.values() if isinstance(node, dict) else node)[:40]:
        walk(child)

  walk(tree)
  if not places:
    return content
  node, name = places[int(rng.integers(len(places)))]
  match int(rng.integers(3)):
    case 0:
      del node[name]
    case 1:
      node[f"{name}x"] = node.pop(name)
    case 2:
      node[name] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
  return json.dumps(tree).encode()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("damage", [cut, flipped, rewritten], ids=lambda damage: damage.__name__)
def test_damage_is_one_sentence_or_the_same_shapes(family, damage, sources, tmp_path):
  rng = np.random.default_rng([len(family), len(damage.__name__)])
  folder = tmp_path / family
  shutil.copytree(sources[family], folder)
  files = sorted(path for path in folder.rglob("*.*") if damage is not rewritten or path.suffix == ".json")
  whole = read(family, sources[family])
  shapes = jax.tree.map(np.shape, whole.params)
  refused = 0
  for case in range(CASES):
    path = files[case % len(files)]
    content = path.read_bytes()
    path.write_bytes(damage(content, rng))
    try:
      found = read(family, folder)
      assert jax.tree.map(np.shape, found.params) == shapes or found.config != whole.config
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
    except UserError as error:
      assert one_sentence(error), error
      refused += 1
    path.write_bytes(content)
  assert refused > CASES / 3
