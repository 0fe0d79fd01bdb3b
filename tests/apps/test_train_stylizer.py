"""Training networks of style transfer: the losses, the run, and that nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from killing import kill_now_and_then
from PIL import Image
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.style_transfer import StylizerTrainer, load_stylizer, stylize, train_stylizer
from vitfeats.apps.style_transfer.training import _batch
from vitfeats.configs import TrainStylizerConfig, read_config, write_config
from vitfeats.errors import ConfigError, StoreError, WeightsUnavailableError
from vitfeats.models.stylizers import TRAINED, pack, settings_of
from vitfeats.nets.stylizing import NETWORKS
from vitfeats.views import numbered

pytestmark = pytest.mark.usefixtures("as_a_user")

METHODS = ("adaattn", "sanet", "adain")
CHANNELS = (32, 64, 128, 256, 256)
SMALL = {
    "widths": (4, 4, 4), "inner": 4, "size": 32, "load": 32, "steps": 4, "batch": 1, "most": 3,
    "checkpoint_every": 1, "snapshot_every": 0,
}  # fmt: skip
TINY = TrainStylizerConfig(**SMALL)
PAIRS = replace(TINY, batch=2)


def tiny(method: str, **changes) -> TrainStylizerConfig:
    return TrainStylizerConfig.preset(method, **(SMALL | changes))


def photos(seed: int, count: int = 4) -> list[np.ndarray]:
    """Return smooth pictures of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = [(36 + 3 * number, 50 - 2 * number) for number in range(count)]
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [np.asarray(c.resize(size, Image.Resampling.BICUBIC)) for c, size in zip(coarse, sizes, strict=True)]


CONTENTS, STYLES = photos(0), photos(1, 3)


@pytest.fixture(scope="module")
def vgg() -> vf.Extractor:
    return vf.load_extractor("vgg_mini", device="cpu")


def weights(stylizer) -> list[Tensor]:
    return list(stylizer.network.state_dict().values())


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def maps(vgg: vf.Extractor, images: Tensor) -> list[Tensor]:
    """Return relu1_1 to relu5_1, read layer by layer from the network itself."""
    seen, found = vgg.preprocess.normalise(images), []
    for name, layer in vgg.model.named_children():
        seen = layer(seen)
        if re.fullmatch(r"relu\d_1", name):
            found.append(seen)
    return found


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((2, 3)), (x.var((2, 3)) + 1e-5).sqrt()


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_that_have_a_weight_and_add_up(method):
    trainer = StylizerTrainer(CONTENTS, STYLES, tiny(method, batch=2))
    names = {"adaattn": {"style", "local"}, "sanet": {"content", "style", "identity"}, "adain": {"content", "style"}}
    losses = trainer.step()
    assert set(losses) == names[method] | {"loss"}
    assert losses["loss"] == pytest.approx(sum(value for name, value in losses.items() if name != "loss"))
    assert all(value > 0 for value in losses.values())
    assert trainer.done == 1


@pytest.mark.parametrize("name", ["content", "style", "local", "identity"])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_is_a_factor(method, name):
    none = dict.fromkeys(("content", "style", "local", "identity"), 0.0)
    one, seven = (StylizerTrainer(CONTENTS, STYLES, tiny(method, **none | {name: w})).step() for w in (1.0, 7.0))
    assert set(one) == {"loss", name}
    assert seven[name] == pytest.approx(7 * one[name], rel=1e-4)


