"""Matching: laws, scikit-learn's exact nearest neighbours, POT's transport, and plain restatements in float64."""

import sys

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from synthetic import as_users_run, describe, random_descriptor

import vitfeats as vf
from vitfeats.errors import ConfigError, MissingDependencyError, ShapeError
from vitfeats.matching import (
    Matches,
    correspond,
    match_mutual,
    match_nearest,
    match_ratio,
    match_sinkhorn,
    top_k,
    transfer_points,
    transport_plan,
)

A = random_descriptor(0, rows=6, cols=5, source=(96, 40))
B = random_descriptor(1, rows=4, cols=7, source=(64, 112))


def centres(d, index):
    return d.frames[0].to_source(d.grid.centres_of(index))


def neighbours(of, among):
    found = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(among.features[0].numpy())
    distance, index = found.kneighbors(of.features[0].numpy())
    return 1 - distance[:, 0], index[:, 0]


def same(a: Matches, b: Matches) -> None:
    assert torch.equal(a.index_a, b.index_a)
    assert torch.equal(a.index_b, b.index_b)
    for name in ("points_a", "points_b", "scores"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-6, equal_nan=True)


def test_nearest_is_scikit_learns():
    scores, index = neighbours(A, B)
    found = match_nearest(A, B)
    assert found.index_a.tolist() == list(range(30))
    assert np.array_equal(found.index_b, index)
    assert np.allclose(found.scores, scores, atol=1e-6)
    assert torch.allclose(found.points_a, centres(A, found.index_a))
    assert torch.allclose(found.points_b, centres(B, found.index_b))


def test_mutual_is_both_ways_nearest():
    scores, there = neighbours(A, B)
    _, back = neighbours(B, A)
    mutual = np.flatnonzero(back[there] == np.arange(30))
    assert 0 < len(mutual) < 30  # so that the test distinguishes
    found = match_mutual(A, B)
    assert np.array_equal(found.index_a, mutual)
    assert np.array_equal(found.index_b, there[mutual])
    assert np.allclose(found.scores, scores[mutual], atol=1e-6)
    assert torch.allclose(found.points_b, centres(B, found.index_b))


def test_mutual_matches_are_symmetric():
    forth, back = match_mutual(A, B), match_mutual(B, A)
    pairs = set(zip(forth.index_a.tolist(), forth.index_b.tolist(), strict=True))
    assert pairs == set(zip(back.index_b.tolist(), back.index_a.tolist(), strict=True))


def test_unmatched_rows_are_kept_on_request():
    kept, only = match_mutual(A, B, keep_unmatched=True), match_mutual(A, B)
    assert kept.index_a.tolist() == list(range(30))
    matched = kept.index_b >= 0
    same(kept[matched], only)
    assert (kept.index_b[~matched] == -1).all()
    assert kept.points_b[~matched].isnan().all()
    assert kept.scores[~matched].isnan().all()
    assert kept.points_a.isfinite().all()
    assert repr(kept) == f"Matches(30 rows, {len(only)} matched)"


def test_an_image_matches_itself_token_for_token():
    for match in (match_nearest, match_mutual):
        found = match(A, A)
        assert torch.equal(found.index_a, torch.arange(30))
        assert torch.equal(found.index_b, torch.arange(30))
        assert torch.equal(found.points_a, found.points_b)
        assert torch.allclose(found.scores, torch.ones(30), atol=1e-6)


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_permuting_tokens_permutes_matches(random):
    order_a, order_b = (torch.tensor(random.sample(range(n), n)) for n in (30, 28))
    shuffled_a = describe(A.features[:, order_a], 6, 5, source=(96, 40))
    shuffled_b = describe(B.features[:, order_b], 4, 7, source=(64, 112))
    for match in (match_nearest, match_mutual):
        plain, shuffled = match(A, B), match(shuffled_a, shuffled_b)
        pairs = set(zip(plain.index_a.tolist(), plain.index_b.tolist(), strict=True))
        assert pairs == {
            (int(order_a[i]), int(order_b[j])) for i, j in zip(shuffled.index_a, shuffled.index_b, strict=True)
        }


