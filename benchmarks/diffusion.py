"""Aggregating the maps of a diffusion model as they come, against storing them all; and what each way of reading costs.

    python benchmarks/diffusion.py
    python benchmarks/diffusion.py --fast

The maps have the sizes of Stable Diffusion 1.5 at 512×512 pixels (12 layers: 1280 channels of 8×8 and of 16×16 cells,
640 of 32×32, 320 of 64×64) and 11 steps, the aggregation network random weights, and the result 64×64 cells. The peer
stores everything, as the published code does: each map is enlarged to 64×64, all are kept in one array, and the
network then takes them one after the other, enlarged. Both are given the same maps, made anew by the same random
numbers, so that the diffusion model's own cost is in neither.

Memory is what a run adds at most to the resident size before it, in a new process each. The ratio of times is
streaming to storing; the ceiling is that of the multiply-adds, because a 1×1 convolution in front of an enlargement
does as well as one behind it. `own` works on each map at its own resolution and is another network in effect: its
difference is printed.

What an image costs is measured on the bundled ddpm_mini: one noisy pass, an ensemble of 8, inversion in 50 steps of
which 11 are read.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from measuring import Row, milliseconds, paired, reset_peak, resident, show, threads
from torch import Tensor

import vitfeats as vf
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
from vitfeats.nets.aggregation import AggregationNetwork

MB, STEPS, SIDE = 1e6, 11, 64
LAYERS = ((1280, 8),) * 3 + ((1280, 16),) * 3 + ((640, 32),) * 3 + ((320, 64),) * 3
"""Channels and side of each layer's map."""

SMALL = ((64, 4), (64, 8), (32, 16))


def main() -> None:
    """Print one line a question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--runs", type=int, default=3, help="turns that count; two more warm up")
    parser.add_argument("--fast", "--quick", action="store_true", help="small maps, to see that it works")
    parser.add_argument("--memory", choices=("stream", "store"), help=argparse.SUPPRESS)  # for the new processes
    options = parser.parse_args()
    if options.memory:
        torch.set_num_threads(options.threads)
        print(peak(options.memory, options.fast))
        return
    show(rows(runs=options.runs, number=options.threads, tiny=options.fast))


def rows(*, runs: int = 3, number: int = 2, tiny: bool = False) -> list[Row]:
    """Return the lines, measured on a number of threads."""
    with threads(number):
        found = [*_times(runs, tiny), _own(tiny)]
    found.append(_memory(number, tiny))
    with threads(number):
        return [*found, *_readings(1 if tiny else runs, tiny)]


def layers(tiny: bool) -> Sequence[tuple[int, int]]:
    """Return the layers' maps."""
    return SMALL if tiny else LAYERS


def side(tiny: bool) -> int:
    """Return the side of the result in cells."""
    return 16 if tiny else SIDE


def network(tiny: bool, at: str = "output") -> AggregationNetwork:
    """Return an aggregation network of random weights, each mixing weight another."""
    generator = torch.Generator().manual_seed(0)
    dims, steps = [dim for dim, _ in layers(tiny)], range(3 if tiny else STEPS)
    made = AggregationNetwork(dims, list(steps)[::-1], at=at, generator=generator)  # type: ignore[arg-type] - one of two
    made.mixing_weights.data = torch.rand(made.mixing_weights.shape, generator=generator)
    return made.requires_grad_(False)


