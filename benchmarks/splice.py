"""One optimiser step of Splice: the published loop written plainly, measure after measure, and ours.

Both train the same generator on the same two images (512×384 pixels unless asked), for the same crops, against the same
random weights of timm's ViT-S/8 at 224 px (785 tokens). The plain loop (a) gives every term passes of its own over one
image through the whole network, six a step; computes gradients of the network's weights, which nobody uses; writes out
every attention matrix; hooks four places in each of twelve blocks; and makes self-similarities as full matrices. Each
further line (b to f) adds one measure to those above it. Then ours: (g) the preset "reference", (h) with a bank of 16
views, all of them read before the clock starts, (i) with channels last, and (j), if asked, compiled.

Before anything is timed, the loss of a step must agree in all but (h), which sees other crops. All run in turns, to and
fro; a ratio is the median, over turns, of the plain loop's time over that line's. The whole images, at every 75th step,
are left out: no timed step is one of those.

The ceiling of a ratio is what the multiply-adds allow: those of the plain loop's step over those of the line's, counted
from the shapes of all products, convolutions and attentions that really run, the recomputation in the backward pass of
fused attention among them. Time that goes into memory and not arithmetic is in no ceiling, so a ratio may exceed it.

Memory is what the kernel counts: the process's largest resident size during two steps (VmHWM, reset before) less its
size with the model and the images loaded, in a new process for each line, after a step of a tiny network that loads
what every step needs. Blocks of 64 kB and more are given back as soon as they are freed (MALLOC_MMAP_THRESHOLD_), so
that the figure is what is in use and not what the allocator keeps. Linux only.

The structure loss alone: forward and backward of 3601 tokens (60 × 60 and CLS) of 384 channels, in both forms.

On a busy machine, --threads 1 --cpu-time counts the seconds that the process had, which others do not lengthen by much.

    python benchmarks/splice.py
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from measuring import Row, milliseconds, reset_peak, resident, show, threads
from PIL import ImageOps
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import vitfeats as vf
from vitfeats.apps.splice import Splicer
from vitfeats.configs import SpliceConfig
from vitfeats.nets.skip import SkipNet
from vitfeats.preprocess import load_image
from vitfeats.views import blurred, flipped, jittered, numbered, square_crop

Which = Literal["structure", "appearance"]

MB, SIDE, DIM, VIEWS, STEPS = 1e6, 60, 384, 16, 2
MEASURES = {
    "frozen": "frozen weights",
    "fused": "fused attention",
    "shared": "keys and CLS from one pass",
    "batched": "one batch of both painted, one of both targets",
    "lean": "two hooks, no (n, n) matrix",
}
"""What is added to the plain loop, in this order."""

PLAIN = dict(zip("abcdef", range(len(MEASURES) + 1), strict=True))
"""Lines of the plain loop: how many of the measures they have."""

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "g": ("ours, preset reference", {}),
    "h": (f"ours, a bank of {VIEWS} views", {"views": VIEWS}),
    "i": ("ours, channels last", {"channels_last": True}),
    "j": ("ours, compiled", {"compile": True}),
}
BARS = {"g": "≥ 1.8", "h": "≥ 2.6"}
MEMORY_BARS = {"g": "≤ 0.55"}


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--runs", type=int, default=7, help="turns that count; two more warm up")
    parser.add_argument("--size", type=int, nargs=2, default=(384, 512), help="height and width of the images")
    parser.add_argument("--fast", "--quick", action="store_true", help="a tiny network, to see that it works")
    parser.add_argument("--compile", action="store_true", help="also compile the generator, which takes minutes")
    parser.add_argument("--only", default="bcdefghi", help="lines to measure against (a), by their letters")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's seconds, not the wall's")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # what the new processes are asked for
    options = parser.parse_args()
    size, runs = ((48, 64), 2) if options.fast else (tuple(options.size), options.runs)
    if options.memory:
        torch.set_num_threads(options.threads)
        print(peak(options.memory, size, options.fast))
        return
    letters = options.only + "j" * (options.compile and "j" not in options.only)
    print(f"Splice, {size[1]}×{size[0]} pixels, {options.threads} threads, {runs} turns\n")
    found = rows(
        size=size,
        runs=runs,
        number=options.threads,
        tiny=options.fast,
        letters=letters,
        memory=not options.no_memory,
        clock=time.process_time if options.cpu_time else time.perf_counter,
    )
    if options.markdown:
        from run import markdown

        print(markdown(found))
    else:
        show(found)


def rows(
    *,
    size: tuple[int, int] = (384, 512),
    runs: int = 7,
    number: int = 2,
    tiny: bool = False,
    letters: str = "bcdefghi",
    memory: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Return the lines of one step and of the structure loss, on a number of threads; ``size`` is (height, width)."""
    with threads(number):
        scene = Scene.made(size, tiny)
        loops = {letter: loop(letter, replace(scene, model=copy.deepcopy(scene.model))) for letter in "a" + letters}
        _agree(loops)
        found = [*_steps(loops, runs, clock), _structure(6 if tiny else SIDE, runs, clock)]
    return found + (_memory(letters, size, number, tiny) if memory else [])


