"""The face of a diffusion model: what its parts are told and give, against those parts called directly."""

import re
from typing import Any

import diffusions
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from vitfeats.errors import ConfigError
from vitfeats.models.diffusion import denoiser
from vitfeats.nets.denoiser import Denoiser

NEAR = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def sd() -> Any:
    return diffusions.sd_pipeline()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return diffusions.sdxl_pipeline()


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_latents_are_the_autoencoders_scaled(sd):
    model, pixels = denoiser(sd), _noise(1, 3, 64, 128).clamp(-1, 1)
    found = sd.vae.encode(pixels).latent_dist
    noise = _noise(*found.mean.shape, seed=1)
    torch.testing.assert_close(model.encode(pixels), found.mean * 0.18215, **NEAR)
    torch.testing.assert_close(model.encode(pixels, noise), (found.mean + found.std * noise) * 0.18215, **NEAR)
    latents = _noise(1, 4, 8, 16, seed=2)
    torch.testing.assert_close(model.decode(latents), sd.vae.decode(latents / 0.18215).sample, **NEAR)
    assert model.latent_shape(64, 128) == (4, 8, 16) == tuple(found.mean.shape[1:])
    assert (model.factor, model.multiple, model.channels) == (8, 64, 4)


@torch.no_grad()
def test_one_noise_serves_a_batch(sd):
    """It may be (1, …), as the documentation says: every picture is given the same."""
    model, pixels, noise = denoiser(sd), _noise(2, 3, 64, 64).clamp(-1, 1), _noise(1, 4, 8, 8, seed=1)
    one_by_one = torch.cat([model.encode(pixel[None], noise) for pixel in pixels])
    torch.testing.assert_close(model.encode(pixels, noise), one_by_one, **NEAR)


@torch.no_grad()
def test_autoencoders_with_a_shift():
    pipe = diffusions.sd_pipeline()
    pipe.vae.register_to_config(shift_factor=0.3)
    model, pixels, latents = denoiser(pipe), _noise(1, 3, 64, 64), _noise(1, 4, 8, 8)
    mean = pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(model.encode(pixels), (mean - 0.3) * 0.18215, **NEAR)
    torch.testing.assert_close(model.decode(latents), pipe.vae.decode(latents / 0.18215 + 0.3).sample, **NEAR)


def test_models_of_pixels_have_no_latents():
    model, pixels = denoiser(diffusions.ddpm()), _noise(1, 3, 32, 48)
    assert torch.equal(model.encode(pixels), pixels)
    assert torch.equal(model.decode(pixels), pixels)
    assert (model.factor, model.multiple, model.channels) == (1, 8, 3)
    assert model.latent_shape(32, 48) == (3, 32, 48)
    assert not model.takes_text
    assert model.condition("", 2, (32, 48)) == {}


