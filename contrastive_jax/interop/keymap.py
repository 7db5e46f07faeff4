"""Key maps: the correspondence of our parameters and theirs, declared once and used in both directions."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from contrastive_jax.errors import UserError

Arrays = list[np.ndarray]
LAYER = "{layer}"
# Keys named in an error; more would be unreadable.
_NAMED = 12
# Parts of a name that say how a model was wrapped, by distributed training or by `torch.compile`.
_WRAPPERS = ("module", "_orig_mod")
# A model is at most so many times larger than the file that should hold it: more is a damaged config, whose arrays
# could not be held.
_MISFIT = 16


@dataclasses.dataclass(frozen=True)
class Form:
  """The layouts of the same numbers on both sides: `read` makes ours of theirs, and `write` undoes it."""

  read: Callable[[Arrays], Arrays]
  write: Callable[[Arrays], Arrays]


def one(read: Callable[[np.ndarray], np.ndarray], write: Callable[[np.ndarray], np.ndarray]) -> Form:
  """Returns a form of one array on both sides."""
  return Form(lambda arrays: [read(arrays[0])], lambda arrays: [write(arrays[0])])


SAME = one(lambda array: array, lambda array: array)
TRANSPOSED = one(np.transpose, np.transpose)


def extended(axes: int) -> Form:
  """Returns a form whose side in their file has so many axes of size one in front."""
  return one(lambda array: array.reshape(array.shape[axes:]), lambda array: array.reshape((1,) * axes + array.shape))


def convolution(patch_size: int) -> Form:
  """Returns a form whose side in their file is a convolution `[width, channels, patch, patch]`, ours a matrix."""

  def write(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(patch_size, patch_size, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)

  return one(lambda kernel: kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]), write)


def by_heads(heads: int, form: Form, parts: int) -> Form:
  """Returns a form of several of their projections, read by `form` and joined head by head."""

  def read(arrays: Arrays) -> Arrays:
    split = [form.read([array])[0] for array in arrays]
    split = [part.reshape(*part.shape[:-1], heads, 1, -1) for part in split]
    joined = np.concatenate(split, axis=-2)
    return [joined.reshape(*joined.shape[:-3], -1)]

  def write(arrays: Arrays) -> Arrays:
    split = arrays[0].reshape(*arrays[0].shape[:-1], heads, parts, -1)
    each = [split[..., part, :].reshape(*arrays[0].shape[:-1], -1) for part in range(parts)]
    return [form.write([part])[0] for part in each]

  return Form(read, write)


def in_rows(form: Form, parts: int) -> Form:
  """Returns a form whose side in their file holds the arrays that `form` takes in one, below each other."""
  return Form(lambda arrays: form.read(np.split(arrays[0], parts)), lambda arrays: [np.concatenate(form.write(arrays))])


def beside(*forms: tuple[Form, int]) -> Form:
  """Returns a form of several forms, given with the number of their arrays that each takes; each gives one of ours."""

  def read(arrays: Arrays) -> Arrays:
    taken, rest = [], list(arrays)
    for form, count in forms:
      taken += form.read(rest[:count])
      rest = rest[count:]
    return taken

  def write(arrays: Arrays) -> Arrays:
    return [theirs for (form, _), array in zip(forms, arrays, strict=True) for theirs in form.write([array])]

  return Form(read, write)


@dataclasses.dataclass(frozen=True)
class Entry:
  """The same parameters by our names and by theirs.

  Attributes:
    ours: paths in the parameter tree, such as "image/patch_embedding/kernel".
    theirs: names in their file. With `{layer}` in them they stand for one array for each layer, which ours stacks.
    form: the layouts of the numbers on both sides.
    depth: number of layers, where theirs are numbered.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  form: Form = SAME
  depth: int = 0


def entry(ours: str, theirs: str, form: Form = SAME, depth: int = 0) -> Entry:
  """Makes an entry of one parameter on both sides."""
  return Entry((ours,), (theirs,), form, depth)


def unwrapped(theirs: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
  """Returns the same arrays with the names that they have in the bare model.

  The parts "module" and "_orig_mod" are dropped wherever they stand, and then every part that all names begin with,
  such as "model." or "clip.": the arrays of a bare model never share their first part.

  Args:
    theirs: arrays by name, the parts of which are separated by dots.
    source: where they come from, for errors.

  Raises:
    UserError: if two names become one.
  """
  parts = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in theirs}
  while len(parts) > 1 and all(len(rest) > 1 for rest in parts.values()):
    if len({rest[0] for rest in parts.values()}) > 1:
      break
    parts = {name: rest[1:] for name, rest in parts.items()}
  found: dict[str, str] = {}
  for name, rest in parts.items():
    bare = ".".join(rest)
    if bare in found:
      raise UserError(f"{source} holds both {found[bare]} and {name}, which are one parameter: save one of the models")
    found[bare] = name
  return {bare: theirs[name] for bare, name in found.items()}