@torch.no_grad()
def test_content_and_style_losses_of_adain_are_the_formula(vgg):
    trainer = StylizerTrainer(CONTENTS, STYLES, tiny("adain", content=2.0, style=3.0, style_levels=(1, 3)))
    rng = numbered(0, 9)
    content, style = (_batch(pictures, PAIRS, rng) for pictures in (CONTENTS, STYLES))
    found = trainer._losses(content, style, numbered(0, 8))
    of_content, of_style = maps(vgg, content), maps(vgg, style)
    of_out = maps(vgg, trainer.stylizer.network(of_content, of_style))
    (mean_c, std_c), (mean_s, std_s) = plain(of_content[3]), plain(of_style[3])
    target = (of_content[3] - mean_c[..., None, None]) / std_c[..., None, None] * std_s[..., None, None]
    target = target + mean_s[..., None, None]
    torch.testing.assert_close(found["content"], 2 * (of_out[3] - target).square().mean(), rtol=1e-4, atol=1e-4)
    wanted = sum(
        (a - b).square().mean()
        for level in (0, 2)
        for a, b in zip(plain(of_out[level]), plain(of_style[level]), strict=True)
    )
    torch.testing.assert_close(found["style"], 3 * wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_content_losses_of_attention_compare_what_is_left_without_style(vgg):
    config = tiny("sanet", identity=0.0, most=100)
    trainer = StylizerTrainer(CONTENTS, STYLES, config)
    rng = numbered(0, 9)
    content, style = (_batch(pictures, PAIRS, rng) for pictures in (CONTENTS, STYLES))
    of_content = maps(vgg, content)
    of_out = maps(vgg, trainer.stylizer.network(of_content, maps(vgg, style)))
    wanted = 0
    for a, b in zip(of_out[3:], of_content[3:], strict=True):
        (mean_a, std_a), (mean_b, std_b) = ((x[..., None, None] for x in plain(y)) for y in (a, b))
        wanted = wanted + ((a - mean_a) / std_a - (b - mean_b) / std_b).square().mean()
    found = trainer._losses(content, style, numbered(0, 8))["content"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_identity_loss_is_the_formula(vgg, warmup):
    trainer = StylizerTrainer(CONTENTS, STYLES, tiny("sanet", identity=2.0, warmup=warmup, most=100))
    content, style = _batch(CONTENTS, PAIRS, numbered(0, 9)), _batch(STYLES, PAIRS, numbered(0, 7))
    found = trainer._losses(content, style, numbered(0, 8))
    wanted = torch.zeros(())
    for pixels in (content, style):
        kept = maps(vgg, pixels)
        again = trainer.stylizer.network(kept, kept)
        features = sum((a - b).square().mean() for a, b in zip(maps(vgg, again), kept, strict=True))
        wanted = wanted + 2 * ((again - pixels).square().mean() + features / 50)
    torch.testing.assert_close(found["identity"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_warmup_has_the_identity_loss_alone(method):
    history = train_stylizer(CONTENTS, STYLES, config=tiny(method, warmup=2, steps=3)).history
    assert [set(record) == {"step", "loss", "identity"} for record in history] == [True, True, False]
    assert {"style"} < set(history[2])
    assert all(record["loss"] > 0 for record in history)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method):
    config = tiny(method, steps=30, lr=0.003, widths=(8, 8, 8))
    losses = [record["loss"] for record in train_stylizer(CONTENTS, STYLES, config=config).history]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_the_rate_and_the_clip_are_those_of_the_settings(monkeypatch):
    clipped = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: clipped.append(most))
    trainer = StylizerTrainer(CONTENTS, STYLES, tiny("adain", lr=0.1, schedule="cosine", clip=0.5))
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(trainer._optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * 0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)])
    assert clipped == [0.5] * 4
    StylizerTrainer(CONTENTS, STYLES, tiny("adain", clip=0.0)).step()
    assert len(clipped) == 4


# What is learned from -------------------------------------------------------------------------------------------------


def test_crops_lie_inside_and_differ():
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(60)[None] * 4, np.arange(40)[:, None] * 6
    crops = _batch([ramp], replace(TINY, batch=40), numbered(0, 1))
    assert crops.shape == (40, 3, 32, 32)
    assert 0 <= float(crops.min()) <= float(crops.max()) <= 1
    assert torch.equal(crops, _batch([ramp], replace(TINY, batch=40), numbered(0, 1)))
    steps = crops[:, 0, 16, 1:] - crops[:, 0, 16, :-1]
    mirrored = (steps.mean(1) < 0).float().mean()
    assert 0.2 < float(mirrored) < 0.8
    sides = steps.abs().mean(1) * 255 / 4 * 32  # pixels of the picture that a crop covers
    assert 18 < float(sides.min()) < 26  # half of the shorter side, at the least
    assert 34 < float(sides.max()) <= 41
    for channel, length in ((0, 59 * 4), (1, 39 * 6)):
        assert float(crops[:, channel].max()) > 0.85 * length / 255
        assert float(crops[:, channel].min()) < 0.15


