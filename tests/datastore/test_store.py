"""The datastore in memory: tries come from their pickles on demand, under a bound of memory, and only sound ones."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_corpus import LENGTHS, TRIE_FOLDER, Corpus, expected_rows, make_tries, write_corpus

from utils.datastore.flattened import FOLDER, pickle_path, unit_rows, write_arrays
from utils.datastore.store import (
    Datastore,
    TokenTrie,
    flattened_trie,
    open_datastore,
    read_flattened,
    require_made_with,
)
from utils.files import InputError
from utils.json_io import read_json, write_json

CPU = torch.device("cpu")
N_IDS, HIDDEN_SIZE = 5, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus") / "stage_2"
    return write_corpus(folder, gpt2_folder, LENGTHS * 3, n_ids=N_IDS, hidden_size=HIDDEN_SIZE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """A trie folder whose tries are flattened. Not to be written to."""
    import make_token_trie

    save_dir = make_tries(corpus, tmp_path_factory.mktemp("whole"))
    make_token_trie.main([str(flag) for flag in corpus.stage_4_flags(save_dir)])
    open_datastore(save_dir / TRIE_FOLDER, device=CPU, max_bytes=10**9)
    return save_dir / TRIE_FOLDER


@pytest.fixture
def tries(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to work in."""
    return Path(shutil.copytree(whole, tmp_path / "tries"))


def trie_of(chunks: list[list[int]], entry_token_id: int = 7) -> TokenTrie:
    """Prefix-sorted chunks with random context vectors of 3 dimensions."""
    vectors = torch.from_numpy(unit_rows(np.random.default_rng(0).standard_normal((len(chunks), 3))))
    ids = np.array([token for chunk in chunks for token in chunk], dtype=np.int32)
    places = np.arange(len(chunks))
    return TokenTrie(entry_token_id, vectors, ids, np.cumsum([0, *map(len, chunks)]), places, places)


# ---- One trie


def test_a_trie_gives_chunks_their_lengths_and_what_follows_their_head() -> None:
    chunks = [[3], [3, 4, 5], [3, 9], [8, 1], [8, 1, 2]]
    trie = trie_of(chunks)
    assert [trie.chunk(row) for row in range(5)] == chunks
    assert trie.chunk_lengths(np.array([1, 4, 0])).tolist() == [3, 3, 1]
    rows = np.array([0, 1, 4, 3])
    assert trie.continuations(rows, 2).tolist() == [[-1, -1], [4, 5], [1, 2], [1, -1]]
    assert trie.continuations(rows, 1, first=0).tolist() == [[3], [3], [8], [8]]
    assert trie.continuations(np.array([4]), 3, first=2).tolist() == [[2, -1, -1]]


@pytest.mark.parametrize(("token", "rows"), [(3, (0, 3)), (8, (3, 5)), (2, (0, 0)), (5, (3, 3)), (9, (5, 5))])
def test_rows_that_begin_with_a_token_are_one_range(token: int, rows: tuple[int, int]) -> None:
    trie = trie_of([[3], [3, 4, 5], [3, 9], [8, 1], [8, 1, 2]])
    assert trie.rows_beginning_with(token) == slice(*rows)


def test_an_index_counts_into_a_tries_bytes() -> None:
    n, d = 8192, 128
    rows = torch.from_numpy(unit_rows(np.random.default_rng(0).standard_normal((n, d)) + 3))
    ids = np.zeros(n, dtype=np.int32)
    trie = TokenTrie(7, rows, ids, np.arange(n + 1), ids, ids)
    before = trie.n_bytes
    assert before == n * d * 4 + 3 * n * 4 + (n + 1) * 8
    trie.index.nearest_batch(rows[:32])
    assert trie.n_bytes == before + trie.index.n_bytes
    assert trie.index.n_bytes == n * 64 * 4 + 63 * d * 8  # bounds, which that many searches pay for


