"""Pairs of images with known correspondences: the record of a pair, a stereo pair and warped photographs."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitfeats import samples
from vitfeats.descriptor import Points, as_points
from vitfeats.errors import ConfigError, ImageError, ShapeError
from vitfeats.grid import Size
from vitfeats.pictures import SUFFIXES
from vitfeats.preprocess import ImageLike, load_image

IN_PLACE = 0.1  # PCK@0.1 of the answer "the same place" that a warp may reach at most


Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of an image: left, top, right, bottom."""


@dataclass(frozen=True, eq=False, init=False)
class Pair:
    """Two images and points that show the same. Images are read when they are used: paths cost nothing.

    Attributes:
        image_a: An image.
        image_b: Another one, of any size.
        points_a: (n, 2), (x, y) in pixels of image a; n is at least 1.
        points_b: (n, 2), where the same is in image b, in its pixels.
        name: What to call it in messages.
        category: What the images show, for means by category; "" where nobody said.
        box_a: The object in image a; None where nobody said.
        box_b: The object in image b.
        visible: (n,), whether the point can be seen in both images; None where nobody said, which counts as all.
    """

    image_a: ImageLike
    image_b: ImageLike
    points_a: Float[Tensor, "n 2"]
    points_b: Float[Tensor, "n 2"]
    name: str
    category: str
    box_a: Box | None
    box_b: Box | None
    visible: Bool[Tensor, " n"] | None

    def __init__(
        self,
        image_a: ImageLike,
        image_b: ImageLike,
        points_a: Points,
        points_b: Points,
        name: str = "",
        *,
        category: str = "",
        box_a: Box | None = None,
        box_b: Box | None = None,
        visible: Tensor | Sequence[bool] | None = None,
    ) -> None:
        """Keep the images as they are, and the points as float32 tensors on the CPU.

        Args:
            image_a: An image.
            image_b: Another one, of any size.
            points_a: Tensor, array or plain pairs.
            points_b: As many.
            name: What to call the pair in messages.
            category: What the images show.
            box_a: (x0, y0, x1, y1) of the object in image a.
            box_b: The same for image b. A box without a side longer than 0 is kept: no point can be judged by it.
            visible: A boolean for each point.

        Raises:
            ShapeError: If the points are not (n, 2) finite numbers each, there is none, their numbers differ, a box is
                not four finite numbers from left to right and top to bottom, or ``visible`` is not one for each point.
        """
        a, b = (as_points(points, torch.zeros(1)) for points in (points_a, points_b))
        if len(a) != len(b):
            raise ShapeError(f"expected a point b for each a, got {len(a)} and {len(b)}")
        if not len(a):
            raise ShapeError("expected a pair with at least one point, got none; leave such pairs out")
        seen = None if visible is None else torch.as_tensor(visible, dtype=torch.bool).cpu()
        if seen is not None and seen.shape != (len(a),):
            raise ShapeError(f"expected visible of shape ({len(a)},), got {tuple(seen.shape)}")
        given = {
            "image_a": image_a,
            "image_b": image_b,
            "points_a": a,
            "points_b": b,
            "name": name,
            "category": category,
            "box_a": _as_box(box_a),
            "box_b": _as_box(box_b),
            "visible": seen,
        }
        for field, value in given.items():
            object.__setattr__(self, field, value)  # it is frozen


class StereoPair:
    """The motorcycle of the Middlebury 2014 benchmark: a rectified pair with ground-truth disparity.

    Attributes:
        left: (3, 500, 741) in 0..1.
        right: (3, 500, 741) in 0..1.
        disparity: (500, 741) in pixels of the left image; infinite where unknown.
    """

    def __init__(self) -> None:
        """Read the pair from scikit-image."""
        left, right, disparity = samples.stereo_pair()
        self.left, self.right = load_image(left), load_image(right)
        self.disparity = torch.from_numpy(disparity)

    def truth(self, points: Float[Tensor, "n 2"]) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
        """Return where left points are in the right image, and which of them are known to be there; on the CPU.

        Args:
            points: (n, 2), (x, y) in pixels of the left image.
        """
        points = points.detach().cpu()
        height, width = self.disparity.shape
        col = points[:, 0].floor().long().clamp(0, width - 1)
        row = points[:, 1].floor().long().clamp(0, height - 1)
        shift = self.disparity[row, col]
        known = shift.isfinite() & (points[:, 0] - shift >= 0)
        x = points[:, 0] - shift.where(known, 0.0)
        return torch.stack([x, points[:, 1]], 1), known

    def as_pair(self, side: int = 20) -> Pair:
        """Return it as a pair: the points of a lattice of ``side`` × ``side`` on the left whose right place is known.

        Raises:
            ConfigError: If the side is below 1.
        """
        if side < 1:
            raise ConfigError(f"expected a side of at least 1, got {side}")
        points = _lattice((int(self.left.shape[1]), int(self.left.shape[2])), side)
        truth, known = self.truth(points)
        return Pair(self.left, self.right, points[known], truth[known], "stereo pair")


