"""Scores trained models: python eval.py --workdir=runs/emoji --tasks=emoji_openmoji,tfds/digits

--probe=linear or --probe=knn learns from the frozen image embeddings of a set's training split instead.
--compare runs/a runs/b puts runs side by side in a table and a page.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from contrastive_jax import cli
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import compare
from contrastive_jax.evaluation.benchmarks import BENCHMARKS
from contrastive_jax.evaluation.evaluate import DRAWS, PROBES, evaluate, probe
from contrastive_jax.evaluation.results import Result, as_json, headline
from contrastive_jax.evaluation.tasks import EvaluationSet, LabelledSet
from contrastive_jax.inference import Model, load
from contrastive_jax.parallel import distributed
from contrastive_jax.runs import read_config, write_atomically
from data import tasks

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or weights imported by convert.py.")
TASKS = flags.DEFINE_list("tasks", ["emoji_openmoji"], "Names of evaluation sets, separated by commas.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.", lower_bound=0)
PROBE = flags.DEFINE_enum("probe", None, list(PROBES), "Train on the frozen embeddings of a set, instead of zero-shot.")
PROBE_SPLIT = flags.DEFINE_string("probe_split", "train", "Which split of a set the probe learns from.")
PROBE_PROJECTED = flags.DEFINE_bool("probe_projected", True, "Whether it sees embeddings, or features before that.")
PROBE_SHOTS = flags.DEFINE_integer(
  "probe_shots",
  None,
  f"Samples of each class it learns from, in the mean of {DRAWS} draws; all if not given.",
  lower_bound=1,
)
PROBE_FLAGS = (PROBE_SPLIT, PROBE_PROJECTED, PROBE_SHOTS)
COMPARE = flags.DEFINE_list("compare", None, "Run directories to put side by side; nothing is scored.")
OUTPUT = flags.DEFINE_string(
  "output", None, "Also writes all results as one JSON list here; or where the comparison goes."
)
DATA_DIR = flags.DEFINE_string("data_dir", "", "Where TFDS sets lie; TFDS' default if empty.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images or texts encoded at once.", lower_bound=1)
SCORING_FLAGS = (WORKDIR, TASKS, STEP, PROBE, *PROBE_FLAGS, DATA_DIR, BATCH_SIZE)


def main() -> None:
  if COMPARE.value is not None:
    idle = next((flag.name for flag in SCORING_FLAGS if flag.present), None)
    if idle:
      raise UserError(f"--{idle} is for scoring, and --compare scores nothing: leave one of them out")
    show_comparison(COMPARE.value, OUTPUT.value)
    return
  if not WORKDIR.value:
    raise UserError("--workdir is missing: name a run, such as --workdir=runs/emoji")
  workdir = Path(WORKDIR.value)
  distributed.initialize()
  idle = next((flag.name for flag in PROBE_FLAGS if flag.present and not PROBE.value), None)
  if idle:
    raise UserError(f"--{idle} says how to probe: add --probe=linear or --probe=knn")
  names = tasks.expand(TASKS.value)
  if PROBE.value:
    check_probe(names)
  model = load(workdir, STEP.value, batch_size=BATCH_SIZE.value, progress=distributed.is_main())
  sets = [tasks.load(name, DATA_DIR.value) for name in names]
  architecture = read_config(workdir)["name"]
  about = {"workdir": workdir, "step": model.step, "architecture": architecture}
  if PROBE.value:
    results = [probed(model, name, tested, **about) for name, tested in zip(names, sets, strict=True)]
  else:
    results = evaluate(model, sets, thorough=True, **about)
  if distributed.is_main():
    rows = [as_json(result, model=architecture, pretrained=f"{workdir}@{model.step}") for result in results]
    if OUTPUT.value:
      write_atomically(OUTPUT.value, json.dumps(rows, indent=2) + "\n")
    for result in results:
      words = headline(result)
      print(f"{result.dataset}: {words['figure']} {words['sentence']}")


def check_probe(names: Sequence[str]) -> None:
  """Refuses, before anything is loaded, what the names alone show that no probe can be trained for.

  Raises:
    UserError: if a set has no labels or no training split, or is scored on the split that the probe learns from.
  """
  for name in names:
    benchmark = BENCHMARKS.get(name.partition("@")[0])
    if name in tasks.EVALUATIONS or (benchmark and benchmark.kind != "classification"):
      raise without_labels(name)
    if tasks.split_of(learned_by(name)) == tasks.split_of(name):
      raise UserError(f"--probe_split={PROBE_SPLIT.value} is what {name} is scored on: name another split")


def learned_by(name: str) -> str:
  """What a probe of the set learns from, as `--tasks` calls it."""
  return f"{name.partition('@')[0]}@{PROBE_SPLIT.value}"


def without_labels(name: str) -> UserError:
  return UserError(
    f"--probe={PROBE.value} needs a TFDS set with one label an image, such as tfds/cifar10, not '{name}'"
  )


def probed(model: Model, name: str, tested: EvaluationSet, **about) -> Result:
  """Trains a probe on the training split of a set and scores it on the other.

  Raises:
    UserError: if the set has no labels, or its training split has other classes.
  """
  if not isinstance(tested, LabelledSet):
    raise without_labels(name)
  train = tasks.load(learned_by(name), DATA_DIR.value)
  if list(train.classes) != list(tested.classes):
    raise UserError(f"--probe_split={PROBE_SPLIT.value}: that split of {name} has other classes")
  how = {"kind": PROBE.value, "projected": PROBE_PROJECTED.value, "shots": PROBE_SHOTS.value}
  return probe(model, train, tested, **how, **about)


def show_comparison(workdirs: Sequence[str], output: str | None) -> None:
  """Prints the table of several runs and writes their page: beside the first unless `output` says where."""
  runs = compare.read_runs(workdirs)
  console = Console()
  if not console.is_terminal:
    console = Console(width=1000)  # A file has no width at which lines would have to break.
  console.print(compare.in_terminal(runs, compare.table(runs)))
  page = compare.write_comparison(output or Path(workdirs[0]).resolve().parent / "comparison.html", runs)
  print(f"Comparison: {page}")


def joined(arguments: Sequence[str]) -> list[str]:
  """`--compare a b` as the flag reads it, `--compare=a,b`: a shell completes the first and not the second."""
  if "--compare" not in arguments:
    return list(arguments)
  start = arguments.index("--compare") + 1
  stop = next((k for k in range(start, len(arguments)) if arguments[k].startswith("-")), len(arguments))
  return [*arguments[: start - 1], f"--compare={','.join(arguments[start:stop])}", *arguments[stop:]]


if __name__ == "__main__":
  sys.argv = joined(sys.argv)
  cli.run(main)
