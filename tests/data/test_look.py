"""The page that people look at before they train, against the files that the test wrote and the batches of the run."""

import base64
import csv
import html.parser
import io
import random
import re

import numpy as np
import pytest
import tokenizers as huggingface
from PIL import Image
from toy import ToySource

from configs import common, own_pairs
from contrastive_jax.preprocess.video import ArrayClip
from contrastive_jax.training.run import Run
from data import build, look
from data.seen import Reader, chips, cut_text, pixels_of, tokens_of, whole_tokens
from data.sources import Example
from data.survey import look_at, script_of, survey
from tests import runs

COUNT, LENGTH = 60, 12
SCRIPT = "<script>alert('caption')</script> & \"quotes\""
LONG = "a long story of one red fox, two blue birds, three green trees and four grey stones in the rain of an evening"
SIZES = {number: (40 + 7 * number, 30 + 11 * (number % 9)) for number in range(COUNT)}
PLAIN = {7: SCRIPT, 8: LONG, 9: "красная лиса", 10: "赤い狐"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  """Sixty noisy pictures; of 5 there is a copy, "photo" is the caption of seven, 3 has two; two cannot be read."""
  folder = tmp_path_factory.mktemp("photos")
  noise = np.random.default_rng(0)
  rows = []
  for number, (width, height) in SIZES.items():
    pixels = noise.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    caption = "photo" if number % 9 == 2 else PLAIN.get(number, f"picture number {number}")
    rows.append({"image": f"{number}.png", "caption": caption})
  rows += [{"image": "3.png", "caption": "three"}]
  (folder / "copy.png").write_bytes((folder / "5.png").read_bytes())
  (folder / "broken.png").write_bytes(b"no picture")
  rows += [{"image": f"{name}.png", "caption": f"the {name} one"} for name in ("copy", "broken", "gone")]
  with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, ["image", "caption"])
    writer.writeheader()
    writer.writerows(rows)
  return folder / "captions.csv"


def config_of(table, **data):
  config = own_pairs.get_config(str(table))
  config.data.sources = {"own": {"name": f"table/{table}", "weight": 1.0}}
  config.data.update(data)
  config.batch_size, config.total_steps, config.schedule.warmup_steps = 16, 20, 0
  config.model.text.vocab_size, config.model.text.length = 300, LENGTH
  return config


def opened(config):
  run = Run.from_config(config)
  sources = build.open_sources(run.config, run.source_names())
  tokenizer = build.make_tokenizer(config.tokenizer, config.model.text.vocab_size, sources.values())
  return run, sources, tokenizer


def looked_at(run, sources, tokenizer, grid=24, samples=1000, only=None):
  reader = Reader(run, sources, tokenizer)
  shown = [only] if only else list(sources)
  return [look.look(run, name, sources[name], reader, tokenizer, grid=grid, samples=samples) for name in shown]


@pytest.fixture(scope="module")
def seen(table):
  """The run, its sources, its tokenizer, what is said of it, and the page."""
  parts = opened(config_of(table))
  looks = looked_at(*parts)
  return *parts, looks, look.page(parts[0], looks, parts[2])


