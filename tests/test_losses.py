"""The losses: both forms against float64, zero at equality, gradients, and what they refuse."""

from dataclasses import replace

import pytest
import torch

import vitfeats as vf
from vitfeats.grid import Frame, PatchGrid
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
