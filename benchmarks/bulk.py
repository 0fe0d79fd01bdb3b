"""Extraction of 1,000 photographs to disk, against the model alone; memory while it goes on; what Ray adds.

The photographs are crops of those in `vitfeats.samples`, 640×480, saved as JPEG. The network is a ViT-S/16 of random
weights at 224 pixels, which takes as long as a trained one. Read is `key@11`, in batches of 8.

- Throughput: `vf.bulk.extract` with the local engine makes a store of all photographs, and the same extractor reads as
  many that are in memory, prepared as the network takes them; in turns. The ratio is the rate of extraction, all
  included, over that of the model. With one torch thread a second core decodes, as a CPU does beside a GPU; with as
  many threads as cores, decoding takes from the model what it needs.
- Memory: the largest resident size of a process (VmHWM) while all of them are extracted, after each tenth; the
  bar is on that at the end over that after two tenths.
  Blocks of 64 kB and more are given back as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so that it is seen.
- Ray, with 1 and 2 actors, against the local engine: seconds beyond those in which images are read, and whether all
  shards are the same bytes.

Linux only.

    python benchmarks/bulk.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from measuring import Row, paired, reset_peak, resident, show, threads

import vitfeats as vf
from vitfeats.apps.bulk import open_source

MANY, FEW = 1000, 20
SMALL, TINY = "vit_small_patch16_224", "vit_tiny_patch16_224"
SIZE = (640, 480)  # width, height
TAPS = ["key@11"]


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="paired runs, after two that warm up")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray out")
    parser.add_argument("--fast", action="store_true", help="20 photographs and a small network, to see that it works")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)  # what the new process is asked for
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(grown(*options.alone)))
        return
    model, count = (TINY, FEW) if options.fast else (SMALL, MANY)
    print(f"Extraction to disk, {count} photographs of {SIZE[0]}×{SIZE[1]}, {model}, {options.runs} paired runs\n")
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder) / "photographs", count)
        found = [throughput(Path(folder), model, number, options.runs) for number in sorted({1, os.cpu_count() or 1})]
        found.append(memory(Path(folder), model))
        if not options.no_ray:
            found += beside_ray(Path(folder), model)
        show(found)


def throughput(folder: Path, model: str, number: int, runs: int) -> Row:
    """Compare the rate of extraction with the model's own."""
    images = open_source(folder / "photographs")
    extractor = extractor_of(model)
    ready = [extractor.preprocess(images.image(number)) for number in range(len(images) // 10)]
    stores = iter(range(10**6))

    def extraction() -> None:
        vf.bulk.extract(images, folder / f"store{number}-{next(stores)}", model=extractor, taps=TAPS)

    def model_only() -> None:
        for _ in extractor.each(ready * 10, TAPS):
            pass

    with threads(number):
        found = paired(extraction, model_only, runs)
    rates = [f"{len(images) / seconds:.1f} images/s" for seconds in (found.ours, found.peer)]
    return Row(f"rate: extraction / model alone, torch threads: {number}", f"{1 / found.ratio:.3f}", "0.92", *rates)


def memory(folder: Path, model: str) -> Row:
    """Return how memory grows, in a process of its own."""
    command = [sys.executable, __file__, "--alone", str(folder / "photographs"), str(folder / "alone"), model]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    peaks = json.loads(ran.stdout)
    ratio = f"{peaks[-1] / peaks[1]:.3f}"
    return Row(
        "memory: at the end / after two tenths", ratio, "1.1", f"{peaks[-1] / 1e6:.0f} MB", f"{peaks[1] / 1e6:.0f} MB"
    )


def grown(source: str, out: str, model: str) -> list[int]:
    """Return the largest resident size after each tenth of the images."""
    torch.set_num_threads(1)
    extractor = extractor_of(model)
    images = open_source(source)
    tenth = len(images) // 10
    peaks: list[int] = []
    done = 0
    read = extractor.each

    def counted(*given, **settings):  # type: ignore[no-untyped-def] - as the method that it stands for
        nonlocal done
        for one in read(*given, **settings):
            done += 1
            if done % tenth == 0:
                peaks.append(resident("VmHWM"))
            yield one

    extractor.each = counted  # type: ignore[method-assign]
    reset_peak()
    vf.bulk.extract(images, out, model=extractor, taps=TAPS)
    return peaks


def beside_ray(folder: Path, model: str) -> list[Row]:
    """Return what Ray takes beyond the local engine."""
    images = open_source(folder / "photographs")
    images = images.part(0, max(len(images) // 5, min(len(images), 16)))
    extractor = extractor_of(model)
    found = []
    with threads(1):
        start = time.perf_counter()
        vf.bulk.extract(images, folder / "local", model=extractor, taps=TAPS, per_shard=16, workers=2)
        here = time.perf_counter() - start
        for actors in (1, 2):
            out = folder / f"ray{actors}"
            start = time.perf_counter()
            vf.bulk.extract(
                images, out, model=extractor, taps=TAPS, per_shard=16, engine="ray", actors=actors, workers=2
            )
            there = time.perf_counter() - start
            same = all(
                path.read_bytes() == (out / path.name).read_bytes() for path in (folder / "local").glob("part-*")
            )
            what = f"seconds: Ray, actors: {actors} / local ({'same' if same else 'OTHER'} bytes)"
            found.append(Row(what, f"{there / here:.2f}", "none", f"{1e3 * there:.0f} ms", f"{1e3 * here:.0f} ms"))
    return found


def photographs(folder: Path, count: int) -> None:
    """Save crops of the samples."""
    folder.mkdir()
    whole = [vf.samples.china(), vf.samples.flower(), vf.samples.coffee(), vf.samples.astronaut()]
    rng = np.random.default_rng(0)
    for number in range(count):
        picture = whole[number % len(whole)]
        width = int(rng.integers(picture.width // 2, picture.width + 1))
        height = min(picture.height, width * SIZE[1] // SIZE[0])
        left, top = int(rng.integers(picture.width - width + 1)), int(rng.integers(picture.height - height + 1))
        picture.crop((left, top, left + width, top + height)).resize(SIZE).save(folder / f"{number:05}.jpg", quality=90)


def extractor_of(model: str) -> vf.Extractor:
    """Return a network of timm of random weights."""
    torch.manual_seed(0)
    return vf.load_extractor(timm.create_model(model, pretrained=False, num_classes=0, dynamic_img_size=True), size=224)


if __name__ == "__main__":
    main()
