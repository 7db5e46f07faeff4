"""Terms that compare pairs: values and all gradients against dense formulas in float64, on any mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from contrastive_jax import losses
from contrastive_jax.losses import hard_negatives, nearest
from contrastive_jax.objectives import TERMS, Pairs
from contrastive_jax.parallel.mesh import BATCH_AXES, MeshSpec
from tests.keys import keys_of

PAIRS, DIM, SCALE = 16, 5, 6.0
TOWERS = ("image", "text", "sound")


@pytest.fixture(autouse=True)
def bounds_that_few_pairs_reach(monkeypatch):
  """Hard negatives are counted where six are kept, and nearest ones looked up for five pairs at a time."""
  monkeypatch.setattr(hard_negatives, "_REMEMBERED", 4)
  monkeypatch.setattr(nearest, "_ANCHORS", 5)


def log_sum_exp(logits, counted=True):
  return jax.nn.logsumexp(jnp.where(counted, logits, -jnp.inf), axis=1)


def directions(views):
  return views[0] @ views[1].T, views[1] @ views[0].T


def softmax(views, scale, others, *, smoothing=0.0, factor=1.0, mean=False, kept=None):
  """Half the sum of both cross-entropies; `kept` negatives of each line, or all."""
  total = 0.0
  for similarities in directions(views):
    own, counted = jnp.diag(similarities), others
    if kept is not None:
      least = jnp.sort(jnp.where(others, similarities, -jnp.inf), axis=1)[:, -kept]
      counted = others & (similarities >= least[:, None])
    negatives = log_sum_exp(scale * similarities, counted) - (jnp.log(counted.sum(1)) if mean else 0)
    lines = jnp.logaddexp(scale * own, negatives) - scale * own
    classes = others | jnp.eye(len(own), dtype=bool)
    average = jnp.sum(jnp.where(classes, scale * similarities, 0), 1) / classes.sum(1)
    total += factor * jnp.mean(lines + smoothing * (scale * own - average)) / 2
  return total


def dcl(views, scale, others, *, sigma=None, intra_modal=False, clusters=()):
  total, factors = 0.0, 1.0
  if clusters:
    factors = sum(1.0 * (ids[:, None] != ids) for ids in clusters) / len(clusters)
  for side, similarities in zip(views, directions(views), strict=True):
    own = jnp.diag(similarities)
    weight = 1 if sigma is None else 2 - len(own) * jax.nn.softmax(own / sigma)
    negatives = jnp.sum(jnp.where(others, factors * jnp.exp(scale * similarities), 0), axis=1)
    if intra_modal:
      negatives += jnp.exp(log_sum_exp(scale * side @ side.T, others))
    total += jnp.mean(jnp.log(negatives) - weight * scale * own) / 2
  return total


def cwcl(views, scale, others):
  image, text = views
  classes = others | jnp.eye(len(image), dtype=bool)
  weights = jnp.where(classes, jax.lax.stop_gradient(1 + image @ image.T) / 2, 0)
  logits = jnp.where(classes, scale * image @ text.T, -jnp.inf)
  logarithms = jnp.where(classes, jax.nn.log_softmax(logits, axis=1), 0)
  to_images = jnp.diag(jax.nn.log_softmax(logits, axis=0))
  return -jnp.mean(jnp.sum(weights * logarithms, 1) / weights.sum(1)) - jnp.mean(to_images)


def mann_whitney(views, scale, others):
  similarities = views[0] @ views[1].T
  own = jnp.diag(similarities)
  logits = scale * (similarities[None] - own[:, None, None])
  return jnp.sum(jnp.where(others, jnp.logaddexp(0, logits), 0)) / (len(own) * others.sum())


def mv_infonce(views, scale, others, *, intra_modal=True):
  """As the paper's sums over (view, instance), one matrix for all views of all instances."""
  count = len(views[0])
  whole = scale * jnp.concatenate(views) @ jnp.concatenate(views).T
  instance, view = jnp.tile(jnp.arange(count), len(views)), jnp.repeat(jnp.arange(len(views)), count)
  positive = (instance[:, None] == instance) & (view[:, None] != view)
  allowed = jnp.tile(others, (len(views), len(views))) & (intra_modal | (view[:, None] != view)) | positive

  def sums(mask):
    return jnp.zeros(count).at[instance].add(jnp.where(mask, jnp.exp(whole), 0).sum(1))

  return -jnp.mean(jnp.log(sums(positive) / sums(allowed)))


