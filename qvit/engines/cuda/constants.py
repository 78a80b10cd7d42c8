"""An `IntegerModel`'s constants as the CUDA kernels read them: padded, folded, on the device; and which models have such."""

from qvit.engines.cuda.folded.activation import ActivationConstants
from qvit.engines.cuda.folded.arrays import COLUMN_PAD, Constants
from qvit.engines.cuda.folded.attention import AttentionConstants, ValueConstants
from qvit.engines.cuda.folded.heads import HeadConstants, doubles_q
from qvit.engines.cuda.folded.linear import CodeConstants, LinearConstants, Permuted
from qvit.engines.cuda.folded.margins import activation_margin, map_margin
from qvit.engines.cuda.folded.norm import NormConstants
from qvit.engines.cuda.folded.pixels import PixelConstants
from qvit.engines.cuda.folded.supported import HEAD_DIMS, MOST_WINDOW_TOKENS, check

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
    "map_margin",
]
