"""Whole runs of co-segmentation: the law that no order of the images matters, and all that a result can do."""

import functools
import itertools
import json
import os
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.cosegmentation import Cosegmentation, Segment, cosegment, foreground, part_cosegment, parts, reading
from vitfeats.apps.cosegmentation import run as module
from vitfeats.apps.cosegmentation.evidence import cluster_saliency, cluster_weights, count_votes, elect
from vitfeats.apps.cosegmentation.reading import read_images
from vitfeats.apps.cosegmentation.segments import name_of, unique_names
from vitfeats.attention_maps import saliency as attention_saliency
from vitfeats.configs import CosegmentConfig
from vitfeats.errors import ConfigError, ImageError, MissingDependencyError, ShapeError, StoreError
from vitfeats.pca import two_means
from vitfeats.preprocess import load_image
from vitfeats.resize import spread_map

SIZES = [(80, 96), (100, 72), (64, 64), (90, 90)]


@functools.cache
def scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a chequered ball on a background of its own, (height, width, 3) of uint8, and where the ball is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = rng.integers(60, 140, 3) + (x / width * 40)[..., None] + rng.normal(0, 3, (height, width, 3))
    middle = height * (0.4 + 0.2 * rng.random()), width * (0.4 + 0.2 * rng.random())
    ball = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 < (0.28 * min(height, width)) ** 2
    chequers = ((x // 5 + y // 5) % 2)[..., None] * np.array([200, -10, -20]) + np.array([40, 30, 30])
    return np.where(ball[..., None], chequers, picture).clip(0, 255).astype(np.uint8), ball


def scenes(count: int = 4) -> list[np.ndarray]:
    return [scene(seed, *SIZES[seed])[0] for seed in range(count)]


def config(**changes: Any) -> CosegmentConfig:
    return CosegmentConfig(**({"refine": "none", "clusters": 40} | changes))


def needs(method: str) -> None:
    if method == "grabcut":
        pytest.importorskip("cv2")


def same_segments(one: Sequence[Segment], other: Sequence[Segment]) -> bool:
    """Whether all that was found in each image is the same, bit for bit."""
    return len(one) == len(other) and all(
        np.array_equal(a.alpha, b.alpha)
        and np.array_equal(a.mask, b.mask)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.score, b.score)
        and (a.grid, a.frame, a.outlier) == (b.grid, b.frame, b.outlier)
        and (a.part_map is None) == (b.part_map is None)
        and (a.part_map is None or np.array_equal(a.part_map, b.part_map))
        for a, b in zip(one, other, strict=True)
    )


def same(one: Cosegmentation, other: Cosegmentation) -> bool:
    return (
        same_segments(one, other)
        and torch.equal(one.votes, other.votes)
        and torch.equal(one.salient, other.salient)
        and torch.equal(one.weights, other.weights)
        and one.num_parts == other.num_parts
    )


def pixels_of(values: Tensor, segment: Segment) -> Tensor:
    """Return a map of tokens on the pixels of a small source, which is refined at its own size."""
    return spread_map(values.float()[None, None], segment.grid, segment.frame.source_size)[0, 0]


@pytest.fixture(scope="module")
def found(mini) -> Cosegmentation:
    return cosegment(scenes(), model=mini, config=config())


@pytest.fixture(scope="module")
def parted(mini) -> Cosegmentation:
    return part_cosegment(scenes(), 3, model=mini, config=config(refine="guided"))


# What is found --------------------------------------------------------------------------------------------------------


def test_masks_have_the_sizes_of_the_sources(found):
    assert len(found) == 4
    assert [mask.shape for mask in found.masks] == SIZES
    assert [segment.frame.source_size for segment in found] == SIZES
    assert all(mask.dtype == np.bool_ for mask in found.masks)
    for segment, image in zip(found, scenes(), strict=True):
        assert segment.image is image or np.array_equal(segment.image, image)
        assert tuple(segment.labels.shape) == tuple(segment.score.shape) == (segment.grid.rows, segment.grid.cols)
        assert 0 <= float(segment.score.min()) <= float(segment.score.max()) <= 1


def test_the_ball_that_all_images_share_is_found(mini):
    pytest.importorskip("cv2")
    for segment, seed in zip(cosegment(scenes(), model=mini, config=config(refine="grabcut")), range(4), strict=True):
        ball = scene(seed, *SIZES[seed])[1]
        assert (segment.mask & ball).sum() / (segment.mask | ball).sum() > 0.9


def test_the_guided_filter_refines_at_the_size_asked_for(mini):
    shown = cosegment(scenes(), model=mini, config=config(refine="guided", refine_size=32))
    assert [segment.alpha.shape for segment in shown] == [(32, 38), (44, 32), (32, 32), (32, 32)]
    assert [segment.mask.shape for segment in shown] == SIZES
    assert all(len(np.unique(segment.alpha)) > 2 for segment in shown)


def test_a_mask_that_was_found_on_a_smaller_image_is_enlarged_smoothly(mini):
    for segment in cosegment(scenes(), model=mini, config=config(refine_size=32)):
        assert set(np.unique(segment.alpha)) == {0, 255}
        assert len(np.unique(np.asarray(segment.cutout())[..., 3])) > 2


def test_votes_and_weights_are_those_of_the_clusters_that_were_found(mini, found):
    saliency = {one.place: one.saliency for one in read_images(scenes(), mini, config()).images}
    labels = [segment.labels.flatten() for segment in found]
    means = cluster_saliency(labels, [saliency[place].flatten() for place in range(4)], len(found.votes))
    assert len(found.votes) == len(found.weights) == len(found.salient) == 40
    assert torch.equal(found.votes, count_votes(means, found.config.threshold))
    assert torch.equal(found.salient, elect(found.votes, 4, found.config.votes))
    assert found.salient.any()
    assert torch.allclose(found.weights, cluster_weights(means), atol=1e-6)
    once = cosegment(scenes(), model=mini, config=config(clusterings=1))
    for place, (segment, before) in enumerate(zip(once, found, strict=True)):
        assert torch.equal(segment.labels, before.labels)  # those of the first clustering
        assert torch.allclose(segment.score, saliency[place] * found.weights[segment.labels], atol=1e-6)


@pytest.mark.parametrize(("runs", "clusters"), [(3, 40), (2, 0)])
def test_the_score_is_saliency_by_the_mean_weight_of_all_clusterings(mini, monkeypatch, runs, clusters):
    fitted = []
    for name in ("fit_clusters", "elbow_clusters"):
        fit = getattr(foreground, name)
        monkeypatch.setattr(foreground, name, lambda *a, fit=fit, **how: fitted.append(fit(*a, **how)) or fitted[-1])
    result = cosegment(scenes(), model=mini, config=config(clusterings=runs, clusters=clusters))
    read = read_images(scenes(), mini, config())
    assert len(fitted) == runs
    saliency = [one.saliency.flatten() for one in read.images]
    total = [torch.zeros_like(values) for values in saliency]
    for run in fitted:
        labels = [run.nearest(read.tokens[index]) for index in range(4)]
        weights = cluster_weights(cluster_saliency(labels, saliency, len(run)))
        total = [so_far + weights[numbers] for so_far, numbers in zip(total, labels, strict=True)]
    for one, values, weight in zip(read.images, saliency, total, strict=True):
        assert torch.allclose(result[one.place].score.flatten(), values * weight / runs, atol=1e-6)


def test_clusterings_have_seeds_of_their_own_whatever_the_seed(mini, monkeypatch):
    seen = []
    fit = foreground.fit_clusters
    monkeypatch.setattr(
        foreground, "fit_clusters", lambda *a, seed, **how: seen.append(seed) or fit(*a, seed=seed, **how)
    )
    for seed in (0, 1):
        cosegment(scenes(2), model=mini, config=config(), seed=seed)
    assert len(seen) == len(set(seen)) == 10
    assert (seen[0], seen[5]) == (0, 1)
    assert all(0 <= seed < 2**31 for seed in seen)
    seen.clear()
    cosegment(scenes(2), model=mini, config=config(foreground="votes"))
    assert seen == [0]  # weights are all that the others are for
    many = [foreground._seed_of(seed, run) for seed in (*range(100), 2**31 - 1) for run in range(5)]
    assert len(set(many)) == len(many)


def test_weighted_foreground_is_what_is_above_otsus_threshold_of_all_images_together(found):
    threshold = two_means(torch.cat([segment.score.flatten() for segment in found]))
    for segment in found:
        assert np.array_equal(segment.mask, (pixels_of(segment.score, segment) > threshold).numpy())


@pytest.mark.parametrize("clusters", [0, 12])
def test_voted_foreground_is_the_tokens_of_elected_clusters(mini, clusters):
    voted = cosegment(scenes(), model=mini, config=config(foreground="votes", clusters=clusters))
    assert voted.salient.any()
    assert len(voted.votes) <= (clusters or 14)
    assert torch.equal(voted.salient, elect(voted.votes, 4, voted.config.votes))
    for segment in voted:
        assert np.array_equal(segment.mask, (pixels_of(voted.salient[segment.labels], segment) > 0.5).numpy())


def test_no_elected_cluster_is_no_foreground(mini):
    nothing = cosegment(scenes(2), model=mini, config=config(foreground="votes", threshold=1.0))
    assert not nothing.salient.any()
    assert not any(mask.any() for mask in nothing.masks)
    assert [segment.box for segment in nothing] == [None, None]
    assert [segment.share for segment in nothing] == [0.0, 0.0]


def test_the_result_is_a_sequence_and_says_what_it_is(found):
    assert repr(found) == "Cosegmentation(4 images, 40 clusters, key@11 of mini)"
    assert list(found) == list(found.segments)
    assert found[1] is found.segments[1]
    assert found[-1] is found.segments[3]
    assert found[1:3] == found.segments[1:3]
    assert (found.model, found.tap, found.refined, found.seed, found.num_parts) == ("mini", "key@11", "none", 0, 0)
    assert found.failed == {}


# The law: no order, no chance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", ["none", "guided", "grabcut"])
def test_images_in_another_order_give_the_same_in_that_order_bit_for_bit(mini, refine):
    needs(refine)
    images, settings = scenes(), config(refine=refine)
    first = cosegment(images, model=mini, config=settings, batch_size=2)
    for order in [(3, 2, 1, 0), (1, 3, 0, 2), (0, 2, 1, 3)]:
        other = cosegment([images[place] for place in order], model=mini, config=settings, batch_size=2)
        assert same_segments(other, [first[place] for place in order])
        assert torch.equal(other.votes, first.votes)
        assert torch.equal(other.weights, first.weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"crops": 1},
        {"clusters": 0, "foreground": "votes"},
        {"outliers": 0.0, "every": 3},
        {"fit_tokens": 30, "stages": 3},
    ],
    ids=str,
)
def test_parts_of_images_in_another_order_are_the_same_in_that_order(mini, changes):
    images, settings = scenes(), config(refine="guided", **changes)
    first = part_cosegment(images, 2, model=mini, config=settings)
    order = (2, 0, 3, 1)
    other = part_cosegment([images[place] for place in order], 2, model=mini, config=settings)
    assert same_segments(other, [first[place] for place in order])
    assert other.num_parts == first.num_parts


