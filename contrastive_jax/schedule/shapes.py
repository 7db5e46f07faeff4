"""The shapes of a segment's batches, known before any data is read, so that steps can be compiled ahead of time."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from contrastive_jax.batch import Batch, HardCaptions, ImageBatch, StrongViews, Targets, TextBatch
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import batch_sharding
from contrastive_jax.schedule.segments import Rows, Segment

TeacherDims = tuple[int, int | None] | None


def abstract_batches(segment: Segment, model: DualEncoderConfig, mesh: Mesh, **beside: Any) -> Iterator[Batch]:
  """Yields all kinds of batches of a segment, as `abstract_batch` describes them, with what it takes beside."""
  for modality in segment.modalities:
    for length in segment.inputs(modality).row_lengths(model.image.patch_size, model.image.tubelet):
      yield abstract_batch(segment, modality, length, model, mesh, **beside)


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
  strong_images: int = 0,
  strong_texts: int = 0,
  present_in: Sequence[str] = (),
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
    strong_images: number of strong views that it brings of each image.
    strong_texts: number of changed captions that it brings for each pair.
    present_in: the names of the terms for which it says which pairs take part.
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
  strong = None
  if strong_images or strong_texts:
    some = pairs, strong_texts
    strong = StrongViews(
      array(jnp.uint8, image.patches.shape[0], strong_images, *image.patches.shape[1:]) if strong_images else None,
      array(jnp.int32, *some, model.text.length) if strong_texts else None,
      array(jnp.bool_, *some, model.text.length) if strong_texts else None,
      array(jnp.uint32, *some, 2) if strong_texts else None,
      array(jnp.float32, pairs, strong_images, 2, 3) if strong_images and inputs.resolution.mode == "fixed" else None,
    )
  return Batch(
    image,
    text,
    array(jnp.uint32, pairs, 2, 2),
    state_rows=rows,
    weights=array(jnp.float32, pairs) if weights else None,
    replayed=array(jnp.float32, pairs) if replayed else None,
    hard_captions=hard,
    strong=strong,
    present_in={term: array(jnp.bool_, pairs) for term in present_in},
    targets=targets,
    others=others,
  )
