"""Measures of an image that was made to have the structure of one image and the appearance of another.

For the result of any method. An optimiser can please the network that it optimises, so each measure of a network can be
taken with another one (a :class:`Judge`), and some need none: patches, colours, and masks that you give.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitfeats.apps.evaluation.colours import colour_distance, colour_shift, match_colours
from vitfeats.apps.evaluation.foreground import Mask, foreground_iou, foreground_mask
from vitfeats.apps.evaluation.tables import raw_patches
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import Size
from vitfeats.losses import structure_loss
from vitfeats.preprocess import ImageLike, Preprocess, load_image
from vitfeats.similarity import unit
from vitfeats.taps import Tap


@dataclass(frozen=True)
class Judge:
    """A network that measures, and the taps that it is read at.

    Attributes:
        extractor: The network at its size. The shorter side is kept; the structure image gives the aspect.
        structure: Tap whose self-similarity is the structure.
        appearance: Tap whose CLS token is the appearance; None where the network has no CLS token.
        name: What to call it; "" becomes the model and the taps.

    Raises:
        ConfigError: If the structure tap is one token for the whole image.
        TapError, UnknownFacetError: If the network has no such tap.
    """

    extractor: Extractor
    structure: str | Tap = "key@-1"
    appearance: str | Tap | None = "cls@-1"
    name: str = ""

    def __post_init__(self) -> None:
        """Resolve the taps, so that what does not exist is said before any work."""
        structure = self.extractor.resolve(Tap.parse(self.structure))
        appearance = None if self.appearance is None else self.extractor.resolve(Tap.parse(self.appearance))
        if structure.facet == "cls":
            raise ConfigError(f"expected a structure tap of many tokens, got '{self.structure}'; try 'key@-1'")
        object.__setattr__(self, "structure", structure)
        object.__setattr__(self, "appearance", appearance)
        if not self.name:
            taps = ", ".join(str(tap) for tap in (structure, appearance) if tap is not None)
            object.__setattr__(self, "name", f"{self.extractor.card.name} {taps}")

    def read_structure(self, image: ImageLike, size: Size) -> Descriptor:
        """Return the structure tap of an image at a network size (height, width), without gradients."""
        with torch.no_grad():
            return self.extractor.resized(size=size)(image, self.structure)

    def read_appearance(self, image: ImageLike) -> Descriptor | None:
        """Return the appearance tap of an image at its own aspect, without gradients; None if there is no such tap.

        Raises:
            ShapeError: If the tap has no CLS token.
        """
        if self.appearance is None:
            return None
        with torch.no_grad():
            return _with_cls(self.extractor(image, self.appearance))

    def read(self, image: ImageLike, size: Size) -> tuple[Descriptor, Descriptor | None]:
        """Return both taps of an image, in one forward pass where its own network size is ``size``."""
        loaded = load_image(image)
        if self.appearance is None or self.extractor.preprocess.network_size(_size(loaded)) != tuple(size):
            return self.read_structure(loaded, size), self.read_appearance(loaded)
        with torch.no_grad():
            both = self.extractor(loaded, [self.structure, self.appearance])
        return both[self.structure], _with_cls(both[self.appearance])


@dataclass(frozen=True)
class Judgement:
    """What one judge measured.

    Attributes:
        name: The judge's name.
        structure_distance: To the structure image, 0..4, smaller is better; see :func:`structure_distance`.
        appearance_similarity: To the appearance image, −1..1, larger is better; NaN without a CLS token; see
            :func:`appearance_similarity`.
        foreground_iou: With the structure image, 0..1, larger is better: of the judge's own split of the tokens, see
            :func:`foreground_mask`. NaN if neither image falls into two parts.
    """

    name: str
    structure_distance: float
    appearance_similarity: float
    foreground_iou: float


@dataclass(frozen=True)
class TransferMeasures:
    """Every measure of one result.

    Attributes:
        structure_distance: To the structure image, 0..4, smaller is better; by the network that was asked for.
        appearance_similarity: To the appearance image, −1..1, larger is better; by that network.
        foreground_iou: With the structure image, 0..1, larger is better; of the masks where they were given, else by
            that network.
        patch_distance: To the structure image, 0..4, smaller is better; by raw RGB patches.
        colour_distance: To the appearance image, 0..1, smaller is better: the share of pixels to be recoloured.
        colour_shift: To the appearance image, smaller is better: how far colours must move, in units of CIELAB.
        judgements: What the other judges say.
    """

    structure_distance: float
    appearance_similarity: float
    foreground_iou: float
    patch_distance: float
    colour_distance: float
    colour_shift: float
    judgements: tuple[Judgement, ...] = ()

    def as_dict(self) -> dict[str, float]:
        """Return every number by its name; those of other judges as "structure_distance (name of the judge)"."""
        own = {name: value for name, value in vars(self).items() if name != "judgements"}
        others = {
            f"{name} ({judgement.name})": value
            for judgement in self.judgements
            for name, value in vars(judgement).items()
            if name != "name"
        }
        return own | others

    def __str__(self) -> str:
        """Say every number, a dash where there is none."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.as_dict().items())


