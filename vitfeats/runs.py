"""What every long run needs: a folder that loses nothing, a history, an interrupt that waits for a step, loggers."""

import io
import json
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from vitfeats.configs import write_config
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError

T = TypeVar("T")

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
        return self._written(name, encoded(image, name))

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


def save_image(image: Image.Image, path: Path | str) -> Path:
    """Write a picture in the format of its suffix, whole or not at all; return the path.

    Raises:
        ConfigError: If the suffix is not that of a picture.
        StoreError: If it cannot be written.
    """
    target = Path(path)
    write_whole(target, encoded(image, target.name))
    return target


def encoded(image: Image.Image, name: str) -> bytes:
    """Return a picture as a file of that name holds it: PNG without a suffix; JPEG at a quality of 92.

    Raises:
        ConfigError: If the suffix is not that of a picture.
    """
    suffix = Path(name).suffix.lower() or ".png"
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise ConfigError(f"expected a picture file that can be written, such as out.png, got '{name}'")
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()


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


@runtime_checkable
class Trainer(Protocol):
    """What takes the steps of a run.

    ``step`` takes one and returns losses by name, ``loss`` among them, or raises FloatingPointError where they are not
    finite, with the weights of the last step that was. Two states of one step must be one: a run that is resumed is
    the run that was never stopped.
    """

    done: int
    config: Any

    def step(self) -> dict[str, float]:
        """Take a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on, as plain values and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; refuse a state of other settings."""
        ...


def begin(trainer: Trainer, folder: RunFolder | None, resume: bool) -> list[dict[str, Any]]:
    """Take up the checkpoint of a folder, or begin a new run there; return the history so far.

    Raises:
        ConfigError: If there is a checkpoint and ``resume`` is false, or it is of other settings.
        StoreError: If the checkpoint cannot be read.
    """
    if folder is None:
        return []
    if folder.has_checkpoint and not resume:
        raise ConfigError(
            f"expected a folder without a run, but '{folder.path}' has a checkpoint; resume it (resume=True, --resume) "
            "or use another folder"
        )
    if folder.has_checkpoint:
        trainer.load_state_dict(folder.read_checkpoint())
    history = folder.read_history(trainer.done)
    folder.write_history(history)  # without what was written after the checkpoint
    folder.write_config(trainer.config)
    return history


def take_steps(
    trainer: Trainer,
    steps: int,
    history: list[dict[str, Any]],
    folder: RunFolder | None,
    *,
    checkpoint_every: int,
    after: Callable[[dict[str, float]], str | None],
    finish: Callable[[str], T],
    shown: tuple[str, ...] = ("loss",),
    progress: bool = False,
) -> T:
    """Take steps until ``trainer.done`` is ``steps``; Ctrl-C, errors and losses that are not finite lose nothing.

    Args:
        trainer: Takes them.
        steps: Where it ends.
        history: One record a step is added: ``step`` and its losses.
        folder: Written: the history line by line, and checkpoints; None writes nothing.
        checkpoint_every: Steps from one checkpoint to the next; one more is written at the end. 0 writes that alone.
        after: Called after each step with its losses; a reason, one word or two, ends the run.
        finish: Called at the end, still before Ctrl-C can act, with "done", what ``after`` said, "interrupted" or
            "not finite" (with a warning); makes what is returned.
        shown: Losses that the progress bar shows.
        progress: Show a progress bar on standard error.
    """
    from tqdm import tqdm

    stopped, whole = "done", True
    with ExitStack() as stack:
        interrupt = stack.enter_context(deferred_interrupt())
        bar = stack.enter_context(
            tqdm(total=steps, initial=trainer.done, unit="step", file=sys.stderr, disable=not progress)
        )
        try:
            while trainer.done < steps and stopped == "done":
                whole = False
                try:
                    losses = trainer.step()
                    whole = True
                    bar.update()
                    bar.set_postfix({name: f"{losses[name]:.3g}" for name in shown if name in losses})
                    history.append({"step": trainer.done - 1, **losses})
                    if folder is not None:
                        folder.append(history[-1])
                        if checkpoint_every and trainer.done % checkpoint_every == 0:
                            folder.write_checkpoint(trainer.state_dict())
                    stopped = after(losses) or stopped
                except FloatingPointError as error:
                    stopped = "not finite"
                    warnings.warn(
                        f"the run stopped: {error}; what it made is the last that was good",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                except KeyboardInterrupt:  # raised by a callback, or a second Ctrl-C
                    interrupt.asked = True
                if interrupt.asked and stopped == "done":
                    stopped = "interrupted"
        except Exception:  # of a callback, or of memory that ran out: an error leaves whole weights behind
            if folder is not None:
                folder.write_checkpoint(trainer.state_dict())
            raise
        # First, before anything else can fail. Not after a second Ctrl-C in the middle of a step, nor with weights that
        # gave no finite loss: the checkpoint before is then the one to go on from.
        if folder is not None and whole:
            folder.write_checkpoint(trainer.state_dict())
        return finish(stopped)


def interruption(done: int, folder: RunFolder | None) -> str:
    """Return what to tell a user whose Ctrl-C ended a run."""
    where = None if folder is None or not folder.has_checkpoint else folder.path
    how = "nothing was written: pass out=" if where is None else f"resume it (resume=True, --resume) in '{where}'"
    return f"interrupted after {done} steps; {how}"


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
