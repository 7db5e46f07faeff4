"""Alignment: how far apart the two embeddings of a pair lie."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax.losses.negatives import accumulation_dtype


def squared_distances(image: Float[Array, "pairs dim"], text: Float[Array, "pairs dim"]) -> Float[Array, "pairs"]:
  """`|image_i - text_i|^2` of each pair, between 0 and 4 for unit vectors.

  Its mean is the alignment loss of Wang and Isola (arXiv 2005.10242). Added to a contrastive loss it narrows the gap
  between the modalities (arXiv 2405.18570); alone it is 0 where all embeddings are equal.
  """
  dtype = accumulation_dtype(image, text)
  return jnp.sum(jnp.square(image.astype(dtype) - text.astype(dtype)), axis=1)
