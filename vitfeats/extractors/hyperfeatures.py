"""The extractor of Diffusion Hyperfeatures: the maps of many layers and steps of a diffusion model, made into one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.card import ModelCard
from vitfeats.configs import DiffusionConfig
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, TapError, UnknownFacetError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.extractors.diffusion import DiffusionExtractor, Generated, OnMap, find_layers, hyperfeature_layers
from vitfeats.grid import PatchGrid, Size
from vitfeats.hooks import find_module
from vitfeats.nets.aggregation import AggregationNetwork
from vitfeats.nets.denoiser import Denoiser
from vitfeats.preprocess import Prepared, Preprocess
from vitfeats.taps import Reading, Tap

LAYERS = {
    "hyperfeatures": "all steps and layers, through their bottlenecks, in the learned mixture",
    "pruned": "the one step and layer of the largest mixing weight, through its bottleneck",
    "raw": "the same step and layer, as the diffusion model gave it",
    "concatenation": "all steps and layers as they are, channel behind channel",
}
"""What can be read with ``out@``; the last three are the other rows of the paper's comparison."""


class HyperfeatureModel(nn.Module):
    """A diffusion model and the network that aggregates its maps.

    Args:
        denoiser: The diffusion model.
        aggregation: Made for it: as many layers as it has residual blocks on the way up, with their channels.

    Raises:
        ConfigError: If the two do not fit; the message names the layer.
    """

    def __init__(self, denoiser: Denoiser, aggregation: AggregationNetwork) -> None:
        super().__init__()
        self.denoiser, self.aggregation = denoiser, aggregation
        channels = layer_channels(denoiser)
        if len(channels) != len(aggregation.dims):
            raise ConfigError(
                f"expected an aggregation of {len(channels)} layers for this model, got one of {len(aggregation.dims)}"
            )
        for (name, wanted), got in zip(channels.items(), aggregation.dims, strict=True):
            if wanted != got:
                raise ConfigError(f"expected an aggregation for {wanted} channels at layer '{name}', got {got}")


def layer_channels(denoiser: Denoiser) -> dict[str, int]:
    """Return the channels of each layer that is aggregated, by name."""
    layers = find_layers(denoiser.unet)
    found = {}
    for name in hyperfeature_layers(layers):
        convolution: Any = find_module(denoiser, f"{layers[name]}.conv2")
        found[name] = int(convolution.out_channels)
    return found


