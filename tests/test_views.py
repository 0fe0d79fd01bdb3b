"""Augmented crops: each is its number's alone, within its bounds, and nothing else is drawn from."""

import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from vitfeats.views import BLUR, JITTER, blurred, flipped, jittered, numbered, square_crop


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def image(photo) -> torch.Tensor:
    return photo[None]


def test_a_number_gives_the_same_draw_in_any_order():
    numbers = list(itertools.product(range(3), range(2), range(5)))
    forwards = {n: torch.rand(4, generator=numbered(*n)) for n in numbers}
    backwards = {n: torch.rand(4, generator=numbered(*n)) for n in reversed(numbers)}
    assert all(torch.equal(forwards[n], backwards[n]) for n in numbers)
    assert len({tuple(draw.tolist()) for draw in forwards.values()}) == len(numbers)


def test_seed_and_numbers_do_not_run_into_each_other():
    draws = [torch.rand(2, generator=numbered(*n)).tolist() for n in ((1, 2), (12,), (0, 1, 2), (2, 1), (1, 2, 0, 1))]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert torch.rand((), generator=numbered(2**40, 10**9)) != torch.rand((), generator=numbered(2**40 + 1, 10**9))


def test_no_other_random_number_is_used(image):
    before = torch.get_rng_state()
    square_crop(blurred(jittered(flipped(image, 0.5, rng()), 1.0, rng()), 1.0, rng()), 0.5, rng())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [(40, 40), (40, 90), (90, 40), (60, 58), (1, 1), (1, 7), (3, 1)])
@pytest.mark.parametrize("smallest", [0.95, 0.3, 1.0])
def test_a_crop_is_a_square_of_the_image_within_its_bounds(size, smallest):
    height, width = size
    image = torch.arange(3.0 * height * width).view(1, 3, height, width)  # every pixel tells where it comes from
    sides, places = set(), set()
    for seed in range(200):
        crop = square_crop(image, smallest, rng(seed))
        side = crop.shape[-1]
        assert crop.shape == (1, 3, side, side)
        assert max(1, min(round(smallest * height), width)) <= side <= min(height, width)
        top, left = divmod(int(crop[0, 0, 0, 0]), width)
        assert torch.equal(crop, image[..., top : top + side, left : left + side])
        sides.add(side)
        places.add((top, left))
    low, high = max(1, min(round(smallest * height), width)), min(height, width)
    assert {low, high} <= sides, "both ends are met"
    if height == 40 and width == 90:
        assert {left for _, left in places if left in (0, 50)} or smallest < 1
        assert len({left for _, left in places}) > 25


def test_flips(image):
    assert torch.equal(flipped(image, 1.0, rng()), image.flip(3))
    assert torch.equal(flipped(image, 0.0, rng()), image)
    flips = sum(not torch.equal(flipped(image, 0.5, rng(seed)), image) for seed in range(200))
    assert 70 <= flips <= 130


@pytest.mark.parametrize("change", [jittered, blurred])
def test_changes_happen_as_often_as_asked_and_stay_in_0_to_1(image, change):
    assert change(image, 0.0, rng()) is image
    for seed in range(20):
        made = change(image, 1.0, rng(seed))
        assert not torch.equal(made, image)
        assert made.shape == image.shape
        assert bool(((made >= 0) & (made <= 1)).all())
        assert torch.equal(made, change(image, 1.0, rng(seed)))
    changed = sum(change(image, 0.2, rng(seed)) is not image for seed in range(200))
    assert 20 <= changed <= 62


def test_jitter_changes_brightness_contrast_saturation_and_hue_within_their_bounds():
    grey = torch.full((1, 3, 6, 6), 0.5)
    factors = [float(jittered(grey, 1.0, rng(seed)).mean()) / 0.5 for seed in range(100)]
    assert 1 - JITTER[0] - 1e-4 <= min(factors) < 0.75
    assert 1.25 < max(factors) <= 1 + JITTER[0] + 1e-4
    # A red with nothing else: its hue turns at most by a tenth, and its order of channels stays.
    red = torch.tensor([0.6, 0.2, 0.2]).view(1, 3, 1, 1).expand(1, 3, 4, 4).contiguous()
    turned = [jittered(red, 1.0, rng(seed))[0, :, 0, 0] for seed in range(40)]
    assert all(float(colour[0]) >= float(colour[1:].max()) for colour in turned)
    assert len({round(float(colour[1] - colour[2]), 4) for colour in turned}) > 30


def test_blur_is_the_published_gaussian(image):
    for seed in range(5):
        draw = rng(seed)
        torch.rand((), generator=draw)  # whether it happens
        sigma = BLUR[0] + (BLUR[1] - BLUR[0]) * float(torch.rand((), generator=draw))
        x = torch.tensor([-1.0, 0.0, 1.0])
        kernel = torch.exp(-(x**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum())[:, None] * (kernel / kernel.sum())[None]
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="reflect")
        expected = torch.nn.functional.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)
        torch.testing.assert_close(blurred(image, 1.0, rng(seed)), expected, atol=1e-5, rtol=1e-4)


def test_a_pixel_can_be_jittered():
    pixel = torch.rand(1, 3, 1, 1)
    assert jittered(pixel, 1.0, rng()).shape == pixel.shape
    assert tv.get_dimensions(square_crop(pixel, 0.1, rng())) == [3, 1, 1]
