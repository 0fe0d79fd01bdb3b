"""Extraction against three libraries' own ways to the same layer: ViT-S/16, batch 8, 224 px, on the CPU.

The peers run on the same weights, in turns with ours, and the median of the paired ratios is printed. The ceiling is
what the multiply-adds of the network allow: the pass as the peer runs it over the part up to the tap. timm's and
transformers' ways run the whole network; torchvision's is traced once and cut behind the layer. Ours also prepares the
images in the timed call.

    python benchmarks/extraction.py
"""

import argparse
import resource
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from measuring import Row, paired, show, threads
from torchvision.models.feature_extraction import create_feature_extractor

import vitfeats as vf

DIM, DEPTH, TOKENS, PATCH = 384, 12, 197, 16


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--runs", type=int, default=41, help="paired runs")
    parser.add_argument("--batch", type=int, default=8, help="images")
    options = parser.parse_args()
    print(f"ViT-S/16, batch {options.batch}, 224 px, {options.threads} threads, {options.runs} paired runs\n")
    show(rows(runs=options.runs, batch=options.batch, number=options.threads))
    print(f"\npeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def rows(*, runs: int = 41, batch: int = 8, number: int = 2) -> list[Row]:
    """Return the comparisons, on a number of threads."""
    torch.manual_seed(0)
    images = torch.rand(batch, 3, 224, 224)
    with threads(number):
        return [*_against_timm(images, runs), *_against_transformers(images, runs), *_against_torchvision(images, runs)]


def _against_timm(images: torch.Tensor, runs: int) -> list[Row]:
    model = _timm(dynamic_img_size=True)
    ours = vf.load_extractor(model, device="auto")
    pixels = ours.preprocess(images).pixels
    found = [
        _row(
            f"key@{layer}: timm forward_intermediates / ours",
            lambda tap=f"key@{layer}": ours(images, tap),
            lambda layer=layer: _no_grad(
                lambda: model.forward_intermediates(pixels, indices=[layer], output_fmt="NLC", intermediates_only=True)
            ),
            runs,
            ceiling(layer),
        )
        for layer in (11, 5)
    ]
    three = ["key@11", "token@9", "cls@5"]
    together = paired(lambda: ours(images, three), lambda: ours(images, "key@11"), runs)
    return [
        *found,
        Row("three taps in one call / the deepest alone", f"{together.ratio:.3f}", "1 (ceiling)", *together.times),
    ]


def _against_transformers(images: torch.Tensor, runs: int) -> list[Row]:
    reference, plain = (transformers.ViTModel(_small(), add_pooling_layer=False).eval() for _ in range(2))
    plain.load_state_dict(reference.state_dict())  # output_hidden_states leaves hooks: the peer has its own instance
    ours = vf.load_extractor(plain.requires_grad_(False))
    pixels = ours.preprocess(images).pixels
    return [
        _row(
            f"key@{layer}: transformers output_hidden_states / ours",
            lambda tap=f"key@{layer}": ours(images, tap),
            lambda: _no_grad(lambda: reference(pixel_values=pixels, output_hidden_states=True)),
            runs,
            ceiling(layer),
        )
        for layer in (11, 5)
    ]


def _against_torchvision(images: torch.Tensor, runs: int) -> list[Row]:
    """The peer traces the network once and cuts it behind the layer, so nothing is to be gained beyond 1."""
    model = _timm()
    ours = vf.load_extractor(model)
    pixels = ours.preprocess(images).pixels
    found = []
    for layer in (11, 5):
        cut = create_feature_extractor(model, [f"blocks.{layer}.attn.qkv"])
        found.append(
            _row(
                f"key@{layer}: torchvision create_feature_extractor / ours",
                lambda tap=f"key@{layer}": ours(images, tap),
                lambda cut=cut: _no_grad(lambda: cut(pixels)),
                runs,
                1.0,
            )
        )
    return found


def _row(what: str, ours: Callable[[], object], peer: Callable[[], object], runs: int, most: float) -> Row:
    measured = paired(ours, peer, runs)
    return Row(what, f"{1 / measured.ratio:.3f}", f"{most:.3f} (ceiling)", *measured.times)


def ceiling(layer: int) -> float:
    """Return multiply-adds of the whole network over those up to the fused projection of a block."""
    embed = (TOKENS - 1) * DIM * 3 * PATCH * PATCH
    projections = 3 * TOKENS * DIM * DIM
    block = projections + 2 * TOKENS * TOKENS * DIM + TOKENS * DIM * DIM + 8 * TOKENS * DIM * DIM
    return (embed + DEPTH * block) / (embed + layer * block + projections)


def _no_grad(work: Callable[[], object]) -> object:
    with torch.no_grad():
        return work()


def _timm(**options: Any) -> Any:
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, **options)
    return model.eval().requires_grad_(False)


def _small() -> transformers.ViTConfig:
    return transformers.ViTConfig(hidden_size=DIM, num_attention_heads=6, intermediate_size=4 * DIM)


if __name__ == "__main__":
    main()
