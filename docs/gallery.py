"""Make the gallery of the documentation from the examples: ``python docs/gallery.py``.

Every script of examples/, the plug-in and the notebook become a page of docs/gallery/, and index.md shows them all.
``--check`` changes nothing and exits 1 when a page is stale, missing or left over. ``--pictures [NAME …]`` runs the
examples of these names, or all, and writes docs/assets/gallery/NAME.jpg, each below 150 kB: ten minutes on a CPU.
"""

import ast
import base64
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from vitfeats.samples import LICENCES

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
HOW_TO = ROOT / "docs"
PAGES = ROOT / "docs" / "gallery"
PICTURES = ROOT / "docs" / "assets" / "gallery"
PLUGIN, TOUR = "plugin", "tour"
MOST_PIXELS = 1200  # of the longer side of a picture
WRITTEN = "<!-- written by docs/gallery.py -->\n\n"


@dataclass(frozen=True)
class Place:
    """What cannot be read from an example.

    Attributes:
        pages: The how-to pages that fit it.
        crop: The part of its picture that the thumbnail shows, as a position of CSS.
    """

    pages: tuple[str, ...]
    crop: str = "right bottom"


ORDER = {
    TOUR: Place(("quickstart.md", "concepts.md")),
    "pca": Place(("components.md", "layers.md")),
    "match_stereo": Place(("matching.md",)),
    "carry_points": Place(("matching.md", "pooling.md")),
    "hyperfeatures": Place(("diffusion.md", "matching.md"), crop="center"),
    "cosegment": Place(("cosegmentation.md",)),
    "splice": Place(("splicing.md", "measures.md")),
    "splice_custom_loss": Place(("splicing.md", "losses.md")),
    "custom_loss": Place(("losses.md",)),
    "style_losses": Place(("style_transfer.md", "losses.md", "convolutional.md")),
    "invert": Place(("inversion.md",), crop="left"),
    "pretrain": Place(("pretraining.md",), crop="top"),
    "own_module": Place(("own_model.md",)),
    PLUGIN: Place(("plugins.md", "conformance.md")),
}
"""The examples in the order of the overview."""


@dataclass(frozen=True)
class Example:
    """What a page shows.

    Attributes:
        name: Of the page and the picture.
        title: Heading of the page and of its thumbnail.
        body: The page between the title and the links, as Markdown.
        pictures: The names of its pictures; the first is the thumbnail.
    """

    name: str
    title: str
    body: str
    pictures: tuple[str, ...]


def script(path: Path) -> Example:
    """Return the page of a script: its docstring, its picture, how to run it, and its source."""
    source = path.read_text(encoding="utf-8")
    title, text, commands, notes = described(source, path)
    run = [_fenced("\n".join(commands), "bash"), *notes]
    body = [_picture(path.stem, title), credit(source), *text, "## Run it", *run, "## The script", _code(path)]
    return Example(path.stem, title, "\n\n".join(filter(None, body)), (path.stem,))


def plugin(folder: Path) -> Example:
    """Return the page of the plug-in: all that it is made of."""
    (module,) = folder.glob("vitfeats_*/__init__.py")
    title, text, _, _ = described(module.read_text(encoding="utf-8"), module)
    shown = "The principal components of `out@blocks`, at 320 pixels and stride 4."
    run = f"python -m pip install ./examples/{folder.name} && vitfeats models 'hog*'"
    parts = [
        *(_picture(folder.name, title), f"*{shown} {_credits(['coffee'])}*", *text),
        *("## Run it", _fenced(run, "bash"), "## The package", _code(folder / "pyproject.toml"), _code(module)),
        *("## Its tests", _code(folder / "tests" / "test_conformance.py")),
    ]
    return Example(folder.name, title, "\n\n".join(parts), (folder.name,))


def tour(path: Path) -> Example:
    """Return the page of the notebook: its cells, and the pictures of those that are tagged with "picture"."""
    cells = cells_of(path)
    heading, _, first = _text_of(cells[0]).partition("\n")
    code = "\n".join(_text_of(cell) for cell in cells if cell["cell_type"] == "code")
    run = (
        f"The notebook is `examples/{path.name}` in the repository and runs from the first cell to the last: "
        f"`pip install jupyterlab`, then `jupyter lab examples/{path.name}`. What its cells print is left out here."
    )
    parts = [run, first.strip()]
    section = ""
    for cell in cells[1:]:
        text = _text_of(cell)
        section = text.partition("\n")[0].removeprefix("## ") if text.startswith("## ") else section
        parts.append(text if cell["cell_type"] == "markdown" else _fenced(text, "py"))
        if is_shown(cell):
            parts.append(_picture(f"{path.stem}_{cell['id']}", section))
    pictures = tuple(f"{path.stem}_{cell['id']}" for cell in cells if is_shown(cell))
    return Example(path.stem, heading.removeprefix("# "), "\n\n".join([*parts, credit(code)]), pictures)


