"""How much the codes of a tensor say."""

from __future__ import annotations

import numpy as np


def code_entropy(codes: np.ndarray) -> float:
    """Shannon entropy of integer codes of any shape, in bits a code: at most their width, reached if all are equally likely.

    An empty array has none (0.0). Source: Q-ViT, section 3.2, which maximises it for q and k.
    """
    return count_entropy(np.unique(codes, return_counts=True)[1])


def count_entropy(counts: np.ndarray) -> float:
    """The same from how often each code occurs, [codes], zeros allowed; 0.0 where none does."""
    counts = counts[counts > 0]
    if not counts.size:
        return 0.0
    shares = counts / counts.sum()
    return abs(float((shares * np.log2(shares)).sum()))
