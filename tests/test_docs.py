"""The documentation runs: every python block, every link, the commands of the README, and the generated table."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import vitfeats as vf
from vitfeats import api, cli, testing
from vitfeats.cli import entry
from vitfeats.models import libraries

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GALLERY = sorted((ROOT / "docs" / "gallery").glob("*.md"))
LINKING = [*PAGES, *GALLERY, ROOT / "CHANGELOG.md", ROOT / "vitfeats" / "assets" / "README.md"]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the photographs that the pages name, and random weights in the place of published ones."""
    for name in ("cat", "coffee", "astronaut", "grace_hopper"):
        vf.samples.load(name)[0].save(tmp_path / f"{name}.jpg")
    create = timm.create_model

    def untrained(name: str, *args: Any, pretrained: bool = False, **options: Any) -> Any:
        torch.manual_seed(0)
        return create(name, *args, pretrained=False, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITFEATS_MODEL", raising=False)
    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr(libraries, "require_weights", lambda model, repository: None)
    # What a page registers or chooses must not outlive it.
    monkeypatch.setattr(api, "_rows", dict(api._rows))
    monkeypatch.setattr(api, "_default", [])
    monkeypatch.setattr(api, "_cache", type(api._cache)())
    yield tmp_path
    torch.set_grad_enabled(True)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line, code) of the fenced blocks of one language."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(2)), found[2]) for found in BLOCK.finditer(text) if found[1] == language]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made by Python-Markdown."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain} | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))


