"""Sources: the same images from folders, lists, tar files and tables, here or at addresses; what is broken is told."""

import errno
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from many import (
    NAMES,
    SIZES,
    WatchedStorage,
    broken_pictures,
    encoded,
    everything,
    failing,
    paint_all,
    pixels_of,
    run,
    shards,
    tarred,
    uploaded,
)
from torch import Tensor

from vitfeats.apps.bulk import Source, open_source, sources
from vitfeats.apps.bulk.store import Store
from vitfeats.errors import ConfigError, ImageError, MissingDependencyError, StoreError

PICTURES = {name: pixels_of(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
FILES = {name: encoded(PICTURES[name]) for name in NAMES}  # in order


@pytest.fixture
def folder(tmp_path) -> Path:
    return paint_all(tmp_path / "pictures")


def table(path: Path, columns: Mapping[str, object], **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **settings)
    return path


def tar_of(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload] - the mode is known at run time only
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def image_of(name: str) -> Tensor:
    return torch.from_numpy(PICTURES[name]).permute(2, 0, 1).float() / 255


def assert_images(source: Source, expected: Mapping[str, str]) -> None:
    """Compare ids, and each image with the picture that it is named after; so of parts, and of what was pickled."""

    def compare(found: Source, ids: list[str]) -> None:
        assert found.ids == ids
        assert len(found) == len(ids)
        for number, name in enumerate(ids):
            assert torch.equal(found.image(number), image_of(expected[name])), name

    ids = list(expected)
    compare(source, ids)
    assert repr(source) == f"{type(source).__name__}({len(ids)} images)"
    compare(pickle.loads(pickle.dumps(source)), ids)
    for start, stop in ((0, 2), (2, 3), (3, 100), (5, 5)):
        part = source.part(start, stop)
        assert type(part) is type(source)
        compare(part, ids[start:stop])
        compare(pickle.loads(pickle.dumps(part)), ids[start:stop])
    compare(source.part(1, 6).part(2, 4), ids[3:5])


# What each kind of source lays below a folder; it returns what is to be opened in there, and the picture of each id.
Kind = Callable[[Path], tuple[str, dict[str, str]]]


def a_folder(root: Path) -> tuple[str, dict[str, str]]:
    paint_all(root / "pictures")
    return "pictures", {name: name for name in NAMES}


def a_tar_file(root: Path) -> tuple[str, dict[str, str]]:
    # Not in order, in a folder of its own, and with what is no picture.
    members = {f"./{name}": FILES[name] for name in reversed(NAMES)} | {"notes.md": b"no picture", "a/one.json": b"{}"}
    tar_of(root / "pictures.tar", members)
    return "pictures.tar", {name: name for name in NAMES}


def tar_files(root: Path) -> tuple[str, dict[str, str]]:
    """Lay three of WebDataset's shards: each picture beside what belongs to it."""
    expected = {}
    for number, names in enumerate((NAMES[:3], NAMES[3:4], NAMES[4:])):
        members = {}
        for place, name in enumerate(names):
            members |= {f"{place:04}.json": json.dumps({"of": name}).encode(), f"{place:04}.png": FILES[name]}
            members |= {f"{place:04}.cls": b"1"}
            expected[f"{number}.tar/{place:04}.png"] = name
        tar_of(root / "tars" / f"{number}.tar", members)
    (root / "tars" / "notes.md").write_text("no tar file")
    return "tars", expected


def tar_files_by_pattern(root: Path) -> tuple[str, dict[str, str]]:
    _, expected = tar_files(root)
    tar_of(root / "tars" / "other-0.TAR", {"other.png": FILES["z.png"]})
    return "tars/*", expected | {"other-0.TAR/other.png": "z.png"}


def tar_files_by_narrow_pattern(root: Path) -> tuple[str, dict[str, str]]:
    _, expected = tar_files(root)
    return "tars/1*.tar", {name: of for name, of in expected.items() if name.startswith("1.tar")}


def a_table_of_bytes(root: Path) -> tuple[str, dict[str, str]]:
    columns = {"label": range(7), "jpg": FILES.values(), "key": [f"k{9 - n}" for n in range(7)]}
    table(root / "one.parquet", {name: list(values) for name, values in columns.items()}, row_group_size=3)
    return "one.parquet", {f"k{9 - number}": name for number, name in enumerate(NAMES)}


def a_table_of_structs(root: Path) -> tuple[str, dict[str, str]]:
    """Lay Hugging Face's form: bytes, or a path where there are none."""
    rows = [{"bytes": data, "path": "somewhere else"} for data in FILES.values()]
    (root / "beside").mkdir(parents=True)
    (root / "beside" / "z.png").write_bytes(FILES["z.png"])
    rows[-1] = {"bytes": None, "path": "beside/z.png"}
    table(root / "data.pq", {"image": rows})
    return "data.pq", {f"data.pq:{number}": name for number, name in enumerate(NAMES)}


def a_table_of_paths(root: Path) -> tuple[str, dict[str, str]]:
    paint_all(root / "deep" / "pictures")
    table(root / "deep" / "T.Parquet", {"file_name": [f"pictures/{name}" for name in NAMES]}, row_group_size=2)
    return "deep/T.Parquet", {f"T.Parquet:{number}": name for number, name in enumerate(NAMES)}


def tables(root: Path) -> tuple[str, dict[str, str]]:
    """Lay tables of one name in two folders, one of no rows, one that calls its images."""
    lay = {"train/0.parquet": NAMES[:3], "test/0.parquet": NAMES[3:5], "valid/0.parquet": []}
    expected = {}
    for path, names in sorted(lay.items()):
        images = pa.array([FILES[name] for name in names], pa.binary())
        table(root / "tables" / path, {"image": images}, row_group_size=2)
        expected |= {f"{path}:{number}": name for number, name in enumerate(names)}
    columns = {"id": [8, 9], "image": [FILES[name] for name in NAMES[5:]]}
    table(root / "tables" / "z.parquet", columns)
    return "tables", expected | dict(zip("89", NAMES[5:], strict=True))


def tables_by_pattern(root: Path) -> tuple[str, dict[str, str]]:
    for number, name in enumerate(NAMES):
        table(root / "tables" / f"part-{number}.parquet", {"image": [FILES[name]]})
    table(root / "tables" / "other.parquet", {"text": ["no picture"]})
    return "tables/part-*.parquet", {f"part-{number}.parquet:0": name for number, name in enumerate(NAMES)}


KINDS = [
    *(a_folder, a_tar_file, tar_files, tar_files_by_pattern, tar_files_by_narrow_pattern),
    *(a_table_of_bytes, a_table_of_structs, a_table_of_paths, tables, tables_by_pattern),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", ["path", "text", "relative", "file://", "memory://"])
def test_every_kind_of_source_gives_the_images_in_order(tmp_path, bucket, monkeypatch, kind: Kind, where):
    name, expected = kind(tmp_path / "data")
    if where == "memory://":
        source: Path | str = f"{uploaded(tmp_path / 'data', f'memory://{bucket}/data')}/{name}"
        shutil.rmtree(tmp_path / "data")
    elif where == "relative":
        monkeypatch.chdir(tmp_path)
        source = f"data/{name}"
    else:
        path = tmp_path / "data" / name
        source = path if where == "path" else f"{where}{path}" if where == "file://" else str(path)
    found = open_source(source)
    if where == "relative":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")  # as of a worker that runs elsewhere
    assert_images(found, expected)


@pytest.mark.parametrize("kind", [a_folder, tar_files, tables], ids=lambda kind: kind.__name__)
def test_a_slash_at_the_end_of_an_address_changes_nothing(tmp_path, bucket, kind: Kind):
    name, expected = kind(tmp_path)
    address = uploaded(tmp_path, f"memory://{bucket}")
    assert_images(open_source(f"{address}/{name}/"), expected)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["pictures.tar", "pictures.tar.{}", "pictures.tgz"])
def test_a_tar_file_that_is_compressed_gives_the_images_in_order(folder, tmp_path, mode, name):
    packed = tarred(folder, tmp_path / name.format(mode), f"w:{mode}")
    assert_images(open_source(packed), {name: name for name in NAMES})


def test_a_tar_file_that_is_named_as_if_it_were_compressed_is_read(folder, tmp_path):
    assert_images(open_source(tarred(folder, tmp_path / "pictures.tar.gz")), {name: name for name in NAMES})


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_list_names_paths_and_addresses(folder, tmp_path, bucket, monkeypatch, ending):
    address = uploaded(folder, f"memory://{bucket}")
    lines = {
        "a/one.png": "a/one.png",
        "./six.png": "six.png",
        f"{folder}/z.png": "z.png",
        f"file://{folder}/a/two.png": "a/two.png",
        f"{address}/b/c/three.png": "b/c/three.png",
        f"{address}/five.png": "five.png",
        "four.png": "four.png",
    }
    listed = folder / "list.LST"
    listed.write_bytes(ending.join(["", *(f"  {line} " for line in lines), ""]).encode())
    found = open_source(listed)
    monkeypatch.chdir(tmp_path)
    assert_images(found, dict(sorted(lines.items())))


def test_a_list_may_lie_at_an_address_with_what_it_names(folder, bucket):
    (folder / "list.txt").write_text("\n".join(NAMES))
    listed = uploaded(folder, f"memory://{bucket}") + "/list.txt"
    assert_images(open_source(listed), {name: name for name in NAMES})


def test_a_source_is_taken_as_it_is(folder):
    source = open_source(folder)
    assert open_source(source) is source


def test_a_table_names_images_by_address_and_by_whole_path(folder, tmp_path, bucket):
    address = uploaded(folder, f"memory://{bucket}")
    places = [f"{address}/a/one.png", f"file://{folder}/a/two.png", f"{folder}/b/c/three.png", "pictures/five.png"]
    names = ["a/one.png", "a/two.png", "b/c/three.png", "five.png"]
    expected = {f"one.parquet:{number}": name for number, name in enumerate(names)}
    one = table(tmp_path / "one.parquet", {"url": places})
    assert_images(open_source(one), expected)
    structs = [{"bytes": None, "path": place} for place in places]
    assert_images(open_source(table(tmp_path / "one.parquet", {"image": structs})), expected)
    packed = pa.array(places).dictionary_encode()
    assert_images(open_source(table(tmp_path / "one.parquet", {"path": packed})), expected)


def test_columns_are_found_by_their_usual_names_or_as_told(tmp_path):
    columns = {"__key__": ["x"], "picture": [FILES["six.png"]], "png": [FILES["z.png"]], "code": [7]}
    one = table(tmp_path / "one.parquet", columns)
    assert_images(open_source(one), {"x": "z.png"})
    assert_images(open_source(one, image_column="picture"), {"x": "six.png"})
    assert_images(open_source(one, id_column="code"), {"7": "z.png"})
    assert_images(open_source(one, image_column="picture", id_column="code"), {"7": "six.png"})


def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path):
    table(tmp_path / "tables" / "0.parquet", {"photo": [FILES["z.png"]], "code": [7]})
    told = r"'.*0\.parquet', got the columns photo, code; name it with "
    for source in (tmp_path / "tables", tmp_path / "tables" / "0.parquet", tmp_path / "tables" / "*.parquet"):
        with pytest.raises(ConfigError, match=f"expected a column of images in {told}image_column="):
            open_source(source)
        with pytest.raises(ConfigError, match=f"expected a column of 'img' in {told}image_column="):
            open_source(source, image_column="img")
        with pytest.raises(ConfigError, match=f"expected a column of 'name' in {told}id_column="):
            open_source(source, image_column="photo", id_column="name")
    table(tmp_path / "tables" / "1.parquet", {"image": [FILES["z.png"]]})
    with pytest.raises(ConfigError, match=r"expected a column of 'photo' in '.*1\.parquet', got the columns image"):
        open_source(tmp_path / "tables", image_column="photo")
    table(tmp_path / "tables" / "0.parquet", {"jpg": [FILES["z.png"]]})
    with pytest.raises(ConfigError, match=r"expected a column of 'jpg' in '.*1\.parquet', got the columns image"):
        open_source(tmp_path / "tables")


def test_rows_without_an_image_are_broken_and_the_others_are_not(tmp_path):
    rows = [{"bytes": None, "path": None}, None, {"bytes": b"", "path": None}, {"bytes": FILES["z.png"], "path": None}]
    source = open_source(table(tmp_path / "one.parquet", {"image": rows}, row_group_size=3))
    for number in (0, 1):
        told = rf"expected an image in row {number} of row group 0 of '.*one\.parquet', got none"
        with pytest.raises(ImageError, match=told):
            source.image(number)
    with pytest.raises(ImageError, match="expected a picture, but its format is none that is known"):
        source.image(2)
    assert torch.equal(source.image(3), image_of("z.png"))
    for values in ([None, FILES["z.png"]], [None, str(tmp_path / "none.png")]):
        source = open_source(table(tmp_path / "two.parquet", {"image": values}))
        with pytest.raises(ImageError, match="row 0 of row group 0 of '.*', got none"):
            source.image(0)


@pytest.mark.parametrize(
    ("values", "kind"), [([7], "int"), ([[b"x"]], "list"), ([{"path": 3}], "int"), ([{"other": "x"}], None)]
)
def test_a_column_of_no_images_is_told(tmp_path, values, kind):
    source = open_source(table(tmp_path / "one.parquet", {"image": values}))
    got = "none" if kind is None else f"a value of type {kind}"
    with pytest.raises(ImageError, match=f"expected an image in row 0 of row group 0 of '.*', got {got}$"):
        source.image(0)


def test_a_table_that_was_written_anew_is_read_anew(tmp_path):
    one = tmp_path / "one.parquet"
    for name in ("z.png", "six.png"):
        assert_images(open_source(table(one, {"image": [FILES[name]]})), {"one.parquet:0": name})


def test_a_folder_that_is_named_like_a_table_is_a_folder(tmp_path):
    """Other programs write a table as a folder of that name."""
    table(tmp_path / "one.parquet" / "part-0.parquet", {"image": [FILES["z.png"]]})
    assert_images(open_source(tmp_path / "one.parquet"), {"part-0.parquet:0": "z.png"})


def test_pictures_of_a_folder_come_before_tar_files_and_these_before_tables(tmp_path):
    table(tmp_path / "a.parquet", {"image": [FILES["z.png"]]})
    assert open_source(tmp_path).ids == ["a.parquet:0"]
    tar_of(tmp_path / "b.tar", {"six.png": FILES["six.png"]})
    assert open_source(tmp_path).ids == ["b.tar/six.png"]
    (tmp_path / "five.png").write_bytes(FILES["five.png"])
    assert open_source(tmp_path).ids == ["five.png"]


def test_ids_that_come_twice_are_refused(tmp_path, bucket):
    image = FILES["z.png"]
    (tmp_path / "list.txt").write_text("a.png\nb.png\n a.png\n")
    twice = [
        table(tmp_path / "one.parquet", {"id": [1, 1], "image": [image] * 2}),
        table(tmp_path / "nulls.parquet", {"id": pa.array([None, None], pa.string()), "image": [image] * 2}),
        table(tmp_path / "tables" / "0.parquet", {"key": ["k"], "image": [image]}).parent,
        tar_of(tmp_path / "twice.tar", {"z.png": image, "./z.png": image}),
        tmp_path / "list.txt",
    ]
    table(tmp_path / "tables" / "1.parquet", {"key": ["k"], "image": [image]})
    address = uploaded(tmp_path, f"memory://{bucket}")
    for source in (*twice, *(f"{address}/{path.name}" for path in twice)):
        with pytest.raises(ConfigError, match=f"expected images of different names in '{source}', got some twice"):
            open_source(source)


def test_sources_without_images_are_refused(tmp_path, bucket):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no picture")
    tar_of(tmp_path / "empty.tar", {"notes.md": b"no picture"})
    table(tmp_path / "empty.parquet", {"image": pa.array([], pa.binary())})
    (tmp_path / "empty.txt").write_text(" \n\n")
    tar_of(tmp_path / "tars" / "0.tar", {})
    names = ["empty", "empty.tar", "empty.parquet", "empty.txt", "tars", "tars/*.tar", "tars/*.parquet", "empty*.md"]
    address = uploaded(tmp_path, f"memory://{bucket}")
    for source in (*(f"{tmp_path}/{name}" for name in names), *(f"{address}/{name}" for name in names)):
        with pytest.raises(ConfigError, match="expected images in '.*', got none") as told:
            open_source(source)
        assert f"'{source}'" in str(told.value)
    with pytest.raises(ConfigError, match="expected images in 'memory://none/at/all', got none"):
        open_source("memory://none/at/all")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("text.tar", "expected a folder or a tar file of pictures at '{}', but"),
        ("none.tar", "expected a folder or a tar file of pictures at '{}', but"),
        ("cut.tar", "expected a folder or a tar file of pictures at '{}', but"),
        ("folder", "expected a folder or a tar file of pictures at '{}/text.tar', but"),
        ("text.parquet", "expected a Parquet table at '{}', but"),
        ("none.parquet", "expected a Parquet table at '{}', but"),
        ("cut.parquet", "expected a Parquet table at '{}', but"),
        ("none.txt", "expected a list of images, one a line, at '{}', but"),
        ("bytes.txt", "expected a list of images, one a line, at '{}', but"),
    ],
)
@pytest.mark.parametrize("where", ["here", "memory"])
def test_sources_that_cannot_be_read_are_refused(tmp_path, bucket, name, told, where):
    tar_of(tmp_path / "cut.tar", FILES)
    table(tmp_path / "cut.parquet", {"image": list(FILES.values())})
    for cut in ("cut.tar", "cut.parquet"):
        whole = (tmp_path / cut).read_bytes()
        (tmp_path / cut).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder").mkdir()
    for text in ("text.tar", "text.parquet", "folder/text.tar"):
        (tmp_path / text).write_text("neither a tar file nor a table")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\n")
    address = uploaded(tmp_path, f"memory://{bucket}")
    source = f"{tmp_path if where == 'here' else address}/{name}"
    with pytest.raises(StoreError) as error:
        open_source(source)
    assert str(error.value).startswith(told.format(source))


