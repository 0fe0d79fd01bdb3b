"""Your own loss, made from descriptors: repaint the cat with the token statistics of a flower.

Two terms, both functions of descriptors of one forward pass: the self-similarity of keys holds the layout of the cat,
and the mean and covariance of shallow tokens (our own loss) bring the colours and the texture of the flower.

    python examples/custom_loss.py --out custom_loss.png

VITFEATS_EXAMPLE_STEPS sets the number of steps, 100 if it is not set.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import vitfeats as vf
from vitfeats.preprocess import load_image, to_pil

STEPS = int(os.environ.get("VITFEATS_EXAMPLE_STEPS", "100"))
SIZE = (192, 288)  # (height, width) in pixels: whole patches of 16, so that nothing is resized on the way
SHALLOW = ("token@0", "token@2")
LAYOUT = "key@8"


def moments_loss(out: vf.Descriptor, target: vf.Descriptor) -> Tensor:
    """Return the squared difference of the tokens' mean and covariance, relative to the target's; the grids may differ."""
    made, wanted = out.features[0], target.features[0].detach()  # (tokens, dim)
    means = (made.mean(0) - wanted.mean(0)).square().mean() / wanted.mean(0).square().mean()
    covariances = (made.T.cov() - wanted.T.cov()).square().mean() / wanted.T.cov().square().mean()
    return means + covariances


def picture(levels: list[Tensor]) -> Tensor:
    """Return the image (1, 3, height, width) in 0..1 that a pyramid of logits stands for."""
    fine = [F.interpolate(level, size=SIZE, mode="bilinear", align_corners=False) for level in levels]
    return torch.stack(fine).sum(0).sigmoid()


def main(out: Path = Path("custom_loss.png")) -> Path:
    """Optimise the picture; write content, style and result side by side."""
    extractor = vf.load_extractor("mini", size=SIZE, stride=8, device="cpu")  # overlap: no seams at patches
    content, style = (load_image(image.resize(SIZE[::-1]))[None] for image in (vf.samples.cat(), vf.samples.flower()))
    layout, colours = extractor(content, LAYOUT), extractor(style, SHALLOW)

    # Coarse levels change whole areas at once; pixels alone would soon be noise that pleases the network.
    start = content.clamp(0.02, 0.98).logit()
    levels = [start, *(torch.zeros(1, 3, SIZE[0] // step, SIZE[1] // step) for step in (2, 4, 8, 16, 32))]
    levels = [level.requires_grad_() for level in levels]
    optimiser = torch.optim.Adam(levels, lr=0.04)

    for step in range(STEPS):
        made = extractor(picture(levels), [LAYOUT, *SHALLOW])  # one forward pass, with a graph to the image
        kept = vf.structure_loss(made[LAYOUT], layout)
        moved = sum((moments_loss(made[tap], colours[tap]) for tap in SHALLOW), torch.zeros(()))
        loss = 3 * kept + moved
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: structure {kept.item():.4f}, moments {moved.item():.4f}", file=sys.stderr)

    shown = torch.cat([content, style, picture(levels).detach()], 3)[0]
    whole: Image.Image = to_pil(shown)
    whole.save(out)
    print(f"wrote {out}: content, style, result after {STEPS} steps")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else Path("custom_loss.png"))