@pytest.mark.parametrize("chunk", [1, 2, 7, 29, 30, 1000])
def test_the_chunk_changes_nothing(chunk):
    for match in (match_nearest, match_mutual):
        same(match(A, B, chunk=chunk), match(A, B))
    same(match_mutual(A, B, keep_unmatched=True, chunk=chunk), match_mutual(A, B, keep_unmatched=True))


@pytest.mark.parametrize("chunk", [1, 3, 8, None])
def test_among_equals_the_first_wins_whatever_the_chunk(chunk):
    # Every token twice, of lengths that divide without rounding: each similarity is exactly 0 or 1.
    tokens = torch.eye(4).repeat(2, 1)[None]
    d = describe(tokens, 2, 4)
    assert match_nearest(d, d, chunk=chunk).index_b.tolist() == [0, 1, 2, 3] * 2
    assert match_mutual(d, d, chunk=chunk).index_a.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_tokens_match_with_similarity_zero(dtype):
    features = torch.eye(4)[None].clone()
    features[0, 2] = 0
    d = describe(features, 2, 2).to(dtype)
    found = match_nearest(d, d)
    assert found.scores.dtype == torch.float32
    assert found.scores.tolist() == [1, 1, 0, 1]
    assert found.index_b[[0, 1, 3]].tolist() == [0, 1, 3]


@pytest.mark.parametrize("match", [match_nearest, match_mutual, match_ratio, match_sinkhorn, correspond])
def test_matches_carry_no_graph(match):
    d = describe(A.features.clone().requires_grad_(), 6, 5)
    assert not match(d, B).scores.requires_grad
    assert not match(B, d).scores.requires_grad
    assert not top_k(d, B, 2)[0].requires_grad


def test_best_come_first_and_skip_the_unmatched():
    kept = match_mutual(A, B, keep_unmatched=True)
    best = kept.best(3)
    expected = kept.scores[kept.index_b >= 0].sort(descending=True).values[:3]
    assert torch.equal(best.scores, expected)
    assert len(kept.best(1000)) == len(match_mutual(A, B))
    assert len(kept.best(0)) == 0


def test_rows_are_taken_by_slice_index_and_mask():
    found = match_nearest(A, B)
    mask = torch.arange(30) % 2 == 0
    for rows in (slice(0, None, 2), torch.arange(0, 30, 2), mask):
        assert found[rows].index_a.tolist() == list(range(0, 30, 2))
        assert torch.equal(found[rows].points_b, found.points_b[::2])


def test_rows_that_do_not_fit_are_refused():
    two, three = torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    points = torch.zeros(2, 2)
    for parts in ((points, points, torch.zeros(3), two, two), (points, points, torch.zeros(2), two, three)):
        with as_users_run(), pytest.raises(ShapeError, match=r"expected n rows of points \(n, 2\), scores and indices"):
            Matches(*parts)
    with as_users_run(), pytest.raises(ShapeError, match=r"expected n rows of points \(n, 2\)"):
        Matches(torch.zeros(2, 3), points, torch.zeros(2), two, two)


@pytest.mark.parametrize(
    "match",
    [
        match_nearest,
        match_mutual,
        match_ratio,
        match_sinkhorn,
        correspond,
        lambda a, b: top_k(a, b, 1),
        lambda a, b: transfer_points(a, b, [(1.0, 1.0)]),
        lambda a, b: transfer_points(a, b, [(1.0, 1.0)], refine="soft"),
    ],
)
def test_what_cannot_be_matched_is_refused(match):
    one, two = random_descriptor(0), random_descriptor(1, batch=2)
    for pair in ((one, two), (two, one)):
        with pytest.raises(ShapeError, match=r"of one image, got a batch of 2; pass d\[0\], d\[1\], … one by one"):
            match(*pair)
    with pytest.raises(ShapeError, match=r"expected descriptors with as many channels, got 8 .* and 7"):
        match(one, random_descriptor(1, dim=7))


