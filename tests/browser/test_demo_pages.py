"""The demo in a real browser: each tab's main path, broken and large files, several visitors, small screens.

No page may log an error, or ask another host for anything: the fixture ``visit`` looks at that.
"""

import re
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfeats import samples

pytestmark = pytest.mark.browser

TABS = ("Explore", "Match", "Splice", "Style", "Hyperfeatures")
EYE = (180, 110)  # (x, y) in pixels of the cat
MIDDLE = (samples.cat().width / 2, samples.cat().height / 2)
PATIENCE = 20  # seconds in which a run ends that nobody listens to; a whole one takes a minute


def told(page: Any, tab: str, words: str, **options: Any) -> str:
    """Wait for words in the sentence of a tab; return the sentence."""
    sentence = page.locator(f"#{tab}-told p", has_text=re.compile(words))
    sentence.wait_for(**options)
    return sentence.inner_text()


def complained(page: Any, words: str) -> None:
    """Wait for words in a message on top of the page, and close it."""
    page.locator(".toast-body", has_text=re.compile(words)).first.wait_for()
    for close in page.locator(".toast-close").all():
        close.click()
    page.locator(".toast-body").first.wait_for(state="detached")


def waits_for(page: Any, x: float, y: float, within: float) -> None:
    """Wait until the numbers of the point asked about on the tab Explore, which are opened, are those of (x, y)."""
    if not page.locator("#explore-x").is_visible():
        page.get_by_role("button", name="The point by its numbers").click()
    page.locator("#explore-y input").wait_for()
    page.wait_for_function(
        """([x, y, within]) => ["x", "y"].every((axis, index) =>
            Math.abs(document.querySelector(`#explore-${axis} input`).value - [x, y][index]) <= within)""",
        arg=[x, y, within],
    )


def number(page: Any, name: str, value: float) -> None:
    """Type a number into a field or a slider, and leave it."""
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Enter")
    field.blur()


def fetched(driving: ModuleType, page: Any, name: str) -> Image.Image:
    """Return a picture that the page shows."""
    return Image.open(BytesIO(page.request.get(driving.source(page, name)).body())).convert("RGB")


def downloaded(page: Any, name: str) -> Image.Image:
    """Click a button that downloads a picture, and open it."""
    with page.expect_download() as download:
        page.locator(f"#{name}").click()
    return Image.open(download.value.path())


def is_idle(served: Any) -> None:
    """Wait until nothing long runs or waits: one more job is at its turn."""
    served.studio.long.submit(lambda: None).result(timeout=PATIENCE)


def largest(page: Any, name: str) -> int:
    """Return the largest value of a slider."""
    return int(page.locator(f"#{name} input[type=range]").get_attribute("max"))


# Explore


def test_explore_opens_with_results(driving, page):
    told(page, "explore", "^key@11 of mini, .* tokens of 192. Most similar elsewhere: x .* of the variance.$")
    for name in ("similarity", "components", "saliency"):
        assert fetched(driving, page, f"explore-{name}").size == (640, 426)
    waits_for(page, *MIDDLE, within=0.1)


def test_a_click_on_the_picture_asks_about_that_point(driving, page):
    with driving.renewed(page, "explore-similarity"):
        driving.click_at(page, "explore-image", *EYE)
    waits_for(page, *EYE, within=2)
    sentence = told(page, "explore", "Most similar elsewhere")
    rows, cols, x, y = map(int, re.search(r"(\d+)×(\d+) tokens.* x (\d+), y (\d+)", sentence).groups())
    tokens = np.abs([(x - EYE[0]) / samples.cat().width * cols, (y - EYE[1]) / samples.cat().height * rows])
    assert tokens.max() > 1.4  # not the point's own token, nor its neighbours
    assert 0 <= x < samples.cat().width
    assert 0 <= y < samples.cat().height


@pytest.mark.parametrize("name", ["components", "saliency", "similarity"])
def test_a_click_on_what_is_drawn_asks_about_that_point_too(driving, page, name):
    with driving.renewed(page, "explore-similarity"):
        driving.click_at(page, f"explore-{name}", 454, 298)  # what is drawn has 640 pixels for 451
    waits_for(page, 320, 210, within=2)


