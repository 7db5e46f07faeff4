"""Batches of every kind of stage: packed, native, NaFlex, clips, captions in shared rows; and what a teacher sees."""

import dataclasses

import jax
import numpy as np
import pytest
from toy import ToySource, WordTokenizer

from contrastive_jax.batch import Targets
from contrastive_jax.errors import UserError
from contrastive_jax.models.config import DualEncoderConfig, ImageConfig, TextConfig, TransformerConfig
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess.images import DecodeError, cut, join
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.schedule.segments import Clips, Rows, Segment
from contrastive_jax.schedule.shapes import abstract_batch
from data.extras import ExtrasOptions, TeacherView
from data.pipeline import Pipeline
from data.sources import Example, Text, stable_hash

PATCH = 4


class Shapes:
  """Sample i is a plain picture of brightness i, 8 to 40 pixels a side."""

  name = "shapes"

  def __len__(self):
    return 60

  def __getitem__(self, index):
    height, width = 8 + 8 * (index % 5), 8 + 8 * (index // 5 % 5)
    return Example(np.full((height, width, 3), index + 1, np.uint8), self.text(index), index)

  def text(self, index):
    return Text(("x" * (1 + index % 7),), stable_hash("shapes", index))


class Movie:
  """Frame k of clip i has brightness 10 k + i."""

  count, fps, height, width = 8, 4.0, 12, 12

  def __init__(self, index):
    self.index = index

  def read(self, indices):
    return np.stack([np.full((12, 12, 3), 10 * k + self.index, np.uint8) for k in indices])


class Unreadable(Movie):
  def read(self, indices):
    raise DecodeError("made bad for the test")


class Movies(Shapes):
  name = "movies"

  def __init__(self, bad=()):
    self.bad = bad

  def __len__(self):
    return 9

  def __getitem__(self, index):
    return Example((Unreadable if index in self.bad else Movie)(index), self.text(index), index)


NATIVE = Resolution("native", min_tokens=4, max_tokens=64)
PACKED = Segment(4, 16, (("shapes", 1),), NATIVE, "native", Rows(6, 64), 8, Rows(2, 24), taught=True)
NAFLEX = Segment(6, 16, (("shapes", 1),), Resolution("naflex", lengths=(16, 36)), "naflex")
TURNS = Segment(
  8,
  4,
  (("shapes", 1),),
  Resolution.fixed(8),
  "turns",
  clips=Clips((("movies", 1),), 0.5, Resolution.fixed(8), frames=4, rule="uniform"),
)


def make(*segments, **options):
  options = {"text_length": 8, "patch_size": PATCH, "tubelet": 2, "seed": 3, "threads": 0} | options
  return Pipeline(segments, {"shapes": Shapes(), "movies": Movies()}, WordTokenizer(), **options)


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def brightness(image, pair):
  """Values of the pixels in the patches of a packed pair."""
  row, segment = image.locations[pair]
  return image.patches[row][image.segment_ids[row] == segment]


def test_packed_batches_hold_every_pair_in_its_slot():
  batch = make(PACKED).batch(0)
  assert batch.image.patches.shape == (12, 64, 48) and batch.text.tokens.shape == (4, 24)
  for pair, index in enumerate(batch.ids):
    patches = brightness(batch.image, pair)
    height, width = 8 + 8 * (index % 5), 8 + 8 * (index // 5 % 5)
    assert (patches == index + 1).all()
    assert len(patches) <= min(64, height * width // PATCH**2)
    row, segment = batch.text.locations[pair]
    caption = batch.text.tokens[row][batch.text.segment_ids[row] == segment]
    np.testing.assert_array_equal(caption, [ord("x")] * (1 + index % 7))
  used = sum(len(brightness(batch.image, pair)) for pair in range(16))
  assert used == (batch.image.segment_ids > 0).sum()


def shape_of(batch):
  return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(batch.on_device())]


LENGTHS = Segment(12, 16, (("shapes", 1),), Resolution("naflex", lengths=(4, 9, 16, 25, 36)), "lengths")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", [0, 5, 15, 20])
def test_kinds_of_batches_come_in_the_order_in_which_steps_need_them(start, seed):
  pipeline = make(LENGTHS, PACKED, TURNS, seed=seed)
  needed = []
  for step in range(start, len(pipeline)):
    shape = shape_of(pipeline.batch(step))
    if shape not in needed:
      needed.append(shape)
  transformer = TransformerConfig(width=16, depth=1, heads=1, mlp_dim=16)
  vision = ImageConfig(transformer, image_size=8, patch_size=PATCH, tubelet=2)
  model = DualEncoderConfig(vision, TextConfig(transformer, vocab_size=300, length=8), embed_dim=16)
  mesh = MeshSpec().make(jax.devices()[:1])
  made = [shape_of(abstract_batch(*kind, model, mesh)) for kind in pipeline.kinds(start)]
  assert made == needed and len(made) > 1


def test_what_does_not_fill_a_patch_is_left_out_at_the_right_and_bottom():
  clips = dataclasses.replace(TURNS.clips, resolution=Resolution.fixed(10))
  run = dataclasses.replace(TURNS, resolution=Resolution.fixed(10), clips=clips)
  view = TeacherView(size=10, patch_size=4, tokenizer=WordTokenizer(), text_length=5)
  for step in range(4):
    # Patches of 2 pixels show all 10 of them.
    whole, batch = make(run, patch_size=2).batch(step), make(run, extras=ExtrasOptions(teacher=view)).batch(step)
    seen = join(whole.image.patches, whole.image.coords[0], 2)[:, :, :8, :8]
    tubelet = 2 if seen.shape[1] > 1 else 1
    np.testing.assert_array_equal(batch.image.patches, cut(np.ascontiguousarray(seen), 4, tubelet)[0])
  taught = make(dataclasses.replace(run, taught=True, clips=None), extras=ExtrasOptions(teacher=view)).batch(0)
  np.testing.assert_array_equal(taught.teacher.image.patches, taught.image.patches)


def test_packs_do_not_share_rows():
  batch = make(PACKED).batch(1)
  for locations, rows in ((batch.image.locations, 6), (batch.text.locations, 2)):
    np.testing.assert_array_equal(locations[:, 0] // rows, np.arange(16) // 8)


@pytest.mark.parametrize("segment", [PACKED, NAFLEX, TURNS], ids=lambda segment: segment.name)
def test_hosts_share_the_batch_of_one_host(segment):
  parts = [make(segment, host_index=host, host_count=2) for host in range(2)]
  for step in range(3):
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch(step) for part in parts))
    assert_same(together, make(segment).batch(step))


@pytest.mark.parametrize("options", [{"threads": 2}, {"threads": 1, "workers": 2}], ids=["threads", "workers"])
def test_iterating_from_anywhere_gives_the_batches(options):
  run = (PACKED, TURNS, NAFLEX)
  reader = make(*run)
  for step, batch in make(*run, **options).iterate(2, 14):
    assert_same(batch, reader.batch(step))


def test_a_pack_that_overflows_is_counted():
  small = dataclasses.replace(PACKED, rows=Rows(2, 64))
  run = make(small)
  batch = run.batch(0)
  assert run.shrunk > 0 and (batch.image.segment_ids > 0).sum() <= 4 * 64
  assert all(len(brightness(batch.image, pair)) >= 4 for pair in range(16))


def test_naflex_draws_one_length_a_batch_and_pads_at_the_end():
  run = make(NAFLEX)
  lengths = set()
  for step in range(6):
    batch = run.batch(step)
    lengths.add(batch.image.patches.shape[1])
    assert batch.image.locations is None
    count = batch.image.segment_ids.sum(axis=1)
    np.testing.assert_array_equal(batch.image.segment_ids, np.arange(batch.image.patches.shape[1]) < count[:, None])
  assert lengths == {16, 36}


def test_turns_show_images_or_clips():
  run = make(TURNS)
  for step in range(8):
    batch, modality = run.batch(step), TURNS.modality_at(step)[0]
    if modality == "image":
      assert batch.image.patches.shape == (4, 4, PATCH * PATCH * 3)
      continue
    assert batch.image.patches.shape == (4, 2 * 4, 2 * PATCH * PATCH * 3)
    # The middles of quarters of eight frames, two a tubelet.
    frames = batch.image.patches.reshape(4, 2, 4, 2, -1)[:, :, 0, :, 0].reshape(4, 4).astype(int)
    ids = batch.ids % (1 << 40)
    assert np.isin(np.diff(frames, axis=1), (10, 20, 30)).all()
    np.testing.assert_array_equal((frames - ids[:, None]) % 10, 0)
    np.testing.assert_array_equal(batch.image.coords[0, :, 0], [0, 0, 0, 0, 1, 1, 1, 1])


def test_every_sample_is_drawn_once_an_epoch_across_turns():
  ids = {"image": [], "clip": []}
  run = make(dataclasses.replace(TURNS, steps=60))
  for step in range(60):
    ids[dataclasses.replace(TURNS, steps=60).modality_at(step)[0]].extend(run.ids(step).tolist())
  assert len(set(ids["image"][:60])) == 60
  assert len(set(ids["clip"][:9])) == 9


def test_a_teacher_sees_the_same_pairs_its_own_way():
  view = TeacherView(size=12, patch_size=6, tokenizer=WordTokenizer(), text_length=5)
  batch = make(PACKED, extras=ExtrasOptions(teacher=view)).batch(0)
  assert batch.teacher.image.patches.shape == (16, 4, 6 * 6 * 3)
  np.testing.assert_array_equal(batch.teacher.image.patches[:, 0, 0], batch.ids + 1)
  assert batch.teacher.text.tokens.shape == (16, 5)


def test_targets_are_looked_up_by_sample():
  lookup = lambda ids: Targets(ids[:, None].astype(np.float32))  # noqa: E731
  batch = make(PACKED, extras=ExtrasOptions(targets=lookup)).batch(0)
  np.testing.assert_array_equal(batch.targets.image[:, 0], batch.ids)


@pytest.mark.parametrize(
  ("segment", "message"),
  [
    (dataclasses.replace(TURNS, clips=dataclasses.replace(TURNS.clips, sources=(("film", 1),))), "unknown data source"),
    (dataclasses.replace(TURNS, resolution=Resolution.fixed(3)), "size=3 of stage 'turns' is less than .*patch_size=4"),
  ],
)
def test_impossible_stages_are_refused(segment, message):
  with pytest.raises(UserError, match=message):
    make(segment)


def test_an_image_among_clips_is_refused():
  clips = dataclasses.replace(TURNS.clips, sources=(("shapes", 1),), share=1.0)
  with pytest.raises(UserError, match="video_sources"):
    make(dataclasses.replace(TURNS, clips=clips)).batch(0)


def test_a_clip_that_cannot_be_read_is_replaced():
  clips = dataclasses.replace(TURNS.clips, share=1.0)
  run = Pipeline(
    [dataclasses.replace(TURNS, clips=clips)],
    {"movies": Movies(bad={4}), "shapes": Shapes()},
    WordTokenizer(),
    **{"text_length": 8, "patch_size": PATCH, "tubelet": 2, "seed": 3, "threads": 0},
  )
  ids = np.concatenate([run.batch(step).ids for step in range(4)]) % (1 << 40)
  assert run.substituted > 0 and 4 not in ids


def test_toy_sources_still_work_without_stages():
  assert (
    Pipeline(
      [Segment(1, 4, (("a", 1),), 8)], {"a": ToySource("a", 5)}, WordTokenizer(), text_length=4, patch_size=4, seed=0
    )
    .batch(0)
    .image.segment_ids
    is None
  )
