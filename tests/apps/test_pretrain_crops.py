"""Random crops: against a naive reading of the picture, on pictures whose colours say where a pixel was."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from scipy.spatial.transform import Rotation

from vitfeats.apps.pretrain import crops as module
from vitfeats.apps.pretrain.crops import Batch, Crops, draw_crops, middle_crops

CPU = torch.device("cpu")
SIZES = ((60, 100), (90, 70), (64, 64))  # (height, width)
PLAIN = {"scale": (0.2, 0.8), "turn": 0.0, "flip": 0.0, "colour": 1.0, "blur": 0.0, "solarise": 0.0}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*sizes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    source = np.random.default_rng(seed)
    return [source.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def maps(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Return pictures whose red is twice a pixel's x and whose green is twice its y, up to 127 pixels a side."""
    made = []
    for height, width in sizes:
        y, x = np.mgrid[:height, :width]
        made.append(np.stack([2 * x + 1, 2 * y + 1, 0 * x], 2).astype(np.uint8))  # at a pixel's middle, x + 0.5
    return made


@pytest.fixture
def uncoloured(monkeypatch):
    monkeypatch.setattr(module, "_coloured", lambda images, colour, blur, solarise, generator: images)


def drawn(batch: Batch, side: int, seed: int = 0, **changes) -> Crops:
    return draw_crops(batch, side, **{**PLAIN, **changes}, generator=rng(seed))


def pixels(crops: Crops, side: int) -> torch.Tensor:
    """Return where the middle of each pixel of each crop is in its picture, (batch, side, side, 2), from the maps."""
    steps = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    found = torch.zeros(len(crops.placed), side, side, 2, dtype=torch.float64)
    for n, placed in enumerate(crops.placed.double()):
        for row in range(side):
            for col in range(side):
                found[n, row, col] = placed @ torch.stack([steps[col], steps[row], torch.ones(()).double()])
    return found


def deep(found: torch.Tensor, batch: Batch, margin: float) -> torch.Tensor:
    """Return which places lie so far inside of their picture."""
    last = batch.sizes.double()[:, None, None] - margin
    return ((found >= margin) & (found <= last)).all(-1)


# Where a crop was -----------------------------------------------------------------------------------------------------


def test_a_batch_is_pictures_in_the_corner_of_a_canvas():
    pictures = noise(*SIZES)
    batch = Batch.of(pictures, CPU)
    assert batch.canvas.shape == (3, 3, 90, 100)
    assert batch.canvas.dtype == torch.uint8
    assert batch.sizes.tolist() == [[100, 60], [70, 90], [64, 64]]
    for picture, canvas in zip(pictures, batch.canvas, strict=True):
        height, width = picture.shape[:2]
        assert np.array_equal(canvas[:, :height, :width].permute(1, 2, 0).numpy(), picture)
        assert int(canvas.sum()) == int(picture.sum())  # and nothing beside it


def _folded(value: float, size: int) -> float:
    while not 0 <= value <= size:
        value = -value if value < 0 else 2 * size - value
    return min(max(value, 0.5), size - 0.5)


