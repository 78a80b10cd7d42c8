"""The compiled engine on Swin Transformers, against the reference engine: every code and every logit, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.engines.cpu import CpuEngine, _native
from qvit.engines.cpu.build import tap_shapes
from qvit.engines.reference import ReferenceEngine
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from tests.engines.cases import SWIN_GRANULARITIES, SWINS

Factory = Callable[..., Any]

# Windows of 25 tokens, no multiple of four, in heads of 7 and 6 channels; four windows, then one.
_ODD: dict[str, Any] = {"img_size": 40, "window_size": 5, "embed_dim": 21, "num_heads": (3, 7), "depths": (2, 1)}
# Windows and heads of Swin-T: 49 tokens, 32 channels.
_WIDE: dict[str, Any] = {"img_size": 28, "patch_size": 2, "window_size": 7, "embed_dim": 64, "num_heads": (2,), "depths": (2,)}
# The same in two stages, of which the second has as many windows as some machines have threads.
_SHIFTED: dict[str, Any] = _WIDE | {"img_size": (28, 56), "embed_dim": 32, "num_heads": (1, 2), "depths": (2, 1)}


def _pixels(model: IntegerModel, count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *model.preprocessing.input_size), dtype=np.uint8)


def _assert_same(model: IntegerModel, count: int = 3, threads: tuple[int, ...] = (2,), varied: bool = True) -> None:
    """varied: no point's codes are all the same, which would agree whatever the engine does."""
    pixels = _pixels(model, count)
    images = model.preprocessing.normalise(pixels)
    wanted: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model).forward(torch.from_numpy(images), wanted).numpy()
    for number in threads:
        engine = CpuEngine(model, threads=number)
        codes: dict[str, np.ndarray] = {}
        shown = engine.forward(images, codes)
        assert codes.keys() == wanted.keys()
        for name, code in wanted.items():
            assert codes[name].shape == code.shape, name
            assert not varied or code.unique().numel() > 1, name
            differ = int((codes[name] != code.numpy()).sum())
            assert differ == 0, f"{differ} of {code.numel()} codes differ at {name} with {number} threads"
        assert np.array_equal(shown, logits)
        for size in {1, count}:
            assert np.array_equal(engine.run(pixels[:size]), logits[:size])
        assert np.array_equal(engine.run(images), logits)
    assert logits.std() > 1e-3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Of PyTorch: for such small models more are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def swin(make_student: Factory, small_swin: Factory, perturb: Factory) -> Factory:
    """``swin(options of the architecture, **fields of ModelSpec)``: frozen, made once."""
    made: dict[str, IntegerModel] = {}

    def make(options: dict[str, Any] | None = None, **fields: Any) -> IntegerModel:
        key = repr((options, fields))
        if key not in made:
            made[key] = qvit.freeze(perturb(make_student(small_swin(**(options or {})), **fields)))
        return made[key]

    return make


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int, swin: Factory) -> None:
    _assert_same(swin(_ODD, weight_bits=bits, act_bits=bits))
    _assert_same(swin(_SHIFTED, weight_bits=bits, act_bits=bits), 1)


@pytest.mark.parametrize("options", SWINS.values(), ids=SWINS.keys())
def test_every_architecture(options: dict[str, Any], swin: Factory) -> None:
    _assert_same(swin(options, weight_bits=3, act_bits=4))


@pytest.mark.parametrize("fields", SWIN_GRANULARITIES.values(), ids=SWIN_GRANULARITIES.keys())
def test_every_granularity(fields: dict[str, Any], swin: Factory) -> None:
    _assert_same(swin(**fields))


@pytest.mark.parametrize("operands", [("weight",), ("weight", "input")])
def test_groups_of_input_channels(operands: tuple[str, ...], swin: Factory) -> None:
    overrides = {f"layers.*.{operand}": {"scale": "per_group_64"} for operand in operands}
    _assert_same(swin({"embed_dim": 64, "depths": (1, 1)}, overrides=overrides), threads=(1, 2))


