"""Properties of the sampling stage: what is written, and how it ends when something is wrong."""

import inspect
import shutil
from pathlib import Path
from typing import get_args

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from eval.comparison.vcc2026 import defects
from eval.sample import Schedule, main
from modeling_dcm import DCMForDenoising
from modeling_dcm.schedule_dcm import SCHEDULES
from tests.tiny_training import assert_same_file
from tokenization import DCMTokenizer
from training.data.checkpoint import load_checkpoint


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Arguments of every call of ``generate`` that draws chunks, with the chunks that it draws."""
    found, generate = [], DCMForDenoising.generate

    def recorded(self, *arguments, **options):
        if options.get("chunks") is not None:
            found.append(options | {"chunks": list(options["chunks"])})
            options = found[-1]
        return generate(self, *arguments, **options)

    monkeypatch.setattr(DCMForDenoising, "generate", recorded)
    return found


def test_drawn_and_written_in_chunks_the_file_holds_what_one_call_of_generate_draws(trained, tmp_path, calls):
    out = tmp_path / "cells.h5ad"
    name = next(name for name in DCMTokenizer.from_pretrained(trained).perturbations if name != "control")
    options = {"steps": 3, "schedule": "cubic", "temperature": 1.0, "seed": 5, "batch_size": 8, "guidance_scale": 0.0}
    main(str(trained), out=out, num_cells=23, cell_type="type1", perturbation=name, **options)
    assert [call["chunks"] for call in calls] == [[0, 1, 2]]
    model, tokenizer = load_checkpoint(str(trained))
    conditions = tokenizer.conditions(num_cells=23, cell_type="type1", perturbation=name)
    expected = tokenizer.decode(model.generate(**conditions, **options), conditions=conditions, seed=5)
    expected.uns["generator"] = "dcm"
    expected.uns["dcm_sampling"] = {"checkpoint": "checkpoint", "cell_type": "type1", "perturbation": name, **options}
    expected.write_h5ad(tmp_path / "expected.h5ad")
    assert isinstance(anndata.read_h5ad(out).X, sparse.csr_matrix)
    assert_same_file(out, tmp_path / "expected.h5ad")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_like_draws_one_cell_for_each_cell_of_the_file_with_its_labels(trained, shards, tmp_path):
    real = anndata.read_h5ad(shards / "test.h5ad")
    real.X = real.X * 7  # labels alone are looked at
    (tmp_path / "louder").mkdir()
    real.write_h5ad(tmp_path / "louder" / "test.h5ad")
    for like in (shards / "test.h5ad", tmp_path / "louder" / "test.h5ad"):
        main(str(trained), out=tmp_path / f"like_{like.parent.name}.h5ad", like=like, steps=2)
    assert_same_file(tmp_path / "like_shards.h5ad", tmp_path / "like_louder.h5ad")
    drawn = anndata.read_h5ad(tmp_path / "like_shards.h5ad")
    assert len(drawn) == len(real)
    for condition in ("cell_type", "perturbation"):
        assert drawn.obs[condition].astype(str).tolist() == real.obs[condition].astype(str).tolist()


def test_labels_that_are_not_given_are_drawn_as_the_training_cells_have_them(trained, shards, tmp_path):
    out, given = tmp_path / "cells.h5ad", {"num_cells": 1500, "steps": 1, "state": "null", "library_size": 50.0}
    train = anndata.read_h5ad(shards / "train.h5ad").obs[["cell_type", "perturbation"]].astype(str)
    main(str(trained), out=out, **given)
    drawn = anndata.read_h5ad(out)
    shares = [obs.value_counts(normalize=True) for obs in (drawn.obs[train.columns].astype(str), train)]
    shares = pd.concat(shares, axis=1).fillna(0).to_numpy()
    assert (shares[:, 0] > 0).sum() > 5
    assert np.abs(np.subtract(*shares.T)).max() < 0.04  # four standard errors
    assert drawn.uns["dcm_sampling"].items() >= {"other_labels": "drawn", "state": "null"}.items()
    name = train["perturbation"][train["cell_type"] == "type1"].iloc[0]
    main(str(trained), out=out, perturbation=name, **given)
    drawn = anndata.read_h5ad(out).obs
    assert set(drawn["perturbation"]) == {name}
    assert set(drawn["cell_type"]) == set(train["cell_type"][train["perturbation"] == name])
    main(str(trained), out=out, no_labels=True, **given)
    assert "cell_type" not in anndata.read_h5ad(out).obs


def relabelled(shards: Path, folder: Path, change) -> Path:
    """The test cells after a change to their ``obs``."""
    real = anndata.read_h5ad(shards / "test.h5ad")
    real.obs = change(real.obs)
    real.write_h5ad(folder / "real.h5ad")
    return folder / "real.h5ad"


def test_a_label_beside_like_makes_counterfactuals_and_need_not_be_in_the_file(trained, shards, tmp_path):
    name = next(name for name in DCMTokenizer.from_pretrained(trained).perturbations if name != "control")
    like = relabelled(shards, tmp_path, lambda obs: obs[["cell_type"]])
    main(str(trained), out=tmp_path / "cells.h5ad", like=like, perturbation=name, steps=2)
    drawn, real = (anndata.read_h5ad(file) for file in (tmp_path / "cells.h5ad", like))
    assert set(drawn.obs["perturbation"]) == {name}
    assert drawn.obs_names[1] == "dcm-0-1"
    assert drawn.obs["source_cell"].tolist() == real.obs_names.tolist()
    assert drawn.obs["cell_type"].astype(str).tolist() == real.obs["cell_type"].astype(str).tolist()


def test_a_submission_has_the_genes_and_labels_of_its_file_and_a_model_that_lacks_genes_makes_none(
    trained, shards, tmp_path
):
    real = anndata.read_h5ad(shards / "test.h5ad")
    real[:, ::-1].copy().write_h5ad(tmp_path / "real.h5ad")
    main(str(trained), out=tmp_path / "cells.h5ad", like=tmp_path / "real.h5ad", vcc=True, steps=2)
    drawn = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert drawn.var_names.tolist() == real.var_names[::-1].tolist()
    assert drawn.obs["perturbation"].astype(str).tolist() == real.obs["perturbation"].astype(str).tolist()
    assert defects(tmp_path / "cells.h5ad", tmp_path / "real.h5ad") == []
    real.var_names = ["another", *real.var_names[1:]]
    real.write_h5ad(tmp_path / "real.h5ad")
    with pytest.raises(ValueError, match=r"has 1 genes of [\d,]+ that the model does not know \(another\)"):
        main(str(trained), out=tmp_path / "none.h5ad", like=tmp_path / "real.h5ad", vcc=True, steps=2)
    assert not (tmp_path / "none.h5ad").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs[["cell_type"]], r"has no obs column 'perturbation'; it has cell_type"),
        (
            lambda obs: obs.assign(cell_type=obs["cell_type"].astype(object).where(np.arange(len(obs)) > 1, None)),
            r"2 cells have no label in obs\['cell_type'\]; label or remove them",
        ),
    ],
)
def test_a_cell_without_label_is_not_taken_for_one_of_any_condition(trained, shards, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main(str(trained), out=tmp_path / "cells.h5ad", like=relabelled(shards, tmp_path, change))
    assert not (tmp_path / "cells.h5ad").exists()


def test_cells_can_keep_the_states_and_library_sizes_of_the_cells_that_they_are_like(trained, shards, tmp_path, calls):
    cells = anndata.read_h5ad(shards / "test.h5ad")
    model, tokenizer = load_checkpoint(str(trained))
    ids = tokenizer(cells)["input_ids"]
    cells.layers["counts"], cells.X = cells.X.copy(), cells.X * 0.5
    cells.obs["perturbation"] = "of another study"
    cells.write_h5ad(tmp_path / "like.h5ad")
    options = {"like": tmp_path / "like.h5ad", "keep_state": True, "perturbation": "control", "steps": 2}
    main(str(trained), out=tmp_path / "cells.h5ad", layer="counts", **options)
    torch.testing.assert_close(calls[-1]["state"], model.state(ids))
    assert torch.equal(calls[-1]["library_size"], ids.sum(dim=1).float())
    with pytest.raises(
        ValueError, match=r"lacks 2 of the panel's 15 genes \(GENE0000, GENE0001\).*leave out --keep-state"
    ):
        cells[:, 2:].copy().write_h5ad(tmp_path / "like.h5ad")
        main(str(trained), out=tmp_path / "few.h5ad", layer="counts", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guidance": {"cell_type": 1.0}, "guidance_scale": 2.0},
            "--guidance-scale is 2.0; expected 0 with --guidance",
        ),
        ({"num_cells": 0}, "--num-cells is 0; expected at least 1"),
        ({"library_size": -1.0}, "--library-size is -1.0; expected 0 or more"),
        ({"seed": -1}, "--seed is -1; expected 0 or more"),
        ({"like": Path("a.h5ad"), "num_cells": 3}, "--num-cells is 3; expected none with --like"),
        ({"like": Path("a.h5ad"), "layer": "counts"}, "--layer is counts; expected --keep-state beside it"),
        ({"keep_state": True}, "expected a file of cells beside it, --like"),
        ({"keep_state": True, "state": "prior"}, "--state is prior; expected none with --keep-state"),
        ({"like": Path("a.h5ad"), "keep_state": True, "library_size": 9.0}, "expected none with --keep-state"),
        ({"vcc": True}, "--vcc is True; expected --like beside it"),
        ({"vcc": True, "like": Path("a.h5ad"), "perturbation": "x"}, "left out with --perturbation"),
    ],
)
def test_options_that_no_model_could_follow_are_refused_before_one_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(str(tmp_path / "no checkpoint"), out=tmp_path / "new" / "cells.h5ad", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"guidance": {"donors": 1.0}}, "guidance_scale for 'donors', expected one of cell_type, perturbation"),
        ({"temperature": 0.0}, "temperature=0.0, expected above 0"),
        ({"batch_size": 0}, "batch_size=0, expected at least 1"),
    ],
)
def test_numbers_that_the_sampler_refuses_are_refused_before_anything_is_written(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(str(trained), out=tmp_path / "new" / "cells.h5ad", **options)
    assert not (tmp_path / "new").exists()


def test_a_missing_file_to_be_like_and_an_output_that_cannot_be_written_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an h5ad file"):
        main(str(tmp_path / "no checkpoint"), out=tmp_path / "new" / "cells.h5ad", like=tmp_path / "none.h5ad")
    with pytest.raises(IsADirectoryError, match="is a folder; expected the h5ad file to write"):
        main(str(tmp_path / "no checkpoint"), out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="is no folder to write into"):
        main(str(tmp_path / "no checkpoint"), out=tmp_path / "file" / "cells.h5ad")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def without_curve(trained, tmp_path) -> Path:
    """The checkpoint without entropy curve."""
    model, tokenizer = load_checkpoint(str(trained))
    model.config.entropy_curve = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "without_curve")
    return tmp_path / "without_curve"


@pytest.mark.parametrize("options", [{"steps": "auto"}, {"schedule": "optimal"}])
def test_what_this_model_cannot_do_is_said_before_anything_is_written(without_curve, tmp_path, options):
    with pytest.raises(ValueError, match="needs the model's entropy curve"):
        main(str(without_curve), out=tmp_path / "new" / "cells.h5ad", **options)
    assert not (tmp_path / "new").exists()


def test_steps_schedule_guidance_and_dtype_reach_the_sampler_and_are_recorded(without_curve, tmp_path, calls):
    curve = {"observed": [0.0, 7.0, 15.0], "entropy": [1.5, 1.1, 1.0]}
    model = DCMForDenoising.from_pretrained(without_curve)
    model.config.entropy_curve = curve
    model.save_pretrained(without_curve)
    given = {"steps": "auto", "schedule": "optimal", "guidance": {"cell_type": 0.5}, "dtype": "bfloat16"}
    main(str(without_curve), out=tmp_path / "cells.h5ad", num_cells=6, cell_type="type1", temperature=0.9, **given)
    sampling = anndata.read_h5ad(tmp_path / "cells.h5ad").uns["dcm_sampling"]
    recorded = {"steps": "auto", "schedule": "optimal", "guidance_scale": {"cell_type": 0.5}, "temperature": 0.9}
    assert {name: sampling[name] for name in recorded} == recorded
    assert {name: calls[0][name] for name in recorded} == recorded
    assert sampling["dtype"] == "bfloat16"


def test_a_held_out_label_without_vectors_is_an_error_that_says_why_and_lists_near_matches(trained, tmp_path):
    known = next(name for name in DCMTokenizer.from_pretrained(trained).perturbations if name != "control")
    reason = "learned a vector for each training perturbation: others need --perturbation-embeddings"
    with pytest.raises(ValueError, match=f"unknown perturbation '{known[:-1]}'; near matches: .*{known}.*{reason}"):
        main(str(trained), out=tmp_path / "cells.h5ad", perturbation=known[:-1])
    assert not (tmp_path / "cells.h5ad").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("genes.txt", r"it has no the tokenizer \(genes.txt\)|no .*tokenizer"),
        ("model.safetensors", r"the weights \(model.safetensors\)"),
        ("config.json", r"the configuration \(config.json\)"),
    ],
)
def test_an_incomplete_checkpoint_says_what_is_missing(trained, tmp_path, missing, message):
    copy = tmp_path / "checkpoint"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / missing).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        main(str(copy), out=tmp_path / "cells.h5ad")


def test_a_folder_that_is_not_there_or_lacks_a_tensor_is_neither_looked_up_on_the_hub_nor_drawn_at_random(
    trained, tmp_path
):
    for name in (str(tmp_path / "nothing"), "./nothing", "nothing/"):
        with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
            load_checkpoint(name)
    folder = shutil.copytree(trained, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name not in ("totals.gene_mean", "head.bias.weight")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 2 tensors of this network \(head.bias.weight, totals.gene_mean\)"):
        load_checkpoint(str(folder))


def test_defaults_and_choices_are_those_of_generate():
    command, generate = (inspect.signature(function).parameters for function in (main, DCMForDenoising.generate))
    shared = ("steps", "schedule", "guidance_scale", "temperature", "seed", "batch_size")
    assert {name: command[name].default for name in shared} == {name: generate[name].default for name in shared}
    assert set(get_args(Schedule)) == set(SCHEDULES)
