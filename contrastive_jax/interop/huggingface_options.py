"""All options of Hugging Face's CLIP, SigLIP, SigLIP 2 and BERT configs, and what the importer does with each.

Model options follow `PreTrainedConfig` and the config classes of `transformers`, version 5, with those that version 4
wrote into every file. A slow test compares the tables with the installed library.
"""

from contrastive_jax.interop.options import (
  ANY,
  CHANNELS,
  COUNT,
  EPS,
  FLAG,
  INITIAL,
  OBJECT,
  POSITIVE,
  RECORD,
  TEXT,
  TRAINING,
  Honoured,
  Ignored,
  Kind,
  Required,
  Table,
  optional,
)

_OUTPUTS = Ignored("it chooses which outputs are returned beside the embeddings")
_HEAD = Ignored("it belongs to a classification head that a dual encoder does not have")
_COMPUTATION = Ignored("it chooses how the same numbers are computed")
_GENERATION = Ignored("generation of text reads it")
_OTHER_TOWER = Ignored("only a tower used on its own reads it")

_TOKEN_NUMBER = Kind("a token's number", lambda value: isinstance(value, int) and not isinstance(value, bool))

# Version 4 of transformers wrote the defaults of text generation into every config.
_GENERATION_NAMES = (
  *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "max_time"),
  *("stop_strings", "num_beams", "num_beam_groups", "num_return_sequences", "penalty_alpha", "dola_layers"),
  *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
  *("diversity_penalty", "repetition_penalty", "encoder_repetition_penalty", "length_penalty"),
  *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "force_words_ids", "renormalize_logits"),
  *("constraints", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
  *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing"),
  *("guidance_scale", "watermarking_config", "output_scores", "output_logits", "return_dict_in_generate"),
  *("decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
  *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
  *("assistant_lookbehind", "target_lookbehind", "cache_implementation", "cache_config", "return_legacy_cache"),
  *("prefill_chunk_size", "compile_config", "disable_compile", "low_memory", "use_cache", "continuous_batching_config"),
  *("assistant_temperature", "assistant_top_k", "assistant_top_p"),
)
_COMMON: Table = {
  "model_type": Honoured(TEXT, "chooses the family"),
  **dict.fromkeys(("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "architectures"), RECORD),
  **dict.fromkeys(("custom_pipelines", "transformers.js_config", "tokenizer_class", "base_model"), RECORD),
  **dict.fromkeys(("dtype", "torch_dtype"), Ignored("weights are read as float32 however they are stored")),
  **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict", "use_return_dict"), _OUTPUTS),
  **dict.fromkeys(("chunk_size_feed_forward", "torchscript", "use_bfloat16", "tf_legacy_loss"), _COMPUTATION),
  **dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"), _COMPUTATION),
  **dict.fromkeys(("_attn_implementation_internal", "_experts_implementation_internal"), _COMPUTATION),
  **dict.fromkeys(("experts_implementation", "_experts_implementation", "gradient_checkpointing"), _COMPUTATION),
  **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"), _HEAD),
  **dict.fromkeys(("task_specific_params", "prefix", *_GENERATION_NAMES), _GENERATION),
  "tie_word_embeddings": Ignored("only a head that predicts tokens would share the embeddings of tokens"),
  "is_encoder_decoder": Required((False, None), "which asks for two text models"),
  "is_decoder": Required((False, None), "which asks for a causal text model"),
  "add_cross_attention": Required((False, None), "which asks for attention to another model"),
  "tie_encoder_decoder": Required((False, None), "which asks for two text models"),
  "cross_attention_hidden_size": Required((None,), "which asks for attention to another model"),
  "pruned_heads": Required((None,), "which takes heads away"),
  "quantization_config": Required((None,), "which asks for quantized weights"),
  "auto_map": Required((None,), "which asks for code of the model's own"),
  "per_layer_config": Required((None,), "which asks for layers that differ"),
}
_TOWER: Table = {
  **_COMMON,
  "hidden_size": Honoured(COUNT, "transformer.width"),
  "intermediate_size": Honoured(COUNT, "transformer.mlp_dim"),
  "num_hidden_layers": Honoured(COUNT, "transformer.depth"),
  "num_attention_heads": Honoured(COUNT, "transformer.heads"),
  "hidden_act": Honoured(TEXT, "transformer.activation"),
  "layer_norm_eps": Honoured(EPS, "transformer.norm_eps"),
  **dict.fromkeys(("attention_dropout", "dropout", "initializer_range"), TRAINING),
  "initializer_factor": INITIAL,
}
_TEXT: Table = {
  **_TOWER,
  "vocab_size": Honoured(COUNT, "text.vocab_size"),
  "max_position_embeddings": Honoured(COUNT, "text.length"),
  "bos_token_id": Ignored("the tokenizer says what begins a caption"),
  "pad_token_id": Ignored("the tokenizer says what fills the row of a caption"),
  "sep_token_id": _GENERATION,
}
_VISION: Table = {
  **_TOWER,
  "num_channels": Honoured(COUNT, "image.channels"),
  "patch_size": Honoured(COUNT, "image.patch_size"),
  **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _GENERATION),
}
_MODEL: Table = {
  **_COMMON,
  "text_config": Honoured(optional(OBJECT), "the text tower"),
  "vision_config": Honoured(optional(OBJECT), "the image tower"),
  "initializer_factor": INITIAL,
  "logit_scale_init_value": INITIAL,
  # Of a tower where a file of version 4 repeats them for the whole model.
  **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _GENERATION),
  "hidden_size": Ignored("each tower has its own"),
  "initializer_range": TRAINING,
}
_CLIP: Table = {
  **_MODEL,
  "text_config_dict": Honoured(optional(OBJECT), "the text tower, in place of text_config"),
  "vision_config_dict": Honoured(optional(OBJECT), "the image tower, in place of vision_config"),
  "projection_dim": Honoured(COUNT, "embed_dim"),
}
# The second descriptions of the towers are CLIP's alone: `transformers` passes over them in a SigLIP.
_SIGLIP: Table = {
  **_MODEL,
  **dict.fromkeys(("text_config_dict", "vision_config_dict"), Required((None,), "which only a CLIP reads")),
}
_SIGLIP_VISION: Table = {
  **_VISION,
  "vision_use_head": Required((True,), "which takes away the pooling head that embeddings come from"),
}
_SIGLIP_TEXT: Table = {
  **_TEXT,
  "projection_size": Honoured(optional(COUNT), "embed_dim"),
  "eos_token_id": Ignored("embeddings are taken at the last position"),
}
# (whole model, text tower, image tower) of each family.
MODELS: dict[str, tuple[Table, Table, Table]] = {
  "clip": (
    _CLIP,
    {
      **_TEXT,
      "projection_dim": _OTHER_TOWER,
      "eos_token_id": Honoured(optional(_TOKEN_NUMBER), "text.pool"),
    },
    {**_VISION, "projection_dim": _OTHER_TOWER, "image_size": Honoured(COUNT, "image.image_size")},
  ),
  "siglip": (
    _SIGLIP,
    _SIGLIP_TEXT,
    {**_SIGLIP_VISION, "image_size": Honoured(COUNT, "image.image_size")},
  ),
  "siglip2": (
    _SIGLIP,
    _SIGLIP_TEXT,
    {
      **_SIGLIP_VISION,
      "num_patches": Honoured(COUNT, "image.image_size"),
      "image_size": Ignored("images are read at any aspect"),
    },
  ),
}
# What the towers of a family may call themselves.
TOWER_TYPES = {
  family: {f"{tower}_config": (f"{family}_{tower}_model", f"{family}_{tower}", family) for tower in ("text", "vision")}
  for family in MODELS
}
BERT: Table = {
  **_TEXT,
  "eos_token_id": _GENERATION,
  "type_vocab_size": Honoured(COUNT, "the first kind is added to every position"),
  "position_embedding_type": Required(("absolute",), "which asks for other positions"),
  **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), TRAINING),
}
# The files that sentence-transformers puts beside a text encoder.
POOLING: Table = {
  **dict.fromkeys(("word_embedding_dimension", "embedding_dimension"), Honoured(COUNT, "must be the tower's width")),
  "pooling_mode": Honoured(optional(TEXT), "text.pool"),
  **{
    f"pooling_mode_{name}": Honoured(FLAG, "text.pool")
    for name in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
  },
  "include_prompt": Ignored("without a prompt, which is refused, all tokens are pooled"),
}
MODULE: Table = {
  **dict.fromkeys(("idx", "name"), RECORD),
  "path": Honoured(TEXT, "the folder of the module's own config"),
  "type": Honoured(TEXT, "text.pool"),
  "kwargs": Required((None,), "which are options of a module"),
}
SENTENCE_ENCODER: Table = {
  "max_seq_length": Honoured(optional(COUNT), "text.length"),
  "do_lower_case": Required((False, None), "which lower-cases captions before the tokenizer reads them"),
  **dict.fromkeys(
    ("model_args", "config_args", "tokenizer_args", "processing_kwargs"),
    Required((None,), "which are options of another library"),
  ),
  **dict.fromkeys(("transformer_task", "modality_config", "module_output_name"), RECORD),
}
SENTENCES: Table = {
  "__version__": RECORD,
  "model_type": RECORD,
  "prompts": Ignored("a prompt is put before a sentence only where a caller names it"),
  "default_prompt_name": Required((None,), "which puts a prompt before every sentence"),
  "similarity_fn_name": Required(("cosine", "dot", None), "which compares embeddings by another measure"),
  "truncate_dim": Required((None,), "which cuts embeddings"),
}

