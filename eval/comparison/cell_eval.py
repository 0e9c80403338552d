"""Compute the metrics of the Virtual Cell Challenge by the ``cell-eval`` package, as rows of an evaluation.

Each cell type (and covariate) is evaluated by itself. Beside the generators, the baselines and one draw of the floor
(:mod:`eval.comparison.floor`) stand the package's own yardsticks: for every perturbation the mean over all training
perturbations and the control, and its ceiling, one half of the real test cells against the other. Needs the extra
``baselines``.
Reference: Adduri et al., bioRxiv 2025.06.26.661135; https://github.com/ArcInstitute/cell-eval
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from tqdm import tqdm

from eval.comparison.baselines import BASELINES, needs_control
from eval.comparison.cells import PERTURBATION, CellCounts, Comparison, joined_labels
from eval.comparison.floor import FLOOR, Halves, floor_draws
from eval.comparison.protocols import Score, log_cp10k, mean_scores
from eval.reports.tables import Row, summary_rows

logger = logging.getLogger(__name__)

PROTOCOL = "cell-eval"
MEAN_BASELINE = "cell_eval_mean"
CEILING = "cell_eval_ceiling"
RESERVED_NAMES = (FLOOR, *BASELINES, MEAN_BASELINE, CEILING)  # no generator can have them
PROFILE = "vcc"


def cell_eval_rows(
    comparison: Comparison, baselines: Mapping[str, Iterable[CellCounts]], *, seed: int = 0
) -> list[Row]:
    """Rows of the floor, every generator, every baseline, the package's mean baseline and its ceiling.

    Raises:
        ValueError: there are no control cells.
    """
    train, real = comparison.train, comparison.real
    for cells in (train, real):
        reason = needs_control(cells)
        if reason is not None:
            raise ValueError(f"--cell-eval compares perturbations with control cells, and {reason}")
    halves = Halves(train, real, np.random.default_rng([seed, 0]))
    floor = halves.floor(next(floor_draws(train, real, draws=1, seed=seed)))
    log_compared, found = _log_cells(halves.compared), {}
    with tqdm(desc=PROTOCOL, unit=" files", disable=None) as bar:
        for model, files in {FLOOR: [floor], **comparison.generated, **baselines}.items():
            found[model] = []
            for file in files:
                drawn = file if model == FLOOR else halves.beside(file)
                found[model].append(_scores(_log_cells(drawn), log_compared))
                bar.update()
        found[MEAN_BASELINE] = [_scores(_mean_cells(train, halves.compared), log_compared)]
        bar.update()
        found[CEILING] = [_ceiling(_log_cells(real), seed=seed)]
    test_cells = {condition: rows.size for condition, rows in halves.compared.rows_by_condition.items()}
    return [row for model in found for row in summary_rows(model, PROTOCOL, found[model], test_cells=test_cells)]


def _log_cells(cells: CellCounts) -> CellCounts:
    """Cells as cell-eval takes them: log-normalised."""
    return CellCounts(log_cp10k(cells.counts), cells.labels, cells.control)


def _mean_cells(train: CellCounts, real: CellCounts) -> CellCounts:
    """The labels of the test cells, each cell the log-normalised mean over the training labels of its context.

    As in the package, each perturbation weighs the same, and the control is one of them.
    """
    values = log_cp10k(train.counts)
    contexts = _contexts(train.labels)
    wanted = _contexts(real.labels)
    cells = np.zeros(real.counts.shape)
    for context in wanted.unique():
        near = (contexts == context).to_numpy() if (contexts == context).any() else np.ones(len(train), dtype=bool)
        rows = np.flatnonzero(near)
        names = train.labels[PERTURBATION].to_numpy()[rows]
        means = [np.asarray(values[rows[names == name]].mean(axis=0)).ravel() for name in np.unique(names)]
        cells[(wanted == context).to_numpy()] = np.mean(means, axis=0)
    return CellCounts(sparse.csr_matrix(cells), real.labels, real.control)


def _scores(generated: CellCounts, real: CellCounts) -> list[Score]:
    """Every metric for every condition of the test cells, and its mean over them; both sides log-normalised."""
    theirs, ours, scores = _contexts(real.labels), _contexts(generated.labels), []
    for context in theirs.unique():
        drawn, chosen = np.flatnonzero(ours == context), np.flatnonzero(theirs == context)
        scores += _of_context(generated.take(drawn), real.take(chosen))
    return scores + mean_scores(scores, list(dict.fromkeys(score.metric for score in scores)))


def _ceiling(real: CellCounts, *, seed: int) -> list[Score]:
    """The package's ceiling of every metric, the mean over cell types, each weighing as its perturbations do.

    The package halves the cells of every condition, so ``n`` is the median number of cells of a half.
    """
    contexts = _contexts(real.labels)
    found: dict[str, list[tuple[float, int]]] = {}
    sizes: list[int] = []
    for context in contexts.unique():
        cells = real.take(np.flatnonzero(contexts == context))
        is_control = cells.labels[PERTURBATION] == real.control
        perturbed = cells.labels[PERTURBATION][~is_control].value_counts()
        if perturbed.empty or min(is_control.sum(), perturbed.max()) < 2:
            continue
        with _evaluator(_anndata(cells), None, real.control) as evaluator:
            _, table = evaluator.compute_ceiling(profile=PROFILE, write_csv=False, seed=seed)
        sizes += (perturbed // 2).tolist()
        for metric, value in table.to_dicts()[0].items():
            if value is not None and np.isfinite(value):
                found.setdefault(metric, []).append((float(value), len(perturbed)))
    n = round(float(np.median(sizes))) if sizes else 0
    means = {
        metric: np.average([v for v, _ in pairs], weights=[w for _, w in pairs]) for metric, pairs in found.items()
    }
    return [Score("per_condition", None, metric, float(mean), n) for metric, mean in means.items()]


def _of_context(generated: CellCounts, real: CellCounts) -> list[Score]:
    """Scores of one cell type: perturbations of both sides, with the real control cells on both."""
    ours, theirs = (cells.labels[PERTURBATION] for cells in (generated, real))
    shared = set(ours) & set(theirs) - {real.control}
    is_control = (theirs == real.control).to_numpy()
    if not shared or not is_control.any():
        logger.warning("cell-eval: nothing to compare in %s", _contexts(real.labels).iloc[0])
        return []
    kept = np.flatnonzero(ours.isin(shared)), np.flatnonzero(theirs.isin(shared) | is_control)
    predicted = _anndata(generated.take(kept[0]), real.take(np.flatnonzero(is_control)))
    with _evaluator(_anndata(real.take(kept[1])), predicted, real.control) as evaluator:
        table, _ = evaluator.compute(profile=PROFILE, write_csv=False)
    sizes, conditions = theirs.value_counts(), dict(zip(theirs, joined_labels(real.labels)))
    return [
        Score("condition", conditions[line["perturbation"]], metric, float(value), int(sizes[line["perturbation"]]))
        for line in table.to_dicts()
        for metric, value in line.items()
        if metric != "perturbation" and value is not None
    ]


@contextlib.contextmanager
def _evaluator(real: anndata.AnnData, predicted: anndata.AnnData | None, control: str) -> Iterator[Any]:
    """The package's evaluator, quiet: its bars, and what it logs below an error, are left out while it works."""
    from cell_eval import MetricsEvaluator

    package = logging.getLogger("cell_eval")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            yield MetricsEvaluator(
                adata_pred=predicted,
                adata_real=real,
                control_pert=control,
                pert_col=PERTURBATION,
                outdir=str(Path(folder) / PROTOCOL),
                num_threads=1,
            )
    finally:
        package.setLevel(level)


def _anndata(*cells: CellCounts) -> anndata.AnnData:
    """Cells with a column of perturbations, genes named by their position."""
    names = np.concatenate([some.labels[PERTURBATION] for some in cells])
    obs = pd.DataFrame({PERTURBATION: pd.Categorical(names)}, index=[str(row) for row in range(len(names))])
    values = sparse.vstack([some.counts for some in cells], format="csr")
    return anndata.AnnData(values.astype(np.float32), obs=obs)


def _contexts(labels: pd.DataFrame) -> pd.Series:
    """Name of each cell's labels but the perturbation's."""
    return joined_labels(labels.drop(columns=PERTURBATION))
