"""Train a small vision transformer on six photographs.

Two minutes on a CPU, without labels, from random weights: enough to see the losses fall, not to make a good model.
Drawn: the curves, and the principal components of a cat's patches.

    python examples/pretrain.py --out pretrain.png

`VITFEATS_EXAMPLE_STEPS` sets a number of steps in place of the two minutes.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vitfeats as vf
from vitfeats import plot
from vitfeats.apps.pretrain import Collection, pretrain
from vitfeats.apps.pretrain.run import PANELS
from vitfeats.configs import PretrainConfig

PHOTOGRAPHS = ("cat", "coffee", "astronaut", "grace_hopper", "china", "flower")
STEPS = int(os.environ.get("VITFEATS_EXAMPLE_STEPS", "0"))


def main(out: Path = Path("pretrain.png")) -> Path:
    """Write the curves, and a PCA of a cat by the trained weights."""
    torch.manual_seed(0)
    images = {name: vf.samples.load(name)[0].convert("RGB") for name in PHOTOGRAPHS}
    pictures = {name: np.asarray(_small(image)) for name, image in images.items()}
    config = PretrainConfig(
        batch=len(pictures),
        size=64,
        local_size=32,
        side=128,
        warmup=20,
        steps=max(1, STEPS),
        minutes=0.0 if STEPS else 2.0,
    )
    result = pretrain(Collection.of(pictures), config=config, progress=True)

    cat = images["cat"]
    curves = plot.curves(result.history, PANELS)
    seen = plot.pca(cat, result.extractor(size=224, stride=8)(cat, "key@11"))
    sheet = Image.new("RGB", (max(curves.width, seen.width), curves.height + seen.height), "white")
    sheet.paste(curves, (0, 0))
    sheet.paste(seen, (0, curves.height))
    sheet.save(out)
    print(f"wrote {out}")
    return out


def _small(image: Image.Image) -> Image.Image:
    scale = 128 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("pretrain.png"))
