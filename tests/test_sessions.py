"""The record of a run's sessions: what it says, that it survives damage, and that it never stops a run."""

import json
import re
import subprocess
import time

import jax
import pytest

from contrastive_jax import sessions
from contrastive_jax.sessions import Session

DEVICES = jax.devices("cpu")[:1]


def session(workdir, start=0):
  return Session(workdir, began=time.monotonic() - 5, start=start, devices=DEVICES)


def test_a_session_is_on_disk_from_its_beginning(tmp_path):
  session(tmp_path)
  (record,) = sessions.read(tmp_path)
  assert record["step"] == 0 and 5 <= record["seconds"] < 60
  assert record["versions"]["jax"] == jax.__version__
  assert record["command"].startswith("python ") and "core" in record["hardware"]


def test_durations_of_sessions_add_up_and_a_killed_one_keeps_its_last_logged_step(tmp_path):
  session(tmp_path).reach(10)  # Killed after step 10: nothing closes it.
  resumed = session(tmp_path, start=8)
  resumed.reach(20)
  records = sessions.read(tmp_path)
  assert [(each["start"], each["step"]) for each in records] == [(0, 10), (8, 20)]
  facts = sessions.facts([each | {"seconds": 100.0} for each in records])
  assert facts["Time"] == "3 min 20 s in 2 sessions"


def test_commands_are_listed_once_in_order_and_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
  for value in ("a b", "a b", "{'noto': 1.0}"):
    monkeypatch.setattr("sys.argv", ["train.py", f"--config.x={value}"])
    session(tmp_path)
  assert sessions.commands(sessions.read(tmp_path)) == [
    "python train.py '--config.x=a b'",
    """python train.py '--config.x={'"'"'noto'"'"': 1.0}'""",
  ]
  echoed = subprocess.run(
    ["bash", "-c", sessions.commands(sessions.read(tmp_path))[1].replace("python train.py", "printf %s")],
    capture_output=True,
    text=True,
    check=True,
  )
  assert echoed.stdout == "--config.x={'noto': 1.0}"


@pytest.mark.parametrize(
  "content", ["", "{", "[]", "{}", "[1]", '[{"started": 1}]', "null", '[{"started": "x", "seconds": "1"}]']
)
def test_a_damaged_record_is_no_record_and_a_new_session_replaces_it(content, tmp_path):
  (tmp_path / "sessions.json").write_text(content)
  assert sessions.read(tmp_path) == []
  assert sessions.facts([]) == {} and sessions.commands([]) == []
  session(tmp_path).reach(3)
  assert [each["step"] for each in sessions.read(tmp_path)] == [3]


def test_a_session_whose_record_was_changed_is_left_out_and_the_others_stay(tmp_path, caplog):
  for start in (0, 4, 8):
    session(tmp_path, start)
  path = tmp_path / "sessions.json"
  path.write_text(path.read_text().replace('"start": 4', '"start": 5'))
  assert [each["start"] for each in sessions.read(tmp_path)] == [0, 8]
  assert str(path) in caplog.text
  session(tmp_path, 9)
  assert [each["start"] for each in sessions.read(tmp_path)] == [0, 8, 9]


def test_bytes_that_are_no_text_are_no_record(tmp_path):
  (tmp_path / "sessions.json").write_bytes(b"\xff\xfe\x00")
  assert sessions.read(tmp_path) == []


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(sessions, "write_atomically", full)
  session(tmp_path).reach(1)
  assert sessions.read(tmp_path) == []


def test_the_commit_of_a_checkout(tmp_path):
  assert re.fullmatch(r"([0-9a-f]{40}( with uncommitted changes)?)?", sessions.commit())


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.0, "0 s"),
    (59.4, "59 s"),
    (59.6, "1 min 00 s"),
    (320.0, "5 min 20 s"),
    (3599.7, "1 h 00 min"),
    (11_100.0, "3 h 05 min"),
    (86_399.0, "1 d 0 h"),
    (255_736.0, "2 d 23 h"),
  ],
)
def test_durations(seconds, text):
  assert sessions.duration(seconds) == text


def test_the_record_is_plain_json(tmp_path):
  session(tmp_path)
  assert isinstance(json.loads((tmp_path / "sessions.json").read_text())[0]["versions"], dict)
