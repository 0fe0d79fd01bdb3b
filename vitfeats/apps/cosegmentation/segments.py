"""What co-segmentation returns: for each image its mask, clusters and parts, and for the set its clusters and votes."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import max_pool2d

from vitfeats import plot
from vitfeats.configs import CosegmentConfig
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, ImageError, StoreError
from vitfeats.grid import Frame, PatchGrid, Size
from vitfeats.preprocess import ImageLike, load_image, to_pil
from vitfeats.runs import finite, save_image

KINDS, PARTS = ("masks", "cutouts", "overlays"), "parts"
WRITTEN = (*KINDS, PARTS, "overview.png")
"""Pictures, and folders of them, that :meth:`Cosegmentation.save` writes into its folder."""

_SHOWN = 32  # most images in the overview
_SIDE = 256  # of a picture in it, in pixels
_HALF = 127
_LONGEST = 200  # bytes of a name
_COLOURS = np.array(  # of parts, one after the other; told apart by most colour-blind people (Okabe and Ito, 2008)
    [
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
        *((0, 114, 178), (213, 94, 0), (204, 121, 167), (255, 255, 255)),
    ],
    dtype=np.float32,
)


@dataclass(frozen=True, eq=False)
class Segment:
    """What was found in one image.

    Attributes:
        image: The image as it was given; read anew when it is drawn.
        name: Of its file, or its place in the set.
        alpha: (height, width), 0..255: how much each pixel is foreground, on the image as it was refined, which may be
            smaller than the source.
        labels: (rows, cols), the cluster of each token; of parts, the part, −1 for background.
        score: (rows, cols), 0..1: what speaks for each token to be foreground.
        grid: The token grid.
        frame: The sizes of the source and of what the network saw.
        outlier: Whether the image was left out, by its CLS; its mask is empty then.
        part_map: (height, width) of whole numbers, the part that each pixel has if it is foreground, on the same image
            as ``alpha``; None without parts.
    """

    image: ImageLike
    name: str
    alpha: UInt8[np.ndarray, "height width"]
    labels: Int[Tensor, "rows cols"]
    score: Float[Tensor, "rows cols"]
    grid: PatchGrid
    frame: Frame
    outlier: bool = False
    part_map: UInt8[np.ndarray, "height width"] | None = None

    @property
    def mask(self) -> Bool[np.ndarray, "height width"]:
        """Which pixels of the source are foreground."""
        return self._matte(self.frame.source_size) > _HALF

    @property
    def share(self) -> float:
        """Share of the image that is foreground, 0..1."""
        return float((self.alpha > _HALF).mean())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(x0, y0, x1, y1) around the foreground, in source pixels, the last two exclusive; None without any."""
        return Image.fromarray(self.mask).getbbox()

    @property
    def parts(self) -> Int[np.ndarray, "height width"] | None:
        """The part of each pixel of the source, −1 for background; None without parts."""
        return self._parts(self.mask)

    def cutout(self) -> Image.Image:
        """Return the image with the background transparent (RGBA).

        Raises:
            ImageError: If the image cannot be read any more, or has another size now.
        """
        picture = self._picture()
        picture.putalpha(Image.fromarray(self._matte(self.frame.source_size)))
        return picture

    def overlay(self, largest: int | None = None) -> Image.Image:
        """Return the image with its background dark and grey, an outline around the foreground, and parts in colour.

        Args:
            largest: Longer side in pixels that the image is reduced to; None is its own size.

        Raises:
            ImageError: If the image cannot be read any more, or has another size now.
        """
        picture = self._picture()
        if largest is not None:
            picture.thumbnail((largest, largest))
        pixels = np.asarray(picture, dtype=np.float32)
        mask = self._matte((picture.height, picture.width)) > _HALF
        grey = pixels.mean(2, keepdims=True) * 0.35 + 20
        parts = self._parts(mask)
        tinted = pixels if parts is None else 0.45 * pixels + 0.55 * _COLOURS[parts % len(_COLOURS)]
        drawn = np.where(mask[..., None], tinted, grey)
        drawn[_outline(mask)] = (255, 64, 64) if parts is None else (0, 0, 0)
        return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))

    def _picture(self) -> Image.Image:
        picture = to_pil(load_image(self.image))
        height, width = self.frame.source_size
        if picture.size != (width, height):
            raise ImageError(
                f"expected '{self.name}' as it was read, {width}×{height} pixels, got {picture.width}×{picture.height} "
                "pixels; find its mask again"
            )
        return picture

    def _matte(self, size: Size) -> UInt8[np.ndarray, "height width"]:
        return np.asarray(Image.fromarray(self.alpha).resize((size[1], size[0]), Image.Resampling.BILINEAR))

    def _parts(self, mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, "height width"] | None:
        if self.part_map is None:
            return None
        numbers = Image.fromarray(self.part_map).resize(mask.shape[::-1], Image.Resampling.NEAREST)
        return np.where(mask, np.asarray(numbers).astype(np.int64), -1)


