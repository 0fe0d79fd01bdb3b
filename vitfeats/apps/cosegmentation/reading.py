"""Reading a set of images once: tokens to a file, and what is small kept in memory; in an order of the images' own."""

import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitfeats.apps.cosegmentation.evidence import border_saliency, stretched
from vitfeats.attention_maps import saliency as attention_saliency
from vitfeats.configs import CosegmentConfig
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, ImageError, ShapeError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import Frame, PatchGrid
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.resize import spread_map
from vitfeats.similarity import unit
from vitfeats.taps import Tap

_IN_MEMORY = 2**26  # bytes of tokens that are kept in memory; more go to a temporary file
_ATTENTION = 0.3  # weight of attention beside the border's saliency
_CROPPED = 0.95  # side of a random crop, in sides of the image


class TokenStore:
    """Tokens of many images, as float16: the first 64 MiB in memory, all of them in a temporary file beyond."""

    def __init__(self) -> None:
        # Closed, and gone, when the store is: nothing is left on the disk, not even after a crash.
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, tuple[int, int]]] = []

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._places)

    def count(self, index: int) -> int:
        """Return the number of tokens of an image."""
        return self._places[index][1][0]

    def append(self, tokens: Float[Tensor, "tokens dim"]) -> None:
        """Add an image."""
        self._file.seek(0, os.SEEK_END)
        self._places.append((self._file.tell(), (tokens.shape[0], tokens.shape[1])))
        self._file.write(tokens.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())

    def __getitem__(self, index: int) -> Float[Tensor, "tokens dim"]:
        """Return the tokens of an image, in float32."""
        place, shape = self._places[index]
        self._file.seek(place)
        data = self._file.read(2 * shape[0] * shape[1])
        return torch.from_numpy(np.frombuffer(data, np.float16).reshape(shape).astype(np.float32))

    def sample(self, every: int, most: int, kept: Sequence[Tensor | None]) -> Float[Tensor, "n dim"]:
        """Return every n-th token of those kept; with ``every`` 0 all, or ``most`` of them, evenly spread.

        Args:
            every: Step over the tokens of all images, one after the other.
            most: Largest number of tokens, for ``every`` 0.
            kept: For each image a mask of its tokens, or None for all of them.
        """
        counts = [
            shape[0] if mask is None else int(mask.sum()) for (_, shape), mask in zip(self._places, kept, strict=True)
        ]
        total = sum(counts)
        taken = np.arange(0, total, every) if every else np.unique(np.linspace(0, total - 1, min(most, total)).round())
        parts, start = [], 0
        for index, (count, mask) in enumerate(zip(counts, kept, strict=True)):
            here = torch.from_numpy(taken[(taken >= start) & (taken < start + count)].astype(np.int64) - start)
            start += count
            if len(here):
                parts.append((self[index] if mask is None else self[index][mask])[here])
        return torch.cat(parts) if parts else torch.zeros(0, self._places[0][1][1])


@dataclass(frozen=True, eq=False)
class Read:
    """What is known of one image, but for its tokens.

    Attributes:
        place: Where it stands in the list that was given.
        grid: Its token grid.
        frame: Its sizes.
        saliency: (rows, cols) in 0..1.
        cls: (dim,) of the last block, or None.
    """

    place: int
    grid: PatchGrid
    frame: Frame
    saliency: Float[Tensor, "rows cols"]
    cls: Float[Tensor, " dim"] | None


@dataclass(frozen=True, eq=False)
class ReadSet:
    """What one pass of a model over a set of images gave.

    Attributes:
        images: In the order in which they were read, which is of their own: that of their contents.
        tokens: Unit vectors, an entry an image, in the same order; after them those of crops: all of the first image,
            then all of the second, and so on.
        tap: What was clustered.
        crops: How many of each image.
    """

    images: tuple[Read, ...]
    tokens: TokenStore
    tap: Tap
    crops: int = 0

    def fitted(self, kept: Sequence[bool]) -> list[Tensor | None]:
        """Return what of each entry of the tokens clusters are fitted on: nothing of images that are not kept."""
        entries = [*kept, *(keep for keep in kept for _ in range(self.crops))]
        return [None if keep else self.nothing(entry) for entry, keep in enumerate(entries)]

    def of_crops(self) -> list[Tensor]:
        """Return masks that leave out all crops, an entry a crop."""
        return [self.nothing(entry) for entry in range(len(self.images), len(self.tokens))]

    def nothing(self, entry: int) -> Bool[Tensor, " tokens"]:
        """Return a mask of an entry's tokens that leaves out all."""
        return torch.zeros(self.tokens.count(entry), dtype=torch.bool)


