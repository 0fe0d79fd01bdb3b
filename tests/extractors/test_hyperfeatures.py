"""Hyperfeatures as maps stream by are those of all maps read first, through a bottleneck written out."""

from typing import Any

import diffusions
import pytest
import torch
import torch.nn.functional as F
from diffusions import load, picture
from torch import Tensor

import vitfeats as vf
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.diffusion import DiffusionExtractor, find_layers
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor, HyperfeatureModel, card_for, layer_channels
from vitfeats.hooks import count_hooks
from vitfeats.models.diffusion import denoiser
from vitfeats.nets.aggregation import AggregationNetwork

NEAR = {"atol": 1e-5, "rtol": 0.0}
NAMES = [f"up{block}.res{sub}" for block in range(4) for sub in range(3)]
DIMS = [32] * 6 + [16] * 3 + [8] * 3
CHAIN = {"mode": "inversion", "steps": 4, "keep": 3}
STEPS = (3, 2, 0)
DIM, GROUPS = 16, 2  # the result has the channels of up2: no shortcut there
ALL = "out@hyperfeatures"


@pytest.fixture(scope="module")
def sd() -> Any:
    return diffusions.sd_pipeline()


@pytest.fixture(scope="module")
def ddpm() -> Any:
    return diffusions.ddpm()


def _weights(steps: int = 3, dims: list[int] = DIMS, dim: int = DIM, seed: int = 0) -> dict[str, Tensor]:
    return diffusions.published_aggregation(dims, steps, dim, seed, spread=0.5)


def _net(steps: tuple[int, ...] = STEPS, dims: list[int] = DIMS, **weights: Any) -> AggregationNetwork:
    state = {
        "config": {"save_timestep": list(steps), "groups": GROUPS},
        "aggregation_network": _weights(len(steps), dims, **weights),
    }
    return AggregationNetwork.from_checkpoint(state).requires_grad_(False)


def _bottleneck(weights: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """He et al., figure 5, with group norms: what Detectron2's BottleneckBlock computes."""

    def part(name: str, x: Tensor) -> Tensor:
        key = f"bottleneck_layers.{layer}.0.{name}"
        kernel = weights[f"{key}.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return F.group_norm(x, GROUPS, weights[f"{key}.norm.weight"], weights[f"{key}.norm.bias"])

    deep = part("conv3", F.relu(part("conv2", F.relu(part("conv1", x)))))
    has_shortcut = f"bottleneck_layers.{layer}.0.shortcut.weight" in weights
    return F.relu(deep + (part("shortcut", x) if has_shortcut else x))


def _map(found: vf.Descriptor) -> Tensor:
    return found.features.transpose(1, 2).unflatten(2, (found.grid.rows, found.grid.cols))


def _maps(extractor: DiffusionExtractor, images: Tensor, steps: tuple[int | None, ...]) -> list[list[Tensor]]:
    """Return the maps that the extractor of diffusion models reads, all of them kept: maps[step][layer]."""
    rows = [["residual@" + name + ("" if step is None else f"#{step}") for name in NAMES] for step in steps]
    found = extractor(images, [tap for row in rows for tap in row])
    return [[_map(found[tap]) for tap in row] for row in rows]


def _small(maps: list[list[Tensor]], size: tuple[int, int]) -> list[list[Tensor]]:
    return [[F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in row] for row in maps]


def _mixed(weights: dict[str, Tensor], maps: list[list[Tensor]], size: tuple[int, int]) -> Tensor:
    """Return the published formula, written out."""
    shares = weights["mixing_weights"].softmax(0).view(len(maps), len(maps[0]))
    return sum(
        shares[step, layer] * _bottleneck(weights, layer, one)
        for step, row in enumerate(_small(maps, size))
        for layer, one in enumerate(row)
    )


def _same(found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected).abs().max())
    print(f"max abs difference {difference:.2e}")
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-2
    assert difference <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["hyperfeatures", "model"])
