"""The front door: names to extractors, and ``extract`` for those who want features in one line."""

import inspect
import os
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from vitfeats.card import ModelCard
from vitfeats.configs import DiffusionConfig
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, UnknownModelError, nearest_names
from vitfeats.extractors.base import Extractor
from vitfeats.extractors.conv import ConvExtractor
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor, HyperfeatureModel, card_for
from vitfeats.extractors.vit import Anatomy, Rope, ViTExtractor
from vitfeats.grid import Size, as_size
from vitfeats.hooks import unwrapped
from vitfeats.models import bundled, conv, hyperfeatures, libraries, vit
from vitfeats.models import diffusion as diffusion_models
from vitfeats.models.weights import load_state, read_checkpoint
from vitfeats.nets.denoiser import Denoiser
from vitfeats.preprocess import Images, Preprocess
from vitfeats.taps import Tap

Loader = Callable[[ModelCard, str | None], nn.Module]
"""``loader(card, checkpoint)`` builds a network; ``checkpoint`` is a weight file or None."""

Kind = Callable[..., Extractor]
"""``kind(network, card, preprocess, dtype=…, **settings)`` makes an extractor; usually its class."""

PLUGINS = "vitfeats.extractors"
"""The entry-point group in which other packages offer a :class:`Row`, or several."""


@dataclass(frozen=True)
class Row:
    """One model of the catalogue.

    Attributes:
        card: What is known about it.
        loader: Builds its network: ``loader(card, checkpoint)``.
        kind: Reads it; None is :class:`~vitfeats.extractors.conv.ConvExtractor` for a card with named layers, and
            :class:`~vitfeats.extractors.vit.ViTExtractor` for others.
    """

    card: ModelCard
    loader: Loader
    kind: Kind | None = None


_rows: dict[str, Row] = {card.name: Row(card, module.load) for module in (bundled, vit, conv) for card in module.CARDS}
_rows |= {card.name: Row(card, diffusion_models.load, diffusion_models.kind(card)) for card in diffusion_models.CARDS}
_rows |= {card.name: Row(card, hyperfeatures.load, HyperfeatureExtractor) for card in hyperfeatures.CARDS}
_failed: dict[str, str] = {}
_settled: set[tuple[str, str]] = set()  # the entry points that were loaded, or failed
_sought: list[bool] = []  # whether plug-ins were looked for already
_default: list[str] = []
_cache: "OrderedDict[tuple[Any, ...], Extractor]" = OrderedDict()
_cache_lock = threading.Lock()
_plugin_lock = threading.Lock()
_loading_plugins = threading.local()
_loading: dict[tuple[Any, ...], threading.Lock] = {}
_CACHED = 4  # extractors that `extract` keeps: enough for a comparison, little enough for a laptop


