"""Extraction to disk: the numbers of the extractor, whatever the source, the workers and the interruptions."""

import gzip
import os
import re
import shutil
import tarfile
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from many import (
    NAMES,
    SIZES,
    TAPS,
    assert_same,
    broken_pictures,
    everything,
    paint,
    paint_all,
    run,
    shards,
    spoil,
    tarred,
)

import vitfeats as vf
from vitfeats.apps.bulk import making, open_source, sources
from vitfeats.apps.bulk.shards import check_shard, write_shard
from vitfeats.apps.bulk.store import Store, locked
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError, TapError, UnknownModelError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures of five sizes, in folders in a folder, and a file that is none."""
    return paint_all(tmp_path / "pictures")


def test_a_store_has_the_numbers_of_the_extractor(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "out", dtype="float32")
    store = Store(tmp_path / "out")
    assert store.ids == NAMES
    assert store.taps == TAPS
    assert list(store.check()) == []
    expected = mini.each([folder / name for name in NAMES], TAPS, batch_size=3)  # shards end where batches do
    for name, descriptors in zip(NAMES, expected, strict=True):
        assert_same(store[name], descriptors)
    assert [name for name, _ in store.each()] == NAMES


def test_taps_come_back_as_they_were_asked(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "out", taps=["token@2", "key@-1", "token@2"])
    found = Store(tmp_path / "out")["z.png"]
    assert list(map(str, found)) == Store(tmp_path / "out").taps
    assert list(map(str, found)) == list(map(str, mini(folder / "z.png", ["token@2", "key@-1"])))


def test_no_tap_is_the_usual_tap_of_the_model(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "out", taps=None, dtype="float32")
    store = Store(tmp_path / "out")
    (found,) = store["z.png"].values()
    assert torch.allclose(found.features, mini(folder / "z.png").features, atol=1e-5)
    assert store.taps == [str(found.tap)]


def test_a_model_by_name_is_the_same_store(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "out")
    run("mini", folder, tmp_path / "named", size=112, device="cpu")
    assert everything(tmp_path / "out") == everything(tmp_path / "named")


def test_a_folder_a_tar_file_and_a_list_give_the_same_shards(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "out")
    expected = everything(tmp_path / "out")
    for number, (mode, start) in enumerate({"w": ".", "w:gz": "."}.items()):
        run(mini, tarred(folder, tmp_path / f"{number}.tar", mode, start), tmp_path / f"out{number}")
        assert everything(tmp_path / f"out{number}") == expected
    (folder / "list.txt").write_text("\ufeff" + "\n  ".join(reversed(NAMES)) + "\n\n", encoding="utf-8")
    run(mini, folder / "list.txt", tmp_path / "listed")
    assert everything(tmp_path / "listed") == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_type_on_disk_is_the_one_that_was_asked_for(mini, folder, tmp_path, dtype):
    summary = run(mini, folder, tmp_path / "out", dtype=dtype)
    store = Store(tmp_path / "out")
    assert store.settings["dtype"] == dtype
    tokens = sum(d.features.numel() for _, ds in store.each() for d in ds.values())
    assert tokens * {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype] < summary.bytes
    expected = mini(folder / "z.png", "key@1")
    error = (store["z.png"]["key@1"].features - expected.features).abs().max() / expected.features.abs().max()
    assert error < {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 1e-2}[dtype]


def test_workers_do_not_change_a_byte(mini, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    found = []
    for workers in (1, 3, None):
        run(mini, folder, tmp_path / f"{workers}", workers=workers)
        found.append(everything(tmp_path / f"{workers}"))
    assert found[0] == found[1] == found[2]


def test_a_summary_tells_what_a_run_did(mini, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    first = run(mini, folder, out)
    assert [field.name for field in fields(first)] == ["path", "images", "made", "broken", "seconds", "bytes"]
    assert (first.path, first.images, first.made, list(first.broken)) == (out, 7, 7, ["broken.png"])
    assert first.broken == Store(out).broken()
    assert first.bytes == sum(map(len, shards(out).values()))
    assert first.rate == pytest.approx(7 / first.seconds)
    again = run(mini, folder, str(out))
    assert (again.images, again.made, again.broken, again.bytes, again.rate) == (7, 0, first.broken, first.bytes, 0.0)
    Store(out).shard_path(2).unlink()
    third = run(mini, folder, out)
    assert (third.images, third.made) == (7, len(Store(out).ids_of(2)))


def test_broken_files_are_noted_and_skipped(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "whole", dtype="float32", per_shard=100, batch_size=100)
    bad = spoil(folder)
    summary = run(mini, folder, tmp_path / "out", dtype="float32", per_shard=100, batch_size=100)
    assert sorted(summary.broken) == bad
    assert all(why.startswith("expected ") for why in summary.broken.values())
    assert (summary.images, summary.made) == (7, 7)
    store, whole = Store(tmp_path / "out"), Store(tmp_path / "whole")
    assert list(store.check()) == []
    assert [name for name, _ in store.each()] == NAMES
    for name in NAMES:
        assert_same(store[name], whole[name])


@pytest.mark.parametrize("name", broken_pictures())
@pytest.mark.parametrize("packed", ["folder", "tar", "tar.gz", "list"])
def test_every_kind_of_broken_file_is_skipped_in_every_kind_of_source(mini, tmp_path, name, packed):
    paint(tmp_path / "pictures/b/c/three.png", (64, 64), 0)
    root = tmp_path / "pictures"
    for other in {*spoil(root)} - {name}:
        (root / other).unlink()
    source = root
    if packed.startswith("tar"):
        source = tarred(root, tmp_path / "pictures.tar", "w:gz" if packed == "tar.gz" else "w")
    if packed == "list":
        source = root / "list.txt"
        source.write_text(f"{name}\nb/c/three.png\n")
    summary = run(mini, source, tmp_path / "out", taps=["key@0"])
    assert list(summary.broken) == [name]
    assert summary.broken[name].startswith("expected ")
    assert (summary.images, summary.made) == (1, 1)
    with pytest.raises((ImageError, ShapeError), match=f"'{name}': expected "):
        run(mini, source, tmp_path / "strict", taps=["key@0"], strict=True)
    assert shards(tmp_path / "strict") == {}


def test_a_shard_of_broken_files_alone_is_made(mini, tmp_path):
    for number in range(5):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{number}.png").write_bytes(b"no picture")
    summary = run(mini, tmp_path / "pictures", tmp_path / "out")
    assert (summary.images, summary.made, len(summary.broken)) == (0, 0, 5)
    assert list(Store(tmp_path / "out").check()) == []
    assert list(Store(tmp_path / "out").each()) == []
    assert run(mini, tmp_path / "pictures", tmp_path / "out").broken == summary.broken


def test_strict_stops_at_the_file_and_names_it(mini, folder, tmp_path):
    (folder / "g.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"'g.png': expected an image"):
        run(mini, folder, tmp_path / "out", strict=True)
    before = shards(tmp_path / "out")  # those ahead of it are whole
    assert list(before) == ["part-0000000.safetensors"]
    paint(folder / "g.png", (20, 20), 9)
    assert run(mini, folder, tmp_path / "out", strict=True).images == 8
    assert {**shards(tmp_path / "out"), **before} == shards(tmp_path / "out")


def test_files_that_a_list_names_and_that_are_not_there_are_broken(mini, folder, tmp_path):
    listed = tmp_path / "list.lst"
    listed.write_text(f"{folder}/z.png\n{folder}/none.png\n{folder}/a\n")
    summary = run(mini, listed, tmp_path / "out")
    assert "there is none" in summary.broken[f"{folder}/none.png"]
    assert "got the folder" in summary.broken[f"{folder}/a"]
    assert summary.images == 1


def test_a_name_that_is_no_text_is_an_id_all_the_same(mini, folder, tmp_path):
    odd = [os.fsdecode(b"caf\xe9.png"), "zeile\nzwei.png", "日本 'é'.png"]
    for name in odd:
        shutil.copy(folder / "z.png", folder / name)
    run(mini, folder, tmp_path / "out", dtype="float32")
    store = Store(tmp_path / "out")
    assert set(odd) < set(store)
    assert list(store.check()) == []
    assert all(torch.allclose(store[n]["key@1"].features, store["z.png"]["key@1"].features, atol=1e-5) for n in odd)


@pytest.mark.parametrize("lost", [[1], [0, 2], [0, 1, 2]])
def test_shards_that_are_missing_are_made_again_to_the_byte(mini, folder, tmp_path, lost):
    (folder / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    run(mini, folder, out)
    before = everything(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    for number in lost:
        path = Store(out).shard_path(number)
        path.unlink()
        del kept[path]
    run(mini, folder, out)
    assert everything(out) == before
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


def test_damage_is_removed_and_made_again_to_the_byte(mini, folder, tmp_path):
    out = tmp_path / "out"
    run(mini, folder, out)
    before = everything(out)
    for number, path in enumerate(sorted(out.glob("part-*"))):
        content = path.read_bytes()
        path.write_bytes(content[:-9] if number else b"\0" + content[1:])
    assert [damage.shard for damage in Store(out).remove_damaged()] == [0, 1, 2]
    run(mini, folder, out)
    assert everything(out) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["reading", "model", "writing"])
def test_an_interrupted_run_leaves_whole_shards_only(mini, folder, tmp_path, monkeypatch, error, where):
    run(mini, folder, tmp_path / "whole", workers=1)
    calls = []

    def stopping(original, after):
        def stopped(*given, **settings):
            calls.append(given)
            if len(calls) > after:
                raise error("in the middle")
            return original(*given, **settings)

        return stopped

    with monkeypatch.context() as patch:
        if where == "reading":
            patch.setattr(sources, "load_image", stopping(sources.load_image, 6))
        elif where == "writing":
            patch.setattr(making, "write_shard", stopping(write_shard, 1))
        else:
            each, through = mini.each, stopping(lambda found: found, 4)
            patch.setattr(mini, "each", lambda *given, **settings: map(through, each(*given, **settings)))
        with pytest.raises(error, match="in the middle"):
            run(mini, folder, tmp_path / "out", workers=1)
    with locked(tmp_path / "out"):
        pass
    left = shards(tmp_path / "out")
    assert len(left) < 3
    assert all(check_shard(tmp_path / "out" / name) is None for name in left)
    assert left.items() <= shards(tmp_path / "whole").items()
    assert list((tmp_path / "out").glob(".*.tmp")) == []
    run(mini, folder, tmp_path / "out", workers=1)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_another_run_is_refused(mini, folder, tmp_path):
    out = tmp_path / "out"
    run(mini, folder, out)
    before = everything(out)

    def refused(message: str, **settings) -> None:
        with pytest.raises(ConfigError, match=message):
            run(**{"mini": mini, "source": folder, "out": out, **settings})
        assert everything(out) == before

    refused(r"these differ: taps: \['key@1', 'token@2'\] there, \['key@1'\] here. Use another folder", taps=["key@1"])
    refused("these differ: taps: ", taps=TAPS[::-1])
    refused("these differ: dtype: 'float16' there, 'int8' here", dtype="int8")
    refused("these differ: per_shard: 3 there, 4 here", per_shard=4)
    refused("these differ: size: 112 there, 96 here", mini=mini.resized(size=96))
    refused("these differ: stride: 16 there, 8 here", mini=mini.resized(stride=8))
    refused("these differ: norm: False there, True here", mini=vf.load_extractor("mini", size=112, norm=True))
    other = vf.load_extractor("mini", size=112, device="cpu")
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    refused("these differ: weights: '[0-9a-f]+' there, '[0-9a-f]+' here", mini=other)
    paint(folder / "new.png", (20, 20), 0)
    refused("these differ: ids: ")


def test_a_run_beside_another_is_refused(mini, folder, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(StoreError, match="another run is at work there"):
        run(mini, folder, tmp_path / "out")
    assert shards(tmp_path / "out") == {}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(mini, folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    numbers = sum(d.features.numel() for d in mini(folder / NAMES[0], TAPS).values())
    expected = 7 * numbers * 2  # bytes of float16, from the first image
    for free, fits in ((expected // 2, False), (expected, False), (2 * expected, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(10**12, 10**12 - free, free))
        if fits:
            run(mini, folder, tmp_path / "out")
            continue
        told = r"expected a disk that holds about \d+ kB at '.*out', but \d+ kB are free; read fewer taps"
        with pytest.raises(StoreError, match=told):
            run(mini, folder, tmp_path / "out")
        assert shards(tmp_path / "out") == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 0))
    assert run(mini, folder, tmp_path / "out").made == 0, "what is there needs no room"


def test_a_source_without_images_is_refused(mini, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    tarred(tmp_path / "empty", tmp_path / "empty.tar")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name in ("empty", "empty.tar", "empty.txt"):
        with pytest.raises(ConfigError, match=f"expected images in '.*{name}', got none"):
            run(mini, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_cannot_be_read_is_refused(mini, tmp_path):
    (tmp_path / "text.tar").write_text("no tar file")
    for name in ("none", "none.tar", "text.tar"):
        with pytest.raises(StoreError, match="expected a folder or a tar file of pictures at"):
            run(mini, tmp_path / name, tmp_path / "out")
    with pytest.raises(StoreError, match="expected a list of images, one a line, at .*none.txt"):
        run(mini, tmp_path / "none.txt", tmp_path / "out")
    (tmp_path / "list.txt").write_bytes(b"\xff\xff\n")
    with pytest.raises(StoreError, match="expected a list of images, one a line, at '.*list.txt', but"):
        run(mini, tmp_path / "list.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tar_file_that_was_cut_off_is_no_half_a_source(folder, tmp_path):
    archive = tarred(folder, tmp_path / "pictures.tar.gz", "w:gz")
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(StoreError, match="expected a folder or a tar file of pictures"):
        open_source(archive)
    archive.write_bytes(gzip.compress(b"no tar file"))
    with pytest.raises(StoreError, match="expected a folder or a tar file of pictures"):
        open_source(archive)


def test_images_that_are_listed_twice_are_refused(mini, folder, tmp_path):
    (tmp_path / "list.txt").write_text(f"{folder}/z.png\n{folder}/six.png\n{folder}/z.png\n")
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as archive:
        archive.add(folder / "z.png", arcname="z.png")
        archive.add(folder / "six.png", arcname="./z.png")
    for source in (tmp_path / "list.txt", twice):
        with pytest.raises(ConfigError, match="expected images of different names in '.*', got some twice"):
            run(mini, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_items_of_a_source_are_in_the_order_of_their_ids(folder, tmp_path):
    for source in (folder, tarred(folder, tmp_path / "pictures.tar")):
        images = open_source(source)
        assert images.ids == NAMES
        assert all(images.image(number).shape == (3, *SIZES[name][::-1]) for number, name in enumerate(NAMES))


def test_what_makes_no_run_is_refused(mini, folder, tmp_path):
    with pytest.raises(ConfigError, match="expected at least one tap, got none"):
        run(mini, folder, tmp_path / "out", taps=[])
    with pytest.raises(TapError):
        run(mini, folder, tmp_path / "out", taps=["key@99"])
    with pytest.raises(UnknownModelError):
        run("no such model", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for per_shard in (0, -2):
        with pytest.raises(ConfigError, match="expected batch_size, per_shard and workers of at least 1, got 3, "):
            run(mini, folder, tmp_path / "out", per_shard=per_shard)
    with pytest.raises(ConfigError, match="expected batch_size, per_shard and workers of at least 1, got 0, "):
        run(mini, folder, tmp_path / "out", batch_size=0)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="expected to write into"):
        run(mini, folder, tmp_path / "file")


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dtype": "float64"}, "expected dtype"), ({"workers": -1}, "workers")],
)
def test_settings_that_make_no_sense_leave_no_store(mini, folder, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(mini, folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "store.json").exists()


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_so_many_are_read_ahead(most, workers):
    taken, lock, begun = [], threading.Lock(), []

    def given():
        for number in range(20):
            taken.append(number)
            yield (number,)

    def work(number):
        with lock:
            begun.append(number)
        time.sleep(0.001 * (number % 3))  # so that they do not end in order
        return number * number

    with ThreadPoolExecutor(workers) as pool:
        ahead = making._ahead(pool, work, given(), most)
        assert taken == [], "nothing is read before it is asked for"
        for number, made in enumerate(ahead):
            assert made == number * number
            assert len(taken) - number <= most
            assert len(begun) - number <= most
        assert number == 19
        assert sorted(begun) == list(range(20))
        assert list(making._ahead(pool, work, [], most)) == []


def test_an_error_of_the_work_comes_in_its_place_and_stops_the_rest():
    begun, released = [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 2:
            raise ZeroDivisionError("the third")
        if number > 2:
            released.wait(10)
        return number

    with ThreadPoolExecutor(1) as pool:
        ahead = making._ahead(pool, work, zip(range(100)), 6)
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="the third"):
            next(ahead)
        released.set()
    assert set(begun) <= {0, 1, 2, 3}, "what waits is cancelled"


def test_an_error_of_what_is_given_passes_through():
    def given():
        yield from ((1,), (2,))
        raise ZeroDivisionError("given")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError, match="given"):
        list(making._ahead(pool, lambda number: number, given(), 4))


def test_one_tap_may_be_given_as_text(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "out", taps="cls@11")
    assert Store(tmp_path / "out").taps == ["cls@11"]


def test_images_that_were_mended_are_read_when_that_is_asked_for(mini, folder, tmp_path):
    shutil.copy(folder / "z.png", tmp_path / "kept.png")
    (folder / "z.png").write_bytes(b"no picture")
    assert list(run(mini, folder, tmp_path / "out").broken) == ["z.png"]
    shutil.copy(tmp_path / "kept.png", folder / "z.png")
    again = run(mini, folder, tmp_path / "out")
    assert (again.made, list(again.broken)) == (0, ["z.png"])
    mended = run(mini, folder, tmp_path / "out", retry_broken=True)
    assert (mended.made, mended.broken, mended.images) == (1, {}, 7)
    run(mini, folder, tmp_path / "new")
    assert everything(tmp_path / "out") == everything(tmp_path / "new")


def test_a_module_goes_to_several_devices(mini, folder, tmp_path):
    run(mini.model, folder, tmp_path / "one", size=112)
    run(mini.model, folder, tmp_path / "two", size=112, device=["cpu", "cpu"])
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


@pytest.mark.parametrize("settings", [{"size": 64}, {"stride": 8}])
def test_an_extractor_has_its_own_size(mini, folder, tmp_path, settings):
    with pytest.raises(ConfigError, match="expected size and stride with a model by name, got an extractor"):
        run(mini, folder, tmp_path / "out", **settings)


def test_a_device_that_is_not_there_is_refused_for_an_extractor_too(mini, folder, tmp_path):
    with pytest.raises(ConfigError, match="expected a device of this machine, got 'cuda:7'"):
        run(mini, folder, tmp_path / "out", device="cuda:7")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("taps", [["cls@11"], ["key@1", "cls@11"]])
def test_what_is_expected_on_disk_is_what_comes(mini, tmp_path, capsys, dtype, taps):
    for number in range(40):
        paint(tmp_path / f"pictures/{number:03}.png", (40, 30), number)
    summary = run(mini, tmp_path / "pictures", tmp_path / "out", taps=taps, dtype=dtype, per_shard=16, progress=True)
    told = re.search(r"40 images; about ([0-9.]+) (kB|MB) to write to", capsys.readouterr().err)
    assert told is not None
    assert float(told[1]) * {"kB": 1e3, "MB": 1e6}[told[2]] == pytest.approx(summary.bytes, rel=0.06)


def test_what_is_expected_follows_the_shapes_of_the_images(mini, tmp_path, capsys):
    for number in range(16):
        paint(tmp_path / f"pictures/{number:03}.png", (40, 40) if number == 0 else (120, 40), number)
    summary = run(mini, tmp_path / "pictures", tmp_path / "out", taps=["key@1"], progress=True)
    told = re.search(r"16 images; about ([0-9.]+) kB", capsys.readouterr().err)
    assert told is not None
    assert float(told[1]) * 1e3 == pytest.approx(summary.bytes, rel=0.06)


def test_a_shard_has_a_largest_size(mini, folder, tmp_path):
    with pytest.raises(ConfigError, match="expected per_shard of at most 10000, got 10001"):
        run(mini, folder, tmp_path / "out", per_shard=10_001)


def test_a_run_that_stops_waits_for_no_image_that_nobody_needs(mini, tmp_path, monkeypatch):
    for number in range(40):
        paint(tmp_path / f"pictures/{number:03}.png", (40, 30), number)
    (tmp_path / "pictures/000.png").write_bytes(b"no picture")
    read, image = [], sources.Files.image

    def counted(self, number):
        read.append(number)
        time.sleep(0.01)
        return image(self, number)

    monkeypatch.setattr(sources.Files, "image", counted)
    with pytest.raises(ImageError, match="000.png"):
        run(mini, tmp_path / "pictures", tmp_path / "out", strict=True, workers=1, batch_size=16, per_shard=40)
    assert len(read) < 20, "two of them before the store is begun"


def short_of_memory(monkeypatch, mini, most: int, tokens: int = 10**9) -> None:
    """Let a model's memory hold no more than so many images at once, and none of more tokens."""
    read = mini.read

    def limited(batch, taps):
        if len(batch.frames) > most or batch.grid.tokens > tokens:
            raise MemoryError
        return read(batch, taps)

    monkeypatch.setattr(mini, "read", limited)


