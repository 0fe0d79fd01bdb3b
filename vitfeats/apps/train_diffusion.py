"""Train a small diffusion model on pixels, so that all that is built on diffusion features runs without a download.

The objective is the simple one of Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020, equation 14: a
picture x, noise e, a level t; the mean squared error of what the network says of √ā·x + √(1-ā)·e. It says the velocity
√ā·e - √(1-ā)·x (Salimans and Ho, Progressive Distillation, ICLR 2022, appendix D), or as in equation 14 the noise e.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.configs import TrainDiffusionConfig, plain_config
from vitfeats.errors import ConfigError
from vitfeats.models.diffusion import pixel_unet
from vitfeats.models.weights import load_state, read_checkpoint
from vitfeats.resize import resize_images
from vitfeats.runs import RunFolder, begin, check_same, interruption, scheduled, take_steps
from vitfeats.views import numbered

_FORMAT = "vitfeats.train-diffusion/1"
_INITIAL, _STEP, _JUDGE = 0, 1, 2  # what random numbers are for
_JUDGED = 128  # held-out pictures that the validation looks at


@dataclass(frozen=True, eq=False)
class TrainDiffusionResult:
    """What a training run made.

    Attributes:
        network: The denoiser with its averaged weights, in evaluation mode.
        scheduler: Its noise levels.
        history: One record a step: ``step``, ``loss``, and ``held_out`` where that was measured.
        config: The settings.
        stopped: Why the run ended: "done", "time", "interrupted" or "not finite".
    """

    network: UNet2DModel
    scheduler: DDPMScheduler
    history: list[dict[str, Any]]
    config: TrainDiffusionConfig
    stopped: str = "done"

    def save(self, folder: Path | str) -> Path:
        """Write a folder that diffusers' ``DDPMPipeline`` loads, and :func:`vitfeats.load_extractor`; return it."""
        DDPMPipeline(self.network, self.scheduler).save_pretrained(folder)
        return Path(folder)


