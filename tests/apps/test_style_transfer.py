"""Painting images in the style of others: sizes, blends, regions, batches, and what is refused; on random networks."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitfeats as vf
from vitfeats import patterns, samples
from vitfeats.apps.evaluation import match_colours
from vitfeats.apps.style_transfer import (
    Stylized,
    Stylizer,
    channels_of,
    colourfulness,
    load_stylizer,
    painting,
    stylize,
    stylize_each,
    usual_styles,
)
from vitfeats.apps.style_transfer import stylizer as module
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError, UnknownModelError, WeightsUnavailableError
from vitfeats.models.stylizers import pack
from vitfeats.nets.adaattn import adain
from vitfeats.nets.stylizing import NETWORKS, StyleNetwork
from vitfeats.nets.vgg import SmallVgg
from vitfeats.preprocess import load_image
from vitfeats.resize import resize_images

pytestmark = pytest.mark.usefixtures("as_a_user")

METHODS = ("adaattn", "sanet", "adain")
CHANNELS = (32, 64, 128, 256, 256)


def picture(seed: int, height: int, width: int) -> Tensor:
    """Return a picture of smooth colours and edges, (3, height, width)."""
    rng = torch.Generator().manual_seed(seed)
    smooth = nn.functional.interpolate(torch.rand(1, 3, 4, 5, generator=rng), (height, width), mode="bilinear")
    blocks = nn.functional.interpolate(torch.rand(1, 3, 6, 7, generator=rng), (height, width))
    return (0.6 * smooth + 0.4 * blocks)[0]


def network_of(method: str, channels: tuple[int, ...] = CHANNELS, seed: int = 0) -> StyleNetwork:
    """Return a small network with random weights, whose pictures lie in 0..1 for the most part."""
    network = NETWORKS[method](channels, (8, 8, 8), 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        network.decoder.convs[-1].weight.mul_({"adaattn": 0.3, "sanet": 1.0, "adain": 1.0}[method])
        network.decoder.convs[-1].bias.fill_(0.5)
    return network.eval()


CONTENT, STYLE, OTHER = picture(0, 48, 64), picture(1, 64, 48), picture(2, 48, 48)


@pytest.fixture(scope="module")
def vgg() -> vf.Extractor:
    return vf.load_extractor("vgg_mini", device="cpu")


@pytest.fixture(scope="module")
def painters(vgg) -> dict[str, Stylizer]:
    return {method: Stylizer(vgg, network_of(method)) for method in METHODS}


@pytest.fixture(params=METHODS)
def painter(request, painters) -> Stylizer:
    return painters[request.param]


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with a network of each method in place of those that come with the package."""
    for method in METHODS:
        pack(network_of(method), tmp_path / f"{method}_vgg_mini.safetensors", encoder="vgg_mini")
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    module._kept.cache_clear()  # other tests may have loaded those that come with the package
    yield tmp_path
    module._kept.cache_clear()


@pytest.fixture
def narrow() -> vf.Extractor:
    """An encoder with the same layers, of fewer channels."""
    torch.manual_seed(0)
    network = SmallVgg(blocks=((8, 1), (8, 1), (8, 1), (8, 1), (8, 1))).eval()
    card = vf.list_models("vgg_mini")[0]
    relus = tuple(f"relu{block}_1" for block in range(1, 6))
    return vf.load_extractor(
        network, card=card.__class__(**{**vars(card), "name": "narrow", "layers": relus, "depth": 5})
    )


def halves(height: int, width: int) -> Tensor:
    """Return labels over an image: 0 on the left, 1 on the right."""
    return (torch.arange(width) >= width // 2).long().expand(height, -1).contiguous()


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=0)


