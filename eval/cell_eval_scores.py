"""The metrics of the Virtual Cell Challenge, by the ``cell-eval`` package, as rows of an evaluation.

Each cell type (and covariate) is evaluated by itself. Beside the generators stand the package's own yardsticks: the
mean over all training perturbations for every perturbation, and as ceiling (under the name of the floor) real training
cells. Needs the extra ``baselines``. Reference: Adduri et al., bioRxiv 2025.06.26.661135; https://github.com/ArcInstitute/cell-eval
"""

import importlib.util
import logging
import tempfile

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from eval.baselines import needs_control
from eval.compared_cells import Cells
from eval.labelled_counts import PERTURBATION, SEPARATOR, LabelledCounts
from eval.protocols import Score, floor_draws
from eval.report import FLOOR, Row, summary_rows
from eval.spaces import log_cp10k

logger = logging.getLogger(__name__)

PROTOCOL = "cell-eval"
MEAN_BASELINE = "cell_eval_mean"
PROFILE = "vcc"
MISSING = "--cell-eval needs the package cell-eval: pip install 'discrete-cell-models[baselines]'"


def check_installed() -> None:
    """Refuse to start where the package is not there.

    Raises:
        ValueError: cell-eval is not installed.
    """
    if importlib.util.find_spec("cell_eval") is None:
        raise ValueError(MISSING)


def rows(cells: Cells, *, seed: int = 0) -> list[Row]:
    """Rows of every generator, of the mean baseline and of the ceiling.

    Raises:
        ValueError: cell-eval is not installed, or there are no control cells.
    """
    check_installed()
    for real in (cells.train, cells.real):
        reason = needs_control(real)
        if reason is not None:
            raise ValueError(f"--cell-eval compares perturbations with control cells, and {reason}")
    found: list[Row] = []
    test_cells = {condition: rows.size for condition, rows in cells.real.rows_by_condition.items()}
    ceiling = next(floor_draws(cells.train, cells.real, draws=1, seed=seed))
    sources = {FLOOR: [ceiling], **cells.generated}
    for model, files in sources.items():
        repeats = [_scores(_log_cells(file), cells.real) for file in files]
        found += summary_rows(model, PROTOCOL, repeats, test_cells=test_cells)
    mean = _scores(_mean_cells(cells.train, cells.real), cells.real)
    return found + summary_rows(MEAN_BASELINE, PROTOCOL, [mean], test_cells=test_cells)


def _log_cells(cells: LabelledCounts) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Cells as cell-eval takes them: log-normalised, with their labels."""
    return log_cp10k(cells.counts), cells.labels


def _mean_cells(train: LabelledCounts, real: LabelledCounts) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """The labels of the test cells, each cell the mean over the training perturbations of its context."""
    values = log_cp10k(train.counts)
    contexts = _contexts(train.labels)
    wanted = _contexts(real.labels)
    cells = np.zeros(real.counts.shape)
    for context in wanted.unique():
        near = (contexts == context).to_numpy() if (contexts == context).any() else np.ones(len(train), dtype=bool)
        rows = np.flatnonzero(near & (train.labels[PERTURBATION] != train.control).to_numpy())
        names = train.labels[PERTURBATION].to_numpy()[rows]
        means = [np.asarray(values[rows[names == name]].mean(axis=0)).ravel() for name in np.unique(names)]
        if means:
            cells[(wanted == context).to_numpy()] = np.mean(means, axis=0)
    return sparse.csr_matrix(cells), real.labels


def _scores(generated: tuple[sparse.csr_matrix, pd.DataFrame], real: LabelledCounts) -> list[Score]:
    """Every metric for every condition of the test cells, and its mean over them."""
    values, labels = generated
    real_values, scores = log_cp10k(real.counts), []
    theirs, ours = _contexts(real.labels), _contexts(labels)
    for context in theirs.unique():
        chosen, drawn = np.flatnonzero(theirs == context), np.flatnonzero(ours == context)
        scores += _of_context(
            (values[drawn], labels.iloc[drawn]), (real_values[chosen], real.labels.iloc[chosen]), real.control
        )
    for metric in dict.fromkeys(score.metric for score in scores):
        found = [score for score in scores if score.metric == metric and np.isfinite(score.value)]
        if found:
            mean, n = np.mean([score.value for score in found]), np.median([score.n for score in found])
            scores.append(Score("per_condition", None, metric, float(mean), round(float(n))))
    return scores


def _of_context(
    generated: tuple[sparse.csr_matrix, pd.DataFrame], real: tuple[sparse.csr_matrix, pd.DataFrame], control: str
) -> list[Score]:
    """Scores of one cell type: perturbations of both sides, with the real control cells on both."""
    from cell_eval import MetricsEvaluator

    (values, labels), (real_values, real_labels) = generated, real
    shared = set(labels[PERTURBATION]) & set(real_labels[PERTURBATION]) - {control}
    is_control = (real_labels[PERTURBATION] == control).to_numpy()
    if not shared or not is_control.any():
        logger.warning("cell-eval: nothing to compare in %s", _contexts(real_labels).iloc[0])
        return []
    kept, real_kept = labels[PERTURBATION].isin(shared).to_numpy(), real_labels[PERTURBATION].isin(shared).to_numpy()
    real_names = real_labels[PERTURBATION].to_numpy()
    predicted = _anndata(
        sparse.vstack([values[kept], real_values[is_control]], format="csr"),
        np.concatenate([labels[PERTURBATION].to_numpy()[kept], real_names[is_control]]),
    )
    true = _anndata(real_values[real_kept | is_control], real_names[real_kept | is_control])
    with tempfile.TemporaryDirectory() as folder:
        evaluator = MetricsEvaluator(
            adata_pred=predicted, adata_real=true, control_pert=control, pert_col=PERTURBATION, outdir=folder
        )
        table, _ = evaluator.compute(profile=PROFILE, write_csv=False)
    sizes = pd.Series(real_names).value_counts()
    conditions = _conditions(real_labels)
    return [
        Score("condition", conditions[line["perturbation"]], metric, float(value), int(sizes[line["perturbation"]]))
        for line in table.to_dicts()
        for metric, value in line.items()
        if metric != "perturbation" and value is not None
    ]


def _anndata(values: sparse.csr_matrix, names: np.ndarray) -> anndata.AnnData:
    """Cells with a column of perturbations, genes named by their position."""
    obs = pd.DataFrame({PERTURBATION: pd.Categorical(names)}, index=[str(row) for row in range(len(names))])
    return anndata.AnnData(values.astype(np.float32), obs=obs)


def _contexts(labels: pd.DataFrame) -> pd.Series:
    """Name of each cell's labels but the perturbation's."""
    columns = list(labels.columns.drop(PERTURBATION))
    return labels[columns].agg(SEPARATOR.join, axis=1) if columns else pd.Series("all", index=labels.index)


def _conditions(labels: pd.DataFrame) -> dict[str, str]:
    """Perturbation -> the full condition's name, within one context."""
    return dict(zip(labels[PERTURBATION], labels.agg(SEPARATOR.join, axis=1)))
