"""Self-distillation: a step against its formula, runs that are resumed, collapse, and what is refused."""

import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from killing import kill_now_and_then
from PIL import Image
from synthetic import as_users_run
from torch import Tensor

import vitfeats as vf
from vitfeats.apps.pretrain import Collection, Pretrainer, pretrain
from vitfeats.apps.pretrain import run as run_module
from vitfeats.apps.pretrain import trainer as module
from vitfeats.apps.pretrain.crops import Batch, middle_crops
from vitfeats.configs import PretrainConfig, read_config, write_config
from vitfeats.errors import ConfigError, ImageError, UnknownModelError, WeightsUnavailableError
from vitfeats.nets.encoding import encode
from vitfeats.pictures import open_pictures

TINY = PretrainConfig(
    model="test_vit",
    size=32,
    local_size=16,
    local_crops=1,
    prototypes=12,
    hidden=16,
    bottleneck=8,
    mask_probability=0.8,
    mask_share=(0.25, 0.75),
    steps=5,
    batch=4,
    warmup=2,
    freeze_prototypes=1,
    neighbours=3,
    patience=1000,
    places=1.0,
    validate_every=0,
    checkpoint_every=2,
)
ALL = replace(TINY, labels=0.5)
LOSSES = ("views", "masked", "places", "labels")


def photos() -> dict[str, np.ndarray]:
    """Return 12 smooth pictures of different sizes in three folders, one of them smaller than a crop."""
    source = np.random.default_rng(0)
    made = {}
    for number in range(12):
        coarse = source.integers(0, 256, (3, 4 if number % 2 else 5, 3))
        scale = 6 if number == 7 else 14
        picture = np.kron(coarse, np.ones((scale, scale, 1))).astype(np.uint8)
        made[f"{('cats', 'dogs', 'owls')[number % 3]}/{number}.png"] = picture
    return made


@pytest.fixture(scope="module")
def pictures() -> Collection:
    return Collection.of(photos())


