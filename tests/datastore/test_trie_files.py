"""The files of token tries: names, JSON and HDF5 read back as they were written, and damaged ones are refused."""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from synthetic_corpus import LABELS, LENGTHS, Row, make_tries, rows_on_disk, write_corpus
from synthetic_corpus import TRIE_FOLDER as FOLDER

from utils.datastore import trie_files
from utils.datastore.trie_files import (
    TrieRows,
    entry_token_ids,
    entry_tokens_with_vectors,
    find_trie_folder,
    read_context_vectors,
    read_token_id_list,
    read_trie_rows,
    trie_folder_path,
    trie_path,
    trie_pieces,
    write_context_vectors,
    write_trie,
)
from utils.files import InputError
from utils.json_io import read_json, write_json
from utils.manifest import FileSum, begin_stage, file_sum


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Path:
    """The --output_dir of a stage 3 that ended. Not to be written to."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "stage_2", gpt2_folder, LENGTHS, n_ids=4)
    return make_tries(corpus, tmp_path_factory.mktemp("tries"))


# ---- Names


def test_labels_and_threshold_name_the_folder_without_a_slash() -> None:
    folder = trie_folder_path(Path("out"), "wikitext-103", "org/large", "small", "../train", 0)
    assert folder == Path("out/token_trie_wikitext-103_DSorg_large_Hsmall/.._train_0.0")


def find(directory: Path, any_partition: bool = False, **others: Any) -> Path:
    wanted: dict[str, Any] = {**LABELS, "tok_prob_threshold": 0.5, **others}
    names = ("dataset_name", "model_ds", "model_gen", "partition", "tok_prob_threshold")
    return find_trie_folder(directory, *(wanted[name] for name in names), any_partition=any_partition)


def test_a_trie_folder_is_found_from_above_or_given_itself(tries: Path) -> None:
    assert find(tries) == tries / FOLDER
    assert find(tries / FOLDER) == tries / FOLDER


def test_the_partition_may_be_a_mere_label_where_just_one_is_there(tries: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the trie folder .*/test_0\.5, but there are .*/train_0\.5"):
        find(tries, partition="test")
    assert find(tries, any_partition=True, partition="test") == tries / FOLDER
    assert find(tries / FOLDER, any_partition=True, partition="test") == tries / FOLDER
    shutil.copytree(tries / FOLDER, tmp_path / FOLDER)
    shutil.copytree(tries / FOLDER, tmp_path / FOLDER.replace("train", "validation"))
    with pytest.raises(InputError, match=r"there are .*/train_0\.5, .*/validation_0\.5"):
        find(tmp_path, any_partition=True, partition="test")
    assert find(tmp_path, any_partition=True, partition="train") == tmp_path / FOLDER


@pytest.mark.parametrize(
    ("label", "value"),
    [("dataset_name", "x"), ("model_ds", "x"), ("model_gen", "x"), ("tok_prob_threshold", 0.9), ("partition", "x")],
)
def test_no_trie_folder_of_another_label_is_taken(tries: Path, label: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"expected the trie folder .*, but there are .*give"):
        find(tries, **{label: value})
    with pytest.raises(InputError, match=rf"was made with {label} .*this run has {value!r}"):
        find(tries / FOLDER, **{label: value})


def test_another_stages_manifest_makes_no_trie_folder(tries: Path, tmp_path: Path) -> None:
    begin_stage(tmp_path / "manifest.json", "preprocess_dataset.py", {}, {})
    with pytest.raises(InputError, match="there is no trie folder at all"):
        find(tmp_path)
    shutil.copytree(tries / FOLDER, tmp_path / FOLDER)
    assert find(tmp_path) == tmp_path / FOLDER


@pytest.mark.parametrize("value", [-1, 2**31, "7", "../7", 1.5])
def test_a_value_that_is_no_token_id_becomes_no_path(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="is no token id"):
        trie_path(tmp_path, value)  # type: ignore[arg-type]


def test_only_files_named_after_a_token_are_tries(tmp_path: Path) -> None:
    three_rows(tmp_path)
    for name in ("07.json", "x.json", "manifest.json", "99999999999.json", "8.json", "9.json.tmp"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tok_pos_99999999999.json").write_text("{}")
    assert entry_token_ids(tmp_path) == [5, 7]


@pytest.mark.parametrize("value", [{}, ["7"], [True], [-1], [1.5], [2**31], None])
def test_a_list_of_anything_but_token_ids_is_refused(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "list.json", value)
    with pytest.raises(InputError, match="is not a list of token ids"):
        read_token_id_list(tmp_path / "list.json")


# ---- Chunks and positions


def write_rows(folder: Path, rows: list[Row]) -> dict[str, FileSum]:
    """Write the tries of some rows; returns the sum of each file by name."""
    rows = sorted(rows, key=lambda row: (row[0], len(row[1]), *row[1:]))
    entry_ids, chunks, windows, positions = zip(*rows, strict=True)
    lengths = [len(chunk) for chunk in chunks]
    starts = np.array([0, *accumulate(lengths)][:-1])
    chunk_ids = np.array([token for chunk in chunks for token in chunk], dtype=np.int32)
    places = np.stack([windows, positions], axis=1)
    pieces = trie_pieces(np.array(entry_ids), chunk_ids, starts, np.array(lengths), places)
    sums: dict[str, FileSum] = {}
    for token, own in groupby(pieces, key=itemgetter(0)):
        sums |= write_trie(folder, folder, token, own)
    return sums


def three_rows(folder: Path) -> TrieRows:
    """Write 7 -> 5 6, 5 -> 6 and 7 -> 6, in two windows; returns the trie of entry token 7."""
    write_rows(folder, [(7, (5, 6), 0, 0), (5, (6,), 0, 1), (7, (6,), 1, 0)])
    return read_trie_rows(folder, 7)


def many_rows(n_rows: int = 500) -> list[Row]:
    """Of two entry tokens, in windows and with ids of one to five digits."""
    rng = np.random.default_rng(0)
    numbers = (10 ** rng.uniform(0, 4.5, (n_rows, 7))).astype(int)
    lengths = rng.integers(1, 6, n_rows)
    return [
        (int(i % 2) * 1000, tuple(row[2 : 2 + n].tolist()), int(row[0]), int(row[1]))
        for i, (row, n) in enumerate(zip(numbers, lengths, strict=True))
    ]


def test_a_trie_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rows = three_rows(tmp_path)
    assert (tmp_path / "7.json").read_text() == '{\n"2": [[7, 6]],\n"3": [[7, 5, 6]]\n}\n'
    assert read_json(tmp_path / "7.json") == {"2": [[7, 6]], "3": [[7, 5, 6]]}
    assert read_json(tmp_path / "tok_pos_7.json") == {"2": [[1, 0]], "3": [[0, 0]]}
    assert rows.chunk_ids.tolist() == [6, 5, 6]
    assert rows.chunk_ids.dtype == np.int32
    assert rows.chunk_offsets.tolist() == [0, 1, 3]
    assert rows.windows.tolist() == [1, 0]
    assert rows.positions.tolist() == [0, 0]
    assert rows.depths == {2: 1, 3: 1}


def test_what_is_on_disk_is_what_was_written_with_its_sums(tmp_path: Path) -> None:
    rows = many_rows()
    sums = write_rows(tmp_path, rows)
    assert rows_on_disk(tmp_path) == sorted(rows, key=lambda row: (row[0], len(row[1]), *row[1:]))
    assert sums == {path.name: file_sum(path) for path in tmp_path.iterdir()}
    assert len(sums) == 4


def test_other_json_of_the_same_value_reads_as_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path, many_rows())
    with monkeypatch.context() as patch:
        patch.delattr(trie_files, "read_json")  # by which other files are read, several times slower
        written = [read_trie_rows(tmp_path, token) for token in (0, 1000)]
    for path in tmp_path.iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    rewritten = [read_trie_rows(tmp_path, token) for token in (0, 1000)]
    for one, other in zip(written, rewritten, strict=True):
        for name in ("chunk_ids", "chunk_offsets", "windows", "positions"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()


DAMAGED_TRIES: dict[str, tuple[str, str, str]] = {
    "cut off": ("7.json", '{"2": [[7, 6]], ', r"7\.json: is not valid JSON"),
    "no map": ("7.json", "[1]", r"7\.json: is not a map of depths"),
    "empty": ("7.json", "{}", "is not a map of depths"),
    "no rows": ("7.json", '{"2": [], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "ragged": ("7.json", '{"2": [[7, 6], [7]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "wrong depth": ("7.json", '{"2": [[7, 6, 5]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "depth 1": ("7.json", '{"1": [[7]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "depths out of order": ("7.json", '{"3": [[7, 5, 6]], "2": [[7, 6]]}', "is not a map of depths"),
    "texts": ("7.json", '{"2": [["a", "b"]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "fractions": ("7.json", '{"2": [[7, 6.5]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "negative": ("7.json", '{"2": [[7, -6]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "huge": ("7.json", '{"2": [[7, 36893488147419103232]], "3": [[7, 5, 6]]}', "is not a map of depths"),
    "other entry": ("7.json", '{"2": [[8, 6]], "3": [[7, 5, 6]]}', "rows of another entry token"),
    "more rows": ("7.json", '{"2": [[7, 6], [7, 6]], "3": [[7, 5, 6]]}', r"other rows than tok_pos_7\.json"),
    "positions cut off": ("tok_pos_7.json", '{"2": [[1, 0', r"tok_pos_7\.json: is not valid JSON"),
    "no number": ("tok_pos_7.json", '{"2": [[1, ]], "3": [[0, 0]]}', "is not valid JSON"),
    "columns": ("tok_pos_7.json", '{"2": [[1], [0]], "3": [[0, 0]]}', "rows of 2 numbers"),
    "triples": ("tok_pos_7.json", '{"2": [[1, 0, 0]], "3": [[0, 0, 0]]}', "rows of 2 numbers"),
}


@pytest.mark.parametrize("form", ["one line", "as written"])
@pytest.mark.parametrize("row", DAMAGED_TRIES)
def test_a_damaged_trie_is_refused_with_its_path(tmp_path: Path, row: str, form: str) -> None:
    three_rows(tmp_path)
    name, text, message = DAMAGED_TRIES[row]
    if form == "as written":  # a depth a line
        text = re.sub(r"\}$", "\n}\n", text.replace("{", "{\n").replace(']], "', ']],\n"'))
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_trie_rows(tmp_path, 7)


# ---- Context vectors


def write_vectors(folder: Path, rows: TrieRows, vectors: np.ndarray, n_block: int = 100) -> None:
    vector_type = (vectors.shape[1], vectors.dtype)
    write_context_vectors(folder, rows.entry_token_id, rows.depths, vector_type, lambda a, b: vectors[a:b], n_block)


@pytest.mark.parametrize("n_block", [3, 1000])
@pytest.mark.parametrize(
    ("n_rows", "hidden_size"),
    [([1], 8), ([8, 64, 2, 8, 1, 4], 8), ([64, 8, 64, 32, 16, 2, 32, 1], 4)],
    ids=["one depth", "HDF5 puts the second depth behind the third", "and another"],
)
def test_sums_of_written_vectors_are_those_of_the_file(
    tmp_path: Path, n_rows: list[int], hidden_size: int, n_block: int
) -> None:
    depths = dict(enumerate(n_rows, 2))
    vectors = np.arange(sum(n_rows) * hidden_size, dtype=np.float32).reshape(-1, hidden_size)
    vector_type = (hidden_size, vectors.dtype)
    told = write_context_vectors(tmp_path, 7, depths, vector_type, lambda a, b: vectors[a:b], n_block)
    data = (tmp_path / "7.h5").read_bytes()
    assert told == {"7.h5": FileSum(f"{zlib.crc32(data):08x}", len(data))}
    with h5py.File(tmp_path / "7.h5") as file:
        assert np.array_equal(np.concatenate([file["hidden_states"][str(depth)] for depth in depths]), vectors)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_context_vectors_read_back_row_for_row(tmp_path: Path, dtype: Any) -> None:
    rows = three_rows(tmp_path)
    assert entry_tokens_with_vectors(tmp_path) == []
    vectors: np.ndarray = np.arange(10).reshape(2, 5).astype(dtype)
    write_vectors(tmp_path, rows, vectors)
    assert entry_tokens_with_vectors(tmp_path) == [7]
    read = read_context_vectors(tmp_path, 7, rows)
    assert read.dtype == dtype
    assert read.tolist() == vectors.tolist()
    with h5py.File(tmp_path / "7.h5") as file:
        assert {name: table[()].tolist() for name, table in file["hidden_states"].items()} == {
            "2": [[0, 1, 2, 3, 4]],
            "3": [[5, 6, 7, 8, 9]],
        }


def other_vectors(tables: dict[str, object], group: str = "hidden_states") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, table in tables.items():
                file[f"{group}/{name}"] = table

    return write


ONE = np.ones((1, 5), dtype=np.float32)


DAMAGED_VECTORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is cut off"),
    "empty": (lambda path: path.write_bytes(b""), "is cut off or not an .h5"),
    "no HDF5": (lambda path: path.write_bytes(b"hidden states"), "is cut off or not an .h5"),
    "no group": (other_vectors({"2": ONE, "3": ONE}, "states"), "is cut off or not an .h5"),
    "no depth": (other_vectors({"2": ONE, "three": ONE}), "is cut off or not an .h5"),
    "depth lacking": (other_vectors({"2": ONE}), r"rows by depth are \{2: 1\}, those of the trie \{2: 1, 3: 1\}"),
    "rows lacking": (other_vectors({"2": ONE, "3": ONE[:0]}), "rows by depth are"),
    "more rows": (other_vectors({"2": ONE, "3": ONE.repeat(2, 0)}), "rows by depth are"),
    "two sizes": (other_vectors({"2": ONE, "3": ONE[:, :4]}), "different sizes"),
    "integers": (other_vectors({"2": ONE, "3": ONE.astype(int)}), "a float matrix per depth"),
    "one row flat": (other_vectors({"2": ONE, "3": ONE[0]}), "a float matrix per depth"),
    "NaN": (other_vectors({"2": ONE, "3": ONE * np.nan}), "holds NaN or infinity"),
    "infinity": (other_vectors({"2": ONE, "3": ONE * np.inf}), "holds NaN or infinity"),
}


@pytest.mark.parametrize("row", DAMAGED_VECTORS)
def test_damaged_context_vectors_are_refused_with_their_path(tmp_path: Path, row: str) -> None:
    rows = three_rows(tmp_path)
    write_vectors(tmp_path, rows, ONE.repeat(2, 0))
    damage, message = DAMAGED_VECTORS[row]
    damage(tmp_path / "7.h5")
    with pytest.raises(InputError, match=rf"7\.h5: .*{message}"):
        read_context_vectors(tmp_path, 7, rows)


@pytest.mark.parametrize("cut", [-1, 0, 30, 2000])
def test_a_half_written_h5_does_not_count_as_there(tmp_path: Path, cut: int) -> None:
    rows = three_rows(tmp_path)
    write_vectors(tmp_path, rows, ONE.repeat(2, 0))
    path = tmp_path / "7.h5"
    path.write_bytes(path.read_bytes()[:cut])
    assert entry_tokens_with_vectors(tmp_path) == []
