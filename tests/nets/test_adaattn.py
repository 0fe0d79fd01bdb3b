"""Style transfer by statistics and attention: against the papers' formulas written naively, and laws of blending."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitfeats as vf
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.nets import adaattn, stylizing
from vitfeats.nets.adaattn import (
    AdaAttN,
    AttentionPair,
    Decoder,
    Level,
    SANet,
    SANetPair,
    adain,
    attend,
    attend_moments,
    doubled,
    key_of,
    moments,
    normalised,
    sampled,
)
from vitfeats.nets.stylizing import NETWORKS, Style

CHANNELS = (4, 6, 8, 10, 10)
METHODS = sorted(NETWORKS)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_rng(seed), dtype=torch.float64)


def _maps(height: int, width: int, *, batch: int = 1, seed: int = 0, up: bool = True) -> list[Tensor]:
    """Return maps of five levels as an encoder gives them, that rounds the halves of odd sides up or down."""
    found = []
    for level, channels in enumerate(CHANNELS):
        found.append(_randn(batch, channels, height, width, seed=seed * 10 + level).abs())
        height, width = ((side + up) // 2 for side in (height, width))
    return found


def _network(method: str, seed: int = 0, **options) -> nn.Module:
    network = NETWORKS[method](CHANNELS, generator=_rng(seed), **options).double()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            if parameter.ndim == 1:  # biases are drawn as 0, which would hide a mistake in their use
                parameter.copy_(0.1 * _randn(*parameter.shape, seed=index))
    return network


# Formulas written naively ---------------------------------------------------------------------------------------------


def _plain_normalised(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[b, c].flatten()
            mean = values.sum() / len(values)
            variance = ((values - mean) ** 2).sum() / (len(values) - 1)
            out[b, c] = (x[b, c] - mean) / (variance + 1e-5).sqrt()
    return out


def _plain_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]


def _plain_weights(query: Tensor, key: Tensor, extra: Tensor | float = 0.0) -> Tensor:
    logits = torch.einsum("bdn,bdm->bnm", query.flatten(2), key.flatten(2)) + extra
    powers = (logits - logits.amax(2, keepdim=True)).exp()
    return powers / powers.sum(2, keepdim=True)


def _plain_adaattn(module: AdaAttN, content: Tensor, style: Tensor, content_key: Tensor, style_key: Tensor) -> Tensor:
    weights = _plain_weights(_plain_conv(module.f, content_key), _plain_conv(module.g, style_key))
    values = _plain_conv(module.h, style).flatten(2)
    mean = torch.einsum("bnm,bcm->bcn", weights, values)
    std = (torch.einsum("bnm,bcm->bcn", weights, values**2) - mean**2).relu().sqrt()
    shape = (*mean.shape[:2], *content.shape[2:])
    return std.reshape(shape) * _plain_normalised(content) + mean.reshape(shape)


def _plain_sanet(module: SANet, content: Tensor, style: Tensor) -> Tensor:
    query, key = (_plain_conv(conv, _plain_normalised(x)) for conv, x in ((module.f, content), (module.g, style)))
    values = _plain_conv(module.h, style).flatten(2)
    attended = torch.einsum("bnm,bcm->bcn", _plain_weights(query, key), values)
    return _plain_conv(module.out_conv, attended.reshape(content.shape)) + content


def _plain_merged(conv: nn.Conv2d, four: Tensor, five: Tensor) -> Tensor:
    """Fusion as published, for maps whose sides are even."""
    both = four + five.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(nn.ReflectionPad2d(1)(both), conv.weight, conv.bias)


def _plain_decoder(decoder: Decoder, x: Tensor, beside: Tensor | None = None) -> Tensor:
    """Decode as published, layer by layer, for sides that 8 divides."""
    for index, conv in enumerate(decoder.convs):
        if index == 1 and beside is not None:
            x = torch.cat([x, beside], 1)
        x = F.conv2d(nn.ReflectionPad2d(1)(x), conv.weight, conv.bias)
        x = x if index == 8 else F.relu(x)
        if index in (0, 4, 6):
            x = nn.Upsample(scale_factor=2, mode="nearest")(x)
    return x


# Statistics -----------------------------------------------------------------------------------------------------------


def test_moments_are_the_mean_and_the_root_of_the_unbiased_variance():
    x = _randn(2, 3, 4, 5) * 3 + 1
    mean, std = moments(x)
    assert mean.shape == std.shape == (2, 3, 1, 1)
    torch.testing.assert_close(mean.squeeze(), x.flatten(2).mean(2))
    torch.testing.assert_close(std.squeeze(), (x.flatten(2).var(2) + 1e-5).sqrt())
    torch.testing.assert_close(normalised(x), _plain_normalised(x))


def test_a_plane_of_one_pixel_or_one_value_has_no_spread_and_finite_gradients():
    for x in (torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 4, 4), 3.0)):
        x.requires_grad_(True)
        mean, std = moments(x)
        torch.testing.assert_close(std, torch.full_like(std, math.sqrt(1e-5)))
        torch.testing.assert_close(mean, torch.full_like(mean, 3.0))
        found = normalised(x)
        assert found.abs().max() == 0
        (gradient,) = torch.autograd.grad((found * torch.arange(1.0, 1 + x.numel()).view(x.shape)).sum(), x)
        assert gradient.isfinite().all()


def test_half_precision_is_widened_for_statistics():
    x = (torch.randn(1, 2, 64, 64, generator=_rng(0)) * 300).half()
    mean, std = moments(x)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(std.squeeze(), x.float().flatten(2).std(2).squeeze(), rtol=1e-4, atol=0)
    assert normalised(x).dtype == torch.float16


def test_adain_gives_the_content_the_moments_of_the_style():
    content, style = _randn(2, 3, 6, 5), 4 * _randn(2, 3, 9, 7, seed=1) + 2
    found = adain(content, style)
    for a, b in zip(moments(found), moments(style), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adain(content, content), content)
    torch.testing.assert_close(_plain_normalised(found), _plain_normalised(content), rtol=1e-4, atol=1e-4)


def test_keys_are_normalised_features_of_the_level_and_all_shallower_ones():
    features = _maps(16, 24)
    for level in range(3):
        parts = [features[i][:, :, :: 2 ** (level - i), :: 2 ** (level - i)] for i in range(level + 1)]
        wanted = torch.cat([_plain_normalised(part) for part in parts], 1)
        torch.testing.assert_close(key_of(features, level), wanted)
    assert key_of(_maps(17, 23), 4).shape == (1, sum(CHANNELS), 2, 2)


# Attention ------------------------------------------------------------------------------------------------------------


def _case(seed: int = 0, *, n: int = 13, m: int = 11, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return _randn(batch, 5, n, seed=seed), _randn(batch, 5, m, seed=seed + 1), _randn(batch, 3, m, seed=seed + 2)


def _labels(n: int, count: int, seed: int) -> Tensor:
    return torch.randint(0, count, (2, n), generator=_rng(seed))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("regions", [0, 2, 6])
def test_attention_is_the_formula_position_by_position(weighted, regions):
    query, key, value = _case()
    log_weights = _randn(2, 11, seed=7) if weighted else None
    labels = (_labels(13, regions, 3), _labels(11, regions // 2, 4)) if regions else None
    found = attend(query, key, value, log_weights=log_weights, regions=labels)
    for b in range(2):
        for n in range(13):
            seen = range(11)
            if labels is not None:
                seen = [m for m in range(11) if labels[1][b, m] == labels[0][b, n]] or list(range(11))
            extra = [0.0 if log_weights is None else float(log_weights[b, m]) for m in seen]
            powers = [math.exp(float(query[b, :, n] @ key[b, :, m]) + e) for m, e in zip(seen, extra, strict=True)]
            wanted = sum(p * value[b, :, m] for p, m in zip(powers, seen, strict=True)) / sum(powers)
            torch.testing.assert_close(found[b, :, n], wanted)


def test_planes_keep_their_shapes():
    query, key, value = _case(n=12, m=10)
    found = attend(query.unflatten(2, (3, 4)), key.unflatten(2, (5, 2)), value.unflatten(2, (5, 2)))
    assert torch.equal(found, attend(query, key, value).unflatten(2, (3, 4)))
    mean, std = attend_moments(query.unflatten(2, (3, 4)), key, value)
    assert mean.shape == std.shape == (2, 3, 3, 4)


def test_attended_moments_are_the_formula():
    query, key, value = _case()
    weights = _plain_weights(query, key)
    mean = torch.einsum("bnm,bcm->bcn", weights, value)
    variance = torch.einsum("bnm,bcm->bcn", weights, value**2) - mean**2
    found = attend_moments(query, key, value)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], variance.sqrt())


def test_a_large_offset_does_not_drown_the_deviation():
    query, key, value = _case()
    wanted = attend_moments(query, key, value)[1]
    found = attend_moments(query.float(), key.float(), (value + 1000).float())[1]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("function", [attend, attend_moments])
@pytest.mark.parametrize("chunk", [1, 4, 12, 13, 100])
def test_chunks_change_neither_values_nor_gradients(function, chunk):
    labels = (_labels(13, 2, 3), _labels(11, 2, 4))

    def run(chunk: int | None) -> list[Tensor]:
        given = [x.float().requires_grad_(True) for x in (*_case(), _randn(2, 11, seed=7))]
        found = function(*given[:3], log_weights=given[3], regions=labels, chunk=chunk)
        found = found if isinstance(found, tuple) else (found,)
        sum((x * torch.randn(x.shape, generator=_rng(9))).sum() for x in found).backward()
        return [x.detach() for x in found] + [x.grad for x in given]

    for a, b in zip(run(chunk), run(1000), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_values():
    given = [x.requires_grad_(True) for x in (*_case(n=3, m=4), _randn(2, 4, seed=7))]
    assert torch.autograd.gradcheck(lambda q, k, v, w: attend_moments(q, k, v, log_weights=w, chunk=2), given)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return found


@pytest.mark.parametrize("n", [100, 400])
def test_memory_does_not_grow_with_the_product_of_positions(n, monkeypatch):
    """Neither in the forward pass, nor kept for the backward pass, nor there."""
    monkeypatch.setattr(adaattn, "ATTENTION_BYTES", 10 * 300 * 4)
    query, key, value = (x.float().requires_grad_(True) for x in _case(n=n, m=300, batch=1))
    labels = (torch.zeros(1, n, dtype=torch.long), torch.zeros(1, 300, dtype=torch.long))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with _Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            mean, std = attend_moments(query, key, value, regions=labels)
        (mean.sum() + std.sum()).backward()
    assert largest.numel <= max(10 * 300, 6 * n)  # a chunk of weights, or means and squares of 3 channels
    assert max(kept) <= max(6 * 300, 6 * n)
    with _Largest() as whole:
        attend(query, key, value, chunk=n)
    assert whole.numel == n * 300


def test_a_style_of_one_colour_gives_no_nan():
    query, key, _ = (x.float().requires_grad_(True) for x in _case())
    value = torch.full((2, 3, 11), 0.3, requires_grad=True)
    mean, std = attend_moments(query, key, value)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.3))
    assert std.max() <= 1.1e-5
    (mean.sum() + (std * torch.randn(std.shape, generator=_rng(0))).sum()).backward()
    for x in (query, key, value):
        assert x.grad.isfinite().all()
    torch.testing.assert_close(value.grad.sum(), torch.tensor(2 * 3 * 13.0))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_style_positions_plays_no_part(seed):
    query, key, value = _case(seed)
    log_weights, labels = _randn(2, 11, seed=seed + 3), (_labels(13, 3, seed), _labels(11, 3, seed + 1))
    order = torch.randperm(11, generator=_rng(seed))
    wanted = attend_moments(query, key, value, log_weights=log_weights, regions=labels)
    found = attend_moments(
        query, key[:, :, order], value[:, :, order], log_weights=log_weights[:, order],
        regions=(labels[0], labels[1][:, order]),
    )  # fmt: skip
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_log_weight_of_minus_infinity_removes_a_style():
    query, key, value = _case()
    log_weights = torch.cat([torch.zeros(2, 6), torch.full((2, 5), -torch.inf)], 1)
    found = attend(query, key, value, log_weights=log_weights.double())
    torch.testing.assert_close(found, attend(query, key[:, :, :6], value[:, :, :6]))
    with pytest.raises(ConfigError, match="expected a finite log-weight of at least one style position of each image"):
        attend(query, key, value, log_weights=torch.full((2, 11), -torch.inf).double())


def test_a_style_given_twice_is_that_style():
    query, key, value = _case()
    shares = torch.cat([torch.full((2, 11), math.log(w)) for w in (0.3, 0.7)], 1).double()
    found = attend(query, key.repeat(1, 1, 2), value.repeat(1, 1, 2), log_weights=shares)
    torch.testing.assert_close(found, attend(query, key, value))


def test_regions_attend_to_their_own():
    query, key, value = _case()
    labels = (_labels(13, 2, 3), _labels(11, 2, 4))
    wanted = attend(query, key, value, regions=labels)
    changed = torch.where(labels[1][:, None] == 1, value + 100, value)
    found = attend(query, key, changed, regions=labels)
    other = (labels[0] == 0)[:, None].expand_as(found)
    torch.testing.assert_close(found[other], wanted[other])
    torch.testing.assert_close(found[~other], wanted[~other] + 100)


def test_a_region_without_style_positions_attends_to_all():
    query, key, value = _case()
    here, there = torch.full((2, 13), 5), _labels(11, 3, 4)
    wanted = attend(query, key, value)
    torch.testing.assert_close(attend(query, key, value, regions=(here, there)), wanted)
    # One whose only positions are left out has none, either.
    gone = torch.zeros(2, 11).double()
    gone[:, 0] = -torch.inf
    there = torch.zeros(2, 11, dtype=torch.long)
    there[:, 0] = 5
    found = attend(query, key, value, regions=(here, there), log_weights=gone)
    torch.testing.assert_close(found, attend(query, key[:, :, 1:], value[:, :, 1:]))


def test_attention_is_not_computed_in_half_precision():
    query, key, value = (10 * x.float() for x in _case())
    wanted = attend(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attend(query, key, value), wanted)
    assert attend(query.bfloat16(), key.bfloat16(), value.bfloat16()).dtype == torch.bfloat16


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="expected a chunk of at least 1 content position, got 0"):
        attend(*_case(), chunk=0)


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    found = sampled(100, 30, _rng(1))
    assert torch.equal(found, sampled(100, 30, _rng(1)))
    assert not torch.equal(found, sampled(100, 30, _rng(2)))
    assert torch.equal(sampled(100, 30), sampled(100, 30))
    assert len(set(found.tolist())) == 30
    assert set(found.tolist()) <= set(range(100))
    assert torch.equal(before, torch.get_rng_state())
    assert sampled(100, None) is None
    assert sampled(30, 30) is None
    with pytest.raises(ConfigError, match="expected at least 1 style position to be kept, got most=0"):
        sampled(100, 0)


# Modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, 3])
def test_adaattn_is_the_formula(inner):
    module = AdaAttN(6, 9, inner).double()
    assert module.f.out_channels == module.g.out_channels == (inner or 9)
    given = _randn(2, 6, 4, 5), _randn(2, 6, 3, 7, seed=1), _randn(2, 9, 4, 5, seed=2), _randn(2, 9, 3, 7, seed=3)
    torch.testing.assert_close(module(*given), _plain_adaattn(module, *given))


@pytest.mark.parametrize("inner", [None, 3])
def test_sanet_is_the_formula(inner):
    module = SANet(6, inner).double()
    content, style = _randn(2, 6, 4, 5), _randn(2, 6, 3, 7, seed=1)
    found = module(content, style, normalised(content), normalised(style))
    torch.testing.assert_close(found, _plain_sanet(module, content, style))


def _level(content: list[Tensor], style: list[Tensor], index: int, *, shallower: bool) -> Level:
    keys = (key_of(content, index), key_of(style, index))
    if not shallower:
        keys = (normalised(content[index]), normalised(style[index]))
    return Level(content[index], keys[0], style[index], keys[1], None, None)


def test_pairs_add_the_doubled_coarser_map_and_convolve():
    content, style = _maps(32, 48), _maps(40, 30, seed=1)
    pair = AttentionPair(CHANNELS).double()
    modules = {3: pair.attn_adain_4_1, 4: pair.attn_adain_5_1}
    four, five = (
        _plain_adaattn(modules[i], content[i], style[i], key_of(content, i), key_of(style, i)) for i in (3, 4)
    )
    levels = [_level(content, style, i, shallower=True) for i in (3, 4)]
    torch.testing.assert_close(pair(*levels), _plain_merged(pair.merge_conv, four, five))

    pair = SANetPair(10).double()
    four, five = _plain_sanet(pair.sanet4_1, content[3], style[3]), _plain_sanet(pair.sanet5_1, content[4], style[4])
    levels = [_level(content, style, i, shallower=False) for i in (3, 4)]
    torch.testing.assert_close(pair(*levels), _plain_merged(pair.merge_conv, four, five))


@pytest.mark.parametrize("beside", [0, 7])
def test_the_decoder_is_the_published_one(beside):
    decoder = Decoder(10, (4, 6, 8), beside).double()
    x, second = _randn(2, 10, 3, 5), _randn(2, 7, 6, 10, seed=1) if beside else None
    found = decoder(x, [(6, 10), (12, 20), (24, 40)], second)
    assert found.shape == (2, 3, 24, 40)
    torch.testing.assert_close(found, _plain_decoder(decoder, x, second))


def test_the_decoders_channels_are_the_published_ones():
    with torch.device("meta"):
        found = [(conv.in_channels, conv.out_channels) for conv in Decoder(512, (64, 128, 256), 256).convs]
    assert found == [
        (512, 256), (512, 256), (256, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64), (64, 3),
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), up=st.booleans())
def test_doubling_undoes_halving_of_either_kind(height, width, up):
    """The value of a cell is that of the pixel whose half it is; a pixel that no cell covers has its neighbour's."""
    rows, cols = (max(1, (side + up) // 2) for side in (height, width))
    x = _randn(1, 2, rows, cols)
    found = doubled(x, (height, width))
    assert found.shape == (1, 2, height, width)
    for row in range(height):
        for col in range(width):
            assert torch.equal(found[:, :, row, col], x[:, :, min(row // 2, rows - 1), min(col // 2, cols - 1)])


def test_maps_that_do_not_halve_are_refused():
    with pytest.raises(
        ShapeError, match=r"expected maps that halve from level to level, got one of \(4, 4\) below one of"
    ):
        doubled(torch.zeros(1, 1, 4, 4), (8, 10))


# Whole networks -------------------------------------------------------------------------------------------------------


def test_adain_decodes_the_renormalised_map():
    content, style, network = _maps(16, 24, batch=2), _maps(40, 24, seed=1), _network("adain")
    mean, std = style[3].flatten(2).mean(2), (style[3].flatten(2).var(2) + 1e-5).sqrt()
    stylised = _plain_normalised(content[3]) * std[:, :, None, None] + mean[:, :, None, None]
    torch.testing.assert_close(network(content, style), _plain_decoder(network.decoder, stylised))


def test_sanet_decodes_the_fused_map():
    content, style, network = _maps(32, 48), _maps(40, 24, seed=1), _network("sanet")
    pair = network.transformer
    four, five = _plain_sanet(pair.sanet4_1, content[3], style[3]), _plain_sanet(pair.sanet5_1, content[4], style[4])
    wanted = _plain_decoder(network.decoder, _plain_merged(pair.merge_conv, four, five))
    torch.testing.assert_close(network(content, style), wanted)


def test_adaattn_decodes_the_fused_map_with_that_of_relu3_1_beside_it():
    content, style, network = _maps(32, 48), _maps(40, 24, seed=1), _network("adaattn")
    pair = network.transformer
    modules = {2: network.adaattn_3, 3: pair.attn_adain_4_1, 4: pair.attn_adain_5_1}
    three, four, five = (
        _plain_adaattn(modules[i], content[i], style[i], key_of(content, i), key_of(style, i)) for i in modules
    )
    wanted = _plain_decoder(network.decoder, _plain_merged(pair.merge_conv, four, five), three)
    torch.testing.assert_close(network(content, style), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (23, 37), (31, 29), (64, 33)])
@torch.no_grad()
def test_images_have_the_contents_size(method, up, size):
    network = _network(method, widths=(3, 5, 7), inner=2)
    found = network(_maps(*size, up=up), _maps(25, 19, seed=1, up=up))
    assert found.shape == (1, 3, *size)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_batch_is_its_images_one_by_one(method):
    content, style, network = _maps(17, 24, batch=2), _maps(19, 33, seed=1, batch=2), _network(method)
    together = network(content, style)
    for item in range(2):
        wanted = network([x[item : item + 1] for x in content], [x[item : item + 1] for x in style])
        torch.testing.assert_close(together[item : item + 1], wanted)
    first = [x[:1] for x in style]
    torch.testing.assert_close(network(content, first), network(content, [x.expand(2, -1, -1, -1) for x in first]))


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_strength_goes_from_the_content_as_its_own_style_to_the_style(method):
    content, style, network = _maps(17, 24), _maps(19, 33, seed=1), _network(method)
    torch.testing.assert_close(network(content, style, strength=0.0), network(content, content))
    assert not torch.allclose(network(content, style), network(content, content))
    tops = []
    network.decoder.register_forward_pre_hook(lambda _, given: tops.append(given[0]))
    for strength in (0.0, 0.25, 1.0):
        network(content, style, strength=strength)
    torch.testing.assert_close(tops[1], 0.75 * tops[0] + 0.25 * tops[2])
    if method == "adain":
        torch.testing.assert_close(tops[0], content[3])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_styles_are_blended_by_their_weights(method):
    content, a, b, network = _maps(17, 24), _maps(19, 33, seed=1), _maps(24, 20, seed=2), _network(method)
    alone = network(content, a)
    torch.testing.assert_close(network(content, [Style(a)]), alone)
    torch.testing.assert_close(network(content, [Style(a, 0.2), Style(a, 3.0)]), alone)
    torch.testing.assert_close(network(content, [Style(a, 2.0), Style(b, 0.0)]), alone)
    torch.testing.assert_close(network(content, [Style(a), Style(b, 1e-12)]), alone, rtol=1e-4, atol=1e-6)
    both = network(content, [Style(a, 1.0), Style(b, 2.0)])
    torch.testing.assert_close(network(content, [Style(b, 4.0), Style(a, 2.0)]), both)
    assert not torch.allclose(both, alone)


@torch.no_grad()
def test_adain_blends_means_of_stylised_features():
    content, a, b, network = _maps(16, 24), _maps(19, 33, seed=1), _maps(24, 20, seed=2), _network("adain")
    stylised = 0.25 * adain(content[3], a[3]) + 0.75 * adain(content[3], b[3])
    found = network(content, [Style(a, 1.0), Style(b, 3.0)])
    torch.testing.assert_close(found, _plain_decoder(network.decoder, stylised))


@pytest.mark.parametrize("method", ["adaattn", "sanet"])
@torch.no_grad()
def test_a_style_does_not_count_more_for_being_larger(method):
    """A level at which a style shows the same positions several times gives them the same share as once."""
    content, a, b = _maps(17, 24), _maps(16, 32, seed=1), _maps(24, 20, seed=2)
    shown = [Style(a, 1.0), Style(b, 1.0)]
    scene = stylizing.Scene(content, shown)
    level = scene.level(3, shallower=False)
    shares = level.log_weights.exp()
    count = a[3].shape[2] * a[3].shape[3]
    torch.testing.assert_close(shares[:, :count].sum(), torch.tensor(1.0))
    torch.testing.assert_close(shares[:, count:].sum(), torch.tensor(1.0))
    assert _network(method)(content, shown).shape == (1, 3, 17, 24)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_one_region_of_two_styles_takes_its_own(method):
    content, a, b, network = _maps(17, 24), _maps(19, 33, seed=1), _maps(24, 20, seed=2), _network(method)
    regions = torch.full((1, 5, 7), 3)
    styles = [Style(a, regions=3), Style(b, regions=torch.full((1, 8, 8), 4))]
    torch.testing.assert_close(network(content, styles, regions=regions), network(content, a))
    # Without any style of its own, a region takes all of them.
    torch.testing.assert_close(
        network(content, styles, regions=torch.zeros_like(regions)), network(content, [Style(a), Style(b)])
    )


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_regions_keep_styles_apart(method):
    """What one region's style looks like does not change the stylised map in the other region."""
    content, a, b, network = _maps(64, 64), _maps(32, 32, seed=1), _maps(32, 32, seed=2), _network(method)
    regions = torch.zeros(1, 2, 2, dtype=torch.long)
    regions[:, :, 1] = 1
    tops = []
    network.decoder.register_forward_pre_hook(lambda _, given: tops.append(given[0]))
    for second in (b, _maps(32, 32, seed=3)):
        network(content, [Style(a, regions=0), Style(second, regions=1)], regions=regions)
    # The convolution behind the attention mixes one cell of the border with the other region.
    torch.testing.assert_close(tops[0][..., :3], tops[1][..., :3])
    assert not torch.allclose(tops[0][..., 4:], tops[1][..., 4:])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_style_without_weight_has_no_region_either(method):
    content, a, b, network = _maps(17, 24), _maps(19, 33, seed=1), _maps(24, 20, seed=2), _network(method)
    regions = torch.ones(1, 5, 7, dtype=torch.long)
    found = network(content, [Style(a, 1.0, 0), Style(b, 0.0, 1)], regions=regions)
    torch.testing.assert_close(found, network(content, a))


@torch.no_grad()
def test_adain_takes_statistics_of_each_region():
    content, a, b, network = _maps(32, 32, batch=2), _maps(32, 32, seed=1), _maps(32, 32, seed=2), _network("adain")
    regions = torch.zeros(2, 4, 4, dtype=torch.long)
    regions[1, :, 2:] = 1
    tops = []
    network.decoder.register_forward_pre_hook(lambda _, given: tops.append(given[0]))
    network(content, [Style(a, regions=0), Style(b, regions=1)], regions=regions)
    torch.testing.assert_close(tops[0][:1], adain(content[3][:1], a[3]))
    torch.testing.assert_close(tops[0][1:, :, :, :2], adain(content[3][1:, :, :, :2], a[3]))
    torch.testing.assert_close(tops[0][1:, :, :, 2:], adain(content[3][1:, :, :, 2:], b[3]))


@pytest.mark.parametrize("method", ["adaattn", "sanet"])
@torch.no_grad()
def test_sampled_styles_are_reproducible(method):
    content, style, network = _maps(32, 32), _maps(64, 64, seed=1), _network(method)
    before = torch.get_rng_state()
    found = network(content, style, most=20, generator=_rng(1))
    assert torch.equal(found, network(content, style, most=20, generator=_rng(1)))
    assert not torch.equal(found, network(content, style, most=20, generator=_rng(2)))
    assert torch.equal(network(content, style, most=64 * 64), network(content, style))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_a_style_picture_of_one_colour_gives_finite_images_and_gradients(method):
    vgg = vf.load_extractor("vgg_mini", size=64, device="cpu")
    taps = [f"out@relu{level}_1" for level in range(1, 6)]
    content, style = (vgg(image, taps) for image in (torch.rand(1, 3, 32, 48), torch.full((1, 3, 32, 32), 0.4)))
    maps = [[found[tap].map for tap in taps] for found in (content, style)]
    network = NETWORKS[method]([x.shape[1] for x in maps[0]], inner=16, generator=_rng(0))
    image = network(*maps)
    assert image.shape == (1, 3, *content[taps[0]].grid.network_size)
    assert image.isfinite().all()
    image.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_weights_come_from_the_generator():
    before = torch.get_rng_state()
    one, same, other = (_network("adaattn", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["decoder.convs.0.weight"], other["decoder.convs.0.weight"])
    assert not torch.equal(one["adaattn_3.f.weight"], other["adaattn_3.f.weight"])


def test_networks_are_refused_that_cannot_be_built():
    with pytest.raises(ConfigError, match=r"expected 5 channels, 3 widths, and at least 1 each, got channels=\(4, 6\)"):
        NETWORKS["adain"]((4, 6))
    with pytest.raises(ConfigError, match="inner=0"):
        NETWORKS["sanet"](CHANNELS, inner=0)
    with pytest.raises(
        ConfigError, match="as many channels at relu4_1 as at relu5_1 for 'sanet', which adds them, got 8 and 9"
    ):
        NETWORKS["sanet"]((4, 5, 6, 8, 9))
    assert NETWORKS["adain"]((4, 5, 6, 8, 9)).widths == (4, 5, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strength": 1.5}, ConfigError, r"expected a strength in 0\.\.1, got 1\.5"),
        ({"weight": -1.0}, ConfigError, r"expected weights of styles of 0 or more, and one above 0, got \[-1\.0\]"),
        ({"weight": 0.0}, ConfigError, r"got \[0\.0\]"),
        ({"weight": float("nan")}, ConfigError, r"got \[nan\]"),
        ({"regions": torch.zeros(1, 4, 4).long()}, ConfigError, "expected regions of the content and of every"),
        ({"of_style": 1}, ConfigError, "expected regions of the content and of every"),
        ({"regions": torch.zeros(2, 4, 4).long(), "of_style": 1}, ShapeError, r"\(1 or 1, height, width\), got \(2"),
        ({"style": _maps(32, 32)[:4]}, ShapeError, r"five maps of a style with \(4, 6, 8, 10, 10\) channels, got"),
        ({"style": []}, ShapeError, r"expected five maps of a style .* got \(\)"),
        ({"content": _maps(32, 32)[::-1]}, ShapeError, "expected five maps of the content with"),
        ({"content": _maps(8, 32)}, ShapeError, "expected a content of at least 16×16 pixels, got 8×32"),
        ({"style": _maps(32, 32, batch=3)}, ShapeError, "one image of a style, or one for each of 1 contents, got 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_stylised_is_refused(change, error, message):
    style = Style(change.get("style", _maps(32, 32)), change.get("weight", 1.0), change.get("of_style"))
    options = {name: change[name] for name in ("strength", "regions") if name in change}
    with pytest.raises(error, match=message):
        _network("adaattn")(change.get("content", _maps(32, 32)), [style], **options)
