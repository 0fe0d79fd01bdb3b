"""Log-binning and upsampling: the plain loops they stand for, and their laws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import as_users_run, describe, random_descriptor

import vitfeats as vf
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ImageError, ShapeError, UnknownFacetError
from vitfeats.grid import Frame, PatchGrid
from vitfeats.pooling import log_bin, upsample


def plain_log_bin(maps: np.ndarray, hierarchy: int) -> np.ndarray:
    """Log-binning of one map (rows, cols, dim) in float64, pixel by pixel and bin by bin."""
    rows, cols, _ = maps.shape
    maps = maps.astype(np.float64)
    out = []
    for row in range(rows):
        for col in range(cols):
            bins = []
            for level in range(hierarchy):
                step, reach = 3**level, 3**level // 2
                for down in (-step, 0, step):
                    for across in (-step, 0, step):
                        if level > 0 and down == across == 0:
                            continue
                        y, x = min(max(row + down, 0), rows - 1), min(max(col + across, 0), cols - 1)
                        around = maps[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
                        bins.append(around.mean((0, 1)))
            out.append(np.concatenate(bins))
    return np.stack(out)


# Log-binning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cols", "hierarchy"), [(7, 5, 1), (7, 5, 2), (12, 9, 3), (4, 30, 3), (1, 1, 2), (1, 6, 2), (2, 3, 4)]
)
def test_log_bin_is_the_plain_loop(rows, cols, hierarchy):
    d = random_descriptor(0, rows, cols, dim=3, batch=2)
    found = log_bin(d, hierarchy=hierarchy)
    assert found.features.shape == (2, rows * cols, (1 + 8 * hierarchy) * 3)
    for image in range(2):
        expected = plain_log_bin(d.features[image].unflatten(0, (rows, cols)).numpy(), hierarchy)
        assert np.abs(found.features[image].numpy() - expected).max() < 1e-6


def test_pooling_is_torchs_average_without_the_padding():
    d = random_descriptor(0, 10, 8, dim=4)
    found = log_bin(d).features.unflatten(2, (17, 4))
    pooled = F.avg_pool2d(d.map, 3, stride=1, padding=1, count_include_pad=False)
    inside = found.unflatten(1, (10, 8))[:, 3:-3, 3:-3]
    assert torch.allclose(inside[..., 9, :].movedim(-1, 1), pooled[:, :, :-6, :-6], atol=1e-6)
    assert torch.allclose(inside[..., 16, :].movedim(-1, 1), pooled[:, :, 6:, 6:], atol=1e-6)
    assert torch.equal(found[..., 4, :], d.features)


def test_every_image_of_a_batch_is_binned_by_itself():
    batch = random_descriptor(0, 6, 5, batch=3)
    binned = log_bin(batch)
    for image in range(3):
        assert torch.equal(binned[image].features, log_bin(batch[image]).features)


@given(st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_away_from_the_border_moving_the_map_moves_the_bins(down, across):
    # The bins of two levels see at most 4 tokens far.
    d = random_descriptor(0, 20, 20, dim=2)
    moved = describe(d.features.unflatten(1, (20, 20)).roll((down, across), (1, 2)).flatten(1, 2), 20, 20)
    here, there = (log_bin(x).features.unflatten(1, (20, 20)) for x in (d, moved))
    assert torch.allclose(there[:, 4 + down : 16, 4 + across : 16], here[:, 4 : 16 - down, 4 : 16 - across], atol=1e-6)


def test_a_map_that_is_everywhere_the_same_stays_so():
    d = describe(torch.tensor([2.0, -3.0]).expand(1, 42, 2), 6, 7)
    assert torch.allclose(log_bin(d, hierarchy=3).features, torch.tensor([2.0, -3.0]).repeat(25).expand(1, 42, -1))


def test_binning_is_linear_and_has_that_gradient():
    x, y = random_descriptor(0, 3, 4, dim=2), random_descriptor(1, 3, 4, dim=2)
    both = describe(2 * x.features - y.features, 3, 4)
    assert torch.allclose(log_bin(both).features, 2 * log_bin(x).features - log_bin(y).features, atol=1e-6)
    features = x.features.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: log_bin(describe(f, 3, 4)).features, (features,))


def test_only_the_features_and_what_hangs_on_them_change():
    d = random_descriptor(
        0, 4, 5, stride=4, cls=torch.zeros(1, 8), registers=torch.zeros(1, 2, 8), heads=2, source=(90, 80)
    )
    binned = log_bin(d)
    assert (binned.grid, binned.frames, binned.tap, binned.model) == (d.grid, d.frames, d.tap, d.model)
    assert (binned.cls, binned.registers, binned.heads) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_is_summed_in_single(dtype):
    d = random_descriptor(0, 12, 11, dim=4)
    found = log_bin(d.to(dtype), hierarchy=3)
    assert found.dtype == dtype
    exact = log_bin(d.to(dtype).to(torch.float32), hierarchy=3).to(dtype)
    assert torch.equal(found.features, exact.features)


def test_binned_tokens_of_a_repeated_texture_are_told_apart():
    # Two equal tokens in different surroundings: alike before, not after.
    d = random_descriptor(0, 9, 9)
    features = d.features.clone()
    features[0, 20] = features[0, 60]
    d = describe(features, 9, 9)
    assert vf.self_similarity(d)[0, 20, 60] > 0.999
    assert vf.self_similarity(log_bin(d))[0, 20, 60] < 0.7


@pytest.mark.parametrize("hierarchy", [0, -1, 1.5])
def test_no_levels_are_refused(hierarchy):
    with as_users_run(), pytest.raises(ConfigError, match=f"expected hierarchy of at least 1, got {hierarchy}; 2 is"):
        log_bin(random_descriptor(0), hierarchy=hierarchy)


def test_cls_has_no_surroundings():
    d = describe(torch.zeros(1, 1, 4), 1, 1, tap="cls@11")
    with pytest.raises(UnknownFacetError, match="expected a descriptor of patch tokens, got 'cls@11'; try 'key@11'"):
        log_bin(d)


# Upsampling -----------------------------------------------------------------------------------------------------------


def bilinear(d: Descriptor, size: tuple[int, int]) -> torch.Tensor:
    """The features at every pixel of an image of ``size``, between token centres, point by point."""
    frame = Frame(size, d.grid.network_size)
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    position = d.grid.positions_of(frame.to_network(torch.stack([x.flatten(), y.flatten()], 1))).numpy()
    maps = d.features[0].unflatten(0, (d.grid.rows, d.grid.cols)).numpy()
    out = []
    for col, row in position:
        col, row = np.clip(col, 0, d.grid.cols - 1), np.clip(row, 0, d.grid.rows - 1)
        left, top = int(col), int(row)
        right, below = min(left + 1, d.grid.cols - 1), min(top + 1, d.grid.rows - 1)
        u, v = col - left, row - top
        upper = (1 - u) * maps[top, left] + u * maps[top, right]
        out.append((1 - v) * upper + v * ((1 - u) * maps[below, left] + u * maps[below, right]))
    return torch.from_numpy(np.stack(out)).float()


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("size", [(33, 41), (16, 100), (24, 28)])
def test_upsampling_is_bilinear_between_token_centres(stride, size):
    d = random_descriptor(0, 5, 6, dim=3, stride=stride, source=(50, 61))
    dense = upsample(d, size)
    assert dense.grid == PatchGrid(*size, 1, 1)
    assert torch.allclose(dense.features[0], bilinear(d, size), atol=1e-5)


@pytest.mark.parametrize("stride", [2, 8])
def test_a_dense_descriptor_says_the_same_at_every_pixel(stride):
    d = random_descriptor(0, 5, 6, stride=stride, source=(37, 91))
    dense = upsample(d, (37, 91))
    y, x = torch.meshgrid(torch.arange(37) + 0.5, torch.arange(91) + 0.5, indexing="ij")
    points = torch.stack([x.flatten(), y.flatten()], 1)
    assert torch.allclose(dense.at(points), d.at(points), atol=1e-4)
    assert torch.allclose(dense.at(points), dense.features, atol=1e-4)


def test_centres_that_are_shifted_are_honoured():
    grid = PatchGrid(4, 5, 8, 8, shift=-3.5)
    features = torch.arange(20.0).view(1, 20, 1)
    d = Descriptor(features, grid, (Frame(grid.network_size, grid.network_size),), vf.Tap("key", 1), "synthetic")
    dense = upsample(d)
    assert torch.allclose(dense.at(grid.centres()), features, atol=1e-4)  # centres at 0.5, 8.5, …: those of pixels


def test_size_is_that_of_the_network_unless_asked():
    d = random_descriptor(0, 5, 6, stride=4, source=(100, 50))
    assert upsample(d).grid == PatchGrid(24, 28, 1, 1)
    assert upsample(d, 20).grid == PatchGrid(40, 20, 1, 1)  # the shorter side of the source, its aspect kept
    assert upsample(d, 20).frames == (Frame((100, 50), (40, 20)),)


def test_cls_registers_tap_and_heads_are_kept():
    cls, registers = torch.rand(2, 8), torch.rand(2, 3, 8)
    d = random_descriptor(0, batch=2, cls=cls, registers=registers, heads=2)
    dense = upsample(d, (9, 10))
    assert (dense.tap, dense.model, dense.heads) == (d.tap, d.model, d.heads)
    assert torch.equal(dense.cls, cls)
    assert torch.equal(dense.registers, registers)
    assert torch.equal(dense[1].features, upsample(d[1], (9, 10)).features)


def test_upsampling_has_a_gradient_and_keeps_the_precision():
    features = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: upsample(describe(f, 2, 3), (5, 7)).features, (features,))
    d = random_descriptor(0, 5, 40)
    half = upsample(d.to(torch.bfloat16), (40, 320))
    assert half.dtype == torch.bfloat16
    assert (half.features.float() - upsample(d, (40, 320)).features).abs().max() < 0.05


def test_sources_of_two_aspects_need_a_pair():
    grid = PatchGrid(2, 3, 8, 8)
    frames = tuple(Frame(size, grid.network_size) for size in ((20, 30), (30, 20)))
    d = Descriptor(torch.zeros(2, 6, 4), grid, frames, vf.Tap("key", 1), "synthetic")
    message = (
        r"sources of one aspect for size=10, got results of \[\(10, 15\), \(15, 10\)\]; try size=\(height, width\)"
    )
    with pytest.raises(ShapeError, match=message):
        upsample(d, 10)
    assert [frame.network_size for frame in upsample(d, (4, 5)).frames] == [(4, 5), (4, 5)]


@pytest.mark.parametrize("size", [0, -3, (0, 5), (5, -1), "large", (1, 2, 3), 2.5])
def test_sizes_that_are_none_are_refused(size):
    with as_users_run(), pytest.raises(ShapeError, match="expected a size"):
        upsample(random_descriptor(0), size)


# A guided upsampler ---------------------------------------------------------------------------------------------------


class Guided:
    """Doubles the map, adds the guide's mean, and remembers what it saw."""

    def __call__(self, features, images):
        self.features, self.images = features, images
        return F.interpolate(features, scale_factor=2, mode="nearest") + images.mean((1, 2, 3), keepdim=True)


