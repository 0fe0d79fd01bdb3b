"""Resampling: position rules against formulas written out by hand, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfeats.errors import ConfigError
from vitfeats.grid import PatchGrid
from vitfeats.resize import POSITION_RULES, carry_detail, resize_images, resize_positions, spread_map

settings.register_profile("resize", deadline=None, max_examples=30)
settings.load_profile("resize")

# (stored rows and cols) -> (rows, cols): larger, smaller, not square, one side kept, very small.
GRIDS = [((14, 14), (28, 42)), ((37, 37), (16, 23)), ((16, 16), (16, 21)), ((14, 14), (5, 3)), ((7, 9), (8, 8))]


def cubic(distance: float, a: float) -> float:
    """Return the weight of Keys' cubic convolution kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def plain_weights(stored: int, wanted: int, scale: float) -> np.ndarray:
    """Sample i lies at (i + 0.5) / scale − 0.5; four neighbours with a = −0.75, the border repeated."""
    weights = np.zeros((wanted, stored))
    for i in range(wanted):
        position = (i + 0.5) / scale - 0.5
        first = math.floor(position) - 1
        for neighbour in range(first, first + 4):
            weights[i, min(max(neighbour, 0), stored - 1)] += cubic(position - neighbour, -0.75)
    return weights


def antialiased_weights(stored: int, wanted: int) -> np.ndarray:
    """Pillow's filter: a = −0.5, stretched where the grid shrinks, cut off at the border and made to sum to 1."""
    ratio = stored / wanted
    stretch = max(ratio, 1.0)
    weights = np.zeros((wanted, stored))
    for i in range(wanted):
        centre = (i + 0.5) * ratio
        for j in range(stored):
            weights[i, j] = cubic((j + 0.5 - centre) / stretch, -0.5)
    return weights / weights.sum(1, keepdims=True)


def naive(stored: torch.Tensor, rows: int, cols: int, rule: str) -> np.ndarray:
    (old_rows, old_cols), values = stored.shape[-2:], stored[0].double().numpy()
    if rule in ("dino", "dinov2"):
        # Caron et al. and Oquab et al. add 0.1 to the wanted grid and pass the ratio as the scale factor.
        down, across = (plain_weights(old, new, (new + 0.1) / old) for old, new in ((old_rows, rows), (old_cols, cols)))
    elif rule == "transformers":
        down, across = (plain_weights(old, new, new / old) for old, new in ((old_rows, rows), (old_cols, cols)))
    else:
        down, across = antialiased_weights(old_rows, rows), antialiased_weights(old_cols, cols)
    return np.einsum("ri,cij,kj->crk", down, values, across)


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_position_rules_are_their_formulas(rule, old, new):
    # Values as large as those of a trained embedding: float32 rounds the sampling positions, and the error grows with
    # the difference between neighbours.
    stored = torch.rand(1, 6, *old, generator=torch.Generator().manual_seed(0)) - 0.5
    resized = resize_positions(stored, *new, rule)
    assert resized.shape == (1, 6, *new)
    difference = np.abs(resized[0].double().numpy() - naive(stored, *new, rule)).max()
    print(f"{rule} {old} -> {new}: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_the_rules_differ(old, new):
    # Otherwise the test above could pass with one rule for all.
    stored = torch.randn(1, 6, *old, generator=torch.Generator().manual_seed(0))
    dino, timm, plain = (resize_positions(stored, *new, rule) for rule in ("dino", "timm", "transformers"))
    for one, other in ((dino, timm), (dino, plain), (timm, plain)):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["dinov2_reg", "timm", "transformers"])
def test_rules_without_an_offset_leave_the_stored_grid_alone(rule):
    stored = torch.randn(1, 6, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resize_positions(stored, 7, 9, rule), stored, atol=1e-6)


@pytest.mark.parametrize("rule", POSITION_RULES)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(1, 30))
def test_a_constant_stays_constant_on_every_grid(rule, old_rows, old_cols, rows, cols):
    resized = resize_positions(torch.full((1, 2, old_rows, old_cols), 0.7), rows, cols, rule)
    assert resized.shape == (1, 2, rows, cols)
    assert torch.allclose(resized, torch.full((1, 2, rows, cols), 0.7), atol=1e-5)


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_positions_keep_their_precision_and_their_graph(rule):
    stored = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    half = resize_positions(stored.bfloat16(), 8, 6, rule)
    assert half.dtype == torch.bfloat16
    # Computed in float32 and rounded once, not in half precision throughout.
    assert torch.equal(half, resize_positions(stored.bfloat16().float(), 8, 6, rule).bfloat16())
    stored.requires_grad_()
    resize_positions(stored, 8, 6, rule).square().sum().backward()
    assert (stored.grad != 0).any()


