"""Run settings, as frozen dataclasses of the standard library: the command line reads them without torch."""

from vitfeats.configs.cosegmentation import COSEGMENT_PRESETS, CosegmentConfig, CosegmentPreset
from vitfeats.configs.demo import DemoConfig
from vitfeats.configs.diffusion import DIFFUSION_PRESETS, DiffusionConfig, DiffusionPreset
from vitfeats.configs.evaluation import MEANS, PCK_PROTOCOLS, PckProtocol, ProtocolName
from vitfeats.configs.extraction import ExtractorConfig
from vitfeats.configs.files import plain_config, read_config, write_config
from vitfeats.configs.inversion import INVERT_PRESETS, InvertConfig
from vitfeats.configs.presets import Preset
from vitfeats.configs.pretraining import PretrainConfig
from vitfeats.configs.splice import SPLICE_PRESETS, SpliceConfig
from vitfeats.configs.styling import STYLE_METHODS, STYLIZER_PRESETS, StyleMethod, TrainStylizerConfig
from vitfeats.configs.training import TrainDiffusionConfig, TrainHyperfeaturesConfig

__all__ = [
    "COSEGMENT_PRESETS",
    "CosegmentConfig",
    "CosegmentPreset",
    "DIFFUSION_PRESETS",
    "DemoConfig",
    "DiffusionConfig",
    "DiffusionPreset",
    "ExtractorConfig",
    "INVERT_PRESETS",
    "InvertConfig",
    "MEANS",
    "PCK_PROTOCOLS",
    "PckProtocol",
    "Preset",
    "PretrainConfig",
    "ProtocolName",
    "SPLICE_PRESETS",
    "STYLE_METHODS",
    "STYLIZER_PRESETS",
    "SpliceConfig",
    "StyleMethod",
    "TrainDiffusionConfig",
    "TrainHyperfeaturesConfig",
    "TrainStylizerConfig",
    "plain_config",
    "read_config",
    "write_config",
]