def load_extractor(
    model: Any = None,
    *,
    size: int | Size | None = None,
    stride: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    norm: bool = False,
    norm_qk: bool = False,
    rope: Rope = "pre",
    checkpoint: str | os.PathLike[str] | None = None,
    card: ModelCard | None = None,
    anatomy: Anatomy | None = None,
    diffusion: DiffusionConfig | None = None,
) -> Extractor:
    """Load a model and return the extractor that reads it.

    Args:
        model: A name of :func:`list_models`; ``timm:NAME``; ``hf:ORG/NAME``; ``diffusers:ORG/NAME``; a local folder;
            or your own module or diffusers pipeline, which is used as it is, where it is. None is the default model:
            ``mini``, unless :func:`set_default_model` or the environment variable ``VITFEATS_MODEL`` says otherwise.
        size: Shorter side of the network's input in pixels (the aspect is kept), or (height, width); each side is
            snapped to the nearest patch multiple. None is the card's default.
        stride: Step between tokens in pixels; must divide the patch. None is the patch: no overlap.
        device: "auto" is a GPU if there is one; a module stays where it is.
        dtype: "auto" (float32 on a CPU, bfloat16 autocast on a GPU), "float32", "bfloat16", "float16".
        norm: Apply the model's final norm to ``token`` and ``cls``.
        norm_qk: Read queries and keys after the model's q/k norm.
        rope: "pre" or "post": read queries and keys before or after the rotary embedding.
        checkpoint: A weight file to load instead of the published weights: safetensors, or a torch file, which is
            read without running code.
        card: What is known of your own module; needed where it is not built by timm or transformers.
        anatomy: Where its parts are; needed where they have other names.
        diffusion: How a diffusion model reads pictures: by noise, as they are, or by inversion.

    Raises:
        UnknownModelError: If there is no model of that name; the message has the nearest names.
        WeightsUnavailableError: If its weights are neither cached nor reachable, or a file is not safe to read.
        ConfigError: If settings contradict the model, or a checkpoint does not fit it.
        ShapeError: If the stride does not divide the patch, or the size is smaller than one patch.

    Example:
        >>> import vitfeats as vf
        >>> vf.load_extractor("mini", size=112, device="cpu")
        ViTExtractor(mini: size 112, stride 16, float32 on cpu)
    """
    if diffusion_models.is_pipeline(model):
        model = diffusion_models.denoiser(model)
    if not (card is None and anatomy is None) and not isinstance(model, nn.Module):
        raise ConfigError(f"expected card= and anatomy= with your own module, got them with the name {model!r}")
    network, found, kind = _network(default_model() if model is None else model, checkpoint, card)
    if not isinstance(model, nn.Module):
        network = network.to(device_of(device)).eval().requires_grad_(False)
    elif device != "auto":
        raise ConfigError(
            f"expected a module that is on its device already, got device={device!r}; call module.to first"
        )
    wanted = found.default_size if size is None else size
    preprocess = Preprocess(
        wanted, found.patch, found.patch if stride is None else stride, found.mean, found.std, found.interpolation
    )
    make: Kind = kind or (ConvExtractor if found.layers else ViTExtractor)
    given = {"anatomy": (anatomy, None), "norm": (norm, False), "norm_qk": (norm_qk, False), "rope": (rope, "pre")}
    given |= {"diffusion": (diffusion, None)}
    settings = {name: value for name, (value, usual) in given.items() if value != usual}
    known = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    foreign = [] if takes_any else sorted(set(settings) - set(known))
    if foreign:
        raise ConfigError(
            f"expected settings that {found.name} knows, got {foreign[0]}={settings[foreign[0]]!r}; leave it out"
        )
    return make(network, found, preprocess, dtype=dtype, **settings)


def extract(
    images: Images,
    *,
    layer: int | str | None = None,
    facet: str | None = None,
    model: str | None = None,
    size: int | Size | None = None,
    stride: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    norm: bool = False,
    norm_qk: bool = False,
    rope: Rope = "pre",
) -> Descriptor:
    """Extract one facet of one layer in one line. The last few extractors are kept, so a loop does not reload.

    Args:
        images: One image, or a list of images that share one network size.
        layer: 0-based block index, negative from the end. None is the layer of the card's default tap.
        facet: "key", "query", "value", "token", "cls", "attention" or "out". None is the card's default.
        model: As for :func:`load_extractor`, names only; so are the other settings.
        size: As for :func:`load_extractor`.
        stride: As for :func:`load_extractor`.
        device: As for :func:`load_extractor`.
        dtype: As for :func:`load_extractor`.
        norm: As for :func:`load_extractor`.
        norm_qk: As for :func:`load_extractor`.
        rope: As for :func:`load_extractor`.

    Raises:
        ImageError, ShapeError, TapError, UnknownFacetError: As for calling an extractor.
        UnknownModelError, WeightsUnavailableError, ConfigError: As for :func:`load_extractor`.

    Example:
        >>> import vitfeats as vf
        >>> vf.extract(vf.samples.cat(), layer=11, facet="key", device="cpu")
        Descriptor(key@11 of mini: batch 1, 14×21 tokens of 192, cls, float32 on cpu)
    """
    settings: dict[str, Any] = {
        "model": default_model() if model is None else model,
        "size": None if size is None else as_size(size),
        "stride": stride,
        "device": device,
        "dtype": dtype,
        "norm": norm,
        "norm_qk": norm_qk,
        "rope": rope,
    }
    extractor = _cached(settings)
    usual = Tap.parse(extractor.card.default_tap)
    found = extractor(images, Tap(facet or usual.facet, usual.layer if layer is None else layer))
    assert not isinstance(found, Descriptors)
    return found


def list_models(pattern: str = "*") -> list[ModelCard]:
    """Return the cards whose name fits a shell pattern, for example ``"dino*"``, in the order of the catalogue.

    Models of plug-ins come last. One that cannot be loaded is left out, with a warning that says why.
    """
    _load_plugins()
    return [row.card for name, row in list(_rows.items()) if fnmatch(name, pattern)]


