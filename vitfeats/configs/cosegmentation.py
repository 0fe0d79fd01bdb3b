"""Settings of co-segmentation."""

from dataclasses import dataclass
from typing import Any, Literal

from vitfeats.configs.checks import one_of, require, whole
from vitfeats.configs.presets import preset
from vitfeats.errors import ConfigError

CosegmentPreset = Literal["default", "reference"]


@dataclass(frozen=True)
class CosegmentConfig:
    """How to find what a set of images shares, and its parts.

    The preset "reference" has the numbers of Amir et al., Deep ViT Features as Dense Visual Descriptors, 2021, for
    ``dino_vits8``. The default asks less of a model.

    Attributes:
        tap: What is clustered, facet@layer. Default: the model's usual tap.
        size: Shorter side of the network's input in pixels, or height and width. Default: the model's own.
        stride: Step between tokens in pixels. Default: half the patch, where tokens can overlap.
        saliency: How likely each token is foreground: "attention" of CLS at the last block, as published; "border", how
            little a token is like those at the border of its image (by the output of the last block), which needs no
            CLS; "both", that plus 0.3 times the attention, where there is one, stretched to 0..1.
        heads: Heads of which attention is averaged; default all.
        clusters: Number of clusters; 0 chooses it by the elbow rule.
        elbow: The elbow rule stops at the first number of clusters whose sum of squared distances is more than `elbow`
            times that of one cluster less.
        most_clusters: Largest number that the elbow rule tries.
        every: The first clusters are fitted on every n-th token; 0 is on all, or on `fit_tokens` of them.
        fit_tokens: Most tokens that clusters are fitted on.
        clusterings: Of foreground "weighted", how often tokens are clustered, each from another first guess; weights
            are averaged, so that less depends on the seed.
        restarts: First guesses of each k-means, of which the best is kept.
        iterations: Most iterations of k-means.
        foreground: "votes": tokens of clusters that are salient in a share `votes` of the images, as published.
            "weighted": tokens whose saliency, times the mean saliency of their cluster over all images, is in the upper
            of two groups (Otsu) of all images together.
        threshold: Mean saliency, 0 to 1, above which a cluster is salient in an image.
        votes: Share of the images in which a cluster must be salient.
        outliers: Images whose CLS has a smaller cosine to the mean CLS than this are left out; 0.7 is published. None
            keeps all.
        crops: Random crops of 95 % of the sides of each image, half of them mirrored, on which the first clusters are
            fitted too; parts are not.
        alone: How one image without others is split: by "saliency" (Otsu), or by "pca", 2-means along the first
            principal component of its tokens, of which the part at the border is background.
        refine: How token masks are brought to pixels: "grabcut" (needs OpenCV), "guided" filter or "none"; "auto" is
            grabcut where OpenCV is installed, else guided.
        refine_size: Shorter side in pixels of the images that masks are refined on; larger ones are reduced.
        stages: Of parts. 2: foreground tokens are clustered into parts. 3: before, foreground tokens are clustered
            once more and only clusters that most images share are kept, for sets with other objects in them.
        part_elbow: Elbow of the clustering that the third stage adds.
        part_share: Share of the images in which a part must appear.

    Raises:
        ConfigError: If a number is out of its range.
    """

    tap: str | None = None
    size: int | tuple[int, int] | None = None
    stride: int | None = None
    saliency: Literal["attention", "border", "both"] = "both"
    heads: tuple[int, ...] = ()
    clusters: int = 40
    elbow: float = 0.975
    most_clusters: int = 14
    every: int = 0
    fit_tokens: int = 20000
    clusterings: int = 5
    restarts: int = 1
    iterations: int = 100
    foreground: Literal["weighted", "votes"] = "weighted"
    threshold: float = 0.3
    votes: float = 0.75
    outliers: float | None = None
    crops: int = 0
    alone: Literal["saliency", "pca"] = "saliency"
    refine: Literal["auto", "grabcut", "guided", "none"] = "auto"
    refine_size: int = 384
    stages: int = 2
    part_elbow: float = 0.94
    part_share: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers that nothing could be done with."""
        one_of(self, "saliency", "attention", "border", "both")
        one_of(self, "foreground", "weighted", "votes")
        one_of(self, "alone", "saliency", "pca")
        one_of(self, "refine", "auto", "grabcut", "guided", "none")
        counts = ("most_clusters", "fit_tokens", "clusterings", "restarts", "iterations")
        whole(self, "clusters", "every", "crops", "refine_size", "stages", *counts)
        require(self, 0, "clusters", "every", "crops")
        require(self, 1, *counts)
        require(self, 32, "refine_size")
        require(self, 0, "elbow", "part_elbow", "threshold", "votes", "part_share", most=1)
        if self.outliers is not None:
            require(self, -1, "outliers", most=1)
        if self.stages not in (2, 3):
            raise ConfigError(f"expected 2 or 3 stages, got {self.stages}")
        if isinstance(self.size, list):  # as YAML has it
            object.__setattr__(self, "size", tuple(self.size))
        if not isinstance(self.heads, tuple | list) or not all(type(head) is int for head in self.heads):
            raise ConfigError(f"expected heads as whole numbers, for example (0, 2), got {self.heads!r}")
        object.__setattr__(self, "heads", tuple(self.heads))

    @classmethod
    def preset(cls, name: CosegmentPreset = "default", **changes: Any) -> "CosegmentConfig":
        """Return named settings, with some of them changed.

        Args:
            name: "default", or "reference": the published ones, for ``dino_vits8``.
            **changes: Other values.

        Raises:
            ConfigError: If there is no such preset or setting.
        """
        return preset(cls, COSEGMENT_PRESETS, name, changes)


COSEGMENT_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {
        "tap": "key@-1",
        "size": 224,
        "stride": 4,
        "saliency": "attention",
        "heads": (0, 2, 4, 5),
        "clusters": 0,
        "every": 100,
        "restarts": 10,
        "iterations": 300,
        "foreground": "votes",
        "threshold": 0.065,
        "refine": "grabcut",
    },
}
"""What the presets change in the defaults of :class:`CosegmentConfig`."""
