"""Stores in object storage: the shards of a folder, of which only the parts that are asked for are fetched."""

import re
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from many import (
    NAMES,
    TAPS,
    WatchedStorage,
    assert_same,
    everything,
    failing,
    paint_all,
    run,
    stored_at,
    uploaded,
)
from synthetic import random_descriptor

from vitfeats.apps.bulk.files import read_bytes, write_bytes
from vitfeats.apps.bulk.shards import check_shard, read_header, write_shard
from vitfeats.apps.bulk.store import Store, create_store
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError

FIRST = 1 << 16  # bytes of a shard that are fetched for its header


@pytest.fixture
def folder(tmp_path) -> Path:
    paint_all(tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def kept(folder: Path) -> dict[str, bytes]:
    """Return the files of a store, without the lock, which an address does not have."""
    return {name: data for name, data in everything(folder).items() if name != ".lock"}


def fetched() -> int:
    """Return how many bytes were fetched since the last call."""
    total = sum(count for _, count in WatchedStorage.fetched)
    WatchedStorage.fetched.clear()
    return total


def flip(address: str, place: int) -> None:
    content = bytearray(read_bytes(address))
    content[place] ^= 1
    write_bytes(address, bytes(content))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_store_at_an_address_has_the_bytes_of_one_in_a_folder(narrow, folder, tmp_path, bucket, dtype):
    address = f"memory://{bucket}/deep/store"
    local = run(narrow, folder, tmp_path / "out", dtype=dtype)
    summary = run(narrow, folder, f"{address}/", dtype=dtype)
    assert stored_at(address) == kept(tmp_path / "out")
    assert (summary.path, summary.images, summary.made) == (address, 7, 7)
    assert (summary.bytes, summary.broken) == (local.bytes, local.broken)
    one, other = Store(tmp_path / "out"), Store(address)
    assert repr(other) == repr(one)
    assert other.ids == one.ids
    assert other.path == address
    for (name, found), (expected_name, expected) in zip(other.each(), one.each(), strict=True):
        assert name == expected_name
        assert_same(found, expected)
        assert_same(other[name], expected)
    for number in range(one.shards):
        for tap in TAPS:
            found, expected = other.rows(number, tap), one.rows(number, tap)
            assert torch.equal(found.vectors, expected.vectors)
            assert (found.ids, found.grids, found.frames) == (expected.ids, expected.grids, expected.frames)
    assert list(other.check()) == []


@pytest.mark.usefixtures("as_a_user")
def test_an_address_of_a_folder_here_is_the_folder(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "out")
    summary = run(narrow, f"file://{folder}", f"file://{tmp_path}/other")
    assert summary.path == tmp_path / "other"
    assert everything(tmp_path / "other") == everything(tmp_path / "out")
    assert [name for name, _ in Store(f"file://{tmp_path}/other").each()] == NAMES


@pytest.mark.usefixtures("as_a_user")
def test_source_and_store_may_both_lie_at_addresses(narrow, folder, tmp_path, bucket):
    (folder / "broken.png").unlink()  # what is told of it says where it lies
    run(narrow, folder, tmp_path / "out")
    run(narrow, uploaded(folder, f"memory://{bucket}/pictures"), f"memory://{bucket}/store")
    assert stored_at(f"memory://{bucket}/store") == kept(tmp_path / "out")


def test_of_an_image_only_its_own_numbers_are_fetched(mini, folder, bucket):
    address = f"watched://{bucket}/store"
    run(mini, folder, address, dtype="float32", per_shard=100)
    whole = len(stored_at(address)["part-0000000.safetensors"])
    store = Store(address)
    fetched()
    expected = {name: sum(d.features.numel() * 4 for d in ds.values()) for name, ds in store.each()}
    prefixes = {
        name: sum(v.numel() * 4 for d in ds.values() for v in (d.cls, d.registers) if v is not None)
        for name, ds in store.each()
    }
    assert sum(expected.values()) + sum(prefixes.values()) < whole < fetched()
    store = Store(address)
    fetched()
    assert len(store[NAMES[3]]) == 2
    assert fetched() == 2 * FIRST + expected[NAMES[3]] + prefixes[NAMES[3]]
    for name in NAMES:
        assert len(store[name]) == 2
        assert fetched() == FIRST + expected[name] + prefixes[name] < whole / 2, "its header is known"


def test_what_reads_all_of_a_shard_fetches_its_header_and_then_all_of_it_once(mini, folder, bucket):
    address = f"watched://{bucket}/store"
    run(mini, folder, address, dtype="float32")
    sizes = {name: len(data) for name, data in stored_at(address).items() if name.startswith("part-")}
    assert min(sizes.values()) > FIRST
    store = Store(address)
    fetched()
    assert len(list(store.each())) == 7
    assert fetched() == sum(sizes.values()) + len(sizes) * FIRST
    for number in range(store.shards):
        assert store.rows(number, TAPS[0]).ids
        assert fetched() == sizes[f"part-{number:07}.safetensors"] + FIRST
    assert len(store.broken()) == 1
    assert fetched() == len(sizes) * FIRST


@pytest.mark.usefixtures("as_a_user")
def test_shards_that_are_missing_are_made_again_to_the_byte(narrow, folder, bucket):
    address = f"watched://{bucket}/store"
    run(narrow, folder, address)
    before = stored_at(address)
    files, root = fsspec.core.url_to_fs(address)
    files.rm_file(f"{root}/part-0000001.safetensors")
    store = Store(address)
    assert store.missing() == [1]
    assert repr(store).endswith("1 of 3 shards missing)")
    with pytest.raises(StoreError, match=f"expected a whole shard at '{address}/part-0000001.safetensors', but"):
        store[store.ids_of(1)[0]]
    WatchedStorage.written.clear()
    summary = run(narrow, folder, address)
    assert summary.made == len([name for name in store.ids_of(1) if name != "broken.png"])
    assert WatchedStorage.written == [f"{root}/part-0000001.safetensors"]
    assert stored_at(address) == before
    assert run(narrow, folder, address).made == 0


@pytest.mark.usefixtures("as_a_user")
def test_damage_is_found_removed_and_made_again_to_the_byte(narrow, folder, bucket):
    address = f"memory://{bucket}/store"
    run(narrow, folder, address)
    before = stored_at(address)
    cut = f"{address}/part-0000000.safetensors"
    write_bytes(cut, read_bytes(cut)[:-1])
    flip(f"{address}/part-0000002.safetensors", -1)
    store = Store(address)
    first, second = store.check()
    assert (first.shard, first.images) == (0, 3)
    assert re.fullmatch(f"expected a whole shard at '{cut}', but it cannot be read: .* is cut off", first.why)
    assert (second.shard, second.images) == (2, 2)
    assert re.fullmatch("the features of '.*' are not those that were written", second.why)
    with pytest.raises(StoreError, match="is cut off"):
        list(store.each())
    assert [damage.shard for damage in store.remove_damaged()] == [0, 2]
    assert store.missing() == [0, 2]
    assert [damage.why for damage in store.check()] == ["it is missing"] * 2
    run(narrow, folder, address)
    assert stored_at(address) == before
    assert Store(address).remove_damaged() == []


@pytest.fixture
def shard(bucket) -> str:
    """The address of a small shard, with what only some descriptors have."""
    rich = random_descriptor(1, 2, 2, 4, cls=torch.randn(1, 4), registers=torch.randn(1, 2, 4), heads=2)
    images = [(f"{seed}.png", Descriptors([("key@1", rich), ("token@2", random_descriptor(seed))])) for seed in (1, 2)]
    address = f"memory://{bucket}/part-0000000.safetensors"
    write_shard(address, images, settings={"model": "synthetic"}, dtype="int8", broken={"3.png": "it is cut off"})
    return address


@pytest.mark.usefixtures("as_a_user")
def test_no_flipped_byte_passes_or_raises_another_error(shard):
    assert check_shard(shard) is None
    whole = read_bytes(shard)
    header = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - header > 100
    for bit in (1, 4, 64):  # digits become other digits, letters other letters
        for place in range(len(whole)):
            write_bytes(shard, whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert check_shard(shard) is not None, f"bit {bit} of byte {place} of {len(whole)}, header {header}"
    write_bytes(shard, whole)
    assert check_shard(shard) is None


@pytest.mark.usefixtures("as_a_user")
def test_no_shard_that_was_cut_off_passes_or_raises_another_error(shard):
    whole = read_bytes(shard)
    for length in range(len(whole)):
        write_bytes(shard, whole[:length])
        why = check_shard(shard)
        assert why is not None, f"{length} of {len(whole)} bytes"
        assert why.startswith("expected ")


@pytest.mark.parametrize(
    "header",
    ["[]", '"text"', "7", "null", "{}", '{"__metadata__": 3}', '{"a": 3}', '{"a": {"dtype": "F32"}}', "{", "\xff"],
)
def test_what_is_no_shard_is_told(shard, header):
    text = header.encode("latin1")
    write_bytes(shard, len(text).to_bytes(8, "little") + text)
    with pytest.raises(StoreError, match=f"'{shard}'"):
        read_header(shard)
    assert check_shard(shard) is not None


def test_a_header_longer_than_what_is_fetched_at_first_is_read(bucket):
    address = f"watched://{bucket}/store"
    ids = [f"{number:04}-{'x' * 200}" for number in range(400)]
    store = create_store(address, ids, {"model": "synthetic", "taps": ["key@1"]}, 400)
    images = [(name, Descriptors([("key@1", random_descriptor(seed, 1, 1, 2))])) for seed, name in enumerate(ids)]
    write_shard(store.shard_path(0), images, settings=store.settings)
    assert read_header(store.shard_path(0)).ids == ids
    assert int.from_bytes(read_bytes(store.shard_path(0), 0, 8), "little") > FIRST
    expected = images[399][1]["key@1"].features
    assert torch.allclose(Store(address)[ids[399]]["key@1"].features, expected, atol=1e-3)


@pytest.mark.usefixtures("as_a_user")
def test_another_store_at_the_address_is_refused(narrow, folder, bucket):
    address = f"memory://{bucket}/store"
    run(narrow, folder, address)
    before = stored_at(address)
    told = rf"store in '{address}', but these differ: taps: \['key@1', 'token@2'\] there, \['key@1'\] here"
    with pytest.raises(ConfigError, match=told):
        run(narrow, folder, address, taps=["key@1"])
    with pytest.raises(ConfigError, match="these differ: per_shard: 3 there, 4 here"):
        run(narrow, folder, address, per_shard=4)
    (folder / "broken.png").unlink()
    with pytest.raises(ConfigError, match="these differ: ids: "):
        run(narrow, folder, address)
    assert stored_at(address) == before


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("writes", range(6))
def test_a_write_that_fails_leaves_whole_files_and_the_run_goes_on(narrow, folder, tmp_path, bucket, writes):
    """A store is its list of images, its description and three shards; the last try has room for all of them."""
    run(narrow, folder, tmp_path / "out")
    address = f"watched://{bucket}/store"
    with failing(PermissionError("no more room"), writes=writes):
        if writes < 5:
            with pytest.raises(StoreError, match=f"expected to write '{address}/.*', but: no more room"):
                run(narrow, folder, address)
            assert len(stored_at(address)) == writes
        else:
            run(narrow, folder, address)
    if writes < 2:
        with pytest.raises(StoreError, match=f"expected a store at '{address}', but there is none"):
            Store(address)
    left = stored_at(address)
    assert left.items() <= kept(tmp_path / "out").items()
    run(narrow, folder, address)
    assert stored_at(address) == kept(tmp_path / "out")


@pytest.mark.usefixtures("as_a_user")
def test_a_storage_that_fails_is_not_taken_for_damage(narrow, folder, bucket):
    address = f"watched://{bucket}/store"
    run(narrow, folder, address)
    before = stored_at(address)
    store = Store(address)
    told = f"expected to read '{address}/part-000000.*', but: gone"
    for reads in range(6):  # a shard is read twice: first its header
        with failing(ConnectionError("gone"), reads=reads), pytest.raises(StoreError, match=told):
            list(store.check())
        with failing(ConnectionError("gone"), reads=reads), pytest.raises(StoreError, match=told):
            store.remove_damaged()
    assert stored_at(address) == before


@pytest.mark.usefixtures("as_a_user")
def test_a_storage_that_fails_is_told_by_all_that_read_it(narrow, folder, bucket):
    address = f"watched://{bucket}/store"
    run(narrow, folder, address)
    store = Store(address)
    told = f"expected to read '{address}/part-000000.*', but: gone"
    reads = [
        lambda: store["z.png"],
        lambda: list(store.each()),
        lambda: store.rows(0, TAPS[0]),
        store.broken,
    ]
    for read in reads:
        with failing(ConnectionError("gone"), reads=0), pytest.raises(StoreError, match=told):
            read()
    with failing(ConnectionError("gone"), reads=0), pytest.raises(StoreError, match=f"a store at '{address}', but"):
        Store(address)
    with failing(ConnectionError("gone"), reads=1), pytest.raises(StoreError, match="expected the list of images"):
        Store(address)


def test_a_listing_that_fails_is_told(narrow, folder, bucket, monkeypatch):
    address = f"watched://{bucket}/store"
    run(narrow, folder, address)

    def fail(*given, **settings):
        raise TimeoutError("too late")

    monkeypatch.setattr(WatchedStorage, "ls", fail)
    for read in (Store(address).missing, lambda: run(narrow, folder, address)):
        with pytest.raises(StoreError, match=f"expected to read '{address}', but: too late"):
            read()


def test_a_shard_that_cannot_be_removed_is_told(narrow, folder, bucket, monkeypatch):
    address = f"watched://{bucket}/store"
    run(narrow, folder, address)
    flip(f"{address}/part-0000000.safetensors", -1)

    def fail(*given, **settings):
        raise PermissionError("not yours")

    monkeypatch.setattr(WatchedStorage, "rm_file", fail)
    monkeypatch.setattr(WatchedStorage, "rm", fail)
    with pytest.raises(StoreError, match=f"expected to remove '{address}/part-0000000.safetensors', but: not yours"):
        Store(address).remove_damaged()


def test_there_is_no_store_where_nothing_is(bucket):
    with pytest.raises(StoreError, match=f"expected a store at 'memory://{bucket}/none', but there is none"):
        Store(f"memory://{bucket}/none")


def test_an_address_of_an_unknown_kind_is_refused(narrow, folder):
    told = "expected an address that fsspec knows, got 'nosuch://bucket"
    with pytest.raises(StoreError, match=told):
        run(narrow, folder, "nosuch://bucket/store")
    with pytest.raises(StoreError, match=told):
        Store("nosuch://bucket/store")


@pytest.mark.parametrize(("kind", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_missing_package_is_told_with_the_line_that_installs_it(narrow, folder, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    told = rf"expected what fsspec needs for {kind}://, but it is not installed \(.*\); try: pip install {package}$"
    with pytest.raises(MissingDependencyError, match=told):
        run(narrow, folder, f"{kind}://bucket/store")
    with pytest.raises(MissingDependencyError, match=told):
        run(narrow, folder, f"{kind}://bucket/store", pca=2)
    with pytest.raises(MissingDependencyError, match=told):
        Store(f"{kind}://bucket/store")
