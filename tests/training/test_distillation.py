"""A teacher beside the student: what it sees, what the step makes of it on any mesh, and what no state holds of it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax.batch import Batch, ImageBatch, Targets, TeacherInputs, TextBatch
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.models.outputs import TowerOutputs
from contrastive_jax.objectives import Sizes, make_objective
from contrastive_jax.parallel.mesh import MeshSpec, batch_sharding, parameter_shardings, put_batch
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.training import distillation
from contrastive_jax.training.checkpoint import Checkpoints, restore_params
from contrastive_jax.training.distillation import Teacher
from contrastive_jax.training.initialize import initial_state
from contrastive_jax.training.run import check_replay
from contrastive_jax.training.state import StateSpec
from contrastive_jax.training.step import make_train_step, make_value_and_grad
from tests.keys import keys_of

PAIRS = 32
WEIGHTS = {"softmax": 1.0, "distill_features": 0.5, "distill_similarity": 2.0, "distill_relational": 3.0}


def make_model(embed_dim, image_size, patch_size, vocab_size, length, **blocks):
  blocks = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 24, "remat": "none", **blocks}
  return presets.resolve(
    "siglip_ti16",
    {
      "image": {"image_size": image_size, "patch_size": patch_size, "projection": True, "transformer": blocks},
      "text": {
        "vocab_size": vocab_size,
        "length": length,
        "pool": "mean",
        "attend_padding": False,
        "transformer": blocks,
      },
      "embed_dim": embed_dim,
    },
  )


STUDENT = make_model(16, 8, 4, 19, 5)
# Another width, resolution, patch size, vocabulary and text length.
TEACHER = make_model(12, 18, 6, 23, 7, width=24)


def make_spec(objective=None, devices=1, fsdp=1, optimizer=None, average=False):
  rules = MeshSpec(fsdp=fsdp)
  return StateSpec(
    STUDENT,
    optimizer or optax.sgd(1.0),
    frozen=(),
    average=average,
    mesh=rules.make(jax.devices()[:devices]),
    rules=rules,
    objective=objective,
    sizes=Sizes(STUDENT.embed_dim, TEACHER.embed_dim),
  )


@functools.cache
def teacher_params():
  rng = np.random.default_rng(5)
  params = jax.device_get(jax.jit(functools.partial(dual_encoder.init, TEACHER))(jax.random.key(0)))
  return jax.tree.map(lambda leaf: leaf + np.float32(0.3) * rng.standard_normal(leaf.shape, np.float32), params)


def make_teacher(mesh, accumulate=1):
  rules = MeshSpec()
  placed = parameter_shardings(mesh, rules, teacher_params(), dual_encoder.logical_axes(TEACHER))
  return Teacher(TEACHER, jax.device_put(teacher_params(), placed), mesh, accumulate=accumulate)


def squares(rng, pairs, config):
  side = config.image.image_size // config.image.patch_size
  y, x = np.divmod(np.arange(side * side), side)
  coords = np.tile(np.stack([0 * y, y, x], axis=1).astype(np.int16), (pairs, 1, 1))
  pixels = rng.integers(0, 256, (pairs, side * side, 3 * config.image.patch_size**2), np.uint8)
  return ImageBatch(pixels, coords)


def captions(rng, pairs, config):
  length = config.text.length
  mask = np.arange(length) < rng.integers(1, length + 1, (pairs, 1))
  return TextBatch(rng.integers(0, config.text.vocab_size, (pairs, length), np.int32), mask)


def make_batch(pairs=PAIRS, seed=1):
  rng = np.random.default_rng(seed)
  keys = keys_of(rng.integers(0, pairs, pairs))
  student, teacher = ((squares(rng, pairs, config), captions(rng, pairs, config)) for config in (STUDENT, TEACHER))
  return Batch(*student, keys, teacher=TeacherInputs(*teacher))


def packed(batch):
  """The same pairs with the images of two in a row, and so their captions."""
  pairs = batch.pairs
  locations = np.stack([np.arange(pairs) // 2, np.arange(pairs) % 2 + 1], axis=1).astype(np.int32)

  def two_a_row(leaf):
    return leaf.reshape(pairs // 2, -1, *leaf.shape[2:])

  def segment_ids(real):
    numbers = np.where(real, np.arange(pairs)[:, None] % 2 + 1, 0).astype(np.int16)
    return two_a_row(numbers)

  image, text = batch.image, batch.text
  return dataclasses.replace(
    batch,
    image=ImageBatch(
      two_a_row(image.patches), two_a_row(image.coords), segment_ids(np.ones(image.patches.shape[:2], bool)), locations
    ),
    text=TextBatch(two_a_row(text.tokens), None, segment_ids(text.mask), locations),
  )


def embedded(config, params, image, text):
  """What a model makes of images and padded captions on one device."""
  graphdef, _ = dual_encoder.abstract(config)

  @jax.jit
  def run(params, image, text):
    model = dual_encoder.merge(graphdef, params)
    return model.encode_image(image), model.encode_text(text.tokens, text.mask)

  return jax.device_get(run(params, image, text))


def prepared(spec, batch, accumulate=1):
  return make_teacher(spec.mesh, accumulate).targets(put_batch(spec.mesh, batch.on_device()))


@functools.cache
def initial_params(distils):
  """Drawn once: what they are does not depend on the mesh."""
  weights = WEIGHTS if distils else {"softmax": 1.0}
  return jax.device_get(make_spec(make_objective(weights, {})).create(0).params)


def factors_of(objective, factor):
  return {name: factor for name, (_, term) in objective.terms.items() if term.distils}


def differentiate(objective, batch, devices=1, fsdp=1, accumulate=1, factor=1.0):
  spec = make_spec(objective, devices, fsdp)
  run = jax.jit(make_value_and_grad(spec, accumulate=accumulate))
  params = jax.device_put(initial_params(objective.distils), spec.shardings().params)
  factors = factors_of(objective, factor)
  (loss, (metrics, _)), gradients = run(params, {}, prepared(spec, batch, accumulate), jax.random.key(7), factors)
  return gradients, {"loss": float(loss), **{name: float(value) for name, value in metrics.items()}}


@functools.cache
def in_one_piece(pack=False, distil=True):
  batch = packed(make_batch()) if pack else make_batch()
  return differentiate(make_objective(WEIGHTS if distil else {"softmax": 1.0}, {}), batch)


def assert_close(got, expected, tolerance=1e-5):
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
    bound = tolerance * max(np.abs(other).max(), 1e-3 * largest)
    np.testing.assert_allclose(one, other, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("devices", "fsdp", "accumulate"), [(1, 1, 1), (8, 4, 2)])
def test_targets_are_what_the_teacher_makes_of_its_own_inputs(devices, fsdp, accumulate):
  mesh = MeshSpec(fsdp=fsdp).make(jax.devices()[:devices])
  batch = make_batch()
  image, text = embedded(TEACHER, teacher_params(), batch.teacher.image, batch.teacher.text)
  teacher = make_teacher(mesh, accumulate)
  got = teacher.targets(put_batch(mesh, batch.on_device()))
  assert got.teacher is None and teacher.targets(got) is got
  np.testing.assert_allclose(got.targets.image, image, atol=1e-5)
  np.testing.assert_allclose(got.targets.text, text, atol=1e-5)
  for target in jax.tree.leaves(got.targets):
    assert (target.shape, target.dtype) == ((PAIRS, TEACHER.embed_dim), jnp.float32)
    assert target.sharding.is_equivalent_to(batch_sharding(mesh), 2)


def test_the_loss_is_the_sum_of_its_terms(rng):
  """Against float64."""
  batch = make_batch()
  student = embedded(STUDENT, dual_encoder.init(STUDENT, jax.random.key(0)), batch.image, batch.text)
  image, text = (np.asarray(side, np.float64) for side in student)
  targets = jax.device_get(prepared(make_spec(make_objective(WEIGHTS, {})), batch).targets)
  t_image, t_text = (np.asarray(x, np.float64) for x in (targets.image, targets.text))
  kernel = rng.normal(size=(16, 12))
  objective = make_objective(WEIGHTS, {"distill_features": {"distance": "mse"}})
  batch = dataclasses.replace(batch, teacher=None, targets=targets)
  mesh = MeshSpec().make(jax.devices()[:4])
  embeddings = {name: put_batch(mesh, np.float32(side)) for name, side in (("image", image), ("text", text))}
  model = dual_encoder.merge(dual_encoder.abstract(STUDENT)[0], dual_encoder.init(STUDENT, jax.random.key(0)))
  on_mesh = put_batch(mesh, batch.on_device())
  params = {"distill_features": {"kernel": jnp.float32(kernel)}}

  @jax.jit
  def both_kinds(embeddings, batch):
    distil = {"factors": factors_of(objective, jnp.float32(0.25))}
    outputs = {name: TowerOutputs(side, None, None) for name, side in embeddings.items()}
    return (
      objective.global_loss(embeddings, batch, jnp.float32(12), None, mesh, **distil),
      objective.local_loss(model, outputs, batch, objective.counts(batch), params=params, **distil),
    )

  (value, (metrics, _)), (local, more) = both_kinds(embeddings, on_mesh)
  features = np.mean(np.sum((image @ kernel - t_image) ** 2, axis=1))
  assert more["loss_distill_features"] == pytest.approx(features, rel=1e-5)
  apart = ~np.eye(PAIRS, dtype=bool)
  relational = np.mean(((image @ image.T - t_image @ t_image.T) ** 2)[apart])
  assert metrics["loss_distill_relational"] == pytest.approx(relational, rel=1e-5)

  def log_softmax(logits, axis):
    return logits - np.log(np.sum(np.exp(logits), axis=axis, keepdims=True))

  both = [(log_softmax(12 * image @ text.T, a), log_softmax(20 * t_image @ t_text.T, a)) for a in (0, 1)]
  similarity = sum(np.sum(np.exp(p) * (p - q)) for q, p in both) / (2 * PAIRS)
  assert metrics["loss_distill_similarity"] == pytest.approx(similarity, rel=1e-5)
  total = metrics["loss_softmax"] + 0.25 * (0.5 * features + 2 * similarity + 3 * relational)
  assert value + local == pytest.approx(float(total), rel=1e-5)


@pytest.mark.slow
def test_gradients_equal_those_of_one_device_in_one_piece():
  gradients, metrics = differentiate(make_objective(WEIGHTS, {}), make_batch(), devices=8, fsdp=4, accumulate=2)
  expected, numbers = in_one_piece()
  assert metrics == pytest.approx(numbers, rel=1e-5)
  assert_close(gradients, expected)
  kernel = gradients["objective"]["distill_features"]["kernel"]
  assert np.abs(kernel).max() > 0
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


@pytest.mark.slow
def test_packed_images_and_captions_are_cut_with_their_pairs():
  batch = packed(make_batch())
  gradients, metrics = differentiate(make_objective(WEIGHTS, {}), batch, devices=2, accumulate=4)
  expected, numbers = in_one_piece(pack=True)
  assert metrics == pytest.approx(numbers, rel=1e-5)
  assert_close(gradients, expected)


@pytest.mark.parametrize(
  "targets",
  [
    pytest.param("without", marks=pytest.mark.slow),
    pytest.param("factor 0", marks=(pytest.mark.slow, pytest.mark.extra)),
  ],
)
def test_a_stage_without_distillation_trains_the_towers_alone(targets):
  batch = make_batch()
  alone, _ = in_one_piece(distil=False)
  if targets == "without":
    gradients, metrics = differentiate(make_objective(WEIGHTS, {}), dataclasses.replace(batch, teacher=None))
    assert not any(name.startswith("loss_distill") for name in metrics)
  else:
    gradients, metrics = differentiate(make_objective(WEIGHTS, {}), batch, factor=0.0)
    assert metrics["loss_distill_features"] > 0
  learned = gradients.pop("objective")
  assert not np.any(learned["distill_features"]["kernel"])
  assert metrics["loss"] == pytest.approx(metrics["loss_softmax"], rel=1e-6)
  assert_close(gradients, alone)


def test_nothing_of_the_teacher_is_in_the_state():
  objective = make_objective(WEIGHTS, {})
  adam = {"optimizer": optax.adam(1e-3), "average": True}
  with_teacher = make_spec(objective, 8, 4, **adam).abstract()
  without = make_spec(make_objective({"softmax": 1.0}, {}), 8, 4, **adam).abstract()

  def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  kernel = STUDENT.embed_dim * TEACHER.embed_dim
  assert size(with_teacher.params) == size(without.params) + kernel
  assert size(with_teacher.average) == size(without.average) + kernel
  assert size(with_teacher.opt_state) == size(without.opt_state) + 2 * kernel
  assert jax.tree.structure(with_teacher.evaluated()) == jax.tree.structure(without.evaluated())


@pytest.mark.slow
def test_the_student_learns_from_its_teacher_by_a_schedule():
  """Each step weighs the terms as told, and what is distilled falls while it counts."""
  objective = make_objective({"softmax": 1e-3, "distill_features": 1.0}, {})
  spec = make_spec(objective, 2, 2, optimizer=optax.adam(3e-3))
  step = make_train_step(
    spec,
    lambda _: 3e-3,
    seed=0,
    factors=lambda step: {"distill_features": jnp.where(step < 30, 1.0, 0.25)},
  )
  state, batch = spec.create(0), prepared(spec, make_batch())
  history = []
  for _ in range(32):
    state, metrics = step(state, batch)
    history.append({name: float(value) for name, value in metrics.items()})
  assert history[-3]["loss_distill_features"] < 0.5 * history[0]["loss_distill_features"]
  for row, weight in ((history[0], 1.0), (history[31], 0.25)):
    assert row["factor_distill_features"] == weight
    total = 1e-3 * row["loss_softmax"] + weight * row["loss_distill_features"]
    assert row["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_a_run_with_projections_is_evaluated_resumed_and_started_from(tmp_path):
  spec = make_spec(make_objective(WEIGHTS, {}), average=True)
  state = spec.create(3)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(spec.abstract())
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  fields = {"model": dataclasses.asdict(STUDENT), "compute_dtype": "float32"}
  fields["model"].pop("dtype")
  (tmp_path / "config.json").write_text(json.dumps(fields))
  tokenizers.train_bpe(["a red dog", "a blue cat"], 300).save(tmp_path / "tokenizer")
  loaded = distillation.load_teacher(tmp_path, spec.mesh)
  assert loaded.dim == 16 and loaded.config.image == STUDENT.image
  batch = make_batch()
  as_teacher = dataclasses.replace(batch, teacher=TeacherInputs(batch.image, batch.text))
  targets = loaded.targets(put_batch(spec.mesh, as_teacher.on_device())).targets
  image, _ = embedded(STUDENT, state.evaluated(), batch.image, batch.text)
  np.testing.assert_allclose(targets.image, image, atol=1e-5)

  started = initial_state(spec, seed=4, init_from=str(tmp_path))
  fresh = spec.create(4).params["objective"]
  jax.tree.map(np.testing.assert_array_equal, started.evaluated(), state.evaluated())
  jax.tree.map(np.testing.assert_array_equal, started.params["objective"], fresh)


@pytest.mark.slow
def test_a_checkpoint_with_the_older_name_of_projections_is_read(tmp_path):
  """They stood under "projections", in the parameters, the average and the optimiser's state."""
  spec = make_spec(make_objective(WEIGHTS, {}), optimizer=optax.adam(1e-3), average=True)
  state = spec.create(3)

  def older(tree):
    return {{"objective": "projections"}.get(name, name): part for name, part in tree.items()}

  adam, *rest = state.opt_state
  opt_state = (adam._replace(mu=older(adam.mu), nu=older(adam.nu)), *rest)
  before = dataclasses.replace(state, params=older(state.params), average=older(state.average), opt_state=opt_state)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(before, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(spec.abstract())
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  evaluated = restore_params(tmp_path, None).params
  jax.tree.map(np.testing.assert_array_equal, evaluated, jax.device_get(state.evaluated()))


def test_what_does_not_go_together_is_named():
  options = {"distill_features": {"projection": False}}
  bare = make_objective({"softmax": 1.0, "distill_features": 1.0}, options)
  assert bare.params(Sizes(16, 16)) == {}
  with pytest.raises(UserError, match=r"projection=False needs equal embedding sizes, the model has 16 .* 12"):
    bare.params(Sizes(16, 12))
  with pytest.raises(UserError, match=r"distill_features.distanse is not an option .*did you mean 'distance'"):
    make_objective({"softmax": 1.0, "distill_features": 1.0}, {"distill_features": {"distanse": "mse"}})
  with pytest.raises(UserError, match=r"distance='l1' is unknown"):
    make_objective({"softmax": 1.0, "distill_features": 1.0}, {"distill_features": {"distance": "l1"}})
  with pytest.raises(UserError, match=r"distill_similarity.temperature=-1.0 must be above 0"):
    make_objective({"softmax": 1.0, "distill_similarity": 1.0}, {"distill_similarity": {"temperature": -1.0}})
  with pytest.raises(UserError, match="a cache of targets does not hold"):
    mesh = MeshSpec().make(jax.devices()[:1])
    embeddings = {"image": jnp.eye(2), "text": jnp.eye(2)}
    batch = dataclasses.replace(make_batch(2), targets=Targets(jnp.eye(2)))
    similarity = make_objective({"softmax": 1.0, "distill_similarity": 1.0}, {})
    similarity.global_loss(embeddings, batch, jnp.float32(1), None, mesh)


def test_what_is_replayed_is_a_source_of_the_run_and_has_a_term():
  objective = make_objective({"softmax": 1.0, "distill_positives": 0.5}, {})
  check_replay(("old",), ["new", "old"], objective)
  with pytest.raises(UserError, match=r"^distillation\.replay='odl' is unknown \(did you mean 'old'\?\)"):
    check_replay(("odl",), ["new", "old"], objective)
  with pytest.raises(UserError, match=r"^distillation\.replay=\('old',\) has no use: add distill_positives"):
    check_replay(("old",), ["new", "old"], make_objective(WEIGHTS, {}))
  with pytest.raises(UserError, match=r"has 12 features, and model\.embed_dim=16"):
    make_spec(objective).shardings()
