"""Entries for layers as PyTorch names and lays them out: weights `[out, in]`, attention split in several ways."""

from contrastive_jax.interop.keymap import (
  SAME,
  TRANSPOSED,
  Entry,
  beside,
  by_heads,
  entry,
  in_rows,
)


def linear(ours: str, theirs: str, *, bias: bool = True, depth: int = 0) -> list[Entry]:
  """A linear map."""
  entries = [entry(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED, depth)]
  return entries + [entry(f"{ours}/bias", f"{theirs}.bias", SAME, depth)] * bias


def layer_norm(ours: str, theirs: str, *, depth: int = 0) -> list[Entry]:
  """A LayerNorm with bias."""
  return [
    entry(f"{ours}/scale", f"{theirs}.weight", SAME, depth),
    entry(f"{ours}/bias", f"{theirs}.bias", SAME, depth),
  ]


def split_attention(ours: str, theirs: tuple[str, str, str], *, heads: int, depth: int) -> list[Entry]:
  """Queries, keys and values by three linear maps."""
  return [
    Entry((f"{ours}/{leaf}",), tuple(f"{name}.{suffix}" for name in theirs), by_heads(heads, form, parts=3), depth)
    for leaf, suffix, form in (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
  ]


def fused_attention(ours: str, theirs: tuple[str, str], *, heads: int, depth: int) -> list[Entry]:
  """Queries, keys and values below each other in one weight and one bias, whose names are given."""
  return [
    Entry((f"{ours}/{leaf}",), (name,), in_rows(by_heads(heads, form, parts=3), parts=3), depth)
    for leaf, name, form in (("kernel", theirs[0], TRANSPOSED), ("bias", theirs[1], SAME))
  ]


def pooling_attention(ours: str, theirs: str, *, heads: int) -> list[Entry]:
  """The attention of a learned query, by `torch.nn.MultiheadAttention`: one weight for queries, keys and values."""
  entries = [
    Entry(
      (f"{ours}/q/{leaf}", f"{ours}/kv/{leaf}"),
      (f"{theirs}.{name}",),
      in_rows(beside((form, 1), (by_heads(heads, form, parts=2), 2)), parts=3),
    )
    for leaf, name, form in (("kernel", "in_proj_weight", TRANSPOSED), ("bias", "in_proj_bias", SAME))
  ]
  return entries + linear(f"{ours}/out", f"{theirs}.out_proj")