def test_an_upsampler_sees_features_and_the_image_at_the_size():
    d = random_descriptor(0, 5, 6, source=(20, 24))
    guided, image = Guided(), torch.full((3, 20, 24), 0.25)
    dense = upsample(d, (10, 12), upsampler=guided, image=image)
    assert torch.equal(guided.features, d.map)
    assert guided.images.shape == (1, 3, 10, 12)
    assert torch.allclose(guided.images, torch.tensor(0.25))
    expected = d.map.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.25
    assert torch.allclose(dense.map, expected)
    assert (dense.grid, dense.tap) == (PatchGrid(10, 12, 1, 1), d.tap)


def test_what_an_upsampler_returns_is_brought_to_the_size():
    d = random_descriptor(0, 5, 6)
    dense = upsample(d, (21, 33), upsampler=Guided(), image=torch.zeros(3, 40, 48))
    doubled = d.map.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.interpolate(doubled, size=(21, 33), mode="bilinear", align_corners=False)
    assert torch.allclose(dense.map, expected, atol=1e-5)


def test_an_upsampler_takes_the_map_for_the_whole_image_and_gets_one_that_is():
    # Overlapping tokens end half a patch from the border; stretched over the image, a ramp would come out too flat.
    grid = PatchGrid(7, 9, 8, 4)
    ramp = grid.centres()[None]
    d = Descriptor(ramp, grid, (Frame(grid.network_size, grid.network_size),), vf.Tap("key", 1), "synthetic")
    guided = Guided()
    dense = upsample(d, upsampler=guided, image=torch.zeros(3, *grid.network_size))
    assert guided.features.shape == (1, 2, 8, 10)  # cells of a stride that tile 32 × 40 pixels
    inside = dense.map[0, :, 6:-6, 6:-6]
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    assert (inside - torch.stack([x, y])[:, 6:-6, 6:-6]).abs().max() <= 2  # half a cell: it was doubled by nearest


