"""Pairs with known answers: the answers are right, and cannot be had by answering "the same place"."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from synthetic import describe

from vitfeats.apps.evaluation import (
    Pair,
    StereoPair,
    WarpedImages,
    pck,
    raw_patches,
    read_pairs,
    stereo_table,
    warp_table,
)
from vitfeats.apps.evaluation.datasets import apply_homography, random_homography, warp
from vitfeats.apps.evaluation.describing import describe_with
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError
from vitfeats.preprocess import Preprocess

HALF = (0.5, 0.5, 0.5)


def smooth(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return a photograph-like image without detail, so that a colour can be read a little beside its place."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 3, 4, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0.05, 0.95)[0]


def colours_at(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return (n, 3) colours, bilinear between pixel centres."""
    height, width = image.shape[1:]
    grid = (points / torch.tensor([width, height]) * 2 - 1)[None, None]
    return F.grid_sample(image[None], grid, align_corners=False, padding_mode="border")[0, :, 0].T


# The stereo pair ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stereo() -> StereoPair:
    return StereoPair()


def test_truth_is_the_disparity_of_the_pixel(stereo):
    assert stereo.left.shape == stereo.right.shape == (3, 500, 741)
    rows, cols = np.array([100, 250, 400, 499]), np.array([300, 450, 700, 740])
    for row, col in zip(rows, cols, strict=True):
        # Anywhere inside the pixel, its disparity holds: the pixel (row, col) covers x from col to col + 1.
        points = torch.tensor([[col + 0.0, row + 0.0], [col + 0.5, row + 0.5], [col + 0.9, row + 0.9]])
        found, known = stereo.truth(points)
        shift = float(stereo.disparity[row, col])
        assert known.all() == math.isfinite(shift)
        if math.isfinite(shift):
            assert torch.allclose(found[:, 0], points[:, 0] - shift)
        assert torch.equal(found[:, 1], points[:, 1])


def test_unknown_and_left_out_points_are_said_to_be_unknown(stereo):
    row, col = (int(index[0]) for index in torch.nonzero(stereo.disparity.isinf(), as_tuple=True))
    first = int(stereo.disparity[200].isfinite().nonzero()[0])
    assert first < stereo.disparity[200, first]  # its content has left the right image
    found, known = stereo.truth(torch.tensor([[col + 0.5, row + 0.5], [first + 0.5, 200.5], [400.5, 200.5]]))
    assert known.tolist() == [False, False, bool(stereo.disparity[200, 400].isfinite())]
    assert found.isfinite().all()


def test_the_far_corner_is_still_in_the_image(stereo):
    stereo.truth(torch.tensor([[741.0, 500.0], [0.0, 0.0]]))


def test_points_and_their_truth_look_alike(stereo):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 2, generator=generator) * torch.tensor([741.0, 500.0])
    truth, known = stereo.truth(points)
    assert 0.8 < known.float().mean() < 1
    left = colours_at(stereo.left, points[known])

    def difference(where):
        return (left - colours_at(stereo.right, where)).abs().mean(1).median()

    right = difference(truth[known])
    mirrored = difference(2 * points[known] - truth[known])
    assert right < difference(points[known]) / 3
    assert right < mirrored / 3
    # Half a pixel the wrong way would already be worse.
    assert right < difference(truth[known] + torch.tensor([2.0, 0.0]))
    assert right < difference(truth[known] - torch.tensor([2.0, 0.0]))


# Warped images --------------------------------------------------------------------------------------------------------

SHAPES = [(60, 60), (48, 96), (96, 48), (50, 70), (30, 120)]
IMAGES = [smooth(*SHAPES[index % len(SHAPES)], seed=index) for index in range(20)]


def assert_same(a: Pair, b: Pair) -> None:
    assert a.name == b.name
    assert all(
        torch.equal(getattr(a, part), getattr(b, part)) for part in ("image_a", "image_b", "points_a", "points_b")
    )


def test_the_same_seed_gives_the_same_pairs_in_any_order():
    first, second = WarpedImages(IMAGES, seed=3), WarpedImages(IMAGES, seed=3)
    forward = [first[index] for index in range(20)]
    for index in reversed(range(20)):
        assert_same(second[index], forward[index])
    assert_same(second[-1], forward[19])
    for one, other in zip(first, forward, strict=True):
        assert_same(one, other)


def test_another_seed_or_another_place_gives_another_warp():
    same_image = [IMAGES[0]] * 2
    pairs = WarpedImages(same_image, seed=0)
    assert not torch.equal(pairs[0].image_b, pairs[1].image_b)
    assert not torch.equal(pairs[0].image_b, WarpedImages(same_image, seed=1)[0].image_b)


