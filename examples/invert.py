"""Which picture has these features?

The keys of a cat give back the cat, and CLS only what it is made of. A small network is trained to paint a picture
whose features equal the cat's: first the keys of the last layer, then CLS at four depths. The picture shows the cat,
then what each of the five gives back. Some minutes on a CPU.

    python examples/invert.py --out invert.png

`VITFEATS_EXAMPLE_STEPS` sets the number of steps, 200 if it is not set.
"""

import os
import sys
from pathlib import Path

import vitfeats as vf
from vitfeats.apps.inversion import invert, invert_layers, strip

STEPS = int(os.environ.get("VITFEATS_EXAMPLE_STEPS", "200"))
LAYERS = (2, 5, 8, 11)


def main(out: Path = Path("invert.png")) -> Path:
    """Write the cat, the picture that its keys give, and those that CLS gives at four depths."""
    cat = vf.samples.cat()
    extractor = vf.load_extractor("mini", size=112, stride=8, device="cpu")  # overlap: more is known of the picture
    keys = invert(cat, "key@11", model=extractor, steps=STEPS)
    print(keys, file=sys.stderr)

    found = invert_layers(cat, LAYERS, "cls", model=extractor, steps=STEPS)
    for inversion in found:
        print(inversion, file=sys.stderr)

    strip([keys, *found]).save(out)
    print(f"wrote {out}: the cat, its keys, and CLS of blocks {', '.join(map(str, LAYERS))}")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("invert.png"))
