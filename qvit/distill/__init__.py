"""Distillation: the teacher's and student's q and k (`taps`), DGD (`similarity`), feature matching (`features`,
`projection`), the loss.

Reads `qvit.layers`; used by `qvit.training`, or by a training loop of your own.
"""

from qvit.distill.features import FeatureTap, feature_distance, feature_loss
from qvit.distill.losses import DistillationLoss
from qvit.distill.projection import FeatureProjector
from qvit.distill.similarity import dgd_loss, similarity_distance
from qvit.distill.taps import QueryKeyTaps, tap_queries_keys

__all__ = [
    "DistillationLoss",
    "FeatureProjector",
    "FeatureTap",
    "QueryKeyTaps",
    "dgd_loss",
    "feature_distance",
    "feature_loss",
    "similarity_distance",
    "tap_queries_keys",
]
