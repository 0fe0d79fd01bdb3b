"""A store of a million images: memory of writing and reading, and search in it, exact and by an index.

An image is one vector of 384 numbers, as CLS of a small ViT is: a centre and noise around it, 50 images a centre, in
shards of 1000 images, float16. Queries are 100 more of the same kind.

Memory is the largest resident size of a process (VmHWM) of its own for each part. That at the end is held against that
after the first hundredth of the shards, when the list of ids is in memory already: what grows with the store would be
seen. That of building an index is what it takes beyond the store. Times are of one run each. Linux only.

    python benchmarks/million.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import Row, milliseconds, resident, show
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.bulk import Store, create_store, write_shard
from vitfeats.apps.bulk.search import Hits, build_index, open_index, search_images
from vitfeats.descriptor import Descriptors

IMAGES, FAST, PER_SHARD = 1_000_000, 2_000, 1000
DIM, EACH, NOISE = 384, 50, 1.5
QUERIES, K = 100, 10
PROBES = (8, 64)
TAP = "cls@11"
Measured = dict[str, Any]


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help="how many")
    parser.add_argument("--folder", type=Path, help="where to write, and to keep it; a temporary folder otherwise")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of faiss")
    parser.add_argument("--fast", action="store_true", help=f"{FAST} images, to see that it works")
    parser.add_argument("--alone", choices=list(PARTS), help=argparse.SUPPRESS)  # what the new processes are asked for
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(PARTS[options.alone](options.folder, options.images)))
        return
    count = FAST if options.fast else options.images
    print(f"{count} images of {DIM} numbers, {QUERIES} queries, {options.threads} threads\n", flush=True)
    with TemporaryDirectory() as temporary:
        show(rows(options.folder or Path(temporary), count, options.threads))


def rows(folder: Path, count: int, threads: int) -> list[Row]:
    """Return what each part measures."""
    found: dict[str, Measured] = {}
    for part in PARTS:
        found[part] = alone(part, folder, count, threads)
        print(f"{part}: {found[part]['seconds']:.1f} s", flush=True)
    print()
    exact = found["exact"]
    lines = []
    for part in ("write", "exact"):
        early, late = found[part]["early"], found[part]["late"]
        lines.append(Row(f"{part}: memory, end / after 1 %", f"{late / early:.2f}", "1.10", _mb(late), _mb(early)))
    for kind in ("flat", "ivf"):
        built, asked = found[f"build {kind}"], found[f"search {kind}"]
        lines.append(_against(f"{kind}: building / exact search", built["seconds"], exact["seconds"]))
        more, size = built["late"] - built["early"], built["size"]
        lines.append(Row(f"{kind}: memory of building / index", f"{more / size:.2f}", "none", _mb(more), _mb(size)))
        for probes, (seconds, recall) in asked["probes"].items():
            name = kind if kind == "flat" else f"{kind}, {probes} probes"
            lines.append(_against(f"{name}: search / exact search", seconds, exact["seconds"]))
            bar = "1.000" if kind == "flat" else "none"
            lines.append(Row(f"{name}: recall@{K}", f"{recall:.3f}", bar, "–", "–"))
    return lines


def write(folder: Path, count: int) -> Measured:
    """Write the store."""
    start = time.perf_counter()
    ids = [f"{number:09}.jpg" for number in range(count)]
    store = create_store(folder / "store", ids, {"model": "numbers", "taps": [TAP]}, PER_SHARD)
    centres, early = centres_of(count), 0
    for number in range(store.shards):
        names = store.ids_of(number)
        d = described(vectors(centres, len(names), number))
        images = [(name, Descriptors([(TAP, d[place])])) for place, name in enumerate(names)]
        write_shard(store.shard_path(number), images, settings=store.settings)
        if number == hundredth(store) - 1:
            early = resident("VmHWM")
    return {"seconds": time.perf_counter() - start, "early": early, "late": resident("VmHWM")}


def exact(folder: Path, count: int) -> Measured:
    """Search by reading everything; keep what was found."""
    store = Watched(folder / "store")
    asked = queries(count)
    start = time.perf_counter()
    hits = search_images(store, asked, k=K)
    seconds = time.perf_counter() - start
    assert len(store.ids) == count
    (folder / "exact.json").write_text(json.dumps(hits.ids))
    return {"seconds": seconds, "early": store.early, "late": resident("VmHWM")}


def build(kind: str) -> Callable[[Path, int], Measured]:
    """Return what builds an index."""

    def built(folder: Path, count: int) -> Measured:
        store = Store(folder / "store")
        early, start = resident("VmRSS"), time.perf_counter()
        path = build_index(store, kind=kind, path=folder / kind)
        seconds, size = time.perf_counter() - start, sum(file.stat().st_size for file in path.iterdir())
        return {"seconds": seconds, "size": size, "early": early, "late": resident("VmHWM")}

    return built


def search(kind: str) -> Callable[[Path, int], Measured]:
    """Return what searches by an index, with few and more probes."""

    def searched(folder: Path, count: int) -> Measured:
        start = time.perf_counter()
        store = Store(folder / "store")
        index = open_index(store, folder / kind)
        opened, asked = time.perf_counter() - start, queries(count)
        expected = json.loads((folder / "exact.json").read_text())
        found: Measured = {}
        for probes in PROBES[-1:] if kind == "flat" else PROBES:
            search_images(store, asked, k=K, index=index, probes=probes)  # the first warms up
            start = time.perf_counter()
            hits = search_images(store, asked, k=K, index=index, probes=probes)
            found[str(probes)] = time.perf_counter() - start, recall(hits, expected)
        return {"seconds": opened, "probes": found}

    return searched


PARTS: dict[str, Callable[[Path, int], Measured]] = {
    "write": write,
    "exact": exact,
    "build flat": build("flat"),
    "search flat": search("flat"),
    "build ivf": build("ivf"),
    "search ivf": search("ivf"),
}


class Watched(Store):
    """A store that remembers the memory after a hundredth of its shards."""

    early = 0

    def rows(self, number: int, tap: str) -> Any:
        """Return the rows of a shard."""
        if number == hundredth(self):
            self.early = resident("VmHWM")
        return super().rows(number, tap)


def alone(part: str, folder: Path, count: int, threads: int) -> Measured:
    """Return what a part measures in a process of its own."""
    command = [sys.executable, __file__, "--alone", part, "--folder", str(folder), "--images", str(count)]
    settings = {"OMP_NUM_THREADS": str(threads)}  # for torch and for faiss
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
    return json.loads(ran.stdout)


def hundredth(store: Store) -> int:
    """Return how many shards are a hundredth of a store, at least 1."""
    return max(1, store.shards // 100)


def centres_of(count: int) -> Tensor:
    """Return the centres of so many images."""
    return torch.randn(count // EACH, DIM, generator=torch.Generator().manual_seed(0))


def vectors(centres: Tensor, count: int, number: int) -> Tensor:
    """Return vectors around the centres, others for each number."""
    generator = torch.Generator().manual_seed(1 + number)
    chosen = torch.randint(len(centres), (count,), generator=generator)
    return centres[chosen] + NOISE * torch.randn(count, DIM, generator=generator)


def queries(count: int) -> Tensor:
    """Return vectors that are in no shard."""
    return vectors(centres_of(count), QUERIES, -1)


def described(values: Tensor) -> vf.Descriptor:
    """Return vectors as an extractor has them: one token an image."""
    frame = vf.Frame((224, 224), (224, 224))
    grid = vf.PatchGrid(1, 1, 224, 224)
    return vf.Descriptor(values[:, None], grid, (frame,) * len(values), vf.Tap("cls", 11), "numbers", cls=values)


def recall(hits: Hits, expected: list[list[str]]) -> float:
    """Return the share of what was expected that was found."""
    both = sum(len(set(one) & set(other)) for one, other in zip(hits.ids, expected, strict=True))
    return both / sum(map(len, expected))


def _against(what: str, seconds: float, peer: float) -> Row:
    return Row(what, f"{seconds / peer:.3g}", "none", milliseconds(seconds), milliseconds(peer))


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
