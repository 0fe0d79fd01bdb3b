"""The engine of many machines: Ray Data hands shards to actors, one a device, and replaces those that die."""

import json
import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vitfeats.apps.bulk.files import Place, exists, joined, remove, sizes_in, write_bytes
from vitfeats.apps.bulk.making import Made, Part, ShardMaker, settings_of
from vitfeats.apps.bulk.store import Store
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError, VitFeatsError
from vitfeats.extractors.base import Extractor

_ATTEMPTS = 5  # at a shard; what kills an actor that often is in the shard
_BLOCKS = 10_000  # Ray keeps account of each
_LEAST_CPUS = 4  # logical ones; with two, actors can take all, and what feeds them then waits for ever


def make_by_ray(
    extractor: Extractor,
    store: Store,
    parts: Sequence[Part],
    *,
    batch_size: int,
    threads: int | None,
    strict: bool,
    tick: Callable[[int], Any],
    actors: int | None = None,
) -> Generator[Made]:
    """Make shards by Ray Data; yield each when it is on disk.

    What is sent to an actor is which images a shard has; the actor reads them, and writes the shard itself. So all
    machines must see the source and the store at the same paths or addresses. The model is sent too: they need neither
    its weights nor the network it came from. Ray is started on this machine where no cluster is connected, and none is
    named by ``RAY_ADDRESS``.

    Args:
        extractor: The model; actors move it to their device.
        store: Whose shards are made.
        parts: To be made.
        batch_size: Most images in one forward pass.
        threads: That decode, of each actor; None is two, or as many as there are cores for each graphics card, at most
            16.
        strict: Raise at an image that cannot be read.
        tick: Called with the number of images that are done with, a shard at a time.
        actors: How many; None is one for each graphics card of the cluster, or one where there is none.

    Raises:
        MissingDependencyError: If Ray is not installed.
        ImageError: If an image cannot be read, and ``strict``.
        StoreError: If a shard cannot be made.
    """
    try:
        import ray
        import ray.data
        from ray.cloudpickle import dumps  # type: ignore[attr-defined] - it is there, by a star
        from ray.exceptions import RayError
    except ImportError as error:
        raise MissingDependencyError(
            f"expected Ray for engine='ray', but it cannot be loaded ({error}); try: pip install \"vitfeats[bulk]\""
        ) from error
    with _without_attempts(store), _connected(ray), _quiet(ray):
        cards = int(ray.cluster_resources().get("GPU", 0))
        # By cloudpickle, for models and sources may be of classes that a script defines.
        sent = ray.put(dumps(extractor if extractor.device.type == "cpu" else extractor.on("cpu")))
        count = min(actors or cards or 1, len(parts))
        if threads is None:
            threads = max(2, min(16, int(ray.cluster_resources().get("CPU", 0)) // count)) if cards else 2
        rows = [{"number": part.number, "part": dumps(part)} for part in parts]
        found = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map_batches(
            _Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=1 if cards else 0,
            fn_constructor_kwargs={
                "sent": [sent],  # in a list, so that Ray leaves it to the actor to fetch it
                "store": str(store.path) if isinstance(store.path, str) else str(store.path.resolve()),
                "batch_size": batch_size,
                "threads": threads,
                "strict": strict,
            },
        )
        try:
            for row in found.iter_rows():
                one = pickle.loads(row["made"])
                if isinstance(one, VitFeatsError):
                    raise one
                tick(one.images + len(one.broken))
                yield one
        except RayError as error:
            raise StoreError(
                f"expected actors that make shards of '{store.path}', but they failed: {_shortened(error)}; whole "
                "shards stay, and the same call goes on"
            ) from error


class _Actor:
    """One model on one device, in a process of its own."""

    def __init__(self, sent: Sequence[Any], store: str, batch_size: int, threads: int, strict: bool) -> None:
        import ray
        import torch

        extractor: Extractor = pickle.loads(ray.get(sent[0]))
        if torch.cuda.is_available() and ray.get_gpu_ids():
            extractor = extractor.on("cuda")
        self._store = Store(store)
        here = settings_of(extractor, self._store.taps, self._store.settings["dtype"])
        self._why = [
            f"{name}: {value!r} here, {self._store.settings.get(name)!r} in the store"
            for name, value in _plain(here).items()
            if value != self._store.settings.get(name)
        ]
        self._maker = ShardMaker(extractor, self._store, batch_size=batch_size, threads=threads, strict=strict)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            part: Part = pickle.loads(batch["part"][0])
            if self._why:
                raise ConfigError(
                    f"expected each machine to have what began the run, but these differ: {'; '.join(self._why)}"
                )
            attempt = _note_attempt(self._store, part)
            (made,) = self._maker.each([part])
            remove(attempt)
            found: Made | VitFeatsError = made
        except VitFeatsError as error:  # as a value: from an exception Ray would make one of its own
            found = type(error)(str(error))
        except Exception as error:  # of a model or a source of the user's own
            found = StoreError(
                f"expected to make shard {batch['number'][0]} of '{self._store.path}', but its actor got "
                f"{type(error).__name__}: {error}; whole shards stay, and the same call goes on"
            )
        return {"number": batch["number"], "made": [pickle.dumps(found)]}


def _note_attempt(store: Store, part: Part) -> Place:
    """Leave a file behind that stays if this process dies, for Ray tries again as often as that happens.

    Raises:
        StoreError: If so many were left behind that another attempt would only be the next.
    """
    names = (
        f".attempt-{part.number:07}-{attempt}.tmp" for attempt in range(_ATTEMPTS)
    )  # the next run clears them away
    place = next((place for name in names if not exists(place := joined(store.path, name))), None)
    if place is None:
        raise StoreError(
            f"expected to make shard {part.number} of '{store.path}', but {_ATTEMPTS} actors died of it; one of its "
            f"images ('{part.images.ids[0]}' to '{part.images.ids[-1]}') kills them, or they need more memory than "
            "there is: try a smaller batch_size, or fewer actors"
        )
    write_bytes(place, str(os.getpid()).encode())
    return place


@contextmanager
def _without_attempts(store: Store) -> Iterator[None]:
    """Remove in the end what attempts left behind."""
    try:
        yield
    finally:
        for name in sizes_in(store.path):
            if name.startswith(".attempt-"):
                remove(joined(store.path, name))


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Connect to a cluster, or start Ray here, and end what was begun; what was there before stays as it is."""
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is started unasked reports to nobody
        ray.init(
            "local",  # not the cluster that a `ray start` left on this machine, whose CPUs are its own
            num_cpus=max(_LEAST_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Keep Ray Data from telling how it goes: there is a progress bar of images for that."""
    log, context = logging.getLogger("ray.data"), ray.data.DataContext.get_current()
    before = log.level, context.enable_progress_bars
    log.setLevel(logging.ERROR)
    context.enable_progress_bars = False
    try:
        yield
    finally:
        log.setLevel(before[0])
        context.enable_progress_bars = before[1]


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they come back from a file."""
    return json.loads(json.dumps(facts))


def _shortened(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