def _naive(picture: np.ndarray, placed: np.ndarray, side: int) -> np.ndarray:
    """Read each crop pixel as the mean of four places, each between the four pixels around it."""
    height, width = picture.shape[:2]
    out = np.zeros((3, side, side))
    for row in range(2 * side):
        for col in range(2 * side):
            u, v = (col + 0.5) / side - 1, (row + 0.5) / side - 1
            x, y = placed @ np.array([u, v, 1.0])
            x, y = _folded(x, width) - 0.5, _folded(y, height) - 0.5
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            for i, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                for j, across in ((left, 1 - (x - left)), (left + 1, x - left)):
                    out[:, row // 2, col // 2] += down * across * picture[i, j] / 255 / 4
    return out


@pytest.mark.usefixtures("uncoloured")
def test_a_crop_is_the_naive_formula():
    pictures = noise((9, 14), (12, 7))
    crops = drawn(Batch.of(pictures, CPU), 5, scale=(0.9, 1.0), turn=60, flip=0.5, seed=3)
    for picture, placed, image in zip(pictures, crops.placed.double().numpy(), crops.images, strict=True):
        np.testing.assert_allclose(image.numpy(), _naive(picture, placed, 5), atol=2e-5)


@pytest.mark.usefixtures("uncoloured")
def test_a_crop_of_the_whole_is_the_picture_made_smaller(monkeypatch):
    monkeypatch.setattr(module, "_RATIO", (1.0, 1.0))
    pictures = noise((32, 32), (32, 32))
    batch = Batch.of(pictures, CPU)
    wanted = F.avg_pool2d(batch.canvas.float() / 255, 2)
    torch.testing.assert_close(drawn(batch, 16, scale=(1.0, 1.0)).images, wanted)
    torch.testing.assert_close(drawn(batch, 16, scale=(1.0, 1.0), flip=1.0).images, wanted.flip(3))
    torch.testing.assert_close(middle_crops(batch, 16), wanted)


@pytest.mark.usefixtures("uncoloured")
def test_a_crop_of_a_smooth_picture_is_that_part_resized():
    y, x = np.mgrid[:80, :120]
    smooth = np.stack([np.sin(x / 20), np.cos(y / 15), np.sin((x + y) / 25)], 2) * 0.5 + 0.5
    batch = Batch.of([(255 * smooth).round().astype(np.uint8)], CPU)
    crops = drawn(batch, 24, scale=(0.4, 0.5))
    (wide, _, x), (_, tall, y) = crops.placed[0].tolist()
    box = [round(y - tall), round(x - wide), round(2 * tall), round(2 * wide)]
    wanted = tv.resized_crop(batch.canvas.float() / 255, *box, [24, 24], antialias=True)
    torch.testing.assert_close(crops.images[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], atol=0.04, rtol=0)
    assert 0.39 < wide * tall * 4 / (80 * 120) < 0.51


@pytest.mark.parametrize(("turn", "flip"), [(0.0, 0.0), (0.0, 1.0), (35.0, 0.0), (180.0, 0.5)])
@pytest.mark.usefixtures("uncoloured")
def test_a_crop_knows_where_it_was(turn, flip):
    batch = Batch.of(maps(*SIZES), CPU)
    crops = drawn(batch, 12, turn=turn, flip=flip, seed=1)
    found = pixels(crops, 12)
    inside = deep(found, batch, 6.0)
    assert int(inside.sum()) > 100
    said = crops.images.permute(0, 2, 3, 1).double() * 255 / 2
    torch.testing.assert_close(said[..., :2][inside], found[inside], atol=0.01, rtol=0)
    signs = crops.placed[:, :, :2].det().sign().tolist()
    assert flip == 0.5 or set(signs) == {-1.0 if flip else 1.0}


def test_what_is_drawn_stays_in_its_range():
    sizes = torch.tensor([[100.0, 60.0], [70.0, 90.0]]).repeat(200, 1)
    placed = module._placed(sizes, (0.1, 0.4), 30.0, 0.5, rng())
    linear = placed[:, :, :2]
    mirrored = linear.det() < 0
    assert 0.4 < mirrored.float().mean() < 0.6
    share = 4 * linear.det().abs() / sizes.prod(1)
    assert 0.1 - 1e-5 <= float(share.min()) < 0.13
    assert 0.37 < float(share.max()) <= 0.4 + 1e-5
    down = linear[:, :, 1]  # the way down is not mirrored
    angle = torch.atan2(-down[:, 0], down[:, 1]).rad2deg()
    assert 28 < float(angle.abs().max()) <= 30.001
    assert float(angle.min()) < 0 < float(angle.max())
    across, tall = linear[:, :, 0].norm(dim=1), down.norm(dim=1)
    ratio = across / tall
    assert 0.75 - 1e-5 <= float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) <= 4 / 3 + 1e-5
    # A crop that was not turned would lie inside.
    half, centre = torch.stack([across, tall], 1), placed[:, :, 2]
    assert bool((centre - half >= -1e-4).all())
    assert bool((centre + half <= sizes + 1e-4).all())
    torch.testing.assert_close((linear[:, :, 0] * down).sum(1), torch.zeros(400), atol=1e-3, rtol=0)


@pytest.mark.usefixtures("uncoloured")
def test_outside_a_picture_is_its_mirror_image_and_never_the_canvas():
    white = [np.full((20, 90, 3), 255, np.uint8), np.full((80, 20, 3), 255, np.uint8)]
    for seed in range(5):
        crops = drawn(Batch.of(white, CPU), 16, scale=(0.8, 1.0), turn=90, seed=seed)
        found = pixels(crops, 16)
        assert bool((found < -1).any())  # much of it lies outside
        torch.testing.assert_close(crops.images, torch.ones(2, 3, 16, 16))


