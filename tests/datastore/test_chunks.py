"""Chunks against brute force: rows, plateaus and prefix order are what loops over every token give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_corpus import Row, as_tuples

from utils.datastore.chunks import ChunkRows, find_chunks, sort_chunks, take_chunks


def loop_rows(windows: list[list[tuple[int, float]]], threshold: float, skip: int, bound: int) -> list[Row]:
    found = []
    for number, window in enumerate(windows):
        for j in range(skip, len(window) - 1):
            end = j + 1
            while end < len(window) and window[end][1] > threshold:
                end += 1
            chunk = [token for token, _ in window[j + 1 : end]]
            if chunk:
                found.append((window[j][0], tuple(chunk[:bound] if bound else chunk), number, j))
    return found


def chunks_of(windows: list[list[tuple[int, float]]], threshold: float, skip: int, bound: int) -> ChunkRows:
    tokens = [row for window in windows for row in window]
    return find_chunks(
        np.array([token for token, _ in tokens], dtype=np.int32),
        np.array([probability for _, probability in tokens], dtype=np.float64),
        np.array([len(window) for window in windows], dtype=np.int64),
        tok_prob_threshold=threshold,
        skip_first_tokens=skip,
        max_chunk_length=bound,
    )


def in_order(rows: ChunkRows, keys: np.ndarray) -> np.ndarray:
    return sort_chunks(*take_chunks(rows.token_ids, rows.starts, rows.lengths), keys)


def test_a_plateau_and_all_its_suffixes_are_rows() -> None:
    window = [(10, 0.0), (11, 0.5), (12, 0.95), (13, 0.99), (14, 0.91), (15, 0.2), (16, 0.3), (17, 0.92)]
    rows = chunks_of([window], 0.9, 0, 0)
    assert as_tuples(rows) == [
        (11, (12, 13, 14), 0, 1),
        (12, (13, 14), 0, 2),
        (13, (14,), 0, 3),
        (16, (17,), 0, 6),
    ]
    assert rows.plateaus.tolist() == [0, 3]


def test_a_probability_equal_to_the_threshold_is_not_above_it() -> None:
    window = [(1, 0.0), (2, 0.5), (3, np.nextafter(0.5, 1))]
    assert as_tuples(chunks_of([window], 0.5, 0, 0)) == [(2, (3,), 0, 1)]


def test_the_first_token_after_the_skip_is_an_entry_once_and_no_chunk() -> None:
    # The authors' code stores [2, 2, 3, 4] here.
    window = [(1, 0.0), (9, 0.99), (2, 0.99), (3, 0.99), (4, 0.99)]
    rows = chunks_of([window], 0.9, 2, 0)
    assert as_tuples(rows) == [(2, (3, 4), 0, 2), (3, (4,), 0, 3)]
    assert rows.plateaus.tolist() == [0]


def test_the_bound_cuts_chunks_and_a_suffix_keeps_the_rest_reachable() -> None:
    window = [(token, 0.0 if token == 0 else 0.9) for token in range(6)]
    assert as_tuples(chunks_of([window], 0.5, 0, 2)) == [
        (0, (1, 2), 0, 0),
        (1, (2, 3), 0, 1),
        (2, (3, 4), 0, 2),
        (3, (4, 5), 0, 3),
        (4, (5,), 0, 4),
    ]


def test_a_run_ends_with_its_window() -> None:
    windows = [[(1, 0.0), (2, 0.9)], [(3, 0.0), (4, 0.9)], [(5, 0.0)], []]
    rows = chunks_of(windows, 0.5, 0, 0)
    assert as_tuples(rows) == [(1, (2,), 0, 0), (3, (4,), 1, 0)]
    assert rows.plateaus.tolist() == [0, 1]


@pytest.mark.parametrize("windows", [[], [[]], [[(1, 0.0)]], [[(1, 0.0), (2, 0.5)]]])
def test_no_token_above_the_threshold_gives_no_rows(windows: list[list[tuple[int, float]]]) -> None:
    rows = chunks_of(windows, 0.5, 0, 4)
    assert len(rows) == 0
    assert rows.plateaus.tolist() == in_order(rows, rows.entry_ids).tolist() == []


TOKENS = st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, 0.7, 1.0]))
WINDOWS = st.lists(st.lists(TOKENS, max_size=24), max_size=4)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(WINDOWS, st.sampled_from([0.0, 0.5, 0.7]), st.integers(0, 4), st.integers(0, 9))
def test_rows_and_their_order_are_those_of_loops_and_sorted(
    windows: list[list[tuple[int, float]]], threshold: float, skip: int, bound: int
) -> None:
    rows = chunks_of(windows, threshold, skip, bound)
    expected = loop_rows(windows, threshold, skip, bound)
    assert as_tuples(rows) == expected
    tuples = np.empty(len(expected), dtype=object)
    tuples[:] = expected
    assert tuples[in_order(rows, rows.entry_ids)].tolist() == sorted(expected)
    by_length = sorted(expected, key=lambda row: (row[0], len(row[1]), *row[1:]))
    assert tuples[in_order(rows, rows.entry_ids * 99 + rows.lengths)].tolist() == by_length


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), max_size=12))
def test_chunks_of_one_entry_token_sort_as_tuples_do(chunks: list[list[int]]) -> None:
    flat = np.array([token for chunk in chunks for token in chunk], dtype=np.int32)
    offsets = np.cumsum([0] + [len(chunk) for chunk in chunks])
    expected = sorted(range(len(chunks)), key=lambda n: (chunks[n], n))
    assert sort_chunks(flat, offsets).tolist() == expected


@pytest.mark.parametrize("largest", [3, 2**31 - 1])
def test_ids_of_any_size_and_chunks_of_any_length_sort_as_tuples_do(largest: int) -> None:
    rng = np.random.default_rng(0)
    alike = rng.integers(largest - 1, largest, 40, endpoint=True).tolist()
    chunks = [alike[:n] + rng.integers(0, largest, 3, endpoint=True).tolist()[:m] for n in range(40) for m in range(4)]
    chunks = [chunks[i] for i in rng.permutation(len(chunks)) if chunks[i]] * 2
    flat = np.array([token for chunk in chunks for token in chunk], dtype=np.int32)
    offsets = np.cumsum([0] + [len(chunk) for chunk in chunks])
    assert sort_chunks(flat, offsets).tolist() == sorted(range(len(chunks)), key=lambda n: (chunks[n], n))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(WINDOWS.filter(bool), st.data())
def test_a_corpus_in_pieces_gives_the_rows_of_the_whole(
    windows: list[list[tuple[int, float]]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(windows) - 1))
    head, tail = windows[:cut], windows[cut:]
    whole = chunks_of(windows, 0.5, 1, 3)
    pieces = [chunks_of(head, 0.5, 1, 3)] if head else []
    second = find_chunks(
        np.array([token for window in tail for token, _ in window], dtype=np.int32),
        np.array([probability for window in tail for _, probability in window], dtype=np.float64),
        np.array([len(window) for window in tail], dtype=np.int64),
        tok_prob_threshold=0.5,
        skip_first_tokens=1,
        max_chunk_length=3,
        first_window=cut,
    )
    assert [row for piece in [*pieces, second] for row in as_tuples(piece)] == as_tuples(whole)
    assert sum(len(piece.plateaus) for piece in [*pieces, second]) == len(whole.plateaus)
