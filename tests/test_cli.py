"""The command line: what it writes, what it says where, and how it ends."""

import json
import re
import subprocess
import sys
from pathlib import Path

import diffusions
import numpy as np
import pytest
import torch
from PIL import Image

import vitfeats as vf
from vitfeats import cli
from vitfeats.apps import style_transfer
from vitfeats.apps.style_transfer import stylize, stylizer
from vitfeats.cli import entry, reading, styling
from vitfeats.cli.reading import Extract, Models
from vitfeats.descriptor import Descriptor
from vitfeats.models.stylizers import pack
from vitfeats.nets.stylizing import NETWORKS

SMALL = ["--size", "112", "--device", "cpu"]


@pytest.fixture
def images(tmp_path):
    """Two photographs of different shapes."""
    paths = []
    for name, size in (("cat.jpg", (150, 100)), ("coffee.png", (100, 120))):
        getattr(vf.samples, name.split(".")[0])().resize(size).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def is_picture(path) -> None:
    with Image.open(path) as picture:
        assert min(picture.size) >= 100
        assert np.asarray(picture).std() > 5


# extract --------------------------------------------------------------------------------------------------------------


def test_extract_writes_one_file_for_each_image_and_tap(capsys, tmp_path, images, mini):
    out = tmp_path / "new" / "features"
    code, said, _ = run(capsys, "extract", *images, "--out", out, "--tap", "key@11", "cls@-1", *SMALL)
    assert code == 0
    assert said == f"4 files in {out}\n"
    names = {f"{name}.{tap}.safetensors" for name in ("cat.jpg", "coffee.png") for tap in ("key@11", "cls@11")}
    assert {path.name for path in out.iterdir()} == names
    for path in images:
        loaded = Descriptor.load(out / f"{path.rpartition('/')[2]}.key@11.safetensors")
        expected = mini(path, "key@11")
        assert torch.allclose(loaded.features, expected.features, atol=1e-4)
        assert (loaded.grid, loaded.frames, loaded.model) == (expected.grid, expected.frames, "mini")


def test_extract_takes_the_usual_tap_and_says_json(capsys, tmp_path, images):
    code, said, _ = run(capsys, "extract", *images, "--out", tmp_path / "out", "--json", *SMALL)
    assert code == 0
    facts = json.loads(said)
    usual = vf.list_models("mini")[0].usual_tap
    assert (facts["model"], facts["failed"]) == ("mini", {})
    assert facts["written"] == [
        str(tmp_path / "out" / f"{name}.{usual}.safetensors") for name in ("cat.jpg", "coffee.png")
    ]
    assert all(Descriptor.load(path).model == "mini" for path in facts["written"])


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_broken_image_does_not_stop_the_others(capsys, tmp_path, images, position, batch_size):
    broken = tmp_path / "broken.jpg"
    broken.write_text("not an image")
    given = [*images[:position], str(broken), *images[position:]]
    out = tmp_path / "out"
    code, said, err = run(
        capsys, "extract", *given, "--out", out, "--tap", "key@3", "--batch-size", batch_size, "--json", *SMALL
    )
    assert code == 1
    facts = json.loads(said)
    assert list(facts["failed"]) == [str(broken)]
    assert "is not one that Pillow can read" in facts["failed"][str(broken)]
    assert "vitfeats: expected an image, but" in err
    # Each file under its own name: the broken one must not shift the others.
    for path in images:
        loaded = Descriptor.load(out / f"{path.rpartition('/')[2]}.key@3.safetensors")
        with Image.open(path) as image:
            assert loaded.frames[0].source_size == image.size[::-1]
    assert len(list(out.iterdir())) == len(facts["written"]) == 2


