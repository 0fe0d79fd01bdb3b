"""Co-segmentation of 20 photographs: one forward pass an image, against the plain way with two.

The plain way is how scripts do it: one whole forward pass for the tokens, a hook on the last block; a second one for
the saliency, with the attention matrix of all tokens and heads written out; tokens of all images in a list in memory.
What follows, one clustering, weights and GrabCut, is the same functions on both sides. Both must read the same: tokens
to 2e-3 (float16 in our file), saliency to 1e-3.

The photographs are crops of those in `vitfeats.samples`, of three shapes. The network is a ViT-S/8 of random weights at
224 pixels, which takes as long as a trained one; the time depends on neither.

Memory is the process's largest resident size (VmHWM, reset before) less its size with the model loaded, in a new
process for each side. The last line is what grows with the number of images, with ``mini``. Linux only.

    python benchmarks/cosegment.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
from measuring import Row, paired, reset_peak, resident, show, threads
from PIL import Image
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.cosegmentation import (
    border_saliency,
    cluster_saliency,
    cluster_weights,
    fit_clusters,
    refine_mask,
)
from vitfeats.apps.cosegmentation.evidence import stretched
from vitfeats.apps.cosegmentation.reading import read_images
from vitfeats.apps.cosegmentation.refine import method_of
from vitfeats.configs import CosegmentConfig
from vitfeats.pca import two_means
from vitfeats.preprocess import load_image
from vitfeats.resize import resize_images, spread_map
from vitfeats.similarity import unit

IMAGES, MANY = 20, 200
SMALL, TINY = "vit_small_patch8_224", "vit_tiny_patch16_224"
SIZES = ((240, 320), (320, 240), (260, 260))
CONFIG = CosegmentConfig(tap="token@-1", clusterings=1)
Read = list[tuple[vf.Descriptor, Tensor, Tensor]]


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--runs", type=int, default=1, help="paired runs, after two that warm up")
    parser.add_argument("--fast", action="store_true", help="3 images and a small network, to see that it works")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)  # what the new processes are asked for
    options = parser.parse_args()
    with threads(options.threads):
        if options.alone:
            which, model, count = options.alone
            print(json.dumps(measured(which, model, int(count))))
            return
        model, count, many = (TINY, 3, 6) if options.fast else (SMALL, IMAGES, MANY)
        print(f"Co-segmentation, {count} images, {model}, {options.threads} threads, {options.runs} paired runs\n")
        show(rows(model, count, many, options.runs, options.threads))


def rows(model: str, count: int, many: int, runs: int, number: int) -> list[Row]:
    """Return time of reading and of the whole, memory, and what grows with the number of images."""
    images, extractor = photographs(count), extractor_of(model)
    agree(images, extractor)
    reading = paired(lambda: read_images(images, extractor, CONFIG), lambda: plain_reading(images, extractor), runs)
    whole = paired(lambda: ours(images, extractor), lambda: peer(images, extractor), runs)
    found = [
        Row("reading: one forward / two", f"{reading.ratio:.2f}", "0.50", *reading.times),
        Row("the whole: ours / plain", f"{whole.ratio:.2f}", "none", *whole.times),
    ]
    mine, theirs = (alone(which, model, count, number) for which in ("ours", "peer"))
    ratio = f"{mine['peak'] / theirs['peak']:.2f}"
    found.append(Row("memory: ours / plain", ratio, "none", _mb(mine["peak"]), _mb(theirs["peak"])))
    fewer, more = alone("ours", "mini", many // 2, number), alone("ours", "mini", many, number)
    growth = (more["peak"] - fewer["peak"]) / (many - many // 2)
    found.append(
        Row(
            f"memory, ours, mini: {many} images / {many // 2}",
            f"{more['peak'] / fewer['peak']:.2f}",
            "none",
            _mb(more["peak"]),
            f"{_mb(fewer['peak'])} ({growth / 1e6:.2f} MB an image)",
        )
    )
    return found


def ours(images: Sequence[Image.Image], extractor: vf.Extractor) -> list[Any]:
    """Return the alpha of each image by vitfeats."""
    return [segment.alpha for segment in vf.cosegment(list(images), model=extractor, config=CONFIG)]


def peer(images: Sequence[Image.Image], extractor: vf.Extractor) -> list[Any]:
    """Return the alpha of each image the plain way."""
    read = plain_reading(images, extractor)
    tokens = [unit(d.features[0]) for d, _, _ in read]
    every = torch.cat(tokens)
    taken = np.unique(np.linspace(0, len(every) - 1, min(CONFIG.fit_tokens, len(every))).round()).astype(int)
    clusters = fit_clusters(every[torch.from_numpy(taken)], CONFIG.clusters)
    labels = [clusters.nearest(part) for part in tokens]
    saliency = [values.flatten() for _, values, _ in read]
    weights = cluster_weights(cluster_saliency(labels, saliency, len(clusters)))
    scores = [values * weights[numbers] for values, numbers in zip(saliency, labels, strict=True)]
    threshold = two_means(torch.cat(scores))
    alphas = []
    for (d, values, image), score in zip(read, scores, strict=True):
        scale = min(1.0, CONFIG.refine_size / min(image.shape[1:]))
        size = (round(image.shape[1] * scale), round(image.shape[2] * scale))
        fine = spread_map(score.view(1, 1, *values.shape), d.grid, size)[0, 0]
        small = resize_images(image[None], size)[0]
        alphas.append(refine_mask(small, fine > threshold, fine, method_of(CONFIG.refine)))
    return alphas


@torch.no_grad()
def plain_reading(images: Sequence[Image.Image], extractor: vf.Extractor) -> Read:
    """Return descriptor, saliency and pixels of each image, by two whole forward passes of the network."""
    found = []
    network: Any = extractor.model
    block = network.blocks[-1]
    for image in images:
        pixels = load_image(image)
        batch = extractor.preprocess([pixels])
        tokens = hooked(block, network, batch.pixels)
        qkv = hooked(block.attn.qkv, network, batch.pixels)
        heads = block.attn.num_heads
        query, key, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) * block.attn.scale).softmax(-1)
        mean = attention[0, :, 0, 1:].mean(0).view(batch.grid.rows, batch.grid.cols)
        looks = (mean - mean.min()) / (mean.max() - mean.min()).clamp_min(1e-12)
        d = vf.Descriptor(tokens[:, 1:], batch.grid, batch.frames, vf.Tap("token", 11), "plain")
        found.append((d, stretched(border_saliency(d) + 0.3 * looks), pixels))
    return found


def hooked(module: Any, network: Any, pixels: Tensor) -> Tensor:
    """Return what a module gives in a whole forward pass."""
    seen = []
    hook = module.register_forward_hook(lambda module, given, out: seen.append(out))
    network(pixels)
    hook.remove()
    return seen[0]


def agree(images: Sequence[Image.Image], extractor: vf.Extractor) -> None:
    """Stop unless both sides read the same."""
    read, plain = read_images(images, extractor, CONFIG), plain_reading(images, extractor)
    for index, one in enumerate(read.images):
        d, saliency, _ = plain[one.place]
        tokens = float((read.tokens[index] - unit(d.features[0])).abs().max())
        looks = float((one.saliency - saliency).abs().max())
        if not (tokens <= 2e-3 and looks <= 1e-3):
            raise AssertionError(f"expected the same tokens and saliency, they differ by {tokens:.1e} and {looks:.1e}")
    print("both sides read the same tokens and saliency\n")


def measured(which: str, model: str, count: int) -> dict[str, float]:
    """Return time and memory of one side in this process."""
    extractor = extractor_of(model)
    work: Callable[..., Any] = {"ours": ours, "peer": peer}[which]
    work(photographs(2), extractor)
    images = photographs(count)
    before, start = reset_peak(), time.perf_counter()
    work(images, extractor)
    return {"seconds": time.perf_counter() - start, "peak": max(1, resident("VmHWM") - before)}


def alone(which: str, model: str, count: int, number: int) -> dict[str, float]:
    """Return what one side measures in a process of its own."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--alone", which, model, str(count), "--threads", str(number)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    return json.loads(ran.stdout)


def photographs(count: int) -> list[Image.Image]:
    """Return crops of the samples, of three shapes."""
    whole = [vf.samples.china(), vf.samples.flower(), vf.samples.coffee(), vf.samples.astronaut()]
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        picture, (height, width) = whole[number % len(whole)], SIZES[number % len(SIZES)]
        left, top = int(rng.integers(picture.width - width + 1)), int(rng.integers(picture.height - height + 1))
        found.append(picture.crop((left, top, left + width, top + height)))
    return found


def extractor_of(model: str) -> vf.Extractor:
    """Return mini with tokens half a patch apart, or a network of timm of random weights."""
    if model == "mini":
        return vf.load_extractor("mini", stride=8, device="cpu")
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False, num_classes=0, dynamic_img_size=True)
    # Positions as timm resamples them, for the plain side does not know of DINO's rule.
    card = replace(vf.load_extractor(network.eval()).card, position_rule="timm")
    return vf.load_extractor(network, card=card, size=224)


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
