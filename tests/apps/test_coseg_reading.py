"""Reading a set of images: what is stored comes back, each image is read once, and no order of the list matters."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.cosegmentation import reading
from vitfeats.apps.cosegmentation.evidence import border_saliency, stretched
from vitfeats.apps.cosegmentation.reading import ReadSet, TokenStore, digest, read_images, taken_taps
from vitfeats.attention_maps import saliency as attention_saliency
from vitfeats.configs import CosegmentConfig
from vitfeats.errors import ConfigError, ImageError, ShapeError, UnknownFacetError
from vitfeats.preprocess import load_image
from vitfeats.similarity import unit


@pytest.fixture(scope="module")
def vgg() -> vf.Extractor:
    return vf.load_extractor("vgg_mini", size=64, device="cpu")


@pytest.fixture(scope="module")
def without_cls() -> vf.Extractor:
    return vf.load_extractor(families.build("timm-siglip"), size=64)


def noise(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Return a picture of coloured blocks, (height, width, 3) of uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def pictures() -> list[np.ndarray]:
    return [noise(1), noise(2, 64, 64), noise(3, 90, 60), noise(4, 60, 80)]


def tokens_of(read: ReadSet) -> list[Tensor]:
    return [read.tokens[index] for index in range(len(read.tokens))]


def same(one: ReadSet, other: ReadSet) -> bool:
    """Whether all but the places in the list is the same, bit for bit."""
    return (
        len(one.tokens) == len(other.tokens)
        and all(torch.equal(a, b) for a, b in zip(tokens_of(one), tokens_of(other), strict=True))
        and all(torch.equal(a.saliency, b.saliency) for a, b in zip(one.images, other.images, strict=True))
    )


# The store ------------------------------------------------------------------------------------------------------------


def entries() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(count, 7, generator=rng) for count in (5, 1, 12, 3)]


def stored(parts: list[Tensor]) -> TokenStore:
    store = TokenStore()
    for part in parts:
        store.append(part)
    return store


@pytest.fixture(params=[0, 100, 2**28], ids=["one byte in memory", "some in memory", "all in memory"])
def memory(request, monkeypatch) -> int:
    """Keep this many bytes in memory; a limit of 0 would be none at all."""
    monkeypatch.setattr(reading, "_IN_MEMORY", max(1, request.param))
    return request.param


def test_the_store_returns_what_was_appended_in_half_precision(memory):
    parts = entries()
    store = stored(parts)
    assert len(store) == 4
    assert [store.count(index) for index in range(4)] == [5, 1, 12, 3]
    assert bool(store._file._rolled) == (memory < 2 * 7 * 21)
    for index in (2, 0, 3, 1, 2):  # in any order, and more than once
        assert store[index].dtype == torch.float32
        assert torch.equal(store[index], parts[index].half().float())


def test_more_can_be_appended_after_reading(memory):
    parts = entries()
    store = stored(parts[:2])
    assert torch.equal(store[0], parts[0].half().float())
    store.append(parts[2])
    assert [len(store[index]) for index in range(3)] == [5, 1, 12]
    for index in range(3):
        assert torch.equal(store[index], parts[index].half().float())


def test_what_is_returned_is_a_copy():
    store = stored(entries())
    store[0].zero_()
    assert store[0].any()


def test_tokens_of_any_type_and_layout_are_stored():
    part = entries()[2].double().T.contiguous().T
    store = stored([part.to(torch.float32), part.to(torch.bfloat16)[:, ::2]])
    assert torch.equal(store[0], part.half().float())
    assert torch.equal(store[1], part.bfloat16().half().float()[:, ::2])


def naive_sample(parts: list[Tensor], every: int, most: int, kept: list[Tensor | None]) -> Tensor:
    """Return what the store samples, from all tokens in one tensor."""
    every_token = torch.cat(
        [(part if mask is None else part[mask]) for part, mask in zip(parts, kept, strict=True)]
    ).half()
    total = len(every_token)
    if every:
        taken = [index for index in range(total) if index % every == 0]
    elif total <= most:
        taken = list(range(total))
    else:  # evenly spread, the first and the last among them
        taken = [int(np.round(index * (total - 1) / (most - 1))) if most > 1 else 0 for index in range(most)]
    return every_token[taken].float()


@pytest.mark.parametrize(
    ("every", "most"), [(1, 5), (2, 5), (4, 5), (100, 5), (0, 1), (0, 2), (0, 7), (0, 20), (0, 21), (0, 22), (0, 999)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_is_that_of_all_tokens_in_one_tensor(memory, every, most, masked):
    parts = entries()
    rng = torch.Generator().manual_seed(1)
    kept: list[Tensor | None] = [None] * 4
    if masked:
        kept = [torch.rand(len(part), generator=rng) < 0.6 for part in parts]
        kept[1], kept[3] = torch.zeros(1, dtype=torch.bool), None
    found = stored(parts).sample(every, most, kept)
    assert torch.equal(found, naive_sample(parts, every, most, kept))
    total = sum(len(part) if mask is None else int(mask.sum()) for part, mask in zip(parts, kept, strict=True))
    assert every or len(found) == min(most, total)


@pytest.mark.parametrize(("every", "most"), [(0, 5), (3, 5)])
def test_a_sample_of_nothing_has_the_channels_all_the_same(every, most):
    parts = entries()
    nothing = [torch.zeros(len(part), dtype=torch.bool) for part in parts]
    assert stored(parts).sample(every, most, nothing).shape == (0, 7)


def test_a_sample_asks_for_a_mask_for_each_image():
    with pytest.raises(ValueError, match="zip"):
        stored(entries()).sample(0, 5, [None] * 3)


# Digests --------------------------------------------------------------------------------------------------------------


def forms(pixels: np.ndarray, folder: Path, name: str) -> dict[str, object]:
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    return {
        "path": path,
        "text": str(path),
        "pil": Image.fromarray(pixels),
        "array": pixels,
        "tensor": torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255,
    }


@pytest.mark.parametrize("form", ["path", "text", "pil", "array", "tensor"])
def test_the_digest_is_that_of_the_pixels_and_not_of_the_object(tmp_path, form):
    pixels = noise(0)
    changed = pixels.copy()
    changed[17, 23, 1] ^= 1
    one, again, other = (
        digest(forms(array, tmp_path, name)[form])
        for array, name in ((pixels, "a"), (pixels.copy(), "b"), (changed, "c"))
    )
    assert one == again
    assert one != other
    assert len(one) == 64
    assert int(one[:12], 16) >= 0


def test_the_size_is_part_of_the_digest():
    flat = np.zeros((4, 6, 3), np.uint8)
    assert digest(flat) != digest(flat.reshape(6, 4, 3))
    assert digest(flat) != digest(flat[:, :3])
    assert digest(Image.fromarray(flat)) != digest(Image.fromarray(flat.reshape(6, 4, 3)))


def test_the_same_pixels_in_another_form_have_the_same_digest(tmp_path):
    pixels = noise(0)
    found = forms(pixels, tmp_path, "a")
    assert digest(found["pil"]) == digest(found["array"]) == digest(found["tensor"])
    assert digest(pixels.astype(np.float32) / np.float32(255)) == digest(pixels)
    grey = Image.fromarray(pixels[..., 0])
    dark = Image.fromarray(np.where(pixels[..., 0] > 128, 255, 0).astype(np.uint8))
    assert digest(grey) == digest(grey.convert("RGB")) == digest(np.stack([pixels[..., 0]] * 3, 2))
    assert digest(dark) == digest(dark.convert("1")) == digest(dark.convert("P"))
    assert digest(dark) != digest(grey)


def test_a_view_has_the_digest_of_its_copy():
    pixels = noise(0)
    assert digest(pixels[:, ::-1]) == digest(pixels[:, ::-1].copy())
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    assert digest(tensor) == digest(tensor.contiguous())
    assert digest(tensor.float().requires_grad_()) == digest(tensor.float())


def test_pictures_of_other_palettes_have_other_digests():
    one = Image.fromarray(noise(0)).quantize(16)
    other = one.copy()
    other.putpalette(list(reversed(one.getpalette() or [])))
    assert not torch.equal(load_image(one), load_image(other))
    assert digest(one) != digest(other)


def test_what_cannot_be_read_has_a_digest_nonetheless(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(noise(0)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    broken = [tmp_path / "missing.png", tmp_path, tmp_path / "text.png", tmp_path / "half.png", "", "a\0b"]
    assert len({digest(path) for path in broken}) == len(broken)
    with Image.open(tmp_path / "half.png") as picture:
        assert len(digest(picture)) == 64


# What is read ---------------------------------------------------------------------------------------------------------


def test_what_is_read_of_a_vision_transformer(mini):
    usual, last = "key@-1", "token@-1"
    config = CosegmentConfig
    assert mini.card.default_tap == usual
    assert taken_taps(mini, config()) == {"tokens": usual, "border": last, "attention": "attention@-1"}
    assert taken_taps(mini, config(saliency="border")) == {"tokens": usual, "border": last}
    assert taken_taps(mini, config(saliency="attention")) == {"tokens": usual, "attention": "attention@-1"}
    assert taken_taps(mini, config(tap="value@3", saliency="border")) == {"tokens": "value@3", "border": last}
    assert taken_taps(mini, config(saliency="border", outliers=0.7)) == {"tokens": usual, "border": last, "cls": last}


def test_without_cls_both_is_the_border_alone(without_cls):
    assert taken_taps(without_cls, CosegmentConfig()) == {"tokens": "key@-1", "border": "token@-1"}


def test_of_a_convolutional_network_its_usual_tap_is_read(vgg):
    assert taken_taps(vgg, CosegmentConfig()) == {"tokens": "out@relu4_1", "border": "out@relu4_1"}


@pytest.mark.parametrize("kind", ["vgg", "without_cls"])
def test_outliers_without_cls_are_refused(kind, request):
    extractor = request.getfixturevalue(kind)
    with pytest.raises(ConfigError, match=r"expected a model with CLS for outliers=, but \w+ has none; leave it out"):
        read_images(pictures(), extractor, CosegmentConfig(outliers=0.5))


@pytest.mark.parametrize("kind", ["vgg", "without_cls"])
def test_attention_without_cls_is_refused(kind, request):
    extractor = request.getfixturevalue(kind)
    with pytest.raises((UnknownFacetError, ConfigError), match="attention"):
        read_images(pictures(), extractor, CosegmentConfig(saliency="attention"))


@pytest.mark.parametrize("heads", [(), (0, 2)])
def test_saliency_is_the_borders_with_some_of_attention(mini, heads):
    image = pictures()[0]
    found = mini(image, ["token@-1", "attention@-1"])
    border = border_saliency(found["token@-1"])
    attention = attention_saliency(found["attention@-1"], heads or None)[0]
    expected = {"border": border, "attention": attention, "both": stretched(border + reading._ATTENTION * attention)}
    for name, values in expected.items():
        read = read_images([image], mini, CosegmentConfig(saliency=name, heads=heads))
        assert torch.allclose(read.images[0].saliency, values, atol=1e-5)


@pytest.mark.parametrize("tap", [None, "token@-1", "value@3"])
def test_tokens_are_unit_vectors_of_the_tap(mini, tap):
    images = pictures()
    read = read_images(images, mini, CosegmentConfig(tap=tap), batch_size=1)
    assert str(read.tap) == {None: "key@11", "token@-1": "token@11", "value@3": "value@3"}[tap]
    for index, one in enumerate(read.images):
        d = mini(images[one.place], "key@-1" if tap is None else tap)
        assert torch.equal(read.tokens[index], unit(d.features[0]).half().float())
        assert (one.grid, one.frame, one.cls) == (d.grid, d.frames[0], None)
        assert one.saliency.shape == (d.grid.rows, d.grid.cols)


def test_cls_is_read_where_outliers_are_asked_for(mini):
    image = pictures()[0]
    read = read_images([image], mini, CosegmentConfig(outliers=0.5, tap="key@-1"))
    cls = read.images[0].cls
    assert cls is not None
    assert torch.allclose(cls, mini(image, "token@-1").cls[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["vgg", "without_cls"])
def test_models_without_cls_are_read(kind, request):
    extractor = request.getfixturevalue(kind)
    read = read_images(pictures(), extractor, CosegmentConfig())
    for index, one in enumerate(read.images):
        assert len(read.tokens[index]) == one.grid.tokens
        d = extractor(pictures()[one.place], "token@-1" if kind == "without_cls" else str(read.tap))
        assert torch.allclose(one.saliency, border_saliency(d), atol=1e-4)


@pytest.mark.parametrize("tap", ["out@relu3_1", "out@relu5_1"])
def test_saliency_has_the_grid_of_the_tokens_whatever_layer_they_are_of(vgg, tap):
    read = read_images(pictures()[:1], vgg, CosegmentConfig(tap=tap))
    assert tuple(read.images[0].saliency.shape) == (read.images[0].grid.rows, read.images[0].grid.cols)
    assert read.images[0].saliency.numel() == len(read.tokens[0])
    usual = vgg(pictures()[0], "out@relu4_1")
    # Of each token's centre, in pixels of the network's input, what the usual tap's saliency is there.
    coarse, fine = border_saliency(usual).double().numpy(), read.images[0].grid
    values, steps = read.images[0].saliency, usual.grid.stride
    for row, col in itertools.product(range(fine.rows), range(fine.cols)):
        at = [
            [np.clip(((place + 0.5) * network / count - steps / 2) / steps, 0, length - 1)]
            for place, network, count, length in zip(
                (row, col), usual.grid.network_size, (fine.rows, fine.cols), coarse.shape, strict=True
            )
        ]
        assert float(values[row, col]) == pytest.approx(map_coordinates(coarse, at, order=1).item(), abs=1e-4)


@pytest.mark.parametrize("tap", ["cls@-1", "attention@3"])
def test_taps_without_features_of_each_token_are_refused(mini, tap):
    with pytest.raises(ConfigError, match=f"expected a tap with features of each token, got '{tap}'; for example 'key"):
        read_images(pictures()[:1], mini, CosegmentConfig(tap=tap))


@pytest.fixture(scope="module")
def overflowing() -> vf.Extractor:
    """Return a model whose last block gives NaN, and those before it do not."""
    network = families.build("timm-dino")
    with torch.no_grad():
        network.blocks[-1].mlp.fc2.bias[3] = float("nan")
    return vf.load_extractor(network, size=32)


def test_features_that_are_not_finite_are_refused(overflowing):
    with pytest.raises(ShapeError, match=r"expected finite features, got NaN or infinity \(token@2 of"):
        read_images(pictures(), overflowing, CosegmentConfig(tap="token@-1", saliency="border"))


def test_saliency_that_is_not_finite_is_refused_where_the_tokens_are_of_another_layer(overflowing):
    with pytest.raises(ShapeError, match="expected finite"):
        read_images(pictures(), overflowing, CosegmentConfig(tap="token@0"))
    # The last block's attention is from before what overflows, and nothing else of it is read.
    read = read_images(pictures(), overflowing, CosegmentConfig(tap="token@0", saliency="attention"))
    assert all(one.saliency.isfinite().all() for one in read.images)


@pytest.mark.parametrize("place", [0, 1])
def test_cls_and_attention_that_are_not_finite_are_refused(place):
    network = families.build("timm-dino")
    with torch.no_grad():
        network.blocks[-1].attn.qkv.bias[0 if place == 0 else -1] = float("nan")  # of queries, or of values
    ex = vf.load_extractor(network, size=32)
    taken = {0: {"saliency": "attention"}, 1: {"saliency": "attention", "outliers": 0.0}}[place]
    with pytest.raises(ShapeError, match=("attention@2", "token@2")[place]):
        read_images(pictures(), ex, CosegmentConfig(tap="token@0", **taken))


def test_crops_whose_features_are_not_finite_are_refused(mini, monkeypatch):
    check, seen = reading._check_finite, []

    def broken(d: vf.Descriptor) -> None:
        seen.append(d)
        if len(seen) > 8:  # of four images two taps each, and then of crops
            d = replace(d, features=torch.full_like(d.features, float("nan")))
        check(d)

    monkeypatch.setattr(reading, "_check_finite", broken)
    with pytest.raises(ShapeError, match=r"expected finite features, got NaN or infinity \(key@11 of mini\)"):
        read_images(pictures(), mini, CosegmentConfig(crops=1, saliency="border"))
    assert len(seen) == 9


def test_a_tensor_that_requires_gradients_is_read_as_its_values(mini):
    image = torch.from_numpy(pictures()[1].transpose(2, 0, 1).copy()).float() / 255
    expected = read_images([image], mini, CosegmentConfig())
    read = read_images([image.clone().requires_grad_()], mini, CosegmentConfig())
    assert same(read, expected)
    assert not read.images[0].saliency.requires_grad


# The order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [0, 1])
def test_every_permutation_of_the_list_is_read_in_the_same_order(mini, crops):
    images = pictures()
    config = CosegmentConfig(crops=crops)
    first = read_images(images, mini, config, batch_size=3)
    for order in itertools.islice(itertools.permutations(range(4)), 1, None, 4):
        read = read_images([images[index] for index in order], mini, config, batch_size=3)
        assert [order[one.place] for one in read.images] == [one.place for one in first.images]
        assert same(first, read)


def test_pictures_of_one_content_but_for_the_palette_are_read_in_one_order(mini):
    one = Image.fromarray(noise(0)).quantize(16)
    other = one.copy()
    other.putpalette(list(reversed(one.getpalette() or [])))
    config = CosegmentConfig(saliency="border")
    assert same(read_images([one, other], mini, config), read_images([other, one], mini, config))


def test_pictures_of_one_content_but_for_the_rotation_are_read_in_one_order(mini):
    one, other = Image.fromarray(noise(0)), Image.fromarray(noise(0))
    other.getexif()[0x0112] = 6
    assert load_image(one).shape != load_image(other).shape
    config = CosegmentConfig(saliency="border")
    assert same(read_images([one, other], mini, config), read_images([other, one], mini, config))


def test_batches_change_nothing_but_rounding(mini):
    images = [noise(seed, 64, 64) for seed in range(3)]
    one, other = (read_images(images, mini, CosegmentConfig(), batch_size=size) for size in (1, 8))
    for a, b in zip(tokens_of(one), tokens_of(other), strict=True):
        assert torch.allclose(a, b, atol=2e-3)


@contextmanager
def counted(extractor: vf.Extractor) -> Iterator[list[int]]:
    """Count the images that go through the network, and the passes."""
    seen: list[int] = []
    handle = next(extractor.model.children()).register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("saliency", ["both", "border", "attention"])
def test_each_image_goes_through_the_network_once(mini, saliency):
    config = CosegmentConfig(saliency=saliency, tap="key@3", outliers=0.1)
    with counted(mini) as seen:
        read_images(pictures(), mini, config, batch_size=1)
    assert seen == [1] * 4
    with counted(mini) as seen:
        read_images([noise(seed, 64, 64) for seed in range(5)], mini, config, batch_size=4)
    assert seen == [4, 1]


def test_crops_are_more_passes(mini):
    with counted(mini) as seen:
        read_images(pictures(), mini, CosegmentConfig(crops=2), batch_size=1)
    assert seen == [1] * 12


def test_a_convolutional_network_is_run_once_an_image(vgg):
    with counted(vgg) as seen:
        read_images(pictures(), vgg, CosegmentConfig(), batch_size=1)
    assert seen == [1] * 4


# Crops ----------------------------------------------------------------------------------------------------------------


def crops_of(images: list[np.ndarray], count: int = 3, seed: int = 0) -> list[list[Tensor]]:
    found = list(reading._crops([(image, digest(image)) for image in images], count, seed))
    return [found[start : start + count] for start in range(0, len(found), count)]


def test_crops_depend_on_the_image_and_not_on_its_place():
    images = pictures()
    forth, back = crops_of(images), crops_of(images[::-1])
    for one, other in zip(forth, back[::-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(crops_of(images[2:3])[0], forth[2], strict=True))


def test_crops_of_another_seed_or_image_are_others():
    images = pictures()
    one, other = crops_of(images[:1], 6, 0)[0], crops_of(images[:1], 6, 1)[0]
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # The same places would be cut out of both, were it not for their contents.
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8), (60, 80))
    ramps = [np.stack([ramp, ramp, np.full_like(ramp, blue)], 2) for blue in (0, 1)]
    starts = [[float(crop[0].min()) for crop in crops] for crops in crops_of(ramps, 8)]
    assert starts[0] != starts[1]


def test_crops_are_cut_out_of_the_image_and_half_of_them_mirrored():
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(60), np.arange(40)[:, None]
    pixels = load_image(image)
    (crops,) = crops_of([image], 60)
    mirrored = 0
    for crop in crops:
        assert crop.shape == (3, 38, 57)
        turned = float(crop[0, 0, 0]) > float(crop[0, 0, -1])
        mirrored += turned
        upright = crop.flip(2) if turned else crop
        left, top = round(float(upright[0, 0, 0]) * 255), round(float(upright[1, 0, 0]) * 255)
        assert torch.equal(upright, pixels[:, top : top + 38, left : left + 57])
    assert 15 < mirrored < 45
    assert len({(float(crop[0].min()), float(crop[1].min())) for crop in crops}) > 8


def test_tiny_images_have_crops():
    assert [crop.shape for crop in crops_of([noise(0, 1, 1)])[0]] == [(3, 1, 1)] * 3
    assert [crop.shape for crop in crops_of([noise(0, 3, 5)])[0]] == [(3, 3, 5)] * 3


def test_tokens_of_crops_come_after_those_of_images_and_are_reproducible(mini):
    images = pictures()
    config = CosegmentConfig(crops=2)
    read = read_images(images, mini, config, seed=3, batch_size=1)
    assert (len(read.images), len(read.tokens)) == (4, 12)
    in_order = [images[one.place] for one in read.images]
    expected = [crop for crops in crops_of(in_order, 2, 3) for crop in crops]
    for index, crop in enumerate(expected):
        assert torch.equal(read.tokens[4 + index], unit(mini(crop, "key@-1").features[0]).half().float())
    assert same(read, read_images(images, mini, config, seed=3, batch_size=1))
    assert not same(read, read_images(images, mini, config, seed=4, batch_size=1))


@pytest.mark.parametrize("crops", [0, 1, 3])
def test_clusters_are_fitted_on_images_that_are_kept_and_on_their_crops(mini, crops):
    read = read_images(pictures(), mini, CosegmentConfig(crops=crops))
    assert read.crops == crops
    assert read.fitted([True] * 4) == [None] * (4 + 4 * crops)
    kept = [True, False, True, False]
    masks = read.fitted(kept)
    assert len(masks) == len(read.tokens)
    whose = [*range(4), *(image for image in range(4) for _ in range(crops))]
    for entry, (image, mask) in enumerate(zip(whose, masks, strict=True)):
        if kept[image]:
            assert mask is None
        else:
            assert mask is not None
            assert (mask.shape, bool(mask.any())) == ((len(read.tokens[entry]),), False)
    expected = [read.tokens[entry] for entry, image in enumerate(whose) if kept[image]]
    assert torch.equal(read.tokens.sample(0, 10**6, masks), torch.cat(expected))


@pytest.mark.parametrize("crops", [0, 2])
def test_crops_can_be_left_out(mini, crops):
    read = read_images(pictures(), mini, CosegmentConfig(crops=crops))
    masks = read.of_crops()
    assert [len(mask) for mask in masks] == [len(read.tokens[entry]) for entry in range(4, 4 + 4 * crops)]
    assert not any(mask.any() for mask in masks)
    whole = torch.cat([read.tokens[entry] for entry in range(4)])
    assert torch.equal(read.tokens.sample(0, 10**6, [*[None] * 4, *masks]), whole)


def test_reading_leaves_the_global_generators_alone(mini):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = read_images(pictures(), mini, CosegmentConfig(crops=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(2)
    assert same(first, read_images(pictures(), mini, CosegmentConfig(crops=1)))


# Broken images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_broken(tmp_path) -> list[object]:
    """Return four images, of which the second and the third cannot be read."""
    Image.fromarray(noise(0)).save(tmp_path / "whole.png")
    (tmp_path / "text.png").write_text("no picture")
    return [noise(1), tmp_path / "missing.png", tmp_path / "text.png", tmp_path / "whole.png"]


def test_a_broken_image_is_raised(mini, half_broken):
    with pytest.raises(ImageError, match=r"missing\.png|text\.png"):
        read_images(half_broken, mini, CosegmentConfig())


@pytest.mark.parametrize("crops", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_broken_images_are_noted_by_their_place_and_the_others_read(mini, half_broken, crops, batch_size):
    broken: dict[int, str] = {}
    config = CosegmentConfig(crops=crops)
    read = read_images(half_broken, mini, config, broken=broken, batch_size=batch_size)
    assert sorted(broken) == [1, 2]
    assert "there is none" in broken[1]
    assert "not one that Pillow can read" in broken[2]
    assert sorted(one.place for one in read.images) == [0, 3]
    alone = read_images([half_broken[0], half_broken[3]], mini, config, batch_size=batch_size)
    assert same(read, alone)


def test_where_none_can_be_read_the_message_says_so(mini, tmp_path):
    broken: dict[int, str] = {}
    with pytest.raises(ConfigError, match="expected images, got none that can be read"):
        read_images([tmp_path / "a.png", tmp_path / "b.png"], mini, CosegmentConfig(), broken=broken)
    assert sorted(broken) == [0, 1]


def test_no_images_are_refused(mini):
    with pytest.raises(ConfigError, match=r"expected images, got none$"):
        read_images([], mini, CosegmentConfig())


def test_progress_goes_to_standard_error(mini, capsys):
    read_images(pictures()[:2], mini, CosegmentConfig(), progress=True)
    told = capsys.readouterr()
    assert "reading" in told.err
    assert "2/2" in told.err
    assert told.out == ""
    read_images(pictures()[:2], mini, CosegmentConfig())
    assert capsys.readouterr().err == ""