class DiffusionTrainer:
    """Takes the optimiser steps. What a step sees depends on the seed and its number alone.

    Args:
        pictures: To learn from: (height, width, 3) of type uint8 each, shorter side at least ``config.size``.
        config: Settings.
        held_out: To judge by.
        seed: Of the first weights, and of every crop and noise.
        device: Where to train.

    Raises:
        ConfigError: If the pictures are too small, or the weights to begin with do not fit.
        WeightsUnavailableError: If they cannot be read.

    Attributes:
        done: Steps taken.
        network: The network that is trained.
        config: The settings.
    """

    def __init__(
        self,
        pictures: Sequence[np.ndarray],
        config: TrainDiffusionConfig,
        *,
        held_out: Sequence[np.ndarray] = (),
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if not pictures or min(min(picture.shape[:2]) for picture in pictures) < config.size:
            raise ConfigError(f"expected pictures with a shorter side of at least {config.size} pixels, got smaller")
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.pictures = pictures
        self.done = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=numbered(seed, _INITIAL))))
            self.network = pixel_unet(config.size, config.channels, config.blocks, config.attention).to(self.device)
        if config.start:
            load_state(self.network, read_checkpoint(config.start), config.start)
        self.scheduler = noise_levels(config)
        self._optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, weight_decay=0.0, fused=self.device.type in ("cpu", "cuda")
        )
        self._average = [p.detach().clone() for p in self.network.parameters()]
        step = max(1, len(held_out) // _JUDGED)
        self._held_out = [_crop(picture, config.size, None, config) for picture in list(held_out)[::step][:_JUDGED]]

    def step(self) -> dict[str, float]:
        """Take one optimiser step; return ``loss``, and ``held_out`` every ``validate_every`` steps.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        config, rng = self.config, numbered(self.seed, _STEP, self.done)
        chosen = torch.randint(len(self.pictures), (config.batch,), generator=rng).tolist()
        images = torch.cat([_crop(self.pictures[i], config.size, rng, config) for i in chosen]).to(self.device)
        # Spread over all levels in every batch: the loss differs so much between them that chance alone would rule it.
        spread = (torch.arange(config.batch) + torch.rand(config.batch, generator=rng)) / config.batch
        levels = (spread * config.noise_levels).long().to(self.device)
        noise = torch.randn(images.shape, generator=rng).to(self.device)
        for group in self._optimiser.param_groups:
            rising = min(1.0, (self.done + 1) / max(1, config.warmup))
            group["lr"] = rising * scheduled(config.lr, config.schedule, self.done, config.steps)
        self.network.train()
        with torch.enable_grad():
            loss = self._loss(self.network, images, noise, levels).mean()
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"expected a finite loss at step {self.done}, got {float(loss.detach())}")
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimiser.step()
        self.done += 1
        decay = min(config.average, self.done / (self.done + 10))
        with torch.no_grad():
            for kept, new in zip(self._average, self.network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses = {"loss": float(loss.detach())}
        if self._held_out and config.validate_every and self.done % config.validate_every == 0:
            losses["held_out"] = self.judged()
        return losses

    def averaged(self) -> UNet2DModel:
        """Return a copy of the network with its averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.network).eval()
        with torch.no_grad():
            for weight, kept in zip(network.parameters(), self._average, strict=True):
                weight.copy_(kept)
        return network

    def judged(self) -> float:
        """Return the mean denoising loss of held-out pictures, the same noise each time; finding none gives about 1."""
        network = self.averaged()
        return float(denoising_loss(network, self.scheduler, torch.cat(self._held_out)).mean())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on as if it had never stopped."""
        return {
            "format": _FORMAT,
            "about": self._about(),
            "step": self.done,
            "network": {name: value.clone() for name, value in self.network.state_dict().items()},
            "average": [kept.clone() for kept in self._average],
            "optimiser": copy.deepcopy(self._optimiser.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If it is of other settings; the message says what differs.
        """
        if state.get("format") != _FORMAT:
            raise ConfigError(f"expected the state of a diffusion training ({_FORMAT}), got {state.get('format')!r}")
        check_same(state["about"], self._about(), free=("minutes", "validate_every", "checkpoint_every"))
        self.network.load_state_dict(state["network"])
        self._average = [kept.to(self.device) for kept in state["average"]]
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))  # it would change the caller's
        self.done = int(state["step"])

    def _about(self) -> dict[str, Any]:
        return plain_config(self.config) | {"seed": self.seed, "pictures": len(self.pictures)}

    def _loss(self, network: UNet2DModel, images: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return _errors(network, self.scheduler, images, noise, levels)


def train_diffusion(
    pictures: Sequence[np.ndarray],
    *,
    config: TrainDiffusionConfig | None = None,
    held_out: Sequence[np.ndarray] = (),
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
    device: str | torch.device = "cpu",
) -> TrainDiffusionResult:
    """Train a denoiser on pictures.

    Args:
        pictures: From :func:`vitfeats.pictures.read_pictures`; their shorter side at least ``config.size``.
        config: Settings; None is the defaults.
        held_out: Pictures that are judged by and not learnt from.
        seed: Of the first weights, and of every crop and noise.
        out: Folder for the history, checkpoints, samples and the result, ``model/``; None writes nothing.
        resume: Go on from the checkpoint in ``out``, if there is one.
        progress: Show a progress bar on standard error.
        device: Where to train.

    Raises:
        ConfigError: If the pictures are too small, the weights to begin with do not fit, or the checkpoint is of other
            settings.
        WeightsUnavailableError: If the weights to begin with cannot be read.
        StoreError: If ``out`` cannot be made or its checkpoint cannot be read.
        KeyboardInterrupt: At Ctrl-C, after the step has ended and a checkpoint is written.
    """
    config = config or TrainDiffusionConfig()
    trainer = DiffusionTrainer(pictures, config, held_out=held_out, seed=seed, device=device)
    folder = None if out is None else RunFolder(out)
    history = begin(trainer, folder, resume)
    started = time.monotonic()

    def after(_losses: Mapping[str, float]) -> str | None:
        return "time" if config.minutes and time.monotonic() - started > 60 * config.minutes else None

    def finish(stopped: str) -> TrainDiffusionResult:
        made = TrainDiffusionResult(trainer.averaged(), trainer.scheduler, history, config, stopped)
        if folder is not None:
            made.save(folder.path / "model")
        return made

    made = take_steps(
        trainer,
        config.steps,
        history,
        folder,
        checkpoint_every=config.checkpoint_every,
        after=after,
        finish=finish,
        shown=("loss", "held_out"),
        progress=progress,
    )
    if made.stopped == "interrupted":
        raise KeyboardInterrupt(interruption(trainer.done, folder))
    return made


def noise_levels(config: TrainDiffusionConfig) -> DDPMScheduler:
    """Return diffusers' scheduler with the settings' noise levels."""
    return DDPMScheduler(
        num_train_timesteps=config.noise_levels,
        beta_start=config.betas[0],
        beta_end=config.betas[1],
        prediction_type=config.prediction,
    )


@torch.no_grad()
def denoising_loss(
    network: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Float[Tensor, "batch 3 height width"],
    *,
    levels: int = 8,
    seed: int = 0,
    batch: int = 32,
) -> Float[Tensor, " levels"]:
    """Return the mean squared error of the predicted noise, level by level, the same noise each time.

    Args:
        network: Predicts noise, or velocity.
        scheduler: Its noise levels.
        images: Pictures in -1..1.
        levels: How many, evenly spread over the schedule (the middles of so many equal parts).
        seed: Of the noise.
        batch: Images that run at once.
    """
    device = next(network.parameters()).device
    steps = scheduler.config["num_train_timesteps"]
    middles = ((torch.arange(levels) + 0.5) / levels * steps).long()
    found = []
    for number, middle in enumerate(middles.tolist()):
        noise = torch.randn(images.shape, generator=numbered(seed, _JUDGE, number))
        sums = torch.zeros((), dtype=torch.float64)
        for part in range(0, len(images), batch):
            some = images[part : part + batch].to(device)
            level = torch.full((len(some),), middle, device=device)
            drawn = noise[part : part + batch].to(device)
            sums += _errors(network, scheduler, some, drawn, level, of_noise=True).sum().cpu()
        found.append(sums / len(images))
    return torch.stack(found).float()


def _errors(
    network: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Float[Tensor, "batch 3 height width"],
    noise: Float[Tensor, "batch 3 height width"],
    levels: Int[Tensor, " batch"],
    *,
    of_noise: bool = False,
) -> Float[Tensor, " batch"]:
    """Return the mean squared error of what the network predicts; or of the noise that follows from it."""
    noisy = scheduler.add_noise(images, noise, levels)  # type: ignore[arg-type] - it takes any integers
    said, wanted = network(noisy, levels).sample, noise
    if scheduler.config["prediction_type"] == "v_prediction":
        if of_noise:
            kept = scheduler.alphas_cumprod.to(noisy)[levels][:, None, None, None]
            said = kept.sqrt() * said + (1 - kept).sqrt() * noisy
        else:
            wanted = scheduler.get_velocity(images, noise, levels)  # type: ignore[arg-type] - as above
    return F.mse_loss(said, wanted, reduction="none").flatten(1).mean(1)


def _crop(
    picture: np.ndarray, size: int, rng: torch.Generator | None, config: TrainDiffusionConfig
) -> Float[Tensor, "1 3 size size"]:
    """Return a square crop in -1..1: at random, or without a generator the middle."""
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    height, width = image.shape[-2:]
    short = min(height, width)
    if rng is None:
        side, share = short, torch.tensor((0.5, 0.5))
    else:
        least = max(size, round(config.crop * short))
        side = int(torch.randint(least, short + 1, (), generator=rng)) if least < short else short
        share = torch.rand(2, generator=rng)
        if float(torch.rand((), generator=rng)) < config.flip:
            image = image.flip(3)
    top, left = round(float(share[0]) * (height - side)), round(float(share[1]) * (width - side))
    return 2 * resize_images(image[..., top : top + side, left : left + side], (size, size)) - 1
