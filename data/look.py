"""Makes a page of what a run will learn from: people look before they train.

python -m data.look table/photos/captions.csv                          # a source by its name, which comes first
python -m data.look --config=configs/emoji.py --source=noto --output=noto.html

The page shows the first pairs that the run draws from each source, as its batches hold them: the picture after
augmentation, the tokens of the caption, and what was cut. Of records that are evenly spread over the source it counts
sizes, lengths, scripts, what occurs again and what cannot be read. Nothing is trained. A source that is named without a
config is shown as configs/own_pairs.py trains on it.
"""

import base64
import dataclasses
import functools
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from rich.console import Console

from configs import own_pairs
from contrastive_jax import cli, paths, pretrain, progress
from contrastive_jax.bad_records import BadRecords
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.evaluation import histograms
from contrastive_jax.evaluation.histograms import Histogram
from contrastive_jax.evaluation.report import render
from contrastive_jax.evaluation.results import percent
from contrastive_jax.preprocess import images
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.runs import write_atomically
from contrastive_jax.schedule.segments import draws_until
from contrastive_jax.schedule.stages import first_steps
from contrastive_jax.training.run import Run
from data import build
from data.seen import Chip, Pair, Reader, chips, cut_text, whole_tokens
from data.sources import Source
from data.survey import Record, Survey, survey

# What lists show; the numbers beside them count all.
MOST_LISTED, MOST_CUT = 20, 300
# Side of the originals on the page, in pixels; and frames of a clip that are shown side by side.
_THUMBNAIL, _FRAMES = 320, 6


@dataclasses.dataclass(frozen=True, eq=False)
class ShownPair:
  """A pair as the page shows it.

  Attributes:
    pair: the pair.
    picture: uint8 `[height, width, 3]` as the model sees it, the frames of a clip side by side.
    original: the original as a picture in a data URI.
    chips: the caption, cut at its tokens.
    cut: the beginning of what was cut from the caption, and the number of tokens of all of it.
  """

  pair: Pair
  picture: np.ndarray
  original: str
  chips: list[Chip]
  cut: tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Group:
  """Pairs that follow each other in the run.

  Attributes:
    stage: name of the stage, "" where there is a single one.
    first: the step from which on pairs are drawn.
    pairs: the pairs; none where the source gives none there.
  """

  stage: str
  first: int
  pairs: list[ShownPair]


@dataclasses.dataclass(frozen=True)
class Look:
  """What the page says of a source.

  Attributes:
    name: name of the source.
    facts: facts by label.
    groups: the pairs that are shown.
    survey: the records that were looked at.
    histograms: the charts.
    lengths: number of tokens of each caption, in the order of `survey.captions`.
    cut: number of captions that are longer than the text tower reads.
    same_pictures: pictures that occur again: a picture in a data URI, and its records.
  """

  name: str
  facts: dict[str, str]
  groups: list[Group]
  survey: Survey
  histograms: list[Histogram]
  lengths: list[int]
  cut: int
  same_pictures: list[tuple[str, list[Record]]]


def main(by_name: bool = False) -> None:
  """Writes the page; `by_name` says that the config only stands for a source that was named without one."""
  flag = flags.FLAGS
  if flag.config is None:
    raise UserError("name a source first, as in table/photos/captions.csv, or a run with --config=configs/emoji.py")
  config = flag.config
  output = paths.file_to_write("--output", flag.output)
  if config.init_from:
    paths.run_to_read("init_from", config.init_from)  # It decides on the model, and on the tokenizer.
  config.distillation.dim = config.distillation.dim or 1  # What a teacher makes of the pairs is not shown.
  run = Run.from_config(config)
  names = run.source_names()
  if flag.source:
    require_known("--source", flag.source, names)
    shown = [flag.source]
  else:
    shown = names
  if flag.step is not None and flag.step >= run.config.total_steps:
    raise UserError(f"--step={flag.step} is not below total_steps={run.config.total_steps}: name a step of the run")
  sources = build.open_sources(run.config, names)
  bad_records = BadRecords()
  tokenizer = _tokenizer(run, sources, bad_records)
  reader = Reader(run, sources, tokenizer, bad_records)
  looks = [
    look(
      run, name, sources[name], reader, tokenizer, grid=flag.grid, samples=flag.samples, step=flag.step, bare=by_name
    )
    for name in shown
  ]
  write_atomically(output, page(run, looks, tokenizer, by_name=by_name))
  pairs = sum(len(group.pairs) for each in looks for group in each.groups)
  records = sum(len(each.survey.records) for each in looks)
  print(
    f"{output} shows {pairs:,} pairs, and what {records:,} records of {', '.join(shown)} hold: open it in a browser."
  )


