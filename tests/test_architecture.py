"""Who may import whom, read from the imports themselves."""

import ast
from pathlib import Path

import vitfeats

PACKAGE = Path(vitfeats.__file__).parent

# Each may import what stands in an earlier line, or beside it in its own line where that is said.
ORDER = [
    ["errors"],
    ["grid", "taps", "hooks", "resize"],
    ["card", "descriptor", "preprocess", "configs", "views", "pictures"],
    ["nets"],
    ["extractors.base"],
    ["extractors"],
    ["models"],
    ["api"],
]
HELPERS = ["similarity", "pooling", "attention_maps", "pca", "matching", "losses", "plot"]
# The demo shows what the other apps do, and so comes after them.
AFTER = [["samples", "patterns", "testing", "runs"], ["apps.evaluation"], ["apps"], ["apps.demo"], ["cli"]]
PACKAGES = ["__init__", "apps", "extractors", "models", "nets"]  # their __init__ holds nothing but a sentence
TORCH_FREE = ["errors", "configs", "cli", "__init__"]
HEAVY = {"torch", "torchvision", "timm", "transformers", "diffusers", "sklearn", "skimage", "matplotlib", "numpy"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def _imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Return the full names of the modules a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _own(path: Path) -> set[str]:
    known = _modules()
    return {name.removeprefix("vitfeats.") for name in _imports(path) if name.removeprefix("vitfeats.") in known}


def _level(module: str) -> tuple[str, int]:
    for number, names in enumerate(ORDER):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return "core", number
    if module in HELPERS:
        return "helper", HELPERS.index(module)
    found = {
        name: number
        for number, names in enumerate(AFTER)
        for name in names
        if module == name or module.startswith(f"{name}.")
    }
    if found:
        return "after", found[max(found, key=len)]  # an app that has a place of its own
    raise AssertionError(f"module {module} has no place in the order; give it one")


def test_every_module_imports_only_what_stands_before_it():
    for module, path in _modules().items():
        if module in PACKAGES:
            continue
        kind, number = _level(module)
        for other in _own(path):
            if other in PACKAGES or other == module:
                continue
            other_kind, other_number = _level(other)
            because = f"{module} imports {other}"
            if kind == "core":
                assert other_kind == "core", because
                assert other_number <= number, because
            elif kind == "helper":
                assert other_kind in ("core", "helper"), because
                assert not other.startswith(("extractors", "models", "api")), f"{because}: they meet in apps"
                assert other_kind == "core" or other_number < number, because
            else:
                assert other_kind != "after" or other_number <= number, because


def test_no_app_imports_another():
    shared = ("apps.evaluation", "apps.demo")
    apps = {m: p for m, p in _modules().items() if m.startswith("apps.") and not m.startswith(shared)}
    for module, path in apps.items():
        for other in _own(path):
            itself = ".".join(module.split(".")[:2])  # an app may be a package
            assert not other.startswith("apps.") or other.startswith((itself, "apps.evaluation")), f"{module}: {other}"


def test_no_module_imports_the_package_root():
    for module, path in _modules().items():
        if module == "__init__":
            continue
        names = _imports(path)
        from_root = {n for n in names if n.count(".") == 1 and n.startswith("vitfeats.") and n[9:] not in _modules()}
        assert not from_root, f"{module} imports {from_root} from the package root"


def test_no_cycles_even_through_init_files():
    known = _modules()
    edges = {module: _own(path) - {module} for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"cycle: {' → '.join([*way, module])}"
        if module in done:
            return
        for other in edges.get(module, ()):
            visit(other, (*way, module))
        done.add(module)

    for module in known:
        visit(module, ())


def test_the_modules_the_command_line_needs_first_are_light():
    light = {m: p for m, p in _modules().items() if m in TORCH_FREE or m.startswith(tuple(f"{n}." for n in TORCH_FREE))}
    assert set(TORCH_FREE) <= set(light)
    for module, path in light.items():
        roots = {name.split(".")[0] for name in _imports(path, top_only=True)}
        assert not roots & HEAVY, f"{module} imports {roots & HEAVY} at the top"


def test_nothing_is_called_utils():
    assert not [module for module in _modules() if "util" in module or "misc" in module or "common" in module]
