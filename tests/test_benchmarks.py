"""The benchmarks run, and the pages they write are of this catalogue."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

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


@pytest.mark.parametrize("name", ["log_binning", "matching", "style"])
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
