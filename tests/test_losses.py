"""The losses: both forms against float64, zero at equality, gradients, and what they refuse."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import ot
import pytest
import torch

import vitfeats as vf
from vitfeats.grid import Frame, PatchGrid
from vitfeats.losses import content_loss, global_style_loss, local_style_loss, moments_loss, transport_loss
from vitfeats.matching import transport_plan
from vitfeats.taps import Tap


def _descriptor(
    features: torch.Tensor, tap: str = "key@11", cls: torch.Tensor | None = None, model: str = "m"
) -> vf.Descriptor:
    batch, tokens, _ = features.shape
    grid = PatchGrid(1, tokens, 8, 8)
    frames = tuple(Frame(grid.network_size, grid.network_size) for _ in range(batch))
    return vf.Descriptor(features, grid, frames, Tap.parse(tap), model, cls)


def _naive_structure(k: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The published loss, written out: cosine similarity of every pair of rows, mean squared difference."""
    total = torch.zeros((), dtype=k.dtype)
    n = k.shape[0]
    for i in range(n):
        for j in range(n):
            mine = (k[i] @ k[j]) / (k[i].norm() * k[j].norm())
            theirs = (t[i] @ t[j]) / (t[i].norm() * t[j].norm())
            total = total + (mine - theirs) ** 2
    return total / n**2


@pytest.mark.parametrize("form", ["matrix", "factored", "auto"])
def test_structure_loss_equals_the_formula_with_and_without_cls(form):
    generator = torch.Generator().manual_seed(0)
    k, t = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = vf.structure_loss(_descriptor(k[None]), _descriptor(t[None]), form=form)
    torch.testing.assert_close(plain, _naive_structure(k, t))
    # CLS in front counts as one more token.
    a = _descriptor(k[None, 1:], cls=k[None, 0])
    b = _descriptor(t[None, 1:], cls=t[None, 0])
    torch.testing.assert_close(vf.structure_loss(a, b, form=form), _naive_structure(k, t))
    only_one = vf.structure_loss(a, _descriptor(t[None, 1:]), form=form)
    torch.testing.assert_close(only_one, _naive_structure(k[1:], t[1:]))
    norm = vf.structure_loss(a, b, form=form, reduction="norm")
    torch.testing.assert_close(norm, (_naive_structure(k, t) * 81).sqrt())


