"""The conformance suite over every family, as a table of family × facet: ``python benchmarks/conformance.py``.

Each cell says how many checks passed of those that apply. Writes the table into docs/conformance.md, between markers,
with the reasons of facets that a family does not have and of checks that do not apply. Takes about four minutes.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn

import vitfeats as vf
from vitfeats import testing
from vitfeats.taps import FACETS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "conformance.md"
BEGIN, END = "<!-- conformance: begin, written by benchmarks/conformance.py -->", "<!-- conformance: end -->"
CONVOLUTIONS = (
    "vgg19",
    "resnet18",
    "resnet18d",
    "convnext_atto",
    "efficientnet_b0",
    "regnety_002",
    "densenet121",
    "mobilenetv3_small_100",
    "pvt_v2_b0",
    "swin_tiny_patch4_window7_224",
)


def main() -> None:
    """Run the suite, print the table, and rewrite the page."""
    torch.set_num_threads(1)
    reports = [(name, testing.conformance(load)) for name, load in sorted(loads().items())]
    reports.append(("mini", testing.conformance(_of(vf.load_extractor("mini", device="cpu").model))))
    text = table(reports)
    print(text)
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"expected the markers {BEGIN!r} and {END!r} in {PAGE.name}")
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    for _, report in reports:
        report.raise_for_failures()


def loads() -> dict[str, testing.Load]:
    """Return a loader of a small, untrained network of each family."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES, build  # type: ignore[import-not-found] - of the tests

    found: dict[str, testing.Load] = {family: _of(build(family)) for family in FAMILIES}
    for name in CONVOLUTIONS:
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)
        found[f"timm-{name}"] = _of(network)
    import diffusions  # type: ignore[import-not-found] - of the tests

    for name in ("sd_pipeline", "ddpm", "adm"):
        made = getattr(diffusions, name)()
        found[f"diffusers-{name.partition('_')[0]}"] = _of(vf.load_extractor(made).model)
    return found


def _of(network: nn.Module) -> Callable[..., vf.Extractor]:
    return lambda **settings: vf.load_extractor(network, **settings)


def table(reports: list[tuple[str, testing.Report]]) -> str:
    """Return the table and its reasons, in Markdown."""
    lines = [f"| family | {' | '.join(FACETS)} |", f"| --- |{' --- |' * len(FACETS)}"]
    reasons: dict[str, list[str]] = {}
    for family, report in reports:
        cells = ["–" if facet in report.missing else "{} of {}".format(*report.counts(facet)) for facet in FACETS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
        for reason in _reasons(report):
            reasons.setdefault(reason, []).append(family)
    passed = sum(outcome.status == "passed" for _, report in reports for outcome in report.outcomes)
    failed = sum(len(report.failures) for _, report in reports)
    counted = f"{len(reports)} families, {passed} checks passed, {failed} failed; {len(vf.list_models())} named models."
    why = [f"- {reason}: {', '.join(families)}" for reason, families in reasons.items()]
    return "\n".join([counted, "", *lines, "", "What is missing, and why:", "", *why])


def _reasons(report: testing.Report) -> list[str]:
    """Return why facets are missing and checks do not apply, without the name of the model in it."""
    without: dict[str, list[str]] = {}
    for facet, reason in report.missing.items():
        plain = _plain(reason, report.model).replace(f", got '{facet}'", "")
        without.setdefault(plain, []).append(f"`{facet}`")
    found = [f"no {', '.join(facets)}: {reason}" for reason, facets in without.items()]
    left_out = {
        f"no {outcome.check.replace('_', ' ')}: {_plain(outcome.reason, report.model)}"
        for outcome in report.outcomes
        if outcome.status == "inapplicable" and "`" not in outcome.reason and outcome.tap.facet not in ("cls",)
        if outcome.check != "whole_attention"
    }
    return found + sorted(left_out)


def _plain(reason: str, model: str) -> str:
    """Return what was expected and got, without the model's name and what to try instead."""
    return reason.replace(model, "this model").partition("; ")[0]


if __name__ == "__main__":
    main()
