"""Stores: what they hold and lack, what they refuse, the damage that they find, and one run at a time."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import random_descriptor

from vitfeats.apps.bulk.shards import write_shard
from vitfeats.apps.bulk.store import Store, create_store, locked
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, StoreError

SETTINGS = {"model": "synthetic", "taps": ["key@1"], "size": 112, "stride": None}
IDS = [f"{number}.png" for number in range(8)]
BROKEN = "5.png"


def of_image(name: str) -> Descriptors:
    """Return what an image of that id has: numbers that no other has."""
    return Descriptors([("key@1", random_descriptor(IDS.index(name), 1, 2, 4))])


def fill(store: Store, *numbers: int) -> None:
    """Write shards; the image BROKEN could not be read."""
    for number in numbers:
        names = store.ids_of(number)
        images = [(name, of_image(name)) for name in names if name != BROKEN]
        broken = {name: "it is cut off" for name in names if name == BROKEN}
        write_shard(store.shard_path(number), images, settings=store.settings, dtype="float32", broken=broken)


@pytest.fixture
def store(tmp_path) -> Store:
    """A store of 8 images in shards of 3, 3 and 2, all there."""
    made = create_store(tmp_path / "deep" / "store", IDS, SETTINGS, 3)
    fill(made, 0, 1, 2)
    return made


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_store_knows_its_images_and_shards_before_there_is_one(tmp_path):
    store = create_store(tmp_path / "a" / "b", IDS, SETTINGS, 3)
    assert list(store) == store.ids == IDS
    assert len(store) == 8
    assert store.shards == 3
    assert [store.ids_of(number) for number in range(3)] == [IDS[:3], IDS[3:6], IDS[6:]]
    assert store.missing() == [0, 1, 2]
    assert store.broken() == {}
    assert store.taps == ["key@1"]
    assert store.settings == SETTINGS
    assert repr(store) == "Store(8 images, key@1 of synthetic, 3 of 3 shards missing)"
    with pytest.raises(StoreError, match="part-0000000.safetensors"):
        store["0.png"]


@pytest.mark.parametrize(("per_shard", "shards"), [(1, 8), (4, 2), (7, 2), (8, 1), (100, 1)])
def test_every_image_is_in_one_shard(tmp_path, per_shard, shards):
    store = create_store(tmp_path, IDS, SETTINGS, per_shard)
    assert store.shards == shards
    assert [name for number in range(shards) for name in store.ids_of(number)] == IDS
    assert max(len(store.ids_of(number)) for number in range(shards)) <= per_shard


def test_shards_may_come_in_any_order(store):
    store.shard_path(0).unlink()
    store.shard_path(2).unlink()
    assert store.missing() == [0, 2]
    assert repr(store).endswith("2 of 3 shards missing)")
    fill(store, 2)
    assert store.missing() == [0]
    fill(store, 0)
    assert store.missing() == []
    assert repr(store) == "Store(8 images, key@1 of synthetic)"
    assert list(store.check()) == []


def test_images_are_found_by_id(store):
    for name in IDS:
        assert name in store
        if name != BROKEN:
            assert torch.equal(store[name]["key@1"].features, of_image(name)["key@1"].features)
    for other in ("8.png", "", 3, None):
        assert other not in store
    with pytest.raises(KeyError, match=r"expected an image of the store, got '55.png'. Did you mean .*'5.png'"):
        store["55.png"]


def test_a_broken_image_is_told_with_its_reason(store):
    assert store.broken() == {BROKEN: "it is cut off"}
    assert BROKEN in store
    with pytest.raises(StoreError, match=r"expected an image that could be read, but '5.png' could not: it is cut off"):
        store[BROKEN]


def test_each_gives_the_images_that_could_be_read_in_order(store):
    found = dict(store.each())
    assert list(found) == [name for name in IDS if name != BROKEN]
    assert all(torch.equal(ds["key@1"].features, of_image(name)["key@1"].features) for name, ds in found.items())


def test_a_missing_shard_stops_each_where_it_should_be(store):
    store.shard_path(1).unlink()
    opened = Store(store.path)
    walk = opened.each()
    assert [next(walk)[0] for _ in range(3)] == IDS[:3]
    with pytest.raises(StoreError, match="part-0000001.safetensors"):
        next(walk)
    with pytest.raises(StoreError, match="part-0000001.safetensors"):
        opened["3.png"]
    assert opened.broken() == {}
    assert len(opened["7.png"]) == 1


def test_a_store_is_opened_again(store):
    for again in (Store(store.path), Store(str(store.path)), create_store(store.path, IDS, SETTINGS, 3)):
        assert again.ids == IDS
        assert again.settings == SETTINGS
        assert again.per_shard == 3
        assert list(again.check()) == []
    # What JSON changes, such as tuples, is the same settings all the same.
    assert create_store(store.path, IDS, {**SETTINGS, "taps": ("key@1",)}, 3).taps == ["key@1"]


def test_more_shards_than_headers_that_are_kept(tmp_path):
    ids = [f"{number:03}" for number in range(150)]
    store = create_store(tmp_path, ids, SETTINGS, 1)
    one = of_image("0.png")
    for number, name in enumerate(ids):
        write_shard(store.shard_path(number), [(name, one)], settings=SETTINGS)
    for _ in range(2):
        assert [name for name, _ in store.each()] == ids
    assert len(store["000"]) == len(store["149"]) == 1


def test_another_store_in_the_folder_is_refused_by_what_differs(store):
    def refused(message: str, *, ids=IDS, settings=SETTINGS, per_shard=3) -> None:
        with pytest.raises(ConfigError, match=message):
            create_store(store.path, ids, settings, per_shard)

    refused("these differ: per_shard: 3 there, 4 here. Use another folder", per_shard=4)
    refused(r"these differ: ids: 8 there, 7 here; 1 are gone \('7.png'\). Use", ids=IDS[:-1])
    refused("these differ: ids: ", ids=IDS[::-1])
    refused("these differ: model: 'synthetic' there, 'other' here. Use", settings={**SETTINGS, "model": "other"})
    taps = {**SETTINGS, "taps": ["key@1", "token@2"]}
    refused(re.escape("these differ: taps: ['key@1'] there, ['key@1', 'token@2'] here. Use"), settings=taps)
    refused("these differ: dtype: None there, 'int8' here", settings={**SETTINGS, "dtype": "int8"})
    fewer = {name: value for name, value in SETTINGS.items() if name != "size"}
    refused("these differ: per_shard: 3 there, 2 here; size: 112 there, None here", settings=fewer, per_shard=2)
    assert Store(store.path).settings == SETTINGS
    assert list(store.check()) == []


def test_what_makes_no_store_is_refused(tmp_path):
    for per_shard in (0, -1):
        with pytest.raises(ConfigError, match=f"expected per_shard of at least 1, got {per_shard}"):
            create_store(tmp_path / "store", IDS, SETTINGS, per_shard)
    with pytest.raises(ConfigError, match="expected images of different ids, got some twice"):
        create_store(tmp_path / "store", ["a", "b", "a"], SETTINGS, 2)
    assert not (tmp_path / "store").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(StoreError, match="expected a folder to write to at"):
            create_store(folder, IDS, SETTINGS, 3)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="expected a store at '.*', but there is none"):
        Store(tmp_path / "none")
    about = tmp_path / "store.json"
    for content, told in {
        "{": "'store.json' cannot be read",
        "[1]": "'store.json' is of another kind",
        "{}": r"expected a store \(vitfeats.store/1\) at '.*', got format None",
        '{"format": "vitfeats.store/2"}': "got format 'vitfeats.store/2'",
    }.items():
        about.write_text(content)
        with pytest.raises(StoreError, match=told):
            Store(tmp_path)
        with pytest.raises(StoreError, match=told):
            create_store(tmp_path, IDS, SETTINGS, 3)
    about.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StoreError, match="cannot be read"):
        Store(tmp_path)


@pytest.mark.parametrize("lost", ["settings", "per_shard", "ids"])
def test_a_store_whose_description_lacks_something_is_refused(store, lost):
    about = json.loads((store.path / "store.json").read_text())
    del about[lost]
    (store.path / "store.json").write_text(json.dumps(about))
    with pytest.raises(StoreError):
        Store(store.path)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    "changed",
    [
        lambda lines: lines[1:],
        lambda lines: [*lines, '"new.png"\n'],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: ['"0.PNG"\n', *lines[1:]],
        lambda lines: ["0.png\n", *lines[1:]],
        lambda lines: ["3\n", *lines[1:]],
        lambda lines: ['"0.png\n', *lines[1:]],
        lambda lines: [],
    ],
)
def test_a_list_of_images_that_was_changed_is_refused(store, changed):
    listed = store.path / "ids.jsonl"
    listed.write_text("".join(changed(listed.read_text().splitlines(keepends=True))))
    with pytest.raises(StoreError, match="expected the list of images of "):
        Store(store.path)
    with pytest.raises(StoreError, match="expected the list of images of "):
        create_store(store.path, IDS, SETTINGS, 3)


def test_a_list_of_images_that_is_lost_or_no_text_is_refused(store):
    listed = store.path / "ids.jsonl"
    listed.write_bytes(b"\xff\xff")
    with pytest.raises(StoreError, match="expected the list of images of a store"):
        Store(store.path)
    listed.unlink()
    with pytest.raises(StoreError, match="expected the list of images of a store"):
        Store(store.path)


def test_odd_ids_are_kept(tmp_path):
    ids = [
        "a b/c.png",
        "zeile\nzwei",
        "wagen\rlauf",
        'quoted "name"',
        "日本語.png",
        "e\u0301",
        "é",
        "\u2028",
        "\x00",
        "\\n",
        "",
    ]
    ids += ["byte \udcff.png", "😀", "../up.png", "store.json"]
    store = create_store(tmp_path, ids, SETTINGS, 4)
    one = of_image("0.png")
    for number in range(store.shards):
        names = store.ids_of(number)
        write_shard(
            store.shard_path(number), [(names[0], one)], settings=SETTINGS, broken=dict.fromkeys(names[1:], "x")
        )
    opened = Store(tmp_path)
    assert opened.ids == ids
    assert list(opened.check()) == []
    assert set(opened.broken()) == {name for place, name in enumerate(ids) if place % 4}
    for place, name in enumerate(ids):
        assert name in opened
        if place % 4 == 0:
            assert len(opened[name]) == 1
    assert create_store(tmp_path, ids, SETTINGS, 4).ids == ids


def test_check_names_what_is_missing_cut_off_or_changed(store):
    store.shard_path(0).unlink()
    flip(store.shard_path(1), -1)
    content = store.shard_path(2).read_bytes()
    store.shard_path(2).write_bytes(content[:-1])
    missing, changed, cut = store.check()
    assert (missing.shard, missing.why, missing.images) == (0, "it is missing", 3)
    assert (changed.shard, changed.images) == (1, 3)
    assert re.fullmatch(r"the features of '\d.png' are not those that were written", changed.why)
    assert (cut.shard, cut.images) == (2, 2)
    assert "expected a whole shard at" in cut.why


def test_check_finds_shards_of_other_stores(store, tmp_path):
    other = create_store(tmp_path / "other settings", IDS, {**SETTINGS, "model": "other"}, 3)
    fill(other, 0)
    store.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    fewer = create_store(tmp_path / "fewer images", IDS[:4], SETTINGS, 3)
    fill(fewer, 1)
    store.shard_path(1).write_bytes(fewer.shard_path(1).read_bytes())
    first, second = store.check()
    assert (first.shard, second.shard) == (0, 1)
    assert "part-0000000.safetensors' was made with other settings" in first.why
    assert "part-0000001.safetensors' has other images than the store's list" in second.why
    for number in (0, 1):
        with pytest.raises(StoreError, match="expected a shard of this store"):
            Store(store.path)[store.ids_of(number)[0]]


def test_shards_without_a_store_are_not_taken_for_its_own(store):
    fill(store, 0)
    (store.path / "store.json").unlink()
    with pytest.raises(StoreError, match="has shards and no store.json"):
        create_store(store.path, IDS, SETTINGS, 3)


def swap(store: Store) -> None:
    between = store.path / "between"
    store.shard_path(0).rename(between)
    store.shard_path(1).rename(store.shard_path(0))
    between.rename(store.shard_path(1))


def test_check_finds_shards_that_were_swapped(store):
    swap(store)
    assert [(damage.shard, "other images" in damage.why) for damage in store.check()] == [(0, True), (1, True)]


@pytest.mark.parametrize("name", ["0.png", "4.png"])
def test_an_image_of_a_shard_that_was_swapped_is_told_of(store, name):
    swap(store)
    with pytest.raises(StoreError):
        Store(store.path)[name]


def test_each_does_not_give_images_of_shards_that_were_swapped(store):
    swap(store)
    with pytest.raises(StoreError):
        list(Store(store.path).each())


def test_damaged_shards_are_removed_and_can_be_made_again(store):
    before = [store.shard_path(number).stat().st_mtime_ns for number in range(3)]
    assert store.remove_damaged() == []
    assert store.broken()  # its headers are known now, and must be forgotten
    flip(store.shard_path(1), 100)
    store.shard_path(0).unlink()
    assert [damage.shard for damage in store.remove_damaged()] == [0, 1]
    assert store.missing() == [0, 1]
    assert store.shard_path(2).stat().st_mtime_ns == before[2]
    with pytest.raises(StoreError, match="part-0000001"):
        store["3.png"]
    fill(store, 0, 1)
    assert list(store.check()) == []
    assert len(dict(store.each())) == 7


def test_swapped_shards_are_both_removed(store):
    swap(store)
    assert [damage.shard for damage in store.remove_damaged()] == [0, 1]
    assert store.missing() == [0, 1]


HOLD = """
import sys
from pathlib import Path
from vitfeats.apps.bulk.store import locked
from vitfeats.errors import StoreError
for line in sys.stdin:
    try:
        with locked(Path(sys.argv[1])):
            print("held", flush=True)
            sys.stdin.readline()
    except StoreError as error:
        print(error, flush=True)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    told = f"expected to be alone in '{tmp_path}', but another run is at work there; wait for it, or use another folder"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, text=True, bufsize=1, **pipes) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        with locked(tmp_path):
            other.stdin.write("try\n")
            assert other.stdout.readline() == f"{told}\n"
        other.stdin.write("try again\n")
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=re.escape(told)), locked(tmp_path):
            pytest.fail("two runs are at work")
        other.send_signal(signal.SIGKILL)
        assert other.wait() == -signal.SIGKILL
        with locked(tmp_path):
            pass


