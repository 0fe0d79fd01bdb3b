"""The extractor for vision transformers of timm, transformers, and modules of the same build."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.card import ModelCard
from vitfeats.errors import ConfigError, ShapeError, TapError, UnknownFacetError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import PatchGrid, Size, as_pair
from vitfeats.hooks import Handler, Probe, Substitute, capture, find_module, unwrapped
from vitfeats.preprocess import Images, Prepared, Preprocess
from vitfeats.resize import resize_positions
from vitfeats.taps import FACETS, QueryKey, Reading, Site, Tap

Rope = Literal["pre", "post"]

_BEHIND_ATTENTION: tuple[Site, ...] = ("block", "attention_output")
_PROJECTIONS = ("query", "key", "value")  # in the order of a fused projection, and of an attention call


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a vision transformer are, as module paths; ``{}`` stands for the block's number.

    Attributes:
        block: A transformer block; its output is the facet ``token``.
        attention: Its attention module; its output, before the residual add, is the facet ``out``.
        qkv: One fused projection whose output is (batch, n, 3·dim): queries, keys, values; or None.
        query, key, value: Three projections with outputs (batch, n, dim), where there is no fused one. Where there is
            neither (BEiT, EVA-02 and DINOv3's ``_qkvb`` use the projection's weight and go around the module), queries
            and keys are read where they enter their norms, values where they enter the attention.
        query_norm, key_norm: Modules that normalise queries and keys, (batch, heads, n, d) in and out, or identities
            that stand in their place; or None.
        mlp_norm: The second norm of a block that is ``x + attention(norm(x))``, then ``x + mlp(mlp_norm(x))``; None for
            blocks of other builds.
        final_norm: The norm after the last block, or None.
        patch_projection: The strided convolution that makes the patch tokens.
        patch_input_positions: A module that derives rotary positions from the *image's* size, or None.
        rotary: Whether queries and keys are rotated after the projection.
        entry: The method that runs all blocks: ``forward`` or ``forward_features``.
        arguments: Keyword arguments that the entry needs.

    Raises:
        ConfigError: If some of ``query``, ``key`` and ``value`` are named and some are not.
    """

    block: str
    attention: str
    qkv: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    mlp_norm: str | None = None
    final_norm: str | None = None
    patch_projection: str = "patch_embed.proj"
    patch_input_positions: str | None = None
    rotary: bool = False
    entry: str = "forward"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an anatomy with some of the projections."""
        separate = (self.query, self.key, self.value)
        if self.qkv is None and None in separate and separate != (None, None, None):
            raise ConfigError(
                "expected the path of one fused projection, qkv=, or of three, query=, key= and value=, or of none, "
                f"got query={self.query!r}, key={self.key!r}, value={self.value!r}"
            )


class ViTExtractor(Extractor):
    """Reads keys, queries, values, tokens, CLS and attention of a vision transformer, by hooks alone.

    Nothing of the model is changed. An overlapping stride, another position rule, and keys after the rotation are had
    by standing in for single torch functions during the pass, in the calling thread only.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        preprocess: Preprocess,
        *,
        anatomy: Anatomy | None = None,
        dtype: str | torch.dtype = "auto",
        norm: bool = False,
        norm_qk: bool = False,
        rope: Rope = "pre",
    ) -> None:
        """Prepare to read a model.

        Args:
            model: A timm or transformers vision transformer, or a module that ``anatomy`` describes.
            card: What is known about it.
            preprocess: Size, stride and normalisation of its images.
            anatomy: Where its parts are; found by itself for timm and transformers models.
            dtype: See :func:`~vitfeats.extractors.base.autocast_type`.
            norm: Apply the final norm to ``token`` and ``cls`` (as DINOv2's ``get_intermediate_layers`` does).
            norm_qk: Read queries and keys after the model's q/k norm (models without one: the same).
            rope: "pre" reads queries and keys as projected, "post" after the rotation (models without: the same).

        Raises:
            ConfigError: If the settings contradict the model, or its build is not known.
        """
        super().__init__(model, card, preprocess, dtype)
        self.anatomy = find_anatomy(unwrapped(model)) if anatomy is None else anatomy
        self.norm, self.norm_qk, self.rope = norm, norm_qk, rope
        root = unwrapped(model)
        self._norms_qk = _has_norm(root, self.anatomy.key_norm)
        if rope not in ("pre", "post"):
            raise ConfigError(f"expected rope 'pre' or 'post', got {rope!r}")
        if rope == "post" and self.anatomy.rotary and self._norms_qk and not norm_qk:
            raise ConfigError(
                "expected norm_qk=True with rope='post': this model rotates keys after it has normed them"
            )
        if norm and isinstance(self._final_norm(root), nn.Identity | None):
            raise ConfigError(
                f"expected a model with a final norm over its tokens for norm=True, but {card.name} has none; "
                "leave norm=False"
            )
        self._projection = find_module(root, self.anatomy.patch_projection)

    @property
    def overlaps(self) -> bool:
        """Whether one convolution makes the patches, for images of any size."""
        root = unwrapped(self.model)
        return self._has_patch_convolution() and _only_size(root) is None and not _has_relative_positions(root)

    def resolve(self, tap: Tap) -> Tap:
        """Return the tap with its block counted from the start."""
        facet = FACETS[tap.facet]
        if facet.site == "residual":
            raise UnknownFacetError(
                f"expected a facet that {self.card.name} has, got {tap.facet!r}: it is of diffusion models; try "
                f"'{self.card.usual_tap}'"
            )
        if facet.needs_cls and not self.card.has_cls:
            having = ", ".join(n for n, facet in FACETS.items() if not facet.needs_cls and facet.site != "residual")
            raise UnknownFacetError(
                f"expected a facet that {self.card.name} has, got {tap.facet!r}: it has no CLS token; try {having}"
            )
        if tap.step is not None:
            raise TapError(f"expected a tap without a step, got '{tap}': only diffusion models have steps")
        return tap.resolved(self.card.depth)

    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        """Read the taps in one forward pass that ends at the deepest of them."""
        root = unwrapped(self.model)
        by_place: dict[tuple[str, str], list[tuple[Tap, Callable[[Any], Any]]]] = {}
        for tap in taps:
            place, select = self._place(tap)
            by_place.setdefault(place, []).append((tap, select))

        def reader(members: list[tuple[Tap, Callable[[Any], Any]]]) -> Callable[[Any], dict[Tap, Reading]]:
            def read(seen: Any) -> dict[Tap, Reading]:
                return {tap: FACETS[tap.facet].read(select(seen), self.card.layout) for tap, select in members}

            return read

        probes = {
            place: Probe(place[0], reader(members), place[1])  # type: ignore[arg-type] - `where` is one of its literals
            for place, members in by_place.items()
        }
        values = self._capture(root, batch, probes, self._block_for_cls(taps) if self.frugal else None)
        return {tap: reading for found in values.values() for tap, reading in found.items()}

    def attention(self, images: Images, layer: int) -> Float[Tensor, "batch heads n n"]:
        """Return softmax(q·kᵀ/√d) of a block, whole: (batch, heads, n, n), prefix tokens first."""
        index = Tap("key", layer).resolved(self.card.depth).layer
        path, select = self._query_key_place(index)
        probe = Probe(path[0], lambda seen: select(seen).attention(), path[1])  # type: ignore[arg-type]

        def work(batch: Prepared) -> Tensor:
            return self._capture(unwrapped(self.model), batch, {"attention": probe})["attention"]

        matrix, _ = self.run(images, work)
        return matrix

    def _capture(
        self, root: nn.Module, batch: Prepared, probes: Mapping[Any, Probe], for_cls: int | None = None
    ) -> dict[Any, Any]:
        self._check_size(root, batch)
        entry, arguments = self.anatomy.entry, dict(self.anatomy.arguments)
        substitutes, attend = self._substitutes(batch.grid), {}
        if for_cls is not None and self.anatomy.mlp_norm is not None:
            # CLS alone attends and is added to; the sum with the other tokens, which nobody reads, stays as it was.
            substitutes.append(Substitute(self.anatomy.mlp_norm.format(for_cls), lambda tokens: (tokens[:, :1],)))
            attend[self.anatomy.attention.format(for_cls)] = _attend_for_first
        return capture(
            self.model,
            probes,
            lambda model: getattr(model, entry)(batch.pixels, **arguments),
            handlers=self._handlers(batch.grid),
            attend=attend,
            substitutes=substitutes,
        )

    def _block_for_cls(self, taps: Sequence[Tap]) -> int | None:
        """Return the deepest block that is read, if ``cls`` is all that is read behind its projections."""
        last = max(tap.layer for tap in taps if isinstance(tap.layer, int))
        behind = {tap.facet for tap in taps if tap.layer == last and FACETS[tap.facet].site in _BEHIND_ATTENTION}
        return last if behind == {"cls"} else None

    # Where a facet is read --------------------------------------------------------------------------------------

    def _place(self, tap: Tap) -> tuple[tuple[str, str], Callable[[Any], Any]]:
        """Return ((module path, where), function from what the hook sees to what the facet reads)."""
        anatomy, layer = self.anatomy, tap.layer
        site: Site = FACETS[tap.facet].site
        if site == "block":
            return (anatomy.block.format(layer), "output"), self._normed if self.norm else _same
        if site == "attention_output":
            return (anatomy.attention.format(layer), "output"), _same
        if site == "query_key":
            return self._query_key_place(layer)
        normed = anatomy.query_norm if site == "query" else anatomy.key_norm if site == "key" else None
        if site != "value" and self.rope == "post" and anatomy.rotary:
            return self._attention_place(site, layer)
        if self.norm_qk and normed is not None:
            return (normed.format(layer), "output"), _joined
        if anatomy.qkv is None and anatomy.key is None:
            return self._attention_place(site, layer) if normed is None else ((normed.format(layer), "input"), _joined)
        return self._projection_place(site, layer)

    def _attention_place(self, site: Site, layer: int | str) -> tuple[tuple[str, str], Callable[[Any], Any]]:
        position = _PROJECTIONS.index(site)
        path = self.anatomy.attention.format(layer)
        # Heads that share their keys get copies of them there: one of each group is what was projected.
        module = find_module(unwrapped(self.model), path)
        group = 1 if site == "query" else getattr(module, "num_kv_groups", 1)
        return (path, "attention"), lambda seen: _joined(_argument(seen, position)[:, ::group])

    def _projection_place(self, site: Site, layer: int | str) -> tuple[tuple[str, str], Callable[[Any], Any]]:
        if self.anatomy.qkv is not None:
            third = _PROJECTIONS.index(site)
            return (self.anatomy.qkv.format(layer), "output"), lambda seen: _fused(seen).select(2, third)
        path = getattr(self.anatomy, site)
        return (path.format(layer), "output"), _same

    def _query_key_place(self, layer: int | str) -> tuple[tuple[str, str], Callable[[Any], QueryKey]]:
        anatomy, heads = self.anatomy, self.card.heads
        assert heads is not None  # a card with numbered blocks has them
        if anatomy.qkv is not None and not anatomy.rotary and not self._norms_qk:
            attention = find_module(unwrapped(self.model), anatomy.attention.format(layer))
            scale = float(getattr(attention, "scale", (self.card.dim // heads) ** -0.5))

            def select(seen: Tensor) -> QueryKey:
                query, key, _ = _fused(seen).unflatten(-1, (heads, -1)).permute(2, 0, 3, 1, 4)
                return QueryKey(query, key, scale)

            return (anatomy.qkv.format(layer), "output"), select
        return (anatomy.attention.format(layer), "attention"), _query_key

    def _normed(self, seen: Tensor) -> Tensor:
        norm = self._final_norm(unwrapped(self.model))
        assert norm is not None
        return norm(seen)

    def _final_norm(self, root: nn.Module) -> nn.Module | None:
        return None if self.anatomy.final_norm is None else find_module(root, self.anatomy.final_norm)

    # What is done differently from the model's own pass ----------------------------------------------------------

    def _check_size(self, root: nn.Module, batch: Prepared) -> None:
        overlapping = self.preprocess.stride != self.card.patch
        if overlapping and not self._has_patch_convolution():
            raise ConfigError(
                f"expected stride {self.card.patch} (the patch) for {self.card.name}, got {self.preprocess.stride}: it "
                "does not make its patches with one convolution, so they cannot overlap"
            )
        if overlapping and _has_relative_positions(root):
            raise ConfigError(
                f"expected stride {self.card.patch} (the patch) for {self.card.name}, got {self.preprocess.stride}: "
                "its relative position biases belong to a grid without overlap"
            )
        fixed = _only_size(root)
        if fixed is None:
            return
        size = batch.grid.network_size
        if fixed != size or overlapping:
            raise ShapeError(
                f"expected images of {fixed} (height, width) without overlap for this module, got {size} at "
                f"stride {self.preprocess.stride}; leave size= and stride= out, or create it with "
                "dynamic_img_size=True (BEiT: img_size=) to use others"
            )

    def _has_patch_convolution(self) -> bool:
        return getattr(self._projection, "kernel_size", None) == as_pair(self.card.patch)

    def _handlers(self, grid: PatchGrid) -> dict[Callable[..., Any], Handler]:
        handlers: dict[Callable[..., Any], Handler] = {}
        overlapping = self.preprocess.stride != self.card.patch
        if overlapping:
            handlers[F.conv2d] = self._strided
        if self.card.position_rule is not None or overlapping:
            handlers[F.interpolate] = self._positions(grid)
        return handlers

    def _strided(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the patch projection with our stride, any other convolution as it is."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given["weight"] is not getattr(self._projection, "weight", None):
            return func(*args, **kwargs)
        return func(**{**given, "stride": as_pair(self.preprocess.stride)})

    def _positions(self, grid: PatchGrid) -> Handler:
        """Return a stand-in for ``F.interpolate`` that resamples position embeddings by the card's rule."""
        rule, dim = self.card.position_rule, self.card.dim

        def handler(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stored = args[0]
            if stored.ndim != 4 or tuple(stored.shape[:2]) != (1, dim) or kwargs.get("mode") != "bicubic":
                return func(*args, **kwargs)
            if rule is None:  # as the model does it, for the grid that there is
                own = {name: value for name, value in kwargs.items() if name not in ("size", "scale_factor")}
                return func(stored, size=(grid.rows, grid.cols), **own)
            return resize_positions(stored, grid.rows, grid.cols, rule)

        return handler

    def _substitutes(self, grid: PatchGrid) -> list[Substitute]:
        """Tell rotary positions that are derived from the image how large a grid without overlap would be."""
        path, patch = self.anatomy.patch_input_positions, self.card.patch
        if path is None or self.preprocess.stride == patch:
            return []

        def stand_in(pixels: Tensor) -> tuple[Tensor]:
            return (pixels.new_empty(1).expand(1, 3, grid.rows * patch, grid.cols * patch),)

        return [Substitute(path, stand_in)]


# Finding the parts of a model ---------------------------------------------------------------------------------------

# Other attention modules of timm have the same parts, but cut tokens into windows (Hiera, SAM), attend over channels
# (XCiT) or twice (DiffAttention): what is read there would not be what its name says.
_TIMM_ATTENTION = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.vision_transformer", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.beit", "Attention"),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"),
}

_TIMM_PRE_NORM = {("timm.models.vision_transformer", "Block"), ("timm.models.eva", "EvaBlock")}


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a timm or transformers vision transformer by its structure.

    Raises:
        ConfigError: If its build is not known, or it has no tokens that keep their place from block to block; the
            message says which, and how to describe the model if it is another build.
    """
    if is_timm_transformer(model):
        return _timm_anatomy(model)
    if hasattr(model, "config"):
        return _transformers_anatomy(model)
    raise _unknown_build(model, "it has neither `blocks` and `patch_embed` (timm) nor a `config` (transformers)")


def is_timm_transformer(model: nn.Module) -> bool:
    """Tell whether a module has the parts of timm's transformers; not whether each of its taps can be read."""
    in_blocks = isinstance(getattr(model, "blocks", None), nn.ModuleList | nn.Sequential)
    return in_blocks and any(hasattr(model, name) for name in ("patch_embed", "embeds"))


def _timm_anatomy(model: nn.Module) -> Anatomy:
    blocks: Any = model.blocks
    attention = getattr(blocks[0], "attn", None)
    for kind in {_name(getattr(block, "attn", None)) for block in blocks}:
        if kind[0].startswith("timm.") and kind not in _TIMM_ATTENTION:
            raise _unknown_build(model, f"its blocks attend in a way of their own ({kind[1]})")
    if not any(isinstance(getattr(attention, name, None), nn.Module) for name in ("qkv", "k_proj")):
        raise _unknown_build(model, "its blocks have no `attn.qkv` and no `attn.k_proj`")

    def path(name: str) -> str | None:
        return f"blocks.{{}}.attn.{name}" if isinstance(getattr(attention, name, None), nn.Module) else None

    # With biases of their own, the projection's weight is used without the module: its hook would never fire. With
    # relative positions, attention is more than queries and keys: all is read where the attention is called.
    bypassed = any(getattr(attention, name, None) is not None for name in ("q_bias", "rel_pos"))
    return Anatomy(
        block="blocks.{}",
        attention="blocks.{}.attn",
        qkv=None if bypassed else path("qkv"),
        query=path("q_proj"),
        key=path("k_proj"),
        value=path("v_proj"),
        query_norm=path("q_norm"),
        key_norm=path("k_norm"),
        mlp_norm="blocks.{}.norm2" if all(_name(block) in _TIMM_PRE_NORM for block in blocks) else None,
        final_norm="norm" if isinstance(getattr(model, "norm", None), nn.Module) else None,
        patch_projection="patch_embed.proj" if hasattr(model, "patch_embed") else "embeds.proj",
        rotary=any(name.startswith(("rope", "rotary")) for name, _ in model.named_children()),
        entry="forward_features" if hasattr(model, "forward_features") else "forward",
    )


def _transformers_anatomy(model: nn.Module) -> Anatomy:
    config: Any = model.config
    depth = getattr(config, "num_hidden_layers", None)
    # Module paths moved three times in one year of transformers, so the blocks are found by their number.
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    if not lists:
        raise _unknown_build(model, f"no list of {depth} blocks was found")
    path, blocks = next(iter(lists.items()))
    inner = next((name for name, module in blocks[0].named_modules() if hasattr(module, "k_proj")), None)
    if inner is None:
        raise _unknown_build(model, "its blocks have no `k_proj`")
    names = dict(model.named_modules())
    projection = next((name for name, module in names.items() if isinstance(module, nn.Conv2d)), None)
    if projection is None:
        raise _unknown_build(model, "it has no patch projection")
    attention = f"{path}.{{}}.{inner}"
    takes_flag = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
    rotary = next((name for name in names if name.rpartition(".")[2] == "rope_embeddings"), None)
    return Anatomy(
        block=f"{path}.{{}}",
        attention=attention,
        query=f"{attention}.q_proj",
        key=f"{attention}.k_proj",
        value=f"{attention}.v_proj",
        final_norm=next((name for name in ("layernorm", "post_layernorm", "norm") if name in names), None),
        patch_projection=projection,
        patch_input_positions=rotary,
        rotary=rotary is not None,
        arguments={"interpolate_pos_encoding": True} if takes_flag else {},
    )


def _name(module: object) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _unknown_build(model: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"expected a vision transformer built as in timm or transformers, got {type(model).__name__}: {why}; "
        "if it is one of another build, describe it with anatomy=Anatomy(block='…{}', attention='…', key='…', …)"
    )


def _has_relative_positions(root: nn.Module) -> bool:
    """Tell whether biases belong to pairs of tokens (transformers' BEiT), made for a grid without overlap."""
    return any(name.rpartition(".")[2] == "relative_position_bias" for name, _ in root.named_modules())


def _only_size(root: nn.Module) -> Size | None:
    """Return the one size that a network takes: timm builds for one size unless told otherwise."""
    fixed = getattr(getattr(root, "patch_embed", None), "img_size", None)
    in_timm = type(root).__module__.startswith("timm.")
    return None if fixed is None or getattr(root, "dynamic_img_size", not in_timm) else tuple(fixed)


def _has_norm(root: nn.Module, path: str | None) -> bool:
    return path is not None and not isinstance(find_module(root, path.format(0)), nn.Identity)


# What the hooks see -------------------------------------------------------------------------------------------------


def _same(seen: Tensor) -> Tensor:
    return seen


def _fused(seen: Tensor) -> Float[Tensor, "batch n 3 dim"]:
    """Split a fused projection's (batch, n, 3·dim) into its thirds; a view."""
    return seen.unflatten(-1, (3, -1))


def _joined(seen: Tensor) -> Float[Tensor, "batch n dim"]:
    """Bring (batch, heads, n, d) to (batch, n, heads·d)."""
    return seen.transpose(1, 2).flatten(2)


def _argument(seen: tuple[tuple[Any, ...], dict[str, Any]], position: int) -> Tensor:
    """Return query (0), key (1) or value (2) of a scaled-dot-product attention call."""
    args, kwargs = seen
    return args[position] if position < len(args) else kwargs[_PROJECTIONS[position]]


def _query_key(seen: tuple[tuple[Any, ...], dict[str, Any]]) -> QueryKey:
    args, kwargs = seen
    query, key = _argument(seen, 0), _argument(seen, 1)
    scale = kwargs.get("scale")
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    return QueryKey(query, key, query.shape[-1] ** -0.5 if scale is None else float(scale), mask)


def _attend_for_first(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Attend for the first token alone; the others get what it got, which nobody may read."""
    if len(args) > 3 or kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
        return func(*args, **kwargs)
    query, key, value = (_argument((args, kwargs), position) for position in range(3))
    more = {name: given for name, given in kwargs.items() if name not in _PROJECTIONS}
    return func(query[:, :, :1], key, value, **more).expand(-1, -1, query.shape[2], -1)