def measure_transfer(
    image: ImageLike,
    structure: ImageLike,
    appearance: ImageLike,
    *,
    extractor: Extractor | Judge,
    judges: Sequence[Extractor | Judge] | None = None,
    masks: tuple[Mask, Mask] | None = None,
) -> TransferMeasures:
    """Measure how much of one image's structure and of another's appearance an image has.

    Args:
        image: The image to measure, the result of any method.
        structure: Where its structure should come from; the sizes may differ.
        appearance: Where its appearance should come from; the sizes may differ.
        extractor: The network that measures, with its default tap (``key@-1`` of vision transformers) and ``cls@-1``
            where it has CLS; a :class:`Judge` has other taps.
        judges: Further networks or taps, outside what the method optimised. None takes a layer in the middle of the
            same network, which is a weak judge: its weights are the same. ``()`` takes none.
        masks: Foreground of the image and of the structure image, bool (height, width) each, at any size; None lets
            the network split its tokens.

    Raises:
        ImageError: If an image or mask cannot be read or is not one.
        ShapeError: If a mask is not (height, width), or an image does not do.
        ConfigError: If two judges have one name, or ``masks`` is no pair.
        TapError, UnknownFacetError: If a network lacks a tap.
    """
    given = None if masks is None else _iou_of_pair(masks)
    loaded = [load_image(image)]
    (measured,) = _measured(loaded, load_image(structure), load_image(appearance), _panel(extractor, judges))
    return measured if given is None else replace(measured, foreground_iou=given)


def transfer_table(
    results: Mapping[str, ImageLike],
    structure: ImageLike,
    appearance: ImageLike,
    *,
    extractor: Extractor | Judge,
    judges: Sequence[Extractor | Judge] | None = None,
) -> dict[str, TransferMeasures]:
    """Measure several results, in front of them the rows that a fool would get.

    Args:
        results: Images to compare, by name.
        structure: Where their structure should come from.
        appearance: Where their appearance should come from.
        extractor: As in :func:`measure_transfer`.
        judges: As in :func:`measure_transfer`.

    Returns:
        The rows "structure image" and "appearance image" (each handed in as the result), "matched colours"
        (:func:`match_colours`), then one a result. :func:`transfer_markdown` writes them down.

    Raises:
        ConfigError: If a result has the name of one of these rows, or two judges have one name.
        ImageError, ShapeError: If an image cannot be read or does not do.
        TapError, UnknownFacetError: If a network lacks a tap.
    """
    target, look = load_image(structure), load_image(appearance)
    fools = {
        "structure image": target,
        "appearance image": look,
        "matched colours": match_colours(target, look),
    }
    taken = [name for name in results if name in fools]
    if taken:
        raise ConfigError(f"expected names of results other than those of the first rows, got {taken[0]!r}; rename it")
    images = fools | {name: load_image(image) for name, image in results.items()}
    measured = _measured(list(images.values()), target, look, _panel(extractor, judges))
    return dict(zip(images, measured, strict=True))


