"""How soon the preset "fast" is where "reference" is after 500 steps: losses of the whole pictures over CPU time.

The published recipe and the default are run on the same pairs with the same model, each from three seeds. Every 25
steps the made picture is held, uncropped, against the uncropped images: structure_loss of key@11 and appearance_loss of
cls@11, the two that the published objective is made of. Time is the processor time of the steps on one thread, without
that of the measuring, so that what else the machine does counts little.

    python benchmarks/splice_presets.py --out runs              # hours: about 20 minutes a run of the reference
    python benchmarks/splice_presets.py --out runs --show       # the table and the curves of what is there

    python benchmarks/splice_presets.py --deviations            # 10 minutes: what each deviation of "fast" brings

Each run is a file PRESET_PAIR_SEED.jsonl; one that is complete is not run again.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

import vitfeats as vf
from vitfeats.apps.evaluation import colour_distance
from vitfeats.apps.splice import Splicer
from vitfeats.configs import Preset, SpliceConfig
from vitfeats.preprocess import to_pil

EVERY, SEEDS = 25, (0, 1, 2)
STEPS: dict[Preset, int] = {"reference": 500, "fast": 150}
COLOURS = {"reference": "#888888", "fast": "#3f51b5"}


def _half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2))


PAIRS: dict[str, Callable[[], tuple[Image.Image, Image.Image]]] = {
    "portraits": vf.samples.portrait_pair,
    # At half their size: the reference works at full resolution, and its time grows with the number of pixels.
    "food": lambda: (_half(vf.samples.cat()), vf.samples.coffee().resize((225, 150))),
}


def main() -> None:
    """Run what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("splice_presets"), help="folder of the runs")
    parser.add_argument("--show", action="store_true", help="print the table and write curves.svg")
    parser.add_argument("--deviations", action="store_true", help="print the table of deviations")
    options = parser.parse_args()
    if options.deviations:
        torch.set_num_threads(1)
        deviations()
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.show:
        torch.set_num_threads(1)
        for seed in SEEDS:
            for pair in PAIRS:
                for preset in STEPS:
                    run(preset, pair, seed, options.out)
    table(options.out)
    curves(options.out).savefig(options.out / "curves.svg")


def run(preset: Preset, pair: str, seed: int, folder: Path) -> None:
    """Make one run, and write a record every 25 steps and the picture at the end."""
    path = folder / f"{preset}_{pair}_{seed}.jsonl"
    if len(records(path)) > STEPS[preset] // EVERY:
        return
    extractor = vf.load_extractor("mini", size=224, device="cpu")
    start = time.process_time()
    splicer = Splicer(*PAIRS[pair](), extractor=extractor, config=SpliceConfig.preset(preset), seed=seed)
    spent = time.process_time() - start
    with path.open("w") as file:
        for step in range(STEPS[preset] + 1):
            if step % EVERY == 0:
                file.write(json.dumps({"step": step, "seconds": spent, **splicer.uncropped()}) + "\n")
                file.flush()
            if step < STEPS[preset]:
                start = time.process_time()
                splicer.step()
                spent += time.process_time() - start
    to_pil(splicer.render()).save(path.with_suffix(".png"))


DEVIATIONS: dict[str, dict[str, Any]] = {
    "fast, 100 steps": {},
    "full resolution": {"working_size": None},
    "painted anew, not added": {"residual": False},
    "new crops at every step": {"views": 0},
    "flips, colours, blur": {"flip": 0.5, "jitter": 0.5, "blur": 0.2},
    "resized as published": {"resize": "published"},
    "no transport": {"transport": 0.0},
    "weights 10 and 1, not relative": {"relative": False, "appearance": 10.0, "structure": 1.0},
    "identity term": {"identity": 1.0},
    "whole images every 75 steps": {"whole_appearance": 1.0, "whole_structure": 2.0},
    "Adam as published": {"lr": 0.002, "betas": (0.0, 0.99), "schedule": "constant"},
}
"""What "fast" changes, each put back to the published value alone."""


def deviations(steps: int = 100) -> None:
    """Print one line for each deviation: the portraits, seed 0, with that one put back."""
    structure, appearance = PAIRS["portraits"]()
    print(
        "| put back | seconds | structure | appearance | colour distance |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for label, changes in DEVIATIONS.items():
        extractor = vf.load_extractor("mini", size=224, device="cpu")
        config = SpliceConfig.preset("fast", steps=steps, **changes)
        splicer = Splicer(structure, appearance, extractor=extractor, config=config)
        start = time.process_time()
        while splicer.done < steps:
            splicer.step()
        spent, end = time.process_time() - start, splicer.uncropped()
        apart = colour_distance(splicer.render(), appearance)
        print(f"| {label} | {spent:.0f} | {end['structure']:.3f} | {end['appearance']:.2f} | {apart:.3f} |", flush=True)


def records(path: Path) -> list[dict[str, Any]]:
    """Return what a run has written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def arrival(goal: dict[str, Any], course: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first record from which on both losses stay at or below the goal's."""
    there = None
    for record in reversed(course):
        if any(record[name] > goal[name] for name in ("structure", "appearance")):
            break
        there = record
    return there


def table(folder: Path) -> None:
    """Print one line a pair and seed: where the reference is at its end, and when fast is there, to stay."""
    head = (
        "pair",
        "seed",
        "reference: s",
        "structure",
        "appearance",
        "fast: s",
        "step",
        "ratio",
        "fast's end: structure",
    )
    print(f"| {' | '.join(head)} | appearance |")
    print(f"|{' --- |' * 10}")
    for pair in PAIRS:
        for seed in SEEDS:
            reference, fast = (records(folder / f"{preset}_{pair}_{seed}.jsonl") for preset in STEPS)
            if not reference or not fast:
                continue
            goal, last = reference[-1], fast[-1]
            there = arrival(goal, fast)
            when = ("never", "–", "–")
            if there is not None:
                when = (f"{there['seconds']:.0f}", str(there["step"]), f"{there['seconds'] / goal['seconds']:.3f}")
            print(
                f"| {pair} | {seed} | {goal['seconds']:.0f} | {goal['structure']:.3f} | {goal['appearance']:.2f} | "
                f"{' | '.join(when)} | {last['structure']:.3f} | {last['appearance']:.2f} |"
            )


def curves(folder: Path) -> Figure:
    """Return both losses over time, a line a run."""
    figure = Figure(figsize=(9, 3 * len(PAIRS)))
    axes = figure.subplots(len(PAIRS), 2, squeeze=False)
    for row, pair in zip(axes, PAIRS, strict=True):
        for axis, loss in zip(row, ("structure", "appearance"), strict=True):
            for preset, colour in COLOURS.items():
                for seed in SEEDS:
                    course = records(folder / f"{preset}_{pair}_{seed}.jsonl")
                    if course:
                        x = [max(1.0, record["seconds"]) for record in course]  # the beginning, on a logarithmic axis
                        y = [record[loss] for record in course]
                        axis.plot(x, y, color=colour, lw=1.3, label=preset if seed == 0 else None)
            axis.set(
                xscale="log",
                yscale="log",
                title=f"{pair}: {loss} loss of the whole picture",
                xlabel="processor seconds",
            )
            axis.legend(frameon=False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
