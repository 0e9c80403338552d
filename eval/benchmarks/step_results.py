"""What was measured of training steps: rows, ratios of rows that took turns, and how a cost grows with genes.

Knows nothing of how anything was measured, or of how it is shown.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from eval.benchmarks.step_variants import Case


@dataclass
class Row:
    """What one network on one batch costs."""

    case: Case
    part: str  # "step", "head" (head and loss alone), or "growth" (a step, over many numbers of genes)
    seconds: list[float]  # of one step, one for each round
    growth_mib: float  # by how much the memory grows within a step at most
    standing_mib: float = 0.0  # what stays between steps
    parameters: int = 0
    flops: float = 0.0  # of a step
    utilisation: float | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def cells_per_second(self) -> float:
        return self.case.cells / self.median

    def as_json(self) -> dict[str, object]:
        """Plain numbers and names."""
        mine = {name: value for name, value in asdict(self).items() if name != "case"}
        return {**asdict(self.case), **mine, "cells_per_second": self.cells_per_second}


@dataclass
class Result:
    """Everything that was measured."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    shares: dict[str, dict[str, float]] = field(default_factory=dict)  # of the time of a step, by backbone

    def find(self, part: str, **wanted: object) -> Row | None:
        """The row of this part whose case has these values."""
        return next((row for row in self.rows if row.part == part and fits(row.case, wanted)), None)

    def ratio(self, part: str, above: dict, below: dict) -> list[float]:
        """Seconds of one row over those of another that took turns with it, by round; empty where one is missing."""
        first, second = self.find(part, **above), self.find(part, **below)
        return [a / b for a, b in zip(first.seconds, second.seconds)] if first and second else []


def fits(case: Case, wanted: dict[str, object]) -> bool:
    """Whether a case has these values."""
    return all(getattr(case, name) == value for name, value in wanted.items())


def median(values: Sequence[float]) -> float:
    """The median; nan of nothing."""
    return statistics.median(values) if values else float("nan")


def exponent(genes: Sequence[int], costs: Sequence[float]) -> float:
    """Slope b of the least-squares line ``log cost = a + b log genes``; nan for fewer than two numbers of genes."""
    if len(set(genes)) < 2:
        return float("nan")
    return float(np.polyfit(np.log(genes), np.log(costs), 1)[0])
