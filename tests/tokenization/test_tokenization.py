"""Properties of DCMTokenizer: ids never collide, names decide, nothing is guessed, everything is saved."""

import cProfile
import logging
import pstats

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from tokenization import DCMTokenizer
from tokenization.tokenization_dcm import VOCABULARIES

GENES = ["KLF1", "ACTB", "TGFBR2", "MALAT1"]


@pytest.fixture
def tokenizer() -> DCMTokenizer:
    return DCMTokenizer.from_labels(
        genes=GENES,
        max_count=9,
        cell_types=["k562", "hepg2"],
        perturbations=["control", "TGFBR2+KLF1", "HSP90B1"],
        control="control",
        covariates={"bio_rep": ["rep_1", "rep_2"], "dose": ["high", "low"]},
    )


@pytest.fixture
def cells() -> anndata.AnnData:
    obs = pd.DataFrame(
        {"cell_type": ["k562", "hepg2", "k562"], "perturbation": ["KLF1+TGFBR2", "control", "HSP90B1"], "dose": "low"},
        index=["a", "b", "c"],
    )
    counts = scipy.sparse.csr_matrix(np.array([[0, 1, 2, 30], [4, 0, 0, 0], [9, 9, 0, 1]]))
    return anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


def test_counts_mask_and_pad_have_ids_of_their_own(tokenizer):
    assert tokenizer.count_ids(np.arange(10)).tolist() == list(range(10))
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.vocab_size, len(tokenizer)) == (10, 11, 12, 12)
    assert sorted(tokenizer.get_vocab().values()) == list(range(12))


def test_bins_replace_the_last_ids_and_decoding_draws_every_count_of_a_bin_and_only_those():
    tokenizer = DCMTokenizer.from_labels(genes=GENES, max_count=15, count_bins=[4, 8])
    assert tokenizer.count_ids(np.array([0, 3, 4, 7, 8, 15])).tolist() == [0, 3, 4, 4, 5, 5]
    assert (tokenizer.num_count_ids, tokenizer.mask_token_id, tokenizer.pad_token_id) == (6, 6, 7)
    ids = np.tile([0, 3, 4, 5], (500, 1))
    counts, again, other = (tokenizer.decode(ids, seed=seed).X.toarray() for seed in (0, 0, 1))
    assert (set(counts[:, 2]), set(counts[:, 3])) == (set(range(4, 8)), set(range(8, 16)))
    assert np.array_equal(tokenizer.count_ids(counts), ids)
    assert np.array_equal(counts, again)
    assert not np.array_equal(counts, other)


