"""PyTorch's peers run the model that they were given; uncompiled here, since compiling takes a minute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "exact"), [("torch", 0.9), ("torch-bf16", 0.99)])
def test_same_function(check_peer: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str, exact: float) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    threads = torch.get_num_threads()
    try:
        check_peer(name, exact)
    finally:
        torch.set_num_threads(threads)
        torch._inductor.config.freezing = False
    assert len(compiled) == 2
