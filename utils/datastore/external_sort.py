"""The external sort of stage 3: the rows of all windows, sorted into token tries in bounded memory.

Each batch of windows leaves one file (a sorted run), its rows by key: entry token, then chunk length, then, as far as
bits are left, the chunk's first token. Keys order rows as the tries do, so the rows of a range of keys are one piece of
each file, and can be sorted without the others. That bounds memory also where one entry token has more rows than fit.
Rows with the same key stand in the order of the corpus, files and rows both.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.datastore.chunks import ChunkRows, sort_chunks, take_chunks
from utils.datastore.trie_files import TriePiece, trie_pieces, write_trie
from utils.files import InputError, make_folder, replacing
from utils.manifest import FileSum
from utils.workers import in_processes, n_workers_for

FOLDER = ".rows"  # in the trie folder, while stage 3 runs
# Bits of a key that hold the chunk's length: no window has so many tokens.
LENGTH_BITS = 24
KEY_BITS = 62  # so that what is above all keys is an int64 too
# Keys of a range that are looked at to find where to cut it.
SAMPLED_KEYS = 1 << 14
# Bytes of a row in memory beside its chunk's ids: key, offset and place.
ROW_BYTES, ID_BYTES = 24, 4
# Bytes of rows that take as long as creating the two files of one more entry token.
TRIE_BYTES = 2048
# Bytes that one process sorts and writes in a second (benchmarks/build.py).
BYTES_PER_S = 8_000_000
# Ids of chunks that are made into JSON at a time.
BLOCK_IDS = 1 << 18
# Bytes of rows that a process sorts at a time, where there is memory enough, and the least that is worth a task.
UNIT_BYTES, LEAST_UNIT_BYTES = 1 << 26, 1 << 19
# What stage 3 needs beside them: itself with the tokenizer's libraries, a worker with a batch of windows; and what a
# unit takes while it is sorted and made into JSON.
BYTES_OF_PARENT, BYTES_OF_WORKER, MEMORY_PER_UNIT_BYTE = 500_000_000, 150_000_000, 5
# Enough that all processes end at about the same time.
UNITS_PER_WORKER = 4


@dataclass(frozen=True)
class Keys:
    """Maps rows to int64 keys that order them as the tries do; token ids are below n_token_ids."""

    n_token_ids: int

    @property
    def _id_bits(self) -> int:
        return max(self.n_token_ids - 1, 1).bit_length()

    @property
    def _bits_below_entry(self) -> int:
        return KEY_BITS - self._id_bits

    def first_of(self, entry_id: int) -> int:
        """The least key of an entry token; that of `n_token_ids` is above all keys."""
        return entry_id << self._bits_below_entry

    def of(self, entry_ids: np.ndarray, lengths: np.ndarray, first_ids: np.ndarray) -> np.ndarray:
        """(N,) int64."""
        bits_of_first = self._bits_below_entry - LENGTH_BITS
        left_out = max(self._id_bits - bits_of_first, 0)
        keys = entry_ids.astype(np.int64) << LENGTH_BITS
        keys |= lengths
        keys <<= bits_of_first
        return np.asarray(keys | (first_ids.astype(np.int64) >> left_out))

    def entry_ids(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int64."""
        return keys >> self._bits_below_entry


class KeyRange(NamedTuple):
    """The keys from `first` on and below `end`, and the number of parts, of about equally many rows, to sort them in."""

    first: int
    end: int
    n_parts: int = 1


@dataclass(frozen=True)
class SortedRows:
    """N rows of token tries, sorted by key; equal keys are in the order of the corpus in a run, else prefix-sorted."""

    keys: np.ndarray  # (N,) int64
    offsets: np.ndarray  # (N + 1,) int64: row n's chunk is chunk_ids[offsets[n]:offsets[n + 1]]
    places: np.ndarray  # (N, 2) int32, window and position of the entry token
    chunk_ids: np.ndarray  # (M,) int32

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class SortRun:
    """A file of rows sorted by key: the arrays of a `SortedRows` one after the other."""

    path: Path
    n_rows: int
    n_ids: int


