"""Scores a trained model on evaluation sets.

python eval.py --workdir=runs/emoji --tasks=emoji_openmoji,emoji_heldout
python eval.py --tasks=list                                               # which sets there are
python eval.py --workdir=runs/emoji --tasks=tfds/sklearn_digits --data_dir=runs/tfds --probe=linear
python eval.py --compare runs/emoji runs/seed1                            # compares runs, in a table and a page
python eval.py --workdir=runs/emoji --with=runs/seed1 --output=both.json  # scores several runs as one model

--probe=linear and --probe=knn train a classifier on the frozen image embeddings of a set's training split and score
that, in place of zero-shot classification. Results are written to WORKDIR/eval/<task>@<step>.json. Images that cannot
be read are left out, counted in the result and listed in WORKDIR/bad_records.jsonl.
"""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation import compare
from contrastive_jax.evaluation.benchmarks import BENCHMARKS
from contrastive_jax.evaluation.concatenated import Concatenated
from contrastive_jax.evaluation.evaluate import DRAWS, PROBES, evaluate, probe
from contrastive_jax.evaluation.results import Result, as_json, headline
from contrastive_jax.evaluation.tasks import EvaluationSet, LabelledSet
from contrastive_jax.inference import Model
from contrastive_jax.loading import load
from contrastive_jax.parallel import distributed
from contrastive_jax.runs import write_atomically
from contrastive_jax.training.fields import checked_config
from data import kinds, task_list, tasks

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or weights imported by convert.py.")
TASKS = flags.DEFINE_list(
  "tasks", ["emoji_openmoji"], "Names of evaluation sets, separated by commas; `list` prints all names."
)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint to score; the newest if not given.", lower_bound=0)
WITH = flags.DEFINE_list(
  "with", [], "Further runs at their newest steps, whose embeddings are put behind those of --workdir; needs --output."
)
PROBE = flags.DEFINE_enum(
  "probe", None, list(PROBES), "Classifier to train on frozen image embeddings, in place of zero-shot classification."
)
PROBE_SPLIT = flags.DEFINE_string("probe_split", "train", "Split of each set on which the probe is trained.")
PROBE_PROJECTED = flags.DEFINE_bool(
  "probe_projected",
  True,
  "Probe the embeddings that are shared with texts; --noprobe_projected probes the image tower's own features.",
)
PROBE_SHOTS = flags.DEFINE_integer(
  "probe_shots",
  None,
  f"Number of training samples of each class; the score is the mean of {DRAWS} random draws. All samples if not given.",
  lower_bound=1,
)
PROBE_FLAGS = (PROBE_SPLIT, PROBE_PROJECTED, PROBE_SHOTS)
DIMS = flags.DEFINE_list(
  "dims", [], "Numbers of first features of the embeddings to score as well, such as 64,128 of a matryoshka model."
)
COMPARE = flags.DEFINE_list(
  "compare", None, "Run directories to compare, by the scores that they have; nothing is scored anew."
)
OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "File for all results as one JSON list, which a run that cannot be written needs; with --compare, file of the page.",
)
DATA_DIR = flags.DEFINE_string(
  "data_dir", "", "Directory that holds the TFDS sets; TFDS's default, ~/tensorflow_datasets, if empty."
)
IMAGE_KEY = flags.DEFINE_string(
  "image_key", "", "Feature of TFDS sets that holds the image; 'image' or the only one if empty."
)
CAPTION_KEY = flags.DEFINE_string(
  "caption_key",
  "",
  "Feature of TFDS sets that holds the captions; that of the run's config, 'captions' or 'caption' if empty.",
)
LABEL_KEY = flags.DEFINE_string("label_key", "", "Feature of TFDS sets that holds the class; 'label' if empty.")
KEY_FLAGS = (IMAGE_KEY, CAPTION_KEY, LABEL_KEY)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Number of images or texts encoded at once.", lower_bound=1)
SCORING_FLAGS = (WORKDIR, TASKS, STEP, WITH, DIMS, PROBE, *PROBE_FLAGS, DATA_DIR, *KEY_FLAGS, BATCH_SIZE)


