"""What is drawn over a picture stands where it belongs, and what is found lies there, in pixels as they were given."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from studios import noise, studio_in, upload

import vitfeats as vf
from vitfeats.apps.demo import drawing, looking
from vitfeats.apps.demo.intake import SHOWN, WORKING, Picture, reduced
from vitfeats.apps.demo.looking import explore, mutual, similar
from vitfeats.apps.demo.studio import MOST_TOKENS, Studio, View
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.grid import PatchGrid
from vitfeats.matching import Matches

KEYS = View("mini", "key", 11, 224)
MAPS = View("vgg_mini", "out", 6, 224)
EYE = (180.0, 110.0)  # (x, y) in pixels of the cat


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Iterator[Studio]:
    with studio_in(tmp_path_factory.mktemp("demo")) as studio:
        yield studio


@pytest.fixture(scope="module")
def cat(studio) -> str:
    return upload(studio, vf.samples.cat(), "cat.png")


def given(width: int, height: int) -> Picture:
    """Return a grey picture of a size as it was given."""
    image = reduced(Image.new("RGB", (width, height), (120, 120, 120)), WORKING)
    return Picture(image, (image.width / width, image.height / height))


def ring_in(drawn: Image.Image) -> tuple[float, float]:
    """Return the middle of the ring, by its colour."""
    rows, cols = np.nonzero((np.asarray(drawn) == drawing.RING).all(-1))
    assert len(rows)
    return (cols.min() + cols.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2


def cross_in(drawn: Image.Image) -> tuple[float, float]:
    """Return the middle of the cross: the row and the column with most of its white."""
    white = (np.asarray(drawn) == drawing.CROSS).all(-1)
    best_rows, best_cols = (np.nonzero(counts == counts.max())[0] for counts in (white.sum(1), white.sum(0)))
    return best_cols.mean() + 0.5, best_rows.mean() + 0.5


# Drawing -------------------------------------------------------------------------------------------------------------

SIZES = [(300, 200), (200, 300), (900, 901), (1024, 400), (17, 1020)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", [(0.5, 0.5), (0.3, 0.8), (0.5, 0.94)])
def test_the_ring_stands_at_the_point_of_the_picture(size, where):
    picture = given(*size)
    point = tuple(share * side for share, side in zip(where, picture.image.size, strict=True))
    drawn = drawing.pointed(picture.shown, picture, ring=point)
    assert drawn.size == picture.shown.size
    found = ring_in(drawn)
    wanted = tuple(share * side for share, side in zip(where, drawn.size, strict=True))
    for axis in (0, 1):
        if wanted[axis] > 20 and drawn.size[axis] - wanted[axis] > 20:  # the whole ring is inside
            assert found[axis] == pytest.approx(wanted[axis], abs=1.01)


def test_the_ring_stands_above_the_cross_where_both_are_asked_for():
    picture = given(600, 400)
    both = drawing.pointed(picture.shown, picture, ring=(150, 100), cross=(420, 310))
    width, height = both.size
    assert ring_in(both) == pytest.approx((150 / 600 * width, 100 / 400 * height), abs=1.01)
    right = both.crop((320, 210, width, height))
    assert cross_in(right) == pytest.approx((420 / 600 * width - 320, 310 / 400 * height - 210), abs=1.01)


@pytest.mark.parametrize("point", [(0, 0), (600, 400), (600, 0)])
def test_marks_at_the_very_edge_leave_the_size_alone(point):
    picture = given(600, 400)
    drawn = drawing.pointed(picture.shown, picture, ring=point, cross=point)
    assert drawn.size == picture.shown.size == (640, 427)
    assert (np.asarray(drawn) == drawing.RING).all(-1).any()
    assert not (np.asarray(picture.shown) == drawing.RING).all(-1).any()  # a copy was drawn on


@pytest.mark.parametrize("stride", [8, 16])
def test_a_heat_map_is_brighter_where_values_are_larger_and_each_token_has_its_place(stride):
    picture = given(320, 224)
    grid = PatchGrid.covering((224, 320), 16, stride)
    values = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(0)).float()
    drawn = np.asarray(drawing.heat(picture, values.view(grid.rows, grid.cols), grid)).astype(float)
    assert drawn.shape == (448, 640, 3)
    cols, rows = np.floor(2 * grid.centres().numpy()).astype(int).T  # drawn at twice the size
    seen = drawn[rows, cols].sum(-1)
    order = values.argsort()
    # Of 256 levels: neighbours may share one.
    assert np.all(np.diff(seen[order]) >= -2)
    assert seen[order[-1]] - seen[order[0]] > 200


def test_a_heat_map_of_one_value_is_drawn():
    grid = PatchGrid(4, 6, 16, 16)
    drawn = np.asarray(drawing.heat(given(96, 64), torch.full((4, 6), 0.3), grid))
    assert (drawn == drawn[0, 0]).all()


# Explore -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [KEYS, MAPS, View("mini", "token", 5, 224, 8)])
def test_colours_are_those_of_the_components_at_the_middles_of_tokens(studio, cat, view):
    picture = studio.picture(cat)
    d, _ = studio.read(picture, view)
    rgb = vf.PCA(3).fit(d).to_rgb(d)[0].flatten(1).T
    drawn = np.asarray(explore(studio, cat, view).components)
    assert drawn.shape[:2] == picture.shown.size[::-1]
    scale = np.array(picture.shown.size) / np.array(d.grid.network_size[::-1])
    cols, rows = np.floor(d.grid.centres().numpy() * scale).astype(int).T
    assert np.abs(drawn[rows, cols] / 255 - rgb.numpy()).max() <= 0.5 / 255 + 1e-6


def test_saliency_is_shown_where_the_model_has_cls(studio, cat):
    seen = explore(studio, cat, KEYS)
    assert explore(studio, cat, MAPS).saliency is None
    d, looks = studio.read(studio.picture(cat), KEYS)
    wanted = drawing.heat(studio.picture(cat), vf.saliency(looks)[0] ** 0.5, looks.grid)
    assert np.array_equal(np.asarray(seen.saliency), np.asarray(wanted))
    assert seen.told.startswith(
        f"key@11 of mini, {d.grid.rows}×{d.grid.cols} tokens of 192. Most similar elsewhere: x "
    )
    assert re.search(r"\(cosine 0\.\d\d\)\. The colours hold \d+%, \d+%, \d+% of the variance\.$", seen.told)


def test_without_a_point_the_middle_is_asked_about(studio, cat):
    seen = explore(studio, cat, KEYS)
    assert seen.asked == pytest.approx((451 / 2, 150))
    again = explore(studio, cat, KEYS, (451 / 2, 150))
    assert np.array_equal(np.asarray(seen.similarity), np.asarray(again.similarity))
    alone = similar(studio, cat, KEYS)
    assert alone.at == pytest.approx((451 / 2, 150))
    assert np.array_equal(np.asarray(seen.similarity), np.asarray(alone.heat))
    assert alone.told in seen.told


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(300, 210), (1500, 1050)])
def test_the_ring_stands_at_the_asked_point_of_an_upright_picture(studio, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = upload(studio, noise(*size), f"{size[0]}_{orientation}.jpg", exif=exif)
    wide, high = size if orientation in (1, 3) else size[::-1]
    found = similar(studio, path, KEYS, point=(0.3 * wide, 0.6 * high))
    for drawn in (found.asked, found.heat):
        assert drawn.width / drawn.height == pytest.approx(wide / high, rel=0.01)
        assert max(drawn.size) == SHOWN
        assert ring_in(drawn) == pytest.approx((0.3 * drawn.width, 0.6 * drawn.height), abs=1.5)
    assert found.at == pytest.approx((0.3 * wide, 0.6 * high))
    assert 0 < found.point[0] < wide
    assert 0 < found.point[1] < high


def spread_indices(d: vf.Descriptor) -> list[int]:
    """Return tokens in a corner, at two edges, inside, and in the last corner."""
    return [0, d.grid.cols // 2, d.grid.cols, d.grid.tokens // 2, d.grid.tokens - 1]


@pytest.mark.parametrize("view", [KEYS, MAPS, View("mini", "token", 5, 224, 8)])
def test_in_one_picture_the_most_similar_place_is_the_best_that_does_not_touch_the_token_asked_about(studio, cat, view):
    d, _ = studio.read(studio.picture(cat), view)
    centres = d.frames[0].to_source(d.grid.centres())
    units = torch.nn.functional.normalize(d.features[0].double(), dim=-1)
    for index in spread_indices(d):
        row, col = divmod(index, d.grid.cols)
        allowed = [
            other
            for other in range(d.grid.tokens)
            if max(abs(other // d.grid.cols - row), abs(other % d.grid.cols - col)) > 1
        ]
        cosines = {other: float(units[index] @ units[other]) for other in allowed}
        wanted = max(cosines, key=lambda other: cosines[other])
        x, y = (float(value) for value in centres[index])
        found = similar(studio, cat, view, point=(x, y))
        assert found.similarity == pytest.approx(cosines[wanted], abs=1e-4)
        assert found.point == pytest.approx(tuple(centres[wanted].tolist()), abs=1e-3)
        assert found.told.endswith(
            f" tokens of {d.dim}. Most similar elsewhere: x {found.point[0]:.0f}, y {found.point[1]:.0f} "
            f"(cosine {found.similarity:.2f})."
        )


def test_the_same_pixels_in_another_file_are_the_same_picture(studio, cat):
    again = upload(studio, vf.samples.cat(), "cat_again.png")
    found, alone = similar(studio, cat, KEYS, again, EYE), similar(studio, cat, KEYS, point=EYE)
    assert (found.point, found.told) == (alone.point, alone.told)
    assert np.array_equal(np.asarray(found.heat), np.asarray(alone.heat))


@pytest.mark.parametrize("sides", [(32, 32), (48, 48)])
def test_where_every_token_touches_the_one_asked_about_it_is_itself_that_is_found(studio, sides):
    path = upload(studio, noise(*sides), f"{sides[0]}.png")
    found = similar(studio, path, View("mini", "key", 11, sides[0], 16))
    picture = studio.picture(path)
    d, _ = studio.read(picture, View("mini", "key", 11, sides[0], 16))
    assert (d.grid.rows, d.grid.cols) == (sides[0] // 16,) * 2
    own = d.grid.index_of(torch.tensor([[sides[0] / 2, sides[1] / 2]]))
    assert found.point == pytest.approx(tuple(d.grid.centres_of(own)[0].tolist()), abs=1e-3)


@pytest.fixture(scope="module")
def twin(studio) -> str:
    """The cat with another pixel in a corner: to the demo, a picture of its own."""
    image = vf.samples.cat().copy()
    image.putpixel((0, 0), (255, 0, 255))
    return upload(studio, image, "twin.png")


@pytest.mark.parametrize("view", [KEYS, MAPS])
def test_in_a_twin_of_a_picture_the_token_asked_about_is_found(studio, cat, twin, view):
    d, _ = studio.read(studio.picture(cat), view)
    centres = d.frames[0].to_source(d.grid.centres())
    for index in spread_indices(d)[1:]:  # the first token has the other pixel
        x, y = (float(value) for value in centres[index])
        found = similar(studio, cat, view, twin, (x, y))
        assert found.point == pytest.approx((x, y), abs=1e-3)
        assert found.similarity == pytest.approx(1, abs=5e-3)
        assert found.told.endswith(f" tokens of {d.dim}. Most similar: x {x:.0f}, y {y:.0f} (cosine 1.00).")


def test_between_tokens_the_peak_is_next_to_the_point_where_a_place_looks_like_no_other(studio, cat, twin):
    d, _ = studio.read(studio.picture(cat), MAPS)
    step = max(d.frames[0].to_source(torch.tensor([[16.0, 16.0]]))[0].tolist())
    far = []
    for x, y in np.random.default_rng(0).uniform((30, 30), (420, 270), (24, 2)):
        found = similar(studio, cat, MAPS, twin, (float(x), float(y))).point
        far.append(max(abs(found[0] - x), abs(found[1] - y)) > 1.01 * step)
    assert np.mean(far) < 0.25  # chance would be far above 0.9


@pytest.mark.parametrize("view", [KEYS, MAPS])
def test_a_point_is_found_again_in_a_part_of_the_picture(studio, view):
    whole = vf.samples.cat().resize((336, 224))
    first = upload(studio, whole, "whole.png")
    second = upload(studio, whole.crop((48, 0, 272, 224)), "part.png")  # three tokens further right
    far = []
    for x in range(48 + 24, 272 - 16, 32):
        for y in range(24, 208, 32):
            found = similar(studio, first, view, second, (x, y)).point
            far.append(max(abs(found[0] - (x - 48)), abs(found[1] - y)))
    assert np.median(far) <= 16
    assert np.median(far) < 0.4 * np.median([abs(x - y) for x in range(0, 224, 7) for y in range(0, 224, 7)])


@pytest.mark.parametrize(("width", "height"), [(2000, 1500), (1100, 1900)])
def test_a_large_picture_is_asked_in_its_own_pixels(studio, width, height):
    large = noise(width, height, 3)
    small = reduced(large, WORKING)
    first, second = upload(studio, large, f"{width}.png"), upload(studio, small, f"{width}_small.png")
    across, down = width / small.width, height / small.height
    for x, y in ((100, 100), (width * 0.7, height * 0.4), (width, height), (0, height)):
        a = similar(studio, first, KEYS, point=(x, y))
        b = similar(studio, second, KEYS, point=(x / across, y / down))
        assert a.point == pytest.approx((b.point[0] * across, b.point[1] * down))
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)
        assert np.array_equal(np.asarray(a.heat), np.asarray(b.heat))


def test_a_point_outside_is_brought_to_the_edge(studio, cat):
    for outside, edge in (((-50, 80), (0, 80)), ((9999, -1), (451, 0)), ((float("inf"), 300.4), (451, 300))):
        found, wanted = similar(studio, cat, KEYS, point=outside), similar(studio, cat, KEYS, point=edge)
        assert found.told == wanted.told
        assert found.at == pytest.approx(edge)
        assert np.array_equal(np.asarray(found.heat), np.asarray(wanted.heat))
        assert explore(studio, cat, KEYS, outside).asked == pytest.approx(edge)
    with pytest.raises(ShapeError, match="expected finite points"):
        similar(studio, cat, KEYS, point=(float("nan"), 3))


def test_the_ring_is_drawn_in_the_searched_picture_only_where_it_is_the_same(studio, cat):
    other = upload(studio, noise(300, 200, 5), "other.png")
    with_ring = [similar(studio, cat, KEYS).heat, similar(studio, cat, KEYS, cat).heat]
    for drawn in with_ring:
        assert ring_in(drawn) == pytest.approx((drawn.width / 2, drawn.height / 2), abs=1.01)
    found = similar(studio, cat, KEYS, other)
    assert not (np.asarray(found.heat) == drawing.RING).all(-1).any()
    assert found.heat.size == (640, 427)
    assert ring_in(found.asked) == pytest.approx((found.asked.width / 2, found.asked.height / 2), abs=1.01)


def test_the_ring_is_drawn_where_the_picture_was_dropped_and_read_again(studio, cat, monkeypatch):
    monkeypatch.setattr(studio._pictures, "get", lambda key: None)  # as others' pictures may do at any moment
    ring_in(explore(studio, cat, KEYS).similarity)


@pytest.mark.parametrize("size", [(17, 1020), (1020, 17)])
@pytest.mark.parametrize(
    "view",
    [
        KEYS,
        pytest.param(MAPS, id="vgg"),
        pytest.param(View("vgg_mini", "out", 8, 224), id="vgg deep"),
        View("ddpm_mini", "residual", 15, 64),
    ],
)
def test_a_picture_sixty_times_as_long_as_wide_is_explored(studio, size, view):
    path = upload(studio, noise(*size), f"long_{size[0]}.png")
    found = explore(studio, path, view)
    assert found.components.size == found.similarity.size == studio.picture(path).shown.size
    assert max(found.components.size) == SHOWN


def test_a_picture_of_one_colour_is_explored(studio):
    path = upload(studio, Image.new("RGB", (200, 150), "white"), "white.png")
    for view in (KEYS, MAPS):
        assert explore(studio, path, view).components.size == (640, 480)


# Match ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn_matches(monkeypatch) -> list[Matches]:
    """What is handed over to be drawn."""
    found: list[Matches] = []
    real = looking.plot.matches

    def matches(a, b, these, **others):
        found.append(these)
        assert others["most"] > 0
        return real(a, b, these, **others)

    monkeypatch.setattr(looking.plot, "matches", matches)
    return found


def test_mutual_matches_are_those_of_the_library(studio, cat, drawn_matches):
    other = upload(studio, noise(1500, 1000, 7), "large.png")
    drawn, told = mutual(studio, cat, other, KEYS, most=7)
    first, second = studio.picture(cat), studio.picture(other)
    wanted = vf.match_mutual(studio.read(first, KEYS)[0], studio.read(second, KEYS)[0])
    assert told == (
        f"key@11 of mini, 14×21 tokens of 192. {len(wanted)} mutual matches of 294 and 294 tokens; "
        f"{min(7, len(wanted))} drawn."
    )
    assert drawn.width > drawn.height
    for found, points, picture in (
        (drawn_matches[0].points_a, wanted.points_a, first),
        (drawn_matches[0].points_b, wanted.points_b, second),
    ):
        scale = np.divide(picture.shown.size, picture.image.size)
        assert np.allclose(found, points.numpy() * scale, rtol=1e-4)


def test_every_token_of_a_picture_matches_itself(studio, cat):
    assert "294 mutual matches of 294 and 294 tokens; 40 drawn." in mutual(studio, cat, cat, KEYS)[1]


def test_matches_of_a_narrow_picture_lie_in_it(studio, drawn_matches):
    path = upload(studio, noise(17, 1020), "narrow.png")
    mutual(studio, path, path, KEYS)
    width, height = studio.picture(path).shown.size
    assert drawn_matches[0].points_a[:, 1].max() < height
    assert drawn_matches[0].points_a[:, 0].max() < width


def test_layers_of_too_many_tokens_are_not_matched(studio, cat, monkeypatch):
    tokens = []
    monkeypatch.setattr(looking, "match_mutual", lambda a, b: tokens.append(a.grid.tokens))
    with pytest.raises(ConfigError, match=f"at most {MOST_TOKENS} tokens a picture, got .*; choose a deeper layer"):
        mutual(studio, cat, cat, View("vgg_mini", "out", 0, 224))
    assert not tokens


def test_two_pictures_are_needed_for_a_match(studio, cat):
    for first, second, told in ((None, cat, "a first picture"), (cat, None, "a second picture")):
        with pytest.raises(ConfigError, match=f"expected {told}, got none; upload one, or click a sample"):
            mutual(studio, first, second, KEYS)
    with pytest.raises(ConfigError, match="expected a first picture, got none"):
        similar(studio, None, KEYS, cat)
    with pytest.raises(ConfigError, match="expected a picture, got none"):
        explore(studio, None, KEYS)


def test_nothing_is_written_into_the_folder_by_looking(studio, cat):
    before = sorted(studio.folder.path.rglob("*"))
    explore(studio, cat, KEYS)
    mutual(studio, cat, cat, KEYS)
    assert sorted(studio.folder.path.rglob("*")) == before
    assert Path(cat).exists()
