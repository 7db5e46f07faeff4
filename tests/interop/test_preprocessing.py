"""Odd pictures and odd captions become the pixels and tokens that other libraries make of them."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.errors import UserError
from contrastive_jax.interop import tokenizer_files
from contrastive_jax.preprocess import images, tokenizers
from contrastive_jax.preprocess.native import fit_to_length
from contrastive_jax.preprocess.resolution import Resolution
from contrastive_jax.preprocess.views import Views

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import reference_models as peers  # noqa: E402, F401 - declares torchvision's operators before it is imported
from tests.interop import checkpoints  # noqa: E402

SIZE = 32
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ODD_CAPTIONS = (
  "A Photo of a CAT.",
  "",
  "   two   spaces\tand\nlines ",
  "a 🦊 and a 👩‍🚀!",
  "it's (almost) 100% 'fine' — isn't it?",
  "кот, 고양이, 猫, قط",
  "naïve café ﬁnally",
  "word " * 500,
  "<|endoftext|> in the middle",
  "http://example.com/?a=1&b=2",
)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
  """A picture with edges and gradients."""
  rng = np.random.default_rng(height * width)
  coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), channels), np.uint8)
  return np.stack([np.asarray(Image.fromarray(coarse[..., k]).resize((width, height))) for k in range(channels)], -1)


def pictures() -> dict[str, Image.Image]:
  rgb = Image.fromarray(smooth(60, 47))
  jpeg = io.BytesIO()
  Image.fromarray(smooth(61, 90)).save(jpeg, "JPEG", quality=90)
  return {
    "rgb": rgb,
    "jpeg": Image.open(jpeg),
    "grey": rgb.convert("L"),
    "palette": rgb.convert("P"),
    "cmyk": rgb.convert("CMYK"),
    "one bit": rgb.convert("1"),
    "wide": Image.fromarray(smooth(40, 600)),
    "line": Image.fromarray(smooth(1, 1000)),
    "tiny": Image.fromarray(smooth(3, 2)),
    "large": Image.fromarray(smooth(700, 501)),
  }


def seen(picture, *, resize: str, interpolation: str = "bicubic", size: int = SIZE) -> np.ndarray:
  """The square that our model gets, unpatched."""
  views = Views(size, 1, Resolution.fixed(size), Resolution.fixed(size), 8, resize=resize, interpolation=interpolation)
  patches, _ = views(picture)
  return patches.reshape(size, size, 3)


def planes_of(pixels: np.ndarray, mean, std) -> np.ndarray:
  return ((pixels / 255 - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


@pytest.mark.parametrize("name", pictures())
def test_clip_pictures_are_those_of_transformers(name):
  from transformers import CLIPImageProcessorPil

  processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
  expected = processor(pictures()[name], return_tensors="np")["pixel_values"][0]
  found = planes_of(seen(pictures()[name], resize="crop"), CLIP_MEAN, CLIP_STD)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", pictures())
def test_siglip_pictures_are_those_of_transformers(name):
  from transformers import SiglipImageProcessorPil

  processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
  expected = processor(pictures()[name], return_tensors="np")["pixel_values"][0]
  found = planes_of(seen(pictures()[name], resize="squash"), 0.5, 0.5)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", pictures())
def test_siglip2_pictures_are_those_of_transformers(name):
  from transformers import Siglip2ImageProcessorPil

  processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64, do_convert_rgb=True)
  expected = processor(pictures()[name], return_tensors="np")
  resolution = Resolution("naflex", lengths=(64,))
  patches, coords = Views(4, 1, resolution, resolution, 8, interpolation="bilinear")(pictures()[name])
  np.testing.assert_array_equal(coords.max(axis=0)[1:] + 1, expected["spatial_shapes"][0])
  found = (patches / 255 - 0.5) / 0.5
  np.testing.assert_allclose(found, expected["pixel_values"][0][: len(patches)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
# open_clip resizes before it converts to RGB: of palettes and single bits, which cannot be mixed, it takes the nearest.
@pytest.mark.parametrize("name", [name for name in pictures() if name not in ("line", "palette", "one bit")])
def test_open_clip_pictures_differ_at_most_by_where_half_a_pixel_goes(name, mode):
  transform = pytest.importorskip("open_clip.transform")
  made = transform.image_transform(
    SIZE, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode=mode, interpolation="bicubic"
  )
  expected = made(pictures()[name]).numpy()
  found = planes_of(seen(pictures()[name], resize="crop" if mode == "shortest" else "squash"), CLIP_MEAN, CLIP_STD)
  width, height = pictures()[name].size
  longer = SIZE * max(width, height) // min(width, height)
  if mode == "shortest" and (longer - SIZE) % 4 == 3:
    # The middle lies half a pixel off: torchvision rounds it to the even side, transformers and we down.
    axis = 1 if height > width else 2
    found, expected = (
      np.take(array, range(some, SIZE - 1 + some), axis) for array, some in ((found, 1), (expected, 0))
    )
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (37, 53), (480, 640), (5, 5), (2000, 3000), (333, 1000)])
@pytest.mark.parametrize("length", [16, 64, 256])
def test_naflex_sizes_are_those_of_transformers(shape, length):
  from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

  theirs = get_image_size_for_max_num_patches(*shape, patch_size=16, max_num_patches=length)
  assert fit_to_length(*shape, patch=16, length=length) == theirs


def test_rotated_deep_and_transparent_pictures_are_shown_as_a_viewer_shows_them():
  """Other libraries leave the rotation in the file, cut 16 bits off at 255 and show what lies below the transparent."""
  upright = Image.fromarray(smooth(40, 64))
  exif = Image.Exif()
  exif[0x0112] = 6
  file = io.BytesIO()
  upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
  np.testing.assert_array_equal(images.decode(file.getvalue()), np.asarray(upright))
  deep = np.array([[0, 257, 32768, 65535]], np.uint16)
  np.testing.assert_array_equal(images.decode(Image.fromarray(deep))[..., 0], [[0, 1, 128, 255]])
  hidden = Image.fromarray(np.dstack([smooth(40, 40), np.zeros((40, 40), np.uint8)]))
  assert (images.decode(hidden) == 255).all()


def test_clip_captions_are_those_of_open_clip():
  open_clip = pytest.importorskip("open_clip")
  # open_clip takes a marker that is spelled out in a caption for text; OpenAI's code, transformers and we for a marker.
  captions = [caption for caption in ODD_CAPTIONS if "<|" not in caption]
  theirs = open_clip.get_tokenizer("ViT-B-32")(captions).numpy()
  tokens, _ = tokenizer_files.clip()(captions, 77)
  np.testing.assert_array_equal(tokens, theirs)


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
def test_captions_of_other_tokenizers_are_those_of_open_clip(clean, tmp_path):
  open_clip = pytest.importorskip("open_clip")
  folder = checkpoints.write_all(tmp_path)["open_clip"]
  described = json.loads((folder / "open_clip_config.json").read_text())
  described["model_cfg"]["text_cfg"] |= {"context_length": 40, "tokenizer_kwargs": {"clean": clean}}
  (folder / "open_clip_config.json").write_text(json.dumps(described))
  own = tokenizer_files.read(folder, clean=clean, mended=True)
  captions = [*ODD_CAPTIONS, "salt &amp;amp; pepper", " a\u2019s "]
  theirs = open_clip.get_tokenizer(f"local-dir:{folder}")(captions).numpy()
  np.testing.assert_array_equal(own(captions, 40)[0], theirs)


def test_clip_captions_survive_the_way_to_transformers(tmp_path):
  from transformers import CLIPTokenizer

  tokenizer = tokenizer_files.clip()
  tokenizer_files.write(tokenizer, tmp_path, 77)
  theirs = CLIPTokenizer.from_pretrained(tmp_path)(
    list(ODD_CAPTIONS), padding="max_length", truncation=True, max_length=77, return_tensors="np"
  )
  # transformers leaves out ftfy's repairs: of ligatures, here.
  rows = [row for row, caption in enumerate(ODD_CAPTIONS) if "ﬁ" not in caption]
  tokens, mask = tokenizer(ODD_CAPTIONS, 77)
  np.testing.assert_array_equal(mask[rows], theirs["attention_mask"][rows].astype(bool))
  np.testing.assert_array_equal(np.where(mask, tokens, 0)[rows], np.where(mask, theirs["input_ids"], 0)[rows])


def test_siglip_captions_are_those_of_transformers(tmp_path):
  pytest.importorskip("google.protobuf")
  from transformers import SiglipTokenizer

  model = trained_sentencepiece(tmp_path)
  theirs = SiglipTokenizer(str(model))(list(ODD_CAPTIONS), padding="max_length", truncation=True, max_length=64)
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
  tokens, _ = tokenizer_files.read(tmp_path)(ODD_CAPTIONS, 64)
  np.testing.assert_array_equal(tokens, np.array(theirs["input_ids"]))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": False},
    {"normalization_rule_name": "identity"},
    {"normalization_rule_name": "nmt_nfkc_cf", "model_type": "bpe"},
    {"treat_whitespace_as_suffix": True},
    {"user_defined_symbols": ["<extra>"]},
  ],
  ids=str,
)
def test_every_sentencepiece_model_gives_the_tokens_of_transformers_or_is_refused(options, tmp_path):
  pytest.importorskip("google.protobuf")
  from transformers import SiglipTokenizer

  captions = [caption.lower() for caption in ODD_CAPTIONS if caption.strip()]
  options = {"vocab_size": 200, "character_coverage": 1.0} | options
  (tmp_path / "spiece.model").write_bytes(checkpoints.sentencepiece_model(captions, **options))
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
  texts = [*ODD_CAPTIONS, " ", "  a photo", "a\u2581photo", "two_spaces", "a <extra>photo", ".", "<pad> a photo"]
  theirs = SiglipTokenizer.from_pretrained(tmp_path)(texts, padding="max_length", truncation=True, max_length=64)
  try:
    tokens, _ = tokenizer_files.read(tmp_path)(texts, 64)
  except UserError as error:
    assert "treats spaces otherwise" in str(error)
    pieces = tokenizers.SentencePieceTokenizer((tmp_path / "spiece.model").read_bytes(), True, True, "</s>")
    assert (pieces(texts, 64)[0] != np.array(theirs["input_ids"])).any()
  else:
    np.testing.assert_array_equal(tokens, np.array(theirs["input_ids"]))


def trained_sentencepiece(folder: Path) -> Path:
  """A SentencePiece model of SigLIP's kind, which is T5's: a padding token that SigLIP does not use."""
  import sentencepiece

  prefix = folder / "spiece"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([caption.lower() for caption in ODD_CAPTIONS if caption.strip()] * 20),
    model_prefix=str(prefix),
    vocab_size=420,
    byte_fallback=True,
    unk_id=2,
    eos_id=1,
    pad_id=0,
    bos_id=-1,
    minloglevel=2,
    hard_vocab_limit=False,
  )
  return prefix.with_suffix(".model")
