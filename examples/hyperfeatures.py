"""What a diffusion model knows of two portraits.

The portraits are carried to noise by the bundled diffusion model, step by step; the maps of its layers at all kept
steps are aggregated into one descriptor for each, its hyperfeatures. The picture shows them as colours, and below as
matches. Seconds on a CPU, and nothing is downloaded.

    python examples/hyperfeatures.py --out hyperfeatures.png
"""

import sys
from pathlib import Path

from PIL import Image

import vitfeats as vf


def main(out: Path = Path("hyperfeatures.png")) -> Path:
    """Write the portraits, a PCA of their hyperfeatures, and below them their matches."""
    portraits = list(vf.samples.portrait_pair())
    hyper = vf.load_extractor("hyperfeatures:ddpm_mini", device="cpu")
    a, b = hyper.each(portraits)
    found = vf.match_mutual(a, b)
    print(f"{len(found)} mutual matches of {a.grid.tokens} and {b.grid.tokens} cells", file=sys.stderr)

    above = vf.plot.pca(portraits, [a, b])
    below = vf.plot.matches(portraits[0], portraits[1], found, most=20)
    below = below.resize((above.width, round(below.height * above.width / below.width)))
    sheet = Image.new("RGB", (above.width, above.height + below.height), "white")
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    sheet.save(out)
    print(f"wrote {out}")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("hyperfeatures.png"))
