"""Terms that wrap others, predict, or spread each tower: values of their own formulas, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.objectives import Pairs, Sizes, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.parallel.mesh import put_batch
from contrastive_jax.training.run import Run
from tests import tiny
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
    "into": jnp.concatenate([jnp.eye(2), -jnp.eye(2)], axis=1),
    "into_bias": jnp.zeros(4),
    "out": jnp.concatenate([jnp.eye(2), -jnp.eye(2)]),
    "out_bias": jnp.zeros(2),
  }

  def total(image, text, params):
    return term.total(None, outputs_of(image, text), batch_of(np.arange(len(image)), np.arange(len(image))), params)

  both = {"image": identity, "text": identity}
  assert total(IMAGE, TEXT, both) / 2 == pytest.approx(0.2, abs=1e-6)
  # Images predict a constant, so that texts are targets for them and nothing else, and the other way round.
  constant = {**identity, "into": jnp.zeros((2, 4)), "out_bias": jnp.ones(2)}
  d_image, d_text, d_params = jax.grad(total, (0, 1, 2))(IMAGE, TEXT, {"image": constant, "text": identity})
  assert not np.any(d_image) and np.any(d_text) and np.any(d_params["image"]["out_bias"])


def test_predictors_are_drawn_apart():
  params = create({"siamlip": term_of("siamlip").params(Sizes(16))}, jax.random.key(0))["siamlip"]
  image, text = params["image"], params["text"]
  assert image["into"].shape == (16, 4) and not np.allclose(image["into"], text["into"])
  assert not np.allclose(image["into"], image["out"].T)
  assert float(jnp.std(image["into"])) == pytest.approx(1 / 4, rel=0.3)


def test_barlip_is_its_loss():
  sides = jnp.float32(np.random.default_rng(0).standard_normal((2, 8, 3)))
  value, _, _ = term_of("barlip", off_diagonal=0.2)(Pairs(*sides, None, 1.0), {}, {}, axis_name=None, ring_order=None)
  assert value == losses.cross_correlation_loss(*sides, off_diagonal=0.2)[0]