@pytest.mark.usefixtures("as_a_user")  # the type checks draw from Python's own generator
@pytest.mark.parametrize("refine", ["guided", "grabcut"])
def test_the_same_seed_gives_the_same_whatever_was_drawn_before_and_leaves_the_generators_alone(mini, refine):
    needs(refine)
    settings = config(refine=refine, crops=1)
    results = []
    for seed in (0, 99):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(part_cosegment(scenes(3), 2, model=mini, config=settings, seed=5))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]
    assert same(*results)
    assert results[0].seed == 5


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("function", [cosegment, functools.partial(part_cosegment, num_parts=1)])
@pytest.mark.parametrize("seed", [-1, 2**31, 1.0, "3", None])
def test_seeds_out_of_range_are_refused_before_anything_is_read(mini, function, seed):
    with pytest.raises(ConfigError, match=r"expected seed as a whole number from 0 to 2147483647, got "):
        function([Path("missing.png")], model=mini, seed=seed)


@pytest.mark.parametrize("refine", ["guided", "grabcut"])
def test_the_largest_seed_is_taken(mini, refine):
    needs(refine)
    result = part_cosegment(scenes(2), 1, model=mini, config=config(refine=refine, crops=1), seed=2**31 - 1)
    assert result.seed == 2**31 - 1
    assert all(mask.any() for mask in result.masks)


