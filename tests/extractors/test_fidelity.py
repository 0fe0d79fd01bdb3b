"""What is read is what the model computes: bit for bit where it is the same tensor, else against naive formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, build

import vitfeats as vf

TIMM = sorted(name for name in FAMILIES if name.startswith("timm"))
HF = sorted(name for name in FAMILIES if name.startswith("hf"))


def _recorded(model: torch.nn.Module, path: str, run) -> torch.Tensor:
    """Record one module's output by a hook of the test's own."""
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, out: kept.append(out))
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def _native(model: torch.nn.Module) -> int | tuple[int, int]:
    """Return the size of the stored positions, where the model's own pass is ours."""
    return getattr(getattr(model, "patch_embed", None), "img_size", None) or 64


def _projected(attention: torch.nn.Module, given: torch.Tensor, third: int) -> torch.Tensor:
    """Return what an attention module of timm projects, from its weights alone: queries (0), keys (1), values (2)."""
    letter = "qkv"[third]
    if attention.qkv is None:
        return getattr(attention, f"{letter}_proj")(given)
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return F.linear(given, attention.qkv.weight, bias).chunk(3, -1)[third]


@pytest.mark.parametrize("family", TIMM)
@pytest.mark.parametrize(("facet", "third"), [("query", 0), ("key", 1), ("value", 2)])
def test_keys_equal_the_projection_bit_for_bit(family, facet, third, photo):
    model = build(family)
    extractor = vf.load_extractor(model, size=_native(model))
    pixels = extractor.preprocess(photo).pixels
    attention = model.blocks[1].attn
    given = []
    handle = attention.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        model.forward_features(pixels)
        whole = _projected(attention, given[0], third)
    handle.remove()
    expected = whole[:, extractor.card.prefix_tokens :]
    found = extractor(photo, f"{facet}@1")
    difference = float((found.features - expected).abs().max())
    print(f"{family} {facet}: max abs difference {difference}")
    assert torch.equal(found.features, expected)
    if found.cls is not None:
        assert torch.equal(found.cls, whole[:, 0])


@pytest.mark.skipif("timm-sapiens2" not in FAMILIES, reason="this timm has no model with grouped queries")
def test_heads_that_share_their_keys_give_fewer_channels(photo):
    """Grouped-query attention: block 1 of this model has 2 heads of keys and values for 4 of queries."""
    found = vf.load_extractor(build("timm-sapiens2"), size=64)(photo, ["query@1", "key@1", "value@1", "key@0"])
    assert [(d.dim, d.heads) for d in found.values()] == [(48, 4), (24, 2), (24, 2), (48, 4)]


def test_keys_are_head_major():
    model = build("timm-augreg")
    extractor = vf.load_extractor(model, size=64)
    image = torch.rand(1, 3, 64, 64)
    d = extractor(image, "key@1")
    heads = d.features.unflatten(-1, (d.heads, -1))
    pixels = extractor.preprocess(image).pixels
    normed = _recorded(model, "blocks.1.attn.k_norm", lambda: model.forward_features(pixels))  # (b, heads, n, d)
    assert torch.equal(heads.transpose(1, 2), normed[:, :, 1:])


@pytest.mark.parametrize("family", TIMM)
def test_tokens_equal_timms_own_intermediates(family, photo):
    model = build(family)
    extractor = vf.load_extractor(model, size=_native(model))
    pixels = extractor.preprocess(photo).pixels
    prefix = extractor.card.prefix_tokens
    for norm in (False, True):
        with torch.no_grad():
            result = model.forward_intermediates(
                pixels,
                indices=[1],
                norm=norm,
                output_fmt="NLC",
                intermediates_only=True,
                return_prefix_tokens=prefix > 0,
            )[0]
        tokens = result[0] if prefix else result
        if norm and isinstance(model.norm, torch.nn.Identity):
            continue
        found = vf.load_extractor(model, norm=norm, size=extractor.preprocess.size)(photo, "token@1")
        torch.testing.assert_close(found.features, tokens)


