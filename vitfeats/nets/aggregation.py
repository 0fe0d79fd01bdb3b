"""The aggregation network of Luo et al., Diffusion Hyperfeatures, NeurIPS 2023: many maps of an image become one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitfeats.errors import ConfigError, ShapeError
from vitfeats.grid import Size

At = Literal["output", "own"]

_DIM = 384
_GROUPS = 32
_NARROWER = 4  # A bottleneck works on a quarter of the channels that it returns.


class AggregationNetwork(nn.Module):
    """The weighted sum of maps from several layers and steps of a diffusion model, each through a bottleneck.

    Every map is brought to one resolution (bilinear, not antialiased, corners not aligned) and through the bottleneck
    of its layer, which all steps share: convolutions 1×1, 3×3 and 1×1, each with a group norm, and a shortcut around
    them (He et al., CVPR 2016). The sum has one weight for each step and layer; together they are a softmax, equal at
    first.

    Maps may come one by one, as the diffusion model makes them (:meth:`add`), or all at once (:meth:`forward`). They
    are brought to the precision of the network's own weights first.

    Args:
        dims: Channels of each layer.
        steps: Tag of each step, in the order in which the mixing weights count them: (49, 45, …, 0) as published,
            from clean to noisy.
        dim: Channels of the result, a multiple of 4 · ``groups``.
        groups: Of every group norm.
        layers: Name of each layer, for messages; "layer 1", "layer 2", … unless given.
        at: Where a bottleneck works: at "output", the resolution of the result, as published, or at the map's "own",
            where only what it returns is interpolated. Both agree on a map that has the resolution of the result.
        generator: Source of the initial weights; None draws them from torch's global one.

    Attributes:
        mixing_weights: (steps · layers,), the logits of :attr:`mixing`, step by step.
        dims: As given, and so ``steps``, ``dim``, ``groups``, ``layers`` and ``at``.

    Raises:
        ConfigError: If there is no layer or no step, a step comes twice, the names are not as many as the layers, or a
            number is out of range.
    """

    def __init__(
        self,
        dims: Sequence[int],
        steps: Sequence[int],
        *,
        dim: int = _DIM,
        groups: int = _GROUPS,
        layers: Sequence[str] = (),
        at: At = "output",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(dims, steps, dim, groups, layers, at)
        self.dims, self.steps = tuple(map(int, dims)), tuple(map(int, steps))
        self.dim, self.groups, self.at = dim, groups, at
        self.layers = tuple(layers) or tuple(f"layer {index + 1}" for index in range(len(dims)))
        where = torch.get_default_device()
        with torch.device("meta"):  # torch would draw weights of its own, from its global generator
            # A sequence of one: the published keys count the bottlenecks of a layer too.
            self.bottleneck_layers = nn.ModuleList(
                nn.Sequential(_Bottleneck(channels, dim, groups)) for channels in self.dims
            )
            self.mixing_weights = nn.Parameter(torch.empty(len(steps) * len(dims)))
        self.to_empty(device=where)
        _initialise(self, generator)

    @property
    def mixing(self) -> Float[Tensor, "steps layers"]:
        """Weight of each step's map of each layer in the sum; they are positive and sum to one."""
        return self.mixing_weights.softmax(0).unflatten(0, (len(self.steps), len(self.dims)))

    def pruned(self) -> tuple[int, int]:
        """Return (index into ``steps``, index into ``layers``) of the largest weight: the one map to keep, if one."""
        step, layer = divmod(int(self.mixing_weights.argmax()), len(self.dims))
        return step, layer

    def reduce(
        self, layer: int, map: Float[Tensor, "batch channels rows cols"], size: Size
    ) -> Float[Tensor, "batch dim height width"]:
        """Return one map through its layer's bottleneck, at ``size``, without its weight in the sum.

        Args:
            layer: Index into ``layers``.
            map: What the layer made at any step.
            size: (height, width) of the result, in cells.

        Raises:
            ConfigError: If there is no such layer.
            ShapeError: If the map has not the layer's channels.
        """
        self._check_index("layer", layer, self.layers)
        if map.dim() != 4 or map.shape[1] != self.dims[layer]:
            raise ShapeError(
                f"expected a map of shape (batch, {self.dims[layer]}, rows, cols) from {self.layers[layer]}, got "
                f"{tuple(map.shape)}; pass the maps in the order of the layers"
            )
        map = map.to(self.mixing_weights.dtype)
        bottleneck = self.bottleneck_layers[layer]
        assert isinstance(bottleneck, nn.Sequential)
        if self.at == "own":
            return _interpolated(bottleneck[0](map, (map.shape[-2], map.shape[-1])), size)
        return bottleneck[0](map, size)

    def add(
        self,
        total: Float[Tensor, "batch dim height width"] | None,
        step: int,
        layer: int,
        map: Float[Tensor, "batch channels rows cols"],
        size: Size,
    ) -> Float[Tensor, "batch dim height width"]:
        """Return ``total`` plus one map's weight times :meth:`reduce`; nothing of the map is kept.

        ``total`` itself is changed and returned where no gradient is asked for, so that the sum over all maps takes
        the memory of one.

        Args:
            total: What this method returned for the map before; None for the first.
            step: Index into ``steps``, not the tag of the step.
            layer: Index into ``layers``.
            map: What the layer made at this step.
            size: (height, width) of the result, in cells; the same for all maps.

        Raises:
            ConfigError: If there is no such step or layer.
            ShapeError: If the map has not the layer's channels, or does not fit the batch or size of ``total``.
        """
        self._check_index("step", step, self.steps)
        reduced = self.reduce(layer, map, size)
        weight = self.mixing[step, layer]
        if total is None:
            return reduced * weight
        if total.shape != reduced.shape:
            raise ShapeError(
                f"expected a total of shape {tuple(reduced.shape)} to add {self.layers[layer]} to, got "
                f"{tuple(total.shape)}; keep batch and size the same for all maps"
            )
        if torch.is_grad_enabled() and any(part.requires_grad for part in (total, reduced, weight)):
            return torch.addcmul(total, reduced, weight)
        return total.addcmul_(reduced, weight)

    def forward(self, maps: Sequence[Sequence[Tensor]], size: Size) -> Float[Tensor, "batch dim height width"]:
        """Return the weighted sum of all maps.

        Args:
            maps: ``maps[step][layer]`` of shape (batch, channels of the layer, rows, cols), at any resolution.
            size: (height, width) of the result, in cells; 64 × 64 as published.

        Raises:
            ShapeError: If there are not as many maps as steps and layers, or one does not fit.
        """
        if len(maps) != len(self.steps) or any(len(row) != len(self.dims) for row in maps):
            got = sorted({len(row) for row in maps})
            raise ShapeError(
                f"expected maps[step][layer] of {len(self.steps)} steps × {len(self.dims)} layers, got {len(maps)} × "
                f"{' or '.join(map(str, got)) or 0}"
            )
        total = None
        for step, row in enumerate(maps):
            for layer, each in enumerate(row):
                total = self.add(total, step, layer, each, size)
        assert total is not None
        return total

    def checkpoint(self) -> dict[str, Any]:
        """Return a copy of all that :meth:`from_checkpoint` needs, in the published layout, on the CPU.

        ``config`` has two entries that published files lack, ``groups`` and ``at``.
        """
        config = {
            "projection_dim": self.dim,
            "save_timestep": list(self.steps),
            "dims": list(self.dims),
            "groups": self.groups,
            "at": self.at,
        }
        weights = {key: value.to("cpu", copy=True) for key, value in self.state_dict().items()}
        return {"config": config, "aggregation_network": weights}

    @classmethod
    def from_checkpoint(
        cls,
        state: Mapping[str, Any],
        *,
        dims: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        layers: Sequence[str] = (),
        origin: str = "the checkpoint",
        at: At | None = None,
    ) -> "AggregationNetwork":
        """Return the network of a published checkpoint, or of one of :meth:`checkpoint`.

        It is made on torch's default device, in its default precision, with copies of the weights. No random number is
        drawn.

        Args:
            state: As read from the file: a dictionary whose ``aggregation_network`` holds the weights and whose
                ``config`` says the steps (``save_timestep``), or the weights alone. Their keys may begin with
                "module.".
            dims: Channels of each layer that the maps will have, to be compared with those of the weights; None takes
                the weights' word.
            steps: Tag of each step, instead of those in ``config``.
            layers: Name of each layer, for messages.
            origin: What to call the checkpoint in messages, such as the name of its file.
            at: Where the bottlenecks work; None is what ``config`` says, or else "output", as published.

        Raises:
            ConfigError: If these are no such weights (missing, unexpected or misshapen ones are named), no steps are
                known or they do not fit the number of mixing weights, or ``dims`` differ from the weights'.
        """
        config, weights = _opened(state, origin)
        found = _read_dims(weights, origin)
        if dims is not None:
            _check_dims(found, dims, layers, origin)
        tags = config.get("save_timestep") if steps is None else steps
        if tags is None:
            raise ConfigError(
                f"expected the steps, for {origin} has no config with save_timestep; pass steps=, in the order of its "
                "mixing weights"
            )
        mixing = weights["mixing_weights"].numel()
        if mixing != len(tags) * len(found):
            raise ConfigError(
                f"expected {len(tags) * len(found)} mixing weights in {origin} for {len(tags)} steps × {len(found)} "
                f"layers, got {mixing}; pass the steps it was trained with"
            )
        where = torch.get_default_device()
        # In older torch the default device is not that of a context, so weights are drawn after all.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = cls(
                found,
                tags,
                dim=_channels(weights, "bottleneck_layers.0.0.conv3.weight", 0, origin),
                groups=config.get("groups", _GROUPS),
                layers=layers,
                at=at or config.get("at", "output"),
            )
        _check_keys(weights, network.state_dict(), origin)
        network.to_empty(device=where)
        network.load_state_dict(weights)
        return network

    def _check_index(self, kind: str, index: int, known: Sequence[Any]) -> None:
        if not 0 <= index < len(known):
            raise ConfigError(
                f"expected the index of a {kind} from 0 to {len(known) - 1}, got {index}; the {kind}s are "
                f"{', '.join(map(str, known))}"
            )


