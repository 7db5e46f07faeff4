"""Terms that compare pairs: values worked out by hand, limits, identities, and what is refused or left out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.losses.gram import volumes
from contrastive_jax.objectives import TERMS, Pairs, Sizes, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.objectives.scales import scale_of
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of

EYE = np.eye(2, dtype=np.float32)
FIXTURE = EYE, np.array([[1, 0], [0.6, 0.8]], np.float32)


def unit(rng, *shape):
  rows = rng.standard_normal(shape)
  return np.float32(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def value_of(term, image, text, scale=1.0, group=None, **options):
  keys = keys_of(np.arange(len(image)) if group is None else np.asarray(group))
  arrays = [jnp.asarray(array) for array in (image, text, keys)]

  @jax.jit
  def run(image, text, keys):
    return TERMS[term](**options)(Pairs(image, text, keys, scale), {}, {}, axis_name=None)[0]

  return float(run(*arrays))


@pytest.mark.parametrize(
  ("term", "options", "expected"),
  [
    ("softmax", {"directions": "sum", "label_smoothing": 0.1}, 0.957758),
    ("cwcl", {}, 1.097758),
    ("mann_whitney", {}, 0.448879),
    ("mv_infonce", {}, 0.765496),
    ("mv_infonce", {"intra_modal": False}, 0.454584),
    ("mv_dhel", {"temperature": None}, -0.3),
    ("mv_dhel", {"temperature": None, "with_self": True}, 1.233130),
  ],
)
def test_values_of_the_fixture(term, options, expected):
  assert value_of(term, *FIXTURE, **options) == pytest.approx(expected, abs=1e-6)


def by_similarities(loss, similarities, direction="image_to_text"):
  """The derivative of one direction by a matrix of similarities, which the texts hold where images are unit vectors."""
  images = jnp.eye(len(similarities))
  grad = jax.jit(jax.grad(lambda texts: loss(images, texts)[1][f"loss_{direction}"]))
  return np.asarray(grad(jnp.asarray(similarities, jnp.float32).T)).T


class TestDecoupled:
  def test_the_identity_is_minus_the_scale(self):
    assert value_of("dcl", EYE, EYE, temperature=1.0) == pytest.approx(-1.0)

  @pytest.mark.slow
  def test_the_gradient_of_a_softmax_is_a_multiple_of_its_own_row_by_row(self, rng):
    """And the values differ by the mean log of the share of the negatives."""
    similarities = rng.uniform(-1, 1, (6, 6))
    shares = np.exp(4 * similarities) / np.exp(4 * similarities).sum(1, keepdims=True)
    rest = 1 - np.diag(shares)
    plain, decoupled = (
      by_similarities(functools.partial(loss, logit_scale=4.0), similarities)
      for loss in (losses.softmax_loss, losses.decoupled_loss)
    )
    np.testing.assert_allclose(plain, rest[:, None] * decoupled, atol=1e-6)
    images, texts = jnp.eye(6), jnp.asarray(similarities.T, jnp.float32)
    first, second = (
      float(loss(images, texts, logit_scale=4.0)[1]["loss_image_to_text"])
      for loss in (losses.softmax_loss, losses.decoupled_loss)
    )
    assert second == pytest.approx(first + np.log(rest).mean(), abs=1e-5)

  def test_weights_of_pairs_that_agree_are_small(self):
    """Of similarities 1 and 0 they are 0.2384 and 1.7616, and constants unless asked for."""
    image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    plain, weighted = (losses.decoupled_loss(image, text, logit_scale=1.0, sigma=sigma)[0] for sigma in (None, 0.5))
    assert plain - weighted == pytest.approx((0.2384 - 1) / 2, abs=1e-4)
    slopes = by_similarities(functools.partial(losses.decoupled_loss, logit_scale=1.0, sigma=0.5), np.eye(2) * [1, 0])
    np.testing.assert_allclose(np.diag(slopes), [-0.2384 / 2, -1.7616 / 2], atol=1e-4)

  def test_pairs_that_agree_alike_have_equal_weights(self, rng):
    image = unit(rng, 6, 4)
    plain, weighted = (value_of("dcl", image, image, weighted=weighted) for weighted in (False, True))
    assert weighted == pytest.approx(plain, abs=1e-5)

  @pytest.mark.parametrize("term", ["dcl", "mv_dhel"])
  def test_no_logit_scale_learns_from_a_loss_without_a_lower_bound(self, term):
    def loss(scale):
      pairs = Pairs(jnp.eye(2), jnp.eye(2), jnp.asarray(keys_of(np.arange(2))), scale)
      return TERMS[term](temperature=None)(pairs, {}, {}, axis_name=None)[0]

    value, slope = jax.value_and_grad(loss)(9.0)
    assert value == -9 and slope == 0
    pairs = Pairs(None, None, None, 9.0)
    assert jax.grad(lambda scale: scale_of(Pairs(None, None, None, scale), None))(9.0) == 1
    assert scale_of(pairs, 0.25) == 4
    with pytest.raises(UserError, match=r"loss_options.dcl.sigma=0"):
      make_objective({"dcl": 1.0}, {"dcl": {"sigma": 0.0, "weighted": True}})

  def test_pairs_without_negatives_count_nothing(self, rng):
    image, text = unit(rng, 2, 4, 3)
    for term in ("dcl", "mv_dhel", "mann_whitney", "groco"):
      options = {"weighted": True} if term == "dcl" else {}
      assert value_of(term, image, text, group=[7, 7, 7, 7], **options) == 0
    # Three pairs of one group beside a fourth, which alone is anybody's negative.
    assert np.isfinite(value_of("dcl", image, text, group=[7, 7, 7, 8]))


class TestMeanNegatives:
  @pytest.mark.parametrize("pairs", [2, 4, 64])
  def test_the_size_of_the_batch_changes_nothing(self, pairs):
    eye = np.eye(pairs, dtype=np.float32)
    assert value_of("softmax", eye, eye, mean_negatives=True) == pytest.approx(0.31326, abs=1e-5)

  def test_a_low_temperature(self):
    assert value_of("softmax", EYE, EYE, scale=10.0, mean_negatives=True) == pytest.approx(4.54e-5, rel=1e-3)

  def test_negatives_that_are_there_twice_change_nothing(self, rng):
    """The copies share a key, so that the mean is over other pairs only."""
    image, text = unit(rng, 2, 4, 3)
    once = value_of("softmax", image, text, scale=5.0, mean_negatives=True)
    twice = value_of(
      "softmax", np.tile(image, (2, 1)), np.tile(text, (2, 1)), 5.0, np.arange(8) % 4, mean_negatives=True
    )
    assert twice == pytest.approx(once, rel=1e-5)

  def test_of_two_pairs_it_is_the_softmax(self, rng):
    image, text = unit(rng, 2, 2, 3)
    plain, mean = (value_of("softmax", image, text, scale=5.0, mean_negatives=mean) for mean in (False, True))
    assert mean == pytest.approx(plain, rel=1e-6)


class TestHardNegatives:
  def test_keeping_all_is_the_softmax(self, rng):
    image, text = unit(rng, 2, 6, 3)
    plain = value_of("softmax", image, text, scale=5.0)
    for options in ({"hard_share": 1.0}, {"hard_top_k": 5}, {"hard_top_k": 64}):
      assert value_of("softmax", image, text, scale=5.0, **options) == plain

  @pytest.mark.parametrize("options", [{"top_k": 2}, {"share": 0.5}])
  @pytest.mark.slow
  def test_the_negatives_that_are_kept_push_as_much_as_the_positive_pulls(self, options, rng):
    similarities = rng.uniform(-1, 1, (6, 6))
    slopes = by_similarities(functools.partial(losses.hard_softmax_loss, logit_scale=3.0, **options), similarities)
    np.testing.assert_allclose(slopes.sum(1), 0, atol=1e-6)
    off = ~np.eye(6, dtype=bool)
    kept = 2 if "top_k" in options else 3
    assert ((slopes > 0).sum(1) == kept).all() and (np.diag(slopes) < 0).all()
    for row, line, mask in zip(slopes, similarities, off, strict=True):
      assert set(np.flatnonzero(row > 0)) == set(np.argsort(np.where(mask, line, -9))[-kept:])

  def test_at_a_temperature_of_zero_only_the_hardest_counts(self, rng):
    image, text = unit(rng, 2, 5, 3)
    margins = []
    for similarities in (image @ text.T, text @ image.T):
      hardest = np.where(np.eye(5, dtype=bool), -np.inf, similarities).max(1)
      margins.append(np.maximum(hardest - np.diag(similarities), 0).mean())
    for options in ({}, {"hard_top_k": 1}):
      assert value_of("softmax", image, text, scale=1e4, **options) / 1e4 == pytest.approx(np.mean(margins), abs=1e-4)

  def test_a_copy_of_the_pair_is_no_hard_negative(self, rng):
    image, text = unit(rng, 2, 4, 3)
    twice, group = [np.tile(side, (2, 1)) for side in (image, text)], np.arange(8) % 4
    # Each negative is there twice as well: two of them are the nearest one.
    expected = np.mean(
      [
        np.logaddexp(0, np.log(2) + 6 * (np.where(np.eye(4, dtype=bool), -9, s).max(1) - np.diag(s)))
        for s in (image @ text.T, text @ image.T)
      ]
    )
    assert value_of("softmax", *twice, 6.0, group, hard_top_k=2) == pytest.approx(expected, rel=1e-5)
    assert value_of("softmax", *twice, 6.0, group, hard_top_k=1) == pytest.approx(expected, rel=1e-5)  # A tie.

  def test_what_contradicts_is_refused(self):
    for options, named in (
      ({"hard_top_k": 3, "hard_share": 0.5}, "hard_top_k=3 and loss_options.softmax.hard_share=0.5 both"),
      ({"hard_top_k": 3, "label_smoothing": 0.1}, "label_smoothing=0.1 and"),
      ({"hard_share": 0.5, "mean_negatives": True}, "mean_negatives=True are over all negatives"),
      ({"directions": "max"}, "directions='max' is unknown"),
    ):
      with pytest.raises(UserError, match=rf"loss_options.softmax.\S*{named}|{named}"):
        make_objective({"softmax": 1.0}, {"softmax": options})
    with pytest.raises(UserError, match=r"loss_options.cacr.cost='cosine' is unknown"):
      make_objective({"cacr": 1.0}, {"cacr": {"cost": "cosine"}})
    with pytest.raises(UserError, match="mean_negatives=True counts all negatives alike"):
      losses.weighted_softmax_loss(
        jnp.eye(2), jnp.eye(2), logit_scale=1.0, mean_negatives=True, negative_weight=lambda *_: None
      )


class TestSeveralCaptions:
  """`data.captions_per_image` shows an image in consecutive pairs of one group."""

  @pytest.mark.parametrize(("images", "captions"), [(2, 2), (3, 4), (4, 1)])
  def test_similarities_that_are_all_alike(self, images, captions):
    same = np.ones((images * captions, 1), np.float32)
    group = np.arange(images * captions) // captions
    assert value_of("softmax", same, same, group=group) == pytest.approx(math.log(1 + (images - 1) * captions))

  def test_captions_of_the_same_image_have_no_gradient(self, rng):
    group = np.array([0, 0, 1, 1])
    loss = functools.partial(losses.softmax_loss, logit_scale=3.0, group=jnp.asarray(group))
    slopes = by_similarities(loss, rng.uniform(-1, 1, (4, 4)))
    alike = (group[:, None] == group) & ~np.eye(4, dtype=bool)
    assert not slopes[alike].any() and (slopes[group[:, None] != group] > 0).all()


class TestContinuousWeights:
  def test_images_without_likeness_give_the_softmax(self, rng):
    image, text = np.array([[1, 0, 0], [-1, 0, 0]], np.float32), unit(rng, 2, 3)
    assert value_of("cwcl", image, text, 5.0) == pytest.approx(2 * value_of("softmax", image, text, 5.0), rel=1e-6)


class TestMannWhitney:
  def test_two_pairs_give_the_softmax(self, rng):
    image, text = unit(rng, 2, 2, 3)
    assert value_of("mann_whitney", image, text, 5.0) == pytest.approx(value_of("softmax", image, text, 5.0), rel=1e-5)

  @pytest.mark.slow
  def test_it_bounds_what_lies_above_the_roc_curve(self, rng):
    similarities = rng.uniform(-1, 1, (6, 6))
    negatives = similarities[~np.eye(6, dtype=bool)]
    above = np.mean(np.diag(similarities)[:, None] < negatives)
    images, texts = jnp.eye(6), jnp.asarray(similarities.T, jnp.float32)
    for scale in (1.0, 20.0):
      assert above <= float(losses.mann_whitney_loss(images, texts, logit_scale=scale)[0]) / math.log(2)

  @pytest.mark.slow
  def test_a_shift_of_a_row_is_seen(self, rng):
    """The softmax from images to texts is blind to it."""
    similarities = rng.uniform(-1, 1, (5, 5))
    shifted = similarities + rng.uniform(-1, 1, (5, 1))
    images, before, after = jnp.eye(5), *(jnp.asarray(s.T, jnp.float32) for s in (similarities, shifted))
    plain = [losses.softmax_loss(images, s, logit_scale=1.0)[1]["loss_image_to_text"] for s in (before, after)]
    ours = [losses.mann_whitney_loss(images, s, logit_scale=1.0)[0] for s in (before, after)]
    assert plain[0] == pytest.approx(float(plain[1]), rel=1e-5) and abs(ours[0] - ours[1]) > 1e-2

  def test_separable_pairs_cost_nothing_at_a_low_temperature(self):
    assert value_of("mann_whitney", *FIXTURE, temperature=0.01) < 1e-8


class TestViews:
  @pytest.mark.slow
  def test_the_order_of_the_views_changes_nothing(self, rng):
    views = [jnp.asarray(view) for view in unit(rng, 3, 5, 4)]
    for loss in (losses.multi_view_softmax_loss, losses.decoupled_views_loss):
      quick = jax.jit(functools.partial(loss, logit_scale=3.0))
      there, back = (float(quick(order)[0]) for order in (views, views[::-1]))
      assert there == pytest.approx(back, rel=1e-5)

  def test_a_single_view_is_refused(self):
    for loss in (losses.multi_view_softmax_loss, losses.decoupled_views_loss):
      with pytest.raises(UserError, match="has 1: give at least two"):
        loss([jnp.eye(2)], logit_scale=1.0)


class TestAttractionAndRepulsion:
  def test_near_negatives_weigh_more(self):
    """Distances of 1 and 3 have the shares 0.8808 and 0.1192; the others have one negative each."""
    rows = np.array([[1, 0], [0.5, math.sqrt(0.75)], [-0.5, math.sqrt(0.75)]], np.float32)
    for sharpness, first in ((1.0, 1.2384), (0.0, 2.0)):
      options = {"repulsion_scale": sharpness, "attraction_weight": 1e-20}
      found = value_of("cacr", rows, rows, group=[0, 1, 1], **options)
      assert found == pytest.approx(-(first + 1 + 3) / 3, abs=1e-4)

  def test_far_positives_weigh_more(self):
    """Distances of 0 and 2 give 1.7616 to two of three views, and 2 to the third."""
    views = [jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])]
    for sharpness, expected in ((1.0, (2 * 1.7616 + 2) / 3), (0.0, (1 + 1 + 2) / 3)):
      loss, _ = losses.attraction_repulsion_loss(views, attraction_scale=sharpness)
      assert loss == pytest.approx(expected, abs=1e-4)

  @pytest.mark.parametrize("temperature", [0.1, 1.0])
  def test_the_rbf_cost_of_two_views_is_a_scaled_softmax(self, temperature, rng):
    image, text = unit(rng, 2, 6, 4)
    plain = value_of("softmax", image, text, 1 / temperature)
    found = value_of("cacr", image, text, cost="rbf", temperature=temperature)
    assert found == pytest.approx(2 * temperature * plain, rel=1e-5)


class TestSorting:
  def of(self, positive, negative, top_k=1, **options):
    """The loss of images whose texts have given similarities to them, in one dimension more than there are texts."""
    pairs = top_k + 1
    similarities = np.where(np.eye(pairs, dtype=bool), positive, negative)
    images, texts = jnp.eye(pairs), jnp.asarray(similarities.T, jnp.float32)
    loss = jax.jit(functools.partial(losses.sorting_loss, top_k=top_k, **options))
    return float(loss(images, texts)[1]["loss_image_to_text"])

  @pytest.mark.parametrize(
    ("positive", "negative", "top_k", "expected"),
    [
      (0.3, 0.3, 1, 0.6931),
      (1, 0, 1, 0.28768),
      (0, 1, 1, 1.38629),
      pytest.param(0.1, 0.1, 10, 0.20198, marks=pytest.mark.slow),
      (1, -1, 10, 0.14697),
    ],
  )
  def test_values_worked_out_by_hand(self, positive, negative, top_k, expected):
    assert self.of(positive, negative, top_k) == pytest.approx(expected, abs=1e-4)

  @pytest.mark.slow
  def test_a_steep_network_sorts(self):
    assert self.of(0.6, 0.5, 4, steepness=1e6) < 1e-5
    assert self.of(0.5, 0.6, 4, steepness=1e6) > 1

  @pytest.mark.slow
  def test_it_falls_as_the_positive_rises(self):
    values = [self.of(positive, 0.2, 3) for positive in (-1, -0.3, 0.2, 0.5, 1)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 5

  @pytest.mark.slow
  def test_only_anchors_learn(self, rng):
    image, text = (jnp.asarray(side) for side in unit(rng, 2, 5, 3))
    loss = functools.partial(losses.sorting_loss, top_k=2)
    for direction, learns in (("image_to_text", 0), ("text_to_image", 1)):
      one = jax.jit(jax.grad(lambda *sides, name=f"loss_{direction}": loss(*sides)[1][name], argnums=(0, 1)))
      both = one(image, text)
      assert np.any(both[learns]) and not np.any(both[1 - learns])

  def test_a_group_with_fewer_negatives_ranks_those_there_are(self):
    """With one negative the network has one comparison, as often as it has layers that make it."""
    rows = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = value_of("groco", rows, rows, group=[0, 0, 1], top_k=2, steepness=1e6)
    assert found == pytest.approx(0, abs=1e-5)


class TestVolumes:
  def test_volumes_worked_out_by_hand(self):
    half = jnp.array(0.5)
    assert volumes([half * 0, half * 0], half * 0) == pytest.approx(1, abs=1e-5)
    assert volumes([half, half], half) == pytest.approx(0.707107, abs=1e-5)
    assert volumes([half * 2, half], half) == pytest.approx(0, abs=2e-3)
    assert volumes([half], None) == pytest.approx(math.sqrt(0.75), abs=1e-5)

  @pytest.mark.parametrize(("smoothing", "expected"), [(0.0, 0.014787), (0.1, 0.443359)])
  def test_the_loss_of_the_fixture(self, smoothing, expected):
    found = value_of("gram", *FIXTURE, towers=("text", "image"), temperature=0.07, label_smoothing=smoothing)
    assert found == pytest.approx(expected, abs=2e-5)

  @pytest.mark.slow
  def test_which_of_the_others_comes_first_changes_nothing(self, rng):
    anchor, *others = (jnp.asarray(view) for view in unit(rng, 3, 5, 4))
    there, back = (float(losses.gram_loss([anchor, *two], logit_scale=9.0)[0]) for two in (others, others[::-1]))
    assert there == pytest.approx(back, rel=1e-5)

  @pytest.mark.slow
  def test_equal_embeddings_have_finite_gradients(self):
    same = jnp.ones((3, 2)) / math.sqrt(2)
    for count in (2, 3):
      gradients = jax.jit(jax.grad(lambda views: losses.gram_loss(views, logit_scale=9.0)[0]))([same] * count)
      assert all(np.isfinite(gradient).all() for gradient in gradients)

  def test_more_than_three_are_refused(self):
    with pytest.raises(UserError, match=r"loss_options.gram.towers=.* are more than three"):
      make_objective({"gram": 1.0}, {"gram": {"towers": ("image", "text", "a", "b")}})


class TestMixedNegatives:
  def mixed(self, image, text, picks, shares, **options):
    count = len(image)
    picks, shares = jnp.asarray(picks, jnp.int32), jnp.asarray(shares, jnp.float32)
    picks = jnp.broadcast_to(picks, (count, *picks.shape[-2:]))
    loss = jax.jit(functools.partial(losses.mixed_negatives_loss, **options))
    return loss(jnp.asarray(image), jnp.asarray(text), picks, jnp.broadcast_to(shares, picks.shape[:2]))

  def test_a_mixture_worked_out_by_hand(self):
    """Of (1, 0) and (0, 1) in equal shares it has a similarity of 0.7071 to (1, 0).

    The other two pairs share a key: each has one negative, and no mixture of two.
    """
    image = np.array([[1, 0], [1, 0], [1, 0]], np.float32)
    text = np.array([[0, 1], [1, 0], [0, 1]], np.float32)
    group = jnp.array([0, 1, 1])
    _, parts = self.mixed(image, text, [[0, 1]], [0.5], logit_scale=2.0, hardest=2, group=group)
    first = np.log(1 + np.exp(2) + 1 + np.exp(2 * math.sqrt(0.5)))
    assert parts["loss_image_to_text"] == pytest.approx((first + np.log1p(np.exp(-2)) + np.log(2)) / 3, rel=1e-5)

  @pytest.mark.slow
  def test_mixtures_never_lower_the_loss(self, rng):
    image, text = unit(rng, 2, 5, 3)
    picks, shares = rng.integers(0, 3, (5, 4, 2)), rng.uniform(0, 1, (5, 4))
    plain, more = (
      losses.softmax_loss(jnp.asarray(image), jnp.asarray(text), logit_scale=4.0)[1],
      self.mixed(image, text, picks, shares, logit_scale=4.0, hardest=3)[1],
    )
    for direction in ("loss_image_to_text", "loss_text_to_image"):
      assert more[direction] > plain[direction]

  def test_a_mixture_with_the_query_worked_out_by_hand(self):
    """Of (1, 0) with a share of a quarter and the negative (0, 1) it has a similarity of 0.3162 to (1, 0)."""
    none, picks, shares = np.zeros((2, 0, 2)), jnp.zeros((2, 1), jnp.int32), jnp.full((2, 1), 0.25)
    options = {"logit_scale": 2.0, "hardest": 1, "query_picks": picks, "query_shares": shares}
    loss, _ = self.mixed(EYE, EYE, none, np.zeros((2, 0)), **options)
    assert loss == pytest.approx(np.log(1 + np.exp(-2) + np.exp(2 * (0.316228 - 1))), rel=1e-5)
    with pytest.raises(UserError, match="query_picks and query_shares describe the same mixtures"):
      losses.mixed_negatives_loss(
        *map(jnp.asarray, (EYE, EYE)),
        jnp.zeros((2, 0, 2), jnp.int32),
        jnp.zeros((2, 0)),
        **options | {"query_shares": None},
      )


class TestMixup:
  def loss(self, image, text, partners, shares, scale=10.0, **options):
    arrays = jnp.asarray(image), jnp.asarray(text), jnp.asarray(partners), jnp.asarray(shares, jnp.float32)
    return float(losses.mixup_loss(*arrays, logit_scale=scale, **options)[0])

  def test_the_fixture(self):
    assert self.loss(*FIXTURE, [1, 0], [0.7, 0.7]) == pytest.approx(1.138627, abs=1e-5)

  @pytest.mark.slow
  def test_without_a_mixture_it_is_the_softmax(self, rng):
    """Shares of 1, a permutation that moves nothing, and partners of one group."""
    image, text = unit(rng, 2, 4, 3)
    plain = value_of("softmax", image, text, 10.0)
    assert self.loss(image, text, [2, 0, 3, 1], np.ones(4)) == pytest.approx(plain, rel=1e-5)
    assert self.loss(image, text, np.arange(4), [0.1, 0.5, 0.7, 0.2]) == pytest.approx(plain, rel=1e-5)
    group = jnp.array([0, 0, 1, 1])
    plain = value_of("softmax", image, text, 10.0, group)
    assert self.loss(image, text, [1, 0, 3, 2], [0.1] * 4, group=group) == pytest.approx(plain, rel=1e-5)
    assert self.loss(*FIXTURE, [0, 1], [0.7, 0.7]) == pytest.approx(0.036365, abs=1e-6)

  def test_soft_targets_of_the_fixture(self):
    image, text = map(jnp.asarray, FIXTURE)
    from_texts, from_images = (
      float(losses.soft_target_loss(*sides, logit_scale=8.0)[0]) for sides in ((image, text), (text, image))
    )
    assert (from_texts, from_images) == pytest.approx((0.244458, 0.058072), abs=1e-5)
    assert value_of("soft_clip", image, text) == pytest.approx(from_texts + from_images, rel=1e-6)

  @pytest.mark.slow
  def test_sharp_targets_give_the_softmax(self, rng):
    image, text = unit(rng, 2, 4, 3)
    found = value_of("soft_clip", image, text, temperature=0.2, target_temperature=1e-3)
    assert found == pytest.approx(2 * value_of("softmax", image, text, 5.0), rel=1e-5)


def expected_clusters(image, ids):
  """The centre that is nearest to each image, of those that its cluster's images have in the mean."""
  centres = np.stack([image[ids == cluster].sum(0) for cluster in range(ids.max() + 1)])
  return (image @ (centres / np.linalg.norm(centres, axis=1, keepdims=True)).T).argmax(1)


