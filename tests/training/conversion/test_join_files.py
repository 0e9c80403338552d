"""Several files become one list of genes, by name; what a file lacks is dropped or remembered."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from training.conversion.genes import InputCells, read_cells


def write(folder: Path, name: str, genes: list[str], *, n: int = 4, var=None, obs=None, cells=None) -> Path:
    rng = np.random.default_rng(len(name) + n)
    index = cells or [f"{name}{i}" for i in range(n)]
    anndata.AnnData(
        scipy.sparse.csr_matrix(rng.poisson(2.0, size=(n, len(genes)))),
        obs=pd.DataFrame(obs or {}, index=index),
        var=pd.DataFrame(var or {}, index=genes),
    ).write_h5ad(folder / f"{name}.h5ad")
    return folder / f"{name}.h5ad"


def joined(paths, scratch: Path, **options) -> tuple[InputCells, pd.DataFrame]:
    cells = read_cells(paths, scratch, **options)
    blocks = list(cells.blocks("reading"))
    assert [rows.start for rows, _, _ in blocks[1:]] == [rows.stop for rows, _, _ in blocks[:-1]]
    counts = scipy.sparse.vstack([counts for _, counts, _ in blocks]).toarray()
    return cells, pd.DataFrame(counts, index=cells.obs.index, columns=cells.var.index)


@pytest.mark.parametrize("join", ["intersection", "union"])
def test_genes_of_several_files_are_joined_by_name(tmp_path, join):
    paths = [write(tmp_path, "a", ["g1", "g2", "g3"]), write(tmp_path, "b", ["g4", "g3", "g1"])]
    cells, counts = joined(paths, tmp_path, join=join)
    expected = [anndata.read_h5ad(path).to_df() for path in paths]
    wanted = ["g1", "g3"] if join == "intersection" else ["g1", "g2", "g3", "g4"]
    assert list(counts) == wanted
    pd.testing.assert_frame_equal(
        counts,
        pd.concat([table.reindex(columns=wanted).fillna(0).astype(int) for table in expected]),
        check_names=False,
    )
    assert cells.measured.tolist() == [[gene in table for gene in wanted] for table in expected]
    assert cells.obs["source_file"].tolist() == ["a"] * 4 + ["b"] * 4


def test_a_list_of_genes_is_taken_in_its_order(tmp_path):
    path = write(tmp_path, "a", ["g1", "g2", "g3"])
    _, counts = joined([path], tmp_path, genes=["g3", "g1"])
    pd.testing.assert_frame_equal(counts, anndata.read_h5ad(path).to_df()[["g3", "g1"]].astype(int), check_names=False)
    with pytest.raises(ValueError, match=r"lacks 2 of the 3 genes of --genes \(x, y\); remove them .* --join union"):
        joined([path], tmp_path, genes=["x", "g1", "y"])
    cells, counts = joined([path], tmp_path, genes=["x", "g1", "y"], join="union")
    assert cells.measured.tolist() == [[False, True, False]]
    assert not counts[["x", "y"]].to_numpy().any()


def test_what_a_file_says_was_not_measured_is_no_gene_of_it(tmp_path):
    path, other = write(tmp_path, "a", ["g1", "g2", "g3"]), write(tmp_path, "b", ["g1", "g2", "g3"])
    cells = anndata.read_h5ad(path)
    cells.obs["panel"], cells.uns["dcm_panels"] = "few", {"few": [True, False, True], "all": [True] * 3}
    cells.write_h5ad(path)
    assert list(joined([path, other], tmp_path)[1]) == ["g1", "g3"]
    assert joined([path, other], tmp_path, join="union")[0].measured.tolist() == [[True, True, False], [True] * 3]
    cells.obs["panel"] = ["few", "all"] * 2
    cells.write_h5ad(path)
    with pytest.raises(ValueError, match=r"a.h5ad' has cells of several panels .*convert the files that it was made"):
        joined([path], tmp_path)


def test_genes_of_another_kind_of_name_are_refused(tmp_path):
    ensembl = [f"ENSG{i:011d}" for i in range(3)]
    one, other = write(tmp_path, "a", ensembl, var={"symbol": list("xyz")}), write(tmp_path, "b", list("xyz"))
    with pytest.raises(
        ValueError, match=r"Ensembl ids in a.h5ad \(ENSG0.* but other names in b.h5ad \(x, y\); --gene-key"
    ):
        joined([one, other], tmp_path)
    with pytest.raises(
        ValueError, match=r"none of the 2 genes of --genes \(x, y\) is in .*names another column of var: sy"
    ):
        joined([one], tmp_path, genes=["x", "y"])
    with pytest.raises(ValueError, match=r"has no var column 'symbols' \(--gene-key\); columns there: symbol"):
        joined([one], tmp_path, gene_key="symbols")
    assert list(joined([one], tmp_path, gene_key="symbol")[1]) == list("xyz")
    with pytest.raises(ValueError, match=r"no gene is in all 2 files \(b.h5ad: x, y; c.h5ad: u, v\)"):
        joined([other, write(tmp_path, "c", ["u", "v"])], tmp_path)


def test_versions_of_ensembl_ids_do_not_matter(tmp_path):
    paths = [
        write(tmp_path, "a", ["ENSG00000000001.5", "ENSG00000000002.1", "ENSG00000000003.2_PAR_Y"]),
        write(tmp_path, "b", ["ENSG00000000002.7", "ENSG00000000001"]),
    ]
    assert list(joined(paths, tmp_path)[1]) == ["ENSG00000000001", "ENSG00000000002"]
    assert list(joined(paths[:1], tmp_path, genes=["ENSG00000000002.9"])[1]) == ["ENSG00000000002"]


def test_cell_names_of_several_files_become_unique(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "x").mkdir()
    cells = ["AAAC", "AAAG"]
    paths = [write(folder, "a", ["g1"], n=2, cells=cells) for folder in (tmp_path, tmp_path / "x")]
    obs = joined(paths, tmp_path)[0].obs
    assert obs["source_file"].tolist() == [f"{tmp_path.name}/a"] * 2 + ["x/a"] * 2
    assert obs.index[3] == "x/a:AAAG"
    assert "cell names occur in several files" in caplog.text
    with pytest.raises(ValueError, match=r"a.h5ad' is given twice"):
        joined([paths[0], paths[0]], tmp_path)


def test_columns_of_obs_that_all_files_have_are_kept_and_can_be_stored(tmp_path, caplog):
    caplog.set_level("INFO")
    one = write(tmp_path, "a", ["g1"], n=2, obs={"donor": ["d1", "d2"], "age": [1, 2], "only": [1, 1]})
    two = write(tmp_path, "b", ["g1"], n=2, obs={"donor": ["d3", "d1"], "age": ["1", "x"]})
    obs = joined([one, two], tmp_path)[0].obs
    assert list(obs) == ["donor", "age", "source_file"]
    assert obs["age"].tolist() == ["1", "2", "1", "x"]
    assert "left out: only" in caplog.text
    anndata.AnnData(obs=obs).write_h5ad(tmp_path / "c.h5ad")
