"""PCK: what the protocol does to the number, what enlarging maps costs, and a long run that is killed.

    python benchmarks/pck.py maps
    python benchmarks/pck.py protocols PICTURES --names held_out.txt
    python benchmarks/pck.py long

``maps``: the most similar pixel of an enlarged map, against enlarging the map by ``F.interpolate`` first; 60 × 60 cells
of 384 channels to 500 × 500 pixels, 12 points. ``protocols``: the same descriptors of ``mini`` (token@11, log-binned;
at its own size) under the four protocols, and each choice changed alone, on 200 pictures and their warps; the object is
what lies in the middle half of a picture, and its category the picture's folder. ``long``: 12,234 pairs of 300 images
in the layout of SPair-71k, ``mini`` at 112 pixels with its features kept, by ``vitfeats eval``, killed three times;
memory and time.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Row, paired, reset_peak, resident, show, threads
from PIL import Image

import vitfeats as vf
from vitfeats.apps.evaluation import Pair, PckResult, WarpedImages
from vitfeats.apps.evaluation.carrying import most_similar_pixel
from vitfeats.apps.evaluation.results import as_table, percent
from vitfeats.configs import PCK_PROTOCOLS, PckProtocol
from vitfeats.pictures import read_names, read_pictures

PAIRS, IMAGES, KILLS, POINTS = 12_234, 300, 3, 8


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="maps", choices=("maps", "protocols", "long"))
    parser.add_argument("pictures", nargs="?", type=Path)
    parser.add_argument("--names", type=Path, help="text file, one name a line")
    parser.add_argument("--pairs", type=int, help="in place of 200, or 12,234")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=11, help="paired runs")
    parser.add_argument("--fast", action="store_true", help="small numbers, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "maps":
        shape = (15, 64, (97, 120), 3) if options.fast else (60, 384, (500, 500), options.runs)
        show(maps(*shape, number=options.threads))
    elif options.what == "protocols":
        if options.pictures is None:
            parser.error("protocols wants PICTURES, a folder or a tar file whose folders are categories")
        print(protocols(options.pictures, options.names, options.pairs or 200))
    else:
        show(long_run(options.pairs or PAIRS))


def maps(cells: int, dim: int, size: tuple[int, int], runs: int, number: int = 1) -> list[Row]:
    """Return how our search and that over a map that is made compare, in time and memory."""
    source = torch.Generator().manual_seed(0)
    values, asked = torch.randn(dim, cells, cells, generator=source), torch.randn(12, dim, generator=source)
    grid = vf.PatchGrid(cells, cells, 8, 8)

    def ours() -> torch.Tensor:
        return most_similar_pixel(asked, values, grid, size)

    def peer() -> torch.Tensor:
        dense = F.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0].flatten(1)
        return (F.normalize(asked, dim=1) @ F.normalize(dense, dim=0)).argmax(1)

    if not torch.equal(ours(), peer()):
        raise AssertionError("expected the same pixels from both")
    with threads(number):
        timed = paired(ours, peer, runs)
    peaks = [_peak(work) for work in (ours, peer)]
    told = [f"{peak / 2**20:.1f} MB" for peak in peaks]
    return [
        Row("most similar pixel: enlarging the map / ours", f"{1 / timed.ratio:.1f}", "≥ 5", *timed.times),
        Row("memory: ours / enlarging the map", f"{peaks[0] / peaks[1]:.3f}", "≤ 0.1", *told),
    ]


class Boxed(Sequence[Pair]):
    """Warped photographs with an object: points in the middle half of each, the box around them, the folder's name."""

    name = "warped photographs"

    def __init__(self, pictures: dict[str, np.ndarray]) -> None:
        self.names = list(pictures)
        self.pairs = WarpedImages(list(pictures.values()), seed=0, points=12)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override] - no slices
        pair = self.pairs[index]
        assert isinstance(pair.image_a, torch.Tensor)
        height, width = pair.image_a.shape[1:]
        x, y = pair.points_a.unbind(1)
        middle = (x > width / 4) & (x < 3 * width / 4) & (y > height / 4) & (y < 3 * height / 4)
        if int(middle.sum()) < 2:
            middle[:] = True
        a, b = pair.points_a[middle], pair.points_b[middle]
        boxes = [(*p.min(0).values.tolist(), *p.max(0).values.tolist()) for p in (a, b)]
        folder = self.names[index].rpartition("/")[0]
        return Pair(pair.image_a, pair.image_b, a, b, pair.name, category=folder, box_a=boxes[0], box_b=boxes[1])