def test_a_pattern_in_a_folder_or_in_no_folder_is_refused(tmp_path, bucket):
    for start in (tmp_path, f"memory://{bucket}"):
        told = r"expected \* in the last part of the path only, got '.*/\*/a\.tar'; give the folder instead"
        with pytest.raises(ConfigError, match=told):
            open_source(f"{start}/*/a.tar")
        with pytest.raises(StoreError, match="expected a folder at '.*none', but"):
            open_source(f"{start}/none/*.tar")


def test_a_compressed_tar_file_at_an_address_is_refused(folder, tmp_path, bucket):
    (tmp_path / "packed").mkdir()
    tarred(folder, tmp_path / "packed" / "a.tar.gz", "w:gz")
    address = uploaded(tmp_path / "packed", f"memory://{bucket}")
    with pytest.raises(ConfigError, match=r"parts can be read, got the compressed '.*a\.tar\.gz'; unpack it"):
        open_source(f"{address}/a.tar.gz")


def test_a_missing_package_is_told_with_the_line_that_installs_it(tmp_path, monkeypatch):
    one = table(tmp_path / "one.parquet", {"image": [FILES["z.png"]]})
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    told = r'expected pyarrow to read Parquet, but it is not installed; try: pip install "vitfeats\[bulk\]"$'
    for source in (one, tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(MissingDependencyError, match=told):
            open_source(source)


def test_ids_of_a_table_that_cannot_be_read_are_told(tmp_path):
    names = [f"{number:032}" for number in range(2000)]
    one = table(tmp_path / "one.parquet", {"id": names, "image": [b""] * 2000}, compression="zstd")
    content = bytearray(one.read_bytes())
    content[4:2000] = bytes(1996)  # the pages, not what tells where they are
    one.write_bytes(content)
    with pytest.raises(StoreError, match=r"expected ids in 'id' of '.*one\.parquet', but they cannot be read"):
        open_source(one)


@pytest.mark.parametrize("kind", [a_tar_file, a_table_of_bytes], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", ["here", "memory"])
def test_no_image_is_broken_where_the_file_around_it_is_gone(tmp_path, bucket, kind: Kind, where):
    name, _ = kind(tmp_path / "data")
    address = uploaded(tmp_path / "data", f"memory://{bucket}")
    source = open_source(tmp_path / "data" / name if where == "here" else f"{address}/{name}")
    shutil.rmtree(tmp_path / "data")
    WatchedStorage.store.pop(f"/{bucket}/{name}")
    with pytest.raises(StoreError, match=f"'.*{name}'"):
        source.image(1)


# Runs: broken images, and storage that fails.


def holding(kind: str, root: Path, files: Mapping[str, bytes]) -> str:
    """Lay files in a source of a kind; return its name in the folder."""
    if kind in ("folder", "list", "paths"):
        for name, data in files.items():
            (root / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "files" / name).write_bytes(data)
    if kind == "list":
        (root / "list.txt").write_text("\n".join(f"{root}/files/{name}" for name in files))
        return "list.txt"
    if kind == "paths":
        table(root / "a.parquet", {"id": list(files), "path": [f"files/{name}" for name in files]}, row_group_size=2)
        return "a.parquet"
    if kind in ("bytes", "structs"):
        data = [*files.values()] if kind == "bytes" else [{"bytes": one, "path": ""} for one in files.values()]
        table(root / "a.parquet", {"id": list(files), "image": data}, row_group_size=2)
        return "a.parquet"
    if kind.startswith("tar"):
        return tar_of(root / "a.tar", files, "w:gz" if kind == "tar.gz" else "w").name
    return "files"


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *(("here", kind) for kind in ("folder", "list", "tar", "tar.gz", "bytes", "structs", "paths")),
        *(("memory", kind) for kind in ("folder", "tar", "bytes", "structs", "paths")),
    ],
)
def test_eight_kinds_of_broken_images_are_noted_in_every_kind_of_source(mini, tmp_path, bucket, kind, where):
    whole = {"b.png": FILES["z.png"], "six.png": FILES["six.png"]}
    name = holding(kind, tmp_path / "data", dict(sorted({**broken_pictures(), **whole}.items())))
    address = uploaded(tmp_path / "data", f"memory://{bucket}")
    source = f"{tmp_path / 'data' if where == 'here' else address}/{name}"
    summary = run(mini, source, tmp_path / "out", taps=["key@0"], per_shard=4)
    start = f"{tmp_path}/data/files/" if kind == "list" else ""
    assert sorted(summary.broken) == sorted(f"{start}{name}" for name in broken_pictures())
    assert len(summary.broken) == 8
    assert all(why.startswith("expected ") for why in summary.broken.values())
    assert "PostScript" in summary.broken[f"{start}program.png"]
    assert [name for name, _ in Store(tmp_path / "out").each()] == [f"{start}b.png", f"{start}six.png"]
    assert list(Store(tmp_path / "out").check()) == []


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("kind", "reads", "error"),
    [
        ("folder", 5, ConnectionError("gone")),
        ("tar", 5, TimeoutError("too late")),
        ("bytes", 2, PermissionError("no more")),
        ("paths", 6, RuntimeError("out of order")),
    ],
)
def test_a_storage_that_fails_stops_the_run_and_no_image_is_noted(mini, tmp_path, bucket, kind, reads, error):
    settings = {"taps": ["key@0"], "per_shard": 2, "workers": 1}
    name = holding(kind, tmp_path / "data", {**FILES, "broken.png": b"no picture"})
    address = uploaded(tmp_path / "data", f"watched://{bucket}")
    source = open_source(f"{address}/{name}")
    run(mini, source, tmp_path / "whole", **settings)
    source = open_source(f"{address}/{name}")
    with failing(error, reads=reads), pytest.raises(StoreError, match=f"'.*{bucket}.*: {error}"):
        run(mini, source, tmp_path / "out", **settings)
    left = shards(tmp_path / "out")
    assert left.items() < shards(tmp_path / "whole").items()
    assert set(Store(tmp_path / "out").broken()) <= {"broken.png"}
    run(mini, source, tmp_path / "out", **settings)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert list(Store(tmp_path / "out").broken()) == ["broken.png"]