class WarpedImages(Sequence[Pair]):
    """Photographs and their random homographies, with colours changed.

    Rotation up to ±45°, scale 0.6 to 1.5, shift up to 25 % of each side, a gain of 0.7 to 1.3 for each colour.
    The same seed gives the same warps, whichever of them are asked for and in whatever order. A warp that leaves more
    than a tenth of its points within 0.1·max(height, width) of where they were is drawn again (a hundred times at most,
    then the best is taken), so that answering "the same place" scores at most 0.10 at PCK@0.1 on photographs.

    Attributes:
        images: The photographs, or their files.
        seed: Seed of the warps.
        name: What to call them in tables.
    """

    name = "warped images"

    def __init__(
        self, images: str | os.PathLike[str] | Sequence[ImageLike], *, seed: int = 0, points: int = 10
    ) -> None:
        """Collect the images; they are read one at a time, when asked for.

        Args:
            images: A folder, searched with its sub-folders, in the order of their names; or a list of images.
            seed: Seed of the warps.
            points: Points on a side of the square lattice laid over image a; those that leave image b are dropped.

        Raises:
            ImageError: If there is no image.
        """
        if isinstance(images, str | os.PathLike):
            folder = Path(images)
            found: Sequence[ImageLike] = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            found = list(images)
        if not found:
            raise ImageError(
                f"expected a folder of images ({', '.join(SUFFIXES)}) or a list of them, got none in {images!r}"
            )
        if points < 2:
            raise ConfigError(f"expected points of at least 2, got {points}")
        self.images, self.seed, self._side = found, seed, points
        told = [getattr(image, "shape", None) or getattr(image, "size", None) or str(image) for image in found]
        self.fingerprint = hashlib.sha1(repr((seed, points, told)).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override] - no slices: they would read every image
        """Return pair ``index``, its images as tensors (3, height, width) in 0..1."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        index %= len(self)
        source = self.images[index]
        image = load_image(source)
        size = (int(image.shape[1]), int(image.shape[2]))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        matrix, points_a, points_b = self._draw(size, generator)
        gain = 0.7 + 0.6 * torch.rand(3, 1, 1, generator=generator)
        warped = (warp(image, matrix) * gain).clamp(0, 1)
        name = os.path.basename(source) if isinstance(source, str | os.PathLike) else str(index)
        return Pair(image, warped, points_a, points_b, name)

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over the pairs."""
        return (self[index] for index in range(len(self)))

    def _draw(self, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        points = _lattice(size, self._side)
        reach = IN_PLACE * max(size)
        best: tuple[float, Tensor, Tensor, Tensor] | None = None
        for _ in range(100):
            matrix = random_homography(size, generator)
            moved = apply_homography(matrix, points)
            inside = ((moved >= 0) & (moved <= moved.new_tensor([size[1], size[0]]))).all(1)
            if int(inside.sum()) < self._side:  # too few to measure
                continue
            kept, gone = points[inside], moved[inside]
            share = float(((kept - gone).norm(dim=1) <= reach).float().mean())
            if best is None or share < best[0]:
                best = (share, matrix, kept, gone)
            if share <= IN_PLACE:
                break
        if best is None:
            raise ImageError(
                f"expected an image of which {self._side} points of {self._side**2} stay inside under a warp, got "
                f"a size of {size}; try more points"
            )
        return best[1:]


def random_homography(size: Size, generator: torch.Generator) -> Float[Tensor, "3 3"]:
    """Draw a homography of an image of ``size`` = (height, width): source pixels to warped pixels, about the centre."""
    height, width = size
    angle, scale, shift_x, shift_y, tilt_x, tilt_y = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    turn = math.radians(90 * angle - 45)
    factor = 0.6 * (1.5 / 0.6) ** scale  # uniform in the logarithm: shrinking is as likely as growing
    cos, sin = factor * math.cos(turn), factor * math.sin(turn)
    offset = (0.5 * shift_x - 0.25) * width, (0.5 * shift_y - 0.25) * height
    tilt = [0.2 * (t - 0.5) / max(size) for t in (tilt_x, tilt_y)]
    to_centre = torch.tensor([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]], dtype=torch.float64)
    turned = torch.tensor([[cos, -sin, offset[0]], [sin, cos, offset[1]], [*tilt, 1]], dtype=torch.float64)
    return (torch.linalg.inv(to_centre) @ turned @ to_centre).float()


def apply_homography(matrix: Float[Tensor, "3 3"], points: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Map (x, y) points by a homography."""
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], 1) @ matrix.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def warp(image: Float[Tensor, "3 height width"], matrix: Float[Tensor, "3 3"]) -> Float[Tensor, "3 height width"]:
    """Warp an image by a homography of its pixels; what comes from outside has the image's mean colour."""
    height, width = image.shape[1:]
    points = _pixel_centres((height, width))
    source = apply_homography(torch.linalg.inv(matrix.double()).float(), points)
    grid = (source / source.new_tensor([width, height]) * 2 - 1).view(1, height, width, 2)
    mean = image.mean((1, 2), keepdim=True)
    return (
        F.grid_sample((image - mean)[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0] + mean
    )


def _as_box(box: Sequence[float] | None) -> Box | None:
    """Return a box as plain numbers, if it is one."""
    if box is None:
        return None
    try:
        left, top, right, bottom = (float(side) for side in box)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"expected a box (x0, y0, x1, y1) of numbers, got {box!r}") from error
    if not all(map(math.isfinite, (left, top, right, bottom))) or right < left or bottom < top:
        raise ShapeError(f"expected a box (x0, y0, x1, y1) from left to right and top to bottom, got {box!r}")
    return left, top, right, bottom


def _pixel_centres(size: Size) -> Float[Tensor, "n 2"]:
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _lattice(size: Size, side: int) -> Float[Tensor, "n 2"]:
    steps = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(steps * size[0], steps * size[1], indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)