def test_images_are_taken_in_every_form(tmp_path, photo):
    d = random_descriptor(0, 5, 6, batch=2)
    pil = Image.fromarray((photo.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    pil.save(tmp_path / "photo.png")
    results = [
        upsample(d, (10, 12), upsampler=Guided(), image=image).features
        for image in ([pil, pil], [str(tmp_path / "photo.png"), pil], np.stack([np.asarray(pil)] * 2))
    ]
    for result in results:
        assert torch.allclose(result, results[0], atol=1e-6)


def test_gradients_pass_through_an_upsampler():
    features = torch.randn(1, 6, 4, requires_grad=True)
    upsample(describe(features, 2, 3), (9, 9), upsampler=Guided(), image=torch.zeros(3, 9, 9)).features.sum().backward()
    assert (features.grad != 0).all()


def test_an_upsampler_and_its_image_come_together():
    d = random_descriptor(0)
    with pytest.raises(ConfigError, match=r"expected upsampler= and image= together, got upsampler= only; pass image="):
        upsample(d, upsampler=Guided())
    with pytest.raises(ConfigError, match=r"expected upsampler= and image= together, got image= only; pass upsampler="):
        upsample(d, image=torch.zeros(3, 9, 9))


def test_as_many_images_as_were_described():
    with pytest.raises(ShapeError, match=r"expected as many images as were described \(1\), got 2"):
        upsample(random_descriptor(0), upsampler=Guided(), image=torch.zeros(2, 3, 9, 9))
    with pytest.raises(ImageError):
        upsample(random_descriptor(0), upsampler=Guided(), image="missing.png")


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (torch.zeros(1, 7, 9, 9), r"\(1, 7, 9, 9\)"),
        (torch.zeros(2, 8, 9, 9), r"\(2, 8, 9, 9\)"),
        (torch.zeros(8, 9, 9), r"\(8, 9, 9\)"),
        (torch.zeros(1, 8, 0, 9), r"\(1, 8, 0, 9\)"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_map_is_refused(returned, got):
    message = rf"expected the upsampler to return a tensor \(1, 8, height, width\), got {got}"
    with as_users_run(), pytest.raises(ShapeError, match=message):
        upsample(random_descriptor(0), upsampler=lambda features, images: returned, image=torch.zeros(3, 9, 9))