def test_the_state_of_the_random_numbers_is_left_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    WarpedImages(IMAGES)[0]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_place_scores_at_most_a_tenth(seed):
    for pair in WarpedImages(IMAGES, seed=seed):
        size = (float(pair.image_b.shape[1]), float(pair.image_b.shape[2]))
        assert pck(pair.points_a, pair.points_b, size) <= 0.10, pair.name


def test_points_lie_inside_both_images():
    for pair in WarpedImages(IMAGES):
        assert len(pair.points_a) == len(pair.points_b) >= 10
        for image, points in ((pair.image_a, pair.points_a), (pair.image_b, pair.points_b)):
            assert (points >= 0).all()
            assert (points <= torch.tensor([image.shape[2], image.shape[1]])).all()


def test_the_content_of_a_point_is_where_its_partner_is():
    for seed in range(4):
        # Larger ones, so that reading a colour between pixels is exact enough.
        images = [smooth(3 * height, 3 * width, seed=index) for index, (height, width) in enumerate(SHAPES)]
        for index, pair in enumerate(WarpedImages(images, seed=seed)):
            assert torch.equal(pair.image_a, images[index])
            # Away from the frame, where the warped image fades into the mean colour.
            height, width = pair.image_b.shape[1:]
            inside = ((pair.points_b > 2) & (pair.points_b < torch.tensor([width - 2, height - 2]))).all(1)
            before = colours_at(pair.image_a, pair.points_a[inside])
            after = colours_at(pair.image_b, pair.points_b[inside])
            whole = (after < 0.999).all(1)  # the gain may have cut bright colours off
            before, after = before[whole], after[whole]
            assert len(before) >= 5
            gain = (before * after).sum(0) / before.square().sum(0)
            assert ((gain > 0.69) & (gain < 1.31)).all()
            assert (after - before * gain).abs().max() < 0.02
            # Answering "the same place" would not do.
            beside = colours_at(pair.image_b, pair.points_a[inside])[whole]
            assert (beside - before * gain).abs().max() > 0.05


def test_warping_by_the_identity_changes_nothing():
    image = smooth(20, 30)
    assert torch.allclose(warp(image, torch.eye(3)), image, atol=1e-5)


def test_warping_by_a_shift_moves_pixels_and_fills_in_the_mean():
    image = smooth(20, 30)
    shift = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, -3.0], [0.0, 0.0, 1.0]])
    moved = warp(image, shift)
    assert torch.allclose(moved[:, :17, 5:], image[:, 3:, :25], atol=1e-5)
    mean = image.mean((1, 2))
    assert torch.allclose(moved[:, :, :4], mean[:, None, None].expand(3, 20, 4), atol=1e-5)


def test_a_homography_is_applied_as_it_is_defined():
    generator = torch.Generator().manual_seed(0)
    matrix = random_homography((40, 60), generator)
    points = torch.rand(7, 2, generator=generator) * 40
    for (x, y), found in zip(points.tolist(), apply_homography(matrix, points).tolist(), strict=True):
        u, v, w = (matrix.double() @ torch.tensor([x, y, 1.0], dtype=torch.float64)).tolist()
        assert found == pytest.approx([u / w, v / w], abs=1e-4)
    assert torch.allclose(
        apply_homography(torch.linalg.inv(matrix), apply_homography(matrix, points)), points, atol=1e-3
    )


def test_homographies_stay_within_what_is_promised():
    generator = torch.Generator().manual_seed(0)
    centre = torch.tensor([[30.0, 20.0]])
    for _ in range(200):
        matrix = random_homography((40, 60), generator)
        moved = apply_homography(matrix, centre)[0] - centre[0]
        assert abs(moved[0]) <= 15.01
        assert abs(moved[1]) <= 10.01
        # The linear part at the centre: a rotation of at most 45 degrees and a scale of 0.6 to 1.5, but for the tilt.
        step = 1e-2
        across = (apply_homography(matrix, centre + torch.tensor([[step, 0.0]])) - apply_homography(matrix, centre))[0]
        assert 0.4 <= across.norm() / step <= 1.8
        assert abs(math.degrees(math.atan2(across[1], across[0]))) <= 55


