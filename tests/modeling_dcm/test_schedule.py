"""Properties of reveal schedules: fixed shapes, the optimal one against enumeration, and its predicted cost."""

import itertools

import numpy as np
import pytest

from modeling_dcm import schedule_dcm
from modeling_dcm.schedule_dcm import SCHEDULES, SHAPES, as_curve, entropies, predicted_kl, reveal_schedule


def decaying(num_genes: int, tau: float = 5.0):
    observed = list(range(num_genes))
    return as_curve({"observed": observed, "entropy": [0.3 + 0.5 * np.exp(-j / tau) for j in observed]})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_genes", [1, 2, 7, 40, 101, 17_002])
@pytest.mark.parametrize("steps", [1, 3, 8, 50, 100])
def test_schedule_goes_from_nothing_to_everything_and_every_step_reveals_a_gene(schedule, num_genes, steps):
    flat = as_curve({"observed": [0, num_genes], "entropy": [0.5, 0.5]})  # where every schedule costs nothing
    for curve in (flat, decaying(num_genes, tau=num_genes / 10)):
        revealed = reveal_schedule(num_genes, steps, schedule, curve)
        assert (revealed[0], revealed[-1], len(revealed)) == (0, num_genes, min(steps, num_genes) + 1)
        assert min(np.diff(revealed)) >= 1


@pytest.mark.parametrize("schedule", sorted(SHAPES))
def test_schedule_follows_its_formula_where_steps_are_few(schedule):
    expected = [10_000 * SHAPES[schedule](step / 10) for step in range(11)]
    np.testing.assert_allclose(reveal_schedule(10_000, 10, schedule), expected, atol=1)


@pytest.fixture
def set_early_weight(monkeypatch):
    def set_to(weight: float) -> None:
        monkeypatch.setattr(schedule_dcm, "EARLY_WEIGHT", weight)
        schedule_dcm._optimal.cache_clear()

    yield set_to
    schedule_dcm._optimal.cache_clear()


def weighted_cost(revealed, curve, known, weight) -> float:
    total = known + revealed[-1]
    h = entropies(curve, total)
    cost = 0.0
    for start, end in itertools.pairwise(revealed):
        lost = sum(h[known + start] - h[known + j] for j in range(start, end))
        cost += lost * ((known + start + 1) / total) ** -weight
    return cost


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("tau", [0.7, 5.0, 30.0])
@pytest.mark.parametrize("early_weight", [0.0, 0.5])
def test_optimal_schedule_is_the_best_of_all_schedules(steps, known, tau, early_weight, set_early_weight):
    set_early_weight(early_weight)
    num_genes = 12
    curve = decaying(num_genes + known, tau)
    inner = itertools.combinations(range(1, num_genes), steps - 1)
    costs = [weighted_cost([0, *between, num_genes], curve, known, early_weight) for between in inner]
    optimal = reveal_schedule(num_genes, steps, "optimal", curve, known)
    assert len(optimal) == steps + 1
    assert weighted_cost(optimal, curve, known, early_weight) == pytest.approx(min(costs), abs=1e-12)


def test_a_larger_early_weight_spends_more_steps_on_the_first_genes(set_early_weight):
    first = []
    for weight in (0.0, 0.5, 1.0):
        set_early_weight(weight)
        first.append(reveal_schedule(200, 8, "optimal", decaying(200, tau=40.0))[1])
    assert first[0] > first[1] > first[2]


def test_predicted_kl_is_the_sum_of_the_design():
    curve = decaying(10)
    h = entropies(curve, 10)
    k = [0, 2, 5, 10]
    by_hand = sum(h[k[s]] - h[j] for s in range(3) for j in range(k[s], k[s + 1]))
    assert predicted_kl(k, curve) == pytest.approx(by_hand)
    assert predicted_kl(list(range(11)), curve) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("num_genes", "steps"), [(40, 1), (40, 8), (500, 100), (17_002, 8), (17_002, 100)])
def test_optimal_schedule_loses_less_than_the_shapes(num_genes, steps, set_early_weight):
    set_early_weight(0.0)
    curve = decaying(num_genes, tau=num_genes / 10)
    optimal, *shapes = (
        predicted_kl(reveal_schedule(num_genes, steps, schedule, curve), curve) for schedule in ("optimal", *SHAPES)
    )
    assert optimal <= min(shapes) * 1.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_auto_takes_the_fewest_steps_within_the_tolerance(schedule, monkeypatch):
    monkeypatch.setattr(schedule_dcm, "AUTO_TOLERANCE", 1.2345 / 300)
    curve = decaying(300, tau=20.0)
    revealed = reveal_schedule(300, "auto", schedule, curve)
    steps = len(revealed) - 1
    assert steps > 1
    assert predicted_kl(revealed, curve) <= 1.2345
    assert predicted_kl(reveal_schedule(300, steps - 1, schedule, curve), curve) > 1.2345


def test_without_a_curve_the_way_out_is_named_and_bad_schedules_say_what_was_expected():
    for steps, schedule, asked in [(5, "optimal", "schedule='optimal'"), ("auto", "cubic", "steps='auto'")]:
        with pytest.raises(ValueError, match=f"{asked} needs the model's entropy curve.*dcm-benchmark entropy"):
            reveal_schedule(5, steps, schedule)
    for steps, schedule, message in [
        ("all", "cubic", "steps='all', expected at least 1, or 'auto'"),
        (0, "cubic", "steps=0, expected at least 1"),
        (5, "quadratic", "schedule='quadratic', expected one of cosine, cubic, linear, optimal"),
    ]:
        with pytest.raises(ValueError, match=message):
            reveal_schedule(5, steps, schedule)
