"""From one image to one descriptor: an extractor's tap, several joined, several models fused, kept in a folder."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError, StoreError
from vitfeats.extractors.base import Extractor, Taps
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.resize import sample_map
from vitfeats.similarity import check_single, unit
from vitfeats.taps import Tap

Describe = Callable[[ImageLike], Descriptor]
"""From one image to its descriptor: ``lambda image: extractor(image, "key@11")``."""

Transform = Callable[[Descriptor, Descriptor], tuple[Descriptor, Descriptor]]
"""From the descriptors of two images to those that are compared."""


def describe_with(extractor: Extractor, taps: Taps | None = None) -> Describe:
    """Return the function from an image to a tap of an extractor; several taps are read in one pass, and joined.

    Args:
        extractor: Reads.
        taps: A tap, several for :func:`joined`, or None for the usual one.
    """

    def describe(image: ImageLike) -> Descriptor:
        if taps is None or isinstance(taps, str | Tap):
            return extractor(image, taps)
        return joined(list(extractor(image, taps).values()))

    return describe


def joined(descriptors: Sequence[Descriptor], *, weights: Sequence[float] | None = None) -> Descriptor:
    """Join descriptors of one image: on the finest of their grids, each token of length 1, channel behind channel.

    The cosine of two joined tokens is the mean of the parts' cosines, so that no part is louder than another; with
    ``weights`` w it is the mean with w², as in the fusion of Zhang et al., A Tale of Two Features, NeurIPS 2023.

    Args:
        descriptors: Of one image each, all of the same source image; of any models and sizes.
        weights: A factor for each.

    Returns:
        The grid, frame and tap are those of the finest; there are no heads, CLS or registers.

    Raises:
        ShapeError: If there is none, one holds several images, their source sizes differ, or the weights are not as
            many.
    """
    if not descriptors:
        raise ShapeError("expected at least one descriptor to join, got none")
    check_single(*descriptors)
    if len({d.frames[0].source_size for d in descriptors}) > 1:
        sizes = sorted({d.frames[0].source_size for d in descriptors})
        raise ShapeError(f"expected descriptors of one source image, got images of {sizes} (height, width)")
    factors = [1.0] * len(descriptors) if weights is None else list(weights)
    if len(factors) != len(descriptors):
        raise ShapeError(f"expected a weight for each of {len(descriptors)} descriptors, got {len(factors)}")
    finest = max(descriptors, key=lambda d: d.grid.tokens)
    centres = finest.frames[0].to_source(finest.grid.centres().to(finest.device))
    parts = []
    for d, factor in zip(descriptors, factors, strict=True):
        tokens = d.features[0]
        if d.grid != finest.grid:
            tokens = sample_map(d.map, d.grid, d.frames[0].to_network(centres.to(d.device)))[0].T
        parts.append(factor * unit(tokens).to(finest.device))
    name = " + ".join(dict.fromkeys(d.model for d in descriptors))
    return replace(finest, features=torch.cat(parts, 1)[None], model=name, cls=None, registers=None, heads=None)


def fused(describes: Sequence[Describe], *, weights: Sequence[float] | None = None) -> Describe:
    """Return the function from an image to the descriptors of several, joined: see :func:`joined`."""

    def describe(image: ImageLike) -> Descriptor:
        loaded = load_image(image)
        return joined([one(loaded) for one in describes], weights=weights)

    return describe


def joint_pca(dim: int = 256) -> Transform:
    """Return the transform to the first principal components of both images' tokens together.

    As Zhang et al., A Tale of Two Features, NeurIPS 2023, reduce the maps of a diffusion model: the mean of both images
    is taken off. The signs do not matter to a cosine.

    Args:
        dim: Components; fewer where there are not as many channels or tokens.

    Raises:
        ConfigError: If ``dim`` is below 1.
        ShapeError: By the transform, if the two descriptors have not as many channels.
    """
    if dim < 1:
        raise ConfigError(f"expected dim of at least 1, got {dim}")

    def transform(a: Descriptor, b: Descriptor) -> tuple[Descriptor, Descriptor]:
        if a.dim != b.dim:
            raise ShapeError(f"expected descriptors with as many channels, got {a.dim} and {b.dim}")
        together = torch.cat([a.features[0], b.features[0]]).float()
        mean = together.mean(0)
        together = together - mean
        # From the channels' products: exact, and the same bits every time, which a randomised decomposition has not.
        _, basis = torch.linalg.eigh((together.T @ together).double())
        axes = basis[:, -min(dim, *together.shape) :].flip(1).to(together.dtype)
        return _projected(a, mean, axes), _projected(b, mean, axes)

    transform.__qualname__ = f"joint_pca({dim})"  # a run with other components is another run
    return transform


def keep_in(
    folder: Path | str, describe: Describe, fingerprint: str, *, device: torch.device | str = "cpu"
) -> Describe:
    """Return the same function that writes each descriptor to a folder, and reads what is there already.

    A file is found by the image's pixels and the fingerprint, so that one folder can serve many datasets and models.
    A file that is damaged is made again.

    Args:
        folder: Made if missing.
        describe: What makes descriptors.
        fingerprint: Of what it does: the same for the same features alone; see :func:`fingerprint_of`.
        device: Where descriptors are returned, new ones and kept ones alike.

    Raises:
        StoreError: If the folder cannot be made, or later a file cannot be written.
    """
    home = Path(folder) / hashlib.sha1(fingerprint.encode()).hexdigest()[:16]
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"expected a folder for features at '{home}', but: {error}") from error

    def remembered(image: ImageLike) -> Descriptor:
        loaded = load_image(image)
        file = home / f"{_digest(loaded)}.safetensors"
        if file.is_file():
            try:
                return Descriptor.load(file).to(device)
            except StoreError:  # of a disk that was full, or another version: made again below
                pass
        found = describe(loaded)
        found.save(file)
        return found.to(device)

    return remembered


def fingerprint_of(extractor: Extractor, taps: Taps | None) -> str:
    """Return a text that is the same for the same features: the version, the model, its weights, settings and taps.

    Of the weights, a sample of each counts.
    """
    known = ("anatomy", "autocast", "card", "cell", "diffusion", "frugal", "norm", "norm_qk", "preprocess", "rope")
    settings = {name: repr(getattr(extractor, name)) for name in known if hasattr(extractor, name)}
    settings["version"] = version("vitfeats")
    # A list of one tap is joined, and has tokens of length 1: not the same as the tap.
    asked: str | list[str]
    if taps is None or isinstance(taps, str | Tap):
        asked = str(taps or extractor.card.default_tap)
    else:
        asked = [str(tap) for tap in taps]
    return json.dumps([type(extractor).__name__, settings, asked, weights_digest(extractor.model)])


def code_digest(function: Callable[..., Any]) -> str:
    """Return a text that differs where a function's name, code, or the plain values that it closes over differ."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    told = [_told_code(code), *(value for value in held if isinstance(value, str | int | float | tuple))]
    return f"{name} {hashlib.sha1(repr(told).encode()).hexdigest()[:16]}"


def _told_code(code: Any) -> Any:
    if not isinstance(code, CodeType):
        return repr(code)
    return code.co_code.hex(), code.co_names, [_told_code(value) for value in code.co_consts]


def weights_digest(model: torch.nn.Module) -> str:
    """Return a digest of a sample of every weight: quick also for models of billions of weights."""
    digest = hashlib.sha1()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _digest(image: Tensor) -> str:
    pixels = image.detach().cpu().contiguous()
    return hashlib.sha1(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()


def _projected(d: Descriptor, mean: Tensor, axes: Tensor) -> Descriptor:
    changed: dict[str, Any] = {"cls": None, "registers": None, "heads": None}
    return replace(d, features=((d.features[0].float() - mean) @ axes)[None], **changed)
