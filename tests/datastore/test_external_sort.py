"""The external sort equals sorting all rows in memory, however they are cut, in memory that units bound."""

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_corpus import TRIE_FOLDER, Row, all_bytes, expected_rows, rows_on_disk, write_corpus

from utils.datastore import chunk_lists, external_sort
from utils.datastore.chunks import ChunkRows, find_chunks
from utils.datastore.external_sort import (
    LEAST_UNIT_BYTES,
    UNIT_BYTES,
    KeyRange,
    Keys,
    SortedRows,
    SortRuns,
    cut_evenly,
    read_sorted,
    unit_bytes_in,
    write_run,
    write_tries,
)
from utils.datastore.trie_files import entry_token_ids
from utils.files import InputError, temporary_folder
from utils.manifest import file_sum

Token = tuple[int, bool]  # id, and whether it is above the threshold


def rows_of(windows: list[list[Token]], first_window: int = 0) -> ChunkRows:
    return find_chunks(
        np.array([token for window in windows for token, _ in window], dtype=np.int32),
        np.array([float(is_above) for window in windows for _, is_above in window]),
        np.array([len(window) for window in windows], dtype=np.int64),
        tok_prob_threshold=0.5,
        skip_first_tokens=0,
        max_chunk_length=4,
        first_window=first_window,
    )


def in_memory(windows: list[list[Token]]) -> list[Row]:
    """By entry token, chunk length, chunk, window and position."""
    rows = []
    for number, window in enumerate(windows):
        for at in range(len(window) - 1):
            end = at + 1
            while end < min(len(window), at + 5) and window[end][1]:
                end += 1
            if end > at + 1:
                rows.append((window[at][0], tuple(token for token, _ in window[at + 1 : end]), number, at))
    return sorted(rows, key=lambda row: (row[0], len(row[1]), *row[1:]))


def as_rows(found: SortedRows, keys: Keys) -> list[Row]:
    chunks = [tuple(ids.tolist()) for ids in np.split(found.chunk_ids, found.offsets[1:-1])] if len(found.keys) else []
    places = [tuple(place) for place in found.places.tolist()]
    return [
        (entry, chunk, *place)
        for entry, chunk, place in zip(keys.entry_ids(found.keys).tolist(), chunks, places, strict=True)
    ]


@contextmanager
def in_runs(folder: Path, windows: list[list[Token]], n_runs: int, n_token_ids: int) -> Iterator[SortRuns]:
    """The windows' rows, sorted in so many files."""
    runs = SortRuns(Keys(n_token_ids))
    with temporary_folder(folder) as path:
        for n, numbers in enumerate(np.array_split(np.arange(len(windows)), n_runs)):
            if len(numbers):
                part = rows_of([windows[i] for i in numbers], int(numbers[0]))
                runs.add(write_run(path / f"{n}.rows", part, runs.keys))
        yield runs


def random_windows(n_tokens: int, n_ids: int, seed: int = 0) -> list[list[Token]]:
    rng = np.random.default_rng(seed)
    ids, above = rng.integers(0, n_ids, n_tokens).tolist(), (rng.random(n_tokens) < 0.6).tolist()
    tokens = list(zip(ids, above, strict=True))
    return [tokens[first : first + 100] for first in range(0, n_tokens, 100)]


# ---- Keys


@pytest.mark.parametrize("n_token_ids", [1, 2, 50_257, 2**31])
def test_keys_order_rows_as_the_tries_do(n_token_ids: int) -> None:
    rng = np.random.default_rng(0)
    entry_ids, first_ids = rng.integers(max(n_token_ids - 5, 0), n_token_ids, (2, 300))
    lengths = rng.integers(1, 4, 300)
    lengths[:3] = 2**24 - 1
    keys = Keys(n_token_ids)
    found = keys.of(entry_ids, lengths, first_ids)
    by_tuple = np.lexsort((first_ids, lengths, entry_ids))
    assert (np.diff(found[by_tuple]) >= 0).all()
    assert keys.entry_ids(found).tolist() == entry_ids.tolist()
    for entry in set(entry_ids.tolist()):
        own = found[entry_ids == entry]
        assert keys.first_of(entry) <= own.min() <= own.max() < keys.first_of(entry + 1)


def test_keys_of_few_ids_hold_the_whole_first_id() -> None:
    keys = Keys(50_257)
    ids = np.arange(50_257)
    found = keys.of(np.full(50_257, 50_256), np.full(50_257, 64), ids)
    assert (np.diff(found) > 0).all()


