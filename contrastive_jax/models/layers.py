"""Layers of both towers: linear maps, norms, MLPs and regularisers, with float32 parameters and norms in float32."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from contrastive_jax.models.config import ImageConfig, TextConfig, TransformerConfig
from contrastive_jax.parallel.placement import gathered, platform

Initializer = Callable[[nnx.Rngs, tuple[int, ...]], Array]
Axes = tuple[str | None, ...]


def constant(value: float) -> Initializer:
  """Returns an initializer that sets every entry to `value`."""
  return lambda rngs, shape: jnp.full(shape, value, jnp.float32)


def normal(std: float) -> Initializer:
  """Returns an initializer that draws independent normal entries of standard deviation `std`."""
  return lambda rngs, shape: std * jax.random.normal(rngs.params(), shape, jnp.float32)


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
  """Returns an initializer that draws uniform entries of variance 2 / (fan_in + fan_out).

  Fused kernels pass the fans of one of their parts.
  """
  bound = math.sqrt(6 / (fan_in + fan_out))
  return lambda rngs, shape: jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


@dataclasses.dataclass(frozen=True)
class ParameterMaker:
  """Makes the float32 parameters of a module, or of `depth` equal modules stacked along a leading axis.

  A stack is drawn at once, which compiles faster than `vmap` over the modules' keys.
  """

  rngs: nnx.Rngs
  depth: int | None = None

  def __call__(self, shape: tuple[int, ...], init: Initializer, axes: Axes) -> nnx.Param:
    """Makes a parameter that knows the logical names of its axes, which `dual_encoder.logical_axes` lists."""
    if self.depth is None:
      return nnx.Param(init(self.rngs, shape), logical_axes=axes)
    return nnx.Param(init(self.rngs, (self.depth, *shape)), logical_axes=("layers", *axes))


class Linear(nnx.Module):
  """A linear map, `x @ kernel + bias` in the compute dtype."""

  def __init__(
    self,
    features_in: int,
    features_out: int,
    *,
    init: Initializer,
    axes: Axes,
    dtype: str,
    use_bias: bool = True,
    make: ParameterMaker,
  ):
    self.kernel = make((features_in, features_out), init, axes)
    # A bias along the model width is small: replicated.
    bias_axis = None if axes[1] == "embed" else axes[1]
    self.bias = make((features_out,), constant(0.0), (bias_axis,)) if use_bias else None
    self.dtype = dtype
    self.axes = axes

  def __call__(self, x: Float[Array, "... features_in"]) -> Float[Array, "... features_out"]:
    bias = None if self.bias is None else self.bias[...]
    return linear(x, self.kernel[...], bias, self.axes, self.dtype)


def linear(
  x: Float[Array, "..."],
  kernel: Float[Array, "..."],
  bias: Float[Array, "..."] | None,
  axes: Axes,
  dtype: str,
  *,
  over: int = 1,
) -> Float[Array, "..."]:
  """Computes `x @ kernel + bias` in `dtype`, for features that may have several axes, such as (head, feature).

  Args:
    x: the features of each token, `[..., *features_in]`.
    kernel: the weights, `[*features_in, *features_out]`.
    bias: the bias, `[*features_out]`, or None.
    axes: the logical name of each axis of the kernel.
    dtype: the type in which matrices are multiplied.
    over: number of axes of the input features.

  Returns:
    The features `[..., *features_out]`.
  """
  x, kernel = x.astype(dtype), gathered(kernel.astype(dtype), axes)
  bias = None if bias is None else bias.astype(dtype)
  if platform() == "tpu":
    # A TPU fills each row up to whole tiles, so that flattening rows would copy them.
    y = jnp.tensordot(x, kernel, over)
    return y if bias is None else y + bias
  # One matrix product over all tokens: XLA's CPU backend is slow at the gradients of batched ones.
  features = math.prod(kernel.shape[:over])
  y = x.reshape(-1, features) @ kernel.reshape(features, -1)
  if bias is not None:
    y = y + bias.reshape(-1)
  return y.reshape(*x.shape[: x.ndim - over], *kernel.shape[over:])


def make_projection(
  config: ImageConfig | TextConfig, embed_dim: int, *, dtype: str, make: ParameterMaker
) -> Linear | None:
  """Makes the map from a tower's width to the shared space, or None when the tower has no projection."""
  if not config.projection:
    return None
  width = config.transformer.width
  return Linear(
    width,
    embed_dim,
    init=normal(width**-0.5),
    axes=("embed", None),
    use_bias=config.projection_bias,
    dtype=dtype,
    make=make,
  )


