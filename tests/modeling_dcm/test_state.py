"""Properties of the cell state: what it is computed from, what not giving it means, and where it is drawn from."""

import numpy as np
import pytest
import torch

OPTIONS = {"count_distribution": "nb", "state_dim": 2, "max_count": 20}


@pytest.fixture
def model(make_model, backbone):
    """A model with a state whose map, prior and bank say something."""
    model = make_model(backbone, conditioned=True, **OPTIONS, state_mixture=2, state_groups=2, state_bank=6)
    state, source = model.cell_state, model.state_source
    state.components.copy_(torch.randn(2, 7, generator=torch.Generator().manual_seed(0)))
    state.median_total.fill_(30.0)
    source.keys[0] = torch.tensor([1, -1, -1, -1, -1])  # cell type 1, then everything
    source.mean.copy_(torch.tensor([[5.0, 5.0, 4.0], [-5.0, -5.0, 3.0]]))
    source.log_weight.fill_(np.log(0.5))
    source.scale.copy_(0.1 * torch.eye(3))
    source.span.copy_(torch.tensor([[0, 2], [2, 6]]))
    source.bank.copy_(torch.arange(18.0).view(6, 3) / 10)
    return model


def test_states_are_components_of_log_normalised_counts(model):
    counts = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(1))
    logs = np.log1p(counts.numpy() / counts.sum(1, keepdim=True).numpy() * 30)
    expected = logs @ model.cell_state.components.numpy().T
    np.testing.assert_allclose(model.state(counts).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_cell_without_counts_or_with_a_gene_not_measured_has_no_state(model):
    ids = torch.ones(3, 7, dtype=torch.long)
    ids[0] = 0
    ids[1, 2] = model.config.pad_token_id
    assert model.state(ids).isnan().all(dim=1).tolist() == [True, True, False]


def test_a_state_that_is_not_given_is_the_same_as_none_and_another_input_than_any_state(model):
    x = torch.full((2, 7), model.config.mask_token_id)
    given = {"library_size": torch.tensor([9.0, 9.0])}
    none = model(x, **given).logits
    torch.testing.assert_close(model(x, **given, state=torch.full((2, 2), torch.nan)).logits, none)
    assert (model(x, **given, state=torch.zeros(2, 2)).logits - none).abs().max() > 1e-3


def test_only_the_loadings_tell_a_state_of_a_negative_binomial(make_model):
    options = {"state_dim": 2, "library_size_conditioning": True}
    states = torch.tensor([[0.0, 0.0], [1.0, -1.0], [torch.nan, torch.nan]])
    heard = make_model("latent", count_distribution="nb", **options).conditions.state(states)
    assert torch.equal(heard[0], heard[1])
    assert not torch.equal(heard[0], heard[2])
    told = make_model("latent", count_distribution="categorical", **options).conditions.state(states)
    assert not torch.equal(told[0], told[1])


def test_states_are_drawn_from_the_most_specific_group_that_matches(model):
    source = model.state_source
    keys = model.library_sizes.group_keys(4, torch.tensor([1, 0, 1, -1]), None, None)
    drawn = source.draw(keys, torch.tensor([1, 0, 1, -1]), torch.Generator().manual_seed(0))
    assert ((drawn[:, 0] > 0) == torch.tensor([True, False, True, False])).all()


def test_the_bank_is_drawn_without_replacement_as_far_as_it_goes(model):
    keys = model.library_sizes.group_keys(5, torch.tensor([1, 1, 1, 0, 0]), None, None)
    rows = model.state_source.rows_of_bank(keys, seed=3)
    first, other = rows[:3].tolist(), rows[3:].tolist()
    assert set(first[:2]) == set(first) == {0, 1}
    assert len(set(other)) == 2
    assert torch.equal(rows, model.state_source.rows_of_bank(keys, seed=3))


@pytest.mark.parametrize("source", ["prior", "bank", None])
def test_generated_cells_do_not_depend_on_how_the_run_is_cut(model, source):
    types = torch.arange(8) % 3
    whole = model.generate(cell_type_ids=types, state=source, batch_size=3, seed=1)
    parts = [model.generate(cell_type_ids=types, state=source, batch_size=3, seed=1, chunks=[i]) for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, model.generate(cell_type_ids=types, state=source, batch_size=3, seed=2))


def test_where_the_library_size_is_given_states_of_such_cells_are_drawn(model):
    source, keys = model.state_source, model.library_sizes.group_keys(200, None, None, None)
    source.scale.copy_(torch.eye(3))
    source.scale[..., 0, 2], source.scale[..., 2, 2] = 0.0, 1.0
    wanted = torch.full((200,), 4.5)
    generator = torch.Generator().manual_seed(0)
    near = (source.draw(keys, None, generator, wanted)[:, 2] - wanted).abs().mean()
    assert near < 0.5 * (source.draw(keys, None, generator)[:, 2] - wanted).abs().mean()


def test_completing_cells_is_told_no_state_unless_one_is_given(model):
    observed = torch.full((50, 7), -1)
    observed[:, :3] = 1
    state = torch.zeros(50, 2)
    assert torch.equal(model.generate(observed=observed), model.generate(observed=observed, state="null"))
    assert not torch.equal(model.generate(observed=observed, state=state), model.generate(observed=observed))


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        (OPTIONS, "shop", r"state='shop', expected states, None \(drawn\), 'prior', 'bank' or 'null'"),
        (OPTIONS, torch.zeros(2, 5), r"state has shape \(2, 5\), expected \(2, 3\)"),
        (OPTIONS, "bank", "keeps no states of training cells: take 'prior'"),
        ({}, "prior", "has no cell state"),
    ],
)
def test_states_that_do_not_fit_or_that_the_model_lacks_are_refused(make_model, options, state, message):
    model = make_model("latent", **options)
    with pytest.raises(ValueError, match=message):
        model.generate(2, state=state)
    with pytest.raises(ValueError, match="no cell state" if not options else "input_ids has 6 genes, the model 7"):
        model.state(torch.ones(1, 6, dtype=torch.long))


