"""Style transfer in one pass: AdaAttN, SANet and AdaIN on the maps of a VGG, and their training."""

from vitfeats.apps.style_transfer.painting import Stylized, stylize, stylize_each
from vitfeats.apps.style_transfer.styles import colourfulness, usual_styles
from vitfeats.apps.style_transfer.stylizer import Stylizer, channels_of, load_stylizer
from vitfeats.apps.style_transfer.training import StylizerTrainer, TrainStylizerResult, train_stylizer

__all__ = [
    "Stylized",
    "Stylizer",
    "StylizerTrainer",
    "TrainStylizerResult",
    "channels_of",
    "colourfulness",
    "load_stylizer",
    "stylize",
    "stylize_each",
    "train_stylizer",
    "usual_styles",
]
