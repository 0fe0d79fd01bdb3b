"""Splice: every term of a step against the published formula, and what no crash, seed or odd image may break."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from killing import kill_now_and_then
from PIL import Image
from torch import Tensor, nn

import vitfeats as vf
from vitfeats import runs
from vitfeats.apps.splice import SpliceInterrupted, Splicer, SpliceResult, Term, default_terms, splice
from vitfeats.configs import SpliceConfig, read_config, write_config
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError, TapError
from vitfeats.losses import appearance_loss, identity_loss, moments_loss, structure_loss

pytestmark = pytest.mark.usefixtures("as_a_user")


def picture(seed: int, height: int, width: int) -> Tensor:
    """Return a picture with smooth parts and with edges: (3, height, width)."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=rng)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    blocks = F.interpolate(torch.rand(1, 3, 9, 7, generator=rng), size=(height, width), mode="nearest")
    return (0.7 * smooth + 0.3 * blocks)[0]


# The published formula, written out ----------------------------------------------------------------------------------


def published_size(height: int, width: int, size: int, most: int) -> tuple[int, int]:
    """torchvision 0.10's Resize(size, max_size=most)."""
    short, long = min(height, width), max(height, width)
    new_short, new_long = size, int(size * long / short)
    if new_long > most:
        new_short, new_long = int(most * new_short / new_long), most
    return (new_short, new_long) if height <= width else (new_long, new_short)


