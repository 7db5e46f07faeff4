"""The table of terms: the name that a config gives each."""

from collections.abc import Mapping

from contrastive_jax.objectives.alignment import Alignment
from contrastive_jax.objectives.barlip import Barlip
from contrastive_jax.objectives.cacr import CACR
from contrastive_jax.objectives.cwcl import CWCL
from contrastive_jax.objectives.dcl import DCL
from contrastive_jax.objectives.distill_features import DistillFeatures
from contrastive_jax.objectives.distill_positives import DistillPositives
from contrastive_jax.objectives.distill_relational import DistillRelational
from contrastive_jax.objectives.distill_similarity import DistillSimilarity
from contrastive_jax.objectives.gram import GRAM
from contrastive_jax.objectives.groco import GroCo
from contrastive_jax.objectives.heads import FixedHead, MultiHead
from contrastive_jax.objectives.individual_temperatures import IndividualTemperatures
from contrastive_jax.objectives.mann_whitney import MannWhitney
from contrastive_jax.objectives.margin_regularizer import MarginRegularizer
from contrastive_jax.objectives.matryoshka import Matryoshka
from contrastive_jax.objectives.mixup import Mixup, SoftCLIP
from contrastive_jax.objectives.mochi import MoCHi
from contrastive_jax.objectives.multi_view import MultiViewDHEL, MultiViewInfoNCE
from contrastive_jax.objectives.pamc import PamC
from contrastive_jax.objectives.pixpro import PixPro
from contrastive_jax.objectives.queued_softmax import QueuedSoftmax
from contrastive_jax.objectives.rotation import Rotation
from contrastive_jax.objectives.siamlip import Siamlip
from contrastive_jax.objectives.sigmoid import Sigmoid
from contrastive_jax.objectives.simlap import SimLAP
from contrastive_jax.objectives.softmax import Softmax
from contrastive_jax.objectives.sogclr import Sogclr
from contrastive_jax.objectives.strong_views import StrongViews
from contrastive_jax.objectives.swapped_prototypes import SwappedPrototypes
from contrastive_jax.objectives.term import Term
from contrastive_jax.objectives.uniformity import CrossUniformity, Uniformity

TERMS: Mapping[str, type[Term]] = {
  "sigmoid": Sigmoid,
  "softmax": Softmax,
  "dcl": DCL,
  "cwcl": CWCL,
  "mann_whitney": MannWhitney,
  "mv_infonce": MultiViewInfoNCE,
  "mv_dhel": MultiViewDHEL,
  "cacr": CACR,
  "groco": GroCo,
  "gram": GRAM,
  "mochi": MoCHi,
  "mixup": Mixup,
  "soft_clip": SoftCLIP,
  "individual_temperatures": IndividualTemperatures,
  "sogclr": Sogclr,
  "queued_softmax": QueuedSoftmax,
  "matryoshka": Matryoshka,
  "multi_head": MultiHead,
  "fixed_head": FixedHead,
  "swapped_prototypes": SwappedPrototypes,
  "pamc": PamC,
  "barlip": Barlip,
  "siamlip": Siamlip,
  "simlap": SimLAP,
  "margin_regularizer": MarginRegularizer,
  "strong_views": StrongViews,
  "rotation": Rotation,
  "pixpro": PixPro,
  "alignment": Alignment,
  "uniformity": Uniformity,
  "cross_uniformity": CrossUniformity,
  "distill_features": DistillFeatures,
  "distill_similarity": DistillSimilarity,
  "distill_relational": DistillRelational,
  "distill_positives": DistillPositives,
}
