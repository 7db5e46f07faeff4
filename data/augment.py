"""Random views of images: one affine warp, optional drawing-style changes, one colour matrix. OpenCV does the pixels."""

import dataclasses
import functools
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

# Uniform draws that a view uses, a multiple of 4.
DRAWS = 28
_LUMA = np.array([0.299, 0.587, 0.114])
# Below this scale, bilinear sampling skips pixels; the image is first shrunk by area averaging.
_SHRINK_BELOW = 0.6


@dataclasses.dataclass(frozen=True)
class Augment:
  """What a random view may do. Ranges are uniform, probabilities are a view's.

  Attributes:
    zoom: size of the image relative to the frame: (1, 1) shows it whole (a drawing) or filling the frame (a photograph);
      what a zoom above 1 leaves out is uniform, so (1, 1 / sqrt(a)) crops down to the share `a` of the area.
    stretch: log-range of width over height.
    rotate: up to so many degrees either way.
    shear: up to so much either way.
    shift: further displacement, in frames.
    flip: probability of mirroring a sample that allows it.
    background: probability that transparent parts show a random colour instead of white.
    colour: probability of a change of hue, saturation, contrast and brightness.
    hue: up to so many degrees either way.
    saturation: range of factors.
    contrast: range of factors.
    brightness: up to so many of 255 levels either way.
    grey: probability of greyscale.
    outline: probability of dark lines along edges of colour and alpha, as in ink drawings.
    flatten: probability of fills of few tones without shading.
    blur: probability of a 3x3 Gaussian.
  """

  zoom: tuple[float, float] = (0.75, 1.15)
  stretch: float = 0.12
  rotate: float = 12.0
  shear: float = 0.08
  shift: float = 0.1
  flip: float = 0.5
  background: float = 0.2
  colour: float = 0.6
  hue: float = 20.0
  saturation: tuple[float, float] = (0.6, 1.5)
  contrast: tuple[float, float] = (0.8, 1.2)
  brightness: float = 20.0
  grey: float = 0.05
  outline: float = 0.0
  flatten: float = 0.0
  blur: float = 0.1

  @classmethod
  def none(cls) -> "Augment":
    """The view without chance: the whole image, on white."""
    return cls((1.0, 1.0), 0, 0, 0, 0, 0, 0, 0, 0, (1.0, 1.0), (1.0, 1.0), 0, 0, 0, 0, 0)

  def __call__(
    self,
    images: Sequence[np.ndarray],
    flips: Sequence[bool],
    size: int,
    draws: Float[np.ndarray, "images draws"],
  ) -> UInt8[np.ndarray, "images {size} {size} 3"]:
    """Renders one view of each image.

    Args:
      images: uint8 `[height, width, 3]`, or `[height, width, 4]` with colour multiplied by alpha.
      flips: whether each may be mirrored.
      size: side of the views in pixels.
      draws: uniform in [0, 1), `DRAWS` an image; a view depends on its own row only.
    """
    views = np.empty((len(images), size, size, 3), np.uint8)
    warps = self._warps(images, flips, size, draws)
    colours = self._colours(draws)
    for k, image in enumerate(images):
      opaque = image.shape[2] == 3
      scale = warps[k, 0, 0] ** 2 + warps[k, 1, 0] ** 2
      view = _warp(image, warps[k], size, scale**0.5)
      if draws[k, 12] < self.flatten:
        view = _flatten(view, levels=3 + int(3 * draws[k, 13]))
      if draws[k, 14] < self.outline:
        view = _outline(view, (2, 3, 3, 5)[int(4 * draws[k, 15])], 40 + 70 * draws[k, 16], 0.6 + 0.4 * draws[k, 17])
      matrix = np.ascontiguousarray(colours[k][:3, [0, 1, 2, 4]]) if opaque else colours[k]
      if opaque:
        matrix[:, 3] += colours[k][:3, 3] * 255
      # Float32 takes OpenCV's vector path (9 us for 64x64x4), which 8-bit four-channel transforms lack (55 us).
      toned = cv2.add(cv2.transform(view.astype(np.float32), matrix), 0.0, dtype=cv2.CV_8U)
      if draws[k, 24] < self.blur:
        toned = cv2.GaussianBlur(toned, (3, 3), 0)
      views[k] = toned[..., :3]
    return views

  def _warps(self, images: Sequence[np.ndarray], flips: Sequence[bool], size: int, u: np.ndarray) -> np.ndarray:
    """The matrices [images, 2, 3] from pixel to view coordinates, both with the origin in a pixel's centre."""
    shapes = np.array([image.shape for image in images], np.float64).reshape(-1, 3)
    height, width = shapes[:, 0], shapes[:, 1]
    # Drawings are shown whole, photographs fill the frame.
    side = np.where(shapes[:, 2] == 4, np.maximum(height, width), np.minimum(height, width))
    zoom = _between(self.zoom, u[:, 0]) * size / side
    stretch = np.exp(self.stretch * (u[:, 1] - 0.5))
    angle = np.deg2rad(self.rotate) * (2 * u[:, 2] - 1)
    shear = self.shear * (2 * u[:, 3] - 1)
    mirror = np.where((u[:, 6] < self.flip) & np.asarray(flips, bool), -1.0, 1.0)
    cos, sin = np.cos(angle), np.sin(angle)
    across, down = zoom * stretch, zoom / stretch
    warps = np.empty((len(images), 2, 3))
    warps[:, 0, 0], warps[:, 0, 1] = cos * across * mirror, cos * shear * zoom - sin * down
    warps[:, 1, 0], warps[:, 1, 1] = sin * across * mirror, sin * shear * zoom + cos * down
    for axis, extent in ((0, across * width), (1, down * height)):
      reach = np.maximum(extent - size, 0) / 2 + self.shift * size
      centre = (size - 1) / 2 + reach * (2 * u[:, 4 + axis] - 1)
      warps[:, axis, 2] = centre - warps[:, axis, 0] * (width - 1) / 2 - warps[:, axis, 1] * (height - 1) / 2
    return warps

  def _colours(self, u: np.ndarray) -> np.ndarray:
    """Matrices [images, 4, 5] from premultiplied (r, g, b, alpha, 1) to (r, g, b, anything) on the background."""
    n = len(u)
    changed = (u[:, 7] < self.colour)[:, None, None]
    angle = (np.deg2rad(self.hue) * (2 * u[:, 8] - 1))[:, None, None]
    # Rodrigues' rotation about the grey axis, then a blend with the luma.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    rotation = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * cross
    saturation = np.where(changed[:, 0, 0], _between(self.saturation, u[:, 9]), 1.0)
    saturation = np.where(u[:, 23] < self.grey, 0.0, saturation)
    contrast = np.where(changed, _between(self.contrast, u[:, 10])[:, None, None], 1.0)
    brightness = np.where(changed[:, 0, 0], self.brightness * (2 * u[:, 11] - 1), 0.0)
    rotation = np.where(changed, rotation, np.eye(3))
    luma = np.einsum("c,ncd->nd", _LUMA, rotation)[:, None, :]
    tone = contrast * (saturation[:, None, None] * rotation + (1 - saturation)[:, None, None] * luma)
    offset = (1 - contrast[:, 0, 0]) * 127.5 + brightness
    behind = np.where((u[:, 18] < self.background)[:, None], 255 * u[:, 19:22], 255.0)
    matrices = np.zeros((n, 4, 5), np.float32)
    matrices[:, :3, :3] = tone
    matrices[:, :3, 3] = (offset[:, None] - behind) / 255
    matrices[:, :3, 4] = behind
    return matrices


