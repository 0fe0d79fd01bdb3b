"""A plug-in that adds a model: histograms of oriented gradients.

The histograms are those of Dalal and Triggs (CVPR 2005). A plug-in is a network, a card that says what is known about
it, something that reads it, and an entry point. Where the network is a vision transformer or gives maps, vitfeats reads
it by itself; this one has an extractor of its own, because its cells may overlap.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfeats import ModelCard, Tap, TapError, UnknownFacetError
from vitfeats.api import Row
from vitfeats.extractors.base import Extractor
from vitfeats.hooks import Probe, capture
from vitfeats.preprocess import Prepared
from vitfeats.taps import Reading

CELL, ORIENTATIONS = 8, 9


class Gradients(nn.Module):
    """How strongly grey values change along each orientation: (batch, orientations, height, width)."""

    def __init__(self) -> None:
        """Turn one derivative filter to every orientation."""
        super().__init__()
        angles = torch.arange(ORIENTATIONS) * math.pi / ORIENTATIONS
        across = torch.tensor([[-1.0, 0.0, 1.0]] * 3) / 6
        turned = angles.cos()[:, None, None] * across + angles.sin()[:, None, None] * across.T
        self.filters = nn.Parameter(turned[:, None], requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Filter the mean of the colours, with borders repeated."""
        grey = F.pad(pixels.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        return F.conv2d(grey, self.filters).abs()


class Cells(nn.Module):
    """The mean over each cell: (batch, orientations, rows, cols)."""

    def forward(self, gradients: Tensor, stride: int) -> Tensor:
        """Pool cells that start every ``stride`` pixels."""
        return F.avg_pool2d(gradients, CELL, stride)


class Blocks(nn.Module):
    """Each cell with its right, lower and lower right neighbour, at length 1: (batch, 4·orientations, rows, cols)."""

    def forward(self, cells: Tensor) -> Tensor:
        """Repeat the border where a cell has no neighbour."""
        rows, cols = cells.shape[-2:]
        wide = F.pad(cells, (0, 1, 0, 1), mode="replicate")
        joined = torch.cat([wide[..., r : r + rows, c : c + cols] for r in (0, 1) for c in (0, 1)], 1)
        return F.normalize(joined, dim=1, eps=1e-3)


class Hog(nn.Module):
    """The three steps, as modules that hooks can reach."""

    def __init__(self) -> None:
        """Make the steps."""
        super().__init__()
        self.gradients, self.cells, self.blocks = Gradients(), Cells(), Blocks()

    def forward(self, pixels: Tensor, stride: int = CELL) -> Tensor:
        """Return the blocks of (batch, 3, height, width) images in 0..1."""
        return self.blocks(self.cells(self.gradients(pixels), stride))


class HogExtractor(Extractor):
    """Reads ``out@cells`` and ``out@blocks``, with any stride that divides the cell."""

    def resolve(self, tap: Tap) -> Tap:
        """Refuse what there is not; count layers from either end."""
        names = self.card.layers
        if tap.facet != "out":
            raise UnknownFacetError(
                f"expected the facet 'out' of {self.card.name}, got {tap.facet!r}; try 'out@blocks'"
            )
        if isinstance(tap.layer, int):
            return Tap("out", names[int(tap.resolved(len(names)).layer)])
        if tap.layer not in names:
            raise TapError(f"expected one of {', '.join(names)} of {self.card.name}, got {tap.layer!r}")
        return tap

    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        """Read the taps in one pass that ends at the deepest."""
        probes = {tap: Probe(str(tap.layer), _tokens) for tap in taps}
        return capture(self.model, probes, lambda model: model(batch.pixels, self.preprocess.stride))  # type: ignore[return-value]


def _tokens(seen: Tensor) -> Reading:
    return Reading(seen.flatten(2).transpose(1, 2).to(torch.float32, copy=True).contiguous())


ROWS = (
    Row(
        ModelCard(
            name="hog8",
            family="HOG",
            source="module",
            patch=CELL,
            depth=2,
            dim=4 * ORIENTATIONS,
            heads=None,
            prefix_tokens=0,
            has_cls=False,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            default_tap="out@blocks",
            layers=("cells", "blocks"),
            licence="no weights",
            paper="Dalal and Triggs, Histograms of Oriented Gradients for Human Detection, CVPR 2005",
        ),
        loader=lambda card, checkpoint: Hog(),
        kind=HogExtractor,
    ),
)
