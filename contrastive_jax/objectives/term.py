"""Terms of an objective: each owns its options, its parameters, its state across steps, and its loss.

The fields of a term are its options: those of `loss_options.<name>` in a config and on the command line.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from contrastive_jax.batch import AnyArray, Batch
from contrastive_jax.errors import UserError
from contrastive_jax.models.config import DualEncoderConfig
from contrastive_jax.models.dual_encoder import DualEncoder
from contrastive_jax.models.outputs import TowerOutputs

Metrics = dict[str, Float[Array, ""]]
# The embeddings of pairs by the name of the tower that makes them, and all that it makes of them.
Embeddings = Mapping[str, Float[Array, "pairs dim"]]
Outputs = Mapping[str, TowerOutputs]
# Arrays of a term, or `Variable`s that describe them, by the names that it gives them, nested as it likes.
Arrays = Mapping[str, Any]

# The moving average of the towers, as a model, and of a term's arrays.
Average = tuple[DualEncoder, Arrays]

# The names of what a term may need beside the embeddings of the pairs.
TEACHER_IMAGE, TEACHER_TEXT, STATE_ROWS = "teacher.image", "teacher.text", "state_rows"
WEIGHTS, REPLAYED = "weights", "replayed"
# A logical axis that is split over all devices that hold pairs.
SAMPLES = "samples"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes that the shapes of a term's parameters and state depend on.

  Attributes:
    embed_dim: size of the model's embeddings.
    teacher_dim: size of the teacher's embeddings, None without a teacher.
    samples: number of samples in all sources of the run; 0 where no term asks.
    pairs: the largest number of pairs in a batch; 0 where a term is tried by itself.
    model: the sizes of all towers; None where a term is tried by itself.
  """

  embed_dim: int
  teacher_dim: int | None = None
  samples: int = 0
  pairs: int = 0
  model: DualEncoderConfig | None = None