# ---- Sorted runs

WINDOWS = st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=20), max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(WINDOWS, st.integers(1, 4), st.integers(30, 3000))
def test_units_of_all_runs_in_turn_are_the_rows_sorted_in_memory(
    tmp_path_factory: pytest.TempPathFactory, windows: list[list[Token]], n_runs: int, size: int
) -> None:
    found = []
    with in_runs(tmp_path_factory.getbasetemp() / "runs", windows, n_runs, 4) as runs:
        for unit in sorted(runs.units(size)):
            for part in cut_evenly(runs.files, unit):
                found += as_rows(read_sorted(runs.files, part), runs.keys)
        assert runs.n_rows == len(found)
        assert runs.n_entry_tokens == len({row[0] for row in found})
    assert found == in_memory(windows)


def test_units_hold_whole_entry_tokens_once_the_largest_first(tmp_path: Path) -> None:
    with in_runs(tmp_path / "runs", random_windows(5000, 40), 3, 40) as runs:
        size = runs.size // 6
        units = runs.units(size, done=[3, 39])
        held = [[token for token in range(40) if unit.first <= runs.keys.first_of(token) < unit.end] for unit in units]
        assert sorted(token for tokens in held for token in tokens if token not in (3, 39)) == sorted(
            set(range(40)) - {3, 39}
        )
        totals = [int(sum(runs.sizes[token] for token in tokens if token not in (3, 39))) for tokens in held]
        assert totals == sorted(totals, reverse=True)
        for unit, tokens, total in zip(units, held, totals, strict=True):
            assert total < size + runs.sizes[tokens[0]]
            assert unit.n_parts == -(-total // size)
        assert runs.units(size, done=range(40)) == []


@pytest.mark.parametrize("sampled_keys", [1 << 14, 200])
def test_a_range_is_cut_into_parts_of_about_as_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled_keys: int
) -> None:
    monkeypatch.setattr(external_sort, "SAMPLED_KEYS", sampled_keys)
    with in_runs(tmp_path / "runs", random_windows(8000, 300), 5, 300) as runs:
        parts = cut_evenly(runs.files, KeyRange(0, runs.keys.first_of(300), 7))
        assert len(parts) == 7
        assert [part.first for part in parts[1:]] == [part.end for part in parts[:-1]]
        n_rows = [len(read_sorted(runs.files, part).keys) for part in parts]
    assert sum(n_rows) == runs.n_rows
    assert max(n_rows) < 1.3 * runs.n_rows / 7


def test_rows_of_one_key_stay_together_so_parts_are_fewer(tmp_path: Path) -> None:
    windows = [[(1, False), (2, True)]] * 50 + [[(1, False), (3, True)]] * 2
    with in_runs(tmp_path / "runs", windows, 2, 4) as runs:
        parts = cut_evenly(runs.files, KeyRange(0, runs.keys.first_of(4), 10))
        assert len(parts) <= 3
        keys = [set(read_sorted(runs.files, part).keys.tolist()) for part in parts]
        assert sum(map(len, keys)) == len(set().union(*keys)) == 2


def test_no_rows_are_no_units_and_no_files(tmp_path: Path) -> None:
    with in_runs(tmp_path / "runs", [[(1, False), (2, False)]], 1, 4) as runs:
        assert (runs.files, runs.n_rows, runs.size, runs.units(100)) == ([], 0, 0, [])
        assert list(write_tries(tmp_path, tmp_path / "runs", runs)) == []


# ---- Writing the tries


def write(folder: Path, windows: list[list[Token]], unit_bytes: int, there: tuple[int, ...] = ()) -> set[str]:
    """Write the tries of some windows of ids below 4; returns the names of the files written."""
    folder.mkdir(exist_ok=True)
    names: set[str] = set()
    with in_runs(folder / ".rows", windows, 3, 4) as runs:
        for sums in write_tries(folder, folder / ".rows", runs, unit_bytes=unit_bytes, there=there):
            assert sums == {name: file_sum(folder / name) for name in sums}
            names |= sums.keys()
    return names


def test_a_huge_trie_is_written_in_blocks_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = random_windows(600, 2)
    assert len(write(tmp_path / "whole", windows, 2**30)) == 4
    monkeypatch.setattr(external_sort, "BLOCK_IDS", 7)
    monkeypatch.setattr(external_sort, "LEAST_UNIT_BYTES", 1)
    write(tmp_path / "blocks", windows, 200)
    rows = rows_on_disk(tmp_path / "whole")
    assert rows == in_memory(windows)
    assert min(sum(row[0] == token for row in rows) for token in (0, 1)) > 50
    assert all_bytes(tmp_path / "whole") == all_bytes(tmp_path / "blocks")