class Norm(nnx.Module):
  """LayerNorm or RMSNorm over the last axis, computed in float32 and returned in the dtype of its input."""

  def __init__(self, features: int, *, kind: str, eps: float, make: ParameterMaker):
    self.scale = make((features,), constant(1.0), (None,))
    self.bias = make((features,), constant(0.0), (None,)) if kind == "layernorm" else None
    self.eps = eps

  @jax.named_scope("norm")
  def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
    y = x.astype(jnp.float32)
    if self.bias is not None:
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps) * self.scale[...]
    return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def make_norm(config: TransformerConfig, *, make: ParameterMaker) -> Norm:
  """Makes the norm that a transformer uses, over its width."""
  return Norm(config.width, kind=config.norm, eps=config.norm_eps, make=make)


class LayerScale(nnx.Module):
  """A learned factor for each feature of a residual branch."""

  def __init__(self, features: int, value: float, *, make: ParameterMaker):
    self.scale = make((features,), constant(value), (None,))

  def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
    return x * self.scale[...].astype(x.dtype)


def _quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return jax.nn.gelu(x, approximate=True)


# In "swiglu" the activation is that of the gate.
ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "quick_gelu": _quick_gelu, "swiglu": jax.nn.silu}


def kernel_init(config: TransformerConfig, fan_in: int, fan_out: int, *, role: str) -> Initializer:
  """Returns the initializer of a block's kernel.

  Args:
    config: the transformer, whose field `init` chooses the scheme.
    fan_in: number of input features.
    fan_out: number of output features of one part of a fused kernel.
    role: "attention" (queries, keys, values), "mlp" (into the MLP) or "residual" (out of either branch).

  "clip" follows CLIP's released code: standard deviations of width^-0.5, (2 width)^-0.5 and, into the residual stream,
  (2 depth width)^-0.5. "xavier" follows big_vision.
  """
  if config.init == "xavier":
    return xavier_uniform(fan_in, fan_out)
  std = {
    "attention": config.width**-0.5,
    "mlp": (2 * config.width) ** -0.5,
    "residual": config.width**-0.5 * (2 * config.depth) ** -0.5,
  }
  return normal(std[role])


class Mlp(nnx.Module):
  """An MLP: two linear maps with an activation between, or their gated form `down(norm(silu(gate x) * up x))`."""

  def __init__(self, config: TransformerConfig, *, dtype: str, make: ParameterMaker):
    width, inner = config.width, config.mlp_dim
    into = kernel_init(config, width, inner, role="mlp")
    self.up = Linear(width, inner, init=into, axes=("embed", "mlp"), dtype=dtype, make=make)
    gated = config.activation == "swiglu"
    self.gate = Linear(width, inner, init=into, axes=("embed", "mlp"), dtype=dtype, make=make) if gated else None
    self.norm = Norm(inner, kind=config.norm, eps=config.norm_eps, make=make) if config.mlp_norm else None
    out = kernel_init(config, inner, width, role="residual")
    self.down = Linear(inner, width, init=out, axes=("mlp", "embed"), dtype=dtype, make=make)
    self.activation = config.activation

  @jax.named_scope("mlp")
  def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    activation = ACTIVATIONS[self.activation]
    with jax.named_scope("up"):
      up = checkpoint_name(self.up(x), "mlp")
    if self.gate is None:
      inner = activation(up)
    else:
      with jax.named_scope("gate"):
        gate = checkpoint_name(self.gate(x), "mlp")
      inner = activation(gate) * up
    with jax.named_scope("down"):
      return self.down(inner if self.norm is None else self.norm(inner))


def fold_in(keys: Key[Array, "rows"], data: Int[Array, ""] | int) -> Key[Array, "rows"]:
  """Makes a new key for each row."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def _kept(keys: Key[Array, "rows"], rate: Float[Array, ""] | float, shape: tuple[int, ...]) -> Bool[Array, "rows ..."]:
  return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)


def dropout(x: Float[Array, "rows ..."], rate: float, keys: Key[Array, "rows"]) -> Float[Array, "rows ..."]:
  """Zeroes a share `rate` of the entries and scales the others so that the expectation stays."""
  return jnp.where(_kept(keys, rate, x.shape[1:]), x / (1 - rate), 0)


def drop_path(
  x: Float[Array, "rows length width"], rate: Float[Array, ""], keys: Key[Array, "rows"]
) -> Float[Array, "rows length width"]:
  """Skips a residual branch for a share `rate` of the rows (stochastic depth, arXiv 1603.09382), same expectation."""
  return x * (_kept(keys, rate, (1, 1)) / (1 - rate)).astype(x.dtype)


def l2_normalize(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
  """Divides vectors by their norm, in float32.

  A zero vector stays zero and has a finite gradient, since norms below 1e-6 count as 1e-6.

  Examples:
    >>> l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
  """
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
