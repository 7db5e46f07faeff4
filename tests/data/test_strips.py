"""Strips of emoji: what is in them, in what order, and what their captions say."""

import pickle

import numpy as np
import pytest

from data import strips
from data.emoji import concepts
from data.strips import CELL


@pytest.fixture(scope="module")
def sources():
  return strips.strip_sources()


def cells(pixels: np.ndarray) -> list[np.ndarray]:
  count = max(pixels.shape[:2]) // CELL
  return np.split(pixels, count, axis=0 if pixels.shape[0] > CELL else 1)


def test_lengths_and_directions_are_even(sources):
  source = sources["strips_noto"]
  assert len(source) == 30_000
  layouts = [source._layout(i) for i in range(4000)]
  counts = np.bincount([len(each.items) for each in layouts], minlength=6)
  assert counts[:2].sum() == 0 and abs(counts[2:6] - 1000).max() < 150
  assert np.mean([each.column for each in layouts]) == pytest.approx(0.5, abs=0.04)
  used = np.bincount([item for each in layouts for item in each.items], minlength=len(source.drawings))
  # 14,000 draws over some 1,700 drawings: a mean of 8, and no drawing left out or preferred.
  assert used.min() >= 0 and used.max() < 30 and (used == 0).mean() < 0.005
  assert all(len(set(each.items)) == len(each.items) for each in layouts)


def test_every_drawing_is_named_in_its_order(sources):
  for source in sources.values():
    for index in range(0, len(source), 1500):
      example = source[index]
      assert not example.flip and example.id == index and example.text == source.text(index)
      strip = source._layout(index)
      (said,) = example.text.captions
      head, _, tail = said.rpartition(" and ")
      names = [source.drawings.concepts[item].name for item in strip.items]
      assert said == " and ".join([", ".join(names[:-1]), names[-1]]) and head and tail
      parts = cells(example.image)
      assert len(parts) == len(names) and all(part.shape == (CELL, CELL, 4) for part in parts)
      assert (example.image[..., :3] <= example.image[..., 3:]).all()
      for part, item in zip(parts, strip.items, strict=True):
        drawn = source.drawings[item].image.astype(float)
        # The same mean colour as the drawing, whatever the resampling; 60 of 64 pixels are inside of the gaps.
        np.testing.assert_allclose(part.mean(axis=(0, 1)) * (64 / 60) ** 2, drawn.mean(axis=(0, 1)), atol=6)


def test_shapes_go_from_one_to_five(sources):
  shapes = {sources["strips_twemoji"][i].image.shape[:2] for i in range(200)}
  assert shapes == {(CELL, n * CELL) for n in (2, 3, 4, 5)} | {(n * CELL, CELL) for n in (2, 3, 4, 5)}


def test_no_held_out_concept_is_trained_on(sources):
  for source in sources.values():
    assert not any(concept.held_out or concept.toned for concept in source.drawings.concepts)


def test_a_strip_is_a_function_of_its_number(sources):
  source = sources["strips_noto"]
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[17].image, source[17].image)
  assert source.text(17) != sources["strips_twemoji"].text(17)


@pytest.mark.parametrize(("read", "held"), [(strips.openmoji, False), (strips.heldout, True)])
def test_evaluation_strips_have_captions_of_their_own(read, held):
  tested = read()
  assert len(tested.images) == len(tested.captions) == len(set(tested.captions)) == 1000
  known = {concept.name: concept for concept in concepts().values()}
  named = [name for name in known if known[name].held_out == held and not known[name].toned]
  used = set()
  for said in tested.captions[:100]:
    # Names may hold commas and "and": what is left when all known names are taken out holds neither.
    rest, found = said, 0
    for name in sorted((name for name in named if name in said), key=len, reverse=True):
      if name in rest:
        rest, found = rest.replace(name, "", 1), found + 1
        used.add(name)
    assert 2 <= found <= 5 and set(rest.replace("and", "")) <= {",", " "}, said
  assert len(used) <= 110
  several = [tested.images[k] for k in range(20)]
  assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 4 for pixels in several)
  # Alpha stands beside the colour: full colours occur under partial alpha.
  assert any((pixels[..., :3].max(axis=2) > pixels[..., 3]).any() for pixels in several)


def test_one_drawing_does_not_give_the_caption_away():
  """Naming one of its drawings leaves a strip among many others."""
  tested = strips.openmoji()
  counts = {}
  for strip in tested.images._layouts:
    for item in strip.items:
      counts[item] = counts.get(item, 0) + 1
  assert len(counts) == strips.EVALUATION_CONCEPTS and min(counts.values()) > 15