# One image ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(33, 50), (16, 16), (17, 95), (64, 48)])
def test_a_picture_has_the_contents_size_and_values_of_an_image(painter, size):
    found = stylize(picture(3, *size), STYLE, stylizer=painter)
    assert found.tensor.shape == (3, *size)
    assert found.tensor.device.type == "cpu"
    assert 0 <= float(found.tensor.min()) <= float(found.tensor.max()) <= 1
    assert ((found.tensor > 0) & (found.tensor < 1)).float().mean() > 0.25  # not all of it clamped
    assert found.tensor.std() > 0.01
    assert found.image.size == size[::-1]
    assert np.abs(np.asarray(found.image) / 255 - found.tensor.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_values_beyond_those_of_an_image_are_cut_off(vgg):
    network = network_of("adain")
    with torch.no_grad():
        network.decoder.convs[-1].weight.mul_(100)
    found = stylize(CONTENT, STYLE, stylizer=Stylizer(vgg, network)).tensor
    assert (float(found.min()), float(found.max())) == (0, 1)


def test_padding_is_that_of_an_image_that_was_mirrored_by_hand(painter):
    content = picture(3, 33, 50)
    mirrored = nn.functional.pad(content[None], (0, 14, 0, 15), mode="reflect")[0]
    whole = stylize(mirrored, STYLE, stylizer=painter).tensor
    assert close(stylize(content, STYLE, stylizer=painter).tensor, whole[:, :33, :50])


def test_content_and_style_both_play_a_part(painter):
    found = stylize(CONTENT, STYLE, stylizer=painter).tensor
    assert (found - stylize(CONTENT, OTHER, stylizer=painter).tensor).abs().max() > 0.01
    assert (found - stylize(CONTENT.flip(2), STYLE, stylizer=painter).tensor).abs().max() > 0.01


def test_paths_pictures_and_arrays_are_one(painter, tmp_path):
    content, style = (vf.samples.cat().resize((64, 48)), patterns.draw("glass", 48, 1))
    content.save(tmp_path / "content.png")
    style.save(tmp_path / "style.png")
    wanted = stylize(content, style, stylizer=painter).tensor
    assert torch.equal(stylize(str(tmp_path / "content.png"), tmp_path / "style.png", stylizer=painter).tensor, wanted)
    assert torch.equal(stylize(np.asarray(content), [np.asarray(style)], stylizer=painter).tensor, wanted)


@pytest.mark.parametrize("method", ["adaattn", "sanet"])
def test_a_seed_is_all_that_chance_hangs_on(painters, method):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    a, b, c = (stylize(CONTENT, STYLE, stylizer=painters[method], most=4, seed=seed).tensor for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not close(a, c)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_as_many_positions_as_there_are_is_all_of_them(painters):
    for painter in painters.values():
        whole = stylize(CONTENT, STYLE, stylizer=painter, most=None).tensor
        assert torch.equal(stylize(CONTENT, STYLE, stylizer=painter, most=64 * 48).tensor, whole)
        fewer = stylize(CONTENT, STYLE, stylizer=painter, most=4).tensor
        assert close(fewer, whole) == (painter.network.method == "adain")


def test_strength_goes_from_the_content_alone_to_the_style(painter):
    none, half, whole = (stylize(CONTENT, STYLE, stylizer=painter, strength=s).tensor for s in (0.0, 0.5, 1.0))
    assert torch.equal(whole, stylize(CONTENT, STYLE, stylizer=painter).tensor)
    assert close(none, stylize(CONTENT, OTHER, stylizer=painter, strength=0.0).tensor)  # whatever the style
    assert close(none, stylize(CONTENT, CONTENT, stylizer=painter).tensor)
    apart = float((none - whole).abs().mean())
    assert apart > 0.005
    assert 0 < float((none - half).abs().mean()) < apart


def test_the_scale_of_the_style_is_that_of_the_style_brought_to_a_size(painter):
    wanted = stylize(CONTENT, resize_images(STYLE[None], (48, 32))[0], stylizer=painter).tensor
    found = stylize(CONTENT, STYLE, stylizer=painter, style_size=32).tensor  # 64×48 to 43×32, in whole cells of 16
    assert close(found, wanted)
    assert not close(found, stylize(CONTENT, STYLE, stylizer=painter).tensor)


def test_large_styles_are_reduced_unless_told(painters, monkeypatch):
    monkeypatch.setattr(painting, "LARGEST_STYLE", 32)
    painter = painters["adain"]
    found = stylize(CONTENT, STYLE, stylizer=painter).tensor
    assert torch.equal(found, stylize(CONTENT, STYLE, stylizer=painter, style_size=32).tensor)
    assert not close(found, stylize(CONTENT, STYLE, stylizer=painter, style_size=48).tensor)


def test_the_size_is_that_of_the_content_brought_to_it(painter):
    content = picture(4, 60, 90)
    found = stylize(content, STYLE, stylizer=painter, size=33).tensor
    assert found.shape == (3, 33, 50)
    smaller = resize_images(content[None], (33, 50))[0]
    assert torch.equal(found, stylize(smaller, STYLE, stylizer=painter).tensor)


def test_nothing_is_left_on_the_networks(painter):
    def hooks() -> int:
        networks = (painter.extractor.model, painter.network)
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(m, kind)) for network in networks for m in network.modules() for kind in kinds)

    modes = painter.extractor.model.training, painter.network.training
    stylize(CONTENT, STYLE, stylizer=painter)
    with pytest.raises(ShapeError):
        stylize(CONTENT, STYLE[:, :8], stylizer=painter)
    assert hooks() == 0
    assert modes == (painter.extractor.model.training, painter.network.training) == (False, False)
    assert torch.is_grad_enabled()
    assert not any(p.grad is not None for p in painter.network.parameters())


