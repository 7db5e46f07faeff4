"""The reader of `benchmarks.data` that is mosaicml-streaming, in a Python that has it and what `data_readers` imports.

`benchmarks.data` starts it: `PYTHON -m benchmarks.data_streaming FOLDER`. Samples come in the order of the shards.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from benchmarks import data_readers, photographs, turns
from benchmarks.reference_models import torch  # Before what imports torchvision, see there.


def main(folder: Path) -> None:
  import streaming

  shards = str(folder / "mds")
  with streaming.MDSWriter(out=shards, columns={"image": "bytes", "caption": "str"}) as writer:
    for data, caption in photographs.read(folder / "photographs"):
      writer.write({"image": data, "caption": caption})
  rng = np.random.default_rng(0)
  tokenizer = data_readers.tokenizers.load(folder / photographs.TOKENIZER)

  class Views(streaming.StreamingDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
      sample = super().__getitem__(index)
      view = data_readers.plain_view(sample["image"], rng.random(5))
      return torch.from_numpy(np.ascontiguousarray(view)), sample["caption"]

  def collated(samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, np.ndarray]:
    images, texts = zip(*samples, strict=True)
    return torch.stack(images), tokenizer(texts, photographs.TEXT_LENGTH)[0]

  torch.set_num_threads(1)
  views = Views(local=shards, batch_size=photographs.BATCH, shuffle=False)
  loader = torch.utils.data.DataLoader(views, photographs.BATCH, num_workers=0, collate_fn=collated)

  def epochs():
    while True:
      yield from loader

  batches = epochs()
  turns.serve(lambda count: sum(len(next(batches)[0]) for _ in range(count)))


if __name__ == "__main__":
  cv2.setNumThreads(0)
  main(Path(sys.argv[1]))
