"""What class the neighbours of an image say it is: the k-NN accuracy of a global descriptor."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.errors import ShapeError


@torch.no_grad()
def neighbours_accuracy(
    known: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    asked: Float[Tensor, "m dim"],
    truth: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return the share of images whose class the k nearest known ones vote for, 0..1.

    Cosine similarity s; a neighbour's vote weighs exp(s / temperature) (Wu et al., Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination, CVPR 2018, section 3.4).

    Args:
        known: Descriptors of images whose class is known.
        labels: Their classes, from 0.
        asked: Descriptors of the images to tell the class of.
        truth: Their classes.
        k: Neighbours that vote; at most n.
        temperature: Of the votes; infinity gives each the same.

    Raises:
        ShapeError: If there is nothing to compare, labels and descriptors differ in number, or k is below 1.
    """
    if not len(known) or not len(asked) or len(known) != len(labels) or len(asked) != len(truth):
        raise ShapeError(
            f"expected descriptors with a label each, got {len(known)} with {len(labels)} labels and {len(asked)} with "
            f"{len(truth)}"
        )
    if k < 1:
        raise ShapeError(f"expected k of at least 1, got {k}")
    bank, labels = F.normalize(known.float(), dim=1).T, labels.to(known.device)
    right = 0
    for part, wanted in zip(asked.split(1024), truth.split(1024), strict=True):
        similarity, index = (F.normalize(part.float(), dim=1) @ bank).topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1, device=known.device)
        # Taken off the largest: exp(1 / 0.07) is far, but the ratio is what counts.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, labels[index], weights)
        right += int((votes.argmax(1).cpu() == wanted.cpu()).sum())
    return right / len(asked)
