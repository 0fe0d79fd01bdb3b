"""The built documentation: every link leads somewhere, and no page loads anything from another host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
LOADED = {
    ("img", "src"),
    ("script", "src"),
    ("source", "src"),
    ("video", "src"),
    ("audio", "src"),
    ("iframe", "src"),
    ("embed", "src"),
    ("object", "data"),
    ("link", "href"),
}
"""Where HTML names what a browser fetches by itself."""
HOST = re.compile(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}")
IN_STYLE = re.compile(r"""url\(\s*["']?(.*?)["']?\s*\)|@import\s+["'](.*?)["']""")


class Page(HTMLParser):
    """What a page names, and what can be named in it.

    Attributes:
        anchors: Names of places in it.
        links: Where its links lead.
        loads: What a browser fetches to show it.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self._styles = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._styles = tag == "style"
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value or "")
            elif (tag, name) == ("a", "href"):
                self.links.append(value or "")
            elif (tag, name) in LOADED:
                self.loads.append(value or "")
            elif name == "srcset":
                self.loads += [candidate.split()[0] for candidate in (value or "").split(",") if candidate.strip()]
            elif name == "style":
                self.loads += named_in_style(value or "")

    def handle_data(self, data: str) -> None:
        if self._styles:
            self.loads += named_in_style(data)

    def handle_endtag(self, tag: str) -> None:
        self._styles = False


def named_in_style(text: str) -> list[str]:
    """Return the addresses in a style sheet."""
    return [found[1] or found[2] or "" for found in IN_STYLE.finditer(text)]


def complaints(site: Path) -> tuple[list[str], dict[str, int]]:
    """Return what is wrong with the links of a built site, and how much there is of each kind."""
    pages = {file.resolve(): Page(file) for file in sorted(site.rglob("*.html"))}
    wrong: list[str] = []
    count = {"pages": len(pages), "internal links": 0, "external links": 0, "files loaded": 0, "pictures": 0}
    count["pictures"] = sum(len(list(site.rglob(f"*.{kind}"))) for kind in ("jpg", "png", "svg", "webp", "gif"))
    for file, page in pages.items():
        name = file.relative_to(site.resolve()).as_posix()
        for address in page.links:
            external = is_external(address)
            count["external links" if external else "internal links"] += 1
            reason = outside(address) if external else inside(address, file, site, pages)
            wrong += [f"{name}: {address!r} {reason}"] if reason else []
        for address in page.loads:
            count["files loaded"] += 1
            reason = "is loaded from elsewhere" if is_external(address) else inside(address, file, site, pages)
            wrong += [f"{name}: {address!r} {reason}"] if reason else []
    for file in sorted(site.rglob("*.css")):
        for address in named_in_style(file.read_text(encoding="utf-8")):
            if is_external(address):
                wrong.append(f"{file.relative_to(site).as_posix()}: {address!r} is loaded from elsewhere")
    return wrong, count


def is_external(address: str) -> bool:
    """Return whether an address names a host or a scheme; what it carries in itself (``data:``) is no host's."""
    parts = urlsplit(address)
    return parts.scheme != "data" and bool(parts.scheme or parts.netloc)


def outside(address: str) -> str:
    """Return what is wrong with an address of another host, as far as it can be seen without asking it."""
    parts = urlsplit(address)
    if parts.scheme != "https":
        return "is not https"
    return "" if HOST.fullmatch(parts.hostname or "") else "has no well-formed host"


def inside(address: str, file: Path, site: Path, pages: dict[Path, Page]) -> str:
    """Return what is wrong with an address within the site."""
    if address.startswith("data:"):
        return ""
    parts = urlsplit(address)
    path = unquote(parts.path)
    target = file if not path else (site / path.lstrip("/") if path.startswith("/") else file.parent / path)
    target = (target / "index.html" if target.is_dir() else target).resolve()
    if not target.is_file() or not target.is_relative_to(site.resolve()):
        return "is not there"
    anchor = unquote(parts.fragment)
    if anchor and anchor not in (pages[target].anchors if target in pages else set()):
        return "names a place that is not there"
    return ""


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    wrong, count = complaints(tmp_path / "site")
    print(count)
    assert not wrong, "\n".join(wrong)
    assert count["pages"] > len(list((ROOT / "docs").glob("*.md")))  # and the page for what is not found
    assert min(count.values()) > 0


def written(site: Path, body: str, *, style: str = "") -> Path:
    """Write a site of two pages that is whole but for what is passed."""
    (site / "other").mkdir(parents=True)
    (site / "assets").mkdir()
    (site / "assets" / "one.jpg").write_bytes(b"")
    (site / "assets" / "style.css").write_text(f"a {{ background: url(data:image/gif;base64,AA) }} {style}")
    (site / "other" / "index.html").write_text('<h1 id="top">Other</h1> <a href="..">home</a>')
    (site / "index.html").write_text(
        '<link rel="stylesheet" href="assets/style.css"> <img src="assets/one.jpg"> <a name="here"></a>'
        '<a href="other/#top">a</a> <a href="other/">b</a> <a href="#here">c</a> <a href="#">d</a>'
        f'<a href="https://example.org/x#y">e</a> <a href="/other/?q=1#top">f</a> {body}'
    )
    return site


def test_a_whole_site_has_no_complaints(tmp_path: Path) -> None:
    wrong, count = complaints(written(tmp_path / "site", ""))
    assert wrong == []
    assert count == {"pages": 2, "internal links": 6, "external links": 1, "files loaded": 2, "pictures": 1}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('<a href="missing/">x</a>', "'missing/' is not there"),
        ('<a href="other/#bottom">x</a>', "'other/#bottom' names a place that is not there"),
        ('<a href="#there">x</a>', "'#there' names a place that is not there"),
        ('<a href="assets/one.jpg#top">x</a>', "'assets/one.jpg#top' names a place that is not there"),
        ('<a href="../outside.html">x</a>', "'../outside.html' is not there"),
        ('<a href="http://example.org">x</a>', "'http://example.org' is not https"),
        ('<a href="https://exa_mple">x</a>', "'https://exa_mple' has no well-formed host"),
        ('<a href="https://">x</a>', "'https://' has no well-formed host"),
        ('<img src="assets/two.jpg">', "'assets/two.jpg' is not there"),
        ('<img srcset="assets/one.jpg 1x, assets/two.jpg 2x">', "'assets/two.jpg' is not there"),
        ('<img src="https://example.org/one.jpg">', "'https://example.org/one.jpg' is loaded from elsewhere"),
        ('<script src="//example.org/a.js"></script>', "'//example.org/a.js' is loaded from elsewhere"),
        ('<link rel="stylesheet" href="https://example.org/a.css">', "'https://example.org/a.css' is loaded"),
        ("<style>b { src: url('https://example.org/a.woff') }</style>", "'https://example.org/a.woff' is loaded"),
        ('<p style="background: url(https://example.org/a.png)">', "'https://example.org/a.png' is loaded"),
    ],
)  # fmt: skip
def test_each_broken_link_is_named_with_its_page(tmp_path: Path, body: str, complaint: str) -> None:
    (tmp_path / "outside.html").write_text("not of this site")
    (wrong,) = complaints(written(tmp_path / "site", body))[0]
    assert wrong.startswith(f"index.html: {complaint}")


@pytest.mark.parametrize("style", ['@import "https://example.org/a.css";', "b { src: url(//example.org/a.woff2) }"])
def test_a_style_sheet_that_loads_from_elsewhere_is_named(tmp_path: Path, style: str) -> None:
    (wrong,) = complaints(written(tmp_path / "site", "", style=style))[0]
    assert re.fullmatch(r"assets/style\.css: '.*example\.org/a\..*' is loaded from elsewhere", wrong)
