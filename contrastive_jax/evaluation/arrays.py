"""Checks the arrays that callers pass to functions on embeddings: what a signature says holds, or is an error."""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from contrastive_jax.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
# The kinds of arrays in signatures: an example of an annotation, the NumPy type, how a message calls it, what to pass.
_KINDS = (
  (Float[np.ndarray, ""], jnp.floating, "floating-point numbers", "pass embeddings or scores, such as x.astype('f4')"),
  (Int[np.ndarray, ""], np.integer, "integers", "number them, as np.unique(x, return_inverse=True)[1] does"),
  (Bool[np.ndarray, ""], np.bool_, "booleans", "say which are true, such as x > 0"),
)


def checked(function: F) -> F:
  """Makes a function convert the arrays of its signature to NumPy and refuse those that are not what it says.

  Lists, pandas Series and DataFrames (by position, whatever their index is) and arrays of other libraries are taken.
  Axes of one name must have one size, and floating-point numbers must be finite.
  """
  signature = inspect.signature(function)
  described = {name: _described(parameter.annotation) for name, parameter in signature.parameters.items()}

  @functools.wraps(function)
  def call(*args, **kwargs):
    bound = signature.bind(*args, **kwargs)
    first: dict[str, tuple[int, str]] = {}
    for name, value in bound.arguments.items():
      if described[name] is None:
        continue
      kind, axes = described[name]
      array = _of_kind(value, name, kind)
      if array.ndim != len(axes):
        raise UserError(f"{name} has the shape {list(array.shape)}: it is [{', '.join(axes)}]")
      for axis, size in zip(axes, array.shape, strict=True):
        known, where = first.setdefault(axis, (size, name))
        if size != known:
          raise UserError(f"{name} has {size} {axis}, {where} has {known}: pass equally many")
      bound.arguments[name] = array
    return function(*bound.args, **bound.kwargs)

  return typing.cast("F", call)


def integers(values: Any, field: str) -> Int[np.ndarray, "..."]:
  """Returns integers as an array, in the order of their positions.

  Args:
    values: list, array or pandas Series, of any integer type.
    field: name of the argument in errors.

  Returns:
    int64; unsigned integers that it cannot hold become negative ones, different as they were.

  Raises:
    UserError: if these are no integers, or some are missing.
  """
  return _of_kind(values, field, _KINDS[1])


def booleans(values: Any, field: str) -> Bool[np.ndarray, "..."]:
  """Returns booleans as an array, in the order of their positions.

  Args:
    values: list, array or pandas DataFrame of booleans.
    field: name of the argument in errors.

  Raises:
    UserError: if these are no booleans, or some are missing.
  """
  return _of_kind(values, field, _KINDS[2])


def require_below(labels: Int[np.ndarray, "..."], classes: int, field: str) -> None:
  """Raises a `UserError` unless labels are numbers of classes, from 0 to `classes` - 1."""
  if labels.size and not 0 <= labels.min() <= labels.max() < classes:
    raise UserError(f"{field} run from {labels.min()} to {labels.max()}, there are {classes} classes")


def _described(annotation: Any) -> tuple[Any, list[str]] | None:
  """Returns the kind of an array and the names of its axes in a jaxtyping annotation."""
  one = next(iter(typing.get_args(annotation)), annotation)
  for kind in _KINDS:
    if getattr(one, "dtypes", None) == kind[0].dtypes:
      return kind, one.dim_str.split()
  return None


def _of_kind(values: Any, field: str, kind: tuple) -> np.ndarray:
  _, wanted, called, remedy = kind
  if isinstance(values, str | bytes | Mapping | Set):
    raise UserError(f"{field} is a {type(values).__name__}: pass an array of {called}")
  if np.ma.is_masked(values):
    raise UserError(f"{field} is an array with a mask: leave out what is masked, such as with x.compressed()")
  if isinstance(values, Iterable) and not hasattr(values, "__array__"):
    values = list(values)
  try:
    array = np.asarray(values)
  except Exception as error:  # Arrays of other libraries raise what they like.
    reason = " ".join(str(error).splitlines()[:1]) or type(error).__name__
    raise UserError(f"{field} cannot become a NumPy array on this host ({reason})") from error
  array = _without_objects(array, field, wanted, called)
  # Half precision is for storage: sums of it would lose what they add.
  if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
    array = array.astype(np.float32)
  if not jnp.issubdtype(array.dtype, wanted):
    raise UserError(f"{field} is {array.dtype}{list(array.shape)}, not {called}: {remedy}")
  if wanted is np.integer:
    return array.astype(np.int64)
  if wanted is jnp.floating and not np.isfinite(array).all():
    index = np.argwhere(~np.isfinite(array))[0].tolist()
    raise UserError(f"{field}{index} is {array[tuple(index)]}: embeddings and scores are finite numbers")
  return array


def _without_objects(array: np.ndarray, field: str, wanted: Any, called: str) -> np.ndarray:
  """Makes an array of Python objects one of numbers, where all of them are numbers."""
  if array.dtype != object:
    return array
  for index, item in np.ndenumerate(array):
    if not jnp.issubdtype(np.asarray(item).dtype, wanted) or np.ndim(item):
      where = list(index) if index else ""
      raise UserError(f"{field}{where} is {ascii(item)[:60]}, not one of {called}: leave out what is missing")
  return np.array(array.tolist())
