"""Properties of splits: disjoint, whole, repeatable; random ones stratified, no other leaks a held-out condition."""

import json

import numpy as np
import pandas as pd
import pytest

from training.conversion.conditions import ConditionColumns, read_conditions
from training.conversion.splits import Split, SplitOptions, split_cells


def divide(strata: np.ndarray, **options) -> dict[str, np.ndarray]:
    """A random split of cells whose only condition is their stratum."""
    donors = pd.Categorical(strata.astype(str))
    conditions = ConditionColumns({"donor": donors}, {"donor": "donor"}, control=None, separator=None)
    return split_cells(pd.DataFrame(index=range(len(strata))), conditions, SplitOptions(**options)).cells


def test_random_parts_are_disjoint_whole_and_repeatable_and_every_condition_gives_its_share_up_to_one_cell():
    sizes = np.array([3, 10, 11, 57, 400])
    strata = np.random.default_rng(0).permutation(np.repeat(np.arange(5), sizes))
    fractions = {"test_fraction": 0.25, "validation_fraction": 0.1}
    parts, same, other = (divide(strata, **fractions, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(strata)))
    assert all(np.array_equal(parts[name], same[name]) for name in parts)
    assert not np.array_equal(parts["test"], other["test"])
    tested = np.bincount(strata[parts["test"]], minlength=5)
    validated = np.bincount(strata[parts["validation"]], minlength=5)
    assert (np.abs(tested - sizes * 0.25) < 1).all()
    assert (np.abs(validated - (sizes - tested) * 0.1) < 1).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_conditions_keep_a_training_cell_and_the_total_is_right(size):
    strata = np.repeat(np.arange(200), size)
    parts = divide(strata, test_fraction=0.3, validation_fraction=0.3, seed=0)
    assert len(np.unique(strata[parts["train"]])) == 200
    assert len(parts["test"]) == (0 if size == 1 else round(0.3 * size * 200))


def test_cells_of_a_condition_are_equally_likely_to_be_tested():
    strata = np.zeros(10, dtype=int)
    times = np.zeros(10)
    for seed in range(2000):
        times[divide(strata, test_fraction=0.2, validation_fraction=0.0, seed=seed)["test"]] += 1
    assert np.abs(times / 2000 - 0.2).max() < 0.04


LABELS = ["control", "a", "b", "c", "d", "a+b", "a+c", "e+f"]
N = 1600


@pytest.fixture
def obs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"line": rng.choice(["k562", "hepg2"], N), "guide": rng.choice(LABELS, N)})


def hold_out(obs: pd.DataFrame, split: str, cell_type_key="line", perturbation_key="guide", **options) -> Split:
    keys = {"cell_type_key": cell_type_key, "perturbation_key": perturbation_key, "covariate_keys": []}
    conditions = read_conditions(obs, **keys, control=None, separator="+")
    return split_cells(obs, conditions, SplitOptions(split=split, **options))


def labels_of(obs: pd.DataFrame, parts, name: str) -> set[str]:
    return set(obs["guide"].iloc[parts[name]]) - {"control"}


def share_of_controls(obs: pd.DataFrame, cells: np.ndarray) -> float:
    return (obs["guide"].iloc[cells] == "control").sum() / (obs["guide"] == "control").sum()


def test_a_held_out_perturbation_is_in_no_training_cell_nor_in_a_combination(obs):
    split = hold_out(obs, "held-out-perturbations", held_out="a,e")
    assert labels_of(obs, split.cells, "test") == {"a", "a+b", "a+c", "e+f"}
    assert labels_of(obs, split.cells, "train") == labels_of(obs, split.cells, "validation") == {"b", "c", "d"}
    assert split.description == {"held_out": ["a", "e"], "held_out_cell_type": None}


