import jax
import numpy as np
import pytest

from contrastive_jax.evaluation.retrieval import evaluate_retrieval, recall_at_k, top_k
from contrastive_jax.evaluation.tasks import PairSet
from contrastive_jax.parallel.mesh import MeshSpec


def unit(array: np.ndarray) -> np.ndarray:
  return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def random_problem(rng, *, images=50, captions_per_image=5, dim=6):
  """Captions scattered about their image; groups are large, shuffled 64-bit numbers."""
  group = rng.permutation(images) + (1 << 40)
  image = unit(rng.normal(size=(images, dim)))
  caption_group = np.repeat(group, captions_per_image)
  caption = unit(np.repeat(image, captions_per_image, axis=0) + 0.6 * rng.normal(size=(len(caption_group), dim)))
  order = rng.permutation(len(caption))
  return image, caption[order], group, caption_group[order]


def plain_recall(queries, gallery, query_group, gallery_group, k):
  order = np.argsort(-(queries.astype(np.float64) @ gallery.astype(np.float64).T), axis=1, kind="stable")
  return np.mean([(gallery_group[row[:k]] == group).any() for row, group in zip(order, query_group, strict=True)])


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_recall_is_the_plain_answer_for_any_block(block, rng):
  image, caption, image_group, caption_group = random_problem(rng)
  ways = [(image, caption, image_group, caption_group), (caption, image, caption_group, image_group)]
  for queries, gallery, query_group, gallery_group in ways:
    found = recall_at_k(queries, gallery, query_group, gallery_group, ks=(1, 5, 10), block=block)
    for k in (1, 5, 10):
      expected = plain_recall(queries, gallery, query_group, gallery_group, k)
      assert 0 < expected < 1
      assert found[f"recall@{k}"] == expected  # Hits over queries in float64: exact.


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [5, 4096])
def test_devices_that_share_the_queries_find_the_same(devices, block, rng):
  image, caption, _, _ = random_problem(rng)
  mesh = MeshSpec(fsdp=min(2, devices)).make(jax.devices()[:devices])
  exact = caption.astype(np.float64) @ image.astype(np.float64).T
  nearest, scores = top_k(caption, image, k=7, block=block, mesh=mesh)
  np.testing.assert_array_equal(nearest, np.argsort(-exact, axis=1, kind="stable")[:, :7])
  np.testing.assert_allclose(scores, np.take_along_axis(exact, nearest, axis=1), atol=1e-6)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_equal_scores_rank_by_index(block):
  gallery = np.ones((11, 2), np.float32)
  gallery[4] = 2
  nearest, scores = top_k(np.ones((5, 2), np.float32), gallery, k=6, block=block)
  np.testing.assert_array_equal(nearest, [[4, 0, 1, 2, 3, 5]] * 5)
  np.testing.assert_array_equal(scores, [[4, 2, 2, 2, 2, 2]] * 5)


def test_negative_scores_beat_padding(rng):
  gallery = -np.abs(rng.normal(size=(5, 3))).astype(np.float32)
  nearest, scores = top_k(np.ones((1, 3), np.float32), gallery, k=5, block=3)
  np.testing.assert_array_equal(nearest[0], np.argsort(-gallery.sum(axis=1)))
  assert np.isfinite(scores).all()


def test_a_cut_off_beyond_the_gallery_is_refused():
  one = np.ones((1, 2), np.float32)
  with pytest.raises(ValueError, match=r"5 nearest need a gallery of at least 5 items, got 1"):
    recall_at_k(one, one, np.zeros(1, int), np.zeros(1, int), ks=(1, 5))
  with pytest.raises(ValueError, match="at least one query"):
    recall_at_k(one[:0], one, np.zeros(0, int), np.zeros(1, int), ks=(1,))


class TableEncoder:
  """Embeds images by their first pixel and captions by their number."""

  logit_scale = 1.0

  def __init__(self, image, caption):
    self.image, self.caption = image, caption

  def encode_image(self, images):
    return np.stack([self.image[images[i][0, 0, 0]] for i in range(len(images))])

  def encode_text(self, texts):
    return np.stack([self.caption[int(text)] for text in texts])


def test_evaluation_searches_both_ways(rng):
  image, caption, image_group, caption_group = random_problem(rng)
  pairs = PairSet(
    name="toy",
    images=[np.full((6, 6, 3), i, np.uint8) for i in range(len(image))],
    captions=[str(i) for i in range(len(caption))],
    image_group=image_group,
    caption_group=caption_group,
  )
  result = evaluate_retrieval(TableEncoder(image, caption), pairs, ks=(1, 5, 60), examples=4)
  expected = {
    "image_retrieval_recall@1": plain_recall(caption, image, caption_group, image_group, 1),
    "image_retrieval_recall@5": plain_recall(caption, image, caption_group, image_group, 5),
    "text_retrieval_recall@1": plain_recall(image, caption, image_group, caption_group, 1),
    "text_retrieval_recall@5": plain_recall(image, caption, image_group, caption_group, 5),
  }
  assert result.metrics == expected
  assert (result.task, result.sizes) == ("zeroshot_retrieval", {"images": 50, "captions": 250})

  scores = caption.astype(np.float64) @ image.astype(np.float64).T
  assert len(result.searches) == 8
  for search in result.searches[:4]:
    row = int(search.query)
    order = np.argsort(-scores[row])[:5]
    assert [int(found[0][0, 0, 0]) for found in search.found] == order.tolist()
    assert [good for _, _, good in search.found] == (image_group[order] == caption_group[row]).tolist()
  for search in result.searches[4:]:
    row = search.query[0, 0, 0]
    order = np.argsort(-scores[:, row])[:5]
    assert [int(found[0]) for found in search.found] == order.tolist()
    assert [good for _, _, good in search.found] == (caption_group[order] == image_group[row]).tolist()
  for searches in (result.searches[:4], result.searches[4:]):
    assert [search.found[0][2] for search in searches] == [True, False, True, False]


def test_groups_on_one_side_only_are_refused():
  with pytest.raises(ValueError, match="group 7 and 0 more"):
    PairSet("toy", [np.zeros((2, 2, 3), np.uint8)], ["a", "b"], np.array([3]), np.array([3, 7]))
