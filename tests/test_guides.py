"""The code of the guides is run: its files become modules, and its tests are tests."""

import dataclasses
import functools
import inspect
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from contrastive_jax import pretrain
from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.others import OTHERS
from contrastive_jax.objectives import TERMS, make_objective
from contrastive_jax.parallel.mesh import put_batch
from contrastive_jax.runs import read_json_lines
from contrastive_jax.training.run import Run
from contrastive_jax.training.step import make_value_and_grad
from data import build, kinds
from tests import runs
from tests.keys import keys_of


def blocks(guide):
  """The Python of a guide by the comment that each block begins with."""
  text = (runs.ROOT / "docs" / guide).read_text(encoding="utf-8")
  return dict(re.findall(r"^```python\n# (.+?)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def module_of(monkeypatch):
  """Makes a module of a block, which others can then import."""

  def make(guide, file):
    module = types.ModuleType(file.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parent = sys.modules.get(module.__name__.rpartition(".")[0])
    if parent is not None:
      monkeypatch.setattr(parent, module.__name__.rpartition(".")[2], module, raising=False)
    exec(compile(blocks(guide)[file], f"docs/{guide}: {file}", "exec"), vars(module))
    return module

  return make


def run_tests(module, tmp_path):
  tests = [value for name, value in vars(module).items() if name.startswith("test_")]
  assert tests
  for number, test in enumerate(tests):
    folder = tmp_path / str(number)
    folder.mkdir()
    test(**({"tmp_path": folder} if "tmp_path" in inspect.signature(test).parameters else {}))


def test_add_a_loss(module_of, monkeypatch, tmp_path):
  guide, file = "add_a_loss.md", "contrastive_jax/objectives/redundancy.py"
  module = module_of(guide, file)
  assert not (runs.ROOT / file).exists(), "the example is part of the library now: choose another"
  assert len(blocks(guide)[file].partition("class ")[2].splitlines()) < 35
  run_tests(module_of(guide, "tests/objectives/test_redundancy.py"), tmp_path)

  line = blocks(guide)["contrastive_jax/objectives/table.py, in TERMS"]
  for name, term in eval(f"{{{line}}}", vars(module)).items():
    monkeypatch.setitem(TERMS, name, term)
  from configs.common import get_config

  config = get_config()
  exec(blocks(guide)["in a config"], {"config": config})
  objective = make_objective(config.objective.to_dict(), config.loss_options.to_dict())
  weight, term = objective.terms["redundancy"]
  assert (weight, term.off_diagonal) == (0.01, 0.01)
  with pytest.raises(UserError, match="off_diagonal"):
    make_objective({"redundancy": 1.0}, {"redundancy": {"of_diagonal": 1.0}})


def test_add_a_data_format(module_of, monkeypatch, tmp_path):
  guide, file = "add_a_data_format.md", "data/sources/text_files.py"
  module = module_of(guide, file)
  assert not (runs.ROOT / file).exists(), "the example is part of the data now: choose another"
  run_tests(module_of(guide, "tests/data/test_text_files.py"), tmp_path)

  # The line that the guide adds to the table, in the table.
  from configs.common import get_config

  line = eval("{" + blocks(guide)["data/kinds.py"] + "}", vars(kinds) | {"TextFileSource": module.TextFileSource})
  for key, kind in line.items():
    monkeypatch.setitem(kinds.KINDS, key, kind)
  (tmp_path / "dog.png").write_bytes(b"not read yet")
  (tmp_path / "dog.txt").write_text("a dog")
  name = f"text_files/{tmp_path}"
  assert kinds.open_sources(get_config(), [name])[name].text(0).captions == ("a dog",)


@pytest.fixture
def sounds(module_of, monkeypatch):
  """The config of the guide's tower, with the tower and its source in their tables."""
  guide = "add_a_tower.md"
  tower, source = (module_of(guide, file) for file in ("contrastive_jax/models/audio.py", "data/sources/tones.py"))
  tables = {"contrastive_jax/models/others.py, in OTHERS": OTHERS, "data/kinds.py": kinds.KINDS}
  for block, table in tables.items():
    names = {**vars(tower), **vars(source), "Kind": kinds.Kind}
    for name, entry in eval("{" + blocks(guide)[block] + "}", names).items():
      monkeypatch.setitem(table, name, entry)
  return module_of(guide, "configs/tones.py").get_config()


def losses_of(workdir):
  return {row["step"]: row["loss"] for row in read_json_lines(workdir / "metrics.jsonl") if "loss" in row}


@pytest.mark.slow
def test_add_a_tower(module_of, sounds, tmp_path):
  for file in ("contrastive_jax/models/audio.py", "data/sources/tones.py"):
    assert not (runs.ROOT / file).exists(), "the example is part of the project now: choose another"
  run_tests(module_of("add_a_tower.md", "tests/models/test_audio.py"), tmp_path)
  # From a checkpoint on it goes on with the same bits.
  workdir = tmp_path / "0"
  whole = losses_of(workdir)
  shutil.rmtree(workdir / "checkpoints" / "80")
  pretrain.train(sounds, workdir, data=build)
  again = losses_of(workdir)
  assert again.pop(41) < whole[40] and again == whole  # A session logs its first step.


@pytest.mark.slow
def test_another_tower_counts_in_the_loss_however_the_batch_is_cut(sounds):
  found = []
  for devices, accumulation, dropout in ((1, 1, 0.0), (1, 1, 0.3), (2, 4, 0.3)):
    sounds.accumulation = accumulation
    sounds.model.others[0].transformer.dropout = dropout
    run = Run.from_config(sounds)
    mesh = run.make_mesh(jax.devices()[:devices])
    spec, _ = run.build(mesh)
    sources = build.open_sources(run.config, run.source_names())
    tokenizer = build.make_tokenizer(run.config.tokenizer, 300, sources.values())
    batch = build.make_pipeline(run, run.segments, sources, tokenizer, (0, 1)).batch(0).on_device()
    batch = put_batch(mesh, dataclasses.replace(batch, keys=keys_of(np.arange(32))))
    params = spec.create(0).params
    differentiate = jax.jit(make_value_and_grad(spec, accumulate=accumulation))
    found.append(jax.device_get(differentiate(params, {}, batch, jax.random.key(1))))
    if not dropout:
      model = dual_encoder.merge(dual_encoder.abstract(spec.model)[0], params)
      embeddings = {name: np.float64(outputs.embedding) for name, outputs in model(batch).items()}
      scale, bias = np.exp(np.float64(params["log_logit_scale"])), np.float64(params["logit_bias"])

  sign = 2 * np.eye(32) - 1
  parts = {}
  for name in ("image", "audio"):
    logits = scale * embeddings["text"] @ embeddings[name].T + bias
    parts[name] = np.sum(np.logaddexp(0, -sign * logits)) / 32
  (loss, (metrics, _)), _ = found[0]
  np.testing.assert_allclose(loss, sum(parts.values()), rtol=1e-5)
  assert {name.partition("/")[0] for name in metrics if "/" in name} == {"image", "audio"}
  ((one, _), ones), ((other, _), others) = found[1:]
  assert one == pytest.approx(float(other), rel=1e-5) and abs(float(one) - float(loss)) > 1e-5
  for few, many in zip(jax.tree.leaves(ones["audio"]), jax.tree.leaves(others["audio"]), strict=True):
    np.testing.assert_allclose(few, many, rtol=1e-3, atol=1e-6)


def test_a_tower_that_cannot_learn_or_read_is_one_sentence(sounds, tmp_path):
  wrong = functools.partial(dict, sounds.model.others[0].to_dict())
  for change, said in (
    (lambda config: config.loss_options.sigmoid.update(towers=("text", "image")), "no term .* reads the audio tower"),
    (lambda config: config.loss_options.sigmoid.update(towers=("text", "sound")), "sigmoid.towers='sound' is unknown"),
    (lambda config: config.loss_options.sigmoid.update(towers=("text",)), "at least two different towers"),
    (lambda config: config.model.update(others=[wrong(name="adio")]), "others.0.name='adio' .*'audio'"),
    (lambda config: config.model.update(others=[wrong(patch_size=7)]), "patch_size=7 must divide"),
    (lambda config: config.model.update(others=[wrong(binz=7)]), "binz"),
    (lambda config: config.model.update(others=[wrong(), wrong()]), "twice"),
    (lambda config: config.data.update(sources={"noto": 1.0}), "data source 'noto' has None for the audio tower"),
  ):
    config = sounds.copy_and_resolve_references()
    change(config)
    with pytest.raises(UserError, match=said):
      pretrain.train(config, tmp_path / "run", data=build)