def test_all_images_broken(capsys, tmp_path):
    code, said, err = run(capsys, "extract", tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out", *SMALL)
    assert code == 1
    assert said == f"0 files in {tmp_path / 'out'}\n"
    assert err.count("but there is none at") == 2


def test_images_of_one_name_are_refused_before_anything_is_written(capsys, tmp_path, images):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "cat.jpg"
    vf.samples.cat().save(twin)
    code, said, err = run(capsys, "extract", *images, twin, "--out", tmp_path / "out", *SMALL)
    assert (code, said) == (1, "")
    assert "ConfigError: expected image files of different names, got 'cat.jpg' twice; take one folder at a time" in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(capsys, tmp_path, images):
    (tmp_path / "file").touch()
    code, _, err = run(capsys, "extract", *images, "--out", tmp_path / "file" / "out", *SMALL)
    assert code == 1
    assert "ConfigError: expected a folder to write to at" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tap", "keys@3"], "UnknownFacetError: expected a facet, got 'keys'. Did you mean 'key'?"),
        (["--tap", "key@99"], "TapError: expected a layer from 0 to 11"),
        (["--tap", "key"], "TapError: expected a tap written facet@layer"),
        (["--model", "minni"], "UnknownModelError: expected a model's name"),
        (["--stride", "5"], "ShapeError: expected a stride that divides the patch size 16, got 5"),
        (["--size", "4"], "ShapeError: expected a size of at least one patch"),
        (["--batch-size", "0"], "ConfigError: expected batch_size of at least 1, got 0"),
        (["--device", "nonsense"], "ConfigError: expected a device of this machine, got 'nonsense'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(capsys, tmp_path, images, arguments, message):
    code, said, err = run(capsys, "extract", *images, "--out", tmp_path / "out", *SMALL, *arguments)
    assert (code, said) == (1, "")
    assert f"vitfeats: {message}" in err
    assert "Traceback" not in err


def test_a_folder_stands_for_the_pictures_in_it(capsys, tmp_path, images):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deeper/c.png"):
        vf.samples.cat().resize((80, 60)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    code, said, _ = run(capsys, "extract", folder, images[0], "--out", out, "--json", "--tap", "cls@3", *SMALL)
    assert code == 0
    written = [f"{name}.cls@3.safetensors" for name in ("a.JPG", "b.png", "cat.jpg")]
    assert json.loads(said)["written"] == [str(out / name) for name in written]
    code, said, _ = run(capsys, "pca", folder, "--out", tmp_path / "p.png", "--tap", "key@3", *SMALL)
    assert (code, said) == (0, f"{tmp_path / 'p.png'}: key@3 of mini, 2 images\n")
    (folder / "ab.png").write_bytes((folder / "b.png").read_bytes()[:90])
    code, said, err = run(capsys, "pca", folder, "--out", tmp_path / "q.png", "--tap", "key@3", *SMALL)
    assert (code, said) == (1, f"{tmp_path / 'q.png'}: key@3 of mini, 2 images\n")
    assert "ab.png' breaks off or is damaged" in err
    for name in ("a.JPG", "b.png"):
        (folder / name).write_bytes(b"none")
    code, said, err = run(capsys, "pca", folder, "--out", tmp_path / "r.png", "--tap", "key@3", *SMALL)
    assert (code, said) == (1, "")
    assert all(err.count(f"/{name}'") == 1 for name in ("a.JPG", "ab.png", "b.png"))
    for name in ("a.JPG", "ab.png", "b.png"):
        (folder / name).unlink()
    for command in ("extract", "pca"):
        code, _, err = run(capsys, command, folder, "--out", tmp_path / "none", *SMALL)
        assert code == 1
        assert f"ConfigError: expected pictures (.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff) in '{folder}'" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("similarity", "folder"),
        ("match", "cat.jpg", "folder"),
        ("splice", "cat.jpg", "folder", "--preset", "draft"),
        ("invert", "folder", "--preset", "draft"),
        ("stylize", "cat.jpg", "--style", "folder"),
    ],
)
def test_a_folder_in_place_of_a_file_is_refused_in_words_of_the_command_line(
    capsys, tmp_path, images, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    code, said, err = run(capsys, *arguments, "--device", "cpu")
    assert (code, said) == (1, "")
    told = "ImageError: expected an image file, got the folder 'folder'; give the files in it: folder/*.jpg"
    assert err == f"vitfeats: {told}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("pca", "cat.jpg"),
        ("similarity", "cat.jpg"),
        ("match", "cat.jpg", "coffee.png"),
        ("stylize", "cat.jpg", "--style", "coffee.png"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, images, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "picture_extractor", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setattr(style_transfer, "stylize", lambda *_, **__: pytest.fail("the work has begun"))
    before = Path(images[0]).read_bytes()
    for out, why in (
        (arguments[-1], "it is one of the inputs, and would be lost"),
        (f"./none/../{arguments[1]}", "there is no folder"),
        ("none/a.png", "there is no folder 'none'; make it first"),
        ("a.tiffx", "unknown file extension: '.tiffx'"),
        ("a", "unknown file extension: ''"),
    ):
        code, said, err = run(capsys, *arguments, "--out", out, "--device", "cpu")
        assert (code, said) == (1, "")
        assert err.startswith(
            "vitfeats: ConfigError: expected a picture file that can be written, such as out.png, got"
        )
        assert why in err
    assert Path(images[0]).read_bytes() == before


def test_an_image_that_was_taken_for_a_tap_is_named(capsys, images):
    code, _, err = run(capsys, "extract", "--tap", "key@3", images[0])
    assert (code, err) == (
        1,
        f"vitfeats: ConfigError: expected image files, got none; --tap took '{images[0]}' as a tap: put the images "
        "before it\n",
    )


@pytest.mark.parametrize("command", ["pca", "extract", "similarity"])
def test_an_address_is_no_file(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, command, "https://example.org/a.jpg", "--device", "cpu")
    assert (code, err) == (
        1,
        "vitfeats: ImageError: expected an image file, got the address 'https://example.org/a.jpg'; "
        "download it first\n",
    )


# pictures -------------------------------------------------------------------------------------------------------------


def test_pca_of_files(capsys, tmp_path, images):
    out = tmp_path / "colours.png"
    code, said, _ = run(capsys, "pca", *images, "--out", out, "--tap", "key@11", *SMALL)
    assert (code, said) == (0, f"{out}: key@11 of mini, 2 images\n")
    is_picture(out)


def test_pca_of_a_sample_as_json(capsys, tmp_path):
    out = tmp_path / "colours.jpg"
    code, said, _ = run(
        capsys, "pca", "--sample", "portraits", "--foreground", "border", "--out", out, "--json", *SMALL
    )
    assert code == 0
    facts = json.loads(said)
    # Half a patch between tokens: 112 pixels are 13 tokens.
    assert facts["grids"][0] == [13, 13]
    assert facts["grids"][1][1] == 13
    shares = facts["explained_variance_ratio"]
    assert len(shares) == 3
    assert 1 >= sum(shares) > 0
    assert shares == sorted(shares, reverse=True)
    assert facts["out"] == str(out)
    is_picture(out)


@pytest.mark.parametrize("point", [(75, 40), (0, 0), (150, 100)])
def test_similarity_of_an_image_with_itself_looks_away_from_the_point(capsys, tmp_path, images, mini, point):
    out = tmp_path / "similar.png"
    asked = ("similarity", images[0], "--point", *point, "--tap", "key@11", "--out", out, *SMALL)
    code, said, _ = run(capsys, *asked, "--json")
    assert code == 0
    facts = json.loads(said)
    assert facts["point"] == list(point)
    is_picture(out)
    # Token by token: the best of those that are two or more away from the point's own, in rows or in columns.
    d = mini.resized(stride=8)(images[0], "key@11")
    alike = vf.similarity_map(d, [point], d)[0]
    step = np.array([150 / d.grid.network_size[1], 100 / d.grid.network_size[0]])  # source pixels of a network pixel
    centres = {(r, c): (np.array([c, r]) * 8 + 8) * step for r in range(d.grid.rows) for c in range(d.grid.cols)}
    own = min(centres, key=lambda token: float((((centres[token] - point) / step) ** 2).sum()))
    away = [token for token in centres if max(abs(token[0] - own[0]), abs(token[1] - own[1])) > 1]
    best = max(away, key=lambda token: float(alike[token]))
    assert facts["most_similar"] == pytest.approx(centres[best], abs=1e-2)
    assert facts["similarity"] == pytest.approx(float(alike[best]), abs=1e-4)
    x, y = facts["most_similar"]
    where = f"most similar away from the point, outside of the 3×3 tokens around it at x={x:.1f} y={y:.1f}"
    assert run(capsys, *asked)[:2] == (0, f"{out}: {where} ({facts['similarity']:.3f})\n")


def test_an_image_of_few_tokens_has_none_away_from_the_point(capsys, tmp_path, images):
    given = ("--size", 16, "--device", "cpu", "--out", tmp_path / "s.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    code, _, err = run(capsys, "similarity", tmp_path / "small.png", *given)
    assert code == 1
    assert "ConfigError: expected tokens away from the point, got a grid of 1×1; raise --size, lower --stride" in err
    assert run(capsys, "similarity", tmp_path / "small.png", images[0], *given)[0] == 0


def test_similarity_of_two_files_is_not_kept_away_from_the_point(capsys, tmp_path, images):
    given = ("--point", 75, 40, "--tap", "key@11", "--out", tmp_path / "s.png", "--json", *SMALL)
    facts = json.loads(run(capsys, "similarity", images[0], images[0], *given)[1])
    assert facts["similarity"] > 0.9
    # Within one token (8 of 112 pixels, here about 7 source pixels) of where it was asked.
    assert np.abs(np.subtract(facts["most_similar"], [75, 40])).max() < 8


def test_similarity_asks_for_the_middle_unless_told(capsys, tmp_path, images):
    code, said, _ = run(capsys, "similarity", *images, "--out", tmp_path / "s.png", "--json", *SMALL)
    assert code == 0
    facts = json.loads(said)
    assert facts["point"] == [75, 50]
    assert 0 <= facts["most_similar"][0] <= 100
    assert 0 <= facts["most_similar"][1] <= 120
    code, said, _ = run(capsys, "similarity", *images, "--out", tmp_path / "s.png", *SMALL)
    x, y = facts["most_similar"]
    first, second = said.splitlines()
    assert first == f"{tmp_path / 's.png'}: most similar at x={x:.1f} y={y:.1f} ({facts['similarity']:.3f})"
    assert second == "point: the middle (75, 50); --point X Y asks about another"
    assert "middle" not in run(capsys, "similarity", *images, "--point", 75, 50, "--out", tmp_path / "s.png", *SMALL)[1]


def test_match(capsys, tmp_path, images, mini):
    out = tmp_path / "matches.png"
    code, said, _ = run(capsys, "match", *images, "--out", out, "--tap", "key@11", "--json", *SMALL)
    assert code == 0
    facts = json.loads(said)
    a, b = mini.resized(stride=8).each(images, "key@11")
    expected = vf.match_mutual(a, b)
    assert np.allclose(facts["points_a"], expected.points_a, atol=1e-3)
    assert np.allclose(facts["points_b"], expected.points_b, atol=1e-3)
    assert np.allclose(facts["scores"], expected.scores, atol=1e-4)
    is_picture(out)
    code, said, _ = run(capsys, "match", *images, "--out", out, "--tap", "key@11", "--most", "5", *SMALL)
    assert code == 0
    assert said == f"{out}: {len(expected)} mutual matches of {a.grid.tokens} and {b.grid.tokens} tokens\n"


def test_the_same_command_gives_the_same_answer(capsys, tmp_path, images):
    runs = [run(capsys, "match", *images, "--out", tmp_path / "m.png", "--json", *SMALL)[1] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("command", ["pca", "similarity", "match"])
def test_files_and_a_sample_are_one_too_many_and_neither_one_too_few(capsys, tmp_path, images, command):
    for given in ([*images, "--sample", "portraits"], []):
        code, _, err = run(capsys, command, *given, "--out", tmp_path / "p.png", *SMALL)
        assert code == 1
        assert "ConfigError: expected image files or --sample NAME, one of the two; for example --sample" in err
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("command", ["pca", "similarity", "match"])
def test_what_pictures_cannot_be_made_of(capsys, tmp_path, images, command):
    (tmp_path / "broken.jpg").write_text("not an image")
    given = [tmp_path / "broken.jpg"] if command == "pca" else [images[0], tmp_path / "broken.jpg"]
    code, _, err = run(capsys, command, *given, "--out", tmp_path / "p.png", *SMALL)
    assert code == 1
    assert "vitfeats: ImageError: expected an image, but" in err
    code, _, err = run(capsys, command, "--sample", "portrait", "--out", tmp_path / "p.png", *SMALL)
    assert code == 1
    assert "ConfigError: expected a sample, got 'portrait'. Did you mean 'portraits'?" in err
    for out in ("p.nonsense", "missing/p.png"):
        code, _, err = run(capsys, command, *images, "--out", tmp_path / out, *SMALL)
        assert code == 1
        assert "ConfigError: expected a picture file that can be written, such as out.png, got" in err
    assert not list(tmp_path.glob("p.*"))


def test_wrong_numbers_of_images(capsys, tmp_path, images):
    code, _, err = run(capsys, "match", images[0], "--out", tmp_path / "p.png", *SMALL)
    assert code == 1
    assert "ConfigError: expected two images, got 1" in err
    code, _, err = run(capsys, "similarity", *images, images[0], "--out", tmp_path / "p.png", *SMALL)
    assert code == 1
    assert "ConfigError: expected one or two images, got 3" in err


def test_a_point_outside_the_image(capsys, tmp_path, images):
    code, _, err = run(capsys, "similarity", *images, "--point", "149", "149", "--out", tmp_path / "p.png", *SMALL)
    assert code == 1
    assert "ShapeError: expected points (x, y) inside the image of 150×100 pixels, got [149.0, 149.0]" in err


def test_splice_closes_with_a_narrow_table_and_all_measures_in_json(capsys, tmp_path, images):
    given = ("splice", *images, "--preset", "draft", "--steps", 1, "--device", "cpu", "--out")
    code, said, _ = run(capsys, *given, tmp_path / "out")
    first, blank, head, *rows = said.splitlines()
    assert (code, first, blank) == (0, f"{tmp_path / 'out' / 'result.png'}: 1 step, done", "")
    assert head.split("  ")[-5:] == ["structure ↓", "appearance ↑", "foreground ↑", "patches ↓", "colours ↓"]
    assert max(map(len, [head, *rows])) <= 80
    code, said, _ = run(capsys, *given, tmp_path / "again", "--json")
    measures = json.loads(said)["measures"]
    assert [row.split("  ")[0] for row in rows] == list(measures)
    shown = "structure_distance", "appearance_similarity", "foreground_iou", "patch_distance", "colour_distance"
    for row, values in zip(rows, measures.values(), strict=True):
        assert {"colour_shift", *shown} < set(values)
        told = ["–" if values[name] is None else f"{values[name]:.3f}" for name in shown]
        assert re.findall(r"-?\d+\.\d{3}|–", row) == told
    # The arrows point to the better side: each image is best at what it gave.
    structure, appearance = measures["structure image"], measures["appearance image"]
    for name in ("structure_distance", "patch_distance"):
        assert structure[name] < appearance[name]
    assert structure["foreground_iou"] > appearance["foreground_iou"]
    assert appearance["appearance_similarity"] > structure["appearance_similarity"]
    assert appearance["colour_distance"] < structure["colour_distance"]


# diffusion ------------------------------------------------------------------------------------------------------------

NETWORK = "size: 16\nchannels: [16, 16]\nblocks: 1\nattention: [1]\nbatch: 2\nwarmup: 1\nvalidate_every: 1\n"
AGGREGATION = "dim: 16\ngroups: 2\nvalidate_every: 1\n"
CHAIN = "steps: 4\nkeep: 2\n"


@pytest.fixture
def pictures(tmp_path):
    """A folder with a few smooth pictures, and the settings of quick runs beside it."""
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "more/c", "more/d")):
        coarse = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 20), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / f"{name}.png")
    for name, text in (("network", NETWORK), ("aggregation", AGGREGATION), ("chain", CHAIN)):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "held_out.txt").write_text("more/d\n")
    return tmp_path / "pictures"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a tiny diffusion model that was never trained."""
    folder = tmp_path_factory.mktemp("network")
    diffusions.ddpm(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    ).save_pretrained(folder)
    return folder


def test_a_diffusion_model_is_trained_resumed_and_read(capsys, tmp_path, pictures):
    out, held_out = tmp_path / "run", ("--held-out", tmp_path / "held_out.txt")
    settings = ("train-diffusion", pictures, "--out", out, "--config", tmp_path / "network.yaml", *held_out)
    code, said, _ = run(capsys, *settings, "--steps", 2)
    assert code == 0
    told = (out / "history.jsonl").read_text().splitlines()
    loss = json.loads(told[1])["held_out"]
    assert said == f"{out / 'model'}: 2 steps over 3 pictures, done; held-out loss {loss:.4f}\n"
    code, said, _ = run(capsys, *settings, "--steps", 2, "--resume", "--json")
    assert code == 0
    facts = json.loads(said)
    assert facts.pop("loss") == json.loads(told[1])["loss"]
    model = str(out / "model")
    assert facts == {"out": model, "pictures": 3, "steps": 2, "stopped": "done", "held_out": loss}
    code, said, _ = run(
        capsys, "extract", pictures / "a.png", "--model", model, "--device", "cpu", "--out", tmp_path / "e", "--json"
    )
    assert code == 0
    assert len(json.loads(said)["written"]) == 1
    code, _, err = run(capsys, *settings, "--steps", 3, "--resume")
    assert code == 1
    assert "these differ: steps: 2 there, 3 here" in err


def test_a_vision_transformer_is_pretrained_resumed_and_read(capsys, tmp_path):
    for number, name in enumerate(("red/a", "red/b", "red/c", "blue/d", "blue/e", "blue/f")):
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (200, 40 * number, 0) if "red" in name else (0, 40 * number, 200)).save(path)
    (tmp_path / "pictures" / "red" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "held_out.txt").write_text("red/c\nblue/f\n")
    (tmp_path / "settings.yaml").write_text(
        "model: test_vit\nsize: 32\nlocal_size: 16\nside: 36\nbatch: 2\nlabels: 1.0\nneighbours: 1\n"
        "validate_every: 1\nprototypes: 16\nhidden: 16\nbottleneck: 8\n"
    )
    out = tmp_path / "run"
    settings = [
        *("pretrain", "--data", tmp_path / "pictures", "--out", out, "--config", tmp_path / "settings.yaml"),
        *("--held-out", tmp_path / "held_out.txt", "--device", "cpu", "--steps", 2),
    ]
    code, said, err = run(capsys, *settings)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert code == 0
    assert said == (f"{out / 'model'}: 2 steps over 4 pictures, done; held-out k-NN accuracy {history[1]['knn']:.3f}\n")
    assert "vitfeats: skipped 'red/broken.png': " in err
    code, said, _ = run(capsys, *settings, "--resume", "--json")
    facts = json.loads(said)
    assert code == 0
    assert (facts["steps"], facts["pictures"], facts["classes"], facts["stopped"]) == (2, 4, 2, "done")
    assert (facts["loss"], facts["knn"]) == (history[1]["loss"], history[1]["knn"])
    assert list(facts["failed"]) == ["red/broken.png"]
    code, said, _ = run(
        capsys, "extract", tmp_path / "pictures" / "red" / "a.png", "--model", out / "model", "--out", tmp_path / "e"
    )
    assert code == 0
    code, _, err = run(capsys, *settings[:-1], 3, "--resume")
    assert code == 1
    assert "these differ: steps: 2 there, 3 here" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, "pretrain", "--data", tmp_path / "empty", "--out", tmp_path / "nothing")
    assert code == 1
    assert "expected pictures (.jpg" in err
    assert not (tmp_path / "nothing").exists()


def test_hyperfeatures_are_trained_resumed_and_written(capsys, tmp_path, pictures, network):
    out, options = tmp_path / "run", ("--size", 16, "--device", "cpu")
    settings = [
        *("train-hyperfeatures", pictures, "--out", out, "--config", tmp_path / "aggregation.yaml"),
        *("--diffusion", tmp_path / "chain.yaml", "--held-out", tmp_path / "held_out.txt", "--steps", 2),
        *("--model", network, *options),
    ]
    code, said, _ = run(capsys, *settings)
    assert code == 0
    last = json.loads((out / "history.jsonl").read_text().splitlines()[-1])
    assert said == f"{out / 'aggregation.pt'}: 2 steps over 3 pairs, done; held-out PCK@0.1 {last['pck']:.3f}\n"
    code, said, _ = run(capsys, *settings, "--resume", "--json")
    assert code == 0
    facts = json.loads(said)
    assert (facts["pairs"], facts["steps"], facts["stopped"]) == (3, 2, "done")
    assert (facts["out"], facts["loss"], facts["pck"]) == (str(out / "aggregation.pt"), last["loss"], last["pck"])
    assert torch.load(out / "aggregation.pt", weights_only=True)["config"]["save_timestep"] == [3, 0]

    both = [pictures / "a.png", pictures / "b.png"]
    reads = ("--model", f"hyperfeatures:{network}", "--checkpoint", out / "aggregation.pt", *options)
    code, said, _ = run(capsys, "hyperfeatures", *both, "--out", tmp_path / "maps", *reads)
    assert code == 0
    a, b = (Descriptor.load(tmp_path / "maps" / f"{name}.png.safetensors") for name in "ab")
    assert (a.dim, str(a.tap), a.grid.tokens) == (16, "out@hyperfeatures", b.grid.tokens)
    found = len(vf.match_mutual(a, b))
    assert said == f"2 files and pca.png in {tmp_path / 'maps'}\nmatches.png: {found} mutual matches\n"
    for name in ("pca.png", "matches.png"):
        is_picture(tmp_path / "maps" / name)
    code, said, _ = run(capsys, "hyperfeatures", both[0], "--out", tmp_path / "one", "--seed", 1, "--json", *reads)
    assert code == 0
    facts = json.loads(said)
    assert set(facts) == {"model", "written", "pca", "failed"}
    assert facts["failed"] == {}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"a.png.safetensors", "pca.png"}

    more = pictures / "more"
    code, _, err = run(capsys, "hyperfeatures", pictures, more, more, "--out", tmp_path / "folder", *reads)
    assert (code, "expected image files of different names, got 'c.png' twice" in err) == (1, True)
    assert not (tmp_path / "folder").exists()
    (pictures / "aa.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    code, said, err = run(capsys, "hyperfeatures", pictures, "--out", tmp_path / "folder", *reads)
    assert (code, said.splitlines()[0]) == (1, f"2 files and pca.png in {tmp_path / 'folder'}")
    assert "aa.png' breaks off or is damaged" in err
    written = {path.name for path in (tmp_path / "folder").glob("*.safetensors")}
    assert written == {"a.png.safetensors", "b.png.safetensors"}


def test_hyperfeatures_are_trained_on_annotated_pairs(capsys, tmp_path, pictures, network):
    points = {"source_points": [[3, 4], [12, 10]], "target_points": [[5, 6], [13, 9]]}
    names = [("a.png", "b.png"), ("b.png", "more/c.png"), ("more/d.png", "a.png")]
    records = [{"source_path": source, "target_path": target, **points} for source, target in names]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    settings = [
        *("train-hyperfeatures", pictures, "--pairs", tmp_path / "pairs.json", "--steps", 1, "--json"),
        *("--diffusion", tmp_path / "chain.yaml", "--config", tmp_path / "aggregation.yaml"),
        *("--model", network, "--size", 16, "--device", "cpu"),
    ]
    code, said, _ = run(capsys, *settings, "--out", tmp_path / "all")
    assert (code, json.loads(said)["pairs"], json.loads(said)["pck"]) == (0, 3, None)
    held_out = ("--held-out", tmp_path / "held_out.txt")
    code, said, _ = run(capsys, *settings, "--out", tmp_path / "some", *held_out)  # the third pair shows one of them
    assert (code, json.loads(said)["pairs"]) == (0, 2)
    assert 0 <= json.loads(said)["pck"] <= 1
    (tmp_path / "held_out.txt").write_text("a\nb\n")
    code, _, err = run(capsys, *settings, "--out", tmp_path / "none", *held_out)
    assert code == 1
    assert "ConfigError: expected pairs without held-out pictures in" in err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "mini"], "ConfigError: expected settings that mini knows, got diffusion=DiffusionConfig(mode='in"),
        (["--config", "chain.yaml"], "ConfigError: expected settings of TrainHyperfeaturesConfig in"),
        (["--pairs", "missing.json"], "StoreError: expected a list of pairs in JSON at"),
        (["--held-out", "missing.txt"], "StoreError: expected a list of names, one a line, at"),
        (["--steps", "0"], "ConfigError: expected steps of at least 1, got 0"),
    ],
)
def test_what_hyperfeatures_cannot_be_trained_with(capsys, tmp_path, pictures, network, arguments, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = arguments if "--model" in arguments else [*arguments, "--model", network]
    code, _, err = run(capsys, "train-hyperfeatures", pictures, *given, "--size", 16, "--device", "cpu")
    assert code == 1
    assert told in err
    assert not (tmp_path / "aggregation").exists()


def test_hyperfeatures_of_another_model_are_refused(capsys, tmp_path, images):
    code, _, err = run(capsys, "hyperfeatures", *images, "--model", "mini", "--out", tmp_path / "out")
    assert code == 1
    assert "ConfigError: expected a model of hyperfeatures, got 'mini'; for example hyperfeatures:sd15" in err
    assert not (tmp_path / "out").exists()


# style transfer -------------------------------------------------------------------------------------------------------

STYLIZER_SETTINGS = "widths: [4, 4, 4]\ninner: 4\nsize: 32\nload: 32\nbatch: 2\nmost: 8\nsteps: 2\n"


@pytest.fixture
def stylizers(tmp_path, monkeypatch):
    """A folder with a random network of each method, in place of those that come with the package."""
    folder = tmp_path / "assets"
    folder.mkdir()
    for method, kind in NETWORKS.items():
        network = kind((32, 64, 128, 256, 256), (8, 8, 8), 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            network.decoder.convs[-1].bias.fill_(0.5)
        pack(network, folder / f"{method}_vgg_mini.safetensors", encoder="vgg_mini")
    monkeypatch.setattr(stylizer, "ASSETS", folder)
    stylizer._kept.cache_clear()  # other tests may have loaded those that come with the package
    yield folder
    stylizer._kept.cache_clear()


@pytest.fixture
def frames(tmp_path, stylizers):
    """A folder with three frames and one broken file."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, name in enumerate(("c.png", "a.jpg", "b.PNG")):
        coarse = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 33), Image.Resampling.BICUBIC).save(folder / name)
    (folder / "bb.png").write_text("not an image")
    (folder / "notes.txt").write_text("no picture")
    return folder


