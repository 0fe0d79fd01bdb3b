"""Commands that read features and show them: extract, pca, similarity, match, hyperfeatures, models."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from vitfeats.cli.shared import (
    aligned,
    check_names,
    check_picture,
    counted,
    extractor_of,
    files_of,
    images_of,
    make_folder,
    picture_extractor,
    readable,
    save_picture,
    say,
    tell_broken,
)
from vitfeats.configs import ExtractorConfig
from vitfeats.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from vitfeats.descriptor import Descriptor


@dataclass(frozen=True)
class Extract:
    """Write the descriptors of images to safetensors files, one for each image and tap.

    Attributes:
        images: Image files of any sizes, or folders of them.
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


def extract(command: Extract) -> int:
    """Write descriptors; a file that cannot be read is named and skipped."""
    from tqdm import tqdm

    files = files_of(command.images)
    names = [path.name for path in files]
    if not names:
        taken = next((tap for tap in command.tap if Path(tap).is_file()), None)
        hint = f"--tap took '{taken}' as a tap: put the images before it" if taken else "vitfeats extract a.jpg b.jpg"
        raise ConfigError(f"expected image files, got none; {'' if taken else 'for example: '}{hint}")
    check_names(files)
    extractor = extractor_of(command.options)
    taps = command.tap or (extractor.card.default_tap,)
    broken: dict[str, str] = {}
    whole: list[Path] = []
    written: list[str] = []
    progress = tqdm(total=len(names), unit="image", file=sys.stderr, disable=command.json or len(names) < 2)
    results = extractor.each(readable(files, whole, broken), taps, batch_size=command.batch_size)
    make_folder(command.out)  # not before the taps have proved right
    for number, descriptors in enumerate(results):
        for tap, descriptor in descriptors.items():
            target = command.out / f"{whole[number].name}.{tap}.safetensors"
            written.append(str(descriptor.save(target)))
        progress.update(len(broken) + number + 1 - progress.n)
    progress.close()
    facts = {"model": extractor.card.name, "taps": list(map(str, taps)), "written": written, "failed": broken}
    say(command.json, facts, f"{counted(len(written), 'file')} in {command.out}")
    return tell_broken(broken)


@dataclass(frozen=True)
class Pca:
    """Paint the first three principal components of image tokens as colours, one PCA over all images.

    Attributes:
        images: Image files of any sizes, or folders of them.
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


def pca(command: Pca) -> int:
    """Draw the principal components of images."""
    from vitfeats import plot
    from vitfeats.pca import PCA

    files = files_of(command.images)
    check_picture(command.out, files)
    extractor = picture_extractor(command.options)
    broken: dict[str, str] = {}
    images = images_of(files, command.sample, broken)
    descriptors = list(extractor.each(images, command.tap))
    fitted = PCA(3).fit(descriptors, foreground=None if command.foreground == "none" else "border")
    save_picture(plot.pca(images, descriptors, fitted=fitted), command.out)
    shares = [round(share, 4) for share in fitted.explained_variance_ratio_.tolist()]
    facts = {
        "model": extractor.card.name,
        "tap": str(descriptors[0].tap),
        "grids": [[d.grid.rows, d.grid.cols] for d in descriptors],
        "explained_variance_ratio": shares,
        "out": str(command.out),
        "failed": broken,
    }
    told = f"{command.out}: {descriptors[0].tap} of {extractor.card.name}, {counted(len(images), 'image')}"
    say(command.json, facts, told)
    return tell_broken(broken)


@dataclass(frozen=True)
class Similarity:
    """Show where a point of one image looks alike in another.

    Attributes:
        images: Two image files; one file is compared with itself, away from the point: what is most similar is then
            sought outside of the 3×3 tokens around it.
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


def similarity(command: Similarity) -> int:
    """Draw what is alike to a point."""
    from vitfeats import plot
    from vitfeats.similarity import similarity_map

    check_picture(command.out, command.images)
    extractor = picture_extractor(command.options)
    images = images_of(command.images, command.sample)
    if len(images) > 2:
        raise ConfigError(f"expected one or two images, got {len(images)}")
    first, second = images[0], images[-1]
    a, b = extractor.each([first, second], command.tap)
    height, width = a.frames[0].source_size
    points = [command.point or (width / 2, height / 2)]
    maps = similarity_map(a, points, b)
    save_picture(plot.similarity(first, points, second, maps, grid=b.grid), command.out)
    searched = maps[0] if len(images) == 2 else _away(a, points[0], maps[0])
    best = b.grid.centres_of(searched.argmax().cpu()[None])
    x, y = b.frames[0].to_source(best)[0].tolist()
    alike = float(searched.max())
    facts = {
        "model": extractor.card.name,
        "tap": str(a.tap),
        "point": list(points[0]),
        "most_similar": [x, y],
        "similarity": alike,
        "out": str(command.out),
    }
    where = "" if len(images) == 2 else " away from the point, outside of the 3×3 tokens around it"
    told = f"{command.out}: most similar{where} at x={x:.1f} y={y:.1f} ({alike:.3f})"
    if command.point is None:
        told += f"\npoint: the middle ({width / 2:g}, {height / 2:g}); --point X Y asks about another"
    say(command.json, facts, told)
    return 0