def test_csr_csc_dense_backed_anndata_and_tables_give_the_same_ids(tokenizer, cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    expected = tokenizer(cells.X.toarray().astype(int))["input_ids"]
    assert expected.tolist() == [[0, 1, 2, 9], [4, 0, 0, 0], [9, 9, 0, 1]]
    backed, table = anndata.read_h5ad(tmp_path / "cells.h5ad", "r"), cells.to_df().iloc[:, ::-1]
    for same in (cells, cells.X, cells.X.tocsc(), cells.X.toarray(), backed, table):
        assert torch.equal(tokenizer(same)["input_ids"], expected)
    assert torch.equal(tokenizer(table.iloc[1])["input_ids"], expected[1:2])


def test_genes_are_matched_by_name_and_those_not_measured_are_pad_and_others_dropped(tokenizer, cells, caplog):
    shuffled = cells[:, ["MALAT1", "KLF1", "TGFBR2", "ACTB"]]
    assert torch.equal(tokenizer(shuffled)["input_ids"], tokenizer(cells)["input_ids"])
    assert tokenizer(cells)["library_size"].tolist() == [33, 4, 19]  # before clipping
    few = tokenizer(cells[:, ["MALAT1", "KLF1"]])
    assert few["library_size"].tolist() == [30, 4, 10]
    assert few["input_ids"].tolist() == [[0, 11, 11, 9], [4, 11, 11, 0], [9, 11, 11, 1]]  # a measured zero is no PAD
    ids = tokenizer(np.array([[7, 5, 6]]), genes=["other", "ACTB", "another"])["input_ids"]
    assert ids[0].tolist() == [11, 5, 11, 11]
    assert "2 genes are not in the panel and were dropped" in caplog.text


def test_counts_above_the_largest_are_clipped_with_one_warning(tokenizer, caplog):
    counts = np.array([[10, 0, 0, 700], [12, 9, 9, 9]])
    assert tokenizer(counts)["input_ids"].max() == 9
    assert caplog.messages == ["3 counts are above max_count=9 (largest 700) and were clipped"]
    with pytest.raises(ValueError, match=r"3 counts are above max_count=9 \(largest 700\)"):
        tokenizer(counts, clip=False)


def test_conditions_of_an_anndata_come_from_its_canonical_columns(tokenizer, cells):
    batch = tokenizer(cells)
    assert batch["cell_type_ids"].tolist() == [1, 0, 1]
    assert batch["perturbation_ids"].tolist() == [[1, 2], [3, -1], [0, -1]]
    assert batch["covariate_ids"].tolist() == [[-1, 1]] * 3  # no bio_rep in this file
    cells.obs["cell_type"] = pd.Categorical(["k562", None, "k562"])
    assert tokenizer(cells)["cell_type_ids"].tolist() == [1, -1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.log1p(np.arange(8.0)).reshape(2, 4), r"7 of 8 values .* not integers \(largest 2.079\).*log-normalised"),
        (np.array([[-2, 1, 0, -1]]), r"2 of 4 values \(50.00%\) are negative \(smallest -2, largest 1\)"),
        (np.array([["1", "2", "3", "4"]]), "expected counts, got values of type"),
        (np.zeros((2, 3), dtype=int), "3 columns of counts but 4 gene names"),
    ],
)
def test_values_that_are_no_counts_are_refused(tokenizer, values, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(values)


def test_log_normalised_x_points_to_the_layer_with_counts(tokenizer, cells):
    cells.layers["spliced"] = cells.layers["counts"] = cells.X.copy()
    cells.X = np.log1p(cells.X.toarray())
    with pytest.raises(ValueError, match=r"looks log-normalised: pass layer='counts' \(layers here: spliced, counts\)"):
        tokenizer(cells)
    assert tokenizer(cells, layer="counts")["input_ids"][0].tolist() == [0, 1, 2, 9]
    with pytest.raises(ValueError, match="no layer 'raw'; layers here: spliced, counts"):
        tokenizer(cells, layer="raw")


def test_duplicate_and_foreign_gene_names_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"1 gene names stand more than once \(ACTB\)"):
        tokenizer(np.ones((1, 3), dtype=int), genes=["ACTB", "KLF1", "ACTB"])
    with pytest.raises(ValueError, match=r"none of the 2 genes \(ENSG1, ENSG2, \.\.\.\) is in the panel \(KLF1"):
        tokenizer(np.ones((1, 2), dtype=int), genes=["ENSG1", "ENSG2"])


IDS = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]


@pytest.mark.parametrize("panel_versions", [["", "", ""], [".1", ".2", ".3"]])
@pytest.mark.parametrize("versions", [["", "", ""], [".1", ".12", ".7"], [".5", "", ".3"]])
def test_ensembl_ids_are_matched_whatever_their_version(panel_versions, versions):
    tokenizer = DCMTokenizer.from_labels(
        genes=[id_ + version for id_, version in zip(IDS, panel_versions)], max_count=9, perturbations=[IDS[1] + ".4"]
    )
    names = [*(id_ + version for id_, version in zip(IDS, versions)), "ENSG00000000004.1", "KLF1.2"]
    batch = tokenizer(np.array([[1, 2, 3, 4, 5]]), genes=names)
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["library_size"].tolist() == [6]
    assert tokenizer.target_gene_ids.tolist() == [1]
    tokenizer = DCMTokenizer.from_labels(genes=["RP11-34P13.7", "HLA.A", IDS[0]], max_count=9)
    ids = tokenizer(np.array([[1, 2, 3]]), genes=["RP11-34P13.8", "HLA", IDS[0] + ".1"])["input_ids"]
    assert ids.tolist() == [[11, 11, 3]]  # other names with a dot have no versions


