"""Baselines: each predicts what it says, in whole counts, for the conditions asked for and in their order."""

import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from eval.comparison import baselines, scvi
from eval.comparison.baselines import (
    additive,
    controls_scaled,
    independent_marginals,
    knn,
    needs_control,
    perturbation_mean,
    ridge,
)
from eval.comparison.cells import CellCounts


@pytest.fixture
def train() -> CellCounts:
    """Two cell types; genes 0 and 1 are perfectly correlated; type b never expresses gene 2."""
    rng = np.random.default_rng(0)
    level = rng.integers(0, 9, 400)
    labels = pd.DataFrame({"cell_type": np.repeat(["a", "b"], 200), "perturbation": np.tile(["control", "x"], 200)})
    gene_2 = np.where(labels["cell_type"] == "a", rng.integers(1, 4, 400), 0)
    return CellCounts(sparse.csr_matrix(np.stack([level, level, gene_2], axis=1)), labels)


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


def test_an_unseen_condition_backs_off_to_its_cell_type_and_then_to_all_and_says_so_once(train, caplog):
    with caplog.at_level(logging.WARNING):
        sample = independent_marginals(train)
        for perturbation in ("unseen", "unseen", "unheard of"):
            cells = sample(conditions("b", perturbation, 50), np.random.default_rng(0))
        assert cells[:, 2].nnz == 0
        everything = independent_marginals(train)(conditions("c", "x", 500), np.random.default_rng(0))
    assert 0.4 < everything[:, 2].nnz / 500 < 0.6
    unconditional = CellCounts(train.counts, train.labels[[]])
    cells = independent_marginals(unconditional)(pd.DataFrame(index=range(100)), np.random.default_rng(0))
    assert cells.shape == (100, 3)
    of_type, of_all = caplog.messages
    assert "no training cell of b | unseen; drawn from the 200 cells of b, others like it in the same way" in of_type
    assert "no training cell of c | x; drawn from the 400 cells of the whole training file" in of_all


MEANS = {  # of three genes; B undoes A in gene 0, both raise gene 1, gene 2 is never on
    ("a", "control"): [8.0, 3.0, 0.0],
    ("a", "A"): [2.0, 7.0, 0.0],
    ("a", "B"): [26.0, 3.0, 0.0],
    ("b", "control"): [1.0, 1.0, 0.0],
    ("b", "A"): [1.0, 5.0, 0.0],
}


@pytest.fixture
def screen() -> CellCounts:
    """Cells whose counts are those of their condition's mean times 0, 1 or 2: all genes move together."""
    labels = pd.DataFrame([pair for pair in MEANS for _ in range(300)], columns=["cell_type", "perturbation"])
    level = np.repeat(np.array(list(MEANS.values())), 300, axis=0) * np.tile([0, 1, 2], 500)[:, None]
    return CellCounts(sparse.csr_matrix(level.astype(np.int32)), labels, "control")


def mean_of(sampler, cell_type: str, perturbation: str) -> np.ndarray:
    cells = sampler(conditions(cell_type, perturbation), np.random.default_rng(0))
    assert cells.dtype.kind == "i"
    assert cells.min() >= 0
    return np.asarray(cells.mean(axis=0)).ravel()


def test_perturbation_mean_is_one_prediction_for_every_perturbation_and_control_stays_itself(screen):
    sampler = perturbation_mean(screen)
    for perturbation in ("A", "B", "A+B", "never seen"):
        assert mean_of(sampler, "a", perturbation) == pytest.approx([14.0, 5.0, 0.0], abs=0.5)
    assert mean_of(sampler, "b", "A") == pytest.approx([1.0, 5.0, 0.0], abs=0.2)
    assert mean_of(sampler, "a", "control") == pytest.approx([8.0, 3.0, 0.0], abs=0.4)


def test_additive_adds_the_log_fold_changes_of_the_parts(screen):
    sampler = additive(screen)
    for name in ("control", "A", "B"):
        assert mean_of(sampler, "a", name) == pytest.approx(MEANS["a", name], abs=0.7)
    together = [(3 / 9) * (27 / 9) * 9 - 1, (8 / 4) * 1 * 4 - 1, 0.0]
    moved = sampler(conditions("a", "A+B"), np.random.default_rng(0)).toarray()  # with their spread and correlation
    assert np.corrcoef(moved[:, 0], moved[:, 1])[0, 1] > 0.6
    assert (moved.sum(axis=1) == 0).mean() == pytest.approx(1 / 3, abs=0.05)
    for name in ("A+B", "B+A", "A+control+B"):
        assert mean_of(sampler, "a", name) == pytest.approx(together, abs=0.7)


