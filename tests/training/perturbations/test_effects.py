"""Effects of perturbations: found where they are, shrunk where little is known, summed, predicted, never one's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_dcm import DCMConfig, DCMForDenoising
from modeling_dcm.state_dcm import ANY, ridge_weights
from tests.tiny_training import tiny_training
from training.data.loader import Cells
from training.loop.start import build_model, build_tokenizer, open_cells
from training.loop.told_effects import take_rows, training_effects
from training.perturbations.effects import PENALTIES, LabelledCells, choose_penalty, estimate_effects

G = 40
MEAN = np.linspace(1, 6, G)


def labelled(groups, rng, *, state=None, targets=None) -> LabelledCells:
    """Cells of ``groups`` (cell type, perturbations, number of cells, log fold changes (G,)), Poisson counts."""
    types, ids, blocks = [], [], []
    for type_, members, number, effect in groups:
        types += [type_] * number
        ids += [[*sorted(members, reverse=True), -1, -1][:2]] * number
        blocks.append(rng.poisson(MEAN * np.exp(effect), (number, G)))
    x, types, ids = np.concatenate(blocks), np.array(types), np.array(ids)
    return LabelledCells(
        counts=lambda rows: x[rows].astype(np.float32),
        expected=lambda rows: np.broadcast_to(MEAN, (1, len(rows), G)).astype(np.float32),
        size=np.full((1, G), 1e3),
        state=None if state is None else state(types, ids),
        types=types,
        context=types,
        ids=ids,
        is_control=(ids < 0).all(axis=1),
        fold=np.arange(len(x)) % 2,
        num_types=2,
        targets=np.full(30, -1) if targets is None else targets,
    )


def row_of(found, *key) -> int:
    return found.keys.tolist().index([*key, *[-1] * (found.keys.shape[1] - len(key))])


def test_effects_are_found_and_those_of_fewer_cells_are_shrunk_more():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.5, G)
    found = estimate_effects(labelled([(0, [], 400, 0), (0, [1], 400, effect), (0, [2], 4, effect)], rng))
    many, few = found.genes[0, row_of(found, ANY, 1)], found.genes[0, row_of(found, ANY, 2)]
    assert np.corrcoef(many, effect)[0, 1] > 0.97
    assert np.abs(many - effect).mean() < 0.1
    raw = np.abs(few).mean()
    assert 0 < raw < np.abs(many).mean()


def test_a_cell_type_deviates_from_the_pooled_effect_as_far_as_its_cells_say():
    rng = np.random.default_rng(1)
    effect, other = rng.normal(0, 0.5, (2, G))
    groups = [(0, [], 300, 0), (1, [], 300, 0), (0, [1], 300, effect), (1, [1], 300, other), (1, [2], 5, effect)]
    found = estimate_effects(labelled([*groups, (0, [2], 300, effect)], rng))
    assert np.corrcoef(found.genes[0, row_of(found, 0, 1)], effect)[0, 1] > 0.95
    assert np.corrcoef(found.genes[0, row_of(found, 1, 1)], other)[0, 1] > 0.95
    of_few = found.genes[0, row_of(found, 1, 2)]  # five cells: what the other type says
    assert np.abs(of_few - effect).mean() < 0.2


@pytest.mark.parametrize("agrees", [True, False])
def test_in_a_cell_type_without_cells_of_it_a_perturbation_does_what_others_do_there_and_differs_as_elsewhere(agrees):
    rng = np.random.default_rng(7)
    common, effects, others = rng.normal(0, 0.5, G), *rng.normal(0, 0.5, (2, 6, G))
    there = common + (effects if agrees else others)
    groups = [(t, [], 400, 0) for t in (0, 1)]
    groups += [(0, [1 + i], 150, effects[i]) for i in range(6)] + [(1, [1 + i], 150, there[i]) for i in range(5)]
    found = estimate_effects(labelled(groups, rng))
    predicted = found.genes[0, row_of(found, 1, 6)]
    assert np.abs(predicted - (there[5] if agrees else common)).mean() < 0.3
    assert (found.keys[:, 0] == 0).sum() == 5  # nothing is predicted where there are cells
    told = found.predicted[0, 0, row_of(found, 1, 1)]  # as if it had no cells, too
    assert np.abs(told - (there[0] if agrees else common)).mean() < 0.3


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_pairs_that_were_seen_teach_how_far_sums_hold(factor):
    rng = np.random.default_rng(2)
    a, b, c = rng.normal(0, 0.5, (3, G))
    singles = [(0, [], 500, 0), (0, [1], 500, a), (0, [2], 500, b), (0, [3], 500, c)]
    found = estimate_effects(labelled([*singles, (0, [1, 2], 500, factor * (a + b))], rng))
    assert found.damping[0] == pytest.approx(factor, abs=0.1)


def test_vectors_that_tell_effects_predict_new_ones_and_others_predict_the_mean():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(24, 4))
    effects = vectors @ rng.normal(0, 0.3, (4, G))
    groups = [(0, [], 400, 0), *((0, [1 + i], 100, effects[i]) for i in range(20))]
    table = {1 + i: torch.from_numpy(vectors[i]) for i in range(24)}
    found = estimate_effects(labelled(groups, rng), table)
    for i in range(20, 24):
        predicted = found.genes[0, row_of(found, ANY, 1 + i)]
        assert np.corrcoef(predicted, effects[i])[0, 1] > 0.9
    noise = torch.from_numpy(rng.normal(size=(20, 8)))
    assert choose_penalty(noise, rng.normal(size=(20, 200)))[0] >= PENALTIES[-2]


def test_what_perturbations_do_to_their_own_gene_is_told_of_a_new_one_and_does_not_pass_for_what_others_do():
    rng = np.random.default_rng(6)
    vectors, loadings = rng.normal(size=(24, 4)), rng.normal(0, 0.3, (4, G))
    targets = np.array([-1, *rng.permutation(G)[:24], *[-1] * 5])
    effects = vectors @ loadings
    effects[np.arange(24), targets[1:25]] -= 2
    groups = [(0, [], 400, 0), *((0, [1 + i], 60, effects[i]) for i in range(20))]
    table = {1 + i: torch.from_numpy(vectors[i]) for i in range(22)}  # the last two have none: the mean effect
    found = estimate_effects(labelled(groups, rng, targets=targets), table)
    predicted = np.stack([found.genes[0, row_of(found, ANY, 1 + i)] for i in range(24)])
    own = np.arange(24), targets[1:25]
    assert np.abs(predicted[own] - effects[own])[:20].mean() < 0.2  # seen: around what others do to theirs
    assert np.abs(predicted[own] - effects[own])[20:].mean() < 0.7
    assert predicted[own][20:].max() < -1
    off = np.where(np.arange(G) == targets[1:25, None], 0, predicted - effects)
    assert np.abs(off[20:22]).mean() < 0.12
    assert np.abs(predicted[:, targets[21:25]][:20] - effects[:20][:, targets[21:25]]).mean() < 0.2
    told = found.predicted[0, 0, [row_of(found, ANY, 1 + i) for i in range(20)]]  # as if it had no cells
    assert np.abs(told[own[0][:20], own[1][:20]] - effects[own][:20]).mean() < 0.7


def test_ridge_weights_are_those_of_ridge_regression_with_an_intercept():
    rng = np.random.default_rng(4)
    known, new, y = rng.normal(size=(9, 5)), rng.normal(size=(3, 5)), rng.normal(size=9)
    centred = known - known.mean(axis=0)
    scale = np.square(centred).sum(axis=1).mean()
    slope = np.linalg.solve(centred.T @ centred + 0.3 * scale * np.eye(5), centred.T @ (y - y.mean()))
    expected = y.mean() + (new - known.mean(axis=0)) @ slope
    weights = ridge_weights(torch.from_numpy(new), torch.from_numpy(known), 0.3)
    np.testing.assert_allclose(weights.numpy() @ y, expected)


def test_shifts_of_the_state_are_against_controls_of_the_same_cell_type():
    rng = np.random.default_rng(5)

    def state(types, ids):
        return rng.normal(0, 0.1, (len(types), 3)) + types[:, None] * 5 + (ids[:, :1] == 1) * np.array([1, -2, 0])

    groups = [(t, ids, 100, 0) for t in (0, 1) for ids in ([], [1], [2])]
    found = estimate_effects(labelled(groups, rng, state=state))
    np.testing.assert_allclose(found.state[row_of(found, ANY, 1)], [1, -2, 0], atol=0.05)
    np.testing.assert_allclose(found.state[row_of(found, ANY, 2)], 0, atol=0.05)


@pytest.fixture(scope="module")
def started(shards, tmp_path_factory):
    config = tiny_training(shards, tmp_path_factory.mktemp("effects"), state_dim=4)
    tokenizer = build_tokenizer(config)
    cells = open_cells(config, "train", tokenizer)
    model = build_model(config, tokenizer, cells)
    return model, cells, training_effects(model, cells)


def test_what_a_cell_is_told_does_not_depend_on_its_own_counts(started, monkeypatch):
    model, cells, effects = started
    ids = cells.conditions["perturbation_ids"]
    row = int((ids[:, 0] != model.effects.control_id).nonzero()[0])
    inputs = {"perturbation_ids": ids[[row]], "cell_type_ids": cells.conditions["cell_type_ids"][[row]]}
    told = {
        draw: effects.shown(inputs, cells.library_size[[row]], torch.tensor([True]), torch.tensor([draw]))["effect"]
        for draw in (0.9, 0.0)
    }
    real = Cells.csr

    def changed(self, rows=None):
        counts = real(self, rows).tolil()
        for place in np.flatnonzero(np.asarray(rows) == row):
            counts[place] = 50
        return counts.tocsr()

    monkeypatch.setattr(Cells, "csr", changed)
    model.config.effect_groups, model.effects.keys = 0, model.effects.keys[:0]
    model.effects.state, model.effects.genes = model.effects.state[:0], model.effects.genes[:, :0]
    before = model.effects.base.clone()
    again = training_effects(model, cells)
    assert torch.equal(before, model.effects.base)
    for draw, effect in told.items():
        after = again.shown(inputs, cells.library_size[[row]], torch.tensor([True]), torch.tensor([draw]))["effect"]
        torch.testing.assert_close(after, effect)
    whole = model.partial_cells(torch.zeros(1, 15, dtype=torch.long), **inputs).effect
    assert float(whole.mean()) > float(told[0.9].mean())  # generation is told of all cells


def test_a_dropped_label_has_no_effect_and_the_control_has_that_of_controls(started):
    model, *_ = started
    x = torch.zeros(2, 15, dtype=torch.long)
    control = int(model.effects.control_id)
    given = {"cell_type_ids": torch.tensor([0, 0]), "perturbation_ids": torch.tensor([[-1], [control]])}
    effect = model.partial_cells(x, **given).effect
    assert torch.equal(effect[0], torch.zeros(15))
    torch.testing.assert_close(effect[1], model.effects.base[0, 0])


def test_a_combination_without_cells_is_the_sum_of_its_members_around_control_cells():
    config = DCMConfig(num_genes=3, num_perturbations=4, num_cell_types=1, state_dim=2, count_distribution="nb")
    config.effect_groups, config.state_groups, config.state_bank = 4, 3, 2
    model = DCMForDenoising(config)
    effects = model.effects
    effects.control_id.fill_(0)
    effects.keys.copy_(torch.tensor([[ANY, 2, 1], [ANY, 1, -1], [ANY, 2, -1], [ANY, ANY, ANY]]))
    effects.state.copy_(torch.tensor([[9.0, 9, 9], [1, 2, 3], [10, 20, 30], [100, 100, 100]]))
    effects.damping[-1] = 0.5
    source = model.state_source
    source.keys.copy_(torch.tensor([[0, 0, -1], [0, ANY, ANY], [ANY, ANY, ANY]]))
    source.span.copy_(torch.tensor([[0, 1], [0, 2], [0, 2]]))
    source.bank.copy_(torch.tensor([[5.0, 5, 5], [7, 7, 7]]))
    ids = torch.tensor(
        [[1, 2], [2, 0], [3, 1], [0, -1]]
    )  # a seen pair, a single beside the control, a new pair, control
    given = {"cell_type_ids": torch.zeros(4, dtype=torch.long), "perturbation_ids": ids}
    keys, shift = model._origins(4, given)
    assert keys[:, 1:].tolist() == [[0, -1]] * 4
    assert shift.tolist() == [[9, 9, 9], [10, 20, 30], [50.5, 51, 51.5], [0, 0, 0]]
    assert model._origin_of_states(None, 4, given, 0, False)[1].tolist() == [0, 0, 0, 0]
    source.keys[1, 1] = 1  # the group of a member alone: its cells are nearer than the control's
    keys, shift = model._origins(4, given)
    assert keys[:, 1:].tolist() == [[1, -1], [0, -1], [1, -1], [0, -1]]
    assert shift[2].tolist() == [50.5 - 1, 51 - 2, 51.5 - 3]


def with_vectors_and_effects(num_genes: int) -> DCMForDenoising:
    """A model that knows the control and four perturbations with vectors, two of which target a gene."""
    config = DCMConfig(num_genes=num_genes, num_perturbations=5, perturbation_dim=2, state_dim=2)
    config.max_perturbations_per_cell, config.effect_groups, config.state_groups = 1, 5, 2
    model = DCMForDenoising(config).eval()
    rng, effects, encoder = torch.Generator().manual_seed(0), model.effects, model.conditions.perturbation
    effects.control_id.fill_(0)
    effects.keys.copy_(torch.tensor([[ANY, 1], [ANY, 2], [ANY, 3], [ANY, 4], [ANY, ANY]]))
    for values in (effects.genes, effects.state, encoder.table):
        values.copy_(torch.randn(values.shape, generator=rng))
    encoder.has_vector[1:] = True
    model.target_gene_ids.copy_(torch.tensor([-1, 4, 3, -1, -1]))
    model.state_source.keys.copy_(torch.tensor([[-1, 0], [ANY, ANY]]))
    return model


@torch.no_grad()
def test_a_vector_of_16_bits_or_beside_a_label_has_its_own_target_gene_or_none():
    model, vector = with_vectors_and_effects(300), torch.tensor([[[0.5, -1.0]]])
    nothing, x = torch.full((1, 1), -1), torch.full((1, 300), model.config.mask_token_id)
    known, last = (model.conditions.perturbation, model.target_gene_ids), torch.tensor([[299]])
    exact, narrow = (model.effects.with_vectors(nothing, v, last, *known)[0].genes for v in (vector, vector.bfloat16()))
    torch.testing.assert_close(narrow, exact)
    mean = model.partial_cells(x, perturbation_ids=torch.tensor([[1]]), perturbation_embeds=vector).effect[0]
    effects, ids = model.effects.with_vectors(torch.tensor([[1]]), vector, None, *known)
    kind = effects.kind(torch.full((1, 2), torch.nan))
    torch.testing.assert_close(mean, effects.of_genes(torch.tensor([-1]), ids, torch.arange(300)[None], kind)[0])


@torch.no_grad()
def test_a_vector_given_by_hand_has_the_effect_of_a_label_with_that_vector():
    model = with_vectors_and_effects(5)
    config, effects = model.config, model.effects
    new, x = {"a": torch.tensor([0.3, -1.0]), "b": torch.tensor([1.0, 0.5])}, torch.full((2, 5), config.mask_token_id)
    targets = torch.tensor([[1], [-1]])
    by_hand = {"perturbation_embeds": torch.stack(list(new.values()))[:, None], "target_gene_ids": targets}
    told, origins = model(x, **by_hand).logits, model._origins(2, by_hand)
    assert len(effects.keys) == 5  # the model itself has learned nothing
    ids = model.add_perturbations(new, targets[:, 0])[:, None]
    torch.testing.assert_close(model(x, perturbation_ids=ids).logits, told)
    for label, vector in zip(model._origins(2, {"perturbation_ids": ids}), origins):
        torch.testing.assert_close(label, vector)
    assert origins[1].abs().min() > 0


def test_without_control_cells_to_start_from_nothing_is_shifted_and_labels_that_are_drawn_are_those_of_controls():
    config = DCMConfig(num_genes=3, num_perturbations=2, covariates={"batch": 2}, state_dim=2, count_distribution="nb")
    config.max_perturbations_per_cell, config.label_groups = 1, 2
    config.effect_groups, config.state_groups = 2, 2
    model = DCMForDenoising(config)
    model.effects.control_id.fill_(0)
    model.effects.keys.copy_(torch.tensor([[ANY, 1], [ANY, ANY]]))
    model.effects.state.fill_(5.0)
    model.state_source.keys.copy_(torch.tensor([[-1, 0, 0], [ANY, ANY, ANY]]))  # controls of the first batch
    model.label_counts.keys, model.label_counts.number = torch.tensor([[-1, 0, 0]]), torch.tensor([7])
    ids = torch.tensor([[1], [1]])
    known = {"perturbation_ids": ids, "covariate_ids": torch.tensor([[0], [1]])}
    keys, shift = model._origins(2, known)
    assert shift[:, 0].tolist() == [5, 0]
    assert keys.tolist() == [[-1, 0, 0], [-1, 1, 1]]
    drawn = model.draw_labels(2, perturbation_ids=ids)
    assert drawn["covariate_ids"].tolist() == [[0], [0]]
    assert drawn["perturbation_ids"].tolist() == [[1], [1]]


def test_what_new_cells_tell_takes_the_place_of_what_was_known_of_them():
    config = DCMConfig(num_genes=3, num_perturbations=3, num_cell_types=2, count_distribution="nb")
    config.max_perturbations_per_cell, config.effect_groups = 1, 3
    effects = DCMForDenoising(config).effects
    effects.keys.copy_(torch.tensor([[ANY, 1], [ANY, 2], [ANY, ANY]]))
    effects.genes.fill_(0.8)
    keys = np.array([[0, 1], [ANY, 1], [ANY, ANY]])
    told = SimpleNamespace(keys=keys, state=np.zeros((3, 1)), genes=np.full((1, 3, 3), -0.8))
    take_rows(effects, told)
    assert effects.keys.tolist() == [[0, 1], [ANY, 2], [ANY, 1], [ANY, ANY]]
    types, ids = torch.tensor([0, 1, 1]), torch.tensor([[1], [1], [2]])
    found = effects.of_genes(types, ids, torch.arange(3).expand(3, -1), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found[:, 0], torch.tensor([-0.8, -0.8, 0.8]))
