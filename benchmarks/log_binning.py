"""Log-binning against the loop over pixels that it replaces, and against writing as much as it returns.

55 × 55 tokens of 384 channels, two levels: 17 bins, 79 MB. The loop is that of the published code, pixel by pixel and
bin by bin, over maps that torch has averaged; its result is laid out as ours, which favours it. Writing is the copy of
a tensor of the result's size into newly allocated memory: the pages of both results are touched for the first time in
the timed call. The two sides run in turns, and ratios are medians of the paired ratios.

    python benchmarks/log_binning.py
"""

import argparse

import torch
import torch.nn.functional as F
from measuring import Row, described, paired, show, threads

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
    show(rows(side=side, runs=runs, number=options.threads))


def rows(*, side: int = 55, dim: int = 384, runs: int = 21, number: int = 1) -> list[Row]:
    """Return the comparisons, on a number of threads; a bar says which side of it is good."""
    with threads(number):
        d = described(side, dim)
        result = vf.log_bin(d, hierarchy=HIERARCHY).features
        difference = (result - loop(d)).abs().max()
        if difference > 1e-5:
            raise AssertionError(f"expected the loop's result, got one that differs by {difference}")
        against_loop = paired(lambda: vf.log_bin(d), lambda: loop(d), max(3, runs // 3))
        against_writing = paired(lambda: vf.log_bin(d), lambda: torch.empty_like(result).copy_(result), runs)
    return [
        Row("log_bin: the loop over pixels / ours", f"{1 / against_loop.ratio:.1f}", "≥ 5", *against_loop.times),
        Row("log_bin: ours / writing the result", f"{against_writing.ratio:.2f}", "≤ 2", *against_writing.times),
    ]


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


if __name__ == "__main__":
    main()
