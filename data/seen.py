"""The first pairs that a run draws from a source, as its batches hold them, beside what was read for them."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int16, UInt8

from contrastive_jax.bad_records import BadRecords
from contrastive_jax.batch import ImageBatch, TextBatch
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.images import join
from contrastive_jax.preprocess.long_captions import readings
from contrastive_jax.preprocess.tokenizers import Tokenizer
from contrastive_jax.preprocess.video import Clip
from contrastive_jax.schedule.segments import segment_at
from contrastive_jax.training.run import Run
from data.build import make_pipeline
from data.chunks import on_host
from data.numbering import pair_keys, rows_of, sample_of
from data.pipeline import Pipeline
from data.sources import Example, Source
from data.substitution import read_or_substitute, shard_of

# Steps that are searched for the pairs of a source.
MOST_STEPS = 10_000


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
  """One pair of a batch.

  Attributes:
    step: step of the run.
    row: number of the pair in the batch of that step.
    index: number of its record in the source.
    planned: number of the record that was to be read, another one where that is bad.
    file: the file that holds the record, "" where the source does not say.
    picture: uint8 `[frames, height, width, 3]`, the pixels that the model sees; an image is one frame.
    original: uint8 `[height, width, 3]` or `[height, width, 4]` as the source gives it; of a clip its middle frame.
    caption: the caption that was chosen.
    others: the other captions of the sample.
    tokens: the tokens of the caption that the model sees.
  """

  step: int
  row: int
  index: int
  planned: int
  file: str
  picture: UInt8[np.ndarray, "frames height width 3"]
  original: np.ndarray
  caption: str
  others: tuple[str, ...]
  tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chip:
  """Tokens that spell something together: one of them, or all that share the bytes of a character.

  Attributes:
    text: the text that they spell; the name of a special token.
    count: number of tokens.
    special: whether it is a special token, such as the end of the text.
  """

  text: str
  count: int = 1
  special: bool = False


class Reader:
  """Reads single pairs of a run out of batches of any size."""

  def __init__(
    self, run: Run, sources: Mapping[str, Source], tokenizer: Tokenizer, bad_records: BadRecords | None = None
  ):
    """Takes a run, its sources by name and its tokenizer. What a frozen teacher would see is left out.

    Args:
      run: the run.
      sources: its sources by name.
      tokenizer: its tokenizer.
      bad_records: counts and names the bad records that are met; None counts them alone.
    """
    config = run.config.copy_and_resolve_references().unlock()
    config.distillation.targets = ""
    self._run, self._sources, self._tokenizer = dataclasses.replace(run, config=config), sources, tokenizer
    self._bad_records = bad_records or BadRecords()
    self._hosts = math.gcd(*(segment.batch_size // (segment.pack_pairs or 1) for segment in run.segments))
    self._whole = self._pipeline((0, 1))

  def places(self, name: str, steps: range, count: int) -> list[tuple[int, int]]:
    """Finds the first pairs of a source.

    Args:
      name: name of the source.
      steps: the steps that are searched, at most the first `MOST_STEPS` of them.
      count: number of pairs that are wanted.

    Returns:
      (step, row) of each, fewer where there are fewer.
    """
    found: list[tuple[int, int]] = []
    for step in steps[:MOST_STEPS]:
      rows = rows_of(name, self._whole.ids(step), self._run.segments)
      found += [(step, row) for row in rows[: count - len(found)].tolist()]
      if len(found) == count:
        break
    return found

  def pairs(self, places: Sequence[tuple[int, int]]) -> Iterator[Pair]:
    """Reads pairs by (step, row), each as the run's own pipeline makes it.

    Raises:
      UserError: if a source gives another sample when it is read again.
    """
    for step, row in places:
      yield self._pair(step, row)

  def _pair(self, step: int, row: int) -> Pair:
    # The share of one of very many hosts is a few pairs, and the pairs of a batch do not depend on the hosts.
    segment = self._run.segments[segment_at(self._run.segments, step)[0]]
    host, at = divmod(row, segment.batch_size // self._hosts)
    batch = self._pipeline((host, self._hosts)).batch(step)
    # On a host, locations name rows of the whole batch.
    image, text = on_host(batch.image, batch.image.patches, -host), on_host(batch.text, batch.text.tokens, -host)
    name, planned = sample_of(int(self._whole.ids(step)[row]), self._run.segments)
    source = self._sources[name]
    example, failures = read_or_substitute(source, planned, _with_still)
    if sample_of(int(batch.ids[at]), self._run.segments) != (name, example.id):
      raise UserError(f"{name} gave another sample for record {planned} when it was read again: leave its files alone")
    index = (planned + len(json.loads(failures or "[]"))) % len(source)
    # A long one may be read in part.
    how = self._run.config.data.long_captions
    parts = [part for caption in example.text.captions for part in readings(caption, how)]
    captions = tuple(dict.fromkeys((*example.text.captions, *parts)))
    keys = pair_keys([example.text.group] * len(captions), captions)
    chosen = int(np.flatnonzero((keys == batch.keys[at]).all(axis=(1, 2)))[0])
    return Pair(
      step=step,
      row=row,
      index=index,
      planned=planned,
      file=shard_of(source, index),
      picture=pixels_of(image, at, self._run.model.image.patch_size),
      original=example.image,
      caption=captions[chosen],
      others=tuple(caption for caption in example.text.captions if caption != captions[chosen]),
      tokens=tokens_of(text, at),
    )

  def _pipeline(self, share: tuple[int, int]) -> Pipeline:
    run = self._run
    return make_pipeline(run, run.segments, self._sources, self._tokenizer, share, bad_records=self._bad_records)


def pixels_of(image: ImageBatch, pair: int, patch_size: int) -> UInt8[np.ndarray, "frames height width 3"]:
  """Puts the patches of one pair's image or clip together again, from a padded, packed or fixed batch.

  Patches that were dropped are grey.

  Args:
    image: the images of a batch of RGB patches, on the host.
    pair: number of the pair.
    patch_size: side of a patch in pixels.
  """
  row, number = (pair, 1) if image.locations is None else map(int, image.locations[pair])
  mine = slice(None) if image.segment_ids is None else image.segment_ids[row] == number
  patches, coords = image.patches[row][mine], image.coords[row][mine]
  if image.grids is not None:
    patches, coords = _with_gaps(patches, coords, tuple(image.grids[row][mine][0].tolist()))
  return join(patches[None], coords, patch_size)[0]


def _with_gaps(
  patches: UInt8[np.ndarray, "kept bytes"], coords: Int16[np.ndarray, "kept 3"], grid: tuple[int, int, int]
) -> tuple[UInt8[np.ndarray, "patches bytes"], Int16[np.ndarray, "patches 3"]]:
  """Returns all patches of an image and their coordinates; those that were dropped are grey."""
  whole = np.full((math.prod(grid), patches.shape[1]), 128, np.uint8)
  whole[np.ravel_multi_index(coords.T, grid)] = patches
  return whole, np.indices(grid, np.int16).reshape(3, -1).T


def tokens_of(text: TextBatch, pair: int) -> tuple[int, ...]:
  """Returns the tokens of one pair's caption without padding, from rows of their own or packed ones."""
  if text.locations is None:
    return tuple(text.tokens[pair][text.mask[pair]].tolist())
  row, number = map(int, text.locations[pair])
  return tuple(text.tokens[row][text.segment_ids[row] == number].tolist())