def test_a_batch_that_does_not_fit_in_memory_is_read_one_by_one(mini, folder, tmp_path, monkeypatch):
    run(mini, folder, tmp_path / "one", batch_size=1, dtype="float32")
    short_of_memory(monkeypatch, mini, most=1)
    assert run(mini, folder, tmp_path / "out", batch_size=3, dtype="float32").broken == {}
    assert shards(tmp_path / "out") == shards(tmp_path / "one")


def test_an_image_that_does_not_fit_in_memory_alone_is_broken_until_it_fits(mini, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        short_of_memory(patch, mini, most=9, tokens=100)
        found = run(mini, folder, tmp_path / "out")
        assert list(found.broken) == ["four.png"]
        assert "expected images that fit in the memory of cpu, got 1 image of " in found.broken["four.png"]
        with pytest.raises(ImageError, match="'four.png': expected images that fit in the memory"):
            run(mini, folder, tmp_path / "strict", strict=True)
    assert run(mini, folder, tmp_path / "out", retry_broken=True).broken == {}
    run(mini, folder, tmp_path / "whole")
    assert shards(tmp_path / "out").keys() == shards(tmp_path / "whole").keys()


def test_another_error_of_a_model_is_no_matter_of_memory(mini, folder, tmp_path, monkeypatch):
    def wrong(batch, taps):
        raise ShapeError("expected another shape")

    monkeypatch.setattr(mini, "read", wrong)
    with pytest.raises(ShapeError, match="expected another shape"):
        run(mini, folder, tmp_path / "out")
