"""Score the floor, every generator and every baseline of a comparison by several protocols."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.comparison.baselines import BASELINE_DRAWS, Sampler, baseline_draws
from eval.comparison.cells import CellCounts, Comparison
from eval.comparison.floor import FLOOR, FLOOR_DRAWS, Halves, floor_draws, without_training_cells
from eval.comparison.protocols import Protocol, Reference, Score, averaged_scores, evaluate_pair, prepare_reference
from eval.metrics.table import COPYING

Scores = dict[str, list[list[Score]]]  # by model, of each of its samples


def score_models(
    comparison: Comparison,
    protocols: Sequence[Protocol],
    samplers: dict[str, Sampler],
    *,
    seed: int = 0,
) -> list[tuple[Reference, Scores]]:
    """Return for each protocol what was compared with, and the scores: of the floor, generators, then baselines.

    Test cells of conditions without training cells are halved at random: one half is what everything is compared with,
    the other is the floor. In every draw of the floor each model is compared with the same half, its samples in turn;
    the score of a sample is the mean over its draws, the reference that of the last draw.

    Without training cells there is no floor, and nothing is halved.

    Raises:
        ValueError: fewer than two test cells, or a protocol that groups by a column that is none of the conditions.
    """
    real = comparison.real
    floor = {} if comparison.train is None else {FLOOR: floor_draws(comparison.train, real, seed=seed)}
    sources: dict[str, Iterable[CellCounts]] = {
        **floor,
        **comparison.generated,
        **{name: baseline_draws(sample, real, seed=seed) for name, sample in samplers.items()},
    }
    numbers = dict.fromkeys(floor, FLOOR_DRAWS) | {model: len(files) for model, files in comparison.generated.items()}
    numbers |= dict.fromkeys(samplers, BASELINE_DRAWS)
    halved = without_training_cells(comparison.train, real) if floor else []
    samples = {m: itertools.cycle(found) if halved and m != FLOOR else iter(found) for m, found in sources.items()}
    scores = [{model: [[] for _ in range(number)] for model, number in numbers.items()} for _ in protocols]
    draws = max(numbers.values())
    comparisons = FLOOR_DRAWS + draws * (len(numbers) - 1) if halved else sum(numbers.values())
    # most matrices are small (one condition): a second BLAS thread makes it slower, on a busy machine fivefold
    with (
        threadpool_limits(limits=1, user_api="blas"),
        tqdm(total=comparisons * len(protocols), desc="scoring", unit="comparison", disable=None) as bar,
    ):
        for draw in range(draws):
            if halved or not draw:
                halves = Halves(comparison.train, real, np.random.default_rng([seed, draw]))
                options = {"train": comparison.train, "seed": seed}
                references = [prepare_reference(halves.compared, protocol, **options) for protocol in protocols]
            for model, number in numbers.items():
                drawn = next(samples[model], None)
                if drawn is None:
                    continue
                bar.set_postfix_str(model)
                drawn = halves.floor(drawn) if model == FLOOR else halves.beside(drawn)
                for reference, found in zip(references, scores):
                    pair = evaluate_pair(drawn, reference, seed=seed)
                    if model == FLOOR:  # training cells are at no distance from themselves; it is 1 for test cells
                        pair = [replace(score, value=1.0) if score.metric == COPYING else score for score in pair]
                    found[model][draw % number].append(pair)
                    bar.update()
    means = [{model: [averaged_scores(s) for s in repeats] for model, repeats in found.items()} for found in scores]
    return list(zip(references, means))
