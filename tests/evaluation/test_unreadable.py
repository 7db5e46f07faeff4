"""What an evaluation puts in the place of images is what a model sees of the images themselves."""

import io

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.evaluation.unreadable import Tolerant
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.views import Views

VIEWS = Views(8, 1, Resolution.fixed(16), Resolution.fixed(16))


def in_file(image):
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()


@pytest.mark.parametrize("form", [Image.fromarray, np.asarray, lambda levels: in_file(Image.fromarray(levels))])
@pytest.mark.parametrize("channels", [3, 4])
def test_transparent_pictures_are_scored_as_they_are_embedded(form, channels, rng):
  # Half transparent everywhere: colour that is multiplied by alpha twice is darker.
  image = form(rng.integers(0, 256, (24, 20, channels), np.uint8))
  tolerant = Tolerant([image])
  np.testing.assert_array_equal(VIEWS(tolerant[0])[0], VIEWS(image)[0])
  assert not tolerant.reasons
