"""The CUDA engine on Swin Transformers, against the reference engine: on a GPU where there is one, else in emulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, attention_blocks, tiles
from qvit.engines.cuda.folded import margins
from qvit.engines.reference import ReferenceEngine
from qvit.errors import UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.spec import ModelSpec
from tests.engines.cases import SWIN_GRANULARITIES
from tests.engines.cuda.emulator import open_gpu

Factory = Callable[..., Any]

# Heads of 32 channels, as in every Swin of timm. Two windows of 4 x 4 tokens, shifted in the second block; then one window.
SMALL: dict[str, Any] = {"embed_dim": 32, "num_heads": (1, 2), "img_size": (16, 32), "depths": (2, 1), "mlp_ratio": 1}
# Whole rows in a warpgroup's registers, and rows enough for a GPU of two multiprocessors.
HOPPER: dict[str, Any] = SMALL | {"embed_dim": 64, "num_heads": (2,), "depths": (2,), "img_size": (32, 48)}
GEOMETRIES: dict[str, dict[str, Any]] = {
    # The seam in both directions.
    "six windows": HOPPER,
    "window as large as the map": {"img_size": 16, "depths": (2,), "num_heads": (1,)},
    "odd windows": {"img_size": 40, "window_size": 5, "depths": (2,), "num_heads": (1,)},
    "windows of Swin-T": {"img_size": 28, "patch_size": 2, "window_size": 7, "depths": (2,), "num_heads": (1,)},
    "oblong windows, heads of 64": {"window_size": (2, 4), "embed_dim": 64, "depths": (2,), "num_heads": (1,)},
    "three stages": {"img_size": 32, "patch_size": 2, "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
}


@pytest.fixture(scope="module")
def gpu() -> Any:
    """With the kernels that every GPU runs."""
    return open_gpu(hopper=False)


def _check(model: IntegerModel, gpu: Any, count: int = 3) -> None:
    """Every code and every logit is the reference engine's."""
    pixels = torch.randint(0, 256, (count, *model.preprocessing.input_size), dtype=torch.uint8)
    images = torch.from_numpy(model.preprocessing.normalise(pixels.numpy()))
    wanted: dict[str, torch.Tensor] = {}
    codes: dict[str, torch.Tensor] = {}
    logits = ReferenceEngine(model, gpu.device).forward(images, wanted).cpu()
    engine = CudaEngine(model, gpu)
    assert torch.equal(engine.forward(images, codes).cpu(), logits)
    assert wanted.keys() == codes.keys()
    for name, code in wanted.items():
        assert torch.equal(codes[name], code), name
        assert code.unique().numel() > 1, name  # all the same would agree whatever the engine does
    for same in (pixels, images):
        assert torch.equal(engine.forward(same).cpu(), logits)
    assert torch.equal(engine.forward(pixels[:1]).cpu(), logits[:1])
    assert logits.std() > 1e-3