def test_an_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"expected a position rule, got 'dino2'\. Did you mean 'dinov?2?' or "):
        resize_positions(torch.zeros(1, 4, 3, 3), 2, 2, "dino2")


# Images and maps ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_a_plain_image_stays_plain(height, width, new_height, new_width, grey):
    for interpolation in ("bicubic", "bilinear"):
        resized = resize_images(torch.full((1, 3, height, width), grey), (new_height, new_width), interpolation)
        assert resized.shape == (1, 3, new_height, new_width)
        assert torch.allclose(resized, torch.full_like(resized, grey), atol=1e-5)


def test_images_are_resized_by_the_formula_and_clamped():
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)).round()  # black and white: overshoots
    for size in ((33, 50), (9, 11)):
        expected = naive(image, *size, "timm")
        resized = resize_images(image, size)[0].double().numpy()
        assert np.abs(resized - expected.clip(0, 1)).max() < 1e-5
        assert resized.min() >= 0
        assert resized.max() <= 1
    assert expected.min() < -1e-3 or naive(image, 33, 50, "timm").min() < -1e-3  # so that there was something to clamp


def test_an_image_of_the_right_size_is_returned_as_it_is():
    image = torch.rand(1, 3, 5, 6) * 1.2
    assert resize_images(image, (5, 6)) is image


def test_half_precision_images_are_resized_in_float32():
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    resized = resize_images(image, (8, 8))
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, resize_images(image.float(), (8, 8)).to(torch.bfloat16))