def test_another_seed_gives_other_clusters(mini, found):
    other = cosegment(scenes(), model=mini, config=config(), seed=1)
    assert not all(torch.equal(a.labels, b.labels) for a, b in zip(found, other, strict=True))


def test_tokens_in_a_file_give_the_same_as_tokens_in_memory(mini, parted, monkeypatch):
    monkeypatch.setattr(reading, "_IN_MEMORY", 1000)
    stores = []
    made = reading.TokenStore
    monkeypatch.setattr(reading, "TokenStore", lambda: stores.append(made()) or stores[-1])
    assert same(parted, part_cosegment(scenes(), 3, model=mini, config=config(refine="guided")))
    assert [store._file._rolled for store in stores] == [True]


# Sets of all kinds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", ["saliency", "pca"])
@pytest.mark.parametrize("refine", ["none", "guided", "grabcut"])
def test_one_image_alone_is_split(mini, alone, refine):
    needs(refine)
    image, ball = scene(3, *SIZES[3])
    one = cosegment(image, model=mini, config=config(alone=alone, refine=refine))
    assert len(one) == 1
    assert one[0].mask.shape == SIZES[3]
    assert len(one.votes) == len(one.salient) == len(one.weights) == 0
    assert (one[0].mask & ball).sum() / (one[0].mask | ball).sum() > 0.3
    assert same(one, cosegment([image], model=mini, config=config(alone=alone, refine=refine)))


def test_one_image_alone_is_split_at_otsus_threshold_of_its_saliency(mini):
    (segment,) = cosegment(scenes(1), model=mini, config=config())
    threshold = two_means(segment.score.flatten())
    assert np.array_equal(segment.mask, (pixels_of(segment.score, segment) > threshold).numpy())


def test_one_image_alone_has_parts(mini):
    one = part_cosegment(scene(3, *SIZES[3])[0], 2, model=mini, config=config())
    assert one.num_parts == 2
    assert np.array_equal(np.unique(one[0].labels), [-1, 0, 1])


@pytest.mark.parametrize("outliers", [0.5, 1.0])
def test_one_image_alone_is_no_outlier(mini, outliers):
    assert not cosegment(scenes(1), model=mini, config=config(outliers=outliers))[0].outlier


@pytest.mark.parametrize("refine", ["none", "guided", "grabcut"])
def test_two_identical_images_have_one_mask(mini, refine):
    needs(refine)
    image = scenes(1)[0]
    pair = part_cosegment([image, image.copy()], 2, model=mini, config=config(refine=refine), batch_size=1)
    assert same_segments(pair[:1], pair[1:])
    assert [segment.name for segment in pair] == ["image_0000", "image_0001"]


@pytest.mark.parametrize("refine", ["none", "guided", "grabcut"])
@pytest.mark.parametrize("value", [0, 255])
def test_images_of_one_colour_have_masks_of_their_sizes(mini, refine, value):
    needs(refine)
    plain = [np.full((*size, 3), value, np.uint8) for size in SIZES[:3]]
    result = cosegment(plain, model=mini, config=config(refine=refine))
    assert [mask.shape for mask in result.masks] == SIZES[:3]
    assert result.weights.isfinite().all()


def test_tiny_and_long_images_have_masks_of_their_sizes(mini):
    image = scenes(1)[0]
    images = [image, image[:1, :1], image[:3, :5], image[:8], image[:, :7]]
    result = part_cosegment(images, 2, model=mini, config=config(refine="guided"))
    assert [mask.shape for mask in result.masks] == [np.shape(one)[:2] for one in images]
    assert [segment.overlay().size for segment in result] == [np.shape(one)[1::-1] for one in images]


def test_paths_pictures_arrays_and_tensors_of_the_same_pixels_give_the_same(mini, tmp_path):
    images = [scene(seed, 64, 64)[0] for seed in (2, 5, 7)]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    forms: list[Any] = [
        paths,
        [str(path) for path in paths],
        [Image.fromarray(image) for image in images],
        tuple(images),
        np.stack(images),
        stack,
        list(stack),
    ]
    results = [cosegment(form, model=mini, config=config()) for form in forms]
    # Files are read in an order of their own, and with it the clusters are others; one image alone has none.
    assert same(results[0], results[1])
    assert all(same(results[2], other) for other in results[3:])
    assert all([mask.shape for mask in result.masks] == [(64, 64)] * 3 for result in results)
    alone = [cosegment([form[1]], model=mini, config=config()) for form in forms]
    assert all(np.array_equal(alone[0][0].mask, one[0].mask) for one in alone[1:])
    assert [one[0].name for one in alone] == ["1", "1", *["image_0000"] * 5]


def test_tensors_that_require_gradients_are_taken_as_their_values(mini):
    stack = torch.from_numpy(np.stack([scene(seed, 64, 64)[0] for seed in (2, 5)])).permute(0, 3, 1, 2).float() / 255
    expected = cosegment(stack, model=mini, config=config(refine="guided"))
    assert same(expected, cosegment(stack.clone().requires_grad_(), model=mini, config=config(refine="guided")))


def test_no_images_are_refused(mini):
    with pytest.raises(ConfigError, match=r"expected images, got none$"):
        cosegment([], model=mini)


def test_a_picture_that_lies_on_its_side_has_an_upright_mask(mini):
    picture = Image.fromarray(scenes(1)[0])
    picture.getexif()[0x0112] = 6  # to be turned by a quarter
    (segment,) = cosegment([picture], model=mini, config=config())
    assert segment.mask.shape == (96, 80)
    assert segment.cutout().size == segment.overlay().size == (80, 96)


# Outliers and crops ---------------------------------------------------------------------------------------------------


def stripes(seed: int) -> np.ndarray:
    colours = np.random.default_rng(seed).integers(0, 256, (8, 1, 3), dtype=np.uint8)
    return np.repeat(np.repeat(colours, 10, 0), 90, 1)


def least_cosine(mini: vf.Extractor, *sets: list[np.ndarray]) -> float:
    """Return a cosine to the mean CLS that the last image of each set alone does not reach."""
    low, high = -1.0, 1.0
    for images in sets:
        cls = torch.stack([mini(image, "token@-1").cls[0] for image in images])
        cosines = torch.nn.functional.cosine_similarity(cls, cls.mean(0)[None])
        low, high = max(low, float(cosines[-1])), min(high, float(cosines[:-1].min()))
    assert low < high - 0.01
    return (low + high) / 2


