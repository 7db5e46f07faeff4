"""One bit flipped in every file of a run, read by all that read runs: nothing may differ in silence, nothing may crash.

  python -m benchmarks.bit_flips --workdir=runs/emoji                           # 500 places a file
  python -m benchmarks.bit_flips --workdir=runs/emoji --places=0 --commands=10  # a quick look at the whole readers
  python -m benchmarks.bit_flips --workdir=runs/emoji --only=json               # config and logs, in minutes
  python -m benchmarks.bit_flips --workdir=runs/emoji --cost                    # seconds per GiB that verifying takes

Whatever opens a run opens its files by the same three layers: checkpoints through `training.verification.verified`,
`config.json` through `runs.read_config`, and the tokenizer through `tokenizers.load` with the fingerprint in the
checkpoint. At `--places` of each file the layer alone is asked, for all leaves of the checkpoint: a reader takes some
of these leaves and is refused when the layer refuses. At `--commands` of each file the readers themselves are asked: a
resuming train.py ("resume"), `contrastive_jax.load` that eval.py, embed.py, convert.py and teachers go through
("load"), and init_from ("initialize"). Each answers with what it read: parameters, config, tokenizer and step.

Logs, such as `metrics.jsonl`, `sessions.json` and the results in `eval/`, decide nothing that these readers compute.
They have a reader of their own, "report", and a layer for each file, "log". Logs that the run lacks are made: a result,
a list of bad records, and the ids of a step that was not finite.

The outcomes: "same", "fallback" (another checkpoint was read, and a warning said so), "refused" (one sentence),
"noticed" (rows or files of a log are left out, which a warning or a sentence says), "old" (a config or a log differs in
silence that was written by a version without checksums of them), "silent" (something else differs and nobody said so),
"traceback". The last two fail the command.
"""

import collections
import hashlib
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging

import contrastive_jax
from contrastive_jax import bad_records, sessions
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.results import Result, read_result, read_results, result_path, write_result
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.runs import digest, json_lines, read_config, read_json_lines, read_object, write_object
from contrastive_jax.training.checkpoint import Checkpoints, _as_dict, restore_params
from contrastive_jax.training.verification import Damaged, checksum, verified

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run to damage copies of; it must have a checkpoint.", required=True
)
_PLACES = flags.DEFINE_integer("places", 500, "Places in each file for the layers, one bit each.", lower_bound=0)
_COMMANDS = flags.DEFINE_integer("commands", 3, "Places in each file for the readers.", lower_bound=0)
_ONLY = flags.DEFINE_string("only", "", "Damages files whose kind, as the table names it, holds this alone.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the places.")
_COST = flags.DEFINE_bool("cost", False, "Measures the cost of verifying instead.")
OUTCOMES = ("same", "fallback", "refused", "noticed", "old", "silent", "traceback")
# What a file with a checksum of itself holds.
_MARKS = (b'"crc": "', b'"digest": "', b'"custom_metadata"')


