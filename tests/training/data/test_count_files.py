"""Every kind of input file gives the same cells, in blocks of any size, and damage is one line that names the file."""

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse

from tests.token_rows import write_token_rows
from training.data import h5ad as h5ad_blocks
from training.data.formats import open_counts

CELLS, GENES = 50, 12


@pytest.fixture
def counts() -> scipy.sparse.csr_matrix:
    counts = np.zeros(CELLS * GENES)
    counts[np.random.default_rng(0).choice(len(counts), 240, replace=False)] = np.arange(240) + 1
    return scipy.sparse.csr_matrix(counts.reshape(CELLS, GENES))


def as_h5ad(counts, path: Path, **parts) -> Path:
    anndata.AnnData(**({"X": counts} | parts)).write_h5ad(path)
    return path


def as_10x_h5(counts, path: Path, kinds=("Gene Expression",) * GENES) -> Path:
    by_feature = counts.T.tocsc()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(by_feature, name)
        group["shape"] = by_feature.shape
        group["barcodes"] = [f"AAAC{i}-1" for i in range(CELLS)]
        features = group.create_group("features")
        features["id"] = [f"ENSG{i:011d}" for i in range(GENES)]
        features["name"] = [f"GENE{i}" for i in range(GENES)]
        features["feature_type"] = list(kinds)
    return path


