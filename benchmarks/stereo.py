"""How well tokens match the stereo pair: share of mutual matches near the true place, beside what a fool would get.

448 px, stride 8. The share counts mutual matches only; "found" is how many left tokens of known place got a mutual
match within the first threshold, out of all of them, which a method cannot raise by matching less.

    python benchmarks/stereo.py
"""

import torch

import vitfeats as vf
from vitfeats.apps.evaluation import StereoPair, raw_patches, stereo_table
from vitfeats.apps.evaluation.tables import describe_with
from vitfeats.models import bundled

SIZE, STRIDE = 448, 8


def main() -> None:
    """Print the table."""
    mini = vf.load_extractor("mini", size=SIZE, stride=STRIDE)
    torch.manual_seed(0)
    untrained = bundled.build().eval().requires_grad_(False)
    random = vf.load_extractor(untrained, size=SIZE, stride=STRIDE)
    methods = {
        "raw RGB patches": lambda image: raw_patches(image, mini.preprocess),
        **{f"random init, {tap}": describe_with(random, tap) for tap in ("key@11", "token@2")},
        **{f"mini, {tap}": describe_with(mini, tap) for tap in ("key@11", "key@9", "token@11", "token@2")},
    }
    pair = StereoPair()
    rows = stereo_table(methods, pair)
    known = rows[0].matches  # identity matches every left token, so it counts those of known place
    limits = list(rows[0].shares)
    print(
        f"{'row':24} {'matches':>8}  " + "  ".join(f"≤{limit:>2} px" for limit in limits) + f"  found ≤{limits[0]} px"
    )
    for row in rows:
        shares = "  ".join(f"{share:6.3f}" for share in row.shares.values())
        print(f"{row.name:24} {row.matches:8d}  {shares}  {row.matches * row.shares[limits[0]] / known:13.3f}")


if __name__ == "__main__":
    main()
