"""Taps: their text, their layers, and the pure functions that read them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitfeats.errors import TapError, UnknownFacetError
from vitfeats.taps import FACETS, QueryKey, Tap, TokenLayout, read_attention, read_cls, read_tokens

names = st.from_regex(r"\A[A-Za-z][A-Za-z0-9_.]{0,12}\Z")
taps = st.builds(
    Tap,
    st.sampled_from(sorted(FACETS)),
    st.one_of(st.integers(-999, 999), names),
    st.one_of(st.none(), st.integers(0, 999)),
)


@given(taps)
def test_text_goes_there_and_back(tap):
    assert Tap.parse(str(tap)) == tap
    assert Tap.parse(f"  {tap}\n") == tap
    assert Tap.parse(tap) is tap


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("key@11", Tap("key", 11)),
        ("key@-1", Tap("key", -1)),
        ("cls@0", Tap("cls", 0)),
        ("out@relu4_1", Tap("out", "relu4_1")),
        ("out@up1.res1#25", Tap("out", "up1.res1", 25)),
        ("key@3#0", Tap("key", 3, 0)),
    ],
)
def test_text_is_read_as_written(text, tap):
    assert Tap.parse(text) == tap
    assert str(tap) == text


@pytest.mark.parametrize(
    "text", ["", "key", "key@", "@11", "key@1.5", "key 11", "key@11#", "key@11#-1", "Key@11", "key@1@2", "key@--1"]
)
def test_other_text_is_refused(text):
    with pytest.raises(TapError, match=r"expected a tap written facet@layer, for example 'key@11' or 'key@-1', got"):
        Tap.parse(text)


@pytest.mark.parametrize("make", [lambda: Tap("keys", 1), lambda: Tap.parse("keys@1")])
def test_an_unknown_facet_is_refused_with_the_nearest(make):
    with pytest.raises(UnknownFacetError, match=r"expected a facet, got 'keys'\. Did you mean 'key'\?"):
        make()


def test_a_far_off_facet_lists_all():
    with pytest.raises(UnknownFacetError, match="Known: " + ", ".join(sorted(FACETS))):
        Tap("zzzzzz", 1)


@given(st.integers(1, 30), st.data())
def test_negative_layers_count_from_the_end(depth, data):
    layer = data.draw(st.integers(-depth, depth - 1))
    resolved = Tap("key", layer, 3).resolved(depth)
    assert resolved == Tap("key", list(range(depth))[layer], 3)
    assert resolved.resolved(depth) == resolved


@pytest.mark.parametrize("layer", [12, -13, 99, "relu4_1"])
def test_a_layer_out_of_range_is_refused(layer):
    with pytest.raises(
        TapError, match=rf"expected a layer from 0 to 11 \(or -12 to -1, from the end\), got {layer!r} in 'key@{layer}'"
    ):
        Tap("key", layer).resolved(12)


def test_taps_are_keys_of_a_dictionary():
    assert {Tap("key", 1): "a"}[Tap.parse("key@1")] == "a"
    assert Tap("key", 1) != Tap("key", 1, 0)


def test_facets_know_their_own_names():
    assert all(name == facet.name and facet.meaning for name, facet in FACETS.items())


# Reading ------------------------------------------------------------------------------------------------------------

SEEN = torch.arange(2 * 7 * 3, dtype=torch.float32).reshape(2, 7, 3)


def test_tokens_without_a_prefix():
    reading = read_tokens(SEEN, TokenLayout(prefix=0, has_cls=False))
    assert torch.equal(reading.features, SEEN)
    assert reading.cls is None
    assert reading.registers is None


def test_tokens_behind_cls():
    reading = read_tokens(SEEN, TokenLayout(prefix=1, has_cls=True))
    assert torch.equal(reading.features, SEEN[:, 1:])
    assert torch.equal(reading.cls, SEEN[:, 0])
    assert reading.registers is None


def test_tokens_behind_cls_and_registers():
    reading = read_tokens(SEEN, TokenLayout(prefix=3, has_cls=True))
    assert torch.equal(reading.features, SEEN[:, 3:])
    assert torch.equal(reading.cls, SEEN[:, 0])
    assert torch.equal(reading.registers, SEEN[:, 1:3])


def test_tokens_behind_registers_alone():
    reading = read_tokens(SEEN, TokenLayout(prefix=2, has_cls=False))
    assert torch.equal(reading.features, SEEN[:, 2:])
    assert reading.cls is None
    assert torch.equal(reading.registers, SEEN[:, :2])


def test_cls_is_a_grid_of_one_token():
    reading = read_cls(SEEN, TokenLayout(prefix=3, has_cls=True))
    assert torch.equal(reading.features, SEEN[:, :1])
    assert torch.equal(reading.cls, SEEN[:, 0])
    assert reading.registers is None


def test_readings_are_copies_in_float32():
    # What was read must survive later in-place work of the model, and must not keep a fused projection alive.
    for read in (read_tokens, read_cls):
        for dtype in (torch.float32, torch.bfloat16):
            seen = SEEN.to(dtype, copy=True)
            reading = read(seen, TokenLayout(prefix=3, has_cls=True))
            seen.zero_()
            parts = [part for part in (reading.features, reading.cls, reading.registers) if part is not None]
            assert all(part.dtype == torch.float32 and part.is_contiguous() for part in parts)
            assert all(part.untyped_storage().nbytes() == part.numel() * 4 for part in parts)
            expected = 0 if read is read_cls else 3
            assert torch.equal(reading.features[0, 0], SEEN[0, expected])
            assert torch.equal(reading.cls, SEEN[:, 0])


def test_gradients_flow_through_a_reading():
    seen = SEEN.clone().requires_grad_()
    read_tokens(seen, TokenLayout(prefix=3, has_cls=True)).features.sum().backward()
    assert torch.equal(seen.grad[:, 3:], torch.ones(2, 4, 3))
    assert torch.equal(seen.grad[:, :3], torch.zeros(2, 3, 3))


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def test_attention_is_the_softmax_written_out():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, 6, 5, generator=generator) for _ in range(2))
    whole = QueryKey(query, key, 0.3).attention()
    expected = torch.empty(2, 4, 6, 6)
    for image in range(2):
        for head in range(4):
            for row in range(6):
                expected[image, head, row] = _softmax(0.3 * (key[image, head] * query[image, head, row]).sum(-1))
    assert torch.allclose(whole, expected, atol=1e-6)
    assert torch.allclose(whole.sum(-1), torch.ones(2, 4, 6))


def test_a_mask_is_added_before_the_softmax():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 4, 5, generator=generator) for _ in range(2))
    mask = torch.zeros(4, 4)
    mask[:, 2] = -torch.inf
    masked = QueryKey(query, key, 0.3, mask).attention()
    others = [0, 1, 3]
    assert torch.equal(masked[..., 2], torch.zeros(1, 2, 4))
    assert torch.allclose(
        masked[:, :, others][..., others], QueryKey(query[:, :, others], key[:, :, others], 0.3).attention(), atol=1e-6
    )
    assert torch.allclose(QueryKey(query, key, 0.3, mask).attention(slice(1, 2)), masked[:, :, 1:2])


def test_attention_facet_is_the_row_of_cls():
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 4, 7, 5, generator=generator) for _ in range(2))
    seen = QueryKey(query, key, 0.4)
    reading = read_attention(seen, TokenLayout(prefix=3, has_cls=True))
    row = seen.attention()[:, :, 0]  # (batch, heads, n)
    assert torch.allclose(reading.features, row[:, :, 3:].transpose(1, 2))
    assert torch.allclose(reading.cls, row[:, :, 0])
    assert torch.allclose(reading.registers, row[:, :, 1:3].transpose(1, 2))
