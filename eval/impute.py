"""Complete measured cells with a checkpoint: genes that a file lacks, and entries that are masked to try it out.

    dcm-impute checkpoint/ cells.h5ad --out complete.h5ad
    dcm-impute checkpoint/ cells.h5ad --out complete.h5ad --mask-fraction 0.1

Given counts are kept exactly. All matrices of the output are sparse and written chunk by chunk, so memory does not grow
with the number of cells beyond the input's own sparse counts. Letters: N cells, B cells of a chunk, G genes of the
model, M filled entries of a chunk, D draws.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from eval.sample import Schedule
from training.data.checkpoint import check_checkpoint, load_checkpoint
from training.data.command_line import ProgressReport, run
from training.data.files import check_writable, written_aside

if TYPE_CHECKING:
    from scipy import sparse

    from eval.drawing.read_cells import MeasuredCells
    from modeling_dcm import DCMForDenoising

logger = logging.getLogger(__name__)

X, IMPUTED, ORIGINAL = "X", "layers/imputed", "layers/original"
MEAN, VARIANCE = "layers/posterior_mean", "layers/posterior_variance"
INTERVAL = 0.9


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    cells: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    mask_fraction: float | None = None,
    draws: int = 20,
    steps: int | Literal["auto"] = 20,
    schedule: Schedule = "cubic",
    layer: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Path:
    """Fill in the model's genes that a file of cells lacks, and entries that are masked.

    The output has all genes of the model, in its order. X holds the given counts and, elsewhere, one draw; the layers
    posterior_mean and posterior_variance are over all draws (the count and 0 where it was given); the layer imputed is
    1 where filled; var["measured"] says which genes were measured in every cell. With masking, the layer original holds
    the counts of the file, and the log and uns["dcm_imputation"]["masked"] say how well masked entries were filled. The
    library size is not given to the model. Columns of var and other layers of the file are left out.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        cells: The file of cells to complete (h5ad, or 10x output); genes are matched by name, conditions by the names
            of obs columns.
        out: The h5ad file to write.
        mask_fraction: Mask this fraction of each cell's measured genes, and fill them too.
        draws: Completions of each cell, over which mean and variance are taken.
        steps: Network calls of each completion; auto goes by the entropy curve of a model without cell state.
        schedule: How many genes each step reveals; optimal goes by the model's entropy curve.
        layer: Layer of the counts; default: X.
        seed: The same seed and batch size give the same numbers.
        batch_size: Cells completed together.
    """
    if mask_fraction is not None and not 0 < mask_fraction < 1:
        raise ValueError(f"--mask-fraction {mask_fraction}: expected a number between 0 and 1")
    if draws < 2:
        raise ValueError(f"--draws {draws}: expected at least 2, as the variance is over draws")
    check_checkpoint(checkpoint)
    check_writable(out)
    if not cells.exists():
        raise FileNotFoundError(f"no file {str(cells)!r}; expected an h5ad file or 10x output")
    import torch

    from eval.drawing.read_cells import read_measured_cells

    model, tokenizer = load_checkpoint(checkpoint)
    measured = read_measured_cells(cells, tokenizer, layer)
    if measured.panels.all() and not mask_fraction:
        has_all = f"{str(cells)!r} has all {len(tokenizer.genes):,} genes of the model"
        raise ValueError(f"nothing to fill: {has_all}; mask some with --mask-fraction")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"steps": steps, "schedule": schedule, "draws": draws, "seed": seed, "batch_size": batch_size}
    options["mask_fraction"] = mask_fraction or 0.0
    entries = MaskedEntries(len(tokenizer.genes), seed) if mask_fraction else None
    with (
        written_aside(out) as aside,
        ProgressReport(len(measured) * draws, task="imputing", unit="completions") as report,
    ):
        chunks = _completed(model, measured, options, entries, report)
        _write(aside, cells, measured, chunks, {"checkpoint": Path(checkpoint).name, **options}, entries)
    lacking = int((~measured.always_measured).sum())
    line = "%s: %d cells, %d genes that were not measured (in every cell), %d draws; %.3g completions/s"
    logger.info(line, out, len(measured), lacking, draws, report.rate)
    if entries is not None:
        logger.info(entries.summary())
    return out


class MaskedEntries:
    """Masked counts, what was drawn for them, and what each gene's mean would have said.

    Entries arrive chunk by chunk and are kept as a table of how often each pair (true count, sum of draws) occurs, so
    memory does not grow with the number of cells. ``seed`` is of the random part of ranks among equal counts.
    """

    def __init__(self, num_genes: int, seed: int):
        self.generator = np.random.default_rng(seed)
        self.pairs: Counter[tuple[int, int]] = Counter()  # (true count, sum of draws): how often
        self.draws = self.covered = 0
        # per gene, of entries that were masked: how many, sum and sum of squares; and of the others: sum and how many
        self.masked, self.total, self.squares, self.given_total, self.given = np.zeros((5, num_genes))

    def add(self, counts: np.ndarray, hidden: np.ndarray, drawn: np.ndarray) -> None:
        """Take in a chunk: ``counts`` (B, G), which of them were ``hidden`` (B, G), ``drawn`` (D, M) for these."""
        truth, self.draws = counts[hidden], len(drawn)
        pairs, times = np.unique(np.stack([truth, drawn.sum(axis=0)]), axis=1, return_counts=True)
        for true, total, number in zip(*pairs.tolist(), times.tolist()):
            self.pairs[true, total] += number
        below, equal = (drawn < truth).sum(axis=0), (drawn == truth).sum(axis=0)
        rank = (below + self.generator.random(len(truth)) * (equal + 1)) / (self.draws + 1)
        self.covered += int((np.abs(rank - 0.5) < INTERVAL / 2).sum())
        counts = counts.astype(np.float64)
        self.masked += hidden.sum(axis=0)
        self.total += (counts * hidden).sum(axis=0)
        self.squares += (counts**2 * hidden).sum(axis=0)
        self.given += (~hidden).sum(axis=0)
        self.given_total += (counts * ~hidden).sum(axis=0)

    def scores(self) -> dict[str, float]:
        """How well the masked entries were filled.

        Returns:
            ``entries``; ``pearson`` and ``spearman`` between posterior means and true counts; ``pearson_gene_means``,
            the same for each gene's mean over entries that were not masked; ``coverage_90``, how often the truth lies
            in the central 90 % of its rank among the draws (ties broken at random), 0.9 if draws and truth have the
            same distribution. A correlation of constants is NaN.
        """
        truth, total = np.array(list(self.pairs)).T.astype(np.float64)
        times = np.array(list(self.pairs.values()))
        gene_means = self.given_total / np.maximum(self.given, 1)
        n = self.masked.sum()
        center, truth_center = (self.masked * gene_means).sum() / n, self.total.sum() / n
        variances = (self.masked * gene_means**2).sum() / n - center**2, self.squares.sum() / n - truth_center**2
        scale = np.sqrt(np.prod(np.maximum(variances, 0)))
        covariance = (gene_means * self.total).sum() / n - center * truth_center
        return {
            "entries": int(times.sum()),
            "pearson": weighted_correlation(truth, total, times),
            "spearman": weighted_correlation(weighted_ranks(truth, times), weighted_ranks(total, times), times),
            "pearson_gene_means": float(covariance / scale) if scale > 0 else float("nan"),
            "coverage_90": self.covered / times.sum(),
        }

    def summary(self) -> str:
        """The scores in one line."""
        return (
            "{entries:,} masked counts: posterior mean against truth, Pearson {pearson:.3f} (each gene's mean "
            "{pearson_gene_means:.3f}), Spearman {spearman:.3f}; 90 % intervals cover {coverage_90:.1%}"
        ).format(**self.scores())


def weighted_correlation(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> float:
    """Pearson correlation of pairs (n,), each of which occurs ``times`` (n,) often; NaN if one is constant."""
    covariance = np.cov(x, y, fweights=times, ddof=0)
    scale = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(covariance[0, 1] / scale) if scale > 0 else float("nan")


def weighted_ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Mean ranks (n,) of values, each of which occurs ``times`` (n,) often; equal values share theirs."""
    _, group = np.unique(values, return_inverse=True)
    size = np.bincount(group, weights=times)
    return (size.cumsum() - (size - 1) / 2)[group]


