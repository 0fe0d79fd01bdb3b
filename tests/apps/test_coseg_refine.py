"""From tokens to pixels: the guided filter against loops over windows, GrabCut on pictures drawn by hand."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from vitfeats.apps.cosegmentation import refine as module
from vitfeats.apps.cosegmentation.refine import as_bytes, grabcut, guided, method_of, refine_mask
from vitfeats.errors import MissingDependencyError
from vitfeats.resize import guided_filter

# The guided filter ----------------------------------------------------------------------------------------------------


def window(array: np.ndarray, row: int, col: int, radius: int) -> np.ndarray:
    """Return the pixels of a window, cut off at the border: (pixels, channels)."""
    rows = slice(max(0, row - radius), row + radius + 1)
    cols = slice(max(0, col - radius), col + radius + 1)
    return array[:, rows, cols].reshape(len(array), -1).T


def naive_guided_filter(maps: np.ndarray, guide: np.ndarray, radius: int, epsilon: float) -> np.ndarray:
    """He, Sun and Tang: fit each window by ridge regression on colours; average the fits of the windows at a pixel."""
    (dim, height, width), channels = maps.shape, len(guide)
    factors, offsets = np.zeros((channels * dim, height, width)), np.zeros((dim, height, width))
    for row in range(height):
        for col in range(width):
            colours, values = window(guide, row, col, radius), window(maps, row, col, radius)
            centred, mean = colours - colours.mean(0), values.mean(0)
            covariance = centred.T @ centred / len(colours)
            slope = (
                np.linalg.inv(covariance + epsilon * np.eye(channels)) @ (centred.T @ (values - mean)) / len(colours)
            )
            factors[:, row, col] = slope.reshape(-1)
            offsets[:, row, col] = mean - colours.mean(0) @ slope
    found = np.zeros_like(maps)
    for row in range(height):
        for col in range(width):
            slope = window(factors, row, col, radius).mean(0).reshape(channels, dim)
            found[:, row, col] = guide[:, row, col] @ slope + window(offsets, row, col, radius).mean(0)
    return found


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("height", "width", "radius"), [(9, 12, 1), (9, 12, 3), (7, 4, 5), (1, 6, 2), (1, 1, 2)])
def test_the_guided_filter_is_that_of_loops_over_windows(dim, height, width, radius):
    rng = torch.Generator().manual_seed(dim + height)
    maps, guide = (torch.rand(2, channels, height, width, generator=rng) for channels in (dim, 3))
    for epsilon in (1e-2, 1e-4):
        found = guided_filter(maps, guide, radius=radius, epsilon=epsilon)
        assert found.shape == maps.shape
        for index in range(2):
            expected = naive_guided_filter(maps[index].double().numpy(), guide[index].double().numpy(), radius, epsilon)
            assert np.allclose(found[index], expected, atol=1e-4)


def test_each_channel_is_filtered_as_it_would_be_alone():
    rng = torch.Generator().manual_seed(0)
    maps, guide = torch.rand(1, 4, 10, 11, generator=rng), torch.rand(1, 3, 10, 11, generator=rng)
    together = guided_filter(maps, guide, radius=2, epsilon=1e-2)
    for channel in range(4):
        alone = guided_filter(maps[:, [channel]], guide, radius=2, epsilon=1e-2)
        assert torch.allclose(alone[:, 0], together[:, channel], atol=1e-6)


def test_what_is_affine_in_the_colours_comes_back_and_a_flat_guide_smooths():
    guide = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    affine = (guide * torch.tensor([0.2, -0.5, 0.7])[:, None, None]).sum(1, keepdim=True) + 0.3
    assert torch.allclose(guided_filter(affine, guide, radius=3, epsilon=1e-9), affine, atol=1e-4)
    noise = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    smooth = guided_filter(noise, torch.full_like(guide, 0.5), radius=3, epsilon=1e-2)
    assert float(smooth.std()) < 0.3 * float(noise.std())
    assert torch.allclose(
        guided_filter(torch.ones(1, 1, 12, 12), guide, radius=3, epsilon=1e-2), torch.ones(1), atol=1e-5
    )


def test_the_guided_filter_keeps_the_type_of_the_maps():
    guide = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    for kind in (torch.float16, torch.float32, torch.float64):
        assert guided_filter(torch.ones(1, 2, 6, 6, dtype=kind), guide, radius=2, epsilon=1e-2).dtype == kind


# Which method ---------------------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: object() if installed and name == "cv2" else None)


@pytest.mark.parametrize(
    ("wanted", "installed", "expected"),
    [
        ("auto", True, "grabcut"),
        ("auto", False, "guided"),
        ("grabcut", True, "grabcut"),
        ("guided", True, "guided"),
        ("guided", False, "guided"),
        ("none", True, "none"),
        ("none", False, "none"),
    ],
)
def test_masks_are_refined_by_what_is_wanted_and_installed(monkeypatch, wanted, installed, expected):
    pretend(monkeypatch, installed=installed)
    assert method_of(wanted) == expected


def test_grabcut_without_opencv_says_what_to_install_and_what_else_there_is(monkeypatch):
    pretend(monkeypatch, installed=False)
    told = r"expected OpenCV for refine='grabcut', .* pip install \"vitfeats\[coseg\]\", or refine='guided'"
    with pytest.raises(MissingDependencyError, match=told):
        method_of("grabcut")
    image, front, score = drawn()[:3]
    with pytest.raises(MissingDependencyError, match=told):
        grabcut(image, front, score)


def test_what_is_looked_for_is_opencv():
    assert (method_of("auto") == "grabcut") == (importlib.util.find_spec("cv2") is not None)


# Masks ----------------------------------------------------------------------------------------------------------------


def drawn(height: int = 80, width: int = 96, noise: float = 0.02) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a red disk on blue, a square mask that is too large, its score, and the disk."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    away = ((y - height / 2) ** 2 + (x - width / 2) ** 2).sqrt()
    disk = away < 20
    image = torch.where(
        disk, torch.tensor([0.8, 0.15, 0.1])[:, None, None], torch.tensor([0.1, 0.2, 0.7])[:, None, None]
    )
    image = (image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    square = ((y - height / 2).abs() < 26) & ((x - width / 2).abs() < 26)
    return image, square, (1 - away / away.max()).float(), disk


def overlap(alpha: np.ndarray, disk: Tensor) -> float:
    found = alpha > 127
    return float((found & disk.numpy()).sum() / (found | disk.numpy()).sum())


def test_grabcut_finds_the_disk_in_a_square():
    pytest.importorskip("cv2")
    image, square, score, disk = drawn()
    assert overlap(as_bytes(square.float()), disk) < 0.6
    alpha = refine_mask(image, square, score, "grabcut")
    assert set(np.unique(alpha)) == {0, 255}
    assert overlap(alpha, disk) > 0.95
    assert torch.equal(grabcut(image, square, score), torch.from_numpy(alpha > 127))


def test_grabcut_finds_what_the_mask_left_out():
    pytest.importorskip("cv2")
    image, _, score, disk = drawn()
    y, x = torch.meshgrid(torch.arange(80), torch.arange(96), indexing="ij")
    small = ((y - 40).abs() < 9) & ((x - 44).abs() < 9)
    assert overlap(refine_mask(image, small, score, "grabcut"), disk) > 0.95


def test_the_guided_filter_brings_the_edge_of_a_mask_to_that_of_the_image():
    # A mask whose edge is off by about as much as a token: by what the filter's windows see.
    image, _, _, disk = drawn()
    y, x = torch.meshgrid(torch.arange(80), torch.arange(96), indexing="ij")
    coarse = ((y - 40) ** 2 + (x - 48) ** 2).sqrt() < 23
    before = overlap(as_bytes(coarse.float()), disk)
    after = overlap(refine_mask(image, coarse, torch.zeros(80, 96), "guided"), disk)
    assert before < 0.8
    assert after > before + 0.05


def test_a_square_is_nearer_to_the_disk_after_the_guided_filter():
    image, square, score, disk = drawn()
    assert overlap(refine_mask(image, square, score, "guided"), disk) > overlap(as_bytes(square.float()), disk)


def test_the_guided_mask_is_the_filters_in_a_window_of_twelve_hundredths():
    image, square, score, _ = drawn()
    filtered = guided_filter(square[None, None].float(), image[None], radius=5, epsilon=1e-2)[0]  # 6 % of 80
    assert torch.equal(guided(square[None].float(), image), filtered)
    assert np.array_equal(refine_mask(image, square, score, "guided"), as_bytes(filtered[0]))


def test_without_refinement_the_mask_is_as_it_was():
    image, square, score, _ = drawn()
    alpha = refine_mask(image, square, score, "none")
    assert alpha.dtype == np.uint8
    assert np.array_equal(alpha, square.numpy() * np.uint8(255))


@pytest.mark.parametrize("method", ["none", "guided", "grabcut"])
@pytest.mark.parametrize("full", [True, False])
def test_empty_and_full_masks_come_back_as_they_are(method, full):
    image, square, score, _ = drawn()
    alpha = refine_mask(image, torch.full_like(square, full), score, method)
    assert np.array_equal(alpha, np.full((80, 96), 255 if full else 0, np.uint8))


@pytest.mark.parametrize("method", ["none", "guided", "grabcut"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (3, 5), (5, 3), (1, 40)])
def test_tiny_images_have_masks_of_their_size(method, height, width):
    if method == "grabcut":
        pytest.importorskip("cv2")
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
    front = torch.zeros(height, width, dtype=torch.bool)
    front.view(-1)[: (height * width + 1) // 2] = True
    alpha = refine_mask(image, front, torch.rand(height, width, generator=torch.Generator().manual_seed(2)), method)
    assert alpha.shape == (height, width)
    assert (alpha > 127).any()  # nothing of a mask that was there is no mask


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("method", ["guided", "grabcut"])
def test_images_of_one_colour_have_masks(method, value):
    if method == "grabcut":
        pytest.importorskip("cv2")
    _, square, score, _ = drawn()
    alpha = refine_mask(torch.full((3, 80, 96), value), square, score, method)
    assert alpha.shape == (80, 96)
    assert 0 < (alpha > 127).mean() < 1


def test_the_same_seed_gives_the_same_mask_whatever_opencv_drew_before():
    cv2 = pytest.importorskip("cv2")
    image, square, score, _ = drawn(noise=0.3)
    first = refine_mask(image, square, score, "grabcut", seed=3)
    cv2.setRNGSeed(12345)
    cv2.randu(np.zeros((5, 5), np.uint8), 0, 255)
    assert np.array_equal(first, refine_mask(image, square, score, "grabcut", seed=3))


def test_opencv_is_given_the_seed(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    seeds = []
    monkeypatch.setattr(cv2, "setRNGSeed", seeds.append)
    image, square, score, _ = drawn()
    refine_mask(image, square, score, "grabcut", seed=7)
    refine_mask(image, square, score, "grabcut")
    assert seeds == [7, 0]


def test_grabcut_keeps_what_the_score_is_surest_of():
    pytest.importorskip("cv2")
    image, square, score, _ = drawn(noise=0.3)
    cut = grabcut(image, square, score).numpy()
    inside, outside = square.numpy(), ~square.numpy()
    values = score.numpy()
    surest = np.sort(values[inside])[-int(0.1 * inside.sum()) :]
    assert cut[inside & (values >= surest[0])].all()
    least = np.sort(values[outside])[: int(0.6 * outside.sum())]
    assert not cut[outside & (values <= least[-1])].any()


def test_colours_go_to_opencv_as_blue_green_red_of_8_bits(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    seen = []
    monkeypatch.setattr(cv2, "grabCut", lambda pixels, marks, *rest: seen.append((pixels.copy(), marks.copy(), rest)))
    image, square, score, _ = drawn()
    grabcut(image, square, score)
    ((pixels, marks, rest),) = seen
    expected = (image * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    assert np.array_equal(pixels, expected)
    assert rest[0] is None  # no rectangle
    assert rest[-2:] == (5, cv2.GC_INIT_WITH_MASK)
    assert np.array_equal(np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)), square.numpy())


def test_where_nothing_is_left_the_mask_comes_back(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "grabCut", lambda pixels, marks, *rest: marks.fill(cv2.GC_BGD))
    image, square, score, _ = drawn()
    assert torch.equal(grabcut(image, square, score), square)


def test_nothing_that_is_given_is_changed():
    pytest.importorskip("cv2")
    image, square, score, _ = drawn()
    kept = image.clone(), square.clone(), score.clone()
    for method in ("none", "guided", "grabcut"):
        refine_mask(image, square, score, method)
    assert all(torch.equal(before, after) for before, after in zip(kept, (image, square, score), strict=True))


def test_shares_become_bytes():
    assert as_bytes(torch.tensor([[-0.5, 0.0, 0.5, 1.0, 1.5, 0.499]])).tolist() == [[0, 0, 128, 255, 255, 127]]
