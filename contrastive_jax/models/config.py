"""Configuration of a dual encoder: the fields of its towers, checked when they are set."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from contrastive_jax.errors import UserError, nearest

_TRANSFORMER_CHOICES = {
  "norm": ("layernorm", "rmsnorm"),
  "norm_position": ("pre", "post"),
  "activation": ("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
  "qk_norm": (None, "head", "full"),
  "rope": (None, "2d", "3d"),
  "attention": ("softmax", "sigmoid"),
  "init": ("clip", "xavier"),
}
# What a block computes, by the names that `remat` has for it.
REMAT_NAMES = ("qkv", "mix", "stream", "mlp")
_VISION_CHOICES = {
  "pool": ("cls", "mean", "map"),
  "position": ("learned", "sincos2d", "none"),
  "time_position": ("none", "learned"),
  "resize": ("crop", "squash"),
  "interpolation": ("bicubic", "bilinear"),
}
_TEXT_CHOICES = {"pool": ("eos", "last", "mean", "map", "cls"), "position": ("learned", "none")}


def _check_choices(where: str, config: Any, choices: Mapping[str, tuple]) -> None:
  for name, options in choices.items():
    value = getattr(config, name)
    if value not in options:
      known = ", ".join(str(option) for option in options)
      raise UserError(f"{where}.{name}='{value}' is unknown{nearest(value, options)}: choose one of {known}")


def _check_positive(where: str, config: Any, *names: str) -> None:
  for name in names:
    if getattr(config, name) < 1:
      raise UserError(f"{where}.{name}={getattr(config, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A stack of blocks, for either tower. The tower's config checks these fields, since it knows their whole names.

  Attributes:
    width: number of features of a token.
    depth: number of blocks.
    heads: number of attention heads, which divides `width`.
    mlp_dim: number of inner features of the MLP (of each branch of "swiglu").
    norm: "layernorm" or "rmsnorm", computed in float32.
    norm_eps: the number that is added to the variance or mean square.
    norm_position: "pre" norms the input of a branch, "post" the sum of branch and residual stream (BERT).
    activation: "gelu" (exact), "gelu_tanh" (SigLIP), "quick_gelu" (CLIP) or the gated "swiglu" (UniViTAR).
    qk_norm: RMSNorm of queries and keys: "head" over each head, before the rotary embedding; "full" over all heads
      together, after it (UniViTAR).
    qkv_bias: whether the query, key and value projections have a bias.
    attention: "softmax", or "sigmoid" weights that do not sum to one (arXiv 2409.04431); experimental.
    attention_length: the n of the sigmoid's bias -log n, which is the length of the longest image or caption.
    attention_norm: whether the output of attention is normed before it is added to the residual stream (the "hybrid
      norm" of sigmoid attention).
    mlp_norm: whether the MLP's inner features are normed before its last projection (UniViTAR).
    layer_scale: initial value of the learned scale of each feature of a branch; None has no such scale.
    drop_path: share of rows for which the last block's branches are skipped in training; it grows linearly with depth.
    dropout: share of features dropped after each branch in training.
    causal: whether a token sees only itself and earlier ones.
    rope: "2d" rotates queries and keys by the patch coordinates (y, x), "3d" by (t, y, x).
    remat: the part of a block that the backward pass computes again: "full" is all of it, "dots" all but its matrix
      products, "none" nothing. Or what it keeps instead, joined by "+": "qkv" (queries, keys and values as projected),
      "mix" (what attention makes of them), "stream" (the tokens between attention and MLP), "mlp" (its features before
      the activation); with all four it computes no matrix product again but the logits of attention.
    unroll: number of blocks in one turn of the loop over depth. With `depth` or more there is no loop, which compiles
      longer and runs faster.
    attention_kernel: whether, on a TPU, rows of up to 384 tokens attend in a kernel of this library. It has been
      compiled for TPUs and compared with the formula by interpreting it, and has not run on one: compare the losses of
      some steps with and without it.
    init: "clip" (normal; residual branches scaled by depth) or "xavier" (big_vision, SigLIP).
  """

  width: int
  depth: int
  heads: int
  mlp_dim: int
  norm: str = "layernorm"
  norm_eps: float = 1e-6
  norm_position: str = "pre"
  activation: str = "gelu"
  qk_norm: str | None = None
  qkv_bias: bool = True
  attention: str = "softmax"
  attention_length: int = 0
  attention_norm: bool = False
  mlp_norm: bool = False
  layer_scale: float | None = None
  drop_path: float = 0.0
  dropout: float = 0.0
  causal: bool = False
  rope: str | None = None
  remat: str = "full"
  unroll: int = 1
  attention_kernel: bool = False
  init: str = "xavier"

  @property
  def head_dim(self) -> int:
    """The number of features of one attention head."""
    return self.width // self.heads


