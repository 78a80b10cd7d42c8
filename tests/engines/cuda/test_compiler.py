"""NVRTC compiles every kernel, with the constants of real models, for GPUs that need not be here; what is compiled is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit
from qvit.engines.cuda import CudaEngine, compiler, tiles
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.compiler import cache_folder, compile_kernel
from qvit.engines.cuda.tuned import Tuned
from qvit.errors import MissingDependencyError, UnsupportedModelError
from qvit.spec import ModelSpec

EVERY = ("attention", "gemm_few", "pixels")
# GPU, model, width, patches along a side, and the kernels that another case does not have. One block and patches of 2 pixels
# are enough: the kernels are compiled for a number of tokens, and do not depend on the number of blocks, heads and classes.
CASES: dict[str, tuple[str, str, int, int, tuple[str, ...]]] = {
    "DeiT-T, 197 tokens": ("sm_80", "deit_tiny_patch16_224", 192, 14, EVERY),
    "DeiT-S with distillation token, 198 tokens": ("sm_90", "deit_small_distilled_patch16_224", 384, 14, EVERY),
    "DeiT-S/14, 257 tokens": ("sm_90", "deit_small_patch16_224", 384, 16, ("attention",)),
    "DeiT-B at 384, 577 tokens": ("sm_80", "deit_base_patch16_224", 768, 24, ("attention", "norm")),
    "Nearly as long as any, 962 tokens": ("sm_90", "deit_tiny_patch16_224", 64, 31, ("attention",)),
}
_MULTIPROCESSORS = 132  # of an H100; decides on the size of tiles


class Far:
    """A device for launches that are looked at and never run."""

    device = torch.device("cpu")
    most_shared = tiles.MOST_SHARED
    tuned = Tuned()

    def __init__(self, multiprocessors: int, hopper: bool) -> None:
        self.multiprocessors, self.hopper = multiprocessors, hopper


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """NVRTC, and a cache that the tests share with nobody else."""
    try:
        found = compiler._nvrtc()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield found


@pytest.fixture
def make_launches(make_student: Callable[..., Any], small_vit: Callable[..., Any]) -> Callable[..., list[Launch]]:
    """``make_launches(model, width, side, multiprocessors, hopper)``: of one image, on such a GPU."""

    def make(name: str, width: int, side: int, multiprocessors: int, hopper: bool = False) -> list[Launch]:
        options = {"embed_dim": width, "num_heads": width // 64, "depth": 1, "patch_size": 2, "img_size": 2 * side}
        far = Far(multiprocessors, hopper)
        engine = CudaEngine(qvit.freeze(make_student(small_vit(name, **options))), far, all_tokens=True)  # type: ignore[arg-type]
        return engine.launches(1)

    return make


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles(name: str, make_launches: Callable[..., list[Launch]]) -> None:
    architecture, model, width, side, kernels = CASES[name]
    compiled = {}
    for launch in make_launches(model, width, side, _MULTIPROCESSORS):
        key = (launch.kernel, *launch.defines.items())
        if launch.kernel in kernels and key not in compiled:
            compiled[key] = compile_kernel(launch.kernel, launch.defines, architecture)
    assert {kernel for kernel, *_ in compiled} == set(kernels)
    assert all(code.startswith(b"\x7fELF") for code in compiled.values())
    for kernel, *defines in compiled:
        if kernel == "attention":
            assert dict(defines)["TOKENS"] == int(name.split()[-2])


@pytest.mark.usefixtures("nvrtc")
def test_what_is_too_long_is_refused_before_it_is_compiled(make_launches: Callable[..., list[Launch]]) -> None:
    (launch,) = (one for one in make_launches("deit_tiny_patch16_224", 64, 31, 132) if one.kernel == "attention")
    longer = {**launch.defines, "TOKENS": 1025}
    with pytest.raises(UnsupportedModelError, match="static assertion failed"):
        compile_kernel("attention", longer, "sm_90")
    with pytest.raises(
        UnsupportedModelError, match="does not run 1,025 tokens on this GPU, only 1,024 with heads of 64 channels"
    ):
        make_launches("deit_tiny_patch16_224", 64, 32, 132)


@pytest.mark.usefixtures("nvrtc")
def test_the_largest_tiles_compile(make_launches: Callable[..., list[Launch]]) -> None:
    """Those of large batches, with the epilogues that keep most in registers."""
    launches = make_launches("deit_small_patch16_224", 384, 14, 1)
    qkv = max((launch for launch in launches if launch.kernel == "gemm"), key=lambda launch: "HEAD_DIM" in launch.defines)
    assert qkv.threads > 64
    assert compile_kernel("gemm", qkv.defines, "sm_90").startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
def test_hoppers_products_compile(make_launches: Callable[..., list[Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 384, LayerNorm by itself and behind the products of floats."""
    launches = make_launches("deit_small_patch16_224", 384, 14, 1, hopper=True)
    kinds = {one.defines["EPILOGUE"]: one for one in launches if one.kernel == "gemm_hopper"}
    assert sorted(kinds) == [0, 1, 2]
    monkeypatch.setattr(tiles, "WIDEST_NORM_BEHIND", 384)
    behind = make_launches("deit_small_patch16_224", 384, 14, 1, hopper=True)
    whole_rows = next(one for one in behind if one.defines.get("EPILOGUE") == 3)
    for launch in (*kinds.values(), whole_rows):
        assert launch.shared <= 227 * 1024
        assert compile_kernel("gemm_hopper", launch.defines, "sm_90a").startswith(b"\x7fELF")
    attention = next(launch for launch in launches if launch.kernel == "attention")
    assert (attention.defines["RING"], attention.defines["WARPS"]) == (5, 12)
    assert attention.shared <= 227 * 1024
    assert compile_kernel("attention", attention.defines, "sm_90a").startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
