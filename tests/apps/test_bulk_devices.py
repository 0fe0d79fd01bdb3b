"""Several devices that share the shards of a run: the bytes of one device, and an end to everything that goes wrong."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from many import everything, paint, run, shards

from vitfeats.apps.bulk import making
from vitfeats.apps.bulk.making import ShardMaker
from vitfeats.apps.bulk.shards import check_shard, write_shard
from vitfeats.apps.bulk.store import Store, locked
from vitfeats.errors import ConfigError, ImageError, StoreError

pytestmark = pytest.mark.usefixtures("as_a_user")  # a run takes a third of the time then

TWO = ["cpu", "cpu"]
BROKEN = "05.png"
SETTINGS = {"taps": ["key@1"], "per_shard": 1, "batch_size": 1}


@pytest.fixture(autouse=True)
def within_a_minute() -> Iterator[None]:
    """End the test run with a traceback of every thread where something hangs."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def narrow(mini):
    return mini.resized(size=48)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve pictures of two sizes, one of them broken."""
    for number in range(12):
        paint(tmp_path / f"pictures/{number:02}.png", (30, 40) if number % 3 else (60, 40), number)
    (tmp_path / "pictures" / BROKEN).write_bytes(b"no picture")
    return tmp_path / "pictures"


def assert_whole_but_unfinished(out: Path, whole: Path) -> None:
    """See that shards are those of an uninterrupted run, that some are missing, and that nobody holds the folder."""
    left = shards(out)
    assert left.items() < shards(whole).items()
    assert all(check_shard(out / name) is None for name in left)
    assert list(out.rglob("*.tmp")) == []
    with locked(out):
        pass


def each_other(original, then):
    """Return what calls ``then(number of the call)`` before the original."""
    lock, calls = threading.Lock(), []

    def called(*given, **settings):
        with lock:
            calls.append(given)
            number = len(calls)
        then(number)
        return original(*given, **settings)

    return called


@pytest.mark.parametrize("devices", [TWO, ["cpu"] * 3, ("cpu",), "cpu"])
@pytest.mark.parametrize("per_shard", [1, 5, 100])
def test_several_devices_give_the_bytes_of_one(narrow, folder, tmp_path, devices, per_shard):
    settings = {"per_shard": per_shard, "batch_size": 2}
    whole = run(narrow, folder, tmp_path / "whole", **settings)
    summary = run(narrow, folder, tmp_path / "out", device=devices, **settings)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert (summary.images, summary.made, summary.bytes) == (11, 11, whole.bytes)
    assert list(summary.broken) == [BROKEN]


def test_a_model_by_name_goes_to_each_device(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "whole", **SETTINGS)
    run("mini", folder, tmp_path / "out", size=48, device=TWO, **SETTINGS)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_devices_are_at_work_at_once_with_models_of_their_own(narrow, folder, tmp_path, monkeypatch):
    both = threading.Barrier(2)
    models = set()

    def together(number):
        if number <= 2:
            both.wait(30)

    original = each_other(ShardMaker._read, together)

    def read(maker, *given):
        models.add(id(maker._extractor.model))
        return original(maker, *given)

    monkeypatch.setattr(ShardMaker, "_read", read)
    run(narrow, folder, tmp_path / "out", device=TWO, **SETTINGS)
    assert len(models) == 2
    assert id(narrow.model) in models


def test_going_on_with_another_number_of_devices_completes_the_store(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "whole", **SETTINGS)
    run(narrow, folder, tmp_path / "out", device=TWO, **SETTINGS)
    for number in (0, 3, 4, 5, 11):
        Store(tmp_path / "out").shard_path(number).unlink()
    assert run(narrow, folder, tmp_path / "out", device=["cpu"] * 3, **SETTINGS).made == 4
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert run(narrow, folder, tmp_path / "out", device=TWO, **SETTINGS).made == 0


@pytest.mark.parametrize("at", [1, 4, 12])
@pytest.mark.parametrize("where", ["reading", "model", "writing"])
def test_an_error_of_one_device_ends_the_run(narrow, folder, tmp_path, monkeypatch, where, at):
    run(narrow, folder, tmp_path / "whole", **SETTINGS)

    def fail(number):
        if number == at:
            raise ZeroDivisionError("in the middle")

    with monkeypatch.context() as patch:
        if where == "reading":
            patch.setattr(ShardMaker, "_prepared", each_other(ShardMaker._prepared, fail))
        elif where == "model":
            patch.setattr(ShardMaker, "_read", each_other(ShardMaker._read, fail))
        else:
            patch.setattr(making, "write_shard", each_other(write_shard, fail))
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            run(narrow, folder, tmp_path / "out", device=TWO, **SETTINGS)
    assert_whole_but_unfinished(tmp_path / "out", tmp_path / "whole")
    run(narrow, folder, tmp_path / "out", device=TWO, **SETTINGS)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_an_error_of_every_device_ends_the_run(narrow, folder, tmp_path, monkeypatch):
    def fail(number):
        raise StoreError(f"error {number}")

    monkeypatch.setattr(making, "write_shard", each_other(write_shard, fail))
    with pytest.raises(StoreError, match=r"error \d"):
        run(narrow, folder, tmp_path / "out", device=["cpu"] * 3, **SETTINGS)
    assert shards(tmp_path / "out") == {}


def test_the_others_begin_nothing_after_an_error(narrow, tmp_path, monkeypatch):
    for number in range(40):
        paint(tmp_path / f"pictures/{number:02}.png", (20, 20), number)

    def fail(number):
        if number == 4:
            raise ZeroDivisionError
        time.sleep(0.02)

    monkeypatch.setattr(making, "write_shard", each_other(write_shard, fail))
    with pytest.raises(ZeroDivisionError):
        run(narrow, tmp_path / "pictures", tmp_path / "out", device=TWO, workers=1, **SETTINGS)
    assert 3 <= len(shards(tmp_path / "out")) < 30


def test_strict_stops_every_device_at_the_file_and_names_it(narrow, folder, tmp_path):
    run(narrow, folder, tmp_path / "whole", **SETTINGS)
    with pytest.raises(ImageError, match=rf"'{BROKEN}': expected an image"):
        run(narrow, folder, tmp_path / "out", device=TWO, strict=True, **SETTINGS)
    assert_whole_but_unfinished(tmp_path / "out", tmp_path / "whole")
    assert "part-0000005.safetensors" not in shards(tmp_path / "out")


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_ends_the_run_and_leaves_whole_shards(narrow, folder, tmp_path, monkeypatch, at):
    run(narrow, folder, tmp_path / "whole", **SETTINGS)
    before = threading.active_count()

    def press(number):
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # so that there is something left to do

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_shard", each_other(write_shard, press))
        with pytest.raises(KeyboardInterrupt):
            run(narrow, folder, tmp_path / "out", device=TWO, workers=1, **SETTINGS)
    assert_whole_but_unfinished(tmp_path / "out", tmp_path / "whole")
    assert threading.active_count() <= before, "no thread of the run is left"
    run(narrow, folder, tmp_path / "out", device=TWO, **SETTINGS)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_no_device_is_refused(narrow, folder, tmp_path):
    with pytest.raises(ConfigError, match="expected a device, or several, got none; try 'auto'"):
        run(narrow, folder, tmp_path / "out", device=[])
    with pytest.raises(ConfigError, match="expected one device with engine='ray'"):
        run(narrow, folder, tmp_path / "out", device=TWO, engine="ray")
    assert not (tmp_path / "out").exists()
