"""Saliency: the mean over heads, stretched."""

import pytest
import torch
from synthetic import describe

from vitfeats.attention_maps import saliency
from vitfeats.errors import ShapeError, UnknownFacetError


def looks(batch: int = 2, heads: int = 4):
    features = torch.rand(batch, 6, heads, generator=torch.Generator().manual_seed(0))
    return describe(features, 2, 3, tap="attention@11")


@pytest.mark.parametrize("heads", [None, (0, 2), (3,), [-1, 1], range(4)])
def test_it_is_the_mean_of_the_heads_stretched_for_each_image(heads):
    d = looks()
    found = saliency(d, heads)
    assert found.shape == (2, 2, 3)
    for image in range(2):
        mean = sum(d.features[image, :, head] for head in (heads or range(4))) / len(heads or range(4))
        expected = (mean - mean.min()) / (mean.max() - mean.min())
        assert torch.allclose(found[image].flatten(), expected, atol=1e-6)
        assert (found[image].min(), found[image].max()) == (0, 1)


def test_heads_matter():
    assert not torch.allclose(saliency(looks(), (0,)), saliency(looks(), (1,)))


def test_attention_that_is_everywhere_the_same_is_zero():
    assert torch.equal(saliency(describe(torch.full((1, 6, 2), 0.1), 2, 3, tap="attention@1")), torch.zeros(1, 2, 3))


def test_moving_tokens_moves_the_map():
    d = looks()
    rolled = d.features.unflatten(1, (2, 3)).roll(1, 2).flatten(1, 2)
    assert torch.equal(saliency(describe(rolled, 2, 3, tap="attention@11")), saliency(d).roll(1, 2))


def test_other_facets_are_refused():
    with pytest.raises(
        UnknownFacetError, match="expected a descriptor of the facet 'attention', got 'key@1'; extract 'attention@11'"
    ):
        saliency(describe(torch.zeros(1, 6, 4), 2, 3))


@pytest.mark.parametrize("heads", [(4,), (0, -5), ()])
def test_heads_that_there_are_not_are_refused(heads):
    with pytest.raises(ShapeError, match="expected heads from 0 to 3 of synthetic, got "):
        saliency(looks(), heads)
