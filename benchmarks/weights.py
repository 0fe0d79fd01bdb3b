r"""What weights are worth: the same figures for any model, beside what a fool would get.

    python benchmarks/weights.py PICTURES --names held_out.txt
    python benchmarks/weights.py PICTURES --names held_out.txt --models mini runs/pretrained/model
    python benchmarks/weights.py PICTURES --names held_out.txt --models vgg_mini --random vgg_mini \
        --taps out@relu3_1 out@relu4_1

PICTURES is a folder or a tar file whose folders are classes; --names lists those that were held out. Figures:

- k-NN: of the held-out pictures that have a class, how many get it from their 20 nearest neighbours among the others;
  cosine of the normed CLS token, or of the last layer's mean where there is none; shorter side 112 pixels.
- Warps: PCK@0.1 of 150 held-out pictures and their random homographies with other colours, by tap; 224 pixels.
- Stereo: of the left tokens whose place in the right picture is known, how many get a mutual match within 8 pixels of
  it; the last tap, 448 pixels, stride half a patch.

Rows: "the same place" as the answer, raw pixels, a network with random weights, and each model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vitfeats as vf
from vitfeats.api import load_extractor
from vitfeats.apps.evaluation import WarpedImages, raw_patches, stereo_table, warp_table
from vitfeats.apps.evaluation.describing import Describe, describe_with
from vitfeats.apps.evaluation.neighbours import neighbours_accuracy
from vitfeats.apps.pretrain import Collection
from vitfeats.models.trainable import new_network
from vitfeats.pictures import read_names, read_pictures
from vitfeats.resize import resize_images
from vitfeats.views import numbered

SEED, SIDE, WARPS = 17, 160, 150


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--names", type=Path, required=True, help="text file, one name a line")
    parser.add_argument("--models", nargs="+", default=["mini"])
    parser.add_argument(
        "--random",
        default="vit_tiny_patch16_224",
        help="network with random weights, as for vitfeats pretrain; empty: no row",
    )
    parser.add_argument("--unlabelled", nargs="*", default=["BACKGROUND_Google"], help="folders that are no class")
    parser.add_argument("--taps", nargs="+", default=["key@5", "key@7", "key@9", "key@11"])
    parser.add_argument("--warps", type=int, default=WARPS, help="pictures to warp")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = read_names(options.names)
    held_out = read_pictures(options.pictures, side=SIDE, only=names)
    known = Collection.of(read_pictures(options.pictures, side=SIDE, without=names), unlabelled=options.unlabelled)
    asked = Collection.of(held_out, classes=known.classes)
    chosen = torch.randperm(len(held_out), generator=numbered(SEED))[: options.warps].tolist()
    pairs = WarpedImages([list(held_out.values())[index] for index in chosen], seed=SEED)

    taps = options.taps
    extractors = {}
    if options.random:
        extractors["random weights"] = _random(options.random)
    extractors |= {f"`{name}`": _loaded(name) for name in options.models}
    first = next(iter(extractors.values()))
    wide, large = first.resized(size=224), _fine(first)
    methods: dict[str, Describe] = {"raw pixels": lambda image: raw_patches(image, wide.preprocess)}
    methods |= {
        f"{name} {tap}": describe_with(e.resized(size=224), tap) for name, e in extractors.items() for tap in taps
    }
    warps = {row.name: row.shares[0.1] for row in warp_table(methods, pairs)}
    methods = {"raw pixels": lambda image: raw_patches(image, large.preprocess)}
    methods |= {name: describe_with(_fine(e), taps[-1]) for name, e in extractors.items()}
    stereo: dict[str, float] = {}
    for name, describe in methods.items():
        known_places, found = stereo_table({name: describe})  # the first counts what is known on this grid
        stereo.setdefault("identity", known_places.shares[8])
        stereo[name] = found.matches * found.shares[8] / known_places.matches
    neighbours = {"raw pixels": accuracy(known, asked, _pixels)}
    for name, extractor in extractors.items():
        neighbours[name] = accuracy(known, asked, lambda pictures, e=extractor: _summaries(e, pictures))

    print(f"| row | k-NN | {' | '.join(f'warp {tap}' for tap in taps)} | stereo {taps[-1]} |")
    print("|---" * (3 + len(taps)) + "|")
    for name in ("identity", "raw pixels", *extractors):
        own = [warps.get(f"{name} {tap}", warps.get(name)) for tap in taps]
        print(f"| {name} | {_told(neighbours.get(name))} | {' | '.join(map(_told, own))} | {_told(stereo.get(name))} |")


def accuracy(known: Collection, asked: Collection, describe) -> float:
    """Return the k-NN accuracy of what ``describe`` says of pictures."""
    sets = []
    for collection in (known, asked):
        index = (collection.labels >= 0).nonzero()[:, 0].tolist()
        sets += [describe([collection.pictures[i] for i in index]), collection.labels[index]]
    return neighbours_accuracy(*sets, k=20)


def _loaded(name: str) -> vf.Extractor:
    extractor = load_extractor(name, device="cpu")
    return load_extractor(name, device="cpu", norm=True) if extractor.card.has_cls else extractor


def _random(name: str) -> vf.Extractor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = new_network(name, 112).eval()
    cards = vf.list_models(name)
    return load_extractor(network, card=cards[0]) if cards else load_extractor(network, norm=True)


def _fine(extractor: vf.Extractor) -> vf.Extractor:
    return extractor.resized(size=448, stride=extractor.card.patch // 2 if extractor.overlaps else None)


def _summaries(extractor: vf.Extractor, pictures: Sequence[np.ndarray]) -> Tensor:
    small, card = extractor.resized(size=112), extractor.card
    tap = f"cls@{card.depth - 1}" if card.has_cls else f"out@{card.layers[-1]}"
    return torch.cat([d.features.mean(1) for d in small.each(pictures, tap, batch_size=256)])


def _pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    small = [resize_images(torch.tensor(p).permute(2, 0, 1)[None].float() / 255, (8, 8)) for p in pictures]
    return F.normalize((torch.cat(small) - 0.5).flatten(1), dim=1)


def _told(share: float | None) -> str:
    return "–" if share is None else f"{share:.3f}"


if __name__ == "__main__":
    main()
