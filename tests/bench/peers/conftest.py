"""A small float model, and the check that a peer runs that very model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvit.bench.peers import missing_packages, peer_named
from qvit.families import vit


@pytest.fixture
def check_peer(tmp_path: Path, small_vit: Callable[..., Any]) -> Callable[..., None]:
    """``check_peer(name, exact)``: prepares, loads and runs; logits correlate at least so well with the float model's."""

    def check(name: str, exact: float) -> None:
        peer = peer_named(name)
        if missing := missing_packages(peer):
            pytest.skip(f"{' and '.join(missing)} not installed: pip install 'qvit[bench]'")
        model = small_vit(depth=2, embed_dim=64, num_heads=2, img_size=32, num_classes=50)
        images = np.random.default_rng(1).standard_normal((3, 3, 32, 32), dtype=np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        peer.prepare(model, vit.describe(model), 3, tmp_path)
        logits = np.asarray(peer.load(tmp_path, 3, 1)(images))
        assert logits.shape == (3, 50)
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > exact
        again = np.asarray(peer.load(tmp_path, 3, 2)(images))
        np.testing.assert_allclose(again, logits, atol=0.05 * logits.std())

    return check
