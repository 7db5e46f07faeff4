import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.models import dual_encoder

CASES = {
  "eos": ("clip_b32", {}),
  "mean": ("clip_b32", {"pool": "mean", "transformer": {"causal": False}}),
  "map": ("clip_b32", {"pool": "map", "transformer": {"causal": False}}),
}


def _encoder(config, params):
  graphdef, _ = dual_encoder.abstract(config)
  return jax.jit(lambda tokens, mask: dual_encoder.merge(graphdef, params).encode_text(tokens, mask))


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case, tiny, random_params, captions):
  preset, text = CASES[case]
  config = tiny(preset, text=text)
  encode = _encoder(config, random_params(config))
  tokens, mask = captions([4, 2, 3])
  padded = encode(tokens, mask)
  np.testing.assert_allclose(padded, encode(np.where(mask, tokens, 7), mask), atol=1e-6)  # other padding tokens
  np.testing.assert_allclose(padded, encode(tokens[:, :4], mask[:, :4]), atol=1e-6)  # less padding
  assert np.abs(padded - encode(np.where(mask, (tokens + 1) % 11, 0), mask)).max() > 1e-3


def test_siglip_sees_padding_and_pools_the_last_position(tiny, random_params, captions):
  config = tiny("siglip_b16")
  encode = _encoder(config, random_params(config))
  tokens, mask = captions([4, 2, 3])
  np.testing.assert_array_equal(encode(tokens, mask), encode(tokens, np.ones_like(mask)))
  assert np.abs(encode(tokens, mask) - encode(np.where(mask, tokens, 7), mask)).max() > 1e-3


def test_an_empty_caption_is_finite(tiny, random_params, captions):
  config = tiny("clip_b32", text={"pool": "map", "transformer": {"causal": False}})
  assert np.isfinite(_encoder(config, random_params(config))(*captions([0, 0, 3]))).all()


def test_captions_longer_than_the_table_are_refused(tiny, random_params):
  config = tiny("clip_b32")
  graphdef, _ = dual_encoder.abstract(config)
  with pytest.raises(UserError, match=r"9 tokens exceed model\.text\.length=7"):
    tokens = jnp.ones((1, 9), jnp.int32)
    dual_encoder.merge(graphdef, random_params(config)).encode_text(tokens, tokens > 0)


def test_the_tap_is_the_tower_that_ends_there(tiny, random_params, captions):
  """Its embedding is that of a tower of one block with attention pooling, and the tower's own stays as it was."""
  options = {"pool": "mean", "transformer": {"causal": False}}
  tapped = tiny("clip_b32", text={**options, "tap": 1})
  params = random_params(tapped)
  tokens, mask = captions([4, 2, 3])

  def run(config, params):
    graphdef, _ = dual_encoder.abstract(config)
    return jax.jit(lambda tokens, mask: dual_encoder.merge(graphdef, params).text(tokens, mask))(tokens, mask)

  found = run(tapped, params)
  text = params["text"]
  plain = {name: part for name, part in text.items() if name != "tap"}
  whole = run(tiny("clip_b32", text=options), {**params, "text": plain})
  np.testing.assert_allclose(found.embedding, whole.embedding, atol=1e-6)
  first = jax.tree.map(lambda leaf: leaf[:1], text["transformer"])
  short = {**plain, "transformer": first, "post_norm": text["tap"]["norm"], "pool": text["tap"]["pool"]}
  short["projection"] = text["tap"]["projection"]
  ends = tiny("clip_b32", text={**options, "pool": "map", "transformer": {"causal": False, "depth": 1}})
  np.testing.assert_allclose(found.tap.embedding, run(ends, {**params, "text": short}).embedding, atol=1e-6)
  with pytest.raises(UserError, match=r"model\.text\.tap=3 must be at most model\.text\.transformer\.depth=2"):
    tiny("clip_b32", text={"tap": 3})
