"""What the benchmarks share: paired runs in turns, rows of a table, and descriptors of random numbers."""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

import vitfeats as vf


class Row(NamedTuple):
    """One line of a table: what was measured, the ratio, the bar or ceiling it is held against, and both sides."""

    what: str
    ratio: str
    against: str
    ours: str
    peer: str


HEAD = Row("what", "ratio", "bar or ceiling", "ours", "peer")


class Paired(NamedTuple):
    """The median of the paired ratios ours/peer, and the median seconds of each side."""

    ratio: float
    ours: float
    peer: float

    @property
    def times(self) -> tuple[str, str]:
        """Both times in milliseconds, as text."""
        return milliseconds(self.ours), milliseconds(self.peer)


def paired(ours: Callable[[], object], peer: Callable[[], object], runs: int) -> Paired:
    """Run both in turns, so that what else the machine does falls on both alike."""
    both, times = (ours, peer), ([], [])
    for run in range(runs + 2):
        for which in (0, 1) if run % 2 else (1, 0):  # neither always goes first
            start = time.perf_counter()
            both[which]()
            times[which].append(time.perf_counter() - start)
    mine, theirs = (kept[2:] for kept in times)  # the first two warm up
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return Paired(ratio, statistics.median(mine), statistics.median(theirs))


def milliseconds(seconds: float) -> str:
    """Return a time as text."""
    return f"{1e3 * seconds:.1f} ms"


def show(rows: Iterable[Row]) -> None:
    """Print rows below each other."""
    lines = [HEAD, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Set torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def described(side: int, dim: int, seed: int = 0) -> vf.Descriptor:
    """Return a descriptor of random features on a square grid."""
    grid = vf.PatchGrid(side, side, 8, 4)
    features = torch.randn(1, grid.tokens, dim, generator=torch.Generator().manual_seed(seed))
    return vf.Descriptor(features, grid, (vf.Frame(grid.network_size, grid.network_size),), vf.Tap("key", 9), "numbers")


def reset_peak() -> int:
    """Reset what the kernel keeps as the largest resident size; return the size now, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Return a size that the kernel keeps of this process, in bytes: "VmRSS" is now, "VmHWM" the largest."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
