"""Training-time quantizers: each turns a float tensor into its values and its codes, and simulates what the engines run.

Reads `qvit.spec`; used by `qvit.layers`, `qvit.calibration` and the reference engine (`exact_matmul`).
"""