def _check_remat(where: str, remat: str) -> None:
  whole = ("full", "dots", "none")
  unknown = [] if remat in whole else [name for name in remat.split("+") if name not in REMAT_NAMES]
  if unknown:
    raise UserError(
      f"{where}.remat='{remat}' is unknown{nearest(unknown[0], (*whole, *REMAT_NAMES))}: choose one of"
      f" {', '.join(whole)}, or what is kept of {', '.join(REMAT_NAMES)}, joined by '+'"
    )


def _check_transformer(where: str, blocks: TransformerConfig) -> None:
  """Raises a `UserError` that names the fields from `where` on: both towers have blocks, and one of them is wrong."""
  _check_choices(where, blocks, _TRANSFORMER_CHOICES)
  _check_positive(where, blocks, "width", "depth", "heads", "mlp_dim", "unroll")
  _check_remat(where, blocks.remat)
  if blocks.width % blocks.heads:
    raise UserError(f"{where}.heads={blocks.heads} must divide {where}.width={blocks.width}")
  each = f"{blocks.width}/{blocks.heads}={blocks.head_dim}: change {where}.heads"
  if blocks.rope and blocks.head_dim % 4:
    raise UserError(f"{where}.rope='{blocks.rope}' needs features per head divisible by 4, got {each}")
  if blocks.rope == "3d" and blocks.head_dim < 16:
    raise UserError(f"{where}.rope='3d' needs at least 16 features per head, got {each}")
  if blocks.attention == "sigmoid" and blocks.attention_length < 1:
    raise UserError(
      f"{where}.attention='sigmoid' needs {where}.attention_length={blocks.attention_length} to be at least 1:"
      " set it to the tokens of the longest image or caption"
    )
  if blocks.attention == "softmax" and blocks.attention_length:
    raise UserError(
      f"{where}.attention_length={blocks.attention_length} has no meaning for {where}.attention='softmax':"
      " leave it at 0"
    )
  for name in ("drop_path", "dropout"):
    if not 0 <= getattr(blocks, name) < 1:
      raise UserError(f"{where}.{name}={getattr(blocks, name)} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
  """The image tower.

  Attributes:
    transformer: the blocks of the tower.
    image_size: side in pixels of a fixed-resolution image.
    patch_size: side in pixels of a patch; pixels left over at the right and bottom are not seen.
    tubelet: number of frames of a patch of a clip. A patch of an image counts as so many equal frames (UniViTAR).
    channels: number of channels of a pixel.
    pool: "cls", the class token; "mean" of the patches; or "map", attention with a learned query (SigLIP).
    position: "learned", a table that is resampled to other grids; "sincos2d"; or "none" (with `transformer.rope`).
    time_position: "learned", a table with a row for each tubelet of a clip, added to its patches; or "none", which
      leaves time to `transformer.rope="3d"` or, as UniViTAR does, to nothing.
    max_time: number of tubelets of the longest clip, for the "learned" table.
    class_token: whether a learned token is put before the patches; the pool "cls" needs it.
    pre_norm: whether there is a norm before the blocks (CLIP).
    post_norm: whether there is a norm after the blocks.
    patch_bias: whether the patch embedding has a bias.
    projection: whether a linear map leads to `embed_dim`; without it the width must be `embed_dim`.
    projection_bias: whether that map has a bias.
    mean: mean of each channel, of pixels in [0, 1].
    std: standard deviation of each channel, of pixels in [0, 1].
    resize: how evaluation brings an image to a square: "crop" shows its middle (CLIP), "squash" ignores its aspect
      (SigLIP).
    interpolation: how it resizes, "bicubic" or "bilinear", antialiased as Pillow does.
  """

  transformer: TransformerConfig
  image_size: int
  patch_size: int
  tubelet: int = 1
  channels: int = 3
  pool: str = "map"
  position: str = "learned"
  time_position: str = "none"
  max_time: int = 16
  class_token: bool = False
  pre_norm: bool = False
  post_norm: bool = True
  patch_bias: bool = True
  projection: bool = False
  projection_bias: bool = False
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  resize: str = "crop"
  interpolation: str = "bicubic"

  def __post_init__(self):
    _check_transformer("model.image.transformer", self.transformer)
    _check_choices("model.image", self, _VISION_CHOICES)
    _check_positive("model.image", self, "image_size", "patch_size", "tubelet", "channels", "max_time")
    if self.image_size < self.patch_size:
      raise UserError(
        f"model.image.image_size={self.image_size} must be at least model.image.patch_size={self.patch_size}"
      )
    if self.pool == "cls" and not self.class_token:
      raise UserError("model.image.pool='cls' needs model.image.class_token=True")
    if self.position == "sincos2d" and (self.transformer.width % 4 or self.transformer.width < 8):
      raise UserError(
        "model.image.position='sincos2d' needs model.image.transformer.width to be a multiple of 4 from 8 on,"
        f" got {self.transformer.width}"
      )
    for name in ("mean", "std"):
      if len(getattr(self, name)) != self.channels:
        raise UserError(
          f"model.image.{name}={getattr(self, name)} must have model.image.channels={self.channels} values,"
          " one a channel"
        )

  @property
  def grid(self) -> int:
    """The number of patches along one side of a fixed-resolution image."""
    return self.image_size // self.patch_size

  @property
  def patch_dim(self) -> int:
    """The number of bytes of a patch of an image; one of a clip has `tubelet` times as many."""
    return self.patch_size**2 * self.channels


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """The text tower.

  Attributes:
    transformer: the blocks of the tower.
    vocab_size: number of tokens of the vocabulary.
    length: number of tokens of the longest caption.
    pool: "eos", the last real token (CLIP); "last" position, padded or not (SigLIP); "mean" of the real tokens; "map",
      attention with a learned query; "cls", the first token.
    position: "learned" or "none".
    pre_norm: whether there is a norm before the blocks (BERT).
    post_norm: whether there is a norm after the blocks.
    attend_padding: whether padding is seen like any token (SigLIP). It makes no difference to causal towers, in which
      padding comes last.
    projection: whether a linear map leads to `embed_dim`; without it the width must be `embed_dim`.
    projection_bias: whether that map has a bias.
    tap: number of blocks after which the states of tokens are also pooled, by attention with a learned query, into a
      second embedding that terms find under the name "text.tap"; 0 makes none.
  """

  transformer: TransformerConfig
  vocab_size: int
  length: int
  pool: str = "eos"
  position: str = "learned"
  pre_norm: bool = False
  post_norm: bool = True
  attend_padding: bool = False
  projection: bool = True
  projection_bias: bool = False
  tap: int = 0

  def __post_init__(self):
    _check_transformer("model.text.transformer", self.transformer)
    if not 0 <= self.tap <= self.transformer.depth:
      raise UserError(
        f"model.text.tap={self.tap} must be at most model.text.transformer.depth={self.transformer.depth}, or 0 for"
        " none"
      )
    _check_choices("model.text", self, _TEXT_CHOICES)
    _check_positive("model.text", self, "vocab_size", "length")
    if self.transformer.rope:
      rope = self.transformer.rope
      raise UserError(f"model.text.transformer.rope='{rope}' has no meaning for text: set it to None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherConfig(abc.ABC):
  """A tower of inputs that are neither images nor texts, such as sounds; `models.others` has the table of them.

  The fields of a subclass have defaults and are those of an entry of `model.others` in a config. Lists of numbers are
  not among them, and other configs, such as a `TransformerConfig`, may be.

  Attributes:
    name: the name of the tower, by which its parameters, inputs and embeddings are found.
  """

  name: str

  @abc.abstractmethod
  def make(self, embed_dim: int, *, dtype: str, make: Any) -> Any:
    """Makes the tower: an NNX module called with (inputs of the rows, keys=) that returns `TowerOutputs`.

    Args:
      embed_dim: number of features of the space that the towers share.
      dtype: type of matrix products and activations.
      make: the `ParameterMaker`.
    """

  @abc.abstractmethod
  def inputs(self) -> Any:
    """Describes what the tower reads of one pair: a tree of `jax.ShapeDtypeStruct`."""

  def check(self, found: Any, whose: str) -> None:
    """Raises a `UserError` unless `found` is what the tower reads of one pair.

    Args:
      found: a tree of arrays.
      whose: what it was found in, for the error.
    """
    kinds = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype), found)
    if kinds != self.inputs():
      raise UserError(f"{whose} has {kinds} for the {self.name} tower, which reads {self.inputs()}")

  @abc.abstractmethod
  def forward_flops(self, embed_dim: int) -> float:
    """Counts the FLOPs of the matrix products that embed the inputs of one pair, as `models.flops` counts them."""


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
  """An image and a text tower that share an embedding space, and perhaps others.

  Attributes:
    image: the image tower.
    text: the text tower.
    others: the towers beside these two, each of another name.
    embed_dim: number of features of the shared space.
    init_logit_scale: initial logarithm of the logit scale.
    init_logit_bias: initial logit bias (sigmoid loss); None has no bias.
    dtype: type of matrix products and activations, "float32" or "bfloat16". Parameters are float32.
  """

  image: ImageConfig
  text: TextConfig
  embed_dim: int
  init_logit_scale: float = float(np.log(1 / 0.07))
  init_logit_bias: float | None = None
  dtype: str = "float32"
  others: tuple[OtherConfig, ...] = ()

  def __post_init__(self):
    _check_choices("model", self, {"dtype": ("float32", "bfloat16")})
    _check_positive("model", self, "embed_dim")
    for place, other in enumerate(self.others):
      if other.name in self.names[: 2 + place]:
        raise UserError(f"model.others has the tower '{other.name}' twice: name each tower once")
    for name, tower in (("image", self.image), ("text", self.text)):
      if not tower.projection and tower.transformer.width != self.embed_dim:
        raise UserError(
          f"model.{name}.projection=False needs model.{name}.transformer.width={tower.transformer.width} to equal"
          f" model.embed_dim={self.embed_dim}"
        )

  @property
  def names(self) -> tuple[str, ...]:
    """The names of all embeddings that a pair has: those of its towers, and that of the text tower's tap."""
    return "image", "text", *(other.name for other in self.others), *(("text.tap",) if self.text.tap else ())
