"""The vocabulary: what constructs, what is refused and why, overrides, JSON, shapes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvit.errors import SpecError
from qvit.spec import (
    Dims,
    HalfStep,
    ModelSpec,
    Operand,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    QuantSpec,
    granularity_from_name,
    granularity_name,
    matches,
)

SCALES = (PerTensor(), PerToken(), PerChannel(), PerHead(), PerGroup(64), PerGroup(128))
OFFSETS = (None, HalfStep(), *SCALES)

# method.md, section 1, "Which granularities run on integers", written out a second time.
GROUPS = {"PerGroup64", "PerGroup128"}
EXECUTABLE_SCALES = {
    "weight": {"PerTensor", "PerChannel"} | GROUPS,
    "input": {"PerTensor", "PerToken"} | GROUPS,
    "q": {"PerTensor", "PerHead", "PerToken"},
    "k": {"PerTensor", "PerHead", "PerToken"},
    "v": {"PerTensor", "PerHead", "PerChannel"},
    "map": {"PerTensor", "PerHead", "PerToken"},
}
EXECUTABLE_OFFSETS = {
    "weight": {"None", "HalfStep"},
    "input": {"None", "PerTensor", "PerChannel"},
    "q": {"None", "HalfStep", "PerHead", "PerChannel"},
    "k": {"None", "HalfStep", "PerHead", "PerChannel"},
    "v": {"None", "HalfStep", "PerHead", "PerChannel"},
    "map": {"None"},
}


def label(granularity: object) -> str:
    if granularity is None:
        return "None"
    return f"PerGroup{granularity.size}" if isinstance(granularity, PerGroup) else type(granularity).__name__


@pytest.mark.parametrize("operand", list(Operand))
@pytest.mark.parametrize("signed", [True, False])
def test_executable_combinations_construct_and_all_others_are_refused(operand: Operand, signed: bool) -> None:
    for scale, offset in itertools.product(SCALES, OFFSETS):
        sign_fits = not (operand is Operand.WEIGHT and not signed) and not (operand is Operand.MAP and signed)
        allowed = (
            sign_fits
            and label(scale) in EXECUTABLE_SCALES[operand.value]
            and label(offset) in EXECUTABLE_OFFSETS[operand.value]
            # half of a key's own step would be a term of each key, which softmax does not cancel
            and (operand.value, label(scale), label(offset)) != ("k", "PerToken", "HalfStep")
            and not (operand is Operand.WEIGHT and isinstance(scale, PerGroup) and offset is not None)
        )
        if allowed:
            spec = QuantSpec(3, signed, scale, offset, operand)
            assert (spec.scale, spec.offset, spec.operand) == (scale, offset, operand)
            assert spec.learns_offset == (offset is not None and not isinstance(offset, HalfStep))
        else:
            with pytest.raises(SpecError) as error:
                QuantSpec(3, signed, scale, offset, operand)
            assert "\n" not in str(error.value)
            assert str(error.value).endswith(".")


def test_a_scale_per_input_channel_says_why_and_what_to_do_instead() -> None:
    with pytest.raises(SpecError) as error:
        QuantSpec(4, scale=PerChannel(), operand=Operand.INPUT)
    message = str(error.value)
    assert "sums over" in message
    assert "cannot run on integers" in message
    assert "equalis" in message
    assert "per-channel offset" in message


@pytest.mark.parametrize(
    ("operand", "signed", "scale", "named"),
    [
        ("q", True, PerChannel(), "IRM"),
        ("k", True, PerChannel(), "IRM"),
        ("v", True, PerToken(), "tokens"),
        ("map", False, PerChannel(), "keys"),
        ("weight", True, PerToken(), "PerChannel"),
    ],
)
def test_other_refusals_name_the_way_out(operand: str, signed: bool, scale: object, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        QuantSpec(4, signed, scale, None, Operand(operand))


def test_a_half_step_of_k_with_a_scale_per_token_says_what_to_do() -> None:
    with pytest.raises(SpecError, match="softmax does not cancel; use offset="):
        QuantSpec(4, True, PerToken(), HalfStep(), Operand.KEY)


@pytest.mark.parametrize("bits", [1, 9, 0, -2, 2.0, "4", None, True])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(SpecError, match="use 2 to 8"):
        QuantSpec(bits)
    for name in ("weight_bits", "act_bits", "edge_bits"):
        with pytest.raises(SpecError, match=f"{name}.*use 2 to 8"):
            ModelSpec(**{name: bits})


@pytest.mark.parametrize("size", [0, 32, 96, 256, -64])
def test_group_sizes(size: int) -> None:
    with pytest.raises(SpecError, match="64 or 128"):
        PerGroup(size)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges(bits: int) -> None:
    unsigned, signed = QuantSpec(bits, signed=False), QuantSpec(bits, signed=True)
    assert (unsigned.qn, unsigned.qp) == (0, 2**bits - 1)
    assert (signed.qn, signed.qp) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


DIMS = Dims(channels=384, rows=197, heads=6)


@pytest.mark.parametrize(
    ("operand", "scale", "offset", "dims", "scale_shape", "offset_shape"),
    [
        ("weight", PerTensor(), None, Dims(384, 1536), (1,), None),
        ("weight", PerChannel(), None, Dims(384, 1536), (1536, 1), None),
        ("weight", PerGroup(128), None, Dims(384, 1536), (1536, 3), None),
        ("weight", PerChannel(), HalfStep(), Dims(384, 1536), (1536, 1), None),
        ("input", PerTensor(), PerTensor(), Dims(384, 197), (1,), (1,)),
        ("input", PerTensor(), PerChannel(), Dims(384), (1,), (384,)),
        ("input", PerToken(), PerChannel(), Dims(384, 197), (197, 1), (384,)),
        ("input", PerGroup(64), None, Dims(384, 197), (6,), None),
        ("q", PerHead(), HalfStep(), Dims(64, 197, 6), (6, 1, 1), None),
        ("q", PerToken(), PerHead(), Dims(64, 197, 6), (6, 197, 1), (6, 1, 1)),
        ("k", PerTensor(), PerChannel(), Dims(64, 197, 6), (1,), (6, 1, 64)),
        ("v", PerChannel(), PerChannel(), Dims(64, 197, 6), (6, 1, 64), (6, 1, 64)),
        ("v", PerHead(), PerHead(), Dims(64, 197, 6), (6, 1, 1), (6, 1, 1)),
        ("map", PerToken(), None, Dims(197, 197, 6), (6, 197, 1), None),
        ("map", PerHead(), None, Dims(197, 197, 6), (6, 1, 1), None),
    ],
)
def test_shapes_of_scales_and_offsets(operand, scale, offset, dims, scale_shape, offset_shape) -> None:
    spec = QuantSpec(4, signed=operand != "map", scale=scale, offset=offset, operand=Operand(operand))
    assert spec.scale_shape(dims) == scale_shape
    assert spec.offset_shape(dims) == offset_shape


def test_shapes_that_the_tensor_does_not_have() -> None:
    with pytest.raises(SpecError, match="groups of 128"):
        QuantSpec(4, scale=PerGroup(128)).scale_shape(Dims(192, 5))
    with pytest.raises(SpecError, match="no tokens"):
        QuantSpec(4, scale=PerToken()).scale_shape(Dims(192))


granularities = st.sampled_from(list(OFFSETS))


@given(granularities)
def test_names_of_granularities_round_trip(granularity: object) -> None:
    assert granularity_from_name(granularity_name(granularity)) == granularity


@pytest.mark.parametrize("name", ["per_pixel", "per_group_32", "", "PerTensor", 3, None, "per_group_64 "])
def test_unknown_granularity_names(name: object) -> None:
    with pytest.raises(SpecError):
        granularity_from_name(name)


@given(st.sampled_from(list(Operand)), st.integers(2, 8), st.booleans(), st.sampled_from(SCALES), st.sampled_from(OFFSETS))
def test_quant_spec_json_round_trip(operand: Operand, bits: int, signed: bool, scale: object, offset: object) -> None:
    try:
        spec = QuantSpec(bits, signed, scale, offset, operand)
    except SpecError:
        return
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    "change",
    [{"bits": 1}, {"bits": "4"}, {"scale": "per_pixel"}, {"operand": "x"}, {"offset": 3}, {"scale": None}, {"signed": "no"}],
)
def test_damaged_quant_specs_are_refused(change: dict) -> None:
    good = QuantSpec(4).to_dict()
    with pytest.raises(SpecError):
        QuantSpec.from_dict(good | change)


def test_quant_specs_with_missing_keys_are_refused() -> None:
    good = QuantSpec(4).to_dict()
    for key in good:
        with pytest.raises(SpecError, match=key):
            QuantSpec.from_dict({k: v for k, v in good.items() if k != key})


def test_specs_are_immutable_and_hashable() -> None:
    spec = QuantSpec(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 3  # type: ignore[misc]
    assert len({QuantSpec(4), QuantSpec(4), QuantSpec(3)}) == 2


def test_default_bits_of_blocks_and_edges() -> None:
    spec = ModelSpec(weight_bits=3, act_bits=2, edge_bits=7)
    assert spec.resolve("blocks.0.mlp.fc1.weight", Operand.WEIGHT).bits == 3
    assert spec.resolve("blocks.0.mlp.fc1.input", Operand.INPUT).bits == 2
    assert spec.resolve("head.weight", Operand.WEIGHT, edge=True).bits == 7
    assert spec.resolve("head.input", Operand.INPUT, edge=True).bits == 7
    assert ModelSpec.of_bits(2, rectify=False) == ModelSpec(weight_bits=2, act_bits=2, rectify=False)
    assert spec.with_bits(4) == ModelSpec(weight_bits=4, act_bits=4, edge_bits=7)


def test_residual_is_one_of_two_types_and_float32_where_nothing_is_said() -> None:
    spec, plain = ModelSpec(residual="float16"), ModelSpec()
    assert plain.residual == "float32"
    assert ModelSpec.from_dict(spec.to_dict()) == spec != plain
    assert ModelSpec.from_dict({k: v for k, v in plain.to_dict().items() if k != "residual"}) == plain
    with pytest.raises(SpecError, match="residual='bfloat16' is unknown: use float32 or float16"):
        ModelSpec(residual="bfloat16")


def test_statsq_gives_the_blocks_weights_half_steps_and_leaves_all_else() -> None:
    spec, plain = ModelSpec(weight_quantizer="statsq"), ModelSpec()
    assert spec.resolve("blocks.0.mlp.fc1.weight", Operand.WEIGHT) == QuantSpec(
        4, True, PerChannel(), HalfStep(), Operand.WEIGHT
    )
    for name, operand, edge in [("head.weight", Operand.WEIGHT, True), ("blocks.0.attn.q", Operand.QUERY, False)]:
        assert spec.resolve(name, operand, edge) == plain.resolve(name, operand, edge)
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert ModelSpec.from_dict({k: v for k, v in plain.to_dict().items() if k != "weight_quantizer"}) == plain
    with pytest.raises(SpecError, match="use lsq or statsq"):
        ModelSpec(weight_quantizer="magic")
    odd = ModelSpec(weight_quantizer="statsq", overrides={"*.fc1.weight": {"offset": "none"}})
    with pytest.raises(SpecError, match=r"blocks\.0\.mlp\.fc1\.weight: StatsQ has levels at odd half steps"):
        odd.resolve("blocks.0.mlp.fc1.weight", Operand.WEIGHT)


def test_a_half_step_of_a_weight_with_groups_says_what_to_do() -> None:
    with pytest.raises(SpecError, match=r"scale per group is refused.* use scale=PerChannel"):
        QuantSpec(4, True, PerGroup(64), HalfStep(), Operand.WEIGHT)


@pytest.mark.parametrize("operand", list(Operand))
def test_defaults_follow_the_method(operand: Operand) -> None:
    """Weights signed, a scale per output channel; q, k and map per head; v per channel; inputs with offsets per channel."""
    spec = ModelSpec().resolve("point", operand)
    want = {
        Operand.WEIGHT: (True, PerChannel(), None),
        Operand.INPUT: (False, PerTensor(), PerChannel()),
        Operand.QUERY: (True, PerHead(), HalfStep()),
        Operand.KEY: (True, PerHead(), HalfStep()),
        Operand.VALUE: (True, PerChannel(), PerChannel()),
        Operand.MAP: (False, PerHead(), None),
    }[operand]
    assert (spec.signed, spec.scale, spec.offset, spec.operand) == (*want, operand)


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("blocks.0", "blocks.0.attn.q", True),
        ("blocks.0", "blocks.01.attn.q", False),
        ("blocks.1", "blocks.10.attn.q", False),
        ("blocks.1*", "blocks.10.attn.q", True),
        ("*.fc2", "blocks.3.mlp.fc2.input", True),
        ("*.fc2.input", "blocks.3.mlp.fc2.weight", False),
        ("blocks.[02].attn", "blocks.2.attn.map", True),
        ("blocks.[02].attn", "blocks.1.attn.map", False),
        ("attn", "blocks.0.attn.q", False),
        ("*", "head.input", True),
        ("Head", "head.input", False),
        ("head", "head_dist.input", False),
    ],
)
def test_patterns(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


def test_overrides_apply_in_order_and_take_names_or_objects() -> None:
    spec = ModelSpec(
        overrides={
            "blocks.0": 8,
            "*.fc2.input": {"scale": "per_token", "offset": None, "signed": True},
            "blocks.0.mlp.fc2.input": {"bits": 5, "scale": PerGroup(64), "offset": "per_tensor"},
        }
    )
    first = spec.resolve("blocks.0.mlp.fc2.input", Operand.INPUT)
    assert first == QuantSpec(5, True, PerGroup(64), PerTensor(), Operand.INPUT)
    assert spec.resolve("blocks.1.mlp.fc2.input", Operand.INPUT) == QuantSpec(4, True, PerToken(), None, Operand.INPUT)
    assert spec.resolve("blocks.0.attn.q", Operand.QUERY).bits == 8
    assert spec.resolve("blocks.1.attn.q", Operand.QUERY).bits == 4
    # an override beats the edge width
    assert ModelSpec(overrides={"head": 4}).resolve("head.input", Operand.INPUT, edge=True).bits == 4


def test_an_override_that_cannot_run_names_the_point() -> None:
    spec = ModelSpec(overrides={"*.fc1.input": {"scale": "per_channel"}})
    with pytest.raises(SpecError, match=r"^blocks\.7\.mlp\.fc1\.input: .*equalis"):
        spec.resolve("blocks.7.mlp.fc1.input", Operand.INPUT)
    with pytest.raises(SpecError, match=r"^head\.input: .*2 to 8"):
        ModelSpec(overrides={"head": 12}).resolve("head.input", Operand.INPUT)


@pytest.mark.parametrize("change", [{"width": 4}, "4", None, 4.0, ["bits"], True])
def test_overrides_of_an_unknown_kind_are_refused(change: object) -> None:
    with pytest.raises(SpecError, match=r"blocks\.0"):
        ModelSpec(overrides={"blocks.0": change})


def test_overrides_that_match_nothing_are_refused() -> None:
    names = ["patch_embed.proj.input", "blocks.0.attn.q"]
    ModelSpec(overrides={"blocks.0": 3, "patch_embed": 8}).check_overrides(names)
    with pytest.raises(SpecError, match=r"'blocks\.7' matches no layer"):
        ModelSpec(overrides={"blocks.0": 3, "blocks.7": 3}).check_overrides(names)


def test_model_spec_json_round_trip() -> None:
    spec = ModelSpec(
        weight_bits=2,
        act_bits=3,
        edge_bits=6,
        rectify=False,
        equalise=False,
        overrides={
            "blocks.0": 8,
            "*.fc2": {"bits": 3, "scale": PerGroup(128)},
            "*.v": {"offset": None},
            "*.q": {"offset": HalfStep()},
        },
    )
    back = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert (back.weight_bits, back.act_bits, back.edge_bits, back.rectify, back.equalise) == (2, 3, 6, False, False)
    assert back.to_dict() == spec.to_dict()
    for name, operand in [
        ("blocks.0.mlp.fc2.weight", Operand.WEIGHT),
        ("blocks.1.mlp.fc2.weight", Operand.WEIGHT),
        ("blocks.1.attn.v", Operand.VALUE),
        ("blocks.1.attn.q", Operand.QUERY),
    ]:
        assert back.resolve(name, operand) == spec.resolve(name, operand)


@pytest.mark.parametrize("damage", [{"weight_bit": 4}, {"weight_bits": 16}, {"overrides": {"a": {"bots": 1}}}])
def test_damaged_model_specs_are_refused(damage: dict) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_dict(ModelSpec().to_dict() | damage)


@pytest.mark.parametrize("damage", [{"overrides": [1]}, {"overrides": None}, {"rectify": "yes"}, {"equalise": 3}])
def test_model_specs_of_wrong_types_are_refused(damage: dict) -> None:
    """A model spec is read from files, where anything may stand."""
    with pytest.raises(SpecError):
        ModelSpec.from_dict(ModelSpec().to_dict() | damage)


def test_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import qvit.spec"
    subprocess.run([sys.executable, "-c", code], check=True)
