"""Sources that end the process that reads them, but not the one that made them; in a module that others can import."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from jaxtyping import Float
from torch import Tensor

from vitfeats.apps.bulk.sources import Files

_reads = itertools.count(1)


class Tiring(Files):
    """Files of which no process can read sixty; who tries leaves a line in ``deaths`` beside their folder."""

    def __init__(self, ids: Sequence[str], folder: Path, driver: int | None = None) -> None:
        super().__init__(ids, folder)
        self.driver = os.getpid() if driver is None else driver

    def image(self, number: int) -> Float[Tensor, "3 height width"]:
        if os.getpid() != self.driver and self.ends(number):
            with (self.folder.parent / "deaths").open("a") as file:
                file.write(f"{self.ids[number]}\n")
            os._exit(1)
        return super().image(number)

    def ends(self, number: int) -> bool:
        """Tell whether reading an image is the end."""
        return next(_reads) % 60 == 0

    def part(self, start: int, stop: int) -> Self:
        return type(self)(self.ids[start:stop], self.folder, self.driver)


class Deadly(Tiring):
    """Files one of which, ``a/two.png``, ends whoever reads it."""

    def ends(self, number: int) -> bool:
        return self.ids[number] == "a/two.png"