@pytest.mark.parametrize("crops", [0, 1])
def test_what_an_outlier_shows_changes_nothing_in_the_others(mini, crops):
    one, other = [*scenes(), stripes(0)], [*scenes(), stripes(1)]
    settings = config(outliers=least_cosine(mini, one, other), crops=crops)
    first, second = (cosegment(images, model=mini, config=settings, batch_size=1) for images in (one, other))
    for result in (first, second):
        assert [segment.outlier for segment in result] == [False] * 4 + [True]
        assert not result[4].mask.any()
        assert result[4].box is None
    assert same_segments(first[:4], second[:4])
    assert torch.equal(first.votes, second.votes)
    assert int(first.votes.max()) <= 4


def test_without_outliers_images_that_pass_are_as_they_were(mini, found):
    assert same(found, cosegment(scenes(), model=mini, config=config(outliers=-1)))


def test_an_outlier_has_no_parts(mini):
    images = [*scenes(), stripes(0)]
    result = part_cosegment(images, 2, model=mini, config=config(outliers=least_cosine(mini, images)))
    assert (result[4].labels == -1).all()
    assert (result[4].parts == -1).all()
    assert not result[4].part_map.any()
    assert all((segment.labels == part).any() for segment in result[:4] for part in range(2))


def test_where_all_are_outliers_the_message_says_so(mini):
    with pytest.raises(ConfigError, match=r"expected outliers= that some image passes, got 1\.0"):
        cosegment([*scenes(), stripes(0)], model=mini, config=config(outliers=1.0))


def test_crops_add_to_what_clusters_are_fitted_on(mini, monkeypatch):
    seen = []
    fit = foreground.fit_clusters
    monkeypatch.setattr(
        foreground, "fit_clusters", lambda sample, *rest, **how: seen.append(sample) or fit(sample, *rest, **how)
    )
    whole = cosegment(scenes(), model=mini, config=config())
    cropped = cosegment(scenes(), model=mini, config=config(crops=1))
    assert len(seen) == 10  # five clusterings each
    assert len(seen[0]) == sum(segment.grid.tokens for segment in whole)
    assert len(seen[5]) > 1.5 * len(seen[0])
    assert torch.equal(seen[5][: len(seen[0])], seen[0])
    assert [segment.grid for segment in cropped] == [segment.grid for segment in whole]


# Models and settings --------------------------------------------------------------------------------------------------


def six_heads() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(
            "vit_small_patch8_224.dino", num_classes=0, embed_dim=48, depth=3, num_heads=6, dynamic_img_size=True
        )
    return network.eval().requires_grad_(False)


def test_the_published_recipe_runs_on_a_model_of_six_heads():
    pytest.importorskip("cv2")
    images = scenes(3)
    recipe = CosegmentConfig.preset("reference", size=64, every=10)
    network = six_heads()
    result = cosegment(images, model=network, config=recipe)
    assert (result.tap, result.refined) == ("key@2", "grabcut")
    ex = vf.load_extractor(network, size=64, stride=4)
    for segment, image in zip(result, images, strict=True):
        assert (segment.grid.patch, segment.grid.stride) == (8, 4)
        expected = attention_saliency(ex(image, "attention@2"), (0, 2, 4, 5))[0]
        assert torch.allclose(segment.score, expected, atol=1e-5)
    assert torch.equal(result.salient, elect(result.votes, 3, 0.75))
    parts = part_cosegment(images, 2, model=network, config=CosegmentConfig.preset("reference", size=64, refine="none"))
    assert 1 <= parts.num_parts <= 2


def test_heads_that_a_model_does_not_have_are_refused(mini):
    with pytest.raises(ShapeError, match=r"expected heads from 0 to 2 of mini, got \(0, 2, 4, 5\)"):
        cosegment(scenes(2), model=mini, config=CosegmentConfig.preset("reference", size=112, stride=16, refine="none"))


@pytest.mark.parametrize("name", ["timm-siglip", "timm-dinov3", "hf-dinov2"])
def test_other_models_are_taken(name):
    result = cosegment(scenes(3), model=families.build(name), config=config(size=56 if name == "hf-dinov2" else 64))
    assert [mask.shape for mask in result.masks] == SIZES[:3]
    assert result.tap == "key@2"


def test_a_convolutional_network_is_taken():
    result = part_cosegment(scenes(3), 2, model="vgg_mini", config=config(size=64, refine="guided"), device="cpu")
    assert [mask.shape for mask in result.masks] == SIZES[:3]
    assert repr(result) == "Cosegmentation(3 images, 40 clusters, 2 parts, out@relu4_1 of vgg_mini)"


def test_any_layer_of_a_convolutional_network_can_be_clustered():
    result = cosegment(scenes(3), model="vgg_mini", config=config(size=64, tap="out@relu3_1"), device="cpu")
    assert result.tap == "out@relu3_1"


def test_grabcut_without_opencv_is_refused_before_anything_is_read(mini, monkeypatch):
    monkeypatch.setattr("vitfeats.apps.cosegmentation.refine.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="expected OpenCV for refine='grabcut'"):
        cosegment([Path("missing.png")], model=mini, config=config(refine="grabcut"))
    assert cosegment(scenes(2), model=mini, config=config(refine="auto")).refined == "guided"


def test_refine_auto_is_grabcut_with_opencv(mini):
    pytest.importorskip("cv2")
    assert cosegment(scenes(2), model=mini, config=CosegmentConfig()).refined == "grabcut"


# The model is left as found -------------------------------------------------------------------------------------------


def hooks_of(network: torch.nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, name)) for part in network.modules() for name in names)