@pytest.mark.parametrize(
    ("panel", "names", "listed"),
    [
        (IDS, [IDS[0] + ".1", IDS[0] + ".2"], r"ENSG00000000001, ENSG00000000001\.1, ENSG00000000001\.2"),
        (IDS, [IDS[0], IDS[0] + ".2"], r"ENSG00000000001, ENSG00000000001\.2"),
        ([IDS[0] + ".1", IDS[0] + ".2"], [IDS[0]], r"ENSG00000000001, ENSG00000000001\.1, ENSG00000000001\.2"),
    ],
)
def test_an_ensembl_id_in_several_versions_is_refused(panel, names, listed):
    tokenizer = DCMTokenizer.from_labels(genes=panel, max_count=9)
    both = DCMTokenizer.from_labels(genes=[IDS[0] + ".1", IDS[0] + ".2"], max_count=9)  # which tells them apart
    assert both(np.array([[3, 4]]), genes=[IDS[0] + ".2", IDS[0] + ".1"])["input_ids"].tolist() == [[4, 3]]
    message = rf"1 Ensembl ids of the panel or the cells stand in several versions \({listed}\); keep one of each"
    with pytest.raises(ValueError, match=message):
        tokenizer(np.ones((1, len(names)), dtype=int), genes=names)


def test_one_label_is_broadcast_many_are_per_cell_and_what_is_not_given_is_minus_one(tokenizer):
    conditions = tokenizer.conditions(cell_type="hepg2", perturbation=["HSP90B1", None], covariates={"dose": "high"})
    assert conditions.pop("num_cells") == 2
    assert all(ids.dtype == torch.int64 for ids in conditions.values())
    expected = {"cell_type_ids": [0, 0], "perturbation_ids": [[0], [-1]], "covariate_ids": [[-1, 0], [-1, 0]]}
    assert {name: ids.tolist() for name, ids in conditions.items()} == expected
    nothing = tokenizer.conditions(num_cells=3)
    assert nothing.pop("num_cells") == 3
    assert all((ids == -1).all() for ids in nothing.values())
    assert tokenizer.conditions(perturbation="control")["perturbation_ids"].tolist() == [[3]]
    numbers = DCMTokenizer.from_labels(genes=GENES, max_count=1, cell_types=pd.Series([2, 1]), covariates={"d": [5]})
    assert numbers.conditions(cell_type=[1, 2], covariates={"d": 5})["cell_type_ids"].tolist() == [0, 1]
    plain = DCMTokenizer.from_labels(genes=GENES, max_count=9)
    assert plain.conditions(num_cells=4) == {"num_cells": 4}
    with pytest.raises(ValueError, match="no labels of cell_type; it knows: no condition"):
        plain.conditions(cell_type="k562")


