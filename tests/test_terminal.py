"""Commands go on when nobody reads any more what they print."""

import io
import os
import subprocess
import sys

import pytest

from contrastive_jax import terminal


def opened(path_or_descriptor):
  return io.TextIOWrapper(
    io.FileIO(path_or_descriptor, "w", closefd=isinstance(path_or_descriptor, str)),
    encoding="ascii",
    write_through=True,
  )


def test_a_pipe_that_is_no_longer_read_takes_what_is_written():
  read, write = os.pipe()
  stream = terminal.lasting(opened(write), write)
  print("heard \u00e4", file=stream, flush=True)
  assert os.read(read, 100) == b"heard \\xe4\n"
  os.close(read)
  for _ in range(3):
    print("unheard" * 10_000, file=stream, flush=True)


def test_a_terminal_that_was_closed_takes_what_is_written():
  controller, side = os.openpty()
  stream = terminal.lasting(opened(side), side)
  assert stream.isatty()
  os.close(controller)
  print("unheard", file=stream, flush=True)


def test_a_full_disk_is_still_told():
  original = opened("/dev/full")
  with pytest.raises(OSError, match="No space left"):
    print("kept", file=terminal.lasting(original, original.fileno()), flush=True)


def test_streams_without_a_descriptor_stay_as_they_are():
  stream = io.StringIO()
  assert terminal.lasting(stream, 1) is stream
  print("nowhere", file=terminal.lasting(None, 1), flush=True)


@pytest.mark.parametrize("closing", ["| head -n 1", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_command_ends_as_it_would_have_ended(closing, tmp_path):
  script = tmp_path / "say.py"
  script.write_text(
    "import sys\nfrom contrastive_jax import cli\n"
    "def main():\n"
    "  for stream in (sys.stdout, sys.stderr) * 1000:\n    print('some length' * 20, file=stream, flush=True)\n"
    f"  open({str(tmp_path / 'done')!r}, 'w').close()\n"
    "cli.run(main)\n"
  )
  command = f"set -o pipefail; {sys.executable} {script} {closing}"
  done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
  assert done.returncode == 0 and (tmp_path / "done").exists()