class TestClusters:
  """Weights of negatives by clusters (MEOW), and sums of clusters that repel each other (PamC)."""

  def test_k_means_ends_where_each_embedding_is_nearest_to_its_own_centre_on_any_mesh(self, rng):
    image, places = unit(rng, 24, 4), rng.permutation(24).astype(np.int32)
    mesh, split = MeshSpec(fsdp=2).make(jax.devices()[:4]), PartitionSpec(BATCH_AXES)
    assign = functools.partial(losses.spherical_k_means, clusters=3)
    island = jax.shard_map(functools.partial(assign, axis_name=BATCH_AXES), mesh=mesh, in_specs=split, out_specs=split)
    ids = np.asarray(jax.jit(assign)(image, places))
    np.testing.assert_array_equal(ids, expected_clusters(image, ids))
    np.testing.assert_array_equal(ids, jax.jit(island)(image, places))

  @pytest.mark.parametrize(("term", "options"), [("dcl", {"temperature": 0.2}), ("softmax", {})])
  def test_a_cluster_for_each_pair_changes_nothing(self, term, options, rng):
    image, text = unit(rng, 2, 6, 3)
    plain, apart = (value_of(term, image, text, 5.0, clusters=clusters, **options) for clusters in ((), (6, 6)))
    assert apart == pytest.approx(plain, rel=1e-6)

  def test_negatives_weigh_by_the_clusterings_that_have_them_apart(self):
    """Of three pairs, the second lies with the first in one of two clusterings, and the third with none."""
    ids = jnp.array([0, 0, 1]), jnp.array([0, 1, 2])
    image, text = jnp.eye(3), jnp.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.1], [0.5, 0.2, 0.7]]).T
    _, parts = jax.jit(functools.partial(losses.decoupled_loss, logit_scale=1.0, clusters=ids))(image, text)
    s = np.asarray(text).T
    lines = [0.5 * np.exp(s[0, 1]) + np.exp(s[0, 2]), 0.5 * np.exp(s[1, 0]) + np.exp(s[1, 2]), np.exp(s[2, :2]).sum()]
    assert parts["loss_image_to_text"] == pytest.approx(np.mean(np.log(lines) - np.diag(s)), rel=1e-5)

  def test_a_batch_in_one_cluster_has_no_negatives_and_a_finite_gradient(self):
    one = (jnp.zeros(2, jnp.int32),)
    loss = functools.partial(losses.decoupled_loss, logit_scale=9.0, clusters=one)
    value, gradient = jax.jit(jax.value_and_grad(lambda image: loss(image, image)[0]))(jnp.eye(2))
    assert value == 0 and np.all(gradient == 0)

  def test_what_cannot_be_weighed_is_refused(self):
    for term, options, named in (
      ("dcl", {"intra_modal": True}, r"dcl.clusters=\(4,\) weigh the negatives between the towers alone"),
      ("softmax", {"hard_top_k": 3}, r"softmax.clusters=\(4,\) weigh the negatives, which"),
      ("softmax", {"label_smoothing": 0.1}, r"softmax.clusters=\(4,\) weigh the negatives, which"),
    ):
      with pytest.raises(UserError, match=f"loss_options.{named}"):
        make_objective({term: 1.0}, {term: {"clusters": (4,), **options}})
    for term, clusters in (("dcl", (8, 64)), ("softmax", (64,)), ("pamc", 64)):
      objective = make_objective({"sigmoid": 1.0, term: 1.0}, {term: {"clusters": clusters}})
      with pytest.raises(UserError, match=rf"loss_options.{term}.clusters asks for 64 clusters of a batch of 32 pairs"):
        objective.state(Sizes(4, pairs=32))
      objective.state(Sizes(4, pairs=64))

  def test_sums_of_clusters_that_repel_each_other_on_a_mesh(self, rng):
    """Value and gradients against a dense formula in float64; the last cluster is empty."""
    image, text, ids, scale = *np.float64(unit(rng, 2, 8, 4)), np.array([0, 1, 2, 1, 0, 2, 1, 1], np.int32), 1.5

    def dense(image, text):
      sums = [jnp.stack([side[ids == k].sum(0) for k in range(3)]) for side in (image, text)]
      first, second = (side / jnp.linalg.norm(side, axis=1, keepdims=True) for side in sums)
      kernel = jnp.where(
        jnp.eye(3, dtype=bool), 1, jnp.exp(scale * first @ second.T)
      )  # What is on the diagonal adds 1.
      repulsion = (jnp.log(kernel.sum(1)).mean() + jnp.log(kernel.sum(0)).mean()) / 2
      return repulsion - scale * jnp.sum(image * text) / 8

    mesh, split = MeshSpec(fsdp=2).make(jax.devices()[:4]), PartitionSpec(BATCH_AXES)
    ours = functools.partial(losses.cluster_proxy_loss, clusters=4, logit_scale=scale, axis_name=BATCH_AXES)
    island = jax.shard_map(lambda *local: ours(*local)[0], mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    with jax.enable_x64(True):
      truth, exact = jax.jit(jax.value_and_grad(dense, (0, 1)))(jnp.asarray(image), jnp.asarray(text))
      found, gradients = jax.jit(jax.value_and_grad(island, (0, 1)))(image, text, ids)
      assert float(found) == pytest.approx(float(truth), rel=1e-11)
      for gradient, expected in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(np.asarray(gradient), np.asarray(expected), atol=1e-12)

  def test_a_proxy_for_each_pair_repels_as_the_pair_itself(self, rng):
    image, text = unit(rng, 2, 6, 3)
    s = np.float64(image) @ np.float64(text).T
    kernel = np.where(np.eye(6, dtype=bool), 1, np.exp(2 * s))
    expected = np.mean((np.log(kernel.sum(0)) + np.log(kernel.sum(1))) / 2 - 2 * np.diag(s))
    assert value_of("pamc", image, text, clusters=6, temperature=0.5) == pytest.approx(expected, rel=1e-5)


def margin_term(own, others):
  """As the authors' code has it of one line: both distances to the clipped similarities, in two means."""
  low, high = min(own, max(others)), max(own, max(others))
  return max(own - low, 0) + np.mean([max(high - other, 0) for other in others])


class TestMarginRegularizer:
  def test_the_value_of_each_line(self, rng):
    assert margin_term(2, (1, 0)) == 2.5 and margin_term(0, (1, 0.5)) == 0.25
    image, text = unit(rng, 2, 7, 3)
    group = np.array([0, 0, 1, 2, 3, 3, 4])
    lines = [
      margin_term(matrix[i, i], matrix[i, group != group[i]])
      for matrix in (image @ text.T, text @ image.T)
      for i in range(7)
    ]
    assert value_of("margin_regularizer", image, text, group=group) == pytest.approx(np.mean(lines), rel=1e-5)

  def test_pairs_without_negatives_count_nothing(self, rng):
    assert value_of("margin_regularizer", *unit(rng, 2, 3, 2), group=[5, 5, 5]) == 0


class TestGatedPairs:
  def test_each_line_is_a_softmax_of_its_own_gated_features(self, rng):
    """Against NumPy, one line at a time; the third pair shares a key with its partner, the first with a negative."""
    image, group = unit(rng, 6, 4), np.array([0, 1, 2, 2, 0, 3])
    gates, partners = np.float32(rng.uniform(0.1, 1, (6, 4))), np.array([1, 5, 3, 4, 2, 0], np.int32)
    lines = []
    for i, p in enumerate(partners):
      mine = np.float64(gates[i] * image)
      logits = 5 * mine @ mine[i] / np.linalg.norm(mine, axis=1) / np.linalg.norm(mine[i])
      counted = (group != group[i]) & (group != group[p])
      if group[i] != group[p]:
        lines.append(np.log(np.exp(logits[p]) + np.exp(logits[counted]).sum()) - logits[p])
    assert len(lines) == 5
    loss = jax.jit(functools.partial(losses.gated_pairs_loss, logit_scale=5.0, group=jnp.asarray(group)))
    found, _ = loss(image, gates, partners)
    assert found == pytest.approx(np.mean(lines), rel=1e-5)

  def test_gates_learn_from_captions_and_captions_do_not(self, rng):
    objective = make_objective({"softmax": 1.0, "simlap": 1.0}, {"simlap": {"hidden": 3}})
    params = create({"simlap": objective.params(Sizes(4))["simlap"]}, jax.random.key(0))["simlap"]
    assert jax.tree.map(jnp.shape, params) == {
      "layer1": {"kernel": (4, 3), "bias": (3,)},
      "layer2": {"kernel": (3, 4), "bias": (4,)},
    }
    keys = jnp.asarray(keys_of(np.arange(6)))

    @jax.jit
    def gradients(image, text, params):
      def loss(image, text, params):
        return objective.terms["simlap"][1](Pairs(image, text, keys, 1.0), params, {}, axis_name=None)[0]

      return jax.grad(loss, (0, 1, 2))(image, text, params)

    d_image, d_text, d_params = gradients(*unit(rng, 2, 6, 4), params)
    assert np.abs(d_image).max(axis=1).min() > 0 and not np.any(d_text)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(d_params))


