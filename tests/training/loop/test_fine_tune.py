"""Properties of training that starts from a checkpoint: what is known is kept, what is new is counted."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator, mask_counts
from tests.tiny_training import tiny_training
from tokenization import DCMTokenizer
from training.config import TrainConfig
from training.convert_h5ad import main as convert
from training.data.loader import Cells
from training.loop.accelerator import build_accelerator
from training.loop.fine_tune import load_source, merged_tokenizer, shaped_like
from training.loop.resume import run_facts
from training.loop.run import prepare_start
from training.loop.start import build_model, build_tokenizer
from training.perturbations.vectors import write_table
from training.train import main

SEVERAL = {"gene_output_bias": 6, "batch_size": 16, "max_steps": 40, "learning_rate": 1e-2, "save_every": 50}


@pytest.fixture(scope="module", params=["latent", "dit"])
def trained(request, shards, tmp_path_factory) -> TrainConfig:
    out = tmp_path_factory.mktemp("runs") / "old"
    config = tiny_training(shards, out, backbone=request.param, **SEVERAL)
    main(config)
    return config


@pytest.fixture(scope="module")
def make_shards(cells_h5ad, tmp_path_factory):
    """Shards of the same cells with half of the genes new, other labels beside the old ones, and deeper counts."""

    def make(factor: int = 1, cell_type_key: str | None = "cell_type") -> Path:
        adata = anndata.read_h5ad(cells_h5ad)
        names = adata.var_names.to_list()
        adata.var_names = [*names[:8], *(f"new{i}" for i in range(len(names) - 8))]
        adata = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
        adata.X = adata.X * factor
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace({"type0": "other"})
        folder = tmp_path_factory.mktemp("new")
        adata.write_h5ad(folder / "cells.h5ad")
        out = folder / "shards"
        convert(folder / "cells.h5ad", out=out, cell_type_key=cell_type_key, perturbation_key="perturbation")
        return out

    return make


def started(config: TrainConfig) -> tuple[DCMForDenoising, DCMTokenizer]:
    accelerator, facts = build_accelerator(config), run_facts(config, 1)
    model, tokenizer, _, _ = prepare_start(replace(config, attn="sdpa"), accelerator, facts)
    return model.eval(), tokenizer


@torch.no_grad()
def nats(model, tokenizer, genes: list[str], counts: torch.Tensor, labels: dict[str, str]) -> torch.Tensor:
    """Cross-entropies of half of the genes given the other half, for cells that have these ``genes`` only."""
    conditions = tokenizer.conditions(num_cells=len(counts), **labels)
    conditions.pop("num_cells")
    gene_ids = torch.tensor([tokenizer.genes.index(gene) for gene in genes])
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    k = torch.full((len(counts),), len(genes) // 2)
    masked = mask_counts(counts, k, keyed_generator(0, 0), **special)
    distribution = model.distribution(masked, gene_ids, library_size=counts.sum(dim=1).float(), **conditions)
    return distribution.cross_entropy(counts)[masked == tokenizer.mask_token_id]


def known_cells(old: DCMTokenizer, new: DCMTokenizer) -> tuple[list[str], torch.Tensor]:
    """Genes of both tokenizers, and twelve cells of these."""
    genes = [gene for gene in old.genes if gene in new.genes]
    return genes, torch.randint(0, old.max_count + 1, (12, len(genes)), generator=keyed_generator(1, 0)) // 3


def started_from(trained: TrainConfig, data: Path, tmp_path: Path, **options) -> TrainConfig:
    options = {"backbone": trained.backbone, "gene_output_bias": trained.gene_output_bias, **options}
    return tiny_training(data, tmp_path / "new", init_from=str(trained.out), **options)


def old_and_new(trained: TrainConfig, data: Path, tmp_path: Path, **options):
    old = (DCMForDenoising.from_pretrained(trained.out), DCMTokenizer.from_pretrained(trained.out))
    new = started(started_from(trained, data, tmp_path, **options))
    return old, new


@pytest.mark.parametrize(
    ("labels", "lacking"),
    [
        ({}, {}),
        ({"cell_type": "type1", "perturbation": "control"}, {}),
        ({"perturbation": "control"}, {"cell_type_key": None}),
    ],
)
def test_half_new_genes_and_new_labels_start_at_the_old_loss_on_the_old_ones(
    trained, make_shards, tmp_path, labels, lacking
):
    """Also where the new data lack a condition: it stays at not given."""
    old, new = old_and_new(trained, make_shards(**lacking), tmp_path)
    genes, counts = known_cells(old[1], new[1])
    assert len(genes) == 8
    assert new[1].max_count == old[1].max_count
    torch.testing.assert_close(
        nats(*new, genes, counts, labels), nats(*old, genes, counts, labels), atol=1e-4, rtol=1e-4
    )


def test_larger_counts_start_near_the_old_loss_and_can_be_drawn(trained, make_shards, tmp_path):
    old, new = old_and_new(trained, make_shards(factor=3), tmp_path)
    assert new[1].max_count > 2 * old[1].max_count
    genes, counts = known_cells(old[1], new[1])
    labels = {"cell_type": "type1", "perturbation": "control"}
    before, after = (nats(*which, genes, counts, labels).mean().item() for which in (old, new))
    assert after == pytest.approx(before, abs=0.15)
    cells = new[0].generate(**new[1].conditions(num_cells=50), steps=3)
    assert cells.max() > old[1].max_count


def test_new_genes_start_at_the_checkpoints_depth_and_known_ones_keep_their_means(trained, make_shards, tmp_path):
    """Cells sequenced three times as deep say the same of the new genes."""
    old, new = old_and_new(trained, make_shards(), tmp_path)
    deep, tokenizer = started(started_from(trained, make_shards(factor=3), tmp_path))
    assert tokenizer.genes == new[1].genes
    means, of_deep = (model.totals.gene_mean[-1] for model in (new[0], deep))
    known = [tokenizer.genes.index(gene) for gene in old[1].genes if gene in tokenizer.genes]
    before = old[0].totals.gene_mean[-1, [old[1].genes.index(tokenizer.genes[gene]) for gene in known]]
    assert torch.equal(means[known], before)
    torch.testing.assert_close(of_deep, means, rtol=1e-4, atol=1e-6)


def test_a_run_says_what_is_new_trains_resumes_and_can_be_loaded(trained, make_shards, tmp_path, caplog):
    config = started_from(trained, make_shards(), tmp_path, max_steps=4, save_every=2)
    with caplog.at_level(logging.INFO):
        main(config)
    assert "genes: 8 known and 7 new, 7 of the checkpoint left out; cell types: 2 known and 1 new" in caplog.text
    tokenizer, model = DCMTokenizer.from_pretrained(config.out), DCMForDenoising.from_pretrained(config.out)
    assert tokenizer.cell_types == ["type0", "type1", "other"]
    assert model.config.hidden_size == 16
    assert model.generate(**tokenizer.conditions(cell_type="other", num_cells=2), steps=2).shape == (2, 15)
    assert load_file(config.out / "model.safetensors")
    options = json.loads((config.out / "training_options.json").read_text())
    assert options["init_from"] == str(trained.out)
    main(replace(config, resume=True, init_from=None))


def test_another_shape_than_the_checkpoints_is_a_contradiction(trained, tmp_path):
    config = started_from(trained, trained.data, tmp_path)
    given = {"hidden_size": 32}, {"hidden_size": 64, "given": frozenset({"hidden_size"})}  # 64 is the default
    for options in given:
        with pytest.raises(ValueError, match=r"hidden_size=\d\d contradicts init_from, whose checkpoint has 16"):
            main(replace(config, **options))
    source = load_source(str(trained.out))
    other = {"latent": "dit", "dit": "latent"}[trained.backbone]
    asked = replace(config, backbone=other, given=frozenset({"backbone"}))
    with pytest.raises(ValueError, match=f"backbone='{other}' contradicts init_from, whose checkpoint has"):
        shaped_like(asked, source)
    given = frozenset({"library_size_conditioning"})
    source.model.config.library_size_conditioning = False
    assert shaped_like(replace(config, given=given), source).library_size_conditioning
    assert not shaped_like(config, source).library_size_conditioning


@pytest.fixture(scope="module")
def trained_with_a_table(shards, perturbation_table, tmp_path_factory) -> TrainConfig:
    """Frozen vectors for all training perturbations but the first, which learned one."""
    folder = tmp_path_factory.mktemp("with_table")
    vectors = load_file(perturbation_table)
    first = min(vectors)
    del vectors[first]
    write_table(vectors, folder / "table.safetensors", {}, [first])
    config = tiny_training(shards, folder / "old", perturbation_embeddings=folder / "table.safetensors", max_steps=4)
    main(config)
    return config


def test_vectors_of_the_checkpoint_are_kept_and_a_new_table_gives_one_to_what_had_learned_its_own(
    trained_with_a_table, perturbation_table, tmp_path
):
    config = trained_with_a_table
    old, new = old_and_new(config, config.data, tmp_path)
    assert new[1].perturbations == old[1].perturbations
    for name in ("table", "has_vector", "learned.weight"):
        before, after = (model.conditions.perturbation.state_dict()[name] for model, _ in (old, new))
        assert torch.equal(after, before), name
    assert old[0].conditions.perturbation.has_vector.sum() == len(old[1].perturbations) - 2  # the first and the control
    vectors = load_file(perturbation_table)
    model, tokenizer = started(started_from(config, config.data, tmp_path, perturbation_embeddings=perturbation_table))
    encoder, row = model.conditions.perturbation, tokenizer.perturbations.index(min(vectors))
    assert (bool(old[0].conditions.perturbation.has_vector[row]), bool(encoder.has_vector[row])) == (False, True)
    assert torch.equal(encoder.table[row], vectors[min(vectors)])


def test_new_perturbations_without_a_frozen_vector_are_named(trained_with_a_table, shards, tmp_path, caplog):
    old = trained_with_a_table
    source = load_source(str(old.out))
    left_out = source.tokenizer.perturbations[1]
    position = source.tokenizer.perturbations.index(left_out)
    source.tokenizer.perturbations[position] = "ELSEWHERE"
    config = started_from(old, shards, tmp_path)
    tokenizer = merged_tokenizer(build_tokenizer(config), source.tokenizer)
    model = build_model(shaped_like(config, source), tokenizer, Cells(shards, "train", tokenizer), source)
    said = "1 new perturbations have no frozen vector and learn one (a table from dcm-embed"
    assert [message.endswith(left_out) for message in caplog.messages if message.startswith(said)] == [True]
    assert not model.conditions.perturbation.has_vector[tokenizer.perturbations.index(left_out)]
    assert model.config.perturbations_without_cells == []  # the source knows ELSEWHERE from its cells
    source.model.config.perturbations_without_cells = [position]
    model = build_model(shaped_like(config, source), tokenizer, Cells(shards, "train", tokenizer), source)
    assert model.config.perturbations_without_cells == [tokenizer.perturbations.index("ELSEWHERE")]


def test_what_is_no_checkpoint_or_shares_no_gene_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"init_from='.*nothing' is no checkpoint"):
        load_source(str(tmp_path / "nothing"))
    old, new = (DCMTokenizer(genes=[f"{kind}{i}" for i in range(3)], max_count=3) for kind in "ab")
    with pytest.raises(ValueError, match=r"no gene of the shards \(b0, b1, b2\) is in the checkpoint \(a0,"):
        merged_tokenizer(new, old)
    binned = DCMTokenizer(genes=old.genes, max_count=9, count_bins=[4])
    with pytest.raises(ValueError, match=r"count bins \(4, 9\) in the shards and None in the checkpoint"):
        merged_tokenizer(binned, old)