def test_a_module_is_left_as_it_was():
    network = six_heads()
    network.blocks[0].requires_grad_(True)
    network.blocks[1].train()
    flags = [parameter.requires_grad for parameter in network.parameters()], [m.training for m in network.modules()]
    weights = [parameter.clone() for parameter in network.parameters()]
    result = part_cosegment(scenes(2), 1, model=network, config=config(size=32))
    assert not any(segment.score.requires_grad for segment in result)
    with pytest.raises(ImageError):
        cosegment([Path("missing.png")], model=network, config=config(size=32))
    assert hooks_of(network) == 0
    assert flags == ([p.requires_grad for p in network.parameters()], [m.training for m in network.modules()])
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("stride", [8, 16])
def test_an_extractor_keeps_its_own_size_and_stride(mini, stride):
    extractor = mini.resized(size=64, stride=stride)
    result = cosegment(scenes(2), model=extractor)  # config None
    assert [segment.grid.stride for segment in result] == [stride] * 2
    assert [min(segment.frame.network_size) for segment in result] == [64, 64]
    cosegment(scenes(2), model=extractor, config=config(size=32, stride=4))
    assert (extractor.preprocess.size, extractor.preprocess.stride) == (64, stride)
    assert hooks_of(extractor.model) == 0


def test_a_model_by_name_has_overlapping_tokens_unless_the_settings_have_a_stride():
    usual, given = (
        cosegment(scenes(2), model="mini", config=config(size=64, **changes), device="cpu")
        for changes in ({}, {"stride": 16})
    )
    assert [segment.grid.stride for segment in (*usual, *given)] == [8, 8, 16, 16]
    assert [min(segment.frame.network_size) for segment in (*usual, *given)] == [64] * 4


def test_settings_change_the_size_and_stride_of_an_extractor(mini):
    result = cosegment(scenes(2), model=mini, config=config(size=64, stride=4))
    assert [segment.grid.stride for segment in result] == [4, 4]
    assert [min(segment.frame.network_size) for segment in result] == [64, 64]


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("number", [0, -1, 101, 2.0, "3", True])
def test_numbers_of_parts_out_of_range_are_refused(mini, number):
    with pytest.raises(ConfigError, match=r"expected num_parts as a whole number from 1 to 100, got"):
        part_cosegment(scenes(2), number, model=mini)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_all_images_have_the_same_parts_and_no_others(mini, number):
    result = part_cosegment(scenes(), number, model=mini, config=config())
    assert result.num_parts == number if number < 3 else 2 < result.num_parts <= number
    for segment in result:  # part_share is 1: each is in every image
        assert segment.labels.unique().tolist() == list(range(-1, result.num_parts))


def test_more_parts_than_there_are_in_all_images_are_fewer(mini):
    result = part_cosegment(scenes(), 100, model=mini, config=config())
    assert 1 <= result.num_parts < 100
    for segment in result:
        assert segment.labels.unique().tolist() == list(range(-1, result.num_parts))


def test_parts_are_numbered_by_their_size_before_the_rest_joined_them(mini):
    # With as many clusters as parts nothing joins, and sizes fall.
    result = part_cosegment(scenes(), 2, model=mini, config=config())
    sizes = sum(torch.bincount(segment.labels.flatten() + 1, minlength=3)[1:] for segment in result)
    assert sizes[0] >= sizes[1]


@pytest.mark.parametrize("refine_size", [384, 32])
@pytest.mark.parametrize("refine", ["none", "guided", "grabcut"])
def test_pixels_have_a_part_exactly_where_the_mask_is(mini, refine, refine_size):
    needs(refine)
    result = part_cosegment(scenes(), 3, model=mini, config=config(refine=refine, refine_size=refine_size))
    for segment in result:
        assert segment.parts.shape == segment.frame.source_size
        assert segment.parts.dtype == np.int64
        assert set(np.unique(segment.parts)) <= {-1, 0, 1, 2}
        assert np.array_equal(segment.parts >= 0, segment.mask)
        assert segment.part_map.shape == segment.alpha.shape
        assert 0 <= segment.part_map.min() <= segment.part_map.max() < result.num_parts  # of every pixel


def test_foreground_tokens_and_only_those_have_a_part(mini, found):
    result = part_cosegment(scenes(), 3, model=mini, config=config())
    threshold = two_means(torch.cat([segment.score.flatten() for segment in found]))
    for segment, whole in zip(result, found, strict=True):
        assert np.array_equal(segment.mask, whole.mask)
        assert torch.equal(segment.score, whole.score)
        assert torch.equal(segment.labels >= 0, whole.score > threshold)


def test_a_pixel_has_the_part_of_the_tokens_around_it(mini):
    for segment in part_cosegment(scenes(), 3, model=mini, config=config()):
        maps = torch.stack([pixels_of(segment.labels == part, segment) for part in range(3)])
        sure = (maps.amax(0) > 0.6).numpy() & segment.mask
        assert sure.any()
        assert np.array_equal(segment.parts[sure], maps.argmax(0).numpy()[sure])


def test_a_mask_that_grew_beyond_its_tokens_has_the_part_of_the_nearest_one(mini):
    for segment in part_cosegment(scenes(), 2, model=mini, config=config(refine="guided")):
        assert (segment.parts[segment.mask] >= 0).all()
        assert (segment.parts[~segment.mask] == -1).all()


def test_pixels_far_from_tokens_with_a_part_have_that_of_the_nearest_one(mini, monkeypatch):
    def all_of_it(image: Tensor, front: Tensor, score: Tensor, method: str, *, seed: int) -> np.ndarray:
        return np.full(front.shape, 255, np.uint8)

    monkeypatch.setattr(module, "refine_mask", all_of_it)
    differing = 0
    for segment in part_cosegment(scenes(), 3, model=mini, config=config()):
        assert segment.mask.all()
        height, width = segment.mask.shape
        tokens = torch.nonzero(segment.labels >= 0)
        for row, col in itertools.product((0, segment.grid.rows - 1), (0, segment.grid.cols - 1)):
            away = (tokens - torch.tensor([row, col])).square().sum(1)
            if int(away.min()) < 4:  # a token beside this one has a share in its pixels
                continue
            nearest = {int(segment.labels[tuple(token)]) for token in tokens[away == away.min()]}
            corner = segment.parts[(height - 1) * (row > 0), (width - 1) * (col > 0)]
            assert corner in nearest
            differing += corner != 0
    assert differing


