"""The whole forward pass against float64 NumPy, written from the papers and the released models' descriptions."""

import math

import jax
import numpy as np
import pytest

erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
  "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
  "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
  "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
  "swiglu": lambda x: x / (1 + np.exp(-x)),
}


def linear(p, x):
  return x @ p["kernel"] + p.get("bias", 0.0)


def norm(p, x, eps):
  if "bias" in p:
    x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0.0)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def mlp(p, x, config):
  activation = ACTIVATIONS[config.activation]
  h = activation(linear(p["gate"], x)) * linear(p["up"], x) if "gate" in p else activation(linear(p["up"], x))
  return linear(p["down"], norm(p["norm"], h, config.norm_eps) if "norm" in p else h)


def rotate(x, coords):
  """One head `[length, head_dim]`: features (i, i + head_dim / 2) are a plane; first half of the planes turn with y."""
  out, half = np.empty_like(x), x.shape[1] // 2
  for i in range(half):
    axis, j = (1, i) if i < half // 2 else (2, i - half // 2)
    angle = coords[:, axis] * 10_000.0 ** (-2 * j / half)
    out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
    out[:, i + half] = x[:, i] * np.sin(angle) + x[:, i + half] * np.cos(angle)
  return out


def attention(p, x, config, visible, coords):
  """One row `[length, width]`, head by head."""
  fused, size = linear(p["qkv"], x), config.width // config.heads
  heads = range(config.heads)
  q, k, v = (
    np.stack([fused[:, (3 * head + part) * size : (3 * head + part + 1) * size] for head in heads]) for part in range(3)
  )
  if config.qk_norm == "head":
    q, k = norm(p["q_norm"], q, config.norm_eps), norm(p["k_norm"], k, config.norm_eps)
  if config.rope:
    q, k = (np.stack([rotate(head, coords) for head in part]) for part in (q, k))
  if config.qk_norm == "full":
    q, k = (
      np.stack(np.split(norm(p[name], np.concatenate(list(part), -1), config.norm_eps), config.heads, -1))
      for name, part in (("q_norm", q), ("k_norm", k))
    )
  mixed = [softmax(np.where(visible, q[head] @ k[head].T / math.sqrt(size), -np.inf)) @ v[head] for head in heads]
  return linear(p["out"], np.concatenate(mixed, -1))


def blocks(p, x, config, visible, coords=None):
  for layer in range(config.depth):
    q = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
    if config.norm_position == "post":
      x = norm(q["norm1"], x + attention(q["attention"], x, config, visible, coords), config.norm_eps)
      x = norm(q["norm2"], x + mlp(q["mlp"], x, config), config.norm_eps)
      continue
    gains = [q[name]["scale"] if name in q else 1.0 for name in ("scale1", "scale2")]
    x = x + gains[0] * attention(q["attention"], norm(q["norm1"], x, config.norm_eps), config, visible, coords)
    x = x + gains[1] * mlp(q["mlp"], norm(q["norm2"], x, config.norm_eps), config)
  return x


def attention_pool(p, x, config, seen):
  size = config.width // config.heads
  q, kv = linear(p["q"], p["probe"]), linear(p["kv"], x)
  mixed = []
  for head in range(config.heads):
    k, v = kv[:, 2 * head * size :][:, :size], kv[:, (2 * head + 1) * size :][:, :size]
    mixed.append(softmax(np.where(seen, k @ q[head * size :][:size] / math.sqrt(size), -np.inf)) @ v)
  x = linear(p["out"], np.concatenate(mixed))
  return x + mlp(p["mlp"], norm(p["norm"], x, config.norm_eps), config)


