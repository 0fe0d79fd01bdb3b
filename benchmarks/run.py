"""Run the benchmarks and write their table into the documentation: ``python benchmarks/run.py``.

Takes about five minutes. The table stands in docs/benchmarks.md between two markers, with the versions and the number
of threads it was measured with.
"""

import platform
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import extraction
import import_time
import log_binning
import matching
import timm
import torch
import transformers
from measuring import HEAD, Row, show

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin, written by benchmarks/run.py -->", "<!-- benchmarks: end -->"


def main() -> None:
    """Measure, print, and rewrite the page."""
    sections = {
        "Extraction (ViT-S/16, 8 images of 224 px, 2 threads)": extraction.rows(),
        "Matching (3025 × 3025 tokens of 384 channels, 1 thread)": matching.rows(),
        "Log-binning (55 × 55 tokens of 384 channels, 1 thread)": log_binning.rows(),
        "Start": import_time.rows(),
    }
    for title, rows in sections.items():
        print(f"\n{title}\n")
        show(rows)
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), sections), encoding="utf-8")
    print(f"\nrewrote {PAGE.name}")


def rewritten(page: str, sections: dict[str, list[Row]]) -> str:
    """Return the page with what stands between the markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the markers {BEGIN!r} and {END!r} in {PAGE.name}")
    about = (
        f"Measured on {date.today()} on two cores of {platform.machine()}, without a GPU: torch "
        f"{torch.__version__.partition('+')[0]}, timm {timm.__version__}, transformers {transformers.__version__}."
    )
    tables = "\n\n".join(f"### {title}\n\n{markdown(rows)}" for title, rows in sections.items())
    return f"{before}{BEGIN}\n\n{about}\n\n{tables}\n\n{END}{after}"


def markdown(rows: Iterable[Row]) -> str:
    """Return rows as a table in Markdown."""
    lines = [HEAD, Row(*("---" for _ in HEAD)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