def test_more_clusters_are_tried_until_enough_of_them_are_in_all_images(mini, monkeypatch):
    tried = []

    def common(labels: list[Tensor], count: int, share: float) -> Tensor:
        tried.append(count)
        return torch.arange(count) < (2 if count == 5 else 1)  # one cluster is in all images

    monkeypatch.setattr(parts, "common", common)
    assert part_cosegment(scenes(), 2, model=mini, config=config()).num_parts == 2
    assert tried == [1, 2, 3, 4, 5]
    tried.clear()
    assert part_cosegment(scenes(), 1, model=mini, config=config()).num_parts == 1
    assert tried == [1]


def test_asking_for_more_parts_never_gives_fewer(mini):
    given = [part_cosegment(scenes(), asked, model=mini, config=config()).num_parts for asked in (1, 2, 4, 8, 20)]
    assert given == sorted(given)
    assert given[:2] == [1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_parts_are_numbered_by_their_tokens(mini, seed):
    result = part_cosegment(scenes(), 4, model=mini, config=config(), seed=seed)
    counts = [sum(int((segment.labels == part).sum()) for segment in result) for part in range(result.num_parts)]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) > 0


def test_what_the_third_stage_leaves_out_is_not_in_masks(mini, monkeypatch):
    shared = parts.common
    calls = []

    def but_for_the_first(labels: list[Tensor], count: int, share: float) -> Tensor:
        calls.append(count)
        return torch.arange(count) > 0 if len(calls) == 1 else shared(labels, count, share)

    two = part_cosegment(scenes(), 1, model=mini, config=config(stages=2))
    monkeypatch.setattr(parts, "common", but_for_the_first)
    three = part_cosegment(scenes(), 1, model=mini, config=config(stages=3, part_elbow=1.0, most_clusters=2))
    assert calls[0] == 2
    assert sum(segment.mask.sum() for segment in three) < sum(segment.mask.sum() for segment in two)
    for before, after in zip(two, three, strict=True):
        dropped = (before.labels >= 0) & (after.labels < 0)
        assert (after.score[dropped] == 0).all()
        assert torch.equal(after.score[~dropped], before.score[~dropped])


@pytest.mark.parametrize("crops", [0, 1])
def test_three_stages_keep_what_most_images_share(mini, crops):
    two, three = (part_cosegment(scenes(), 2, model=mini, config=config(stages=n, crops=crops)) for n in (2, 3))
    assert three.num_parts >= 1
    for before, after in zip(two, three, strict=True):
        assert not ((after.labels >= 0) & (before.labels < 0)).any()
        assert np.array_equal(after.parts >= 0, after.mask)


def test_parts_of_a_smaller_share_of_images_need_not_be_everywhere(mini):
    result = part_cosegment(scenes(), 30, model=mini, config=config(part_share=0.25))
    all_of_them = part_cosegment(scenes(), 30, model=mini, config=config())
    assert result.num_parts >= all_of_them.num_parts
    assert not all((segment.labels == part).any() for segment in result for part in range(result.num_parts))


def test_where_nothing_is_foreground_there_are_no_parts(mini):
    with pytest.raises(ConfigError, match="expected images that share a foreground, but no token is"):
        part_cosegment(scenes(2), 2, model=mini, config=config(foreground="votes", threshold=1.0))


# Broken images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "broken.png", tmp_path / "b.png", tmp_path / "missing.png"]
    Image.fromarray(scenes()[0]).save(paths[0])
    paths[1].write_text("no picture")
    Image.fromarray(scenes()[1]).save(paths[2])
    return paths


@pytest.mark.parametrize("function", [cosegment, functools.partial(part_cosegment, num_parts=2)])
def test_broken_images_are_left_out_and_noted(mini, files, function):
    result = function(files, model=mini, config=config(), skip_broken=True)
    assert [segment.name for segment in result] == ["a", "b"]
    assert [segment.image for segment in result] == [files[0], files[2]]
    assert sorted(result.failed) == [1, 3]
    assert "broken.png" in result.failed[1]
    assert "missing.png" in result.failed[3]
    assert same(result, function([files[0], files[2]], model=mini, config=config()))


def test_a_broken_image_ends_the_run_unless_it_may_be_left_out(mini, files):
    with pytest.raises(ImageError, match=r"(broken|missing)\.png"):
        cosegment(files, model=mini, config=config())


def test_where_all_are_broken_the_message_says_so(mini, files):
    with pytest.raises(ConfigError, match="expected images, got none that can be read"):
        cosegment([files[1], files[3]], model=mini, skip_broken=True)