@dataclass
class SortRuns:
    """The rows of a whole corpus as sorted runs, in the order of the corpus, and the size of each entry token's rows.

    Sizes are in bytes and include the cost of creating files, so they tell what fits and what is worth a task.
    """

    keys: Keys
    files: list[SortRun] = field(default_factory=list)
    sizes: np.ndarray = field(init=False)  # (n_token_ids,) int64

    def __post_init__(self) -> None:
        self.sizes = np.zeros(self.keys.n_token_ids, dtype=np.int64)

    @property
    def n_rows(self) -> int:
        return sum(file.n_rows for file in self.files)

    @property
    def size(self) -> int:
        return int(self.sizes.sum())

    @property
    def n_entry_tokens(self) -> int:
        return int(np.count_nonzero(self.sizes))

    def add(self, file: SortRun) -> None:
        if file.n_rows:
            self.files.append(file)
            rows = _mapped(file)
            entry_ids = self.keys.entry_ids(rows.keys)
            firsts = np.flatnonzero(np.diff(entry_ids, prepend=-1))
            n_bytes = rows.offsets[1:] * ID_BYTES + np.arange(1, len(entry_ids) + 1) * ROW_BYTES
            ends = np.append(firsts[1:], len(entry_ids)) - 1
            found = entry_ids[firsts]
            self.sizes[found[self.sizes[found] == 0]] = TRIE_BYTES
            self.sizes[found] += np.diff(n_bytes[ends], prepend=0)

    def units(self, size: int, done: Iterable[int] = ()) -> list[KeyRange]:
        """Ranges of keys, each with all rows of its entry tokens, to sort one by one, the largest first.

        A unit has at most about `size`, or one entry token, which is to be sorted in parts. done: entry tokens that
        need no unit.
        """
        sizes = self.sizes.copy()
        sizes[list(done)] = 0
        entry_ids = np.flatnonzero(sizes)
        ends = np.cumsum(sizes[entry_ids])
        lasts = np.flatnonzero(np.diff(ends // size, append=-1))
        totals = np.diff(ends[lasts], prepend=0)
        firsts = np.append(0, lasts[:-1] + 1)[: len(lasts)]
        bounds = zip(entry_ids[firsts].tolist(), entry_ids[lasts].tolist(), strict=True)
        ranges = [
            (total, KeyRange(self.keys.first_of(first), self.keys.first_of(last + 1), -(-total // size)))
            for (first, last), total in zip(bounds, totals.tolist(), strict=True)
        ]
        return [keys for _, keys in sorted(ranges, reverse=True)]


def write_run(path: Path, rows: ChunkRows, keys: Keys) -> SortRun:
    """Sort the rows of some windows by key and write them to a file."""
    row_keys = keys.of(rows.entry_ids, rows.lengths, rows.token_ids[rows.starts])
    order = np.argsort(row_keys, kind="stable")
    chunk_ids, offsets = take_chunks(rows.token_ids, rows.starts[order], rows.lengths[order])
    places = np.stack([rows.windows[order], rows.positions[order]], axis=1)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for array in (row_keys[order], offsets, places, chunk_ids):
            file.write(array.data)
    return SortRun(path, len(order), len(chunk_ids))


def read_sorted(files: Sequence[SortRun], keys: KeyRange) -> SortedRows:
    """The rows of all files with a key of the range, sorted by key, then prefix-sorted."""
    parts = [_read(file, keys) for file in files]
    row_keys, lengths, places, chunk_ids = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "lengths", "places", "chunk_ids")
    )
    del parts
    starts = np.cumsum(lengths) - lengths
    order = sort_chunks(chunk_ids, np.append(starts, len(chunk_ids)), row_keys)
    chunk_ids, offsets = take_chunks(chunk_ids, starts[order], lengths[order])
    return SortedRows(row_keys[order], offsets, places[order], chunk_ids)


def cut_evenly(files: Sequence[SortRun], keys: KeyRange) -> list[KeyRange]:
    """Cut a range of keys into its parts, by a sample of the keys; into fewer where many rows have the same key."""
    if keys.n_parts == 1:
        return [keys]
    samples, weights = [], []
    for file in files:
        found = _mapped(file).keys
        found = found[slice(*np.searchsorted(found, [keys.first, keys.end]))]
        step = len(found) * len(files) // SAMPLED_KEYS + 1
        samples.append(found[::step])
        weights.append(np.full(len(samples[-1]), step))
    sample, weight = np.concatenate(samples), np.concatenate(weights)
    order = np.argsort(sample)
    below = np.cumsum(weight[order])
    cuts = sample[order][np.searchsorted(below, np.arange(1, keys.n_parts) * (below[-1] / keys.n_parts))]
    bounds = [keys.first, *np.unique(cuts[cuts > keys.first]).tolist(), keys.end]
    return [KeyRange(first, end) for first, end in pairwise(bounds)]


def _read(file: SortRun, keys: KeyRange) -> SortedRows:
    """The rows of a range of keys, copied."""
    rows = _mapped(file)
    first, end = np.searchsorted(rows.keys, [keys.first, keys.end])
    offsets = rows.offsets[first : end + 1]
    ids = rows.chunk_ids[offsets[0] : offsets[-1]]
    return SortedRows(rows.keys[first:end].copy(), offsets - offsets[0], rows.places[first:end].copy(), ids.copy())


def _mapped(file: SortRun) -> SortedRows:
    """All rows of a file, memory-mapped; the file is closed with the last of the arrays."""
    data = np.asarray(np.memmap(file.path, np.uint8, "r"))
    n = file.n_rows
    ends = np.cumsum([8 * n, 8 * (n + 1), 8 * n, 4 * file.n_ids])
    keys, offsets, places, chunk_ids = np.split(data, ends[:-1])
    return SortedRows(
        keys.view(np.int64), offsets.view(np.int64), places.view(np.int32).reshape(-1, 2), chunk_ids.view(np.int32)
    )


# ---- Writing the tries


def unit_bytes_in(max_memory_gb: float, n_workers: int) -> int:
    """The bytes of rows that each process may sort at a time, for all of stage 3 to keep to some memory.

    Raises InputError where that is too little for the processes themselves.
    """
    for_rows = max_memory_gb * 1e9 - BYTES_OF_PARENT - n_workers * BYTES_OF_WORKER
    n_bytes = int(for_rows / n_workers / MEMORY_PER_UNIT_BYTE)
    if n_bytes < LEAST_UNIT_BYTES:
        least = BYTES_OF_PARENT + n_workers * (BYTES_OF_WORKER + LEAST_UNIT_BYTES * MEMORY_PER_UNIT_BYTE)
        needed = f"{n_workers} processes need {least / 1e9:.2f} of them"
        raise InputError(f"--max_memory_gb {max_memory_gb:g}: {needed}; give that, or fewer --max_workers")
    return min(n_bytes, UNIT_BYTES)


def write_tries(
    folder: Path,
    scratch: Path,
    runs: SortRuns,
    max_workers: int = 1,
    unit_bytes: int = UNIT_BYTES,
    there: Collection[int] = (),
) -> Iterator[dict[str, FileSum]]:
    """Write both files of each entry token, but for those that are there; yields the sums of the files as they are written.

    scratch: a folder on the same disk for unfinished files; unit_bytes: of rows that a process sorts at a time.
    """
    n_workers = n_workers_for(runs.size / BYTES_PER_S, max_workers)
    even_share = max(runs.size // (n_workers * UNITS_PER_WORKER), LEAST_UNIT_BYTES)
    units = runs.units(min(unit_bytes, even_share), there)
    prepare = partial(_TrieWriter, folder, scratch, runs.files, runs.keys, frozenset(there))
    yield from in_processes(prepare, units, n_workers, where=str(folder))


@dataclass(frozen=True)
class _TrieWriter:
    """Writes both files of the entry tokens in a range of keys, but for those that are there."""

    folder: Path
    scratch: Path
    files: Sequence[SortRun]
    keys: Keys
    there: frozenset[int]

    def __call__(self, unit: KeyRange) -> dict[str, FileSum]:
        """Write the tries of a range of keys, which has all rows of its entry tokens; returns each file's sum by name."""
        sums: dict[str, FileSum] = {}
        own = make_folder(self.scratch / str(os.getpid()))
        for token, pieces in groupby(self._pieces(unit), key=itemgetter(0)):
            if token not in self.there:
                sums |= write_trie(self.folder, own, token, pieces)
        return sums

    def _pieces(self, unit: KeyRange) -> Iterator[TriePiece]:
        """The content of both files of all entry tokens, in the order of the files."""
        for part in cut_evenly(self.files, unit):
            rows = read_sorted(self.files, part)
            entry_ids = self.keys.entry_ids(rows.keys)
            blocks = np.searchsorted(rows.offsets, np.arange(0, rows.offsets[-1], BLOCK_IDS)).tolist()
            for first, end in pairwise([*dict.fromkeys(blocks), len(entry_ids)]):
                block = slice(first, end)
                yield from trie_pieces(
                    entry_ids[block], rows.chunk_ids, rows.offsets[:-1][block], rows.lengths[block], rows.places[block]
                )
