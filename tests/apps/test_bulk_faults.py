"""What may go wrong with a bulk run: kills, full and read-only disks, broken files and shards, two runs at once."""

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from killed_bulk import kill_now_and_then
from many import broken_pictures, encoded, everything, paint, paint_all, run, shards

from vitfeats import cli
from vitfeats.apps.bulk import making, open_source, sources
from vitfeats.apps.bulk.shards import check_shard
from vitfeats.apps.bulk.sources import Files
from vitfeats.apps.bulk.store import Store
from vitfeats.errors import ImageError, StoreError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures of five sizes, in folders in a folder, and a file that is none."""
    return paint_all(tmp_path / "pictures")


def paint_many(root: Path, count: int) -> Path:
    """Write small pictures of many sizes."""
    chance = random.Random(5)
    for number in range(count):
        paint(root / f"{number:03}.png", (chance.randint(20, 99), chance.randint(20, 99)), number)
    return root


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run a command line; return its exit code, and what it said and complained of."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def assert_whole(out: Path, whole: Path) -> None:
    """Make sure that shards are whole and those of an uninterrupted run, and nothing half-written lies beside them."""
    left = shards(out)
    assert all(check_shard(out / name) is None for name in left)
    assert left.items() <= shards(whole).items()
    assert list(out.glob(".*.tmp")) == []


# Kills ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_that_were_killed_go_on_as_if_they_had_not(tmp_path):
    source = paint_many(tmp_path / "pictures", 120)
    (source / "031.png").write_bytes(b"no picture")
    places = {"source": source, "whole": tmp_path / "whole", "folder": tmp_path}
    found = kill_now_and_then(work="killed", **places, times=30, seed=3, per_shard=3)
    assert found["kills"] == 30
    assert len(set(found["were"])) > 5, "they were killed at different moments"


@pytest.mark.parametrize("left", [[".4f1c.tmp"], [".attempt-0000001-0.tmp", ".attempt-0000001-1.tmp"]])
def test_what_a_killed_run_had_half_written_is_cleared_away(mini, folder, tmp_path, left):
    run(mini, folder, tmp_path / "whole")
    run(mini, folder, tmp_path / "out")
    Store(tmp_path / "out").shard_path(1).unlink()
    for name in left:
        (tmp_path / "out" / name).write_bytes(b"half a shard")
    run(mini, folder, tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


# Mistakes -------------------------------------------------------------------------------------------------------------


class Faulty(Files):
    """Files whose reading has a mistake in it."""

    def image(self, number):
        if self.ids[number] == "four.png":
            raise ZeroDivisionError("a mistake of the source")
        return super().image(number)

    def part(self, start, stop):
        return Faulty(self.ids[start:stop], self.folder)


def test_after_an_error_there_are_whole_shards_and_the_run_goes_on(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "whole", per_shard=1)
    out, images = tmp_path / "out", open_source(folder)
    with pytest.raises(ZeroDivisionError, match="a mistake of the source"):
        run(mini, Faulty(images.ids, folder), out, per_shard=1)
    assert_whole(out, tmp_path / "whole")
    whole = (folder / "four.png").read_bytes()
    (folder / "four.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="^'four.png': expected "):
        run(mini, folder, out, per_shard=1, strict=True)
    (folder / "four.png").write_bytes(whole)
    Store(out).shard_path(4).mkdir()  # nothing can be written over it
    with pytest.raises(StoreError, match=r"expected to write '.*part-0000004.safetensors', but: .*directory"):
        run(mini, folder, out, per_shard=1)
    Store(out).shard_path(4).rmdir()
    assert_whole(out, tmp_path / "whole")
    run(mini, folder, out, per_shard=1)
    assert everything(out) == everything(tmp_path / "whole")


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no disk can be mounted: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def blind(monkeypatch) -> None:
    """No disk seems to be full."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)


