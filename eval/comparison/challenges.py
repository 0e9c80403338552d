"""Score perturbations by the rules of a Virtual Cell Challenge, as rows of an evaluation.

The rules of a year are a class (:class:`eval.comparison.vcc2025.Rules`, :class:`eval.comparison.vcc2026.Rules`) that
measures one context, all labels but the perturbation's, at a time. Here stands what they share: which cells they are
given, the means over perturbations and over contexts, and strata by the size of the real effect. Both need the extra
``baselines``.
"""

import contextlib
import io
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from tqdm import tqdm

from eval.comparison.baselines import BASELINES, Sampler, needs_control
from eval.comparison.cells import PERTURBATION, CellCounts, Comparison, joined_labels
from eval.comparison.floor import FLOOR, Halves, samples_of
from eval.comparison.protocols import Challenge, Score, mean_scores
from eval.reports.tables import Row, summary_rows

logger = logging.getLogger(__name__)

YARDSTICKS = {"vcc2025": ("cell_eval_mean", "cell_eval_ceiling"), "vcc2026": ("generic_response", "replicate")}
RESERVED_NAMES = (FLOOR, *BASELINES, *itertools.chain(*YARDSTICKS.values()))  # no generator can have them
GENERATED_GENES, REAL_GENES = "differential_genes", "differential_genes_real"  # how many the cells of each side show
STRATA = {
    "no differential genes": (0, 0),
    "1 to 9 differential genes": (1, 9),
    "10 or more differential genes": (10, np.inf),
}

Values = dict[str, float]  # by metric
Measure = Callable[["Context", CellCounts, CellCounts], tuple[dict[str, Values], Values]]