def test_a_trie_without_a_pickle_is_the_same(whole: Path) -> None:
    for token in range(N_IDS):
        one, other = flattened_trie(whole, token), read_flattened(whole / FOLDER, token, HIDDEN_SIZE, CPU)
        assert torch.equal(one.context_vectors, other.context_vectors)
        for name in ("chunk_ids", "chunk_offsets", "windows", "positions"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


# ---- The datastore


def test_it_holds_the_rows_of_every_entry_token_and_no_other(corpus: Corpus, whole: Path) -> None:
    datastore = open_datastore(whole, device=CPU, max_bytes=10**9)
    assert datastore.hidden_size == HIDDEN_SIZE
    assert datastore.n_rows == Counter(row[0] for row in expected_rows(corpus))
    assert datastore.trie(N_IDS) is None
    for token, n in datastore.n_rows.items():
        trie = datastore.trie(token)
        assert trie is not None
        assert (trie.entry_token_id, len(trie.windows)) == (token, n)
        assert datastore.trie(token) is trie


def test_excluded_and_huge_tries_are_left_out(whole: Path) -> None:
    n_rows = open_datastore(whole, device=CPU, max_bytes=10**9).n_rows
    bound = sorted(n_rows.values())[-2]
    datastore = open_datastore(whole, device=CPU, max_bytes=10**9, excluded=frozenset({2, 99}), max_rows=bound)
    assert datastore.n_rows == {token: n for token, n in n_rows.items() if token != 2 and n <= bound}
    assert len(datastore.n_rows) < N_IDS
    assert datastore.trie(2) is None


def write_tries(folder: Path, n_tries: int, n_rows: int = 8192, hidden_size: int = 128) -> dict[int, int]:
    """Write pickles of equally large tries; returns the rows of each."""
    vectors = unit_rows(np.random.default_rng(0).standard_normal((n_rows, hidden_size)) + 3)
    ids = np.zeros(n_rows, dtype=np.int32)
    for token in range(n_tries):
        arrays = {"context_vectors": vectors, "chunk_ids": ids, "chunk_offsets": np.arange(n_rows + 1)}
        write_arrays(pickle_path(folder, token), arrays | {"windows": ids, "positions": ids})
    return dict.fromkeys(range(n_tries), n_rows)


@pytest.mark.parametrize("least", [2, 3, 99])
def test_rows_of_shorter_chunks_are_left_out(whole: Path, least: int) -> None:
    every = open_datastore(whole, device=CPU, max_bytes=10**9)
    long = open_datastore(whole, device=CPU, max_bytes=10**9, min_chunk_length=least)
    n_kept = 0
    for token_id in every.n_rows:
        of_all, found = every.trie(token_id), long.trie(token_id)
        assert of_all is not None
        rows = [row for row in range(len(of_all.windows)) if len(of_all.chunk(row)) >= least]
        n_kept += len(rows)
        if found is None:
            assert not rows
            assert long.trie(token_id) is None  # when it is asked for again, too
            continue
        assert [found.chunk(i) for i in range(len(found.windows))] == [of_all.chunk(row) for row in rows]
        assert found.context_vectors.tolist() == of_all.context_vectors[rows].tolist()
        places = list(zip(of_all.windows[rows], of_all.positions[rows], strict=True))
        assert list(zip(found.windows, found.positions, strict=True)) == places
    assert (n_kept > 0) == (least < 99)


def test_the_least_recently_used_tries_are_dropped_as_indices_grow(tmp_path: Path) -> None:
    n_rows = write_tries(tmp_path, 3)
    n_bytes = read_flattened(tmp_path, 0, 128, CPU).n_bytes
    datastore = Datastore(tmp_path, n_rows, 128, CPU, 3 * n_bytes)
    tries = {token: datastore.trie(token) for token in range(3)}
    assert all(datastore.trie(token) is tries[token] for token in range(3)), "three fit"
    assert tries[0] is not None
    tries[0].index.nearest_batch(tries[0].context_vectors[:32])  # which makes an index
    assert datastore.trie(0) is tries[0]
    # With the index there is no room for three, and 1 was the least recently used.
    assert datastore.trie(2) is tries[2]
    again = datastore.trie(1)
    assert again is not None
    assert again is not tries[1]
    assert datastore.trie(0) is not tries[0]


def test_one_trie_is_kept_however_small_the_bound(tmp_path: Path) -> None:
    datastore = Datastore(tmp_path, write_tries(tmp_path, 2, 10, 3), 3, CPU, 1)
    first = datastore.trie(0)
    assert datastore.trie(0) is first
    datastore.trie(1)
    assert datastore.trie(0) is not first


def test_all_tries_stay_once_they_are_loaded(tmp_path: Path) -> None:
    datastore = Datastore(tmp_path, write_tries(tmp_path, 4, 10, 3), 3, CPU, 1)
    datastore.load_all()
    for path in tmp_path.iterdir():
        path.unlink()
    assert [len(trie.windows) for token in range(4) if (trie := datastore.trie(token))] == [10] * 4


def test_a_datastore_of_tries_in_memory_needs_no_file() -> None:
    tries = [trie_of([[1], [2, 3]], token) for token in (4, 6)]
    datastore = Datastore.of(tries, 3)
    assert (datastore.n_rows, datastore.hidden_size) == ({4: 2, 6: 2}, 3)
    for trie in tries * 2:
        assert datastore.trie(trie.entry_token_id) is trie
    assert datastore.trie(5) is None


# ---- What it refuses


def cut(name: str, n: int) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: arrays[name][:n]})


