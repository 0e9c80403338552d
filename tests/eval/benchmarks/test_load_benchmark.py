"""Properties of the load benchmark: every stage is timed in a fresh process, and what cannot be measured is said."""

import re

import pytest

from eval.benchmarks.loading import STAGES, main, measure
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.mark.slow
def test_every_stage_has_its_seconds_beside_those_of_a_model_with_random_weights(make_model, tmp_path, capsys):
    folder = write_tiny_checkpoint(tmp_path / "tiny", make_model("latent", conditioned=True))
    result = main(folder, repeats=1, steps=2, size="5m", out=tmp_path / "loading.md")
    assert set(result) == {"load_s", "first_cell_s", "5m_load_s", "5m_first_cell_s"}
    assert all(seconds > 0 for seconds in result.values())
    text = (tmp_path / "loading.md").read_text()
    assert text == capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| tiny", "| 5m, random"))]
    assert [len(re.findall(r"\d+\.\d\d \(\d+\.\d\d\)", row)) for row in rows] == [len(STAGES)] * 2
    assert text.splitlines()[-1].startswith("load_s=")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeats": 0}, "--repeats 0"), ({"steps": 0}, "--steps 0"), ({"size": "7b"}, "--size 7b")],
)
def test_options_out_of_range_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        main(tmp_path, **options)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        main(tmp_path / "nothing")
    with pytest.raises(ValueError, match="a fresh process cannot use"):
        measure(tmp_path, steps=1, repeats=1)