def embed_image(p, patches, coords, config):
  transformer, coords = config.transformer, coords.astype(np.float64)
  pixels = patches.reshape(len(patches), -1, config.channels) / 255.0
  pixels = (pixels - np.array(config.mean)) / np.array(config.std)
  x = linear(p["patch_embedding"], pixels.reshape(len(patches), -1))
  if config.position == "sincos2d":
    count = config.transformer.width // 4
    omega = 1 / 10_000 ** (np.arange(count) / (count - 1))
    angles = [coords[:, axis, None] * omega for axis in (2, 1)]
    x = x + np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], -1)
  if config.class_token:
    x = np.concatenate([p["class_token"][None], x])
    coords = np.concatenate([np.zeros((1, 3)), coords])
  if config.position == "learned":
    x = x + p["position"]
  if config.pre_norm:
    x = norm(p["pre_norm"], x, transformer.norm_eps)
  x = blocks(p["transformer"], x, transformer, np.ones((len(x), len(x)), bool), coords)
  x = norm(p["post_norm"], x, transformer.norm_eps) if config.post_norm else x
  if config.pool == "map":
    x = attention_pool(p["pool"], x, transformer, np.ones(len(x), bool))
  else:
    x = x[0] if config.pool == "cls" else x[int(config.class_token) :].mean(0)
  return linear(p["projection"], x) if config.projection else x


def embed_text(p, tokens, mask, config):
  length = len(tokens)
  x = p["tokens"][tokens] + (p["position"][:length] if config.position == "learned" else 0)
  visible = np.tri(length, dtype=bool) if config.transformer.causal else np.ones((length, length), bool)
  if not config.attend_padding:
    visible = visible & mask
  eps = config.transformer.norm_eps
  x = norm(p["pre_norm"], x, eps) if config.pre_norm else x
  x = blocks(p["transformer"], x, config.transformer, visible)
  x = norm(p["post_norm"], x, eps) if config.post_norm else x
  if config.pool == "map":
    x = attention_pool(p["pool"], x, config.transformer, mask)
  else:
    x = {"eos": x[np.flatnonzero(mask)[-1]], "last": x[-1], "cls": x[0], "mean": x[mask].mean(0)}[config.pool]
  return linear(p["projection"], x) if config.projection else x


UNIVITAR = {
  "norm": "rmsnorm",
  "activation": "swiglu",
  "mlp_norm": True,
  "qk_norm": "full",
  "qkv_bias": False,
  "layer_scale": 0.1,
  "rope": "2d",
}
CASES = {
  "clip": ("clip_b32", {}),
  "siglip": ("siglip_b16", {}),
  "univitar": (
    "siglip_b16",
    {
      "transformer": UNIVITAR,
      "image": {"position": "none", "pool": "mean", "post_norm": False, "projection": True},
      "text": {"pool": "map", "attend_padding": False},
    },
  ),
  "bert": (
    "clip_b32",
    {
      "text": {
        "pool": "mean",
        "pre_norm": True,
        "post_norm": False,
        "transformer": {"causal": False, "norm_position": "post", "activation": "gelu"},
      },
    },
  ),
  "mixed": (
    "clip_b32",
    {
      "transformer": {"activation": "gelu", "qk_norm": "head"},
      "image": {"position": "sincos2d", "pool": "mean", "projection_bias": True, "transformer": {"rope": "2d"}},
      "text": {"pool": "mean", "position": "none", "transformer": {"causal": False}},
    },
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_matches_float64_reference(case, tiny, random_params, images, captions, encoder):
  preset, overrides = CASES[case]
  config = tiny(preset, **overrides)
  params = random_params(config)
  image, (tokens, mask) = images([(3, 3)] * 2), captions([7, 3])
  actual = encoder(config)(params, image, tokens, mask)

  exact = jax.tree.map(np.float64, params)
  reference = (
    [embed_image(exact["image"], *row, config.image) for row in zip(image.patches, image.coords, strict=True)],
    [embed_text(exact["text"], *row, config.text) for row in zip(tokens, mask, strict=True)],
  )
  for got, expected in zip(actual, reference, strict=True):
    expected = np.stack(expected)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-5)
