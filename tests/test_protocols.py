"""Protocols: what is compared with what, at which size, and what the floor is."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval import metrics
from eval.labelled_counts import LabelledCounts
from eval.protocols import (
    PROTOCOLS,
    Protocol,
    evaluate_pair,
    floor_draws,
    missing_cells,
    prepare_reference,
)

LOG, PAPER = PROTOCOLS["log"], PROTOCOLS["paper"]


def cells(sizes: dict[str, int], *, seed: int, level: float = 2.0, num_genes: int = 8) -> LabelledCounts:
    """Poisson cells whose genes share a factor; a condition's mean depends on its name."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(list(sizes), list(sizes.values()))
    rate = (
        level * (1 + np.array([ord(label[0]) % 3 for label in labels]))[:, None] * rng.gamma(3, 1 / 3, (labels.size, 1))
    )
    counts = rng.poisson(rate * np.linspace(0.3, 2, num_genes))
    order = rng.permutation(labels.size)
    return LabelledCounts(sparse.csr_matrix(counts[order]), pd.DataFrame({"cell_type": labels[order]}))


def by_key(scores) -> dict:
    return {(score.grouping, score.condition, score.metric): score for score in scores}


@pytest.fixture
def real() -> LabelledCounts:
    return cells({"a": 40, "b": 25, "c": 8}, seed=0)


def test_pooled_scores_are_the_metrics_of_the_matrices(real):
    generated = cells({"a": 40, "b": 25, "c": 8}, seed=1)
    scores = by_key(evaluate_pair(generated, prepare_reference(real, LOG)))
    x, y = (np.log1p(side.counts.toarray().astype(float)) for side in (generated, real))
    for name in ("mmd2", "w2", "w2_gaussian", "mean_r2", "variance_r2", "zero_fraction_error"):
        score = scores["pooled", None, name]
        assert score.value == pytest.approx(getattr(metrics, name)(x, y), abs=1e-9)
        assert score.n == 73
    pearson, slope = metrics.correlation_agreement(x, y)
    assert scores["pooled", None, "correlation_pearson"].value == pytest.approx(pearson)
    assert scores["pooled", None, "correlation_slope"].value == pytest.approx(slope)


def test_the_library_size_is_that_of_the_counts_in_every_protocol(real):
    generated = cells({"a": 40, "b": 25, "c": 8}, seed=1)
    scores = by_key(evaluate_pair(generated, prepare_reference(real, LOG)))
    expected = metrics.library_size_cv_ratio(generated.counts, real.counts)
    assert scores["pooled", None, "library_size_cv_ratio"].value == pytest.approx(expected)


def test_paper_is_in_counts_with_the_three_distances_only(real):
    scores = by_key(evaluate_pair(real, prepare_reference(real, PAPER)))
    assert {metric for grouping, _, metric in scores if grouping == "pooled"} == {"mmd2", "w2", "w2_gaussian"}
    group = prepare_reference(real, PAPER).groups[0]
    assert group.bandwidth == pytest.approx(metrics.median_bandwidth(real.counts), rel=1e-9)


def test_the_bandwidth_comes_from_the_test_cells_alone(real):
    """A generator far away must not widen the kernel and so flatter itself."""
    reference = prepare_reference(real, PAPER)
    far = LabelledCounts(real.counts * 50, real.labels)
    sigma = metrics.median_bandwidth(real.counts)
    expected = metrics.mmd2(far.counts, real.counts, bandwidths=[sigma])
    assert by_key(evaluate_pair(far, reference))["pooled", None, "mmd2"].value == pytest.approx(expected)
    for group in reference.groups[1:]:
        chosen = real.counts[real.rows_by_condition[group.condition]]
        assert group.bandwidth == pytest.approx(metrics.median_bandwidth(chosen))


def test_each_condition_has_as_many_cells_on_both_sides(real):
    generated = cells(
        {"a": 100, "b": 10, "d": 30}, seed=1
    )  # too many, too few, none of c, and one that is not asked for
    scores = by_key(evaluate_pair(generated, prepare_reference(real, PAPER)))
    assert scores["pooled", None, "w2"].n == 50
    assert [scores["condition", name, "w2"].n for name in "abc"] == [40, 10, 0]
    assert np.isnan(scores["condition", "c", "w2"].value)
    assert ("condition", "d", "w2") not in scores
    assert missing_cells(generated, real) == (15 + 8, ["b", "c"], ["d"])


