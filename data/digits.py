"""scikit-learn's handwritten digits as a TFDS set: a small real one that needs no download.

python -m data.digits --data_dir=DIR

prepares it; `tfds/sklearn_digits` then names it in evaluations.
"""

import importlib.util
import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError

# The first 80%; neighbours in the set are by the same writer, so that the split is by order.
_TRAIN = 1437


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
  """1,797 handwritten digits of 8x8 pixels; the split is by order, 1,437 to train on and 360 to test.

  The images are handed over as PNG files, so that preparing, like reading, works without TensorFlow.
  """

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded, so there are no checksums beside the code; TFDS would look for them through a package
  # (importlib_resources) that it does not install.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Handwritten digits of UCI's Optical Recognition of Handwritten Digits, as in scikit-learn.",
      homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
      ),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    return {"train": self._examples(0, _TRAIN), "test": self._examples(_TRAIN, None)}

  def _generate_examples(self) -> Iterator:
    return self._examples(0, None)

  def _examples(self, start: int, stop: int | None) -> Iterator:
    from sklearn.datasets import load_digits  # Needed to prepare the set, not to read it.

    digits = load_digits()
    for number in range(len(digits.target))[start:stop]:
      pixels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, "PNG")
      file.seek(0)
      yield number, {"image": file, "label": int(digits.target[number])}


def prepare(data_dir: str) -> None:
  """Writes the set below `data_dir`, TFDS's directory of sets.

  Raises:
    UserError: if scikit-learn is missing.
  """
  if importlib.util.find_spec("sklearn") is None:
    raise UserError("preparing the digits needs scikit-learn, install it with: pip install scikit-learn")
  SklearnDigits(data_dir=data_dir, file_format="array_record").download_and_prepare()


def main() -> None:
  """Prepares the set in the directory that the command line names."""
  if not flags.FLAGS.data_dir:
    raise UserError("--data_dir is missing: name a directory for TFDS sets, such as --data_dir=runs/tfds")
  prepare(str(paths.folder_to_write("--data_dir", flags.FLAGS.data_dir)))


if __name__ == "__main__":
  flags.DEFINE_string("data_dir", None, "Directory of TFDS sets, in which the set is prepared.")
  cli.run(main)