def test_a_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path), pytest.raises(StoreError, match="another run"), locked(tmp_path):
        pytest.fail("two runs are at work")
    with locked(tmp_path):
        pass


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(store):
    left = store.path / ".0123abcd.tmp"
    left.write_bytes(b"half of a sh")
    kept = [store.path / name for name in ("notes.tmp", ".notes", "tmp")]
    for path in kept:
        path.touch()
    assert list(store.check()) == []
    with locked(store.path):
        assert not left.exists()
        left.write_bytes(b"of another run")
        with pytest.raises(StoreError, match="another run"), locked(store.path):
            pytest.fail("two runs are at work")
        assert left.exists(), "a run that is refused must not take from the one at work"
    assert all(path.exists() for path in kept)
    assert list(Store(store.path).check()) == []


def test_a_folder_that_cannot_be_locked_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="expected to write into '.*file', but"), locked(tmp_path / "file"):
        pytest.fail("it is no folder")


def test_a_store_that_was_begun_without_a_description_is_made_anew(tmp_path):
    create_store(tmp_path, ["old"], SETTINGS, 3)
    os.unlink(tmp_path / "store.json")  # what a kill between the two files leaves
    assert create_store(tmp_path, IDS, SETTINGS, 3).ids == IDS


def failing_at(number: int, *endings: str):
    """Return what stands for safe_open, on a disk that fails for files that end so."""
    import safetensors

    whole = safetensors.safe_open

    def opened(path: str, **settings):
        if path.endswith(endings):
            raise OSError(number, os.strerror(number), path)
        return whole(path, **settings)

    return opened


