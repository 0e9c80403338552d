"""``pipeline("cell-generation")``: requests with names of labels and genes in, counts with gene names out.

Joins a checkpoint's tokenizer and model, so that a user writes a dictionary and no tensors; limits for strangers are
`handler.py`'s. Letters: R requests, n cells of a request, N cells of all, G genes of the panel.
"""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from transformers import Pipeline

TASK = "cell-generation"
# what `config.json` says of it; an Auto class of transformers loads the model
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_dcm.CellGenerationPipeline", "pt": ["AutoModel"]}}

FIELDS = ("cell_type", "perturbation", "covariates", "num_cells", "library_size", "observed")
LARGEST_NUMBER = 10**9  # of options that are not counted: more is a mistake
OPTIONS = ("steps", "schedule", "guidance_scale", "temperature", "seed", "batch_size")


class CellGenerationPipeline(Pipeline):
    """Draw cells, or complete partly observed ones.

    A request is a dictionary with any of:

    - ``cell_type``, ``perturbation``: a label for all cells, or one per cell; combinations as in ``KLF1+TGFBR2``. Where
      nothing is observed, labels that are not given are drawn in the proportions of the training cells.
    - ``covariates``: name to label, or labels.
    - ``num_cells``: how many; default as many as labels or observed cells are given, or 1.
    - ``library_size``: total counts of each cell, or ``"null"``; default as in ``model.generate``.
    - ``observed``: known counts, gene name to count, of one cell (completed ``num_cells`` times); or a list of such,
      one per cell. They come back unchanged, the other genes are filled in.

    Options ``steps``, ``schedule``, ``guidance_scale``, ``temperature``, ``seed`` and ``batch_size`` (cells drawn
    together) are those of ``model.generate``, for all requests of a call, or of all calls when given to ``pipeline``.

    Returns:
        For each request a dictionary: ``counts`` (n, G) int64, ``genes`` (G names), ``conditions`` (the labels asked
        for), and where anndata is installed ``adata``. A list of requests gives a list, and is drawn in one run: its
        cells depend on the whole list, and equal requests in it get different cells.

    Raises:
        ValueError: a request or an option that cannot be met; unknown labels and genes are answered with near matches.
    """

    _load_tokenizer = True

    def __call__(self, inputs: Mapping | Sequence[Mapping], **options) -> dict | list[dict]:
        options = self._check_options(options)
        if "batch_size" not in options and self._batch_size is not None:
            options["batch_size"] = self._batch_size
        options = {**self._forward_params, **options}
        is_one = isinstance(inputs, Mapping)
        if not is_one and (not isinstance(inputs, Sequence) or isinstance(inputs, str) or not inputs):
            raise ValueError(f"{_shown(inputs)} is no request; expected a dictionary with any of {', '.join(FIELDS)}")
        results = self.run_single([inputs] if is_one else list(inputs), {}, options, {"seed": options.get("seed", 0)})
        return results[0] if is_one else results

    def _sanitize_parameters(self, **options) -> tuple[dict, dict, dict]:
        return {}, self._check_options(options), {}

    @staticmethod
    def _check_options(options: dict) -> dict:
        for name in options:
            if name not in OPTIONS:
                raise ValueError(f"unknown option {_shown(name)}; {_near(name, OPTIONS)}")
        for name in ("seed", "batch_size"):
            if name in options:
                _check_whole(name, options[name], 0 if name == "seed" else 1)
        scales = options.get("guidance_scale", 0)
        for scale in scales.values() if isinstance(scales, Mapping) else [scales]:
            _check_number("guidance_scale", scale)
        _check_number("temperature", options.get("temperature", 1))
        if "steps" in options and options["steps"] != "auto":
            _check_whole("steps", options["steps"], 1)
        if "schedule" in options and not isinstance(options["schedule"], str):
            raise ValueError(f"schedule={_shown(options['schedule'])}, expected a name")
        return options

    def preprocess(self, requests: list[Mapping]) -> dict[str, object]:
        """Arguments of ``model.generate`` for all requests together, each request's size, and what was observed."""
        for request in requests:
            _check_request(request)
        for field in ("observed", "library_size"):
            values = [request.get(field) for request in requests]
            kinds = {value if value is None else isinstance(value, str) for value in values}
            if len(kinds) > 1:
                raise ValueError(f"some requests of the list have {field!r} and others have not: ask for them apart")
        observed = [self._observed(request) for request in requests]
        conditions = [self._conditions(request, known) for request, known in zip(requests, observed)]
        sizes = [each.pop("num_cells") for each in conditions]
        library_size = requests[0].get("library_size")
        if library_size not in (None, "null"):
            wanted = torch.tensor([request["library_size"] for request in requests], dtype=torch.float32)
            library_size = wanted.repeat_interleave(torch.tensor(sizes))
        known = [np.broadcast_to(each, (n, each.shape[1])) for each, n in zip(observed, sizes) if each is not None]
        return {
            "arguments": _joined(conditions),
            "sizes": sizes,
            "library_size": library_size,
            "observed": np.concatenate(known) if known else None,
            "requests": requests,
        }

    def _forward(self, inputs: dict[str, object], **options) -> dict[str, object]:
        """Draw the cells of all requests: count ids (N, G)."""
        observed = inputs["observed"]
        ids = None
        if observed is not None:
            ids = torch.from_numpy(self.tokenizer.count_ids(np.maximum(observed, 0)))
            ids = ids.masked_fill(torch.from_numpy(observed < 0), -1)
        known = {"num_cells": sum(inputs["sizes"]), **inputs["arguments"]}
        if observed is None:
            known = self.model.draw_labels(**known, seed=options.get("seed", 0))
        cells = self.model.generate(**known, library_size=inputs["library_size"], observed=ids, **options)
        return {**inputs, "arguments": known, "cells": cells}

    def postprocess(self, drawn: dict[str, object], seed: int = 0) -> list[dict[str, object]]:
        """One result per request."""
        ids = drawn["cells"].numpy()
        counts = self.tokenizer.counts(ids, seed)
        if drawn["observed"] is not None:
            counts = np.where(drawn["observed"] >= 0, drawn["observed"], counts)
        has_anndata = find_spec("anndata") is not None
        results, stop = [], 0
        for request, n in zip(drawn["requests"], drawn["sizes"]):
            start, stop = stop, stop + n
            rows = slice(start, stop)
            asked = {name: request[name] for name in FIELDS[:3] if request.get(name) is not None}
            result = {"counts": counts[rows], "genes": list(self.tokenizer.genes), "conditions": asked}
            if has_anndata:
                known = {name: value for name, value in drawn["arguments"].items() if name != "num_cells"}
                conditions = {name: value[rows].cpu() for name, value in known.items()}
                result["adata"] = self.tokenizer.decode(ids[rows], conditions=conditions, seed=seed)
                result["adata"].obs_names = [f"dcm-{seed}-{i}" for i in range(start, stop)]
                result["adata"].X = type(result["adata"].X)(counts[rows].astype(np.int32))
            results.append(result)
        return results

    def _conditions(self, request: Mapping, observed: np.ndarray | None) -> dict[str, int | torch.Tensor]:
        n = request.get("num_cells")
        if observed is not None and len(observed) > 1:
            if n not in (None, len(observed)):
                raise ValueError(f"num_cells is {n} but {len(observed)} observed cells are given; leave it out")
            n = len(observed)
        labels = {name: request.get(name) for name in FIELDS[:3]}
        return self.tokenizer.conditions(num_cells=n, **labels)

    def _observed(self, request: Mapping) -> np.ndarray | None:
        """Counts (cells, G) int64, -1 where unknown; None when nothing is observed."""
        cells = request.get("observed")
        if cells is None:
            return None
        position = {gene: i for i, gene in enumerate(self.tokenizer.genes)}
        cells = [cells] if isinstance(cells, Mapping) else cells
        table = np.full((len(cells), len(position)), -1, dtype=np.int64)
        for row, cell in zip(table, cells):
            for gene, count in cell.items():
                if gene not in position:
                    raise ValueError(f"observed gene {_shown(gene)} is not in the panel; {_near(gene, list(position))}")
                _check_whole(f"observed count of {gene}", count, 0)
                row[position[gene]] = count
        return table


