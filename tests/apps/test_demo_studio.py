"""What visitors share: what is read is read once, from however many threads, and work that nobody waits for ends."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from studios import noise, studio_in, upload

import vitfeats as vf
from vitfeats.apps.demo import studio as module
from vitfeats.apps.demo.intake import Folder, take_in
from vitfeats.apps.demo.studio import LONGEST, MOST_TOKENS, Job, Kept, Pool, Stopped, Studio, View, offered
from vitfeats.configs import DemoConfig
from vitfeats.errors import ConfigError, ImageError, UnknownModelError
from vitfeats.extractors.base import Extractor

KEYS = View("mini", "key", 11, 224)


@pytest.fixture
def studio(tmp_path) -> Iterator[Studio]:
    """A studio that has read nothing."""
    with studio_in(tmp_path) as studio:
        yield studio


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Studio]:
    """A studio for tests that change nothing."""
    with studio_in(tmp_path_factory.mktemp("demo")) as studio:
        yield studio


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of what was loaded, run and opened, in order."""
    found: list[str] = []

    def counted(holder: Any, name: str) -> None:
        real = getattr(holder, name)

        def counting(*given: Any, **others: Any) -> Any:
            found.append(name)
            return real(*given, **others)

        monkeypatch.setattr(holder, name, counting)

    counted(module, "load_extractor")
    counted(module, "take_in")
    counted(Extractor, "__call__")
    return found


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call a function with 0, 1, … in as many threads, which begin together."""
    start = threading.Barrier(count, timeout=30)

    def one(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# Kept ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_what_was_used_last_is_kept_as_a_naive_list_would(seed):
    rng = random.Random(seed)
    kept = Kept[int](10, float)
    naive: list[tuple[int, int]] = []  # (key, value), from what was used longest ago
    for _ in range(300):
        key = rng.randrange(8)
        known = dict(naive)
        if rng.random() < 0.5:
            assert kept.get(key) == known.get(key)
            if key in known:
                naive = [pair for pair in naive if pair[0] != key] + [(key, known[key])]
        else:
            value = rng.randrange(1, 15)
            assert kept.put(key, value) == value
            naive = [pair for pair in naive if pair[0] != key] + [(key, value)]
            while len(naive) > 1 and sum(value for _, value in naive) > 10:
                naive.pop(0)
        assert (len(kept), kept.weight) == (len(naive), sum(value for _, value in naive))


def test_one_value_is_kept_however_heavy():
    kept = Kept[str](5, len)
    kept.put("a", "abc")
    kept.put("b", "far too long")
    assert (kept.get("a"), kept.get("b"), len(kept)) == (None, "far too long", 1)


def test_values_can_be_kept_from_many_threads():
    kept = Kept[int](20, lambda _: 1)

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(400):
            key = rng.randrange(40)
            assert kept.get(key) in (None, key)
            kept.put(key, key)

    at_once(6, work)
    assert kept.weight == len(kept) == 20


# Jobs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool("test") as found:
        yield found


def test_news_come_in_their_order_and_the_newest_is_never_lost(pool):
    def work(tell: Callable[[int], None]) -> None:
        for number in range(2000):
            tell(number)

    for _ in range(5):
        found = list(Job(work, pool))
        assert found == sorted(set(found))
        assert found[-1] == 1999


def test_each_of_the_news_is_seen_by_one_who_waits(pool):
    seen = threading.Semaphore(0)

    def work(tell: Callable[[int], None]) -> None:
        for number in range(20):
            tell(number)
            assert seen.acquire(timeout=10)

    found = []
    for news in Job(work, pool):
        found.append(news)
        seen.release()
    assert found == list(range(20))


def test_a_job_without_news_ends_at_once(pool):
    began = time.monotonic()
    assert list(Job(lambda tell: None, pool)) == []
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("news", [0, 3])
def test_an_error_inside_reaches_the_one_who_iterates_after_the_news(pool, news):
    def work(tell: Callable[[int], None]) -> None:
        for number in range(news):
            tell(number)
        raise ZeroDivisionError("inside")

    found = []
    with pytest.raises(ZeroDivisionError, match="inside"):
        found.extend(Job(work, pool))  # what came before the error stays in the list
    assert found[-1:] == [news - 1][: bool(news)]
    assert list(Job(lambda tell: tell("next"), pool)) == ["next"]


class Endless:
    """Work that never ends by itself."""

    def __init__(self) -> None:
        self.steps = 0
        self.stopped = False

    def __call__(self, tell: Callable[[int], None]) -> None:
        try:
            while True:
                time.sleep(0.002)
                self.steps += 1
                tell(self.steps)
        except Stopped:
            self.stopped = True
            raise


def idle(pool: ThreadPoolExecutor, seconds: float = 5) -> None:
    """Wait until a pool of one thread has done its work."""
    pool.submit(lambda: None).result(timeout=seconds)


def test_a_job_that_is_left_ends_soon(pool):
    work = Endless()
    news = iter(Job(work, pool))
    next(news)
    seen = work.steps
    news.close()
    idle(pool)
    assert work.stopped
    assert work.steps < seen + 5


def test_a_job_that_nobody_asks_any_more_ends_after_a_while(pool):
    work = Endless()
    news = iter(Job(work, pool, patience=0.1))
    next(news)
    idle(pool)  # the iteration is still open
    assert work.stopped
    assert len(list(news)) == 1  # the last news, and no error


def test_a_job_that_is_asked_now_and_then_goes_on(pool):
    work = Endless()
    news = iter(Job(work, pool, patience=0.5))
    for _ in range(8):
        next(news)
        time.sleep(0.1)
    assert not work.stopped
    news.close()
    idle(pool)


def test_a_job_that_waits_when_its_pool_ends_never_runs(pool):
    work, gate = Endless(), threading.Event()
    pool.submit(gate.wait, 20)
    threading.Timer(0.1, pool.end).start()
    assert list(Job(work, pool)) == []  # and no error
    assert pool.ended.is_set()
    assert list(Job(work, pool)) == []
    gate.set()
    pool.shutdown(wait=True)
    assert work.steps == 0


def test_a_job_that_runs_when_its_pool_ends_stops_without_an_error(pool):
    work = Endless()
    news = iter(Job(work, pool))
    next(news)
    assert not pool.ended.is_set()
    seen = work.steps
    pool.end()
    pool.shutdown(wait=True)
    assert pool.ended.is_set()
    assert work.stopped
    assert work.steps < seen + 5
    assert len(list(news)) <= 1  # the last news
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(lambda: None)


def test_jobs_run_one_after_the_other(pool):
    running, most = [], []

    def work(tell: Callable[[int], None]) -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        tell(1)

    assert at_once(5, lambda number: list(Job(work, pool))) == [[1]] * 5
    assert max(most) == 1


def test_waiting_for_another_job_is_not_leaving(pool):
    gate = threading.Event()
    pool.submit(gate.wait, 20)
    threading.Timer(1.6, gate.set).start()
    assert list(Job(lambda tell: tell("here"), pool, patience=1.2)) == ["here"]


# Pictures ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_taken_in_once_and_touched_when_used(studio, calls):
    path = upload(studio, noise(300, 200))
    first = studio.picture(path)
    module.os.utime(path, (5, 5))
    assert studio.picture(Path(path)) is first
    assert calls == ["take_in"]
    assert Path(path).stat().st_mtime > time.time() - 60
    Path(path).unlink()
    with pytest.raises(ImageError, match="uploads are deleted after a while; choose it again"):
        studio.picture(path)


def test_without_a_picture_one_is_asked_for(studio):
    with pytest.raises(ConfigError, match="expected a content, got none; upload one, or click a sample"):
        studio.picture(None, "a content")


def test_a_picture_that_cannot_be_taken_is_not_kept(studio):
    path = Path(upload(studio, noise(30, 20)))
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(ImageError):
        studio.picture(path)
    path.write_bytes(whole)
    assert studio.picture(path).image.size == (30, 20)


def test_the_limit_of_pixels_is_that_of_the_settings(tmp_path):
    studio = Studio(Folder(tmp_path, most_bytes=1e9, seconds=60), DemoConfig(models=("mini",), megapixels=0.0005))
    assert studio.picture(upload(studio, noise(25, 20))).image.size == (25, 20)
    with pytest.raises(ImageError, match="at most 500 pixels, but 'x2.png' has 26×20"):
        studio.picture(upload(studio, noise(26, 20), "x2.png"))
    studio.close()


def test_a_picture_that_was_made_has_one_file(studio):
    first, second = noise(40, 30), noise(40, 30, seed=1)
    path = studio.file(first)
    module.os.utime(path, (5, 5))
    assert studio.file(first.copy()) == path
    assert Path(path).stat().st_mtime > time.time() - 60
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(first))
    assert len({path, studio.file(second), studio.file(first, ".jpg")}) == 3
    assert all(file.is_relative_to(studio.folder.path) for file in studio.folder.path.rglob("*"))


def test_many_threads_may_make_the_same_file(studio):
    assert len(set(at_once(8, lambda number: studio.file(noise(200, 200))))) == 1
    assert len(list((studio.folder.path / "made").iterdir())) == 1


def test_a_file_that_is_swept_meanwhile_is_written_again(studio, monkeypatch):
    path = studio.file(noise(40, 30))
    swept = []

    def is_swept_after(holder: Any, name: str) -> None:
        """Delete the file once after its being there was asked for, and before it is touched."""
        real = getattr(holder, name)

        def asked(file: Any, *given: Any, **others: Any) -> Any:
            if str(file) != path or swept:
                return real(file, *given, **others)
            swept.append(name)
            found = None if name == "utime" else real(file, *given, **others)
            Path(path).unlink()
            return real(file, *given, **others) if name == "utime" else found

        monkeypatch.setattr(holder, name, asked)

    is_swept_after(Path, "exists")
    is_swept_after(module.os, "utime")
    assert studio.file(noise(40, 30)) == path
    assert swept
    monkeypatch.undo()
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(noise(40, 30)))


# Models and taps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", module.BUNDLED)
def test_every_tap_that_is_offered_can_be_read_in_its_order(shared, model):
    choices = shared.choices(model)
    taps = [tap for found in choices.taps.values() for tap in found]
    assert len(set(taps)) == len(taps) > 5
    extractor = shared.extractor(model).resized(size=min(choices.sizes))
    found = extractor(noise(64, 64), taps if choices.looks is None else [*taps, choices.looks])
    for facet, here in choices.taps.items():
        for number, text in enumerate(here):
            assert text == shared.tap(View(model, facet, number, choices.sizes[0]))
            assert found[text].tap == extractor.resolve(vf.Tap.parse(text))
            assert found[text].tap.facet == facet
            assert str(extractor.resolve(vf.Tap(facet, number))) == text


@pytest.mark.parametrize("model", module.BUNDLED)
def test_every_size_and_stride_that_is_offered_fits_the_patch(shared, model):
    choices, extractor = shared.choices(model), shared.extractor(model)
    patch = extractor.card.patch
    assert choices.sizes[0] == extractor.card.default_size
    assert all(size % patch == 0 for size in choices.sizes)
    assert choices.strides[0] == patch
    assert list(choices.strides) == sorted(choices.strides, reverse=True)
    for stride in choices.strides:
        extractor.resized(size=choices.sizes[0], stride=stride)(noise(80, 80))
    assert extractor.overlaps or len(choices.strides) == 1


@pytest.mark.parametrize("model", module.BUNDLED)
def test_what_is_offered_first_is_the_usual_tap(shared, model):
    choices, extractor = shared.choices(model), shared.extractor(model)
    facet, number = choices.usual
    assert choices.taps[facet][number] == str(extractor.resolve(vf.Tap.parse(extractor.card.default_tap)))
    assert (choices.looks is not None) == extractor.card.has_cls


def test_models_that_are_not_offered_are_refused(shared):
    for ask in (shared.extractor, shared.choices, lambda name: shared.tap(View(name, "key", 0, 224))):
        for name in ("dino_vitb8", "hyperfeatures:ddpm_mini", "../mini", ""):
            with pytest.raises(ConfigError, match=f"expected one of the models of this page, got '{name}'"):
                ask(name)


@pytest.mark.parametrize(
    ("view", "told"),
    [
        (View("mini", "cls", 0, 224), r"a facet of mini \(key, query, value, token\), got 'cls'"),
        (View("vgg_mini", "key", 0, 224), r"a facet of vgg_mini \(out\), got 'key'"),
        (View("mini", "key", 12, 224), "a layer of mini from 0 to 11, got 12"),
        (View("mini", "key", -1, 224), "a layer of mini from 0 to 11, got -1"),
        (View("mini", "key", 0, 224, 5), r"a stride of mini \(16, 8, 4\), got 5"),
        (View("mini", "key", 0, 224, -16), r"a stride of mini \(16, 8, 4\), got -16"),
    ],
)
def test_a_view_that_there_is_not_is_refused(shared, view, told):
    picture = shared.picture(upload(shared, noise(64, 64), "view.png"))
    with pytest.raises(ConfigError, match=f"expected {told}"):
        shared.read(picture, view)


def test_a_model_that_cannot_overlap_is_read_at_its_own_stride(shared):
    picture = shared.picture(upload(shared, noise(64, 64), "view.png"))
    found, looks = shared.read(picture, View("vgg_mini", "out", 8, 224, 4))
    assert found.grid.stride == shared.extractor("vgg_mini").card.patch
    assert looks is None


@pytest.mark.parametrize(("size", "stride"), [(448, 4), (10**9, 16), (4000, 0)])
def test_a_view_of_too_many_tokens_is_refused_before_it_is_read(studio, calls, size, stride):
    picture = studio.picture(upload(studio, noise(300, 200)))
    with pytest.raises(
        ConfigError, match=rf"at most {MOST_TOKENS} tokens, got \d+ at size {size} .*smaller size or a larger stride"
    ):
        studio.read(picture, View("mini", "key", 11, size, stride))
    assert "__call__" not in calls


def test_what_is_read_is_what_the_extractor_reads(shared):
    image = noise(330, 210)
    picture = shared.picture(upload(shared, image, "same.png"))
    found, looks = shared.read(picture, View("mini", "value", 7, 224, 8))
    alone = vf.load_extractor("mini", size=224, stride=8, device="cpu")
    assert torch.allclose(found.features, alone(image, "value@7").features, atol=1e-5)
    assert torch.allclose(looks.features, alone(image, "attention@11").features, atol=1e-5)


LONG = [(1020, 17), (17, 1020), (900, 100), (910, 300), (300, 910)]


@pytest.mark.parametrize("view", [KEYS, View("vgg_mini", "out", 8, 224), View("ddpm_mini", "residual", 15, 64)])
@pytest.mark.parametrize("size", LONG)
def test_a_long_picture_is_seen_three_times_as_long_as_the_size(shared, size, view):
    picture = shared.picture(upload(shared, noise(*size), f"{size}.png"))
    found, _ = shared.read(picture, view)
    extractor = shared.extractor(view.model)
    patch = extractor.card.patch
    seen, given = np.array(found.frames[0].network_size[::-1]), np.array(size)
    assert seen.max() == LONGEST * view.size
    assert seen.argmax() == given.argmax()
    in_proportion = LONGEST * view.size * min(size) / max(size)
    least = patch if extractor.overlaps else 2 * patch  # gives up the aspect of the longest
    assert seen.min() == pytest.approx(max(least, in_proportion), abs=patch / 2 + 1)
    corners = found.frames[0].to_network(torch.tensor([[0.0, 0.0], [float(value) for value in size]]))
    assert np.allclose(corners, [[0, 0], seen], atol=1e-3)


@pytest.mark.parametrize("size", [(900, 300), (300, 900), (640, 427), (64, 64)])
def test_any_other_picture_is_seen_with_its_shorter_side_at_the_size(shared, size):
    picture = shared.picture(upload(shared, noise(*size), f"{size}.png"))
    found, _ = shared.read(picture, KEYS)
    seen = np.array(found.frames[0].network_size[::-1])
    assert seen.min() == 224
    assert seen.max() / 224 == pytest.approx(max(size) / min(size), abs=8 / 224 + 1e-6)  # whole patches


def test_what_models_are_offered_is_what_was_asked_for():
    assert offered(["dino_vits*", "mini"])[:3] == ("mini", "vgg_mini", "ddpm_mini")
    assert set(offered(["dino_vits*"])[3:]) == {"dino_vits8", "dino_vits16"}
    assert set(offered([])) > {"dino_vitb8", "mini"}
    assert not [name for name in offered(["*"]) if name.startswith("hyperfeatures:")]
    with pytest.raises(UnknownModelError, match="expected names or patterns of `vitfeats models`, got 'nothing\\*'"):
        offered(["mini", "nothing*"])


def test_the_default_model_is_offered_whatever_it_is(monkeypatch):
    monkeypatch.setattr(module, "default_model", lambda: "timm:vit_tiny_patch16_224")
    assert offered(["mini"]) == (*module.BUNDLED, "timm:vit_tiny_patch16_224")


# Several at once -----------------------------------------------------------------------------------------------------


def test_two_who_ask_for_the_same_thing_have_it_read_once(studio, calls):
    picture = studio.picture(upload(studio, noise(300, 200)))
    found = at_once(6, lambda number: studio.read(picture, KEYS)[0])
    assert calls.count("load_extractor") == 1
    assert calls.count("__call__") == 1
    assert all(one is found[0] for one in found)
    same = take_in(upload(studio, noise(300, 200), "again.png"), studio.folder.path, pixels=1e6)
    assert studio.read(same, KEYS)[0] is found[0]  # the same pixels


def test_many_who_ask_for_different_things_get_what_one_alone_gets(studio, tmp_path_factory):
    views = [View("mini", "key", 11, 224), View("mini", "token", 3, 112), View("vgg_mini", "out", 8, 224)]
    paths = [upload(studio, noise(200, 150, seed), f"{seed}.png") for seed in range(3)]

    def read(who: Studio, number: int) -> torch.Tensor:
        return who.read(who.picture(paths[number % 3]), views[number // 3])[0].features

    with studio_in(studio.folder.path) as alone:
        wanted = [read(alone, number) for number in range(9)]
    for found, one in zip(at_once(9, lambda number: read(studio, number)), wanted, strict=True):
        assert torch.equal(found, one)


def test_what_several_ask_for_at_once_is_made_once(studio):
    count = []

    def make() -> int:
        count.append(1)
        time.sleep(0.05)
        return len(count)

    assert at_once(4, lambda number: studio.once("key", make)) == [1] * 4


def test_what_was_made_is_made_once_even_where_it_counts_as_false(studio):
    assert [studio.once("key", lambda number=number: number) for number in range(3)] == [0, 0, 0]
    assert studio.once("other", lambda: "other") == "other"


def test_short_work_runs_one_at_a_time_and_an_error_ends_nothing(studio):
    running, most = [], []

    def work(number: int) -> int:
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        if number == 2:
            raise ZeroDivisionError
        return number

    def asked(number: int) -> int | None:
        try:
            return studio.work(lambda: work(number))
        except ZeroDivisionError:
            return None

    assert at_once(5, asked) == [0, 1, None, 3, 4]
    assert max(most) == 1


def test_a_reading_that_fails_is_read_again(studio, monkeypatch):
    picture = studio.picture(upload(studio, noise(64, 64)))
    with monkeypatch.context() as patched:
        patched.setattr(Extractor, "__call__", lambda *given: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            studio.read(picture, KEYS)
    assert studio.read(picture, KEYS)[0].dim == 192


def test_short_work_does_not_wait_for_long_work(studio):
    gate = threading.Event()
    studio.long.submit(gate.wait, 20)
    assert studio.work(lambda: "here") == "here"
    gate.set()


def test_a_studio_that_is_closed_takes_no_more_work_and_its_threads_end(studio):
    threads = [studio.work(threading.current_thread), studio.long.submit(threading.current_thread).result()]
    studio.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        studio.work(lambda: None)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_closing_ends_a_job_that_runs(studio):
    work = Endless()
    news = iter(Job(work, studio.long))
    next(news)
    studio.close()
    studio.long.shutdown(wait=True)  # which would not end before the work does
    assert work.stopped
    assert len(list(news)) <= 1
