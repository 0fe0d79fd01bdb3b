"""Settings and fixtures that every test shares."""

import os

# One torch thread in each of pytest's two processes: more would only fight.
os.environ["OMP_NUM_THREADS"] = "1"
# No test may reach for the network; those of the look for it switch this off for themselves.
os.environ["HF_HUB_OFFLINE"] = "1"

import signal
from collections.abc import Iterator

import pytest
import torch
from synthetic import as_users_run

import vitfeats as vf

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini() -> vf.Extractor:
    """The bundled model at a small size."""
    return vf.load_extractor("mini", size=112, device="cpu")


@pytest.fixture(scope="session")
def narrow(mini) -> vf.Extractor:
    """The bundled model at 9 to 30 tokens an image."""
    return mini.resized(size=48)


@pytest.fixture
def bucket() -> Iterator[str]:
    """The name of a folder in fsspec's memory."""
    from many import in_memory

    with in_memory() as name:
        yield name


@pytest.fixture
def photo() -> torch.Tensor:
    """A smooth image, 70 × 100, so that resampling does not drown a test in noise."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 70), torch.linspace(0, 5, 100), indexing="ij")
    return torch.stack([x.sin() * y.cos(), (x * y).sin(), (x - y).cos()]) * 0.5 + 0.5


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """Run a whole test as users run, without the type checks of the test run."""
    with as_users_run():
        yield


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Listen to SIGINT as a terminal's program does: one that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
