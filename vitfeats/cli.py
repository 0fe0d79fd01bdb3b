"""The command line: ``vitfeats extract | pca | similarity | match | splice | invert | models``.

Exit code 0: done; 1: something could not be done, said on standard error; 2: the command was not understood.
Results go to standard output, progress to standard error. Nothing heavy is imported before a command runs.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from vitfeats.configs import ExtractorConfig, InvertConfig, Preset, SpliceConfig, read_config
from vitfeats.errors import ConfigError, ImageError, VitFeatsError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vitfeats.extractors.base import Extractor

C = TypeVar("C")

PICTURE_SIZE = 448  # shorter side for pictures: enough tokens to see something, seconds on a CPU


@dataclass(frozen=True)
class Extract:
    """Write the descriptors of images to safetensors files, one for each image and tap.

    Attributes:
        images: Image files of any sizes.
        out: Folder for the files IMAGE.FACET@LAYER.safetensors (made if missing).
        tap: What to read, facet@layer; several share one forward pass. Default: the model's usual tap.
        batch_size: Images in one forward pass.
        json: Print one JSON object instead of text.
        options: Model, size, stride, device.
    """

    images: Positional[tuple[Path, ...]]
    out: Path = Path("features")
    tap: tuple[str, ...] = ()
    batch_size: int = 8
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Pca:
    """Paint the first three principal components of image tokens as colours, one PCA over all images.

    Attributes:
        images: Image files of any sizes.
        sample: Use photographs that come with the installed packages: portraits, stereo, textures, cat, coffee,
            astronaut, grace_hopper, china, flower.
        out: Picture to write.
        tap: What to read, facet@layer. Default: the model's usual tap.
        foreground: Leave the background out, found from the images' borders, and paint it black.
        json: Print one JSON object instead of text.
        options: Model, size (default 448), stride (default half the patch), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("pca.png")
    tap: str | None = None
    foreground: Literal["none", "border"] = "none"
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Similarity:
    """Show where a point of one image looks alike in another.

    Attributes:
        images: Two image files; one file is compared with itself.
        sample: Use a sample instead, as for pca.
        point: x and y in pixels of the first image, from its top-left corner. Default: its middle.
        out: Picture to write.
        tap: What to read, facet@layer. Default: the model's usual tap.
        json: Print one JSON object instead of text.
        options: Model, size (default 448), stride (default half the patch), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    point: tuple[float, float] | None = None
    out: Path = Path("similarity.png")
    tap: str | None = None
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Match:
    """Match the tokens of two images that are each other's nearest neighbour.

    Attributes:
        images: Two image files.
        sample: Use a sample instead, as for pca.
        most: How many of the matches to draw, drawn at random.
        out: Picture to write.
        tap: What to read, facet@layer. Default: the model's usual tap.
        json: Print one JSON object, with every match in source pixels, instead of text.
        options: Model, size (default 448), stride (default half the patch), device.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    most: int = 40
    out: Path = Path("matches.png")
    tap: str | None = None
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


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
        json: Print one JSON object instead of text.
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


@dataclass(frozen=True)
class Models:
    """List the models by name.

    Attributes:
        pattern: Shell pattern for the names, for example 'dino*'.
        json: Print one JSON array instead of a table.
    """

    pattern: Positional[str] = "*"
    json: bool = False


Command = (
    Annotated[Extract, subcommand("extract")]
    | Annotated[Pca, subcommand("pca")]
    | Annotated[Similarity, subcommand("similarity")]
    | Annotated[Match, subcommand("match")]
    | Annotated[Splice, subcommand("splice")]
    | Annotated[Invert, subcommand("invert")]
    | Annotated[Models, subcommand("models")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    command: Any = tyro.cli(
        Command,  # type: ignore[arg-type] - tyro takes a union of dataclasses
        prog="vitfeats",
        description="Features out of vision models: keys, queries, values, tokens, CLS and attention.",
        args=arguments,
    )
    try:
        return _RUN[type(command)](command)
    except VitFeatsError as error:
        print(f"vitfeats: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # a long run says how to go on
        told = next((words for words in interrupt.args if isinstance(words, str)), "interrupted")
        print(f"vitfeats: {told}", file=sys.stderr)
        return 130


def _extract(command: Extract) -> int:
    from tqdm import tqdm

    names = [path.name for path in command.images]
    if not names:
        raise ConfigError("expected image files, got none; for example: vitfeats extract a.jpg b.jpg")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"expected image files of different names, got '{twice}' twice; extract one folder at a time")
    extractor = _extractor(command.options)
    taps = command.tap or (extractor.card.default_tap,)
    broken: dict[str, str] = {}
    whole: list[Path] = []
    written: list[str] = []
    progress = tqdm(total=len(names), unit="image", file=sys.stderr, disable=command.json or len(names) < 2)
    results = extractor.each(_readable(command.images, whole, broken), taps, batch_size=command.batch_size)
    _make_folder(command.out)  # not before the taps have proved right
    for number, descriptors in enumerate(results):
        for tap, descriptor in descriptors.items():
            target = command.out / f"{whole[number].name}.{tap}.safetensors"
            written.append(str(descriptor.save(target)))
        progress.update(len(broken) + number + 1 - progress.n)
    progress.close()
    facts = {"model": extractor.card.name, "taps": list(map(str, taps)), "written": written, "failed": broken}
    _say(command.json, facts, f"{len(written)} files in {command.out}")
    for reason in broken.values():
        print(f"vitfeats: {reason}", file=sys.stderr)
    return 1 if broken else 0


def _pca(command: Pca) -> int:
    from vitfeats import plot
    from vitfeats.pca import PCA

    extractor = _picture_extractor(command.options)
    images = _images(command.images, command.sample)
    descriptors = list(extractor.each(images, command.tap))
    fitted = PCA(3).fit(descriptors, foreground=None if command.foreground == "none" else "border")
    _save_picture(plot.pca(images, descriptors, fitted=fitted), command.out)
    shares = [round(share, 4) for share in fitted.explained_variance_ratio_.tolist()]
    facts = {
        "model": extractor.card.name,
        "tap": str(descriptors[0].tap),
        "grids": [[d.grid.rows, d.grid.cols] for d in descriptors],
        "explained_variance_ratio": shares,
        "out": str(command.out),
    }
    _say(command.json, facts, f"{command.out}: {descriptors[0].tap} of {extractor.card.name}, {len(images)} image(s)")
    return 0


def _similarity(command: Similarity) -> int:
    from vitfeats import plot
    from vitfeats.matching import transfer_points
    from vitfeats.similarity import similarity_map

    extractor = _picture_extractor(command.options)
    images = _images(command.images, command.sample)
    if len(images) > 2:
        raise ConfigError(f"expected one or two images, got {len(images)}")
    first, second = images[0], images[-1]
    a, b = extractor.each([first, second], command.tap)
    height, width = a.frames[0].source_size
    points = [command.point or (width / 2, height / 2)]
    maps = similarity_map(a, points, b)
    _save_picture(plot.similarity(first, points, second, maps, grid=b.grid), command.out)
    x, y = transfer_points(a, b, points)[0].tolist()
    facts = {
        "model": extractor.card.name,
        "tap": str(a.tap),
        "point": list(points[0]),
        "most_similar": [x, y],
        "similarity": float(maps.max()),
        "out": str(command.out),
    }
    _say(command.json, facts, f"{command.out}: most similar at x={x:.1f} y={y:.1f} ({float(maps.max()):.3f})")
    return 0


def _match(command: Match) -> int:
    from vitfeats import plot
    from vitfeats.matching import match_mutual

    extractor = _picture_extractor(command.options)
    images = _images(command.images, command.sample)
    if len(images) != 2:
        raise ConfigError(f"expected two images, got {len(images)}")
    a, b = extractor.each(images, command.tap)
    found = match_mutual(a, b)
    _save_picture(plot.matches(images[0], images[1], found, most=command.most), command.out)
    facts = {
        "model": extractor.card.name,
        "tap": str(a.tap),
        "points_a": found.points_a.tolist(),
        "points_b": found.points_b.tolist(),
        "scores": found.scores.tolist(),
        "out": str(command.out),
    }
    _say(
        command.json, facts, f"{command.out}: {len(found)} mutual matches of {a.grid.tokens} and {b.grid.tokens} tokens"
    )
    return 0


def _splice(command: Splice) -> int:
    from vitfeats.apps.evaluation import transfer_markdown, transfer_table
    from vitfeats.apps.splice import splice

    options = command.options
    if isinstance(options.size, tuple):
        raise ConfigError(f"expected --size as one number, the shorter side, got {options.size}")
    # What the options say of the model's eyes goes into the settings: they are what the run, and its folder, go by.
    dtype = None if options.dtype == "auto" else options.dtype
    seen = {"size": options.size, "stride": options.stride, "dtype": dtype}
    config = _settings(command, SpliceConfig, steps=command.steps, **seen)
    images = _images(command.images, command.sample)
    if len(images) != 2:
        raise ConfigError(f"expected two images, structure and appearance, got {len(images)}")
    extractor = _extractor(dataclasses.replace(options, size=config.size, stride=config.stride, dtype=config.dtype))
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
    told = f"{command.out / 'result.png'}: {len(result.history)} steps, {result.stopped}"
    _say(command.json, facts, f"{told}\n\n{transfer_markdown(rows)}")
    return 1 if result.stopped == "not finite" else 0


def _invert(command: Invert) -> int:
    from vitfeats.apps.inversion import Inversion, invert, invert_layers, overlapping, strip
    from vitfeats.taps import Tap

    options = command.options
    config = _settings(command, InvertConfig, steps=command.steps, starts=command.starts, size=options.size)
    if len(command.images) > 1:
        raise ConfigError(f"expected one image, got {len(command.images)}; invert them one by one")
    image = _images(command.images, command.sample)[0]
    extractor = _extractor(dataclasses.replace(options, size=config.size))
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
        _save_picture(strip(found), command.out / "strip.png")
    rows = [{"tap": str(i.tap), "loss": i.losses[i.best], "psnr": i.psnr[i.best]} for i in found]
    facts = {"model": extractor.card.name, "out": str(command.out), "inversions": rows}
    lines = [f"{row['tap']}: loss {row['loss']:.4g}, {row['psnr']:.1f} dB" for row in rows]
    _say(command.json, facts, "\n".join([f"pictures in {command.out}", *lines]))
    return 0


def _models(command: Models) -> int:
    import warnings

    from vitfeats.api import list_models, plugin_failures

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # said below, in the way of a command line
        cards = list_models(command.pattern)
    for name, reason in plugin_failures().items():
        print(f"vitfeats: plug-in '{name}' could not be loaded: {reason}", file=sys.stderr)
    if command.json:
        print(json.dumps([dataclasses.asdict(card) for card in cards], indent=2))
        return 0
    rows = [("name", "family", "patch", "dim", "blocks", "tap", "licence")]
    rows += [(c.name, c.family, str(c.patch), str(c.dim), str(c.depth), c.usual_tap, c.licence) for c in cards]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


_RUN: dict[type, Any] = {
    Extract: _extract,
    Pca: _pca,
    Similarity: _similarity,
    Match: _match,
    Splice: _splice,
    Invert: _invert,
    Models: _models,
}


def _settings(command: Any, kind: type[C], **changes: Any) -> C:
    """Return a command's settings: the preset, changed by the file, changed by what was given on the command line."""
    base = kind.preset(command.preset)  # type: ignore[attr-defined] - every kind of settings has presets
    config = base if command.config is None else read_config(command.config, kind, base=base)
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[type-var]


def _extractor(options: ExtractorConfig) -> "Extractor":
    from vitfeats.api import load_extractor

    return load_extractor(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)})


