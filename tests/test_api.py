"""Names to extractors: catalogue, prefixes, folders, modules, checkpoints; and what is refused."""

import contextlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
import transformers
from families import build

import vitfeats as vf
from vitfeats import api
from vitfeats.extractors.vit import Anatomy
from vitfeats.grid import Frame


@pytest.fixture
def catalogue(monkeypatch):
    """A copy of the catalogue that a test may add to."""
    monkeypatch.setattr(api, "_rows", dict(api._rows))


@pytest.fixture(autouse=True)
def default(monkeypatch):
    monkeypatch.setattr(api, "_default", [])
    monkeypatch.delenv("VITFEATS_MODEL", raising=False)


def test_the_catalogue_is_true():
    """Every row that names a timm architecture says what timm builds for it."""
    for card in vf.list_models():
        if not card.source.startswith("timm:") or "large" in card.source:
            continue
        name = card.source.removeprefix("timm:")
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
        found = api.libraries.card_of(model, card.name)
        assert (found.patch, found.depth, found.dim, found.heads) == (card.patch, card.depth, card.dim, card.heads), (
            name
        )
        assert (found.prefix_tokens, found.has_cls) == (card.prefix_tokens, card.has_cls), name
        assert (found.mean, found.std) == (card.mean, card.std), name
        assert found.position_rule == card.position_rule, name
        config = timm.get_pretrained_cfg(name)
        assert config.interpolation == card.interpolation, name
        assert "QuickGELU" not in str(config.notes) or "quickgelu" in name, f"{name} is not the network of its weights"
        size = found.default_size
        wanted = card.default_size if isinstance(card.default_size, int) else min(card.default_size)
        assert (size if isinstance(size, int) else min(size)) == wanted, name
        assert (found.layers, found.usual_tap) == (card.layers, card.usual_tap), name
        assert timm.get_pretrained_cfg_value(name, "hf_hub_id"), f"timm publishes no weights for {name}"


def test_list_models_by_pattern():
    names = [card.name for card in vf.list_models("dino_*")]
    assert names == ["dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"]
    assert vf.list_models()[0].name == "mini"
    assert vf.list_models("nothing*") == []


def test_unknown_names_offer_the_nearest():
    with pytest.raises(vf.UnknownModelError, match=r"got 'dino_vits9'. Did you mean 'dino_vits8' or 'dino_vits16'"):
        vf.load_extractor("dino_vits9")
    with pytest.raises(vf.UnknownModelError, match="of timm, got 'timm:vit_smal_patch16_224'. Did you mean 'vit_small"):
        vf.load_extractor("timm:vit_smal_patch16_224")
    with pytest.raises(vf.UnknownModelError, match="got 'nonesuch'"):
        vf.set_default_model("nonesuch")


def test_facets_and_layers_are_checked_before_any_work(mini):
    with pytest.raises(vf.UnknownFacetError, match=r"expected a facet, got 'keys'. Did you mean 'key'"):
        mini("no-such-file.jpg", "keys@3")
    with pytest.raises(vf.TapError, match="a layer from 0 to 11"):
        mini("no-such-file.jpg", "key@12")
    with pytest.raises(vf.TapError, match="a tap written facet@layer"):
        mini("no-such-file.jpg", "key")
    with pytest.raises(vf.ConfigError, match="at least one tap"):
        mini("no-such-file.jpg", [])
    with pytest.raises(vf.ConfigError, match="batch_size of at least 1, got 0"):
        mini.each([], "key@1", batch_size=0)


def test_default_model_by_call_and_by_environment(monkeypatch):
    assert api.default_model() == "mini"
    monkeypatch.setenv("VITFEATS_MODEL", "dino_vits8")
    assert api.default_model() == "dino_vits8"
    vf.set_default_model("dino_vitb8")
    assert api.default_model() == "dino_vitb8"
    vf.set_default_model(None)
    assert api.default_model() == "dino_vits8"


