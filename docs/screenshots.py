"""Take the pictures of the demo for the documentation, in a real browser: ``python docs/screenshots.py [NAME …]``.

Writes docs/assets/NAME.jpg for every name of :data:`SHOTS`, each below 150 kB: three minutes on a CPU. Needs
``pip install "vitfeats[demo]" playwright`` and a Chromium; :func:`chromium` says where it is looked for.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vitfeats.apps.demo import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

ASSETS = Path(__file__).parent / "assets"
WIDTH, HEIGHT = 1280, 1900  # of the window: all of a tab is seen, so that no picture waits to be scrolled to
KEPT = 1000  # pixels of width of what is kept
EYE = (180, 110)  # (x, y) in pixels of the cat
SEAT = (270, 210)  # of the left stereo picture


def explore(page: Page) -> Image.Image:
    """Show the cat, and what looks like its left eye."""
    with renewed(page, "explore-similarity"):
        click_at(page, "explore-image", *EYE)
    return taken(page)


def match(page: Page) -> Image.Image:
    """Show a point of one stereo picture found in the other, and mutual matches."""
    with renewed(page, "match-heat", "match-matches"):
        opened(page, "Match")
    with renewed(page, "match-heat", "match-asked"):
        click_at(page, "match-first", *SEAT)
    return taken(page)


def splice(page: Page) -> Image.Image:
    """Show the astronaut in the colours of Grace Hopper's portrait."""
    opened(page, "Splice")
    page.locator("#splice-go").click()
    page.locator("#splice-told", has_text="Done").wait_for(timeout=600_000)
    return taken(page)


def style(page: Page) -> Image.Image:
    """Show a pagoda in the style of a pattern."""
    opened(page, "Style")
    with renewed(page, "style-result"):
        page.locator("#style-go").click()
    return taken(page)


def hyperfeatures(page: Page) -> Image.Image:
    """Show layers of the diffusion model along the inversion of the cat."""
    with renewed(page, "hyper-mixing"):
        opened(page, "Hyperfeatures")
    page.locator("#hyper-go").click()
    page.locator("#hyper-told", has_text="Done").wait_for(timeout=600_000)
    return taken(page)


SHOTS: dict[str, Callable[[Page], Image.Image]] = {
    "demo_explore": explore,
    "demo_match": match,
    "demo_splice": splice,
    "demo_style": style,
    "demo_hyperfeatures": hyperfeatures,
}


def chromium(playwright: Playwright) -> Browser:
    """Start $VITFEATS_CHROMIUM; or else a Chromium or Chrome on the path; or else the one that playwright brought.

    Raises:
        LookupError: If there is none.
    """
    named = os.environ.get("VITFEATS_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", playwright.chromium.executable_path]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise LookupError("no Chromium found: install it, or set VITFEATS_CHROMIUM to its path")
    # In containers, where everybody is root, its sandbox does not start; it shows nothing but the demo.
    return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


def opened(page: Page, tab: str) -> None:
    """Open a tab of the demo; on a narrow screen it may stand in a menu."""
    head = page.get_by_role("tab", name=tab)
    if not head.count():
        page.get_by_label("More tabs").click()
        head = page.locator(".overflow-dropdown").get_by_text(tab)
    head.click()


def sample(page: Page, name: str, number: int) -> None:
    """Take a sample for a picture of the demo."""
    page.locator(f"#{name}-samples button.gallery-item").nth(number).click()


@contextmanager
def renewed(page: Page, *names: str) -> Iterator[None]:
    """Wait at the end until each of these pictures of the demo is another one than at the beginning, and is loaded."""
    before = {name: source(page, name) for name in names}
    yield
    for name, old in before.items():
        page.wait_for_function(
            """([name, old]) => {
                const image = document.querySelector(name);
                return image && image.src !== old && image.complete && image.naturalWidth > 0;
            }""",
            arg=[f"#{name} img", old],
        )


def source(page: Page, name: str) -> str | None:
    """Return the address of a picture of the demo, or None where none is shown."""
    image = page.locator(f"#{name} img")
    return image.evaluate("image => image.src") if image.count() else None


def click_at(page: Page, name: str, x: float, y: float) -> None:
    """Click on a pixel (x, y) of a picture of the demo, whatever size it is shown at."""
    image = page.locator(f"#{name} img")
    position = image.evaluate(
        """(image, [x, y]) => {
            const {width, height} = image.getBoundingClientRect();
            const most = getComputedStyle(image).objectFit === "scale-down" ? 1 : Infinity;
            const scale = Math.min(most, width / image.naturalWidth, height / image.naturalHeight);
            const left = (width - scale * image.naturalWidth) / 2, top = (height - scale * image.naturalHeight) / 2;
            return {x: left + scale * x, y: top + scale * y};
        }""",
        [x, y],
    )
    image.click(position=position)


def taken(page: Page) -> Image.Image:
    """Return what is seen of the page, down to the end of its tab."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)  # what fades or slides has done so
    box = page.get_by_role("tabpanel").filter(visible=True).bounding_box()
    assert box is not None, "expected a tab to be open"
    height = min(HEIGHT, round(box["y"] + box["height"]))
    shot = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    return Image.open(BytesIO(shot)).convert("RGB").resize((KEPT, height * KEPT // WIDTH), Image.Resampling.LANCZOS)


def main(names: Sequence[str] = ()) -> None:
    """Take the pictures of these names; none is all."""
    from pictures import save  # lies beside this script, and is not needed by those who only import it
    from playwright.sync_api import sync_playwright

    with serving() as served, sync_playwright() as playwright, chromium(playwright) as browser:
        for name in names or SHOTS:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(served.url)
            page.locator("#explore-similarity img").wait_for()
            path = ASSETS / f"{name}.jpg"
            print(f"{path}: {save(SHOTS[name](page), path)} bytes", flush=True)
            page.close()


if __name__ == "__main__":
    main(sys.argv[1:])
