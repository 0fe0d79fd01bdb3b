"""What the tabs Explore and Match show: components, saliency, similarity, matches. Plain functions, without a page."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitfeats import plot
from vitfeats.apps.demo.drawing import components, heat, pointed
from vitfeats.apps.demo.intake import Picture
from vitfeats.apps.demo.studio import MOST_TOKENS, Studio, View
from vitfeats.attention_maps import saliency
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError
from vitfeats.matching import Matches, match_mutual
from vitfeats.pca import PCA
from vitfeats.similarity import away_from, similarity_map

Point = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Explored:
    """What is seen of one picture.

    Attributes:
        components: The first three components of its tokens.
        saliency: What CLS attends to, or None where the model has no CLS.
        similarity: What looks like the point asked about.
        asked: (x, y) of that point in pixels of the picture as it was given.
        told: A sentence.
    """

    components: Image.Image
    saliency: Image.Image | None
    similarity: Image.Image
    asked: Point
    told: str


@dataclass(frozen=True, eq=False)
class Found:
    """Where a point of one picture looks alike in another.

    Attributes:
        asked: The first picture with the point.
        at: (x, y) of the point, in pixels of the first picture as it was given.
        heat: The second, with its similarity to the point, and the most similar place.
        point: (x, y) of that place, in pixels of the second picture as it was given.
        similarity: Cosine similarity there, −1..1.
        told: A sentence.
    """

    asked: Image.Image
    at: Point
    heat: Image.Image
    point: Point
    similarity: float
    told: str


def explore(studio: Studio, path: str | None, view: View, point: Point | None = None) -> Explored:
    """Return all that is shown of one picture; the point is its middle where none is asked about."""
    picture = studio.picture(path)
    d, looks = studio.read(picture, view)
    fitted = studio.once(("pca", picture.key, view), lambda: PCA(3).fit(d))
    shares = ", ".join(f"{share:.0%}" for share in fitted.explained_variance_ratio_.tolist())
    found = similar(studio, path, view, path, point)
    # The square root, for CLS looks at few tokens hard, and at many a little.
    seen = None if looks is None else heat(picture, saliency(looks)[0].sqrt(), looks.grid)
    return Explored(
        components(picture, d, fitted),
        seen,
        found.heat,
        found.at,
        f"{found.told} The colours hold {shares} of the variance.",
    )


def similar(
    studio: Studio, path: str | None, view: View, other: str | None = None, point: Point | None = None
) -> Found:
    """Return where a point of a picture looks alike in another, or elsewhere in itself.

    Args:
        studio: What reads.
        path: The picture asked about.
        view: How both are looked at.
        other: The picture that is searched; None is the same.
        point: (x, y) in pixels of the first picture as it was given, brought to its edge where it lies outside; None
            is its middle.
    """
    first = studio.picture(path, "a first picture")
    second = first if other is None else studio.picture(other, "a second picture")
    (a, _), (b, _) = studio.read(first, view), studio.read(second, view)
    asked = _asked(first, point)
    here = first.inside(*asked)
    values = similarity_map(a, [here], b)[0]
    alone = second.key == first.key
    best = (_elsewhere(values, b, here) if alone else values).argmax().cpu()[None]
    x, y = b.frames[0].to_source(b.grid.centres_of(best))[0].tolist()
    found = second.outside(x, y)
    level = float(values.flatten()[best])
    where = f"{' elsewhere' if alone else ''}: x {found[0]:.0f}, y {found[1]:.0f}"
    return Found(
        pointed(first.shown, first, ring=here),
        asked,
        heat(second, values, b.grid, ring=here if alone else None, cross=(x, y)),
        found,
        level,
        f"{_read(b)} Most similar{where} (cosine {level:.2f}).",
    )


def _elsewhere(values: Float[Tensor, "rows cols"], d: Descriptor, point: Point) -> Float[Tensor, "rows cols"]:
    """Return similarities without those of the point's own token and of its neighbours, if there are others."""
    left = away_from(point, values, d)
    return left if bool(left.isfinite().any()) else values


def mutual(studio: Studio, path: str | None, other: str | None, view: View, most: int = 40) -> tuple[Image.Image, str]:
    """Return a picture of tokens of two pictures that are each other's most similar one, and a sentence."""
    first, second = studio.picture(path, "a first picture"), studio.picture(other, "a second picture")
    (a, _), (b, _) = studio.read(first, view), studio.read(second, view)
    if max(a.grid.tokens, b.grid.tokens) > MOST_TOKENS:
        raise ConfigError(
            f"expected at most {MOST_TOKENS} tokens a picture, got {a.grid.tokens} and {b.grid.tokens} at {a.tap}; "
            "choose a deeper layer or a smaller size"
        )

    def draw() -> tuple[Matches, Image.Image]:
        found = match_mutual(a, b)
        return found, plot.matches(first.shown, second.shown, _scaled(found, first, second), most=most)

    found, drawn = studio.work(draw)
    shown = min(most, len(found))
    return (
        drawn,
        f"{_read(a)} {len(found)} mutual matches of {a.grid.tokens} and {b.grid.tokens} tokens; {shown} drawn.",
    )


def _scaled(found: Matches, first: Picture, second: Picture) -> Matches:
    """Return matches in pixels of the pictures as they are shown."""
    scale_a, scale_b = (found.points_a.new_tensor(picture.drawn_at(1.0, 1.0)) for picture in (first, second))
    return replace(found, points_a=found.points_a * scale_a, points_b=found.points_b * scale_b)


def _asked(picture: Picture, point: Point | None) -> Point:
    if point is not None:
        return picture.outside(*picture.inside(*point))
    return picture.outside(picture.image.width / 2, picture.image.height / 2)


def _read(d: Descriptor) -> str:
    return f"{d.tap} of {d.model}, {d.grid.rows}×{d.grid.cols} tokens of {d.dim}."