def transfer_markdown(rows: Mapping[str, TransferMeasures]) -> str:
    """Return rows by name as a Markdown table, measures in columns; a dash where there is no number.

    Raises:
        ConfigError: If there is no row, or the rows were measured by different judges.
    """
    columns = [list(measured.as_dict()) for measured in rows.values()]
    if not columns:
        raise ConfigError("expected at least one row, got none; see transfer_table")
    if any(names != columns[0] for names in columns):
        raise ConfigError("expected rows with the same judges, got different ones; measure all with the same judges=")
    lines = [["result", *columns[0]], ["---"] * (len(columns[0]) + 1)]
    lines += [[name, *map(_shown, measured.as_dict().values())] for name, measured in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def structure_distance(image: ImageLike, structure: ImageLike, judge: Extractor | Judge) -> float:
    """Return the mean squared difference of two images' self-similarity, 0..4; 0 at equality.

    ``structure_loss`` of Tumanyan et al., Splicing ViT Features, CVPR 2022, as a measure: what Ctrl-X (Lin et al.,
    NeurIPS 2024) calls self-similarity. The image is resized to the network size of the structure image.

    Args:
        image: The image to measure.
        structure: The image whose structure is wanted.
        judge: The network, with its default tap, ``key@-1`` of vision transformers; a :class:`Judge` has another.

    Raises:
        ImageError, ShapeError: If an image cannot be read or does not do.
    """
    judge, wanted = _as_judge(judge), load_image(structure)
    size = judge.extractor.preprocess.network_size(_size(wanted))
    return float(structure_loss(judge.read_structure(image, size), judge.read_structure(wanted, size)))


def appearance_similarity(image: ImageLike, appearance: ImageLike, judge: Extractor | Judge) -> float:
    """Return the cosine similarity of two images' CLS tokens, −1..1; 1 at equality.

    What DreamBooth (Ruiz et al., CVPR 2023) and Ctrl-X (Lin et al., NeurIPS 2024) call DINO-I. Each image keeps its
    aspect. The tokens are those of the block's output, as in the appearance loss of Splice; an extractor loaded with
    ``norm=True`` takes them after the final norm, which is what the model itself returns.

    Args:
        image: The image to measure.
        appearance: The image whose appearance is wanted.
        judge: The network, with ``cls@-1``; a :class:`Judge` has another tap.

    Returns:
        The similarity; NaN if the judge has no appearance tap.

    Raises:
        ImageError, ShapeError: If an image cannot be read or does not do, or the tap has no CLS token.
    """
    judge = _as_judge(judge)
    return _cls_similarity(judge.read_appearance(image), judge.read_appearance(appearance))


def patch_distance(image: ImageLike, structure: ImageLike, preprocess: Preprocess) -> float:
    """Return :func:`structure_distance` measured by raw RGB patches: a judge without any training.

    It sees colours as well: an image recoloured in another way than by brightness is some distance from itself.

    Args:
        image: The image to measure.
        structure: The image whose structure is wanted.
        preprocess: Size and patches, for example those of an extractor, ``extractor.preprocess``.

    Raises:
        ImageError, ShapeError: If an image cannot be read or does not do.
    """
    wanted = load_image(structure)
    fixed = replace(preprocess, size=preprocess.network_size(_size(wanted)))
    with torch.no_grad():
        return float(structure_loss(raw_patches(image, fixed), raw_patches(wanted, fixed)))


def _measured(
    images: Sequence[Tensor], structure: Tensor, appearance: Tensor, panel: Sequence[Judge]
) -> Iterator[TransferMeasures]:
    """Yield the measures of each image; the panel's first judge is the network that was asked for."""
    preprocess = panel[0].extractor.preprocess
    judged = [_judgements(judge, images, structure, appearance) for judge in panel]
    for image, first, *others in zip(images, *judged, strict=True):
        yield TransferMeasures(
            first.structure_distance,
            first.appearance_similarity,
            first.foreground_iou,
            patch_distance(image, structure, preprocess),
            colour_distance(image, appearance),
            colour_shift(image, appearance),
            tuple(others),
        )


def _judgements(judge: Judge, images: Sequence[Tensor], structure: Tensor, appearance: Tensor) -> Iterator[Judgement]:
    """Yield what a judge says of each image; the two sources are read once."""
    size = judge.extractor.preprocess.network_size(_size(structure))
    wanted, look = judge.read_structure(structure, size), judge.read_appearance(appearance)
    split = foreground_mask(wanted)
    # Images one by one: in a batch, the same pixels can come out different in the last digit.
    for image in images:
        made, seen = judge.read(image, size)
        yield Judgement(
            judge.name,
            float(structure_loss(made, wanted)),
            _cls_similarity(seen, look),
            foreground_iou(foreground_mask(made, split), split),
        )


def _panel(extractor: Extractor | Judge, judges: Sequence[Extractor | Judge] | None) -> list[Judge]:
    first = _as_judge(extractor)
    panel = [first, *(_middle(first) if judges is None else map(_as_judge, judges))]
    names = [judge.name for judge in panel]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"expected judges with different names, got '{twice[0]}' twice; try Judge(…, name='…')")
    return panel


def _as_judge(judge: object) -> Judge:
    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, Extractor):
        return Judge(judge, judge.card.default_tap, "cls@-1" if judge.card.has_cls else None)
    raise ConfigError(f"expected an Extractor or a Judge, got {type(judge).__name__}; try load_extractor('mini')")


def _middle(judge: Judge) -> list[Judge]:
    """Return a judge in the middle of the same network; none where layers have names, or this one is there already."""
    layer = judge.extractor.card.depth // 2
    taps = [None if tap is None else Tap.parse(tap) for tap in (judge.structure, judge.appearance)]
    if any(tap is not None and (isinstance(tap.layer, str) or tap.layer == layer) for tap in taps):
        return []
    structure, look = (None if tap is None else replace(tap, layer=layer) for tap in taps)
    assert structure is not None
    return [Judge(judge.extractor, structure, look)]


def _with_cls(d: Descriptor) -> Descriptor:
    if d.cls is None:
        raise ShapeError(
            f"expected a CLS token for the appearance, but {d.tap} of {d.model} has none; "
            "try Judge(extractor, structure=…, appearance=None)"
        )
    return d


def _cls_similarity(a: Descriptor | None, b: Descriptor | None) -> float:
    if a is None or b is None:
        return math.nan
    assert a.cls is not None
    assert b.cls is not None
    cosine = float((unit(a.cls.double()) * unit(b.cls.double())).sum())
    return max(-1.0, min(1.0, cosine))  # rounding may leave the range


def _iou_of_pair(masks: object) -> float:
    if not isinstance(masks, tuple | list) or len(masks) != 2:
        got = f"{len(masks)} of them" if isinstance(masks, tuple | list) else type(masks).__name__
        raise ConfigError(f"expected masks=(of the image, of the structure image), got {got}; try both masks in a pair")
    return foreground_iou(*masks)


def _size(image: Tensor) -> Size:
    return int(image.shape[1]), int(image.shape[2])


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
