"""Your own term in the splice: a cat in the colours of coffee.

A term is a loss of two descriptors, a tap, and a weight. What a term cannot see, a callback can: this one stops the run
as soon as the structure has moved too far. The picture is the cat after 120 steps, about a minute on a CPU.

    python examples/splice_custom_loss.py --out splice_custom_loss.png

`VITFEATS_EXAMPLE_STEPS` sets the number of steps, 120 if it is not set.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.splice import Term, default_terms
from vitfeats.configs import SpliceConfig

STEPS = int(os.environ.get("VITFEATS_EXAMPLE_STEPS", "120"))


def lengths_loss(made: vf.Descriptor, wanted: vf.Descriptor) -> Tensor:
    """Return how far the lengths of shallow tokens, sorted, are apart: how strong the contrasts are, not where."""
    ours, theirs = (d.features.norm(dim=2).sort(dim=1).values for d in (made, wanted))
    theirs = F.interpolate(theirs[:, None], size=ours.shape[1], mode="linear")[:, 0]
    return (ours - theirs).square().mean() / theirs.square().mean()


def stray(step: int, losses: Mapping[str, float], image: Callable[[], Tensor]) -> bool:
    """Return True, which ends the run, once the keys' self-similarity is a third of the way to another picture's."""
    return losses.get("structure", 0.0) > 0.3


def main(out: Path = Path("splice_custom_loss.png")) -> Path:
    """Splice with one term more; write the result."""
    config = SpliceConfig.preset("draft", steps=STEPS)
    terms = [*default_terms(config), Term("lengths", 2.0, lengths_loss, "token@0", "structure", "appearance")]
    cat, coffee = vf.samples.cat(), vf.samples.coffee()
    result = vf.splice(cat, coffee, model="mini", config=config, terms=terms, callback=stray, device="cpu")
    result.image.save(out)
    last = {name: round(value, 4) for name, value in result.history[-1].items()}
    print(f"wrote {out}: {result.stopped} after {len(result.history)} steps, {last}")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("splice_custom_loss.png"))
