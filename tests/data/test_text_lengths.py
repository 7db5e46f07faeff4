"""Stages whose captions are shorter than what the text tower reads."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.models import flops
from contrastive_jax.planning.compiling import choose_batch
from contrastive_jax.preprocess import tokenizers
from contrastive_jax.schedule.extras import Extras
from contrastive_jax.schedule.segments import Rows, Segment
from contrastive_jax.training.run import Run
from data.extras import ExtrasOptions
from data.pipeline import Pipeline
from tests import tiny
from tests.data.toy import ToySource, WordTokenizer

# From a single word to ten, in two sentences.
CAPTIONS = [(" ".join(f"w{k}." if k == 3 else f"w{k}" for k in range(1 + number % 10)),) for number in range(30)]
SHORT = Segment(3, 10, (("toy", 1),), 8, text_length=6)


def pipeline(segment, tokenizer=None, **options):
  how = {"text_length": 20, "patch_size": 4, "seed": 3, "threads": 0, **options}
  return Pipeline([segment], {"toy": ToySource("toy", 30, captions=CAPTIONS)}, tokenizer or WordTokenizer(), **how)


@pytest.mark.parametrize(("how", "text_rows"), [("truncate", None), ("sentence", None), ("span", Rows(2, 24))])
def test_a_batch_is_that_of_a_tower_that_reads_no_more(how, text_rows):
  packed = {"text_rows": text_rows, "pack_pairs": 5} if text_rows else {}
  extras = ExtrasOptions(Extras(hard_captions=1, strong_texts=2), swap_words=True)
  options = {"long_captions": how, "extras": extras}
  short = dataclasses.replace(SHORT, **packed)
  whole = dataclasses.replace(short, text_length=0)
  for step in range(2):
    found, expected = (pipeline(short, **options).batch(step), pipeline(whole, **options, text_length=6).batch(step))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert found.hard_captions.tokens.shape == (10, 1, 6) and found.strong.tokens.shape == (10, 2, 6)


def test_the_end_of_the_text_stays_last():
  tokenizer = tokenizers.train_bpe([caption for (caption,) in CAPTIONS], 300)
  batch = pipeline(SHORT, tokenizer).batch(0)
  (tokens,), (mask,) = tokenizer(["w0"], 20)
  for row, real in zip(batch.text.tokens, batch.text.mask, strict=True):
    assert row[real][-1] == tokens[mask][-1]
  assert batch.text.mask.all(axis=1).sum() > 2


def staged(**stage):
  config = tiny.get_config()
  config.curriculum = (common.stage("short", 10, **stage), common.stage("whole", 0))
  return config


def test_what_is_cut_costs_nothing():
  run = Run.from_config(staged(text_length=3))
  mesh = run.make_mesh(jax.devices()[:1])
  for stage, length in (("short", 3), ("whole", 8)):
    kind, batch, forward = choose_batch(run, stage, mesh)
    assert kind == stage and batch.text.tokens.shape == batch.text.mask.shape == (32, length)
    model = dataclasses.replace(run.model, text=dataclasses.replace(run.model.text, length=length))
    assert forward == 32 * flops.forward_flops_per_pair(model)


def test_rows_of_a_stage_stand_before_those_of_the_run():
  config = staged(text_length=3, text_rows=2, text_row_length=16)
  config.data.update({"pack_pairs": 8, "text_rows": 4, "text_row_length": 24})
  config.model.text.attend_padding = False
  config.model.text.pool = "map"
  assert [segment.text_rows for segment in Run.from_config(config).segments] == [Rows(2, 16), Rows(4, 24)]


def test_a_length_that_cannot_be_is_refused():
  with pytest.raises(UserError, match=r"stage 'short' has text_length=9, more than model\.text\.length=8"):
    Run.from_config(staged(text_length=9))
  run = Run.from_config(staged(text_length=1))
  tokenizer = tokenizers.train_bpe(["some words"], 300)
  with pytest.raises(UserError, match=r"curriculum\.0\.text_length=1 has no room for a caption"):
    run.check_text_lengths(tokenizer)
