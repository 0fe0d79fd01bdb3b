"""Features out of vision models: one call, one Descriptor, helpers on top.

>>> import vitfeats as vf
>>> d = vf.extract(vf.samples.cat(), layer=11, facet="key")
>>> d.features.shape[1] == d.grid.tokens
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Descriptor",
    "Descriptors",
    "Extractor",
    "Frame",
    "ImageError",
    "Matches",
    "MissingDependencyError",
    "ModelCard",
    "PCA",
    "PatchGrid",
    "ShapeError",
    "StoreError",
    "Tap",
    "TapError",
    "UnknownFacetError",
    "UnknownModelError",
    "VitFeatsError",
    "WeightsUnavailableError",
    "appearance_loss",
    "bulk",
    "content_loss",
    "correspond",
    "cosegment",
    "cosine_similarity",
    "evaluate_pck",
    "extract",
    "global_style_loss",
    "identity_loss",
    "invert",
    "list_models",
    "load_extractor",
    "local_style_loss",
    "log_bin",
    "match_mutual",
    "match_nearest",
    "match_ratio",
    "match_sinkhorn",
    "part_cosegment",
    "patterns",
    "plot",
    "register_model",
    "saliency",
    "samples",
    "self_similarity",
    "set_default_model",
    "similarity_map",
    "splice",
    "structure_loss",
    "stylize",
    "transfer_points",
    "upsample",
]

if TYPE_CHECKING:
    from vitfeats import patterns, plot, samples
    from vitfeats.api import extract, list_models, load_extractor, register_model, set_default_model
    from vitfeats.apps import bulk
    from vitfeats.apps.cosegmentation import cosegment, part_cosegment
    from vitfeats.apps.evaluation import evaluate_pck
    from vitfeats.apps.inversion import invert
    from vitfeats.apps.splice import splice
    from vitfeats.apps.style_transfer import stylize
    from vitfeats.attention_maps import saliency
    from vitfeats.card import ModelCard
    from vitfeats.descriptor import Descriptor, Descriptors
    from vitfeats.errors import (
        ConfigError,
        ImageError,
        MissingDependencyError,
        ShapeError,
        StoreError,
        TapError,
        UnknownFacetError,
        UnknownModelError,
        VitFeatsError,
        WeightsUnavailableError,
    )
    from vitfeats.extractors.base import Extractor
    from vitfeats.grid import Frame, PatchGrid
    from vitfeats.losses import (
        appearance_loss,
        content_loss,
        global_style_loss,
        identity_loss,
        local_style_loss,
        structure_loss,
    )
    from vitfeats.matching import (
        Matches,
        correspond,
        match_mutual,
        match_nearest,
        match_ratio,
        match_sinkhorn,
        transfer_points,
    )
    from vitfeats.pca import PCA
    from vitfeats.pooling import log_bin, upsample
    from vitfeats.similarity import cosine_similarity, self_similarity, similarity_map
    from vitfeats.taps import Tap

# Read on first use (PEP 562), so that `import vitfeats` loads neither torch nor any model library.
_HOME = {
    "vitfeats.apps.cosegmentation": ("cosegment", "part_cosegment"),
    "vitfeats.apps.evaluation": ("evaluate_pck",),
    "vitfeats.apps.inversion": ("invert",),
    "vitfeats.apps.splice": ("splice",),
    "vitfeats.apps.style_transfer": ("stylize",),
    "vitfeats.api": ("extract", "list_models", "load_extractor", "register_model", "set_default_model"),
    "vitfeats.attention_maps": ("saliency",),
    "vitfeats.card": ("ModelCard",),
    "vitfeats.descriptor": ("Descriptor", "Descriptors"),
    "vitfeats.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "vitfeats.extractors.base": ("Extractor",),
    "vitfeats.grid": ("Frame", "PatchGrid"),
    "vitfeats.losses": tuple(name for name in __all__ if name.endswith("_loss")),
    "vitfeats.matching": (
        "Matches",
        "correspond",
        "match_mutual",
        "match_nearest",
        "match_ratio",
        "match_sinkhorn",
        "transfer_points",
    ),
    "vitfeats.pca": ("PCA",),
    "vitfeats.pooling": ("log_bin", "upsample"),
    "vitfeats.similarity": ("cosine_similarity", "self_similarity", "similarity_map"),
    "vitfeats.taps": ("Tap",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("patterns", "plot", "samples"):
        return import_module(f"vitfeats.{name}")
    if name == "bulk":
        return import_module("vitfeats.apps.bulk")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vitfeats' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
