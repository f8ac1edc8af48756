"""Context vectors: for each row of each token trie, the hidden state at its entry token, gathered from stage 2's `.h5`.

The rows of several entry tokens are gathered together, in the order in which they lie in the memory-mapped file, so
that many small tries cost few passes over it; a huge trie is gathered in blocks. Worker processes share the work; they
load numpy and h5py, never torch.
"""

import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from utils.datastore.trie_files import positions_path, read_trie_positions, write_context_vectors
from utils.extraction.hidden_states import map_all_hidden_states, read_index_map
from utils.files import InputError
from utils.manifest import FileSum, Manifest
from utils.workers import in_processes, n_workers_for, pack

LOGGER = logging.getLogger(__name__)
# Bytes of context vectors that a worker holds at a time.
BLOCK_BYTES = 1 << 26
# Bytes that are copied at a time on the way there.
PIECE_BYTES = 1 << 18
# Pages that are given back together begin where a multiple of this does.
PAGES_BYTES = 1 << 16
# The least that a row takes in tok_pos_{id}.json, "[0, 0], ".
POSITION_BYTES = 8
# What one process gathers and writes in a second, and how many files it creates (benchmarks/build.py).
BYTES_PER_S, TRIES_PER_S = 400_000_000, 4_000
# Batches per worker: enough that all end at about the same time.
BATCHES_PER_WORKER = 4
# Tries of a batch: a second's work, so that the progress bar moves and Ctrl-C need not be waited for.
MAX_BATCH_TRIES = 256


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of all windows: where their `.h5` is, each window's length and its first row in it."""

    path: Path
    lengths: np.ndarray  # (W,) int64
    first_rows: np.ndarray  # (W,) int64
    hidden_size: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        return max(BLOCK_BYTES // self.row_bytes, 1)


def open_hidden_states(path: Path, seqlen_path: Path, acc_index_path: Path, extraction: Manifest) -> HiddenStates:
    """Check stage 2's `.h5` and its maps against each other and against stage 2's manifest.

    Raises InputError where a file is missing, damaged or of another run.
    """
    lengths, first_rows = read_index_map(seqlen_path), read_index_map(acc_index_path)
    all_states = map_all_hidden_states(path)
    n_rows, hidden_size = all_states.shape
    n_windows = extraction.results["n_windows"]
    for map_path, values in ((seqlen_path, lengths), (acc_index_path, first_rows)):
        if len(values) != n_windows:
            raise InputError(f"{map_path}: covers {len(values)} windows of the {n_windows} in {path}; give its own map")
    if not np.array_equal(first_rows, np.cumsum(lengths) - lengths):
        raise InputError(
            f"{acc_index_path}: does not say where windows of {seqlen_path}'s lengths begin; give both of one run"
        )
    if lengths.sum() != n_rows:
        raise InputError(
            f"{seqlen_path}: its windows have {lengths.sum()} tokens, {path} has {n_rows} rows; give its own map"
        )
    if hidden_size != extraction.results["hidden_size"]:
        expected = extraction.results["hidden_size"]
        raise InputError(
            f"{path}: its vectors have size {hidden_size}, its manifest says {expected}; run stage 2 again"
        )
    return HiddenStates(path, lengths, first_rows, hidden_size, all_states.dtype)


# ---- One batch of tries


class Gatherer:
    """Writes the `.h5` of entry tokens from one memory map."""

    def __init__(self, folder: Path, hidden_states: HiddenStates) -> None:
        self._folder, self._hidden_states = folder, hidden_states
        mapped = map_all_hidden_states(hidden_states.path)
        assert isinstance(mapped.base, mmap.mmap)
        self._mapped: mmap.mmap = mapped.base
        self._all: np.ndarray = np.asarray(mapped)
        # Of the first row in the mapped part of the file.
        self._offset: int = mapped.offset % mmap.ALLOCATIONGRANULARITY

    def __call__(self, entry_token_ids: Sequence[int]) -> dict[str, FileSum]:
        """Write the `.h5` of these entry tokens; returns each one's sum by name.

        Raises InputError where a row's position is not in the text, or its hidden state is NaN or infinite.
        """
        read = [read_trie_positions(self._folder, token) for token in entry_token_ids]
        rows_of = [
            self._rows(token, windows, positions)
            for token, (windows, positions, _) in zip(entry_token_ids, read, strict=True)
        ]
        rows = np.concatenate(rows_of)
        take = self._taker(rows)
        source, first = self._hidden_states, 0
        sums: dict[str, FileSum] = {}
        for token, (windows, _, depths) in zip(entry_token_ids, read, strict=True):
            take_own = partial(_take_from, take, first)
            vector_type = (source.hidden_size, source.dtype)
            sums |= write_context_vectors(self._folder, token, depths, vector_type, take_own, source.block_rows)
            first += len(windows)
        return sums

    def _rows(self, entry_token_id: int, windows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(N,) int64, rows of the `.h5`."""
        lengths = self._hidden_states.lengths
        is_known = windows < len(lengths)
        is_known &= positions < lengths[np.where(is_known, windows, 0)]
        if not is_known.all():
            at = int(np.argmin(is_known))
            where = f"position {positions[at]} of window {windows[at]}"
            path = positions_path(self._folder, entry_token_id)
            raise InputError(f"{path}: names {where}, which {self._hidden_states.path} lacks; run stage 3 again")
        return self._hidden_states.first_rows[windows] + positions

    def _taker(self, rows: np.ndarray) -> Callable[[int, int], np.ndarray]:
        """A function that gives the vectors of rows[a:b], from one gather where all of them fit in a block."""
        if len(rows) > self._hidden_states.block_rows:
            return lambda a, b: self._gather(rows[a:b])
        vectors = self._gather(rows)
        return lambda a, b: vectors[a:b]

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """(N, D) in the order of rows (N,), read in the order of the file, a piece at a time that caches hold."""
        order = np.argsort(rows)
        vectors = np.empty((len(rows), self._hidden_states.hidden_size), self._hidden_states.dtype)
        n_piece = max(self._hidden_states.block_rows * PIECE_BYTES // BLOCK_BYTES, 1)
        for first in range(0, len(rows), n_piece):
            piece = order[first : first + n_piece]
            read = self._all[rows[piece]]
            if not np.isfinite(read).all():
                self._refuse(int(rows[piece[np.argmin(np.isfinite(read).all(axis=1))]]))
            vectors[piece] = read
            self._forget(int(rows[piece[0]]), int(rows[piece[-1]]))
        return vectors

    def _forget(self, first_row: int, last_row: int) -> None:
        """Give the pages of some rows back: they would count as this process's memory, up to the whole file."""
        # The system keeps them while it has room. With a page it maps some of its neighbours.
        row_bytes = self._all.strides[0]
        first = max(self._offset + first_row * row_bytes - PAGES_BYTES, 0) // PAGES_BYTES * PAGES_BYTES
        end = min(self._offset + (last_row + 1) * row_bytes + PAGES_BYTES, len(self._mapped))
        self._mapped.madvise(mmap.MADV_DONTNEED, first, end - first)

    def _refuse(self, row: int) -> NoReturn:
        window = int(np.searchsorted(self._hidden_states.first_rows, row, side="right")) - 1
        place = f"position {row - self._hidden_states.first_rows[window]} of window {window}"
        raise InputError(f"{self._hidden_states.path}: holds NaN or infinity at {place}; run stage 2 again")


def _take_from(take: Callable[[int, int], np.ndarray], first: int, a: int, b: int) -> np.ndarray:
    return take(first + a, first + b)


# ---- All tries


def write_all_context_vectors(
    folder: Path, entry_token_ids: Sequence[int], hidden_states: HiddenStates, max_workers: int
) -> Iterator[dict[str, FileSum]]:
    """Write the `.h5` of these entry tokens with at most `max_workers` processes, never more than there are cores.

    Yields the sums of a batch's files, by name, as it ends. Raises what a worker raises.
    """
    # As the sizes of the files tell.
    n_rows = {token: positions_path(folder, token).stat().st_size // POSITION_BYTES for token in entry_token_ids}
    total = sum(n_rows.values())
    seconds = total * hidden_states.row_bytes / BYTES_PER_S + len(n_rows) / TRIES_PER_S
    n_workers = n_workers_for(seconds, max_workers)
    max_rows = min(hidden_states.block_rows, total // (n_workers * BATCHES_PER_WORKER))
    batches = pack(n_rows, max_rows, MAX_BATCH_TRIES)
    LOGGER.debug("%s tries in %s batches, at most %s processes", len(entry_token_ids), len(batches), n_workers)
    yield from in_processes(partial(Gatherer, folder, hidden_states), batches, n_workers, where=str(folder))
