"""The gallery of the documentation: its generator, its pages, and the notebook."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfeats import api
from vitfeats.samples import LICENCES

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Any:
    """docs/gallery.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("gallery")


@pytest.fixture
def copy(gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the examples and of their pages, which the generator takes for the repository's."""
    for name, folder in (("EXAMPLES", EXAMPLES), ("PAGES", ROOT / "docs" / "gallery")):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(gallery, name, tmp_path / folder.name)
    return tmp_path


@pytest.fixture
def alone(gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the only example, still to be written, and beside it an empty folder for pictures."""
    monkeypatch.setattr(gallery, "EXAMPLES", tmp_path)
    monkeypatch.setattr(gallery, "PICTURES", tmp_path / "assets")
    monkeypatch.setattr(gallery, "ORDER", {"alone": gallery.Place(("matching.md",))})
    return tmp_path / "alone.py"


def stored(*cells: dict[str, Any]) -> str:
    """Return a notebook with these cells as it is stored."""
    return json.dumps({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda example: example.stem)
def test_every_example_has_a_page_with_its_source_and_its_command(example: Path) -> None:
    page = (ROOT / "docs" / "gallery" / f"{example.stem}.md").read_text(encoding="utf-8")
    assert f"```bash\npython examples/{example.name} --out " in page
    source = example.read_text(encoding="utf-8")
    assert page.count(f'\n```py title="examples/{example.name}"\n{source}```\n') == 1
    # Blocks marked python are run by the tests of the pages; what examples do takes too long for that.
    assert "```python" not in page


def test_the_overview_links_every_page_under_its_title() -> None:
    pages = ROOT / "docs" / "gallery"
    overview = (pages / "index.md").read_text(encoding="utf-8")
    others = [page for page in pages.glob("*.md") if page.name != "index.md"]
    assert len(others) == len(SCRIPTS) + 2  # the notebook and the plug-in
    for page in others:
        heading = page.read_text(encoding="utf-8").partition("\n# ")[2].partition("\n")[0]
        assert 10 < len(heading) < 65, "a title has to fit below a small picture"
        assert f"}} {heading}]({page.name})\n" in overview


def test_the_pages_are_fresh(gallery: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gallery.main(["--check"]) == 0, capsys.readouterr().err


def test_check_sees_a_page_that_is_stale_missing_or_left_over(
    gallery: Any, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = copy / "gallery"
    fresh = {page.name: page.read_text() for page in pages.iterdir()}
    assert gallery.main(["--check"]) == 0
    for spoil in (
        lambda: (pages / "pca.md").write_text("old"),
        lambda: (pages / "pca.md").unlink(),
        lambda: (pages / "gone.md").write_text("of an example that is no more"),
    ):
        spoil()
        spoilt = {page.name: page.read_text() for page in pages.iterdir()}
        assert gallery.main(["--check"]) == 1
        said = capsys.readouterr().err
        assert "pca.md" in said or "gone.md" in said
        assert "run: python docs/gallery.py" in said
        assert {page.name: page.read_text() for page in pages.iterdir()} == spoilt
        assert gallery.main([]) == 0
        assert {page.name: page.read_text() for page in pages.iterdir()} == fresh


def test_an_edited_example_makes_its_page_stale(gallery: Any, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, page in (("pca.py", "pca.md"), ("plugin/pyproject.toml", "plugin.md")):
        edited = copy / "examples" / path
        edited.write_text(edited.read_text() + "# one line more\n")
        assert gallery.main(["--check"]) == 1
        assert f"stale in docs/gallery: {page};" in capsys.readouterr().err
        gallery.main([])


def test_an_example_without_a_place_in_the_overview_fails_the_check(gallery: Any, copy: Path) -> None:
    new = copy / "examples" / "new_one.py"
    new.write_text('"""Something new."""\n')
    with pytest.raises(SystemExit, match=r"expected ORDER of docs/gallery.py to name every example.*: new_one"):
        gallery.main(["--check"])
    new.unlink()
    (copy / "examples" / "pca.py").unlink()
    with pytest.raises(SystemExit, match=r"and no other; see to: pca"):
        gallery.main(["--check"])


def test_a_docstring_becomes_title_text_command_and_notes(gallery: Any) -> None:
    lines = "    python examples/a.py --out a.png\n    python examples/a.py\n"
    source = f'"""Does it\nwork? It does.\n\nMore.\n\n{lines}\nA note.\n"""\nx = 1\n'
    title, text, commands, notes = gallery.described(source, Path("a.py"))
    assert title == "Does it work?"
    assert text == ["It does.", "More."]
    assert commands == ["python examples/a.py --out a.png", "python examples/a.py"]
    assert notes == ["A note."]
    assert gallery.described('"""One sentence."""', Path("a.py")) == ("One sentence", [], [], [])
    assert gallery.described('"""One.\n\n    python examples/a.py\n"""', Path("a.py"))[2] == ["python examples/a.py"]
    for source in ("x = 1\n", '"""No sentence"""\n'):
        with pytest.raises(SystemExit, match="docstring at the head of 'a.py' whose first sentence can be a title"):
            gallery.described(source, Path("a.py"))


@pytest.mark.parametrize("name", LICENCES)
def test_a_photograph_that_a_source_names_is_credited(gallery: Any, name: str) -> None:
    for source in (f"vf.samples.{name}()", f'vf.samples.load("{name}")'):
        assert gallery.credit(source) == f"*Photograph: {LICENCES[name].credit}, {LICENCES[name].licence}.*"
    assert gallery.credit(f"# about the {name}") == ""


def test_pairs_are_credited(gallery: Any) -> None:
    both = gallery.credit("vf.samples.portrait_pair()")
    assert both.startswith("*Photographs: ")
    assert LICENCES["astronaut"].credit in both
    assert LICENCES["grace_hopper"].credit in both
    assert LICENCES["stereo"].credit in gallery.credit("pair = StereoPair()")


def test_a_notebook_becomes_text_code_and_pictures(gallery: Any, tmp_path: Path) -> None:
    notebook = tmp_path / "walk.ipynb"
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# A walk\n", "\n", "Along the river."]},
        {"cell_type": "markdown", "id": "b", "metadata": {}, "source": "## The bridge\n\nIt is old."},
        {
            "cell_type": "code",
            "id": "c",
            "metadata": {"tags": ["picture"]},
            "source": "vf.samples.cat()",
            "outputs": [],
        },
        {"cell_type": "code", "id": "d", "metadata": {}, "source": "x = 1", "outputs": []},
    ]
    notebook.write_text(stored(*cells))
    example = gallery.tour(notebook)
    assert (example.title, example.pictures) == ("A walk", ("walk_c",))
    order = (
        *("Along the river.", "## The bridge\n\nIt is old.", "```py\nvf.samples.cat()\n```"),
        *("![The bridge](../assets/gallery/walk_c.jpg)", "```py\nx = 1\n```", LICENCES["cat"].credit),
    )
    places = [example.body.index(part) for part in order]
    assert places == sorted(places)
    assert example.body.count("assets/gallery") == 1


@pytest.mark.parametrize("stale", [{"outputs": [{"output_type": "stream"}]}, {"outputs": [], "execution_count": 3}])
def test_a_notebook_stored_with_outputs_is_refused(gallery: Any, tmp_path: Path, stale: dict[str, Any]) -> None:
    notebook = tmp_path / "tour.ipynb"
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "1 + 1", "outputs": [], "execution_count": None}
    notebook.write_text(stored(cell))
    assert len(gallery.cells_of(notebook)) == 1
    notebook.write_text(stored(cell, {**cell, **stale}))
    with pytest.raises(SystemExit, match=r"expected 'tour.ipynb' to be stored without outputs; clear them"):
        gallery.cells_of(notebook)


def test_a_cell_that_shows_no_picture_is_refused(gallery: Any) -> None:
    with pytest.raises(SystemExit, match=r"expected the cell 'pca', which is tagged with 'picture', to show one"):
        gallery.picture_of({"id": "pca", "outputs": [{"output_type": "stream", "text": "no"}]})


def test_pictures_are_made_by_running_the_example(gallery: Any, alone: Path) -> None:
    alone.write_text(
        "import sys\nfrom PIL import Image\nassert sys.argv[1] == '--out'\n"
        "Image.linear_gradient('L').resize((2400, 600)).save(sys.argv[2])\n"
    )
    assert gallery.main(["--pictures", "alone"]) == 0
    (path,) = (alone.parent / "assets").iterdir()
    assert path.name == "alone.jpg"
    with Image.open(path) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (1200, 300))
        shades = np.asarray(picture)
        assert shades[5].max() < 20
        assert shades[295].min() > 235


def test_an_example_that_fails_makes_no_picture(gallery: Any, alone: Path) -> None:
    alone.write_text("raise SystemExit(3)\n")
    with pytest.raises(gallery.subprocess.CalledProcessError, match="status 3"):
        gallery.main(["--pictures"])
    assert not list((alone.parent / "assets").iterdir())


def test_a_picture_of_an_unknown_name_is_refused(gallery: Any) -> None:
    with pytest.raises(SystemExit, match=r"expected names out of tour, pca, .*; got pcas"):
        gallery.main(["--pictures", "pca", "pcas"])


def test_the_plugin_draws_its_picture(gallery: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_rows", dict(api._rows))  # what is registered here must not outlive the test
    monkeypatch.setattr(api, "_cache", type(api._cache)())
    ((name, picture),) = gallery.drawn("plugin")
    assert name == "plugin"
    colours = picture.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 1000


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_kernel_without_a_network_and_shows_its_pictures(
    gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITFEATS_MODEL", raising=False)
    for cache in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(cache, str(tmp_path / "empty"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there
    made = dict(gallery.drawn("tour"))
    example = gallery.tour(EXAMPLES / "tour.ipynb")
    assert tuple(made) == example.pictures
    assert len(made) >= 5
    for picture in made.values():
        assert min(picture.size) > 200
        assert any(low < high for low, high in picture.convert("RGB").getextrema())
