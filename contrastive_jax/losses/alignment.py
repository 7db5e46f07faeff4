"""Alignment: the distance between the two embeddings of a pair."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax.losses.negatives import accumulation_dtype


def squared_distances(image: Float[Array, "pairs dim"], text: Float[Array, "pairs dim"]) -> Float[Array, "pairs"]:
  """Computes `|image_i - text_i|^2` of each pair, between 0 and 4 for unit vectors.

  Its mean is the alignment loss of Wang and Isola (arXiv 2005.10242). Added to a contrastive loss it narrows the gap
  between the modalities (arXiv 2405.18570); alone it is 0 where all embeddings are equal.

  Args:
    image: embeddings of the images.
    text: embeddings of the texts of the same pairs.

  Examples:
    >>> squared_distances(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, -1.0]])).tolist()
    [0.0, 4.0]
  """
  dtype = accumulation_dtype(image, text)
  return jnp.sum(jnp.square(image.astype(dtype) - text.astype(dtype)), axis=1)
