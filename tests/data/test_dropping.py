"""Dropped patches: which of them a batch holds, in every kind of stage."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from configs import common
from contrastive_jax.batch import ImageBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import flops
from contrastive_jax.models.config import DualEncoderConfig, ImageConfig, TextConfig, TransformerConfig
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.planning.compiling import choose_batch
from contrastive_jax.preprocess.dropping import kept, kept_count
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.extras import Extras
from contrastive_jax.schedule.segments import Clips, Rows, Segment
from contrastive_jax.schedule.shapes import abstract_batch
from contrastive_jax.training.run import Run
from data.extras import ExtrasOptions, TeacherView
from data.pipeline import Pipeline
from data.seen import pixels_of
from data.sources import Example, Text
from tests import tiny
from tests.data.toy import WordTokenizer

PATCH, SHARE = 2, 0.4


class Numbered:
  """Pictures of 6 to 12 pixels a side in which no two patches are alike."""

  name = "numbered"

  def __len__(self):
    return 40

  def __getitem__(self, index):
    shape = 6 + 2 * (index % 4), 6 + 2 * (index // 4 % 4), 3
    return Example(np.random.default_rng(index).integers(0, 256, shape, np.uint8), self.text(index), index)

  def text(self, index):
    return Text((f"picture {index}",), index)


class Moving(Numbered):
  name = "moving"

  def __getitem__(self, index):
    return Example(_Clip(index), self.text(index), index)


class _Clip:
  count, fps, height, width = 8, 4.0, 8, 8

  def __init__(self, index):
    self.index = index

  def read(self, indices):
    return np.random.default_rng(self.index).integers(0, 256, (8, 8, 8, 3), np.uint8)[list(indices)]


SOURCES = (("numbered", 1),)
CLIPS = Clips((("moving", 1),), 0.5, Resolution("native", max_tokens=32), frames=4, rows=Rows(4, 40))
SEGMENTS = {
  "fixed": Segment(6, 8, SOURCES, 10, captions_per_image=2),
  "native": Segment(6, 8, SOURCES, Resolution("native", min_tokens=4, max_tokens=36)),
  "packed": Segment(
    6, 8, SOURCES, Resolution("native", min_tokens=4, max_tokens=36), rows=Rows(4, 40), pack_pairs=4, clips=CLIPS
  ),
  "naflex": Segment(6, 8, SOURCES, Resolution("naflex", lengths=(9, 25))),
}


def pipeline(segment, share=0.0, **options):
  how = {"text_length": 16, "patch_size": PATCH, "tubelet": 2, "seed": 3, "threads": 0, **options}
  segment = dataclasses.replace(segment, drop_patches=share)
  return Pipeline([segment], {"numbered": Numbered(), "moving": Moving()}, WordTokenizer(), **how)


def parts(image: ImageBatch, pair: int):
  """The patches, coordinates and grids of one pair."""
  row, number = (pair, 1) if image.locations is None else image.locations[pair]
  mine = slice(None) if image.segment_ids is None else image.segment_ids[row] == number
  return tuple(leaf[row][mine] for leaf in (image.patches, image.coords, image.grids) if leaf is not None)


@pytest.mark.parametrize("kind", SEGMENTS)
def test_a_batch_holds_some_patches_of_each_image_in_their_order(kind):
  whole, some = pipeline(SEGMENTS[kind]), pipeline(SEGMENTS[kind], SHARE)
  chosen = set()
  for step in range(6):
    before, after = whole.batch(step), some.batch(step)
    all_of, left = before.image, after.image
    assert all_of.grids is None
    # What is beside the images stays as it is.
    for field in ("text", "keys", "ids"):
      jax.tree.map(np.testing.assert_array_equal, getattr(before, field), getattr(after, field))
    for pair in range(8):
      (patches, coords), (kept_patches, kept_coords, grids) = parts(all_of, pair), parts(left, pair)
      places = [tuple(place) for place in coords.tolist()]
      numbers = [places.index(tuple(place)) for place in kept_coords.tolist()]
      assert numbers == sorted(set(numbers)) and len(numbers) == max(1, round((1 - SHARE) * len(places)))
      np.testing.assert_array_equal(kept_patches, patches[numbers])
      np.testing.assert_array_equal(grids, np.broadcast_to(coords.max(axis=0) + 1, grids.shape))
      chosen.add(tuple(numbers))
  # Also the two views of one image drop patches of their own.
  assert len(chosen) > 30
  if kind == "fixed":
    assert left.segment_ids is None and left.patches.shape[1] == kept_count(25, SHARE) == 15


@pytest.mark.parametrize("kind", ["fixed", "packed", "naflex"])
def test_hosts_and_workers_share_the_batch_of_one_host(kind):
  whole = pipeline(SEGMENTS[kind], SHARE)
  hosts = [pipeline(SEGMENTS[kind], SHARE, host_index=k, host_count=2) for k in range(2)]
  for step in range(3):
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *(host.batch(step) for host in hosts))
    jax.tree.map(np.testing.assert_array_equal, together, whole.batch(step))
  for step, batch in pipeline(SEGMENTS[kind], SHARE, threads=2).iterate(2, 5):
    jax.tree.map(np.testing.assert_array_equal, batch, whole.batch(step))


@pytest.mark.parametrize("kind", SEGMENTS)
def test_shapes_are_known_before_any_batch_is_read(kind):
  reader = pipeline(SEGMENTS[kind], SHARE)
  transformer = TransformerConfig(width=16, depth=1, heads=1, mlp_dim=16)
  vision = ImageConfig(transformer, image_size=10, patch_size=PATCH, tubelet=2)
  model = DualEncoderConfig(vision, TextConfig(transformer, vocab_size=300, length=16), embed_dim=16)
  mesh = MeshSpec().make(jax.devices()[:1])
  met = {str(shapes_of(reader.batch(step))) for step in range(6)}
  assert met == {str(shapes_of(abstract_batch(*each, model, mesh))) for each in reader.kinds(0)}


def shapes_of(batch):
  return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch.on_device())]


def test_what_is_dropped_costs_nothing():
  config = tiny.get_config()
  whole = Run.from_config(config)
  config.data.drop_patches = 0.75
  # Of the four patches of a picture of 32 pixels one is left.
  run, smaller = Run.from_config(config), dataclasses.replace(whole.model.image, image_size=16)
  expected = flops.forward_flops_per_pair(dataclasses.replace(whole.model, image=smaller))
  assert run.loop_options().flops_per_pair == 3 * expected
  _, batch, forward = choose_batch(run, None, run.make_mesh(jax.devices()[:1]))
  assert batch.image.patches.shape[:2] == (32, 1) and forward == 32 * expected


def test_stages_drop_shares_of_their_own_and_terms_that_need_all_patches_say_so():
  config = tiny.get_config()
  config.data.drop_patches = 0.5
  config.curriculum = tuple(
    common.stage(name, steps, drop_patches=share)
    for name, steps, share in (("run", 10, None), ("own", 10, 0.75), ("none", 20, 0.0))
  )
  assert [segment.drop_patches for segment in Run.from_config(config).segments] == [0.5, 0.75, 0.0]
  config.objective = {"sigmoid": 1.0, "rotation": 0.1}
  with pytest.raises(UserError, match=r"stage 'run' drops patches \(drop_patches=0.5\), and rotation needs all"):
    Run.from_config(config)
  config.objective = {"sigmoid": 1.0}
  config.curriculum[1].drop_patches = 1.0
  with pytest.raises(UserError, match=r"curriculum\.1\.drop_patches=1.0 must be"):
    Run.from_config(config)
  # Rows need room for what is left of the largest image.
  native = {"mode": "native", "max_tokens": 64, "rows": 2, "row_length": 24}
  config.data.pack_pairs, config.curriculum = 8, (common.stage("packed", 0, drop_patches=0.7, **native),)
  config.model.image.class_token = False
  Run.from_config(config)
  config.curriculum[0].drop_patches = 0.6
  with pytest.raises(UserError, match=r"max_tokens=64, of which drop_patches=0.6 leaves 26, more than its row_length"):
    Run.from_config(config)


def test_every_set_of_patches_is_as_likely_as_any_other(rng):
  found = kept(rng.random((30_000, 8)), 5, 0.4)
  sets, counts = np.unique(found, axis=0, return_counts=True)
  assert [tuple(one) for one in sets] == list(itertools.combinations(range(5), 3))
  # Pearson's statistic with 9 degrees of freedom is above 27.9 once in a thousand times.
  assert np.sum((counts - 3000) ** 2 / 3000) < 27.9


def test_packs_have_room_for_more_images():
  """Rows that hold half of the patches shrink no image when half of them are dropped."""
  native = Resolution("native", min_tokens=4, max_tokens=36)
  small = Segment(6, 8, SOURCES, native, rows=Rows(2, 44), pack_pairs=4)
  whole, some = pipeline(small), pipeline(small, 0.5)
  for step in range(6):
    whole.batch(step), some.batch(step)
  assert whole.shrunk > some.shrunk == 0


def test_strong_views_keep_the_patches_of_the_image_and_a_teacher_sees_all():
  segment = dataclasses.replace(SEGMENTS["fixed"], taught=True)
  extras = ExtrasOptions(Extras(strong_images=2), teacher=TeacherView(10, PATCH))
  whole, some = (pipeline(segment, share, extras=extras).batch(1) for share in (0.0, SHARE))
  numbers = some.image.coords[..., 1] * 5 + some.image.coords[..., 2]
  expected = np.take_along_axis(whole.strong.patches, numbers[:, None, :, None], 2)
  np.testing.assert_array_equal(some.strong.patches, expected)
  jax.tree.map(np.testing.assert_array_equal, some.teacher, whole.teacher)


@pytest.mark.parametrize("kind", ["fixed", "packed"])
def test_dropped_patches_are_grey_where_people_look(kind):
  # The sixth step shows clips where there are any.
  whole, some = (pipeline(SEGMENTS[kind], share).batch(5).image for share in (0.0, SHARE))
  for pair in range(8):
    expected, shown = pixels_of(whole, pair, PATCH), pixels_of(some, pair, PATCH)
    grey = (shown == 128).all(axis=-1)
    np.testing.assert_array_equal(shown[~grey], expected[~grey])
    assert 0.3 < grey.mean() < 0.5