def test_what_cannot_be_read_now_is_not_taken_for_damaged(store, monkeypatch):
    before = shards_of(store)
    flip(store.shard_path(0), -1)
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES):
        monkeypatch.setattr("safetensors.safe_open", failing_at(number, "1.safetensors"))
        with pytest.raises(StoreError, match=f"expected to read '.*0000001.safetensors', but: .*{os.strerror(number)}"):
            store.remove_damaged()
        monkeypatch.undo()
        assert shards_of(store).keys() == before.keys()
    assert [damage.shard for damage in store.remove_damaged()] == [0]


def shards_of(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.glob("part-*")}


def test_nothing_is_removed_beside_a_run(store):
    flip(store.shard_path(1), -1)
    with locked(store.path), pytest.raises(StoreError, match="another run is at work there"):
        store.remove_damaged()
    assert store.missing() == []


def test_a_shard_that_was_missing_and_is_there_by_now_stays(store, monkeypatch):
    content = store.shard_path(1).read_bytes()
    store.shard_path(1).unlink()
    check = Store.check

    def beside(self):
        yield from check(self)
        store.shard_path(1).write_bytes(content)  # made by a machine that knows no lock

    monkeypatch.setattr(Store, "check", beside)
    assert [(damage.shard, damage.why) for damage in store.remove_damaged()] == [(1, "it is missing")]
    assert store.missing() == []


