"""Every dotted field that an error names with a value is a field of the config, so that a reader can change it."""

import ast
import re

import pytest

from contrastive_jax.training.fields import names
from tests import runs

ERRORS = {"UserError", "UnreadableSet", "SaveError", "NonFiniteError"}
FILES = sorted(
  path for pattern in ("contrastive_jax/**/*.py", "data/**/*.py", "*.py") for path in runs.ROOT.glob(pattern)
)
# Fields of tables in files of other projects, which are not ours to name.
FOREIGN = re.compile(r"contrastive_jax/interop/")


def sentences(path):
  """The texts of the errors that a file raises, with "{}" for what is filled in."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
      texts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.JoinedStr | ast.Constant)]
      inner = {id(part) for text in texts if isinstance(text, ast.JoinedStr) for part in ast.walk(text)} - {
        id(text) for text in texts if isinstance(text, ast.JoinedStr)
      }
      for text in (text for text in texts if id(text) not in inner):
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(runs.ROOT)))
def test_errors_name_fields_that_exist(path):
  if FOREIGN.search(str(path)):
    pytest.skip("names fields of other projects")
  known = set(names())
  parents = {name.rpartition(".")[0] for name in known}
  for sentence in sentences(path):
    for field in re.findall(r"(?<![\w.{}'/])([a-z_]+(?:\.[a-z_\d]+)+)(?=[=\s:,;]|$)", sentence):
      if field.partition(".")[0] in {name.partition(".")[0] for name in known if "." in name}:
        assert field in known | parents or field.endswith((".json", ".jsonl", ".py")), (field, sentence)
