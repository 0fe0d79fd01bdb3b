"""Commands of style transfer: stylize, train-stylizer."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from vitfeats.cli.shared import (
    check_picture,
    counted,
    file_at,
    files_of,
    images_of,
    make_folder,
    readable,
    save_picture,
    say,
    tell_broken,
)
from vitfeats.configs import STYLE_METHODS, StyleMethod, TrainStylizerConfig, read_config
from vitfeats.errors import ConfigError, ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from vitfeats.apps.style_transfer import Stylized

PATTERN = "pattern:"
SAMPLE_STYLE = f"{PATTERN}strokes:105"  # what samples are painted in
LARGEST = 1024
"""Shorter side in pixels that larger contents are brought to unless asked: memory and time grow with the pixels."""


@dataclass(frozen=True)
class Stylize:
    """Paint images in the style of others, in one pass of a network that was trained for any style.

    Attributes:
        images: Image files, or folders of them, such as the frames of a film.
        sample: Paint a sample instead, as for pca.
        style: Image files; or drawn patterns by kind and seed, pattern:glass:3 (strokes, glass, mosaic, hatching,
            marbling, waves, dots, weave). With a sample, one pattern unless given.
        weights: A share for each style; default equal ones.
        method: adaattn, sanet, adain; several are drawn side by side. Default: adaattn, or what the checkpoint holds;
            with a sample, all three.
        strength: 0 to 1: how far to go from the content to the style.
        colours: Bring the colours of the result to those of the style, or of the content.
        mask: Picture of the content's size whose grey values are labels of regions.
        style_masks: For each style the same; each region is painted in the style's regions of its label.
        size: Shorter side in pixels that contents are brought to; 0 is their own. Default: their own, 1024 at most.
        style_size: The same for styles: it sets the scale of the strokes. Default their own, 512 at most.
        most: Positions of each style that attention looks at, drawn at random; 0 is all.
        checkpoint: Weights that were trained or published, in place of those that come with the package.
        encoder: Model whose maps they work on; default what they were trained with.
        out: Picture to write; of several images, a folder for pictures of their names (made if missing).
        resume: Leave out images whose picture is in the folder already.
        batch_size: Images of one size that run together.
        seed: Of the positions that are drawn.
        device: cpu, cuda, mps; auto takes a GPU if there is one.
        json: Print one JSON object instead of text.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    style: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    method: tuple[StyleMethod, ...] = ()
    strength: float = 1.0
    colours: Literal["network", "style", "content"] = "network"
    mask: Path | None = None
    style_masks: tuple[Path, ...] = ()
    size: int | None = None
    style_size: int | None = None
    most: int = 4096
    checkpoint: Path | None = None
    encoder: str | None = None
    out: Path = Path("styled.png")
    resume: bool = False
    batch_size: int = 1
    seed: int = 0
    device: str = "auto"
    json: bool = False


def run_stylize(command: Stylize) -> int:
    """Paint one image, by one method or by several side by side; or each of many."""
    several = len(command.images) > 1 or any(path.is_dir() for path in command.images)
    return _each(command) if several else _one(command)


def _one(command: Stylize) -> int:
    from vitfeats import plot
    from vitfeats.apps.style_transfer import stylize

    given = [*command.images, *map(Path, command.style), *command.style_masks, *filter(None, [command.mask])]
    check_picture(command.out, given)
    image = images_of(command.images, command.sample)[0]
    styles = _styles(command)
    methods: Sequence[Any] = command.method or (STYLE_METHODS[:1] if command.sample is None else STYLE_METHODS)
    if command.checkpoint is not None and not command.method:
        methods = [None]
    if command.resume:
        raise ConfigError("expected --resume with several images or a folder of them, got one image")
    _check_colours(command, styles)
    masks = None
    if command.mask is None and command.style_masks:
        raise ConfigError("expected --mask, the labels of the content, with --style-masks")
    if command.mask is not None:
        if len(command.style_masks) != len(styles):
            raise ConfigError(f"expected --style-masks, one for each of {len(styles)} styles, with --mask")
        masks = (_labels(command.mask), [_labels(path) for path in command.style_masks])
    settings: dict[str, Any] = _settings(command) | {"masks": masks}
    if _is_reduced(command, image.size):
        settings["size"] = LARGEST
        print(
            f"vitfeats: {_told(image.size)} is painted at {_told(_reduced(image.size))}; --size 0 keeps its own size",
            file=sys.stderr,
        )
    made = [
        _recoloured(command, stylize(image, styles, method=method, **settings), image, styles) for method in methods
    ]
    if len(made) == 1:
        made[0].save(command.out)
    else:
        pictures = [image, *styles, *(one.image for one in made)]
        titles = ["content", *(["style"] * len(styles)), *methods]
        save_picture(plot.side_by_side(pictures, titles), command.out)
    facts = {"out": str(command.out), "methods": [method or "of the checkpoint" for method in methods]}
    say(command.json, facts, f"{command.out}: {made[0].image.width}×{made[0].image.height} pixels")
    return 0


