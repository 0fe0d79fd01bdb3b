"""Run settings, as frozen dataclasses of the standard library: the command line reads them without torch.

A run's settings are written to YAML and read from it. Unknown keys are refused: a setting with a typing error in its
name would otherwise do nothing, without a word.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from vitfeats.errors import ConfigError, nearest_names

C = TypeVar("C")

Preset = Literal["reference", "fast", "draft"]
DiffusionPreset = Literal["dift", "hyperfeatures", "hyperfeatures-one-step"]


@dataclass(frozen=True)
class ExtractorConfig:
    """Which model reads, and how.

    Attributes:
        model: A name of `vitfeats models`, timm:NAME, hf:ORG/NAME or a folder. Default: mini, or $VITFEATS_MODEL.
        size: Shorter side of the network's input in pixels, or height and width; snapped to whole patches. Default:
            the model's own.
        stride: Step between tokens in pixels; must divide the patch. Default: the patch.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.
        dtype: Precision of the network; auto is float32 on a CPU and bfloat16 autocast on a GPU.
        norm: Apply the model's final norm to token and cls.
        norm_qk: Read queries and keys after the model's q/k norm.
        rope: Read queries and keys before or after the rotary embedding.
        checkpoint: Weight file to use instead of the published weights (safetensors, or a torch file of tensors).
    """

    model: str | None = None
    size: int | tuple[int, int] | None = None
    stride: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    norm: bool = False
    norm_qk: bool = False
    rope: Literal["pre", "post"] = "pre"
    checkpoint: Path | None = None


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
        _require(self, 1, *whole, *(name for name in ("stride", "working_size") if getattr(self, name) is not None))
        _require(
            self, 0, "appearance", "structure", "identity", "whole_appearance", "whole_structure", "warmup", "views"
        )
        _require(self, 0, "transport", "place")
        _require(self, 0, "lr", "checkpoint_every", "snapshot_every", "patience")
        _require(self, 0, "flip", "jitter", "blur", most=1)
        if not 0 < self.smallest_crop <= 1:
            raise ConfigError(f"expected smallest_crop in 0..1 and not 0, got {self.smallest_crop}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"expected betas of at least 0 and below 1, got {self.betas}")
        if self.max_size < self.size:
            raise ConfigError(f"expected max_size of at least size ({self.size}), got {self.max_size}")
        weights = (self.appearance, self.structure, self.identity, self.whole_appearance, self.whole_structure)
        weights = (*weights, self.transport)
        _one_of(self, "schedule", "constant", "cosine")
        _one_of(self, "resize", "antialiased", "published")
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
        return _preset(cls, SPLICE_PRESETS, name, changes)


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


def read_config(path: Path | str, kind: type[C], *, base: C | None = None) -> C:
    """Return settings from a YAML file.

    Args:
        path: The file: setting: value, one a line; `preset: NAME` begins from a preset.
        kind: The class of the settings.
        base: Values of what the file does not set; None takes the class's defaults.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown or a value is of the wrong type or range.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected settings in YAML at '{path}', but: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"expected settings, 'name: value', one a line, in '{path}', got {type(found).__name__}")
    name = found.pop("preset", None)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type] - a dataclass, by contract
    for key in found:
        if key not in known:
            raise ConfigError(
                f"expected settings of {kind.__name__} in '{path}', got {key!r}. {nearest_names(str(key), known)}"
            )
    if name is not None:
        base = kind.preset(name)  # type: ignore[attr-defined]
    values = {} if base is None else {key: getattr(base, key) for key in known}
    try:
        return TypeAdapter(kind).validate_python(values | found)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"expected settings of {kind.__name__} in '{path}', but: {told}") from error


def write_config(config: Any) -> str:
    """Return settings as YAML, one a line, as :func:`read_config` reads them."""
    import yaml

    return yaml.safe_dump(plain_config(config), sort_keys=False)


