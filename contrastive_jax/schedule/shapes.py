"""The shapes of a segment's batches, known before any data is read, so that steps can be compiled ahead of time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from contrastive_jax.batch import Batch, HardCaptions, ImageBatch, StrongViews, Targets, TextBatch
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import batch_sharding
from contrastive_jax.schedule.extras import NO_EXTRAS, Extras
from contrastive_jax.schedule.segments import Rows, Segment


def abstract_batches(
  segment: Segment, model: DualEncoderConfig, mesh: Mesh, extras: Extras = NO_EXTRAS
) -> Iterator[Batch]:
  """Yields all kinds of batches of a segment, as `abstract_batch` describes them."""
  for modality in segment.modalities:
    for length in segment.inputs(modality).row_lengths(model.image.patch_size, model.image.tubelet):
      yield abstract_batch(segment, modality, length, model, mesh, extras)


def abstract_batch(
  segment: Segment,
  modality: str,
  length: int,
  model: DualEncoderConfig,
  mesh: Mesh,
  extras: Extras = NO_EXTRAS,
) -> Batch:
  """Describes one kind of batch, as `data.pipeline` makes it, by shapes, dtypes and shardings.

  Args:
    segment: the segment of the run.
    modality: the modality of the step.
    length: length of rows that are not packed before patches are dropped, one of `Inputs.row_lengths`.
    model: the sizes of the towers, and so those of patches and captions.
    mesh: the mesh that batches are placed on.
    extras: what the batch brings beside images, captions and keys.
  """
  pairs, sharding = segment.batch_size, batch_sharding(mesh)
  text_length = segment.caption_length(model.text.length)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def packed(rows: Rows):
    count = pairs // segment.pack_pairs * rows.count
    return count, rows.length, array(jnp.int16, count, rows.length), array(jnp.int32, pairs, 2)

  inputs = segment.inputs(modality)
  patch_dim = model.image.patch_size**2 * model.image.channels * (model.image.tubelet if inputs.frames > 1 else 1)
  rows, length, segment_ids, locations = pairs, inputs.kept(length), None, None
  if inputs.rows is not None:
    rows, length, segment_ids, locations = packed(inputs.rows)
  elif inputs.resolution.mode != "fixed":
    segment_ids = array(jnp.int16, pairs, length)
  image = ImageBatch(
    array(jnp.uint8, rows, length, patch_dim),
    array(jnp.int16, rows, length, 3),
    segment_ids,
    locations,
    array(jnp.int16, rows, length, 3) if inputs.drop_patches else None,
  )

  if segment.text_rows is not None:
    rows, length, segment_ids, locations = packed(segment.text_rows)
    text = TextBatch(array(jnp.int32, rows, length), None, segment_ids, locations)
  else:
    text = TextBatch(array(jnp.int32, pairs, text_length), array(jnp.bool_, pairs, text_length))
  targets = None
  if extras.teacher_dims is not None and segment.taught:
    targets = Targets(*(dim and array(jnp.float32, pairs, dim) for dim in extras.teacher_dims))
  others = {
    other.name: jax.tree.map(lambda one: array(one.dtype, pairs, *one.shape), other.inputs()) for other in model.others
  }
  hard = None
  if extras.hard_captions:
    some = pairs, extras.hard_captions
    hard = HardCaptions(
      array(jnp.int32, *some, text_length), array(jnp.bool_, *some, text_length), array(jnp.bool_, *some)
    )
  strong = None
  views, changed = extras.strong_images, extras.strong_texts
  if views or changed:
    some = pairs, changed
    strong = StrongViews(
      array(jnp.uint8, image.patches.shape[0], views, *image.patches.shape[1:]) if views else None,
      array(jnp.int32, *some, text_length) if changed else None,
      array(jnp.bool_, *some, text_length) if changed else None,
      array(jnp.uint32, *some, 2) if changed else None,
      array(jnp.float32, pairs, views, 2, 3) if views and inputs.resolution.mode == "fixed" else None,
    )
  return Batch(
    image,
    text,
    array(jnp.uint32, pairs, 2, 2),
    state_rows=array(jnp.int32, pairs) if extras.state_rows else None,
    weights=array(jnp.float32, pairs) if extras.weights else None,
    replayed=None if extras.replayed is None else array(jnp.float32, pairs),
    hard_captions=hard,
    strong=strong,
    present_in={term: array(jnp.bool_, pairs) for term in extras.present_in},
    targets=targets,
    others=others,
  )