def _away(d: "Descriptor", point: tuple[float, float], values: "Tensor") -> "Tensor":
    """Return the similarities to a point of the same image but for its own token and those that touch it."""
    from vitfeats.similarity import away_from

    away = away_from(point, values, d)
    if not bool(away.isfinite().any()):
        raise ConfigError(
            f"expected tokens away from the point, got a grid of {d.grid.rows}×{d.grid.cols}; raise --size, lower "
            "--stride or give a second image"
        )
    return away


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


def match(command: Match) -> int:
    """Draw mutual matches of two images."""
    from vitfeats import plot
    from vitfeats.matching import match_mutual

    check_picture(command.out, command.images)
    extractor = picture_extractor(command.options)
    images = images_of(command.images, command.sample)
    if len(images) != 2:
        raise ConfigError(f"expected two images, got {len(images)}")
    a, b = extractor.each(images, command.tap)
    found = match_mutual(a, b)
    save_picture(plot.matches(images[0], images[1], found, most=command.most), command.out)
    facts = {
        "model": extractor.card.name,
        "tap": str(a.tap),
        "points_a": found.points_a.tolist(),
        "points_b": found.points_b.tolist(),
        "scores": found.scores.tolist(),
        "out": str(command.out),
    }
    told = f"{command.out}: {_matches(len(found))} of {a.grid.tokens} and {b.grid.tokens} tokens"
    say(command.json, facts, told)
    return 0


def _matches(number: int) -> str:
    return f"{number} mutual match{'' if number == 1 else 'es'}"


@dataclass(frozen=True)
class Hyperfeatures:
    """Write the hyperfeatures of images: the maps of a diffusion model's layers and steps, aggregated into one.

    Attributes:
        images: Image files of any sizes, or folders of them.
        sample: Use a sample instead, as for pca.
        out: Folder for IMAGE.safetensors, pca.png and, of two images, matches.png (made if missing).
        most: How many of the matches to draw, drawn at random.
        seed: Of the noise.
        json: Print one JSON object instead of text.
        options: Model (default hyperfeatures:ddpm_mini; hyperfeatures:sd15 for the paper's), size, device, checkpoint.
    """

    images: Positional[tuple[Path, ...]] = ()
    sample: str | None = None
    out: Path = Path("hyperfeatures")
    most: int = 40
    seed: int = 0
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def hyperfeatures(command: Hyperfeatures) -> int:
    """Write the hyperfeatures of images, their PCA, and the matches of two."""
    from vitfeats import plot
    from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
    from vitfeats.matching import match_mutual

    files = files_of(command.images)
    check_names(files)
    options = dataclasses.replace(command.options, model=command.options.model or "hyperfeatures:ddpm_mini")
    extractor = extractor_of(options)
    if not isinstance(extractor, HyperfeatureExtractor):
        raise ConfigError(f"expected a model of hyperfeatures, got '{options.model}'; for example hyperfeatures:sd15")
    if command.seed:
        extractor = extractor.reading(dataclasses.replace(extractor.diffusion, seed=command.seed))
    broken: dict[str, str] = {}
    images = images_of(files, command.sample, broken)
    names = [path.name for path in files if str(path) not in broken]
    names = names or [f"{command.sample}_{number}" for number in range(len(images))]
    descriptors = list(extractor.each(images))
    make_folder(command.out)
    written = [str(d.save(command.out / f"{n}.safetensors")) for n, d in zip(names, descriptors, strict=True)]
    save_picture(plot.pca(images, descriptors), command.out / "pca.png")
    facts: dict[str, Any] = {"model": extractor.card.name, "written": written, "pca": str(command.out / "pca.png")}
    facts["failed"] = broken
    told = [f"{counted(len(written), 'file')} and pca.png in {command.out}"]
    if len(images) == 2:
        found = match_mutual(*descriptors)
        save_picture(plot.matches(images[0], images[1], found, most=command.most), command.out / "matches.png")
        facts |= {"matches": str(command.out / "matches.png"), "mutual": len(found)}
        told.append(f"matches.png: {_matches(len(found))}")
    say(command.json, facts, "\n".join(told))
    return tell_broken(broken)


@dataclass(frozen=True)
class Models:
    """List the models by name.

    Attributes:
        pattern: Shell pattern for the names, for example 'dino*'.
        json: Print one JSON array instead of a table.
    """

    pattern: Positional[str] = "*"
    json: bool = False


def models(command: Models) -> int:
    """List models."""
    import warnings

    from vitfeats.api import list_models, plugin_failures

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # said below, in the way of a command line
        cards = list_models(command.pattern)
    for name, reason in plugin_failures().items():
        print(f"vitfeats: plug-in '{name}' could not be loaded: {reason}", file=sys.stderr)
    if not cards:
        near = f"*{command.pattern}*"
        hint = f"try '{near}'" if list_models(near) else "vitfeats models lists them all"
        print(f"vitfeats: no model is called '{command.pattern}'; {hint}", file=sys.stderr)
    if command.json:
        print(json.dumps([dataclasses.asdict(card) for card in cards], indent=2))
    if command.json or not cards:
        return 0 if cards else 1
    rows = [("name", "family", "patch", "dim", "blocks", "tap", "licence")]
    rows += [(c.name, c.family, str(c.patch), str(c.dim), str(c.depth), c.usual_tap, c.licence) for c in cards]
    print(aligned(rows))
    return 0