def test_the_share_that_is_left_of_a_picture(sd):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(denoiser(sd).kept, torch.from_numpy(np.cumprod(1 - betas)).float(), **NEAR)
    linear = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    torch.testing.assert_close(denoiser(diffusions.ddpm()).kept, torch.from_numpy(linear).float(), **NEAR)
    unet = diffusions.ddpm().unet
    torch.testing.assert_close(denoiser(unet).kept, torch.from_numpy(linear).float(), **NEAR)  # diffusers' defaults
    trained = [0.1, 0.2, 0.5]
    kept = Denoiser(unet, schedule={"trained_betas": trained, "num_train_timesteps": 3}).kept
    torch.testing.assert_close(kept, torch.tensor([0.9, 0.72, 0.36]), **NEAR)
    zero = Denoiser(unet, schedule={"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}).kept
    assert float(zero[-1]) < 1e-6
    assert "kept" not in denoiser(sd).state_dict()


@torch.no_grad()
def test_what_the_unet_is_told_of_a_prompt(sd):
    model = denoiser(sd)
    for prompt in ("", "a cat"):
        tokens = sd.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        expected = sd.text_encoder(tokens.input_ids)[0].expand(3, -1, -1)
        told = model.condition(prompt, 3, (64, 64))
        assert list(told) == ["encoder_hidden_states"]
        torch.testing.assert_close(told["encoder_hidden_states"], expected, **NEAR)
    assert not torch.allclose(
        model.condition("", 1, (64, 64))["encoder_hidden_states"],
        model.condition("a cat", 1, (64, 64))["encoder_hidden_states"],
        atol=1e-3,
    )


@torch.no_grad()
def test_a_prompt_is_encoded_once(sd):
    model, calls = denoiser(sd), []
    handle = sd.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for batch in (1, 2):
        model.condition("a cat", batch, (64, 64))
    handle.remove()
    assert len(calls) == 1


@torch.no_grad()
def test_sdxl_is_told_pooled_text_and_sizes(sdxl):
    model = denoiser(sdxl)
    told = model.condition("a dog", 2, (96, 64))
    states = []
    for tokenizer, encoder in ((sdxl.tokenizer, sdxl.text_encoder), (sdxl.tokenizer_2, sdxl.text_encoder_2)):
        tokens = tokenizer("a dog", padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        found = encoder(tokens.input_ids, output_hidden_states=True)
        states.append(found.hidden_states[-2])
    torch.testing.assert_close(told["encoder_hidden_states"], torch.cat(states, -1).expand(2, -1, -1), **NEAR)
    added = told["added_cond_kwargs"]
    torch.testing.assert_close(added["text_embeds"], found.text_embeds.expand(2, -1), **NEAR)
    assert added["time_ids"].tolist() == [[96, 64, 0, 0, 96, 64]] * 2
    said = model.predict(_noise(2, 4, 12, 8), 30, told)
    torch.testing.assert_close(said, sdxl.unet(_noise(2, 4, 12, 8), 30, **told).sample, **NEAR)
    assert set(model.text) == {"text_encoder", "text_encoder_2"}


@torch.no_grad()
def test_predictions(sd):
    model, latents = denoiser(sd), _noise(2, 4, 8, 16)
    told = model.condition("", 2, (64, 128))
    said = {time: model.predict(latents, time, told) for time in (-1, 0, 500)}
    for time, found in said.items():
        torch.testing.assert_close(found, sd.unet(latents, time, **told).sample, **NEAR)
    assert not torch.allclose(said[-1], said[0], atol=1e-5)
    adm = diffusions.adm()
    found = denoiser(adm).predict(_noise(1, 3, 32, 32), 7, {})
    whole = adm.unet(_noise(1, 3, 32, 32), 7).sample
    assert whole.shape[1] == 6
    torch.testing.assert_close(found, whole[:, :3], **NEAR)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_is_made_into_the_noise_that_was_added(prediction, kept):
    """A network that is never wrong: the noise that comes back is the noise that went in."""
    unet = diffusions.ddpm().unet
    model = Denoiser(unet, schedule={"prediction_type": prediction})
    share, clean, noise = torch.tensor(kept), _noise(1, 3, 8, 8), _noise(1, 3, 8, 8, seed=1)
    noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
    said = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": share.sqrt() * noise - (1 - share).sqrt() * clean,
    }[prediction]
    torch.testing.assert_close(model.as_noise(said, noisy, share), noise, atol=1e-4, rtol=1e-4)


def test_moving_and_freezing_reaches_every_part():
    pipe = diffusions.sdxl_pipeline()
    model = denoiser(pipe)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    model.requires_grad_(True)
    assert all(p.requires_grad for part in parts for p in part.parameters())
    model.requires_grad_(False)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    model.train()
    assert all(part.training for part in parts)
    model.to(torch.float64)
    assert all(p.dtype == torch.float64 for part in parts for p in part.parameters())


@torch.no_grad()
def test_a_prompt_follows_the_model_to_another_precision():
    model = denoiser(diffusions.sd_pipeline())
    model.condition("a cat", 1, (64, 64))
    model.double()
    told = model.condition("a cat", 1, (64, 64))
    assert told["encoder_hidden_states"].dtype == torch.float64
    assert model.predict(_noise(1, 4, 8, 8), 3, told).isfinite().all()


def test_a_prompt_that_is_too_long_says_what_was_cut(sd):
    with pytest.warns(UserWarning, match=r"the prompt has 82 tokens and the model reads 77; cut off: 'bbbbb'"):
        denoiser(sd).condition("a" * 75 + "b" * 5, 1, (64, 64))


def test_models_that_are_refused(sd):
    unet, xl = diffusions.ddpm().unet, diffusions.sdxl_pipeline().unet
    with pytest.raises(
        ConfigError, match=r"expected an autoencoder for a U-Net of 4 channels, got none; pass the whole pipeline"
    ):
        Denoiser(sd.unet, schedule={})
    with pytest.raises(
        ConfigError, match=r"a model that predicts 'epsilon', 'v_prediction' or 'sample', got 'flow_prediction'"
    ):
        Denoiser(unet, schedule={"prediction_type": "flow_prediction"})
    with pytest.raises(ConfigError, match=r"expected a noise schedule that DDIM knows, but: .*cubic"):
        Denoiser(unet, schedule={"beta_schedule": "cubic"})
    with pytest.raises(ConfigError, match=r"expected no prompt for a model without text, got 'a cat'"):
        denoiser(unet).condition("a cat", 1, (32, 32))
    alone = Denoiser(xl, schedule={}, vae=sd.vae)
    with pytest.raises(ConfigError, match=re.escape("expected the text encoders of SDXL beside its U-Net, got none;")):
        alone.condition("", 1, (32, 32))
    with pytest.raises(ConfigError, match=r"a text encoder for the prompt 'a cat', got a U-Net alone"):
        alone.condition("a cat", 1, (32, 32))


def test_fused_projections_are_refused_until_they_are_unfused():
    unet = diffusions.sd_unet(in_channels=3, out_channels=3)
    unet.fuse_qkv_projections()
    with pytest.raises(ConfigError, match=r"a U-Net with separate projections; call unet.unfuse_qkv_projections\(\)"):
        Denoiser(unet, schedule={})
    unet.unfuse_qkv_projections()
    assert isinstance(Denoiser(unet, schedule={}), nn.Module)


def test_the_schedule_is_that_of_the_pipeline():
    pipe = diffusions.sd_pipeline("v_prediction")
    model = denoiser(pipe)
    assert model.prediction == "v_prediction"
    again = DDIMScheduler.from_config(model.schedule)
    assert again.alphas_cumprod.equal(pipe.scheduler.alphas_cumprod)
    assert (again.config.steps_offset, again.config.set_alpha_to_one) == (1, False)