class Variable(NamedTuple):
  """An array that a term learns or remembers.

  Attributes:
    shape: the shape of the array.
    axes: a logical axis, or None, for each dimension: `SAMPLES`, or a name that the mesh's rules place.
    create: a function of the term's random key and the shape that makes its first value.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  create: Callable[[jax.Array, tuple[int, ...]], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """The pairs as global terms see them; the local shard inside `jax.shard_map`.

  Attributes:
    image: `[pairs, dim]`, L2-normalised embeddings of the images.
    text: `[pairs, dim]`, L2-normalised embeddings of the texts.
    keys: uint32 `[pairs, 2, 2]`, the `group` of the functions in `losses`: pairs that share one of their two keys are
      never each other's negatives.
    logit_scale: multiplier of the similarities.
    logit_bias: the number added to the logits, or None.
    teacher_image: `[pairs, teacher_dim]`, L2-normalised embeddings that a frozen teacher makes of the images, or None.
    teacher_text: the same of the texts, or None.
    state_rows: int32 `[pairs]`, the row of each pair's sample in the state that terms keep for every sample, or None.
    others: `[pairs, dim]`, L2-normalised embeddings that other towers make of the pairs, by the name of the tower.
    average_image: `[pairs, dim]`, L2-normalised embeddings that the moving average of the towers makes of the images,
      or None.
    average_text: the same of the texts, or None.
    weights: `[pairs]`, how much each pair counts, or None.
    replayed: `[pairs]`, 1 for the pairs of sources that an earlier run has learned from and 0 for others, or None.
    hard_text: `[pairs, captions, dim]`, L2-normalised embeddings of wrong captions of each pair, or None.
    hard_there: `[pairs, captions]`, which of these there are.
    strong_image: `[pairs, views, width]`, the image tower's features of strong views, before its projection, or None.
    strong_text: `[pairs, views, width]`, the text tower's features of changed captions, or None.
    strong_keys: uint32 `[pairs, views, 2]`, the 64-bit key of each changed caption, or None.
    present: bool `[pairs]`, which pairs take part in the term that sees them, for terms that `leaves_out` others; None
      are all.
  """

  image: AnyArray
  text: AnyArray
  keys: AnyArray
  logit_scale: AnyArray
  logit_bias: AnyArray | None = None
  teacher_image: AnyArray | None = None
  teacher_text: AnyArray | None = None
  state_rows: AnyArray | None = None
  others: Mapping[str, AnyArray] = dataclasses.field(default_factory=dict)
  average_image: AnyArray | None = None
  average_text: AnyArray | None = None
  weights: AnyArray | None = None
  replayed: AnyArray | None = None
  hard_text: AnyArray | None = None
  hard_there: AnyArray | None = None
  strong_image: AnyArray | None = None
  strong_text: AnyArray | None = None
  strong_keys: AnyArray | None = None
  present: AnyArray | None = None

  def of(self, tower: str) -> AnyArray:
    """Returns the embeddings that a tower makes, by its name."""
    return {"image": self.image, "text": self.text, **self.others}[tower]

  def map(self, function: Callable[[AnyArray], AnyArray]) -> "Pairs":
    """Returns the pairs with a function of embeddings `[..., dim]` applied to all but those of a teacher."""
    names = ("image", "text", "others", "average_image", "average_text", "hard_text")
    return dataclasses.replace(self, **{name: jax.tree.map(function, getattr(self, name)) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """Base of all terms.

  Attributes:
    needs: those of `TEACHER_IMAGE`, `TEACHER_TEXT`, `STATE_ROWS`, `WEIGHTS` and `REPLAYED` that a batch must bring.
    separates: whether it keeps the embeddings of different pairs apart; an objective needs one such term.
    compares_pairs: whether nothing is learned from a batch of one pair.
    towers: the names of the towers whose outputs it reads.
    leaves_out: whether it can be computed as if some pairs of a batch were not there, which their source is kept from.
    reads_squares: whether it takes images apart, and so needs squares of one size, without clips.
  """

  needs: ClassVar[frozenset[str]] = frozenset()
  separates: ClassVar[bool] = False
  compares_pairs: ClassVar[bool] = False
  towers: ClassVar[tuple[str, ...]] = ("image", "text")
  leaves_out: ClassVar[bool] = False
  reads_squares: ClassVar[bool] = False

  @property
  def distils(self) -> bool:
    """Whether the term compares with a teacher; batches without a teacher's targets leave it out."""
    return bool(self.needs & {TEACHER_IMAGE, TEACHER_TEXT})

  @property
  def uses_average(self) -> bool:
    """Whether the term compares with what the moving average of the towers makes of the pairs."""
    return False

  @property
  def captions_needed(self) -> int:
    """The number of wrong captions of each pair that a batch must bring."""
    return 0

  @property
  def strong_images(self) -> int:
    """The number of strong views of each image that a batch must bring."""
    return 0

  @property
  def strong_texts(self) -> int:
    """The number of changed captions of each pair that a batch must bring."""
    return 0

  def unlearned(self, pairs: int) -> float | None:
    """Returns the value where embeddings tell nothing of the pairs of a batch; None where there is no such value."""
    return None

  def sample_values(self, state: Arrays) -> dict[str, Float[Array, "rows"]]:
    """Returns what of its state a person would look at as a histogram over samples, by what it is.

    Args:
      state: the arrays that `Term.state` describes.

    Returns:
      Positive numbers, NaN in the rows whose sample has not been seen.
    """
    return {}

  def params(self, sizes: Sizes) -> Arrays:
    """Describes the parameters of the term, which the optimiser trains.

    Raises:
      UserError: if the sizes do not suit the term.
    """
    return {}

  def state(self, sizes: Sizes) -> Arrays:
    """Describes the state of the term, which it keeps from one step to the next; no gradient reaches it.

    Raises:
      UserError: if the sizes do not suit the term.
    """
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparesTowers(Term):
  """Base of terms that compare the first of some towers with each other one, and add that up.

  Attributes:
    towers: the names of the towers.
  """

  towers: tuple[str, ...] = ("image", "text")

  def __post_init__(self):
    if len(self.towers) < 2 or len(set(self.towers)) < len(self.towers):
      raise UserError(f"towers={self.towers} must name at least two different towers")