def test_a_small_disk_is_refused_beforehand(mini, tmp_path, disk):
    source = paint_many(tmp_path / "pictures", 40)
    told = (
        r"expected a disk that holds about \d\.\d MB at '.*disk/out', but 1\.0 MB are free; read fewer taps, or use d"
    )
    with pytest.raises(StoreError, match=told):
        run(mini, source, disk / "out")
    assert shards(disk / "out") == {}
    assert run(mini, source, disk / "out2", taps=["cls@1"]).images == 40
    enlarge(disk)
    assert run(mini, source, disk / "out").images == 40


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("pooled", [False, True])
def test_a_disk_that_becomes_full_keeps_whole_shards_and_takes_the_rest_later(mini, tmp_path, disk, pooled):
    if pooled:
        pytest.importorskip("pyarrow")
    source = paint_many(tmp_path / "pictures", 40)
    run(mini, source, tmp_path / "whole", pooled=pooled)
    for _ in range(2):  # to try again changes nothing
        with pytest.raises(
            StoreError, match=r"expected to write '.*disk/out/.*', but: .*No space left on device"
        ) as told:
            run(mini, source, disk / "out", pooled=pooled)
        assert "\n" not in str(told.value)
        assert 0 < len(shards(disk / "out")) < 14
        assert_whole(disk / "out", tmp_path / "whole")
    enlarge(disk)
    run(mini, source, disk / "out", pooled=pooled)
    assert everything(disk / "out") == everything(tmp_path / "whole")


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("settings", [{}, {"pca": 4}])
def test_a_disk_that_is_full_gets_no_half_store(mini, folder, tmp_path, disk, settings):
    run(mini, folder, tmp_path / "whole", **settings)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(2 << 20))
    with pytest.raises(StoreError, match=r"expected to write '.*disk/out/.*', but: .*No space left on device"):
        run(mini, folder, disk / "out", **settings)
    assert not (disk / "out/store.json").exists()
    assert list((disk / "out").glob(".*.tmp")) == []
    filler.unlink()
    run(mini, folder, disk / "out", **settings)
    assert everything(disk / "out") == everything(tmp_path / "whole")


def test_a_disk_that_became_read_only_is_told_in_a_line(mini, folder, capsys, disk):
    assert run(mini, folder, disk / "out").images == 7
    Store(disk / "out").shard_path(1).unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StoreError, match=r"expected to write into '.*out', but: .*Read-only file system"):
        run(mini, folder, disk / "out")
    store = Store(disk / "out")
    assert all(store[name] for name in [*store.ids_of(0), *store.ids_of(2)]), "what is there can be read"
    code, said, err = command(capsys, "bulk", folder, "--out", disk / "new", "--size", 112, "--device", "cpu")
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"vitfeats: StoreError: expected to write into '{disk / 'new'}', but: ")


