"""Pictures to learn from, and their classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Collection:
    """Pictures and their classes.

    Attributes:
        pictures: (height, width, 3) of type uint8 each.
        labels: Number of each picture's class, -1 for none.
        classes: Their names.
    """

    pictures: Sequence[np.ndarray]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        named: Mapping[str, np.ndarray],
        *,
        unlabelled: Sequence[str] = (),
        classes: Sequence[str] | None = None,
    ) -> "Collection":
        """Take the folder that a picture lies in for its class.

        Args:
            named: Pictures by name, from :func:`vitfeats.pictures.open_pictures`.
            unlabelled: Folders that are no class.
            classes: Those there are, for a second collection; None takes all folders, if there are two at least.
        """
        folders = [name.rpartition("/")[0] for name in named]
        if classes is None:
            classes = sorted({folder for folder in folders if folder and folder not in unlabelled})
            classes = classes if len(classes) > 1 else ()
        number = {name: index for index, name in enumerate(classes)}
        labels = torch.tensor([number.get(folder, -1) for folder in folders])
        # Those that are read when they are asked for are not all asked for here.
        pictures = list(named.values()) if isinstance(named, dict) else _Pictures(named)
        return cls(pictures, labels, tuple(classes))


class _Pictures(Sequence[np.ndarray]):
    """The values of a mapping by number, none of them read before it is asked for."""

    def __init__(self, named: Mapping[str, np.ndarray]) -> None:
        self._named, self._names = named, list(named)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override] - no slices: they would read all of it
        return self._named[self._names[index]]
