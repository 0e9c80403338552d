"""Independent marginals: every gene as in training, nothing between genes, nothing invented."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval import baselines
from eval.baselines import independent_marginals
from eval.labelled_counts import LabelledCounts


@pytest.fixture
def train() -> LabelledCounts:
    """Two cell types; genes 0 and 1 are perfectly correlated; type b never expresses gene 2."""
    rng = np.random.default_rng(0)
    level = rng.integers(0, 9, 400)
    labels = pd.DataFrame({"cell_type": np.repeat(["a", "b"], 200), "perturbation": np.tile(["control", "x"], 200)})
    gene_2 = np.where(labels["cell_type"] == "a", rng.integers(1, 4, 400), 0)
    return LabelledCounts(sparse.csr_matrix(np.stack([level, level, gene_2], axis=1)), labels)


def conditions(cell_type: str, perturbation: str, num: int = 3000) -> pd.DataFrame:
    return pd.DataFrame({"cell_type": [cell_type] * num, "perturbation": [perturbation] * num})


def test_marginals_are_those_of_the_condition_and_genes_are_independent(train):
    wanted = conditions("a", "x")
    cells = independent_marginals(train)(wanted, np.random.default_rng(1)).toarray()
    source = train.counts[((train.labels["cell_type"] == "a") & (train.labels["perturbation"] == "x")).to_numpy()]
    source = source.toarray()
    for gene in range(3):
        values = np.arange(source.max() + 1)
        expected = (source[:, gene, None] == values).mean(axis=0)
        assert (cells[:, gene, None] == values).mean(axis=0) == pytest.approx(expected, abs=0.04)
    assert abs(np.corrcoef(cells[:, 0], cells[:, 1])[0, 1]) < 0.06
    assert cells.dtype.kind == "i"


def test_rows_come_in_the_order_asked_for(train):
    wanted = pd.concat([conditions("b", "x", 5), conditions("a", "x", 5), conditions("b", "control", 5)])
    cells = independent_marginals(train)(wanted, np.random.default_rng(0)).toarray()
    assert (cells[:, 2] > 0).tolist() == [False] * 5 + [True] * 5 + [False] * 5


def test_an_unseen_condition_backs_off_to_its_cell_type_and_then_to_all_and_says_so(train, caplog):
    with caplog.at_level(logging.WARNING):
        cells = independent_marginals(train)(conditions("b", "unseen", 50), np.random.default_rng(0))
        assert cells[:, 2].nnz == 0
        everything = independent_marginals(train)(conditions("c", "x", 500), np.random.default_rng(0))
    assert 0.4 < everything[:, 2].nnz / 500 < 0.6
    assert "no training cell of b | unseen; drawn from the 200 cells of b" in caplog.text
    assert "no training cell of c | x; drawn from the 400 cells of the whole training file" in caplog.text


def test_without_conditions_all_training_cells_are_the_source(train):
    unconditional = LabelledCounts(train.counts, train.labels[[]])
    cells = independent_marginals(unconditional)(pd.DataFrame(index=range(100)), np.random.default_rng(0))
    assert cells.shape == (100, 3)


def test_one_generator_state_gives_one_sample_for_any_block_of_genes(train, monkeypatch):
    monkeypatch.setattr(baselines, "GENES_AT_ONCE", 2)
    sample = independent_marginals(train)
    a, b = (sample(conditions("a", "x", 20), np.random.default_rng(3)) for _ in range(2))
    assert (a != b).nnz == 0
    assert a.shape == (20, 3)
