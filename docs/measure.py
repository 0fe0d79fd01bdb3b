"""Measure what measures.md reports: ``python docs/measure.py``. A few minutes on a CPU; nothing is downloaded."""

import dataclasses
from collections.abc import Sequence

import timm
import torch

import vitfeats as vf
from vitfeats.apps.evaluation import Row, StereoPair, WarpedImages, raw_patches, stereo_table, warp_table
from vitfeats.apps.evaluation.tables import Describe, describe_with

PHOTOGRAPHS = ("astronaut", "grace_hopper", "cat", "coffee", "china", "flower")


def untrained(like: vf.Extractor, seed: int) -> vf.Extractor:
    """Return an extractor of the same network as ``like`` with random weights."""
    torch.manual_seed(seed)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=112, dynamic_img_size=True).eval()
    card = dataclasses.replace(like.card, name="random init")
    return vf.load_extractor(network, card=card, size=448, stride=8)


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table as Markdown: shares, and for matches also how many are right."""
    limits = list(rows[0].shares)
    print(f"\n{title}\n\n| method | counted | {' | '.join(f'within {limit:g}' for limit in limits)} | right (first) |")
    for row in rows:
        shares = " | ".join(f"{row.shares[limit]:.3f}" for limit in limits)
        print(f"| {row.name} | {row.matches} | {shares} | {round(row.matches * row.shares[limits[0]])} |")


def main() -> None:
    """Print both tables."""
    mini = vf.load_extractor("mini", size=448, stride=8, device="cpu")
    random = untrained(mini, seed=0)
    methods: dict[str, Describe] = {
        "raw RGB patches": lambda image: raw_patches(image, mini.preprocess),
        "random init, key@11": describe_with(random, "key@11"),
        "random init, token@2": describe_with(random, "token@2"),
        "mini, key@11": describe_with(mini, "key@11"),
        "mini, token@2": describe_with(mini, "token@2"),
    }
    show("Stereo pair, shares of mutual matches by pixels", stereo_table(methods, StereoPair()))
    warps = WarpedImages([vf.samples.load(name)[0] for name in PHOTOGRAPHS], seed=0)
    show("Warped photographs, PCK", warp_table(methods, warps))


if __name__ == "__main__":
    main()
