"""Forms are inverses of each other and put every number where a loop over heads puts it; misfits are named."""

import io
import pickle
import zipfile

import jax
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.interop import bert, big_vision, checkpoint_files, exports, huggingface, keymap, open_clip
from contrastive_jax.interop.torch_layers import fused_attention, pooling_attention, split_attention
from contrastive_jax.models import dual_encoder, presets
from contrastive_jax.preprocess import tokenizers

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE


def test_attention_of_three_kinds_joins_the_same_heads(rng):
  q, k, v = (rng.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) for _ in range(3))
  expected = np.empty((2, WIDTH, 3 * WIDTH), np.float32)
  for layer in range(2):
    for head in range(HEADS):
      for part, weight in enumerate((q, k, v)):
        for feature in range(SIZE):
          column = (head * 3 + part) * SIZE + feature
          expected[layer, :, column] = weight[layer, head * SIZE + feature]
  bias = {"a.q.bias": np.zeros(WIDTH), "a.k.bias": np.zeros(WIDTH), "a.v.bias": np.zeros(WIDTH)}
  separate = {
    f"{layer}.{name}": array
    for layer in range(2)
    for name, array in {"a.q.weight": q[layer], "a.k.weight": k[layer], "a.v.weight": v[layer], **bias}.items()
  }
  together = {}
  for layer in range(2):
    together[f"{layer}.in_proj_weight"] = np.concatenate([q[layer], k[layer], v[layer]])
    together[f"{layer}.in_proj_bias"] = np.zeros(3 * WIDTH, np.float32)
  shape = jax.ShapeDtypeStruct((2, WIDTH, 3 * WIDTH), np.float32)
  abstract = {"x": {"kernel": shape, "bias": jax.ShapeDtypeStruct((2, 3 * WIDTH), np.float32)}}
  names = tuple(f"{{layer}}.a.{name}" for name in "qkv")
  for entries, theirs in (
    (split_attention("x", names, heads=HEADS, depth=2), separate),
    (fused_attention("x", ("{layer}.in_proj_weight", "{layer}.in_proj_bias"), heads=HEADS, depth=2), together),
  ):
    params = keymap.to_ours(entries, theirs, abstract, source="it")
    np.testing.assert_array_equal(params["x"]["kernel"], expected)
    for name, array in keymap.to_theirs(entries, params).items():
      np.testing.assert_array_equal(array, theirs[name])


def test_pooling_attention_separates_the_query(rng):
  weight = rng.standard_normal((3 * WIDTH, WIDTH)).astype(np.float32)
  theirs = {"m.in_proj_weight": weight, "m.in_proj_bias": rng.standard_normal(3 * WIDTH).astype(np.float32)}
  theirs |= {"m.out_proj.weight": weight[:WIDTH], "m.out_proj.bias": np.zeros(WIDTH, np.float32)}
  entries = pooling_attention("pool", "m", heads=HEADS)
  shapes = {"q": WIDTH, "kv": 2 * WIDTH, "out": WIDTH}
  abstract = {
    "pool": {
      name: {
        "kernel": jax.ShapeDtypeStruct((WIDTH, columns), np.float32),
        "bias": jax.ShapeDtypeStruct((columns,), np.float32),
      }
      for name, columns in shapes.items()
    }
  }
  pool = keymap.to_ours(entries, theirs, abstract, source="it")["pool"]
  np.testing.assert_array_equal(pool["q"]["kernel"], weight[:WIDTH].T)
  keys, values = weight[WIDTH : 2 * WIDTH], weight[2 * WIDTH :]
  for head in range(HEADS):
    rows = slice(head * SIZE, (head + 1) * SIZE)
    np.testing.assert_array_equal(pool["kv"]["kernel"][:, 2 * head * SIZE :][:, :SIZE], keys[rows].T)
    np.testing.assert_array_equal(pool["kv"]["kernel"][:, (2 * head + 1) * SIZE :][:, :SIZE], values[rows].T)
  for name, array in keymap.to_theirs(entries, {"pool": pool}).items():
    np.testing.assert_array_equal(array, theirs[name])


def test_a_convolution_sees_the_pixels_in_our_order(rng):
  kernel = rng.standard_normal((5, 3, 2, 2)).astype(np.float32)
  patch = rng.standard_normal((2, 2, 3)).astype(np.float32)
  form = keymap.convolution(2)
  (matrix,) = form.read([kernel])
  expected = np.einsum("ocyx,yxc->o", kernel, patch)
  np.testing.assert_allclose(patch.ravel() @ matrix, expected, rtol=1e-5)
  np.testing.assert_array_equal(form.write([matrix])[0], kernel)


