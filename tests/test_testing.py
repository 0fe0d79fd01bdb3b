"""The conformance suite sees what it is for: one saboteur a check."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from torch import nn

import vitfeats as vf
from vitfeats import testing
from vitfeats.extractors.vit import ViTExtractor
from vitfeats.preprocess import Preprocess
from vitfeats.taps import FACETS, Reading

pytestmark = pytest.mark.usefixtures("as_a_user")


def _load(kind: type[ViTExtractor], model: nn.Module | None = None) -> testing.Load:
    """Return a loader of one tiny model, read by ``kind``."""
    network = build("timm-dinov2-reg") if model is None else model
    card = vf.load_extractor(network).card

    def load(*, size: Any = None, stride: int | None = None, dtype: str = "auto") -> vf.Extractor:
        preprocess = Preprocess(size or 56, card.patch, stride or card.patch, card.mean, card.std)
        return kind(network, card, preprocess, dtype=dtype)

    return load


def _reading(change: Callable[[ViTExtractor, Any, torch.Tensor], torch.Tensor]) -> type[ViTExtractor]:
    """Return an extractor that does something to the features it read."""

    class Saboteur(ViTExtractor):
        def read(self, batch, taps):
            found = super().read(batch, taps)
            return {tap: replace(r, features=change(self, batch, r.features)) for tap, r in found.items()}

    return Saboteur


def _wrapped(around: Callable[[Callable[[], Any], ViTExtractor, Any, Any], Any]) -> type[ViTExtractor]:
    """Return an extractor that does something around its reading."""

    class Saboteur(ViTExtractor):
        def read(self, batch, taps):
            return around(lambda: super(Saboteur, self).read(batch, taps), self, batch, taps)

    return Saboteur


def _noisy(_self, _batch, features):
    return features + 1e-3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(next(_COUNTER)))


_COUNTER = iter(range(10**9))


def _leaves_a_hook(read, self, _batch, _taps):
    self.model.register_forward_hook(lambda *_: None)
    return read()


def _leaves_a_hook_on_failure(read, self, _batch, _taps):
    handle = self.model.register_forward_hook(lambda *_: None)
    found = read()
    handle.remove()
    return found


def _draws(read, *_):
    torch.rand(1)
    return read()


def _other_beside_others(read, _self, _batch, taps):
    found = read()
    return {tap: replace(r, features=r.features + len(taps)) for tap, r in found.items()}


def _shared_state(read, self, batch, _taps):
    if threading.current_thread() is threading.main_thread():
        return read()
    return {tap: replace(r, features=r.features + threading.get_native_id() % 1000) for tap, r in read().items()}


def _infers(read, *_):
    with torch.inference_mode():
        found = read()
    return found


def _swallows(read, _self, batch, taps):
    try:
        return read()
    except RuntimeError:
        zeros = torch.zeros(len(batch.pixels), batch.grid.tokens, 48)
        return {tap: Reading(zeros) for tap in taps}


def _outer() -> bool:
    """Tell whether somebody's autocast region is around the extractor's own."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth > 1


class _SlowToRefuse(ViTExtractor):
    def resolve(self, tap):
        return tap if tap.layer == "no_such_layer" else super().resolve(tap)


class _FlatAttention(ViTExtractor):
    def attention(self, images, layer):
        return torch.full_like(super().attention(images, layer), 0.5)


class _StaleStride(ViTExtractor):
    def run(self, images, work):
        self.preprocess = replace(self.preprocess, stride=self.card.patch)
        return super().run(images, work)


class _NoClsAtAll(ViTExtractor):
    def read(self, batch, taps):
        return {tap: replace(r, cls=None) for tap, r in super().read(batch, taps).items()}


class _MirroredGrid(ViTExtractor):
    def _descriptor(self, tap, reading, batch):
        d = super()._descriptor(tap, reading, batch)
        return replace(d, grid=replace(d.grid, shift=40.0))


class _KeysAreValues(ViTExtractor):
    def read(self, batch, taps):
        asked = {tap: replace(tap, facet="value") if tap.facet == "key" else tap for tap in taps}
        found = super().read(batch, list(dict.fromkeys(asked.values())))
        return {tap: found[other] for tap, other in asked.items()}


class _AlwaysTheFirst(ViTExtractor):
    def read(self, batch, taps):
        found = super().read(batch, list(dict.fromkeys(replace(tap, layer=0) for tap in taps)))
        return {tap: found[replace(tap, layer=0)] for tap in taps}


class _RefusesFacetsAsLayers(ViTExtractor):
    def resolve(self, tap):
        if tap.facet == "out":
            raise vf.TapError("no")
        return super().resolve(tap)


class _Rounded(ViTExtractor):
    differentiable = False  # type: ignore[assignment]

    def read(self, batch, taps):
        return {tap: replace(r, features=r.features.detach()) for tap, r in super().read(batch, taps).items()}


class _BackwardEach(ViTExtractor):
    def each(self, images, taps=None, *, batch_size=8):
        return iter(list(super().each(images, taps, batch_size=batch_size))[::-1])