def _each(command: Stylize) -> int:
    from tqdm import tqdm

    from vitfeats.apps.style_transfer import stylize_each

    if command.mask is not None or command.style_masks or len(command.method) > 1:
        raise ConfigError("expected one image with --mask or several methods; of many images, one method and no mask")
    if command.sample is not None:
        raise ConfigError("expected image files or --sample NAME, one of the two")
    files = files_of(command.images)
    folder = Path("styled") if command.out == Stylize.out else command.out
    targets = {path: folder / f"{path.stem}.png" for path in files}
    if len(set(targets.values())) < len(files):
        raise ConfigError("expected images whose names differ in more than the suffix; paint one folder at a time")
    if over := {path.resolve() for path in targets.values()} & {path.resolve() for path in files}:
        raise ConfigError(f"expected --out to be another folder than that of the images, got '{min(over).parent}'")
    left = [path for path in files if not (command.resume and targets[path].is_file())]
    broken: dict[str, str] = {}
    whole: list[Path] = []
    styles = _styles(command)
    _check_colours(command, styles)
    painted = stylize_each(
        _contents(command, readable(left, whole, broken), whole, broken),
        styles,
        method=command.method[0] if command.method else None,
        batch_size=command.batch_size,
        **_settings(command),
    )
    make_folder(folder)
    with tqdm(total=len(left), unit="image", file=sys.stderr, disable=command.json) as bar:
        for number, one in enumerate(painted):
            _recoloured(command, one, whole[number], styles).save(targets[whole[number]])
            bar.update(len(broken) + number + 1 - bar.n)
    facts = {"out": str(folder), "painted": len(whole), "skipped": len(files) - len(left), "failed": broken}
    say(command.json, facts, f"{counted(len(whole), 'picture')} in {folder}")
    return tell_broken(broken)


@dataclass(frozen=True)
class TrainStylizer:
    """Train a network of style transfer for any style.

    Attributes:
        content: A folder (with the folders in it) or a tar file of pictures to learn to paint.
        style: The same, of styles. Without it: drawn patterns, textures, and the most colourful of the contents.
        out: Folder for the history, checkpoints, pictures of results and stylizer.safetensors (made if missing).
        held_out: Text file with the names of contents not to learn from, as paths without suffix.
        method: Which network, with its published settings. Default: the one of the file, or adaattn.
        config: Settings in YAML, in place of those.
        steps: Optimiser steps, in place of the settings'.
        seed: Of first weights, crops and draws.
        resume: Go on from the checkpoint in the folder, if there is one.
        device: Where to train.
        json: Print one JSON object instead of text.
    """

    content: Path
    style: Path | None = None
    out: Path = Path("stylizer")
    held_out: Path | None = None
    method: StyleMethod | None = None
    config: Path | None = None
    steps: int | None = None
    seed: int = 0
    resume: bool = False
    device: str = "auto"
    json: bool = False


def train(command: TrainStylizer) -> int:
    """Train a network of style transfer."""
    from vitfeats.api import device_of
    from vitfeats.apps.style_transfer import train_stylizer, usual_styles
    from vitfeats.models.stylizers import TRAINED
    from vitfeats.pictures import read_names, read_pictures

    config = TrainStylizerConfig.preset(command.method or "adaattn")
    if command.config is not None:
        named = read_config(command.config, TrainStylizerConfig, base=config).method
        if command.method not in (None, named):
            raise ConfigError(f"expected one method, got --method {command.method} and '{named}' in '{command.config}'")
        config = read_config(command.config, TrainStylizerConfig, base=TrainStylizerConfig.preset(named))
    if command.steps is not None:
        config = replace(config, steps=command.steps)
    kept = [] if command.held_out is None else read_names(command.held_out)
    broken: dict[str, str] = {}
    contents = read_pictures(command.content, side=config.load, without=kept, broken=broken)
    if command.style is None:
        styles = usual_styles(contents, size=config.load)
    else:
        styles = list(read_pictures(command.style, side=config.load, broken=broken).values())
    result = train_stylizer(
        list(contents.values()),
        styles,
        config=config,
        seed=command.seed,
        out=command.out,
        resume=command.resume,
        progress=not command.json,
        device=device_of(command.device),
    )
    last = result.history[-1] if result.history else {}
    facts = {
        "method": config.method,
        "out": str(command.out / TRAINED),
        "contents": len(contents),
        "styles": len(styles),
        "failed": broken,
        "steps": last.get("step", -1) + 1,
        "stopped": result.stopped,
        "losses": last,
    }
    told = f"{facts['out']}: {config.method}, {counted(facts['steps'], 'step')}, {result.stopped}"
    say(command.json, facts, f"{told}; {counted(len(contents), 'content')}, {counted(len(styles), 'style')}")
    for name, reason in broken.items():
        print(f"vitfeats: skipped '{name}': {reason}", file=sys.stderr)
    return 0 if result.stopped == "done" else 1


