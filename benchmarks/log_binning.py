"""Log-binning against the loop over pixels that it replaces, and against writing as much as it returns.

55 × 55 tokens of 384 channels, two levels: 17 bins, 79 MB. The loop is that of the published code, pixel by pixel and
bin by bin, over maps that torch has averaged; its result is laid out as ours, which favours it. Writing is the copy of
a tensor of the result's size into newly allocated memory: the pages of both results are touched for the first time in
the timed call. The two sides run in turns, and ratios are medians of the paired ratios.

    python benchmarks/log_binning.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import vitfeats as vf

HIERARCHY = 2


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--runs", type=int, default=21, help="paired runs; the loop runs a third as often")
    parser.add_argument("--fast", action="store_true", help="14 × 14 tokens and 3 runs, to see that it works")
    options = parser.parse_args()
    side, runs = (14, 3) if options.fast else (55, options.runs)
    print(f"{side}×{side} tokens of 384, {options.threads} threads, {runs} paired runs\n")
    print(f"{'what':44} {'ratio':>7} {'bar':>7} {'ours':>10} {'peer':>10}")
    for what, ratio, bar, ours, peer in rows(side=side, runs=runs, threads=options.threads):
        print(f"{what:44} {ratio:>7} {bar:>7} {ours:>10} {peer:>10}")


def rows(*, side: int = 55, dim: int = 384, runs: int = 21, threads: int = 1) -> list[tuple[str, ...]]:
    """Return (what, ratio, bar, ours, peer) for each comparison; a bar says which side of it is good."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        d = described(side, dim)
        result = vf.log_bin(d, hierarchy=HIERARCHY).features
        difference = (result - loop(d)).abs().max()
        if difference > 1e-5:
            raise AssertionError(f"expected the loop's result, got one that differs by {difference}")
        against_loop = paired(lambda: vf.log_bin(d), lambda: loop(d), max(3, runs // 3))
        against_writing = paired(lambda: vf.log_bin(d), lambda: torch.empty_like(result).copy_(result), runs)
    finally:
        torch.set_num_threads(before)
    return [
        ("log_bin: the loop over pixels / ours", f"{1 / against_loop[0]:.1f}", "≥ 5", *shown(against_loop)),
        ("log_bin: ours / writing the result", f"{against_writing[0]:.2f}", "≤ 2", *shown(against_writing)),
    ]


def described(side: int, dim: int) -> vf.Descriptor:
    """Return a descriptor of random features on a square grid."""
    grid = vf.PatchGrid(side, side, 8, 4)
    features = torch.randn(1, grid.tokens, dim, generator=torch.Generator().manual_seed(0))
    return vf.Descriptor(features, grid, (vf.Frame(grid.network_size, grid.network_size),), vf.Tap("key", 9), "numbers")


def loop(d: vf.Descriptor) -> torch.Tensor:
    """Log-binning by a loop over pixels and bins."""
    side, dim = d.grid.rows, d.dim
    maps = [
        F.avg_pool2d(d.map, 3**k, stride=1, padding=3**k // 2, count_include_pad=False).permute(0, 2, 3, 1)
        for k in range(HIERARCHY)
    ]
    bins = [
        (k, down, across)
        for k in range(HIERARCHY)
        for down in (-(3**k), 0, 3**k)
        for across in (-(3**k), 0, 3**k)
        if k == 0 or (down, across) != (0, 0)
    ]
    out = torch.empty(1, side, side, len(bins) * dim)
    for row in range(side):
        for col in range(side):
            for number, (k, down, across) in enumerate(bins):
                y, x = min(max(row + down, 0), side - 1), min(max(col + across, 0), side - 1)
                out[:, row, col, number * dim : (number + 1) * dim] = maps[k][:, y, x]
    return out.flatten(1, 2)


def paired(ours: Callable[[], object], peer: Callable[[], object], runs: int) -> tuple[float, float, float]:
    """Run both in turns; return (median of the ratios ours/peer, median seconds of ours, of the peer)."""
    both, times = (ours, peer), ([], [])
    for run in range(runs + 2):
        for which in (0, 1) if run % 2 else (1, 0):  # neither always goes first
            start = time.perf_counter()
            both[which]()
            times[which].append(time.perf_counter() - start)
    mine, theirs = (kept[2:] for kept in times)  # the first two warm up
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return ratio, statistics.median(mine), statistics.median(theirs)


def shown(measured: tuple[float, float, float]) -> tuple[str, str]:
    """Return both times in milliseconds, as text."""
    return f"{1e3 * measured[1]:.1f} ms", f"{1e3 * measured[2]:.1f} ms"


if __name__ == "__main__":
    main()
