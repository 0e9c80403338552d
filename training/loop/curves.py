"""Draw `training_curves.png` from `training.jsonl`: how losses, gradient, speed and scores went.

Knows nothing of the run beyond its log.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from training.data.files import written_aside

PANELS = {  # title: the lines of the log that it shows, with their legend
    "ELBO, nats per gene": {"elbo": "training", "validation_elbo": "validation"},
    "loss": {"loss": "training", "validation_loss": "validation"},
    "gradient norm": {"gradient_norm": None},
    "learning rate": {"learning_rate": None},
    "cells per second": {"cells_per_second": None},
    "FLOP utilisation": {"flop_utilisation": None},
    "generated: MMD\N{SUPERSCRIPT TWO}": {"score_mmd2": "generated", "score_mmd2_floor": "floor"},
    "generated: correlation slope": {"score_correlation_slope": "generated", "score_correlation_slope_floor": "floor"},
}


def draw_curves(out: Path) -> Path | None:
    """Draw the log of the run in ``out`` beside it; None when there is nothing to draw yet.

    Raises:
        OSError: the picture could not be written.
    """
    path = out / "training_curves.png"
    log = out / "training.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {name for line in lines for name in line}
    panels = [title for title, names in PANELS.items() if known & set(names)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    for title, axes in zip(panels, figure.subplots(rows, columns, squeeze=False).flat):
        for name, label in PANELS[title].items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                few = "." if len(points) < 30 else ""
                style = "--" if name.endswith("_floor") else "-"
                axes.plot(*zip(*points), linestyle=style, marker=few, linewidth=1.2, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    return path
