"""Reference models of other libraries with random weights, small or of true size, saved as those libraries do."""

import json
from pathlib import Path

import numpy as np
import torch

from contrastive_jax.preprocess import tokenizers

# torchvision declares these two whether its operators were built or not, which beside a CPU build of PyTorch they are
# not: nothing here calls them.
_OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
  _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
CAPTIONS = ("a dog", "Two CATS, on a sofa!", "", "naïve café 🦊", "кот и собака", "word " * 500)
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}


def scatter(model) -> None:
  """Replaces every parameter by random numbers, so that none is at a value where an error would not show."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 0 or "logit" in name:
        parameter.copy_(torch.full_like(parameter, 1.5))
      else:
        deviation = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.copy_(centre + deviation * torch.randn(parameter.shape, generator=generator))


def save_tokenizer(folder: Path, vocab_size: int, length: int) -> None:
  """Returns a BPE as `transformers` keeps one."""
  from transformers import PreTrainedTokenizerFast

  folder.mkdir(parents=True, exist_ok=True)
  trained = tokenizers.train_bpe(CAPTIONS, min(vocab_size, 400))
  path = folder / "tokenizer.json"
  path.write_bytes(trained.definition()[2])
  fast = PreTrainedTokenizerFast(
    tokenizer_file=str(path), pad_token="<pad>", eos_token="<eos>", model_max_length=length, padding_side="right"
  )
  fast.save_pretrained(folder)


def huggingface(family: str, folder: Path, *, true_size: bool):
  """Returns a model of `transformers` in evaluation mode, saved with a tokenizer."""
  import transformers

  config_class, model_class = {
    "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    "siglip2": (transformers.Siglip2Config, transformers.Siglip2Model),
  }[family]
  # Sizes that are not squares of each other, so that a transposed matrix does not fit.
  vision = {} if true_size else {**SMALL, "patch_size": 4}
  text = {} if true_size else {**SMALL, "vocab_size": 500, "max_position_embeddings": 16}
  if not true_size and family != "siglip2":
    vision["image_size"] = 20
  if not true_size and family == "siglip2":
    vision["num_patches"] = 16
  options = {"projection_dim": 40} if family == "clip" and not true_size else {}
  config = config_class(vision_config=vision, text_config={**text, "eos_token_id": 1, "pad_token_id": 0}, **options)
  torch.manual_seed(0)
  model = model_class._from_config(config, attn_implementation="eager").eval()
  scatter(model)
  model.save_pretrained(folder)
  save_tokenizer(folder, config.text_config.vocab_size, config.text_config.max_position_embeddings)
  return model


def open_clip(family: str, folder: Path, *, true_size: bool):
  """Returns a model of open_clip in evaluation mode, saved as it is published."""
  import open_clip
  from safetensors.torch import save_file

  small = {"layers": 3, "width": 48}
  config = {
    "clip": {
      "embed_dim": 40,
      "quick_gelu": True,
      "vision_cfg": {**small, "head_width": 12, "patch_size": 4, "image_size": 20},
      "text_cfg": {**small, "heads": 4, "context_length": 16, "vocab_size": 500, "pool_type": "eos", "eos_id": 1},
    },
    "siglip": open_clip.get_model_config("ViT-B-16-SigLIP"),
    "clip_b32": open_clip.get_model_config("ViT-B-32"),
  }["clip_b32" if family == "clip" and true_size else family]
  if family == "clip" and not true_size:
    config["text_cfg"]["hf_tokenizer_name"] = "beside"
  folder.mkdir(parents=True)
  seen = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"} if family == "siglip" else {}
  (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": seen}))
  if config["text_cfg"].get("hf_tokenizer_name"):
    save_tokenizer(folder, config["text_cfg"]["vocab_size"], config["text_cfg"]["context_length"])
  torch.manual_seed(0)
  model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
  scatter(model)
  save_file(
    {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors"
  )
  return model


def pixels(size: int, count: int = 3) -> np.ndarray:
  """Returns random pictures of the size that a model reads."""
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def planes(images: np.ndarray, mean, std):
  """Returns the same pictures as PyTorch's models take them."""
  scaled = (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
  return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def unit(vectors) -> np.ndarray:
  vectors = vectors.detach().numpy()
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def big_vision(config) -> dict[str, np.ndarray]:
  """Returns random two-tower parameters under big_vision's names, in its shapes, for the sizes of a config."""
  generator = np.random.default_rng(0)
  arrays = {}

  def put(name: str, *shape: int, centre: float = 0.0) -> None:
    deviation = 0.1 if len(shape) < 2 else 0.5 * shape[0] ** -0.5
    arrays[name] = (centre + deviation * generator.standard_normal(shape)).astype(np.float32)

  def norm(name: str, width: int) -> None:
    put(f"{name}/scale", width, centre=1.0)
    put(f"{name}/bias", width)

  def mlp(name: str, width: int, inner: int) -> None:
    for dense, shape in (("Dense_0", (width, inner)), ("Dense_1", (inner, width))):
      put(f"{name}/{dense}/kernel", *shape)
      put(f"{name}/{dense}/bias", shape[1])

  def attention(name: str, width: int, heads: int) -> None:
    for part in ("query", "key", "value"):
      put(f"{name}/{part}/kernel", width, heads, width // heads)
      arrays[f"{name}/{part}/bias"] = 0.1 * generator.standard_normal((heads, width // heads)).astype(np.float32)
    put(f"{name}/out/kernel", heads, width // heads, width)
    arrays[f"{name}/out/kernel"] *= (heads / width) ** 0.5
    put(f"{name}/out/bias", width)

  for tower, encoder, sizes in (
    ("img", "img/Transformer", config.image.transformer),
    ("txt", "txt/Encoder_0", config.text.transformer),
  ):
    for layer in range(sizes.depth):
      block = f"{encoder}/encoderblock_{layer}"
      norm(f"{block}/LayerNorm_0", sizes.width)
      attention(f"{block}/MultiHeadDotProductAttention_0", sizes.width, sizes.heads)
      norm(f"{block}/LayerNorm_1", sizes.width)
      mlp(f"{block}/MlpBlock_0", sizes.width, sizes.mlp_dim)
    norm(f"{encoder}/encoder_norm", sizes.width)
    length = config.image.grid**2 if tower == "img" else config.text.length
    arrays[f"{tower}/pos_embedding"] = 0.1 * generator.standard_normal((1, length, sizes.width)).astype(np.float32)
  image, text, patch = config.image.transformer, config.text.transformer, config.image.patch_size
  kernel = generator.standard_normal((patch, patch, 3, image.width)) / (patch * 3**0.5)
  arrays["img/embedding/kernel"] = kernel.astype(np.float32)
  put("img/embedding/bias", image.width)
  arrays["img/MAPHead_0/probe"] = generator.standard_normal((1, 1, image.width)).astype(np.float32)
  attention("img/MAPHead_0/MultiHeadDotProductAttention_0", image.width, image.heads)
  norm("img/MAPHead_0/LayerNorm_0", image.width)
  mlp("img/MAPHead_0/MlpBlock_0", image.width, image.mlp_dim)
  tokens = generator.standard_normal((config.text.vocab_size, text.width))
  arrays["txt/Embed_0/embedding"] = (0.1 * tokens).astype(np.float32)
  put("txt/head/kernel", text.width, config.embed_dim)
  put("txt/head/bias", config.embed_dim)
  arrays["t"], arrays["b"] = np.float32([1.5]), np.float32([-2.0])
  return arrays


def outputs_of_huggingface(model, family: str, images: np.ndarray, tokens: np.ndarray, mask: np.ndarray):
  """Returns the image embeddings, the text embeddings and the logits."""
  clip = family == "clip"
  mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)) if clip else (0.5, 0.5)
  given = {"pixel_values": planes(images, mean, std), "input_ids": torch.from_numpy(tokens.astype(np.int64))}
  if clip:
    given["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
  if family == "siglip2":
    patch = model.config.vision_config.patch_size
    side = images.shape[1] // patch
    rows = given["pixel_values"].reshape(len(images), 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
    given["pixel_values"] = rows.reshape(len(images), side * side, -1)
    given["pixel_attention_mask"] = torch.ones(len(images), side * side, dtype=torch.int64)
    given["spatial_shapes"] = torch.tensor([[side, side]] * len(images))
  with torch.no_grad():
    out = model(**given)
  return unit(out.image_embeds), unit(out.text_embeds), out.logits_per_image.numpy()


def outputs_of_open_clip(model, images: np.ndarray, tokens: np.ndarray):
  mean, std = model.visual.preprocess_cfg["mean"], model.visual.preprocess_cfg["std"]
  with torch.no_grad():
    image = model.encode_image(planes(images, mean, std), normalize=True)
    text = model.encode_text(torch.from_numpy(tokens.astype(np.int64)), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    logits = logits if model.logit_bias is None else logits + model.logit_bias
  return image.numpy(), text.numpy(), logits.numpy()


def opened(library: str, folder: Path):
  """Returns what a library makes of a folder that we wrote, without code of its own."""
  if library == "huggingface":
    import transformers

    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
  import open_clip

  return open_clip.create_model(f"local-dir:{folder}").eval()
