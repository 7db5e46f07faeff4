"""The table of terms: the name that a config gives each."""

from collections.abc import Mapping

from contrastive_jax.objectives.alignment import Alignment
from contrastive_jax.objectives.distill_features import DistillFeatures
from contrastive_jax.objectives.distill_relational import DistillRelational
from contrastive_jax.objectives.distill_similarity import DistillSimilarity
from contrastive_jax.objectives.individual_temperatures import IndividualTemperatures
from contrastive_jax.objectives.sigmoid import Sigmoid
from contrastive_jax.objectives.softmax import Softmax
from contrastive_jax.objectives.term import Term

TERMS: Mapping[str, type[Term]] = {
  "sigmoid": Sigmoid,
  "softmax": Softmax,
  "individual_temperatures": IndividualTemperatures,
  "alignment": Alignment,
  "distill_features": DistillFeatures,
  "distill_similarity": DistillSimilarity,
  "distill_relational": DistillRelational,
}
