"""What the tabs Splice, Style and Hyperfeatures make. Plain functions and iterators, without a page."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitfeats import plot
from vitfeats.api import load_extractor
from vitfeats.apps.demo.drawing import cells
from vitfeats.apps.demo.intake import Picture, reduced
from vitfeats.apps.demo.studio import Job, Studio, seen_at
from vitfeats.apps.splice import splice
from vitfeats.apps.style_transfer import stylize
from vitfeats.configs import DiffusionConfig, Preset, SpliceConfig, StyleMethod
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.extractors.hyperfeatures import HyperfeatureExtractor
from vitfeats.grid import Frame, PatchGrid
from vitfeats.pca import PCA
from vitfeats.preprocess import to_pil
from vitfeats.taps import Tap

SIDE = 512  # longest side of what is spliced and painted here
HYPERFEATURES = "hyperfeatures:ddpm_mini"
PANEL = 190  # longer side of a panel of hyperfeatures
NETWORK = 64  # shorter side of what the bundled diffusion model sees: that of its training
GOING = ("Waiting", "Step", "Reading")  # how sentences about a run that goes on begin
UP = tuple(f"up{block}.res{number}" for block in range(4) for number in range(3))
CHAINS = {10: 6, 20: 5, 50: 6}  # steps of a chain, and how many of them are shown
LEAST_TELLING = 1.0  # seconds between two pictures of a run

Colours = Literal["network", "content", "style"]


@dataclass(frozen=True, eq=False)
class Progress:
    """How far a run is.

    Attributes:
        picture: What it has made so far, or None.
        curves: Its losses, or None.
        told: A sentence.
    """

    picture: Image.Image | None
    curves: Image.Image | None
    told: str


def spliced(
    studio: Studio,
    structure: str | None,
    appearance: str | None,
    *,
    model: str = "mini",
    preset: Preset = "fast",
    steps: int | None = None,
    seed: int = 0,
) -> Iterator[Progress]:
    """Paint the structure of one picture with the appearance of another, and tell how far it is.

    Raises:
        ConfigError: If a picture is missing, or settings do not do.
        ImageError: If a picture cannot be taken.
    """
    first = studio.picture(structure, "a picture for the structure")
    second = studio.picture(appearance, "a picture for the appearance")
    config = SpliceConfig.preset(preset, **({} if steps is None else {"steps": steps}))
    if not studio.choices(model).looks:
        raise ConfigError(f"expected a model with CLS for the appearance, got '{model}'; choose mini")
    judge = studio.work(lambda: studio.extractor(model))
    history: list[Mapping[str, Any]] = []

    def work(tell: Callable[[Progress], None]) -> None:
        began = told = time.monotonic()

        def after(step: int, losses: Mapping[str, float], render: Callable[[], Tensor]) -> None:
            nonlocal told
            history.append({"step": step, **losses})
            now = time.monotonic()
            if now - told < LEAST_TELLING and step:
                return
            left = (now - began) / (step + 1) * (config.steps - step - 1)
            words = f"Step {step + 1} of {config.steps}, about {left:.0f} s left."
            tell(_progress(to_pil(render()), history, words))
            told = time.monotonic()

        sized = judge.resized(size=config.size, stride=config.stride)
        made = splice(
            reduced(first.image, SIDE),
            reduced(second.image, SIDE),
            model=sized,
            config=config,
            seed=seed,
            callback=after,
        )
        took = time.monotonic() - began
        tell(_progress(made.image, made.history, f"Done: {len(made.history)} steps in {took:.0f} s."))

    yield Progress(None, None, "Waiting for the runs before this one.")
    yield from Job(work, studio.long)


def styled(
    studio: Studio,
    content: str | None,
    style: str | None,
    *,
    method: StyleMethod = "adaattn",
    strength: float = 1.0,
    colours: Colours = "network",
) -> Progress:
    """Paint a picture in the style of another.

    Raises:
        ConfigError: If a picture is missing, or a setting is not known.
        ImageError, ShapeError: If a picture cannot be taken, or is too small.
    """
    first, second = studio.picture(content, "a content"), studio.picture(style, "a style")
    if colours not in ("network", "content", "style"):
        raise ConfigError(f"expected the colours of the network, the content or the style, got {colours!r}")

    def paint() -> Image.Image:
        made = stylize(
            reduced(first.image, SIDE),
            second.image,
            method=method,
            strength=strength,
            device=studio.config.device,
        )
        if colours != "network":
            made = made.recoloured(first.image if colours == "content" else second.image)
        return made.image

    began = time.monotonic()
    painted = studio.painting.submit(paint).result()
    told = (
        f"{method}, strength {strength:g}, {painted.width}×{painted.height} pixels, {time.monotonic() - began:.1f} s."
    )
    return Progress(painted, None, told)


def hyperfeatures(
    studio: Studio, path: str | None, *, layers: Sequence[str] = UP[2::3], steps: int = 20
) -> Iterator[Progress]:
    """Draw components of layers of the bundled diffusion model along the inversion of a picture, as they come.

    Raises:
        ConfigError: If there is no picture, or no layer, or the chain has no such length.
        ImageError: If the picture cannot be taken.
    """
    picture = studio.picture(path)
    if not layers or not set(layers) <= set(UP):
        raise ConfigError(f"expected at least one of the layers {', '.join(UP)}, got {', '.join(layers) or 'none'}")
    if steps not in CHAINS:
        raise ConfigError(f"expected a chain of {', '.join(map(str, CHAINS))} steps, got {steps}")
    chain = DiffusionConfig.preset("hyperfeatures", steps=steps, keep=CHAINS[steps])
    rows = [name for name in UP if name in layers]

    def work(tell: Callable[[Progress], None]) -> None:
        began = time.monotonic()
        extractor = studio.once(
            ("chain", steps), lambda: load_extractor("ddpm_mini", device=studio.config.device, diffusion=chain)
        )
        assert isinstance(extractor, DiffusionExtractor)
        taps = {Tap("residual", name, step): (name, step) for name in rows for step in chain.kept_steps}
        drawn: dict[tuple[str, int], Image.Image] = {}

        def on_map(tap: Tap, seen: Tensor) -> None:
            drawn[taps[tap]] = _components(seen, tap, picture)
            words = f"Reading: {len(drawn)} of {len(taps)} maps, {time.monotonic() - began:.0f} s."
            if len(drawn) % len(rows) == 0:  # a step is whole
                tell(Progress(_sheet(drawn, rows, chain.kept_steps, picture), None, words))

        sized = extractor.resized(size=seen_at(picture, NETWORK, extractor))
        assert isinstance(sized, DiffusionExtractor)
        sized.run(picture.image, lambda batch: sized.stream(batch, list(taps), on_map))
        sheet = _sheet(drawn, rows, chain.kept_steps, picture)
        words = (
            f"Done: {len(rows)} layers at {len(chain.kept_steps)} of {steps} steps, {time.monotonic() - began:.0f} s."
        )
        tell(Progress(sheet, None, words))

    yield Progress(None, None, "Waiting for the runs before this one.")
    yield from Job(work, studio.long)


def mixing(studio: Studio) -> Image.Image:
    """Draw the mixing weights of the bundled aggregation network."""

    def draw() -> Image.Image:
        hyper = load_extractor(HYPERFEATURES, device=studio.config.device)
        assert isinstance(hyper, HyperfeatureExtractor)
        network = hyper.model.aggregation
        return plot.mixing(network.mixing, network.layers, network.steps)

    return studio.once("mixing", draw)


def _components(seen: Tensor, tap: Tap, picture: Picture) -> Image.Image:
    """Paint the first three components of one map."""
    rows, cols = seen.shape[-2:]
    grid = PatchGrid(rows, cols, 1, 1)
    frame = Frame(grid.network_size, grid.network_size)
    d = Descriptor(seen.detach().float().flatten(2).transpose(1, 2), grid, (frame,), tap, "ddpm_mini")
    return cells(PCA(3).fit(d).to_rgb(d)[0], grid, _panel(picture))


def _panel(picture: Picture) -> tuple[int, int]:
    """Return (width, height) of a picture's panel on a sheet."""
    width, height = picture.image.size
    longer = max(width, height)
    return max(1, round(PANEL * width / longer)), max(1, round(PANEL * height / longer))


def _sheet(
    drawn: Mapping[tuple[str, int], Image.Image], rows: Sequence[str], steps: Sequence[int], picture: Picture
) -> Image.Image:
    """Put panels on a sheet: a row a layer, a column a step; grey where there is none yet."""
    width, height = _panel(picture)
    left, top, gap = 90, 26, 6
    across_one, down_one = max(width, 70) + gap, max(height, 24) + gap  # labels fit
    sheet = Image.new("RGB", (left + len(steps) * across_one, top + len(rows) * down_one), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, step in enumerate(steps):
        across = left + column * across_one
        end = {0: ", clean", len(steps) - 1: ", noise"}.get(column, "")
        pen.text((across, 3), f"step {step}{end}", fill="black", font=font)
        for row, name in enumerate(rows):
            down = top + row * down_one
            pen.text((4, down + height / 2 - 10), name, fill="black", font=font)
            panel = drawn.get((name, step))
            if panel is None:
                pen.rectangle((across, down, across + width - 1, down + height - 1), fill=(225, 225, 225))
            else:
                sheet.paste(panel, (across, down))
    return sheet


def _progress(picture: Image.Image, history: list[Any], told: str) -> Progress:
    return Progress(picture, plot.losses(history), told)