def test_extract_keeps_a_few_extractors(monkeypatch):
    monkeypatch.setattr(api, "_cache", type(api._cache)())
    loaded = []
    real = api.load_extractor
    monkeypatch.setattr(api, "load_extractor", lambda **settings: loaded.append(settings["size"]) or real(**settings))
    image = torch.rand(3, 64, 64)
    for size in (32, 32, 48, 32):
        vf.extract(image, size=size, device="cpu")
    assert loaded == [32, 48]
    for size in (64, 80, 96, 48):
        vf.extract(image, size=size, device="cpu")
    assert loaded == [32, 48, 64, 80, 96, 48], "the one used longest ago makes room"


def test_register_a_model_of_your_own(catalogue, photo):
    card = replace(vf.list_models("mini")[0], name="ours", source="module")
    vf.register_model(card, lambda card, checkpoint: api.bundled.load(vf.list_models("mini")[0], checkpoint))
    d = vf.load_extractor("ours", size=64, device="cpu")(photo)
    assert d.model == "ours"
    with pytest.raises(vf.ConfigError, match="a free name, but a model 'ours' is registered already"):
        vf.register_model(card, lambda *_: torch.nn.Identity())


def test_a_module_is_left_as_it_is(photo):
    model = build("timm-augreg").train().requires_grad_(True)
    extractor = vf.load_extractor(model)
    extractor(photo, "key@1")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert extractor.model is model


def test_a_model_we_load_is_frozen(mini):
    assert not mini.model.training
    assert not any(parameter.requires_grad for parameter in mini.model.parameters())


def test_batch_statistics_are_refused():
    model = build("timm-augreg")
    model.norm = torch.nn.BatchNorm1d(48)
    model.train()
    with pytest.raises(vf.ConfigError, match="'norm' is a BatchNorm1d in training mode; call model.eval"):
        vf.load_extractor(model)


def test_state_around_a_call_is_left_as_found(mini, photo):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with torch.enable_grad():
        mini(photo)
        assert torch.is_grad_enabled()
    with torch.no_grad():
        mini(photo)
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.is_autocast_enabled("cpu")


def test_a_module_of_fixed_size_says_so(photo):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=48, depth=1, num_heads=4).eval()
    extractor = vf.load_extractor(model)
    assert extractor(photo).grid.network_size == (224, 224), "its only size is its default"
    with pytest.raises(
        vf.ShapeError,
        match=r"\(224, 224\) .* got \(64, 96\) at stride 16; leave size= .* create it with dynamic_img_size",
    ):
        vf.load_extractor(model, size=(64, 96))(photo)
    with pytest.raises(vf.ShapeError, match="at stride 8"):
        vf.load_extractor(model, stride=8)(photo)


