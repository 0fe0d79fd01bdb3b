"""The extractor for convolutional networks, and for any network whose layers give maps."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from vitfeats.card import ModelCard
from vitfeats.errors import ConfigError, TapError, UnknownFacetError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.grid import PatchGrid, Size, as_pair
from vitfeats.hooks import Probe, capture, find_module, unwrapped
from vitfeats.preprocess import Prepared, Preprocess
from vitfeats.resize import sample_map
from vitfeats.taps import Reading, Tap


class ConvExtractor(Extractor):
    """Reads the outputs of named layers as descriptors: ``out@relu4_1``, ``out@layer3``.

    Each layer has a grid of its own, as fine as its map. Several layers joined by ``+`` are hypercolumns (Hariharan et
    al., Hypercolumns for Object Segmentation and Fine-Grained Localization, CVPR 2015): all are read in one pass,
    brought to the centres of the finest by bilinear interpolation, and their channels concatenated in the order asked.

    Nothing of the model is changed, and the pass ends at the deepest layer asked.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        preprocess: Preprocess,
        *,
        dtype: str | torch.dtype = "auto",
        layers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to read a model.

        Args:
            model: A model of timm that gives maps, or any module for images.
            card: What is known about it; ``card.layers`` names the layers that can be read.
            preprocess: Size and normalisation of its images; its stride must be its patch.
            dtype: See :func:`~vitfeats.extractors.base.autocast_type`.
            layers: Module path of each layer's name. None finds them in models of timm; in another module, names that
                are not found are paths themselves.

        Raises:
            ConfigError: If a stride is asked for, or a layer cannot be found.
        """
        super().__init__(model, card, preprocess, dtype)
        self._check_stride()
        root = unwrapped(model)
        known = find_layers(root) if layers is None else layers
        self._paths = {name: known.get(name, name) for name in card.layers}
        for name, path in self._paths.items():
            try:
                find_module(root, path)
            except TapError as error:
                raise ConfigError(f"expected layers that {card.name} has, got {name!r}: {error}") from error

    @property
    def overlaps(self) -> bool:
        """Layers have strides of their own."""
        return False

    def resolve(self, tap: Tap) -> Tap:
        """Return the tap with its layer's name (layers may be counted, too: ``out@-1``)."""
        names = list(self._paths)
        if tap.facet != "out":
            raise UnknownFacetError(
                f"expected a facet that {self.card.name} has, got {tap.facet!r}: its layers are maps, without tokens "
                f"that attend to each other; try '{self.card.usual_tap}'"
            )
        if tap.step is not None:
            raise TapError(f"expected a tap without a step, got '{tap}': only diffusion models have steps")
        if isinstance(tap.layer, int):
            return Tap("out", names[int(tap.resolved(len(names)).layer)])
        for name in tap.layer.split("+"):
            if name not in self._paths:
                raise TapError(f"expected a layer of {self.card.name}, got {name!r}. {nearest_names(name, names)}")
        return tap

    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        """Read the taps in one forward pass that ends at the deepest of them."""
        self._check_stride()
        members = {tap: str(tap.layer).split("+") for tap in taps}
        wanted = list(dict.fromkeys(name for names in members.values() for name in names))
        root = unwrapped(self.model)
        geometry = _Geometry(batch.grid.network_size)
        channels_last = getattr(root, "output_fmt", None) == "NHWC"

        def reader(name: str) -> Callable[[Any], tuple[Tensor, PatchGrid]]:
            return lambda seen: _map_of(seen, channels_last, batch.grid.network_size, geometry, name)

        maps = capture(
            self.model,
            {name: Probe(self._paths[name], reader(name)) for name in wanted},
            lambda model: model(batch.pixels),
            around=geometry.around,
        )
        return {tap: joined([maps[name] for name in names]) for tap, names in members.items()}

    def _check_stride(self) -> None:
        if self.preprocess.stride != self.card.patch:
            raise ConfigError(
                f"expected no stride for {self.card.name}, got {self.preprocess.stride}: its layers have strides of "
                "their own; choose a shallower layer, or a larger size, for a finer grid"
            )


# Finding the layers of a model ---------------------------------------------------------------------------------------


def find_layers(model: nn.Module) -> dict[str, str]:
    """Return the module path of each layer's name: ``relu1_1`` … in a VGG, else the stages that timm names.

    Empty where nothing is known of the model.
    """
    convolutions = getattr(model, "features", None)
    if type(model).__name__ == "VGG" and isinstance(convolutions, nn.Sequential):
        return _vgg_layers(convolutions)
    stages = getattr(model, "feature_info", None)
    if not isinstance(stages, list):
        return {}
    modules = dict(model.named_modules())
    paths = [str(info["module"]) for info in stages if info["module"] and info["module"] in modules]
    return {re.sub(r"^(?=\d)", "stage", path): path for path in paths}  # names in taps begin with a letter


class Layer(NamedTuple):
    """What a layer gives: maps of so many channels, of so many pixels a cell."""

    channels: int
    stride: int