def plain_config(config: Any) -> dict[str, Any]:
    """Return settings as plain values by name: numbers, texts and lists."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")


def _preset(kind: type[C], presets: dict[str, dict[str, Any]], name: str, changes: dict[str, Any]) -> C:
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"expected a preset, got {name!r}. {nearest_names(str(name), presets)}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type] - a dataclass
    for key in changes:
        if key not in known:
            raise ConfigError(f"expected a setting of {kind.__name__}, got {key!r}. {nearest_names(key, known)}")
    return kind(**(presets[name] | changes))


def _one_of(config: Any, name: str, *known: str) -> None:
    if getattr(config, name) not in known:
        *others, last = map(repr, known)
        raise ConfigError(f"expected {name} {', '.join(others)} or {last}, got {getattr(config, name)!r}")


def _require(config: Any, least: float, *names: str, most: float = float("inf")) -> None:
    for name in names:
        value = getattr(config, name)
        if not least <= value <= most:  # a NaN, too
            upper = f" and at most {most:g}" if most < float("inf") else ""
            raise ConfigError(f"expected {name} of at least {least:g}{upper}, got {value}")


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
        _require(self, 1, "overlap", "starts", "inputs")
        _require(self, 0, "steps", "lr", "smooth")
        _one_of(self, "schedule", "constant", "cosine")
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
        return _preset(cls, INVERT_PRESETS, name, changes)


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


@dataclass(frozen=True)
class DiffusionConfig:
    """How a diffusion model reads pictures.

    Attributes:
        mode: "noise": one pass over the picture with noise added to it, up to the level `time` (DIFT; Tang et al.,
            NeurIPS 2023). "clean": one pass over the picture as it is, told `time` (the one-step model of Hyperfeatures
            at -1; CleanDIFT). "inversion": a chain of passes that carries the picture to noise, deterministically,
            whose every step can be read (Diffusion Hyperfeatures; Luo et al., NeurIPS 2023).
        time: Level of noise, from 0 to the model's last one, usually 999; -1 is below the first.
        ensemble: Draws of noise whose features are averaged, in mode "noise".
        steps: Steps of the chain, for inversion and generation. Step 0 is the noisiest, the last the cleanest, in both.
        keep: How many of the steps are read where all are asked for, evenly spread; `steps` must be a multiple of
            `keep` less one, unless all or one are kept.
        schedule: "hyperfeatures": the published chain, whose first inversion pass sees level -1. "model": that of
            diffusers' DDIM schedulers with the model's own settings.
        prompt: What the picture shows, for models that take text.
        negative_prompt: What it does not, for guidance.
        guidance: Strength of classifier-free guidance; None is none. The pass with the prompt is the one that is read.
        seed: Of all noise. Each picture is given the same.
        latent: "sample" draws latents from the autoencoder's distribution, as published; "mean" takes its middle.

    Raises:
        ConfigError: If a number is out of its range.
    """

    mode: Literal["noise", "clean", "inversion"] = "noise"
    time: int = 261
    ensemble: int = 1
    steps: int = 50
    keep: int = 11
    schedule: Literal["hyperfeatures", "model"] = "hyperfeatures"
    prompt: str = ""
    negative_prompt: str = ""
    guidance: float | None = None
    seed: int = 0
    latent: Literal["sample", "mean"] = "sample"

    def __post_init__(self) -> None:
        """Refuse numbers that no model could use."""
        _require(self, -1, "time")
        _require(self, 1, "ensemble", "steps", "keep")
        _require(self, 0, "seed")
        _one_of(self, "mode", "noise", "clean", "inversion")
        _one_of(self, "schedule", "hyperfeatures", "model")
        _one_of(self, "latent", "sample", "mean")
        if self.mode == "noise" and self.time < 0:
            raise ConfigError(f"expected a time of at least 0 in mode 'noise', got {self.time}; -1 is for mode 'clean'")
        if self.keep > self.steps or (1 < self.keep < self.steps and self.steps % (self.keep - 1)):
            fitting = [n + 1 for n in range(1, self.steps) if self.steps % n == 0]
            near = sorted(fitting, key=lambda n: abs(n - self.keep))[:3]
            raise ConfigError(
                f"expected keep less one to divide steps ({self.steps}), or keep=1 or {self.steps}, got "
                f"keep={self.keep}; for example {', '.join(map(str, sorted(near)))}"
            )

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """The steps that are read where all are asked for, from clean to noise: for 50 and 11, 49, 45, 40, … 5, 0."""
        if self.keep in (1, self.steps):
            return tuple(range(self.steps))[::-1] if self.keep == self.steps else (self.steps - 1,)
        stride = self.steps // (self.keep - 1)
        return tuple(min(number * stride, self.steps - 1) for number in reversed(range(self.keep)))

    @classmethod
    def preset(cls, name: DiffusionPreset = "dift", **changes: Any) -> "DiffusionConfig":
        """Return settings by name, with some of them changed.

        Args:
            name: "dift": one noisy pass at level 261, the mean of 8 draws; "hyperfeatures": 50 steps of inversion, 11
                read; "hyperfeatures-one-step": one clean pass at level -1.
            **changes: Other values.

        Raises:
            ConfigError: If there is no such preset or setting.
        """
        return _preset(cls, DIFFUSION_PRESETS, name, changes)


DIFFUSION_PRESETS: dict[str, dict[str, Any]] = {
    "dift": {"ensemble": 8},
    "hyperfeatures": {"mode": "inversion"},
    "hyperfeatures-one-step": {"mode": "clean", "time": -1},
}
"""What the presets change in the defaults of :class:`DiffusionConfig`."""


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
        prediction: What the network says: "epsilon", the noise; or "v_prediction", the velocity between picture and
            noise (Salimans and Ho, Progressive Distillation, ICLR 2022), which stays well-posed where all is noise.
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
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    minutes: float = 0.0
    validate_every: int = 250
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuse numbers that no run could use."""
        _require(self, 1, "size", "blocks", "steps", "batch", "noise_levels")
        _require(self, 0, "lr", "warmup", "minutes", "validate_every", "checkpoint_every")
        _require(self, 0, "average", "crop", "flip", most=1)
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
        _one_of(self, "prediction", "epsilon", "v_prediction")
        _one_of(self, "schedule", "constant", "cosine")


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
        _require(self, 1, "steps", "dim", "groups", *(["cell"] if self.cell is not None else []))
        _require(self, 0, "lr", "weight_decay", "temperature", "validate_every", "checkpoint_every", "cache_gib")
        if self.temperature == 0:
            raise ConfigError("expected a temperature above 0, got 0")
        _one_of(self, "schedule", "constant", "cosine")
