"""Matching: laws, and scikit-learn's exact nearest neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from synthetic import as_users_run, describe, random_descriptor

from vitfeats.errors import ShapeError
from vitfeats.matching import Matches, match_mutual, match_nearest, transfer_points

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


def test_matches_carry_no_graph():
    d = describe(A.features.clone().requires_grad_(), 6, 5)
    assert not match_mutual(d, B).scores.requires_grad


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


@pytest.mark.parametrize("match", [match_nearest, match_mutual, lambda a, b: transfer_points(a, b, [(1.0, 1.0)])])
def test_what_cannot_be_matched_is_refused(match):
    one, two = random_descriptor(0), random_descriptor(1, batch=2)
    for pair in ((one, two), (two, one)):
        with pytest.raises(ShapeError, match=r"of one image, got a batch of 2; pass d\[0\], d\[1\], … one by one"):
            match(*pair)
    with pytest.raises(ShapeError, match=r"expected descriptors with as many channels, got 8 .* and 7"):
        match(one, random_descriptor(1, dim=7))


@pytest.mark.parametrize("match", [match_nearest, match_mutual])
@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_nothing_is_refused(match, chunk):
    with pytest.raises(ShapeError, match=f"expected chunk of at least 1, got {chunk}"):
        match(A, B, chunk=chunk)


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
