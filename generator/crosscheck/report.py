"""A cross-check in figures: by group, and each approximation with the error that was seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .compare import Row
from .recording import is_exact
from .runner import Outcome

HEADER = ("group", "cases", "values", "same bits", "within bound", "outside", "refused", "failed")


@dataclass(frozen=True)
class Line:
    """One group. `same`: cases that agree in every bit (but for NaN payloads a rule leaves open); `within`: in others
    every value is within the documented bound; `outside`: some is not; `refused` by the device's assembler.
    """

    group: str
    cases: int
    values: int
    same: int
    within: int
    outside: int
    refused: int
    failed: int

    def cells(self) -> list[str]:
        counts = (self.cases, self.values, self.same, self.within, self.outside, self.refused, self.failed)
        return [self.group, *(f"{count:,}" for count in counts)]


def lines_of(outcome: Outcome) -> list[Line]:
    """A line a group, in the order of their first case."""
    groups = dict.fromkeys(
        [row.group for row in outcome.rows]
        + [case.group for case in outcome.refused]
        + [case.group for case, _ in outcome.failed]
    )
    return [_line(group, outcome) for group in groups]


def _line(group: str, outcome: Outcome) -> Line:
    rows = [row for row in outcome.rows if row.group == group]
    refused = sum(case.group == group for case in outcome.refused)
    failed = sum(case.group == group for case, _ in outcome.failed)
    same = sum(row.good and (row.differ == 0 or is_exact(row.rule)) for row in rows)
    good = sum(row.good for row in rows)
    values = sum(row.values for row in rows)
    return Line(group, len(rows) + refused + failed, values, same, good - same, len(rows) - good, refused, failed)


def approximations(rows: Iterable[Row]) -> list[Row]:
    """The cases that a documented bound is for, and that differ somewhere."""
    return [row for row in rows if not is_exact(row.rule) and row.differ]


def markdown(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """Tables of several cross-checks, each with a title."""
    text = []
    for title, outcome in outcomes:
        rule = "|".join(["---"] * len(HEADER))
        text += [f"### {title}", "", f"{outcome.device}, {outcome.target}, driver {outcome.driver}.", ""]
        text += [f"| {' | '.join(HEADER)} |", f"|{rule}|"]
        text += [f"| {' | '.join(line.cells())} |" for line in lines_of(outcome)]
        seen = [row for row in approximations(outcome.rows) if row.group in ("scalar", "conversion")]
        if seen:
            text += [
                "",
                "| approximation | values that differ | largest error, of the bound | bound |",
                "|---|---|---|---|",
            ]
            text += [f"| `{r.name}` | {r.differ} of {r.values} | {r.worst:.2f} | {r.rule.source} |" for r in seen]
        text.append("")
    return "\n".join(text)
