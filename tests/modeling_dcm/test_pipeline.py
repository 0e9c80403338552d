"""Properties of checkpoints that stand alone, and of ``pipeline("cell-generation")``."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

from modeling_dcm import DCMConfig, DCMForDenoising
from modeling_dcm.pipeline_dcm import CellGenerationPipeline
from tests.fresh_python import ABSENT, fresh_python, make_environment
from tests.tiny_checkpoint import GENES, write_tiny_checkpoint
from tokenization import DCMTokenizer


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint) -> CellGenerationPipeline:
    return pipeline("cell-generation", model=str(tiny_checkpoint), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def ours(tiny_checkpoint) -> tuple[DCMTokenizer, DCMForDenoising]:
    return DCMTokenizer.from_pretrained(tiny_checkpoint), DCMForDenoising.from_pretrained(tiny_checkpoint)


OLDEST = "5.4"  # of the transformers that pyproject.toml allows

ALONE = """
import importlib.util, json, sys
version, absent, *folders = sys.argv[1:]
assert not [name for name in absent.split(",") if importlib.util.find_spec(name)]
import transformers
assert transformers.__version__.startswith(version), transformers.__version__
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline
asked = {"cell_type": "k562", "perturbation": "KLF1+TGFBR2", "num_cells": 6}
cells = []
for folder in folders:
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "dcm"
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForMaskedLM):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        cells.append(model.generate(**tok.conditions(**asked), steps=3, seed=5, library_size=9).tolist())
    pipe = pipeline("cell-generation", model=folder, trust_remote_code=True, device="cpu")
    drawn = pipe({**asked, "library_size": 9}, steps=3, seed=5)
    assert "adata" not in drawn
    cells.append(drawn["counts"].tolist())
    assert tok(drawn["counts"])["input_ids"].tolist() == cells[-1]
    try:
        tok.decode(drawn["counts"])
    except ImportError as error:
        assert "pip install anndata" in str(error)
    else:
        raise SystemExit("decoded without anndata")
    tok.save_pretrained(f"{folder}/again")
    AutoTokenizer.from_pretrained(f"{folder}/again", trust_remote_code=True)
