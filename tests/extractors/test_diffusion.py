"""What is read of a diffusion model is what it computes, against diffusers called directly and formulas written out."""

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusions
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusions import load, picture
from torch import Tensor, nn

import vitfeats as vf
from vitfeats.configs import DiffusionConfig
from vitfeats.extractors.diffusion import find_layers, hyperfeature_layers
from vitfeats.hooks import count_hooks
from vitfeats.models.diffusion import denoiser
from vitfeats.nets.chains import chain_of
from vitfeats.views import numbered

NEAR = {"atol": 1e-5, "rtol": 0.0}
SCALE, SCALE_XL = 0.18215, 0.13025
DEEP, MIDDLE, LAST = "out@down2.res1", "residual@up1.res1", "residual@up3.res2"
TIMES = [-1, *range(0, 961, 20)]  # what the U-Net sees inverting in 50 steps of 1000


@pytest.fixture(scope="module")
def sd() -> Any:
    return diffusions.sd_pipeline()


@pytest.fixture(scope="module")
def thin() -> Any:
    """With half of the layers, for long chains."""
    return diffusions.sd_pipeline(layers_per_block=1)


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return diffusions.sdxl_pipeline()


@pytest.fixture(scope="module")
def ddpm() -> Any:
    return diffusions.ddpm()


def _map(found: vf.Descriptor) -> Tensor:
    return found.features.transpose(1, 2).unflatten(2, (found.grid.rows, found.grid.cols))


# The naive side: diffusers called directly, with hooks of the test's own ----------------------------------------------


@contextmanager
def _watched(unet: nn.Module, paths: dict[str, str] | None = None) -> Iterator[SimpleNamespace]:
    """Record what the U-Net is given, and what the named modules give, one a call."""
    seen = SimpleNamespace(times=[], latents=[], told=[], out={name: [] for name in paths or {}})

    def given(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.latents.append(args[0].detach().clone())
        seen.times.append(torch.as_tensor(args[1]).flatten().tolist())
        seen.told.append(kwargs)

    def gave(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            seen.out[name].append(output.detach().clone())

        return hook

    handles = [unet.register_forward_pre_hook(given, with_kwargs=True)]
    handles += [unet.get_submodule(path).register_forward_hook(gave(name)) for name, path in (paths or {}).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _each_time(seen: SimpleNamespace) -> list[int]:
    """Return the level of each call, which must be that of each of its pictures."""
    assert all(len(set(times)) == 1 for times in seen.times)
    return [int(times[0]) for times in seen.times]


def _alphas(linear: bool = False) -> Tensor:
    betas = torch.linspace(1e-4, 0.02, 1000) if linear else torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0)


def _share(level: int, linear: bool = False) -> Tensor:
    return _alphas(linear)[level] if level >= 0 else torch.ones(())


def _drawn(shape: tuple[int, ...], *purpose: int, seed: int = 0) -> Tensor:
    return torch.randn((1, *shape), generator=numbered(seed, *purpose))


def _encoded(pipe: Any, image: Tensor, scale: float = SCALE, seed: int = 0, mean: bool = False) -> Tensor:
    found = pipe.vae.encode(image * 2 - 1).latent_dist
    noise = _drawn(tuple(found.mean.shape[1:]), 0, seed=seed)
    return (found.mean + (0 if mean else found.std * noise)) * scale


def _text(pipe: Any, prompt: str) -> Tensor:
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids)[0]


def _text_xl(pipe: Any, prompt: str, size: tuple[int, int]) -> dict[str, Any]:
    states, pooled = [], None
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        tokens = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        found = encoder(tokens.input_ids, output_hidden_states=True)
        states.append(found.hidden_states[-2])
        pooled = found[0]
    ids = torch.tensor([[size[0], size[1], 0, 0, size[0], size[1]]], dtype=torch.float32)
    return {
        "encoder_hidden_states": torch.cat(states, -1),
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids},
    }


