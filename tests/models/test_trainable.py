"""Networks to train: what is built, what they begin with, what is refused, and that they come back from a folder."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import vitfeats as vf
from vitfeats.card import IMAGENET_MEAN, IMAGENET_STD
from vitfeats.errors import ConfigError, UnknownModelError, WeightsUnavailableError
from vitfeats.models.bundled import ASSETS
from vitfeats.models.trainable import new_network, save_network, takes_any_size
from vitfeats.nets.vgg import SmallVgg


def test_a_new_network_is_timms_without_a_classifier():
    torch.manual_seed(0)
    network = new_network("test_vit", 48, drop_path=0.3)
    torch.manual_seed(0)
    wanted = timm.create_model("test_vit", num_classes=0, img_size=48)
    assert network.pos_embed.shape == (1, 10, 64)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), wanted.parameters(), strict=True))
    assert network(torch.zeros(2, 3, 48, 48)).shape == (2, 64)
    assert network(torch.zeros(2, 3, 16, 16)).shape == (2, 64)  # other sizes too: of small crops
    drops = [block.drop_path1.drop_prob for block in network.blocks if hasattr(block.drop_path1, "drop_prob")]
    assert max(drops) == pytest.approx(0.3)
    assert network.pretrained_cfg["mean"] == IMAGENET_MEAN
    assert network.pretrained_cfg["std"] == IMAGENET_STD
    assert network.pretrained_cfg["input_size"] == (3, 48, 48)


def test_what_timm_says_of_its_own_weights_is_left_out():
    cfg = new_network("test_vit2", 32).pretrained_cfg
    assert not {"hf_hub_id", "license", "url", "tag"} & set(cfg)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownModelError, match="expected a model of timm, got 'test_vti'. Did you mean 'test_vit"):
        new_network("test_vti", 32)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "test_efficientnet", "mixer_s32_224"])
def test_what_is_no_vision_transformer_is_refused(name):
    message = f"expected a vision transformer of timm to train, got '{name}'; try 'vit_tiny_patch16_224'"
    with pytest.raises(ConfigError, match=message):
        new_network(name, 64)


def test_a_start_that_is_not_there_is_refused(tmp_path):
    message = "expected a file of weights or the name of a bundled model to start from, got"
    for start in ("minni", str(tmp_path / "none.pt"), str(tmp_path)):
        with pytest.raises(WeightsUnavailableError, match=message):
            new_network("test_vit", 32, start=start)


def test_a_start_of_another_model_is_refused(tmp_path):
    save_file(new_network("test_vit2", 32).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="expected a checkpoint that fits VisionTransformer, but .*other.safetensors"):
        new_network("test_vit", 32, start=str(tmp_path / "other.safetensors"))


def test_a_start_of_the_same_size_is_taken_as_it_is(tmp_path):
    wanted = new_network("test_vit", 48).state_dict()
    save_file(wanted, tmp_path / "start.safetensors")
    found = new_network("test_vit", 48, start=str(tmp_path / "start.safetensors")).state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in found.items())


def test_a_start_from_a_bundled_model_interpolates_its_positions():
    stored = {name: value.float() for name, value in load_file(ASSETS / "mini.safetensors").items()}
    for size, tokens in ((112, 50), (64, 17)):
        found = new_network("vit_tiny_patch16_224", size, start="mini").state_dict()
        assert found["pos_embed"].shape == (1, tokens, 192)
        wanted = resample_abs_pos_embed(stored["pos_embed"], [size // 16] * 2, num_prefix_tokens=1)
        torch.testing.assert_close(found["pos_embed"], wanted)
        assert all(torch.equal(stored[name], found[name]) for name in found if name != "pos_embed")


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
@torch.no_grad()
def test_what_is_saved_is_read_by_vitfeats_and_by_timm(name, tmp_path):
    network = new_network(name, 48).eval()
    save_network(network, tmp_path / "model")
    image = torch.rand(3, 48, 48)
    read = vf.load_extractor(tmp_path / "model", device="cpu")
    assert read.card.mean == IMAGENET_MEAN
    assert read.card.std == IMAGENET_STD
    assert read.card.default_size == 48
    assert read.card.licence == "unknown"
    own = vf.load_extractor(network)
    for tap in ("token@-1", "key@2"):
        assert torch.equal(read(image, tap).features, own(image, tap).features)
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(again.forward_features(images), network.forward_features(images))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architecture"] == name


def test_the_small_vgg_is_trained_with_norms_and_kept_without(tmp_path):
    torch.manual_seed(0)
    network = new_network("vgg_mini", 64)
    network.train()(torch.randn(4, 3, 32, 32))
    save_network(network.eval(), tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    plain = SmallVgg()
    plain.load_state_dict(state)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(images), network(images), rtol=1e-3, atol=1e-4)
    torch.save(network.state_dict(), tmp_path / "norms.pt")
    again = new_network("vgg_mini", 64, start=str(tmp_path / "norms.pt")).eval()
    assert torch.equal(again(images), network(images))


def test_what_takes_one_size_is_known():
    assert takes_any_size(new_network("test_vit", 32))
    assert takes_any_size(new_network("vgg_mini", 32))
    assert not takes_any_size(new_network("beit_base_patch16_224", 32))