def read_images(
    images: Sequence[ImageLike],
    extractor: Extractor,
    config: CosegmentConfig,
    *,
    seed: int = 0,
    batch_size: int = 8,
    broken: dict[int, str] | None = None,
    progress: bool = False,
) -> ReadSet:
    """Read tokens, saliency and CLS of images in one forward pass each, in the order of their contents.

    That order does not depend on the one they are given in, so that nothing later does.

    Args:
        images: Of any sizes.
        extractor: Reads them.
        config: What is read.
        seed: Of the crops.
        batch_size: Most images in one forward pass.
        broken: Where images that cannot be read, or are too long, are noted by their place, and why; None raises at the
            first.
        progress: Show a progress bar on standard error.

    Raises:
        ImageError: If an image cannot be read, and ``broken`` is None.
        ConfigError: If there is none, or none is left.
        ShapeError: If the features are not finite, or an image is too long.
    """
    from tqdm import tqdm

    digests = [digest(image) for image in images]
    order = sorted(range(len(images)), key=lambda index: digests[index])
    taps = taken_taps(extractor, config)
    store, read = TokenStore(), []
    loaded: list[int] = []
    tap = Tap.parse(taps["tokens"])

    def given() -> Iterator[Tensor]:
        for index in order:
            try:
                image = load_image(images[index])
                extractor.preprocess.network_size((image.shape[1], image.shape[2]))  # refuses what is too long
            except (ImageError, ShapeError) as error:
                if broken is None:
                    raise
                broken[index] = str(error)
                continue
            loaded.append(index)
            yield image

    asked = list(dict.fromkeys(taps.values()))
    with tqdm(total=len(images), unit="image", desc="reading", disable=not progress) as bar:
        for number, found in enumerate(extractor.each(given(), asked, batch_size=batch_size)):
            for d in found.values():
                _check_finite(d)
            d = found[taps["tokens"]]
            store.append(unit(d.features[0].float()))
            tap = d.tap
            read.append(_noted(loaded[number], found, taps, config))
            bar.update()
    if not read:
        why = f" that can be read: {next(iter(broken.values()))}" if broken else ""
        raise ConfigError(f"expected images, got none{why}")
    if config.crops:
        whole = [(images[one.place], digests[one.place]) for one in read]
        for d in extractor.each(_crops(whole, config.crops, seed), taps["tokens"], batch_size=batch_size):
            _check_finite(d)
            store.append(unit(d.features[0].float()))
    return ReadSet(tuple(read), store, tap, config.crops)


def taken_taps(extractor: Extractor, config: CosegmentConfig) -> dict[str, str]:
    """Return what is read, by what it is for: "tokens"; "border" and "attention" for saliency; "cls" for outliers.

    Raises:
        ConfigError: If the tap is none of tokens, or outliers are asked for, and the model has no CLS.
    """
    card = extractor.card
    numbered = not card.layers and Tap.parse(card.default_tap).facet in ("key", "query", "value", "token")
    # Of a vision transformer, the last block's output, which tells the border from what it encloses better than keys.
    last = "token@-1" if numbered else card.default_tap
    taps = {"tokens": card.default_tap if config.tap is None else config.tap}
    if Tap.parse(taps["tokens"]).facet in ("cls", "attention"):
        raise ConfigError(f"expected a tap with features of each token, got '{taps['tokens']}'; for example 'key@-1'")
    if config.saliency in ("border", "both"):
        taps["border"] = last
    if config.saliency == "attention" or (config.saliency == "both" and card.has_cls and numbered):
        taps["attention"] = "attention@-1"
    if config.outliers is not None:
        if not card.has_cls:
            raise ConfigError(f"expected a model with CLS for outliers=, but {card.name} has none; leave it out")
        taps["cls"] = last
    return taps


def digest(image: Any) -> str:
    """Return a digest of what an image holds: of a path its file, of others their pixels as they are read."""
    found = hashlib.sha256()
    # What cannot be read is refused later, by the one who needs it.
    with suppress(ImageError, OSError):
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            found.update(path.read_bytes() if path.is_file() else os.fsencode(path))
        else:
            pixels = load_image(image).detach().cpu()
            found.update(f"{tuple(pixels.shape)}".encode() + pixels.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_finite(d: Descriptor) -> None:
    if not bool(d.features.sum(dtype=torch.float64).isfinite()):
        raise ShapeError(f"expected finite features, got NaN or infinity ({d.tap} of {d.model})")


def _noted(place: int, found: Descriptors, taps: dict[str, str], config: CosegmentConfig) -> Read:
    parts = []
    if "border" in taps:
        parts.append(border_saliency(found[taps["border"]]))
    if "attention" in taps:
        parts.append(attention_saliency(found[taps["attention"]].detach(), config.heads or None)[0])
    saliency = (parts[0] if len(parts) == 1 else stretched(parts[0] + _ATTENTION * parts[1])).cpu()
    d: Descriptor = found[taps["tokens"]]
    if saliency.shape != (d.grid.rows, d.grid.cols):  # of a network whose layers have grids of their own
        source = found[taps.get("border", taps["tokens"])].grid
        saliency = spread_map(saliency[None, None], source, (d.grid.rows, d.grid.cols))[0, 0]
    cls = found[taps["cls"]].cls if "cls" in taps else None
    return Read(place, d.grid, d.frames[0], saliency, None if cls is None else cls[0].detach().float().cpu())


def _crops(images: Sequence[tuple[ImageLike, str]], count: int, seed: int) -> Iterator[Tensor]:
    """Yield random crops, half of them mirrored; what is drawn depends on the image and not on its place."""
    for image, content in images:
        generator = np.random.default_rng([seed, int(content[:12], 16)])
        pixels = load_image(image)
        height, width = (max(1, round(_CROPPED * side)) for side in pixels.shape[1:])
        for _ in range(count):
            top = int(generator.integers(pixels.shape[1] - height + 1))
            left = int(generator.integers(pixels.shape[2] - width + 1))
            crop = pixels[:, top : top + height, left : left + width]
            yield crop.flip(2) if generator.random() < 0.5 else crop
