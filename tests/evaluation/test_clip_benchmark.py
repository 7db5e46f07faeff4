"""The metrics of CLIP_benchmark beside ours: its own evaluation loops run on the same embeddings, in float64."""

import contextlib

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from contrastive_jax.evaluation import probes
from contrastive_jax.evaluation.choices import evaluate_choices
from contrastive_jax.evaluation.multilabel import evaluate_multilabel
from contrastive_jax.evaluation.retrieval import evaluate_retrieval
from contrastive_jax.evaluation.tasks import ChoiceSet, LabelledSet, MultiLabelSet, PairSet
from contrastive_jax.evaluation.zero_shot import evaluate_zero_shot

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
image_caption_selection = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
their_probe = pytest.importorskip("clip_benchmark.metrics.linear_probe")
zeroshot_classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
zeroshot_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

EXACT = {"rel": 0, "abs": 1e-12}


@pytest.fixture(autouse=True)
def double(monkeypatch):
  """Float64 on both sides: what CLIP_benchmark rounds by `.float()` it then rounds to double."""
  monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
  # Its `float(array of one element)` is an error since NumPy 2.4.
  monkeypatch.setattr(zeroshot_classification, "float", lambda value: np.asarray(value).item(), raising=False)
  before = torch.get_default_dtype()
  torch.set_default_dtype(torch.float64)
  with jax.enable_x64(True):
    yield
  torch.set_default_dtype(before)


class Embeddings:
  """An encoder for both: images are pictures of their number, or tensors of it; texts are their number in words."""

  logit_scale = 100.0

  def __init__(self, image, text):
    self.image, self.text = image, text

  def encode_image(self, images):
    if isinstance(images, torch.Tensor):
      return torch.from_numpy(self.image[images.reshape(-1).long().numpy()])
    return np.stack([self.image[int(images[k][0, 0, 0]) * 256 + int(images[k][0, 0, 1])] for k in range(len(images))])

  def encode_text(self, texts):
    if isinstance(texts, torch.Tensor):
      return torch.from_numpy(self.text[texts.numpy()])
    return np.stack([self.text[int(text)] for text in texts])


def tokenizer(texts):
  return torch.tensor([int(text) for text in texts])


def pictures(count):
  made = np.zeros((count, 2, 2, 3), np.uint8)
  made[:, 0, 0, :2] = np.stack(np.divmod(np.arange(count), 256), axis=1)
  return list(made)


class Loader:
  """Batches of (image numbers, targets), as CLIP_benchmark's collation gives them."""

  def __init__(self, targets, classes=(), size=64):
    self.targets, self.size, self.dataset = targets, size, self
    self.classes = classes

  def __iter__(self):
    for start in range(0, len(self.targets), self.size):
      numbers = torch.arange(start, min(start + self.size, len(self.targets)))
      yield numbers, self.targets[start : start + self.size]


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_classes():
  """Embeddings of 500 images and 3 prompts for each of 12 classes, and the labels."""
  rng = np.random.default_rng(0)
  text = unit(rng.normal(size=(36, 16)))
  labels = rng.choice(12, 500, p=np.arange(1, 13) / 78)
  return unit(text[3 * labels] + 1.3 * rng.normal(size=(500, 16)) / 4), text, labels, 12


def real_classes():
  """Handwritten digits: pixels, and as three prompts a class the mean of some writers' digits."""
  data = load_digits()
  prompts = [data.data[k::3][data.target[k::3] == digit][:40].mean(axis=0) for digit in range(10) for k in range(3)]
  return unit(data.data[900:]), unit(np.stack(prompts)), data.target[900:], 10


def prompts_of(classes):
  """Class names and templates that spell the numbers of three prompts each: "1" and "{}0" is prompt 10."""
  return [f"{k}" for k in range(classes)], ["{}0", "{}1", "{}2"]


def tenfold(text, classes):
  """Prompt `j` of class `k` in row `10 k + j`."""
  table = np.full((10 * classes, text.shape[1]), np.nan)
  for j in range(3):
    table[j::10] = text[j::3]
  return table


@pytest.mark.parametrize("problem", [random_classes, real_classes])
def test_zero_shot_classification(problem):
  image, text, labels, classes = problem()
  model = Embeddings(image, tenfold(text, classes))
  names, templates = prompts_of(classes)
  loader = Loader(torch.from_numpy(labels), names)
  theirs = zeroshot_classification.evaluate(
    model, loader, tokenizer, names, [t.replace("{}", "{c}") for t in templates], "cpu", amp=False
  )
  ours = dict(evaluate_zero_shot(model, LabelledSet("toy", pictures(len(image)), labels, names, templates)).metrics)
  del ours["expected_calibration_error"]  # Which it does not measure.
  assert 0.3 < theirs["acc1"] < 0.97
  assert ours == pytest.approx(theirs, **EXACT)


