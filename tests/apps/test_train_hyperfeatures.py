"""Training of hyperfeatures: a step against the written-out formula, runs that are resumed, the cache."""

import math
from collections.abc import Sequence
from dataclasses import replace

import diffusions
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import vitfeats as vf
from vitfeats import plot, runs
from vitfeats.apps.evaluation import Pair, WarpedImages
from vitfeats.apps.train_hyperfeatures import HyperfeatureTrainer, LayerMaps, MapCache, train_hyperfeatures
from vitfeats.apps.train_hyperfeatures import maps as maps_module
from vitfeats.apps.train_hyperfeatures import trainer as trainer_module
from vitfeats.configs import DiffusionConfig, TrainHyperfeaturesConfig, read_config, write_config
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
from vitfeats.nets.aggregation import AggregationNetwork
from vitfeats.runs import RunFolder

CHAIN = DiffusionConfig(mode="inversion", steps=4, keep=2)
ONE_STEP = DiffusionConfig.preset("hyperfeatures-one-step")
SMALL = TrainHyperfeaturesConfig(steps=6, dim=16, groups=2, validate_every=0, checkpoint_every=0)


# Three scales with two residual blocks each on the way up: six layers, of 16, 16 and 8 channels.
UNET = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
    "layers_per_block": 1,
}


def load(diffusion: DiffusionConfig = CHAIN, unet: dict = UNET, **settings) -> DiffusionExtractor:
    """Return an extractor of a tiny model; images of 40 × 48 pixels come to 24 × 28 network pixels, 12 × 14 cells."""
    made = vf.load_extractor(diffusions.ddpm(**unet), size=24, diffusion=diffusion, **settings)
    assert isinstance(made, DiffusionExtractor)
    return made


@pytest.fixture(scope="module")
def chain() -> DiffusionExtractor:
    return load()


