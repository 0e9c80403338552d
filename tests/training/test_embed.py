"""Properties of dcm-embed: every name gets its vector or is named, nothing is invented, and training hears of it."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from eval.sample import main as sample
from modeling_dcm import DCMForDenoising
from tests.tiny_esm import D, proteins_of, write_fasta
from tests.tiny_training import tiny_training
from tokenization import DCMTokenizer
from training.convert_h5ad import main as convert
from training.data.loader import Cells
from training.embed_perturbations import main, perturbation_names
from training.loop.start import build_tokenizer
from training.perturbations.vectors import coexpression_vectors, read_table, write_table
from training.train import main as train


@pytest.fixture
def fasta(shards, tmp_path) -> Path:
    """A protein for each perturbation of the simulated shards."""
    records = {f"{name} simulated": seq for name, seq in zip(perturbation_names(shards), proteins_of([30, 21, 44]))}
    return write_fasta(tmp_path / "proteins.fasta", records)


def test_names_are_those_of_the_shards_of_a_checkpoint_or_of_a_file_without_the_control(shards, tmp_path):
    singles = [name for name in DCMTokenizer.from_pretrained(shards / "tokenizer").perturbations if name != "control"]
    assert perturbation_names(shards) == perturbation_names(shards / "tokenizer") == singles
    (tmp_path / "names.txt").write_text("B\n\nA\nB\n")
    assert perturbation_names(tmp_path / "names.txt") == ["A", "B"]
    with pytest.raises(FileNotFoundError, match="expected shards of dcm-convert, a checkpoint, or a file of names"):
        perturbation_names(tmp_path / "nothing")


def test_every_perturbation_but_the_control_gets_a_vector_and_the_file_says_from_what(
    esm_folder, shards, fasta, tmp_path
):
    out = main(shards, tmp_path / "table.safetensors", proteins=fasta, model=str(esm_folder))
    table = load_file(out)
    assert list(table) == perturbation_names(shards)
    assert all(vector.shape == (D,) and vector.dtype == torch.float32 for vector in table.values())
    with safe_open(out, "pt") as file:
        assert '"proteins": "proteins.fasta"' in file.metadata()["dcm_embed"]
    again = main(shards, tmp_path / "again.safetensors", proteins=fasta, model=str(esm_folder))
    assert again.read_bytes() == out.read_bytes()


def test_a_name_without_a_protein_is_an_error_or_marked_and_never_zeros(esm_folder, shards, fasta, tmp_path, caplog):
    names = perturbation_names(shards)
    fasta.write_text(fasta.read_text().replace(names[1], "NOTHING"))
    out = tmp_path / "table.safetensors"
    with pytest.raises(ValueError, match=rf"1 of 3 perturbations have no protein in .*: {names[1]}; --allow-missing"):
        main(shards, out, proteins=fasta, model=str(esm_folder))
    other = write_fasta(tmp_path / "other.fasta", {"P1": "MKV"})
    with pytest.raises(ValueError, match=r"3 of 3 perturbations have no protein .*are the names of the same kind"):
        main(shards, out, proteins=other, model=str(esm_folder), allow_missing=True)
    assert not out.exists()
    main(shards, out, proteins=fasta, model=str(esm_folder), allow_missing=True)
    assert f"get a learned vector in training: {names[1]}" in caplog.text
    table = read_table(out, "control")
    assert (table.vectors.keys(), table.without_vector, table.dim) == ({names[0], names[2]}, {names[1]}, D)
    assert list(load_file(out)) == [names[0], names[2]]
    save_file(table.vectors, out)  # nobody says that the name was not forgotten
    said = f"no vector for 1 of 4 training perturbations: {names[1]}; dcm-embed --allow-m"
    with pytest.raises(ValueError, match=said):
        train(tiny_training(shards, tmp_path / "checkpoint", perturbation_embeddings=out))


def written(vectors: dict[str, torch.Tensor], path: Path) -> str:
    """A file of the kind that its name says, and what --from is given."""
    frame = pd.DataFrame({name: vector.numpy() for name, vector in vectors.items()}).T
    if path.suffix == ".h5ad":
        anndata.AnnData(frame.to_numpy() * 0, obs=frame[[]], obsm={"X_gene": frame.to_numpy()}).write_h5ad(path)
        return f"{path}:X_gene"
    {
        ".pt": lambda: torch.save(vectors, path),
        ".safetensors": lambda: save_file(vectors, path),
        ".npz": lambda: np.savez(path, **{name: vector.numpy() for name, vector in vectors.items()}),
        ".json": lambda: path.write_text(json.dumps({name: vector.tolist() for name, vector in vectors.items()})),
        ".csv": lambda: frame.to_csv(path),
        ".tsv": lambda: frame.to_csv(path, sep="\t"),
        ".parquet": lambda: frame.set_axis([f"c{i}" for i in frame], axis=1).to_parquet(path),
    }[path.suffix]()
    return str(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".json", ".csv", ".tsv", ".parquet", ".h5ad"])
def test_vectors_of_a_file_are_taken_by_name(shards, perturbation_table, tmp_path, suffix):
    vectors = load_file(perturbation_table)
    more = {**vectors, "control": torch.ones(4), "NOT_ASKED_FOR": torch.ones(4)}
    source = written(more, tmp_path / f"vectors{suffix}")
    table = load_file(main(shards, tmp_path / "table.safetensors", source))
    assert table.keys() == vectors.keys()
    for name, vector in vectors.items():
        torch.testing.assert_close(table[name], vector)


def test_several_tables_are_whitened_and_joined_and_what_one_lacks_is_marked(
    shards, perturbation_table, tmp_path, caplog
):
    caplog.set_level("INFO")
    vectors = load_file(perturbation_table)
    first, *rest = sorted(vectors)
    part = {name: 7 * vectors[name][:3] for name in rest}
    sources = (written(vectors, tmp_path / "a.csv"), written(part, tmp_path / "b.npz"))
    table = load_file(main(shards, tmp_path / "table.safetensors", sources))
    matrix = torch.stack([table[name] for name in (first, *rest)])
    assert torch.equal(matrix[:, -1], torch.tensor([0.0, 1, 1]))
    assert not matrix[0, 3:].any()  # the second table has a component for its two names, and the mark
    for columns, rows in ((matrix[:, :2], 3), (matrix[1:, 3:-1], 2)):
        assert columns.square().sum() / rows == pytest.approx(1)
        torch.testing.assert_close(columns.sum(dim=0), torch.zeros(columns.shape[1]), atol=1e-6, rtol=0)
    assert "all of them: leaving one of 3 training perturbations out" in caplog.text


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_would_run_code_or_hold_vectors_that_cannot_be_used_are_refused(
    shards, perturbation_table, tmp_path
):
    vectors, path, out = load_file(perturbation_table), tmp_path / "vectors.safetensors", tmp_path / "table.safetensors"
    save_file({**vectors, next(iter(vectors)): torch.ones(5)}, path)
    with pytest.raises(ValueError, match=r"the table holds vectors of lengths \[4, 5\]"):
        main(shards, out, str(path))
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor.pt.* cannot be read .*expected safetensors, .npz"):
        main(shards, out, str(tmp_path / "tensor.pt"))
    torch.save({"A": Attack(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"cannot be read .*expected safetensors, \.npz"):
        main(shards, out, str(tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


def test_options_that_contradict_each_other_and_files_that_are_not_there_are_refused(shards, fasta, tmp_path):
    out = tmp_path / "table.safetensors"
    with pytest.raises(ValueError, match="--proteins is None with --from proteins; expected a FASTA file"):
        main(shards, out)
    with pytest.raises(ValueError, match="with --from coexpression; expected a FASTA file with --from proteins"):
        main(shards, out, "coexpression", proteins=fasta)
    with pytest.raises(FileNotFoundError, match="--from expects proteins, coexpression, or a file with vectors"):
        main(shards, out, "vectors.npz")
    with pytest.raises(FileNotFoundError, match="--proteins: no file or folder 'nothing"):
        main(shards, out, proteins=Path("nothing.fasta"))
    with pytest.raises(ValueError, match="is a folder; expected the name of a safetensors file to write"):
        main(shards, tmp_path, proteins=fasta)


def test_coexpression_is_deterministic_and_needs_the_gene_in_the_panel(shards, tmp_path):
    files = [main(shards, tmp_path / name, "coexpression", components=5) for name in ("a.safetensors", "b.safetensors")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert list(load_file(files[0])) == perturbation_names(shards)
    (tmp_path / "names.txt").write_text(f"{perturbation_names(shards)[0]}\nELSEWHERE\n")
    options = {"source": "coexpression", "shards": shards, "components": 5}
    with pytest.raises(ValueError, match=r"1 of 2 perturbations have no gene that is in the panel .*: ELSEWHERE"):
        main(tmp_path / "names.txt", tmp_path / "c.safetensors", **options)
    with pytest.raises(ValueError, match="is a file of names; coexpression needs --shards"):
        main(tmp_path / "names.txt", tmp_path / "c.safetensors", "coexpression")


def test_coexpression_is_the_loadings_of_a_principal_component_analysis_of_the_training_controls(shards):
    train = anndata.read_h5ad(shards / "train.h5ad")
    controls = train[train.obs["perturbation"] == "control"]
    counts = controls.X.toarray().astype(float)
    logs = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    for cell_type in controls.obs["cell_type"].unique():
        of_type = (controls.obs["cell_type"] == cell_type).to_numpy()
        logs[of_type] -= logs[of_type].mean(axis=0)
    oracle = PCA(5, svd_solver="full").fit(logs)
    expected = oracle.components_.T * np.sqrt(oracle.explained_variance_)
    expected *= np.sign(expected[np.abs(expected).argmax(axis=0), range(5)])
    expressed = counts.any(axis=0)
    expected = expected[expressed] / np.sqrt((expected[expressed] ** 2).mean())
    vectors = coexpression_vectors(Cells(shards, "train"), 5)
    assert list(vectors) == list(train.var_names[expressed])
    assert np.allclose(list(vectors.values()), expected, atol=1e-4)


def test_coexpression_of_held_out_cells_and_too_many_components_are_refused(shards):
    with pytest.raises(ValueError, match="coexpression of the test split; expected train: other cells are held out"):
        coexpression_vectors(Cells(shards, "test"), 5)
    with pytest.raises(ValueError, match="components is 15; expected 1 to 14"):
        coexpression_vectors(Cells(shards, "train"), 15)


def load_checkpoint(folder: Path) -> tuple[DCMForDenoising, DCMTokenizer]:
    return DCMForDenoising.from_pretrained(folder).eval(), DCMTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits_of(model: DCMForDenoising, tokenizer: DCMTokenizer, name: str) -> torch.Tensor:
    """Of a cell of which nothing is known but its perturbation (1, 15, K+1)."""
    inputs = torch.full((1, 15), tokenizer.mask_token_id)
    return model(inputs, perturbation_ids=tokenizer.perturbation_ids([name])).logits


@pytest.fixture(scope="module")
def held_out_shards(cells_h5ad, tmp_path_factory) -> tuple[Path, str]:
    """Shards of which no training cell has a certain perturbation, and its name."""
    labels = anndata.read_h5ad(cells_h5ad).obs["perturbation"].astype(str)
    held_out = min({name for label in labels for name in label.split("+")} - {"control"})
    out = tmp_path_factory.mktemp("held_out") / "shards"
    keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation"}
    convert(cells_h5ad, out=out, split="held-out-perturbations", held_out=held_out, **keys)
    return out, held_out


@pytest.mark.slow
def test_from_proteins_to_cells_of_a_perturbation_held_out_of_training(esm_folder, held_out_shards, tmp_path, caplog):
    shards, held_out = held_out_shards
    names, runs = perturbation_names(shards), []
    for seed in (0, 1):
        fasta = write_fasta(tmp_path / f"{seed}.fasta", dict(zip(names, proteins_of([30, 21, 44], seed))))
        table = main(shards, tmp_path / f"{seed}.safetensors", proteins=fasta, model=str(esm_folder))
        options = {"max_steps": 20, "warmup_steps": 0, "learning_rate": 1e-2}  # enough to hear of the conditions
        runs.append(train(tiny_training(shards, tmp_path / str(seed), perturbation_embeddings=table, **options)))
    sample(str(runs[0]), out=tmp_path / "cells.h5ad", like=shards / "test.h5ad", steps=2)
    cells, test = anndata.read_h5ad(tmp_path / "cells.h5ad"), anndata.read_h5ad(shards / "test.h5ad")
    assert held_out in set(cells.obs["perturbation"])
    assert cells.uns["dcm_perturbations_without_cells"].tolist() == [held_out]
    assert f"all that is known is their vector: ['{held_out}']" in caplog.text
    assert cells.obs["perturbation"].astype(str).tolist() == test.obs["perturbation"].astype(str).tolist()
    assert cells.X.sum() > 0
    first, other = (logits_of(*load_checkpoint(run), held_out) for run in runs)
    assert (first - other).abs().max() > 1e-4


@pytest.fixture(scope="module")
def without_protein(esm_folder, shards, tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint that was trained with a table in which one perturbation has no vector, and that name."""
    folder = tmp_path_factory.mktemp("missing")
    first, missing, last = perturbation_names(shards)
    fasta = write_fasta(folder / "p.fasta", dict(zip((first, last, "UNSEEN"), proteins_of([30, 21, 44]))))
    (folder / "names.txt").write_text("\n".join([first, missing, last, "UNSEEN", "NOWHERE"]))
    options = {"proteins": fasta, "model": str(esm_folder), "allow_missing": True}
    table = main(folder / "names.txt", folder / "table.safetensors", **options)
    options = {"perturbation_embeddings": table, "max_steps": 4, "learning_rate": 1e-2}
    return train(tiny_training(shards, folder / "run", **options)), missing


