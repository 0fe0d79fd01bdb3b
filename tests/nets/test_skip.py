"""The hourglass: its published size, its forward pass written out naively, its weights, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfeats.errors import ConfigError, ShapeError
from vitfeats.nets.skip import SkipNet, _Norm, initialise

SMALL = (4, 6, 8)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _net(*args, seed: int = 0, **settings) -> SkipNet:
    return SkipNet(*args, **{"channels": SMALL, "generator": _rng(seed), **settings})


def _noticed(net: SkipNet) -> SkipNet:
    """Return a net whose every parameter is large enough that a mistake in its use shows."""
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=_rng(index)) * 0.3 + (parameter.dim() == 1))
    return net


# The published network, layer by layer -------------------------------------------------------------------------------


def _bn(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), keepdim=True, correction=0)
    weight, bias = norm.weight[None, :, None, None], norm.bias[None, :, None, None]
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def _conv(x: Tensor, conv: nn.Conv2d, stride: int = 1, padding: str = "constant") -> Tensor:
    border = conv.weight.shape[-1] // 2
    return F.conv2d(F.pad(x, [border] * 4, mode=padding), conv.weight, conv.bias, stride=stride)


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def _naive(net: SkipNet, image: Tensor, padding: str = "constant") -> Tensor:
    def scale(module, x: Tensor) -> Tensor:
        deep = _leaky(_bn(_conv(x, module.down[0][0], 2, padding), module.down[0][1]))
        deep = _leaky(_bn(_conv(deep, module.down[1][0], 1, padding), module.down[1][1]))
        if module.inside is not None:
            deep = scale(module.inside, deep)
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        parts = [deep]
        if module.beside is not None:
            parts.insert(0, _leaky(_bn(_conv(x, module.beside[0]), module.beside[1])))
        # The published code cuts the middle of the smallest height and width out of each part.
        height, width = (min(part.shape[d] for part in parts) for d in (2, 3))
        height, width = min(height, x.shape[2]), min(width, x.shape[3])
        cut = []
        for part in parts:
            top, left = (part.shape[2] - height) // 2, (part.shape[3] - width) // 2
            cut.append(part[:, :, top : top + height, left : left + width])
        joined = _bn(torch.cat(cut, 1), module.join)
        mixed = _leaky(_bn(_conv(joined, module.mix[0], 1, padding), module.mix[1]))
        return _leaky(_bn(_conv(mixed, module.polish[0]), module.polish[1]))

    made = _conv(scale(net.body, image), net.head)
    return 1 / (1 + torch.exp(-made))


@pytest.mark.parametrize(
    ("settings", "padding"),
    [
        ({}, "constant"),
        ({"kernels": (5, 3, 1), "padding": "reflect"}, "reflect"),
        ({"skip": 0}, "constant"),
        ({"inputs": 5, "outputs": 2}, "constant"),
    ],
)
def test_the_forward_pass_is_the_published_one(settings, padding):
    net = _noticed(_net(**settings)).double()
    for size in ((16, 16), (23, 33), (37, 18)):
        image = torch.rand(1, net.head.out_channels if not settings.get("inputs") else 5, *size, generator=_rng(9))
        image = image.double()
        torch.testing.assert_close(net(image), _naive(net, image, padding), atol=1e-10, rtol=1e-10)


def test_its_gradient_is_that_of_the_published_one():
    net = _noticed(_net()).double()
    image = torch.rand(1, 3, 19, 27, generator=_rng(3)).double()
    wanted = torch.rand(1, 3, 19, 27, generator=_rng(4)).double()
    parameters = list(net.parameters())
    for mine, theirs in zip(
        torch.autograd.grad((net(image) - wanted).square().sum(), parameters),
        torch.autograd.grad((_naive(net, image) - wanted).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7)


def test_it_has_as_many_parameters_as_the_published_ones():
    assert sum(p.numel() for p in SkipNet().parameters()) == 1_037_523
    inversion = SkipNet(32, 3, (16, 32, 64, 128, 128, 128), kernels=(7, 7, 5, 5, 3, 3), padding="reflect")
    assert sum(p.numel() for p in inversion.parameters()) == 2_606_763


def test_it_has_no_state_but_its_parameters_and_one_mode():
    net = _net()
    assert not list(net.buffers())
    image = torch.rand(1, 3, 20, 20)
    assert torch.equal(net.train()(image), net.eval()(image))


@pytest.mark.parametrize("size", [(9, 9), (9, 3), (16, 24), (17, 31), (45, 64)])
@pytest.mark.parametrize("residual", [False, True])
def test_every_size_comes_back_in_0_to_1(size, residual):
    net = _noticed(_net(residual=residual))
    made = net(torch.rand(1, 3, *size))
    assert made.shape == (1, 3, *size)
    assert bool(((made >= 0) & (made <= 1)).all())


def test_residual_begins_at_the_image_itself():
    image = torch.rand(1, 3, 40, 56, generator=_rng(1))
    image[..., :10] = 0.0  # pure black and white have infinite logits
    image[..., -10:] = 1.0
    with torch.no_grad():
        made, anew = (SkipNet(residual=residual, generator=_rng(0))(image) for residual in (True, False))
    assert float((made - image).abs().mean()) < 1 / 255
    assert float((made - image).abs().max()) < 8 / 255
    assert float((anew - image).abs().mean()) > 0.2


def test_residual_adds_to_the_logits():
    image = torch.rand(1, 3, 24, 24) * 0.9 + 0.05
    plain, residual = _noticed(_net()), _noticed(_net(residual=True))
    torch.testing.assert_close(residual(image), (plain(image).logit() + image.logit()).sigmoid(), atol=1e-4, rtol=1e-4)


def test_the_weights_are_the_generators_and_no_other_random_number_is_used():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = _net(seed=1), _net(seed=1), _net(seed=2)
    after = torch.get_rng_state()
    torch.manual_seed(6)
    again = _net(seed=1)
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
        assert torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(before, after)


def test_the_weights_are_drawn_as_published():
    net = SkipNet(generator=_rng(0)).requires_grad_(False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in, fan_out = (
                module.weight[:, 0].numel() * n / module.out_channels for n in module.weight.shape[1::-1]
            )
            expected = 0.02 * (2 / (fan_in + fan_out)) ** 0.5
            if module.weight.numel() > 2000:
                assert float(module.weight.std()) == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert float((module.weight - 1).abs().max()) < 0.02 * 5
            assert float(module.weight.std()) > 0.002
        else:
            continue
        assert not bool(module.bias.any())


def test_any_network_can_be_initialised_so():
    network = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False))
    initialise(network.requires_grad_(False), gain=0.5, generator=_rng(0))
    assert float(network[0].weight.std()) == pytest.approx(0.5 * (2 / 100) ** 0.5, rel=0.1)
    assert not bool(network[0].bias.any())


def test_images_of_a_batch_share_their_statistics():
    net = _noticed(_net())
    images = torch.rand(2, 3, 20, 20)
    assert not torch.allclose(net(images)[0], net(images[:1])[0], atol=1e-4)


def test_one_image_is_normed_as_a_batch_of_one():
    x = torch.randn(1, 6, 20, 31, dtype=torch.float64) * 3 + 1
    norm = _Norm(6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x[:, 2:], slice(2, None)), expected[:, 2:])
    torch.testing.assert_close(norm(torch.cat([x, x])), torch.cat([expected, expected]))


@pytest.mark.usefixtures("as_a_user")
def test_settings_that_make_no_network_are_refused():
    with pytest.raises(
        ConfigError, match=r"at least one scale and one channel each, got inputs=3, outputs=3, channels=\(\)"
    ):
        SkipNet(channels=())
    with pytest.raises(ConfigError, match=r"got inputs=3, outputs=3, channels=\(4, 0\), skip=4"):
        SkipNet(channels=(4, 0))
    with pytest.raises(ConfigError, match="skip=-1"):
        SkipNet(channels=(4,), skip=-1)
    with pytest.raises(ConfigError, match=r"expected one odd kernel for each of 3 scales, got \(3, 5\)"):
        SkipNet(channels=SMALL, kernels=(3, 5))
    with pytest.raises(ConfigError, match=r"expected one odd kernel for each of 3 scales, got \(4, 4, 4\)"):
        SkipNet(channels=SMALL, kernels=4)
    with pytest.raises(ConfigError, match="expected padding 'zeros' or 'reflect', got 'circular'"):
        SkipNet(channels=SMALL, padding="circular")
    with pytest.raises(ConfigError, match="expected as many outputs as inputs for residual, got 3 and 8"):
        SkipNet(8, 3, SMALL, residual=True)


@pytest.mark.usefixtures("as_a_user")
def test_an_image_without_spread_at_the_coarsest_scale_is_refused():
    net = _net()
    assert net.smallest == 9
    with pytest.raises(ShapeError, match=r"a side of at least 9 pixels for 3 scales, got 8×8; enlarge it"):
        net(torch.rand(1, 3, 8, 8))
    assert net(torch.rand(1, 3, 9, 8)).shape == (1, 3, 9, 8)
