"""Measure a context by the rules of the Virtual Cell Challenge of 2025, by the package ``cell-eval`` (profile ``vcc``).

Cells are log-normalised. The two sides take disjoint halves of the real control cells. Beside the models stand the
package's own yardsticks: for every perturbation the mean over all training perturbations and the control, and its
ceiling, one half of the real test cells against the other.
Reference: Adduri et al., bioRxiv 2025.06.26.661135; https://github.com/ArcInstitute/cell-eval
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from eval.comparison.cells import PERTURBATION, CellCounts, together
from eval.comparison.challenges import (
    GENERATED_GENES,
    REAL_GENES,
    Context,
    Values,
    as_anndata,
    context_names,
    quiet,
    scores_in_contexts,
    whole_scores,
)
from eval.comparison.protocols import Score, log_cp10k

PROFILE = "vcc"
LARGEST_FDR = 0.05  # of a differential gene


class Rules:
    """Scores of the perturbations of a context.

    ``folder`` is for temporary files; ``seed`` is of the halves of control cells.
    """

    def __init__(self, contexts: Sequence[Context], train: CellCounts, genes: Sequence[str], folder: Path, seed: int):
        self.contexts, self.train, self.genes, self.folder, self.seed = contexts, train, genes, folder, seed
        self.controls: dict[str, list[CellCounts]] = {}
        for place, context in enumerate(contexts):
            shuffled = np.random.default_rng([seed, place]).permutation(len(context.controls))
            halves = np.array_split(shuffled, 2)
            self.controls[context.name] = [_logged(context.controls.take(np.sort(half))) for half in halves]

    def measure(
        self, context: Context, drawn: CellCounts, real: CellCounts, *, are_logs: bool = False
    ) -> tuple[dict[str, Values], Values]:
        """Metrics of each perturbation; none of the context as a whole. ``drawn`` may be log-normalised already."""
        ours, theirs = self.controls[context.name]
        sides = (drawn if are_logs else _logged(drawn), ours), (_logged(real), theirs)
        with quiet("cell_eval"):
            evaluator = self._evaluator(*[as_anndata(self.genes, *side) for side in sides], real.control)
            table, _ = evaluator.compute(profile=PROFILE, write_csv=False)
        values = {line["perturbation"]: {m: v for m, v in line.items() if _is_number(v)} for line in table.to_dicts()}
        for metric, side in ((GENERATED_GENES, "pred"), (REAL_GENES, "real")):
            de = getattr(evaluator.de_comparison, side).data
            counts = Counter(de.filter(de["fdr"] < LARGEST_FDR)["target"].to_list())
            for name in values:
                values[name][metric] = float(counts[name])
        return values, {}

    def yardsticks(self) -> tuple[list[list[Score]], list[list[Score]]]:
        """Scores of the mean over training perturbations, and the ceiling."""

        def measure(*sides) -> tuple[dict[str, Values], Values]:
            return self.measure(*sides, are_logs=True)

        means = mean_cells(self.train, together([context.perturbed for context in self.contexts]))
        ceilings = [(context, len(context.sizes), self._ceiling(context)) for context in self.contexts]
        return [scores_in_contexts(measure, self.contexts, means)], [whole_scores(ceilings)]

    def _ceiling(self, context: Context) -> Values:
        """The package's ceiling of every metric, from halves of the context's cells."""
        if max(context.sizes.values()) < 2:
            return {}
        real = as_anndata(self.genes, _logged(context.perturbed), _logged(context.controls))
        with quiet("cell_eval"):
            evaluator = self._evaluator(None, real, context.controls.control)
            _, table = evaluator.compute_ceiling(profile=PROFILE, write_csv=False, seed=self.seed)
        return {metric: value for metric, value in table.to_dicts()[0].items() if _is_number(value)}

    def _evaluator(self, predicted, real, control: str):
        from cell_eval import MetricsEvaluator

        return MetricsEvaluator(
            adata_pred=predicted,
            adata_real=real,
            control_pert=control,
            pert_col=PERTURBATION,
            outdir=str(Path(tempfile.mkdtemp(dir=self.folder)) / "cell_eval"),
            num_threads=1,
        )


def mean_cells(train: CellCounts, real: CellCounts) -> CellCounts:
    """The labels of the real cells, each cell the log-normalised mean over the training labels of its context.

    As in the package, each perturbation weighs the same, and the control is one of them.
    """
    values = log_cp10k(train.counts)
    contexts = context_names(train.labels)
    wanted = context_names(real.labels)
    cells = np.zeros(real.counts.shape)
    for context in wanted.unique():
        near = (contexts == context).to_numpy() if (contexts == context).any() else np.ones(len(train), dtype=bool)
        rows = np.flatnonzero(near)
        names = train.labels[PERTURBATION].to_numpy()[rows]
        means = [np.asarray(values[rows[names == name]].mean(axis=0)).ravel() for name in np.unique(names)]
        cells[(wanted == context).to_numpy()] = np.mean(means, axis=0)
    return CellCounts(sparse.csr_matrix(cells), real.labels, real.control)


def _logged(cells: CellCounts) -> CellCounts:
    """Cells as cell-eval takes them: log-normalised."""
    return CellCounts(log_cp10k(cells.counts), cells.labels, cells.control)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
