"""How well co-segmentation finds objects whose masks are known: photographs on white, pasted on other photographs.

Objects of three classes of Caltech-101 (stapler, watch, scissors) that were photographed on white are cut out by a
threshold, and pasted at random places and sizes (half to 85 % of the shorter side) on photographs of its background
class, eight a set. Rows: mean intersection over union of the masks with the true ones, over all images of all sets.

Beside it what needs no model: the ellipse in the middle whose size, the same for all images, is the best one of seven,
chosen with the true masks at hand; two and five clusters of colours (CIELAB) of each image, those that are less common
at its border than in it; and both of them refined by GrabCut in the same way. Then what each step brings, and, with
--seeds, how much the masks of ordinary classes agree when only the seed differs.

    python benchmarks/coseg_quality.py PICTURES
    python benchmarks/coseg_quality.py PICTURES --show sets.png
    python benchmarks/coseg_quality.py PICTURES --agree Motorbikes Faces_easy leopards --show classes.png
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import threads
from PIL import Image
from scipy import ndimage
from skimage import measure
from skimage.color import rgb2lab
from sklearn.cluster import KMeans

import vitfeats as vf
from vitfeats.apps.cosegmentation import Cosegmentation, refine_mask
from vitfeats.apps.cosegmentation.refine import method_of
from vitfeats.apps.evaluation import foreground_iou
from vitfeats.configs import CosegmentConfig
from vitfeats.pictures import read_pictures
from vitfeats.preprocess import load_image

CLASSES, BACKGROUND, HOLLOW = ("stapler", "watch", "scissors"), "BACKGROUND_Google", "scissors"
IMAGES, SIDE = 8, 160
WHITE, ALL_WHITE = 228, 0.98  # a pixel is white from here on; share of the border that must be
ELLIPSES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # axes, in sides of the image

Pasted = tuple[np.ndarray, np.ndarray]
Masks = list[np.ndarray]


class Cut(NamedTuple):
    """An object without its background: (h, w, 3) uint8 and (h, w) bool."""

    pixels: np.ndarray
    mask: np.ndarray


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="Caltech-101: a folder or a tar file of class folders")
    parser.add_argument("--draws", type=int, default=3, help="sets of each class")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw; settings were chosen on 0 to 2")
    parser.add_argument("--model", help="default mini")
    parser.add_argument("--agree", nargs="+", metavar="CLASS", help="measure the agreement over seeds on these classes")
    parser.add_argument("--show", type=Path, help="picture of the sets and their masks to write")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    with threads(options.threads):
        if options.agree:
            agreement(options.pictures, options.agree, options.model, options.show)
        else:
            quality(options.pictures, range(options.first, options.first + options.draws), options.model, options.show)


def quality(pictures: Path, draws: Sequence[int], model: str | None, show: Path | None) -> None:
    """Print the mean intersection over union of every row, and draw the first sets."""
    sets = make_sets(pictures, draws)
    extractor = vf.load_extractor(model, device="cpu")
    stride = extractor.card.patch // 2
    extractor = extractor.resized(stride=stride) if extractor.overlaps else extractor
    print(f"{len(sets)} sets of {IMAGES} images, {extractor}, refined by {method_of('auto')}\n")
    results: dict[str, dict[tuple[str, int], Masks]] = {}
    for name, method in rows(extractor).items():
        results[name] = {key: method([image for image, _ in pasted]) for key, pasted in sets.items()}
        _print_row(name, results[name], sets)
    best = max(ELLIPSES, key=lambda size: _mean_iou(_all(sets, lambda images: ellipses(images, size)), sets))
    for name, shapes in (
        (f"ellipse in the middle, axes {best}", _all(sets, lambda images: ellipses(images, best))),
        ("the same, refined", _all(sets, lambda images: refined_ellipses(images, best))),
        ("2 clusters of colour", _all(sets, lambda images: [colours(image, 2) for image in images])),
        ("5 clusters of colour", _all(sets, lambda images: [colours(image, 5) for image in images])),
        ("2 clusters of colour, refined", _all(sets, lambda i: [refined(x, colours(x, 2)) for x in i])),
        ("everything", _all(sets, lambda images: [np.ones(image.shape[:2], bool) for image in images])),
    ):
        _print_row(name, shapes, sets)
    if show is not None:
        masks = results["co-segmentation"]
        shown = {key: pasted for key, pasted in sets.items() if key[1] == draws[0]}
        sheet([(image, masks[key]) for key, pasted in shown.items() for image in [[i for i, _ in pasted]]]).save(show)


def rows(extractor: vf.Extractor) -> Mapping[str, Callable[[Sequence[np.ndarray]], Masks]]:
    """Return the rows that need a model, by name."""

    def found(**changes: Any) -> Callable[[Sequence[np.ndarray]], Masks]:
        config = CosegmentConfig(**changes)
        return lambda images: vf.cosegment(list(images), model=extractor, config=config).masks

    def alone(images: Sequence[np.ndarray]) -> Masks:
        return [vf.cosegment(image, model=extractor).masks[0] for image in images]

    return {
        "co-segmentation": found(),
        "guided filter in place of GrabCut": found(refine="guided"),
        "not refined": found(refine="none"),
        "each image alone": alone,
        "tokens in place of keys": found(tap="token@-1"),
        "saliency at the border alone": found(saliency="border"),
        "attention alone": found(saliency="attention"),
        "elbow and votes": found(clusters=0, foreground="votes", restarts=5),
        "one clustering": found(clusterings=1),
        "as published, but for stride and heads": found(
            clusters=0, foreground="votes", saliency="attention", tap="key@-1", restarts=5, threshold=0.065, every=10
        ),
    }


def agreement(pictures: Path, classes: Sequence[str], model: str | None, show: Path | None, seeds: int = 5) -> None:
    """Print how much masks agree when only the seed differs, on the first pictures of each class."""
    drawn = []
    for name in classes:
        found = _of_class(read_pictures(pictures, side=SIDE), name)
        images = [found[key] for key in sorted(found)][:IMAGES]
        if not images:
            raise SystemExit(f"expected pictures of a class '{name}' in {pictures}")
        runs = [vf.cosegment(images, model=model, seed=seed, device="cpu") for seed in range(seeds)]
        pairs = [
            foreground_iou(a, b)
            for one, other in combinations(runs, 2)
            for a, b in zip(one.masks, other.masks, strict=True)
        ]
        shares = [segment.share for segment in runs[0]]
        print(
            f"{name:16} IoU of two seeds: mean {np.nanmean(pairs):.3f}, least {np.nanmin(pairs):.3f}; "
            f"share of the image {np.mean(shares):.2f}"
        )
        drawn.append((images, runs[0]))
    if show is not None:
        sheet([(images, run) for images, run in drawn]).save(show)


def make_sets(pictures: Path, draws: Sequence[int]) -> dict[tuple[str, int], list[Pasted]]:
    """Return sets of images with their true masks, by class and draw."""
    everything = read_pictures(pictures, side=SIDE)
    backgrounds = list(_of_class(everything, BACKGROUND).values())
    sets = {}
    for number, name in enumerate(CLASSES):
        cuts = [cut for pixels in _of_class(everything, name).values() if (cut := cut_out(pixels, name != HOLLOW))]
        if len(cuts) < IMAGES or len(backgrounds) < IMAGES:
            raise SystemExit(f"expected at least {IMAGES} objects on white in '{name}', got {len(cuts)}")
        for draw in draws:
            rng = np.random.default_rng([draw, number])
            objects = rng.choice(len(cuts), IMAGES, replace=False)
            behind = rng.choice(len(backgrounds), IMAGES, replace=False)
            sets[name, draw] = [paste(cuts[o], backgrounds[b], rng) for o, b in zip(objects, behind, strict=True)]
    return sets


def cut_out(pixels: np.ndarray, fill: bool) -> Cut | None:
    """Return the object of a photograph on white, its holes filled or not; None if it is none."""
    white = np.asarray((pixels >= WHITE).all(-1))
    if np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]]).mean() < ALL_WHITE:
        return None
    mask = ndimage.binary_opening(~white, np.ones((2, 2)))
    mask = ndimage.binary_closing(np.pad(mask, 3), np.ones((3, 3)))[3:-3, 3:-3]
    if fill:
        mask = np.asarray(ndimage.binary_fill_holes(mask))
    labels = np.asarray(measure.label(mask, connectivity=2))
    sizes = np.bincount(labels.ravel())[1:]
    if not len(sizes) or sizes.max() < 0.95 * sizes.sum():  # several objects
        return None
    mask = labels == sizes.argmax() + 1
    if mask.mean() < 0.05:
        return None
    rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return Cut(pixels[box], mask[box])


def paste(cut: Cut, behind: np.ndarray, rng: np.random.Generator) -> Pasted:
    """Return a photograph with an object somewhere in it, and where."""
    height, width = behind.shape[:2]
    scale = rng.uniform(0.5, 0.85) * min(height, width) / max(cut.mask.shape)
    rows, cols = (max(8, round(side * scale)) for side in cut.mask.shape)
    bicubic = Image.Resampling.BICUBIC
    alpha = np.asarray(Image.fromarray(cut.mask.astype(np.uint8) * 255).resize((cols, rows), bicubic)) / 255
    top, left = rng.integers(height - rows + 1), rng.integers(width - cols + 1)
    here = np.s_[top : top + rows, left : left + cols]
    image, mask = behind.astype(float), np.zeros((height, width), bool)
    pixels = np.asarray(Image.fromarray(cut.pixels).resize((cols, rows), bicubic)).astype(float)
    image[here] = pixels * alpha[..., None] + image[here] * (1 - alpha[..., None])
    mask[here] = alpha > 0.5
    return image.round().clip(0, 255).astype(np.uint8), mask


def ellipses(images: Sequence[np.ndarray], size: float) -> Masks:
    """Return ellipses in the middle, whose axes are this share of the sides."""
    return [_distance(image) <= size for image in images]


def refined_ellipses(images: Sequence[np.ndarray], size: float) -> Masks:
    """Return the same, refined as masks of tokens are."""
    return [refined(image, _distance(image) <= size, -_distance(image)) for image in images]


def refined(image: np.ndarray, mask: np.ndarray, score: np.ndarray | None = None) -> np.ndarray:
    """Return a mask, refined as masks of tokens are."""
    # Without a score, the deeper inside the clearer.
    inside, outside = (np.asarray(ndimage.distance_transform_edt(side)) for side in (mask, ~mask))
    deep = inside - outside
    values = np.asarray(deep if score is None else score, np.float32)
    found = refine_mask(load_image(image), torch.from_numpy(mask), torch.from_numpy(values), method_of("auto"))
    return found > 127


def colours(image: np.ndarray, count: int) -> np.ndarray:
    """Return the clusters of colours that are less common at the border than in the image."""
    lab = rgb2lab(image).reshape(-1, 3)
    labels = KMeans(count, random_state=0, n_init=3).fit_predict(lab).reshape(image.shape[:2])  # type: ignore[arg-type]
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    share, all_share = (np.bincount(x.ravel(), minlength=count) / x.size for x in (border, labels))
    return np.isin(labels, np.flatnonzero(share < all_share))


def sheet(sets: Sequence[tuple[Sequence[np.ndarray], Cosegmentation | Masks]], side: int = 140) -> Image.Image:
    """Draw images above their masks, a set after the other."""
    canvas = Image.new("RGB", (IMAGES * side, 2 * side * len(sets)), "white")
    for row, (images, found) in enumerate(sets):
        masks = found.masks if isinstance(found, Cosegmentation) else found
        for column, (image, mask) in enumerate(zip(images, masks, strict=True)):
            shown = np.where(mask[..., None], image, image.mean(2, keepdims=True) * 0.3 + 20).astype(np.uint8)
            for number, pixels in enumerate((image, shown)):
                picture = Image.fromarray(pixels)
                picture.thumbnail((side - 4, side - 4))
                canvas.paste(picture, (column * side, (2 * row + number) * side))
    return canvas


def _of_class(pictures: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: pixels for key, pixels in pictures.items() if re.search(rf"(^|/){name}/", key)}


def _distance(image: np.ndarray) -> np.ndarray:
    """Return how far each pixel is from the middle: 1 on the ellipse that touches the sides."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width] + 0.5
    return np.hypot(2 * y / height - 1, 2 * x / width - 1)