def test_turning_commutes_with_resizing():
    image = torch.rand(1, 3, 12, 17, generator=torch.Generator().manual_seed(0))
    for flip in ((2,), (3,), (2, 3)):
        assert torch.allclose(
            resize_images(image.flip(flip), (7, 23)), resize_images(image, (7, 23)).flip(flip), atol=1e-5
        )
    turned = resize_images(image.transpose(2, 3), (23, 7))
    assert torch.allclose(turned, resize_images(image, (7, 23)).transpose(2, 3), atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_tokens_that_tile_the_image_keep_corners_on_corners(mode):
    # A ramp from edge to edge stays that ramp inside, whatever the number of cells: no half-cell shift.
    ramp = ((torch.arange(8) + 0.5) / 8).expand(1, 1, 4, 8)
    spread = spread_map(ramp, PatchGrid(4, 8, 16, 16), (8, 32), mode)
    expected = ((torch.arange(32) + 0.5) / 32).expand(1, 1, 8, 32)
    assert spread.shape == (1, 1, 8, 32)
    error = (spread - expected)[..., 2:-2].abs().max()
    # A shift of half a cell would be an error of 0.0625 for the smooth one.
    assert error <= {"nearest": 1 / 16, "bilinear": 1e-5}[mode]


def test_tiling_tokens_are_spread_as_torch_stretches_maps():
    maps = torch.randn(2, 3, 4, 5)
    grid = PatchGrid(4, 5, 7, 7)
    for size in ((28, 35), (9, 50), (3, 4)):
        stretched = torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(spread_map(maps, grid, size), stretched, atol=1e-5, rtol=1e-5)
        nearest = torch.nn.functional.interpolate(maps, size=size, mode="nearest-exact")
        assert torch.equal(spread_map(maps, grid, size, "nearest"), nearest)


def test_overlapping_tokens_stand_at_their_centres():
    grid = PatchGrid(5, 7, 16, 8)  # centres at 8, 16, 24, … of a network image of 48 × 64
    maps = torch.randn(1, 1, 5, 7)
    fine = spread_map(maps, grid, (2 * 48 + 1, 2 * 64 + 1))  # odd, so that some pixel centres come near token centres
    for row in range(5):
        for col in range(7):
            x, y = grid.centres()[row * 7 + col].tolist()
            pixel = (int(y * 97 / 48), int(x * 129 / 64))
            assert float((fine[0, 0][pixel] - maps[0, 0, row, col]).abs()) < 0.2
    # The network coordinates themselves as a map come back as coordinates, inside the outermost centres.
    x = grid.centres()[:, 0].view(1, 1, 5, 7)
    spread = spread_map(x, grid, (48, 64))
    assert torch.allclose(spread[..., 8:-8], (torch.arange(64) + 0.5)[8:-8].expand(1, 1, 48, 48), atol=1e-4)
    assert bool((spread[..., :8] == 8).all()), "border values hold beyond the outermost centres"


def test_spreading_is_differentiable():
    maps = torch.randn(1, 2, 3, 3, requires_grad=True)
    spread_map(maps, PatchGrid(3, 3, 8, 4), (20, 20)).square().sum().backward()
    assert bool((maps.grad != 0).all())


def _small_and_large(seed: int = 0, size: tuple[int, int] = (96, 130)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image with detail, and itself made smaller."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16, generator=generator), size=size, mode="bilinear")
    large = 0.7 * large + 0.3 * torch.rand(1, 3, *size, generator=generator)
    return resize_images(large, (size[0] // 3, size[1] // 3)), large


def test_detail_carried_to_the_same_size_is_the_image_itself():
    small, _ = _small_and_large()
    made = torch.rand_like(small)
    assert torch.equal(carry_detail(made, small, small.clone()), made)


def test_a_recolouring_is_carried_exactly():
    """Where the made colours are an affine map of the guide's, the large image gets the same map, with its detail."""
    small, large = _small_and_large()
    turn = torch.tensor([[0.2, 0.5, 0.1], [-0.3, 0.4, 0.2], [0.1, -0.2, 0.3]])

    def recoloured(image: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oi,bihw->bohw", turn, image) + torch.tensor([0.1, 0.3, 0.4])[:, None, None]

    made, wanted = recoloured(small), recoloured(large)
    assert bool(((wanted > 0) & (wanted < 1)).all())
    torch.testing.assert_close(carry_detail(made, small, large, epsilon=1e-9), wanted, atol=1e-4, rtol=0)
    # With the usual floor, detail is still carried: an enlargement alone is several times as far away.
    plain = torch.nn.functional.interpolate(made, size=large.shape[-2:], mode="bilinear", align_corners=False)
    error, plain_error = ((x - wanted).abs().mean() for x in (carry_detail(made, small, large), plain))
    assert float(error) < 0.3 * float(plain_error)


def test_the_guide_itself_comes_back_nearly_whole():
    small, large = _small_and_large(1)
    assert float((carry_detail(small, small, large, epsilon=1e-9) - large).abs().max()) < 1e-3


@pytest.mark.parametrize("size", [(96, 130), (40, 200), (32, 43), (10, 9)])
def test_carried_values_stay_in_0_to_1(size):
    small, _ = _small_and_large(2)
    generator = torch.Generator().manual_seed(3)
    for made in (
        torch.rand(small.shape, generator=generator),
        (torch.rand(small.shape, generator=generator) > 0.5).float(),
    ):
        carried = carry_detail(made, small, torch.rand(1, 3, *size, generator=generator))
        assert carried.shape == (1, 3, *size)
        assert carried.dtype == torch.float32
        assert bool(((carried >= 0) & (carried <= 1)).all())


def test_a_guide_without_detail_divides_by_nothing():
    made = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    flat = torch.full((1, 3, 20, 30), 0.3)
    carried = carry_detail(made, flat, torch.full((1, 3, 50, 70), 0.3), epsilon=1e-3)
    plain = torch.nn.functional.interpolate(made, size=(50, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(carried, plain, atol=1e-5, rtol=0)


def test_detail_of_each_image_of_a_batch_is_its_own():
    (a, large_a), (b, large_b) = _small_and_large(4), _small_and_large(5)
    made = torch.rand(2, *a.shape[1:], generator=torch.Generator().manual_seed(0))
    both = carry_detail(made, torch.cat([a, b]), torch.cat([large_a, large_b]))
    torch.testing.assert_close(both[:1], carry_detail(made[:1], a, large_a), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:], carry_detail(made[1:], b, large_b), atol=1e-5, rtol=0)


def test_a_window_may_be_larger_than_the_image():
    made = torch.rand(1, 3, 3, 2)
    carried = carry_detail(made, torch.rand(1, 3, 3, 2), torch.rand(1, 3, 9, 6), radius=6)
    assert bool(carried.isfinite().all())
