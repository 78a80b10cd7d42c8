"""Quantized drop-ins for timm's modules.

Read `qvit.quantizers`; used by `qvit.convert`, `qvit.calibration` and `qvit.integer.freeze`.
"""
