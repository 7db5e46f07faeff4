"""What callers pass as texts, classes, templates and images is taken by position, or refused by name."""

import array
import enum
import io

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from contrastive_jax import inputs
from contrastive_jax.errors import UserError


class Series:
  """What a pandas Series does that a list does not: brackets look up labels, iteration goes by position."""

  ndim, iloc = 1, None

  def __init__(self, values, index):
    self.values, self.index, self.shape = values, index, (len(values),)

  def __len__(self):
    return len(self.values)

  def __iter__(self):
    return iter(self.values)

  def __getitem__(self, label):
    return self.values[self.index.index(label)]


class Letter(str, enum.Enum):  # noqa: UP042 - as people wrote it before there was StrEnum.
  A, B = "a", "b"


class Broken:
  shape = (4, 5, 3)

  def __array__(self, dtype=None, copy=None):
    raise NotImplementedError


class Accessor:
  """What `Series.str` is: it has the method of an iterable, which raises."""

  def __iter__(self):
    raise TypeError


class Frame:
  ndim, iloc, shape = 2, None, (3, 2)


@pytest.mark.parametrize(
  "values",
  [
    ["a", "b"],
    ("a", "b"),
    np.array(["a", "b"]),
    np.array(["a", "b"], object),
    Series(["a", "b"], [1, 0]),
    Series(["a", "b"], [7, 3]),
    (text for text in "ab"),
    iter(["a", "b"]),
    [np.str_("a"), "b"],
    [Letter.A, Letter.B],
    Letter,
    {0: "a", 1: "b"}.values(),
    pa.array(["a", "b"]),
    pa.chunked_array([["a"], ["b"]]).dictionary_encode(),
  ],
)
def test_texts_come_by_position(values):
  assert inputs.texts(values) == ["a", "b"]


def test_no_text_is_no_row():
  assert inputs.texts([]) == inputs.texts(np.array([])) == []


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ("cat", r"takes a list of texts, got one str: write \['cat'\]"),
    (b"cat", "got one bytes"),
    (None, "got None"),
    (3, "got the int 3"),
    ({"a": "b"}, "got a dict"),
    ({"a", "b"}, "got a set"),
    (np.array("a"), "pass one column"),
    (np.array([["a", "b"]]), r"shape \[1, 2\]"),
    (Frame(), r"shape \[3, 2\]"),
    (["a", None], r"texts\[1\] is None"),
    (["a", float("nan")], r"texts\[1\] is the float nan"),
    (pa.array(["a", None]), r"texts\[1\] is None"),
    ([b"a"], r"texts\[0\] is the bytes b'a', not a string: decode"),
    (["a", "b", 3], r"texts\[2\] is the int 3"),
    ([["a"]], r"texts\[0\] is the list"),
    (np.array([1.0, 2.0]), r"texts\[0\] is the float"),
    (["ok", "x\ud800y"], r"texts\[1\] holds the lone surrogate U\+D800"),
    (["\udfff"], r"U\+DFFF"),
    (["x" * 10, 10**100], r"\.\.\."),
    (array.array("u", "cat"), "got one array"),
    (str, "got the class str"),
    (Accessor(), "got the Accessor"),
  ],
)
def test_what_is_no_list_of_texts_is_refused(values, said):
  with pytest.raises(UserError, match=said):
    inputs.texts(values)


@pytest.mark.parametrize("template", ["{}", "a photo of a {}.", "ein {}\u2028", "{}?!", "100% {}"])
def test_templates_with_one_slot_are_taken(template):
  assert inputs.templates([template]) == [template]


@pytest.mark.parametrize(
  "template",
  ["", "a photo", "{0}", "{name}", "{{}}", "{} and {}", "{:>5}", "{!r}", "{} {", "} {}", "{{}", "{}}", "{ }", "{}{}"],
)
def test_templates_without_exactly_one_slot_are_refused(template):
  with pytest.raises(UserError, match=r"templates\[1\] is .* exactly once"):
    inputs.templates(["a {}.", template])


@pytest.mark.parametrize(
  ("values", "said"),
  [("a {}.", "got one str"), ([], "is empty"), ([None], "is None"), (["{}", "{}"], "are both"), ([b"{}"], "bytes")],
)
def test_templates_are_a_list(values, said):
  with pytest.raises(UserError, match=said):
    inputs.templates(values)


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ("cat", "got one str"),
    ([], "has 0 names"),
    (["cat"], "has 1 names"),
    (["cat", " "], r"classes\[1\] is empty"),
    (["cat", "dog", "cat"], r"classes\[0\] and classes\[2\] are both"),
    (["cat", None], r"classes\[1\] is None"),
    (["hot dog", "cat", " hot  dog"], r"classes\[0\] and classes\[2\] are both"),
    (["caf\u00e9", "cafe\u0301"], "are both"),
  ],
)
def test_classes_are_two_distinct_names_at_least(values, said):
  with pytest.raises(UserError, match=said):
    inputs.class_names(values)


PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def test_a_series_of_images_is_read_by_position():
  found = inputs.images(Series(["first.png", "second.png"], [1, 0]))
  assert [found[0], found[1]] == ["first.png", "second.png"]
  assert list(inputs.images(iter(["a.png"]))) == ["a.png"]
  assert len(inputs.images([])) == 0


@pytest.mark.parametrize(
  ("values", "said"),
  [
    (PIXELS, "got one ndarray"),
    (PIXELS[..., 0], "got one ndarray"),
    (Image.new("RGB", (2, 2)), "got one Image"),
    ("a.png", "got one str"),
    (b"bytes", "got one bytes"),
    ({"image": PIXELS}, "got a dict"),
    (None, "got None"),
    (Frame(), "pass one column"),
  ],
)
def test_what_is_no_list_of_images_is_refused(values, said):
  with pytest.raises(UserError, match=said):
    inputs.images(values)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_arrays_of_any_library_become_numpy(convert):
  np.testing.assert_array_equal(inputs.image(convert(PIXELS), 0), PIXELS)
  np.testing.assert_array_equal(inputs.image(convert(PIXELS[..., 0].copy()), 0), PIXELS[..., 0])


def test_pixels_of_16_bits_are_taken_in_any_byte_order():
  wide = PIXELS.astype(np.uint16) * 257
  np.testing.assert_array_equal(inputs.image(wide.astype(">u2"), 0), wide)
  assert inputs.image(wide.astype(">u2"), 0).dtype == np.uint16


@pytest.mark.parametrize(
  ("item", "said"),
  [
    (PIXELS / 255, r"images\[7\] is float64\[4, 5, 3\], whose scale is unknown: .*255 \* image"),
    (PIXELS.astype(np.float16), "float16"),
    (np.full((4, 5, 3), np.nan), "float64"),
    (PIXELS.astype(np.int64), "int64"),
    (PIXELS > 3, "bool"),
    (PIXELS.astype(complex), "complex128"),
    (PIXELS.transpose(2, 0, 1), r"channels come first, .*transpose\(1, 2, 0\)"),
    (PIXELS[..., :2], r"shape \[4, 5, 2\]"),
    (PIXELS[:0], r"shape \[0, 5, 3\]"),
    (np.zeros((1, 2, 3, 4, 3), np.uint8), r"shape \[1, 2, 3, 4, 3\]"),
    (np.zeros((2, 4, 5, 1), np.uint8), "for a clip"),
    (PIXELS[0, 0], r"shape \[3\]"),
    (np.zeros((4, 4, 2), np.uint8), r"pass \[height, width, 3 or 4\]"),
    (np.array(["a.png"]), "pass uint8"),
    (np.uint8(3), "pass a path"),
    (None, r"images\[7\] is None"),
    (float("nan"), "float nan"),
    (7, "int 7"),
    ([1, 2], "the list"),
    (np.ma.array(PIXELS, mask=PIXELS > 3), "with a mask"),
    (Broken(), r"cannot become a NumPy array on this host \(NotImplementedError\)"),
    ({"bytes": b"", "path": "x"}, "a dict with the keys bytes, path"),
    (array.array("B", b"x"), "pass uint8|the array"),
    (io.BytesIO(b"x"), r"images\[7\] is an open file \(BytesIO\): pass its path or its bytes"),
    (io.BufferedReader(io.BytesIO(b"x")), r"an open file \(BufferedReader\)"),
  ],
)
def test_what_is_no_image_is_refused_with_its_index(item, said):
  with pytest.raises(UserError, match=said):
    inputs.image(item, 7)


@pytest.mark.slow
def test_tensors_of_pytorch_are_arrays_like_any_other():
  torch = pytest.importorskip("torch")
  np.testing.assert_array_equal(inputs.image(torch.from_numpy(PIXELS), 0), PIXELS)
  with pytest.raises(UserError, match="got one Tensor"):
    inputs.images(torch.from_numpy(PIXELS))
  with pytest.raises(UserError, match="float32"):
    inputs.image(torch.rand(3, 4, 5), 7)
  with pytest.raises(UserError, match="NumPy array"):
    inputs.image(torch.rand(4, 5, 3, requires_grad=True), 7)


@pytest.mark.slow
def test_pandas_series_are_read_by_position_whatever_their_index_is():
  pandas = pytest.importorskip("pandas")
  table = pandas.DataFrame({"text": ["one", "three", "a cat", "sun"], "number": [1, 2, 3, 4]})
  shuffled, filtered = table.sample(frac=1, random_state=1), table[table.number > 2]
  for column in (shuffled.text, filtered.text, table.set_index("number").text, pandas.concat([table, table]).text):
    assert inputs.texts(column) == column.tolist() == inputs.texts(column.to_numpy()) == inputs.texts(column.array)
    assert list(inputs.images(column)) == column.tolist()
  assert inputs.texts(table.text.astype("category")) == table.text.tolist()
  for wrong in (table, table[["text"]], table.groupby("text"), pandas.Series(["a", None]), pandas.Series([1, 2])):
    with pytest.raises(UserError):
      inputs.texts(wrong)
