"""Load a checkpoint as a stranger's process does, and say as JSON how long everything took until there were cells.

    python eval/fresh_load.py checkpoint/ 20

Run by `load_benchmark.py`, in a process of its own: nothing heavy is imported before the clock runs. Knows nothing of
this package; the second argument is the number of sampling steps.
"""

import json
import sys
import time


def main(folder: str, steps: int) -> dict[str, list[float]]:
    """Seconds of the clock and of the processor of each stage."""
    seconds: dict[str, list[float]] = {}
    last = [0.0, 0.0]

    def stage(name: str | None) -> None:
        now = [time.perf_counter(), time.process_time()]
        if name is not None:
            seconds[name] = [new - old for new, old in zip(now, last)]
        last[:] = now

    stage(None)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from transformers import AutoModel, AutoTokenizer

    stage("import")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    stage("load")
    model.generate(**tokenizer.conditions(num_cells=1), steps=steps)
    stage("first cell")
    model.generate(**tokenizer.conditions(num_cells=1), steps=steps, seed=1)
    stage("next cell")
    return seconds


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]))) + "\n")
