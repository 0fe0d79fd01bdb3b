"""The conformance suite: what every extractor holds to, ours and yours.

A check takes a model and one tap. Run all of them over every facet of a model::

    from vitfeats import load_extractor, testing

    report = testing.conformance(lambda **settings: load_extractor("mini", device="cpu", **settings))
    print(report)
    report.raise_for_failures()

or make each a test of its own with pytest::

    @pytest.mark.parametrize("check", testing.CHECKS)
    def test_my_extractor(check):
        testing.assert_passes(check, lambda **settings: load_extractor("my-model", device="cpu", **settings))

Nothing here needs pytest. Give it a small network: a check takes several forward passes of two small images.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError, TapError, UnknownFacetError, VitFeatsError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import Size, as_pair
from vitfeats.hooks import count_hooks
from vitfeats.resize import resize_images
from vitfeats.taps import FACETS, Tap

Load = Callable[..., Extractor]
"""``load(size=…, stride=…, dtype=…)`` returns an extractor of the model under test; the network may be shared."""


class Inapplicable(Exception):  # noqa: N818 - not an error: a check that a model has a reason not to take
    """Raised by a check that does not concern a model; its text is the reason."""


@dataclass(frozen=True)
class Outcome:
    """How one check of one tap went.

    Attributes:
        check: A name of :data:`CHECKS`.
        tap: The tap that was read.
        status: "passed", "failed" or "inapplicable".
        reason: Why it failed or does not apply; empty where it passed.
    """

    check: str
    tap: Tap
    status: Literal["passed", "failed", "inapplicable"]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`conformance` found out about one model.

    Attributes:
        model: Its name.
        outcomes: One a check and facet.
        missing: Facets that the model does not have, with the reason it gives.
    """

    model: str
    outcomes: tuple[Outcome, ...]
    missing: dict[str, str]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The outcomes that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def counts(self, facet: str) -> tuple[int, int]:
        """Return (checks passed, checks that apply) for a facet."""
        of_facet = [o for o in self.outcomes if o.tap.facet == facet and o.status != "inapplicable"]
        return sum(o.status == "passed" for o in of_facet), len(of_facet)

    def raise_for_failures(self) -> None:
        """Raise ``AssertionError`` with every failure, if there is one."""
        if self.failures:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        """List the facets with their counts, and what failed, does not apply, or is missing."""
        facets = dict.fromkeys(outcome.tap.facet for outcome in self.outcomes)
        lines = [f"{self.model}:"]
        lines += [f"  {facet}: {passed} of {applying}" for facet in facets for passed, applying in [self.counts(facet)]]
        lines += [f"  {o.status}: {o.check} of {o.tap}: {o.reason}" for o in self.outcomes if o.status != "passed"]
        lines += [f"  no {facet}: {reason}" for facet, reason in self.missing.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Subject:
    """A model under test and one of its taps: what a check takes.

    Attributes:
        load: Loads the model.
        extractor: What it loaded, at a size that is not square unless the model takes one size only.
        tap: The tap to read.
    """

    load: Load
    extractor: Extractor
    tap: Tap

    @property
    def size(self) -> Size:
        """The network size of the test images, (height, width)."""
        return self.extractor.preprocess.network_size((1, 1))

    @property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """Two smooth images, so that resampling does not drown a check in noise."""
        y, x = torch.meshgrid(torch.linspace(0, 3, 70), torch.linspace(0, 5, 100), indexing="ij")
        image = torch.stack([x.sin() * y.cos(), (x * y).sin(), (x - y).cos()]) * 0.5 + 0.5
        return torch.stack([image, image.flip(2)])

    def read(self, images: Any = None, **settings: Any) -> Descriptor:
        """Return the tap's descriptor, of the two images unless others are given."""
        extractor = self.load(size=self.size, **settings) if settings else self.extractor
        return extractor(self.images if images is None else images, self.tap)


def conformance(load: Load, checks: Iterable[str] = ()) -> Report:
    """Run checks over every facet that a model has.

    Args:
        load: Loads the model at a size, stride and dtype.
        checks: Names of :data:`CHECKS`; none is all.
    """
    card = load().card
    fixed = isinstance(card.default_size, tuple)
    extractor = load(size=card.default_size if fixed else (3 * card.patch, 5 * card.patch))
    names = list(checks) or list(CHECKS)
    try:
        taps, missing = taps_of(extractor)
    except AssertionError as error:
        return Report(card.name, (Outcome("facets", Tap.parse(card.default_tap), "failed", str(error)),), {})
    outcomes = [_run(name, Subject(load, extractor, tap)) for tap in taps for name in names]
    return Report(card.name, tuple(outcomes), missing)


def assert_passes(check: str, load: Load) -> None:
    """Run one check over every facet that a model has; raise ``AssertionError`` with what failed."""
    conformance(load, [check]).raise_for_failures()


def taps_of(extractor: Extractor) -> tuple[list[Tap], dict[str, str]]:
    """Return a tap for each facet that a model has, and the reason for each that it has not.

    A model must refuse a facet by ``UnknownFacetError``, or ``AssertionError`` is raised. Blocks in the middle are
    taken, so that something is left of the network behind them; of a model with named layers the usual one, and, where
    layers can be joined, its first and last together.
    """
    card = extractor.card
    usual = Tap.parse(card.default_tap)
    # Where layers have names, a facet may be one of some of them only.
    layers = list(dict.fromkeys([usual.layer, *card.layers])) if card.layers else [card.depth // 2]
    taps, missing = [], {}
    for facet in FACETS:
        try:
            taps.append(_tap_of(extractor, facet, layers, usual.step))
        except UnknownFacetError as error:
            missing[facet] = str(error)
        except Exception as error:
            raise AssertionError(
                f"expected a tap or an UnknownFacetError for the facet '{facet}', got {error!r}"
            ) from error
    if len(card.layers) > 1:
        with suppress(TapError):  # joining layers is not asked of everybody
            taps.append(extractor.resolve(Tap("out", f"{card.layers[0]}+{card.layers[-1]}", usual.step)))
    return taps, missing


def _tap_of(extractor: Extractor, facet: str, layers: Sequence[int | str], step: int | None) -> Tap:
    """Return the facet's tap at the first layer that has it; else raise what the first layer raised."""
    errors = []
    for layer in layers:
        try:
            return extractor.resolve(Tap(facet, layer, step))
        except TapError as error:
            errors.append(error)
    raise errors[0]


# The checks -----------------------------------------------------------------------------------------------------------


def check_shapes(subject: Subject) -> None:
    """Features, grid, frames, CLS and registers fit each other and the card, in float32, and are finite."""
    d, card = subject.read(), subject.extractor.card
    _require(d.features.shape[:2] == (2, d.grid.tokens), f"features (2, {d.grid.tokens}, dim), got {d.features.shape}")
    _require(d.features.dtype == torch.float32, f"float32, got {d.features.dtype}")
    _require(bool(d.features.isfinite().all()), "finite features")
    _require(bool(d.features.std() > 0), "features that differ from each other")
    _require((d.tap, d.model) == (subject.tap, card.name), f"{subject.tap} of {card.name}, got {d.tap} of {d.model}")
    _require([f.source_size for f in d.frames] == [(70, 100)] * 2, f"frames of 70×100 pixels, got {d.frames}")
    _require((d.cls is not None) == card.has_cls, f"cls as the card says ({card.has_cls})")
    if subject.tap.facet != "cls":
        registers = 0 if d.registers is None else d.registers.shape[1]
        _require(registers == card.registers, f"{card.registers} registers, got {registers}")
    _require("\n" not in repr(d) and "\n" not in repr(subject.extractor), "a repr of one line")


def check_geometry(subject: Subject) -> None:
    """The grid covers the network image, and a point at a token's centre reads that token."""
    d = subject.read()
    _require(d.grid.network_size == subject.size, f"a grid over {subject.size} pixels, got {d.grid.network_size}")
    height, width = d.frames[0].source_size
    centres = d.frames[0].to_source(d.grid.centres())
    inside = (centres > 0).all() and (centres < centres.new_tensor([width, height])).all()
    _require(bool(inside), "token centres inside the image")
    _close(d.at(centres), d.features, "the features at the token centres")


def check_tokens_are_in_place(subject: Subject) -> None:
    """What changes most when one square of the image changes is the token there: order and grid are right."""
    if subject.tap.facet in ("cls", "attention"):
        raise Inapplicable("CLS, and what it attends to, come from the whole image")
    image, side = _of_size(subject.images[0], subject.size), subject.extractor.card.patch
    plain = subject.read(image)
    centres = plain.grid.centres()
    rows, cols = subject.size[0] // side, subject.size[1] // side
    for row, col in ((0, cols - 1), (rows - 1, 0), (rows // 2, cols // 2)):
        changed = image.clone()
        square = changed[:, row * side : (row + 1) * side, col * side : (col + 1) * side]
        square.copy_(1 - square.flip(1))
        moved = subject.read(changed).features[0] - plain.features[0]
        # Less what all tokens have in common: attention carries some of the change to everybody.
        most = (moved - moved.mean(0)).norm(dim=1).argmax()
        x, y = centres[most].tolist()
        reach = side / 2 + max(as_pair(plain.grid.stride))
        if subject.extractor.card.layers:  # a fine map may have been enlarged from cells of that side
            reach = max(reach, side)
        off = max(abs(x - (col + 0.5) * side), abs(y - (row + 0.5) * side))
        _require(off <= reach, f"the token at row {row}, column {col} to change most, got that at ({x:.0f}, {y:.0f})")


def check_depends_on_the_image(subject: Subject) -> None:
    """Another image gives other features, another CLS and other registers."""
    d, other = subject.read(), subject.read(1 - subject.images)
    _require(bool((d.features != other.features).any()), "features that depend on the image")
    _require(bool((d.features[0] != d.features[1]).any()), "features that differ within a batch")
    if (
        isinstance(subject.tap.layer, int) and subject.tap.layer > 0
    ):  # in the first block prefix tokens know nothing yet
        for name in ("cls", "registers"):
            mine, its = getattr(d, name), getattr(other, name)
            _require(mine is None or bool((mine != its).any(-1).all()), f"{name} that depend on the image")


def check_facets_and_layers_differ(subject: Subject) -> None:
    """No facet is another under its name, and no layer another."""
    extractor, tap = subject.extractor, subject.tap
    d = subject.read()
    others = [other for other in taps_of(extractor)[0] if other != tap]
    layers = extractor.card.layers or (0, extractor.card.depth - 1)
    for layer in (layers[0], layers[-1]):
        if layer != tap.layer:
            with suppress(TapError):  # a named layer may lack the facet
                others.append(extractor.resolve(replace(tap, layer=layer)))
    for other, found in extractor(subject.images, others).items() if others else ():
        same = found.features.shape == d.features.shape and bool(torch.equal(found.features, d.features))
        _require(not same, f"other features than those of {other}")


def check_repeatable(subject: Subject) -> None:
    """The same images give the same bits twice."""
    _equal(subject.read().features, subject.read().features, "the second reading")


def check_batch_equals_singles(subject: Subject) -> None:
    """An image gives the same features alone and in a batch, up to rounding."""
    together = subject.read()
    for index, image in enumerate(subject.images):
        _close(subject.read(image).features, together[index].features, f"image {index} alone")


def check_several_taps_equal_one(subject: Subject) -> None:
    """A tap gives the same bits alone and beside every other facet."""
    taps, _ = taps_of(subject.extractor)
    together = subject.extractor(subject.images, list(dict.fromkeys([*taps, subject.tap])))
    _equal(together[subject.tap].features, subject.read().features, "the tap beside others")


def check_each(subject: Subject) -> None:
    """``ex.each`` gives what a call gives, one image at a time and in order."""
    together = subject.read()
    for index, d in enumerate(subject.extractor.each(subject.images, subject.tap, batch_size=2)):
        _equal(d.features, together[index].features, f"image {index} of each")


def check_overlapping_stride(subject: Subject) -> None:
    """Half the stride gives a finer grid over the same image, and the whole stride the plain features."""
    card = subject.extractor.card
    if card.patch % 2 or subject.tap.facet == "cls":
        raise Inapplicable(
            "CLS has no stride" if subject.tap.facet == "cls" else f"a patch of {card.patch} has no half"
        )
    plain = subject.read()
    _equal(subject.read(stride=card.patch).features, plain.features, f"stride {card.patch}")
    if not subject.extractor.overlaps:
        try:
            subject.read(stride=card.patch // 2)
        except (ConfigError, ShapeError) as error:
            raise Inapplicable(str(error)) from error
        raise AssertionError("expected a ConfigError at half the stride, because `overlaps` is False")
    fine = subject.read(stride=card.patch // 2)
    wanted = (2 * plain.grid.rows - 1, 2 * plain.grid.cols - 1)
    _require((fine.grid.rows, fine.grid.cols) == wanted, f"a grid of {wanted} at half the stride, got {fine.grid}")
    _require(fine.grid.network_size == plain.grid.network_size, "the same network size at half the stride")
    _require(bool(fine.features.isfinite().all()), "finite features at half the stride")


def check_gradients(subject: Subject) -> None:
    """Gradients reach the image where it asks for them, and none are kept where it does not."""
    if not subject.extractor.differentiable:
        raise Inapplicable("its `differentiable` is False")
    _require(not subject.read().features.requires_grad, "no graph for images that require no gradients")
    image = subject.images[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(subject.read(image).features.square().sum(), image)
    _require(bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0, "a gradient at the image")
    with torch.no_grad():
        _require(not subject.read(image).features.requires_grad, "no graph under no_grad")


def check_enters_a_graph_later(subject: Subject) -> None:
    """What was extracted without gradients can be the target of a loss (no inference tensors)."""
    features = subject.read().features
    weight = torch.ones(features.shape[-1], requires_grad=True)
    (features @ weight).sum().backward()
    _require(weight.grad is not None, "a gradient through what was extracted")


def check_half_precision(subject: Subject) -> None:
    """Under bfloat16 autocast features are near those of full precision, and handed out in float32."""
    exact = subject.read(dtype="float32").features  # not the default, which is half precision on a GPU
    half = subject.read(dtype="bfloat16").features
    _require(half.dtype == torch.float32, f"float32, got {half.dtype}")
    error = float((half - exact).norm() / exact.norm())
    _require(error < 0.1, f"features within 10 % of full precision, got {error:.1%}")


def check_full_precision_inside_autocast(subject: Subject) -> None:
    """Full precision stays full precision inside somebody's autocast region."""
    outside = subject.read(dtype="float32").features
    with torch.autocast(subject.extractor.device.type, torch.bfloat16):
        _equal(subject.read(dtype="float32").features, outside, "the features inside autocast")


def check_threads(subject: Subject) -> None:
    """Four threads that share the extractor get the bits that one gets."""
    wanted = subject.read().features
    found: list[Any] = [None] * 4

    def work(index: int) -> None:
        try:
            found[index] = subject.read().features
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, got in enumerate(found):
        if isinstance(got, Exception):
            raise got
        _equal(got, wanted, f"thread {index}")


def check_model_is_left_alone(subject: Subject) -> None:
    """Hooks, weights, modes, flags, torch's switches and the random states are as they were before the reading."""
    before, switches = _traces(subject.extractor), _switches()
    subject.read()
    _require(_traces(subject.extractor) == before, "the model as it was before")
    for name, value in _switches().items():
        _require(value == switches[name], f"{name} to be as before the reading")


def check_model_is_left_alone_after_a_failure(subject: Subject) -> None:
    """A model that raises in the middle of a pass raises through, and is left as it was."""
    model, before = subject.extractor.model, _traces(subject.extractor)
    with _raising_at(model, None) as calls:
        subject.read()
    if not calls[0]:
        raise Inapplicable("no module runs in its pass")
    with _raising_at(model, (calls[0] + 1) // 2):
        try:
            subject.read()
        except RuntimeError as error:
            _require("forced by the test" in str(error), f"the error that the model raised, got {error!r}")
        else:
            raise AssertionError("expected the error of the model, got a descriptor")
    _require(_traces(subject.extractor) == before, "the model as it was before the failure")


def check_unknown_layers(subject: Subject) -> None:
    """A layer that is not there is a ``TapError``, raised before any work."""
    card = subject.extractor.card
    for layer in ("no_such_layer", card.depth, -card.depth - 1):
        try:
            subject.extractor("no-such-file.png", replace(subject.tap, layer=layer))
        except TapError:
            continue
        except VitFeatsError as error:
            raise AssertionError(f"expected a TapError for layer {layer!r}, got {error!r}") from error
        raise AssertionError(f"expected a TapError for layer {layer!r}, got a descriptor")


def check_whole_attention(subject: Subject) -> None:
    """``ex.attention`` has rows that sum to 1, and its CLS row is the facet ``attention``."""
    if subject.tap.facet != "attention":
        raise Inapplicable("it is not the facet 'attention'")
    d, prefix = subject.read(), subject.extractor.card.prefix_tokens
    matrix = subject.extractor.attention(subject.images, int(subject.tap.layer))
    _close(matrix.sum(-1), torch.ones_like(matrix[..., 0]), "sums of rows of 1")
    _close(matrix[:, :, 0, prefix:].transpose(1, 2), d.features, "the CLS row of the matrix")


def check_save_and_load(subject: Subject) -> None:
    """A descriptor comes back from its file bit for bit, geometry included."""
    d = subject.read()
    with TemporaryDirectory() as folder:
        back = Descriptor.load(d.save(Path(folder) / "d.safetensors"))
    _equal(back.features, d.features, "the features read back")
    facts = ("grid", "frames", "tap", "model", "heads")
    _require(all(getattr(back, name) == getattr(d, name) for name in facts), "the geometry and names read back")


CHECKS: dict[str, Callable[[Subject], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
"""Every check by name."""


# Their tools ----------------------------------------------------------------------------------------------------------


def _run(name: str, subject: Subject) -> Outcome:
    if name not in CHECKS:
        raise ConfigError(f"expected a check, got {name!r}; there are {', '.join(CHECKS)}")
    tap = subject.tap
    try:
        with torch.enable_grad():
            CHECKS[name](subject)
    except Inapplicable as reason:
        return Outcome(name, tap, "inapplicable", str(reason))
    except AssertionError as error:
        return Outcome(name, tap, "failed", str(error))
    except Exception as error:  # whatever an extractor raises where it should not
        return Outcome(name, tap, "failed", f"{type(error).__name__}: {error}")
    return Outcome(name, tap, "passed")


def _traces(extractor: Extractor) -> tuple[Any, ...]:
    """Return what a reading must not change: hooks, modes, gradient flags, attributes, and every weight's version."""
    model = extractor.model
    tensors = [*model.parameters(), *model.buffers()]
    return (
        count_hooks(model),
        [(module.training, sorted(vars(module)), type(module).forward) for module in model.modules()],
        [(tensor.requires_grad, tensor._version, tensor.data_ptr(), tensor.grad is None) for tensor in tensors],
        [float(tensor.detach().sum(dtype=torch.float64)) for tensor in tensors],  # what went around the versions
    )


def _switches() -> dict[str, Any]:
    """Return the state of the process that a reading must not change."""
    numpy_state = np.random.get_state()
    return {
        "torch's random state": hash(torch.random.get_rng_state().numpy().tobytes()),
        "numpy's random state": hash((numpy_state[1].tobytes(), numpy_state[2])),  # type: ignore[index]
        "the grad mode": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "the precision of matrix products": torch.get_float32_matmul_precision(),
    }


@contextmanager
def _raising_at(model: torch.nn.Module, number: int | None) -> Iterator[list[int]]:
    """Count the calls of a model's modules; raise at the ``number``-th."""
    calls = [0]

    def before(_module: torch.nn.Module, _inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise RuntimeError("forced by the test")

    handles = [module.register_forward_pre_hook(before) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _of_size(image: Float[Tensor, "3 height width"], size: Size) -> Float[Tensor, "3 new_height new_width"]:
    return resize_images(image[None], size)[0]


def _require(holds: bool, expected: str) -> None:
    if not holds:
        raise AssertionError(f"expected {expected}")


def _equal(got: Tensor, wanted: Tensor, what: str) -> None:
    if got.shape != wanted.shape:
        raise AssertionError(f"expected {what} of shape {tuple(wanted.shape)}, got {tuple(got.shape)}")
    if not torch.equal(got, wanted):
        worst = float((got.detach() - wanted.detach()).abs().max())
        raise AssertionError(f"expected {what} to be the same bits, but they differ by up to {worst:.2g}")


def _close(got: Tensor, wanted: Tensor, what: str) -> None:
    try:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    except AssertionError as error:
        raise AssertionError(f"expected {what} to be equal up to rounding; {error}") from error
