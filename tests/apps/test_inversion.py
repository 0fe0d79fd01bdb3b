"""Feature inversion: the loss falls, starts are independent, seeds decide everything, and nothing else is touched."""

import json
import math
from dataclasses import replace

import families
import pytest
import torch
from PIL import Image
from synthetic import random_descriptor

import vitfeats as vf
from vitfeats.apps import inversion
from vitfeats.apps.inversion import Inversion, invert, invert_layers, noise_at, self_similarity_pca, strip
from vitfeats.configs import InvertConfig
from vitfeats.taps import Tap

TINY = InvertConfig(steps=3, lr=0.02, smooth=0, inputs=4, channels=(8, 8, 8))
TWO = replace(TINY, starts=2)

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.fixture(scope="module")
def tiny() -> vf.Extractor:
    """A random ViT of three blocks, on pictures of 32 × 48."""
    return vf.load_extractor(families.build("timm-deit"), size=(32, 48), stride=8)


def flat(found: Inversion) -> torch.Tensor:
    return found.tensor.flatten()


@pytest.mark.parametrize("tap", ["key@-1", "cls@1"])
def test_the_loss_falls_and_the_record_has_everything(tiny, photo, tap):
    found = invert(photo, tap, model=tiny, config=TINY, steps=25)
    assert found.tensor.shape == (1, 3, 32, 48)
    assert bool(((found.tensor >= 0) & (found.tensor <= 1)).all())
    assert [record["step"] for record in found.history] == list(range(26))
    first, last = found.history[0]["losses"][0], found.history[-1]["losses"][0]
    assert last < 0.5 * first
    assert found.losses == (last,)
    assert (found.model, found.seed, found.config.steps) == (tiny.card.name, 0, 25)
    assert str(found.tap) == tap.replace("-1", "2")
    # The losses and the PSNR are what anyone would measure on the picture.
    made, wanted = tiny(found.tensor, tap), tiny(found.target, tap)
    measure = vf.appearance_loss if tap.startswith("cls") else vf.identity_loss
    assert float(measure(made, wanted)) == pytest.approx(last, rel=1e-3)
    error = (found.tensor[0] - found.target).square().mean()
    assert found.psnr == pytest.approx((float(-10 * error.log10()),), rel=1e-4)
    assert repr(found).startswith(f"Inversion({found.tap} of {tiny.card.name}: 1 start of 32×48 pixels, loss ")


