"""What commands have in common: images in, an extractor, a picture or a line of JSON out."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vitfeats.configs import ExtractorConfig, read_config
from vitfeats.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vitfeats.extractors.base import Extractor

C = TypeVar("C")

PICTURE_SIZE = 448  # shorter side for pictures: enough tokens to see something, seconds on a CPU


def settings_of(command: Any, kind: type[C], **changes: Any) -> C:
    """Return a command's settings: the preset, changed by the file, changed by what was given on the command line."""
    base = kind.preset(command.preset)  # type: ignore[attr-defined] - every kind of settings has presets
    config = base if command.config is None else read_config(command.config, kind, base=base)
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[type-var]


def extractor_of(options: ExtractorConfig, **others: Any) -> "Extractor":
    """Load the model of a command's options."""
    from vitfeats.api import load_extractor

    return load_extractor(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)}, **others)


def picture_extractor(options: ExtractorConfig) -> "Extractor":
    """Return an extractor with more tokens than a model's default, for pictures."""
    extractor = extractor_of(options)
    patch, usual = extractor.card.patch, extractor.card.default_size
    finer = patch // 2 if patch % 2 == 0 and extractor.overlaps else patch
    size = PICTURE_SIZE if isinstance(usual, int) else usual  # some models take one size only
    return extractor.resized(size=options.size or size, stride=options.stride or finer)


def images_of(paths: Sequence[Path], sample: str | None, broken: dict[str, str] | None = None) -> "list[Image.Image]":
    """Open image files, or a sample; with ``broken``, note of several files why some cannot be read."""
    from vitfeats import samples
    from vitfeats.preprocess import load_image, to_pil

    if bool(paths) == (sample is not None):
        raise ConfigError("expected image files or --sample NAME, one of the two; for example --sample portraits")
    if sample is not None:
        return samples.load(sample)
    found = []
    for path in paths:
        try:
            found.append(to_pil(load_image(file_at(path))))
        except ImageError as error:
            if broken is None:
                raise
            if len(broken) == len(paths) - 1:  # none is left
                tell_broken(broken)
                raise
            broken[str(path)] = str(error)
    return found


def file_at(path: Path) -> Path:
    """Return the path of an image file; refuse a folder or an address."""
    if (text := path.as_posix()).startswith(("http:/", "https:/")):  # a path has lost one of the slashes
        raise ImageError(f"expected an image file, got the address '{text.replace(':/', '://', 1)}'; download it first")
    if path.is_dir():
        raise ImageError(f"expected an image file, got the folder '{path}'; give the files in it: {path}/*.jpg")
    return path


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Return image files, and those in folders in the order of their names."""
    from vitfeats.pictures import picture_files

    return [file for path in paths for file in (picture_files(path, deep=False) if path.is_dir() else [file_at(path)])]


def make_folder(folder: Path) -> None:
    """Make a folder to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"expected a folder to write to at '{folder}', but: {error}") from error


def check_names(files: Sequence[Path]) -> None:
    """Refuse files of one name where each is written to a file of its name."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"expected image files of different names, got '{twice}' twice; take one folder at a time")


def tell_broken(broken: Mapping[Any, str]) -> int:
    """Name on standard error what could not be read; return the exit code."""
    for reason in broken.values():
        print(f"vitfeats: {reason}", file=sys.stderr)
    return 1 if broken else 0


def check_picture(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse, before the work begins, a picture that cannot be written, or that would be written over an input."""
    from PIL import Image

    why = ""
    if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
        why = "it is one of the inputs, and would be lost"
    elif not path.parent.is_dir():
        why = f"there is no folder '{path.parent}'; make it first"
    elif Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        why = f"unknown file extension: '{path.suffix}'"
    if why:
        raise ConfigError(f"expected a picture file that can be written, such as out.png, got '{path}': {why}")


def save_picture(picture: "Image.Image", path: Path) -> None:
    """Write a picture."""
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected a picture file that can be written, such as out.png, got '{path}': {error}"
        ) from error


def counted(number: int, what: str) -> str:
    """Return "1 file", "2 files"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines of text whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def say(as_json: bool, facts: dict[str, Any], text: str) -> None:
    """Print what was done: one JSON object, or a text."""
    from vitfeats.runs import finite

    print(json.dumps(finite(facts)) if as_json else text)


def readable(paths: Sequence[Path], whole: list[Path], broken: dict[str, str]) -> "Iterator[Tensor]":
    """Yield the images that can be read; note their paths, and why the others cannot."""
    from vitfeats.preprocess import load_image

    for path in paths:
        try:
            image = load_image(path)
        except ImageError as error:
            broken[str(path)] = str(error)
            continue
        whole.append(path)
        yield image