@dataclass(frozen=True)
class Context:
    """Real test cells that share all labels but the perturbation's: the perturbed and the control cells."""

    name: str
    perturbed: CellCounts
    controls: CellCounts

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Cells of each perturbation."""
        return self.perturbed.labels[PERTURBATION].value_counts().to_dict()

    @cached_property
    def conditions(self) -> dict[str, str]:
        """Perturbation -> name of its condition."""
        return dict(zip(self.perturbed.labels[PERTURBATION], joined_labels(self.perturbed.labels)))


def challenge_rows(
    challenge: Challenge, comparison: Comparison, samplers: Mapping[str, Sampler], *, seed: int = 0
) -> list[Row]:
    """Rows of the floor, every generator, every baseline and the challenge's own yardsticks.

    Raises:
        ValueError: there are no control cells.
    """
    from eval.comparison import vcc2025, vcc2026

    train, real = comparison.train, comparison.real
    for cells in (train, real):
        reason = needs_control(cells)
        if reason is not None:
            raise ValueError(f"protocol {challenge.name} compares perturbations with control cells, and {reason}")
    halves = Halves(train, real, np.random.default_rng([seed, 0]))
    contexts = _contexts(halves.compared)
    with tempfile.TemporaryDirectory() as folder, tqdm(desc=challenge.name, unit=" files", disable=None) as bar:
        make = {"vcc2025": vcc2025.Rules, "vcc2026": vcc2026.Rules}[challenge.name]
        rules = make(contexts, train, comparison.genes, Path(folder), seed)
        found: dict[str, list[list[Score]]] = {}
        for model, samples in samples_of(comparison, samplers, seed=seed).items():
            found[model] = []
            for drawn in samples:
                cells = halves.compared_cells(model, drawn)
                found[model].append(scores_in_contexts(rules.measure, contexts, cells))
                bar.update()
        found |= dict(zip(YARDSTICKS[challenge.name], rules.yardsticks()))
    test_cells = {name: rows.size for name, rows in halves.compared.rows_by_condition.items()}
    test_cells |= {context.name: len(context.perturbed) for context in contexts} | dict.fromkeys(STRATA, len(real))
    return [
        row for m, scores in found.items() for row in summary_rows(m, challenge.name, scores, test_cells=test_cells)
    ]


def scores_in_contexts(measure: Measure, contexts: Sequence[Context], generated: CellCounts) -> list[Score]:
    """Scores of every perturbation, their means, those of the strata, and what is measured of contexts as wholes.

    ``measure`` is given a context and the generated and real cells of the perturbations that both sides have.
    """
    names, scores, wholes = context_names(generated.labels), [], []
    for context in contexts:
        drawn = generated.take(np.flatnonzero(names == context.name))
        shared = set(drawn.labels[PERTURBATION]) & set(context.sizes)
        if not shared:
            logger.warning("nothing was generated to compare in %s", context.name)
            continue
        sides = [
            cells.take(np.flatnonzero(cells.labels[PERTURBATION].isin(shared))) for cells in (drawn, context.perturbed)
        ]
        values, whole = measure(context, *sides)
        scores += [
            Score("condition", context.conditions[name], metric, value, context.sizes[name])
            for name in sorted(shared)
            for metric, value in values.get(name, {}).items()
        ]
        wholes.append((context, len(shared), whole))
    metrics = list(dict.fromkeys(score.metric for score in scores))
    return scores + mean_scores(scores, metrics) + whole_scores(wholes) + _strata(scores, metrics)


def whole_scores(wholes: Sequence[tuple[Context, int, Values]]) -> list[Score]:
    """Scores of contexts as wholes, and their mean, each context weighing as its number of perturbations does."""
    scores = []
    for metric in dict.fromkeys(metric for _, _, values in wholes for metric in values):
        found = [(context, weight, values[metric]) for context, weight, values in wholes if metric in values]
        sizes = [round(float(np.median([*context.sizes.values()]))) for context, _, _ in found]
        mean = float(np.average([value for *_, value in found], weights=[weight for _, weight, _ in found]))
        scores.append(Score("per_condition", None, metric, mean, round(float(np.median(sizes)))))
        if len(wholes) > 1:
            scores += [Score("context", c.name, metric, value, n) for (c, _, value), n in zip(found, sizes)]
    return scores


def _strata(scores: Sequence[Score], metrics: Sequence[str]) -> list[Score]:
    """Means over the perturbations with no, few and ten or more differential genes in the real cells."""
    genes = {score.condition: score.value for score in scores if score.metric == REAL_GENES}
    found = []
    for name, (least, most) in STRATA.items():
        inside = [score for score in scores if least <= genes.get(score.condition, np.nan) <= most]
        found += [replace(mean, grouping="stratum", condition=name) for mean in mean_scores(inside, metrics)]
    return found


def context_names(labels: pd.DataFrame) -> pd.Series:
    """Name of each cell's labels but the perturbation's."""
    return joined_labels(labels.drop(columns=PERTURBATION))


def _contexts(real: CellCounts) -> list[Context]:
    """The contexts with a perturbation and two control cells or more; the others are left out, which is logged."""
    names, found = context_names(real.labels), []
    is_control = (real.labels[PERTURBATION] == real.control).to_numpy()
    for name in names.unique():
        perturbed, controls = (np.flatnonzero((names == name).to_numpy() & rows) for rows in (~is_control, is_control))
        if not perturbed.size or controls.size < 2:
            logger.warning("%s has %d perturbed and %d control cells: left out", name, perturbed.size, controls.size)
            continue
        found.append(Context(name, real.take(perturbed), real.take(controls)))
    return found


def as_anndata(genes: Sequence[str], *cells: CellCounts) -> anndata.AnnData:
    """Cells one after the other, with their column of perturbations."""
    names = np.concatenate([some.labels[PERTURBATION] for some in cells])
    obs = pd.DataFrame({PERTURBATION: pd.Categorical(names)}, index=[str(row) for row in range(len(names))])
    values = sparse.vstack([some.counts for some in cells], format="csr")
    return anndata.AnnData(values.astype(np.float32), obs=obs, var=pd.DataFrame(index=list(genes)))


@contextlib.contextmanager
def quiet(package: str) -> Iterator[None]:
    """Leave out a package's bars, and what it logs below an error, while it works."""
    its_logger = logging.getLogger(package)
    level = its_logger.level
    its_logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        its_logger.setLevel(level)
