"""The tables of options hold what the installed libraries define; odd options give the numbers that these compute."""

import dataclasses
import inspect
import json
import os
import shutil

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.interop import (
  huggingface_options,
  imports,
  open_clip,
  open_clip_options,
  tokenizer_files,
  tokenizer_options,
)

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from benchmarks import reference_models as peers  # noqa: E402
from tests.interop import checkpoints  # noqa: E402
from tests.interop.test_parity import assert_same, opened_here  # noqa: E402

CLASSES = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}


def parameters_of(kind: type) -> set[str]:
  """Arguments of the constructors of a class and of those that it inherits from, but for collections of others."""
  found = set()
  for base in kind.__mro__[:-1]:
    if "__init__" in vars(base):
      taken = inspect.signature(base.__init__).parameters.values()
      found |= {each.name for each in taken if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
  return found - {"self"}


def keys_of(config: type) -> set[str]:
  return set(config().to_dict()) | parameters_of(config)


@pytest.mark.parametrize("family", CLASSES)
def test_every_option_of_the_config_classes_is_in_the_tables(family):
  names = [f"{CLASSES[family]}{part}Config" for part in ("", "Text", "Vision")]
  for name, table in zip(names, huggingface_options.MODELS[family], strict=True):
    assert not keys_of(getattr(transformers, name)) - set(table), name


def test_every_option_of_bert_is_in_its_table():
  assert not keys_of(transformers.BertConfig) - set(huggingface_options.BERT)


@pytest.mark.parametrize("name", huggingface_options.PREPROCESSING)
def test_every_option_of_the_image_processors_is_in_the_tables(name):
  kind = getattr(transformers, name)
  given = {key for base in kind.valid_kwargs.__mro__ for key in getattr(base, "__annotations__", {})}
  assert not (set(kind().to_dict()) | given) - set(huggingface_options.PREPROCESSING[name])


@pytest.mark.parametrize("name", tokenizer_options.CLASSES)
def test_every_option_of_the_tokenizers_is_in_the_table(name):
  kind = getattr(transformers, name, None) or getattr(transformers, f"{name}Fast")
  # What a constructor takes beside options: the vocabulary itself.
  content = {"vocab", "merges", "_spm_precompiled_charsmap", "tokenizer_object", "gguf_file"}
  assert not parameters_of(kind) - content - set(tokenizer_options.SETTINGS)


def test_every_option_of_open_clip_is_in_the_tables():
  library = pytest.importorskip("open_clip")
  from open_clip.transform import PreprocessCfg

  model = library.model
  for kind, tables in (
    (model.CLIPVisionCfg, (open_clip_options.VISION, open_clip_options.TIMM)),
    (model.CLIPTextCfg, (open_clip_options.TEXT_TOWER,)),
    (PreprocessCfg, (open_clip_options.PREPROCESSING,)),
  ):
    for table in tables:
      assert not {field.name for field in dataclasses.fields(kind)} - set(table), kind
  taken = parameters_of(model.CLIP) | parameters_of(model.CustomTextCLIP) | parameters_of(library.CoCa)
  inherited = parameters_of(torch.nn.Module)
  # CoCa's padding is an argument of the class, and no config gives it.
  assert not taken - inherited - {"pad_id"} - set(open_clip_options.MODEL)


def test_every_config_that_open_clip_ships_is_imported_or_refused_by_an_option():
  library = pytest.importorskip("open_clip")
  read, refused = [], {}
  for name in library.list_models():
    try:
      open_clip.read_config(library.get_model_config(name), {}, source=name)
      read.append(name)
    except UserError as error:
      refused[name] = str(error)
  assert len(read) > 50
  assert {"ViT-B-32", "ViT-L-14-quickgelu", "ViT-bigG-14", "ViT-B-16-SigLIP2-256", "ViT-SO400M-14-SigLIP"} <= set(read)
  for name, message in refused.items():
    assert "\n" not in message and "unknown option" not in message, (name, message)


def test_clips_odd_options_give_the_numbers_of_transformers(tmp_path):
  small = {"intermediate_size": 56, "num_hidden_layers": 2}
  config = transformers.CLIPConfig(
    text_config={
      **small,
      "hidden_size": 24,
      "num_attention_heads": 2,
      "vocab_size": 500,
      "max_position_embeddings": 16,
      "hidden_act": "gelu_new",
      "layer_norm_eps": 3e-2,
      "attention_dropout": 0.4,
      "eos_token_id": 1,
      "pad_token_id": 0,
    },
    vision_config={
      **small,
      "hidden_size": 36,
      "num_attention_heads": 6,
      "num_hidden_layers": 3,
      "patch_size": 5,
      "image_size": 20,
      "hidden_act": "gelu",
      "layer_norm_eps": 1e-1,
      "attention_dropout": 0.4,
    },
    projection_dim=17,
  )
  reference = transformers.CLIPModel._from_config(config, attn_implementation="eager").eval()
  peers.scatter(reference)
  reference.save_pretrained(tmp_path / "theirs")
  peers.save_tokenizer(tmp_path / "theirs", 500, 16)
  seen = {"size": {"height": 20, "width": 20}, "do_center_crop": False, "rescale_factor": 1 / 127.5}
  seen |= {"image_mean": [1.0, 0.9, 1.1], "image_std": [0.7, 1.3, 1.0], "do_convert_rgb": False}
  (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(seen))
  imported = imports.read(f"huggingface:{tmp_path / 'theirs'}")
  assert imported.config.text.transformer.activation == "gelu_tanh"
  _, images, tokens, mask, found = opened_here(imported, tmp_path / "ours")
  processor = transformers.CLIPImageProcessorPil(**seen)
  pixels = torch.from_numpy(np.stack([processor(image)["pixel_values"][0] for image in images]))
  with torch.no_grad():
    outputs = reference(
      pixel_values=pixels, input_ids=torch.from_numpy(tokens.astype(np.int64)), attention_mask=torch.from_numpy(mask)
    )
  expected = peers.unit(outputs.image_embeds), peers.unit(outputs.text_embeds), outputs.logits_per_image.numpy()
  assert_same(found, expected)


def test_open_clips_odd_options_give_its_numbers(tmp_path):
  library = pytest.importorskip("open_clip")
  from safetensors.torch import save_file

  config = {
    "embed_dim": 20,
    "init_logit_bias": -3.0,
    "nonscalar_logit_scale": True,
    "vision_cfg": {
      **{"layers": 2, "width": 48, "head_width": 8, "mlp_ratio": 2.5, "patch_size": 6, "image_size": 18},
      **{"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 3e-2}, "patch_dropout": 0.3},
    },
    "text_cfg": {
      **{"layers": 2, "width": 32, "heads": 4, "mlp_ratio": 3.0, "context_length": 12, "vocab_size": 500},
      **{"norm_kwargs": {"eps": 1e-1}, "pool_type": "last", "no_causal_mask": True, "proj_bias": True},
      "hf_tokenizer_name": "beside",
    },
    "custom_text": True,
  }
  folder = tmp_path / "theirs"
  folder.mkdir()
  (folder / "open_clip_config.json").write_text(
    json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.4]}})
  )
  peers.save_tokenizer(folder, 500, 12)
  reference = library.create_model(f"local-dir:{folder}", load_weights=False).eval()
  peers.scatter(reference)
  weights = {f"module._orig_mod.{name}": tensor.contiguous() for name, tensor in reference.state_dict().items()}
  save_file(weights, folder / "open_clip_model.safetensors")
  imported = imports.read(f"open_clip:{folder}")
  _, images, tokens, _, found = opened_here(imported, tmp_path / "ours")
  with torch.no_grad():
    image = reference.encode_image(peers.planes(images, [0.4, 0.5, 0.6], [0.3, 0.2, 0.4]), normalize=True).numpy()
    text = reference.encode_text(torch.from_numpy(tokens.astype(np.int64)), normalize=True).numpy()
  scale, bias = reference.logit_scale.exp().item(), reference.logit_bias.item()
  assert_same(found, (image, text, scale * image @ text.T + bias))


