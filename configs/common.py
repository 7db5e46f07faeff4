"""The fields that every run has, with their defaults. A config starts from here and sets what differs."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from contrastive_jax import upgrades
from contrastive_jax.errors import UserError, require_known
from contrastive_jax.models import presets
from contrastive_jax.objectives import term_options
from contrastive_jax.schedule.stages import Stage
from data.augment import STRONG, Augment
from data.emoji import CaptionMix
from data.text_augment import TextAugment


class _Model(ConfigDict):
  """A model whose image tower is also found under `vision`, its name in config files of older versions."""

  def __getitem__(self, key: str) -> Any:
    return super().__getitem__(upgrades.tower(key))


def model(preset: str, **overrides: Any) -> ConfigDict:
  """Returns a preset as a config whose every field can be overridden on the command line.

  Args:
    preset: a name in `contrastive_jax.models.presets.PRESETS`.
    **overrides: nested as the preset is: `image={"transformer": {"width": 192}}`.
  """
  return _Model(as_config(presets.resolve(preset, upgrades.overrides(overrides))))


def stage(name: str, steps: int, **overrides: Any) -> ConfigDict:
  """Returns a stage of `config.curriculum`; see `contrastive_jax.schedule.stages.Stage` for its fields."""
  known = [field.name for field in dataclasses.fields(Stage)]
  for field in overrides:
    require_known(f"stage '{name}': field", field, known)
  return as_config(Stage(name, steps, **overrides))


def as_config(node: Any) -> ConfigDict:
  """Returns a dataclass as a config with the same fields."""
  hints = typing.get_type_hints(type(node))
  config = ConfigDict()
  for field in dataclasses.fields(node):
    if field.name == "dtype":  # `compute_dtype` of the run.
      continue
    value = getattr(node, field.name)
    if dataclasses.is_dataclass(value):
      value = as_config(value)
    elif isinstance(value, dict):
      value = ConfigDict(value)
    elif isinstance(value, tuple):
      value = tuple(as_config(item) if dataclasses.is_dataclass(item) else item for item in value)
    config[field.name] = _typed(value, hints[field.name])
  return config


def tempered(samples: Mapping[str, int], temperature: float) -> dict[str, float]:
  """Returns weights of sources for `config.data.sources` by their numbers of samples.

  Args:
    samples: number of samples of each source.
    temperature: 1 draws every sample equally often; the larger it is, the more equally sources are drawn. The weight is
      the number of samples to the power of 1 / temperature (Arivazhagan et al., arXiv 1907.05019).

  Examples:
    >>> tempered({"a": 10_000, "b": 100}, temperature=2)
    {'a': 100.0, 'b': 10.0}
  """
  if not 0 < temperature < float("inf") or not all(count > 0 for count in samples.values()):
    raise UserError(f"{samples=} and {temperature=} must be above 0, and the temperature finite")
  return {name: float(count) ** (1 / temperature) for name, count in samples.items()}


def loss_options() -> ConfigDict:
  """Returns the options of every term at their defaults; `contrastive_jax.objectives` explains them."""
  return ConfigDict(
    {
      term: {name: _typed(option.default, option.type) for name, option in options.items()}
      for term, options in term_options().items()
    }
  )


def _typed(value: Any, hint: Any) -> Any:
  """Gives a field a type even where it is None, so that the command line can give it a value."""
  if value is not None:
    return value
  kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
  if typing.get_origin(kinds[0]) is typing.Literal:
    return config_dict.placeholder(type(typing.get_args(kinds[0])[0]))
  return config_dict.placeholder(kinds[0])


def get_config() -> ConfigDict:
  config = ConfigDict()

  config.name = ""  # The name of the model in results and in the report; that of the run directory if empty.
  config.seed = 0
  config.total_steps = 10_000
  config.batch_size = 1024  # Number of pairs in a step, over all devices and hosts.
  config.accumulation = 1  # Micro-batches in a step: one loss over all of them, with the activations of one in memory.
  config.loss = "sigmoid"  # A name in contrastive_jax.objectives.TERMS.
  # A weighted sum of losses in place of `loss`, name -> weight: {"sigmoid": 1.0, "alignment": 0.1}.
  config.objective = ConfigDict()
  # Type of the embeddings that the loss exchanges and multiplies; its logits and sums are float32 either way.
  config.loss_dtype = "float32"
  config.loss_options = loss_options()  # Options of each loss, such as loss_options.softmax.label_smoothing.
  config.model = model("siglip_b16")
  config.compute_dtype = "bfloat16"  # Type in which matrices are multiplied; parameters stay float32.
  config.max_logit_scale = 100.0
  config.frozen = ()  # Regular expressions of parameters that do not train: ("image/",) trains the text tower alone.
  config.init_from = ""  # A run, or imported weights.
  # Where the model comes from: "init_from" takes that of the weights, "config" keeps `model`, "auto" takes theirs where
  # `model` is as it stands here.
  config.init_model = "auto"
  config.init_towers = "all"  # "all", "image" or "text": what is taken from `init_from`.

  config.optimizer = ConfigDict()
  config.optimizer.name = "adamw"  # "adamw", "lion", "adafactor", "muon".
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 1.0  # Largest global norm of the gradient; 0 does not clip.
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-6  # Used by AdamW, and by both parts of Muon.
  config.optimizer.adafactor_decay = 0.8  # Exponent of Adafactor's second-moment decay.
  config.optimizer.muon_learning_rate = 0.01  # Rate for matrices; AdamW at `learning_rate` trains all other parameters.
  config.optimizer.muon_beta = 0.95
  config.optimizer.muon_rms = 0.2  # Root mean square of Muon's update at rate 1; 0.2 is about that of Adam.

  config.schedule = ConfigDict()
  config.schedule.name = "cosine"  # "cosine", "linear", "rsqrt", "constant", "cooldown".
  config.schedule.warmup_steps = 500
  config.schedule.end_factor = 0.0  # Final learning rate over the peak, for cosine and linear.
  config.schedule.timescale = 10_000  # Steps over which rsqrt begins to decay.
  config.schedule.cooldown_steps = 0  # Final steps that decay to 0, for rsqrt, constant and cooldown.
  # What follows when total_steps of a run grows: "hold" keeps the final rate, "restart" repeats warm-up and decay over
  # the added steps, "stretch" spreads the schedule over all steps, which makes the rate leap.
  config.schedule.on_growth = "hold"

  config.average_decay = 0.0  # Decay of the moving average of the parameters that is evaluated; 0 keeps no average.

  config.tokenizer = ConfigDict()
  # "bpe" trains a tokenizer on the captions of up to a million of the run's records; or "file:tokenizer.json",
  # "sentencepiece:X.model", "clip:X.txt.gz".
  config.tokenizer.spec = "bpe"
  config.tokenizer.lowercase = True  # Whether "bpe" lowers capitals. This field and the next are for "bpe" alone.
  config.tokenizer.straight_quotes = False  # Whether curly quotes become straight ones, as in open_clip.

  config.data = ConfigDict()
  # Name -> weight: {"noto": 1.0}, {"tfds/coco_captions": 1.0}. A name with a dot is a value, under a label of your own:
  # {"coco": {"name": "tfds/coco_captions:1.1.0", "weight": 1.0}}. Such an entry may give the set options of its own
  # in place of the fields below: image_key, caption_key, split, templates (for class names), flip; see data/kinds.py.
  # Pairs of your own are "table/photos/captions.csv" and "folder/photos"; see configs/own_pairs.py.
  config.data.sources = ConfigDict()
  config.data.data_dir = ""  # Directory of the TFDS sets; empty is TFDS's default.
  config.data.image_key = "image"  # Feature of TFDS sets, or column of tables, that holds the image.
  config.data.caption_key = "caption"  # Feature or column that holds the caption, a list of captions, or a class.
  config.data.captions = as_config(CaptionMix())  # Shares of the kinds of captions that emoji sources give.
  # What is read of a caption that is longer than the text tower reads: "truncate" its beginning, "sentence" one of its
  # sentences, "span" all from one of its sentences on; each time the sample is drawn another.
  config.data.long_captions = "truncate"
  config.data.swap_words = False  # Whether hard captions that a sample lacks are its caption with two words exchanged.
  # Folder of clusters that data.cluster wrote; each batch is then of one source and one of its clusters. Empty draws
  # batches from all samples.
  config.data.clusters = ""
  # Pairs that each drawn image makes, in consecutive rows and with different captions where it has several; they are
  # never each other's negatives.
  config.data.captions_per_image = 1
  # Share of the patches of each image, or clip, that are dropped at random in training (FLIP): the image tower reads so
  # many fewer tokens. A stage of the curriculum may have a share of its own.
  config.data.drop_patches = 0.0
  config.data.augment = as_config(Augment())
  # The views that strong_views, among the losses, compares beside these.
  config.data.strong_augment = as_config(STRONG)
  config.data.text_augment = as_config(TextAugment())
  config.data.threads = 8
  config.data.workers = 0  # Processes that read and decode; 0 reads in `threads` threads of the run's own process.
  config.data.prefetch_bytes = 256 * 2**20  # Memory for batches that are read ahead.
  config.data.cache_bytes = 0  # Bytes of files of other machines that are kept on this one; 0 keeps none.
  config.data.cache_dir = ""  # The folder for them; empty is contrastive_jax in the user's folder for caches.
  config.data.max_bad_share = 0.1  # A run stops when a larger share of its records cannot be read.

  config.data.pack_pairs = 0  # Consecutive pairs whose images, clips or captions share rows; 0 packs nothing.
  config.data.text_rows = 0  # Rows that the captions of a pack share; 0 gives each a padded row of `model.text.length`.
  config.data.text_row_length = 0  # Length of these rows in tokens.

  config.curriculum = ()  # Stages, see `stage`; empty is one stage at the resolution of the image tower.

  config.distillation = ConfigDict()
  config.distillation.teacher = ""  # A run, whose model embeds every batch beside this one.
  config.distillation.targets = ""  # In its place, the folder that distill.py wrote.
  config.distillation.replay = ()  # Sources that the teacher has learned, for distill_positives; empty is all.
  config.distillation.dim = 0  # Size of the teacher's embeddings, for plan.py where it is not; 0 reads it from there.

  config.mesh = ConfigDict()
  config.mesh.data = -1  # Number of devices on each axis; one axis may be -1, which gets all remaining devices.
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.log_every = 50
  config.log_sample_ids = False  # Whether sample_ids.jsonl lists the ids of every batch.
  config.checkpoint_every = 1000
  config.checkpoint_keep_last = 3
  config.checkpoint_keep_every = 0  # Checkpoints at multiples of this step are kept for good; 0 keeps none.
  config.eval_every = 0
  config.evals = ()  # Tasks evaluated every `eval_every` steps and at the end.
  config.final_evals = ()  # Tasks evaluated at the end only.
  # What a loss, gradient or parameter that is not finite does: "stop" the run, or "skip" the update.
  config.on_nonfinite = "stop"
  # The run ends after more skipped updates in a row than this, or when more than this and a tenth of all are skipped.
  config.max_skipped_steps = 10
  config.profile_steps = ()  # First and last update of a jax.profiler trace, such as (10, 12).
  # A second place for the run, s3://bucket/folder, gs://bucket/folder or a folder: checkpoints and results are copied
  # there, and a start in an empty run directory goes on from them. Empty keeps none; see docs/buckets.md.
  config.workdir_mirror = ""
  config.wandb_project = ""  # Project of Weights & Biases that also gets the metrics; empty sends nothing.
  return config
