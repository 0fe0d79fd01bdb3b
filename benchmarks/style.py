"""Style transfer by AdaAttN: attention in chunks, against one that makes the whole matrix.

A photograph in the style of another of the same size, from pixels to pixels: both are encoded by ``vgg_mini``, then a
network of random weights attends at relu3_1, relu4_1 and relu5_1 and decodes. The peer differs in one function only:
it is the formula as published, softmax(f(q)ᵀ g(k)) as one matrix A, the mean A·V and the deviation √relu(A·V² − mean²).
At relu3_1 that matrix has (size / 4)⁴ numbers: 17.2 GB at 1024 pixels. A size whose matrix is more than half of the
memory that is available is run without the peer.

Both attend to all positions. Their images must agree: at 256 pixels to 1e-4 in every value, attending and decoding in
float64; at each size to 1e-4 in root mean square as they are measured, in float32. There, single values may differ by
1e-3, for the variance is a difference of nearly equal numbers and its root is steep at 0, on both sides. The two run
in turns; from 768 pixels on they run once, since turns would take many minutes. Times are those of encoding both
images, attending and decoding.

Memory is the process's largest resident size during one such transfer (VmHWM, reset before) less its size with the
model and the images loaded, in a new process for each side, after one of 32 pixels that loads what every transfer
needs. Blocks of 64 kB and more are given back as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so that the figure
is what is in use and not what the allocator keeps. Linux only.

Then what looking at 4096 positions of the style at each level (``most``) brings at the largest size; and the other two
methods against AdaAttN, for information.

    python benchmarks/style.py
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from measuring import Paired, Row, milliseconds, paired, reset_peak, resident, show, threads
from PIL import ImageOps
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.style_transfer import Stylizer, channels_of
from vitfeats.nets import adaattn
from vitfeats.nets.stylizing import NETWORKS
from vitfeats.preprocess import load_image

WIDTHS, INNER = (24, 48, 96), 64
TOLERANCE = 1e-4
SIZES, MOST, COMPARED = (256, 512, 1024), 4096, 512
SMALL, FEW = 64, 100  # with --fast
EXACT = 256  # pixels of a side, at which float64 is compared
ONCE = 768  # pixels of a side, from which on nothing is repeated


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--runs", type=int, default=5, help=f"paired runs, below {ONCE} pixels")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides in pixels, multiples of 16")
    parser.add_argument("--fast", action="store_true", help=f"{SMALL} pixels and 2 runs, to see that it works")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)  # what the new processes are asked for
    options = parser.parse_args()
    if options.alone:
        torch.set_num_threads(options.threads)
        which, size, file = options.alone
        print(json.dumps(measured(which, int(size), Path(file))))
        return
    sizes, runs = ((SMALL,), 2) if options.fast else (tuple(options.sizes), options.runs)
    shape = {"most": FEW, "compared": SMALL} if options.fast else {}
    print(f"Style transfer, {', '.join(map(str, sizes))} pixels, {options.threads} threads, {runs} paired runs\n")
    show(rows(sizes=sizes, runs=runs, number=options.threads, **shape))


def rows(
    *, sizes: tuple[int, ...] = SIZES, runs: int = 5, number: int = 1, most: int = MOST, compared: int = COMPARED
) -> list[Row]:
    """Return time and memory at each size, then those of ``most`` at the largest and of the methods at one size."""
    with threads(number):
        _agree(min(EXACT, *sizes))
        found = [_against_peer(size, runs, number) for size in sorted(sizes)]
        _, all_positions = found[-1]
        lines = [row for part, _ in found for row in part]
        return [*lines, _fewer(max(sizes), most, all_positions, runs), *_methods(compared, most, runs)]


class Transfer:
    """A photograph in the style of another, by a network of random weights.

    Args:
        size: Side of both in pixels, a multiple of 16.
        method: One of ``NETWORKS``.
        dtype: What it attends and decodes in.
    """

    def __init__(self, size: int, method: str = "adaattn", dtype: torch.dtype = torch.float32) -> None:
        extractor = vf.load_extractor("vgg_mini", device="cpu")
        rng = torch.Generator().manual_seed(0)
        network = NETWORKS[method](channels_of(extractor), WIDTHS, INNER, generator=rng)
        self.stylizer = Stylizer(extractor, network.requires_grad_(False).to(dtype))
        self.dtype = dtype
        pictures = (vf.samples.china(), vf.samples.flower())
        self.content, self.style = (load_image(ImageOps.fit(picture, (size, size)))[None] for picture in pictures)

    @torch.no_grad()
    def ours(self, most: int | None = None) -> Tensor:
        """Return the image; its values are not bounded."""
        content, style = ([x.to(self.dtype) for x in self.stylizer.maps(image)] for image in (self.content, self.style))
        return self.stylizer.network(content, style, most=most)

    def peer(self) -> Tensor:
        """Return the image made with whole matrices."""
        with patch.object(adaattn, "attend_moments", plain):
            return self.ours()

    def work(self, which: str) -> Callable[[], Tensor]:
        """Return one of the two: "ours" or "peer"."""
        return {"ours": self.ours, "peer": self.peer}[which]


def plain(
    query: Tensor, key: Tensor, value: Tensor, *, log_weights: None = None, regions: None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation by the published formula, of one style without regions."""
    assert log_weights is None
    assert regions is None
    values = value.flatten(2).transpose(1, 2)
    attention = (query.flatten(2).transpose(1, 2) @ key.flatten(2)).softmax(2)
    mean = attention @ values
    std = (attention @ values**2 - mean**2).relu().sqrt()
    shape = (*value.shape[:2], *query.shape[2:])
    return mean.transpose(1, 2).reshape(shape), std.transpose(1, 2).reshape(shape)


