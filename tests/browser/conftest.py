"""A demo that is served, and visitors with a real browser, whose pages may not complain."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
from synthetic import as_users_run

UPLOAD_MB = 0.5
ROOT = Path(__file__).parents[2]
# Gradio asks how far an upload is, which is unknown once it is whole; small files mostly are by then.
HARMLESS = re.compile(r"/upload_progress\?|^Response \(")


@pytest.fixture(scope="session")
def driving() -> ModuleType:
    """docs/screenshots.py: how to find a browser, and how to use the page."""
    pytest.importorskip("gradio", reason='no gradio found: pip install "vitfeats[demo]"')
    spec = importlib.util.spec_from_file_location("docs_screenshots", ROOT / "docs" / "screenshots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def served(driving: ModuleType) -> Iterator[Any]:
    """A demo that takes small uploads, as users run it."""
    from vitfeats.configs import DemoConfig

    with as_users_run(), driving.serving(DemoConfig(upload_mb=UPLOAD_MB)) as served:
        yield served


@pytest.fixture(scope="session")
def browser(driving: ModuleType, served: Any) -> Iterator[Any]:
    """A browser; started after the demo, which must not find the event loop of playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright found: pip install playwright")
    with playwright.sync_playwright() as started:
        try:
            browser = driving.chromium(started)
        except LookupError as error:
            pytest.skip(str(error))
        with browser:
            yield browser


@pytest.fixture
def visit(browser: Any, served: Any) -> Iterator[Callable[..., Any]]:
    """Open the demo as somebody new, with options of the context; at the end no page may have complained."""
    contexts, complaints, hosts = [], [], set()

    def complain(said: str) -> None:
        if not HARMLESS.search(said):
            complaints.append(said)

    def visit(query: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1900}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(urlsplit(request.url)[:2]))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("console", lambda m: complain(f"{m.text} ({m.location['url']})") if m.type == "error" else None)
        page.goto(served.url + query)
        page.locator("#explore-similarity img").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints
    assert {host for scheme, host in hosts if scheme not in ("data", "blob")} <= {urlsplit(served.url).netloc}


@pytest.fixture
def page(visit: Callable[..., Any]) -> Any:
    """The demo, opened by one visitor."""
    return visit()
