"""Train on the cells of an AnnData, in a program or a notebook: what dcm-convert and dcm-train do, in one call."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import anndata

    from modeling_dcm import DCMForDenoising
    from tokenization import DCMTokenizer


def fit(
    adata: anndata.AnnData,
    *,
    cell_type_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | None = None,
    covariate_keys: str = "",
    layer: str | None = None,
    n_top_genes: int | None = None,
    config: str = "laptop",
    max_minutes: float | None = 10.0,
    out: str | Path | None = None,
    **options: object,
) -> tuple[DCMForDenoising, DCMTokenizer, dict[str, float]]:
    """Train a model on all cells of ``adata`` but a tenth, by which it is validated; keep cells to evaluate on out.

    Args:
        adata: raw counts in ``X``, names of genes in ``var_names``.
        cell_type_key: column of ``obs``; likewise ``perturbation_key``, and ``covariate_keys`` with commas between.
        control: label of unperturbed cells.
        layer: layer with the counts; default ``X``.
        n_top_genes: keep so many variable genes; default all.
        config: a configuration of the package by name, or a YAML file.
        max_minutes: of training, after which it ends as if at ``max_steps``; None: no limit.
        out: folder to keep the checkpoint in; default none is kept.
        options: of :class:`training.config.TrainConfig`, such as ``max_steps=500``, over those of ``config``.

    Returns:
        The model, which knows labels by name (``model.generate(cell_type="B", num_cells=4)``), its tokenizer, and the
        last scores on validation cells: ``validation_loss``, ``validation_elbo`` in nats per gene, and of generated
        cells ``score_w2`` and others, each with its floor ``..._floor``.

    Raises:
        ValueError: values that are no counts, labels that are not there, or options that do not fit.
        KeyboardInterrupt: training was stopped.
    """
    import datasets
    import transformers

    from modeling_dcm import DCMForDenoising
    from tokenization import DCMTokenizer
    from training.config import TrainConfig, read_config
    from training.convert_h5ad import main as convert
    from training.data.formats import write_counts
    from training.loop.log import read_log
    from training.train import main as train

    keys = {"cell_type_key": cell_type_key, "perturbation_key": perturbation_key, "control": control}
    chosen = {"trackers": "none", **read_config(Path(config)), "max_time": max_minutes, **options}
    with tempfile.TemporaryDirectory(prefix="dcm-fit-") as home:
        folder = Path(home)
        settings = TrainConfig(data=folder / "shards", out=Path(out or folder / "checkpoint"), **chosen)
        write_counts(folder / "cells.h5ad", adata, layer)
        cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()  # the bar of training is enough
        try:
            choice = {"covariate_keys": covariate_keys, "n_top_genes": n_top_genes, "test_fraction": 0.0}
            convert(folder / "cells.h5ad", out=settings.data, **keys, **choice)
            train(settings)
        except SystemExit as stopped:  # what dcm-train does at Ctrl-C
            raise KeyboardInterrupt from stopped
        finally:
            datasets.config.HF_DATASETS_CACHE = cache
        model = DCMForDenoising.from_pretrained(settings.out)
        tokenizer = model.tokenizer = DCMTokenizer.from_pretrained(settings.out)
        datasets.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
        lines = read_log(settings.out)
    scores = {name: value for line in lines for name, value in line.items() if name.startswith(("validation", "score"))}
    logging.getLogger(__name__).info("validation loss %.4g", scores.get("validation_loss", float("nan")))
    return model, tokenizer, scores
