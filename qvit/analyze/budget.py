"""Mixed precision: from a budget of bytes or bit operations to a `ModelSpec` that keeps it with the least damage.

sensitivities = measure_sensitivities(model, loader, spec)
template = file_template(model, loader, spec)
plan = plan_within(Budget(file_bytes=10_000_000), sensitivities, template, spec)
student = qvit.quantize(model, spec=plan.spec)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.analyze.choose import choose
from qvit.analyze.cost import ModelCost, model_cost
from qvit.analyze.file_size import file_bytes
from qvit.analyze.products import products_of, specs_of
from qvit.analyze.unit_sensitivity import Sensitivities, Track, images_for, measure_sensitivities
from qvit.analyze.units import Unit, units_of, with_widths
from qvit.calibration import calibrate
from qvit.convert import quantize
from qvit.errors import BudgetError
from qvit.integer.freeze import freeze
from qvit.integer.model import IntegerModel
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

_WIDEST = 8  # bits of the template: any other width has scales as large, which float16 holds as well


@dataclass(frozen=True)
class Budget:
    """What a model may cost; ``None`` is no limit.

    Attributes:
        file_bytes: of its ``.qvit`` file.
        bit_operations: of one image (`qvit.analyze.cost.BIT_OPERATIONS_DEFINITION`), first and last layer included.
    """

    file_bytes: int | None = None
    bit_operations: int | None = None

    @classmethod
    def of(cls, megabytes: float | None, bit_operations: float | None) -> Budget | None:
        """From options: megabytes of 10^6 bytes, and bit operations; ``None`` where both are.

        Raises:
            BudgetError: one is not positive.
        """
        for unit, value in (("MB", megabytes), ("bit operations", bit_operations)):
            if value is not None and not 0 < value < float("inf"):
                raise BudgetError(f"A budget of {value:g} {unit} is out of range: give a positive number.")
        if megabytes is None and bit_operations is None:
            return None
        whole = None if megabytes is None else int(round(megabytes * 1e6, 3))
        return cls(whole, None if bit_operations is None else int(bit_operations))


@dataclass(frozen=True)
class Plan:
    """Widths that keep a budget.

    Attributes:
        spec: with them.
        widths: name of a unit -> bits.
        damage: sum of the units' damages, in nats.
        file_bytes: of the ``.qvit`` file, an upper bound that is at most 16 bytes and the float32 scales of wide layers above.
        bit_operations: of one image.
    """

    spec: ModelSpec
    widths: Mapping[str, int]
    damage: float
    file_bytes: int
    bit_operations: int


def make_plan(
    budget: Budget,
    model: nn.Module,
    batches: Iterable[Any],
    spec: ModelSpec | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    images: int = 64,
    sensitivities: str | Path | None = None,
    track: Track | None = None,
    command: Sequence[str] = (),
) -> Plan:
    """Measures a float model's sensitivities, or reads them, and chooses its widths.

    Args:
        budget: what to keep.
        model, batches, spec, preprocessing, images, track: as in `measure_sensitivities`.
        classes, provenance: as in `file_template`.
        sensitivities: a file that is read where it exists, and written where it does not.
        command: what that file says of where it comes from.

    Raises:
        QvitError: as `measure_sensitivities`, `file_template`, `plan_within` and `Sensitivities.load`.
    """
    spec = ModelSpec() if spec is None else spec
    sample = [images_for(model, batches, images)]
    if sensitivities is not None and Path(sensitivities).exists():
        measured = Sensitivities.load(sensitivities)
    else:
        measured = measure_sensitivities(model, sample, spec, preprocessing, images=images, track=track)
        if sensitivities is not None:
            measured.save(sensitivities, command)
    template = file_template(model, sample, spec, preprocessing, classes, provenance, images)
    return plan_within(budget, measured, template, spec)


def plan_within(budget: Budget, sensitivities: Sensitivities, template: IntegerModel, spec: ModelSpec | None = None) -> Plan:
    """Chooses the width of every unit: the least sum of damages within the budget (`qvit.analyze.choose`).

    A limit of bytes alone leaves attention at its least damaging width, which is the widest as a rule: it has no weights. Limit
    the bit operations as well where they matter.

    Args:
        budget: with one limit at least.
        sensitivities: of the float model, measured with ``spec``.
        template: what `file_template` returned for the same model and ``spec``, with the classes and provenance of the file.
        spec: everything but the widths; its overrides win over the chosen widths.

    Raises:
        BudgetError: no choice of widths keeps the budget; the message says the smallest that one keeps.
        InputError: the sensitivities belong to another model or spec.
        SpecError: an override that cannot be executed, or matches nothing.
    """
    spec = ModelSpec() if spec is None else spec
    chooser = _Chooser(sensitivities, template, spec)
    narrowest = chooser.plan(dict.fromkeys(sensitivities.damages, sensitivities.widths[0]))
    _check_possible(
        budget, narrowest, f"{sensitivities.widths[0]} bits in every block{', overrides apart' * bool(spec.overrides)}"
    )
    # What the file holds beside weights depends a little on the widths (names of the specs): allow for what was seen.
    limit = budget.file_bytes
    while True:
        plan = chooser.choose(limit, budget.bit_operations) or narrowest
        if budget.file_bytes is None or plan.file_bytes <= budget.file_bytes:
            return plan
        assert limit is not None
        limit -= plan.file_bytes - budget.file_bytes


class _Chooser:
    """Costs of all units at all widths."""

    def __init__(self, sensitivities: Sensitivities, template: IntegerModel, spec: ModelSpec) -> None:
        self.sensitivities, self.template, self.spec = sensitivities, template, spec
        self.products = products_of(template.architecture)
        self.units: Sequence[Unit] = units_of(self.products)
        sensitivities.check(template.architecture, spec, self.units)
        self.widths = sensitivities.widths
        self.damages = np.array([[sensitivities.damages[u.name][bits] for bits in self.widths] for u in self.units])
        uniform = [self.cost(dict.fromkeys(sensitivities.damages, bits)) for bits in self.widths]
        self.weight_bytes = self._of_units(uniform, "weight_bytes")
        self.bit_operations = self._of_units(uniform, "bit_operations")
        self.fixed_operations = uniform[0].bit_operations - int(self.bit_operations[:, 0].sum())
        narrow = self.plan(dict.fromkeys(sensitivities.damages, self.widths[0]))
        self.fixed_bytes = narrow.file_bytes - int(self.weight_bytes[:, 0].sum())

    def _of_units(self, uniform: list[ModelCost], name: str) -> np.ndarray:
        """A cost of every unit at every width, [U, W]."""
        columns = []
        for cost in uniform:
            of_product = {product.name: getattr(product, name) for product in cost.products}
            columns.append([sum(of_product[product] for product in unit.products) for unit in self.units])
        return np.array(columns, dtype=np.int64).T

    def cost(self, widths: Mapping[str, int]) -> ModelCost:
        """What a model of these widths costs."""
        spec = with_widths(self.spec, self.units, widths)
        return model_cost(self.template.architecture, specs_of(self.products, spec))

    def plan(self, widths: Mapping[str, int]) -> Plan:
        """The plan of these widths."""
        spec = with_widths(self.spec, self.units, widths)
        specs = specs_of(self.products, spec)
        operations = model_cost(self.template.architecture, specs).bit_operations
        damage = sum(self.sensitivities.damages[unit][bits] for unit, bits in widths.items())
        return Plan(spec, dict(widths), damage, file_bytes(self.template, specs), operations)

    def choose(self, file_limit: int | None, operations_limit: int | None) -> Plan | None:
        """The best plan within limits of the file's bytes, header as that of the narrowest, and of bit operations."""
        costs, limits = [], []
        if file_limit is not None:
            costs.append(self.weight_bytes)
            limits.append(file_limit - self.fixed_bytes)
        if operations_limit is not None:
            costs.append(self.bit_operations)
            limits.append(operations_limit - self.fixed_operations)
        chosen = choose(self.damages, costs, limits)
        if chosen is None:
            return None
        return self.plan({unit.name: self.widths[option] for unit, option in zip(self.units, chosen, strict=True)})


