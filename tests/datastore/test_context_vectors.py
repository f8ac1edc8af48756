"""Stage 4: every chunk's context vector is the hidden state at its entry token, whatever is killed, sliced or damaged."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, TEXTS, save
from synthetic_corpus import (
    LENGTHS,
    Corpus,
    all_bytes,
    expected_rows,
    make_tries,
    write_corpus,
    write_manifest,
    write_memmap,
)
from synthetic_corpus import TRIE_FOLDER as FOLDER
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.faults.crashes import run_in_fork
from benchmarks.faults.processes import killed_before_rename, on_full_disk
from utils.datastore import context_vectors
from utils.datastore.context_vectors import open_hidden_states, write_all_context_vectors
from utils.datastore.trie_files import datastore_token_ids, read_context_vectors, read_trie_rows
from utils.extraction.hidden_states import DATASET
from utils.extraction.token_probs import read_extraction
from utils.files import InputError, exclusive_lock
from utils.json_io import read_json, write_json

SCRIPT = "make_token_trie.py"
N_IDS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stage_2", gpt2_folder, LENGTHS, n_ids=N_IDS)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """The --output_dir of stage 3, without context vectors. Not to be written to."""
    return make_tries(corpus, tmp_path_factory.mktemp("bare"))


@pytest.fixture
def tries(tmp_path: Path, bare: Path) -> Path:
    """A copy of it to work in."""
    return shutil.copytree(bare, tmp_path / "tries")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, bare: Path) -> dict[str, bytes]:
    """What one undisturbed run leaves."""
    import make_token_trie

    save_dir = shutil.copytree(bare, tmp_path_factory.mktemp("whole") / "tries")
    make_token_trie.main([str(flag) for flag in corpus.stage_4_flags(save_dir)])
    return all_bytes(save_dir)


def assert_vectors_are_those_of_loops(corpus: Corpus, folder: Path) -> None:
    """Read without the library; the rows themselves are stage 3's, in the order of `expected_rows`."""
    expected = [(row[0], corpus.hidden_state(*row[2:])) for row in expected_rows(corpus)]
    found = []
    for token in sorted({token for token, _ in expected}):
        with h5py.File(folder / f"{token}.h5") as file:
            depths = sorted(file["hidden_states"], key=int)
            assert depths == list(json.loads((folder / f"{token}.json").read_text()))
            found += [(token, vector) for depth in depths for vector in file["hidden_states"][depth][()]]
    assert [token for token, _ in found] == [token for token, _ in expected]
    for (_, got), (_, wanted) in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert got.tobytes() == wanted.tobytes()


