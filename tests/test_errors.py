"""The tree of errors: what an `except` clause catches is part of the interface."""

import inspect

import pytest

from vitfeats import errors
from vitfeats.errors import VitFeatsError, nearest_names

# The second base is what somebody who has never heard of vitfeats would catch.
TREE = {
    "ImageError": ValueError,
    "ShapeError": ValueError,
    "UnknownModelError": LookupError,
    "UnknownFacetError": LookupError,
    "TapError": None,
    "WeightsUnavailableError": OSError,
    "MissingDependencyError": ImportError,
    "StoreError": OSError,
    "ConfigError": ValueError,
}


@pytest.mark.parametrize(("name", "builtin"), TREE.items())
def test_every_error_is_a_vitfeats_error_and_its_builtin(name, builtin):
    expected = (VitFeatsError,) if builtin is None else (VitFeatsError, builtin)
    assert getattr(errors, name).__bases__ == expected


def test_there_are_no_other_errors():
    found = {name for name, _ in inspect.getmembers(errors, inspect.isclass) if name.endswith("Error")}
    assert found == {"VitFeatsError", *TREE}
    assert VitFeatsError.__bases__ == (Exception,)


def test_the_tree_in_the_documentation_is_the_tree():
    drawn = {
        line.split()[1]: line.split()[2].strip("()")
        for line in errors.__doc__.splitlines()
        if line[4:6] in ("├─", "└─")
    }
    assert set(drawn) == set(TREE)
    for name, builtin in TREE.items():
        if builtin is not None:
            assert drawn[name] == builtin.__name__


@pytest.mark.parametrize("name", TREE)
def test_the_message_survives(name):
    # OSError and LookupError treat their arguments in their own ways.
    error = getattr(errors, name)("expected a, got b")
    assert str(error) == "expected a, got b"


def test_near_names_come_nearest_first():
    known = ["dino_vits8", "dino_vits16", "clip_vitb16", "mini"]
    assert nearest_names("dino_vits9", known).startswith("Did you mean 'dino_vits8' or ")
    assert nearest_names("minni", known) == "Did you mean 'mini'?"


def test_without_a_near_name_all_are_listed_in_order():
    assert nearest_names("zzz", ["query", "key"]) == "Known: key, query."


def test_no_more_than_most_are_offered():
    assert nearest_names("name0", (f"name{i}" for i in range(1, 9)), most=2).count("'name") == 2
    assert nearest_names("name0", [f"name{i}" for i in range(1, 9)]).count("'name") == 3