def test_a_learned_vector_is_one_of_its_own_and_survives_saving_and_new_perturbations(without_protein, tmp_path):
    folder, missing = without_protein
    model, tokenizer = load_checkpoint(folder)
    encoder = model.conditions.perturbation
    with_vector = {name for name, has in zip(tokenizer.perturbations, encoder.has_vector) if has}
    assert "UNSEEN" in with_vector
    assert with_vector == set(tokenizer.perturbations) - {"control", missing}
    learned = logits_of(model, tokenizer, missing)
    for other in ("control", None, "UNSEEN"):
        assert (learned - logits_of(model, tokenizer, other)).abs().max() > 1e-4
    new = {"NEW": torch.ones(D)}
    ids = tokenizer.add_perturbations(new)
    model.add_perturbations(new, tokenizer.target_gene_ids[ids])
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    model, tokenizer = load_checkpoint(tmp_path / "saved")
    torch.testing.assert_close(logits_of(model, tokenizer, missing), learned, atol=1e-5, rtol=0)
    sample(str(tmp_path / "saved"), out=tmp_path / "cells.h5ad", num_cells=5, perturbation=f"{missing}+NEW", steps=2)
    cells = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.shape == (5, 15)
    assert cells.uns["dcm_perturbations_without_cells"].tolist() == ["NEW"]
    with pytest.raises(ValueError, match="unknown perturbation 'NOWHERE'"):  # it has neither a vector nor a cell
        tokenizer.conditions(perturbation="NOWHERE")


def test_a_perturbation_with_neither_vector_nor_training_cell_is_not_known(held_out_shards, tmp_path, caplog):
    shards, held_out = held_out_shards
    first, *others = sorted(set(perturbation_names(shards)) - {held_out})
    write_table({name: torch.ones(3) for name in others}, tmp_path / "t.safetensors", {}, [first, held_out])
    config = tiny_training(shards, tmp_path / "run", perturbation_embeddings=tmp_path / "t.safetensors")
    assert set(build_tokenizer(config).perturbations) == {"control", first, *others}
    said = f"1 perturbations have neither a vector nor a training cell, and the model will not know them: {held_out}"
    assert said in caplog.text
