"""Training a diffusion model of pixels: the objective, the run, and that nothing is lost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import vitfeats as vf
from vitfeats.apps import train_diffusion as app
from vitfeats.apps.train_diffusion import DiffusionTrainer, denoising_loss, noise_levels, train_diffusion
from vitfeats.configs import TrainDiffusionConfig
from vitfeats.errors import ConfigError, WeightsUnavailableError
from vitfeats.views import numbered

TINY = TrainDiffusionConfig(
    size=16,
    channels=(16, 16),
    blocks=1,
    attention=(1,),
    steps=4,
    batch=4,
    prediction="epsilon",
    warmup=2,
    validate_every=2,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    smooth = [np.kron(rng.integers(0, 255, (5, 6, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(6)]
    return smooth


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_step_is_the_formula(pictures):
    trainer = DiffusionTrainer(pictures, TINY)
    network, images = trainer.network, torch.rand(4, 3, 16, 16) * 2 - 1
    noise, levels = torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[levels][:, None, None, None]
    with torch.no_grad():
        said = network(kept.sqrt() * images + (1 - kept).sqrt() * noise, levels).sample
        found = app._errors(network, trainer.scheduler, images, noise, levels)
    torch.testing.assert_close(found, ((said - noise) ** 2).mean((1, 2, 3)))


def test_a_step_that_predicts_velocity_is_the_formula(pictures):
    trainer = DiffusionTrainer(pictures, replace(TINY, prediction="v_prediction"))
    network, images = trainer.network, torch.rand(4, 3, 16, 16) * 2 - 1
    noise, levels = torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 500, 999])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[levels][:, None, None, None]
    with torch.no_grad():
        noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
        said = network(noisy, levels).sample
        found = app._errors(network, trainer.scheduler, images, noise, levels)
        judged = app._errors(network, trainer.scheduler, images, noise, levels, of_noise=True)
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * images
    torch.testing.assert_close(found, ((said - velocity) ** 2).mean((1, 2, 3)))
    # An error of the velocity is an error of the noise, less by the root of what is kept of the picture.
    torch.testing.assert_close(judged, kept.flatten() * found)


def test_a_model_that_predicts_velocity_is_read_as_one(pictures, tmp_path):
    train_diffusion(pictures, config=replace(TINY, prediction="v_prediction"), out=tmp_path)
    extractor = vf.load_extractor(tmp_path / "model", device="cpu")
    assert extractor.model.prediction == "v_prediction"


def test_a_run_begins_with_weights_that_are_given(pictures, tmp_path):
    first = train_diffusion(pictures, config=TINY, out=tmp_path / "first")
    file = tmp_path / "first" / "model" / "diffusion_pytorch_model.safetensors"
    file = file if file.is_file() else next((tmp_path / "first" / "model").rglob("*.safetensors"))
    trainer = DiffusionTrainer(pictures, replace(TINY, prediction="v_prediction", start=str(file)))
    assert _same(trainer.network, first.network)
    assert _same(trainer.averaged(), first.network)
    with pytest.raises(WeightsUnavailableError, match="expected a weight file|no such file|nothing"):
        DiffusionTrainer(pictures, replace(TINY, start="nothing.safetensors"))


def test_a_batch_has_levels_of_all_noises(pictures, monkeypatch):
    seen = []
    monkeypatch.setattr(
        app, "_errors", lambda n, s, images, noise, t: (seen.append((images, t)), _errors(n, s, images, noise, t))[1]
    )
    DiffusionTrainer(pictures, TINY).step()
    images, levels = seen[0]
    assert (levels // 250).tolist() == [0, 1, 2, 3]
    assert images.shape == (4, 3, 16, 16)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1


_errors = app._errors


def test_it_learns(pictures):
    config = replace(TINY, steps=60, lr=0.003, validate_every=0, average=0.9)
    result = train_diffusion(pictures, config=config)
    losses = [record["loss"] for record in result.history]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    held = torch.rand(2, 3, 16, 16) * 2 - 1
    assert denoising_loss(result.network, result.scheduler, held).shape == (8,)
    assert not result.network.training


def test_denoising_loss_of_a_network_that_says_nothing_is_one(pictures):
    network = DiffusionTrainer(pictures, TINY).network
    for weight in network.conv_out.parameters():
        torch.nn.init.zeros_(weight)
    images = torch.rand(5, 3, 16, 16)
    losses = denoising_loss(network, noise_levels(TINY), images, levels=4, batch=2)
    torch.testing.assert_close(losses, torch.ones(4), atol=0.1, rtol=0)
    assert torch.equal(losses, denoising_loss(network, noise_levels(TINY), images, levels=4, batch=2))


def test_a_run_that_is_resumed_is_the_run_that_was_never_stopped(pictures, tmp_path):
    whole = train_diffusion(pictures, config=TINY, held_out=pictures[:2], seed=3)
    stopped = train_diffusion(
        pictures, config=replace(TINY, minutes=1e-9), held_out=pictures[:2], seed=3, out=tmp_path / "run"
    )
    assert stopped.stopped == "time"
    assert len(stopped.history) == 1
    resumed = train_diffusion(pictures, config=TINY, held_out=pictures[:2], seed=3, out=tmp_path / "run", resume=True)
    assert resumed.stopped == "done"
    assert _same(whole.network, resumed.network)
    assert resumed.history == whole.history
    assert [("held_out" in record) for record in whole.history] == [False, True, False, True]
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history


def test_a_seed_is_all_that_chance_hangs_on(pictures):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (DiffusionTrainer(pictures, TINY, seed=seed) for seed in (0, 0, 1))
    assert a.step() == b.step() != c.step()
    assert _same(a.network, b.network)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_saved_loads_in_diffusers_and_in_vitfeats(pictures, tmp_path):
    result = train_diffusion(pictures, config=TINY, out=tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model", low_cpu_mem_usage=False)
    assert _same(pipeline.unet, result.network)
    extractor = vf.load_extractor(tmp_path / "model", device="cpu")
    assert extractor.card.default_size == 16
    assert extractor(torch.rand(3, 16, 16), "residual@up1.res0").grid.tokens == 256


def test_other_settings_and_small_pictures_are_refused(pictures, tmp_path):
    train_diffusion(pictures, config=TINY, out=tmp_path)
    with pytest.raises(ConfigError, match="these differ: lr: 0.0008 there, 0.01 here"):
        train_diffusion(pictures, config=replace(TINY, lr=0.01), out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="expected a folder without a run"):
        train_diffusion(pictures, config=TINY, out=tmp_path)
    with pytest.raises(ConfigError, match="expected pictures with a shorter side of at least 64 pixels, got smaller"):
        DiffusionTrainer(pictures, TrainDiffusionConfig())
    trainer = DiffusionTrainer(pictures, TINY)
    with pytest.raises(ConfigError, match=r"expected the state of a diffusion training \(.*/1\), got 'other'"):
        trainer.load_state_dict({"format": "other"})


def test_a_loss_that_is_not_finite_ends_the_run(pictures, tmp_path, monkeypatch):
    def broken(network, scheduler, images, noise, levels):
        losses = _errors(network, scheduler, images, noise, levels)
        return losses * float("nan") if broken.calls.pop() else losses

    broken.calls = [True, False]
    monkeypatch.setattr(app, "_errors", broken)
    with pytest.warns(RuntimeWarning, match="the run stopped: expected a finite loss at step 1, got nan"):
        result = train_diffusion(pictures, config=TINY, out=tmp_path)
    assert result.stopped == "not finite"
    assert all(bool(p.isfinite().all()) for p in result.network.parameters())


def test_noise_levels_are_those_of_the_settings():
    kept = noise_levels(TINY).alphas_cumprod
    torch.testing.assert_close(kept, DDPMScheduler().alphas_cumprod)
    assert not torch.allclose(noise_levels(replace(TINY, betas=(0.001, 0.02))).alphas_cumprod, kept)


def test_crops_lie_inside_and_differ(pictures):
    whole = app._crop(pictures[0], 16, None, TINY)
    crops = [app._crop(pictures[0], 16, numbered(0, n), TINY) for n in range(8)]
    assert all(crop.shape == (1, 3, 16, 16) for crop in [whole, *crops])
    assert len({round(float(crop.sum()), 3) for crop in crops}) > 4
    assert torch.equal(whole, app._crop(pictures[0], 16, None, TINY))


def test_crops_keep_what_is_dark_and_what_is_light():
    stairs = np.repeat(np.arange(0, 256, 15, dtype=np.uint8), 2)
    picture = np.broadcast_to(stairs[:, None, None], (36, 36, 3)).copy()
    for crop in (app._crop(picture, 12, None, TINY), app._crop(picture, 12, numbered(0, 1), replace(TINY, crop=0.9))):
        assert float(crop.min()) < -0.85
        assert float(crop.max()) > 0.85
        assert abs(float(crop.mean())) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (16, 20)}, r"expected channels that are multiples of 16, got \(16, 20\)"),
        ({"size": 17}, "expected a size that is a multiple of 2 for these scales, got 17"),
        ({"attention": (2,)}, r"expected attention scales from 0 to 1, got \(2,\)"),
        ({"betas": (0.02, 0.01)}, r"expected betas in 0\.\.1, in order, got \(0.02, 0.01\)"),
        ({"crop": 0.0}, "expected a crop above 0, got 0"),
        ({"schedule": "linear"}, "expected schedule 'constant' or 'cosine', got 'linear'"),
        ({"prediction": "sample"}, "expected prediction 'epsilon' or 'v_prediction', got 'sample'"),
        ({"batch": 0}, "expected batch of at least 1, got 0"),
        ({"minutes": -1.0}, "expected minutes of at least 0, got -1.0"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_settings_that_make_no_run_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)
