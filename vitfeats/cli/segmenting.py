"""The command of co-segmentation."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from vitfeats.cli.shared import counted, extractor_of, images_of, say, settings_of, tell_broken
from vitfeats.configs import CosegmentConfig, CosegmentPreset, ExtractorConfig
from vitfeats.errors import ConfigError


@dataclass(frozen=True)
class Cosegment:
    """Cut out what images share: masks, cut-outs and overlays, and with --parts its parts.

    Attributes:
        images: Image files, or folders of them, searched with the folders in them.
        sample: Use a sample instead, as for pca.
        out: Folder for masks, cut-outs, overlays, overview.png and cosegmentation.json (made if missing).
        parts: Find so many parts, the same in all images.
        preset: default; or reference, the published recipe (with --model dino_vits8).
        config: Settings in YAML; "preset: NAME" in it begins from another preset.
        refine: How masks are brought to pixels, in place of the settings'; auto is grabcut where OpenCV is installed.
        outliers: Leave out images whose CLS has a smaller cosine to the mean CLS, in place of the settings'.
        seed: Of clusters and crops.
        batch_size: Images in one forward pass.
        json: Print one JSON object instead of text.
        options: Model, size and stride (default: the settings'), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("cosegmentation")
    parts: int = 0
    preset: CosegmentPreset = "default"
    config: Path | None = None
    refine: Literal["auto", "grabcut", "guided", "none"] | None = None
    outliers: float | None = None
    seed: int = 0
    batch_size: int = 8
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


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
    what = f", {counted(found.num_parts, 'part')}" if found.num_parts else ""
    nothing = f"; nothing found in {len(empty)} of them" if empty else ""
    say(command.json, facts, f"{command.out}: masks of {counted(len(found), 'image')}{what}, {found.refined}{nothing}")
    return tell_broken(failed)


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