def _ddim(x: Tensor, eps: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """Song et al., DDIM, equation 12 with σ = 0."""
    return there.sqrt() * (x - (1 - here).sqrt() * eps) / here.sqrt() + (1 - there).sqrt() * eps


def _pairs(steps: int, inverting: bool) -> list[tuple[int, int]]:
    stride = 1000 // steps
    pairs = [(stride * (n - 1) if n else -1, stride * n) for n in range(steps)]
    return pairs if inverting else [(there, here) for here, there in reversed(pairs)]


# Taps ----------------------------------------------------------------------------------------------------------------

ON_SD = {
    "residual@down0.res0": "down_blocks.0.resnets.0.conv2",
    "residual@mid.res1": "mid_block.resnets.1.conv2",
    "residual@up0.res2": "up_blocks.0.resnets.2.conv2",
    "residual@up3.res2": "up_blocks.3.resnets.2.conv2",
    "out@down0.res1": "down_blocks.0.resnets.1",
    "out@down1.attn0": "down_blocks.1.attentions.0",
    "out@down2": "down_blocks.2",
    "out@mid.attn0": "mid_block.attentions.0",
    "out@mid": "mid_block",
    "out@up0": "up_blocks.0",
    "out@up1": "up_blocks.1",
    "out@up3": "up_blocks.3",
    "query@down0.attn1": "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "key@up1.attn0": "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
    "value@mid.attn0": "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
}
ON_SDXL = {
    "out@up0": "up_blocks.0",
    "residual@up2.res1": "up_blocks.2.resnets.1.conv2",
    "key@up0.attn0": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
    "key@up0.attn0.block1": "up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_k",
    "query@up0.attn1.block2": "up_blocks.0.attentions.1.transformer_blocks.2.attn1.to_q",
    "value@up1.attn2.block1": "up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_v",
}
ON_DDPM = {
    "residual@mid.res0": "mid_block.resnets.0.conv2",
    "out@down1": "down_blocks.1",
    "out@up0.attn1": "up_blocks.0.attentions.1",
    "out@up3": "up_blocks.3",
    "key@down3.attn0": "down_blocks.3.attentions.0.to_k",
    "query@mid.attn0": "mid_block.attentions.0.to_q",
    "value@up0.attn2": "up_blocks.0.attentions.2.to_v",
}


def _as_tokens(seen: Tensor) -> Tensor:
    return seen.flatten(2).transpose(1, 2) if seen.ndim == 4 else seen


def _compare(found: vf.Descriptors, seen: SimpleNamespace) -> None:
    worst = 0.0
    for tap, outputs in seen.out.items():
        (output,) = outputs
        expected = _as_tokens(output)
        assert found[tap].features.shape == expected.shape, tap
        if output.ndim == 4:
            assert (found[tap].grid.rows, found[tap].grid.cols) == tuple(output.shape[2:]), tap
        assert expected.abs().max() > 1e-3, tap
        worst = max(worst, float((found[tap].features - expected).abs().max()))
    print(f"max abs difference {worst:.2e}")
    assert worst <= 1e-5


@torch.no_grad()
def test_taps_of_stable_diffusion_equal_the_modules_own_outputs(sd):
    image = picture(batch=2)
    found = load(sd, time=261, prompt="a cat")(image, list(ON_SD))
    latents = _encoded(sd, image)
    noisy = _share(261).sqrt() * latents + (1 - _share(261)).sqrt() * _drawn((4, 8, 16), 1, 0)
    with _watched(sd.unet, ON_SD) as seen:
        sd.unet(noisy, 261, encoder_hidden_states=_text(sd, "a cat").expand(2, -1, -1))
    _compare(found, seen)
    # A picture of 64 × 128: blocks give what their upsampler made of it, tokens lie as the pixels do.
    assert (found["out@up0"].grid.rows, found["out@up0"].grid.cols, found["out@up0"].grid.stride) == (2, 4, 32)
    assert (found["key@up1.attn0"].grid.rows, found["key@up1.attn0"].grid.cols) == (2, 4)
    assert (found["query@down0.attn1"].grid.rows, found["query@down0.attn1"].grid.cols) == (8, 16)
    assert all(found[tap].grid.network_size == (64, 128) for tap in ON_SD)


@torch.no_grad()
def test_taps_of_sdxl_equal_the_modules_own_outputs(sdxl):
    """It is told the text of two encoders, the pooled text and six sizes; its attentions have several blocks."""
    image = picture(32, 64)
    found = load(sdxl, (32, 64), time=100, prompt="a dog", seed=3)(image, list(ON_SDXL))
    latents = _encoded(sdxl, image, SCALE_XL, seed=3)
    noisy = _share(100).sqrt() * latents + (1 - _share(100)).sqrt() * _drawn((4, 4, 8), 1, 0, seed=3)
    with _watched(sdxl.unet, ON_SDXL) as seen:
        sdxl.unet(noisy, 100, **_text_xl(sdxl, "a dog", (32, 64)))
    _compare(found, seen)
    assert not torch.equal(found["key@up0.attn0"].features, found["key@up0.attn0.block1"].features)


@torch.no_grad()
@pytest.mark.parametrize("made", ["ddpm", "adm"])
def test_taps_of_pixel_models_equal_the_modules_own_outputs(made, ddpm):
    pipe = ddpm if made == "ddpm" else diffusions.adm()
    image = picture(32, 48)
    found = load(pipe, (32, 48), time=41, seed=1)(image, list(ON_DDPM))
    share = _share(41, linear=True)
    noisy = share.sqrt() * (image * 2 - 1) + (1 - share).sqrt() * _drawn((3, 32, 48), 1, 0, seed=1)
    with _watched(pipe.unet, ON_DDPM) as seen:
        pipe.unet(noisy, 41)
    _compare(found, seen)


@torch.no_grad()
def test_a_tap_is_the_same_alone_beside_others_and_by_number(sd):
    extractor = load(sd)
    image = picture()
    together = extractor(image, [DEEP, MIDDLE, LAST, "key@mid.attn0"])
    for tap, one in together.items():
        assert torch.equal(extractor(image, str(tap)).features, one.features)
    assert torch.equal(extractor(image, "residual@-1").features, together[LAST].features)
    assert extractor.resolve(vf.Tap("residual", 0)).layer == "down0.res0"
    assert extractor.resolve(vf.Tap("key", -1)).layer == "up3.attn2"
    assert extractor.resolve(vf.Tap("out", -1)).layer == "up3"
    default = extractor(image)
    assert str(default.tap) == "out@up1"


@torch.no_grad()
def test_the_pass_ends_at_the_deepest_tap(sd):
    with _watched(sd.unet, {"up1": "up_blocks.1", "up2": "up_blocks.2", "up3": "up_blocks.3"}) as seen:
        load(sd)(picture(), [MIDDLE, "out@up1"])
    assert [len(seen.out[name]) for name in ("up1", "up2", "up3")] == [1, 0, 0]


@torch.no_grad()
def test_several_layers_are_brought_to_the_finest_and_concatenated(sd):
    tap = "residual@up0.res0+up3.res2"
    extractor = load(sd)
    image = picture(batch=2)
    found = extractor(image, [tap, "residual@up0.res0", LAST])
    coarse, fine = _map(found["residual@up0.res0"]), _map(found[LAST])
    expected = torch.cat([F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False), fine], 1)
    torch.testing.assert_close(_map(found[tap]), expected, **NEAR)
    chain = load(sd, mode="inversion", steps=5, keep=5)
    found = chain(image, [f"{tap}#2", "residual@up0.res0#2", f"{LAST}#2"])
    coarse, fine = _map(found["residual@up0.res0#2"]), _map(found[f"{LAST}#2"])
    expected = torch.cat([F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False), fine], 1)
    torch.testing.assert_close(_map(found[f"{tap}#2"]), expected, **NEAR)


def test_layers_are_named_in_the_order_they_run(sd, sdxl, ddpm):
    for pipe, size in ((sd, (8, 8)), (sdxl, (4, 4)), (ddpm, (32, 32))):
        model = denoiser(pipe)
        layers = find_layers(pipe.unet)
        order: list[str] = []
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda _m, _i, _o, name=name, order=order: order.append(name)
            )
            for name, path in layers.items()
        ]
        with torch.no_grad():
            model.predict(torch.zeros(1, model.channels, *size), 5, model.condition("", 1, (64, 64)))
        for handle in handles:
            handle.remove()
        assert order == list(layers)
    published = [f"up{block}.res{sub}" for block in range(4) for sub in range(3)]
    assert list(hyperfeature_layers(find_layers(sd.unet))) == published
    assert find_layers(sd.unet)["up1.res0"] == "unet.up_blocks.1.resnets.0"


