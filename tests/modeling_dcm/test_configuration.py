"""Properties of the configuration: bad values are refused with a message, ids never collide, saving loses nothing."""

from pathlib import Path

import pytest
import torch

from modeling_dcm import SIZES, DCMConfig, DCMForDenoising


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_genes": 0}, "num_genes=0, expected at least 1"),
        ({"num_cell_types": -1}, "num_cell_types=-1, expected 0 or more"),
        ({"gene_output_bias": -1}, "gene_output_bias=-1, expected 0 or more"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30, expected a multiple of the 4 heads"),
        ({"backbone": "unet"}, r"backbone='unet', expected one of \('dit', 'latent'\)"),
        ({"backbone": "latent", "num_latents": 0}, "num_latents=0, expected at least 1"),
        ({"noise_schedule": "cosine"}, "noise_schedule='cosine', expected"),
        ({"loss_weighting": "mean"}, "loss_weighting='mean', expected"),
        ({"noise_eps": 0.0}, r"noise_eps=0.0, expected in \(0, 1\)"),
        ({"dropout": 1.0}, r"dropout=1.0, expected in \[0, 1\)"),
        ({"mlp_ratio": 0}, "mlp_ratio=0, expected above 0"),
        ({"covariates": {"donor": 0}}, r"covariates\['donor'\]=0, expected at least 1 label"),
        ({"covariates": {"a": 2, "b": 2}, "covariate_order": ["b"]}, r"covariate_order=\['b'\], expected the names of"),
        ({"perturbation_dim": 8}, "num_perturbations=0, expected at least 1 when perturbation_dim is given"),
        ({"perturbation_dim": 0, "num_perturbations": 2}, "perturbation_dim=0, expected at least 1, or None"),
        ({"max_perturbations_per_cell": 0}, "max_perturbations_per_cell=0, expected"),
        ({"count_bins": []}, r"count_bins=\[\], expected ascending left edges"),
        ({"count_bins": [4, 4]}, r"count_bins=\[4, 4\], expected ascending left edges"),
        ({"count_bins": [4, 256]}, r"count_bins=\[4, 256\], expected ascending left edges in 1..255"),
    ],
)
def test_a_bad_value_is_refused_with_the_value_and_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        DCMConfig(**options)


@pytest.mark.parametrize(("max_count", "count_bins", "num_counts"), [(4, None, 5), (1, None, 2), (15, [4, 8], 6)])
def test_mask_and_pad_are_the_two_ids_after_the_counts(max_count, count_bins, num_counts):
    config = DCMConfig(max_count=max_count, count_bins=count_bins)
    assert config.num_counts == num_counts
    assert (config.mask_token_id, config.pad_token_id) == (num_counts, num_counts + 1)
    assert config.vocab_size == num_counts + 2


def test_saving_and_loading_loses_nothing(tmp_path):
    counts = {"num_genes": 7, "max_count": 15, "count_bins": [4, 8]}
    labels = {"num_cell_types": 2, "num_perturbations": 3, "covariates": {"donor": 2, "batch": 4}}
    vectors = {"perturbation_dim": 4, "perturbation_table_sha256": "0" * 64}
    curve = {"observed": [0.0, 1.0], "entropy": [1.2, 1.1]}
    config = DCMConfig(**counts, **labels, **vectors, library_size_conditioning=True, entropy_curve=curve)
    config.save_pretrained(tmp_path)
    loaded = DCMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert list(loaded.covariates) == ["donor", "batch"]
    assert loaded.condition_names == ["cell_type", "perturbation", "donor", "batch", "library_size"]
    assert DCMConfig().condition_names == []
    assert loaded.pad_token_id == 7


REPLOGLE = {"num_genes": 2_000, "num_perturbations": 2_000, "perturbation_dim": 1280}


@pytest.mark.parametrize(
    ("size", "millions", "data"),
    [
        ("5m", 5.6, {"num_genes": 17_002}),
        ("10m", 11.8, REPLOGLE | {"num_cell_types": 1}),
        ("20m", 19.7, REPLOGLE | {"num_cell_types": 4}),
    ],
)
def test_sizes_have_the_parameter_counts_that_the_readme_says(size, millions, data):
    paper = {"max_count": 1000, "backbone": "dit", "cell_summary": False, "gene_output_bias": 0}
    with torch.device("meta"):
        model = DCMForDenoising(DCMConfig(**SIZES[size], **data, **paper))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert f"{millions} M" in (Path(__file__).parents[2] / "README.md").read_text()
