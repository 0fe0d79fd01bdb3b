"""Co-segmentation and part co-segmentation of sets of images, after Deep ViT Features as Dense Visual Descriptors."""

from vitfeats.apps.cosegmentation.clusters import Clusters, elbow_clusters, fit_clusters
from vitfeats.apps.cosegmentation.evidence import (
    border_saliency,
    cluster_saliency,
    cluster_weights,
    common,
    count_votes,
    elect,
    inliers,
)
from vitfeats.apps.cosegmentation.foreground import Coarse, find_foreground
from vitfeats.apps.cosegmentation.parts import Parts, find_parts
from vitfeats.apps.cosegmentation.reading import ReadSet, read_images
from vitfeats.apps.cosegmentation.refine import grabcut, refine_mask
from vitfeats.apps.cosegmentation.run import cosegment, halved, part_cosegment
from vitfeats.apps.cosegmentation.segments import WRITTEN, Cosegmentation, Segment

__all__ = [
    "Clusters",
    "Coarse",
    "Cosegmentation",
    "Parts",
    "ReadSet",
    "Segment",
    "WRITTEN",
    "border_saliency",
    "cluster_saliency",
    "cluster_weights",
    "common",
    "cosegment",
    "count_votes",
    "elbow_clusters",
    "elect",
    "find_foreground",
    "find_parts",
    "fit_clusters",
    "grabcut",
    "halved",
    "inliers",
    "part_cosegment",
    "read_images",
    "refine_mask",
]