# Modes of one pass ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_noise_is_added_up_to_the_level_and_is_the_same_for_every_picture(sd):
    image = picture(batch=2)
    extractor = load(sd, time=300, seed=7)
    with _watched(sd.unet) as seen:
        extractor(image, MIDDLE)
    share = _share(300)
    expected = share.sqrt() * _encoded(sd, image, seed=7) + (1 - share).sqrt() * _drawn((4, 8, 16), 1, 0, seed=7)
    torch.testing.assert_close(seen.latents[0], expected, **NEAR)
    assert seen.times == [[300, 300]]
    torch.testing.assert_close(seen.told[0]["encoder_hidden_states"], _text(sd, "").expand(2, -1, -1), **NEAR)


@torch.no_grad()
def test_an_ensemble_is_the_mean_over_draws(sd):
    image = picture()
    path = {MIDDLE: "up_blocks.1.resnets.1.conv2"}
    latents, share, text = _encoded(sd, image), _share(261), _text(sd, "")
    with _watched(sd.unet, path) as seen:
        for draw in range(3):
            noise = _drawn((4, 8, 16), 1, draw)
            sd.unet(share.sqrt() * latents + (1 - share).sqrt() * noise, 261, encoder_hidden_states=text)
    maps = seen.out[MIDDLE]
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)
    torch.testing.assert_close(_map(load(sd, ensemble=3)(image, MIDDLE)), sum(maps) / 3, **NEAR)
    torch.testing.assert_close(_map(load(sd)(image, MIDDLE)), maps[0], **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("time", [-1, 0, 261])
def test_a_clean_pass_adds_no_noise(sd, time):
    image = picture()
    extractor = load(sd, mode="clean", time=time)
    with _watched(sd.unet, {MIDDLE: "up_blocks.1.resnets.1.conv2"}) as seen:
        found = extractor(image, MIDDLE)
        sd.unet(_encoded(sd, image), time, encoder_hidden_states=_text(sd, ""))
    torch.testing.assert_close(seen.latents[0], seen.latents[1], **NEAR)
    assert seen.times == [[time], [time]]
    torch.testing.assert_close(_map(found), seen.out[MIDDLE][1], **NEAR)
    torch.testing.assert_close(seen.out[MIDDLE][0], seen.out[MIDDLE][1], **NEAR)


@torch.no_grad()
def test_latents_are_drawn_or_the_mean(sd):
    image = picture()
    for latent, seed in (("mean", 0), ("sample", 0), ("sample", 5)):
        with _watched(sd.unet) as seen:
            load(sd, mode="clean", time=0, latent=latent, seed=seed)(image, MIDDLE)
        expected = _encoded(sd, image, seed=seed, mean=latent == "mean")
        torch.testing.assert_close(seen.latents[0], expected, **NEAR)
    drawn = _encoded(sd, image) - _encoded(sd, image, mean=True)
    assert drawn.abs().max() > 1e-3


# Chains --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_published_chain_of_fifty_steps_inverting(thin):
    """Levels, tags (0 is the noisiest) and latents after each step, against the formula."""
    image = picture(64, 64)
    extractor = load(thin, 64, mode="inversion")
    taps = {49: 0, 25: 24, 0: 49}  # tag: number of the call
    path = {"map": "up_blocks.1.resnets.1.conv2"}
    with _watched(thin.unet, path) as seen:
        found = extractor(image, [f"{MIDDLE}#{tag}" for tag in taps])
    assert _each_time(seen) == TIMES
    text, latents = _text(thin, ""), _encoded(thin, image)
    with _watched(thin.unet, path) as naive:
        for here, there in _pairs(50, inverting=True):
            eps = thin.unet(latents, here, encoder_hidden_states=text).sample
            latents = _ddim(latents, eps, _share(here), _share(there))
    assert _each_time(naive) == TIMES
    worst = max(float((a - b).abs().max()) for a, b in zip(seen.latents, naive.latents, strict=True))
    print(f"latents: max abs difference {worst:.2e}")
    assert worst <= 1e-5
    for tag, call in taps.items():
        torch.testing.assert_close(_map(found[f"{MIDDLE}#{tag}"]), naive.out["map"][call], **NEAR)


@torch.no_grad()
def test_the_published_chain_generating(thin):
    began = _drawn((4, 8, 8), 99)
    path = {"map": "up_blocks.1.resnets.1.conv2"}
    extractor = load(thin, 64, mode="inversion")
    taps = (0, 25, 49)  # the number of the call is the tag itself
    with _watched(thin.unet, path) as seen:
        made = extractor.generate(latents=began, taps=[f"{MIDDLE}#{tag}" for tag in taps])
    assert _each_time(seen) == list(range(980, -1, -20))
    text, latents = _text(thin, ""), began
    with _watched(thin.unet, path) as naive:
        for here, there in _pairs(50, inverting=False):
            eps = thin.unet(latents, here, encoder_hidden_states=text).sample
            latents = _ddim(latents, eps, _share(here), _share(there))
    scale = float(latents.abs().max())
    worst = max(float((a - b).abs().max()) for a, b in zip(seen.latents, naive.latents, strict=True))
    print(f"latents up to {scale:.1f}: max abs difference {worst:.2e}")
    assert worst <= 1e-5 * max(1.0, scale)
    torch.testing.assert_close(made.latents, latents, atol=1e-5 * max(1.0, scale), rtol=0)
    image = (thin.vae.decode(latents / SCALE).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made.images, image, atol=1e-4, rtol=0)
    for tag in taps:
        torch.testing.assert_close(_map(made.features[f"{MIDDLE}#{tag}"]), naive.out["map"][tag], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "adm"])
