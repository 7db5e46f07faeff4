"""The softmax loss of mixed embeddings (Mixup-NCE), each of which has two texts in known shares."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from contrastive_jax.losses import negatives, pairwise
from contrastive_jax.losses.lines import COLUMN_LOG_SUM_EXP, ROW_LOG_SUM_EXP, reduce_negatives, to_rows
from contrastive_jax.losses.reductions import gathered, log_sum_exp


def mixup_loss(
  image: Float[Array, "pairs dim"],
  text: Float[Array, "pairs dim"],
  partners: Int[Array, "pairs"],
  shares: Float[Array, "pairs"],
  *,
  logit_scale: Float[Array, ""] | float,
  group: pairwise.Group | None = None,
  axis_name: str | tuple[str, ...] | None = None,
  strategy: str = "gather",
  tile: int | None = None,
  ring_order: tuple[int, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Mixes each image embedding with another one, and computes the softmax loss with both texts as targets.

  The mixture `share image_i + (1 - share) image_partner`, normalised, has the target `share` at text i and `1 - share`
  at the partner's text; from texts to images the targets are the transposed ones, as they are. A pair that shares a key
  with its partner is not mixed. Texts that share a key with either are no negatives of the mixture.

  Args:
    image: L2-normalised image embeddings; the local shard inside `jax.shard_map`.
    text: L2-normalised text embeddings of the same pairs.
    partners: which pair of the global batch each image is mixed with, a permutation of the batch.
    shares: share of the image itself, from 0 to 1.
    logit_scale: multiplier of the similarities, already exponentiated.
    group: pairs of equal labels `[pairs]`, or that share any of their 64-bit keys `[pairs, keys, 2]`, are left out of
      each other's negatives; None when all differ.
    axis_name: mesh axes that the pairs are split over, None on one device. Images and texts of all devices are gathered
      to find the partners.
    strategy: of the softmax: "gather" holds the texts of all devices, "ring" passes them around in blocks.
    tile: largest number of rows and columns of logits that exist at once; None lets the library choose.
    ring_order: order of the devices around the ring, as `parallel.mesh.ring_order` returns it.

  Returns:
    The mean of both directions over the global batch and `{"loss_image_to_text", "loss_text_to_image"}`, equal on every
    device.

  Raises:
    UserError: for an unknown strategy or a tile below 1.

  Kumar et al., "Harnessing Shared Relations via Multimodal Mixup Contrastive Learning" (arXiv 2409.17777), whose
  code overwrites the target of a pair that is its own partner.

  Examples:
    >>> image, text = jnp.eye(2), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> loss, _ = mixup_loss(image, text, jnp.array([1, 0]), jnp.array([0.7, 0.7]), logit_scale=10.0)
    >>> round(float(loss), 4)
    1.1386
  """
  pairwise.check(strategy, tile)
  axes = pairwise.mesh_axes(axis_name)
  dtype = negatives.accumulation_dtype(image, text)
  image, text, shares = image.astype(dtype), text.astype(dtype), shares.astype(dtype)
  scale = jnp.asarray(logit_scale, dtype)
  keys = pairwise.keys_of(group, len(image), axes)
  everyone = gathered({"image": image, "text": text, "keys": keys}, axes)
  partner = jax.tree.map(lambda leaf: leaf[partners], everyone)
  same = pairwise.share_a_key(keys, partner["keys"])
  shares = jnp.where(same, 1, shares)
  mixed = shares[:, None] * image + (1 - shares)[:, None] * partner["image"]
  squares = jnp.sum(jnp.square(mixed), axis=1, keepdims=True)
  mixed = mixed * lax.rsqrt(jnp.maximum(squares, 1e-12))

  own = negatives.positive_similarities(mixed, text)
  others = jnp.where(same, own, negatives.positive_similarities(mixed, partner["text"]))
  # Whose partner each pair is.
  inverse = jnp.argsort(gathered(partners, axes))[pairwise.pair_index(len(image), axes)]
  returned = jax.tree.map(lambda leaf: leaf[inverse], gathered({"other": others, "share": shares, "same": same}, axes))

  # What is mixed into a row is in its keys as well; a column has its own twice.
  of_images, of_texts = reduce_negatives(
    _margins,
    (ROW_LOG_SUM_EXP, COLUMN_LOG_SUM_EXP),
    {"image": mixed, "own": own, "scale": to_rows(scale, image, axes)},
    {"text": text, "own": own},
    keys.and_those(partner["keys"]),
    negatives.Sweep(axes, strategy, tile, ring_order),
    column_keys=keys.and_those(keys),
  )

  def direction(margin, other, same, share, weight):
    """Cross-entropy of a line with its own class, that of a partner, and the negatives, relative to its own."""
    second = (other - own) * scale
    total = log_sum_exp(jnp.stack([jnp.zeros_like(margin), jnp.where(same, -jnp.inf, second), margin], axis=1))
    return (weight + share) * total - share * jnp.where(same, 0, second)

  lines = {
    "loss_image_to_text": direction(of_images, others, same, 1 - shares, shares),
    "loss_text_to_image": direction(of_texts, returned["other"], returned["same"], 1 - returned["share"], shares),
  }
  pairs = len(image) * pairwise.device_count(axes)
  parts = {name: pairwise.global_sum(jnp.sum(line), axes) / pairs for name, line in lines.items()}
  return (parts["loss_image_to_text"] + parts["loss_text_to_image"]) / 2, parts


def _margins(rows, columns):
  similarities = negatives.matmul(rows["image"], columns["text"], "id,jd->ij")
  return tuple((similarities - own) * rows["scale"][:, None] for own in (rows["own"][:, None], columns["own"][None, :]))
