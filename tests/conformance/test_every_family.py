"""One suite for every model family: a family is tested by being listed in families.py."""

import pytest
import torch
from families import FAMILIES, build

import vitfeats as vf
from vitfeats.hooks import count_hooks

NO_CLS = {"timm-siglip", "hf-siglip"}
ROTARY = {"timm-dinov3", "hf-dinov3"}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _taps(card: vf.ModelCard) -> list[str]:
    always = ["key@0", "query@1", "value@2", "token@1", "out@2"]
    return [*always, "cls@2", "attention@1"] if card.has_cls else always


def _extractor(family: str, **settings) -> vf.Extractor:
    model = build(family)
    size = settings.pop("size", None) or (3 * model_patch(model), 5 * model_patch(model))
    return vf.load_extractor(model, size=size, **settings)


def model_patch(model: torch.nn.Module) -> int:
    return vf.load_extractor(model).card.patch


def test_every_facet_has_its_shape(family, photo):
    extractor = _extractor(family)
    card = extractor.card
    found = extractor(torch.stack([photo, photo.flip(2)]), _taps(card))
    for tap, d in found.items():
        tokens = 1 if tap.facet == "cls" else 15
        dim = card.heads if tap.facet == "attention" else card.dim
        assert d.features.shape == (2, tokens, dim)
        assert d.features.dtype == torch.float32
        assert bool(d.features.isfinite().all())
        assert (d.cls is None) == (not card.has_cls)
        if tap.facet != "cls":
            assert (d.grid.rows, d.grid.cols) == (3, 5)
            assert (0 if d.registers is None else d.registers.shape[1]) == card.registers
        assert d.model == card.name
        assert [frame.source_size for frame in d.frames] == [(70, 100)] * 2
        assert repr(d).startswith(f"Descriptor({tap} of {card.name}: batch 2")


def test_several_taps_in_one_pass_equal_each_alone(family, photo):
    extractor = _extractor(family)
    together = extractor(photo, _taps(extractor.card))
    for tap, d in together.items():
        alone = extractor(photo, tap)
        assert torch.equal(d.features, alone.features), tap


def test_a_batch_equals_its_images_one_by_one(family, photo):
    extractor = _extractor(family)
    images = torch.stack([photo, 1 - photo, photo.flip(1)])
    batch = extractor(images, "token@-1")
    for index in range(3):
        torch.testing.assert_close(batch[index].features, extractor(images[index], "token@-1").features)


def test_a_stride_equal_to_the_patch_is_the_plain_grid(family, photo):
    plain = _extractor(family)
    given = _extractor(family, stride=plain.card.patch)
    assert torch.equal(plain(photo, "key@1").features, given(photo, "key@1").features)


def test_an_overlapping_stride_refines_the_grid(family, photo):
    extractor = _extractor(family)
    patch = extractor.card.patch
    fine = extractor.resized(stride=patch // 2)(photo, ["key@0", "token@-1"])
    for d in fine.values():
        assert (d.grid.rows, d.grid.cols, d.grid.stride) == (5, 9, patch // 2)
        assert d.grid.network_size == (3 * patch, 5 * patch)


def test_hooks_are_gone_after_success_and_after_failure(family, photo):
    extractor = _extractor(family)
    before = count_hooks(extractor.model)
    extractor(photo, _taps(extractor.card))
    assert count_hooks(extractor.model) == before

    def fail(*_args, **_kwargs):
        raise RuntimeError("forced")

    block = vf.extractors.vit.find_module(extractor.model, extractor.anatomy.block.format(1))
    block.forward = fail
    with pytest.raises(RuntimeError, match="forced"):
        extractor(photo, "key@2")
    assert count_hooks(extractor.model) == before


def test_gradients_reach_the_image_and_only_if_asked(family, photo):
    extractor = _extractor(family)
    assert not extractor(photo, "key@1").features.requires_grad
    image = photo.clone().requires_grad_()
    for tap in _taps(extractor.card):
        (gradient,) = torch.autograd.grad(extractor(image, tap).features.square().sum(), image)
        assert float(gradient.abs().sum()) > 0, tap
    with torch.no_grad():
        assert not extractor(image, "key@1").features.requires_grad


def test_what_was_extracted_can_enter_a_graph_later(family, photo):
    d = _extractor(family)(photo, "key@1")
    weight = torch.ones(d.dim, requires_grad=True)
    (d.features @ weight).sum().backward()
    assert weight.grad is not None


def test_the_whole_attention_matrix(family, photo):
    extractor = _extractor(family)
    matrix = extractor.attention(photo, -1)
    tokens = 15 + extractor.card.prefix_tokens
    assert matrix.shape == (1, extractor.card.heads, tokens, tokens)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    if extractor.card.has_cls:
        row = extractor(photo, "attention@-1")
        prefix = extractor.card.prefix_tokens
        torch.testing.assert_close(row.features, matrix[:, :, 0, prefix:].transpose(1, 2))
        torch.testing.assert_close(row.cls, matrix[:, :, 0, 0])


def test_attention_and_values_give_what_the_block_makes_of_them(family, photo):
    """softmax(q·kᵀ)·v through the output projection is the facet `out`: four facets against the model itself."""
    extractor = _extractor(family)
    card = extractor.card
    found = extractor(photo, ["value@1", "out@1"])
    value = _with_prefix(found["value@1"])
    heads = value.unflatten(-1, (card.heads, -1)).transpose(1, 2)
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


def test_layers_are_checked(family, photo):
    extractor = _extractor(family)
    with pytest.raises(vf.TapError, match=r"a layer from 0 to 2 \(or -3 to -1, from the end\), got 3 in 'key@3'"):
        extractor(photo, "key@3")
    with pytest.raises(vf.TapError, match="only diffusion models have steps"):
        extractor(photo, "key@1#5")


def test_repr_says_what_it_is(family):
    extractor = _extractor(family)
    assert repr(extractor).startswith(f"ViTExtractor({extractor.card.name}: size (")
    assert repr(extractor).endswith("float32 on cpu)")


def test_half_precision_on_the_cpu(family, photo):
    exact = _extractor(family)(photo, "token@1").features
    half = _extractor(family, dtype="bfloat16")(photo, "token@1").features
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.15, rtol=0.1)


def test_attention_is_float32_under_half_precision(family, photo):
    """The softmax of the q and k that half precision gave, but itself in float32."""
    extractor = _extractor(family, dtype="bfloat16", rope="post", norm_qk=True)
    card = extractor.card
    matrix = extractor.attention(photo, 1)
    assert matrix.dtype == torch.float32
    found = extractor(photo, ["query@1", "key@1"])
    q, k = (
        _with_prefix(found[f"{facet}@1"]).unflatten(-1, (card.heads, -1)).transpose(1, 2) for facet in ("query", "key")
    )
    expected = (q @ k.transpose(-2, -1) * (card.dim // card.heads) ** -0.5).softmax(-1)
    torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=1e-4)


def test_full_precision_also_inside_somebodys_autocast(family, photo):
    extractor = _extractor(family)
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor(photo, "token@1").features
    assert torch.equal(inside, extractor(photo, "token@1").features)


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
