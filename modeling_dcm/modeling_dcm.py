"""DCMForDenoising: from masked counts and conditions to a distribution over counts at each masked gene.

Puts conditions, backbone and head together, and computes the loss. Randomness is the caller's: `forward` draws nothing
(apart from dropout, off by default). Knows nothing of files, nor of names of genes and labels (the tokenizer's).
Letters: B cells, L genes in the sequence, Q queried genes, P perturbations of a cell, D width, K largest count.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .conditioning_dcm import (
    CellTotals,
    ConditionEncoder,
    LabelCounts,
    LabelEncoder,
    LibrarySizes,
    PartialCells,
    check_conditions,
    check_numbers,
)
from .configuration_dcm import DCMConfig
from .count_distribution_dcm import (
    CategoricalHead,
    CountBias,
    Loadings,
    NegativeBinomialHead,
    TwoStageCategorical,
    ZeroLinear,
)
from .diffusion_dcm import IGNORED_LABEL, alpha, denoising_loss
from .dit_dcm import DiTBackbone
from .generation_dcm import CellGenerationMixin
from .latent_dcm import LatentBackbone
from .layers_dcm import AdaLNZero, Encoded, Projections
from .pipeline_dcm import CUSTOM_PIPELINES
from .scoring_dcm import CellScoringMixin
from .state_dcm import CellState, PerturbationEffects, StateSource

# isort: split
# Named for transformers 5.4, which takes from a local folder only the files that this one names itself.
from .guidance_dcm import denoiser  # noqa: F401
from .sampling_dcm import sample_counts  # noqa: F401
from .schedule_dcm import reveal_schedule  # noqa: F401

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_dcm.DCMConfig",
    "AutoModel": "modeling_dcm.DCMForDenoising",
    "AutoModelForMaskedLM": "modeling_dcm.DCMForDenoising",
}

PRIOR_CELLS = 10.0  # weight of all cells' mean in a cell type's


@dataclass
class DCMOutput(ModelOutput):
    """Output of :class:`DCMForDenoising`.

    Attributes:
        loss: the configured weighting of Eq. 6, a scalar; None without labels.
        elbo: upper bound on -log p in nats per gene, a scalar; None without labels.
        logits: (B, L, K+1), or (B, Q, K+1) with ``query_positions``; None where only the loss was asked for.
    """

    loss: torch.Tensor | None = None
    elbo: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class DCMPreTrainedModel(PreTrainedModel):
    config_class = DCMConfig
    base_model_prefix = "dcm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    # mean counts and library sizes are data, not weights: bfloat16 would round 2,003 counts to 2,000
    _keep_in_fp32_modules_strict = ["totals", "library_sizes", "cell_state", "state_source", "effects"]  # noqa: RUF012
    _keep_in_fp32_modules_strict += ["head.log_size", "head.largest_mean", "head.state_loading", "head.correction"]
    _keep_in_fp32_modules_strict += ["head.type_shift"]
    _keep_in_fp32_modules_strict += ["library_size.log_mean", "library_size.log_std"]

    @classmethod
    def can_generate(cls) -> bool:
        """Not by transformers' text generation; see :meth:`DCMForDenoising.generate`."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Zeros where AdaLN-zero and the head want them; Xavier for other linear layers (DiT's choice).

        Labels' vectors have unit variance, those of other embeddings unit norm in the mean.
        """
        if isinstance(module, AdaLNZero | ZeroLinear | CountBias):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, nn.Linear):
            of_one = ((1 + module.out_features / module.in_features) / 2) ** 0.5  # as if each were a layer of its own
            nn.init.xavier_uniform_(module.weight, gain=of_one if isinstance(module, Projections) else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Loadings):
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, LabelEncoder):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


class DCMForDenoising(DCMPreTrainedModel, CellGenerationMixin, CellScoringMixin):
    """Discrete Cell Model: the denoiser ``p(x_i | x_t, c)`` of absorbing diffusion over counts, and its sampler."""

    labels_were_checked = False

    def __init__(self, config: DCMConfig):
        super().__init__(config)
        self.totals = CellTotals(config)
        self.conditions = ConditionEncoder(config)
        self.backbone = DiTBackbone(config) if config.backbone == "dit" else LatentBackbone(config)
        self.head = (NegativeBinomialHead if config.count_distribution == "nb" else CategoricalHead)(config)
        self.library_sizes = LibrarySizes(config)
        self.label_counts = LabelCounts(config, self.library_sizes.keys.shape[1])
        self.cell_state = CellState(config) if config.state_dim else None
        self.state_source = StateSource(config, self.library_sizes.keys.shape[1]) if config.state_dim else None
        self.effects = PerturbationEffects(config)
        # gene of the panel with each perturbation's name, or -1; filled at training by name
        self.register_buffer("target_gene_ids", torch.full((config.num_perturbations,), -1))
        self.post_init()
        config.auto_map = dict(AUTO_MAP)
        config.custom_pipelines = deepcopy(CUSTOM_PIPELINES)  # transformers changes that mapping in place

    def forward(
        self,
        input_ids: torch.Tensor,
        gene_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cell_type_ids: torch.Tensor | None = None,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_embeds: torch.Tensor | None = None,
        target_gene_ids: torch.Tensor | None = None,
        covariate_ids: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        effect: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        return_logits: bool | None = None,
        all_measured: bool | None = None,
        num_large: int | None = None,
    ) -> DCMOutput:
        """Logits over counts for each gene, and the loss at masked genes when ``labels`` are given.

        Args:
            input_ids: ids (B, L): counts, ``config.mask_token_id``, or ``config.pad_token_id`` where not measured.
            gene_ids: genes of the sequence (L,) or (B, L); default 0..L-1, then L must be ``config.num_genes``.
            attention_mask: (B, L), 0 marks a gene as PAD.
            cell_type_ids: (B,), -1 is not given.
            perturbation_ids: (B, P), summed; -1 beside real ids is padding, all -1 is not given.
            perturbation_embeds: vectors of perturbations (B, P, ``config.perturbation_dim``), NaN rows are padding.
            target_gene_ids: genes (B, P) that the perturbations target, -1 for none; default: the model's own table.
            covariate_ids: (B, C) in the order of ``config.covariates``, -1 is not given.
            library_size: total counts over the panel (B,); negative is not given.
            state: cell states (B, E) as :meth:`state` computes them; NaN is not given.
            effect: log fold changes (B, L) of the genes against all cells of the type; default: what the model knows of
                the perturbations, 0 where none is given.
            labels: clean ids (B, L), read at masked genes only; a masked gene with -100 there counts as not measured in
                the loss.
            query_positions: positions (B, Q) of the sequence to compute logits for, -1 is padding.
            return_logits: whether to compute logits besides the loss, which does not need all of them; default: only
                outside training, or without labels.
            all_measured: whether ``input_ids`` are known to hold no PAD, or some; default: look, and wait for it.
            num_large: how many of the ``labels`` are large counts (``config.num_small`` or more) at most; likewise. Who
                knows has looked at them: they are not checked.

        Raises:
            ValueError: shapes or ids do not fit the configuration. Labels are read on the CPU, elsewhere once only.
        """
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)
        distribution = self.distribution(
            input_ids,
            gene_ids,
            query_positions,
            cell_type_ids=cell_type_ids,
            perturbation_ids=perturbation_ids,
            perturbation_embeds=perturbation_embeds,
            target_gene_ids=target_gene_ids,
            covariate_ids=covariate_ids,
            library_size=library_size,
            state=state,
            effect=effect,
            all_measured=all_measured,
        )
        if labels is None:
            return DCMOutput(logits=distribution.full())
        uniform, elbo = self._losses(distribution, input_ids, labels, query_positions, num_large)
        wanted = not self.training if return_logits is None else return_logits
        return DCMOutput(
            loss=elbo if self.config.loss_weighting == "elbo" else uniform,
            elbo=elbo.detach(),
            logits=distribution.full() if wanted else None,
        )

    def _losses(
        self,
        distribution: TwoStageCategorical,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        query_positions: torch.Tensor | None,
        num_large: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both weightings of :func:`denoising_loss`, over the masked genes that have a label; see :meth:`forward`."""
        is_masked = input_ids == self.config.mask_token_id
        is_query = is_masked & (labels != IGNORED_LABEL)
        if num_large is None:
            self._check_labels(labels, is_query)
        k = is_query.sum(dim=1)
        num_ignored = is_masked.sum(dim=1) - k
        n = (input_ids != self.config.pad_token_id).sum(dim=1) - num_ignored
        if query_positions is not None:
            positions = query_positions.clamp(min=0)
            labels = labels.gather(1, positions)
            is_query = is_query.gather(1, positions) & (query_positions >= 0)
        cross_entropy = distribution.cross_entropy(labels.masked_fill(~is_query, 0), num_large)
        return denoising_loss(cross_entropy, is_query, k, n)

    def _check_labels(self, labels: torch.Tensor, is_query: torch.Tensor) -> None:
        if labels.device.type != "cpu" and self.labels_were_checked:
            return  # reading them would make an accelerator wait
        self.labels_were_checked = True
        wrong = labels[is_query & ((labels < 0) | (labels >= self.config.num_counts))]
        if len(wrong):
            raise ValueError(
                f"labels hold {int(wrong[0])} at a masked gene, expected ids of counts "
                f"0..{self.config.num_counts - 1}, or {IGNORED_LABEL} to leave the gene out"
            )
        if not bool(is_query.any()):
            logger.warning_once(
                "no gene with a label is masked: the loss is 0 and trains nothing; mask input_ids, as "
                "DataCollatorForCountMasking does"
            )

    def distribution(
        self,
        input_ids: torch.Tensor,
        gene_ids: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        all_measured: bool | None = None,
        **conditions: torch.Tensor | None,
    ) -> TwoStageCategorical:
        """The distribution over counts of each queried gene, in two stages: not all of the logits are computed.

        Arguments are those of :meth:`forward`, which see; ``distribution.full()`` are its logits.
        """
        positions = None if query_positions is None else query_positions.clamp(min=0)
        cells = self.partial_cells(input_ids, gene_ids, **conditions)
        return self.predict(replace(cells, all_measured=all_measured), positions)

    def partial_cells(
        self, input_ids: torch.Tensor, gene_ids: torch.Tensor | None = None, **conditions: torch.Tensor | None
    ) -> PartialCells:
        """What is known of cells, from arguments as those of :meth:`forward`: checked, and -1 where not given."""
        config = self.config
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, L)")
        B, L = input_ids.shape
        mask, pad = config.mask_token_id, config.pad_token_id
        check_numbers("input_ids", input_ids, pad + 1, f"ids of counts 0..{mask - 1}, MASK ({mask}) or PAD ({pad})")
        if gene_ids is None:
            if config.num_genes != L:
                raise ValueError(f"input_ids has {L} genes, the model {config.num_genes}: pass gene_ids for a subset")
            gene_ids = torch.arange(L, device=input_ids.device)
        if gene_ids.shape[-1] != L:
            raise ValueError(f"gene_ids has shape {tuple(gene_ids.shape)}, expected ({L},) or ({B}, {L})")
        check_numbers("gene_ids", gene_ids, config.num_genes, f"genes 0..{config.num_genes - 1}")
        gene_ids = gene_ids.view(-1, L)
        check_conditions(config, conditions)
        given = {name: value for name, value in conditions.items() if value is not None}
        targets = given.pop("target_gene_ids", None)
        if targets is None and "perturbation_ids" in given and config.num_perturbations:
            ids = given["perturbation_ids"]
            targets = self.target_gene_ids[ids.clamp(min=0)].masked_fill(ids < 0, -1)
        missing = torch.full((B, 1 + len(config.covariates)), -1, device=input_ids.device)
        given.setdefault("cell_type_ids", missing[:, 0])
        given.setdefault("perturbation_ids", missing[:, :1])
        given.setdefault("perturbation_embeds", None)
        given.setdefault("covariate_ids", missing[:, 1:])
        if "library_size" not in given or not config.library_size_conditioning:
            given["library_size"] = missing[:, 0]
        if given.get("state") is None or not config.state_dim:
            given["state"] = torch.full((B, config.state_width), torch.nan, device=input_ids.device)
        if given.get("effect") is None:
            given["effect"] = torch.zeros((B, L), device=input_ids.device)
            if config.effect_groups:
                vectors = given.pop("perturbation_embeds"), conditions.get("target_gene_ids")
                known = self.conditions.perturbation, self.target_gene_ids
                effects, ids = self.effects.with_vectors(given["perturbation_ids"], *vectors, *known)
                kind = effects.kind(given["state"])
                given["effect"] = effects.of_genes(given["cell_type_ids"], ids, gene_ids, kind)
                given["perturbation_embeds"] = None  # as of a label without cells: the effect tells all
        mean = self.totals.mean(gene_ids, given["cell_type_ids"]) * given["effect"].exp()
        told = config.state_dim and not config.library_size_conditioning
        total = self.cell_state.total(given["state"]) if told else given["library_size"]
        return PartialCells(
            input_ids=input_ids,
            gene_ids=gene_ids,
            mean=mean,
            is_target=None if targets is None else (gene_ids[..., None] == targets[:, None, :]).any(dim=-1),
            progress=self.totals.progress(input_ids, mean, total),
            total=total,
            **given,
        )

    def predict(self, cells: PartialCells, positions: torch.Tensor | None = None) -> TwoStageCategorical:
        """The distribution over counts of the genes at ``positions`` (B, Q), or of all genes."""
        return self.query(self.backbone.encode(cells, self.conditions), cells, positions)

    def query(self, encoded: Encoded, cells: PartialCells, positions: torch.Tensor | None) -> TwoStageCategorical:
        """As :meth:`predict`, of cells that the backbone has encoded."""
        queried = cells if positions is None else cells.at(positions)
        return self.head(self.backbone.query(encoded, queried, positions), encoded.condition, queried)

    @torch.no_grad()
    def concrete_score(self, input_ids: torch.Tensor, t: torch.Tensor | float, **conditions) -> torch.Tensor:
        """Concrete scores (Eq. 5) ``s(x_t, t)_{i,v} = alpha(t) / (1 - alpha(t)) p(x_i = v | x_t, c)``.

        Args:
            input_ids: masked ids (B, L).
            t: time of the schedule in (0, 1], one for all or (B,); it scales the ratios, the network does not see it.
            conditions: the other arguments of :meth:`forward`.

        Returns:
            (B, L, K+1), meaningful at masked genes.

        Raises:
            ValueError: t outside (0, 1].
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=input_ids.device).expand(len(input_ids))
        if not bool(((t > 0) & (t <= 1)).all()):
            raise ValueError(
                f"t={t.tolist()}, expected values in (0, 1]: at t=0 nothing is masked, ratios are infinite"
            )
        survival = alpha(t, self.config.noise_eps)
        probabilities = self(input_ids, **conditions).logits.float().softmax(dim=-1)
        return (survival / (1 - survival))[:, None, None] * probabilities

    @torch.no_grad()
    def state(self, input_ids: torch.Tensor, library_size: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the states (B, E) of whole cells from clean ids (B, G): their fast embedding.

        NaN where a cell has no count, or where a gene was not measured. ``library_size`` (B,) is that of unclipped
        counts; default: the sum of the counts.

        Raises:
            ValueError: the model has no cell state, or the cells are not over its panel.
        """
        if not self.config.state_dim:
            raise ValueError("this model has no cell state (state_dim=0)")
        if input_ids.shape[1] != self.config.num_genes:
            raise ValueError(f"input_ids has {input_ids.shape[1]} genes, the model {self.config.num_genes}")
        counts = self.totals.twice_count[input_ids].float() / 2
        counts = counts.masked_fill(input_ids >= self.config.num_counts, -1)
        z = self.cell_state(counts, library_size)
        if self.config.library_size_conditioning:
            return z
        total = counts.sum(dim=1) if library_size is None else library_size.float()
        return torch.cat([z, self.cell_state.standardized(torch.log1p(total))[:, None]], dim=1)

    @torch.no_grad()
    def set_marginals(self, histogram: torch.Tensor) -> None:
        """Start at the training marginals: ``histogram`` (G, K+1), how many cells have each count of each gene.

        Sets all cell types' means to those of all cells; :meth:`set_cell_type_means` tells them apart.
        """
        self.head.set_marginals(histogram)
        values = self.totals.twice_count[: self.config.num_counts].double() / 2
        self.totals.gene_mean.copy_(histogram.double() @ values / histogram.sum(dim=1).clamp(min=1))

    @torch.no_grad()
    def set_cell_type_means(self, total: torch.Tensor, num_cells: torch.Tensor) -> None:
        """Mean counts of each cell type's training cells: ``total`` (T, G) over ``num_cells`` (T,) cells.

        Drawn to the mean of all cells as if :data:`PRIOR_CELLS` more cells had been seen.
        """
        overall = self.totals.gene_mean[-1].double()
        means = (total.double() + PRIOR_CELLS * overall) / (num_cells.double()[:, None] + PRIOR_CELLS)
        self.totals.gene_mean[:-1] = means.to(self.totals.gene_mean)

    @torch.no_grad()
    def add_perturbations(
        self, table: Mapping[str, torch.Tensor], target_gene_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give perturbations that training has not seen ids of their own, after the known ones.

        The tokenizer learns their names, in the same order: ``ids = tokenizer.add_perturbations(table)``, then
        ``model.add_perturbations(table, tokenizer.target_gene_ids[ids])``. Known ids keep their meaning.

        Args:
            table: vector (``config.perturbation_dim``,) of each new name, from where the training table's came.
            target_gene_ids: (n,) the gene that each of them targets, -1 for none, which is the default.

        Returns:
            The new ids (n,).

        Raises:
            ValueError: the model has no frozen vectors, or a vector or a target does not fit it.
        """
        config, encoder = self.config, self.conditions.perturbation
        if encoder is None or encoder.linear is None:
            raise ValueError("this model has no frozen vectors of perturbations: train it with a perturbation table")
        for name, vector in table.items():
            if tuple(vector.shape) != (config.perturbation_dim,):
                shape = tuple(vector.shape)
                raise ValueError(f"the vector of {name!r} has shape {shape}, expected ({config.perturbation_dim},)")
            if not bool(vector.isfinite().all()) or not bool(vector.any()):
                raise ValueError(f"the vector of {name!r} is not finite, or all zero")
        n, known = len(table), config.num_perturbations
        targets = torch.full((n,), -1) if target_gene_ids is None else torch.as_tensor(target_gene_ids).long()
        if not n or targets.shape != (n,) or targets.min() < -1 or targets.max() >= config.num_genes:
            raise ValueError(
                f"{n} vectors with target_gene_ids {targets.tolist()}, expected as many genes as vectors, and some: "
                f"-1..{config.num_genes - 1}"
            )
        vectors = torch.stack([vector.to(encoder.table) for vector in table.values()])
        ids = torch.arange(known, known + n)
        if config.effect_groups:
            seen = (encoder.has_vector & ~encoder.is_unseen).nonzero()[:, 0]
            of_seen = encoder.table[seen], self.target_gene_ids[seen]
            self.effects.add(ids.to(seen), vectors, targets.to(seen), seen, *of_seen)
            config.effect_groups = len(self.effects.keys)
        encoder.table = torch.cat([encoder.table, vectors])
        encoder.has_vector = torch.cat([encoder.has_vector, encoder.has_vector.new_ones(n)])
        encoder.is_unseen = torch.cat([encoder.is_unseen, encoder.is_unseen.new_full((n,), config.effect_groups > 0)])
        self.target_gene_ids = torch.cat([self.target_gene_ids, targets.to(self.target_gene_ids)])
        old, weight = encoder.learned, encoder.learned.weight
        encoder.learned = LabelEncoder(known + n, config.hidden_size).to(weight)
        # rows beside a frozen vector are never read; the last row stays the null
        encoder.learned.weight.copy_(torch.cat([weight[:-1], weight.new_zeros(n, weight.shape[1]), weight[-1:]]))
        encoder.learned.train(old.training).requires_grad_(weight.requires_grad)
        config.num_perturbations = known + n
        config.perturbations_without_cells = [*(config.perturbations_without_cells or ()), *ids.tolist()]
        return ids