class Own(torch.nn.Module):
    """A vision transformer that nobody published: three blocks with their own names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 24, 8, 8)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"att": _OwnAttention(), "mlp": torch.nn.Linear(24, 24)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer["mlp"](layer["att"](x))
        return x


class _OwnAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 12)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _own_anatomy() -> Anatomy:
    part = "layers.{}.att"
    return Anatomy(
        block="layers.{}.mlp",
        attention=part,
        query=f"{part}.to_q",
        key=f"{part}.to_k",
        value=f"{part}.to_v",
        patch_projection="stem",
    )


def test_your_own_module_with_a_card_and_an_anatomy(photo):
    card = vf.ModelCard("own", "ours", "module", patch=8, depth=3, dim=24, heads=2, prefix_tokens=0, has_cls=False)
    model = Own().eval()
    extractor = vf.load_extractor(model, card=card, anatomy=_own_anatomy(), size=(32, 48))
    found = extractor(photo, ["key@1", "token@2", "out@0"])
    assert found["key@1"].features.shape == (1, 24, 24)
    assert extractor.attention(photo, 2).shape == (1, 2, 24, 24)
    expected = model.layers[0]["att"].to_k(model.stem(extractor.preprocess(photo).pixels).flatten(2).transpose(1, 2))
    assert torch.equal(extractor(photo, "key@0").features, expected)
    assert extractor.resized(stride=4)(photo, "key@0").grid.tokens == 7 * 11


def test_your_own_module_without_them():
    with pytest.raises(vf.ConfigError, match=r"got Own; describe your own module with card=ModelCard"):
        vf.load_extractor(Own())
    card = vf.ModelCard("own", "ours", "module", patch=8, depth=3, dim=24, heads=2)
    with pytest.raises(vf.ConfigError, match=r"got Own: it has neither `blocks` and `patch_embed` .* anatomy=Anatomy"):
        vf.load_extractor(Own(), card=card)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hiera_tiny_224", "got Hiera: its blocks attend in a way of their own (MaskUnitAttention)"),
        ("xcit_nano_12_p8_224", "got Xcit: its blocks attend in a way of their own (XCA)"),
        ("samvit_base_patch16", "got VisionTransformerSAM: its blocks attend in a way of their own (Attention)"),
        (
            "vit_dlittle_patch16_reg1_gap_256",
            "got VisionTransformer: its blocks attend in a way of their own (DiffAttention)",
        ),
        ("vit_base_patch16_xp_224", "got VisionTransformer: its blocks have no `attn.qkv` and no `attn.k_proj`"),
        ("vit_small_patch16_18x2_224", "got VisionTransformer: its blocks have no `attn.qkv`"),
        ("crossvit_9_240", "got CrossVit: its blocks have no `attn.qkv`"),
        ("mvitv2_tiny", "or a model of timm with stages, got MultiScaleVit"),
    ],
)
def test_what_cannot_be_tapped_says_so_in_one_error(name, why):
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with pytest.raises(vf.ConfigError, match=re.escape(why)):
        vf.load_extractor(network)


def test_what_has_stages_but_no_row_of_tokens_is_read_by_its_stages():
    network = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0).eval()
    extractor = vf.load_extractor(network)
    with pytest.raises(
        vf.UnknownFacetError, match=r"a facet that SwinTransformer has, got 'key': .* try 'out@layers.2'"
    ):
        extractor("no-such-file.jpg", "key@3")


def test_an_anatomy_with_some_of_the_projections():
    with pytest.raises(vf.ConfigError, match=r"query=, key= and value=, or of none, got query=None, key='k'"):
        Anatomy(block="b.{}", attention="b.{}", key="k")


def test_settings_that_contradict_each_other():
    with pytest.raises(vf.ConfigError, match=r"card= and anatomy= with your own module, got them with the name 'mini'"):
        vf.load_extractor("mini", card=vf.list_models("mini")[0])
    with pytest.raises(vf.ConfigError, match="checkpoint= with a model's name, got it with a module"):
        vf.load_extractor(build("timm-augreg"), checkpoint="x.pth")
    with pytest.raises(vf.ConfigError, match="a module that is on its device already, got device='cpu'"):
        vf.load_extractor(build("timm-augreg"), device="cpu")
    with pytest.raises(vf.ConfigError, match="dtype 'auto', 'float32', 'bfloat16' or 'float16', got 'int8'"):
        vf.load_extractor("mini", dtype="int8")
    model = build("timm-qk-norm")
    with pytest.raises(vf.ConfigError, match="norm_qk=True with rope='post'"):
        vf.load_extractor(model, card=replace(vf.load_extractor(model).card, name="x"), rope="post", anatomy=_rotary())
    with pytest.raises(
        vf.ShapeError, match=r"a stride that divides the patch size 16, got 5; try one of \[1, 2, 4, 8, 16\]"
    ):
        vf.load_extractor("mini", stride=5)
    with pytest.raises(vf.ShapeError, match=r"a size of at least one patch \(16 pixels\), got 8"):
        vf.load_extractor("mini", size=8)


def _rotary() -> Anatomy:
    return replace(vf.load_extractor(build("timm-qk-norm")).anatomy, rotary=True)


@pytest.mark.usefixtures("as_a_user")
def test_a_rope_that_does_not_exist():
    with pytest.raises(vf.ConfigError, match="rope 'pre' or 'post', got 'after'"):
        vf.load_extractor("mini", rope="after")


def test_norm_needs_a_norm(photo):
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, embed_dim=48, depth=1, num_heads=4, global_pool="avg"
    )
    with pytest.raises(
        vf.ConfigError, match="a final norm over its tokens for norm=True, but VisionTransformer has none"
    ):
        vf.load_extractor(model.eval(), norm=True)


def test_a_device_that_is_not_there():
    missing = "cuda:63"
    with pytest.raises(vf.ConfigError, match=f"a device of this machine, got '{missing}': .*; try 'cpu'"):
        vf.load_extractor("mini", device=missing)


def test_mixed_grids_in_one_call(mini):
    with pytest.raises(vf.ShapeError, match=r"got \(112, 112\) and \(112, 224\) .* size=\(h, w\) .* or use ex.each"):
        mini([torch.rand(3, 50, 50), torch.rand(3, 50, 100)])


def test_folder_written_by_transformers(tmp_path, photo):
    model = build("hf-dinov2-reg")
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    loaded = vf.load_extractor(str(tmp_path), size=64, device="cpu")
    assert loaded.card.mean == (0.1, 0.2, 0.3)
    same = vf.load_extractor(model, size=64, card=loaded.card)
    assert torch.equal(loaded(photo, "key@1").features, same(photo, "key@1").features)


def test_clip_folder_gives_the_vision_tower(tmp_path, photo):
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    vision |= {"image_size": 64, "patch_size": 16}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    whole.save_pretrained(tmp_path)
    d = vf.load_extractor(str(tmp_path), size=64, device="cpu")(photo, "key@1")
    assert d.dim == 48


def test_folder_written_by_timm(tmp_path, photo):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=2).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={"img_size": 64, "depth": 2})
    loaded = vf.load_extractor(str(tmp_path), size=64, device="cpu")
    square = photo[:, :64, :64]
    assert torch.equal(loaded(square, "key@1").features, vf.load_extractor(model)(square, "key@1").features)
    assert loaded.card.depth == 2


def test_a_folder_with_a_malicious_pickle_is_refused(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    for name in ("timm", "hf"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "timm":
            model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
            timm.models.save_for_hf(model, folder, safe_serialization=False)
        else:
            build("hf-vit").config.save_pretrained(folder)
        for file in folder.glob("*.bin"):
            file.unlink()
        torch.save({"cls_token": Evil()}, folder / "pytorch_model.bin")
        with pytest.raises(vf.WeightsUnavailableError):
            vf.load_extractor(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_timm_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(vf.WeightsUnavailableError, match="model.safetensors or pytorch_model.bin in .*, got neither"):
        vf.load_extractor(str(tmp_path), device="cpu")


def test_folder_without_a_config(tmp_path):
    with pytest.raises(vf.WeightsUnavailableError, match="has no config.json"):
        vf.load_extractor(str(tmp_path))


def test_folder_of_something_else(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(vf.ConfigError, match="a vision transformer of .*, got 'bert'"):
        vf.load_extractor(str(tmp_path))


def test_checkpoints_of_both_kinds_load(tmp_path, photo):
    model = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0).eval()
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "b.pth")
    found = [
        vf.load_extractor("dino_vits8", checkpoint=tmp_path / name, size=32, device="cpu")(photo, "key@11").features
        for name in ("a.safetensors", "a.pth", "b.pth")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_dinov2_checkpoint_in_its_own_layout(tmp_path, photo):
    """facebookresearch/dinov2 names its registers `register_tokens` and carries a mask token."""
    model = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, num_classes=0).eval()
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"]
    state["mask_token"] = torch.zeros(1, 384)
    # There the position embedding has an entry for CLS; timm folds it into the token.
    state["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.25), state["pos_embed"]], 1)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = vf.load_extractor("dinov2_vits14_reg", checkpoint=tmp_path / "dinov2.pth", size=56, device="cpu")
    torch.testing.assert_close(loaded.model.cls_token, model.cls_token + 0.25)
    assert torch.equal(loaded.model.reg_token, model.reg_token)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    small = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    torch.save(small.state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(vf.ConfigError, match=r"of another shape \(.*192.* instead of .*384.*is it of the same model"):
        vf.load_extractor("dino_vits16", checkpoint=tmp_path / "tiny.pth", device="cpu")
    torch.save({"strange": torch.zeros(2)}, tmp_path / "strange.pth")
    with pytest.raises(vf.ConfigError, match=r"missing \(cls_token.*1 unexpected \(strange\)"):
        vf.load_extractor("mini", checkpoint=tmp_path / "strange.pth", device="cpu")


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(vf.WeightsUnavailableError, match=r"refused to read .* would run code when loaded"):
        vf.load_extractor("mini", checkpoint=tmp_path / "evil.pth", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_broken_and_missing_weight_files(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not weights at all")
    (tmp_path / "bad.pth").write_bytes(b"not weights at all")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("bad.safetensors", "bad.pth", "empty.pth"):
        with pytest.raises(vf.WeightsUnavailableError, match="damaged"):
            vf.load_extractor("mini", checkpoint=tmp_path / name, device="cpu")
    with pytest.raises(vf.WeightsUnavailableError, match="but there is none; pass checkpoint="):
        vf.load_extractor("mini", checkpoint=tmp_path / "absent.pth", device="cpu")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(vf.WeightsUnavailableError, match="a state dict in .*, got list without tensors"):
        vf.load_extractor("mini", checkpoint=tmp_path / "list.pth", device="cpu")


_ASK = """
import sys, time, torch, huggingface_hub
import vitfeats as vf
vf.load_extractor
start = time.monotonic()
try:
    vf.load_extractor(sys.argv[1])
