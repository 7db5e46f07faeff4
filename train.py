"""Trains a config into a run directory, or resumes an unfinished run there.

python train.py --config=configs/emoji.py --workdir=runs/emoji [--config.batch_size=512 ...]

--config.<field>=<value> overrides a field of the config; configs/common.py explains every field. SIGINT (Ctrl-C),
SIGTERM and SIGHUP (a closed terminal) stop a run after a checkpoint, and the same command resumes it. A run directory
is locked while a command works on it: a second one is refused. Records that cannot be read are replaced and listed in
WORKDIR/bad_records.jsonl.

Exit codes: 0 the run is complete; 2 a mistake in the command, the config or the data; 3 a loss, gradient or parameter
is not finite; 4 a file or a checkpoint cannot be written; 129, 130 or 143 stopped by SIGHUP, SIGINT or SIGTERM. After
4, 129, 130 and 143 the same command resumes the run.
"""

import sys

from absl import flags

from contrastive_jax import cli, paths, pretrain
from contrastive_jax.errors import UserError
from data import build

CONFIG = cli.define_config("What to run, such as configs/emoji.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; an unfinished run in it is resumed.")


def main() -> None:
  config = cli.config_value(CONFIG)
  if not WORKDIR.value:
    raise UserError("--workdir is missing: name a directory for the run, such as --workdir=runs/emoji")
  outcome = pretrain.train(config, paths.run_to_write("--workdir", WORKDIR.value), data=build)
  if outcome.exit_code:
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
  cli.run(main)
