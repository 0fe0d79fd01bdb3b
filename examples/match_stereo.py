"""Match the two images of a stereo pair.

The disparity of the pair is known, so the script can print how many of the mutual matches are right within 8, 16 and 32
pixels. The picture shows 40 of them, drawn at random: a right match is a level line, because the pair is rectified.
Seconds on a CPU.

    python examples/match_stereo.py --out match_stereo.png
"""

import sys
from pathlib import Path

import vitfeats as vf
from vitfeats.apps.evaluation import StereoPair


def main(out: Path = Path("match_stereo.png")) -> Path:
    """Write a picture of 40 mutual matches, drawn at random; print how many of all are right."""
    pair = StereoPair()
    extractor = vf.load_extractor("mini", size=336, stride=8, device="cpu")
    left, right = extractor(pair.left, "token@2"), extractor(pair.right, "token@2")
    found = vf.match_mutual(left, right)

    truth, known = pair.truth(found.points_a)
    distance = (found.points_b - truth).norm(dim=1)[known]  # pixels of the right image
    for limit in (8, 16, 32):
        share = (distance <= limit).float().mean()
        print(f"within {limit} pixels: {share:.3f} of {len(distance)} matches with a known answer", file=sys.stderr)

    vf.plot.matches(pair.left, pair.right, found).save(out)
    print(f"wrote {out}: 40 of {len(found)} mutual matches of {left.grid.tokens} tokens")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("match_stereo.png"))
