"""An `IntegerModel`'s constants as the CUDA kernels read them: padded, folded, on the device; and which models have such."""

from qvit.engines.cuda.constants.activation import ActivationConstants
from qvit.engines.cuda.constants.arrays import COLUMN_PAD, Constants
from qvit.engines.cuda.constants.attention import AttentionConstants, ValueConstants
from qvit.engines.cuda.constants.heads import HeadConstants, doubles_q
from qvit.engines.cuda.constants.linear import CodeConstants, LinearConstants, Permuted
from qvit.engines.cuda.constants.margins import activation_margin
from qvit.engines.cuda.constants.norm import NormConstants
from qvit.engines.cuda.constants.pixels import PixelConstants
from qvit.engines.cuda.constants.supported import HEAD_DIMS, MOST_WINDOW_TOKENS, check

__all__ = [
    "COLUMN_PAD",
    "HEAD_DIMS",
    "MOST_WINDOW_TOKENS",
    "ActivationConstants",
    "AttentionConstants",
    "CodeConstants",
    "Constants",
    "HeadConstants",
    "LinearConstants",
    "NormConstants",
    "Permuted",
    "PixelConstants",
    "ValueConstants",
    "activation_margin",
    "check",
    "doubles_q",
]