def main() -> None:
  if COMPARE.value is not None:
    if not any(name.strip() for name in COMPARE.value):
      raise UserError("--compare is empty: name run directories, such as --compare runs/emoji runs/seed1")
    idle = next((flag.name for flag in SCORING_FLAGS if flag.present), None)
    if idle:
      raise UserError(f"--{idle} is for scoring, and --compare scores nothing: leave one of them out")
    show_comparison(COMPARE.value, OUTPUT.value)
    return
  if TASKS.value == ["list"]:
    show_tasks()
    return
  if not any(name.strip() for name in TASKS.value):
    raise UserError("--tasks is empty: name evaluation sets, which --tasks=list prints, separated by commas")
  if not WORKDIR.value:
    raise UserError("--workdir is missing: name a run, such as --workdir=runs/emoji")
  distributed.initialize()
  idle = next((flag.name for flag in PROBE_FLAGS if flag.present and not PROBE.value), None)
  if idle:
    raise UserError(f"--{idle} says how to probe: add --probe=linear or --probe=knn")
  names = tasks.expand(TASKS.value)
  keys = named_features(names)
  if PROBE.value:
    check_probe(names)
  dims = sizes_of_parts()
  workdir = paths.run_to_read("--workdir", WORKDIR.value)
  output = paths.file_to_write("--output", OUTPUT.value) if OUTPUT.value else None
  others = [paths.run_to_read("--with", name) for name in WITH.value]
  if others and (dims or not output):
    raise UserError(
      f"--with={','.join(WITH.value)} scores several runs as one, whose results belong to none of them: name a file"
      " with --output=FILE, and leave out --dims"
    )
  keep_in_run = not others and paths.is_writable(workdir / "eval")
  if not keep_in_run and not output:
    raise UserError(f"--workdir={workdir} cannot be written: name a file for the results with --output=FILE")
  model = load(workdir, STEP.value, batch_size=BATCH_SIZE.value, progress=distributed.is_main())
  beside = [load(other, batch_size=BATCH_SIZE.value, progress=distributed.is_main()) for other in others]
  run = checked_config(workdir)
  check_parts(dims, model)
  # A set is scored by the features that the run trained on, unless others are named.
  hints = [kinds.hints(run, name) for name in names]
  sets = [tasks.load(name, DATA_DIR.value, keys, own) for name, own in zip(names, hints, strict=True)]
  architecture = run.get("name") or workdir.resolve().name
  about = {"workdir": workdir, "step": model.step, "architecture": architecture, "keep_in_run": keep_in_run}
  encoder = Concatenated([model, *beside]) if beside else model
  if PROBE.value:
    results = [
      probed(encoder, name, tested, keys, own, **about) for name, tested, own in zip(names, sets, hints, strict=True)
    ]
  else:
    results = evaluate(encoder, sets, thorough=True, dims=dims, **about)
  if distributed.is_main():
    weights = zip([workdir, *others], [model, *beside], strict=True)
    pretrained = "+".join(f"{path}@{one.step}" for path, one in weights)
    rows = [as_json(result, model=architecture, pretrained=pretrained) for result in results]
    if output:
      write_atomically(output, json.dumps(rows, indent=2) + "\n")
      if not keep_in_run and not others:
        print(f"{workdir} cannot be written: the results are in {output} alone.")
    for result in results:
      words = headline(result)
      print(f"{result.dataset}: {words['figure']} {words['sentence']}")


def sizes_of_parts() -> list[int]:
  """Returns the numbers of features that --dims names.

  Raises:
    UserError: if one is no number above 0, or a probe is to be trained, which knows whole embeddings only.
  """
  wrong = next((size for size in DIMS.value if not size.strip().isdecimal() or not int(size)), None)
  if wrong is not None:
    raise UserError(f"--dims={wrong} must be whole numbers above 0, separated by commas")
  if DIMS.value and PROBE.value:
    raise UserError(
      f"--dims scores parts of embeddings, and --probe={PROBE.value} learns from all: leave one of them out"
    )
  return [int(size) for size in DIMS.value]


def check_parts(dims: Sequence[int], model: Model) -> None:
  """Raises a `UserError` for more features than the embeddings have."""
  for size in dims:
    if size >= model.config.embed_dim:
      raise UserError(f"--dims={size} must be below {model.config.embed_dim}, the size of whole embeddings")


def named_features(names: Sequence[str]) -> dict[str, str]:
  """Returns the features that flags name.

  Raises:
    UserError: if a feature is named and no task is a TFDS set or a table, so that the flag would be without effect.
  """
  keys = {flag.name: flag.value for flag in KEY_FLAGS if flag.value}
  if keys and not any(name.startswith(tasks.WITH_KEYS) for name in names):
    raise UserError(
      f"--{next(iter(keys))} names a feature of tfds/<set>, table/<file> or shards: --tasks={','.join(names)} has none"
    )
  return keys


