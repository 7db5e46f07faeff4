"""The variables of a job of several processes mean one thing or are refused by name."""

import pytest

from contrastive_jax.errors import UserError
from contrastive_jax.parallel.environment import Job, job

THREE = {"CJAX_COORDINATOR": "node0:1234", "CJAX_PROCESSES": "4", "CJAX_PROCESS": "3"}


@pytest.mark.parametrize("text", ["1", "true", "True", "TRUE", "yes", "On", " 1 "])
def test_true(text):
  assert job({"CJAX_MULTIHOST": text}) == Job()


@pytest.mark.parametrize("text", ["0", "false", "False", "no", "OFF", ""])
def test_false(text):
  assert job({"CJAX_MULTIHOST": text}) is None


@pytest.mark.parametrize("address", ["node0:1", "10.0.0.1:65535", "[::1]:1234", "a-b.c_d.example:80"])
def test_three_variables_are_a_job(address):
  assert job({**THREE, "CJAX_COORDINATOR": address}) == Job(address, 4, 3)
  assert job({**THREE, "CJAX_COORDINATOR": address, "CJAX_MULTIHOST": "1"}) == Job(address, 4, 3)


@pytest.mark.parametrize(
  ("changed", "named"),
  [
    *(({"CJAX_MULTIHOST": text}, "CJAX_MULTIHOST") for text in ("maybe", "2", "-1", "tru")),
    *(({"CJAX_PROCESSES": text}, "CJAX_PROCESSES=") for text in ("four", "0", "-4", "4.0", "1e3", "٤", "9" * 30)),
    *(({"CJAX_PROCESS": text}, "CJAX_PROCESS=") for text in ("4", "-1", "one", "3.5")),
    *(
      ({"CJAX_COORDINATOR": text}, "CJAX_COORDINATOR=")
      for text in ("node0", "node0:", ":1234", "node0:0", "node0:65536", "node0:x", "::1:1234", "[zz]:1", "http://a:1")
    ),
    ({"CJAX_PROCESS": ""}, "CJAX_PROCESS is not"),
    ({"CJAX_MULTIHOST": "0"}, "contradicts"),
    ({"CJAX_MULTI_HOST": "1"}, "did you mean 'CJAX_MULTIHOST'"),
    ({"CJAX_PROCESS_ID": "1"}, "CJAX_PROCESS_ID is unknown"),
    ({"cjax_multihost": "1"}, "did you mean 'CJAX_MULTIHOST'"),
  ],
)
def test_anything_else_is_refused_by_name(changed, named):
  with pytest.raises(UserError, match=named):
    job({**THREE, **changed})