@pytest.mark.parametrize("isa", _native.isa_names().split(", "))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_instruction_set(isa: str, bits: int, swin: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_ISA", isa)
    model = swin(_WIDE, weight_bits=bits, act_bits=bits)
    assert CpuEngine(model).isa == isa
    _assert_same(model, 2)
    _assert_same(swin(_ODD, weight_bits=bits, act_bits=bits), 1)
    if bits == 2:
        for fields in (
            SWIN_GRANULARITIES["q, k offset per channel"],
            SWIN_GRANULARITIES["statsq"],
            {"overrides": {"*.k": {"signed": False}}},
        ):
            _assert_same(swin(_WIDE, weight_bits=bits, act_bits=bits, **fields), 1)


@pytest.mark.parametrize("isa", _native.isa_names().split(", "))
@pytest.mark.parametrize("options", [_ODD, _SHIFTED])
def test_a_stream_of_float16(options: dict[str, Any], isa: str, swin: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_ISA", isa)
    model = swin(options, residual="float16")
    _assert_same(model, 2, threads=(1, 3))
    plain = IntegerModel.from_tensors({**model.header, "residual": "float32"}, model.tensors)
    assert not np.array_equal(CpuEngine(plain).run(_pixels(model, 2)), CpuEngine(model).run(_pixels(model, 2)))


@pytest.mark.parametrize("options", [_ODD, _SHIFTED, {"window_size": 2, "depths": (2, 2)}, {"window_size": 1}])
def test_neither_threads_nor_batches_matter(options: dict[str, Any], swin: Factory) -> None:
    """More threads than windows, and numbers of threads that do not divide the windows, share windows."""
    model = swin(options, weight_bits=4, act_bits=4)
    # A single token attends to itself alone: its map has one code.
    _assert_same(model, 3, threads=(1, 2, 3, 5, 8), varied=options["window_size"] != 1)
    pixels = _pixels(model, 7)
    expected = CpuEngine(model, threads=1).run(pixels)
    for threads in (2, 3, 4):
        engine = CpuEngine(model, threads=threads)
        for size in range(1, 8):
            assert np.array_equal(engine.run(pixels[:size]), expected[:size]), (threads, size)


def _with_scores(model: IntegerModel, factor: float) -> IntegerModel:
    """The model with larger position biases, and larger steps of q and k."""
    tensors = dict(model.tensors)
    for name, array in tensors.items():
        by = factor if name.endswith("bias_table") else factor**0.5 if name.endswith(("attn.q_scale", "attn.k_scale")) else 1.0
        if by != 1.0:
            tensors[name] = (array.astype(np.float32) * np.float32(by)).astype(np.float32)
    return IntegerModel.from_tensors(model.header, tensors)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("factor", [1e-3, 30.0, 200.0, 1e5])
def test_scores_near_the_mask_and_beyond_it(bits: int, factor: float, swin: Factory) -> None:
    """The mask takes 100 off, which scores of that size may outweigh: it is added, as timm does, and not infinite."""
    _assert_same(_with_scores(swin(_SHIFTED, weight_bits=bits, act_bits=bits), factor), 1, varied=False)


def test_the_mask_can_be_outweighed(swin: Factory) -> None:
    """What the test above is about does happen in it: keys of other regions get codes above zero."""
    model = _with_scores(swin(_SHIFTED, weight_bits=4, act_bits=4), 1e5)
    windows = model.stages[0].blocks[1].attention.windows
    assert windows is not None
    mask = windows.mask()
    assert mask is not None
    codes: dict[str, np.ndarray] = {}
    CpuEngine(model).forward(model.preprocessing.normalise(_pixels(model, 1)), codes)
    attention = codes["layers.0.blocks.1.attn.map"]
    assert attention.transpose(0, 2, 3, 1)[mask < 0].max() > 0
    plain = swin(_SHIFTED, weight_bits=4, act_bits=4)
    CpuEngine(plain).forward(plain.preprocessing.normalise(_pixels(plain, 1)), codes)
    assert codes["layers.0.blocks.1.attn.map"].transpose(0, 2, 3, 1)[mask < 0].max() == 0


def test_close_calls(swin: Factory) -> None:
    """A million 8-bit codes: of these float32 alone would get some wrong."""
    _assert_same(swin(_SHIFTED, weight_bits=8, act_bits=8), 8)


def test_taps_have_the_shapes_of_the_reference_engine(swin: Factory) -> None:
    model = swin(_SHIFTED)
    wanted: dict[str, torch.Tensor] = {}
    ReferenceEngine(model).forward(torch.from_numpy(model.preprocessing.normalise(_pixels(model, 2))), wanted)
    assert {name: tuple(code.shape) for name, code in wanted.items()} == tap_shapes(model, 2)


def test_the_position_bias_matters(swin: Factory) -> None:
    model = swin(_ODD)
    tensors = dict(model.tensors)
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    tensors[name] = tensors[name][::-1].copy()
    images = model.preprocessing.normalise(_pixels(model, 2))
    codes: dict[str, np.ndarray] = {}
    changed: dict[str, np.ndarray] = {}
    CpuEngine(model).forward(images, codes)
    CpuEngine(IntegerModel.from_tensors(model.header, tensors)).forward(images, changed)
    assert np.array_equal(codes["layers.0.blocks.1.attn.k"], changed["layers.0.blocks.1.attn.k"])
    assert not np.array_equal(codes["layers.0.blocks.1.attn.map"], changed["layers.0.blocks.1.attn.map"])


def test_heads_that_are_too_wide_are_refused(swin: Factory) -> None:
    model = swin({"embed_dim": 520, "num_heads": (1,), "depths": (1,), "img_size": 16, "mlp_ratio": (0.1,)})
    with pytest.raises(UnsupportedModelError, match="Heads of 520 channels are too wide for the CPU engine"):
        CpuEngine(model)


def test_the_profile_knows_patch_merging(swin: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin()
    monkeypatch.setitem(os.environ, "QVIT_PROFILE", "1")
    engine = CpuEngine(model, threads=1)
    engine.run(_pixels(model, 4))
    times = engine.profile()
    assert times["patch merging"] > 0
    assert times["attention"] > 0