@pytest.mark.parametrize("problem", [random_classes, real_classes])
def test_multi_label_classification(problem):
  image, text, labels, classes = problem()
  model = Embeddings(image, tenfold(text, classes))
  names, templates = prompts_of(classes)
  # An image shows its class, its double, and, one in three, another; the last class is shown by none.
  shown = np.zeros((len(image), classes), bool)
  rows = np.arange(len(image))
  for label in (labels, 2 * labels % classes, np.where(rows % 3, labels, (labels + 5) % classes)):
    shown[rows, label] = True
  shown[:, -1] = False
  theirs = zeroshot_classification.evaluate(
    model,
    Loader(torch.from_numpy(shown.astype(np.float64)), names),
    tokenizer,
    names,
    [t.replace("{}", "{c}") for t in templates],
    "cpu",
    amp=False,
  )
  ours = evaluate_multilabel(model, MultiLabelSet("toy", pictures(len(image)), shown, names, templates)).metrics
  assert 0.2 < theirs["mean_average_precision"] < 0.95
  assert ours == pytest.approx(theirs, **EXACT)


def random_pairs():
  """200 images, 1 to 7 captions each."""
  rng = np.random.default_rng(0)
  owner = np.repeat(np.arange(200), rng.integers(1, 8, 200))
  image = unit(rng.normal(size=(200, 12)))
  return image, unit(image[owner] + 1.5 * rng.normal(size=(len(owner), 12)) / np.sqrt(12)), owner


def real_pairs():
  """300 handwritten digits; as captions, each of them moved by a pixel: right, left, down, up, and right twice."""
  digits = load_digits().images[:300]
  moves = [(1, 2), (-1, 2), (1, 1), (-1, 1), (2, 2)]
  moved = np.stack([np.roll(digits, by, axis=axis) for by, axis in moves], axis=1).reshape(1500, 64)
  return unit(digits.reshape(300, 64)), unit(moved), np.repeat(np.arange(300), 5)


@pytest.mark.parametrize("problem", [random_pairs, real_pairs])
def test_retrieval_with_several_captions_an_image(problem):
  image, text, owner = problem()
  model = Embeddings(image, text)
  captions = [[str(k) for k in np.flatnonzero(owner == row)] for row in range(len(image))]
  theirs = zeroshot_retrieval.evaluate(
    model, Loader(captions, size=50), tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
  )
  pairs = PairSet("toy", pictures(len(image)), [str(k) for k in range(len(text))], np.arange(len(image)), owner)
  ours = evaluate_retrieval(model, pairs).metrics
  assert 0 < theirs["image_retrieval_recall@1"] < theirs["text_retrieval_recall@10"] < 1
  # Both count hits and divide in float64.
  assert ours == pytest.approx(theirs, **EXACT)


@pytest.mark.parametrize("images", [1, 2])
def test_hard_pairs(images, rng):
  image, caption = unit(rng.normal(size=(150, images, 8))), rng.normal(size=(150, 2, 8))
  caption[:, :images] += 0.8 * image
  model = Embeddings(image.reshape(-1, 8), unit(caption).reshape(-1, 8))
  texts = [[str(2 * n), str(2 * n + 1)] for n in range(150)]
  numbers = torch.arange(150.0 * images).reshape(150, images, 1, 1, 1)
  loader = [(numbers[k : k + 32], texts[k : k + 32]) for k in range(0, 150, 32)]
  theirs = image_caption_selection.evaluate(model, loader, tokenizer, "cpu", amp=False)
  ours = evaluate_choices(model, ChoiceSet("toy", pictures(150 * images), texts)).metrics
  assert 0.05 < theirs["acc"] < 0.95
  assert ours == pytest.approx(theirs, **EXACT)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_linear_probe_training(weight_decay, monkeypatch):
  """Its training loop, from the same first weights and in the same order, ends at the same classifier."""
  data = load_digits()
  features, labels = unit(data.data[:500]), data.target[:500]
  order = probes.batches(500, epochs=10, batch_size=64, seed=0)
  per_epoch = len(order) // 10

  class InOurOrder:
    epoch = -1

    def __len__(self):
      return per_epoch

    def __iter__(self):
      self.epoch += 1
      for rows in order[self.epoch * per_epoch : (self.epoch + 1) * per_epoch]:
        rows = rows[rows >= 0]
        yield torch.from_numpy(features[rows]), torch.from_numpy(labels[rows])

  for kind in (torch.Tensor, torch.nn.Module):
    monkeypatch.setattr(kind, "cuda", lambda self, *_: self)
  torch.manual_seed(3)
  untrained = torch.nn.Linear(64, 10)
  first = {"weight": untrained.weight.detach().numpy().T.copy(), "bias": untrained.bias.detach().numpy().copy()}
  bound = max(np.abs(leaf).max() for leaf in probes.initial_weights(64, 10, 0).values())
  assert bound == pytest.approx(np.abs(first["weight"]).max(), rel=0.02)
  with contextlib.redirect_stdout(None):
    trained = their_probe.train(InOurOrder(), 64, 10, weight_decay, 0.1, 10, False, "cpu", 3).module
  ours = probes.fit_linear(features, labels, first, order, 0.1, weight_decay)
  np.testing.assert_allclose(ours["weight"], trained.weight.detach().numpy().T, rtol=0, atol=1e-10)
  np.testing.assert_allclose(ours["bias"], trained.bias.detach().numpy(), rtol=0, atol=1e-10)
