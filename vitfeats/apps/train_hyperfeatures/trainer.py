"""The optimiser steps by which an aggregation network learns from pairs of images."""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.apps.evaluation.datasets import Pair
from vitfeats.apps.evaluation.pck import pck
from vitfeats.apps.train_hyperfeatures.maps import LayerMaps, MapCache, facts_of
from vitfeats.configs import TrainHyperfeaturesConfig, plain_config
from vitfeats.descriptor import check_inside
from vitfeats.errors import ConfigError, ImageError, ShapeError
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor, layer_channels
from vitfeats.grid import Frame, PatchGrid
from vitfeats.nets.aggregation import AggregationNetwork, contrastive_loss
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.runs import check_same, scheduled
from vitfeats.similarity import unit
from vitfeats.views import numbered

_FORMAT = "vitfeats.train-hyperfeatures/1"
_INITIAL, _ORDER = 0, 1  # what random numbers are for
_ALPHA = 0.1  # of PCK


@dataclass(frozen=True, eq=False)
class _Seen:
    """An aggregated image, and the cells of its points."""

    map: Float[Tensor, "dim rows cols"]
    grid: PatchGrid
    frame: Frame
    index: Int[Tensor, " n"]


class HyperfeatureTrainer:
    """Takes the optimiser steps, one pair each. What a step sees depends on the seed and its number alone.

    The layers are the model's residual blocks on the way up; the steps are those that the extractor keeps in mode
    "inversion", and one in the modes of one pass.

    Args:
        pairs: To learn from; every epoch takes each once, in an order of its own. Each is asked for when it is used.
        extractor: Reads the diffusion model, which is not changed.
        config: Settings; None is the defaults.
        validation: Pairs to judge by.
        seed: Of the first weights and of the order, at least 0.
        cache: Folder for the diffusion model's maps, up to ``config.cache_gib``; None keeps none.

    Attributes:
        done: Steps taken.
        aggregation: The network that is trained.
        extractor: Reads the diffusion model.
        config: The settings.

    Raises:
        ConfigError: If there is no pair, the extractor is not of a diffusion model, or the settings do not fit it.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        extractor: DiffusionExtractor,
        config: TrainHyperfeaturesConfig | None = None,
        *,
        validation: Sequence[Pair] = (),
        seed: int = 0,
        cache: Path | str | None = None,
    ) -> None:
        self.config = config = config or TrainHyperfeaturesConfig()
        if not len(pairs):
            raise ConfigError("expected at least one pair, got none; WarpedImages makes some of any images")
        if seed < 0:
            raise ConfigError(f"expected a seed of at least 0, got {seed}")
        if not isinstance(extractor, DiffusionExtractor):
            raise ConfigError(f"expected the extractor of a diffusion model, got {extractor!r}; try 'sd15'")
        self.pairs, self.validation, self.extractor, self.seed = pairs, validation, extractor, seed
        self.done = 0
        inverting = extractor.diffusion.mode == "inversion"
        steps = extractor.diffusion.kept_steps if inverting else (0,)
        channels = layer_channels(extractor.model)
        with torch.device("cpu"):  # where the random numbers are drawn, the same for every device
            network = AggregationNetwork(
                tuple(channels.values()),
                steps,
                dim=config.dim,
                groups=config.groups,
                layers=tuple(channels),
                generator=numbered(seed, _INITIAL),
            )
        self.aggregation = network.to(extractor.device)
        # Made now, so that settings that its result would refuse are refused before the work.
        self._cell = HyperfeatureExtractor.of(extractor, self.aggregation, cell=config.cell).cell
        kept = MapCache(cache, config.cache_gib) if cache is not None and config.cache_gib > 0 else None
        self._maps = LayerMaps(extractor, steps, kept)
        self._facts = facts_of(extractor)
        self._trained = list(self.aggregation.parameters())
        self._before = [p.detach().clone() for p in self._trained]  # the last whose loss and gradient were finite
        self._optimiser = torch.optim.AdamW(
            self._trained,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=extractor.device.type in ("cpu", "cuda"),
        )

    def loss(self, pair: Pair) -> Float[Tensor, ""]:
        """Return the symmetric cross entropy of a pair's points: :func:`~vitfeats.nets.aggregation.contrastive_loss`.

        Raises:
            ImageError, ShapeError: If an image cannot be read, or a point lies outside of it.
        """
        with self._precisely():
            a, b = self._seen(pair)
            return contrastive_loss(a.map, b.map, a.index, b.index, temperature=self.config.temperature)

    def step(self) -> dict[str, float]:
        """Take one optimiser step; return ``loss``, and ``pck`` every ``validate_every`` steps.

        Raises:
            FloatingPointError: If the loss or its gradient is not finite. The network then has the weights of the last
                step for which they were.
            ImageError, ShapeError: If an image cannot be read, or a point lies outside of it; the message names the
                pair.
        """
        config, pair = self.config, self.pairs[self._place(self.done)]
        with torch.inference_mode(False), torch.enable_grad(), self._precisely():  # the backward pass too
            loss = self.loss(pair)
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            gradients = [p.grad.norm() for p in self._trained if p.grad is not None]
            if not bool(torch.stack([loss.detach(), *gradients]).isfinite().all()):
                _copy(self._before, self._trained)
                raise FloatingPointError(
                    f"expected a finite loss and gradient at step {self.done}, pair '{pair.name}', got a loss of "
                    f"{float(loss.detach()):g}"
                )
            _copy(self._trained, self._before)
            for group in self._optimiser.param_groups:
                group["lr"] = scheduled(config.lr, config.schedule, self.done, config.steps)
            self._optimiser.step()
        self.done += 1
        losses = {"loss": float(loss.detach())}
        if len(self.validation) and config.validate_every and self.done % config.validate_every == 0:
            losses["pck"] = self.judged()
        return losses

    @torch.no_grad()
    def judged(self) -> float:
        """Return PCK@0.1 on the validation pairs, 0..1: the share of all their points that come near enough.

        A point goes from its cell in image a to the centre of the most similar cell in image b; near enough is within
        a tenth of the longer side of image b (≤), in pixels of that image. NaN without validation pairs.
        """
        hits, points = 0.0, 0
        for place in range(len(self.validation)):
            pair = self.validation[place]
            with self._precisely():
                a, b = self._seen(pair)
                cells_a, cells_b = (unit(seen.map.flatten(1).T) for seen in (a, b))
                nearest = (cells_a[a.index] @ cells_b.T).argmax(1).cpu()
            found = b.frame.to_source(b.grid.centres_of(nearest))
            hits += len(found) * pck(found, pair.points_b, b.frame.source_size, alpha=_ALPHA)
            points += len(found)
        return hits / points if points else math.nan

    def trained(self) -> AggregationNetwork:
        """Return a frozen copy of the network, in evaluation mode."""
        return copy.deepcopy(self.aggregation).eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on as if it had never stopped."""
        return {
            "format": _FORMAT,
            "about": self._about(),
            "step": self.done,
            "network": {name: value.clone() for name, value in self.aggregation.state_dict().items()},
            "before": [kept.clone() for kept in self._before],
            "optimiser": copy.deepcopy(self._optimiser.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If it is of other settings; the message says what differs.
        """
        if state.get("format") != _FORMAT:
            raise ConfigError(
                f"expected the state of a training of hyperfeatures ({_FORMAT}), got {state.get('format')!r}"
            )
        # A model may be found under another name by now; its weights say whether it is the same.
        free = ("model", "validate_every", "checkpoint_every", "cache_gib")
        check_same(state["about"], self._about(), free=free)
        self.aggregation.load_state_dict(state["network"])
        _copy(state["before"], self._before)
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))  # it would change the caller's
        self.done = int(state["step"])

    def _about(self) -> dict[str, Any]:
        return plain_config(self.config) | self._facts | {"seed": self.seed, "pairs": len(self.pairs)}

    def _place(self, step: int) -> int:
        epoch, place = divmod(step, len(self.pairs))
        return int(torch.randperm(len(self.pairs), generator=numbered(self.seed, _ORDER, epoch))[place])

    def _precisely(self) -> AbstractContextManager[Any]:
        """Keep somebody's autocast out of what is trained; the diffusion model has its own."""
        return torch.autocast(self.extractor.device.type, enabled=False)

    def _seen(self, pair: Pair) -> tuple[_Seen, _Seen]:
        try:
            return self._described(pair.image_a, pair.points_a), self._described(pair.image_b, pair.points_b)
        except (ImageError, ShapeError) as error:
            raise type(error)(f"pair '{pair.name}': {error}") from error

    def _described(self, image: ImageLike, points: Float[Tensor, "n 2"]) -> _Seen:
        pixels = load_image(image).detach()
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        frame = Frame(size, self.extractor.preprocess.network_size(size))
        check_inside(points, frame)  # before the diffusion model works for nothing
        rows, cols = (side // self._cell for side in frame.network_size)
        grid = PatchGrid(rows, cols, self._cell, self._cell)
        aggregated = self.aggregation(self._maps(pixels), (rows, cols))[0]
        return _Seen(aggregated, grid, frame, grid.index_of(frame.to_network(points)).to(aggregated.device))


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for kept, other in zip(target, source, strict=True):
        kept.copy_(other)