def _check_possible(budget: Budget, narrowest: Plan, widths: str) -> None:
    """Raises `BudgetError` where not even the narrowest plan, which costs least in everything, keeps the budget.

    ``widths`` are those of that plan, in words.
    """
    if budget.file_bytes is not None and narrowest.file_bytes > budget.file_bytes:
        least = -(-narrowest.file_bytes // 1000) / 1000
        raise BudgetError(
            f"A file of {budget.file_bytes / 1e6:g} MB cannot be met: the smallest that this model can have is {least:.3f} MB "
            f"({narrowest.file_bytes:,} bytes), with {widths}."
        )
    if budget.bit_operations is not None and narrowest.bit_operations > budget.bit_operations:
        raise BudgetError(
            f"{budget.bit_operations:,} bit operations an image cannot be met: the fewest that this model can have are "
            f"{narrowest.bit_operations:,}, with {widths}."
        )


def file_template(
    model: nn.Module,
    batches: Iterable[Any],
    spec: ModelSpec | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    images: int = 64,
) -> IntegerModel:
    """The model calibrated at 8 bits and frozen: what is in its file beside weights, for `plan_within`.

    Args:
        model: float; left as it is.
        batches, images: as in `qvit.calibrate`.
        spec, preprocessing: as in `qvit.quantize`; the spec's widths do not count.
        classes, provenance: as in `qvit.freeze`; the provenance's length counts, not what it says.

    Raises:
        QvitError: as those functions.
    """
    wide = (ModelSpec() if spec is None else spec).with_bits(_WIDEST)
    student = quantize(model, spec=wide, preprocessing=preprocessing).eval()
    calibrate(student, batches, images=images)
    return freeze(student, classes, provenance)
