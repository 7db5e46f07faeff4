"""Terms that wrap others, predict, or spread each tower: values of their own formulas, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.objectives import Pairs, Sizes, Variable, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.parallel.mesh import put_batch
from contrastive_jax.training.run import Run
from tests import tiny
from tests.keys import keys_of
from tests.objectives.stepping import DIM, PAIRS, batch_of, stepping, unit

IMAGE, TEXT = jnp.eye(2), jnp.asarray([[1, 0], [0.6, 0.8]])
KEYS = jnp.arange(8, dtype=jnp.uint32).reshape(2, 2, 2)


def term_of(name, **options):
  """A term, in an objective that it may stand in."""
  return make_objective({"softmax": 1.0, name: 1.0}, {name: options}).terms[name][1]


def test_the_terms_give_the_values_of_the_fixture():
  pairs = Pairs(IMAGE, TEXT, KEYS, 1.0)
  value, _, metrics = term_of("uniformity")(pairs, {}, {}, axis_name=None)
  assert value == pytest.approx(-2.8, abs=1e-6)
  assert metrics == pytest.approx({"uniformity_image": -4, "uniformity_text": -1.6}, abs=1e-6)
  assert term_of("uniformity", towers=("text",))(pairs, {}, {}, axis_name=None)[0] == pytest.approx(-1.6, abs=1e-6)
  assert term_of("cross_uniformity")(pairs, {}, {}, axis_name=None)[0] == pytest.approx(-2.206311, abs=1e-6)


def cut(side, size):
  part = side[:, :size]
  return part / jnp.linalg.norm(part, axis=1, keepdims=True)


def test_nested_dimensions_add_the_loss_of_each_part(rng):
  """The parts are normalised anew, weighted, and compared at the temperature of the whole."""
  chosen = {"matryoshka": {"of": "softmax", "dims": (2, 4), "weights": (0.5, 3.0)}, "softmax": {"label_smoothing": 0.1}}
  mesh, params, state, run = stepping("matryoshka", chosen, 8)
  sides = [np.float32(unit(rng)) for _ in range(2)]
  group = rng.integers(0, 12, PAIRS)
  batch = batch_of(group, np.arange(PAIRS))
  (value, (metrics, _)), gradients = run(
    tuple(put_batch(mesh, side) for side in sides), put_batch(mesh, batch), state, params
  )

  def plain(image, text):
    found = {}
    for size in (2, 4, DIM):
      logits = 7 * cut(image, size) @ cut(text, size).T
      counts = (group[:, None] != group) | np.eye(PAIRS, dtype=bool)
      target = 0.9 * np.eye(PAIRS) + 0.1 * counts / counts.sum(axis=1, keepdims=True)
      both = [jax.nn.log_softmax(jnp.where(counts, matrix, -1e9), axis=1) for matrix in (logits, logits.T)]
      found[size] = -sum(jnp.sum(target * matrix) for matrix in both) / 2 / PAIRS
    return 0.5 * found[2] + 3 * found[4] + found[DIM], found

  with jax.enable_x64(True):
    (truth, found), exact = jax.value_and_grad(plain, (0, 1), has_aux=True)(*(jnp.float64(side) for side in sides))
    exact = jax.tree.map(np.asarray, exact)
  # The gradient of the whole is that of unit vectors, whose length is not divided out; on them they agree to rounding
  # after the part along the embedding itself is taken off.
  assert float(value) == pytest.approx(float(truth), rel=1e-5)
  assert float(metrics["loss_first_2"]) == pytest.approx(float(found[2]), rel=1e-5)
  for side, name, expected in zip(sides, ("image", "text"), exact, strict=True):
    tangent = [
      gradient - np.sum(gradient * side, axis=1, keepdims=True) * side for gradient in (gradients[name], expected)
    ]
    np.testing.assert_allclose(*tangent, atol=2e-5 * np.abs(tangent[1]).max())


def test_sizes_that_do_not_nest_are_refused():
  for options, said in (
    ({"dims": (4, 4)}, r"^loss_options\.matryoshka\.dims=\(4, 4\) names a size twice"),
    ({"dims": (4,), "weights": (1.0, 2.0)}, r"^loss_options\.matryoshka\.weights=\(1\.0, 2\.0\) must have a number"),
    ({"of": "alignment"}, r"^loss_options\.matryoshka\.of='alignment' is unknown: choose one of sigmoid, softmax"),
    ({"of": "matryoshka"}, r"^loss_options\.matryoshka\.of='matryoshka' is unknown"),
  ):
    with pytest.raises(UserError, match=said):
      make_objective({"matryoshka": 1.0}, {"matryoshka": options})
  config = tiny.get_config()
  config.loss, config.loss_options.matryoshka.dims = "matryoshka", (8, 16)
  run = Run.from_config(config)
  with pytest.raises(UserError, match=r"matryoshka\.dims=\(8, 16\) must all be below model\.embed_dim=16"):
    run.build(run.make_mesh(jax.devices()[:1]))


def test_nested_dimensions_halve_the_embedding_where_none_are_named():
  term = make_objective({"matryoshka": 1.0}, {"matryoshka": {"of": "queued_softmax"}, "queued_softmax": {"size": 8}})
  shapes = {name: ring["image"].shape for name, ring in term.state(Sizes(16))["matryoshka"].items()}
  assert shapes == {"whole": (8, 16), "first_8": (8, 8), "first_4": (8, 4), "first_2": (8, 2)}


def outputs_of(image, text):
  return {"image": TowerOutputs(image, image, image), "text": TowerOutputs(text, text, text)}


def test_a_predictor_that_changes_nothing_makes_the_distance_of_the_pairs_and_no_target_learns(rng):
  term = term_of("siamlip", hidden=4)
  # A rectifier passes x or -x, so that these two layers are the identity.
  identity = {
    "layer1": {"kernel": jnp.concatenate([jnp.eye(2), -jnp.eye(2)], axis=1), "bias": jnp.zeros(4)},
    "layer2": {"kernel": jnp.concatenate([jnp.eye(2), -jnp.eye(2)]), "bias": jnp.zeros(2)},
  }

  def total(image, text, params):
    return term.total(None, outputs_of(image, text), batch_of(np.arange(len(image)), np.arange(len(image))), params)

  both = {"image": identity, "text": identity}
  assert total(IMAGE, TEXT, both) / 2 == pytest.approx(0.2, abs=1e-6)
  # Images predict a constant, so that texts are targets for them and nothing else, and the other way round.
  constant = {
    "layer1": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)},
    "layer2": {**identity["layer2"], "bias": jnp.ones(2)},
  }
  d_image, d_text, d_params = jax.grad(total, (0, 1, 2))(IMAGE, TEXT, {"image": constant, "text": identity})
  assert not np.any(d_image) and np.any(d_text) and np.any(d_params["image"]["layer2"]["bias"])


def test_predictors_are_drawn_apart():
  params = create({"siamlip": term_of("siamlip").params(Sizes(16))}, jax.random.key(0))["siamlip"]
  first, second, other = (
    params[tower][layer]["kernel"] for tower, layer in (("image", "layer1"), ("image", "layer2"), ("text", "layer1"))
  )
  assert first.shape == (16, 4) and not np.allclose(first, other) and not np.allclose(first, second.T)
  assert float(jnp.std(first)) == pytest.approx(1 / 4, rel=0.3)


def test_barlip_is_its_loss():
  sides = jnp.float32(np.random.default_rng(0).standard_normal((2, 8, 3)))
  value, _, _ = term_of("barlip", off_diagonal=0.2)(Pairs(*sides, None, 1.0), {}, {}, axis_name=None, ring_order=None)
  assert value == losses.cross_correlation_loss(*sides, off_diagonal=0.2)[0]


def loss_of(term, image, text, options=None, params=None):
  """The value of a term of some embeddings, which has no state."""
  own = make_objective({term: 1.0}, options or {}).terms[term][1]
  run = jax.jit(lambda pairs, params: own(pairs, params, {}, axis_name=None)[0])
  return float(run(Pairs(image, text, keys_of(np.arange(len(image))), 3.0), params or {}))


def softmax(image, text):
  logits = 3 * np.float64(image) @ np.float64(text).T
  return -np.mean([np.diag(matrix - np.log(np.exp(matrix).sum(1, keepdims=True))) for matrix in (logits, logits.T)])


def test_a_fixed_head_of_equal_weights_is_none_and_one_of_the_first_feature_alone_sees_its_sign(rng):
  image, text = (np.float32(unit(rng, 5)) for _ in range(2))
  equal, first = (loss_of("fixed_head", image, text, {"fixed_head": {"kappa": kappa}}) for kappa in (1.0, 1e12))
  assert equal == pytest.approx(softmax(image, text), rel=1e-5)
  assert first == pytest.approx(softmax(*(np.sign(side[:, :1]) for side in (image, text))), rel=1e-5)
  assert term_of("fixed_head").params(Sizes(DIM)) == {}


def test_several_heads_add_the_loss_of_what_each_makes(rng):
  image, text = (np.float32(unit(rng, 5)) for _ in range(2))
  options = {"multi_head": {"of": "softmax", "heads": 2, "hidden": 7, "dim": 3}}
  variables = make_objective({"multi_head": 1.0}, options).params(Sizes(DIM))["multi_head"]
  shapes = jax.tree.map(lambda variable: variable.shape, variables, is_leaf=lambda node: isinstance(node, Variable))
  one = {"perceptron": {"layer1": {"kernel": (DIM, 7), "bias": (7,)}, "layer2": {"kernel": (7, 3), "bias": (3,)}}}
  assert shapes == {"head_0": one, "head_1": one}
  params = jax.tree.map(
    lambda shape: np.float32(rng.standard_normal(shape)), shapes, is_leaf=lambda x: type(x) is tuple
  )

  def behind(head, side):
    first, second = head["perceptron"]["layer1"], head["perceptron"]["layer2"]
    made = np.maximum(side @ first["kernel"] + first["bias"], 0) @ second["kernel"] + second["bias"]
    return made / np.linalg.norm(made, axis=1, keepdims=True)

  parts = [softmax(*(behind(head, side) for side in (image, text))) for head in params.values()]
  assert loss_of("multi_head", image, text, options, params) == pytest.approx(sum(parts), rel=1e-5)


def test_what_a_term_behind_heads_remembers_has_their_size():
  options = {"multi_head": {"of": "queued_softmax", "heads": 2, "dim": 3}, "queued_softmax": {"size": 8}}
  term = make_objective({"multi_head": 1.0}, options).terms["multi_head"][1]
  shapes = {name: ring["image"].shape for name, ring in term.state(Sizes(DIM)).items()}
  assert shapes == {"head_0": (8, 3), "head_1": (8, 3)}
  with pytest.raises(UserError, match=r"multi_head\.of='alignment' is unknown"):
    make_objective({"multi_head": 1.0}, {"multi_head": {"of": "alignment"}})


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("term", ["multi_head", "fixed_head"])
def test_heads_do_the_same_on_any_mesh(term, rng):
  options = {"multi_head": {"of": "swapped_prototypes", "dim": 4}, "swapped_prototypes": {"prototypes": 5}}
  options |= {"fixed_head": {"kappa": 1.3, "of": "softmax"}}
  sides, batch, found = [np.float32(unit(rng)) for _ in range(2)], batch_of(np.arange(PAIRS), np.arange(PAIRS)), []
  for devices in (1, 8):
    mesh, params, state, run = stepping(term, options, devices)
    placed = tuple(put_batch(mesh, side) for side in sides)
    (value, _), gradients = run(placed, put_batch(mesh, batch), state, params)
    found.append(jax.tree.map(np.asarray, (value, gradients)))
  jax.tree.map(lambda one, many: np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-6), *found)