class _Convolution(nn.Conv2d):
    """A convolution without bias, and the norm that follows it: the published keys have the one inside the other."""

    def __init__(self, before: int, after: int, side: int, groups: int) -> None:
        super().__init__(before, after, side, padding=side // 2, bias=False)
        self.norm = nn.GroupNorm(groups, after)


class _Bottleneck(nn.Module):
    """The bottleneck of a residual network, without stride; the shortcut is the input itself where that fits."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        narrow = after // _NARROWER
        self.shortcut = _Convolution(before, after, 1, groups) if before != after else None
        self.conv1 = _Convolution(before, narrow, 1, groups)
        self.conv2 = _Convolution(narrow, narrow, 3, groups)
        self.conv3 = _Convolution(narrow, after, 1, groups)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Return the bottleneck of ``x`` interpolated to ``size``.

        A 1×1 convolution without bias and an interpolation commute, the one being linear in channels and the other in
        cells. So both convolutions that see ``x`` work at the smaller of both resolutions, and of a small map with
        many channels few are interpolated. Their norms do not commute: they see what was interpolated.
        """
        if x.shape[-2] * x.shape[-1] > size[0] * size[1]:
            x = _interpolated(x, size)
        # In place from here on: the backward pass of a norm reads its input, never its output.
        deep = F.relu_(self.conv1.norm(_interpolated(self.conv1(x), size)))
        deep = F.relu_(self.conv2.norm(self.conv2(deep)))
        deep = self.conv3.norm(self.conv3(deep))
        if self.shortcut is None:
            deep += _interpolated(x, size)
        else:
            deep += self.shortcut.norm(_interpolated(self.shortcut(x), size))
        return F.relu_(deep)


def contrastive_loss(
    a: Float[Tensor, "dim rows cols"],
    b: Float[Tensor, "dim other_rows other_cols"],
    index_a: Int[Tensor, " n"],
    index_b: Int[Tensor, " n"],
    *,
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Return how badly the cells of two maps that belong together find each other: symmetric cross entropy.

    Each annotated cell of ``a`` chooses among all cells of ``b`` by a softmax over cosine similarities divided by the
    temperature, and the other way round; the loss is the mean of both cross entropies, as in Luo et al., Diffusion
    Hyperfeatures, NeurIPS 2023, after Radford et al., ICML 2021. A cell whose vector is zero has similarity 0.

    Args:
        a: Map of one image, usually a sum of :class:`AggregationNetwork`.
        b: Map of the other.
        index_a: Annotated cells of ``a``, ``row · cols + col``; one may come several times.
        index_b: The cell of ``b`` that belongs to each of them.
        temperature: Above 0; the smaller, the harder the choice.

    Raises:
        ConfigError: If the temperature is not above 0.
        ShapeError: If there is no annotated cell, there are not as many of each, one lies outside its map, or the maps
            have not as many channels.
    """
    if temperature <= 0:
        raise ConfigError(f"expected a temperature above 0, got {temperature}")
    if len(a) != len(b):
        raise ShapeError(f"expected maps with as many channels, got {len(a)} and {len(b)}; reduce both by one network")
    if index_a.shape != index_b.shape:
        raise ShapeError(f"expected a cell of b for each of a, got {len(index_b)} for {len(index_a)}")
    if not len(index_a):
        raise ShapeError("expected at least one pair of cells, got none; leave out images without common points")
    cells_a, cells_b = _unit_cells(a), _unit_cells(b)
    _check_cells("a", index_a, cells_a.shape[1])
    _check_cells("b", index_b, cells_b.shape[1])
    index_a, index_b = index_a.long(), index_b.long()
    forth = cells_a[:, index_a].T @ cells_b / temperature
    back = cells_b[:, index_b].T @ cells_a / temperature
    return (F.cross_entropy(forth, index_b) + F.cross_entropy(back, index_a)) / 2


def _unit_cells(map: Tensor) -> Tensor:
    """Return the vectors of a map's cells as (dim, cells), of length one; zero vectors stay zero."""
    cells = map.flatten(1)
    length = cells.norm(dim=0)
    # Not a small number instead of zero: the gradient of a cell in which all channels died would be its inverse.
    return cells / length.where(length > 0, torch.ones_like(length))


def _interpolated(map: Tensor, size: Size) -> Tensor:
    if tuple(map.shape[-2:]) == tuple(size):
        return map
    return F.interpolate(map, size=size, mode="bilinear", align_corners=False)


def _initialise(network: AggregationNetwork, generator: torch.Generator | None) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.ones_(network.mixing_weights)


# What a checkpoint holds ---------------------------------------------------------------------------------------------


def _opened(state: Mapping[str, Any], origin: str) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return the settings and the weights of a checkpoint."""
    inside = state.get("aggregation_network", state)
    weights = {key.removeprefix("module."): value for key, value in inside.items()}
    if not isinstance(weights.get("mixing_weights"), Tensor):
        raise ConfigError(
            f"expected mixing_weights among the weights of an aggregation network in {origin}, got {_listed(weights)}"
        )
    return state.get("config") or {} if inside is not state else {}, weights


def _read_dims(weights: Mapping[str, Tensor], origin: str) -> tuple[int, ...]:
    layers = {key.split(".")[1] for key in weights if key.startswith("bottleneck_layers.")}
    if not layers:
        raise ConfigError(f"expected bottleneck_layers in {origin}, got {_listed(weights)}")
    return tuple(
        _channels(weights, f"bottleneck_layers.{layer}.0.conv1.weight", 1, origin) for layer in range(len(layers))
    )


def _channels(weights: Mapping[str, Tensor], key: str, axis: int, origin: str) -> int:
    weight = weights.get(key)
    if weight is None or weight.dim() != 4:
        got = "none" if weight is None else f"the shape {tuple(weight.shape)}"
        raise ConfigError(f"expected a convolution {key} in {origin}, got {got}")
    return weight.shape[axis]


def _listed(names: Sequence[str] | Mapping[str, Any], most: int = 4) -> str:
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more if shown else "nothing"


# What is refused -----------------------------------------------------------------------------------------------------


def _check(dims: Sequence[int], steps: Sequence[int], dim: int, groups: int, layers: Sequence[str], at: At) -> None:
    if not dims or not steps or min(dims) < 1:
        raise ConfigError(
            f"expected at least one layer with a channel and one step, got dims={tuple(dims)}, steps={tuple(steps)}"
        )
    if len(set(steps)) < len(steps):
        raise ConfigError(f"expected each step once, got steps={tuple(steps)}")
    if groups < 1:
        raise ConfigError(f"expected at least one group, got groups={groups}")
    unit = _NARROWER * groups
    if dim < 1 or dim % unit:
        nearest = max(1, round(dim / unit)) * unit
        raise ConfigError(
            f"expected dim to be a multiple of {_NARROWER} · groups = {unit}, got {dim}; try dim={nearest}, or other "
            "groups"
        )
    if layers and len(layers) != len(dims):
        raise ConfigError(f"expected a name for each of {len(dims)} layers, got {len(layers)}")
    if at not in ("output", "own"):
        raise ConfigError(f"expected at='output' or 'own', got {at!r}")


def _check_dims(found: Sequence[int], wanted: Sequence[int], layers: Sequence[str], origin: str) -> None:
    if len(found) != len(wanted):
        raise ConfigError(
            f"expected {len(wanted)} layers in {origin}, got {len(found)}; choose the layers it was trained with"
        )
    for index, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        if got != expected:
            name = layers[index] if index < len(layers) else index + 1
            raise ConfigError(
                f"expected layer {name} with {expected} channels in {origin}, got {got}; choose the layers it was "
                "trained with, in their order"
            )


def _check_keys(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> None:
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in wanted]
    wrong = {"missing": missing, "unexpected": unexpected}
    if missing or unexpected:
        raise ConfigError(
            f"expected the weights of an aggregation network in {origin}, got "
            f"{'; '.join(f'{kind}: {_listed(keys)}' for kind, keys in wrong.items() if keys)}"
        )
    for key, value in wanted.items():
        if weights[key].shape != value.shape:
            raise ConfigError(
                f"expected {key} of shape {tuple(value.shape)} in {origin}, got {tuple(weights[key].shape)}"
            )


def _check_cells(map: str, index: Tensor, cells: int) -> None:
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= cells:
        raise ShapeError(
            f"expected cells of {map} from 0 to {cells - 1}, got {low if low < 0 else high}; a cell is row · cols + col"
        )
