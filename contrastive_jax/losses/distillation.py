"""Distillation: the distance of a student's embeddings from those that a frozen teacher made of the same pairs.

Features compare each pair by itself. Similarities and relations compare whole batches: they need no common space, so
that student and teacher may differ in width, and they are exact on any mesh.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from contrastive_jax.errors import UserError, require_known
from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.reductions import Accumulator, Sum, finite

DISTANCES = ("cosine", "mse")


def feature_distances(
  student: Float[Array, "pairs dim"], teacher: Float[Array, "pairs dim"], distance: str = "cosine"
) -> Float[Array, "pairs"]:
  """Computes how far each student embedding lies from its teacher embedding.

  Args:
    student: the student's embeddings, of any length, such as the output of a learned projection.
    teacher: the teacher's L2-normalised embeddings, which are constants to the gradient.
    distance: "cosine", `1 - cos`, or "mse", the squared distance.

  Returns:
    The distance of each pair.

  Raises:
    UserError: for an unknown distance.

  Examples:
    >>> student, teacher = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> feature_distances(student, teacher).tolist(), feature_distances(student, teacher, "mse").tolist()
    ([0.0], [1.0])
  """
  require_known("distance", distance, DISTANCES)
  dtype = negatives.accumulation_dtype(student, teacher)
  student, teacher = student.astype(dtype), lax.stop_gradient(teacher.astype(dtype))
  if distance == "mse":
    return jnp.sum(jnp.square(student - teacher), axis=1)
  squared = jnp.sum(jnp.square(student), axis=1, keepdims=True)
  # Half the squared distance of unit vectors is 1 - cos without its cancellation. A zero vector has a finite gradient.
  return jnp.sum(jnp.square(student * lax.rsqrt(jnp.maximum(squared, 1e-12)) - teacher), axis=1) / 2


def similarity_distillation(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  teacher_image: Float[Array, "pairs teacher_dim"],
  teacher_text: Float[Array, "pairs teacher_dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  temperature: float | None = None,
  teacher_temperature: float = 0.05,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the KL divergence from the teacher's to the student's softmax over the batch, mean of both directions.

  Each image has a distribution over all texts, and each text one over all images.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    teacher_image: the teacher's image embeddings, which are constants to the gradient.
    teacher_text: the teacher's text embeddings, which are constants to the gradient.
    logit_scale: multiplier of the student's similarities where `temperature` is None.
    temperature: divisor of the student's similarities; None takes `1 / logit_scale`, which is then trained too.
    teacher_temperature: divisor of the teacher's similarities.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "ring" passes blocks of texts around, "gather" holds them all.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, see `parallel.mesh.ring_order`; None is their order in the mesh.

  Returns:
    The divergence of the global batch and `{"divergence_image_to_text", "divergence_text_to_image"}`, equal on every
    device. Gradients taken outside `jax.shard_map` are exact on any mesh.

  Raises:
    UserError: for an unknown strategy, a tile below 1 or a temperature that is not above 0.

  It is the contrastive relational distillation of Yang et al., "CLIP-KD" (arXiv 2307.12732), with temperatures of its
  own.

  Examples:
    >>> both = jnp.eye(2)  # The student agrees with its teacher.
    >>> loss, _ = similarity_distillation(both, both, both, both, logit_scale=20.0, teacher_temperature=0.05)
    >>> float(loss)
    0.0
  """
  pairwise.check(strategy, tile)
  for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
    if value is not None and not value > 0:
      raise UserError(f"{name}={value} must be above 0")
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  scale = jnp.asarray(logit_scale if temperature is None else 1 / temperature, dtype)
  sweep = negatives.Sweep(axes, strategy, tile, ring_order).in_one_tile_if_small(len(image))
  args = (image, text, scale, *lax.stop_gradient((teacher_image, teacher_text)))
  directions = _divergences(sweep, 1 / teacher_temperature, *pairwise.vary(args, image, text, axes=axes))
  pairs = len(image) * pairwise.device_count(axes)
  parts = [pairwise.global_sum(jnp.sum(line), axes) / pairs for line in directions]
  names = ("divergence_image_to_text", "divergence_text_to_image")
  return (parts[0] + parts[1]) / 2, dict(zip(names, parts, strict=True))


