"""Your own loss: a cat in the colours of a flower.

Two terms, both functions of descriptors of one forward pass: the self-similarity of keys holds the layout of the cat,
and the mean and covariance of shallow tokens (our own loss) bring the colours of the flower. The picture shows the cat,
the flower, and the result. A minute or two on a CPU.

    python examples/custom_loss.py --out custom_loss.png

`VITFEATS_EXAMPLE_STEPS` sets the number of steps, 100 if it is not set.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vitfeats as vf
from vitfeats.preprocess import load_image, to_pil

STEPS = int(os.environ.get("VITFEATS_EXAMPLE_STEPS", "100"))
SIZE = (192, 288)  # (height, width) in pixels: whole patches of 16, so that nothing is resized on the way
SHALLOW = ("token@0", "token@2")
LAYOUT = "key@8"


def moments_loss(out: vf.Descriptor, target: vf.Descriptor) -> Tensor:
    """Return the squared difference of the tokens' mean and covariance, relative to the target's."""
    made, wanted = out.features[0], target.features[0]  # (tokens, dim); the numbers of tokens may differ
    means = (made.mean(0) - wanted.mean(0)).square().sum() / wanted.mean(0).square().sum()
    covariances = (made.T.cov() - wanted.T.cov()).square().sum() / wanted.T.cov().square().sum()
    return means + covariances


def painted(content: Tensor, layers: list[Tensor]) -> Tensor:
    """Return the content with smooth layers of colour added in logits: (1, 3, height, width) in 0..1."""
    added = [F.interpolate(layer, size=SIZE, mode="bilinear", align_corners=False) for layer in layers]
    return (content.clamp(0.02, 0.98).logit() + torch.stack(added).sum(0)).sigmoid()


def main(out: Path = Path("custom_loss.png")) -> Path:
    """Optimise the colours; write content, style and result side by side."""
    extractor = vf.load_extractor("mini", size=SIZE, stride=8, device="cpu")  # overlap: fewer seams at the patches
    content, style = (
        load_image(image.resize((SIZE[1], SIZE[0])))[None] for image in (vf.samples.cat(), vf.samples.flower())
    )
    layout, colours = extractor(content, LAYOUT), extractor(style, SHALLOW)

    # Only smooth layers are learned, at a quarter to a 32nd of the size. Free pixels would become noise that pleases
    # the network.
    layers = [torch.zeros(1, 3, SIZE[0] // n, SIZE[1] // n, requires_grad=True) for n in (4, 8, 16, 32)]
    optimiser = torch.optim.Adam(layers, lr=0.04)
    for step in range(STEPS):
        made = extractor(painted(content, layers), [LAYOUT, *SHALLOW])  # one forward pass, with a graph to the image
        kept = vf.structure_loss(made[LAYOUT], layout)
        moved = torch.stack([moments_loss(made[tap], colours[tap]) for tap in SHALLOW]).sum()
        optimiser.zero_grad()
        (3 * kept + moved).backward()
        optimiser.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: structure {kept.item():.4f}, moments {moved.item():.4f}", file=sys.stderr)

    to_pil(torch.cat([content, style, painted(content, layers)], 3)[0]).save(out)
    print(f"wrote {out}: content, style, result after {STEPS} steps")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("custom_loss.png"))
