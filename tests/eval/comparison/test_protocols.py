"""Protocols and the floor: what is compared with what, at which size and in which space."""

import anndata
import numpy as np
import ot
import pandas as pd
import pytest
import scanpy
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import rbf_kernel

from eval.comparison.cells import CellCounts, Comparison, _warn_of_gaps
from eval.comparison.floor import floor_draws, without_training_cells
from eval.comparison.protocols import (
    PROTOCOLS,
    Protocol,
    evaluate_pair,
    log_cp10k,
    prepare_reference,
    variable_genes,
)
from eval.metrics import distances, gene_agreement
from eval.metrics.by_name import COPYING

LOG, PAPER = PROTOCOLS["log"], PROTOCOLS["paper"]


def cells(sizes: dict[str, int], *, seed: int, level: float = 2.0, num_genes: int = 8) -> CellCounts:
    """Poisson cells whose genes share a factor; a condition's mean depends on its name."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(list(sizes), list(sizes.values()))
    rate = (
        level * (1 + np.array([ord(label[0]) % 3 for label in labels]))[:, None] * rng.gamma(3, 1 / 3, (labels.size, 1))
    )
    counts = rng.poisson(rate * np.linspace(0.3, 2, num_genes))
    order = rng.permutation(labels.size)
    return CellCounts(sparse.csr_matrix(counts[order]), pd.DataFrame({"cell_type": labels[order]}))


def by_key(scores) -> dict:
    return {(score.grouping, score.condition, score.metric): score for score in scores}


@pytest.fixture
def real() -> CellCounts:
    return cells({"a": 40, "b": 25, "c": 8}, seed=0)


def test_pooled_scores_are_the_metrics_of_the_matrices(real):
    generated = cells({"a": 40, "b": 25, "c": 8}, seed=1)
    scores = by_key(evaluate_pair(generated, prepare_reference(real, LOG)))
    x, y = (np.log1p(side.counts.toarray().astype(float)) for side in (generated, real))
    for name in ("mmd2", "w2", "w2_gaussian", "mean_r2", "variance_r2", "zero_fraction_error"):
        score = scores["pooled", None, name]
        assert score.value == pytest.approx(
            getattr(distances if "2" in name[:4] else gene_agreement, name)(x, y), abs=1e-9
        )
        assert score.n == 73
    pearson, slope = gene_agreement.correlation_agreement(x, y)
    assert scores["pooled", None, "correlation_pearson"].value == pytest.approx(pearson)
    assert scores["pooled", None, "correlation_slope"].value == pytest.approx(slope)
    library = gene_agreement.library_size_cv_ratio(generated.counts, real.counts)  # of the counts in every protocol
    assert scores["pooled", None, "library_size_cv_ratio"].value == pytest.approx(library)


def test_paper_is_in_counts_with_the_three_distances_only(real):
    scores = by_key(evaluate_pair(real, prepare_reference(real, PAPER)))
    assert {metric for grouping, _, metric in scores if grouping == "pooled"} == {"mmd2", "w2", "w2_gaussian"}
    group = prepare_reference(real, PAPER).groups[0]
    assert group.bandwidths == pytest.approx((distances.median_bandwidth(real.counts),), rel=1e-9)


def test_the_bandwidth_comes_from_the_test_cells_alone(real):
    """A generator far away must not widen the kernel and so flatter itself."""
    reference = prepare_reference(real, PAPER)
    far = CellCounts(real.counts * 50, real.labels)
    sigma = distances.median_bandwidth(real.counts)
    expected = distances.mmd2(far.counts, real.counts, bandwidths=[sigma])
    assert by_key(evaluate_pair(far, reference))["pooled", None, "mmd2"].value == pytest.approx(expected)
    for group in reference.groups[1:]:
        chosen = real.counts[real.rows_by_condition[group.condition]]
        assert group.bandwidths == pytest.approx((distances.median_bandwidth(chosen),))


def test_each_condition_has_as_many_cells_on_both_sides_and_what_is_missing_is_said(real, caplog):
    generated = cells({"a": 100, "b": 10, "d": 30}, seed=1)  # too many, too few, no c, and one that is not asked for
    scores = by_key(evaluate_pair(generated, prepare_reference(real, PAPER)))
    assert scores["pooled", None, "w2"].n == 50
    assert [scores["condition", name, "w2"].n for name in "abc"] == [40, 10, 0]
    assert np.isnan(scores["condition", "c", "w2"].value)
    assert ("condition", "d", "w2") not in scores
    _warn_of_gaps(Comparison(real, real, {"mine": [generated]}, [], None))
    assert "mine, file 1: 23 of 73 test cells have no generated partner, in 2 conditions (b, ...)" in caplog.text
    assert "mine, file 1: 1 conditions are not among the test cells and are left out (d, ...)" in caplog.text


def test_per_condition_is_the_mean_over_conditions_with_twenty_test_cells(real):
    scores = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=1), prepare_reference(real, LOG)))
    mean = np.mean([scores["condition", name, "w2"].value for name in "ab"])
    assert scores["per_condition", None, "w2"].value == pytest.approx(mean)
    assert scores["per_condition", None, "w2"].n == 32
    assert scores["condition", "c", "w2"].n == 8


def test_without_condition_columns_all_is_pooled(real):
    unconditional = CellCounts(real.counts, real.labels[[]])
    groupings = {score.grouping for score in evaluate_pair(unconditional, prepare_reference(unconditional, LOG))}
    assert groupings == {"pooled"}


def test_a_condition_of_one_cell_and_one_of_identical_cells_are_survived():
    counts = sparse.csr_matrix(np.array([[1, 2], [3, 1], [3, 1], [3, 1], [2, 2]]))
    real = CellCounts(counts, pd.DataFrame({"cell_type": ["one", "same", "same", "same", "two"]}))
    scores = by_key(evaluate_pair(real, prepare_reference(real, PAPER)))
    assert np.isnan(scores["condition", "one", "mmd2"].value)
    assert scores["condition", "same", "mmd2"].value == 0
    assert scores["condition", "same", "w2"].value == 0


def test_a_large_test_set_is_thinned_to_the_same_cells_for_every_model(real):
    small = Protocol("small", "for this test", PAPER.transform, ("w2",), (), max_cells=30)
    first, second = (prepare_reference(real, small, seed=5) for _ in range(2))
    assert first.groups[0].n == 30
    assert all(np.array_equal(first.groups[0].rows[name], second.groups[0].rows[name]) for name in "abc")
    generated = cells({"a": 90, "b": 60, "c": 20}, seed=1)
    once, again = (evaluate_pair(generated, reference, seed=2) for reference in (first, second))
    assert once == again
    assert once[0].n == 30


def perturbed(sizes: dict[tuple[str, str], int], *, seed: int, num_genes: int = 60) -> CellCounts:
    """Cells of (cell type, perturbation); a perturbation moves two genes, a cell type all of them."""
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame([pair for pair, size in sizes.items() for _ in range(size)])
    labels.columns = ["cell_type", "perturbation"]
    base = np.random.default_rng(0).lognormal(0.5, 1.0, num_genes)
    level = np.stack([np.roll(base, ord(cell_type)) for cell_type in labels["cell_type"]])
    for column, name in enumerate(("control", "x", "y")):
        level[:, column] *= np.where(labels["perturbation"] == name, 4.0, 1.0)
    counts = rng.poisson(level * rng.gamma(4, 1 / 4, (len(labels), 1)))
    return CellCounts(sparse.csr_matrix(counts), labels, "control")


SIZES = {("a", "control"): 40, ("a", "x"): 30, ("b", "control"): 25, ("b", "x"): 6}


def scanpy_log_cp10k(counts: sparse.csr_matrix) -> anndata.AnnData:
    adata = anndata.AnnData(counts.astype(np.float64))
    adata.layers["counts"] = adata.X.copy()
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    return adata


def summed_kernels(x: np.ndarray, y: np.ndarray, sigmas: list[float]) -> float:
    """Biased MMD^2 as the mean of scikit-learn's kernel matrices."""
    return sum(
        rbf_kernel(x, x, gamma=1 / (2 * s**2)).mean()
        + rbf_kernel(y, y, gamma=1 / (2 * s**2)).mean()
        - 2 * rbf_kernel(x, y, gamma=1 / (2 * s**2)).mean()
        for s in sigmas
    )


