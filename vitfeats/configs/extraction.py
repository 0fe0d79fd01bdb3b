"""Settings of an extractor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExtractorConfig:
    """Which model reads, and how.

    Attributes:
        model: A name of `vitfeats models`, timm:NAME, hf:ORG/NAME or a folder. Default: mini, or $VITFEATS_MODEL.
        size: Shorter side of the network's input in pixels, or height and width; snapped to whole patches. Default:
            the model's own.
        stride: Step between tokens in pixels; must divide the patch. Default: the patch.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.
        dtype: Precision of the network; auto is float32 on a CPU and bfloat16 autocast on a GPU.
        norm: Apply the model's final norm to token and cls.
        norm_qk: Read queries and keys after the model's q/k norm.
        rope: Read queries and keys before or after the rotary embedding.
        checkpoint: Weight file to use instead of the published weights (safetensors, or a torch file of tensors).
    """

    model: str | None = None
    size: int | tuple[int, int] | None = None
    stride: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    norm: bool = False
    norm_qk: bool = False
    rope: Literal["pre", "post"] = "pre"
    checkpoint: Path | None = None
