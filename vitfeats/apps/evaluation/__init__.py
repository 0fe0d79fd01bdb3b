"""Measuring correspondences, and what an image has of the two that it was made from.

PCK, pairs with known answers, and the tables made from them; structure, appearance and colours of a transfer.
"""

from vitfeats.apps.evaluation.colours import colour_distance, colour_shift, match_colours
from vitfeats.apps.evaluation.datasets import Pair, StereoPair, WarpedImages, read_pairs
from vitfeats.apps.evaluation.foreground import foreground_iou, foreground_mask
from vitfeats.apps.evaluation.neighbours import neighbours_accuracy
from vitfeats.apps.evaluation.pck import pck
from vitfeats.apps.evaluation.tables import Row, raw_patches, stereo_table, warp_table
from vitfeats.apps.evaluation.transfer import (
    Judge,
    Judgement,
    TransferMeasures,
    appearance_similarity,
    measure_transfer,
    patch_distance,
    structure_distance,
    transfer_markdown,
    transfer_table,
)

__all__ = [
    "Judge",
    "Judgement",
    "Pair",
    "Row",
    "StereoPair",
    "TransferMeasures",
    "WarpedImages",
    "appearance_similarity",
    "colour_distance",
    "colour_shift",
    "foreground_iou",
    "foreground_mask",
    "match_colours",
    "measure_transfer",
    "neighbours_accuracy",
    "patch_distance",
    "pck",
    "raw_patches",
    "read_pairs",
    "stereo_table",
    "structure_distance",
    "transfer_markdown",
    "transfer_table",
    "warp_table",
]