# Several styles -------------------------------------------------------------------------------------------------------


def test_weights_blend_styles_in_any_order(painter):
    def made(styles: list[Tensor], weights: list[float] | None = None) -> Tensor:
        return stylize(CONTENT, styles, stylizer=painter, weights=weights, most=None).tensor

    alone = made([STYLE])
    blend = made([STYLE, OTHER], [3, 1])
    assert close(made([STYLE, OTHER], [2, 0]), alone)
    assert close(made([OTHER, STYLE], [0, 0.1]), alone)
    assert close(blend, made([OTHER, STYLE], [1, 3]))
    assert close(blend, made([STYLE, OTHER], [0.75, 0.25]))  # shares
    assert close(made([STYLE, OTHER]), made([STYLE, OTHER], [1, 1]))
    assert close(made([STYLE, STYLE], [1, 2]), alone)
    assert not close(blend, alone)
    assert not close(blend, made([STYLE, OTHER], [1, 3]))


def test_a_tuple_is_several_styles(painters):
    painter = painters["adain"]
    found = stylize(CONTENT, (STYLE, OTHER), stylizer=painter).tensor
    assert torch.equal(found, stylize(CONTENT, [STYLE, OTHER], stylizer=painter).tensor)


@pytest.mark.parametrize(
    ("styles", "weights", "message"),
    [
        ([STYLE, OTHER], [1.0], "expected a weight for each of 2 styles, got 1"),
        ([STYLE], [1.0, 2.0], "expected a weight for each of 1 styles, got 2"),
        ([STYLE, OTHER], [0.0, 0.0], r"expected weights of styles of 0 or more, and one above 0, got \[0.0, 0.0\]"),
        ([STYLE, OTHER], [2.0, -1.0], r"got \[2.0, -1.0\]"),
        ([STYLE, OTHER], [1.0, float("nan")], r"got \[1.0, nan\]"),
        ([], None, "expected at least one style, got none"),
    ],
)
def test_weights_that_are_no_shares_are_refused(painters, styles, weights, message):
    with pytest.raises(ConfigError, match=message):
        stylize(CONTENT, styles, stylizer=painters["adaattn"], weights=weights)


# Regions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adaattn", "sanet"])
def test_each_region_is_what_its_style_alone_gives(painters, method):
    """Away from the border: nine convolutions on three scales, and the one that fuses two levels, reach 38 pixels."""
    content, reach = picture(5, 32, 144), 38
    painter = painters[method]
    found = stylize(content, [STYLE, OTHER], stylizer=painter, masks=(halves(32, 144), [0, 1]), most=None).tensor
    left, right = (stylize(content, style, stylizer=painter, most=None).tensor for style in (STYLE, OTHER))
    assert close(found[..., : 72 - reach], left[..., : 72 - reach])
    assert close(found[..., 72 + reach :], right[..., 72 + reach :])
    assert (left - right)[..., : 72 - reach].abs().max() > 0.01
    assert (left - right)[..., 72 + reach :].abs().max() > 0.01


def test_by_adain_each_region_has_the_statistics_of_its_style(painters):
    painter, tops = painters["adain"], []
    hook = painter.network.decoder.register_forward_pre_hook(lambda _, given: tops.append(given[0]))
    stylize(CONTENT, [STYLE, OTHER], stylizer=painter, masks=(halves(48, 64), [0, 1]))
    hook.remove()
    content, style, other = (painter.maps(image[None])[3] for image in (CONTENT, STYLE, OTHER))
    torch.testing.assert_close(tops[0][..., :4], adain(content[..., :4], style))
    torch.testing.assert_close(tops[0][..., 4:], adain(content[..., 4:], other))