print(json.dumps(cells))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, transformers.__version__], ids=["oldest", "installed"])
def test_a_folder_needs_only_transformers_torch_and_numpy_and_gives_the_same_cells(version, make_model, tmp_path):
    folders, cells = [], []
    for name in ("dit", "latent"):
        folders.append(write_tiny_checkpoint(tmp_path / name, make_model(name, conditioned=True)))
        asked = {"cell_type": "k562", "perturbation": "KLF1+TGFBR2", "num_cells": 6, "library_size": 9}
        model = DCMForDenoising.from_pretrained(folders[-1])
        cells += [model.generate(**asked, steps=3, seed=5).tolist()] * 3
    wanted = () if version == transformers.__version__ else (f"transformers=={version}.*",)
    try:
        python = make_environment(tmp_path / "environment", *wanted)
    except RuntimeError as error:
        pytest.skip(f"transformers {version} cannot be installed here: {error}")
    done = fresh_python(python, ALONE, version, ",".join(ABSENT), *folders, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == cells


def test_the_oldest_transformers_is_the_one_that_the_package_asks_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"transformers>={OLDEST},<6" in project["dependencies"]


def test_each_auto_class_file_names_all_the_files_that_it_needs(tiny_checkpoint):
    """Transformers 5.4 copies out of a local folder what the file of the class imports, not what that imports."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    tokenizer = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"}
    references = [*config["auto_map"].values(), config["custom_pipelines"]["cell-generation"]["impl"]]
    references += [reference for reference in tokenizer["auto_map"]["AutoTokenizer"] if reference]

    def named(file: str) -> set[str]:
        return set(re.findall(r"^from \.(\w+) import", (tiny_checkpoint / f"{file}.py").read_text(), re.MULTILINE))

    for file in {reference.split(".")[0] for reference in references}:
        assert set().union(*map(named, named(file))) <= named(file), file


def test_with_the_package_installed_nobody_is_asked_to_trust_remote_code(tiny_checkpoint):
    assert type(AutoModel.from_pretrained(tiny_checkpoint)) is DCMForDenoising
    assert type(AutoModelForMaskedLM.from_pretrained(tiny_checkpoint)) is DCMForDenoising
    assert type(AutoTokenizer.from_pretrained(tiny_checkpoint)) is DCMTokenizer
    assert type(AutoConfig.from_pretrained(tiny_checkpoint)) is DCMConfig


def test_weights_in_many_files_in_subfolders_and_device_maps_load(make_model, tmp_path):
    model = make_model("dit", conditioned=True)
    folder = write_tiny_checkpoint(tmp_path / "sub" / "folder", model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = [
        DCMForDenoising.from_pretrained(tmp_path, subfolder="sub/folder"),
        AutoModel.from_pretrained(folder, trust_remote_code=True, device_map="auto"),
    ]
    for other in loaded:
        torch.testing.assert_close(dict(other.cpu().state_dict()), dict(model.state_dict()), atol=0, rtol=0)
    assert DCMTokenizer.from_pretrained(tmp_path, subfolder="sub/folder").genes == GENES


def test_one_request_is_one_call_of_generate(pipe, ours):
    tokenizer, model = ours
    asked = {"cell_type": "hepg2", "perturbation": "TGFBR2+KLF1", "covariates": {"day": "1"}, "num_cells": 9}
    drawn = pipe({**asked, "library_size": 11}, seed=3)
    cells = model.generate(**tokenizer.conditions(**asked), seed=3, library_size=11).numpy()
    assert drawn["genes"] == GENES
    assert drawn["conditions"] == {name: asked[name] for name in ("cell_type", "perturbation", "covariates")}
    for counts in (drawn["counts"], drawn["adata"].X.toarray()):
        assert np.array_equal(counts, cells)
    assert set(drawn["adata"].obs["perturbation"]) == {"KLF1+TGFBR2"}


def test_options_of_the_pipeline_hold_for_calls_that_do_not_say_otherwise(pipe, tiny_checkpoint):
    options = {"trust_remote_code": True, "device": "cpu", "seed": 7, "steps": 2}
    other = pipeline("cell-generation", model=str(tiny_checkpoint), **options)
    asked = {"cell_type": "k562", "num_cells": 5}
    assert np.array_equal(other(asked)["counts"], pipe(asked, seed=7, steps=2)["counts"])
    assert np.array_equal(other(asked, seed=8)["counts"], pipe(asked, seed=8, steps=2)["counts"])


def test_a_list_is_one_run_over_all_its_requests(pipe, ours):
    tokenizer, model = ours
    requests = [
        {"cell_type": "k562", "perturbation": "KLF1+TGFBR2", "num_cells": 3},
        {"cell_type": ["rpe1", "hepg2"], "perturbation": "control"},
        {},
    ]
    first, second, third = pipe(requests, seed=2)
    types = ["k562"] * 3 + ["rpe1", "hepg2", None]
    together = tokenizer.conditions(cell_type=types, perturbation=["KLF1+TGFBR2"] * 3 + ["control"] * 2 + [None])
    cells = model.generate(**together, seed=2).numpy()
    assert np.array_equal(np.concatenate([first["counts"], second["counts"], third["counts"]]), cells)
    assert second["adata"].obs["cell_type"].tolist() == ["rpe1", "hepg2"]


def test_observed_genes_come_back_unchanged_and_the_others_vary(pipe):
    drawn = pipe({"observed": {"HBB": 3, "ACTB": 0}, "num_cells": 40}, seed=1)
    values = {gene: set(counts) for gene, counts in zip(GENES, drawn["counts"].T)}
    assert (values["HBB"], values["ACTB"]) == ({3}, {0})
    assert len(values["MYC"]) > 1
    several = pipe({"observed": [{"HBB": 1}, {"FOS": 2}]})["counts"]
    assert several.shape == (2, len(GENES))
    assert (several[0, GENES.index("HBB")], several[1, GENES.index("FOS")]) == (1, 2)
    loud = pipe({"observed": {"HBB": 1000}})  # above the largest count
    assert loud["counts"][0, GENES.index("HBB")] == loud["adata"].X[0, GENES.index("HBB")] == 1000


def test_binned_counts_are_those_that_the_tokenizer_decodes(make_model, tmp_path):
    model = make_model("dit", conditioned=True, max_count=40, count_bins=[2, 6, 20])
    folder = write_tiny_checkpoint(tmp_path / "binned", model, count_bins=[2, 6, 20])
    binned = pipeline("cell-generation", model=str(folder), trust_remote_code=True, device="cpu")
    drawn = binned({"num_cells": 50, "library_size": 30}, seed=4)
    tokenizer = DCMTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer.conditions(num_cells=50), library_size=30, seed=4)
    assert drawn["counts"].max() > model.config.num_counts
    assert np.array_equal(drawn["counts"], tokenizer.decode(ids, seed=4).X.toarray())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"cell_type": "k563"}, "unknown cell_type 'k563'; near matches: 'k562'"),
        ({"celltype": "k562"}, "unknown field 'celltype'; near matches: cell_type"),
        ({"covariates": {"sex": "f"}}, "no labels of covariate 'sex'"),
        ({"covariates": {"cell_type": "k562"}}, "covariate 'cell_type' is a field of its own"),
        ({"cell_type": 3}, "'cell_type' is 3, expected a label"),
        ({"num_cells": 0}, "num_cells=0, expected a whole number of at least 1"),
        ({"num_cells": 2.5}, "num_cells=2.5, expected a whole number"),
        ({"library_size": -1}, "library_size=-1, expected 0 or more"),
        ({"observed": {"HBA": 1}}, "observed gene 'HBA' is not in the panel; near matches: HBB"),
        ({"observed": {"HBB": 1.5}}, "observed count of HBB=1.5, expected a whole number"),
        ({"observed": [{"HBB": 1}, {}], "num_cells": 3}, "num_cells is 3 but 2 observed cells"),
        ({"observed": "HBB"}, "observed='HBB', expected a dictionary"),
        ("k562", "'k562' is no request"),
        ([], r"\[\] is no request"),
        ([{"observed": {"HBB": 1}}, {}], "some requests of the list have 'observed' and others have not"),
    ],
)
def test_a_bad_request_says_what_was_expected(pipe, asked, message):
    with pytest.raises(ValueError, match=message):
        pipe(asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, "unknown option 'step'; near matches: steps"),
        ({"steps": 0}, "steps=0, expected a whole number of at least 1"),
        ({"seed": -1}, "seed=-1, expected a whole number of at least 0"),
        ({"schedule": "quadratic"}, "schedule='quadratic', expected one of"),
        ({"temperature": 0}, "temperature=0, expected above 0"),
        ({"guidance_scale": "high"}, "guidance_scale='high', expected a number"),
    ],
)
def test_a_bad_option_says_what_was_expected(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe({"num_cells": 2}, **options)
