"""Terms that compare pairs in a train step, and the memory of their losses."""

import functools

import jax
import jax.numpy as jnp
import pytest

from contrastive_jax import losses
from contrastive_jax.parallel.mesh import put_batch
from contrastive_jax.training.run import Run
from data import build
from tests import tiny

PAIR_TERMS = (
  "dcl",
  "cwcl",
  "mann_whitney",
  "mv_infonce",
  "mv_dhel",
  "cacr",
  "groco",
  "gram",
  "mochi",
  "mixup",
  "soft_clip",
)


def trained(config, devices, accumulation, steps=2):
  config.accumulation = accumulation
  run = Run.from_config(config)
  sources = build.open_sources(config, run.source_names())
  tokenizer = build.make_tokenizer(config.tokenizer, config.model.text.vocab_size, sources.values())
  pipeline = build.make_pipeline(run, run.segments, sources, tokenizer, (0, 1))
  mesh = run.make_mesh(jax.devices()[:devices])
  spec, step = run.build(mesh)
  state, rows = spec.create(0), []
  for number in range(steps):
    state, metrics = step(state, put_batch(mesh, pipeline.batch(number).on_device()))
    rows.append({name: float(value) for name, value in metrics.items()})
  return rows


@pytest.mark.slow
def test_terms_train_and_accumulation_changes_nothing():
  config = tiny.get_config()
  config.objective = dict.fromkeys(("softmax", *PAIR_TERMS), 0.1)
  config.loss_options.softmax.update({"label_smoothing": 0.0, "hard_top_k": 8})
  config.loss_options.mochi.update({"hardest": 8, "mixed": 4})
  whole, parts = trained(config, 1, 1), trained(config, 2, 2)
  for first, second in zip(whole, parts, strict=True):
    assert first["finite"] == second["finite"] == 1
    for name in PAIR_TERMS:
      assert first[f"loss_{name}"] == pytest.approx(second[f"loss_{name}"], rel=2e-4)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)
  assert whole[1]["loss"] != whole[0]["loss"]


IMAGE_AND_TEXT = {
  "hard": functools.partial(losses.hard_softmax_loss, top_k=4, logit_scale=9.0),
  "dcl": functools.partial(losses.decoupled_loss, sigma=0.5, intra_modal=True, logit_scale=9.0),
  "cwcl": functools.partial(losses.cwcl_loss, logit_scale=9.0),
  "mann_whitney": functools.partial(losses.mann_whitney_loss, logit_scale=9.0),
  "soft_clip": functools.partial(losses.soft_target_loss, logit_scale=9.0),
  "mv_infonce": lambda image, text, **options: losses.multi_view_softmax_loss(
    [image, text], logit_scale=9.0, **options
  ),
  "cacr": lambda *views, **options: losses.attraction_repulsion_loss(views, **options),
  "gram": lambda image, text, **options: losses.gram_loss([image, text, text[::-1]], logit_scale=9.0, **options),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_AND_TEXT)
def test_temporary_memory_is_some_tiles_and_not_the_matrix(name):
  def size(pairs):
    rows = jax.ShapeDtypeStruct((pairs, 64), jnp.float32)
    function = jax.jit(jax.grad(lambda *sides: IMAGE_AND_TEXT[name](*sides, tile=128)[0], argnums=(0, 1)))
    return function.lower(rows, rows).compile().memory_analysis().temp_size_in_bytes

  small, large = size(2048), size(8192)
  # A block of two million comparisons is what Mann-Whitney holds.
  assert large - small < 6144 * (8 * 64 + 64) * 4
  assert large < 8192**2 * 4 / 2