def test_held_out_combinations_have_members_that_were_seen_alone(obs):
    split = hold_out(obs, "held-out-combinations", test_fraction=0.5)
    assert labels_of(obs, split.cells, "test") == set(split.description["held_out"]) < {"a+b", "a+c"}
    assert {"a", "b", "c", "e+f"} < labels_of(obs, split.cells, "train")
    named = hold_out(obs, "held-out-combinations", held_out="c+a")
    assert labels_of(obs, named.cells, "test") == {"a+c"}
    with pytest.raises(ValueError, match=r"'e\+f' cannot be a held-out combination: e, f never stands alone"):
        hold_out(obs, "held-out-combinations", held_out="e+f")


def test_few_shot_tests_on_some_perturbations_of_one_cell_type(obs):
    split = hold_out(obs, "few-shot", held_out_cell_type="hepg2", test_fraction=0.3)
    test = obs.iloc[split.cells["test"]]
    assert set(test["line"]) == {"hepg2"}
    assert len(split.description["held_out"]) == 2
    train = obs.iloc[split.cells["train"]]
    held = split.description["held_out"]
    assert set(train.loc[train["line"] == "k562", "guide"]) == set(LABELS)
    assert set(train.loc[train["line"] == "hepg2", "guide"]) == set(LABELS) - set(held)
    perturbed = obs[(obs["line"] == "hepg2") & (obs["guide"] != "control")]
    controls = obs[(obs["line"] == "hepg2") & (obs["guide"] == "control")]
    assert abs((test["guide"] == "control").sum() / len(controls) - perturbed["guide"].isin(held).mean()) < 1 / len(
        controls
    )


@pytest.mark.parametrize("options", [{}, {"perturbation_key": None}])
def test_zero_shot_tests_on_a_whole_cell_type_with_its_controls_and_needs_no_perturbations(obs, options):
    parts = hold_out(obs, "zero-shot", held_out_cell_type="hepg2", **options).cells
    assert np.array_equal(parts["test"], np.flatnonzero(obs["line"] == "hepg2"))


def test_controls_are_tested_on_in_the_share_of_the_perturbed_cells(obs):
    split = hold_out(obs, "held-out-perturbations", held_out="a")
    share = obs.loc[obs["guide"] != "control", "guide"].str.contains("a").mean()
    assert abs(share_of_controls(obs, split.cells["test"]) - share) < 0.01


@pytest.mark.parametrize(
    ("name", "cell_type"),
    [("held-out-perturbations", None), ("held-out-combinations", None), ("few-shot", "k562"), ("zero-shot", "k562")],
)
def test_every_split_is_disjoint_whole_and_repeatable(obs, name, cell_type):
    one, same, other = (
        hold_out(obs, name, held_out_cell_type=cell_type, test_fraction=0.4, seed=seed).cells for seed in (1, 1, 7)
    )
    assert np.array_equal(np.sort(np.concatenate(list(one.values()))), np.arange(N))
    assert all(np.array_equal(one[part], same[part]) for part in one)
    assert not np.array_equal(one["train"], other["train"])
    rest = len(one["train"]) + len(one["validation"])
    assert abs(len(one["validation"]) - 0.1 * rest) <= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("few-shot", {}, "--split few-shot needs --held-out-cell-type; pass the cell type"),
        ("held-out-perturbations", {"held_out_cell_type": "k562"}, "--held-out-cell-type was given, but --split held-"),
        ("zero-shot", {"held_out_cell_type": "k563"}, "unknown cell type 'k563'; near matches: 'k562'"),
        ("zero-shot", {"held_out_cell_type": "k562", "held_out": "a"}, "--held-out was given, but --split zero-shot"),
        ("held-out-perturbations", {"held_out": "x"}, "unknown perturbation to hold out 'x'; known labels: 'a', 'b'"),
        ("held-out-perturbations", {"held_out": "a,b,c,d,e,f"}, "leaves no training cell; hold out fewer labels"),
        ("held-out-combinations", {"held_out": "a"}, "'a' cannot be a held-out combination: it is no combination"),
        (
            "few-shot",
            {"held_out_cell_type": "k562", "test_fraction": 1.0},
            "test fraction is 1.0; expected at least 0 and",
        ),
        ("random", {"validation_fraction": -0.1}, "validation fraction is -0.1"),
    ],
)
def test_what_cannot_be_held_out_is_refused(obs, name, options, message):
    with pytest.raises(ValueError, match=message):
        hold_out(obs, name, **options)


