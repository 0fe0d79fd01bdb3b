"""What an evaluation found: the error of every point, and every mean of them."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from vitfeats.apps.evaluation.pck import within
from vitfeats.configs import MEANS, PckProtocol, plain_config
from vitfeats.configs.evaluation import Mean
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, StoreError
from vitfeats.runs import finite

BINS = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, math.inf)


@dataclass(frozen=True)
class PairErrors:
    """How far the points of one pair were carried from where they should be.

    Attributes:
        index: Of the pair in its dataset.
        name: The pair's name.
        category: What the images show; "" where nobody said.
        predicted: (x, y) where each point was carried to, in pixels of image b.
        distances: Of each point to its target, in pixels of image b.
        visible: Whether each point can be seen in both images.
        image_side: Longer side of image b in pixels.
        box_side: Longer side of the object's box in image b; None where there is no box.
    """

    index: int
    name: str
    category: str
    predicted: tuple[tuple[float, float], ...]
    distances: tuple[float, ...]
    visible: tuple[bool, ...]
    image_side: float
    box_side: float | None

    def side(self, protocol: PckProtocol) -> float:
        """Return the side that distances are measured by.

        Raises:
            ConfigError: If it is that of a box, and there is none.
        """
        if protocol.reference == "image":
            return self.image_side
        if self.box_side is None:
            raise ConfigError(
                f"expected a box for PCK@bbox, but pair {self.index} ('{self.name}') has none; use reference='image'"
            )
        return self.box_side

    def counted(self, protocol: PckProtocol) -> tuple[float, ...]:
        """Return the distances of the points that count."""
        if not protocol.visible_only:
            return self.distances
        return tuple(distance for distance, seen in zip(self.distances, self.visible, strict=True) if seen)

    def hits(self, protocol: PckProtocol, threshold: float | None = None) -> list[bool]:
        """Return which of the points that count are correct, at a threshold of the protocol or another."""
        share = protocol.thresholds[0] if threshold is None else threshold
        reach = share * self.side(protocol)
        return [bool(within(distance, reach, strict=protocol.strict)) for distance in self.counted(protocol)]


@dataclass(frozen=True, eq=False)
class PckResult:
    """The errors of one method on one dataset, from which every PCK of it follows.

    Attributes:
        name: The method.
        dataset: The dataset.
        protocol: How points were carried, and which of them count as correct.
        pairs: One record a pair.
    """

    name: str
    dataset: str
    protocol: PckProtocol
    pairs: tuple[PairErrors, ...]

    def __repr__(self) -> str:
        """Say what was measured, and the main number."""
        main = self.protocol.thresholds[0]
        return f"PckResult({self.name} on {self.dataset}: {len(self.pairs)} pairs, PCK@{main:g} {self.pck():.4f})"

    def under(self, protocol: PckProtocol | None = None, **changes: Any) -> "PckResult":
        """Return the same errors, judged in another way: nothing is measured again.

        Args:
            protocol: Its ``reference``, ``thresholds``, ``strict``, ``mean`` and ``visible_only`` are taken; how points
                were carried stays as it was.
            **changes: Any of the five, in place of the protocol's.

        Raises:
            ConfigError: If another choice is to be changed, which would need a new run, or a pair has no box to
                measure by.
        """
        judging = ("reference", "thresholds", "strict", "mean", "visible_only")
        other = [name for name in changes if name not in judging]
        if other:
            raise ConfigError(f"expected changes of {', '.join(judging)}, got '{other[0]}', which needs a new run")
        taken = {} if protocol is None else {name: getattr(protocol, name) for name in judging}
        judged = replace(self, protocol=replace(self.protocol, **(taken | changes)))
        for pair in self.pairs:
            pair.side(judged.protocol)  # a pair without a box is refused here, and not by whoever asks for a number
        return judged

    @property
    def points(self) -> int:
        """How many points count."""
        return sum(len(pair.counted(self.protocol)) for pair in self.pairs)

    def pck(self, threshold: float | None = None, *, mean: Mean | None = None) -> float:
        """Return PCK at a threshold, 0..1: the protocol's first and its mean unless others are asked for.

        Pairs without a point that counts are in no mean; NaN if that leaves nothing.

        Raises:
            ConfigError: If there is no such mean, or no box to measure by.
        """
        chosen = mean or self.protocol.mean
        if chosen not in MEANS:
            raise ConfigError(f"expected a mean of {', '.join(MEANS)}, got {chosen!r}")
        groups = self._hits(threshold)
        if chosen == "keypoint":
            return _mean(hit for hits in groups.values() for pair in hits for hit in pair)
        if chosen == "image":
            return _mean(fmean(pair) for hits in groups.values() for pair in hits)
        inner: Callable[[list[list[bool]]], float] = _images if chosen == "category" else _keypoints
        return _mean(inner(hits) for hits in groups.values())

    def every_mean(self, threshold: float | None = None) -> dict[str, float]:
        """Return PCK by each mean, by name."""
        return {mean: self.pck(threshold, mean=mean) for mean in MEANS}

    def by_category(self, threshold: float | None = None) -> dict[str, dict[str, float]]:
        """Return for each category, in the order of names, its pairs, its points, and PCK over images and keypoints."""
        return {
            category: {
                "pairs": len(hits),
                "points": sum(map(len, hits)),
                "image": _images(hits),
                "keypoint": _keypoints(hits),
            }
            for category, hits in sorted(self._hits(threshold).items())
        }

    def histogram(self, edges: Sequence[float] = BINS) -> dict[tuple[float, float], int]:
        """Count the errors of the points that count, in units of the reference side, by bins [low, high).

        Points of a reference without a side are in the last bin, unless they are met exactly.
        """
        counts = dict.fromkeys(pairwise(edges), 0)
        for pair in self.pairs:
            side = pair.side(self.protocol)
            for distance in pair.counted(self.protocol):
                error = distance / side if side else (math.inf if distance else 0.0)
                for low, high in counts:
                    if low <= error < high or (error == high == math.inf):
                        counts[low, high] += 1
        return counts

    def ranked(self) -> list[PairErrors]:
        """Return the pairs with points that count, best first: by their own PCK, then by their mean distance."""
        rated = [pair for pair in self.pairs if pair.counted(self.protocol)]

        def rating(pair: PairErrors) -> tuple[float, float]:
            error = fmean(pair.counted(self.protocol)) / (pair.side(self.protocol) or 1)
            return -fmean(pair.hits(self.protocol)), error

        return sorted(rated, key=rating)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values: the protocol, every mean at every threshold, categories, histogram and pairs."""
        return {
            "format": _FORMAT,
            "name": self.name,
            "dataset": self.dataset,
            "protocol": plain_config(self.protocol),
            "counted": {"pairs": sum(map(bool, map(self._counted, self.pairs))), "points": self.points},
            "pck": {f"{threshold:g}": self.every_mean(threshold) for threshold in self.protocol.thresholds},
            "by_category": self.by_category(),
            "histogram": [{"from": low, "to": high, "points": n} for (low, high), n in self.histogram().items()],
            "pairs": [asdict(pair) for pair in self.pairs],
        }

    def save(self, path: Path | str) -> Path:
        """Write it as JSON, whole or not at all; return the path.

        Raises:
            StoreError: If the file cannot be written.
        """
        target = Path(path)
        write_whole(target, json.dumps(finite(self.as_dict())).encode())
        return target

    @classmethod
    def load(cls, path: Path | str) -> "PckResult":
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: If the file cannot be read, or is not a result.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise StoreError(f"expected a result of evaluate_pck at '{path}', got format {found['format']!r}")
            protocol = PckProtocol(**{name: _tupled(value) for name, value in found["protocol"].items()})
            return cls(found["name"], found["dataset"], protocol, tuple(map(read_errors, found["pairs"])))
        except (OSError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"expected a result of evaluate_pck at '{path}', but: {error}") from error

    def markdown(self) -> str:
        """Return every mean at every threshold, and the categories at the first, as Markdown tables, in per cent."""
        lines = [["PCK@", *(mean.replace("_", ", ") for mean in MEANS)], ["---"] * (1 + len(MEANS))]
        for threshold in self.protocol.thresholds:
            lines.append([f"{threshold:g}", *(percent(value) for value in self.every_mean(threshold).values())])
        tables = [as_table(lines)]
        categories = self.by_category()
        if len(categories) > 1:
            rows = [["category", "pairs", "points", "image", "keypoint"], ["---"] * 5]
            for name, row in categories.items():
                counts = [f"{row['pairs']:,}", f"{row['points']:,}"]
                rows.append([name or "–", *counts, percent(row["image"]), percent(row["keypoint"])])
            tables.append(as_table(rows))
        return "\n\n".join(tables)

    def _counted(self, pair: PairErrors) -> tuple[float, ...]:
        return pair.counted(self.protocol)

    def _hits(self, threshold: float | None) -> dict[str, list[list[bool]]]:
        """Return for each category the hits of its pairs; pairs without a point that counts are left out."""
        found: dict[str, list[list[bool]]] = {}
        for pair in self.pairs:
            hits = pair.hits(self.protocol, threshold)
            if hits:
                found.setdefault(pair.category, []).append(hits)
        return found


def read_errors(record: Mapping[str, Any]) -> PairErrors:
    """Return the record of a pair from its plain values.

    Raises:
        KeyError, TypeError, ValueError: If it is none.
    """
    return PairErrors(
        int(record["index"]),
        str(record["name"]),
        str(record["category"]),
        tuple((_number(x, math.nan), _number(y, math.nan)) for x, y in record["predicted"]),
        tuple(_number(distance, math.inf) for distance in record["distances"]),
        tuple(map(bool, record["visible"])),
        float(record["image_side"]),
        None if record["box_side"] is None else float(record["box_side"]),
    )


def percent(share: float | None) -> str:
    """Return a share of 0..1 in per cent with one decimal, or a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def as_table(lines: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_FORMAT = "vitfeats.pck/1"


def _number(value: Any, other: float) -> float:
    """Return a number of JSON, which has neither NaN nor infinity."""
    return other if value is None else float(value)


def _images(hits: list[list[bool]]) -> float:
    return _mean(fmean(pair) for pair in hits)


def _keypoints(hits: list[list[bool]]) -> float:
    return _mean(hit for pair in hits for hit in pair)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return fmean(listed) if listed else math.nan


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