def readable_layers(model: nn.Module, size: Size) -> dict[str, Layer]:
    """Return the layers of :func:`find_layers` that give maps which tile the image; found by one pass over grey.

    Args:
        model: A network on its device, in evaluation mode.
        size: (height, width) of the image, in pixels.
    """
    paths = find_layers(model)
    first = next((tensor for tensor in model.parameters()), torch.empty(0))
    grey = torch.zeros(1, 3, *size, device=first.device, dtype=first.dtype)
    last = getattr(model, "output_fmt", None) == "NHWC"
    found: dict[Any, Any] = {}
    probes: dict[Any, Probe] = {
        name: Probe(path, lambda seen: _layer_of(seen, last, size)) for name, path in paths.items()
    }
    # Layers that never run, or run twice, are left out; so are all where the network does not take such an image.
    with suppress(TapError, RuntimeError, AssertionError), torch.no_grad():
        capture(model, probes, lambda network: network(grey), on_value=found.__setitem__)
    return {name: found[name] for name in paths if found.get(name) is not None}


def usual_layer(layers: Mapping[str, Any]) -> str:
    """Return the layer read when none is asked for: ``relu4_1`` of a VGG, else the last but one."""
    names = list(layers)
    return "relu4_1" if "relu4_1" in names else names[-2 if len(names) > 1 else -1]


def _vgg_layers(features: nn.Sequential) -> dict[str, str]:
    block, number, found = 1, 0, {}
    for index, module in enumerate(features):
        if isinstance(module, nn.ReLU):
            number += 1
            found[f"relu{block}_{number}"] = f"features.{index}"
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            block, number = block + 1, 0
    return found


# Where the cells of a map look ----------------------------------------------------------------------------------------


_Two = tuple[Any, Any]  # vertical, horizontal


class _Field(NamedTuple):
    """Where the cells of a map look, along one axis, in network pixels."""

    first: float  # the middle of what the first cell sees, less half a pixel
    step: float  # from one cell to the next


_Fields = tuple[_Field, _Field]  # vertical, horizontal


class _Geometry:
    """Follows, during one pass, where the cells of each map look: the middles of their receptive fields.

    Each map carries its own geometry from function to function. A convolution of kernel k, dilation d and padding p
    puts the middle of its first cell at d(k − 1)/2 − p cells of its input (Dumoulin and Visin, A Guide to Convolution
    Arithmetic, 2016); padding, unshuffling and interpolation move it likewise; a function that keeps the size keeps
    the geometry, and where branches come together it is their mean. A map that comes out of tokens, and has lost its
    own, takes what was last known of its size; where nothing is known, cells count as tiles.
    """

    def __init__(self, network_size: Size) -> None:
        self._of_size: dict[Size, _Fields] = {network_size: (_Field(0.0, 1.0), _Field(0.0, 1.0))}
        self._of_map: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function and note the geometry of the map it makes."""
        before = [self.fields(value) for value in _maps_in(args, kwargs)]
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.ndim == 4 and any(before):
            after = _moved(func, args, kwargs, before, out)
            if after is not None:
                self._of_map[out] = self._of_size[_size(out)] = after
        return out

    def fields(self, value: Tensor) -> _Fields | None:
        """Return the geometry of a map, or None."""
        return self._of_map.get(value) or self._of_size.get(_size(value))

    def shift(self, seen: Tensor, size: Size, stride: int) -> float | tuple[float, float]:
        """Return how far the middles of fields lie from the middles of tiles, in network pixels."""
        fields = self._of_map.get(seen) or self._of_size.get(size)
        if fields is None:
            return 0.0
        down, right = (field.first + 0.5 - stride / 2 for field in fields)
        return down if down == right else (down, right)


def _moved(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], before: list[_Fields | None], out: Tensor
) -> _Fields | None:
    """Return the geometry of what a function makes, or None where it cannot be said."""
    name = getattr(func, "__name__", "")
    rule = _RULES.get(name)
    if rule is not None:
        given = {**dict(zip(rule.names, args, strict=False)), **kwargs}
        return None if before[0] is None else rule.move(given, before[0], out)
    # Functions that keep the size keep the geometry; sums and concatenations of branches take their mean.
    same = [
        fields
        for fields, value in zip(before, _maps_in(args, kwargs), strict=True)
        if fields is not None and _size(value) == _size(out)
    ]
    if not same:
        return None
    return tuple(_Field(fmean(f[axis].first for f in same), same[0][axis].step) for axis in (0, 1))  # type: ignore[return-value]


def _windowed(given: Mapping[str, Any], fields: _Fields, out: Tensor) -> _Fields | None:
    """Convolutions and poolings."""
    kernel = given["weight"].shape[-2:] if "weight" in given else given["kernel_size"]
    stride = given.get("stride")
    stride = kernel if stride is None or stride == [] else stride
    padding, dilation = given.get("padding", 0), _pair(given.get("dilation", 1))
    if isinstance(padding, str):  # "same" puts what is left over behind; "valid" is none
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)] if padding == "same" else 0
    return _axes(fields, _pair(kernel), _pair(stride), _pair(padding), dilation)


def _axes(fields: _Fields, kernel: _Two, stride: _Two, padding: _Two, dilation: _Two = (1, 1)) -> _Fields:
    vertical, horizontal = (
        _Field(field.first + (d * (k - 1) / 2 - p) * field.step, field.step * s)
        for field, k, s, p, d in zip(fields, kernel, stride, padding, dilation, strict=True)
    )
    return vertical, horizontal


def _transposed(given: Mapping[str, Any], fields: _Fields, out: Tensor) -> _Fields | None:
    """Transposed convolutions: the window of an output is that of the convolution turned round."""
    kernel, stride, padding = given["weight"].shape[-2:], _pair(given.get("stride", 1)), _pair(given.get("padding", 0))
    finer = tuple(_Field(field.first, field.step / s) for field, s in zip(fields, stride, strict=True))
    return tuple(  # type: ignore[return-value]
        _Field(field.first - ((k - 1) / 2 - p) * field.step, field.step)
        for field, k, p in zip(finer, kernel, padding, strict=True)
    )


def _padded(given: Mapping[str, Any], fields: _Fields, out: Tensor) -> _Fields | None:
    """Padding in front moves the first cell back."""
    left, _, *rest = given["pad"]
    vertical, horizontal = fields
    top = rest[0] if rest else 0
    return (
        vertical._replace(first=vertical.first - top * vertical.step),
        horizontal._replace(first=horizontal.first - left * horizontal.step),
    )


def _resampled(given: Mapping[str, Any], fields: _Fields, out: Tensor) -> _Fields | None:
    """Interpolation, shuffling and unshuffling: the new cells tile what the old ones tiled."""
    sizes = zip(fields, _size(given["input"]), _size(out), strict=True)
    ratios = [(field, old / new) for field, old, new in sizes]
    return tuple(_Field(field.first + (r - 1) / 2 * field.step, field.step * r) for field, r in ratios)  # type: ignore[return-value]


class _Rule(NamedTuple):
    names: tuple[str, ...]
    move: Callable[[Mapping[str, Any], _Fields, Tensor], _Fields | None]


_POOLING = _Rule(("input", "kernel_size", "stride", "padding"), _windowed)
_RULES: dict[str, _Rule] = {
    "conv2d": _Rule(("input", "weight", "bias", "stride", "padding", "dilation"), _windowed),
    "conv_transpose2d": _Rule(("input", "weight", "bias", "stride", "padding"), _transposed),
    "max_pool2d": _POOLING,
    "avg_pool2d": _POOLING,
    "pad": _Rule(("input", "pad"), _padded),
    "interpolate": _Rule(("input",), _resampled),
    "pixel_shuffle": _Rule(("input",), _resampled),
    "pixel_unshuffle": _Rule(("input",), _resampled),
}


def _maps_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the maps among a function's arguments, also those in a list (concatenation)."""
    flat = [
        item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, list | tuple) else [value])
    ]
    return [value for value in flat if isinstance(value, Tensor) and value.ndim == 4]


