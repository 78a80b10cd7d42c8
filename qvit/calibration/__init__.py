"""Calibration: everything that a quantized model needs from data before it is trained or run.

Explicit, once, before the optimizer and before DDP; never inside a forward pass. Reads `qvit.layers` and `qvit.families`.
"""

from qvit.calibration.calibrate import calibrate

__all__ = ["calibrate"]