class HyperfeatureExtractor(Extractor):
    """Reads ``out@hyperfeatures``, and the other rows of the paper's table: see :data:`LAYERS`.

    Each map is reduced as it fires and none is kept, but for ensembles, whose maps are averaged first.
    """

    model: HyperfeatureModel

    def __init__(
        self,
        model: HyperfeatureModel,
        card: ModelCard,
        preprocess: Preprocess,
        *,
        dtype: str | torch.dtype = "auto",
        diffusion: DiffusionConfig | None = None,
        cell: int | None = None,
    ) -> None:
        """Prepare to read a model.

        Args:
            model: The diffusion model and its aggregation network.
            card: What is known about it.
            preprocess: Size and normalisation of its images.
            dtype: Precision of the diffusion model; the aggregation runs in float32.
            diffusion: How the diffusion model reads; None is as the aggregation network was trained: one clean pass
                for a single step, else inversion.
            cell: Side of the result's cells in pixels, which divides the size. None is that of the latents (8 for
                Stable Diffusion), 2 for models of pixels.

        Raises:
            ConfigError: If the settings have not the steps that the aggregation network was made for.
        """
        super().__init__(model, card, preprocess, dtype)
        steps = model.aggregation.steps
        self.inner = DiffusionExtractor(
            model.denoiser, card, preprocess, dtype=dtype, diffusion=diffusion or _settings(tuple(steps))
        )
        self.cell = cell or max(model.denoiser.factor, 2)
        config = self.inner.diffusion
        if card.patch % self.cell:
            raise ConfigError(f"expected a cell that divides {card.patch} pixels, got {self.cell}")
        fits = max(steps) < config.steps if config.mode == "inversion" else len(steps) == 1
        if not fits:
            raise ConfigError(
                f"expected settings with the steps that the aggregation was made for, {tuple(steps)}, got mode "
                f"{config.mode!r} with {config.steps} steps; leave diffusion=None for its own"
            )
        layers = layer_channels(model.denoiser)
        self._layers = tuple(layers)

    @classmethod
    def of(
        cls, extractor: DiffusionExtractor, aggregation: AggregationNetwork, **settings: Any
    ) -> "HyperfeatureExtractor":
        """Return an extractor that aggregates what another reads, at its size and in its way.

        Args:
            extractor: Reads the diffusion model.
            aggregation: Made for that model and the extractor's steps.
            **settings: ``cell``, as for the class.
        """
        model = HyperfeatureModel(extractor.model, aggregation)
        found = cls(
            model,
            card_for(extractor.card, aggregation.dim),
            extractor.preprocess,
            diffusion=extractor.diffusion,
            **settings,
        )
        found.autocast = found.inner.autocast = extractor.autocast
        return found

    @property
    def diffusion(self) -> DiffusionConfig:
        """How the diffusion model reads."""
        return self.inner.diffusion

    def reading(self, diffusion: DiffusionConfig) -> "HyperfeatureExtractor":
        """Return an extractor of the same networks (shared, not copied) that reads in another way.

        Raises:
            ConfigError: If the settings have not the steps that the aggregation network was made for.
        """
        found = HyperfeatureExtractor(self.model, self.card, self.preprocess, diffusion=diffusion, cell=self.cell)
        found.autocast = found.inner.autocast = self.autocast
        return found

    @property
    def overlaps(self) -> bool:
        """Maps have cells of their own."""
        return False

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach an image: in the modes of one pass."""
        return self.inner.differentiable

    def resized(self, *, size: int | Size | None = None, stride: int | None = None) -> "HyperfeatureExtractor":
        """Return an extractor of the same networks at another size."""
        other = super().resized(size=size, stride=stride)
        assert isinstance(other, HyperfeatureExtractor)
        inner = self.inner.resized(size=size, stride=stride)
        assert isinstance(inner, DiffusionExtractor)
        other.inner = inner
        return other

    def resolve(self, tap: Tap) -> Tap:
        """Return the tap with its layer's name."""
        names = list(LAYERS)
        if tap.facet != "out":
            raise UnknownFacetError(
                f"expected a facet that {self.card.name} has, got {tap.facet!r}: it gives maps; try "
                f"'{self.card.default_tap}'"
            )
        if tap.step is not None:
            raise TapError(f"expected a tap without a step, got '{tap}': hyperfeatures are of all steps")
        if isinstance(tap.layer, int):
            tap = replace(tap, layer=names[int(tap.resolved(len(names)).layer)])
        if tap.layer not in LAYERS:
            raise TapError(
                f"expected a layer of {self.card.name}, got {tap.layer!r}. {nearest_names(str(tap.layer), names)}"
            )
        return tap

    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        """Read the taps along one chain."""

        def run(wanted: Sequence[Tap], on_map: OnMap) -> None:
            self.inner.stream(batch, wanted, on_map)

        return self._aggregated(run, taps, batch.grid.network_size, self.inner.draws)

    def generate(
        self,
        prompt: str | None = None,
        *,
        latents: Float[Tensor, "batch channels rows cols"] | None = None,
        taps: Sequence[str | Tap] = ("out@hyperfeatures",),
        size: Size | None = None,
        number: int = 1,
        seed: int | None = None,
    ) -> Generated:
        """Make pictures from noise, and aggregate the model's maps while it does.

        As :meth:`DiffusionExtractor.generate`. An aggregation that was trained on inversion serves: its steps have the
        same names in both directions.
        """
        if self.diffusion.mode != "inversion":
            raise ConfigError(
                f"expected an aggregation network of several steps to read while pictures form, got one for mode "
                f"{self.diffusion.mode!r}; use one that was trained on inversion"
            )
        asked = [(str(tap), self.resolve(Tap.parse(tap))) for tap in taps]
        done: list[tuple[Tensor, Prepared]] = []

        def run(wanted: Sequence[Tap], on_map: OnMap) -> None:
            done.append(self.inner.form(prompt, latents, wanted, on_map, size=size, number=number, seed=seed))

        network = self.inner.formed_size(latents, size)
        with torch.no_grad():
            readings = self._aggregated(run, [tap for _, tap in asked], network, 1)
        made, batch = done[0]
        features = Descriptors([(text, self._descriptor(tap, readings[tap], batch)) for text, tap in asked])
        return Generated(batch.pixels, made, features)

    def _aggregated(
        self, run: Callable[[Sequence[Tap], OnMap], None], taps: Sequence[Tap], network: Size, draws: int
    ) -> dict[Tap, Reading]:
        """Run the diffusion model and make each map into what is asked for, as it fires."""
        aggregation = self.model.aggregation
        size = (network[0] // self.cell, network[1] // self.cell)
        places = {tap: place for place, tap in self._taps(taps).items()}
        best = aggregation.pruned()
        asked = {str(tap.layer) for tap in taps}
        made: dict[str, Tensor] = {}
        parts: dict[tuple[int, int], Tensor] = {}
        sums: dict[Tap, Tensor] = {}

        def take(tap: Tap, seen: Tensor) -> None:
            step, layer = place = places[tap]
            seen = seen.float()
            with torch.autocast(seen.device.type, enabled=False):
                if "hyperfeatures" in asked:
                    made["hyperfeatures"] = aggregation.add(made.get("hyperfeatures"), step, layer, seen, size)
                if "pruned" in asked and place == best:
                    made["pruned"] = aggregation.reduce(layer, seen, size)
                if "concatenation" in asked or ("raw" in asked and place == best):
                    parts[place] = F.interpolate(seen, size=size, mode="bilinear", align_corners=False)

        def keep(tap: Tap, seen: Tensor) -> None:
            sums[tap] = sums[tap] + seen.float() if tap in sums else seen.to(torch.float32, copy=True)

        run(list(places), take if draws == 1 else keep)
        for tap, total in sums.items():
            take(tap, total / draws)
        if "raw" in asked:
            made["raw"] = parts[best]
        if "concatenation" in asked:
            made["concatenation"] = torch.cat([parts[place] for place in sorted(parts)], 1)
        grid = PatchGrid(*size, self.cell, self.cell)
        return {tap: Reading(made[str(tap.layer)].flatten(2).transpose(1, 2).contiguous(), grid=grid) for tap in taps}

    def _taps(self, taps: Sequence[Tap]) -> dict[tuple[int, int], Tap]:
        """Return the diffusion model's taps that are needed, by (number of the step, number of the layer)."""
        aggregation = self.model.aggregation
        steps = aggregation.steps
        one = self.inner.diffusion.mode != "inversion"
        every = {
            (step, layer): Tap("residual", name, None if one else int(steps[step]))
            for step in range(len(steps))
            for layer, name in enumerate(self._layers)
        }
        if {str(tap.layer) for tap in taps} <= {"pruned", "raw"}:
            best = aggregation.pruned()
            return {best: every[best]}
        return every


def card_for(card: ModelCard, dim: int, **changes: Any) -> ModelCard:
    """Return the card of a diffusion model's hyperfeatures.

    Args:
        card: That of the diffusion model.
        dim: Channels of the aggregation network's result.
        **changes: Other fields of the card.
    """
    found = replace(
        card,
        name=f"hyperfeatures:{card.name}",
        depth=len(LAYERS),
        dim=dim,
        default_tap="out@hyperfeatures",
        layers=tuple(LAYERS),
    )
    return replace(found, **changes)


def _settings(steps: tuple[int, ...]) -> DiffusionConfig:
    """Return the settings that an aggregation network's steps tell of."""
    if steps == (0,):
        return DiffusionConfig.preset("hyperfeatures-one-step")
    if len(steps) == 1:
        raise ConfigError(
            f"expected diffusion= for an aggregation of the single step {steps[0]}: how many steps the chain has is "
            "not known"
        )
    total, kept = max(steps) + 1, len(steps)
    even = kept == total or total % (kept - 1) == 0
    usual = DiffusionConfig.preset("hyperfeatures", steps=total, keep=kept if even else total)
    return usual if usual.kept_steps == steps else replace(usual, keep=total)