def exact_transport(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(ot.emd2([], [], ot.dist(x, y), numItermax=10**7)))


def test_scldm_equals_scanpy_scikit_learn_and_pot():
    """log1p(CP10k), 30 components of the real cells, five summed kernels biased, exact transport; one pooled group."""
    real, generated = perturbed(SIZES, seed=1), perturbed(SIZES, seed=2)
    scores = by_key(evaluate_pair(generated, prepare_reference(real, PROTOCOLS["scldm"])))
    assert {(grouping, metric) for grouping, _, metric in scores} == {("pooled", "mmd2"), ("pooled", "w2")}
    log_real, log_generated = (scanpy_log_cp10k(cells.counts).X.toarray() for cells in (real, generated))
    components = PCA(30, svd_solver="full").fit(log_real)
    x, y = components.transform(log_generated), components.transform(log_real)
    assert scores["pooled", None, "mmd2"].value == pytest.approx(summed_kernels(x, y, [1, 2, 4, 8, 16]), abs=1e-9)
    assert scores["pooled", None, "w2"].value == pytest.approx(exact_transport(x, y), rel=1e-9)
    assert scores["pooled", None, "w2"].n == 101


def test_scldm_takes_at_most_a_thousand_cells_of_a_perturbation_and_five_thousand_in_all():
    names = [f"p{i}" for i in range(7)]
    real = CellCounts(
        sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (7100, 3))),
        pd.DataFrame({"perturbation": np.repeat(names, [1100] + [1000] * 6)}),
    )
    rows = prepare_reference(real, PROTOCOLS["scldm"]).groups[0].rows
    assert sum(found.size for found in rows.values()) == 5000
    few = real.take(np.flatnonzero(real.labels["perturbation"].isin(["p0", "p1"])))
    assert prepare_reference(few, PROTOCOLS["scldm"]).groups[0].n == 2000


