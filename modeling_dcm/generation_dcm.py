"""Generate and complete cells with a trained model.

The loops over chunks of cells and the meaning of the arguments live here; the sampler itself (`sampling_dcm.py`) knows
nothing of the network. Letters: B cells of a chunk, N all cells, L genes in the sequence, G all genes.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from .chunks_dcm import dropout_off, of_rows, row_chunks
from .conditioning_dcm import check_conditions
from .denoisers_dcm import denoiser
from .diffusion_dcm import keyed_generator
from .sampling_dcm import sample_counts
from .schedule_dcm import as_curve


class CellGenerationMixin:
    """`generate` of :class:`DCMForDenoising`."""

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
        steps: int | str = 20,
        schedule: str = "cubic",
        guidance_scale: float | dict[str, float] = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 256,
        chunks: Sequence[int] | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Draw cells.

        Args:
            num_cells: N; may be left out when a condition or ``observed`` says it.
            cell_type_ids: (N,), -1 is not given; likewise the other conditions, as in :meth:`forward`.
            library_size: total counts wanted over ``gene_ids``, one for all or (N,); None draws them from the training
                cells of the same condition (for some genes of the panel: times their share of a mean cell's counts;
                with ``observed``: not given); ``"null"``: not given.
            observed: counts (N, L), -1 where unknown; given genes come back unchanged.
            gene_ids: genes of the panel (L,) to generate; default: all.
            steps: network calls for each chunk of cells; ``"auto"``: as few as the entropy curve allows.
            schedule: how many genes each step reveals: ``linear``, ``cosine``, ``cubic``, or ``optimal`` by the
                model's entropy curve.
            guidance_scale: w of ``(1+w) log p(x|c) - w log p(x|null)``, one for all conditions or
                ``{"perturbation": w}`` for each; 0 draws from the model.
            temperature: divides the logits; 1.0 draws from the model.
            seed: the same seed and ``batch_size`` give the same cells.
            batch_size: cells of a chunk.
            chunks: draw only these of the ``ceil(N / batch_size)`` chunks; they are the same cells as in a whole run.
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
        if observed is not None:
            self._check_observed(observed, N, len(gene_ids))
        sizes = self._given_library_size(library_size, N, observed is not None)
        options = {
            "steps": steps,
            "schedule": schedule,
            "curve": as_curve(self.config.entropy_curve),
            "temperature": temperature,
            "mask_token_id": self.config.mask_token_id,
            "pad_token_id": self.config.pad_token_id,
        }
        wanted = list(row_chunks(N, batch_size))
        wanted = wanted if chunks is None else [wanted[chunk] for chunk in chunks]
        cells = []
        with dropout_off(self), _bar(sum(rows.stop - rows.start for _, rows in wanted), progress) as bar:
            for chunk, rows in wanted:
                generator = keyed_generator(seed, chunk, self.device)
                conditions = of_rows(given, rows, self.device)
                conditions["library_size"] = self._library_size(sizes, rows, conditions, gene_ids, generator)
                x = self._start(rows, len(gene_ids), observed)
                denoise = denoiser(
                    self, gene_ids.to(self.device), conditions, guidance_scale, from_nothing=observed is None
                )
                drawn = sample_counts(denoise, x.to(self.device), generator=generator, **options)
                cells.append(drawn.cpu())
                bar.update(len(drawn))
        return torch.cat(cells)

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

    def _start(self, rows: slice, L: int, observed: torch.Tensor | None) -> torch.Tensor:
        """Ids (B, L) to start from: MASK everywhere but at observed genes."""
        mask = self.config.mask_token_id
        if observed is None:
            return torch.full((rows.stop - rows.start, L), mask)
        return torch.where(observed[rows] < 0, mask, observed[rows]).long().cpu()

    def _check_observed(self, observed: torch.Tensor, N: int, L: int) -> None:
        if observed.shape != (N, L):
            raise ValueError(f"observed has shape {tuple(observed.shape)}, expected ({N}, {L}): cells x genes")
        if bool((observed != observed.long()).any()):
            raise ValueError("observed holds values that are not integers, expected counts, or -1 where unknown")
        if int(observed.min()) < -1 or int(observed.max()) >= self.config.num_counts:
            raise ValueError(
                f"observed holds values from {int(observed.min())} to {int(observed.max())}, expected counts "
                f"0..{self.config.num_counts - 1}, or -1 where unknown"
            )

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

    def _library_size(self, sizes, rows: slice, conditions, gene_ids: torch.Tensor, generator) -> torch.Tensor:
        """Library sizes (B,) over genes ``gene_ids`` (L,), as given or drawn."""
        if sizes is not None:
            return sizes[rows].to(self.device)
        B = rows.stop - rows.start
        cell_type_ids = conditions.get("cell_type_ids")
        size = self.library_sizes.draw(
            B, cell_type_ids, conditions.get("perturbation_ids"), conditions.get("covariate_ids"), generator
        )
        if len(gene_ids) == self.config.num_genes:
            return size
        mean = self.totals.mean(torch.arange(self.config.num_genes, device=self.device).expand(B, -1), cell_type_ids)
        share = mean[:, gene_ids.to(self.device)].sum(dim=1) / mean.sum(dim=1).clamp(min=1e-9)
        return (size * share).round()


def _bar(num_cells: int, progress: bool) -> tqdm:
    """A bar on a terminal; in a log file it would be one endless line."""
    return tqdm(total=num_cells, unit="cell", desc="sampling", disable=None if progress else True)


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
