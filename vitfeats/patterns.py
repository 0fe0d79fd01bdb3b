"""Pictures drawn by formulas, in the manner of paintings, prints and crafts: styles to learn from, without a download.

>>> from vitfeats import patterns
>>> patterns.draw("mosaic", 256, seed=3).size
(256, 256)

Every kind has structure of 4 to 40 pixels, whatever the size of the picture, laid over a few large areas of colour.
The same kind, size and seed give the same picture.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator
from PIL import Image, ImageDraw

from vitfeats.errors import ConfigError, ShapeError, nearest_names

SMALLEST = 16
"""Shortest side of a picture, in pixels."""

_FINE = 2  # what PIL draws without smooth edges is drawn this many times larger, and reduced


def draw(kind: str, size: int | tuple[int, int] = 256, seed: int = 0) -> Image.Image:
    """Return a picture of one kind, RGB.

    Args:
        kind: One of :data:`KINDS`.
        size: Side of a square, or (height, width), in pixels; at least :data:`SMALLEST`.
        seed: Of the colours and of all that is drawn, at least 0. A seed has the same colours in every kind.

    Raises:
        ConfigError: If there is no such kind, or the seed is negative.
        ShapeError: If a side is too short.
    """
    _check(size, seed)
    if kind not in _KINDS:
        raise ConfigError(f"expected a kind of pattern, got {kind!r}. {nearest_names(kind, _KINDS)}")
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    colours = _palette(rng)
    return _KINDS[kind](rng, colours, height, width)


def usual(count: int, size: int | tuple[int, int] = 256, seed: int = 0) -> Iterator[Image.Image]:
    """Iterate over many pictures, each with a seed of its own, the kinds by turns in the order of :data:`KINDS`.

    Args:
        count: How many; more of them begin with the same ones.
        size: As for :func:`draw`.
        seed: Different seeds have no picture in common.

    Raises:
        ConfigError: If the count or the seed is negative.
        ShapeError: If a side is too short.
    """
    _check(size, seed)
    if count < 0:
        raise ConfigError(f"expected count of at least 0, got {count}")
    # A sequence of seeds, since seed + number would give neighbouring seeds many pictures in common.
    seeds = (int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) for number in range(count))
    return (draw(KINDS[number % len(KINDS)], size, own) for number, own in enumerate(seeds))


# What the kinds share ------------------------------------------------------------------------------------------------


def _check(size: int | tuple[int, int], seed: int) -> None:
    sides = (size, size) if isinstance(size, int) else size
    if len(sides) != 2 or min(sides) < SMALLEST:
        raise ShapeError(f"expected a size of at least {SMALLEST} pixels, or (height, width) of them, got {size}")
    if seed < 0:
        raise ConfigError(f"expected a seed of at least 0, got {seed}")


def _palette(rng: Generator) -> Float[np.ndarray, "6 3"]:
    """Return colours from dark to light, in 0..1: two or three hues that go together, drawn in OKLCh."""
    hue = rng.uniform(0, 2 * np.pi)
    apart = np.radians(rng.choice([30, 60, 120, 150, 180, 210]))
    hues = hue + rng.permutation([0, 0, 0, apart, apart, -apart / 2]) + rng.normal(0, 0.12, 6)
    light = np.array([0.27, 0.42, 0.55, 0.67, 0.79, 0.92]) + rng.normal(0, 0.02, 6)
    chroma = rng.uniform(0.10, 0.19, 6) * np.array([0.6, 1, 1, 1, 0.9, 0.4])
    return _from_oklab(light, chroma * np.cos(hues), chroma * np.sin(hues))


def _from_oklab(light: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return sRGB in 0..1 of colours in OKLab (Ottosson, A perceptual color space for image processing, 2020)."""
    cones = np.stack(
        [
            light + 0.3963377774 * a + 0.2158037573 * b,
            light - 0.1055613458 * a - 0.0638541728 * b,
            light - 0.0894841775 * a - 1.2914855480 * b,
        ],
        -1,
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cones**3 @ to_linear.T, 0, 1)
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _noise(rng: Generator, height: int, width: int, scale: float) -> Float[np.ndarray, "height width"]:
    """Return a smooth field with hills about ``scale`` pixels wide, evenly spread over 0..1."""
    rows, cols = (int(np.ceil(side / scale)) + 3 for side in (height, width))
    coarse = Image.fromarray(rng.standard_normal((rows, cols)).astype(np.float32))
    fine = coarse.resize((int(cols * scale) + 1, int(rows * scale) + 1), Image.Resampling.BICUBIC)
    field = np.asarray(fine)[int(scale) :, int(scale) :][:height, :width]
    low, high = np.quantile(field, [0.03, 0.97])
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1)


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (x, y) of the pixels' centres, each (height, width)."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    return x, y


