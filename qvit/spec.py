"""The vocabulary that all rooms share: how one tensor is quantized (`QuantSpec`) and how a model is (`ModelSpec`).

A code stands for a value through ``value = scale * code + offset``. A matrix product can run on the codes alone only if
whatever varies along the summed index is an integer. Hence the rule that `QuantSpec` enforces when it is built: a *scale* may
vary only along indices that stay outside the sum; an *offset* may vary along the summed index too, since it adds a constant.

    product                        summed index        scale may vary along         offset may vary along
    linear  x [N, K] W [M, K]      K input channels    x: token, K-group            x: channel
                                                       W: output channel, K-group   W: - (or half a step)
    scores  q [N, D] k [N, D]      D head width        q, k: head, token            q, k: head, channel
    values  p [N, N] v [N, D]      N key tokens        p: head, query token         p: -
                                                       v: head, channel             v: head, channel

Two pairs are refused on top, with a half-step offset each: k with a scale per token, whose offset then varies from key to
key, and a weight with a scale per group.

This file needs neither PyTorch nor NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from qvit.errors import SpecError


@dataclass(frozen=True)
class PerTensor:
    """One value for the whole tensor: shape ``[1]``."""


@dataclass(frozen=True)
class PerToken:
    """One value a token position, which a ViT has a fixed number of.

    Shapes: linear input ``[N, 1]``; q, k and the softmax map (its query token, that is, one a row) ``[H, N, 1]``.
    """


@dataclass(frozen=True)
class PerChannel:
    """One value a channel.

    Shapes: linear input ``[K]`` (offset only); weight ``[M, 1]``, its output channel; q, k (offset only) and v ``[H, 1, D]``.
    """


@dataclass(frozen=True)
class PerHead:
    """One value an attention head: shape ``[H, 1, 1]``."""


@dataclass(frozen=True)
class PerGroup:
    """One value a group of ``size`` consecutive input channels, at the price of one float addition a group and output.

    Shapes: linear input ``[K / size]``; weight ``[M, K / size]``.
    """

    size: int = 128

    def __post_init__(self) -> None:
        if self.size not in (64, 128):
            raise SpecError(f"PerGroup(size={self.size}) is not supported: use a group of 64 or 128 input channels.")


@dataclass(frozen=True)
class HalfStep:
    """An offset of half a step, not learned: the levels lie at odd multiples of ``scale / 2``, symmetric around zero."""


Granularity = PerTensor | PerToken | PerChannel | PerHead | PerGroup
OffsetGranularity = PerTensor | PerChannel | PerHead | HalfStep | None

_BY_NAME: dict[str, Any] = {
    "per_tensor": PerTensor(),
    "per_token": PerToken(),
    "per_channel": PerChannel(),
    "per_head": PerHead(),
    "half_step": HalfStep(),
    "none": None,
}


def granularity_name(granularity: Granularity | OffsetGranularity) -> str:
    """The name of a granularity in recipes, files and tables: ``per_tensor``, ``per_group_64``, ``half_step``, ``none``."""
    if isinstance(granularity, PerGroup):
        return f"per_group_{granularity.size}"
    return next(name for name, value in _BY_NAME.items() if value == granularity)


def granularity_from_name(name: str) -> Any:
    """The inverse of `granularity_name`.

    Raises:
        SpecError: no granularity has that name.
    """
    if not isinstance(name, str):
        raise SpecError(f"A granularity is given by its name, not by {name!r}; use one of {', '.join(_BY_NAME)}.")
    if match := re.fullmatch(r"per_group_(\d+)", name):
        return PerGroup(int(match[1]))
    if name not in _BY_NAME:
        raise SpecError(f"{name!r} is no granularity; use one of {', '.join(_BY_NAME)}, per_group_64, per_group_128.")
    return _BY_NAME[name]


class Operand(StrEnum):
    """What a quantized tensor is in its matrix product."""

    WEIGHT = "weight"  #: [M, K], the weight of a linear layer
    INPUT = "input"  #: [.., N, K], the activation that enters a linear layer
    QUERY = "q"  #: [B, H, N, D]
    KEY = "k"  #: [B, H, N, D]
    VALUE = "v"  #: [B, H, N, D]
    MAP = "map"  #: [B, H, N, N], the softmax map


_SCALES: dict[Operand, tuple[type, ...]] = {
    Operand.WEIGHT: (PerTensor, PerChannel, PerGroup),
    Operand.INPUT: (PerTensor, PerToken, PerGroup),
    Operand.QUERY: (PerTensor, PerHead, PerToken),
    Operand.KEY: (PerTensor, PerHead, PerToken),
    Operand.VALUE: (PerTensor, PerHead, PerChannel),
    Operand.MAP: (PerTensor, PerHead, PerToken),
}
_OFFSETS: dict[Operand, tuple[type, ...]] = {
    Operand.WEIGHT: (HalfStep,),
    Operand.INPUT: (PerTensor, PerChannel),
    Operand.QUERY: (HalfStep, PerHead, PerChannel),
    Operand.KEY: (HalfStep, PerHead, PerChannel),
    Operand.VALUE: (HalfStep, PerHead, PerChannel),
    Operand.MAP: (),
}
# The combinations that a user may well ask for, with the reason and the way out.
_WHY_NOT: dict[tuple[Operand, type], str] = {
    (Operand.INPUT, PerChannel): (
        "a scale per input channel of a linear layer's activation cannot run on integers, because it varies along the index "
        "that the product sums over; use equalisation (ModelSpec(equalise=True), which moves the channels' ranges into the "
        "weights) with per-channel offsets (offset=PerChannel()) instead"
    ),
    (Operand.QUERY, PerChannel): (
        "a scale per channel of q varies along the head width that the scores sum over; move the factor from q to k instead, "
        "which the affine parameters of IRM learn to do"
    ),
    (Operand.KEY, PerChannel): (
        "a scale per channel of k varies along the head width that the scores sum over; move the factor from k to q instead, "
        "which the affine parameters of IRM learn to do"
    ),
    (Operand.VALUE, PerToken): "a scale per token of v varies along the tokens that attention sums over; use one per channel",
    (
        Operand.MAP,
        PerChannel,
    ): "a scale per key of the softmax map varies along the keys that attention sums over; use one a row",
}


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized: ``code = clamp(round((x - offset) / scale), qn, qp)``.

    Attributes:
        bits: width of a code, 2 to 8.
        signed: codes in ``[-2^(bits-1), 2^(bits-1) - 1]`` if true, else in ``[0, 2^bits - 1]``.
        scale: what shares one scale (the step).
        offset: what shares one offset; ``None`` for no offset.
        operand: what the tensor is in its matrix product; decides what is executable.

    Raises:
        SpecError: the combination cannot run on integers; the message says why and what to use instead.

    Source: Esser et al., "Learned Step Size Quantization", 2020; Bhalgat et al., "LSQ+", 2020 (the offset).
    """

    bits: int
    signed: bool = False
    scale: Granularity = PerTensor()
    offset: OffsetGranularity = None
    operand: Operand = Operand.INPUT

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SpecError(f"bits={self.bits!r} is out of range: use 2 to 8.")
        if not isinstance(self.signed, bool):
            raise SpecError(f"signed={self.signed!r} is neither true nor false.")
        operand = Operand(self.operand)
        object.__setattr__(self, "operand", operand)
        if operand is Operand.WEIGHT and not self.signed:
            raise SpecError("A weight's codes are signed: use signed=True.")
        if operand is Operand.MAP and self.signed:
            raise SpecError("The softmax map is never negative, so its codes are unsigned: use signed=False.")
        if not isinstance(self.scale, _SCALES[operand]):
            why = _WHY_NOT.get((operand, type(self.scale)))
            raise SpecError(self._refusal("scale", why, _SCALES[operand]))
        if self.offset is not None and not isinstance(self.offset, _OFFSETS[operand]):
            raise SpecError(self._refusal("offset", None, _OFFSETS[operand]))
        if operand is Operand.KEY and isinstance(self.scale, PerToken) and isinstance(self.offset, HalfStep):
            raise SpecError(
                "A half-step offset of k with a scale per token is refused: half of a key's own step would add a term to "
                "each score that softmax does not cancel; use offset=PerHead(), PerChannel() or None with it."
            )
        if operand is Operand.WEIGHT and isinstance(self.scale, PerGroup) and self.offset is not None:
            raise SpecError(
                "A half-step offset of a weight with a scale per group is refused, since no engine runs it: "
                "use scale=PerChannel() or offset=None."
            )

    def _refusal(self, what: str, why: str | None, allowed: tuple[type, ...]) -> str:
        names = [kind.__name__ for kind in allowed] + (["None"] if what == "offset" else [])
        reason = why or f"its matrix product does not run on integers with it; use {' or '.join(names)}"
        return f"{what}={getattr(self, what)} is refused for the operand {self.operand.value!r}: {reason}."

    @property
    def qn(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qp(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def learns_offset(self) -> bool:
        """Whether the offset is a parameter of its own (a half step is derived from the scale)."""
        return self.offset is not None and not isinstance(self.offset, HalfStep)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {
            "bits": self.bits,
            "signed": self.signed,
            "scale": granularity_name(self.scale),
            "offset": granularity_name(self.offset),
            "operand": self.operand.value,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Reads what `to_dict` wrote; raises `SpecError` where a key is missing or a value is none of the known ones."""
        try:
            return cls(
                bits=data["bits"],
                signed=data["signed"],
                scale=granularity_from_name(data["scale"]),
                offset=granularity_from_name(data["offset"]),
                operand=Operand(data["operand"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"{data!r} is no quantization spec ({error}).") from None

    def scale_shape(self, dims: Dims) -> tuple[int, ...]:
        """The shape of the scale, broadcastable against the tensor (after a `PerGroup` scale is repeated over its group)."""
        return _shape(self.scale, self.operand, dims)

    def offset_shape(self, dims: Dims) -> tuple[int, ...] | None:
        """The shape of the learned offset, broadcastable against the tensor; ``None`` where none is learned."""
        return _shape(self.offset, self.operand, dims) if self.learns_offset else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class Dims:
    """The extents of a quantized tensor that its scale and offset may follow.

    Attributes:
        channels: size of the last dimension: K of a linear input or a weight, D of q, k and v, N of the softmax map.
        rows: the dimension before it: tokens N of an activation (``None`` where there are none, as in a classification head),
            output channels M of a weight.
        heads: H of q, k, v and the softmax map.
    """

    channels: int
    rows: int | None = None
    heads: int | None = None


def _shape(granularity: Granularity | PerChannel, operand: Operand, dims: Dims) -> tuple[int, ...]:
    if isinstance(granularity, PerTensor):
        return (1,)
    if isinstance(granularity, PerHead):
        return (_known(dims.heads, granularity), 1, 1)
    if isinstance(granularity, PerGroup):
        if dims.channels % granularity.size:
            raise SpecError(
                f"{dims.channels} input channels do not divide into groups of {granularity.size}: "
                "use PerGroup(64), or PerTensor() for this layer."
            )
        groups = dims.channels // granularity.size
        return (_known(dims.rows, granularity), groups) if operand is Operand.WEIGHT else (groups,)
    if isinstance(granularity, PerToken):
        rows = _known(dims.rows, granularity)
        return (rows, 1) if operand is Operand.INPUT else (_known(dims.heads, granularity), rows, 1)
    if operand is Operand.WEIGHT:
        return (_known(dims.rows, granularity), 1)
    if operand is Operand.INPUT:
        return (dims.channels,)
    return (_known(dims.heads, granularity), 1, dims.channels)


def _known(extent: int | None, granularity: object) -> int:
    if extent is None:
        raise SpecError(
            f"{granularity} needs an extent that this tensor lacks (a head's input has no tokens); use PerTensor()."
        )
    return extent


Override = Mapping[str, Any]

WEIGHT_QUANTIZERS = ("lsq", "statsq")
RESIDUALS = ("float32", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """How a whole vision transformer is quantized.

    Attributes:
        weight_bits, act_bits: widths of weights and activations of every block, 2 to 8.
        edge_bits: width of both operands of the first and the last layer (patch embedding, classification heads).
        rectify: insert IRM on q and k (paper, section 3.2).
        equalise: balance the channels of LayerNorm-fed inputs and of proj's input before calibration (SmoothQuant,
            RepQ-ViT); the float function does not change.
        weight_quantizer: of the blocks' weights: ``lsq`` learns its steps; ``statsq`` derives them from the weights and has
            levels at odd half steps (`qvit.quantizers.statsq`). The edge layers' weights are always ``lsq``.
        residual: of the residual stream, ``float32``, or ``float16``, to which it is then rounded wherever it is written
            (`qvit.integer.ops.Block`).
        overrides: pattern -> fields of `QuantSpec` to change (``bits``, ``signed``, ``scale``, ``offset``; granularities by
            name), or a number of bits alone. A pattern is a shell pattern over the names of quantization points
            (``blocks.0.attn.qkv.weight``, ``blocks.0.attn.qkv.input``, ``blocks.0.attn.q``, ..) or of the modules that hold
            them (``blocks.0``, ``*.mlp.fc2``). Later patterns win.

    Raises:
        SpecError: bits out of range, an unknown name, or an override with an unknown field.
    """

    weight_bits: int = 4
    act_bits: int = 4
    edge_bits: int = 8
    rectify: bool = True
    equalise: bool = True
    weight_quantizer: str = "lsq"
    residual: str = "float32"
    overrides: Mapping[str, int | Override] = field(default_factory=dict)

    _DEFAULTS: ClassVar[dict[Operand, tuple[bool, Granularity, OffsetGranularity]]] = {
        # operand: (signed, scale, offset). Unsigned inputs suit vpdpbusd and bit planes; see docs/decisions.md.
        Operand.WEIGHT: (True, PerChannel(), None),
        Operand.INPUT: (False, PerTensor(), PerChannel()),
        Operand.QUERY: (True, PerHead(), HalfStep()),
        Operand.KEY: (True, PerHead(), HalfStep()),
        Operand.VALUE: (True, PerChannel(), PerChannel()),
        Operand.MAP: (False, PerHead(), None),
    }

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "edge_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                raise SpecError(f"{name}={bits!r} is out of range: use 2 to 8.")
        for name in ("rectify", "equalise"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name}={getattr(self, name)!r} is neither true nor false.")
        if self.weight_quantizer not in WEIGHT_QUANTIZERS:
            raise SpecError(f"weight_quantizer={self.weight_quantizer!r} is unknown: use {' or '.join(WEIGHT_QUANTIZERS)}.")
        if self.residual not in RESIDUALS:
            raise SpecError(f"residual={self.residual!r} is unknown: use {' or '.join(RESIDUALS)}.")
        if not isinstance(self.overrides, Mapping):
            raise SpecError(f"overrides={self.overrides!r} is no mapping of name patterns to bits or to fields of a QuantSpec.")
        for pattern, change in self.overrides.items():
            unknown = set(change) - {"bits", "signed", "scale", "offset"} if isinstance(change, Mapping) else set()
            if unknown or isinstance(change, bool) or not isinstance(change, (int, Mapping)):
                raise SpecError(
                    f"The override {pattern!r}: {change!r} is neither a number of bits nor a mapping of bits, signed, scale, "
                    "offset."
                )

    @classmethod
    def of_bits(cls, bits: int, **changes: Any) -> ModelSpec:
        """The default spec with weights and activations of ``bits`` bits."""
        return cls(weight_bits=bits, act_bits=bits, **changes)

    def resolve(self, name: str, operand: Operand, edge: bool = False) -> QuantSpec:
        """The spec of the quantization point ``name``; ``edge`` for the first and the last layer.

        Raises:
            SpecError: the overrides that match ask for something that is not executable; the message names the point.
        """
        bits = self.edge_bits if edge else self.weight_bits if operand is Operand.WEIGHT else self.act_bits
        signed, scale, offset = self._DEFAULTS[operand]
        statistical = self.weight_quantizer == "statsq" and operand is Operand.WEIGHT and not edge
        if statistical:
            offset = HalfStep()
        values: dict[str, Any] = {"bits": bits, "signed": signed, "scale": scale, "offset": offset}
        for pattern, change in self.overrides.items():
            if matches(pattern, name):
                change = {"bits": change} if isinstance(change, int) else dict(change)
                for key in ("scale", "offset"):
                    if isinstance(change.get(key), str):
                        change[key] = granularity_from_name(change[key])
                values.update(change)
        try:
            resolved = QuantSpec(**values, operand=operand)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from None
        if statistical and not isinstance(resolved.offset, HalfStep):
            raise SpecError(f"{name}: StatsQ has levels at odd half steps; leave out the override of its offset.")
        return resolved

    def check_overrides(self, names: list[str]) -> None:
        """Raises `SpecError` if an override's pattern matches none of the quantization points ``names``."""
        for pattern in self.overrides:
            if not any(matches(pattern, name) for name in names):
                raise SpecError(
                    f"The override {pattern!r} matches no layer; the first of the {len(names)} points is {names[0]!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["overrides"] = {
            pattern: change
            if isinstance(change, int)
            else {
                k: granularity_name(v) if k in ("scale", "offset") and not isinstance(v, str) else v for k, v in change.items()
            }
            for pattern, change in self.overrides.items()
        }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Reads what `to_dict` wrote; raises `SpecError` on an unknown key."""
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise SpecError(f"{sorted(unknown)[0]!r} is no field of a model spec; the fields are {', '.join(sorted(known))}.")
        return cls(**data)

    def with_bits(self, bits: int) -> ModelSpec:
        """The same spec with weights and activations of ``bits`` bits."""
        return replace(self, weight_bits=bits, act_bits=bits)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the point ``name`` or a module that holds it (``blocks.0`` holds ``blocks.0.attn.q``)."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