except vf.WeightsUnavailableError as error:
    print(round(time.monotonic() - start, 2), error)
"""


@pytest.mark.parametrize(
    ("name", "environment", "why"),
    [
        ("dino_vits8", {"HF_HUB_OFFLINE": "1"}, "switched off"),
        # An address that swallows every packet (RFC 5737): nothing answers, nothing refuses.
        ("dino_vits8", {"HF_ENDPOINT": "http://192.0.2.1"}, "192.0.2.1 does not answer"),
        ("hf:facebook/dinov2-small", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1 does not answer"),
        (
            "dino_vits8",
            {"HF_ENDPOINT": "https://example.com", "HTTPS_PROXY": "http://127.0.0.1:9"},
            "127.0.0.1 does not",
        ),
    ],
)
def test_weights_out_of_reach_end_in_one_clear_error(name, environment, why, tmp_path):
    import os

    clean = {k: v for k, v in os.environ.items() if "PROXY" not in k.upper() and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", _ASK, name],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**clean, "HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", **environment},
    )
    seconds, message = done.stdout.split(" ", 1)
    assert why in message
    assert f"weights of '{name}'" in message
    assert str(tmp_path) in message
    assert "checkpoint='FILE'" in message
    assert "'mini'" in message
    print(f"{name} {environment}: {seconds} s")


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    """The look is bounded even where looking up the name hangs: without the bound this test would not end."""
    import threading

    from vitfeats.models import weights

    never = threading.Event()

    def hang(*_args, **_kwargs):
        never.wait()
        raise OSError

    monkeypatch.setattr(weights.socket, "create_connection", hang)
    assert weights.PROBE_SECONDS <= 2
    assert not weights._answers("hub.example", 443)
    never.set()


def test_cached_weights_are_found_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub

    from vitfeats.models import weights

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, name: str(tmp_path / name))
    monkeypatch.setattr(weights, "_answers", lambda *_: pytest.fail("asked the network"))
    weights.require_weights("dino_vits8", "timm/vit_small_patch8_224.dino")


def test_a_hub_that_answers_is_left_to_download(monkeypatch):
    import socket

    from vitfeats.models import weights

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        weights.require_weights("dino_vits8", "timm/vit_small_patch8_224.dino")


def test_a_folder_does_not_stand_in_a_models_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert vf.load_extractor("mini", size=32, device="cpu").card.name == "mini"
    with pytest.raises(vf.WeightsUnavailableError, match="has no config.json"):
        vf.load_extractor("./mini")


def test_a_folder_with_code_of_its_own_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "weird", "auto_map": {"AutoConfig": "conf.C"}}')
    (tmp_path / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(vf.WeightsUnavailableError, match="a vision transformer in the folder .* cannot be loaded"):
        vf.load_extractor(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("size", ["224", 224.0, (224,), (224, 224, 224), (224.0, 224.0), [224, "224"]])
def test_sizes_that_are_none(size):
    with pytest.raises(vf.ShapeError, match=r"a size in whole pixels, an int or \(height, width\), got"):
        vf.load_extractor("mini", size=size)
    with pytest.raises(vf.ShapeError, match="a size in whole pixels"):
        vf.extract(torch.rand(3, 64, 64), size=size)


@pytest.mark.usefixtures("as_a_user")
def test_numpys_integers_and_lists_are_sizes_layers_and_paths_are_models(photo):
    import numpy as np

    a = vf.load_extractor("mini", size=np.int64(64), device="cpu")
    b = vf.load_extractor("mini", size=[64, 96], device="cpu")
    assert (a.preprocess.size, b.preprocess.size) == (64, (64, 96))
    assert vf.extract(photo, layer=np.int64(3), size=64, device="cpu").tap == vf.Tap("key", 3)
    assert vf.Tap("key", "-1") == vf.Tap("key", -1)
    assert vf.extract(photo, size=[64, 64], device="cpu").grid.tokens == 16
    for stride in (4.0, "8", (8, 8)):
        with pytest.raises(vf.ShapeError, match="a stride that divides the patch size 16, got"):
            vf.load_extractor("mini", stride=stride)


@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_model_and_what_are_no_taps_or_images(tmp_path, mini):
    for wrong in (3, None):
        if wrong is not None:
            with pytest.raises(vf.UnknownModelError, match="a folder or a module, got int"):
                vf.load_extractor(wrong)
            with pytest.raises(vf.UnknownModelError, match="got 3"):
                vf.set_default_model(wrong)
    with pytest.raises(vf.WeightsUnavailableError, match="has no config.json"):
        vf.load_extractor(tmp_path)
    with pytest.raises(vf.ConfigError, match="a tap such as 'key@11' or a sequence of taps, got 11"):
        mini(torch.rand(3, 64, 64), 11)
    for one in ("cat.jpg", vf.samples.cat()):
        with pytest.raises(vf.ConfigError, match=r"several images, got one; pass \[image\]"):
            mini.each(one)


def test_names_that_no_hub_and_no_timm_knows():
    with pytest.raises(vf.UnknownModelError, match="got 'timm:vit_tiny_patch16_224.bogus'. (Did you mean|Known)"):
        vf.load_extractor("timm:vit_tiny_patch16_224.bogus")
    for name in ("foo bar", "a/b/c", "--"):
        with pytest.raises(vf.UnknownModelError, match="a model as ORG/NAME"):
            vf.load_extractor(f"hf:{name}")


@pytest.mark.parametrize("text", ["{broken", "[]", '{"architecture": "no_such_network"}', '{"model_type": 7}'])
def test_folders_with_a_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(vf.WeightsUnavailableError, match="expected"):
        vf.load_extractor(str(tmp_path))


def test_a_broken_preprocessor_config(tmp_path):
    build("hf-vit").save_pretrained(tmp_path)
    for text in ("{bad", '{"image_mean": 0.5}'):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(vf.WeightsUnavailableError, match="preprocessor_config.json"):
            vf.load_extractor(str(tmp_path))


def test_damaged_checkpoints_are_always_named(tmp_path):
    import random

    whole = tmp_path / "whole.pth"
    torch.save({f"w{i}": torch.randn(20, 20) for i in range(5)}, whole)
    data, dice = whole.read_bytes(), random.Random(0)
    (tmp_path / "text.pth").write_bytes(b"hello world this is text")
    with pytest.raises(vf.WeightsUnavailableError):
        api.libraries.read_checkpoint(tmp_path / "text.pth")
    for number in range(150):
        broken = bytearray(data[: dice.randrange(len(data))] if number % 3 == 0 else data)
        for _ in range(dice.randrange(1, 40)):
            if broken:
                broken[dice.randrange(len(broken))] = dice.randrange(256)
        (tmp_path / "broken.pth").write_bytes(broken)
        with contextlib.suppress(vf.WeightsUnavailableError):  # any other error ends the test
            api.libraries.read_checkpoint(tmp_path / "broken.pth")


def test_a_beit_of_ones_own_is_known_to_be_of_one_size():
    beit = timm.create_model("beit_base_patch16_224", num_classes=0, depth=1, embed_dim=48, num_heads=4).eval()
    extractor = vf.load_extractor(beit)
    with pytest.raises(vf.ShapeError, match="for this module, got"):
        vf.load_extractor(beit, size=(64, 96))(torch.rand(3, 64, 96), "token@0")
    assert extractor(torch.rand(3, 50, 70), "token@0").grid.network_size == (224, 224)


def test_a_card_with_a_rule_or_a_tap_that_is_none():
    card = vf.list_models("mini")[0]
    with pytest.raises(vf.ConfigError, match="a position rule, got 'dion'. Did you mean 'dino'"):
        replace(card, position_rule="dion")
    with pytest.raises(vf.UnknownFacetError, match="got 'kex'"):
        replace(card, default_tap="kex@1")


def test_a_compiled_module_keeps_its_name(photo):
    compiled = torch.compile(build("timm-augreg"), backend="eager")
    d = vf.load_extractor(compiled)(photo, "key@1")
    assert d.model == "VisionTransformer"


# Pixels as they are ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg():
    return vf.load_extractor("vgg_mini", device="cpu")


def test_pixels_are_described_as_they_are(vgg):
    pixels = torch.rand(2, 3, 48, 80)
    found = vgg.describe(pixels, ["out@relu1_1", vf.Tap("out", "relu4_1")])
    assert list(map(str, found)) == ["out@relu1_1", "out@relu4_1"]
    with torch.no_grad():
        seen = vgg.preprocess.normalise(pixels)
        for name, layer in vgg.model.named_children():
            seen = layer(seen)
            if name in ("relu1_1", "relu4_1"):
                assert torch.equal(found[f"out@{name}"].map, seen)
    assert found["out@relu4_1"].frames == (Frame((48, 80), (48, 80)),) * 2
    assert found["out@relu4_1"].model == "vgg_mini"
    # The same as a call at that size, and no matter at which size the extractor is.
    called = vgg.resized(size=(48, 80))(pixels, "out@relu4_1")
    assert torch.equal(called.features, found["out@relu4_1"].features)


def test_pixels_of_a_transformer_are_described_too(mini):
    pixels = torch.rand(1, 3, 64, 96)
    found = mini.describe(pixels, ["key@11"])["key@11"]
    assert (found.grid.rows, found.grid.cols) == (4, 6)
    assert torch.equal(found.features, mini.resized(size=(64, 96))(pixels, "key@11").features)


def test_pixels_beyond_those_of_an_image_are_taken(vgg):
    pixels = torch.rand(1, 3, 32, 32) * 4 - 2
    found = vgg.describe(pixels, ["out@relu1_1"])["out@relu1_1"].map
    convolved = vgg.model.conv1_1(vgg.preprocess.normalise(pixels)).relu()
    assert torch.equal(found, convolved)
    assert not torch.allclose(found, vgg.describe(pixels.clamp(0, 1), ["out@relu1_1"])["out@relu1_1"].map)


def test_gradients_reach_pixels_that_require_them(vgg):
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    vgg.describe(pixels, ["out@relu5_1"])["out@relu5_1"].features.sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
    assert all(p.grad is None for p in vgg.model.parameters())
    assert not vgg.describe(pixels.detach(), ["out@relu1_1"])["out@relu1_1"].features.requires_grad
    with torch.no_grad():
        assert not vgg.describe(pixels, ["out@relu1_1"])["out@relu1_1"].features.requires_grad


def test_pixels_and_taps_that_do_not_do(vgg, mini):
    for size in ((40, 64), (64, 33), (8, 64)):
        with pytest.raises(
            vf.ShapeError, match=rf"at least one patch \(16\) plus whole strides \(16\), got \({size[0]}, "
        ):
            mini.describe(torch.rand(1, 3, *size), ["key@1"])
    with pytest.raises(vf.ConfigError, match="expected at least one tap, got none"):
        vgg.describe(torch.rand(1, 3, 32, 32), [])
    with pytest.raises(vf.TapError, match="expected a layer of vgg_mini, got 'relu9_1'"):
        vgg.describe(torch.rand(1, 3, 32, 32), ["out@relu9_1"])
    assert not any(len(m._forward_hooks) for m in vgg.model.modules())
