"""The engine of one machine: a thread for each device, which share the shards that are to be made."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Event, Lock
from typing import Any

from vitfeats.apps.bulk.making import Made, Part, ShardMaker
from vitfeats.apps.bulk.sources import keep_groups
from vitfeats.apps.bulk.store import Store
from vitfeats.extractors.base import Extractor


def make_here(
    extractors: Sequence[Extractor],
    store: Store,
    parts: Iterable[Part],
    *,
    batch_size: int,
    threads: int,
    strict: bool,
    tick: Callable[[int], Any],
) -> Generator[Made]:
    """Make shards with one model on each of several devices of this machine; yield each when it is on disk.

    Args:
        extractors: One for each device.
        store: Whose shards are made.
        parts: To be made.
        batch_size: Most images in one forward pass.
        threads: That decode, of all devices together.
        strict: Raise at an image that cannot be read.
        tick: Called with the number of images that are done with; for several devices from several threads.

    Raises:
        ImageError, StoreError: As :meth:`~vitfeats.apps.bulk.making.ShardMaker.each` does.
    """
    each = max(1, threads // len(extractors))
    makers = [
        ShardMaker(extractor, store, batch_size=batch_size, threads=each, strict=strict, tick=tick)
        for extractor in extractors
    ]
    if len(makers) == 1:
        yield from makers[0].each(parts)
        return
    keep_groups(2 * len(makers))
    made: Queue[Made | None] = Queue()  # facts only, and nobody ever waits to put one: who is interrupted hangs nobody
    shared = _Shared(parts)

    def work(maker: ShardMaker) -> None:
        try:
            for one in maker.each(shared):
                made.put(one)
        finally:
            shared.stopped.set()  # all are made; or one failed, and the others end with what they have begun
            made.put(None)

    with ThreadPoolExecutor(len(makers)) as pool:
        futures = [pool.submit(work, maker) for maker in makers]
        ended = 0
        try:
            while ended < len(makers):
                one = made.get()
                ended += one is None
                if one is not None:
                    yield one
        finally:
            shared.stopped.set()
        for future in futures:
            future.result()


class _Shared:
    """An iterator that several threads take from, until one of them says that it is enough."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts, self._lock, self.stopped = iter(parts), Lock(), Event()

    def __iter__(self) -> "Iterator[Part]":
        return self

    def __next__(self) -> Part:
        with self._lock:
            if self.stopped.is_set():
                raise StopIteration
            return next(self._parts)
