"""Flattened token tries: each trie as one pickle of arrays, in the order in which it is searched.

    {trie folder}/individual_flattened_tries/{id}.pkl    a dict of arrays, pickle protocol 5

Rows are prefix-sorted over all depths (a chunk before those it is a prefix of), equal chunks by window and position.
Context vectors are float32 of length 1. Pickles are read by an unpickler that knows arrays and nothing else. Nothing
here loads torch: worker processes do the flattening.
"""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.checksums import Written, summed
from utils.chunks import sort_chunks, take_chunks
from utils.files import InputError, n_cores, require_file
from utils.token_trie import ContextVectors, TrieRows, read_trie_rows, vectors_path
from utils.workers import in_processes

ARRAYS = {"context_vectors", "chunk_ids", "chunk_offsets", "windows", "positions"}
SAFE_GLOBALS = {("numpy", "dtype"), ("numpy._core.numeric", "_frombuffer")}
# Bytes of context vectors that are made unit vectors at a time: caches hold them.
BLOCK_BYTES = 1 << 20
# Bytes of .h5 that a process flattens as one task, less where there is little to share out, and at most as many tries.
TASK_BYTES, LEAST_TASK_BYTES, MAX_TASK_TRIES = 1 << 24, 1 << 20, 256
# Enough that all processes end at about the same time.
TASKS_PER_WORKER = 4
# What flattening a trie needs at most, in bytes of its .h5: the arrays, their bytes in the pickle, and what is sorted.
MEMORY_PER_BYTE = 4


class Flattened(NamedTuple):
    """The rows of a trie, and what its pickle holds where this run wrote it."""

    n_rows: int
    written: Written | None


def pickle_path(folder: Path, entry_token_id: int) -> Path:
    return folder / f"{entry_token_id}.pkl"


# ---- One trie


def flattened_arrays(trie_folder: Path, entry_token_id: int) -> dict[str, np.ndarray]:
    """The arrays of one trie from the files of stages 3 and 4; raises InputError where they are damaged."""
    rows = read_trie_rows(trie_folder, entry_token_id)
    order = prefix_order(rows)
    chunk_ids, chunk_offsets = take_chunks(
        rows.chunk_ids, rows.chunk_offsets[:-1][order], np.diff(rows.chunk_offsets)[order]
    )
    return {
        "context_vectors": _unit_vectors(ContextVectors(trie_folder, rows), order),
        "chunk_ids": chunk_ids.astype(np.int32),
        "chunk_offsets": chunk_offsets.astype(np.int64),
        "windows": rows.windows[order].astype(np.int64),
        "positions": rows.positions[order].astype(np.int32),
    }


def prefix_order(rows: TrieRows) -> np.ndarray:
    """(N,) int64: the rows by chunk ids, a chunk before those it is a prefix of, then by window and position."""
    by_place = np.lexsort((rows.positions, rows.windows))
    lengths = np.diff(rows.chunk_offsets)[by_place]
    return by_place[sort_chunks(*take_chunks(rows.chunk_ids, rows.chunk_offsets[:-1][by_place], lengths))]


def _unit_vectors(vectors: ContextVectors, order: np.ndarray) -> np.ndarray:
    """(N, D) float32, a block at a time: they are many, and float64 on the way."""
    n, hidden_size = vectors.shape
    units = np.empty((n, hidden_size), dtype=np.float32)
    n_block = max(BLOCK_BYTES // (hidden_size * units.itemsize), 1)
    for first in range(0, n, n_block):
        units[first : first + n_block] = unit_rows(vectors.take(order[first : first + n_block]))
    return units


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """(N, D) float32 rows of length 1; a row of zeros stays one, similar to nothing."""
    exact = vectors.astype(np.float64)
    norms = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    norms[norms == 0] = 1
    exact /= norms
    return exact.astype(np.float32)


# ---- All tries


def write_flattened(
    trie_folder: Path, folder: Path, entry_token_ids: Sequence[int], max_bytes: int
) -> Iterator[dict[int, Flattened]]:
    """Write the pickle of each entry token, unless it is there whole; yields, as they are written, what each entry token has.

    max_bytes: of memory; one trie at a time is flattened, however large, and several at once where they fit.
    """
    n_workers = n_cores()
    n_bytes = {token: _size(vectors_path(trie_folder, token)) for token in entry_token_ids}
    bound = max_bytes // (MEMORY_PER_BYTE * n_workers)
    prepare = partial(_Flattener, trie_folder, folder)
    small = [token for token in entry_token_ids if n_bytes[token] <= bound]
    shared_out = max(sum(n_bytes[token] for token in small) // (TASKS_PER_WORKER * n_workers), LEAST_TASK_BYTES)
    tasks = _tasks(small, n_bytes, min(TASK_BYTES, shared_out, bound))
    yield from in_processes(prepare, tasks, n_workers, where=str(folder))
    large = [[token] for token in entry_token_ids if n_bytes[token] > bound]
    yield from in_processes(prepare, large, 1, where=str(folder))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # one that is gone is named when it is read


def _tasks(entry_token_ids: Sequence[int], n_bytes: dict[int, int], bound: int) -> list[list[int]]:
    tasks: list[list[int]] = []
    n_in_last = 0
    for token in sorted(entry_token_ids, key=lambda token: (-n_bytes[token], token)):
        if not tasks or n_in_last + n_bytes[token] > bound or len(tasks[-1]) == MAX_TASK_TRIES:
            tasks.append([])
            n_in_last = 0
        tasks[-1].append(token)
        n_in_last += n_bytes[token]
    return tasks


@dataclass(frozen=True)
class _Flattener:
    trie_folder: Path
    folder: Path

    def __call__(self, entry_token_ids: list[int]) -> dict[int, Flattened]:
        return {token: self._flatten(token) for token in entry_token_ids}

    def _flatten(self, entry_token_id: int) -> Flattened:
        path = pickle_path(self.folder, entry_token_id)
        if path.exists():
            return Flattened(len(read_arrays(path)["windows"]), None)
        arrays = flattened_arrays(self.trie_folder, entry_token_id)
        with summed(path) as file:
            pickle.dump(arrays, file, protocol=5)
        return Flattened(len(arrays["windows"]), file.written)


# ---- Pickles


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays of numbers; any other object in the file is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickle; raises InputError, which names the file, where it is missing, cut off or holds anything else."""
    require_file(path, "flattening makes; leave out --no_reprocessing once")
    try:
        with open(path, "rb") as file:
            arrays = _ArrayUnpickler(file).load()
    except Exception as error:
        # A damaged pickle can end in any exception of the objects it names, of which only arrays are allowed.
        raise InputError(
            f"{path}: is no pickle of arrays ({error}); delete {path.parent} and run eval.py again"
        ) from error
    if not isinstance(arrays, dict) or set(arrays) != ARRAYS or not all(_is_numbers(a) for a in arrays.values()):
        raise InputError(f"{path}: does not hold a trie's arrays; delete {path.parent} and run eval.py again")
    return arrays


def _is_numbers(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "if"
