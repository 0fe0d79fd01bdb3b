"""The demo in a browser: how soon a click is answered, and what ten users at once do to it.

1. **A click**, as the page's function answers it: what looks like a point, drawn and written as a file. The peer reads
   the picture anew, as it would be without what is kept from the click before. The two run in turns.
2. **In a browser** (Chromium, driven by Playwright, if both are there): the median of 20 clicks, from the mouse to the
   new picture; and of samples that were not read before, to the picture of their components.
3. **Ten users** of ``gradio_client``, each with a photograph of its own: they explore, ask where points look alike,
   match and paint, for two minutes. Errors are counted. Memory is that of the serving process, a process of its own,
   after a quarter of the time and at the end; so is that of its temporary folder.

    python benchmarks/demo.py
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import Row, milliseconds, paired, show, threads

from vitfeats import samples
from vitfeats.apps.demo.intake import own_folder
from vitfeats.apps.demo.looking import similar
from vitfeats.apps.demo.studio import Studio, View
from vitfeats.configs import DemoConfig

HANDLER, BROWSER, NEW = 0.060, 0.300, 1.5  # bars, in seconds
USERS, SECONDS = 10, 120
SHOWN = "#explore-similarity img"
CHANGED = "([what, before]) => { const i = document.querySelector(what); return i && i.src !== before && i.complete }"


def main() -> None:
    """Print a line for each measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="few users for a few seconds, to see that it works")
    parser.add_argument("--seconds", type=int, default=None)
    given = parser.parse_args()
    seconds = given.seconds or (6 if given.fast else SECONDS)
    rows = [click(runs=3 if given.fast else 20)]
    with served() as (url, process, folder):
        rows += browser(url, clicks=3 if given.fast else 20)
        rows += crowd(url, process, folder, users=2 if given.fast else USERS, seconds=seconds)
    show(rows)