@pytest.mark.parametrize("family", HF)
def test_tokens_equal_transformers_hidden_states(family):
    reference, model = build(family), build(family)  # output_hidden_states leaves hooks: never on the same instance
    extractor = vf.load_extractor(model, size=64)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        states = reference(pixel_values=extractor.preprocess(image).pixels, output_hidden_states=True).hidden_states
    for layer in range(3):
        found = extractor(image, f"token@{layer}")
        expected = states[layer + 1][:, extractor.card.prefix_tokens :]
        if layer == 2 and not torch.allclose(found.features, expected, atol=1e-5):
            final = vf.load_extractor(model, size=64, norm=True)(image, "token@2")  # some give the last one normed
            torch.testing.assert_close(final.features, expected)
            continue
        torch.testing.assert_close(found.features, expected)


@pytest.mark.parametrize("family", HF)
def test_keys_equal_the_projection_of_transformers(family):
    model = build(family)
    extractor = vf.load_extractor(model, size=64)
    image = torch.rand(1, 3, 64, 64)
    pixels = extractor.preprocess(image).pixels
    for facet, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        path = extractor.anatomy.attention.format(1) + f".{letter}_proj"
        expected = _recorded(model, path, lambda: model(pixels))
        assert torch.equal(extractor(image, f"{facet}@1").features, expected[:, extractor.card.prefix_tokens :])


def test_stride_4_grid_is_patches_cut_by_hand():
    """Tokens of the first block's input, at stride 4, computed from patches cut one by one."""
    model = build("timm-dino")
    extractor = vf.load_extractor(model, size=(32, 48), stride=4)
    image = torch.rand(1, 3, 32, 48)
    pixels = extractor.preprocess(image).pixels
    rows, cols = (32 - 8) // 4 + 1, (48 - 8) // 4 + 1
    projection = model.patch_embed.proj
    cut = torch.stack(
        [pixels[0, :, 4 * r : 4 * r + 8, 4 * c : 4 * c + 8].flatten() for r in range(rows) for c in range(cols)]
    )
    patches = cut @ projection.weight.flatten(1).T + projection.bias
    positions = _dino_positions(model.pos_embed[:, 1:].detach(), rows, cols)
    cls = model.cls_token + model.pos_embed[:, :1]
    with torch.no_grad():
        tokens = torch.cat([cls, (patches + positions)[None]], 1)
        expected = model.blocks[0](tokens)
        found = extractor(image, "token@0")
    difference = float((found.features - expected[:, 1:]).abs().max())
    print(f"stride-4 grid {rows}×{cols}: max abs difference {difference:.2e}")
    assert (found.grid.rows, found.grid.cols) == (rows, cols)
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("timm-dino", "dino"),
        ("timm-dinov2", "dinov2"),
        ("timm-dinov2-reg", "dinov2_reg"),
        ("timm-augreg", "timm"),
        ("hf-dinov2", "dinov2"),
        ("hf-dinov2-reg", "dinov2_reg"),
        ("hf-vit", "transformers"),
    ],
)
def test_position_rules_inside_the_model_equal_naive_formulas(family, rule):
    """Run a zero image through: what enters block 0 is the position embedding plus constants."""
    model = build(family)
    extractor = vf.load_extractor(model)
    assert extractor.card.position_rule == rule
    patch = extractor.card.patch
    rows, cols = 6, 3
    extractor = vf.load_extractor(model, size=(rows * patch, cols * patch))
    grey = torch.rand(1, 3, rows * patch, cols * patch)
    stored, constant = _stored(model, extractor.preprocess(grey).pixels)
    naive = {"dino": _dino_positions, "dinov2": _dino_positions}.get(rule, _aligned(rule))(stored, rows, cols)
    seen = []
    block = model.get_submodule(extractor.anatomy.block.format(0))
    handle = block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    extractor(grey, "token@0")
    handle.remove()
    expected = constant + naive
    difference = float((seen[0][0, extractor.card.prefix_tokens :] - expected).abs().max())
    print(f"{family} ({rule}): max abs difference {difference:.2e}")
    assert difference < 2e-5