def test_contents_and_styles_play_their_own_parts():
    losses = [StylizerTrainer(c, s, TINY).step() for c, s in ((CONTENTS, STYLES), (CONTENTS, CONTENTS))]
    assert losses[0]["style"] != losses[1]["style"]
    for contents, styles in (([], STYLES), (CONTENTS, [])):
        with pytest.raises(ConfigError, match=f"expected contents and styles, got {len(contents)} and {len(styles)}"):
            StylizerTrainer(contents, styles, TINY)


def test_the_encoder_is_not_trained(vgg):
    before = {name: value.clone() for name, value in vgg.model.state_dict().items()}
    trainer = StylizerTrainer(CONTENTS, STYLES, replace(TINY, identity=1.0, content=1.0, lr=0.1), encoder=vgg)
    first = [value.clone() for value in weights(trainer.stylizer)]
    for _ in range(2):
        trainer.step()
    assert trainer.stylizer.extractor is vgg
    assert all(torch.equal(value, before[name]) for name, value in vgg.model.state_dict().items())
    assert all(p.grad is None for p in vgg.model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(trainer.stylizer), strict=True))
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vgg.model.modules())


def test_an_encoder_without_the_maps_is_refused():
    with pytest.raises(ConfigError, match="expected an encoder with relu1_1, .* but mini has no relu1_1"):
        train_stylizer(CONTENTS, STYLES, config=replace(TINY, encoder="mini"))


# Chance ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_step_depends_on_the_seed_and_its_number_alone(method, vgg):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (StylizerTrainer(CONTENTS, STYLES, tiny(method), seed=seed, encoder=vgg) for seed in (0, 0, 1))
    found = [a.step(), a.step()]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    b.shown()
    assert b.step() == found[0]
    b.shown()
    np.random.seed(3)
    assert b.step() == found[1] != found[0]
    assert same(a.stylizer, b.stylizer)
    assert c.step() != found[0]


def test_each_step_sees_other_crops():
    trainer = StylizerTrainer(CONTENTS, STYLES, tiny("adain", lr=0.0))
    assert len({trainer.step()["loss"] for _ in range(3)}) == 3  # by the same weights; AdaIN draws no positions


def test_a_state_is_of_its_step_and_stays_as_it_is():
    a, b = (StylizerTrainer(CONTENTS, STYLES, TINY) for _ in range(2))
    a.step()
    state = a.state_dict()
    kept = {name: value.clone() for name, value in state["network"].items()}
    a.step()
    assert state["step"] == 1
    assert all(torch.equal(value, kept[name]) for name, value in state["network"].items())
    for _ in range(2):  # a state may be taken up twice
        b.load_state_dict(state)
        assert b.done == 1
        b.step()
        assert same(a.stylizer, b.stylizer)
    with pytest.raises(ConfigError, match=r"the state of a stylizer's training \(vitfeats.*/1\), got 'other'"):
        a.load_state_dict({"format": "other"})