@pytest.mark.parametrize(("separator", "expected"), [("_", 9.0), ("", 3.0), ("+", 3.0)])
def test_additive_splits_combinations_at_the_separator_of_the_files(separator, expected):
    """Two perturbations whose log fold changes add to log(10 / 4): a mean of 3 becomes one of 9."""
    mean = {"control": 3.0, "X": 40**0.5 - 1, "Y": 40**0.5 - 1}
    counts = np.repeat(list(mean.values()), 4000)[:, None]  # (N, 1)
    counts = np.random.default_rng(0).poisson(counts)
    labels = pd.DataFrame({"perturbation": np.repeat(list(mean), 4000)})
    train = CellCounts(sparse.csr_matrix(counts), labels, "control", separator)
    drawn = additive(train)(pd.DataFrame({"perturbation": ["X_Y"] * 4000}), np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(expected, rel=0.05)


def test_scvi_is_given_what_it_decodes_on_the_device_of_its_module(screen, monkeypatch):
    given = {}

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

        def generative(self, **tensors):
            given.update({name: tensor.device.type for name, tensor in tensors.items()})
            return {"px": SimpleNamespace(sample=lambda: torch.ones(len(tensors["z"]), 3))}

    latents, codes = np.ones((len(screen), 4)), torch.zeros(len(screen), 2)
    known = scvi._Trained(SimpleNamespace(module=Module()), codes, latents, latents, torch.zeros(len(screen), 1))
    monkeypatch.setattr(scvi, "_trained", lambda train, max_epochs=None: known)
    scvi.fit(screen, from_prior=False)(conditions("a", "B", 5), np.random.default_rng(0))
    assert given == dict.fromkeys(("z", "library", "batch_index", "cat_covs"), "meta")


def test_additive_takes_a_perturbation_seen_in_other_cell_types_from_there_and_says_what_it_never_saw(screen, caplog):
    sampler = additive(screen)
    assert mean_of(sampler, "b", "B") == pytest.approx([2 * 3 - 1, 1.0, 0.0], abs=0.4)
    with caplog.at_level(logging.WARNING):
        assert mean_of(sampler, "b", "A+C") == pytest.approx(MEANS["b", "A"], abs=0.2)
    assert "additive: no training cell of C by itself; it, and any other such part, is taken to" in caplog.text


@pytest.mark.parametrize("fit", [independent_marginals, perturbation_mean, controls_scaled, additive])
def test_every_baseline_answers_in_the_order_asked_for_and_repeats_itself(screen, fit, monkeypatch):
    monkeypatch.setattr(baselines, "GENES_AT_ONCE", 2)
    wanted = pd.concat([conditions("b", "A", 30), conditions("a", "B", 30), conditions("b", "control", 30)])
    cells, again = (fit(screen)(wanted, np.random.default_rng(5)) for _ in range(2))
    assert (cells != again).nnz == 0
    means = np.asarray(cells[:, 0].todense()).reshape(3, 30).mean(axis=1)
    assert means[1] > 3 * max(means[0], means[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: CellCounts(s.counts, s.labels[["cell_type"]], "control"), r"\(cell_type\) have no 'perturbation'"),
        (lambda s: CellCounts(s.counts, s.labels), "no label of control cells is known .* pass --control LABEL"),
        (lambda s: CellCounts(s.counts, s.labels, "ntc"), r"no training cell is labelled 'ntc' \(control\)"),
    ],
)
def test_without_control_cells_the_mean_baselines_say_why_they_cannot_start(screen, change, message):
    changed = change(screen)
    assert needs_control(screen) is None
    for fit in (perturbation_mean, additive):
        with pytest.raises(ValueError, match=message):
            fit(changed)


@pytest.mark.slow
def test_scvi_knows_the_conditions_from_its_prior_and_from_its_posterior(screen):
    """One model, as both baselines share it: counts in the order asked for, with the conditions' means."""
    pytest.importorskip("scvi", reason="the extra 'baselines' is not installed")
    state = np.random.get_state()[1].copy()
    for fit in (baselines.scvi_prior, baselines.scvi_aggregated_posterior):
        sampler = fit(screen)
        assert mean_of(sampler, "a", "B")[0] > 2 * mean_of(sampler, "b", "A")[0]
        assert mean_of(sampler, "a", "control")[2] < 0.1
        wanted = pd.concat([conditions("b", "A", 30), conditions("a", "B", 30)])
        cells, again = (sampler(wanted, np.random.default_rng(5)) for _ in range(2))
        assert (cells != again).nnz == 0
        assert cells[30:, 0].sum() > 2 * cells[:30, 0].sum()
    assert (np.random.get_state()[1] == state).all()


