"""Exact matching against one matrix product, scikit-learn and faiss, and the memory it takes.

3025 × 3025 tokens of 384 channels. One product is `a @ b.T` of the unit vectors, without any maximum. scikit-learn
(brute force, cosine) and faiss (IndexFlatIP) look for the nearest token both ways, as mutual matching needs; faiss also
finds the ten nearest one way. All sides have the same number of threads and run in turns; ratios are medians of the
paired ratios. The ceiling of a ratio to a peer is the peer's time over that of the product into memory that is there
already: what the arithmetic allows. One thread unless asked: where other work wants the cores, threads wait for each
other, and the figure is the neighbours'.

Memory is what the kernel counts: the process's largest resident size during the call (VmHWM, reset before it) less the
size before it, in a new process for each chunk, after a small call that loads what every call needs. Linux only.

    python benchmarks/matching.py
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from measuring import Row, described, paired, reset_peak, resident, show, threads
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

import vitfeats as vf
from vitfeats.matching import top_k

SIDE, DIM, MB = 55, 384, 1e6
CHUNKS = (None, 100, 1000, 3025)


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of every side")
    parser.add_argument("--runs", type=int, default=21, help="paired runs; the libraries run a third as often")
    parser.add_argument("--fast", action="store_true", help="14 × 14 tokens and 3 runs, to see that it works")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # what the new processes are asked for
    options = parser.parse_args()
    side, runs = (14, 3) if options.fast else (SIDE, options.runs)
    if options.memory is not None:
        torch.set_num_threads(options.threads)
        print(peak(side, options.memory or None))
        return
    print(f"{side * side} × {side * side} tokens of {DIM}, {options.threads} threads, {runs} paired runs\n")
    show(rows(side=side, runs=runs, number=options.threads))


def rows(*, side: int = SIDE, runs: int = 21, number: int = 1) -> list[Row]:
    """Return the comparisons, on a number of threads; a bar says which side of it is good."""
    with threads(number), threadpool_limits(number):
        times = _times(side, runs)
    return times + [_memory(side, chunk, number) for chunk in CHUNKS]


def peak(side: int, chunk: int | None) -> float:
    """Return the megabytes that a call of match_mutual adds at most to the resident size of this process."""
    small, a, b = described(8, DIM), described(side, DIM), described(side, DIM, 1)
    vf.match_mutual(small, small)
    start = reset_peak()
    vf.match_mutual(a, b, chunk=chunk)
    return (resident("VmHWM") - start) / MB


def _times(side: int, runs: int) -> list[Row]:
    a, b = described(side, DIM), described(side, DIM, 1)
    left, right = (torch.nn.functional.normalize(d.features[0], dim=1) for d in (a, b))
    found = []
    for name, ours in (("match_mutual", vf.match_mutual), ("match_ratio", vf.match_ratio)):
        measured = paired(lambda ours=ours: ours(a, b), lambda: left @ right.T, runs)
        bar = "≤ 2" if name == "match_mutual" else "none"
        found.append(Row(f"{name}: ours / one matrix product", f"{measured.ratio:.2f}", bar, *measured.times))
    ready = torch.empty(len(left), len(right))
    for name, ours, peer in _libraries(a, b):
        measured = paired(ours, peer, max(3, runs // 3))
        ceiling = paired(peer, lambda: torch.mm(left, right.T, out=ready), max(3, runs // 3)).ratio
        found.append(Row(f"{name} / ours", f"{1 / measured.ratio:.2f}", f"{ceiling:.2f} (ceiling)", *measured.times))
    return found


def _libraries(a: vf.Descriptor, b: vf.Descriptor) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Return (name, ours, theirs) for each peer that is installed; each does all that its answer needs."""
    left, right = a.features[0].numpy(), b.features[0].numpy()

    def scikit() -> None:
        for of, among in ((left, right), (right, left)):
            NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(among).kneighbors(of)

    found: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("match_mutual: scikit-learn NearestNeighbors both ways", lambda: vf.match_mutual(a, b), scikit)
    ]
    try:
        import faiss  # type: ignore[import-not-found] - an extra
    except ImportError:
        print("faiss is not installed: its rows are left out", file=sys.stderr)
        return found
    faiss.omp_set_num_threads(torch.get_num_threads())

    def flat(of: torch.Tensor, among: torch.Tensor, k: int) -> None:
        of, among = (torch.nn.functional.normalize(x, dim=1) for x in (of, among))
        index = faiss.IndexFlatIP(DIM)
        index.add(among.numpy())
        index.search(of.numpy(), k)

    def both_ways() -> None:
        flat(a.features[0], b.features[0], 1)
        flat(b.features[0], a.features[0], 1)

    return [
        *found,
        ("match_mutual: faiss IndexFlatIP both ways", lambda: vf.match_mutual(a, b), both_ways),
        ("top_k(10): faiss IndexFlatIP", lambda: top_k(a, b, 10), lambda: flat(a.features[0], b.features[0], 10)),
    ]


def _memory(side: int, chunk: int | None, number: int) -> Row:
    """Return the row of the memory of one chunk, measured in a new process."""
    command = [sys.executable, __file__, "--memory", str(chunk or 0), "--threads", str(number)]
    ran = subprocess.run(command + ["--fast"] * (side != SIDE), capture_output=True, text=True, check=True)
    tokens = side * side
    if chunk is None:
        from vitfeats.similarity import rows_at_a_time

        chunk = min(tokens, rows_at_a_time(torch.empty(tokens, DIM)))
    block = min(chunk, tokens) * tokens * 4 / MB
    what = f"match_mutual, chunk {chunk}: memory beyond the inputs / (block + 20 MB)"
    ours, allowed = float(ran.stdout), block + 20
    return Row(what, f"{ours / allowed:.2f}", "≤ 1", f"{ours:.1f} MB", f"{allowed:.1f} MB")


if __name__ == "__main__":
    main()
