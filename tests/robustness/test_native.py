"""The compiled module by itself, called with anything: an exception, never a crash."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qvit.engines.cpu import _native
from qvit.engines.cpu.build import build
from qvit.integer.model import IntegerModel
from tests.robustness.budgets import examples

REFUSALS = (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError, MemoryError, OverflowError)

numbers = st.one_of(st.integers(-3, 300), st.sampled_from([1 << 15, 1 << 20, 1 << 31, -(1 << 31), 1 << 40, 1 << 63]))
_TYPES = st.sampled_from([np.uint8, np.float32, np.float64, np.int16])
arrays = hnp.arrays(_TYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40))
things = st.one_of(numbers, arrays, st.none(), st.text(max_size=8), st.floats(), st.booleans())


@examples(100)
@given(data=st.data())
def test_a_builder_of_nonsense(data: st.DataObject) -> None:
    def sizes(keys: list[str]) -> dict[str, int]:
        return {key: data.draw(numbers) for key in keys if data.draw(st.integers(0, 20))}

    shape = sizes(["prefix", "classes", "channels", "height", "width", "patch_height", "patch_width", "activation", "average",
                   "average_all", "distilled", "windowed"])  # fmt: skip
    stage = ["map_height", "map_width", "window_height", "window_width", "dim", "depth", "heads", "hidden"]
    stages = [sizes(stage) for _ in range(data.draw(st.integers(0, 3)))]
    try:
        builder = _native.Builder(data.draw(st.sampled_from(["", "generic", "avx2", "warp"])), shape, stages)
        _native.Engine(builder, data.draw(numbers), False)
    except REFUSALS:
        pass


@examples(150)
@given(data=st.data())
def test_parts_of_nonsense(models: dict[str, IntegerModel], data: st.DataObject) -> None:
    """A whole model with one argument of one call exchanged: by another thing, or by a changed array of the right type."""
    model = models[data.draw(st.sampled_from(["w4a4", "w2a2", "distilled", "swin"]))]
    calls = _calls(model)
    number = data.draw(st.integers(0, len(calls) - 1))
    name, arguments = calls[number]
    place = data.draw(st.integers(0, len(arguments) - 1))
    old = arguments[place]
    if isinstance(old, dict):
        new: Any = {**old, data.draw(st.sampled_from(sorted(old))): data.draw(numbers)}
    elif name == "__init__" and isinstance(old, list):
        number = data.draw(st.integers(0, len(old) - 1))
        stage = old[number]
        new = [*old[:number], {**stage, data.draw(st.sampled_from(sorted(stage))): data.draw(numbers)}, *old[number + 1 :]]
    elif isinstance(old, np.ndarray) and data.draw(st.booleans()):
        flat = old.reshape(-1)
        changed = [flat[:-1], old[None], np.concatenate([flat, flat]), old[..., ::-1], np.zeros_like(old)]
        new = data.draw(st.sampled_from(changed))
    else:
        new = data.draw(things)
    calls[number] = (name, [*arguments[:place], new, *arguments[place + 1 :]])
    try:
        builder = _native.Builder(*calls[0][1])
        for method, values in calls[1:]:
            getattr(builder, method)(*values)
        engine = _native.Engine(builder, 2, False)
        size = model.preprocessing.input_size
        engine.run(np.zeros((2, *size), np.uint8), np.empty((2, model.architecture.num_classes), np.float32), None)
    except REFUSALS:
        pass


def _calls(model: IntegerModel) -> list[tuple[str, list[Any]]]:
    """What `build` tells the builder: (method, arguments), the constructor first."""
    calls: list[tuple[str, list[Any]]] = []

    class Recorder:
        def __init__(self, *arguments: Any) -> None:
            calls.append(("__init__", list(arguments)))

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: calls.append((name, list(arguments)))

    build(Recorder, "", model)
    return calls


@pytest.mark.parametrize(
    "key", ["map_width", "window_height", "dim", "depth", "heads", "hidden", "classes", "channels", "height", "patch_width"]
)
@pytest.mark.parametrize("size", [0, (1 << 31) - 1, -1])
@pytest.mark.parametrize("kind", ["w4a4", "swin"])
def test_sizes_that_are_none(models: dict[str, IntegerModel], kind: str, key: str, size: int) -> None:
    calls = _calls(models[kind])
    isa, shape, stages = calls[0][1]
    changed = {key: size}
    calls[0] = (
        "__init__",
        [isa, shape | (changed if key in shape else {}), [s | (changed if key in s else {}) for s in stages]],
    )

    def make() -> None:
        builder = _native.Builder(*calls[0][1])
        for method, values in calls[1:]:
            getattr(builder, method)(*values)
        _native.Engine(builder, 1, False)

    with pytest.raises(REFUSALS):
        make()


def test_the_recorded_calls_build_the_engine(models: dict[str, IntegerModel], runners: Any, pixels: np.ndarray) -> None:
    calls = _calls(models["w4a4"])
    builder = _native.Builder(*calls[0][1])
    for method, values in calls[1:]:
        getattr(builder, method)(*values)
    logits = np.empty((3, 5), np.float32)
    _native.Engine(builder, 2, False).run(pixels, logits, None)
    assert np.array_equal(logits, runners["w4a4"](pixels))


@examples(100)
@given(images=arrays, logits=arrays, taps=st.one_of(st.none(), st.lists(arrays, max_size=12)))
def test_runs_of_nonsense(runners: Any, images: np.ndarray, logits: np.ndarray, taps: Any) -> None:
    native = runners["w4a4"].engine._engine
    try:
        native.run(images, logits, taps)
    except REFUSALS:
        return
    assert images.shape[1:] == (3, 16, 16)


@examples(60)
@given(sizes=st.lists(st.integers(-1, 1), min_size=10, max_size=10), data=st.data())
def test_taps_of_other_sizes(runners: Any, models: Any, pixels: np.ndarray, sizes: list[int], data: st.DataObject) -> None:
    from qvit.engines.cpu.build import tap_shapes

    shapes = list(tap_shapes(models["w4a4"], 3).values())
    taps = [np.empty(max(0, int(np.prod(shape)) + size), np.int16) for shape, size in zip(shapes, sizes, strict=False)]
    taps += [np.empty(shape, np.int16) for shape in shapes[len(taps) :]]
    logits = np.empty((3, 5), np.float32)
    try:
        runners["w4a4"].engine._engine.run(pixels, logits, taps[: data.draw(st.integers(0, len(taps)))])
    except REFUSALS:
        return
    assert not any(sizes[: len(shapes)])


def test_a_builder_makes_one_engine(models: dict[str, IntegerModel], pixels: np.ndarray) -> None:
    """The engine takes the model out of its builder; what is left is refused or works, and the engine is unharmed."""
    builder = build(_native.Builder, "", models["w4a4"])
    engine = _native.Engine(builder, 1, False)
    logits, again = np.empty((3, 5), np.float32), np.empty((3, 5), np.float32)
    engine.run(pixels, logits, None)
    with suppress(*REFUSALS):
        _native.Engine(builder, 1, False).run(pixels, again, None)
    engine.run(pixels, again, None)
    assert np.array_equal(logits, again)
