"""Draw the chunks of a run, shared among processes: each takes the next chunk that nobody has taken.

So all of them end within the time of a chunk, and as a chunk's draws depend on its number alone, the cells are the same
whoever draws them. Knows nothing of options and of the output's annotations.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from eval.drawing.chunk_files import ChunkFiles
from modeling_dcm import DCMForDenoising
from modeling_dcm.diffusion_dcm import keyed_generator
from tokenization import DCMTokenizer
from training.data.command_line import ProgressReport

logger = logging.getLogger(__name__)


def draw_chunks(
    model: DCMForDenoising,
    tokenizer: DCMTokenizer,
    asked: dict[str, object],
    files: ChunkFiles,
    state: PartialState,
    *,
    fresh: bool = False,
) -> None:
    """Draw the chunks that are not there yet, shared among the processes; return when all of them are written.

    Args:
        model: on the device of this process.
        tokenizer: its.
        asked: arguments of ``generate`` for all cells.
        files: where the chunks go.
        state: which process this is.
        fresh: throw away what an interrupted run left.

    Raises:
        ValueError: an interrupted run left chunks of another request.
        ConnectionError: another process failed.
    """
    missing = _agreed_chunks(files, state, fresh=fresh)
    already = files.num_cells_of(set(range(len(files.rows))) - set(missing))
    with _report(files.num_cells - already, state) as report:
        for chunk in missing:
            if not files.take(chunk):
                continue
            ids = model.generate(**asked, chunks=[chunk])
            # of counts that share a bin: keyed as every other draw of the chunk is
            seed = keyed_generator(asked["seed"], chunk).initial_seed()
            files.write(chunk, tokenizer.decode(ids, seed=seed).X)
            if report:
                report.update(files.num_cells_of(files.written()) - already - report.done)
        with _failure_of_another_explained():
            state.wait_for_everyone()
        if report:
            report.update(files.num_cells - already - report.done)
            logger.info("drew %d cells, %.3g per second", report.done, report.rate)


def _report(num_cells: int, state: PartialState) -> AbstractContextManager[ProgressReport | None]:
    """Only the first process reports, for all of them."""
    return ProgressReport(num_cells, task="sampling", unit="cells") if state.is_main_process else nullcontext()


def _agreed_chunks(files: ChunkFiles, state: PartialState, *, fresh: bool) -> list[int]:
    """The chunks to draw, found by the first process; its error is everyone's error."""
    found: list[object] = [None]
    if state.is_main_process:
        try:
            missing, num_damaged = files.prepare(fresh=fresh)
            kept = len(files.rows) - len(missing)
            if kept:
                logger.info("%d of %d chunks are there already and are not drawn again", kept, len(files.rows))
            if num_damaged:
                logger.warning("%d chunks are damaged and are drawn again", num_damaged)
            found = [missing]
        except (ValueError, OSError) as error:
            found = [error]
    with _failure_of_another_explained():
        broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@contextmanager
def _failure_of_another_explained() -> Iterator[None]:
    """Turn what waiting for a process that is gone raises into one line."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process failed, so there is no output yet ({error}); run again: what is drawn is kept"
        ) from error
