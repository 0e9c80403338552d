"""What several test modules share: tiny models of both backbones, tiny shards by the package's own stages, Chromium."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

from eval.simulate import main as simulate
from modeling_dcm import DCMConfig, DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_esm import write_tiny_esm
from tests.tiny_training import two_steps
from training.convert_h5ad import main as convert
from training.data import shards as shard_files

torch.set_num_threads(1)

TINY = {
    "num_genes": 7,
    "max_count": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "num_latents": 5,
    "gene_output_bias": 3,
}
CONDITIONS = {
    "num_cell_types": 3,
    "num_perturbations": 4,
    "covariates": {"donor": 2, "day": 3},
    "library_size_conditioning": True,
}


def every_condition(B: int) -> dict[str, torch.Tensor]:
    """Arguments for B cells of a model with all :data:`CONDITIONS`; some labels not given, some combinations."""
    return {
        "cell_type_ids": torch.arange(B) % 4 - 1,
        "perturbation_ids": torch.stack([torch.arange(B) % 4, torch.arange(B) % 5 - 1], dim=1),
        "covariate_ids": torch.stack([torch.arange(B) % 2, torch.arange(B) % 3], dim=1),
        "library_size": torch.arange(B) * 5.0,
    }


@pytest.fixture(params=["dit", "latent"])
def backbone(request) -> str:
    """Every test that asks for it runs with both backbones."""
    return request.param


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DCMForDenoising]:
    """Factory of tiny models: ``make_model("dit", num_genes=3, fresh=True)``.

    A fresh model's zero head says nothing of its input, so all weights are random normal unless ``fresh``, keyed by
    their names; ``conditioned`` adds every condition.
    """

    def make(backbone: str = "dit", *, fresh: bool = False, conditioned: bool = False, seed: int = 0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DCMForDenoising(
                DCMConfig(backbone=backbone, **{**TINY, **(CONDITIONS if conditioned else {}), **options})
            )
        if not fresh:
            for name, parameter in model.named_parameters():
                # gates are open, and no count is almost certain
                std = 0.5 if "modulation.bias" in name else 0.1 if name.startswith("head.") else 0.3
                torch.nn.init.normal_(parameter, std=std, generator=keyed_generator(seed, zlib.crc32(name.encode())))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def cells_h5ad(tmp_path_factory) -> Path:
    """300 simulated cells of 15 genes, 2 cell types, 3 perturbations and a pair; their vectors stand beside them."""
    path = tmp_path_factory.mktemp("simulated") / "cells.h5ad"
    simulate(path, num_cells=300, num_genes=15, num_cell_types=2, num_perturbations=3, num_pairs=1, vector_dim=4)
    return path


@pytest.fixture(scope="session")
def shards(cells_h5ad, tmp_path_factory) -> Path:
    """The shards that dcm-convert makes of ``cells_h5ad``."""
    folder = tmp_path_factory.mktemp("converted")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    convert(cells_h5ad, out=folder / "shards", cell_type_key="cell_type", perturbation_key="perturbation")
    yield folder / "shards"
    patch.undo()


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory) -> Path:
    """A checkpoint with cell types, perturbations and library sizes after two steps of training."""
    return two_steps(shards, tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_checkpoint(make_model, tmp_path_factory) -> Path:
    """Random weights with every condition, as training writes a checkpoint."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", make_model("latent", conditioned=True))


@pytest.fixture(scope="session")
def block_shards(tmp_path_factory) -> Path:
    """600 cells, most of them for training: 3 files of 5 or fewer blocks of 32 cells."""
    folder = tmp_path_factory.mktemp("blocks")
    simulate(folder / "cells.h5ad", num_cells=600, num_genes=15, num_perturbations=3, num_pairs=1, vector_dim=4)
    keys = {"cell_type_key": "cell_type", "perturbation_key": "perturbation"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(shard_files, "ROW_GROUP_CELLS", 32)
        patch.setattr(shard_files, "SHARD_CELLS", 160)
        return convert(folder / "cells.h5ad", out=folder / "shards", **keys)


@pytest.fixture(scope="session")
def esm_folder(tmp_path_factory) -> Path:
    return write_tiny_esm(tmp_path_factory.mktemp("esm"))


@pytest.fixture(scope="session")
def perturbation_table(cells_h5ad) -> Path:
    """One vector of length 4 for each of the three single perturbations."""
    return cells_h5ad.with_name("cells.perturbations.safetensors")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium driven by selenium; files land in ``downloads``. Skips, saying so, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra 'dev')")
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or binary is None:
        pytest.skip("Chromium or its chromedriver is not installed")
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1280,1700")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    window.downloads = folder
    yield window
    window.quit()
