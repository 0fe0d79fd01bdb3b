"""The folder, history, interrupt and logger of a run."""

import io
import json
import os
import signal
import sys
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image

from vitfeats import runs
from vitfeats.configs import SpliceConfig, read_config
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError
from vitfeats.runs import RunFolder, check_same, deferred_interrupt, encoded, save_image, scheduled, tensorboard

STATE = {"format": "vitfeats.test/1", "step": 3, "weights": {"a": torch.arange(4.0)}, "none": None, "texts": ["a", "b"]}


def same(a: dict, b: dict) -> bool:
    rest = lambda d: {k: v for k, v in d.items() if k != "weights"}  # noqa: E731
    return rest(a) == rest(b) and torch.equal(a["weights"]["a"], b["weights"]["a"])


def test_a_checkpoint_comes_back(tmp_path):
    folder = RunFolder(tmp_path / "some" / "where")
    assert not folder.has_checkpoint
    assert folder.write_checkpoint(STATE)
    assert folder.has_checkpoint
    assert same(folder.read_checkpoint(), STATE)
    assert [p.name for p in folder.path.iterdir()] == ["checkpoint.pt"], "nothing temporary is left"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    folder, file = RunFolder(tmp_path), tmp_path / "checkpoint.pt"
    with pytest.raises(StoreError, match=f"a checkpoint at '{file}', but there is none; run without resume"):
        folder.read_checkpoint()
    folder.write_checkpoint(STATE)
    whole = file.read_bytes()
    for broken in (whole[:-40], whole[:100], b"", b"garbage"):
        file.write_bytes(broken)
        with pytest.raises(StoreError, match=f"expected a checkpoint of vitfeats at '{file}', but: "):
            folder.read_checkpoint()
    for other in (torch.zeros(3), {"step": 3}):
        torch.save(other, file)
        with pytest.raises(StoreError, match=f"of vitfeats at '{file}', got a file of another kind"):
            folder.read_checkpoint()


def test_a_checkpoint_runs_no_code(tmp_path):
    class Nasty:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": Nasty()}, tmp_path / "checkpoint.pt")
    with pytest.raises(StoreError, match="expected a checkpoint of vitfeats"):
        RunFolder(tmp_path).read_checkpoint()
    assert not (tmp_path / "harm").exists()


def test_a_disk_that_is_full_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_checkpoint(STATE)

    def full(path, data):
        raise StoreError(f"expected to write '{path}', but: no space left")

    monkeypatch.setattr(runs, "write_whole", full)
    for name, write in (
        ("checkpoint.pt", lambda: folder.write_checkpoint({**STATE, "step": 9})),
        ("history.jsonl", lambda: folder.write_history([{"step": 0}])),
        ("config.yaml", lambda: folder.write_config(SpliceConfig())),
        ("a.png", lambda: folder.write_image("a.png", Image.new("RGB", (2, 2)))),
    ):
        with pytest.warns(RuntimeWarning, match=f"'{name}' could not be written, the run goes on: .*no space left"):
            assert write() is False
    assert same(folder.read_checkpoint(), STATE)


def test_history_that_cannot_be_written_is_a_warning(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "history.jsonl").mkdir()
    with pytest.warns(RuntimeWarning, match=r"'history.jsonl' could not be written, the run goes on: .*Is a directory"):
        folder.append({"step": 0, "loss": 1.0})
    assert folder.read_history(9) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"expected a folder to write to at '{tmp_path / 'file'}', but: "):
        RunFolder(tmp_path / "file")


def test_history_comes_back_number_for_number(tmp_path):
    folder = RunFolder(tmp_path)
    rng = np.random.default_rng(0)
    records = [{"step": i, "loss": float(np.float32(x)), "ü": float(x)} for i, x in enumerate(rng.normal(size=20) ** 9)]
    for record in records:
        folder.append(record)
    assert folder.read_history(20) == records
    assert folder.read_history(7) == records[:7]
    assert folder.read_history(0) == []
    folder.write_history(records[:3])
    folder.append(records[3])
    assert folder.read_history(20) == records[:4]
    assert RunFolder(tmp_path / "new").read_history(5) == []


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_that_was_cut_off_is_left_out(tmp_path, cut):
    folder = RunFolder(tmp_path)
    for step in range(3):
        folder.append({"step": step, "loss": 0.125})
    file = tmp_path / "history.jsonl"
    file.write_bytes(file.read_bytes()[: -cut - 1])
    assert [record["step"] for record in folder.read_history(9)] == [0, 1]


