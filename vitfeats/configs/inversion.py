"""Settings of feature inversion, and their presets."""

from dataclasses import dataclass
from typing import Any, Literal

from vitfeats.configs.checks import one_of, require
from vitfeats.configs.presets import Preset, preset
from vitfeats.errors import ConfigError


@dataclass(frozen=True)
class InvertConfig:
    """How to find the picture that has given features (Tumanyan et al., CVPR 2022, section 3).

    Attributes:
        size: Shorter side of the picture in pixels, or height and width; snapped to whole patches.
        overlap: How many tokens lie side by side on one patch: the stride is the patch divided by it. More of them tell
            more about the picture. 1 where a model's tokens cannot overlap.
        starts: Pictures to find, each from random weights of its own.
        steps: Optimiser steps; 0 leaves the pictures as the untrained networks paint them.
        lr: Learning rate of Adam.
        schedule: "constant", or "cosine" from lr down to 0.
        noise: For cls taps, noise added to the networks' input at every step: pairs (from which share of the steps on,
            standard deviation). Other facets take none.
        smooth: Weight of the picture's mean absolute difference between neighbouring pixels, against a feature loss
            that is 1 at the first step.
        inputs: Channels of the networks' input.
        channels: Of the networks, from the finest scale to the coarsest.
        kernels: Side of the convolutions of each scale, odd; one number is used for all.

    Raises:
        ConfigError: If a number is out of its range.
    """

    size: int | tuple[int, int] = 112
    overlap: int = 2
    starts: int = 1
    steps: int = 600
    lr: float = 0.005
    schedule: Literal["constant", "cosine"] = "cosine"
    noise: tuple[tuple[float, float], ...] = ((0.0, 2.0), (0.5, 0.5), (0.75, 0.1))
    smooth: float = 0.15
    inputs: int = 32
    channels: tuple[int, ...] = (32, 32, 64, 64, 64)
    kernels: int | tuple[int, ...] = 3

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        require(self, 1, "overlap", "starts", "inputs")
        require(self, 0, "steps", "lr", "smooth")
        one_of(self, "schedule", "constant", "cosine")
        shares = [share for share, _ in self.noise]
        if shares != sorted(shares) or not all(0 <= share <= 1 and sigma >= 0 for share, sigma in self.noise):
            raise ConfigError(
                "expected noise as pairs (share of the steps in 0..1, standard deviation of at least 0), shares in "
                f"order, got {self.noise}; for example ((0.0, 10.0), (0.5, 2.0))"
            )

    @classmethod
    def preset(cls, name: Preset = "fast", **changes: Any) -> "InvertConfig":
        """Return settings by name, with some of them changed.

        Args:
            name: "reference" has the published numbers; "fast" is the default, minutes on a CPU; "draft" for a first
                look.
            **changes: Other values.

        Raises:
            ConfigError: If there is no such preset or setting.
        """
        return preset(cls, INVERT_PRESETS, name, changes)


INVERT_PRESETS: dict[str, dict[str, Any]] = {
    "reference": {
        "size": 224,
        "overlap": 1,
        "steps": 20_000,
        "lr": 0.01,
        "schedule": "constant",
        "noise": ((0.0, 10.0), (0.5, 2.0), (0.75, 0.5)),
        "smooth": 0.0,
        "channels": (16, 32, 64, 128, 128, 128),
        "kernels": (7, 7, 5, 5, 3, 3),
    },
    "fast": {},
    "draft": {"steps": 150},
}
"""What the presets change in the defaults of :class:`InvertConfig`."""
