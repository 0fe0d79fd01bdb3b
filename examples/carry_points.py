"""Carry points of a photograph to a warped copy of it, log-binned and refined, and measure how far off they are.

The warp is known, so the truth is. Four ways are compared; the picture shows the best of them.

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
    carried = ways[best]
    index_a = a.grid.index_of(a.frames[0].to_network(pair.points_a))
    index_b = b.grid.index_of(b.frames[0].to_network(carried))
    shown = vf.Matches(pair.points_a, carried, carried.new_ones(len(carried)), index_a, index_b)
    vf.plot.matches(pair.image_a, pair.image_b, shown, most=30).save(out)
    print(f"wrote {out}: 30 of {len(shown)} points, {best}")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("carry_points.png"))
