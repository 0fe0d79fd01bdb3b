"""The command that measures: eval."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes

from vitfeats.cli.shared import counted, extractor_of, make_folder, save_picture, say
from vitfeats.configs import ExtractorConfig, PckProtocol, ProtocolName
from vitfeats.errors import ConfigError

if TYPE_CHECKING:
    from vitfeats.apps.evaluation import EvalRow, Measured, Pair

WITHOUT_BOXES = ("warps", "stereo")


@dataclass(frozen=True)
class Eval:
    """Measure how well features carry points from one image to another: PCK under a named protocol.

    Attributes:
        data: The data: a folder of the layout; of pairs, the JSON or CSV file; of warps, pictures in a folder or tar.
        layout: What the data are: SPair-71k, PF-PASCAL, PF-WILLOW, CUB-200-2011, AP-10K, a list of pairs, or pictures
            to be warped at random.
        sample: Measure on the stereo pair that comes with scikit-image, alone or beside the data.
        table: Measure every row of a table; bundled needs no download. Without it, one model and tap.
        tap: What to read, facet@layer; several are joined. Default: the model's usual tap.
        log_bin: Give each token its surroundings too (without --table).
        protocol: How points are carried, and which are correct.
        own_size: Read images at the models' own size, whatever the protocol's.
        reference: Measure distances by the object's box or the target image. Default: the protocol's; the image where
            the data have no boxes.
        thresholds: Shares of the reference's longer side; the first is the main one.
        mean: Over what; default the protocol's. A file pck.json has them all.
        split: Of the data, where there are splits: train, val or test.
        category: Only this category (SPair-71k).
        images: Folder that the image paths of a list of pairs begin at. Default: the folder of the list.
        names: Text file with the names of the pictures to warp, as paths without suffix; default all.
        side: Shorter side in pixels that pictures to warp are brought to.
        subset: How many of the pairs, drawn at random.
        seed: Of that draw, of warps and of drawn pairs.
        cache: Folder that keeps the features of every image, for other protocols and runs.
        out: Folder for the table, the errors of each pair, and pictures (made if missing).
        resume: Go on with the run in that folder.
        json: Print one JSON object instead of text.
        options: Model, size, stride (without --table), device, dtype.
    """

    data: Path | None = None
    layout: Literal["spair", "pf-pascal", "pf-willow", "cub", "ap10k", "pairs", "warps"] = "spair"
    sample: Literal["stereo"] | None = None
    table: Literal["bundled", "hyperfeatures"] | None = None
    tap: tuple[str, ...] = ()
    log_bin: bool = False
    protocol: ProtocolName = "spair"
    own_size: bool = False
    reference: Literal["box", "image"] | None = None
    thresholds: tuple[float, ...] = ()
    mean: Literal["keypoint", "image", "category", "category_keypoint"] | None = None
    split: str = "test"
    category: str | None = None
    images: Path | None = None
    names: Path | None = None
    side: int = 256
    subset: int | None = None
    seed: int = 0
    cache: Path | None = None
    out: Path = Path("pck")
    resume: bool = False
    json: bool = False
    options: OmitArgPrefixes[ExtractorConfig] = field(default_factory=ExtractorConfig)


def evaluate(command: Eval) -> int:
    """Measure PCK: of a table of models, or of one."""
    from vitfeats.apps.evaluation import evaluate_table, table_markdown

    if command.table is not None:
        _refuse_beside_table(command)
    rows = None if command.table is not None else _one_row(command)
    given = dict(_datasets(command))
    make_folder(command.out)
    texts, facts = [], []
    for kind, dataset in given.items():
        rules = _rules(command, kind, dataset)
        folder = command.out if len(given) == 1 else command.out / kind
        measured = evaluate_table(
            command.table or rows or [],
            dataset,
            protocol=rules,
            published_for=command.protocol,
            subset=command.subset if kind != "stereo" else None,
            seed=command.seed,
            device=command.options.device,
            dtype=command.options.dtype,
            cache=command.cache,
            out=folder,
            resume=command.resume,
            progress=not command.json,
        )
        done = [one.result for one in measured if one.result is not None]
        size = (
            f"{counted(len(done[0].pairs), 'pair')}, {counted(done[0].points, 'point')}" if done else "nothing measured"
        )
        changed = ", the models' own sizes" if command.own_size else ""
        told = f"{command.protocol}, {rules.reference}, mean over {rules.mean.replace('_', ', ')}{changed}"
        head = f"{_name(dataset)}: {size}; protocol {told}"
        text = f"{head}\n\n{table_markdown(measured)}"
        if len(done) == 1:
            text += f"\n\n{done[0].markdown()}"
        missing = "\n".join(f"{one.row.name}: {one.missing}" for one in measured if one.missing)
        texts.append(f"{text}\n\n{missing}" if missing else text)
        facts.append({"dataset": _name(dataset), "out": str(folder), "rows": [_facts(one) for one in measured]})
        _keep(folder, text, dataset, measured)
    say(command.json, {"protocol": command.protocol, "tables": facts}, "\n\n".join(texts))
    return 0 if all(row["pck"] for table in facts for row in table["rows"]) else 1


def _refuse_beside_table(command: Eval) -> None:
    """Refuse what the rows of a table settle themselves."""
    usual = dataclasses.replace(command.options, device=ExtractorConfig.device, dtype=ExtractorConfig.dtype)
    if command.tap or command.log_bin or usual != ExtractorConfig():
        raise ConfigError("expected --device and --dtype alone with --table; its rows have models, taps and sizes")


def _one_row(command: Eval) -> "list[EvalRow]":
    """Return the row of one model, with the options of the command."""
    from vitfeats.apps.evaluation import EvalRow, Part
    from vitfeats.taps import Tap

    options = command.options
    extractor = extractor_of(options)
    # As they are resolved: "key@-1" is called "key@11".
    taps = tuple(str(extractor.resolve(Tap.parse(tap))) for tap in command.tap or (extractor.card.default_tap,))
    name = f"{extractor.card.name}, {' + '.join(taps)}{', log-binned' if command.log_bin else ''}"
    size = options.size
    return [EvalRow(name, (Part(extractor, taps, size=size, stride=options.stride, log_bin=command.log_bin),))]


def _datasets(command: Eval) -> "Iterator[tuple[str, Sequence[Pair]]]":
    """Yield the kinds of data and their pairs."""
    from vitfeats.apps.evaluation import StereoPair

    if command.data is None and command.sample is None:
        raise ConfigError(
            "expected --data PATH or --sample stereo, got neither; for example vitfeats eval --sample stereo"
        )
    if command.sample is not None:
        yield "stereo", [StereoPair().as_pair()]
    if command.data is not None:
        yield command.layout, _read(command, command.data)


def _read(command: Eval, data: Path) -> "Sequence[Pair]":
    from vitfeats.apps import evaluation
    from vitfeats.pictures import read_names, read_pictures

    if command.category is not None and command.layout != "spair":
        raise ConfigError(f"expected --category with the layout spair, got {command.layout}")
    if command.layout == "warps":
        names = [] if command.names is None else read_names(command.names)
        pictures = read_pictures(data, side=command.side, only=names)
        return evaluation.WarpedImages(list(pictures.values()), seed=command.seed)
    if command.layout == "spair":
        if data.exists() and not (data / "Layout").is_dir():
            raise ConfigError(
                f"expected data laid out as SPair-71k, but '{data}' has no folder Layout; for another data set pass "
                "--layout pf-pascal, pf-willow, cub, ap10k or pairs; for pictures alone, which are then warped at "
                "random, --layout warps"
            )
        return evaluation.SPair71k(data, command.split, command.category)
    if command.layout == "pf-pascal":
        return evaluation.PFPascal(data, command.split)
    if command.layout == "pf-willow":
        return evaluation.PFWillow(data)
    if command.layout == "pairs":
        return evaluation.open_pairs(data, command.images or data.parent)
    kind = evaluation.CUB200 if command.layout == "cub" else evaluation.AP10K
    return kind(data, command.split, seed=command.seed)


def _rules(command: Eval, kind: str, dataset: "Sequence[Pair]") -> PckProtocol:
    changes: dict[str, Any] = {"reference": command.reference, "mean": command.mean}
    changes |= {"thresholds": command.thresholds or None}
    if command.reference is None and (kind in WITHOUT_BOXES or dataset[0].box_b is None):
        changes["reference"] = "image"
    rules = PckProtocol.preset(command.protocol, **{k: value for k, value in changes.items() if value is not None})
    return dataclasses.replace(rules, size=None) if command.own_size else rules


def _name(dataset: "Sequence[Pair]") -> str:
    return getattr(dataset, "name", "stereo pair")


def _facts(one: "Measured") -> dict[str, Any]:
    result = one.result
    shares = {} if result is None else {f"{t:g}": result.every_mean(t) for t in result.protocol.thresholds}
    return {
        "row": one.row.name,
        "pck": shares,
        "main": None if result is None else result.pck(),
        "published": one.published,
        "missing": one.missing,
        "seconds": round(one.seconds, 1),
    }


def _keep(folder: Path, text: str, dataset: "Sequence[Pair]", measured: "Sequence[Measured]") -> None:
    """Write the table, and pictures of the best row."""
    from vitfeats.apps.evaluation import draw_accuracy, draw_pairs

    done = [one.result for one in measured if one.result is not None]
    make_folder(folder)
    (folder / "table.md").write_text(f"{text}\n", encoding="utf-8")
    if done:
        save_picture(draw_accuracy(done), folder / "accuracy.png")
        # Not that of who looks at neither image, which can be far ahead where the images hardly differ.
        looking = [one.result for one in measured if one.result is not None and one.row.parts]
        best = max(looking or done, key=lambda result: result.pck())
        if best.ranked():
            save_picture(draw_pairs(best, dataset), folder / "pairs.png")
