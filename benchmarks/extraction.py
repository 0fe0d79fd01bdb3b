"""Extraction against the two libraries' own ways to the same layer: ViT-S/16, batch 8, 224 px, on the CPU.

The peers run on the same weights, in turns with ours, and the median of the paired ratios is printed. The ceiling is
what the multiply-adds of the network allow: the whole pass (as the peer runs it) over the part up to the tap.

    python benchmarks/extraction.py
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers

import vitfeats as vf

DIM, DEPTH, TOKENS, PATCH = 384, 12, 197, 16


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--runs", type=int, default=41, help="paired runs")
    parser.add_argument("--batch", type=int, default=8, help="images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.rand(options.batch, 3, 224, 224)
    print(f"ViT-S/16, batch {options.batch}, 224 px, {options.threads} threads, {options.runs} paired runs\n")
    print(f"{'what':58} {'ratio':>6} {'ceiling':>8}   ours ms   peer ms")

    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    model.requires_grad_(False)
    ours = vf.load_extractor(model, device="auto")
    pixels = ours.preprocess(images).pixels
    for layer in (11, 5):
        timm_peer = _timm_peer(model, pixels, layer)
        ratio(
            f"key@{layer} against timm forward_intermediates",
            lambda t=f"key@{layer}": ours(images, t),
            timm_peer,
            options.runs,
            ceiling(layer),
        )

    reference = transformers.ViTModel(_small(), add_pooling_layer=False).eval().requires_grad_(False)
    plain = transformers.ViTModel(_small(), add_pooling_layer=False).eval().requires_grad_(False)
    plain.load_state_dict(reference.state_dict())  # output_hidden_states leaves hooks: the peer has its own instance
    hf = vf.load_extractor(plain)
    for layer in (11, 5):

        def peer(layer: int = layer) -> torch.Tensor:
            with torch.no_grad():
                return reference(pixel_values=pixels, output_hidden_states=True).hidden_states[layer + 1]

        ratio(
            f"key@{layer} against transformers output_hidden_states",
            lambda t=f"key@{layer}": hf(images, t),
            peer,
            options.runs,
            ceiling(layer),
        )

    three = ["key@11", "token@9", "cls@5"]
    ratio(
        "deepest alone (key@11) against three taps in one call",
        lambda: ours(images, three),
        lambda: ours(images, "key@11"),
        options.runs,
        1.0,
        invert=True,
    )
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def ratio(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    runs: int,
    ceiling: float,
    *,
    invert: bool = False,
) -> None:
    """Run both in turns and print the median of the paired ratios peer/ours (ours/peer with ``invert``)."""
    for _ in range(3):
        ours()
        peer()
    mine, theirs = [], []
    for run in range(runs):
        for which in (0, 1) if run % 2 else (1, 0):  # neither always goes first
            start = time.perf_counter()
            (ours, peer)[which]()
            (mine, theirs)[which].append(time.perf_counter() - start)
    pairs = [b / a for a, b in zip(mine, theirs, strict=True)]
    value = statistics.median([1 / p for p in pairs] if invert else pairs)
    milliseconds = [1e3 * statistics.median(times) for times in (mine, theirs)]
    print(f"{name:58} {value:6.3f} {ceiling:8.3f}  {milliseconds[0]:8.1f}  {milliseconds[1]:8.1f}")


def ceiling(layer: int) -> float:
    """Return multiply-adds of the whole network over those up to the fused projection of a block."""
    embed = (TOKENS - 1) * DIM * 3 * PATCH * PATCH
    projections = 3 * TOKENS * DIM * DIM
    block = projections + 2 * TOKENS * TOKENS * DIM + TOKENS * DIM * DIM + 8 * TOKENS * DIM * DIM
    return (embed + DEPTH * block) / (embed + layer * block + projections)


def _timm_peer(model: Any, pixels: torch.Tensor, layer: int) -> Callable[[], object]:
    def peer() -> object:
        with torch.no_grad():
            return model.forward_intermediates(pixels, indices=[layer], output_fmt="NLC", intermediates_only=True)

    return peer


def _small() -> transformers.ViTConfig:
    return transformers.ViTConfig(hidden_size=DIM, num_attention_heads=6, intermediate_size=4 * DIM)


if __name__ == "__main__":
    main()