def _bits(tree: Any) -> str:
  """Returns the SHA-256 of the names and bits of all leaves."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    total.update(jax.tree_util.keystr(path).encode())
    total.update(np.ascontiguousarray(leaf).tobytes())
  return total.hexdigest()


def _initialize(workdir: Path) -> Any:
  restored = restore_params(workdir, None)
  if tokenizers.load(str(workdir / "tokenizer")).fingerprint != restored.metadata["tokenizer"]:
    raise UserError("the tokenizer is not the one that the checkpoint was trained with")
  return restored.step, _bits(restored.params), digest(read_config(workdir))


def _load(workdir: Path) -> Any:
  model = contrastive_jax.load(workdir)
  return model.step, _bits(model.params), repr(model.config), model.tokenizer.fingerprint


def _resume(workdir: Path, abstract: Any) -> Any:
  config = digest(read_config(workdir))
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    found = checkpoints.restore(abstract)
  state, about = found or (None, {})
  tokenizer = tokenizers.load(str(workdir / "tokenizer"))
  if about.get("tokenizer") not in (None, tokenizer.fingerprint):
    raise UserError("the tokenizer is not the one that the checkpoint was trained with")
  read_json_lines(workdir / "metrics.jsonl")
  return state and int(state.step), _bits(state), config, digest(about), tokenizer.fingerprint


def _report(workdir: Path) -> Any:
  results = read_results(sorted((workdir / "eval").glob("*.json")))
  logs = [read_json_lines(workdir / name) for name in ("metrics.jsonl", "sample_ids.jsonl")]
  return logs, sessions.read(workdir), [(path.name, result) for path, result in results]


def _log(path: Path) -> Callable[[], Any] | None:
  """Returns what reads a log; None for a file that nothing of ours reads."""
  if path.name == bad_records.FILE:
    return lambda: list(json_lines(path, "set", str))
  if path.suffix == ".jsonl":
    return lambda: read_json_lines(path)
  if path.name == sessions.FILE:
    return lambda: sessions.read(path.parent)
  if path.parent.name == "eval":
    return lambda: read_result(path)
  return (lambda: read_object(path)) if path.name == "nonfinite_ids.json" else None


def _make_logs(workdir: Path, step: int) -> None:
  """Makes the logs that a run without evaluations, bad records and steps that are not finite does not have."""
  if not (workdir / "eval").exists():
    scores = {"acc1": 0.234, "acc5": 0.425, "mean_per_class_recall": 0.234}
    result = Result("emoji_openmoji", "zeroshot_classification", scores, "en", {"images": 1853, "classes": 1853})
    write_result(result_path(workdir, result.dataset, step), result, model="tiny", pretrained=str(workdir))
  if not (workdir / bad_records.FILE).exists():
    records = bad_records.BadRecords(workdir / bad_records.FILE)
    for index in range(5):
      records.add(bad_records.BadRecord("tfds/coco_captions", index, "not a JPEG", split="train"))
  if not (workdir / "nonfinite_ids.json").exists():
    write_object(workdir / "nonfinite_ids.json", {"step": step, "ids": list(range(1000, 1032))}, indent=None)


def _layer(path: Path, workdir: Path, step: int, abstract: Any) -> tuple[str, Callable[[], Any]] | None:
  """Returns the name of what every reader opens a file by, and that; None for a file that decides nothing."""
  if path.name == "config.json":
    return "config", lambda: digest(read_config(workdir))
  if "tokenizer" in path.parts:
    return "tokenizer", lambda: tokenizers.load(str(workdir / "tokenizer")).fingerprint
  if "checkpoints" not in path.parts:
    log = _log(workdir / path)
    return log and ("log", log)

  def checked() -> Any:
    try:
      state, about = verified((workdir / "checkpoints").absolute(), step, lambda _: abstract)
    except Damaged as error:
      raise UserError(str(error)) from None
    return _bits(state), digest(about)

  return "verified", checked


class _Heard(logging.Handler):
  """Remembers whether anything was said."""

  def __init__(self):
    super().__init__(logging.WARNING)
    self.said = False

  def emit(self, record: logging.LogRecord) -> None:
    self.said = True


def outcome(read: Callable[[], Any], expected: Any, heard: _Heard, refused: bool = False) -> str:
  """Returns what a reader made of a damaged run; another answer counts as refused where `refused`."""
  heard.said = False
  try:
    found = read()
  except UserError as error:
    return "refused" if "\n" not in str(error) else "traceback"
  except Exception:
    return "traceback"
  if found == expected:
    return "same"
  if refused:
    return "refused"
  return "fallback" if heard.said else "silent"


def sweep(
  source: Path, places: int, commands: int, seed: int, only: str = ""
) -> dict[tuple[str, str], collections.Counter]:
  """Outcomes by kind of file and reader; `source` is not touched."""
  from contrastive_jax.training.state import TrainState

  heard = _Heard()
  logging.getLogger("contrastive_jax").addHandler(heard)
  with tempfile.TemporaryDirectory() as scratch:
    pristine = Path(scratch) / "run"
    shutil.copytree(source, pristine)
    steps = sorted(int(path.name) for path in (pristine / "checkpoints").iterdir() if path.name.isdecimal())
    with Checkpoints(pristine / "checkpoints") as checkpoints:
      abstract = TrainState(**checkpoints.describe(steps[-1]))
    _make_logs(pristine, steps[-1])
    readers = {"resume": lambda work: _resume(work, abstract), "load": _load, "initialize": _initialize}
    readers["report"] = _report
    expected = {name: read(pristine) for name, read in readers.items()}
    draw, table = random.Random(seed), {}
    older = pristine / "checkpoints" / str(steps[-1])
    files = [path for path in sorted(pristine.rglob("*")) if path.is_file() and path.stat().st_size]
    # Of the checkpoints only the newest is read.
    files = [path for path in files if "checkpoints" not in path.parts or older in path.parents]
    for path in files:
      kind = _kind(path.relative_to(pristine))
      if only not in kind:
        continue
      content = path.read_bytes()
      layer = _layer(path.relative_to(pristine), pristine, steps[-1], {**_as_dict(abstract)})
      layers, whole = dict([layer] if layer else []), dict(expected)
      whole.update({name: read() for name, read in layers.items()})
      for place in range(max(places if layer else 0, commands)):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        asked = dict(readers) if place < commands else {}
        if place < places:
          asked.update({name: lambda _, read=read: read() for name, read in layers.items()})
        for name, read in asked.items():
          path.write_bytes(damaged)
          found = outcome(lambda read=read: read(pristine), whole[name], heard, refused=name == "tokenizer")
          if name in ("log", "report"):
            found = {"refused": "noticed", "fallback": "noticed"}.get(found, found)
          if found == "silent" and path.suffix in (".json", ".jsonl") and not any(mark in content for mark in _MARKS):
            found = "old"
          table.setdefault((kind, name), collections.Counter())[found] += 1
          for aside in (pristine / "checkpoints").glob("*.damaged*"):
            aside.rename(aside.with_name(aside.name.partition(".")[0]))  # A resume moves what is damaged.
          path.write_bytes(content)
  logging.getLogger("contrastive_jax").removeHandler(heard)
  return table


def _kind(path: Path) -> str:
  if path.parts[0] != "checkpoints":
    return path.parts[0] if not path.name.startswith("events") else "events of TensorBoard"
  return "checkpoint: " + (path.name if path.name.startswith("_") or "." in path.name else "arrays")


def cost(gibibytes: float = 1.0) -> None:
  """Prints the seconds that checksums of a tree on the default device take."""
  leaves = [jax.numpy.ones((int(gibibytes * 2**28) // 16,), jax.numpy.float32) for _ in range(16)]
  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    checksum(leaves)
    seconds.append(time.perf_counter() - start)
  device = jax.devices()[0].device_kind
  print(
    f"Verifying takes {min(seconds[1:]) / gibibytes:.3f} s per GiB on {device} ({seconds[0]:.2f} s with compilation)."
  )


def main(_: list[str]) -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)
  if _COST.value:
    cost()
    return
  table = sweep(Path(_WORKDIR.value), _PLACES.value, _COMMANDS.value, _SEED.value, _ONLY.value)
  print(f"{'file':36}{'reader':12}" + "".join(f"{name:>10}" for name in OUTCOMES))
  for (kind, reader), counts in sorted(table.items()):
    print(f"{kind:36}{reader:12}" + "".join(f"{counts[name]:10}" for name in OUTCOMES))
  if any(counts["silent"] or counts["traceback"] for counts in table.values()):
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
