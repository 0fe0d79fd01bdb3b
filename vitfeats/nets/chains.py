"""The chains of DDIM (Song et al., ICLR 2021): from a picture to noise, and from noise to a picture."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitfeats.configs import DiffusionConfig
from vitfeats.nets.denoiser import Denoiser


@dataclass(frozen=True)
class Chain:
    """The steps of a chain.

    Attributes:
        visits: (tag, level that the U-Net is told) of each step, in the order of the chain.
        advance: ``advance(number of the step, prediction, latents)`` returns the next latents.
    """

    visits: tuple[tuple[int, int], ...]
    advance: Callable[[int, Tensor, Tensor], Tensor]


def chain_of(config: DiffusionConfig, model: Denoiser, inverting: bool) -> Chain:
    """Return the chain that settings describe: from a picture to noise (inverting), or from noise to a picture."""
    make = _published if config.schedule == "hyperfeatures" else _library
    return make(config.steps, model, inverting)


def _published(steps: int, model: Denoiser, inverting: bool) -> Chain:
    """Levels 0, s, 2s, … and -1 below them; a step inverting sees the level it comes from (the first: -1)."""
    levels = len(model.kept)
    above = [number * (levels // steps) for number in range(steps)]
    below = [-1, *above[:-1]]
    pairs = list(zip(below, above, strict=True)) if inverting else list(zip(above, below, strict=True))[::-1]
    tags = range(steps)[::-1] if inverting else range(steps)

    def share(level: int) -> Tensor:
        return model.kept[level] if level >= 0 else torch.ones_like(model.kept[0])

    def advance(number: int, said: Tensor, latents: Tensor) -> Tensor:
        here, there = (share(level) for level in pairs[number])
        noise = model.as_noise(said, latents, here)
        clean = (latents - (1 - here).sqrt() * noise) / here.sqrt()
        return there.sqrt() * clean + (1 - there).sqrt() * noise  # DDIM, equation 12, without new noise

    return Chain(tuple(zip(tags, (here for here, _ in pairs), strict=True)), advance)


def _library(steps: int, model: Denoiser, inverting: bool) -> Chain:
    """The chain of diffusers' schedulers. They hold the steps of one run, so each run gets its own."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler

    kind = DDIMInverseScheduler if inverting else DDIMScheduler
    known = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in model.schedule.items() if name in known}
    # Schedulers of other kinds do not say these: latents are not clipped, and inversion knows two spacings only.
    settings.setdefault("clip_sample", model.vae is None)
    if settings.get("timestep_spacing") not in ("leading", "trailing"):
        settings["timestep_spacing"] = "leading"
    if steps == len(model.kept):
        settings["steps_offset"] = 0  # an offset would ask for a level above the last
    scheduler: Any = kind(**settings)
    scheduler.set_timesteps(steps)
    times = [int(time) for time in scheduler.timesteps]
    tags = range(steps)[::-1] if inverting else range(steps)

    def advance(number: int, said: Tensor, latents: Tensor) -> Tensor:
        return scheduler.step(said, times[number], latents).prev_sample

    return Chain(tuple(zip(tags, times, strict=True)), advance)