def test_each_kind_of_prediction_is_carried_on_as_noise(kind, sd):
    """What a step needs is the noise, whatever the network says: v = √ᾱ ε − √(1−ᾱ) x, or a variance behind it."""
    linear = kind == "adm"
    pipe = diffusions.adm() if linear else diffusions.sd_pipeline(kind)
    image = picture(32, 32) if linear else picture(64, 64)
    latents = image * 2 - 1 if linear else _encoded(pipe, image)
    told = {} if linear else {"encoder_hidden_states": _text(pipe, "")}
    for inverting in (True, False):
        for here, there in _pairs(5, inverting):
            said = pipe.unet(latents, here, **told).sample
            a = _share(here, linear)
            if kind == "v_prediction":
                said = a.sqrt() * said + (1 - a).sqrt() * latents
            latents = _ddim(latents, said[:, : latents.shape[1]], a, _share(there, linear))
        if inverting:
            noise = latents
    extractor = load(pipe, 32 if linear else 64, mode="inversion", steps=5, keep=5)
    found = extractor.invert(image)
    torch.testing.assert_close(found, noise, **NEAR)
    back = extractor.generate(latents=noise).latents
    torch.testing.assert_close(back, latents, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_models_own_schedule_is_that_of_diffusers(prediction):
    pipe = diffusions.sd_pipeline(prediction, layers_per_block=1)
    image, text = picture(64, 64), _text(pipe, "")
    extractor = load(pipe, 64, mode="inversion", schedule="model", steps=10, keep=6)
    path = {"map": "up_blocks.1.resnets.1.conv2"}
    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    forward = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = _encoded(pipe, image)
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(10)
        began = latents
        with _watched(pipe.unet, path) as naive:
            for time in scheduler.timesteps:
                said = pipe.unet(latents, time, encoder_hidden_states=text).sample
                latents = scheduler.step(said, time, latents).prev_sample
        with _watched(pipe.unet, path) as seen:
            if scheduler is inverse:
                torch.testing.assert_close(extractor.invert(image), latents, **NEAR)
                found = extractor(image, [f"{MIDDLE}#{tag}" for tag in (9, 4, 0)])
            else:
                made = extractor.generate(latents=began, taps=[f"{MIDDLE}#{tag}" for tag in (9, 4, 0)])
                torch.testing.assert_close(made.latents, latents, atol=2e-5, rtol=1e-5)
                found = made.features
        assert _each_time(seen)[-10:] == scheduler.timesteps.tolist()
        for tag in (9, 4, 0):
            call = 9 - tag if scheduler is inverse else tag
            torch.testing.assert_close(_map(found[f"{MIDDLE}#{tag}"]), naive.out["map"][call], atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_models_own_schedule_clips_no_latents(sdxl):
    """Samplers without a setting for it (Euler's, SDXL's own) do not clip; DDIM's default, for pixels, does."""
    assert "clip_sample" not in sdxl.scheduler.config
    extractor = load(sdxl, 32, mode="inversion", schedule="model", steps=4, keep=1)
    began = 3 * _drawn((4, 4, 4), 5)
    told = _text_xl(sdxl, "", (32, 32))
    scheduler = DDIMScheduler.from_config(sdxl.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(4)
    latents = began
    for time in scheduler.timesteps:
        latents = scheduler.step(sdxl.unet(latents, time, **told).sample, time, latents).prev_sample
    made = extractor.generate(latents=began)
    torch.testing.assert_close(made.latents, latents, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_models_own_schedule_knows_every_spacing_or_says_so(spacing):
    """Euler's usual spacing is linspace, which diffusers' inversion does not know."""
    pipe = diffusions.sd_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    extractor = load(pipe, 64, mode="inversion", schedule="model", steps=4, keep=1)
    try:
        found = extractor(picture(64, 64), f"{MIDDLE}#0")
        assert found.features.isfinite().all()
    except vf.ConfigError as error:
        assert "schedule='hyperfeatures'" in str(error)  # noqa: PT017


@pytest.mark.parametrize("inverting", [True, False])
def test_a_chain_of_all_levels_asks_for_none_above_the_last(thin, inverting):
    assert thin.scheduler.config.steps_offset == 1
    model = denoiser(thin)
    chain = chain_of(DiffusionConfig(schedule="model", steps=1000, keep=1), model, inverting)
    assert sorted(level for _, level in chain.visits) == list(range(1000))


@contextmanager
def _tapped_levels(unet: nn.Module, seen: SimpleNamespace) -> Iterator[list[int]]:
    """Note the levels of the calls in which a hook besides the test's own is on the tapped module."""
    at: list[int] = []
    module = unet.get_submodule("up_blocks.1.resnets.1.conv2")

    def note(inner: nn.Module, _inputs: Any, _output: Any) -> None:
        if len(inner._forward_hooks) > 1:
            at.append(_each_time(seen)[-1])

    handle = module.register_forward_hook(note)
    try:
        yield at
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["hyperfeatures", "model"])
def test_the_same_tag_has_the_same_level_in_both_directions(thin, schedule):
    """But for the published chain's one step of difference, which its authors have too."""
    extractor = load(thin, 64, mode="inversion", steps=10, keep=6, schedule=schedule)
    taps = [f"{MIDDLE}#{tag}" for tag in (9, 6, 0)]
    with _watched(thin.unet) as seen, _tapped_levels(thin.unet, seen) as inverted:
        extractor(picture(64, 64), taps)
    with _watched(thin.unet) as seen, _tapped_levels(thin.unet, seen) as generated:
        extractor.generate(latents=_drawn((4, 8, 8), 9), taps=taps)
    if schedule == "model":
        assert inverted == generated[::-1] == [1, 301, 901]
    else:
        assert generated == [900, 300, 0]
        assert inverted == [-1, 200, 800]


@torch.no_grad()
def test_inversion_ends_at_the_noisiest_step_asked_for(thin):
    extractor = load(thin, 64, mode="inversion")
    with _watched(thin.unet, {"up1": "up_blocks.1", "up3": "up_blocks.3"}) as seen:
        extractor(picture(64, 64), [f"{MIDDLE}#45", "out@down2.res0#49"])
    assert _each_time(seen) == [-1, 0, 20, 40, 60]
    assert len(seen.out["up1"]) == len(seen.out["up3"]) == 4  # the fifth pass ends at its deepest tap, in up1
    with _watched(thin.unet) as seen:
        extractor(picture(64, 64), f"{MIDDLE}#49")
    assert _each_time(seen) == [-1]
    with _watched(thin.unet) as seen:
        load(thin, 64, mode="inversion", steps=4, keep=1).invert(picture(64, 64))
    assert _each_time(seen) == [-1, 0, 250, 500]


@torch.no_grad()
def test_guidance_runs_twice_and_reads_the_pass_with_the_prompt(sd):
    extractor = load(sd, 64, mode="inversion", steps=4, keep=1, guidance=3.0, negative_prompt="blurred")
    began = _drawn((4, 8, 8), 77)
    path = {"map": "up_blocks.1.resnets.1.conv2"}
    with _watched(sd.unet, path) as seen:
        made = extractor.generate("a cat", latents=began, taps=[f"{MIDDLE}#{tag}" for tag in range(4)])
    assert _each_time(seen) == [750, 750, 500, 500, 250, 250, 0, 0]
    with_, without = _text(sd, "a cat"), _text(sd, "blurred")
    maps, latents = [], began
    for here, there in _pairs(4, inverting=False):
        u = sd.unet(latents, here, encoder_hidden_states=without).sample
        with _watched(sd.unet, path) as naive:
            c = sd.unet(latents, here, encoder_hidden_states=with_).sample
        maps += naive.out["map"]
        latents = _ddim(latents, u + 3.0 * (c - u), _share(here), _share(there))
    torch.testing.assert_close(made.latents, latents, atol=2e-5, rtol=1e-5)
    for tag in range(4):
        torch.testing.assert_close(_map(made.features[f"{MIDDLE}#{tag}"]), maps[tag], atol=2e-5, rtol=0)
    plain = load(sd, 64, mode="inversion", steps=4, keep=1).generate("a cat", latents=began)
    assert not torch.allclose(plain.latents, made.latents, atol=1e-3)


@torch.no_grad()
def test_guidance_of_inversion_and_of_one_pass(sd):
    image = picture(64, 64)
    settings = {"guidance": 2.0, "prompt": "a cat", "negative_prompt": "a dog"}
    extractor = load(sd, 64, mode="inversion", steps=4, keep=1, **settings)
    with_, without = _text(sd, "a cat"), _text(sd, "a dog")
    latents = _encoded(sd, image)
    for here, there in _pairs(4, inverting=True):
        u = sd.unet(latents, here, encoder_hidden_states=without).sample
        c = sd.unet(latents, here, encoder_hidden_states=with_).sample
        latents = _ddim(latents, u + 2.0 * (c - u), _share(here), _share(there))
    torch.testing.assert_close(extractor.invert(image), latents, **NEAR)
    guided = load(sd, 64, **settings)
    with _watched(sd.unet) as seen:
        found = guided(image, MIDDLE)
    assert len(seen.times) == 1  # nothing is carried on, so the pass without the prompt is left out
    assert torch.equal(found.features, load(sd, 64, prompt="a cat")(image, MIDDLE).features)


def test_the_steps_that_are_kept():
    assert DiffusionConfig(steps=50, keep=11).kept_steps == (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)
    assert DiffusionConfig(steps=10, keep=10).kept_steps == (9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    assert DiffusionConfig(steps=7, keep=1).kept_steps == (6,)
    assert DiffusionConfig(steps=1, keep=1).kept_steps == (0,)
    assert DiffusionConfig(steps=10, keep=2).kept_steps == (9, 0)
    with pytest.raises(vf.ConfigError, match=r"keep less one to divide steps \(50\), or keep=1 or 50, got keep=10; "):
        DiffusionConfig(steps=50, keep=10)
    with pytest.raises(vf.ConfigError, match=r"for example 3, 6, 11$"):
        DiffusionConfig(steps=50, keep=12)
    with pytest.raises(vf.ConfigError, match=r"got keep=51"):
        DiffusionConfig(steps=50, keep=51)


# Laws of every extractor ---------------------------------------------------------------------------------------------

MODES = {
    "noise": {"ensemble": 2},
    "clean": {"mode": "clean", "time": -1},
    "inversion": {"mode": "inversion", "steps": 4, "keep": 1},
    "model": {"mode": "inversion", "steps": 4, "keep": 1, "schedule": "model"},
}


def _tap(mode: str, tap: str = MIDDLE) -> str:
    return tap if mode in ("noise", "clean") else f"{tap}#1"


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_pictures_one_by_one(sd, mode):
    extractor = load(sd, **MODES[mode])
    image = picture(batch=3)
    together = extractor(image, _tap(mode))
    for number in range(3):
        alone = extractor(image[number], _tap(mode))
        torch.testing.assert_close(together[number].features, alone.features, **NEAR)
    assert not torch.allclose(together[0].features, together[1].features, atol=1e-3)
    each = list(extractor.each(list(image), _tap(mode), batch_size=2))
    torch.testing.assert_close(each[2].features, together[2].features, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_bits(sd, mode):
    image, tap = picture(), _tap(mode)
    first = load(sd, **MODES[mode])(image, tap).features
    torch.randn(17)
    assert torch.equal(load(sd, **MODES[mode])(image, tap).features, first)
    other = load(sd, seed=1, **MODES[mode])(image, tap).features
    assert not torch.allclose(other, first, atol=1e-4)


@torch.no_grad()
def test_generated_pictures_differ_by_number_and_seed(sd):
    extractor = load(sd, (64, 64), mode="inversion", steps=2, keep=1)
    three = extractor.generate(number=3)
    assert three.images.shape == (3, 3, 64, 64)
    assert three.latents.shape == (3, 4, 8, 8)
    assert float(three.images.min()) >= 0
    assert float(three.images.max()) <= 1
    one = extractor.generate(number=1)
    torch.testing.assert_close(three.latents[:1], one.latents, **NEAR)
    assert not torch.allclose(three.latents[0], three.latents[1], atol=1e-2)
    assert torch.equal(extractor.generate(seed=0).latents, one.latents)
    assert not torch.allclose(extractor.generate(seed=1).latents, one.latents, atol=1e-2)
    wide = extractor.generate(size=(64, 128), taps=["out@up0#1"])
    assert wide.images.shape == (1, 3, 64, 128)
    assert (wide.features["out@up0#1"].grid.rows, wide.features["out@up0#1"].grid.cols) == (2, 4)


@torch.no_grad()
def test_pictures_are_generated_at_the_size_that_was_loaded(sd):
    for size in ((64, 64), 64):
        assert load(sd, size, steps=1, keep=1).generate().images.shape == (1, 3, 64, 64)


def test_two_threads_share_a_model(sd):
    extractor = load(sd, ensemble=2)
    chain = load(sd, **MODES["inversion"])
    images = [picture(seed=seed) for seed in range(2)]
    work = [(extractor, MIDDLE), (extractor, DEEP), (chain, f"{LAST}#1"), (chain, f"{MIDDLE}#3")]
    jobs = [(reader, image, tap) for image in images for reader, tap in work]
    alone = [reader(image, tap).features for reader, image, tap in jobs]
    start = threading.Barrier(2)

    def run(share: list[tuple[Any, Tensor, str]]) -> list[Tensor]:
        start.wait()
        return [reader(image, tap).features for reader, image, tap in share]

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(run, [jobs[::2], jobs[1::2]]))
    assert all(torch.equal(a, b) for a, b in zip(alone[::2], halves[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[1::2], halves[1], strict=True))
    assert count_hooks(sd.unet) == 0


def test_nothing_of_the_model_is_changed(sd):
    parts = {"unet": sd.unet, "vae": sd.vae, "text": sd.text_encoder}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    modes = {name: [module.training for module in part.modules()] for name, part in parts.items()}
    wants = {name: [p.requires_grad for p in part.parameters()] for name, part in parts.items()}
    processors = dict(sd.unet.attn_processors)
    state = torch.get_rng_state()
    grad = torch.is_grad_enabled()
    for mode, settings in MODES.items():
        load(sd, prompt="a cat", **settings)(picture(), [_tap(mode), _tap(mode, "key@up1.attn0")])
    load(sd, 64, **MODES["model"]).generate(taps=[f"{MIDDLE}#2"])
    load(sd, 64, **MODES["model"]).invert(picture(64, 64))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad
    assert dict(sd.unet.attn_processors) == processors
    for name, part in parts.items():
        after = part.state_dict()
        assert list(after) == list(before[name])
        assert all(torch.equal(after[key], value) for key, value in before[name].items())
        assert [module.training for module in part.modules()] == modes[name]
        assert [p.requires_grad for p in part.parameters()] == wants[name]
        assert count_hooks(part) == 0


@pytest.mark.parametrize("mode", MODES)
def test_hooks_are_gone_after_a_failure(sd, mode):
    def fail(_module: nn.Module, _inputs: Any) -> None:
        raise ValueError("in the way")

    handle = sd.unet.up_blocks[1].resnets[0].register_forward_pre_hook(fail)
    extractor = load(sd, **MODES[mode])
    try:
        with pytest.raises(ValueError, match="in the way"):
            extractor(picture(), [_tap(mode), _tap(mode, LAST), _tap(mode, DEEP)])
        if mode == "model":
            with pytest.raises(ValueError, match="in the way"):
                extractor.generate(taps=[f"{MIDDLE}#1"], size=(64, 64))
        assert count_hooks(sd.unet) == 1
    finally:
        handle.remove()
    assert extractor(picture(), _tap(mode)).features.isfinite().all()


@pytest.mark.parametrize("mode", ["noise", "clean"])
def test_gradients_reach_the_image(sd, mode):
    settings = {"time": 261, "mode": mode}
    image = picture().requires_grad_()
    found = load(sd, **settings)(image, MIDDLE)
    (found.features**2).mean().backward()
    got, image.grad = image.grad, None
    latents = _encoded(sd, image)
    if mode == "noise":
        latents = _share(261).sqrt() * latents + (1 - _share(261)).sqrt() * _drawn((4, 8, 16), 1, 0)
    kept: list[Tensor] = []
    module = sd.unet.up_blocks[1].resnets[1].conv2
    handle = module.register_forward_hook(lambda _m, _i, output: kept.append(output))
    sd.unet(latents, 261, encoder_hidden_states=_text(sd, ""))
    handle.remove()
    (kept[0] ** 2).mean().backward()
    assert image.grad.abs().max() > 0
    torch.testing.assert_close(got, image.grad, atol=1e-6 * float(image.grad.abs().max()) + 1e-9, rtol=1e-3)
    with torch.no_grad():
        assert not load(sd, **settings)(image, MIDDLE).features.requires_grad
    assert not load(sd, **settings)(image.detach(), MIDDLE).features.requires_grad


def test_gradients_do_not_go_through_an_inversion(sd):
    extractor = load(sd, **MODES["inversion"])
    assert not extractor.differentiable
    assert load(sd).differentiable
    image = picture().requires_grad_()
    with pytest.raises(
        vf.ConfigError, match=r"images without gradients in mode 'inversion', .*use mode='noise' or 'clean', or detach"
    ):
        extractor(image, f"{MIDDLE}#1")
    with torch.no_grad():
        assert extractor(image, f"{MIDDLE}#1").features.isfinite().all()
    assert extractor.invert(image).isfinite().all()


@torch.no_grad()
def test_bfloat16_is_near(sd):
    image = picture()
    exact = load(sd)(image, MIDDLE).features
    found = vf.load_extractor(denoiser(sd), size=(64, 128), dtype="bfloat16", diffusion=DiffusionConfig())(
        image, MIDDLE
    )
    assert found.features.dtype == torch.float32
    difference = (found.features - exact).abs().max() / exact.abs().max()
    assert 0 < float(difference) < 0.1


@torch.no_grad()
@pytest.mark.usefixtures("as_a_user")
def test_weights_of_half_precision_work_or_say_what_to_do():
    exact = load(diffusions.sd_pipeline())(picture(), MIDDLE).features
    pipe = diffusions.sd_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    extractor = load(pipe)
    try:
        found = extractor(picture(), MIDDLE).features
    except vf.ConfigError as error:
        assert "weights that can run on cpu, got float16" in str(error)  # noqa: PT017
        assert ".float()" in str(error)  # noqa: PT017
    else:
        assert found.dtype == torch.float32
        assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())
        assert float((found - exact).abs().max()) > 0


@torch.no_grad()
def test_another_size_and_another_way_of_the_same_network(sd):
    extractor = load(sd, 64)
    wide = extractor.resized(size=(64, 128))
    assert wide.model is extractor.model
    assert torch.equal(wide(picture(), MIDDLE).features, load(sd)(picture(), MIDDLE).features)
    chain = extractor.reading(DiffusionConfig(**MODES["inversion"]))
    assert chain.model is extractor.model
    assert extractor.diffusion.mode == "noise"
    expected = load(sd, 64, **MODES["inversion"])(picture(64, 64), f"{MIDDLE}#1")
    assert torch.equal(chain(picture(64, 64), f"{MIDDLE}#1").features, expected.features)
    assert repr(extractor) == "DiffusionExtractor(UNet2DConditionModel: size 64, stride 64, float32 on cpu)"


@torch.no_grad()
def test_the_default_tap_fits_the_way_of_reading(sd):
    image = picture(64, 64)
    chain = load(sd, 64, mode="inversion", steps=10, keep=6)  # keeps 9, 8, 6, 4, 2, 0
    assert chain.card.default_tap == "out@up1#4"
    assert str(chain(image).tap) == "out@up1#4"
    assert str(chain.reading(DiffusionConfig())(image).tap) == "out@up1"
    other = load(sd, 64).reading(DiffusionConfig(mode="inversion", steps=4, keep=1))
    assert str(other(image).tap) == "out@up1#3"


@torch.no_grad()
def test_one_step_needs_no_name(sd):
    extractor = load(sd, 64, mode="inversion", steps=1, keep=1)
    found = extractor(picture(64, 64), [MIDDLE, f"{MIDDLE}#0"])
    assert torch.equal(found[MIDDLE].features, found[f"{MIDDLE}#0"].features)
    clean = load(sd, 64, mode="clean", time=-1)(picture(64, 64), MIDDLE)
    assert torch.equal(found[MIDDLE].features, clean.features)


# What is refused -----------------------------------------------------------------------------------------------------


def test_taps_that_do_not_exist(sd, sdxl):
    extractor, image = load(sd), picture()
    for tap, kind, told in (
        ("residual@up1.res3", vf.TapError, r"a layer of UNet2DConditionModel, got 'up1.res3'. Did you mean 'up1.res"),
        ("out@layer3", vf.TapError, r"got 'layer3'. Known: down0, down0.attn0, "),
        ("out@up1+upp2", vf.TapError, r"got 'upp2'. Did you mean 'up2'"),
        ("out@99", vf.TapError, r"expected a layer from 0 to 46"),
        ("cls@3", vf.UnknownFacetError, r"got 'cls': it is a diffusion model; try one of residual, out, query, key, "),
        ("token@up1", vf.UnknownFacetError, r"for example 'out@up1'"),
        ("residual@up1.attn0", vf.TapError, r"a residual block, such as 'up1.res0', for the facet 'residual', got 're"),
        ("residual@up1", vf.TapError, r"a residual block, such as 'up1.res0', .* got 'residual@up1'"),
        ("key@up1.res0", vf.TapError, r"attention, such as 'up1.attn0', for the facet 'key', got 'key@up1.res0'"),
        ("key@up0", vf.TapError, r"attention, such as 'up1.attn0'"),
        ("key@up1.attn0.block1", vf.TapError, r"transformer_blocks.* has no '1'; it has 0"),
        ("out@up1.attn0.block0", vf.TapError, r"a layer of UNet2DConditionModel, got 'up1.attn0.block0'"),
    ):
        with pytest.raises(kind, match=told):
            extractor(image, tap)
    with pytest.raises(vf.TapError, match=r"transformer_blocks.* has no '3'; it has 0, 1, 2"):
        load(sdxl, 32)(picture(32, 32), "key@mid.attn0.block3")
    with pytest.raises(vf.UnknownFacetError, match=r"expected a model with attention over tokens"):
        extractor.attention(image, 1)


def test_facets_that_a_model_has_not():
    pipe = diffusions.ddpm(
        down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4, add_attention=False
    )
    extractor = load(pipe, 32)
    assert not any("attn" in name for name in extractor.layers)
    for tap in ("key@0", "query@-1"):
        with pytest.raises(vf.UnknownFacetError, match=r"got '(key|query)': no layer of it has one; try 'out@up1'"):
            extractor(picture(32, 32), tap)
    with pytest.raises(vf.TapError, match=r"a layer without further blocks, got 'mid.attn0.block1'; try 'mid.attn0'"):
        load(diffusions.ddpm(), 32)(picture(32, 32), "key@mid.attn0.block1")


def test_steps_that_do_not_fit(sd):
    image = picture(64, 64)
    chain = load(sd, 64, mode="inversion", steps=10, keep=6)
    told = r"a tap with a step from 0 \(noise\) to 9 \(clean\), got '{}'; for example 'residual@up1.res1#5'"
    with pytest.raises(vf.TapError, match=told.format(MIDDLE)):
        chain(image, MIDDLE)
    with pytest.raises(vf.TapError, match=told.format(f"{MIDDLE}#10")):
        chain(image, f"{MIDDLE}#10")
    for mode in ("noise", "clean"):
        with pytest.raises(
            vf.TapError,
            match=rf"a tap without a step in mode '{mode}', got 'residual@up1.res1#3'; load with diffusion=Diff",
        ):
            load(sd, 64, mode=mode)(image, f"{MIDDLE}#3")
    with pytest.raises(vf.TapError, match=told.format(MIDDLE)):
        load(sd, 64, steps=10, keep=6).generate(taps=[MIDDLE])  # generation has steps in every mode
    assert chain(image, f"{MIDDLE}#9").features.isfinite().all()


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(sd):
    prompt = "cat " * 30 + "with a hat"
    with pytest.warns(UserWarning, match="the prompt has") as caught:
        found = load(sd, 64, prompt=prompt)(picture(64, 64), MIDDLE)
    (told,) = [str(one.message) for one in caught if "the prompt has" in str(one.message)]
    # Spelled letter by letter: 90 letters of cats, 8 of the rest, a start and an end; 77 are read, so 75 letters.
    assert told.startswith("the prompt has 100 tokens and the model reads 77; cut off: 'cat cat cat cat cat with a hat")
    cut = load(sd, 64, prompt="cat " * 25)(picture(64, 64), MIDDLE)
    assert torch.equal(found.features, cut.features)


def test_guidance_and_prompts_without_text(sd, ddpm):
    alone = diffusions.sd_unet(in_channels=3, out_channels=3)
    with pytest.raises(
        vf.ConfigError, match=r"a model with a text encoder for guidance, but UNet2DModel has none; leave guidance=None"
    ):
        load(ddpm, 32, guidance=7.5)
    with pytest.raises(vf.ConfigError, match=r"a text encoder for guidance, but UNet2DConditionModel has none"):
        load(alone, 32, guidance=7.5)
    with pytest.raises(vf.ConfigError, match=r"expected no prompt for a model without text, got 'a cat'"):
        load(ddpm, 32, prompt="a cat")(picture(32, 32), MIDDLE)
    with pytest.raises(
        vf.ConfigError, match=r"a text encoder for the prompt 'a cat', got a U-Net alone; pass the whole pipeline, or"
    ):
        load(alone, 32, prompt="a cat")(picture(32, 32), MIDDLE)
    with pytest.raises(vf.ConfigError, match=r"expected no prompt"):
        load(ddpm, 32, steps=2, keep=1).generate("a cat")


@torch.no_grad()
def test_a_conditional_unet_alone_is_told_nothing():
    unet = diffusions.sd_unet(in_channels=3, out_channels=3)
    image = picture(32, 32)
    path = {MIDDLE: "up_blocks.1.resnets.1.conv2"}
    with _watched(unet, path) as seen:
        found = load(unet, 32, mode="clean", time=0)(image, MIDDLE)
        unet(image * 2 - 1, 0, encoder_hidden_states=torch.zeros(1, 77, 16))
    torch.testing.assert_close(_map(found), seen.out[MIDDLE][1], **NEAR)


@pytest.mark.usefixtures("as_a_user")
def test_latents_that_do_not_fit(sd):
    extractor = load(sd, 64, steps=2, keep=1)
    for shape in ((1, 4, 12, 8), (1, 3, 8, 8), (4, 8, 8), (1, 4, 4, 8), (1, 4, 0, 8)):
        with pytest.raises(vf.ShapeError) as told:
            extractor.generate(latents=torch.zeros(shape))
        assert str(told.value) == (
            f"expected latents (batch, 4, rows, cols), rows and cols multiples of 8, got {shape}"
        )


def test_sizes_that_the_unet_cannot_take(sd):
    extractor = load(sd, 64, steps=2, keep=1)
    for size in ((100, 64), (64, 32), (0, 64)):
        with pytest.raises(vf.ShapeError) as told:
            extractor.generate(size=size)
        assert str(told.value) == (
            f"expected sides that are multiples of 64 pixels for UNet2DConditionModel, got {size} (height, width)"
        )
    finer = replace(extractor.card, patch=8, name="mine")
    reader = vf.load_extractor(denoiser(sd), size=(72, 64), card=finer)
    with pytest.raises(vf.ShapeError, match=r"multiples of 64 pixels for mine, got \(72, 64\) \(height, width\)"):
        reader(picture(64, 64), MIDDLE)
    # Else sizes are snapped to what it can take.
    assert extractor(picture(70, 50), MIDDLE).grid.network_size == (64, 64)
    with pytest.raises(vf.ShapeError, match="64"):
        load(sd, 16)


def test_there_is_no_stride(sd):
    with pytest.raises(vf.ConfigError, match=r"expected no stride for UNet2DConditionModel, got 32: its layers have"):
        vf.load_extractor(denoiser(sd), size=64, stride=32)
    with pytest.raises(vf.ConfigError, match=r"expected no stride for UNet2DConditionModel, got 32"):
        load(sd, 64).resized(stride=32)(picture(64, 64), MIDDLE)
    for name in ("norm", "norm_qk"):
        with pytest.raises(vf.ConfigError, match=rf"expected settings that UNet2DConditionModel knows, got {name}=Tru"):
            vf.load_extractor(denoiser(sd), **{name: True})
    with pytest.raises(vf.ConfigError, match="expected settings that mini knows, got diffusion="):
        vf.load_extractor("mini", device="cpu", diffusion=DiffusionConfig())


def test_levels_that_the_model_has_not(sd):
    told = "expected at most the 1000 levels of noise of UNet2DConditionModel, got "
    with pytest.raises(vf.ConfigError, match=f"{told}time=1000"):
        load(sd, time=1000)
    with pytest.raises(vf.ConfigError, match=f"{told}1001 steps"):
        load(sd, mode="inversion", steps=1001, keep=1)
    assert load(sd, time=999).diffusion.time == 999
    for settings in ({"time": 1000}, {"mode": "inversion", "steps": 1001, "keep": 1}):
        with pytest.raises(vf.ConfigError, match=told):
            load(sd).reading(DiffusionConfig(**settings))


def test_only_the_settings_that_are_used_must_fit_the_levels():
    """A model of 100 levels: inversion does not use the time of the usual settings, nor one pass their steps."""
    pipe = diffusions.ddpm()
    pipe.scheduler = type(pipe.scheduler)(num_train_timesteps=100)
    assert load(pipe, 32, mode="inversion", steps=4, keep=1).diffusion.steps == 4
    pipe.scheduler = type(pipe.scheduler)(num_train_timesteps=20)
    assert load(pipe, 32, mode="clean", time=3)(picture(32, 32), MIDDLE).features.isfinite().all()


@pytest.mark.usefixtures("as_a_user")
def test_settings_that_no_model_could_use():
    for settings, told in (
        ({"mode": "noisy"}, r"expected mode 'noise', 'clean' or 'inversion', got 'noisy'"),
        ({"schedule": "ddpm"}, r"expected schedule 'hyperfeatures' or 'model', got 'ddpm'"),
        ({"latent": "mode"}, r"expected latent 'sample' or 'mean', got 'mode'"),
        ({"time": -1}, r"a time of at least 0 in mode 'noise', got -1; -1 is for mode 'clean'"),
        ({"time": -2, "mode": "clean"}, "time"),
        ({"ensemble": 0}, "ensemble"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(vf.ConfigError, match=told):
            DiffusionConfig(**settings)
    with pytest.raises(vf.ConfigError, match=r"expected a preset, got 'hyper'"):
        DiffusionConfig.preset("hyper")
    assert DiffusionConfig.preset("dift").ensemble == 8
    assert DiffusionConfig.preset("hyperfeatures").kept_steps[0] == 49
    assert DiffusionConfig.preset("hyperfeatures-one-step").time == -1


def test_fused_projections_are_refused():
    pipe = diffusions.sd_pipeline()
    extractor = load(pipe, 64)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(
        vf.ConfigError, match=r"a U-Net with separate projections; call unet.unfuse_qkv_projections\(\) first"
    ):
        load(pipe, 64)
    with pytest.raises(vf.TapError, match=r"attn1.to_k' to run in the forward pass, but it never did; .*fused project"):
        extractor(picture(64, 64), "key@up1.attn0")
    assert count_hooks(pipe.unet) == 0
    pipe.unet.unfuse_qkv_projections()
    assert load(pipe, 64)(picture(64, 64), "key@up1.attn0").features.isfinite().all()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("settings", [{"number": 0}, {"number": -1}, {"seed": -1}])
def test_nothing_to_generate(sd, settings):
    with pytest.raises(vf.VitFeatsError, match=next(iter(settings))):
        load(sd, 64, steps=2, keep=1).generate(**settings)