@pytest.mark.usefixtures("uncoloured")
def test_pictures_of_a_batch_do_not_see_each_other():
    pictures = noise(*SIZES)
    placed = drawn(Batch.of(pictures, CPU), 16, turn=40).placed
    together = module._read(Batch.of(pictures, CPU), placed, 16)
    alone = [module._read(Batch.of([one], CPU), placed[n : n + 1], 16) for n, one in enumerate(pictures)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("uncoloured")
def test_pictures_smaller_than_a_crop_are_enlarged():
    crops = drawn(Batch.of(maps((9, 6)), CPU), 32, scale=(0.9, 1.0))
    assert crops.images.shape == (1, 3, 32, 32)
    assert float(crops.images[0, 0, :, -1].mean()) > float(crops.images[0, 0, :, 0].mean())


def test_middle_crops_are_the_largest_square_in_the_middle():
    batch = Batch.of(maps((60, 100), (90, 70)), CPU)
    found = middle_crops(batch, 10) * 255 / 2
    steps = (torch.arange(10) + 0.5) / 10
    torch.testing.assert_close(found[0, 0], (20 + 60 * steps).expand(10, 10), atol=0.01, rtol=0)
    torch.testing.assert_close(found[0, 1], (60 * steps)[:, None].expand(10, 10), atol=0.01, rtol=0)
    torch.testing.assert_close(found[1, 0], (70 * steps).expand(10, 10), atol=0.01, rtol=0)
    torch.testing.assert_close(found[1, 1], (10 + 70 * steps)[:, None].expand(10, 10), atol=0.01, rtol=0)


# The same places of two crops -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncoloured")
def test_places_of_one_crop_are_found_in_the_other_by_their_colours():
    batch = Batch.of(maps(*SIZES), CPU)
    here = drawn(batch, 24, scale=(0.3, 0.5), turn=30, flip=0.5, seed=1)
    there = drawn(batch, 24, scale=(0.3, 0.5), turn=30, flip=0.5, seed=2)
    places, inside = here.place_in(there, 4)
    assert places.shape == (3, 16, 2)
    assert 4 < int(inside.sum()) < 44
    mine = F.avg_pool2d(here.images, 6).flatten(2).mT  # colours change evenly, so a patch's mean is that of its centre
    other = F.grid_sample(there.images, places[:, :, None], align_corners=False)[..., 0].mT
    clear = deep(F.avg_pool2d(pixels(here, 24).permute(0, 3, 1, 2), 6).permute(0, 2, 3, 1), batch, 14.0).flatten(1)
    assert int((inside & clear).sum()) > 4
    torch.testing.assert_close(mine[inside & clear], other[inside & clear], atol=1e-4, rtol=0)


def test_places_are_the_naive_formula_and_inside_is_half_a_patch_from_the_edge():
    one, two = (module._placed(torch.tensor([[100.0, 60.0]]), (0.2, 0.6), 40, 0.5, rng(seed)) for seed in (3, 4))
    image = torch.zeros(1, 3, 8, 8)
    places, inside = Crops(image, one).place_in(Crops(image, two), 5)
    bottom = np.array([[0, 0, 1.0]])
    forth, back = (np.concatenate([placed[0].double().numpy(), bottom]) for placed in (one, two))
    for number in range(25):
        centre = np.array([2 * (number % 5 + 0.5) / 5 - 1, 2 * (number // 5 + 0.5) / 5 - 1, 1])
        wanted = (np.linalg.inv(back) @ forth @ centre)[:2]
        np.testing.assert_allclose(places[0, number].numpy(), wanted, atol=1e-4)
        assert bool(inside[0, number]) == bool((np.abs(wanted) <= 0.8).all())


def test_a_crop_lies_in_itself():
    crops = Crops(torch.zeros(2, 3, 8, 8), module._placed(torch.full((2, 2), 50.0), (0.3, 0.5), 20, 0.5, rng()))
    places, inside = crops.place_in(crops, 2)
    corners = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]).expand(2, -1, -1)
    torch.testing.assert_close(places, corners, atol=1e-4, rtol=0)
    assert inside.shape == (2, 4)


def test_places_are_as_exact_in_half_precision():
    sizes = torch.tensor([[213.0, 160.0]])
    one, two = (Crops(torch.zeros(1, 3, 8, 8), module._placed(sizes, (0.3, 1), 20, 0.5, rng(seed))) for seed in (3, 4))
    wanted, _ = one.place_in(two, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = one.place_in(two, 7)
    assert torch.equal(found, wanted)


# Colours --------------------------------------------------------------------------------------------------------------


def test_a_seed_is_all_that_crops_hang_on():
    batch = Batch.of(noise(*SIZES), CPU)
    settings = {"turn": 20.0, "flip": 0.5, "blur": 0.5, "solarise": 0.5}
    a, b, c = (drawn(batch, 16, seed=seed, **settings) for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.placed, b.placed)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(a.placed, c.placed)


def test_colours_stay_in_their_range_and_change():
    images = torch.rand(40, 3, 10, 10, generator=rng(1))
    changed = module._coloured(images, 1.0, 0.5, 0.5, rng())
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert bool((changed != images).flatten(1).any(1).any())


def test_without_jitter_one_picture_in_five_is_grey_and_the_others_are_as_they_were(monkeypatch):
    monkeypatch.setattr(module, "_JITTER", (0.0,) * 4)
    images = torch.rand(60, 3, 4, 4, generator=rng(1))
    changed = module._coloured(images, 1.0, 0.0, 0.0, rng())
    grey = tv.rgb_to_grayscale(images, 3)
    made_grey = (changed - grey).abs().amax((1, 2, 3)) < 0.001
    kept = (changed - images).abs().amax((1, 2, 3)) < 1e-5
    assert bool((made_grey ^ kept).all())
    assert 5 <= int(made_grey.sum()) <= 20


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_colours_are_the_naive_formula(strength):
    images = torch.rand(30, 3, 5, 5, generator=rng(1))
    found = module._coloured(images, strength, 0.0, 0.3, rng(7))
    source = rng(7)
    chance = torch.rand(4, 30, generator=source).double()
    amounts = (2 * torch.rand(4, 30, generator=source) - 1).double() * torch.tensor([[0.4], [0.4], [0.2], [0.1]])
    amounts = amounts * strength
    weights = np.array([0.299, 0.587, 0.114])
    for n, image in enumerate(images.double().numpy()):
        brightness, contrast, saturation, hue = amounts[:, n].tolist() if chance[0, n] < 0.8 else (0.0,) * 4
        turn = Rotation.from_rotvec(2 * math.pi * hue * np.ones(3) / math.sqrt(3)).as_matrix()
        turned = np.einsum("ij,jhw->ihw", turn, image)
        grey = np.einsum("j,jhw->hw", weights, image)[None]
        factor = 0.0 if chance[1, n] < 0.2 * strength else 1 + saturation
        wanted = (grey + factor * (turned - grey)) * (1 + brightness)
        mean = np.einsum("j,jhw->hw", weights, wanted).mean()
        wanted = (mean + (wanted - mean) * (1 + contrast)).clip(0, 1)
        if chance[3, n] < 0.3:
            wanted = np.where(wanted > 0.5, 1 - wanted, wanted)
        np.testing.assert_allclose(found[n].numpy(), wanted, atol=1e-5)


def test_without_strength_colours_stay_as_they_are():
    images = torch.rand(30, 3, 5, 5, generator=rng(1))
    torch.testing.assert_close(module._coloured(images, 0.0, 0.0, 0.0, rng(7)), images, atol=1e-5, rtol=0)


def test_a_turn_of_the_hue_is_a_rotation_that_keeps_grey():
    turned = module._turned_hue(torch.tensor([0.0, 0.1, -0.07, 1 / 3]))
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand(4, 3, 3))
    torch.testing.assert_close(turned.det(), torch.ones(4))
    torch.testing.assert_close(turned @ torch.full((3,), 0.4), torch.full((4, 3), 0.4))
    torch.testing.assert_close(turned[0], torch.eye(3))
    torch.testing.assert_close(turned[3], torch.eye(3).roll(1, 0), atol=1e-6, rtol=0)  # red becomes green


@pytest.mark.parametrize("side", [5, 12])
def test_a_blur_is_torchvisions_on_those_chosen_and_nothing_on_others(side):
    images = torch.rand(6, 3, side, side, generator=rng(1))
    chosen = torch.tensor([True, False, True, True, False, True])
    found = module._blurred(images, chosen, rng(5))
    widths = (0.1 + 1.9 * torch.rand(6, generator=rng(5))).tolist()
    for image, blurred, width, one in zip(images, found, widths, chosen.tolist(), strict=True):
        if not one:
            assert torch.equal(blurred, image)
        else:
            torch.testing.assert_close(blurred, tv.gaussian_blur(image, [9, 9], [width, width]))


def test_no_blur_leaves_all_as_they_are_and_draws_as_much():
    images, a, b = torch.rand(4, 3, 8, 8), rng(), rng()
    assert torch.equal(module._blurred(images, torch.zeros(4, dtype=torch.bool), a), images)
    module._blurred(images, torch.ones(4, dtype=torch.bool), b)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))


def test_solarised_values_above_a_half_are_turned_round(monkeypatch):
    monkeypatch.setattr(module, "_JITTER", (0.0,) * 4)
    images = torch.rand(20, 1, 4, 4, generator=rng(1)).expand(-1, 3, -1, -1)  # grey, so that grey is no change
    found = module._coloured(images, 1.0, 0.0, 1.0, rng())
    torch.testing.assert_close(found, torch.where(images > 0.5, 1 - images, images), atol=1e-5, rtol=0)
