"""Algorithm 1 of individual temperatures and SogCLR in float64, rows of the state on any mesh, and what a run keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax import losses
from contrastive_jax.errors import UserError
from contrastive_jax.losses.individual_temperatures import Samples
from contrastive_jax.objectives import Sizes, make_objective, samples
from contrastive_jax.parallel.mesh import MeshSpec, put_batch
from contrastive_jax.training.run import Run
from contrastive_jax.training.state import StateSpec
from tests import tiny
from tests.objectives.stepping import DIM, PAIRS, SAMPLES, batch_of, stepping, unit

OPTIONS = {"gamma": 0.7, "rho": 0.4, "temperature": 0.2, "smallest": 0.05, "largest": 0.6, "rate": 0.1, "momentum": 0.8}


def chosen(**options):
  return {"individual_temperatures": OPTIONS | options}


class Reference:
  """Algorithm 1 as it is written: running maximum b, running mean u, a loop over pairs, float64."""

  def __init__(self, **options):
    self.options = OPTIONS | options
    self.tau, self.u, self.b, self.v = (np.zeros((2, SAMPLES)) for _ in range(4))
    self.tau += self.options["temperature"]
    self.visited = np.zeros(SAMPLES, bool)

  def step(self, image, text, group, rows, gamma=OPTIONS["gamma"]):
    """Gradients by both sides' embeddings, and the objective's value."""
    similarities = image @ text.T
    d_similarities = np.zeros_like(similarities)
    value = 0.0
    for side in (0, 1):
      matrix, slopes = (similarities, d_similarities) if side == 0 else (similarities.T, d_similarities.T)
      for i, sample in enumerate(rows):
        negative = group != group[i]
        if not negative.any():
          continue
        tau = self.tau[side, sample]
        h = (matrix[i] - matrix[i, i])[negative]
        b = (h / tau).max() if not self.visited[sample] else max(self.b[side, sample], (h / tau).max())
        g = np.exp(h / tau - b).mean()
        newest = gamma if self.visited[sample] else 1.0
        u = (1 - newest) * self.u[side, sample] * np.exp(self.b[side, sample] - b) + newest * g
        w = np.exp(h / tau - b) / u
        slope = np.log(u) + b + self.options["rho"] - np.mean(w * h / tau)
        v = self.v[side, sample] + self.options["momentum"] * (np.clip(slope, -5, 5) - self.v[side, sample])
        value += tau * (np.log(u) + b + self.options["rho"]) / len(rows)
        slopes[i, negative] += w / negative.sum() / len(rows)
        slopes[i, i] -= w.mean() / len(rows)
        self.u[side, sample], self.b[side, sample], self.v[side, sample] = u, b, v
        bounds = self.options["smallest"], self.options["largest"]
        self.tau[side, sample] = np.clip(tau - self.options["rate"] * v, *bounds)
    self.visited[rows] = True
    return d_similarities @ text, d_similarities.T @ image, value


@pytest.mark.parametrize(
  ("devices", "strategy"),
  [
    pytest.param(1, "gather", marks=(pytest.mark.slow, pytest.mark.extra)),
    (4, "ring"),
    pytest.param(8, "gather", marks=(pytest.mark.slow, pytest.mark.extra)),
  ],
)
def test_three_steps_equal_the_algorithm_in_float64(devices, strategy, rng):
  mesh, _, state, run = stepping("individual_temperatures", chosen(strategy=strategy), devices)
  reference = Reference()
  for step in range(3):
    image, text = unit(rng), unit(rng)
    group = rng.integers(0, 12, PAIRS) if step < 2 else np.arange(PAIRS)
    rows = rng.permutation(SAMPLES)[:PAIRS]
    put = [put_batch(mesh, np.float32(side)) for side in (image, text)]
    (value, (metrics, state)), gradients = run(tuple(put), put_batch(mesh, batch_of(group, rows)), state)
    before = reference.tau.copy()
    d_image, d_text, expected = reference.step(np.float64(put[0]), np.float64(put[1]), group, rows)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    for side, truth in (("image", d_image), ("text", d_text)):
      got = gradients[side]
      np.testing.assert_allclose(got, truth, atol=1e-5 * np.abs(truth).max())
    assert metrics["temperature_image"] == pytest.approx(before[0, rows].mean(), rel=1e-5)
    assert metrics["temperature_text"] == pytest.approx(before[1, rows].mean(), rel=1e-5)
    kept = state["individual_temperatures"]
    np.testing.assert_array_equal(np.asarray(kept["seen"][:SAMPLES]) > 0, reference.visited)
    for side, name in enumerate(("image", "text")):
      found = {key: np.asarray(leaf[:SAMPLES]) for key, leaf in kept[name].items()}
      np.testing.assert_allclose(found["temperature"], reference.tau[side], rtol=2e-5)
      np.testing.assert_allclose(found["momentum"], reference.v[side], atol=1e-4)
      seen = reference.u[side] > 0
      log_mean = np.log(reference.u[side][seen]) + reference.b[side][seen]
      np.testing.assert_allclose(found["log_mean"][seen], log_mean, atol=2e-5)


@pytest.mark.parametrize(("devices", "strategy"), [(2, "ring"), pytest.param(8, "gather", marks=pytest.mark.slow)])
def test_one_temperature_and_a_weight_of_the_batch_that_falls_along_a_cosine(devices, strategy, rng):
  """SogCLR is the algorithm without steps of the temperatures: gamma is 1, 0.85 and then 0.7."""
  options = {"gamma": 0.7, "gamma_steps": 2, "temperature": 0.2, "strategy": strategy}
  mesh, _, state, run = stepping("sogclr", {"sogclr": options}, devices)
  reference = Reference(rate=0.0, rho=0.0)
  for step, gamma in enumerate((1.0, 0.85, 0.7, 0.7)):
    put = [put_batch(mesh, np.float32(unit(rng))) for _ in range(2)]
    group, rows = rng.integers(0, 12, PAIRS), rng.permutation(SAMPLES)[:PAIRS]
    (value, (_, state)), gradients = run(tuple(put), put_batch(mesh, batch_of(group, rows)), state)
    d_image, d_text, expected = reference.step(np.float64(put[0]), np.float64(put[1]), group, rows, gamma)
    assert float(value) == pytest.approx(expected, rel=1e-5), step
    for side, truth in (("image", d_image), ("text", d_text)):
      np.testing.assert_allclose(gradients[side], truth, atol=1e-5 * np.abs(truth).max())
  kept = state["sogclr"]
  assert int(kept["steps"]) == 2
  for side, name in enumerate(("image", "text")):
    seen = reference.u[side] > 0
    log_mean = np.log(reference.u[side][seen]) + reference.b[side][seen]
    np.testing.assert_allclose(np.asarray(kept[name][:SAMPLES])[seen], log_mean, atol=2e-5)
    assert not np.any(np.asarray(kept[name][:SAMPLES])[~reference.visited])


def test_with_gamma_one_the_gradient_is_that_of_the_temperature_times_log_mean_exp(rng):
  image, text = unit(rng), unit(rng)
  fresh = Samples(jnp.zeros(PAIRS), jnp.full(PAIRS, 0.3), jnp.zeros(PAIRS))

  def ours(image, text):
    return losses.individual_temperature_loss(image, text, fresh, fresh, jnp.ones(PAIRS, jnp.int32), gamma=1.0)[0]

  def closed(image, text):
    similarities = image @ text.T
    h = similarities - jnp.diag(similarities)[:, None], similarities.T - jnp.diag(similarities)[:, None]
    off = ~jnp.eye(PAIRS, dtype=bool)
    return sum(jnp.mean(0.3 * jax.nn.logsumexp(jnp.where(off, m / 0.3, -jnp.inf), axis=1)) for m in h)

  got, truth = (jax.grad(loss, (0, 1))(jnp.float32(image), jnp.float32(text)) for loss in (ours, closed))
  for one, other in zip(got, truth, strict=True):
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_the_values_of_the_fixture():
  """Of images to texts: u = (e^-0.8, e^-1.6), and with one negative the slope is rho."""
  image, text = jnp.eye(2), jnp.asarray([[1, 0], [0.6, 0.8]])
  fresh = Samples(jnp.zeros(2), jnp.full(2, 0.5), jnp.zeros(2))
  _, (images, _), _ = losses.individual_temperature_loss(
    image, text, fresh, fresh, jnp.zeros(2, jnp.int32), rho=0.25, momentum=1.0
  )
  np.testing.assert_allclose(np.exp(images.log_mean), [0.449329, 0.201897], rtol=1e-5)
  np.testing.assert_allclose(images.momentum, 0.25, atol=1e-5)


@pytest.mark.parametrize(
  ("rho", "end"), [(1e4, 0.05), pytest.param(-1e4, 0.6, marks=(pytest.mark.slow, pytest.mark.extra))]
)
def test_rho_drives_the_temperatures_to_their_bounds(rho, end, rng):
  mesh, _, state, run = stepping("individual_temperatures", chosen(rho=rho), 2)
  rows = np.arange(PAIRS)
  batch = put_batch(mesh, batch_of(rows, rows))
  embeddings = tuple(put_batch(mesh, np.float32(unit(rng))) for _ in range(2))
  for _ in range(4):
    (_, (_, state)), _ = run(embeddings, batch, state)
  temperatures = np.asarray(state["individual_temperatures"]["image"]["temperature"])
  np.testing.assert_allclose(temperatures[:PAIRS], end, rtol=1e-6)
  np.testing.assert_allclose(temperatures[PAIRS:], OPTIONS["temperature"], rtol=1e-6)


def test_a_pair_without_negatives_counts_nothing_and_is_remembered_as_it_was(rng):
  mesh, _, state, run = stepping("individual_temperatures", chosen(), 4)
  rows = np.arange(PAIRS)
  embeddings = tuple(put_batch(mesh, np.float32(unit(rng))) for _ in range(2))
  (value, (_, after)), gradients = run(embeddings, put_batch(mesh, batch_of(np.zeros(PAIRS), rows)), state)
  assert float(value) == 0 and not any(np.any(side) for side in gradients.values())
  for name in ("image", "text"):
    jax.tree.map(
      np.testing.assert_array_equal, after["individual_temperatures"][name], state["individual_temperatures"][name]
    )


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_rows_are_read_and_written_back_on_any_mesh(devices, rng):
  """A row that several pairs share takes the value of the first one."""
  mesh = MeshSpec().make(jax.devices()[:devices])
  state = rng.standard_normal(64).astype(np.float32)
  rows = rng.integers(0, 64, 32).astype(np.int32)
  assert len(set(rows)) < len(rows)
  fresh = rng.standard_normal(32).astype(np.float32)
  over = jax.sharding.PartitionSpec(("data", "fsdp"))

  def local(state, rows, fresh):
    names = ("data", "fsdp")
    return samples.read(state, rows, names), samples.write(state, rows, fresh, names)

  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=over, out_specs=over))
  read, written = run({"a": state, "b": np.arange(64, dtype=np.int32)}, rows, {"a": fresh, "b": rows + 100})
  np.testing.assert_array_equal(read["a"], state[rows])
  np.testing.assert_array_equal(read["b"], rows)
  expected = state.copy()
  for row, value in zip(rows[::-1], fresh[::-1], strict=True):
    expected[row] = value
  np.testing.assert_array_equal(written["a"], expected)
  changed = np.arange(64)
  changed[rows] = rows + 100
  np.testing.assert_array_equal(written["b"], changed)


def test_what_cannot_be_kept_is_refused():
  objective = make_objective({"individual_temperatures": 1.0}, {})
  with pytest.raises(UserError, match=r"set loss_options.individual_temperatures.samples"):
    objective.state(Sizes(DIM))
  few = make_objective({"individual_temperatures": 1.0}, {"individual_temperatures": {"samples": 10}})
  with pytest.raises(UserError, match="samples=10 is less than the 40 samples"):
    few.state(Sizes(DIM, samples=40))
  with pytest.raises(UserError, match=r"temperature=0.01 is not between .*smallest=0.1"):
    make_objective({"individual_temperatures": 1.0}, {"individual_temperatures": {"smallest": 0.1}})
  config = tiny.get_config()
  spec = StateSpec(
    Run.from_config(config).model,
    optax.sgd(1.0),
    (),
    False,
    MeshSpec().make(jax.devices()[:3]),
    MeshSpec(),
    objective,
    Sizes(DIM, samples=40),
  )
  with pytest.raises(UserError, match=r"4096 rows .* do not divide over 3 devices"):
    spec.shardings()
