"""One run, step by step: what is painted, what the model reads of it, and what the optimiser makes of that."""

import copy
import hashlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.apps.splice.terms import Term, Which, checked_terms, default_terms
from vitfeats.configs import SpliceConfig, plain_config
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import Size
from vitfeats.losses import appearance_loss, structure_loss
from vitfeats.nets.skip import SkipNet
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.resize import carry_detail, resize_images
from vitfeats.runs import check_same, scheduled
from vitfeats.taps import Tap
from vitfeats.views import blurred, flipped, jittered, numbered, square_crop

_FORMAT = "vitfeats.splice/1"
_NUMBER: dict[Which, int] = {"structure": 0, "appearance": 1}  # in the draws of random numbers
_INITIAL, _VIEW, _CHOICE = 0, 1, 2  # what a draw is for


class Splicer:
    """One run, step by step.

    Args:
        structure: The image whose structure is kept.
        appearance: The image whose appearance is taken.
        extractor: The judge; frozen or not, only the generator is trained.
        config: Settings; None is the preset "fast".
        seed: Of the first weights and of every crop, at least 0.
        terms: The objective; None is :func:`default_terms`.
        generator: A network from (1, 3, h, w) to (1, 3, h, w) in 0..1 to train instead of :class:`SkipNet`.

    Attributes:
        done: Steps taken.
        generator: The network that is trained.
        extractor: The judge.
        config: The settings.
        terms: The objective.

    Raises:
        ImageError: If an image cannot be read.
        ShapeError: If an image is too small for the generator.
        ConfigError: If terms and model do not fit: a model without CLS has no appearance term.
    """

    def __init__(
        self,
        structure: ImageLike,
        appearance: ImageLike,
        *,
        extractor: Extractor,
        config: SpliceConfig | None = None,
        seed: int = 0,
        terms: Sequence[Term] | None = None,
        generator: nn.Module | None = None,
    ) -> None:
        self.config = config or SpliceConfig()
        self.seed = _checked_seed(seed)
        self.extractor = extractor
        self.terms = checked_terms(default_terms(self.config) if terms is None else terms, extractor)
        self._taps = [term.tap for term in self.terms]
        device = extractor.device
        self._full = load_image(structure)[None].to(device)
        self._images: dict[Which, Tensor] = {
            "structure": self._working(self._full),
            "appearance": self._working(load_image(appearance)[None].to(device)),
        }
        self.done = 0
        self._active(0)
        self.generator = self._prepared(generator)
        self._painter: Any = torch.compile(self.generator, dynamic=True) if self.config.compile else self.generator
        self._trained = [p for p in self.generator.parameters() if p.requires_grad]
        if not self._trained:
            raise ConfigError("expected a generator with weights to train, got one without; set requires_grad")
        self._reaching: set[str] = set()  # terms that a gradient was seen of
        self._before = [p.detach().clone() for p in self._trained]  # the last step whose losses were finite
        fused = device.type in ("cpu", "cuda")
        self._optimiser = torch.optim.Adam(self._trained, lr=self.config.lr, betas=self.config.betas, fused=fused)
        self._sized: dict[Size, Extractor] = {}
        self._crops: dict[tuple[Which, int], Tensor] = {}
        self._bank: dict[tuple[Which, int | None], Descriptors] = {}
        self._whole: dict[Which, Descriptor] = {}
        self._distance: dict[str | Tap, float] = {}

    def objective(self, step: int) -> dict[str, Tensor]:
        """Return the terms of a step before their weights, and ``loss``, their weighted sum, with a graph.

        Depends on the weights of the generator, the seed and the step; changes nothing.

        Raises:
            ConfigError: If a term's loss is not one number.
        """
        active = self._active(step)
        numbers: dict[Which, int] = {"structure": self._number("structure", step)}
        numbers["appearance"] = self._number("appearance", step)
        made = self._read_made({(t.made, t.whole) for t in active}, numbers, [t.tap for t in active])
        keys: dict[str, tuple[Which, int | None]] = {
            t.name: (t.wanted, None if t.whole and t.wanted == t.made else numbers[t.wanted]) for t in active
        }
        wanted = self._read_wanted(set(keys.values()))
        values: dict[str, Tensor] = {}
        for term in active:
            value: Any = term.loss(made[term.made, term.whole][term.tap], wanted[keys[term.name]][term.tap])
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"expected a loss that returns a tensor of one number for the term '{term.name}', got {value!r}; "
                    "compute it by torch from the first descriptor it is given, and return it"
                )
            if value.ndim:
                shape = tuple(value.shape)
                raise ConfigError(
                    f"expected a loss of one number for the term '{term.name}', got shape {shape}; average it"
                )
            values[term.name] = value
        values["loss"] = torch.stack([self._weight(term) * values[term.name] for term in active]).sum()
        return values

    def step(self) -> dict[str, float]:
        """Take one optimiser step; return the terms before their weights, and ``loss``.

        Raises:
            ConfigError: If a term's loss is not one number, or gives no gradient to the picture.
            FloatingPointError: If the picture, a loss or a gradient is not finite. The generator then has the weights
                of the last step whose losses were finite.
        """
        try:
            with torch.inference_mode(False), torch.enable_grad():
                values = self.objective(self.done)
                self._check_gradients(values)
                self._optimiser.zero_grad(set_to_none=True)
                values["loss"].backward(inputs=self._trained)  # never into the weights of a judge that is not frozen
            losses = {name: float(value.detach()) for name, value in values.items()}
            broken = [name for name, value in losses.items() if not math.isfinite(value)]
            gradients = [p.grad.norm() for p in self._trained if p.grad is not None]
            if not broken and not bool(torch.stack(gradients).isfinite().all()):
                broken = ["the gradient"]
            if broken:
                raise FloatingPointError(
                    f"expected finite losses at step {self.done}, got {', '.join(broken)} not finite"
                )
        except FloatingPointError:
            self._copy(self._before, self._trained)
            raise
        self._copy(self._trained, self._before)
        for group in self._optimiser.param_groups:
            group["lr"] = scheduled(self.config.lr, self.config.schedule, self.done, self.config.steps)
        self._optimiser.step()
        self.done += 1
        return losses

    def _check_gradients(self, values: Mapping[str, Tensor]) -> None:
        """Refuse, at its first step, a term that no gradient reaches the picture from: it would change nothing.

        Later a loss may turn constant, such as one that is satisfied.
        """
        for name in [name for name in values if name != "loss" and name not in self._reaching]:
            if not _reaches(values[name], self._trained):
                raise ConfigError(
                    f"expected a loss with a gradient, but the term '{name}' gives no gradient to the picture; compute "
                    "it by torch from the first descriptor it is given"
                )
            self._reaching.add(name)
        if not values["loss"].requires_grad:
            raise ConfigError(
                f"expected a loss with a gradient at step {self.done}, but every term has turned constant; stop before"
            )

    def _active(self, step: int) -> list[Term]:
        active = [t for t in self.terms if t.start <= step and (not t.whole or step % self.config.whole_every == 0)]
        if not active:
            raise ConfigError(
                f"expected a term with a weight above 0 at step {step}, got none; begin one earlier (start=, warmup=)"
            )
        return active

    @torch.no_grad()
    def _copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        for kept, other in zip(target, source, strict=True):
            kept.copy_(other)

    @torch.no_grad()
    def render(self) -> Float[Tensor, "3 height width"]:
        """Return the picture as it is now, at the structure image's size."""
        small = self._images["structure"]
        return carry_detail(self._painted(small), small, self._full)[0].clamp(0, 1)

    @torch.no_grad()
    def uncropped(self) -> dict[str, float]:
        """Return the structure and appearance losses of the whole picture against the whole images.

        No random crop is in them, so they can be compared between steps, seeds and settings of one model and size.

        Raises:
            UnknownFacetError: If the model has no CLS.
        """
        keys, cls = self.config.structure_tap, self.config.appearance_tap
        if not self._whole:
            pairs: tuple[tuple[Which, str], ...] = (("structure", keys), ("appearance", cls))
            for which, tap in pairs:
                self._whole[which] = self._extract(self._network(self._images[which]), [tap])[tap]
        made = self._extract(self._network(self._painted(self._images["structure"])), [keys, cls])
        return {
            "structure": float(structure_loss(made[keys], self._whole["structure"])),
            "appearance": float(appearance_loss(made[cls], self._whole["appearance"])),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on as if it had never stopped, as plain values and tensors."""
        return {
            "format": _FORMAT,
            "about": self._about(),
            "step": self.done,
            "generator": copy.deepcopy(self.generator.state_dict()),  # a later step must not change what was kept
            "optimiser": copy.deepcopy(self._optimiser.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: If it is of other settings, images, terms or of another model; the message says what differs.
        """
        if state.get("format") != _FORMAT:
            raise ConfigError(f"expected the state of a splice ({_FORMAT}), got {state.get('format')!r}")
        check_same(state["about"], self._about(), free=self._free())
        self.generator.load_state_dict(state["generator"])
        self._optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))  # it would change the caller's
        self._copy(self._trained, self._before)
        self.done = int(state["step"])

    def _about(self) -> dict[str, Any]:
        digests = {name: _digest(image) for name, image in self._images.items()}
        about = plain_config(self.config) | {"model": self.extractor.card.name, "seed": self.seed}
        about |= {"structure image": digests["structure"], "appearance image": digests["appearance"]}
        about |= {"model's stride": self.extractor.preprocess.stride, "model's precision": str(self.extractor.autocast)}
        about["terms"] = [_told(term) for term in self.terms]
        sizes = [p.numel() for p in self.generator.parameters()]
        about["generator"] = f"{type(self.generator).__name__} of {sum(sizes)} weights in {len(sizes)} arrays"
        return about

    def _free(self) -> tuple[str, ...]:
        """Return the settings that may change when a run is resumed; the length, unless the schedule hangs on it."""
        free = ("checkpoint_every", "snapshot_every", "patience")
        return free if self.config.schedule == "cosine" else (*free, "steps")

    def _working(self, image: Tensor) -> Tensor:
        """Return an image at the working size; one that is smaller stays as it is."""
        wanted, short = self.config.working_size, min(image.shape[-2:])
        if wanted is None or short <= wanted:
            return image
        height, width = (round(side * wanted / short) for side in image.shape[-2:])
        return resize_images(image, (height, width))

    def _prepared(self, given: nn.Module | None) -> nn.Module:
        rng = numbered(self.seed, _INITIAL)
        made = (
            SkipNet(channels=self.config.channels, residual=self.config.residual, generator=rng)
            if given is None
            else given
        )
        made = made.to(self.extractor.device)
        if self.config.channels_last:
            made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's own stub lacks it
        if isinstance(made, SkipNet):
            for name, image in self._images.items():
                if min(image.shape[-2:]) < made.smallest:
                    article = "an" if name == "appearance" else "a"
                    raise ShapeError(
                        f"expected {article} {name} image of at least {made.smallest}×{made.smallest} pixels, got "
                        f"{image.shape[-2]}×{image.shape[-1]}; enlarge it, raise working_size=, or use fewer channels="
                    )
        return made

    def _painted(self, image: Tensor) -> Tensor:
        """Return the generator's picture of one image. One at a time: its batch norms must not mix images."""
        device, kind = self.extractor.device, self.extractor.autocast
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
            made = self._painter(image)
        if made.shape != image.shape:
            raise ShapeError(f"expected a generator that keeps {tuple(image.shape)}, got {tuple(made.shape)} from it")
        if not bool(made.detach().isfinite().all()):
            raise FloatingPointError(f"expected a finite picture at step {self.done}, got NaN or infinity")
        return made.float()

    def _network(self, image: Tensor) -> Tensor:
        """Return an image as the model sees it: resized, but not yet normalised."""
        source = (int(image.shape[-2]), int(image.shape[-1]))
        patch = self.extractor.card.patch
        size = _network_size(source, self.config.size, self.config.max_size)
        if self.config.resize == "published":
            # torchvision 0.10 had no antialiasing for tensors, and DINO's patch convolution drops what is over.
            resized = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
            height, width = (side // patch * patch for side in size)
            return resized[..., :height, :width]
        height, width = (max(1, round(side / patch)) * patch for side in size)
        return resize_images(image, (height, width))

    def _extract(self, images: Tensor, taps: Iterable[str | Tap]) -> Descriptors:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if size not in self._sized:
            self._sized[size] = self.extractor.resized(size=size)
            self._sized[size].frugal = True
        return self._sized[size](images, list(dict.fromkeys(taps)))

    def _weight(self, term: Term) -> float:
        """Return a term's weight; in relative settings, that of appearance in units of the distance to go."""
        if not (self.config.relative and term.loss is appearance_loss):
            return term.weight
        if term.tap not in self._distance:
            a, b = (self._extract(self._network(self._images[which]), [term.tap])[term.tap] for which in _NUMBER)
            # Two images that are nearly the same have no distance to measure by: a thousandth of the token's own size.
            floor = 1e-3 * float(b.features.square().mean())
            self._distance[term.tap] = max(float(appearance_loss(a, b)), floor)
        return term.weight / self._distance[term.tap]

    def _number(self, which: Which, step: int) -> int:
        """Return the number of the view that a step sees."""
        if not self.config.views:
            return step
        rng = numbered(self.seed, _CHOICE, _NUMBER[which], step)
        return int(torch.randint(self.config.views, (), generator=rng))

    def _view(self, which: Which, number: int) -> Tensor:
        """Return an augmented crop. Only the structure image's colours are shifted: the other's are what is wanted."""
        config, rng = self.config, numbered(self.seed, _VIEW, _NUMBER[which], number)
        image = flipped(self._images[which], config.flip, rng)
        if which == "structure":
            image = blurred(jittered(image, config.jitter, rng), config.blur, rng)
        return square_crop(image, config.smallest_crop, rng)

    def _painted_view(self, which: Which, number: int) -> Tensor:
        """Return a crop that the generator is given; those of a bank are cut once."""
        if not self.config.views:
            return self._view(which, number)
        if (which, number) not in self._crops:
            self._crops[which, number] = self._view(which, number)
        return self._crops[which, number]

    def _read_made(
        self, wanted: set[tuple[Which, bool]], numbers: Mapping[Which, int], taps: Sequence[str | Tap]
    ) -> dict[tuple[Which, bool], dict[str | Tap, Descriptor]]:
        """Paint what the terms compare, and read all that has one size in one forward pass."""
        painted: dict[tuple[Which, bool], Tensor] = {}
        for which, whole in sorted(wanted):
            image = self._images[which] if whole else self._painted_view(which, numbers[which])
            painted[which, whole] = self._network(self._painted(image))
        read: dict[tuple[Which, bool], dict[str | Tap, Descriptor]] = {}
        for size in {image.shape: None for image in painted.values()}:
            members = [key for key, image in painted.items() if image.shape == size]
            together = self._extract(torch.cat([painted[key] for key in members]), taps)
            for index, key in enumerate(members):
                read[key] = {tap: together[tap][index] for tap in taps}
        return read

    @torch.no_grad()
    def _read_wanted(self, wanted: set[tuple[Which, int | None]]) -> dict[tuple[Which, int | None], Descriptors]:
        """Read existing images by (which, number of the view; None is the whole), those that return only once."""
        read: dict[tuple[Which, int | None], Descriptors] = {}
        fresh: list[tuple[Which, int]] = []
        for which, number in sorted(wanted, key=str):
            if number is not None and not self.config.views:
                fresh.append((which, number))
                continue
            if (which, number) not in self._bank:
                image = self._images[which] if number is None else self._view(which, number)
                # One at a time, whatever else is new: the same bits in whichever order they are met.
                self._bank[which, number] = self._extract(self._network(image), self._taps)
            read[which, number] = self._bank[which, number]
        if fresh:
            together = self._extract(torch.cat([self._network(self._view(*key)) for key in fresh]), self._taps)
            for index, key in enumerate(fresh):
                read[key] = Descriptors([(str(tap), d[index]) for tap, d in together.items()])
        return read


def _network_size(source: Size, size: int, most: int) -> Size:
    """Return (height, width) with the shorter side ``size`` and the longer at most ``most``, whole pixels cut off."""
    short, long = min(source), max(source)
    new_short, new_long = size, int(size * long / short)
    if new_long > most:
        new_short, new_long = int(most * new_short / new_long), most
    return (new_short, new_long) if source[0] <= source[1] else (new_long, new_short)


def _reaches(value: Tensor, trained: Sequence[Tensor]) -> bool:
    """Tell whether a gradient of a value would reach one of these tensors, without computing it."""
    wanted = {id(tensor) for tensor in trained}
    left: list[Any] = [value.grad_fn]
    seen = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return False


def _checked_seed(seed: int) -> int:
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise ConfigError(f"expected a whole number as seed, got {seed!r}") from error
    if number < 0:
        raise ConfigError(f"expected a seed of at least 0, got {seed!r}")
    return number


def _told(term: Term) -> str:
    """Return all that makes a term, as one line: two objectives are the same where their lines are."""
    loss = getattr(term.loss, "func", term.loss)  # of a partial
    settings = getattr(term.loss, "keywords", {})
    name = getattr(loss, "__qualname__", type(loss).__name__)
    when = f"{'whole' if term.whole else 'crops'} from step {term.start}"
    return f"{term.weight!r} {term.name}: {name}{settings or ''} of {term.tap}, {term.made} to {term.wanted}, {when}"


def _digest(image: Tensor) -> str:
    pixels = (image.detach().cpu() * 255).round().to(torch.uint8)
    return f"{tuple(image.shape[-2:])} {hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]}"