def test_progress_is_shown_on_standard_error(mini, capsys):
    cosegment(scenes(2), model=mini, config=config(), progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    assert "reading" in told.err
    assert "masks" in told.err
    cosegment(scenes(2), model=mini, config=config())
    assert capsys.readouterr().err == ""


# Pictures -------------------------------------------------------------------------------------------------------------


def test_the_cutout_is_the_image_with_the_mask_as_alpha(mini, found):
    soft = cosegment(scenes(), model=mini, config=config(refine="guided"))
    for segment, image in zip((*found, *soft), [*scenes(), *scenes()], strict=True):
        cutout = segment.cutout()
        assert (cutout.mode, cutout.size) == ("RGBA", image.shape[1::-1])
        pixels = np.asarray(cutout)
        assert np.array_equal(pixels[..., :3], image)
        assert np.array_equal(pixels[..., 3] > 127, segment.mask)
    assert any(0 < value < 255 for segment in soft for value in np.unique(np.asarray(segment.cutout())[..., 3]))


def test_the_overlay_shows_foreground_in_its_colours_and_the_rest_in_grey(found):
    for segment, image in zip(found, scenes(), strict=True):
        pixels = np.asarray(segment.overlay())
        assert pixels.shape == image.shape
        outside = pixels[~segment.mask]
        assert (outside.max(1) == outside.min(1)).all()
        assert outside.max() <= 0.35 * 255 + 21
        inside = segment.mask & (pixels == image).all(2)
        red = segment.mask & (pixels == (255, 64, 64)).all(2)
        assert np.array_equal(inside | red, segment.mask)
        assert inside.any()
        assert red.any()


def test_the_overlay_of_parts_has_a_colour_for_each(parted):
    for segment in parted:
        pixels = np.asarray(segment.overlay()).astype(float)
        shown = np.asarray(segment.image).astype(float)
        tints = []
        for part in range(3):
            where = (segment.parts == part) & (pixels > 0).any(2)
            tint = np.median((pixels - 0.45 * shown)[where], axis=0)
            assert np.abs((pixels - 0.45 * shown)[where] - tint).max() <= 1.01
            tints.append(tuple(np.round(tint)))
        assert len(set(tints)) == 3


def test_the_box_is_around_the_mask(found):
    for segment in found:
        rows, cols = np.nonzero(segment.mask)
        assert segment.box == (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert segment.share == pytest.approx(segment.mask.mean())


@pytest.mark.parametrize(("count", "columns", "size"), [(4, 8, (4, 2)), (4, 3, (3, 4)), (1, 8, (1, 2))])
def test_the_overview_has_images_above_their_overlays(mini, found, count, columns, size):
    shown = found if count == 4 else cosegment(scenes(1), model=mini, config=config())
    overview = shown.overview(columns)
    assert overview.width / overview.height == pytest.approx(size[0] / size[1], rel=0.05)  # squares, and some margin


def square(overview: Image.Image, row: int, column: int, shape: tuple[int, int]) -> np.ndarray:
    """Return the inner part of a picture in an overview of (rows, columns); margins are 3 % of a picture."""
    side = overview.width / (1.03 * shape[1] + 0.03)
    left, top = (side * (0.03 + 1.03 * place) for place in (column, row))
    return np.asarray(overview.convert("RGB"))[
        round(top + 0.2 * side) : round(top + 0.8 * side), round(left + 0.2 * side) : round(left + 0.8 * side)
    ]


def test_the_last_row_of_the_overview_has_blank_squares(found):
    overview = found.overview(3)
    blank = {(row, column) for row in (2, 3) for column in (1, 2)}
    for place in itertools.product(range(4), range(3)):
        assert (square(overview, *place, (4, 3)) == 255).all() == (place in blank)
    # The fourth image stands in the third row, and what was found in it below.
    shown = [square(overview, row, 0, (4, 3)).astype(float) for row in (2, 3)]
    expected = [np.asarray(found[3].image), np.asarray(found[3].overlay())]
    for pixels, whole in zip(shown, expected, strict=True):
        panel = ImageOps.pad(Image.fromarray(whole), (256, 256), color="white")
        inner = panel.crop((51, 51, 205, 205)).resize(pixels.shape[1::-1])
        assert np.corrcoef(pixels.ravel(), np.asarray(inner).ravel().astype(float))[0, 1] > 0.8


def test_the_overview_of_many_images_has_the_first_32(found):
    many = replace(found, segments=found.segments * 9)
    assert len(many) == 36
    overview = many.overview()
    assert overview.width / overview.height == pytest.approx(1, rel=0.01)  # four rows of eight, and four of overlays


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_parts", [False, True])
def test_what_is_saved_is_what_was_found(found, parted, tmp_path, with_parts):
    result = parted if with_parts else found
    folder = tmp_path / "new" / "folder"
    written = result.save(folder)
    assert written == folder / "cosegmentation.json"
    kinds = ["masks", "cutouts", "overlays", *(["parts"] if with_parts else [])]
    names = [f"image_{place:04}" for place in range(4)]
    expected = {f"{kind}/{name}.png" for kind in kinds for name in names}
    expected |= {"cosegmentation.json", "overview.png", "tokens.npz"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == expected

    facts = json.loads(written.read_text())
    assert facts | {"images": None} == json.loads(json.dumps(result.facts())) | {"images": None}
    assert (facts["model"], facts["tap"], facts["seed"]) == ("mini", "key@11", 0)
    assert (facts["refined"], facts["parts"], facts["failed"]) == (result.refined, result.num_parts, {})
    assert facts["settings"] == json.loads(json.dumps(asdict(result.config)))
    assert CosegmentConfig(**facts["settings"] | {"heads": tuple(facts["settings"]["heads"])}) == result.config
    assert [cluster["votes"] for cluster in facts["clusters"]] == result.votes.tolist()
    assert [cluster["salient"] for cluster in facts["clusters"]] == result.salient.tolist()
    assert [cluster["weight"] for cluster in facts["clusters"]] == pytest.approx(result.weights.tolist(), abs=1e-4)

    with np.load(folder / "tokens.npz") as arrays:
        assert sorted(arrays) == sorted(f"{n}_{what}" for n in range(4) for what in ("labels", "score"))
        for place, (segment, told) in enumerate(zip(result, facts["images"], strict=True)):
            assert np.array_equal(arrays[f"{place}_labels"], segment.labels)
            assert np.array_equal(arrays[f"{place}_score"], segment.score)
            assert (told["height"], told["width"]) == segment.frame.source_size
            assert (told["name"], told["outlier"]) == (segment.name, False)
            assert told["share"] == pytest.approx(segment.share, abs=1e-5)
            assert tuple(told["box"]) == segment.box
            pictures = {kind: np.asarray(Image.open(folder / told[kind])) for kind in kinds}
            assert np.array_equal(pictures["masks"], segment.mask * 255)
            assert np.array_equal(pictures["cutouts"], np.asarray(segment.cutout()))
            assert np.array_equal(pictures["overlays"], np.asarray(segment.overlay()))
            if with_parts:
                assert np.array_equal(pictures["parts"].astype(int) - 1, segment.parts)


def test_saving_anew_replaces_what_was_there(found, tmp_path):
    found.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    (tmp_path / "masks" / "image_0000.png").write_text("something else")
    found.save(str(tmp_path))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}


def test_images_of_one_name_have_files_of_their_own(mini, tmp_path):
    paths = [tmp_path / folder / "x.png" for folder in "ab"] + [tmp_path / "a" / "X.png", tmp_path / "a" / "x_2.png"]
    for path, image in zip(paths, scenes(), strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    result = cosegment(paths, model=mini, config=config())
    assert [segment.name for segment in result] == ["x", "x", "X", "x_2"]
    facts = json.loads(result.save(tmp_path / "out").read_text())
    files = [told["masks"] for told in facts["images"]]
    assert len({file.casefold() for file in files}) == 4
    for segment, file in zip(result, files, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / file)), segment.mask * 255)


def test_names_are_made_unique_whatever_they_are():
    assert unique_names(["a", "b"]) == ["a", "b"]
    assert unique_names(["a", "a", "A", "a"]) == ["a", "a_2", "A_3", "a_4"]
    for names in itertools.product(["a", "A", "a_2", "a_2_2"], repeat=4):
        made = unique_names(names)
        assert len({name.casefold() for name in made}) == 4
        assert all(name.startswith(before) for name, before in zip(made, names, strict=True))


def test_images_have_the_names_of_their_files_or_places():
    assert name_of(Path("folder/one.two.jpg"), 3) == "one.two"
    assert name_of("folder/cat.jpeg", 3) == "cat"
    assert name_of(scenes()[0], 3) == "image_0003"
    assert name_of(torch.zeros(3, 2, 2), 12345) == "image_12345"


def test_failed_images_and_empty_masks_are_in_the_file(mini, files, tmp_path):
    result = cosegment(files, model=mini, config=config(foreground="votes", threshold=1.0), skip_broken=True)
    facts = json.loads(result.save(tmp_path / "out").read_text())
    assert facts["failed"] == {str(place): reason for place, reason in result.failed.items()}
    assert [told["box"] for told in facts["images"]] == [None, None]
    assert not np.asarray(Image.open(tmp_path / "out" / facts["images"][0]["masks"])).any()


def test_one_image_alone_is_saved(mini, tmp_path):
    facts = json.loads(cosegment(scenes(1), model=mini, config=config()).save(tmp_path).read_text())
    assert facts["clusters"] == []
    assert len(facts["images"]) == 1


@pytest.mark.parametrize("where", [".", "masks", "overlays"])
def test_a_file_in_the_way_of_a_folder_is_an_error(found, tmp_path, where):
    folder = tmp_path / "out"
    blocked = folder / where
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("in the way")
    with pytest.raises(StoreError, match=r"expected a folder to write to at '.*out', but"):
        found.save(folder)


@pytest.mark.parametrize("where", ["masks/image_0001.png", "overview.png", "tokens.npz", "cosegmentation.json"])
def test_a_folder_in_the_way_of_a_file_is_an_error_and_leaves_no_half_files(found, tmp_path, where):
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / where / "inside").write_text("not empty")
    with pytest.raises(StoreError, match="expected to write"):
        found.save(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "cosegmentation.json").is_file()  # it is written last


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_an_error(found, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="expected a folder to write to"):
            found.save(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_an_image_that_is_gone_when_it_is_drawn_is_an_error(mini, files):
    (segment,) = cosegment(files[:1], model=mini, config=config())
    mask = segment.mask
    files[0].unlink()
    assert np.array_equal(segment.mask, mask)
    with pytest.raises(ImageError, match=r"there is none at .*a\.png"):
        segment.cutout()


def test_it_is_in_the_package(found):
    assert vf.cosegment is cosegment
    assert vf.part_cosegment is part_cosegment
    assert load_image(found[0].image).shape == (3, 80, 96)


# What people pass -----------------------------------------------------------------------------------------------------


def test_images_come_from_any_iterable_and_from_a_folder(mini, found, tmp_path):
    images = scenes()
    for given in (tuple(images), deque(images), iter(images), (image for image in images)):
        again = cosegment(given, model=mini, config=config())
        assert all(np.array_equal(a.alpha, b.alpha) for a, b in zip(again, found, strict=True))
    (tmp_path / "deeper").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / ("deeper" if number == 2 else "") / f"{number}.png")
    named = cosegment(tmp_path, model=mini, config=config())
    assert [segment.name for segment in named] == ["0", "1", "3", "2"]
    files = [tmp_path / "0.png", tmp_path / "deeper" / "2.png", tmp_path / "3.png", tmp_path / "1.png"]
    for segment in cosegment(files, model=mini, config=config()):
        (same,) = (one for one in named if one.name == segment.name)
        assert np.array_equal(segment.alpha, same.alpha)


