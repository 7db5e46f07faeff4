"""Terms that remember pairs or steps: what they hold on any mesh, what they make of it, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.objectives import Pairs, Sizes, make_objective
from contrastive_jax.objectives.objective import create
from contrastive_jax.parallel.mesh import put_batch
from contrastive_jax.training.run import Run
from contrastive_jax.training.step import make_value_and_grad
from tests import tiny
from tests.keys import keys_of
from tests.objectives.stepping import DIM, PAIRS, batch_of, stepping, unit
from tests.training import accumulating

SIZE = 40


def steps_of(rng, count):
  """Embeddings and groups of some steps; groups come again, as in a second epoch."""
  made = [np.float32(unit(rng)) for _ in range(2 * count)]
  return list(zip(made[::2], made[1::2], [rng.permutation(60)[:PAIRS] for _ in range(count)], strict=True))


def taken(mesh, run, state, params, steps):
  """Values and gradients of steps in turn, and the state after them."""
  found = []
  for image, text, group in steps:
    batch = dataclasses.replace(batch_of(group, np.arange(PAIRS)), keys=keys_of(group, group))
    put = tuple(put_batch(mesh, side) for side in (image, text))
    (value, (_, state)), gradients = run(put, put_batch(mesh, batch), state, params)
    found.append((float(value), jax.device_get(gradients)))
  return found, jax.device_get(state)


def softmax_with(image, text, group, before):
  """The loss with the pairs of earlier steps as negatives, row by row in float64."""
  total = 0.0
  columns = [np.concatenate([own, *(step[side] for step in before)]) for side, own in ((1, text), (0, image))]
  groups = np.concatenate([group, *(step[2] for step in before)])
  for rows, others in ((image, columns[0]), (text, columns[1])):
    logits = 7 * np.float64(rows) @ np.float64(others).T
    for i in range(PAIRS):
      counts = (groups != group[i]) | (np.arange(len(groups)) == i)
      total += logsumexp(logits[i, counts]) - logits[i, i]
  return total / 2 / PAIRS


@pytest.mark.parametrize(
  ("devices", "strategy"),
  [
    (4, "ring"),
    pytest.param(8, "gather", marks=pytest.mark.slow),
  ],
)
def test_a_queue_holds_the_newest_pairs_and_they_are_negatives(devices, strategy, rng):
  """Five steps of 16 go around a ring of 40 twice; a pair that comes again is no negative of its earlier self."""
  options = {"queued_softmax": {"size": SIZE, "strategy": strategy, "tile": 7}}
  mesh, params, state, run = stepping("queued_softmax", options, devices)
  steps = steps_of(rng, 5)
  found, state = taken(mesh, run, state, params, steps)
  earlier = [steps[:number] for number in range(5)]
  before = [[[np.concatenate(part)[-SIZE:] for part in zip(*some, strict=True)]] if some else [] for some in earlier]
  for (value, _), step, rows in zip(found, steps, before, strict=True):
    assert value == pytest.approx(softmax_with(*step, rows), rel=1e-5)
  kept = state["queued_softmax"]
  order = (np.arange(5 * PAIRS) % SIZE)[-SIZE:]
  for part, name in enumerate(("image", "text")):
    np.testing.assert_array_equal(kept[name][order], np.concatenate([step[part] for step in steps])[-SIZE:])
  groups = np.concatenate([step[2] for step in steps])[-SIZE:]
  np.testing.assert_array_equal(kept["keys"][order], keys_of(groups, groups))
  assert (kept["next"], kept["taken"]) == (5 * PAIRS % SIZE, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["swapped_prototypes", "matryoshka"])
def test_what_is_remembered_does_not_depend_on_the_mesh(term, rng):
  steps = steps_of(rng, 3)
  options = {
    "swapped_prototypes": {"prototypes": 6, "queue": SIZE, "frozen_steps": 2},
    "matryoshka": {"of": "queued_softmax", "dims": (3,)},
    "queued_softmax": {"size": SIZE},
  }

  def after(devices):
    mesh, params, state, run = stepping(term, options, devices)
    return taken(mesh, run, state, params, steps)

  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), after(1), after(8))


def test_prototypes_rest_as_long_as_they_should(rng):
  options = {"swapped_prototypes": {"prototypes": 6, "frozen_steps": 2}}
  objective = make_objective({"swapped_prototypes": 1.0}, options)
  mesh, params, state, _ = stepping("swapped_prototypes", options, 1)
  (image, text, group), moved = steps_of(rng, 1)[0], []
  batch = put_batch(mesh, batch_of(group, np.arange(PAIRS)))

  @jax.jit
  def by_prototypes(params, state):
    return jax.grad(
      lambda params: objective.global_loss(
        {"image": jnp.asarray(image), "text": jnp.asarray(text)},
        batch,
        jnp.float32(7),
        None,
        mesh,
        params=params,
        state=state,
        state_axes={"swapped_prototypes": {"steps": ()}},
      ),
      has_aux=True,
    )(params)

  for _ in range(4):
    gradient, (_, state) = by_prototypes(params, state)
    moved.append(bool(np.any(gradient["swapped_prototypes"]["prototypes"])))
  assert moved == [False, False, True, True] and int(state["swapped_prototypes"]["steps"]) == 2


@pytest.mark.parametrize(
  ("term", "option"), [("queued_softmax", "size"), ("swapped_prototypes", "queue"), ("sogclr", "samples")]
)
def test_a_state_that_is_too_small_is_refused_before_anything_is_compiled(term, option):
  objective = make_objective({term: 1.0}, {term: {option: 31}})
  with pytest.raises(UserError, match=rf"^loss_options\.{term}\.{option}=31 is less than the (32|40) "):
    objective.state(Sizes(DIM, samples=40, pairs=32))
  config = tiny.get_config()
  config.loss = term
  config.loss_options[term][option] = 31
  run = Run.from_config(config)
  with pytest.raises(UserError, match=rf"loss_options\.{term}\.{option}=31"):
    run.build(run.make_mesh(jax.devices()[:1]), samples=40)


@pytest.mark.slow
def test_a_queue_of_the_average_is_compared_with_what_the_average_makes(rng):
  spec = accumulating.make_spec(4, fsdp=2, dropout=0.0, drop_path=0.0)
  objective = make_objective({"queued_softmax": 1.0}, {"queued_softmax": {"size": 64, "average": True}})
  spec = dataclasses.replace(spec, objective=objective, average=True)
  batch, params = accumulating.make_batch(rng), accumulating.params_of(spec.model)
  average = jax.tree.map(lambda leaf: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32), params)
  graphdef, _ = dual_encoder.abstract(spec.model)
  placed = jax.tree.map(jnp.asarray, batch)

  def embedded(params):
    return {name: made.embedding for name, made in dual_encoder.merge(graphdef, params)(placed).items()}

  live, slow = (jax.device_get(jax.jit(embedded)(tree)) for tree in (params, average))
  run = jax.jit(make_value_and_grad(spec, accumulate=2))
  state = create(objective.state(Sizes(16)), jax.random.key(0))
  arguments = params, {}, put_batch(spec.mesh, batch), jax.random.key(0), {}, state, average
  (value, (_, after)), gradients = run(*arguments)
  scale = np.exp(params["log_logit_scale"])
  expected, keys = 0.0, np.asarray(batch.keys)
  counts = ~(keys[:, None] == keys[None]).all(-1).any(-1) | np.eye(64, dtype=bool)
  for rows, columns in ((live["image"], slow["text"]), (live["text"], slow["image"])):
    logits = np.float64(scale * rows @ columns.T)
    expected += np.mean(logsumexp(np.where(counts, logits, -np.inf), axis=1) - np.diagonal(logits)) / 2
  assert float(value) == pytest.approx(expected, rel=1e-5)
  for side in ("image", "text"):
    np.testing.assert_allclose(after["queued_softmax"][side], slow[side], atol=1e-5)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients[side]))


def test_soft_targets_come_by_and_by(rng):
  """The loss is linear in their share: after one step of two it is half way."""
  options = {"size": 0, "average": True, "soft_share": 0.8, "soft_steps": 2, "target_temperature": 0.1}
  term = make_objective({"queued_softmax": 1.0}, {"queued_softmax": options}).terms["queued_softmax"][1]
  sides = [jnp.float32(unit(rng, 4)) for _ in range(4)]
  pairs = Pairs(*sides[:2], jnp.asarray(keys_of(np.arange(4))), 5.0, average_image=sides[2], average_text=sides[3])
  assert set(term.state(Sizes(DIM))) == {"steps"}
  run = jax.jit(lambda state: term(pairs, {}, state, axis_name=None))
  state, found = {"steps": jnp.int32(0)}, []
  for _ in range(4):
    value, state, metrics = run(state)
    found.append((float(value), float(metrics["soft_share"])))
  values, shares = zip(*found, strict=True)
  assert shares == pytest.approx((0, 0.4, 0.8, 0.8))
  assert values[1] == pytest.approx((values[0] + values[2]) / 2) and values[3] == values[2] != values[0]


def test_options_of_soft_targets_that_do_nothing_are_refused():
  for options, said in (
    ({"size": 0}, "size=0 leaves the softmax loss"),
    ({"soft_share": 0.4}, "soft_share=0.4 is a share of the average's targets"),
    ({"average": True, "soft_steps": 9}, r"soft_steps=9 and .*target_temperature=None are of targets that"),
  ):
    with pytest.raises(UserError, match=rf"^loss_options\.queued_softmax\.{said}"):
      make_objective({"queued_softmax": 1.0}, {"queued_softmax": options})


def test_a_queue_of_the_average_needs_one():
  config = tiny.get_config()
  config.loss, config.loss_options.queued_softmax.average, config.average_decay = "queued_softmax", True, 0.0
  with pytest.raises(UserError, match=r"^average_decay=0\.0 keeps no moving average"):
    Run.from_config(config)
