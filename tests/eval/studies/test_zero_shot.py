"""Properties of the zero-shot study: what is compared with what, what a table of vectors says, and that it goes on."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy import sparse

from eval.comparison.cells import CellCounts, Comparison
from eval.simulate import main as simulate
from eval.studies.tables import (
    BASELINES,
    MARKS,
    control_cells,
    expectations,
    marginals_of_all,
    score_held_out,
    study_markdown,
    study_tables,
)
from eval.studies.zero_shot import main as zero_shot
from eval.studies.zero_shot import shuffled

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "eval" / "results" / "zero_shot"
IN_README = ("norman_mcfaline", "norman_few_shot", "simulated", "papalexi_eccite")
GENES, CELLS = 12, 160
LEVEL = {"control": 2.0, "a": 2.0, "b": 6.0, "unseen": 6.0}  # of the first six genes; the others have 2
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_latents": 8, "mlp_ratio": 2.0}
TINY |= {"query_genes": 32, "warmup_steps": 30, "learning_rate": 4e-3, "ema_decay": 0.99, "validation_cells": 64}


def cells_of(perturbations: list[str], *, seed: int, num: int = CELLS) -> CellCounts:
    """Poisson cells of two batches; batch "2" is twice as deep."""
    rng = np.random.default_rng(seed)
    labels = pd.DataFrame([(p, b) for p in perturbations for b in ("1", "2")] * num, columns=["perturbation", "batch"])
    rate = np.full((len(labels), GENES), 2.0)
    rate[:, : GENES // 2] = labels["perturbation"].map(LEVEL).to_numpy()[:, None]
    rate *= labels["batch"].astype(int).to_numpy()[:, None]
    return CellCounts(sparse.csr_matrix(rng.poisson(rate)), labels, "control")


def comparison(train: CellCounts, test: CellCounts, generated: dict[str, list[CellCounts]]) -> Comparison:
    return Comparison(test, train, generated, [f"gene{number}" for number in range(GENES)], None)


@pytest.fixture(scope="module")
def scored() -> dict[tuple[str, str, str | None], dict]:
    """Rows by model, metric and condition; "truth" is drawn from the law of the held-out cells."""
    train, test = cells_of(["control", "a", "b"], seed=0), cells_of(["control", "a", "unseen"], seed=1)
    generated = {"truth": [cells_of(["unseen"], seed=seed) for seed in (2, 3)]}
    rows = score_held_out(comparison(train, test, generated))
    return {(row["model"], row["metric"], row["condition"]): row for row in rows}


def test_unseen_perturbations_are_scored_on_half_of_their_cells_true_ones_at_the_floor_and_baselines_not(scored):
    assert {condition for _, _, condition in scored} == {"unseen", None}
    assert {row["n"] for row in scored.values()} == {CELLS // 2}
    seeds = {model: row["seeds"] for (model, _, _), row in scored.items()}
    assert seeds == {"floor": 10, "truth": 2} | dict.fromkeys((fit.__name__ for fit in BASELINES), 3)
    additive, control = (scored[model, "mmd2", "unseen"]["mean"] for model in ("additive", "control_cells"))
    assert additive == pytest.approx(control, rel=0.1)  # never seen, it has no shift
    for metric, scale in (("mmd2", 1), ("w2", 1), ("pearson_delta", -1)):
        floor, truth = (scored[model, metric, "unseen"]["mean"] for model in ("floor", "truth"))
        control = scored["control_cells", metric, "unseen"]["mean"]
        assert abs(truth - floor) < 0.1 * abs(control - floor)
        assert scale * control > scale * floor


def test_the_marginals_are_those_of_the_batch_whatever_the_perturbation():
    train = cells_of(["control", "b"], seed=0)
    wanted = pd.DataFrame({"perturbation": ["unseen"] * 2000, "batch": ["2"] * 2000})
    drawn = marginals_of_all(train)(wanted, np.random.default_rng(0))
    source = train.counts[(train.labels["batch"] == "2").to_numpy()]
    assert drawn.mean(axis=0) == pytest.approx(source.mean(axis=0), rel=0.05)


def test_the_control_baseline_draws_real_control_cells_of_the_same_batch_in_the_order_asked_for():
    train = cells_of(["control", "b"], seed=0)
    wanted = pd.DataFrame({"perturbation": ["unseen"] * 6, "batch": ["2", "1", "1", "2", "2", "1"]})
    drawn = control_cells(train)(wanted, np.random.default_rng(0)).toarray()
    for row, batch in zip(drawn, wanted["batch"]):
        source = train.counts[
            ((train.labels["batch"] == batch) & (train.labels["perturbation"] == "control")).to_numpy()
        ].toarray()
        assert (source == row).all(axis=1).any()


def test_nothing_held_out_and_too_few_cells_are_errors():
    train = cells_of(["control", "a"], seed=0)
    with pytest.raises(ValueError, match="every perturbation of the test cells has training cells"):
        score_held_out(comparison(train, cells_of(["control", "a"], seed=1), {}))
    with pytest.raises(ValueError, match="has 40 test cells or more"):
        score_held_out(comparison(train, cells_of(["control", "unseen"], seed=1, num=39), {}))


def test_shuffled_vectors_are_the_same_and_none_stays_with_its_name():
    vectors = {name: torch.full((2,), float(index)) for index, name in enumerate("abcdef")}
    other = shuffled(vectors, seed=0)
    assert sorted(v[0].item() for v in other.values()) == sorted(v[0].item() for v in vectors.values())
    assert all(not torch.equal(other[name], vectors[name]) for name in vectors)
    with pytest.raises(ValueError, match="1 vector cannot be given to another name"):
        shuffled({"a": torch.ones(2)}, seed=0)


@pytest.fixture
def study() -> dict:
    held_out = {"dataset": "cells", "kind": "held-out-perturbations", "held_out": [["a", "b"], ["c"]]}
    drawn = {"vectors": "coexpression", "models": ["vectors", "shuffled"], "trainings": 3}
    return held_out | drawn | {"versions": {}, "command": "python -m eval.studies.zero_shot cells.h5ad"}


@pytest.fixture
def rows() -> list[dict]:
    """Three held-out perturbations in two splits; vectors beat shuffled by 1, 2 and 3 in W2, by nothing in MMD^2."""
    rows = []
    for index, (split, label) in enumerate([(0, "a"), (0, "b"), (1, "c")]):
        for model, w2 in (("floor", 1.0), ("vectors", 2.0 + index), ("shuffled", 3.0 + 2 * index)):
            for metric, value in (("w2", w2), ("mmd2", 0.001), ("pearson_delta", 0.5)):
                row = {"split": split, "model": model, "protocol": "log", "grouping": "condition", "condition": label}
                rows.append(row | {"metric": metric, "mean": value, "std": 0.1, "n": 50, "seeds": 10})
    return rows


def test_differences_are_paired_by_perturbation(study, rows):
    text = study_tables(study, rows)
    assert "| floor    | 1.000 | 1.00" in text
    assert "| vectors  | 3.000 | 1.00" in text
    assert "**-2.000 ± 0.577**; 3 of 3" in text  # of 1, 2, 3: sd 1, standard error 1 / sqrt(3)
    assert "+0.00 ± 0.00; 0 of 3" in text
    assert "the 3 held-out labels:" in text
    again = [row | {"condition": "a"} if row["condition"] == "c" else row for row in rows]
    assert "the 3 held-out labels (2 different ones, some in several splits)" in study_tables(study, again)
    page = study_markdown(study, rows)
    for words in ("split 0: a, b; split 1: c", study["command"], "| 1     | c        | 1.000 | 4.000   | 7.000    |"):
        assert words in page


def test_expectations_show_the_floor_the_model_with_its_deviation_and_baselines(study, rows):
    more = [row | {"model": "knn"} for row in rows if row["model"] == "floor"]
    of_splits = [row | {"grouping": "per_condition", "condition": None} for row in rows if row["condition"] != "b"]
    lines = expectations([study | {"rows": rows + more + of_splits}]).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["floor", "dcm", "knn"]
    assert "cells, held-out-perturbations: 3 labels, 3 trainings" in lines[2]
    assert "3.000 ± 0.100" in lines[3]


def test_the_readmes_table_is_that_of_the_committed_studies():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    studies = [json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8")) for name in IN_README]
    assert page.split(MARKS[0])[1].split(MARKS[1])[0].strip() == expectations(studies).strip()


def simulated(folder: Path, **sizes: int) -> dict:
    """Cells whose vectors determine the effects, and the options of a study of them."""
    simulate(folder / "cells.h5ad", num_genes=30, num_cell_types=1, num_pairs=0, **sizes)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    options = {"out": folder / "study", "perturbation_key": "perturbation", "config": folder / "tiny.yaml"}
    options |= {"vectors": str(folder / "cells.perturbations.safetensors"), "num_splits": 1, "trainings": 1}
    return {"source": folder / "cells.h5ad", **options}


def means_of(study: Path) -> dict[tuple[str, str], float]:
    rows = json.loads(study.read_text())["rows"]
    return {(row["model"], row["metric"]): row["mean"] for row in rows if row["condition"] is None}


@pytest.mark.slow
def test_a_study_writes_its_files_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    options = simulated(tmp_path, num_cells=600, num_perturbations=5)
    options |= {"held_out": (sorted(load_file(options["vectors"]))[0],), "max_steps": 2}
    written = zero_shot(**options)
    assert {row["model"] for row in json.loads(written.read_text())["rows"]} >= {"floor", "vectors", "learned"}
    held = options["held_out"][0]
    assert held in written.with_suffix(".md").read_text()
    printed = capsys.readouterr().out
    before = written.read_bytes()

    def refuse(*_, **__):
        raise AssertionError("done again")

    for stage in ("convert", "train", "sample", "embed"):
        monkeypatch.setattr(f"eval.studies.zero_shot.{stage}", refuse)
    for stage in ("eval.studies.tables.score_held_out", "training.perturbations.vectors.write_table"):
        monkeypatch.setattr(stage, refuse)
    zero_shot(**options)
    assert written.read_bytes() == before
    assert capsys.readouterr().out == printed
    with pytest.raises(ValueError, match="holds a study that differs in trainings"):
        zero_shot(**{**options, "trainings": 3})
    with pytest.raises(ValueError, match="holds a study that differs in models"):
        zero_shot(**{**options, "models": ("vectors",)})


@pytest.mark.slow
def test_vectors_that_determine_the_effect_beat_shuffled_ones(tmp_path):
    options = simulated(tmp_path, num_cells=1500, num_perturbations=14)
    means = means_of(zero_shot(**options, models=("vectors", "shuffled"), test_fraction=0.3, max_steps=150))
    assert means["vectors", "pearson_delta"] > means["shuffled", "pearson_delta"] + 0.1
    assert means["vectors", "mmd2"] < means["shuffled", "mmd2"]


def test_contradicting_options_are_refused(tmp_path):
    options = simulated(tmp_path, num_cells=60, num_perturbations=2)
    for wrong, message in (
        ({"vectors": None, "models": ("vectors",)}, "--models vectors without --vectors"),
        ({"num_splits": 0}, "--num-splits 0: expected at least 1"),
        ({"trainings": 0}, "--trainings 0: expected at least 1"),
        ({"out": tmp_path}, "exists and holds no study"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(**{**options, **wrong})
    assert not (tmp_path / "study").exists()