def register_model(card: ModelCard, loader: Loader, kind: Kind | None = None) -> None:
    """Add a model to the catalogue, for this process. A package adds its models by an entry point: :data:`PLUGINS`.

    Args:
        card: Its row; its name must be free.
        loader: Builds the network: ``loader(card, checkpoint)``.
        kind: Reads it, see :class:`Row`.

    Raises:
        ConfigError: If the name is taken.
    """
    if card.name in _rows:
        raise ConfigError(f"expected a free name, but a model {card.name!r} is registered already; choose another name")
    _rows[card.name] = Row(card, loader, kind)


def plugin_failures() -> dict[str, str]:
    """Return why plug-ins could not be loaded, by the name of their entry point; empty if all is well."""
    _load_plugins()
    return dict(_failed)


def set_default_model(name: str | None) -> None:
    """Choose the model used when none is named; None goes back to ``VITFEATS_MODEL``, or ``mini``.

    Raises:
        UnknownModelError: If there is no model of that name.
    """
    if name is not None and not _is_listed(name) and not _has_prefix(name):
        raise _unknown(name)
    _default[:] = [] if name is None else [name]


def default_model() -> str:
    """Return the name of the model used when none is named."""
    return _default[0] if _default else os.environ.get("VITFEATS_MODEL") or "mini"


def _network(
    model: str | os.PathLike[str] | nn.Module, checkpoint: str | os.PathLike[str] | None, card: ModelCard | None
) -> tuple[nn.Module, ModelCard, Kind | None]:
    file = None if checkpoint is None else os.fspath(checkpoint)
    if isinstance(model, nn.Module):
        if file is not None:
            raise ConfigError("expected checkpoint= with a model's name, got it with a module; load it into the module")
        if diffusion_models.is_unet(unwrapped(model)) or isinstance(model, Denoiser):
            network = diffusion_models.denoiser(unwrapped(model))
            name = type(network.unet).__name__
            return network, card or diffusion_models.card_of(network, name), DiffusionExtractor
        if isinstance(model, HyperfeatureModel):
            base = diffusion_models.card_of(model.denoiser, type(model.denoiser.unet).__name__)
            return model, card or card_for(base, model.aggregation.dim), HyperfeatureExtractor
        found = libraries.card_of(model, type(unwrapped(model)).__name__) if card is None else card
        return model, found, None
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(model, str):
        raise UnknownModelError(f"expected a model's name, a folder or a module, got {type(model).__name__}")
    prefix, _, rest = model.partition(":")
    is_path = any(mark in model for mark in (os.sep, "/", ".", ":"))
    # Before folders: one that happens to be called "mini" must not stand in its way.
    if model in _rows or (not is_path and _is_listed(model)):
        return _built(_rows[model], file)
    if prefix == "hyperfeatures" and rest:
        return _hyperfeatures(rest, file)
    if prefix == "diffusers" and rest:
        return _diffusers(rest, model, file)
    if os.path.isdir(model) and diffusion_models.kind_of_folder(model) is not None:
        return _diffusers(model, model, file)
    if os.path.isdir(model):
        return *libraries.load_folder(model, file), None
    if prefix == "timm" and rest:
        return *libraries.load_timm(rest, file), None
    if prefix == "hf" and rest:
        return *libraries.load_transformers(rest, file), None
    if _is_listed(model):
        return _built(_rows[model], file)
    raise _unknown(model)


def _diffusers(source: str, name: str, checkpoint: str | None) -> tuple[nn.Module, ModelCard, Kind | None]:
    network = diffusion_models.load_repository(source, name)
    if checkpoint is not None:
        load_state(network.unet, read_checkpoint(checkpoint), checkpoint)
    return network, diffusion_models.card_of(network, name), DiffusionExtractor


def _hyperfeatures(rest: str, file: str | None) -> tuple[nn.Module, ModelCard, Kind | None]:
    network, card, _ = _network(rest, None, None)
    if not isinstance(network, Denoiser):
        raise ConfigError(f"expected a diffusion model behind 'hyperfeatures:', got '{rest}'")
    if file is None:
        known = ", ".join(card.name for card in hyperfeatures.CARDS)
        raise ConfigError(
            f"expected checkpoint= with an aggregation network for '{rest}', got none; there are ones for {known}"
        )
    model = hyperfeatures.combined(network, file)
    return model, card_for(card, model.aggregation.dim), HyperfeatureExtractor


