"""The tokenizer of Discrete Cell Models: cells of an AnnData to count ids and condition ids, and back.

A count c is the id c; MASK and PAD are the two ids after the largest count. PAD means that a gene was *not measured* in
a cell; a measured zero is the count 0. Knows nothing of the network and of how data files are stored. There are no
strings to tokenize: of transformers' slow-tokenizer machinery only saving, loading and special-token ids are used.

Shapes: n cells, G genes of the panel, P perturbations of a combination (padded with -1 on the right), C covariates.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from .conditions_dcm import ConditionLabels, as_tensor, check_names, repeated
from .count_errors_dcm import CountCheck, library_size
from .gene_names_dcm import find_genes
from .labels_dcm import factorize, read_text, shortened, split_perturbation

logger = logging.getLogger(__name__)

VOCABULARIES = ("cell_types", "perturbations", "control", "separator", "covariates")  # of conditions.json


class DCMTokenizer(ConditionLabels, PreTrainedTokenizer):
    """Cells to ids and ids to cells. Build one with :meth:`from_labels`, or load one with ``from_pretrained``.

    Args:
        genes_file: ``genes.txt`` of a saved tokenizer, one gene per line (passed by ``from_pretrained``).
        conditions_file: ``conditions.json`` of a saved tokenizer (passed by ``from_pretrained``).
        max_count: K, the largest count with an id.
        count_bins: None for one id per count; else ascending left edges of the last bins, the last of which ends at
            ``max_count``. Counts below the first edge keep an id each: ``[4, 8]`` with K = 15 has the ids 0, 1, 2, 3,
            4 (counts 4 to 7) and 5 (counts 8 to 15).
        genes: the panel, in order.
        cell_types: labels; the position is the id. None where the data have none.
        perturbations: single names, the control among them; the position is the id.
        control: the one of ``perturbations`` that is no perturbation, or None.
        covariates: labels of each covariate; the order of the names is the order of the columns of ``covariate_ids``.
        separator: joins single names to a combination (``KLF1+TGFBR2``). A name that contains it by chance is split
            too: choose another separator for such data, or None for data without combinations.

    Raises:
        ValueError: a vocabulary is empty, has duplicates or contradicts another; the message shows the value.
    """

    vocab_files_names = {"genes_file": "genes.txt", "conditions_file": "conditions.json"}  # noqa: RUF012
    model_input_names = ["input_ids"]  # noqa: RUF012
    _auto_class = "AutoTokenizer"  # `save_pretrained` writes this code beside the vocabularies

    def __init__(
        self,
        genes_file: str | None = None,
        conditions_file: str | None = None,
        *,
        max_count: int | None = None,
        count_bins: Sequence[int] | None = None,
        genes: Sequence[str] | None = None,
        cell_types: Sequence[str] | None = None,
        perturbations: Sequence[str] | None = None,
        control: str | None = None,
        covariates: Mapping[str, Sequence[str]] | None = None,
        separator: str | None = "+",
        **kwargs,
    ):
        if genes is None:
            genes, saved = _read_vocabularies(genes_file, conditions_file, kwargs.get("name_or_path", ""))
            cell_types, perturbations, control, separator, covariates = (saved[name] for name in VOCABULARIES)
        self.genes = [str(gene) for gene in genes]
        self.max_count = max_count
        self.count_bins = None if count_bins is None else [int(edge) for edge in count_bins]
        self._set_labels(cell_types, perturbations, control, covariates, separator)
        self._check_panel_and_counts()
        edges = np.arange(max_count + 1) if count_bins is None else np.r_[: count_bins[0], self.count_bins]
        self._left_edges = edges.astype(np.int64)  # (count ids,) smallest count of each id
        self._id_of_count = np.searchsorted(edges, np.arange(max_count + 1), side="right").astype(np.int64) - 1
        self._count_tokens = {str(edge): i for i, edge in enumerate(edges.tolist())}
        self._count_tokens |= {"[MASK]": len(edges), "[PAD]": len(edges) + 1}
        kwargs |= {"mask_token": "[MASK]", "pad_token": "[PAD]"}
        super().__init__(max_count=max_count, count_bins=self.count_bins, **kwargs)
        for where_it_was_loaded_from in ("is_local", "local_files_only"):
            self.init_kwargs.pop(where_it_was_loaded_from, None)

    @classmethod
    def from_labels(
        cls,
        *,
        genes: Sequence[str],
        max_count: int,
        cell_types: Sequence[str] | None = None,
        perturbations: Sequence[str] | None = None,
        control: str | None = None,
        covariates: Mapping[str, Sequence[str]] | None = None,
        count_bins: Sequence[int] | None = None,
        separator: str | None = "+",
    ) -> "DCMTokenizer":
        """Build a tokenizer from the labels that occur in data: in any order, repeated, combinations not yet split.

        Raises:
            ValueError: as the constructor; also a control that is none of the perturbations.
        """
        singles = set()
        for label in factorize([] if perturbations is None else perturbations)[0]:
            singles.update(split_perturbation(label, control=control, separator=separator))
        return cls(
            genes=genes,
            max_count=max_count,
            count_bins=count_bins,
            cell_types=factorize([] if cell_types is None else cell_types)[0],
            perturbations=sorted(singles),
            control=control,
            covariates={name: factorize(labels)[0] for name, labels in (covariates or {}).items()},
            separator=separator,
        )

    def _check_panel_and_counts(self) -> None:
        if not self.genes:
            raise ValueError("genes is empty; expected the names of the panel in order")
        check_names("genes", self.genes)
        if not isinstance(self.max_count, int) or self.max_count < 1:
            raise ValueError(f"max_count is {self.max_count!r}; expected an integer of at least 1")
        bins = self.count_bins
        if bins is not None and (not bins or bins != sorted(set(bins)) or bins[0] < 1 or bins[-1] > self.max_count):
            raise ValueError(f"count_bins is {bins}; expected ascending left edges from 1 to {self.max_count}")

    # --- what transformers asks of a slow tokenizer -----------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Ids in all: one per count or bin, MASK and PAD."""
        return len(self._count_tokens)

    @property
    def num_count_ids(self) -> int:
        """Ids that stand for counts, which is also MASK's id; K + 1 without ``count_bins``."""
        return len(self._left_edges)

    def get_vocab(self) -> dict[str, int]:
        """Token strings (the smallest count of each id, then MASK and PAD) to ids."""
        return dict(self._count_tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._count_tokens.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._count_tokens)[index]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write ``genes.txt`` and ``conditions.json``."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        conditions = {name: getattr(self, name) for name in VOCABULARIES}
        texts = ["\n".join(self.genes) + "\n", json.dumps(conditions, indent=1, ensure_ascii=False) + "\n"]
        paths = [Path(save_directory, prefix + name) for name in self.vocab_files_names.values()]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        return tuple(map(str, paths))

    # --- cells to ids -----------------------------------------------------------------------------------------------

    def __call__(
        self, cells: object, genes: Sequence[str] | None = None, layer: str | None = None, *, clip: bool = True
    ) -> BatchEncoding:
        """Ids of measured cells.

        Args:
            cells: an AnnData, a DataFrame, a scipy sparse matrix or an array of counts (n, number of genes); or a row
                of a DataFrame, one cell.
            genes: names of the columns; for an AnnData default its ``var_names``, for a DataFrame its ``columns``,
                else the panel itself. Versions of Ensembl ids need not be the panel's.
            layer: of an AnnData, the layer with the counts, or ``"raw"`` for ``raw.X`` (default ``X``).
            clip: give counts above ``max_count`` the id of ``max_count``, with one warning; False raises.

        Returns:
            ``input_ids`` (n, G), PAD where the panel's gene is not among ``genes``; ``library_size`` (n,), the total
            of the measured panel genes before clipping; and for an AnnData, for each condition that this tokenizer
            knows and that stands in ``obs`` under its canonical name (``cell_type``, ``perturbation``, the
            covariate's name), ``cell_type_ids`` (n,), ``perturbation_ids`` (n, P), ``covariate_ids`` (n, C); a
            missing label is -1, *not given*. All int64 tensors.

        Raises:
            ValueError: values that are not counts, duplicate gene names, an Ensembl id in several versions, no gene of
                the panel, unknown labels.
        """
        is_anndata = hasattr(cells, "obs") and hasattr(cells, "var_names")
        layers = list(cells.layers) if is_anndata else []
        if hasattr(cells, "to_frame") and not hasattr(cells, "columns"):  # a Series, whose index names the genes
            cells = cells.to_frame().T
        named = cells
        if layer == "raw" and layer not in layers and getattr(cells, "raw", None) is not None:
            layer, named = None, cells.raw
        if layer is not None and layer not in layers:
            raise ValueError(f"no layer {layer!r}; layers here: {', '.join(layers) or 'none'}")
        matrix = cells if not is_anndata else named.X if layer is None else cells.layers[layer]
        if matrix is None:
            raise ValueError(f"the cells have no X; pass layer= with one of: {', '.join(layers) or 'none here'}")
        if genes is None:
            genes = named.var_names if is_anndata else getattr(cells, "columns", self.genes)
        counts, measured = self._panel_counts(matrix, [str(name) for name in genes], layers)
        input_ids = self.count_ids(counts, clip=clip)
        if len(measured) < len(self.genes):
            measured_ids = input_ids
            input_ids = np.full((len(counts), len(self.genes)), self.pad_token_id, dtype=np.int64)
            input_ids[:, measured] = measured_ids
        data = {"input_ids": as_tensor(input_ids), "library_size": as_tensor(library_size(counts))}
        there = {name: cells.obs[name] for name in self.known_conditions() if name in cells.obs} if is_anndata else {}
        return BatchEncoding(data | self.condition_ids(there))

    def _panel_counts(self, matrix: object, names: list[str], layers: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Counts (n, measured) int64 of the panel's genes among ``names``, and their positions in the panel."""
        if hasattr(matrix, "to_memory"):
            matrix = matrix.to_memory()
        matrix = matrix.tocsr() if hasattr(matrix, "tocsr") else np.atleast_2d(np.asarray(matrix))
        if matrix.shape[1] != len(names):
            raise ValueError(f"{matrix.shape[1]:,} columns of counts but {len(names):,} gene names; expected as many")
        if len(set(names)) != len(names):
            names = repeated(names)
            raise ValueError(f"{len(names):,} gene names stand more than once ({shortened(names)}); sum or drop some")
        check = CountCheck()
        check.add(matrix.data if hasattr(matrix, "indptr") else matrix)
        check.raise_if_bad("the cells", layers=layers)
        column, doubtful = find_genes(self.genes, names)
        if doubtful:
            first = next(iter(doubtful.values()))
            raise ValueError(
                f"{len(doubtful):,} Ensembl ids of the panel or the cells stand in several versions "
                f"({', '.join(first)}); keep one of each"
            )
        measured = np.flatnonzero(column >= 0)
        if not len(measured):
            raise ValueError(
                f"none of the {len(names):,} genes ({', '.join(names[:3])}, ...) is in the panel "
                f"({', '.join(self.genes[:3])}, ...); expected the panel's kind of names: pass genes="
            )
        if len(measured) < len(names):
            logger.warning("%d genes are not in the panel and were dropped", len(names) - len(measured))
        columns = column[measured]
        if not np.array_equal(columns, np.arange(len(names))):
            matrix = matrix[:, columns]
        counts = matrix.astype(np.int64)
        return counts.toarray() if hasattr(counts, "toarray") else counts, measured

    def count_ids(self, counts: np.ndarray, *, clip: bool = True) -> np.ndarray:
        """Ids of counts, of any shape, int64. The id of a count 0 is 0.

        Args:
            counts: integers, none negative.
            clip: give counts above ``max_count`` the id of ``max_count``, with one warning; False raises.

        Raises:
            ValueError: with ``clip=False``, a count is above ``max_count``.
        """
        largest = int(np.max(counts, initial=0))
        if largest > self.max_count:
            over = int((counts > self.max_count).sum())
            message = f"{over:,} counts are above max_count={self.max_count:,} (largest {largest:,})"
            if not clip:
                raise ValueError(f"{message}; clip them (clip=True) or build the vocabulary with a larger max_count")
            logger.warning("%s and were clipped", message)
            counts = np.minimum(counts, self.max_count)
        return counts.astype(np.int64) if self.count_bins is None else self._id_of_count[counts]

    @property
    def target_gene_ids(self) -> np.ndarray:
        """Position in the panel of the gene with each perturbation's name, -1 if none; (perturbations,) int64.

        Versions of Ensembl ids need not be the panel's; an id in several versions has no target.
        """
        return find_genes(self.perturbations, self.genes)[0]

    # --- ids to cells -----------------------------------------------------------------------------------------------

    def counts(self, ids: np.ndarray, seed: int = 0) -> np.ndarray:
        """Counts of count ids, of any shape; a bin's id becomes a count drawn uniformly inside the bin."""
        if self.count_bins is None:
            return self._left_edges[ids]
        widths = np.diff(self._left_edges, append=self.max_count + 1)[ids]
        return self._left_edges[ids] + np.random.default_rng(seed).integers(widths)

    def decode(
        self, ids: object, conditions: Mapping[str, object] | None = None, *, seed: int = 0, **names: object
    ) -> object:
        """Cells as AnnData: counts in ``X`` (CSR int32), genes in ``var_names``, labels of the conditions in ``obs``.

        Args:
            ids: (n, G) count ids, as ``model.generate`` returns them.
            conditions: ids as :meth:`conditions` or calling the tokenizer returns them; other entries are ignored. A
                condition that no cell was given leaves no column.
            seed: cells are named ``dcm-SEED-0``, ...; with ``count_bins``, a bin's id becomes a count drawn uniformly
                inside the bin with this seed.
            names: ``cell_type="B"`` and so on instead of ``conditions``, as :meth:`conditions` takes them.

        Raises:
            ImportError: anndata is not installed.
            ValueError: MASK, PAD or other ids that are no counts, a wrong number of genes, or conditions of another
                number of cells.
        """
        try:
            import anndata
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise ImportError("decoding to AnnData needs anndata: pip install anndata") from error
        ids = np.atleast_2d(np.asarray(ids))
        if ids.shape[1] != len(self.genes):
            raise ValueError(f"ids have {ids.shape[1]:,} columns; expected the panel's {len(self.genes):,} genes")
        for name, special in (("MASK", self.mask_token_id), ("PAD", self.pad_token_id)):
            count = int((ids == special).sum())
            if count:
                raise ValueError(f"{count:,} ids are {name} ({special}); only counts can be decoded")
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_count_ids):
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}; expected 0 to {self.num_count_ids - 1}")
        counts = self.counts(ids, seed)
        conditions = self.conditions(**names, num_cells=len(ids)) if names else conditions or {}
        labels, uns = self.condition_labels(conditions, len(ids))
        adata = anndata.AnnData(csr_matrix(counts.astype(np.int32)), uns=uns)
        adata.obs_names = [f"dcm-{seed}-{i}" for i in range(len(ids))]
        adata.var_names = self.genes
        for name, column in labels.items():
            adata.obs[name] = column
            adata.obs[name] = adata.obs[name].astype("category")
        return adata


def _read_vocabularies(genes_file: str | None, conditions_file: str | None, folder: str) -> tuple[list[str], dict]:
    """Genes and conditions as ``save_vocabulary`` wrote them."""
    for path, name in ((genes_file, "genes.txt"), (conditions_file, "conditions.json")):
        if path is None or not Path(path).is_file():
            raise ValueError(f"no {name} in {folder!r}; expected a folder that DCMTokenizer.save_pretrained wrote")
    return read_text(genes_file).removesuffix("\n").split("\n"), json.loads(read_text(conditions_file))
