"""Splice: the pose of one portrait in the colours of another.

The astronaut's pose is painted in the colours of Grace Hopper's portrait, with the bundled model. A small generator is
trained for this pair of pictures, about a minute on a CPU; then the script prints how the result measures: beside the
two pictures themselves, and beside what matching the mean and spread of the colours would give.

    python examples/splice.py --out splice.png

`VITFEATS_EXAMPLE_STEPS` sets the number of steps; the preset "fast" has 150.
"""

import os
import sys
from pathlib import Path

import torch

import vitfeats as vf
from vitfeats.apps.evaluation import transfer_markdown, transfer_table
from vitfeats.preprocess import load_image, to_pil
from vitfeats.resize import resize_images

STEPS = os.environ.get("VITFEATS_EXAMPLE_STEPS")


def side_by_side(*images: torch.Tensor, height: int = 400) -> torch.Tensor:
    """Return images of any sizes next to each other, all of one height."""
    scaled = [resize_images(i[None], (height, round(i.shape[2] * height / i.shape[1])))[0] for i in images]
    return torch.cat(scaled, 2)


def main(out: Path = Path("splice.png")) -> Path:
    """Splice; write structure, appearance and result side by side."""
    structure, appearance = vf.samples.portrait_pair()
    extractor = vf.load_extractor("mini", size=224, device="cpu")
    result = vf.splice(structure, appearance, model=extractor, steps=int(STEPS) if STEPS else None, progress=True)
    to_pil(side_by_side(load_image(structure), load_image(appearance), result.tensor)).save(out)
    print(f"wrote {out}: structure, appearance, result after {len(result.history)} steps\n")
    print(transfer_markdown(transfer_table({"result": result.image}, structure, appearance, extractor=extractor)))
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("splice.png"))