class Parsed(html.parser.HTMLParser):
  """The texts and the tags of a page as a browser reads them."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.texts, self.images = [], [], []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == "img":
      self.images.append(dict(attrs))

  def handle_data(self, data):
    self.texts.append(data)

  def pixels(self):
    """The pictures that are drawn as the model sees them."""
    sources = [image["src"] for image in self.images if "seen" in image["class"]]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def tiles(page):
  return {words: number for number, words in re.findall(r"<b>([^<]*)</b><span[^>]*>([^<]*)</span>", page)}


def test_the_numbers_are_those_of_the_files(seen, tmp_path):
  _, _, tokenizer, (said,), page = seen
  found = said.survey
  captions = ["photo" if n % 9 == 2 else PLAIN.get(n, f"picture number {n}") for n in range(COUNT)]
  captions += ["three", "the copy one"]
  assert sorted(found.captions) == sorted(captions)
  tokenizer.save(tmp_path)
  other = huggingface.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  lengths = [len(other.encode(caption).ids) for caption in captions]
  cut = sum(length > LENGTH for length in lengths)
  assert sorted(said.lengths) == sorted(lengths) and 0 < cut < len(lengths)
  photos = sum(n % 9 == 2 for n in range(COUNT))
  assert found.same_captions == [("photo", photos)] and photos == 7
  assert tiles(page) == {
    f"of {len(captions)} captions are cut at {LENGTH} tokens": f"{100 * cut / len(captions):.1f}%",
    f"of {COUNT + 3} records cannot be read": "2",
    f"of {COUNT + 1} pictures repeat the pixels of another": "1",
    "pictures share a caption, the most frequent one: photo": "7",
  }
  assert [[record.file.rpartition("/")[2] for record in same] for same in found.same_pictures] == [
    ["5.png", "copy.png"]
  ]
  facts = said.facts
  assert facts["Records"] == f"{COUNT + 3}" and facts["Captions of a picture"].startswith("1 to 2, mean 1.02")
  assert facts["Pairs that the run draws"] == "320" and facts["Epochs"] == f"{320 / 63:.3g}"
  assert facts["Share of the pairs of the run"] == "100.0%"
  scripts = {script.name: script.captions for script in found.scripts}
  assert scripts == {"Latin": len(captions) - 2, "Cyrillic": 1, "Han": 1}


def test_bars_count_the_sizes_that_were_written(seen):
  *_, (said,), _ = seen
  sizes = [*SIZES.values(), SIZES[5]]
  charts = {chart.title: chart for chart in said.histograms}
  for title, values in (("Width", [w for w, _ in sizes]), ("Height", [h for _, h in sizes])):
    total = 0
    for bar in charts[title].bars:
      low, high, count = map(int, re.fullmatch(r"(\d+) to (\d+) px: (\d+) pictures?", bar.label).groups())
      assert count == sum(low <= value <= high for value in values)
      total += count
    assert total == len(values)
    assert charts[title].summary == f"median {np.median(values):,.0f}, {min(values)} to {max(values)} px"
  beyond = sum(int(bar.label.split(": ")[1].split()[0]) for bar in charts["Tokens of a caption"].bars if bar.beyond)
  assert beyond == said.cut


def test_bad_records_are_named_with_their_reasons(seen):
  *_, page = seen
  table = page.partition("Records that cannot be read</h3>")[2].partition("</table>")[0]
  rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
  assert [(row[0], row[2].rpartition("/")[2]) for row in rows] == [("61", "broken.png"), ("62", "gone.png")]
  assert rows[1][1].endswith("is missing") and rows[0][1]


def test_captions_are_escaped(seen):
  *_, page = seen
  parsed = Parsed(page)
  assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "link", "object"}
  assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
  assert "<script" not in page and "http://" not in page and "https://" not in page
  assert SCRIPT in seen[3][0].survey.captions


def test_a_hostile_caption_stands_on_the_page_as_text(tmp_path):
  for number in range(4):
    Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / f"{number}.txt").write_text(f"{SCRIPT}\n<img src=x onerror=alert(1)> {number}\n")
  config = config_of(tmp_path)
  config.data.sources = {"own": {"name": f"folder/{tmp_path}", "weight": 1.0}}
  config.model.text.length = 64
  run, sources, tokenizer = opened(config)
  looks = looked_at(run, sources, tokenizer, grid=8)
  parsed = Parsed(look.page(run, looks, tokenizer))
  assert "script" not in {tag for tag, _ in parsed.tags}
  assert all(image["src"].startswith("data:image/") and "onerror" not in image for image in parsed.images)
  assert any(SCRIPT in text for text in parsed.texts)


def shown_of(seen):
  return [shown for said in seen[3] for group in said.groups for shown in group.pairs]


def rebuilt(patches, coords, size):
  """Puts patches where their coordinates say, one after the other."""
  height, width = (coords[:, 1:].max(axis=0) + 1) * size
  picture = np.zeros((height, width, 3), np.uint8)
  for patch, (_, y, x) in zip(patches, coords, strict=True):
    picture[y * size : (y + 1) * size, x * size : (x + 1) * size] = patch.reshape(size, size, 3)
  return picture


def curriculum(config, **stage):
  config.curriculum = (common.stage("only", config.total_steps, **stage),)
  return config


WAYS = {
  "fixed": lambda config: config,
  "native": lambda config: curriculum(config, mode="native", min_tokens=1, max_tokens=16),
  "naflex": lambda config: curriculum(config, mode="naflex", lengths=(9, 16)),
  "packed": lambda config: curriculum(config, mode="native", min_tokens=1, max_tokens=16, rows=3, row_length=32),
}


@pytest.mark.parametrize("way", WAYS)
def test_pictures_and_tokens_are_those_of_the_batches(table, way):
  config = config_of(table)
  if way == "packed":
    config.data.update({"pack_pairs": 8, "text_rows": 2, "text_row_length": 32})
    config.model.text.update({"attend_padding": False, "pool": "mean"})
  run, sources, tokenizer = opened(WAYS[way](config))
  looks = looked_at(run, sources, tokenizer, samples=1)
  pictures = Parsed(look.page(run, looks, tokenizer)).pixels()
  shown = shown_of((0, 0, 0, looks))
  patch = run.model.image.patch_size
  pipeline = build.make_pipeline(run, run.segments, sources, tokenizer, (0, 1))
  assert [(each.pair.step, each.pair.row) for each in shown] == [divmod(k, 16) for k in range(24)]
  assert len(pictures) == 24
  batches = [pipeline.batch(step) for step in (0, 1)]
  originals = set()
  for each, picture in zip(shown, pictures, strict=True):
    batch = batches[each.pair.step]
    row, number = (each.pair.row, 1) if way != "packed" else batch.image.locations[each.pair.row]
    mine = slice(None) if way == "fixed" else batch.image.segment_ids[row] == number
    expected = rebuilt(batch.image.patches[row][mine], batch.image.coords[row][mine], patch)
    np.testing.assert_array_equal(picture, expected)
    np.testing.assert_array_equal(each.pair.picture[0], expected)
    if way == "packed":
      row, number = batch.text.locations[each.pair.row]
      assert each.pair.tokens == tuple(batch.text.tokens[row][batch.text.segment_ids[row] == number])
    else:
      assert each.pair.tokens == tuple(t for t in batch.text.tokens[each.pair.row] if t != tokenizer.pad_id)
    own = next(iter(sources.values()))
    assert batch.ids[each.pair.row] == each.pair.index  # The only source begins at 0.
    np.testing.assert_array_equal(each.pair.original, own[each.pair.index].image)
    assert {each.pair.caption, *each.pair.others} == set(own.text(each.pair.index).captions)
    whole = whole_tokens(tokenizer, [each.pair.caption], 500)[0]
    assert (each.cut[1] > 0) == (len(each.pair.tokens) < len(whole))
    originals.add(each.pair.index)
  assert len(originals) > 20


def test_a_record_that_stands_in_for_a_bad_one_says_so(seen):
  pages = seen[4]
  stands = [shown.pair for shown in shown_of(seen) if shown.pair.index != shown.pair.planned]
  planned = [pair.planned for pair in stands]
  assert set(planned) <= {61, 62}
  for number in planned:
    assert f"in the place of record {number}, which is bad" in pages
  run, sources, tokenizer = seen[:3]
  reader = Reader(run, sources, tokenizer)
  (name,) = sources
  everything = list(reader.pairs(reader.places(name, range(4), 64)))[:63]
  assert sorted(pair.planned for pair in everything) == list(range(63))
  assert {pair.planned: pair.index for pair in everything if pair.index != pair.planned} == {61: 0, 62: 0}


def test_every_source_shows_pairs_of_its_own_and_rare_ones_are_found(table, tmp_path):
  for number in range(5):
    Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / f"{number}.txt").write_text(f"red {number}\n")
  config = config_of(table)
  rare = f"folder/{tmp_path}"
  config.data.sources = {"a": {"name": f"table/{table}", "weight": 1.0}, "b": {"name": rare, "weight": 0.02}}
  run, sources, tokenizer = opened(config)
  reader = Reader(run, sources, tokenizer)
  places = reader.places(rare, range(20), 5)
  whole = build.make_pipeline(run, run.segments, sources, tokenizer, (0, 1))
  ids = np.concatenate([whole.ids(step) for step in range(20)])
  # Sources are numbered by their names in order: the folder's is the first.
  expected = np.flatnonzero(ids < 1 << 40)[:5]
  assert places == [divmod(int(k), 16) for k in expected] and places[-1][0] > 2 and len(places) == 5
  pairs = list(reader.pairs(places))
  assert all(pair.caption == f"red {pair.index}" and pair.original[0, 0, 0] == 60 * pair.index for pair in pairs)
  assert reader.places(rare, range(1), 5) == [place for place in places if place[0] == 0]


def test_pairs_can_be_those_of_a_later_step_and_of_each_stage(seen, table):
  run, sources, tokenizer = seen[:3]
  (name,) = sources
  reader = Reader(run, sources, tokenizer)
  said = look.look(run, name, sources[name], reader, tokenizer, grid=20, samples=1, step=7)
  (group,) = said.groups
  assert [(each.pair.step, each.pair.row) for each in group.pairs] == [divmod(7 * 16 + k, 16) for k in range(20)]
  last = look.look(run, name, sources[name], reader, tokenizer, grid=40, samples=1, step=19).groups[0]
  assert len(last.pairs) == 16
  config = config_of(table)
  config.curriculum = (common.stage("small", 12, size=32), common.stage("large", 0, size=64, batch_size=24))
  (said,) = looked_at(*opened(config), grid=3, samples=1)
  assert [(group.stage, group.first) for group in said.groups] == [("small", 0), ("large", 12)]
  assert [{each.picture.shape for each in group.pairs} for group in said.groups] == [{(32, 32, 3)}, {(64, 64, 3)}]


def test_records_are_evenly_spread():
  source = ToySource("toy", 1000, bad={300})
  found = survey(source, 10, threads=2)
  assert [record.index for record in found.records] == list(range(0, 1000, 100)) and found.total == 1000
  assert [record.index for record in found.bad] == [300] and found.bad[0].reason == "made bad for the test"
  assert [record.index for record in survey(ToySource("toy", 40), 5000).records] == list(range(40))
  # The brightness of the toy's pictures has 256 levels.
  assert [len(same) for same in survey(ToySource("toy", 300), 300).same_pictures] == [2] * 44


def test_pictures_are_the_same_when_all_their_pixels_are():
  class Pictures(ToySource):
    pictures = (np.zeros((4, 6, 3)), np.zeros((6, 4, 3)), np.zeros((4, 6, 3)), np.eye(4, 6)[..., None] * np.ones(3))

    def __getitem__(self, index):
      return Example(self.pictures[index].astype(np.uint8), self.text(index), index)

  found = survey(Pictures("p", 4), 4)
  assert [[record.index for record in same] for same in found.same_pictures] == [[0, 2]]
  assert [(record.width, record.height) for record in found.records] == [(6, 4), (4, 6), (6, 4), (6, 4)]


def test_clips_tell_their_frames():
  class Clips(ToySource):
    def __getitem__(self, index):
      return Example(ArrayClip(np.zeros((3 + index, 8, 10, 3), np.uint8)), self.text(index), index)

  record = look_at(Clips("clips", 3), 2)
  assert (record.frames, record.width, record.height) == (5, 10, 8)


def test_clips_are_shown_frame_by_frame(table, tmp_path):
  frames = [Image.new("RGB", (40, 40), (0, 30 * k, 255 - 30 * k)) for k in range(8)]
  for name in ("first", "second"):
    frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:], duration=100)
  (tmp_path / "clips.csv").write_text("file,caption\nfirst.gif,the first\nsecond.gif,the second\n")
  config = config_of(table)
  config.model.image.update({"image_size": 32, "tubelet": 2})
  clips = {"own": {"name": f"clips/{tmp_path}", "weight": 1.0}}
  run, sources, tokenizer = opened(
    curriculum(config, video_share=0.5, video_sources=clips, frames=4, frame_rule="uniform", size=32)
  )
  name = f"clips/{tmp_path}"
  looks = looked_at(run, sources, tokenizer, grid=3, only=name)
  (picture, *_) = Parsed(look.page(run, looks, tokenizer)).pixels()
  assert picture.shape == (32, 4 * 32, 3)
  greens = [int(picture[16, 16 + 32 * k, 1]) for k in range(4)]
  assert greens == sorted(greens) and len(set(greens)) == 4
  assert looks[0].facts["Frames of a clip"] == "8"


def test_chips_put_the_caption_together(seen):
  tokenizer = seen[2]
  for caption in ("a red fox", "красная лиса 🦊", "日本語", LONG):
    tokens = whole_tokens(tokenizer, [caption], 8)[0]
    cut = chips(tokenizer, tokens)
    assert "".join(chip.text for chip in cut if not chip.special).strip() == caption
    assert sum(chip.count for chip in cut) == len(tokens)
    assert [chip.text for chip in cut if chip.special] == ["<eos>"] and cut[-1].special
    assert "\ufffd" not in "".join(chip.text for chip in cut)


def test_a_character_of_several_tokens_is_one_chip(seen):
  tokenizer = seen[2]
  tokens = whole_tokens(tokenizer, ["🦊"], 8)[0]
  chip = next(chip for chip in chips(tokenizer, tokens) if "🦊" in chip.text)
  assert chip.count > 1
  # What is cut in the middle of one shows that it is incomplete, and keeps the end of the text apart.
  *_, part, end = chips(tokenizer, [*tokens[:2], tokens[-1]])
  assert "\ufffd" in part.text and end.special


@pytest.mark.parametrize("length", [3, 5, 8])
def test_what_is_seen_and_what_is_cut_are_the_whole(seen, length):
  tokenizer = seen[2]
  (tokens,), (mask,) = tokenizer([LONG], length)
  whole = whole_tokens(tokenizer, [LONG], 4)[0]
  text, missing = cut_text(tokenizer, tuple(tokens[mask].tolist()), whole)
  assert tokenizer.spelled(tokens.tolist()) + text == f" {LONG}" and missing == len(whole) - length
  assert cut_text(tokenizer, whole, whole) == ("", 0)


def test_whole_captions_lose_nothing_at_any_length(seen):
  tokenizer = seen[2]
  words = random.Random(0)
  captions = [" ".join(words.choices(LONG.split(), k=count)) for count in (1, 7, 40, 300)]
  assert whole_tokens(tokenizer, captions, 2) == whole_tokens(tokenizer, captions, 4000)


def test_the_parts_of_a_batch_need_no_segment_ids(seen):
  run, sources, tokenizer = seen[:3]
  batch = build.make_pipeline(run, run.segments, sources, tokenizer, (0, 1)).batch(0)
  assert pixels_of(batch.image, 3, 16).shape == (1, 96, 96, 3)
  assert len(tokens_of(batch.text, 3)) == batch.text.mask[3].sum()


@pytest.mark.parametrize(
  ("text", "script"),
  [
    ("ＦＵＬＬ width", "Latin"),
    ("مرحبا", "Arabic"),
    ("カタカナー", "Katakana"),
    ("3 🦊", ""),
    ("", ""),
    ("한국어 ok", "Hangul"),
  ],
)
def test_scripts(text, script):
  assert script_of(text) == script


def test_a_source_is_named_alone_or_in_a_config():
  own = f"--config={own_pairs.__file__}:photos/a=b.csv"
  assert look.spelled_out(["look", "table/photos/a=b.csv", "--grid=3"]) == [
    "look", own, "--config.data.sources.own.name=table/photos/a=b.csv", "--grid=3",
  ]  # fmt: skip
  for line in (["look"], ["look", "--config=x.py", "--source=noto"], ["look", "noto", "--config=x.py"]):
    assert look.spelled_out(line) == line


@pytest.mark.slow
def test_the_command_needs_only_the_name_of_a_source(table, tmp_path):
  output = tmp_path / "out" / "page.html"
  said = runs.run(
    "-m",
    "data.look",
    f"table/{table}",
    f"--output={output}",
    "--samples=20",
    "--grid=4",
    "--config.data.augment.flip=0.0",
  )
  page = output.read_text()
  assert f"{output} shows 4 pairs, and what 20 records of table/{table} hold" in said
  assert len(Parsed(page).pixels()) == 4 and "Epochs" not in page and "configs/own_pairs.py" in page
  for arguments, sentence in (
    ([], "name a source first"),
    (["photos/nowhere.csv"], "data.sources"),
    (["--config=configs/emoji.py", "--source=note"], "--source"),
  ):
    said = runs.run("-m", "data.look", *arguments, f"--output={output}", expected=2)
    assert sentence in said and "Traceback" not in said
