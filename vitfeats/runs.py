"""What every long run needs: a folder that loses nothing, a history, an interrupt that waits for a step, loggers."""

import io
import json
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitfeats.configs import write_config
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError

Callback = Callable[[int, Mapping[str, float], Callable[[], Tensor]], bool | None]
"""``callback(step, losses, image)``, called after each step; ``True`` ends the run there.

``losses`` are numbers by name. ``image()`` makes the picture as it is now, (3, height, width) in 0..1; it costs a pass
of the generator over the whole image, so call it only at the steps at which it is wanted.
"""

CHECKPOINT, HISTORY, CONFIG = "checkpoint.pt", "history.jsonl", "config.yaml"


class RunFolder:
    """The folder that a run writes: checkpoint, history line by line, snapshots and the settings.

    A checkpoint appears whole or not at all. A disk that is full costs a warning, not the run: the last checkpoint that
    could be written stays.

    Args:
        path: Made if missing.

    Raises:
        StoreError: If the folder cannot be made.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"expected a folder to write to at '{self.path}', but: {error}") from error

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run can be resumed here."""
        return (self.path / CHECKPOINT).is_file()

    def read_checkpoint(self) -> dict[str, Any]:
        """Return the last checkpoint, on the CPU.

        Raises:
            StoreError: If there is none, or the file is not one.
        """
        path = self.path / CHECKPOINT
        try:
            # Only tensors and plain values: a checkpoint of somebody else's must not run code.
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise StoreError(f"expected a checkpoint at '{path}', but there is none; run without resume") from error
        except Exception as error:  # torch.load has many ways to fail on a broken file
            raise StoreError(f"expected a checkpoint of vitfeats at '{path}', but: {error}") from error
        if not isinstance(state, dict) or "format" not in state:
            raise StoreError(f"expected a checkpoint of vitfeats at '{path}', got a file of another kind")
        return state

    def write_checkpoint(self, state: Mapping[str, Any]) -> bool:
        """Replace the checkpoint; return whether that worked. If not, the one before is still there."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        return self._written(CHECKPOINT, buffer.getvalue())

    def write_image(self, name: str, image: Image.Image) -> bool:
        """Write a picture; return whether that worked."""
        buffer = io.BytesIO()
        image.save(buffer, Path(name).suffix[1:] or "png")
        return self._written(name, buffer.getvalue())

    def write_config(self, config: Any) -> bool:
        """Write the settings as YAML; return whether that worked."""
        return self._written(CONFIG, write_config(config).encode())

    def write_history(self, records: list[dict[str, Any]]) -> bool:
        """Replace the whole history; return whether that worked."""
        return self._written(HISTORY, "".join(f"{json.dumps(record)}\n" for record in records).encode())

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line to the history."""
        try:
            with (self.path / HISTORY).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(dict(record))}\n")
        except OSError as error:
            _warn_unwritten(HISTORY, error)

    def read_history(self, before: int) -> list[dict[str, Any]]:
        """Return the records of steps below ``before``; a last line that was cut off is left out."""
        try:
            lines = (self.path / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] < before:
                records.append(record)
        return records

    def _written(self, name: str, data: bytes) -> bool:
        try:
            write_whole(self.path / name, data)
        except StoreError as error:
            _warn_unwritten(name, error)
            return False
        return True


def _warn_unwritten(name: str, error: Exception) -> None:
    warnings.warn(f"'{name}' could not be written, the run goes on: {error}", RuntimeWarning, stacklevel=4)


def scheduled(lr: float, schedule: str, step: int, steps: int) -> float:
    """Return the learning rate of a step: "constant", or "cosine" from ``lr`` down to 0 after ``steps``."""
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def finite(value: Any) -> Any:
    """Return plain values as JSON knows them: NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_same(kept: Mapping[str, Any], wanted: Mapping[str, Any], free: tuple[str, ...] = ()) -> None:
    """Compare the settings of a checkpoint with those of a run that wants to go on from it.

    Args:
        kept: Plain values by name, from the checkpoint.
        wanted: The same, of this run.
        free: Names that may differ.

    Raises:
        ConfigError: If others differ; the message lists each with both values.
    """
    names = [name for name in {**kept, **wanted} if name not in free and kept.get(name) != wanted.get(name)]
    if names:
        told = "; ".join(f"{name}: {kept.get(name)!r} there, {wanted.get(name)!r} here" for name in names)
        raise ConfigError(f"expected the settings of the checkpoint, but these differ: {told}. Use another folder")


@dataclass
class Interrupt:
    """Whether somebody pressed Ctrl-C."""

    asked: bool = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Let Ctrl-C wait until the caller has looked at ``.asked``; a second one acts at once.

    A step that is broken off in the middle leaves weights and optimiser of two different steps. Outside the main thread
    signals cannot be taken, and nothing is deferred.
    """
    state = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    # A handler that is none (ignored, or another language's) is not ours to replace.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield state
        return

    def note(number: int, frame: FrameType | None) -> None:
        if state.asked:
            before(number, frame)
        state.asked = True

    try:
        signal.signal(signal.SIGINT, note)
        yield state
    finally:
        signal.signal(signal.SIGINT, before)


def tensorboard(folder: Path | str, *, image_every: int = 0) -> Callback:
    """Return a callback that writes losses, and a picture every ``image_every`` steps, for TensorBoard.

    Raises:
        MissingDependencyError: If tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "expected tensorboard, which is not installed; try: pip install 'vitfeats[tracking]'"
        ) from error
    writer = SummaryWriter(str(folder))

    def log(step: int, losses: Mapping[str, float], image: Callable[[], Tensor]) -> None:
        for name, value in losses.items():
            writer.add_scalar(name, value, step)
        if image_every and step % image_every == 0:
            writer.add_image("image", image(), step)
        writer.flush()

    return log
