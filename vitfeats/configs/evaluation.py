"""Protocols of PCK: every choice that changes the number, and the published sets of them."""

from dataclasses import dataclass
from typing import Any, Literal

from vitfeats.configs.checks import one_of
from vitfeats.configs.presets import preset
from vitfeats.errors import ConfigError

ProtocolName = Literal["spair", "hyperfeatures", "dift", "sd_dino"]
Mean = Literal["keypoint", "image", "category", "category_keypoint"]
MEANS: tuple[Mean, ...] = ("keypoint", "image", "category", "category_keypoint")


@dataclass(frozen=True)
class PckProtocol:
    """How points are carried from one image to the other, and which of them count as correct.

    Attributes:
        size: Network size of both images, shorter side or (height, width); None is the extractor's own.
        pad: Make both images square with black bars first, the image in the middle.
        predict: Where a point goes. "cell": the point takes the features of the cell it lies nearest to, and goes to
            the centre of the most similar cell. "map": both maps are enlarged, bilinear, to an image, and it goes from
            its pixel to the most similar pixel. "window": features are interpolated at the point, and it goes to the
            soft-argmax of the cells around the most similar one, see :func:`~vitfeats.transfer_points`.
        enlarged: Image that "map" enlarges to: "source", as the image was given; or "network", at ``size``, or as the
            model saw it where that is None.
        reference: What a distance is measured by: the longer side of the object's "box" in the target image, or that
            of the target "image".
        thresholds: Shares of that side within which a point is correct; the first is the main one.
        strict: Whether a point at exactly the threshold is wrong (``<``) or correct (``≤``).
        mean: "keypoint": all points of all images together. "image": the mean over images. "category": that of each
            category, then over categories. "category_keypoint": all points of a category together, then over
            categories.
        visible_only: Leave out points that are not visible in both images, where the data say so.

    Raises:
        ConfigError: If a value is none of these, or a threshold is not above 0.
    """

    size: int | tuple[int, int] | None = None
    pad: bool = False
    predict: Literal["cell", "map", "window"] = "cell"
    enlarged: Literal["source", "network"] = "source"
    reference: Literal["box", "image"] = "box"
    thresholds: tuple[float, ...] = (0.1, 0.05, 0.01)
    strict: bool = False
    mean: Mean = "category"
    visible_only: bool = False

    def __post_init__(self) -> None:
        """Refuse what no evaluation could use."""
        one_of(self, "predict", "cell", "map", "window")
        one_of(self, "enlarged", "source", "network")
        one_of(self, "reference", "box", "image")
        one_of(self, "mean", *MEANS)
        object.__setattr__(self, "thresholds", tuple(self.thresholds))  # a list of a file, too
        if not self.thresholds or not all(threshold > 0 for threshold in self.thresholds):  # a NaN, too
            raise ConfigError(f"expected thresholds above 0, at least one, got {self.thresholds}; for example (0.1,)")

    @classmethod
    def preset(cls, name: ProtocolName = "spair", **changes: Any) -> "PckProtocol":
        """Return a protocol by name, with some of its choices changed.

        Args:
            name: "spair": nearest cells at the extractor's own size, boxes, the mean over images and then categories.
                "hyperfeatures": 224 × 224, maps enlarged to it, the target image's side, all keypoints together
                (Luo et al., NeurIPS 2023). "dift": 768 × 768, maps enlarged to the image, boxes, the mean over images
                (Tang et al., NeurIPS 2023). "sd_dino": images padded to a square of 840, nearest cells, boxes, ``<``,
                visible points, the mean over categories (Zhang et al., NeurIPS 2023).
            **changes: Other values.

        Raises:
            ConfigError: If there is no such protocol or choice.
        """
        return preset(cls, PCK_PROTOCOLS, name, changes)


PCK_PROTOCOLS: dict[str, dict[str, Any]] = {
    "spair": {},
    "hyperfeatures": {
        "size": (224, 224),
        "predict": "map",
        "enlarged": "network",
        "reference": "image",
        "mean": "keypoint",
    },
    "dift": {"size": (768, 768), "predict": "map", "mean": "image"},
    "sd_dino": {"size": 840, "pad": True, "strict": True, "mean": "category_keypoint", "visible_only": True},
}
"""What the named protocols change in the defaults of :class:`PckProtocol`."""