def mv_dhel(views, scale, others, *, with_self=False):
  attraction = sum(
    jnp.exp(scale * jnp.sum(views[first] * views[second], 1))
    for first in range(len(views))
    for second in range(first + 1, len(views))
  )
  others, orders = (others | jnp.eye(len(others), dtype=bool), 2) if with_self else (others, 1)
  repulsion = sum(log_sum_exp(scale * view @ view.T, others) for view in views)
  return jnp.mean(repulsion - jnp.log(orders * attraction))


def margin(views, scale, others):
  del scale
  total = 0.0
  for similarities in directions(views):
    own, nearest = jnp.diag(similarities), jnp.max(jnp.where(others, similarities, -jnp.inf), axis=1)
    low, high = jnp.minimum(own, nearest), jnp.maximum(own, nearest)
    below = jnp.sum(jnp.where(others, high[:, None] - similarities, 0), axis=1) / others.sum(1)
    total += jnp.mean(own - low + below) / 2
  return total


def cacr(views, scale, others, *, pull=1.0, push=1.0, weights=(1.0, 1.0)):
  del scale
  stacked = jnp.stack(views)  # Unit vectors: a squared distance is 2 - 2 cos.
  distances = 2 - 2 * jnp.einsum("vid,ujd->vuij", stacked, stacked)
  own, different = jnp.einsum("vuii->ivu", distances), ~jnp.eye(len(views), dtype=bool)
  attraction = jnp.sum(jax.nn.softmax(jnp.where(different, pull * own, -jnp.inf), axis=2) * own, axis=2).mean()
  shares = jax.nn.softmax(jnp.where(others, -push * distances, -jnp.inf), axis=3)
  repulsion = jnp.einsum("vuij,vuij->vu", shares, distances) / len(others)
  return weights[0] * attraction - weights[1] * jnp.sum(repulsion * different) / different.sum()


def cacr_rbf(views, scale, others, *, temperature):
  del scale
  key, *queries = views
  far = jnp.stack([jnp.sum((query - key) ** 2, axis=1) for query in queries])
  shares = jax.lax.stop_gradient(jax.nn.softmax(far / temperature, axis=0))
  classes = others | jnp.eye(len(key), dtype=bool)
  total = 0.0
  for share, query in zip(shares, queries, strict=True):
    for first, second in ((query, key), (key, query)):
      logits = jnp.where(classes, first @ second.T / temperature, -jnp.inf)
      total -= jnp.mean(share * jnp.diag(jax.nn.log_softmax(logits, axis=1)))
  return temperature * total


def groco(views, scale, others, *, top_k, steepness):
  """Each layer of the network as a matrix; the product of all is the matrix of probabilities."""
  del scale
  total = 0.0
  for first, second in (views, views[::-1]):
    similarities = first @ jax.lax.stop_gradient(second).T
    hard = jnp.argsort(jnp.where(others, similarities, -jnp.inf), axis=1)[:, -top_k:]
    elements = jnp.concatenate([jnp.take_along_axis(similarities, hard, 1), jnp.diag(similarities)[:, None]], axis=1)

    def line(values):
      size = len(values)
      product = jnp.eye(size)
      for layer in range(size):
        matrix = jnp.eye(size)
        for a in range(layer % 2, size - 1, 2):
          share = jnp.arctan(steepness * (values[a + 1] - values[a])) / jnp.pi + 0.5
          matrix = matrix.at[a : a + 2, a : a + 2].set(jnp.array([[share, 1 - share], [1 - share, share]]))
        values, product = matrix @ values, product @ matrix.T
      highest = jnp.arange(size) == size - 1
      p = jnp.where(highest, product[:, -1], product[:, :-1].sum(1))
      return -jnp.mean(jnp.log(p))

    total += jnp.mean(jax.vmap(line)(elements)) / 2
  return total


def gram(views, scale, others, *, smoothing):
  anchor, *rest = views
  shape = len(anchor), *anchor.shape
  vectors = [jnp.broadcast_to(anchor[:, None], shape), *(jnp.broadcast_to(view, shape) for view in rest)]
  cosines = jnp.einsum("vijd,uijd->ijvu", jnp.stack(vectors), jnp.stack(vectors))
  ones = jnp.eye(len(views))  # Of unit vectors.
  squared = jnp.linalg.det(jnp.where(ones == 1, 1, cosines))
  logits = -scale * squared / jnp.sqrt(squared + 1e-6)
  classes = others | jnp.eye(len(anchor), dtype=bool)
  total = 0.0
  for matrix in (logits, logits.T):
    logarithms = jax.nn.log_softmax(jnp.where(classes, matrix, -jnp.inf), axis=1)
    average = jnp.sum(jnp.where(classes, logarithms, 0), 1) / classes.sum(1)
    total -= jnp.mean((1 - smoothing) * jnp.diag(logarithms) + smoothing * average) / 2
  return total


