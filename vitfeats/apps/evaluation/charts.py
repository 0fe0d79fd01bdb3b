"""Pictures of an evaluation: its best and worst pairs, and how many points are right at which threshold."""

from collections.abc import Sequence

import torch
from PIL import Image

from vitfeats import plot
from vitfeats.apps.evaluation.datasets import Pair
from vitfeats.apps.evaluation.results import PairErrors, PckResult
from vitfeats.errors import ConfigError

THRESHOLDS = tuple(step / 100 for step in range(31))


def draw_pairs(result: PckResult, dataset: Sequence[Pair], *, best: int = 3, worst: int = 3) -> Image.Image:
    """Draw the pairs that a method did best, then those it did worst, one below the other.

    Left the points that were asked for; right a ring where each should be, tied to where it was carried: a dot if that
    is right at the first threshold, a cross if not. Points that do not count are left out.

    Args:
        result: From :func:`~vitfeats.apps.evaluation.evaluate_pck`.
        dataset: What it was measured on.
        best: How many of the best.
        worst: How many of the worst; a pair is drawn once.

    Raises:
        ConfigError: If there is nothing to draw.
    """
    ranked = result.ranked()
    chosen = ranked[:best] + ranked[max(best, len(ranked) - worst) :]
    if not chosen:
        raise ConfigError("expected at least one pair with points that count, got none to draw")
    drawn = [_pair(errors, dataset[errors.index], result) for errors in chosen]
    width = max(picture.width for picture in drawn)
    scaled = [p.resize((width, round(p.height * width / p.width)), Image.Resampling.LANCZOS) for p in drawn]
    gap = width // 100
    canvas = Image.new("RGB", (width, sum(p.height + gap for p in scaled) - gap), "white")
    top = 0
    for picture in scaled:
        canvas.paste(picture, (0, top))
        top += picture.height + gap
    return canvas


def draw_accuracy(results: Sequence[PckResult]) -> Image.Image:
    """Draw PCK over thresholds of 0 to 0.3, one line a method, each by its own protocol."""
    # At no distance at all nobody is right: so that lines begin at the origin.
    return plot.accuracy({one.name: {t: one.pck(t) if t else 0.0 for t in THRESHOLDS} for one in results})


def _pair(errors: PairErrors, pair: Pair, result: PckResult) -> Image.Image:
    counted = [not result.protocol.visible_only or seen for seen in errors.visible]
    keep = torch.tensor(counted)
    carried = torch.tensor(errors.predicted)[keep].nan_to_num()
    return plot.points(
        pair.image_a,
        pair.points_a[keep],
        pair.image_b,
        carried,
        targets=pair.points_b[keep],
        right=errors.hits(result.protocol),
    )
