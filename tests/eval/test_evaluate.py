"""``dcm-evaluate`` from files to files: the rows, and every mistake a user can make."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from PIL import Image

from eval.comparison import vcc2025
from eval.comparison.cells import read_comparison
from eval.evaluate import main
from eval.metrics.by_name import POOLED_METRICS
from eval.reports import html_report
from eval.reports.tables import ROW_KEYS, at_floor
from eval.simulate import simulate

DEFAULT_BASELINES = ("independent_marginals", "perturbation_mean", "controls_scaled", "additive")


@pytest.fixture(autouse=True)
def quick_report(monkeypatch):
    """The report has tests of its own and takes seconds: here only the fixture ``results`` writes a real one."""
    monkeypatch.setattr(html_report, "html_report", lambda *args, **options: "<!doctype html>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Simulated train.h5ad and test.h5ad, and two files of a generator that thins training cells."""
    folder = tmp_path_factory.mktemp("shards")
    adata, _ = simulate(num_cells=700, num_genes=30, num_cell_types=2, num_perturbations=3, num_pairs=1)
    rng = np.random.default_rng(0)
    order = rng.permutation(700)
    test, train = adata[order[:240]].copy(), adata[order[240:]].copy()
    test.write_h5ad(folder / "test.h5ad")
    train.write_h5ad(folder / "train.h5ad")
    for seed in range(2):
        _generated(train, test, seed).write_h5ad(folder / f"generated_{seed}.h5ad")
    return folder


def _generated(train: anndata.AnnData, test: anndata.AnnData, seed: int) -> anndata.AnnData:
    """Training cells of the test cells' conditions with a tenth of their counts lost."""
    rng = np.random.default_rng(seed)
    key = [tuple(row) for row in train.obs[["cell_type", "perturbation"]].astype(str).to_numpy()]
    rows = {k: [i for i, other in enumerate(key) if other == k] for k in set(key)}
    wanted = [tuple(row) for row in test.obs[["cell_type", "perturbation"]].astype(str).to_numpy()]
    chosen = [rng.choice(rows[k]) for k in wanted]
    counts = train.X[chosen]
    counts.data = rng.binomial(counts.data, 0.9).astype(np.int32)
    obs = test.obs[["cell_type", "perturbation"]].copy()
    return anndata.AnnData(
        counts, obs=obs, var=train.var[[]].copy(), uns={"generator": "thinned", "dcm_sampling": {"checkpoint": "small"}}
    )


def run_main(folder: Path, out: Path, *names: str, **options: object) -> dict:
    paths = tuple(folder / name for name in names or ("generated_0.h5ad", "generated_1.h5ad"))
    main(paths, real=folder / "test.h5ad", train=folder / "train.h5ad", out=out, umap=False, **options)
    return json.loads((out / "results.json").read_text(), parse_constant=lambda word: pytest.fail(f"JSON holds {word}"))


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("results") / "deep" / "results"
    return run_main(folder, out), out


def _changed(folder: Path, out: Path, change) -> Path:
    """A copy of the first generated file after ``change``."""
    adata = anndata.read_h5ad(folder / "generated_0.h5ad")
    changed = change(adata)
    (changed if isinstance(changed, anndata.AnnData) else adata).write_h5ad(out / "changed.h5ad")
    return out / "changed.h5ad"


