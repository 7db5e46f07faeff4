"""Bad records among good ones, through the commands: left out or replaced, counted and named, by every process."""

import functools
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.data.test_tfds import ToyCaptions
from tests.preprocess.test_decoding import png_of, stored

pytestmark = pytest.mark.slow


def picture(number):
  """A picture that differs from every other."""
  levels = np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), np.uint8)
  return stored(Image.fromarray(levels), "PNG")


# What stands in the place of some pictures, and a word of the reason.
BAD = {
  1: (b"", "cannot identify"),
  4: (b"<html>not found</html>", "cannot identify"),
  5: (picture(5)[:200], "runcated"),
  8: (png_of(9000, 9000), "MB to decode"),
  9: (stored(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "none is known to be white"),
  14: (stored(Image.new("RGB", (64, 64), "red"), "JPEG")[:300], "runcated"),
}
COUNT = 17


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("trained") / "run"
  runs.train(folder, "--config.total_steps=8")
  return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A folder of pictures with Karpathy's table, one with odd metadata among them; and a TFDS set of the same."""
  folder = tmp_path_factory.mktemp("data")
  images = folder / "flickr30k" / "images"
  images.mkdir(parents=True)
  rows = []
  for k in range(COUNT):
    (images / f"{k}.png").write_bytes(BAD[k][0] if k in BAD else picture(k))
    rows.append({"filename": f"{k}.png", "split": "test", "sentences": [{"raw": f"said {k} {j}"} for j in range(2)]})
  (folder / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps({"images": rows}))
  with_odd_exif = stored(Image.open(images / "2.png"), "PNG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
  (images / "2.png").write_bytes(with_odd_exif)

  class DamagedCaptions(ToyCaptions):
    """The same pictures, each with a caption; that of the third is no text."""

    def _generate_examples(self):
      for k in range(COUNT):
        content = io.BytesIO((images / f"{k}.png").read_bytes())
        yield k, {"picture": content, "caption": b"\xff\xfe" if k == 3 else f"said {k}", "captions": ["a"], "kind": 0}

  DamagedCaptions(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return folder


def named(path):
  """What a list of bad records holds, by the number of the record."""
  return {row["index"]: row for row in runs.rows(path)}


def assert_named(found):
  assert set(found) == set(BAD)
  for index, (_, why) in BAD.items():
    assert why in found[index]["reason"]


def test_every_process_leaves_the_same_out_of_an_evaluation(workdir, data_dir, tmp_path):
  listed = workdir / "bad_records.jsonl"
  results, lists = [], []
  for processes in (1, 2):
    listed.unlink(missing_ok=True)
    output = tmp_path / f"{processes}.json"
    arguments = "--tasks=flickr30k", f"--workdir={workdir}", f"--data_dir={data_dir}", f"--output={output}"
    # Small batches, so that the bad ones lie in the shares of both processes.
    one = functools.partial(runs.start, "eval.py", *arguments, "--batch_size=4")
    for process in runs.start_together(one, processes) if processes > 1 else [one()]:
      runs.finish(process)
    (result,) = json.loads(output.read_text())
    results.append(result)
    lists.append(named(listed))
    assert_named(lists[-1])
    assert {row["use"] for row in lists[-1].values()} == {"evaluation"}
  assert lists[0] == lists[1]
  assert results[0]["left_out"] == len(BAD)
  alone, together = (result.pop("metrics") for result in results)
  assert results[0] == results[1] and alone.keys() == together.keys()
  for name in alone:
    assert together[name] == pytest.approx(alone[name], abs=1e-5), name


def test_embed_leaves_bad_pictures_out_and_names_them(workdir, data_dir, tmp_path):
  folder = data_dir / "flickr30k" / "images"
  output = tmp_path / "out.npy"
  said = runs.run("embed.py", f"--workdir={workdir}", f"--images={folder}", f"--output={output}", "--batch_size=4")
  assert f"{COUNT - len(BAD)} embeddings" in said and f"Left out {len(BAD)}" in said
  ids = output.with_suffix(".ids.txt").read_text().split()
  assert sorted(ids) == sorted(f"{k}.png" for k in range(COUNT) if k not in BAD)
  listed = {row["set"]: row for row in runs.rows(tmp_path / "out.npy.bad_records.jsonl")}
  assert set(listed) == {f"{k}.png" for k in BAD}
  assert all(why in listed[f"{k}.png"]["reason"] for k, (_, why) in BAD.items())
  # Those that are left have the embeddings that they have alone.
  alone = tmp_path / "alone"
  alone.mkdir()
  (alone / "16.png").write_bytes(picture(16))
  output_alone = tmp_path / "alone.npy"
  runs.run("embed.py", f"--workdir={workdir}", f"--images={alone}", f"--output={output_alone}", "--batch_size=4")
  np.testing.assert_allclose(np.load(output)[ids.index("16.png")], np.load(output_alone)[0], atol=1e-5)


def on_the_damaged_set(data_dir):
  """Overrides that train on the damaged set, whose record 3 has no caption that is text."""
  return (
    "--config.data.sources={'tfds/damaged_captions': 1.0}",
    f"--config.data.data_dir={data_dir}",
    "--config.data.image_key=picture",
    "--config.data.augment.flip=0.0",
    "--config.total_steps=8",
    "--config.batch_size=16",
  )


def test_distill_writes_no_target_of_a_bad_record_and_a_run_can_use_the_others(workdir, data_dir, tmp_path):
  cache, student = tmp_path / "targets", on_the_damaged_set(data_dir)
  said = runs.run("distill.py", f"--teacher={workdir}", runs.TINY, *student, f"--output={cache}", "--batch_size=4")
  good = [k for k in range(COUNT) if k not in BAD and k != 3]
  assert f"{len(good)} samples, {COUNT - len(good)} could not be read" in said
  (ids,) = cache.rglob("ids.npy")
  assert np.load(ids).tolist() == good
  found = named(cache / "bad_records.jsonl")
  assert "not UTF-8" in found.pop(3)["reason"]
  assert_named(found)
  assert all(row["shard"].startswith("damaged_captions-train") and row["split"] == "train" for row in found.values())
  assert {row["use"] for row in found.values()} == {"distillation"}

  terms = "--config.objective={'sigmoid': 1.0, 'distill_features': 1.0}"
  runs.train(tmp_path / "student", *student, terms, f"--config.distillation.targets={cache}")
  assert set(named(tmp_path / "student" / "bad_records.jsonl")) == {*BAD, 3}


def test_processes_replace_the_same_records_and_score_the_same_pictures(data_dir, tmp_path):
  arguments = (
    *on_the_damaged_set(data_dir),
    "--config.evals=('flickr30k',)",
    "--config.eval_every=8",
  )
  alone, together = tmp_path / "alone", tmp_path / "together"
  runs.train(alone, *arguments)
  runs.train_together(together, *arguments, processes=2, devices=1)
  np.testing.assert_allclose(runs.losses(together), runs.losses(alone), atol=1e-4)
  lists = [named(path) for path in (alone / "bad_records.jsonl", *sorted(together.glob("*bad_records.jsonl")))]
  # Each process names what it has met itself; those of the evaluation are named by the first.
  assert set(lists[0]) == {*BAD, 3} == set().union(*lists[1:])
  scores = [json.loads((folder / "eval" / "flickr30k@8.json").read_text()) for folder in (alone, together)]
  for score in scores:
    assert score["left_out"] == len(BAD)
  for name, value in scores[0]["metrics"].items():
    assert scores[1]["metrics"][name] == pytest.approx(value, abs=0.1), name
