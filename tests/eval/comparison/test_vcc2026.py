"""The protocol of the Virtual Cell Challenge of 2026: scales, scores and strata, beside the package itself."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.challenges import STRATA, as_anndata, challenge_rows
from eval.comparison.protocols import CHALLENGES

cell_eval2 = pytest.importorskip("cell_eval2", reason="the extra 'baselines' is not installed")
GENES = [f"g{number}" for number in range(100)]
NAMES = ["control", "g0", "g1", "g2", "g3", "g4", "g5+g6"]
MEMBERS = (
    "pds_cosine",
    "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard",
    "de_wilcoxon_lfc_nmae",
)


def screen(cell_type: str, *, seed: int, effect: float = 1.0, num: int = 40) -> CellCounts:
    """Cells of six perturbations, each of which changes fourteen of forty genes up or down, and control cells."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(7)
    means = truth.gamma(2.0, 1.0, size=len(GENES)) + 0.5
    blocks = []
    for name in NAMES:
        changed = means.copy()
        if name != "control":
            genes = 10 + truth.permutation(40)[:14]
            changed[genes] *= np.exp(effect * truth.choice([-1.0, 1.0], size=14))
        blocks.append(rng.poisson(changed * means.sum() / changed.sum(), size=(num, len(GENES))))
    labels = pd.DataFrame({"cell_type": cell_type, "perturbation": np.repeat(NAMES, num)})
    return CellCounts(sparse.csr_matrix(np.concatenate(blocks)), labels, "control")


def joined(*parts: CellCounts) -> CellCounts:
    labels = pd.concat([part.labels for part in parts], ignore_index=True)
    return replace(parts[0], counts=sparse.vstack([part.counts for part in parts], format="csr"), labels=labels)


def shuffled(cells: CellCounts) -> CellCounts:
    """The cells of every perturbation under the name of another."""
    others = {"control": "control"} | dict(zip(NAMES[1:], [*NAMES[2:], NAMES[1]]))
    return replace(cells, labels=cells.labels.assign(perturbation=cells.labels["perturbation"].map(others)))


def rows_of(real: CellCounts, train: CellCounts, **generated: CellCounts) -> dict[tuple, float]:
    comparison = Comparison(real, train, {name: [cells] for name, cells in generated.items()}, GENES, None)
    rows = challenge_rows(CHALLENGES["vcc2026"], comparison, {})
    json.dumps(rows, allow_nan=False)
    return {(row["model"], row["grouping"], row["condition"], row["metric"]): row["mean"] for row in rows}


@pytest.fixture(scope="module")
def one_context() -> dict[tuple, float]:
    real, train = screen("a", seed=1), screen("a", seed=2)
    return rows_of(real, train, exact=real, shuffled=shuffled(real), fresh=screen("a", seed=3))


def test_scores_are_zero_at_the_generic_response_and_one_at_the_replicate(one_context):
    for metric in MEMBERS:
        low, high, u = (
            one_context[model, "per_condition", None, metric] for model in ("generic_response", "replicate", "fresh")
        )
        expected = (u - low) / (high - low)
        if metric.startswith("expr"):  # the package bounds this one
            expected = np.clip(expected, 0, 1)
        assert one_context["fresh", "per_condition", None, f"score_{metric}"] == pytest.approx(expected, rel=1e-4)


def test_fresh_cells_of_the_perturbations_are_at_the_floor_and_those_of_others_below_zero(one_context):
    score = {m: one_context[m, "per_condition", None, "score"] for m in ("floor", "exact", "fresh", "shuffled")}
    assert score["exact"] > score["fresh"] > 0.9
    assert score["fresh"] == pytest.approx(score["floor"], abs=0.2)
    assert score["shuffled"] < 0
    members = [one_context["fresh", "per_condition", None, f"score_{metric}"] for metric in MEMBERS]
    assert score["fresh"] == pytest.approx(np.mean(members), rel=1e-5)


def test_numbers_of_differential_genes_stand_beside_those_of_the_real_cells_and_make_the_strata(one_context):
    for model in ("floor", "exact", "fresh"):
        ours, real = (one_context[model, "per_condition", None, f"differential_genes{side}"] for side in ("", "_real"))
        assert ours == pytest.approx(real, rel=0.2)
    strong = [*STRATA][-1]
    assert (
        one_context["fresh", "stratum", strong, "pds_cosine"]
        == one_context["fresh", "per_condition", None, "pds_cosine"]
    )
    assert not [key for key in one_context if key[1] == "stratum" and key[2] != strong]


def test_the_numbers_are_those_of_the_package_with_its_preset():
    real, drawn = screen("a", seed=1), screen("a", seed=3)
    config = cell_eval2.EvalConfig.from_preset("vcc2026")
    targets = {name: name if name in GENES else None for name in NAMES[1:]}
    config = replace(config, pert_col="perturbation", control="control", target_gene_map=targets)
    pair = as_anndata(GENES, drawn), as_anndata(GENES, real)
    table = cell_eval2.aggregate_metrics(cell_eval2.compute_metrics(*pair, config=config))
    expected = {line["metric"]: line["mean"] for line in table.to_dicts()}
    found = rows_of(real, screen("a", seed=2), drawn=drawn)
    for metric in MEMBERS:
        value = found["drawn", "per_condition", None, metric]
        assert value == pytest.approx(expected[metric], rel=1e-5)  # rows keep six digits


def test_contexts_are_scored_by_themselves_and_a_metric_without_a_scale_has_no_score(caplog):
    """In the second context perturbations do nothing: replicates are no better than anything else."""
    real = joined(screen("a", seed=1), screen("b", seed=4, effect=0.0))
    train = joined(screen("a", seed=2), screen("b", seed=5, effect=0.0))
    found = rows_of(real, train, fresh=joined(screen("a", seed=3), screen("b", seed=6, effect=0.0)))
    alone = rows_of(screen("a", seed=1), screen("a", seed=2), fresh=screen("a", seed=3))
    for metric in (*MEMBERS[:1], "score"):
        ours = found["fresh", "context", "a", metric if metric == "score" else f"score_{metric}"]
        assert ours == pytest.approx(
            alone["fresh", "per_condition", None, metric if metric == "score" else f"score_{metric}"]
        )
    assert ("fresh", "context", "b", "score") not in found
    assert "b: no scale of de_wilcoxon_lfc_nmae" in caplog.text


def test_without_control_cells_it_says_why():
    cells = screen("a", seed=1)
    perturbed = cells.take(np.flatnonzero(cells.labels["perturbation"] != "control"))
    with pytest.raises(ValueError, match="protocol vcc2026 compares perturbations with control cells, and no training"):
        rows_of(cells, perturbed, fresh=cells)