def test_results_json_is_the_contract(results, folder):
    found, _ = results
    rows = found["rows"]
    assert list(found) == ["dataset", "split", "checkpoint", "versions", "command", "rows"]
    assert (found["split"], found["checkpoint"]) == ("test", "small")
    assert found["command"].startswith("dcm-evaluate ")
    assert all(tuple(row) == ROW_KEYS for row in rows)
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["floor", "thinned", *DEFAULT_BASELINES]
    assert {row["protocol"] for row in rows} == {"paper", "log"}
    assert {row["grouping"] for row in rows} == {"pooled", "per_condition", "condition"}
    pooled = [row for row in rows if row["grouping"] == "pooled"]
    assert {row["metric"] for row in pooled if row["protocol"] == "log"} == set(POOLED_METRICS)
    assert all((row["condition"] is None) == (row["grouping"] != "condition") for row in rows)
    assert len({tuple(row[key] for key in ROW_KEYS[:5]) for row in rows}) == len(rows)
    seeds = {row["model"]: row["seeds"] for row in pooled}
    assert seeds == {"floor": 10, "thinned": 2, **dict.fromkeys(DEFAULT_BASELINES, 3)}
    assert {row["n"] for row in pooled} == {240}
    assert all(row["std"] > 0 for row in pooled if row["metric"] == "w2")
    slope = {row["model"]: row["mean"] for row in pooled if row["metric"] == "correlation_slope"}
    assert slope["independent_marginals"] < slope["floor"] - 0.1
    test = anndata.read_h5ad(folder / "test.h5ad").obs
    sizes = (test["cell_type"].astype(str) + " | " + test["perturbation"].astype(str)).value_counts()
    assert sizes.min() < 20 <= sizes.max()
    expected = {name if size >= 20 else f"{name} (under 20 cells)" for name, size in sizes.items()}
    assert {row["condition"] for row in rows if row["grouping"] == "condition"} == expected


def test_tables_report_and_figure_are_written_and_nothing_else(results):
    found, out = results
    files = ["figure.png", "report.html", "results.csv", "results.json", "results.md"]
    assert sorted(path.name for path in out.iterdir()) == files
    with (out / "results.csv").open(newline="") as file:
        for line, row in zip(csv.DictReader(file), found["rows"], strict=True):
            assert (line.pop("dataset"), line.pop("split")) == (found["dataset"], found["split"])
            assert line == {key: "" if value is None else str(value) for key, value in row.items()}
    text = (out / "results.md").read_text()
    for words in ("floor (n = 240, 10 draws)", "thinned (n = 240, 2 seeds)", "## Protocol `log`"):
        assert words in text
    with Image.open(out / "figure.png") as image:
        assert min(image.size) > 800
    page = (out / "report.html").read_text()
    assert "independent marginals" in page
    assert page.count("<figure>") == 4


@pytest.fixture(scope="module")
def held_out(folder, tmp_path_factory) -> Path:
    """Training cells without perturbations, the true cells as generated, and other cells of their simulator."""
    there = tmp_path_factory.mktemp("held_out")
    options = {"num_cells": 4000, "num_genes": 30, "num_cell_types": 1, "num_perturbations": 2, "num_pairs": 1}
    cells, _ = simulate(**options)
    order = np.random.default_rng(0).permutation(len(cells))
    one, others = cells[order[:1200]].copy(), cells[order[1200:]].copy()
    one.uns["dcm_control"] = "control"
    one.write_h5ad(there / "test.h5ad")
    others[(others.obs["perturbation"] == "control").to_numpy()].copy().write_h5ad(there / "train.h5ad")
    wanted = one.obs["perturbation"].value_counts()
    names = others.obs["perturbation"].astype(str).to_numpy()
    fresh = others[np.concatenate([np.flatnonzero(names == name)[:number] for name, number in wanted.items()])].copy()
    for name, adata in (("true", one), ("fresh", fresh)):
        adata.uns["generator"] = name
        adata.write_h5ad(there / f"{name}.h5ad")
    return there