@dataclass(frozen=True, eq=False)
class Cosegmentation(Sequence[Segment]):
    """What a set of images shares: a sequence of :class:`Segment`, in the order of the images.

    Attributes:
        segments: One for each image that could be read.
        votes: (clusters,): in how many images each cluster of tokens is salient. Empty for one image alone.
        salient: (clusters,): which clusters are foreground by those votes.
        weights: (clusters,), 0..1: mean saliency of each cluster over all images.
        config: The settings.
        model: The model's name.
        tap: What was clustered.
        refined: How masks were brought to pixels: "grabcut", "guided" or "none".
        seed: Of clusters and crops.
        num_parts: Number of parts; 0 without.
        failed: Why images could not be read, by their place in the list that was given.
    """

    segments: tuple[Segment, ...]
    votes: Int[Tensor, " clusters"]
    salient: Bool[Tensor, " clusters"]
    weights: Float[Tensor, " clusters"]
    config: CosegmentConfig
    model: str
    tap: str
    refined: str
    seed: int
    num_parts: int = 0
    failed: dict[int, str] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.segments)

    def __getitem__(self, index: Any) -> Any:
        """Return the segment of an image, or some of them."""
        return self.segments[index]

    def __iter__(self) -> Iterator[Segment]:
        """Iterate over the segments."""
        return iter(self.segments)

    def __repr__(self) -> str:
        """Say what it is in one line."""
        what = f", {self.num_parts} parts" if self.num_parts else ""
        return f"Cosegmentation({len(self)} images, {len(self.votes)} clusters{what}, {self.tap} of {self.model})"

    @property
    def masks(self) -> list[Bool[np.ndarray, "_ _"]]:
        """The mask of each image, in its own size."""
        return [segment.mask for segment in self.segments]

    def overview(self, columns: int = 8) -> Image.Image:
        """Draw images above their overlays, in rows; the first 32 of many.

        Args:
            columns: Images in a row, at least 1.

        Raises:
            ConfigError: If ``columns`` is below 1.
            ImageError: If an image cannot be read any more, or has another size now.
        """
        if columns < 1:
            raise ConfigError(f"expected columns of at least 1, got {columns}")
        shown = self.segments[:_SHOWN]
        columns = min(columns, len(shown))
        pictures: list[Image.Image] = []
        for start in range(0, len(shown), columns):
            row = shown[start : start + columns]
            blank = [Image.new("RGB", (_SIDE, _SIDE), "white")] * (columns - len(row))
            pictures += [*(_thumbnail(to_pil(load_image(segment.image))) for segment in row), *blank]
            pictures += [*(_thumbnail(segment.overlay(_SIDE)) for segment in row), *blank]
        return plot.side_by_side(pictures, columns=columns)

    def save(self, folder: Path | str) -> Path:
        """Write masks, cut-outs, overlays, parts, what tokens were found to be, and cosegmentation.json.

        Into the folders ``masks`` (0 and 255), ``cutouts`` (with transparency), ``overlays`` and, with parts, ``parts``
        (0 is background, n + 1 part n): NAME.png, numbered where names are not unique. ``tokens.npz`` has the arrays
        ``N_labels`` and ``N_score`` of image N. One image after the other is in memory.

        Returns:
            The path of cosegmentation.json, which is written last.

        Raises:
            StoreError: If something cannot be written.
            ImageError: If an image cannot be read any more, or has another size now.
        """
        base = Path(folder)
        kinds = [*KINDS, *([PARTS] if self.num_parts else [])]
        try:
            for kind in kinds:
                (base / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"expected a folder to write to at '{base}', but: {error}") from error
        facts = []
        for name, segment in zip(unique_names([segment.name for segment in self.segments]), self.segments, strict=True):
            drawn = {
                "masks": Image.fromarray(segment.mask.astype(np.uint8) * 255),
                "cutouts": segment.cutout(),
                "overlays": segment.overlay(),
            }
            if (parts := segment.parts) is not None:
                drawn[PARTS] = Image.fromarray((parts + 1).astype(np.uint8))
            files = {kind: f"{kind}/{name}.png" for kind in kinds}
            for kind, file in files.items():
                save_image(drawn[kind], base / file)
            facts.append(_facts(segment) | files)
        save_image(self.overview(), base / "overview.png")
        self._save_tokens(base / "tokens.npz")
        written = base / "cosegmentation.json"
        write_whole(written, (json.dumps(finite(self.facts() | {"images": facts}), indent=1) + "\n").encode())
        return written

    def facts(self) -> dict[str, Any]:
        """Return what was found over the whole set, as plain values."""
        return {
            "model": self.model,
            "tap": self.tap,
            "seed": self.seed,
            "refined": self.refined,
            "parts": self.num_parts,
            "clusters": [
                {"votes": votes, "salient": salient, "weight": round(weight, 4)}
                for votes, salient, weight in zip(
                    self.votes.tolist(), self.salient.tolist(), self.weights.tolist(), strict=True
                )
            ],
            "failed": {str(place): reason for place, reason in (self.failed or {}).items()},
            "settings": asdict(self.config),
        }

    def _save_tokens(self, path: Path) -> None:
        arrays = {f"{number}_labels": segment.labels.numpy() for number, segment in enumerate(self.segments)}
        arrays |= {f"{number}_score": segment.score.numpy() for number, segment in enumerate(self.segments)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] - its stub takes them for its own flag
        write_whole(path, buffer.getvalue())


