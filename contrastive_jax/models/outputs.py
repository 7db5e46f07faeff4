"""What a tower makes of a batch, by name, so that another output changes no signature."""

import dataclasses

import jax

from contrastive_jax.batch import AnyArray

# The name of what the text tower makes of the wrong captions of a batch, beside the names of the towers.
HARD_CAPTIONS = "text.hard"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerOutputs:
  """The outputs of one tower. Under `jax.jit` those that nobody reads are not computed.

  Attributes:
    embedding: float32 `[pairs, dim]`, L2-normalised in the space that the towers share; zero where the output is zero.
      That of hard captions has as many of these in a row as a pair has wrong captions.
    pooled: `[pairs, width]`, the tower's own features of each pair, before the projection.
    states: `[rows, length, width]`, the state of every token after the last block and the last norm. The class token of
      an image tower comes first; padding and packed rows are those of the inputs.
  """

  embedding: AnyArray
  pooled: AnyArray
  states: AnyArray
