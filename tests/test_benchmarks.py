"""The benchmarks run, and the pages they write are of this catalogue."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from scipy import ndimage

import vitfeats as vf

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a benchmark as its neighbours do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.parametrize("name", ["log_binning", "matching", "style", "cosegment", "million"])
def test_it_runs_on_small_numbers(name):
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--fast"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "bar or ceiling" in ran.stdout
    assert ran.stdout.count(" ms") + ran.stdout.count(" MB") >= 4


@pytest.mark.slow
def test_bulk_is_compared_with_the_model_alone():
    command = [sys.executable, str(BENCHMARKS / "bulk.py"), "--fast", "--runs", "1", "--no-ray"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("images/s") >= 2
    assert "memory: at the end / after two tenths" in ran.stdout


@pytest.mark.slow
def test_the_demo_is_clicked_and_visited_without_an_error():
    pytest.importorskip("gradio", reason='no gradio found: pip install "vitfeats[demo]"')
    command = [sys.executable, str(BENCHMARKS / "demo.py"), "--fast"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"2 users for 6 s, \d+ answers: errors +0 +0\n", ran.stdout), ran.stderr
    assert "click → heat map, the function: ours / reading anew" in ran.stdout


@pytest.mark.slow
def test_extraction_runs(module):
    rows = module("extraction").rows(runs=1, batch=1, number=1)
    assert [row.what.partition(":")[0] for row in rows] == [
        *["key@11", "key@5", "three taps in one call / the deepest alone"],
        *["key@11", "key@5", "key@11", "key@5"],
    ]


def test_splice_compares_every_line_with_the_plain_loop(module, capsys):
    rows = module("splice").rows(size=(48, 64), runs=1, number=1, tiny=True, letters="fgh", memory=False)
    assert "all agree within" in capsys.readouterr().out
    assert [row.what.partition("(")[2][:1] for row in rows[:-1]] == list("fgh")
    assert all(float(row.ratio) > 0 for row in rows)


@pytest.mark.slow
def test_splice_measures_memory_in_processes_of_its_own(module):
    rows = module("splice")._memory("f", (48, 64), 1, True)
    assert [row.what for row in rows] == [
        "memory of a step: (f) + two hooks, no (n, n) matrix / plain",
        "memory of structure_loss, both ways: factored / matrix",
    ]
    assert all(row.ours.endswith(" MB") for row in rows)


def test_style_leaves_out_a_peer_whose_matrix_does_not_fit(module, monkeypatch):
    style = module("style")
    monkeypatch.setattr(style, "_available", lambda: 2 * 4 * 12**4 - 1)
    found, seconds = style._against_peer(48, 1, 1)
    assert [row.peer for row in found] == ["does not fit (0.0 GB)"] * 2
    assert [row.ratio for row in found] == ["–"] * 2
    assert found[0].ours == f"{1e3 * seconds:.1f} ms"
    assert found[1].ours.endswith(" MB")
    monkeypatch.setattr(style, "ONCE", 48)
    assert style._fewer(48, 20, seconds, 1).peer == found[0].ours, "all positions are not run a second time"


def test_style_wants_the_same_image_from_both(module, monkeypatch):
    style: Any = module("style")
    style._agree(48)
    monkeypatch.setattr(style, "plain", lambda *args, **rest: (mean := style.adaattn.attend(*args, **rest), 0 * mean))
    with pytest.raises(AssertionError, match="expected the same image of 48 px from both in float64"):
        style._agree(48)


def disk(height: int, width: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.hypot(y - height / 2, x - width / 2) < radius


def test_objects_on_white_are_cut_out(module):
    cut_out = module("coseg_quality").cut_out
    whole, hole = disk(60, 80, 20), disk(60, 80, 8)
    for object_, fill, wanted in ((whole, False, whole), (whole & ~hole, True, whole), (whole & ~hole, False, None)):
        picture = np.where(object_[..., None], np.array([40, 60, 160]), 250).astype(np.uint8)
        cut = cut_out(picture, fill)
        wanted = object_ if wanted is None else wanted
        rows, cols = np.nonzero(wanted.any(1))[0], np.nonzero(wanted.any(0))[0]
        assert cut.pixels.shape[:2] == cut.mask.shape == (np.ptp(rows) + 1, np.ptp(cols) + 1)
        assert (cut.mask ^ wanted[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]).mean() < 0.02
        assert np.array_equal(cut.pixels, picture[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


def test_what_is_no_single_object_on_white_is_not_cut_out(module):
    cut_out = module("coseg_quality").cut_out
    two = np.full((60, 80, 3), 255, np.uint8)
    two[20:40, 10:30] = two[20:40, 50:70] = 30
    dark = np.where(disk(60, 80, 20)[..., None], 20, 150).astype(np.uint8).repeat(3, 2)
    small = np.where(disk(60, 80, 6)[..., None], 20, 255).astype(np.uint8).repeat(3, 2)
    for picture in (two, dark, small, np.full_like(two, 255)):
        assert cut_out(picture, True) is None


def test_objects_are_pasted_where_the_mask_says(module):
    quality = module("coseg_quality")
    mask = disk(41, 31, 15.5)
    cut = quality.Cut(np.where(mask[..., None], np.array([255, 0, 0]), 255).astype(np.uint8), mask)
    places = set()
    for seed in range(5):
        behind = np.random.default_rng(seed).integers(0, 100, (60, 90, 3), dtype=np.uint8)
        image, found = quality.paste(cut, behind, np.random.default_rng(seed))
        assert (image.shape, image.dtype, found.shape, found.dtype) == ((60, 90, 3), np.uint8, (60, 90), bool)
        inside, outside = ndimage.binary_erosion(found, iterations=3), ~ndimage.binary_dilation(found, iterations=4)
        assert inside.any()
        assert (image[inside] == (255, 0, 0)).all(1).mean() > 0.95
        assert np.array_equal(image[outside], behind[outside])
        rows, cols = np.nonzero(found.any(1))[0], np.nonzero(found.any(0))[0]
        # The sides of the mask of 41 by 31 have a margin: its disk is 31 wide and high.
        assert 0.5 * 60 * 31 / 41 - 2 <= np.ptp(rows) + 1 <= 0.85 * 60 * 31 / 41 + 2
        places.add((int(rows[0]), int(cols[0])))
    assert len(places) == 5


def test_ellipses_have_their_share_of_the_sides(module):
    ellipses = module("coseg_quality").ellipses
    images = [np.zeros((60, 90, 3), np.uint8), np.zeros((41, 33, 3), np.uint8)]
    for size in (0.3, 0.5, 1.0):
        for image, mask in zip(images, ellipses(images, size), strict=True):
            assert mask.shape == image.shape[:2]
            assert mask.mean() == pytest.approx(np.pi / 4 * size**2, abs=0.01)
            assert np.array_equal(mask, mask[::-1, ::-1])
            assert np.ptp(np.nonzero(mask.any(1))[0]) + 1 == pytest.approx(size * image.shape[0], abs=2)
            assert np.ptp(np.nonzero(mask.any(0))[0]) + 1 == pytest.approx(size * image.shape[1], abs=2)


@pytest.mark.parametrize("count", [2, 3])
def test_colours_that_the_border_has_less_of_are_foreground(module, count):
    inside = disk(60, 80, 18)
    picture = np.where(inside[..., None], np.array([200, 40, 30]), np.array([40, 120, 60])).astype(np.uint8)
    if count == 3:  # two colours behind, both of which reach the border
        picture[30:][~inside[30:]] = (40, 60, 160)
    picture = (picture + np.random.default_rng(0).integers(0, 4, picture.shape)).astype(np.uint8)
    found = module("coseg_quality").colours(picture, count)
    assert found[inside].all()
    assert not found[:29][~inside[:29]].any()
    assert count == 3 or np.array_equal(found, inside)


def test_pairs_are_run_in_turns_and_compared(module):
    measuring = module("measuring")
    ran: list[str] = []
    measured = measuring.paired(lambda: ran.append("ours"), lambda: ran.append("peer"), 3)
    assert ran[:4] == ["peer", "ours", "ours", "peer"]
    assert ran.count("ours") == ran.count("peer") == 5
    assert measured.ratio > 0


def test_tables_are_written_between_their_markers(module):
    run: Any = module("run")
    row = run.Row("what", "1.0", "none", "1 ms", "1 ms")
    page = run.rewritten(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n", {"Title": [row]})
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "### Title\n\n| what | ratio | bar or ceiling | ours | peer |\n| --- |" in page
    with pytest.raises(SystemExit, match="expected the markers"):
        run.rewritten("nothing", {})


def test_the_page_of_the_suite_has_every_family_and_no_failure():
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert not [family for family in FAMILIES if f"| {family} |" not in page]
    assert f" 0 failed; {len(vf.list_models())} named models." in page, "run: python benchmarks/conformance.py"


def test_the_page_of_the_benchmarks_is_filled():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count("| --- |") >= 4, "run: python benchmarks/run.py"