# The run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_resumed_is_the_run_that_was_never_stopped(method, tmp_path, monkeypatch):
    config = tiny(method, warmup=1, schedule="cosine", snapshot_every=4)
    whole = train_stylizer(CONTENTS, STYLES, config=config, seed=3, out=tmp_path / "whole")
    step = StylizerTrainer.step

    def failing(trainer):
        if trainer.done == 2:
            raise RuntimeError("mine")
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(StylizerTrainer, "step", failing)
        with pytest.raises(RuntimeError, match="mine"):
            train_stylizer(CONTENTS, STYLES, config=config, seed=3, out=tmp_path / "run")
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 2
    resumed = train_stylizer(CONTENTS, STYLES, config=config, seed=3, out=tmp_path / "run", resume=True)
    assert (whole.stopped, resumed.stopped) == ("done", "done")
    assert same(whole.stylizer, resumed.stylizer)
    assert resumed.history == whole.history
    assert [record["step"] for record in whole.history] == [0, 1, 2, 3]
    for name in ("history.jsonl", "config.yaml", "step_000004.png", "result.png", "losses.png", TRAINED):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch):
    step = StylizerTrainer.step

    def pressed(trainer):
        if trainer.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    config = replace(TINY, checkpoint_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(StylizerTrainer, "step", pressed)
        told = rf"interrupted after 2 steps; resume it \(resume=True, --resume\) in '{tmp_path}/run'"
        with pytest.raises(KeyboardInterrupt, match=told):
            train_stylizer(CONTENTS, STYLES, config=config, out=tmp_path / "run")
        with pytest.raises(KeyboardInterrupt, match="interrupted after 2 steps; nothing was written: pass out="):
            train_stylizer(CONTENTS, STYLES, config=config)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = train_stylizer(CONTENTS, STYLES, config=config, out=tmp_path / "run", resume=True)
    whole = train_stylizer(CONTENTS, STYLES, config=config)
    assert same(resumed.stylizer, whole.stylizer)
    assert resumed.history == whole.history


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(tmp_path):
    for kind, pictures in (("content", CONTENTS), ("style", STYLES)):
        (tmp_path / kind).mkdir()
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / kind / f"{number}.png")
    (tmp_path / "settings.yaml").write_text(
        write_config(replace(TINY, steps=60, warmup=5, checkpoint_every=3, snapshot_every=10))
    )
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same bits come from as many threads

    def start(name: str) -> subprocess.Popen:
        files = ("--content", "content", "--style", "style", "--config", "settings.yaml", "--out", name)
        code = "from vitfeats.cli import main; main()"
        command = [sys.executable, "-c", code, "train-stylizer", *files, "--seed", "5", "--device", "cpu", "--resume"]
        return subprocess.Popen(command, cwd=tmp_path, env=alone, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    kill_now_and_then(lambda: start("killed"), tmp_path / "killed" / "history.jsonl", most=50, times=3, seed=1)
    assert start("killed").wait() == 0
    for name in ("history.jsonl", "config.yaml", "result.png", "losses.png", "step_000060.png", TRAINED):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    first = train_stylizer(CONTENTS, STYLES, config=TINY, out=tmp_path)

    def refused(message: str, *, contents=CONTENTS, config=TINY, resume: bool = True, **settings) -> None:
        with pytest.raises(ConfigError, match=message):
            train_stylizer(contents, STYLES, config=config, out=tmp_path, resume=resume, **settings)

    refused("expected a folder without a run", resume=False)
    refused("these differ: lr: 0.0002 there, 0.5 here. Use", config=replace(TINY, lr=0.5))
    refused("these differ: steps: 4 there, 5 here; batch: 1 there, 2 here", config=replace(TINY, steps=5, batch=2))
    refused("these differ: seed: 0 there, 1 here", seed=1)
    refused("these differ: contents: 4 there, 3 here", contents=CONTENTS[:3])
    refused("method: 'adaattn' there, 'adain' here", config=tiny("adain"))
    free = replace(TINY, checkpoint_every=3, snapshot_every=2)
    again = train_stylizer(CONTENTS, STYLES, config=free, out=tmp_path, resume=True)  # nothing is left to do
    assert again.history == first.history
    assert same(again.stylizer, first.stylizer)
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    with pytest.raises(StoreError, match=f"expected a checkpoint of vitfeats at '{tmp_path}/checkpoint.pt', but: "):
        train_stylizer(CONTENTS, STYLES, config=TINY, out=tmp_path, resume=True)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_that_was_good(tmp_path, monkeypatch):
    losses = StylizerTrainer._losses
    good = train_stylizer(CONTENTS, STYLES, config=replace(TINY, steps=2)).stylizer

    def broken(trainer, *given):
        found = losses(trainer, *given)
        return {name: value * float("nan") for name, value in found.items()} if trainer.done == 2 else found

    monkeypatch.setattr(StylizerTrainer, "_losses", broken)
    with pytest.warns(RuntimeWarning, match="the run stopped: expected a finite loss at step 2, got nan; what it made"):
        result = train_stylizer(CONTENTS, STYLES, config=TINY, out=tmp_path)
    assert result.stopped == "not finite"
    assert len(result.history) == 2
    assert same(result.stylizer, good)
    assert not result.stylizer.network.training
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / TRAINED).exists()