@dataclass(frozen=True)
class Scene:
    """What every loop is given: the network, the two images (3, height, width), and the published settings."""

    model: VisionTransformer
    images: dict[Which, Tensor]
    config: SpliceConfig
    seed: int = 0

    @classmethod
    def made(cls, size: tuple[int, int], tiny: bool) -> "Scene":
        """Return photographs of a size, and a network of random weights; a tiny one sees 32 px."""
        torch.manual_seed(0)
        shrunk: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3} if tiny else {}
        model = timm.create_model("vit_small_patch8_224", num_classes=0, dynamic_img_size=True, **shrunk)
        assert isinstance(model, VisionTransformer)
        height, width = size
        pictures: dict[Which, Any] = {"structure": vf.samples.china(), "appearance": vf.samples.flower()}
        images: dict[Which, Tensor] = {}
        for which, picture in pictures.items():
            images[which] = load_image(ImageOps.fit(picture, (width, height)))
        return cls(model.eval(), images, SpliceConfig.preset("reference", size=32 if tiny else 224))

    def splicer(self, **changes: Any) -> Splicer:
        """Return our run on it, at step 1: from there on all three terms of the crops count."""
        extractor = vf.load_extractor(self.model.requires_grad_(False))
        splicer = Splicer(
            self.images["structure"],
            self.images["appearance"],
            extractor=extractor,
            config=replace(self.config, **changes),
            seed=self.seed,
        )
        splicer.done = 1
        return splicer

    def crop(self, which: Which, step: int) -> Tensor:
        """Return the augmented crop that a step sees, the same for every loop."""
        config, rng = self.config, numbered(self.seed, 1, ("structure", "appearance").index(which), step)
        image = flipped(self.images[which][None], config.flip, rng)
        if which == "structure":
            image = blurred(jittered(image, config.jitter, rng), config.blur, rng)
        return square_crop(image, config.smallest_crop, rng)


class OurLoop:
    """Ours, one step after the other."""

    def __init__(self, scene: Scene, **changes: Any) -> None:
        self.splicer = scene.splicer(**changes)
        if self.splicer.config.views:  # read what the bank holds before the clock starts
            views: list[tuple[Which, int | None]] = [("structure", n) for n in range(VIEWS)]
            self.splicer._read_wanted({*views, *(("appearance", n) for _, n in views)})

    def loss(self, step: int) -> Tensor:
        """Return the loss of a step, with its graph."""
        return self.splicer.objective(step)["loss"]

    def step(self) -> None:
        """Take one step that has no whole images."""
        self.splicer.done += self.splicer.done % self.splicer.config.whole_every == 0
        self.splicer.step()


