"""Losses of style transfer: a cat in stained glass.

Tokens of a vision transformer hold the content. Maps of a small VGG bring the style: the means and deviations of their
channels, and at `relu3_1` each token apart, recoloured by the tokens of the style most like it. A small network,
trained on this one picture, paints it: its structure makes smooth pictures, where free pixels would become noise that
pleases the losses. About a minute on a CPU.

    python examples/style_losses.py --out style_losses.png

`VITFEATS_EXAMPLE_STEPS` sets the number of steps, 80 if it is not set.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

import vitfeats as vf
from vitfeats import patterns
from vitfeats.losses import content_loss, global_style_loss, local_style_loss
from vitfeats.nets.skip import SkipNet
from vitfeats.preprocess import load_image, to_pil

STEPS = int(os.environ.get("VITFEATS_EXAMPLE_STEPS", "80"))
SIZE = (192, 288)  # (height, width) in pixels: whole patches of 16, so that nothing is resized on the way
CONTENT = "token@5"
STYLE = ("out@relu1_1", "out@relu2_1", "out@relu3_1", "out@relu4_1")
LOCAL = "out@relu3_1"
WEIGHTS = {"content": 0.5, "global": 3.0, "local": 2.0, "smooth": 0.5}


def main(out: Path = Path("style_losses.png")) -> Path:
    """Train the network on one picture; write content, style and result side by side."""
    transformer = vf.load_extractor("mini", size=SIZE, device="cpu")
    maps = vf.load_extractor("vgg_mini", size=SIZE, device="cpu")
    content = load_image(vf.samples.cat().resize((SIZE[1], SIZE[0])))[None]
    style = load_image(patterns.draw("glass", SIZE, seed=7))[None]
    kept, content_map, style_maps = transformer(content, CONTENT), maps(content, LOCAL), maps(style, STYLE)

    painter = SkipNet(residual=True, generator=torch.Generator().manual_seed(0))  # begins at the content itself
    optimiser = torch.optim.Adam(painter.parameters(), lr=0.01)
    for step in range(STEPS):
        picture = painter(content)
        made = maps(picture, STYLE)  # one forward pass for all layers
        per_layer = [global_style_loss(made[tap], style_maps[tap]) / spread(style_maps[tap]) for tap in STYLE]
        losses = {
            "content": content_loss(transformer(picture, CONTENT), kept),
            "global": torch.stack(per_layer).sum(),
            "local": local_style_loss(made[LOCAL], content_map, style_maps[LOCAL]) / spread(style_maps[LOCAL]),
            "smooth": picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean(),
        }
        optimiser.zero_grad()
        torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum().backward()
        optimiser.step()
        if step % 20 == 0 or step == STEPS - 1:
            said = ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            print(f"step {step}: {said}", file=sys.stderr)

    with torch.no_grad():
        panels = [to_pil(image[0]) for image in (content, style, painter(content))]
    vf.plot.side_by_side(panels, ["content", "style", f"after {STEPS} steps"]).save(out)
    print(f"wrote {out}: content, style, result after {STEPS} steps")
    return out


def spread(d: vf.Descriptor) -> Tensor:
    """Return the mean variance of the channels: losses divided by it count alike in every layer."""
    return d.features.var(1).mean()


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("style_losses.png"))
