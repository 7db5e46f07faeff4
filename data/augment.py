"""Random views of images: one affine warp, optional changes of style, one colour matrix. OpenCV does the pixels."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from contrastive_jax.errors import UserError

# Rows of a batch are spread over threads; OpenCV's own would only get into their way.
cv2.setNumThreads(0)

# (height, width) in pixels.
Size = tuple[int, int]

# Uniform draws that a view uses, a multiple of 4.
DRAWS = 28
_LUMA = np.array([0.299, 0.587, 0.114])
# OpenCV addresses the pixels that it warps with 16 bits.
_LONGEST_WARPED = 32_000
# Below this scale bilinear sampling skips pixels; the image is first shrunk by area averaging.
_SHRINK_BELOW = 0.6


@dataclasses.dataclass(frozen=True)
class Augment:
  """The changes that a random view may make; by default none. Ranges are uniform, probabilities are those of a view.

  Attributes:
    zoom: size of the image relative to the frame: (1, 1) shows it whole (a drawing, which has transparency) or filling
      the frame (a photograph); what a zoom above 1 leaves out is uniform, so (1, 1 / sqrt(a)) crops to the share `a` of
      the area.
    stretch: largest |log(width / height)| that is added.
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
    unfill: probability that one colour of the image becomes white.
    blur: probability of a 3x3 Gaussian.
  """

  zoom: tuple[float, float] = (1.0, 1.0)
  stretch: float = 0.0
  rotate: float = 0.0
  shear: float = 0.0
  shift: float = 0.0
  flip: float = 0.0
  background: float = 0.0
  colour: float = 0.0
  hue: float = 20.0
  saturation: tuple[float, float] = (0.6, 1.5)
  contrast: tuple[float, float] = (0.8, 1.2)
  brightness: float = 13.0
  grey: float = 0.0
  outline: float = 0.0
  flatten: float = 0.0
  unfill: float = 0.0
  blur: float = 0.0

  def __post_init__(self):
    for field in ("flip", "background", "colour", "grey", "outline", "flatten", "unfill", "blur"):
      if not 0 <= getattr(self, field) <= 1:
        raise UserError(f"{field}={getattr(self, field)} must be a probability between 0 and 1")
    for field in ("zoom", "saturation", "contrast"):
      low, high = getattr(self, field)
      object.__setattr__(self, field, (low, high))
      if not 0 <= low <= high or (field == "zoom" and low == 0):
        raise UserError(f"{field}={(low, high)} must be a range of positive factors, lowest first")

  def __call__(
    self,
    images: Sequence[np.ndarray],
    flips: Sequence[bool],
    size: int | Sequence[Size],
    draws: Float[np.ndarray, "images draws"],
  ) -> UInt8[np.ndarray, "images {size} {size} 3"] | list[np.ndarray]:
    """Renders one view of each image or clip.

    Args:
      images: uint8 `[height, width, 3]`, or `[height, width, 4]` with colour multiplied by alpha; with one axis more in
        front, the frames of a clip, which are all treated alike.
      flips: whether each may be mirrored.
      size: (height, width) of each view in pixels; or the side of all, which are then squares.
      draws: uniform in [0, 1), `DRAWS` an image; a view depends on its own row only.

    Returns:
      uint8 views `[height, width, 3]`, of clips `[frames, height, width, 3]`; stacked where all are squares.
    """
    sizes = [(size, size)] * len(images) if isinstance(size, int) else list(size)
    warps = self._warps(images, flips, np.array(sizes, np.float64).reshape(-1, 2), draws)
    colours = self._colours(draws)
    views = []
    for image, warp, colour, shape, u in zip(images, warps, colours, sizes, draws, strict=True):
      frames = [_view(frame, warp, shape) for frame in (image if image.ndim == 4 else [image])]
      frames = [self._toned(frame, colour, u) for frame in self._restyled(frames, u)]
      views.append(np.stack(frames) if image.ndim == 4 else frames[0])
    if not isinstance(size, int):
      return views
    return np.stack(views) if views else np.empty((0, size, size, 3), np.uint8)

  def places(
    self, images: Sequence[np.ndarray], flips: Sequence[bool], size: int, draws: Float[np.ndarray, "images draws"]
  ) -> Float32[np.ndarray, "images 2 3"]:
    """Returns the affine maps from the (x, y) of a pixel in a square view to those in its image.

    Args:
      images: the images or clips.
      flips: whether each may be mirrored.
      size: side of the views in pixels.
      draws: the uniform draws of the views, as `__call__` takes them.
    """
    warps = self._warps(images, flips, np.full((len(images), 2), size, np.float64), draws)
    inverse = np.linalg.inv(warps[:, :, :2])
    return np.concatenate([inverse, -inverse @ warps[:, :, 2:]], axis=2).astype(np.float32)

  def _restyled(self, frames: list[np.ndarray], u: np.ndarray) -> list[np.ndarray]:
    """Changes the drawing style, in an order in which outlines survive the loss of the fills they surround."""
    outlined = u[14] < self.outline
    if outlined:
      edges = [_edges(frame, width=2 + int(3 * u[15])) for frame in frames]
    if u[12] < self.flatten:
      frames = [_flatten(frame, levels=3 + int(3 * u[13])) for frame in frames]
    if u[22] < self.unfill:
      # The first frame decides, so that colours do not flicker.
      colour = _colour_at(frames[0], u[25], u[26])
      frames = frames if colour is None else [_unfill(frame, colour) for frame in frames]
    if outlined:
      threshold, strength = 30 + 80 * u[16], 0.6 + 0.4 * u[17]
      frames = [_outline(frame, edge, threshold, strength) for frame, edge in zip(frames, edges, strict=True)]
    return frames

  def _toned(self, view: np.ndarray, matrix: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Changes the colours, on the background."""
    if view.shape[2] == 3 and u[7] >= self.colour and u[23] >= self.grey:
      toned = view  # No draw changes them.
    else:
      if view.shape[2] == 3:
        matrix = np.column_stack([matrix[:3, :3], 255 * matrix[:3, 3] + matrix[:3, 4]])
      # Float32 takes OpenCV's vector path (9 us for 64x64x4), which 8-bit four-channel transforms lack (55 us).
      toned = cv2.add(cv2.transform(view.astype(np.float32), matrix), 0.0, dtype=cv2.CV_8U)
    if u[24] < self.blur:
      toned = cv2.GaussianBlur(toned, (3, 3), 0)
    return toned[..., :3]

  def _warps(self, images: Sequence[np.ndarray], flips: Sequence[bool], sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Makes the matrices [images, 2, 3] from pixel to view coordinates, both with the origin in a pixel's centre."""
    shapes = np.array([image.shape[-3:] for image in images], np.float64).reshape(-1, 3)
    height, width = shapes[:, 0], shapes[:, 1]
    zoom = _between(self.zoom, u[:, 0])
    down, across = zoom * sizes[:, 0] / height, zoom * sizes[:, 1] / width
    # Drawings are shown whole, photographs fill the frame.
    zoom = np.where(shapes[:, 2] == 4, np.minimum(down, across), np.maximum(down, across))
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
      frame = sizes[:, 1 - axis]
      reach = np.maximum(extent - frame, 0) / 2 + self.shift * frame
      centre = (frame - 1) / 2 + reach * (2 * u[:, 4 + axis] - 1)
      warps[:, axis, 2] = centre - warps[:, axis, 0] * (width - 1) / 2 - warps[:, axis, 1] * (height - 1) / 2
    return warps

  def _colours(self, u: np.ndarray) -> np.ndarray:
    """Makes the matrices [images, 4, 5] from premultiplied (r, g, b, alpha, 1) to (r, g, b, anything)."""
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


def _view(image: np.ndarray, warp: np.ndarray, size: Size) -> np.ndarray:
  """Applies a warp. An upright view of a photograph is a crop of whole pixels, resized, three times as fast."""
  if image.shape[2] == 3 and not warp[0, 1] and not warp[1, 0]:
    view = _resized_crop(image, warp, size)
    if view is not None:
      return view
  return _warped(image, warp, size)


def _resized_crop(image: np.ndarray, warp: np.ndarray, size: Size) -> np.ndarray | None:
  """Returns what an upright warp shows, of the pixels nearest to its borders; None where it shows what lies outside."""
  slices, mirrored = [], []
  for axis, (length, shown) in enumerate(zip(image.shape[1::-1], size[::-1], strict=True)):
    scale, offset = warp[axis, axis], warp[axis, 2]
    # Borders and not centres of pixels: half a pixel lies between them.
    ends = sorted((edge - offset) / scale + 0.5 for edge in (-0.5, shown - 0.5))
    if ends[0] < -0.5 or ends[1] > length + 0.5:
      return None
    start = min(max(round(ends[0]), 0), length - 1)
    slices.append(slice(start, min(max(round(ends[1]), start + 1), length)))
    mirrored.append(scale < 0)
  crop = image[slices[1], slices[0]]
  shrinks = math.sqrt(abs(warp[0, 0] * warp[1, 1])) < _SHRINK_BELOW
  view = cv2.resize(crop, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
  return cv2.flip(view, 1) if mirrored[0] else view


def _warped(image: np.ndarray, warp: np.ndarray, size: Size) -> np.ndarray:
  """Samples a warp bilinearly; strong reductions average over pixels first."""
  scale = math.sqrt(abs(warp[0, 0] * warp[1, 1] - warp[0, 1] * warp[1, 0]))
  if scale < _SHRINK_BELOW:
    height, width = image.shape[:2]
    smaller = max(1, round(width * scale)), max(1, round(height * scale))
    ratio = np.array([width / smaller[0], height / smaller[1]])
    image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    warp = np.column_stack([warp[:, :2] * ratio, warp[:, 2] + warp[:, :2] @ ((ratio - 1) / 2)])
  if max(image.shape[:2]) > _LONGEST_WARPED:
    image, warp = _shortened(image, warp)
  border = cv2.BORDER_REFLECT_101 if image.shape[2] == 3 else cv2.BORDER_CONSTANT
  return cv2.warpAffine(image, warp, size[::-1], flags=cv2.INTER_LINEAR, borderMode=border)


def _shortened(image: np.ndarray, warp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Shortens the longer side of a picture to what OpenCV can warp, and returns the warp that then shows the same."""
  height, width = image.shape[:2]
  smaller = min(width, _LONGEST_WARPED), min(height, _LONGEST_WARPED)
  ratio = np.array([width / smaller[0], height / smaller[1]])
  shrunk = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
  return shrunk, np.column_stack([warp[:, :2] * ratio, warp[:, 2] + warp[:, :2] @ ((ratio - 1) / 2)])


@functools.cache
def _disc(size: int) -> np.ndarray:
  return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))


def _edges(view: np.ndarray, width: int) -> np.ndarray:
  """Returns the strongest edge of the channels at each pixel, in levels; edges are `width` pixels wide."""
  return functools.reduce(cv2.max, cv2.split(cv2.morphologyEx(view, cv2.MORPH_GRADIENT, _disc(width))))


def _outline(view: np.ndarray, edges: np.ndarray, threshold: float, strength: float) -> np.ndarray:
  """Darkens the view where edges exceed `threshold` levels, at most by the share `strength`."""
  ramp = np.clip((np.arange(256) - threshold) / 40, 0, 1) * strength
  keep = cv2.LUT(edges, (255 * (1 - ramp)).astype(np.uint8))
  channels = cv2.split(view)
  inked = [cv2.multiply(channel, keep, scale=1 / 255) for channel in channels[:3]]
  return cv2.merge([*inked, *(cv2.max(alpha, cv2.bitwise_not(keep)) for alpha in channels[3:])])


def _flatten(view: np.ndarray, levels: int) -> np.ndarray:
  """Removes shading: a median filter, then `levels` tones a channel."""
  step = 255 / (levels - 1)
  tones = (np.round(np.arange(256) / step) * step).astype(np.uint8)
  channels = cv2.split(cv2.medianBlur(view, 3))
  flat = [cv2.LUT(channel, tones) for channel in channels[:3]]
  # Premultiplied colour never exceeds alpha.
  return cv2.merge([*(cv2.min(c, channels[3]) for c in flat), channels[3]] if len(channels) == 4 else flat)


def _colour_at(view: np.ndarray, down: float, across: float) -> np.ndarray | None:
  """Returns the colour of one pixel of the middle, or None where the view is transparent there."""
  height, width = view.shape[:2]
  colour = view[int(height * (0.2 + 0.6 * down)), int(width * (0.2 + 0.6 * across))].astype(int)
  return None if len(colour) == 4 and colour[3] <= 200 else colour


def _unfill(view: np.ndarray, colour: np.ndarray) -> np.ndarray:
  """Makes a colour white wherever it occurs."""
  same = cv2.inRange(view, np.maximum(colour - 32, 0), np.minimum(colour + 32, 255))
  return cv2.max(view, cv2.merge([same] * view.shape[2]))


# Drawings on transparent ground: what artists do differently (shading, outlines, size, hue) is imitated.
DRAWINGS = Augment(
  zoom=(0.9, 1.05), stretch=0.2, rotate=5.0, shear=0.04, shift=0.02, flip=0.0, background=0.15, colour=0.6, grey=0.05,
  outline=0.5, flatten=0.3, unfill=0.15, blur=0.1,
)  # fmt: skip
# Photographs: random resized crops of at least half of the area, mirrored half of the time.
PHOTOGRAPHS = Augment(zoom=(1.0, 1.41), stretch=0.25, flip=0.5)
# Strong views of a pair, beside the one that the model reads: crops of a twelfth of the area on, and other colours.
STRONG = Augment(
  zoom=(1.0, 3.5), stretch=0.288, flip=0.5, colour=0.8, hue=36.0, saturation=(0.6, 1.4), contrast=(0.6, 1.4),
  brightness=51.0, grey=0.2, blur=0.5,
)  # fmt: skip
# What a config may name.
PRESETS = {"none": Augment(), "drawings": DRAWINGS, "photographs": PHOTOGRAPHS}