def test_codes_two_a_byte_compile(make_launches: Callable[..., list[Launch]], monkeypatch: pytest.MonkeyPatch) -> None:
    """fc1 writes them, fc2 reads them."""
    launches = make_launches("deit_small_patch16_224", 384, 14, 1, hopper=True)
    writes, reads = (next(one for one in launches if one.defines.get(key)) for key in ("OUT_NIBBLES", "A_NIBBLES"))
    assert (writes.defines["EPILOGUE"], reads.defines["EPILOGUE"], reads.defines["kBN"]) == (1, 0, 192)
    staying = replace(tiles._FLOATS[0], stages=3, slots=2, keeps_rows=True)
    monkeypatch.setattr(tiles, "_FLOATS", (staying, *tiles._FLOATS))
    launches = make_launches("deit_small_patch16_224", 384, 14, 1, hopper=True)
    stays = next(one for one in launches if one.defines.get("A_NIBBLES"))
    assert (reads.defines["RESIDENT"], stays.defines["RESIDENT"], stays.defines["kBN"]) == (0, 1, 192)
    for launch in (writes, reads, stays):
        assert launch.shared <= 227 * 1024
        assert compile_kernel("gemm_hopper", launch.defines, "sm_90a").startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
def test_rows_that_pass_through_shared_memory_compile(make_launches: Callable[..., list[Launch]]) -> None:
    """Those of DeiT-B, which are too wide for a warpgroup's registers."""
    launches = make_launches("deit_base_patch16_224", 768, 14, 1, hopper=True)
    staged = next(launch for launch in launches if launch.defines.get("STAGED") and launch.defines["RESIDUAL"])
    assert staged.shared <= 227 * 1024
    assert compile_kernel("gemm_hopper", staged.defines, "sm_90a").startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
def test_swins_kernels_compile(make_student: Callable[..., Any], small_swin: Callable[..., Any]) -> None:
    """Those that a ViT's launches do not have: windows of 49 tokens, shifted, rows gathered, rows scattered behind a norm."""
    shape = {"img_size": 28, "patch_size": 2, "window_size": 7, "embed_dim": 64, "num_heads": (2, 4), "depths": (2, 1)}
    far = Far(1, hopper=True)
    launches = CudaEngine(qvit.freeze(make_student(small_swin(**shape))), far).launches(8)  # type: ignore[arg-type]
    for kernel, wanted in (
        ("attention", {"TOKENS": 49, "BIAS": 1, "MASK": 1}),
        ("norm", {"GATHER": 1}),
        ("norm", {"GATHER": 4}),
        ("gemm_hopper", {"EPILOGUE": 3, "SCATTER": 1}),
        ("gemm_hopper", {"EPILOGUE": 3, "SCATTER": 2}),
    ):
        defines = next(one.defines for one in launches if one.kernel == kernel and wanted.items() <= one.defines.items())
        assert compile_kernel(kernel, defines, "sm_90a").startswith(b"\x7fELF")


