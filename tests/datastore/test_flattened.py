"""Flattened tries: pickles of plain types alone, in the order of the search, made again where they are not what they were."""

import datetime
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from synthetic_corpus import LENGTHS, TRIE_FOLDER, Corpus, expected_rows, make_tries, write_corpus

from benchmarks.faults.mutations import mutate
from benchmarks.faults.processes import in_child, killed_before_rename
from utils.datastore import flattened
from utils.datastore.flattened import (
    ARRAYS,
    FOLDER,
    flatten,
    flattened_arrays,
    pickle_path,
    read_arrays,
    unit_rows,
    write_arrays,
)
from utils.files import InputError, exclusive_lock
from utils.json_io import read_json, write_json
from utils.manifest import file_sum, list_files

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stage_2", gpt2_folder, LENGTHS * 3, n_ids=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """A trie folder whose tries are flattened. Not to be written to."""
    import make_token_trie

    save_dir = make_tries(corpus, tmp_path_factory.mktemp("whole"))
    make_token_trie.main([str(flag) for flag in corpus.stage_4_flags(save_dir)])
    run_flatten(save_dir / TRIE_FOLDER)
    return save_dir / TRIE_FOLDER


@pytest.fixture
def tries(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to work in."""
    return Path(shutil.copytree(whole, tmp_path / "tries"))


def run_flatten(
    trie_folder: Path, reprocess: bool = True, verify: bool = False, max_bytes: int = 10**9
) -> dict[int, int]:
    return flatten(trie_folder, reprocess, verify, max_bytes)


def pickles(trie_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (trie_folder / FOLDER).iterdir()}


def some_arrays(n_rows: int = 3) -> Arrays:
    """Of a trie with `n_rows` chunks of two tokens."""
    return {
        "context_vectors": unit_rows(np.random.default_rng(0).standard_normal((n_rows, 4))),
        "chunk_ids": np.arange(2 * n_rows, dtype=np.int32),
        "chunk_offsets": 2 * np.arange(n_rows + 1),
        "windows": np.arange(n_rows),
        "positions": np.arange(n_rows, dtype=np.int32),
    }


# ---- The arrays


def test_rows_are_those_of_loops_prefix_sorted_with_unit_vectors(corpus: Corpus, whole: Path) -> None:
    for token in range(5):
        rows = sorted(row[1:] for row in expected_rows(corpus) if row[0] == token)
        arrays = read_arrays(pickle_path(whole / FOLDER, token))
        chunks = [tuple(ids.tolist()) for ids in np.split(arrays["chunk_ids"], arrays["chunk_offsets"][1:-1])]
        assert list(zip(chunks, arrays["windows"].tolist(), arrays["positions"].tolist(), strict=True)) == rows
        vectors: np.ndarray = np.array([corpus.hidden_state(*place) for _, *place in rows], dtype=np.float64)
        expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assert np.allclose(arrays["context_vectors"], expected, rtol=0, atol=1e-7)
        assert arrays["context_vectors"].dtype == np.float32


def test_vectors_of_zeros_stay_so_and_of_any_length_become_one() -> None:
    vectors = np.array([[0, 0], [3e-20, 4e-20], [3e18, -4e18]], dtype=np.float32)
    units = unit_rows(vectors)
    assert units.dtype == np.float32
    assert np.allclose(units, np.array([[0, 0], [0.6, 0.8], [0.6, -0.8]]), rtol=0, atol=1e-7)


def test_blocks_of_vectors_change_nothing(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flattened, "BLOCK_BYTES", 50)  # two rows
    for token in range(5):
        in_blocks, at_once = flattened_arrays(whole, token), read_arrays(pickle_path(whole / FOLDER, token))
        assert {name: array.tolist() for name, array in in_blocks.items()} == {
            name: array.tolist() for name, array in at_once.items()
        }


# ---- Pickles


