"""Import time of the package and start of the command line, as whole processes, less that of the bare interpreter.

python benchmarks/import_time.py
"""

import shutil
import statistics
import subprocess
import sys
import time


def main() -> None:
    """Print the medians and what was imported."""
    bare = _median([sys.executable, "-c", "pass"])
    package = _median([sys.executable, "-c", "import vitfeats"])
    torch = _median([sys.executable, "-c", "import torch"], runs=3)
    script = shutil.which("vitfeats") or "vitfeats"
    command = _median([script, "--help"])
    found = subprocess.run(
        [sys.executable, "-c", "import sys, vitfeats; print('torch' in sys.modules)"], capture_output=True, text=True
    ).stdout.strip()
    print(f"bare interpreter          {bare:.3f} s")
    print(f"import vitfeats           {package - bare:.3f} s more ({package:.3f} s in all); torch loaded: {found}")
    print(
        f"import torch, the peer    {torch - bare:.3f} s more; ratio {(torch - bare) / max(package - bare, 1e-3):.0f}"
    )
    print(f"vitfeats --help           {command:.3f} s in all")


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
