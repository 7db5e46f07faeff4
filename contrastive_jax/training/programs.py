"""Compiles the train step once for each shape of batch, in the background before the first batch that has it."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from contrastive_jax.batch import Batch

Key = tuple[Any, ...]


class Programs:
  """Calls the program that fits the batch. A context manager: leaving it drops what has not begun to compile."""

  def __init__(self, step: Any, state: Any, *, say: Callable[[str], None] = lambda _: None):
    """Takes the step and starts nothing.

    Args:
      step: the step that `make_train_step` returned.
      state: the first state, or an abstract one with shardings.
      say: is told what was compiled and how long it took.
    """
    self._step, self._state, self._say = step, _abstract(state), say
    self._programs: dict[Key, Future] = {}
    # One thread: programs come in the order in which they are needed, and compiling uses all cores by itself.
    self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")

  def __enter__(self) -> "Programs":
    return self

  def __exit__(self, *_) -> None:
    self._compiler.shutdown(wait=True, cancel_futures=True)

  def prepare(self, batches: Iterable[Batch]) -> None:
    """Begins to compile for these batches, abstract or not, in their order, and returns."""
    for batch in batches:
      key = _key(batch)
      if key not in self._programs:
        self._programs[key] = self._compiler.submit(self._compile, _abstract(batch))

  def __call__(self, state: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
    """Makes one step, and waits for its program where that is not ready."""
    self.prepare([batch])
    return self._programs[_key(batch)].result()(state, batch)

  def __len__(self) -> int:
    """Returns the number of programs that are compiled or being compiled."""
    return len(self._programs)

  def _compile(self, batch: Batch) -> Any:
    began = time.perf_counter()
    program = self._step.lower(self._state, batch).compile()
    rows, length = batch.image.patches.shape[:2]
    seconds = time.perf_counter() - began
    self._say(f"Compiled the step for {rows:,} image rows of {length:,} tokens in {seconds:.0f} s.")
    return program


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def _key(batch: Batch) -> Key:
  leaves, structure = jax.tree.flatten(batch)
  return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
