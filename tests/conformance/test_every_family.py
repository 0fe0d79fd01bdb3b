"""One suite for every model family: a family is tested by being listed in families.py."""

import pytest
import torch
from families import FAMILIES, build

import vitfeats as vf
from vitfeats import testing
from vitfeats.taps import FACETS

NO_CLS = {
    "timm-siglip",
    "timm-siglip2",
    "timm-aimv2",
    "timm-naflex",
    "timm-naflex-siglip",
    "timm-relpos",
    "hf-siglip",
}
ROTARY = {
    "timm-dinov3",
    "timm-dinov3-qkvb",
    "timm-eva02",
    "timm-pe-core",
    "timm-pe-spatial",
    "timm-rope",
    "timm-rope-mixed",
    "timm-sapiens2",
    "hf-dinov3",
}
ONE_STRIDE = {
    "hf-beit",
    "timm-relpos",
    "timm-beit",
    "timm-beitv2",
    "timm-hybrid",
    "timm-naflex",
    "timm-naflex-siglip",
}
BIASED = {"timm-beit", "timm-beitv2", "timm-relpos", "hf-beit"}  # relative position biases are added to the scores


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _extractor(family: str, **settings) -> vf.Extractor:
    model = build(family)
    size = settings.pop("size", None) or (3 * model_patch(model), 5 * model_patch(model))
    return vf.load_extractor(model, size=size, **settings)


def model_patch(model: torch.nn.Module) -> int:
    return vf.load_extractor(model).card.patch


def test_conforms(family, as_a_user):
    """The suite for third parties; a check that does not apply is one that is expected not to."""
    model = build(family)
    report = testing.conformance(lambda **settings: vf.load_extractor(model, **settings))
    report.raise_for_failures()
    missing = {"residual"} | ({"cls", "attention"} if family in NO_CLS else set())
    assert set(report.missing) == missing
    assert all("no CLS token" in report.missing[facet] for facet in missing - {"residual"})
    facets = set(FACETS) - missing
    expected = {
        "overlapping_stride": facets if family in ONE_STRIDE else {"cls"} - missing,
        "tokens_are_in_place": {"cls", "attention"} - missing,
        "whole_attention": facets - {"attention"},
    }
    for check in testing.CHECKS:
        outcomes = [outcome for outcome in report.outcomes if outcome.check == check]
        assert {outcome.tap.facet for outcome in outcomes} == facets
        left_out = {outcome.tap.facet for outcome in outcomes if outcome.status == "inapplicable"}
        assert left_out == expected.get(check, set()), check


def test_what_cannot_overlap_says_why(photo):
    with pytest.raises(
        vf.ConfigError, match=r"expected stride 16 \(the patch\) for NaFlexVit, got 8: it does not make"
    ):
        _extractor("timm-naflex", stride=8)(photo)
    with pytest.raises(
        vf.ShapeError, match=r"expected images of \(48, 80\) .* got \(48, 80\) at stride 8; leave size= .*BEiT"
    ):
        _extractor("timm-beit", stride=8)(photo)


def test_attention_and_values_give_what_the_block_makes_of_them(family, photo):
    """softmax(q·kᵀ)·v through the output projection is the facet `out`: four facets against the model itself."""
    extractor = _extractor(family)
    card = extractor.card
    found = extractor(photo, ["value@1", "out@1"])
    value, of_values = _with_prefix(found["value@1"]), found["value@1"].heads
    heads = value.unflatten(-1, (of_values, -1)).transpose(1, 2).repeat_interleave(card.heads // of_values, 1)
    mixed = (extractor.attention(photo, 1) @ heads).transpose(1, 2).flatten(2)
    attention = vf.extractors.vit.find_module(extractor.model, extractor.anatomy.attention.format(1))
    if hasattr(attention, "norm"):
        mixed = attention.norm(mixed)
    projection = next(getattr(attention, n) for n in ("proj", "o_proj", "out_proj") if hasattr(attention, n))
    torch.testing.assert_close(projection(mixed), _with_prefix(found["out@1"]), atol=1e-5, rtol=1e-4)


def test_keys_before_and_after_norm_and_rotation(family, photo):
    pre = _extractor(family)(photo, "key@1").features
    post = _extractor(family, rope="post", norm_qk=True)(photo, "key@1").features
    changed = family in ROTARY | {"timm-qk-norm"}
    assert torch.equal(pre, post) != changed


def test_no_cls_is_a_clear_error(family, photo):
    extractor = _extractor(family)
    if family in NO_CLS:
        with pytest.raises(vf.UnknownFacetError, match="has no CLS token; try key, query, value, token, out"):
            extractor(photo, "cls@1")
        with pytest.raises(vf.UnknownFacetError, match="got 'attention'"):
            extractor(photo, "attention@1")
    else:
        d = extractor(photo, "cls@1")
        assert d.features.shape == (1, 1, extractor.card.dim)
        assert torch.equal(d.features[:, 0], d.cls)
        assert d.grid.network_size == d.frames[0].network_size


def test_attention_is_float32_under_half_precision(family, photo):
    """The softmax of the q and k that half precision gave, but itself in float32."""
    extractor = _extractor(family, dtype="bfloat16", rope="post", norm_qk=True)
    card = extractor.card
    matrix = extractor.attention(photo, 1)
    assert matrix.dtype == torch.float32
    found = extractor(photo, ["query@1", "key@1"])
    q, k = (_with_prefix(d).unflatten(-1, (d.heads, -1)).transpose(1, 2) for d in (found["query@1"], found["key@1"]))
    if family in BIASED:  # with their biases the matrix is compared with the block's output, above
        return
    k = k.repeat_interleave(card.heads // k.shape[1], 1)
    expected = (q @ k.transpose(-2, -1) * (card.dim // card.heads) ** -0.5).softmax(-1)
    torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=1e-4)


def test_a_module_in_half_precision_is_given_its_own_type(family, photo):
    model = build(family)
    patch = model_patch(model)
    exact = vf.load_extractor(model, size=(3 * patch, 5 * patch))(photo, "token@1").features
    half = vf.load_extractor(model.to(torch.bfloat16), size=(3 * patch, 5 * patch))(photo, "token@1").features
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.2, rtol=0.2)


def _with_prefix(d: vf.Descriptor) -> torch.Tensor:
    parts = [] if d.cls is None else [d.cls[:, None]]
    return torch.cat([*parts, *([] if d.registers is None else [d.registers]), d.features], 1)
