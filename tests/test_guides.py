"""The code of the guides is run: its files become modules, and its tests are tests."""

import inspect
import re
import sys
import types

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.objectives import TERMS, make_objective
from tests import runs


def blocks(guide):
  """The Python of a guide by the comment that each block begins with."""
  text = (runs.ROOT / "docs" / guide).read_text(encoding="utf-8")
  return dict(re.findall(r"^```python\n# (.+?)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def module_of(monkeypatch):
  """Makes a module of a block, which others can then import."""

  def make(guide, file):
    module = types.ModuleType(file.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parent = sys.modules.get(module.__name__.rpartition(".")[0])
    if parent is not None:
      monkeypatch.setattr(parent, module.__name__.rpartition(".")[2], module, raising=False)
    exec(compile(blocks(guide)[file], f"docs/{guide}: {file}", "exec"), vars(module))
    return module

  return make


def run_tests(module, tmp_path):
  tests = [value for name, value in vars(module).items() if name.startswith("test_")]
  assert tests
  for number, test in enumerate(tests):
    folder = tmp_path / str(number)
    folder.mkdir()
    test(**({"tmp_path": folder} if "tmp_path" in inspect.signature(test).parameters else {}))


def test_add_a_loss(module_of, monkeypatch, tmp_path):
  guide, file = "add_a_loss.md", "contrastive_jax/objectives/redundancy.py"
  module = module_of(guide, file)
  assert not (runs.ROOT / file).exists(), "the example is part of the library now: choose another"
  assert len(blocks(guide)[file].partition("class ")[2].splitlines()) < 35
  run_tests(module_of(guide, "tests/objectives/test_redundancy.py"), tmp_path)

  line = blocks(guide)["contrastive_jax/objectives/table.py, in TERMS"]
  for name, term in eval(f"{{{line}}}", vars(module)).items():
    monkeypatch.setitem(TERMS, name, term)
  from configs.common import get_config

  config = get_config()
  exec(blocks(guide)["in a config"], {"config": config})
  objective = make_objective(config.objective.to_dict(), config.loss_options.to_dict())
  weight, term = objective.terms["redundancy"]
  assert (weight, term.off_diagonal) == (0.01, 0.01)
  with pytest.raises(UserError, match="off_diagonal"):
    make_objective({"redundancy": 1.0}, {"redundancy": {"of_diagonal": 1.0}})


def test_add_a_data_format(module_of, monkeypatch, tmp_path):
  guide, file = "add_a_data_format.md", "data/sources/text_files.py"
  module = module_of(guide, file)
  assert not (runs.ROOT / file).exists(), "the example is part of the data now: choose another"
  run_tests(module_of(guide, "tests/data/test_text_files.py"), tmp_path)

  # The line that the guide adds to the table, in the table.
  from configs.common import get_config
  from data import kinds

  line = eval("{" + blocks(guide)["data/kinds.py"] + "}", vars(kinds) | {"TextFileSource": module.TextFileSource})
  for key, kind in line.items():
    monkeypatch.setitem(kinds.KINDS, key, kind)
  (tmp_path / "dog.png").write_bytes(b"not read yet")
  (tmp_path / "dog.txt").write_text("a dog")
  name = f"text_files/{tmp_path}"
  assert kinds.open_sources(get_config(), [name])[name].text(0).captions == ("a dog",)
