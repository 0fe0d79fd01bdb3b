"""Every row of the catalogue, with the conformance suite that third parties use, on a small network of its build."""

import pytest
from families import shrunk

import vitfeats as vf
from vitfeats import testing

pytestmark = pytest.mark.usefixtures("as_a_user")  # type checks would make this suite seven times as long

CARDS = [card for card in vf.list_models() if card.source.startswith("timm:")]
# One of each build of a large convolutional network; the rows beside them differ in depth alone.
SAMPLED = {card.name for card in CARDS} - {"vgg16", "resnet50", "resnet101", "dinov3_convnexts", "dinov3_convnextb"}
ONE_PASS = ("shapes", "geometry", "model_is_left_alone", "unknown_layers")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_card_conforms(card):
    network, small = shrunk(card)
    report = testing.conformance(
        lambda **settings: vf.load_extractor(network, card=small, **settings),
        testing.CHECKS if card.name in SAMPLED else ONE_PASS,
    )
    report.raise_for_failures()
    assert set(report.missing) <= {"cls", "attention", "residual"} or card.layers
    assert testing.Tap.parse(card.usual_tap).facet in {outcome.tap.facet for outcome in report.outcomes}


def test_mini_conforms():
    mini = vf.load_extractor("mini", device="cpu")
    report = testing.conformance(lambda **settings: vf.load_extractor(mini.model, card=mini.card, **settings))
    report.raise_for_failures()
    assert set(report.missing) == {"residual"}


def test_vgg_mini_conforms():
    vgg = vf.load_extractor("vgg_mini", device="cpu")
    report = testing.conformance(lambda **settings: vf.load_extractor(vgg.model, card=vgg.card, **settings))
    report.raise_for_failures()


def test_the_catalogue_is_wide():
    cards = vf.list_models()
    assert len(cards) >= 40
    assert all(card.licence != "unknown" and card.paper for card in cards)
    assert len({card.name for card in cards}) == len(cards)
