"""Options of foreign configs, tokenizers and image processors: each is honoured, harmless, or refused by its name."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.interop import huggingface_options, open_clip_options, options, tokenizer_options
from tests.interop.checkpoints import read

TABLES = {
  **{
    f"{family}.{part}": table
    for family, tables in huggingface_options.MODELS.items()
    for part, table in zip(("model", "text", "image"), tables, strict=True)
  },
  **huggingface_options.PREPROCESSING,
  "bert": huggingface_options.BERT,
  "open_clip": open_clip_options.MODEL,
  "open_clip.text": open_clip_options.TEXT_TOWER,
  "open_clip.image": open_clip_options.VISION,
  "open_clip.timm": open_clip_options.TIMM,
  "open_clip.preprocess": open_clip_options.PREPROCESSING,
  "tokenizer": tokenizer_options.SETTINGS,
}


@pytest.fixture
def edited(sources, tmp_path):
  """Copies the checkpoint of a family with options of one of its files set; the value `...` removes one."""

  def make(family: str, file: str, path: str, value):
    folder = tmp_path / family
    shutil.copytree(sources[family], folder, dirs_exist_ok=True)
    described = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    node, *names = described, *path.split("/")
    for name in names[:-1]:
      node = node.setdefault(name, {}) if isinstance(node, dict) else node[int(name)]
    if value is ...:
      del node[names[-1]]
    else:
      node[names[-1]] = value
    (folder / file).write_text(json.dumps(described))
    return folder

  return make


@pytest.mark.parametrize("name", TABLES)
def test_no_option_is_known_without_what_becomes_of_it(name):
  for option, found in TABLES[name].items():
    told = found.how if isinstance(found, options.Honoured) else found.why
    assert told, option


@pytest.mark.parametrize("name", TABLES)
def test_an_option_that_is_misspelt_is_refused_with_the_right_one(name):
  # Every fifth, since looking for the nearest of a hundred names takes a while.
  for option in sorted(TABLES[name])[::5]:
    with pytest.raises(UserError, match=rf"unknown option part\.{option}_x=1 \(did you mean '"):
      options.check({f"{option}_x": 1}, TABLES[name], source="it", within="part")


CONFIG, SEEN, SETTINGS, TOKENS = "config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"
# Ways to put a caption together that make no sense, since a text tower reads one caption and takes it at its end.
_CAPTION, _EOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}
EOS_FIRST, CAPTION_TWICE = [_EOS, _CAPTION, _EOS], [_CAPTION, _CAPTION, _EOS]
REFUSED = [
  ("clip", CONFIG, "hidden_act", "gelu", "unknown option hidden_act"),
  ("clip", CONFIG, "text_config/hiden_size", 16, r"text_config\.hiden_size=16 \(did you mean 'hidden_size'\?\)"),
  ("clip", CONFIG, "text_config/hidden_act", "relu", "hidden_act='relu'"),
  ("clip", CONFIG, "text_config/hidden_act", 3, "text_config.hidden_act=3, which must be a text"),
  ("clip", CONFIG, "text_config/layer_norm_eps", 0, "layer_norm_eps=0, which must be a number above 0"),
  ("clip", CONFIG, "text_config/layer_norm_eps", float("nan"), "layer_norm_eps=nan"),
  ("siglip2", CONFIG, "vision_config/layer_norm_eps", 10**12, "must be a number above 0 and below 1"),
  ("clip", CONFIG, "text_config/eos_token_id", 7, "text_config.eos_token_id=7 and its tokenizer ends captions with"),
  ("clip", CONFIG, "text_config/eos_token_id", 2, "takes embeddings at the largest token"),
  ("clip", CONFIG, "vision_config/num_attention_heads", 3, "heads=3 must divide"),
  ("clip", CONFIG, "vision_config/num_hidden_layers", True, "num_hidden_layers=True"),
  ("clip", CONFIG, "vision_config/num_hidden_layers", 10**12, "num_hidden_layers=1000000000000"),
  ("clip", CONFIG, "vision_config/model_type", "siglip_vision_model", "vision_config.model_type='siglip_vision_model'"),
  ("clip", CONFIG, "quantization_config", {"bits": 4}, "quantized weights"),
  ("clip", CONFIG, "auto_map", {"AutoModel": "x.Y"}, "code of the model's own"),
  ("clip", CONFIG, "pruned_heads", {"1": [0]}, "pruned_heads"),
  ("clip", CONFIG, "text_config/is_decoder", True, "text_config.is_decoder=True"),
  ("clip", CONFIG, "text_config/add_cross_attention", True, "add_cross_attention=True"),
  ("clip", CONFIG, "text_config", [1], r"text_config=\[1\]"),
  ("clip", CONFIG, "model_type", 3, "model_type of .*'3' is unknown"),
  ("siglip", CONFIG, "vision_config/vision_use_head", False, "vision_use_head=False"),
  ("siglip", CONFIG, "text_config/projection_size", 8, "projection_size=8"),
  ("siglip2", CONFIG, "vision_config/num_patches", 15, "num_patches=15, which must be a square"),
  # `transformers` passes over the second description of a tower in all families but CLIP's.
  ("siglip", CONFIG, "text_config_dict", {"num_attention_heads": 4}, "text_config_dict=.*which only a CLIP reads"),
  ("siglip2", CONFIG, "vision_config_dict", {"layer_norm_eps": 0.1}, "vision_config_dict=.*which only a CLIP reads"),
  ("clip", CONFIG, "text_config/eos_token_id", True, "eos_token_id=True, which must be a token's number"),
  # The tokenizer's own limit would cut a table of the default size to that of the weights.
  ("clip", CONFIG, "text_config/max_position_embeddings", ..., "max_position_embeddings=77 and 5 positions"),
  ("bert", CONFIG, "max_position_embeddings", 40, "max_position_embeddings=40 and 12 positions"),
  ("clip", SEEN, "rescale_factor", 1e300, "make no usable numbers of pixels"),
  ("clip", SEEN, "rescale_factor", 1e-40, "make no usable numbers of pixels"),
  ("siglip", SEEN, "image_mean", [0.5, 0.5, -1e300], "make no usable numbers of pixels"),
  ("siglip2", SEEN, "image_std", 1e-30, "make no usable numbers of pixels"),
  ("siglip", SEEN, "size", 16, "size=16"),
  ("clip", SEEN, "do_resize", False, "do_resize=False"),
  # null is false to the image processors, and not their default.
  ("clip", SEEN, "do_resize", None, "do_resize=None"),
  ("siglip", SEEN, "do_resize", None, "do_resize=None"),
  ("clip", SEEN, "do_rescale", None, "do_rescale=None"),
  ("siglip2", SEEN, "do_normalize", None, "do_normalize=None"),
  ("clip", SEEN, "do_center_crop", None, "do_center_crop=None"),
  # The class's own default is 224, whatever the model reads.
  ("clip", SEEN, "size", ..., "size=224, crop_size=.*image_size=16"),
  ("siglip", SEEN, "size", ..., "size=224"),
  ("clip", SEEN, "crop_size", ..., "crop_size=224"),
  ("clip", "tokenizer.json", "post_processor/single", EOS_FIRST, "before the end of captions"),
  ("clip", "tokenizer.json", "post_processor/single", CAPTION_TWICE, "must hold the caption once"),
  ("clip", "tokenizer.json", "post_processor/single", CAPTION_TWICE[2:], "must hold the caption once"),
  ("clip", SEEN, "do_pad", True, "do_pad=True"),
  ("clip", SEEN, "resample", 1, "resample=1, known are 2"),
  ("clip", SEEN, "resample", {}, "resample="),
  ("clip", SEEN, "size", {"longest_edge": 16}, "longest_edge"),
  ("clip", SEEN, "size", {"shortest_edge": 20}, "shortest_edge"),
  ("clip", SEEN, "crop_size", {"height": 16, "width": 12}, "'width': 12"),
  ("clip", SEEN, "crop_pct", 0.9, "crop_pct=0.9"),
  ("clip", SEEN, "image_mean", [0.5, 0.5], "num_channels=3 values"),
  ("clip", SEEN, "image_std", [0.5, 0.5, 0], "image_std=.*must be above 0"),
  ("clip", SEEN, "image_std", ["a"], "which must be a number or one number a channel"),
  ("clip", SEEN, "rescale_factor", 0, "rescale_factor=0"),
  ("clip", SEEN, "image_processor_type", "ViTImageProcessor", "image_processor_type='ViTImageProcessor'"),
  ("clip", SEEN, "do_centre_crop", True, r"did you mean 'do_center_crop'\?"),
  ("siglip", SEEN, "do_center_crop", True, "do_center_crop=True"),
  ("siglip2", SEEN, "patch_size", 8, "patch_size=8 in its preprocessing"),
  ("siglip2", SEEN, "max_num_patches", 0, "max_num_patches=0"),
  ("clip", "processor_config.json", "image_processor/do_resize", False, "do_resize=True in preprocessor_config.json"),
  ("clip", "processor_config.json", "image_procesor", {}, r"did you mean 'image_processor'\?"),
  ("clip", SETTINGS, "model_max_length", 4.5, "model_max_length=4.5, which must be a whole number"),
  ("clip", SETTINGS, "padding_side", "left", "padding_side='left'"),
  ("clip", SETTINGS, "truncation_side", "left", "truncation_side='left'"),
  ("clip", SETTINGS, "eos_token", "<end>", "eos_token='<end>'"),
  ("clip", SETTINGS, "bos_token", "<eos>x", "bos_token='<eos>x'"),
  ("clip", SETTINGS, "add_bos_token", True, "add_bos_token=True"),
  ("clip", SETTINGS, "additional_special_tokens", ["<new>"], "additional_special_tokens='<new>'"),
  ("clip", SETTINGS, "extra_special_tokens", {"image": "<image>"}, "extra_special_tokens='<image>'"),
  ("clip", SETTINGS, "added_tokens_decoder", {"0": {"content": "<eos>"}}, r"added_tokens_decoder\.0"),
  ("clip", SETTINGS, "added_tokens_decoder", {"x": 1}, "added_tokens_decoder"),
  ("clip", SETTINGS, "tokenizer_class", "MarianTokenizer", "tokenizer_class='MarianTokenizer'"),
  ("clip", SETTINGS, "tokenizer_class", "GPT2Tokenizer", "tokenizer_class='GPT2Tokenizer'"),
  ("bert", SETTINGS, "tokenizer_class", "LlamaTokenizerFast", "tokenizer_class='LlamaTokenizer'"),
  ("clip", SETTINGS, "do_lower_case", False, "do_lower_case=False"),
  ("clip", SETTINGS, "sp_model_kwargs", {"enable_sampling": True}, "sp_model_kwargs"),
  ("clip", SETTINGS, "never_splits", ["a"], r"did you mean 'never_split'\?"),
  ("clip", "special_tokens_map.json", "pad_token", "<fill>", "pad_token='<fill>' in special_tokens_map"),
  ("clip", "special_tokens_map.json", "sep_token", "<sep>", "sep_token='<sep>'"),
  ("clip", "added_tokens.json", "<eos>", 7, "'<eos>': 7, and the tokenizer 1"),
  ("clip", "added_tokens.json", "<new>", 400, "'<new>': 400"),
  ("clip", TOKENS, "added_tokens/1/id", 7, "the number 7"),
  ("clip", TOKENS, "model/dropout", 0.1, "splits words at random"),
  ("clip", TOKENS, "addd_tokens", [], r"did you mean 'added_tokens'\?"),
  ("clip", TOKENS, "model/type", "Bag", "cannot be read as file"),
  ("clip", TOKENS, "post_processor/special_tokens/<eos>/ids", [99999], "token 99999 of captions"),
  ("clip", TOKENS, "post_processor/special_tokens", {}, "cannot be read as file"),
  ("open_clip", "open_clip_config.json", "model_cfg/vision_cfg/pool_type", "avg", "vision_cfg.pool_type='avg'"),
  ("open_clip", "open_clip_config.json", "model_cfg/vision_cfg/pool_typ", "avg", r"did you mean 'pool_type'\?"),
  ("open_clip", "open_clip_config.json", "model_cfg/text_cfg/eos_id", 9, "text_cfg.eos_id=9"),
  ("open_clip", "open_clip_config.json", "model_cfg/text_cfg/pool_type", "argmax", "pool_type='argmax'"),
  ("open_clip", "open_clip_config.json", "model_cfg/text_cfg/tokenizer_kwargs", {"clean": "strip"}, "clean='strip'"),
  ("open_clip", "open_clip_config.json", "model_cfg/text_cfg/ls_init_value", 0.1, "layer scale"),
  ("open_clip", "open_clip_config.json", "model_cfg/vision_cfg/layers", [3, 4, 6, 3], "ResNet"),
  ("open_clip", "open_clip_config.json", "preprocess_cfg/resize_mode", "longest", "resize_mode='longest'"),
  ("open_clip", "open_clip_config.json", "preprocess_cfg/size", 20, "preprocess_cfg.size=20"),
  ("open_clip", "open_clip_config.json", "preprocess_cfg/mode", "L", "preprocess_cfg.mode='L'"),
  ("open_clip", "open_clip_config.json", "preproces_cfg", {}, r"did you mean 'preprocess_cfg'\?"),
  ("bert", CONFIG, "position_embedding_type", "relative_key", "position_embedding_type='relative_key'"),
  ("bert", CONFIG, "hidden_act", "silu", "hidden_act='silu'"),
  ("bert", CONFIG, "is_decoder", True, "is_decoder=True"),
  ("bert", "1_Pooling/config.json", "word_embedding_dimension", 32, "pools vectors of 32 numbers"),
  ("bert", "1_Pooling/config.json", "pooling_mode_max_tokens", True, "pooling_mode_max_tokens"),
  ("bert", "1_Pooling/config.json", "pooling_mode_mean_tokens", False, "does not pool"),
  ("bert", "modules.json", "0/path", "sub", "in the folder 'sub'"),
  ("bert", "modules.json", "1/type", "x.Dense", "Dense"),
  ("bert", "sentence_bert_config.json", "do_lower_case", True, "do_lower_case=True"),
  ("bert", "sentence_bert_config.json", "max_seq_len", 8, r"did you mean 'max_seq_length'\?"),
  ("bert", "config_sentence_transformers.json", "default_prompt_name", "query", "default_prompt_name='query'"),
  ("bert", SETTINGS, "strip_accents", False, "strip_accents=False"),
  ("bert", SETTINGS, "tokenize_chinese_chars", False, "tokenize_chinese_chars=False"),
  ("bert", SETTINGS, "cls_token", "[SEP]", r"cls_token='\[CLS\]' in special_tokens_map"),
  ("bert", TOKENS, "normalizer/lowercase", False, "do_lower_case=True"),
  ("bert", TOKENS, "normalizer/clean_text", False, "clean_text=False .*has clean_text=True"),
  ("bert", TOKENS, "normalizer", {"type": "NFC"}, "tokenize_chinese_chars=True"),
  ("bert", TOKENS, "pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer is Whitespace.*'PreTrainedTokenizerFast'"),
  ("bert", TOKENS, "pre_tokenizer", None, "pre_tokenizer is None"),
  ("bert", TOKENS, "model/max_input_chars_per_word", 3, r"model\.max_input_chars_per_word=3"),
  ("bert", TOKENS, "model/continuing_subword_prefix", "@@", r"model\.continuing_subword_prefix='@@'"),
  ("bert", TOKENS, "post_processor", None, "no token before a caption, and tokenizer_class='BertTokenizer'"),
  ("bert", TOKENS, "padding/direction", "Left", "padding.direction='Left'"),
  ("pieces", SETTINGS, "eos_token", "<unk>", "eos_token='<unk>'"),
  ("pieces", SETTINGS, "pad_token", "<fill>", "no token '<fill>' for padding"),
  ("pieces", SETTINGS, "add_bos_token", True, "add_bos_token=True"),
  ("pieces", SETTINGS, "add_eos_token", False, "add_eos_token=False"),
  ("pieces", "added_tokens.json", "<extra>", 32000, "'<extra>': 32000"),
  ("merges", "vocab.json", "do", 3, "differ in 'do'"),
  ("merges", "vocab.json", "new", 999, "differ in 'new'"),
  ("merges", SETTINGS, "eos_token", "</s>", "eos_token='</s>'"),
  ("pieces", SETTINGS, "eos_token", "", "eos_token='', which must be a token"),
  ("pieces", SETTINGS, "pad_token", "", "pad_token='', which must be a token"),
  ("merges", SETTINGS, "do_lower_case", False, "do_lower_case=False"),
  ("merges", CONFIG, "text_config/eos_token_id", 49407, "eos_token_id=49407"),
  ("open_clip", "open_clip_config.json", "model_cfg/multimodal_cfg", {"width": 8}, "CoCa"),
]


@pytest.mark.parametrize(("family", "file", "path", "value", "message"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(family, file, path, value, message, edited, capfd):
  with pytest.raises(UserError, match=message) as raised:
    read(family, edited(family, file, path, value))
  assert "\n" not in str(raised.value)
  assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("named", [True, False])
def test_berts_settings_that_no_file_gives_are_those_of_its_class(named, edited, sources):
  folder = edited("bert", TOKENS, "normalizer/lowercase", False)
  settings = json.loads((folder / SETTINGS).read_text())
  del settings["do_lower_case"]
  settings["tokenizer_class"] = "BertTokenizer" if named else None
  (folder / SETTINGS).write_text(json.dumps(settings))
  with pytest.raises(UserError, match=r"lowercase=False in its tokenizer\.json, and .* has do_lower_case=True"):
    read("bert", folder)
  (folder / SETTINGS).write_text(json.dumps(settings | {"do_lower_case": False}))
  tokens, _ = read("bert", folder).tokenizer(["A dog", "a dog"], 8)
  assert (tokens[0] != tokens[1]).any()


HARMLESS = [
  ("clip", CONFIG, "text_config/attention_dropout", 0.3),
  ("clip", CONFIG, "logit_scale_init_value", 1.0),
  ("clip", CONFIG, "transformers_version", "9"),
  ("clip", CONFIG, "text_config/pad_token_id", 3),
  ("clip", CONFIG, "text_config/temperature", 0.7),
  ("clip", CONFIG, "torch_dtype", "float16"),
  ("clip", CONFIG, "initializer_factor", 2.0),
  ("siglip", CONFIG, "text_config/eos_token_id", 49407),
  ("clip", SEEN, "do_convert_rgb", False),
  ("clip", SETTINGS, "clean_up_tokenization_spaces", True),
  ("clip", SETTINGS, "chat_template", "x"),
  ("open_clip", "open_clip_config.json", "model_cfg/init_logit_scale", 1.0),
  ("open_clip", "open_clip_config.json", "model_cfg/vision_cfg/patch_dropout", 0.5),
  ("open_clip", "open_clip_config.json", "preprocess_cfg/fill_color", 3),
]


@pytest.mark.parametrize(("family", "file", "path", "value"), HARMLESS)
def test_what_has_no_effect_on_embeddings_changes_nothing(family, file, path, value, edited, sources):
  found, plain = read(family, edited(family, file, path, value)), read(family, sources[family])
  assert found.config == plain.config
  assert found.tokenizer.fingerprint == plain.tokenizer.fingerprint
  jax.tree.map(np.testing.assert_array_equal, found.params, plain.params)


@pytest.mark.parametrize(
  ("name", "ours"), [("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("gelu_python", "gelu")]
)
def test_activations_have_several_names(name, ours, edited):
  found = read("clip", edited("clip", CONFIG, "vision_config/hidden_act", name))
  assert found.config.image.transformer.activation == ours


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"rescale_factor": 1 / 127.5}, lambda p, mean, std: (p / 127.5 - mean) / std),
    ({"do_rescale": False}, lambda p, mean, std: (p - mean) / std),
    ({"do_normalize": False}, lambda p, mean, std: p / 255),
    ({"do_normalize": False, "do_rescale": False}, lambda p, mean, std: p),
    ({"image_mean": 0.25, "image_std": 0.75}, lambda p, mean, std: (p / 255 - 0.25) / 0.75),
  ],
)
def test_pixels_are_scaled_as_the_file_says(change, expected, edited, sources):
  plain = read("clip", sources["clip"]).config.image
  folder = edited("clip", SEEN, "do_convert_rgb", True)
  described = json.loads((folder / SEEN).read_text()) | change
  (folder / SEEN).write_text(json.dumps(described))
  vision = read("clip", folder).config.image
  pixels = np.array([0.0, 1.0, 100.0, 255.0])[:, None]
  found = (pixels / 255 - np.float64(vision.mean)) / np.float64(vision.std)
  np.testing.assert_allclose(found, expected(pixels, np.float64(plain.mean), np.float64(plain.std)) + 0 * found)


def test_a_sentence_encoder_keeps_the_length_and_pooling_of_its_files(sources):
  found = read("bert", sources["bert"])
  assert (found.config.text.length, found.config.text.pool) == (8, "mean")
  assert found.params["text"]["position"].shape == (8, 16)


def test_a_tokenizer_that_cuts_captions_cuts_the_table_of_positions(edited, sources):
  plain = read("clip", sources["clip"])
  found = read("clip", edited("clip", SETTINGS, "model_max_length", 3))
  assert found.config.text == dataclasses.replace(plain.config.text, length=3)
  np.testing.assert_array_equal(found.params["text"]["position"], plain.params["text"]["position"][:3])
  assert read("clip", edited("clip", SETTINGS, "model_max_length", 10**30)).config == plain.config


def test_patches_that_a_file_does_not_say_are_those_of_the_class(edited, sources):
  assert read("siglip2", sources["siglip2"]).lengths == (16,)
  assert read("siglip2", edited("siglip2", SEEN, "max_num_patches", ...)).lengths == (256,)
