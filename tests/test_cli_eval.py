"""vitfeats eval: the table, the files, the pictures, and what is refused."""

import json
import re
from typing import get_args, get_type_hints

import layouts
import pytest
from PIL import Image

import vitfeats as vf
from vitfeats import cli
from vitfeats.apps.evaluation import (
    EvalRow,
    PckResult,
    StereoPair,
    WarpedImages,
    correspondence,
    evaluate_pck,
    rows,
)
from vitfeats.cli.measuring import Eval
from vitfeats.configs import PckProtocol
from vitfeats.pictures import read_pictures

SMALL = ["--size", "64", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of three photographs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("cat", "coffee", "astronaut"):
        getattr(vf.samples, name)().resize((96, 80)).save(folder / f"{name}.png")
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["eval", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_one_model_is_measured_on_warps_as_the_functions_measure_it(capsys, tmp_path, pictures, mini):
    out = tmp_path / "out"
    more = ["--layout", "warps", "--side", "80", "--tap", "key@9", *SMALL, "--thresholds", "0.2", "0.1"]
    code, said, _ = run(capsys, "--data", pictures, *more, "--seed", "3", "--out", out, "--json")
    assert code == 0
    (table,) = json.loads(said)["tables"]
    (row,) = table["rows"]
    warps = WarpedImages(list(read_pictures(pictures, side=80).values()), seed=3)
    rules = PckProtocol(reference="image", thresholds=(0.2, 0.1))
    expected = evaluate_pck(mini.resized(size=64), "key@9", warps, protocol=rules)
    assert row["row"] == "mini, key@9"
    assert row["main"] == pytest.approx(expected.pck(), abs=1e-6)
    assert row["pck"]["0.1"] == pytest.approx(expected.every_mean(0.1), abs=1e-6)
    kept = PckResult.load(out / "mini-key-9" / "pck.json")
    assert kept.pck(0.1) == pytest.approx(expected.pck(0.1), abs=1e-6)
    assert (out / "table.md").read_text().count("mini, key@9") == 1
    for name in ("accuracy.png", "pairs.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100


def test_a_layout_is_read_and_a_text_told(capsys, tmp_path):
    layouts.write_spair(tmp_path / "data")
    more = ["--log-bin", "--tap", "token@-1", *SMALL, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    code, said, _ = run(capsys, "--data", tmp_path / "data", *more)
    assert code == 0
    assert "SPair-71k test: " in said
    assert "protocol spair, box, mean over category" in said
    assert "| mini, token@11, log-binned |" in said
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_table_is_measured_on_both_kinds_of_data_in_folders_of_their_own(capsys, tmp_path, pictures, monkeypatch):
    monkeypatch.setitem(rows.TABLES, "bundled", (EvalRow("the same place"),))
    more = ["--sample", "stereo", "--data", pictures, "--layout", "warps", "--subset", "2", "--side", "80"]
    code, said, _ = run(capsys, "--table", "bundled", *more, "--out", tmp_path)
    assert code == 0
    assert said.index("stereo pair: 1 pair, ") < said.index("warped images: 2 pairs")
    assert said.count("| the same place |") == 2
    for kind in ("stereo", "warps"):
        assert (tmp_path / kind / "the-same-place" / "pck.json").is_file()
        assert (tmp_path / kind / "table.md").is_file()


def test_rows_that_cannot_be_measured_are_named_and_the_exit_code_says_so(capsys, tmp_path, monkeypatch):
    absent = EvalRow("absent", (rows.Part("dino_vits8", ("key@9",)),))
    monkeypatch.setitem(rows.TABLES, "bundled", (EvalRow("the same place"), absent))

    def load(name, **_settings):
        raise vf.WeightsUnavailableError(f"expected the weights of {name}, but there is no network")

    monkeypatch.setattr(rows, "load_extractor", load)
    code, said, _ = run(capsys, "--table", "bundled", "--sample", "stereo", "--out", tmp_path)
    assert code == 1
    assert "| absent | no weights | – | – | – | – |" in said
    assert "absent: expected the weights of dino_vits8, but there is no network" in said


def test_a_run_goes_on_where_it_was(capsys, tmp_path, pictures, monkeypatch):
    command = ["--data", pictures, "--layout", "warps", "--side", "80", *SMALL, "--out", tmp_path / "out"]
    whole = run(capsys, *command[:-1], tmp_path / "whole", "--json")[1]
    usual, measured = correspondence._errors, []

    def stopping(*given):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(given[2])
        return usual(*given)

    monkeypatch.setattr(correspondence, "_errors", stopping)
    code, _, told = run(capsys, *command)
    assert code == 130
    assert "interrupted after 2 of 3 pairs; go on with resume=True, --resume in '" in told
    monkeypatch.setattr(correspondence, "_errors", usual)
    code, said, _ = run(capsys, *command, "--resume", "--json")
    assert code == 0
    assert json.loads(said)["tables"][0]["rows"][0]["pck"] == json.loads(whole)["tables"][0]["rows"][0]["pck"]
    code, _, told = run(capsys, *command, "--resume", "--seed", "5")
    assert code == 1
    assert "these differ: drawn: " in told


def test_data_of_another_layout_are_told_which_there_are(capsys, tmp_path, pictures):
    file = tmp_path / "pairs.json"
    file.write_text("[]")
    for data in (pictures, file):
        code, said, error = run(capsys, "--data", data, *SMALL, "--out", tmp_path / "out")
        assert (code, said) == (1, "")
        assert f"expected data laid out as SPair-71k, but '{data}' has no folder Layout; for another data set" in error
        for layout in get_args(get_type_hints(Eval)["layout"]):
            assert layout == "spair" or re.search(rf"\b{layout}\b", error), layout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "expected --data PATH or --sample stereo, got neither"),
        (["--sample", "stereo", "--tap", "key@99"], "expected a layer from 0 to 11"),
        (["--sample", "stereo", "--table", "bundled", "--tap", "key@9"], "expected --device and --dtype alone with"),
        (["--sample", "stereo", "--table", "bundled", "--model", "mini"], "expected --device and --dtype alone with"),
        (["--sample", "stereo", "--reference", "box"], "expected a box for PCK@bbox"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "nowhere", "--layout", "cub", "--category", "cat"], "expected --category with the layout spair"),
        (["--data", "nowhere.txt", "--layout", "pairs"], "expected a list of pairs with the suffix .json or .csv"),
    ],
)
def test_what_is_refused_is_said_in_a_sentence(capsys, tmp_path, arguments, told):
    code, said, error = run(capsys, *arguments, "--out", tmp_path / "out")
    assert (code, said) == (1, "")
    assert told in error


def test_the_stereo_pair_is_the_one_of_the_functions(capsys, tmp_path, mini):
    code, said, _ = run(
        capsys, "--sample", "stereo", "--protocol", "dift", "--own-size", *SMALL, "--json", "--out", tmp_path
    )
    assert code == 0
    rules = PckProtocol.preset("dift", size=None, reference="image")
    expected = evaluate_pck(mini.resized(size=64), None, [StereoPair().as_pair()], protocol=rules)
    assert json.loads(said)["tables"][0]["rows"][0]["main"] == pytest.approx(expected.pck(), abs=1e-6)
