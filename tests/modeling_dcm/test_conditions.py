"""Properties of the conditions: control, not given and padding differ, nulls are alone, library sizes follow the cells.

Letters: B cells, P perturbations of a combination, L genes.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from modeling_dcm import DCMForDenoising
from modeling_dcm.conditioning_dcm import (
    LIBRARY_QUANTILES,
    SMOOTH_FEATURES,
    CellTotals,
    LibrarySizeEncoder,
    LibrarySizes,
    count_values,
    log_ratio,
    progress_of,
)
from modeling_dcm.configuration_dcm import DCMConfig
from tokenization import DCMTokenizer
from training.data.statistics import library_size_quantiles

CONTROL = 0  # an ordinary label
DIFFERENT = 1e-5  # of logits of order 1; what has no influence changes nothing, or nothing but rounding (1e-7)
GIVEN = {
    "cell_type_ids": torch.tensor([0, 2]),
    "perturbation_ids": torch.tensor([[1, 2], [3, -1]]),
    "covariate_ids": torch.tensor([[0, 2], [1, 0]]),
    "library_size": torch.tensor([0.0, 40.0]),
}
NULLS = {name: torch.full_like(value, -1) for name, value in GIVEN.items()}


@pytest.fixture
def logits(make_model, backbone):
    """Logits (2, 7, 5) of a network with every condition, for two cells with some genes observed."""
    model = make_model(backbone, conditioned=True)
    x_t = torch.tensor([[0, 1, 5, 5, 2, 5, 5], [5, 5, 3, 5, 5, 4, 5]])

    @torch.no_grad()
    def run(**conditions) -> torch.Tensor:
        return model(x_t, **conditions).logits

    run.model = model
    return run


def perturbed(*ids: int) -> torch.Tensor:
    return torch.tensor([ids, ids])


def test_every_condition_changes_the_output_on_its_own(logits):
    for name, value in GIVEN.items():
        assert (logits(**{name: value}) - logits()).abs().amax(dim=(1, 2)).min() > DIFFERENT, name
    small, large = (logits(library_size=torch.full((2,), size)) for size in (1e5, 2e5))  # unclipped
    assert (small - large).abs().max() > DIFFERENT


def test_control_not_given_and_padding_are_three_different_inputs(logits):
    def of(*ids: int) -> torch.Tensor:
        return logits(perturbation_ids=perturbed(*ids))

    assert (of(CONTROL) - of(-1)).abs().max() > DIFFERENT  # a cell of the control is not an unlabelled cell
    assert torch.equal(of(2, -1), of(2))  # padding beside a perturbation adds nothing
    assert (of(2, CONTROL) - of(2, -1)).abs().max() > DIFFERENT  # nor is padding the control
    torch.testing.assert_close(of(1, 3, -1), of(-1, 3, 1), atol=1e-6, rtol=0)  # order does not matter


def test_not_given_is_the_same_however_it_is_said(logits):
    omitted = logits()
    assert torch.equal(logits(**NULLS), omitted)
    assert torch.equal(logits(perturbation_ids=perturbed(-1, -1, -1)), omitted)
    assert torch.equal(logits(library_size=torch.full((2,), -5.0)), omitted)


@torch.no_grad()
def test_given_conditions_and_nulls_do_not_touch_each_other_and_every_null_is_its_own(logits):
    nothing, given = logits(), logits(**GIVEN)
    conditions = logits.model.conditions
    encoders = [conditions.cell_type, conditions.perturbation.learned, *conditions.covariates.values()]
    for encoder in encoders:
        encoder.weight[:-1] += 10
    for parameter in conditions.library_size.up.parameters():
        parameter += 10
    logits.model.target_gene_ids.copy_(torch.arange(4))
    assert torch.equal(logits(), nothing)
    assert torch.equal(logits(**NULLS), nothing)
    assert not torch.equal(logits(**GIVEN), given)
    given = logits(**GIVEN)
    for encoder in (*encoders, conditions.library_size.null):
        before = logits()
        encoder.weight[-1] += 1
        assert (logits() - before).abs().max() > DIFFERENT
        assert torch.equal(logits(**GIVEN), given)


def test_cells_of_a_batch_do_not_see_each_others_conditions(logits):
    changed = {name: torch.stack([value[0], NULLS[name][1]]) for name, value in GIVEN.items()}
    torch.testing.assert_close(logits(**changed)[0], logits(**GIVEN)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"cell_type_ids": torch.tensor([0, 3])}, r"cell_type_ids holds 3, expected labels 0..2"),
        ({"cell_type_ids": torch.tensor([[0, 1]])}, r"cell_type_ids has shape \(1, 2\), expected \(B,\)"),
        ({"perturbation_ids": torch.tensor([[0], [4]])}, r"perturbation_ids holds 4, expected labels 0..3"),
        ({"perturbation_ids": torch.tensor([0, 1])}, r"perturbation_ids has shape \(2,\), expected \(B, P\)"),
        ({"covariate_ids": torch.tensor([[2, 2], [0, 0]])}, r"covariate_ids holds 2, expected labels 0..1"),
        ({"covariate_ids": torch.tensor([[1], [0]])}, r"covariate_ids has shape \(2, 1\), expected \(B, 2\)"),
        ({"perturbation_embeds": torch.zeros(2, 1, 4)}, "this model learned its perturbations as labels"),
    ],
)
def test_ids_that_are_no_labels_are_refused(make_model, conditions, message):
    with pytest.raises(ValueError, match=message):
        make_model(conditioned=True)(torch.zeros(2, 7, dtype=torch.long), **conditions)


@pytest.mark.parametrize(
    "name", ["cell_type_ids", "perturbation_ids", "covariate_ids", "perturbation_embeds", "target_gene_ids"]
)
def test_a_condition_that_the_model_does_not_have_is_refused(make_model, name):
    with pytest.raises(ValueError, match=f"{name} were given, but this model knows: library_size"):
        make_model(library_size_conditioning=True)(torch.zeros(2, 7, dtype=torch.long), **{name: torch.zeros(2)})


@pytest.fixture
def with_table(make_model, backbone):
    """A model with frozen vectors of length 6 for labels 1 to 3; the control has none."""
    model = make_model(backbone, conditioned=True, perturbation_dim=6)
    encoder = model.conditions.perturbation
    encoder.table[1:] = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    encoder.has_vector[1:] = True
    return model


@torch.no_grad()
def test_a_vector_given_by_hand_is_the_label_with_that_vector_and_nan_rows_are_padding(with_table):
    x_t = torch.full((2, 7), 5)
    vectors = torch.full((2, 2, 6), math.nan)
    vectors[:, 0] = with_table.conditions.perturbation.table[2]
    by_hand = with_table(x_t, perturbation_embeds=vectors).logits
    torch.testing.assert_close(by_hand, with_table(x_t, perturbation_ids=perturbed(2)).logits, atol=1e-5, rtol=0)
    nothing = with_table(x_t, perturbation_embeds=vectors * math.nan).logits
    assert torch.equal(nothing, with_table(x_t).logits)


@torch.no_grad()
def test_only_labels_without_a_vector_use_their_learned_one(with_table):
    x_t, labels = torch.full((4, 7), 5), torch.arange(4)[:, None]
    before = with_table(x_t, perturbation_ids=labels).logits
    with_table.conditions.perturbation.learned.weight[:4] += 1
    after = with_table(x_t, perturbation_ids=labels).logits
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [False, True, True, True]


@torch.no_grad()
def test_a_target_flag_changes_the_output_where_the_target_is_among_the_genes_of_the_sequence(logits):
    def of(label: int, **targets: torch.Tensor) -> torch.Tensor:
        return logits(perturbation_ids=perturbed(label), **targets)

    model, (none, third) = logits.model, ({"target_gene_ids": torch.tensor([[gene], [gene]])} for gene in (-1, 3))
    model.target_gene_ids.fill_(-1)
    without, other = of(2), of(1)
    model.target_gene_ids[2] = 3
    flagged = of(2)
    assert (flagged - without)[:, 3].abs().max() > DIFFERENT  # as a queried gene
    assert torch.equal(of(1), other)
    assert torch.equal(of(2, **none), without)
    model.target_gene_ids[2] = -1
    assert torch.equal(of(2, **third), flagged)
    observed = logits(target_gene_ids=torch.tensor([[1], [2]]))  # each in its cell: the other genes see the flag
    assert (observed - logits())[:, [0, 3, 4, 5, 6]].abs().max() > DIFFERENT
    x_t, genes = torch.tensor([[1, 5, 5]]), torch.tensor([0, 2, 5])
    outside = model(x_t, gene_ids=genes, target_gene_ids=torch.tensor([[3]])).logits
    assert torch.equal(outside, model(x_t, gene_ids=genes).logits)
    model.backbone.embedding.target.weight.zero_()  # the flag is a vector that is added
    assert torch.equal(of(2, **third), without)


def library_sizes(groups: dict[tuple[int, ...], list[int]], **options) -> LibrarySizes:
    """The buffers for training cells of these sizes, by (cell type, covariates..., perturbations...)."""
    config = DCMConfig(num_cell_types=4, num_perturbations=5, **options)
    sizes = LibrarySizes(config)
    keys = np.concatenate([np.tile(key, (len(values), 1)) for key, values in groups.items()])
    values = np.concatenate(list(groups.values())).astype(np.int64)
    first = 1 + sizes.num_covariates  # of the perturbations
    ids = {"cell_type_ids": keys[:, 0], "covariate_ids": keys[:, 1:first], "perturbation_ids": keys[:, first:]}
    one_panel = np.zeros(len(keys), dtype=int), np.ones((1, 1), dtype=bool), np.ones(1)
    sizes.keys, sizes.quantiles = map(torch.from_numpy, library_size_quantiles(values, ids, *one_panel))
    return sizes


def drawn(sizes: LibrarySizes, cell_type: int, perturbation: list[int], B: int = 4000, seed: int = 0) -> torch.Tensor:
    cell_types, perturbations = torch.full((B,), cell_type), torch.tensor(perturbation).expand(B, -1)
    return sizes.draw(B, cell_types, perturbations, None, torch.Generator().manual_seed(seed))


def test_drawn_library_sizes_have_the_distribution_of_the_group():
    values = stats.lognorm(0.5, scale=3000).rvs(2000, random_state=0).round()
    sizes = library_sizes({(0, 1, -1): values, (0, 2, -1): values + 50_000})
    again = drawn(sizes, 0, [1])
    assert stats.ks_2samp(values, again).statistic < 0.03
    assert values.min() <= again.min() <= again.max() <= values.max()
    assert torch.equal(again, again.round())
    assert sizes.quantiles.shape == (len(sizes.keys), LIBRARY_QUANTILES)
    assert bool((sizes.quantiles.diff(dim=1) >= 0).all())
    assert bool((sizes.keys[-1] == -2).all())  # the last group is everything


def test_groups_below_fifty_cells_fall_back_to_the_cell_type_and_then_to_all():
    groups = {(0, 1, -1): [10] * 50, (0, 2, -1): [20] * 49, (1, 1, -1): [1000] * 49}
    sizes = library_sizes(groups)
    assert set(drawn(sizes, 0, [1]).tolist()) == {10}
    for small in ([2], [3]):  # or never seen with this cell type: all 50 of one and 49 of the other
        assert {10, 20} <= set(drawn(sizes, 0, small).tolist()) <= set(range(10, 21))
    for cell_type, perturbation in ((1, [1]), (-1, [-1])):  # the cell type is too small as well; nothing given
        assert {10, 1000} <= set(drawn(sizes, cell_type, perturbation).tolist())


def test_library_sizes_of_a_combination_do_not_depend_on_its_order_or_padding():
    sizes = library_sizes({(0, 1, 3): [30] * 60, (0, 1, -1): [10] * 60, (0, 3, -1): [7] * 60})
    for combination in ([1, 3], [3, 1], [1, 3, -1], [-1, 3, 1]):
        assert set(drawn(sizes, 0, combination).tolist()) == {30}
    for single in ([1], [1, -1], [-1, 1], [1, -1, -1]):
        assert set(drawn(sizes, 0, single).tolist()) == {10}
    for triple in ([1, 2, 3], [0, 1, 3]):  # never seen: the cell type's
        assert set(drawn(sizes, 0, triple).tolist()) > {10, 30}


def test_each_cell_of_a_batch_draws_from_its_own_group_of_cell_type_and_covariates():
    groups = {(0, 0, 1): [10] * 60, (0, 1, 1): [90] * 60, (1, 0, 1): [77] * 60}
    sizes = library_sizes(groups, covariates={"donor": 2}, max_perturbations_per_cell=1)
    cell_types, donors = torch.tensor([0, 0, 1, 0, 1, 0]), torch.tensor([[0], [1], [0], [1], [0], [0]])
    each = sizes.draw(6, cell_types, torch.ones(6, 1, dtype=torch.long), donors, torch.Generator())
    assert each.tolist() == [10, 90, 77, 90, 77, 10]
    with pytest.raises(ValueError, match="stores no library sizes of its training cells: give library_size="):
        LibrarySizes(DCMConfig()).draw(2, None, None, None, torch.Generator())


NOT_GIVEN = torch.tensor([-1])


@pytest.fixture
def totals() -> CellTotals:
    totals = CellTotals(DCMConfig(num_genes=5, max_count=9))
    totals.gene_mean.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    return totals


def test_progress_is_what_one_adds_up_by_hand(totals):
    mask, pad = totals.mask_token_id, totals.pad_token_id
    cell = torch.tensor([[3, mask, 0, mask, pad]])
    progress = totals.progress(cell, totals.mean(torch.arange(5)[None], NOT_GIVEN), NOT_GIVEN)
    assert progress.t.tolist() == [0.5]
    assert progress.observed_total.tolist() == [3.0]
    assert progress.expected_observed.tolist() == [1.0 + 4.0]
    assert progress.expected_masked.tolist() == [2.0 + 8.0]
    binned = DCMConfig(num_genes=2, max_count=15, count_bins=[4, 8])  # a bin stands for its middle
    assert count_values(binned).tolist() == [0, 1, 2, 3, (4 + 7) / 2, (8 + 15) / 2, 0, 0]  # MASK and PAD for none
    order = torch.tensor([4, 2, 0, 3, 1])  # it follows the genes, and not their positions
    mean = totals.mean(torch.arange(5)[None], NOT_GIVEN)
    moved = totals.progress(cell[:, order], mean[:, order], NOT_GIVEN)
    for here, there in zip(progress, moved, strict=True):
        torch.testing.assert_close(here, there)


def progress(observed_total: list[float], library_size: list[float], expected_masked: float = 19.0):
    zeros = torch.zeros(len(library_size))
    observed, masked = torch.tensor(observed_total), zeros + expected_masked
    return progress_of(zeros + 0.5, observed, zeros + 9, masked, torch.tensor(library_size))


def test_depth_is_that_of_what_is_left_of_the_library_size_or_of_what_was_observed_without_one():
    known = progress([60.0, 0.0, 100.0], library_size=[99.0, 39.0, 100.0])
    torch.testing.assert_close(known.depth, torch.tensor([40 / 20, 40 / 20, 1 / 20]))
    torch.testing.assert_close(progress([4.0], library_size=[-1.0]).depth, torch.tensor([5 / 10]))
    ratios = log_ratio(torch.tensor([0.0, 2e6, -5.0]), torch.tensor([0.0, 1e6, 3.0]))  # below zero counts as none
    torch.testing.assert_close(ratios, torch.tensor([1.0, 2.0, 1 / 4]).log(), atol=1e-5, rtol=0)


def library_size_encoder(log_mean: float = 0.0, log_std: float = 1.0) -> LibrarySizeEncoder:
    torch.manual_seed(0)
    encoder = LibrarySizeEncoder(DCMConfig(hidden_size=16))
    encoder.log_mean.fill_(log_mean)
    encoder.log_std.fill_(log_std)
    return encoder


@torch.no_grad()
def test_library_sizes_are_told_by_the_training_cells_mean_and_standard_deviation():
    z = torch.tensor([-1.5, 0.0, 0.7, 2.0])
    told = []
    for log_mean, log_std in ((7.0, 0.3), (6.0, 1.7)):
        encoder = library_size_encoder(log_mean, log_std)
        encoder.up.weight[:, SMOOTH_FEATURES + 1 :] = 0  # silent about what is left
        size = torch.expm1(log_mean + log_std * z)
        told.append(encoder(size, progress([0.0] * 4, size.tolist())))
    torch.testing.assert_close(told[0], told[1], atol=1e-3, rtol=1e-3)
    assert (told[0][1:] - told[0][:-1]).abs().amax(dim=1).min() > 0.01


@torch.no_grad()
def test_the_network_is_told_what_is_left_of_the_library_size():
    encoder = library_size_encoder(log_mean=4.0)
    encoder.up.weight[:, : SMOOTH_FEATURES + 1] = 0  # silent about the whole
    size, observed = [100.0, 60.0, 100.0], [70.0, 30.0, 30.0]
    told = encoder(torch.tensor(size), progress(observed, size))
    torch.testing.assert_close(told[0], told[1])
    assert (told[0] - told[2]).abs().max() > 0.01


NEW = {"X": torch.tensor([1.0, -1, 0, 2, 0, 1]), "Y": torch.tensor([0.0, 3, 1, 0, 0, -2])}


@pytest.fixture
def labels() -> DCMTokenizer:
    """The labels of ``with_table``: the control, three perturbations, and a gene named as one that is new."""
    return DCMTokenizer(
        genes=["X", *"abcdef"], max_count=4, perturbations=["control", "p1", "p2", "p3"], control="control"
    )


@torch.no_grad()
def test_an_added_perturbation_is_the_same_as_its_vector_given_by_hand(with_table, labels):
    x_t = torch.full((2, 7), 5)
    vectors = torch.stack(list(NEW.values()))[:, None]
    by_hand = with_table(x_t, perturbation_embeds=vectors, target_gene_ids=torch.tensor([[0], [-1]])).logits
    ids = labels.add_perturbations(NEW)
    assert with_table.add_perturbations(NEW, labels.target_gene_ids[ids]).tolist() == ids.tolist() == [4, 5]
    added = with_table(x_t, perturbation_ids=labels.perturbation_ids(list(NEW))).logits
    torch.testing.assert_close(added, by_hand, atol=1e-5, rtol=0)


@torch.no_grad()
def test_adding_perturbations_changes_nothing_that_was_known(with_table):
    x_t, known = torch.full((4, 7), 5), torch.tensor([[-1, -1], [CONTROL, -1], [1, 3], [2, -1]])
    before, trainable = with_table(x_t, perturbation_ids=known).logits, with_table.num_parameters(only_trainable=True)
    with_table.add_perturbations(NEW)
    assert torch.equal(with_table(x_t, perturbation_ids=known).logits, before)
    assert with_table.num_parameters(only_trainable=True) == trainable + 2 * 16


@torch.no_grad()
def test_added_perturbations_survive_saving_and_can_be_sampled(with_table, labels, tmp_path):
    ids = labels.add_perturbations(NEW)
    with_table.add_perturbations(NEW, labels.target_gene_ids[ids])
    with_table.save_pretrained(tmp_path)
    labels.save_pretrained(tmp_path)
    model, tokenizer = DCMForDenoising.from_pretrained(tmp_path).eval(), DCMTokenizer.from_pretrained(tmp_path)
    assert tokenizer.perturbations == labels.perturbations
    x_t, pair = torch.full((2, 7), 5), tokenizer.perturbation_ids(["X+p1", "Y"])
    assert torch.equal(model(x_t, perturbation_ids=pair).logits, with_table(x_t, perturbation_ids=pair).logits)
    conditions = tokenizer.conditions(perturbation="Y+p2", num_cells=3)
    assert model.generate(**conditions, library_size="null", steps=2).shape == (3, 7)
    assert model.target_gene_ids[4:].tolist() == [0, -1]


@pytest.mark.parametrize(
    ("table", "targets", "message"),
    [
        ({"X": torch.ones(5)}, None, r"the vector of 'X' has shape \(5,\), expected \(6,\)"),
        ({"X": torch.zeros(6)}, None, "the vector of 'X' is not finite, or all zero"),
        ({"X": torch.full((6,), math.nan)}, None, "the vector of 'X' is not finite, or all zero"),
        ({"X": torch.ones(6)}, torch.tensor([7]), r"1 vectors with target_gene_ids \[7\], expected .* -1..6"),
        ({"X": torch.ones(6)}, torch.tensor([1, 2]), r"1 vectors with target_gene_ids \[1, 2\]"),
        ({}, None, "0 vectors"),
    ],
)
def test_vectors_that_do_not_fit_or_for_a_model_without_any_are_not_added(
    with_table, make_model, table, targets, message
):
    with pytest.raises(ValueError, match=message):
        with_table.add_perturbations(table, targets)
    assert with_table.config.num_perturbations == len(with_table.target_gene_ids) == 4
    for options in ({}, {"conditioned": True}):
        with pytest.raises(ValueError, match="has no frozen vectors of perturbations: train it with a perturbation"):
            make_model(**options).add_perturbations(NEW)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["X", "p1"], "1 perturbations are known already: p1; leave them out"),
        (["X", "X"], "perturbations has 1 names more than once: X"),
        (["X+Y"], r"'X\+Y' contains the separator"),
        ([""], "perturbations has the name ''"),
    ],
)
def test_names_that_are_known_or_no_names_are_not_added(labels, names, message):
    with pytest.raises(ValueError, match=message):
        labels.add_perturbations(names)
    assert labels.perturbations == ["control", "p1", "p2", "p3"]