def gated(views, scale, others, *, gates, partners):
  """Each pair's gates on both sides of the cosines of its line."""
  (image,) = views
  mine = gates[:, None] * image[None]
  cosines = jnp.einsum("id,ijd->ij", gates * image, mine) / jnp.linalg.norm(gates * image, axis=1)[:, None]
  logits = scale * cosines / jnp.linalg.norm(mine, axis=2)
  lines = jnp.arange(len(image))
  own, counted = logits[lines, partners], others[lines, partners]
  negatives = log_sum_exp(logits, others & others[partners])
  return jnp.sum(jnp.where(counted, jnp.logaddexp(own, negatives) - own, 0)) / counted.sum()


def mochi(views, scale, others, *, picks, shares, hardest, query_picks=None, query_shares=None):
  total = 0.0
  for first, second in (views, views[::-1]):
    similarities, constant = first @ second.T, jax.lax.stop_gradient(second)
    order = jnp.argsort(jnp.where(others, -similarities, jnp.inf), axis=1)[:, :hardest]
    one, other = (constant[jnp.take_along_axis(order, picks[..., which], axis=1)] for which in (0, 1))
    mixture = shares[..., None] * one + (1 - shares[..., None]) * other
    if query_picks is not None:
      negative, share = constant[jnp.take_along_axis(order, query_picks, axis=1)], query_shares[..., None]
      query = jax.lax.stop_gradient(first)[:, None]
      mixture = jnp.concatenate([mixture, share * query + (1 - share) * negative], axis=1)
    mixture /= jnp.linalg.norm(mixture, axis=2, keepdims=True)
    extra = jnp.einsum("id,ikd->ik", first, mixture)
    negatives = jnp.logaddexp(log_sum_exp(scale * similarities, others), log_sum_exp(scale * extra))
    own = scale * jnp.diag(similarities)
    total += jnp.mean(jnp.logaddexp(own, negatives) - own) / 2
  return total


def mixup(views, scale, others, *, partners, shares):
  """The matrix of targets as it is written, of rows that are mixed with a pair that shares no key with them."""
  image, text = views
  own = jnp.eye(len(image), dtype=bool)
  shares = jnp.where(others[jnp.arange(len(image)), partners], shares, 1)
  mixed = shares[:, None] * image + (1 - shares[:, None]) * image[partners]
  mixed /= jnp.linalg.norm(mixed, axis=1, keepdims=True)
  partner = own[partners] & others
  targets = own * shares[:, None] + partner * (1 - shares[:, None])
  classes = own | partner | (others & others[partners])
  total = 0.0
  for axis in (0, 1):
    logarithms = jax.nn.log_softmax(jnp.where(classes, scale * mixed @ text.T, -jnp.inf), axis=axis)
    total -= jnp.sum(targets * jnp.where(classes, logarithms, 0)) / (2 * len(image))
  return total


def soft_clip(views, scale, others, *, temperature):
  classes = others | jnp.eye(len(views[0]), dtype=bool)
  total = 0.0
  for side in views:
    targets = jax.nn.softmax(jnp.where(classes, side @ side.T / temperature, -jnp.inf), axis=1)
    for similarities in directions(views):
      logarithms = jax.nn.log_softmax(jnp.where(classes, scale * similarities, -jnp.inf), axis=1)
      total -= jnp.sum(targets * jnp.where(classes, logarithms, 0)) / (2 * len(side))
  return total


@dataclasses.dataclass(frozen=True)
class Case:
  """A term with options, or the loss of one that draws, and its reference.

  Attributes:
    name: of the term, or of the function in `losses` where there are `arrays`.
    options: options of either.
    reference: a function of the views, the scale, which pairs are negatives, and `arrays`.
    towers: number of towers that are compared.
    arrays: arrays of the pairs, in place of draws.
  """

  name: str
  options: dict
  reference: Callable
  towers: int = 2
  arrays: dict = dataclasses.field(default_factory=dict)


DRAWS = np.random.default_rng(11)
PARTNERS = {"partners": DRAWS.permutation(PAIRS).astype(np.int32), "shares": DRAWS.uniform(0.2, 1, PAIRS)}
MIXTURES = {"picks": DRAWS.integers(0, 4, (PAIRS, 3, 2)).astype(np.int32), "shares": DRAWS.uniform(0, 1, (PAIRS, 3))}
QUERIES = {
  "query_picks": DRAWS.integers(0, 4, (PAIRS, 2)).astype(np.int32),
  "query_shares": DRAWS.uniform(0, 0.5, (PAIRS, 2)),
}
GATES = {"gates": DRAWS.uniform(0.1, 1, (PAIRS, DIM)), "partners": np.roll(np.arange(PAIRS), 3).astype(np.int32)}
CLUSTERS = {"clusters": tuple(DRAWS.integers(0, count, PAIRS).astype(np.int32) for count in (3, 5))}