def test_regions_of_one_style_are_taken_apart(painter):
    masks = halves(48, 64), [halves(64, 48)]
    whole = stylize(CONTENT, STYLE, stylizer=painter, most=None).tensor
    found = stylize(CONTENT, STYLE, stylizer=painter, masks=masks, most=None).tensor
    assert not close(found, whole)
    swapped = stylize(CONTENT, STYLE, stylizer=painter, masks=(1 - masks[0], [1 - masks[1][0]]), most=None).tensor
    assert close(found, swapped)  # the numbers of the labels play no part


def test_a_label_that_no_style_has_takes_all_of_them(painter):
    seven = torch.full((48, 64), 7)
    found = stylize(CONTENT, [STYLE, OTHER], stylizer=painter, masks=(seven, [0, halves(48, 48)]), most=None).tensor
    assert close(found, stylize(CONTENT, [STYLE, OTHER], stylizer=painter, most=None).tensor)


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64", "numpy", "numpy uint16", "picture"])
def test_masks_are_of_any_whole_numbers(painters, kind):
    labels = halves(48, 64)
    given = {
        "bool": labels.bool(),
        "uint8": labels.to(torch.uint8),
        "int64": labels,
        "numpy": labels.numpy() > 0,
        "numpy uint16": labels.numpy().astype(np.uint16),
        "picture": np.asarray(Image.fromarray(labels.numpy().astype(np.uint8))),
    }[kind]
    found, wanted = (
        stylize(CONTENT, [STYLE, OTHER], stylizer=painters["adain"], masks=(mask, [0, 1])).tensor
        for mask in (given, labels)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [(72, 136), (66, 70)])
