"""The optimiser steps of self-distillation."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.apps.evaluation.neighbours import neighbours_accuracy
from vitfeats.apps.pretrain.collection import Collection
from vitfeats.apps.pretrain.crops import Batch, Crops, draw_crops, middle_crops
from vitfeats.apps.pretrain.objective import (
    Centre,
    at_places,
    block_masks,
    information,
    places_loss,
    tokens_loss,
    views_loss,
)
from vitfeats.card import IMAGENET_MEAN, IMAGENET_STD
from vitfeats.configs import PretrainConfig, plain_config
from vitfeats.errors import ConfigError, ImageError
from vitfeats.models.trainable import new_network, takes_any_size
from vitfeats.nets.encoding import Encoded, encode
from vitfeats.nets.projection import ProjectionHead
from vitfeats.runs import check_same, scheduled
from vitfeats.views import numbered

_FORMAT = "vitfeats.pretrain/1"
_INITIAL, _ORDER, _CROPS, _DROPPED = 0, 1, 2, 3  # what random numbers are for
_JUDGED = 2000  # pictures that neighbours are looked for among
_LEAST = 0.02  # nats: less information in the teacher's answers is none
_FREE = ("validate_every", "checkpoint_every")
_SMOOTHING = 0.1  # of labels


class Pretrainer:
    """Takes the optimiser steps. What a step sees depends on the seed and its number alone.

    Args:
        collection: To learn from.
        config: Settings.
        held_out: To judge by, with the classes of ``collection``.
        seed: Of the first weights, the order, every crop and mask.
        device: Where to train.

    Attributes:
        done: Steps taken.
        steps: Steps in all, which the schedules end at; with ``config.minutes`` it is not known at first.
        student: Is trained.
        teacher: Its running average: what is kept in the end.
        config: The settings.

    Raises:
        ConfigError: If there are fewer than two pictures, or the settings do not fit the model.
    """

    def __init__(
        self,
        collection: Collection,
        config: PretrainConfig | None = None,
        *,
        held_out: Collection | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config = config or PretrainConfig()
        if len(collection.pictures) < 2:
            raise ConfigError(f"expected pictures to learn from, at least 2, got {len(collection.pictures)}")
        if config.labels and not collection.classes:
            raise ConfigError("expected pictures in folders of classes, for labels above 0, got none; set labels=0")
        self.collection, self.held_out = collection, held_out
        self.seed, self.device = seed, torch.device(device)
        self.done = 0
        self.steps = 0 if config.minutes else config.steps
        with _seeded(torch.device("cpu"), seed, _INITIAL):
            self.student = _Pupil(config, len(collection.classes)).to(self.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        # Of what is said of summaries, and of patches.
        self._centres = [Centre(config.prototypes, config.centre_momentum).to(self.device) for _ in range(2)]
        self.grid = config.size // self.student.patch
        self._optimiser = torch.optim.AdamW(_groups(self.student), lr=config.lr, betas=(0.9, 0.999))
        self._silent, self._last = 0, (0.0, 0.0)  # steps without information; entropy of answers and of their mean
        half = config.precision == "bfloat16" or (config.precision == "auto" and self.device.type == "cuda")
        self._autocast = torch.bfloat16 if half else None

    # A step -----------------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """Take one optimiser step; return losses by name, and measurements every ``validate_every`` steps.

        Raises:
            FloatingPointError: If the loss or its gradients are not finite; the weights are those before the step.
        """
        config = self.config
        self._set_rates()
        self.student.train()
        self._optimiser.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        chosen = self._chosen()
        for part in range(config.accumulate):
            rng = numbered(self.seed, _CROPS, self.done, part)
            with torch.enable_grad(), _seeded(self.device, self.seed, _DROPPED, self.done, part):
                losses, facts = self._losses(chosen[part * config.batch : (part + 1) * config.batch], rng)
                total = sum((getattr(config, name) * loss for name, loss in losses.items()), torch.zeros(()))
                if not bool(total.isfinite()):
                    raise FloatingPointError(f"expected a finite loss at step {self.done}, got {float(total.detach())}")
                (total / config.accumulate).backward()
            found = {"loss": total.detach()} | {name: loss.detach() for name, loss in losses.items()}
            for name, value in {**{n: float(v) for n, v in found.items()}, **facts}.items():
                sums[name] = sums.get(name, 0.0) + value / config.accumulate
        if self.done < config.freeze_prototypes:
            self.student.head.prototypes.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), config.clip or math.inf)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"expected finite gradients at step {self.done}, got a norm of {float(norm)}")
        self._optimiser.step()
        self._follow()
        self.done += 1
        self._watch(sums)
        if config.validate_every and self.done % config.validate_every == 0:
            sums |= self.judged()
        return sums

    def _losses(self, chosen: Sequence[int], rng: torch.Generator) -> tuple[dict[str, Tensor], dict[str, float]]:
        config = self.config
        chosen, pictures = _read(self.collection, chosen)
        batch = Batch.of(pictures, self.device)
        large = [self._crops(batch, config.size, config.global_scale, first, rng) for first in (True, False)]
        small = [
            self._crops(batch, config.local_size, config.local_scale, None, rng)
            for _ in range(config.local_crops if config.views else 0)
        ]
        seen = _normalised(torch.cat([crops.images for crops in large]))
        hidden = None
        if config.masked:
            hidden = block_masks(
                len(seen),
                self.grid,
                share=config.mask_share,
                probability=config.mask_probability,
                generator=rng,
            ).to(self.device)
        losses: dict[str, Tensor] = {}
        facts: dict[str, float] = {}
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            student = self.student(seen, hidden)
            if config.labels:
                losses["labels"] = self._labels_loss(student, chosen)
            if config.views or config.masked or config.places:
                with torch.no_grad():
                    teacher = self.teacher(seen)
                if config.views:
                    shown = [student.summary]
                    if small:
                        told = _normalised(torch.cat([crops.images for crops in small]))
                        shown.append(self.student(told).summary)
                    losses["views"], target = self._views_loss(teacher, torch.cat(shown), len(chosen))
                    facts = _information(target)
                if config.masked:
                    assert hidden is not None
                    losses["masked"], target = self._masked_loss(teacher, student, hidden)
                    facts = facts or _information(target.flatten(0, 1))  # where nothing is asked of pictures
                if config.places:
                    losses["places"] = self._places_loss(teacher, student, large)
        return losses, facts

    def _views_loss(self, teacher: Encoded, shown: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Compare what is said of all crops with what the teacher says of the large ones; return that as well."""
        target = self._wanted(self._centres[0], teacher.summary)
        loss = views_loss(
            target.unflatten(0, (-1, count)),
            self.student.head(shown).unflatten(0, (-1, count)),
            self.config.student_temperature,
        )
        return loss, target

    def _masked_loss(self, teacher: Encoded, student: Encoded, hidden: Tensor) -> tuple[Tensor, Tensor]:
        target = self._wanted(self._centres[1], teacher.patches)
        loss = tokens_loss(target, self.student.head(student.patches), hidden, self.config.student_temperature)
        return loss, target

    @torch.no_grad()
    def _wanted(self, centre: Centre, said: Tensor) -> Tensor:
        """Return the teacher's answers, sharpened after the mean until now, which these then go into."""
        answers = self.teacher.head(said)
        target = centre.sharpened(answers, self._temperature)
        centre.update(answers)
        return target

    def _places_loss(self, teacher: Encoded, student: Encoded, large: Sequence[Crops]) -> Tensor:
        """Let each patch of a large crop look for its place among the teacher's tokens of the other crop."""
        tokens, patches = teacher.patches.chunk(2), student.patches.chunk(2)
        found = []
        for here, there in ((0, 1), (1, 0)):
            places, inside = large[here].place_in(large[there], self.grid)
            wanted = at_places(tokens[there], places)
            found.append(places_loss(wanted, patches[here], inside, self.config.places_temperature))
        return torch.stack(found).mean()

    def _labels_loss(self, student: Encoded, chosen: Sequence[int]) -> Tensor:
        labels = self.collection.labels[list(chosen)].repeat(2).to(self.device)
        known = labels >= 0
        if not bool(known.any()):
            return student.summary.sum() * 0.0
        answers = self.student.classifier(student.summary[known]).float()
        return F.cross_entropy(answers, labels[known], label_smoothing=_SMOOTHING)

    def _crops(
        self, batch: Batch, side: int, scale: tuple[float, float], first: bool | None, rng: torch.Generator
    ) -> Crops:
        # As in DINO: of two large crops the first is blurred, the other a little, and in part solarised.
        config = self.config
        blur = config.blur * (0.5 if first is None else 1.0 if first else 0.1)
        solarise = config.colour * (0.2 if first is False else 0.0)
        return draw_crops(
            batch,
            side,
            scale=scale,
            turn=config.turn,
            flip=config.flip,
            colour=config.colour,
            blur=blur,
            solarise=solarise,
            generator=rng,
        )

    # What changes as it goes ------------------------------------------------------------------------------------------

    @property
    def _progress(self) -> float:
        return min(1.0, self.done / self.steps) if self.steps else 0.0

    @property
    def _temperature(self) -> float:
        low, high = self.config.teacher_temperature
        return low + (high - low) * min(1.0, self.done / max(1, self.config.warmup))

    def _set_rates(self) -> None:
        config = self.config
        rising = min(1.0, (self.done + 1) / max(1, config.warmup))
        falling = 0.5 * (1 - math.cos(math.pi * self._progress))
        decay = config.weight_decay[0] + (config.weight_decay[1] - config.weight_decay[0]) * falling
        for group in self._optimiser.param_groups:
            group["lr"] = rising * scheduled(config.lr, "cosine", self.done, self.steps or 2**31)
            group["weight_decay"] = decay if group["decays"] else 0.0

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the teacher towards the student."""
        momentum = 1 - (1 - self.config.momentum) * 0.5 * (1 + math.cos(math.pi * self._progress))
        for old, fresh in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(fresh, 1 - momentum)
        for old, fresh in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            old.copy_(fresh)

    def _watch(self, facts: Mapping[str, float]) -> None:
        if "entropy" not in facts or self.done <= self.config.warmup:
            return
        self._silent = self._silent + 1 if facts["spread"] - facts["entropy"] < _LEAST else 0
        self._last = facts["entropy"], facts["spread"]

    @property
    def collapsed(self) -> str | None:
        """What to tell a user whose teacher has said the same of all pictures for ``patience`` steps; None if not."""
        if self._silent < self.config.patience:
            return None
        return (
            f"expected a teacher that tells pictures apart, but for {self._silent} steps its answers have been the "
            f"same for all of them (entropy {self._last[0]:.3f}, of their mean {self._last[1]:.3f}, largest possible "
            f"{math.log(self.config.prototypes):.3f}): the training has collapsed; try a lower lr, a lower "
            "teacher_temperature, or a larger batch"
        )

    # Measuring --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def judged(self) -> dict[str, float]:
        """Return shares of held-out pictures whose class is said right, 0..1: how much the teacher knows.

        Middle crops of size ``config.size``. ``knn``: said by the nearest among the pictures that are learned from, at
        most 2000 of them; ``top1``: by the classifier, with a loss of labels. Empty without classes.
        """
        if self.held_out is None or not self.collection.classes:
            return {}
        step = math.ceil(len(self.collection.pictures) / _JUDGED)
        some = list(range(0, len(self.collection.pictures), step))
        known = [index for index in some if self.collection.labels[index] >= 0]
        asked = [index for index, label in enumerate(self.held_out.labels.tolist()) if label >= 0]
        if not known or not asked:
            return {}
        known, answers = _read(self.collection, known)
        asked, questions = _read(self.held_out, asked)
        told, labels = self.summaries(questions), self.held_out.labels[asked]
        found = {
            "knn": neighbours_accuracy(
                self.summaries(answers), self.collection.labels[known], told, labels, k=self.config.neighbours
            )
        }
        if self.config.labels:
            said = self.teacher.classifier(told.to(self.device)).argmax(1).cpu()
            found["top1"] = float((said == labels).double().mean())
        return found

    @torch.no_grad()
    def summaries(self, pictures: Sequence[np.ndarray]) -> Float[Tensor, "n dim"]:
        """Return the teacher's summary of the middle of each picture, on the CPU."""
        found = []
        for start in range(0, len(pictures), 64):
            crops = middle_crops(Batch.of(pictures[start : start + 64], self.device), self.config.size)
            with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
                found.append(encode(self.teacher.network, _normalised(crops)).summary.float().cpu())
        return torch.cat(found)

    # Stopping and going on --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on as if it had never stopped."""
        return {
            "format": _FORMAT,
            "about": self._about(),
            "step": self.done,
            "steps": self.steps,
            "silent": self._silent,
            "student": _copied(self.student),
            "teacher": _copied(self.teacher),
            "centres": _copied(nn.ModuleList(self._centres)),
            "optimiser": copy.deepcopy(self._optimiser.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If it is of other settings; the message says what differs.
        """
        if state.get("format") != _FORMAT:
            raise ConfigError(f"expected the state of a pretraining ({_FORMAT}), got {state.get('format')!r}")
        check_same(state["about"], self._about(), free=_FREE)
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        nn.ModuleList(self._centres).load_state_dict(state["centres"])
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))  # it would change the caller's
        self.done, self.steps, self._silent = int(state["step"]), int(state["steps"]), int(state["silent"])

    def trained(self) -> nn.Module:
        """Return a copy of the teacher's network, on the CPU, in evaluation mode."""
        return copy.deepcopy(self.teacher.network).cpu().eval()

    def _about(self) -> dict[str, Any]:
        found = {"pictures": len(self.collection.pictures), "classes": len(self.collection.classes)}
        return plain_config(self.config) | {"seed": self.seed} | found

    def _chosen(self) -> list[int]:
        """Return the numbers of a step's pictures: all of them in each epoch, in an order of its own."""
        total = len(self.collection.pictures)
        wanted = self.config.batch * self.config.accumulate
        first = self.done * wanted
        orders: dict[int, list[int]] = {}
        found = []
        for position in range(first, first + wanted):
            epoch, place = divmod(position, total)
            if epoch not in orders:
                orders[epoch] = torch.randperm(total, generator=numbered(self.seed, _ORDER, epoch)).tolist()
            found.append(orders[epoch][place])
        return found


def _read(collection: Collection, numbers: Sequence[int]) -> tuple[list[int], list[np.ndarray]]:
    """Return pictures and their numbers, without those that turn out to be damaged where each is read when it is due.

    Raises:
        ImageError: If none of them can be read.
    """
    read: list[int] = []
    pictures: list[np.ndarray] = []
    damaged: list[ImageError] = []
    for number in numbers:
        try:
            pictures.append(collection.pictures[number])
        except ImageError as error:
            warnings.warn(f"left out: {error}", RuntimeWarning, stacklevel=2)
            damaged.append(error)
        else:
            read.append(number)
    if not read:
        raise damaged[0]
    return read, pictures


class _Pupil(nn.Module):
    """A network with its head, its classifier, and the token that stands for what is hidden."""

    def __init__(self, config: PretrainConfig, classes: int) -> None:
        super().__init__()
        self.network = new_network(config.model, config.size, drop_path=config.drop_path, start=config.start)
        self.patch = _patch(self.network)
        small = config.views and config.local_crops
        if small and config.local_size != config.size and not takes_any_size(self.network):
            raise ConfigError(
                f"expected a model that takes crops of both sizes, got {config.model}, which takes one; set "
                "local_crops=0"
            )
        for name in ("size", "local_size"):
            if getattr(config, name) % self.patch:
                raise ConfigError(
                    f"expected {name} as a multiple of the patch of {config.model}, {self.patch}, got "
                    f"{getattr(config, name)}"
                )
        dim: Any = self.network.num_features
        self.head = ProjectionHead(
            dim, hidden=config.hidden, bottleneck=config.bottleneck, prototypes=config.prototypes
        )
        self.mask = nn.Parameter(0.02 * torch.randn(dim))
        self.classifier = nn.Linear(dim, classes) if config.labels else nn.Identity()

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Encoded:
        """Return what the network says; what the head makes of it is asked of the head."""
        return encode(self.network, images, hidden=hidden, mask=self.mask)


def _patch(network: nn.Module) -> int:
    embed: Any = getattr(network, "patch_embed", None)
    if embed is None:
        return int(network.reduction)  # type: ignore[arg-type] - of a convolutional network of ours
    rows, cols = embed.patch_size
    if rows != cols:
        raise ConfigError(f"expected a model with square patches, got {(rows, cols)}")
    return int(rows)


def _groups(student: nn.Module) -> list[dict[str, Any]]:
    """Return the weights that decay, and those that do not: biases, norms, positions and single tokens."""
    decays = [p for name, p in student.named_parameters() if p.dim() > 1 and not name.endswith(("_embed", "_token"))]
    known = {id(p) for p in decays}
    rest = [p for p in student.parameters() if id(p) not in known]
    return [{"params": decays, "decays": True}, {"params": rest, "decays": False}]


def _information(answers: Tensor) -> dict[str, float]:
    entropy, spread = information(answers)
    return {"entropy": entropy, "spread": spread}


def _normalised(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextmanager
def _seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Let what layers draw by themselves depend on the numbers alone; leave the sources of others as they are."""
    seed = int(torch.randint(2**62, (), generator=numbered(*numbers)))
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
