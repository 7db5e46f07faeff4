"""The train step: the same curve on any mesh, frozen parameters, the moving average, and what is not finite."""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax import losses
from contrastive_jax.errors import NonFiniteError, UserError
from contrastive_jax.objectives import GlobalTerm, Objective, make_objective
from contrastive_jax.parallel.mesh import MeshSpec, put_batch
from contrastive_jax.runs import read_json_lines, read_object
from contrastive_jax.training import config as run_config
from contrastive_jax.training import loop
from contrastive_jax.training import optimizer as optimizers
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.initialize import initial_state
from contrastive_jax.training.metrics import Writer
from contrastive_jax.training.run import Run
from contrastive_jax.training.step import make_train_step
from data import build
from tests import tiny


def small_config(**changes):
  config = tiny.get_config()
  config.total_steps = 20
  config.update(changes)
  return config


@pytest.fixture(scope="module")
def pipeline():
  config = small_config()
  resolved = Run.from_config(config)
  sources = build.open_sources(config, ("noto", "twemoji", "noto_tones", "twemoji_tones"))
  tokenizer = build.make_tokenizer(config.tokenizer, config.model.text.vocab_size, sources.values())
  return build.make_pipeline(resolved, resolved.segments, sources, tokenizer, (0, 1))


def run(config, pipeline, devices, steps=20):
  """Returns the specification, the step, the last state, and states and metrics after each step."""
  mesh = MeshSpec(**config.mesh).make(jax.devices()[:devices])
  spec, step = Run.from_config(config).build(mesh)
  state = spec.create(config.seed)
  history = []
  for number in range(steps):
    state, metrics = step(state, put_batch(mesh, pipeline.batch(number).on_device()))
    history.append((jax.device_get(state), {name: float(value) for name, value in metrics.items()}))
  return spec, step, state, history


def curve(history):
  return np.array([metrics["loss"] for _, metrics in history])


@pytest.fixture(scope="module")
def one_device(pipeline):
  return run(small_config(), pipeline, devices=1)


@pytest.mark.parametrize(
  ("devices", "mesh"),
  [
    (8, {}),
    pytest.param(8, {"fsdp": 4}, marks=pytest.mark.slow),
    pytest.param(8, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
  ],
)
def test_any_mesh_gives_the_same_curve(devices, mesh, one_device, pipeline):
  config = small_config()
  config.mesh.update(mesh)
  spec, _, state, history = run(config, pipeline, devices)
  np.testing.assert_allclose(curve(history), curve(one_device[3]), rtol=1e-4)
  kernel = state.params["image"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
  share = spec.mesh.shape["fsdp"] * spec.mesh.shape["tensor"]
  assert kernel.addressable_shards[0].data.size == kernel.size // share
  opt_state = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
  assert opt_state and all(leaf.sharding == kernel.sharding for leaf in opt_state)


def test_the_loss_falls(one_device):
  losses_seen = curve(one_device[3])
  assert losses_seen[-5:].mean() < losses_seen[:5].mean() - 0.05


def test_the_average_follows_its_recurrence(one_device):
  *_, history = one_device
  name = ("text", "tokens")
  average = None
  for number, (state, _) in enumerate(history):
    leaf, kept = state.params[name[0]][name[1]].astype(np.float64), state.average[name[0]][name[1]]
    decay = min(0.9, (1 + number) / (10 + number))
    average = kept.astype(np.float64) if average is None else decay * average + (1 - decay) * leaf
    np.testing.assert_allclose(kept, average, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_keep_their_bits_and_have_no_slots(pipeline):
  config = small_config(frozen=("image/",))
  spec, _, state, _ = run(config, pipeline, devices=8, steps=3)
  before = jax.device_get(spec.create(config.seed).params)
  jax.tree.map(np.testing.assert_array_equal, state.params["image"], before["image"])
  moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.params["text"], before["text"])
  assert all(jax.tree.leaves(moved))
  trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(before)) - sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(before["image"])
  )
  opt_state = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim or leaf.dtype == jnp.float32)
  assert opt_state <= 2 * trained + 8


