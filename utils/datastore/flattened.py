"""Flattened token tries: each trie as one pickle of arrays, in the order in which it is searched.

    {trie folder}/individual_flattened_tries/{id}.pkl    {array's name: (dtype, shape, bytes)}, pickle protocol 5
    {trie folder}/individual_flattened_tries/manifest.json

Rows are prefix-sorted over all depths (a chunk before those it is a prefix of), equal chunks by window and position.
Context vectors are float32 of length 1. A pickle holds nothing but built-in types, and is read by an unpickler that
makes no others. Worker processes do the flattening, so nothing here loads torch.
"""

import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from utils.datastore.chunks import sort_chunks, take_chunks
from utils.datastore.trie_files import (
    HIDDEN_STATES_MANIFEST,
    HIDDEN_STATES_STAGE,
    MANIFEST,
    STAGE,
    ContextVectors,
    TrieRows,
    datastore_token_ids,
    positions_path,
    read_trie_rows,
    trie_path,
    vectors_path,
)
from utils.files import InputError, exclusive_lock, file_fingerprint, make_folder, remove_folder, require_file
from utils.manifest import (
    FileSum,
    Manifest,
    begin_stage,
    finish_stage,
    list_files,
    read_finished,
    read_manifest,
    require_as_written,
    summed,
)
from utils.progress import ProgressBar
from utils.workers import in_processes, n_workers_for, pack

FOLDER = "individual_flattened_tries"
FLATTENING_STAGE = "eval.py"
FORMAT = 2  # of the pickles; those of another format are made again
ARRAYS = {"context_vectors", "chunk_ids", "chunk_offsets", "windows", "positions"}
# Bytes of context vectors that are normalised at a time: few enough to stay in the processor's cache.
BLOCK_BYTES = 1 << 20
# Bytes of .h5 that a process flattens as one task, less where there is little to share out, and at most as many tries.
TASK_BYTES, LEAST_TASK_BYTES, MAX_TASK_TRIES = 1 << 24, 1 << 20, 256
# What one process flattens in a second, and how many files it opens and writes (benchmarks/build.py).
BYTES_PER_S, TRIES_PER_S = 250_000_000, 1_500
# Enough that all processes end at about the same time.
TASKS_PER_WORKER = 4
# What flattening a trie needs at most, in bytes of its .h5: the arrays, their bytes in the pickle, and what is sorted.
MEMORY_PER_BYTE = 4


def pickle_path(folder: Path, entry_token_id: int) -> Path:
    return folder / f"{entry_token_id}.pkl"


# ---- A whole datastore


def flatten(trie_folder: Path, reprocess: bool, verify: bool, max_bytes: int) -> dict[int, int]:
    """Make the pickles that are missing; returns the number of rows of each entry token's trie.

    reprocess False: nothing is made, and InputError raised where a pickle is missing or of another datastore. verify:
    read all files that are used, and raise InputError where one is not as it was written. max_bytes: of memory.
    """
    n_rows = _read_flattened(trie_folder, reprocess, verify)
    if n_rows is not None:
        return n_rows
    # Two commands may need the same datastore at once: the second waits, and finds it flattened.
    with exclusive_lock(make_folder(trie_folder), "flattening", wait=True):
        n_rows = _read_flattened(trie_folder, reprocess, verify)
        return _make_flattened(trie_folder, verify, max_bytes) if n_rows is None else n_rows