def test_the_rules_are_not_all_one():
    stored = torch.randn(1, 16, 5)
    found = [_dino_positions(stored, 6, 3), _aligned("timm")(stored, 6, 3), _aligned("transformers")(stored, 6, 3)]
    assert all(
        float((a - b).abs().max()) > 0.01 for a, b in [(found[0], found[1]), (found[0], found[2]), (found[1], found[2])]
    )


def test_the_native_grid_is_left_alone():
    model = build("timm-dino")
    extractor = vf.load_extractor(model, size=64)
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    image = torch.rand(1, 3, 64, 64)
    extractor(image, "token@0")
    handle.remove()
    patches = model.patch_embed.proj(extractor.preprocess(image).pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0][:, 1:], patches + model.pos_embed[:, 1:])


def test_the_model_is_not_changed_by_stride_or_rule():
    model = build("timm-dino")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stride = model.patch_embed.proj.stride
    vf.load_extractor(model, size=(48, 64), stride=2)(torch.rand(1, 3, 48, 64), "key@2")
    assert model.patch_embed.proj.stride == stride
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_rotary_positions_follow_the_stride():
    """With stride = patch/2 on an image of half as many patches a side, the rotation is that of the finer grid."""
    for family in ("timm-dinov3", "hf-dinov3"):
        model = build(family)
        overlapping = vf.load_extractor(model, size=(48, 80), stride=8, rope="post", norm_qk=True)
        flat = torch.full((1, 3, 48, 80), 0.4)  # every patch the same, so keys differ by position alone
        fine = overlapping(flat, "key@0").features
        plain = vf.load_extractor(model, size=(5 * 16, 9 * 16), rope="post", norm_qk=True)
        coarse = plain(torch.full((1, 3, 80, 144), 0.4), "key@0").features
        torch.testing.assert_close(fine, coarse, atol=1e-5, rtol=1e-4)


