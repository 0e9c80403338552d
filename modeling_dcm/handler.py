"""Inference Endpoints: a checkpoint's pipeline for strangers, JSON in and out, every request bounded.

    {"inputs": {"cell_type": "k562", "perturbation": "KLF1+TGFBR2", "num_cells": 100}, "parameters": {"seed": 0}}

``inputs`` is a request of the pipeline (`pipeline_dcm.py` has its fields), or a list of them; ``parameters`` are
sampling options. The answer is ``{"genes": [...], "results": [...]}``, one result per request: cells x genes counts as
a CSR matrix (``shape``, ``indptr``, ``indices``, ``counts``) and the ``conditions`` asked for.
Whatever serves it turns the ``ValueError`` of a bad request, whose message is meant for the stranger, into status 400.
"""

import logging
import math
import threading

import numpy as np
from transformers import pipeline

logger = logging.getLogger(__name__)

MAX_REQUESTS = 64  # of one call
MAX_CELLS = 2_000  # of one call
MAX_COUNTS = 5_000_000  # cells x genes of one call
MAX_STEPS = 200  # network calls for each chunk of cells
BATCH_CELLS = 256  # cells drawn together: bounds memory; a smaller ``batch_size`` may be asked for
MAX_TEXT = 200  # characters of a label, gene or field
MAX_DEPTH = 5  # of nested lists and dictionaries
MAX_NUMBER = 2**53  # what every JSON reader holds exactly
MAX_SCALE = 100  # of guidance and temperature


class EndpointHandler:
    """What Inference Endpoints make once, and call for each request; calls may come from several threads at once.

    Args:
        path: the checkpoint folder.
    """

    def __init__(self, path: str = ""):
        self.pipeline = pipeline("cell-generation", model=str(path), trust_remote_code=True)
        self.num_genes = len(self.pipeline.tokenizer.genes)
        self.one_at_a_time = threading.Lock()  # bounds memory whatever the number of threads

    def __call__(self, data: dict[str, object]) -> dict[str, object]:
        """Answer one call.

        Raises:
            ValueError: the request is bad, or larger than allowed; the message says why and may be shown to anyone.
            RuntimeError: anything else. The message says nothing; the cause is in the server's log.
        """
        try:
            requests, options = self._checked(data)
            with self.one_at_a_time:
                drawn = self.pipeline(requests, **options)
        except ValueError as error:
            raise ValueError(str(error)) from None
        except Exception:
            logger.exception("a request failed")
            raise RuntimeError("the request could not be answered") from None
        return {"genes": list(self.pipeline.tokenizer.genes), "results": [_sparse(result) for result in drawn]}

    def _checked(self, data: object) -> tuple[list[dict], dict[str, object]]:
        """Requests and options within all limits; the pipeline checks what they mean."""
        if not isinstance(data, dict) or "inputs" not in data or set(data) - {"inputs", "parameters"}:
            raise ValueError('expected {"inputs": {...} or [{...}, ...], "parameters": {...}}')
        check_size(data, limit=MAX_COUNTS)
        requests = data["inputs"] if isinstance(data["inputs"], list) else [data["inputs"]]
        options = data.get("parameters") or {}
        if not requests or not all(isinstance(request, dict) for request in requests):
            raise ValueError("inputs must be a request or a list of requests, each an object")
        if not isinstance(options, dict):
            raise ValueError("parameters must be an object")
        _at_most("requests", len(requests), MAX_REQUESTS)
        num_cells = sum(_asked_cells(request) for request in requests)
        _at_most("cells", num_cells, min(MAX_CELLS, max(1, MAX_COUNTS // self.num_genes)))
        for name, most in (("steps", MAX_STEPS), ("batch_size", BATCH_CELLS), ("temperature", MAX_SCALE)):
            if isinstance(options.get(name), int | float):
                _at_most(name, options[name], most)
        scales = options.get("guidance_scale")
        for scale in scales.values() if isinstance(scales, dict) else [scales]:
            if isinstance(scale, int | float):
                _at_most("guidance_scale", abs(scale), MAX_SCALE)
        return requests, {"batch_size": BATCH_CELLS, **options}


def check_size(data: object, limit: int) -> None:
    """Raise ValueError where JSON values are deeper, longer, more or larger than any honest request.

    Goes down level by level and never calls itself, so that nesting cannot exhaust the stack.
    """
    level, seen = [data], 0
    for _ in range(MAX_DEPTH):
        seen += len(level)
        _at_most("values", seen, limit)
        below = []
        for value in level:
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise ValueError(f"a text has {len(value):,} characters; expected at most {MAX_TEXT}")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and (not abs(value) <= MAX_NUMBER or not math.isfinite(value)):
                raise ValueError(f"a number is too large or not finite; expected at most {MAX_NUMBER:,}")
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
        if not level:
            return
    raise ValueError(f"values are nested too deeply; expected at most {MAX_DEPTH - 1} levels")


def _asked_cells(request: dict) -> int:
    """How many cells a request asks for, at least; what contradicts it is the pipeline's to refuse."""
    asked = [1]
    if isinstance(request.get("num_cells"), int):
        asked.append(request["num_cells"])
    covariates = request.get("covariates")
    labels = list(covariates.values()) if isinstance(covariates, dict) else []
    for value in (request.get("cell_type"), request.get("perturbation"), request.get("observed"), *labels):
        if isinstance(value, list):
            asked.append(len(value))
    return max(asked)


def _at_most(what: str, value: float, most: float) -> None:
    if value > most:
        raise ValueError(f"{what}: {value:,} asked for; this endpoint allows at most {most:,} in a call")


def _sparse(result: dict) -> dict[str, object]:
    """A result of the pipeline as JSON: counts in CSR form."""
    counts = result["counts"]
    rows, columns = np.nonzero(counts)
    indptr = np.searchsorted(rows, np.arange(len(counts) + 1))
    return {
        "shape": list(counts.shape),
        "indptr": indptr.tolist(),
        "indices": columns.tolist(),
        "counts": counts[rows, columns].tolist(),
        "conditions": result["conditions"],
    }
