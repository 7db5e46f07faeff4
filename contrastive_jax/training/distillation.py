"""A frozen teacher beside the student: its embeddings of a batch, made before the train step and apart from it.

The step sees targets only. So the teacher has no gradients and no optimiser state, no checkpoint of the student holds
anything of it, and the step is the same whether the teacher ran or its targets were read from a cache.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from contrastive_jax import loading
from contrastive_jax.batch import Batch, Targets, TeacherInputs
from contrastive_jax.models import dual_encoder
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.parallel.mesh import batch_sharding
from contrastive_jax.training import accumulation


class Teacher:
  """A frozen dual encoder that shares the student's mesh.

  Attributes:
    config: the sizes of its towers, with the resolution, the patches and the text length that it reads.
    tokenizer: the tokenizer of its captions, or None for a teacher that is shown none.
  """

  def __init__(
    self,
    config: DualEncoderConfig,
    params: Mapping[str, Any],
    mesh: Mesh,
    *,
    tokenizer: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]] | None = None,
    accumulate: int = 1,
  ):
    """Compiles nothing before the first batch.

    Args:
      config: of the towers; they compute in its dtype.
      params: on the mesh, where they stay as they are.
      mesh: of the student.
      tokenizer: texts and a length -> token ids and mask.
      accumulate: micro-batches embedded one after the other, as in the student's step.
    """
    self.config, self.tokenizer = config, tokenizer
    self._params = params
    graphdef, _ = dual_encoder.abstract(config)

    def embed(params, inputs: TeacherInputs) -> Targets:
      model, text = dual_encoder.merge(graphdef, params), inputs.text
      with jax.named_scope("teacher"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        image = model.encode_image(inputs.image)
        if text is None:
          return Targets(image)
        return Targets(
          image, model.encode_text(text.tokens, text.mask, segment_ids=text.segment_ids, locations=text.locations)
        )

    def embed_all(params, inputs: TeacherInputs) -> Targets:
      if accumulate == 1:
        return embed(params, inputs)
      parts = accumulation.split_batch(inputs, accumulate, mesh)
      return accumulation.join(lax.map(lambda part: embed(params, part), parts), mesh)

    self._embed = jax.jit(embed_all, out_shardings=batch_sharding(mesh))

  @property
  def dim(self) -> int:
    """The size of its embeddings."""
    return self.config.embed_dim

  def targets(self, batch: Batch) -> Batch:
    """Returns the batch with targets in the place of its teacher's inputs; one without such inputs as it is."""
    if batch.teacher is None:
      return batch
    return dataclasses.replace(batch, teacher=None, targets=self._embed(self._params, batch.teacher))


def load_teacher(path: str | os.PathLike, mesh: Mesh, *, accumulate: int = 1) -> Teacher:
  """Loads the model of a run directory or of imported weights as a teacher.

  Args:
    path: a run directory, or weights imported by convert.py.
    mesh: the mesh of the student; the parameters are placed by the default rules.
    accumulate: number of micro-batches that are embedded one after the other.

  Raises:
    UserError: as in `loading.load`.
  """
  model = loading.load(path, mesh=mesh)
  return Teacher(model.config, model.params, mesh, tokenizer=model.tokenizer, accumulate=accumulate)
