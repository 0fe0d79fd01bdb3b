"""Convolutional networks: names, maps, geometry, hypercolumns; against timm, torchvision and naive formulas."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import vitfeats as vf
from vitfeats import testing
from vitfeats.extractors.conv import ConvExtractor

STAGED = ("resnet18", "convnext_atto", "efficientnet_b0", "regnety_002", "swin_tiny_patch4_window7_224", "pvt_v2_b0")


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vgg() -> vf.Extractor:
    return vf.load_extractor(_network("vgg19"), size=(48, 80))


@pytest.fixture(scope="module")
def resnet() -> vf.Extractor:
    return vf.load_extractor(_network("resnet18"), size=(96, 160))


@pytest.mark.parametrize("name", STAGED)
def test_stages_equal_timms_own(name):
    network = _network(name)
    extractor = vf.load_extractor(network)
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = network.forward_intermediates(extractor.preprocess(image).pixels, intermediates_only=True)
    layers = extractor.card.layers
    found = extractor(image, [f"out@{layer}" for layer in layers])
    assert len(layers) == len(expected)
    for layer, wanted in zip(layers, expected, strict=True):
        d = found[f"out@{layer}"]
        assert torch.equal(d.map, wanted), layer
        assert d.grid.network_size == (224, 224)


def test_relus_of_a_vgg_have_the_names_of_the_papers(vgg):
    blocks = {
        f"relu{block}_{number}" for block, count in enumerate((2, 2, 4, 4, 4), 1) for number in range(1, count + 1)
    }
    assert set(vgg.card.layers) == blocks
    image = torch.rand(1, 3, 48, 80)
    names = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    found = vgg(image, [f"out@{name}" for name in names])
    seen = vgg.preprocess(image).pixels
    ends = {1: "relu1_1", 6: "relu2_1", 11: "relu3_1", 20: "relu4_1", 29: "relu5_1"}  # index in vgg19's features
    for index, module in enumerate(vgg.model.features):
        seen = module(seen)
        if index in ends:
            assert torch.equal(found[f"out@{ends[index]}"].map, seen)
    strides = [found[f"out@{name}"].grid.stride for name in names]
    assert strides == [1, 2, 4, 8, 16]
    assert all(found[f"out@{name}"].grid.shift == 0 for name in names)


def test_torchvisions_vgg_has_the_same_names():
    network = torchvision.models.vgg19().eval()
    card = vf.list_models("vgg19")[0]
    extractor = vf.load_extractor(network, card=card, size=(48, 80))
    image = torch.rand(1, 3, 48, 80)
    with torch.no_grad():
        expected = network.features[:21](extractor.preprocess(image).pixels)
    assert torch.equal(extractor(image, "out@relu4_1").map, expected)


def test_layers_are_counted_too_and_refused_by_name(vgg):
    image = torch.rand(1, 3, 48, 80)
    assert str(vgg(image, "out@-1").tap) == "out@relu5_4"
    assert str(vgg(image).tap) == "out@relu4_1"
    with pytest.raises(vf.TapError, match=r"a layer of VGG, got 'relu4_9'. Did you mean 'relu4_"):
        vgg(image, "out@relu4_9")
    with pytest.raises(vf.TapError, match=r"a layer of VGG, got 'relu9_9'"):
        vgg(image, "out@relu1_1+relu9_9")
    with pytest.raises(vf.TapError, match="a layer from 0 to 15"):
        vgg(image, "out@16")
    with pytest.raises(vf.TapError, match="only diffusion models have steps"):
        vgg(image, "out@relu1_1#3")
    with pytest.raises(vf.UnknownFacetError, match=r"a facet that VGG has, got 'key'.* try 'out@relu4_1'"):
        vgg(image, "key@3")
    with pytest.raises(vf.UnknownFacetError, match=r"a model with attention over tokens, got VGG \(ConvExtractor\)"):
        vgg.attention(image, 0)


def test_a_stride_is_refused_at_once_and_after_resizing(vgg):
    with pytest.raises(vf.ConfigError, match="expected no stride for VGG, got 8: its layers have strides of their own"):
        vf.load_extractor(vgg.model, stride=8)
    with pytest.raises(vf.ConfigError, match="expected no stride for VGG"):
        vgg.resized(stride=4)(torch.rand(3, 48, 80))
    assert not vgg.overlaps


def test_settings_of_transformers_are_refused(vgg):
    with pytest.raises(vf.ConfigError, match="settings that VGG knows, got norm=True"):
        vf.load_extractor(vgg.model, norm=True)


def _measured(network: nn.Module, size: tuple[int, int], row: int, col: int) -> tuple[float, float]:
    """Return the (x, y) middle of the pixels that move one cell: an independent measure, by the gradient."""
    network = network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False).fill_(0.01)  # no cancellation: every pixel of the field counts
    for module in network.modules():
        if isinstance(module, nn.MaxPool2d):  # hands its gradient to one pixel of its window; its mean is to all
            module.forward = lambda x, m=module: F.avg_pool2d(x, m.kernel_size, m.stride, m.padding)
    image = torch.rand(1, 3, *size, requires_grad=True)
    network(image)[0, :, row, col].sum().backward()
    rows, cols = (image.grad[0].abs().sum(0).sum(axis).nonzero().flatten() for axis in (1, 0))
    assert rows[0] > 0
    assert cols[-1] < size[1] - 1, "the field is cut off by the border: choose another cell"
    return (float(cols[0] + cols[-1]) + 1) / 2, (float(rows[0] + rows[-1]) + 1) / 2


def _conv(*settings, **more) -> nn.Module:
    return nn.Conv2d(3, 3, *settings, **more)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([_conv(4, 4)], 0.0),
        ([_conv(3, 2, 1)], -0.5),
        ([_conv(7, 2, 3), nn.MaxPool2d(3, 2, 1)], -1.5),
        ([_conv(3, 2, 1), _conv(3, 2, 2, dilation=2)], -1.5),
        ([_conv(3, 1, 1), nn.AvgPool2d(2, 2)], 0.0),
        ([nn.ZeroPad2d(1), _conv(3, 2)], -0.5),
        ([nn.ZeroPad2d((0, 1, 0, 1)), _conv(3, 2)], 0.5),  # uneven, as TensorFlow pads
        ([nn.ReflectionPad2d(1), _conv(3, 2)], -0.5),
        ([_conv(3, 2, 1, padding_mode="replicate")], -0.5),
        ([nn.ZeroPad2d((1, 2, 1, 2)), _conv(4), nn.AvgPool2d(2, 2)], 0.5),
        ([_conv(3, 2, 1), _conv(3, 2, 1), nn.Upsample(scale_factor=2)], -1.5),
        ([_conv(3, 2, 1), _conv(3, 2, 1), nn.ConvTranspose2d(3, 3, 2, 2)], -1.5),
        ([nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 3, 2, 1)], -1.0),
        ([_conv((4, 3), 2, 1)], (0.0, -0.5)),
    ],
)
def test_the_middle_of_a_receptive_field_is_where_the_geometry_says(modules, expected):
    network = nn.Sequential()
    for index, module in enumerate(modules):
        network.add_module(f"m{index}", module)
    last = f"m{len(modules) - 1}"
    extractor = vf.load_extractor(network.eval(), card=_card(last), size=(96, 128))
    d = extractor(torch.rand(3, 96, 128), f"out@{last}")
    assert d.grid.shift == expected
    row, col = d.grid.rows // 2, d.grid.cols // 2
    measured = _measured(network, (96, 128), row, col)
    # Cells that are made of cells twice as wide look half a cell to either side in turns; their grid is the mean.
    tolerance = 1.0 if isinstance(modules[-1], nn.Upsample | nn.ConvTranspose2d) else 0.0
    assert d.grid.centres()[row * d.grid.cols + col].tolist() == pytest.approx(list(measured), abs=tolerance)


def test_a_resnet_is_measured_as_a_whole(resnet):
    network = nn.Sequential(_network("resnet18").conv1, nn.MaxPool2d(3, 2, 1), nn.Conv2d(64, 8, 3, 2, 1))
    measured = _measured(network, (96, 160), 5, 9)
    d = resnet(torch.rand(3, 96, 160), "out@layer2")
    assert tuple(d.grid.centres()[5 * d.grid.cols + 9].tolist()) == measured


def test_a_shift_of_two_numbers_comes_back_from_a_file(tmp_path):
    network = nn.Sequential()
    network.add_module("conv", _conv((4, 3), 2, 1))
    d = vf.load_extractor(network.eval(), card=_card("conv"), size=(32, 48))(torch.rand(3, 32, 48))
    assert vf.Descriptor.load(d.save(tmp_path / "d.safetensors")).grid == d.grid


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        ("resnet18", [-0.5, -1.5, -3.5, -7.5, -15.5]),
        ("resnetblur18", [-0.5, -1.5, -3.5, -7.5, -15.5]),
        ("convnext_atto", [0.0, 0.0, 0.0, 0.0]),
        ("pvt_v2_b0", [-1.5, -3.5, -7.5, -15.5]),
        ("tf_efficientnet_b0", [0.5, 1.5, 3.5, 7.5, 15.5]),
    ],
)
def test_shifts_of_whole_networks(name, shifts):
    extractor = vf.load_extractor(_network(name), size=(64, 96))
    found = extractor(torch.rand(3, 64, 96), [f"out@{layer}" for layer in extractor.card.layers])
    assert [d.grid.shift for d in found.values()] == pytest.approx(shifts)


def test_branches_that_look_elsewhere_count_by_their_mean():
    """The shortcut of a ResNet-D pools tiles of 2×2, its main path looks around the first pixel of each."""
    extractor = vf.load_extractor(_network("resnet18d"), size=(64, 96))
    main, shortcut = -3.5, -1.5 + 2.0 - 2.0  # stride 8, from −1.5 at stride 4
    shift = extractor(torch.rand(3, 64, 96), "out@layer2").grid.shift
    assert min(main, shortcut) < shift < max(main, shortcut) + 2.0


def test_hypercolumns_are_stages_at_the_centres_of_the_finest(resnet):
    image = torch.rand(2, 3, 96, 160)
    joined = resnet(image, "out@layer2+layer4")
    alone = resnet(image, ["out@layer2", "out@layer4"])
    fine, coarse = alone["out@layer2"], alone["out@layer4"]
    assert joined.grid == fine.grid
    assert joined.dim == fine.dim + coarse.dim
    assert torch.equal(joined.features[..., : fine.dim], fine.features)
    # Cell i of layer2 looks at pixel 8·i + 0.5, cell j of layer4 at 32·j + 0.5: at every fourth they meet.
    met = joined.map[:, fine.dim :, ::4, ::4]
    torch.testing.assert_close(met, coarse.map)
    between = joined.map[:, fine.dim :, 0, 2]  # half way between two cells
    torch.testing.assert_close(between, (coarse.map[:, :, 0, 0] + coarse.map[:, :, 0, 1]) / 2)
    swapped = resnet(image, "out@layer4+layer2")
    torch.testing.assert_close(swapped.features[..., : coarse.dim], joined.features[..., fine.dim :])
    assert str(joined.tap) == "out@layer2+layer4"


def test_the_pass_ends_at_the_deepest_layer(vgg):
    ran = []
    handles = [module.register_forward_hook(lambda m, *_: ran.append(m)) for module in vgg.model.features]
    vgg(torch.rand(3, 48, 80), ["out@relu1_1", "out@relu2_1"])
    for handle in handles:
        handle.remove()
    assert len(ran) <= 7  # up to relu2_1, the seventh module


class _Own(nn.Module):
    """Somebody's own network: layers are named by their module paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.tail = nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.body(self.first(x)))


