"""Every option of training, its one default and its help text; configuration files and command line override them.

A YAML file in `configs/` sets some, the command line sets others, in that order.

    dcm-train --config laptop --data shards/ --out checkpoint/
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import tyro
import yaml

from tokenization.labels_dcm import unknown_label_error
from training.data import command_line

CONFIGS = Path(__file__).parent / "configs"
SHAPE_OF_SIZE = ("hidden_size", "num_hidden_layers", "num_attention_heads")
OF_PAPER = {"backbone": "dit", "count_distribution": "categorical", "state_dim": 0, "cell_summary": False}


@dataclass(frozen=True)
class TrainConfig:
    """Train a Discrete Cell Model on shards."""

    data: Path
    """Folder of shards that dcm-convert wrote, or its URL, such as hf://datasets/NAME; with streaming shards are not
    copied from there."""
    out: Path
    """Folder of the checkpoint; made if missing."""
    config: Path | None = None
    """YAML file with any of these options, or the name of one that comes with the package: demo, laptop,
    dentate-gyrus-5m, replogle-20m, replogle-k562-10m."""
    resume: bool = False
    """Go on from the newest state under OUT/checkpoints, if there is one."""
    init_from: str | None = None
    """Checkpoint folder or Hub id to start from: genes and labels are matched by name, the shape is its own."""
    perturbation_embeddings: Path | None = None
    """Safetensors table, one vector for each perturbation's name; frozen. Without it vectors are learned."""

    # network
    paper: bool = False
    """The paper's model: attention over genes, a categorical head, no cell state, no sum over observed genes."""
    size: Literal["5m", "10m", "20m"] | None = None
    """One of the paper's shapes; sets layers, width and heads."""
    backbone: Literal["dit", "latent"] = "latent"
    """dit: attention over genes (the paper's); latent: cost linear in genes."""
    hidden_size: int = 64
    """Width."""
    num_hidden_layers: int = 3
    """Blocks."""
    num_attention_heads: int = 1
    """Heads of each attention: hidden_size / 64, for attention kernels; narrower ones cost more, on a CPU too."""
    mlp_ratio: float = 4.0
    """Hidden width of the blocks' MLP over the width."""
    masked_keys: bool = True
    """In dit, genes attend to masked ones too (the paper's); False: to observed ones only, and sampling is cheaper."""
    num_latents: int = 64
    """Latents of the latent backbone."""
    dropout: float = 0.0
    """In attention and MLP."""
    cell_summary: bool = True
    """Feed the sum over observed genes to AdaLN; False is the paper's conditioning."""
    gene_output_bias: int = 64
    """Counts with a bias of their own for each gene in the head."""
    count_distribution: Literal["nb", "categorical"] = "nb"
    """nb: corrections of a negative binomial that starts at statistics; categorical: the paper's head."""
    state_dim: int = 32
    """Components of the cell state, drawn once for each cell; 0: none, as in the paper."""
    state_dropout: float = 0.15
    """Share of training cells whose state is not told."""
    keep_states: bool = True
    """Keep the states of training cells (state_dim numbers and the total of each) in the checkpoint, to draw from;
    otherwise from a mixture fitted to them."""
    conditions: str = "all"
    """Conditions to learn: all, none, or names separated by commas."""
    library_size_conditioning: bool = True
    """Tell the network each cell's total count."""
    condition_tokens: bool = False
    """Give the network one token for each condition besides AdaLN."""

    # objective
    loss_weighting: Literal["uniform", "elbo"] = "uniform"
    """uniform: every masked gene counts alike; elbo: the likelihood bound."""
    label_dropout: float = 0.1
    """Probability of dropping each condition of a cell."""
    query_genes: int | None = 128
    """Masked genes of each cell whose logits are computed; none: all. Fewer are cheaper and noisier."""

    # optimisation
    batch_size: int = 64
    """Cells of one process in one step."""
    gradient_accumulation_steps: int = 1
    """Batches summed before the optimiser steps."""
    max_steps: int = 2000
    """Steps of the optimiser."""
    max_time: float | None = None
    """Minutes after which training ends as if at max_steps; --resume goes on."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine decay to zero at max_steps, or constant."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """On matrices only."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are what is evaluated and saved."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the forward pass; default what accelerate was told, else no."""
    gradient_checkpointing: bool = False
    """Recompute activations to save memory."""
    compile: bool | None = None
    """Compile the blocks with torch.compile, for static shapes. Default: on a GPU, where that works; False: never."""
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto: the fastest that is installed and fits device and precision."""
    streaming: bool = False
    """Read shards block by block instead of from an Arrow copy in the cache: for data too large for one. Cells are then
    shuffled within a few blocks at a time, and their order depends on the number of processes."""
    seed: int = 0
    """Of weights, order of cells, noise and label dropout."""

    # what is written, and when
    log_every: int = 20
    """Steps between lines of training.jsonl."""
    validate_every: int = 250
    """Steps between validations."""
    validation_cells: int = 512
    """Validation cells looked at, at most."""
    score_every: int | None = 500
    """Steps between small scores of generated cells (W2, MMD^2, correlation slope, variance of components) beside
    validation cells; none: never."""
    score_cells: int = 256
    """Cells generated for a score, at most."""
    save_every: int = 500
    """Steps between states under OUT/checkpoints."""
    keep_last: int = 1
    """Newest states to keep."""
    keep_best: int = 1
    """States to keep besides: those whose generated cells are nearest the floor, among states saved right after a
    score (where no cells are scored, those of the lowest validation loss)."""
    trackers: str = "auto"
    """Accelerate's trackers (tensorboard, wandb, trackio, ...) by name, separated by commas; auto: tensorboard where it
    is installed; none."""

    given: Annotated[frozenset[str], tyro.conf.Fixed, tyro.conf.Suppress] = frozenset()
    """Not an option: names of those that stood on the command line or in the file, whatever their value."""

    def __post_init__(self):
        counted = ("batch_size", "gradient_accumulation_steps", "max_steps", "log_every", "validate_every")
        counted += ("validation_cells", "score_cells", "save_every", "keep_last")
        self._expect("at least 1", lambda value: value >= 1, *counted)
        self._expect("0 or more", lambda value: value >= 0, "warmup_steps", "keep_best")
        self._expect("at least 1, or none for all", lambda value: value is None or value >= 1, "query_genes")
        self._expect("at least 1, or none for never", lambda value: value is None or value >= 1, "score_every")
        self._expect("minutes above 0, or none for no limit", lambda value: value is None or value > 0, "max_time")
        self._expect("above 0", lambda value: value > 0, "learning_rate", "clip_norm")
        shares = ("ema_decay", "dropout", "label_dropout", "state_dropout")
        self._expect("in [0, 1)", lambda value: 0 <= value < 1, *shares)
        if not self.masked_keys and self.backbone == "latent":
            raise ValueError(
                "masked_keys=False contradicts backbone='latent', in which nothing attends to masked genes anyway: "
                "leave it out"
            )
        for name, value in OF_PAPER.items() if self.paper else ():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} contradicts paper, which is {value!r}: leave one out")
        heads = self.num_attention_heads
        if self.size is None:
            expected = f"a multiple of num_attention_heads={heads}"
            return self._expect(expected, lambda value: value % heads == 0, "hidden_size")
        for name in filter(self.is_set, SHAPE_OF_SIZE):
            value = getattr(self, name)
            raise ValueError(f"{name}={value} contradicts size={self.size!r}, which sets it: leave one out")
        if self.init_from is not None:
            raise ValueError(f"size={self.size!r} contradicts init_from, which brings its own shape: leave size out")

    def _expect(self, expected: str, holds: Callable[[float | None], bool], *names: str) -> None:
        for name in names:
            if not holds(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}, expected {expected}")

    @property
    def shards(self) -> Path:
        """``data``, or where that is a URL the local folder that stands for it."""
        from training.data.shards import local_folder

        return local_folder(self.data)

    def is_set(self, name: str) -> bool:
        """Whether an option was given, be it with the value of its default."""
        return name in self.given or getattr(self, name) != getattr(TrainConfig, name)

    def options(self) -> dict[str, object]:
        """The value of each option by its name, paths as text."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def check_files(self) -> None:
        """Raise FileNotFoundError if there are no shards in ``data``, or no table of perturbations where one is said
        to be."""
        if not (self.shards / "tokenizer").is_dir():
            raise FileNotFoundError(f"no tokenizer/ in {str(self.data)!r}; expected a folder that dcm-convert wrote")
        table = self.perturbation_embeddings
        if table is not None and not table.is_file():
            raise FileNotFoundError(f"no perturbation table {str(table)!r}; expected safetensors, a vector per name")


OPTIONS = {field.name: field.type for field in fields(TrainConfig) if field.name != "given"}


def parse(arguments: list[str]) -> TrainConfig:
    """Read options from the command line; those of ``--config`` and then the defaults stand where it says nothing."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--size")
    first.add_argument("--paper", action="store_true")
    known, _ = first.parse_known_args(arguments)
    from_file = read_config(known.config) if known.config else {}
    if known.size and known.size.lower() != "none":  # the command line's size wins over the file's shape
        from_file = {name: value for name, value in from_file.items() if name not in SHAPE_OF_SIZE}
    if known.paper:  # likewise
        from_file = {name: value for name, value in from_file.items() if name not in OF_PAPER}
    of_paper = {**OF_PAPER, "paper": True} if known.paper or from_file.get("paper") else {}
    options = {"data": tyro.MISSING, "out": tyro.MISSING, **of_paper, **from_file}
    defaults = TrainConfig(**options, given=frozenset(from_file))
    config = command_line.parse(TrainConfig, arguments=arguments, default=replace(defaults, given=frozenset()))
    words = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in arguments if word[:2] == "--"]
    words = [word if word in OPTIONS else word.removeprefix("no_") for word in words]
    return replace(config, given=frozenset({*from_file, *words}))


def read_config(path: Path) -> dict[str, object]:
    """Read the options of a YAML file, or of the one in :data:`CONFIGS` that has this name."""
    shipped = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    path = path if path.is_file() else shipped.get(str(path), path)
    if not path.is_file():
        known = [*shipped, *map(str, sorted(path.parent.glob("*.yaml")))]
        raise FileNotFoundError(f"no config file {str(path)!r}; there are: {', '.join(known)}")
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{str(path)!r} holds {type(options).__name__}, expected a mapping of options")
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{str(path)!r}: {unknown_label_error('option', [str(name)], list(OPTIONS))}")
    return {name: _typed(path, name, value, OPTIONS[name]) for name, value in options.items()}


def _typed(path: Path, name: str, value: object, annotation: object) -> object:
    """The value of a YAML file as the option's type; YAML reads paths, and numbers such as 2e-3, as text."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is Path and isinstance(value, str):
            return Path(value)
        elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        elif type(value) is kind:
            return value
    expected = " or ".join(str(get_args(kind) or kind.__name__) for kind in kinds).replace("NoneType", "null")
    raise ValueError(f"{str(path)!r}: {name}={value!r}, expected {expected}")
