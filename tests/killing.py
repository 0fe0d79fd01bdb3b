"""Runs in a process of their own, killed at chosen lines of their history and begun again."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def kill_now_and_then(
    start: Callable[[], subprocess.Popen], history: Path, *, most: int, times: int, seed: int
) -> None:
    """Kill a run by SIGKILL at random steps from 2 on, each time further on, and leave it as it lies.

    Args:
        start: Starts it, or lets it go on.
        history: Where it writes a line a step.
        most: Steps by which it was killed for the last time.
        times: How often.
        seed: Of the steps.
    """
    for step in sorted(random.Random(seed).sample(range(2, most), times)):
        process = start()
        while process.poll() is None and not (history.is_file() and len(history.read_text().splitlines()) >= step):
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must not have come to its end"
