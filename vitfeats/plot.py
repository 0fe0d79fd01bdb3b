"""Pictures of descriptors. Every function returns a PIL image: show it, or ``.save("file.png")``.

Nothing here touches pyplot or a backend, so it works the same in a script, a notebook and a server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vitfeats.attention_maps import saliency as saliency_of
from vitfeats.descriptor import Descriptor, Points, as_points
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.grid import Frame, PatchGrid
from vitfeats.matching import Matches
from vitfeats.pca import PCA
from vitfeats.preprocess import ImageLike, load_image, to_pil
from vitfeats.resize import spread_map

_INCHES = 3.2  # side of a panel
_DPI = 130


def pca(
    images: ImageLike | Sequence[ImageLike],
    descriptors: Descriptor | Sequence[Descriptor],
    *,
    fitted: PCA | None = None,
) -> Image.Image:
    """Draw images above the first three principal components of their tokens, as colours.

    Args:
        images: One image, or one for each descriptor.
        descriptors: One descriptor of one image, or several; one PCA is fitted on all of them, so that a colour means
            the same in all pictures.
        fitted: Use this PCA instead.

    Raises:
        ShapeError: If there are not as many images as descriptors.
    """
    pictures = _pictures(images)
    group = [descriptors] if isinstance(descriptors, Descriptor) else descriptors
    colours = PCA(3).fit(group) if fitted is None else fitted
    # Coloured before the batches are taken apart: a foreground from saliency belongs to the descriptors as fitted.
    painted_cells = [(rgb, d, frame) for d in group for rgb, frame in zip(colours.to_rgb(d), d.frames, strict=True)]
    _check_as_many(pictures, painted_cells)
    figure, axes = _panels(2, len(pictures), [picture.size for picture in pictures])
    for column, (picture, (rgb, d, frame)) in enumerate(zip(pictures, painted_cells, strict=True)):
        painted = to_pil(spread_map(rgb[None].float(), d.grid, frame.source_size, "nearest")[0])
        axes[0][column].imshow(picture)
        axes[1][column].imshow(painted)
    return _rendered(figure)


def similarity(
    image_a: ImageLike,
    points: Points,
    image_b: ImageLike,
    maps: Float[Tensor, "n rows cols"],
    *,
    grid: PatchGrid | None = None,
) -> Image.Image:
    """Draw each asked point on image a, above where it looks alike in image b.

    Args:
        image_a: The image asked about.
        points: (n, 2), (x, y) in its pixels.
        image_b: The image searched.
        maps: (n, rows, cols), from :func:`~vitfeats.similarity_map`. Each is drawn over its own range; its brightest
            cell is marked.
        grid: The token grid of image b, ``d2.grid``; None takes the maps' cells to tile the image, as they do where
            tokens do not overlap.

    Raises:
        ShapeError: If there are not as many maps as points.
    """
    asked = as_points(points, torch.zeros(1))
    a, b = _picture(image_a), _picture(image_b)
    if not len(asked):
        raise ShapeError("expected at least one point, got none")
    if len(asked) != len(maps):
        raise ShapeError(f"expected one map a point, got {len(maps)} maps for {len(asked)} points")
    figure, axes = _panels(2, len(asked), [a.size] * len(asked), [b.size] * len(asked))
    for column, (point, values) in enumerate(zip(asked.tolist(), maps, strict=True)):
        axes[0][column].imshow(a)
        axes[0][column].plot(*_pixel(point), "o", ms=9, mfc="none", mec="white", mew=3)
        axes[0][column].plot(*_pixel(point), "o", ms=9, mfc="none", mec="#d62728", mew=1.5)
        tokens = PatchGrid(values.shape[0], values.shape[1], 1, 1) if grid is None else grid
        _overlay(axes[1][column], b, values, tokens)
        frame = Frame((b.height, b.width), tokens.network_size)
        (best,) = frame.to_source(tokens.centres_of(values.argmax().cpu()[None])).tolist()
        axes[1][column].plot(*_pixel(best), "+", ms=12, mec="white", mew=2)
    return _rendered(figure)


def matches(image_a: ImageLike, image_b: ImageLike, m: Matches, *, most: int = 40, seed: int = 0) -> Image.Image:
    """Draw matches between two images side by side, each in its own colour.

    Args:
        image_a: The first image.
        image_b: The second.
        m: Their matches; rows without a match are left out.
        most: At most this many are drawn, drawn at random, so that the picture shows good and bad ones alike.
        seed: Of that draw.

    Raises:
        ConfigError: If ``most`` is negative.
    """
    if most < 0:
        raise ConfigError(f"expected most of at least 0, got {most}")
    a, b = _picture(image_a), _picture(image_b)
    height = max(a.height, b.height)
    gap = max(4, (a.width + b.width) // 100)
    canvas = Image.new("RGB", (a.width + gap + b.width, height), "white")
    canvas.paste(a, (0, 0))
    canvas.paste(b, (a.width + gap, 0))
    matched = (m.index_b >= 0).nonzero()[:, 0].cpu()
    order = torch.randperm(len(matched), generator=torch.Generator().manual_seed(seed))[:most]
    shown = m[matched[order].to(m.index_b.device)]
    figure, axes = _panels(1, 1, [canvas.size], scale=3.0)
    axes[0][0].imshow(canvas)
    # Colour by height in image a: neighbours get like colours, so a match that breaks ranks is seen.
    hues = shown.points_a[:, 1] / a.height
    for start, end, hue in zip(shown.points_a.tolist(), shown.points_b.tolist(), hues.tolist(), strict=True):
        (x0, y0), (x1, y1) = _pixel(start), _pixel(end)
        axes[0][0].plot(
            [x0, x1 + a.width + gap], [y0, y1], "-o", color=_colour(hue), lw=1.1, ms=3.5, mec="white", mew=0.5
        )
    return _rendered(figure)


def points(
    image_a: ImageLike,
    points_a: Points,
    image_b: ImageLike,
    carried: Points,
    *,
    targets: Points | None = None,
    right: Sequence[bool] | None = None,
) -> Image.Image:
    """Draw points on image a, and beside it where they were carried to on image b, each in its own colour.

    Args:
        image_a: The first image.
        points_a: (n, 2), (x, y) in its pixels.
        image_b: The second.
        carried: (n, 2), (x, y) in its pixels.
        targets: (n, 2), where they should be: a ring, tied to the point.
        right: For each whether it is right: dots for those that are, crosses for the others; None is dots.

    Raises:
        ShapeError: If there are not as many of each.
    """
    asked, found = (as_points(given, torch.zeros(1)) for given in (points_a, carried))
    wanted = found if targets is None else as_points(targets, torch.zeros(1))
    marks = [True] * len(asked) if right is None else list(right)
    if not len(asked) == len(found) == len(wanted) == len(marks):
        raise ShapeError(
            f"expected as many points of each, got {len(asked)} on image a, {len(found)} carried, {len(wanted)} "
            f"targets and {len(marks)} marks"
        )
    a, b = _picture(image_a), _picture(image_b)
    figure, axes = _panels(1, 2, [a.size, b.size], scale=2.0)
    for axis, picture in zip(axes[0], (a, b), strict=True):
        axis.imshow(picture)
        axis.set_xlim(-0.5, picture.width - 0.5)  # a point beyond the edge must not shrink the picture
        axis.set_ylim(picture.height - 0.5, -0.5)
    lines = zip(asked.tolist(), found.tolist(), wanted.tolist(), marks, strict=True)
    for number, (start, end, target, good) in enumerate(lines):
        colour = _colour(number / max(1, len(asked) - 1))
        axes[0][0].plot(*_pixel(start), "o", ms=6, color=colour, mec="white", mew=1)
        if targets is not None:
            (x0, y0), (x1, y1) = _pixel(end), _pixel(target)
            axes[0][1].plot([x0, x1], [y0, y1], "-", color=colour, lw=1)
            axes[0][1].plot(x1, y1, "o", ms=9, mfc="none", mec="white", mew=2.4)
            axes[0][1].plot(x1, y1, "o", ms=9, mfc="none", mec=colour, mew=1.4)
        axes[0][1].plot(*_pixel(end), "o" if good else "X", ms=6 if good else 7, color=colour, mec="white", mew=1)
    return _rendered(figure)


def accuracy(shares: Mapping[str, Mapping[float, float]]) -> Image.Image:
    """Draw the share of points that are right over the threshold, one line a method.

    Args:
        shares: For each method, PCK in 0..1 by its threshold.

    Raises:
        ShapeError: If there is no method.
    """
    if not shares:
        raise ShapeError("expected at least one method, got none")
    figure = Figure(figsize=(7, 4.5), dpi=_DPI)
    axis = figure.subplots()
    for number, (name, values) in enumerate(shares.items()):
        drawn = sorted(values.items())
        axis.plot(*zip(*drawn, strict=True), "-", lw=1.6, color=_colour(number / max(1, len(shares) - 1)), label=name)
    axis.set_xlabel("threshold, in shares of the reference side")
    axis.set_ylabel("PCK")
    axis.set_ylim(0, 1)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _rendered(figure)


def saliency(images: ImageLike | Sequence[ImageLike], d: Descriptor, heads: Sequence[int] | None = None) -> Image.Image:
    """Draw images above where CLS looks.

    Args:
        images: One image, or one for each of the batch.
        d: Descriptor of the facet ``attention``.
        heads: As for :func:`~vitfeats.saliency`.

    Raises:
        ShapeError: If there are not as many images as descriptors.
    """
    pictures = _pictures(images)
    _check_as_many(pictures, list(d))
    figure, axes = _panels(2, len(pictures), [picture.size for picture in pictures])
    for column, (picture, values) in enumerate(zip(pictures, saliency_of(d, heads), strict=True)):
        axes[0][column].imshow(picture)
        _overlay(axes[1][column], picture, values, d.grid)
    return _rendered(figure)


def side_by_side(
    images: Sequence[ImageLike],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    marked: Sequence[Sequence[float] | None] | None = None,
) -> Image.Image:
    """Draw images beside each other, in one height, each under its title.

    Args:
        images: Of any sizes; their proportions are kept.
        titles: One for each image, or None.
        columns: Begin a new row after so many; None puts all in one.
        marked: For each image a point (x, y) in its pixels that gets a dot, or None; None is without dots.

    Raises:
        ShapeError: If there is no image, or there are not as many titles or points as images.
        ConfigError: If ``columns`` is below 1.
    """
    pictures = [_picture(image) for image in images]
    if not pictures:
        raise ShapeError("expected at least one image, got none")
    if titles is not None and len(titles) != len(pictures):
        raise ShapeError(f"expected one title an image, got {len(titles)} titles for {len(pictures)} images")
    if marked is not None and len(marked) != len(pictures):
        raise ShapeError(f"expected a point or None for each image, got {len(marked)} for {len(pictures)} images")
    if columns is not None and columns < 1:
        raise ConfigError(f"expected columns of at least 1, or None for one row, got {columns}")
    in_row = len(pictures) if columns is None else columns
    rows = [range(start, min(start + in_row, len(pictures))) for start in range(0, len(pictures), in_row)]
    widths = [picture.width / picture.height for picture in pictures]  # in heights of a row
    margin, above = 0.03, 0.1 if titles is not None else 0.0
    across = max(sum(widths[i] for i in row) + margin * (len(row) + 1) for row in rows)
    down = len(rows) * (1 + above + margin) + margin
    # As high as a panel, unless the picture would be longer than 30 inches.
    scale = min(_INCHES, 30 / max(across, down))
    figure = Figure(figsize=(scale * across, scale * down), dpi=_DPI)
    for number, row in enumerate(rows):
        left, top = margin, down - margin - number * (1 + above + margin)
        for i in row:
            where = (left / across, (top - above - 1) / down, widths[i] / across, 1 / down)
            axis = figure.add_axes(where)
            axis.imshow(pictures[i], aspect="auto")
            axis.set_axis_off()
            point = None if marked is None else marked[i]
            if point is not None:
                axis.set_autoscale_on(False)  # a point at the edge must not shrink the picture
                axis.plot(*_pixel(point), "o", ms=7, color="red", mec="white", mew=1.4)
            if titles is not None:
                axis.set_title(titles[i], fontsize=12 * scale / _INCHES, pad=4 * scale / _INCHES)
            left += widths[i] + margin
    return _rendered(figure)


def losses(history: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw the losses of a run over its steps, on a logarithmic scale.

    Args:
        history: Records with ``step`` and numbers by name; a name that a record lacks has a gap there.

    Raises:
        ShapeError: If there is no record.
    """
    if not history:
        raise ShapeError("expected a history of at least one step, got none")
    figure = Figure(figsize=(7, 4), dpi=_DPI)
    axis = figure.subplots()
    for name in dict.fromkeys(key for record in history for key in record if key != "step"):
        points = [(record["step"], record[name]) for record in history if name in record and record[name] > 0]
        sparse = len(points) <= max(1, len(history) // 4)
        axis.plot(*zip(*points, strict=True), "o-" if sparse else "-", ms=3, lw=1, label=name) if points else None
    axis.set_yscale("log")
    axis.set_xlabel("step")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _rendered(figure)


def curves(history: Sequence[Mapping[str, Any]], panels: Sequence[Sequence[str]]) -> Image.Image:
    """Draw numbers over the steps of a run, in panels one above the other; what was never measured is left out.

    Args:
        history: One record a step: ``step`` and numbers by name.
        panels: The names of each panel.

    Raises:
        ShapeError: If there is no record.
    """
    if not history:
        raise ShapeError("expected a history of at least one step, got none")
    measured = {name for record in history for name in record}
    kept = [[name for name in names if name in measured] for names in panels]
    kept = [names for names in kept if names]
    figure = Figure(figsize=(7, 1 + 2.2 * len(kept)), dpi=_DPI)
    for axis, names in zip(figure.subplots(max(1, len(kept)), sharex=True, squeeze=False)[:, 0], kept, strict=False):
        for name in names:
            points = [(record["step"], record[name]) for record in history if name in record]
            sparse = len(points) <= max(1, len(history) // 4)
            axis.plot(*zip(*points, strict=True), "o-" if sparse else "-", ms=3, lw=1, label=name)
        axis.legend(frameon=False, fontsize=8)
        axis.set_xlabel("step" if names is kept[-1] else "")
    figure.tight_layout()
    return _rendered(figure)


def mixing(
    weights: Float[Tensor, "steps layers"], layers: Sequence[str], steps: Sequence[int], *, label: str = "weight"
) -> Image.Image:
    """Draw the mixing weights of hyperfeatures as a heat map: a row a layer, a column a step.

    Args:
        weights: (steps, layers), for example :attr:`~vitfeats.nets.aggregation.AggregationNetwork.mixing`.
        layers: A name for each layer.
        steps: A tag for each step; they stand in the order given.
        label: What the numbers are.

    Raises:
        ShapeError: If there is not a weight for each step and layer.
    """
    if tuple(weights.shape) != (len(steps), len(layers)) or not weights.numel():
        raise ShapeError(
            f"expected weights of at least one step and layer, ({len(steps)}, {len(layers)}) as they are named, got "
            f"shape {tuple(weights.shape)}"
        )
    figure = Figure(figsize=(3.0 + 0.4 * len(steps), 1.2 + 0.3 * len(layers)), dpi=_DPI)
    axis = figure.subplots()
    drawn = axis.imshow(weights.detach().float().cpu().T.numpy(), cmap="viridis", vmin=0.0, aspect="auto")
    axis.set_xticks(range(len(steps)), [str(step) for step in steps])
    axis.set_yticks(range(len(layers)), list(layers))
    axis.set_xlabel("step")
    axis.set_ylabel("layer")
    figure.colorbar(drawn, ax=axis, label=label)
    figure.tight_layout()
    return _rendered(figure)


def _picture(image: ImageLike) -> Image.Image:
    return to_pil(load_image(image))


def _pictures(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    listed: Any = images if isinstance(images, list | tuple) else [images]
    return [_picture(image) for image in listed]


def _check_as_many(pictures: Sequence[Any], descriptors: Sequence[Any]) -> None:
    if len(pictures) != len(descriptors):
        raise ShapeError(
            f"expected one image a descriptor, got {len(pictures)} images and {len(descriptors)} descriptors"
        )


def _panels(
    rows: int, cols: int, sizes: list[tuple[int, int]], lower: list[tuple[int, int]] | None = None, scale: float = 1.0
) -> tuple[Figure, Any]:
    """Return a figure of bare panels whose columns have the images' own proportions."""
    widths = [width / height for width, height in sizes]
    heights = [1.0, *[max(h / w * widths[0] for w, h in (lower or sizes)[:1])] * (rows - 1)] if rows > 1 else [1.0]
    figure = Figure(figsize=(_INCHES * scale * sum(widths) / max(widths[0], 1.0), 1.0), dpi=_DPI)
    unit = figure.get_figwidth() / sum(widths)
    figure.set_figheight(unit * sum(heights))
    axes = figure.subplots(
        rows,
        cols,
        squeeze=False,
        gridspec_kw={"width_ratios": widths, "height_ratios": heights, "wspace": 0.03, "hspace": 0.03},
    )
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _overlay(axis: Any, picture: Image.Image, values: Float[Tensor, "rows cols"], grid: PatchGrid) -> None:
    size = (picture.height, picture.width)
    fine = spread_map(values.detach().float().cpu()[None, None], grid, size, "nearest")[0, 0]
    axis.imshow(picture.convert("L"), cmap="gray", vmin=-80, vmax=255)
    axis.imshow(fine.numpy(), cmap="magma", alpha=0.7)


def _pixel(point: Sequence[float]) -> tuple[float, float]:
    # matplotlib puts 0 at the centre of the first pixel; our origin is its corner.
    return point[0] - 0.5, point[1] - 0.5


def _colour(hue: float) -> Any:
    from matplotlib import colormaps

    return colormaps["turbo"](0.05 + 0.9 * hue)


def _rendered(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