def test_pictures_and_settings_are_written(tmp_path):
    folder = RunFolder(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    assert folder.write_image("a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))
    config = SpliceConfig.preset("reference", steps=7)
    assert folder.write_config(config)
    assert read_config(tmp_path / "config.yaml", SpliceConfig) == config


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("a.b.bmp", "BMP"), ("plain", "PNG")],
)
def test_a_picture_is_in_the_format_of_its_name(noise, tmp_path, name, kind):
    assert save_image(noise, str(tmp_path / name)) == tmp_path / name
    assert (tmp_path / name).read_bytes() == encoded(noise, name)
    with Image.open(tmp_path / name) as found:
        assert (found.format, found.size) == (kind, noise.size)
        if kind in ("PNG", "BMP"):
            assert np.array_equal(np.asarray(found), np.asarray(noise))
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing temporary is left"


def test_a_jpeg_has_a_quality_of_92(noise):
    wanted = io.BytesIO()
    noise.save(wanted, "JPEG", quality=92)
    assert encoded(noise, "a.jpg") == wanted.getvalue()


@pytest.mark.parametrize("name", ["a.nonsense", "a.txt", "a.3"])
def test_a_picture_under_another_suffix_is_refused(noise, tmp_path, name):
    with pytest.raises(ConfigError, match=f"a picture file that can be written, such as out.png, got '{name}'"):
        save_image(noise, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_the_one_before(noise, tmp_path, monkeypatch):
    save_image(Image.new("RGB", (3, 3)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError, match="expected to write '.*a.png', but: no space left"):
            save_image(noise, tmp_path / "a.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": before}
    with pytest.raises(StoreError, match="expected to write '.*missing/a.png', but: .*No such file"):
        save_image(noise, tmp_path / "missing" / "a.png")


def test_check_same_names_all_that_differs():
    kept = {"lr": 0.1, "seed": 3, "size": 224, "steps": 10, "gone": True}
    check_same(kept, dict(kept))
    check_same(kept, {**kept, "steps": 20, "size": 1}, free=("steps", "size"))
    with pytest.raises(ConfigError) as told:
        check_same(kept, {"lr": 0.2, "seed": 3, "size": 224, "steps": 20, "new": "x"}, free=("steps",))
    assert str(told.value) == (
        "expected the settings of the checkpoint, but these differ: lr: 0.1 there, 0.2 here; gone: True there, None "
        "here; new: None there, 'x' here. Use another folder"
    )


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_waits_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as interrupt:
        assert not interrupt.asked
        press()
        assert interrupt.asked
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="mine"), deferred_interrupt():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_interrupt_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    asked = []

    def impatient() -> None:
        with deferred_interrupt() as interrupt:
            press()
            asked.append(interrupt.asked)
            press()
            asked.append("it must not come here")

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert asked == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_in_a_thread_nothing_is_deferred_and_nothing_breaks():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with deferred_interrupt() as interrupt:
            seen.append((interrupt.asked, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_without_tensorboard_the_line_to_install_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = r"expected tensorboard, which is not installed; try: pip install 'vitfeats\[tracking\]'"
    with pytest.raises(MissingDependencyError, match=message):
        tensorboard(tmp_path)


def test_tensorboard_is_fed(monkeypatch, tmp_path):
    fed = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            fed.append(("folder", folder))

        def add_scalar(self, name, value, step) -> None:
            fed.append((name, value, step))

        def add_image(self, name, image, step) -> None:
            fed.append((name, tuple(image.shape), step))

        def flush(self) -> None:
            fed.append("flush")

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    log = tensorboard(tmp_path, image_every=2)
    looked = []

    def image() -> torch.Tensor:
        looked.append(True)
        return torch.zeros(3, 4, 5)

    for step in range(3):
        assert not log(step, {"loss": 1.0 / (step + 1), "own": 2.0}, image)
    assert len(looked) == 2, "a picture is made only where it is wanted"
    assert fed == [
        ("folder", str(tmp_path)),
        *[("loss", 1.0, 0), ("own", 2.0, 0), ("image", (3, 4, 5), 0), "flush"],
        *[("loss", 0.5, 1), ("own", 2.0, 1), "flush"],
        *[("loss", 1.0 / 3, 2), ("own", 2.0, 2), ("image", (3, 4, 5), 2), "flush"],
    ]
    never = tensorboard(tmp_path)
    never(0, {"loss": 1.0}, image)
    assert len(looked) == 2


def test_the_files_are_plain_text(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.append({"step": 0, "loss": 0.5})
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"step": 0, "loss": 0.5}


def test_an_interrupt_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with runs.deferred_interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_cosine_goes_from_the_rate_to_nothing_and_a_constant_stays():
    assert [scheduled(0.2, "cosine", step, 10) for step in (0, 5)] == pytest.approx([0.2, 0.1])
    assert scheduled(0.2, "cosine", 10, 10) == scheduled(0.2, "cosine", 12, 10) == pytest.approx(0)
    assert scheduled(0.2, "constant", 9, 10) == 0.2
