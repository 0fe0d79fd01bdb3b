"""Augmented crops of one image, each named by a number: the same seed and number give the same crop, in any order.

What is drawn depends on nothing but the seed and the number, so a run that is resumed at step 500 sees what it would
have seen, and nothing has to be kept of a generator's state.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

JITTER = (0.4, 0.4, 0.2, 0.1)
"""Largest changes of brightness, contrast and saturation (factors 1 ± x) and hue (± x turns) in Splice."""

BLUR = (0.1, 2.0)
"""Smallest and largest standard deviation of the blur in pixels; its kernel is 3 pixels wide."""


def numbered(seed: int, *numbers: int) -> torch.Generator:
    """Return a source of random numbers (on the CPU) that depends on the seed and the numbers alone.

    Args:
        seed: At least 0.
        *numbers: What the draw is for, each at least 0: a step, a view, which image.
    """
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def flipped(image: Float[Tensor, "1 3 h w"], probability: float, rng: torch.Generator) -> Float[Tensor, "1 3 h w"]:
    """Mirror left and right, with a probability."""
    return image.flip(3) if _happens(probability, rng) else image


def jittered(image: Float[Tensor, "1 3 h w"], probability: float, rng: torch.Generator) -> Float[Tensor, "1 3 h w"]:
    """Change brightness, contrast, saturation and hue by up to :data:`JITTER`, in random order, with a probability."""
    if not _happens(probability, rng):
        return image
    amounts = [_uniform(-amount, amount, rng) for amount in JITTER]
    changes = (
        lambda x: tv.adjust_brightness(x, 1 + amounts[0]),
        lambda x: tv.adjust_contrast(x, 1 + amounts[1]),
        lambda x: tv.adjust_saturation(x, 1 + amounts[2]),
        lambda x: tv.adjust_hue(x, amounts[3]),
    )
    for index in torch.randperm(len(changes), generator=rng).tolist():
        image = changes[index](image)
    return image


def blurred(image: Float[Tensor, "1 3 h w"], probability: float, rng: torch.Generator) -> Float[Tensor, "1 3 h w"]:
    """Blur with a 3×3 Gaussian of a random width, with a probability."""
    if not _happens(probability, rng):
        return image
    return tv.gaussian_blur(image, [3, 3], [_uniform(*BLUR, rng)] * 2)


def square_crop(image: Float[Tensor, "1 3 h w"], smallest: float, rng: torch.Generator) -> Float[Tensor, "1 3 s s"]:
    """Cut out a random square whose side is ``smallest`` to 1 times the height, and at most the width."""
    height, width = image.shape[-2:]
    side = max(1, min(round(_uniform(smallest * height, height, rng)), width))
    top = int(torch.randint(height - side + 1, (), generator=rng))
    left = int(torch.randint(width - side + 1, (), generator=rng))
    return image[..., top : top + side, left : left + side]


def _happens(probability: float, rng: torch.Generator) -> bool:
    return float(torch.rand((), generator=rng)) < probability


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))
