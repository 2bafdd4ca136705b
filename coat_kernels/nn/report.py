"""What a conversion did to a model, for people and for tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class ReportRow:
    """One module.

    Args:
        name: in the model.
        kind: its class before the conversion.
        outcome: what it became, or why it was left.
    """

    name: str
    kind: str
    outcome: str


@dataclass(frozen=True)
class ConversionReport:
    """What was converted, what was left and why; `print` shows it, grouped.

    Args:
        converted, left: one row a module, in the model's order.
    """

    converted: tuple[ReportRow, ...] = ()
    left: tuple[ReportRow, ...] = ()

    def __add__(self, other: ConversionReport) -> ConversionReport:
        again = {row.name for row in other.converted}
        left = tuple(row for row in self.left if row.name not in again)
        known = {row.name for row in (*self.converted, *left)}
        return ConversionReport(self.converted + other.converted, left + tuple(row for row in other.left if row.name not in known))

    def inside(self, name: str) -> ConversionReport:
        """The same report of a part of a model, under the names that the model knows."""

        def named(rows: tuple[ReportRow, ...]) -> tuple[ReportRow, ...]:
            return tuple(replace(row, name=f"{name}.{row.name}".rstrip(".")) for row in rows)

        return ConversionReport(named(self.converted), named(self.left))

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} modules, left {len(self.left)}"]
        for title, rows, arrow in (("converted", self.converted, "->"), ("left", self.left, "because")):
            groups = Counter((row.kind, row.outcome) for row in rows)
            for (kind, outcome), count in groups.items():
                names = [row.name for row in rows if (row.kind, row.outcome) == (kind, outcome)]
                shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if count > _NAMES_SHOWN else "")
                lines.append(f"  {title}: {count} x {kind} {arrow} {outcome} ({shown})")
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """The report of the conversions of a model, or of the one converted model inside of it (as PEFT and DDP wrap it).

    Raises:
        ValueError: nothing in the model was converted.
    """
    for module in model.modules():
        report = module.__dict__.get("coat_report")
        if report is not None:
            return report
    raise ValueError("this model was not converted: call coat_kernels.nn.convert_to_coat(model) or replace_linear_with_fp8(model) first")