def cells_of(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook.

    Raises:
        SystemExit: If it is stored with outputs: they would be stale, and large.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    if any(cell.get("outputs") or cell.get("execution_count") for cell in cells):
        raise SystemExit(f"expected '{path.name}' to be stored without outputs; clear them in all cells and save it")
    return cells


def is_shown(cell: dict[str, Any]) -> bool:
    """Return whether a cell of the notebook is tagged with "picture"."""
    return "picture" in cell["metadata"].get("tags", ())


def described(source: str, path: Path) -> tuple[str, list[str], list[str], list[str]]:
    """Return (title, paragraphs, commands, paragraphs after the commands) of a module's docstring.

    Raises:
        SystemExit: If it has none that begins with a sentence.
    """
    text = ast.get_docstring(ast.parse(source)) or ""
    found = re.match(r"(.+?[.?!])(?:\n\n|\s|$)", text, re.DOTALL)
    if not found:
        raise SystemExit(f"expected a docstring at the head of '{path.name}' whose first sentence can be a title")
    title = found[1].replace("\n", " ")
    paragraphs = [part for part in text[found.end() :].split("\n\n") if part]
    # Not by their indent, which get_docstring takes away where nothing else follows the first line.
    commands = [part for part in paragraphs if part.lstrip().startswith("python examples/")]
    split = paragraphs.index(commands[0]) if commands else len(paragraphs)
    before, after = paragraphs[:split], [part for part in paragraphs[split:] if part not in commands]
    return title.removesuffix("."), before, [line.strip() for part in commands for line in part.splitlines()], after


def credit(source: str) -> str:
    """Return the credits of the photographs that a source names, as a line of Markdown; "" if it names none."""
    named = set(re.findall(r'samples\.(\w+)\(|"(\w+)"', source))
    words = {word for pair in named for word in pair}
    if "portrait_pair" in words:
        words |= {"astronaut", "grace_hopper"}
    if "StereoPair(" in source:
        words.add("stereo")
    shown = [name for name in LICENCES if name in words]
    return f"*{_credits(shown)}*" if shown else ""


def examples() -> Iterator[Example]:
    """Yield the examples in the order of the overview.

    Raises:
        SystemExit: If ORDER does not name each of them once.
    """
    found = {path.stem for path in EXAMPLES.glob("*.py")} | {path.stem for path in EXAMPLES.glob("*.ipynb")}
    found |= {path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")}
    if found != set(ORDER):
        differs = ", ".join(sorted(found ^ set(ORDER)))
        raise SystemExit(f"expected ORDER of docs/gallery.py to name every example, and no other; see to: {differs}")
    for name in ORDER:
        if name == TOUR:
            yield tour(EXAMPLES / f"{name}.ipynb")
        elif name == PLUGIN:
            yield plugin(EXAMPLES / name)
        else:
            yield script(EXAMPLES / f"{name}.py")


def wanted() -> dict[str, str]:
    """Return the text of every page by the name of its file."""
    shown = list(examples())
    pages = {f"{example.name}.md": _page(example) for example in shown}
    return pages | {"index.md": _overview(shown)}


def main(arguments: Sequence[str] = ()) -> int:
    """Rewrite the pages, check them, or make pictures; return the exit code."""
    if arguments[:1] == ["--pictures"]:
        make_pictures(arguments[1:])
        return 0
    pages = wanted()
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    stale = sorted(name for name in pages.keys() | there.keys() if pages.get(name) != there.get(name))
    if not stale:
        return 0
    if "--check" in arguments:
        print(f"stale in docs/gallery: {', '.join(stale)}; run: python docs/gallery.py", file=sys.stderr)
        return 1
    PAGES.mkdir(exist_ok=True)
    for name in stale:
        if name in pages:
            (PAGES / name).write_text(pages[name], encoding="utf-8")
        else:
            (PAGES / name).unlink()
    print(f"rewrote {', '.join(stale)}")
    return 0


def make_pictures(names: Sequence[str] = ()) -> None:
    """Run the examples of these names, or all, and write their pictures.

    Raises:
        SystemExit: If there is no example of a name.
    """
    unknown = sorted(set(names) - set(ORDER))
    if unknown:
        raise SystemExit(f"expected names out of {', '.join(ORDER)}; got {', '.join(unknown)}")
    from pictures import save  # docs/pictures.py; here, because it loads every model library

    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in names or ORDER:
        for file, picture in drawn(name):
            picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
            path = PICTURES / f"{file}.jpg"
            print(f"{path}: {save(picture.convert('RGB'), path)} bytes")


def drawn(name: str) -> Iterable[tuple[str, Image.Image]]:
    """Yield (name, picture) of what an example makes."""
    if name == TOUR:
        executed = run_notebook(EXAMPLES / f"{name}.ipynb")
        return [(f"{name}_{cell['id']}", picture_of(cell)) for cell in executed["cells"] if is_shown(cell)]
    if name == PLUGIN:
        return [(name, _picture_of_plugin())]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.png"
        subprocess.run([sys.executable, EXAMPLES / f"{name}.py", "--out", out], cwd=folder, check=True)
        with Image.open(out) as picture:
            return [(name, picture.convert("RGB"))]


def run_notebook(path: Path) -> dict[str, Any]:
    """Execute a notebook in a kernel of its own, in an empty folder, and return it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def picture_of(cell: dict[str, Any]) -> Image.Image:
    """Return the picture that an executed cell shows.

    Raises:
        SystemExit: If it shows none.
    """
    for output in cell["outputs"]:
        if "image/png" in output.get("data", {}):
            return Image.open(BytesIO(base64.b64decode(output["data"]["image/png"])))
    raise SystemExit(f"expected the cell {cell['id']!r}, which is tagged with 'picture', to show one")


def _picture_of_plugin() -> Image.Image:
    import vitfeats as vf

    (row,) = runpy.run_path(str(EXAMPLES / PLUGIN / "vitfeats_hog" / "__init__.py"))["ROWS"]
    vf.register_model(row.card, row.loader, row.kind)
    coffee = vf.samples.coffee()
    return vf.plot.pca(coffee, vf.load_extractor("hog8", size=320, stride=4, device="cpu")(coffee, "out@blocks"))


def _page(example: Example) -> str:
    links = ", ".join(f"[{_heading(page)}](../{page})" for page in ORDER[example.name].pages)
    return f"{WRITTEN}# {example.title}\n\n{example.body}\n\nMore of this: {links}. [All examples](index.md).\n"


def _overview(shown: Sequence[Example]) -> str:
    cards = [f"[![](../assets/gallery/{e.pictures[0]}.jpg){{ {_crop(e)} }} {e.title}]({e.name}.md)" for e in shown]
    licences = _credits(name for name in LICENCES if any(f"{LICENCES[name].credit}," in e.body for e in shown))
    text = (
        "Every picture is made by what stands whole on its page: a script, a notebook, or a plug-in. All are in the "
        "folder `examples/` of the repository, run on a CPU within seconds or minutes, and download nothing."
    )
    parts = ["# Gallery", text, '<div class="cards" markdown>', *cards, "</div>", f"*{licences}*"]
    wide = "---\nhide:\n  - toc\n---\n\n"
    return wide + WRITTEN + "\n\n".join(parts) + "\n"


def _crop(example: Example) -> str:
    return f'loading=lazy style="object-position: {ORDER[example.name].crop}"'


def _heading(page: str) -> str:
    return (HOW_TO / page).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _credits(names: Iterable[str]) -> str:
    credits = [f"{LICENCES[name].credit}, {LICENCES[name].licence}" for name in names]
    return f"Photograph{'s' * (len(credits) > 1)}: {'; '.join(credits)}."


def _picture(name: str, title: str) -> str:
    return f"![{title}](../assets/gallery/{name}.jpg){{ .picture }}"


def _code(path: Path) -> str:
    language, name = "toml" if path.suffix == ".toml" else "py", path.relative_to(EXAMPLES).as_posix()
    return _fenced(path.read_text(encoding="utf-8"), f'{language} title="examples/{name}"')


def _fenced(text: str, language: str) -> str:
    # Not "python": blocks of that language are run by the tests of the pages, and examples by those of the examples.
    return f"```{language}\n{text.strip()}\n```"


def _text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"]).strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