def maps(tiny: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Make one map after the other, as a diffusion model would: (step, layer, map)."""
    generator = torch.Generator().manual_seed(1)
    for step in range(3 if tiny else STEPS):
        for layer, (dim, cells) in enumerate(layers(tiny)):
            yield step, layer, torch.randn(1, dim, cells, cells, generator=generator)


@torch.no_grad()
def streamed(made: AggregationNetwork, tiny: bool) -> Tensor:
    """Reduce each map as it comes, and forget it."""
    size, total = (side(tiny), side(tiny)), None
    for step, layer, each in maps(tiny):
        total = made.add(total, step, layer, each, size)
    assert total is not None
    return total


@torch.no_grad()
def stored(made: AggregationNetwork, tiny: bool) -> Tensor:
    """Enlarge and keep every map, then take them one after the other."""
    size = (side(tiny), side(tiny))
    together = torch.empty(1, len(made.steps) * sum(made.dims), *size)
    start = 0
    for _, _, each in maps(tiny):
        together[:, start : start + each.shape[1]] = F.interpolate(each, size=size, mode="bilinear")
        start += each.shape[1]
    mixing, total, start = made.mixing_weights.softmax(0), None, 0
    for index, weight in enumerate(mixing):
        layer = index % len(made.dims)
        part = together[:, start : start + made.dims[layer]]
        start += made.dims[layer]
        reduced = weight * made.reduce(layer, part, size)
        total = reduced if total is None else total + reduced
    assert total is not None
    return total


def peak(what: str, tiny: bool) -> float:
    """Return the megabytes that one run adds at most to the resident size of this process."""
    made = network(tiny)
    with torch.no_grad():  # the first pass of a convolution loads what later ones use
        for layer, (dim, cells) in enumerate(layers(tiny)):
            made.reduce(layer, torch.zeros(1, dim, min(cells, 4), min(cells, 4)), (4, 4))
    start = reset_peak()
    (streamed if what == "stream" else stored)(made, tiny)
    return (resident("VmHWM") - start) / MB


def _times(runs: int, tiny: bool) -> list[Row]:
    made = network(tiny)
    worst = float((streamed(made, tiny) - stored(made, tiny)).abs().max())
    assert worst < 1e-5, f"the two differ by {worst}"
    timed = paired(lambda: streamed(made, tiny), lambda: stored(made, tiny), runs)
    what = f"all maps: streaming / storing (they differ by {worst:.1e})"
    return [Row(what, f"{timed.ratio:.2f}", f"≤ 1.05; {_work(tiny):.2f} (ceiling)", *timed.times)]


def _work(tiny: bool) -> float:
    """Return the multiply-adds of streaming for each of storing."""
    cells, few, many = side(tiny) ** 2, 384 // 4, 384
    inner = cells * (9 * few * few + few * many)
    outer = [(min(s * s, cells) * dim * (few + many), cells * dim * (few + many)) for dim, s in layers(tiny)]
    return sum(a + inner for a, _ in outer) / sum(b + inner for _, b in outer)


def _own(tiny: bool) -> Row:
    """Compare working on the maps' own resolution: cheaper, and another result."""
    own, published = network(tiny, "own"), network(tiny)
    a, b = streamed(own, tiny), streamed(published, tiny)
    alike = float(F.cosine_similarity(a, b).mean())
    timed = paired(lambda: streamed(own, tiny), lambda: streamed(published, tiny), 1)
    return Row(f"at own resolution / at the output's (cosine {alike:.3f})", f"{timed.ratio:.2f}", "none", *timed.times)


def _memory(number: int, tiny: bool) -> Row:
    found = []
    for what in ("stream", "store"):
        command = [sys.executable, __file__, "--memory", what, "--threads", str(number), *["--fast"] * tiny]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(float(ran.stdout))
    ours, peer = found
    return Row("memory: streaming / storing", f"{ours / peer:.3f}", "≤ 0.05", f"{ours:.0f} MB", f"{peer:.0f} MB")


def _readings(runs: int, tiny: bool) -> list[Row]:
    """Return what an image costs, in units of one noisy pass."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    steps = 4 if tiny else 50
    taps = "residual@up2.res0"
    ways = {
        "one noisy pass": vf.load_extractor("ddpm_mini", device="cpu"),
        "ensemble of 8": vf.load_extractor("ddpm_mini", device="cpu", diffusion=DiffusionConfig(time=100, ensemble=8)),
    }
    chain = DiffusionConfig.preset("hyperfeatures", steps=steps, keep=3 if tiny else STEPS)
    inverting = vf.load_extractor("ddpm_mini", device="cpu", diffusion=chain)
    assert isinstance(inverting.model, torch.nn.Module)
    seconds = {
        what: _median(lambda extractor=extractor: extractor(image, taps), runs) for what, extractor in ways.items()
    }
    last = f"{taps}#0"
    seconds[f"inversion in {steps} steps, one layer of the noisiest"] = _median(lambda: inverting(image, last), runs)
    hyper = _hyper(inverting)
    seconds[f"hyperfeatures of {steps} steps, {chain.keep} read"] = _median(lambda: hyper(image), runs)
    one = seconds["one noisy pass"]
    return [
        Row(f"{what} / one noisy pass", f"{took / one:.1f}", "none", milliseconds(took), milliseconds(one))
        for what, took in list(seconds.items())[1:]
    ]


def _hyper(extractor: vf.Extractor) -> HyperfeatureExtractor:
    from vitfeats.extractors.diffusion import DiffusionExtractor
    from vitfeats.extractors.hyperfeatures import layer_channels

    assert isinstance(extractor, DiffusionExtractor)
    dims = list(layer_channels(extractor.model).values())
    made = AggregationNetwork(dims, extractor.diffusion.kept_steps, dim=128, generator=torch.Generator().manual_seed(0))
    return HyperfeatureExtractor.of(extractor, made.requires_grad_(False).eval())


def _median(work, runs: int) -> float:
    taken = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


if __name__ == "__main__":
    main()