def test_scvi_moves_control_cells_by_the_difference_of_the_mean_latents_and_adds_those_of_parts(screen, monkeypatch):
    """A stand-in whose latents are the counts, decoded as they are: cells of the perturbation have its mean."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generative(self, *, z, **_):
            return {"px": SimpleNamespace(sample=lambda: z * 100)}

    told = []

    def trained(train: CellCounts) -> scvi._Trained:
        told.append(list(train.labels))
        counts = screen.counts.toarray().astype(float)
        return scvi._Trained(SimpleNamespace(module=Module()), None, counts, counts * 0, torch.zeros(len(screen), 1))

    monkeypatch.setattr(scvi, "_trained", trained)
    sampler = scvi.fit_shift(screen)
    assert told == [["cell_type"]]
    of = {
        name: screen.counts[((screen.labels["cell_type"] == "a") & (screen.labels["perturbation"] == name)).to_numpy()]
        for name in ("A", "B", "control")
    }
    means = {name: np.asarray(counts.mean(axis=0)).ravel() for name, counts in of.items()}
    for name, expected in (
        ("control", means["control"]),
        ("A", means["A"]),
        ("A+B", means["A"] + means["B"] - means["control"]),
        ("new", means["control"]),
    ):
        drawn = np.asarray(sampler(conditions("a", name), np.random.default_rng(0)).mean(axis=0)).ravel() / 100
        np.testing.assert_allclose(drawn, expected, rtol=0.1, atol=0.1)


def test_scaled_controls_have_the_mean_of_the_perturbation_and_the_correlations_of_controls(screen):
    wanted = conditions("a", "A", 20_000)
    cells = controls_scaled(screen)(wanted, np.random.default_rng(0)).toarray()
    perturbed = screen.counts[((screen.labels["cell_type"] == "a") & (screen.labels["perturbation"] == "A")).to_numpy()]
    np.testing.assert_allclose(cells.mean(axis=0), np.asarray(perturbed.mean(axis=0)).ravel(), rtol=0.05)
    controls = controls_scaled(screen)(conditions("a", "control", 10), np.random.default_rng(0)).toarray()
    real = {tuple(cell) for cell in screen.counts.toarray().tolist()}
    assert {tuple(cell) for cell in controls.tolist()} <= real


def test_control_cells_are_drawn_once_before_any_is_drawn_twice(screen):
    is_control = ((screen.labels["cell_type"] == "a") & (screen.labels["perturbation"] == "control")).to_numpy()
    wanted = conditions("a", "control", int(is_control.sum()))
    drawn = controls_scaled(screen)(wanted, np.random.default_rng(0)).toarray()
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, screen.counts[is_control].toarray()))


@pytest.mark.parametrize("fit", [ridge, knn])
def test_vectors_predict_the_response_of_a_perturbation_that_no_training_cell_has(fit):
    rng = np.random.default_rng(0)
    vectors = {f"p{i}": np.array([sign, 0.1 * i]) for i, sign in enumerate([1, 1, 1, -1, -1, -1, 1])}
    names = ["control", *vectors][:-1]  # p6 is never seen; the others raise gene 0, or lower it
    mean = np.array([[10.0, 10.0]] * len(names))
    mean[1:, 0] *= [2 ** vectors[name][0] for name in names[1:]]
    labels = pd.DataFrame({"perturbation": np.repeat(names, 200)})
    train = CellCounts(sparse.csr_matrix(rng.poisson(np.repeat(mean, 200, axis=0))), labels, "control")
    wanted = pd.DataFrame({"perturbation": ["p6"] * 500 + ["p3"] * 500})
    drawn = fit(train, vectors)(wanted, rng).toarray()
    assert drawn[:500].mean(axis=0) == pytest.approx([20, 10], rel=0.1)
    assert drawn[500:].mean(axis=0) == pytest.approx([5, 10], rel=0.1)
    few = {"p0": vectors["p0"]}
    with pytest.raises(ValueError, match="1 training perturbations have a vector; expected three"):
        fit(train, few)