SABOTEURS: dict[str, type[ViTExtractor]] = {
    "shapes": _NoClsAtAll,
    "geometry": _MirroredGrid,
    "tokens_are_in_place": _reading(lambda _s, _b, f: f.flip(1)),
    "depends_on_the_image": _wrapped(lambda read, *_: {t: replace(r, cls=0 * r.cls) for t, r in read().items()}),
    "facets_and_layers_differ": _KeysAreValues,
    "repeatable": _reading(_noisy),
    "batch_equals_singles": _reading(lambda _s, _b, f: f - f.mean(0)),
    "several_taps_equal_one": _wrapped(_other_beside_others),
    "each": _BackwardEach,
    "overlapping_stride": _StaleStride,
    "gradients": _reading(lambda _s, _b, f: f.detach()),
    "enters_a_graph_later": _wrapped(_infers),
    "half_precision": _reading(lambda s, _b, f: f if s.autocast is None else 2 * f),
    "full_precision_inside_autocast": _reading(lambda _s, b, f: f.bfloat16().float() if _outer() else f),
    "threads": _wrapped(_shared_state),
    "model_is_left_alone": _wrapped(_leaves_a_hook),
    "model_is_left_alone_after_a_failure": _wrapped(_leaves_a_hook_on_failure),
    "unknown_layers": _SlowToRefuse,
    "whole_attention": _FlatAttention,
}


def test_an_honest_extractor_passes_every_check():
    report = testing.conformance(_load(ViTExtractor))
    report.raise_for_failures()
    assert not report.failures
    assert report.counts("key") == (len(testing.CHECKS) - 1, len(testing.CHECKS) - 1)  # all but `whole_attention`
    assert str(report).startswith("VisionTransformer:")
    assert "inapplicable: overlapping_stride of cls@1: CLS has no stride" in str(report)


@pytest.mark.parametrize("check", sorted(SABOTEURS))
def test_a_saboteur_is_caught(check):
    report = testing.conformance(_load(SABOTEURS[check]), [check])
    assert report.failures, f"{check} saw nothing"
    with pytest.raises(AssertionError, match=f"failed: {check} of "):
        report.raise_for_failures()


def test_random_draws_and_swallowed_errors_are_caught():
    assert testing.conformance(_load(_wrapped(_draws)), ["model_is_left_alone"]).failures
    found = testing.conformance(_load(_wrapped(_swallows)), ["model_is_left_alone_after_a_failure"]).failures
    assert "expected the error of the model, got a descriptor" in found[0].reason


@pytest.mark.parametrize("family", ["timm-siglip", "timm-dinov2-reg"])
def test_order_and_layers_are_seen_also_without_cls(family):
    model = build(family)
    transposed = _reading(lambda _s, b, f: f.unflatten(1, (b.grid.rows, b.grid.cols)).transpose(1, 2).flatten(1, 2))
    for kind, check in ((transposed, "tokens_are_in_place"), (_AlwaysTheFirst, "facets_and_layers_differ")):
        failed = {outcome.tap.facet for outcome in testing.conformance(_load(kind, model), [check]).failures}
        assert {"key", "query", "value", "token", "out"} <= failed


def test_what_a_reading_does_to_the_process_is_seen():
    def seeds(read, *_):
        np.random.rand()
        return read()

    def switches(read, *_):
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        return read()

    def writes(read, self, *_):
        next(self.model.parameters()).data.add_(1e-3)
        return read()

    for around, words in ((seeds, "numpy's random state"), (switches, "cudnn.benchmark"), (writes, "the model as it")):
        found = testing.conformance(_load(_wrapped(around)), ["model_is_left_alone"]).failures
        assert found
        assert words in found[0].reason
    torch.backends.cudnn.benchmark = False


def test_a_facet_refused_by_another_error_is_a_failure_and_not_a_crash():
    report = testing.conformance(_load(_RefusesFacetsAsLayers))
    assert [outcome.check for outcome in report.failures] == ["facets"]
    assert "an UnknownFacetError for the facet 'out', got TapError" in report.failures[0].reason


def test_honest_extractors_are_not_accused():
    report = testing.conformance(_load(_Rounded), ["gradients"])
    assert {outcome.reason for outcome in report.outcomes} == {"its `differentiable` is False"}
    with torch.no_grad():
        testing.conformance(_load(ViTExtractor), ["gradients", "model_is_left_alone"]).raise_for_failures()


def test_every_check_has_a_saboteur():
    assert set(testing.CHECKS) - set(SABOTEURS) == {"save_and_load"}  # a descriptor's own; see test_descriptor.py


def test_missing_facets_have_their_reason():
    report = testing.conformance(_load(ViTExtractor, build("timm-siglip")), ["shapes"])
    assert set(report.missing) == {"cls", "attention", "residual"}
    assert "it has no CLS token" in report.missing["cls"]
    assert {outcome.tap.facet for outcome in report.outcomes} == set(FACETS) - {"cls", "attention", "residual"}


def test_assert_passes_and_names_of_checks():
    testing.assert_passes("shapes", _load(ViTExtractor))
    with pytest.raises(AssertionError, match="failed: gradients of key@1: .* does not require grad"):
        testing.assert_passes("gradients", _load(SABOTEURS["gradients"]))
    with pytest.raises(vf.ConfigError, match="expected a check, got 'shape'; there are shapes, geometry"):
        testing.assert_passes("shape", _load(ViTExtractor))
