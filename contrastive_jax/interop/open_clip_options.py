"""All options of open_clip's configs, and what the importer does with each.

They follow `CLIPVisionCfg`, `CLIPTextCfg`, `PreprocessCfg` and the constructors of `CLIP` and `CustomTextCLIP`. A slow
test compares the tables with the installed library.
"""

from contrastive_jax.interop.options import (
  ANY,
  CHANNELS,
  COUNT,
  EPS,
  FLAG,
  INITIAL,
  NUMBER,
  OBJECT,
  POSITIVE,
  TEXT,
  TRAINING,
  Honoured,
  Ignored,
  Kind,
  Required,
  Table,
  optional,
)

_TIMM = Ignored("towers of timm are built by their name")
_NO_TIMM = Ignored("only towers of timm read it")
_NO_HF = Ignored("only text towers of transformers read it")
_BLOCKS: Table = {
  "ls_init_value": Required((None,), "which asks for layer scale"),
  "qk_norm": Required((False, None), "which norms queries and keys"),
  "scaled_cosine_attn": Required((False, None), "which asks for cosine attention"),
  "scale_heads": Required((False, None), "which scales heads"),
  "scale_attn_inner": Required((False, None), "which asks for another norm"),
  "scale_attn": Required((False, None), "which asks for another norm"),
  "scale_fc": Required((False, None), "which asks for another norm"),
  "block_type": Required((None, "default"), "which asks for other blocks"),
  "act_kwargs": Honoured(optional(OBJECT), "transformer.activation"),
  "norm_kwargs": Honoured(optional(OBJECT), "transformer.norm_eps"),
  "mlp_ratio": Honoured(POSITIVE, "transformer.mlp_dim"),
  "width": Honoured(COUNT, "transformer.width"),
  "output_tokens": Required((False, None), "which returns tokens beside embeddings"),
  "final_ln_after_pool": Required((False, None), "which norms after pooling"),
}
_SIDE = Kind("a whole number from 1 on, or such a pair", lambda value: _is_side(value))
_VISION: Table = {
  **_BLOCKS,
  "head_width": Honoured(COUNT, "transformer.heads"),
  "patch_size": Honoured(COUNT, "image.patch_size"),
  "image_size": Honoured(_SIDE, "image.image_size"),
  "layers": Honoured(ANY, "transformer.depth; a list is a ResNet, which is refused"),
  "patch_dropout": TRAINING,
  "attentional_pool": Required((False, None), "which asks for a pooler of several queries"),
  **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads"), Ignored("only an attentional pooler reads it")),
  "no_ln_pre": Required((False, None), "which takes away the first norm"),
  "pos_embed_type": Required(("learnable",), "which asks for other positions"),
  "pool_type": Required(("tok",), "which pools images otherwise"),
  "timm_model_name": Honoured(optional(TEXT), "the image tower"),
}
# Image towers of open_clip itself, and those of timm.
VISION: Table = {
  **_VISION,
  **dict.fromkeys(("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"), _NO_TIMM),
  "timm_drop_path": _NO_TIMM,
}
TIMM: Table = {
  **dict.fromkeys(_VISION, _TIMM),
  "timm_model_name": Honoured(TEXT, "the image tower"),
  "image_size": Honoured(_SIDE, "image.image_size"),
  "timm_model_pretrained": INITIAL,
  "timm_pool": Required(("map",), "which pools images otherwise"),
  "timm_proj": Required(("none", None), "which asks for a projection"),
  "timm_proj_bias": Ignored("there is no projection"),
  **dict.fromkeys(("timm_drop", "timm_drop_path", "patch_dropout"), TRAINING),
}
TEXT_TOWER: Table = {
  **_BLOCKS,
  "context_length": Honoured(COUNT, "text.length"),
  "vocab_size": Honoured(COUNT, "text.vocab_size"),
  "heads": Honoured(COUNT, "transformer.heads"),
  "layers": Honoured(COUNT, "transformer.depth"),
  "embed_cls": Required((False, None), "which asks for a class token"),
  "pad_id": Ignored("only a class token in captions reads it"),
  "eos_id": Honoured(NUMBER, "text.pool, where pool_type is 'eos'"),
  "no_causal_mask": Honoured(FLAG, "transformer.causal"),
  "pool_type": Honoured(TEXT, "text.pool"),
  "proj_bias": Honoured(FLAG, "text.projection_bias"),
  "proj_type": Required(("linear",), "which asks for another projection"),
  "hf_tokenizer_name": Honoured(optional(TEXT), "the tokenizer beside the weights"),
  "tokenizer_mode": Required((None,), "which asks for another tokenizer"),
  "tokenizer_kwargs": Honoured(optional(OBJECT), "how captions are cleaned"),
  "hf_model_name": Required((None,), "which asks for a text tower of transformers"),
  **dict.fromkeys(("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"), _NO_HF),
}
MODEL: Table = {
  "embed_dim": Honoured(COUNT, "embed_dim"),
  "vision_cfg": Honoured(OBJECT, "the image tower"),
  "text_cfg": Honoured(OBJECT, "the text tower"),
  "quick_gelu": Honoured(optional(FLAG), "transformer.activation"),
  "init_logit_bias": Honoured(optional(NUMBER), "init_logit_bias"),
  "init_logit_scale": INITIAL,
  "nonscalar_logit_scale": Ignored("the shape [1] is taken as well"),
  "custom_text": Ignored("the names of the weights say it"),
  "multimodal_cfg": Required((None,), "which is a CoCa model with a decoder that writes captions"),
  **dict.fromkeys(("cast_dtype", "output_dict"), Ignored("it says how results are returned")),
}
PREPROCESSING: Table = {
  "size": Honoured(optional(_SIDE), "must be the image tower's"),
  "mode": Required(("RGB",), "which open_clip does not have"),
  "mean": Honoured(optional(CHANNELS), "image.mean"),
  "std": Honoured(optional(CHANNELS), "image.std"),
  "interpolation": Honoured(optional(TEXT), "image.interpolation"),
  "resize_mode": Honoured(optional(TEXT), "image.resize"),
  "fill_color": Ignored("only the resize mode 'longest' reads it, which is refused"),
}
FILE: Table = {
  "model_cfg": Honoured(OBJECT, "the model"),
  "preprocess_cfg": Honoured(optional(OBJECT), "the preprocessing"),
}
NORM: Table = {"eps": Honoured(EPS, "transformer.norm_eps")}
ACTIVATION: Table = {"approximate": Required(("tanh", "none"), "which asks for another activation")}
# Of the tokenizer of transformers beside the weights, and of CLIP's.
TOKENIZER: Table = {
  "clean": Required(("whitespace", "lower", "canonicalize"), "which cleans captions otherwise"),
  "strip_sep_token": Required((False, None), "which replaces tokens"),
  "language": Required((None,), "which asks for the tokenizer of a language"),
  "tokenizer_mode": Required((None,), "which asks for another tokenizer"),
}
CLIP_TOKENIZER: Table = {
  "clean": Required(("lower",), "which cleans captions otherwise"),
  "additional_special_tokens": Required((None,), "which adds tokens"),
  "reduction_mask": Required((None,), "which drops tokens of long captions otherwise"),
}


def _is_side(value: object) -> bool:
  sides = value if isinstance(value, list) else [value]
  return len(sides) in (1, 2) and all(COUNT.holds(side) for side in sides)