def test_streaming_equals_all_maps_read_first(sd, schedule):
    image, weights = picture(batch=2), _weights()
    reader = load(sd, schedule=schedule, **CHAIN)
    network = _net()
    extractor = HyperfeatureExtractor.of(reader, network)
    found = extractor(image)
    assert str(found.tap) == ALL
    assert (found.grid.rows, found.grid.cols, found.grid.stride) == (8, 16, 8)
    maps = _maps(reader, image, STEPS)
    assert [m.shape[1] for m in maps[0]] == DIMS
    _same(_map(found), network(maps, (8, 16)))
    _same(_map(found), _mixed(weights, maps, (8, 16)))


@torch.no_grad()
def test_a_coarser_cell(sd):
    image, weights = picture(), _weights()
    reader = load(sd, **CHAIN)
    found = HyperfeatureExtractor.of(reader, _net(), cell=16)(image)
    assert (found.grid.rows, found.grid.cols, found.grid.stride) == (4, 8, 16)
    _same(_map(found), _mixed(weights, _maps(reader, image, STEPS), (4, 8)))


@torch.no_grad()
def test_one_step_is_one_clean_pass(sd):
    """Published with one step: the U-Net at level -1 on the picture without noise."""
    image, network = picture(), _net((0,))
    reader = load(sd, mode="clean", time=-1)
    maps = _maps(reader, image, (None,))
    expected = _mixed(_weights(1), maps, (8, 16))
    _same(_map(HyperfeatureExtractor.of(reader, network)(image)), expected)
    model = HyperfeatureModel(reader.model, network)
    alone = HyperfeatureExtractor(model, card_for(reader.card, DIM), reader.preprocess)
    assert alone.diffusion == DiffusionConfig.preset("hyperfeatures-one-step")
    _same(_map(alone(image)), expected)
    as_a_chain = load(sd, mode="inversion", steps=1, keep=1)
    _same(_map(HyperfeatureExtractor.of(as_a_chain, network)(image)), expected)


@torch.no_grad()
def test_a_clean_pass_that_says_it_has_one_step(sd):
    """As the published settings do: num_timesteps 1."""
    image, network = picture(), _net((0,))
    reader = load(sd, mode="clean", time=-1, steps=1, keep=1)
    _same(
        _map(HyperfeatureExtractor.of(reader, network)(image)),
        _mixed(_weights(1), _maps(reader, image, (None,)), (8, 16)),
    )


@torch.no_grad()
def test_an_ensemble_is_averaged_before_it_is_aggregated(sd):
    image, network = picture(batch=2), _net((0,))
    reader = load(sd, ensemble=3)
    found = HyperfeatureExtractor.of(reader, network)(image, [ALL, "out@raw", "out@pruned"])
    maps = _maps(reader, image, (None,))
    _same(_map(found[ALL]), _mixed(_weights(1), maps, (8, 16)))
    one = _map(HyperfeatureExtractor.of(load(sd), network)(image))
    assert not torch.allclose(one, _map(found[ALL]), atol=1e-3)


@torch.no_grad()
def test_the_other_rows_of_the_table(sd):
    image, network, weights = picture(batch=2), _net(), _weights()
    reader = load(sd, **CHAIN)
    extractor = HyperfeatureExtractor.of(reader, network)
    found = extractor(image, [ALL, "out@pruned", "out@raw", "out@concatenation"])
    maps = _maps(reader, image, STEPS)
    small = _small(maps, (8, 16))
    step, layer = divmod(int(weights["mixing_weights"].argmax()), len(DIMS))
    _same(_map(found["out@raw"]), small[step][layer])
    _same(_map(found["out@pruned"]), _bottleneck(weights, layer, small[step][layer]))
    _same(_map(found["out@concatenation"]), torch.cat([m for row in small for m in row], 1))
    assert found["out@concatenation"].dim == sum(DIMS) * 3
    for tap, one in found.items():
        assert torch.equal(extractor(image, str(tap)).features, one.features)
    assert extractor.resolve(vf.Tap("out", 0)).layer == "hyperfeatures"


@torch.no_grad()
def test_the_pruned_row_needs_no_more_than_its_step(sd):
    network = _net()
    network.mixing_weights[1] = 9.0  # the cleanest step: inversion's first
    calls: list[int] = []
    handle = sd.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    HyperfeatureExtractor.of(load(sd, **CHAIN), network)(picture(), ["out@pruned", "out@raw"])
    handle.remove()
    assert len(calls) == 1


