"""Spoiled files end in one sentence or a right result, whatever reads them. benchmarks/fuzz.py does it at length."""

import random
import re
import shutil
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks import fuzz
from benchmarks.faults.mutations import BLIND, mutate
from utils.datastore.trie_files import GROUP, read_context_vectors, read_trie_rows
from utils.evaluation.summary import write_summary
from utils.extraction.hidden_states import map_all_hidden_states, read_hidden_states
from utils.extraction.token_probs import find_token_probs, windows_with_token_probs
from utils.files import InputError
from utils.json_io import read_json

N_CASES = 12  # of each reader


@pytest.fixture(scope="module")
def whole(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz.build(tmp_path_factory.mktemp("pipeline"), gpt2_folder)


def test_no_mutated_file_ends_in_a_traceback_a_hang_or_a_write_elsewhere(whole: Path, tmp_path: Path) -> None:
    readers = fuzz.readers(whole)
    assert len(readers) == 21
    for reader in readers:
        sound = Path(shutil.copytree(whole, tmp_path / "sound"))
        reader.read(sound)
        shutil.rmtree(sound)
        found = fuzz.run_cases(reader, whole, tmp_path, range(N_CASES), seed=7)
        wrong = [(number, text) for number, text in found if text not in ("result", "refused")]
        assert not wrong, (reader.name, wrong[0])
        assert len(found) == N_CASES


@pytest.mark.parametrize("name", ["a.json", "a.npy", "a.h5", "a.pkl", "a.txt"])
def test_mutations_change_files_and_are_the_same_for_the_same_seed(name: str) -> None:
    data = b'[["a", 0.5, 1, 2, 3], ["b", 0.25, 1, 3, 4]] ' * (1 if name == "a.json" else 20)
    spoiled = [mutate(data, name, random.Random(seed)) for seed in range(40)]
    assert spoiled == [mutate(data, name, random.Random(seed)) for seed in range(40)]
    assert sum(each != data for each in spoiled) >= 30
    for blind in BLIND:
        blind(b"", random.Random(0))  # nothing to change is no error


# ---- Files made to lie


@pytest.mark.parametrize(
    ("n_rows", "message"),
    [
        (10**12, "mmap length is greater than file size"),
        (2, "mmap length is greater than file size"),
        (0, r"expected a 2-D float array, found float32 \(0, 32\) in 128 bytes"),
    ],
)
def test_a_npy_header_is_held_against_the_size_of_its_file(tmp_path: Path, n_rows: int, message: str) -> None:
    """No memory is asked for on the word of a header that claims a terabyte."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 32), }" % n_rows
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path = tmp_path / "hidden_states_0.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(128))
    with pytest.raises(InputError, match=rf"hidden_states_0\.npy: is cut off or not a \.npy file \(.*{message}"):
        read_hidden_states(tmp_path, 0)


def test_numpys_own_files_are_read_and_its_archives_and_objects_are_not(tmp_path: Path) -> None:
    path, wanted = tmp_path / "hidden_states_0.npy", np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(path, wanted)
    assert np.array_equal(read_hidden_states(tmp_path, 0), wanted)
    np.savez(tmp_path / "a.npz", wanted)
    for damage in (
        lambda: (tmp_path / "a.npz").rename(path),
        lambda: np.save(path, np.array([[None]]), allow_pickle=True),
        lambda: path.write_bytes(b"PK\x03\x04"),
        lambda: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((("),
    ):
        damage()
        with pytest.raises(InputError, match=r"is cut off or not a \.npy file"):
            read_hidden_states(tmp_path, 0)


@pytest.mark.parametrize("kind", ["compressed", "elsewhere", "a linked file"])
def test_an_h5_whose_rows_are_not_in_it_is_refused(whole: Path, tmp_path: Path, kind: str) -> None:
    """Compressed rows may be a thousand times as large, and other files are not ours to read."""
    folder = Path(shutil.copytree(whole / fuzz.DATASTORE, tmp_path / "tries"))
    token = int(sorted(folder.glob("[0-9]*.h5"))[0].stem)
    rows = read_trie_rows(folder, token)
    size = read_context_vectors(folder, token, rows).shape[1]
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(10**6))
    for path, names, into in (
        (folder / f"{token}.h5", [(f"{GROUP}/{depth}", (n, size)) for depth, n in rows.depths.items()], "tries"),
        (tmp_path / "train.h5", [("all_hidden_states", (100, size))], "all"),
    ):
        path.unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            for name, shape in names:
                if kind == "compressed":
                    file.create_dataset(name, shape, "f4", compression="gzip", fillvalue=0)
                elif kind == "elsewhere":
                    file.create_dataset(name, shape, "f4", external=[(str(secret), 0, 10**6)])
                else:
                    file[name] = h5py.ExternalLink(str(secret), "/x")
        with pytest.raises(InputError, match=path.name):
            map_all_hidden_states(path) if into == "all" else read_context_vectors(folder, token, rows)


def test_a_manifest_that_claims_a_trillion_windows_takes_no_memory(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "extracted", tmp_path / "extracted"))
    path = folder / "train_manifest.json"
    n_windows = len(windows_with_token_probs(folder / "train"))
    text = path.read_text()
    assert f'"n_windows": {n_windows},' in text
    path.write_text(text.replace(f'"n_windows": {n_windows},', '"n_windows": 1000000000000,'))
    with pytest.raises(InputError, match=rf"token_probs_{n_windows}\.json is missing, {10**12 - n_windows} of"):
        find_token_probs(folder, "train")


def test_files_named_by_other_spellings_of_a_number_are_passed_over(tmp_path: Path) -> None:
    for name in ("token_probs_1.json", "token_probs_01.json", "token_probs_٣.json", "token_probs_-2.json"):
        (tmp_path / name).touch()
    assert windows_with_token_probs(tmp_path) == [1]


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'["\\ud83d\\ude42", "\\\\ud800"]')
    assert read_json(path) == ["\U0001f642", "\\ud800"]
    path.write_bytes(b'{"a": ["\\uD800 x"]}')
    with pytest.raises(InputError, match=r"a\.json: holds JSON that cannot be read .* is half of a surrogate pair"):
        read_json(path)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e999", "NaN", "-Infinity"])
def test_seconds_that_cannot_be_summed_up_are_no_result(whole: Path, tmp_path: Path, value: str) -> None:
    folder = Path(shutil.copytree(whole / "results", tmp_path / "results"))
    path = folder / "prompt_0.json"
    text, n = re.subn(r'("lm_seconds": )[-0-9.e]+', rf"\g<1>{value}", path.read_text())
    assert n >= 1
    path.write_text(text)
    with pytest.raises(InputError, match=r"prompt_0\.json: is not a complete result file"):
        write_summary(folder)
