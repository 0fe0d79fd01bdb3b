"""Import time of the package and start of the command line, as whole processes, less that of the bare interpreter.

python benchmarks/import_time.py
"""

import shutil
import statistics
import subprocess
import sys
import time

from measuring import Row, milliseconds, show


def main() -> None:
    """Print the medians."""
    show(rows())


def rows() -> list[Row]:
    """Return the times beyond those of the bare interpreter; the peer of both is `import torch`."""
    bare = _median([sys.executable, "-c", "pass"])
    torch = _median([sys.executable, "-c", "import torch"], runs=3) - bare
    package = _median([sys.executable, "-c", "import vitfeats"]) - bare
    command = _median([shutil.which("vitfeats") or "vitfeats", "--help"]) - bare
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, vitfeats; print('torch' in sys.modules)"], capture_output=True, text=True
    ).stdout.strip()
    if loaded != "False":
        raise AssertionError("expected `import vitfeats` without torch")
    return [
        Row(
            f"{what}: import torch / ours",
            f"{torch / max(ours, 1e-3):.0f}",
            bar,
            milliseconds(ours),
            milliseconds(torch),
        )
        for what, ours, bar in (("import vitfeats", package, "none"), ("vitfeats --help", command, "ours ≤ 500 ms"))
    ]


def _median(command: list[str], runs: int = 11) -> float:
    subprocess.run(command, capture_output=True, check=True)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