@pytest.mark.parametrize(
    "match", [match_nearest, match_mutual, match_ratio, lambda a, b, chunk: top_k(a, b, 1, chunk=chunk)]
)
@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_nothing_is_refused(match, chunk):
    with pytest.raises(ShapeError, match=f"expected chunk of at least 1, got {chunk}"):
        match(A, B, chunk=chunk)


# Lowe's ratio ---------------------------------------------------------------------------------------------------------


def plain_ratio(a, b, ratio):
    """(tokens of a, tokens of b) that pass the ratio test, by scikit-learn in float64."""
    left, right = (d.features[0].double().numpy() for d in (a, b))
    left, right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right))
    distance, index = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(right).kneighbors(left)
    passed = np.flatnonzero(distance[:, 0] < ratio * distance[:, 1])
    return passed, index[passed, 0]


@pytest.mark.parametrize("ratio", [0.6, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_ratio_is_scikit_learns_two_nearest(ratio, chunk):
    tokens, partners = plain_ratio(A, B, ratio)
    found = match_ratio(A, B, ratio=ratio, chunk=chunk)
    assert found.index_a.tolist() == tokens.tolist()
    assert found.index_b.tolist() == partners.tolist()
    assert torch.allclose(found.scores, match_nearest(A, B).scores[found.index_a], atol=1e-6)
    assert 0 < len(match_ratio(A, B, ratio=0.8)) < 30


def test_mutual_ratio_is_both():
    both = match_ratio(A, B, ratio=0.9, mutual=True)
    pairs = {
        frozenset(zip(found.index_a.tolist(), found.index_b.tolist(), strict=True))
        for found in (match_ratio(A, B, ratio=0.9), match_mutual(A, B))
    }
    assert set(zip(both.index_a.tolist(), both.index_b.tolist(), strict=True)) == frozenset.intersection(*pairs)
    assert 0 < len(both) < len(match_ratio(A, B, ratio=0.9))


def test_rows_without_a_match_are_kept_on_request_by_every_matcher():
    for match in (match_ratio, match_sinkhorn):
        kept, only = match(A, B, keep_unmatched=True), match(A, B)
        assert kept.index_a.tolist() == list(range(30))
        same(kept[kept.index_b >= 0], only)
        assert kept.points_b[kept.index_b < 0].isnan().all()
        assert kept.scores[kept.index_b < 0].isnan().all()


def test_of_two_equal_tokens_neither_is_sure():
    # The nearest is at distance 0, and so is the second nearest: 0/0 passes no ratio, not even 1.
    features = B.features.clone()
    features[0, 9] = features[0, 4]
    b = describe(features, 4, 7)
    a = describe(features[:, [4, 5]].contiguous(), 1, 2)
    for ratio in (0.8, 1.0):
        assert match_ratio(a, b, ratio=ratio).index_b.tolist() == [5]


def test_the_ratio_of_a_zero_token_is_one():
    features = A.features.clone()
    features[0, :3] = 0
    kept = match_ratio(describe(features, 6, 5), B, ratio=0.99, keep_unmatched=True)
    assert kept.index_b[:3].tolist() == [-1] * 3
    same(kept[3:], match_ratio(describe(A.features, 6, 5), B, ratio=0.99, keep_unmatched=True)[3:])


def test_small_distances_are_known_well():
    # The ratio is 1/3; from 2 − 2·cosine, 1e-6 with a rounding of 1e-7, it would be a tenth off.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 12, 64, generator=generator)
    away = torch.randn(1, 12, 64, generator=generator)
    a, b = describe(base, 3, 4), describe(torch.cat([base + 1e-3 * away, base + 3e-3 * away], 1), 6, 4)
    assert match_ratio(a, b, ratio=0.335).index_b.tolist() == list(range(12))
    assert len(match_ratio(a, b, ratio=0.332)) == 0


def test_a_second_nearest_is_needed():
    one = describe(torch.ones(1, 1, 8), 1, 1)
    with pytest.raises(ShapeError, match="expected b of at least 2 tokens, as the second nearest is asked for; try"):
        match_ratio(A, one)
    assert len(match_ratio(one, B)) <= 1


@pytest.mark.parametrize("ratio", [0, -0.5, 1.1, float("nan")])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ConfigError, match=f"expected a ratio above 0 and at most 1, got {ratio}; try 0.8"):
        match_ratio(A, B, ratio=ratio)


# Optimal transport ----------------------------------------------------------------------------------------------------


def similarities(n=30, m=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator, dtype=torch.float64).clamp(-2, 2) / 2


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("iterations", [1, 7, 200])
def test_the_plan_is_pots(epsilon, iterations):
    similarity = similarities()
    found = transport_plan(similarity, epsilon=epsilon, iterations=iterations)
    expected = ot.sinkhorn(
        np.full(30, 1 / 30),
        np.full(28, 1 / 28),
        -similarity.numpy(),
        epsilon,
        method="sinkhorn_log",
        numItermax=iterations,
        stopThr=0,
        warn=False,
    )
    assert np.abs(found.numpy() - expected).max() < 1e-15
    single = transport_plan(similarity.float(), epsilon=epsilon, iterations=iterations)
    assert torch.allclose(single.double(), found, atol=1e-6)


@pytest.mark.parametrize("dustbin", [-0.5, 0.0, 0.7])
def test_the_plan_with_a_dustbin_is_pots(dustbin):
    similarity = similarities(6, 9)
    padded = np.full((7, 10), dustbin)
    padded[:6, :9] = similarity.numpy()
    masses = np.array([1.0] * 6 + [9]) / 15, np.array([1.0] * 9 + [6]) / 15
    expected = ot.sinkhorn(*masses, -padded, 0.1, method="sinkhorn_log", numItermax=300, stopThr=0, warn=False)
    found = transport_plan(similarity, epsilon=0.1, iterations=300, dustbin=dustbin)
    assert np.abs(found.numpy() - expected).max() < 1e-15


def test_masses_are_as_asked():
    plan = transport_plan(similarities(), epsilon=0.1, iterations=500)
    assert torch.allclose(plan.sum(1), torch.full((30,), 1 / 30, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(plan.sum(0), torch.full((28,), 1 / 28, dtype=torch.float64), rtol=1e-6)
    binned = transport_plan(similarities(), epsilon=0.1, iterations=500, dustbin=0.1)
    assert binned.shape == (31, 29)
    assert torch.allclose(binned[:30].sum(1), torch.full((30,), 1 / 58, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(binned[:, :28].sum(0), torch.full((28,), 1 / 58, dtype=torch.float64), rtol=1e-6)


def test_little_entropy_is_the_assignment_of_largest_similarity():
    from scipy.optimize import linear_sum_assignment

    similarity = similarities(12, 12)
    plan = transport_plan(similarity, epsilon=0.002, iterations=3000)
    rows, cols = linear_sum_assignment(similarity.numpy(), maximize=True)
    assert plan.argmax(1)[rows].tolist() == cols.tolist()
    assert plan[rows, cols].min() > 0.99 / 12


def test_much_entropy_is_no_plan_at_all():
    assert torch.allclose(transport_plan(similarities(5, 4), epsilon=1e6), torch.full((5, 4), 1 / 20).double())


def test_nothing_underflows_in_single_precision():
    plan = transport_plan(similarities().float(), epsilon=1e-3, iterations=300)
    assert plan.isfinite().all()
    assert torch.allclose(plan.sum(), torch.tensor(1.0), atol=1e-3)


def test_gradients_of_the_plan_are_those_of_the_formula():
    similarity = similarities(3, 4).requires_grad_()
    for dustbin in (None, 0.1):
        assert torch.autograd.gradcheck(lambda s, d=dustbin: transport_plan(s, iterations=9, dustbin=d), (similarity,))


@pytest.mark.parametrize("dustbin", [None, 0.2, 0.5])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_transport_matches_are_mutual_maxima_of_the_plan(dustbin, threshold):
    found = match_sinkhorn(A, B, epsilon=0.1, dustbin=dustbin, threshold=threshold)
    similarity = vf.cosine_similarity(A, B)[0]
    plan = transport_plan(similarity, epsilon=0.1, dustbin=dustbin).numpy()
    whole = 1 / 30 if dustbin is None else 1 / 58
    pairs = [
        (i, j)
        for i in range(30)
        for j in range(28)
        if plan[i, j] == plan[i].max() == plan[:, j].max() and plan[i, j] > threshold * whole
    ]
    assert 0 < len(pairs) < 28
    assert list(zip(found.index_a.tolist(), found.index_b.tolist(), strict=True)) == pairs
    assert torch.allclose(found.scores, similarity[found.index_a, found.index_b])
    assert torch.equal(found.points_b, centres(B, found.index_b))


def test_transport_matches_an_image_with_itself_and_is_symmetric():
    assert torch.equal(match_sinkhorn(A, A).index_b, torch.arange(30))
    forth, back = (match_sinkhorn(x, y, iterations=500) for x, y in ((A, B), (B, A)))
    pairs = set(zip(forth.index_a.tolist(), forth.index_b.tolist(), strict=True))
    assert pairs == set(zip(back.index_b.tolist(), back.index_a.tolist(), strict=True))


def test_what_the_other_image_does_not_show_goes_to_the_dustbin():
    shown = describe(torch.cat([A.features[:, :20], B.features[:, :4]], 1), 4, 6)
    hidden = describe(A.features[:, :28], 4, 7)
    found = match_sinkhorn(shown, hidden, dustbin=0.7)
    assert found.index_a.tolist() == found.index_b.tolist() == list(range(20))
    assert len(match_sinkhorn(shown, hidden)) > 20
    assert len(match_sinkhorn(shown, hidden, dustbin=1.5)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "expected epsilon above 0, got 0.0; try 0.05"),
        ({"epsilon": float("nan")}, "expected epsilon above 0, got nan"),
        ({"iterations": 0}, "expected iterations of at least 1, got 0; try 50"),
        ({"threshold": 1.0}, "expected a threshold of at least 0 and below 1, got 1.0; 0.2 is SuperGlue's"),
        ({"threshold": -0.1}, "expected a threshold of at least 0 and below 1, got -0.1"),
    ],
)
def test_transport_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        match_sinkhorn(A, B, **options)


def test_no_similarities_have_no_plan():
    with pytest.raises(ShapeError, match=r"expected similarities of at least one token each, got \(0, 4\)"):
        transport_plan(torch.zeros(0, 4))


# Best buddies over the object -----------------------------------------------------------------------------------------


def saliency_maps():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(6, 5, generator=generator), torch.rand(1, 4, 7, generator=generator)


def plain_correspond(a, b, saliency_a, saliency_b, most, threshold, seed):
    """The published steps one by one, on arrays: {cluster: (token of a, token of b)}."""
    left, right = a.features[0].numpy(), b.features[0].numpy()
    cosine = (left / np.linalg.norm(left, axis=1)[:, None]) @ (right / np.linalg.norm(right, axis=1)[:, None]).T
    there, back = cosine.argmax(1), cosine.argmax(0)
    looks_a, looks_b = saliency_a.flatten().numpy(), saliency_b.flatten().numpy()
    buddies = [i for i in range(len(left)) if back[there[i]] == i]
    buddies = [i for i in buddies if looks_a[i] > threshold and looks_b[there[i]] > threshold]
    together = np.concatenate([left[buddies], right[there[buddies]]], 1)
    together = together / np.linalg.norm(together, axis=1)[:, None]
    labels = KMeans(min(most, len(buddies)), random_state=seed, n_init=10).fit(together).labels_
    best = {}
    for i, label in zip(buddies, labels, strict=True):
        rank = (looks_a[i] + looks_b[there[i]]) / 2
        if label not in best or rank > best[label][0]:
            best[label] = (rank, i, there[i])
    return sorted(best.values(), reverse=True)


@pytest.mark.parametrize("most", [1, 3, 10])
@pytest.mark.parametrize("seed", [0, 5])
def test_correspond_is_the_published_steps(most, seed):
    maps = saliency_maps()
    expected = plain_correspond(A, B, *maps, most, 0.3, seed)
    found = correspond(A, B, saliency_a=maps[0], saliency_b=maps[1], most=most, threshold=0.3, seed=seed)
    assert [(i, j) for _, i, j in expected] == list(zip(found.index_a.tolist(), found.index_b.tolist(), strict=True))
    assert torch.equal(found.points_a, centres(A, found.index_a))
    assert torch.allclose(found.scores, vf.cosine_similarity(A, B)[0, found.index_a, found.index_b])


def test_every_correspondence_is_a_best_buddy_on_the_object():
    maps = saliency_maps()
    found = correspond(A, B, saliency_a=maps[0], saliency_b=maps[1], most=100, threshold=0.4)
    buddies = match_mutual(A, B)
    kept = (maps[0].flatten()[buddies.index_a] > 0.4) & (maps[1].flatten()[buddies.index_b] > 0.4)
    assert sorted(found.index_a.tolist()) == buddies.index_a[kept].tolist()  # so many clusters: every pair its own


def test_without_saliency_everything_is_the_object_and_similarity_ranks():
    found = correspond(A, B, most=1)
    assert found.index_a.tolist() == match_mutual(A, B).best(1).index_a.tolist()
    found = correspond(A, B, most=4)
    assert len(found) == 4
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_one_saliency_is_enough():
    only, _ = saliency_maps()
    found = correspond(A, B, saliency_a=only, most=100, threshold=0.5)
    buddies = match_mutual(A, B).index_a
    assert sorted(found.index_a.tolist()) == buddies[only.flatten()[buddies] > 0.5].tolist()
    ranks = only.flatten()[found.index_a]
    assert ranks.tolist() == ranks.sort(descending=True).values.tolist()


def test_where_nothing_is_found_nothing_is_returned():
    found = correspond(A, B, saliency_a=torch.zeros(6, 5), saliency_b=torch.zeros(4, 7))
    assert isinstance(found, Matches)
    assert len(found) == 0


def test_equal_pairs_make_one_cluster():
    d = describe(torch.eye(4).repeat(2, 1)[None], 2, 4)
    e = describe(torch.eye(4)[None], 1, 4)
    assert sorted(correspond(d, e).index_b.tolist()) == [0, 1, 2, 3]
    # With tokens of no direction at all, too.
    assert len(correspond(describe(torch.zeros(1, 4, 3), 2, 2), describe(torch.zeros(1, 4, 3), 2, 2))) == 1


@pytest.mark.parametrize("wrong", [torch.zeros(4, 7), torch.zeros(2, 6, 5), torch.zeros(5, 6)])
def test_saliency_on_another_grid_is_refused(wrong):
    shape = "×".join(map(str, wrong.shape))
    with (
        as_users_run(),
        pytest.raises(ShapeError, match=f"saliency_a on the grid of a, 6×5, got {shape}; extract both"),
    ):
        correspond(A, B, saliency_a=wrong)
    with as_users_run(), pytest.raises(ShapeError, match="saliency_b on the grid of b, 4×7, got 6×5"):
        correspond(A, B, saliency_b=torch.zeros(6, 5))


def test_no_correspondences_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="expected most as a whole number of at least 1, got 0; the paper"):
        correspond(A, B, most=0)


# The k most similar ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 28])
@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_top_k_is_scikit_learns(k, chunk):
    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(B.features[0].numpy())
    distance, expected = neighbours.kneighbors(A.features[0].numpy())
    scores, index = vf.matching.top_k(A, B, k, chunk=chunk)
    assert np.array_equal(index, expected)
    assert np.allclose(scores, 1 - distance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_faiss_finds_the_same(dtype):
    pytest.importorskip("faiss", reason="faiss is not installed; the extra `index` has it")
    a, b = A.to(dtype), B.to(dtype)
    scores, index = top_k(a, b, 5)
    theirs, there = top_k(a.to(torch.float32), b.to(torch.float32), 5, backend="faiss")
    assert (there.dtype, there.shape) == (torch.long, (30, 5))
    assert torch.allclose(scores.float(), theirs, atol=1e-6 if dtype == torch.float32 else 2e-3)
    if dtype == torch.float32:
        assert torch.equal(index, there)


def test_without_faiss_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = r"expected faiss for backend='faiss', but it is not installed; try: pip install \"vitfeats\[index\]\"$"
    with pytest.raises(MissingDependencyError, match=message):
        top_k(A, B, 2, backend="faiss")


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [0, -1, 29])
def test_more_than_there_are_is_refused(k, backend):
    with pytest.raises(ShapeError, match=f"expected k from 1 to the 28 tokens of b, got {k}"):
        top_k(A, B, k, backend=backend)


def test_other_backends_are_refused():
    with as_users_run(), pytest.raises(ConfigError, match="expected backend 'torch' or 'faiss', got 'annoy'"):
        top_k(A, B, 1, backend="annoy")


# Carrying points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize(("down", "across"), [(0, 0), (1, 2), (-2, 1)])
def test_points_follow_a_shifted_map(stride, down, across):
    # Image 2 shows the tokens of image 1, shifted, at another size in pixels.
    rows, cols = 6, 7
    a = random_descriptor(0, rows, cols, dim=16, stride=stride, source=(123, 97))
    shifted = a.features.unflatten(1, (rows, cols)).roll((down, across), (1, 2)).flatten(1, 2)
    b = describe(shifted, rows, cols, stride=stride, source=(61, 301))
    index = torch.arange(rows * cols)
    target = (index // cols + down) % rows * cols + (index % cols + across) % cols
    carried = transfer_points(a, b, centres(a, index))
    assert torch.allclose(carried, centres(b, target), rtol=1e-5)


def test_points_near_a_centre_go_with_it():
    points = centres(A, torch.tensor([7, 12])) + torch.tensor([[0.6, -0.6], [-0.6, 0.6]])
    assert torch.allclose(transfer_points(A, A, points), centres(A, torch.tensor([7, 12])))


def test_no_points_are_carried_to_no_points():
    assert transfer_points(A, B, torch.zeros(0, 2)).shape == (0, 2)


def test_a_point_outside_is_refused():
    with pytest.raises(ShapeError, match=r"inside the image of 40×96 pixels, got \[50.0, 1.0\]"):
        transfer_points(A, B, [(50.0, 1.0)])


def plain_soft_argmax(a, b, points, temperature, reach):
    """Soft-argmax of each point in float64, token by token."""
    known = b.features[0].double().numpy()
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    places = centres(b, torch.arange(b.grid.tokens)).double().numpy()
    found = []
    for token in a.at(points)[0].double().numpy():
        similarity = known @ (token / np.linalg.norm(token))
        row, col = divmod(int(similarity.argmax()), b.grid.cols)
        weights = np.zeros(b.grid.tokens)
        for index in range(b.grid.tokens):
            if max(abs(index // b.grid.cols - row), abs(index % b.grid.cols - col)) <= reach:
                weights[index] = np.exp((similarity[index] - similarity.max()) / temperature)
        found.append((weights / weights.sum()) @ places)
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize(
    ("refine", "window"), [("soft", 7), ("window", 0), ("window", 1), ("window", 3), ("window", 9)]
)
def test_soft_argmax_is_the_plain_one(stride, temperature, refine, window):
    a = random_descriptor(0, 6, 7, stride=stride, source=(60, 91))
    b = random_descriptor(1, 9, 5, stride=stride, source=(301, 64))
    points = torch.rand(11, 2, generator=torch.Generator().manual_seed(2)) * torch.tensor([91.0, 60.0])
    found = transfer_points(a, b, points, refine=refine, temperature=temperature, window=window)
    expected = plain_soft_argmax(a, b, points, temperature, 99 if refine == "soft" else window)
    assert torch.allclose(found.double(), expected, atol=301 * 1e-5)


def test_a_window_of_one_token_or_no_temperature_is_nearest():
    points = centres(A, torch.arange(30))
    nearest = transfer_points(A, B, points)
    assert torch.allclose(transfer_points(A, B, points, refine="window", window=0), nearest)
    assert torch.allclose(transfer_points(A, B, points, refine="soft", temperature=1e-5), nearest, atol=1e-3)


def test_what_is_far_from_the_best_token_has_no_weight_in_a_window():
    # Two tokens alike, far apart: their mean is between them; the window knows one of them only.
    features = torch.zeros(1, 20, 4)
    features[0, 2] = features[0, 18] = torch.tensor([1.0, 0, 0, 0])
    b = describe(features, 1, 20)
    a = describe(torch.tensor([[[1.0, 0, 0, 0]]]), 1, 1)
    soft = transfer_points(a, b, [(4.0, 4.0)], refine="soft")
    assert torch.allclose(soft, torch.tensor([[84.0, 4.0]]), atol=1e-3)  # centres at 20 and 148
    window = transfer_points(a, b, [(4.0, 4.0)], refine="window", window=2)
    assert torch.allclose(window, torch.tensor([[20.0, 4.0]]), atol=1e-3)


@pytest.mark.parametrize("refine", ["soft", "window"])
def test_soft_points_have_a_gradient(refine):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def carried(x, y):
        return transfer_points(
            describe(x, 2, 3), describe(y, 2, 3), [(5.0, 6.0), (20.0, 9.0)], refine=refine, temperature=0.3, window=1
        )

    assert torch.autograd.gradcheck(carried, (a, b))


def test_a_soft_point_is_finer_than_the_grid():
    # A pattern that moves by half a token: the nearest token is off by half a token, the soft-argmax much less.
    where = torch.arange(12.0)
    bumps = torch.stack([torch.exp(-((where - mean) ** 2) / 4) for mean in torch.arange(-2.0, 14.0, 1.0)], 1)
    moved = torch.stack([torch.exp(-((where - 0.5 - mean) ** 2) / 4) for mean in torch.arange(-2.0, 14.0, 1.0)], 1)
    a, b = describe(bumps[None], 1, 12), describe(moved[None], 1, 12)
    points = centres(a, torch.arange(3, 8))
    target = points + torch.tensor([4.0, 0.0])
    soft = transfer_points(a, b, points, refine="window", window=3)
    assert (soft - target).abs().max() < 0.5
    assert (transfer_points(a, b, points) - target).abs().max() > 3.5


@pytest.mark.parametrize("refine", ["soft", "window"])
def test_no_points_are_carried_softly_to_no_points(refine):
    assert transfer_points(A, B, torch.zeros(0, 2), refine=refine).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_points_of_half_precision_are_in_single(dtype):
    points = centres(A, torch.arange(30))
    half = transfer_points(A.to(dtype), B.to(dtype), points, refine="soft", temperature=0.5)
    assert half.dtype == torch.float32
    assert torch.allclose(half, transfer_points(A, B, points, refine="soft", temperature=0.5), atol=0.5)


def test_many_points_are_carried_a_few_at_a_time(monkeypatch):
    points = centres(A, torch.arange(30))
    whole = transfer_points(A, B, points, refine="soft")
    monkeypatch.setattr("vitfeats.similarity.CHUNK_BYTES", 1)
    assert torch.allclose(transfer_points(A, B, points, refine="soft"), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": "parabola"}, "expected refine 'nearest', 'soft' or 'window', got 'parabola'"),
        ({"temperature": 0.0}, "expected a temperature above 0, got 0.0; try 0.02"),
        ({"window": -1}, "expected a window of whole tokens, at least 0, got -1; try 7"),
        ({"window": 1.5}, "expected a window of whole tokens, at least 0, got 1.5"),
    ],
)
def test_settings_of_carrying_out_of_range_are_refused(options, message):
    with as_users_run(), pytest.raises(ConfigError, match=message):
        transfer_points(A, B, [(1.0, 1.0)], **options)