@pytest.mark.slow
def test_the_logit_scale_is_brought_within_its_bounds(pipeline):
  """Weights that a run starts from may lie outside."""
  config = small_config(max_logit_scale=20.0)
  config.model.init_logit_scale = 1.0
  spec, step = Run.from_config(config).build(MeshSpec().make(jax.devices()[:1]))
  batch = pipeline.batch(0).on_device()
  for begin, end in ((25.0, 20.0), (0.5, 1.0)):
    state = spec.create(0)
    params = {**state.params, "log_logit_scale": jnp.log(begin)}
    state, metrics = step(dataclasses.replace(state, params=params), batch)
    assert float(metrics["logit_scale"]) == pytest.approx(begin)
    assert float(jnp.exp(state.params["log_logit_scale"])) == pytest.approx(end)


def poisoned(step_config, mesh, bad):
  """A train step whose loss is not a number when the group of a pair has a key with a certain first word."""

  class Poisoned(GlobalTerm):
    def __call__(self, pairs, params, state, **exchange):
      loss, metrics = losses.softmax_loss(
        pairs.image, pairs.text, group=pairs.keys, logit_scale=pairs.logit_scale, **exchange
      )
      met = jax.lax.psum(jnp.any(pairs.keys[:, 0, 0] == bad).astype(jnp.float32), exchange["axis_name"]) > 0
      return jnp.where(met, jnp.nan, 1.0) * loss, state, metrics

  skip, schedule = step_config.on_nonfinite == "skip", Run.from_config(step_config).schedule()
  built, _ = Run.from_config(step_config).build(mesh)
  spec = dataclasses.replace(built, objective=Objective({"poisoned": (1.0, Poisoned())}))
  return spec, make_train_step(spec, schedule, seed=0, average_decay=0.9, skip_nonfinite=skip)


def with_group(batch, word):
  keys = batch.keys.copy()
  keys[0, 0, 0] = word
  return dataclasses.replace(batch, keys=keys)


@pytest.mark.slow
def test_a_skipped_update_leaves_everything_but_the_step(pipeline):
  config = small_config(on_nonfinite="skip")
  mesh = MeshSpec().make(jax.devices()[:1])
  spec, step = poisoned(config, mesh, bad=777_000)
  state = spec.create(0)
  state, metrics = step(state, put_batch(mesh, pipeline.batch(0).on_device()))
  assert metrics["skipped"] == 0
  kept = jax.device_get(state)
  state, metrics = step(state, put_batch(mesh, with_group(pipeline.batch(1), 777_000).on_device()))
  assert metrics["skipped"] == 1 and int(state.step) == 2
  for part in ("params", "opt_state", "average"):
    jax.tree.map(np.testing.assert_array_equal, getattr(jax.device_get(state), part), getattr(kept, part))
  # The next update is the third of the schedule and the second of the moments.
  state, metrics = step(state, put_batch(mesh, pipeline.batch(2).on_device()))
  assert metrics["learning_rate"] == Run.from_config(config).schedule()(2)
  counted = optax.ScaleByAdamState, optax.ScaleByScheduleState
  nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, counted))
  assert {type(node): int(node.count) for node in nodes if isinstance(node, counted)} == dict(
    zip(counted, (2, 3), strict=True)
  )


@pytest.mark.slow
def test_no_step_is_logged_faster_than_it_ran(one_device, pipeline, tmp_path):
  """Neither is the last one, which has no other dispatched before its row is written."""
  spec, step, *_ = one_device

  def slept(loss):
    time.sleep(0.2)
    return loss

  @jax.jit
  def slow(state, batch):
    state, metrics = step(state, batch)
    loss = jax.pure_callback(slept, jax.ShapeDtypeStruct((), jnp.float32), metrics["loss"])
    return state, {**metrics, "loss": loss}

  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    writer = Writer(tmp_path, restored_step=0)
    options = loop.LoopOptions(total_steps=4, log_every=1)
    loop.train(tmp_path, spec.create(0), slow, pipeline, checkpoints, writer, options, mesh=spec.mesh, metadata={})
    writer.close()
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert min(row["step_seconds"] for row in rows) > 0.15
  assert all(0 <= row["data_wait_fraction"] <= 1 for row in rows)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(pipeline, tmp_path):
  class Poisoned:
    def iterate(self, start, stop):
      for number in range(start, stop):
        batch = pipeline.batch(number)
        yield number, with_group(batch, 777_000) if number == 6 else batch

    def ids(self, step):
      return pipeline.ids(step)

  config = small_config()
  mesh = MeshSpec().make(jax.devices()[:1])
  spec, step = poisoned(config, mesh, bad=777_000)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    options = loop.LoopOptions(total_steps=20, checkpoint_every=5)
    with pytest.raises(NonFiniteError) as caught:
      loop.train(tmp_path, spec.create(0), step, Poisoned(), checkpoints, None, options, mesh=mesh, metadata={})
    message = str(caught.value)
    assert message.startswith("step 7:") and "last good checkpoint: 5" in message
    assert read_object(tmp_path / "nonfinite_ids.json") == {"step": 7, "ids": pipeline.ids(6).tolist()}
    assert checkpoints.steps == [5]


