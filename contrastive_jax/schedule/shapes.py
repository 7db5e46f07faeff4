"""The shapes of a segment's batches, known before any data is read, so that steps can be compiled ahead of time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from contrastive_jax.batch import Batch, HardCaptions, ImageBatch, Targets, TextBatch
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import batch_sharding
from contrastive_jax.schedule.segments import Rows, Segment

TeacherDims = tuple[int, int | None] | None


def abstract_batches(
  segment: Segment, model: DualEncoderConfig, mesh: Mesh, *, teacher_dims: TeacherDims = None
) -> Iterator[Batch]:
  """Yields all kinds of batches of a segment, as `abstract_batch` describes them."""
  for modality in segment.modalities:
    for length in segment.inputs(modality).row_lengths(model.image.patch_size, model.image.tubelet):
      yield abstract_batch(segment, modality, length, model, mesh, teacher_dims=teacher_dims)


def abstract_batch(
  segment: Segment,
  modality: str,
  length: int,
  model: DualEncoderConfig,
  mesh: Mesh,
  *,
  teacher_dims: TeacherDims = None,
  state_rows: bool = False,
  weights: bool = False,
  replayed: bool = False,
  hard_captions: int = 0,
) -> Batch:
  """Describes one kind of batch, as `data.pipeline` makes it, by shapes, dtypes and shardings.

  Args:
    segment: the segment of the run.
    modality: the modality of the step.
    length: length of rows that are not packed, one of `Inputs.row_lengths`.
    model: the sizes of the towers, and so those of patches and captions.
    mesh: the mesh that batches are placed on.
    teacher_dims: the number of features of the frozen teacher's images, and of its captions where they are asked for;
      None without a teacher.
    state_rows: whether the batch names the rows of its samples in the state of the objective.
    weights: whether it weighs the pairs.
    replayed: whether it says which pairs are replayed.
    hard_captions: number of wrong captions that it brings for each pair.
  """
  pairs, sharding = segment.batch_size, batch_sharding(mesh)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def packed(rows: Rows):
    count = pairs // segment.pack_pairs * rows.count
    return count, rows.length, array(jnp.int16, count, rows.length), array(jnp.int32, pairs, 2)

  inputs = segment.inputs(modality)
  patch_dim = model.image.patch_size**2 * model.image.channels * (model.image.tubelet if inputs.frames > 1 else 1)
  rows, segment_ids, locations = pairs, None, None
  if inputs.rows is not None:
    rows, length, segment_ids, locations = packed(inputs.rows)
  elif inputs.resolution.mode != "fixed":
    segment_ids = array(jnp.int16, pairs, length)
  image = ImageBatch(
    array(jnp.uint8, rows, length, patch_dim), array(jnp.int16, rows, length, 3), segment_ids, locations
  )

  if segment.text_rows is not None:
    rows, length, segment_ids, locations = packed(segment.text_rows)
    text = TextBatch(array(jnp.int32, rows, length), None, segment_ids, locations)
  else:
    length = model.text.length
    text = TextBatch(array(jnp.int32, pairs, length), array(jnp.bool_, pairs, length))
  targets = None
  if teacher_dims is not None and segment.taught:
    targets = Targets(*(dim and array(jnp.float32, pairs, dim) for dim in teacher_dims))
  rows = array(jnp.int32, pairs) if state_rows else None
  others = {
    other.name: jax.tree.map(lambda one: array(one.dtype, pairs, *one.shape), other.inputs()) for other in model.others
  }
  hard = None
  if hard_captions:
    some = pairs, hard_captions
    hard = HardCaptions(
      array(jnp.int32, *some, model.text.length), array(jnp.bool_, *some, model.text.length), array(jnp.bool_, *some)
    )
  return Batch(
    image,
    text,
    array(jnp.uint32, pairs, 2, 2),
    state_rows=rows,
    weights=array(jnp.float32, pairs) if weights else None,
    replayed=array(jnp.float32, pairs) if replayed else None,
    hard_captions=hard,
    targets=targets,
    others=others,
  )
