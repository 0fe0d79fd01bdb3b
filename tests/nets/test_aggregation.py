"""The aggregation network: its published layout and formula, streaming, checkpoints, its loss, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusions import published_aggregation
from torch import Tensor, nn

from vitfeats.errors import ConfigError, ShapeError
from vitfeats.nets.aggregation import AggregationNetwork, contrastive_loss

DIMS = (24, 16, 32, 5)  # the second is the result's own: its shortcut is the identity
STEPS = (49, 25, 0)
SIZES = ((3, 4), (6, 8), (12, 16), (5, 20))  # smaller, as large, larger, and one of each
SIZE = (6, 8)
SMALL = {"dim": 16, "groups": 2}
DIMS_OF_SD = (1280,) * 6 + (640,) * 3 + (320,) * 3  # the residual blocks on the way up of Stable Diffusion 1.5
NAMES = ("up0.res0", "up1.res1", "up2.res0", "up3.res2")


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _net(dims=DIMS, steps=STEPS, *, seed: int = 0, **settings) -> AggregationNetwork:
    return AggregationNetwork(dims, steps, **{**SMALL, "generator": _rng(seed), **settings})


def _published(dims=DIMS, steps: int = len(STEPS), dim: int = 16, seed: int = 0) -> dict[str, Tensor]:
    return published_aggregation(dims, steps, dim, seed)


def _filled(**settings) -> AggregationNetwork:
    net = _net(**settings)
    net.load_state_dict(_published(net.dims, len(net.steps), net.dim))
    return net


def _maps(net: AggregationNetwork, batch: int = 2, seed: int = 1, sizes=SIZES) -> list[list[Tensor]]:
    generator, precision = _rng(seed), net.mixing_weights.dtype
    return [
        [
            torch.randn(batch, channels, *size, generator=generator).to(precision)
            for channels, size in zip(net.dims, sizes, strict=True)
        ]
        for _ in net.steps
    ]


# The published network, written out ----------------------------------------------------------------------------------


def _naive_bottleneck(weights: dict[str, Tensor], layer: int, x: Tensor, groups: int) -> Tensor:
    def normed(part: str, x: Tensor, padding: int = 0) -> Tensor:
        key = f"bottleneck_layers.{layer}.0.{part}"
        x = F.conv2d(x, weights[f"{key}.weight"], padding=padding)
        return F.group_norm(x, groups, weights[f"{key}.norm.weight"], weights[f"{key}.norm.bias"])

    deep = normed("conv2", normed("conv1", x).relu(), padding=1).relu()
    beside = normed("shortcut", x) if f"bottleneck_layers.{layer}.0.shortcut.weight" in weights else x
    return (normed("conv3", deep) + beside).relu()


def _interpolated(map: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    return F.interpolate(map, size=size, mode="bilinear", align_corners=False)


def _naive(weights: dict[str, Tensor], maps: list[list[Tensor]], groups: int = 2) -> Tensor:
    shares = weights["mixing_weights"].exp() / weights["mixing_weights"].exp().sum()
    every = [(layer, map) for row in maps for layer, map in enumerate(row)]
    parts = [_naive_bottleneck(weights, layer, _interpolated(map), groups) for layer, map in every]
    return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_published_layout_gives_the_published_result(precision, tolerance):
    net = _filled().to(precision)
    weights = {key: value.to(precision) for key, value in _published().items()}
    maps = _maps(net)
    with torch.no_grad():
        torch.testing.assert_close(net(maps, SIZE), _naive(weights, maps), atol=tolerance, rtol=tolerance)
        for layer, map in enumerate(maps[0]):
            expected = _naive_bottleneck(weights, layer, _interpolated(map), 2)
            torch.testing.assert_close(net.reduce(layer, map, SIZE), expected, atol=tolerance, rtol=tolerance)


def test_the_gradient_is_that_of_the_published_one():
    net = _filled().double()
    maps = _maps(net)
    for row in maps:
        for map in row:
            map.requires_grad_(True)
    weights = dict(net.named_parameters())
    assert set(weights) == set(_published())
    wanted = [*weights.values(), *(map for row in maps for map in row)]
    mine = torch.autograd.grad(net(maps, SIZE).square().sum(), wanted)
    theirs = torch.autograd.grad(_naive(weights, maps).square().sum(), wanted)
    for one, other in zip(mine, theirs, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_it_has_the_names_shapes_and_number_of_parameters_of_the_published_one():
    with torch.device("meta"):
        net = AggregationNetwork(DIMS_OF_SD, range(50, -1, -5))
    published = _published(DIMS_OF_SD, 11, 384)
    assert {key: value.shape for key, value in net.state_dict().items()} == {k: v.shape for k, v in published.items()}
    # Each layer of 1280 channels, of 640 and of 320, and a weight for each of 11 steps and 12 layers.
    assert sum(p.numel() for p in net.parameters()) == 6 * 736_128 + 3 * 428_928 + 3 * 275_328 + 132 == 6_529_668
    assert not any("shortcut" in key for key in _net((16,)).state_dict())


def test_a_norm_sees_what_was_interpolated():
    """Which is the reason why norms stay behind the interpolation: in front of it they would give something else."""
    net = _filled().double()
    (map, *_), *_ = _maps(net)
    conv1 = net.bottleneck_layers[0][0].conv1
    with torch.no_grad():
        torch.testing.assert_close(conv1(_interpolated(map)), _interpolated(conv1(map)), atol=1e-12, rtol=1e-12)
        behind, before = conv1.norm(_interpolated(conv1(map))), _interpolated(conv1.norm(conv1(map)))
    assert not torch.allclose(behind, before, atol=1e-2)


def test_small_maps_are_reduced_before_they_are_enlarged_and_large_ones_after(monkeypatch):
    net, resized = _filled(), []
    plain = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, **how: resized.append(x.shape[1:]) or plain(x, **how))
    for layer, map in enumerate(_maps(net)[0]):
        net.reduce(layer, map, SIZE)
    # 24 channels of 3 × 4 as 4 and 16 channels; none of 6 × 8; 32 of 12 × 16 and 5 of 5 × 20 themselves.
    assert resized == [(4, 3, 4), (16, 3, 4), (32, 12, 16), (5, 5, 20)]


@pytest.mark.parametrize("at", ["output", "own"])
def test_streaming_is_the_sum_of_all(at):
    net = _filled(at=at)
    maps = _maps(net)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            total = None
            for step, row in enumerate(maps):
                for layer, map in enumerate(row):
                    total = net.add(total, step, layer, map, SIZE)
            assert torch.equal(total, net(maps, SIZE))
            # The order is the caller's: a model makes its noisiest map first.
            other = None
            for step in reversed(range(len(maps))):
                for layer in reversed(range(len(net.dims))):
                    other = net.add(other, step, layer, maps[step][layer], SIZE)
            torch.testing.assert_close(other, total)


def test_a_sum_without_gradient_is_made_in_place():
    net = _filled()
    first, second, *_ = _maps(net)[0]
    with torch.no_grad():
        total = net.add(None, 0, 0, first, SIZE)
        before = total.clone()
        again = net.add(total, 0, 1, second, SIZE)
        assert again is total
        torch.testing.assert_close(total - before, net.mixing[0, 1] * net.reduce(1, second, SIZE))
    net.requires_grad_(False)
    assert net.add(total, 0, 1, second, SIZE) is total
    asked = second.clone().requires_grad_(True)
    before = total.clone()
    assert net.add(total, 0, 1, asked, SIZE) is not total
    assert torch.equal(total, before)
    asked_total = total.clone().requires_grad_(True)
    assert net.add(asked_total, 0, 1, second, SIZE) is not asked_total
    net.mixing_weights.requires_grad_(True)
    assert net.add(total, 0, 1, second, SIZE) is not total
    assert torch.equal(total, before)


def test_no_map_is_changed():
    net = _filled(dims=(16, 8, 16, 16))
    maps = _maps(net)
    kept = [[map.clone() for map in row] for row in maps]
    with torch.no_grad():
        net(maps, SIZE)
    for row, before in zip(maps, kept, strict=True):
        assert all(torch.equal(map, was) for map, was in zip(row, before, strict=True))


def test_the_weights_are_counted_step_by_step():
    net = _net()
    torch.testing.assert_close(net.mixing, torch.full((3, 4), 1 / 12))
    with torch.no_grad():
        net.mixing_weights[2 * 4 + 1] = 3.0
        assert net.pruned() == (2, 1)
        assert float(net.mixing[2, 1]) == pytest.approx(math.exp(3) / (math.exp(3) + 11 * math.exp(1)))
        assert float(net.mixing.sum()) == pytest.approx(1)
        net.mixing_weights[2 * 4 + 1] = 60.0
        maps = _maps(net)
        torch.testing.assert_close(net(maps, SIZE), net.reduce(1, maps[2][1], SIZE))


def test_pruned_is_in_range_for_a_single_step_or_layer():
    assert _net((8,), (0,)).pruned() == (0, 0)
    net = _net((8, 8, 8), (0,))
    with torch.no_grad():
        net.mixing_weights[2] = 2.0
    assert net.pruned() == (0, 2)


def test_at_own_the_whole_bottleneck_works_on_the_map_as_it_is():
    net, own = _filled().double(), _filled(at="own").double()
    weights = {key: value.double() for key, value in _published().items()}
    for layer, map in enumerate(_maps(net)[0]):
        with torch.no_grad():
            one, other = net.reduce(layer, map, SIZE), own.reduce(layer, map, SIZE)
        assert torch.allclose(one, other) == (map.shape[2:] == SIZE)
        expected = _interpolated(_naive_bottleneck(weights, layer, map, 2))
        torch.testing.assert_close(other, expected, atol=1e-10, rtol=1e-10)


def test_half_precision_maps_are_widened():
    net = _filled()
    maps = [[map.half() for map in row] for row in _maps(net)]
    made = net(maps, SIZE)
    assert made.dtype == torch.float32
    assert torch.equal(made, net([[map.float() for map in row] for row in maps], SIZE))


def test_images_of_a_batch_do_not_influence_each_other():
    net = _filled()
    maps = _maps(net, 3)
    with torch.no_grad():
        alone = net([[map[1:2] for map in row] for row in maps], SIZE)
        torch.testing.assert_close(net(maps, SIZE)[1:2], alone, atol=1e-5, rtol=1e-5)


def test_the_weights_are_the_generators_and_no_other_random_number_is_used():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = _net(seed=1), _net(seed=1), _net(seed=2)
    AggregationNetwork.from_checkpoint(
        {"config": {"save_timestep": STEPS, **SMALL}, "aggregation_network": _published()}
    )
    after = torch.get_rng_state()
    for key, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
    first = "bottleneck_layers.0.0.conv1.weight"
    assert not torch.equal(one.state_dict()[first], other.state_dict()[first])
    assert torch.equal(before, after)
    torch.manual_seed(5)
    unseeded = _net(generator=None)
    torch.manual_seed(5)
    for key, value in _net(generator=None).state_dict().items():
        assert torch.equal(value, unseeded.state_dict()[key]), key


def test_the_weights_are_drawn_as_published():
    net = _net((600, 16), dim=128, groups=4).requires_grad_(False)
    assert bool((net.mixing_weights == 1).all())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            assert float(module.weight.mean()) == pytest.approx(0, abs=0.02)
            if module.weight.numel() > 2000:
                assert float(module.weight.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        elif isinstance(module, nn.GroupNorm):
            assert module.num_groups == 4
            assert bool((module.weight == 1).all())
            assert not bool(module.bias.any())


# Checkpoints ---------------------------------------------------------------------------------------------------------


def _checkpoint(**config) -> dict:
    config = {"save_timestep": list(STEPS), "projection_dim": 16, "num_timesteps": 50, "groups": 2, **config}
    return {"config": config, "aggregation_network": _published(), "optimizer_state_dict": {"state": {}}, "step": 5000}


def test_a_published_checkpoint_is_read():
    dims = (64, 128, 40)
    weights = _published(dims, 11, 128)
    steps = [49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0]
    state = {"config": {"save_timestep": steps, "projection_dim": 128, "dims": list(dims)}}
    net = AggregationNetwork.from_checkpoint({**state, "aggregation_network": weights})
    assert (net.dims, net.steps, net.dim, net.groups, net.at) == (dims, tuple(steps), 128, 32, "output")
    assert net.layers == ("layer 1", "layer 2", "layer 3")
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in net.parameters())
    maps = _maps(net, 1, sizes=SIZES[:3])
    with torch.no_grad():
        torch.testing.assert_close(net(maps, SIZE), _naive(weights, maps, 32), atol=1e-4, rtol=1e-4)
        net.mixing_weights.zero_()
    assert bool(weights["mixing_weights"].any()), "the checkpoint's own tensors are its own"


def test_weights_alone_are_read_with_steps_and_a_prefix_is_dropped():
    weights = {f"module.{key}": value for key, value in _published(dim=128).items()}
    net = AggregationNetwork.from_checkpoint(weights, steps=STEPS, dims=DIMS, layers=NAMES, at="own")
    assert (net.dims, net.steps, net.layers, net.at) == (DIMS, STEPS, NAMES, "own")
    assert torch.equal(net.mixing_weights, weights["module.mixing_weights"])


def test_given_steps_come_before_those_of_the_file():
    assert AggregationNetwork.from_checkpoint(_checkpoint(), steps=(3, 2, 1)).steps == (3, 2, 1)
    assert AggregationNetwork.from_checkpoint(_checkpoint(save_timestep=None), steps=(3, 2, 1)).steps == (3, 2, 1)
    without = {"config": None, "aggregation_network": _published(dim=128)}
    assert AggregationNetwork.from_checkpoint(without, steps=(3, 2, 1)).steps == (3, 2, 1)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    net = _filled(at="own", layers=NAMES)
    state = net.checkpoint()
    torch.save(state, tmp_path / "aggregation.pt")
    again = AggregationNetwork.from_checkpoint(torch.load(tmp_path / "aggregation.pt", weights_only=True))
    for name in ("dims", "steps", "dim", "groups", "at"):
        assert getattr(net, name) == getattr(again, name)
    maps = _maps(net)
    assert torch.equal(net(maps, SIZE), again(maps, SIZE))
    assert state["config"] == {
        "projection_dim": 16,
        "save_timestep": list(STEPS),
        "dims": list(DIMS),
        "groups": 2,
        "at": "own",
    }
    with torch.no_grad():
        net.mixing_weights.add_(1)
    assert torch.equal(state["aggregation_network"]["mixing_weights"], again.mixing_weights), "it is a copy"
    assert AggregationNetwork.from_checkpoint(state, at="output").at == "output"


@pytest.mark.usefixtures("as_a_user")
def test_a_foreign_checkpoint_is_refused():
    read = AggregationNetwork.from_checkpoint
    with pytest.raises(
        ConfigError, match=r"mixing_weights among the weights of an aggregation network in x\.pt, got a, b$"
    ):
        read({"a": torch.ones(1), "b": torch.ones(1)}, origin="x.pt")
    with pytest.raises(ConfigError, match=r"in the checkpoint, got nothing$"):
        read({"config": {}, "aggregation_network": {}})
    with pytest.raises(ConfigError, match=r"expected bottleneck_layers in the checkpoint, got mixing_weights$"):
        read({"mixing_weights": torch.ones(3)}, steps=STEPS)
    weights = _published()
    with pytest.raises(
        ConfigError,
        match=r"expected the steps, for x\.pt has no config with save_timestep; pass steps=, in the order of its "
        "mixing weights$",
    ):
        read(weights, origin="x.pt")
    with pytest.raises(
        ConfigError,
        match="expected 8 mixing weights in the checkpoint for 2 steps × 4 layers, got 12; pass the steps it was "
        "trained with$",
    ):
        read(weights, steps=(1, 0))


@pytest.mark.usefixtures("as_a_user")
def test_missing_unexpected_and_misshapen_weights_are_named():
    def read(change) -> None:
        state = _checkpoint()
        change(state["aggregation_network"])
        AggregationNetwork.from_checkpoint(state, origin="x.pt")

    first = "bottleneck_layers.0.0"
    with pytest.raises(ConfigError, match=rf"expected a convolution {first}\.conv1\.weight in x\.pt, got none$"):
        read(lambda weights: weights.pop(f"{first}.conv1.weight"))
    with pytest.raises(ConfigError, match=rf"a convolution {first}\.conv3\.weight in x\.pt, got the shape \(16, 4\)$"):
        read(lambda weights: weights.update({f"{first}.conv3.weight": torch.ones(16, 4)}))
    with pytest.raises(
        ConfigError,
        match=rf"the weights of an aggregation network in x\.pt, got missing: {first}\.conv2\.norm\.bias$",
    ):
        read(lambda weights: weights.pop(f"{first}.conv2.norm.bias"))
    extra = {"bottleneck_layers.1.0.shortcut.weight": torch.ones(16, 16, 1, 1), "logit_scale": torch.ones(1)}
    with pytest.raises(
        ConfigError, match=r"in x\.pt, got unexpected: bottleneck_layers\.1\.0\.shortcut\.weight, logit_scale$"
    ):
        read(lambda weights: weights.update(extra))
    with pytest.raises(
        ConfigError, match=rf"missing: {first}\.shortcut\.weight; unexpected: {first}\.shortcut\.weights$"
    ):
        read(lambda weights: weights.update({f"{first}.shortcut.weights": weights.pop(f"{first}.shortcut.weight")}))
    with pytest.raises(ConfigError, match=r"got unexpected: extra0, extra1, extra2, extra3 and 2 more$"):
        read(lambda weights: weights.update({f"extra{index}": torch.ones(1) for index in range(6)}))
    with pytest.raises(
        ConfigError, match=rf"expected {first}\.conv2\.weight of shape \(4, 4, 3, 3\) in x\.pt, got \(4, 4, 1, 1\)$"
    ):
        read(lambda weights: weights.update({f"{first}.conv2.weight": torch.ones(4, 4, 1, 1)}))


@pytest.mark.usefixtures("as_a_user")
def test_a_checkpoint_of_other_layers_is_refused():
    read = AggregationNetwork.from_checkpoint
    with pytest.raises(
        ConfigError,
        match=r"expected layer up1\.res1 with 20 channels in x\.pt, got 16; choose the layers it was trained "
        "with, in their order$",
    ):
        read(_checkpoint(), dims=(24, 20, 32, 5), layers=NAMES, origin="x.pt")
    with pytest.raises(ConfigError, match=r"expected layer 3 with 20 channels in the checkpoint, got 32"):
        read(_checkpoint(), dims=(24, 16, 20, 5))
    with pytest.raises(ConfigError, match=r"expected 3 layers in the checkpoint, got 4; choose the layers it"):
        read(_checkpoint(), dims=(24, 16, 32))


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
def test_settings_that_make_no_network_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"expected at least one layer with a channel and one step, got dims=\(\), steps=\(49, 25, 0\)",
    ):
        _net(())
    with pytest.raises(ConfigError, match=r"one step, got dims=\(24, 16, 32, 5\), steps=\(\)"):
        _net(steps=())
    with pytest.raises(ConfigError, match=r"got dims=\(24, 0\)"):
        _net((24, 0))
    with pytest.raises(ConfigError, match=r"expected each step once, got steps=\(49, 0, 49\)"):
        _net(steps=(49, 0, 49))
    with pytest.raises(
        ConfigError, match=r"expected dim to be a multiple of 4 · groups = 128, got 400; try dim=384, or other groups"
    ):
        _net(dim=400, groups=32)
    with pytest.raises(ConfigError, match=r"4 · groups = 128, got 16; try dim=128, or other groups"):
        _net(dim=16, groups=32)
    with pytest.raises(ConfigError, match=r"4 · groups = 8, got 0; try dim=8, or other groups"):
        _net(dim=0)
    with pytest.raises(ConfigError, match="expected at least one group, got groups=0"):
        _net(groups=0)
    with pytest.raises(ConfigError, match="expected a name for each of 4 layers, got 2"):
        _net(layers=("one", "two"))
    with pytest.raises(ConfigError, match="expected at='output' or 'own', got 'input'"):
        _net(at="input")


@pytest.mark.usefixtures("as_a_user")
def test_maps_that_do_not_fit_are_refused():
    net = _net(layers=NAMES)
    maps = _maps(net)
    with pytest.raises(
        ShapeError,
        match=r"expected a map of shape \(batch, 16, rows, cols\) from up1\.res1, got \(2, 24, 3, 4\); pass the "
        "maps in the order of the layers$",
    ):
        net.reduce(1, maps[0][0], SIZE)
    with pytest.raises(ShapeError, match=r"\(batch, 5, rows, cols\) from layer 4, got \(5, 20, 3\);"):
        _net().reduce(3, torch.ones(5, 20, 3), SIZE)
    with pytest.raises(ShapeError, match=r"expected maps\[step\]\[layer\] of 3 steps × 4 layers, got 2 × 4"):
        net(maps[:2], SIZE)
    with pytest.raises(ShapeError, match=r"3 steps × 4 layers, got 3 × 3 or 4"):
        net([maps[0], maps[1][:3], maps[2]], SIZE)
    with pytest.raises(ShapeError, match=r"3 steps × 4 layers, got 0 × 0"):
        net([], SIZE)


@pytest.mark.usefixtures("as_a_user")
def test_a_total_of_another_shape_is_refused():
    net = _net(layers=NAMES)
    maps = _maps(net)
    total = net.add(None, 0, 0, maps[0][0], SIZE)
    with pytest.raises(
        ShapeError,
        match=r"expected a total of shape \(1, 16, 6, 8\) to add up1\.res1 to, got \(2, 16, 6, 8\); keep batch "
        "and size the same for all maps$",
    ):
        net.add(total, 0, 1, maps[0][1][:1], SIZE)
    with pytest.raises(ShapeError, match=r"expected a total of shape \(2, 16, 6, 9\)"):
        net.add(total, 0, 1, maps[0][1], (6, 9))


@pytest.mark.usefixtures("as_a_user")
def test_an_index_that_does_not_exist_is_refused():
    net = _net(layers=NAMES)
    map = _maps(net)[0][0]
    with pytest.raises(ConfigError, match="expected the index of a step from 0 to 2, got 49; the steps are 49, 25, 0"):
        net.add(None, 49, 0, map, SIZE)
    with pytest.raises(
        ConfigError,
        match=r"the index of a layer from 0 to 3, got -1; the layers are up0\.res0, up1\.res1, up2\.res0, up3",
    ):
        net.reduce(-1, map, SIZE)


# The loss ------------------------------------------------------------------------------------------------------------


def _naive_loss(a: Tensor, b: Tensor, pairs: list[tuple[int, int]], temperature: float) -> float:
    def cell(map: Tensor, index: int) -> list[float]:
        row, col = divmod(index, map.shape[2])
        return map[:, row, col].tolist()

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(i * j for i, j in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

    def surprise(one: Tensor, index: int, other: Tensor, target: int) -> float:
        cells = range(other.shape[1] * other.shape[2])
        odds = [math.exp(cosine(cell(one, index), cell(other, each)) / temperature) for each in cells]
        return -math.log(odds[target] / sum(odds))

    both = [(surprise(a, i, b, j) + surprise(b, j, a, i)) / 2 for i, j in pairs]
    return sum(both) / len(both)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_loss_is_the_published_formula(temperature):
    a = torch.randn(6, 3, 4, generator=_rng(0), dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, 2, 5, generator=_rng(1), dtype=torch.float64, requires_grad=True)
    pairs = [(0, 9), (11, 0), (5, 5), (5, 6)]
    index_a, index_b = (torch.tensor(each) for each in zip(*pairs, strict=True))
    loss = contrastive_loss(a, b, index_a, index_b, temperature=temperature)
    assert loss.item() == pytest.approx(_naive_loss(a.detach(), b.detach(), pairs, temperature), abs=1e-10)
    swapped = contrastive_loss(b, a, index_b.int(), index_a.int(), temperature=temperature)
    torch.testing.assert_close(swapped, loss)
    torch.testing.assert_close(contrastive_loss(a * 3, b, index_a, index_b, temperature=temperature), loss)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in torch.autograd.grad(loss, (a, b)))


def test_the_temperature_is_the_published_one_unless_told_and_maps_that_agree_have_a_small_loss():
    a, b = (torch.randn(64, 3, 4, generator=_rng(seed)) for seed in (0, 1))
    index = torch.arange(12)
    plain = contrastive_loss(a, b, index, index)
    assert torch.equal(plain, contrastive_loss(a, b, index, index, temperature=0.07))
    assert float(contrastive_loss(a, a, index, index)) < 0.01 < float(plain)


def test_a_cell_without_direction_has_similarity_zero_and_a_gradient_that_is_not_huge():
    a, b = (torch.randn(4, 2, 3, generator=_rng(seed)) for seed in (0, 1))
    a[:, 0, 1] = 0
    a.requires_grad_(True)
    index = torch.tensor([1])
    loss = contrastive_loss(a, b, index, torch.tensor([4]))
    forth = math.log(6)
    cells_a, cells_b = (F.normalize(map.detach().flatten(1), dim=0) for map in (a, b))
    back = F.cross_entropy((cells_b[:, 4] @ cells_a / 0.07)[None], index)
    assert loss.item() == pytest.approx((forth + float(back)) / 2, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, a)
    assert float(gradient.abs().max()) < 100


@pytest.mark.usefixtures("as_a_user")
def test_pairs_that_mean_nothing_are_refused():
    a, b = torch.randn(4, 2, 3), torch.randn(4, 2, 2)
    zero = torch.tensor([0])
    with pytest.raises(
        ShapeError, match="at least one pair of cells, got none; leave out images without common points"
    ):
        contrastive_loss(a, b, zero[:0], zero[:0])
    with pytest.raises(ShapeError, match="expected a cell of b for each of a, got 1 for 2"):
        contrastive_loss(a, b, torch.tensor([0, 1]), zero)
    with pytest.raises(ShapeError, match=r"expected cells of a from 0 to 5, got 6; a cell is row · cols \+ col"):
        contrastive_loss(a, b, torch.tensor([6]), zero)
    with pytest.raises(ShapeError, match="expected cells of b from 0 to 3, got -1;"):
        contrastive_loss(a, b, zero, torch.tensor([-1]))
    with pytest.raises(ShapeError, match="as many channels, got 4 and 5; reduce both by one network"):
        contrastive_loss(a, torch.randn(5, 2, 2), zero, zero)
    with pytest.raises(ConfigError, match="expected a temperature above 0, got 0"):
        contrastive_loss(a, b, zero, zero, temperature=0)


def test_it_learns_which_map_tells_cells_apart():
    """Of two steps, only one has maps that agree between both images: its weight grows."""
    net = _net((12,), (1, 0), dim=8, groups=2)
    same, index = torch.randn(1, 12, 4, 4, generator=_rng(0)), torch.arange(16)
    noise = [torch.randn(1, 12, 4, 4, generator=_rng(seed)) for seed in (1, 2)]
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0)
    losses = []
    for _ in range(40):
        a, b = (net([[noise[image]], [same]], (4, 4))[0] for image in (0, 1))
        loss = contrastive_loss(a, b, index, index)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert net.pruned() == (1, 0)
    assert net.mixing[1, 0].item() > 0.55