def click(runs: int) -> Row:
    """Return how long the answer to a click takes, with what is kept and without."""
    with own_folder(most_bytes=1e9, seconds=3600) as folder, threads(max(1, (os.cpu_count() or 2) // 2)):
        path = str(folder.path / "coffee.png")
        samples.coffee().save(path)
        view = View("mini", "key", 11, 224, 8)
        places = random.Random(0)

        def answer(studio: Studio) -> None:
            point = (places.uniform(0, 600), places.uniform(0, 400))
            studio.file(similar(studio, path, view, point=point).heat, ".jpg")

        warm, cold = Studio(folder, DemoConfig(device="cpu")), Studio(folder, DemoConfig(device="cpu"))
        for studio in (warm, cold):
            answer(studio)

        def anew() -> None:
            cold.forget()
            answer(cold)

        found = paired(lambda: answer(warm), anew, runs)
    against = f"≤ {1000 * HANDLER:.0f} ms"
    return Row("click → heat map, the function: ours / reading anew", f"{found.ratio:.3f}", against, *found.times)


def browser(url: str, clicks: int) -> list[Row]:
    """Return how long a click takes in a real browser, and a new picture."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("no browser rows: playwright is not installed", file=sys.stderr)
        return []
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = window.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(url)
        page.wait_for_selector(SHOWN)
        time.sleep(2)
        box = page.locator("#explore-image img").first.bounding_box()
        assert box is not None

        def timed(what: str, act: Callable[[], None]) -> float:
            before = page.locator(what).first.get_attribute("src")
            start = time.perf_counter()
            act()
            page.wait_for_function(CHANGED, arg=[what, before])
            return time.perf_counter() - start

        asked = []
        for number in range(clicks):
            x = box["x"] + 40 + (number * 17) % (box["width"] - 90)
            y = box["y"] + 60 + (number * 29) % (box["height"] - 100)
            asked.append(timed(SHOWN, lambda x=x, y=y: page.mouse.click(x, y)))
            time.sleep(0.2)
        items = page.locator("#explore-image-samples button.gallery-item")
        new = [timed("#explore-components img", lambda n=n: items.nth(n).click()) for n in range(1, 5)]
        window.close()
    return [
        Row(f"click → heat map, in the browser: median of {clicks}", "", f"≤ {1000 * BROWSER:.0f} ms", *_of(asked)),
        Row(f"new picture → components, in the browser: median of {len(new)}", "", f"≤ {1000 * NEW:.0f} ms", *_of(new)),
    ]


def _of(times: list[float]) -> tuple[str, str]:
    return milliseconds(statistics.median(times)), f"slowest {milliseconds(max(times))}"


def crowd(url: str, process: int, folder: Path, users: int, seconds: int) -> list[Row]:
    """Let users ask for things at once; return what failed, and what it did to memory."""
    from gradio_client import Client, handle_file

    ends = time.monotonic() + seconds
    errors: Counter[str] = Counter()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as given:

        def visit(number: int) -> None:
            places = random.Random(number)
            client = Client(url, verbose=False, download_files=str(Path(given, f"got{number}")))
            image = samples.load(("cat", "coffee", "astronaut", "grace_hopper", "china")[number % 5])[0]
            path = Path(given, f"user{number}.png")
            image.rotate(number).save(path)  # another picture for each
            look = ["mini", "key", 11, 224, 8]
            while time.monotonic() < ends:
                name, *data = places.choices(
                    [
                        ("explore", handle_file(str(path)), *look),
                        ("similarity", handle_file(str(path)), places.uniform(0, 400), places.uniform(0, 250), *look),
                        ("find", handle_file(str(path)), handle_file(str(path)), places.uniform(0, 300), 99, *look),
                        ("mutual", handle_file(str(path)), handle_file(str(path)), 40, *look),
                        ("style", handle_file(str(path)), handle_file(str(path)), "adain", 1.0, "network"),
                    ],
                    (4, 20, 6, 2, 1),
                )[0]
                start = time.monotonic()
                try:
                    client.predict(*data, api_name=f"/{name}")
                except Exception as error:  # whatever it is, it is counted
                    errors[f"{name}: {type(error).__name__}: {error}"[:200]] += 1
                times.setdefault(name, []).append(time.monotonic() - start)
                shutil.rmtree(Path(given, f"got{number}"), ignore_errors=True)
                time.sleep(places.uniform(0, 0.5))

        visitors = [threading.Thread(target=visit, args=(number,)) for number in range(users)]
        for visitor in visitors:
            visitor.start()
        time.sleep(seconds / 4)
        early, held = _resident(process), _held(folder)
        for visitor in visitors:
            visitor.join()
    late = _resident(process)
    for error, count in errors.items():
        print(f"{count} × {error}", file=sys.stderr)
    answers = sum(map(len, times.values()))
    what = f"{users} users for {seconds} s, {answers} answers"
    rows = [
        Row(f"{what}: errors", str(sum(errors.values())), "0", "", ""),
        Row(f"{what}: memory, at the end / after a quarter", f"{late / early:.2f}", "≤ 1.1", _mb(late), _mb(early)),
        Row("the same: files kept, at the end / after a quarter", "", "≤ 1000 MB", _mb(_held(folder)), _mb(held)),
    ]
    for name, found in sorted(times.items()):
        rows.append(Row(f"the same: {name}, median of {len(found)}", "", "none", *_of(found)))
    return rows


@contextmanager
def served() -> Iterator[tuple[str, int, Path]]:
    """Serve the demo in a process of its own; give its address, number and folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment: dict[str, Any] = {**os.environ, "TMPDIR": folder}
        environment.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, "-m", "vitfeats.cli", "demo", "--device", "cpu"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            try:
                yield line.split()[2], process.pid, Path(folder)
            finally:
                process.terminate()
                process.wait(30)  # it deletes its folder


def _resident(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * float(line.split()[1])
    raise ValueError("expected VmRSS in /proc/PID/status; this runs on Linux only")


def _held(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
