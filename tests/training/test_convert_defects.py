"""Every defect that real files have: what dcm-convert says, as the table of training/README.md prints it.

Each file is made for its defect. A refused file leaves nothing behind; what is accepted says so. Write the table anew
with ``python -m tests.training.test_convert_defects``.
"""

import gzip
import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from training.convert_h5ad import main

README = Path(__file__).parents[2] / "training" / "README.md"
HEADING = "| defect | what `dcm-convert` says |\n|---|---|\n"
N, GENES = 60, 30


@dataclass(frozen=True)
class Defect:
    """A defect, how to make files of it, and options to convert them with; ``refused`` unless it is only reported."""

    name: str
    make: Callable[[Path], Path | tuple[Path, ...]]
    refused: bool = True
    options: tuple[tuple[str, object], ...] = ()
    says: str = ""  # for what is only reported: a part of the line that says it


def made_up(seed: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(2.0, 2.0, size=(N, GENES))) + 1
    return anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"line": rng.choice(["k562", "rpe1"], N)}, index=[f"cell{i}" for i in range(N)]),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(GENES)]),
    )


def changed(change: Callable[[anndata.AnnData], anndata.AnnData | None], name: str = "cells.h5ad"):
    """Makes a file of cells after ``change``, which works in place or returns other cells."""

    def make(folder: Path) -> Path:
        cells = made_up()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            other = change(cells) if change is not None else None
            (cells if other is None else other).write_h5ad(folder / name)
        return folder / name

    return make


TWO = np.s_[[0, -1], [3, -1]]  # counts


def counts(place: object, to: float) -> Callable[[Path], Path]:
    """Makes a file some of whose counts are another number."""

    def change(cells: anndata.AnnData) -> None:
        values = cells.X.toarray()
        values[place] = to
        cells.X = scipy.sparse.csr_matrix(values)

    return changed(change)


def labels(*new: str | None) -> Callable[[Path], Path]:
    """Makes a file whose first cells have other labels."""

    def change(cells: anndata.AnnData) -> None:
        cells.obs["line"] = pd.Categorical([*new, *cells.obs["line"][len(new) :]])

    return changed(change)


def log_normalised(cells: anndata.AnnData) -> None:
    cells.X.data = np.log1p(cells.X.data)


def log_normalised_with_counts(cells: anndata.AnnData) -> None:
    cells.layers["counts"] = cells.X.copy()
    log_normalised(cells)


def log_normalised_with_raw(cells: anndata.AnnData) -> None:
    cells.raw = cells.copy()
    log_normalised(cells)


def scaled(cells: anndata.AnnData) -> None:
    dense = cells.X.toarray()
    cells.X = (dense - dense.mean(axis=0)) / dense.std(axis=0)


def names(axis: str, *new: str) -> Callable[[anndata.AnnData], None]:
    def change(cells: anndata.AnnData) -> None:
        setattr(cells, f"{axis}_names", [*new, *getattr(cells, f"{axis}_names")[len(new) :]])

    return change


def copied_cell(cells: anndata.AnnData) -> None:
    counts = cells.X.toarray()
    counts[7] = counts[3]
    cells.X = scipy.sparse.csr_matrix(counts)


def versioned(cells: anndata.AnnData) -> None:
    cells.var_names = [f"ENSG{i:011d}.{i % 5}" for i in range(GENES)]


def two_kinds(folder: Path) -> tuple[Path, ...]:
    ensembl = changed(names("var", *(f"ENSG{i:011d}" for i in range(GENES))), "a.h5ad")(folder)
    return ensembl, changed(None, "b.h5ad")(folder)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_bytes(path: Path) -> None:
    made_up().write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xa5" * chunk.size
    path.write_bytes(data)