def _check_request(request: object) -> None:
    """Raise ValueError unless a request has known fields, each of the right kind."""
    if not isinstance(request, Mapping):
        raise ValueError(f"{_shown(request)} is no request; expected a dictionary with any of {', '.join(FIELDS)}")
    for field in request:
        if field not in FIELDS:
            raise ValueError(f"unknown field {_shown(field)}; {_near(field, FIELDS)}")
    given = {field: value for field, value in request.items() if value is not None}
    covariates = given.get("covariates", {})
    if not isinstance(covariates, Mapping):
        raise ValueError(f"covariates={_shown(covariates)}, expected a dictionary from name to label")
    for name in ("cell_type", "perturbation"):
        if name in covariates:
            raise ValueError(f"covariate {name!r} is a field of its own: leave it out of covariates")
    for name, labels in {**{name: given.get(name, "") for name in FIELDS[:2]}, **covariates}.items():
        each = [labels] if isinstance(labels, str) else labels
        if not isinstance(each, list | tuple) or not all(isinstance(label, str) for label in each) or not each:
            raise ValueError(f"{_shown(name)} is {_shown(labels)}, expected a label, or a list of one per cell")
    if "num_cells" in given:
        _check_whole("num_cells", given["num_cells"], 1)
    if given.get("library_size", "null") != "null":
        _check_number("library_size", given["library_size"])
        if given["library_size"] < 0:
            raise ValueError(f"library_size={_shown(given['library_size'])}, expected 0 or more")
    cells = given.get("observed", {})
    cells = [cells] if isinstance(cells, Mapping) else cells
    if not isinstance(cells, list | tuple) or not cells or not all(isinstance(cell, Mapping) for cell in cells):
        raise ValueError(f"observed={_shown(cells)}, expected a dictionary from gene to count, or a list of them")


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**63:
        raise ValueError(f"{name}={_shown(value)}, expected a whole number of at least {least}")


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"{name}={_shown(value)}, expected a number of at most {LARGEST_NUMBER:,}")


def _joined(conditions: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Conditions of all requests under one another; combinations are padded with -1 to the widest."""
    joined = {}
    for name in conditions[0]:
        columns = [each[name] for each in conditions]
        if name == "perturbation_ids":
            widest = max(column.shape[1] for column in columns)
            columns = [torch.nn.functional.pad(column, (0, widest - column.shape[1]), value=-1) for column in columns]
        joined[name] = torch.cat(columns)
    return joined


def _near(name: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name)[:100], known, n=5)
    return f"near matches: {', '.join(near)}" if near else f"expected one of {reprlib.repr(list(known))}"


def _shown(value: object) -> str:
    """A value for an error message, cut short whatever it is."""
    return reprlib.repr(value)
