"""eval.py as a user runs it: probes of a trained run, and what their flags refuse."""

import json

import pytest

from tests import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of the tiny config, scored at its end in every language, and a set to probe."""
  folder = tmp_path_factory.mktemp("trained")
  during = ("--config.evals=('emoji_heldout',)", "--config.eval_every=4", "--config.total_steps=8")
  runs.train(folder / "run", "--config.final_evals=('emoji_openmoji_languages',)", *during)
  runs.run("-m", "data.digits", f"--data_dir={folder}")
  return folder


def probed(trained, *arguments, expected=0):
  digits = ("--tasks=tfds/sklearn_digits", f"--data_dir={trained}")
  return runs.run("eval.py", f"--workdir={trained / 'run'}", *digits, *arguments, expected=expected)


def test_a_config_may_name_a_group(trained):
  results = [json.loads(path.read_text()) for path in (trained / "run" / "eval").glob("emoji_openmoji*@8.json")]
  assert len(results) == len({result["language"] for result in results}) == 14
  page = (trained / "run" / "report.html").read_text()
  bars = page.partition("Language by language")[2].partition("</ol>")[0]
  assert bars.count("<li>") == 14 and "Portuguese" in bars


def test_the_last_step_is_scored_once_on_all_sets(trained):
  scored = [row for row in runs.rows(trained / "run" / "metrics.jsonl") if any("/" in name for name in row)]
  assert [row["step"] for row in scored] == [4, 8]
  sets = [{name.partition("/")[0] for name in row if "/" in name} for row in scored]
  assert sets[0] == {"emoji_heldout"} and len(sets[1]) == 15 and "emoji_heldout" in sets[1]
  written = {path.name.partition("@")[0] for path in (trained / "run" / "eval").glob("emoji*@8.json")}
  assert written == sets[1]


def test_each_kind_of_probe_has_a_file_of_its_own(trained):
  probed(trained, "--probe=knn")
  probed(trained, "--probe=knn", "--noprobe_projected", "--probe_shots=5")
  folder = trained / "run" / "eval"
  names = ["tfds_sklearn_digits@8.knn_probe.json", "tfds_sklearn_digits@8.unprojected_5_shot_knn_probe.json"]
  assert sorted(path.name for path in folder.glob("tfds*")) == names
  every, few = (json.loads((folder / name).read_text())["metrics"]["knn_acc1"] for name in names)
  assert 0.2 < few < every < 1


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--dims=0"], "--dims=0 must be whole numbers above 0"),
    (["--dims=4", "--probe=knn"], "--dims scores parts of embeddings, and --probe=knn learns from all"),
    (["--dims=4,16"], "--dims=16 must be below 16, the size of whole embeddings"),
    (["--probe_shots=5"], "--probe_shots says how to probe: add --probe=linear or --probe=knn"),
    (["--probe=knn", "--probe_shots=1000"], "1000 samples of each class are asked for, class 0 has"),
  ],
)
def test_a_probe_that_cannot_be_is_one_sentence(trained, arguments, sentence):
  output = probed(trained, *arguments, expected=2)
  assert sentence in output and "Traceback" not in output


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--tasks=tfds/toy", "--probe_split=test"], "--probe_split=test is what tfds/toy is scored on"),
    (["--tasks=eurosat@train[:80%]"], "--probe_split=train is what eurosat@train[:80%] is scored on"),
    (["--tasks=tfds/toy,emoji_openmoji"], "one label an image, such as tfds/cifar10, not 'emoji_openmoji'"),
    (["--tasks=voc2007"], "one label an image, such as tfds/cifar10, not 'voc2007'"),
  ],
)
def test_names_that_no_probe_can_be_of_are_refused_before_the_model_is_read(arguments, sentence):
  output = runs.run("eval.py", "--workdir=nowhere", "--probe=knn", *arguments, expected=2)
  assert sentence in output and "Traceback" not in output


@pytest.mark.parametrize("flag", ["tasks", "compare"])
def test_an_empty_list_is_no_success(flag):
  assert f"eval.py: --{flag} is empty" in runs.run("eval.py", "--workdir=nowhere", f"--{flag}=", expected=2)


@pytest.mark.extra
def test_a_run_beside_itself_scores_as_it_does_alone(trained, tmp_path):
  """The similarities are the same, and the results lie in the file that is named and not in the run."""
  before = {path: path.read_bytes() for path in (trained / "run" / "eval").glob("*")}
  both = f"--output={tmp_path / 'both.json'}"
  runs.run("eval.py", f"--workdir={trained / 'run'}", f"--with={trained / 'run'}", both, "--tasks=emoji_heldout")
  (result,) = json.loads((tmp_path / "both.json").read_text())
  alone = json.loads((trained / "run" / "eval" / "emoji_heldout@8.json").read_text())["metrics"]
  assert {name: result["metrics"][name] for name in alone} == pytest.approx(alone, abs=1e-5)
  assert result["pretrained"].count("@8") == 2
  assert before == {path: path.read_bytes() for path in (trained / "run" / "eval").glob("*")}
  runs.run("eval.py", f"--workdir={trained / 'run'}", f"--with={trained / 'run'}", expected=2)
