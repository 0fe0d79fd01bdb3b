"""Colours from components: two portraits at three depths.

The three taps are read in one forward pass an image. One PCA is fitted on both images for each tap, so a colour means
the same in both portraits of a column pair: from left to right `token@2`, `key@7` and `key@11`. Seconds on a CPU.

    python examples/pca.py --out pca.png
"""

import sys
from pathlib import Path

from PIL import Image

import vitfeats as vf

TAPS = ("token@2", "key@7", "key@11")


def main(out: Path = Path("pca.png")) -> Path:
    """Write a picture with a pair of portraits for each tap."""
    portraits = vf.samples.portrait_pair()
    extractor = vf.load_extractor("mini", size=336, stride=8, device="cpu")
    found = list(extractor.each(portraits, TAPS))  # the portraits differ in size: one Descriptors each

    pictures = []
    for tap in TAPS:
        both = [descriptors[tap] for descriptors in found]
        fitted = vf.PCA(3).fit(both)
        shares = ", ".join(f"{share:.2f}" for share in fitted.explained_variance_ratio_)
        print(f"{tap}: the components explain {shares} of the variance", file=sys.stderr)
        pictures.append(vf.plot.pca(portraits, both, fitted=fitted))

    whole = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height), "white")
    for column, picture in enumerate(pictures):
        whole.paste(picture, (column * picture.width, 0))
    whole.save(out)
    print(f"wrote {out}: from left to right {', '.join(TAPS)}")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("pca.png"))