def test_published_hub_layout_of_dino_reads_the_same_as_timm(tmp_path):
    """A checkpoint of the DINO repository (teacher, `module.backbone.` prefix) gives the keys of timm's."""
    reference = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0, dynamic_img_size=True)
    file = tmp_path / "dino_full.pth"
    state = {f"module.backbone.{key}": value for key, value in reference.state_dict().items()}
    state["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({"student": {}, "teacher": state, "epoch": 3}, file)
    loaded = vf.load_extractor("dino_vits16", checkpoint=file, device="cpu", size=64)
    image = torch.rand(1, 3, 64, 64)
    pixels = loaded.preprocess(image).pixels
    expected = _recorded(reference.eval(), "blocks.11.attn.qkv", lambda: _with_rule(reference, pixels))
    assert torch.equal(loaded(image, "key@11").features, expected[:, 1:, 384:768])


def _with_rule(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    # DINO's own code: position embedding by its own rule, then the blocks.
    rows, cols = pixels.shape[2] // 16, pixels.shape[3] // 16
    patches = model.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    positions = _dino_scale_factor(model.pos_embed[:, 1:], rows, cols)
    tokens = torch.cat([model.cls_token + model.pos_embed[:, :1], patches + positions], 1)
    return model.blocks(tokens)


def _dino_scale_factor(stored: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    side = math.isqrt(stored.shape[1])
    maps = stored.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / math.sqrt(stored.shape[1]), (cols + 0.1) / math.sqrt(stored.shape[1]))
    return F.interpolate(maps, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)


def _stored(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored patch positions (1, n, dim), the projected patches (tokens, dim))."""
    if hasattr(model, "pos_embed"):
        projected = model.patch_embed.proj(pixels)
        stored = model.pos_embed
        if stored.shape[1] != math.isqrt(stored.shape[1]) ** 2:
            stored = stored[:, 1:]
        elif not model.no_embed_class:
            stored = stored[:, model.num_prefix_tokens :]
    else:
        projected = model.embeddings.patch_embeddings.projection(pixels)
        stored = model.embeddings.position_embeddings[:, 1:]
    return stored.detach(), projected.detach().flatten(2).transpose(1, 2)[0]


# Naive resampling, one output at a time, in float64 -----------------------------------------------------------------


def _cubic(x: float, a: float) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _weights(new: int, old: int, step: float, antialias: bool) -> np.ndarray:
    """Rows of weights: output i takes from input j. ``step`` is input cells for one output cell."""
    table = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * step - 0.5
        if antialias:  # the filter of image libraries: a = −0.5, widened when shrinking, normalised, cut at the border
            wide = max(step, 1.0)
            for j in range(old):
                table[i, j] = _cubic((j - centre) / wide, -0.5)
            table[i] /= table[i].sum()
        else:  # four taps, a = −0.75, border repeated
            base = math.floor(centre)
            for tap in range(base - 1, base + 3):
                table[i, min(max(tap, 0), old - 1)] += _cubic(centre - tap, -0.75)
    return table


def _resampled(stored: torch.Tensor, vertical: np.ndarray, horizontal: np.ndarray) -> torch.Tensor:
    side = math.isqrt(stored.shape[1])
    grid = stored[0].double().numpy().reshape(side, side, -1)
    out = np.einsum("ri,cj,ijd->rcd", vertical, horizontal, grid)
    return torch.from_numpy(out.reshape(-1, grid.shape[-1])).float()


def _dino_positions(stored: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    side = math.isqrt(stored.shape[1])
    return _resampled(
        stored,
        _weights(rows, side, side / (rows + 0.1), antialias=False),
        _weights(cols, side, side / (cols + 0.1), antialias=False),
    )


def _aligned(rule: str):
    antialias = rule in ("timm", "dinov2_reg")

    def positions(stored: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        side = math.isqrt(stored.shape[1])
        return _resampled(
            stored, _weights(rows, side, side / rows, antialias), _weights(cols, side, side / cols, antialias)
        )

    return positions


def test_without_a_rule_the_model_does_as_it_does_also_with_overlap():
    """timm's own resampling, for the finer grid: the rule "timm" and no rule give the same tokens."""
    model = build("timm-augreg")
    image = torch.rand(1, 3, 64, 96)
    ruled = vf.load_extractor(model, size=(64, 96), stride=8)
    assert ruled.card.position_rule == "timm"
    free = vf.load_extractor(model, size=(64, 96), stride=8, card=replace(ruled.card, position_rule=None))
    torch.testing.assert_close(free(image, "token@0").features, ruled(image, "token@0").features)


@pytest.mark.parametrize("family", [*TIMM, *HF])
@pytest.mark.parametrize("taps", ["cls@1", "key@1 cls@1", "cls@1 attention@1 token@0", "cls@1 out@1"])
def test_frugal_reads_the_same_but_for_rounding_and_its_gradient_too(family, taps, photo):
    exact = vf.load_extractor(build(family), size=_native(build(family)))
    if not exact.card.has_cls:
        pytest.skip("no CLS")
    frugal = exact.resized()
    frugal.frugal = True
    found = []
    for extractor in (exact, frugal):
        pixels = extractor.preprocess(photo).pixels
        image = torch.rand(2, 3, *pixels.shape[-2:], generator=torch.Generator().manual_seed(0)).requires_grad_()
        read = extractor(image, taps.split())
        sum(d.features.sin().sum() + d.cls.cos().sum() for d in read.values()).backward()
        found.append([*(read[tap].features.detach() for tap in read), *(read[tap].cls.detach() for tap in read)])
        found[-1].append(image.grad)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["timm-augreg", "timm-dinov3"])
def test_frugal_runs_the_rest_of_the_last_block_for_cls_alone(family, photo):
    model = build(family)
    extractor = vf.load_extractor(model, size=64)
    extractor.frugal = True
    tokens = []
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].shape[1]))
    for taps in (["key@1", "cls@1"], ["cls@1", "token@1"], ["cls@1", "out@1"], ["cls@1", "key@2"]):
        extractor(photo, taps)
    handle.remove()
    everything = extractor.preprocess(photo).grid.tokens + extractor.card.prefix_tokens
    assert tokens == [1, everything, everything, everything]
