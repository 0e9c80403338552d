"""Generate and complete cells with a trained model: what the arguments mean, states and library sizes, chunks of cells.

The loop over steps is the sampler's (`sampling_dcm.py`), which asks the network through `guidance_dcm.py`.
Letters: N all cells, B cells of a chunk, L genes in the sequence, G all genes, E width of the state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from .conditioning_dcm import check_conditions
from .diffusion_dcm import keyed_generator
from .guidance_dcm import denoiser
from .sampling_dcm import sample_counts
from .schedule_dcm import as_curve
from .state_dcm import ANY, first_match

LABELS = 2**40  # the piece of a run that draws its labels; no chunk has this number


class CellGenerationMixin:
    """`generate` of :class:`DCMForDenoising`."""

    tokenizer = None  # what names of labels are looked up in; loaded from the model's own folder when it is needed

    @torch.no_grad()
    def generate(
        self,
        num_cells: int | None = None,
        *,
        cell_type: str | Sequence[str] | None = None,
        perturbation: str | Sequence[str] | None = None,
        covariates: Mapping[str, str | Sequence[str]] | None = None,
        cell_type_ids: torch.Tensor | None = None,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_embeds: torch.Tensor | None = None,
        target_gene_ids: torch.Tensor | None = None,
        covariate_ids: torch.Tensor | None = None,
        library_size: torch.Tensor | int | str | None = None,
        state: torch.Tensor | str | None = None,
        observed: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        steps: int | str | None = None,
        schedule: str = "cubic",
        guidance_scale: float | dict[str, float] = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 256,
        chunks: Iterable[int] | None = None,
        on_chunk: Callable[[int, torch.Tensor], None] | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Draw cells.

        Args:
            num_cells: N; may be left out when a condition or ``observed`` says it.
            cell_type: a label, or N of them, instead of ids; likewise ``perturbation`` (combinations as in
                ``KLF1+TGFBR2``) and ``covariates`` (name to label). They are looked up in ``model.tokenizer``, or else
                in the tokenizer in the folder that the model was loaded from.
            cell_type_ids: (N,), -1 is not given; likewise the other conditions, as in :meth:`forward`.
            library_size: total counts wanted over ``gene_ids``, one for all or (N,); None draws them from the training
                cells of the same condition (for some genes of the panel: times their share of a mean cell's counts;
                with ``observed``: not given); ``"null"``: not given.
            state: cell states (N, E), see :meth:`state`; None draws them together with the library size, from training
                cells of the same condition if the model keeps any, or else from its prior (with ``observed``: not
                given); ``"prior"`` and ``"bank"`` say which; ``"null"``: not given.
            observed: counts (N, L), -1 where unknown; given genes come back unchanged.
            gene_ids: genes of the panel (L,) to generate; default: all.
            steps: network calls for each chunk of cells; ``"auto"``: as few as the entropy curve allows; None: one
                where the head's loadings tell it every cell's state; else ``"auto"``, or 20 without a curve or where
                states are not given.
            schedule: how many genes each step reveals: ``linear``, ``cosine``, ``cubic``, or ``optimal`` by the
                model's entropy curve.
            guidance_scale: w of ``(1+w) log p(x|c) - w log p(x|null)``, one for all conditions or
                ``{"perturbation": w}`` for each; 0 draws from the model.
            temperature: divides the logits; 1.0 draws from the model.
            seed: the same seed and ``batch_size`` give the same cells.
            batch_size: cells of a chunk.
            chunks: draw only these of the ``ceil(N / batch_size)`` chunks, each asked for when it is its turn; they are
                the same cells as in a whole run.
            on_chunk: is given the number and the cells (B, L) of each chunk, which are then not kept: none is returned.
            progress: show a bar with cells/s.

        Returns:
            Count ids (N, L) int64 on the CPU, never MASK or PAD.

        Raises:
            ValueError: arguments that do not fit each other or the model.
        """
        names = {"cell_type": cell_type, "perturbation": perturbation, "covariates": covariates}
        named = self._ids_of(names, num_cells if observed is None else len(observed))
        given = {
            "cell_type_ids": cell_type_ids,
            "perturbation_ids": perturbation_ids,
            "perturbation_embeds": perturbation_embeds,
            "target_gene_ids": target_gene_ids,
            "covariate_ids": covariate_ids,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if named and {"cell_type_ids", "perturbation_ids", "covariate_ids"} & set(given):
            raise ValueError("labels were given by name and as ids: give all of them one way")
        given |= named
        check_conditions(self.config, given)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature}, expected above 0")
        N = _num_cells(num_cells, {**given, "observed": observed})
        gene_ids = self._panel(gene_ids)
        if observed is not None:
            self._check_observed(observed, N, len(gene_ids))
        sizes = self._given_library_size(library_size, N, observed is not None)
        origin, source = self._origin_of_states(state, N, given, seed, observed is not None)
        options = {
            "steps": self._steps(steps, origin, source),
            "schedule": schedule,
            "curve": as_curve(self.config.entropy_curve),
            "temperature": temperature,
            "mask_token_id": self.config.mask_token_id,
            "pad_token_id": self.config.pad_token_id,
        }
        all_rows, cells = [rows for _, rows in row_chunks(N, batch_size)], []
        # a bar on a terminal only: in a log file it would be one endless line
        total = N if chunks is None else None
        bar = tqdm(total=total, unit="cell", desc="sampling", disable=None if progress else True)
        with dropout_off(self), bar:
            for chunk in range(len(all_rows)) if chunks is None else chunks:
                rows = all_rows[chunk]
                generator = keyed_generator(seed, chunk, device=self.device)
                conditions = self._told(rows, given, (origin, source), sizes, gene_ids, generator)
                x = self._start(rows, len(gene_ids), observed).to(self.device)
                genes = gene_ids.to(self.device)
                denoise = denoiser(self, x, genes, conditions, guidance_scale, from_nothing=observed is None)
                x = sample_counts(denoise, x, generator=generator, **options).cpu()
                (cells.append if on_chunk is None else partial(on_chunk, chunk))(x)
                bar.update(len(x))
        return torch.cat(cells) if cells else torch.empty(0, len(gene_ids), dtype=torch.long)

    def _steps(self, steps: int | str | None, origin: str | None, source: torch.Tensor | None) -> int | str:
        if origin == "null" and steps == "auto":  # the curve was measured with the state that sampling is given
            raise ValueError(
                "steps='auto' goes by cells whose state is given, and here it is not: give a number of steps"
            )
        if steps is not None:
            return steps
        all_told = origin in ("bank", "prior") or (origin == "given" and not bool(source.isnan().any()))
        if all_told and self.config.count_distribution == "nb":
            return 1  # more calls pull a cell to the noise of the cell that its state was made of
        return "auto" if self.config.entropy_curve is not None and (all_told or origin is None) else 20

    def _told(self, rows: slice, given, states, sizes, gene_ids: torch.Tensor, generator) -> dict[str, torch.Tensor]:
        """What the network is told of a chunk of cells: the ``given`` conditions, their state and their library size,
        which are drawn together unless they are given. ``states`` are what :meth:`_origin_of_states` says."""
        conditions, drawn = select_rows(given, rows, self.device), None
        origin, source = states
        if origin == "given":
            conditions["state"] = source[rows].to(self.device)
        elif origin in ("bank", "prior"):  # z and log1p(total)
            if origin == "bank":
                drawn = self.state_source.bank[source[rows].to(self.device)]
            else:
                drawn = self._prior_draw(rows, conditions, sizes, generator)
            drawn = drawn + self._origins(len(drawn), conditions)[1]
            conditions["state"] = self._told_state(drawn)
        conditions["library_size"] = self._library_size(sizes, drawn, rows, conditions, gene_ids, generator)
        return conditions

    def _ids_of(self, names: dict[str, object], num_cells: int | None) -> dict[str, torch.Tensor]:
        """Ids of labels given by name, {} where none is."""
        if all(name is None for name in names.values()):
            return {}
        if self.tokenizer is None:
            is_remote = type(self).__module__.startswith("transformers_modules")  # its code was trusted already
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, trust_remote_code=is_remote)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"labels were given by name, and there is no tokenizer in {self.name_or_path!r} to look them up "
                    "in: set model.tokenizer to the model's DCMTokenizer"
                ) from error
        ids = self.tokenizer.conditions(**names, num_cells=num_cells)
        return {name: value for name, value in ids.items() if name != "num_cells"}

    @torch.no_grad()
    def draw_labels(
        self,
        num_cells: int,
        *,
        cell_type_ids: torch.Tensor | None = None,
        perturbation_ids: torch.Tensor | None = None,
        covariate_ids: torch.Tensor | None = None,
        seed: int = 0,
    ) -> dict[str, int | torch.Tensor]:
        """Draw the labels that are not given, in the proportions of the training cells that have the given ones.

        Args:
            num_cells: N.
            cell_type_ids: (N,), -1 is not given; likewise the other conditions, as in :meth:`forward`.
            seed: the same seed gives the same labels.

        Returns:
            Arguments of :meth:`generate`. What no training cell has is left as it is given.
        """
        given = {"cell_type_ids": cell_type_ids, "perturbation_ids": perturbation_ids, "covariate_ids": covariate_ids}
        given = {name: ids for name, ids in given.items() if ids is not None}
        check_conditions(self.config, given)
        N = _num_cells(num_cells, given)
        if not len(self.label_counts.keys):
            return {"num_cells": N, **given}
        first = 1 + len(self.config.covariates)  # column of the perturbations
        asked, generator = self._group_keys(N, given).cpu(), keyed_generator(seed, LABELS)
        keys = self.label_counts.complete(asked, generator)
        if self.config.effect_groups and bool((keys[:, :first] < 0).any()):
            # of perturbations that no training cell has: the other labels of control cells
            of_control = self.label_counts.complete(self._of_control(asked), generator)
            keys = torch.cat([torch.where(keys < 0, of_control, keys)[:, :first], keys[:, first:]], dim=1)
        drawn = {}
        if self.config.num_cell_types:
            drawn["cell_type_ids"] = keys[:, 0]
        if self.config.num_perturbations:
            drawn["perturbation_ids"] = keys[:, first:]
            if perturbation_ids is not None:  # a combination may be wider than those of training cells
                width = max(perturbation_ids.shape[1], keys.shape[1] - first)
                theirs, ours = (
                    torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1)
                    for ids in (perturbation_ids.cpu(), keys[:, first:])
                )
                drawn["perturbation_ids"] = torch.where((theirs >= 0).any(dim=1, keepdim=True), theirs, ours)
        if first > 1:
            drawn["covariate_ids"] = keys[:, 1:first]
        return {"num_cells": N, **drawn}

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
        is_known = self.config.library_size_conditioning
        if library_size is None and is_known and not is_imputation:
            return None
        if library_size is None or (isinstance(library_size, str) and library_size == "null"):
            return torch.full((N,), -1.0)
        if not is_known:
            raise ValueError(
                f"library_size={library_size!r} was given, but this model was trained without library-size "
                "conditioning: leave it out"
            )
        if isinstance(library_size, str):
            raise ValueError(f"library_size={library_size!r}, expected numbers, None (drawn) or 'null' (not given)")
        sizes = torch.as_tensor(library_size, dtype=torch.float32).cpu()
        if sizes.ndim > 1 or (sizes.ndim == 1 and len(sizes) != N) or not bool(((sizes >= 0) & sizes.isfinite()).all()):
            raise ValueError(f"library_size of shape {tuple(sizes.shape)}, expected one number or {N}, all 0 or more")
        return sizes.expand(N)

    def _origin_of_states(
        self, state, N: int, given, seed: int, is_imputation: bool
    ) -> tuple[str | None, torch.Tensor | None]:
        """Where states come from, and what is known of them: ``"given"`` with states (N, E), ``"bank"`` with its rows
        (N,), ``"prior"`` (drawn for each chunk) or ``"null"``; None for a model without a cell state."""
        config, source = self.config, self.state_source
        is_tensor = torch.is_tensor(state)
        if state is not None and not is_tensor and state not in ("null", "prior", "bank"):
            raise ValueError(f"state={state!r}, expected states, None (drawn), 'prior', 'bank' or 'null' (not given)")
        if not config.state_dim:
            if is_tensor or state in ("prior", "bank"):
                raise ValueError("state was given, but this model has no cell state (state_dim=0): leave it out")
            return None, None
        if is_tensor:
            if state.shape != (N, config.state_width):
                raise ValueError(f"state has shape {tuple(state.shape)}, expected ({N}, {config.state_width})")
            return "given", state.float()
        if state is None:
            state = "null" if is_imputation else "bank" if source.has_bank else "prior"
        if state == "bank" and not source.has_bank:
            raise ValueError("state='bank', but this checkpoint keeps no states of training cells: take 'prior'")
        if state != "null" and not len(source.keys):
            raise ValueError("this model stores no states of its training cells: give state=, or 'null'")
        return state, source.rows_of_bank(self._origins(N, given)[0], seed) if state == "bank" else None

    def _prior_draw(self, rows: slice, conditions, sizes, generator) -> torch.Tensor:
        """(z, log1p(total)) of a chunk (B, d+1); where the library sizes are given, of about such cells."""
        of_chunk = None if sizes is None else sizes[rows]
        is_given = of_chunk is not None and bool((of_chunk >= 0).all())
        log_sizes = torch.log1p(of_chunk).to(self.device) if is_given else None
        keys, shift = self._origins(rows.stop - rows.start, conditions)
        if log_sizes is not None and torch.is_tensor(shift):  # it is added afterwards
            log_sizes = log_sizes - shift[:, -1]
        return self.state_source.draw(keys, conditions.get("cell_type_ids"), generator, log_sizes)

    def _origins(self, number: int, conditions) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Keys (B, W) of the groups that states are drawn from, and what is added to these (B, d+1).

        Where no training cell has the perturbations in the cell type: control cells and the perturbations' shift, if
        that is known; or cells of that one among them that shifts most, and what is left of the shift.
        """
        keys = self._group_keys(number, conditions)
        names = ("perturbation_ids", "perturbation_embeds", "target_gene_ids")
        ids, *vectors = (None if (x := conditions.get(name)) is None else x.to(self.device) for name in names)
        if (ids is None and vectors[0] is None) or not self.config.effect_groups:
            return keys, 0.0
        ids = keys.new_full((number, 1), -1) if ids is None else ids
        known = self.conditions.perturbation, self.target_gene_ids
        effects, ids = self.effects.with_vectors(ids, *vectors, *known)
        keys, types = self._group_keys(number, {**conditions, "perturbation_ids": ids}), keys[:, 0]
        groups = self.state_source.keys
        first = keys.shape[1] - self.library_sizes.perturbation_columns

        def has_cells(keys: torch.Tensor) -> torch.Tensor:
            return groups[first_match(groups, keys), first] != ANY

        is_new = ~has_cells(keys) & (ids >= 0).any(dim=1)
        start = self._of_control(keys)
        whole = effects.of_state(types, ids)
        told = torch.zeros_like(whole)
        for column in ids.split(1, dim=1):
            alone = self._alone(keys, column)
            shift = effects.of_state(types, column)
            is_larger = (shift[:, :-1].norm(dim=1) > told[:, :-1].norm(dim=1)) & has_cells(alone)
            start, told = (torch.where(is_larger[:, None], *pair) for pair in ((alone, start), (shift, told)))
        is_new &= has_cells(start)
        left = (whole - told).masked_fill(~is_new[:, None], 0.0)
        return torch.where(is_new[:, None], start, keys), left

    def _of_control(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys (B, W) of the same cell type and covariates with the control for perturbation."""
        return self._alone(keys, self.effects.control_id.expand(len(keys), 1))

    def _alone(self, keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Keys (B, W) of the same cell type and covariates with perturbations ``ids`` (B, 1)."""
        first = keys.shape[1] - self.library_sizes.perturbation_columns
        return torch.cat([keys[:, :first], ids.to(keys), torch.full_like(keys[:, first + 1 :], -1)], dim=1)

    def _told_state(self, drawn: torch.Tensor) -> torch.Tensor:
        """What the network is told (B, E) of (z, log1p(total)): the total too, where it is no condition of its own."""
        z, log_total = drawn[:, :-1], drawn[:, -1:]
        if self.config.library_size_conditioning:
            return z
        return torch.cat([z, self.cell_state.standardized(log_total)], dim=1)

    def _labels(self, conditions) -> list[torch.Tensor | None]:
        names = ("cell_type_ids", "perturbation_ids", "covariate_ids")
        return [None if (ids := conditions.get(name)) is None else ids.to(self.device) for name in names]

    def _group_keys(self, number: int, conditions) -> torch.Tensor:
        return self.library_sizes.group_keys(number, *self._labels(conditions))

    def _library_size(self, sizes, drawn, rows: slice, conditions, gene_ids: torch.Tensor, generator) -> torch.Tensor:
        """Library sizes (B,) over genes ``gene_ids`` (L,), as given, or drawn with the state or without one."""
        if sizes is not None:
            return sizes[rows].to(self.device)
        B, labels = rows.stop - rows.start, self._labels(conditions)
        if drawn is None:
            size = self.library_sizes.draw(B, *labels, generator)
        else:
            size = drawn[:, -1].expm1().clamp(min=1).round()
        if len(gene_ids) == self.config.num_genes:
            return size
        cell_type_ids = size.new_full((B,), -1, dtype=torch.long) if labels[0] is None else labels[0]
        mean = self.totals.mean(torch.arange(self.config.num_genes, device=self.device).expand(B, -1), cell_type_ids)
        share = mean[:, gene_ids.to(self.device)].sum(dim=1) / mean.sum(dim=1).clamp(min=1e-9)
        return (size * share).round()


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


def row_chunks(num_cells: int, batch_size: int) -> Iterator[tuple[int, slice]]:
    """Index and rows of each chunk of at most ``batch_size`` cells.

    Raises:
        ValueError: ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    for chunk, start in enumerate(range(0, num_cells, batch_size)):
        yield chunk, slice(start, min(start + batch_size, num_cells))


def select_rows(
    arguments: dict[str, torch.Tensor | None], rows: slice, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Arguments of a chunk of cells, on ``device``; ``gene_ids`` (L,) are those of every cell."""
    given = {name: value for name, value in arguments.items() if value is not None}
    shared = [name for name, value in given.items() if name == "gene_ids" and value.ndim == 1]
    return {name: (value if name in shared else value[rows]).to(device) for name, value in given.items()}


@contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