def test_arrays_read_back_as_they_were_written_and_may_be_written_to(tmp_path: Path) -> None:
    arrays = some_arrays()
    found_sum = write_arrays(tmp_path / "5.pkl", arrays)
    assert found_sum == file_sum(tmp_path / "5.pkl")
    read = read_arrays(tmp_path / "5.pkl")
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(read[name], array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in read.values():
            torch.from_numpy(array)
            array[:] = 7
    assert np.array_equal(read_arrays(tmp_path / "5.pkl")["windows"], arrays["windows"])


def test_a_pickle_holds_plain_types_only_which_any_python_reads(whole: Path) -> None:
    for path in (whole / FOLDER).glob("*.pkl"):
        held = pickle.loads(path.read_bytes())
        assert held.keys() == ARRAYS
        for dtype, shape, data in held.values():
            assert (type(dtype), type(shape), type(data)) == (str, tuple, bytearray)


class Calls:
    """Unpickled without care it calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_no_class_is_allowed_and_nothing_is_made(tmp_path: Path, protocol: int) -> None:
    owned = tmp_path / "owned"
    values: dict[str, Any] = {
        "posix.system": Calls(os.system, f"touch {owned}"),
        "(builtins|__builtin__).exec": Calls(exec, f"open({str(owned)!r}, 'w')"),
        r"(_?io|__builtin__)\.open": Calls(open, str(owned), "w"),
        "datetime.date": datetime.date(2020, 1, 1),
        "numpy": np.dtype("<f4"),
        "complex": 1j,
    }
    for name, value in values.items():
        for held in (value, {"windows": value}, {"windows": (value, (1,), b"")}, [value]):
            (tmp_path / "5.pkl").write_bytes(pickle.dumps(held, protocol=protocol))
            with pytest.raises(InputError, match=rf"5\.pkl: is no pickle of arrays \(it asks for \S*{name}.*\); del"):
                read_arrays(tmp_path / "5.pkl")
    assert not owned.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_pickled_as_numpy_does_are_refused(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "5.pkl").write_bytes(pickle.dumps(some_arrays(), protocol=protocol))
    with pytest.raises(InputError, match=r"5\.pkl: is no pickle of arrays \(it asks for (numpy|_codecs)\S*\); delete"):
        read_arrays(tmp_path / "5.pkl")


def packed(**others: object) -> dict[str, object]:
    """What a pickle holds, with some entries in the place of its own."""
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in some_arrays().items()} | others


NOT_ARRAYS: dict[str, tuple[object, str]] = {
    "a list": ([1, 2], "no pickle of arrays"),
    "None": (None, "no pickle of arrays"),
    "a number for an entry": (packed(windows=5), "no pickle of arrays"),
    "two of three": (packed(windows=("<i8", (0,))), "no pickle of arrays"),
    "objects": (packed(windows=("|O", (1,), bytes(8))), r"8 bytes are no array of \|O \(1,\)"),
    "text": (packed(windows=("<U2", (1,), bytes(8))), "8 bytes are no array of <U2"),
    "a record": (packed(windows=("f4,f4", (1,), bytes(8))), "8 bytes are no array of f4,f4"),
    "no dtype": (packed(windows=("nothing", (1,), bytes(8))), "no pickle of arrays"),
    "a shape of more": (packed(windows=("<i8", (10**15,), bytes(8))), "8 bytes are no array of <i8"),
    "a shape below 0": (packed(windows=("<i8", (-1,), bytes(8))), "8 bytes are no array of <i8"),
    "two below 0": (packed(windows=("<i8", (-1, -1), bytes(8))), "no pickle of arrays"),
    "a shape of text": (packed(windows=("<i8", "11", bytes(8))), "no pickle of arrays"),
    "text for bytes": (packed(windows=("<i8", (1,), "8 letters")), "no pickle of arrays"),
    "one name less": ({"windows": packed()["windows"]}, "does not hold a trie's arrays"),
    "one name more": (packed(more=("<i8", (0,), b"")), "does not hold a trie's arrays"),
}


@pytest.mark.parametrize("row", NOT_ARRAYS)
def test_plain_types_that_are_no_arrays_are_refused(tmp_path: Path, row: str) -> None:
    held, message = NOT_ARRAYS[row]
    (tmp_path / "5.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(InputError, match=rf"5\.pkl: .*{message}.*; delete .* and run eval\.py again"):
        read_arrays(tmp_path / "5.pkl")


def test_damaged_bytes_are_refused_or_are_still_a_tries_arrays(tmp_path: Path) -> None:
    path = tmp_path / "5.pkl"
    write_arrays(path, some_arrays())
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"5\.pkl: is no pickle of arrays"):
            read_arrays(path)
    rng, n_refused = random.Random(0), 0
    for _ in range(400):
        path.write_bytes(mutate(data, path.name, rng))
        try:
            assert read_arrays(path).keys() == ARRAYS
        except InputError:
            n_refused += 1
    assert 40 < n_refused < 400


# ---- A whole datastore


def test_flattening_returns_how_many_rows_each_trie_has(corpus: Corpus, tries: Path) -> None:
    assert run_flatten(tries, reprocess=False) == Counter(row[0] for row in expected_rows(corpus))


def test_processes_and_little_memory_leave_the_same_bytes(
    whole: Path, tries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattened, "LEAST_TASK_BYTES", 1)
    for cores, max_bytes in (({0}, 10**9), ({0, 1}, 10**9), ({0, 1}, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        shutil.rmtree(tries / FOLDER)
        run_flatten(tries, max_bytes=max_bytes)
        assert pickles(tries) == pickles(whole)


def test_a_script_without_a_main_guard_may_flatten_in_processes(whole: Path, tries: Path, tmp_path: Path) -> None:
    shutil.rmtree(tries / FOLDER)
    script = tmp_path / "script.py"
    script.write_text(
        "import os; from pathlib import Path; from utils import workers; from utils.datastore import flattened\n"
        "os.sched_getaffinity = lambda _: {0, 1}; workers.START_S, flattened.LEAST_TASK_BYTES = 1e-9, 1\n"
        f"flattened.flatten(Path({str(tries)!r}), True, False, 10**9)\nprint('once')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr
    assert pickles(tries) == pickles(whole)


@pytest.mark.parametrize("n_renames", [0, 1, 5])
def test_killed_while_flattening_the_next_run_leaves_the_same_bytes(whole: Path, tries: Path, n_renames: int) -> None:
    shutil.rmtree(tries / FOLDER)
    assert killed_before_rename(n_renames, lambda: run_flatten(tries))
    run_flatten(tries)
    assert pickles(tries) == pickles(whole)


def test_what_is_whole_is_not_made_again_and_a_lost_pickle_is(whole: Path, tries: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in (tries / FOLDER).iterdir()}
    run_flatten(tries)
    assert {path: path.stat().st_mtime_ns for path in (tries / FOLDER).iterdir()} == times
    pickle_path(tries / FOLDER, 3).unlink()
    with pytest.raises(InputError, match=r"3\.pkl: cannot be read"):
        run_flatten(tries, reprocess=False)
    run_flatten(tries)
    assert pickles(tries) == pickles(whole)
    assert {path for path in times if path.stat().st_mtime_ns == times[path]} == times.keys() - {
        pickle_path(tries / FOLDER, 3)
    }


def test_without_reprocessing_pickles_must_be_there(tries: Path) -> None:
    (tries / FOLDER / "manifest.json").unlink()
    with pytest.raises(InputError, match="the flattened tries are not all there; leave out --no_reprocessing once"):
        run_flatten(tries, reprocess=False)


def test_a_datastore_that_was_rebuilt_is_flattened_anew(tries: Path) -> None:
    path = tries / "hidden_states_manifest.json"
    manifest = read_json(path)
    manifest["versions"]["numpy"] = "another"
    write_json(path, manifest)
    before = {token: pickle_path(tries / FOLDER, token).stat().st_ino for token in range(5)}
    with pytest.raises(InputError, match="were made from another datastore"):
        run_flatten(tries, reprocess=False)
    assert {token: pickle_path(tries / FOLDER, token).stat().st_ino for token in range(5)} == before
    run_flatten(tries)
    assert read_json(tries / FOLDER / "manifest.json")["inputs"]["hidden_states_manifest.json"]
    run_flatten(tries, reprocess=False)


def test_a_folder_of_the_old_format_is_flattened_again(whole: Path, tries: Path) -> None:
    """Pickles of numpy's arrays, whole and listed, under a manifest that names no format."""
    folder, path = tries / FOLDER, tries / FOLDER / "manifest.json"
    for token in range(5):
        arrays = read_arrays(pickle_path(folder, token))
        pickle_path(folder, token).write_bytes(pickle.dumps(arrays, protocol=5))
    manifest = read_json(path)
    assert manifest["arguments"] == {"format": 2}
    manifest |= {"arguments": {}, "files": list_files(path, [pickle_path(folder, token) for token in range(5)])}
    write_json(path, manifest)
    with pytest.raises(InputError, match="were made from another datastore or by an older version; leave out"):
        run_flatten(tries, reprocess=False)
    run_flatten(tries)
    assert pickles(tries) == pickles(whole)


def test_a_pickle_of_another_size_is_named_and_has_to_be_deleted(whole: Path, tries: Path) -> None:
    path = pickle_path(tries / FOLDER, 2)
    path.write_bytes(path.read_bytes()[:-1])
    for reprocess in (False, True):
        with pytest.raises(InputError, match=r"2\.pkl: has .* bytes, eval\.py wrote .*; restore it, or delete it"):
            run_flatten(tries, reprocess)
    path.unlink()
    run_flatten(tries)
    assert pickles(tries) == pickles(whole)


@pytest.mark.parametrize("name", ["2.json", "tok_pos_2.json", "2.h5", f"{FOLDER}/2.pkl"])
def test_verifying_names_the_file_whose_content_was_changed(tries: Path, name: str) -> None:
    if not name.startswith(FOLDER):
        shutil.rmtree(tries / FOLDER)
    data = bytearray((tries / name).read_bytes())
    data[-3] ^= 1
    (tries / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name.split('/')[-1]}: was changed or is another run's"):
        run_flatten(tries, verify=True)


def waiting_for(folder: Path) -> str:
    return f"{folder}: waiting for another run that is writing here"


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_run_waits_while_the_first_flattens_and_finds_its_pickles(
    whole: Path, tries: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tries / FOLDER)
    with ThreadPoolExecutor(1) as second:
        with exclusive_lock(tries, "flattening"):
            n_rows = second.submit(run_flatten, tries)
            wait_until(lambda: bool(caplog.messages))
            assert caplog.messages == [waiting_for(tries)]
            shutil.copytree(whole / FOLDER, tries / FOLDER)  # as the first run makes them
            times = {path: path.stat().st_mtime_ns for path in (tries / FOLDER).iterdir()}
            assert not n_rows.done()
        assert n_rows.result(timeout=20) == run_flatten(whole, reprocess=False)
    assert {path: path.stat().st_mtime_ns for path in (tries / FOLDER).iterdir()} == times


def test_a_second_run_flattens_itself_where_the_first_was_killed(
    whole: Path, tries: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tries / FOLDER)
    with ThreadPoolExecutor(1) as second:
        with exclusive_lock(tries, "flattening"):
            n_rows = second.submit(run_flatten, tries)
            wait_until(lambda: bool(caplog.messages))
            shutil.copytree(whole / FOLDER, tries / FOLDER)
            pickle_path(tries / FOLDER, 3).unlink()
            (tries / FOLDER / "manifest.json").unlink()
        n_rows.result(timeout=20)
    assert pickles(tries) == pickles(whole)


def test_two_runs_at_once_leave_the_pickles_of_one(whole: Path, tries: Path) -> None:
    shutil.rmtree(tries / FOLDER)
    with ThreadPoolExecutor(2) as both:
        ends = list(both.map(lambda _: in_child(lambda: run_flatten(tries)), range(2)))
    assert ends == [(0, "")] * 2
    assert pickles(tries) == pickles(whole)


def test_a_run_does_not_wait_where_all_is_flattened(tries: Path) -> None:
    with exclusive_lock(tries, "flattening"):
        run_flatten(tries)
        run_flatten(tries, reprocess=False)


@pytest.mark.parametrize("rows", ["Infinity", "NaN", "null", '"x"', "[]", "1e999"])
def test_a_manifest_that_counts_no_rows_is_refused(tries: Path, rows: str) -> None:
    path = tries / FOLDER / "manifest.json"
    fields = read_json(path)
    fields["results"]["rows"]["3"] = "PLACE"
    path.write_text(json.dumps(fields).replace('"PLACE"', rows))
    with pytest.raises(InputError, match=r"manifest\.json: is damaged"):
        run_flatten(tries)