def test_images_are_found_in_folders_and_named(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.png", "inner/a.JPG", "inner/c.webp"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    pairs = WarpedImages(tmp_path)
    assert [pair.name for pair in pairs] == ["b.png", "a.JPG", "c.webp"]
    assert [pair.name for pair in WarpedImages([tmp_path / "b.png", IMAGES[0]])] == ["b.png", "1"]


def test_what_cannot_be_warped_is_refused(tmp_path):
    for nothing in (tmp_path, []):
        with pytest.raises(
            ImageError, match=r"expected a folder of images \(.jpg, .*\) or a list of them, got none in"
        ):
            WarpedImages(nothing)
    with pytest.raises(ConfigError, match="expected points of at least 2, got 1"):
        WarpedImages(IMAGES, points=1)
    for index in (20, -21):
        with pytest.raises(IndexError, match=f"expected an index below 20, got {index}"):
            WarpedImages(IMAGES)[index]


# Baselines and tables -------------------------------------------------------------------------------------------------


def preprocess(size=(32, 48), patch=16, stride=8) -> Preprocess:
    return Preprocess(size, patch, stride, HALF, HALF)


def test_raw_patches_are_the_pixels_of_each_patch():
    image = smooth(32, 48)
    d = raw_patches(image, preprocess())
    normalised = (image - 0.5) / 0.5
    assert d.features.shape == (1, 3 * 5, 3 * 16 * 16)
    for row in range(3):
        for col in range(5):
            patch = normalised[:, row * 8 : row * 8 + 16, col * 8 : col * 8 + 16]
            assert torch.allclose(d.features[0, row * 5 + col], patch.flatten(), atol=1e-6)
    assert d.frames[0].source_size == (32, 48)
    assert d.model == "raw RGB patches"


def test_the_stereo_table_has_the_row_of_a_fool(stereo):
    small = preprocess((80, 112), 16, 16)
    rows = stereo_table({"raw": lambda image: raw_patches(image, small)}, stereo, within=(8.0, 64.0, 10_000.0))
    assert [row.name for row in rows] == ["identity", "raw"]
    for row in rows:
        shares = list(row.shares.values())
        assert list(row.shares) == [8, 64, 10_000]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert row.matches > 0
    # The same place is off by the disparity itself, which can be counted without any matching.
    y, x = torch.meshgrid((torch.arange(5) + 0.5) * 100, (torch.arange(7) + 0.5) * 741 / 7, indexing="ij")
    centres = torch.stack([x.flatten(), y.flatten()], 1)
    disparity = stereo.disparity[centres[:, 1].long(), centres[:, 0].long()]
    known = disparity.isfinite() & (centres[:, 0] >= disparity)
    assert rows[0].matches == int(known.sum())
    assert rows[0].shares[64] == 1.0  # no disparity is larger
    assert rows[0].shares[8] == pytest.approx(float((disparity[known] <= 8).float().mean()))


def test_a_perfect_descriptor_has_a_perfect_row(stereo):
    # Features that name the true place: a code of the position on the right, looked up through the disparity.
    rows_, cols_ = 10, 14
    code = torch.eye(rows_ * cols_)[None]
    y, x = torch.meshgrid((torch.arange(rows_) + 0.5) * 50, (torch.arange(cols_) + 0.5) * 741 / cols_, indexing="ij")
    truth, known = stereo.truth(torch.stack([x.flatten(), y.flatten()], 1))
    col = (truth[:, 0] / 741 * cols_).long().clamp(0, cols_ - 1)
    left = torch.where(known[:, None], code[0, torch.arange(rows_ * cols_) // cols_ * cols_ + col], 0.0)[None]

    def describe_side(image):
        features = left if image is stereo.left else code
        return describe(features, rows_, cols_, patch=16, source=(500, 741))

    perfect = stereo_table({"perfect": describe_side}, stereo, within=(741 / cols_,))[1]
    assert perfect.shares[741 / cols_] == 1.0


def test_the_warp_table_is_the_mean_over_images():
    pairs = WarpedImages(IMAGES[:3], points=4)
    rows = warp_table({"raw": lambda image: raw_patches(image, preprocess())}, pairs, alpha=0.2)
    assert [row.name for row in rows] == ["identity", "raw"]
    assert all(row.matches == sum(len(pair.points_a) for pair in pairs) for row in rows)
    sizes = [(float(pair.image_b.shape[1]), float(pair.image_b.shape[2])) for pair in pairs]
    each = [pck(pair.points_a, pair.points_b, size, alpha=0.2) for pair, size in zip(pairs, sizes, strict=True)]
    assert rows[0].shares == {0.2: pytest.approx(sum(each) / 3)}
    assert 0 <= rows[1].shares[0.2] <= 1


def test_pairs_without_a_warp_are_scored_full():
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[8.0, 8.0], [24.0, 16.0], [40.0, 24.0]])  # token centres
    pair = Pair(image, image, points, points, "itself")
    rows = warp_table({"raw": lambda image: raw_patches(image, preprocess())}, [pair], alpha=0.01)
    assert [row.shares[0.01] for row in rows] == [1.0, 1.0]


def test_an_extractor_can_be_measured(mini):
    pairs = WarpedImages(IMAGES[:2], points=3)
    rows = warp_table({"mini": describe_with(mini, "key@11")}, pairs)
    assert rows[1].name == "mini"
    assert 0 <= rows[1].shares[0.1] <= 1


def test_a_warp_table_reads_images_from_files(tmp_path):
    pixels = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    points = [(8.0, 8.0), (24.0, 16.0)]
    rows = warp_table({"raw": lambda image: raw_patches(image, preprocess())}, [Pair(path, str(path), points, points)])
    assert [row.shares[0.1] for row in rows] == [1.0, 1.0]


# Pairs, and lists of them ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
def test_points_of_a_pair_are_checked(photo):
    pair = Pair("a.png", Path("b.png"), [(1, 2), (3, 4)], np.array([[5, 6], [7, 8]]))  # paths are kept as they are
    assert (pair.image_a, pair.image_b, pair.name) == ("a.png", Path("b.png"), "")
    assert pair.points_b.tolist() == [[5, 6], [7, 8]]
    assert pair.points_a.dtype == pair.points_b.dtype == torch.float32
    with pytest.raises(ShapeError, match="expected a point b for each a, got 2 and 1"):
        Pair(photo, photo, [(1, 2), (3, 4)], [(5, 6)])
    with pytest.raises(ShapeError, match="at least one point, got none; leave such pairs out"):
        Pair(photo, photo, torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(ShapeError, match=r"expected points \(n, 2\), .* got shape \(2,\)"):
        Pair(photo, photo, [1, 2], [3, 4])
    with pytest.raises(ShapeError, match="expected finite points, got NaN or infinity"):
        Pair(photo, photo, [(1, math.nan)], [(3, 4)])


@pytest.fixture
def listed(tmp_path) -> tuple[Path, list[dict]]:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
    record = {
        "source_path": "a.png",
        "target_path": "b.png",
        "source_points": [[1, 2], [3, 4.5]],
        "target_points": [[5, 6], [7, 8]],
        "category": "cat",
    }
    return tmp_path / "pairs.json", [record, {**record, "source_path": "b.png"}]


def test_a_list_of_pairs_is_read(listed):
    path, records = listed
    path.write_text(json.dumps(records))
    first, second = read_pairs(path, path.parent)
    assert (first.image_a, first.image_b) == (path.parent / "a.png", path.parent / "b.png")
    assert first.points_a.tolist() == [[1.5, 2.5], [3.5, 5.0]]  # the middles of the pixels
    assert first.points_b.tolist() == [[5.5, 6.5], [7.5, 8.5]]
    assert (first.name, second.name) == ("a.png, b.png", "b.png, b.png")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"source_points": None}, StoreError, "in pair 1 of '.*pairs.json', but source_points is missing"),
        ({"target_path": "c.png"}, StoreError, r"an image at '.*c\.png', for pair 1 of .*; is images= its folder\?"),
        ({"target_points": [[1, 2]]}, ShapeError, "pair 1 of '.*': expected a point b for each a, got 2 and 1"),
        ("cat", StoreError, "expected an object with source_path, .* as pair 1 of '.*', got str"),
    ],
)
def test_a_pair_that_does_not_do_is_named(listed, change, error, told):
    path, records = listed
    if isinstance(change, dict):
        records[1] = {key: value for key, value in {**records[1], **change}.items() if value is not None}
    else:
        records[1] = change
    path.write_text(json.dumps(records))
    with pytest.raises(error, match=told):
        read_pairs(path, path.parent)


def test_a_file_that_is_no_list_of_pairs_is_refused(tmp_path):
    path = tmp_path / "pairs.json"
    with pytest.raises(StoreError, match=r"expected a list of pairs in JSON at '.*', but: .*No such file"):
        read_pairs(path, tmp_path)
    for text, told in (
        ("{", "expected a list of pairs in JSON at '.*', but: Expecting"),
        ("{}", "expected a JSON array of pairs in '.*', got dict"),
        ("[]", "expected a JSON array of pairs in '.*', got an empty one"),
    ):
        path.write_text(text)
        with pytest.raises(StoreError, match=told):
            read_pairs(path, tmp_path)