def to_ours(
  entries: Sequence[Entry],
  theirs: Mapping[str, np.ndarray],
  abstract: Mapping[str, Any],
  *,
  source: str,
  ignored: Iterable[str] = (),
) -> dict[str, Any]:
  """Makes our parameters of theirs.

  Args:
    entries: the key map of the family.
    theirs: their arrays by name.
    abstract: our parameters as shapes, such as `dual_encoder.abstract` returns.
    source: where theirs come from, for errors.
    ignored: names of theirs that are no parameters, such as stored position numbers.

  Returns:
    A nested dict of float32 arrays like `abstract`.

  Raises:
    UserError: naming the keys that are missing, unexpected, of another shape, no floating-point numbers, or not finite.
  """
  size = sum(math.prod(leaf.shape) for leaf in traverse_util.flatten_dict(dict(abstract)).values())
  held = sum(array.size for array in theirs.values())
  if size > _MISFIT * max(held, 1 << 20):
    raise UserError(f"{source} holds {held:,} numbers, and its config describes a model of {size:,}: copy both again")
  expected = {name: array.shape for name, array in _written(entries, _zeros(abstract)).items()}
  ignored = set(ignored)
  # Some writers give a scalar an axis of its own, and some take it away.
  theirs = {
    name: array.reshape(expected[name])
    if array.size == 1 and name in expected and math.prod(expected[name]) == 1
    else array
    for name, array in theirs.items()
    if name in expected or name not in ignored
  }
  given = {name for name in theirs if name not in ignored}
  missing = [name for name in expected if name not in given]
  unexpected = [name for name in theirs if name in given and name not in expected]
  misshapen = [
    f"{name} {list(theirs[name].shape)} instead of {list(shape)}"
    for name, shape in expected.items()
    if name in given and theirs[name].shape != shape
  ]
  faults = [
    f"{len(names)} {what}: {_list(names, unexpected if what == 'missing' else ())}"
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    if names
  ]
  if faults:
    raise UserError(f"{source} does not fit the model that its config describes; {'; '.join(faults)}")
  # Of the types that NumPy has no name for one is known; others are raw bytes, and numbers of eight bits and fewer.
  whole = [
    f"{name} ({theirs[name].dtype})"
    for name in expected
    if theirs[name].dtype.kind != "f" and theirs[name].dtype != ml_dtypes.bfloat16
  ]
  if whole:
    raise UserError(f"{source} holds {len(whole)} weights that are no floating-point numbers: {_list(whole, ())}")
  broken = [name for name in expected if not np.isfinite(theirs[name]).all()]
  if broken:
    raise UserError(
      f"{source} holds {len(broken)} weights of {len(expected)} that are not finite: {_list(broken, ())}; take another"
      " checkpoint"
    )
  params: dict[tuple[str, ...], np.ndarray] = {}
  for each in entries:
    layers = [
      each.form.read([np.asarray(theirs[name.replace(LAYER, str(layer))], np.float32) for name in each.theirs])
      for layer in range(max(1, each.depth))
    ]
    for path, arrays in zip(each.ours, zip(*layers, strict=True), strict=True):
      params[tuple(path.split("/"))] = np.stack(arrays) if each.depth else np.asarray(arrays[0], order="C")
  scale = params.get(("log_logit_scale",), np.float32(0))
  with np.errstate(over="ignore"):
    if not np.isfinite(np.exp(scale)):
      raise UserError(
        f"{source} has the logarithm {float(scale):g} of its logit scale, whose exponential is not finite: it holds the"
        " scale itself, or is damaged"
      )
  return traverse_util.unflatten_dict(params)


def to_theirs(entries: Sequence[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Makes their parameters of ours, which undoes `to_ours` bit for bit.

  Args:
    entries: the key map of the family.
    params: nested dict of our arrays.
  """
  arrays = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(dict(params)).items()}
  written = _written(entries, arrays)
  return {name: np.asarray(array, order="C") for name, array in written.items()}


def _written(entries: Sequence[Entry], ours: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, np.ndarray]:
  used = {tuple(path.split("/")) for each in entries for path in each.ours}
  if used != set(ours):
    odd = sorted("/".join(path) for path in used ^ set(ours))
    raise ValueError(f"the key map and the model differ in {odd}")
  written = {}
  for each in entries:
    arrays = [ours[tuple(path.split("/"))] for path in each.ours]
    for layer in range(max(1, each.depth)):
      layered = [array[layer] for array in arrays] if each.depth else arrays
      for name, array in zip(each.theirs, each.form.write(layered), strict=True):
        written[name.replace(LAYER, str(layer))] = array
  return written


def _zeros(abstract: Mapping[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
  """Makes arrays of these shapes that take no memory."""
  flat = traverse_util.flatten_dict(dict(abstract))
  return {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in flat.items()}


def _list(names: Sequence[str], candidates: Sequence[str]) -> str:
  named = []
  for name in names[:_NAMED]:
    close = difflib.get_close_matches(name, candidates, 1, 0.9)
    named.append(f"{name} (there is {close[0]})" if close else name)
  rest = len(names) - len(named)
  return ", ".join(named) + (f" and {rest} more" if rest else "")