class PlainLoop:
    """The published loop as one would write it down, with the first so many of :data:`MEASURES`."""

    def __init__(self, scene: Scene, measures: int = 0) -> None:
        names = list(MEASURES)[:measures]
        self.fused, self.shared, self.batched, self.lean = (name in names for name in list(MEASURES)[1:])
        self.scene, self.model, self.done = scene, scene.model.requires_grad_("frozen" not in names), 1
        for block in self.model.blocks.children():
            block.attn.fused_attn = self.fused  # type: ignore[union-attr] - a block has one
        drawn = SkipNet(channels=scene.config.channels, generator=numbered(scene.seed, 0))  # what ours begins with
        self.generator = PlainSkipNet(scene.config.channels)
        self.generator.load_state_dict(drawn.state_dict())
        self.optimiser = torch.optim.Adam(self.generator.parameters(), lr=scene.config.lr, betas=scene.config.betas)
        expected = vf.load_extractor(self.model).preprocess
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (expected.mean, expected.std))

    def loss(self, step: int) -> Tensor:
        """Return the loss of a step, with its graph."""
        crop, other = self.scene.crop("structure", step), self.scene.crop("appearance", step)
        painted, repainted = self.generator(crop), self.generator(other)
        if self.shared:
            (keys, cls), (remade, _) = self.looked(painted, repainted)
            with torch.no_grad():
                (shape, _), (own, look) = self.looked(crop, other)
        else:
            with torch.no_grad():
                shape = self.keys(crop)
            keys = self.keys(painted)
            cls = self.cls(painted)
            with torch.no_grad():
                look = self.cls(other)
                own = self.keys(other)
            remade = self.keys(repainted)
        structure = _factored(keys, shape) if self.lean else F.mse_loss(_similarities(keys), _similarities(shape))
        config = self.scene.config
        return (
            config.appearance * F.mse_loss(cls, look)
            + config.structure * structure
            + config.identity * F.mse_loss(remade, own)
        )

    def step(self) -> None:
        """Take one step that has no whole images."""
        self.done += self.done % self.scene.config.whole_every == 0
        loss = self.loss(self.done)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.done += 1

    def keys(self, image: Tensor) -> Tensor:
        """Return the last block's keys (batch, n, dim) of an image, CLS in front."""
        return self.passed(self.network(image))["qkv"][-1].chunk(3, dim=2)[1]

    def cls(self, image: Tensor) -> Tensor:
        """Return the last block's CLS (batch, dim) of an image."""
        return self.passed(self.network(image))["block"][-1][:, 0]

    def looked(self, *images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return keys and CLS of each of several images, out of one pass for each or for all."""
        pixels = [self.network(image) for image in images]
        found = []
        for seen in map(self.passed, [torch.cat(pixels)] if self.batched else pixels):
            keys, cls = seen["qkv"][-1].chunk(3, dim=2)[1], seen["block"][-1][:, 0]
            found += [(keys[i : i + 1], cls[i : i + 1]) for i in range(len(keys))]
        return found

    def network(self, image: Tensor) -> Tensor:
        """Return an image as the network wants it."""
        side = self.scene.config.size
        resized = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)
        return (resized - self.mean) / self.std

    def passed(self, pixels: Tensor) -> dict[str, list[Tensor]]:
        """Run the whole network; return what the hooks saw."""
        seen: dict[str, list[Tensor]] = {"block": [], "map": [], "qkv": [], "attention": []}
        handles = []

        def hook(module: nn.Module, name: str) -> None:
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                seen[name].append(output)

            handles.append(module.register_forward_hook(keep))

        for block in list(self.model.blocks.children())[-1 if self.lean else 0 :]:
            attention: Any = block.attn
            hook(block, "block")
            hook(attention.qkv, "qkv")
            if not self.lean:
                hook(attention, "attention")
                hook(attention.attn_drop, "map")  # only unfused attention passes by here
        self.model(pixels)
        for handle in handles:
            handle.remove()
        return seen


class PlainSkipNet(nn.Module):
    """The generator with its concatenations written out. Takes the weights of :class:`SkipNet` by their names."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        inside: _PlainScale | None = None
        for scale in reversed(range(len(channels))):
            inside = _PlainScale(channels[scale - 1] if scale else 3, channels[scale], inside)
        assert inside is not None
        self.body = inside
        self.head = nn.Conv2d(channels[0], 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return an image of the same size."""
        return torch.sigmoid(self.head(self.body(image)))


class _PlainScale(nn.Module):
    def __init__(self, before: int, width: int, inside: "_PlainScale | None") -> None:
        super().__init__()
        deep = width if inside is None else inside.width
        self.width = width
        self.beside = _layer(before, 4, 1)
        self.down = nn.Sequential(_layer(before, width, 3, stride=2), _layer(width, width, 3))
        self.inside = inside
        self.join = nn.BatchNorm2d(4 + deep, track_running_stats=False)
        self.mix = _layer(4 + deep, width, 3)
        self.polish = _layer(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.down(x)
        if self.inside is not None:
            deep = self.inside(deep)
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear")[..., : x.shape[2], : x.shape[3]]
        return self.polish(self.mix(self.join(torch.cat([self.beside(x), deep], dim=1))))


def _layer(before: int, after: int, side: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, side, stride, padding=side // 2),
        nn.BatchNorm2d(after, track_running_stats=False),
        nn.LeakyReLU(0.2, inplace=True),
    )


def _similarities(keys: Tensor) -> Tensor:
    norms = keys.norm(dim=2, keepdim=True)
    return keys @ keys.mT / (norms @ norms.mT).clamp_min(1e-8)


def _factored(keys: Tensor, wanted: Tensor) -> Tensor:
    k, t = F.normalize(keys, dim=2), F.normalize(wanted, dim=2)
    d, s = k - t, k + t
    crossed = s.mT @ d
    return 0.5 * ((d.mT @ d * (s.mT @ s)).sum() + (crossed * crossed.mT).sum()) / keys.shape[1] ** 2


def loop(letter: str, scene: Scene) -> PlainLoop | OurLoop:
    """Return the loop of a line, on a scene of its own: it sets what the network trains and how it attends."""
    return PlainLoop(scene, PLAIN[letter]) if letter in PLAIN else OurLoop(scene, **OURS[letter][1])


def named(letter: str) -> str:
    """Return what a line measures."""
    if letter in OURS:
        return f"({letter}) {OURS[letter][0]}"
    return f"({letter}) plain" if letter == "a" else f"({letter}) + {list(MEASURES.values())[PLAIN[letter] - 1]}"


class Counting(TorchDispatchMode):
    """Counts the multiply-adds that run, of all products, convolutions and attentions.

    Attributes:
        total: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
        return result


def counted(work: Callable[[], object]) -> int:
    """Return the multiply-adds of a call."""
    with Counting() as counting:
        work()
    return counting.total


def in_turns(
    works: Mapping[str, Callable[[], object]], runs: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of each, run one after the other, to and fro; the first two turns warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for run in range(runs + 2):
        for name in list(works)[:: 1 if run % 2 else -1]:
            start = clock()
            works[name]()
            times[name].append(clock() - start)
    return {name: kept[2:] for name, kept in times.items()}


def peak(what: str, size: tuple[int, int], tiny: bool) -> float:
    """Return the megabytes that a line's steps, or one form of the structure loss, add at most to this process."""
    small = Scene.made((48, 64), True)
    for letter in "ag":
        loop(letter, small).step()
    if what in ("matrix", "factored"):
        work = _both_ways(what, 6 if tiny else SIDE)
        start = reset_peak()
        work()
        return (resident("VmHWM") - start) / MB
    scene = Scene.made(size, tiny)
    start = reset_peak()
    one = loop(what, scene)
    for _ in range(STEPS):
        one.step()
    return (resident("VmHWM") - start) / MB


@torch.no_grad()
def _agree(loops: Mapping[str, PlainLoop | OurLoop]) -> None:
    """Print the loss of a step, and end here if it is not one and the same."""
    losses = {letter: float(one.loss(1)) for letter, one in loops.items() if letter != "h"}
    apart = max(abs(loss / losses["a"] - 1) for loss in losses.values())
    print(f"loss at step 1: {losses['a']:.6g}; all agree within {apart:.1e}\n")
    if not apart <= 1e-4:
        raise SystemExit(f"expected one loss of all, got {losses}")


def _steps(loops: Mapping[str, PlainLoop | OurLoop], runs: int, clock: Callable[[], float]) -> list[Row]:
    # What is compiled cannot be counted; its arithmetic is that of (g).
    counts = {letter: counted(one.step) for letter, one in loops.items() if letter != "j"}
    print("1e9 multiply-adds a step:", ", ".join(f"({letter}) {n / 1e9:.4g}" for letter, n in counts.items()), "\n")
    times = in_turns({letter: one.step for letter, one in loops.items()}, runs, clock)
    found = []
    for letter in list(times)[1:]:
        allowed = counts["a"] / counts.get(letter, counts.get("g", counts["a"]))
        against = "; ".join([*([BARS[letter]] if letter in BARS else []), f"{allowed:.2f} (ceiling)"])
        found.append(_row(f"step: plain / {named(letter)}", times[letter], times["a"], against))
    return found


def _structure(side: int, runs: int, clock: Callable[[], float]) -> Row:
    works = {form: _both_ways(form, side) for form in ("factored", "matrix")}
    allowed = counted(works["matrix"]) / counted(works["factored"])
    times = in_turns(works, runs, clock)
    what = f"structure_loss, {side * side + 1} tokens, both ways: matrix / factored"
    return _row(what, times["factored"], times["matrix"], f"{allowed:.2f} (ceiling)")


def _row(what: str, ours: Sequence[float], peer: Sequence[float], against: str) -> Row:
    ratio = statistics.median(b / a for a, b in zip(ours, peer, strict=True))
    return Row(what, f"{ratio:.2f}", against, *(milliseconds(statistics.median(side)) for side in (ours, peer)))


def _both_ways(form: str, side: int) -> Callable[[], object]:
    """Return the forward and backward pass of the structure loss of random keys."""
    rng = torch.Generator().manual_seed(0)
    grid, frames = vf.PatchGrid(side, side, 8, 8), (vf.Frame((8 * side, 8 * side), (8 * side, 8 * side)),)
    made, wanted = (
        vf.Descriptor(
            torch.randn(1, side * side, DIM, generator=rng).requires_grad_(trained),
            grid,
            frames,
            vf.Tap("key", 11),
            "numbers",
            torch.randn(1, DIM, generator=rng),
        )
        for trained in (True, False)
    )

    def work() -> None:
        made.features.grad = None
        vf.structure_loss(made, wanted, form=form).backward()  # type: ignore[arg-type] - one of its literals

    return work


def _memory(letters: str, size: tuple[int, int], number: int, tiny: bool) -> list[Row]:
    """Return the rows of memory, each measured in a new process."""
    plain = _asked("a", size, number, tiny)
    found = []
    for letter in letters:
        ours = _asked(letter, size, number, tiny)
        what = f"memory of a step: {named(letter)} / plain"
        found.append(
            Row(what, f"{ours / plain:.2f}", MEMORY_BARS.get(letter, "none"), f"{ours:.0f} MB", f"{plain:.0f} MB")
        )
    factored, matrix = (_asked(form, size, number, tiny) for form in ("factored", "matrix"))
    what = "memory of structure_loss, both ways: factored / matrix"
    return [*found, Row(what, f"{factored / matrix:.2f}", "≤ 0.4", f"{factored:.0f} MB", f"{matrix:.0f} MB")]


def _asked(what: str, size: tuple[int, int], number: int, tiny: bool) -> float:
    command = [sys.executable, __file__, "--memory", what, "--threads", str(number), "--size", *map(str, size)]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(
        command + ["--fast"] * tiny, capture_output=True, text=True, check=True, env=os.environ | settings
    )
    return float(ran.stdout)


if __name__ == "__main__":
    main()
