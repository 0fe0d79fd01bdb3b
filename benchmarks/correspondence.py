"""How well tokens find the same place: a stereo pair and warped photographs, beside what a fool would get.

448 px, stride 8. Shares count mutual matches only; "found" is how many left tokens of known place got a right mutual
match, out of all of them, which a method cannot raise by matching less.

    python benchmarks/correspondence.py
"""

from collections.abc import Sequence

import torch

import vitfeats as vf
from vitfeats.apps.evaluation import Row, WarpedImages, raw_patches, stereo_table, warp_table
from vitfeats.apps.evaluation.describing import Describe, describe_with
from vitfeats.models import bundled

SIZE, STRIDE = 448, 8
PHOTOGRAPHS = ("astronaut", "grace_hopper", "cat", "coffee", "china", "flower")


def main() -> None:
    """Print both tables as Markdown."""
    mini = vf.load_extractor("mini", size=SIZE, stride=STRIDE, device="cpu")
    torch.manual_seed(0)
    # With mini's own card: the same normalisation, so that the weights are the only difference.
    random = vf.load_extractor(bundled.build().eval(), card=mini.card, size=SIZE, stride=STRIDE)
    methods: dict[str, Describe] = {
        "raw RGB patches": lambda image: raw_patches(image, mini.preprocess),
        **{f"random init, `{tap}`": describe_with(random, tap) for tap in ("key@11", "token@2")},
        **{f"`mini`, `{tap}`": describe_with(mini, tap) for tap in ("key@11", "key@9", "token@11", "token@2")},
    }
    stereo = stereo_table(methods)
    known = stereo[0].matches  # identity matches every left token, so it counts those of known place
    show("Stereo pair, mutual matches, by pixels of the source image", stereo, known)
    show("Warped photographs, PCK", warp_table(methods, WarpedImages([vf.samples.load(n)[0] for n in PHOTOGRAPHS])))


def show(title: str, rows: Sequence[Row], known: int | None = None) -> None:
    """Print a table; with ``known`` also how many of the known places were found within the first threshold."""
    limits = list(rows[0].shares)
    found = "" if known is None else f" found within {limits[0]:g} |"
    print(f"\n{title}\n\n| row | counted | {' | '.join(f'within {limit:g}' for limit in limits)} |{found}")
    print("|---" * (2 + len(limits) + bool(found)) + "|")
    for row in rows:
        shares = " | ".join(f"{row.shares[limit]:.3f}" for limit in limits)
        share_found = "" if known is None else f" {row.matches * row.shares[limits[0]] / known:.3f} |"
        print(f"| {row.name} | {row.matches} | {shares} |{share_found}")


if __name__ == "__main__":
    main()
