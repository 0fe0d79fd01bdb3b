"""Settings of training networks of style transfer."""

from dataclasses import dataclass
from typing import Any, Literal

from vitfeats.configs.checks import one_of, require
from vitfeats.configs.presets import preset
from vitfeats.errors import ConfigError

StyleMethod = Literal["adaattn", "sanet", "adain"]
STYLE_METHODS: tuple[StyleMethod, ...] = ("adaattn", "sanet", "adain")


@dataclass(frozen=True)
class TrainStylizerConfig:
    """How to train a network of style transfer. Presets have the published numbers of each method.

    Attributes:
        method: "adaattn" (Liu et al., ICCV 2021), "sanet" (Park and Lee, CVPR 2019) or "adain" (Huang and Belongie,
            ICCV 2017).
        encoder: Model whose maps relu1_1 to relu5_1 it works on; it is not trained.
        widths: Channels of the decoder at the sizes of relu1_1, relu2_1 and relu3_1. Default: those of the encoder.
        inner: Channels that attention compares. Default: all of them, as published.
        size: Side of the crops in pixels, a multiple of 16, 32 at least.
        load: Shorter side that the command reads pictures at, before they are cropped; in Python, pass it to
            ``read_pictures``.
        crop: Smallest side of a crop, as a share of the picture's shorter side; crops are brought to `size`.
        steps: Optimiser steps.
        batch: Pairs of content and style a step.
        start: File of weights to begin with, as a run writes; those that fit by name and shape are taken, such as the
            decoder of another method. Empty begins at random.
        warmup: How many of these steps come first with the identity loss alone, so that what is painted is sharp before
            it is styled; none, as published.
        lr: Learning rate of Adam.
        schedule: "constant", or "cosine" from lr down to 0.
        clip: Largest norm of the gradient; 0 is no limit, as published.
        content: Weight of the content loss: of AdaIN to the stylised map, else to the content's normalised maps
            relu4_1 and relu5_1.
        style: Weight of the global style loss.
        style_levels: Levels, 1 to 5, of the global style loss.
        local: Weight of AdaAttN's local feature loss, at relu2_1 to relu5_1.
        identity: Weight of the squared difference of contents and styles that are stylised with themselves, of
            pixels; of maps it is a 50th.
        most: Style positions that attention and the local loss look at, drawn at random.
        checkpoint_every: Steps from one checkpoint to the next, where a folder is written; 0 writes one at the end.
        snapshot_every: Steps from one picture of results to the next; 0 writes one at the end.

    Raises:
        ConfigError: If a number is out of its range.
    """

    method: StyleMethod = "adaattn"
    encoder: str = "vgg_mini"
    widths: tuple[int, int, int] | None = None
    inner: int | None = None
    size: int = 256
    load: int = 512
    crop: float = 0.5
    steps: int = 50000
    batch: int = 8
    start: str = ""
    warmup: int = 0
    lr: float = 0.0002
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 0.0
    content: float = 0.0
    style: float = 10.0
    style_levels: tuple[int, ...] = (2, 3, 4, 5)
    local: float = 3.0
    identity: float = 0.0
    most: int = 4096
    checkpoint_every: int = 500
    snapshot_every: int = 500

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        one_of(self, "method", *STYLE_METHODS)
        one_of(self, "schedule", "constant", "cosine")
        require(self, 32, "size")
        require(self, 1, "load", "steps", "batch", "most", *(["inner"] if self.inner is not None else []))
        weights = ("content", "style", "local", "identity")
        require(self, 0, "warmup", "lr", "clip", *weights, "checkpoint_every", "snapshot_every")
        require(self, 0, "crop", most=1)
        object.__setattr__(self, "style_levels", tuple(self.style_levels))
        if self.widths is not None:
            object.__setattr__(self, "widths", tuple(self.widths))
            if len(self.widths) != 3 or min(self.widths) < 1:
                raise ConfigError(f"expected three widths of at least 1, got {self.widths}")
        if not self.style_levels or not set(self.style_levels) <= {1, 2, 3, 4, 5}:
            raise ConfigError(f"expected style_levels from 1 to 5, got {self.style_levels}")
        if self.size % 16:
            raise ConfigError(f"expected a size that is a multiple of 16, got {self.size}")
        if self.load < self.size:
            raise ConfigError(f"expected load of at least the size {self.size}, got {self.load}")
        if self.crop == 0:
            raise ConfigError("expected a crop above 0, got 0")
        if not any((self.content, self.style, self.local, self.identity)):
            raise ConfigError("expected a loss with a weight above 0, got none")

    @classmethod
    def preset(cls, name: StyleMethod = "adaattn", **changes: Any) -> "TrainStylizerConfig":
        """Return the settings of a method, with some of them changed.

        Args:
            name: "adaattn", "sanet" or "adain".
            **changes: Other values.

        Raises:
            ConfigError: If there is no such method or setting.
        """
        return preset(cls, STYLIZER_PRESETS, name, changes)


STYLIZER_PRESETS: dict[str, dict[str, Any]] = {
    "adaattn": {},
    "sanet": {
        "method": "sanet",
        "lr": 0.0001,
        "batch": 5,
        "content": 1.0,
        "style": 3.0,
        "style_levels": (1, 2, 3, 4, 5),
        "local": 0.0,
        "identity": 50.0,
    },
    "adain": {
        "method": "adain",
        "lr": 0.0001,
        "content": 1.0,
        "style_levels": (1, 2, 3, 4),
        "local": 0.0,
    },
}
"""What the methods change in the defaults of :class:`TrainStylizerConfig`."""
