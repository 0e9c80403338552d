"""Tables of what the data benchmark measured, and the three numbers that it is asked for.

Knows nothing of how anything was measured. Letters: B cells of a batch.
"""

import math
from dataclasses import asdict, dataclass

from eval.benchmarks.conversion import PARTS, Conversion
from eval.benchmarks.readers import IN_MEMORY, MAP_STYLE, PYTHON_LISTS, READERS, STREAMING, Rates


@dataclass(frozen=True)
class Measured:
    """One simulated file: its conversion, that of another number of cells, and the readers of its shards."""

    conversion: Conversion
    compared: Conversion
    rates: Rates

    @property
    def memory_growth(self) -> float:
        """The counts' share of memory over that of the other number of cells; NaN where that is nothing."""
        share = self.compared.counts_mib
        return self.conversion.counts_mib / share if share > 0 else math.nan

    def as_json(self) -> dict[str, object]:
        """Everything measured, every round of every reader."""
        return {
            "conversion": asdict(self.conversion),
            "compared": asdict(self.compared),
            "cells_per_second": self.rates.rounds,
        }


def summary(measured: list[Measured]) -> dict[str, float]:
    """``loader_vs_csr``, ``loader_vs_lists``, ``bytes_vs_gzip`` of the panel of most genes, the loader at its worst."""
    largest = max(measured, key=lambda one: one.conversion.num_genes)
    ours = [(name, B) for name in (MAP_STYLE, STREAMING) for B in largest.rates.rounds[name]]
    return {
        "loader_vs_csr": min(largest.rates.ratio(name, IN_MEMORY, B)[0] for name, B in ours),
        "loader_vs_lists": min(largest.rates.ratio(name, PYTHON_LISTS, B)[0] for name, B in ours),
        "bytes_vs_gzip": largest.conversion.shard_bytes / largest.conversion.gzip_bytes,
    }


def last_line(result: dict[str, float]) -> str:
    """``name=value`` of each, two digits after the point."""
    return " ".join(f"{name}={value:.2f}" for name, value in result.items())


def tables(measured: list[Measured]) -> str:
    """Markdown."""
    parts = [_conversions(measured), _bytes(measured), *(_readers(one) for one in measured)]
    return "\n".join(parts)


def _conversions(measured: list[Measured]) -> str:
    rows = []
    for one in measured:
        for c in (one.conversion, one.compared):
            rows.append(
                [
                    f"{c.num_cells:,} x {c.num_genes:,}",
                    f"{c.expressed:,.0f}",
                    f"{c.num_cells / c.seconds:,.0f}",
                    f"{c.peak_mib:,.0f} MiB",
                    f"{c.empty_mib:,.0f} MiB",
                    f"{c.counts_mib:,.0f} MiB",
                    f"{c.csr_mib:,.0f} MiB",
                ]
            )
    columns = ["cells x genes", "genes above 0", "cells/s", "peak memory", "without counts", "counts' share"]
    shares = [
        f"At {one.conversion.num_genes:,} genes {one.conversion.num_cells / one.compared.num_cells:g} times the cells "
        f"have {one.memory_growth:.2f} times the counts' share of memory."
        for one in measured
    ]
    percents = " and ".join(f"{name.split('_')[0]} {value:.0%}" for name, value in PARTS.items())
    return (
        f"## Conversion\n\nEach in a process of its own, with {percents} of the cells. Without counts: the peak for "
        "as many cells with a count or two each, which is the program, its libraries and the cells' names; the counts' "
        "share is what is above it.\n\n"
        + _table([*columns, "all counts in memory"], rows)
        + "\n".join(["", *shares, ""])
    )


def _bytes(measured: list[Measured]) -> str:
    rows = [
        [
            f"{c.num_cells:,} x {c.num_genes:,}",
            f"{c.gzip_bytes:,.0f}",
            f"{c.shard_bytes:,.0f}",
            f"{c.shard_bytes / c.gzip_bytes:.2f}",
            f"{c.folder_bytes:,.0f}",
        ]
        for c in (one.conversion for one in measured)
    ]
    columns = ["cells x genes", "h5ad with gzip", "shards", "ratio", "all that was written"]
    return (
        "## Bytes per cell on disk\n\nShards are the Parquet files; all that was written has the vocabulary, the names "
        "of the cells and the copy of each part as h5ad with them.\n\n" + _table(columns, rows)
    )


def _readers(one: Measured) -> str:
    batch_sizes = list(one.rates.rounds[IN_MEMORY])
    rounds = len(one.rates.rounds[IN_MEMORY][batch_sizes[0]])
    rows = []
    for name in READERS:
        row = [name]
        for B in batch_sizes:
            if B not in one.rates.rounds[name]:
                row += ["-"] * 3
                continue
            row.append(f"{one.rates.of(name, B):,.0f}")
            row += [_with_spread(one.rates.ratio(name, yardstick, B)) for yardstick in (IN_MEMORY, PYTHON_LISTS)]
        rows.append(row)
    columns = [c for B in batch_sizes for c in (f"cells/s, B={B}", "of in-memory CSR", "of Python lists")]
    c = one.conversion
    return (
        f"## Readers of {c.num_cells:,} cells x {c.num_genes:,} genes\n\nRandom training cells to a dense tensor (B, "
        f"genes), {rounds} rounds in turn; ratios are those of a round: median (smallest to largest). Files are in the "
        "system's cache.\n\n" + _table(["reader", *columns], rows)
    )


def _with_spread(ratio: tuple[float, float, float]) -> str:
    digits = 2 if ratio[0] < 10 else 0
    return "{0:.{d}f} ({1:.{d}f} to {2:.{d}f})".format(*ratio, d=digits)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(lines) + "\n"
