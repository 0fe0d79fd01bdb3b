"""Train a network of style transfer on pictures of contents and of styles."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitfeats import plot
from vitfeats.api import load_extractor
from vitfeats.apps.style_transfer.stylizer import TAPS, Stylizer, channels_of
from vitfeats.configs import TrainStylizerConfig, plain_config
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError
from vitfeats.extractors.base import Extractor
from vitfeats.losses import content_loss, global_style_loss, local_style_loss
from vitfeats.models.stylizers import TRAINED, load_network, pack
from vitfeats.nets.adaattn import adain
from vitfeats.nets.stylizing import NETWORKS, Style, StyleNetwork
from vitfeats.preprocess import to_pil
from vitfeats.resize import resize_images
from vitfeats.runs import RunFolder, begin, check_same, interruption, scheduled, take_steps
from vitfeats.views import numbered

_FORMAT = "vitfeats.train-stylizer/1"
_INITIAL, _STEP, _SHOWN = 0, 1, 2  # what random numbers are for
_SHOWN_PAIRS = 4
_IDENTITY = 50.0  # SANet's, for the warm-up of methods that have no such loss


@dataclass(frozen=True, eq=False)
class TrainStylizerResult:
    """What a training run made.

    Attributes:
        stylizer: The network with its encoder, in evaluation mode.
        history: One record a step: ``step``, ``loss`` and its parts.
        config: The settings.
        stopped: Why the run ended: "done", "interrupted" or "not finite".
    """

    stylizer: Stylizer
    history: list[dict[str, Any]]
    config: TrainStylizerConfig
    stopped: str = "done"

    def save(self, path: Path | str) -> Path:
        """Write the network as safetensors of 16-bit floats, which ``checkpoint=`` of stylize takes; return the path.

        Raises:
            ConfigError: If a weight is not finite as a 16-bit float.
            StoreError: If the file cannot be written.
        """
        pack(self.stylizer.network, path, encoder=self.config.encoder)
        return Path(path)


class StylizerTrainer:
    """Takes the optimiser steps. What a step sees depends on the seed and its number alone.

    Args:
        contents: Pictures (height, width, 3) of type uint8.
        styles: The same, to take styles from.
        config: Settings.
        seed: Of the first weights, and of every crop and draw.
        encoder: In place of the settings' name: loaded already.
        device: Where to train.

    Raises:
        ConfigError: If there are no pictures, the encoder has not the maps that are needed, or no weight to begin with
            fits.
        WeightsUnavailableError: If weights to begin with cannot be read.

    Attributes:
        done: Steps taken.
        stylizer: The network that is trained, and its encoder, which is not.
        config: The settings.
    """

    def __init__(
        self,
        contents: Sequence[np.ndarray],
        styles: Sequence[np.ndarray],
        config: TrainStylizerConfig,
        *,
        seed: int = 0,
        encoder: Extractor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not len(contents) or not len(styles):
            raise ConfigError(f"expected contents and styles, got {len(contents)} and {len(styles)}")
        if encoder is not None:  # what is written must say whose maps it was trained with
            config = replace(config, encoder=encoder.card.name)
        self.config, self.seed, self.done = config, seed, 0
        self.contents, self.styles = contents, styles
        extractor = encoder or load_extractor(config.encoder, device=device, dtype="float32")
        network = NETWORKS[config.method](
            channels_of(extractor), config.widths, config.inner, generator=numbered(seed, _INITIAL)
        )
        if config.start:
            _take(network, config.start)
        self.stylizer = Stylizer(extractor, network)
        self._optimiser = torch.optim.Adam(network.parameters(), lr=config.lr)

    def step(self) -> dict[str, float]:
        """Take one optimiser step; return ``loss`` and its weighted parts.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        rng = numbered(self.seed, _STEP, self.done)
        content, style = (self._batch(pictures, rng) for pictures in (self.contents, self.styles))
        for group in self._optimiser.param_groups:
            group["lr"] = scheduled(self.config.lr, self.config.schedule, self.done, self.config.steps)
        self.stylizer.network.train()
        with torch.enable_grad():
            parts = self._losses(content, style, rng)
            loss = torch.stack(list(parts.values())).sum()
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"expected a finite loss at step {self.done}, got {float(loss.detach())}")
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.stylizer.network.parameters(), self.config.clip)
        self._optimiser.step()
        self.done += 1
        return {"loss": float(loss.detach()), **{name: float(part.detach()) for name, part in parts.items()}}

    def shown(self) -> Image.Image:
        """Return contents, styles and results side by side, the same pairs each time."""
        rng = numbered(self.seed, _SHOWN)
        batch = replace(self.config, batch=_SHOWN_PAIRS)
        content, style = (_batch(pictures, batch, rng) for pictures in (self.contents, self.styles))
        self.stylizer.network.eval()
        with torch.no_grad():
            made = self.stylizer(
                content,
                [Style(self.stylizer.maps(style))],
                most=self.config.most,
                generator=numbered(self.seed, _SHOWN, 1),
            )
        rows = [picture for three in zip(content, style, made.cpu(), strict=True) for picture in three]
        return plot.side_by_side([to_pil(picture) for picture in rows], columns=3)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on as if it had never stopped."""
        return {
            "format": _FORMAT,
            "about": self._about(),
            "step": self.done,
            "network": {name: value.clone() for name, value in self.stylizer.network.state_dict().items()},
            "optimiser": copy.deepcopy(self._optimiser.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If it is of other settings; the message says what differs.
        """
        if state.get("format") != _FORMAT:
            raise ConfigError(f"expected the state of a stylizer's training ({_FORMAT}), got {state.get('format')!r}")
        check_same(state["about"], self._about(), free=("checkpoint_every", "snapshot_every"))
        self.stylizer.network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))  # it would change the caller's
        self.done = int(state["step"])

    def _about(self) -> dict[str, Any]:
        numbers = {"seed": self.seed, "contents": len(self.contents), "styles": len(self.styles)}
        return plain_config(self.config) | numbers

    def _batch(self, pictures: Sequence[np.ndarray], rng: torch.Generator) -> Tensor:
        return _batch(pictures, self.config, rng).to(self.stylizer.device)

    def _losses(self, content: Tensor, style: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        config, network, read = self.config, self.stylizer.network, self.stylizer.extractor.describe
        with torch.no_grad():
            of_content, of_style = read(content, TAPS), read(style, TAPS)
        maps_c, maps_s = ([d.map for d in found.values()] for found in (of_content, of_style))
        themselves = ((content, of_content, maps_c), (style, of_style, maps_s))
        if self.done < config.warmup:
            return {"identity": (config.identity or _IDENTITY) * self._identity(themselves)}
        draw = numbered(int(torch.randint(2**31, (), generator=rng)))
        out = read(network(maps_c, maps_s, most=config.most, generator=draw), TAPS)
        parts: dict[str, Tensor] = {}
        if config.content:
            parts["content"] = config.content * self._content(out, of_content, maps_c, maps_s)
        if config.style:
            levels = [TAPS[level - 1] for level in config.style_levels]
            found = torch.stack([global_style_loss(out[tap], of_style[tap]) for tap in levels])
            parts["style"] = config.style * found.sum()
        if config.local:
            parts["local"] = config.local * self._local(out, of_content, of_style)
        if config.identity:
            parts["identity"] = config.identity * self._identity(themselves)
        return parts

    def _content(
        self, out: Descriptors, of_content: Descriptors, maps_c: Sequence[Tensor], maps_s: Sequence[Tensor]
    ) -> Tensor:
        if self.config.method == "adain":  # Huang and Belongie, section 5.1: the stylised map is the target
            target = adain(maps_c[3], maps_s[3]).flatten(2).mT
            return content_loss(out[TAPS[3]], replace(of_content[TAPS[3]], features=target), normalise=False)
        return torch.stack([content_loss(out[tap], of_content[tap]) for tap in TAPS[3:]]).sum()

    def _local(self, out: Descriptors, of_content: Descriptors, of_style: Descriptors) -> Tensor:
        pairs: list[tuple[Descriptor, Descriptor]] = [(of_content[tap], of_style[tap]) for tap in TAPS]
        found = [
            local_style_loss(
                out[TAPS[level]], *pairs[level], shallower=pairs[:level], most=self.config.most, seed=self.done
            )
            for level in range(1, len(TAPS))
        ]
        return torch.stack(found).sum()

    def _identity(self, pairs: Sequence[tuple[Tensor, Descriptors, Sequence[Tensor]]]) -> Tensor:
        """Return how far contents and styles that are stylised with themselves are from themselves.

        Park and Lee, equation 8: of pixels, and of maps a 50th.
        """
        found = []
        for pixels, maps_of, maps in pairs:
            same = self.stylizer.network(maps, maps, most=self.config.most, generator=numbered(self.done))
            again = self.stylizer.extractor.describe(same, TAPS)
            features = [content_loss(again[tap], maps_of[tap], normalise=False) for tap in TAPS]
            found.append((same - pixels).square().mean() + torch.stack(features).sum() / 50)
        return torch.stack(found).sum()


def train_stylizer(
    contents: Sequence[np.ndarray],
    styles: Sequence[np.ndarray],
    *,
    config: TrainStylizerConfig | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
    encoder: Extractor | None = None,
    device: str | torch.device = "cpu",
) -> TrainStylizerResult:
    """Train a network of style transfer for any style.

    Args:
        contents: Pictures from :func:`vitfeats.pictures.read_pictures`.
        styles: The same, or :func:`~vitfeats.apps.style_transfer.usual_styles`.
        config: Settings; None is the published ones of AdaAttN.
        seed: Of the first weights, and of every crop and draw.
        out: Folder for the history, checkpoints, pictures of results and the network; None writes nothing.
        resume: Go on from the checkpoint in ``out``, if there is one: the run is the one that was never stopped.
        progress: Show a progress bar on standard error.
        encoder: In place of the settings' name: loaded already, such as ``vgg_normalised`` from its file.
        device: Where to train.

    Raises:
        ConfigError: If there are no pictures, the encoder has not the maps that are needed, or the checkpoint is of
            other settings.
        StoreError: If ``out`` cannot be made or its checkpoint cannot be read.
        KeyboardInterrupt: At Ctrl-C, after the step has ended and a checkpoint is written.
    """
    config = config or TrainStylizerConfig()
    trainer = StylizerTrainer(contents, styles, config, seed=seed, encoder=encoder, device=device)
    folder = None if out is None else RunFolder(out)
    history = begin(trainer, folder, resume)

    def after(_losses: Mapping[str, float]) -> None:
        if folder is not None and config.snapshot_every and trainer.done % config.snapshot_every == 0:
            folder.write_image(f"step_{trainer.done:06d}.png", trainer.shown())

    def finish(stopped: str) -> TrainStylizerResult:
        trainer.stylizer.network.eval()
        made = TrainStylizerResult(trainer.stylizer, history, trainer.config, stopped)
        if folder is not None and stopped != "not finite":
            made.save(folder.path / TRAINED)
            folder.write_image("result.png", trainer.shown())
            if history:
                folder.write_image("losses.png", plot.losses(history))
        return made

    made = take_steps(
        trainer,
        config.steps,
        history,
        folder,
        checkpoint_every=config.checkpoint_every,
        after=after,
        finish=finish,
        progress=progress,
    )
    if made.stopped == "interrupted":
        raise KeyboardInterrupt(interruption(trainer.done, folder))
    return made


def _take(network: StyleNetwork, file: str) -> None:
    """Give a network the weights of another that fit by name and shape."""
    own = network.state_dict()
    found = {name: value for name, value in load_network(file).state_dict().items() if name in own}
    fitting = {name: value for name, value in found.items() if value.shape == own[name].shape}
    if all(value.ndim < 2 for value in fitting.values()):  # biases alone: that of the image fits always
        raise ConfigError(f"expected weights to begin with in '{file}', but none fits by name and shape")
    network.load_state_dict(own | fitting)


def _batch(
    pictures: Sequence[np.ndarray], config: TrainStylizerConfig, rng: torch.Generator
) -> Float[Tensor, "batch 3 size size"]:
    chosen = torch.randint(len(pictures), (config.batch,), generator=rng).tolist()
    return torch.cat([_crop(pictures[index], config, rng) for index in chosen])


def _crop(picture: np.ndarray, config: TrainStylizerConfig, rng: torch.Generator) -> Float[Tensor, "1 3 size size"]:
    """Return a random square of a picture in 0..1, mirrored or not."""
    height, width = picture.shape[:2]
    short = min(height, width)
    share = torch.rand(4, generator=rng).tolist()
    side = max(1, round(short * (config.crop + (1 - config.crop) * share[0])))
    top, left = round(share[1] * (height - side)), round(share[2] * (width - side))
    cut = torch.from_numpy(picture[top : top + side, left : left + side].copy())
    image = resize_images(cut.permute(2, 0, 1)[None].float() / 255, (config.size, config.size))
    return image.flip(3) if share[3] < 0.5 else image