@pytest.fixture(scope="module")
def one_step() -> DiffusionExtractor:
    return load(ONE_STEP)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Three pairs, of two sizes."""
    return list(WarpedImages([blobs(1, 40, 48), blobs(2, 48, 40), blobs(3, 40, 48)], seed=1, points=5))


def blobs(seed: int, height: int, width: int) -> Tensor:
    """Return a smooth image whose places can be told apart by colour: (3, height, width)."""
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)[0]


def weights(trainer: HyperfeatureTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.aggregation.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def taken(trainer: HyperfeatureTrainer, steps: int) -> list[dict[str, float]]:
    return [trainer.step() for _ in range(steps)]


# A step ---------------------------------------------------------------------------------------------------------------


def bottleneck(weights: dict[str, Tensor], layer: int, x: Tensor, size: tuple[int, int], groups: int) -> Tensor:
    """The published bottleneck, on a map that is interpolated first."""

    def convolved(name: str, x: Tensor) -> Tensor:
        key = f"bottleneck_layers.{layer}.0.{name}"
        made = F.conv2d(x, weights[f"{key}.weight"], padding=weights[f"{key}.weight"].shape[-1] // 2)
        return F.group_norm(made, groups, weights[f"{key}.norm.weight"], weights[f"{key}.norm.bias"])

    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    deep = convolved("conv3", convolved("conv2", convolved("conv1", x).relu()).relu())
    return (deep + (convolved("shortcut", x) if x.shape[1] != deep.shape[1] else x)).relu()


def written_out(extractor: DiffusionExtractor, weights: dict[str, Tensor], pair: Pair, steps, groups: int) -> Tensor:
    """The loss of a pair in the paper's words; maps are read by the extractor's own public door."""
    names = [f"up{block}.res{number}" for block in range(4) for number in range(3)]
    mixing = weights["mixing_weights"].softmax(0).view(len(steps), len(names))
    cells, indices = [], []
    for image, points in ((pair.image_a, pair.points_a), (pair.image_b, pair.points_b)):
        taps = [f"residual@{name}" + (f"#{s}" if len(steps) > 1 else "") for s in steps for name in names]
        found = extractor(image, taps)
        height, width = found[taps[0]].frames[0].network_size
        size = (height // 2, width // 2)
        total = torch.zeros(())
        for number, tap in enumerate(taps):
            step, layer = divmod(number, len(names))
            rounded = found[tap].map.half().float()
            total = total + mixing[step, layer] * bottleneck(weights, layer, rounded, size, groups)
        cells.append(total[0].flatten(1).T)
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]])
        col, row = (points * scale / 2).floor().long().unbind(1)
        indices.append(row * size[1] + col)
    similarity = F.cosine_similarity(cells[0][:, None], cells[1][None], dim=2) / 0.07
    a, b = indices
    forth = -(similarity[a, b] - similarity[a].logsumexp(1)).mean()
    back = -(similarity[a, b] - similarity[:, b].logsumexp(0)).mean()
    return (forth + back) / 2


@pytest.mark.parametrize(("diffusion", "steps"), [(CHAIN, (3, 0)), (ONE_STEP, (0,))])
def test_a_step_is_the_formula_written_out(pairs, diffusion, steps):
    extractor = load(diffusion, {})  # four scales and twelve layers, as published
    config = replace(SMALL, weight_decay=0.5)
    trainer = HyperfeatureTrainer(pairs, extractor, config, seed=4)
    assert trainer.aggregation.steps == steps
    before = {name: value.requires_grad_() for name, value in weights(trainer).items()}
    order = [trainer._place(step) for step in range(6)]
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]
    wanted = written_out(extractor, before, pairs[order[0]], steps, config.groups)
    wanted.backward()
    got = trainer.step()
    assert got["loss"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, value in weights(trainer).items():
        gradient, old = before[name].grad, before[name].detach()
        # The first step of Adam goes by lr in the gradient's direction; the decay is apart from it.
        moved = old * (1 - config.lr * config.weight_decay) - config.lr * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-5
        torch.testing.assert_close(value[clear], moved[clear], rtol=0, atol=2e-6)


def test_one_step_of_a_chain_may_be_kept(pairs):
    extractor = load(DiffusionConfig(mode="inversion", steps=4, keep=1))
    trainer = HyperfeatureTrainer(pairs, extractor, SMALL)
    assert trainer.aggregation.steps == (3,)
    trainer.step()
    made = HyperfeatureExtractor.of(extractor, trainer.trained())(pairs[0].image_a)
    assert made.features.shape == (1, 12 * 14, 16)


def test_an_ensemble_is_read_as_its_mean(pairs):
    extractor = load(DiffusionConfig(mode="noise", time=100, ensemble=3))
    (maps,) = LayerMaps(extractor, (0,))(pairs[0].image_a)
    wanted = extractor(pairs[0].image_a, "residual@up2.res1").map
    torch.testing.assert_close(maps[-1].float(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("as_a_user")
def test_the_loss_falls_and_the_points_are_found(chain, pairs, tmp_path):
    trainer = HyperfeatureTrainer(pairs[:2], chain, replace(SMALL, lr=0.02, validate_every=24), validation=pairs[:2])
    untrained = trainer.judged()
    history = taken(trainer, 24)
    losses = [record["loss"] for record in history]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert [index for index, record in enumerate(history) if "pck" in record] == [23]
    assert history[-1]["pck"] > max(0.5, untrained + 0.2)


@pytest.mark.usefixtures("as_a_user")
def test_pck_is_that_of_points_carried_by_the_extractor(chain, pairs):
    trainer = HyperfeatureTrainer(pairs, chain, SMALL, validation=pairs)
    reads = HyperfeatureExtractor.of(chain, trainer.trained())
    right = points = 0
    for pair in pairs:
        a, b = reads(pair.image_a), reads(pair.image_b)
        index = a.grid.index_of(a.frames[0].to_network(pair.points_a))
        similarity = F.cosine_similarity(a.features[0][index][:, None], b.features[0][None], dim=2)
        found = b.frames[0].to_source(b.grid.centres_of(similarity.argmax(1)))
        right += int(((found - pair.points_b).norm(dim=1) <= 0.1 * max(pair.image_b.shape[1:])).sum())
        points += len(found)
    # Its maps were not rounded to half precision: a near tie may fall the other way.
    assert trainer.judged() == pytest.approx(right / points, abs=1.5 / points)
    assert math.isnan(HyperfeatureTrainer(pairs, chain, SMALL).judged())


def test_the_diffusion_model_is_left_as_it_was(chain, pairs):
    before = {name: value.clone() for name, value in chain.model.state_dict().items()}
    taken(HyperfeatureTrainer(pairs, chain, SMALL), 1)
    assert same(before, chain.model.state_dict())
    assert all(p.grad is None for p in chain.model.parameters())


@pytest.mark.usefixtures("as_a_user")
def test_a_pair_is_read_when_it_is_used_and_not_before(one_step, pairs):
    asked = []

    class Lazy(Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            asked.append(index)
            return pairs[index]

        def __iter__(self):
            raise AssertionError("listed")

    config = replace(SMALL, validate_every=2)
    trainer = HyperfeatureTrainer(Lazy(), one_step, config, validation=Lazy())
    assert asked == []
    trainer.step()
    assert asked == [trainer._place(0)]
    trainer.step()
    assert asked == [trainer._place(0), trainer._place(1), 0, 1, 2]


def test_a_step_is_the_same_inside_of_other_modes(one_step, pairs):
    plain, within = (HyperfeatureTrainer(pairs, one_step, SMALL) for _ in range(2))
    taken(plain, 2)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        taken(within, 1)
    with torch.no_grad():
        taken(within, 1)
    assert same(weights(plain), weights(within))


def test_no_global_random_number_is_drawn(one_step, pairs):
    before = torch.get_rng_state()
    taken(HyperfeatureTrainer(pairs, one_step, SMALL), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_costs_no_weights(one_step, pairs, monkeypatch):
    trainer = HyperfeatureTrainer(pairs, one_step, SMALL)
    trainer.step()
    kept = weights(trainer)
    trainer.step()  # its weights give the loss below
    monkeypatch.setattr(trainer_module, "contrastive_loss", lambda a, b, *rest, **settings: a.sum() * math.nan)
    with pytest.raises(FloatingPointError, match=r"finite loss and gradient at step 2, pair '\d', got a loss of nan"):
        trainer.step()
    assert trainer.done == 2
    assert same(kept, weights(trainer))


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
def test_a_resumed_run_is_the_run_that_never_stopped(chain, pairs, tmp_path):
    config = replace(SMALL, schedule="cosine", validate_every=2)
    settings = {"model": chain, "config": config, "validation": pairs[:1], "seed": 3}
    whole = train_hyperfeatures(pairs, out=tmp_path / "whole", **settings)
    # As a run that was cut off leaves its folder.
    half = HyperfeatureTrainer(pairs, chain, config, validation=pairs[:1], seed=3)
    folder = RunFolder(tmp_path / "half")
    for step in range(4):
        folder.append({"step": step, **half.step()})
        if step == 2:
            folder.write_checkpoint(half.state_dict())
    resumed = train_hyperfeatures(pairs, out=tmp_path / "half", resume=True, **settings)
    assert same(whole.aggregation.state_dict(), resumed.aggregation.state_dict())
    assert whole.history == resumed.history
    assert [record["step"] for record in whole.history] == list(range(6))
    assert [record["step"] for record in whole.history if "pck" in record] == [1, 3, 5]
    states = [RunFolder(tmp_path / name).read_checkpoint() for name in ("whole", "half")]
    assert same(states[0]["network"], states[1]["network"])
    for a, b in zip(*(state["optimiser"]["state"].values() for state in states), strict=True):
        assert same(a, b)
    assert same(*(dict(enumerate(state["before"])) for state in states))


@pytest.mark.usefixtures("as_a_user")
def test_the_same_seed_gives_the_same_bits_and_another_does_not(one_step, pairs):
    first, again, other = (HyperfeatureTrainer(pairs, one_step, SMALL, seed=seed) for seed in (1, 1, 2))
    assert taken(first, 2) == taken(again, 2) != taken(other, 2)
    assert same(weights(first), weights(again))


@pytest.mark.usefixtures("as_a_user")
def test_what_is_saved_can_be_loaded(chain, pairs, tmp_path):
    made = train_hyperfeatures(pairs, model=chain, config=replace(SMALL, steps=2, cell=4), out=tmp_path)
    assert made.stopped == "done"
    state = torch.load(tmp_path / "aggregation.pt", weights_only=True)
    assert state["config"]["save_timestep"] == [3, 0]
    loaded = HyperfeatureExtractor.of(chain, AggregationNetwork.from_checkpoint(state), cell=4)
    image = pairs[0].image_a
    assert torch.equal(loaded(image).features, made.extractor(image).features)
    assert made.extractor(image).grid.cols == 28 // 4
    assert not any(p.requires_grad for p in made.aggregation.parameters())
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2
    assert read_config(tmp_path / "config.yaml", TrainHyperfeaturesConfig) == made.config
    with Image.open(tmp_path / "mixing.png") as picture:
        assert picture.size == plot.mixing(made.aggregation.mixing, made.aggregation.layers, (3, 0)).size
    assert made.save(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "aggregation.pt"
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == [
        *("aggregation.pt", "config.yaml", "history.jsonl", "mixing.png")
    ]


@pytest.mark.usefixtures("as_a_user")
def test_a_model_is_loaded_by_its_folder_and_read_by_inversion(pairs, tmp_path):
    diffusions.ddpm(**UNET).save_pretrained(tmp_path / "model")
    made = train_hyperfeatures(
        pairs[:1], model=str(tmp_path / "model"), config=replace(SMALL, steps=1), device="cpu", progress=True
    )
    assert made.aggregation.steps == (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)


@pytest.mark.usefixtures("as_a_user")
def test_ctrl_c_ends_a_run_after_a_step(one_step, pairs, tmp_path, ctrl_c, monkeypatch):
    import signal

    plain = HyperfeatureTrainer.step

    def step(self):
        if self.done == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(HyperfeatureTrainer, "step", step)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 2 steps; resume it"):
        train_hyperfeatures(pairs, model=one_step, config=SMALL, out=tmp_path)
    assert (tmp_path / "aggregation.pt").is_file()
    assert RunFolder(tmp_path).read_checkpoint()["step"] == 2


@pytest.mark.usefixtures("as_a_user")
def test_a_result_that_cannot_be_written_is_still_returned(one_step, pairs, tmp_path):
    (tmp_path / "aggregation.pt").mkdir()
    with pytest.warns(RuntimeWarning, match=r"'aggregation.pt' could not be written: expected to write"):
        made = train_hyperfeatures(pairs, model=one_step, config=replace(SMALL, steps=1), out=tmp_path)
    assert len(made.history) == 1
    with pytest.raises(StoreError, match=r"expected to write '.*aggregation\.pt'"):
        made.save(tmp_path)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"config": replace(SMALL, lr=0.5)}, "lr: 0.001 there, 0.5 here"),
        ({"pairs": 2}, "pairs: 3 there, 2 here"),
        ({"extractor": "noise"}, "diffusion: .*'clean'.* there, .*'noise'.* here"),
        ({"extractor": "weights"}, "weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"),
    ],
)
def test_a_state_of_another_run_is_refused(one_step, pairs, other, told):
    state = HyperfeatureTrainer(pairs, one_step, SMALL).state_dict()
    extractor = one_step
    if other.get("extractor") == "noise":
        extractor = load(DiffusionConfig())
    elif other.get("extractor") == "weights":
        extractor = load(ONE_STEP)
        extractor.model.unet.conv_out.bias += 1
    trainer = HyperfeatureTrainer(
        pairs[: other.get("pairs", 3)], extractor, other.get("config", SMALL), seed=other.get("seed", 0)
    )
    with pytest.raises(ConfigError, match=f"expected the settings of the checkpoint, but these differ: {told}"):
        trainer.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"expected the state of a training of hyperfeatures .*, got 'splice'"):
        trainer.load_state_dict({"format": "splice"})
    trainer = HyperfeatureTrainer(pairs, one_step, replace(SMALL, validate_every=7, checkpoint_every=9, cache_gib=0))
    trainer.load_state_dict(state)


def test_the_trainer_is_one(one_step, pairs):
    assert isinstance(HyperfeatureTrainer(pairs, one_step, SMALL), runs.Trainer)


@pytest.mark.usefixtures("as_a_user")
def test_what_a_trainer_refuses(one_step, pairs, mini):
    with pytest.raises(ConfigError, match=r"at least one pair, got none; WarpedImages makes some of any images"):
        HyperfeatureTrainer([], one_step, SMALL)
    with pytest.raises(ConfigError, match=r"expected the extractor of a diffusion model, got ViTExtractor\(mini"):
        train_hyperfeatures(pairs, model=mini, config=SMALL)
    with pytest.raises(ConfigError, match="expected a seed of at least 0, got -1"):
        HyperfeatureTrainer(pairs, one_step, SMALL, seed=-1)
    with pytest.raises(ConfigError, match="expected a cell that divides 4 pixels, got 3"):
        HyperfeatureTrainer(pairs, one_step, replace(SMALL, cell=3))
    with pytest.raises(ConfigError, match=r"expected dim to be a multiple of 4 · groups = 8, got 12"):
        HyperfeatureTrainer(pairs, one_step, replace(SMALL, dim=12))


def test_a_point_outside_is_told_with_its_pair(one_step, pairs):
    bad = Pair(pairs[0].image_a, pairs[0].image_b, [(1, 2)], [(47, 41)], "left and right")
    trainer = HyperfeatureTrainer([bad], one_step, SMALL)
    with pytest.raises(ShapeError, match=r"pair 'left and right': expected points .* inside the image of 48×40 pixels"):
        trainer.step()
    missing = Pair("nowhere.png", pairs[0].image_b, [(1, 2)], [(3, 4)], "gone")
    with pytest.raises(ImageError, match="pair 'gone': expected an image file, but there is none at 'nowhere.png'"):
        HyperfeatureTrainer([missing], one_step, SMALL).step()


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_changes_no_bit(pairs, tmp_path, dtype, monkeypatch):
    extractor = load(dtype=dtype)
    pairs = pairs[:2]
    without = HyperfeatureTrainer(pairs, extractor, SMALL)
    history = taken(without, 4)
    first = HyperfeatureTrainer(pairs, extractor, SMALL, cache=tmp_path)
    assert taken(first, 4) == history
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    monkeypatch.setattr(DiffusionExtractor, "stream", None)  # a pass would fail
    second = HyperfeatureTrainer(pairs, extractor, SMALL, cache=tmp_path)
    assert taken(second, 4) == history
    assert same(weights(without), weights(first))
    assert same(weights(without), weights(second))


@pytest.mark.usefixtures("as_a_user")
def test_the_cache_is_in_the_folder_of_a_run_and_may_be_elsewhere(one_step, pairs, tmp_path):
    config = replace(SMALL, steps=1)
    train_hyperfeatures(pairs, model=one_step, config=config, out=tmp_path / "a")
    assert len(list((tmp_path / "a" / "maps").iterdir())) == 2
    train_hyperfeatures(pairs, model=one_step, config=config, out=tmp_path / "b", cache=tmp_path / "shared")
    train_hyperfeatures(pairs, model=one_step, config=replace(config, cache_gib=0), out=tmp_path / "b2")
    assert len(list((tmp_path / "shared").iterdir())) == 2
    assert not (tmp_path / "b" / "maps").exists()
    assert not (tmp_path / "b2" / "maps").exists()


def test_other_images_models_and_settings_have_other_files(one_step, pairs, tmp_path):
    cache = MapCache(tmp_path, 1)
    other = load(ONE_STEP)
    other.model.unet.up_blocks[0].resnets[0].conv1.weight.mul_(1.01)
    noisy = load(DiffusionConfig())
    readers = [one_step, other, noisy, one_step.resized(size=28)]
    for extractor in readers:
        for image in (pairs[0].image_a, pairs[0].image_a.flip(2)):
            LayerMaps(extractor, (0,), cache)(image)
            LayerMaps(load(ONE_STEP) if extractor is one_step else extractor, (0,), cache)(image)  # again
    assert len(list(tmp_path.iterdir())) == 2 * len(readers)


def test_a_bound_is_kept_and_told_once(one_step, pairs, tmp_path):
    maps = LayerMaps(one_step, (0,), MapCache(tmp_path, 1))
    maps(pairs[0].image_a)
    (file,) = tmp_path.iterdir()
    room = 2.5 * file.stat().st_size
    maps = LayerMaps(one_step, (0,), MapCache(tmp_path, room / 2**30))  # the file that is there counts
    with pytest.warns(RuntimeWarning, match=r"the cache in '.*' is full \(.* GiB\).* raise cache_gib") as told:
        _ = [maps(image) for pair in pairs for image in (pair.image_a, pair.image_b)]
    assert len(told) == 1
    assert len(list(tmp_path.iterdir())) == 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "foreign"])
def test_a_damaged_file_is_made_anew(one_step, pairs, tmp_path, harm):
    image = pairs[0].image_a
    maps = LayerMaps(one_step, (0,), MapCache(tmp_path, 1))
    (wanted,) = maps(image)
    (file,) = tmp_path.iterdir()
    whole, names = file.read_bytes(), [str(tap) for tap in maps.taps[0]]
    if harm == "foreign":
        from safetensors.torch import save

        file.write_bytes(save({"a": torch.zeros(2)}))
    else:
        changes = {"cut": whole[:-100], "emptied": b"", "flipped": whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:]}
        file.write_bytes(changes[harm])
    assert MapCache(tmp_path, 1).read(file.stem, names) is None
    (got,) = maps(image)
    kept = MapCache(tmp_path, 1).read(file.stem, names)
    assert kept is not None
    for index, name in enumerate(names):
        assert torch.equal(got[index], wanted[index])
        assert torch.equal(kept[name], wanted[index])


def test_a_disk_that_fails_costs_a_warning(one_step, pairs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="the maps cannot be kept in '.*file', the run goes on without") as told:
        history = taken(HyperfeatureTrainer(pairs, one_step, SMALL, cache=tmp_path / "file"), 2)
    assert len(told) == 1

    def full(path, data):
        raise StoreError("no space left on device")

    monkeypatch.setattr(maps_module, "write_whole", full)
    with pytest.warns(RuntimeWarning, match="the run goes on without: no space left on device") as told:
        assert taken(HyperfeatureTrainer(pairs, one_step, SMALL, cache=tmp_path / "full"), 2) == history
    assert len(told) == 1


def test_values_beyond_half_precision_stay_whole(one_step, pairs, tmp_path):
    extractor = load(ONE_STEP)
    layer = extractor.model.unet.up_blocks[1].resnets[1].conv2
    layer.weight.mul_(1e7)
    cache = MapCache(tmp_path, 1)
    made = [LayerMaps(extractor, (0,), cache)(pairs[0].image_a)[0] for _ in range(2)]
    assert [each.dtype for each in made[0]] == [torch.float32 if i == 3 else torch.float16 for i in range(6)]
    assert made[0][3].abs().max() > 65504
    assert bool(made[0][3].isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


# The settings --------------------------------------------------------------------------------------------------------


def test_settings_are_the_published_ones():
    config = TrainHyperfeaturesConfig()
    assert (config.steps, config.lr, config.weight_decay, config.temperature) == (5000, 1e-3, 0.0, 0.07)
    assert (config.dim, config.groups, config.schedule, config.cell) == (384, 32, "constant", None)


def test_settings_go_to_yaml_and_back(tmp_path):
    config = TrainHyperfeaturesConfig(steps=7, cell=4, schedule="cosine")
    (tmp_path / "c.yaml").write_text(write_config(config))
    assert read_config(tmp_path / "c.yaml", TrainHyperfeaturesConfig) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"dim": 0}, "expected dim of at least 1, got 0"),
        ({"groups": 0}, "expected groups of at least 1, got 0"),
        ({"cell": 0}, "expected cell of at least 1, got 0"),
        ({"lr": -1}, "expected lr of at least 0, got -1"),
        ({"weight_decay": math.nan}, "expected weight_decay of at least 0, got nan"),
        ({"temperature": 0}, "expected a temperature above 0, got 0"),
        ({"validate_every": -1}, "expected validate_every of at least 0, got -1"),
        ({"checkpoint_every": -1}, "expected checkpoint_every of at least 0, got -1"),
        ({"cache_gib": -1}, "expected cache_gib of at least 0, got -1"),
        ({"schedule": "linear"}, "expected schedule 'constant' or 'cosine', got 'linear'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_settings_out_of_range_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        TrainHyperfeaturesConfig(**change)
