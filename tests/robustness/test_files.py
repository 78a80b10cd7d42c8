"""Files that lie: whatever a `.qvit` file says, it is refused with a sentence or it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvit.engines import load
from qvit.errors import FileFormatError, QvitError
from qvit.integer.model import IntegerModel
from tests.robustness.budgets import examples
from tests.robustness.mutations import damage_header, damage_tensor, rewrite

NAMES = ["w4a4", "w2a2", "w3a8", "distilled", "average"]


def _attack(path: Path, engine: str | None = "cpu") -> None:
    """Loads and runs a damaged file: a `QvitError` of one line, or logits."""
    try:
        runner = load(path, engine=engine, threads=2)
        size = runner.model.preprocessing.input_size
        images = np.random.default_rng(0).integers(0, 256, (2, *size), dtype=np.uint8)
        shape = np.shape(runner(images))
    except QvitError as error:
        refusal = str(error)
    else:
        refusal = None
        assert shape == (2, len(runner.model.classes))
    assert refusal is None or (refusal and "\n" not in refusal)


@examples(60)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_header_that_lies(models: dict[str, IntegerModel], case: Path, data: st.DataObject, name: str) -> None:
    models[name].save(case)
    rewrite(case, lambda header, tensors: [damage_header(data, header) for _ in range(data.draw(st.integers(1, 3)))])  # type: ignore[func-returns-value,arg-type]
    _attack(case)


@examples(60)
@given(data=st.data())
def test_a_swin_that_lies(frozen_swin: IntegerModel, case: Path, data: st.DataObject) -> None:
    """Whichever engine runs it."""

    def damage(header: dict, tensors: dict[str, np.ndarray]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            damage_header(data, header) if data.draw(st.booleans()) else damage_tensor(data, tensors)

    frozen_swin.save(case)
    rewrite(case, damage)
    _attack(case, engine=None)


@examples(60)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_tensors_that_lie(models: dict[str, IntegerModel], case: Path, data: st.DataObject, name: str) -> None:
    models[name].save(case)
    rewrite(case, lambda header, tensors: [damage_tensor(data, tensors) for _ in range(data.draw(st.integers(1, 4)))])  # type: ignore[func-returns-value,arg-type]
    _attack(case)


@examples(60)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_bytes_that_lie(models: dict[str, IntegerModel], case: Path, data: st.DataObject, name: str) -> None:
    models[name].save(case)
    content = bytearray(case.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(0, len(content) - 1))
        noise = data.draw(st.binary(min_size=1, max_size=16))
        content[start : start + len(noise)] = noise
    case.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 100]))])
    _attack(case)


def test_rewriting_alone_changes_nothing(models: dict[str, IntegerModel], case: Path, pixels: np.ndarray) -> None:
    models["w4a4"].save(case)
    expected = load(case, engine="cpu")(pixels)
    rewrite(case, lambda header, tensors: None)
    assert np.array_equal(load(case, engine="cpu")(pixels), expected)


@pytest.mark.parametrize("side", [1 << 12, 1 << 14, 1 << 16])
def test_a_small_file_that_claims_a_huge_image(models: dict[str, IntegerModel], case: Path, side: int) -> None:
    # Without a position embedding no tensor depends on the size of the image.
    def enlarge(header: dict, tensors: dict) -> None:
        header["architecture"]["img_size"] = [side, side]
        header["preprocessing"]["input_size"] = [3, side, side]

    models["average"].save(case)
    rewrite(case, enlarge)
    with pytest.raises(QvitError, match="tokens"):
        load(case, engine="cpu")


def test_scales_that_are_no_scales(models: dict[str, IntegerModel], case: Path) -> None:
    for value in (0.0, -1.0, np.nan, np.inf):
        models["w4a4"].save(case)
        rewrite(case, lambda header, tensors, value=value: tensors["blocks.0.mlp.fc1.input_scale"].fill(value))  # type: ignore[misc]
        with pytest.raises(FileFormatError, match=r"blocks\.0\.mlp\.fc1"):
            load(case, engine="cpu")
