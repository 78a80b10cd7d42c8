"""What is wrong with a recipe, in one sentence that names the key."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError

from qvit.training.sections import (
    ActivationsFirstSection,
    AnnealSection,
    AugmentSection,
    DataSection,
    DistillSection,
    ModelSection,
    OptimSection,
    OscillationSection,
    QuantSection,
    ScheduleSection,
)

_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "teacher": ModelSection,
    "data": DataSection,
    "augment": AugmentSection,
    "quant": QuantSection,
    "distill": DistillSection,
    "optim": OptimSection,
    "schedule": ScheduleSection,
    "activations_first": ActivationsFirstSection,
    "oscillation": OscillationSection,
    "anneal": AnnealSection,
}


def sentence(error: ValidationError, recipe: type[BaseModel]) -> str:
    """One sentence for the first of the mistakes that pydantic found in a ``recipe``."""
    first = error.errors(include_url=False)[0]
    # Where a key may be one of several types, pydantic adds the type to the path.
    path = [part for part in map(str, first["loc"]) if part not in ("int", "str") and not part.startswith(("list[", "dict["))]
    section = _SECTIONS.get(path[-2], recipe) if len(path) > 1 else recipe
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], *near])!r}?" if near else f"the keys here are {', '.join(known)}."
        return f"A recipe has no key {key!r}: {hint}"
    if first["type"] == "missing":
        return f"The recipe lacks the key {key!r}."
    if first["type"] == "value_error":
        return f"The recipe's {first['ctx']['error']}."
    message = first["msg"].removeprefix("Input should be ")
    if first["type"].startswith(("greater_than", "less_than")):
        return f"The recipe's {key}={first['input']!r} is out of range: use {_range(path, recipe) or message}."
    return f"The recipe's {key}={first['input']!r} is not allowed: it should be {message}."


def _range(path: list[str], recipe: type[BaseModel]) -> str:
    """The range of the number at ``path``, in words."""
    section = next((_SECTIONS[part] for part in reversed(path) if part in _SECTIONS), recipe)
    name = next(part for part in reversed(path) if part in section.model_fields)
    node = section.model_json_schema()["properties"][name]
    choices = [item for option in node.get("anyOf", [node]) for item in [option, *option.get("prefixItems", [])]]
    limits: dict[str, float] = next((item for item in choices if item.keys() & {"minimum", "exclusiveMinimum"}), {})
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    return " and ".join(f"{word} {limits[limit]:g}" for limit, word in words.items() if limit in limits)
