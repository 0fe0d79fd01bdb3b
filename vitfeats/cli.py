"""The command line: runs what :mod:`vitfeats.commands` describes, and says how it went.

Exit code 0: done; 1: something could not be done, said on standard error; 2: the command was not understood.
Results go to standard output, progress to standard error. Nothing heavy is imported before a command runs.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from vitfeats.commands import (
    Command,
    Extract,
    Hyperfeatures,
    Invert,
    Match,
    Models,
    Pca,
    Similarity,
    Splice,
    TrainDiffusion,
    TrainHyperfeatures,
)
from vitfeats.configs import (
    DiffusionConfig,
    ExtractorConfig,
    InvertConfig,
    SpliceConfig,
    TrainDiffusionConfig,
    TrainHyperfeaturesConfig,
    read_config,
)
from vitfeats.errors import ConfigError, ImageError, VitFeatsError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vitfeats.apps.evaluation import Pair
    from vitfeats.extractors.base import Extractor

C = TypeVar("C")

JUDGED = 50  # held-out pictures that a training of hyperfeatures looks at
PICTURE_SIZE = 448  # shorter side for pictures: enough tokens to see something, seconds on a CPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code."""
    command: Any = tyro.cli(
        Command,  # type: ignore[arg-type] - tyro takes a union of dataclasses
        prog="vitfeats",
        description="Features out of vision models: keys, queries, values, tokens, CLS, attention, hyperfeatures.",
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


def _hyperfeatures(command: Hyperfeatures) -> int:
    from vitfeats import plot
    from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
    from vitfeats.matching import match_mutual

    options = dataclasses.replace(command.options, model=command.options.model or "hyperfeatures:ddpm_mini")
    extractor = _extractor(options)
    if not isinstance(extractor, HyperfeatureExtractor):
        raise ConfigError(f"expected a model of hyperfeatures, got '{options.model}'; for example hyperfeatures:sd15")
    if command.seed:
        extractor = extractor.reading(dataclasses.replace(extractor.diffusion, seed=command.seed))
    images = _images(command.images, command.sample)
    names = [path.name for path in command.images] or [f"{command.sample}_{number}" for number in range(len(images))]
    descriptors = list(extractor.each(images))
    _make_folder(command.out)
    written = [str(d.save(command.out / f"{n}.safetensors")) for n, d in zip(names, descriptors, strict=True)]
    _save_picture(plot.pca(images, descriptors), command.out / "pca.png")
    facts: dict[str, Any] = {"model": extractor.card.name, "written": written, "pca": str(command.out / "pca.png")}
    told = [f"{len(written)} files and pca.png in {command.out}"]
    if len(images) == 2:
        found = match_mutual(*descriptors)
        _save_picture(plot.matches(images[0], images[1], found, most=command.most), command.out / "matches.png")
        facts |= {"matches": str(command.out / "matches.png"), "mutual": len(found)}
        told.append(f"matches.png: {len(found)} mutual matches")
    _say(command.json, facts, "\n".join(told))
    return 0


def _train_diffusion(command: TrainDiffusion) -> int:
    from vitfeats.apps.train_diffusion import train_diffusion
    from vitfeats.pictures import read_names, read_pictures

    config = TrainDiffusionConfig() if command.config is None else read_config(command.config, TrainDiffusionConfig)
    given = {"steps": command.steps, "minutes": command.minutes}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
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
    told = f"{facts['out']}: {facts['steps']} steps over {len(pictures)} pictures, {result.stopped}"
    _say(command.json, facts, told + (f"; held-out loss {judged[-1]:.4f}" if judged else ""))
    return 1 if result.stopped == "not finite" else 0


def _train_hyperfeatures(command: TrainHyperfeatures) -> int:
    from vitfeats.apps.evaluation import WarpedImages
    from vitfeats.apps.train_hyperfeatures import train_hyperfeatures
    from vitfeats.pictures import read_names, read_pictures

    config = TrainHyperfeaturesConfig()
    if command.config is not None:
        config = read_config(command.config, TrainHyperfeaturesConfig)
    if command.steps is not None:
        config = dataclasses.replace(config, steps=command.steps)
    diffusion = DiffusionConfig.preset("hyperfeatures")
    if command.diffusion is not None:
        diffusion = read_config(command.diffusion, DiffusionConfig, base=diffusion)
    options = dataclasses.replace(command.options, model=command.options.model or "ddpm_mini")
    extractor = _extractor(options, diffusion=diffusion)
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
    told = f"{facts['out']}: {facts['steps']} steps over {len(pairs)} pairs, {result.stopped}"
    _say(command.json, facts, told + (f"; held-out PCK@0.1 {judged[-1]:.3f}" if judged else ""))
    return 1 if result.stopped == "not finite" else 0


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
    Hyperfeatures: _hyperfeatures,
    TrainDiffusion: _train_diffusion,
    TrainHyperfeatures: _train_hyperfeatures,
    Models: _models,
}


def _settings(command: Any, kind: type[C], **changes: Any) -> C:
    """Return a command's settings: the preset, changed by the file, changed by what was given on the command line."""
    base = kind.preset(command.preset)  # type: ignore[attr-defined] - every kind of settings has presets
    config = base if command.config is None else read_config(command.config, kind, base=base)
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[type-var]


def _extractor(options: ExtractorConfig, **others: Any) -> "Extractor":
    from vitfeats.api import load_extractor

    return load_extractor(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)}, **others)


def _picture_extractor(options: ExtractorConfig) -> "Extractor":
    """Return an extractor with more tokens than a model's default, for pictures."""
    extractor = _extractor(options)
    patch, usual = extractor.card.patch, extractor.card.default_size
    finer = patch // 2 if patch % 2 == 0 and extractor.overlaps else patch
    size = PICTURE_SIZE if isinstance(usual, int) else usual  # some models take one size only
    return extractor.resized(size=options.size or size, stride=options.stride or finer)


def _annotated(file: Path, folder: Path, without: Sequence[str]) -> "list[Pair]":
    """Return the pairs of a list that show none of the pictures of these names."""
    from vitfeats.apps.evaluation import read_pairs

    left_out = {folder / name for name in without}
    read = read_pairs(file, folder)
    pairs = [p for p in read if not left_out & {Path(str(i)).with_suffix("") for i in (p.image_a, p.image_b)}]
    if not pairs:
        raise ConfigError(f"expected pairs without held-out pictures in '{file}', got {len(read)} with them")
    return pairs


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
