"""How much the codes of a tensor say."""

from __future__ import annotations

import numpy as np


def code_entropy(codes: np.ndarray) -> float:
    """Shannon entropy of integer codes of any shape, in bits a code: at most their width, reached if all are equally likely.

    An empty array has none (0.0). Source: Q-ViT, section 3.2, which maximises it for q and k.
    """
    if not codes.size:
        return 0.0
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    return abs(float((shares * np.log2(shares)).sum()))
