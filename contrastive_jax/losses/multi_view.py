"""Losses of several views of each instance at once: MV-InfoNCE and MV-DHEL, with the embeddings of towers as views."""

import itertools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import log_sum_exp


def multi_view_softmax_loss(
  views: pairwise.Views,
  *,
  logit_scale: Float[Array, ""] | float,
  intra_modal: bool = True,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `-mean_i log(p_i / (p_i + n_i))`, p the sum of e^s over two views of i, n that over i and others.

  All views of an instance share one fraction, so that the view that is nearest to another one decides (MV-InfoNCE).

  Args:
    views: L2-normalised embeddings of each view of the same instances; local shards inside `jax.shard_map`.
    logit_scale: multiplier of the similarities, already exponentiated.
    intra_modal: whether a view of an instance is also compared with the same view of others, as in the authors' code;
      their README compares different views only.
    group: instances of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out
      of each other's negatives; None when all differ.
    axis_name: mesh axes that the instances are split over, None on one device.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The loss of the global batch, at least 0, and no metrics. One sweep over a matrix of similarities for each two
    views, and one for each view with `intra_modal`.

  Raises:
    UserError: for fewer than two views, an unknown strategy or a tile below 1.

  arXiv 2507.06979.

  Examples:
    >>> views = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> code, readme = (multi_view_softmax_loss(views, logit_scale=1.0, intra_modal=way)[0] for way in (True, False))
    >>> round(float(code), 4), round(float(readme), 4)
    (0.7655, 0.4546)
  """
  options = _Options.of(views, logit_scale, group, axis_name, strategy, tile, ring_order)
  margins = [line for two in options.pairs_of_views() for line in options.between(*two)]
  if intra_modal:
    margins += [options.between(view, view)[0] for view in views]
  positives = options.positives() + math.log(2)  # Both orders of two views count.
  return options.mean(jnp.logaddexp(0, log_sum_exp(jnp.stack(margins, axis=1)) - positives)), {}


def decoupled_views_loss(
  views: pairwise.Views,
  *,
  logit_scale: Float[Array, ""] | float,
  with_self: bool = False,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes `mean_i (-log(sum of e^s over two views of i) + sum_l log sum_j e^s(l_i, l_j))` over views l (MV-DHEL).

  Views of one instance attract each other, and each view repels the same view of others: no image is compared with the
  text of another pair. It has no lower bound in the logit scale: whoever learns the scale must not learn it from this
  loss, and nothing here stops its gradient.

  Args:
    views: L2-normalised embeddings of each view of the same instances; local shards inside `jax.shard_map`.
    logit_scale: multiplier of the similarities, already exponentiated.
    with_self: whether j runs over i itself as well, and both orders of two views count, as in the authors' README;
      their code does neither. The loss then has a lower bound.
    group: instances of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out
      of each other's negatives; None when all differ.
    axis_name: mesh axes that the instances are split over, None on one device.
    strategy: "gather" holds a view of all devices, "ring" passes it around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The loss of the global batch and no metrics. An instance without negatives counts 0, unless it counts itself.

  Raises:
    UserError: for fewer than two views, an unknown strategy or a tile below 1.

  arXiv 2507.06979; sums of logarithms take the place of the products in the authors' code, which overflow.

  Examples:
    >>> views = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> code, readme = (decoupled_views_loss(views, logit_scale=1.0, with_self=way)[0] for way in (False, True))
    >>> round(float(code), 4), round(float(readme), 4)
    (-0.3, 1.2331)
  """
  options = _Options.of(views, logit_scale, group, axis_name, strategy, tile, ring_order)
  repulsion = jnp.stack([options.between(view, view)[0] for view in views], axis=1)
  positives = options.positives()
  if with_self:
    own = jnp.stack([negatives.positive_similarities(view, view) for view in views], axis=1)
    repulsion = jnp.logaddexp(repulsion, (own - options.reference[:, None]) * options.scale)
    positives = positives + math.log(2)
  some = ~jnp.any(jnp.isneginf(repulsion), axis=1)
  # All are relative to one logit, of which the positives take one and each view adds one.
  rest = (len(views) - 1) * options.reference * options.scale
  lines = jnp.sum(jnp.where(some[:, None], repulsion, 0), axis=1) + rest - positives
  return options.mean(jnp.where(some, lines, 0)), {}


class _Options:
  """What both losses compute of the views; logits are relative to the mean positive of each instance."""

  def __init__(self, views: pairwise.Views, scale: Array, keys: pairwise.Keys, sweep: negatives.Sweep):
    self.views, self.scale, self.keys, self.sweep = views, scale, keys, sweep
    self.similarities = jnp.stack([negatives.positive_similarities(*two) for two in self.pairs_of_views()], axis=1)
    self.reference = jnp.mean(self.similarities, axis=1)

  @classmethod
  def of(cls, views, logit_scale, group, axis_name, strategy, tile, ring_order) -> "_Options":
    pairwise.check_views(views, strategy, tile)
    axes = pairwise.mesh_axes(axis_name)
    scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(*views))
    keys = pairwise.keys_of(group, len(views[0]), axes)
    return cls(views, scale, keys, negatives.Sweep(axes, strategy, tile, ring_order))

  def pairs_of_views(self) -> list[tuple[Array, Array]]:
    return list(itertools.combinations(self.views, 2))

  def positives(self) -> Float[Array, "pairs"]:
    """Log-sum-exp over the pairs of views of each instance."""
    return log_sum_exp((self.similarities - self.reference[:, None]) * self.scale)

  def between(self, first: Array, second: Array) -> tuple[Float[Array, "pairs"], Float[Array, "pairs"]]:
    """Log-sum-exps over the views of others, for one view and for the other."""
    both = negatives.statistics_of_negatives(first, second, self.scale, self.reference, self.keys, self.sweep)
    return both[0].margin, both[1].margin

  def mean(self, lines: Float[Array, "pairs"]) -> Float[Array, ""]:
    pairs = len(lines) * pairwise.device_count(self.sweep.axes)
    return pairwise.global_sum(jnp.sum(lines), self.sweep.axes) / pairs
