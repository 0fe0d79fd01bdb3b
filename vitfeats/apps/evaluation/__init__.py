"""Measuring correspondences, and what an image has of the two that it was made from.

PCK under named protocols, readers of data sets, pairs with known answers, and the tables made from them; structure,
appearance and colours of a transfer.
"""

from vitfeats.apps.evaluation.carrying import carry_points
from vitfeats.apps.evaluation.charts import draw_accuracy, draw_pairs
from vitfeats.apps.evaluation.colours import colour_distance, colour_shift, match_colours
from vitfeats.apps.evaluation.correspondence import evaluate_method, evaluate_pck, same_place
from vitfeats.apps.evaluation.datasets import Pair, StereoPair, WarpedImages
from vitfeats.apps.evaluation.describing import describe_with, fused, joined, joint_pca, keep_in
from vitfeats.apps.evaluation.drawn import AP10K, CUB200
from vitfeats.apps.evaluation.foreground import foreground_iou, foreground_mask
from vitfeats.apps.evaluation.neighbours import neighbours_accuracy
from vitfeats.apps.evaluation.pck import pck
from vitfeats.apps.evaluation.readers import PairList, PairTable, PFPascal, PFWillow, SPair71k, open_pairs, read_pairs
from vitfeats.apps.evaluation.results import PairErrors, PckResult
from vitfeats.apps.evaluation.rows import TABLES, EvalRow, Measured, Part, evaluate_table, table_markdown
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
    "AP10K",
    "CUB200",
    "EvalRow",
    "Judge",
    "Judgement",
    "Measured",
    "PFPascal",
    "PFWillow",
    "Pair",
    "PairErrors",
    "PairList",
    "PairTable",
    "Part",
    "PckResult",
    "Row",
    "SPair71k",
    "StereoPair",
    "TABLES",
    "TransferMeasures",
    "WarpedImages",
    "appearance_similarity",
    "carry_points",
    "colour_distance",
    "colour_shift",
    "describe_with",
    "draw_accuracy",
    "draw_pairs",
    "evaluate_method",
    "evaluate_pck",
    "evaluate_table",
    "foreground_iou",
    "foreground_mask",
    "fused",
    "joined",
    "joint_pca",
    "keep_in",
    "match_colours",
    "measure_transfer",
    "neighbours_accuracy",
    "open_pairs",
    "patch_distance",
    "pck",
    "raw_patches",
    "read_pairs",
    "same_place",
    "stereo_table",
    "structure_distance",
    "table_markdown",
    "transfer_markdown",
    "transfer_table",
    "warp_table",
]
