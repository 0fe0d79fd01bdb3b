"""Rewrite the generated parts of the documentation: ``python docs/generate.py``.

The table of models in models.md is made from the catalogue and stands between two markers. ``--check`` changes nothing
and exits 1 when the page is stale.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vitfeats.api import list_models
from vitfeats.card import ModelCard

PAGE = Path(__file__).parent / "models.md"
BEGIN = "<!-- models: begin, written by docs/generate.py -->"
END = "<!-- models: end -->"
HEAD = ("name", "patch", "dim", "blocks", "prefix", "size", "positions", "licence")


def models_block(cards: Sequence[ModelCard]) -> str:
    """Return the table of models, and the papers they come from, as Markdown."""
    rows = [HEAD, tuple("---" for _ in HEAD), *map(_cells, cards)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    families: dict[str, list[ModelCard]] = {}
    for card in cards:
        families.setdefault(card.family, []).append(card)
    return "\n\n".join([table, "Where they come from:", "\n".join(_origin(*item) for item in families.items())])


def rewritten(page: str, block: str) -> str:
    """Return the page with what stands between the markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the markers {BEGIN!r} and {END!r} in {PAGE.name}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def main(arguments: Sequence[str] = ()) -> int:
    """Rewrite models.md, or check it; return the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    wanted = rewritten(page, models_block(list_models()))
    if page == wanted:
        return 0
    if "--check" in arguments:
        print(f"{PAGE.name} is stale; run: python docs/generate.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    print(f"rewrote {PAGE.name}")
    return 0


def _cells(card: ModelCard) -> tuple[str, ...]:
    prefix = ["CLS"] * card.has_cls + [f"{card.registers} registers"] * bool(card.registers)
    size = "×".join(map(str, card.default_size)) if isinstance(card.default_size, tuple) else str(card.default_size)
    return (
        f"`{card.name}`",
        str(card.patch),
        str(card.dim),
        str(card.depth),
        ", ".join(prefix) or "none",
        size,
        card.position_rule or "own",
        card.licence,
    )


def _origin(family: str, cards: Sequence[ModelCard]) -> str:
    sources = ", ".join(dict.fromkeys(f"`{card.source}`" for card in cards))
    papers = "; ".join(dict.fromkeys(card.paper for card in cards if card.paper))
    return f"- **{family}**: {papers + ': ' if papers else ''}{sources}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
