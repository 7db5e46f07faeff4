"""A tokenizer learns from every caption of small sources, and from an even sample of large ones."""

import pytest

from contrastive_jax.bad_records import BadRecords
from contrastive_jax.errors import UserError
from contrastive_jax.preprocess.decoding import DecodeError
from data.build import captions_to_learn
from tests.data.toy import ToySource


def sources(*lengths):
  return [ToySource(f"toy{k}", length) for k, length in enumerate(lengths)]


@pytest.mark.parametrize("most", [100, 60])
def test_small_sources_give_every_caption(most):
  made = sources(10, 50)
  every = {caption for source in made for k in range(len(source)) for caption in source.text(k).captions}
  assert captions_to_learn(made, most=most) == sorted(every)


def test_of_large_sources_a_share_is_read_evenly_and_always_the_same():
  made = sources(1000, 3000)
  found = captions_to_learn(made, most=400)
  assert found == captions_to_learn(sources(1000, 3000), most=400) and len(found) == 400
  assert [source.text_reads for source in made] == [100, 300]
  numbers = sorted(int(caption.split()[-1]) for caption in found if "toy1" in caption)
  assert numbers == list(range(0, 3000, 10))
  # Each of the captions that a record has gets its turn.
  assert 0.4 < sum(caption.startswith("a picture") for caption in found) / len(found) < 0.6


def test_bad_records_of_a_sample_go_by_their_own_numbers():
  class Partly(ToySource):
    def text(self, index):
      if index % 20 == 10:
        raise DecodeError("made bad for the test")
      return super().text(index)

  ledger = BadRecords()
  assert len(captions_to_learn([Partly("toy", 1000)], ledger, most=100)) == 50 == ledger.count
  assert ("toy", "", 10) in ledger._named and ("toy", "", 1) not in ledger._named

  class Never(ToySource):
    def text(self, index):
      raise DecodeError("made bad for the test")

  with pytest.raises(UserError, match="no caption that can be read"):
    captions_to_learn([Never("toy", 1000)], most=100)
