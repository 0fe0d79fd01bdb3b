"""Settings of reading diffusion models, and their presets."""

from dataclasses import dataclass
from typing import Any, Literal

from vitfeats.configs.checks import one_of, require
from vitfeats.configs.presets import preset
from vitfeats.errors import ConfigError

DiffusionPreset = Literal["dift", "hyperfeatures", "hyperfeatures-one-step"]


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
        require(self, -1, "time")
        require(self, 1, "ensemble", "steps", "keep")
        require(self, 0, "seed")
        one_of(self, "mode", "noise", "clean", "inversion")
        one_of(self, "schedule", "hyperfeatures", "model")
        one_of(self, "latent", "sample", "mean")
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
        return preset(cls, DIFFUSION_PRESETS, name, changes)


DIFFUSION_PRESETS: dict[str, dict[str, Any]] = {
    "dift": {"ensemble": 8},
    "hyperfeatures": {"mode": "inversion"},
    "hyperfeatures-one-step": {"mode": "clean", "time": -1},
}
"""What the presets change in the defaults of :class:`DiffusionConfig`."""
