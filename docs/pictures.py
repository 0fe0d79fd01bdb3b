"""Make the pictures of the documentation with the bundled model: ``python docs/pictures.py``.

Writes docs/assets/{pca,similarity,matches,saliency}.jpg, each below 150 kB. Nothing is downloaded.
"""

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

import vitfeats as vf
from vitfeats.apps.evaluation.datasets import warp
from vitfeats.preprocess import load_image

ASSETS = Path(__file__).parent / "assets"
MOST_BYTES = 150_000
WARP = torch.tensor([[0.9, -0.12, 50.0], [0.14, 0.9, -10.0], [0.0001, 0.0, 1.0]])  # turned, smaller, a little tilted
EYE = (180.0, 110.0)  # (x, y) in pixels of the cat


def pca(extractor: vf.Extractor) -> Image.Image:
    """Draw two portraits above one PCA of their keys."""
    portraits = vf.samples.portrait_pair()
    return vf.plot.pca(portraits, list(extractor.each(portraits, "key@11")))


def similarity(extractor: vf.Extractor) -> Image.Image:
    """Draw where the cat's picture looks like its left eye, at three depths."""
    cat = vf.samples.cat()
    found = extractor(cat, ["token@2", "token@7", "key@11"])
    drawn = [vf.plot.similarity(cat, [EYE], cat, vf.similarity_map(d, [EYE], d), grid=d.grid) for d in found.values()]
    whole = Image.new("RGB", (sum(picture.width for picture in drawn), drawn[0].height), "white")
    for column, picture in enumerate(drawn):
        whole.paste(picture, (column * picture.width, 0))
    return whole


def matches(extractor: vf.Extractor) -> Image.Image:
    """Draw 40 mutual matches of a cup of coffee and its warp, drawn at random."""
    cup = load_image(vf.samples.coffee())
    warped = warp(cup, WARP)
    found = vf.match_mutual(extractor(cup, "token@2"), extractor(warped, "token@2"))
    return vf.plot.matches(cup, warped, found)


def saliency(extractor: vf.Extractor) -> Image.Image:
    """Draw what CLS attends to, at the size that ``mini`` was trained at."""
    cat = vf.samples.cat()
    return vf.plot.saliency(cat, extractor.resized(size=112, stride=4)(cat, "attention@11"))


def save(picture: Image.Image, path: Path) -> int:
    """Write a picture as the best JPEG below the limit; return its size in bytes."""
    for quality in range(90, 30, -5):
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
        if buffer.tell() < MOST_BYTES:
            path.write_bytes(buffer.getvalue())
            return buffer.tell()
    raise RuntimeError(f"'{path.name}' stays above {MOST_BYTES} bytes; make it smaller")


def main() -> None:
    """Write every picture."""
    ASSETS.mkdir(exist_ok=True)
    extractor = vf.load_extractor("mini", size=448, stride=8, device="cpu")
    for draw in (pca, similarity, matches, saliency):
        path = ASSETS / f"{draw.__name__}.jpg"
        print(f"{path}: {save(draw(extractor), path)} bytes")


if __name__ == "__main__":
    main()
