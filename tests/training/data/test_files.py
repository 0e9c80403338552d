"""Properties of file reading and writing: a damaged file is one clear error, a crash leaves the last good state."""

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse

from training.data import files
from training.data.files import written_aside
from training.data.formats import read_counts


@pytest.fixture
def h5ad(tmp_path):
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(scipy.sparse.random(200, 50, density=0.3, format="csr", random_state=0)).write_h5ad(path)
    return path


def test_counts_may_stand_in_a_layer_alone(tmp_path):
    anndata.AnnData(layers={"counts": np.ones((3, 2))}).write_h5ad(tmp_path / "layer.h5ad")
    assert read_counts(tmp_path / "layer.h5ad", "counts").X.sum() == 6


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*absent.h5ad'; expected an h5ad file"):
        read_counts(tmp_path / "absent.h5ad")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.h5ad").touch()
    with pytest.raises(ValueError, match=r"empty \(0 bytes\)"):
        read_counts(tmp_path / "empty.h5ad")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "text.h5ad").write_text("cell,gene\n" * 100)
    with pytest.raises(ValueError, match=r"is not an h5ad file \(no HDF5 signature"):
        read_counts(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.ones(3)
    with pytest.raises(ValueError, match="HDF5 but not an h5ad file: it has no obs, no var, no X and no layers"):
        read_counts(tmp_path / "other.h5ad")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_refused(h5ad, share):
    data = h5ad.read_bytes()
    h5ad.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="looks cut short or damaged: copy it again"):
        read_counts(h5ad)


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with written_aside(target) as path:
        path.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [entry.name for entry in target.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced_at_once(tmp_path):
    target = tmp_path / "folder"
    for text in ("one", "two"):
        with written_aside(target) as path:
            path.mkdir()
            (path / text).touch()
    assert [entry.name for entry in tmp_path.rglob("*")] == ["folder", "two"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_the_last_good_state(tmp_path, kind):
    target = tmp_path / "target"
    target.write_text("good") if kind == "file" else target.mkdir()
    with pytest.raises(RuntimeError, match="crash"), written_aside(target) as path:
        path.write_text("bad") if kind == "file" else path.mkdir()
        raise RuntimeError("crash")
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]
    assert target.is_dir() or target.read_text() == "good"


@pytest.mark.parametrize("moves", [1, 2])
def test_a_folder_whose_replacement_was_killed_is_put_back_or_the_new_one_stays(tmp_path, monkeypatch, moves):
    """Killed after the old folder was moved away, or after the new one was moved in."""
    folder, real = tmp_path / "checkpoint", files.os.replace
    write_folder(folder, "old")
    done = []

    def killed(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(source)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", killed)
        patched.setattr(files.shutil, "rmtree", lambda *_, **__: killed(None, None))
        with pytest.raises(KeyboardInterrupt):
            write_folder(folder, "new")
    assert list(tmp_path.glob(".checkpoint.*.old"))
    with pytest.raises(RuntimeError), written_aside(folder):
        raise RuntimeError("the next run fails before it has written anything")
    assert (folder / "text").read_text() == {1: "old", 2: "new"}[moves]
    assert not list(tmp_path.glob(".checkpoint.*.old"))


def write_folder(folder, text):
    with written_aside(folder) as aside:
        aside.mkdir()
        (aside / "text").write_text(text)