def _step(value: np.ndarray, edge: float | np.ndarray, soft: float | np.ndarray) -> np.ndarray:
    """Return 0 below ``edge`` and 1 above it, smooth over ``soft`` on each side."""
    t = np.clip((value - edge) / (2 * soft) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _shade(colours: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Return the palette's colours at tones 0..1, dark to light, mixed between neighbours: (..., 3)."""
    at = np.clip(tone, 0, 1) * (len(colours) - 1)
    low = np.minimum(at.astype(int), len(colours) - 2)
    part = (at - low)[..., None]
    return colours[low] * (1 - part) + colours[low + 1] * part


def _means(tone: np.ndarray, piece: np.ndarray) -> Float[np.ndarray, " pieces"]:
    """Return the mean tone of each piece, given the piece's number for each pixel; 0 for a number without pixels."""
    return np.bincount(piece.ravel(), tone.ravel()) / np.maximum(1, np.bincount(piece.ravel()))


def _picture(pixels: Float[np.ndarray, "height width 3"]) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def _mixed(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> np.ndarray:
    return under + (over - under) * share[..., None]


def _ink(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (np.clip(colour, 0, 1) * 255).astype(int).tolist()
    return red, green, blue


# The kinds -----------------------------------------------------------------------------------------------------------


def _strokes(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Brush strokes of several bristles that follow a flow, broad ones first."""
    tone, angle = _noise(rng, height, width, 70), _noise(rng, height, width, 90) * 2.5 * np.pi
    image = Image.new("RGB", (width * _FINE, height * _FINE), _ink(colours[1]))
    pen = ImageDraw.Draw(image)
    for breadth, length, cover in ((12, 36, 3.0), (7, 26, 2.0), (4, 16, 0.7)):
        count = int(cover * height * width / (breadth * length)) + 1
        paths = _flow(rng, angle, count, length)
        x, y = (np.clip(paths[:, 2, i], 0, side - 1).astype(int) for i, side in ((0, width), (1, height)))
        shades = _shade(colours, tone[y, x] + rng.normal(0, 0.17, count))
        heading = np.diff(paths, axis=1, append=paths[:, -1:] * 2 - paths[:, -2:-1])
        across = np.stack([-heading[..., 1], heading[..., 0]], -1)
        across /= np.linalg.norm(across, axis=-1, keepdims=True) + 1e-9
        bristles = np.linspace(-0.5, 0.5, max(3, breadth // 2))
        light = rng.normal(0, 0.06, (count, len(bristles)))
        lines = (paths[:, None] + across[:, None] * (bristles * breadth)[:, None, None]) * _FINE
        thick = int(np.ceil(1.5 * breadth / len(bristles) * _FINE))
        for stroke, shade, lights in zip(lines.tolist(), shades, light, strict=True):
            for line, lighter in zip(stroke, lights, strict=True):
                pen.line([tuple(p) for p in line], fill=_ink(shade + lighter), width=thick, joint="curve")
    return image.resize((width, height), Image.Resampling.BOX)


def _flow(rng: Generator, angle: np.ndarray, count: int, length: float) -> Float[np.ndarray, "count 5 2"]:
    """Return lines of five points along the directions of ``angle``, spread over the picture and a little beyond."""
    height, width = angle.shape
    point = rng.uniform((-8, -8), (width + 8, height + 8), (count, 2))
    path = [point]
    for _ in range(4):
        x, y = (np.clip(point[:, i], 0, side - 1).astype(int) for i, side in ((0, width), (1, height)))
        point = point + np.stack([np.cos(angle[y, x]), np.sin(angle[y, x])], -1) * length / 4
        path.append(point)
    return np.stack(path, 1)


def _glass(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Panes of coloured glass in lead."""
    side = rng.uniform(20, 34)
    nearest, to_lead, pane = _cells(rng, height, width, side)
    tone = _means(_noise(rng, height, width, 60), pane)
    tone = tone + rng.normal(0, 0.22, len(tone))
    streaks = _noise(rng, height, width, 7) * 0.22 - 0.11
    glow = 0.16 - 0.30 * nearest / side
    pixels = _shade(colours[1:], tone[pane]) + (streaks + glow)[..., None]
    lead = 1 - _step(to_lead, 1.7, 0.9)
    pixels = _mixed(pixels, colours[0] * 0.35, lead)
    # Light along the middle of the lead makes it round.
    return _picture(pixels + (0.16 * (1 - _step(to_lead, 0.5, 0.5)))[..., None])


def _cells(rng: Generator, height: int, width: int, side: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each pixel, the distance to the nearest of scattered points, that to its cell's edge, and its number.

    The points are one in each square of a lattice, so that only those of 5×5 squares can be nearest: the time and the
    memory do not depend on how many there are.
    """
    rows, cols = int(height / side) + 6, int(width / side) + 6
    points = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), -1) - 2 + rng.uniform(0.05, 0.95, (rows, cols, 2))
    points = (points * side).astype(np.float32)
    x, y = _grid(height, width)
    row, col = (y / side).astype(int) + 2, (x / side).astype(int) + 2
    shape = (height, width)
    first, second = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
    owner, next_owner = np.zeros(shape, int), np.zeros(shape, int)
    for down in range(-2, 3):
        for right in range(-2, 3):
            number = (row + down) * cols + col + right
            at = points.reshape(-1, 2)[number]
            squared = (at[..., 0] - x) ** 2 + (at[..., 1] - y) ** 2
            closer, between = squared < first, (squared >= first) & (squared < second)
            next_owner = np.where(closer, owner, np.where(between, number, next_owner))
            second = np.where(closer, first, np.where(between, squared, second))
            owner, first = np.where(closer, number, owner), np.where(closer, squared, first)
    flat = points.reshape(-1, 2)
    apart = np.linalg.norm(flat[owner] - flat[next_owner], axis=-1)
    return np.sqrt(first), (second - first) / (2 * apart + 1e-6), owner


def _mosaic(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Small square stones in rows that bend around a place."""
    side = rng.uniform(8, 12)
    x, y = _grid(height, width)
    centre = rng.uniform(-0.3, 1.3, 2) * (width, height)
    wobble = [(_noise(rng, height, width, 60) - 0.5) * 30 for _ in range(2)]
    x, y = x - centre[0] + wobble[0], y - centre[1] + wobble[1]
    radius = np.hypot(x, y)
    row = (radius / side).astype(int)
    around = np.maximum(1, np.round(2 * np.pi * (row + 0.5)))  # whole stones in every row
    along = (np.arctan2(y, x) / (2 * np.pi) + 0.5 + rng.uniform(0, 1, int(row.max()) + 1)[row]) % 1 * around
    _, stone = np.unique(row * 100_000 + along.astype(int), return_inverse=True)
    # The nearer of the two pairs of edges, in pixels.
    edge = np.minimum(np.abs(radius / side % 1 - 0.5), 1), np.abs(along % 1 - 0.5)
    inside = (0.5 - np.maximum(*edge)) * side
    tone = _means(_noise(rng, height, width, 55), stone)
    shades = _shade(colours, np.round((tone + rng.normal(0, 0.10, len(tone))) * 5) / 5)
    pixels = (shades + rng.normal(0, 0.045, (len(tone), 1)))[stone]
    bevel = 0.10 * (1 - _step(inside, 2.2, 1.0)) * np.sign(radius / side % 1 - 0.5)
    grout = _shade(colours, np.array(0.95)) * 0.55 + 0.2
    return _picture(_mixed(pixels - bevel[..., None], grout, 1 - _step(inside, 1.0, 0.7)))


def _hatching(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Washes of colour under pen lines that cross where it is dark."""
    x, y = _grid(height, width)
    tone, wash = _noise(rng, height, width, 50), _noise(rng, height, width, 80)
    paper = _shade(colours[2:], np.round(wash * 3) / 3) * 0.8 + 0.2
    pixels = paper + (0.08 * (_noise(rng, height, width, 5) - 0.5))[..., None]
    start = rng.uniform(0, np.pi)
    bend = _noise(rng, height, width, 90) * 40
    for number, (turn, inked) in enumerate(((0.0, 0.85), (1.1, 0.55), (2.2, 0.3))):
        period = rng.uniform(5.0, 7.5)
        across = x * np.cos(start + turn) + y * np.sin(start + turn) + bend + 2 * _noise(rng, height, width, 14)
        far = np.abs((across / period) % 1 - 0.5) * period  # from the line's middle, in pixels
        pressed = 0.35 + 1.3 * np.clip(inked - tone, 0, 1) + 0.5 * (_noise(rng, height, width, 11) - 0.5)
        line = (1 - _step(far, pressed, 0.55)) * _step(inked - tone, 0.0, 0.03)
        pixels = _mixed(pixels, colours[(0, 0, 1)[number]], line * 0.92)
    return _picture(pixels)


def _marbling(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Bands of ink on water, drawn out into swirls."""
    x, y = (at / _FINE for at in _grid(height * _FINE, width * _FINE))
    swirls = rng.integers(3, 6) * max(1, round(height * width / 65536))
    for _ in range(swirls):
        at, reach = rng.uniform(0, 1, 2) * (width, height), rng.uniform(35, 70)
        away = np.hypot(x - at[0], y - at[1])
        turn = rng.choice([-1, 1]) * rng.uniform(1.8, 3.4) * np.exp(-((away / reach) ** 2))
        cos, sin = np.cos(turn), np.sin(turn)
        x, y = at[0] + (x - at[0]) * cos - (y - at[1]) * sin, at[1] + (x - at[0]) * sin + (y - at[1]) * cos
    comb = rng.uniform(18, 30)
    y = y + 9 * np.sin(x * 2 * np.pi / comb) + 26 * _noise(rng, height * _FINE, width * _FINE, 40 * _FINE)
    band = y / rng.uniform(7, 10)
    number = np.floor(band).astype(int)
    order = rng.integers(0, 6, 997)
    order[1:] = np.where(order[1:] == order[:-1], (order[1:] + 1) % 6, order[1:])  # neighbours differ, nearly always
    part = band - number
    pixels = _mixed(colours[order[number % 997]], colours[order[(number + 1) % 997]], _step(part, 0.92, 0.08))
    vein = 1 - _step(np.abs(part - 0.5), 0.06, 0.05)
    pixels = _mixed(pixels, colours[order[(number + 3) % 997]], vein * (number % 3 == 0))
    return _picture(pixels).resize((width, height), Image.Resampling.BOX)


def _waves(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Overlapping scales of concentric arcs, as printed from wood."""
    x, y = _grid(height, width)
    x = x + 10 * (_noise(rng, height, width, 70) - 0.5)
    y = y + 10 * (_noise(rng, height, width, 70) - 0.5)
    radius = rng.uniform(17, 26)
    step = radius / 2
    far, owner = np.full((height, width), radius, np.float32), np.zeros((height, width), int)
    top = np.ceil(y / step).astype(int) + 2
    # Lower rows lie over higher ones: from the highest that is not wholly covered to the lowest that reaches a pixel.
    for up in (3, 2, 1, 0):
        row = top - up
        offset = (row % 2) * radius
        col = np.round((x - offset) / (2 * radius)).astype(int)
        away = np.hypot(x - offset - col * 2 * radius, y - row * step)
        over = away < radius
        far = np.where(over, away, far)
        owner = np.where(over, row * 613 + col * 3571, owner)
    tone = _noise(rng, height, width, 60)
    rings = rng.integers(3, 5)
    own = rng.normal(0, 0.10, 4093)[owner % 4093]
    ground = _shade(colours[2:], tone + own)
    arc = far / radius * rings
    line = 1 - _step(np.abs(arc % 1 - 0.5), 0.24, 0.09)
    pixels = _mixed(ground, _shade(colours[:3], tone + own), line)
    pixels = _mixed(pixels, colours[5], _step(far / radius, 0.93, 0.03))
    grain = _noise(rng, height, width * 6, 12)[:, ::6] - 0.5
    return _picture(pixels + 0.10 * grain[..., None])


def _dots(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Dots of pure colours that mix only in the eye."""
    tone = _noise(rng, height, width, 60)
    image = Image.new("RGB", (width * _FINE, height * _FINE), _ink(colours[5] * 0.6 + 0.4))
    pen = ImageDraw.Draw(image)
    for radius, spacing in ((4.0, 8.0), (3.4, 8.0), (2.6, 9.0)):
        rows, cols = int(height / spacing) + 2, int(width / spacing) + 2
        points = np.stack(np.meshgrid(np.arange(cols), np.arange(rows)), -1) + rng.uniform(-0.4, 0.4, (rows, cols, 2))
        points = rng.permutation(points.reshape(-1, 2) * spacing)
        x, y = (np.clip(points[:, i], 0, side - 1).astype(int) for i, side in ((0, width), (1, height)))
        number = np.clip(np.round(tone[y, x] * 5 + rng.normal(0, 0.8, len(points))), 0, 5).astype(int)
        radii = radius * rng.uniform(0.8, 1.2, len(points))
        shades = colours[number] + rng.normal(0, 0.05, (len(points), 3))
        for (cx, cy), r, shade in zip((points * _FINE).tolist(), (radii * _FINE).tolist(), shades, strict=True):
            pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_ink(shade))
    return image.resize((width, height), Image.Resampling.BOX)


def _weave(rng: Generator, colours: np.ndarray, height: int, width: int) -> Image.Image:
    """Threads over and under each other, in stripes of colours both ways."""
    thick = rng.uniform(6, 9)
    x, y = _grid(height, width)
    x = (x + 8 * _noise(rng, height, width, 60)) / thick
    y = (y + 8 * _noise(rng, height, width, 60)) / thick
    col, row = x.astype(int), y.astype(int)
    upright, level = (_stripes(rng, int(n.max()) + 1)[n] for n in (col, row))
    over = (col + row * rng.choice([1, -1])) % 4 < 2  # a twill: two over, two under, a step further in every row
    across = np.where(over, x % 1, y % 1) - 0.5
    along = np.where(over, y, x)
    rounded = np.sqrt(np.clip(1 - (across * 1.9) ** 2, 0, 1))
    fibre = np.sin((along * 2.2 + across * 2.5) * 2 * np.pi)
    threads = colours[np.where(over, upright, level)]
    number = np.where(over, col, row + 500) % 997
    lit = 0.45 + 0.62 * rounded + 0.09 * fibre + rng.normal(0, 0.05, 997)[number]
    return _picture(threads * lit[..., None])


def _stripes(rng: Generator, count: int) -> Int[np.ndarray, " count"]:
    """Return a colour for each thread: stripes of 1 to 6 threads, in an order that comes again."""
    widths = rng.integers(1, 7, 6)
    return np.resize(np.repeat(rng.permutation(6), widths), count)


_KINDS: dict[str, Callable[[Generator, np.ndarray, int, int], Image.Image]] = {
    "strokes": _strokes,
    "glass": _glass,
    "mosaic": _mosaic,
    "hatching": _hatching,
    "marbling": _marbling,
    "waves": _waves,
    "dots": _dots,
    "weave": _weave,
}

KINDS = tuple(_KINDS)
"""What :func:`draw` knows."""
