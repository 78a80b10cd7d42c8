"""``--budget-mb`` and ``--budget-bops``: options, the plan that they lead to, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qvit.cli.show import count, progress, show_table
from qvit.errors import BudgetError, InputError

if TYPE_CHECKING:
    from qvit.analyze.budget import Budget, Plan
    from qvit.convert import StudentInfo
    from qvit.integer.model import IntegerModel


def budget_of(megabytes: float | None, bit_operations: float | None, bits: Iterable[int | None]) -> Budget | None:
    """The budget of the options, or ``None``.

    Raises:
        BudgetError: it is not positive.
        InputError: there are ``bits`` as well.
    """
    if megabytes is None and bit_operations is None:
        return None
    if any(width is not None for width in bits):
        raise InputError("Give either a budget, which chooses the bits, or --bits, --weight-bits and --act-bits.")
    from qvit.analyze.budget import Budget

    return Budget.of(megabytes, bit_operations)


def tracked(what: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A progress bar, as `qvit.analyze.unit_sensitivity.measure_sensitivities` takes one."""
    return lambda items, total: progress(items, total, what)


def check_kept(budget: Budget | None, model: IntegerModel) -> None:
    """Raises `BudgetError` where a frozen model's file would exceed the budget: nothing has been written yet."""
    if budget is None or budget.file_bytes is None:
        return
    from qvit.integer.file import encode

    size = len(encode(model.header, model.tensors))
    if size > budget.file_bytes:
        raise BudgetError(
            f"The file would have {size:,} bytes, {size - budget.file_bytes:,} more than the budget: give a budget that is "
            "smaller by as much."
        )


def budget_facts(recipe: Mapping[str, Any], size: int) -> dict[str, str]:
    """Whether a file of ``size`` bytes keeps the budget of the run that it comes from; empty where that had none.

    A run reserves room for its accuracies and class names; other names than it was trained with may need more.
    """
    megabytes = (recipe.get("quant") or recipe).get("budget_mb")
    if not isinstance(megabytes, (int, float)):
        return {}
    over = size - megabytes * 1e6
    return {"budget": f"{megabytes:g} MB, " + (f"exceeded by {count(over)} bytes" if over > 0 else "kept")}


def show_plan(plan: Plan) -> None:
    """Prints the chosen widths, a block a line."""
    _show_widths(
        f"Bits chosen: damages add up to {plan.damage:.4g} nats, {count(plan.bit_operations)} bit operations an image",
        plan.widths,
    )


def show_chosen(student: StudentInfo) -> dict[str, Any]:
    """Prints the widths of a student that was trained within a budget, a block a line; returns what its result row says."""
    from qvit.analyze.cost import model_cost
    from qvit.analyze.products import products_of, specs_of
    from qvit.analyze.units import units_of, widths_of

    products = products_of(student.architecture)
    specs = specs_of(products, student.spec)
    chosen = widths_of(units_of(products), specs)
    operations = model_cost(student.architecture, specs).bit_operations
    _show_widths(f"Bits chosen: {count(operations)} bit operations an image", chosen)
    return {"bit_operations": operations, **{f"bits of {unit}": bits for unit, bits in chosen.items()}}


def _show_widths(title: str, chosen: Mapping[str, int | str]) -> None:
    blocks: dict[str, dict[str, int | str]] = {}
    for unit, bits in chosen.items():
        block, _, last = _parts(unit)
        blocks.setdefault(block, {})[last] = bits
    names = list(dict.fromkeys(name for widths in blocks.values() for name in widths))
    show_table(
        title,
        ["block", *names],
        [(block, *(widths.get(name, "") for name in names)) for block, widths in blocks.items()],
    )


def _parts(unit: str) -> tuple[str, str, str]:
    """``blocks.0.attn.qkv`` -> ``blocks.0``, ``attn``, ``qkv``."""
    block, middle, last = unit.rsplit(".", 2)
    return block, middle, last