@pytest.mark.parametrize("name", ["pictures", "pictures.tar", "pictures.parquet", "pictures.txt", "tars/*.tar"])
def test_a_storage_that_fails_when_it_is_opened_is_told(tmp_path, bucket, monkeypatch, name):
    paint_all(tmp_path / "data" / "pictures")
    tar_of(tmp_path / "data" / "pictures.tar", FILES)
    table(tmp_path / "data" / "pictures.parquet", {"image": list(FILES.values())})
    (tmp_path / "data" / "pictures.txt").write_text("z.png")
    address = uploaded(tmp_path / "data", f"watched://{bucket}")

    def fail(*given, **settings):
        raise TimeoutError("too late")

    monkeypatch.setattr(WatchedStorage, "find", fail)
    monkeypatch.setattr(WatchedStorage, "ls", fail)
    with failing(TimeoutError("too late"), reads=0), pytest.raises(StoreError, match=f"'{address}.*: too late"):
        open_source(f"{address}/{name}")


def test_a_file_that_is_gone_from_an_address_is_a_broken_image(mini, folder, tmp_path, bucket):
    address = uploaded(folder, f"memory://{bucket}")
    source = open_source(address)
    WatchedStorage.store.pop(f"/{bucket}/four.png")
    summary = run(mini, source, tmp_path / "out", taps=["key@0"])
    assert summary.broken == {"four.png": f"expected an image at '{address}/four.png', but there is no such file"}