def test_a_seed_gives_the_same_bits_and_touches_no_other_random_numbers(tiny, photo):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = invert(photo, "cls@2", model=tiny, config=TINY, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = invert(photo, "cls@2", model=tiny, config=TINY, seed=3)
    assert torch.equal(one.tensor, again.tensor)
    assert one.history == again.history
    assert not torch.allclose(flat(one), flat(invert(photo, "cls@2", model=tiny, config=TINY, seed=4)), atol=1e-3)


def test_starts_do_not_influence_each_other(tiny, photo):
    both = invert(photo, "key@1", model=tiny, config=TWO)
    alone = invert(photo, "key@1", model=tiny, config=TINY)
    assert both.tensor.shape == (2, 3, 32, 48)
    assert len(both.images) == len(both.psnr) == 2
    torch.testing.assert_close(both.tensor[:1], alone.tensor, rtol=0, atol=1e-3)
    assert not torch.allclose(both.tensor[0], both.tensor[1], atol=1e-3)
    assert both.best == both.losses.index(min(both.losses))
    assert both.image.tobytes() == both.images[both.best].tobytes()


def test_steps_0_is_the_untrained_network(tiny, photo):
    found = invert(photo, "key@1", model=tiny, config=TINY, steps=0)
    trained = invert(photo, "key@1", model=tiny, config=TINY, steps=1)
    assert len(found.history) == 1
    assert found.losses[0] == trained.history[0]["losses"][0]


def test_noise_is_for_cls_and_follows_its_stages():
    reference = InvertConfig.preset("reference")
    sigmas = [noise_at(reference, Tap("cls", 11), step) for step in (0, 9_999, 10_000, 14_999, 15_000, 19_999, 20_000)]
    assert sigmas == [10, 10, 2, 2, 0.5, 0.5, 0]
    assert noise_at(reference, Tap("key", 11), 0) == 0
    late = InvertConfig(noise=((0.5, 1.0),), steps=10)
    assert [noise_at(late, Tap("cls", 0), step) for step in (4, 5)] == [0, 1]


def test_the_presets_are_what_they_say():
    reference = InvertConfig.preset("reference")
    assert (reference.size, reference.overlap, reference.steps, reference.lr) == (224, 1, 20_000, 0.01)
    assert (reference.inputs, reference.channels) == (32, (16, 32, 64, 128, 128, 128))
    assert (reference.kernels, reference.schedule, reference.smooth) == ((7, 7, 5, 5, 3, 3), "constant", 0)
    assert InvertConfig.preset("fast") == InvertConfig()
    assert InvertConfig.preset("draft", starts=3).starts == 3


def test_smoothness_smooths(tiny, photo):
    smooth = replace(TINY, smooth=10)
    flatter, plain = (invert(photo, "key@0", model=tiny, config=c, steps=15) for c in (smooth, TINY))
    assert float(inversion.roughness(flatter.tensor)) < 0.5 * float(inversion.roughness(plain.tensor))


def test_a_convolutional_layer_and_a_name(photo):
    torch.manual_seed(0)
    layers = {"a": torch.nn.Conv2d(3, 6, 3, 2, 1), "b": torch.nn.ReLU(), "c": torch.nn.Conv2d(6, 8, 3, 2, 1)}
    network = torch.nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    card = vf.ModelCard("net", "mine", "module", 4, 2, 8, None, 0, False, 32, layers=("a", "c"), default_tap="out@c")
    found = invert(photo, "out@c", model=vf.load_extractor(network.eval(), card=card), config=TINY, steps=20)
    assert found.tensor.shape[2] == 32
    assert found.losses[0] < 0.6 * found.history[0]["losses"][0]
    small = InvertConfig(size=32, steps=1, channels=(8, 8))
    assert invert(photo, "key@0", model="mini", device="cpu", config=small).tensor.shape == (1, 3, 32, 48)


def test_the_model_is_left_as_it_was(photo):
    module = families.build("timm-deit").requires_grad_(True).eval()
    module.blocks[0].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in module.parameters()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    extractor = vf.load_extractor(module, size=32)
    with torch.no_grad():  # a caller's grad mode neither stops the training nor changes
        found = invert(photo, "key@1", model=extractor, config=TINY)
        assert not torch.is_grad_enabled()
    assert found.losses[0] < found.history[0]["losses"][0]
    assert not found.tensor.requires_grad
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()] == hooks
    assert not module.training
    with torch.inference_mode():
        assert torch.equal(invert(photo.clone(), "key@1", model=extractor, config=TINY).tensor, found.tensor)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_loss_of_ones_own(tiny, photo):
    seen = []

    def first_channel(out: vf.Descriptor, target: vf.Descriptor) -> torch.Tensor:
        seen.append((len(out), len(target), out.tap))
        return (out.features[..., 0] - target.features[..., 0]).abs().mean()

    config = replace(TWO, steps=2)
    found = invert(photo, "value@1", model=tiny, config=config, loss=first_channel)
    assert seen == [(1, 1, Tap("value", 1))] * 6
    assert found.losses == pytest.approx(
        [float(first_channel(made, tiny(found.target, "value@1"))) for made in tiny(found.tensor, "value@1")], rel=1e-3
    )
    for wrong, got in ((lambda out, target: 1.0, "float"), (lambda out, target: out.cls, r"shape \(1, 48\)")):
        with pytest.raises(vf.ConfigError, match=f"returns one number as a tensor with a graph to out, got .*{got}"):
            invert(photo, "value@1", model=tiny, config=TINY, loss=wrong)
    with pytest.raises(vf.ConfigError, match="without a graph; for example identity_loss"):
        invert(photo, "value@1", model=tiny, config=TINY, loss=lambda out, target: out.cls.detach().mean())