def test_masks_follow_a_content_that_is_brought_to_a_size(painter, size):
    content, labels = picture(6, *size), halves(*size)
    labels[: size[0] // 2] = 0
    found = stylize(content, [STYLE, OTHER], stylizer=painter, masks=(labels, [0, 1]), size=size[0] // 2).tensor
    smaller = resize_images(content[None], (size[0] // 2, size[1] // 2))[0]
    wanted = stylize(smaller, [STYLE, OTHER], stylizer=painter, masks=(labels[1::2, 1::2], [0, 1])).tensor
    assert close(found, wanted)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ((halves(48, 63), [0]), ShapeError, r"a mask of the content as labels \(.*\) of its size 48×64, .* \(48, 63\)"),
        ((halves(48, 64)[None], [0]), ShapeError, r"got \(1, 48, 64\) of int64"),
        ((halves(48, 64).float(), [0]), ShapeError, r"booleans or whole numbers, got \(48, 64\) of float32"),
        ((halves(48, 64).numpy() * 1j, [0]), ShapeError, r"got \(48, 64\) of complex128"),
        ((halves(48, 64), [halves(48, 64)]), ShapeError, r"a mask of the style .* size 64×48, .* got \(48, 64\)"),
        ((halves(48, 64), [torch.rand(64, 48)]), ShapeError, r"a mask of the style .* of float32"),
        ((halves(48, 64), [0, 1]), ConfigError, r"expected masks=\(of the content, \[one of each of 1 styles\]\)"),
        ((halves(48, 64), []), ConfigError, r"expected masks=\(of the content, \[one of each of 1 styles\]\)"),
        ((halves(48, 64),), ConfigError, r"expected masks=\(of the content, \[one of each of 1 styles\]\)"),
    ],
)  # fmt: skip
def test_masks_that_fit_nothing_are_refused(painters, masks, error, message):
    with pytest.raises(error, match=message):
        stylize(CONTENT, STYLE, stylizer=painters["adain"], masks=masks)


# Many images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_batch_is_its_images_one_by_one(painter, strength):
    contents = [picture(seed, 33, 50) for seed in range(5)]
    settings = {"stylizer": painter, "most": 20, "strength": strength, "seed": 2}
    found = list(stylize_each(contents, [STYLE, OTHER], batch_size=2, weights=[1, 2], **settings))
    assert len(found) == 5
    for content, made in zip(contents, found, strict=True):
        assert close(made.tensor, stylize(content, [STYLE, OTHER], weights=[1, 2], **settings).tensor)


def test_images_of_unequal_sizes_come_in_order(painter):
    contents = [picture(seed, 20 + 9 * (seed % 3), 40) for seed in range(5)]
    found = list(stylize_each(contents, STYLE, batch_size=3, stylizer=painter))
    assert [tuple(made.tensor.shape[1:]) for made in found] == [(20 + 9 * (seed % 3), 40) for seed in range(5)]
    for content, made in zip(contents, found, strict=True):
        assert close(made.tensor, stylize(content, STYLE, stylizer=painter).tensor)


def test_images_are_read_as_it_goes_and_styles_once(painters, monkeypatch):
    painter, read, maps = painters["adain"], [], []
    own = painter.maps
    monkeypatch.setattr(painter, "maps", lambda pixels: maps.append(tuple(pixels.shape)) or own(pixels))

    def frames():
        for seed in range(6):
            read.append(seed)
            yield picture(seed, 32, 32)

    made = stylize_each(frames(), STYLE, batch_size=2, stylizer=painter, size=16)
    assert (read, maps) == ([], [(1, 3, 64, 48)])
    assert next(made).tensor.shape == (3, 16, 16)
    assert read == [0, 1]
    next(made)
    assert read == [0, 1]
    next(made)
    assert read == [0, 1, 2, 3]
    assert len(list(made)) == 3
    assert maps == [(1, 3, 64, 48)] + [(2, 3, 32, 32)] * 3


def test_images_before_the_one_that_does_not_do_are_yielded(painters):
    made = stylize_each([CONTENT, "missing.png"], STYLE, stylizer=painters["adain"])
    assert next(made).tensor.shape == CONTENT.shape
    with pytest.raises(ImageError, match="but there is none at"):
        next(made)


def test_what_is_wrong_for_all_images_is_said_at_once(painters, tmp_path):
    settings = {"stylizer": painters["adain"]}
    with pytest.raises(ConfigError, match="expected batch_size of at least 1, got 0"):
        stylize_each([CONTENT], STYLE, batch_size=0, **settings)
    with pytest.raises(ConfigError, match="expected at least one style, got none"):
        stylize_each([CONTENT], [], **settings)
    for one in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.new("RGB", (20, 20))):
        with pytest.raises(ConfigError, match=r"expected several images, got one; pass \[image\], or call stylize"):
            stylize_each(one, STYLE, **settings)
    assert list(stylize_each([], STYLE, **settings)) == []


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(15, 40), (40, 15), (1, 1)])
def test_images_smaller_than_a_cell_are_refused(painters, size):
    small, told = picture(0, *size), f"{size[0]}×{size[1]}"
    with pytest.raises(ShapeError, match=f"expected a content of at least 16×16 pixels, .*got {told}; enlarge it"):
        stylize(small, STYLE, stylizer=painters["adain"])
    with pytest.raises(ShapeError, match=f"expected a style of at least 16×16 pixels, got {told}; enlarge it"):
        stylize(CONTENT, small, stylizer=painters["adain"])
    with pytest.raises(ShapeError, match=f"expected a style of at least 16×16 pixels, got {told}; enlarge it"):
        stylize(CONTENT, [STYLE, small], stylizer=painters["adain"])


def test_sizes_smaller_than_a_cell_are_refused(painters):
    for size in (15, 0, -3):
        with pytest.raises(ShapeError, match=f"expected a size of at least 16 pixels, got {size}"):
            stylize(CONTENT, STYLE, stylizer=painters["adain"], size=size)
    for size in (31, 0):  # the encoder mirrors edges: its coarsest map needs two cells
        with pytest.raises(ShapeError, match=f"expected a style_size of at least 32 pixels, got {size}"):
            stylize(CONTENT, STYLE, stylizer=painters["adain"], style_size=size)
    assert stylize(picture(0, 8, 12), STYLE, stylizer=painters["adain"], size=16).tensor.shape == (3, 16, 24)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (31, 17)])
def test_styles_of_a_single_cell_are_enlarged(painter, size):
    style = picture(7, *size)
    found = stylize(CONTENT, style, stylizer=painter).tensor
    assert torch.equal(found, stylize(CONTENT, style, stylizer=painter, style_size=32).tensor)


