"""What an aggregation network is worth: PCK@0.1 on photographs warped, row by row as in the paper's comparison.

    python benchmarks/hyperfeatures.py PICTURES --names held_out.txt
    python benchmarks/hyperfeatures.py PICTURES --names held_out.txt --picture heat_map.png

PICTURES is a folder or a tar file; --names lists those that neither network has learned from. Each is matched to itself
under a random homography with other colours. A point of a grid counts as correct within 0.1·max(height, width) of the
target image; the share is over the points of all pairs. Rows: the answer "the same place"; the diffusion model with
random weights; every single layer and step; all of them concatenated; one pass over the clean picture; the learned
aggregation, and what is left of it when all but its largest weight is pruned, raw and through its bottleneck.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

import vitfeats as vf
from vitfeats import plot
from vitfeats.api import load_extractor
from vitfeats.apps.evaluation import WarpedImages
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.diffusion import hyperfeature_layers
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
from vitfeats.models.diffusion import mini_unet
from vitfeats.pictures import read_names, read_pictures
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.views import numbered

ALPHA, SEED = 0.1, 17
ROWS = ("hyperfeatures", "pruned", "raw", "concatenation")


def main() -> None:
    """Print the table, and draw every single layer and step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--names", type=Path, required=True, help="text file, one name a line")
    parser.add_argument("--pairs", type=int, default=100, help="pictures to take, drawn at random")
    parser.add_argument("--model", default="hyperfeatures:ddpm_mini")
    parser.add_argument("--checkpoint", type=Path, help="another aggregation network")
    parser.add_argument("--picture", type=Path, help="draw PCK of every layer and step")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = read_names(options.names)
    chosen = torch.randperm(len(names), generator=numbered(SEED))[: options.pairs].tolist()
    found = read_pictures(options.pictures, side=128, only=[names[i] for i in chosen])
    pairs = WarpedImages(list(found.values()), seed=SEED)
    learned = load_extractor(options.model, device="cpu", checkpoint=options.checkpoint)
    assert isinstance(learned, HyperfeatureExtractor)
    shares = table(pairs, learned)
    layers = hyperfeature_layers(learned.inner.layers)
    steps = list(learned.diffusion.kept_steps)
    singles = {(layer, step): shares.pop(f"{layer}#{step}") for layer in layers for step in steps}
    show(shares, singles)
    if options.picture:
        grid = torch.tensor([[singles[layer, step] for layer in layers] for step in steps])
        plot.mixing(grid, layers, steps, label="PCK@0.1").save(options.picture)


def table(pairs: WarpedImages, learned: HyperfeatureExtractor) -> dict[str, float]:
    """Return PCK by row: those of :data:`ROWS`, the fools', one pass, and ``layer#step`` of each."""
    chain, size = learned.inner, learned.preprocess.size
    once = learned.inner.reading(DiffusionConfig.preset("hyperfeatures-one-step"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        fool = load_extractor(mini_unet().eval(), size=size, diffusion=once.diffusion)
    layers = hyperfeature_layers(chain.layers)
    every = [f"residual@{layer}#{step}" for step in chain.diffusion.kept_steps for layer in layers]
    clean = [f"residual@{layer}" for layer in layers]
    correct: dict[str, int] = {}
    counted = 0
    for index in range(len(pairs)):
        pair = pairs[index]
        reach = ALPHA * max(load_image(pair.image_b).shape[-2:])
        seen = [
            _described(image, {learned: [f"out@{row}" for row in ROWS], chain: every, once: clean, fool: clean})
            for image in (pair.image_a, pair.image_b)
        ]
        for name in seen[0]:
            made = vf.transfer_points(seen[0][name], seen[1][name], pair.points_a)
            correct[name] = correct.get(name, 0) + int(((made - pair.points_b).norm(dim=1) <= reach).sum())
        same = (pair.points_a - pair.points_b).norm(dim=1) <= reach
        correct["identity"] = correct.get("identity", 0) + int(same.sum())
        counted += len(pair.points_a)
    return {name: number / counted for name, number in correct.items()}


def show(shares: Mapping[str, float], singles: Mapping[tuple[str, int], float]) -> None:
    """Print the table as Markdown."""
    ordered = sorted(singles.items(), key=lambda item: -item[1])
    (best_layer, best_step), best = ordered[0]
    clean = {name.removeprefix("clean "): share for name, share in shares.items() if name.startswith("clean ")}
    untrained = [share for name, share in shares.items() if name.startswith("untrained ")]
    first = max(clean, key=lambda name: clean[name])
    rows = {
        "the same place": shares["identity"],
        "random weights, best layer, one pass": max(untrained),
        f"single layer and step: best, `{best_layer}#{best_step}`": best,
        "single layer and step: median of all": statistics.median(singles.values()),
        f"one pass over the clean picture: best, `{first}`": clean[first],
        "concatenation of all": shares["concatenation"],
        "pruned to the largest weight, raw": shares["raw"],
        "pruned to the largest weight, through its bottleneck": shares["pruned"],
        "learned aggregation": shares["hyperfeatures"],
    }
    print("| row | PCK@0.1 |\n|---|---|")
    for name, share in rows.items():
        print(f"| {name} | {share:.3f} |")


@torch.no_grad()
def _described(image: ImageLike, taps: Mapping[vf.Extractor, list[str]]) -> dict[str, vf.Descriptor]:
    """Return descriptors by row; the keys of ``taps`` tell the rows of one model from another's."""
    learned, chain, once, fool = taps
    found: dict[str, vf.Descriptor] = {}
    found |= {str(tap).removeprefix("out@"): d for tap, d in learned(image, taps[learned]).items()}
    found |= {str(tap).removeprefix("residual@"): d for tap, d in chain(image, taps[chain]).items()}
    found |= {f"clean {str(tap).removeprefix('residual@')}": d for tap, d in once(image, taps[once]).items()}
    found |= {f"untrained {str(tap).removeprefix('residual@')}": d for tap, d in fool(image, taps[fool]).items()}
    return found


if __name__ == "__main__":
    main()