def test_splits_need_the_conditions_that_they_divide(obs):
    with pytest.raises(ValueError, match="few-shot needs perturbations; pass --perturbation-key"):
        hold_out(obs, "few-shot", perturbation_key=None, held_out_cell_type="k562")
    with pytest.raises(ValueError, match="few-shot needs cell types; pass --cell-type-key"):
        hold_out(obs, "few-shot", cell_type_key=None, held_out_cell_type="k562")
    singles = obs[~obs["guide"].str.contains("[+]")]
    with pytest.raises(ValueError, match="needs at least 2 labels that can be held out; found: none"):
        hold_out(singles, "held-out-combinations")


NAMES = pd.Index([f"cell{i}" for i in range(100)])


def from_file(path=None, column=None) -> dict[str, np.ndarray]:
    obs = pd.DataFrame({"line": [f"line{i % 4}" for i in range(100)]}, index=NAMES)
    if column is not None:
        obs["part"] = column
    key = "part" if column else None
    return hold_out(obs, "from-file", perturbation_key=None, split_file=path, split_key=key).cells


def write_split(path, **lists):
    path.write_text(json.dumps(lists))
    return path


def test_names_in_json_are_the_split(tmp_path):
    rng = np.random.default_rng(0)
    test, validation, train = np.split(rng.permutation(100), [30, 45])
    lists = {
        name: NAMES[part].tolist() for name, part in zip(("test", "validation", "train"), (test, validation, train))
    }
    for content in (lists, {"split": "random", "cells": lists}):
        parts = from_file(write_split(tmp_path / "split.json", **content))
        assert [parts[name].tolist() for name in lists] == [sorted(part.tolist()) for part in (test, validation, train)]


def test_validation_cells_come_out_of_the_training_cells_where_none_are_named(tmp_path):
    path = write_split(tmp_path / "split.json", test=NAMES[:20].tolist(), train=NAMES[20:].tolist())
    parts = from_file(path)
    assert parts["test"].tolist() == list(range(20))
    assert len(parts["validation"]) == 8
    of_column = from_file(column=["test"] * 20 + ["train"] * 80)
    assert all(np.array_equal(of_column[name], parts[name]) for name in parts)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": ["cell0"], "test": ["cell1"]}, "has no split for 98 of 100 cells; name all cells"),
        (
            {"train": ["cell0", "cel1"]},
            r"names 1 train cells that the data lack \(cel1\); cells there are called cell0, ",
        ),
        ({"train": ["cell0"], "test": ["cell0"]}, "names 1 test cells more than once"),
        ({"training": NAMES.tolist()}, "has the split 'training'; expected train, validation, test"),
        ({"test": NAMES.tolist()}, "names no training cell"),
        ({"train": 3}, 'is not {"train": '),
    ],
)
def test_wrong_lists_are_refused(tmp_path, lists, message):
    with pytest.raises(ValueError, match=message):
        from_file(write_split(tmp_path / "split.json", **lists))


def test_a_column_with_other_labels_or_none_is_refused():
    for value, message in (
        ("val", "column 'part' has the split 'val'; expected"),
        (None, "no split for 1 of 100 cells"),
    ):
        with pytest.raises(ValueError, match=message):
            from_file(column=["train"] * 99 + [value])


def test_no_file_and_no_json_are_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.json' \(--split-file\)"):
        from_file(tmp_path / "absent.json")
    (tmp_path / "split.json").write_text("train:")
    with pytest.raises(ValueError, match="is not JSON"):
        from_file(tmp_path / "split.json")
