"""Exports: the numbers of the store, whole or not there, for NumPy, Zarr and Parquet."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import describe, random_descriptor

from vitfeats.apps.bulk import create_store, extract, write_shard
from vitfeats.apps.bulk import exports as module
from vitfeats.apps.bulk.exports import export_npy, export_parquet, export_zarr, pooled_table
from vitfeats.apps.bulk.store import Store
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed; the extra `bulk` has it")
zarr = pytest.importorskip("zarr", reason="zarr is not installed; the extra `zarr` has it")
pq = pytest.importorskip("pyarrow.parquet")

SETTINGS = {"model": "synthetic", "taps": ["key@1", "token@0", "cls@2"], "size": 112}
GRIDS = [(2, 3), (4, 1), (3, 3), (1, 1), (2, 3), (5, 2), (2, 3), (3, 4)]
IDS = [f"{number}.png" for number in range(len(GRIDS))]
BROKEN = {"1.png": "it is cut off", "6.png": "it is no picture", "7.png": "it is no picture"}  # 6 and 7 are a shard
READ = [name for name in IDS if name not in BROKEN]
EXPORTS = {"npy": export_npy, "zarr": export_zarr, "parquet": export_parquet}


def of_image(name: str, grids=GRIDS, factor: float = 1.0) -> Descriptors:
    """Return three taps of an image: two grids of different sizes and channels, and a single token."""
    number = int(name.split(".")[0])
    rows, cols = grids[number]
    facts = {"source": (70 + number, 90)}
    key = random_descriptor(number, rows, cols, 6, **facts)
    token = random_descriptor(100 + number, rows + 1, cols, 5, tap="token@0", **facts)
    cls = random_descriptor(200 + number, 1, 1, 7, tap="cls@2", **facts)
    return Descriptors([(str(d.tap), replace(d, features=d.features * factor)) for d in (key, token, cls)])


def make(
    path: Path | str, ids=IDS, per_shard: int = 3, dtype="float32", broken=BROKEN, grids=GRIDS, factor: float = 1.0
) -> Store:
    store = create_store(path, ids, SETTINGS, per_shard)
    for number in range(store.shards):
        names = store.ids_of(number)
        images = [(name, of_image(name, grids, factor)) for name in names if name not in broken]
        bad = {name: broken[name] for name in names if name in broken}
        write_shard(store.shard_path(number), images, settings=SETTINGS, dtype=dtype, broken=bad)
    return store


@pytest.fixture
def store(tmp_path) -> Store:
    """A store of 8 images in shards of 3, 3 and 2; the last has broken images alone."""
    return make(tmp_path / "store")


def beside(store: Store) -> set[str]:
    """Return what lies beside a store, hidden files among it."""
    return {path.name for path in store.path.parent.iterdir()}


def rounded(features: torch.Tensor, dtype: str) -> np.ndarray:
    return features[0].numpy().astype(dtype)


def from_npy(path: Path, tap: str, place: int) -> tuple[np.ndarray, list[int], list[int]]:
    arrays = {name: np.load(path / f"{tap}.{name}.npy") for name in ("offsets", "grids", "sizes")}
    features = np.load(path / f"{tap}.npy", mmap_mode="r")
    start, stop = arrays["offsets"][place : place + 2]
    assert arrays["offsets"][-1] == len(features)
    return np.array(features[start:stop]), arrays["grids"][place].tolist(), arrays["sizes"][place].tolist()


def from_zarr(path: Path, tap: str, place: int) -> tuple[np.ndarray, list[int], list[int]]:
    group = zarr.open(path, mode="r")[tap]
    start, stop = group["offsets"][place : place + 2]
    assert group["offsets"][-1] == group["features"].shape[0]
    return group["features"][start:stop], group["grids"][place].tolist(), group["sizes"][place].tolist()


READERS = {"npy": from_npy, "zarr": from_zarr}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("stored", ["float32", "float16", "int8"])
def test_arrays_have_the_numbers_of_the_store(tmp_path, kind, dtype, stored):
    store = make(tmp_path / "store", dtype=stored)
    assert EXPORTS[kind](store, tmp_path / "out", dtype=dtype) == tmp_path / "out"
    for place, name in enumerate(READ):
        for tap, d in store[name].items():
            numbers, grid, size = READERS[kind](tmp_path / "out", str(tap), place)
            assert numbers.dtype == dtype
            assert np.array_equal(numbers, rounded(d.features, dtype))
            assert grid == [d.grid.rows, d.grid.cols]
            assert tuple(size) == d.frames[0].source_size
    assert beside(store) == {"store", "out"}


def test_numpy_files_are_those_that_are_described(store, tmp_path):
    export_npy(store, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    ends = ("npy", "offsets.npy", "grids.npy", "sizes.npy")
    assert files == {f"{tap}.{end}" for tap in SETTINGS["taps"] for end in ends} | {"images.json"}
    tokens = sum(rows * cols for name, (rows, cols) in zip(IDS, GRIDS, strict=True) if name in READ)
    assert np.load(tmp_path / "out" / "key@1.npy").shape == (tokens, 6)
    types = {end: np.load(tmp_path / "out" / f"key@1.{end}").dtype.name for end in ends}
    assert types == {"npy": "float16", "offsets.npy": "int64", "grids.npy": "int32", "sizes.npy": "int32"}
    facts = json.loads((tmp_path / "out" / "images.json").read_text())
    assert facts == {"ids": READ, "taps": SETTINGS["taps"], "settings": SETTINGS, "broken": BROKEN}


@pytest.mark.parametrize("dim", [1, 9, 10, 99, 100, 1024])
@pytest.mark.parametrize("count", [1, 99, 100, 1001])
def test_a_header_that_is_written_again_takes_the_same_room(tmp_path, dim, count):
    lengths = []
    for rows in (0, count):
        with (tmp_path / "header").open("wb") as file:
            module._write_header(file, (rows, dim), "float16")
            lengths.append(file.tell())
    assert lengths[0] == lengths[1]


def test_grids_of_one_size_give_the_usual_layout(tmp_path):
    store = make(tmp_path / "store", grids=[(2, 3)] * 8)
    export_npy(store, tmp_path / "out", dtype="float32")
    features = np.load(tmp_path / "out" / "key@1.npy").reshape(len(READ), 2, 3, 6)
    for number, name in enumerate(READ):
        assert np.array_equal(features[number], store[name]["key@1"].map[0].permute(1, 2, 0).numpy())


def test_a_zarr_group_has_ids_and_facts(store, tmp_path):
    export_zarr(store, tmp_path / "out")
    root = zarr.open(tmp_path / "out", mode="r")
    assert root.metadata.zarr_format == 3
    assert dict(root.attrs) == {"taps": SETTINGS["taps"], "settings": SETTINGS, "broken": BROKEN}
    assert root["ids"][:].tolist() == READ
    assert {name for name, _ in root.members()} == {"ids", *SETTINGS["taps"]}
    assert {name for name, _ in root["key@1"].members()} == {"features", "offsets", "grids", "sizes"}
    types = {name: array.dtype.name for name, array in root["key@1"].members()}
    assert root["key@1/features"].compressors == ()
    assert types == {"features": "float16", "offsets": "int64", "grids": "int32", "sizes": "int32"}


@pytest.mark.parametrize(("chunk", "size"), [(1, 1), (1, 400), (200, 250), (100, 10**6), (10**6, 10**6)])
def test_zarr_files_are_written_once_and_whole(store, tmp_path, monkeypatch, chunk, size):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    monkeypatch.setattr(module, "_FILE", size)
    written: list[tuple[int, int]] = []
    write = zarr.Array.__setitem__

    def noted(array, where, value):
        if array.basename == "features":
            written.append((where.start, where.stop))
            assert where.start % array.shards[0] == 0
            assert where.stop in (where.start + array.shards[0], array.shape[0])
            assert len(value) == where.stop - where.start
        write(array, where, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", noted)
    export_zarr(store, tmp_path / "out", taps=["key@1"], dtype="float32")
    features = zarr.open(tmp_path / "out", mode="r")["key@1/features"]
    assert [start for start, _ in written] == list(range(0, features.shape[0], features.shards[0]))
    assert features.shards[0] % features.chunks[0] == 0
    assert features.chunks[0] % 6 == 0, "most images have 6 tokens"
    expected = torch.cat([store[name]["key@1"].features[0] for name in READ])
    assert np.array_equal(features[:], expected.numpy())
    root = zarr.open(tmp_path / "out", mode="r")
    assert root["ids"][:].tolist() == READ


def test_blocks_are_the_rows_in_order():
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 40):
        parts = [generator.normal(size=(rows, 2)) for rows in (3, 0, 1, 11, 2, 7, 7)]
        blocks = list(module._blocks(parts, count))
        assert np.array_equal(np.concatenate(blocks), np.concatenate(parts))
        assert [len(block) for block in blocks[:-1]] == [count] * (len(blocks) - 1)
        assert 0 < len(blocks[-1]) <= count
    assert list(module._blocks([], 3)) == []


@pytest.mark.parametrize("group", [1, 300, 10**6])
@pytest.mark.parametrize("stored", ["float32", "float16", "int8"])
def test_a_parquet_table_has_the_mean_tokens(tmp_path, monkeypatch, stored, group):
    monkeypatch.setattr(module, "_GROUP", group)
    store = make(tmp_path / "store", dtype=stored)
    assert export_parquet(store, tmp_path / "out.parquet") == tmp_path / "out.parquet"
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "height", "width", *SETTINGS["taps"]]
    assert [str(table.schema.field(tap).type) for tap in SETTINGS["taps"]] == [
        f"fixed_size_list<element: float>[{dim}]" for dim in (6, 5, 7)
    ]
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == READ
    for row in rows:
        for tap, d in store[row["id"]].items():
            assert (row["height"], row["width"]) == d.frames[0].source_size
            numbers = d.features[0].double().mean(0).numpy()
            assert np.allclose(row[str(tap)], numbers, rtol=0, atol=1e-6)
        assert row["cls@2"] == store[row["id"]]["cls@2"].features[0, 0].tolist(), "one token is as it is"
    facts = json.loads(table.schema.metadata[b"vitfeats"])
    assert facts == {"taps": SETTINGS["taps"], "settings": SETTINGS, "broken": BROKEN}
    assert beside(store) == {"store", "out.parquet"}


@pytest.mark.parametrize("group", [1, 300, 10**6])
def test_a_parquet_table_of_every_token_is_read_by_pandas(store, tmp_path, monkeypatch, group):
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(module, "_GROUP", group)
    export_parquet(store, tmp_path / "out.parquet", pool=None)
    frame = pandas.read_parquet(tmp_path / "out.parquet")
    columns = [f"{tap}{end}" for tap in SETTINGS["taps"] for end in ("", "_rows", "_cols")]
    assert list(frame.columns) == ["id", "height", "width", *columns]
    assert frame["id"].tolist() == READ
    for row in frame.to_dict("records"):
        for tap, d in store[row["id"]].items():
            numbers = row[str(tap)].reshape(row[f"{tap}_rows"], row[f"{tap}_cols"], -1)
            assert numbers.dtype == np.float32
            assert np.array_equal(numbers, d.map[0].permute(1, 2, 0).numpy())


def test_pandas_reads_mean_tokens_as_arrays(store, tmp_path):
    pandas = pytest.importorskip("pandas")
    export_parquet(store, tmp_path / "out.parquet")
    vectors = np.stack(pandas.read_parquet(tmp_path / "out.parquet")["cls@2"])
    assert np.array_equal(vectors, torch.cat([store[name]["cls@2"].features[0] for name in READ]).numpy())


@pytest.mark.parametrize("pool", ["mean", None])
def test_row_groups_are_as_large_as_they_may_be_and_no_larger(tmp_path, monkeypatch, pool):
    store = make(tmp_path / "store", grids=[(2, 3)] * 8, broken={})
    export_parquet(store, tmp_path / "one.parquet", pool=pool)
    assert pq.ParquetFile(tmp_path / "one.parquet").num_row_groups == 1, "shards are put together"
    one = pq.read_table(tmp_path / "one.parquet").nbytes / 8
    for images, groups in {1: [1] * 8, 2: [2] * 4, 5: [5, 3]}.items():
        monkeypatch.setattr(module, "_GROUP", int(one * (images + 0.5)))
        export_parquet(store, tmp_path / f"{images}.parquet", pool=pool)
        file = pq.ParquetFile(tmp_path / f"{images}.parquet")
        assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == groups
        assert file.read().equals(pq.read_table(tmp_path / "one.parquet"))


def test_numbers_in_parquet_have_no_dictionary_and_their_bytes_apart(store, tmp_path):
    for pool in ("mean", None):
        export_parquet(store, tmp_path / f"{pool}.parquet", pool=pool)
        group = pq.ParquetFile(tmp_path / f"{pool}.parquet").metadata.row_group(0)
        columns = [group.column(number) for number in range(group.num_columns)]
        numbers = [column for column in columns if column.physical_type == "FLOAT"]
        assert len(numbers) == 3
        assert all("BYTE_STREAM_SPLIT" in column.encodings for column in numbers)
        assert all(column.compression == "ZSTD" for column in columns)
        assert not any(column.has_dictionary_page for column in columns)


@pytest.mark.parametrize("kind", EXPORTS)
def test_taps_are_those_that_were_asked_in_their_order(store, tmp_path, kind):
    EXPORTS[kind](store, tmp_path / "out", taps=["token@0", "key@1", "token@0"])
    if kind == "npy":
        assert json.loads((tmp_path / "out" / "images.json").read_text())["taps"] == ["token@0", "key@1"]
        assert not (tmp_path / "out" / "cls@2.npy").exists()
    elif kind == "zarr":
        assert zarr.open(tmp_path / "out", mode="r").attrs["taps"] == ["token@0", "key@1"]
        assert "cls@2" not in zarr.open(tmp_path / "out", mode="r")
    else:
        assert pq.read_table(tmp_path / "out").column_names == ["id", "height", "width", "token@0", "key@1"]


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_first_shard_of_broken_images_alone_is_no_hindrance(tmp_path, kind):
    store = make(tmp_path / "store", broken=dict.fromkeys(IDS[:4], "it is cut off"))
    EXPORTS[kind](store, tmp_path / "out")
    if kind == "parquet":
        assert pq.read_table(tmp_path / "out")["id"].to_pylist() == IDS[4:]
        return
    for place, name in enumerate(IDS[4:]):
        numbers, _, _ = READERS[kind](tmp_path / "out", "token@0", place)
        assert np.array_equal(numbers, rounded(store[name]["token@0"].features, "float16"))


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_store_at_an_address_is_exported_to_a_folder(tmp_path, kind):
    fsspec = pytest.importorskip("fsspec")
    try:
        store = make("memory://exported")
        EXPORTS[kind](store, tmp_path / "out")
    finally:
        fsspec.filesystem("memory").rm("/exported", recursive=True)
    make(tmp_path / "store")
    EXPORTS[kind](Store(tmp_path / "store"), tmp_path / "other")
    if kind == "parquet":
        assert (tmp_path / "out").read_bytes() == (tmp_path / "other").read_bytes()
        return
    for tap in SETTINGS["taps"]:
        one, other = (READERS[kind](tmp_path / name, tap, 2)[0] for name in ("out", "other"))
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("tap", ["out@layer2+layer3", "token@up1.res1#25"])
def test_taps_of_named_layers_keep_their_names(tmp_path, kind, tap):
    d = random_descriptor(0, 2, 3, 4, tap=tap)
    store = create_store(tmp_path / "store", ["a"], {**SETTINGS, "taps": [tap]}, 1)
    write_shard(store.shard_path(0), [("a", Descriptors([(tap, d)]))], settings=store.settings, dtype="float32")
    EXPORTS[kind](store, tmp_path / "out")
    if kind in READERS:
        numbers, _, _ = READERS[kind](tmp_path / "out", tap, 0)
        assert np.array_equal(numbers, rounded(d.features, "float16"))
        return
    found = pq.read_table(tmp_path / "out")[tap].to_pylist()
    assert np.allclose(found, d.features.mean(1).numpy(), atol=1e-6)
    group = pq.ParquetFile(tmp_path / "out").metadata.row_group(0)
    assert "BYTE_STREAM_SPLIT" in group.column(3).encodings


@pytest.mark.parametrize("kind", READERS)
def test_what_is_too_large_for_float16_is_its_largest_number(tmp_path, kind):
    store = make(tmp_path / "store", factor=1e5)
    EXPORTS[kind](store, tmp_path / "out")
    largest = float(np.finfo(np.float16).max)
    found = []
    for place, name in enumerate(READ):
        numbers, _, _ = READERS[kind](tmp_path / "out", "key@1", place)
        expected = store[name]["key@1"].features[0].numpy()
        assert np.array_equal(numbers, expected.clip(-largest, largest).astype(np.float16))
        found.append(numbers)
    assert {-largest, largest} <= set(np.concatenate(found).reshape(-1).tolist())


@pytest.mark.parametrize("kind", EXPORTS)
def test_odd_ids_are_kept_or_escaped(tmp_path, kind):
    ids = ["zeile\nzwei", "日本語.png", "\x00", "", "byte \udcff.png", "\\n", "😀"]
    store = create_store(tmp_path / "store", ids, SETTINGS, 3)
    for number in range(store.shards):
        images = [(name, of_image("0.png")) for name in store.ids_of(number) if name != "\\n"]
        broken = {"\\n": "it is \udcff"} if "\\n" in store.ids_of(number) else {}
        write_shard(store.shard_path(number), images, settings=SETTINGS, broken=broken)
    EXPORTS[kind](store, tmp_path / "out")
    escaped = [r"byte \udcff.png" if name == "byte \udcff.png" else name for name in ids if name != "\\n"]
    if kind == "npy":
        facts = json.loads((tmp_path / "out" / "images.json").read_text())
        assert facts["ids"] == [name for name in ids if name != "\\n"]
    elif kind == "zarr":
        facts = zarr.open(tmp_path / "out", mode="r").attrs
        assert zarr.open(tmp_path / "out", mode="r")["ids"][:].tolist() == escaped
    else:
        table = pq.read_table(tmp_path / "out")
        facts = json.loads(table.schema.metadata[b"vitfeats"])
        assert table["id"].to_pylist() == escaped
    assert facts["broken"] == {"\\n": "it is \udcff"}


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_nothing(store, tmp_path, monkeypatch, kind, error):
    read = Store.rows

    def fails(self, number, tap):
        if number == 1 and tap == "token@0":
            raise error
        return read(self, number, tap)

    monkeypatch.setattr(Store, "rows", fails)
    with pytest.raises(error):
        EXPORTS[kind](store, tmp_path / "out")
    assert beside(store) == {"store"}
    monkeypatch.undo()
    EXPORTS[kind](store, tmp_path / "out")
    assert beside(store) == {"store", "out"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_disk_that_fails_is_told_and_leaves_nothing(store, tmp_path, monkeypatch, kind):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fails)
    with pytest.raises(StoreError, match=r"expected to write '.*out', but: .*No space left on device"):
        EXPORTS[kind](store, tmp_path / "out")
    assert beside(store) == {"store"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_damaged_shard_is_told_and_leaves_nothing(store, tmp_path, kind):
    content = store.shard_path(1).read_bytes()
    store.shard_path(1).write_bytes(content[:-1])
    with pytest.raises(StoreError, match="expected a whole shard at '.*part-0000001.safetensors'"):
        EXPORTS[kind](Store(store.path), tmp_path / "out")
    assert beside(store) == {"store"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_folder_that_is_not_there_is_told(store, tmp_path, kind):
    with pytest.raises(StoreError, match="expected to write '.*none.out', but"):
        EXPORTS[kind](store, tmp_path / "none" / "out")
    assert beside(store) == {"store"}


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_a_path_that_exists_is_refused_and_left_as_it_is(store, tmp_path, kind, what):
    target = tmp_path / "out"
    if what == "file":
        target.write_text("precious")
    elif what == "folder":
        target.mkdir()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"expected a new path, but '{target}' exists; remove it, or export to "):
        EXPORTS[kind](store, target)
    assert beside(store) == {"store", "out"}
    assert (target.is_file(), target.is_dir(), target.is_symlink()) == (
        what == "file",
        what == "folder",
        what == "link",
    )
    assert what != "file" or target.read_text() == "precious"


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_folder_of_the_store_is_no_place_for_an_export(store, tmp_path, kind):
    before = sorted(store.path.iterdir())
    for target in (store.path / "out", tmp_path / "." / "other" / ".." / "store" / "out"):
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(
            ConfigError, match="expected a path outside the store, got '.*out'; export to another folder"
        ):
            EXPORTS[kind](store, target)
    assert sorted(store.path.iterdir()) == before


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_store_that_lacks_shards_is_refused(store, tmp_path, kind):
    store.shard_path(0).unlink()
    store.shard_path(2).unlink()
    message = f"expected a whole store, but in '{store.path}' 2 of 3 shards are missing; run the extraction again"
    with pytest.raises(StoreError, match=re.escape(message)):
        EXPORTS[kind](store, tmp_path / "out")
    assert beside(store) == {"store"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_store_of_broken_images_alone_is_refused(tmp_path, kind):
    store = make(tmp_path / "store", broken=dict.fromkeys(IDS, "it is cut off"))
    with pytest.raises(StoreError, match="expected images that could be read, but in '.*store' there is none"):
        EXPORTS[kind](store, tmp_path / "out")
    assert beside(store) == {"store"}


@pytest.mark.parametrize("kind", EXPORTS)
def test_taps_that_are_not_there_are_refused(store, tmp_path, kind):
    known = re.escape("expected taps of the store (key@1, token@0, cls@2), got ")
    for taps, told in {("key@1", "key@2"): "'key@2'. Did you mean 'key@1'", (): "none"}.items():
        with pytest.raises(ConfigError, match=known + re.escape(told)):
            EXPORTS[kind](store, tmp_path / "out", taps=taps)
    assert beside(store) == {"store"}


@pytest.mark.usefixtures("as_a_user")
def test_types_and_poolings_that_are_not_there_are_refused(store, tmp_path):
    for export in (export_npy, export_zarr):
        with pytest.raises(ConfigError, match="expected dtype 'float16' or 'float32', got 'int8'"):
            export(store, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="expected pool 'mean' or None, got 'max'"):
        export_parquet(store, tmp_path / "out", pool="max")
    assert beside(store) == {"store"}


def test_missing_packages_are_told_with_the_line_that_installs_them(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = r"expected zarr for this export, but it is not installed; try: pip install \"vitfeats\[zarr\]\"$"
    with pytest.raises(MissingDependencyError, match=told):
        export_zarr(store, tmp_path / "out")
    told = r"expected pyarrow for this export, but it is not installed; try: pip install \"vitfeats\[bulk\]\"$"
    with pytest.raises(MissingDependencyError, match=told):
        export_parquet(store, tmp_path / "out")
    with pytest.raises(MissingDependencyError, match=told):
        pooled_table([("0.png", of_image("0.png"))])
    export_npy(store, tmp_path / "out")
    assert beside(store) == {"store", "out"}


def test_pooled_tables_of_shards_are_together_the_table_of_the_store(store, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    for number in range(store.shards):
        images = [(name, of_image(name)) for name in store.ids_of(number) if name not in BROKEN]
        if images:
            (folder / f"{number}.parquet").write_bytes(pooled_table(images))
    export_parquet(store, tmp_path / "out.parquet")
    one = pq.read_table(tmp_path / "out.parquet")
    assert pq.read_table(folder).equals(one)
    assert {path.name for path in folder.iterdir()} == {"0.parquet", "1.parquet"}


def test_the_same_images_give_the_same_bytes(store, tmp_path):
    images = [(name, of_image(name)) for name in READ]
    (tmp_path / "a").write_bytes(pooled_table(images))
    (tmp_path / "b").write_bytes(pooled_table([(name, of_image(name)) for name in READ]))
    (tmp_path / "c").write_bytes(pooled_table(images[::-1]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    export_parquet(store, tmp_path / "d")
    export_parquet(store, tmp_path / "e")
    assert (tmp_path / "d").read_bytes() == (tmp_path / "e").read_bytes()


def test_descriptors_that_are_halved_or_in_a_graph_are_pooled_in_float32(tmp_path):
    whole = random_descriptor(0, 3, 4, 5)
    graph = describe(whole.features.clone().requires_grad_(), 3, 4)
    half = whole.to(torch.bfloat16)
    for d in (graph, half):
        (tmp_path / "out").write_bytes(pooled_table([("a", Descriptors([("key@1", d)]))]))
        (found,) = pq.read_table(tmp_path / "out")["key@1"].to_pylist()
        assert np.allclose(found, d.features[0].detach().double().mean(0), atol=1e-6)


def test_a_table_without_images_is_refused():
    with pytest.raises(ConfigError, match="expected at least one image for a table, got none"):
        pooled_table([])


def test_a_store_of_pictures_is_exported(mini, tmp_path):
    for seed, (name, size) in enumerate({"a/one.png": (40, 30), "b.png": (30, 40), "c.png": (64, 64)}.items()):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "pictures" / "broken.png").write_text("no picture")
    extract(tmp_path / "pictures", tmp_path / "store", model=mini, taps=["key@1", "cls@2"], per_shard=2, workers=1)
    store = Store(tmp_path / "store")
    export_npy(store, tmp_path / "npy")
    export_zarr(store, tmp_path / "zarr")
    export_parquet(store, tmp_path / "mean.parquet")
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "mean.parquet").to_pylist()}
    assert list(rows) == ["a/one.png", "b.png", "c.png"]
    for place, name in enumerate(rows):
        for tap, d in store[name].items():
            for kind, read in READERS.items():
                numbers, grid, size = read(tmp_path / kind, str(tap), place)
                assert np.array_equal(numbers, d.features[0].numpy()), "float16 in the store and in the export"
                assert (grid, size) == ([d.grid.rows, d.grid.cols], list(d.frames[0].source_size))
            assert np.allclose(rows[name][str(tap)], d.features[0].double().mean(0), atol=1e-5)
    assert (rows["a/one.png"]["height"], rows["a/one.png"]["width"]) == (30, 40)