def weights(trainer: Pretrainer) -> list[Tensor]:
    return [
        value.detach().clone()
        for part in (trainer.student, trainer.teacher, *trainer._centres)
        for value in part.state_dict().values()
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def taken(trainer: Pretrainer, steps: int) -> list[dict[str, float]]:
    return [trainer.step() for _ in range(steps)]


# Pictures and classes -------------------------------------------------------------------------------------------------


def test_folders_are_classes():
    made = Collection.of(photos())
    assert made.classes == ("cats", "dogs", "owls")
    assert made.labels.tolist() == [number % 3 for number in range(12)]
    assert len(made.pictures) == 12
    fewer = Collection.of(photos(), unlabelled=("dogs",))
    assert fewer.classes == ("cats", "owls")
    assert fewer.labels.tolist() == [(0, -1, 1)[number % 3] for number in range(12)]


def test_one_folder_or_none_is_no_class():
    for names in (("a.png", "b.png"), ("all/a.png", "all/b.png"), ("cats/a.png", "b.png")):
        made = Collection.of(dict.fromkeys(names, np.zeros((4, 4, 3), np.uint8)))
        assert made.classes == ()
        assert made.labels.tolist() == [-1, -1]


def test_a_second_collection_takes_the_classes_of_the_first():
    black = np.zeros((4, 4, 3), np.uint8)
    second = Collection.of({"owls/a.png": black, "rest/b.png": black}, classes=("cats", "owls"))
    assert second.classes == ("cats", "owls")
    assert second.labels.tolist() == [1, -1]


# A step ---------------------------------------------------------------------------------------------------------------


def _entropies(wanted: Tensor, answers: Tensor) -> Tensor:
    """Return cross-entropies at the student's temperature, in double precision."""
    logits = answers.double() / 0.1
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    return -(wanted.double() * logs).sum(-1)


def _sharp(answers: Tensor, centre: Tensor) -> Tensor:
    powers = ((answers.double() - centre.double()) / 0.05).exp()
    return powers / powers.sum(-1, keepdim=True)


@torch.no_grad()
def test_a_step_is_the_published_formulas(pictures, monkeypatch):
    config = replace(ALL, drop_path=0.0, local_crops=2, teacher_temperature=(0.05, 0.05), centre_momentum=0.7)
    config = replace(config, places_temperature=0.2)
    trainer = Pretrainer(pictures, config)
    trainer.step()  # so that student, teacher and centres differ from each other and from nothing
    crops, masks = [], []
    draw, mask = module.draw_crops, module.block_masks
    monkeypatch.setattr(module, "draw_crops", lambda *a, **k: crops.append(draw(*a, **k)) or crops[-1])
    monkeypatch.setattr(module, "block_masks", lambda *a, **k: masks.append(mask(*a, **k)) or masks[-1])
    student, teacher, chosen = trainer.student, trainer.teacher, trainer._chosen()
    before = [centre.mean.clone() for centre in trainer._centres]

    def told(pupil, images: Tensor, hidden: Tensor | None = None) -> tuple[Any, Tensor, Tensor]:
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        found = encode(pupil.network, (images - mean) / std, hidden=hidden, mask=pupil.mask)
        return found, pupil.head(found.summary), pupil.head(found.patches)

    # The student changes at the step, so what it says is worked out on a copy of its weights.
    kept = Pretrainer(pictures, config)
    kept.student.load_state_dict(student.state_dict())
    kept.teacher.load_state_dict(teacher.state_dict())
    found = trainer.step()
    assert [len(one.images) for one in crops] == [4] * 4
    assert [one.images.shape[-1] for one in crops] == [32, 32, 16, 16]
    (hidden,) = masks
    hidden = hidden.unflatten(0, (2, 4))
    assert bool(hidden.any())
    said = [told(kept.student, crops[n].images, hidden[n]) for n in range(2)]
    small = [told(kept.student, crops[n].images) for n in (2, 3)]
    wanted = [told(kept.teacher, crops[n].images) for n in range(2)]

    views = [
        _entropies(_sharp(wanted[a][1], before[0]), (said + small)[b][1]).mean()
        for a in range(2)
        for b in range(4)
        if a != b
    ]
    assert found["views"] == pytest.approx(float(torch.stack(views).mean()), rel=1e-4)

    shares = []
    for crop in range(2):
        for image in range(4):
            if hidden[crop, image].any():
                each = _entropies(_sharp(wanted[crop][2][image], before[1]), said[crop][2][image])
                shares.append(each[hidden[crop, image]].mean())
    assert found["masked"] == pytest.approx(float(torch.stack(shares).mean()), rel=1e-4)

    answers = torch.cat([kept.student.classifier(one[0].summary) for one in said]).double()
    labels = pictures.labels[chosen].repeat(2)
    soft = torch.full((8, 3), 0.1 / 3).double()
    soft[range(8), labels] += 0.9
    assert found["labels"] == pytest.approx(float(-(soft * answers.log_softmax(1)).sum(1).mean()), rel=1e-4)

    places = []
    for here, there in ((0, 1), (1, 0)):
        where, inside = crops[here].place_in(crops[there], 2)
        each = []
        for image in range(4):
            targets, looking = [], []
            for patch in inside[image].nonzero()[:, 0].tolist():
                x, y = ((where[image, patch].double() + 1) - 0.5).tolist()  # from token to token is 1
                target, tokens = 0, wanted[there][0].patches[image].double()
                for row, down in ((0, 1 - y), (1, y)):
                    for col, across in ((0, 1 - x), (1, x)):
                        target = target + down * across * tokens[2 * row + col]
                targets.append(target / target.norm())
                looking.append(said[here][0].patches[image, patch].double())
            if targets:
                powers = torch.stack([torch.stack([(p / p.norm() @ t / 0.2).exp() for t in targets]) for p in looking])
                each.append(-(powers.diagonal() / powers.sum(1)).log().mean())
        places.append(torch.stack(each).mean() if each else torch.zeros((), dtype=torch.float64))
    assert found["places"] == pytest.approx(float(torch.stack(places).mean()), rel=1e-3)
    assert any(float(place) > 0 for place in places)

    total = found["views"] + found["masked"] + found["places"] + 0.5 * found["labels"]
    assert found["loss"] == pytest.approx(total, rel=1e-5)
    for number, centre in enumerate(trainer._centres):
        mean = torch.cat([one[1 + number].flatten(0, -2) for one in wanted]).mean(0)
        torch.testing.assert_close(centre.mean, 0.7 * before[number] + 0.3 * mean, atol=1e-5, rtol=1e-4)


def test_the_teacher_follows_by_the_momentum_of_the_step(pictures):
    trainer = Pretrainer(pictures, replace(TINY, momentum=0.8, steps=3))
    for momentum in (0.8, 1 - 0.2 * 0.75, 1 - 0.2 * 0.25):  # half a cosine up to 1
        before = [value.clone() for value in trainer.teacher.parameters()]
        trainer.step()
        for old, new, fresh in zip(before, trainer.teacher.parameters(), trainer.student.parameters(), strict=True):
            torch.testing.assert_close(new, momentum * old + (1 - momentum) * fresh.detach(), atol=1e-6, rtol=1e-5)
            assert not new.requires_grad


def test_the_teacher_skips_no_block(pictures):
    trainer = Pretrainer(pictures, replace(TINY, drop_path=0.9))
    trainer.step()
    assert trainer.student.training
    assert not any(part.training for part in trainer.teacher.modules())
    assert any(getattr(part, "drop_prob", 0) > 0.8 for part in trainer.student.modules())


def test_rates_rise_and_fall(pictures):
    trainer = Pretrainer(pictures, replace(TINY, lr=0.01, warmup=4, steps=8, weight_decay=(0.1, 0.3)))
    for done, rising in ((0, 1 / 4), (2, 3 / 4), (3, 1), (6, 1)):
        trainer.done = done
        trainer._set_rates()
        falling = 0.5 * (1 + math.cos(math.pi * done / 8))
        decays, free = trainer._optimiser.param_groups
        assert decays["lr"] == free["lr"] == pytest.approx(0.01 * rising * falling)
        assert decays["weight_decay"] == pytest.approx(0.3 - 0.2 * falling)
        assert free["weight_decay"] == 0
        assert trainer._temperature == pytest.approx(0.04 + 0.02 * min(1, done / 4))


@pytest.mark.parametrize("model", ["test_vit", "test_vit2"])
def test_each_weight_is_optimised_once_and_single_tokens_do_not_decay(model, pictures):
    trainer = Pretrainer(pictures, replace(ALL, model=model))
    decays, free = (group["params"] for group in trainer._optimiser.param_groups)
    names = {id(value): name for name, value in trainer.student.named_parameters()}
    assert sorted(names[id(value)] for value in decays + free) == sorted(names.values())
    fixed = {names[id(value)] for value in free}
    assert {"mask", "network.pos_embed", "network.patch_embed.proj.bias", "classifier.bias"} < fixed
    assert ("network.cls_token" if model == "test_vit" else "network.reg_token") in fixed
    assert {"head.prototypes", "network.patch_embed.proj.weight", "classifier.weight"} <= set(names.values()) - fixed
    assert all(name.endswith(("weight", "prototypes")) for name in set(names.values()) - fixed)


def test_prototypes_are_frozen_for_so_many_steps(pictures):
    trainer = Pretrainer(pictures, replace(TINY, freeze_prototypes=2))
    before, layer = trainer.student.head.prototypes.detach().clone(), trainer.student.head.layers[0].weight
    first = layer.detach().clone()
    taken(trainer, 2)
    assert torch.equal(trainer.student.head.prototypes, before)
    assert not torch.equal(layer, first)
    trainer.step()
    assert not torch.equal(trainer.student.head.prototypes, before)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_of_nothing_leaves_its_term_out(name, pictures):
    found = Pretrainer(pictures, replace(ALL, **{name: 0.0})).step()
    assert {key for key in found if key in LOSSES} == set(LOSSES) - {name}
    assert found["loss"] == pytest.approx(sum(getattr(ALL, key) * found[key] for key in LOSSES if key != name))
    assert found["entropy"] < found["spread"]  # of patches, where nothing is asked of pictures


def test_labels_alone_ask_the_teacher_nothing(pictures):
    found = Pretrainer(pictures, replace(ALL, views=0.0, masked=0.0, places=0.0)).step()
    assert set(found) == {"loss", "labels"}


@pytest.mark.parametrize("name", LOSSES)
def test_each_term_trains_alone(name, pictures):
    trainer = Pretrainer(pictures, replace(TINY, **{key: float(key == name) for key in LOSSES}))
    before = trainer.student.network.blocks[0].attn.qkv.weight.detach().clone()
    found = taken(trainer, 2)[-1]
    assert found["loss"] == pytest.approx(found[name])
    assert not torch.equal(trainer.student.network.blocks[0].attn.qkv.weight, before)


def test_no_small_crops_are_no_error(pictures):
    assert math.isfinite(Pretrainer(pictures, replace(TINY, local_crops=0)).step()["loss"])


def test_pictures_without_a_class_have_no_loss_of_labels():
    made = Collection.of(photos())
    unknown = Collection(made.pictures, torch.full((12,), -1), made.classes)
    assert Pretrainer(unknown, ALL).step()["labels"] == 0


def test_a_picture_that_turns_out_to_be_damaged_is_named_and_left_out(tmp_path):
    """Where pictures do not fit into memory, only the first bytes of each have been looked at before."""
    for name, picture in photos().items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    whole = (tmp_path / "dogs" / "4.png").read_bytes()
    (tmp_path / "dogs" / "4.png").write_bytes(whole[:-60])
    with as_users_run():  # a type check would read a picture at random
        found = Collection.of(open_pictures(tmp_path, side=32, most=0))
    trainer = Pretrainer(found, replace(ALL, batch=12), held_out=found)
    with pytest.warns(RuntimeWarning, match="left out: 'dogs/4.png' of"):
        losses = trainer.step()
    assert math.isfinite(losses["loss"])
    with pytest.warns(RuntimeWarning, match="left out: 'dogs/4.png' of"):
        assert 0 <= trainer.judged()["knn"] <= 1
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(whole[:-60])
    before = weights(trainer)
    with pytest.warns(RuntimeWarning), pytest.raises(ImageError, match=r"\.png"):
        trainer.step()
    assert same(before, weights(trainer))


def test_how_much_crops_are_changed_is_a_setting(pictures, monkeypatch):
    drawn, draw = [], module.draw_crops
    monkeypatch.setattr(module, "draw_crops", lambda *a, **k: drawn.append(k) or draw(*a, **k))
    Pretrainer(pictures, TINY).step()
    assert [(k["colour"], k["blur"], k["solarise"]) for k in drawn] == [
        (1.0, 1.0, 0.0),
        (1.0, 0.1, 0.2),
        (1.0, 0.5, 0.0),
    ]
    drawn.clear()
    Pretrainer(pictures, replace(TINY, colour=0.5, blur=0.0, flip=0.25, turn=7.0)).step()
    assert [(k["colour"], k["blur"], k["solarise"]) for k in drawn] == [
        (0.5, 0.0, 0.0),
        (0.5, 0.0, 0.1),
        (0.5, 0.0, 0.0),
    ]
    assert all((k["flip"], k["turn"]) == (0.25, 7.0) for k in drawn)


def test_each_picture_is_seen_once_an_epoch(pictures):
    trainer = Pretrainer(pictures, replace(TINY, batch=5))
    seen = []
    for done in range(12):
        trainer.done = done
        seen += trainer._chosen()
    epochs = [seen[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    trainer = Pretrainer(pictures, replace(TINY, batch=5, accumulate=6))  # a step is more than two epochs
    assert trainer._chosen() == seen[:30]


def test_an_accumulated_step_sees_the_same_pictures_and_has_the_mean_of_their_gradients(pictures, monkeypatch):
    """Crops and centres are those of each batch, so more cannot be the same."""

    def losses(self: Pretrainer, chosen: list[int], rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, float]]:
        share = sum(chosen) / len(chosen)
        return {"views": share * self.student.mask.sum()}, {"entropy": share}

    monkeypatch.setattr(Pretrainer, "_losses", losses)
    gradients, entropies = [], []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = Pretrainer(pictures, replace(TINY, batch=batch, accumulate=accumulate, clip=0.0))
        entropies.append(trainer.step().pop("entropy", math.nan))
        gradients.append(trainer.student.mask.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])
    assert entropies == pytest.approx([entropies[0]] * 3)
    assert float(gradients[0][0]) == pytest.approx(entropies[0])


def test_a_gradient_is_clipped_to_its_norm(pictures, monkeypatch):
    monkeypatch.setattr(Pretrainer, "_losses", lambda self, c, r: ({"views": 100 * self.student.mask.sum()}, {}))
    for clip, norm in ((0.5, 0.5), (0.0, 800.0)):
        trainer = Pretrainer(pictures, replace(TINY, clip=clip))
        trainer.step()
        assert float(trainer.student.mask.grad.norm()) == pytest.approx(norm, rel=1e-3)


def test_half_precision_is_near_single(pictures):
    half, single = (Pretrainer(pictures, replace(ALL, precision=name)) for name in ("bfloat16", "float32"))
    found, wanted = half.step(), single.step()
    assert found != wanted
    for name in ("loss", *LOSSES):
        assert found[name] == pytest.approx(wanted[name], rel=0.1), name
    assert all(value.dtype == torch.float32 for value in weights(half) if value.is_floating_point())
    assert Pretrainer(pictures, ALL).step() == wanted  # "auto" on a CPU


# Chance ---------------------------------------------------------------------------------------------------------------


def test_a_seed_is_all_that_chance_hangs_on(pictures):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (Pretrainer(pictures, ALL, seed=seed) for seed in (0, 0, 1))
    assert taken(a, 2) == taken(b, 2) != taken(c, 2)
    assert same(weights(a), weights(b))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trainer_that_goes_on_from_a_state_is_the_one_that_never_stopped(pictures, tmp_path):
    config = replace(ALL, drop_path=0.5, batch=2, accumulate=2)
    whole = Pretrainer(pictures, config, seed=3)
    taken(whole, 2)
    state = whole.state_dict()
    torch.save(state, tmp_path / "state.pt")
    wanted = taken(whole, 3)
    for kept in (state, torch.load(tmp_path / "state.pt", weights_only=True), state):  # twice: nothing changes it
        torch.rand(7)  # what others draw is nothing to it
        resumed = Pretrainer(pictures, config, seed=3)
        resumed.load_state_dict(kept)
        assert resumed.done == 2
        assert taken(resumed, 3) == wanted
        assert same(weights(resumed), weights(whole))


def test_a_run_that_is_resumed_is_the_run_that_was_never_stopped(pictures, tmp_path, monkeypatch):
    whole = pretrain(pictures, config=ALL, seed=3)
    assert whole.stopped == "done"
    assert [record["step"] for record in whole.history] == [0, 1, 2, 3, 4]
    step, out = Pretrainer.step, tmp_path / "run"

    def broken(self: Pretrainer) -> dict[str, float]:
        if self.done == 3:
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(Pretrainer, "step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        pretrain(pictures, config=ALL, seed=3, out=out)
    monkeypatch.setattr(Pretrainer, "step", step)
    changed = replace(ALL, checkpoint_every=0)  # which changes nothing
    resumed = pretrain(pictures, config=changed, seed=3, out=out, resume=True)
    assert resumed.stopped == "done"
    assert resumed.history == whole.history
    assert same(list(resumed.network.state_dict().values()), list(whole.network.state_dict().values()))
    assert [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()] == whole.history


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(tmp_path):
    for name, picture in photos().items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "pictures" / name)
    (tmp_path / "settings.yaml").write_text(write_config(replace(ALL, steps=60, drop_path=0.2)))

    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same bits come from as many threads

    def start(name: str) -> subprocess.Popen:
        files = ("--data", "pictures", "--config", "settings.yaml", "--out", name)
        code = "from vitfeats.cli import main; main()"
        command = [sys.executable, "-c", code, "pretrain", *files, "--seed", "5", "--device", "cpu", "--resume"]
        return subprocess.Popen(command, cwd=tmp_path, env=alone, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    kill_now_and_then(lambda: start("killed"), tmp_path / "killed" / "history.jsonl", most=50, times=3, seed=1)
    assert start("killed").wait() == 0
    for name in ("history.jsonl", "config.yaml", "curves.png", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_leaves_a_model_curves_and_its_settings(pictures, tmp_path):
    held_out = Collection.of(photos(), classes=pictures.classes)
    config = replace(TINY, steps=4, validate_every=2)
    result = pretrain(pictures, config=config, held_out=held_out, out=tmp_path)
    assert ["knn" in record for record in result.history] == [False, True, False, True]
    assert all(0 <= record["knn"] <= 1 for record in result.history if "knn" in record)
    assert not result.network.training
    assert not any(value.requires_grad for value in result.network.parameters())
    assert (tmp_path / "curves.png").is_file()
    assert read_config(tmp_path / "config.yaml", PretrainConfig) == config
    image = torch.rand(3, 32, 32)
    read = vf.load_extractor(tmp_path / "model", device="cpu")
    assert torch.equal(read(image, "cls@-1").features, result.extractor()(image, "cls@-1").features)
    assert result.save(tmp_path / "copy") == tmp_path / "copy"
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_measuring_changes_nothing(pictures):
    held_out = Collection.of(photos(), classes=pictures.classes)
    often = pretrain(pictures, config=replace(TINY, validate_every=1), held_out=held_out)
    never = pretrain(pictures, config=TINY)
    assert [record.pop("knn") for record in often.history]
    assert often.history == never.history
    assert same(list(often.network.state_dict().values()), list(never.network.state_dict().values()))


def test_neighbours_are_those_of_the_teachers_summaries(pictures, monkeypatch):
    held_out = Collection.of(photos(), classes=pictures.classes)
    trainer = Pretrainer(pictures, replace(TINY, neighbours=1), held_out=held_out)
    assert trainer.judged() == {"knn": 1.0}  # each is its own neighbour
    found = trainer.summaries(pictures.pictures[:3])
    crops = middle_crops(Batch.of(pictures.pictures[:3], torch.device("cpu")), 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(found, trainer.teacher.network.forward_features((crops - mean) / std)[:, 0].detach())
    counts = []
    monkeypatch.setattr(trainer, "summaries", lambda some: counts.append(len(some)) or torch.rand(len(some), 4))
    monkeypatch.setattr(module, "_JUDGED", 5)
    trainer.judged()
    assert sorted(counts) == [4, 12]  # at most 5 of those learned from, evenly apart


def test_the_teachers_classifier_is_judged(pictures):
    held_out = Collection.of(photos(), classes=pictures.classes)
    trainer = Pretrainer(pictures, ALL, held_out=held_out)
    taken(trainer, 2)
    answers = trainer.teacher.classifier(trainer.summaries(pictures.pictures)).argmax(1)
    assert trainer.judged()["top1"] == sum(a == b for a, b in zip(answers, pictures.labels, strict=True)) / 12


def test_without_classes_nothing_is_measured(pictures):
    nameless = Collection.of({name.replace("/", "-"): picture for name, picture in photos().items()})
    unknown = Collection(pictures.pictures, torch.full((12,), -1), pictures.classes)
    assert Pretrainer(pictures, TINY).judged() == {}
    assert Pretrainer(nameless, TINY, held_out=nameless).judged() == {}
    assert Pretrainer(pictures, TINY, held_out=unknown).judged() == {}
    assert Pretrainer(unknown, TINY, held_out=pictures).judged() == {}


def clock(monkeypatch, seconds: float, fail_at: int = 0) -> None:
    """Let a step take so many seconds; Ctrl-C comes at one of them."""

    def ticks() -> Iterator[float]:
        number = 0
        while True:
            number += 1
            if number == fail_at:
                raise KeyboardInterrupt
            yield number * seconds

    source = ticks()
    monkeypatch.setattr(run_module, "time", types.SimpleNamespace(monotonic=lambda: next(source)))


def test_minutes_become_steps_once(pictures, tmp_path, monkeypatch):
    quick = replace(TINY, minutes=23 / 60, local_crops=0, batch=2, checkpoint_every=0)
    clock(monkeypatch, seconds=1.0, fail_at=22)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 22 steps; resume it"):
        pretrain(pictures, config=quick, out=tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["steps"] == 23
    clock(monkeypatch, seconds=0.001)  # a faster machine does not change the schedule
    result = pretrain(pictures, config=quick, out=tmp_path, resume=True)
    assert result.stopped == "done"
    assert [record["step"] for record in result.history] == list(range(23))


def test_minutes_that_are_over_end_the_run_where_it_is(pictures, monkeypatch):
    clock(monkeypatch, seconds=10.0)
    result = pretrain(pictures, config=replace(TINY, minutes=0.1, local_crops=0, batch=2))
    assert len(result.history) == 20
    assert result.stopped == "done"


def test_the_first_steps_are_no_measure_of_time():
    assert run_module._steps_in(1.0, [100.0 * n for n in range(5)] + [1000.0 + n for n in range(15)]) == 60
    assert run_module._steps_in(0.01, [float(n) for n in range(20)]) == 20


def test_a_collapse_ends_the_run(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "information", lambda distributions: (1.5, 1.51))
    config = replace(TINY, warmup=1, patience=2, steps=9)
    message = (
        "the run stopped: expected a teacher that tells pictures apart, but for 2 steps its answers have been the same "
        r"for all of them \(entropy 1.500, of their mean 1.510, largest possible 2.485\): the training has collapsed"
    )
    with pytest.warns(RuntimeWarning, match=message):
        result = pretrain(pictures, config=config, out=tmp_path)
    assert result.stopped == "collapsed"
    assert len(result.history) == 3  # not in the warmup
    assert (tmp_path / "model" / "config.json").is_file()


def test_information_that_comes_back_is_no_collapse(pictures, monkeypatch):
    said = iter([(1.0, 1.0), (1.0, 1.5), (1.0, 1.0), (1.0, 1.0), (1.0, 1.5)])
    monkeypatch.setattr(module, "information", lambda distributions: next(said))
    assert pretrain(pictures, config=replace(TINY, warmup=0, patience=3)).stopped == "done"


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (lambda loss: loss * math.nan, "expected a finite loss at step 2, got nan"),
        (lambda loss: (loss * 0).sqrt(), "expected finite gradients at step 2, got a norm of nan"),
    ],
)
def test_what_is_not_finite_ends_the_run_with_the_weights_before(factor, message, pictures, tmp_path, monkeypatch):
    loss, calls = module.views_loss, []
    good = pretrain(pictures, config=replace(TINY, lr=0.0, steps=2))

    def broken(*args: Tensor) -> Tensor:
        calls.append(0)
        return factor(loss(*args)) if len(calls) == 3 else loss(*args)

    monkeypatch.setattr(module, "views_loss", broken)
    with pytest.warns(RuntimeWarning, match=f"the run stopped: {message}"):
        result = pretrain(pictures, config=replace(TINY, lr=0.0), out=tmp_path)
    assert result.stopped == "not finite"
    assert len(result.history) == 2
    assert same(list(result.network.state_dict().values()), list(good.network.state_dict().values()))


# What is refused ------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused(pictures, tmp_path):
    pretrain(pictures, config=replace(TINY, steps=1), out=tmp_path)
    with pytest.raises(ConfigError, match="these differ: lr: 0.0005 there, 0.01 here"):
        pretrain(pictures, config=replace(TINY, steps=1, lr=0.01), out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="these differ: seed: 0 there, 4 here"):
        pretrain(pictures, config=replace(TINY, steps=1), out=tmp_path, resume=True, seed=4)
    fewer = Collection(pictures.pictures[:8], pictures.labels[:8], pictures.classes)
    with pytest.raises(ConfigError, match="these differ: pictures: 12 there, 8 here"):
        pretrain(fewer, config=replace(TINY, steps=1), out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="expected a folder without a run"):
        pretrain(pictures, config=replace(TINY, steps=1), out=tmp_path)
    with pytest.raises(ConfigError, match=r"expected the state of a pretraining \(vitfeats.pretrain/1\), got 'other'"):
        Pretrainer(pictures, TINY).load_state_dict({"format": "other"})


def test_pictures_that_do_not_suffice_are_refused(pictures):
    one = Collection(pictures.pictures[:1], pictures.labels[:1], pictures.classes)
    with pytest.raises(ConfigError, match="expected pictures to learn from, at least 2, got 1"):
        Pretrainer(one, TINY)
    nameless = Collection(pictures.pictures, torch.full((12,), -1))
    with pytest.raises(ConfigError, match="expected pictures in folders of classes, for labels above 0, got none"):
        Pretrainer(nameless, ALL)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"size": 40}, ConfigError, "expected size as a multiple of the patch of test_vit, 16, got 40"),
        ({"local_size": 24}, ConfigError, "expected local_size as a multiple of the patch of test_vit, 16, got 24"),
        ({"model": "resnet18"}, ConfigError, "expected a vision transformer of timm to train, got 'resnet18'"),
        ({"model": "vit_tinny"}, UnknownModelError, "expected a model of timm, got 'vit_tinny'"),
        ({"start": "none"}, WeightsUnavailableError, "expected a file of weights or the name of a bundled model"),
    ],
)
def test_settings_that_no_model_fits_are_refused(changes, error, message, pictures):
    with pytest.raises(error, match=message):
        Pretrainer(pictures, replace(TINY, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "expected size of at least 1, got 0"),
        ({"batch": 0}, "expected batch of at least 1, got 0"),
        ({"accumulate": 0}, "expected accumulate of at least 1, got 0"),
        ({"prototypes": 0}, "expected prototypes of at least 1, got 0"),
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"patience": 0}, "expected patience of at least 1, got 0"),
        ({"neighbours": 0}, "expected neighbours of at least 1, got 0"),
        ({"local_crops": -1}, "expected local_crops of at least 0, got -1"),
        ({"views": -1.0}, "expected views of at least 0, got -1.0"),
        ({"lr": math.nan}, "expected lr of at least 0, got nan"),
        ({"minutes": -1.0}, "expected minutes of at least 0, got -1.0"),
        ({"clip": -1.0}, "expected clip of at least 0, got -1.0"),
        ({"turn": -1.0}, "expected turn of at least 0, got -1.0"),
        ({"momentum": 1.1}, "expected momentum of at least 0 and at most 1, got 1.1"),
        ({"centre_momentum": -0.1}, "expected centre_momentum of at least 0 and at most 1, got -0.1"),
        ({"flip": 2.0}, "expected flip of at least 0 and at most 1, got 2.0"),
        ({"mask_probability": 2.0}, "expected mask_probability of at least 0 and at most 1, got 2.0"),
        ({"drop_path": 1.5}, "expected drop_path of at least 0 and at most 1, got 1.5"),
        ({"precision": "float16"}, "expected precision 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ({"global_scale": (0.5, 0.2)}, r"expected global_scale as two shares in 0..1, in order, got \(0.5, 0.2\)"),
        ({"local_scale": (0.0, 0.2)}, r"expected local_scale as two shares in 0..1, in order, got \(0.0, 0.2\)"),
        ({"mask_share": (0.1, 1.2)}, r"expected mask_share as two shares in 0..1, in order, got \(0.1, 1.2\)"),
        ({"student_temperature": 0.0}, "expected temperatures above 0; try 0.1 for the student"),
        ({"teacher_temperature": (0.04, -0.1)}, "expected temperatures above 0"),
        ({"views": 0.0, "masked": 0.0, "places": 0.0}, "expected a loss with a weight above 0, got none; try views=1"),
        ({"side": 31}, "expected a side of at least the large crops' 32, got 31"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_numbers_that_no_run_could_use_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


def test_settings_come_back_from_yaml(tmp_path):
    config = replace(ALL, unlabelled=("rest", "more"))
    (tmp_path / "settings.yaml").write_text(write_config(config))
    assert read_config(tmp_path / "settings.yaml", PretrainConfig) == config