def test_typed_numbers_ask_about_that_point(driving, page):
    waits_for(page, *MIDDLE, within=0.1)
    with driving.renewed(page, "explore-similarity"):
        number(page, "explore-x", 320)
    with driving.renewed(page, "explore-similarity"):
        number(page, "explore-y", 210)
    clicked = driving.source(page, "explore-similarity")
    with driving.renewed(page, "explore-similarity"):
        number(page, "explore-y", 20)
    with driving.renewed(page, "explore-similarity"):
        number(page, "explore-y", 210)
    assert driving.source(page, "explore-similarity") == clicked


def test_a_sample_brings_new_pictures(driving, page):
    with driving.renewed(page, "explore-components", "explore-saliency", "explore-similarity"):
        driving.sample(page, "explore-image", 1)
    waits_for(page, samples.coffee().width / 2, samples.coffee().height / 2, within=0.1)


def test_another_model_brings_its_own_facets_and_layers(driving, page):
    page.locator("#explore-model input").click()
    with driving.renewed(page, "explore-components", "explore-similarity"):
        page.get_by_role("option", name="vgg_mini", exact=True).click()
    told(page, "explore", "out@relu4_1 of vgg_mini")
    facets = page.locator("#explore-facet label").all_inner_texts()
    assert [facet.strip() for facet in facets] == ["out"]
    assert page.locator("#explore-saliency img").count() == 0  # no CLS
    for layer in (0, largest(page, "explore-layer")):
        with driving.renewed(page, "explore-components"):
            number(page, "explore-layer", layer)


def test_another_facet_is_read(driving, page):
    with driving.renewed(page, "explore-components", "explore-similarity"):
        page.locator("#explore-facet").get_by_text("query").click()
    told(page, "explore", "^query@11 of mini")


def test_the_layer_moves_by_the_keyboard(driving, page):
    assert largest(page, "explore-layer") == 11
    with driving.renewed(page, "explore-components", "explore-similarity"):
        page.locator("#explore-layer input[type=range]").press("ArrowLeft")
    told(page, "explore", "^key@10 of mini")


def test_size_and_stride_change_the_number_of_tokens(driving, page):
    for name, choice, tokens in (("stride", "16", "14×21"), ("size", "336", "21×32")):
        page.locator(f"#explore-{name} input").click()
        with driving.renewed(page, "explore-components"):
            page.get_by_role("option", name=choice, exact=True).click()
        told(page, "explore", f"{tokens} tokens")


def test_an_own_file_is_explored_in_its_own_pixels(driving, page, tmp_path):
    samples.china().resize((1500, 1000)).save(tmp_path / "own.jpg")
    with driving.renewed(page, "explore-image", "explore-components", "explore-similarity"):
        page.locator("#explore-image input[type=file]").set_input_files(tmp_path / "own.jpg")
    waits_for(page, 750, 500, within=0)
    for name, (x, y), (wide, _) in (
        ("image", (300, 700), (1500, 1000)),
        ("components", (1200, 600), fetched(driving, page, "explore-components").size),
    ):
        with driving.renewed(page, "explore-similarity"):
            driving.click_at(page, f"explore-{name}", x * wide / 1500, y * wide / 1500)
        waits_for(page, x, y, within=6)  # a pixel of the screen is three or more of the file


@pytest.fixture
def reading_slowly(monkeypatch):
    """Let whatever is explored or matched take a second, as a large model does."""
    from vitfeats.apps.demo import page as module

    for name in ("explore", "mutual"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real: time.sleep(1) or real(*given))


@pytest.mark.usefixtures("reading_slowly")
def test_of_what_is_asked_for_meanwhile_the_last_is_answered(driving, page):
    driving.sample(page, "explore-image", 1)
    page.wait_for_timeout(300)
    driving.sample(page, "explore-image", 3)
    grace = samples.grace_hopper()
    waits_for(page, grace.width / 2, grace.height / 2, within=0.1)
    for facet in ("query", "value"):
        page.locator("#explore-facet").get_by_text(facet).click()
        page.wait_for_timeout(300)
    told(page, "explore", "^value@11")
    with driving.renewed(page, "match-matches"):
        driving.opened(page, "Match")
    for number in (1, 2):
        driving.sample(page, "match-first", number)
        page.wait_for_timeout(300)
    page.wait_for_timeout(4000)
    width, height = fetched(driving, page, "match-matches").size
    assert width > 2.5 * height  # cat and coffee lie; the portraits, asked for before, are upright


