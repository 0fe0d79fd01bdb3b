"""Settings of training: small diffusion models, aggregation networks."""

from dataclasses import dataclass
from typing import Literal

from vitfeats.configs.checks import one_of, require
from vitfeats.errors import ConfigError


@dataclass(frozen=True)
class TrainDiffusionConfig:
    """How to train a small diffusion model on pixels (Ho et al., Denoising Diffusion Probabilistic Models, 2020).

    Attributes:
        size: Side of the pictures in pixels, a multiple of 2 to the number of channels less one.
        channels: Of the network, from the finest scale to the coarsest, each a multiple of 16.
        blocks: Residual blocks of a scale on the way down; one more on the way up.
        attention: Scales, counted from the finest (0), whose blocks attend.
        steps: Optimiser steps.
        batch: Pictures a step.
        lr: Largest learning rate of Adam, reached after `warmup` steps.
        warmup: Steps in which the learning rate rises from 0.
        schedule: "constant", or "cosine" from lr down to 0.
        average: Decay of the running average of the weights, which is what is kept in the end.
        crop: Smallest side of a crop, as a share of the picture's shorter side.
        flip: Probability that a picture is mirrored.
        noise_levels: Steps of the noise schedule.
        betas: Noise variance added at the first and at the last of them, linear between.
        prediction: What the network says: "v_prediction", the velocity between picture and noise (Salimans and Ho,
            Progressive Distillation, ICLR 2022), which stays well-posed where all is noise; or "epsilon", the noise.
        start: File of weights to begin with; empty begins at random.
        minutes: Stop after so many minutes, to be resumed; 0 is no limit.
        validate_every: Steps from one loss on the held-out pictures to the next; 0 never.
        checkpoint_every: Steps from one checkpoint to the next, where a folder is written; 0 writes one at the end.

    Raises:
        ConfigError: If a number is out of its range.
    """

    size: int = 64
    channels: tuple[int, ...] = (16, 32, 64, 128)
    blocks: int = 2
    attention: tuple[int, ...] = (2, 3)
    steps: int = 4000
    batch: int = 16
    lr: float = 0.0008
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    average: float = 0.998
    crop: float = 0.8
    flip: float = 0.5
    noise_levels: int = 1000
    betas: tuple[float, float] = (0.0001, 0.02)
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    start: str = ""
    minutes: float = 0.0
    validate_every: int = 250
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        require(self, 1, "size", "blocks", "steps", "batch", "noise_levels")
        require(self, 0, "lr", "warmup", "minutes", "validate_every", "checkpoint_every")
        require(self, 0, "average", "crop", "flip", most=1)
        if not self.channels or any(c < 16 or c % 16 for c in self.channels):
            raise ConfigError(f"expected channels that are multiples of 16, got {self.channels}")
        coarsest = 2 ** (len(self.channels) - 1)
        if self.size % coarsest:
            raise ConfigError(f"expected a size that is a multiple of {coarsest} for these scales, got {self.size}")
        if any(not 0 <= scale < len(self.channels) for scale in self.attention):
            raise ConfigError(f"expected attention scales from 0 to {len(self.channels) - 1}, got {self.attention}")
        if not 0 < self.betas[0] <= self.betas[1] < 1:
            raise ConfigError(f"expected betas in 0..1, in order, got {self.betas}")
        if self.crop == 0:
            raise ConfigError("expected a crop above 0, got 0")
        one_of(self, "prediction", "epsilon", "v_prediction")
        one_of(self, "schedule", "constant", "cosine")


@dataclass(frozen=True)
class TrainHyperfeaturesConfig:
    """How to train an aggregation network on pairs (Luo et al., Diffusion Hyperfeatures, NeurIPS 2023).

    The defaults are the published numbers, but for those that were not published: cell, validation, the cache.

    Attributes:
        steps: Optimiser steps, one pair each; each epoch takes all pairs in an order of its own.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        schedule: "constant", or "cosine" from lr down to 0.
        temperature: What cosine similarities are divided by in the loss.
        dim: Channels of the result, a multiple of 4 · groups.
        groups: Of the group norms.
        cell: Side of the result's cells in pixels of the network's image. Default: that of the latents (8 for Stable
            Diffusion), 2 for models of pixels.
        validate_every: Steps from one PCK on the validation pairs to the next; 0 never.
        checkpoint_every: Steps from one checkpoint to the next, where a folder is written; 0 writes one at the end.
        cache_gib: GiB on disk that the maps of the diffusion model may take, where a folder is written; 0 keeps none. A
            picture of 512 × 512 pixels takes 0.15 GiB at 11 steps of Stable Diffusion 1.5.

    Raises:
        ConfigError: If a number is out of its range.
    """

    steps: int = 5000
    lr: float = 0.001
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    temperature: float = 0.07
    dim: int = 384
    groups: int = 32
    cell: int | None = None
    validate_every: int = 500
    checkpoint_every: int = 100
    cache_gib: float = 4.0

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        require(self, 1, "steps", "dim", "groups", *(["cell"] if self.cell is not None else []))
        require(self, 0, "lr", "weight_decay", "temperature", "validate_every", "checkpoint_every", "cache_gib")
        if self.temperature == 0:
            raise ConfigError("expected a temperature above 0, got 0")
        one_of(self, "schedule", "constant", "cosine")