def _all(
    sets: Mapping[tuple[str, int], list[Pasted]], method: Callable[[list[np.ndarray]], Masks]
) -> dict[tuple[str, int], Masks]:
    return {key: method([image for image, _ in pasted]) for key, pasted in sets.items()}


def _ious(masks: Mapping[tuple[str, int], Masks], sets: Mapping[tuple[str, int], list[Pasted]], name: str) -> float:
    of_class = [key for key in sets if key[0] == name]
    return float(
        np.mean(
            [
                foreground_iou(np.ascontiguousarray(mask), true)
                for key in of_class
                for mask, (_, true) in zip(masks[key], sets[key], strict=True)
            ]
        )
    )


def _mean_iou(masks: Mapping[tuple[str, int], Masks], sets: Mapping[tuple[str, int], list[Pasted]]) -> float:
    return float(np.mean([_ious(masks, sets, name) for name in CLASSES]))


def _print_row(name: str, masks: Mapping[tuple[str, int], Masks], sets: Mapping[tuple[str, int], list[Pasted]]) -> None:
    by_class = "  ".join(f"{kind} {_ious(masks, sets, kind):.3f}" for kind in CLASSES)
    print(f"{name:36} {by_class}  mean {_mean_iou(masks, sets):.3f}", flush=True)


if __name__ == "__main__":
    main()
