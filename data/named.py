"""Flags by which a command takes any set by the name that it has in `config.data.sources`, and its options."""

import os

from absl import flags

from configs import common
from contrastive_jax.errors import UserError
from data import kinds
from data.files import is_local
from data.sources.pictures import StoredPictures

IMAGE_KEY = flags.DEFINE_string("image_key", "", "Field of the picture, of TFDS sets and tables.")
CAPTION_KEY = flags.DEFINE_list("caption_key", [], "Field of the captions, or several, whose captions are joined.")
ROOT = flags.DEFINE_string("root", "", "Folder that the paths of a table start from; that of the table if not given.")
FILTER = flags.DEFINE_string("filter", "", "Samples to keep, such as 'similarity > 0.28'; all if not given.")
INDEX = flags.DEFINE_string("index", "", "Folder of the index of a set in shards; beside its files if not given.")
GROUP_KEY = flags.DEFINE_string(
  "group_key", "", "Column of what a picture of a set in shards shows, such as a product."
)
CLASSES = flags.DEFINE_string("classes", "", "File of the names of classes, one a line, of sets in shards.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS's directory of sets.")
# Flags that are options of a set as they stand.
_OF_A_SET = (IMAGE_KEY, ROOT, FILTER, INDEX, GROUP_KEY, CLASSES)
ALL = (*_OF_A_SET, CAPTION_KEY, DATA_DIR)
# The sets that no path names.
_NO_PATHS = "tfds/"
_OTHER = "name a set such as table/<file>, folder/<folder>, parquet/<files> or tfds/<set>"


def open_named(name: str, whole: bool = False) -> tuple[StoredPictures, dict[str, str]]:
  """Opens the set of a name with the options that the flags give it.

  Args:
    name: the name, such as "table/photos.csv@train".
    whole: whether the paths in it are made absolute, for processes that start in other folders.

  Returns:
    The set, and what was asked for: its name and the flags that were given, as text.

  Raises:
    UserError: if there is no such set, it cannot be used, or it holds clips or is drawn by this project.
  """
  kinds.kind_of(name)
  if "/" not in name:
    raise UserError(f"{name} is drawn by this project and lies in no files: {_OTHER}")
  options = {flag.name: flag.value for flag in _OF_A_SET if flag.value}
  if CAPTION_KEY.value:
    keys = list(dict.fromkeys(CAPTION_KEY.value))
    options["caption_key"] = keys[0] if len(keys) == 1 else dict.fromkeys(keys, 1.0)
  asked = {"source": name, **{key: str(value) for key, value in options.items()}}
  if DATA_DIR.value:
    asked["data_dir"] = DATA_DIR.value
  if whole:
    name = _whole(name)
    options |= {key: _absolute(options[key]) for key in ("root", "index", "classes") if key in options}
  config = common.get_config()
  config.data.data_dir = _absolute(DATA_DIR.value) if whole and DATA_DIR.value else DATA_DIR.value
  config.data.sources = {"source": {"name": name, "weight": 1.0, **options}}
  try:
    source = kinds.open_sources(config, [name])[name]
  except UserError as error:
    # A flag stands here for what a config gives the set.
    raise UserError(str(error).replace("data.sources gives ", "the flags give ")) from None
  if not isinstance(source, StoredPictures):
    raise UserError(f"{name} holds no pictures: {_OTHER}")
  return source, asked


def _whole(name: str) -> str:
  kind, slash, place = name.partition("/")
  return name if not slash or name.startswith(_NO_PATHS) else f"{kind}/{_absolute(place)}"


def _absolute(path: str) -> str:
  return os.path.abspath(os.path.expanduser(path)) if is_local(path) else path
