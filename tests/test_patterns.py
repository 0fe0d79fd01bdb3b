"""Patterns: pictures of the size asked for, made of the seed alone, with structure that is neither noise nor a blur."""

import itertools

import numpy as np
import pytest
import torch

import vitfeats as vf
from vitfeats import patterns
from vitfeats.errors import ConfigError, ShapeError


def _share(image: np.ndarray, low: float, high: float) -> float:
    """Return the share of a square picture's contrast that lies at wavelengths of ``low`` to ``high`` pixels."""
    grey = image.astype(float).mean(2)
    window = np.hanning(len(grey))
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window)) ** 2
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(len(grey))] * 2))
    inside = (frequency >= 1 / high) & (frequency <= 1 / low)
    return power[inside].sum() / power[frequency > 0].sum()


def _is_a_pattern(image: np.ndarray) -> bool:
    return _share(image, 4, 40) > 0.14 and _share(image, 1, 4) < 0.5


def _histogram(image: np.ndarray) -> np.ndarray:
    """Return the shares of 6³ colours."""
    number = (image.reshape(-1, 3) // 43) @ [36, 6, 1]
    return np.bincount(number, minlength=216) / number.size


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(_histogram(a), _histogram(b)).sum())


def test_there_are_eight_kinds():
    assert len(patterns.KINDS) == len(set(patterns.KINDS)) == 8


@pytest.mark.parametrize("kind", patterns.KINDS)
@pytest.mark.parametrize("size", [16, (17, 90), (130, 33), (301, 16)])
def test_every_kind_has_the_size_asked_for(kind, size):
    image = patterns.draw(kind, size, seed=4)
    height, width = (size, size) if isinstance(size, int) else size
    assert image.mode == "RGB"
    assert image.size == (width, height)
    assert np.asarray(image).std() > 5


@pytest.mark.parametrize("kind", patterns.KINDS)
def test_a_picture_is_its_seeds_alone(kind):
    state = str(np.random.get_state())
    first = patterns.draw(kind, 64, seed=3)
    assert first.tobytes() == patterns.draw(kind, (64, 64), seed=3).tobytes()
    assert first.tobytes() != patterns.draw(kind, 64, seed=4).tobytes()
    assert str(np.random.get_state()) == state


@pytest.mark.parametrize("kind", patterns.KINDS)
def test_every_kind_has_structure_between_noise_and_a_blur(kind):
    for seed in range(4):
        image = np.asarray(patterns.draw(kind, 256, seed))
        assert _is_a_pattern(image), (seed, _share(image, 1, 4), _share(image, 4, 40))
        assert np.ptp(image.astype(int), axis=2).mean() > 30, "colours, not greys"


def test_the_measure_of_structure_refuses_noise_and_blurs():
    assert not _is_a_pattern(np.random.default_rng(0).integers(0, 256, (256, 256, 3)))
    ramp = np.broadcast_to(np.linspace(0, 255, 256)[:, None, None], (256, 256, 3))
    assert not _is_a_pattern(ramp)


def test_structure_does_not_grow_with_the_picture():
    for kind in patterns.KINDS:
        small, large = (
            np.mean([_share(np.asarray(patterns.draw(kind, side, seed)), 4, 40) for seed in range(3)])
            for side in (192, 384)
        )
        assert 0.5 < large / small < 1.5, kind


def test_a_seed_has_the_same_colours_in_every_kind():
    images = {(kind, seed): np.asarray(patterns.draw(kind, 96, seed)) for kind in patterns.KINDS for seed in range(4)}
    same, other = [], []
    for (a, image_a), (b, image_b) in itertools.combinations(images.items(), 2):
        if a[0] != b[0]:
            (same if a[1] == b[1] else other).append(_overlap(image_a, image_b))
    assert np.mean(same) > 2 * np.mean(other)


def test_kinds_are_told_apart_by_their_texture_without_colours():
    extractor = vf.load_extractor("vgg_mini", size=128, device="cpu")
    kinds, seeds = len(patterns.KINDS), 4
    described = []
    for kind, seed in itertools.product(patterns.KINDS, range(seeds)):
        grey = patterns.draw(kind, 128, seed).convert("L").convert("RGB")
        tokens = extractor(grey, "out@relu3_1").features[0]
        described.append(torch.cat([tokens.mean(0), tokens.std(0)]))
    table = torch.stack(described)
    table = (table - table.mean(0)) / (table.std(0) + 1e-6)
    nearest = torch.cdist(table, table).fill_diagonal_(torch.inf).argmin(1)
    right = nearest // seeds == torch.arange(kinds * seeds) // seeds
    assert right.float().mean() > 0.75  # by chance, 3 of 31


def test_usual_goes_through_the_kinds_by_turns_with_seeds_of_their_own(monkeypatch):
    drawn = []
    monkeypatch.setattr(patterns, "draw", lambda *asked: drawn.append(asked))
    list(patterns.usual(20, (32, 40), seed=1))
    assert [kind for kind, _, _ in drawn] == [*patterns.KINDS, *patterns.KINDS, *patterns.KINDS[:4]]
    assert {size for _, size, _ in drawn} == {(32, 40)}
    first = [seed for _, _, seed in drawn]
    assert len(set(first)) == 20
    # More begin with the same; another seed has none of them.
    list(patterns.usual(25, 32, seed=1))
    assert [seed for _, _, seed in drawn[20:40]] == first
    list(patterns.usual(20, 32, seed=2))
    assert not set(first) & {seed for _, _, seed in drawn[45:]}


def test_usual_draws_what_draw_draws_when_it_is_asked(monkeypatch):
    images = [image.tobytes() for image in patterns.usual(9, 24)]
    assert len(set(images)) == 9
    plain, drawn = patterns.draw, []
    monkeypatch.setattr(patterns, "draw", lambda *asked: drawn.append(asked) or plain(*asked))
    some = patterns.usual(9, 24)
    assert not drawn
    assert next(some).tobytes() == images[0] == plain(*drawn[0]).tobytes()
    assert len(drawn) == 1
    assert not list(patterns.usual(0, 24))


@pytest.mark.usefixtures("as_a_user")
def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"expected a kind of pattern, got 'wave'\. Did you mean 'weave' or 'waves'"):
        patterns.draw("wave")
    for size in (15, (64, 15), (64, 64, 3)):
        with pytest.raises(ShapeError, match="expected a size of at least 16 pixels, or .height, width. of them, got"):
            patterns.draw("dots", size)
        with pytest.raises(ShapeError, match="at least 16 pixels"):
            patterns.usual(3, size)
    for call in (lambda: patterns.draw("dots", seed=-1), lambda: patterns.usual(3, seed=-1)):
        with pytest.raises(ConfigError, match="expected a seed of at least 0, got -1"):
            call()
    with pytest.raises(ConfigError, match="expected count of at least 0, got -2"):
        patterns.usual(-2)
