"""Train the aggregation network of Diffusion Hyperfeatures on pairs of images with corresponding points.

After Luo et al., Diffusion Hyperfeatures, NeurIPS 2023. The diffusion model is frozen: what it gives for an image is
kept on disk, and only the network that makes one map of many is trained. ``train_hyperfeatures`` runs the whole;
:class:`HyperfeatureTrainer` is one run step by step, for those who want the loop in their own hands.
"""

from vitfeats.apps.train_hyperfeatures.maps import LayerMaps, MapCache
from vitfeats.apps.train_hyperfeatures.run import TrainHyperfeaturesResult, train_hyperfeatures
from vitfeats.apps.train_hyperfeatures.trainer import HyperfeatureTrainer

__all__ = [
    "HyperfeatureTrainer",
    "LayerMaps",
    "MapCache",
    "TrainHyperfeaturesResult",
    "train_hyperfeatures",
]
