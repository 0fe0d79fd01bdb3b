"""Commands that make pictures: splice, invert."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes, Positional

from vitfeats.cli.shared import aligned, counted, extractor_of, images_of, save_picture, say, settings_of
from vitfeats.configs import (
    ExtractorConfig,
    InvertConfig,
    Preset,
    SpliceConfig,
)
from vitfeats.errors import ConfigError

if TYPE_CHECKING:
    from vitfeats.apps.evaluation import TransferMeasures

SHOWN = {
    "structure ↓": "structure_distance",
    "appearance ↑": "appearance_similarity",
    "foreground ↑": "foreground_iou",
    "patches ↓": "patch_distance",
    "colours ↓": "colour_distance",
}
"""Columns of the table of a splice, with an arrow to the better side, and the measures in them."""


@dataclass(frozen=True)
class Splice:
    """Paint the structure of one image with the appearance of another: train a small generator for this pair.

    Attributes:
        images: Two image files: structure, then appearance.
        sample: Use a sample instead, as for pca; portraits is the pair to begin with.
        out: Folder for the result, losses, history, snapshots and checkpoints (made if missing).
        preset: reference is the published recipe (with --model dino_vitb8); fast the default; draft a first look.
        config: Settings in YAML; "preset: NAME" in it begins from another preset.
        steps: Optimiser steps, in place of the settings'.
        seed: Of first weights and crops.
        resume: Go on from the checkpoint in the folder, if there is one.
        tensorboard: Write losses and pictures for TensorBoard into the folder.
        json: Print one JSON object, with every measure of the result, instead of text.
        options: Model, size and stride of what it sees (default: the settings'), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("splice")
    preset: Preset = "fast"
    config: Path | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    tensorboard: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def run_splice(command: Splice) -> int:
    """Splice two images, and measure the result."""
    from vitfeats.apps.evaluation import transfer_table
    from vitfeats.apps.splice import splice

    options = command.options
    if isinstance(options.size, tuple):
        raise ConfigError(f"expected --size as one number, the shorter side, got {options.size}")
    # What the options say of the model's eyes goes into the settings: they are what the run, and its folder, go by.
    dtype = None if options.dtype == "auto" else options.dtype
    seen = {"size": options.size, "stride": options.stride, "dtype": dtype}
    config = settings_of(command, SpliceConfig, steps=command.steps, **seen)
    images = images_of(command.images, command.sample)
    if len(images) != 2:
        raise ConfigError(f"expected two images, structure and appearance, got {len(images)}")
    extractor = extractor_of(dataclasses.replace(options, size=config.size, stride=config.stride, dtype=config.dtype))
    log = None
    if command.tensorboard:
        from vitfeats.runs import tensorboard

        log = tensorboard(command.out, image_every=config.snapshot_every)
    structure, appearance = images
    result = splice(
        structure,
        appearance,
        model=extractor,
        config=config,
        seed=command.seed,
        callback=log,
        out=command.out,
        resume=command.resume,
        progress=not command.json,
    )
    rows = transfer_table({"result": result.image}, structure, appearance, extractor=extractor)
    facts = {
        "model": extractor.card.name,
        "out": str(command.out / "result.png"),
        "steps": len(result.history),
        "stopped": result.stopped,
        "losses": result.history[-1] if result.history else {},
        "measures": {name: measures.as_dict() for name, measures in rows.items()},
    }
    told = f"{command.out / 'result.png'}: {counted(len(result.history), 'step')}, {result.stopped}"
    say(command.json, facts, f"{told}\n\n{_measures(rows)}")
    return 1 if result.stopped == "not finite" else 0


def _measures(rows: "Mapping[str, TransferMeasures]") -> str:
    """Return a table of the main measures, narrow enough for a terminal; a dash where there is no number."""
    lines = [["", *SHOWN]]
    for name, measures in rows.items():
        values = [getattr(measures, measure) for measure in SHOWN.values()]
        lines.append([name, *("–" if math.isnan(value) else f"{value:.3f}" for value in values)])
    return aligned(lines)


@dataclass(frozen=True)
class Invert:
    """Find a picture that has the features of an image: what do they know of it?

    Attributes:
        images: One image file.
        sample: Use a sample instead, as for pca; its first image.
        out: Folder for pictures, losses and settings (made if missing).
        tap: Which feature, facet@layer. Default: the model's usual tap.
        layers: Invert the tap's facet at each of these layers, and draw them in a row.
        preset: reference has the published numbers; fast is the default; draft a first look.
        config: Settings in YAML; "preset: NAME" in it begins from another preset.
        steps: Optimiser steps, in place of the settings'.
        starts: Pictures to find, each from random weights of its own, in place of the settings'.
        seed: Of first weights and noise.
        json: Print one JSON object instead of text.
        options: Model, device; size and stride are the settings' unless given.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("inversion")
    tap: str | None = None
    layers: tuple[int, ...] = ()
    preset: Preset = "fast"
    config: Path | None = None
    steps: int | None = None
    starts: int | None = None
    seed: int = 0
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def run_invert(command: Invert) -> int:
    """Make the images that have an image's descriptors."""
    from vitfeats.apps.inversion import Inversion, invert, invert_layers, overlapping, strip
    from vitfeats.taps import Tap

    options = command.options
    config = settings_of(command, InvertConfig, steps=command.steps, starts=command.starts, size=options.size)
    if len(command.images) > 1:
        raise ConfigError(f"expected one image, got {len(command.images)}; invert them one by one")
    image = images_of(command.images, command.sample)[0]
    extractor = extractor_of(dataclasses.replace(options, size=config.size))
    if options.stride is None:
        extractor = overlapping(extractor, config)
    tap = Tap.parse(command.tap or extractor.card.default_tap)
    settings: dict[str, Any] = {
        "model": extractor,
        "config": config,
        "seed": command.seed,
        "progress": not command.json,
    }

    def keep(inversion: Inversion) -> Inversion:
        inversion.save(command.out / str(inversion.tap) if command.layers else command.out)
        return inversion

    try:
        if command.layers:
            found = [keep(invert_layers(image, [layer], tap.facet, **settings)[0]) for layer in command.layers]
        else:
            found = [keep(invert(image, tap, **settings))]
    except KeyboardInterrupt as interrupt:
        for unfinished in interrupt.args:  # what it had found until then
            if isinstance(unfinished, Inversion):
                keep(unfinished)
        raise KeyboardInterrupt(f"interrupted; what was found so far is in '{command.out}'") from interrupt
    if command.layers:
        save_picture(strip(found), command.out / "strip.png")
    rows = [{"tap": str(i.tap), "loss": i.losses[i.best], "psnr": i.psnr[i.best]} for i in found]
    facts = {"model": extractor.card.name, "out": str(command.out), "inversions": rows}
    lines = [f"{row['tap']}: loss {row['loss']:.4g}, {row['psnr']:.1f} dB" for row in rows]
    say(command.json, facts, "\n".join([f"pictures in {command.out}", *lines]))
    return 0
