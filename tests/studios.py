"""Studios of the demo, and pictures that are uploaded to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from vitfeats.apps.demo.intake import Folder
from vitfeats.apps.demo.studio import Studio
from vitfeats.configs import DemoConfig


@contextmanager
def studio_in(path: Path) -> Iterator[Studio]:
    """Make a studio of `mini` on the CPU that has read nothing, and close it at the end."""
    studio = Studio(Folder(path, most_bytes=1e9, seconds=3600), DemoConfig(models=("mini",), device="cpu"))
    try:
        yield studio
    finally:
        studio.close()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of coarse noise, of cells that are about square."""
    cols, rows = (max(3, round(24 * side / max(width, height))) for side in (width, height))
    coarse = np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def upload(studio: Studio, picture: Image.Image, name: str = "x.png", **settings: object) -> str:
    """Write a picture into the studio's folder; return its path."""
    path = studio.folder.path / name
    picture.save(path, **settings)
    return str(path)