def whole_tokens(tokenizer: Tokenizer, captions: Sequence[str], length: int) -> list[tuple[int, ...]]:
  """Encodes captions of which nothing is cut.

  Args:
    tokenizer: the tokenizer.
    captions: the captions.
    length: a number of tokens that most are expected to fit into.

  Returns:
    All tokens of each caption.
  """
  tokens, mask = tokenizer(captions, length)
  rows = [tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]
  full = [k for k, row in enumerate(rows) if len(row) == length]
  if full:
    for k, row in zip(full, whole_tokens(tokenizer, [captions[k] for k in full], 2 * length), strict=True):
      rows[k] = row
  return rows


def chips(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Chip]:
  """Cuts the text that tokens spell at the tokens."""
  found: list[Chip] = []
  begin, before = 0, ""
  for end in range(1, len(tokens) + 1):
    special = not tokenizer.spelled(tokens[end - 1 : end])
    stop = end - 1 if special else end
    after = tokenizer.spelled(tokens[:stop])
    # Bytes of a character are not shown before all of them are there, or the next token is none of them.
    if stop > begin and (special or end == len(tokens) or not after.endswith("\ufffd")):
      names = "".join(map(tokenizer.token_of, tokens[begin:stop]))
      found.append(Chip(after[len(before) :] if after.startswith(before) else names, stop - begin))
      begin, before = stop, after
    if special:
      found.append(Chip(tokenizer.token_of(tokens[end - 1]), special=True))
      begin = end
  return found


def cut_text(tokenizer: Tokenizer, seen: Sequence[int], whole: Sequence[int]) -> tuple[str, int]:
  """Returns the text of a caption that its tokens in a batch leave out, and the number of tokens that it takes.

  Args:
    tokenizer: the tokenizer.
    seen: the tokens in the batch, whose last ones may be special tokens behind the cut.
    whole: the tokens of the whole caption.
  """
  missing = len(whole) - len(seen)
  if missing <= 0:
    return "", 0
  same = next((k for k, (a, b) in enumerate(zip(seen, whole, strict=False)) if a != b), len(seen))
  # The end of the text stands behind the cut and at the end of the whole.
  return tokenizer.spelled(whole[: same + missing])[len(tokenizer.spelled(whole[:same])) :], missing


def _with_still(example: Example) -> Example:
  """Returns the example with the middle frame of a clip in its place."""
  if isinstance(example.image, Clip):
    return dataclasses.replace(example, image=example.image.read([example.image.count // 2])[0])
  return example