def test_structure_loss_of_a_batch_is_the_mean_of_its_images():
    k, t = torch.randn(3, 9, 5), torch.randn(3, 9, 5)
    both = vf.structure_loss(_descriptor(k), _descriptor(t))
    each = torch.stack([vf.structure_loss(_descriptor(k[i : i + 1]), _descriptor(t[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(both, each.mean())


def _pair_at(mse: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 (k, t), 785 tokens of 384, whose structure loss is ``mse``: found by bisection on the noise."""
    # Tokens of a real image are much alike: a common part, some shared directions, a little of their own.
    common = torch.randn(1, 384, generator=generator, dtype=torch.float64)
    basis = torch.randn(20, 384, generator=generator, dtype=torch.float64)
    t = common + torch.randn(785, 20, generator=generator, dtype=torch.float64) @ basis / 3
    noise = torch.randn(785, 384, generator=generator, dtype=torch.float64)
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(_loss(t + middle * noise, t, "matrix")) < mse else (low, middle)
    return t + high * noise, t


def _loss(k: torch.Tensor, t: torch.Tensor, form: str) -> torch.Tensor:
    return vf.structure_loss(_descriptor(k[None]), _descriptor(t[None]), form=form)


def _value_and_gradient(k: torch.Tensor, t: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = k.clone().requires_grad_()
    value = _loss(leaf, t, form)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("mse", [1e-2, 1e-4, 1e-6])
def test_both_forms_are_as_close_to_float64_as_the_matrix_form(mse):
    k, t = _pair_at(mse, torch.Generator().manual_seed(1))
    exact_value, exact_gradient = _value_and_gradient(k, t, "matrix")
    assert float(exact_value) == pytest.approx(mse, rel=1e-6)
    errors: dict[str, tuple[float, float]] = {}
    for form in ("matrix", "factored"):
        # Noise of rounding is one draw of many: take it over several roundings of the same numbers.
        values, gradients = [], []
        for scale in (1.0, 1.1, 1.3, 1.7, 1.9):  # cosine similarity does not see a common factor; rounding does
            value, gradient = _value_and_gradient((k * scale).float(), (t * scale).float(), form)
            values.append(float((value.double() - exact_value).abs() / exact_value))
            difference = (gradient.double() * scale - exact_gradient).norm() / exact_gradient.norm()
            gradients.append(float(difference))
        errors[form] = (max(values), max(gradients))
    print(f"MSE {mse:g}: relative error (value, gradient) matrix {errors['matrix']}, factored {errors['factored']}")
    # Half a unit in the last place of the value itself is no error that a form could be blamed for.
    floor = 2 * torch.finfo(torch.float32).eps
    assert errors["factored"][0] <= max(1.5 * errors["matrix"][0], floor)
    assert errors["factored"][1] <= max(1.5 * errors["matrix"][1], floor)


def test_auto_makes_no_token_by_token_matrix_where_tokens_outnumber_channels():
    k, t = torch.randn(1, 60, 4), torch.randn(1, 60, 4)
    shapes: set[tuple[int, ...]] = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.add(tuple(out.shape))
            return out

    with Watch():
        vf.structure_loss(_descriptor(k), _descriptor(t))
    assert (1, 60, 60) not in shapes
    with Watch():
        vf.structure_loss(_descriptor(k), _descriptor(t), form="matrix")
    assert (1, 60, 60) in shapes


@pytest.mark.parametrize("loss", [vf.structure_loss, vf.identity_loss, vf.appearance_loss])
@pytest.mark.parametrize("reduction", ["mean", "norm"])
def test_zero_at_equality_with_a_finite_gradient(loss, reduction):
    tap = "token@11" if loss is vf.appearance_loss else "key@11"
    features, cls = torch.randn(2, 30, 8), torch.randn(2, 8)
    leaf = features.clone().requires_grad_()
    own = cls.clone().requires_grad_()
    value = loss(_descriptor(leaf, tap, own), _descriptor(features, tap, cls), reduction=reduction)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    value.backward()
    for gradient in (leaf.grad, own.grad):
        assert gradient is None or bool(gradient.isfinite().all())


def test_appearance_and_identity_are_mean_squared_errors():
    a, b = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    ca, cb = torch.randn(2, 8), torch.randn(2, 8)
    tokens = vf.appearance_loss(_descriptor(a, "token@11", ca), _descriptor(b, "token@11", cb))
    torch.testing.assert_close(tokens, torch.nn.functional.mse_loss(ca, cb))
    through_cls_tap = vf.appearance_loss(_descriptor(ca[:, None], "cls@11", ca), _descriptor(b, "token@11", cb))
    torch.testing.assert_close(through_cls_tap, tokens)
    keys = vf.identity_loss(_descriptor(a, cls=ca), _descriptor(b, cls=cb))
    expected = torch.nn.functional.mse_loss(torch.cat([ca[:, None], a], 1), torch.cat([cb[:, None], b], 1))
    torch.testing.assert_close(keys, expected)
    norm = vf.appearance_loss(_descriptor(a, "token@11", ca), _descriptor(b, "token@11", cb), reduction="norm")
    torch.testing.assert_close(norm, (ca - cb).norm(dim=1).mean())


@pytest.mark.usefixtures("as_a_user")
def test_what_they_refuse():
    a = _descriptor(torch.randn(1, 6, 8), cls=torch.randn(1, 8))
    token = _descriptor(torch.randn(1, 6, 8), "token@11", torch.randn(1, 8))
    for loss in (vf.structure_loss, vf.identity_loss):
        with pytest.raises(vf.ConfigError, match="one tap of one model in both, got key@11 of m and key@9 of m"):
            loss(a, replace(a, tap=Tap("key", 9)))
        with pytest.raises(vf.ConfigError, match="got key@11 of m and key@11 of other"):
            loss(a, replace(a, model="other"))
        with pytest.raises(vf.ShapeError, match=r"got \(1, 6, 8\) and \(1, 7, 8\); resize one image"):
            loss(a, _descriptor(torch.randn(1, 7, 8)))
        with pytest.raises(vf.ConfigError, match="reduction 'mean' or 'norm', got 'sum'"):
            loss(a, a, reduction="sum")
    with pytest.raises(vf.ConfigError, match="form 'auto', 'matrix' or 'factored', got 'gram'"):
        vf.structure_loss(a, a, form="gram")
    with pytest.raises(vf.ConfigError, match="taps 'cls' or 'token' for appearance_loss, got 'key@11'"):
        vf.appearance_loss(a, a)
    with pytest.raises(vf.ShapeError, match="with a CLS token, but m has none"):
        vf.appearance_loss(replace(token, cls=None), token)
    with pytest.raises(vf.ConfigError, match="one model and layer, got token@11 of m and token@9 of m"):
        vf.appearance_loss(token, replace(token, tap=Tap("token", 9)))
    with pytest.raises(vf.ShapeError, match="as many images in both, got 1 and 2"):
        vf.appearance_loss(token, _descriptor(torch.randn(2, 6, 8), "token@11", torch.randn(2, 8)))


def test_gradients_flow_from_the_image_through_the_network(mini):
    image = torch.rand(1, 3, 112, 112, requires_grad=True)
    target = mini(torch.rand(1, 3, 112, 112), ["key@11", "cls@11"])
    made = mini(image, ["key@11", "cls@11"])
    loss = vf.structure_loss(made["key@11"], target["key@11"])
    loss = loss + 10 * vf.appearance_loss(made["cls@11"], target["cls@11"])
    loss = loss + vf.identity_loss(made["key@11"], target["key@11"])
    (gradient,) = torch.autograd.grad(loss, image)
    assert float(gradient.abs().max()) > 0


# Sets of tokens ------------------------------------------------------------------------------------------------------


def _tokens(seed: int, n: int = 12, dim: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, dim, generator=generator, dtype=torch.float64) * 2 + 1


def _transport(out: torch.Tensor, target: torch.Tensor, **settings) -> torch.Tensor:
    return transport_loss(_descriptor(out, "token@2"), _descriptor(target, "token@2"), **settings)


def test_moments_are_those_of_numpy():
    a, b = _tokens(0, 12), _tokens(1, 20)
    value = float(moments_loss(_descriptor(a), _descriptor(b)))
    (x, y) = a[0].numpy(), b[0].numpy()
    means = ((x.mean(0) - y.mean(0)) ** 2).sum() / (y.mean(0) ** 2).sum()
    covariances = ((np.cov(x.T) - np.cov(y.T)) ** 2).sum() / (np.cov(y.T) ** 2).sum()
    assert value == pytest.approx(means + covariances, rel=1e-10)


def test_moments_are_equal_for_equal_tokens_wherever_they_lie():
    a, b = _tokens(0), _tokens(1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert float(moments_loss(_descriptor(a), _descriptor(a))) == 0
    assert float(moments_loss(_descriptor(a), _descriptor(a[:, order]))) < 1e-20
    torch.testing.assert_close(
        moments_loss(_descriptor(a[:, order]), _descriptor(b)), moments_loss(_descriptor(a), _descriptor(b))
    )
    # Of a batch it is the mean; a common factor of both does not matter.
    both = moments_loss(_descriptor(torch.cat([a, b])), _descriptor(torch.cat([b, a])))
    one, other = moments_loss(_descriptor(a), _descriptor(b)), moments_loss(_descriptor(b), _descriptor(a))
    torch.testing.assert_close(both, (one + other) / 2)
    torch.testing.assert_close(moments_loss(_descriptor(3 * a), _descriptor(3 * b)), one)


def test_moments_have_a_gradient_also_at_equality_and_for_constant_tokens():
    for a, b in ((_tokens(0), _tokens(0)), (_tokens(0), torch.ones(1, 9, 5)), (_tokens(0), torch.zeros(1, 9, 5))):
        leaf = a.float().clone().requires_grad_()
        value = moments_loss(_descriptor(leaf), _descriptor(b.float()))
        value.backward()
        assert bool(value.isfinite())
        assert bool(leaf.grad.isfinite().all())


def test_transport_of_equal_tokens_costs_nearly_nothing():
    a = _tokens(0)
    costs = [float(_transport(a, a, epsilon=epsilon)) for epsilon in (0.2, 0.05, 0.002)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 1e-4
    assert 1 < float(_transport(_tokens(1, 200, 50), _tokens(2, 200, 50), epsilon=1.0)) < 3, "strangers cost about 2"


def test_without_places_the_order_of_tokens_does_not_matter():
    a, b = _tokens(0), _tokens(1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    plain = _transport(a, b, place=0)
    torch.testing.assert_close(_transport(a, b[:, order], place=0), plain)
    torch.testing.assert_close(_transport(a[:, order], b, place=0), plain)
    # With places, what lies elsewhere is dearer to reach than what lies at the same place.
    assert float(_transport(a, a.flip(1), place=50.0)) > float(_transport(a, a, place=50.0)) + 0.5
    torch.testing.assert_close(_transport(3 * a + 7, 3 * b + 7), _transport(a, b))  # in units of the target's spread


def _written_out(a: torch.Tensor, b: torch.Tensor, place: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (cost of each pair in units of the target's variance, cost that the plan minimises)."""
    x, y = a[0].numpy(), b[0].numpy()
    cost = ((x[:, None] - y[None]) ** 2).mean(2) / y.var(0).mean()
    across, across_y = (np.arange(n)[:, None] / n + 0.5 / n for n in (len(x), len(y)))  # one row of tokens
    return cost, cost / cost.mean() + place * (across - across_y.T) ** 2


@pytest.mark.parametrize("place", [0.0, 4.0])
def test_transport_is_that_of_the_peer(place):
    a, b = _tokens(0, 7), _tokens(1, 9)
    cost, whole = _written_out(a, b, place)
    plan = ot.sinkhorn(np.full(7, 1 / 7), np.full(9, 1 / 9), whole, 0.2, numItermax=5000, stopThr=1e-12)
    assert float(_transport(a, b, place=place, epsilon=0.2)) == pytest.approx((plan * cost).sum(), rel=1e-4)
    # With little entropy it comes near the exact plan, above which no plan can fall.
    exact = (ot.emd(np.full(7, 1 / 7), np.full(9, 1 / 9), whole) * cost).sum()
    if place == 0:
        assert exact - 1e-6 < float(_transport(a, b, place=0.0, epsilon=0.02)) < 1.1 * exact


def test_the_gradient_of_transport_is_that_of_its_fixed_plan():
    a, b = _tokens(0, 6, 4), _tokens(1, 8, 4)
    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_transport(leaf, b), leaf)
    _, whole = _written_out(a, b, 4.0)
    plan = transport_plan(-torch.from_numpy(whole), epsilon=0.05).numpy()

    def fixed(x: torch.Tensor) -> float:
        return float((plan * _written_out(x, b, 4.0)[0]).sum())

    for token, channel in ((0, 0), (2, 3), (5, 1)):
        step = torch.zeros_like(a)
        step[0, token, channel] = 1e-5
        slope = (fixed(a + step) - fixed(a - step)) / 2e-5
        assert float(gradient[0, token, channel]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_transport_has_a_gradient_also_at_equality_and_for_constant_tokens():
    constant = torch.ones(1, 6, 5)
    for a, b in ((_tokens(0), _tokens(0)), (constant, constant), (_tokens(0), constant), (constant, _tokens(0))):
        leaf = a.float().clone().requires_grad_()
        value = _transport(leaf, b.float())
        value.backward()
        assert bool(value.isfinite())
        assert bool(leaf.grad.isfinite().all())


def test_following_the_gradient_of_either_brings_the_tokens_together():
    target = _descriptor(_tokens(1, 16).float(), "token@2")
    for loss in (moments_loss, partial(transport_loss, epsilon=0.01)):
        leaf = _tokens(0, 16).float().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=0.1)
        values = []
        for _ in range(60):
            value = loss(_descriptor(leaf, "token@2"), target)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
        assert values[-1] < 0.1 * values[0]


@pytest.mark.usefixtures("as_a_user")
def test_what_losses_of_token_sets_refuse():
    a, b = _descriptor(torch.randn(1, 6, 8)), _descriptor(torch.randn(1, 9, 8))
    for loss in (moments_loss, transport_loss):
        loss(a, b)  # grids may differ
        with pytest.raises(vf.ConfigError, match="one tap of one model in both, got key@11 of m and key@9 of m"):
            loss(a, replace(b, tap=Tap("key", 9)))
        with pytest.raises(vf.ConfigError, match="got key@11 of m and key@11 of other"):
            loss(a, replace(b, model="other"))
        with pytest.raises(
            vf.ShapeError, match=r"as many images and channels in both, .*got \(1, 6, 8\) and \(2, 6, 8\)"
        ):
            loss(a, _descriptor(torch.randn(2, 6, 8)))
        with pytest.raises(vf.ShapeError, match=r"got \(1, 6, 8\) and \(1, 6, 7\)"):
            loss(a, _descriptor(torch.randn(1, 6, 7)))
    with pytest.raises(vf.ShapeError, match=r"and at least 2 tokens, got \(1, 6, 8\) and \(1, 1, 8\)"):
        moments_loss(a, _descriptor(torch.randn(1, 1, 8)))
    for place in (-1.0, float("nan")):
        with pytest.raises(vf.ConfigError, match=f"expected place of at least 0, got {place}"):
            transport_loss(a, b, place=place)
    with pytest.raises(vf.ConfigError, match="expected epsilon above 0, got 0"):
        transport_loss(a, b, epsilon=0)


# Style transfer ------------------------------------------------------------------------------------------------------


def _content(a: torch.Tensor, b: torch.Tensor, **settings) -> torch.Tensor:
    return content_loss(_descriptor(a, "out@relu4_1"), _descriptor(b, "out@relu4_1"), **settings)


def _global(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return global_style_loss(_descriptor(a, "out@relu4_1"), _descriptor(b, "out@relu4_1"))


def _local(a: torch.Tensor, content: torch.Tensor, style: torch.Tensor, **settings) -> torch.Tensor:
    return local_style_loss(*(_descriptor(x, "out@relu4_1") for x in (a, content, style)), **settings)


def _standard(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5)


def _local_target(content: np.ndarray, style: np.ndarray) -> np.ndarray:
    """AdaAttN without learned convolutions, a token and a channel at a time."""
    queries, keys = _standard(content), _standard(style)
    made = np.empty_like(content)
    for i, query in enumerate(queries):
        weights = np.exp([query @ key for key in keys])
        weights /= weights.sum()
        for channel in range(content.shape[1]):
            mean = sum(w * value for w, value in zip(weights, style[:, channel], strict=True))
            variance = sum(w * (value - mean) ** 2 for w, value in zip(weights, style[:, channel], strict=True))
            made[i, channel] = np.sqrt(variance) * query[channel] + mean
    return made


def test_content_is_compared_place_by_place_with_and_without_its_statistics():
    a, b = _tokens(0), _tokens(1)
    x, y = a[0].numpy(), b[0].numpy()
    assert float(_content(a, b)) == pytest.approx(((_standard(x) - _standard(y)) ** 2).mean(), rel=1e-10)
    assert float(_content(a, b, normalise=False)) == pytest.approx(((x - y) ** 2).mean(), rel=1e-10)
    # A factor and a shift of each channel are style: they do not count, unless tokens are compared as they are.
    factors = torch.tensor([0.5, 2.0, 3.0, 10.0, 1.0], dtype=torch.float64)
    assert float(_content(a * factors - 4, a)) < 1e-9
    assert float(_content(a * factors - 4, a, normalise=False)) > 1
    assert float(_content(a.flip(1), a)) > 0.5
    both = _content(torch.cat([a, b]), torch.cat([b, b]))
    torch.testing.assert_close(both, _content(a, b) / 2)


def test_global_style_is_the_means_and_deviations_of_numpy():
    a, b = _tokens(0, 12), _tokens(1, 20)
    x, y = a[0].numpy(), b[0].numpy()
    means = ((x.mean(0) - y.mean(0)) ** 2).mean()
    deviations = ((np.sqrt(x.var(0, ddof=1) + 1e-5) - np.sqrt(y.var(0, ddof=1) + 1e-5)) ** 2).mean()
    assert float(_global(a, b)) == pytest.approx(means + deviations, rel=1e-10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert float(_global(a, a[:, order])) < 1e-20
    both = _global(torch.cat([a, a]), torch.cat([a, a.flip(2)]))
    torch.testing.assert_close(both, _global(a, a.flip(2)) / 2)


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_local_style_is_the_formula_written_out(spread):
    a, content, style = _tokens(0, 9), _tokens(1, 9), _tokens(2, 14) * spread
    target = _local_target(content[0].numpy(), style[0].numpy())
    assert float(_local(a, content, style)) == pytest.approx(((a[0].numpy() - target) ** 2).mean(), rel=1e-9)
    assert float(_local(torch.from_numpy(target)[None], content, style)) < 1e-20
    # Of a batch it is the mean.
    both = _local(torch.cat([a, content]), torch.cat([content, a]), torch.cat([style, style]))
    torch.testing.assert_close(both, (_local(a, content, style) + _local(content, a, style)) / 2)


def test_local_style_does_not_depend_on_the_order_of_the_styles_tokens_nor_on_the_chunks(monkeypatch):
    a, content, style = _tokens(0, 30), _tokens(1, 30), _tokens(2, 40)
    whole = _local(a, content, style)
    torch.testing.assert_close(_local(a, content, style.flip(1)), whole)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                largest = max(largest, tensor.numel()) if isinstance(tensor, torch.Tensor) else largest
            return out

    monkeypatch.setattr("vitfeats.nets.adaattn.ATTENTION_BYTES", 4 * 40 * 8)  # four rows of attention
    with Watch():
        torch.testing.assert_close(_local(a, content, style), whole)
    assert largest < 30 * 40
    monkeypatch.undo()
    with Watch():
        _local(a, content, style)
    assert largest == 30 * 40


def test_the_draw_of_the_styles_tokens_is_its_seeds():
    a, content, style = _tokens(0), _tokens(1), _tokens(2, 50)
    state = torch.get_rng_state()
    few = [float(_local(a, content, style, most=10, seed=seed)) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert torch.equal(torch.get_rng_state(), state)
    every = float(_local(a, content, style, most=None))
    assert every == float(_local(a, content, style, most=50)) == float(_local(a, content, style)) != few[0]
    # A single token is the whole target: attention to it, without a deviation.
    (chosen,) = (x for x in range(50) if float(_local(style[:, [x] * 12], content, style, most=1, seed=3)) < 1e-8)
    assert float(_local(a, content, style, most=1, seed=3)) == pytest.approx(
        float((a - style[:, [chosen]]).square().mean())
    )


def test_local_style_far_from_zero_is_as_exact_as_near_it():
    a, content, style = (_tokens(seed, 12) for seed in range(3))
    exact = float(_local(a, content, style))
    assert float(_local((a + 3000).float(), content.float(), (style + 3000).float())) == pytest.approx(exact, rel=1e-3)


def test_only_what_is_made_gets_a_gradient_from_style_transfer():
    leaves = [_tokens(seed).requires_grad_() for seed in range(3)]
    (gradient, *others) = torch.autograd.grad(_local(*leaves), leaves, allow_unused=True)
    assert float(gradient.abs().max()) > 0
    assert others == [None, None]


def test_losses_of_style_transfer_have_a_gradient_also_for_one_colour_and_a_single_token():
    constant, several = torch.ones(1, 12, 5), _tokens(0).float()
    single = torch.ones(1, 1, 5)
    for made, target in itertools.product((constant, several, several + 1), repeat=2):
        for value_of in (
            lambda x, y: _content(x, y),
            lambda x, y: _global(x, y),
            lambda x, y: _global(x, y[:, :1]),
            lambda x, y: _global(x[:, :1], y),
            lambda x, y: _local(x, y, y),
            lambda x, y: _local(x, y, constant),
            lambda x, y: _local(x, y, single),
            lambda x, y: _local(x[:, :1], y[:, :1], y),
        ):
            leaf = made.clone().requires_grad_()
            value = value_of(leaf, target)
            value.backward()
            assert bool(value.isfinite())
            assert bool(leaf.grad.isfinite().all())


def test_following_the_gradient_of_either_style_brings_it_about():
    content, style = _tokens(0, 16).float(), _tokens(1, 20).float() + 2
    for loss in (_global, lambda x, y: _local(x, content, y)):
        leaf = content.clone().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=0.2)
        values = []
        for _ in range(100):
            value = loss(leaf, style)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
        assert values[-1] < 0.1 * values[0]


@pytest.mark.usefixtures("as_a_user")
def test_what_losses_of_style_transfer_refuse():
    a, b = _descriptor(torch.randn(1, 6, 8)), _descriptor(torch.randn(1, 9, 8))
    global_style_loss(a, b)  # grids may differ
    local_style_loss(a, a, b)
    calls = {
        "content": content_loss,
        "global": global_style_loss,
        "content of local": lambda out, target: local_style_loss(out, target, b),
        "style of local": lambda out, target: local_style_loss(out, a, target),
    }
    for name, loss in calls.items():
        with pytest.raises(vf.ConfigError, match="one tap of one model in both, got key@11 of m and key@9 of m"):
            loss(a, replace(a, tap=Tap("key", 9)))
        with pytest.raises(vf.ConfigError, match="got key@11 of m and key@11 of other"):
            loss(a, replace(a, model="other"))
        places = name.startswith("content")
        message = "descriptors of one shape .*" if places else "as many images and channels in both, .*"
        with pytest.raises(vf.ShapeError, match=message + r"got \(1, 6, 8\) and \(2, 6, 8\)"):
            loss(a, _descriptor(torch.randn(2, 6, 8)))
        with pytest.raises(vf.ShapeError, match=message + r"got \(1, 6, 8\) and \(1, 6, 7\)"):
            loss(a, _descriptor(torch.randn(1, 6, 7)))
        if places:
            with pytest.raises(vf.ShapeError, match=r"got \(1, 6, 8\) and \(1, 9, 8\); resize one image"):
                loss(a, b)
    with pytest.raises(vf.ConfigError, match="at least 1 style position to be kept, got most=0; None keeps all"):
        local_style_loss(a, a, b, most=0)
