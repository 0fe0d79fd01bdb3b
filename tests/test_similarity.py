"""Cosine similarity: its definition, its laws, and what it does with zeros."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity as sklearn_cosine
from synthetic import describe, random_descriptor

from vitfeats.errors import ShapeError
from vitfeats.similarity import (
    cosine_similarity,
    rows_at_a_time,
    self_similarity,
    similarity_blocks,
    similarity_map,
    unit,
)


def with_zeros(d):
    features = d.features.clone()
    features[:, ::3] = 0
    return describe(features, d.grid.rows, d.grid.cols)


def test_it_is_what_scikit_learn_computes():
    a, b = random_descriptor(0, batch=2), random_descriptor(1, rows=3, cols=3, batch=2)
    found = cosine_similarity(a, b)
    assert found.shape == (2, 20, 9)
    for image in range(2):
        assert np.allclose(found[image], sklearn_cosine(a.features[image], b.features[image]), atol=1e-6)


def test_zero_vectors_are_like_nothing():
    d = with_zeros(random_descriptor(0))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        found = self_similarity(d.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found[:, ::3], torch.zeros_like(found[:, ::3]))
        assert torch.equal(found[:, :, ::3], torch.zeros_like(found[:, :, ::3]))
        assert torch.allclose(found.float(), cosine_similarity(d, d), atol=2e-2)


def test_an_image_of_zeros_has_a_gradient_without_nan():
    features = torch.zeros(1, 6, 4, requires_grad=True)
    self_similarity(describe(features, 2, 3)).sum().backward()
    assert features.grad.isfinite().all()


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=20)
def test_lengths_do_not_matter(left, right):
    a, b = random_descriptor(0), random_descriptor(1)
    scaled = cosine_similarity(describe(a.features * left, 4, 5), describe(b.features * right, 4, 5))
    assert torch.allclose(scaled, cosine_similarity(a, b), atol=1e-5)


def test_self_similarity_is_symmetric_with_a_diagonal_of_ones():
    found = self_similarity(random_descriptor(0, batch=3))
    assert torch.allclose(found, found.transpose(1, 2), atol=1e-6)
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), torch.ones(3, 20), atol=1e-6)
    assert found.abs().max() <= 1 + 1e-6


def test_permuting_tokens_permutes_the_matrix():
    a, b = random_descriptor(0), random_descriptor(1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    permuted = cosine_similarity(describe(a.features[:, order], 4, 5), b)
    assert torch.allclose(permuted, cosine_similarity(a, b)[:, order], atol=1e-6)


def test_one_image_is_compared_with_many():
    one, many = random_descriptor(0), random_descriptor(1, batch=3)
    left, right = cosine_similarity(one, many), cosine_similarity(many, one)
    for image in range(3):
        assert torch.allclose(left[image], cosine_similarity(one, many[image])[0], atol=1e-6)
        assert torch.allclose(right[image], cosine_similarity(many[image], one)[0], atol=1e-6)


def test_gradients_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: cosine_similarity(describe(x, 2, 2), describe(y, 2, 2)), (a, b))


# Where does a point look like? ----------------------------------------------------------------------------------------


def test_similarity_map_at_token_centres_is_the_row_of_the_matrix():
    a, b = random_descriptor(0), random_descriptor(1, rows=3, cols=6)
    centres = a.frames[0].to_source(a.grid.centres())
    maps = similarity_map(a, centres, b)
    assert maps.shape == (20, 3, 6)
    assert torch.allclose(maps.flatten(1), cosine_similarity(a, b)[0], atol=1e-5)


def test_similarity_map_interpolates_features_and_not_similarities():
    # Half-way between a vector and its opposite is zero, which is like nothing.
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    a = describe(features, 1, 2)
    assert similarity_map(a, [(8.0, 4.0)], a).abs().max() < 1e-6
    assert torch.allclose(similarity_map(a, [(6.0, 4.0)], a), torch.tensor([[[1.0, -1.0]]]))


def test_gradients_flow_through_the_map():
    features = torch.randn(1, 6, 4, requires_grad=True)
    similarity_map(describe(features, 2, 3), [(5.0, 5.0)], random_descriptor(1, 2, 3, 4)).sum().backward()
    assert (features.grad != 0).any()


# Pieces ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_blocks_put_together_are_the_whole(n, m, chunk):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, 5, generator=generator), torch.randn(m, 5, generator=generator)
    blocks = [(start, block.clone()) for start, block in similarity_blocks(a, b, chunk)]
    assert [start for start, _ in blocks] == list(range(0, n, chunk))
    assert all(len(block) <= chunk for _, block in blocks)
    assert torch.allclose(torch.cat([block for _, block in blocks]), a @ b.T, atol=1e-5)


def test_there_is_one_block_in_memory():
    a, b = torch.ones(5, 2, requires_grad=True), torch.ones(3, 2)
    blocks = [block for _, block in similarity_blocks(a, b, 2)]
    assert len({block.data_ptr() for block in blocks}) == 1
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert not blocks[0].requires_grad
    assert not list(similarity_blocks(a[:0], b))


def test_blocks_stay_within_their_memory():
    a, b = torch.zeros(3000, 2), torch.zeros(10_000, 2)
    sizes = [block.numel() * block.element_size() for _, block in similarity_blocks(a, b)]
    assert max(sizes) <= 16 * 2**20
    assert len(sizes) == 8
    assert rows_at_a_time(torch.empty(10**9, 2, device="meta")) == 1


@pytest.mark.parametrize("chunk", [0, -1])
def test_blocks_of_nothing_are_refused(chunk):
    with pytest.raises(ShapeError, match=f"expected chunk of at least 1, got {chunk}"):
        next(similarity_blocks(torch.zeros(2, 2), torch.zeros(2, 2), chunk))


def test_unit_vectors_are_of_length_one():
    features = random_descriptor(0, batch=2).features
    assert torch.allclose(unit(features).norm(dim=-1), torch.ones(2, 20))
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_numbers_of_channels_must_agree():
    a, b = random_descriptor(0), random_descriptor(1, dim=7, tap="query@3")
    message = (
        r"expected descriptors with as many channels, got 8 \(key@1 of synthetic\) and 7 \(query@3 of synthetic\); "
        "extract both with one model and facet"
    )
    for ask in (lambda: cosine_similarity(a, b), lambda: similarity_map(a, [(1.0, 1.0)], b)):
        with pytest.raises(ShapeError, match=message):
            ask()


def test_numbers_of_images_must_agree():
    with pytest.raises(ShapeError, match="two batches of one size, or one of them of 1, got 2 and 3 images"):
        cosine_similarity(random_descriptor(0, batch=2), random_descriptor(1, batch=3))


def test_a_map_is_of_one_image():
    one, two = random_descriptor(0), random_descriptor(1, batch=2)
    for pair in ((one, two), (two, one)):
        with pytest.raises(ShapeError, match=r"of one image, got a batch of 2; pass d\[0\], d\[1\], … one by one"):
            similarity_map(pair[0], [(1.0, 1.0)], pair[1])


def test_several_taps_in_place_of_one_are_told_apart_from_a_batch():
    # In a process of its own: the type checker of the tests would refuse them before.
    code = """
import vitfeats as vf
from vitfeats.matching import match_mutual, transfer_points
from vitfeats.similarity import similarity_map
several = vf.load_extractor(size=32, device="cpu")(vf.samples.cat(), ["key@11", "token@3"])
one = several["key@11"]
for ask in (
    lambda: match_mutual(several, several),
    lambda: transfer_points(one, several, [(1.0, 1.0)]),
    lambda: similarity_map(several, [(1.0, 1.0)], one),
):
    try:
        ask()
    except vf.ShapeError as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    told = "expected the descriptor of one tap, got those of key@11, token@3; pass one: d['key@11']"
    assert ran.stdout.splitlines() == [told] * 3


def test_a_point_outside_is_refused():
    with pytest.raises(ShapeError, match=r"inside the image of 40×32 pixels, got \[41.0, 1.0\]"):
        similarity_map(random_descriptor(0), [(41.0, 1.0)], random_descriptor(1))
