"""What student and teacher are compared by: each loss against loops in double precision."""

import math

import numpy as np
import pytest
import torch

from vitfeats.apps.pretrain.objective import (
    Centre,
    at_places,
    block_masks,
    cross_entropy,
    information,
    places_loss,
    tokens_loss,
    views_loss,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=rng(seed))


def distributions(*shape: int, seed: int = 0) -> torch.Tensor:
    return (3 * noise(*shape, seed=seed)).softmax(-1)


def naive(wanted: torch.Tensor, answer: torch.Tensor, temperature: float) -> float:
    """Return the cross-entropy of one answer."""
    wanted, logits = wanted.double().numpy(), answer.double().numpy() / temperature
    logs = [float(logit) - math.log(sum(math.exp(float(other)) for other in logits)) for logit in logits]
    return -sum(float(p) * log for p, log in zip(wanted, logs, strict=True))


def test_cross_entropy_is_the_naive_formula():
    wanted, answers = distributions(2, 3, 5), noise(2, 3, 5, seed=1)
    found = cross_entropy(wanted, answers, 0.1)
    assert found.shape == (2, 3)
    for row in range(2):
        for col in range(3):
            assert float(found[row, col]) == pytest.approx(naive(wanted[row, col], answers[row, col], 0.1), rel=1e-5)


def test_cross_entropy_is_least_where_the_student_says_the_same():
    answers = noise(4, 6).requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy((answers.detach() / 0.5).softmax(-1), answers, 0.5).sum(), answers)
    torch.testing.assert_close(slope, torch.zeros(4, 6), atol=1e-6, rtol=0)


def test_the_loss_of_views_leaves_out_the_crop_that_both_see():
    wanted, answers = distributions(2, 3, 5), noise(4, 3, 5, seed=1)
    pairs = [(first, second) for first in range(2) for second in range(4) if first != second]
    each = [naive(wanted[a, n], answers[b, n], 0.2) for a, b in pairs for n in range(3)]
    assert len(each) == 6 * 3
    assert float(views_loss(wanted, answers, 0.2)) == pytest.approx(np.mean(each), rel=1e-5)
    two = views_loss(wanted, answers[:2], 0.2)
    each = [naive(wanted[a, n], answers[1 - a, n], 0.2) for a in range(2) for n in range(3)]
    assert float(two) == pytest.approx(np.mean(each), rel=1e-5)


def test_the_loss_of_tokens_is_a_mean_over_images_of_means_over_those_chosen():
    wanted, answers = distributions(4, 6, 5), noise(4, 6, 5, seed=1)
    chosen = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1], [0] * 6, [1] * 6], dtype=torch.bool)
    means = [
        np.mean([naive(wanted[n, t], answers[n, t], 0.3) for t in range(6) if chosen[n, t]])
        for n in range(4)
        if chosen[n].any()
    ]
    assert len(means) == 3
    assert float(tokens_loss(wanted, answers, chosen, 0.3)) == pytest.approx(np.mean(means), rel=1e-5)


