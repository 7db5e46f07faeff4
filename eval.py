"""Scores a trained model: python eval.py --workdir=runs/emoji --tasks=emoji_openmoji,tfds/digits"""

import json
from pathlib import Path

from absl import flags

from contrastive_jax import cli
from contrastive_jax.errors import UserError
from contrastive_jax.evaluation.evaluate import evaluate
from contrastive_jax.evaluation.results import as_json, headline, write_atomically
from contrastive_jax.inference import load
from contrastive_jax.parallel import distributed
from data import tasks

WORKDIR = flags.DEFINE_string("workdir", None, "The run, or weights imported by convert.py.")
TASKS = flags.DEFINE_list("tasks", ["emoji_openmoji"], "Names of evaluation sets, separated by commas.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.", lower_bound=0)
OUTPUT = flags.DEFINE_string("output", None, "Also writes all results as one JSON list to this file.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "Where TFDS sets lie; TFDS' default if empty.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images or texts encoded at once.", lower_bound=1)


def main() -> None:
  if not WORKDIR.value:
    raise UserError("--workdir is missing: name a run, such as --workdir=runs/emoji")
  workdir = Path(WORKDIR.value)
  distributed.initialize()
  for name in TASKS.value:
    tasks.check(name)
  model = load(workdir, STEP.value, batch_size=BATCH_SIZE.value, progress=distributed.is_main())
  sets = [tasks.load(name, DATA_DIR.value) for name in TASKS.value]
  architecture = json.loads((workdir / "config.json").read_text())["name"]
  results = evaluate(model, sets, workdir=workdir, step=model.step, architecture=architecture)
  if distributed.is_main():
    rows = [as_json(result, model=architecture, pretrained=f"{workdir}@{model.step}") for result in results]
    if OUTPUT.value:
      write_atomically(OUTPUT.value, json.dumps(rows, indent=2) + "\n")
    for result in results:
      words = headline(result)
      print(f"{result.dataset}: {words['figure']} {words['sentence']}")


if __name__ == "__main__":
  cli.run(main)
