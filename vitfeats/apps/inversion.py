"""Which picture has these features? Feature inversion, after Tumanyan et al., Splicing ViT Features, CVPR 2022.

A network of the Deep Image Prior kind is trained until the picture that it paints has the features of a target image.
What comes back of the image is what the feature knows of it.
"""

import hashlib
import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitfeats.api import load_extractor
from vitfeats.configs import InvertConfig
from vitfeats.descriptor import Descriptor, write_whole
from vitfeats.errors import ConfigError, ShapeError, StoreError
from vitfeats.extractors.base import Extractor
from vitfeats.losses import appearance_loss, identity_loss
from vitfeats.nets.skip import SkipNet
from vitfeats.pca import PCA
from vitfeats.preprocess import ImageLike, load_image, to_pil
from vitfeats.resize import resize_images
from vitfeats.runs import Callback, finite, scheduled
from vitfeats.similarity import self_similarity
from vitfeats.taps import Tap

Loss = Callable[[Descriptor, Descriptor], Tensor]
"""``loss(out, target)`` of two descriptors of one image each: a tensor of one number."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """Pictures that were made to have the features of an image, one for each start.

    Attributes:
        tensor: (starts, 3, height, width) in 0..1.
        losses: Final feature loss of each start; NaN where there was none.
        history: One record a step, ``{"step": …, "losses": […]}``; the loss of a start that was stopped is NaN.
        target: (3, height, width) in 0..1, the image as the model saw it.
        tap: What was inverted, with the layer counted from the start.
        model: The model's name.
        seed: Of the starts.
        config: The settings.
    """

    tensor: Float[Tensor, "starts 3 height width"]
    losses: tuple[float, ...]
    history: list[dict[str, Any]]
    target: Float[Tensor, "3 height width"]
    tap: Tap
    model: str
    seed: int
    config: InvertConfig

    def __post_init__(self) -> None:
        """Check that pictures, losses and target fit each other."""
        if len(self.losses) != len(self.tensor) or self.target.shape != self.tensor.shape[1:]:
            raise ShapeError(
                f"expected one loss a start and a target of their size, got {tuple(self.tensor.shape)}, "
                f"{len(self.losses)} losses and a target {tuple(self.target.shape)}"
            )

    @property
    def best(self) -> int:
        """The start of the lowest final loss."""
        return min(range(len(self.losses)), key=lambda start: _or_infinity(self.losses[start]))

    @property
    def image(self) -> Image.Image:
        """The picture of the best start."""
        return to_pil(self.tensor[self.best])

    @property
    def images(self) -> list[Image.Image]:
        """The picture of each start."""
        return [to_pil(picture) for picture in self.tensor]

    @property
    def psnr(self) -> tuple[float, ...]:
        """Peak signal-to-noise ratio of each picture against the target, in dB; infinite where they are equal."""
        errors = (self.tensor.cpu().double() - self.target.cpu().double()).square().mean((1, 2, 3)).tolist()
        return tuple(math.inf if error == 0 else -10 * math.log10(error) for error in errors)

    def save(self, folder: Path | str) -> Path:
        """Write inversion.png (the best), start_0.png and on, target.png and inversion.json, each whole or not at all.

        Args:
            folder: Made if missing.

        Raises:
            StoreError: If it cannot be written to.
        """
        where = Path(folder)
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"expected a folder to write to at '{where}', but: {error}") from error
        pictures = {"target": to_pil(self.target), "inversion": self.image}
        pictures |= {f"start_{number}": picture for number, picture in enumerate(self.images)}
        for name, picture in pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, "png")
            write_whole(where / f"{name}.png", buffer.getvalue())
        facts = {
            "tap": str(self.tap),
            "model": self.model,
            "seed": self.seed,
            "best": self.best,
            "losses": self.losses,
            "psnr": self.psnr,
            "config": asdict(self.config),
            "history": self.history,
        }
        write_whole(where / "inversion.json", (json.dumps(finite(facts), indent=1, allow_nan=False) + "\n").encode())
        return where

    def __repr__(self) -> str:
        """Say what it is in one line."""
        starts, _, height, width = self.tensor.shape
        return (
            f"Inversion({self.tap} of {self.model}: {starts} start{'s' if starts > 1 else ''} of {height}×{width} "
            f"pixels, loss {self.losses[self.best]:.3g}, PSNR {self.psnr[self.best]:.1f} dB)"
        )


def invert(
    image: ImageLike,
    tap: str | Tap,
    *,
    model: str | Extractor | None = None,
    config: InvertConfig | None = None,
    seed: int = 0,
    steps: int | None = None,
    loss: Loss | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> Inversion:
    """Make a picture whose feature equals that of an image, beginning from nothing but random numbers.

    Each start trains a network of its own that paints from fixed random numbers; the model that reads the pictures is
    never changed. The same seed gives the same bits; start 0 of two is start 0 of one, up to rounding.

    Args:
        image: One image: a path, a PIL image, an array or a tensor (3, height, width) in 0..1.
        tap: What is to be equal, such as "key@11" or "cls@11"; any tap of the model.
        model: A name of :func:`~vitfeats.list_models`, read at the settings' size and overlap; or an extractor, which
            keeps its own size and stride. None is the default model.
        config: The settings; None is ``InvertConfig()``, the preset "fast".
        seed: Of weights, inputs and noise.
        steps: Instead of the settings' steps. 0 gives what the untrained networks paint.
        loss: Instead of :func:`~vitfeats.appearance_loss` for ``cls`` taps and :func:`~vitfeats.identity_loss` (CLS
            included where there is one) for others.
        callback: Called at each step; ``True`` ends the run there.
        progress: Show a bar on stderr.
        device: Where a model named here runs.
        dtype: Its precision, as for :func:`~vitfeats.load_extractor`.

    Raises:
        ConfigError: If settings contradict the extractor, no gradient passes through it, or the loss is not a number.
        ShapeError: If the image is too small for the network's scales, or too large for memory.
        ImageError, TapError, UnknownFacetError: As for calling an extractor.
        KeyboardInterrupt: As it came, with the Inversion so far as its argument.

    Warns:
        RuntimeWarning: If the loss of a start is not finite: that start ends, with its last good picture.

    Example:
        >>> import vitfeats as vf
        >>> vf.invert(vf.samples.cat(), "key@11", model="mini", device="cpu", steps=0).tensor.shape
        torch.Size([1, 3, 112, 176])
    """
    config = InvertConfig() if config is None else config
    config = config if steps is None else replace(config, steps=steps)
    # Also where the caller switched gradients off: this is a training of its own.
    with torch.inference_mode(False), torch.enable_grad():
        extractor = _extractor(model, config, device, dtype)
        parsed = extractor.resolve(Tap.parse(tap))
        picture = load_image(image).detach().to(extractor.device)
        size = extractor.preprocess.network_size((picture.shape[1], picture.shape[2]))
        _check_scales(size, config)
        target = resize_images(picture[None], size, extractor.preprocess.interpolation)[0].clone()
        run = _Run(extractor.resized(size=size), parsed, target, config, seed, loss or _usual_loss(parsed))
        try:
            run.train(callback, progress)
        except KeyboardInterrupt as interrupt:
            interrupt.args = (run.result(),)
            raise
        return run.result()


def invert_layers(
    image: ImageLike,
    layers: Sequence[int | str] = (2, 5, 8, 11),
    facet: str = "cls",
    *,
    model: str | Extractor | None = None,
    config: InvertConfig | None = None,
    seed: int = 0,
    steps: int | None = None,
    loss: Loss | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> list[Inversion]:
    """Invert one facet at several layers; :func:`strip` draws them side by side.

    Args:
        image: As for :func:`invert`; so are the other arguments.
        layers: Block numbers, or names of layers; negative from the end.
        facet: What is inverted at each.
        model: As for :func:`invert`; a name is loaded once.
        config: As for :func:`invert`.
        seed: As for :func:`invert`, the same for each layer.
        steps: As for :func:`invert`.
        loss: As for :func:`invert`.
        callback: As for :func:`invert`; ``True`` ends the layer at hand.
        progress: As for :func:`invert`.
        device: As for :func:`invert`.
        dtype: As for :func:`invert`.

    Raises:
        ConfigError: If there is no layer.
        ImageError, ShapeError, TapError, UnknownFacetError: As for :func:`invert`, before the first is begun.
    """
    if not layers:
        raise ConfigError("expected at least one layer, got none; for example layers=(2, 5, 8, 11)")
    extractor = _extractor(model, InvertConfig() if config is None else config, device, dtype)
    taps = [extractor.resolve(Tap(facet, layer)) for layer in layers]
    settings: dict[str, Any] = {"config": config, "seed": seed, "steps": steps, "loss": loss, "callback": callback}
    return [invert(image, tap, model=extractor, progress=progress, **settings) for tap in taps]


def strip(inversions: Sequence[Inversion], *, side: int = 224) -> Image.Image:
    """Draw the target, then the best picture of each inversion, in a row, each below its tap.

    Args:
        inversions: Of one image, at one size.
        side: Height of a picture in pixels.

    Raises:
        ShapeError: If there is none, or their pictures differ in size.
        ConfigError: If the side is below 1.
    """
    if not inversions:
        raise ShapeError("expected at least one inversion, got none")
    sizes = {tuple(found.target.shape[1:]) for found in inversions}
    if len(sizes) > 1:
        raise ShapeError(f"expected inversions of one size, got {sorted(sizes)}; invert one image with one extractor")
    if side < 1:
        raise ConfigError(f"expected side of at least 1 pixel, got {side}")
    panels = [("target", to_pil(inversions[0].target)), *((str(found.tap), found.image) for found in inversions)]
    width = max(1, round(side * panels[0][1].width / panels[0][1].height))
    text = max(8, side // 14)
    head, gap = round(1.6 * text), max(2, side // 40)
    whole = Image.new("RGB", (len(panels) * (width + gap) - gap, head + side), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(text)
    for column, (label, picture) in enumerate(panels):
        pen.text((column * (width + gap) + 2, text // 6), label, fill="black", font=font)
        whole.paste(picture.resize((width, side), Image.Resampling.BICUBIC), (column * (width + gap), head))
    return whole


def self_similarity_pca(d: Descriptor) -> Float[Tensor, "batch 3 rows cols"]:
    """Return what is like what in each image, as colours in 0..1: PCA over the rows of its self-similarity matrix.

    The paper draws the structure of an image so, from keys of the last block. CLS is left out. The colours of one image
    say nothing about another's, whose matrix has other columns. Takes batch · tokens² · 4 bytes, and the time of an
    eigenvalue decomposition of (tokens × tokens): 28×28 tokens are fine, four times as many are not.

    Raises:
        ShapeError: If an image has fewer than three tokens.
    """
    rows = self_similarity(d.detach().to(torch.float32))
    like = replace(d, features=rows, cls=None, registers=None, heads=None)
    return torch.cat([PCA(3).fit(one).to_rgb(one) for one in like])


class _Run:
    """The training of all starts: one network and one optimiser each, and one pass of the model for all of them."""

    def __init__(
        self, extractor: Extractor, tap: Tap, target: Tensor, config: InvertConfig, seed: int, loss: Loss
    ) -> None:
        self.extractor, self.tap, self.target, self.config, self.seed = extractor, tap, target, config, seed
        self.loss = loss
        with torch.no_grad():
            self.wanted = extractor(target, tap)
        everyone = range(config.starts)
        self.networks, self.inputs = zip(*(self._made(start) for start in everyone), strict=True)
        self.optimisers = [torch.optim.Adam(network.parameters(), lr=config.lr) for network in self.networks]
        self.active = list(everyone)
        self.first: list[float] = [math.nan] * config.starts  # losses at the first step
        self.losses: list[float] = [math.nan] * config.starts
        self.pictures = torch.full((config.starts, *target.shape), 0.5, device=target.device)
        self.history: list[dict[str, Any]] = []

    def train(self, callback: Callback | None, progress: bool) -> None:
        """Take all steps; at the end only look, without noise."""
        from tqdm import tqdm

        total = self.config.steps
        for step in tqdm(range(total + 1), desc=f"invert {self.tap}", disable=not progress, leave=False):
            with torch.set_grad_enabled(step < total):
                painted = self._painted(step)
                values = self._values(painted, step)
            told = [math.nan if value is None else float(value.detach()) for value in values]
            self.history.append({"step": step, "losses": told})
            ended = callback is not None and self._is_ended(callback, step)
            if ended or step == total or not self.active:
                return
            self._step(step, painted, values)

    def result(self) -> Inversion:
        """Return what there is by now."""
        return Inversion(
            self.pictures.clone(),
            tuple(self.losses),
            list(self.history),
            self.target,
            self.tap,
            self.extractor.card.name,
            self.seed,
            self.config,
        )

    def _made(self, start: int) -> tuple[SkipNet, Tensor]:
        generator = _generator(self.seed, start, "weights")
        c = self.config
        network = SkipNet(c.inputs, 3, c.channels, kernels=c.kernels, padding="reflect", generator=generator)
        numbers = torch.randn(1, c.inputs, *self.target.shape[1:], generator=generator)
        return network.to(self.target.device), numbers.to(self.target.device)

    def _painted(self, step: int) -> dict[int, Tensor]:
        """Return the picture of each start that goes on, (1, 3, height, width)."""
        sigma = noise_at(self.config, self.tap, step)
        painted = {}
        for start in self.active:
            seen = self.inputs[start]
            if sigma:
                drawn = torch.randn(seen.shape, generator=_generator(self.seed, start, step))
                seen = seen + sigma * drawn.to(seen.device)
            painted[start] = self.networks[start](seen)
        return painted

    def _values(self, painted: dict[int, Tensor], step: int) -> list[Tensor | None]:
        """Return the loss of each start, None for those that are stopped; stop those whose loss is not finite."""
        values: list[Tensor | None] = [None] * self.config.starts
        whole = [start for start in self.active if bool(painted[start].isfinite().all())]
        if whole:
            out = self.extractor(torch.cat([painted[start] for start in whole]), self.tap)
            for row, start in enumerate(whole):
                values[start] = _checked(self.loss(out[row], self.wanted), needs_graph=torch.is_grad_enabled())
        for start in list(self.active):
            value = values[start]
            number = math.nan if value is None else float(value.detach())
            if math.isfinite(number):
                self.losses[start], self.pictures[start] = number, painted[start][0].detach()
                continue
            if step == 0 and start in whole:
                self.pictures[start] = painted[start][0].detach()  # not good, but all there is
            self._stop(start, step, number)
            values[start] = None
        return values

    def _stop(self, start: int, step: int, number: float) -> None:
        self.active.remove(start)
        warnings.warn(
            f"expected a finite loss, but that of start {start} is {number} at step {step} of {self.config.steps}; it "
            "ends with its last good picture. Try a smaller lr, or dtype='float32'",
            RuntimeWarning,
            stacklevel=5,
        )

    def _is_ended(self, callback: Callback, step: int) -> bool:
        best = min(range(len(self.losses)), key=lambda start: _or_infinity(self.losses[start]))
        told = {f"start_{start}": value for start, value in enumerate(self.losses)}
        return bool(callback(step, told, lambda: self.pictures[best].clone()))

    def _step(self, step: int, painted: dict[int, Tensor], values: list[Tensor | None]) -> None:
        objective = torch.zeros((), device=self.target.device)
        for start in self.active:
            value = values[start]
            assert value is not None
            if math.isnan(self.first[start]):
                self.first[start] = max(float(value.detach()), torch.finfo(torch.float32).tiny)
            # Relative to its beginning, so that a weight means the same for every model, tap and loss.
            objective = objective + value / self.first[start]
            if self.config.smooth:
                objective = objective + self.config.smooth * roughness(painted[start])
        parameters = [list(self.networks[start].parameters()) for start in self.active]
        # Not backward(): a module of the user's may require gradients, and must not gather ours.
        found = iter(torch.autograd.grad(objective, [parameter for group in parameters for parameter in group]))
        for start, group in zip(self.active, parameters, strict=True):
            for parameter in group:
                parameter.grad = next(found)
            for settings in self.optimisers[start].param_groups:
                settings["lr"] = scheduled(self.config.lr, self.config.schedule, step, self.config.steps)
            self.optimisers[start].step()


def noise_at(config: InvertConfig, tap: Tap, step: int) -> float:
    """Return the standard deviation of the noise that is added to the input at a step; 0 behind the last one."""
    if tap.facet != "cls" or step >= config.steps:
        return 0.0
    return next((sigma for share, sigma in reversed(config.noise) if step >= share * config.steps), 0.0)


def roughness(pictures: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference of neighbouring pixels, down and across."""
    return pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean()