def painted(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert np.asarray(picture).std() > 1
        return np.asarray(picture)


def test_stylize_paints_an_image_in_styles_of_files_and_patterns(capsys, tmp_path, images, stylizers):
    out, quick = tmp_path / "a.png", ("--size", 40, "--device", "cpu")
    code, said, _ = run(capsys, "stylize", images[0], "--style", images[1], "--out", out, *quick)
    assert (code, said) == (0, f"{out}: 60×40 pixels\n")
    wanted = stylize(images[0], images[1], size=40, device="cpu")
    assert np.array_equal(painted(out), np.asarray(wanted.image))
    code, said, _ = run(
        *(capsys, "stylize", images[0], "--style", images[1], "pattern:glass:3", "--weights", 1, 2, "--out", out),
        *("--method", "sanet", "--strength", 0.5, "--most", 20, "--seed", 2, "--style-size", 48, "--json", *quick),
    )
    assert (code, json.loads(said)) == (0, {"out": str(out), "methods": ["sanet"]})
    styles = [images[1], vf.patterns.draw("glass", 256, 3)]
    settings = {"weights": [1.0, 2.0], "strength": 0.5, "most": 20, "seed": 2, "style_size": 48, "size": 40}
    wanted = stylize(images[0], styles, method="sanet", device="cpu", **settings)
    assert np.array_equal(painted(out), np.asarray(wanted.image))


def test_stylize_brings_colours_to_those_of_style_or_content(capsys, tmp_path, images, stylizers):
    given = ("stylize", images[0], "--style", images[1], "--size", 40, "--device", "cpu", "--out", tmp_path / "a.png")
    made = stylize(images[0], images[1], size=40, device="cpu")
    for colours, of in (("style", images[1]), ("content", images[0])):
        assert run(capsys, *given, "--colours", colours)[0] == 0
        assert np.array_equal(painted(tmp_path / "a.png"), np.asarray(made.recoloured(of).image))
    code, _, err = run(capsys, *given, "--colours", "style", "--style", "pattern:dots", "pattern:glass")
    assert code == 1
    assert "expected one style with --colours style, got 2" in err


def test_stylize_leaves_out_frames_that_are_too_small_and_paints_over_none(capsys, tmp_path, frames):
    (frames / "bb.png").unlink()
    Image.new("RGB", (12, 40)).save(frames / "bb.png")
    given = ("stylize", frames, "--style", "pattern:dots", "--style-size", 32, "--device", "cpu", "--out")
    code, said, err = run(capsys, *given, tmp_path / "painted", "--batch-size", 2)
    assert (code, said) == (1, f"3 pictures in {tmp_path / 'painted'}\n")
    assert f"expected at least 16×16 pixels, got '{frames / 'bb.png'}'; pass --size" in err
    code, _, err = run(capsys, *given, frames)
    assert code == 1
    assert "expected --out to be another folder than that of the images" in err
    code, _, err = run(capsys, *given, tmp_path / "painted", "--sample", "cat")
    assert code == 1
    assert "expected image files or --sample NAME, one of the two" in err


def test_stylize_names_a_frame_that_is_too_small_also_at_its_own_size(capsys, tmp_path, frames):
    (frames / "bb.png").unlink()
    Image.new("RGB", (12, 40)).save(frames / "bb.png")
    given = ("stylize", frames, "--style", "pattern:dots", "--style-size", 32, "--device", "cpu", "--size", 0)
    code, said, err = run(capsys, *given, "--out", tmp_path / "painted")
    assert (code, said) == (1, f"3 pictures in {tmp_path / 'painted'}\n")
    assert f"expected at least 16×16 pixels, got '{frames / 'bb.png'}'; pass --size" in err


def test_stylize_reduces_a_large_content_unless_it_is_told_a_size(capsys, tmp_path, images, stylizers, monkeypatch):
    monkeypatch.setattr(styling, "LARGEST", 40)
    given = ("stylize", images[0], "--style", "pattern:dots", "--device", "cpu", "--out", tmp_path / "a.png")
    style = vf.patterns.draw("dots", 256, 0)
    for size, told, wanted in (
        ((), "vitfeats: 150×100 is painted at 60×40; --size 0 keeps its own size\n", 40),
        (("--size", 0), "", None),
        (("--size", 48), "", 48),
    ):
        code, _, err = run(capsys, *given, *size)
        assert (code, err) == (0, told)
        made = stylize(images[0], style, size=wanted, device="cpu")
        assert np.array_equal(painted(tmp_path / "a.png"), np.asarray(made.image))
    monkeypatch.setattr(styling, "LARGEST", 100)  # as large as it may be
    code, said, err = run(capsys, *given)
    assert (code, said, err) == (0, f"{tmp_path / 'a.png'}: 150×100 pixels\n", "")


def test_stylize_reduces_large_images_of_a_folder_and_says_it_once(capsys, tmp_path, frames, monkeypatch):
    (frames / "bb.png").unlink()
    Image.new("RGB", (40, 22), (200, 90, 30)).save(frames / "small.png")
    monkeypatch.setattr(styling, "LARGEST", 24)
    given = (
        "stylize",
        frames,
        "--style",
        "pattern:weave:1",
        "--style-size",
        32,
        "--device",
        "cpu",
        "--method",
        "adain",
    )
    code, _, err = run(capsys, *given, "--out", tmp_path / "reduced", "--json")
    told = (
        f"vitfeats: '{frames / 'a.jpg'}', 48×33, is painted at 35×24, and so are others whose shorter side is above 24"
    )
    assert (code, err) == (0, f"{told}; --size 0 keeps their own sizes\n")
    style, settings = vf.patterns.draw("weave", 256, 1), {"method": "adain", "style_size": 32, "device": "cpu"}
    for source, size in (("a.jpg", 24), ("c.png", 24), ("small.png", None)):
        wanted = np.asarray(stylize(frames / source, style, size=size, **settings).image)
        assert np.array_equal(painted(tmp_path / "reduced" / f"{source.partition('.')[0]}.png"), wanted), source
    code, _, err = run(capsys, *given, "--out", tmp_path / "whole", "--json", "--size", 0)
    assert (code, err) == (0, "")
    assert painted(tmp_path / "whole" / "a.png").shape == (33, 48, 3)


def test_the_largest_content_of_stylize_is_the_one_of_its_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["stylize", "--help"])
    assert f"Default: their own, {styling.LARGEST} at most" in " ".join(capsys.readouterr().out.split())


