"""A small imitation of Tahoe-100M: rows of gene tokens and expressions that begin with a marker, and the gene table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse

FIRST_TOKEN, MARKER = 3, (1, -2.0)


def write_token_rows(path: Path, counts: scipy.sparse.csr_matrix, obs: pd.DataFrame) -> Path:
    """Write counts (n, G) with the columns of ``obs``; genes are named by Ensembl id, in no order of their tokens."""
    rng, rows = np.random.default_rng(0), []
    tokens = FIRST_TOKEN + rng.permutation(counts.shape[1])
    for row in scipy.sparse.csr_matrix(counts):
        order = rng.permutation(row.nnz)
        rows.append(([MARKER[0], *tokens[row.indices[order]]], [MARKER[1], *row.data[order].astype(float)]))
    genes, expressions = zip(*rows)
    lists = {
        "genes": pa.array(genes, pa.list_(pa.int64())),
        "expressions": pa.array(expressions, pa.list_(pa.float32())),
    }
    columns = {name: pa.array(obs[name].astype(str)) for name in obs}
    barcodes = {"BARCODE_SUB_LIB_ID": pa.array(obs.index.astype(str))}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**lists, **columns, **barcodes}), path, row_group_size=20)
    ids = [f"ENSG{i:011d}" for i in range(counts.shape[1])]
    table = {"gene_symbol": [f"GENE{i}" for i in range(len(ids))], "ensembl_id": ids, "token_id": tokens}
    metadata = path.absolute().parent.parent / "metadata"
    metadata.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), metadata / "gene_metadata.parquet")
    return path