def _card(*layers: str) -> vf.ModelCard:
    return vf.ModelCard(
        "own", "Own", "module", 8, len(layers), 16, None, 0, False, default_tap=f"out@{layers[0]}", layers=layers
    )


def test_an_own_module_by_the_paths_of_its_layers():
    network = _Own().eval()
    extractor = vf.load_extractor(network, card=_card("body.2", "first"), size=(32, 48))
    image = torch.rand(1, 3, 32, 48)
    assert isinstance(extractor, ConvExtractor)
    d = extractor(image)
    x = extractor.preprocess(image).pixels
    assert torch.equal(d.map, F.relu(network.body[1](F.relu(network.first(x)))))
    assert (d.grid.stride, d.grid.shift) == (8, 2.0 - 4.0)  # cell 0 looks around cell 0 of `first`, a tile of 4
    testing.conformance(lambda **s: vf.load_extractor(network, card=_card("body.2", "first"), **s)).raise_for_failures()


def test_layers_that_are_not_there_and_outputs_that_are_no_maps():
    with pytest.raises(vf.ConfigError, match=r"layers that own has, got 'neck': expected a module at 'neck' of _Own"):
        vf.load_extractor(_Own().eval(), card=_card("neck"))
    flat = vf.load_extractor(_Own().eval(), card=_card("tail"))
    with pytest.raises(vf.TapError, match=r"layer 'tail' to give a map \(batch, channels, rows, cols\), got \(1, "):
        flat(torch.rand(3, 32, 48), "out@tail")


def test_a_map_that_does_not_tile_the_image():
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 4, 3, 2))  # without padding: 15 of 32
    with pytest.raises(vf.TapError, match=r"map of layer 'conv' to tile the network image of \(32, 32\) .*, got 15×15"):
        vf.load_extractor(network.eval(), card=_card("conv"), size=32)(torch.rand(3, 32, 32))
