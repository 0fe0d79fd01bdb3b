"""The whole run: the loop around :class:`Splicer`, its folder, and what it leaves behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vitfeats import plot
from vitfeats.api import load_extractor
from vitfeats.apps.splice.splicer import Splicer
from vitfeats.apps.splice.terms import Term
from vitfeats.configs import SpliceConfig
from vitfeats.extractors.base import Extractor
from vitfeats.preprocess import ImageLike, to_pil
from vitfeats.runs import Callback, RunFolder, begin, interruption, take_steps


@dataclass(frozen=True, eq=False)
class SpliceResult:
    """What a run made.

    Attributes:
        tensor: (3, height, width) in 0..1, at the structure image's size.
        history: One record a step: ``step``, ``loss`` (the weighted sum) and each term before its weight.
        config: The settings.
        seed: The seed.
        stopped: Why the run ended: "done", "plateau", "callback", "interrupted" or "not finite".
    """

    tensor: Float[Tensor, "3 height width"]
    history: list[dict[str, Any]]
    config: SpliceConfig
    seed: int
    stopped: str = "done"

    def __repr__(self) -> str:
        """Say what it is in one line."""
        size = f"{self.tensor.shape[2]}×{self.tensor.shape[1]}"
        loss = f", loss {self.history[-1]['loss']:.4g}" if self.history else ""
        steps = "1 step" if len(self.history) == 1 else f"{len(self.history)} steps"
        return f"SpliceResult({size}, {steps}{loss}, {self.stopped})"

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return to_pil(self.tensor)

    def save(self, folder: Path | str) -> Path:
        """Write result.png, losses.png, history.jsonl and config.yaml; return the picture's path.

        Raises:
            StoreError: If the folder cannot be made. A file that cannot be written is a warning.
        """
        run = RunFolder(folder)
        run.write_image("result.png", self.image)
        if self.history:
            run.write_image("losses.png", plot.losses(self.history))
        run.write_history(self.history)
        run.write_config(self.config)
        return run.path / "result.png"


class SpliceInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a run. Nothing is lost: ``.result`` is what it had made.

    Attributes:
        result: The result so far.
    """

    def __init__(self, message: str, result: SpliceResult) -> None:
        super().__init__(message)
        self.result = result


def splice(
    structure: ImageLike,
    appearance: ImageLike,
    *,
    model: Any = None,
    config: SpliceConfig | None = None,
    seed: int = 0,
    steps: int | None = None,
    terms: Sequence[Term] | None = None,
    generator: nn.Module | None = None,
    callback: Callback | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
    device: str | torch.device = "auto",
) -> SpliceResult:
    """Paint the structure of one image with the appearance of another.

    Args:
        structure: The image whose layout and shapes are kept; the result has its size.
        appearance: The image whose colours and textures are taken; any size.
        model: A name, a module, or an :class:`~vitfeats.Extractor`, which keeps its own precision and device. None is
            the default model. The paper uses ``dino_vitb8``.
        config: Settings; None is the preset "fast". ``SpliceConfig.preset("reference")`` is the published recipe.
        seed: Of the first weights and every crop; the same seed gives the same bits on one CPU with as many threads.
        steps: Optimiser steps, in place of ``config.steps``.
        terms: The objective; None is what ``config`` describes. Add your own: ``[*default_terms(config), Term(…)]``.
        generator: A network from (1, 3, h, w) to (1, 3, h, w) in 0..1 to train instead of the published one.
        callback: Called after each step with its number, losses, and a function that makes the picture; returns True
            to stop.
        out: Folder for the history, pictures, checkpoints and the result; None writes nothing.
        resume: Go on from the checkpoint in ``out``, if there is one.
        progress: Show a progress bar on standard error.
        device: Where a model that is loaded by name goes.

    Raises:
        ImageError, ShapeError: If an image cannot be read or is too small.
        ConfigError: If settings are out of range, do not fit the model, or differ from those of the checkpoint; or
            a term's loss is no number, or gives no gradient to the picture.
        StoreError: If ``out`` cannot be made or its checkpoint cannot be read.
        SpliceInterrupted: At Ctrl-C, after the step has ended and a checkpoint is written; has ``.result``.

    Example:
        >>> import vitfeats as vf
        >>> result = vf.splice(vf.samples.cat(), vf.samples.coffee(), steps=2, device="cpu")
        >>> result.image.size, len(result.history)
        ((451, 300), 2)
    """
    config = config or SpliceConfig()
    config = config if steps is None else replace(config, steps=steps)
    if isinstance(model, Extractor):
        extractor = model if config.stride is None else model.resized(stride=config.stride)
    else:
        extractor = load_extractor(model, size=config.size, stride=config.stride, device=device, dtype=config.dtype)
    splicer = Splicer(
        structure, appearance, extractor=extractor, config=config, seed=seed, terms=terms, generator=generator
    )
    folder = None if out is None else RunFolder(out)
    history = begin(splicer, folder, resume)

    def after(losses: Mapping[str, float]) -> str | None:
        if folder is not None and splicer.config.snapshot_every and splicer.done % splicer.config.snapshot_every == 0:
            folder.write_image(f"step_{splicer.done:06}.png", to_pil(splicer.render()))
        if callback is not None and callback(splicer.done - 1, losses, splicer.render):
            return "callback"
        return "plateau" if _is_flat(history, splicer.config.patience) else None

    def finish(stopped: str) -> SpliceResult:
        made = SpliceResult(splicer.render(), history, splicer.config, splicer.seed, stopped)
        if folder is not None:
            made.save(folder.path)
        return made

    made = take_steps(
        splicer,
        splicer.config.steps,
        history,
        folder,
        checkpoint_every=splicer.config.checkpoint_every,
        after=after,
        finish=finish,
        shown=("loss", "appearance", "structure", "identity"),  # all of them would not fit into a line
        progress=progress,
    )
    if made.stopped == "interrupted":
        raise SpliceInterrupted(interruption(splicer.done, folder), made)
    return made


def _is_flat(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Return whether the last ``patience`` losses are on average not 1 % below as many before."""
    if not patience or len(history) < 2 * patience:
        return False
    recent = [record["loss"] for record in history[-2 * patience :]]
    return sum(recent[patience:]) > 0.99 * sum(recent[:patience])