CASES = {
  "align": Case(
    "softmax",
    {"directions": "sum", "label_smoothing": 0.1},
    functools.partial(softmax, smoothing=0.1, factor=2),
  ),
  "mean negatives": Case("softmax", {"mean_negatives": True}, functools.partial(softmax, mean=True)),
  "hard top 3": Case("softmax", {"hard_top_k": 3}, functools.partial(softmax, kept=3)),
  "hard share": Case("softmax", {"hard_share": 0.4}, functools.partial(softmax, kept=6)),
  "dcl": Case("dcl", {"temperature": None}, dcl),
  "dclw": Case(
    "dcl",
    {"temperature": 0.25, "weighted": True, "through_weights": True, "intra_modal": True},
    lambda views, scale, others: dcl(views, 4.0, others, sigma=0.5, intra_modal=True),
  ),
  "cwcl": Case("cwcl", {}, cwcl),
  "mann-whitney": Case("mann_whitney", {}, mann_whitney),
  "mv-infonce": Case("mv_infonce", {}, mv_infonce, towers=3),
  "mv-infonce between views": Case(
    "mv_infonce",
    {"intra_modal": False},
    functools.partial(mv_infonce, intra_modal=False),
  ),
  "mv-dhel": Case("mv_dhel", {"temperature": 0.5}, lambda views, scale, others: mv_dhel(views, 2.0, others), towers=3),
  "cacr": Case(
    "cacr",
    {"attraction_scale": 2.0, "repulsion_scale": 3.0, "attraction_weight": 0.7, "repulsion_weight": 1.5},
    functools.partial(cacr, pull=2.0, push=3.0, weights=(0.7, 1.5)),
    towers=3,
  ),
  "cacr, rbf": Case(
    "cacr",
    {"cost": "rbf", "temperature": 0.4},
    functools.partial(cacr_rbf, temperature=0.4),
    towers=3,
  ),
  "groco": Case("groco", {"top_k": 4, "steepness": 2.5}, functools.partial(groco, top_k=4, steepness=2.5)),
  "gram": Case("gram", {}, functools.partial(gram, smoothing=0.1), towers=3),
  "gram of two": Case("gram", {"label_smoothing": 0.0}, functools.partial(gram, smoothing=0.0)),
  "mochi": Case("mixed_negatives_loss", {"hardest": 4}, functools.partial(mochi, hardest=4), arrays=MIXTURES),
  "mixup": Case("mixup_loss", {}, mixup, arrays=PARTNERS),
  "soft-clip": Case(
    "soft_clip", {"temperature": None, "target_temperature": 0.3}, functools.partial(soft_clip, temperature=0.3)
  ),
  "mochi with the query": Case(
    "mixed_negatives_loss", {"hardest": 4}, functools.partial(mochi, hardest=4), arrays=MIXTURES | QUERIES
  ),
  "mv-dhel with itself": Case(
    "mv_dhel",
    {"temperature": 0.5, "with_self": True},
    lambda views, scale, others: mv_dhel(views, 2.0, others, with_self=True),
    towers=3,
  ),
  "meow": Case("decoupled_loss", {}, dcl, arrays=CLUSTERS),
  "margin": Case("margin_regularizer", {}, margin),
  "gated pairs": Case("gated_pairs_loss", {}, gated, towers=1, arrays=GATES),
}

