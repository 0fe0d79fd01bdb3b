"""Serving the page: an address, limits, a folder of its own, and nothing left behind."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitfeats.apps.demo.intake import own_folder
from vitfeats.apps.demo.studio import Studio
from vitfeats.configs import DemoConfig
from vitfeats.errors import ConfigError, MissingDependencyError


@dataclass(frozen=True)
class Served:
    """A demo that is being served.

    Attributes:
        url: Its address.
        folder: Its temporary folder.
        studio: What its pages share.
    """

    url: str
    folder: Path
    studio: Studio


@contextmanager
def serving(config: DemoConfig | None = None) -> Iterator[Served]:
    """Serve the demo meanwhile, in threads of this process; at the end its folder is gone.

    Args:
        config: Settings; None is the defaults: this machine alone, the first free port from 7860 on.

    Raises:
        MissingDependencyError: If gradio is not installed.
        UnknownModelError: If no model fits a name or pattern.
        ConfigError: If the address cannot be listened on, or there is no such device.
    """
    config = config or DemoConfig()
    _require_gradio()
    seconds = config.hours * 3600
    with (
        own_folder(most_bytes=config.folder_mb * 1e6, seconds=seconds) as folder,
        _environment(GRADIO_TEMP_DIR=str(folder.path), GRADIO_EXAMPLES_CACHE=str(folder.path / "examples")),
        _threads(config.threads),
    ):
        from vitfeats.apps.demo.page import CSS, build

        with closing(Studio(folder, config)) as studio:
            page = build(studio)
            try:
                yield Served(_launched(page, config, CSS), folder.path, studio)
            finally:
                page.close(verbose=False)


def serve(config: DemoConfig | None = None) -> None:
    """Serve the demo until Ctrl-C, or until the process is asked to end. Call it in the main thread.

    Args:
        config: As for :func:`serving`; so are the errors.
    """
    started, ended = threading.Event(), threading.Event()
    print("vitfeats demo: starting …", file=sys.stderr, flush=True)
    with _asked_to_end(started, ended), serving(config) as served:
        started.set()
        print(f"vitfeats demo: {served.url} (Ctrl-C ends it)", flush=True)
        ended.wait()
        print("vitfeats demo: ending …", file=sys.stderr, flush=True)
    print("vitfeats demo: ended")


@contextmanager
def _asked_to_end(started: threading.Event, ended: threading.Event) -> Iterator[None]:
    """Set an event at Ctrl-C, or where the process is asked to end: the folder is deleted then, too.

    What is still starting is interrupted.
    """

    def end(*_: object) -> None:
        ended.set()
        if not started.is_set():
            raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _launched(page: Any, config: DemoConfig, css: str) -> str:
    try:
        _, url, _ = page.launch(**_settings(config), css=css)
    except OSError as error:
        port = "a port from 7860 on" if config.port is None else f"port {config.port}"
        raise ConfigError(f"expected {port} of {config.host} to be free to listen on, but it is not") from error
    return url


def _settings(config: DemoConfig) -> dict[str, Any]:
    from gradio.themes import Soft

    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "Consolas", "monospace")
    return {
        "server_name": config.host,
        "server_port": config.port,
        "prevent_thread_lock": True,
        "quiet": True,
        "share": False,
        "show_error": True,
        "inbrowser": config.open,
        "max_file_size": int(config.upload_mb * 1e6),
        "state_session_capacity": 200,
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "footer_links": ["api"],
        "theme": Soft(primary_hue="indigo", font=sans, font_mono=mono),  # of this machine: none is fetched
    }


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'expected gradio for the demo, but it is not installed; try: pip install "vitfeats[demo]"'
        ) from error


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables of the environment meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Give torch half of the cores meanwhile, so that a long job and a short one do not wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or max(1, (os.cpu_count() or 2) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)