def test_without_library_size_conditioning_the_state_tells_the_depth(make_model, backbone):
    model = make_model(backbone, **OPTIONS, fresh=True)
    model.cell_state.log_total.copy_(torch.tensor([3.0, 0.5]))
    model.totals.gene_mean.fill_(2.0)
    model.head.set_estimates(torch.full((7,), 9.0), torch.full((7,), 0.1), torch.zeros(7, 4), torch.full((7,), 0.1))
    x = torch.full((2, 7), model.config.mask_token_id)
    state = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    counts = torch.arange(21.0)
    means = (model(x, state=state).logits.softmax(dim=-1) @ counts).mean(dim=1)
    assert means[1] > 1.5 * means[0]


@pytest.mark.parametrize("conditioned", [False, True])
def test_states_are_drawn_freely_where_no_library_size_is_told(make_model, conditioned):
    model = make_model("latent", **OPTIONS, state_groups=1, library_size_conditioning=conditioned)
    source = model.state_source
    source.mean.copy_(torch.tensor([[0.0, 0.0, 6.0]]))
    source.scale.copy_(torch.eye(3))
    joint = model._prior_draw(slice(0, 400), {}, torch.full((400,), -1.0), torch.Generator().manual_seed(0))
    states = model._told_state(joint)
    assert abs(states[:, 0].mean()) < 0.2
    if not conditioned:  # the last column tells the depth
        assert states[:, 2].mean() == pytest.approx(6.0, abs=0.3)


def test_some_genes_of_a_panel_get_their_share_of_the_library_size_that_is_drawn_with_a_state(make_model):
    model = make_model("latent", **OPTIONS, state_groups=1, library_size_conditioning=True)
    model.state_source.mean.copy_(torch.tensor([[0.0, 0.0, 6.0]]))
    model.totals.gene_mean[:] = torch.arange(1.0, 8.0)
    joint = torch.tensor([[0.0, 0.0, 280.0]]).log1p().expand(4, -1)  # z and log1p(total)
    sizes = model._library_size(None, joint, slice(0, 4), {}, torch.tensor([0, 5]), torch.Generator())
    assert sizes.tolist() == [70.0] * 4


def test_cells_are_drawn_in_one_call_where_each_has_a_state_and_in_twenty_where_one_has_none(model):
    given = {"cell_type_ids": torch.zeros(3, dtype=torch.long), "library_size": torch.full((3,), 30.0), "seed": 0}
    told = torch.zeros(3, model.config.state_width)
    not_told = told.clone()
    not_told[1] = torch.nan
    for state, steps in ((None, 1), ("prior", 1), (told, 1), (not_told, 20), ("null", 20)):
        default, asked, other = (model.generate(state=state, steps=n, **given) for n in (None, steps, 21 - steps))
        assert torch.equal(default, asked)
        assert not torch.equal(default, other)