def test_every_kernel_awaits_the_one_before() -> None:
    """One that did not would end before the one before it, and what follows could begin too early."""
    for path in compiler.SOURCES.glob("*.cu"):
        body = path.read_text().split("__global__")[1]
        awaits, leaves = body.find("await_former_kernel();"), body.find("return;")
        assert awaits > 0, path.name
        assert leaves < 0 or awaits < leaves, path.name


@pytest.mark.usefixtures("nvrtc")
def test_what_is_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_CACHE", str(tmp_path / "kernels"))
    first = compile_kernel("pool", {}, "sm_80")
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.read_bytes() == first
    compile_ = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_kernel("pool", {}, "sm_80") == first
    # Other constants, another GPU or another source are other kernels.
    monkeypatch.setattr(compiler, "_compile", compile_)
    compile_kernel("pool", {"OTHER": 1}, "sm_80")
    compile_kernel("pool", {}, "sm_90")
    sources = tmp_path / "src"
    sources.mkdir()
    for path in compiler.SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    compile_kernel("pool", {}, "sm_80")
    assert len(list((tmp_path / "kernels").iterdir())) == 4


@pytest.mark.usefixtures("nvrtc")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("QVIT_CACHE", str(tmp_path / "file" / "kernels"))
    assert compile_kernel("pool", {}, "sm_80").startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
def test_a_source_that_does_not_compile_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"CUDA kernel norm does not compile with .*: use engine='reference'\.$"):
        compile_kernel("norm", {}, "sm_80")  # no CHANNELS


def test_where_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("QVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qvit" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qvit" / "cuda"


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compiler._nvrtc.cache_clear()
    try:
        with pytest.raises(MissingDependencyError, match=r"NVRTC, which is missing .* or use engine='reference'"):
            compile_kernel("pool", {}, "sm_80")
    finally:
        compiler._nvrtc.cache_clear()


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("holds", [False, True])
def test_two_bits_that_are_compared_compile(
    holds: bool, make_student: Callable[..., Any], small_vit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fc1 of rows of 384, by one-bit products; rows may be in registers."""
    monkeypatch.setitem(tiles.MOST_HELD, True, 512 if holds else 0)
    options = {"embed_dim": 384, "num_heads": 6, "depth": 1, "patch_size": 2, "img_size": 28}
    model = qvit.freeze(make_student(small_vit("deit_small_patch16_224", **options), spec=ModelSpec.of_bits(2)))
    engine = CudaEngine(model, Far(1, hopper=True), all_tokens=True)  # type: ignore[arg-type]
    fc1 = next(one for one in engine.launches(2) if one.defines.get("RISING"))
    assert (fc1.defines["OUT_BITS"], fc1.defines["BITS"], fc1.defines["HELD"], fc1.defines["REST"]) == (1, 1, holds, holds)
    assert fc1.shared <= 227 * 1024
    assert compile_kernel("gemm_hopper", fc1.defines, "sm_90a").startswith(b"\x7fELF")


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(("bits", "hopper"), [(4, False), (2, True)], ids=["few rows", "planes of bits"])
def test_the_last_block_compiles(
    bits: int, hopper: bool, make_student: Callable[..., Any], small_vit: Callable[..., Any]
) -> None:
    """Of two tokens of each of two images, which are gathered and scattered."""
    options = {"embed_dim": 384, "num_heads": 6, "depth": 1, "patch_size": 2, "img_size": 28}
    student = make_student(small_vit("deit_small_distilled_patch16_224", **options), spec=ModelSpec.of_bits(bits))
    engine = CudaEngine(qvit.freeze(student), Far(1 if hopper else _MULTIPROCESSORS, hopper))  # type: ignore[arg-type]
    launches = engine.launches(2)
    first = next(i for i, one in enumerate(launches) if one.kernel == "attention")
    attention, proj, norm, *_ = launches[first:]
    assert (attention.defines["QUERIES"], attention.defines["SPLIT"], attention.defines["OUT_BITS"]) == (2, 1, int(hopper))
    assert (proj.kernel, proj.defines["SCATTER"]) == ("gemm_hopper" if hopper else "gemm_few", 1)
    assert (norm.kernel, norm.defines["GATHER"], norm.defines["OUT_BITS"]) == ("norm", 1, int(hopper))
    for launch in (attention, proj, norm):
        assert compile_kernel(launch.kernel, launch.defines, "sm_90a" if hopper else "sm_80").startswith(b"\x7fELF")