def _picture_extractor(options: ExtractorConfig) -> "Extractor":
    """Return an extractor with more tokens than a model's default, for pictures."""
    extractor = _extractor(options)
    patch, usual = extractor.card.patch, extractor.card.default_size
    finer = patch // 2 if patch % 2 == 0 and extractor.overlaps else patch
    size = PICTURE_SIZE if isinstance(usual, int) else usual  # some models take one size only
    return extractor.resized(size=options.size or size, stride=options.stride or finer)


def _images(paths: tuple[Path, ...], sample: str | None) -> "list[Image.Image]":
    from vitfeats import samples
    from vitfeats.preprocess import load_image, to_pil

    if bool(paths) == (sample is not None):
        raise ConfigError("expected image files or --sample NAME, one of the two; for example --sample portraits")
    return samples.load(sample) if sample is not None else [to_pil(load_image(path)) for path in paths]


def _readable(paths: Sequence[Path], whole: list[Path], broken: dict[str, str]) -> "Iterator[Tensor]":
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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"expected a folder to write to at '{folder}', but: {error}") from error


def _save_picture(picture: "Image.Image", path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected a picture file that can be written, such as out.png, got '{path}': {error}"
        ) from error


def _say(as_json: bool, facts: dict[str, Any], text: str) -> None:
    from vitfeats.runs import finite

    print(json.dumps(finite(facts)) if as_json else text)


if __name__ == "__main__":
    sys.exit(main())