def look(
  run: Run,
  name: str,
  source: Source,
  reader: Reader,
  tokenizer: Tokenizer,
  *,
  grid: int,
  samples: int,
  step: int | None = None,
  bare: bool = False,
) -> Look:
  """Reads what the page says of a source.

  Args:
    run: the run.
    name: name of the source.
    source: the source.
    reader: reads pairs of the run.
    tokenizer: the tokenizer of the run.
    grid: number of pairs that are shown of each stage.
    samples: number of records that are looked at.
    step: the step from which on pairs are shown; None is the first of each stage.
    bare: whether the weight and the epochs of the run are left out, since nobody chose them.
  """
  length = run.config.model.text.length
  found = survey(source, samples, threads=run.config.data.threads)
  lengths = [len(tokens) for tokens in whole_tokens(tokenizer, found.captions, length + 1)] if found.captions else []
  return Look(
    name=name,
    facts=_facts(run, name, found, bare),
    groups=[
      Group(stage, steps.start, _pairs(reader, reader.places(name, steps, grid), tokenizer, length, name))
      for stage, steps in _stages(run, name, step)
    ],
    survey=found,
    histograms=_histograms(found, lengths, length),
    lengths=lengths,
    cut=sum(count > length for count in lengths),
    same_pictures=[
      (_thumbnail(_still(source, records[0].index)), records) for records in found.same_pictures[:MOST_LISTED]
    ],
  )


def page(run: Run, looks: Sequence[Look], tokenizer: Tokenizer, *, by_name: bool = False) -> str:
  """Renders the page as one HTML file.

  Args:
    run: the run.
    looks: the sources.
    tokenizer: the tokenizer of the run.
    by_name: whether the config only stands for a source that was named without one.
  """
  config = run.config
  names = [each.name for each in looks]
  return render(
    "look.html.j2",
    title=names[0] if len(names) == 1 else config.name or "Data of the run",
    looks=looks,
    by_name=by_name,
    seed=config.seed,
    patch=config.model.image.patch_size,
    length=config.model.text.length,
    tokenizer=f"{tokenizer.vocab_size:,} tokens" + (" trained on these captions" if _is_trained(run) else ""),
    most=MOST_LISTED,
    attribution=build.attribution(names),
  )


def spelled_out(arguments: Sequence[str]) -> list[str]:
  """Returns a command line in which a source that is named first, without a config, is that of `configs/own_pairs.py`.

  Args:
    arguments: the command line, that of the program included.
  """
  program, *rest = arguments
  if not rest or rest[0].startswith("-"):
    return list(arguments)
  name, *rest = rest
  if any(argument.split("=")[0].lstrip("-") == "config" for argument in rest):
    return list(arguments)
  own = f"--config={own_pairs.__file__}:{name.partition('/')[2] or name}"
  return [program, own, f"--config.data.sources.own.name={name}", *rest]


def _tokenizer(run: Run, sources: Mapping[str, Source], bad_records: BadRecords) -> Tokenizer:
  """Finds the tokenizer that the run would begin with."""
  console = Console(stderr=True)
  with console.status("training the tokenizer on the captions" if _is_trained(run) else "loading the tokenizer"):
    tokenizer = pretrain.find_tokenizer(run.config, Path(), False, None, sources, bad_records, build)
  run.check_text_lengths(tokenizer)
  return tokenizer


def _is_trained(run: Run) -> bool:
  taken = run.config.init_from and run.config.init_towers in ("all", "text")
  return run.config.tokenizer.spec == "bpe" and not taken


def _stages(run: Run, name: str, step: int | None) -> list[tuple[str, range]]:
  """Returns the name and the steps of each stage that shows a source; of all from a step on, where it is given."""
  if step is not None:
    return [("", range(step, run.config.total_steps))]
  stages = zip(first_steps(run.stages), run.segments, strict=True)
  several = len(run.segments) > 1
  return [
    (stage * several, range(first, first + segment.steps))
    for (stage, first), segment in stages
    if name in segment.all_sources()
  ]


