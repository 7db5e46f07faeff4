"""The disk filled at seeded moments of real runs of train.py: no hang, one sentence, the same bits once there is room.

  python -m benchmarks.disk_full               # 20 moments; needs the right to mount a tmpfs
  python -m benchmarks.disk_full --moments=3

Each run lives on a small tmpfs of its own, which a file fills when the run has reached its step. The run must end by
itself with a nonzero code and without a traceback, unless it was past its last save. Then the file is removed, and the
same command must end with the same bits as a run whose disk was never full.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

TIMEOUT = 300


def _command(workdir: Path) -> list[str]:
  options = (f"--config={_CONFIG.value}", f"--workdir={workdir}", f"--config.total_steps={_STEPS.value}")
  return [sys.executable, "train.py", *options]


def fill(disk: Path) -> Path:
  """Writes zeros until there is no room for another byte."""
  filler = disk / "filler"
  with filler.open("wb", buffering=0) as file:
    for size in (2**16, 2**8, 1):
      try:
        while True:
          file.write(bytes(size))
      except OSError:
        continue
  return filler


def moment(disk: Path, step: int, delay: float) -> tuple[bool, str]:
  """Fills the disk when `step` steps are logged and `delay` seconds more have gone by; a verdict and why."""
  workdir = disk / "run"
  process = subprocess.Popen(_command(workdir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  ids = workdir / "sample_ids.jsonl"
  while process.poll() is None and not (ids.exists() and ids.read_bytes().count(b"\n") >= step):
    time.sleep(0.005)
  time.sleep(delay)
  filler = fill(disk)
  try:
    output, _ = process.communicate(timeout=TIMEOUT)
  except subprocess.TimeoutExpired:
    process.kill()
    return False, "hangs"
  code, said = process.returncode, output.strip().splitlines()[-1:]
  filler.unlink()
  if "Traceback" in output:
    return False, f"exit code {code} with a traceback: {output[-1500:]}"
  again = subprocess.run(_command(workdir), capture_output=True, text=True, timeout=TIMEOUT, check=False)
  if again.returncode:
    return False, f"exit code {code}, {said}; with room again {again.returncode}, {again.stderr.strip()[-200:]}"
  return True, f"exit code {code}: {said}"


def final_sums(workdir: Path) -> object:
  """Returns the checksums of the newest checkpoint."""
  checkpoints = workdir / "checkpoints"
  newest = max((path for path in checkpoints.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
  about = json.loads((newest / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
  return newest.name, about["checksum"]


def main(_: list[str]) -> None:
  draw, failed = random.Random(_SEED.value), 0
  with tempfile.TemporaryDirectory() as scratch:
    reference = Path(scratch) / "reference"
    subprocess.run(_command(reference), check=True, capture_output=True, timeout=TIMEOUT)
    for number in range(_MOMENTS.value):
      disk = Path(scratch) / f"disk{number}"
      disk.mkdir()
      subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE.value}", "tmpfs", str(disk)], check=True)
      try:
        step, delay = draw.randrange(_STEPS.value), draw.choice((0.0, 0.02, 0.2))
        good, why = moment(disk, step, delay)
        if good and final_sums(disk / "run") != final_sums(reference):
          good, why = False, f"{why}; it ends with other bits"
      finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
      failed += not good
      print(f"{number:3} after step {step:3} + {delay:4} s: {'good' if good else 'BAD'}  {why}", flush=True)
  print(f"{_MOMENTS.value - failed} of {_MOMENTS.value} moments are good.")
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  # Not where another module uses `fill`, which may have flags of these names.
  _MOMENTS = flags.DEFINE_integer("moments", 20, "How many times the disk is filled.", lower_bound=1)
  _SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments.")
  _SIZE = flags.DEFINE_string("size", "24m", "Size of the disk.")
  _CONFIG = flags.DEFINE_string("config", "tests/tiny.py", "What is trained; it must write sample_ids.jsonl.")
  _STEPS = flags.DEFINE_integer("steps", 24, "Steps of each run.")
  app.run(main)