def test_per_condition_is_the_mean_over_conditions_with_twenty_test_cells(real):
    scores = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=1), prepare_reference(real, LOG)))
    mean = np.mean([scores["condition", name, "w2"].value for name in "ab"])
    assert scores["per_condition", None, "w2"].value == pytest.approx(mean)
    assert scores["per_condition", None, "w2"].n == 32
    assert scores["condition", "c", "w2"].n == 8


def test_without_condition_columns_all_is_pooled(real):
    unconditional = LabelledCounts(real.counts, real.labels[[]])
    groupings = {score.grouping for score in evaluate_pair(unconditional, prepare_reference(unconditional, LOG))}
    assert groupings == {"pooled"}


def test_a_condition_of_one_cell_and_one_of_identical_cells_are_survived():
    counts = sparse.csr_matrix(np.array([[1, 2], [3, 1], [3, 1], [3, 1], [2, 2]]))
    real = LabelledCounts(counts, pd.DataFrame({"cell_type": ["one", "same", "same", "same", "two"]}))
    scores = by_key(evaluate_pair(real, prepare_reference(real, PAPER)))
    assert np.isnan(scores["condition", "one", "mmd2"].value)
    assert scores["condition", "same", "mmd2"].value == 0
    assert scores["condition", "same", "w2"].value == 0


def test_a_large_test_set_is_thinned_to_the_same_cells_for_every_model(real):
    small = Protocol("small", "for this test", PAPER.transform, ("w2",), (), max_cells=30)
    first, second = (prepare_reference(real, small, seed=5) for _ in range(2))
    assert first.groups[0].n == 30
    assert all(np.array_equal(first.groups[0].rows[name], second.groups[0].rows[name]) for name in "abc")
    assert evaluate_pair(real, first)[0].n == 30


def test_the_same_seed_gives_the_same_scores(real):
    generated = cells({"a": 90, "b": 60, "c": 20}, seed=1)
    a, b = (evaluate_pair(generated, prepare_reference(real, LOG, seed=2), seed=2) for _ in range(2))
    assert a == b


def test_floor_has_the_conditions_of_the_test_cells_and_no_training_cell_twice(real):
    train = cells({"a": 120, "b": 70, "c": 30, "d": 50}, seed=2)
    train = LabelledCounts(train.counts + sparse.csr_matrix(np.eye(270, 8, k=-262) * 1000), train.labels)
    draws = list(floor_draws(train, real, draws=4, seed=0))
    assert len(draws) == 4
    for draw in draws:
        assert {name: rows.size for name, rows in draw.rows_by_condition.items()} == {"a": 40, "b": 25, "c": 8}
        assert (draw.counts.toarray() >= 1000).sum(axis=0).max() <= 1
    assert (draws[0].counts != draws[1].counts).nnz > 0


def test_floor_is_the_level_of_a_perfect_generator(real):
    """Fresh cells of the law itself score as the floor does, independent ones do not."""
    reference = prepare_reference(real, LOG)
    train = cells({"a": 400, "b": 250, "c": 80}, seed=2)
    floor = [by_key(evaluate_pair(draw, reference))["pooled", None, "w2"].value for draw in floor_draws(train, real)]
    perfect = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=3), reference))["pooled", None, "w2"].value
    assert abs(perfect - np.mean(floor)) < 4 * np.std(floor, ddof=1)
    worse = by_key(evaluate_pair(cells({"a": 40, "b": 25, "c": 8}, seed=3, level=5), reference))
    assert worse["pooled", None, "w2"].value > np.mean(floor) + 4 * np.std(floor, ddof=1)


def test_floor_says_where_it_repeats_cells_or_has_none(real, caplog):
    train = cells({"a": 100, "b": 10}, seed=2)
    with caplog.at_level(logging.WARNING):
        (draw,) = floor_draws(train, real, draws=1)
    assert {name: rows.size for name, rows in draw.rows_by_condition.items()} == {"a": 40, "b": 25}
    assert "1 conditions have fewer training than test cells: drawn with replacement (b, ...)" in caplog.text
    assert "1 conditions have no training cells and stay out (c, ...)" in caplog.text
    with pytest.raises(ValueError, match="no training cell has a condition of the test cells"):
        next(floor_draws(cells({"z": 5}, seed=0), real))