class GlobalTerm(Term, abc.ABC):
  """A term that sees the embeddings of the whole batch at once."""

  @abc.abstractmethod
  def __call__(
    self, pairs: Pairs, params: Arrays, state: Arrays, **exchange: Any
  ) -> tuple[Float[Array, ""], Arrays, Metrics]:
    """Returns the value of the global batch, equal on every device, the state after the step, and metrics.

    Args:
      pairs: the local shard inside `jax.shard_map`, or all pairs outside.
      params: the arrays that `Term.params` describes.
      state: the arrays that `Term.state` describes.
      exchange: `axis_name` and `ring_order` of the functions in `losses`, which say where the other pairs are.
    """


class WrapsTerm(Term, abc.ABC):
  """The options of a term that is made around another one, which has the options that it has by itself.

  Attributes:
    of: the name of the other term, a global one that separates.
  """

  of: str

  @abc.abstractmethod
  def around(self, term: GlobalTerm) -> GlobalTerm:
    """Returns the term around another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AroundTerm(GlobalTerm):
  """Base of terms around another one, which need of a batch what that one needs.

  Attributes:
    term: the other term.
  """

  term: GlobalTerm

  @property
  def needs(self) -> frozenset[str]:
    return self.term.needs

  @property
  def separates(self) -> bool:
    return self.term.separates

  @property
  def uses_average(self) -> bool:
    return self.term.uses_average

  @property
  def captions_needed(self) -> int:
    return self.term.captions_needed

  @property
  def leaves_out(self) -> bool:
    return self.term.leaves_out

  @property
  def compares_pairs(self) -> bool:
    return self.term.compares_pairs

  @property
  def towers(self) -> tuple[str, ...]:
    return self.term.towers


class LocalTerm(Term, abc.ABC):
  """A sum over pairs that do not see each other, divided by a count; micro-batches can add it up.

  Terms that `leaves_out` pairs make both with `sum_of_pairs` and `count_of_pairs`.
  """

  @abc.abstractmethod
  def total(
    self, model: DualEncoder, outputs: Outputs, batch: Batch, params: Arrays, **average: Average
  ) -> Float[Array, ""]:
    """Computes the sum over some pairs.

    Args:
      model: the dual encoder, whose parameters a term may use as well; gradients reach them.
      outputs: what the towers make of these pairs, by the name of the tower, the states of all tokens included. They
        are those of one micro-batch: states of the whole batch are never kept.
      batch: the part of the batch that the pairs are.
      params: the arrays that `Term.params` describes.
      average: `average`, the moving averages of the dual encoder and of the term's arrays, for a term that
        `uses_average`; no gradient reaches them.
    """

  @abc.abstractmethod
  def count(self, batch: Batch) -> Float[Array, ""]:
    """Computes the divisor of the sum from the batch alone; the counts of its parts add up to it."""


def sum_of_pairs(values: Float[Array, "pairs"], batch: Batch) -> Float[Array, ""]:
  """Adds up a number of each pair, of those that take part in the term."""
  return jnp.sum(values if batch.present is None else jnp.where(batch.present, values, 0))


def count_of_pairs(batch: Batch) -> Float[Array, ""]:
  """Counts the pairs that take part in the term."""
  return jnp.float32(batch.pairs) if batch.present is None else jnp.sum(batch.present.astype(jnp.float32))


def against_first(
  pairs: Pairs, towers: tuple[str, ...], loss: Callable[..., tuple[Float[Array, ""], Metrics]]
) -> tuple[Float[Array, ""], Metrics]:
  """Adds up a loss of the embeddings of the first tower and of each other one.

  Args:
    pairs: the pairs.
    towers: the names of the towers.
    loss: a function of two towers' embeddings to a loss and its metrics.

  Returns:
    The sum, and the metrics; those of several comparisons begin with the name of the second tower and a slash.
  """
  first, *others = towers
  found = {name: loss(pairs.of(first), pairs.of(name)) for name in others}
  metrics = {
    name if len(others) == 1 else f"{tower}/{name}": value
    for tower, (_, own) in found.items()
    for name, value in own.items()
  }
  return sum(value for value, _ in found.values()), metrics