def page_text(name: str) -> str:
    """Return the text of a page of docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def generator() -> Any:
    """Return docs/generate.py as a module."""
    return script("generate")


def script(name: str) -> Any:
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page: Path, page_folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for line, code in blocks(page, "python"):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_point_to_something(page: Path) -> None:
    missing = []
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def test_the_test_of_links_sees_a_missing_file_and_a_missing_anchor(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n\n[a](#one-thing) [b](#another) [c](missing.md)\n")
    assert anchors(page) == {"one-thing"}
    with pytest.raises(AssertionError, match=r"another.*missing"):
        test_links_point_to_something(page)


def test_pictures_are_small() -> None:
    sizes = {picture: picture.stat().st_size for picture in (ROOT / "docs" / "assets").rglob("*.*")}
    assert {picture.parent.name for picture in sizes} == {"assets", "gallery"}
    assert all(size < 150_000 for size in sizes.values()), sizes


def test_every_picture_is_shown_and_made() -> None:
    shown = set(re.findall(r"\(assets/(\w+)\.jpg\)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert shown == {picture.stem for picture in (ROOT / "docs" / "assets").glob("*.jpg")}
    assert shown == set(script("pictures").PICTURES) | set(script("screenshots").SHOTS)


def test_every_picture_of_the_gallery_is_shown_and_made() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in GALLERY if page.stem != "index")
    shown = re.findall(r"\(\.\./assets/gallery/(\w+)\.jpg\)", text)
    assert sorted(shown) == sorted(picture.stem for picture in (ROOT / "docs" / "assets" / "gallery").iterdir())
    assert sorted(shown) == sorted(name for example in script("gallery").examples() for name in example.pictures)


def test_readme_has_both_commands() -> None:
    commands = [code.strip() for _, code in blocks(ROOT / "README.md", "bash")]
    assert commands[0] == "python -m pip install -e . && vitfeats pca --sample portraits --out pca.png"
    development = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Development")[2]
    assert development.lstrip().startswith('```bash\npython -m pip install -e ".[dev]" && pytest\n```')


def test_readme_quick_start_has_ten_lines() -> None:
    (_, code), *others = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    assert not others


def test_table_of_models_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert generator().main(["--check"]) == 0, capsys.readouterr().err


def test_check_of_the_table_sees_a_stale_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = generator()
    page = tmp_path / "models.md"
    page.write_text(f"# Models\n{module.BEGIN}\nold\n{module.END}\nrest\n")
    monkeypatch.setattr(module, "PAGE", page)
    assert module.main(["--check"]) == 1
    assert "python docs/generate.py" in capsys.readouterr().err
    assert "old" in page.read_text()
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("# Models\n")
    assert text.endswith("\nrest\n")
    assert all(f"`{card.name}`" in text for card in vf.list_models())


def test_every_public_name_is_in_the_api_page() -> None:
    listed = re.findall(r"^::: vitfeats\.(\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert set(vf.__all__) <= set(listed)


def test_helpers_for_authors_of_models_are_in_the_api_page() -> None:
    listed = set(
        re.findall(r"^::: vitfeats\.(\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {"api.Row", "api.plugin_failures", "extractors.conv.ConvExtractor", "testing.conformance"} <= listed
    assert {"matching.top_k", "matching.transport_plan", "testing.assert_passes", "testing.CHECKS"} <= listed


def test_every_conformance_check_is_explained() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert not [check for check in testing.CHECKS if f"`{check}`" not in page]


def test_every_error_is_in_troubleshooting() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    errors = {name for name in vf.__all__ if name.endswith("Error")} - {"VitFeatsError"}
    assert errors == set(re.findall(r"^## (\w+Error)$", page, re.MULTILINE))


def test_every_sample_in_a_picture_is_credited() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for shown in ("astronaut", "grace_hopper", "cat", "coffee"):
        licence = vf.samples.LICENCES[shown]
        name = licence.credit.partition(" (")[0]
        assert name in pages
        assert licence.licence in pages


def test_every_sample_in_a_picture_of_the_demo_is_credited() -> None:
    offered = pytest.importorskip("vitfeats.apps.demo.page", exc_type=ImportError)
    demo = " ".join(page_text("demo").split())
    for shown in (*offered.PHOTOGRAPHS, *(name for pair in offered.PAIRS[1:] for name in pair), "stereo"):
        licence = vf.samples.LICENCES[shown]
        author = re.split(r"[,(]", licence.credit)[0].strip()
        assert author in demo, shown
        assert licence.licence in demo, shown


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"^ +- .+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(navigation) == sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == vf.__version__
    assert (cited["title"], cited["license"], cited["authors"]) == (
        project["name"],
        project["license"],
        project["authors"],
    )
    page = page_text("citation")
    assert f"version = {{{vf.__version__}}}" in page
    assert cited["authors"][0]["name"] in page


def test_every_extra_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = page_text("install")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("measured", "quoted"),
    [
        ("key@5: timm forward_intermediates / ours", "2.16"),
        ("key@5: transformers output_hidden_states / ours", "2.30"),
        ("three taps in one call / the deepest alone", "1.03"),
        ("match_mutual: scikit-learn NearestNeighbors both ways / ours", "1.91"),
        ("match_mutual: faiss IndexFlatIP both ways / ours", "1.12"),
        ("top_k(10): faiss IndexFlatIP / ours", "0.70"),
        ("log_bin: the loop over pixels / ours", "12.3"),
        ("import vitfeats: import torch / ours", "276"),
    ],
)
def test_performance_quotes_the_benchmarks_as_they_stand(measured: str, quoted: str) -> None:
    found = re.search(rf"^\| {re.escape(measured)} \| ([\d.]+) \|", page_text("benchmarks"), re.MULTILINE)
    assert found is not None
    assert float(quoted) == pytest.approx(float(found[1]), rel=0.005)
    assert re.search(rf"\b{re.escape(quoted)}\b", page_text("performance"))


def test_every_command_line_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(entry, "RUN", dict.fromkeys(entry.RUN, lambda command: asked.append(command) or 0))
    code = "".join(
        code for page in (*PAGES, *GALLERY) for kind in ("bash", "text", "console") for _, code in blocks(page, kind)
    )
    # Also what a prompt or another command stands before, and what goes on in the next line.
    lines = re.findall(r"(?:^|^\$ |&& )(vitfeats .*)$", code.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) > 50
    for line in lines:
        _, *arguments = shlex.split(line, comments=True)
        assert cli.main(arguments) == 0, line
    assert len(asked) == len(lines)


@pytest.mark.slow
def test_command_lines_run(page_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, code in blocks(ROOT / "docs" / "cli.md", "bash") for line in code.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("vitfeats ")]
    assert len(commands) > 5
    for _, *arguments in commands:
        assert cli.main(arguments) == 0, (arguments, capsys.readouterr().err)
        for name in (arguments[position + 1] for position, word in enumerate(arguments) if word == "--out"):
            assert (page_folder / name).exists()
