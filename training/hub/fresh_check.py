"""Load a checkpoint folder as a stranger would, and say in one line what its pipeline answers to a request.

    python -I training/fresh_check.py checkpoint/ '{"num_cells": 100}'

Run in a process of its own by `push_to_hub.py`, isolated from the working folder and `PYTHONPATH`. Needs transformers,
torch and numpy alone; knows nothing of this package, so that what it loads is what the folder holds.
"""

import json
import sys

import transformers


def main(folder: str, request: dict[str, object]) -> str:
    """Draw the cells of ``request`` by ``pipeline`` from the folder's own code, and describe them."""
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
