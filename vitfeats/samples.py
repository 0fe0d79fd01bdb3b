"""Real photographs to try things on, read from the packages that carry them; vitfeats itself ships no picture.

>>> from vitfeats import samples
>>> samples.cat().size
(451, 300)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vitfeats.errors import ConfigError, nearest_names


@dataclass(frozen=True)
class Licence:
    """Where a sample comes from and on what terms.

    Attributes:
        credit: Photographer or source.
        licence: Terms.
        package: The package that carries the file.
    """

    credit: str
    licence: str
    package: str


LICENCES: dict[str, Licence] = {
    "astronaut": Licence("NASA (Eileen Collins)", "public domain", "scikit-image"),
    "grace_hopper": Licence("US Navy, James S. Davis (Grace Hopper)", "public domain", "matplotlib"),
    "cat": Licence("Stefan van der Walt (Chelsea the cat)", "CC0", "scikit-image"),
    "coffee": Licence("Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0", "scikit-image"),
    "stereo": Licence(
        "Middlebury 2014 stereo benchmark, Motorcycle (Scharstein et al.)", "published for research use", "scikit-image"
    ),
    "china": Licence("danielbuechele, flickr 6061409035", "CC BY 2.0", "scikit-learn"),
    "flower": Licence("vultilion, flickr 6056698931", "CC BY 2.0", "scikit-learn"),
    "brick": Licence("cc0textures.com, Bricks25", "CC0", "scikit-image"),
    "grass": Licence("linolafett, DeviantArt", "CC0", "scikit-image"),
    "gravel": Licence("cc0textures.com, Gravel04", "CC0", "scikit-image"),
}
"""Credit and licence of every sample."""


def astronaut() -> Image.Image:
    """Return a portrait of Eileen Collins, 512×512."""
    return _skimage("astronaut")


def grace_hopper() -> Image.Image:
    """Return a portrait of Grace Hopper, 512×600 (width × height)."""
    from matplotlib import cbook

    file: Any = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(file) as image:
        return image.convert("RGB")


def portrait_pair() -> tuple[Image.Image, Image.Image]:
    """Return two portraits of different people: :func:`astronaut` and :func:`grace_hopper`."""
    return astronaut(), grace_hopper()


def cat() -> Image.Image:
    """Return a cat's face, 451×300 (width × height)."""
    return _skimage("chelsea")


def coffee() -> Image.Image:
    """Return a cup of coffee on a table, 600×400 (width × height)."""
    return _skimage("coffee")


def china() -> Image.Image:
    """Return a Chinese temple, 640×427 (width × height)."""
    return _sklearn("china.jpg")


def flower() -> Image.Image:
    """Return a dahlia, 640×427 (width × height)."""
    return _sklearn("flower.jpg")


def texture(name: str) -> Image.Image:
    """Return a grey texture as RGB, 512×512: "brick", "grass" or "gravel".

    Raises:
        ConfigError: If there is no such texture.
    """
    known = ("brick", "grass", "gravel")
    if name not in known:
        raise ConfigError(f"expected a texture, got {name!r}. {nearest_names(name, known)}")
    return _skimage(name)


def stereo_pair() -> tuple[Image.Image, Image.Image, Float[np.ndarray, "500 741"]]:
    """Return (left, right, disparity) of a motorcycle in a garage, rectified, 741×500 (width × height).

    The disparity is in pixels, in the left image's frame: what is at (x, y) on the left is at (x − disparity[y, x], y)
    on the right. It is 7 to 60, and infinite where unknown (7 % of the pixels).
    """
    from skimage import data

    left, right, disparity = data.stereo_motorcycle()
    return Image.fromarray(left), Image.fromarray(right), disparity


def load(name: str) -> list[Image.Image]:
    """Return the images of a sample by its name, one of :data:`NAMES`.

    Raises:
        ConfigError: If there is no such sample.
    """
    if name not in _NAMED:
        raise ConfigError(f"expected a sample, got {name!r}. {nearest_names(name, _NAMED)}")
    return _NAMED[name]()


_NAMED: dict[str, Callable[[], list[Image.Image]]] = {
    "portraits": lambda: list(portrait_pair()),
    "stereo": lambda: list(stereo_pair()[:2]),
    "textures": lambda: [texture(name) for name in ("brick", "grass", "gravel")],
    "astronaut": lambda: [astronaut()],
    "grace_hopper": lambda: [grace_hopper()],
    "cat": lambda: [cat()],
    "coffee": lambda: [coffee()],
    "china": lambda: [china()],
    "flower": lambda: [flower()],
}

NAMES = tuple(_NAMED)
"""What :func:`load` knows."""


def _skimage(name: str) -> Image.Image:
    from skimage import data

    return Image.fromarray(getattr(data, name)()).convert("RGB")


def _sklearn(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))
