"""The conformance suite on diffusion models of every build, in every mode, and on what aggregates them."""

import pytest
from diffusions import adm, ddpm, sd_pipeline, sdxl_pipeline

import vitfeats as vf
from vitfeats import testing
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor, HyperfeatureModel, card_for, layer_channels
from vitfeats.nets.aggregation import AggregationNetwork

pytestmark = pytest.mark.usefixtures("as_a_user")

BUILDS = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "ddpm": ddpm, "adm": adm}
SHORT = DiffusionConfig(mode="inversion", steps=2, keep=2)
NO_FACETS = {"token", "cls", "attention"}


@pytest.mark.parametrize(
    ("build", "diffusion"),
    [
        ("sd", None),
        ("sdxl", None),
        ("ddpm", None),
        ("adm", DiffusionConfig(mode="clean", time=-1)),
        ("ddpm", SHORT),
    ],
    ids=["sd", "sdxl", "ddpm", "adm-clean", "ddpm-inversion"],
)
def test_conforms(build, diffusion):
    model = BUILDS[build]()
    # The tiny SDXL halves its maps so seldom that what its autoencoder of random weights spreads lies outside a cell.
    checks = [check for check in testing.CHECKS if (build, check) != ("sdxl", "tokens_are_in_place")]
    report = testing.conformance(lambda **settings: vf.load_extractor(model, diffusion=diffusion, **settings), checks)
    report.raise_for_failures()
    assert set(report.missing) == NO_FACETS
    chained = diffusion is SHORT
    for check in checks:
        skipped = {o.tap.facet for o in report.outcomes if o.check == check and o.status == "inapplicable"}
        everything = {"residual", "out", "key", "query", "value"}
        never = check in ("overlapping_stride", "whole_attention") or (check == "gradients" and chained)
        assert skipped == (everything if never else set()), check


@pytest.mark.parametrize("diffusion", [None, SHORT], ids=["one-step", "inversion"])
def test_hyperfeatures_conform(diffusion):
    denoiser = vf.load_extractor(ddpm()).model
    steps = (0,) if diffusion is None else diffusion.kept_steps
    network = AggregationNetwork([*layer_channels(denoiser).values()], steps, dim=64, groups=4)
    model = HyperfeatureModel(denoiser, network.requires_grad_(False)).eval()
    card = card_for(vf.load_extractor(denoiser).card, 64)

    def load(size=None, stride=None, dtype="auto"):
        preprocess = vf.load_extractor(denoiser, size=size, stride=stride).preprocess
        return HyperfeatureExtractor(model, card, preprocess, dtype=dtype, diffusion=diffusion)

    report = testing.conformance(load)
    report.raise_for_failures()
    assert {outcome.tap.facet for outcome in report.outcomes} == {"out"}