def _settings(command: Stylize) -> dict[str, Any]:
    return {
        "encoder": command.encoder,
        "checkpoint": command.checkpoint,
        "strength": command.strength,
        "weights": command.weights or None,
        "size": command.size or None,
        "style_size": command.style_size,
        "most": command.most or None,
        "seed": command.seed,
        "device": command.device,
    }


def _is_reduced(command: Stylize, size: tuple[int, int]) -> bool:
    """Tell whether a content of this size is brought to a smaller one that was not asked for."""
    return command.size is None and min(size) > LARGEST


def _reduced(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size that a larger one is brought to, as (width, height) or (height, width) like what was given."""
    from vitfeats.grid import fit_size

    return fit_size(size, LARGEST, 1)


def _told(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _contents(
    command: Stylize, images: "Iterator[Tensor]", whole: list[Path], broken: dict[str, str]
) -> "Iterator[Tensor]":
    """Yield the images that can be painted, the larger ones reduced; note why the others cannot."""
    from tqdm import tqdm

    from vitfeats.apps.style_transfer.stylizer import CELL
    from vitfeats.resize import resize_images

    told = False
    for image in images:
        height, width = image.shape[1:]
        if _is_reduced(command, (height, width)):
            image = resize_images(image[None], _reduced((height, width)))[0]
            if not told:
                sizes = f"{_told((width, height))}, is painted at {_told(_reduced((width, height)))}"
                tqdm.write(
                    f"vitfeats: '{whole[-1]}', {sizes}, and so are others whose shorter side is above {LARGEST}; "
                    "--size 0 keeps their own sizes",
                    file=sys.stderr,
                )
            told = True
        if not command.size and min(image.shape[1:]) < CELL:
            path = whole.pop()
            broken[str(path)] = f"expected at least {CELL}×{CELL} pixels, got '{path}'; pass --size"
            continue
        yield image


def _check_colours(command: Stylize, styles: "list[Image.Image]") -> None:
    if command.colours == "style" and len(styles) > 1:
        raise ConfigError(f"expected one style with --colours style, got {len(styles)}")


def _recoloured(command: Stylize, made: "Stylized", content: Any, styles: "list[Image.Image]") -> "Stylized":
    """Return a picture in the colours that were asked for."""
    if command.colours == "network":
        return made
    return made.recoloured(styles[0] if command.colours == "style" else content)


def _styles(command: Stylize) -> "list[Image.Image]":
    """Open or draw the styles."""
    from vitfeats import patterns
    from vitfeats.preprocess import load_image, to_pil

    names = command.style or (() if command.sample is None else (SAMPLE_STYLE,))
    if not names:
        raise ConfigError("expected --style FILE, or a pattern such as --style pattern:glass:3")
    found = []
    for name in names:
        if not name.startswith(PATTERN):
            found.append(to_pil(load_image(file_at(Path(name)))))
            continue
        kind, _, seed = name.removeprefix(PATTERN).partition(":")
        if seed and not seed.isdecimal():
            raise ConfigError(f"expected a pattern as pattern:KIND:SEED, got '{name}'; for example pattern:glass:3")
        found.append(patterns.draw(kind, 256, int(seed or 0)))
    return found


def _labels(path: Path) -> "np.ndarray":
    """Return a picture's grey values as labels."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            # A palette's indices are the labels; 16-bit greys, too.
            return np.asarray(picture if picture.mode in ("P", "L", "1", "I;16") else picture.convert("L")).astype(int)
    except OSError as error:
        raise ImageError(f"expected a picture of labels at '{path}', but: {error}") from error
