"""Properties of the random split: disjoint, whole, stratified, repeatable, and never without training cells."""

import numpy as np
import pytest

from training.splits import random_split


def test_parts_are_disjoint_and_whole():
    parts = random_split(np.arange(1000) % 7, test_fraction=0.2, validation_fraction=0.1, seed=0)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1000))
    assert {name: len(cells) for name, cells in parts.items()} == {"train": 720, "validation": 80, "test": 200}


def test_every_condition_gives_its_share_up_to_one_cell():
    sizes = np.array([3, 10, 11, 57, 400])
    strata = np.random.default_rng(0).permutation(np.repeat(np.arange(5), sizes))
    parts = random_split(strata, test_fraction=0.25, validation_fraction=0.1, seed=3)
    tested = np.bincount(strata[parts["test"]], minlength=5)
    validated = np.bincount(strata[parts["validation"]], minlength=5)
    assert (np.abs(tested - sizes * 0.25) < 1).all()
    assert (np.abs(validated - (sizes - tested) * 0.1) < 1).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_conditions_keep_a_training_cell_and_the_total_is_right(size):
    strata = np.repeat(np.arange(200), size)
    parts = random_split(strata, test_fraction=0.3, validation_fraction=0.3, seed=0)
    assert len(np.unique(strata[parts["train"]])) == 200
    assert len(parts["test"]) == (0 if size == 1 else round(0.3 * size * 200))


def test_the_seed_decides():
    strata = np.arange(300) % 4
    one, same, other = (
        random_split(strata, test_fraction=0.2, validation_fraction=0.1, seed=seed) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["test"], other["test"])


def test_cells_of_a_condition_are_equally_likely_to_be_tested():
    strata = np.zeros(10, dtype=int)
    times = np.zeros(10)
    for seed in range(2000):
        times[random_split(strata, test_fraction=0.2, validation_fraction=0.0, seed=seed)["test"]] += 1
    assert np.abs(times / 2000 - 0.2).max() < 0.04


@pytest.mark.parametrize(("test", "validation"), [(1.0, 0.1), (-0.1, 0.1), (0.2, 1.5)])
def test_fractions_outside_zero_to_one_are_refused(test, validation):
    with pytest.raises(ValueError, match=r"fraction is .*; expected at least 0 and below 1"):
        random_split(np.zeros(5, dtype=int), test_fraction=test, validation_fraction=validation, seed=0)
