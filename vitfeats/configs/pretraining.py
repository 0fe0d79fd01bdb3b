"""Settings of self-distillation."""

from dataclasses import dataclass
from typing import Literal

from vitfeats.configs.checks import one_of, require
from vitfeats.errors import ConfigError


@dataclass(frozen=True)
class PretrainConfig:
    """How to train a vision model on pictures without labels, or with them (Caron et al., DINO; Zhou et al., iBOT).

    Attributes:
        model: A vision transformer of timm by name, or "vgg_mini", a small convolutional network.
        start: Weights to begin with: a file, or the name of a bundled model ("mini"); empty begins at random.
        size: Side of the large crops in pixels, a multiple of the patch.
        local_size: Side of the small crops in pixels, a multiple of the patch.
        local_crops: How many small crops of a picture the student sees, beside two large ones.
        global_scale: Smallest and largest share of the picture that a large crop covers.
        local_scale: The same of a small one.
        turn: Largest angle that crops are turned by, in degrees.
        flip: Probability that a crop is mirrored.
        colour: How much colours are changed: 1 as DINO does (brightness, contrast, saturation, hue, grey, solarised),
            0 not at all, where a colour tells what a thing is.
        blur: Of DINO's probabilities that a crop is blurred.
        views: Weight of DINO's loss: the CLS token of one crop says what the teacher's says of another.
        masked: Weight of iBOT's loss: a masked patch says what the teacher's, which sees it, says.
        places: Weight of finding a patch of one large crop again in the other, among its places.
        labels: Weight of the cross-entropy of a linear classifier on CLS, for pictures in folders of classes.
        unlabelled: Folders that are no class.
        mask_share: Smallest and largest share of a crop's patches that are masked.
        mask_probability: Share of the large crops that are masked at all.
        prototypes: Entries of the distribution that student and teacher agree on.
        hidden: Channels between the layers of the head.
        bottleneck: Channels that prototypes are compared in.
        student_temperature: Sharpness of the student's answers.
        places_temperature: What cosines between patches are divided by, for ``places``.
        teacher_temperature: Of the teacher's, at the first step and after ``warmup``.
        centre_momentum: Of the running mean that is taken off the teacher's answers.
        momentum: Of the teacher's weights, at the first step; it rises to 1.
        steps: Optimiser steps.
        minutes: Minutes to train for, in place of ``steps``: after 20 steps their number is worked out, and kept. 0 is
            no such limit.
        batch: Pictures that run at once.
        accumulate: Batches of an optimiser step.
        lr: Largest learning rate of AdamW, reached after ``warmup`` steps; then a cosine down to 0.
        warmup: Steps in which the learning rate and the teacher's temperature rise.
        weight_decay: At the first step and at the last, a cosine between.
        clip: Largest norm of the gradient; 0 does not clip.
        drop_path: Largest probability that a block is skipped, for the student.
        freeze_prototypes: Steps in which the prototypes stay as they are.
        precision: "float32", "bfloat16" autocast, or "auto": bfloat16 on a GPU.
        side: Shorter side in pixels that pictures are kept in memory with.
        neighbours: k of the k-NN accuracy that is measured where there are classes.
        patience: Steps without information in the teacher's answers, after ``warmup``, that stop the run.
        validate_every: Steps from one measurement to the next; 0 never.
        checkpoint_every: Steps from one checkpoint to the next, where a folder is written; 0 writes one at the end.

    Raises:
        ConfigError: If a number is out of its range.
    """

    model: str = "vit_tiny_patch16_224"
    start: str = ""
    size: int = 112
    local_size: int = 48
    local_crops: int = 4
    global_scale: tuple[float, float] = (0.3, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.3)
    turn: float = 20.0
    flip: float = 0.5
    colour: float = 1.0
    blur: float = 1.0
    views: float = 1.0
    masked: float = 1.0
    places: float = 3.0
    labels: float = 0.0
    unlabelled: tuple[str, ...] = ()
    mask_share: tuple[float, float] = (0.1, 0.5)
    mask_probability: float = 0.5
    prototypes: int = 1024
    hidden: int = 1024
    bottleneck: int = 192
    student_temperature: float = 0.1
    places_temperature: float = 0.07
    teacher_temperature: tuple[float, float] = (0.04, 0.06)
    centre_momentum: float = 0.9
    momentum: float = 0.992
    steps: int = 10000
    minutes: float = 0.0
    batch: int = 32
    accumulate: int = 1
    lr: float = 0.0005
    warmup: int = 200
    weight_decay: tuple[float, float] = (0.04, 0.2)
    clip: float = 3.0
    drop_path: float = 0.1
    freeze_prototypes: int = 100
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    side: int = 160
    neighbours: int = 20
    patience: int = 200
    validate_every: int = 500
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        require(self, 1, "size", "local_size", "prototypes", "hidden", "bottleneck", "steps", "batch", "accumulate")
        require(self, 1, "side", "neighbours", "patience")
        require(self, 0, "local_crops", "views", "masked", "places", "labels", "minutes", "lr", "warmup", "clip")
        require(self, 0, "turn", "freeze_prototypes", "validate_every", "checkpoint_every")
        require(self, 0, "flip", "colour", "blur", "mask_probability", most=1)
        require(self, 0, "centre_momentum", "momentum", "drop_path", most=1)
        one_of(self, "precision", "auto", "float32", "bfloat16")
        for name in ("global_scale", "local_scale", "mask_share"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ConfigError(f"expected {name} as two shares in 0..1, in order, got {(low, high)}")
        if min(self.student_temperature, self.places_temperature, *self.teacher_temperature) <= 0:
            raise ConfigError("expected temperatures above 0; try 0.1 for the student, 0.04 and 0.06 for the teacher")
        if not self.views + self.masked + self.places + self.labels:
            raise ConfigError("expected a loss with a weight above 0, got none; try views=1.0, masked=1.0")
        if self.side < self.size:
            raise ConfigError(f"expected a side of at least the large crops' {self.size}, got {self.side}")