def _extractor(
    model: str | Extractor | None, config: InvertConfig, device: str | torch.device, dtype: str | torch.dtype
) -> Extractor:
    if isinstance(model, Extractor):
        if device != "auto" or dtype != "auto":
            raise ConfigError("expected device= and dtype= with a model's name, got them with an extractor")
        extractor = model
    else:
        extractor = load_extractor(model, size=config.size, device=device, dtype=dtype)
        extractor = overlapping(extractor, config)
    if not extractor.differentiable:
        raise ConfigError(f"expected an extractor that gradients pass through, got {extractor!r}; try another model")
    return extractor


def overlapping(extractor: Extractor, config: InvertConfig) -> Extractor:
    """Return an extractor whose tokens overlap as the settings say, where its model can.

    Raises:
        ConfigError: If the overlap does not divide the patch.
    """
    if not extractor.overlaps or config.overlap == 1:
        return extractor
    patch = extractor.card.patch
    if patch % config.overlap:
        raise ConfigError(f"expected an overlap that divides the patch of {patch} pixels, got {config.overlap}")
    return extractor.resized(stride=patch // config.overlap)


def _usual_loss(tap: Tap) -> Loss:
    return appearance_loss if tap.facet == "cls" else identity_loss


def _checked(value: object, *, needs_graph: bool) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or (needs_graph and not value.requires_grad):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        graph = " without a graph" if isinstance(value, Tensor) and not value.requires_grad else ""
        raise ConfigError(
            f"expected a loss (out, target) that returns one number as a tensor with a graph to out, got {got}{graph}; "
            "for example identity_loss"
        )
    return value.reshape(())


def _check_scales(size: tuple[int, int], config: InvertConfig) -> None:
    """Refuse an image that some scale could not mirror at its borders, or that shrinks to a single pixel."""
    count = len(config.channels)
    sides = [config.kernels] * count if isinstance(config.kernels, int) else list(config.kernels)
    reach = max([2 ** (scale + 1) * max(1, side // 2) for scale, side in enumerate(sides)], default=1)
    if min(size) <= reach:
        raise ShapeError(
            f"expected a picture with sides above {reach} pixels for {count} scales, got {size[0]}×{size[1]}; raise "
            "size=, or leave out scales: InvertConfig(channels=(32, 32, 64))"
        )


def _generator(seed: int, start: int, what: int | str) -> torch.Generator:
    """Return a source of random numbers of its own for each seed, start and step (or the weights)."""
    mixed = hashlib.blake2b(f"{seed}/{start}/{what}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed) >> 1)


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf
