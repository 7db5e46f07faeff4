"""Opens a trained model: a run directory, or weights that convert.py imported."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from contrastive_jax import paths
from contrastive_jax.errors import UserError
from contrastive_jax.inference import Model, placed
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.models.presets import model_config, with_tuples
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.runs import read_json
from contrastive_jax.schedule.stages import Stage
from contrastive_jax.training.checkpoint import restore_params
from contrastive_jax.training.fields import checked_config


def load(
  path: str | os.PathLike,
  step: int | None = None,
  *,
  mesh: Mesh | None = None,
  batch_size: int = 256,
  progress: bool = False,
) -> Model:
  """Opens a trained model.

  Args:
    path: a run directory, or weights imported by convert.py. Images are seen as in the last stage of the run.
    step: step of the checkpoint; None is the newest.
    mesh: the devices that share the work, as `Model` takes it; None is all of them.
    batch_size: number of images or texts that are encoded at once over the whole mesh.
    progress: whether a bar with rate and remaining time is shown on the terminal.

  Raises:
    UserError: if the directory is not a run, has no such checkpoint, or not the tokenizer of its checkpoint.
  """
  path = paths.typed("the model's directory", path)
  _refuse_foreign(path)
  run = checked_config(path)
  config = model_config(run)
  tokenizer = tokenizers.load(path / "tokenizer")
  mesh = MeshSpec().make() if mesh is None else mesh
  restored = restore_params(path, step, lambda part: placed(mesh, config, part))
  if restored.metadata.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
    raise UserError(f"{path / 'tokenizer'} is not the tokenizer that the checkpoint was trained with: put it back")
  if "image" not in restored.params:
    raise UserError(f"{path} holds a text tower alone: name it as init_from, with init_towers='text'")
  return Model(
    config,
    restored.params,
    tokenizer,
    **_last_stage(run, config),
    mesh=mesh,
    batch_size=batch_size,
    progress=progress,
    step=restored.step,
  )


def _refuse_foreign(path: Path) -> None:
  """Raises a `UserError` for weights of other libraries, which says how they are imported."""
  described = path / "config.json"
  kind = ""
  if described.is_file():
    config = read_json(described)
    if isinstance(config, dict) and ("model_type" in config or "architectures" in config):
      kind = "huggingface"
  elif (path / "model.safetensors").is_file():
    kind = "huggingface"
  if (path / "open_clip_config.json").is_file():
    kind = "open_clip"
  if kind:
    raise UserError(
      f"{path} holds weights in the format of another library: import them with "
      f"python convert.py --from={kind}:{path} --to=FOLDER, and open FOLDER"
    )


def _last_stage(run: Mapping[str, Any], config: DualEncoderConfig) -> dict[str, Any]:
  """Returns the resolutions and frames that a run ends with, as arguments of `Model`."""
  if not run.get("curriculum"):
    return {}
  stage = Stage(**with_tuples(run["curriculum"][-1]))
  size, tokens = stage.size or config.image.image_size, stage.video_max_tokens
  return {
    "resolution": Resolution(stage.mode, size, stage.min_tokens, stage.max_tokens, tuple(stage.lengths)),
    "clips": Resolution("native", max_tokens=tokens) if tokens else Resolution.fixed(stage.video_size or size),
    "frames": stage.frames,
  }
