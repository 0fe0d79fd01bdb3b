"""Tables of semantic correspondence: rows that name models, layers and settings, measured by one call."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfeats.api import device_of, load_extractor
from vitfeats.apps.evaluation.carrying import carry_points
from vitfeats.apps.evaluation.correspondence import Method, enlarged_by, evaluate_method, same_place
from vitfeats.apps.evaluation.datasets import Pair
from vitfeats.apps.evaluation.describing import (
    Describe,
    Transform,
    describe_with,
    fingerprint_of,
    joined,
    joint_pca,
    keep_in,
)
from vitfeats.apps.evaluation.results import PckResult, as_table, percent
from vitfeats.configs import PCK_PROTOCOLS, DiffusionConfig, PckProtocol, ProtocolName
from vitfeats.errors import ConfigError, WeightsUnavailableError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.grid import Size
from vitfeats.models.trainable import new_network
from vitfeats.pooling import log_bin
from vitfeats.taps import Tap

RANDOM = "random:"
"""Before the name of an architecture of timm: with random weights."""


@dataclass(frozen=True)
class Part:
    """Features of one model.

    Attributes:
        model: As for ``load_extractor``; "random:NAME" is timm's architecture with random weights; or an extractor.
        taps: One, or several that are joined.
        size: Network size; None is the protocol's, or where that has none the model's own.
        stride: Step between tokens in pixels; None is the patch.
        diffusion: How a diffusion model reads; None is its usual way.
        log_bin: Whether tokens get their surroundings, see ``vf.log_bin``.
        pca: Components of a joint PCA of both images; None is none.
        weight: Its factor, where there are several parts.
    """

    model: str | Extractor
    taps: tuple[str, ...]
    size: int | Size | None = None
    stride: int | None = None
    diffusion: DiffusionConfig | None = None
    log_bin: bool = False
    pca: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class EvalRow:
    """One row of a table.

    Attributes:
        name: What to call it.
        parts: The features that are joined; none is the answer "the same place".
        published: Numbers of papers, 0..1, by (dataset, protocol), for the main threshold and mean.
    """

    name: str
    parts: tuple[Part, ...] = ()
    published: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measured:
    """What became of a row.

    Attributes:
        row: The row.
        result: Its errors; None if it could not be measured.
        missing: Why not; "" if it was.
        seconds: How long it took, pairs that were done before not counted.
        published: The paper's number, 0..1; None where we hold none.
    """

    row: EvalRow
    result: PckResult | None
    missing: str
    seconds: float
    published: float | None


def _sd(tap: str, **settings: Any) -> Part:
    return Part("sd15", (tap,), size=(512, 512), **settings)


_ONE_STEP = DiffusionConfig.preset("hyperfeatures-one-step")
_SPAIR_IMAGE, _CUB_IMAGE, _SPAIR_BOX = (
    ("SPair-71k", "hyperfeatures"),
    ("CUB-200-2011", "hyperfeatures"),
    ("SPair-71k", "dift"),
)
_SAME = EvalRow("the same place")

TABLES: dict[str, tuple[EvalRow, ...]] = {
    "bundled": (
        _SAME,
        EvalRow("random weights, key@11", (Part(f"{RANDOM}vit_tiny_patch16_224", ("key@11",)),)),
        EvalRow("mini, key@11", (Part("mini", ("key@11",)),)),
        EvalRow("mini, token@11", (Part("mini", ("token@11",)),)),
        EvalRow("mini, token@11, log-binned", (Part("mini", ("token@11",), log_bin=True),)),
        EvalRow("vgg_mini, relu4_1", (Part("vgg_mini", ("out@relu4_1",)),)),
        EvalRow("ddpm_mini, hyperfeatures", (Part("hyperfeatures:ddpm_mini", ("out@hyperfeatures",)),)),
    ),
    "hyperfeatures": (
        _SAME,
        EvalRow("random weights, key@9", (Part(f"{RANDOM}vit_small_patch8_224", ("key@9",)),)),
        EvalRow("DINO, key@9", (Part("dino_vits8", ("key@9",)),)),
        EvalRow("DINO, key@9, log-binned", (Part("dino_vits8", ("key@9",), stride=4, log_bin=True),)),
        EvalRow("DINOv2, token@11", (Part("dinov2_vitb14", ("token@11",)),), {_SPAIR_BOX: 0.539}),
        EvalRow("ResNet-101, hypercolumns", (Part("resnet101", ("out@layer1+layer2+layer3+layer4",)),)),
        EvalRow("Stable Diffusion, layer 4", (_sd("residual@up1.res0", diffusion=_ONE_STEP),)),
        EvalRow(
            "Stable Diffusion, concatenation",
            (Part("hyperfeatures:sd15", ("out@concatenation",), size=(512, 512)),),
        ),
        EvalRow(
            "DIFT",
            (Part("sd21", ("out@up1",), size=(768, 768), diffusion=DiffusionConfig.preset("dift")),),
            {_SPAIR_BOX: 0.529},
        ),
        EvalRow(
            "Hyperfeatures",
            (Part("hyperfeatures:sd15", ("out@hyperfeatures",), size=(512, 512)),),
            {_SPAIR_IMAGE: 0.7256, _CUB_IMAGE: 0.8229, _SPAIR_BOX: 0.649},
        ),
        EvalRow(
            "Hyperfeatures, one step", (Part("hyperfeatures:sd15_one_step", ("out@hyperfeatures",), size=(512, 512)),)
        ),
        EvalRow("Hyperfeatures, pruned", (Part("hyperfeatures:sd15", ("out@pruned",), size=(512, 512)),)),
        EvalRow("Hyperfeatures, SDv2-1", (Part("hyperfeatures:sd21_base", ("out@hyperfeatures",), size=(512, 512)),)),
        EvalRow(
            "Stable Diffusion + DINOv2",
            (
                # Three maps that weigh as much as the one of DINOv2.
                *(
                    Part(
                        "sd15",
                        (f"out@up{block}",),
                        size=(960, 960),
                        diffusion=DiffusionConfig(time=100),
                        pca=256,
                        weight=3**-0.5,
                    )
                    for block in range(3)
                ),
                Part("dinov2_vitb14", ("token@11",), size=(840, 840)),
            ),
        ),
    ),
}
"""The tables by name. "bundled" needs no download; "hyperfeatures" has the rows of the paper and its neighbours.

