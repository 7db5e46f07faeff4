"""`plan.py` as a user runs it, on emulated devices; for a TPU where its compiler is installed."""

import json
import os
import subprocess

import jax
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.models import flops
from contrastive_jax.planning import compiling, plan, topologies
from contrastive_jax.training.run import Run
from tests import runs, tiny

PLAN_PYTHON = runs.ROOT / ".venv-plan" / "bin" / "python"


@pytest.fixture(scope="module")
def made():
  config = tiny.get_config()
  config.mesh.fsdp = 4
  return config, *plan.make_plan(config, topologies.find("cpu:8"), memory=2.0**30)


def test_what_a_plan_says(made):
  config, found, compiled = made
  assert (found["config"], found["topology"], found["devices"], found["batch_size"]) == ("tiny", "cpu:8", 8, 32)
  assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  parameters = jax.tree.leaves(compiled.state.params)
  assert found["parameters"] == sum(leaf.size for leaf in parameters)
  assert found["parameter_bytes"] == sum(4 * leaf.size // _shards(leaf) for leaf in parameters)
  # AdamW keeps two moments of each parameter, placed as it is, and counters.
  assert 2 * found["parameter_bytes"] <= found["optimizer_bytes"] <= 2 * found["parameter_bytes"] + 64
  memory = found["memory"]
  assert memory["fits"] and memory["headroom_bytes"] == 2**30 - memory["peak_bytes"]
  held = memory["arguments_bytes"] + memory["outputs_bytes"] - memory["aliased_bytes"]
  assert memory["peak_bytes"] == held + memory["temporaries_bytes"] + memory["code_bytes"]
  assert found["flops"]["model"] == 3 * 32 * flops.forward_flops_per_pair(Run.from_config(config).model)
  assert sum(found["flops"]["by_part"].values()) == found["flops"]["compiled"]
  assert 0.8 < found["flops"]["compiled_over_model"] < 1.5
  assert {row["part"] for row in found["collectives"]} <= {"towers", "loss", "optimizer", "other"}
  assert any(row["part"] == "loss" and row["bytes"] > 0 for row in found["collectives"])
  assert json.loads(json.dumps(found)) == found


def _shards(leaf):
  return 4 if "fsdp" in leaf.sharding.spec else 1


@pytest.mark.slow
def test_under_fsdp_weights_travel_and_activations_do_not():
  config = tiny.get_config()
  config.mesh.fsdp = 8
  config.batch_size = 1024
  found, compiled = plan.make_plan(config, topologies.find("cpu:8"))
  largest = max(4 * leaf.size for leaf in jax.tree.leaves(compiled.state.params))
  # One feature of every token of the batch, and there are 32, would be as large as all of the embedding table.
  assert 4 * config.batch_size * config.model.text.length * 32 > 8 * largest
  assert max(row["largest_bytes"] for row in found["collectives"] if row["part"] == "towers") <= largest


def test_the_batch_is_what_the_pipeline_makes(made):
  _, _, compiled = made
  config = tiny.get_config()
  _, batch, _ = compiling.choose_batch(Run.from_config(config), None, compiled.mesh)
  model = Run.from_config(config).model
  assert batch.image.patches.shape == (32, model.image.grid**2, model.image.patch_dim)
  assert str(batch.image.patches.dtype) == "uint8" and str(batch.image.coords.dtype) == "int16"
  assert batch.image.patches.sharding.shard_shape(batch.image.patches.shape)[0] == 4
  assert batch.text.tokens.shape == batch.text.mask.shape == (32, 8)
  assert batch.keys.shape == (32, 2, 2) and str(batch.keys.dtype) == "uint32"


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5 * 2**30),
    (
      "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (32.70G) exceeds available HBM (15.75G)",
      32.7 * 2**30 + 1000,
    ),
    ("INTERNAL: something else", None),
  ],
)
def test_what_a_compiler_out_of_memory_says(message, needed):
  found = compiling.bytes_needed(message, 1000)
  assert found is None if needed is None else sum(found.values()) == pytest.approx(needed)


@pytest.mark.slow
def test_the_command_line(tmp_path):
  output = runs.run(
    "plan.py", runs.TINY, "--topology=cpu:4", "--memory=0.5", f"--output={tmp_path}/plan.json", "--config.batch_size=16"
  )
  found = json.loads((tmp_path / "plan.json").read_text())
  assert found["batch_size"] == 16 and found["devices"] == 4 and found["memory"]["fits"]
  assert "fits 512.00 MiB" in output and "What a device sends" in output


UNKNOWN = {
  "v5e:4x4x4": "did you mean 'v5e:16x16'?",
  "h10:8": "did you mean 'h100:8'?",
  "v5p": "did you mean 'v5p:4x4x8'?",
  "cpu:0": "the forms are v5e:XxY",
  "v5e:32x32": "a v5e slice has at most 256",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_topologies(name):
  with pytest.raises(UserError) as error:
    topologies.find(name)
  assert UNKNOWN[name] in str(error.value) and f"--topology='{name}'" in str(error.value)


MISTAKES = {
  "--topology is missing": [],
  "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit 4 devices": ["--topology=cpu:4", "--config.mesh.data=3"],
  "batch_size=33 does not divide over 4 devices": ["--topology=cpu:4", "--config.batch_size=33"],
  "--stage is for one stage, and --all_stages plans all of them": ["--topology=cpu:4", "--all-stages", "--stage=a"],
  "--find_max_batch needs to know the memory of cpu:4": ["--topology=cpu:4", "--find-max-batch"],
}


@pytest.mark.slow
@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes(sentence):
  output = runs.run("plan.py", runs.TINY, *MISTAKES[sentence], expected=2)
  last = output.strip().splitlines()[-1]
  assert sentence in last and "Traceback" not in output


@pytest.mark.parametrize(("name", "package"), [("v5e:2x2", "libtpu"), ("h100:8", "jax_cuda13_plugin")])
def test_a_missing_package(name, package, monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=f"{package}.*make plan"):
    topologies.find(name).devices()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:4"])
def test_real_compilers(topology, tmp_path):
  if not PLAN_PYTHON.exists():
    pytest.skip("`make plan` has not been run")
  command = [PLAN_PYTHON, "plan.py", runs.TINY, f"--topology={topology}", f"--output={tmp_path}/plan.json"]
  environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
  subprocess.run([str(word) for word in command], cwd=runs.ROOT, env=environment, check=True, timeout=600)
  found = json.loads((tmp_path / "plan.json").read_text())
  assert found["devices"] == 4 and found["memory"]["fits"]
  assert 0.8 < found["flops"]["compiled_over_model"] < 2
  assert found["time"]["step_seconds"] > 0 and 0 < found["time"]["mfu_bound"] < 1
  assert any(row["part"] == "towers" for row in found["collectives"])