def test_cfgen_equals_scanpy_scikit_learn_and_pot():
    """2,000 seurat_v3 genes and 30 centred components of the real cells, each cell type by itself, the plain mean."""
    sizes = {("a", "control"): 60, ("a", "x"): 20, ("b", "control"): 45, ("c", "y"): 9}
    real, generated = (perturbed(sizes, seed=seed, num_genes=2300) for seed in (1, 2))
    scores = by_key(evaluate_pair(generated, prepare_reference(real, PROTOCOLS["cfgen"])))
    adata = scanpy_log_cp10k(real.counts)
    scanpy.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=2000, layer="counts")
    scanpy.pp.pca(adata, n_comps=30, svd_solver="arpack", mask_var="highly_variable")
    genes = adata.var["highly_variable"].to_numpy()
    mean = adata.X[:, genes].toarray().mean(axis=0)
    loadings = adata.varm["PCs"][genes]
    theirs = (adata.X[:, genes].toarray() - mean) @ loadings
    ours = (scanpy_log_cp10k(generated.counts).X[:, genes].toarray() - mean) @ loadings
    expected = {}
    for name in "abc":
        x = ours[(generated.labels["cell_type"] == name).to_numpy()]
        y = theirs[(real.labels["cell_type"] == name).to_numpy()]
        expected[name] = (summed_kernels(x, y, [0.01, 0.1, 1, 10, 100]), exact_transport(x, y))
        assert scores["condition", name, "mmd2"].value == pytest.approx(expected[name][0], abs=1e-6)
        assert scores["condition", name, "w2"].value == pytest.approx(expected[name][1], rel=1e-6)
    assert [scores["condition", name, "w2"].n for name in "abc"] == [80, 45, 9]
    assert scores["per_condition", None, "mmd2"].value == pytest.approx(np.mean([e[0] for e in expected.values()]))
    assert scores["per_condition", None, "w2"].value == pytest.approx(np.mean([e[1] for e in expected.values()]))
    assert not any(grouping == "pooled" for grouping, _, _ in scores)


def test_all_genes_are_variable_where_there_are_no_more():
    counts = perturbed(SIZES, seed=1, num_genes=40).counts
    assert variable_genes(counts, 40).tolist() == list(range(40))


def test_a_cell_without_counts_stays_at_zero():
    values = log_cp10k(sparse.csr_matrix(np.array([[0, 0], [1, 3]])))
    np.testing.assert_allclose(values.toarray(), [[0, 0], [np.log1p(2500), np.log1p(7500)]])


