"""The extractor for convolutional networks, and for any network whose layers give maps."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.card import ModelCard
from vitfeats.errors import ConfigError, TapError, UnknownFacetError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.grid import PatchGrid, Size, as_pair
from vitfeats.hooks import Handler, Probe, capture, find_module, unwrapped
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
        centres = _Centres(batch.grid.network_size)
        channels_last = getattr(root, "output_fmt", None) == "NHWC"

        def reader(name: str) -> Callable[[Any], tuple[Tensor, PatchGrid]]:
            return lambda seen: _map_of(seen, channels_last, batch.grid.network_size, centres, name)

        maps = capture(
            self.model,
            {name: Probe(self._paths[name], reader(name)) for name in wanted},
            lambda model: model(batch.pixels),
            handlers=centres.handlers(),
        )
        return {tap: _joined([maps[name] for name in names]) for tap, names in members.items()}

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
    paths = [str(info["module"]) for info in stages if info["module"] in modules]
    return {re.sub(r"^(?=\d)", "stage", path): path for path in paths}  # names in taps begin with a letter


def usual_layer(model: nn.Module) -> str:
    """Return the layer read when none is asked for: ``relu4_1`` of a VGG, else the last stage but one."""
    names = list(find_layers(model))
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


class _Centres:
    """Follows, during one pass, where the first cell of each resolution looks: the middle of its receptive field.

    A convolution of kernel k and padding p puts the middle of its first cell at (k − 1)/2 − p cells of its input
    (Dumoulin and Visin, A Guide to Convolution Arithmetic, 2016). What leads to a resolution last decides for it: in
    plain residual networks all ways agree. Cells of resolutions that come about otherwise count as tiles.
    """

    def __init__(self, network_size: Size) -> None:
        self._network = network_size
        self._first: dict[Size, tuple[float, float]] = {network_size: (0.0, 0.0)}  # (y, x), in network pixels

    def handlers(self) -> dict[Callable[..., Any], Handler]:
        """Return stand-ins that note the geometry of each convolution and pooling, and let them run as they are."""

        def convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = func(*args, **kwargs)
            given = {
                **dict(zip(("input", "weight", "bias", "stride", "padding", "dilation"), args, strict=False)),
                **kwargs,
            }
            kernel = tuple(given["weight"].shape[-2:])
            self._note(given["input"], out, kernel, given.get("padding", 0), given.get("dilation", 1))
            return out

        def pooling(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = func(*args, **kwargs)
            given = {**dict(zip(("input", "kernel_size", "stride", "padding"), args, strict=False)), **kwargs}
            self._note(given["input"], out, given["kernel_size"], given.get("padding", 0), given.get("dilation", 1))
            return out

        return {F.conv2d: convolution, F.max_pool2d: pooling, F.avg_pool2d: pooling}

    def shift(self, size: Size, stride: int) -> float:
        """Return how far the middle of a cell's field lies from the middle of its square, in network pixels."""
        if size not in self._first:
            return 0.0
        y, x = (first + 0.5 - stride / 2 for first in self._first[size])
        return x if x == y else 0.0

    def _note(self, given: Tensor, made: Any, kernel: Any, padding: Any, dilation: Any) -> None:
        if not isinstance(made, Tensor) or made.ndim != 4 or isinstance(padding, str):
            return
        before, after = (int(given.shape[-2]), int(given.shape[-1])), (int(made.shape[-2]), int(made.shape[-1]))
        if before == after or before not in self._first:
            return
        steps = (network / cells for network, cells in zip(self._network, before, strict=True))
        moved = (
            first + ((d * (k - 1)) / 2 - p) * step
            for first, k, p, d, step in zip(
                self._first[before], _pair(kernel), _pair(padding), _pair(dilation), steps, strict=True
            )
        )
        y, x = moved
        self._first[after] = (y, x)


def _pair(value: Any) -> tuple[int, int]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (items[0], items[-1])


# What the hooks see ---------------------------------------------------------------------------------------------------


def _map_of(
    seen: Any, channels_last: bool, network: Size, centres: _Centres, name: str
) -> tuple[Float[Tensor, "batch dim rows cols"], PatchGrid]:
    """Return a layer's output as a float32 map of its own memory, and the grid that its cells make over the image."""
    if not isinstance(seen, Tensor) or seen.ndim != 4:
        got = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
        raise TapError(f"expected layer '{name}' to give a map (batch, channels, rows, cols), got {got}")
    moved = seen.permute(0, 3, 1, 2) if channels_last else seen
    rows, cols = int(moved.shape[2]), int(moved.shape[3])
    stride = network[0] // rows
    if (rows * stride, cols * stride) != network:
        raise TapError(
            f"expected the map of layer '{name}' to tile the network image of {network} (height, width), got "
            f"{rows}×{cols} cells; choose another layer, or a size that the network's strides divide"
        )
    own = moved.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return own, PatchGrid(rows, cols, stride, stride, centres.shift((rows, cols), stride))


def _joined(maps: Sequence[tuple[Tensor, PatchGrid]]) -> Reading:
    """Bring maps to the finest of their grids and concatenate their channels."""
    finest = min((grid for _, grid in maps), key=lambda grid: as_pair(grid.stride))
    points = finest.centres().to(maps[0][0].device)
    columns = [values.flatten(2) if grid == finest else sample_map(values, grid, points) for values, grid in maps]
    features = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
    return Reading(features.transpose(1, 2).contiguous(), grid=finest)