def as_mtx(counts, folder: Path, *, version: int = 3) -> Path:
    folder.mkdir()
    ending = ".gz" if version == 3 else ""
    open_text = gzip.open if version == 3 else open
    scipy.io.mmwrite(folder / "matrix.mtx", counts.T.astype(int))
    if version == 3:
        (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
        (folder / "matrix.mtx").unlink()
    with open_text(folder / f"{'features' if version == 3 else 'genes'}.tsv{ending}", "wt") as file:
        kind = "\tGene Expression" if version == 3 else ""
        file.writelines(f"ENSG{i:011d}\tGENE{i}{kind}\n" for i in range(GENES))
    with open_text(folder / f"barcodes.tsv{ending}", "wt") as file:
        file.writelines(f"AAAC{i}-1\n" for i in range(CELLS))
    return folder


CELL_NAMES = pd.DataFrame(index=[f"cell{i}" for i in range(CELLS)])


def read(path: Path, scratch: Path, layer: str | None = None) -> scipy.sparse.csr_matrix:
    file = open_counts(path, scratch, layer)
    return scipy.sparse.vstack([counts for _, counts in file.blocks("reading")]).tocsr()


KINDS = {
    "csr": lambda counts, folder: (as_h5ad(counts, folder / "a.h5ad"), None),
    "csc": lambda counts, folder: (as_h5ad(counts.tocsc(), folder / "a.h5ad"), None),
    "dense": lambda counts, folder: (as_h5ad(counts.toarray(), folder / "a.h5ad"), None),
    "layer": lambda counts, folder: (as_h5ad(counts * 0.5, folder / "a.h5ad", layers={"umi": counts}), "umi"),
    "csc layer without X": lambda counts, folder: (
        as_h5ad(None, folder / "a.h5ad", shape=counts.shape, layers={"umi": counts.tocsc()}),
        "umi",
    ),
    "raw": lambda counts, folder: (
        as_h5ad(counts[:, :3], folder / "a.h5ad", raw={"X": counts, "var": pd.DataFrame(index=list("abcdefghijkl"))}),
        "raw",
    ),
    "10x h5": lambda counts, folder: (as_10x_h5(counts, folder / "a.h5"), None),
    "mtx": lambda counts, folder: (as_mtx(counts, folder / "a"), None),
    "rows of tokens": lambda counts, folder: (
        write_token_rows(folder / "data" / "a.parquet", counts, CELL_NAMES),
        None,
    ),
    "mtx of Cell Ranger 2": lambda counts, folder: (as_mtx(counts, folder / "a", version=2), None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [4096, 7])
def test_every_kind_of_file_gives_the_same_counts(counts, tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr(h5ad_blocks, "BLOCK_CELLS", block)
    monkeypatch.setattr(h5ad_blocks, "BLOCK_STORED", 20)
    path, layer = KINDS[kind](counts, tmp_path)
    found = read(path, tmp_path / "scratch", layer)
    assert found.dtype == np.int64
    assert found.has_sorted_indices
    assert (found != counts).nnz == 0


def test_10x_names_are_symbols_with_ids_beside_them_and_other_features_are_marked(counts, tmp_path):
    for path in (as_10x_h5(counts, tmp_path / "a.h5"), as_mtx(counts, tmp_path / "a")):
        file = open_counts(path, tmp_path / "scratch" / path.suffix)
        assert file.var.index[3] == "GENE3"
        assert file.var["gene_ids"].iloc[3] == "ENSG00000000003"
        assert file.obs.index[3] == "AAAC3-1"
    kinds = ["Gene Expression"] * 10 + ["Antibody Capture"] * 2
    file = open_counts(as_10x_h5(counts, tmp_path / "b.h5", kinds), tmp_path / "scratch")
    assert file.are_genes.tolist() == [True] * 10 + [False] * 2


@pytest.mark.parametrize("kind", ["csr", "csc", "10x h5"])
@pytest.mark.parametrize(("array", "value"), [("indices", 99), ("indices", -1), ("indptr", 10**6)])
def test_indices_that_cannot_be_true_are_refused(counts, tmp_path, kind, array, value):
    path, _ = KINDS[kind](counts, tmp_path)
    with h5py.File(path, "r+") as file:
        file["matrix" if kind == "10x h5" else "X"][array][5] = value
    with pytest.raises(ValueError, match=rf"{path.name}': the ind.* of the sparse matrix are damaged"):
        read(path, tmp_path / "scratch")


def test_text_that_is_damaged_or_not_there_is_refused(counts, tmp_path):
    folder = as_mtx(counts, tmp_path / "a", version=2)
    matrix = folder / "matrix.mtx"
    lines = matrix.read_text().splitlines(keepends=True)
    matrix.write_text("".join([*lines[:-1], "99 1 1\n"]))
    with pytest.raises(ValueError, match="gene numbers outside 1 to 12"):
        read(folder, tmp_path / "again")
    zipped = as_mtx(counts, tmp_path / "b")
    data = (zipped / "matrix.mtx.gz").read_bytes()
    (zipped / "matrix.mtx.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"matrix.mtx.gz' cannot be read \(EOFError"):
        read(zipped, tmp_path / "third")
    (zipped / "features.tsv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no features.tsv or genes.tsv \(or .gz\) in the folder"):
        read(zipped, tmp_path / "fourth")


def test_rows_of_tokens_need_their_table_and_only_a_marker_may_stand_for_no_gene(counts, tmp_path):
    path = write_token_rows(tmp_path / "data" / "a.parquet", counts, CELL_NAMES.assign(drug="DMSO_TF"))
    file = open_counts(path, tmp_path / "scratch")
    assert file.var.index[3] == "ENSG00000000003"
    assert file.var["gene_symbol"].iloc[3] == "GENE3"
    assert file.obs.index[3] == "cell3"
    assert file.obs["drug"].tolist() == ["DMSO_TF"] * CELLS
    rows = pq.read_table(path).to_pydict()
    for change, error in (((0, 99, 1.0), "token 99 is not in the table"), ((2, 1, 4.0), "token 1 is not in the table")):
        place, token, value = change
        genes, expressions = ([list(row) for row in rows[name]] for name in ("genes", "expressions"))
        genes[4][place], expressions[4][place] = token, value
        pq.write_table(pa.table({"genes": genes, "expressions": expressions}), path)
        with pytest.raises(ValueError, match=rf"a\.parquet'.*{error}"):
            read(path, tmp_path / "scratch")
    (tmp_path / "metadata" / "gene_metadata.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no gene_metadata\.parquet beside .* or in \.\./metadata/"):
        read(path, tmp_path / "scratch")


def test_a_missing_matrix_or_layer_lists_those_there(counts, tmp_path):
    path = as_h5ad(counts, tmp_path / "a.h5ad", layers={"umi": counts}, raw={"X": counts})
    with pytest.raises(ValueError, match="has no layer 'counts'; layers there: umi, raw"):
        read(path, tmp_path, "counts")
    with pytest.raises(ValueError, match=r"a\.h5' has no layers: leave it out"):
        read(as_10x_h5(counts, tmp_path / "a.h5"), tmp_path, "counts")