def test_names_that_are_no_text_are_ids(folder, tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    shutil.copy(folder / "z.png", folder / odd)
    for source in (folder, tarred(folder, tmp_path / "a.tar"), tarred(folder, tmp_path / "b.tar.gz", "w:gz")):
        found = open_source(source)
        assert np.array_equal(found.image(found.ids.index(odd)), image_of("z.png"))


def test_an_address_of_an_unknown_kind_is_refused():
    with pytest.raises(StoreError, match="expected an address that fsspec knows, got 'nosuch://bucket/pictures': "):
        open_source("nosuch://bucket/pictures")


def test_an_address_whose_package_is_missing_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    told = r"expected what fsspec needs for s3://, but it is not installed \(.*\); try: pip install s3fs$"
    for name in ("pictures", "pictures.tar", "tars/*.tar", "list.txt", "a.parquet"):
        with pytest.raises(MissingDependencyError, match=told):
            open_source(f"s3://bucket/{name}")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_is_no_image_s_fault(mini, folder, tmp_path, monkeypatch, number):
    source, stat, out = open_source(folder), os.stat, tmp_path / "out"

    def failing_stat(path, *given, **settings):
        if str(path).endswith("six.png"):
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, *given, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("vitfeats.preprocess.os.stat", failing_stat)
        with pytest.raises(StoreError, match=f"expected a disk that can be read, but: .*{os.strerror(number)}"):
            run(mini, source, out)
        with pytest.raises(StoreError, match="expected a folder of images at '.*pictures', but: "):
            open_source(folder)
    assert Store(out).broken() == {}
    assert run(mini, folder, out).broken == {}


def test_a_folder_that_is_gone_is_no_image_s_fault(mini, folder, tmp_path):
    source = open_source(folder)
    run(mini, source, tmp_path / "out")
    Store(tmp_path / "out").shard_path(1).unlink()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="expected the folder '.*pictures' where it was, but it is gone"):
        run(mini, source, tmp_path / "out")
    (tmp_path / "elsewhere").rename(folder)
    assert run(mini, source, tmp_path / "out").broken == {}