class TestDraws:
  @pytest.mark.slow
  @pytest.mark.parametrize("term", ["mixup", "mochi", pytest.param("pamc", marks=pytest.mark.extra)])
  def test_they_are_the_same_on_any_mesh_and_others_for_another_batch(self, term, rng):
    image, text = unit(rng, 2, 16, 4)
    options = {"mochi": {"hardest": 4, "mixed": 3, "mixed_with_query": 2}, "pamc": {"clusters": 3}}
    built = TERMS[term](**options.get(term, {}))
    mesh, split = MeshSpec(fsdp=2).make(jax.devices()[:4]), PartitionSpec(BATCH_AXES)

    def local(axes, image, text, keys):
      return built(Pairs(image, text, keys, 5.0), {}, {}, axis_name=axes)[0]

    alone = jax.jit(functools.partial(local, None))
    island = jax.jit(
      jax.shard_map(functools.partial(local, BATCH_AXES), mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    )
    keys, other = keys_of(np.arange(16)), keys_of(np.arange(100, 116))
    assert alone(image, text, keys) == pytest.approx(float(island(image, text, keys)), rel=1e-5)
    assert alone(image, text, keys) == alone(image, text, keys)
    assert abs(alone(image, text, keys) - alone(image, text, other)) > 1e-4
