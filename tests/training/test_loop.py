"""What the loop does every so many steps, around a step that only counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from contrastive_jax.parallel.mesh import MeshSpec, replicated
from contrastive_jax.runs import read_json_lines
from contrastive_jax.schedule.segments import Segment
from contrastive_jax.training import loop
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.metrics import Writer
from contrastive_jax.training.state import TrainState
from data.pipeline import Pipeline
from tests.data.toy import ToySource, WordTokenizer


@jax.jit
def counting(state, batch):
  number = state.step.astype(jnp.float32)
  metrics = {"loss": number, "grad_norm": number, "learning_rate": number, "finite": jnp.array(True)}
  return dataclasses.replace(state, step=state.step + 1), metrics


def pipeline(steps):
  segments = [Segment(steps=steps, batch_size=2, sources=(("toy", 1),), resolution=8)]
  return Pipeline(segments, {"toy": ToySource("toy", 8)}, WordTokenizer(), text_length=8, patch_size=4, seed=0)


@pytest.mark.parametrize(
  ("options", "evaluated"),
  [
    ({"eval_every": 2}, [2, 4]),  # Not 6: the caller scores the state that the run ends with.
    ({"eval_every": 4}, [4]),
    ({"eval_every": 3, "stages": (("a", 0), ("b", 2), ("c", 4))}, [2, 3, 4]),
    ({}, []),
  ],
)
def test_the_last_step_is_left_to_the_caller(options, evaluated, tmp_path):
  mesh = MeshSpec().make(jax.devices()[:1])
  zeros = jax.device_put({"step": jnp.int32(0), "weight": jnp.zeros(3)}, replicated(mesh))
  state = TrainState(step=zeros["step"], params={"weight": zeros["weight"]}, opt_state={})
  writer, scored = Writer(tmp_path, restored_step=0), []

  def evaluate(state):
    scored.append(int(state.step))
    return {"score": float(state.step)}

  chosen = loop.LoopOptions(total_steps=6, log_every=5, checkpoint_every=5, **options)
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    arguments = tmp_path, state, counting, pipeline(6), checkpoints, writer, chosen
    state, complete = loop.train(*arguments, mesh=mesh, metadata={}, evaluate=evaluate)
    assert complete and int(state.step) == 6 and checkpoints.steps[-1] == 6
  writer.close()
  assert scored == evaluated
  rows = [row for row in read_json_lines(tmp_path / "metrics.jsonl") if "score" in row]
  assert [(row["step"], row["score"]) for row in rows] == [(step, step) for step in evaluated]