def test_combinations_are_sets_of_names_and_control_adds_nothing(tokenizer):
    ids = tokenizer.perturbation_ids(["KLF1+TGFBR2", "TGFBR2+KLF1", "KLF1+control", "control+KLF1", "KLF1", "control"])
    assert ids.tolist() == [[1, 2], [1, 2], [1, -1], [1, -1], [1, -1], [3, -1]]
    assert tokenizer.perturbations == ["HSP90B1", "KLF1", "TGFBR2", "control"]
    assert tokenizer.target_gene_ids.tolist() == [-1, 0, 2, -1]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"perturbation": "HSP90B2"}, "unknown perturbation 'HSP90B2'; near matches: 'HSP90B1'"),
        ({"perturbation": "KLF2+TGFBR2"}, "unknown perturbation 'KLF2'; near matches: 'KLF1'"),
        ({"cell_type": "neuron"}, "unknown cell_type 'neuron'; known labels: 'hepg2', 'k562'"),
        ({"covariates": {"dose": ["x", "y"]}}, r"unknown dose 'x' \(and 1 more unknown labels\)"),
        ({"covariates": {"donor": "d1"}}, "no labels of covariate 'donor'; it knows: cell_type, perturbation, covar"),
        ({"perturbation": "KLF1+"}, r"'KLF1\+' has an empty part"),
        ({"cell_type": ["k562"] * 2, "perturbation": ["control"] * 3}, "3 labels of perturbation for 2 cells"),
        ({"num_cells": 0}, "num_cells is 0"),
    ],
)
def test_labels_that_are_unknown_or_contradict_are_refused_with_near_matches(tokenizer, asked, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.conditions(**asked)


def test_decoding_inverts_tokenizing_also_through_a_file(tokenizer, cells, tmp_path):
    cells.X.data = np.minimum(cells.X.data, 9)
    batch = tokenizer(cells)
    decoded = tokenizer.decode(batch["input_ids"], batch)
    assert decoded.X.dtype == np.int32
    assert (decoded.X != cells.X).nnz == 0
    assert list(decoded.var_names) == GENES
    columns = list(decoded.uns["dcm_conditions"])
    assert columns == ["cell_type", "perturbation", "dose"]
    assert decoded.obs[columns].astype(str).values.tolist() == cells.obs[columns].values.tolist()
    assert (decoded.uns["dcm_control"], decoded.uns["dcm_separator"]) == ("control", "+")
    decoded = tokenizer.decode(batch["input_ids"], batch | {"perturbation_ids": torch.tensor([[1], [-1], [3]])})
    decoded.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert read.obs["perturbation"].isna().tolist() == [False, True, False]
    assert tokenizer(read)["perturbation_ids"].tolist() == [[1], [-1], [3]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 0, 0, 10]], r"1 ids are MASK \(10\)"),
        ([[0, 11, 0, 11]], r"2 ids are PAD \(11\)"),
        ([[0, 0, 0, 12]], "ids run from 0 to 12; expected 0 to 9"),
        ([[0, 0, 0, -1]], "ids run from -1 to 0"),
        ([[0, 0, 0]], "ids have 3 columns; expected the panel's 4 genes"),
    ],
)
def test_ids_that_are_no_counts_cannot_be_decoded(tokenizer, ids, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(np.array(ids))
    with pytest.raises(ValueError, match="cell_type_ids has 3 rows but there are 2 cells"):
        tokenizer.decode(np.zeros((2, 4), dtype=int), tokenizer.conditions(cell_type="k562", num_cells=3))


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no genes\.txt in .*; expected a folder that DCMTokenizer\.save_pretrained"):
        DCMTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = DCMTokenizer.from_pretrained(tmp_path / "one")
    for name in ("genes", "max_count", "count_bins", *VOCABULARIES):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert (loaded.mask_token_id, loaded.pad_token_id) == (10, 11)
    loaded.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (tmp_path / "one" / "genes.txt").read_text().splitlines() == GENES
    assert "KLF1" not in (tmp_path / "one" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"genes": []}, "genes is empty"),
        ({"genes": ["A", "B", "A"]}, "genes has 1 names more than once: A"),
        ({"max_count": 0}, "max_count is 0"),
        ({"perturbations": ["KLF1"], "control": "ctrl"}, "unknown control 'ctrl'; known labels: 'KLF1'"),
        ({"covariates": {"cell_type": ["x"]}}, "covariate 'cell_type'"),
        *(
            ({"count_bins": bins}, r"count_bins is .*; expected ascending left edges from 1 to 9")
            for bins in ([], [0, 4], [4, 4], [8, 4], [4, 10])
        ),
    ],
)
def test_states_that_contradict_themselves_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DCMTokenizer.from_labels(**({"genes": GENES, "max_count": 9} | wrong))


def test_single_names_with_the_separator_need_another_separator():
    with pytest.raises(ValueError, match="perturbation 'CD3\\+' contains the separator '\\+'"):
        DCMTokenizer(genes=GENES, max_count=9, perturbations=["CD3+"])
    tokenizer = DCMTokenizer.from_labels(genes=GENES, max_count=9, perturbations=["CD3+", "CD4+"], separator=None)
    assert tokenizer.perturbation_ids(["CD4+"]).tolist() == [[1]]


def test_tokenizing_many_cells_has_no_loop_over_cells(tokenizer, caplog):
    caplog.set_level(logging.ERROR)
    n = 100_000
    cells = anndata.AnnData(scipy.sparse.random(n, 4, density=0.2, format="csr", random_state=0).ceil())
    cells.obs["perturbation"] = pd.Categorical(np.resize(["KLF1+TGFBR2", "control"], n))
    cells.var_names = GENES
    profile = cProfile.Profile()
    profile.runcall(tokenizer, cells)
    assert pstats.Stats(profile).total_calls < n / 10