@pytest.mark.parametrize(
  "way",
  [pytest.param("stop", marks=(pytest.mark.slow, pytest.mark.extra)), pytest.param("skip", marks=pytest.mark.slow)],
)
def test_a_rate_that_breaks_the_parameters_is_caught_at_its_step(way, pipeline, tmp_path):
  """Loss and gradient of step 7 are finite, the parameters after it are not."""

  def schedule(step):
    return jnp.where(step == 6, 1e39, 1e-3)  # Infinite in float32.

  config, mesh = small_config(on_nonfinite=way), MeshSpec().make(jax.devices()[:1])
  spec, _ = Run.from_config(config).build(mesh)
  spec = dataclasses.replace(spec, optimizer=optimizers.make_optimizer(config.optimizer, schedule))
  spec = dataclasses.replace(spec, objective=make_objective({"softmax": 1.0}, {}))
  step = make_train_step(spec, schedule, seed=0, average_decay=0.9, skip_nonfinite=way == "skip")
  options = loop.LoopOptions(total_steps=9, checkpoint_every=5, log_every=1, stop_on_nonfinite=way == "stop")
  writer = Writer(tmp_path, restored_step=0)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    training = (tmp_path, spec.create(0), step, pipeline, checkpoints, writer, options)
    if way == "stop":
      with pytest.raises(NonFiniteError, match=r"^step 7: .* updated parameters are not finite.* checkpoint: 5$"):
        loop.train(*training, mesh=mesh, metadata={})
      assert checkpoints.steps == [5]
      assert read_object(tmp_path / "nonfinite_ids.json")["step"] == 7
    else:
      state, complete = loop.train(*training, mesh=mesh, metadata={})
      assert complete and checkpoints.steps == [5, 9]
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
      skipped = [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl") if row["skipped"]]
      assert skipped == [7]
  writer.close()


@pytest.mark.slow
def test_starting_from_another_run_takes_whole_towers(pipeline, tmp_path):
  config = small_config()
  mesh = MeshSpec().make(jax.devices()[:1])
  spec, _ = Run.from_config(config).build(mesh)
  source = spec.create(seed=5)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(source, {})
    checkpoints.wait()
  (tmp_path / "config.json").write_text(json.dumps(run_config.as_json(config)))
  fresh = jax.device_get(spec.create(seed=6).params)
  for towers, taken in {"all": {"image", "text", "log_logit_scale"}, "text": {"text"}}.items():
    state = initial_state(spec, seed=6, init_from=str(tmp_path), towers=towers)
    for name, part in state.params.items():
      expected = (source.average if name in taken else fresh)[name]
      jax.tree.map(np.testing.assert_array_equal, part, expected)
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)


def test_weights_that_do_not_fit_are_named(pipeline, tmp_path):
  config = small_config()
  mesh = MeshSpec().make(jax.devices()[:1])
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(Run.from_config(config).build(mesh)[0].create(0), {})
    checkpoints.wait()
  (tmp_path / "config.json").write_text(json.dumps(run_config.as_json(config)))
  config.model.embed_dim = 24
  spec, _ = Run.from_config(config).build(mesh)
  with pytest.raises(UserError, match=r"image/projection/kernel is \[32, 16\] there and \[32, 24\] here"):
    initial_state(spec, seed=0, init_from=str(tmp_path))


def test_objectives_are_found_by_name():
  with pytest.raises(UserError, match="did you mean 'sigmoid'"):
    make_objective({"sigmoidal": 1.0}, {})
  with pytest.raises(UserError, match=r"loss_options\.softmax\.smoothing is not an option of 'softmax'"):
    make_objective({"softmax": 1.0}, {"softmax": {"smoothing": 0.1}})
  with pytest.raises(UserError, match=r"objective\.softmax=-1.0 must be above 0"):
    make_objective({"softmax": -1.0}, {})
  with pytest.raises(UserError, match="the objective alignment has no term that keeps embeddings apart"):
    make_objective({"alignment": 1.0}, {})