def published_positions(network: nn.Module, rows: int, cols: int) -> Tensor:
    """DINO's interpolate_pos_encoding, for a network whose stored positions are a square."""
    patches = network.pos_embed[:, 1:]
    side = math.isqrt(patches.shape[1])
    if (rows, cols) == (side, side):
        return network.pos_embed
    maps = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / math.sqrt(side * side), (cols + 0.1) / math.sqrt(side * side))
    resized = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    return torch.cat([network.pos_embed[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)


class Published:
    """The published losses of one plain timm network with forward hooks, in the precision of that network."""

    def __init__(self, network: nn.Module, size: int, most: int) -> None:
        self.network, self.size, self.most = network, size, most
        self.patch = network.patch_embed.patch_size[0]
        config = network.pretrained_cfg
        self.mean, self.std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
        self.dino = "dino" in f"{config['architecture']}.{config['tag']}"
        self.dtype = network.cls_token.dtype

    def read(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (keys with CLS, the CLS token of the last block's output) of one image in 0..1."""
        size = published_size(*image.shape[-2:], self.size, self.most)
        resized = F.interpolate(image.to(self.dtype), size=size, mode="bilinear", align_corners=False)
        height, width = (side // self.patch * self.patch for side in size)
        pixels = (resized[..., :height, :width] - self.mean) / self.std
        kept = {}
        last = self.network.blocks[len(self.network.blocks) - 1]
        hooks = [
            last.attn.qkv.register_forward_hook(lambda module, args, out: kept.update(qkv=out)),
            last.register_forward_hook(lambda module, args, out: kept.update(block=out)),
        ]
        try:
            if self.dino:
                patches = self.network.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
                tokens = torch.cat([self.network.cls_token, patches], 1)
                self.network.blocks(
                    tokens + published_positions(self.network, height // self.patch, width // self.patch)
                )
            else:
                self.network(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        dim = kept["qkv"].shape[-1] // 3
        return kept["qkv"][0, :, dim : 2 * dim], kept["block"][0, 0]

    @staticmethod
    def similarity(keys: Tensor) -> Tensor:
        norms = keys.norm(dim=1, keepdim=True)
        return (keys @ keys.T) / torch.clamp(norms @ norms.T, min=1e-8)

    def objective(self, generator: nn.Module, views: dict[str, Tensor], structure: Tensor, step: int) -> dict:
        """Return the terms of a step, given its crops."""

        def painted(image: Tensor) -> tuple[Tensor, Tensor]:
            return self.read(generator(image.to(next(generator.parameters()).dtype)))

        keys, cls = painted(views["structure"])
        wanted_keys, _ = self.read(views["structure"])
        appearance_keys, appearance_cls = self.read(views["appearance"])
        terms = {"appearance": F.mse_loss(cls, appearance_cls)}
        loss = 10 * terms["appearance"]
        if step >= 1:
            terms["structure"] = F.mse_loss(self.similarity(keys), self.similarity(wanted_keys))
            terms["identity"] = F.mse_loss(painted(views["appearance"])[0], appearance_keys)
            loss = loss + terms["structure"] + terms["identity"]
        if step % 75 == 0:
            keys, cls = painted(structure)
            terms["whole_appearance"] = F.mse_loss(cls, appearance_cls)
            terms["whole_structure"] = F.mse_loss(self.similarity(keys), self.similarity(self.read(structure)[0]))
            loss = loss + 10 * terms["whole_appearance"] + terms["whole_structure"]
        return terms | {"loss": loss}


def largest_errors(network: nn.Module, structure: Tensor, appearance: Tensor, **settings) -> tuple[float, float]:
    """Compare steps 0, 1 and 75; return the largest relative errors of the terms and of the gradient of their sum."""
    config = SpliceConfig.preset("reference", **settings)
    splicer = Splicer(structure, appearance, extractor=vf.load_extractor(network), config=config, seed=3)
    exact = Published(copy.deepcopy(network).double(), config.size, config.max_size)
    generator = copy.deepcopy(splicer.generator).double()
    expected_terms = {0: 3, 1: 3, 75: 5}
    worst = worst_gradient = 0.0
    for step, count in expected_terms.items():
        views = {which: splicer._view(which, step) for which in ("structure", "appearance")}
        found = splicer.objective(step)
        expected = exact.objective(generator, views, structure[None], step)
        assert found.keys() == expected.keys()
        assert len(found) == count + 1
        for name, value in expected.items():
            error = abs(float(found[name].detach()) / float(value.detach()) - 1)
            worst = max(worst, error)
        gradients = torch.autograd.grad(found["loss"], list(splicer.generator.parameters()))
        expected_gradients = torch.autograd.grad(expected["loss"], list(generator.parameters()))
        mine, theirs = (torch.cat([g.flatten().double() for g in gs]) for gs in (gradients, expected_gradients))
        worst_gradient = max(worst_gradient, float((mine - theirs).norm() / theirs.norm()))
    return worst, worst_gradient


@pytest.mark.parametrize("sizes", [((70, 70), (64, 64)), ((71, 93), (88, 66)), ((120, 65), (64, 150))])
@pytest.mark.parametrize("family", ["timm-augreg", "timm-dino"])
def test_a_step_of_the_reference_is_the_published_formula(family, sizes):
    network = families.build(family)
    structure, appearance = (picture(seed, *size) for seed, size in enumerate(sizes))
    size, most = (68, 120) if family == "timm-augreg" else (40, 60)  # neither is made of whole patches
    terms, gradient = largest_errors(network, structure, appearance, channels=(4, 8), size=size, max_size=most)
    assert terms < 1e-5
    assert gradient < 1e-4


SQUARE, WIDE, LONG = ((224, 224), (240, 240)), ((200, 301), (260, 190)), ((560, 230), (225, 300))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *[("vit_tiny_patch16_224", sizes) for sizes in (SQUARE, WIDE, LONG)],
        *[("vit_small_patch8_224", sizes) for sizes in (SQUARE, LONG)],
    ],
)
def test_a_step_of_the_reference_is_the_published_formula_at_full_width(name, sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    network = network.eval().requires_grad_(False)
    structure, appearance = (picture(seed, *size) for seed, size in enumerate(sizes))
    terms, gradient = largest_errors(network, structure, appearance)
    print(f"{name}, {sizes}: largest relative error of a term {terms:.1e}, of the gradient {gradient:.1e}")
    assert terms < 1e-5
    # At the coarsest of five scales a batch norm divides by the spread of a few, nearly equal pixels.
    assert gradient < 3e-2


def test_the_optimiser_is_the_published_one():
    """Adam with betas (0, 0.99): what three steps do to the weights, against Adam written out."""
    network = families.build("timm-augreg")
    config = SpliceConfig.preset("reference", channels=(4, 8), size=64, max_size=96)
    splicer = Splicer(picture(0, 64, 80), picture(1, 70, 64), extractor=vf.load_extractor(network), config=config)
    weights = [p.detach().clone() for p in splicer.generator.parameters()]
    second = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        gradients = torch.autograd.grad(splicer.objective(step)["loss"], list(splicer.generator.parameters()))
        splicer.step()
        for w, s, gradient in zip(weights, second, gradients, strict=True):
            s.mul_(0.99).add_(0.01 * gradient**2)
            w.sub_(0.002 * gradient / ((s / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8))
        for w, p in zip(weights, splicer.generator.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), w, atol=1e-6, rtol=1e-5)


def test_the_crops_of_the_reference_are_the_published_ones():
    """A square of 0.95 to 1 times the height; the structure image alone changes its colours."""
    network = families.build("timm-augreg")
    structure, appearance = picture(0, 64, 80), picture(1, 60, 90)
    splicer = Splicer(
        structure,
        appearance,
        extractor=vf.load_extractor(network),
        config=SpliceConfig.preset("reference", channels=(4, 8)),
    )
    recoloured = flips = 0
    for number in range(40):
        for which, image in (("structure", structure), ("appearance", appearance)):
            view = splicer._view(which, number)
            height = image.shape[-2]
            assert view.shape[-1] == view.shape[-2]
            assert round(0.95 * height) <= view.shape[-1] <= height
            places = [image.unfold(1, s := view.shape[-1], 1).unfold(2, s, 1).flatten(1, 2).movedim(1, 0)]
            same = any(bool((p == view[0]).flatten(1).all(1).any()) for p in places)
            mirrored = any(bool((p == view[0].flip(2)).flatten(1).all(1).any()) for p in places)
            if which == "appearance":
                assert same or mirrored
                flips += mirrored
            else:
                recoloured += not (same or mirrored)
    assert 8 <= flips <= 32
    assert 12 <= recoloured <= 36  # 0.5 + 0.2 − 0.1 of 40 are expected


# Whole runs ----------------------------------------------------------------------------------------------------------

QUICK = SpliceConfig(channels=(4, 8), size=48, max_size=96, transport_taps=("token@0",), steps=4, working_size=None)
REFERENCE = SpliceConfig.preset("reference", channels=(4, 8), size=48, max_size=96, steps=4, whole_every=3)
STRUCTURE, APPEARANCE = picture(0, 48, 56), picture(1, 52, 48)


@pytest.fixture(scope="module")
def tiny() -> vf.Extractor:
    """A random ViT of three blocks."""
    return vf.load_extractor(families.build("timm-augreg"), size=48)


def run(tiny: vf.Extractor, config: SpliceConfig = QUICK, **settings) -> SpliceResult:
    return splice(STRUCTURE, APPEARANCE, model=tiny, config=config, **settings)


def test_the_losses_fall(tiny):
    found = run(tiny, QUICK, steps=25)
    assert found.stopped == "done"
    assert [record["step"] for record in found.history] == list(range(25))
    assert list(found.history[0]) == ["step", "appearance", "transport token@0", "loss"]
    assert list(found.history[1]) == ["step", "appearance", "structure", "transport token@0", "loss"]
    first, last = (sum(r["loss"] for r in part) for part in (found.history[1:6], found.history[-5:]))
    assert last < 0.8 * first
    assert (found.config.steps, found.seed) == (25, 0)
    assert found.image.size == (56, 48)
    assert float(found.tensor.min()) >= 0
    assert float(found.tensor.max()) <= 1


def test_the_uncropped_losses_fall_and_have_no_crop_in_them(tiny):
    splicer = Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=QUICK, seed=1)
    other = Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=replace(QUICK, smallest_crop=0.5, flip=1.0), seed=1)
    before = splicer.uncropped()
    assert other.uncropped() == before
    assert before["structure"] < 1e-3  # it begins at the structure image
    painted = splicer._painted(STRUCTURE[None])
    both = tiny.resized(size=48)(torch.cat([painted, STRUCTURE[None]]), "key@-1")
    assert before["structure"] == pytest.approx(float(structure_loss(both[0], both[1]).detach()), rel=1e-4)
    for _ in range(25):
        splicer.step()
    assert splicer.uncropped()["appearance"] < before["appearance"]


@pytest.mark.parametrize("config", [QUICK, REFERENCE, replace(QUICK, schedule="constant", views=2, flip=0.5)])
def test_one_seed_gives_the_same_bits_and_another_gives_others(tiny, config):
    torch.manual_seed(1)
    one = run(tiny, config, seed=7)
    torch.manual_seed(2)
    same, other = run(tiny, config, seed=7), run(tiny, config, seed=8)
    assert torch.equal(one.tensor, same.tensor)
    assert one.history == same.history
    assert not torch.equal(one.tensor, other.tensor)
    assert one.history != other.history


def test_no_other_random_number_is_used(tiny):
    before = torch.get_rng_state()
    run(tiny, replace(REFERENCE, steps=2))
    assert torch.equal(torch.get_rng_state(), before)


class Crash(Exception):
    """Stands for whatever ends a process."""


def crash_at(step: int):
    def callback(number: int, losses, image) -> None:
        if number >= step:
            raise Crash

    return callback


@pytest.mark.parametrize(
    ("config", "every"),
    [(replace(QUICK, views=3), 1), (replace(QUICK, views=3), 3), (replace(REFERENCE, blur=1.0), 2)],
    ids=["bank, 1", "bank, 3", "reference, 2"],
)
def test_a_run_that_crashed_goes_on_as_if_it_had_not(tiny, tmp_path, config, every):
    config = replace(config, steps=7, checkpoint_every=every, snapshot_every=4)
    wanted = run(tiny, config, seed=5)
    for step in (1, 4, 4, 5):
        with pytest.raises(Crash):
            run(tiny, config, seed=5, out=tmp_path, resume=True, callback=crash_at(step))
    found = run(tiny, config, seed=5, out=tmp_path, resume=True)
    assert torch.equal(found.tensor, wanted.tensor)
    assert found.history == wanted.history
    assert [record["step"] for record in found.history] == list(range(7))
    # The folder says the same.
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == wanted.history
    assert read_config(tmp_path / "config.yaml", SpliceConfig) == config
    assert np.array_equal(np.asarray(Image.open(tmp_path / "result.png")), np.asarray(wanted.image))
    assert (tmp_path / "step_000004.png").is_file()
    assert not list(tmp_path.glob(".*"))
    # A run that is complete is only read.
    again = run(tiny, config, seed=5, out=tmp_path, resume=True, callback=crash_at(0))
    assert torch.equal(again.tensor, wanted.tensor)
    assert again.history == wanted.history


KILLED = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import families
import vitfeats as vf
from vitfeats.apps.splice import splice
from vitfeats.configs import SpliceConfig, read_config
structure, appearance = torch.load({pictures!r})
config = read_config({config!r}, SpliceConfig)
extractor = vf.load_extractor(families.build("timm-augreg"), size=48)
folder = sys.argv[1]
slowly = lambda step, losses, image: time.sleep(0.02) if "killed" in folder else None
found = splice(structure, appearance, model=extractor, config=config, seed=5, out=folder, resume=True, callback=slowly)
torch.save(found.tensor, folder + "/tensor.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 4])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(tmp_path, views):
    config = replace(REFERENCE, steps=60, views=views, checkpoint_every=3, snapshot_every=10)
    torch.save((STRUCTURE, APPEARANCE), tmp_path / "pictures.pt")
    (tmp_path / "settings.yaml").write_text(write_config(config))
    script = KILLED.format(
        tests=str(Path(families.__file__).parent),
        pictures=str(tmp_path / "pictures.pt"),
        config=str(tmp_path / "settings.yaml"),
    )

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)])

    assert start("whole").wait() == 0
    history = tmp_path / "killed" / "history.jsonl"
    kill_now_and_then(lambda: start("killed"), history, most=55, times=5, seed=views)
    assert start("killed").wait() == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torch.equal(torch.load(killed / "tensor.pt"), torch.load(whole / "tensor.pt"))
    for name in ("history.jsonl", "config.yaml", "result.png", "step_000060.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_folder_that_has_a_run_is_not_overwritten(tiny, tmp_path):
    run(tiny, replace(QUICK, steps=1), out=tmp_path)
    with pytest.raises(ConfigError, match=rf"a folder without a run, but '{tmp_path}' has a checkpoint; resume it"):
        run(tiny, out=tmp_path)


def test_resuming_where_nothing_is_begins(tiny, tmp_path):
    found = run(tiny, replace(QUICK, steps=2), out=tmp_path / "new", resume=True)
    assert torch.equal(found.tensor, run(tiny, replace(QUICK, steps=2)).tensor)


def test_a_run_of_other_settings_is_not_resumed(tiny, tmp_path):
    run(tiny, replace(QUICK, steps=2), out=tmp_path)
    other = vf.load_extractor(families.build("timm-deit"), size=48)

    def resume(message: str, *, config=QUICK, structure=STRUCTURE, appearance=APPEARANCE, model=tiny, **settings):
        with pytest.raises(ConfigError, match=message):
            splice(structure, appearance, model=model, config=config, out=tmp_path, resume=True, **settings)

    two = replace(QUICK, steps=2)
    resume(
        "the settings of the checkpoint, but these differ: lr: 0.01 there, 0.02 here. Use another folder",
        config=replace(two, lr=0.02),
    )
    resume("differ: seed: 0 there, 4 here", config=two, seed=4)
    resume(r"differ: structure image: '\(48, 56\) \w{16}' there, '\(48, 56\)", config=two, structure=1 - STRUCTURE)
    resume("differ: appearance image: ", config=two, appearance=STRUCTURE)
    resume("differ: steps: 2 there, 4 here", config=QUICK)  # a cosine hangs on its length
    resume(r"differ: terms: \['1.0 appearance: appearance_loss of ", config=two, terms=default_terms(QUICK)[:2])
    resume("differ: generator: 'SkipNet of ", config=two, generator=nn.Conv2d(3, 3, 1))
    assert other.card.name == tiny.card.name  # both are a VisionTransformer to timm
    named = copy.copy(tiny)
    named.card = replace(tiny.card, name="another")
    resume("differ: model: 'VisionTransformer' there, 'another' here", config=two, model=named)
    # What does not change the result may.
    free = replace(two, checkpoint_every=1, snapshot_every=0, patience=9)
    assert len(run(tiny, free, out=tmp_path, resume=True).history) == 2


def test_a_run_may_be_lengthened(tiny, tmp_path):
    config = replace(QUICK, schedule="constant", steps=5)
    wanted = run(tiny, config)
    run(tiny, config, steps=2, out=tmp_path)
    found = run(tiny, config, out=tmp_path, resume=True)
    assert torch.equal(found.tensor, wanted.tensor)
    assert found.history == wanted.history


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty"])
def test_a_broken_checkpoint_is_said_so(tiny, tmp_path, damage):
    run(tiny, replace(QUICK, steps=1), out=tmp_path)
    file = tmp_path / "checkpoint.pt"
    whole = file.read_bytes()
    file.write_bytes({"torn": whole[: len(whole) // 2], "garbage": b"no checkpoint at all", "empty": b""}[damage])
    with pytest.raises(StoreError, match=rf"expected a checkpoint of vitfeats at '{file}', but: "):
        run(tiny, out=tmp_path, resume=True)
    torch.save({"weights": torch.zeros(2)}, file)
    with pytest.raises(StoreError, match=rf"of vitfeats at '{file}', got a file of another kind"):
        run(tiny, out=tmp_path, resume=True)
    torch.save({"format": "vitfeats.tune/1"}, file)
    with pytest.raises(ConfigError, match=r"the state of a splice \(vitfeats.splice/1\), got 'vitfeats.tune/1'"):
        run(tiny, out=tmp_path, resume=True)


# What can go wrong ---------------------------------------------------------------------------------------------------


class Turning:
    """A user's term whose value, or gradient, is not finite from some call on."""

    def __init__(self, calls: int, value: float = float("nan"), gradient: float = 1.0) -> None:
        self.calls, self.value, self.gradient = calls, value, gradient

    def __call__(self, made: vf.Descriptor, wanted: vf.Descriptor) -> Tensor:
        self.calls -= 1
        mean = made.features.mean()
        if self.calls >= 0:
            return mean.square()
        return (mean - mean.detach()).sqrt() if self.value == 0 else mean * self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0], ids=["nan", "infinite", "gradient"])
def test_what_is_not_finite_ends_the_run_with_the_last_good_picture(tiny, tmp_path, value):
    own = Term("own", 1.0, Turning(2, value), "token@1", "structure", "appearance")
    what = "the gradient" if value == 0 else "own, loss"
    with pytest.warns(
        RuntimeWarning, match=f"the run stopped: expected finite losses at step 2, got {what} not finite"
    ):
        found = run(tiny, replace(QUICK, checkpoint_every=1), terms=[*default_terms(QUICK), own], out=tmp_path)
    assert found.stopped == "not finite"
    assert [record["step"] for record in found.history] == [0, 1]
    assert bool(found.tensor.isfinite().all())
    # The weights that gave the last finite losses: those that step 1 began with.
    good = run(tiny, terms=[*default_terms(QUICK), replace(own, loss=Turning(9))], callback=lambda step, *_: step == 0)
    assert torch.equal(found.tensor, good.tensor)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert all(bool(t.isfinite().all()) for t in state["generator"].values())


def press_ctrl_c(*steps: int):
    def callback(number: int, losses, image) -> None:
        if number in steps:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_loses_nothing(tiny, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    message = re.escape(f"after 2 steps; resume it (resume=True, --resume) in '{tmp_path}'")
    with pytest.raises(SpliceInterrupted, match=message) as raised:
        run(tiny, out=tmp_path, callback=press_ctrl_c(1))
    assert isinstance(raised.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is before
    result = raised.value.result
    assert (result.stopped, len(result.history)) == ("interrupted", 2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "result.png")), np.asarray(result.image))
    found, wanted = run(tiny, out=tmp_path, resume=True), run(tiny)
    assert torch.equal(found.tensor, wanted.tensor)
    assert found.history == wanted.history
    with pytest.raises(SpliceInterrupted, match="interrupted after 1 steps; nothing was written: pass out="):
        run(tiny, callback=press_ctrl_c(0))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(tiny, tmp_path):
    class Pressed(Turning):
        def __call__(self, made, wanted):
            self.calls -= 1
            if self.calls == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return 0.0 * made.features.mean()

    terms = [*default_terms(QUICK), Term("own", 1.0, Pressed(2), "token@1", "structure", "appearance")]
    with pytest.raises(SpliceInterrupted, match="interrupted after 2 steps"):
        run(tiny, terms=terms, out=tmp_path)
    assert torch.equal(run(tiny, terms=terms, out=tmp_path, resume=True).tensor, run(tiny, terms=terms).tensor)


@pytest.mark.usefixtures("ctrl_c")
def test_an_impatient_second_ctrl_c_leaves_a_checkpoint_of_whole_steps(tiny, tmp_path, monkeypatch):
    """It may end a step in its middle; what is kept is what was before."""
    config = replace(QUICK, checkpoint_every=1)
    wanted = run(tiny, config)
    whole = torch.optim.Adam.step
    taken = []

    def broken(self, *args, **kwargs):
        taken.append(whole(self, *args, **kwargs))
        if len(taken) == 3:  # the weights have changed, and nothing else
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, config, out=tmp_path)
    found = run(tiny, config, out=tmp_path, resume=True)
    assert torch.equal(found.tensor, wanted.tensor)
    assert found.history == wanted.history


def test_a_full_disk_costs_a_warning_and_the_last_good_checkpoint_stays(tiny, tmp_path, monkeypatch):
    config = replace(QUICK, steps=5, checkpoint_every=1, snapshot_every=1)
    wanted = run(tiny, config)
    write, full = runs.write_whole, []

    def full_after(step: int, losses, image) -> None:
        full.append(step)

    def limited(path: Path, data: bytes) -> None:
        if len(full) >= 3:
            raise StoreError(f"expected to write '{path}', but: no space left on device")
        write(path, data)

    monkeypatch.setattr(runs, "write_whole", limited)
    with pytest.warns(RuntimeWarning) as told:
        found = run(tiny, config, out=tmp_path, callback=full_after)
    texts = [str(w.message) for w in told]
    for name in ("checkpoint.pt", "step_000004.png", "result.png", "losses.png"):
        assert any(
            text.startswith(f"'{name}' could not be written, the run goes on: expected to write") for text in texts
        )
    assert torch.equal(found.tensor, wanted.tensor), "the run itself lacks nothing"
    assert not (tmp_path / "result.png").exists()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(runs, "write_whole", write)
    again = run(tiny, config, out=tmp_path, resume=True)
    assert torch.equal(again.tensor, wanted.tensor)
    assert again.history == wanted.history


def test_a_folder_that_cannot_be_made_is_said_before_any_step(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"expected a folder to write to at '{tmp_path}/file/run', but: "):
        run(tiny, out=tmp_path / "file" / "run", callback=crash_at(0))
    with pytest.raises(StoreError, match="expected a folder to write to"):
        run(tiny, replace(QUICK, steps=1)).save(tmp_path / "file" / "run")


def test_a_result_can_be_saved_elsewhere(tiny, tmp_path):
    found = run(tiny, replace(QUICK, steps=2))
    path = found.save(tmp_path / "there")
    assert path == tmp_path / "there" / "result.png"
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.yaml", "history.jsonl", "losses.png", "result.png"]


def test_a_callback_sees_every_step_and_may_end_the_run(tiny):
    seen = []

    def callback(step, losses, image) -> bool:
        seen.append((step, losses, image()))
        return step == 2

    found = run(tiny, replace(QUICK, working_size=24), callback=callback)
    assert found.stopped == "callback"
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [{"step": step, **losses} for step, losses, _ in seen] == found.history
    assert all(image.shape == STRUCTURE.shape for _, _, image in seen)
    assert not any(image.requires_grad for _, _, image in seen)
    assert torch.equal(seen[-1][2], found.tensor)
    # Looking changes nothing.
    assert torch.equal(
        run(tiny, QUICK).tensor, run(tiny, QUICK, callback=lambda step, losses, image: image()[0] is None).tensor
    )


def test_a_run_that_gets_nowhere_ends_early(tiny):
    still = replace(QUICK, lr=0.0, smallest_crop=1.0, views=1, warmup=0, patience=3, steps=30)
    assert run(tiny, still).stopped == "plateau"
    assert len(run(tiny, still).history) == 6
    assert run(tiny, replace(still, patience=0, steps=8)).stopped == "done"


def test_progress_goes_to_standard_error(tiny, capsys):
    run(tiny, progress=True)
    told = capsys.readouterr()
    assert "4/4" in told.err
    assert "loss=" in told.err
    assert not told.out
    run(tiny)
    assert not capsys.readouterr().err


# Models, generators, terms, images -----------------------------------------------------------------------------------


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules())


@pytest.mark.parametrize("training", [False, True])
def test_a_users_model_is_left_as_it_was(training):
    network = families.build("timm-augreg").train(training).requires_grad_(True)
    network.blocks[0].requires_grad_(False)
    hooked = network.register_forward_hook(lambda *args: None)
    flags = [p.requires_grad for p in network.parameters()]
    modes = [m.training for m in network.modules()]
    weights = copy.deepcopy(network.state_dict())
    splice(STRUCTURE, APPEARANCE, model=network, config=replace(REFERENCE, steps=2))
    assert [p.requires_grad for p in network.parameters()] == flags
    assert [m.training for m in network.modules()] == modes
    assert all(p.grad is None for p in network.parameters()), "only the generator is trained"
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert hooks_of(network) == 1
    hooked.remove()


def test_a_model_that_was_frozen_gives_the_same_bits_as_one_that_was_not():
    frozen, free = families.build("timm-augreg"), families.build("timm-augreg").requires_grad_(True)
    a, b = (splice(STRUCTURE, APPEARANCE, model=m, config=QUICK) for m in (frozen, free))
    assert torch.equal(a.tensor, b.tensor)


def test_the_result_has_the_full_size_of_the_structure_image(tiny):
    for height, width in ((150, 200), (200, 150), (40, 130)):
        structure = picture(2, height, width)
        config = replace(QUICK, working_size=64, steps=2)
        splicer = Splicer(structure, APPEARANCE, extractor=tiny, config=config)
        assert min(splicer._images["structure"].shape[-2:]) == min(64, height)
        made = splice(structure, APPEARANCE, model=tiny, config=config)
        assert made.tensor.shape == (3, height, width)
        assert made.image.size == (width, height)
        # It begins at the structure image, and so do its details.
        assert float((splicer.render() - structure).abs().mean()) < 2 / 255


class Own(nn.Module):
    """A user's generator, with batch statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.fixed = nn.Parameter(torch.ones(3, 1, 1), requires_grad=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(3, 3, 3, 3, generator=rng) * 0.3)
            self.mix.bias.zero_()

    def forward(self, image: Tensor) -> Tensor:
        return (self.norm(self.mix(image)) * self.fixed).sigmoid()


def test_a_users_own_generator_is_trained(tiny, tmp_path):
    own = Own()
    before = own.mix.weight.detach().clone()
    config = replace(QUICK, steps=3)
    found = splice(STRUCTURE, APPEARANCE, model=tiny, config=config, generator=own, out=tmp_path)
    assert not torch.equal(own.mix.weight, before)
    assert bool((own.fixed == 1).all())
    # A checkpoint holds it.
    loaded = Own()
    again = splice(STRUCTURE, APPEARANCE, model=tiny, config=config, generator=loaded, out=tmp_path, resume=True)
    assert torch.equal(loaded.mix.weight, own.mix.weight)
    assert again.history == found.history


def test_a_generator_that_changes_the_size_is_refused(tiny):
    with pytest.raises(
        ShapeError, match=r"a generator that keeps \(1, 3, (\d+), (\d+)\), got \(1, 3, \d+, \d+\) from it"
    ):
        splice(STRUCTURE, APPEARANCE, model=tiny, config=QUICK, generator=nn.Conv2d(3, 3, 3))


def test_a_users_own_term_counts_with_its_weight(tiny):
    def mean(made: vf.Descriptor, wanted: vf.Descriptor) -> Tensor:
        return (made.features.mean() - wanted.features.mean()).square()

    terms = [*default_terms(QUICK), Term("own", 3.0, mean, "value@1", "structure", "appearance", start=2)]
    splicer = Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=replace(QUICK, relative=False), terms=terms)
    assert "own" not in splicer.objective(1)
    found = splicer.objective(2)
    names = {
        "appearance": QUICK.appearance,
        "structure": QUICK.structure,
        "transport token@0": QUICK.transport,
        "own": 3.0,
    }
    assert set(found) == {*names, "loss"}
    torch.testing.assert_close(found["loss"], sum(weight * found[name] for name, weight in names.items()))
    # The same from the outside: the crop, painted, and read.
    read = lambda image: tiny.resized(size=tuple(image.shape[-2:]))(image, "value@1")  # noqa: E731
    made = read(splicer._network(splicer._painted(splicer._view("structure", splicer._number("structure", 2)))))
    wanted = read(splicer._network(splicer._view("appearance", splicer._number("appearance", 2))))
    torch.testing.assert_close(found["own"], mean(made, wanted), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(("given", "told"), [(None, "None"), (0.5, "0.5"), ("made", "'made'")])
def test_a_users_loss_that_returns_no_tensor_is_refused_by_the_name_of_its_term(tiny, given, told):
    own = Term("own", 1.0, lambda made, wanted: given, "token@1", "structure", "appearance")
    with pytest.raises(
        ConfigError, match=f"a tensor of one number for the term 'own', got {told}; compute it by torch"
    ):
        run(tiny, terms=[*default_terms(QUICK), own])


@pytest.mark.parametrize(
    "loss",
    [
        lambda made, wanted: torch.tensor(1.0),
        lambda made, wanted: made.features.detach().mean(),
        lambda made, wanted: wanted.features.square().mean(),
        lambda made, wanted: torch.tensor(1.0, requires_grad=True),
        lambda made, wanted: torch.ones((), requires_grad=True) * made.features.detach().mean(),
    ],
    ids=["a constant", "detached", "of the wanted alone", "a leaf", "of a parameter of its own"],
)
def test_a_users_loss_without_a_gradient_is_refused_by_the_name_of_its_term(tiny, loss):
    own = Term("own", 1.0, loss, "token@1", "structure", "appearance", start=2)
    terms, seen = [*default_terms(QUICK), own], []
    with pytest.raises(ConfigError, match="the term 'own' gives no gradient to the picture; compute it by torch from"):
        run(tiny, terms=terms, callback=lambda step, *_: seen.append(step))
    assert seen == [0, 1]  # until it counts, it does not matter
    assert len(run(tiny, terms=[*terms[:-1], replace(own, weight=0.0)]).history) == QUICK.steps
    with torch.no_grad():  # the objective may be looked at without a gradient
        assert "own" in Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=QUICK, terms=terms).objective(2)


def test_a_loss_that_is_satisfied_may_turn_constant(tiny):
    count = []

    def satisfied(made, wanted):
        count.append(1)
        return made.features.square().mean() if len(count) < 3 else torch.tensor(0.0)

    own = Term("own", 1.0, satisfied, "token@1", "structure", "appearance")
    assert len(run(tiny, terms=[*default_terms(QUICK), own]).history) == QUICK.steps
    assert len(count) == QUICK.steps
    count.clear()
    with pytest.raises(ConfigError, match="a gradient at step 2, but every term has turned constant"):
        run(tiny, terms=[own])


def test_a_result_is_one_line_in_words(tiny):
    made = run(tiny, steps=2)
    height, width = made.tensor.shape[1:]
    assert repr(made) == f"SpliceResult({width}×{height}, 2 steps, loss {made.history[-1]['loss']:.4g}, done)"
    assert repr(replace(made, history=made.history[:1], stopped="callback")).startswith(
        f"SpliceResult({width}×{height}, 1 step, "
    )
    assert (
        repr(replace(made, history=[], stopped="interrupted"))
        == f"SpliceResult({width}×{height}, 0 steps, interrupted)"
    )


def test_relative_weights_are_in_units_of_the_distance_to_go(tiny):
    absolute = Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=replace(QUICK, relative=False, transport=0))
    relative = Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=replace(QUICK, relative=True, transport=0))
    a, b = absolute.objective(0), relative.objective(0)
    assert torch.equal(a["appearance"], b["appearance"])  # the record is of the plain numbers
    cls = [tiny(absolute._network(image[None]), "cls@-1") for image in (STRUCTURE, APPEARANCE)]
    torch.testing.assert_close(b["loss"] / a["loss"], 1 / appearance_loss(*cls), rtol=1e-4, atol=0)


def test_a_weight_of_0_leaves_a_term_out(tiny):
    def never(made, wanted):
        raise AssertionError("it must not be computed")

    terms = [*default_terms(QUICK), Term("own", 0.0, never, "nonsense@99", "structure", "appearance")]
    assert "own" not in run(tiny, terms=terms).history[-1]
    assert torch.equal(run(tiny, terms=terms).tensor, run(tiny).tensor)


def test_whole_images_are_compared_every_so_often(tiny):
    config = replace(REFERENCE, whole_every=2, steps=5, identity=0.0)
    for record in run(tiny, config).history:
        assert ("whole_structure" in record) == ("whole_appearance" in record) == (record["step"] % 2 == 0)
        assert ("structure" in record) == (record["step"] >= 1)


def test_a_model_without_cls_needs_another_term_for_appearance():
    siglip = vf.load_extractor(families.build("timm-siglip"), size=48)
    with pytest.raises(
        ConfigError, match="a model with a CLS token for the term 'appearance', but .* has none; take one"
    ) as told:
        run(siglip)
    assert "mini, dino_vits8" in str(told.value)
    assert str(told.value).endswith("or set appearance=0, whole_appearance=0: transport needs no CLS")
    config = replace(QUICK, appearance=0, whole_appearance=0)
    found = run(siglip, config)
    assert list(found.history[-1]) == ["step", "structure", "transport token@0", "loss"]
    moments = Term("moments", 1.0, moments_loss, "token@1", "structure", "appearance")
    only = run(siglip, terms=[moments], steps=15)
    assert list(only.history[0]) == ["step", "moments", "loss"]
    assert only.history[-1]["loss"] < only.history[0]["loss"]


def test_terms_that_cannot_be_are_refused(tiny):
    term = Term("own", 1.0, identity_loss, "key@1", "structure", "structure")

    def refused(error: type[Exception], message: str, *terms: Term) -> None:
        with pytest.raises(error, match=message):
            run(tiny, terms=terms)

    for weight in (-1.0, float("nan"), float("inf")):
        refused(ConfigError, f"a weight of at least 0 for the term 'own', got {weight}", replace(term, weight=weight))
    refused(ConfigError, "terms of different names, got 'own' twice", term, term)
    refused(
        ConfigError,
        "another name than 'loss' and 'step', which the history uses, got 'loss'",
        replace(term, name="loss"),
    )
    refused(
        ConfigError, "made and wanted to be 'structure' or 'appearance' for the term 'own'", replace(term, made="style")
    )
    many = replace(term, loss=lambda made, wanted: made.features.square().mean(2))
    refused(ConfigError, r"a loss of one number for the term 'own', got shape \(1, ", many)
    refused(ConfigError, "expected at least one term with a weight above 0, got none")
    refused(ConfigError, "expected at least one term with a weight above 0, got none", replace(term, weight=0))
    refused(TapError, "expected a layer from 0 to 2", replace(term, tap="key@9"))
    refused(vf.UnknownFacetError, "expected a facet, got 'keyy'", replace(term, tap="keyy@1"))
    refused(ConfigError, "a weight above 0 at step 0, got none; begin one earlier", replace(term, start=3))


def test_seeds_that_are_none_are_refused(tiny):
    with pytest.raises(ConfigError, match="expected a seed of at least 0, got -1"):
        run(tiny, seed=-1)
    for seed in (1.5, None):
        with pytest.raises(ConfigError, match=f"expected a whole number as seed, got {seed}"):
            run(tiny, seed=seed)


def test_a_picture_that_is_not_finite_is_rolled_back(tiny):
    """Weights that an update has ruined are given up: the picture is that of the update before."""
    with pytest.warns(RuntimeWarning, match="the run stopped: expected a finite picture at step 1"):
        found = run(tiny, replace(QUICK, lr=1e38, betas=(0.0, 0.0)))
    assert (found.stopped, len(found.history)) == ("not finite", 1)
    assert bool(found.tensor.isfinite().all())


def test_an_error_of_a_callback_costs_no_step(tiny, tmp_path):
    def broken(step, losses, image):
        if step == 2:
            raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        run(tiny, out=tmp_path, callback=broken)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert torch.equal(run(tiny, out=tmp_path, resume=True).tensor, run(tiny).tensor)


def test_it_runs_inside_no_grad(tiny):
    with torch.no_grad():
        found = run(tiny)
    assert torch.equal(found.tensor, run(tiny).tensor)


def test_a_state_that_was_kept_stays_as_it_was(tiny):
    splicer = Splicer(STRUCTURE, APPEARANCE, extractor=tiny, config=QUICK)
    splicer.step()
    kept = splicer.state_dict()
    then = splicer.render()
    splicer.step()
    splicer.load_state_dict(kept)
    assert (splicer.done, torch.equal(splicer.render(), then)) == (1, True)


def test_the_same_image_twice_is_no_division_by_zero(tiny):
    found = splice(STRUCTURE, STRUCTURE, model=tiny, config=QUICK)
    assert found.history[0]["loss"] < 100


def test_images_come_in_every_way(tiny, tmp_path):
    colours = (STRUCTURE * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(colours)
    image.save(tmp_path / "image.png")
    config = replace(QUICK, steps=1)
    wanted = splice(image, APPEARANCE, model=tiny, config=config).tensor
    for same in (colours, tmp_path / "image.png", str(tmp_path / "image.png"), image.convert("RGBA")):
        assert torch.equal(splice(same, APPEARANCE, model=tiny, config=config).tensor, wanted)
    grey = image.convert("L")
    found = splice(grey, grey, model=tiny, config=config).tensor
    assert torch.equal(found, splice(grey.convert("RGB"), grey.convert("RGB"), model=tiny, config=config).tensor)


def test_images_that_are_too_small_or_none_are_refused(tiny):
    pixel = torch.rand(3, 1, 1)
    with pytest.raises(
        ShapeError, match="expected a structure image of at least 5×5 pixels, got 1×1; enlarge it, raise"
    ):
        splice(pixel, APPEARANCE, model=tiny, config=QUICK)
    with pytest.raises(ShapeError, match="expected an appearance image of at least 5×5 pixels, got 4×64"):
        splice(STRUCTURE, torch.rand(3, 4, 64), model=tiny, config=QUICK)
    with pytest.raises(ImageError):
        splice("no-such-file.png", APPEARANCE, model=tiny, config=QUICK)
    smallest = torch.rand(3, 5, 5)
    assert splice(smallest, smallest, model=tiny, config=replace(QUICK, steps=1)).image.size == (5, 5)


def test_black_and_white_pictures_do_no_harm(tiny):
    black, white = torch.zeros(3, 48, 48), torch.ones(3, 48, 48)
    for a, b in ((black, white), (white, black), (black, black)):
        found = splice(a, b, model=tiny, config=replace(QUICK, steps=3, working_size=32))
        assert found.stopped == "done"
        assert bool(found.tensor.isfinite().all())


def test_a_model_by_name_and_its_stride(mini):
    config = replace(QUICK, size=64, steps=1, stride=8, transport_taps=("token@2",))
    loaded = splice(STRUCTURE, APPEARANCE, model="mini", config=config, device="cpu")
    given = splice(STRUCTURE, APPEARANCE, model=mini, config=config)
    assert torch.equal(loaded.tensor, given.tensor)
    assert loaded.history == given.history
    apart = splice(STRUCTURE, APPEARANCE, model=mini, config=replace(config, stride=None))
    assert apart.history != given.history


def test_channels_last_changes_little(tiny):
    plain, last = run(tiny), run(tiny, replace(QUICK, channels_last=True))
    assert float((plain.tensor - last.tensor).abs().max()) < 0.05


def test_half_precision_is_close(tiny):
    half = vf.load_extractor(tiny.model, size=48, dtype="bfloat16")
    found, wanted = run(half), run(tiny)
    assert found.tensor.dtype == torch.float32
    assert found.history[0]["loss"] == pytest.approx(wanted.history[0]["loss"], rel=0.1)


def test_no_second_forward_pass_for_what_has_one_size(tiny):
    """The judge sees all painted images of a size at once, and an image that exists once a view."""
    batches = []
    hook = tiny.model.patch_embed.register_forward_hook(lambda module, args, out: batches.append(len(out)))
    try:
        square = torch.rand(3, 48, 48)
        config = replace(REFERENCE, smallest_crop=1.0, max_size=96)
        splicer = Splicer(square, square, extractor=tiny, config=config)
        splicer.objective(3)
        assert sorted(batches) == [1, 2, 3]  # the whole image; two fresh crops; all three painted ones
        batches.clear()
        splicer = Splicer(square, square, extractor=tiny, config=replace(config, views=1))
        for step in (1, 2, 4):
            splicer.objective(step)
        assert batches == [2, 1, 1, 2, 2] or sorted(batches) == [1, 1, 2, 2, 2]
    finally:
        hook.remove()
