"""How a model is quantized, as options say it: ``--bits``, ``--override``, and ``key=value`` in general."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvit.errors import InputError, SpecError

if TYPE_CHECKING:
    from qvit.spec import ModelSpec

DEFAULT_BITS = 4


def spec_of(
    bits: int | None,
    weight_bits: int | None,
    act_bits: int | None,
    rectify: bool,
    overrides: Sequence[str],
    residual: str = "float32",
) -> ModelSpec:
    """The spec that the options describe.

    Raises:
        SpecError: bits out of range, an unknown type of the residual stream, or an override that is none.
    """
    from qvit.spec import ModelSpec

    bits = DEFAULT_BITS if bits is None else bits
    return ModelSpec(
        weight_bits=bits if weight_bits is None else weight_bits,
        act_bits=bits if act_bits is None else act_bits,
        rectify=rectify,
        residual=residual,
        overrides=dict(_override(text) for text in overrides),
    )


def _override(text: str) -> tuple[str, Any]:
    """``pattern=4`` or ``pattern={scale: per_token}`` -> pattern and what changes."""
    pattern, value = pair(text, "--override", "blocks.0.mlp.fc2=8")
    if value.lstrip("-").isdigit():
        return pattern, {"bits": int(value)}
    change = _yaml(value)
    if not isinstance(change, dict):
        raise SpecError(f"--override {text!r}: write pattern=bits, or pattern={{bits: 4, scale: per_token}}.")
    return pattern, change


def arguments_of(texts: Sequence[str]) -> dict[str, Any]:
    """``--model-arg key=value``, each -> keyword arguments for timm; raises `InputError` where one is no such pair."""
    return {key: _yaml(value) for key, value in (pair(text, "--model-arg", "patch_size=14") for text in texts)}


def pair(text: str, option: str, example: str) -> tuple[str, str]:
    """``key=value`` -> both; raises `InputError`, with the example, where ``text`` is no such pair."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise InputError(f"{option} {text!r} is not key=value: write it as {example}.")
    return key.strip(), value.strip()


def numbers(text: str | None, option: str) -> list[float] | None:
    """``0.485,0.456,0.406`` -> the numbers; raises `InputError` where ``text`` is no list of numbers."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r} is no list of numbers: write one a channel, as 0.485,0.456,0.406.") from None


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{text!r} is no valid YAML value.") from None