@torch.no_grad()
def test_generation_with_an_aggregation_made_for_inversion(sd):
    """The steps have the same names in both directions, so each finds its own weights."""
    began = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    reader, weights = load(sd, (64, 64), **CHAIN), _weights()
    extractor = HyperfeatureExtractor.of(reader, _net())
    made = extractor.generate(latents=began, taps=[ALL, "out@concatenation"])
    plain = reader.generate(latents=began, taps=[f"residual@{name}#{step}" for step in STEPS for name in NAMES])
    torch.testing.assert_close(made.images, plain.images, **NEAR)
    torch.testing.assert_close(made.latents, plain.latents, **NEAR)
    maps = [[_map(plain.features[f"residual@{name}#{step}"]) for name in NAMES] for step in STEPS]
    _same(_map(made.features[ALL]), _mixed(weights, maps, (8, 8)))
    _same(_map(made.features["out@concatenation"]), torch.cat([m for row in _small(maps, (8, 8)) for m in row], 1))
    backwards = _mixed(weights, maps[::-1], (8, 8))
    assert not torch.allclose(_map(made.features[ALL]), backwards, atol=1e-3)
    wide = extractor.generate(size=(64, 128), number=1)
    assert (wide.features[ALL].grid.rows, wide.features[ALL].grid.cols) == (8, 16)


@pytest.mark.parametrize("mode", ["clean", "noise"])
def test_generation_needs_steps(sd, mode):
    """An aggregation of one pass has no step of a chain to be read at: an error of our own, or its one step."""
    extractor = HyperfeatureExtractor.of(load(sd, (64, 64), mode=mode), _net((0,)))
    try:
        made = extractor.generate()
    except vf.VitFeatsError as error:
        assert "step" in str(error)  # noqa: PT017
    else:
        assert made.features[ALL].features.isfinite().all()


@torch.no_grad()
def test_resized_and_read_in_another_way(sd):
    extractor = HyperfeatureExtractor.of(load(sd, 64, **CHAIN), _net())
    wide = extractor.resized(size=(64, 128))
    assert wide.model is extractor.model
    expected = HyperfeatureExtractor.of(load(sd, **CHAIN), _net())(picture())
    assert torch.equal(wide(picture()).features, expected.features)
    assert extractor(picture(64, 64)).grid.network_size == (64, 64)
    other = extractor.reading(DiffusionConfig(seed=4, **CHAIN))
    direct = HyperfeatureExtractor.of(load(sd, 64, seed=4, **CHAIN), _net())(picture(64, 64))
    assert torch.equal(other(picture(64, 64)).features, direct.features)
    with pytest.raises(vf.ConfigError, match="no stride"):
        extractor.resized(stride=32)(picture(64, 64))


@torch.no_grad()
def test_pixel_models_are_read_at_two_pixels_a_cell(ddpm):
    dims = [ddpm.unet.get_submodule(f"up_blocks.{n // 3}.resnets.{n % 3}.conv2").out_channels for n in range(12)]
    reader = load(ddpm, (32, 48), **CHAIN)
    found = HyperfeatureExtractor.of(reader, _net(dims=dims))(picture(32, 48))
    assert (found.grid.rows, found.grid.cols, found.grid.stride) == (16, 24, 2)
    assert list(layer_channels(reader.model).items()) == list(zip(NAMES, dims, strict=True))
    _same(_map(found), _mixed(_weights(dims=dims), _maps(reader, picture(32, 48), STEPS), (16, 24)))


