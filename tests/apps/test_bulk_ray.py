"""Extraction by Ray: the shards of the local engine, whichever actors make them and however often these die."""

import faulthandler
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from dying import Deadly, Tiring
from killed_bulk import kill_now_and_then
from many import TAPS, everything, paint, paint_all, run, shards, spoil

from vitfeats.apps.bulk import open_source
from vitfeats.apps.bulk import ray as engine
from vitfeats.apps.bulk.making import Made, Part, settings_of
from vitfeats.apps.bulk.sources import Files
from vitfeats.apps.bulk.store import Store, create_store
from vitfeats.errors import ConfigError, ImageError, MissingDependencyError, StoreError

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures of five sizes, in folders in a folder, and a file that is none."""
    return paint_all(tmp_path / "pictures")


@pytest.fixture(scope="module", autouse=True)
def _no_ray_is_left():
    yield
    if "ray" in sys.modules and find_spec("ray") is not None:
        import ray

        ray.shutdown()


@pytest.fixture
def alone() -> None:
    """No Ray is connected, so that a run has to start it."""
    import ray

    ray.shutdown()


@pytest.fixture
def cluster(monkeypatch):
    """Ray, started by someone else with four CPUs, and left running: it serves all tests that ask for one."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for the sources that end processes
    if not ray.is_initialized():
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    assert ray.is_initialized(), "who has not started it must not end it"


@pytest.fixture
def many(tmp_path) -> Path:
    """A hundred and sixty small pictures."""
    for number in range(160):
        paint(tmp_path / f"many/{number:03}.png", (20 + number % 7, 20 + number % 5), number)
    return tmp_path / "many"


class Faulty(Files):
    """Files whose reading has a mistake in it."""

    def image(self, number):
        if self.ids[number] == "four.png":
            raise ZeroDivisionError("a mistake of the source")
        return super().image(number)

    def part(self, start, stop):
        return Faulty(self.ids[start:stop], self.folder)


# Without Ray, or without starting it ----------------------------------------------------------------------------------