def test_a_pattern_may_be_of_pictures(folder):
    assert_images(open_source(folder / "*.png"), {name: name for name in NAMES if "/" not in name})


def test_a_part_names_only_the_files_that_it_uses(folder, tmp_path):
    (tmp_path / "tars").mkdir()
    for number in range(4):
        tarred(folder, tmp_path / "tars" / f"{number}.tar")
    whole = open_source(tmp_path / "tars")
    part = whole.part(len(NAMES) * 2, len(NAMES) * 3)
    assert [Path(file).name for file in part.files] == ["2.tar"]
    assert_images(part, {f"2.tar/{name}": name for name in NAMES})
    assert len(whole.part(0, 0)) == 0


def test_a_row_group_is_read_once_by_several_threads(tmp_path, monkeypatch):
    made = table(tmp_path / "t.parquet", {"image": [FILES[name] for name in NAMES]}, row_group_size=2)
    source = open_source(made)
    read, group_of = [], sources._group_of

    def slowly(*key):
        read.append(key[1])
        time.sleep(0.05)
        return group_of(*key)

    monkeypatch.setattr(sources, "_group_of", slowly)
    with ThreadPoolExecutor(7) as pool:
        list(pool.map(source.image, range(2)))
    assert read == [0]
    monkeypatch.setattr(sources._groups, "most", 4)
    with ThreadPoolExecutor(7) as pool:
        for _ in range(3):
            list(pool.map(source.image, range(7)))
    assert sorted(read) == [0, 1, 2, 3]


def test_an_id_that_repeats_is_named(tmp_path):
    made = table(tmp_path / "t.parquet", {"id": ["a", "b", "a"], "image": [FILES["z.png"]] * 3})
    with pytest.raises(ConfigError, match="got some twice, 'a' among them; name another column with id_column="):
        open_source(made)
