"""The table of terms: the name that a config gives each."""

from collections.abc import Mapping

from contrastive_jax.objectives.alignment import Alignment
from contrastive_jax.objectives.barlip import Barlip
from contrastive_jax.objectives.distill_features import DistillFeatures
from contrastive_jax.objectives.distill_relational import DistillRelational
from contrastive_jax.objectives.distill_similarity import DistillSimilarity
from contrastive_jax.objectives.individual_temperatures import IndividualTemperatures
from contrastive_jax.objectives.matryoshka import Matryoshka
from contrastive_jax.objectives.queued_softmax import QueuedSoftmax
from contrastive_jax.objectives.siamlip import Siamlip
from contrastive_jax.objectives.sigmoid import Sigmoid
from contrastive_jax.objectives.softmax import Softmax
from contrastive_jax.objectives.sogclr import Sogclr
from contrastive_jax.objectives.swapped_prototypes import SwappedPrototypes
from contrastive_jax.objectives.term import Term
from contrastive_jax.objectives.uniformity import CrossUniformity, Uniformity

TERMS: Mapping[str, type[Term]] = {
  "sigmoid": Sigmoid,
  "softmax": Softmax,
  "individual_temperatures": IndividualTemperatures,
  "sogclr": Sogclr,
  "queued_softmax": QueuedSoftmax,
  "matryoshka": Matryoshka,
  "swapped_prototypes": SwappedPrototypes,
  "barlip": Barlip,
  "siamlip": Siamlip,
  "alignment": Alignment,
  "uniformity": Uniformity,
  "cross_uniformity": CrossUniformity,
  "distill_features": DistillFeatures,
  "distill_similarity": DistillSimilarity,
  "distill_relational": DistillRelational,
}