@pytest.mark.usefixtures("as_a_user")
def test_what_are_no_images_is_refused(mini, tmp_path):
    with pytest.raises(ConfigError, match="expected images, or a folder of them, got int"):
        cosegment(3, model=mini)
    with pytest.raises(ConfigError, match=r"expected pictures \(.*\) in '.*', got none"):
        cosegment(tmp_path, model=mini)
    with pytest.raises(ConfigError, match="expected batch_size as a whole number from 1 to"):
        cosegment(scenes(2), model=mini, batch_size=0)


@pytest.mark.usefixtures("as_a_user")
def test_numbers_of_numpy_are_whole_numbers(mini):
    result = part_cosegment(scenes(2), np.int64(1), model=mini, config=config(), seed=np.int64(3))
    assert (result.num_parts, result.seed) == (1, 3)


def test_an_image_that_is_too_long_is_left_out_and_noted(mini):
    images = [np.zeros((1, 20000, 3), np.uint8), *scenes(2)]
    with pytest.raises(ShapeError, match="expected an image that comes to at most"):
        cosegment(images, model=mini, config=config())
    result = cosegment(images, model=mini, config=config(), skip_broken=True)
    assert len(result) == 2
    assert list(result.failed) == [0]
    assert "20000" in result.failed[0]


def test_an_overlay_can_be_drawn_smaller(found):
    assert max(found[0].overlay(40).size) == 40
    assert found[0].overlay().size == Image.fromarray(found[0].image).size


def test_an_image_that_changed_since_is_refused(mini, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(scenes(1)[0]).save(path)
    (segment,) = cosegment([path], model=mini, config=config())
    Image.new("RGB", (7, 9)).save(path)
    for drawn in (segment.cutout, segment.overlay):
        with pytest.raises(ImageError, match=r"expected 'one' as it was read, \d+×\d+ pixels, got 7×9 pixels"):
            drawn()
    path.unlink()
    with pytest.raises(ImageError, match="there is none at"):
        segment.cutout()


def test_long_names_are_cut_off_and_stay_apart(mini, tmp_path):
    name = "ü" * 120  # 240 bytes
    for place, number in ((tmp_path, 0), (tmp_path / "b", 1)):
        place.mkdir(exist_ok=True)
        Image.fromarray(scenes(2)[number]).save(place / f"{name}.png")
    result = cosegment(tmp_path, model=mini, config=config())
    result.save(tmp_path / "out")
    assert sorted(len(file.stem.encode()) for file in (tmp_path / "out" / "masks").iterdir()) == [200, 202]


def test_no_columns_are_refused(found):
    with pytest.raises(ConfigError, match="expected columns of at least 1, got 0"):
        found.overview(0)
