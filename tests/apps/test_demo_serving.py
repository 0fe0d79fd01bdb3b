"""The demo over HTTP, as strangers reach it: what it answers, what it refuses, and what it leaves behind."""

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from vitfeats import samples
from vitfeats.apps.demo import Served, serving
from vitfeats.configs import DemoConfig
from vitfeats.errors import ConfigError, UnknownModelError

pytest.importorskip("gradio")

VIEW = ["mini", "key", 11, 224, 16]


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with serving(DemoConfig(upload_mb=2)) as served:
        yield served


def upload(demo: Served, data: bytes, name: str) -> httpx.Response:
    return httpx.post(f"{demo.url}gradio_api/upload", files={"files": (name, data)}, timeout=60)


def file(path: str | Path, **others: Any) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **others}


def asked(demo: Served, name: str, *data: Any) -> list[Any]:
    """Call an endpoint as any program can; return its answer, or raise what it says was wrong."""
    with httpx.Client(base_url=demo.url, timeout=120) as client:
        joined = client.post(f"gradio_api/call/{name}", json={"data": list(data)})
        if joined.status_code != 200:
            raise RuntimeError(joined.text)
        event = ""
        with client.stream("GET", f"gradio_api/call/{name}/{joined.json()['event_id']}") as lines:
            for line in lines.iter_lines():
                if line.startswith("event:"):
                    event = line.removeprefix("event:").strip()
                elif line.startswith("data:") and event in ("complete", "error"):
                    found = json.loads(line.removeprefix("data:"))
                    if event == "error":
                        raise RuntimeError(found["error"] if isinstance(found, dict) else str(found))
                    return found
    raise AssertionError("the stream ended without an answer")


def uploaded(demo: Served, data: bytes, name: str = "x.png") -> dict[str, Any]:
    answer = upload(demo, data, name)
    assert answer.status_code == 200, answer.text
    return file(answer.json()[0], orig_name=name)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_a_program_can_explore_an_uploaded_picture(demo: Served) -> None:
    cat = samples.cat()
    components, saliency, similarity, x, y, told = asked(demo, "explore", uploaded(demo, png(cat)), *VIEW)
    for shown in (components, saliency, similarity):
        answer = httpx.get(shown["url"])
        assert answer.status_code == 200
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.size == (640, round(640 * cat.height / cat.width))
    assert (x, y) == (cat.width / 2, cat.height / 2)
    assert told.startswith("key@11 of mini, 14×21 tokens of 192. Most similar elsewhere: x ")


def test_the_program_of_the_page_on_the_demo_runs(
    demo: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    samples.cat().save("cat.jpg")
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert code.count("http://127.0.0.1:7860") == 1
    found: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:7860", demo.url), found)
    assert found["told"].startswith("key@11 of mini")
    for name in ("components", "saliency", "similarity"):
        with Image.open(found[name]) as picture:
            assert picture.width == 640


def test_a_program_can_ask_where_a_point_looks_alike(demo: Served) -> None:
    cat = uploaded(demo, png(samples.cat()))
    smaller = uploaded(demo, png(samples.cat().resize((300, 200))))
    for other, where in ((cat, "Most similar elsewhere: x "), (smaller, "Most similar: x ")):
        _, _, told = asked(demo, "find", cat, other, 180, 110, *VIEW)
        assert told.startswith(f"In the second picture. key@11 of mini, 14×21 tokens of 192. {where}")
    _, x, y, told = asked(demo, "similarity", cat, 180, 110, *VIEW)
    assert (x, y) == (180, 110)
    assert told.startswith("key@11 of mini, 14×21 tokens of 192. Most similar elsewhere: x ")
    assert "cosine" in told
    assert asked(demo, "similarity", cat, -20, 9999, *VIEW)[1:3] == [0, samples.cat().height]  # brought to the edge


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "'a.png' is an SVG drawing"),
        ("a.png", b"<!DOCTYPE html><html><script>alert(1)</script></html>", "'a.png' is a web page"),
        ("a.svg", b"<?xml version='1.0'?><svg></svg>", "'a.svg' is an SVG drawing"),
        ("a.jpg", b"just words", "'a.jpg' is none of these"),
        ("a.png", header(30000, 30000), "at most 64 million pixels, but 'a.png' claims far more"),
        ("a.png", header(9000, 9000), "at most 64 million pixels, but 'a.png' has 9000×9000"),
        ("a.png", png(Image.new("RGB", (64, 64)))[:-40], "'a.png' breaks off or is damaged"),
        ("<img src=x onerror=alert(1)>.png", b"words", "but '"),
    ],
    ids=["svg", "html", "svg by name", "text", "bomb", "too many pixels", "truncated", "markup in the name"],
)
def test_what_is_no_picture_is_refused_with_a_sentence(demo: Served, name: str, data: bytes, sentence: str) -> None:
    given = uploaded(demo, data, name)
    with pytest.raises(RuntimeError) as caught:
        asked(demo, "explore", given, *VIEW)
    assert "expected a " in str(caught.value)
    assert sentence in str(caught.value)
    assert "<img" not in str(caught.value)
    assert str(demo.folder) not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["explore", "hyperfeatures"])