@pytest.mark.usefixtures("reading_slowly")
def test_what_is_on_its_way_does_not_come_back_with_a_picture_that_was_removed(driving, page):
    driving.sample(page, "explore-image", 1)
    page.wait_for_timeout(400)
    page.locator("#explore-image [aria-label='Remove Image']").click()
    told(page, "explore", "^Upload a picture, or click a sample")
    page.wait_for_timeout(3000)
    told(page, "explore", "^Upload a picture, or click a sample")
    assert page.locator("#explore-components img").count() == 0


PAINTED = """async () => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 300, height: 200});
    canvas.getContext("2d").fillRect(200, 20, 60, 100);
    const png = await new Promise(done => canvas.toBlob(done, "image/png"));
    await navigator.clipboard.write([new ClipboardItem({"image/png": png})]);
}"""


def test_a_picture_is_pasted(driving, visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(PAINTED)
    page.locator("#explore-image [aria-label='Remove Image']").click()
    told(page, "explore", "^Upload a picture, or click a sample")
    page.locator("#explore-image [aria-label='Paste from clipboard']").click()
    told(page, "explore", "^key@11 of mini")
    waits_for(page, 150, 100, within=0)


def test_a_small_picture_is_clicked_where_it_is_seen(driving, page, tmp_path):
    samples.cat().resize((90, 60)).save(tmp_path / "small.png")
    with driving.renewed(page, "explore-image", "explore-similarity"):
        page.locator("#explore-image input[type=file]").set_input_files(tmp_path / "small.png")
    waits_for(page, 45, 30, within=0)
    driving.click_at(page, "explore-image", 20, 40)
    waits_for(page, 20, 40, within=2)


def test_without_a_picture_there_is_a_sentence(driving, page):
    page.locator("#explore-image [aria-label='Remove Image']").click()
    told(page, "explore", "^Upload a picture, or click a sample")
    assert page.locator("#explore-similarity img").count() == 0
    with driving.renewed(page, "explore-similarity"):
        driving.sample(page, "explore-image", 0)


# Match


def test_match_begins_with_the_middle(driving, page):
    with driving.renewed(page, "match-asked", "match-heat"):
        driving.opened(page, "Match")
    told(page, "match", r"^The middle of the first picture. token@2 of mini, .* Most similar: x .* \(cosine")


@pytest.mark.parametrize("clicked", ["first", "second"])
def test_a_point_of_either_picture_is_found_in_the_other(driving, page, tmp_path, clicked):
    points = {"first": EYE, "second": (2 * EYE[0], 2 * EYE[1])}  # the second picture is the first at twice the size
    cat = samples.cat()
    cat.save(tmp_path / "first.jpg")
    cat.resize((2 * cat.width, 2 * cat.height)).save(tmp_path / "second.jpg")
    with driving.renewed(page, "match-heat"):
        driving.opened(page, "Match")
    for name in points:
        with driving.renewed(page, f"match-{name}", "match-heat"):
            page.locator(f"#match-{name} input[type=file]").set_input_files(tmp_path / f"{name}.jpg")
    with driving.renewed(page, "match-asked", "match-heat"):
        driving.click_at(page, f"match-{clicked}", *points[clicked])
    searched = "second" if clicked == "first" else "first"
    found = re.search(
        r"Most similar: x (\d+), y (\d+)", told(page, "match", f"^In the {searched} picture. .* Most similar")
    )
    off = np.subtract([float(value) for value in found.groups()], points[searched])
    assert np.abs(off).max() < 16 * points[searched][0] / EYE[0]  # a token of the picture


def test_a_pair_of_samples_brings_both_pictures(driving, page):
    with driving.renewed(page, "match-heat"):
        driving.opened(page, "Match")
    with driving.renewed(page, "match-asked", "match-heat", "match-first", "match-second"):
        driving.sample(page, "match-first", 1)
    told(page, "match", "^The middle of the first picture")


def test_a_point_without_a_second_picture_is_answered_with_a_sentence(driving, page):
    with driving.renewed(page, "match-heat"):
        driving.opened(page, "Match")
    page.locator("#match-second [aria-label='Remove Image']").click()
    told(page, "match", "^Upload two pictures, or click a pair of samples")
    driving.click_at(page, "match-first", *EYE)
    page.get_by_text("expected two pictures, got one").first.wait_for()


def test_mutual_matches_are_drawn(driving, page):
    with driving.renewed(page, "match-heat", "match-matches"):
        driving.opened(page, "Match")
    few = fetched(driving, page, "match-matches")
    told_of = page.locator("#match-said p")
    told_of.filter(has_text=re.compile(r"\d+ mutual matches of \d+ and \d+ tokens; 40 drawn")).wait_for()
    assert few.width > few.height
    number(page, "match-most", 3)
    with driving.renewed(page, "match-matches"):
        page.locator("#match-go").click()
    told_of.filter(has_text="; 3 drawn").wait_for()


# Splice


def test_a_splice_shows_how_far_it_is_and_is_downloaded(driving, page):
    driving.opened(page, "Splice")
    assert page.locator("#splice-file").is_disabled()
    page.locator("#splice-preset").get_by_text("draft").click()
    with driving.renewed(page, "splice-result", "splice-curves"):
        page.locator("#splice-go").click()
    told(page, "splice", r"^Step \d+ of \d+, about \d+ s left")  # a picture is seen before the end
    with driving.renewed(page, "splice-result", "splice-curves"):
        told(page, "splice", r"^Done: \d+ steps in", timeout=120_000)
    made = downloaded(page, "splice-file")
    assert (made.format, made.size) == ("PNG", samples.astronaut().size)
    assert np.array_equal(made, fetched(driving, page, "splice-result"))
    assert np.asarray(made).std() > 20


def test_a_stopped_splice_ends_and_leaves_room_for_the_next(driving, page, served):
    driving.opened(page, "Splice")
    for _ in range(2):
        page.locator("#splice-go").click()
        told(page, "splice", "^Step")
        page.locator("#splice-stop").click()
        told(page, "splice", r"^Stopped. What was made so far is kept.$")
        is_idle(served)
        assert driving.source(page, "splice-result")
    told(page, "splice", "^Stopped")  # no news afterwards


def test_nobody_waits_for_the_splice_of_another(driving, visit, served):
    busy, other = visit(), visit()
    driving.opened(busy, "Splice")
    busy.locator("#splice-go").click()
    told(busy, "splice", "^Step")
    with driving.renewed(other, "explore-similarity"):
        driving.click_at(other, "explore-image", *EYE)
    with driving.renewed(other, "explore-components"):
        driving.sample(other, "explore-image", 1)
    driving.opened(other, "Splice")
    other.locator("#splice-go").click()
    assert busy.locator("#splice-told p", has_text=re.compile("^Step")).count() == 1
    busy.context.close()
    told(other, "splice", "^Step")  # it waited for the first, which ends with its page
    other.locator("#splice-stop").click()
    is_idle(served)


def test_closing_the_page_ends_its_splice(driving, page, served):
    driving.opened(page, "Splice")
    page.locator("#splice-go").click()
    told(page, "splice", "^Step")
    page.context.close()
    is_idle(served)


def test_a_splice_of_one_picture_asks_for_the_other(driving, page):
    driving.opened(page, "Splice")
    page.locator("#splice-appearance [aria-label='Remove Image']").click()
    page.locator("#splice-go").click()
    complained(page, "expected a picture for the appearance, got none")


# Style


def test_a_style_is_painted_and_downloaded(driving, page):
    driving.opened(page, "Style")
    content = np.asarray(fetched(driving, page, "style-content").resize((512, 342)), dtype=float)
    far = {}
    for strength in (1, 0):
        number(page, "style-strength", strength)
        with driving.renewed(page, "style-result"):
            page.locator("#style-go").click()
        told(page, "style", f"adaattn, strength {strength}, 512×342 pixels")
        made = downloaded(page, "style-file")
        assert (made.format, made.size) == ("PNG", (512, 342))
        far[strength] = np.abs(np.asarray(made, dtype=float) - content).mean()
    assert far[0] < far[1]


# Hyperfeatures


def test_hyperfeatures_come_as_a_grid_beside_the_mixing_weights(driving, page):
    with driving.renewed(page, "hyper-mixing"):
        driving.opened(page, "Hyperfeatures")
    for layer in ("up0.res2", "up1.res2"):
        page.locator("#hyper-layers").get_by_text(layer).click()  # without these two, two are left
    with driving.renewed(page, "hyper-result"):
        page.locator("#hyper-go").click()
    told(page, "hyper", r"^Done: 2 layers at 6 of 10 steps", timeout=120_000)
    made = downloaded(page, "hyper-file")
    assert made.format == "PNG"
    assert made.width > made.height


def test_no_layer_at_all_is_answered_with_a_sentence(driving, page):
    driving.opened(page, "Hyperfeatures")
    for number in range(4):
        page.locator("#hyper-layers label.selected").first.click()
        assert page.locator("#hyper-layers label.selected").count() == 3 - number
    page.locator("#hyper-go").click()
    complained(page, "expected at least one of the layers up0.res0.*, got none")


# Files that are none, or too large


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that claims a size, and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def broken_off() -> bytes:
    """Return the first half of a JPEG."""
    whole = BytesIO()
    samples.cat().save(whole, "JPEG")
    return whole.getvalue()[: whole.tell() // 2]


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "text.png": (lambda: b"not a picture", "expected a picture .*'text.png' is none of these"),
    "drawing.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "'drawing.png' is an SVG drawing"),
    "huge.png": (lambda: png_of(30_000, 30_000), "at most 64 million pixels.*'huge.png'"),
    "half.jpg": (broken_off, "'half.jpg' breaks off or is damaged"),
    "heavy.png": (lambda: bytes(600_000), "exceed the maximum allowed size.*heavy.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_taken_is_answered_with_a_sentence(driving, page, tmp_path: Path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content())
    page.locator("#explore-image input[type=file]").set_input_files(tmp_path / name)
    complained(page, words)
    with driving.renewed(page, "explore-image", "explore-components", "explore-similarity"):
        driving.sample(page, "explore-image", 1)
    with driving.renewed(page, "explore-similarity"):
        driving.click_at(page, "explore-image", *EYE)


# Visitors and screens


def test_two_visitors_see_their_own_pictures_and_points(driving, visit):
    one, two = visit(), visit()
    with driving.renewed(one, "explore-similarity"):
        driving.sample(one, "explore-image", 1)
    with driving.renewed(two, "explore-similarity"):
        driving.click_at(two, "explore-image", *EYE)
    seen = driving.source(two, "explore-similarity")
    with driving.renewed(one, "explore-similarity"):
        driving.click_at(one, "explore-image", 400, 300)
    waits_for(one, 400, 300, within=2)
    waits_for(two, *EYE, within=2)
    assert driving.source(two, "explore-similarity") == seen
    assert driving.source(one, "explore-similarity") != seen


@pytest.mark.parametrize("screen", [(390, 800), (820, 1180)])
def test_small_screens_do_not_scroll_sideways(driving, visit, screen):
    page = visit(viewport={"width": screen[0], "height": screen[1]})
    for tab in TABS:
        driving.opened(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab


def test_a_dark_page_opens_every_tab(driving, visit):
    page = visit("?__theme=dark")
    assert "dark" in page.locator("body").get_attribute("class")
    for tab in TABS:
        driving.opened(page, tab)
        assert page.get_by_role("tabpanel").filter(visible=True).count() == 1


# The browser itself


def test_without_a_browser_a_sentence_says_what_to_install(driving, monkeypatch, tmp_path):
    nothing = SimpleNamespace(chromium=SimpleNamespace(executable_path=str(tmp_path / "chromium")))
    monkeypatch.delenv("VITFEATS_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LookupError, match="no Chromium found: install it, or set VITFEATS_CHROMIUM"):
        driving.chromium(nothing)
