"""What student and teacher are compared by: the cross-entropies of DINO and iBOT, places found again, and the masks."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

_BLOCKS = 3  # rectangles that a mask is made of


class Centre(nn.Module):
    """The running mean of the teacher's answers; taken off, no prototype wins for all pictures.

    Caron et al., DINO, ICCV 2021, equation 4.

    Args:
        prototypes: Entries of an answer.
        momentum: Share of the old mean that is kept at an update.
    """

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(prototypes))

    mean: Float[Tensor, " prototypes"]

    def sharpened(
        self, answers: Float[Tensor, "*batch prototypes"], temperature: float
    ) -> Float[Tensor, "*batch prototypes"]:
        """Return the teacher's distributions: centred, and sharper the lower the temperature."""
        return ((answers.float() - self.mean) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, answers: Float[Tensor, "*batch prototypes"]) -> None:
        """Move the mean towards that of these answers."""
        self.mean.lerp_(answers.float().flatten(0, -2).mean(0), 1 - self.momentum)


def cross_entropy(
    wanted: Float[Tensor, "*batch prototypes"], answers: Float[Tensor, "*batch prototypes"], temperature: float
) -> Float[Tensor, "*batch"]:
    """Return the cross-entropy of a student's answers under a teacher's distributions."""
    return -(wanted * (answers.float() / temperature).log_softmax(-1)).sum(-1)


def views_loss(
    wanted: Float[Tensor, "globals batch prototypes"],
    answers: Float[Tensor, "views batch prototypes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all pairs of a teacher's crop and another crop of the student.

    DINO, equation 3: the student's views begin with the crops that the teacher sees, and those pairs are left out.
    """
    losses = [
        cross_entropy(target, answer, temperature).mean()
        for first, target in enumerate(wanted)
        for second, answer in enumerate(answers)
        if first != second
    ]
    return torch.stack(losses).mean()


def tokens_loss(
    wanted: Float[Tensor, "batch tokens prototypes"],
    answers: Float[Tensor, "batch tokens prototypes"],
    chosen: Bool[Tensor, "batch tokens"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the mean over images of the mean over their chosen tokens; images without any are left out.

    With masked tokens chosen it is iBOT's loss (equation 2 there).
    """
    return _mean(cross_entropy(wanted[chosen], answers[chosen], temperature), chosen)


def places_loss(
    wanted: Float[Tensor, "batch tokens dim"],
    answers: Float[Tensor, "batch tokens dim"],
    chosen: Bool[Tensor, "batch tokens"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Return how uncertain it is, by cosines of tokens, where a picture's patches are found again.

    Each chosen patch of the student looks for its place among the teacher's tokens at the places of all chosen patches
    of its image: the cross-entropy of a softmax over cosine similarities divided by ``temperature`` (InfoNCE: van den
    Oord et al., 2018; between patches: Wang et al., DenseCL, CVPR 2021). Its value where nothing is known is the
    logarithm of how many there are. The mean is that of :func:`tokens_loss`.

    Args:
        wanted: The teacher's token at the place of each of the student's patches.
        answers: The student's patches.
        chosen: Those whose place the teacher sees.
        temperature: Positive; the lower, the more the most similar wrong place counts.
    """
    # In half precision a cosine near 1 is right to 0.004, which the temperature makes a tenth of a logit or so.
    with torch.autocast(answers.device.type, enabled=False):
        similarities = F.normalize(answers.float(), dim=-1) @ F.normalize(wanted.float(), dim=-1).mT / temperature
    logs = similarities.masked_fill(~chosen[:, None], -math.inf).log_softmax(-1)
    return _mean(-logs.diagonal(dim1=1, dim2=2)[chosen], chosen)


def _mean(losses: Float[Tensor, " n"], chosen: Bool[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """Return the mean over images of the means over their chosen tokens; images without any are left out."""
    counts = chosen.sum(1)
    shares = (1 / counts.clamp(min=1))[:, None].expand_as(chosen)[chosen]
    return (losses * shares).sum() / (counts > 0).sum().clamp(min=1)


def at_places(
    tokens: Float[Tensor, "batch tokens dim"], places: Float[Tensor, "batch n 2"]
) -> Float[Tensor, "batch n dim"]:
    """Interpolate tokens of a square grid at coordinates -1..1 of its image."""
    side = math.isqrt(tokens.shape[1])
    maps = tokens.mT.unflatten(2, (side, side))
    read = F.grid_sample(
        maps.float(), places[:, :, None].float(), mode="bilinear", padding_mode="border", align_corners=False
    )
    return read[..., 0].mT.to(tokens.dtype)


def block_masks(
    count: int, grid: int, *, share: tuple[float, float], probability: float, generator: torch.Generator
) -> Bool[Tensor, "count tokens"]:
    """Draw masks of a few rectangles each (Bao et al., BEiT, ICLR 2022, mask in blocks).

    Args:
        count: How many.
        grid: Tokens on a side.
        share: Smallest and largest share of the tokens that rectangles cover, overlaps counted twice.
        probability: That there is a mask at all.
        generator: Source of all that is random, on the CPU.
    """
    drawn = torch.rand(4, count, _BLOCKS, generator=generator)
    chosen = torch.rand(2, count, 1, generator=generator)
    area = (share[0] + (share[1] - share[0]) * chosen[0]) * grid**2 / _BLOCKS
    stretch = (math.log(3) * (2 * drawn[0] - 1)).exp()
    rows, cols = ((area * s).sqrt().round().clamp(1, grid) for s in (stretch, 1 / stretch))
    top, left = ((grid - extent + 1).mul(place).floor() for extent, place in ((rows, drawn[1]), (cols, drawn[2])))
    cells = torch.arange(grid)
    inside_rows = (cells >= top[..., None]) & (cells < (top + rows)[..., None])
    inside_cols = (cells >= left[..., None]) & (cells < (left + cols)[..., None])
    covered = (inside_rows[..., :, None] & inside_cols[..., None, :]).any(1).flatten(1)
    return covered & (chosen[1] < probability)


def information(distributions: Float[Tensor, "n prototypes"]) -> tuple[float, float]:
    """Return (mean entropy of distributions, entropy of their mean), in nats.

    Their difference is what an answer says about its picture. It is 0 in both ways in which self-distillation
    collapses: the same prototype for everything, and all prototypes alike.
    """
    each = -(distributions * distributions.clamp(min=1e-12).log()).sum(-1).mean()
    mean = distributions.mean(0)
    return float(each), float(-(mean * mean.clamp(min=1e-12).log()).sum())