def test_stylize_says_which_method_it_took(capsys, tmp_path, images, stylizers):
    given = ("stylize", images[0], "--style", "pattern:dots", "--size", 32, "--device", "cpu", "--json")
    code, said, _ = run(capsys, *given, "--out", tmp_path / "a.png")
    assert (code, json.loads(said)["methods"]) == (0, ["adaattn"])
    file = stylizers / "adain_vgg_mini.safetensors"
    code, said, _ = run(capsys, *given, "--out", tmp_path / "b.png", "--checkpoint", file)
    assert (code, json.loads(said)["methods"]) == (0, ["of the checkpoint"])
    wanted = stylize(images[0], vf.patterns.draw("dots", 256, 0), method="adain", size=32, device="cpu")
    assert np.array_equal(painted(tmp_path / "b.png"), np.asarray(wanted.image))


def test_stylize_draws_several_methods_side_by_side(capsys, tmp_path, images, stylizers):
    out = tmp_path / "a.png"
    given = ("--style", "pattern:glass:3", "--size", 32, "--style-size", 48, "--most", 50, "--device", "cpu", "--json")
    code, said, _ = run(capsys, "stylize", images[0], *given, "--method", "adain", "sanet", "--out", out)
    assert (code, json.loads(said)["methods"]) == (0, ["adain", "sanet"])
    is_picture(out)
    code, said, _ = run(capsys, "stylize", "--sample", "cat", *given[2:], "--out", out)
    assert (code, json.loads(said)["methods"]) == (0, ["adaattn", "sanet", "adain"])
    is_picture(out)


