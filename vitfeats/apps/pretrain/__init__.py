"""Self-distillation on pictures of one's own: a student learns to say of a crop what its slow teacher says of another.

DINO (Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021) for the CLS token; iBOT
(Zhou et al., Image BERT Pre-Training with Online Tokenizer, ICLR 2022) for masked patches. Beside them, patches of one
crop are found again in another, after DenseCL (Wang et al., Dense Contrastive Learning for Self-Supervised Visual
Pre-Training, CVPR 2021). Labels may help, if there are any.
"""

from vitfeats.apps.pretrain.collection import Collection
from vitfeats.apps.pretrain.run import PretrainResult, pretrain
from vitfeats.apps.pretrain.trainer import Pretrainer

__all__ = ["Collection", "PretrainResult", "Pretrainer", "pretrain"]
