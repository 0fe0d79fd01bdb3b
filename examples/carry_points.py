"""Carry points to a warped photograph.

Points of a cat are carried to a copy of it that is turned far and tilted. The warp is known, so the script can print
how far off they are. Four ways are compared: the nearest token, the nearest log-binned token, and two that look between
tokens. The picture shows every second point, where the best of the four ways put it, and a ring where it should be.
Seconds on a CPU.

    python examples/carry_points.py --out carry_points.png
"""

import sys
from pathlib import Path

import vitfeats as vf
from vitfeats.apps.evaluation import WarpedImages

TAP = "token@8"


def main(out: Path = Path("carry_points.png")) -> Path:
    """Print the median distance of each way in pixels; write the points and where the best way put them."""
    pair = WarpedImages([vf.samples.cat()], seed=2)[0]
    extractor = vf.load_extractor("mini", size=224, stride=8, device="cpu")
    plain_a, plain_b = extractor(pair.image_a, TAP), extractor(pair.image_b, TAP)
    a, b = vf.log_bin(plain_a), vf.log_bin(plain_b)
    ways = {
        "nearest": vf.transfer_points(plain_a, plain_b, pair.points_a),
        "log-binned, nearest": vf.transfer_points(a, b, pair.points_a),
        "log-binned, soft": vf.transfer_points(a, b, pair.points_a, refine="soft"),
        "log-binned, window": vf.transfer_points(a, b, pair.points_a, refine="window", window=1),
    }
    medians = {name: float((carried - pair.points_b).norm(dim=1).median()) for name, carried in ways.items()}
    for name, median in medians.items():
        print(f"{name}: median {median:.1f} pixels off, {len(pair.points_a)} points", file=sys.stderr)

    best = min(medians, key=lambda name: medians[name])
    shown = slice(None, None, 2)
    carried, targets = ways[best][shown], pair.points_b[shown]
    vf.plot.points(pair.image_a, pair.points_a[shown], pair.image_b, carried, targets=targets).save(out)
    print(f"wrote {out}: {len(carried)} of {len(pair.points_a)} points, {best}")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("carry_points.png"))