def _size(value: Tensor) -> Size:
    return int(value.shape[-2]), int(value.shape[-1])


def _pair(value: Any) -> _Two:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (items[0], items[-1])


# What the hooks see ---------------------------------------------------------------------------------------------------


def _map_of(
    seen: Any, channels_last: bool, network: Size, geometry: _Geometry, name: str
) -> tuple[Float[Tensor, "batch dim rows cols"], PatchGrid]:
    """Return a layer's output as a float32 map of its own memory, and the grid that its cells make over the image."""
    if not isinstance(seen, Tensor) or seen.ndim != 4:
        got = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
        raise TapError(f"expected layer '{name}' to give a map (batch, channels, rows, cols), got {got}")
    moved = seen.permute(0, 3, 1, 2) if channels_last else seen
    rows, cols = _size(moved)
    stride = _tiles(moved, network)
    if stride is None:
        raise TapError(
            f"expected the map of layer '{name}' to tile the network image of {network} (height, width), got "
            f"{rows}×{cols} cells; choose another layer, or a size that the network's strides divide"
        )
    own = moved.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return own, PatchGrid(rows, cols, stride, stride, geometry.shift(seen, (rows, cols), stride))


def _layer_of(seen: Any, channels_last: bool, network: Size) -> Layer | None:
    if not isinstance(seen, Tensor) or seen.ndim != 4:
        return None
    moved = seen.permute(0, 3, 1, 2) if channels_last else seen
    stride = _tiles(moved, network)
    return None if stride is None else Layer(int(moved.shape[1]), stride)


def _tiles(values: Tensor, network: Size) -> int | None:
    """Return the side of the squares that a map's cells tile the network image with, or None."""
    rows, cols = _size(values)
    stride = network[0] // max(rows, 1)
    return stride if (rows * stride, cols * stride) == network else None


def joined(maps: Sequence[tuple[Tensor, PatchGrid]]) -> Reading:
    """Bring maps to the finest of their grids and concatenate their channels."""
    finest = min((grid for _, grid in maps), key=lambda grid: as_pair(grid.stride))
    points = finest.centres().to(maps[0][0].device)
    columns = [values.flatten(2) if grid == finest else sample_map(values, grid, points) for values, grid in maps]
    features = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
    return Reading(features.transpose(1, 2).contiguous(), grid=finest)