# ---- What it makes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block_bytes", [1 << 26, 100])
def test_each_chunk_gets_the_hidden_state_at_its_entry_token(
    gpt2_folder: Path,
    tmp_path: Path,
    run_stage: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(context_vectors, "BLOCK_BYTES", block_bytes)
    corpus = write_corpus(tmp_path / "stage_2", gpt2_folder, LENGTHS * 5, n_ids=N_IDS, dtype=dtype)
    run_stage(SCRIPT, *corpus.stage_4_flags(make_tries(corpus, tmp_path)))
    assert_vectors_are_those_of_loops(corpus, tmp_path / FOLDER)
    rows = read_trie_rows(tmp_path / FOLDER, 3)
    vectors = read_context_vectors(tmp_path / FOLDER, 3, rows)
    places = zip(rows.windows.tolist(), rows.positions.tolist(), strict=True)
    assert np.array_equal(vectors, [corpus.hidden_state(*place) for place in places])


def test_worker_processes_leave_the_same_bytes_as_one(
    corpus: Corpus,
    tries: Path,
    whole: dict[str, bytes],
    run_stage: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    run_stage(SCRIPT, *corpus.stage_4_flags(tries, max_workers=32))
    assert all_bytes(tries) == whole


def test_the_flags_of_the_readme_are_enough_and_the_default_is_32_workers(corpus: Corpus, bare: Path) -> None:
    import make_token_trie

    args = make_token_trie.parse_args([str(flag) for flag in corpus.stage_4_flags(bare, max_workers=None)])
    assert (args.max_workers, args.k, args.k_interval, args.missing_tokens_file) == (32, None, None, None)


@pytest.mark.parametrize("max_workers", [1, 2, 32])
def test_every_token_is_in_one_batch_however_many_workers(
    corpus: Corpus, tries: Path, monkeypatch: pytest.MonkeyPatch, max_workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    folder = corpus.output_dir
    seqlen_path, acc_index_path = (folder / f"train_index_to_{name}.json" for name in ("seqlen", "acc_index"))
    extraction = read_extraction(folder / "train_manifest.json")
    source = open_hidden_states(folder / "train.h5", seqlen_path, acc_index_path, extraction)
    assert list(write_all_context_vectors(tries / FOLDER, [], source, max_workers)) == []
    batches = list(write_all_context_vectors(tries / FOLDER, range(N_IDS), source, max_workers))
    names = [name for sums in batches for name in sums]
    assert sorted(names) == [f"{token}.h5" for token in range(N_IDS)]
    assert len(batches) > 1
    assert vectors_there(tries) == list(range(N_IDS))


def test_neither_the_script_nor_a_worker_loads_torch() -> None:
    code = "import make_token_trie, sys; sys.exit(any(n in sys.modules for n in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_manifest_carries_what_stage_5_checks(corpus: Corpus, whole: dict[str, bytes]) -> None:
    manifest = json.loads(whole[f"{FOLDER}/hidden_states_manifest.json"])
    extraction = read_json(corpus.output_dir / "train_manifest.json")
    assert manifest["complete"]
    assert manifest["inputs"]["model_gen"] == extraction["inputs"]["model"]
    assert manifest["inputs"]["tokenizer"] == extraction["inputs"]["tokenizer"]
    assert manifest["inputs"]["hidden_size"] == 6
    assert manifest["results"] == {"entry_tokens": N_IDS, "excluded": []}


def test_an_empty_datastore_is_complete_at_once(
    corpus: Corpus, tmp_path: Path, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make_tries(corpus, tmp_path, tok_prob_threshold=0.75)
    for flags in ({}, {"k": 0, "k_interval": 10}):
        run_stage(SCRIPT, *corpus.stage_4_flags(tmp_path, tok_prob_threshold=0.75, **flags))
        assert "the datastore is empty, nothing to do" in capsys.readouterr().out
    manifest = read_json(tmp_path / FOLDER.replace("0.5", "0.75") / "hidden_states_manifest.json")
    assert manifest["complete"]


def test_a_finished_run_is_not_done_again(
    corpus: Corpus,
    tries: Path,
    whole: dict[str, bytes],
    run_stage: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_stage(SCRIPT, *corpus.stage_4_flags(tries))
    times = {path: path.stat().st_mtime_ns for path in (tries / FOLDER).iterdir() if path.suffix != ".lock"}
    capsys.readouterr()
    run_stage(SCRIPT, *corpus.stage_4_flags(tries / FOLDER))
    assert capsys.readouterr().out.endswith(f"nothing to do; all {N_IDS} have them\n")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert all_bytes(tries) == whole


def test_a_finished_run_does_not_list_a_changed_file_as_its_own(
    corpus: Corpus, tries: Path, run_stage: Callable[..., None], refusal: Callable[..., str]
) -> None:
    flags = corpus.stage_4_flags(tries)
    run_stage(SCRIPT, *flags)
    path = min((tries / FOLDER).glob("*.h5"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        assert refusal(SCRIPT, *flags).startswith(f"{path}: was changed or is another run's")
    path.unlink()
    run_stage(SCRIPT, *flags)
    run_stage(SCRIPT, *flags)


def extract(model: Path, data: Path, output_dir: Path, run_stage: Callable[..., None]) -> Path:
    flags = ("--model_path", model, "--data_dir", data, "--output_dir", output_dir, "--partition", "train")
    sizes = ("--chunk_size", 48, "--stride", 40, "--min_length", 20, "--device", "cpu", "--batch_size", 4)
    run_stage("extract_token_probs_and_memmap.py", *flags, *sizes, "--save_hidden_states", "--construct_memmap")
    return output_dir


def test_one_models_chunks_get_another_models_hidden_states_from_text_on(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=12, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2_folder)
    (tmp_path / "student").mkdir()
    student = save(tmp_path / "student", GPT2LMHeadModel, config, tokenizer)
    write_json(tmp_path / "train.json", [{"text": text} for text in TEXTS])
    teacher_out = extract(gpt2_folder, tmp_path, tmp_path / "teacher_out", run_stage)
    student_out = extract(student, tmp_path, tmp_path / "student_out", run_stage)

    n_windows = len(list((teacher_out / "train").glob("token_probs_*.json")))
    windows = [read_json(teacher_out / f"train/token_probs_{i}.json") for i in range(n_windows)]
    states = [np.load(student_out / f"train/hidden_states_{i}.npy") for i in range(n_windows)]
    ids = [np.array([row[4] for row in rows]) for rows in windows]
    probabilities = [np.array([row[1] for row in rows]) for rows in windows]
    read = Corpus(teacher_out, gpt2_folder, ids, probabilities, np.concatenate(states))
    gamma = 0.002
    make_tries(read, tmp_path / "tries", tok_prob_threshold=gamma)
    source = Corpus(student_out, student, ids, probabilities, read.hidden_states)
    run_stage(SCRIPT, *source.stage_4_flags(tmp_path / "tries", tok_prob_threshold=gamma))

    expected = expected_rows(read, gamma, skip=48 - 40)
    assert len(expected) > 300
    folder = tmp_path / "tries" / FOLDER.replace("0.5", str(gamma))
    found = []
    for token in datastore_token_ids(folder):
        rows = read_trie_rows(folder, token)
        vectors = read_context_vectors(folder, token, rows)
        for n, place in enumerate(zip(rows.windows.tolist(), rows.positions.tolist(), strict=True)):
            chunk = rows.chunk_ids[rows.chunk_offsets[n] : rows.chunk_offsets[n + 1]]
            found.append((token, tuple(chunk.tolist()), *place))
            assert np.array_equal(vectors[n], states[place[0]][place[1]])
    assert found == expected


# ---- In parts


def vectors_there(save_dir: Path) -> list[int]:
    return sorted(int(path.stem) for path in (save_dir / FOLDER).glob("*.h5"))


def is_complete(save_dir: Path) -> bool:
    return read_json(save_dir / FOLDER / "hidden_states_manifest.json")["complete"]


def test_slices_add_up_to_the_whole_in_any_order(
    corpus: Corpus, tries: Path, whole: dict[str, bytes], run_stage: Callable[..., None]
) -> None:
    for k, there in ((1, [2, 3]), (2, [2, 3, 4]), (0, [0, 1, 2, 3, 4])):
        assert not (tries / FOLDER / "hidden_states_manifest.json").exists() or not is_complete(tries)
        run_stage(SCRIPT, *corpus.stage_4_flags(tries, k=k, k_interval=2))
        assert vectors_there(tries) == there
    assert all_bytes(tries) == whole


def test_missing_tokens_alone_are_made(
    corpus: Corpus,
    tries: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    run_stage: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_json(tmp_path / "missing.json", [3, 1])
    flags = {"process_missing_tokens": True, "missing_tokens_file": tmp_path / "missing.json"}
    run_stage(SCRIPT, *corpus.stage_4_flags(tries, **flags))
    assert vectors_there(tries) == [1, 3]
    assert "3 of 5 are still without" in capsys.readouterr().out
    run_stage(SCRIPT, *corpus.stage_4_flags(tries, process_missing_tokens=True))
    assert "3 token tries given their context vectors; all 5 have them" in capsys.readouterr().out
    assert all_bytes(tries) == whole
    write_json(tmp_path / "missing.json", [])
    run_stage(SCRIPT, *corpus.stage_4_flags(tries, **flags))
    assert "nothing to do" in capsys.readouterr().out


def test_excluded_tries_are_left_out_and_the_rest_is_complete(
    corpus: Corpus, tries: Path, whole: dict[str, bytes], tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    write_json(tmp_path / "excluded.json", [0, 4])
    run_stage(SCRIPT, *corpus.stage_4_flags(tries, excluded_tries_prior=tmp_path / "excluded.json"))
    assert vectors_there(tries) == [1, 2, 3]
    manifest = read_json(tries / FOLDER / "hidden_states_manifest.json")
    assert manifest["complete"]
    assert manifest["results"] == {"entry_tokens": 3, "excluded": [0, 4]}
    assert datastore_token_ids(tries / FOLDER) == [1, 2, 3]
    run_stage(SCRIPT, *corpus.stage_4_flags(tries))
    assert all_bytes(tries) == whole


# ---- Interrupted


def test_killed_at_any_file_and_run_again_it_leaves_the_same_bytes(
    corpus: Corpus, tries: Path, bare: Path, whole: dict[str, bytes], run_stage: Callable[..., None]
) -> None:
    flags = corpus.stage_4_flags(tries)
    for n in range(N_IDS + 2):
        assert killed_before_rename(n, lambda: run_stage(SCRIPT, *flags))
        run_stage(SCRIPT, *flags)
        assert all_bytes(tries) == whole
        shutil.rmtree(tries)
        shutil.copytree(bare, tries)
    n_kills = 0
    while killed_before_rename(1, lambda: run_stage(SCRIPT, *flags)):
        n_kills += 1
        assert n_kills <= N_IDS + 2  # the list of files and the manifest come last
    assert n_kills >= 3
    assert all_bytes(tries) == whole


def test_a_half_written_h5_is_made_again(
    corpus: Corpus, tries: Path, whole: dict[str, bytes], run_stage: Callable[..., None]
) -> None:
    # The authors' code takes its being there for its being done.
    run_stage(SCRIPT, *corpus.stage_4_flags(tries))
    for cut in (0, 100, -1):
        path = tries / FOLDER / "3.h5"
        path.write_bytes(path.read_bytes()[:cut])
        run_stage(SCRIPT, *corpus.stage_4_flags(tries))
        assert all_bytes(tries) == whole


@pytest.mark.parametrize("n_bytes", [30, 2000, 4500])
def test_a_full_disk_names_the_file_and_the_run_goes_on_later(
    corpus: Corpus, tries: Path, whole: dict[str, bytes], run_stage: Callable[..., None], n_bytes: int
) -> None:
    flags = corpus.stage_4_flags(tries)
    said = on_full_disk(n_bytes, lambda: run_stage(SCRIPT, *flags))
    assert re.search(r"(hidden_states_manifest\.json|\d\.h5): cannot be written", said), said
    run_stage(SCRIPT, *flags)
    assert all_bytes(tries) == whole


def test_workers_of_a_killed_run_end_with_it_and_the_next_run_goes_on(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import make_token_trie

    corpus = write_corpus(tmp_path / "stage_2", gpt2_folder, [200] * 60, n_ids=300, above=0.95)
    tries = make_tries(corpus, tmp_path / "tries")
    shutil.copytree(tries, tmp_path / "undisturbed")
    run_stage(SCRIPT, *corpus.stage_4_flags(tmp_path / "undisturbed"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def run_and_die() -> None:
        # As the first batch ends: workers have two tasks each, and more are left.
        make_token_trie.ProgressBar.update = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run_stage(SCRIPT, *corpus.stage_4_flags(tries, max_workers=2))

    # Returns once all that inherited its stderr have ended.
    assert run_in_fork(run_and_die, tmp_path).status == -signal.SIGKILL
    assert 1 <= len(vectors_there(tries)) < 300
    assert not is_complete(tries)
    run_stage(SCRIPT, *corpus.stage_4_flags(tries))
    assert all_bytes(tries) == all_bytes(tmp_path / "undisturbed")


# ---- What it refuses


def rewrite_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def spoil_hidden_state(c: Corpus, value: float) -> None:
    place = next((window, position) for token, _, window, position in expected_rows(c) if token == 3)
    with h5py.File(c.output_dir / "train.h5", "r+") as file:
        file[DATASET][sum(LENGTHS[: place[0]]) + place[1], 2] = value


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def with_other_text(c: Corpus) -> None:
    (c.output_dir / "train_manifest.json").unlink()
    write_manifest(Corpus(c.output_dir, c.model, c.ids[::-1], c.probabilities, c.hidden_states))


def with_vectors(c: Corpus, vectors: np.ndarray) -> None:
    write_memmap(Corpus(c.output_dir, c.model, c.ids, c.probabilities, vectors))


def listing(value: object) -> Callable[[Corpus, Path], object]:
    return lambda c, folder: write_json(folder / "list.json", value)


MISSING: dict[str, object] = {"process_missing_tokens": True, "missing_tokens_file": "{folder}/list.json"}
EXCLUDED: dict[str, object] = {"excluded_tries_prior": "{folder}/list.json"}
REFUSED: dict[str, tuple[Callable[[Corpus, Path], object], dict[str, object], str]] = {
    "no tries folder": (lambda c, f: None, {"save_dir": "nowhere"}, "nowhere: does not exist"),
    "file for folder": (lambda c, f: None, {"save_dir": __file__}, "is not a folder"),
    "tries of another γ": (lambda c, f: None, {"tok_prob_threshold": 0.9}, r"but there are .*train_0\.5"),
    "tries of another dataset": (lambda c, f: None, {"dataset_name": "x"}, "expected the trie folder"),
    "tries of another partition": (lambda c, f: None, {"partition": "test"}, "expected the trie folder"),
    "stage 3 did not end": (
        lambda c, f: rewrite_json(f / "manifest.json", lambda m: m.update(complete=False)),
        {},
        "says that save_token_trie_info.py did not end",
    ),
    "a trie is gone": (
        lambda c, f: (f / "3.json").unlink(),
        {},
        "holds 4 tries, its manifest says 5; run save_token_trie_info.py again",
    ),
    "positions cut off": (lambda c, f: cut_off(f / "tok_pos_3.json"), {}, r"tok_pos_3\.json: is not valid JSON"),
    "position beyond the window": (
        lambda c, f: rewrite_json(f / "tok_pos_3.json", lambda p: p["2"].__setitem__(0, [1, 7])),
        {},
        r"tok_pos_3\.json: names position 7 of window 1, which",
    ),
    "window beyond the text": (
        lambda c, f: rewrite_json(f / "tok_pos_3.json", lambda p: p["2"].__setitem__(0, [8, 0])),
        {},
        "names position 0 of window 8, which",
    ),
    "no .h5": (lambda c, f: (c.output_dir / "train.h5").unlink(), {}, r"train\.h5: does not exist"),
    "folder for .h5": (lambda c, f: None, {"all_hidden_states_path": ROOT}, "is not a file"),
    ".h5 cut off": (lambda c, f: cut_off(c.output_dir / "train.h5"), {}, r"train\.h5: .*cut off"),
    ".h5 of other things": (
        lambda c, f: h5py.File(c.output_dir / "train.h5", "w").close(),
        {},
        r"train\.h5: is cut off or not an \.h5 of stage 2",
    ),
    ".h5 without manifest": (
        lambda c, f: (c.output_dir / "train_manifest.json").unlink(),
        {},
        r"train_manifest\.json: does not exist",
    ),
    ".h5 with fewer rows": (lambda c, f: with_vectors(c, c.hidden_states[:-1]), {}, "has 67 rows"),
    ".h5 of another size": (
        lambda c, f: with_vectors(c, c.hidden_states[:, :5]),
        {},
        "have size 5, its manifest says 6",
    ),
    "NaN": (
        lambda c, f: spoil_hidden_state(c, np.nan),
        {},
        r"train\.h5: holds NaN or infinity at position \d+ of window \d",
    ),
    "infinity": (lambda c, f: spoil_hidden_state(c, np.inf), {}, "holds NaN or infinity at position"),
    "another text": (lambda c, f: with_other_text(c), {}, "holds other windows than those the tries"),
    "another tokenizer": (
        lambda c, f: rewrite_json(c.output_dir / "train_manifest.json", lambda m: m["inputs"].update(tokenizer="x")),
        {},
        "made with another tokenizer than the tries",
    ),
    "no lengths": (lambda c, f: None, {"idx_to_seqlen_path": "nowhere.json"}, r"nowhere\.json: does not exist"),
    "lengths cut off": (
        lambda c, f: cut_off(c.output_dir / "train_index_to_seqlen.json"),
        {},
        r"seqlen\.json: is not valid JSON",
    ),
    "lengths lack a window": (
        lambda c, f: rewrite_json(c.output_dir / "train_index_to_seqlen.json", lambda m: m.pop("7")),
        {},
        r"seqlen\.json: covers 7 windows of the 8",
    ),
    "lengths with a hole": (
        lambda c, f: rewrite_json(c.output_dir / "train_index_to_seqlen.json", lambda m: m.pop("3")),
        {},
        r"seqlen\.json: is not a map .* of every window",
    ),
    "first rows lack a window": (
        lambda c, f: rewrite_json(c.output_dir / "train_index_to_acc_index.json", lambda m: m.pop("7")),
        {},
        r"acc_index\.json: covers 7 windows of the 8",
    ),
    "first rows of another run": (
        lambda c, f: rewrite_json(c.output_dir / "train_index_to_acc_index.json", lambda m: m.update({"3": 21})),
        {},
        r"acc_index\.json: does not say where",
    ),
    "maps swapped": (
        lambda c, f: None,
        {
            "idx_to_seqlen_path": "{stage_2}/train_index_to_acc_index.json",
            "index_to_acc_index_path": "{stage_2}/train_index_to_seqlen.json",
        },
        "does not say where",
    ),
    "k without k_interval": (lambda c, f: None, {"k": 0}, "give both or neither"),
    "k_interval without k": (lambda c, f: None, {"k_interval": 4}, "give both or neither"),
    "k past the end": (lambda c, f: None, {"k": 3, "k_interval": 2}, "--k 3: the last slice of 5 .* is --k 2"),
    "k below 0": (lambda c, f: None, {"k": -1, "k_interval": 2}, "--k: got '-1'"),
    "k_interval of 0": (lambda c, f: None, {"k": 0, "k_interval": 0}, "--k_interval: got '0'"),
    "no workers": (lambda c, f: None, {"max_workers": 0}, "--max_workers: got '0'"),
    "list without its switch": (lambda c, f: None, {"missing_tokens_file": "x"}, "needs --process_missing_tokens"),
    "no list": (lambda c, f: None, MISSING, r"list\.json: does not exist"),
    "list of texts": (listing(["3"]), MISSING, r"list\.json: is not a list of token ids"),
    "list of an unknown id": (listing([3, 77]), MISSING, r"list\.json: lists 77, which is no entry token"),
    "exclusion of an unknown id": (listing([3, 77]), EXCLUDED, r"list\.json: lists 77, which is no entry token"),
    "exclusion that is not a list": (listing({"3": 1}), EXCLUDED, r"list\.json: is not a list of token ids"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_stage_4_refuses_unusable_input(
    corpus: Corpus, tries: Path, tmp_path: Path, refusal: Callable[..., str], row: str
) -> None:
    damage, flags, message = REFUSED[row]
    stage_2 = shutil.copytree(corpus.output_dir, tmp_path / "stage_2")
    damaged = Corpus(stage_2, corpus.model, corpus.ids, corpus.probabilities, corpus.hidden_states)
    # Without the list of what was written, so that what the readers themselves find is seen.
    rewrite_json(tries / FOLDER / "manifest.json", lambda m: m.update(files={}))
    damage(damaged, tries / FOLDER)
    places = {"{folder}": str(tries / FOLDER), "{stage_2}": str(stage_2)}
    filled = {name: fill(value, places) for name, value in flags.items()}
    said = refusal(SCRIPT, *damaged.stage_4_flags(tries, **filled))
    assert re.search(message, said), said


def fill(value: object, places: dict[str, str]) -> object:
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(name, place)
    return value


def test_a_workers_error_is_not_lost(
    corpus: Corpus, tries: Path, tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_2 = shutil.copytree(corpus.output_dir, tmp_path / "stage_2")
    damaged = Corpus(stage_2, corpus.model, corpus.ids, corpus.probabilities, corpus.hidden_states)
    spoil_hidden_state(damaged, np.nan)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert "holds NaN or infinity at" in refusal(SCRIPT, *damaged.stage_4_flags(tries, max_workers=2))
    assert not is_complete(tries)


def test_what_lies_there_from_another_run_is_refused(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None], refusal: Callable[..., str]
) -> None:
    run_stage(SCRIPT, *corpus.stage_4_flags(tries, k=0, k_interval=2))
    stage_2 = shutil.copytree(corpus.output_dir, tmp_path / "stage_2")
    rewrite_json(stage_2 / "train_manifest.json", lambda m: m["inputs"].update(model="another"))
    other = Corpus(stage_2, corpus.model, corpus.ids, corpus.probabilities, corpus.hidden_states)
    assert "was made with the model gen 'm', this run has 'another'" in refusal(SCRIPT, *other.stage_4_flags(tries))


def hold(folder: Path, first: int, n_items: int) -> subprocess.Popen[bytes]:
    """Another process that writes the context vectors of some entry tokens until its stdin is closed."""
    code = (
        "import sys; from pathlib import Path; from utils.files import exclusive_lock\n"
        f"with exclusive_lock(Path({str(folder)!r}), 'context_vectors', items=range({first}, {first + n_items})):\n"
        "    print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_other_slices_may_run_at_once_but_the_same_tokens_may_not(
    corpus: Corpus, tries: Path, run_stage: Callable[..., None], refusal: Callable[..., str]
) -> None:
    other = hold(tries / FOLDER, 2, 2)
    try:
        for flags in ({}, {"k": 1, "k_interval": 2}, {"k": 0, "k_interval": 3}, {"k": 1, "k_interval": 3}):
            assert "another run is writing here" in refusal(SCRIPT, *corpus.stage_4_flags(tries, **flags))
        for flags in ({"k": 0, "k_interval": 2}, {"k": 4, "k_interval": 1}):
            run_stage(SCRIPT, *corpus.stage_4_flags(tries, **flags))
    finally:
        other.communicate()
    assert vectors_there(tries) == [0, 1, 4]
    with exclusive_lock(tries / FOLDER, "context_vectors", items=range(N_IDS)):
        pass


def test_a_whole_run_shuts_out_every_slice(corpus: Corpus, tries: Path, refusal: Callable[..., str]) -> None:
    other = hold(tries / FOLDER, 0, 0)
    try:
        said = refusal(SCRIPT, *corpus.stage_4_flags(tries, k=2, k_interval=2))
        assert "another run is writing here" in said
    finally:
        other.communicate()


def test_maps_that_do_not_fit_are_refused_before_anything_is_written(corpus: Corpus, tries: Path) -> None:
    import make_token_trie

    flags = corpus.stage_4_flags(tries, idx_to_seqlen_path=corpus.output_dir / "train_index_to_acc_index.json")
    with pytest.raises(InputError):
        make_token_trie.main([str(flag) for flag in flags])
    assert not (tries / FOLDER / "hidden_states_manifest.json").exists()