def test_actors_are_for_ray_and_at_least_one(mini, folder, tmp_path):
    for actors in (0, -1):
        with pytest.raises(ConfigError, match=f"expected actors of at least 1, got {actors}"):
            run(mini, folder, tmp_path / "out", engine="ray", actors=actors)
    with pytest.raises(ConfigError, match="expected actors= with engine='ray', got it with engine='local'; leave it"):
        run(mini, folder, tmp_path / "out", actors=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("as_a_user")
def test_an_unknown_engine_is_refused(mini, folder, tmp_path):
    with pytest.raises(ConfigError, match="expected engine 'local', 'ray', got 'spark'"):
        run(mini, folder, tmp_path / "out", engine="spark")
    assert not (tmp_path / "out").exists()


def test_several_devices_are_not_for_ray(mini, folder, tmp_path):
    with pytest.raises(ConfigError, match="expected one device with engine='ray', .* got several; try actors="):
        run(mini, folder, tmp_path / "out", engine="ray", device=["cpu", "cpu"])
    assert not (tmp_path / "out").exists()


def test_without_ray_it_is_told_how_to_install_it(mini, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r'expected Ray .*; try: pip install "vitfeats\[bulk\]"'):
        run(mini, folder, tmp_path / "out", engine="ray")
    assert shards(tmp_path / "out") == {}


def test_where_nothing_is_to_be_done_no_ray_is_wanted(mini, folder, tmp_path, monkeypatch):
    first = run(mini, folder, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it would fail
    again = run(mini, folder, tmp_path / "out", engine="ray", actors=2)
    assert (again.images, again.made, again.bytes) == (first.images, 0, first.bytes)


@pytest.mark.parametrize(("cores", "cpus"), [(None, 4), (1, 4), (2, 4), (16, 16)])
def test_a_ray_of_its_own_has_cpus_for_more_than_actors_and_is_ended(monkeypatch, cores, cpus):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    calls = []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda *given, **settings: calls.append(("init", *given, settings["num_cpus"])),
        shutdown=lambda: calls.append("shutdown"),
    )
    with pytest.raises(ZeroDivisionError), engine._connected(ray):
        raise ZeroDivisionError
    assert calls == [("init", "local", cpus), "shutdown"]


def test_a_cluster_that_is_named_is_joined_as_it_is(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    calls = []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda *given, **settings: calls.append((given, sorted(settings))),
        shutdown=lambda: calls.append("shutdown"),
    )
    with engine._connected(ray):
        pass
    # Ray refuses to be told how many CPUs a cluster has that is there already.
    assert calls == [((), ["log_to_driver", "logging_level"]), "shutdown"]


def test_a_ray_that_is_there_is_neither_started_nor_ended():
    with engine._connected(SimpleNamespace(is_initialized=lambda: True)):
        pass


@pytest.fixture
def actor(mini, folder, tmp_path, monkeypatch):
    """What gives an actor in this process, and the part that is to be shard 1: four.png, five.png and six.png."""
    pytest.importorskip("ray")
    import ray

    monkeypatch.setattr(ray, "get", lambda held: held)

    def made(source=None, strict=False, **others):
        images = open_source(folder) if source is None else source
        settings = settings_of(mini, TAPS, "float16") | others
        store = create_store(tmp_path / "out", images.ids, settings, 3)
        part = Part(1, images.part(3, 6))
        return engine._Actor([pickle.dumps(mini)], str(store.path), 3, 2, strict), part

    return made


def work(actor, part: Part) -> Made | Exception:
    found = actor({"number": [part.number], "part": [pickle.dumps(part)]})
    assert list(found["number"]) == [part.number]
    return pickle.loads(found["made"][0])


def test_an_actor_makes_a_shard_and_forgets_its_attempt(mini, folder, tmp_path, actor):
    run(mini, folder, tmp_path / "whole")
    assert work(*actor()) == Made(1, 3, {})
    name = "part-0000001.safetensors"
    assert shards(tmp_path / "out") == {name: shards(tmp_path / "whole")[name]}
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == []


@pytest.mark.parametrize("others", [{"torch": "0.0"}, {"weights": "0" * 32}, {"vitfeats": "0.0"}, {"stride": 8}])
def test_an_actor_that_would_make_other_features_makes_none(tmp_path, actor, others):
    ((name, there),) = others.items()
    found = work(*actor(**others))
    assert isinstance(found, ConfigError)
    assert str(found).startswith(f"expected each machine to have what began the run, but these differ: {name}: ")
    assert str(found).endswith(f" here, {there!r} in the store")
    assert shards(tmp_path / "out") == {}


def test_an_actor_tells_errors_as_what_they_are(folder, tmp_path, actor):
    (folder / "four.png").write_bytes(b"no picture")
    found = work(*actor(strict=True))
    assert type(found) is ImageError
    assert str(found).startswith("'four.png': expected ")
    (tmp_path / "out/part-0000001.safetensors").mkdir()  # nothing can be written over it
    found = work(*actor())
    assert type(found) is StoreError
    assert "expected to write '" in str(found)


def test_an_actor_tells_mistakes_of_a_source_of_the_users_own(folder, tmp_path, actor):
    images = open_source(folder)
    found = work(*actor(Faulty(images.ids, folder)))
    assert type(found) is StoreError
    assert "expected to make shard 1 of '" in str(found)
    assert "its actor got ZeroDivisionError: a mistake of the source; whole shards stay" in str(found)


def test_a_shard_is_attempted_five_times(folder, tmp_path, actor):
    _, part = actor()
    store = Store(tmp_path / "out")
    for _ in range(5):
        engine._note_attempt(store, part)
    told = r"expected to make shard 1 of '.*out', but 5 actors died of it; .* \('five.png' to 'six.png'\) kills them"
    with pytest.raises(StoreError, match=told):
        engine._note_attempt(store, part)
    engine._note_attempt(store, Part(11, part.images))  # another shard has its own
    with pytest.raises(ZeroDivisionError), engine._without_attempts(store):
        raise ZeroDivisionError
    assert list((tmp_path / "out").glob(".attempt*")) == []


# With Ray -------------------------------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.usefixtures("alone")
def test_ray_gives_the_shards_of_the_local_engine(mini, folder, tmp_path):
    import ray

    bad = spoil(folder)
    whole = run(mini, folder, tmp_path / "whole")
    found = run(mini, folder, tmp_path / "out", engine="ray")
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert sorted(found.broken) == bad
    assert (found.images, found.made, found.broken, found.bytes) == (whole.images, 7, whole.broken, whole.bytes)
    assert not ray.is_initialized()


@needs_ray
@pytest.mark.slow
def test_two_actors_give_the_shards_of_one_and_go_on_where_some_are_missing(mini, folder, tmp_path, cluster):
    spoil(folder)
    run(mini, folder, tmp_path / "whole", pooled=True)
    context = cluster.data.DataContext.get_current()
    before = context.enable_progress_bars
    out = tmp_path / "out"
    run(mini, folder, out, engine="ray", actors=2, pooled=True)
    assert everything(out) == everything(tmp_path / "whole")
    assert context.enable_progress_bars == before
    for number in (0, 1, 2, 4):
        Store(out).shard_path(number).unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    faulthandler.dump_traceback_later(180, exit=True)  # what hangs in Ray cannot be interrupted
    run(mini, folder, out, engine="ray", actors=8, pooled=True)  # they take all four CPUs
    faulthandler.cancel_dump_traceback_later()
    assert everything(out) == everything(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_module_goes_to_the_actors(folder, tmp_path):
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, dynamic_img_size=True)
    run(module, folder, tmp_path / "whole", taps=["key@1"], size=64)
    run(module, folder, tmp_path / "out", taps=["key@1"], size=64, engine="ray")
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_errors_of_actors_come_through_and_the_run_goes_on_later(mini, folder, tmp_path):
    run(mini, folder, tmp_path / "whole")
    whole = (folder / "four.png").read_bytes()
    (folder / "four.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="^'four.png': expected "):
        run(mini, folder, tmp_path / "out", engine="ray", strict=True)
    (folder / "four.png").write_bytes(whole)
    blocked = tmp_path / "out/part-0000001.safetensors"
    blocked.mkdir()
    with pytest.raises(StoreError, match=r"expected to write '.*part-0000001.safetensors', but: .*directory"):
        run(mini, folder, tmp_path / "out", engine="ray", strict=True)
    blocked.rmdir()
    assert shards(tmp_path / "out").items() <= shards(tmp_path / "whole").items()
    run(mini, folder, tmp_path / "out", engine="ray", strict=True)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_actors_that_die_again_and_again_are_replaced(mini, many, tmp_path):
    images = open_source(many)
    run(mini, many, tmp_path / "whole", per_shard=20)
    found = run(mini, Tiring(images.ids, many), tmp_path / "out", per_shard=20, engine="ray")
    assert len((tmp_path / "deaths").read_text().splitlines()) == 3  # in the third shard of each of three actors
    assert (found.images, found.made) == (160, 160)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert [name for name, _ in Store(tmp_path / "out").each()] == images.ids


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_shard_that_kills_its_actor_each_time_ends_the_run(mini, folder, tmp_path):
    images = open_source(folder)
    run(mini, folder, tmp_path / "whole", per_shard=1)
    with pytest.raises(StoreError, match=r"shard 1 of '.*out', but 5 actors died of it; .*'a/two.png'"):
        run(mini, Deadly(images.ids, folder), tmp_path / "out", per_shard=1, engine="ray")
    assert (tmp_path / "deaths").read_text().splitlines() == ["a/two.png"] * 5
    left = shards(tmp_path / "out")
    assert "part-0000000.safetensors" in left
    assert left.items() <= shards(tmp_path / "whole").items()
    assert list((tmp_path / "out").glob(".attempt*")) == []
    run(mini, folder, tmp_path / "out", per_shard=1)  # the file was mended, say
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


SCRIPT = """
import sys
from pathlib import Path
import timm, torch, vitfeats as vf
from vitfeats.apps.bulk import open_source
from vitfeats.apps.bulk.sources import Files

class Own(torch.nn.Identity):
    def forward(self, x):
        return 2 * x

class Images(Files):
    def part(self, start, stop):
        return Images(self.ids[start:stop], self.folder)

torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, dynamic_img_size=True)
model.norm_pre = Own()
images = Images(open_source("pictures").ids, Path("pictures"))
given = {"model": model, "taps": ["key@1"], "size": 64, "per_shard": 2}
vf.bulk.extract(images, "whole", **given)
vf.bulk.extract(images, "out", **given)
for number in (1, 3):
    vf.bulk.Store("out").shard_path(number).unlink()
assert vf.bulk.extract(images, "out", engine="ray", actors=2, **given).made == 3
"""


@needs_ray
@pytest.mark.slow
def test_what_a_script_defines_goes_to_the_actors_of_a_ray_of_its_own(folder, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone.pop("RAY_ADDRESS", None)
    given = {"env": alone, "capture_output": True, "text": True, "timeout": 240}
    ended = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=False, **given)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


@needs_ray
@pytest.mark.slow
def test_runs_with_ray_that_were_killed_go_on_as_if_they_had_not(many, tmp_path):
    (many / "031.png").write_bytes(b"no picture")
    places = {"source": many, "whole": tmp_path / "whole", "folder": tmp_path}
    found = kill_now_and_then(work="killed_by_ray", **places, times=5, seed=3, per_shard=3)
    assert len(found["were"]) == 5
    assert found["were"][0] < found["were"][-1] < 54, "they were killed while they worked"
    assert [told.partition("but ")[2][:39] for told in found["refused"]] == [
        "another run is at work there; wait for "
    ] * 2
