"""The small VGG: its layers, and that folding the norms changes nothing."""

import pytest
import torch

import vitfeats as vf
from vitfeats.card import ModelCard
from vitfeats.nets.vgg import SmallVgg


@pytest.fixture
def trained():
    torch.manual_seed(0)
    network = SmallVgg(norm=True)
    for _ in range(2):
        network.train()(2 * torch.randn(4, 3, 32, 32) + 1)
    for name, weight in network.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return network.eval()


def test_layers_have_the_names_and_sizes_of_vgg():
    network = SmallVgg()
    assert network.layers == tuple(
        f"relu{name}" for name in ["1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "4_1", "4_2", "5_1"]
    )
    assert sum(p.numel() for p in network.parameters()) < 3_000_000
    card = ModelCard(
        "small", "vitfeats", "own", 16, 9, 256, None, prefix_tokens=0, has_cls=False, default_tap="out@relu4_1",
        layers=network.layers,
    )  # fmt: skip
    extractor = vf.load_extractor(network.eval(), card=card, size=64)
    images = torch.rand(2, 3, 64, 96)
    for block, (channels, cells) in enumerate([(32, 6144), (64, 1536), (128, 384), (256, 96), (256, 24)], 1):
        assert extractor(images, f"out@relu{block}_1").features.shape == (2, cells, channels)


@torch.no_grad()
def test_folded_norms_change_nothing(trained):
    images = torch.randn(2, 3, 48, 33)
    folded = trained.folded()
    assert not any("norm" in name for name, _ in folded.named_modules())
    torch.testing.assert_close(folded(images), trained(images), rtol=1e-3, atol=1e-4)
    assert torch.equal(folded.forward_features(images), folded(images))
    with pytest.raises(KeyError, match="norm1_1"):
        folded.folded()


@torch.no_grad()
def test_edges_are_mirrored():
    """With zeros beside the image, a plain one would not stay plain."""
    found = SmallVgg()(torch.full((1, 3, 64, 64), 0.7))
    torch.testing.assert_close(found, found[:, :, :1, :1].expand_as(found), rtol=1e-4, atol=1e-5)


def test_the_bundled_network_has_these_layers():
    bundled = vf.load_extractor("vgg_mini", device="cpu")
    assert bundled.card.layers == SmallVgg().layers
    assert bundled.card.depth == len(bundled.card.layers)
