"""Make a checkpoint folder work without this package, and check that it does, as a stranger would.

    python -I training/standalone.py checkpoint/ '{"num_cells": 100}'

`dcm-push` runs this file in a process of its own, isolated from the working folder and `PYTHONPATH`: what is loaded is
what the folder holds.
"""

import json
import shutil
import sys
from pathlib import Path

FILES = ("handler.py", "pipeline_dcm.py")


def add_shipped_files(folder: Path) -> None:
    """Add pipeline, endpoint handler, and the pipeline's entry in ``config.json``; what is there stays as it is."""
    import modeling_dcm
    from modeling_dcm.pipeline_dcm import CUSTOM_PIPELINES

    for name in FILES:
        if not (folder / name).exists():
            shutil.copyfile(Path(modeling_dcm.__file__).with_name(name), folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if "custom_pipelines" not in config:
        path.write_text(json.dumps({**config, "custom_pipelines": CUSTOM_PIPELINES}, indent=2, sort_keys=True) + "\n")


def main(folder: str, request: dict[str, object]) -> str:
    """Draw the cells of ``request`` by ``pipeline`` from the folder's own code, and describe them in one line."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pipe = transformers.pipeline("cell-generation", model=folder, trust_remote_code=True, device="cpu")
    drawn = pipe(request, seed=0)
    counts = drawn["counts"]
    means = counts.mean(axis=0)
    highest = ", ".join(f"{drawn['genes'][i]} {means[i]:.3g}" for i in means.argsort()[::-1][:5])
    return (
        f"{counts.shape[0]:,} cells x {counts.shape[1]:,} genes of integer counts; {counts.sum(axis=1).mean():,.0f} "
        f"counts and {(counts > 0).sum(axis=1).mean():,.0f} expressed genes per cell; highest means: {highest}"
    )


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], json.loads(sys.argv[2])) + "\n")