def test_stylize_paints_regions_in_styles_of_their_own(capsys, tmp_path, images, stylizers):
    labels = np.zeros((100, 150), np.uint8)
    labels[:, 75:] = 255
    Image.fromarray(labels).save(tmp_path / "mask.png")
    for name, grey in (("black", 0), ("white", 255)):
        Image.new("L", (256, 256), grey).save(tmp_path / f"{name}.png")
    patterns = ("pattern:glass:3", "pattern:dots:1")
    given = ["stylize", images[0], "--style", *patterns, "--method", "adain", "--size", 48, "--device", "cpu"]
    masks = ("--style-masks", tmp_path / "black.png", tmp_path / "white.png")
    code, _, _ = run(capsys, *given, "--mask", tmp_path / "mask.png", *masks, "--out", tmp_path / "a.png")
    assert code == 0
    styles = [vf.patterns.draw("glass", 256, 3), vf.patterns.draw("dots", 256, 1)]
    wanted = stylize(images[0], styles, method="adain", size=48, masks=(labels, [0, 255]), device="cpu")
    assert np.array_equal(painted(tmp_path / "a.png"), np.asarray(wanted.image))
    for wrong, message in (
        (["--mask", tmp_path / "mask.png"], "ConfigError: expected --style-masks, one for each of 2 styles, with --ma"),
        (["--mask", tmp_path / "mask.png", *masks[:2]], "ConfigError: expected --style-masks, one for each of 2 styl"),
        (masks, "ConfigError: expected --mask, the labels of the content, with --style-masks"),
        (["--mask", tmp_path / "none.png", *masks], "ImageError: expected a picture of labels at"),
        (["--mask", tmp_path / "black.png", *masks], "ShapeError: expected a mask of the content as labels (height, w"),
    ):
        code, _, err = run(capsys, *given, *wrong, "--out", tmp_path / "b.png")
        assert code == 1
        assert message in err
    assert not (tmp_path / "b.png").exists()


def test_stylize_paints_a_folder_of_frames_but_for_broken_ones(capsys, tmp_path, frames):
    out = tmp_path / "new" / "painted"
    given = ["stylize", frames, "--style", "pattern:weave:1", "--style-size", 32, "--device", "cpu", "--out", out]
    code, said, err = run(capsys, *given, "--batch-size", 2)
    assert (code, said) == (1, f"3 pictures in {out}\n")
    assert str(frames / "bb.png") in err
    assert "is not one that Pillow can read" in err
    assert {path.name for path in out.iterdir()} == {"a.png", "b.png", "c.png"}
    style = vf.patterns.draw("weave", 256, 1)
    for source in ("a.jpg", "b.PNG", "c.png"):
        wanted = np.asarray(stylize(frames / source, style, style_size=32, device="cpu").image).astype(int)
        found = painted(out / f"{source.partition('.')[0]}.png")
        assert np.abs(found - wanted).max() <= 1, source  # a batch rounds otherwise

    (out / "b.png").unlink()
    before = (out / "a.png").stat().st_mtime_ns
    code, said, err = run(capsys, *given, "--resume", "--json")
    assert code == 1
    facts = json.loads(said)
    assert list(facts.pop("failed")) == [str(frames / "bb.png")]
    assert facts == {"out": str(out), "painted": 1, "skipped": 2}
    assert (out / "a.png").stat().st_mtime_ns == before
    assert (out / "b.png").is_file()
    (frames / "bb.png").unlink()
    code, said, err = run(capsys, *given, "--resume", "--json")
    assert (code, json.loads(said)["painted"], json.loads(said)["skipped"]) == (0, 0, 3)