def wrong_indices(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = 10_000


def text_for_counts(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.full((N, GENES), "4", dtype=h5py.string_dtype())


def folder_of_h5ad(folder: Path) -> Path:
    (folder / "sample").mkdir()
    return changed(None)(folder / "sample").parent


def loom(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.ones((GENES, N))


def mtx(entries: str, features: str = "ENSG1\tA\nENSG2\tB\n") -> Callable[[Path], Path]:
    """Makes a 10x folder."""

    def make(folder: Path) -> Path:
        path = folder / "sample"
        path.mkdir()
        text = f"%%MatrixMarket matrix coordinate integer general\n{entries}"
        (path / "matrix.mtx.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        (path / "features.tsv.gz").write_bytes(gzip.compress(features.encode(), mtime=0))
        (path / "barcodes.tsv.gz").write_bytes(gzip.compress(b"AAAC-1\nAAAG-1\nAAAT-1\n", mtime=0))
        return path

    return make


mtx_cut_short = mtx("2 3 4\n1 1 5\n2 3 1\n")


def rewritten(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """Makes a sound file of cells, and changes it on disk."""

    def make(folder: Path) -> Path:
        path = changed(None)(folder)
        change(path)
        return path

    return make


def without_encoding(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in list(file["obs"].attrs):
            del file["obs"].attrs[name]


def column_twice(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["column-order"] = ["line", "line"]


def unknown_filter(path: Path) -> None:
    """A dataset whose chunks need a filter that nobody has."""
    with h5py.File(path, "r+") as file:
        del file["X/data"]
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk((100,))
        created.set_filter(300, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((len(file["X/indices"]),))
        dataset = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, created)
        dataset.write_direct_chunk((0,), b"no plain chunk")


def unfinished(path: Path) -> None:
    """As a file that its writer has not closed."""
    with h5py.File(path, "w", libver="latest") as file:
        file.create_group("obs")
        file.flush()
        written = path.read_bytes()
    path.write_bytes(written)


def in_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def as_zarr(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / ".zgroup").write_text("{}")


def of_10x(path: Path) -> None:
    """10x output without the features' types."""
    with h5py.File(path, "w") as file:
        for name in ("id", "name"):
            file[f"matrix/features/{name}"] = ["A", "B"]


def of_cell_ranger_2(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["hg19/gene_names"] = ["A", "B"]


def of_two_panels(cells: anndata.AnnData) -> None:
    cells.obs["panel"] = ["all", "few"] * (N // 2)
    cells.uns["dcm_panels"] = {"all": [True] * GENES, "few": [True] * 10 + [False] * (GENES - 10)}


KEY = (("cell_type_key", "line"),)
PERTURBED = (("perturbation_key", "line"),)
DEFECTS = [
    Defect("NaN or infinite values", counts(TWO, np.nan)),
    Defect("negative values", counts(TWO, -3)),
    Defect("values that are not integers", counts(TWO, 1000.5)),
    Defect("log-normalised values", changed(log_normalised)),
    Defect("log-normalised values, counts in a layer", changed(log_normalised_with_counts)),
    Defect("log-normalised values, counts in `raw`", changed(log_normalised_with_raw)),
    Defect("scaled values", changed(scaled)),
    Defect("values too large for a count", counts(TWO, 2.0**40)),
    Defect("text in the place of counts", rewritten(text_for_counts)),
    Defect("a gene name twice", changed(names("var", "TP53", "TP53"))),
    Defect("a gene without a name", changed(names("var", ""))),
    Defect("Ensembl ids in one file, symbols in another", two_kinds),
    Defect("Ensembl ids with version", changed(versioned), refused=False, says="without their version"),
    Defect("a cell name twice", changed(names("obs", "AAAC-1", "AAAC-1"))),
    Defect("a cell twice under two names", changed(copied_cell), refused=False, says="exactly the counts"),
    Defect("the same file twice", lambda folder: (changed(None)(folder),) * 2),
    Defect("cells without a label", labels(None, None), options=KEY),
    Defect("a missing label as text", labels("nan"), refused=False, options=KEY, says="is that a missing"),
    Defect("a label with white space around it", labels("k562 "), options=KEY),
    Defect("a name that ends with the separator", labels("control", "CD8+"), options=PERTURBED),
    Defect("names with the separator", labels("control", "(+)-JQ1"), False, PERTURBED, "never stands alone"),
    Defect("no such column of labels", changed(None), options=(("cell_type_key", "cell_line"),)),
    Defect("cells without a count", counts(np.s_[:2], 0), refused=False, says="no count at all"),
    Defect("genes that are all zero", counts(np.s_[:, :2], 0), refused=False, says="all zero in training"),
    Defect("no counts at all", counts(np.s_[:], 0)),
    Defect("no cells", changed(lambda cells: cells[:0].copy())),
    Defect("a file cut short", rewritten(cut_short)),
    Defect("damaged bytes", rewritten(flipped_bytes)),
    Defect("indices beyond the last gene", rewritten(wrong_indices)),
    Defect("an empty file", rewritten(lambda path: path.write_bytes(b""))),
    Defect("no HDF5 file", rewritten(lambda path: path.write_text("<html>404 Not Found</html>"))),
    Defect("another kind of HDF5 file", rewritten(loom)),
    Defect("h5ad of an old anndata", rewritten(without_encoding)),
    Defect("a column of `obs` twice", rewritten(column_twice)),
    Defect("compressed by another filter", rewritten(unknown_filter)),
    Defect("open for writing elsewhere", rewritten(unfinished)),
    Defect("h5ad in gzip", rewritten(in_gzip)),
    Defect("a zarr store", rewritten(as_zarr)),
    Defect("10x `.h5` without types of features", rewritten(of_10x)),
    Defect("10x `.h5` of Cell Ranger 2", rewritten(of_cell_ranger_2)),
    Defect("h5ad of an earlier conversion, several panels", changed(of_two_panels)),
    Defect("a 10x matrix cut short", mtx_cut_short),
    Defect("a 10x matrix that ends with its header", mtx("%cut\n")),
    Defect("a 10x matrix without its folder", lambda folder: mtx_cut_short(folder) / "matrix.mtx.gz"),
    Defect("a 10x matrix without entries", mtx("2 3 0\n")),
    Defect("10x features that are no genes", mtx("2 3 1\n1 1 5\n", "ENSG1\tA\tchr1\nENSG2\tB\tchr2\n")),
    Defect("a folder of h5ad files", folder_of_h5ad),
    Defect("no such file", lambda folder: folder / "cells.h5ad"),
]


def what_is_said(defect: Defect, folder: Path) -> str:
    """The error, or the line of the log, that converting the defect's files gives, without the folder's name."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("training").addHandler(handler)
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        source = defect.make(folder)
        main(source, out=folder / "shards", **dict(defect.options))
        text = next(line for line in lines if defect.says in line) if not defect.refused else "accepted"
    except (ValueError, OSError) as error:
        text = f"error: {error}"
    finally:
        logging.getLogger("training").removeHandler(handler)
    return re.sub(r"cannot be read \(.*\);", "cannot be read (...);", " ".join(text.replace(f"{folder}/", "").split()))


def row(defect: Defect, text: str) -> str:
    return f"| {defect.name} | `{text}` |\n"


def rows_of_readme() -> list[str]:
    table = README.read_text(encoding="utf-8").split(HEADING)[1]
    return [line + "\n" for line in table.split("\n\n")[0].strip().splitlines()]


@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.name for defect in DEFECTS])
def test_the_readme_says_what_is_said_and_refused_files_leave_nothing(defect, tmp_path):
    text = what_is_said(defect, tmp_path)
    assert text.startswith("error: ") == defect.refused
    assert row(defect, text) in rows_of_readme()
    left = {path.name for path in tmp_path.iterdir()} - {"cells.h5ad", "a.h5ad", "b.h5ad", "sample"}
    assert left == (set() if defect.refused else {"shards"})


def test_the_readme_lists_no_other_defects():
    assert [line.split(" | ")[0] for line in rows_of_readme()] == [f"| {defect.name}" for defect in DEFECTS]


def _write_table() -> None:
    rows = []
    for defect in DEFECTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(defect, what_is_said(defect, Path(folder))))
    before, after = README.read_text(encoding="utf-8").split(HEADING)
    rest = after.split("\n\n", 1)[1:]
    README.write_text("\n".join([before + HEADING + "".join(rows), *rest]), encoding="utf-8")


if __name__ == "__main__":
    _write_table()