def _facts(run: Run, name: str, found: Survey, bare: bool) -> dict[str, str]:
  counts = [len(record.captions) for record in found.good]
  facts = {"Records": f"{found.total:,}", "Looked at": f"{len(found.records):,}"}
  if counts:
    facts["Captions of a picture"] = _spread(counts)
  clips = [record.frames for record in found.good if record.frames > 1]
  if clips:
    facts["Frames of a clip"] = _spread(clips)
  if not bare:
    drawn = draws_until(run.segments, run.config.total_steps)
    inputs = [segment.inputs(modality) for segment in run.segments for modality in segment.modalities]
    weights = [f"{weight:g}" for each in inputs for other, weight in each.sources if other == name]
    facts["Weight"] = ", then ".join(dict.fromkeys(weights))
    facts["Share of the pairs of the run"] = percent(drawn[name] / sum(drawn.values()))
    facts["Pairs that the run draws"] = f"{drawn[name]:,}"
    facts["Epochs"] = f"{drawn[name] / found.total:.3g}"
  return facts


def _spread(counts: Sequence[int]) -> str:
  low, high = min(counts), max(counts)
  return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {np.mean(counts):.3g}"


def _histograms(found: Survey, lengths: Sequence[int], limit: int) -> list[Histogram]:
  pictures, captions = ("picture", "pictures"), ("caption", "captions")
  charts = [
    histograms.histogram("Width", [record.width for record in found.good], pictures, unit="px"),
    histograms.histogram("Height", [record.height for record in found.good], pictures, unit="px"),
    histograms.aspects("Width : height", [record.width / record.height for record in found.good], pictures),
    histograms.histogram("Tokens of a caption", lengths, captions, limit=limit),
    histograms.histogram("Captions of a picture", [len(record.captions) for record in found.good], pictures),
  ]
  return [chart for chart in charts if chart is not None]


def _pairs(
  reader: Reader, places: Sequence[tuple[int, int]], tokenizer: Tokenizer, length: int, name: str
) -> list[ShownPair]:
  """Reads pairs and prepares them for the page, with a progress bar."""
  numbers = progress.counted(len(places), "pairs", f"{name}, as the model sees it")
  return [_shown(pair, tokenizer, length) for number in numbers for pair in reader.pairs([places[number]])]


def _shown(pair: Pair, tokenizer: Tokenizer, length: int) -> ShownPair:
  """Prepares a pair for the page."""
  whole = whole_tokens(tokenizer, [pair.caption], length + 1)[0]
  text, missing = cut_text(tokenizer, pair.tokens, whole)
  frames = pair.picture[:: -(-len(pair.picture) // _FRAMES)]
  short = text if len(text) <= MOST_CUT else f"{text[:MOST_CUT]}…"
  return ShownPair(
    pair,
    np.concatenate(list(frames), axis=1),
    _thumbnail(pair.original),
    chips(tokenizer, pair.tokens),
    (short, missing),
  )


def _still(source: Source, index: int) -> np.ndarray:
  image = source[index].image
  return image if isinstance(image, np.ndarray) else image.read([0])[0]


def _thumbnail(pixels: np.ndarray) -> str:
  """Returns a small JPEG of a picture in a data URI; transparent ones, multiplied by alpha, on white."""
  plain = images.composite(pixels) if pixels.shape[2] == 4 else pixels
  picture = Image.fromarray(plain)
  picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
  buffer = io.BytesIO()
  picture.save(buffer, format="JPEG", quality=88)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _define_flags() -> None:
  cli.define_config("The run whose data are shown, such as configs/emoji.py.")
  flags.DEFINE_string("source", "", "Name of the only source that is shown; all of the run if not given.")
  flags.DEFINE_string("output", "look.html", "File of the page.")
  flags.DEFINE_integer("samples", 1000, "Number of records of each source that are looked at.", lower_bound=1)
  flags.DEFINE_integer("grid", 24, "Number of pairs that are shown of each source and stage.", lower_bound=0)
  flags.DEFINE_integer(
    "step", None, "Step from which on pairs are shown; the first of each stage if not given.", lower_bound=0
  )


if __name__ == "__main__":
  _define_flags()
  given, sys.argv = sys.argv, spelled_out(sys.argv)
  cli.run(functools.partial(main, by_name=sys.argv != given))