class Alone(NamedTuple):
    """One transfer in a process of its own: its time, the memory it took in bytes, and its image."""

    seconds: float
    peak: int
    image: Tensor


def measured(which: str, size: int, file: Path) -> dict[str, float]:
    """Return time and memory of one transfer in this process; its image goes into a file."""
    Transfer(32).work(which)()
    work = Transfer(size).work(which)
    before, start = reset_peak(), time.perf_counter()
    image = work()
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    torch.save(image, file)
    return {"seconds": seconds, "peak": max(peak, 1)}


def _alone(which: str, size: int, number: int) -> Alone:
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.pt"
        command = [sys.executable, __file__, "--alone", which, str(size), str(file), "--threads", str(number)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
        return Alone(**json.loads(ran.stdout), image=torch.load(file))


def _agree(size: int) -> None:
    exact = Transfer(size, dtype=torch.float64)
    difference = (exact.ours() - exact.peer()).abs().max()
    if not difference <= TOLERANCE:
        raise AssertionError(f"expected the same image of {size} px from both in float64, they differ by {difference}")


def _against_peer(size: int, runs: int, number: int) -> tuple[list[Row], float]:
    """Return the rows of time and memory at one size, and our seconds."""
    time_row, memory_row = (partial(Row, f"{size} px, {what}: ours / whole matrix") for what in ("time", "memory"))
    ours, matrix = _alone("ours", size, number), 4 * (size // 4) ** 4
    if matrix > _available() / 2:
        missing = f"does not fit ({matrix / 1e9:.1f} GB)"
        found = [time_row("–", "none", milliseconds(ours.seconds), missing)]
        return [*found, memory_row("–", "none", _mb(ours.peak), missing)], ours.seconds
    peer = _alone("peer", size, number)
    difference = (ours.image - peer.image).square().mean().sqrt()
    if not difference <= TOLERANCE:
        raise AssertionError(f"expected the same image of {size} px from both, they differ by {difference} in RMS")
    if size < ONCE:
        transfer = Transfer(size)
        timed = paired(transfer.ours, transfer.peer, runs)
    else:
        timed = Paired(ours.seconds / peer.seconds, ours.seconds, peer.seconds)
    memory = memory_row(f"{ours.peak / peer.peak:.2f}", "none", _mb(ours.peak), _mb(peer.peak))
    return [time_row(f"{timed.ratio:.2f}", "none", *timed.times), memory], timed.ours


def _fewer(size: int, most: int, all_positions: float, runs: int) -> Row:
    """Return the row of fewer positions at one size, against our seconds with all of them."""
    transfer = Transfer(size)
    what = f"{size} px, time, ours: at most {most} positions / all"
    if size < ONCE:
        timed = paired(lambda: transfer.ours(most), transfer.ours, runs)
    else:
        start = time.perf_counter()
        transfer.ours(most)
        seconds = time.perf_counter() - start
        timed = Paired(seconds / all_positions, seconds, all_positions)
    return Row(what, f"{timed.ratio:.2f}", "none", *timed.times)


def _methods(size: int, most: int, runs: int) -> list[Row]:
    """Return the rows of the other methods against AdaAttN, all ours."""
    attending = Transfer(size)
    found = []
    for method in ("adain", "sanet"):
        other = Transfer(size, method)
        timed = paired(partial(other.ours, most), partial(attending.ours, most), runs)
        what = f"{size} px, time, ours, at most {most} positions: {method} / adaattn"
        found.append(Row(what, f"{timed.ratio:.2f}", "none", *timed.times))
    return found


def _available() -> int:
    """Return the memory that new processes can have, in bytes."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
