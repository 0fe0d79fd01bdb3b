"""Tiny diffusion models from configuration, with random weights, built as the published ones are.

Every function returns a fresh object: hooks, attention processors and dtypes that one test sets reach no other.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import vitfeats as vf
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.models.diffusion import denoiser

_Network = TypeVar("_Network", bound=nn.Module)
_START, _END = "<|startoftext|>", "<|endoftext|>"
_TEXT_DIM = 16

_SD_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": _TEXT_DIM,
    "attention_head_dim": 2,  # the number of heads, in spite of its name: diffusers keeps the misnomer of SD 1
}
_SDXL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 32),
    "transformer_layers_per_block": (1, 2, 3),
    "norm_num_groups": 4,
    "cross_attention_dim": 2 * _TEXT_DIM,  # the states of both text encoders, side by side
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": _TEXT_DIM + 6 * 8,  # the pooled text, then an embedding of six sizes
}
_DDPM_UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 8,  # channels per head: here the name is true
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 128,
}
_SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _random(build: Callable[[], _Network], seed: int) -> _Network:
    """Return a network whose every parameter is random, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        network = build().eval().requires_grad_(False)
        for parameter in network.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def _tokenizer(pad: str = _END) -> CLIPTokenizer:
    """Return CLIP's tokenizer without merges: it spells every text byte by byte."""
    letters = sorted(ByteLevel.alphabet())  # alphabet() has no fixed order; sorted, "!" is token 0 as in CLIP
    words = [*letters, *(f"{letter}</w>" for letter in letters), _START, _END]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


def _text_config(tokenizer: CLIPTokenizer, activation: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_DIM,
        intermediate_size=2 * _TEXT_DIM,
        projection_dim=_TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # where the pooled output is read
        pad_token_id=tokenizer.pad_token_id,
    )


def sd_unet(**changes: Any) -> UNet2DConditionModel:
    """Return a fresh UNet with the blocks of Stable Diffusion 1.5; `changes` replace arguments of its constructor."""
    return _random(lambda: UNet2DConditionModel(**{**_SD_UNET, **changes}), seed=0)


def vae() -> AutoencoderKL:
    """Return a fresh autoencoder whose latents have 4 channels at an eighth of the image's size."""
    return _random(lambda: AutoencoderKL(**_VAE, scaling_factor=0.18215), seed=1)


def sd_pipeline(prediction: str = "epsilon", **unet_changes: Any) -> StableDiffusionPipeline:
    """Return a fresh Stable Diffusion 1.5; with `prediction="v_prediction"` its scheduler is that of 2.1."""
    tokenizer = _tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=_random(lambda: CLIPTextModel(_text_config(tokenizer)), seed=2),
        tokenizer=tokenizer,
        unet=sd_unet(**unet_changes),
        scheduler=DDIMScheduler(
            **_SD_BETAS, steps_offset=1, set_alpha_to_one=False, clip_sample=False, prediction_type=prediction
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Return a fresh Stable Diffusion XL."""
    first, second = _tokenizer(), _tokenizer(pad="!")
    return StableDiffusionXLPipeline(
        vae=_random(lambda: AutoencoderKL(**_VAE, scaling_factor=0.13025), seed=1),
        text_encoder=_random(lambda: CLIPTextModel(_text_config(first)), seed=2),
        text_encoder_2=_random(lambda: CLIPTextModelWithProjection(_text_config(second, "gelu")), seed=3),
        tokenizer=first,
        tokenizer_2=second,
        unet=_random(lambda: UNet2DConditionModel(**_SDXL_UNET), seed=0),
        scheduler=EulerDiscreteScheduler(**_SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def ddpm(**unet_changes: Any) -> DDPMPipeline:
    """Return a fresh unconditional model of 32 × 32 pixels, with attention at its coarsest level (4 × 4)."""
    unet = _random(lambda: UNet2DModel(**{**_DDPM_UNET, **unet_changes}), seed=0)
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def adm(**unet_changes: Any) -> DDPMPipeline:
    """Return a fresh model like `ddpm()` that also predicts its variance, in three further channels."""
    unet = _random(lambda: UNet2DModel(**{**_DDPM_UNET, "out_channels": 6, **unet_changes}), seed=0)
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(variance_type="learned_range"))


def picture(height: int = 64, width: int = 128, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Return random pictures (batch, 3, height, width) in 0..1."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def load(pipeline, size=(64, 128), **settings) -> DiffusionExtractor:
    """Return the extractor of a pipeline at a size, with these fields of its settings."""
    found = vf.load_extractor(denoiser(pipeline), size=size, diffusion=DiffusionConfig(**settings))
    assert isinstance(found, DiffusionExtractor)
    return found


def published_aggregation(dims, steps: int, dim: int, seed: int = 0, spread: float = 1.0) -> dict[str, torch.Tensor]:
    """Return random weights with the names and shapes of the published aggregation networks."""
    shapes: dict[str, tuple[int, ...]] = {"mixing_weights": (steps * len(dims),)}
    for layer, channels in enumerate(dims):
        parts = {"conv1": (dim // 4, channels, 1), "conv2": (dim // 4, dim // 4, 3), "conv3": (dim, dim // 4, 1)}
        if channels != dim:
            parts["shortcut"] = (dim, channels, 1)
        for part, (after, before, side) in parts.items():
            key = f"bottleneck_layers.{layer}.0.{part}"
            shapes[f"{key}.weight"] = (after, before, side, side)
            shapes[f"{key}.norm.weight"] = shapes[f"{key}.norm.bias"] = (after,)
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * spread for key, shape in shapes.items()}
