import base64
import dataclasses
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from contrastive_jax.evaluation.gradients import GradientProfile
from contrastive_jax.evaluation.report import charts, metric_name, picture, score_series, write_report
from contrastive_jax.evaluation.results import Confusion, Guess, Result, Search

ATTACK = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
# Elements without an end tag, and the SVG shapes that close themselves.
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
  """Collects what a browser would see, and fails where tags do not nest."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_starttag(self, tag, attrs):
    self.handle_startendtag(tag, attrs)
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] != "style":
      self.text.append(data)


@pytest.fixture(scope="module")
def pictures():
  return np.random.default_rng(0).integers(0, 256, (4, 9, 7, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def results(pictures):
  guess = Guess(pictures[0], ATTACK, ((ATTACK, 0.75), ("cat", 0.2)), correct=True)
  wrong = Guess(pictures[1], "dog", (("cat", 0.5), ("dog", 0.25)), correct=False)
  confusions = (
    Confusion("dog", ATTACK, pictures[1], pictures[0], count=3, probability=0.5),
    Confusion("owl", "bat", pictures[2], None, count=1, probability=0.125),
  )
  classification = Result(
    dataset="toy/set",
    task="zeroshot_classification",
    metrics={"acc1": 0.0942, "acc5": 0.2, "mean_per_class_recall": 0.09, "acc1_of_100": 0.5},
    language="en",
    sizes={"images": 1853, "classes": 1853},
    guesses=(guess, wrong),
    confusions=confusions,
  )
  searches = (
    Search("a caption", ((pictures[2], 0.5, True), (pictures[3], 0.25, False))),
    Search(pictures[3], ((ATTACK, 0.5, False), ("a caption", 0.25, True))),
  )
  retrieval = Result(
    dataset="pairs",
    task="zeroshot_retrieval",
    metrics={"image_retrieval_recall@1": 0.5, "text_retrieval_recall@1": 0.25},
    language="en",
    sizes={"images": 4, "captions": 8},
    searches=searches,
  )
  return [classification, retrieval]


ROWS = [
  {"step": step, "loss": 5 / step, "learning_rate": 1e-4 * step, "images_per_second": 600.0 + step}
  for step in range(1, 60)
] + [{"step": step, "toy/set/acc1": step / 1000, "toy/set/acc5": step / 100} for step in (20, 40, 59)]


@pytest.fixture(scope="module")
def report(tmp_path_factory, results):
  path = tmp_path_factory.mktemp("run") / "report.html"
  config = {"batch_size": 256, "model": {"preset": ATTACK, "overrides": {}}}
  write_report(
    path,
    title=ATTACK,
    config=config,
    metrics=ROWS,
    evaluations=results,
    attribution="Art: Noto, https://example.org\nOpenMoji " + ATTACK,
    facts={"Parameters": ATTACK},
  )
  return path.read_text(encoding="utf-8")


def test_tags_nest_and_captions_cannot_become_tags(report):
  page = Page(report)
  assert "script" not in page.tags
  assert not any(name.startswith("on") for name, _ in page.attributes)
  # Shown, as text, everywhere it was given: title twice, truth, prediction, confusion, caption, config, fact, credits.
  assert sum(text.count(ATTACK) for text in page.text) == 9


def test_the_page_needs_no_other_file(report):
  page = Page(report)
  addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
  assert addresses and all(value.startswith("data:image/png;base64,") for value in addresses)
  assert not re.search(r"url\(|@import|<link|<iframe", report)
  assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_pictures_are_the_pixels(report, pictures):
  shown = {match for match in re.findall(r'src="(data:[^"]+)"', report)}
  assert shown == {picture(image) for image in pictures}
  decoded = Image.open(io.BytesIO(base64.b64decode(picture(pictures[0]).partition(",")[2])))
  np.testing.assert_array_equal(np.asarray(decoded), pictures[0])


def test_numbers_and_facts_are_there(report):
  text = " ".join(" ".join(Page(report).text).split())
  for expected in ("9.4%", "175 times chance", "0.05%", "75.0%", "3 times", "12.5% sure", "no image", "256 pairs"):
    assert expected in text, expected
  assert "Recall@1, caption to image" in text and "Top-1 accuracy among 100 drawn classes" in text


def test_the_right_answer_is_highlighted(report):
  assert len(re.findall(r'<article class="card guess right"', report)) == 1
  assert len(re.findall(r'<article class="card guess wrong"', report)) == 1
  # Right predictions in the gallery (2), and one found item each way.
  assert report.count('<li class="truth"') == 4
  assert report.count('<li class="miss"') == 1


def test_a_run_without_evaluations_or_metrics_has_a_report(tmp_path):
  path = write_report(tmp_path / "report.html", title="run", config={}, metrics=[], evaluations=[], attribution="")
  page = Page(path.read_text(encoding="utf-8"))
  assert "svg" not in page.tags and "img" not in page.tags


def test_curves_lie_inside_their_axes(report):
  drawn = charts([*ROWS, {"step": 59, "loss": "nan"}])
  assert [chart.title for chart in drawn] == [
    "Loss",
    "Scores during training",
    "Learning rate",
    "Images per second",
  ]
  for chart in drawn:
    for line in chart.lines:
      places = np.array([point.split(",") for point in line.points.split()], float)
      assert (places >= [50, 12]).all() and (places <= [466, 202]).all()
      assert (np.diff(places[:, 0]) > 0).all()
  rate = drawn[2].lines[0]
  places = np.array([point.split(",") for point in rate.points.split()], float)
  # A linear quantity is a straight line.
  slopes = np.diff(places[:, 1]) / np.diff(places[:, 0])
  np.testing.assert_allclose(slopes, slopes.mean(), rtol=0.05)
  # The first rate holds the compilation.
  assert len(drawn[3].lines[0].points.split()) == 58


def test_every_set_scored_in_training_has_a_curve():
  assert score_series(ROWS) == {
    "top-1": [(20.0, 0.02), (40.0, 0.04), (59.0, 0.059)],
    "top-5": [(20.0, 0.2), (40.0, 0.4), (59.0, 0.59)],
  }
  labelled = {"a/acc1": 0.5, "a/acc5": 0.75, "a/mean_per_class_recall": 0.5, "tfds/b/acc1": 0.25}
  multilabel = {"voc2007/mean_average_precision": 0.125}
  choices = {"sugarcrepe/add_att/image_acc": 1.0, "sugarcrepe/add_att/text_acc": 0.5, "sugarcrepe/add_att/acc": 0.5}
  recalls = {f"p/{way}_retrieval_recall@{k}": k / 16 for way in ("image", "text") for k in (1, 10, 5)}
  rows = [{"step": 1, "loss": 1.0, **labelled, **multilabel, **choices, **recalls, "p/alignment": 1.5}]
  assert {name: points[0][1] for name, points in score_series(rows).items() if points} == {
    "a top-1": 0.5,
    "a top-5": 0.75,
    "tfds/b top-1": 0.25,
    "voc2007 Mean average precision": 0.125,
    "sugarcrepe/add_att All images and captions found": 0.5,
    "p Recall@10, caption to image": 0.625,
  }


def test_metrics_in_words():
  assert metric_name("text_retrieval_recall@5") == "Recall@5, image to caption"
  assert metric_name("something_else") == "something_else"


def test_one_language_stands_for_a_set_that_was_scored_in_several(tmp_path, results, pictures):
  def scored(dataset, language, value):
    sizes = {"images": 4, "classes": 40}
    guess = Guess(pictures[0], f"truth in {language}", (("cat", 0.5),), correct=False)
    return Result(dataset, "zeroshot_classification", {"acc1": value}, language, sizes, guesses=(guess,))

  several = [scored("toy", "en", 0.5), scored("toy_de", "de", 0.25), scored("toy_xx", "xx", 0.375)]
  path = write_report(
    tmp_path / "r.html", title="run", config={}, metrics=[], evaluations=[*several, results[1]], attribution=""
  )
  page = path.read_text(encoding="utf-8")
  bars = page.partition("Language by language")[2].partition("</ol>")[0]
  assert re.findall(r"<li><span>(.+?)</span><span>(.+?)</span>.+?width:([\d.]+)%", bars) == [
    ("English", "50.0%", "100.0"),
    ("xx", "37.5%", "75.0"),
    ("German", "25.0%", "50.0"),
  ]
  assert "truth in en" in page and "truth in de" not in page and "toy_de" not in page and "pairs" in page


def test_diagnostics_are_numbers_and_not_percentages(tmp_path):
  metrics = {"image_retrieval_recall@1": 0.5, "alignment": 1.234567, "uniformity_image": -2.75}
  result = Result("pairs", "zeroshot_retrieval", metrics, "en", {"images": 2, "captions": 2})
  path = write_report(tmp_path / "r.html", title="", config={}, metrics=[], evaluations=[result], attribution="")
  text = " ".join(Page(path.read_text(encoding="utf-8")).text)
  assert "1.23" in text and "-2.75" in text and "123" not in text.replace("1.23", "") and "-275" not in text


def test_where_the_gradient_goes_and_what_samples_have_are_drawn(tmp_path):
  line = np.float64([0.25, 0.5, 0.25])
  profile = GradientProfile(np.float64([0.11, 0.13, 0.15]), line, line[::-1], line)
  result = Result("pairs", "zeroshot_retrieval", {"image_retrieval_recall@1": 0.5}, "en", {"images": 2, "captions": 2})
  path = write_report(
    tmp_path / "r.html",
    title="",
    config={},
    metrics=[],
    evaluations=[result, dataclasses.replace(result, gradient=profile)],
    attribution="",
    samples={"Temperatures of images": np.float32([0.01, 0.02, 0.05]), "Equal ones": np.full(3, 0.25)},
  )
  page = Page(path.read_text(encoding="utf-8"))
  text = " ".join(" ".join(page.text).split())
  assert "Where the gradient goes" in text and "pushed apart" in text and "median 0.02, 0.01 to 0.05" in text
  assert "Equal ones: all 0.25" in text
  labels = [value for name, value in page.attributes if name == "aria-label"]
  assert "pairs over similarity" in labels and page.tags.count("polyline") == 3 and page.tags.count("rect") == 3


def test_accuracy_gradient_norm_and_logit_scale_have_curves():
  rows = [
    {
      "step": step,
      "loss": 1.0,
      "grad_norm": 2.0,
      "logit_scale": 10.0 + step,
      "accuracy_image_to_text": 0.5,
      "accuracy_text_to_image": step / 100,
    }
    for step in range(1, 50)
  ]
  drawn = {chart.title: chart for chart in charts(rows)}
  assert {"Loss", "Accuracy within the batch", "Gradient norm", "Logit scale"} <= drawn.keys()
  accuracy = {line.name: line.last for line in drawn["Accuracy within the batch"].lines if line.kind == "main"}
  assert accuracy == {"image to text": "50%", "text to image": "49%"}
  assert [line.last for line in drawn["Logit scale"].lines] == ["59"]


def test_a_loss_without_accuracy_has_no_empty_chart():
  rows = [{"step": step, "loss": 1.0, "grad_norm": 2.0, "logit_scale": 10.0} for step in range(1, 50)]
  assert "Accuracy within the batch" not in {chart.title for chart in charts(rows)}


def test_the_commands_of_the_run_are_shown_as_text(tmp_path, results):
  commands = ["python train.py --config=a.py --workdir='" + ATTACK + "'", "python train.py --config=a.py"]
  path = write_report(
    tmp_path / "report.html",
    title="run",
    config={},
    metrics=ROWS,
    evaluations=results,
    attribution="",
    commands=commands,
  )
  page = Page(path.read_text(encoding="utf-8"))
  assert [text for text in page.text if text.startswith("python train.py")] == commands
  assert "script" not in page.tags