def test_tries_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    windows = random_windows(600, 4)
    write(tmp_path / "tries", windows, 2**20)
    for name in ("1.json", "tok_pos_2.json"):
        (tmp_path / "tries" / name).unlink()
    there = entry_token_ids(tmp_path / "tries")
    assert there == [0, 3]
    made = write(tmp_path / "tries", windows, 2**20, tuple(there))
    assert made == {"1.json", "tok_pos_1.json", "2.json", "tok_pos_2.json"}
    assert rows_on_disk(tmp_path / "tries") == in_memory(windows)


def test_units_bound_memory_even_where_one_token_has_most_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "BLOCK_IDS", 1000)
    monkeypatch.setattr(external_sort, "UNITS_PER_WORKER", 1)
    monkeypatch.setattr(external_sort, "LEAST_UNIT_BYTES", 1)
    n_windows, n_ids = 60_000, 500
    # Each window is entry token 1 and a chunk of one to three random ids.
    token_ids = np.random.default_rng(0).integers(2, n_ids, (n_windows, 4), dtype=np.int32)
    token_ids[:, 0] = 1
    lengths = np.random.default_rng(1).integers(2, 5, n_windows)
    kept = np.arange(4) < lengths[:, None]
    rows = find_chunks(
        token_ids[kept],
        (np.arange(4) > 0)[None].repeat(n_windows, 0)[kept].astype(float),
        lengths,
        tok_prob_threshold=0.5,
        skip_first_tokens=0,
    )
    runs, peaks = SortRuns(Keys(n_ids)), []
    runs.add(write_run(tmp_path / "0.rows", rows, runs.keys))
    assert runs.sizes[1] > 0.4 * runs.size
    for name, unit_bytes in (("whole", runs.size), ("parts", runs.size // 16)):
        (tmp_path / name).mkdir()
        tracemalloc.start()
        list(write_tries(tmp_path / name, tmp_path / "scratch", runs, unit_bytes=unit_bytes))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Sampling the keys takes some memory too, whatever the unit.
    assert peaks[1] < external_sort.MEMORY_PER_UNIT_BYTE * runs.size // 16 + 2**20
    assert peaks[1] < peaks[0] / 4
    assert all_bytes(tmp_path / "whole") == all_bytes(tmp_path / "parts")


def test_processes_and_small_units_leave_the_same_bytes_as_one(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "stage_2", gpt2_folder, [90, 40, 1, 60] * 30, n_ids=30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for name, max_workers in (("one", 1), ("two", 2)):
        # Many batches and units, of which the second run's are smaller than some tries.
        monkeypatch.setattr(chunk_lists, "BATCH_TOKENS", 10**6 if name == "one" else 500)
        for bound in ("LEAST_UNIT_BYTES", "UNIT_BYTES"):
            monkeypatch.setattr(external_sort, bound, 2**20 if name == "one" else 2000)
        flags = corpus.stage_3_flags(tmp_path / name, max_workers=max_workers, max_memory_gb=2)
        run_stage("save_token_trie_info.py", *flags)
    assert rows_on_disk(tmp_path / "one" / TRIE_FOLDER) == expected_rows(corpus)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


@pytest.mark.parametrize(("gb", "n_workers", "expected"), [(0.9, 1, 50_000_000), (4.0, 2, UNIT_BYTES)])
def test_units_take_what_the_processes_leave_of_the_memory(gb: float, n_workers: int, expected: int) -> None:
    # (0.9 GB - 0.5 for the parent - 0.15 for the worker) / 5 bytes of memory for each byte of rows
    assert unit_bytes_in(gb, n_workers) == pytest.approx(expected, abs=1)


def test_memory_that_the_processes_alone_need_is_refused() -> None:
    least = 0.5e9 + 3 * (0.15e9 + 5 * LEAST_UNIT_BYTES)
    assert unit_bytes_in(least / 1e9 + 1e-6, 3) >= LEAST_UNIT_BYTES
    with pytest.raises(InputError, match=r"--max_memory_gb 0.9: 3 processes need 0\.96 of them; give that, or fewer"):
        unit_bytes_in(0.9, 3)
