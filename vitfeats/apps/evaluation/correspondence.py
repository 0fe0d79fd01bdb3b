"""Semantic correspondence: PCK of a model's features, or of any other method, on pairs with known points."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitfeats.apps.evaluation.carrying import Enlarged, carry_points
from vitfeats.apps.evaluation.datasets import Pair
from vitfeats.apps.evaluation.describing import Describe, Transform, code_digest, describe_with, fingerprint_of, keep_in
from vitfeats.apps.evaluation.results import PairErrors, PckResult, read_errors
from vitfeats.configs import PckProtocol, ProtocolName, plain_config
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError
from vitfeats.extractors.base import Extractor, Taps
from vitfeats.grid import Size
from vitfeats.preprocess import load_image
from vitfeats.runs import HISTORY, RunFolder, check_same, finite
from vitfeats.views import numbered

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From image a and image b, (3, height, width) in 0..1, and points (n, 2) of a, to points (n, 2) of b, in pixels."""

SETTINGS, RESULT = "run.json", "pck.json"


def evaluate_pck(
    extractor: Extractor | Describe,
    tap: Taps | None,
    dataset: Sequence[Pair],
    *,
    protocol: ProtocolName | PckProtocol = "spair",
    transform: Transform | None = None,
    size: int | Size | None = None,
    subset: int | None = None,
    seed: int = 0,
    name: str | None = None,
    cache: Path | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> PckResult:
    """Measure how well features carry points of one image to another: PCK, the percentage of correct keypoints.

    Args:
        extractor: The model; or a function from an image to its descriptor, such as that of
            :func:`~vitfeats.apps.evaluation.fused`, which reads at a size of its own, whatever the protocol's.
        tap: ``"key@9"``; several are joined, see :func:`~vitfeats.apps.evaluation.joined`; None is the usual one. None
            with a function.
        dataset: Pairs; any sequence of :class:`~vitfeats.apps.evaluation.Pair`. One is held at a time.
        protocol: A name, or every choice: ``PckProtocol.preset("dift", size=None)``.
        transform: From the descriptors of both images to those compared: ``lambda a, b: (vf.log_bin(a),
            vf.log_bin(b))``, or :func:`~vitfeats.apps.evaluation.joint_pca`.
        size: What the extractor reads at, in place of the protocol's size: diffusion models read at their own, such as
            (512, 512), also where a protocol has another.
        subset: How many of the pairs to measure, drawn at random; None is all.
        seed: Of that draw.
        name: What to call the method; None names the model and tap.
        cache: Folder that keeps the features of each image, for other protocols and runs; it needs an extractor.
            Without it, an image of many pairs is read many times.
        out: Folder that keeps the errors of each pair as they come, and at the end the result as ``pck.json``.
        resume: Go on with a run that was stopped in ``out``: no pair is lost, and none measured twice.
        progress: Show a progress bar on standard error.

    Returns:
        The errors of all points, and from them every mean, threshold and table.

    Raises:
        ConfigError: If settings contradict each other, a pair has no box and the protocol measures by it, or ``out``
            holds a run, and ``resume`` is false or its settings are others.
        ShapeError, StoreError, ImageError: If a pair does not do; the message names it.
        TapError, UnknownFacetError: If the model has no such tap.
    """
    rules = PckProtocol.preset(protocol) if isinstance(protocol, str) else protocol
    if isinstance(extractor, Extractor):
        wanted = size or rules.size
        sized = extractor if wanted is None else extractor.resized(size=wanted)
        describe = describe_with(sized, tap)
        fingerprint = fingerprint_of(sized, tap)
        told = name or f"{sized.card.name} {_told_taps(tap, sized.card.default_tap)}"
        if cache is not None:
            describe = keep_in(cache, describe, fingerprint, device=sized.device)
    else:
        if tap is not None or cache is not None:
            raise ConfigError("expected tap=None and no cache with a function, which reads as it does; see keep_in")
        describe, told = extractor, name or "features"
        fingerprint = code_digest(extractor)
    if transform is not None:
        fingerprint += f" {code_digest(transform)}"

    def method(image_a: Tensor, image_b: Tensor, points: Tensor) -> Tensor:
        a, b = describe(image_a), describe(image_b)
        if transform is not None:
            a, b = transform(a, b)
        return carry_points(a, b, points.to(a.device), predict=rules.predict, enlarged=enlarged_by(rules))

    return evaluate_method(
        method,
        dataset,
        protocol=rules,
        subset=subset,
        seed=seed,
        name=told,
        fingerprint=fingerprint,
        out=out,
        resume=resume,
        progress=progress,
    )


def evaluate_method(
    method: Method,
    dataset: Sequence[Pair],
    *,
    protocol: ProtocolName | PckProtocol = "spair",
    subset: int | None = None,
    seed: int = 0,
    name: str = "method",
    fingerprint: str = "",
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> PckResult:
    """Measure any method that carries points from one image to another, judged as :func:`evaluate_pck` judges.

    Args:
        method: See :data:`Method`. Of the protocol, the padding is done before it is called; the size and the way of
            predicting are its own affair.
        dataset: As for :func:`evaluate_pck`; so are the others.
        protocol: What counts as correct.
        subset: How many pairs.
        seed: Of their draw.
        name: What to call the method.
        fingerprint: A text that differs where the method differs, for ``resume``.
        out: Folder of the run.
        resume: Go on with it.
        progress: Show a progress bar.

    Raises:
        ConfigError, ShapeError, StoreError, ImageError: As :func:`evaluate_pck`.
    """
    from tqdm import tqdm

    rules = PckProtocol.preset(protocol) if isinstance(protocol, str) else protocol
    chosen = _chosen(len(dataset), subset, seed)
    told = getattr(dataset, "name", type(dataset).__name__)
    settings = {
        "format": _FORMAT,
        "method": name,
        "fingerprint": hashlib.sha1(fingerprint.encode()).hexdigest()[:16],
        "dataset": told,
        "pairs": len(dataset),
        "drawn": _drawn(dataset),
        "subset": subset,
        "seed": seed if subset is not None else None,
        # How points are judged may differ from run to run: the errors are the same.
        "protocol": {key: plain_config(rules)[key] for key in ("size", "pad", "predict", "enlarged")},
    }
    folder = None if out is None else RunFolder(out)
    done = {} if folder is None else _begun(folder, settings, resume)
    bar = tqdm(total=len(chosen), initial=len(done), unit="pair", file=sys.stderr, disable=not progress, desc=name)
    try:
        with bar:
            for index in chosen:
                if index in done:
                    continue
                errors = _errors(method, dataset[index], index, rules)
                done[index] = errors
                if folder is not None:
                    folder.append(finite({"step": index, **asdict(errors)}))
                bar.update()
    except KeyboardInterrupt as interrupt:
        how = "nothing was written: pass out=" if folder is None else f"go on with resume=True, --resume in '{out}'"
        raise KeyboardInterrupt(f"interrupted after {len(done)} of {len(chosen)} pairs; {how}") from interrupt
    result = PckResult(name, told, rules, tuple(done[index] for index in chosen))
    if folder is not None:
        result.save(folder.path / RESULT)
    return result


def enlarged_by(rules: PckProtocol) -> Enlarged:
    """Return the image whose pixels a protocol carries points to, as :func:`carry_points` takes it."""
    return rules.size if rules.enlarged == "network" and rules.size is not None else rules.enlarged


def same_place(image_a: Tensor, image_b: Tensor, points: Tensor) -> Tensor:
    """Carry points to the same place of the other image, its sides taken as 1: the answer of who looks at neither."""
    (height_a, width_a), (height_b, width_b) = image_a.shape[1:], image_b.shape[1:]
    return points * points.new_tensor([width_b / width_a, height_b / height_a])


def _errors(method: Method, pair: Pair, index: int, rules: PckProtocol) -> PairErrors:
    try:
        image_a, image_b = load_image(pair.image_a), load_image(pair.image_b)
    except ImageError as error:
        raise ImageError(f"pair {index} ('{pair.name}'): {error}") from error
    height, width = image_b.shape[1:]
    box = pair.box_b
    record = PairErrors(
        index,
        pair.name,
        pair.category,
        (),
        (),
        tuple([True] * len(pair.points_a) if pair.visible is None else pair.visible.tolist()),
        float(max(height, width)),
        None if box is None else max(box[2] - box[0], box[3] - box[1]),
    )
    record.side(rules)  # before the work: a pair without the box that is asked for is refused
    if rules.pad:
        (image_a, shift_a), (image_b, shift_b) = squared(image_a), squared(image_b)
    else:
        shift_a = shift_b = torch.zeros(2)
    try:
        predicted = method(image_a, image_b, pair.points_a + shift_a)
    except ShapeError as error:
        raise ShapeError(f"pair {index} ('{pair.name}'): {error}") from error
    if not isinstance(predicted, Tensor) or predicted.shape != pair.points_b.shape:
        got = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
        raise ShapeError(f"expected {len(pair.points_b)} points (n, 2) for pair {index} ('{pair.name}'), got {got}")
    found = predicted.detach().cpu().double() - shift_b
    found[~found.isfinite().all(1)] = torch.nan  # nowhere, and so as far off as can be said
    distances = (found - pair.points_b.double()).norm(dim=1).nan_to_num(torch.inf)
    return replace(record, predicted=tuple((x, y) for x, y in found.tolist()), distances=tuple(distances.tolist()))


def squared(image: Float[Tensor, "3 height width"]) -> tuple[Float[Tensor, "3 side side"], Float[Tensor, "2"]]:
    """Return an image in the middle of a black square, and how far (x, y) its points have moved."""
    height, width = image.shape[1:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    padded = F.pad(image, (left, side - width - left, top, side - height - top))
    return padded, torch.tensor([float(left), float(top)])


_FORMAT = "vitfeats.pck-run/1"


def _told_taps(taps: Taps | None, usual: str) -> str:
    several = [usual] if taps is None else [taps] if not isinstance(taps, Sequence) or isinstance(taps, str) else taps
    return " + ".join(map(str, several))


def _drawn(dataset: Sequence[Pair]) -> str:
    """Return what tells these pairs from others of the same name and number."""
    if isinstance(dataset, list | tuple):
        told = [(pair.name, pair.points_a.tolist(), pair.points_b.tolist()) for pair in dataset]
        return hashlib.sha1(repr(told).encode()).hexdigest()[:16]
    return str(getattr(dataset, "fingerprint", ""))


def _chosen(pairs: int, subset: int | None, seed: int) -> list[int]:
    if subset is None:
        return list(range(pairs))
    if not 1 <= subset <= pairs:
        raise ConfigError(f"expected a subset of 1 to {pairs} pairs, got {subset}")
    return sorted(torch.randperm(pairs, generator=numbered(seed))[:subset].tolist())


def _begun(folder: RunFolder, settings: Mapping[str, Any], resume: bool) -> dict[int, PairErrors]:
    """Take up the run of a folder, or begin one there; return the pairs that are done."""
    path = folder.path / SETTINGS
    if not path.exists():
        if (folder.path / HISTORY).exists():
            raise ConfigError(f"expected a folder without another run, but '{folder.path}' has one; use another folder")
        write_whole(path, json.dumps(settings, indent=2).encode())
        return {}
    if not resume:
        raise ConfigError(
            f"expected a folder without a run, but '{folder.path}' has one; resume it (resume=True, --resume) or use "
            "another folder"
        )
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"expected the settings of a run at '{path}', but: {error}") from error
    check_same(kept, json.loads(json.dumps(settings)))
    records = folder.read_history(settings["pairs"])
    folder.write_history(records)  # without a last line that was cut off
    return dict(_whole(records))


def _whole(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, PairErrors]]:
    for record in records:
        try:
            yield int(record["step"]), read_errors(record)
        except (LookupError, TypeError, ValueError):  # not a whole record: measured again
            continue