def test_a_loss_that_is_not_finite_ends_that_start_alone(tiny, photo):
    calls = iter(range(100))

    def breaks(out: vf.Descriptor, target: vf.Descriptor) -> torch.Tensor:
        value = vf.identity_loss(out, target)
        return value * math.nan if next(calls) == 5 else value  # the second start at the third step

    config = replace(TWO, steps=5)
    with pytest.warns(RuntimeWarning, match="start 1 is nan at step 2 of 5; it ends with its last good picture"):
        found = invert(photo, "key@1", model=tiny, config=config, loss=breaks)
    assert len(found.history) == 6
    assert found.losses[1] == found.history[1]["losses"][1]
    assert math.isnan(found.history[2]["losses"][1])
    assert found.losses[0] == found.history[5]["losses"][0]
    assert bool(found.tensor.isfinite().all())
    made, wanted = tiny(found.tensor, "key@1"), tiny(found.target, "key@1")
    assert float(vf.identity_loss(made[1], wanted)) == pytest.approx(found.losses[1], rel=1e-3)

    with pytest.warns(RuntimeWarning, match="start 0 is inf at step 0"):
        lost = invert(photo, "key@1", model=tiny, config=TINY, loss=lambda o, t: vf.identity_loss(o, t) * math.inf)
    assert len(lost.history) == 1
    assert math.isnan(lost.losses[0])
    assert bool(lost.tensor.isfinite().all())


def test_a_callback_sees_each_step_and_may_end_the_run(tiny, photo):
    told = []

    def callback(step, losses, image):
        told.append((step, losses, image()))
        return step == 2

    found = invert(photo, "key@1", model=tiny, config=TINY, steps=10, callback=callback)
    assert [step for step, _, _ in told] == [0, 1, 2]
    assert told[2][1] == {"start_0": found.losses[0]}
    assert torch.equal(told[2][2], found.tensor[0])
    assert len(found.history) == 3
    told.clear()
    invert(photo, "key@1", model=tiny, config=TINY, steps=1, callback=callback)
    assert [step for step, _, _ in told] == [0, 1]  # the end, too


def test_an_interrupt_carries_what_there_is(tiny, photo):
    def callback(step, losses, image):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        invert(photo, "key@1", model=tiny, config=TINY, callback=callback)
    (found,) = stopped.value.args
    assert isinstance(found, Inversion)
    assert len(found.history) == 2
    assert found.losses[0] == found.history[1]["losses"][0]


def test_layers_and_their_strip(tiny, photo):
    found = invert_layers(photo, (0, -1), model=tiny, config=TINY)
    assert [str(one.tap) for one in found] == ["cls@0", "cls@2"]
    assert torch.equal(found[1].tensor, invert(photo, "cls@2", model=tiny, config=TINY).tensor)
    drawn = strip(found, side=64)
    assert isinstance(drawn, Image.Image)
    assert drawn.width >= 3 * 64 * 48 // 32
    assert 64 < drawn.height < 90
    assert drawn.crop((0, drawn.height - 64, 96, drawn.height)).convert("L").getextrema() != (255, 255)
    with pytest.raises(vf.ConfigError, match="at least one layer, got none; for example"):
        invert_layers(photo, (), model=tiny)
    with pytest.raises(vf.TapError, match="got 9"):  # before the first is begun
        invert_layers(photo, (0, 9), model=tiny)
    with pytest.raises(vf.ShapeError, match="at least one inversion, got none"):
        strip([])
    with pytest.raises(vf.ConfigError, match="side of at least 1 pixel, got 0"):
        strip(found, side=0)
    other = invert(photo, "cls@0", model=tiny.resized(size=(32, 32)), config=TINY, steps=0)
    with pytest.raises(vf.ShapeError, match=r"one size, got \[\(32, 32\), \(32, 48\)\]; invert one image"):
        strip([found[0], other])


def test_save_writes_pictures_and_numbers(tiny, photo, tmp_path):
    config = replace(TWO, steps=1)
    found = invert(photo, "key@1", model=tiny, config=config, seed=7)
    folder = found.save(tmp_path / "deep" / "run")
    names = {"inversion.png", "inversion.json", "start_0.png", "start_1.png", "target.png"}
    assert {file.name for file in folder.iterdir()} == names
    with Image.open(folder / "inversion.png") as picture:
        assert picture.tobytes() == found.image.tobytes()
    facts = json.loads((folder / "inversion.json").read_text())
    assert (facts["tap"], facts["seed"], facts["best"]) == ("key@1", 7, found.best)
    assert facts["losses"] == list(found.losses)
    assert facts["config"]["starts"] == 2
    assert len(facts["history"]) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(vf.StoreError, match="expected a folder to write to at .*file"):
        found.save(tmp_path / "file")


