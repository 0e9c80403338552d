"""Properties of file reading and writing: a damaged file is one clear error, a crash leaves the last good state."""

import pytest

from training.data import files
from training.data.files import written_aside


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_appears_when_it_is_whole_and_a_failure_leaves_the_last_good_state(tmp_path, kind):
    target = tmp_path / "new" / "target"

    def write(text: str, error: Exception | None = None) -> None:
        with written_aside(target) as path:
            path.write_text(text) if kind == "file" else (path / text).mkdir(parents=True)
            assert target.exists() == (text != "one")
            if error:
                raise error

    write("one")
    write("two")
    with pytest.raises(RuntimeError, match="crash"):
        write("three", RuntimeError("crash"))
    assert [entry.name for entry in target.parent.iterdir()] == ["target"]
    assert (target.read_text() if kind == "file" else next(target.iterdir()).name) == "two"
    assert kind == "file" or len(list(target.iterdir())) == 1


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