def set_value(name: str, at: int | tuple[int, int], value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


def cast(name: str, dtype: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


DO_NOT_FIT = "its arrays do not fit each other or hold NaN"
UNSOUND: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], str]] = {
    "NaN": (set_value("context_vectors", (0, 0), np.nan), DO_NOT_FIT),
    "infinity": (set_value("context_vectors", (2, 1), -np.inf), DO_NOT_FIT),
    "offsets beyond the ids": (set_value("chunk_offsets", -1, 9), DO_NOT_FIT),
    "offsets from 1 on": (set_value("chunk_offsets", 0, 1), DO_NOT_FIT),
    "a chunk of nothing": (set_value("chunk_offsets", 1, 0), DO_NOT_FIT),
    "offsets that go back": (set_value("chunk_offsets", 1, 5), DO_NOT_FIT),
    "an id below 0": (set_value("chunk_ids", 0, -1), DO_NOT_FIT),
    "fewer vectors": (cut("context_vectors", 2), DO_NOT_FIT),
    "fewer windows": (cut("windows", 2), DO_NOT_FIT),
    "fewer positions": (cut("positions", 2), DO_NOT_FIT),
    "fewer offsets": (cut("chunk_offsets", 3), DO_NOT_FIT),
    "fewer ids": (cut("chunk_ids", 5), DO_NOT_FIT),
    "float64 vectors": (cast("context_vectors", "f8"), DO_NOT_FIT),
    "ids that are no integers": (cast("chunk_ids", "f4"), DO_NOT_FIT),
    "no rows": (lambda arrays: arrays.update({name: array[:0] for name, array in arrays.items()}), DO_NOT_FIT),
    "flat vectors": (lambda a: a.update(context_vectors=a["context_vectors"].ravel()), DO_NOT_FIT),
    "windows in rows": (lambda a: a.update(windows=a["windows"][:, None]), DO_NOT_FIT),
    "vectors of another size": (
        lambda a: a.update(context_vectors=a["context_vectors"][:, :3]),
        "its vectors have size 3, the datastore says 4; make it anew",
    ),
}


@pytest.mark.parametrize("row", UNSOUND)
def test_arrays_that_make_no_trie_are_refused_with_their_path(tmp_path: Path, row: str) -> None:
    spoil, message = UNSOUND[row]
    arrays = {
        "context_vectors": unit_rows(np.random.default_rng(0).standard_normal((3, 4))),
        "chunk_ids": np.arange(6, dtype=np.int32),
        "chunk_offsets": np.array([0, 2, 4, 6]),
        "windows": np.arange(3),
        "positions": np.arange(3, dtype=np.int32),
    }
    path = pickle_path(tmp_path, 5)
    write_arrays(path, arrays)
    assert read_flattened(tmp_path, 5, 4, CPU).chunk(1) == [2, 3]
    spoil(arrays)
    write_arrays(path, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with pytest.raises(InputError, match=rf"5\.pkl: {message}"):
        read_flattened(tmp_path, 5, 4, CPU)


def test_a_pickle_that_is_gone_is_named_when_it_is_asked_for(tries: Path) -> None:
    datastore = open_datastore(tries, device=CPU, max_bytes=10**9)
    pickle_path(tries / FOLDER, 3).unlink()
    datastore.trie(2)
    with pytest.raises(InputError, match=r"3\.pkl: does not exist; give the file that flattening makes"):
        datastore.trie(3)


def test_a_folder_that_stage_4_did_not_end_in_is_no_datastore(tries: Path) -> None:
    path = tries / "hidden_states_manifest.json"
    write_json(path, read_json(path) | {"complete": False})
    with pytest.raises(InputError, match=r"make_token_trie\.py did not end"):
        open_datastore(tries, device=CPU, max_bytes=10**9)
    path.unlink()
    with pytest.raises(InputError, match=r"run make_token_trie\.py first"):
        open_datastore(tries, device=CPU, max_bytes=10**9)


@pytest.mark.parametrize("size", [None, 0, True, "6", 6.0])
def test_a_manifest_without_a_hidden_size_is_refused(tries: Path, size: object) -> None:
    path = tries / "hidden_states_manifest.json"
    manifest = read_json(path)
    manifest["inputs"]["hidden_size"] = size
    write_json(path, manifest)
    with pytest.raises(InputError, match=r"hidden_states_manifest\.json: names no hidden size; run make_token_trie"):
        open_datastore(tries, device=CPU, max_bytes=10**9)


def test_a_datastore_of_another_model_or_tokenizer_is_refused(whole: Path) -> None:
    made_with = read_json(whole / "hidden_states_manifest.json")["inputs"]
    tokenizer, model = made_with["tokenizer"], made_with["model_gen"]
    require_made_with(whole, "gpt2", tokenizer)
    require_made_with(whole, "gpt2", tokenizer, model)
    for model_or_none, name in ((None, "manifest"), (model, "hidden_states_manifest")):
        with pytest.raises(
            InputError, match=rf"/{name}\.json: the datastore was made with another tokenizer than gpt2'"
        ):
            require_made_with(whole, "gpt2", "other", model_or_none)
    with pytest.raises(InputError, match="its hidden states are those of another model than gpt2"):
        require_made_with(whole, "gpt2", tokenizer, "other")
