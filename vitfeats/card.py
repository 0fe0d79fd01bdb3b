"""The model card: everything vitfeats knows about a model, as one row of data."""

from dataclasses import dataclass

from vitfeats.errors import ConfigError
from vitfeats.grid import Size
from vitfeats.resize import check_interpolation, check_position_rule
from vitfeats.taps import Tap, TokenLayout

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ModelCard:
    """What a model is and how it wants its images.

    Attributes:
        name: The name ``load_extractor`` takes.
        family: For people: "DINO", "DINOv2", "CLIP", …
        source: Where it comes from: ``timm:ARCHITECTURE``, ``hf:ORG/NAME``, ``bundled:FILE``, a folder, or ``module``.
        patch: Side of a patch in pixels; of a convolutional network, its largest stride, to which sizes are snapped.
        depth: Number of transformer blocks, or of named layers.
        dim: Channels of a token; of a convolutional network, those of its default tap.
        heads: Attention heads of a block; None where there is no attention.
        prefix_tokens: Tokens before the patch tokens: CLS (if any) and registers.
        has_cls: Whether the first prefix token is CLS.
        default_size: Shorter side in pixels used when no size is asked for, or (height, width) where it is fixed.
        mean: Per-channel mean taken off images in 0..1.
        std: Per-channel standard deviation they are divided by.
        interpolation: How images are resized: "bicubic" or "bilinear", always antialiased.
        position_rule: A name of ``resize.POSITION_RULES``: how the release of this model resamples its position
            embedding; None where it has none (rotary) or the model is left to do as it does.
        default_tap: The tap read when none is asked for.
        layers: Names of the layers where a model names its layers (convolutional networks); empty where it numbers
            its blocks.
        licence: Licence of the weights, as their publishers state it.
        paper: The paper the weights come from.

    Raises:
        ConfigError: If the numbers contradict each other, or a rule is not known.
        TapError, UnknownFacetError: If the default tap is not one.
    """

    name: str
    family: str
    source: str
    patch: int
    depth: int
    dim: int
    heads: int | None
    prefix_tokens: int = 1
    has_cls: bool = True
    default_size: int | Size = 224
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    interpolation: str = "bicubic"
    position_rule: str | None = None
    default_tap: str = "key@-1"
    layers: tuple[str, ...] = ()
    licence: str = "unknown"
    paper: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be those of a model."""
        heads = 1 if self.heads is None else self.heads
        if min(self.patch, self.depth, self.dim, heads) < 1 or self.dim % heads:
            raise ConfigError(
                f"expected patch, depth, dim and heads of at least 1, and heads that divide dim, got {self}"
            )
        if self.layers and len(self.layers) != self.depth:
            raise ConfigError(f"expected depth to count the layers ({len(self.layers)}), got {self.depth}")
        if self.prefix_tokens < int(self.has_cls):
            raise ConfigError(f"expected prefix_tokens to count CLS, got {self.prefix_tokens} with has_cls=True")
        check_interpolation(self.interpolation)
        check_position_rule(self.position_rule)
        Tap.parse(self.default_tap)

    @property
    def registers(self) -> int:
        """Number of register tokens."""
        return self.prefix_tokens - int(self.has_cls)

    @property
    def usual_tap(self) -> str:
        """The default tap with its block counted from the start, for people."""
        tap = Tap.parse(self.default_tap)
        return str(tap if isinstance(tap.layer, str) else tap.resolved(self.depth))

    @property
    def layout(self) -> TokenLayout:
        """How this model lays out its token axis."""
        return TokenLayout(self.prefix_tokens, self.has_cls)
