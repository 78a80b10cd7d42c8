"""What a quantized model costs, how much its codes say, and whether two ways of running it agree.

`cost` and `entropy` need NumPy alone; `agreement` needs PyTorch. Reads `qvit.integer` and `qvit.layers`.
"""