def _built(row: Row, checkpoint: str | None) -> tuple[nn.Module, ModelCard, Kind | None]:
    return row.loader(row.card, checkpoint), row.card, row.kind


def _is_listed(name: str) -> bool:
    """Tell whether the catalogue has a model, looking for plug-ins only if it is none of ours."""
    if name not in _rows:
        _load_plugins()
    return name in _rows


def _load_plugins() -> None:
    """Add the rows that other packages offer. A plug-in that fails is reported, and does no harm.

    No lock is held while a plug-in is imported: it may itself ask for models, in this thread or, behind Python's own
    import locks, in another. Threads that come at the same time do the same, and add what is there already.
    """
    if _sought or getattr(_loading_plugins, "now", False):
        return
    _loading_plugins.now = True
    reports, whole = [], True
    try:
        for entry in entry_points(group=PLUGINS):
            key = (entry.name, entry.value)
            if key in _settled:
                continue
            if _is_being_imported(entry.module):  # by somebody who asks for models meanwhile: the next look finds it
                whole = False
                continue
            try:
                _add_rows(entry.load(), key)
            except (Exception, SystemExit) as error:  # whatever somebody else's package does when it is imported
                origin = entry.dist.name if entry.dist else entry.value
                name = entry.name if entry.name not in _failed else f"{entry.name} ({origin})"
                _failed[name] = f"{type(error).__name__}: {error}"
                _settled.add(key)
                reports.append(f"plug-in '{entry.name}' of {origin} could not be loaded: {_failed[name]}")
        if whole:
            _sought.append(True)
    finally:
        _loading_plugins.now = False
    for report in reports:  # not before: with warnings as errors the first would keep the other plug-ins away
        warnings.warn(report, RuntimeWarning, stacklevel=4)


def _is_being_imported(module: str) -> bool:
    return getattr(getattr(sys.modules.get(module), "__spec__", None), "_initializing", False)


def _add_rows(offered: Any, key: tuple[str, str]) -> None:
    rows = [offered] if isinstance(offered, Row) else list(offered)
    for row in rows:
        if not isinstance(row, Row):
            raise ConfigError(f"expected a vitfeats.api.Row, or several, got {type(row).__name__}")
    names = [row.card.name for row in rows]
    with _plugin_lock:
        if key in _settled:
            return
        taken = [name for name in names if name in _rows or names.count(name) > 1]
        if taken:
            raise ConfigError(f"expected names that are free, but there is a model {taken[0]!r} already")
        _rows.update(zip(names, rows, strict=True))
        _settled.add(key)


def _unknown(name: str) -> UnknownModelError:
    failed = f" Plug-ins that could not be loaded: {', '.join(_failed)}." if _failed else ""
    return UnknownModelError(
        f"expected a model's name, 'timm:NAME', 'hf:ORG/NAME', 'diffusers:ORG/NAME' or a folder, got {name!r}. "
        f"{nearest_names(str(name), _rows)}{failed}"
    )


def _has_prefix(name: str) -> bool:
    return str(name).startswith(("timm:", "hf:", "diffusers:", "hyperfeatures:")) or os.path.isdir(name)


def _cached(settings: dict[str, Any]) -> Extractor:
    key = tuple(settings.values())
    with _cache_lock:
        loading = _loading.setdefault(key, threading.Lock())
    with loading:  # of this key alone: two threads do not load one model twice, nor wait for another model
        with _cache_lock:
            if key in _cache:
                _cache.move_to_end(key)
                return _cache[key]
        extractor = load_extractor(**settings)
        with _cache_lock:
            _cache[key] = extractor
            while len(_cache) > _CACHED:
                _loading.pop(_cache.popitem(last=False)[0], None)
        return extractor


def device_of(device: str | torch.device) -> torch.device:
    """Return a device; "auto" is a GPU if there is one.

    Raises:
        ConfigError: If this machine has no such device.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # torch raises both for a device that is not there
            reason = str(error).splitlines()[0]
            raise ConfigError(f"expected a device of this machine, got {str(device)!r}: {reason}; try 'cpu'") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
