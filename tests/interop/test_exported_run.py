"""A run, exported by convert.py: `transformers` and open_clip give every picture the name that we give it."""

import os

import numpy as np
import pytest
from PIL import Image

from contrastive_jax import load
from contrastive_jax.evaluation.zero_shot import classifier
from contrastive_jax.preprocess.images import decode
from data import tasks
from tests import runs

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import reference_models as peers  # noqa: E402


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A short run in CLIP's architecture, in both formats."""
  folder = tmp_path_factory.mktemp("exported")
  short = ("total_steps=240", "batch_size=64", "schedule.warmup_steps=10", "evals=()", "final_evals=()")
  small = ("model.image.transformer.depth=2",)
  overrides = [f"--config.{field}" for field in (*short, *small)]
  runs.run("train.py", "--config=configs/emoji_clip.py", f"--workdir={folder / 'run'}", *overrides)
  for kind in ("huggingface", "open_clip"):
    said = runs.run("convert.py", f"--from={folder / 'run'}", f"--to={kind}:{folder / kind}")
    assert ("reads HTML entities in captions otherwise" in said) == (kind == "open_clip")
  return folder


@pytest.fixture(scope="module")
def answers(workdir):
  """Pictures, the right names, prompts of all names, and our embeddings of both."""
  scored = tasks.load("emoji_openmoji")
  pictures = [Image.fromarray(decode(scored.images[row])) for row in range(0, len(scored.images), 4)]
  prompts = [scored.templates[0].replace("{}", name) for name in scored.classes]
  model = load(workdir / "run")
  return pictures, scored.labels[::4], prompts, model.encode_image(pictures), classifier(model, prompts)


def assert_same_names(answers, image: np.ndarray, text: np.ndarray) -> None:
  _, labels, _, our_image, our_text = answers
  np.testing.assert_allclose(image, our_image, rtol=0, atol=1e-4)
  np.testing.assert_allclose(text, our_text, rtol=0, atol=1e-4)
  ours = np.argmax(our_image @ our_text.T, axis=1)
  scores = image @ text.T
  # Names that score alike to rounding may change places, and after so few steps one in hundreds does.
  np.testing.assert_array_less(scores.max(axis=1) - scores[np.arange(len(ours)), ours], 1e-5)
  # It has learned something: a model that gives all pictures one name would agree as well.
  assert np.mean(ours == labels) > 5 / len(answers[2])
  assert len(set(ours.tolist())) > 20


def test_transformers_gives_the_same_names(workdir, answers):
  import transformers

  pictures, _, prompts, _, _ = answers
  model = peers.opened("huggingface", workdir / "huggingface")
  processor = transformers.CLIPImageProcessorPil.from_pretrained(workdir / "huggingface")
  tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "huggingface")
  given = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
  with peers.torch.no_grad():
    out = model(
      pixel_values=processor(pictures, return_tensors="pt")["pixel_values"],
      input_ids=given["input_ids"],
      attention_mask=given["attention_mask"],
    )
  assert_same_names(answers, peers.unit(out.image_embeds), peers.unit(out.text_embeds))


def test_open_clip_gives_the_same_names(workdir, answers):
  open_clip = pytest.importorskip("open_clip")
  pictures, _, prompts, _, _ = answers
  name = f"local-dir:{workdir / 'open_clip'}"
  model, _, transform = open_clip.create_model_and_transforms(name)
  model.eval()
  tokens = open_clip.get_tokenizer(name)(prompts)
  with peers.torch.no_grad():
    image = model.encode_image(peers.torch.stack([transform(picture) for picture in pictures]), normalize=True)
    text = model.encode_text(tokens, normalize=True)
  assert_same_names(answers, image.numpy(), text.numpy())
