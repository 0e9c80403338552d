"""Every number that changes the weights or the maths of a Discrete Cell Model, checked when it is set."""

from itertools import pairwise

from transformers import PreTrainedConfig

# The paper's three models. `5m` is the released unconditional configuration, `10m` the one shape that Table 4 prints,
# `20m` ours: the paper gives a parameter count and no shape. Its heads are 64 wide, which GPUs' attention kernels want.
SIZES: dict[str, dict[str, int]] = {
    "5m": {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4},
    "10m": {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 8},
    "20m": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6},
}

BACKBONES = ("dit", "latent")
NOISE_SCHEDULES = ("log_linear",)
LOSS_WEIGHTINGS = ("uniform", "elbo")
COUNT_DISTRIBUTIONS = ("categorical", "nb")


class DCMConfig(PreTrainedConfig):
    """Configuration of :class:`DCMForDenoising`.

    Raises:
        ValueError: a value is out of range; the message shows the value and what was expected.
    """

    model_type = "dcm"

    num_genes: int = 500  # G, genes of the panel
    max_count: int = 255  # K, the largest count; id of a count is the count itself
    count_bins: list[int] | None = None  # ascending left edges of the last bins; None: every count is exact
    hidden_size: int = 128  # D, width
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    mlp_ratio: int | float = 4  # width of the blocks' hidden layer over D
    dropout: int | float = 0.0  # in attention and MLP
    backbone: str = "dit"  # "dit": attention over genes (the paper); "latent": cost linear in genes
    masked_keys: bool = True  # in "dit", genes attend to masked ones too (the paper); False: only to observed ones
    num_latents: int = 64  # learned latents of the "latent" backbone
    num_cell_types: int = 0  # 0: the condition does not exist; likewise below
    num_perturbations: int = 0  # single perturbations, the control among them
    perturbation_dim: int | None = None  # width of the frozen vectors (ESM-2: 1280); None: a learned table
    perturbation_table_sha256: str | None = None  # of the file that the frozen vectors came from
    perturbations_without_cells: list[int] | None = None  # ids whose frozen vector no training cell had
    covariates: dict[str, int] | None = None  # {name: number of labels}
    covariate_order: list[str] | None = None  # columns of covariate_ids; a file of JSON does not keep a mapping's order
    library_size_conditioning: bool = False
    condition_tokens: bool = False  # prepend one token for each condition
    cell_summary: bool = True  # the sum over observed genes is one more condition; False: the paper's conditioning
    gene_output_bias: int = 64  # columns of the head's bias for each gene: counts below have their own; 0: none
    count_distribution: str = "categorical"  # the paper's head; "nb": corrections of a negative binomial
    state_dim: int = 0  # d, components of the cell state; 0: the paper's conditioning
    state_mixture: int = 20  # components of the mixture that states are drawn from, for each cell type
    state_groups: int = 0  # groups of conditions with a mean state of their own
    state_bank: int = 0  # states of training cells that are kept; 0: none
    effect_groups: int = 0  # rows of effects of perturbations; 0: none are known
    label_dropout: int | float = 0.1  # probability of dropping each condition in training
    noise_schedule: str = "log_linear"
    noise_eps: int | float = 1e-3
    loss_weighting: str = "uniform"
    entropy_curve: dict[str, list[float]] | None = None  # {"observed": j, "entropy": h(j)}, nats per gene
    library_size_groups: int = 0  # rows of the buffer of library-size quantiles
    loss_still_falling: int | float | None = None  # validation loss per 1,000 steps, when training ended too early
    label_groups: int = 0  # rows of the buffer that counts the training cells of each combination of labels
    max_perturbations_per_cell: int = 2  # widest combination among those rows

    def __post_init__(self, **kwargs):
        self.covariates = dict(self.covariates or {})
        self.covariate_order = list(self.covariates if self.covariate_order is None else self.covariate_order)
        names = sorted(self.covariates)
        is_order = sorted(self.covariate_order) == names
        _expect(is_order, "covariate_order", self.covariate_order, f"the names of covariates {names}")
        self.covariates = {name: self.covariates[name] for name in self.covariate_order}
        kwargs["pad_token_id"] = None
        super().__post_init__(**kwargs)
        self._check()
        self.pad_token_id = self.num_counts + 1

    @property
    def num_counts(self) -> int:
        """Outputs of the head: ids 0..K, or fewer when large counts share bins."""
        if self.count_bins is None:
            return self.max_count + 1
        return self.count_bins[0] + len(self.count_bins)

    @property
    def num_small(self) -> int:
        """S, counts with a logit of their own in the head's first stage; all of them where there is one stage."""
        columns = min(self.gene_output_bias, self.num_counts)
        return columns - 1 if 0 < columns < self.num_counts else self.num_counts

    @property
    def mask_token_id(self) -> int:
        return self.num_counts

    @property
    def vocab_size(self) -> int:
        """Count ids, MASK and PAD."""
        return self.num_counts + 2

    @property
    def condition_names(self) -> list[str]:
        """Conditions that the network knows, in the order in which they are concatenated."""
        names = ["cell_type"] if self.num_cell_types else []
        names += ["perturbation"] if self.num_perturbations else []
        names += list(self.covariates)
        return names + (["library_size"] if self.library_size_conditioning else [])

    @property
    def state_width(self) -> int:
        """Numbers of a cell's state, E: d, and the depth where no library size tells it; 0 without a state."""
        return self.state_dim + (not self.library_size_conditioning) if self.state_dim else 0

    def _check(self) -> None:
        at_least_one = ("num_genes", "max_count", "max_perturbations_per_cell", "num_latents")
        for name in (*at_least_one, "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_cell_types", "num_perturbations", "gene_output_bias", "library_size_groups", "label_groups"):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        heads = self.num_attention_heads
        _expect(self.hidden_size % heads == 0, "hidden_size", self.hidden_size, f"a multiple of the {heads} heads")
        for name in ("state_dim", "state_groups", "state_bank", "effect_groups"):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        known = COUNT_DISTRIBUTIONS
        _expect(self.count_distribution in known, "count_distribution", self.count_distribution, f"one of {known}")
        _expect(self.state_mixture >= 1, "state_mixture", self.state_mixture, "at least 1")
        _expect(self.backbone in BACKBONES, "backbone", self.backbone, f"one of {BACKBONES}")
        _expect(self.noise_schedule in NOISE_SCHEDULES, "noise_schedule", self.noise_schedule, f"{NOISE_SCHEDULES}")
        _expect(self.loss_weighting in LOSS_WEIGHTINGS, "loss_weighting", self.loss_weighting, f"{LOSS_WEIGHTINGS}")
        _expect(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "above 0")
        _expect(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        _expect(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "in [0, 1)")
        _expect(0 < self.noise_eps < 1, "noise_eps", self.noise_eps, "in (0, 1)")
        for name, size in self.covariates.items():
            _expect(size >= 1, f"covariates[{name!r}]", size, "at least 1 label")
        if self.perturbation_dim is not None:
            _expect(self.perturbation_dim >= 1, "perturbation_dim", self.perturbation_dim, "at least 1, or None")
            _expect(self.num_perturbations >= 1, "num_perturbations", 0, "at least 1 when perturbation_dim is given")
        if self.count_bins is not None and self.count_distribution == "nb":
            fits = 1 <= self.gene_output_bias <= self.count_bins[0] + 1
            _expect(
                fits, "gene_output_bias", self.gene_output_bias, f"1 to {self.count_bins[0] + 1}: counts below the bins"
            )
        if self.count_bins is not None:
            edges = list(self.count_bins)
            ascending = len(edges) > 0 and all(a < b for a, b in pairwise(edges))
            within = ascending and edges[0] >= 1 and edges[-1] <= self.max_count
            _expect(within, "count_bins", edges, f"ascending left edges in 1..{self.max_count} (max_count), or None")


def _expect(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"DCMConfig: {name}={value!r}, expected {expected}")