def families():
  """Each family's key map for the smallest config it can describe."""
  small = {"width": 24, "depth": 2, "heads": 2, "mlp_dim": 40}
  towers = {
    "image": {"image_size": 12, "patch_size": 4, "transformer": small},
    "text": {"vocab_size": 30, "length": 6, "transformer": small},
    "embed_dim": 24,
  }
  clip, siglip = presets.resolve("clip_b32", towers), presets.resolve("siglip_b16", towers)
  yield "clip", clip, huggingface.entries(clip, "clip")
  yield "siglip", siglip, huggingface.entries(siglip, "siglip")
  yield "siglip2", siglip, huggingface.entries(siglip, "siglip2")
  yield "open_clip", clip, open_clip.entries(clip, custom_text=False)
  yield "open_clip timm", siglip, open_clip.entries(siglip, custom_text=True)
  yield "big_vision", siglip, big_vision.entries(siglip)


@pytest.mark.parametrize("family", [name for name, _, _ in families()])
def test_every_family_holds_every_parameter_once_and_returns_the_same_bits(family, rng):
  config, entries = next((config, entries) for name, config, entries in families() if name == family)
  _, abstract = dual_encoder.abstract(config)
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract)
  theirs = keymap.to_theirs(entries, params)
  count = sum(array.size for array in theirs.values())
  assert count == sum(leaf.size for leaf in jax.tree.leaves(params))
  jax.tree.map(np.testing.assert_array_equal, keymap.to_ours(entries, theirs, abstract, source="it"), params)


def test_missing_unexpected_and_misshapen_keys_are_named():
  _, config, entries = next(families())
  _, abstract = dual_encoder.abstract(config)
  theirs = keymap.to_theirs(entries, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract))
  theirs["visual_projection.weights"] = theirs.pop("visual_projection.weight")
  theirs["logit_scale"] = np.zeros(2, np.float32)
  with pytest.raises(UserError) as raised:
    keymap.to_ours(entries, theirs, abstract, source="FILE")
  assert str(raised.value) == (
    "FILE does not fit the model that its config describes; 1 missing: visual_projection.weight (there is"
    " visual_projection.weights); 1 unexpected: visual_projection.weights; 1 of another shape: logit_scale [2]"
    " instead of []"
  )


class _Malicious:
  def __reduce__(self):
    return print, ("executed",)


def torch_file(path, content) -> None:
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", content)


def test_a_pickle_is_never_executed(tmp_path, capsys):
  torch_file(tmp_path / "bad.pt", pickle.dumps({"weight": _Malicious()}))
  with pytest.raises(UserError, match=r"asks for builtins\.print"):
    checkpoint_files.read(tmp_path / "bad.pt")
  (tmp_path / "old.pt").write_bytes(pickle.dumps({"weight": 1}))
  with pytest.raises(UserError, match="is a pickle"):
    checkpoint_files.read(tmp_path / "old.pt")
  assert "executed" not in capsys.readouterr().out


def test_half_precision_is_read_as_float32(tmp_path):
  import ml_dtypes

  values = np.array([1.5, -2.25, 1e-3], np.float32)
  checkpoint_files.write_safetensors(tmp_path / "a.safetensors", {"x": values.astype(ml_dtypes.bfloat16)})
  (array,) = checkpoint_files.read(tmp_path / "a.safetensors").values()
  assert array.dtype == np.float32
  np.testing.assert_array_equal(array, values.astype(ml_dtypes.bfloat16).astype(np.float32))
  buffer = io.BytesIO()
  np.savez(buffer, x=values.astype(ml_dtypes.bfloat16))
  (tmp_path / "a.npz").write_bytes(buffer.getvalue())
  np.testing.assert_array_equal(checkpoint_files.read(tmp_path / "a.npz")["x"], array)


def test_a_model_that_others_do_not_have_is_not_exported(tmp_path):
  config, tokenizer = presets.resolve("univitar_0.3b"), tokenizers.train_bpe(["a dog"], 300)
  with pytest.raises(UserError, match=r"the nearest, siglip, differs in .*model\.image\.transformer\.rope='2d'"):
    exports.write(f"huggingface:{tmp_path / 'out'}", config, {}, tokenizer)
  with pytest.raises(UserError, match="choose one of huggingface, open_clip"):
    exports.write("keras:out", config, {}, tokenizer)


def test_a_bert_with_relative_positions_is_refused():
  with pytest.raises(UserError, match="position_embedding_type='relative_key'"):
    bert.read_config({"position_embedding_type": "relative_key", "hidden_act": "gelu"}, pool="mean", source="it")