# All of them on a GPU. In emulation those that differ most: 3 bits take the kernels of 4, and ViTs run at all widths.
@pytest.mark.parametrize("bits", [2, 3, 4, 8] if torch.cuda.is_available() else [2, 8])
def test_every_width(bits: int, gpu: Any, make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    _check(qvit.freeze(perturb(make_student(small_swin(**SMALL), weight_bits=bits, act_bits=bits))), gpu, 1)


def test_two_bits_with_hoppers_products(make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    """Planes of bits in the order of windows and in that of the map."""
    model = qvit.freeze(perturb(make_student(small_swin(**HOPPER), weight_bits=2, act_bits=2)))
    gpu = open_gpu(hopper=True)
    assert torch.cuda.is_available() or any(one.defines.get("BITS") for one in CudaEngine(model, gpu).launches(3))
    _check(model, gpu, 3)


@pytest.mark.parametrize("options", [SMALL, HOPPER], ids=["two stages", "rows enough for Hopper's products"])
def test_a_stream_of_float16(options: dict[str, Any], make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    """Gathered from the map and scattered to it, and merged patches."""
    spec = ModelSpec.of_bits(4, residual="float16")
    gpu = open_gpu(hopper=True)
    _check(qvit.freeze(perturb(make_student(small_swin(**options), spec=spec))), gpu, 2)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry(
    name: str, gpu: Any, make_student: Factory, small_swin: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several windows a block where there are six, the last block's not all.
    monkeypatch.setattr(attention_blocks, "_BLOCKS_BUSY", 4)
    options = SMALL | GEOMETRIES[name]
    model = qvit.freeze(perturb(make_student(small_swin(**options), weight_bits=3, act_bits=2)))
    _check(model, gpu, 3)
    packs = {one.values["pack"] for one in CudaEngine(model, gpu).launches(3) if one.kernel == "attention"}
    assert torch.cuda.is_available() or (packs == {4}) == (name == "six windows")


@pytest.mark.parametrize(("widest", "wanted"), [(0, []), (64, [1, 2, 1])])
def test_norms_behind_hoppers_products(
    widest: int,
    wanted: list[int],
    make_student: Factory,
    small_swin: Factory,
    perturb: Factory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Codes go from the order of windows to that of the map and back, in rows of 64 channels, of more than one tile."""
    model = qvit.freeze(perturb(make_student(small_swin(**HOPPER), weight_bits=3, act_bits=2)))
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", widest)
    gpu = open_gpu(hopper=True)
    kinds = [one.defines.get("SCATTER") for one in CudaEngine(model, gpu).launches(3) if one.defines.get("EPILOGUE") == 3]
    assert torch.cuda.is_available() or kinds == wanted
    _check(model, gpu, 3)


def test_scores_without_half_steps(gpu: Any, make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    options = SMALL | {"depths": (2,), "num_heads": (1,)}
    _check(qvit.freeze(perturb(make_student(small_swin(**options), **SWIN_GRANULARITIES["q, k without offset"]))), gpu, 1)


def test_where_every_value_is_in_doubt(
    make_student: Factory, small_swin: Factory, perturb: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With margins of a whole step, all float steps are computed as they are defined; with Hopper's own products."""
    monkeypatch.setattr(margins, "ULPS", 1.0)
    _check(qvit.freeze(perturb(make_student(small_swin(**HOPPER), weight_bits=8, act_bits=8))), open_gpu(hopper=True), 2)


def test_scores_that_registers_do_not_hold(gpu: Any, make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    """Windows of 288 tokens, whose bias does not lie in shared memory; shifted in the second block."""
    options = {"embed_dim": 32, "num_heads": (1,), "depths": (2,), "img_size": (18, 32), "window_size": (18, 16)}
    student = make_student(small_swin(**options, patch_size=1, mlp_ratio=1), weight_bits=3, act_bits=3)
    _check(qvit.freeze(perturb(student)), gpu, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 16}, r"heads of 8 channels, only of 32 or 64 yet: use engine='reference' on device='cuda'\.$"),
        (
            {"embed_dim": 32, "num_heads": (1,), "depths": (1,), "patch_size": 1, "window_size": (32, 32)},
            r"windows of 1024 tokens, only of 576 at most yet: use engine='reference' on device='cuda'\.$",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, gpu: Any, make_student: Factory, small_swin: Factory) -> None:
    model = qvit.freeze(make_student(small_swin(**options)))
    with pytest.raises(UnsupportedModelError, match=message):
        CudaEngine(model, gpu)


def test_the_stages_of_swin_t(make_student: Factory, small_swin: Factory, perturb: Factory) -> None:
    """Real widths and maps, where there is a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    shape = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "depths": (2, 2, 2, 2), "img_size": 224, "window_size": 7}
    _check(qvit.freeze(perturb(make_student(small_swin(**shape), weight_bits=4, act_bits=4))), open_gpu(hopper=True), 8)
