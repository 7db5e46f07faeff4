"""Makes entries for layers as PyTorch names and lays them out: weights `[out, in]`, attention split in several ways."""

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
  """Makes the entries of a linear map."""
  entries = [entry(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED, depth)]
  return entries + [entry(f"{ours}/bias", f"{theirs}.bias", SAME, depth)] * bias


def layer_norm(ours: str, theirs: str, *, depth: int = 0) -> list[Entry]:
  """Makes the entries of a LayerNorm with bias."""
  return [
    entry(f"{ours}/scale", f"{theirs}.weight", SAME, depth),
    entry(f"{ours}/bias", f"{theirs}.bias", SAME, depth),
  ]


def split_attention(ours: str, theirs: tuple[str, str, str], *, heads: int, depth: int) -> list[Entry]:
  """Makes the entries of queries, keys and values that are three linear maps."""
  return [
    Entry((f"{ours}/{leaf}",), tuple(f"{name}.{suffix}" for name in theirs), by_heads(heads, form, parts=3), depth)
    for leaf, suffix, form in (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME))
  ]


def fused_attention(ours: str, theirs: tuple[str, str], *, heads: int, depth: int) -> list[Entry]:
  """Makes the entries of queries, keys and values that lie below each other in one weight and one bias."""
  return [
    Entry((f"{ours}/{leaf}",), (name,), in_rows(by_heads(heads, form, parts=3), parts=3), depth)
    for leaf, name, form in (("kernel", theirs[0], TRANSPOSED), ("bias", theirs[1], SAME))
  ]


def pooling_attention(ours: str, theirs: str, *, heads: int) -> list[Entry]:
  """Makes the entries of a learned query's attention, a `torch.nn.MultiheadAttention` with one weight for all three."""
  entries = [
    Entry(
      (f"{ours}/q/{leaf}", f"{ours}/kv/{leaf}"),
      (f"{theirs}.{name}",),
      in_rows(beside((form, 1), (by_heads(heads, form, parts=2), 2)), parts=3),
    )
    for leaf, name, form in (("kernel", "in_proj_weight", TRANSPOSED), ("bias", "in_proj_bias", SAME))
  ]
  return entries + linear(f"{ours}/out", f"{theirs}.out_proj")
