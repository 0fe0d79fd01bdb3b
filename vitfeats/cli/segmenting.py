"""The command of co-segmentation."""

import dataclasses
import sys
from typing import Any

from vitfeats.cli.shared import extractor_of, images_of, say, settings_of
from vitfeats.commands import Cosegment
from vitfeats.configs import CosegmentConfig
from vitfeats.errors import ConfigError


def run_cosegment(command: Cosegment) -> int:
    """Cut out what images share; a file that cannot be read is named and left out."""
    from vitfeats.apps.cosegmentation import cosegment, halved, part_cosegment

    options = command.options
    changes = {
        "size": options.size,
        "stride": options.stride,
        "refine": command.refine,
        "outliers": command.outliers,
    }
    config = settings_of(command, CosegmentConfig, **changes)
    if bool(command.images) == (command.sample is not None):
        raise ConfigError("expected images, a folder of them, or --sample NAME; for example --sample portraits")
    images = _files(command)
    if command.sample is not None:
        images += images_of((), command.sample)
    extractor = extractor_of(dataclasses.replace(options, size=config.size, stride=config.stride))
    settings: dict[str, Any] = {
        "model": halved(extractor) if config.stride is None else extractor,
        "config": config,
        "seed": command.seed,
        "batch_size": command.batch_size,
        "skip_broken": True,
        "progress": not command.json and len(images) > 1,
    }
    found = part_cosegment(images, command.parts, **settings) if command.parts else cosegment(images, **settings)
    written = found.save(command.out)
    failed = {str(images[place]): reason for place, reason in (found.failed or {}).items()}
    empty = [segment.name for segment in found if not segment.share]
    facts = {
        "out": str(written),
        "model": found.model,
        "tap": found.tap,
        "refined": found.refined,
        "images": len(found),
        "clusters": len(found.votes),
        "parts": found.num_parts,
        "empty": empty,
        "failed": failed,
    }
    what = f", {found.num_parts} parts" if found.num_parts else ""
    nothing = f"; nothing found in {len(empty)} of them" if empty else ""
    say(command.json, facts, f"{command.out}: masks of {len(found)} image(s){what}, {found.refined}{nothing}")
    for reason in failed.values():
        print(f"vitfeats: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _files(command: Cosegment) -> list[Any]:
    """Return the files that are named, and those in the folders that are, but for what an earlier run wrote."""
    from vitfeats.apps.cosegmentation import WRITTEN
    from vitfeats.pictures import picture_files

    own = {(command.out / name).resolve() for name in WRITTEN}
    found: list[Any] = []
    for path in command.images:
        inside = picture_files(path) if path.is_dir() else [path]
        kept = [file for file in inside if not path.is_dir() or not own & {file.resolve(), *file.resolve().parents}]
        if not kept:
            raise ConfigError(f"expected pictures in '{path}', got only those that an earlier run wrote")
        found += kept
    return found
