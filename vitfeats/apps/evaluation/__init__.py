"""Measuring correspondences: PCK, pairs with known answers, and the tables made from them."""

from vitfeats.apps.evaluation.datasets import Pair, StereoPair, WarpedImages
from vitfeats.apps.evaluation.pck import pck
from vitfeats.apps.evaluation.tables import Row, raw_patches, stereo_table, warp_table

__all__ = ["Pair", "Row", "StereoPair", "WarpedImages", "pck", "raw_patches", "stereo_table", "warp_table"]
