"""Properties of file reading and writing: a damaged file is one clear error, a crash leaves the last good state."""

import pytest

from training.data import files
from training.data.files import written_aside


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
