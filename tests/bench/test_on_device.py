"""Calls on a device: the images that they get, when they end, what they say."""

from __future__ import annotations

import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import qvit.bench.on_device
from qvit.bench.on_device import DeviceCalls, milliseconds, random_images, synchronize

CPU = torch.device("cpu")


def test_images() -> None:
    pixels = random_images([50, 3, 8, 8], "uint8", CPU)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (50, 3, 8, 8))
    assert len(pixels.unique()) == 256
    for dtype in ("float32", "bfloat16"):
        images = random_images([50, 3, 8, 8], dtype, CPU)
        assert images.dtype == getattr(torch, dtype)
        assert images.float().std() == pytest.approx(1, abs=0.05)


def test_milliseconds_of_a_call() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(0)
        time.sleep(0.1 if len(calls) == 1 else 0.002)  # the first is not counted

    assert 2 <= milliseconds(call, CPU, calls=2, rounds=3) < 80
    assert len(calls) == 7


def test_milliseconds_by_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return {7: 12.0, 13: 30.0, 19: 18.0}[len(order)]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: order.append("idle"))
    assert milliseconds(lambda: order.append("call"), torch.device("cuda"), calls=2, rounds=3) == 9.0
    assert order == ["call", *["idle", "event", "call", "call", "event", "wait"] * 3]


def test_a_call_ends_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(qvit.bench.on_device, "synchronize", lambda device: order.append(f"done on {device}"))

    def predict(images: torch.Tensor) -> torch.Tensor:
        order.append("asked")
        return images.sum((1, 2, 3))[:, None]

    calls = DeviceCalls(predict, torch.ones(2, 3, 4, 4, dtype=torch.bfloat16))
    assert calls().tolist() == [[48], [48]]
    assert order == ["asked", "done on cpu"]
    array = calls.array()
    assert (array.dtype, array.tolist()) == (np.float32, [[48], [48]])
    del order[:]
    calls.settle()  # records, then replays
    assert order == ["asked", "done on cpu"] * 2
    assert calls.facts() == {"device": "cpu"}


def test_on_a_gpu_it_waits_and_counts_from_where_it_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: asked.append((name, str(device))))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append(("empty_cache", "")))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    gpu = torch.device("cuda", 1)
    synchronize(gpu)
    assert asked == [("synchronize", "cuda:1")]
    calls = DeviceCalls(lambda images: images, torch.zeros(1))
    calls._device = gpu
    calls.settle()
    assert asked[1:] == [("synchronize", "cuda:1")] * 2 + [("empty_cache", ""), ("reset_peak_memory_stats", "cuda:1")]
    assert calls.facts() == {"device": "GPU 1", "gpu_mb": 3.0}
