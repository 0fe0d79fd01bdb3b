"""Co-segmentation: cut out what photographs share.

A flower is cut out of its photograph, put on four others, and found again there, then divided into three parts. The
masks are measured against where the flower was put: intersection over union, beside an ellipse in the middle of the
image. The picture shows what was found on the left, and its parts on the right. Half a minute on a CPU.

    python examples/cosegment.py --out cosegmentation.png
    python examples/cosegment.py --images my_folder --out cosegmentation.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import vitfeats as vf
from vitfeats.apps.evaluation import foreground_iou
from vitfeats.pictures import SUFFIXES

PLACES = ((0.55, 0.1, 0.1), (0.7, 0.5, 0.3), (0.45, 0.6, 0.4), (0.6, 0.25, 0.35))  # height, left, top


def pasted() -> tuple[list[Image.Image], list[np.ndarray]]:
    """Return four photographs with a flower in them, and masks of where it is."""
    (flower,) = vf.cosegment(vf.samples.flower(), model="mini")
    cut = flower.cutout().crop(flower.box)
    behind = [
        vf.samples.texture("grass"),
        vf.samples.china(),
        vf.samples.texture("brick"),
        vf.samples.texture("gravel"),
    ]
    images, masks = [], []
    for picture, (share, left, top) in zip(behind, PLACES, strict=True):
        height = round(share * picture.height)
        shown = cut.resize((round(cut.width * height / cut.height), height))
        place = (round(left * (picture.width - shown.width)), round(top * (picture.height - height)))
        image, mask = picture.copy(), Image.new("L", picture.size)
        image.paste(shown, place, shown)
        mask.paste(shown.getchannel("A"), place)
        images.append(image)
        masks.append(np.asarray(mask) > 127)
    return images, masks


def ellipse(width: int, height: int, size: float = 0.6) -> np.ndarray:
    """Return a mask of an ellipse in the middle."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.hypot(2 * x / width - 1, 2 * y / height - 1) <= size


def main(out: Path = Path("cosegmentation.png"), folder: Path | None = None) -> Path:
    """Find what images share, and its parts; write a picture, and print how right it is where that is known."""
    images, masks = (pictures_of(folder), []) if folder is not None else pasted()
    found = vf.cosegment(images, model="mini", skip_broken=True)
    parts = vf.part_cosegment(images, 3, model="mini", skip_broken=True)
    vf.plot.side_by_side([found.overview(), parts.overview()], ["found", "its parts"]).save(out)
    print(f"wrote {out}: images, what they share, and its parts\n")
    if folder is not None:
        print(f"masks and cut-outs: {found.save(out.with_suffix('')).parent}")
        return out
    print("| image | found | ellipse in the middle |\n|---|---|---|")
    for segment, true in zip(found, masks, strict=True):
        fool = foreground_iou(ellipse(true.shape[1], true.shape[0]), true)
        print(f"| {segment.name} | {foreground_iou(segment.mask, true):.2f} | {fool:.2f} |")
    return out


def pictures_of(folder: Path) -> list[Path]:
    """Return the pictures of a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


if __name__ == "__main__":
    given = dict(zip(sys.argv[1::2], map(Path, sys.argv[2::2]), strict=False))
    main(given.get("--out", Path("cosegmentation.png")), given.get("--images"))
