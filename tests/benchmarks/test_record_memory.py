"""A record takes no more memory than one may, however large it is and whatever it promises."""

import pytest

from benchmarks import record_memory, record_paths

# The kinds that come closest, or once took more.
KINDS = (
  "PNG RGB",
  "PNG RGBA, twice as wide as high",
  "PNG palette, transparent",
  "PNG grey and alpha",
  "PNG one pixel high",
  "JPEG baseline",
  "WebP",
  "TIFF one strip",
  "ICO of a PNG of 9000 x 9000",
  "TIFF tile of 16000 x 16000",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_record_of_a_kind_keeps_to_the_limit(kind):
  ways = list(record_paths.PATHS)
  count, found = record_memory.record(kind, ways)
  assert all(bool(refused) == (count == 0) for _, refused in found), found
  assert max(megabytes for megabytes, _ in found) <= record_memory.LIMIT, dict(zip(ways, found, strict=True))