# Losses that could be lowered without end by the scale alone, or that have none.
WITHOUT_SCALE = {"dcl", "dclw", "mv-dhel", "cacr", "cacr, rbf", "groco", "mv-dhel with itself", "margin"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where and how a loss is computed; no device at all is a call outside of any mesh."""

  devices: int = 0
  strategy: str = "gather"
  tile: int | None = None
  dtype: str = "float64"


def problem(groups, pairs=PAIRS):
  rng = np.random.default_rng(5)
  views = rng.normal(size=(3, pairs, DIM))
  views /= np.linalg.norm(views, axis=2, keepdims=True)
  if not groups:
    return views, keys_of(np.arange(pairs)), ~np.eye(pairs, dtype=bool)
  group, caption = rng.integers(0, 12, pairs), rng.integers(0, 20, pairs)
  alike = (group[:, None] == group) | (caption[:, None] == caption)
  assert alike.sum() > pairs + 4
  return views, keys_of(group, caption), ~alike


def computed(case, views, scale, keys, arrays, layout):
  """The value and its gradients by the views and the scale, as the term has them."""
  towers = TOWERS[: case.towers]
  options = case.options | {"tile": layout.tile} | ({} if case.name == "groco" else {"strategy": layout.strategy})
  axes = {"axis_name": BATCH_AXES if layout.devices else None, "ring_order": None}

  def local(views, scale, keys, arrays):
    if arrays:
      loss = getattr(losses, case.name)
      return loss(*views, **arrays, logit_scale=scale, group=keys, **options, **axes)[0]
    image, text, *others = views
    pairs = Pairs(image, text, keys, scale, others=dict(zip(towers[2:], others, strict=True)))
    return TERMS[case.name](**options, towers=towers)(pairs, {}, {}, **axes)[0]

  function = local
  if layout.devices:
    mesh = MeshSpec(fsdp=2 if layout.devices > 2 else 1).make(jax.devices()[: layout.devices])
    split, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    function = jax.shard_map(local, mesh=mesh, in_specs=(split, everywhere, split, split), out_specs=everywhere)
  return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(views, scale, keys, arrays)


@functools.cache
def reference_of(name):
  """The value of a case and its gradients by the views and the scale, compiled once for all inputs."""
  return jax.jit(jax.value_and_grad(CASES[name].reference, argnums=(0, 1)))


def check(name, layout, groups=True):
  case = CASES[name]
  views, keys, others = problem(groups)
  with jax.enable_x64(True):
    rounded = [jnp.asarray(view, layout.dtype) for view in views[: case.towers]]
    wide = [jnp.asarray(view, jnp.float64) for view in rounded]
    arrays = jax.tree.map(jnp.asarray, case.arrays)
    truth, (d_views, d_scale) = reference_of(name)(wide, jnp.float64(SCALE), jnp.asarray(others), **arrays)
    arrays = jax.tree.map(lambda leaf: leaf.astype(layout.dtype) if leaf.dtype == jnp.float64 else leaf, arrays)
    scale, keys = jnp.asarray(SCALE, layout.dtype), jnp.asarray(keys)
    found, (gradients, by_scale) = computed(case, rounded, scale, keys, arrays, layout)
  # As NumPy arrays: outside of the block JAX would compare float64 in float32.
  found, gradients, by_scale, d_views, d_scale = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64), (found, gradients, by_scale, d_views, d_scale)
  )
  bound = 1e-11 if layout.dtype == "float64" else 2e-5
  assert found == pytest.approx(float(truth), rel=bound)
  for gradient, exact in zip(gradients, d_views, strict=True):
    assert np.abs(gradient - exact).max() <= bound * np.abs(exact).max()
  if name in WITHOUT_SCALE:
    assert by_scale == 0
  else:
    assert abs(by_scale - d_scale) <= bound * max(abs(float(d_scale)), 1e-2)


# Every kind of sweep that the losses are made of; the others take minutes.
QUICK = ("hard top 3", "cwcl", "mann-whitney", "mixup")


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow, pytest.mark.extra)) for name in CASES],
)
def test_value_and_gradients_equal_a_dense_formula(name):
  check(name, Layout(devices=4, strategy=("ring", "gather")[list(CASES).index(name) % 2], tile=3))


# One of these for each case.
LAYOUTS = [
  Layout(),
  Layout(devices=8, strategy="ring", tile=1),
  Layout(devices=1, tile=5),
  Layout(devices=2, strategy="ring", dtype="float32"),
  Layout(devices=8),
  Layout(devices=1, strategy="ring", tile=4, dtype="float32"),
  Layout(devices=2, tile=7),
  Layout(devices=4, strategy="ring"),
  Layout(devices=4, tile=2, dtype="float32"),
  Layout(devices=2, strategy="ring", tile=3),
  Layout(devices=8, tile=2),
]


# Options of terms whose other forms are compared as well.
REPEATED = ("mochi with the query", "mv-dhel with itself", "meow", "margin", "gated pairs")


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.extra if name in REPEATED else ()) for name in CASES]
)
def test_value_and_gradients_equal_a_dense_formula_on_any_mesh(name):
  layout = LAYOUTS[list(CASES).index(name) % len(LAYOUTS)]
  check(name, layout, groups=layout.tile is not None)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("tile", [None, 2, 5])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_equal_a_dense_formula_wherever_they_are_computed(name, devices, tile, strategy):
  check(name, Layout(devices, strategy, tile))
