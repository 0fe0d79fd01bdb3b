"""A network of style transfer with the network whose maps it works on: from pixels to pixels."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.api import device_of, load_extractor
from vitfeats.configs import STYLE_METHODS
from vitfeats.errors import ConfigError, ShapeError, WeightsUnavailableError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.models.bundled import ASSETS
from vitfeats.models.stylizers import ENCODER, load_network, settings_of
from vitfeats.nets.stylizing import Style, StyleNetwork

TAPS = tuple(f"out@relu{level}_1" for level in range(1, 6))
"""What an encoder is read at."""

VGG_FILE = "vgg_normalised.pth"

BUNDLED = "vgg_mini"
"""Encoder of the networks that come with the package."""

CELL = 16
"""Pixels of a side of the coarsest cells: sides are padded to whole numbers of them."""

SHORTEST = 2 * CELL
"""Pixels of the shortest side that an encoder reads: a map of one cell has no edge that can be mirrored."""


class Stylizer:
    """Paints images in the style of others; see :func:`vitfeats.stylize`, which reads images and writes one.

    Args:
        extractor: Reads the maps relu1_1 to relu5_1.
        network: Made for their channels.

    Raises:
        ConfigError: If the two do not fit, or the extractor has no such maps.
    """

    def __init__(self, extractor: Extractor, network: StyleNetwork) -> None:
        channels = channels_of(extractor)
        if channels != network.channels:
            raise ConfigError(
                f"expected a network for the channels of {extractor.card.name}, {channels}, got one for "
                f"{network.channels}; pass the encoder= that it was trained with"
            )
        self.extractor = extractor
        self.network = network.to(extractor.device)

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"Stylizer({self.network.method} on {self.extractor.card.name}, {self.extractor.device})"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.extractor.device

    def maps(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch channels rows cols"]]:
        """Return the encoder's maps of pixels, the sides whole numbers of 16."""
        return [d.map for d in self.extractor.describe(pixels, TAPS).values()]

    def __call__(
        self,
        content: Float[Tensor, "batch 3 height width"],
        styles: Sequence[Style],
        *,
        strength: float = 1.0,
        regions: Int[Tensor, "_ _ _"] | None = None,
        most: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return images of the content's size in 0..1. Sides are mirrored up to whole cells, and cut off again.

        Args:
            content: In 0..1, each side at least 16 pixels.
            styles: Maps of :meth:`maps`, their weights and regions.
            strength: 0 to 1.
            regions: Labels over the content, in any resolution.
            most: Style positions looked at; None is all.
            generator: Of their draw.

        Raises:
            ShapeError: If the content is too small.
            ConfigError: If a number is out of its range.
        """
        height, width = content.shape[2:]
        if min(height, width) < CELL:
            raise ShapeError(
                f"expected a content of at least {CELL}×{CELL} pixels, the stride of {self.extractor.card.name}, got "
                f"{height}×{width}; enlarge it, or pass size="
            )
        rows, cols = _mirrored(height), _mirrored(width)
        labels = regions
        if regions is not None:
            down, right = (
                (at * count + count // 2) // side
                for at, count, side in ((rows, regions.shape[1], height), (cols, regions.shape[2], width))
            )
            labels = regions[:, down][:, :, right]
        padded = content[:, :, rows][:, :, :, cols].to(self.device)
        made = self.network(
            self.maps(padded), styles, strength=strength, regions=labels, most=most, generator=generator
        )
        return made[..., :height, :width].clamp(0, 1)


def load_stylizer(
    method: str | None = None,
    *,
    encoder: str | Extractor | None = None,
    checkpoint: Path | str | None = None,
    device: str | torch.device = "auto",
) -> Stylizer:
    """Load a network of style transfer and its encoder.

    Args:
        method: "adaattn", "sanet" or "adain"; None is what ``checkpoint`` holds, else "adaattn".
        encoder: What reads the maps; None is what the network was trained with. For the published networks that is
            ``vgg_normalised``, whose file ``vgg_normalised.pth`` is looked for beside theirs.
        checkpoint: Published weights, or what ``vitfeats train-stylizer`` wrote; see
            :func:`vitfeats.models.stylizers.load_network`. None takes those that come with the package.
        device: Where it runs.

    Raises:
        ConfigError: If there is no such method, or the checkpoint is of another, or of another encoder.
        WeightsUnavailableError: If a file is missing or damaged.
    """
    if method is not None and method not in STYLE_METHODS:
        raise ConfigError(f"expected a method, got {method!r}. {nearest_names(str(method), STYLE_METHODS)}")
    if checkpoint is None:
        if encoder is not None and encoder != BUNDLED and not isinstance(encoder, Extractor):
            raise ConfigError(
                f"expected checkpoint= with a network for the encoder '{encoder}', got none; those that come with the "
                f"package are for '{BUNDLED}'"
            )
        file = ASSETS / f"{method or STYLE_METHODS[0]}_{BUNDLED}.safetensors"
    else:
        file = Path(checkpoint)
    settings = settings_of(file)
    if method is not None and settings.method != method:
        raise ConfigError(
            f"expected a network of '{method}', but '{file}' is of '{settings.method}'; pass method='{settings.method}'"
        )
    if isinstance(encoder, Extractor):
        if device != "auto" and device_of(device) != encoder.device:
            raise ConfigError(f"expected device= of the encoder, which is on {encoder.device} already, got '{device}'")
    else:
        name = encoder or settings.encoder
        if name != settings.encoder:
            raise ConfigError(
                f"expected the encoder '{settings.encoder}', whose maps the network of '{file}' was trained with, got "
                f"'{name}'"
            )
        weights = _beside(file, VGG_FILE) if name == ENCODER else None
        if name == ENCODER and weights is None:
            raise WeightsUnavailableError(
                f"expected the weights of the encoder at '{(file if file.is_dir() else file.parent) / VGG_FILE}', but "
                f"there is no such file; put it there, or pass encoder=load_extractor('{ENCODER}', checkpoint=FILE)"
            )
        # Not in bfloat16: attention looks elsewhere where its keys are rounded.
        encoder = load_extractor(name, device=device, checkpoint=weights, dtype="float32")
    network = load_network(file, channels_of(encoder))
    return Stylizer(encoder, network.requires_grad_(False))


def kept_stylizer(method: str | None, encoder: str | None, checkpoint: str | None, device: str) -> Stylizer:
    """Return what :func:`load_stylizer` does; the last few are kept, so that a loop does not reload.

    A file that has changed since is read again: a run may have trained further.
    """
    return _kept(method, encoder, checkpoint, device, _state_of(checkpoint))


@lru_cache(maxsize=3)
def _kept(
    method: str | None, encoder: str | None, checkpoint: str | None, device: str, _state: tuple[tuple[int, ...], ...]
) -> Stylizer:
    return load_stylizer(method, encoder=encoder, checkpoint=checkpoint, device=device_of(device))


def _state_of(checkpoint: str | None) -> tuple[tuple[int, ...], ...]:
    """Return what changes with a file, or with the files of a folder."""
    if checkpoint is None:
        return ()
    path = Path(checkpoint)
    found = [file.stat() for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in found)


def channels_of(extractor: Extractor) -> tuple[int, ...]:
    """Return the channels of relu1_1 to relu5_1.

    Raises:
        ConfigError: If the extractor has no such maps.
    """
    missing = [tap.partition("@")[2] for tap in TAPS if tap.partition("@")[2] not in extractor.card.layers]
    if missing:
        raise ConfigError(
            f"expected an encoder with relu1_1, relu2_1, … relu5_1, but {extractor.card.name} has no {missing[0]}; try "
            "'vgg_mini' or 'vgg19'"
        )
    blank = torch.zeros(1, 3, 2 * CELL, 2 * CELL, device=extractor.device)
    with torch.no_grad():
        return tuple(d.dim for d in extractor.describe(blank, TAPS).values())


def _mirrored(side: int) -> Int[Tensor, " padded"]:
    """Return which pixel of a side stands at each of as many as the encoder takes."""
    at = torch.arange(max(SHORTEST, side + -side % CELL)) % (2 * side - 2)
    return side - 1 - (side - 1 - at).abs()


def _beside(file: Path, name: str) -> Path | None:
    """Return a file of a folder of weights, or of the folder that a file of weights is in, if it is there."""
    found = (file if file.is_dir() else file.parent) / name
    return found if found.is_file() else None
