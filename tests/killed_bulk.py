"""A program that begins a bulk run again and again, each time in a child of its own, and kills it at random moments.

Children are forked, for what they would have to load first takes longer than their work. That is safe in a process that
has no threads yet, so this is a program; it takes its arguments as one JSON object, and prints another.
"""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from many import everything, run, shards

import vitfeats as vf
from vitfeats.apps.bulk.shards import check_shard
from vitfeats.extractors.base import Extractor

_LONGEST = 150  # seconds of a run: it hangs if it takes that


def kill_now_and_then(**arguments: Any) -> dict[str, Any]:
    """Run this program with arguments of :func:`killed` or :func:`killed_by_ray`; return what it found."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    alone.pop("RAY_ADDRESS", None)
    given = [sys.executable, str(Path(__file__)), json.dumps(arguments, default=str)]
    ended = subprocess.run(given, env=alone, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def killed(
    extractor: Extractor, source: str, whole: Path, folder: Path, times: int, seed: int, **settings: Any
) -> dict[str, Any]:
    """Kill runs after random times, from none to a fourth of what a whole one takes, until so many were killed.

    A store that was finished all the same is compared, and another is begun; so the last one is finished too.

    Returns:
        ``kills``, ``stores`` and, for each kill, how many shards there ``were``.
    """
    start = time.perf_counter()
    assert _ended(_begun(extractor, source, whole, settings)) == 0
    longest = (time.perf_counter() - start) / 4
    chance, were, number, complete = random.Random(seed), [], 0, False
    out = folder / "0"
    while len(were) < times or not complete:
        if complete:
            number, complete = number + 1, False
            out = folder / str(number)
        child = _begun(extractor, source, out, settings)
        if len(were) < times:
            time.sleep(chance.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        complete = _ended(child) == 0
        if not complete:
            were.append(len(_compared(out, whole)))
        else:
            assert everything(out) == everything(whole)
    return {"kills": len(were), "stores": number + 1, "were": were}


def killed_by_ray(
    extractor: Extractor, source: str, whole: Path, folder: Path, times: int, seed: int, **settings: Any
) -> dict[str, Any]:
    """Kill runs with Ray, each a little later after its first shard than the one before; go on at once each time.

    Processes of Ray that outlive their driver are ended after the last run only, so that they could disturb.

    Returns:
        ``were``, how many shards there were at each kill, and ``refused``, what other runs were told meanwhile.
    """
    import ray.data  # noqa: F401 - so that the children need not

    assert _ended(_begun(extractor, source, whole, settings)) == 0
    chance, were, refused, sessions = random.Random(seed), [], [], []
    count, out = len(shards(whole)), folder / "0"
    try:
        for reached in sorted(chance.sample(range(1, count * 3 // 4), times)):
            sessions.append(child := _begun(extractor, source, out, settings | {"engine": "ray"}))
            while len(shards(out)) < reached:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "it must not have come to its end"
                time.sleep(0.002)
            if not refused:
                refused = [_told(extractor, source, out, settings | {"engine": one}) for one in ("local", "ray")]
            time.sleep(chance.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            assert _ended(child) == -signal.SIGKILL, "it must not have come to its end"
            were.append(len(_compared(out, whole)))
        sessions.append(child := _begun(extractor, source, out, settings | {"engine": "ray"}))
        assert _ended(child) == 0
    finally:
        _end(sessions)
    assert everything(out) == everything(whole)
    return {"were": were, "refused": refused}


def _begun(extractor: Extractor, source: str, out: Path, settings: dict[str, Any]) -> int:
    """Begin a run in a child, the first process of a session of its own; return its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.alarm(_LONGEST)
    try:
        torch.set_num_threads(1)  # before there are threads: after a fork torch makes its pool anew, and not safely
        run(extractor, source, out, **settings)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def _ended(child: int) -> int:
    """Wait for the end of a child; return its exit code, or the signal that killed it, negative."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"a run failed: {code}"
    return code


def _told(extractor: Extractor, source: str, out: Path, settings: dict[str, Any]) -> str:
    """Return how a run is refused."""
    try:
        run(extractor, source, out, **settings)
    except vf.StoreError as error:
        return str(error)
    return "it was not refused"


def _compared(out: Path, whole: Path) -> dict[str, bytes]:
    """Return the shards that a killed run left; each must be the final one, and nobody hold the folder."""
    left = shards(out)
    assert all(check_shard(out / name) is None for name in left)
    assert left.items() <= shards(whole).items()
    if (out / ".lock").exists():
        with (out / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return left


def _end(sessions: list[int]) -> None:
    """End what is left of sessions: Ray's own agents do not end with a driver that was killed."""
    for _ in range(100):
        if not (there := _processes_of(sessions)):
            return
        for process in there:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def _processes_of(sessions: list[int]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            facts = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(facts[3]) in sessions and facts[0] != "Z":
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    work = {"killed": killed, "killed_by_ray": killed_by_ray}[given.pop("work")]
    places = {name: Path(given.pop(name)) for name in ("whole", "folder")}
    print(json.dumps(work(vf.load_extractor("mini", size=112, device="cpu"), **places, **given)))
