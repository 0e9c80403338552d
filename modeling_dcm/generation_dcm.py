"""What a trained model is used for: generate and complete cells, bound their likelihood, embed them.

The loops over chunks of cells and the meaning of the arguments live here; the sampler itself (`sampling_dcm.py`) knows
nothing of the network. Letters: B cells of a chunk, N all cells, L genes in the sequence, G all genes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from .conditioning_dcm import check_conditions
from .diffusion_dcm import keyed_generator, mask_counts, num_masked
from .law_dcm import FactoredLogits
from .sampling_dcm import sample_counts


class CellGenerationMixin:
    """`generate`, `log_likelihood` and `embed` of :class:`DCMForDenoising`."""

    @torch.no_grad()
    def generate(
        self,
        num_cells: int | None = None,
        *,
        cell_type_ids: torch.Tensor | None = None,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_embeds: torch.Tensor | None = None,
        target_gene_ids: torch.Tensor | None = None,
        covariate_ids: torch.Tensor | None = None,
        library_size: torch.Tensor | int | str | None = None,
        observed: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        steps: int = 20,
        schedule: str = "cubic",
        guidance_scale: float = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 256,
        progress: bool = False,
    ) -> torch.Tensor:
        """Draw cells.

        Args:
            num_cells: N; may be left out when a condition or ``observed`` says it.
            cell_type_ids: (N,), -1 is not given; likewise the other conditions, as in :meth:`forward`.
            library_size: total counts wanted, one for all or (N,); None draws them from the training cells of the same
                condition (with ``observed``: not given); ``"null"``: not given.
            observed: counts (N, L), -1 where unknown; given genes come back unchanged.
            gene_ids: genes of the panel (L,) to generate; default: all.
            steps: network calls for each chunk of cells.
            schedule: how many genes each step reveals: ``linear``, ``cosine``, ``cubic``.
            guidance_scale: w of ``(1+w) log p(x|c) - w log p(x|null)``; 0 draws from the model.
            temperature: divides the logits; 1.0 draws from the model.
            seed: the same seed and ``batch_size`` give the same cells.
            batch_size: cells of a chunk.
            progress: show a bar with cells/s.

        Returns:
            Count ids (N, L) int64 on the CPU, never MASK or PAD.

        Raises:
            ValueError: arguments that do not fit each other or the model.
        """
        given = {
            "cell_type_ids": cell_type_ids,
            "perturbation_ids": perturbation_ids,
            "perturbation_embeds": perturbation_embeds,
            "target_gene_ids": target_gene_ids,
            "covariate_ids": covariate_ids,
        }
        given = {name: value for name, value in given.items() if value is not None}
        check_conditions(self.config, given)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}, expected above 0")
        N = _num_cells(num_cells, {**given, "observed": observed})
        gene_ids = self._panel(gene_ids)
        x = self._start(N, len(gene_ids), observed)
        sizes = self._given_library_size(library_size, N, observed is not None)
        cells = []
        with _dropout_off(self), _bar(N, progress) as bar:
            for chunk, rows in _chunks(N, batch_size):
                generator = keyed_generator(seed, chunk, self.device)
                conditions = self._of_rows(given, rows)
                conditions["library_size"] = self._library_size(sizes, rows, conditions, generator)
                denoise = self._denoiser(gene_ids.to(self.device), conditions, guidance_scale)
                drawn = sample_counts(
                    denoise,
                    x[rows].to(self.device),
                    steps=steps,
                    schedule=schedule,
                    temperature=temperature,
                    mask_token_id=self.config.mask_token_id,
                    pad_token_id=self.config.pad_token_id,
                    generator=generator,
                )
                cells.append(drawn.cpu())
                bar.update(len(drawn))
        return torch.cat(cells)

    @torch.no_grad()
    def log_likelihood(
        self, input_ids: torch.Tensor, *, num_samples: int = 16, seed: int = 0, batch_size: int = 64, **conditions
    ) -> torch.Tensor:
        """ELBO in nats per cell: a lower bound on ``log p(x | c)``, by Monte Carlo over the number of masked genes.

        Args:
            input_ids: clean ids (N, L), PAD where not measured.
            num_samples: masked versions of each cell; their mask counts are stratified.
            seed: keyed with the chunk, as in :meth:`generate`.
            conditions: the other arguments of :meth:`forward`.

        Returns:
            (N,) float64 on the CPU.
        """
        ids = {"mask_token_id": self.config.mask_token_id, "pad_token_id": self.config.pad_token_id}
        mask = conditions.pop("attention_mask", None)
        if mask is not None:
            input_ids = input_ids.masked_fill(mask == 0, self.config.pad_token_id)
        total = torch.zeros(len(input_ids), dtype=torch.float64)
        with _dropout_off(self):
            for chunk, rows in _chunks(len(input_ids), batch_size):
                generator = keyed_generator(seed, chunk, self.device)
                x_0 = input_ids[rows].to(self.device)
                given = self._of_rows(conditions, rows)
                n = (x_0 != self.config.pad_token_id).sum(dim=1)
                shift = torch.rand(len(x_0), generator=generator, device=self.device, dtype=torch.float64)
                for sample in range(num_samples):
                    k = num_masked((shift + sample / num_samples) % 1.0, n)
                    x_t = mask_counts(x_0, k, generator, **ids)
                    log_p = self(x_t, **given).logits.float().log_softmax(dim=-1)
                    is_masked = x_t == self.config.mask_token_id
                    nats = log_p.gather(-1, x_0.masked_fill(~is_masked, 0)[..., None])[..., 0]
                    nats = (nats * is_masked).sum(dim=1).double() * n / k.clamp(min=1)
                    total[rows] += (nats / num_samples).cpu()
        return total

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor, *, batch_size: int = 256, **conditions) -> torch.Tensor:
        """Pooled hidden state (N, D) of cells with counts ``input_ids`` (N, L): mean over genes, or over latents."""
        check_conditions(self.config, conditions)
        mask = conditions.pop("attention_mask", None)
        if mask is not None:
            input_ids = input_ids.masked_fill(mask == 0, self.config.pad_token_id)
        with _dropout_off(self):
            chunks = (
                self._of_rows({"input_ids": input_ids, **conditions}, rows)
                for _, rows in _chunks(len(input_ids), batch_size)
            )
            return torch.cat([self._pooled(**chunk).cpu() for chunk in chunks])

    def _of_rows(self, arguments: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
        """Arguments of a chunk of cells; ``gene_ids`` (L,) are those of every cell."""
        arguments = {name: value for name, value in arguments.items() if value is not None}
        is_shared = {name: name == "gene_ids" and value.ndim == 1 for name, value in arguments.items()}
        return {name: (v if is_shared[name] else v[rows]).to(self.device) for name, v in arguments.items()}

    def _pooled(self, input_ids: torch.Tensor, gene_ids: torch.Tensor | None = None, **conditions) -> torch.Tensor:
        gene_ids = self._check_genes(input_ids, gene_ids)
        targets = conditions.pop("target_gene_ids", None)
        embedded, condition, tokens, _ = self._embed(
            input_ids, gene_ids, self._progress(input_ids, gene_ids, conditions), conditions, targets
        )
        if self.config.backbone == "latent":
            return self._latents(input_ids, embedded, condition, tokens).mean(dim=1)
        measured = (input_ids != self.config.pad_token_id)[..., None]
        hidden = self._dit_hidden(input_ids, embedded, condition, tokens)
        return (hidden * measured).sum(dim=1) / measured.sum(dim=1).clamp(min=1)

    def _denoiser(self, gene_ids: torch.Tensor, conditions: dict[str, torch.Tensor], guidance_scale: float):
        """The sampler's callable: logits at the genes about to be revealed, guided when asked."""

        def law_at(x_t, positions, known, given) -> FactoredLogits:
            B, L = x_t.shape
            genes = gene_ids.expand(B, L)
            progress = self._progress(x_t, genes, given)
            targets = given.get("target_gene_ids")
            if self.config.backbone == "dit":
                return self._law(x_t, genes, progress, given, targets, positions)
            # the latents read what is known and nothing else: the sequence is known genes, then queried ones
            subset = torch.cat([known, positions], dim=1)
            ids = torch.cat([x_t.gather(1, known), torch.full_like(positions, self.config.mask_token_id)], dim=1)
            asked = torch.arange(known.shape[1], subset.shape[1], device=x_t.device).expand(B, -1)
            return self._law(ids, genes.gather(1, subset), progress, given, targets, asked)

        def guided(x_t, positions, known) -> FactoredLogits | torch.Tensor:
            law = law_at(x_t, positions, known, conditions)
            if guidance_scale == 0:
                return law
            null = law_at(x_t, positions, known, {"library_size": conditions["library_size"]})
            log_p, null = law.full().log_softmax(dim=-1), null.full().log_softmax(dim=-1)
            return (1 + guidance_scale) * log_p - guidance_scale * null

        return guided

    def _panel(self, gene_ids: torch.Tensor | None) -> torch.Tensor:
        """Genes (L,) to generate, on the CPU."""
        G = self.config.num_genes
        if gene_ids is None:
            return torch.arange(G)
        gene_ids = gene_ids.cpu()
        if gene_ids.ndim != 1 or gene_ids.unique().numel() != gene_ids.numel():
            raise ValueError(f"gene_ids of shape {tuple(gene_ids.shape)}, expected genes (L,), each once")
        if not gene_ids.numel() or int(gene_ids.min()) < 0 or int(gene_ids.max()) >= G:
            raise ValueError(f"gene_ids are {gene_ids.tolist()[:10]}, expected genes 0..{G - 1}")
        return gene_ids

    def _start(self, N: int, L: int, observed: torch.Tensor | None) -> torch.Tensor:
        """Ids (N, L) to start from: MASK everywhere but at observed genes."""
        if observed is None:
            return torch.full((N, L), self.config.mask_token_id)
        if observed.shape != (N, L):
            raise ValueError(f"observed has shape {tuple(observed.shape)}, expected ({N}, {L}): cells x genes")
        if bool((observed != observed.long()).any()):
            raise ValueError("observed holds values that are not integers, expected counts, or -1 where unknown")
        if int(observed.min()) < -1 or int(observed.max()) >= self.config.num_counts:
            raise ValueError(
                f"observed holds values from {int(observed.min())} to {int(observed.max())}, expected counts "
                f"0..{self.config.num_counts - 1}, or -1 where unknown"
            )
        return torch.where(observed < 0, self.config.mask_token_id, observed).long().cpu()

    def _given_library_size(self, library_size, N: int, is_imputation: bool) -> torch.Tensor | None:
        """(N,) sizes, -1 for the null; None: to be drawn for each chunk."""
        if not self.config.library_size_conditioning:
            if library_size not in (None, "null"):
                raise ValueError(
                    f"library_size={library_size!r} was given, but this model was trained without library-size "
                    "conditioning: leave it out"
                )
            return torch.full((N,), -1.0)
        if isinstance(library_size, str):
            if library_size != "null":
                raise ValueError(f"library_size={library_size!r}, expected numbers, None (drawn) or 'null' (not given)")
            return torch.full((N,), -1.0)
        if library_size is None:
            return torch.full((N,), -1.0) if is_imputation else None
        sizes = torch.as_tensor(library_size, dtype=torch.float32).cpu()
        if sizes.ndim > 1 or (sizes.ndim == 1 and len(sizes) != N) or not bool((sizes >= 0).all()):
            raise ValueError(f"library_size of shape {tuple(sizes.shape)}, expected one number or {N}, all 0 or more")
        return sizes.expand(N)

    def _library_size(self, sizes, rows: slice, conditions, generator) -> torch.Tensor:
        if sizes is not None:
            return sizes[rows].to(self.device)
        return self.library_sizes.draw(
            rows.stop - rows.start,
            conditions.get("cell_type_ids"),
            conditions.get("perturbation_ids"),
            conditions.get("covariate_ids"),
            generator,
        )


def _bar(num_cells: int, progress: bool) -> tqdm:
    """A bar on a terminal; in a log file it would be one endless line."""
    return tqdm(total=num_cells, unit="cell", desc="sampling", disable=None if progress else True)


@contextmanager
def _dropout_off(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _chunks(num_cells: int, batch_size: int) -> Iterator[tuple[int, slice]]:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    for chunk, start in enumerate(range(0, num_cells, batch_size)):
        yield chunk, slice(start, min(start + batch_size, num_cells))


def _num_cells(num_cells: int | None, arguments: dict[str, torch.Tensor | None]) -> int:
    """The number of cells that all arguments agree on."""
    lengths = {name: len(value) for name, value in arguments.items() if value is not None}
    if num_cells is not None:
        lengths["num_cells"] = num_cells
    if not lengths:
        raise ValueError("num_cells is missing: give it, or conditions or observed genes for each cell")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arguments disagree on the number of cells: {lengths}")
    N = next(iter(lengths.values()))
    if N < 1:
        raise ValueError(f"num_cells={N}, expected at least 1")
    return N
