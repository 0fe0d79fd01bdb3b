"""Splice: paint the structure of one image with the appearance of another.

After Tumanyan, Bar-Tal, Bagon and Dekel, Splicing ViT Features for Semantic Appearance Transfer, CVPR 2022. A small
generator is trained for one pair of images; a frozen vision transformer says how well its pictures do. ``splice`` runs
the whole; :class:`Splicer` is one run step by step, for those who want the loop in their own hands.
"""

from vitfeats.apps.splice.run import SpliceInterrupted, SpliceResult, splice
from vitfeats.apps.splice.splicer import Splicer
from vitfeats.apps.splice.terms import Term, default_terms

__all__ = ["SpliceInterrupted", "SpliceResult", "Splicer", "Term", "default_terms", "splice"]