@torch.no_grad()
def test_laws_of_every_extractor(sd):
    image = picture(batch=2)
    extractor = HyperfeatureExtractor.of(load(sd, **CHAIN), _net())
    state = torch.get_rng_state()
    together = extractor(image)
    for number in range(2):
        torch.testing.assert_close(together[number].features, extractor(image[number]).features, **NEAR)
    assert torch.equal(extractor(image).features, together.features)
    assert not torch.allclose(together[0].features, together[1].features, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert count_hooks(extractor.model) == 0
    handle = sd.unet.up_blocks[2].register_forward_pre_hook(lambda *_: [][0])
    with pytest.raises(IndexError):
        extractor(image)
    handle.remove()
    assert count_hooks(extractor.model) == 0
    assert torch.equal(extractor(image).features, together.features)


def test_gradients_reach_the_image_in_one_pass(sd):
    image = picture().requires_grad_()
    reader = load(sd, mode="clean", time=-1)
    extractor = HyperfeatureExtractor.of(reader, _net((0,)))
    assert extractor.differentiable
    (extractor(image).features ** 2).mean().backward()
    got, image.grad = image.grad, None
    (_mixed(_weights(1), _maps(reader, image, (None,)), (8, 16)) ** 2).mean().backward()
    assert image.grad.abs().max() > 0
    torch.testing.assert_close(got, image.grad, atol=1e-5 * float(image.grad.abs().max()), rtol=1e-3)
    chain = HyperfeatureExtractor.of(load(sd, **CHAIN), _net())
    assert not chain.differentiable
    with pytest.raises(vf.ConfigError, match="images without gradients in mode 'inversion'"):
        chain(image)


def test_networks_that_do_not_fit(sd):
    model = denoiser(sd)
    wrong = [*DIMS[:7], 24, *DIMS[8:]]
    with pytest.raises(vf.ConfigError, match=r"expected an aggregation for 16 channels at layer 'up2.res1', got 24"):
        HyperfeatureModel(model, _net(dims=wrong))
    with pytest.raises(vf.ConfigError, match=r"expected an aggregation of 12 layers for this model, got one of 11"):
        HyperfeatureExtractor.of(load(sd, **CHAIN), _net(dims=DIMS[:-1]))
    names = [name for name in find_layers(sd.unet) if name in NAMES]
    state = {"config": {"save_timestep": [0], "groups": GROUPS}, "aggregation_network": _weights(1, wrong)}
    with pytest.raises(vf.ConfigError, match=r"expected layer up2.res1 with 16 channels"):
        AggregationNetwork.from_checkpoint(state, dims=DIMS, layers=names)


def test_steps_that_do_not_fit(sd):
    told = r"expected settings with the steps that the aggregation was made for, \({}\), got mode '{}' with {} steps; "
    with pytest.raises(vf.ConfigError, match=told.format("3, 2, 0", "clean", 50) + "leave diffusion=None for its own"):
        HyperfeatureExtractor.of(load(sd, mode="clean"), _net())
    with pytest.raises(vf.ConfigError, match=told.format("3, 2, 0", "inversion", 3)):
        HyperfeatureExtractor.of(load(sd, mode="inversion", steps=3, keep=1), _net())
    with pytest.raises(vf.ConfigError, match=told.format("3, 2, 0", "noise", 50)):
        HyperfeatureExtractor.of(load(sd, **CHAIN), _net()).reading(DiffusionConfig())
    with pytest.raises(vf.ConfigError, match=r"expected a cell that divides 64 pixels, got 3"):
        HyperfeatureExtractor.of(load(sd, **CHAIN), _net(), cell=3)


def test_taps_that_do_not_exist(sd):
    extractor = HyperfeatureExtractor.of(load(sd, **CHAIN), _net())
    for tap, kind, told in (
        ("out@hyperfeature", vf.TapError, r"got 'hyperfeature'. Did you mean 'hyperfeatures'"),
        (
            "out@up1",
            vf.TapError,
            r"a layer of hyperfeatures:UNet2DConditionModel, got 'up1'. Known: concatenation, hyp",
        ),
        ("out@hyperfeatures#3", vf.TapError, r"a tap without a step, got 'out@hyperfeatures#3': hyperfeatures are of"),
        ("residual@up1.res1", vf.UnknownFacetError, r"got 'residual': it gives maps; try 'out@hyperfeatures'"),
        ("out@9", vf.TapError, "expected a layer from 0 to 3"),
    ):
        with pytest.raises(kind, match=told):
            extractor(picture(), tap)


def test_a_copy_on_another_device_is_there_in_all_its_parts(sd):
    here = HyperfeatureExtractor.of(load(sd, **CHAIN), _net())
    there = here.on("meta")
    assert {there.device, there.inner.device} == {torch.device("meta")}
    assert {value.device for value in there.model.parameters()} == {torch.device("meta")}
    assert {here.device, here.inner.device} == {torch.device("cpu")}
    assert {value.device for value in here.model.parameters()} == {torch.device("cpu")}