def test_without_a_token_chosen_there_is_no_loss_but_a_gradient():
    answers = noise(2, 4, 5).requires_grad_()
    loss = tokens_loss(distributions(2, 4, 5), answers, torch.zeros(2, 4, dtype=torch.bool), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(answers.grad, torch.zeros(2, 4, 5))


def test_tokens_that_are_not_chosen_get_no_gradient():
    answers, chosen = noise(2, 4, 5).requires_grad_(), torch.rand(2, 4, generator=rng(3)) < 0.5
    tokens_loss(distributions(2, 4, 5), answers, chosen, 0.1).backward()
    assert torch.equal(answers.grad.abs().sum(-1) > 0, chosen)


# The teacher ----------------------------------------------------------------------------------------------------------


def test_a_patch_looks_for_its_place_among_those_of_its_image_that_are_seen():
    wanted, answers = noise(3, 5, 6, seed=4), noise(3, 5, 6, seed=5)
    chosen = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    means = []
    for image in (0, 2):
        seen, each = chosen[image].nonzero()[:, 0].tolist(), []
        for patch in seen:
            cosines = [torch.cosine_similarity(answers[image, patch], wanted[image, o], dim=0).item() for o in seen]
            powers = np.exp(np.array(cosines) / 0.3)
            each.append(-math.log(powers[seen.index(patch)] / powers.sum()))
        means.append(np.mean(each))
    answers.requires_grad_()
    loss = places_loss(wanted, answers, chosen, 0.3)
    assert float(loss.detach()) == pytest.approx(np.mean(means), rel=1e-5)
    loss.backward()
    assert answers.grad is not None
    assert answers.grad.isfinite().all()
    assert (answers.grad.abs().sum(-1) > 0).equal(chosen)


def test_a_place_is_found_again_or_is_one_of_many():
    tokens = torch.eye(7)[None]
    whole = torch.ones(1, 7, dtype=torch.bool)
    assert float(places_loss(tokens, tokens, whole, 0.01)) < 1e-6
    assert float(places_loss(torch.ones(1, 7, 4), tokens[..., :4], whole, 0.1)) == pytest.approx(math.log(7), rel=1e-5)
    nothing = places_loss(tokens, tokens.clone().requires_grad_(), ~whole, 0.1)
    assert float(nothing.detach()) == 0
    nothing.backward()


def test_the_centre_is_a_running_mean_over_all_but_the_last_axis():
    centre, wanted = Centre(5, 0.9), torch.zeros(5, dtype=torch.float64)
    for seed in range(3):
        answers = noise(2, 3, 5, seed=seed).bfloat16()
        centre.update(answers)
        wanted = 0.9 * wanted + 0.1 * answers.double().reshape(6, 5).mean(0)
    torch.testing.assert_close(centre.mean.double(), wanted, atol=1e-6, rtol=1e-5)
    assert centre.mean.dtype == torch.float32
    assert list(centre.state_dict()) == ["mean"]


def test_answers_are_centred_and_sharpened():
    centre, answers = Centre(5, 0.0), noise(4, 5)
    torch.testing.assert_close(centre.sharpened(answers, 1.0), answers.softmax(-1))
    centre.update(noise(7, 5, seed=1))
    mean = noise(7, 5, seed=1).double().mean(0)
    shifted = ((answers.double() - mean) / 0.07).exp()
    torch.testing.assert_close(
        centre.sharpened(answers, 0.07).double(), shifted / shifted.sum(1, keepdim=True), atol=1e-5, rtol=1e-4
    )
    # What is said of all pictures alike is taken off.
    assert float(centre.sharpened(centre.mean[None], 0.07).max()) == pytest.approx(1 / 5)


def test_an_update_asks_for_no_gradient():
    answers = noise(4, 5).requires_grad_()
    centre = Centre(5, 0.5)
    centre.update(answers)
    assert not centre.mean.requires_grad


def test_information_tells_both_ways_of_collapse_from_none():
    same, even, distinct = torch.eye(8)[[0] * 8], torch.full((8, 8), 1 / 8), torch.eye(8)
    assert information(same) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert information(even) == pytest.approx((math.log(8), math.log(8)), rel=1e-6)
    assert information(distinct) == pytest.approx((0.0, math.log(8)), abs=1e-6)
    each, mean = information(distributions(10, 6))
    assert 0 < each < mean < math.log(6)


# Places and masks -----------------------------------------------------------------------------------------------------


def test_at_the_centre_of_a_token_is_the_token_and_between_is_the_mean():
    tokens = noise(2, 9, 4)
    steps = torch.tensor([-2 / 3, 0, 2 / 3])
    centres = torch.stack([steps.repeat(3), steps.repeat_interleave(3)], 1).expand(2, -1, -1)
    torch.testing.assert_close(at_places(tokens, centres), tokens)
    between = torch.tensor([[-1 / 3, -2 / 3], [-2 / 3, -1 / 3], [1 / 3, 1 / 3]]).expand(2, -1, -1)
    wanted = [tokens[:, [0, 1]].mean(1), tokens[:, [0, 3]].mean(1), tokens[:, [4, 5, 7, 8]].mean(1)]
    torch.testing.assert_close(at_places(tokens, between), torch.stack(wanted, 1))
    far = torch.tensor([[-5.0, -1.0], [5.0, 5.0]]).expand(2, -1, -1)
    torch.testing.assert_close(at_places(tokens, far), tokens[:, [0, 8]])


def test_tokens_at_places_keep_their_type():
    assert at_places(noise(1, 4, 3).bfloat16(), torch.zeros(1, 5, 2)).dtype == torch.bfloat16
    assert at_places(noise(1, 4, 3), torch.zeros(1, 5, 2)).shape == (1, 5, 3)


def masks(count: int = 200, grid: int = 14, seed: int = 0, **changes) -> torch.Tensor:
    settings = {"share": (0.1, 0.5), "probability": 1.0} | changes
    return block_masks(count, grid, **settings, generator=rng(seed))


def test_masks_are_rectangles_of_the_share_asked_for():
    found = masks()
    assert found.shape == (200, 196)
    assert found.dtype == torch.bool
    shares = found.float().mean(1)
    assert 0 < float(shares.min()) < 0.15
    assert 0.3 < float(shares.max()) <= 0.56  # each side of a rectangle is rounded
    assert float(shares.min()) > 0.02  # rectangles may lie on each other
    fixed = masks(share=(0.3, 0.3)).float().mean(1)
    assert float(fixed.max()) < 0.36
    assert 0.2 < float(fixed.mean()) < 0.3


def test_a_mask_is_the_naive_painting_of_three_rectangles():
    found = masks(20, 7, probability=0.6, seed=4).unflatten(1, (7, 7))
    source = rng(4)
    drawn, chosen = torch.rand(4, 20, 3, generator=source), torch.rand(2, 20, 1, generator=source)
    for n in range(20):
        wanted = np.zeros((7, 7), bool)
        area = (0.1 + 0.4 * float(chosen[0, n])) * 49 / 3
        for block in range(3):
            stretch = 3 ** (2 * float(drawn[0, n, block]) - 1)
            rows, cols = (min(7, max(1, round(math.sqrt(area * s)))) for s in (stretch, 1 / stretch))
            top = math.floor((7 - rows + 1) * float(drawn[1, n, block]))
            left = math.floor((7 - cols + 1) * float(drawn[2, n, block]))
            wanted[top : top + rows, left : left + cols] = True
        if float(chosen[1, n]) >= 0.6:
            wanted[:] = False
        assert np.array_equal(found[n].numpy(), wanted)


def test_masks_come_as_often_as_asked_and_by_their_seed():
    assert not bool(masks(probability=0.0).any())
    assert bool(masks().any(1).all())
    assert 0.35 < float(masks(400, probability=0.5).any(1).float().mean()) < 0.65
    assert torch.equal(masks(seed=1), masks(seed=1))
    assert not torch.equal(masks(seed=1), masks(seed=2))
    assert bool(masks(5, 1).all())  # a grid of one token
    assert masks(0, 3).shape == (0, 9)
