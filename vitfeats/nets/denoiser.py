"""A diffusion model's networks behind one face: pictures in, latents and predicted noise out."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.errors import ConfigError

Pixels = Float[Tensor, "batch 3 height width"]
Latents = Float[Tensor, "batch channels rows cols"]

TEXT_TOKENS = 77
"""Tokens of a prompt in CLIP, and so in Stable Diffusion."""


class Denoiser(nn.Module):
    """A U-Net that predicts noise, with what stands around it: an autoencoder, text encoders, a noise schedule.

    Built from parts of diffusers, of which it asks no more than their published faces. Nothing of them is changed.

    Args:
        unet: A ``UNet2DModel`` or ``UNet2DConditionModel``.
        vae: An ``AutoencoderKL`` whose latents the U-Net denoises; None if it denoises pixels.
        pipeline: A diffusers pipeline that encodes prompts; None for a model without text.
        schedule: The configuration of its scheduler: ``num_train_timesteps``, betas, ``prediction_type``.

    Raises:
        ConfigError: If the U-Net wants latents and there is no autoencoder, or the schedule does not say its betas.
    """

    def __init__(
        self, unet: nn.Module, *, schedule: Mapping[str, Any], vae: nn.Module | None = None, pipeline: Any = None
    ) -> None:
        super().__init__()
        self.unet, self.vae = unet, vae
        self._pipeline = pipeline
        # Registered, so that moving and freezing this module moves and freezes them.
        names = ("text_encoder", "text_encoder_2")
        encoders = {name: getattr(pipeline, name, None) for name in names}
        self.text = nn.ModuleDict({name: encoder for name, encoder in encoders.items() if encoder is not None})
        config: Any = unet.config
        self.channels = int(config.in_channels)
        if vae is None and self.channels != 3:
            raise ConfigError(
                f"expected an autoencoder for a U-Net of {self.channels} channels, got none; pass the whole pipeline"
            )
        if _is_fused(unet):
            raise ConfigError("expected a U-Net with separate projections; call unet.unfuse_qkv_projections() first")
        self.schedule = dict(schedule)
        self.prediction = str(self.schedule.get("prediction_type") or "epsilon")
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"expected a model that predicts 'epsilon', 'v_prediction' or 'sample', got {self.prediction!r}"
            )
        self.register_buffer("kept", _kept(self.schedule), persistent=False)
        self._embedded: dict[str, tuple[Tensor, Tensor | None]] = {}

    kept: Float[Tensor, " levels"]
    """Share of the picture's variance that is left at each level, ᾱ in the papers, from clean to noise."""

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)  # type: ignore[union-attr]

    @property
    def multiple(self) -> int:
        """What sides of pictures must be a multiple of, in pixels: of the coarsest map's cells."""
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)  # type: ignore[union-attr]

    @property
    def takes_text(self) -> bool:
        """Whether the U-Net is conditioned on text."""
        return getattr(self.unet.config, "cross_attention_dim", None) is not None

    def encode(self, pixels: Pixels, noise: Float[Tensor, "draws channels rows cols"] | None = None) -> Latents:
        """Return latents of pictures in -1..1; ``noise`` draws them from the encoder's distribution, None is its mean.

        Args:
            pixels: Sides must be multiples of :attr:`multiple`.
            noise: (1 or batch, channels, rows, cols), standard normal.
        """
        if self.vae is None:
            return pixels
        vae: Any = self.vae
        found = vae.encode(pixels.to(vae.dtype)).latent_dist
        drawn = found.mean if noise is None else found.mean + found.std * noise.to(found.mean)
        config = vae.config
        return (drawn.float() - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, latents: Latents) -> Pixels:
        """Return pictures in -1..1, roughly: what the network makes is not clamped."""
        if self.vae is None:
            return latents
        vae: Any = self.vae
        scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(scaled.to(vae.dtype)).sample.float()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (channels, rows, cols) of the latents of a picture."""
        return self.channels, height // self.factor, width // self.factor

    def condition(self, prompt: str, batch: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return the keyword arguments that tell the U-Net a prompt; none for a model without text.

        Args:
            prompt: The text; a warning says what was cut off if it is too long.
            batch: Pictures.
            size: (height, width) of the pictures in pixels, which SDXL is told.

        Raises:
            ConfigError: If there is a prompt and nothing to encode it with.
        """
        if not self.takes_text:
            if prompt:
                raise ConfigError(f"expected no prompt for a model without text, got {prompt!r}")
            return {}
        embedded, pooled = self._embed(prompt)
        told: dict[str, Any] = {"encoder_hidden_states": embedded.expand(batch, -1, -1)}
        if getattr(self.unet.config, "addition_embed_type", None) == "text_time":
            if pooled is None:
                raise ConfigError("expected the text encoders of SDXL beside its U-Net, got none; pass the pipeline")
            # Original size, top-left corner of the crop, target size: the picture is seen whole, at its own size.
            times = torch.tensor([[*size, 0, 0, *size]], dtype=embedded.dtype, device=embedded.device)
            told["added_cond_kwargs"] = {"text_embeds": pooled.expand(batch, -1), "time_ids": times.expand(batch, -1)}
        return told

    def predict(self, latents: Latents, time: int, told: Mapping[str, Any]) -> Latents:
        """Run the U-Net at a level (-1 is below the first: no noise at all); return what it predicts, in float32."""
        unet: Any = self.unet
        times = torch.full((len(latents),), time, device=latents.device)
        said = unet(latents.to(unet.dtype), times, **told).sample
        return said[:, : self.channels].float()  # a learned variance comes behind (ADM)

    def as_noise(self, said: Latents, latents: Latents, kept: Tensor) -> Latents:
        """Return predicted noise, whatever the network predicts.

        Args:
            said: What it predicted.
            latents: What it was given.
            kept: The level's share of the picture's variance, ᾱ.
        """
        if self.prediction == "epsilon":
            return said
        if self.prediction == "v_prediction":  # Salimans and Ho, Progressive Distillation, ICLR 2022
            return kept.sqrt() * said + (1 - kept).sqrt() * latents
        if float(kept) == 1:  # there is no noise in it
            return torch.zeros_like(latents)
        return (latents - kept.sqrt() * said) / (1 - kept).sqrt()

    @torch.no_grad()
    def _embed(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        first = next(self.unet.parameters())
        if not self.text:
            if prompt:
                raise ConfigError(
                    f"expected a text encoder for the prompt {prompt!r}, got a U-Net alone; pass the whole pipeline, "
                    "or leave the prompt empty"
                )
            found: Any = self.unet.config
            width = found.cross_attention_dim
            width = int(width if isinstance(width, int) else width[0])
            return torch.zeros(1, TEXT_TOKENS, width, device=first.device, dtype=first.dtype), None
        if prompt not in self._embedded:
            self._warn_of_length(prompt)
            with torch.autocast(first.device.type, enabled=False):
                made = self._pipeline.encode_prompt(
                    prompt, device=first.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
            pooled = made[2] if len(made) > 2 else None  # SDXL gives four
            self._embedded[prompt] = made[0], pooled
        embedded, pooled = self._embedded[prompt]
        return embedded.to(first), None if pooled is None else pooled.to(first)

    def _warn_of_length(self, prompt: str) -> None:
        tokenizer = self._pipeline.tokenizer
        most = int(tokenizer.model_max_length)
        found = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(found) > most:
            cut = tokenizer.decode(found[most - 1 : -1], skip_special_tokens=True)
            warnings.warn(
                f"the prompt has {len(found)} tokens and the model reads {most}; cut off: {cut!r}",
                UserWarning,
                stacklevel=5,
            )


def _kept(schedule: Mapping[str, Any]) -> Tensor:
    """Return ᾱ of every level, from what a scheduler's configuration says of its betas."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    named = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    try:
        return DDIMScheduler(**{name: schedule[name] for name in named if name in schedule}).alphas_cumprod.float()
    except Exception as error:  # diffusers has several for settings that it does not know
        raise ConfigError(f"expected a noise schedule that DDIM knows, but: {error}") from error


def _is_fused(unet: nn.Module) -> bool:
    # The processors know; the modules go on saying that they are fused after they no longer are.
    return any("Fused" in type(processor).__name__ for processor in getattr(unet, "attn_processors", {}).values())
