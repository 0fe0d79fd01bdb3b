"""Commands that train models: train-diffusion, train-hyperfeatures, pretrain."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tyro.conf import OmitArgPrefixes, Positional

from vitfeats.cli.shared import counted, extractor_of, say
from vitfeats.configs import (
    DiffusionConfig,
    ExtractorConfig,
    PretrainConfig,
    TrainDiffusionConfig,
    TrainHyperfeaturesConfig,
    read_config,
)
from vitfeats.errors import ConfigError

if TYPE_CHECKING:
    from vitfeats.apps.evaluation import Pair

C = TypeVar("C")

JUDGED = 50  # held-out pictures that a training of hyperfeatures looks at


@dataclass(frozen=True)
class TrainDiffusion:
    """Train a small diffusion model of pixels, such as the bundled ddpm_mini.

    Attributes:
        pictures: A folder (with the folders in it) or a tar file of pictures.
        out: Folder for the history, checkpoints and the model (made if missing).
        held_out: Text file with the names of pictures to judge by and not to learn from, as paths without suffix.
        config: Settings in YAML.
        steps: Optimiser steps, in place of the settings'.
        minutes: Stop after so many minutes, to be resumed.
        seed: Of first weights, crops and noise.
        resume: Go on from the checkpoint in the folder, if there is one.
        device: Where to train.
        json: Print one JSON object instead of text.
    """

    pictures: Positional[Path]
    out: Path = Path("diffusion")
    held_out: Path | None = None
    config: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    resume: bool = False
    device: str = "cpu"
    json: bool = False


def diffusion(command: TrainDiffusion) -> int:
    """Train a diffusion model of pixels."""
    from vitfeats.apps.train_diffusion import train_diffusion
    from vitfeats.pictures import read_names, read_pictures

    config = _config(command, TrainDiffusionConfig, steps=command.steps, minutes=command.minutes)
    kept = [] if command.held_out is None else read_names(command.held_out)
    side = round(1.25 * config.size)  # so that crops differ
    pictures = read_pictures(command.pictures, side=side, without=kept)
    held_out = read_pictures(command.pictures, side=side, only=kept) if kept else {}
    result = train_diffusion(
        list(pictures.values()),
        config=config,
        held_out=list(held_out.values()),
        seed=command.seed,
        out=command.out,
        resume=command.resume,
        progress=not command.json,
        device=command.device,
    )
    judged = [record["held_out"] for record in result.history if "held_out" in record]
    facts = {
        "out": str(command.out / "model"),
        "pictures": len(pictures),
        "steps": result.history[-1]["step"] + 1 if result.history else 0,
        "stopped": result.stopped,
        "loss": result.history[-1]["loss"] if result.history else None,
        "held_out": judged[-1] if judged else None,
    }
    told = (
        f"{facts['out']}: {counted(facts['steps'], 'step')} over {counted(len(pictures), 'picture')}, {result.stopped}"
    )
    say(command.json, facts, told + (f"; held-out loss {judged[-1]:.4f}" if judged else ""))
    return 1 if result.stopped == "not finite" else 0


@dataclass(frozen=True)
class TrainHyperfeatures:
    """Train the network that makes one map of a diffusion model's layers and steps, on pairs of pictures.

    Attributes:
        pictures: A folder (with the folders in it) or a tar file of pictures, learned from with random warps of them.
            With --pairs, the folder that the image paths in it begin at.
        pairs: JSON file of pairs with points that show the same, as Diffusion Hyperfeatures has them, in place of
            warps.
        out: Folder for the history, checkpoints, the model's maps and aggregation.pt (made if missing).
        held_out: Text file with the names of pictures to judge by and not to learn from, as paths without suffix: at
            most 50 of them, evenly spread, and warps of them.
        config: Settings in YAML.
        diffusion: How the diffusion model reads, in YAML. What it does not set is as published: inversion, 50 steps of
            which 11 are kept.
        steps: Optimiser steps, in place of the settings'.
        seed: Of first weights, the order and the warps.
        resume: Go on from the checkpoint in the folder, if there is one.
        json: Print one JSON object instead of text.
        options: Model (default ddpm_mini; any diffusion model), size, device.
    """

    pictures: Positional[Path]
    pairs: Path | None = None
    out: Path = Path("aggregation")
    held_out: Path | None = None
    config: Path | None = None
    diffusion: Path | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def aggregation(command: TrainHyperfeatures) -> int:
    """Train an aggregation network."""
    from vitfeats.apps.evaluation import WarpedImages
    from vitfeats.apps.train_hyperfeatures import train_hyperfeatures
    from vitfeats.pictures import read_names, read_pictures

    config = _config(command, TrainHyperfeaturesConfig, steps=command.steps)
    diffusion = DiffusionConfig.preset("hyperfeatures")
    if command.diffusion is not None:
        diffusion = read_config(command.diffusion, DiffusionConfig, base=diffusion)
    options = dataclasses.replace(command.options, model=command.options.model or "ddpm_mini")
    extractor = extractor_of(options, diffusion=diffusion)
    size = extractor.preprocess.size
    side = 2 * (size if isinstance(size, int) else min(size))  # so that warps that enlarge are sharp
    kept = [] if command.held_out is None else read_names(command.held_out)
    pairs: Sequence[Pair]
    if command.pairs is None:
        pairs = WarpedImages(list(read_pictures(command.pictures, side=side, without=kept).values()), seed=command.seed)
    else:
        pairs = _annotated(command.pairs, command.pictures, kept)
    validation: Sequence[Pair] = ()
    if kept:
        judged_by = kept if len(kept) <= JUDGED else [kept[n * len(kept) // JUDGED] for n in range(JUDGED)]
        held_out = read_pictures(command.pictures, side=side, only=judged_by)
        validation = WarpedImages(list(held_out.values()), seed=command.seed + 1)
    result = train_hyperfeatures(
        pairs,
        model=extractor,
        config=config,
        validation=validation,
        seed=command.seed,
        out=command.out,
        resume=command.resume,
        progress=not command.json,
    )
    judged = [record["pck"] for record in result.history if "pck" in record]
    facts = {
        "model": extractor.card.name,
        "out": str(command.out / "aggregation.pt"),
        "pairs": len(pairs),
        "steps": result.history[-1]["step"] + 1 if result.history else 0,
        "stopped": result.stopped,
        "loss": result.history[-1]["loss"] if result.history else None,
        "pck": judged[-1] if judged else None,
    }
    told = f"{facts['out']}: {counted(facts['steps'], 'step')} over {counted(len(pairs), 'pair')}, {result.stopped}"
    say(command.json, facts, told + (f"; held-out PCK@0.1 {judged[-1]:.3f}" if judged else ""))
    return 1 if result.stopped == "not finite" else 0


@dataclass(frozen=True)
class Pretrain:
    """Train a vision transformer on your own pictures, without labels or with them.

    Attributes:
        data: A folder (with the folders in it) or a tar file of pictures; folders are classes, where labels are used.
        out: Folder for the history, checkpoints, curves and the model (made if missing).
        held_out: Text file with the names of pictures to judge by and not to learn from, as paths without suffix.
        config: Settings in YAML.
        steps: Optimiser steps, in place of the settings'.
        minutes: Minutes to train for, in place of steps.
        seed: Of first weights, the order, crops and masks.
        resume: Go on from the checkpoint in the folder, if there is one.
        device: Where to train.
        json: Print one JSON object instead of text.
    """

    data: Path
    out: Path = Path("pretrained")
    held_out: Path | None = None
    config: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    resume: bool = False
    device: str = "auto"
    json: bool = False


def pretrained(command: Pretrain) -> int:
    """Train a vision transformer."""
    from vitfeats.api import device_of
    from vitfeats.apps.pretrain import Collection, pretrain
    from vitfeats.pictures import open_pictures, read_names, read_pictures

    config = _config(command, PretrainConfig, steps=command.steps, minutes=command.minutes)
    kept = [] if command.held_out is None else read_names(command.held_out)
    broken: dict[str, str] = {}
    pictures = open_pictures(command.data, side=config.side, without=kept, broken=broken)
    collection = Collection.of(pictures, unlabelled=config.unlabelled)
    held_out = None
    if kept:
        judged_by = read_pictures(command.data, side=config.side, only=kept, broken=broken)
        held_out = Collection.of(judged_by, classes=collection.classes)
    result = pretrain(
        collection,
        config=config,
        held_out=held_out,
        seed=command.seed,
        out=command.out,
        resume=command.resume,
        progress=not command.json,
        device=device_of(command.device),
    )
    measured = [record["knn"] for record in result.history if "knn" in record]
    facts = {
        "out": str(command.out / "model"),
        "pictures": len(pictures),
        "classes": len(collection.classes),
        "failed": broken,
        "steps": result.history[-1]["step"] + 1 if result.history else 0,
        "stopped": result.stopped,
        "loss": result.history[-1]["loss"] if result.history else None,
        "knn": measured[-1] if measured else None,
    }
    told = (
        f"{facts['out']}: {counted(facts['steps'], 'step')} over {counted(len(pictures), 'picture')}, {result.stopped}"
    )
    say(command.json, facts, told + (f"; held-out k-NN accuracy {measured[-1]:.3f}" if measured else ""))
    for name, reason in broken.items():
        print(f"vitfeats: skipped '{name}': {reason}", file=sys.stderr)
    return 0 if result.stopped == "done" else 1


def _config(command: Any, kind: type[C], **given: Any) -> C:
    """Return the defaults, changed by the command's file, changed by what was given on the command line."""
    config = kind() if command.config is None else read_config(command.config, kind)
    return dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[type-var]


def _annotated(file: Path, folder: Path, without: Sequence[str]) -> "list[Pair]":
    """Return the pairs of a list that show none of the pictures of these names."""
    from vitfeats.apps.evaluation import read_pairs

    left_out = {folder / name for name in without}
    read = read_pairs(file, folder)
    pairs = [p for p in read if not left_out & {Path(str(i)).with_suffix("") for i in (p.image_a, p.image_b)}]
    if not pairs:
        raise ConfigError(f"expected pairs without held-out pictures in '{file}', got {len(read)} with them")
    return pairs