def test_numbers_that_json_does_not_know_become_null(tiny, photo, tmp_path):
    found = invert(photo, "key@1", model=tiny, config=TINY, steps=0)
    same = Inversion(found.target[None], (math.nan,), [], found.target, found.tap, "m", 0, found.config)
    facts = json.loads((same.save(tmp_path) / "inversion.json").read_text())
    assert (facts["psnr"], facts["losses"]) == ([None], [None])
    with pytest.raises(vf.ShapeError, match="one loss a start and a target of their size, got"):
        Inversion(found.tensor, (), [], found.target, found.tap, "m", 0, found.config)


def test_self_similarity_pca_groups_what_is_alike():
    kinds = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3])
    plain = random_descriptor(0, rows=3, cols=4, dim=8, batch=2)
    d = vf.Descriptor(torch.stack([kinds[label], kinds[label] * 3]), plain.grid, plain.frames, plain.tap, "m")
    colours = self_similarity_pca(d)
    assert colours.shape == (2, 3, 3, 4)
    assert bool(((colours >= 0) & (colours <= 1)).all())
    cells = colours[0].flatten(1).T
    apart = (cells[:, None] - cells).norm(dim=2)
    assert float(apart[label[:, None] == label].max()) < 1e-4
    assert float(apart[label[:, None] != label].min()) > 0.3
    torch.testing.assert_close(colours[0], colours[1])  # cosine similarity does not see lengths; images stand alone
    with pytest.raises(vf.ShapeError, match="at least 3 tokens"):
        self_similarity_pca(random_descriptor(0, rows=1, cols=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps of at least 0"),
        ({"lr": -0.1}, "lr of at least 0"),
        ({"lr": math.nan}, "lr of at least 0"),
        ({"starts": 0}, "starts of at least 1"),
        ({"overlap": 0}, "overlap of at least 1"),
        ({"smooth": -1}, "smooth of at least 0"),
        ({"schedule": "linear"}, "schedule 'constant' or 'cosine', got 'linear'"),
        ({"noise": ((0.5, 1.0), (0.1, 1.0))}, "expected noise as pairs .* shares in order"),
        ({"noise": ((0.0, -1.0),)}, "expected noise as pairs"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(vf.ConfigError, match=message):
        InvertConfig(**changes)


def test_what_invert_refuses(tiny, photo):
    with pytest.raises(vf.ConfigError, match="a preset, got 'slow'"):
        InvertConfig.preset("slow")
    with pytest.raises(vf.ConfigError, match="steps of at least 0.*got -1"):
        invert(photo, "key@1", model=tiny, steps=-1)
    with pytest.raises(vf.ConfigError, match="device= and dtype= with a model's name, got them with an extractor"):
        invert(photo, "key@1", model=tiny, device="cpu")
    with pytest.raises(vf.ConfigError, match="an overlap that divides the patch of 16 pixels, got 3"):
        invert(photo, "key@1", model="mini", device="cpu", config=InvertConfig(overlap=3))
    with pytest.raises(vf.ShapeError, match=r"sides above 32 pixels for 5 scales, got 32×48; raise size="):
        invert(photo, "key@1", model=tiny)
    with pytest.raises(vf.ShapeError, match="sides above 32 pixels for 2 scales"):
        invert(photo, "key@1", model=tiny, config=InvertConfig(channels=(8, 8), kernels=(3, 17)))
    with pytest.raises(vf.UnknownFacetError, match="'kye'"):
        invert(photo, "kye@1", model=tiny)
    with pytest.raises(vf.TapError, match="from 0 to 2"):
        invert(photo, "key@3", model=tiny)
    with pytest.raises(vf.ImageError, match="none at 'nowhere.png'"):
        invert("nowhere.png", "key@1", model=tiny)
    through_nothing = vf.load_extractor(families.build("timm-deit"), size=32)
    through_nothing.__class__ = type("Stuck", (type(tiny),), {"differentiable": property(lambda self: False)})
    with pytest.raises(vf.ConfigError, match="an extractor that gradients pass through, got Stuck"):
        invert(photo, "key@1", model=through_nothing)
