"""Properties of the endpoint handler: right answers, bounds, hostile input."""

import json
import logging
import runpy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from modeling_dcm import DCMForDenoising
from tests.tiny_checkpoint import GENES
from tokenization import DCMTokenizer


@pytest.fixture(scope="module")
def handler(tiny_checkpoint):
    """That of ``handler.py`` in the checkpoint, by its path as an endpoint does."""
    return runpy.run_path(str(tiny_checkpoint / "handler.py"))["EndpointHandler"](str(tiny_checkpoint))


@pytest.fixture(scope="module")
def endpoint(handler) -> Callable[[object], tuple[int, dict]]:
    """What the Hub's inference toolkit does: JSON in, status and JSON out, errors to status 400."""

    def post(body: object) -> tuple[int, dict]:
        content = body if isinstance(body, bytes) else json.dumps(body)
        try:
            status, answer = 200, handler(json.loads(content))
        except (ValueError, RuntimeError, RecursionError) as error:
            status, answer = 400, {"error": str(error)}
        return status, json.loads(json.dumps(answer))

    return post


def dense(result: dict) -> np.ndarray:
    return csr_matrix((result["counts"], result["indices"], result["indptr"]), shape=result["shape"]).toarray()


def test_the_answer_is_the_models_cells_in_sparse_form(endpoint, tiny_checkpoint):
    asked = {"cell_type": "k562", "perturbation": "KLF1+TGFBR2", "num_cells": 10}
    status, answer = endpoint({"inputs": asked, "parameters": {"seed": 4, "steps": 3}})
    tokenizer, model = DCMTokenizer.from_pretrained(tiny_checkpoint), DCMForDenoising.from_pretrained(tiny_checkpoint)
    ours = model.generate(**tokenizer.conditions(**asked), seed=4, steps=3)
    assert status == 200
    assert answer["genes"] == GENES
    assert np.array_equal(dense(answer["results"][0]), ours.numpy())
    assert answer["results"][0]["conditions"] == {"cell_type": "k562", "perturbation": "KLF1+TGFBR2"}
    status, answer = endpoint({"inputs": [{"observed": {"HBB": 2}, "num_cells": 3}, {"observed": {"FOS": 0}}]})
    first, second = map(dense, answer["results"])  # one result per request
    assert set(first[:, GENES.index("HBB")]) == {2}
    assert (len(first), second[0, GENES.index("FOS")]) == (3, 0)


def test_requests_at_the_same_time_get_the_cells_that_they_would_get_alone(endpoint):
    bodies = [{"inputs": {"num_cells": 20 + seed}, "parameters": {"seed": seed}} for seed in range(12)]
    alone = [endpoint(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(endpoint, bodies))
    assert alone == together
    assert {status for status, _ in alone} == {200}


HOSTILE = {
    "unknown label": ({"inputs": {"cell_type": "k5622"}}, "near matches: 'k562'"),
    "unknown part": ({"inputs": {}, "options": {}}, "expected {"),
    "no inputs": ({"parameters": {}}, "expected {"),
    "a list": ([1, 2], "expected {"),
    "null": (None, "expected {"),
    "inputs of text": ({"inputs": "k562"}, "inputs must be"),
    "inputs of nothing": ({"inputs": []}, "inputs must be"),
    "parameters of text": ({"inputs": {}, "parameters": "fast"}, "parameters must be"),
    "many cells": ({"inputs": {"num_cells": 10**9}}, "cells: 1,000,000,000 asked for"),
    "many cells in parts": ({"inputs": [{"num_cells": 1900}, {"num_cells": 1900}]}, "cells: 3,800 asked for"),
    "many cells by labels": ({"inputs": {"cell_type": ["k562"] * 2001}}, "cells: 2,001 asked for"),
    "many cells observed": ({"inputs": {"observed": [{}] * 2001}}, "cells: 2,001 asked for"),
    "many cells by covariates": ({"inputs": {"covariates": {"donor": ["d1"] * 2001}}}, "cells: 2,001 asked for"),
    "many cells against fewer": ({"inputs": [{"num_cells": -5000}, {"num_cells": 4000}]}, "cells: 4,001 asked for"),
    "many requests": ({"inputs": [{}] * 65}, "requests: 65 asked for"),
    "many steps": ({"inputs": {}, "parameters": {"steps": 10**6}}, "steps: 1,000,000 asked for"),
    "large batch": ({"inputs": {}, "parameters": {"batch_size": 10**6}}, "batch_size: 1,000,000 asked for"),
    "strong guidance": ({"inputs": {}, "parameters": {"guidance_scale": {"cell_type": -1e6}}}, "guidance_scale"),
    "huge integer": (b'{"inputs": {"num_cells": 1' + b"0" * 300 + b"}}", "too large"),
    "infinity": (b'{"inputs": {"library_size": Infinity}}', "too large or not finite"),
    "not a number": (b'{"inputs": {"library_size": NaN}}', "too large or not finite"),
    "huge float": ({"inputs": {"library_size": 1e300}}, "too large"),
    "negative cells": ({"inputs": {"num_cells": -3}}, "num_cells=-3, expected a whole number"),
    "label of an object": ({"inputs": {"perturbation": {"$gt": ""}}}, "expected a label"),
    "long label": ({"inputs": {"cell_type": "x" * 10**6}}, "a text has 1,000,000 characters"),
    "deep": ({"inputs": {"covariates": {"a": [[[[1]]]]}}}, "nested too deeply"),
    "very deep": (b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_in_one_short_line_that_says_why(endpoint, name):
    body, message = HOSTILE[name]
    status, answer = endpoint(body)
    assert (status, set(answer)) == (400, {"error"})
    assert message in answer["error"]
    assert len(answer["error"]) < 600
    assert "\n" not in answer["error"]
    assert endpoint({"inputs": {}})[0] == 200  # and it goes on serving


def test_a_failure_inside_is_logged_and_says_nothing_to_a_stranger(handler, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("secret path")

    monkeypatch.setattr(handler, "pipeline", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="could not be answered") as info:
        handler({"inputs": {}})
    assert str(info.value) == "the request could not be answered"
    assert info.value.__suppress_context__
    assert "secret path" in caplog.text