def _between(bounds: tuple[float, float], u: np.ndarray) -> np.ndarray:
  return bounds[0] + (bounds[1] - bounds[0]) * u


def _warp(image: np.ndarray, warp: np.ndarray, size: int, scale: float) -> np.ndarray:
  if scale < _SHRINK_BELOW:
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
    ratio = np.array([width / small.shape[1], height / small.shape[0]])
    warp = np.column_stack([warp[:, :2] * ratio, warp[:, 2] + warp[:, :2] @ ((ratio - 1) / 2)])
    image = small
  border = cv2.BORDER_REFLECT_101 if image.shape[2] == 3 else cv2.BORDER_CONSTANT
  return cv2.warpAffine(image, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)


@functools.cache
def _disc(size: int) -> np.ndarray:
  return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def _outline(view: np.ndarray, width: int, threshold: float, strength: float) -> np.ndarray:
  """Draws dark lines, `width` pixels wide, where colour or alpha changes by more than `threshold` levels."""
  edges = cv2.morphologyEx(view, cv2.MORPH_GRADIENT, _disc(width)).max(axis=2)
  line = np.clip((edges - threshold) / 40, 0, 1) * strength
  inked = view.astype(np.float32)
  inked[..., :3] *= (1 - line)[..., None]
  if view.shape[2] == 4:
    inked[..., 3] = np.maximum(inked[..., 3], 255 * line)
  return inked.astype(np.uint8)


def _flatten(view: np.ndarray, levels: int) -> np.ndarray:
  """Removes shading: a median filter, then `levels` tones a channel."""
  step = 255 / (levels - 1)
  tones = (np.round(np.arange(256) / step) * step).astype(np.uint8)
  flat = cv2.medianBlur(view, 3)
  flat[..., :3] = tones[flat[..., :3]]
  if view.shape[2] == 4:
    flat[..., :3] = np.minimum(flat[..., :3], flat[..., 3:])  # Premultiplied colour never exceeds alpha.
  return flat
