"""Measures of a transfer: laws, counts made by hand, and the rows that a fool gets."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import wasserstein_distance
from skimage.color import rgb2lab
from synthetic import as_users_run, describe

import vitfeats as vf
from vitfeats.apps.evaluation import (
    Judge,
    TransferMeasures,
    appearance_similarity,
    colour_distance,
    colour_shift,
    foreground_iou,
    foreground_mask,
    match_colours,
    measure_transfer,
    patch_distance,
    structure_distance,
    transfer_markdown,
    transfer_table,
)
from vitfeats.errors import ConfigError, ImageError, ShapeError, TapError, UnknownFacetError
from vitfeats.preprocess import Preprocess, load_image

HALF = (0.5, 0.5, 0.5)
PREPROCESS = Preprocess(64, 16, 16, HALF, HALF)
MEASURES = (
    "structure_distance",
    "appearance_similarity",
    "foreground_iou",
    "patch_distance",
    "colour_distance",
    "colour_shift",
)


def picture(seed: int, height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def flat(red: float, green: float, blue: float, height: int = 4, width: int = 5) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[:, None, None].expand(3, height, width).clone()


def shuffled(image: torch.Tensor, seed: int = 0) -> torch.Tensor:
    order = torch.randperm(image[0].numel(), generator=torch.Generator().manual_seed(seed))
    return image.flatten(1)[:, order].view_as(image)


def convolution() -> vf.Extractor:
    torch.manual_seed(0)
    network = torch.nn.Sequential()
    network.add_module("patches", torch.nn.Conv2d(3, 16, 8, 8))
    card = vf.ModelCard(
        "own", "Own", "module", 8, 1, 16, None, 0, False, default_tap="out@patches", layers=("patches",)
    )
    return vf.load_extractor(network.eval(), card=card, size=64)


def lab(image: torch.Tensor) -> np.ndarray:
    return rgb2lab(image.permute(1, 2, 0).double().numpy()).reshape(-1, 3)


@pytest.fixture(scope="module")
def flower() -> torch.Tensor:
    return load_image(vf.samples.flower())


@pytest.fixture(scope="module")
def cat() -> torch.Tensor:
    return load_image(vf.samples.cat())


# Colours --------------------------------------------------------------------------------------------------------------


def test_colours_are_counted_as_by_hand():
    a, b = picture(0), picture(1, 20, 27).square()

    def count(image):
        found = {}
        colours = lab(image)
        for light, green_red, blue_yellow in colours:
            bins = (
                min(int(light // 12.5), 7),
                math.floor((green_red + 112.5) / 25),
                math.floor((blue_yellow + 112.5) / 25),
            )
            found[bins] = found.get(bins, 0) + 1 / len(colours)
        return found

    first, second = count(a), count(b)
    expected = sum(abs(first.get(bins, 0) - second.get(bins, 0)) for bins in {*first, *second}) / 2
    assert 0.1 < expected < 0.9
    assert colour_distance(a, b) == pytest.approx(expected, abs=1e-9)


def test_colour_shift_is_the_earth_movers_distance_of_each_channel():
    a, b = picture(0), picture(1, 20, 27).square()
    each = [wasserstein_distance(lab(a)[:, channel], lab(b)[:, channel]) for channel in range(3)]
    assert colour_shift(a, b) == pytest.approx(math.sqrt(sum(value**2 for value in each)), rel=1e-9)


def test_a_shift_of_all_colours_has_its_own_length():
    dark, light = flat(0.3, 0.3, 0.3), flat(0.6, 0.5, 0.2)
    assert colour_shift(dark, light) == pytest.approx(float(np.linalg.norm(lab(dark)[0] - lab(light)[0])), rel=1e-6)


@pytest.mark.parametrize("measure", [colour_distance, colour_shift])
def test_laws_of_distances_of_colours(measure):
    a, b, c = picture(0), picture(1).square(), picture(2, 7, 50).sqrt()
    assert measure(a, a) == 0
    assert measure(a, b) == pytest.approx(measure(b, a), rel=1e-12)
    assert measure(a, c) <= measure(a, b) + measure(b, c)
    for same in (shuffled(a), a.flip(2), a.transpose(1, 2), a.repeat(1, 2, 3)):
        assert measure(same, b) == pytest.approx(measure(a, b), rel=1e-9)
    assert measure(flat(0.2, 0.4, 0.6, 1, 1), flat(0.2, 0.4, 0.6, 9, 3)) < 1e-6


def test_the_share_of_recoloured_pixels():
    half = flat(1, 1, 1)
    half[:, :2] = 0
    assert colour_distance(flat(1, 1, 1), flat(0, 0, 0)) == 1
    assert colour_distance(flat(1, 1, 1), half) == pytest.approx(0.5)
    assert colour_shift(flat(1, 1, 1), half) == pytest.approx(50, abs=0.1)


def test_a_trace_of_colour_does_not_move_greys():
    for grey in (0.1, 0.5, 0.9):
        assert colour_distance(flat(grey, grey, grey), flat(grey + 0.004, grey, grey - 0.004)) == 0


def test_values_a_little_outside_are_cut_off_and_graphs_let_go():
    beyond = (picture(0) * 1.2 - 0.1).requires_grad_()
    inside = beyond.detach().clamp(0, 1)
    assert colour_distance(beyond, inside) == 0
    assert colour_shift(beyond, inside) == 0


def test_matched_colours_have_the_mean_and_spread():
    a, b = picture(0) * 0.3 + 0.3, picture(1, 20, 27) * 0.2 + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    made = match_colours(a, b)
    assert made.shape == a.shape
    assert made.dtype == torch.float32
    assert np.allclose(lab(made).mean(0), lab(b).mean(0), atol=1e-3)
    assert np.allclose(lab(made).std(0), lab(b).std(0), atol=1e-3)
    assert torch.allclose(match_colours(a, a), a, atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_matched_colours_of_extremes_are_colours():
    dull, glaring = picture(0) * 0.1, torch.eye(3)[:, :, None].repeat(1, 1, 4)
    for a, b in ((dull, glaring), (glaring, dull), (flat(0.2, 0.2, 0.2, 1, 1), glaring), (glaring, flat(0, 0, 0))):
        made = match_colours(a, b)
        assert made.isfinite().all()
        assert 0 <= made.min() <= made.max() <= 1
    # One pixel has a mean and no spread.
    assert colour_shift(match_colours(glaring, flat(0.2, 0.5, 0.4, 1, 1)), flat(0.2, 0.5, 0.4)) < 0.01


# Foreground -----------------------------------------------------------------------------------------------------------


def test_masks_by_hand():
    mask, other = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
    mask[:2], other[1:3] = True, True
    assert foreground_iou(mask, other) == foreground_iou(other, mask) == pytest.approx(1 / 3)
    assert foreground_iou(mask, mask) == 1
    assert foreground_iou(mask, ~mask) == 0
    assert foreground_iou(mask.numpy()[::-1], ~mask) == 1
    assert foreground_iou(mask, mask.repeat_interleave(3, 0).repeat_interleave(2, 1)) == 1
    assert foreground_iou(mask, torch.zeros_like(mask)) == 0
    assert math.isnan(foreground_iou(torch.zeros_like(mask), torch.zeros(9, 9, dtype=torch.bool)))


def test_what_is_no_mask_is_refused():
    good = torch.ones(2, 2, dtype=torch.bool)
    for bad, got in ((torch.ones(2, 2), "torch.float32"), (np.ones((2, 2), np.uint8), "uint8"), ([[True]], "list")):
        with (
            as_users_run(),
            pytest.raises(
                ImageError, match=f"expected a mask of bool, a tensor or an array, got {got}; try mask > 0.5"
            ),
        ):
            foreground_iou(bad, good)
    with pytest.raises(ShapeError, match=r"expected a mask \(height, width\), got shape \(1, 2, 2\)"):
        foreground_iou(good, good[None])


def blocks(mask: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Return (1, n, 8) tokens: one direction in the mask, another outside."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 8, generator=generator)
    tokens = directions[mask.flatten().long()] * torch.rand(mask.numel(), 1, generator=generator).add(0.5)
    return (tokens + noise * torch.randn(tokens.shape, generator=generator))[None]


def test_a_split_is_found_whichever_its_colours_are_and_the_border_is_background():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:5, 2:6] = True
    for sign in (1, -1):
        assert torch.equal(foreground_mask(describe(sign * blocks(mask, 0.1), 6, 8)), mask)
    assert torch.equal(foreground_mask(describe(blocks(~mask, 0.1), 6, 8)), mask)


def test_a_split_from_a_mask_keeps_its_labels_and_needs_no_exact_start():
    mask, start = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    mask[:, :4], start[:, :3] = True, True
    d = describe(blocks(mask, 0.1), 6, 8)
    assert torch.equal(foreground_mask(d, start), mask)
    assert torch.equal(foreground_mask(d, ~start), ~mask)
    assert torch.equal(foreground_mask(d, foreground_mask(d)), foreground_mask(d))


def test_where_all_tokens_are_alike_nothing_is_foreground():
    same = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 48, 8).contiguous()
    start = torch.zeros(6, 8, dtype=torch.bool)
    start[2:4] = True
    for features in (same, torch.zeros_like(same)):
        d = describe(features, 6, 8)
        assert not foreground_mask(d).any()
        assert not foreground_mask(d, start).any()


def test_a_split_needs_one_image_and_one_grid():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    d = describe(blocks(mask, 0.1).repeat(2, 1, 1), 6, 8)
    with pytest.raises(ShapeError, match="expected a descriptor of one image, got a batch of 2"):
        foreground_mask(d)
    with pytest.raises(ShapeError, match=r"expected start on the grid of 6×8 tokens, got \(8, 6\); resize"):
        foreground_mask(d[0], mask.T)
    with pytest.raises(ShapeError, match="expected at least 2 tokens"):
        foreground_mask(describe(torch.ones(1, 1, 8), 1, 1))


# Structure and appearance ---------------------------------------------------------------------------------------------


def test_distances_of_raw_patches_against_the_formula():
    a, b = picture(0, 64, 96), picture(1, 64, 96)

    def similarity(image):
        patches = (image - 0.5).unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(24, -1)
        lengths = patches.norm(dim=1)
        return patches @ patches.T / (lengths[:, None] * lengths)

    expected = (similarity(a) - similarity(b)).square().mean()
    assert patch_distance(a, b, PREPROCESS) == pytest.approx(float(expected), rel=1e-4)
    assert patch_distance(a, b, PREPROCESS) == pytest.approx(patch_distance(b, a, PREPROCESS), rel=1e-4)
    assert patch_distance(a, a, PREPROCESS) == 0


def test_structure_has_its_places_and_colours_have_none(flower, mini):
    turned = flower.flip(2)
    assert structure_distance(flower, flower, mini) == 0
    assert structure_distance(turned, flower, mini) > 0.01
    assert patch_distance(turned, flower, mini.preprocess) > 0.01
    assert colour_distance(turned, flower) == 0
    assert appearance_similarity(flower, flower, mini) == pytest.approx(1)
    # Of two images the one or the other can be the wanted one, if they have one size.
    assert structure_distance(turned, flower, mini) == pytest.approx(structure_distance(flower, turned, mini), rel=1e-3)
    assert appearance_similarity(turned, flower, mini) == pytest.approx(appearance_similarity(flower, turned, mini))


def test_measures_are_the_losses_own(flower, cat, mini):
    square = mini.resized(size=(112, 112))
    out, target = (square(image, ["key@11", "cls@11"]) for image in (flower, cat))
    loss = vf.structure_loss(out["key@11"], target["key@11"], form="matrix")
    assert structure_distance(flower, cat, square) == pytest.approx(float(loss), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(out["cls@11"].cls, target["cls@11"].cls)
    assert appearance_similarity(flower, cat, square) == pytest.approx(float(cosine), rel=1e-4)


def test_images_of_other_sizes_come_to_the_grid_of_the_structure_image(flower, cat, mini):
    enlarged = vf.preprocess.resize_images(flower[None], (500, 600))[0]
    assert structure_distance(enlarged, flower, mini) < structure_distance(cat, flower, mini) / 5
    assert patch_distance(enlarged, flower, mini.preprocess) < 0.01
    assert structure_distance(Image.new("RGB", (1, 1), "red"), flower, mini) > 0.01


def test_judges_may_lack_a_cls_token(flower, cat, mini):
    judge = Judge(mini, "token@2", None)
    assert judge.name == "mini token@2"
    assert math.isnan(appearance_similarity(flower, cat, judge))
    measured = measure_transfer(flower, flower, cat, extractor=judge, judges=())
    assert measured.structure_distance == 0
    assert math.isnan(measured.appearance_similarity)
    assert "appearance_similarity –" in str(measured)


def test_taps_are_looked_at_before_any_work(mini):
    assert Judge(mini, "key@-1", "cls@-2").name == "mini key@11, cls@10"
    assert Judge(mini, name="mine").name == "mine"
    with pytest.raises(ConfigError, match="expected a structure tap of many tokens, got 'cls@3'; try 'key@-1'"):
        Judge(mini, "cls@3")
    with pytest.raises(TapError, match="expected a layer from 0 to 11"):
        Judge(mini, "key@12")
    with pytest.raises(UnknownFacetError, match="expected a facet, got 'kee'"):
        Judge(mini, "key@1", "kee@1")


def test_an_appearance_without_a_cls_token_is_refused(flower, cat):
    judge = Judge(convolution(), "out@patches", "out@patches")
    with pytest.raises(ShapeError, match=r"expected a CLS token for the appearance, but out@patches of own has none"):
        appearance_similarity(flower, cat, judge)


# Everything at once ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(mini, flower, cat) -> dict[str, TransferMeasures]:
    with as_users_run():
        return transfer_table({"turned": flower.flip(2)}, flower, cat, extractor=mini)


def test_the_first_rows_are_those_of_a_fool(rows):
    assert list(rows) == ["structure image", "appearance image", "matched colours", "turned"]
    source, look, matched, turned = rows.values()
    for value in source, *source.judgements:
        assert (value.structure_distance, value.foreground_iou) == (0, 1)
    for value in look, *look.judgements:
        assert value.appearance_similarity == pytest.approx(1)
        assert value.foreground_iou < 0.7
        assert value.structure_distance > 0.01
    assert (look.colour_distance, look.colour_shift, source.patch_distance) == (0, 0, 0)
    assert matched.colour_shift < source.colour_shift / 2
    assert matched.structure_distance < look.structure_distance * 0.8
    assert turned.colour_distance == source.colour_distance
    assert turned.structure_distance > 0.01


def test_other_colours_leave_the_foreground(flower, mini):
    green = flower[[1, 0, 2]] * 0.8 + 0.1
    for recoloured in (green, flower.sqrt(), 1 - flower):
        measured = measure_transfer(recoloured, flower, flower, extractor=mini, judges=())
        assert measured.foreground_iou > 0.7
        assert measured.colour_distance > 0.3


def test_a_table_is_made_of_single_measurements(rows, flower, cat, mini, as_a_user):
    assert measure_transfer(flower.flip(2), flower, cat, extractor=mini) == rows["turned"]


def test_every_number_has_a_name(rows):
    turned = rows["turned"]
    assert [judgement.name for judgement in turned.judgements] == ["mini key@6, cls@6"]
    named = turned.as_dict()
    assert tuple(named)[:6] == MEASURES
    assert tuple(named)[6:] == tuple(f"{name} (mini key@6, cls@6)" for name in MEASURES[:3])
    assert named["structure_distance (mini key@6, cls@6)"] == turned.judgements[0].structure_distance
    assert str(turned).startswith(f"structure_distance {turned.structure_distance:.4g}, appearance_similarity ")
    lines = transfer_markdown(rows).splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| result | structure_distance | ")
    assert lines[2].startswith("| structure image | 0 | ")


def test_judges_do_not_depend_on_each_other(rows, flower, cat, mini, as_a_user):
    middle = Judge(mini, "key@6", "cls@6")
    other = Judge(mini, "value@3", "cls@3")
    first = measure_transfer(flower.flip(2), flower, cat, extractor=other, judges=[mini, middle])
    expected = rows["turned"]
    assert first.judgements[1] == expected.judgements[0]
    assert first.judgements[0].name == "mini key@11, cls@11"
    assert first.judgements[0].structure_distance == expected.structure_distance
    assert first.judgements[0].appearance_similarity == expected.appearance_similarity
    assert first.structure_distance != expected.structure_distance
    assert first.patch_distance == expected.patch_distance


def test_a_convolutional_network_can_judge(flower, cat, mini, as_a_user):
    conv = convolution()
    measured = measure_transfer(cat, flower, cat, extractor=mini, judges=[conv])
    assert measured.judgements[0].name == "own out@patches"
    assert measured.judgements[0].structure_distance > 0.01
    assert math.isnan(measured.judgements[0].appearance_similarity)
    alone = measure_transfer(cat, flower, cat, extractor=conv)
    assert alone.structure_distance == measured.judgements[0].structure_distance
    assert alone.judgements == ()


def test_a_judge_in_the_middle_needs_no_judge_in_the_middle(flower, cat, mini, as_a_user):
    assert measure_transfer(flower, flower, cat, extractor=Judge(mini, "key@6", "cls@6")).judgements == ()


def test_given_masks_are_used(flower, cat, mini, as_a_user):
    mask = np.zeros(flower.shape[1:], bool)
    mask[:100] = True
    measured = measure_transfer(flower, flower, cat, extractor=mini, judges=(), masks=(mask, mask[::-1]))
    assert measured.foreground_iou == 0
    for masks, got in (((mask,), "1 of them"), (mask, "ndarray")):
        with pytest.raises(ConfigError, match=rf"expected masks=\(of the image, of the structure image\), got {got}"):
            measure_transfer(flower, flower, cat, extractor=mini, masks=masks)


def test_a_flat_image_has_no_number_where_there_is_none(flower, mini, as_a_user):
    grey = Image.new("L", (60, 40), 128)
    rows = transfer_table({"flower": flower}, grey, grey, extractor=mini, judges=())
    assert all(math.isfinite(row.structure_distance) for row in rows.values())
    assert rows["structure image"].colour_distance == 0


def test_what_cannot_be_measured_is_refused(flower, cat, mini, as_a_user):
    with pytest.raises(ConfigError, match="expected judges with different names, got 'mini key@11, cls@11' twice"):
        measure_transfer(flower, flower, cat, extractor=mini, judges=[mini])
    with pytest.raises(ConfigError, match=r"expected an Extractor or a Judge, got str; try load_extractor\('mini'\)"):
        measure_transfer(flower, flower, cat, extractor="mini")
    with pytest.raises(ConfigError, match="other than those of the first rows, got 'matched colours'; rename it"):
        transfer_table({"matched colours": cat}, flower, cat, extractor=mini)
    with pytest.raises(ImageError, match="repeat a grey image over 3 channels"):
        measure_transfer(flower[0], flower, cat, extractor=mini)
    for image in (torch.rand(1, 8, 8), torch.rand(3, 0, 8), flower * 255):
        with pytest.raises(ImageError, match="expected"):
            colour_distance(image, cat)
        with pytest.raises(ImageError, match="expected"):
            match_colours(cat, image)
    with pytest.raises(ConfigError, match="expected at least one row, got none; see transfer_table"):
        transfer_markdown({})
    one, other = TransferMeasures(0, 1, 1, 0, 0, 0), measure_transfer(flower, flower, cat, extractor=mini)
    with pytest.raises(ConfigError, match="expected rows with the same judges, got different ones"):
        transfer_markdown({"one": one, "other": other})
