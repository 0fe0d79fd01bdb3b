"""Samples: they load, they are what they say, and their terms are known."""

import inspect
import re

import numpy as np
import pytest
from PIL import Image

from vitfeats import samples
from vitfeats.errors import ConfigError

SINGLES = {name: getattr(samples, name) for name in ("astronaut", "grace_hopper", "cat", "coffee", "china", "flower")}


@pytest.mark.parametrize("name", SINGLES)
def test_every_photograph_has_the_size_that_its_docstring_states(name):
    image = SINGLES[name]()
    stated = re.search(r"(\d+)×(\d+)", inspect.getdoc(SINGLES[name]))
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    assert image.size == (int(stated[1]), int(stated[2]))
    assert np.asarray(image).std() > 20  # a photograph, and not a blank


@pytest.mark.parametrize("name", ["brick", "grass", "gravel"])
def test_textures_are_grey_and_rgb(name):
    image = samples.texture(name)
    assert (image.mode, image.size) == ("RGB", (512, 512))
    pixels = np.asarray(image)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert pixels.std() > 10


def test_the_stereo_pair_is_what_its_docstring_says():
    left, right, disparity = samples.stereo_pair()
    assert left.size == right.size == (741, 500)
    assert disparity.shape == (500, 741)
    known = np.isfinite(disparity)
    assert 0.06 < 1 - known.mean() < 0.08
    assert disparity[known].min() >= 7
    assert disparity[known].max() < 61


def test_the_disparity_points_from_left_to_right():
    left, right, disparity = samples.stereo_pair()
    a, b = (np.asarray(image).astype(float) for image in (left, right))
    rows, cols = np.nonzero(np.isfinite(disparity))
    shift = disparity[rows, cols]
    inside = cols - shift >= 0
    rows, cols, shift = rows[inside], cols[inside], shift[inside]

    def difference(columns):
        return np.median(np.abs(a[rows, cols] - b[rows, np.clip(columns.round().astype(int), 0, 740)]))

    assert difference(cols - shift) < difference(cols) / 3
    assert difference(cols - shift) < difference(cols + shift) / 3


def test_the_portraits_are_two_different_photographs():
    a, b = samples.portrait_pair()
    assert np.array_equal(np.asarray(a), np.asarray(samples.astronaut()))
    assert np.array_equal(np.asarray(b), np.asarray(samples.grace_hopper()))


@pytest.mark.parametrize("name", samples.NAMES)
def test_every_name_loads(name):
    images = samples.load(name)
    assert len(images) == {"portraits": 2, "stereo": 2, "textures": 3}.get(name, 1)
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
    if name in SINGLES:
        assert np.array_equal(np.asarray(images[0]), np.asarray(SINGLES[name]()))


def test_every_sample_has_a_licence_and_a_package_that_is_required():
    parts = {"portraits": ("astronaut", "grace_hopper"), "textures": ("brick", "grass", "gravel")}
    needed = {part for name in samples.NAMES for part in parts.get(name, (name,))}
    assert needed == set(samples.LICENCES)
    for licence in samples.LICENCES.values():
        assert licence.credit
        assert licence.licence
        assert licence.package in ("scikit-image", "scikit-learn", "matplotlib")


def test_a_change_to_a_sample_does_not_reach_the_next_caller():
    image = samples.cat()
    image.paste((0, 0, 0), (0, 0, *image.size))
    assert np.asarray(samples.cat()).mean() > 20
    _, _, disparity = samples.stereo_pair()
    disparity[:] = 0
    assert samples.stereo_pair()[2].max() > 0


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"expected a sample, got 'cats'\. Did you mean 'cat'\?"):
        samples.load("cats")
    with pytest.raises(ConfigError, match=r"expected a texture, got 'bricks'\. Did you mean 'brick'\?"):
        samples.texture("bricks")