def protocols(pictures: Path, names: Path | None, pairs: int) -> str:
    """Return the tables: four protocols, and one choice at a time."""
    kept = [] if names is None else read_names(names)
    found = read_pictures(pictures, side=160, only=kept)
    chosen = sorted(random.Random(0).sample(sorted(found), min(pairs, len(found))))
    dataset = Boxed({name: found[name] for name in chosen})
    extractor = vf.load_extractor("mini", device="cpu")

    def measured(rules: PckProtocol) -> PckResult:
        return vf.evaluate_pck(extractor, "token@11", dataset, protocol=rules, transform=_binned)

    lines = [["protocol", "PCK@0.1", "its mean", *("keypoint", "image", "category")], ["---"] * 6]
    for name, changes in PCK_PROTOCOLS.items():
        result = measured(replace(PckProtocol(**changes), size=None))
        means = [percent(result.pck(mean=mean)) for mean in ("keypoint", "image", "category")]
        lines.append([f"`{name}`", percent(result.pck()), result.protocol.mean, *means])
    base = measured(PckProtocol())
    choices = {
        "`spair`": base,
        "`<` in place of `≤`": base.under(strict=True),
        'reference="image"': base.under(reference="image"),
        'mean="image"': base.under(mean="image"),
        'mean="keypoint"': base.under(mean="keypoint"),
        'mean="category_keypoint"': base.under(mean="category_keypoint"),
        'predict="map"': measured(PckProtocol(predict="map")),
        'predict="map", enlarged="network"': measured(PckProtocol(predict="map", enlarged="network")),
        'predict="window"': measured(PckProtocol(predict="window")),
        "pad=True": measured(PckProtocol(pad=True)),
        "size=(448, 448)": measured(PckProtocol(size=(448, 448))),
    }
    rows = [["choice", *(f"PCK@{threshold:g}" for threshold in base.protocol.thresholds)], ["---"] * 4]
    rows += [[name, *(percent(r.pck(t)) for t in r.protocol.thresholds)] for name, r in choices.items()]
    return f"{len(base.pairs)} pairs, {base.points} points\n\n{as_table(lines)}\n\n{as_table(rows)}"


def long_run(pairs: int) -> list[Row]:
    """Return memory and time of a long run that is killed three times, in processes of its own."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _write_spair(root / "data", pairs)
        command = [
            *(sys.executable, str(Path(__file__)), "--worker"),
            *("eval", "--data", str(root / "data"), "--model", "mini", "--size", "112", "--device", "cpu"),
            *("--cache", str(root / "cache"), "--out", str(root / "out"), "--resume", "--json"),
        ]
        short = [str(root / "short") if part == str(root / "out") else part for part in command]
        after = _until([*short, "--subset", "100"], root / "short" / "mini-key-11" / "history.jsonl", None)
        history = root / "out" / "mini-key-11" / "history.jsonl"
        began, peaks = time.perf_counter(), []
        for stop in [*sorted(random.Random(0).sample(range(pairs // 10, pairs), KILLS)), None]:
            peaks.append(_until(command, history, stop))
        seconds = time.perf_counter() - began
        done = PckResult.load(history.parent / "pck.json")
        indices = sorted(pair.index for pair in done.pairs)
        lines = len(history.read_text().splitlines())
        if indices != list(range(pairs)) or lines != pairs:
            raise AssertionError(f"expected every pair once, got {len(set(indices))} of {pairs} and {lines} lines")
    return [
        Row(f"{pairs:,} pairs, killed {KILLS} times: pairs measured once", "1.000", "1", f"{lines:,}", "–"),
        Row(f"memory: {pairs:,} pairs / 100 pairs", f"{max(peaks) / after:.2f}", "≤ 1.1", _mb(max(peaks)), _mb(after)),
        Row("time a pair, with the starts", "–", "–", f"{1e3 * seconds / pairs:.1f} ms", "–"),
    ]


def _until(command: Sequence[str], history: Path, stop: int | None) -> int:
    """Run until so many pairs are done, then kill; return the largest resident size."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = _resident_of(process.pid) or peak
        if stop is not None and _lines(history) >= stop:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"expected the run to go well, got exit code {process.returncode}")
    return peak


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _resident_of(process: int) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _write_spair(root: Path, pairs: int) -> None:
    """Write images of smooth colours and random pairs of them in the layout of SPair-71k."""
    source = np.random.default_rng(0)
    folder, notes = root / "JPEGImages" / "thing", root / "PairAnnotation" / "test"
    for made in (folder, notes, root / "Layout" / "large"):
        made.mkdir(parents=True)
    for number in range(IMAGES):
        small = Image.fromarray(source.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    names = []
    for number in range(pairs):
        first, second = source.choice(IMAGES, 2, replace=False).tolist()
        names.append(f"{number:06d}-{first}-{second}:thing")
        points = [(source.random((POINTS, 2)) * [320, 240]).round(1).tolist() for _ in range(2)]
        record = {
            "src_imname": f"{first}.jpg",
            "trg_imname": f"{second}.jpg",
            "category": "thing",
            "src_kps": points[0],
            "trg_kps": points[1],
            "src_bndbox": [10, 10, 300, 230],
            "trg_bndbox": [10, 10, 300, 230],
        }
        (notes / f"{names[-1]}.json").write_text(json.dumps(record))
    (root / "Layout" / "large" / "test.txt").write_text("\n".join(names))


def _peak(work) -> int:
    before = reset_peak()
    work()
    return max(resident("VmHWM") - before, 1)


def _binned(a: vf.Descriptor, b: vf.Descriptor) -> tuple[vf.Descriptor, vf.Descriptor]:
    return vf.log_bin(a), vf.log_bin(b)


def _mb(size: int) -> str:
    return f"{size / 2**20:.0f} MB"


def worker(arguments: Sequence[str]) -> int:
    """Run the command line in this process, on one thread."""
    from vitfeats.cli import main as run

    torch.set_num_threads(1)
    return run(arguments)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2:]))
    main()