def _made_from(trie_folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments and inputs of the manifest."""
    inputs = {name: file_fingerprint(trie_folder / name) for name in (MANIFEST, HIDDEN_STATES_MANIFEST)}
    return {"format": FORMAT}, inputs


def _is_current(path: Path, trie_folder: Path) -> bool:
    if not path.exists():
        return False
    found = read_manifest(path, FLATTENING_STAGE)
    return (found.arguments, found.inputs) == _made_from(trie_folder)


def _read_flattened(trie_folder: Path, reprocess: bool, verify: bool) -> dict[int, int] | None:
    """The rows of each entry token's trie where all pickles are there; None where some are to be made.

    Raises InputError where that is so without `reprocess`, or where a pickle is not as it was written.
    """
    folder, path = trie_folder / FOLDER, trie_folder / FOLDER / MANIFEST
    is_current = _is_current(path, trie_folder)
    if is_current and (found := read_manifest(path, FLATTENING_STAGE)).complete:
        n_rows = _rows_by_token(path, found)
        pickles = [pickle_path(folder, token_id) for token_id in n_rows]
        # A missing pickle is made again where that is allowed; one that was changed has to be deleted first.
        if not reprocess or all(pickle.exists() for pickle in pickles):
            require_as_written(path, found, pickles, verify=verify)
            return n_rows
    if reprocess:
        return None
    are_others = path.exists() and not is_current
    reason = "were made from another datastore or by an older version" if are_others else "are not all there"
    raise InputError(f"{folder}: the flattened tries {reason}; leave out --no_reprocessing once")


def _make_flattened(trie_folder: Path, verify: bool, max_bytes: int) -> dict[int, int]:
    folder, path = trie_folder / FOLDER, trie_folder / FOLDER / MANIFEST
    if not _is_current(path, trie_folder):
        remove_folder(folder)
    manifest = begin_stage(make_folder(folder) / MANIFEST, FLATTENING_STAGE, *_made_from(trie_folder))
    token_ids = datastore_token_ids(trie_folder)
    _require_tries_as_written(trie_folder, token_ids, verify)
    done: dict[int, Flattened] = {}
    bar = ProgressBar(total=len(token_ids), desc="flattening token tries", unit="trie", disable=not token_ids)
    with bar:
        for flattened in write_flattened(trie_folder, folder, token_ids, max_bytes):
            done |= flattened
            bar.update(len(flattened))
    sums = {pickle_path(folder, token).name: one.sum for token, one in done.items() if one.sum}
    files = list_files(path, [pickle_path(folder, token_id) for token_id in token_ids], sums)
    finish_stage(path, manifest, {"rows": {str(token_id): done[token_id].n_rows for token_id in token_ids}}, files)
    return _rows_by_token(path, manifest)


def _require_tries_as_written(trie_folder: Path, token_ids: list[int], verify: bool) -> None:
    for name, stage, paths in (
        (MANIFEST, STAGE, (trie_path, positions_path)),
        (HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE, (vectors_path,)),
    ):
        manifest = read_finished(trie_folder / name, stage)
        files = [path(trie_folder, token_id) for token_id in token_ids for path in paths]
        require_as_written(trie_folder / name, manifest, files, verify=verify)


def _rows_by_token(path: Path, manifest: Manifest) -> dict[int, int]:
    try:
        return {int(token_id): int(n) for token_id, n in manifest.results["rows"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: is damaged; delete {path.parent} and run eval.py again") from error


class Flattened(NamedTuple):
    """The number of rows of a trie, and the sum of its pickle where this run wrote it."""

    n_rows: int
    sum: FileSum | None


def write_flattened(
    trie_folder: Path, folder: Path, entry_token_ids: Sequence[int], max_bytes: int
) -> Iterator[dict[int, Flattened]]:
    """Write the pickle of each entry token that has none; yields what each token has as it is written.

    max_bytes: of memory. One trie at a time is flattened, however large, and several at once where they fit.
    """
    n_bytes = {token: _size(vectors_path(trie_folder, token)) for token in entry_token_ids}
    seconds = sum(n_bytes.values()) / BYTES_PER_S + len(n_bytes) / TRIES_PER_S
    n_workers = n_workers_for(seconds)
    largest = max_bytes // (MEMORY_PER_BYTE * n_workers)
    prepare = partial(_Flattener, trie_folder, folder)
    small = {token: size for token, size in n_bytes.items() if size <= largest}
    even_share = max(sum(small.values()) // (TASKS_PER_WORKER * n_workers), LEAST_TASK_BYTES)
    tasks = pack(small, min(TASK_BYTES, even_share, largest), MAX_TASK_TRIES)
    yield from in_processes(prepare, tasks, n_workers, where=str(folder))
    large = [[token] for token in entry_token_ids if token not in small]
    yield from in_processes(prepare, large, 1, where=str(folder))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a missing one is named when it is read


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
        return Flattened(len(arrays["windows"]), write_arrays(path, arrays))


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
    """(N, D) float32, a block at a time: there are many rows, and they are float64 meanwhile."""
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


# ---- Pickles


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> FileSum:
    """Write a pickle of arrays; returns its sum."""
    # A PickleBuffer without a callback is pickled as a bytearray, without a copy on the way.
    packed = {name: (array.dtype.str, array.shape, pickle.PickleBuffer(array.data)) for name, array in arrays.items()}
    with summed(path) as file:
        pickle.dump(packed, file, protocol=5)
    return file.sum


class _PlainUnpickler(pickle.Unpickler):
    """Reads built-in types; refuses to make any other object."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a pickle; raises InputError, which names the file, where it is missing, damaged or holds anything
    else."""
    require_file(path, "flattening makes; leave out --no_reprocessing once")
    try:
        with open(path, "rb") as file:
            packed = _PlainUnpickler(file).load()
        arrays = {name: _unpack(*entry) for name, entry in packed.items()}
    except Exception as error:
        # A damaged pickle can end in any exception of the built-in types.
        raise InputError(
            f"{path}: is no pickle of arrays ({error}); delete {path.parent} and run eval.py again"
        ) from error
    if set(arrays) != ARRAYS:
        raise InputError(f"{path}: does not hold a trie's arrays; delete {path.parent} and run eval.py again")
    return arrays


def _unpack(dtype: Any, shape: Any, data: Any) -> np.ndarray:
    array_type = np.dtype(str(dtype))
    if array_type.kind not in "if" or len(data) != math.prod(shape) * array_type.itemsize:
        raise ValueError(f"{len(data)} bytes are no array of {dtype} {shape}")
    return np.frombuffer(data, dtype=array_type).reshape(shape)
