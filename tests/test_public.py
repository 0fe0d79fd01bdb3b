"""The one public door: sorted, complete, light."""

import subprocess
import sys
from types import ModuleType

import jaxtyping
import pytest

import vitfeats as vf

HEAVY = ("torch", "torchvision", "timm", "diffusers", "transformers", "numpy", "matplotlib", "sklearn", "skimage")


def test_all_is_sorted_and_every_name_is_there():
    assert vf.__all__ == sorted(vf.__all__)
    for name in vf.__all__:
        value = getattr(vf, name)
        assert isinstance(value, ModuleType) == (name in ("bulk", "patterns", "plot", "samples"))


def test_every_public_name_is_listed():
    homes = {name for names in vf._HOME.values() for name in names} | {"bulk", "patterns", "plot", "samples"}
    assert homes == set(vf.__all__)
    assert set(vf.__all__) <= set(dir(vf))


def test_no_name_is_also_a_module_of_the_package():
    from pathlib import Path

    modules = {path.stem for path in Path(vf.__file__).parent.glob("*")} - {"patterns", "plot", "samples"}
    assert not modules & set(vf.__all__)


def test_every_public_thing_has_a_docstring():
    for name in vf.__all__:
        assert (getattr(vf, name).__doc__ or "").strip(), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vitfeats' has no attribute 'no_such_name'"):
        vf.no_such_name  # noqa: B018


def test_import_is_light():
    code = f"import sys, vitfeats; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_that_test_would_notice():
    code = f"import sys, vitfeats; vitfeats.Tap; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout


def test_the_run_time_type_checks_of_this_test_run_are_on():
    """Every test is a shape test too; were the checks off, nobody would notice."""
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'd'"):
        vf.self_similarity("not a descriptor")