def test_stylize_paints_files_and_folders_of_one_call_into_a_folder(capsys, tmp_path, frames, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("--style", "pattern:weave:1", "--style-size", 32, "--device", "cpu", "--method", "adain", "--json")
    (frames / "bb.png").unlink()
    (tmp_path / "d.png").write_bytes((frames / "c.png").read_bytes())
    code, said, _ = run(capsys, "stylize", frames, "d.png", *given)
    assert (code, json.loads(said)["out"]) == (0, "styled")
    assert {path.name for path in (tmp_path / "styled").iterdir()} == {"a.png", "b.png", "c.png", "d.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.png"], "ConfigError: expected --style FILE, or a pattern such as --style pattern:glass:3"),
        (["frames"], "ConfigError: expected --style FILE, or a pattern such as --style pattern:glass:3"),
        (["one.png", "--style", "pattern:glas:3"], "ConfigError: expected a kind of pattern, got 'glas'. Did you mean"),
        (["one.png", "--style", "pattern:"], "ConfigError: expected a kind of pattern, got ''. Known: dots"),
        (["one.png", "--style", "pattern:glass:x"], "ConfigError: expected a pattern as pattern:KIND:SEED, got 'patte"),
        (["one.png", "--style", "pattern:glass:-1"], "ConfigError: expected a pattern as pattern:KIND:SEED, got 'patt"),
        (["one.png", "--style", "none.png"], "ImageError: expected an image file, but there is none at"),
        (["--style", "pattern:glass"], "ConfigError: expected image files or --sample NAME, one of the two"),
        (["none.png", "--style", "pattern:glass"], "ImageError: expected an image file, but there is none at"),
        (["one.png", "--style", "pattern:glass", "--size", "8"], "ShapeError: expected a size of at least 16 pixels"),
        (["one.png", "--style", "pattern:glass", "--strength", "2"], "ConfigError: expected a strength in 0..1, got 2"),
        (
            ["one.png", "--style", "pattern:glass", "--weights", "1", "2"],
            "ConfigError: expected a weight for each of 1",
        ),
        (["one.png", "--style", "pattern:glass", "--checkpoint", "a.pth"], "WeightsUnavailableError: expected the wei"),
        (
            ["one.png", "--style", "pattern:glass", "--encoder", "mini"],
            "ConfigError: expected --checkpoint with a netw",
        ),
        (["one.png", "--style", "pattern:glass", "--out", "a.x"], "ConfigError: expected a picture file that can be"),
        (["empty", "--style", "pattern:glass"], "ConfigError: expected pictures (.jpg, .jpeg, .png"),
        (["twins", "--style", "pattern:glass"], "ConfigError: expected images whose names differ in more than the su"),
        (["frames", "--style", "pattern:glass", "--mask", "one.png"], "ConfigError: expected one image with --mask or"),
        (["frames", "--style", "pattern:glass", "--style-masks", "one.png"], "ConfigError: expected one image with"),
        (["frames", "--style", "pattern:glass", "--method", "adain", "sanet"], "ConfigError: expected one image with"),
        (["frames", "--style", "pattern:glass", "--batch-size", "0"], "ConfigError: expected batch_size of at least 1"),
    ],
)
def test_what_stylize_cannot_do_is_said_in_one_line(capsys, tmp_path, frames, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.png").write_bytes((frames / "c.png").read_bytes())
    for name in ("empty", "twins"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (32, 32)).save(tmp_path / "twins" / name)
    code, said, err = run(capsys, "stylize", *arguments, "--device", "cpu")
    assert (code, said) == (1, "")
    assert f"vitfeats: {message}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "styled.png").exists()
    assert not (tmp_path / "styled").exists()


def test_a_stylizer_is_trained_resumed_and_paints(capsys, tmp_path, pictures, images):
    (pictures / "more" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "settings.yaml").write_text(STYLIZER_SETTINGS)
    out = tmp_path / "run"
    settings = [
        *("train-stylizer", "--content", pictures, "--style", pictures / "more", "--out", out, "--method", "adain"),
        *("--config", tmp_path / "settings.yaml", "--held-out", tmp_path / "held_out.txt", "--device", "cpu"),
    ]
    code, said, err = run(capsys, *settings)
    file = out / "stylizer.safetensors"
    assert (code, said) == (0, f"{file}: adain, 2 steps, done; 3 contents, 2 styles\n")
    assert "vitfeats: skipped 'more/broken.png': " in err
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    before = file.read_bytes()
    code, said, _ = run(capsys, *settings, "--resume", "--json")
    facts = json.loads(said)
    assert code == 0
    assert set(facts.pop("failed")) == {"more/broken.png", "broken.png"}
    assert facts.pop("losses") == history[1]
    assert facts == {
        "method": "adain", "out": str(file), "contents": 3, "styles": 2, "steps": 2, "stopped": "done"
    }  # fmt: skip
    assert file.read_bytes() == before
    code, _, err = run(capsys, *settings, "--resume", "--steps", 3)
    assert code == 1
    assert "these differ: steps: 2 there, 3 here" in err
    code, _, err = run(capsys, *settings)
    assert code == 1
    assert "ConfigError: expected a folder without a run" in err
    code, said, _ = run(
        *(capsys, "stylize", images[0], "--style", "pattern:dots", "--style-size", 48, "--size", 32),
        *("--checkpoint", file, "--device", "cpu", "--out", tmp_path / "a.png"),
    )
    assert (code, said) == (0, f"{tmp_path / 'a.png'}: 48×32 pixels\n")


def test_a_stylizer_is_trained_without_a_folder_of_styles(capsys, tmp_path, pictures, monkeypatch):
    usual = style_transfer.usual_styles
    monkeypatch.setattr(
        style_transfer, "usual_styles", lambda given, size: usual(given, patterns_of=2, colourful=3, size=size)
    )
    (tmp_path / "settings.yaml").write_text(STYLIZER_SETTINGS)
    settings = ("--config", tmp_path / "settings.yaml", "--device", "cpu", "--steps", 1, "--json")
    code, said, _ = run(capsys, "train-stylizer", "--content", pictures, "--out", tmp_path / "run", *settings)
    facts = json.loads(said)
    assert (code, facts["method"], facts["contents"], facts["styles"], facts["steps"]) == (0, "adaattn", 4, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--content", "empty"], "ConfigError: expected pictures (.jpg, "),
        (["--content", "none"], "StoreError: expected a folder or a tar file of pictures at"),
        (["--content", "pictures", "--style", "empty"], "ConfigError: expected pictures (.jpg, "),
        (["--content", "pictures", "--held-out", "none.txt"], "StoreError: expected a list of names, one a line, at"),
        (["--content", "pictures", "--config", "chain.yaml"], "ConfigError: expected settings of TrainStylizerConfig"),
        (["--content", "pictures", "--style", "pictures", "--steps", "0"], "ConfigError: expected steps of at least 1"),
    ],
)
def test_what_no_stylizer_can_be_trained_with(capsys, tmp_path, pictures, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, said, err = run(capsys, "train-stylizer", *arguments, "--device", "cpu")
    assert (code, said) == (1, "")
    assert f"vitfeats: {message}" in err
    assert not (tmp_path / "stylizer").exists()


# models ---------------------------------------------------------------------------------------------------------------


def test_models_lists_every_card(capsys):
    code, said, _ = run(capsys, "models")
    assert code == 0
    lines = said.splitlines()
    assert lines[0].split() == ["name", "family", "patch", "dim", "blocks", "tap", "licence"]
    assert [line.split()[0] for line in lines[1:]] == [card.name for card in vf.list_models()]


def test_models_by_pattern_as_json(capsys):
    code, said, _ = run(capsys, "models", "dino_*", "--json")
    assert code == 0
    cards = json.loads(said)
    assert [card["name"] for card in cards] == [card.name for card in vf.list_models("dino_*")]
    assert 0 < len(cards) < len(vf.list_models())
    assert all({"patch", "dim", "depth", "licence"} <= set(card) for card in cards)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("zzz", "vitfeats models lists them all"), ("zzz*", "vitfeats models lists them all"), ("dino", "try '*dino*'")],
)
def test_no_model_of_a_name_is_said_and_ends_with_1(capsys, pattern, hint):
    told = f"vitfeats: no model is called '{pattern}'; {hint}\n"
    assert run(capsys, "models", pattern) == (1, "", told)
    assert run(capsys, "models", pattern, "--json") == (1, "[]\n", told)


# how it ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["extract", "a.png", "--nonsense"],
        ["extract", "a.png", "--size", "large"],
        ["pca", "--foreground", "centre"],
        ["models", "--dtype", "float32"],
        ["extract", "a.png", "--dtype", "float8"],
    ],
)
def test_a_command_that_is_not_understood_ends_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("command", ["extract", "pca", "similarity", "match", "models"])
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--json" in said
    if command != "models":
        assert all(option in said for option in ("--model", "--size", "--stride", "--device", "--tap", "--out"))


def test_interruption_ends_with_130(capsys, monkeypatch):
    def interrupted(_command):
        raise KeyboardInterrupt

    monkeypatch.setitem(entry.RUN, Models, interrupted)
    code, _, err = run(capsys, "models")
    assert (code, err) == (130, "vitfeats: interrupted\n")


def test_the_version_is_told(capsys):
    assert run(capsys, "--version") == (0, f"vitfeats {vf.__version__}\n", "")


