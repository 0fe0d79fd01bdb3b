"""Print the tables of layers.md and matching.md: how well ``mini`` carries points to warped photographs.

    python docs/tables.py [facets] [matchers] [refine]

``facets``: PCK@0.1 of four photographs, five warps each, the mean over the pairs, at 448 pixels and stride 8.
``matchers``: how many matches of the cat and its warp are right, at 224 pixels and stride 8.
``refine``: the median distance from the truth in pixels, of the pairs of ``facets``. Some minutes on a CPU.
"""

import sys
from typing import Any

import torch
from pictures import WARP, WITHIN

import vitfeats as vf
from vitfeats.apps.evaluation import Pair, WarpedImages, pck, raw_patches
from vitfeats.apps.evaluation.datasets import apply_homography, warp
from vitfeats.models import bundled
from vitfeats.preprocess import load_image

PHOTOGRAPHS = ("astronaut", "grace_hopper", "cat", "coffee")  # all public domain or CC0
WARPS = 5
LAYERS = (2, 5, 8, 11)
FACETS = ("key", "query", "value", "token", "out")
BINNED = ("key", "token")


def photographs() -> WarpedImages:
    """Return the pairs that both tables are measured on."""
    return WarpedImages([vf.samples.load(name)[0] for name in PHOTOGRAPHS for _ in range(WARPS)], seed=0)


def matchers() -> None:
    """Print how many matches each matcher finds between the cat and its warp, and how many are right."""
    extractor = vf.load_extractor("mini", size=224, stride=8, device="cpu")
    cat = load_image(vf.samples.cat())
    a, b = extractor(cat, "token@2"), extractor(warp(cat, WARP), "token@2")
    found = {
        "match_nearest": vf.match_nearest(a, b),
        "match_mutual": vf.match_mutual(a, b),
        "match_ratio, 0.8": vf.match_ratio(a, b),
        "match_sinkhorn, no dustbin": vf.match_sinkhorn(a, b, epsilon=0.02),
        "match_sinkhorn, dustbin 0.8": vf.match_sinkhorn(a, b, epsilon=0.02, dustbin=0.8),
    }
    print("| matcher | matches | right | share |\n|---|---|---|---|")
    for name, m in found.items():
        right = int(((m.points_b - apply_homography(WARP, m.points_a)).norm(dim=1) <= WITHIN).sum())
        print(f"| {name} | {len(m)} | {right} | {right / len(m):.2f} |")


def refine() -> None:
    """Print how far carried points are from the truth, for ways of ``transfer_points`` and two strides."""
    ways: tuple[dict[str, Any], ...] = (
        {"refine": "nearest"},
        {"refine": "soft"},
        {"refine": "soft", "temperature": 0.002},
        {"refine": "window"},
        {"refine": "window", "window": 1},
        {"refine": "window", "window": 1, "temperature": 0.002},
    )
    errors: dict[tuple[str, int], list[torch.Tensor]] = {}
    for stride in (16, 8):
        extractor = vf.load_extractor("mini", size=448, stride=stride, device="cpu")
        for pair in photographs():
            a, b = (vf.log_bin(extractor(image, "token@8")) for image in (pair.image_a, pair.image_b))
            for way in ways:
                carried = vf.transfer_points(a, b, pair.points_a, **way)
                name = ", ".join(f"{key}={value!r}" for key, value in way.items()).replace("'", '"')
                errors.setdefault((name, stride), []).append((carried - pair.points_b).norm(dim=1))
    print("| settings | stride | median | within 8 | within 16 |\n|---|---|---|---|---|")
    for (name, stride), parts in errors.items():
        every = torch.cat(parts)
        shares = " | ".join(f"{float((every <= limit).float().mean()):.3f}" for limit in (8, 16))
        print(f"| `{name}` | {stride} | {float(every.median()):.1f} | {shares} |")


def facets() -> None:
    """Read every tap of an image in one pass; print one row a facet."""
    mini = vf.load_extractor("mini", size=448, stride=8, device="cpu")
    torch.manual_seed(0)
    # With mini's own card: the same normalisation, so that the weights are the only difference.
    random = vf.load_extractor(bundled.build().eval(), card=mini.card, size=448, stride=8)
    taps = [f"{facet}@{layer}" for facet in FACETS for layer in LAYERS]
    binned = [f"{facet}@{layer}" for facet in BINNED for layer in LAYERS]
    pairs = photographs()
    scores: dict[str, list[float]] = {}
    points = 0
    for pair in pairs:
        points += len(pair.points_a)
        same = float(pair.image_b.shape[1]), float(pair.image_b.shape[2])
        scores.setdefault("identity", []).append(pck(pair.points_a, pair.points_b, same))

        def note(name: str, a: vf.Descriptor, b: vf.Descriptor, pair: Pair = pair) -> None:
            size = (float(pair.image_b.shape[1]), float(pair.image_b.shape[2]))
            carried = vf.transfer_points(a, b, pair.points_a)
            scores.setdefault(name, []).append(pck(carried, pair.points_b, size))

        raw_a, raw_b = (raw_patches(image, mini.preprocess) for image in (pair.image_a, pair.image_b))
        note("raw", raw_a, raw_b)
        note("log_bin raw", vf.log_bin(raw_a), vf.log_bin(raw_b))
        for label, extractor in (("mini", mini), ("random", random)):
            a, b = extractor(pair.image_a, taps), extractor(pair.image_b, taps)
            for tap in taps:
                note(f"{label} {tap}", a[tap], b[tap])
            for tap in binned:
                note(f"{label} log_bin {tap}", vf.log_bin(a[tap]), vf.log_bin(b[tap]))
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    print(f"{len(pairs)} pairs, {points} points; identity {mean['identity']:.3f}, raw RGB {mean['raw']:.3f}")
    print(f"log-binned raw RGB {mean['log_bin raw']:.3f}\n")
    print(f"| facet | weights | {' | '.join(f'block {layer}' for layer in LAYERS)} |\n|---|---{'|---' * len(LAYERS)}|")
    for facet in (*FACETS, *(f"log_bin {facet}" for facet in BINNED)):
        for label in ("mini", "random"):
            cells = " | ".join(f"{mean[f'{label} {facet}@{layer}']:.3f}" for layer in LAYERS)
            print(f"| `{facet}` | {label} | {cells} |")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("facets", "matchers", "refine"):
        {"facets": facets, "matchers": matchers, "refine": refine}[name]()