@pytest.fixture
def place():
    """A folder in which someone without rights can look."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_a_folder_that_one_may_not_write_to_is_told_in_a_line(mini, place, monkeypatch):
    known = making.version("vitfeats")
    monkeypatch.setattr(making, "version", lambda name: known)  # what is installed may be out of reach without rights
    folder = paint_all(place / "pictures")
    run(mini, folder, place / "out", workers=1)
    Store(place / "out").shard_path(1).unlink()
    before = everything(place / "out")
    paths = [place / "out", place]
    user = os.geteuid()
    for path in paths:
        path.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match=r"^expected to write into '.*out', but: .*Permission denied.*$") as told:
            run(mini, folder, place / "out", workers=1)
        with pytest.raises(StoreError, match=r"^expected to write into '.*new', but: .*Permission denied.*$") as new:
            run(mini, folder, place / "new", workers=1)
    finally:
        os.seteuid(user)
        for path in paths:
            path.chmod(0o755)
    assert "\n" not in f"{told.value}{new.value}"
    assert everything(place / "out") == before
    (place / "out/.lock").chmod(0o666)  # now the lock can be had, and no shard be written
    (place / "out").chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match=r"^expected to write '.*part-0000001.*', but: .*Permission denied.*$"):
            run(mini, folder, place / "out", workers=1)
    finally:
        os.seteuid(user)
        (place / "out").chmod(0o755)
    assert everything(place / "out") == before


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_an_out_that_is_no_folder_is_told_in_a_line(mini, folder, tmp_path, capsys, name):
    (tmp_path / "file").write_text("what must not be lost")
    with pytest.raises(StoreError, match=rf"^expected to write into '.*{name}', but: .*$"):
        run(mini, folder, tmp_path / name)
    given = ("bulk", folder, "--out", tmp_path / name, "--size", 112, "--device", "cpu", "--json")
    code, said, err = command(capsys, *given)
    assert (code, said, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"vitfeats: StoreError: expected to write into '{tmp_path / name}', but: ")
    assert (tmp_path / "file").read_text() == "what must not be lost"


# Broken files ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
def test_a_hundredth_of_broken_images_is_told_and_left_out(tmp_path, capsys):
    source = paint_many(tmp_path / "pictures", 800)
    bad = []
    # At size 32 it takes a longer picture than at 112 to have too many tokens.
    kinds = broken_pictures() | {"a/long.png": encoded(np.zeros((20_000, 1, 3), np.uint8))}
    for number, (name, data) in enumerate(kinds.items()):
        (source / f"{100 * number + 37:03}.png").unlink()
        bad.append(f"{100 * number + 37:03}{Path(name).suffix}")
        (source / bad[-1]).write_bytes(data)
    assert len(bad) == 8
    given = ("bulk", source, "--tap", "key@1", "--size", 32, "--device", "cpu")
    code, said, err = command(capsys, *given, "--out", tmp_path / "out", "--json")
    facts = json.loads(said)
    assert (code, facts["images"], facts["made"]) == (1, 792, 792)
    assert sorted(facts["broken"]) == bad
    assert all(why.startswith("expected ") and "\n" not in why for why in facts["broken"].values())
    assert sorted(err.splitlines()) == [f"vitfeats: '{name}': {facts['broken'][name]}" for name in bad]
    store = Store(tmp_path / "out")
    assert list(store.check()) == []
    assert store.broken() == facts["broken"]
    assert [name for name, _ in store.each()] == sorted({path.name for path in source.iterdir()} - {*bad})
    # Again: nothing is to be done, and they are told again.
    code, said, _ = command(capsys, *given, "--out", tmp_path / "out", "--json")
    assert (code, json.loads(said)["made"], json.loads(said)["broken"]) == (1, 0, facts["broken"])
    code, said, err = command(capsys, *given, "--out", tmp_path / "strict", "--strict", "--json")
    assert (code, said) == (1, "")
    assert err == f"vitfeats: ImageError: '{bad[0]}': {facts['broken'][bad[0]]}\n"
    assert shards(tmp_path / "strict") == {}, "it is in the first shard"


# Damage ---------------------------------------------------------------------------------------------------------------

DAMAGES = {
    "truncated by a byte": lambda data: data[:-1],
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "a bit of its length": lambda data: flipped(data, 1),
    "a bit of its header": lambda data: flipped(data, 400),
    "a bit of its numbers": lambda data: flipped(data, len(data) // 2),
    "its last bit": lambda data: flipped(data, len(data) - 1),
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_just_its_images_are_read_again(mini, folder, tmp_path, capsys, monkeypatch, damage):
    out = tmp_path / "out"
    run(mini, folder, out)
    before = everything(out)
    path = Store(out).shard_path(1)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert [(one.shard, one.images) for one in Store(out).check()] == [(1, 3)]
    code, said, _ = command(capsys, "store", "check", out)
    assert code == 1
    assert said.startswith("shard 1 (3 images): ")
    assert said.endswith(f"{out}: 2 of 3 shards whole\n")
    assert path.exists()
    assert command(capsys, "store", "check", out, "--repair")[0] == 1
    assert not path.exists()
    opened = []
    with monkeypatch.context() as patch:
        original = sources.load_image
        patch.setattr(sources, "load_image", lambda one: opened.append(one) or original(one))
        assert run(mini, folder, out).made == 3
    assert {*opened} == {folder / name for name in Store(out).ids_of(1)}
    assert len(opened) == 2 * len(Store(out).ids_of(1)), "once more, for what they will take on disk"
    assert everything(out) == before
    assert command(capsys, "store", "check", out)[:2] == (0, f"{out}: 3 of 3 shards whole\n")


# Two at once ----------------------------------------------------------------------------------------------------------


class Busy(Files):
    """Files that try something else at the fifth image."""

    def __init__(self, ids, folder, attempt):
        super().__init__(ids, folder)
        self.attempt = attempt

    def image(self, number):
        if self.ids[number] == "four.png":
            self.attempt()
        return super().image(number)

    def part(self, start, stop):
        return Busy(self.ids[start:stop], self.folder, self.attempt)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_second_run_is_refused_while_the_first_is_at_work(mini, folder, tmp_path, engine):
    run(mini, folder, tmp_path / "whole")
    told = []

    def second() -> None:
        with pytest.raises(StoreError, match="expected to be alone in '.*out', but another run is at work") as error:
            run(mini, folder, tmp_path / "out", engine=engine)
        told.append(error)

    found = run(mini, Busy(open_source(folder).ids, folder, second), tmp_path / "out")
    assert len(told) == 2, "its tokens are counted before"
    assert found.images == 7
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert run(mini, folder, tmp_path / "out", engine=engine).made == 0, "the folder is free again"
