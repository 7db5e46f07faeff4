"""What a tower makes of a batch, by name, so that another output changes no signature."""

import dataclasses
from collections.abc import Mapping

import jax

from contrastive_jax.batch import AnyArray

# The name of what the text tower makes of the wrong captions of a batch, beside the names of the towers.
HARD_CAPTIONS = "text.hard"
# The name of what the text tower makes of its tokens before its last block.
TEXT_TAP = "text.tap"
# The names of what the towers make of the strong views of a batch.
STRONG_IMAGE, STRONG_TEXT = "image.strong", "text.strong"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerOutputs:
  """The outputs of one tower. Under `jax.jit` those that nobody reads are not computed.

  Attributes:
    embedding: float32 `[pairs, dim]`, L2-normalised in the space that the towers share; zero where the output is zero.
      That of hard captions, and of strong views, has as many of these in a row as a pair has of them.
    pooled: `[pairs, width]`, the tower's own features of each pair, before the projection; of hard captions and of
      strong views several in a row.
    states: `[rows, length, width]`, the state of every token after the last block and the last norm. The class token of
      an image tower comes first; padding and packed rows are those of the inputs. Hard captions and strong views have
      as many rows for each one of these, next to each other.
    tap: the same of the states after an earlier block, where the tower has a tap; None elsewhere.
  """

  embedding: AnyArray
  pooled: AnyArray
  states: AnyArray
  tap: "TowerOutputs | None" = None


def for_global_terms(outputs: Mapping[str, TowerOutputs]) -> dict[str, AnyArray]:
  """Returns what global terms read: embeddings, and of strong views the features before the projection."""
  return {
    name: output.pooled if name in (STRONG_IMAGE, STRONG_TEXT) else output.embedding for name, output in outputs.items()
  }
