"""An objective that does not suit the sources or the teacher of a run is refused, and told what to change."""

import pytest

from configs import common
from contrastive_jax.errors import UserError
from contrastive_jax.objectives import check_teacher, make_objective, present_in
from contrastive_jax.training.run import Run


def test_what_cannot_be_left_out_is_named():
  config = common.get_config()
  config.objective = {"sigmoid": 1.0, "alignment": 0.5}
  config.data.sources = {"noto": 1.0, "b": {"name": "folder/b", "terms": ("alignment",)}}
  assert Run.from_config(config).extras.present_in == {"sigmoid": ("noto",)}
  objective = make_objective({"softmax": 1.0, "uniformity": 0.1}, {})
  for kept, said in (
    ({"a": ("softmx",)}, "terms, of which one='softmx' is unknown .*'softmax'"),
    ({"a": ()}, "gives 'a' no terms"),
    ({"a": ("softmax",)}, "keeps 'a' from uniformity, which sees all pairs of a batch: add uniformity to its terms"),
    ({"a": ("uniformity",), "b": ("uniformity",)}, "no source takes part in the term softmax"),
  ):
    with pytest.raises(UserError, match=said):
      present_in(objective, ("a", "b"), kept)
  config.data.sources = {"noto": 1.0, "b": {"name": "folder/b", "terms": "alignment"}}
  with pytest.raises(UserError, match="terms='alignment', which must be a list"):
    Run.from_config(config)


def test_targets_and_the_terms_that_read_them_come_together():
  features = make_objective({"softmax": 1.0, "distill_features": 1.0}, {})
  similarity = make_objective({"softmax": 1.0, "distill_similarity": 1.0}, {})
  plain = make_objective({"softmax": 1.0}, {})
  for objective, teacher, targets, message in (
    (features, "", "", "has a distillation term but no teacher"),
    (features, "runs/a", "runs/b", "distillation.teacher=runs/a and distillation.targets=runs/b"),
    (plain, "runs/a", "", "distillation.teacher=runs/a has no use"),
    (plain, "", "runs/b", "distillation.targets=runs/b has no use"),
    (similarity, "", "runs/b", "a cache of targets does not hold"),
  ):
    with pytest.raises(UserError, match=message):
      check_teacher(objective, teacher=teacher, targets=targets)
  check_teacher(features, teacher="", targets="runs/b")
  check_teacher(similarity, teacher="runs/a", targets="")
  check_teacher(plain, teacher="", targets="")