def test_a_missing_picture_is_asked_for(demo: Served, endpoint: str) -> None:
    if endpoint == "explore":
        assert "Upload a picture" in asked(demo, "explore", None, *VIEW)[-1]
        return
    with pytest.raises(RuntimeError, match="expected a picture, got none; upload one, or click a sample"):
        asked(demo, "hyperfeatures", None, ["up1.res2"], 10)


def test_files_elsewhere_are_neither_read_nor_shown(demo: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(samples.cat()))
    ways = [str(secret), f"{demo.folder}/../{tmp_path.relative_to('/tmp') if tmp_path.is_relative_to('/tmp') else ''}"]
    for path in [*ways, "/etc/passwd", f"{demo.folder}/../../etc/passwd", "../../../etc/passwd", "", "\0"]:
        for given in (file(path), {"path": path}, path, file(demo.folder / "samples" / "cat.png", url=path)):
            if isinstance(given, dict) and "url" in given:
                continue
            with pytest.raises(RuntimeError) as caught:
                asked(demo, "explore", given, *VIEW)
            assert "root:" not in str(caught.value)


def test_a_link_in_the_folder_does_not_lead_out_of_it(demo: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(samples.cat()))
    link = demo.folder / "link.png"
    link.symlink_to(secret)
    try:
        with pytest.raises(RuntimeError):
            asked(demo, "explore", file(link), *VIEW)
    finally:
        link.unlink()


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=%2Fetc%2Fpasswd",
        "gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/file=FOLDER/../../etc/passwd",
        "gradio_api/file=CWD/pyproject.toml",
        "gradio_api/file/etc/passwd",
        "file=/etc/passwd",
        "assets/..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "svelte/..%2f..%2f..%2f..%2fetc/passwd",
        "static/..%2f..%2f..%2fetc/passwd",
        "gradio_api/file=http://127.0.0.1:9/",
        "gradio_api/proxy=http://127.0.0.1:9/",
        "monitoring",
        "gradio_api/vibe-code/",
    ],
)
def test_no_address_leads_out_of_the_folder(demo: Served, path: str) -> None:
    path = path.replace("FOLDER", str(demo.folder)).replace("CWD", os.getcwd())
    answer = httpx.get(demo.url + path)
    assert 400 <= answer.status_code < 500
    assert "root:" not in answer.text
    assert "[project]" not in answer.text


def test_nothing_is_fetched_from_an_address(demo: Served) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(1.0)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/cat.png"
        with pytest.raises(RuntimeError, match="expected a picture that was uploaded, got an address"):
            asked(demo, "explore", file(address), *VIEW)
        inside = file(demo.folder / "samples" / "cat.png", url=address)
        asked(demo, "explore", inside, *VIEW)  # the address beside the path is not looked at
        with pytest.raises(TimeoutError):
            listening.accept()


def test_a_sample_click_does_not_open_the_way_to_addresses(demo: Served) -> None:
    """Gradio remakes components that an answer changes; the refusal must outlive a visit in one session."""
    with httpx.Client(base_url=demo.url, timeout=60) as client:
        for endpoint, data in (
            ("choose_explore", ["vgg_mini"]),
            ("explore", [file("http://127.0.0.1:9/a.png"), *VIEW]),
        ):
            body = {"data": data, "session_hash": "same"}
            found = client.post(f"gradio_api/call/{endpoint}", json=body)
            with client.stream("GET", f"gradio_api/call/{endpoint}/{found.json()['event_id']}") as lines:
                text = "".join(lines.iter_text())
        assert "got an address" in text


