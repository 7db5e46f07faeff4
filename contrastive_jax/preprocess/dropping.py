"""Dropping patches: a model in training reads a random part of each image, and all of it afterwards."""

import numpy as np
from jaxtyping import Float, Int


def kept_count(patches: int, share: float) -> int:
  """Returns how many patches an image keeps: at least one.

  Args:
    patches: number of patches of the image.
    share: share of them that is dropped.

  Examples:
    >>> kept_count(196, 0.5), kept_count(2, 0.9)
    (98, 1)
  """
  return max(1, round((1 - share) * patches))


def kept(draws: Float[np.ndarray, "images draws"], patches: int, share: float) -> Int[np.ndarray, "images kept"]:
  """Chooses the patches that images keep, every set of them with equal chances.

  Args:
    draws: uniform draws of each image, at least as many as it has patches.
    patches: number of patches of each image.
    share: share of them that is dropped.

  Returns:
    The numbers of the patches that each image keeps, ascending.

  The random masks of FLIP (arXiv 2212.00794), without replacement as there.

  Examples:
    >>> kept(np.array([[0.3, 0.9, 0.1, 0.2]]), 4, 0.5).tolist()
    [[2, 3]]
  """
  order = np.argsort(draws[:, :patches], axis=1, kind="stable")
  return np.sort(order[:, : kept_count(patches, share)], axis=1)
