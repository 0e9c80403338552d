"""Decide whether numbers are counts, and say what is wrong with them when they are not.

Works on plain arrays of stored values, block by block, and needs numpy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST_LOG_COUNT = 25.0  # log2 of 33 million: no log-normalised value of a cell is larger


def library_size(counts: object) -> np.ndarray:
    """Total counts (n,) int64 of each cell of a scipy sparse matrix or an array (n, genes)."""
    return np.asarray(counts.sum(axis=1, dtype=np.int64)).ravel()


@dataclass
class CountCheck:
    """Tally of the values that cannot be counts, over as many blocks as are added."""

    values: int = 0  # looked at; of a sparse matrix the stored ones
    not_finite: int = 0  # NaN or infinite
    negative: int = 0
    fractional: int = 0
    minimum: float = 0.0  # of the finite values, and 0
    maximum: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether every value so far is a count: finite, not negative, an integer."""
        return not (self.not_finite or self.negative or self.fractional)

    def add(self, values: np.ndarray) -> None:
        """Look at one block of values of any shape.

        Raises:
            ValueError: the values are not numbers at all.
        """
        values = np.asarray(values)
        if values.dtype.kind not in "buif":
            raise ValueError(f"expected counts, got values of type {values.dtype}")
        self.values += values.size
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            self.not_finite += values.size - int(finite.sum())
            values = values[finite]
            self.fractional += int((values != np.floor(values)).sum())
        if values.size:
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))
            if self.minimum < 0:
                self.negative += int((values < 0).sum())

    def raise_if_bad(self, source: str, *, layers: Sequence[str] = (), layer_option: str = "layer='{}'") -> None:
        """Raise if any value so far is not a count.

        Args:
            source: what the values are, to open the message with, such as ``"X of cells.h5ad"``.
            layers: names of other matrices of the same cells, to offer as the way out.
            layer_option: how the caller's user names a layer; ``{}`` stands for its name.

        Raises:
            ValueError: with how many values are bad, the extreme one, and what to do.
        """
        if self.is_clean:
            return
        extremes = f"(smallest {self.minimum:.4g}, largest {self.maximum:.4g})"
        if self.not_finite:
            count, what = self.not_finite, f"are NaN or infinite (largest of the others {self.maximum:.4g})"
            hint = "remove or repair them"
        elif self.negative and self.fractional:
            count, what = self.negative, f"are negative {extremes} and others are not integers"
            hint = "looks scaled; counts are needed"
        elif self.negative:
            count, what, hint = self.negative, f"are negative {extremes}", "counts are needed"
        else:
            count, what = self.fractional, f"are not integers (largest {self.maximum:.4g})"
            hint = "looks log-normalised" if self.maximum <= LARGEST_LOG_COUNT else "looks normalised"
        offered = [name for name in layers if name.lower() in ("counts", "x_counts", "raw_counts")] or list(layers)
        way_out = f"pass {layer_option.format(offered[0] if offered else 'counts')}"
        known = f" (layers here: {', '.join(layers)})" if layers else " if the counts are in a layer (none here)"
        share = f"{count:,} of {self.values:,} values ({count / self.values:.2%})"
        raise ValueError(f"{source}: {share} {what}; {hint}: {way_out}{known}")
