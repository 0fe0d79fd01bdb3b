"""The head of self-distillation: its formula written out, its prototypes, and where its weights come from."""

import pytest
import torch
from scipy.special import erf

from vitfeats.nets.projection import ProjectionHead


def head(seed: int | None = 0, dim: int = 6) -> ProjectionHead:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return ProjectionHead(dim, hidden=8, bottleneck=5, prototypes=7, generator=generator)


def same(a: ProjectionHead, b: ProjectionHead) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@torch.no_grad()
def noticed(made: ProjectionHead) -> ProjectionHead:
    """Return a head whose every weight is large enough that a mistake in its use shows."""
    for number, parameter in enumerate(made.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return made


@torch.no_grad()
def test_a_head_is_the_formula():
    made, tokens = noticed(head()), torch.randn(2, 3, 6)
    x, weights = tokens.double(), [p.double() for p in made.layers.parameters()]
    for layer in range(3):
        x = x @ weights[2 * layer].T + weights[2 * layer + 1]
        if layer < 2:
            x = x * 0.5 * (1 + torch.from_numpy(erf(x.numpy() / 2**0.5)))
    prototypes = made.prototypes.double()
    wanted = torch.zeros(2, 3, 7, dtype=torch.float64)
    for number in range(7):
        one = prototypes[number]
        wanted[..., number] = (x * one).sum(-1) / (x.square().sum(-1).sqrt() * one.square().sum().sqrt())
    torch.testing.assert_close(made(tokens).double(), wanted, atol=1e-5, rtol=1e-4)
    assert float(made(100 * tokens).abs().max()) <= 1 + 1e-6


@torch.no_grad()
def test_the_length_of_a_prototype_says_nothing():
    made, tokens = noticed(head()), torch.randn(4, 6)
    before = made(tokens)
    made.prototypes.mul_(torch.rand(7, 1) * 10 + 0.1)
    torch.testing.assert_close(made(tokens), before)


def test_a_generator_is_all_that_the_weights_hang_on():
    state = torch.get_rng_state()
    assert same(head(0), head(0))
    assert not same(head(0), head(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    one = head(None)
    torch.manual_seed(3)
    assert same(one, head(None))


def test_weights_begin_small_and_prototypes_in_all_directions():
    made = ProjectionHead(64, generator=torch.Generator().manual_seed(0))
    assert made.prototypes.shape == (1024, 192)
    assert float(made.prototypes.detach().std()) == pytest.approx(1, rel=0.02)
    for layer in made.layers[::2]:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert not bool(layer.bias.any())


def test_a_head_runs_in_half_precision():
    made, tokens = noticed(head()), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = made(tokens)
        found.float().sum().backward()
    torch.testing.assert_close(found.float(), made(tokens), atol=0.05, rtol=0)
    assert made.prototypes.grad is not None
    torch.testing.assert_close(made.bfloat16()(tokens.bfloat16()).float(), found.float(), atol=0.05, rtol=0)
