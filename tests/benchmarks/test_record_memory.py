"""A record takes no more memory than one may, however large it is and whatever it promises."""

import re
import subprocess
import sys

import pytest

# The kinds that come closest, or once took more.
KINDS = (
  "PNG RGB",
  "PNG RGBA, twice as wide as high",
  "PNG palette, transparent",
  "PNG grey and alpha",
  "PNG one pixel high",
  "JPEG baseline",
  "WebP",
  "SGI",
  "clip WebP",
  "TIFF one strip",
  "ICO of a PNG of 9000 x 9000",
  "TIFF tile of 16000 x 16000",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_record_of_a_kind_keeps_to_the_limit(kind):
  command = [sys.executable, "-W", "ignore", "-m", "benchmarks.record_memory", f"--kinds=^{re.escape(kind)}$"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert not done.returncode, done.stdout + done.stderr
  (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {kind} |")]
  assert row.count("refused") == (8 if " of " in kind else 0), row