def test_a_run_leaves_pictures_losses_settings_and_the_network(tmp_path):
    config = replace(TINY, snapshot_every=2, lr=0.05)
    result = train_stylizer(CONTENTS, STYLES, config=config, out=tmp_path / "new" / "run")
    names = {path.name for path in (tmp_path / "new" / "run").iterdir()}
    written = {"checkpoint.pt", "history.jsonl", "config.yaml", "losses.png", "result.png", TRAINED}
    assert names == written | {"step_000002.png", "step_000004.png"}
    for name in (name for name in names if name.endswith(".png")):
        with Image.open(tmp_path / "new" / "run" / name) as picture:
            assert min(picture.size) > 100
            assert np.asarray(picture).std() > 5
    lines = (tmp_path / "new" / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert read_config(tmp_path / "new" / "run" / "config.yaml", TrainStylizerConfig) == config
    assert not result.stylizer.network.training
    assert result.config == config
    early, late = ((tmp_path / "new" / "run" / f"step_00000{n}.png").read_bytes() for n in (2, 4))
    assert early != late == (tmp_path / "new" / "run" / "result.png").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_loaded_and_paints(method, tmp_path):
    result = train_stylizer(CONTENTS, STYLES, config=tiny(method, steps=2))
    assert result.save(str(tmp_path / "own.safetensors")) == tmp_path / "own.safetensors"
    settings = settings_of(tmp_path / "own.safetensors")
    assert (settings.method, settings.widths, settings.inner, settings.encoder) == (method, (4, 4, 4), 4, "vgg_mini")
    found = load_stylizer(checkpoint=tmp_path / "own.safetensors", device="cpu")
    for a, b in zip(weights(found), weights(result.stylizer), strict=True):
        assert torch.equal(a, b.half().float())
    with torch.no_grad():
        for value in result.stylizer.network.parameters():
            value.copy_(value.half().float())
    made = [stylize(CONTENTS[0], STYLES[0], stylizer=stylizer).tensor for stylizer in (found, result.stylizer)]
    torch.testing.assert_close(*made, rtol=0, atol=1e-5)


# First weights --------------------------------------------------------------------------------------------------------


def _state(network) -> dict[str, Tensor]:
    return network.state_dict()


def test_a_run_begins_with_weights_that_fit(tmp_path):
    first = NETWORKS["adain"](CHANNELS, (4, 4, 4), generator=numbered(9))
    pack(first, tmp_path / "first.safetensors", encoder="vgg_mini")
    given = {name: value.half().float() for name, value in _state(first).items()}
    fresh = _state(StylizerTrainer(CONTENTS, STYLES, tiny("sanet")).stylizer.network)
    start = str(tmp_path / "first.safetensors")
    found = _state(StylizerTrainer(CONTENTS, STYLES, tiny("sanet", start=start)).stylizer.network)
    for name, value in found.items():
        wanted = given[name] if name.startswith("decoder") else fresh[name]
        assert torch.equal(value, wanted), name
    wider = _state(StylizerTrainer(CONTENTS, STYLES, tiny("adaattn", start=start)).stylizer.network)
    assert torch.equal(wider["decoder.convs.2.weight"], given["decoder.convs.2.weight"])
    assert wider["decoder.convs.1.weight"].shape != given["decoder.convs.1.weight"].shape  # a map more goes in


def test_weights_of_which_none_fits_are_refused(tmp_path):
    pack(NETWORKS["adain"](CHANNELS, (5, 6, 7)), tmp_path / "first.safetensors", encoder="vgg_mini")
    start = str(tmp_path / "first.safetensors")
    with pytest.raises(ConfigError, match=f"expected weights to begin with in '{start}', but none fits by name and sh"):
        train_stylizer(CONTENTS, STYLES, config=tiny("adain", start=start))
    with pytest.raises(WeightsUnavailableError, match=r"nothing\.safetensors', but there is no such file"):
        train_stylizer(CONTENTS, STYLES, config=tiny("adain", start="nothing.safetensors"))


def test_a_network_says_whose_maps_it_was_trained_with(vgg, tmp_path):
    other = vf.load_extractor(vgg.model, card=replace(vgg.card, name="another"))
    result = train_stylizer(CONTENTS, STYLES, config=tiny("adain", steps=1), encoder=other, out=tmp_path)
    assert result.config.encoder == settings_of(tmp_path / TRAINED).encoder == "another"
    with pytest.raises(ConfigError, match="these differ: encoder: 'another' there, 'vgg_mini' here"):
        train_stylizer(CONTENTS, STYLES, config=tiny("adain", steps=1), out=tmp_path, resume=True)
