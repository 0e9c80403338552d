"""How far a cell is revealed and how deep it was sequenced: sums that can be done by hand."""

import pytest
import torch

from modeling_dcm import DCMConfig
from modeling_dcm.conditioning_dcm import CellTotals, count_values, log_ratio

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


def test_progress_follows_the_genes_and_not_their_positions(totals):
    order = torch.tensor([4, 2, 0, 3, 1])
    cell = torch.tensor([[3, totals.mask_token_id, 0, 7, 2]])
    mean = totals.mean(torch.arange(5)[None], NOT_GIVEN)
    straight = totals.progress(cell, mean, NOT_GIVEN)
    for here, there in zip(straight, totals.progress(cell[:, order], mean[:, order], NOT_GIVEN), strict=True):
        torch.testing.assert_close(here, there)


def test_depth_is_zero_where_nothing_is_expected_and_tends_to_the_logarithm_of_the_ratio():
    assert log_ratio(torch.tensor([0.0]), torch.tensor([0.0])).tolist() == [0.0]
    twice = log_ratio(torch.tensor([2e6]), torch.tensor([1e6]))
    assert twice.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)


def test_a_remainder_below_zero_counts_as_none():
    below = log_ratio(torch.tensor([-5.0]), torch.tensor([3.0]))
    assert below.tolist() == log_ratio(torch.tensor([0.0]), torch.tensor([3.0])).tolist()


def test_ids_stand_for_their_counts_and_a_bin_for_its_middle():
    assert count_values(DCMConfig(num_genes=2, max_count=3)).tolist() == [0, 1, 2, 3, 0, 0]
    binned = DCMConfig(num_genes=2, max_count=15, count_bins=[4, 8])
    assert count_values(binned).tolist() == [0, 1, 2, 3, (4 + 7) / 2, (8 + 15) / 2, 0, 0]
