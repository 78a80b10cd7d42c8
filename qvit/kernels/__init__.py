"""Fused training kernels in Triton: each does in one pass over memory what `qvit.layers` does in many.

They run in training steps on a GPU (`qvit.kernels.switch.fused`); everywhere else the plain modules run, which are their
reference: same formulas, same gradients, tested against each other at odd shapes. Fused arithmetic may round differently in
the last bit, so evaluation always runs the plain modules, which the integer engines reproduce bit for bit.

Three conventions hold in all of them:

- **Codes carry the gradient of values.** A tensor of codes that leaves a kernel is differentiable, and the gradient that comes
  back for it is that of the dequantized value ``scale * code + offset``. So only codes lie in memory.
- **Codes are whole numbers in the autocast type.** Up to 8 bits, and with half a step up to 7, they are exact in bfloat16.
- **Scales and offsets come expanded to what the kernel reads** (one value, or one a channel); autograd sums their gradients
  back to the granularity they are learned at.

Nothing here knows about modules or specs; `qvit.layers` decides which kernel may stand in for what.
"""