def hidden_entries(measured: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Measured entries (B, G) of a chunk that the model is not told: of each cell a fraction, one or more; 0: none."""
    hidden, some = np.zeros_like(measured), np.flatnonzero(measured.any(axis=0))
    if fraction and len(some):
        keys = rng.random((len(measured), len(some)))
        keys[~measured[:, some]] = 1.0  # above all others
        rank = keys.argsort(axis=1).argsort(axis=1)
        number = np.maximum(1, np.round(fraction * measured.sum(axis=1)))[:, None]
        hidden[:, some] = (rank < number) & measured[:, some]
    return hidden


def _completed(
    model: DCMForDenoising,
    cells: MeasuredCells,
    options: dict[str, object],
    masked: MaskedEntries | None,
    report: ProgressReport,
) -> Iterator[dict[str, sparse.csr_matrix]]:
    """Yield the output's matrices (B, G) of each chunk by their names in the file; ``masked`` is told what was hidden.

    ``options`` are those of the command; the model's :meth:`generate` may refuse them (ValueError).
    """
    import torch
    from scipy import sparse

    from eval.drawing.read_cells import chunk_seed
    from modeling_dcm.generation_dcm import row_chunks

    draws, seed, batch_size = (options[name] for name in ("draws", "seed", "batch_size"))
    for chunk, rows in row_chunks(len(cells), batch_size):
        counts = cells.counts[rows].toarray()
        measured = cells.measured(rows)
        hidden = hidden_entries(measured, options["mask_fraction"], np.random.default_rng([seed, chunk]))
        fill = hidden | ~measured
        observed = torch.from_numpy(np.where(fill, -1, cells.count_ids(counts)))
        drawn = np.empty((draws, int(fill.sum())), dtype=np.int32)  # (D, M)
        for draw in range(draws):
            ids = model.generate(
                observed=observed,
                **cells.conditions_of(rows),
                steps=options["steps"],
                schedule=options["schedule"],
                seed=chunk_seed(seed, chunk, draw),
                batch_size=batch_size,
            )
            complete = cells.tokenizer.decode(ids, seed=chunk_seed(seed, chunk, draw)).X.toarray()
            drawn[draw] = complete[fill]
            report.update(len(counts))
        if masked is not None:
            masked.add(counts, hidden, drawn[:, hidden[fill]])
        matrices = {
            X: _with_filled(counts, fill, drawn[0]),
            MEAN: _with_filled(counts, fill, drawn.mean(axis=0)),
            VARIANCE: _with_filled(np.zeros_like(counts), fill, drawn.var(axis=0, ddof=1)),
            IMPUTED: fill,
        }
        if masked is not None:
            matrices[ORIGINAL] = counts
        yield {name: sparse.csr_matrix(values) for name, values in matrices.items()}


def _with_filled(given: np.ndarray, fill: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``given`` (B, G) with ``values`` (M,) at the entries ``fill`` (B, G)."""
    filled = given.astype(np.result_type(given, values))
    filled[fill] = values
    return filled


def _write(
    path: Path,
    source: Path,
    cells: MeasuredCells,
    chunks: Iterator[dict[str, sparse.csr_matrix]],
    options: dict[str, object],
    masked: MaskedEntries | None,
) -> None:
    """Write the annotations of the source, the matrices chunk by chunk, and at the end how they were made."""
    import anndata
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    from training.data.h5ad import damage_named, read_known, write_h5ad_in_blocks

    tokenizer = cells.tokenizer
    var = pd.DataFrame({"measured": cells.always_measured}, index=tokenizer.genes)
    _, uns = tokenizer.condition_labels(cells.condition_ids, len(cells))
    kept: dict[str, dict] = {}
    if source.is_file():
        with damage_named(source), h5py.File(source, "r") as file:
            kept = {name: read_known(file[name]) for name in ("obsm", "obsp", "uns") if name in file}
    uns |= kept.pop("uns", {})  # the file knows its own conditions best
    uns.pop("dcm_panels", None)  # nothing is unmeasured now
    dtypes = {X: np.int32, MEAN: np.float32, VARIANCE: np.float32, IMPUTED: np.int8}
    if masked is not None:
        dtypes[ORIGINAL] = np.int32
    write_h5ad_in_blocks(path, anndata.AnnData(obs=cells.obs, var=var, uns=uns, **kept), chunks, dtypes)
    score = {} if masked is None else {"masked": masked.scores()}
    with h5py.File(path, "r+") as file:
        write_elem(file["uns"], "dcm_imputation", {**options, **score})


cli = partial(run, main)

if __name__ == "__main__":
    cli()
