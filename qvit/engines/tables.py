"""What engines compute once from an `IntegerModel`: codes of 8-bit pixels, and the tokens that do not depend on the image."""

from __future__ import annotations

import numpy as np

from qvit.architecture import VitArchitecture
from qvit.integer.model import IntegerModel


def pixel_codes(model: IntegerModel) -> np.ndarray:
    """Codes of 8-bit pixels, as the reference engine computes them: uint8 [channels, 256]."""
    patch, preprocessing, channels = model.patch.input, model.preprocessing, model.architecture.in_chans
    assert patch.offset is not None
    offset = patch.offset.reshape(channels, -1)[:, :1]
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :], (channels, 1, 256))
    x = preprocessing.normalise(levels)[:, 0] * np.asarray(preprocessing.std, np.float32)[:, None]
    return np.rint((x - offset) / patch.scale[0]).clip(patch.spec.qn, patch.spec.qp).astype(np.uint8)


def embedding(model: IntegerModel) -> np.ndarray:
    """float32 [N, C]: the prefix tokens as they enter the blocks, then what is added to each patch."""
    a = model.architecture
    assert isinstance(a, VitArchitecture)
    out = np.zeros((a.num_tokens, a.embed_dim), np.float32)
    prefix = a.num_prefix_tokens
    tokens = [token[0] for token in (model.cls_token, model.dist_token, model.reg_token) if token is not None]
    if tokens:
        out[:prefix] = np.concatenate(tokens)
    if model.pos_embed is not None:
        if a.no_embed_class:
            out[prefix:] = model.pos_embed[0]
        else:
            out[:prefix] += model.pos_embed[0, :prefix]
            out[prefix:] = model.pos_embed[0, prefix:]
    return out