def test_pearson_delta_is_taken_against_real_control_cells_of_the_cell_type():
    real, generated = perturbed(SIZES, seed=1), perturbed(SIZES, seed=2)
    scores = by_key(evaluate_pair(generated, prepare_reference(real, LOG)))
    means = {
        (side, pair): np.log1p(cells.counts[cells.rows_by_condition[" | ".join(pair)]].toarray().astype(float)).mean(0)
        for side, cells in (("real", real), ("generated", generated))
        for pair in SIZES
    }
    for name in "ab":
        control = means["real", (name, "control")]
        shifts = [means[side, (name, "x")] - control for side in ("generated", "real")]
        found = scores["condition", f"{name} | x", "pearson_delta"].value
        assert found == pytest.approx(np.corrcoef(*shifts)[0, 1], abs=1e-9)
        rows = real.rows_by_condition[f"{name} | control"]
        halves = [np.log1p(real.counts[half].toarray().astype(float)).mean(0) for half in (rows[::2], rows[1::2])]
        expected = []
        for of_sides in (halves, halves[::-1]):
            shifts = [means[s, (name, "x")] - half for s, half in zip(("generated", "real"), of_sides)]
            expected.append(np.corrcoef(*shifts)[0, 1])
        found = scores["condition", f"{name} | x", "pearson_delta_halves"].value
        assert found == pytest.approx(np.mean(expected), abs=1e-9)
        assert ("condition", f"{name} | control", "pearson_delta") not in scores
    averaged = scores["per_condition", None, "pearson_delta"]  # b | x has six cells only
    assert averaged.value == scores["condition", "a | x", "pearson_delta"].value
    without = CellCounts(real.counts, real.labels)
    assert not any(
        score.metric == "pearson_delta" for score in evaluate_pair(generated, prepare_reference(without, LOG))
    )


def test_component_variance_and_copying_need_training_cells():
    real, train = cells({"a": 40, "b": 30}, seed=0), cells({"a": 60, "b": 50}, seed=1)
    without = by_key(evaluate_pair(real, prepare_reference(real, LOG)))
    beside = by_key(evaluate_pair(real, prepare_reference(real, LOG, train=train)))
    added = {metric for _, _, metric in beside.keys() - without.keys()}
    assert added == {*(f"component_variance_{b}" for b in ("1", "2_5", "6_10", "11_20", "21_40")), COPYING}
    assert all(
        beside["pooled", None, metric].value == pytest.approx(1) or np.isnan(beside["pooled", None, metric].value)
        for metric in added
    )


def test_floor_has_the_conditions_of_the_test_cells_and_no_training_cell_twice(real):
    train = cells({"a": 120, "b": 70, "c": 30, "d": 50}, seed=2)
    train = CellCounts(train.counts + sparse.csr_matrix(np.eye(270, 8, k=-262) * 1000), train.labels)
    draws = list(floor_draws(train, real, draws=4, seed=0))
    assert len(draws) == 4
    for draw in draws:
        assert {name: rows.size for name, rows in draw.rows_by_condition.items()} == {"a": 40, "b": 25, "c": 8}
        assert (draw.counts.toarray() >= 1000).sum(axis=0).max() <= 1
    assert (draws[0].counts != draws[1].counts).nnz > 0


def test_floor_is_the_level_of_a_perfect_generator(real):
    """Fresh cells of the same distribution score as the floor does, independent ones do not."""
    reference = prepare_reference(real, LOG)
    train = cells({"a": 400, "b": 250, "c": 80}, seed=2)
    floor = [by_key(evaluate_pair(draw, reference))["pooled", None, "w2"].value for draw in floor_draws(train, real)]
    perfect = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=3), reference))["pooled", None, "w2"].value
    assert abs(perfect - np.mean(floor)) < 4 * np.std(floor, ddof=1)
    worse = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=3, level=5), reference))
    assert worse["pooled", None, "w2"].value > np.mean(floor) + 4 * np.std(floor, ddof=1)


def test_floor_says_where_it_repeats_cells_or_has_none(real, caplog):
    train = cells({"a": 100, "b": 10}, seed=2)
    (draw,) = floor_draws(train, real, draws=1)
    assert {name: rows.size for name, rows in draw.rows_by_condition.items()} == {"a": 40, "b": 25}
    assert "1 conditions have fewer training than test cells: drawn with replacement (b, ...)" in caplog.text
    assert "1 conditions have no training cells (c, ...)" in caplog.text
    assert without_training_cells(train, real) == ["c"]
    assert not len(next(floor_draws(cells({"z": 5}, seed=0), real)))