@pytest.mark.parametrize("colour", [0.0, 0.4, 1.0])
def test_one_colour_gives_finite_pictures(painter, colour):
    plain = torch.full((3, 32, 32), colour)
    for content, style in ((CONTENT, plain), (plain, STYLE), (plain, plain)):
        for settings in ({}, {"strength": 0.5}, {"masks": (halves(*content.shape[1:]), [halves(*style.shape[1:])])}):
            found = stylize(content, style, stylizer=painter, **settings).tensor
            assert found.isfinite().all()


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_strengths_out_of_range_are_refused(painters, strength):
    with pytest.raises(ConfigError, match=rf"expected a strength in 0\.\.1, got {strength}"):
        stylize(CONTENT, STYLE, stylizer=painters["adain"], strength=strength)


def test_no_positions_are_too_few(painters):
    with pytest.raises(ConfigError, match="at least 1 style position to be kept, got most=0; None keeps all"):
        stylize(CONTENT, STYLE, stylizer=painters["sanet"], most=0)


@pytest.mark.parametrize("settings", [{"method": "sanet"}, {"encoder": "vgg_mini"}, {"checkpoint": "a.safetensors"}])
def test_a_stylizer_comes_alone(painters, settings):
    with pytest.raises(ConfigError, match="expected stylizer= alone, got it with method=, encoder= or checkpoint="):
        stylize(CONTENT, STYLE, stylizer=painters["adain"], **settings)
    with pytest.raises(ConfigError, match="expected stylizer= alone"):
        stylize_each([CONTENT], STYLE, stylizer=painters["adain"], **settings)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_says_what_to_lower(painters, monkeypatch, kind):
    painter = painters["adaattn"]
    advice = "lower size=, style_size=, most= or batch_size="

    def full(*_arguments, **_settings):
        raise kind("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(painter.network, "forward", full)
        with pytest.raises(ShapeError, match=rf"that fit in memory, got 1 image of 48×64 pixels; {advice}"):
            stylize(CONTENT, STYLE, stylizer=painter)
    with monkeypatch.context() as patch:
        patch.setattr(painter.extractor, "read", full)
        with pytest.raises(ShapeError, match=f"that fit in memory, got a style of 64×48 pixels; {advice}"):
            stylize(CONTENT, STYLE, stylizer=painter)
    found = stylize_each([CONTENT, CONTENT], STYLE, batch_size=2, stylizer=painter)
    with monkeypatch.context() as patch:
        patch.setattr(painter.extractor, "read", full)
        with pytest.raises(ShapeError, match=rf"that fit in memory, got 2 images of 48×64 pixels; {advice}"):
            next(found)


def test_other_errors_of_a_network_pass_as_they_are(painters, monkeypatch):
    def broken(*_arguments, **_settings):
        raise RuntimeError("something else")

    monkeypatch.setattr(painters["adain"].network, "forward", broken)
    with pytest.raises(RuntimeError, match="^something else$"):
        stylize(CONTENT, STYLE, stylizer=painters["adain"])


# The picture ----------------------------------------------------------------------------------------------------------


def test_a_result_is_one_line_in_words():
    assert repr(Stylized(torch.zeros(3, 20, 30))) == "Stylized(30×20)"


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path):
    made = Stylized(picture(0, 20, 30))
    assert made.save(tmp_path / "a.png") == tmp_path / "a.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(made.image))
    assert made.save(str(tmp_path / "a.jpg")) == tmp_path / "a.jpg"
    with pytest.raises(ConfigError, match=r"expected a picture file that can be written, such as out\.png, got 'a\.m'"):
        made.save(tmp_path / "a.m")
    with pytest.raises(StoreError, match="expected to write"):
        made.save(tmp_path / "missing" / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.jpg"}


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_come_with_the_package_are_known_by_method(assets, method, vgg):
    found = load_stylizer(method, device="cpu")
    assert repr(found) == f"Stylizer({method} on vgg_mini, cpu)"
    assert found.network.channels == channels_of(vgg) == CHANNELS
    assert not found.network.training
    assert not any(p.requires_grad for p in found.network.parameters())
    made = stylize(CONTENT, STYLE, method=method, device="cpu").tensor
    assert torch.equal(made, stylize(CONTENT, STYLE, stylizer=found).tensor)


def test_the_usual_method_is_adaattn_and_a_checkpoint_says_its_own(assets):
    assert load_stylizer(device="cpu").network.method == "adaattn"
    assert load_stylizer(encoder="vgg_mini", device="cpu").network.method == "adaattn"
    for method in METHODS:
        file = assets / f"{method}_vgg_mini.safetensors"
        for given in (None, method):
            assert load_stylizer(given, checkpoint=file, device="cpu").network.method == method
    made = next(stylize_each([CONTENT], STYLE, checkpoint=str(file), device="cpu"))
    assert made.tensor.shape == CONTENT.shape


def test_an_encoder_may_be_loaded_already(assets, vgg):
    found = load_stylizer("sanet", encoder=vgg)
    assert found.extractor is vgg
    assert found.device == vgg.device
    made = stylize(CONTENT, STYLE, method="sanet", encoder=vgg).tensor
    assert torch.equal(made, stylize(CONTENT, STYLE, stylizer=found).tensor)


def test_a_network_of_ones_own_encoder_is_written_and_read(narrow, tmp_path):
    channels = channels_of(narrow)
    assert channels == (8, 8, 8, 8, 8)
    pack(network_of("adaattn", channels), tmp_path / "own.safetensors", encoder="narrow")
    made = stylize(CONTENT, STYLE, encoder=narrow, checkpoint=tmp_path / "own.safetensors")
    assert made.tensor.shape == CONTENT.shape
    with pytest.raises(UnknownModelError, match="narrow"):
        load_stylizer(checkpoint=tmp_path / "own.safetensors", device="cpu")


def test_a_few_are_kept_and_a_file_that_changes_is_read_again(assets, monkeypatch):
    loaded, load, file = [], module.load_network, assets / "own.safetensors"
    monkeypatch.setattr(module, "load_network", lambda *given: loaded.append(given) or load(*given))
    pack(network_of("adain"), file, encoder="vgg_mini")
    a, b = (stylize(CONTENT, STYLE, checkpoint=file, device="cpu").tensor for _ in range(2))
    assert len(loaded) == 1
    assert torch.equal(a, b)
    pack(network_of("adain", seed=1), file, encoder="vgg_mini")
    assert not close(stylize(CONTENT, STYLE, checkpoint=file, device="cpu").tensor, a)
    assert len(loaded) == 2


def test_the_published_encoder_is_looked_for_beside_its_networks(assets, monkeypatch, vgg):
    asked = []
    monkeypatch.setattr(module, "load_extractor", lambda name, **settings: asked.append((name, settings)) or vgg)
    folder = assets / "published"
    folder.mkdir()
    pack(network_of("adain"), folder / "own.safetensors", encoder="vgg_normalised")
    own, vgg_file = folder / "own.safetensors", folder / "vgg_normalised.pth"
    with pytest.raises(
        WeightsUnavailableError, match=f"the encoder at '{vgg_file}', but there is no such file; put it"
    ):
        load_stylizer(checkpoint=own, device="cpu")
    vgg_file.touch()
    for given in (own, str(own)):
        load_stylizer(checkpoint=given, device="cpu")
        assert asked.pop() == ("vgg_normalised", {"device": "cpu", "checkpoint": vgg_file, "dtype": "float32"})
    with pytest.raises(ConfigError, match=f"the encoder 'vgg_normalised', .* '{own}' was trained with, got 'vgg_mini'"):
        load_stylizer(encoder="vgg_mini", checkpoint=own, device="cpu")
    assert not asked
    load_stylizer(encoder=vgg, checkpoint=own, device="cpu")  # one that is loaded is taken as it is
    with pytest.raises(ConfigError, match="expected device= of the encoder, which is on cpu already, got 'meta'"):
        load_stylizer(encoder=vgg, checkpoint=own, device="meta")


def test_methods_that_are_none_or_another_are_refused(assets):
    with pytest.raises(ConfigError, match=r"expected a method, got 'adaatn'\. Did you mean 'adaattn'"):
        stylize(CONTENT, STYLE, method="adaatn")
    file = assets / "adain_vgg_mini.safetensors"
    with pytest.raises(ConfigError, match=f"of 'sanet', but '{file}' is of 'adain'; pass method='adain'"):
        stylize(CONTENT, STYLE, method="sanet", checkpoint=file)


def test_encoders_that_do_not_fit_are_refused(assets, vgg, narrow, mini):
    message = r"expected an encoder with relu1_1, relu2_1, … relu5_1, but mini has no relu1_1; try 'vgg_mini' or 'vgg1"
    file = assets / "adaattn_vgg_mini.safetensors"
    with pytest.raises(ConfigError, match=message):
        stylize(CONTENT, STYLE, encoder=mini, checkpoint=file, device="cpu")
    with pytest.raises(ConfigError, match=f"expected the encoder 'vgg_mini', .* '{file}' was trained with, got 'mini'"):
        stylize(CONTENT, STYLE, encoder="mini", checkpoint=file, device="cpu")
    with pytest.raises(ConfigError, match="expected checkpoint= with a network for the encoder 'vgg19', got none; tho"):
        stylize(CONTENT, STYLE, encoder="vgg19")
    channels = r"\(8, 8, 8, 8, 8\)"
    with pytest.raises(ConfigError, match=rf"with {channels} channels, but '.*' is for \(32, .*, those of 'vgg_mini'"):
        stylize(CONTENT, STYLE, encoder=narrow, checkpoint=file)
    with pytest.raises(
        ConfigError, match=rf"for the channels of narrow, {channels}, got one for \(32, .*encoder= that"
    ):
        Stylizer(narrow, network_of("adain"))


def test_missing_and_damaged_files_are_named(assets):
    file = assets / "adaattn_vgg_mini.safetensors"
    whole = file.read_bytes()
    missing = assets / "missing.safetensors"
    with pytest.raises(WeightsUnavailableError, match=f"at '{missing}', but there is no such file"):
        stylize(CONTENT, STYLE, checkpoint=missing)
    for broken in (whole[:-100], whole[:50], b"", b"garbage"):
        file.write_bytes(broken)
        for given in ({}, {"checkpoint": file}):
            with pytest.raises(WeightsUnavailableError, match=f"at '{file}', but it is damaged"):
                stylize(CONTENT, STYLE, device="cpu", **given)
    file.unlink()
    with pytest.raises(WeightsUnavailableError, match=f"at '{file}', but there is no such file"):
        load_stylizer()


# Styles to learn from -------------------------------------------------------------------------------------------------


def test_usual_styles_are_patterns_textures_and_the_most_colourful_pictures():
    plain = {name: np.full((20, 24, 3), colour, np.uint8) for name, colour in (("grey", 128), ("blue", (90, 100, 160)))}
    red_and_green = np.zeros((20, 24, 3), np.uint8)
    red_and_green[:, :12, 0], red_and_green[:, 12:, 1] = 255, 255
    pictures = {**plain, "both": red_and_green}
    a, b = (usual_styles(given, patterns_of=5, colourful=2, size=32) for given in (pictures, dict(pictures)))
    assert len(a) == 5 + len(samples.load("textures")) + 2
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(style.dtype == np.uint8 and style.ndim == 3 and style.shape[2] == 3 for style in a)
    for style, drawn in zip(a[:5], patterns.usual(5, size=32), strict=True):
        assert np.array_equal(style, np.asarray(drawn))
    assert a[-2] is red_and_green
    assert a[-1] is plain["blue"]
    reordered = usual_styles(dict(reversed(pictures.items())), patterns_of=0, colourful=3, size=32)
    assert [id(style) for style in reordered[-3:]] == [id(pictures[name]) for name in ("both", "blue", "grey")]
    assert len(usual_styles(patterns_of=2, size=32)) == 2 + len(samples.load("textures"))


def test_colourfulness_is_chroma_and_spread():
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (16, 16, 1), dtype=np.uint8), 3, axis=2)
    assert colourfulness(grey) == pytest.approx(0, abs=0.05)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    assert colourfulness(red) == pytest.approx(104.55, abs=0.05)  # the chroma of sRGB's red in CIELAB
    both = red.copy()
    both[8:] = (0, 255, 0)
    assert colourfulness(both) > colourfulness(red) > colourfulness(red // 2 + 64) > colourfulness(grey)
    assert load_image(both).shape == (3, 16, 16)


def test_a_result_takes_the_colours_of_another_image(painter):
    made = stylize(CONTENT, STYLE, stylizer=painter)
    for wanted in (CONTENT, STYLE):
        found = made.recoloured(wanted)
        assert found.tensor.shape == made.tensor.shape
        assert torch.equal(found.tensor, match_colours(made.tensor, wanted))
    assert not torch.equal(made.recoloured(CONTENT).tensor, made.recoloured(STYLE).tensor)