def test_held_out_conditions_have_the_split_half_floor_and_true_cells_are_at_it(held_out, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.comparison.protocols.check_installed", lambda *_: None)
    monkeypatch.setitem(sys.modules, "cell_eval", SimpleNamespace(MetricsEvaluator=StandInEvaluator))
    options = {"baselines": "independent_marginals", "protocol": "paper,log,vcc2025"}
    found = run_main(held_out, tmp_path, "true.h5ad", "fresh.h5ad", **options)
    conditions = anndata.read_h5ad(held_out / "test.h5ad").obs["perturbation"].value_counts()
    compared = {name: size if name == "control" else size // 2 for name, size in conditions.items()}
    for row in found["rows"]:
        if row["grouping"] == "condition":
            assert row["n"] == compared[row["condition"].split(" | ")[-1]]
        elif row["grouping"] == "pooled":
            assert row["n"] == sum(compared.values())
    place = {
        (row["model"], row["protocol"], row["grouping"], row["condition"], row["metric"]): row for row in found["rows"]
    }
    for grouping, metric in (("pooled", "w2"), ("per_condition", "w2"), ("per_condition", "mmd2")):
        floor, fresh, worse = (
            place[model, "log", grouping, None, metric] for model in ("floor", "fresh", "independent_marginals")
        )
        assert [floor["seeds"], fresh["seeds"], worse["seeds"]] == [10, 1, 3]
        assert at_floor(fresh, floor) or abs(fresh["mean"] - floor["mean"]) < 0.1 * abs(worse["mean"] - floor["mean"])
        assert not at_floor(worse, floor)
    names = [row["condition"] for row in found["rows"] if row["grouping"] == "condition" and row["model"] == "floor"]
    for name in {name for name in names if not name.endswith("control")}:
        for metric in ("w2", "mmd2"):
            true, floor = (place[model, "log", "condition", name, metric] for model in ("true", "floor"))
            assert true["mean"] == pytest.approx(floor["mean"])
            assert at_floor(true, floor)
        for model in ("floor", "true", "independent_marginals"):  # the stand-in counts the cells that it is given
            assert place[model, "vcc2025", "condition", name, "size"]["mean"] == compared[name.split(" | ")[-1]]
    note = f"in {len(conditions) - 1} of {len(conditions)} conditions no training cell is there to be the floor"
    assert found["floor"].startswith(note)
    assert note in (tmp_path / "results.md").read_text()


def of_two_panels(adata: anndata.AnnData) -> anndata.AnnData:
    """Half the cells measured 15 of the 30 genes: there the others are stored as nothing."""
    few = np.arange(len(adata)) % 2 == 1
    counts = adata.X.toarray()
    counts[np.ix_(few, np.arange(30) >= 15)] = 0
    adata.X = scipy.sparse.csr_matrix(counts)
    adata.obs["panel"] = np.where(few, "few", "all")
    adata.uns["dcm_panels"] = {"all": np.ones(30, dtype=bool), "few": np.arange(30) < 15}
    return adata


def test_only_genes_that_were_measured_in_all_cells_are_compared(folder, tmp_path, caplog):
    options = {"protocol": "log", "baselines": "none"}
    for name in ("train", "test", "generated_0"):
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        adata.uns["dcm_separator"] = "_"
        adata[:, :15].copy().write_h5ad(tmp_path / f"{name}.h5ad")
        (adata if name.startswith("gen") else of_two_panels(adata)).write_h5ad(tmp_path / f"union_{name}.h5ad")
    expected = run_main(tmp_path, tmp_path / "few", "generated_0.h5ad", **options)
    for name in ("train", "test"):
        (tmp_path / f"union_{name}.h5ad").rename(tmp_path / f"{name}.h5ad")
    found = run_main(tmp_path, tmp_path / "union", "union_generated_0.h5ad", **options)
    assert found["rows"] == expected["rows"]
    files = (tmp_path / f"{name}.h5ad" for name in ("test", "train"))
    cells = read_comparison({tmp_path / "union_generated_0.h5ad": "x"}, *files, reserved_names=())
    assert cells.train.separator == cells.real.take(np.arange(3)).separator == "_"
    note = "15 of the 30 genes of the real cells; left out, as some cells were not measured there: GENE0015, GENE0016"
    assert found["genes"].startswith(note)
    assert f"Compared on {note}" in (tmp_path / "union" / "results.md").read_text()
    assert "compared on the 15 of 30 genes that were measured in all cells of all files" in caplog.text
    real = anndata.read_h5ad(tmp_path / "test.h5ad")
    real.uns["dcm_panels"]["all"] = ~real.uns["dcm_panels"]["few"]
    real.write_h5ad(tmp_path / "test.h5ad")
    with pytest.raises(ValueError, match="no gene was measured in all cells of all files"):
        run_main(tmp_path, tmp_path / "none", "union_generated_0.h5ad", **options)


def _log_normalised(adata: anndata.AnnData) -> None:
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.astype(np.float32).log1p()


def test_order_of_genes_extra_genes_float_counts_their_layer_and_a_second_run_do_not_matter(results, folder, tmp_path):
    def change(adata: anndata.AnnData) -> anndata.AnnData:
        extra = anndata.AnnData(np.ones((adata.n_obs, 1)), obs=adata.obs, var={"gene": ["EXTRA"]})
        extra.var_names = ["EXTRA"]
        joined = anndata.concat([adata, extra], axis=1, merge="same", uns_merge="first")
        joined.X = joined.X.astype(np.float32)
        _log_normalised(joined)
        return joined[:, np.random.default_rng(0).permutation(joined.n_vars)].copy()

    _changed(folder, tmp_path, change)
    second = anndata.read_h5ad(folder / "generated_1.h5ad")
    second.layers["counts"] = second.X
    second.write_h5ad(tmp_path / "second.h5ad")
    for name in ("test.h5ad", "train.h5ad"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = run_main(tmp_path, tmp_path / "out", "changed.h5ad", "second.h5ad", layer="counts", protocol="paper")
    assert found["rows"] == [row for row in results[0]["rows"] if row["protocol"] == "paper"]
    with pytest.raises(ValueError, match="has no layer 'umi'; layers there: counts"):
        run_main(tmp_path, tmp_path / "none", "changed.h5ad", layer="umi", protocol="paper")


def test_every_file_can_have_a_name_and_the_default_leaves_out_baselines_that_cannot_start(folder, tmp_path):
    options = {"protocol": "paper", "condition_keys": "cell_type", "dataset": "made up", "name": "one,two"}
    found = run_main(folder, tmp_path / "out", **options)
    assert (found["dataset"], found["checkpoint"]) == ("made up", "small")
    assert "--condition-keys cell_type --dataset 'made up'" in found["command"]
    assert {row["model"] for row in found["rows"]} == {"floor", "one", "two", "independent_marginals"}
    ours = [row for row in found["rows"] if row["model"] == "two"]
    assert all(row["std"] is None and row["seeds"] == 1 for row in ours)
    assert {row["condition"] for row in ours} == {None, "type0", "type1"}
    with pytest.raises(ValueError, match=r"starts from control cells, and the condition columns \(cell_type\)"):
        run_main(folder, tmp_path / "asked", baselines="additive", **options)
    assert not (tmp_path / "asked").exists()


def test_without_conditions_all_is_pooled_and_files_of_different_generators_are_different_models(folder, tmp_path):
    other = _changed(folder, tmp_path, lambda adata: adata.uns.update(generator="other/one"))
    options = {"condition_keys": "none", "protocol": "paper", "baselines": "none"}
    rows = run_main(folder, tmp_path / "out", "generated_0.h5ad", str(other), **options)["rows"]
    assert {row["model"] for row in rows} == {"floor", "thinned", "other/one"}
    assert {row["grouping"] for row in rows} == {"pooled"}
    assert (tmp_path / "out" / "figure_other_one.png").is_file()


def test_all_four_protocols_in_one_run(folder, tmp_path):
    found = run_main(folder, tmp_path / "out", protocol="paper,log,scldm,cfgen", baselines="none")
    groupings = {(row["protocol"], row["grouping"]) for row in found["rows"] if row["protocol"] in ("scldm", "cfgen")}
    assert groupings == {("scldm", "pooled"), ("cfgen", "per_condition"), ("cfgen", "condition")}
    assert {row["condition"] for row in found["rows"] if row["protocol"] == "cfgen"} == {None, "type0", "type1"}
    assert "Mean over the 2 values of cell_type" in (tmp_path / "out" / "results.md").read_text()
    assert any(row["metric"] == "pearson_delta" and row["grouping"] == "per_condition" for row in found["rows"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_log_normalised, r"are not integers .* looks log-normalised: pass --layer counts"),
        (lambda a: a[:, 3:].copy(), r"lacks 3 of the 30 genes to compare \(GENE0000, GENE0001, GENE0002\)"),
        (lambda a: setattr(a, "var_names", ["GENE0000"] * 2 + list(a.var_names[2:])), "1 duplicate gene names"),
        (lambda a: a.obs.pop("perturbation"), r"has no obs column 'perturbation'; it has cell_type;"),
        (lambda a: a[:1].copy(), "changed.h5ad' has 1 cell; expected two or more"),
        (lambda a: a.uns.pop("generator"), r"does not say what generated it .* pass --name NAME"),
        (lambda a: a.uns.update(generator="floor"), "a row of every table; pass --name"),
        (lambda a: a.obs.__setitem__("cell_type", "hela"), "has none of the conditions of"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bad_generated_file_is_refused_and_nothing_is_written(folder, tmp_path, change, message):
    path = _changed(folder, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        run_main(folder, tmp_path / "out", str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "paper,cosine"}, "--protocol 'paper,cosine': expected one or more of paper, log"),
        ({"name": "additive"}, "'additive' is a row of every table; pass --name"),
        ({"name": "a,b,c"}, "--name 'a,b,c' holds 3 names: expected one, or one for each of 2 files"),
        ({"condition_keys": "donor"}, "has no obs column 'donor'; it has cell_type, perturbation"),
        ({"baselines": "mean"}, "--baselines 'mean': expected default, all, none, or some of independent_marginals"),
        ({"baselines": "scvi_prior"}, r"scvi-tools: pip install 'discrete-cell-models\[baselines\]'"),
        ({"baselines": "all"}, r"scvi-tools: pip install 'discrete-cell-models\[baselines\]'"),
        (
            {"protocol": "vcc2025"},
            r"--protocol vcc2025 needs the package cell-eval: pip install 'discrete-cell-models\[baselines\]'",
        ),
        ({"protocol": "cfgen", "condition_keys": "perturbation"}, "compares each cell_type by itself"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(folder, tmp_path, options, message, monkeypatch):
    find, absent = importlib.util.find_spec, ("cell_eval", "scvi")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(ValueError, match=message):
        run_main(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_compared_are_refused(folder, tmp_path):
    file, train = folder / "generated_0.h5ad", folder / "train.h5ad"
    for files, cells, message in (
        ((file, file), train, "is given more than once: expected one or more h5ad files"),
        ((), train, "no generated file given"),
        ((file,), folder / "none.h5ad", r"no file '.*none\.h5ad'; expected an h5ad file of cells"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(files, real=folder / "test.h5ad", train=cells, out=tmp_path / "out")


class StandInTable(dict):
    """In place of a polars table."""

    def filter(self, chosen):
        return StandInTable({name: column[chosen] for name, column in self.items()})


class StandInEvaluator:
    """In place of the cell-eval package: scores a perturbation by the number of its predicted cells.

    Each has one differential gene in the real cells and two in the predicted ones.
    """

    def __init__(self, *, adata_pred, adata_real, control_pert, pert_col, outdir, num_threads):
        assert not Path(outdir).exists()
        for adata in (adata_real,) if adata_pred is None else (adata_pred, adata_real):
            assert (adata.obs[pert_col] == control_pert).any()
            assert not np.array_equal(adata.X.data, np.round(adata.X.data))
        if adata_pred is not None:
            assert set(adata_pred.obs[pert_col]) == set(adata_real.obs[pert_col])
            controls = [a.X[(a.obs[pert_col] == control_pert).to_numpy()].toarray() for a in (adata_pred, adata_real)]
            assert not {tuple(cell) for cell in controls[0]} & {tuple(cell) for cell in controls[1]}
            self.sizes = adata_pred.obs[pert_col].value_counts().drop(control_pert)
            names = pd.Series(self.sizes.index.astype(str))
            tables = []
            for significant in (1, 2):
                columns = {
                    "target": names.repeat(3),
                    "fdr": pd.Series(np.tile([0.0] * significant + [1.0] * (3 - significant), len(names))),
                }
                tables.append(
                    SimpleNamespace(data=StandInTable({name: c.reset_index(drop=True) for name, c in columns.items()}))
                )
            self.de_comparison = SimpleNamespace(real=tables[0], pred=tables[1])

    def compute(self, *, profile, write_csv):
        lines = [{"perturbation": name, "size": float(size), "none": None} for name, size in self.sizes.items()]
        return SimpleNamespace(to_dicts=lambda: lines), None

    def compute_ceiling(self, *, profile, write_csv, seed):
        return None, SimpleNamespace(to_dicts=lambda: [{"size": 7.0, "none": None, "nan": float("nan")}])


def test_vcc2025_is_given_each_cell_type_with_halves_of_its_controls_and_the_packages_yardsticks(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("eval.comparison.protocols.check_installed", lambda *_: None)
    monkeypatch.setitem(sys.modules, "cell_eval", SimpleNamespace(MetricsEvaluator=StandInEvaluator))
    options = {"protocol": "vcc2025", "baselines": "additive"}
    found = run_main(folder, tmp_path / "out", "generated_0.h5ad", **options)
    ours = [row for row in found["rows"] if row["protocol"] == "vcc2025"]
    assert ours == found["rows"]
    seeds = {row["model"]: row["seeds"] for row in ours}
    assert seeds == {"floor": 10, "thinned": 1, "additive": 3, "cell_eval_mean": 1, "cell_eval_ceiling": 1}
    test = anndata.read_h5ad(folder / "test.h5ad").obs
    sizes = (test["cell_type"].astype(str) + " | " + test["perturbation"].astype(str)).value_counts()
    ceilings = [row for row in ours if row["model"] == "cell_eval_ceiling"]
    assert {(row["grouping"], row["condition"]) for row in ceilings} == {
        ("per_condition", None),
        ("context", "type0"),
        ("context", "type1"),
    }
    assert {(row["metric"], row["mean"]) for row in ceilings} == {("size", 7.0)}
    strata = [row for row in ours if row["grouping"] == "stratum" and row["model"] == "thinned"]
    assert {(row["condition"], row["metric"]) for row in strata} == {
        ("1 to 9 differential genes", metric) for metric in ("size", "differential_genes", "differential_genes_real")
    }
    for row in ours:
        if row["grouping"] == "condition" and row["metric"] == "size":
            assert row["mean"] == sizes[row["condition"].removesuffix(" (under 20 cells)")]
            assert not row["condition"].startswith("type0 | control")
        if row["metric"].startswith("differential_genes"):
            assert row["mean"] == (1 if row["metric"].endswith("real") else 2)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "by the package cell-eval (profile vcc)" in text
    assert "Perturbations with 1 to 9 differential genes:" in text


@pytest.mark.slow
def test_vcc2025_itself_scores_real_cells_above_its_mean_baseline(folder, tmp_path):
    """The package as it is: two files of thinned training cells, whose perturbations are those of the test cells."""
    pytest.importorskip("cell_eval", reason="the extra 'baselines' is not installed")
    found = run_main(folder, tmp_path / "out", protocol="vcc2025", baselines="none")
    assert found["versions"]["cell-eval"]
    ours = [row for row in found["rows"] if row["grouping"] == "per_condition"]
    means = {(row["model"], row["metric"]): row["mean"] for row in ours}
    genes = {"differential_genes", "differential_genes_real"}
    assert {metric for _, metric in means} == {"mae", "overlap_at_N", "discrimination_score_l1"} | genes
    for model in ("thinned", "floor"):
        assert means[model, "discrimination_score_l1"] > means["cell_eval_mean", "discrimination_score_l1"] + 0.1
    assert 0 < means["cell_eval_ceiling", "discrimination_score_l1"] <= 1
    assert ("cell_eval_ceiling", "mae") not in means


def test_vcc2025_means_of_training_perturbations_are_those_of_the_package(folder):
    baseline = pytest.importorskip("cell_eval._baseline", reason="the extra 'baselines' is not installed")
    generated = {folder / "generated_0.h5ad": None}
    cells = read_comparison(generated, folder / "test.h5ad", folder / "train.h5ad", reserved_names=())
    means = vcc2025.mean_cells(cells.train, cells.real)
    for cell_type in ("type0", "type1"):
        chosen = (cells.train.labels["cell_type"] == cell_type).to_numpy()
        train = anndata.AnnData(
            vcc2025.log_cp10k(cells.train.counts[chosen]).toarray(),
            obs=cells.train.labels[chosen].set_axis([str(row) for row in range(chosen.sum())]),
        )
        expected = baseline.build_base_mean_adata(train, pert_col="perturbation", control_pert="control")
        expected = expected[expected.obs["perturbation"] != "control"].X
        ours = means.counts[(means.labels["cell_type"] == cell_type).to_numpy()].toarray()
        np.testing.assert_allclose(ours[0], np.asarray(expected)[0], rtol=1e-4, atol=1e-6)