Published numbers: of Diffusion Hyperfeatures at PCK@img, all keypoints together, as its reviews quote them, on pairs
that its authors drew (360 of SPair-71k); at PCK@bbox, over images, as one later paper quotes them all, DIFT there with
the category's name in the prompt, and not the empty one of the row here. All at 0.1. They are shown where a protocol is
unchanged, and all pairs of the test split are measured.
"""


def evaluate_table(
    table: str | Sequence[EvalRow],
    dataset: Sequence[Pair],
    *,
    protocol: ProtocolName | PckProtocol = "spair",
    published_for: str | None = None,
    subset: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    cache: Path | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = False,
) -> list[Measured]:
    """Measure each row of a table on one dataset.

    Args:
        table: A name of :data:`TABLES`, or rows of your own.
        dataset: Pairs.
        protocol: As for :func:`~vitfeats.apps.evaluation.evaluate_pck`; so are the others.
        published_for: Name of the protocol whose published numbers stand beside, where ``protocol`` is the same but for
            the thresholds below the main one; None is that of ``protocol``, and nothing where it has no name.
        subset: How many of the pairs.
        seed: Of that draw.
        device: Where models run.
        dtype: Their precision.
        cache: Folder that keeps features.
        out: Folder with a folder of each row's run.
        resume: Go on with the runs in it.
        progress: Show progress bars.

    Returns:
        One a row, in their order. Rows whose weights are not here say so, and stop nothing.

    Raises:
        ConfigError: If there is no such table, two rows have one name, or as for ``evaluate_pck``.
    """
    rows = _rows_of(table)
    name = published_for or (protocol if isinstance(protocol, str) else "")
    rules = PckProtocol.preset(protocol) if isinstance(protocol, str) else protocol
    measured = []
    for row in rows:
        began = time.perf_counter()
        published = row.published.get((_family(dataset), name)) if subset is None and _unchanged(rules, name) else None
        method = None  # no two rows' models at a time
        try:
            method, fingerprint = method_of(row, rules, device=device, dtype=dtype, cache=cache)
        except WeightsUnavailableError as error:
            measured.append(Measured(row, None, str(error), 0.0, published))
            continue
        folder = None if out is None else Path(out) / slug(row.name)
        result = evaluate_method(
            method,
            dataset,
            protocol=rules,
            subset=subset,
            seed=seed,
            name=row.name,
            fingerprint=fingerprint,
            out=folder,
            resume=resume,
            progress=progress,
        )
        measured.append(Measured(row, result, "", time.perf_counter() - began, published))
    return measured


def table_markdown(measured: Sequence[Measured]) -> str:
    """Return measured rows as a Markdown table, in per cent; "–" where we hold no number."""
    results = [one.result for one in measured if one.result is not None]
    thresholds = results[0].protocol.thresholds if results else ()
    head = ["row", *(f"PCK@{threshold:g}" for threshold in thresholds), "published", "seconds"]
    if not results:
        head.insert(1, "PCK")
    lines = [head, ["---"] * len(head)]
    for one in measured:
        if one.result is None:
            numbers = ["no weights"] + ["–"] * (len(thresholds) - 1)
            lines.append([one.row.name, *numbers, percent(one.published), "–"])
        else:
            numbers = [percent(one.result.pck(threshold)) for threshold in thresholds]
            lines.append([one.row.name, *numbers, percent(one.published), f"{one.seconds:.0f}"])
    return as_table(lines)


def method_of(
    row: EvalRow,
    protocol: PckProtocol,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cache: Path | str | None = None,
) -> tuple[Method, str]:
    """Return the method of a row, and a text that is the same for the same method.

    Raises:
        WeightsUnavailableError: If the weights of a part are not here.
        UnknownModelError, TapError, UnknownFacetError, ConfigError: If a part names what does not exist.
    """
    if not row.parts:
        return same_place, "the same place"
    loaded: dict[Any, Extractor] = {}
    described = [_described(part, protocol, device, dtype, cache, loaded) for part in row.parts]

    def method(image_a: Tensor, image_b: Tensor, points: Tensor) -> Tensor:
        pairs = []
        for part, (describe, _) in zip(row.parts, described, strict=True):
            a, b = describe(image_a), describe(image_b)
            transform: Transform | None = None if part.pca is None else joint_pca(part.pca)
            pairs.append((a, b) if transform is None else transform(a, b))
        if len(pairs) == 1:
            a, b = pairs[0]
        else:
            weights = [part.weight for part in row.parts]
            a, b = (joined([pair[side] for pair in pairs], weights=weights) for side in (0, 1))
        return carry_points(a, b, points.to(a.device), predict=protocol.predict, enlarged=enlarged_by(protocol))

    settings = [
        f"{part.pca} {part.weight} {fingerprint}" for part, (_, fingerprint) in zip(row.parts, described, strict=True)
    ]
    return method, "\n".join(settings)


def slug(name: str) -> str:
    """Return a name as one of a file: letters and digits, with hyphens between."""
    words = "".join(sign if sign.isalnum() else " " for sign in name.lower()).split()
    return "-".join(words)


def _described(
    part: Part,
    protocol: PckProtocol,
    device: str,
    dtype: str,
    cache: Path | str | None,
    loaded: dict[Any, Extractor],
) -> tuple[Describe, str]:
    key = (id(part.model) if isinstance(part.model, Extractor) else part.model, repr(part.diffusion))
    if key not in loaded:
        loaded[key] = _loaded(part, device, dtype)
    extractor = loaded[key]
    extractor = extractor.resized(size=part.size or protocol.size, stride=part.stride)
    taps = part.taps[0] if len(part.taps) == 1 else part.taps
    for tap in part.taps:  # what does not exist is said before any work
        extractor.resolve(Tap.parse(tap))
    fingerprint = fingerprint_of(extractor, taps)
    describe = describe_with(extractor, taps)
    if cache is not None:
        describe = keep_in(cache, describe, fingerprint, device=extractor.device)
    if not part.log_bin:
        return describe, fingerprint
    return lambda image: log_bin(describe(image)), f"{fingerprint} log-binned"


def _loaded(part: Part, device: str, dtype: str) -> Extractor:
    if isinstance(part.model, Extractor):
        return part.model
    if not part.model.startswith(RANDOM):
        settings: dict[str, Any] = {} if part.diffusion is None else {"diffusion": part.diffusion}
        return load_extractor(part.model, device=device, dtype=dtype, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = new_network(part.model.removeprefix(RANDOM), 224)
    return load_extractor(network.eval().requires_grad_(False).to(device_of(device)), dtype=dtype)


def _rows_of(table: str | Sequence[EvalRow]) -> Sequence[EvalRow]:
    if isinstance(table, str):
        if table not in TABLES:
            raise ConfigError(f"expected a table, got {table!r}. {nearest_names(table, TABLES)}")
        return TABLES[table]
    names = [slug(row.name) for row in table]
    if len(set(names)) < len(names) or not all(names) or not names:
        raise ConfigError(
            f"expected rows, at least one, of different names with a letter or digit, got {[row.name for row in table]}"
        )
    return table


def _family(dataset: Sequence[Pair]) -> str:
    """Return the name that published numbers go by: "SPair-71k" of "SPair-71k test"; no other split has any."""
    return str(getattr(dataset, "name", "")).removesuffix(" test")


def _unchanged(rules: PckProtocol, name: str) -> bool:
    """Return whether a protocol is the one of that name, but for the thresholds below the main one."""
    if name not in PCK_PROTOCOLS:
        return False
    published = PckProtocol(**PCK_PROTOCOLS[name])
    alike = replace(rules, thresholds=published.thresholds) == published
    return alike and rules.thresholds[0] == published.thresholds[0]
