"""The dual encoder, and its parameters as a pure tree: shapes, logical axes, initial values."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from contrastive_jax.batch import Batch, HardCaptions, ImageBatch, StrongViews
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.models.image import ImageTower
from contrastive_jax.models.layers import ParameterMaker, constant, l2_normalize
from contrastive_jax.models.outputs import HARD_CAPTIONS, STRONG_IMAGE, STRONG_TEXT, TEXT_TAP, TowerOutputs
from contrastive_jax.models.text import TextTower


class DualEncoder(nnx.Module):
  """Towers into one space of unit vectors, of images, texts and perhaps others, with the scale and bias of logits."""

  def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs):
    make = ParameterMaker(rngs)
    self.config = config
    self.image = ImageTower(config.image, config.embed_dim, dtype=config.dtype, make=make)
    self.text = TextTower(config.text, config.embed_dim, dtype=config.dtype, make=make)
    for other in config.others:
      setattr(self, other.name, other.make(config.embed_dim, dtype=config.dtype, make=make))
    self.log_logit_scale = make((), constant(config.init_logit_scale), ())
    bias = config.init_logit_bias
    self.logit_bias = None if bias is None else make((), constant(bias), ())

  def __call__(self, batch: Batch, *, keys: Mapping[str, Key[Array, "rows"]] | None = None) -> dict[str, TowerOutputs]:
    """Runs all towers.

    Args:
      batch: the pairs.
      keys: the random key of each row of a tower, for dropout and drop path, by the name of the tower; towers without
        keys are deterministic.

    Returns:
      The outputs of each tower, by its name, which is also that of its parameters; those of the text tower's tap by
      `outputs.TEXT_TAP`; and where the batch has them, those of its hard captions and strong views by
      `outputs.HARD_CAPTIONS`, `STRONG_IMAGE` and `STRONG_TEXT`.
    """
    keys, text = keys or {}, batch.text
    placed = {"segment_ids": text.segment_ids, "locations": text.locations}
    outputs = {
      "image": self.image(batch.image, keys=keys.get("image")),
      "text": self.text(text.tokens, text.mask, **placed, keys=keys.get("text")),
    }
    if (tap := outputs["text"].tap) is not None:
      outputs[TEXT_TAP] = tap
    for other in self.config.others:
      outputs[other.name] = getattr(self, other.name)(batch.others[other.name], keys=keys.get(other.name))
    if batch.hard_captions is not None:
      outputs[HARD_CAPTIONS] = self._captions(batch.hard_captions, keys.get(HARD_CAPTIONS))
    if batch.strong is not None and batch.strong.patches is not None:
      outputs[STRONG_IMAGE] = self.image_views(
        batch.image, batch.strong.patches, batch.pairs, keys=keys.get(STRONG_IMAGE)
      )
    if batch.strong is not None and batch.strong.tokens is not None:
      outputs[STRONG_TEXT] = self._captions(batch.strong, keys.get(STRONG_TEXT))
    return outputs

  def _captions(self, several: HardCaptions | StrongViews, keys: Key[Array, "pairs"] | None) -> TowerOutputs:
    """Embeds several captions of each pair."""
    pairs, count, length = several.tokens.shape
    rows = (leaf.reshape(pairs * count, length) for leaf in (several.tokens, several.mask))
    return _in_a_row(self.text(*rows, keys=_for_each(keys, count)), pairs)

  def image_views(
    self, image: ImageBatch, patches: Any, pairs: int, *, keys: Key[Array, "rows"] | None = None
  ) -> TowerOutputs:
    """Embeds several views of each image.

    Args:
      image: the images, of which only the places of patches matter.
      patches: uint8 `[rows, views, length, patch_dim]`, which lie where those of the images do.
      pairs: number of images.
      keys: the random key of each row, for dropout and drop path; None is deterministic.

    Returns:
      The outputs, with what belongs to an image in one row, and `views` rows of states for each row of the images.
    """
    rows, count, *patch = patches.shape
    coords = jnp.repeat(image.coords, count, axis=0)
    segment_ids = None if image.segment_ids is None else jnp.repeat(image.segment_ids, count, axis=0)
    grids = None if image.grids is None else jnp.repeat(image.grids, count, axis=0)
    locations = None
    if image.locations is not None:
      row, segment = (jnp.repeat(part[:, None], count, axis=1) for part in image.locations.T)
      locations = jnp.stack([row * count + jnp.arange(count), segment], axis=-1).reshape(-1, 2)
    views = ImageBatch(patches.reshape(rows * count, *patch), coords, segment_ids, locations, grids)
    return _in_a_row(self.image(views, keys=_for_each(keys, count)), pairs)

  def encode_image(
    self, image: ImageBatch, *, keys: Key[Array, "rows"] | None = None, projected: bool = True
  ) -> Float[Array, "pairs dim"]:
    """Embeds images.

    Args:
      image: the patches. Rows are packed when it has `locations`; else a row is an image.
      keys: the random key of each row, for dropout and drop path; None is deterministic.
      projected: whether the embeddings lie in the space shared with captions; False stops at the tower's own features.

    Returns:
      L2-normalised float32 embeddings; zero where the tower's output is zero.
    """
    outputs = self.image(image, keys=keys)
    return outputs.embedding if projected else l2_normalize(outputs.pooled)

  def encode_text(
    self,
    tokens: Int[Array, "rows length"],
    mask: Bool[Array, "rows length"] | None = None,
    *,
    segment_ids: Any = None,
    locations: Any = None,
    keys: Key[Array, "rows"] | None = None,
  ) -> Float[Array, "pairs dim"]:
    """Embeds captions.

    Args:
      tokens: the tokens of captions, one a row with padding at its end, or packed.
      mask: True on real tokens; None when packed.
      segment_ids: the segment of each token of packed rows, `[rows, length]`; 0 is padding, k the row's k-th caption.
      locations: the (row, segment) of each caption of packed rows, `[pairs, 2]`.
      keys: the random key of each row, for dropout and drop path; None is deterministic.

    Returns:
      L2-normalised float32 embeddings; zero where the tower's output is zero.
    """
    return self.text(tokens, mask, segment_ids=segment_ids, locations=locations, keys=keys).embedding


def _for_each(keys: Key[Array, "rows"] | None, count: int) -> Key[Array, "several"] | None:
  """Returns `count` keys for each of some rows, next to each other."""
  return None if keys is None else jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)


def _in_a_row(outputs: TowerOutputs, pairs: int) -> TowerOutputs:
  """Puts the features of all that belongs to a pair into one row; the states of tokens stay as they are."""
  embedding, pooled = (leaf.reshape(pairs, -1) for leaf in (outputs.embedding, outputs.pooled))
  return TowerOutputs(embedding, pooled, outputs.states)


@functools.cache
def _abstract_state(config: DualEncoderConfig) -> tuple[Any, Any]:
  return nnx.split(nnx.eval_shape(lambda: DualEncoder(config, rngs=nnx.Rngs(params=0))))


def abstract(config: DualEncoderConfig) -> tuple[Any, dict[str, Any]]:
  """Describes the modules and the shapes of their parameters, without allocating any.

  Returns:
    The NNX graph definition and a nested dict of `jax.ShapeDtypeStruct`.
  """
  graphdef, state = _abstract_state(config)
  return graphdef, nnx.to_pure_dict(state)


def init(config: DualEncoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
  """Draws initial parameters, a nested dict of float32 arrays; runs under `jax.jit` with any out_shardings."""
  return nnx.to_pure_dict(nnx.state(DualEncoder(config, rngs=nnx.Rngs(params=key))))


def merge(graphdef: Any, params: dict[str, Any]) -> DualEncoder:
  """Puts parameters into the modules, to be used inside `jax.jit`."""
  return nnx.merge(graphdef, params)


def is_stacked(path: Sequence[str]) -> bool:
  """Says whether the parameter at `path` has a leading axis over depth."""
  return "blocks" in path


def logical_axes(config: DualEncoderConfig) -> dict[str, Any]:
  """Returns the logical axis names of every parameter.

  Returns:
    A nested dict like that of `abstract`, with a tuple of one name a dimension for a leaf: "layers" (depth), "embed"
    (model width), "mlp", "heads" (all features of all heads), "vocab", or None for what is replicated.
  """
  _, state = _abstract_state(config)
  leaves = {path: variable.get_metadata("logical_axes") for path, variable in nnx.to_flat_state(state)}
  return nnx.traversals.unflatten_mapping(leaves)
