"""A person's own pictures, from a table to a report: trained, resumed with the same bits, scored and embedded."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data.sources.indexed import IndexedSource
from tests import runs

pytestmark = pytest.mark.slow
COUNT = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Plain pictures and a table of their captions; one cannot be decoded and one is missing."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["image", "caption"])
    for number in range(COUNT):
      level = rng.integers(0, 256, 3)
      Image.new("RGB", (20 + number % 5, 16), tuple(map(int, level))).save(folder / f"{number}.png")
      table.writerow([f"{number}.png", f"red {level[0]}, green {level[1]} and blue {level[2]}"])
  (folder / "7.png").write_bytes(b"no picture")
  (folder / "8.png").unlink()
  return folder


def test_a_run_resumes_with_the_same_bits_on_other_numbers_of_devices_and_workers(photos, tmp_path):
  sources = json.dumps({"mine": {"name": f"table/{photos / 'captions.csv'}@train", "weight": 1.0}})
  options = (
    f"--config.data.sources={sources}", f"--config.evals=('table/{photos / 'captions.csv'}@test',)",
    "--config.total_steps=12", "--config.checkpoint_every=6", "--config.data.max_bad_share=0.2",
  )  # fmt: skip
  runs.train(tmp_path / "whole", *options)
  shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "12")
  assert "from step 6" in runs.train(tmp_path / "resumed", *options, "--config.data.workers=2")
  whole, resumed = runs.final_state(tmp_path / "whole"), runs.final_state(tmp_path / "resumed")
  for name, leaf in whole.items():
    np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)
  bad = {row["reason"].split()[-1] for row in runs.rows(tmp_path / "whole" / "bad_records.jsonl")}
  assert "missing" in bad and len(bad) == 2
  samples = runs.rows(tmp_path / "whole" / "sample_ids.jsonl")
  runs.train(tmp_path / "wide", *options, devices=4)
  assert [row["ids"] for row in runs.rows(tmp_path / "wide" / "sample_ids.jsonl")] == [row["ids"] for row in samples]


def test_the_commands_of_the_readme_train_score_and_embed(photos, tmp_path):
  table, workdir = photos / "captions.csv", tmp_path / "run"
  small = [f"--config.model.{tower}.transformer.depth=1" for tower in ("image", "text")]
  short = ("--config.total_steps=2", "--config.schedule.warmup_steps=1", "--config.batch_size=8", *small)
  said = runs.run("train.py", f"--config=configs/own_pairs.py:{table}", f"--workdir={workdir}", *short)
  assert "captions rank their image" in said and (workdir / "report.html").is_file()
  said = runs.run("eval.py", f"--workdir={workdir}", f"--tasks=table/{table}")
  assert "2 more cannot be read and were left out" in said
  runs.run("embed.py", f"--workdir={workdir}", f"--images={photos}", f"--output={tmp_path / 'out.parquet'}")
  shards = tmp_path / "shards"
  of_the_set = (f"--workdir={workdir}", f"--source=table/{table}", f"--output={shards}", "--shard_rows=25")
  assert f"{shards} holds {COUNT - 2} embeddings" in runs.run("embed.py", *of_the_set)
  tables = [pq.read_table(file) for file in (*sorted(shards.glob("*.parquet")), tmp_path / "out.parquet")]
  *parts, whole = ({key: row for key, row in zip(*table.to_pydict().values(), strict=True)} for table in tables)
  found = {key: row for part in parts for key, row in part.items()}
  assert len(parts) == 3 and found.keys() == whole.keys()
  for key, row in whole.items():
    np.testing.assert_allclose(found[key], row, atol=1e-5)
  said = runs.run("embed.py", *of_the_set)
  assert said.count("embeddings, as before") == 3
  said = runs.run("embed.py", *of_the_set[:2], "--of=texts", f"--output={tmp_path / 'texts'}")
  assert f"holds {COUNT} embeddings" in said
  said = runs.run("embed.py", f"--workdir={workdir}", f"--images={photos}", "--output=x.npy", "--of=texts", expected=2)
  assert "--of belongs to --source" in said
  said = runs.run("train.py", f"--config=configs/own_pairs.py:{photos / 'none.csv'}", "--workdir=x", expected=2)
  assert "none.csv does not exist" in said


SHORT = (
  "--config.total_steps=2", "--config.schedule.warmup_steps=1", "--config.batch_size=8",
  "--config.model.image.transformer.depth=1", "--config.model.text.transformer.depth=1",
)  # fmt: skip


def commands(guide):
  """The commands in the blocks of a guide that are marked as a shell's."""
  text = (runs.ROOT / guide).read_text(encoding="utf-8")
  blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
  return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@pytest.mark.extra
def test_the_commands_of_the_guide_do_what_it_says(photos, tmp_path):
  """Followed literally in a folder that has the project, photos and tars; trained for two steps with shallow towers."""
  for name in ("train.py", "eval.py", "embed.py", "configs", "data", "contrastive_jax"):
    (tmp_path / name).symlink_to(runs.ROOT / name)
  shutil.copytree(photos, tmp_path / "photos")
  (tmp_path / "shards").mkdir()
  with webdataset.ShardWriter(str(tmp_path / "shards" / "%03d.tar"), maxcount=20, verbose=0) as writer:
    for number in range(COUNT):
      if number not in (7, 8):
        picture = (photos / f"{number}.png").read_bytes()
        said = {"similarity": number / COUNT}
        writer.write({"__key__": f"{number}", "png": picture, "txt": f"picture {number}", "json": said})
  said = {}
  for python, *words in commands("docs/data.md"):
    assert python == "python"
    short = SHORT if words[0] == "train.py" else ()
    done = subprocess.run(
      [sys.executable, *words, *short],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    said[" ".join(words)] = done.stdout
  assert (tmp_path / "runs/photos/report.html").is_file() and (tmp_path / "runs/shards/report.html").is_file()
  assert any("indexes 58 samples of 3 files" in output for output in said.values())
  assert len(IndexedSource("webdataset", f"{tmp_path}/converted/*.tar")) == COUNT - 2
  assert (tmp_path / "look.html").is_file() and (tmp_path / "noto.html").is_file()
  assert sum(pq.read_metadata(file).num_rows for file in (tmp_path / "embedded").glob("*.parquet")) == COUNT - 2
