"""What is made is what the library makes, told as it comes; whoever leaves ends it, and errors arrive."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from studios import noise, studio_in, upload

import vitfeats as vf
from vitfeats.apps.demo import making
from vitfeats.apps.demo.intake import reduced
from vitfeats.apps.demo.making import SIDE, UP, Progress, hyperfeatures, mixing, spliced, styled
from vitfeats.apps.demo.studio import LONGEST, Stopped, Studio
from vitfeats.apps.splice import Splicer
from vitfeats.configs import DiffusionConfig, SpliceConfig
from vitfeats.errors import ConfigError, ImageError, ShapeError
from vitfeats.extractors.diffusion import DiffusionExtractor

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Iterator[Studio]:
    with studio_in(tmp_path_factory.mktemp("demo")) as studio:
        yield studio


@pytest.fixture(scope="module")
def pair(studio) -> tuple[str, str]:
    """Two pictures, both larger than what is spliced."""
    return upload(studio, noise(560, 280), "first.png"), upload(studio, noise(300, 600, 1), "second.png")


@pytest.fixture
def talkative(monkeypatch) -> None:
    monkeypatch.setattr(making, "LEAST_TELLING", 0.0)


@pytest.fixture
def steps_taken(monkeypatch) -> list[int]:
    """One entry for each step of any splice."""
    found: list[int] = []
    real = Splicer.step

    def step(self: Splicer) -> Any:
        found.append(1)
        return real(self)

    monkeypatch.setattr(Splicer, "step", step)
    return found


def idle(studio: Studio, seconds: float = 10) -> None:
    """Wait until the thread of long work has done its work."""
    studio.long.submit(lambda: None).result(timeout=seconds)


def pixels(image: Image.Image | None) -> np.ndarray:
    assert image is not None
    return np.asarray(image)


def small(studio: Studio, path: str) -> Image.Image:
    return reduced(studio.picture(path).image, SIDE)


# Splice --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("talkative")
def test_a_splice_is_told_as_it_comes_in_the_proportions_of_the_structure(studio, pair):
    first, *others = list(spliced(studio, *pair, preset="draft", steps=3))
    assert (first.picture, first.curves) == (None, None)
    assert first.told == "Waiting for the runs before this one."
    assert others
    for progress in others:
        assert progress.picture is not None
        assert progress.picture.size == (512, 256)
        assert progress.curves is not None
    assert others[-1].told.startswith("Done: 3 steps in ")
    assert all("of 3, about " in progress.told for progress in others[:-1])


def test_a_splice_is_that_of_the_library_with_the_same_seed(studio, pair):
    *_, last = spliced(studio, *pair, preset="draft", steps=2, seed=5)
    config = SpliceConfig.preset("draft", steps=2)
    extractor = vf.load_extractor("mini", size=config.size, device="cpu")
    images = [small(studio, path) for path in pair]
    alone = vf.splice(*images, model=extractor, config=config, seed=5)
    other = vf.splice(*images, model=extractor, config=config, seed=6)
    assert np.array_equal(pixels(last.picture), pixels(alone.image))
    assert not np.array_equal(pixels(last.picture), pixels(other.image))


@pytest.mark.usefixtures("talkative")
def test_a_splice_that_is_left_stops_soon(studio, pair, steps_taken):
    run = spliced(studio, *pair, preset="draft", steps=300)
    next(run), next(run)
    seen = len(steps_taken)
    run.close()
    idle(studio)
    assert 1 <= seen <= len(steps_taken) <= seen + 3


def test_a_splice_that_was_never_begun_takes_no_step(studio, pair, steps_taken):
    run = spliced(studio, *pair, preset="draft", steps=300)
    next(run)
    run.close()
    idle(studio)
    assert not steps_taken


def test_pictures_of_a_splice_are_not_told_more_often_than_they_can_be_seen(studio, pair, monkeypatch):
    rendered = []
    real = Splicer.render

    def render(self: Splicer) -> Any:
        rendered.append(1)
        return real(self)

    monkeypatch.setattr(Splicer, "render", render)
    monkeypatch.setattr(making, "LEAST_TELLING", 3600.0)
    *_, last = spliced(studio, *pair, preset="draft", steps=3)
    assert len(rendered) == 2  # of the first step, and of the result
    assert last.told.startswith("Done: 3 steps")


def test_an_error_inside_a_splice_arrives_and_the_next_one_runs(studio, pair, monkeypatch):
    for error in (ShapeError("expected more"), RuntimeError("a bug"), MemoryError("full")):

        def failing(*given: Any, callback: Callable[..., Any], error: Exception = error, **others: Any) -> None:
            callback(0, {"loss": 1.0}, lambda: torch.zeros(3, 8, 8))
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(making, "splice", failing)
            with pytest.raises(type(error), match=str(error)):
                list(spliced(studio, *pair, preset="draft"))
    assert [*spliced(studio, *pair, preset="draft", steps=1)][-1].told.startswith("Done: 1 steps")


def test_settings_that_do_not_do_are_refused_before_anything_runs(studio, pair, steps_taken):
    first, second = pair
    refused = [
        ((None, second), {}, ConfigError, "expected a picture for the structure, got none; upload one"),
        ((first, None), {}, ConfigError, "expected a picture for the appearance, got none; upload one"),
        (("/etc/passwd", second), {}, ImageError, "got the path of another file"),
        (pair, {"model": "vgg_mini"}, ConfigError, "a model with CLS for the appearance, got 'vgg_mini'; choose mini"),
        (pair, {"model": "dino_vitb8"}, ConfigError, "one of the models of this page, got 'dino_vitb8'"),
        (pair, {"preset": "slow"}, ConfigError, "expected a preset, got 'slow'"),
        (pair, {"steps": 0}, ConfigError, "expected steps of at least 1, got 0"),
    ]
    for paths, settings, kind, told in refused:
        with pytest.raises(kind, match=told):
            next(spliced(studio, *paths, **settings))
    assert not steps_taken


def test_a_picture_too_small_to_splice_is_refused_with_a_sentence(studio, pair):
    tiny = upload(studio, noise(20, 20), "tiny.png")
    for paths in ((tiny, pair[1]), (pair[1], tiny)):
        with pytest.raises(ShapeError, match="image of at least 33×33 pixels, got 20×20; enlarge it"):
            list(spliced(studio, *paths, preset="draft", steps=1))


# Style ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adaattn", "sanet", "adain"])
@pytest.mark.parametrize(("colours", "strength"), [("network", 1.0), ("style", 0.4)])
def test_a_style_is_that_of_the_library(studio, pair, method, colours, strength):
    content, style = upload(studio, noise(120, 90), "content.png"), pair[1]
    found = styled(studio, content, style, method=method, strength=strength, colours=colours)
    wanted = vf.stylize(noise(120, 90), studio.picture(style).image, method=method, strength=strength, device="cpu")
    wanted = wanted if colours == "network" else wanted.recoloured(studio.picture(style).image)
    assert np.array_equal(pixels(found.picture), pixels(wanted.image))
    assert found.curves is None
    assert found.told.startswith(f"{method}, strength {strength:g}, 120×90 pixels, ")


def test_a_large_content_is_painted_as_its_reduced_copy(studio, pair):
    content, style = pair
    found = styled(studio, content, style, method="adain", colours="content")
    made = vf.stylize(small(studio, content), studio.picture(style).image, method="adain", device="cpu")
    assert found.picture is not None
    assert found.picture.size == (512, 256)
    assert np.array_equal(pixels(found.picture), pixels(made.recoloured(studio.picture(content).image).image))


def test_a_style_that_does_not_do_is_refused(studio, pair):
    narrow = upload(studio, noise(1020, 17), "narrow.png")
    refused = [
        ((None, pair[1]), {}, ConfigError, "expected a content, got none; upload one"),
        ((pair[0], None), {}, ConfigError, "expected a style, got none; upload one"),
        (pair, {"colours": "mine"}, ConfigError, "colours of the network, the content or the style, got 'mine'"),
        (pair, {"method": "gatys"}, ConfigError, "expected a method, got 'gatys'. Known: adaattn, adain, sanet"),
        (pair, {"strength": 1.5}, ConfigError, r"expected a strength in 0\.\.1, got 1\.5"),
        (pair, {"strength": float("nan")}, ConfigError, r"expected a strength in 0\.\.1, got nan"),
        ((narrow, pair[1]), {}, ShapeError, "a content of at least 16×16 pixels"),
    ]
    for paths, settings, kind, told in refused:
        with pytest.raises(kind, match=told):
            styled(studio, *paths, **settings)


# Hyperfeatures -------------------------------------------------------------------------------------------------------


def panel(sheet: Image.Image, row: int, column: int, height: int) -> np.ndarray:
    left, top = 90 + column * (making.PANEL + 6), 26 + row * (height + 6)
    return pixels(sheet)[top : top + height, left : left + making.PANEL]


@pytest.fixture(scope="module")
def runs(studio) -> list[Progress]:
    path = upload(studio, noise(128, 96), "hyper.png")
    return list(hyperfeatures(studio, path, layers=["up1.res1"], steps=10))


def test_maps_are_shown_as_they_come(runs):
    first, *others = runs
    assert first.told == "Waiting for the runs before this one."
    assert others[-1].told.startswith("Done: 1 layers at 6 of 10 steps, ")
    matched = [re.match(r"Reading: ([1-6]) of 6 maps, \d+ s\.$", progress.told) for progress in others[:-1]]
    seen = [int(found[1]) for found in matched if found]
    assert len(seen) == len(others) - 1
    assert seen == sorted(set(seen))
    height = round(making.PANEL * 96 / 128)
    for count, progress in zip([*seen, 6], others, strict=True):
        assert progress.picture is not None
        grey = [np.all(panel(progress.picture, 0, column, height) == 225) for column in range(6)]
        assert 6 - sum(grey) == count


def test_panels_are_the_components_of_the_maps(runs):
    chain = DiffusionConfig.preset("hyperfeatures", steps=10, keep=6)
    extractor = vf.load_extractor("ddpm_mini", device="cpu", diffusion=chain)
    taps = [f"residual@up1.res1#{step}" for step in chain.kept_steps]
    found = extractor(noise(128, 96), taps)
    height = round(making.PANEL * 96 / 128)
    sheet = runs[-1].picture
    assert sheet is not None
    for column, tap in enumerate(taps):
        d = found[tap]
        rgb = vf.PCA(3).fit(d).to_rgb(d)[0].permute(1, 2, 0).numpy() * 255
        rows = np.floor((np.arange(d.grid.rows) + 0.5) * height / d.grid.rows).astype(int)
        cols = np.floor((np.arange(d.grid.cols) + 0.5) * making.PANEL / d.grid.cols).astype(int)
        drawn = panel(sheet, 0, column, height)[rows][:, cols]
        assert np.abs(drawn - rgb).max() <= 2  # the network's rounding is not the same for one tap and for several


def test_layers_are_drawn_in_the_order_of_the_network_and_once(studio):
    path = upload(studio, noise(64, 64), "square.png")
    sheets = [
        [*hyperfeatures(studio, path, layers=layers, steps=10)][-1].picture
        for layers in (["up2.res0", "up0.res1"], ["up0.res1", "up2.res0", "up0.res1"])
    ]
    assert np.array_equal(pixels(sheets[0]), pixels(sheets[1]))
    assert sheets[0] is not None
    assert sheets[0].height == 26 + 2 * (making.PANEL + 6)


def test_layers_and_chains_that_there_are_not_are_refused(studio, pair):
    for settings, told in (
        ({"layers": []}, f"expected at least one of the layers {UP[0]}, .*, got none"),
        ({"layers": ["mid.res0"]}, "expected at least one of the layers .*, got mid.res0"),
        ({"steps": 11}, "expected a chain of 10, 20, 50 steps, got 11"),
    ):
        with pytest.raises(ConfigError, match=told):
            next(hyperfeatures(studio, pair[0], **settings))
    with pytest.raises(ConfigError, match="expected a picture, got none; upload one, or click a sample"):
        next(hyperfeatures(studio, None))


def test_a_chain_that_is_left_stops_soon(studio, monkeypatch):
    path = upload(studio, noise(64, 64), "square.png")
    told, stopped = [], []
    real = making._sheet

    def sheet(drawn: Any, *given: Any) -> Image.Image:
        told.append(len(drawn))
        time.sleep(0.05)
        return real(drawn, *given)

    real_run = DiffusionExtractor.run

    def run(self: DiffusionExtractor, *given: Any) -> Any:
        try:
            return real_run(self, *given)
        except Stopped:
            stopped.append(1)
            raise

    monkeypatch.setattr(making, "_sheet", sheet)
    monkeypatch.setattr(DiffusionExtractor, "run", run)
    run_of = hyperfeatures(studio, path, layers=["up1.res1"], steps=50)
    next(run_of), next(run_of)
    run_of.close()
    idle(studio)
    assert stopped
    assert len(told) < 6


@pytest.mark.parametrize("size", [(17, 1020), (1020, 17)])
def test_a_long_picture_is_seen_in_bounds(studio, monkeypatch, size):
    path = upload(studio, noise(*size), f"long_{size[0]}.png")
    seen = []

    def stream(self: DiffusionExtractor, batch: Any, *given: Any) -> None:
        seen.append(batch.grid.network_size)
        raise Stopped

    monkeypatch.setattr(DiffusionExtractor, "stream", stream)
    list(hyperfeatures(studio, path, steps=10))
    cell = studio.extractor("ddpm_mini").card.patch
    assert max(seen[0]) == LONGEST * 64
    assert cell <= min(seen[0]) <= 2 * cell


def test_the_sheet_of_a_tall_picture_is_in_bounds(studio):
    picture = studio.picture(upload(studio, noise(17, 1020), "tall.png"))
    sheet = making._sheet({}, UP, range(6), picture)
    assert sheet.width * sheet.height < 20e6


def test_the_sheet_of_a_flat_picture_has_room_for_its_labels(studio):
    picture = studio.picture(upload(studio, noise(1020, 17), "flat.png"))
    sheet = np.asarray(making._sheet({}, UP, range(6), picture).convert("L"))
    inked = (sheet[26:, :90] < 255).any(axis=1)  # the lines of the layers' names
    assert np.count_nonzero(np.diff(inked.astype(int)) == 1) + inked[0] == len(UP)


def test_mixing_weights_are_drawn_once(studio):
    assert mixing(studio) is mixing(studio)
    assert min(mixing(studio).size) > 100