def positive_distillation(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  teacher_image: Float[Array, "pairs dim"],
  teacher_text: Float[Array, "pairs dim"],
  *,
  logit_scale: Float[Array, ""] | float,
  pair_weights: Float[Array, "pairs"] | None = None,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the softmax loss in which the positive of each pair is what the teacher makes of its other side.

  An image is drawn to its caption as the teacher embeds it, among the captions of other pairs as the student does, and
  a caption likewise. The teacher shares the student's space, such as the model that the student was.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    teacher_image: the teacher's image embeddings, which are constants to the gradient.
    teacher_text: the teacher's text embeddings, which are constants to the gradient.
    logit_scale: multiplier of the similarities, already exponentiated.
    pair_weights: how much each pair counts in the mean over pairs, at least 0; None is 1. They are constants to the
      gradient. A pair of weight 0 is still a negative of others; where all are 0, so is the loss.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device.
    strategy: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The mean of both directions over the global batch, `softmax_loss` where student and teacher agree, and
    `{"loss_image_to_text", "loss_text_to_image"}`, equal on every device.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  The negative-student positive-teacher loss of COCONUT (arXiv 2310.02699), where each pair is a class of its own and
  the positive stands in the denominator as the teacher has it.

  Examples:
    >>> both = jnp.eye(2)  # The teacher had not told the captions apart.
    >>> alike = jnp.full((2, 2), 0.5**0.5)
    >>> [round(float(positive_distillation(both, both, both, old, logit_scale=1.0)[0]), 4) for old in (both, alike)]
    [0.3133, 0.357]
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  scale = jnp.asarray(logit_scale, negatives.accumulation_dtype(image, text))
  own = negatives.positive_similarities(image, text)
  sides = negatives.statistics_of_negatives(
    image,
    text,
    scale,
    own,
    pairwise.keys_of(group, len(image), axes),
    negatives.Sweep(axes, strategy, tile, ring_order),
  )
  weights = jnp.ones_like(own) if pair_weights is None else lax.stop_gradient(pair_weights).astype(own.dtype)
  total = pairwise.global_sum(jnp.sum(weights), axes)
  teacher_image, teacher_text = (lax.stop_gradient(side).astype(image.dtype) for side in (teacher_image, teacher_text))
  parts = {}
  for name, statistics, *taught in (
    ("loss_image_to_text", sides[0], image, teacher_text),
    ("loss_text_to_image", sides[1], text, teacher_image),
  ):
    # Margins are relative to the student's own positive, and this one takes its place.
    lines = jnp.logaddexp(0, statistics.margin + scale * (own - negatives.positive_similarities(*taught)))
    parts[name] = pairwise.global_sum(jnp.sum(weights * lines), axes) / jnp.where(total > 0, total, 1)
  return (parts["loss_image_to_text"] + parts["loss_text_to_image"]) / 2, parts


def relational_distillation(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  teacher_image: Float[Array, "pairs teacher_dim"],
  teacher_text: Float[Array, "pairs teacher_dim"] | None = None,
  *,
  logit_scale: Float[Array, ""] | float | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "ring",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the mean squared difference of the student's and the teacher's similarities over all pairs of two images.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: has no effect, and is accepted so that the losses are interchangeable.
    teacher_image: the teacher's image embeddings, which are constants to the gradient.
    teacher_text: has no effect, like `text`.
    logit_scale: has no effect, like `text`.
    axis_name: mesh axes that the images are split over, None on one device.
    strategy: "ring" passes blocks of images around, "gather" holds them all.
    tile: largest number of rows and columns of similarities that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it; None is their order in
      the mesh.

  Returns:
    The value of the global batch, 0 for a single pair, and no metrics.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  Tung and Mori, "Similarity-Preserving Knowledge Distillation" (arXiv 1907.09682), of cosines instead of rescaled rows.

  Examples:
    >>> image, teacher = jnp.eye(2), jnp.array([[1.0], [1.0]])  # Similarities of 0 where the teacher has 1.
    >>> float(relational_distillation(image, image, teacher)[0])
    1.0
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image)
  teacher = lax.stop_gradient(teacher_image.astype(image.dtype))
  # The difference of two inner products is one inner product of longer vectors: the engine needs no second matrix.
  rows, columns = jnp.concatenate([image, teacher], axis=1), jnp.concatenate([image, -teacher], axis=1)
  total = negatives.sum_over_negatives(
    _square_and_slope,
    rows,
    columns,
    jnp.ones((), dtype),
    jnp.zeros((), dtype),
    pairwise.keys_of(None, len(image), axes),
    negatives.Sweep(axes, strategy, tile, ring_order),
  )
  pairs = len(image) * pairwise.device_count(axes)
  # A float: the square of a large batch is no int32.
  return pairwise.global_sum(total, axes) / float(max(pairs * (pairs - 1), 1)), {}


def _square_and_slope(values: Float[Array, "a b"]) -> tuple[Float[Array, "a b"], Float[Array, "a b"]]:
  return jnp.square(values), 2 * values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Divergence(Accumulator):
  """Two softmaxes of each line, of the teacher's logits u and of the student's v, and their difference.

  Logits are counted from the largest of their kind, and so are the sums over them.

  Attributes:
    largest_u: largest teacher logit, minus infinity where there was none.
    largest_v: largest student logit.
    total_u: sum of e^u.
    total_v: sum of e^v.
    difference: sum of e^u (u - v).
    expected: sum of e^u v.
    own: sum of e^v v.
  """

  largest_u: Float[Array, "..."]
  largest_v: Float[Array, "..."]
  total_u: Float[Array, "..."]
  total_v: Float[Array, "..."]
  difference: Float[Array, "..."]
  expected: Float[Array, "..."]
  own: Float[Array, "..."]

  @classmethod
  def empty(cls, lines: int, dtype: jnp.dtype) -> "_Divergence":
    nothing, zero = jnp.full((lines,), -jnp.inf, dtype), jnp.zeros((lines,), dtype)
    return cls(nothing, nothing, *(zero,) * 5)

  @classmethod
  def along(
    cls, axis: int, u: Float[Array, "a b"], v: Float[Array, "a b"], mask: Bool[Array, "a b"] | None
  ) -> "_Divergence":
    """Reduces one tile along `axis`, or the part of it that `mask` marks."""
    largest = [jnp.max(x if mask is None else jnp.where(mask, x, -jnp.inf), axis) for x in (u, v)]
    u, v = (x - jnp.expand_dims(finite(line), axis) for x, line in zip((u, v), largest, strict=True))
    if mask is not None:
      # Masked before the exponential, which might overflow.
      u, v = jnp.where(mask, u, 0), jnp.where(mask, v, 0)
    exp_u, exp_v = (jnp.exp(x) if mask is None else jnp.where(mask, jnp.exp(x), 0) for x in (u, v))
    terms = exp_u, exp_v, exp_u * (u - v), exp_u * v, exp_v * v
    return cls(*largest, *(jnp.sum(term, axis) for term in terms))

  def merge(self, other: "_Divergence") -> "_Divergence":
    largest_u = jnp.maximum(self.largest_u, other.largest_u)
    largest_v = jnp.maximum(self.largest_v, other.largest_v)

    def moved(part):
      """Returns the sums of `part`, counted from the new largest logits."""
      step_u, step_v = (
        jnp.where(jnp.isneginf(old), 0, old - finite(new))
        for old, new in ((part.largest_u, largest_u), (part.largest_v, largest_v))
      )
      by_u, by_v = jnp.exp(step_u), jnp.exp(step_v)
      return (
        part.total_u * by_u,
        part.total_v * by_v,
        (part.difference + part.total_u * (step_u - step_v)) * by_u,
        (part.expected + part.total_u * step_v) * by_u,
        (part.own + part.total_v * step_v) * by_v,
      )

    return type(self)(largest_u, largest_v, *map(jnp.add, moved(self), moved(other)))

  def value(self) -> Float[Array, "..."]:
    """Returns the divergence from the teacher's to the student's distribution."""
    return self.difference / self.total_u + jnp.log(self.total_v) - jnp.log(self.total_u)

  def slope_by_scale(self, scale: Float[Array, ""]) -> Float[Array, "..."]:
    """Returns the derivative of the divergence by the student's scale: the difference of the mean similarities."""
    return (self.own / self.total_v - self.expected / self.total_u) / scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergences(sweep, teacher_scale, image, text, scale, teacher_image, teacher_text):
  """Computes the divergence of each image's and of each text's distribution."""
  return _divergences_forward(sweep, teacher_scale, image, text, scale, teacher_image, teacher_text)[0]


def _logits(teacher_scale, scale, rows, columns):
  """Returns a tile's teacher and student logits."""
  student, teacher = (negatives.matmul(rows[k], columns[k], "id,jd->ij") for k in (0, 1))
  return teacher.astype(student.dtype) * teacher_scale, student * scale


def _divergences_forward(sweep, teacher_scale, image, text, scale, teacher_image, teacher_text):
  def tile_fn(rows, columns, fresh):
    u, v = _logits(teacher_scale, scale, rows, columns)
    # The barrier keeps the products from being computed once for each sum.
    u, v = lax.optimization_barrier((u, v))
    return tuple((_Divergence.along(axis, u, v, fresh),) for axis in (1, 0))

  empty = (_Divergence.empty(len(image), negatives.accumulation_dtype(image, text)),)
  totals = sweep(tile_fn, (image, teacher_image), (text, teacher_text), (empty, empty))
  lines = tuple(total for (total,) in totals)
  return tuple(line.value() for line in lines), (image, text, scale, teacher_image, teacher_text, lines)


def _divergences_backward(sweep, teacher_scale, residuals, cotangents):
  image, text, scale, teacher_image, teacher_text, lines = residuals
  dtype = negatives.accumulation_dtype(image, text)

  def tile_fn(rows, columns, fresh):
    u, v = lax.optimization_barrier(_logits(teacher_scale, scale, rows, columns))

    def share(teacher, student, cotangent, axis):
      """Returns what a logit adds to the divergence of its row or column: student minus teacher probability."""
      p, q = (
        jnp.exp(x - jnp.expand_dims(largest, axis)) / jnp.expand_dims(total, axis)
        for x, (largest, total) in ((u, teacher), (v, student))
      )
      return (q - p) * jnp.expand_dims(cotangent, axis)

    slopes = share(*rows[2:], 1) + share(*columns[2:], 0)
    if fresh is not None:
      slopes = jnp.where(fresh, slopes, 0)
    d_image, d_text = negatives.tile_gradients(rows[0], columns[0], slopes, scale)
    return (d_image,), (d_text,)

  def side(embeddings, teacher, which):
    line = lines[which]
    return embeddings, teacher, (line.largest_u, line.total_u), (line.largest_v, line.total_v), cotangents[which]

  empty = (Sum.empty(image.shape, dtype),), (Sum.empty(text.shape, dtype),)
  (d_image,), (d_text,) = sweep(tile_fn, side(image, teacher_image, 0), side(text, teacher_text, 1), empty)
  d_scale = sum(
    jnp.sum(line.slope_by_scale(scale) * cotangent) for line, cotangent in zip(lines, cotangents, strict=True)
  )
  return negatives.cast(d_image, image), negatives.cast(d_text, text), d_scale.astype(scale.dtype), None, None


_divergences.defvjp(_divergences_forward, _divergences_backward)
