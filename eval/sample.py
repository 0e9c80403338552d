"""Draw cells from a checkpoint into an h5ad file.

    dcm-sample checkpoint/ --out generated.h5ad --num-cells 500 --cell-type k562 --perturbation KLF1
    dcm-sample checkpoint/ --out generated.h5ad --num-cells 500
    dcm-sample checkpoint/ --out generated.h5ad --like test.h5ad
    dcm-sample checkpoint/ --out submission.h5ad --like test.h5ad --vcc
    dcm-sample checkpoint/ --out counterfactual.h5ad --like control.h5ad --perturbation KLF1 --keep-state
    accelerate launch -m eval.sample checkpoint/ --out generated.h5ad --num-cells 1000000

Labels that are not given are drawn, too, in the proportions of the training cells. Cells are drawn and written in
chunks of `--batch-size`, so memory does not grow with their number. Processes share the chunks (all of them must see
the folder of `--out`) and the first one merges them into one file; the same command given again after an interruption
draws only what is missing. The checkpoint is a folder or a Hub id.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from training.data.checkpoint import condition_labels, load_checkpoint, unknown_label_explained
from training.data.command_line import run
from training.data.files import check_writable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEFAULT_NUM_CELLS = 500
Schedule = Literal["linear", "cosine", "cubic", "optimal"]
Dtype = Literal["float32", "bfloat16"]
Source = Literal["prior", "bank", "null"]


def main(
    checkpoint: Annotated[str, tyro.conf.Positional],
    *,
    out: Path,
    num_cells: int | None = None,
    cell_type: str | None = None,
    perturbation: str | None = None,
    covariates: dict[str, str] | None = None,
    no_labels: bool = False,
    like: Path | None = None,
    keep_state: bool = False,
    vcc: bool = False,
    layer: str | None = None,
    state: Source | None = None,
    steps: int | Literal["auto"] | None = None,
    schedule: Schedule = "cubic",
    guidance_scale: float = 0.0,
    guidance: dict[str, float] | None = None,
    temperature: float = 1.0,
    library_size: float | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    batch_size: int = 256,
) -> Path:
    """Draw cells from a checkpoint.

    Args:
        checkpoint: Folder of a checkpoint, or its id on the Hub.
        out: The h5ad file to write: integer counts in X, conditions in obs. Until it is whole, the cells drawn so far
            stand in the folder .NAME.parts beside it; the same command given again goes on from there.
        num_cells: How many cells; default 500. Not with --like, which draws as many as that file has.
        cell_type: Cell type of all cells; with --like, instead of what the file says. Labels that are not given are
            drawn in the proportions of the training cells that have the given ones.
        perturbation: Perturbation of all cells, combinations joined as in KLF1+TGFBR2; with --like, instead of what the
            file says (counterfactuals).
        covariates: Labels of covariates, as in --covariates donor=D1,day=3; with --like, instead of what the file says.
        no_labels: Tell the model nothing of the labels that are not given, instead of drawing them.
        like: An h5ad file: one cell is drawn for each of its cells, with that cell's conditions.
        keep_state: Give each cell the total count and, where the model has one, the state of its cell of --like, which
            needs all of the panel's genes: "this cell, had it been of that condition", or more cells like these.
        vcc: Write what the Virtual Cell Challenge of 2026 asks for beside the file of --like: its genes in its order,
            its labels as they stand there, control cells among them, at most a million counts in a cell.
        layer: Layer of --like with the counts that --keep-state reads; default X.
        state: Where a cell's state is drawn from: prior, fitted to the training cells of its condition; bank, these
            cells themselves, if the checkpoint keeps them; null, it is not given. Default: bank if there is one, else
            prior.
        steps: Network calls for each batch of cells, or auto: as few as the model's entropy curve allows. Default: one
            where a cell's state is drawn, else auto (20 without such a curve).
        schedule: How many genes each step reveals; optimal goes by the model's entropy curve.
        guidance_scale: Strengthens all conditions together; 0 draws from the model.
        guidance: Strengthens single conditions, as in --guidance perturbation=2,cell_type=0.5.
        temperature: Below 1 sharpens; 1 draws from the model.
        library_size: Total counts of each cell; default: drawn from the training cells of the same condition.
        dtype: Of the network's weights.
        seed: The same seed and batch size give the same cells, whatever the number of processes.
        batch_size: Cells drawn together; memory grows with it, and not with the number of cells.

    Raises:
        ValueError: options that contradict each other, the checkpoint, or an interrupted run; unknown labels.
        OSError: no such checkpoint or file, an output that cannot be written, or another process that failed.
    """
    of_like = "none with --keep-state, which keeps that of --like"
    for option, value, holds, expected in (
        ("--num-cells", num_cells, num_cells is None or num_cells >= 1, "at least 1"),
        ("--num-cells", num_cells, None in (num_cells, like), "none with --like, whose file says how many"),
        ("--guidance-scale", guidance_scale, not (guidance and guidance_scale), "0 with --guidance, which weighs each"),
        ("--library-size", library_size, library_size is None or library_size >= 0, "0 or more"),
        ("--library-size", library_size, library_size is None or not keep_state, of_like),
        ("--state", state, state is None or not keep_state, of_like),
        ("--seed", seed, seed >= 0, "0 or more"),
        ("--vcc", vcc, like is not None or not vcc, "--like beside it, whose genes and labels the cells get"),
        ("--vcc", vcc, perturbation is None or not vcc, "left out with --perturbation: the cells get those of --like"),
        ("--no-labels", no_labels, like is None or not no_labels, "left out with --like, which brings all labels"),
        ("--keep-state", keep_state, like is not None or not keep_state, "a file of cells beside it, --like"),
        ("--layer", layer, keep_state or layer is None, "--keep-state beside it, which alone reads counts"),
    ):
        if not holds:
            raise ValueError(f"{option} is {value}; expected {expected}")
    if like is not None and not like.is_file():
        raise FileNotFoundError(f"no file {str(like)!r} (--like); expected an h5ad file")
    check_writable(out)
    labels = {"cell_type": cell_type, "perturbation": perturbation, "covariates": covariates or None}
    conditions = _conditions(checkpoint, like, DEFAULT_NUM_CELLS if num_cells is None else num_cells, labels)
    model, tokenizer = load_checkpoint(checkpoint)
    if vcc:
        from eval.comparison.vcc2026 import refuse_missing_genes, rewrite_as_submission

        refuse_missing_genes(tokenizer.genes, like)
    asked = {name: label for name, label in labels.items() if label is not None}
    if like is not None:
        asked["like"] = like.name
    elif set(tokenizer.known_conditions()) - set(asked) - set(covariates or ()):
        asked["other_labels"] = "null" if no_labels else "drawn"
        if not no_labels:
            conditions = model.draw_labels(**conditions, seed=seed)
    from accelerate import PartialState

    from eval.drawing.draw import draw_cells
    from eval.drawing.read_cells import states_of

    if keep_state:
        state, library_size = states_of(like, model, tokenizer, layer)
    given = {"library_size": library_size, "state": state}
    options = {"steps": steps, "schedule": schedule, "guidance_scale": guidance or guidance_scale}
    options |= {"temperature": temperature, "seed": seed, "batch_size": batch_size}
    asked = {"checkpoint": Path(checkpoint).name, **asked}
    draw_cells(model, tokenizer, conditions, given, options, out, asked=asked, source=like, dtype=dtype)
    if vcc and PartialState().is_main_process:
        rewrite_as_submission(out, like)
    return out


def _conditions(
    checkpoint: str, like: Path | None, num_cells: int, labels: dict[str, object]
) -> dict[str, torch.Tensor | int]:
    """Conditions of all cells as ids; an unknown label is an error before the network's packages are imported."""
    known = condition_labels(checkpoint)
    with unknown_label_explained(checkpoint):
        if like is not None:
            from eval.drawing.read_cells import conditions_like

            return conditions_like(like, known, **labels)
        return known.conditions(num_cells=num_cells, **labels)


def cli() -> None:
    """Entry point of ``dcm-sample``."""
    run(main)
    from accelerate import PartialState

    PartialState().destroy_process_group()


if __name__ == "__main__":
    cli()
