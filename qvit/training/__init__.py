"""Training: recipes, data, the loop, checkpoints and evaluation.

Reads `qvit.convert`, `qvit.calibration` and `qvit.distill`; used by `qvit.cli`. The way in is `qvit.training.engine.train`.
"""