def check_probe(names: Sequence[str]) -> None:
  """Refuses, before anything is loaded, what the names alone show that no probe can be trained for.

  Raises:
    UserError: if a set has no labels or no training split, or is scored on the split that the probe learns from.
  """
  for name in names:
    benchmark = BENCHMARKS.get(tasks.parse(name)[0])
    if name in tasks.EVALUATIONS or name.startswith(tasks.OWN) or (benchmark and benchmark.kind != "classification"):
      raise without_labels(name)
    if tasks.split_of(learned_by(name)) == tasks.split_of(name):
      raise UserError(f"--probe_split={PROBE_SPLIT.value} is what {name} is scored on: name another split")
  for name in names:
    shared = tasks.shared_records(learned_by(name), name, DATA_DIR.value)
    if shared:
      raise UserError(
        f"--probe_split={PROBE_SPLIT.value} holds {shared:,} of the records that {name} is scored on: "
        f"name splits that do not overlap, such as --probe_split=train[:80%] for a set @train[80%:]"
      )


def learned_by(name: str) -> str:
  """What a probe of the set learns from, as `--tasks` calls it."""
  known, _, keys = tasks.parse(name)
  return ":".join([f"{known}@{PROBE_SPLIT.value}", *(f"{key}={value}" for key, value in keys.items())])


def without_labels(name: str) -> UserError:
  return UserError(
    f"--probe={PROBE.value} needs a TFDS set with one label an image, such as tfds/cifar10, not '{name}'"
  )


def probed(
  model: Model | Concatenated,
  name: str,
  tested: EvaluationSet,
  keys: Mapping[str, str],
  hints: Mapping[str, str],
  **about,
) -> Result:
  """Trains a probe on the training split of a set and scores it on the other.

  Raises:
    UserError: if the set has no labels, or its training split has other classes.
  """
  if not isinstance(tested, LabelledSet):
    raise without_labels(name)
  train = tasks.load(learned_by(name), DATA_DIR.value, keys, hints)
  if list(train.classes) != list(tested.classes):
    raise UserError(f"--probe_split={PROBE_SPLIT.value}: that split of {name} has other classes")
  how = {"kind": PROBE.value, "projected": PROBE_PROJECTED.value, "shots": PROBE_SHOTS.value}
  return probe(model, train, tested, **how, **about)


def show_comparison(workdirs: Sequence[str], output: str | None) -> None:
  """Prints the table of several runs and writes their page: beside the first unless `output` says where."""
  workdirs = [paths.run_to_read("--compare", workdir) for workdir in workdirs]
  output = paths.file_to_write("--output", output) if output else None
  runs = compare.read_runs(workdirs)
  console = Console()
  if not console.is_terminal:
    console = Console(width=1000)  # A file has no width at which lines would have to break.
  console.print(compare.in_terminal(runs, compare.table(runs)))
  page = compare.write_comparison(output or Path(workdirs[0]).resolve().parent / "comparison.html", runs)
  print(f"Comparison: {page}")


def show_tasks() -> None:
  """Prints the name, the kind, the size and the origin of every evaluation set that has a name."""
  table = Table("task", "kind", "size", "data", box=None, pad_edge=False, header_style="bold")
  for row in task_list.rows():
    table.add_row(*(Text(column) for column in dataclasses.astuple(row)))
  console = Console()
  if not console.is_terminal:
    console = Console(width=1000)  # A file has no width at which lines would have to break.
  console.print(table, highlight=False)


def joined(arguments: Sequence[str]) -> list[str]:
  """`--compare a b` as the flag reads it, `--compare=a,b`: a shell completes the first and not the second."""
  if "--compare" not in arguments:
    return list(arguments)
  start = arguments.index("--compare") + 1
  stop = next((k for k in range(start, len(arguments)) if arguments[k].startswith("-")), len(arguments))
  line = io.StringIO()
  csv.writer(line, lineterminator="").writerow(arguments[start:stop])  # As absl reads a list: a name may hold a comma.
  return [*arguments[: start - 1], f"--compare={line.getvalue()}", *arguments[stop:]]


if __name__ == "__main__":
  sys.argv = joined(sys.argv)
  cli.run(main)