_SIZE = Kind("a number of pixels, a pair of them, or an object", lambda value: isinstance(value, int | list | dict))
_IMAGES: Table = {
  "image_processor_type": Honoured(optional(TEXT), "chooses the defaults"),
  "feature_extractor_type": Honoured(optional(TEXT), "chooses the defaults, where image_processor_type is not given"),
  **dict.fromkeys(("processor_class", "transformers_version", "_processor_class", "_valid_processor_keys"), RECORD),
  "auto_map": Required((None,), "which asks for code of the model's own"),
  # The image processors take null for false here, and not for their default.
  "do_resize": Required((True,), "which leaves pictures at their own size"),
  "resample": Honoured(optional(ANY), "image.interpolation"),
  "do_rescale": Honoured(FLAG, "image.mean and image.std"),
  "rescale_factor": Honoured(optional(POSITIVE), "image.mean and image.std"),
  "do_normalize": Honoured(FLAG, "image.mean and image.std"),
  "image_mean": Honoured(optional(CHANNELS), "image.mean"),
  "image_std": Honoured(optional(CHANNELS), "image.std"),
  "do_convert_rgb": Ignored("pictures that are not RGB are converted here, and could not be embedded there"),
  "do_pad": Required((False, None), "which pads pictures"),
  "pad_size": Required((None,), "which pads pictures"),
  "max_size": Required((None,), "which bounds the longer side"),
  "crop_pct": Required((None,), "which cuts out a part of the picture"),
  "use_square_size": Required((False, None), "which squeezes pictures"),
  "image_seq_length": Ignored("models that write about pictures read it"),
  "data_format": Required(("channels_first", None), "which is an order of axes that the model does not read"),
  "input_data_format": Ignored("it says how arrays are given there; here they are height, width and channels"),
  **dict.fromkeys(("device", "return_tensors", "disable_grouping"), _COMPUTATION),
}
# By the class of the image processor, without the suffix of its implementation.
PREPROCESSING: dict[str, Table] = {
  "CLIPImageProcessor": {
    **_IMAGES,
    "size": Honoured(optional(_SIZE), "image.resize"),
    "crop_size": Honoured(optional(_SIZE), "image.resize"),
    "do_center_crop": Honoured(FLAG, "image.resize"),
    "default_to_square": Required((False, None), "which squeezes pictures"),
  },
  "SiglipImageProcessor": {
    **_IMAGES,
    "size": Honoured(optional(_SIZE), "image.resize"),
    "crop_size": Ignored("pictures are not cut"),
    "do_center_crop": Required((False, None), "which cuts out the middle"),
    "default_to_square": Required((True, None), "which leaves the aspect of pictures as it is"),
  },
  "Siglip2ImageProcessor": {
    **_IMAGES,
    "patch_size": Honoured(optional(COUNT), "must be the image tower's"),
    "max_num_patches": Honoured(optional(COUNT), "the length of a row of patches"),
    **dict.fromkeys(("size", "crop_size"), Ignored("pictures keep their aspect")),
    "do_center_crop": Required((False, None), "which cuts out the middle"),
    "default_to_square": Ignored("pictures keep their aspect"),
  },
}
PROCESSOR: Table = {
  "image_processor": Honoured(optional(OBJECT), "the preprocessing"),
  "processor_class": RECORD,
  "auto_map": Required((None,), "which asks for code of the model's own"),
  "tokenizer": Required((None,), "which is not where tokenizers are kept"),
}
# The class of each family, which reads files that do not name one.
PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "siglip2": "Siglip2ImageProcessor"}
