"""The peers of a GPU run the model that they were given; here on the CPU and uncompiled, which is the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvit.bench.peers import missing_packages
from qvit.bench.peers.gpu import GPU_PEERS
from qvit.families import swin, vit

PEERS = {peer.name: peer for peer in GPU_PEERS}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modes that `torch.compile` was called with, in place of compiling."""
    modes: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    return modes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "exact", "tf32", "compilations"),
    [
        ("eager", 0.999999, False, 0),
        ("tf32", 0.999999, True, 0),
        ("eager-bf16", 0.99, False, 0),
        ("compile", 0.99, False, 1),
        ("torchao", 0.98, False, 1),
    ],
)
def test_same_function(
    name: str,
    exact: float,
    tf32: bool,
    compilations: int,
    tmp_path: Path,
    small_vit: Callable[..., Any],
    compiled: list[str],
) -> None:
    peer = PEERS[name]
    if missing := missing_packages(peer):
        pytest.skip(f"{' and '.join(missing)} not installed: pip install 'qvit[bench]'")
    model = small_vit(depth=2, embed_dim=64, num_heads=2, img_size=32, num_classes=50)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    peer.prepare(model, vit.describe(model), 3, tmp_path)
    predict = peer.load(tmp_path, 3, "cpu")
    logits = predict(images.to(getattr(torch, peer.dtype)))
    assert logits.dtype == getattr(torch, peer.dtype)
    assert not logits.requires_grad
    assert torch.corrcoef(torch.stack([logits.float().ravel(), expected.ravel()]))[0, 1] > exact
    assert compiled == ["max-autotune"] * compilations
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_torchao_quantizes_the_blocks_linear_layers(
    family: str,
    tmp_path: Path,
    small_vit: Callable[..., Any],
    small_swin: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install 'qvit[bench]'")
    if family == "vit":
        model, describe = small_vit(depth=1, embed_dim=64, num_heads=2, img_size=32), vit.describe
    else:
        model, describe = small_swin(depths=(1, 1), embed_dim=32, num_heads=(1, 2)), swin.describe
    loaded: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: loaded.append(model))
    PEERS["torchao"].prepare(model, describe(model), 1, tmp_path)
    PEERS["torchao"].load(tmp_path, 1, "cpu")
    kinds = {name: type(module.weight.data) for name, module in loaded[0].named_modules() if isinstance(module, nn.Linear)}
    int8 = {name for name, kind in kinds.items() if kind is torchao.Int8Tensor}
    of_block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    if family == "vit":
        assert int8 == {f"blocks.0.{name}" for name in of_block}
        assert set(kinds) - int8 == {"head"}
    else:
        of_blocks = {f"layers.{stage}.blocks.0.{name}" for stage in (0, 1) for name in of_block}
        assert int8 == of_blocks | {"layers.1.downsample.reduction"}
        assert set(kinds) - int8 == {"head.fc"}


def test_what_is_prepared_is_shared() -> None:
    assert {peer.model for peer in GPU_PEERS} == {"torch-float32", "torch-bfloat16"}
    assert all(peer.any_batch and peer.device == "cuda" for peer in GPU_PEERS)
    assert missing_packages(PEERS["eager"]) == []
    assert PEERS["torchao"].packages == ("torchao", "torch", "timm")
