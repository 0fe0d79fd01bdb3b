"""Other packages' models: found by their entry point, listed, loaded; and harmless where they fail."""

import importlib
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import vitfeats as vf
from vitfeats import api, cli
from vitfeats.extractors.vit import ViTExtractor

_TWIN = """
from dataclasses import replace
from vitfeats import api
mini = api._rows['mini']
ROWS = replace(mini, card=replace(mini.card, name='twin'))"""

PLUGIN = Path(__file__).parent.parent / "examples" / "plugin"


def _install(folder: Path, name: str, target: str, code: str = "") -> None:
    """Lay a package with one entry point into a folder, as pip would."""
    facts = folder / f"{name}-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{api.PLUGINS}]\n{name} = {target}\n")
    if code:
        (folder / f"{target.partition(':')[0]}.py").write_text(code)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for plug-ins yet, and a folder to lay some into."""
    monkeypatch.setattr(api, "_rows", dict(api._rows))
    monkeypatch.setattr(api, "_failed", {})
    monkeypatch.setattr(api, "_sought", [])
    monkeypatch.setattr(api, "_settled", set())
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("plug_", "vitfeats_hog")):
            del sys.modules[name]


def test_the_example_is_found_listed_and_loaded(fresh, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PLUGIN)
    _install(fresh, "hog", "vitfeats_hog:ROWS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [card.name for card in vf.list_models()]
    assert names[-1] == "hog8"
    assert vf.list_models("hog*")[0].licence == "no weights"
    assert cli.main(["models", "hog*"]) == 0
    assert "hog8" in capsys.readouterr().out
    d = vf.extract(vf.samples.cat(), model="hog8", size=96, stride=4, device="cpu")
    assert repr(d).startswith("Descriptor(out@blocks of hog8: batch 1, 23×")
    vf.set_default_model("hog8")
    assert api.default_model() == "hog8"
    vf.set_default_model(None)


def test_plugins_are_not_looked_for_without_need(fresh):
    _install(fresh, "bad", "plug_bad:ROWS", "raise RuntimeError('imported')")
    vf.load_extractor("mini", size=112, device="cpu")
    assert not api._sought
    assert "plug_bad" not in sys.modules


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_package_at_all", "ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("OTHER = 1", "AttributeError"),
        ("ROWS = 7", "TypeError"),
        ("ROWS = [7]", "ConfigError: expected a vitfeats.api.Row, or several, got int"),
        (
            "import vitfeats\nfrom vitfeats.api import Row\nROWS = [Row(vitfeats.list_models('mini')[0], print)]",
            "ConfigError: expected names that are free, but there is a model 'mini' already",
        ),
    ],
)
def test_a_plugin_that_fails_is_reported_and_harmless(fresh, capsys, code, reason):
    _install(fresh, "bad", "plug_bad:ROWS", code)
    with pytest.warns(RuntimeWarning, match="plug-in 'bad' of bad could not be loaded: "):
        cards = vf.list_models()
    assert cards[0].name == "mini"
    assert api.plugin_failures()["bad"].startswith(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        vf.list_models()
    with pytest.raises(vf.UnknownModelError, match=r"got 'nonesuch'.* Plug-ins that could not be loaded: bad\.$"):
        vf.load_extractor("nonesuch")
    assert cli.main(["models", "--json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == len(cards)
    assert said.err.startswith("vitfeats: plug-in 'bad' could not be loaded: ")
    assert vf.load_extractor("mini", size=112, device="cpu").card.name == "mini"


def test_one_that_fails_does_not_keep_another_away(fresh):
    _install(fresh, "bad", "plug_bad:ROWS", "raise RuntimeError")
    _install(fresh, "good", "plug_good:ROWS", _TWIN)
    with pytest.warns(RuntimeWarning):
        assert [card.name for card in vf.list_models("twin")] == ["twin"]
    assert vf.load_extractor("twin", size=112, device="cpu").card.name == "twin"


def test_warnings_as_errors_do_not_keep_another_away(fresh):
    _install(fresh, "a_bad", "plug_bad:ROWS", "raise RuntimeError")
    _install(fresh, "good", "plug_good:ROWS", _TWIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="plug-in 'a_bad'"):
            vf.list_models()
        assert vf.list_models("twin")


def test_two_rows_of_one_name_are_refused(fresh):
    _install(fresh, "twice", "plug_twice:ROWS", _TWIN.replace("ROWS = ", "ROWS = 2 * [") + "]")
    with pytest.warns(RuntimeWarning, match="expected names that are free, but there is a model 'twin'"):
        assert not vf.list_models("twin")


def test_a_folder_of_the_same_name_does_not_stand_in_the_way(fresh, monkeypatch):
    _install(fresh, "good", "plug_good:ROWS", _TWIN)
    (fresh / "twin").mkdir()
    monkeypatch.chdir(fresh)
    assert vf.load_extractor("twin", size=112, device="cpu").card.name == "twin"


def test_threads_and_plugins_that_ask_for_models_do_not_wait_for_each_other(fresh):
    asks = "import time, vitfeats\ntime.sleep(0.2)\nvitfeats.list_models()\n" + _TWIN
    _install(fresh, "good", "plug_good:ROWS", asks)
    threads = [threading.Thread(target=vf.list_models, daemon=True) for _ in range(3)]
    threads.append(threading.Thread(target=importlib.import_module, args=("plug_good",), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert vf.list_models("twin")


def test_a_kind_gets_the_settings_it_takes(fresh):
    seen = {}

    def kind(network, card, preprocess, **settings):
        seen.update(settings)
        return ViTExtractor(network, card, preprocess, dtype=settings["dtype"])

    card = replace(vf.list_models("mini")[0], name="taker")
    vf.register_model(card, api._rows["mini"].loader, kind)
    vf.load_extractor("taker", size=112, device="cpu", norm=True)
    assert seen == {"dtype": "auto", "norm": True}


@pytest.mark.slow
def test_the_example_installed_by_pip(tmp_path):
    """It is listed, its own conformance tests pass, and a broken one beside it is harmless."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(PLUGIN)]
    subprocess.run(install, check=True, timeout=300)
    _install(site, "broken", "plug_broken:ROWS", "import no_such_package_at_all")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    listed = run("vitfeats.cli", "models")
    assert listed.returncode == 0
    assert "hog8" in listed.stdout
    assert "mini" in listed.stdout
    assert "plug-in 'broken' could not be loaded: ModuleNotFoundError" in listed.stderr
    tests = str(PLUGIN / "tests")
    passed = run("pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tests, tests)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    print(passed.stdout.splitlines()[-1])