def name_of(image: ImageLike, place: int) -> str:
    """Return the name of an image's file without its suffix; of other images one by their place."""
    return f"image_{place:04}" if isinstance(image, Image.Image | np.ndarray | Tensor) else Path(image).stem


def unique_names(names: Sequence[str]) -> list[str]:
    """Return names no two of which are the same, also where letters of both cases are: numbered where needed.

    Long ones are cut off, so that there is room for a number and a suffix in what file systems take.
    """
    taken: set[str] = set()
    found = []
    for name in names:
        name = os.fsdecode(os.fsencode(name)[:_LONGEST]) if len(os.fsencode(name)) > _LONGEST else name
        number, unique = 1, name
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        found.append(unique)
    return found


def _facts(segment: Segment) -> dict[str, Any]:
    height, width = segment.frame.source_size
    return {
        "name": segment.name,
        "width": width,
        "height": height,
        "share": round(segment.share, 5),
        "box": segment.box,
        "outlier": segment.outlier,
    }


def _outline(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Return the pixels inside the mask that are near its edge: a 150th of the shorter side."""
    width = max(1, round(min(mask.shape) / 150))
    outside = torch.from_numpy(~mask)[None].float()
    for side, reach in (((2 * width + 1, 1), (width, 0)), ((1, 2 * width + 1), (0, width))):
        outside = max_pool2d(outside, side, 1, reach)
    return mask & (outside[0] > 0).numpy()


def _thumbnail(picture: Image.Image) -> Image.Image:
    """Return a picture brought into a square, white around it."""
    return ImageOps.pad(picture, (_SIDE, _SIDE), color="white")
