"""The small VGG: its layers, and that folding the norms changes nothing; the published one: its layers and weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitfeats as vf
from vitfeats.card import ModelCard
from vitfeats.errors import ConfigError, WeightsUnavailableError
from vitfeats.models.conv import relus
from vitfeats.nets.vgg import NormalisedVgg, SmallVgg


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


# The published VGG-19 of style transfer -------------------------------------------------------------------------------

ENDS = {4: "relu1_1", 11: "relu2_1", 18: "relu3_1", 31: "relu4_1", 44: "relu5_1"}  # children up to which


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Weights in the published layout, random, but of a size that keeps the scale of the features."""
    rng, state, index = torch.Generator().manual_seed(0), {}, 0
    for before, after, side in [
        (3, 3, 1), (3, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (128, 256, 3), *[(256, 256, 3)] * 3,
        (256, 512, 3), *[(512, 512, 3)] * 7,
    ]:  # fmt: skip
        state[f"{index}.weight"] = (
            torch.randn(after, before, side, side, generator=rng) * (2 / (before * side**2)) ** 0.5
        )
        state[f"{index}.bias"] = 0.1 * torch.randn(after, generator=rng)
        # Behind a convolution stand its activation and the padding of the next; behind a block's last, a pooling too.
        index += {0: 2, 5: 4, 12: 4, 25: 4, 38: 4}.get(index, 3)
    assert len(state) == 34
    return state


@torch.no_grad()
def _computed(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the maps at ENDS by a walk over the published numbers."""
    found = {}
    for index in range(53):
        if f"{index}.weight" in state:
            x = F.conv2d(x, state[f"{index}.weight"], state[f"{index}.bias"])
        elif index in (7, 14, 27, 40):
            x = F.max_pool2d(x, 2, ceil_mode=True)
        elif f"{index - 1}.weight" in state and index > 1:
            x = x.relu()
        else:
            x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        if index + 1 in ENDS:
            found[ENDS[index + 1]] = x
    return found


def test_the_published_vgg_has_53_layers_in_order():
    with torch.device("meta"):
        network = NormalisedVgg()
    names = [name for name, _ in network.named_children()]
    assert len(names) == 53
    assert {end: names[end - 1] for end in ENDS} == ENDS
    assert tuple(name for name in names if name.startswith("relu")) == relus(2, 2, 4, 4, 4)
    assert isinstance(network[0], nn.Conv2d)
    assert network[0].kernel_size == (1, 1)


def test_the_published_file_is_read_by_the_names_of_the_papers(published, tmp_path):
    torch.save(published, tmp_path / "vgg_normalised.pth")
    extractor = vf.load_extractor(
        "vgg_normalised", checkpoint=tmp_path / "vgg_normalised.pth", size=(48, 64), device="cpu"
    )
    image = torch.rand(1, 3, 48, 64)
    found = extractor(image, [f"out@{name}" for name in ENDS.values()])
    wanted = _computed(published, image)  # in 0..1 as it is: no mean, no deviation
    for name, values in wanted.items():
        torch.testing.assert_close(found[f"out@{name}"].map, values, rtol=1e-3, atol=1e-4)
    assert extractor(image).features.shape == (1, 48, 512)  # relu4_1, unless something else is asked for


@torch.no_grad()
def test_odd_sides_are_halved_upwards(published):
    network = NormalisedVgg()
    network.load_state_dict(network.named_as_here(published))
    image = torch.rand(1, 3, 33, 47)
    seen, index = image, 0
    for index, layer in enumerate(network):
        seen = layer(seen)
        if index + 1 == 44:
            break
    assert seen.shape == (1, 512, 3, 3)
    torch.testing.assert_close(seen, _computed(published, image)["relu5_1"], rtol=1e-3, atol=1e-4)


def test_the_published_vgg_needs_its_file(published, tmp_path):
    with pytest.raises(
        WeightsUnavailableError, match=r"'vgg_normalised\.pth' .*no hub has; pass checkpoint='vgg_norm.*'vgg_mini'"
    ):
        vf.load_extractor("vgg_normalised")
    state = {name: value for name, value in published.items() if name != "29.bias"}
    torch.save({**state, "99.weight": torch.zeros(1)}, tmp_path / "cut.pth")
    with pytest.raises(ConfigError, match=r"1 missing \(conv4_1\.bias\); 1 unexpected \(99\.weight\)"):
        vf.load_extractor("vgg_normalised", checkpoint=tmp_path / "cut.pth")