@pytest.mark.parametrize(
  "nest",
  [
    lambda state: state,
    lambda state: {"state_dict": state},
    lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    lambda state: {"checkpoint": {"model_state_dict": {f"module.{name}": value for name, value in state.items()}}},
    lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}, "scaler": {}},
    lambda state: {"module": {f"module.{name}": value for name, value in state.items()}, "lr_schedulers": [1]},
  ],
)
def test_nested_states_of_pytorch_are_found(nest, sources, tmp_path):
  from safetensors.torch import load_file

  folder = tmp_path / "nested"
  folder.mkdir()
  for path in sources["clip"].iterdir():
    if path.suffix == ".json":
      (folder / path.name).write_bytes(path.read_bytes())
  torch.save(nest(load_file(sources["clip"] / "model.safetensors")), folder / "pytorch_model.bin")
  found, plain = (imports.read(f"huggingface:{source}") for source in (folder, sources["clip"]))
  assert found.config == plain.config
  np.testing.assert_array_equal(found.params["text"]["position"], plain.params["text"]["position"])


@pytest.mark.parametrize(
  ("saved", "message"),
  [
    (lambda path: torch.save(torch.nn.Linear(2, 2), path), r"asks for torch\.nn\.modules\.linear\.Linear"),
    (
      lambda path: torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False),
      r"before version 1\.6",
    ),
    (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "TorchScript archive"),
    (lambda path: torch.save([torch.zeros(2)], path), "does not hold weights by name"),
    (lambda path: torch.save({"epoch": 3}, path), "holds no weights"),
    (lambda path: torch.save({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, path), "model, ema"),
    (lambda path: torch.save({"a": torch.zeros(2), "args": np.float64(3)}, path), "asks for numpy"),
    (lambda path: torch.save({"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, path), "asks for"),
  ],
)
def test_other_files_of_pytorch_say_what_they_are(saved, message, tmp_path):
  from contrastive_jax.interop import checkpoint_files

  saved(tmp_path / "a.pt")
  with pytest.raises(UserError, match=message) as raised:
    checkpoint_files.read(tmp_path / "a.pt")
  assert "\n" not in str(raised.value)


WORDS = ("a", "do", "dog", "g", "o", "d", "##g", "og", "dogs", "##s", ",", "!", "b", "c")
ODD_CAPTIONS = (
  *(
    "a dog",
    "A Dog, dogs!",
    "",
    "  a   dog ",
    "a_dog _b_",
    "two\tcats\n",
    "na\u00efve e\u0301 \u00c9",
    "\u03a3\u0391\u03a3 \u0130",
  ),
  *(
    "\u72ac\u3068\u732b dog",
    "\U0001f98a\u200d",
    "\u201cdog\u201d don\u2019t",
    "a &amp; b",
    "\uff44\uff4f\uff47",
    "dog " * 200,
    "ctrl\x01\x07 dog",
  ),
)


def small_tokenizer(name: str):
  """A tokenizer of a class of transformers, whose first token is number 0 as in the published ones."""
  special = [["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[UNK]"], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]]
  if name in ("BertTokenizer", "MPNetTokenizer"):
    words = {word: number for number, word in enumerate([*special[name == "BertTokenizer"], *WORDS])}
    return getattr(transformers, name)(vocab=words)
  if name == "RobertaTokenizer":
    learned = json.loads(checkpoints.tokenizer().definition()[2])["model"]
    words = {word: number for number, word in enumerate([*special[0], *learned["vocab"]])}
    return transformers.RobertaTokenizer(vocab=words, merges=[tuple(pair) for pair in learned["merges"]])
  spaced = [
    "\u2581",
    "\u2581a",
    "\u2581d",
    "o",
    "g",
    "a",
    "d",
    "\u2581do",
    *(chr(code) for code in range(0x370, 0x400)),
  ]
  words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *spaced]
  words = {word: number for number, word in enumerate(words)}
  return transformers.Siglip2Tokenizer(vocab=words, merges=[("\u2581", "a"), ("\u2581", "d"), ("\u2581d", "o")])


def assert_same_tokens(folder, theirs) -> None:
  expected = theirs(list(ODD_CAPTIONS), padding="max_length", max_length=24, truncation=True, return_tensors="np")
  tokens, _ = tokenizer_files.read(folder)(ODD_CAPTIONS, 24)
  for caption, found, wanted in zip(ODD_CAPTIONS, tokens, expected["input_ids"], strict=True):
    np.testing.assert_array_equal(found, wanted, err_msg=repr(caption))


@pytest.mark.parametrize("name", ["BertTokenizer", "MPNetTokenizer", "RobertaTokenizer", "Siglip2Tokenizer"])
def test_tokenizers_of_a_class_give_its_tokens(name, tmp_path):
  theirs = small_tokenizer(name)
  theirs.padding_side = "right"
  theirs.save_pretrained(tmp_path)
  settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "right"}))
  assert_same_tokens(tmp_path, transformers.AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", ["pieces", "merges"])
def test_tokenizers_without_a_json_give_the_tokens_of_transformers(family, sources, tmp_path):
  shutil.copytree(sources[family], tmp_path, dirs_exist_ok=True)
  kind = {"pieces": transformers.SiglipTokenizer, "merges": transformers.CLIPTokenizer}[family]
  if family == "merges":
    # Version 5 no longer reads tokens with their flags here, as its versions before wrote them.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
  theirs = kind.from_pretrained(tmp_path)
  if family == "merges":
    # Ours is the padding of the original; the embedding is taken before it.
    theirs.pad_token = "!"
  assert_same_tokens(tmp_path, theirs)
