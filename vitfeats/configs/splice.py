"""Settings of splicing, and their presets."""

from dataclasses import dataclass
from typing import Any, Literal

from vitfeats.configs.checks import one_of, require
from vitfeats.configs.presets import Preset, preset
from vitfeats.errors import ConfigError


@dataclass(frozen=True)
class SpliceConfig:
    """How to paint the structure of one image with the appearance of another (Tumanyan et al., CVPR 2022).

    A weight of 0 leaves its term out. Losses are means over elements, as in the published code; the defaults are those
    of the preset "fast". "Whole" terms are those of the uncropped structure image, every `whole_every` steps.

    Attributes:
        appearance: Weight of the appearance term: the CLS token of the made image against that of the appearance image.
        structure: Weight of the structure term: self-similarity of keys, against the structure image.
        identity: Weight of the identity term: keys of the painted appearance image, against itself.
        whole_appearance: Weight of the appearance term of the whole image.
        whole_structure: Weight of the structure term of the whole image.
        transport: Weight of the transport terms, one a tap: tokens of the made image against those of the appearance
            image, carried to each other at the least cost. Not published.
        transport_taps: Where they are read.
        place: How much the place in the image counts in that cost.
        relative: Divide the appearance terms by the distance of the two images' CLS tokens, so that their weight
            means the same for every model. Not published.
        whole_every: Steps from one whole image to the next.
        warmup: Steps at the beginning with the appearance term alone (besides the whole image).
        structure_tap: Where structure and identity are compared.
        appearance_tap: Where appearance is compared.
        size: Shorter side of what the model sees, in pixels.
        max_size: Longest side of what the model sees, in pixels.
        stride: Step between the model's tokens in pixels; must divide the patch. Default: the patch.
        resize: "antialiased": bicubic, to whole patches. "published": bilinear without antialiasing, what exceeds whole
            patches cut off, as torchvision 0.10 and DINO's release do together.
        views: Augmented crops of each image that are made once, with their features, and drawn from at random; 0 makes
            new ones at every step.
        smallest_crop: Smallest side of a crop, as a share of the image's height.
        flip: Probability that an image is flipped.
        jitter: Probability that the structure image's colours are shifted.
        blur: Probability that the structure image is blurred.
        working_size: Shorter side in pixels at which the generator is trained; its picture is then carried to full
            resolution with the structure image as guide. None is full resolution.
        residual: The generator adds to the structure image instead of painting anew, and so begins at it.
        channels: Of the generator, from the finest scale to the coarsest.
        steps: Optimiser steps.
        lr: Learning rate of Adam.
        betas: Decay rates of Adam.
        schedule: "constant", or "cosine" from lr down to 0.
        dtype: Precision of model and generator; auto is float32 on a CPU and bfloat16 autocast on a GPU.
        channels_last: Keep the generator's arrays with their channels last.
        compile: Compile the generator with torch.compile (minutes at first, needs a C++ compiler on a CPU).
        checkpoint_every: Steps from one checkpoint to the next, where a folder is written; 0 writes one at the end.
        snapshot_every: Steps from one picture to the next, where a folder is written; 0 writes none.
        patience: Stop where the mean loss of so many steps is not at least 1 % below that of as many before; 0 never.

    Raises:
        ConfigError: If a number is out of its range.
    """

    appearance: float = 1.0
    structure: float = 2.0
    identity: float = 0.0
    whole_appearance: float = 0.0
    whole_structure: float = 0.0
    transport: float = 2.0
    transport_taps: tuple[str, ...] = ("token@0", "token@2")
    place: float = 10.0
    relative: bool = True
    whole_every: int = 75
    warmup: int = 1
    structure_tap: str = "key@-1"
    appearance_tap: str = "cls@-1"
    size: int = 224
    max_size: int = 480
    stride: int | None = None
    resize: Literal["antialiased", "published"] = "antialiased"
    views: int = 16
    smallest_crop: float = 0.95
    flip: float = 0.0
    jitter: float = 0.0
    blur: float = 0.0
    working_size: int | None = 128
    residual: bool = True
    channels: tuple[int, ...] = (16, 32, 64, 128, 128)
    steps: int = 150
    lr: float = 0.01
    betas: tuple[float, float] = (0.5, 0.99)
    schedule: Literal["constant", "cosine"] = "cosine"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool = False
    compile: bool = False
    checkpoint_every: int = 100
    snapshot_every: int = 100
    patience: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        whole = ("steps", "size", "max_size", "whole_every")
        require(self, 1, *whole, *(name for name in ("stride", "working_size") if getattr(self, name) is not None))
        require(
            self, 0, "appearance", "structure", "identity", "whole_appearance", "whole_structure", "warmup", "views"
        )
        require(self, 0, "transport", "place")
        require(self, 0, "lr", "checkpoint_every", "snapshot_every", "patience")
        require(self, 0, "flip", "jitter", "blur", most=1)
        if not 0 < self.smallest_crop <= 1:
            raise ConfigError(f"expected smallest_crop in 0..1 and not 0, got {self.smallest_crop}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"expected betas of at least 0 and below 1, got {self.betas}")
        if self.max_size < self.size:
            raise ConfigError(f"expected max_size of at least size ({self.size}), got {self.max_size}")
        weights = (self.appearance, self.structure, self.identity, self.whole_appearance, self.whole_structure)
        weights = (*weights, self.transport)
        one_of(self, "schedule", "constant", "cosine")
        one_of(self, "resize", "antialiased", "published")
        if not any(weights):
            raise ConfigError("expected at least one weight above 0, got none; nothing would be optimised")

    @classmethod
    def preset(cls, name: Preset = "fast", **changes: Any) -> "SpliceConfig":
        """Return settings by name, with some of them changed.

        Args:
            name: "reference" is the published recipe, number for number; "fast" the default; "draft" for a first look,
                on a CPU.
            **changes: Other values.

        Raises:
            ConfigError: If there is no such preset or setting.
        """
        return preset(cls, SPLICE_PRESETS, name, changes)


SPLICE_PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "appearance": 10.0,
        "structure": 1.0,
        "identity": 1.0,
        "whole_appearance": 10.0,
        "whole_structure": 1.0,
        "transport": 0.0,
        "relative": False,
        "flip": 0.5,
        "jitter": 0.5,
        "blur": 0.2,
        "lr": 0.002,
        "betas": (0.0, 0.99),
        "schedule": "constant",
        "resize": "published",
        "views": 0,
        "working_size": None,
        "residual": False,
        "steps": 10_000,
        "dtype": "float32",
    },
    "fast": {},
    "draft": {"steps": 60, "working_size": 96},
}
"""What the presets change in the defaults of :class:`SpliceConfig`."""
