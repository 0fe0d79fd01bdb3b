"""A whole training run: its folder, how long it takes, and what it leaves."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitfeats import plot
from vitfeats.api import load_extractor
from vitfeats.apps.pretrain.collection import Collection
from vitfeats.apps.pretrain.trainer import Pretrainer
from vitfeats.configs import PretrainConfig
from vitfeats.extractors.base import Extractor
from vitfeats.models.trainable import save_network
from vitfeats.runs import RunFolder, begin, interruption, take_steps

_TIMED = 20  # steps after which it is known how long one takes
_LEFT_OUT = 5  # of them: the first are slower
PANELS = (("loss", "views", "masked", "places", "labels"), ("entropy", "spread"), ("knn", "top1"))


@dataclass(frozen=True, eq=False)
class PretrainResult:
    """What a training run made.

    Attributes:
        network: The teacher, in evaluation mode, on the CPU.
        history: One record a step: ``step``, ``loss`` and its terms, ``entropy`` and ``spread`` of the teacher's
            answers in nats, and ``knn`` and ``top1`` where they were measured.
        config: The settings.
        stopped: Why the run ended: "done", "collapsed", "interrupted" or "not finite".
    """

    network: nn.Module
    history: list[dict[str, Any]]
    config: PretrainConfig
    stopped: str = "done"

    def extractor(self, **settings: Any) -> Extractor:
        """Return what reads the network; settings as for :func:`vitfeats.load_extractor`."""
        return load_extractor(self.network, **settings)

    def save(self, folder: Path | str) -> Path:
        """Write a folder that :func:`vitfeats.load_extractor` reads, and timm by ``local-dir:``; return it."""
        save_network(self.network, folder)
        return Path(folder)


def pretrain(
    collection: Collection,
    *,
    config: PretrainConfig | None = None,
    held_out: Collection | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
    device: str | torch.device = "cpu",
) -> PretrainResult:
    """Train a vision model on pictures of one's own.

    Args:
        collection: Pictures, and their classes if there are any.
        config: Settings; None is the defaults.
        held_out: Pictures that are judged by and not learnt from, with the classes of ``collection``.
        seed: Of the first weights, the order, and every crop and mask; the same seed gives the same bits on one CPU
            with as many threads.
        out: Folder for the history, checkpoints, curves and the result, ``model/``; None writes nothing.
        resume: Go on from the checkpoint in ``out``, if there is one.
        progress: Show a progress bar on standard error.
        device: Where to train.

    Raises:
        ConfigError: If settings do not fit the model or the pictures, or differ from those of the checkpoint.
        UnknownModelError: If timm has no such model.
        WeightsUnavailableError: If the weights to begin with cannot be read.
        StoreError: If ``out`` cannot be made or its checkpoint cannot be read.
        KeyboardInterrupt: At Ctrl-C, after the step has ended and a checkpoint is written.
    """
    config = config or PretrainConfig()
    trainer = Pretrainer(collection, config, held_out=held_out, seed=seed, device=device)
    folder = None if out is None else RunFolder(out)
    history = begin(trainer, folder, resume)
    times: list[float] = []

    def after(losses: Mapping[str, float]) -> str | None:
        times.append(time.monotonic())
        if folder is not None and config.validate_every and trainer.done % config.validate_every == 0:
            _draw(folder, history)
        return "collapsed" if trainer.collapsed else None

    def finish(stopped: str) -> PretrainResult:
        if stopped == "collapsed":
            warnings.warn(f"the run stopped: {trainer.collapsed}", RuntimeWarning, stacklevel=5)
        made = PretrainResult(trainer.trained(), history, config, stopped)
        if folder is not None:
            _draw(folder, history)
            made.save(folder.path / "model")
        return made

    def until(steps: int) -> PretrainResult:
        return take_steps(
            trainer,
            steps,
            history,
            folder,
            checkpoint_every=config.checkpoint_every,
            after=after,
            finish=finish,
            shown=("loss", "knn"),
            progress=progress,
        )

    if trainer.steps:
        made = until(trainer.steps)
    else:
        made = until(trainer.done + _TIMED)
        if made.stopped == "done":
            trainer.steps = _steps_in(config.minutes, times)
            made = until(trainer.steps)
    if made.stopped == "interrupted":
        raise KeyboardInterrupt(interruption(trainer.done, folder))
    return made


def _steps_in(minutes: float, times: list[float]) -> int:
    """Return how many steps there are in so many minutes, if they go on as the last of these did."""
    some = times[_LEFT_OUT:]
    each = (some[-1] - some[0]) / (len(some) - 1)
    return max(len(times), round(60 * minutes / each))


def _draw(folder: RunFolder, history: list[dict[str, Any]]) -> None:
    if history:
        folder.write_image("curves.png", plot.curves(history, PANELS))