def test_a_large_upload_is_refused_and_leaves_nothing(demo: Served) -> None:
    before = {path for path in demo.folder.rglob("*") if path.is_file()}
    answer = upload(demo, b"\x89PNG" + b"\0" * 3_000_000, "large.png")
    assert answer.status_code == 413
    assert answer.text == "File size exceeded maximum allowed size of 2000000 bytes."
    assert {path for path in demo.folder.rglob("*") if path.is_file()} == before


def test_an_upload_stays_in_the_folder_whatever_it_is_called(demo: Served) -> None:
    for name in ("../../evil.png", "/etc/evil.png", "..\\evil.png", "a" * 300 + ".png"):
        answer = upload(demo, png(Image.new("RGB", (20, 20))), name)
        if answer.status_code == 200:
            assert Path(answer.json()[0]).resolve().is_relative_to(demo.folder)


@pytest.mark.parametrize(
    ("look", "sentence"),
    [
        (["hf:somebody/something", "key", 11, 224, 16], "hf:somebody/something"),
        (["mini", "attention", 11, 224, 16], "attention"),
        (["mini", "key", 99, 224, 16], "99"),
        (["mini", "key", 11, 100000, 16], "100000"),
        (["mini", "key", 11, 224, 3], "3"),
        (["mini", "key", 11, 448, 4], "expected at most 6000 tokens"),
    ],
)
def test_settings_that_are_not_offered_are_refused(demo: Served, look: list[Any], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        asked(demo, "explore", uploaded(demo, png(samples.cat())), *look)


def test_an_error_of_ours_does_not_tell_of_the_machine(demo: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret path /home/somebody")

    monkeypatch.setattr(demo.studio, "read", broken)
    with pytest.raises(RuntimeError, match="Something failed here that is not of your doing") as caught:
        asked(demo, "explore", uploaded(demo, png(samples.cat())), *VIEW)
    assert "secret" not in str(caught.value)


def test_it_listens_on_this_machine_alone_unless_told(demo: Served) -> None:
    assert demo.url.startswith("http://127.0.0.1:")
    port = int(demo.url.rstrip("/").rpartition(":")[2])
    others = [address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for other in {name for name in others if not name.startswith("127.")}:
        with pytest.raises(ConnectionRefusedError), socket.create_connection((other, port), timeout=2):
            pass


def test_nothing_is_left_behind() -> None:
    before = dict(os.environ)
    with serving(DemoConfig(models=("vgg_mini",))) as served:
        folder = served.folder
        assert folder.exists()
        assert served.studio.models == ("mini", "vgg_mini", "ddpm_mini")
        upload(served, png(Image.new("RGB", (20, 20))), "a.png")
    assert not folder.exists()
    assert dict(os.environ) == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


def test_a_port_in_use_and_an_unknown_model_are_said(demo: Served) -> None:
    port = int(demo.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port}"), serving(DemoConfig(port=port)):
        pass
    with pytest.raises(UnknownModelError, match="got 'dinno\\*'"), serving(DemoConfig(models=("dinno*",))):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("asks", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_asked_to_end(asks: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vitfeats.cli", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("vitfeats demo: http://127.0.0.1:")
        assert httpx.get(line.split()[2], timeout=30).status_code == 200
        assert list(tmp_path.glob("vitfeats-demo-*"))
        process.send_signal(asks)
        assert process.wait(60) == 0
    assert not list(tmp_path.glob("vitfeats-demo-*"))


@pytest.mark.parametrize("asks", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_ended_while_it_starts_leaves_nothing(asks: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vitfeats.cli", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        for _ in range(1200):
            if list(tmp_path.glob("vitfeats-demo-*")):
                break
            time.sleep(0.05)
        process.send_signal(asks)
        assert process.wait(60) == 130
    assert not list(tmp_path.glob("vitfeats-demo-*"))


@pytest.mark.parametrize("name", ["page.html", "drawing.svg", "page.xhtml", "script.js", "page.png"])
def test_an_upload_is_never_shown_as_a_page(demo: Served, name: str) -> None:
    data = b"<html xmlns='http://www.w3.org/1999/xhtml'><script>alert(1)</script></html>"
    path = upload(demo, data, name).json()[0]
    answer = httpx.get(f"{demo.url}gradio_api/file={path}")
    shown_as = answer.headers["content-type"].partition(";")[0]
    kept = answer.headers.get("content-disposition", "").startswith("attachment")
    assert kept or shown_as in ("image/png", "text/plain"), answer.headers
