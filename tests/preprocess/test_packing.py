"""Plans hold what they promise, brute force finds nothing better, and what was packed can be read back."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive_jax.errors import UserError
from contrastive_jax.preprocess import packing
from contrastive_jax.preprocess.native import patchify_clip
from contrastive_jax.preprocess.rows import fill_rows, search_rows

IMAGE = st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5))
GRID = st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6))


def spans(packed):
  """(row, start, end) of each item."""
  return [
    (int(r), int(s), int(s + n)) for (r, _), s, n in zip(packed.locations, packed.starts, packed.sizes, strict=True)
  ]


def check_rows(packed):
  """Every item once, inside its row, without overlaps or gaps, segments numbered along the row."""
  segment_ids = packed.segment_ids()
  taken = np.zeros((packed.rows, packed.length), int)
  for (row, start, end), (_, segment) in zip(spans(packed), packed.locations, strict=True):
    assert 0 <= start < end <= packed.length
    taken[row, start:end] += 1
    assert (segment_ids[row, start:end] == segment).all()
  assert (taken <= 1).all() and ((taken == 1) == (segment_ids > 0)).all()
  for row in range(packed.rows):
    used = segment_ids[row][segment_ids[row] > 0]
    assert (segment_ids[row][: len(used)] > 0).all() and (np.diff(used) >= 0).all()
    mine = packed.locations[packed.locations[:, 0] == row, 1]
    np.testing.assert_array_equal(mine, np.arange(len(mine)) + 1)


def exists_packing(sizes, rows, length):
  """Whether some assignment fits, by trying all."""
  for assignment in itertools.product(range(rows), repeat=len(sizes)):
    if (np.bincount(assignment, weights=sizes, minlength=rows) <= length).all():
      return True
  return False


@given(st.lists(GRID, min_size=1, max_size=20), st.integers(1, 5), st.integers(20, 80))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_plan_is_valid_and_repeatable(grids, rows, length):
  grids = np.array(grids)
  try:
    packed = packing.pack_grids(grids, rows=rows, length=length)
  except UserError:
    assert len(grids) * 2 > rows * length / 2  # Only a crowd does not fit at one or two tokens each.
    return
  check_rows(packed)
  np.testing.assert_array_equal(packed.sizes, packed.grids.prod(axis=1))
  assert (packed.grids <= grids).all() and (packed.grids >= 1).all() and (packed.grids[:, 0] == grids[:, 0]).all()
  changed = (packed.grids != grids).any(axis=1)
  assert packed.shrunk == changed.sum() and packed.dropped == grids.prod(axis=1).sum() - packed.sizes.sum()
  assert (packed.factors[~changed] == 1).all() and (packed.factors[changed] < 1).all()
  again = packing.pack_grids(grids, rows=rows, length=length)
  np.testing.assert_array_equal(packed.locations, again.locations)
  np.testing.assert_array_equal(packed.grids, again.grids)
  # Who was shrunk was among the largest: before its last line it was as large as any that was left alone.
  if changed.any() and (~changed).any():
    assert grids.prod(axis=1)[changed].min() >= packed.sizes[~changed].max()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3), st.integers(30, 60))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_are_found_where_brute_force_finds_them(sizes, rows, length):
  row_of = fill_rows(sizes, rows, length)
  if row_of is not None:
    assert (np.bincount(row_of, weights=sizes, minlength=rows) <= length).all()
  elif rows < 3:  # With one or two rows the method is exact.
    assert not exists_packing(sizes, rows, length)


def least_size(grid, least):
  """Tokens of the smallest part of a grid that still has enough; its own size where it has too few itself."""
  t, y, x = grid
  parts = (t * a * b for a in range(1, y + 1) for b in range(1, x + 1))
  return min((size for size in parts if size >= least), default=t * y * x)


SMALL = [(1, 1, 1), (1, 1, 3), (1, 2, 2), (1, 2, 3), (1, 3, 3), (1, 5, 1), (1, 2, 5), (2, 2, 2), (2, 1, 3), (3, 2, 3)]


@pytest.mark.parametrize(
  ("least", "most"),
  [
    (3, 2),
    pytest.param(5, 2, marks=(pytest.mark.slow, pytest.mark.extra)),
    *(pytest.param(least, 3, marks=pytest.mark.slow) for least in (1, 2, 3)),
    *(pytest.param(least, 3, marks=(pytest.mark.slow, pytest.mark.extra)) for least in (4, 5, 7)),
  ],
)
def test_a_pack_is_refused_only_where_no_way_to_shrink_and_lay_it_fits(least, most):
  """Of all small packs: with every image as small as it may be, some assignment to rows fits or none does."""
  refused = 0
  for count in range(1, most + 1):
    for grids in itertools.combinations_with_replacement(SMALL, count):
      sizes = [least_size(grid, least) for grid in grids]
      for rows, length in itertools.product((1, 2, 3), (2, 3, 5, 8)):
        possible = exists_packing(sizes, rows, length)
        try:
          packed = packing.pack_grids(np.array(grids), rows=rows, length=length, min_tokens=least)
        except UserError:
          assert not possible, (grids, rows, length)
          refused += 1
          continue
        assert possible and (np.bincount(packed.locations[:, 0], weights=packed.sizes) <= length).all()
        assert (packed.grids <= np.array(grids)).all()
        assert (packed.sizes >= np.minimum(np.prod(grids, axis=1), least)).all()
  assert refused


@pytest.mark.parametrize(
  ("grids", "rows", "length", "least", "expected"),
  [
    ([(1, 2, 3)], 1, 3, 3, [(1, 1, 3)]),
    ([(1, 3, 3)], 1, 4, 4, [(1, 2, 2)]),
    ([(1, 3, 3)], 1, 3, 3, [(1, 1, 3)]),
    ([(1, 4, 4)], 1, 5, 4, [(1, 2, 2)]),
    ([(2, 2, 3)], 1, 6, 5, [(2, 1, 3)]),
    ([(1, 2, 3), (1, 2, 3)], 2, 3, 3, [(1, 1, 3), (1, 1, 3)]),
  ],
)
def test_an_image_shrinks_down_to_the_least_size(grids, rows, length, least, expected):
  packed = packing.pack_grids(np.array(grids), rows=rows, length=length, min_tokens=least)
  assert [tuple(grid) for grid in packed.grids.tolist()] == expected


@given(st.lists(st.integers(1, 12), min_size=3, max_size=8), st.integers(3, 4), st.integers(12, 20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_trying_all_ways_finds_what_brute_force_finds(sizes, rows, length):
  row_of = search_rows(sizes, rows, length)
  assert (row_of is not None) == exists_packing(sizes, rows, length)
  if row_of is not None:
    assert (np.bincount(row_of, weights=sizes, minlength=rows) <= length).all()


def alone(grid):
  """What an image goes through as ever less room is left for it, itself first."""
  found = [tuple(grid)]
  for length in range(int(np.prod(grid)) - 1, 0, -1):
    got = tuple(packing.pack_grids(np.array([grid]), rows=1, length=length).grids[0].tolist())
    found += [got] if got != found[-1] else []
  return found


@pytest.mark.parametrize("grid", [(1, 6, 6), (1, 9, 4), (1, 3, 20), (1, 1, 7), (2, 5, 3)])
def test_shrinking_keeps_the_shape(grid):
  steps = alone(grid) if grid[0] == 1 else [grid]
  for before, after in itertools.pairwise(steps):
    assert sorted(np.subtract(before, after)) == [0, 0, 1]
    _, y, x = after
    assert abs(y / grid[1] - x / grid[2]) <= 1 / min(grid[1:]) + 1e-9
  if grid[0] == 1:
    assert steps[-1] == (1, 1, 1)


@given(
  st.lists(st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5), st.integers(5, 60)
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_overflow_shrinks_no_more_than_the_best_common_cap(grids, length):
  packed = packing.pack_grids(np.array(grids), rows=1, length=length)
  sizes = [[int(np.prod(step)) for step in alone(grid)] for grid in grids]
  caps = [[max(n for n in each if n <= cap) for each in sizes] for cap in range(1, 26)]
  best = max((capped for capped in caps if sum(capped) <= length), key=sum)
  assert (packed.sizes >= best).all() and packed.sizes.sum() <= length
  # The image that gave way last was the largest, and with its last line they would not fit.
  before = [each[each.index(n) - 1] if n < each[0] else np.inf for each, n in zip(sizes, packed.sizes, strict=True)]
  if packed.shrunk:
    assert min(before) >= packed.sizes.max()
    last = [b - n for b, n in zip(before, packed.sizes, strict=True) if b == min(before)]
    assert packed.sizes.sum() + max(last) > length


def test_an_overflow_of_rows_takes_a_line_only():
  # Rows of 10 hold 9 and 1, not 9 and 2: a single line makes room.
  packed = packing.pack_grids(np.array([(1, 3, 3), (1, 3, 3), (1, 1, 2), (1, 1, 1)]), rows=2, length=10)
  assert packed.shrunk == 1 and sorted(packed.sizes.tolist()) == [1, 2, 6, 9]


def test_minimum_sizes_and_crowds():
  grids = np.array([(1, 4, 4)] * 3)
  assert packing.pack_grids(grids, rows=1, length=36, min_tokens=12).sizes.tolist() == [12, 12, 12]
  with pytest.raises(UserError, match="1 rows of 35 tokens are too few for the 3 images"):
    packing.pack_grids(grids, rows=1, length=35, min_tokens=12)
  with pytest.raises(UserError, match="too few for the 4 captions"):
    packing.pack_texts(np.array([5, 5, 5, 5]), rows=1, length=3)


def test_a_clip_longer_than_a_row_is_shrunk():
  packed = packing.pack_grids(np.array([(4, 5, 5), (1, 2, 2)]), rows=3, length=40)
  assert packed.grids.tolist() == [[4, 3, 3], [1, 2, 2]] and packed.shrunk == 1


def test_what_is_packed_can_be_read_back(rng):
  grids = np.array([(1, 3, 2), (2, 2, 2), (1, 1, 5), (1, 4, 1), (1, 2, 3)])
  packed = packing.pack_grids(grids, rows=2, length=16)
  frames = [rng.integers(0, 256, (2 * t, 4 * y, 4 * x, 3), np.uint8) for t, y, x in packed.grids]
  patches = [patchify_clip(each, 4, 2) for each in frames]
  batch = packing.place_images(patches, packed)
  assert (
    batch.patches.shape == (2, 16, 2 * 48) and batch.segment_ids.dtype == np.int16 and batch.locations.dtype == np.int32
  )
  for (pixels, coords), (row, segment) in zip(patches, batch.locations, strict=True):
    mine = batch.segment_ids[row] == segment
    np.testing.assert_array_equal(batch.patches[row, mine], pixels)
    np.testing.assert_array_equal(batch.coords[row, mine], coords)
  assert not batch.patches[batch.segment_ids == 0].any() and not batch.coords[batch.segment_ids == 0].any()
  with pytest.raises(ValueError, match="has 4 patches, its plan says 6"):
    packing.place_images([patches[3], *patches[1:]], packed)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 4), st.integers(20, 40), st.randoms())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_captions_are_kept_or_cut_before_their_last_token(lengths, rows, length, random):
  lengths = np.array(lengths)
  packed = packing.pack_texts(lengths, rows=rows, length=length)
  check_rows(packed)
  cut = packed.sizes < lengths
  assert packed.truncated == cut.sum() and packed.dropped == (lengths - packed.sizes).sum()
  if cut.any():
    # A common cap, give or take the token by which the first of equals is ahead.
    assert packed.sizes[cut].max() - packed.sizes[cut].min() <= 1 and packed.sizes.max() <= packed.sizes[cut].min() + 1
  tokens = np.zeros((len(lengths), 24), np.int64)
  for k, n in enumerate(lengths):
    tokens[k, :n] = [random.randint(1, 99) for _ in range(n)]
  batch = packing.place_texts(tokens, packed)
  assert batch.mask is None and batch.tokens.dtype == np.int32
  for k, ((row, segment), size) in enumerate(zip(batch.locations, packed.sizes, strict=True)):
    expected = [*tokens[k, : size - 1], tokens[k, lengths[k] - 1]]
    np.testing.assert_array_equal(batch.tokens[row, batch.segment_ids[row] == segment], expected)
  assert not batch.tokens[batch.segment_ids == 0].any()


@pytest.mark.parametrize(("lengths", "length", "expected"), [((9, 3, 9), 15, (6, 3, 6)), ((9, 3, 9), 16, (6, 3, 7)),
                                                            ((2, 2), 4, (2, 2)), ((0, 4), 5, (1, 4))])  # fmt: skip
def test_the_longest_caption_is_cut_by_the_least(lengths, length, expected):
  assert tuple(packing.pack_texts(np.array(lengths), rows=1, length=length).sizes) == expected


@pytest.mark.parametrize("pairs", [32, 256])
@pytest.mark.parametrize("fill", [0.9, 0.95])
def test_capacity_is_filled_as_expected(rng, pairs, fill):
  tokens = packing.capacity(700.0, 350.0, pairs=pairs, fill=fill)
  totals = rng.normal(700 * pairs, 350 * pairs**0.5, 200_000)
  assert np.minimum(totals, tokens).mean() / tokens == pytest.approx(fill, abs=1e-3)


def test_capacity_of_equal_sizes_and_shapes_of_rows():
  assert packing.capacity(10.0, 0.0, pairs=19, fill=0.95) == 200
  assert packing.row_shape(10_000, least=1000, multiple=1) == (10, 1000)
  rows, length = packing.row_shape(186_000, least=4096)
  assert length % 128 == 0 and 4096 <= length <= 5120 and 0.99 * 186_000 <= rows * length <= 186_000
  with pytest.raises(UserError, match="1000 tokens are too few for a row of 4096"):
    packing.row_shape(1000, least=4096)


@pytest.mark.parametrize("patch", [14, 16])
def test_a_mix_of_web_sizes_fills_its_rows(rng, patch):
  side, aspect = 400 * np.exp(0.6 * rng.standard_normal(256)), np.exp(0.3 * rng.standard_normal(256))
  down, across = side / np.sqrt(aspect) / patch, side * np.sqrt(aspect) / patch
  scale = np.minimum(1, np.sqrt(1024 / (down * across)))
  grids = np.stack([np.ones(256), np.maximum(1, down * scale), np.maximum(1, across * scale)], axis=1).astype(int)
  total = int(grids.prod(axis=1).sum())
  rows = -(-total // 4096)
  # Not one token to spare, and still hardly anybody has to give way.
  packed = packing.pack_grids(grids, rows=rows, length=-(-total // rows))
  assert packed.fill > 0.998 and packed.shrunk < 16 and (packed.factors > 0.97).all()
