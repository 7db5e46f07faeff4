"""The reader of `benchmarks.data` that is tf.data, in a Python that has TensorFlow and tokenizers.

`benchmarks.data` starts it: `PYTHON -m benchmarks.data_tf FOLDER`.
TFRecords are read in order, JPEGs cropped while they are decoded, resized, mirrored and batched; captions are tokenised
a batch at a time.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tokenizers

from benchmarks import photographs, turns

_SIDE = photographs.SIDE


def view(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns the view and the caption of a record; the crop has the law of `photographs.crop`."""
  fields = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "caption")}
  example = tf.io.parse_single_example(record, fields)
  shape = tf.image.extract_jpeg_shape(example["image"])
  height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
  u = tf.random.uniform([5])
  low, high = photographs.ZOOM
  scale = _SIDE / tf.minimum(height, width) * (low + (high - low) * u[0])
  stretch = tf.exp(photographs.STRETCH * (u[1] - 0.5))
  tall, wide = tf.minimum(height, _SIDE / scale * stretch), tf.minimum(width, _SIDE / scale / stretch)
  box = tf.cast(tf.stack([(height - tall) * u[2], (width - wide) * u[3], tall, wide]), tf.int32)
  image = tf.image.decode_and_crop_jpeg(example["image"], box, channels=3)
  image = tf.cast(tf.image.resize(image, (_SIDE, _SIDE)), tf.uint8)
  return tf.cond(u[4] < photographs.FLIP, lambda: tf.reverse(image, [1]), lambda: image), example["caption"]


def write(folder: Path, file: str) -> None:
  """Writes the photographs as TFRecords."""
  with tf.io.TFRecordWriter(file) as writer:
    for data, caption in photographs.read(folder / "photographs"):
      values = {"image": data, "caption": caption.encode()}
      feature = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for name, value in values.items()}
      writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def main(folder: Path) -> None:
  file = str(folder / "photographs.tfrecord")
  write(folder, file)
  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)
  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  # Nothing is read ahead while others take their turns.
  options.autotune.enabled = False
  options.experimental_optimization.inject_prefetch = False
  dataset = tf.data.TFRecordDataset(file).repeat().map(view).batch(photographs.BATCH, drop_remainder=True)
  batches = iter(dataset.with_options(options))
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / photographs.TOKENIZER / "tokenizer.json"))
  tokenizer.enable_truncation(photographs.TEXT_LENGTH)
  tokenizer.enable_padding(length=photographs.TEXT_LENGTH)

  def work(count: int) -> int:
    done = 0
    for _ in range(count):
      images, captions = (field.numpy() for field in next(batches))
      encoded = tokenizer.encode_batch([caption.decode() for caption in captions])
      done += len(images)
      np.array([each.ids for each in encoded], np.int32)
    return done

  turns.serve(work)


if __name__ == "__main__":
  main(Path(sys.argv[1]))