@pytest.mark.usefixtures("as_a_user")
def test_a_file_that_vanishes_while_a_folder_is_listed_hides_no_other(store, monkeypatch):
    class Gone:
        name = ".1.tmp"

        def is_file(self) -> bool:
            raise FileNotFoundError

    scandir = os.scandir

    class Listing:
        def __init__(self, folder) -> None:
            self._found = scandir(folder)

        def __enter__(self):
            return iter([Gone(), *self._found])

        def __exit__(self, *error) -> None:
            self._found.close()

    monkeypatch.setattr("vitfeats.apps.bulk.files.os.scandir", Listing)
    assert store.missing() == []


def test_a_file_system_without_locks_is_told_as_that(tmp_path, monkeypatch):
    def unknown(file, operation) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("vitfeats.apps.bulk.store.fcntl.flock", unknown)
    told = r"expected a file system that can lock '.*\.lock', but: .*Function not implemented"
    with pytest.raises(StoreError, match=told), locked(tmp_path):
        pass


def test_folders_that_look_like_something_temporary_stay(store):
    (store.path / ".odd.tmp").mkdir()
    (store.path / "pooled").mkdir()
    (store.path / "pooled" / ".half.tmp").write_text("half")
    with locked(store.path):
        assert not (store.path / "pooled" / ".half.tmp").exists()
    assert (store.path / ".odd.tmp").is_dir()


def test_a_store_goes_to_other_processes(store):
    store["0.png"]  # its header is known by now
    there = pickle.loads(pickle.dumps(store))
    assert there.ids == IDS
    assert torch.equal(there["0.png"]["key@1"].features, of_image("0.png")["key@1"].features)


def test_other_ids_are_told_by_name(store):
    for ids, told in (
        ([*IDS, "new.png"], r"ids: 8 there, 9 here; 1 are new \('new.png'\)\. Use another folder"),
        (IDS[:6], r"ids: 8 there, 6 here; 2 are gone \('6.png'\)"),
        (IDS[::-1], "ids: 8 there, 8 here; their order differs"),
    ):
        with pytest.raises(ConfigError, match=told):
            create_store(store.path, ids, SETTINGS, 3)


def test_broken_images_of_some_shards(store):
    assert store.broken([0, 2]) == {}
    assert store.broken([1]) == store.broken() == {BROKEN: "it is cut off"}


def test_shards_of_some_images_are_removed(store):
    store.remove_shards_of(["0.png", "7.png", "1.png"])
    assert store.missing() == [0, 2]
    with pytest.raises(KeyError, match="expected images of the store"):
        store.remove_shards_of(["3.png", "none.png"])
    assert store.missing() == [0, 2]
