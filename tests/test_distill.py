"""The command that writes a cache of a teacher's embeddings: they are those of the pictures as a person sees them."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.loading import load
from contrastive_jax.parallel.mesh import MeshSpec
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.training import config as run_config
from contrastive_jax.training.checkpoint import Checkpoints
from contrastive_jax.training.run import Run
from contrastive_jax.training.targets import TargetCache
from data import emoji
from tests import runs, tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """An untrained model of another width and resolution than the tiny config's."""
  workdir = tmp_path_factory.mktemp("teacher")
  config = tiny.get_config()
  config.model.embed_dim = 24
  config.model.image.image_size = 48
  spec, _ = Run.from_config(config).build(MeshSpec().make())
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(spec.create(0), {})
    checkpoints.wait()
  (workdir / "config.json").write_text(json.dumps(run_config.as_json(config)))
  tokenizers.train_bpe(["a red dog"], 300).save(workdir / "tokenizer")
  return workdir


def on_white_square(drawing):
  """A drawing whose colour is multiplied by alpha, as a picture without transparency."""
  height, width = drawing.shape[:2]
  side = max(height, width)
  page = np.full((side, side, 3), 255, np.uint8)
  top, left = (side - height) // 2, (side - width) // 2
  seen = drawing[..., :3].astype(int) + 255 - drawing[..., 3:].astype(int)
  page[top : top + height, left : left + width] = np.clip(seen, 0, 255)
  return Image.fromarray(page)


@pytest.mark.slow
def test_the_cache_holds_every_drawing_as_it_is_seen(teacher, tmp_path):
  output = tmp_path / "targets"
  arguments = f"--teacher={teacher}", runs.TINY, f"--output={output}"
  first = runs.run("distill.py", *arguments)
  assert "noto: 1," in first and "twemoji_tones: 1," in first
  assert runs.run("distill.py", *arguments).count("already there") == 4

  sources = emoji.training_sources()
  id_base = {"twemoji": 0, "noto": 1 << 40}
  cache = TargetCache(output, id_base)
  chosen = [("noto", 0), ("twemoji", 700), ("noto", 1500), ("twemoji", 3)]
  examples = [sources[name][index] for name, index in chosen]
  ids = np.array([id_base[name] + example.id for (name, _), example in zip(chosen, examples, strict=True)])
  model = load(teacher, batch_size=8)
  expected = model.encode_image([on_white_square(example.image) for example in examples])
  np.testing.assert_allclose(cache.lookup(ids).image, expected, atol=2e-3)
  # Different drawings have different embeddings, or the line above would prove little.
  assert np.abs(expected[0] - expected[1]).max() > 0.02


@pytest.mark.slow
def test_a_folder_that_was_renamed_meanwhile_is_not_made_anew(teacher, tmp_path):
  output = tmp_path / "targets"
  # Small batches, so that the other sources are not done before the folder is renamed.
  options = (f"--teacher={teacher}", runs.TINY, f"--output={output}", "--batch_size=1")
  process = runs.start("distill.py", *options)
  while not any(output.glob("*/unsorted")):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  output.rename(tmp_path / "moved")
  said = runs.finish(process, expected=4)
  assert said.strip().splitlines()[-1].startswith(f"distill.py: {output} was removed or renamed")
  assert not output.exists() and not any((tmp_path / "moved").glob("*/ids.npy"))


def test_mistakes_are_named(teacher, tmp_path):
  output = f"--output={tmp_path / 'targets'}"
  assert "--teacher is missing" in runs.run("distill.py", runs.TINY, output, expected=2)
  nowhere = runs.run("distill.py", f"--teacher={tmp_path}", runs.TINY, output, expected=2)
  assert "is not a run directory" in nowhere


@pytest.mark.slow
@pytest.mark.extra
def test_a_run_goes_on_to_further_pictures_and_keeps_to_what_it_was(tmp_path):
  """The config of the guide: the model that a run begins from is its teacher, for the pictures that it has seen."""
  short = ("--config.total_steps=4", "--config.checkpoint_every=4")
  first, second = tmp_path / "first", tmp_path / "second"
  runs.train(first, *short, "--config.data.sources={'noto': 1.0}")
  continual = (
    f"--config.init_from={first}",
    f"--config.distillation.teacher={first}",
    "--config.distillation.replay=('noto',)",
    "--config.objective={'softmax': 1.0, 'distill_positives': 0.5}",
    "--config.data.sources={'twemoji': 0.9, 'noto': 0.1}",
  )
  runs.train(second, *short, *continual)
  rows = [row for row in runs.rows(second / "metrics.jsonl") if "loss_distill_positives" in row]
  assert len(rows) == 4 and all(row["loss_distill_positives"] > 0 for row in rows)
