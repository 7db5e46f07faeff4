"""Values looked up one by one are those that pyarrow reads."""

import numpy as np
import pyarrow as pa
import pytest

from data.sources.index import TEXTS
from data.sources.lookup import Lookup

ROWS, BATCHES = 37, (16, 1, 20)
INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["whole", "with gaps"])
def written(request, tmp_path_factory):
  rng = np.random.default_rng(0)

  def gaps(values, kind):
    return pa.array([None if rng.random() < request.param else value for value in values], kind)

  texts = ["", "a dog", "naïve café 🦊", "кот"]
  columns = {str(kind): gaps(rng.integers(0, 100, ROWS).tolist(), kind) for kind in INTEGERS}
  columns["large"] = gaps([-(2**63), 2**63 - 1] + [0] * (ROWS - 2), pa.int64())
  columns["double"] = gaps(rng.normal(size=ROWS).tolist(), pa.float64())
  columns["float"] = gaps(rng.normal(size=ROWS).tolist(), pa.float32())
  columns["truth"] = gaps((rng.random(ROWS) < 0.5).tolist(), pa.bool_())
  columns["text"] = gaps([texts[k % 4] for k in range(ROWS)], pa.large_string())
  columns["texts"] = gaps([texts[: k % 5] for k in range(ROWS)], TEXTS)
  columns["holes"] = gaps([[None, "a"][: k % 3] for k in range(ROWS)], TEXTS)
  table = pa.table(columns)
  path = tmp_path_factory.mktemp("lookup") / "part.arrow"
  with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
    start = 0
    for rows in BATCHES:
      writer.write_table(table.slice(start, rows).combine_chunks())
      start += rows
  return path, table


def test_every_value_is_the_one_that_pyarrow_reads(written):
  path, table = written
  lookup = Lookup(path)
  assert lookup.rows == ROWS
  for name in table.column_names:
    assert [lookup.value(name, row) for row in range(ROWS)] == table[name].to_pylist(), name
    assert lookup.column(name).equals(table[name])


def test_a_file_that_became_shorter_is_an_error(written, tmp_path):
  path = tmp_path / "cut.arrow"
  path.write_bytes(written[0].read_bytes())
  lookup = Lookup(path)
  with path.open("r+b") as file:
    file.truncate(100)
  with pytest.raises(OSError, match="ends before byte"):
    lookup.value("texts", ROWS - 1)