@pytest.mark.parametrize(("given", "near"), [("pac", "pca"), ("styliz", "stylize"), ("cosegmnt", "cosegment")])
def test_a_mistyped_command_is_offered_the_nearest(capsys, given, near):
    with pytest.raises(SystemExit) as ended:
        cli.main([given, "a.png"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"vitfeats: expected a command, got '{given}'. Did you mean '{near}'?\n"


def test_missing_weights_are_told_in_words_of_the_command_line(capsys, tmp_path, images, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    code, _, err = run(capsys, "extract", images[0], "--model", "dino_vits8", "--out", tmp_path / "out", *SMALL)
    first, second = err.splitlines()
    assert code == 1
    assert "the hub is switched off (HF_HUB_OFFLINE); pass --checkpoint FILE if you have them elsewhere" in first
    assert "checkpoint=" not in first
    assert second == "vitfeats: see Install, 'Without a network connection', in the documentation"
    page = (Path(__file__).parent.parent / "docs" / "install.md").read_text(encoding="utf-8")
    assert "\n## Without a network connection\n" in page


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("pass checkpoint='FILE' if", "pass --checkpoint FILE if"),
        ("pass checkpoint='a b.pth'; or", "pass --checkpoint a b.pth; or"),
        ("pass checkpoint=", "pass --checkpoint"),
        ("lower size=, batch_size= or tap=", "lower --size, --batch-size or --tap"),
        ("try size=224", "try --size 224"),
        ("got size=-1; give more", "got --size -1; give more"),
        ("pass norm=True; or norm_qk=False", "pass --norm; or --no-norm-qk"),
        # Calls, values that no option has, and settings that the command lacks, stay as they are.
        ("pass size=(h, w) to load", "pass size=(h, w) to load"),
        ("load_extractor('a', checkpoint=FILE)", "load_extractor('a', checkpoint=FILE)"),
        ("resume it (json=True, --resume)", "resume it (json=True, --resume)"),
        ("pass card= and my_size=3", "pass card= and my_size=3"),
    ],
)
def test_settings_in_messages_become_options(capsys, monkeypatch, told, expected):
    def failing(_command):
        raise vf.errors.ConfigError(told)

    monkeypatch.setitem(entry.RUN, Extract, failing)
    assert run(capsys, "extract", "a.png") == (1, "", f"vitfeats: ConfigError: {expected}\n")


def test_help_imports_nothing_heavy():
    code = """
import sys
from vitfeats.cli import main
heavy = {"torch", "timm", "diffusers", "transformers", "matplotlib", "sklearn"}
try:
    main(["--help"])
except SystemExit as ended:
    print(ended.code, *sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0"
    assert all(command in ran.stdout for command in ("extract", "pca", "similarity", "match", "models"))


def test_as_a_module_with_its_exit_code():
    ran = subprocess.run(
        [sys.executable, "-m", "vitfeats.cli", "extract", "--sizes", "3"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert not ran.stdout


def test_one_method_is_trained_the_one_of_the_file_or_of_the_flag(capsys, tmp_path, pictures):
    settings = tmp_path / "settings.yaml"
    settings.write_text("method: sanet\nwidths: [4, 4, 4]\ninner: 4\nsize: 32\nload: 32\nbatch: 2\nsteps: 1\n")
    given = ("train-stylizer", "--content", pictures, "--style", pictures, "--config", settings, "--device", "cpu")
    code, said, _ = run(capsys, *given, "--out", tmp_path / "out", "--json")
    facts = json.loads(said)
    assert (code, facts["method"]) == (0, "sanet")
    assert {"content", "style", "identity"} <= set(facts["losses"])  # the published losses of that method
    code, _, err = run(capsys, *given, "--out", tmp_path / "other", "--method", "adain")
    assert code == 1
    assert f"expected one method, got --method adain and 'sanet' in '{settings}'" in err


# cosegment ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def balls(tmp_path):
    """A folder of three pictures of a chequered ball, one of them in a folder in it."""
    folder = tmp_path / "balls"
    (folder / "more").mkdir(parents=True)
    for seed, (name, (height, width)) in enumerate(
        {"a.png": (64, 80), "b.jpg": (72, 56), "more/c.png": (64, 64)}.items()
    ):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        ball = (y - height * (0.4 + 0.1 * seed)) ** 2 + (x - width / 2) ** 2 < 18**2
        chequers = ((x // 5 + y // 5) % 2)[..., None] * np.array([200, -10, -20]) + np.array([40, 30, 30])
        behind = rng.integers(60, 140, 3) + rng.normal(0, 3, (height, width, 3))
        picture = np.where(ball[..., None], chequers, behind).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / name, quality=95)
    return folder


COSEGMENT = ["cosegment", *SMALL, "--refine", "none"]


def files_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def masks_in(folder) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in (folder / "masks").iterdir()}


def test_cosegment_writes_masks_of_a_folder_and_those_in_it_but_for_broken_files(capsys, tmp_path, balls):
    broken = balls / "more" / "broken.png"
    broken.write_text("not a picture")
    (balls / "notes.txt").write_text("not read")
    out = tmp_path / "new" / "found"
    code, said, err = run(capsys, *COSEGMENT, balls, "--out", out, "--json")
    assert code == 1
    assert err == f"vitfeats: expected an image, but '{broken}' is not one that Pillow can read\n"
    facts = json.loads(said)
    assert facts == {
        "out": str(out / "cosegmentation.json"),
        "model": "mini",
        "tap": "key@11",
        "refined": "none",
        "images": 3,
        "clusters": 40,
        "parts": 0,
        "empty": [],
        "failed": {str(broken): f"expected an image, but '{broken}' is not one that Pillow can read"},
    }
    kinds = ("masks", "cutouts", "overlays")
    expected = {f"{kind}/{name}.png" for kind in kinds for name in "abc"}
    assert files_in(out) == expected | {"cosegmentation.json", "overview.png", "tokens.npz"}
    extractor = vf.load_extractor(size=112, stride=8, device="cpu")
    paths = [balls / "a.png", balls / "b.jpg", balls / "more" / "c.png"]
    wanted = vf.cosegment(paths, model=extractor, config=vf.configs.CosegmentConfig(refine="none"))
    masks = masks_in(out)
    for segment in wanted:
        assert np.array_equal(masks[segment.name], segment.mask * 255)
        assert 0 < segment.share < 0.7
    code, said, err = run(capsys, *COSEGMENT, *paths, "--out", tmp_path / "files", "--seed", 1)
    assert (code, said) == (0, f"{tmp_path / 'files'}: masks of 3 images, none\n")
    assert "reading" in err
    assert "vitfeats" not in err
    assert json.loads((tmp_path / "files" / "cosegmentation.json").read_text())["seed"] == 1


def test_cosegment_does_not_read_what_it_wrote_itself(capsys, monkeypatch, balls):
    monkeypatch.chdir(balls)
    given = [*COSEGMENT, ".", "--json"]
    code, first, _ = run(capsys, *given)
    assert (code, json.loads(first)["out"]) == (0, "cosegmentation/cosegmentation.json")
    names, masks = files_in(balls), masks_in(balls / "cosegmentation")
    assert len(masks) == 3
    assert run(capsys, *given)[:2] == (0, first)
    assert files_in(balls) == names
    again = masks_in(balls / "cosegmentation")
    assert all(np.array_equal(again[name], mask) for name, mask in masks.items())
    # Another folder's masks are pictures like any other.
    code, said, _ = run(
        capsys, "cosegment", ".", "--size", 32, "--device", "cpu", "--refine", "none", "--out", "other", "--json"
    )
    assert (code, json.loads(said)["images"]) == (0, 3 + len([name for name in names if name.startswith("coseg")]) - 2)
    code, said, err = run(capsys, *COSEGMENT, "cosegmentation")
    assert (code, said) == (1, "")
    assert "ConfigError: expected pictures in 'cosegmentation', got only those that an earlier run wrote" in err


def test_cosegment_finds_parts(capsys, tmp_path, balls):
    out = tmp_path / "out"
    code, said, _ = run(capsys, *COSEGMENT, balls, "--out", out, "--parts", 2, "--json")
    facts = json.loads(said)
    assert (code, facts["parts"], facts["images"]) == (0, 2, 3)
    assert {path.name for path in (out / "parts").iterdir()} == {"a.png", "b.png", "c.png"}
    for name, mask in masks_in(out).items():
        parts = np.asarray(Image.open(out / "parts" / f"{name}.png"))
        assert np.array_equal(parts > 0, mask > 0)
        assert set(np.unique(parts)) <= {0, 1, 2}
    code, said, _ = run(capsys, *COSEGMENT, balls, "--out", out, "--parts", 1)
    assert (code, said) == (0, f"{out}: masks of 3 images, 1 part, none\n")


def test_cosegment_takes_a_sample(capsys, tmp_path):
    code, said, err = run(capsys, *COSEGMENT, "--sample", "portraits", "--out", tmp_path / "out", "--json")
    facts = json.loads(said)
    assert (code, err, facts["images"], facts["failed"]) == (0, "", 2, {})
    sizes = [image.size for image in vf.samples.load("portraits")]
    assert [mask.shape[::-1] for _, mask in sorted(masks_in(tmp_path / "out").items())] == sizes


def test_cosegment_takes_settings_of_a_file_and_flags_in_place_of_them(capsys, tmp_path, balls):
    file, out = tmp_path / "settings.yaml", tmp_path / "out"
    file.write_text("preset: reference\nheads: []\nsize: 64\nstride: 16\nevery: 3\nrefine: none\nrestarts: 1\n")
    given = ["cosegment", balls, "--config", file, "--device", "cpu", "--out", out, "--json"]
    code, said, _ = run(capsys, *given)
    written = json.loads((out / "cosegmentation.json").read_text())
    assert (code, json.loads(said)["refined"]) == (0, "none")
    settings = written["settings"]
    assert (settings["foreground"], settings["saliency"], settings["clusters"]) == ("votes", "attention", 0)
    assert (settings["threshold"], settings["heads"], settings["every"], settings["size"]) == (0.065, [], 3, 64)
    with np.load(out / "tokens.npz") as arrays:
        assert [arrays[f"{image}_labels"].shape for image in range(3)] == [(4, 5), (5, 4), (4, 4)]
    code, said, _ = run(capsys, *given, "--refine", "guided", "--size", 96, "--stride", 8, "--outliers", -1)
    settings = json.loads((out / "cosegmentation.json").read_text())["settings"]
    assert (code, json.loads(said)["refined"]) == (0, "guided")
    assert (settings["refine"], settings["size"], settings["stride"], settings["outliers"]) == ("guided", 96, 8, -1)
    assert settings["every"] == 3
    with np.load(out / "tokens.npz") as arrays:
        assert arrays["2_labels"].shape == (11, 11)


@pytest.mark.parametrize(("stride", "rows"), [(None, 13), (16, 7), (8, 13), (4, 25)])
def test_cosegment_overlaps_tokens_unless_there_is_a_stride(capsys, tmp_path, balls, stride, rows):
    out = tmp_path / "out"
    others = [] if stride is None else ["--stride", stride]
    code, _, _ = run(capsys, *COSEGMENT, balls / "more" / "c.png", "--out", out, *others)
    assert code == 0
    with np.load(out / "tokens.npz") as arrays:
        assert arrays["0_labels"].shape == (rows, rows)


@pytest.mark.parametrize("refine", ["guided", "grabcut", "auto"])
def test_cosegment_refines_as_it_is_told(capsys, tmp_path, balls, refine):
    if refine == "grabcut":
        pytest.importorskip("cv2")
    out = tmp_path / "out"
    code, said, _ = run(capsys, "cosegment", balls, *SMALL, "--refine", refine, "--out", out, "--json")
    found = json.loads(said)["refined"]
    assert (code, json.loads((out / "cosegmentation.json").read_text())["refined"]) == (0, found)
    assert found in (("guided", "grabcut") if refine == "auto" else (refine,))


def test_cosegment_says_in_which_images_nothing_was_found(capsys, tmp_path, balls):
    (tmp_path / "settings.yaml").write_text("foreground: votes\nthreshold: 1\n")
    given = [*COSEGMENT, balls, "--config", tmp_path / "settings.yaml", "--out", tmp_path / "out"]
    code, said, _ = run(capsys, *given)
    assert (code, said) == (0, f"{tmp_path / 'out'}: masks of 3 images, none; nothing found in 3 of them\n")
    code, said, _ = run(capsys, *given, "--json")
    assert (code, json.loads(said)["empty"]) == (0, ["a", "b", "c"])
    code, _, err = run(capsys, *given, "--parts", 2)
    assert code == 1
    assert "ConfigError: expected images that share a foreground, but no token is" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ConfigError: expected images, a folder of them, or --sample NAME; for example --sample portraits"),
        (["balls", "--sample", "portraits"], "ConfigError: expected images, a folder of them, or --sample NAME"),
        (["--sample", "portrait"], "ConfigError: expected a sample, got 'portrait'. Did you mean 'portraits'"),
        (["empty"], "ConfigError: expected pictures (.jpg, .jpeg, .png"),
        (["balls", "empty"], "ConfigError: expected pictures (.jpg, .jpeg, .png"),
        (["missing"], "ConfigError: expected images, got none that can be read"),
        (["balls", "--parts", "-1"], "ConfigError: expected num_parts as a whole number from 1 to 100, got -1"),
        (["balls", "--parts", "101"], "ConfigError: expected num_parts as a whole number from 1 to 100, got 101"),
        (["balls", "--seed", "-1"], "ConfigError: expected seed as a whole number from 0 to 2147483647, got -1"),
        (["balls", "--outliers", "2"], "ConfigError: expected outliers of at least -1 and at most 1, got 2.0"),
        (["balls", "--outliers", "1"], "ConfigError: expected --outliers that some image passes, got 1.0"),
        (["balls", "--batch-size", "0"], "ConfigError: expected batch_size as a whole number from 1 to"),
        (["balls", "--stride", "5"], "ShapeError: expected a stride that divides the patch size 16, got 5"),
        (["balls", "--preset", "reference"], "ShapeError: expected heads from 0 to 2 of mini, got (0, 2, 4, 5)"),
        (["balls", "--config", "none.yaml"], "ConfigError: expected settings in YAML at 'none.yaml'"),
        (["balls", "--model", "minni"], "UnknownModelError: expected a model's name"),
        (["balls", "--out", "file"], "StoreError: expected a folder to write to at 'file'"),
    ],
)
def test_what_cosegment_cannot_do_is_said_in_one_line(capsys, tmp_path, balls, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    code, said, err = run(capsys, *COSEGMENT, *arguments)
    assert (code, said) == (1, "")
    assert f"vitfeats: {message}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "cosegmentation").exists()


def test_a_missing_picture_is_named_and_the_others_are_done(capsys, tmp_path, balls):
    missing = tmp_path / "missing"
    code, said, err = run(capsys, *COSEGMENT, missing, balls, "--out", tmp_path / "out", "--json")
    facts = json.loads(said)
    assert (code, facts["images"], list(facts["failed"])) == (1, 3, [str(missing)])
    assert err == f"vitfeats: {facts['failed'][str(missing)]}\n"
    assert str(missing) in err


def test_help_of_cosegment(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["cosegment", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    named = ("--sample", "--out", "--parts", "--preset", "--config", "--refine", "--outliers", "--seed", "--json")
    assert all(option in said for option in (*named, "--batch-size", "--model", "--size", "--stride", "--device"))


# Stores ---------------------------------------------------------------------------------------------------------------


def test_bulk_writes_a_store_goes_on_and_checks_it(capsys, tmp_path, balls):
    (balls / "bad.png").write_bytes(b"no picture")
    out = tmp_path / "store"
    size = ("--size", 32, "--device", "cpu", "--per-shard", 2)
    given = ("bulk", balls, "--out", out, "--tap", "cls@11", *size, "--json")
    code, said, err = run(capsys, *given)
    facts = json.loads(said)
    assert (code, facts["images"], facts["made"]) == (1, 3, 3)
    assert list(facts["broken"]) == ["bad.png"]
    assert "bad.png" in err
    assert run(capsys, "store", "check", out)[:2] == (0, f"{out}: 2 of 2 shards whole\n")
    first = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    damaged = next(out.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-3])
    code, said, _ = run(capsys, "store", "check", out, "--repair", "--json")
    assert (code, len(json.loads(said)["damaged"])) == (1, 1)
    assert not damaged.exists()
    assert json.loads(run(capsys, *given)[1])["made"] in (1, 2)
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == first


@pytest.fixture
def stored(capsys, tmp_path, balls):
    """A store of the balls: tokens and CLS, with vectors of whole images as Parquet."""
    out = tmp_path / "store"
    given = ("--tap", "token@11", "cls@11", "--size", 32, "--device", "cpu", "--per-shard", 2, "--pooled")
    code, _, err = run(capsys, "bulk", balls, "--out", out, *given)
    assert code == 0
    assert re.match(r"3 images; about \d+ kB to write to '.*store'\n", err)
    assert len(list((out / "pooled").glob("*.parquet"))) == 2
    return out


def test_an_image_finds_itself_in_a_store_and_is_shown(capsys, tmp_path, balls, stored):
    picture = tmp_path / "hits.png"
    given = ("store", "search", stored, balls / "b.jpg", "--device", "cpu")
    code, said, _ = run(capsys, *given, "--tap", "cls@11", "--k", 2, "--source", balls, "--out", picture)
    lines = said.splitlines()
    assert code == 0
    assert lines[0].split() == ["1.0000", "b.jpg"]
    assert (len(lines), lines[-1]) == (3, f"wrote {picture}")
    assert Image.open(picture).width > 600
    code, said, _ = run(capsys, *given, "--point", 24, 40, "--json")
    (first, *others) = json.loads(said)["hits"]
    assert (code, first["id"], len(others)) == (0, "b.jpg", 2)
    x, y = first["point"]
    assert abs(x - 24) < 20
    assert abs(y - 40) < 20


def test_an_index_of_a_store_finds_the_same(capsys, balls, stored):
    code, said, _ = run(capsys, "store", "index", stored, "--of", "patches", "--json")
    path = json.loads(said)["out"]
    assert code == 0
    given = ("store", "search", stored, balls / "a.png", "--point", 30, 30, "--device", "cpu")
    assert run(capsys, *given)[1] == run(capsys, *given, "--index", path)[1]


@pytest.mark.parametrize(("to", "name"), [("npy", "images.json"), ("zarr", "zarr.json"), ("parquet", "")])
def test_a_store_is_exported(capsys, tmp_path, stored, to, name):
    out = tmp_path / "exported"
    code, said, _ = run(capsys, "store", "export", stored, "--out", out, "--to", to)
    assert (code, said) == (0, f"wrote {out}\n")
    assert (out / name).is_file()
    code, _, err = run(capsys, "store", "export", stored, "--out", out, "--to", to)
    assert code == 1
    assert "expected a new path" in err


def test_a_search_that_cannot_be_done_is_told(capsys, tmp_path, balls, stored):
    given = ("store", "search", stored, balls / "a.png", "--device", "cpu")
    code, _, err = run(capsys, *given, "--out", tmp_path / "hits.png")
    assert (code, "--source and --out together" in err) == (1, True)
    (balls / "a.png").rename(balls / "other.png")
    code, _, err = run(capsys, "store", "search", stored, balls / "other.png", "--source", balls, "--out", "x.png")
    assert (code, "what the store was made of, but it has no 'a.png'" in err) == (1, True)
    code, _, err = run(capsys, *given[:3], balls / "other.png", "--model", "vgg_mini", "--device", "cpu")
    assert code == 1
    code, _, err = run(capsys, "store", "search", stored, balls)
    assert (code, f"got the folder '{balls}'; give the files in it" in err) == (1, True)
    code, _, err = run(capsys, "store", "search", tmp_path / "none", balls / "b.jpg")
    assert (code, "there is none" in err) == (1, True)
