"""Stage 3 and the files of token tries: what lies on disk is what loops over every token give, or is refused."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import killed_before_rename, on_full_disk
from synthetic_corpus import (
    LABELS,
    Corpus,
    Row,
    all_bytes,
    expected_rows,
    write_corpus,
    write_manifest,
)

from utils.datastore import chunk_lists
from utils.datastore import trie_files as token_trie
from utils.manifest import FileSum
from utils.datastore.chunks import ChunkRows, find_chunks
from utils.files import InputError, exclusive_lock, temporary_folder
from utils.manifest import begin_stage
from utils.json_io import read_json, write_json
from utils.datastore.external_sort import Keys, SortRuns, spill
from utils.extraction.token_probs import read_token_probs, token_probs_path, write_token_probs
from utils.datastore.trie_files import TrieRows, entry_token_ids, entry_tokens_with_vectors, find_trie_folder, read_context_vectors, read_token_id_list, read_trie_rows, trie_path, write_context_vectors
from utils.datastore.external_sort import write_tries

SCRIPT = "save_token_trie_info.py"
FOLDER = "token_trie_toy_DSorg_large_Hsmall/train_0.5"
LENGTHS = [12, 7, 1, 12, 3, 9, 12, 12]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stage_2", gpt2_folder, LENGTHS, n_ids=4)


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """The --output_dir of a stage 3 that ended."""
    import save_token_trie_info

    output_dir = tmp_path_factory.mktemp("tries")
    save_token_trie_info.main([str(flag) for flag in corpus.stage_3_flags(output_dir)])
    return output_dir


def rows_on_disk(folder: Path) -> list[Row]:
    """Every row in the order of the files, read without the library."""
    found = []
    for path in sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem)):
        chunks = json.loads(path.read_text())
        places = json.loads(path.with_name(f"tok_pos_{path.name}").read_text())
        assert list(chunks) == list(places) == sorted(chunks, key=int)
        for depth, rows in chunks.items():
            assert {len(row) for row in rows} == {int(depth)}
            for (entry, *chunk), (window, position) in zip(rows, places[depth], strict=True):
                assert entry == int(path.stem)
                found.append((entry, tuple(chunk), window, position))
    return found


# ---- Stage 3


def test_the_tries_hold_the_rows_of_loops_in_their_order(corpus: Corpus, tries: Path) -> None:
    assert rows_on_disk(tries / FOLDER) == expected_rows(corpus)


@pytest.mark.parametrize(("threshold", "skip", "bound"), [(0.0, 0, 3), (0.2, 5, 0), (0.5, 2, 1), (0.75, 0, 0)])
def test_threshold_skip_and_bound_reach_the_tries(
    corpus: Corpus, tmp_path: Path, run_stage: Callable[..., None], threshold: float, skip: int, bound: int
) -> None:
    flags = {"tok_prob_threshold": threshold, "skip_first_tokens": skip, "max_chunk_length": bound}
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path, **flags))
    folder = tmp_path / f"token_trie_toy_DSorg_large_Hsmall/train_{threshold}"
    assert rows_on_disk(folder) == expected_rows(corpus, threshold, skip, bound)


def test_the_lists_hold_every_window_and_every_plateau(corpus: Corpus, tries: Path) -> None:
    windows = json.loads((tries / "org_large_toy_train_token_prob_list.json").read_text())
    files = [token_probs_path(corpus.output_dir / "train", window) for window in range(len(LENGTHS))]
    assert windows == [json.loads(path.read_text()) for path in files]
    assert len((tries / "org_large_toy_train_token_prob_list.json").read_text().splitlines()) == len(LENGTHS) + 2
    plateaus, filtered = [], []
    for rows in windows:
        for at in range(2, len(rows) - 1):  # the windows overlap by two tokens
            end = at + 1
            while end < len(rows) and rows[end][1] > 0.5:
                end += 1
            if end > at + 1 and (at == 2 or rows[at][1] <= 0.5):
                plateaus.append([row[4] for row in rows[at:end]])
                filtered.append(rows[at:end])
    assert json.loads((tries / "org_large_toy_train_all_phrases_0.5.json").read_text()) == plateaus
    assert json.loads((tries / "org_large_toy_train_all_filtered_tok_probs_0.5.json").read_text()) == filtered


def test_the_first_token_after_the_skip_is_in_its_plateau_once(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    # The authors' code writes [3, 3, 5, 6] here.
    one = write_corpus(tmp_path / "stage_2", gpt2_folder, [6], n_ids=9)
    ids, probabilities = np.array([1, 2, 3, 5, 6, 7]), np.array([0, 0.9, 0.9, 0.9, 0.9, 0.1])
    write_token_probs(one.output_dir / "train", 0, ids, probabilities, list("abcdef"))
    (one.output_dir / "train_manifest.json").unlink()
    write_manifest(Corpus(one.output_dir, gpt2_folder, [ids], [probabilities], one.hidden_states))
    run_stage(SCRIPT, *one.stage_3_flags(tmp_path / "tries"))
    assert read_json(tmp_path / "tries/org_large_toy_train_all_phrases_0.5.json") == [[3, 5, 6]]
    assert rows_on_disk(tmp_path / "tries" / FOLDER) == [(3, (5, 6), 0, 2), (5, (6,), 0, 3)]


def test_identity_is_ids_whatever_the_texts_say(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    # The authors' code joins the texts and tokenises them again: with one text for all ids their chunks are one.
    shutil.copytree(corpus.output_dir, tmp_path / "stage_2")
    for window, (ids, probabilities) in enumerate(zip(corpus.ids, corpus.probabilities, strict=True)):
        write_token_probs(tmp_path / "stage_2/train", window, ids, probabilities, ["�"] * len(ids))
    flags = corpus.stage_3_flags(tmp_path / "tries", token_prob_dir=tmp_path / "stage_2/train")
    run_stage(SCRIPT, *flags)
    assert all_bytes(tmp_path / "tries" / FOLDER) == all_bytes(tries / FOLDER)


def test_a_tokenizer_that_adds_bos_puts_no_trie_in_another_ones_file(
    llama_folder: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    corpus = write_corpus(tmp_path / "stage_2", llama_folder, LENGTHS, n_ids=5)
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries"))
    assert rows_on_disk(tmp_path / "tries" / FOLDER) == expected_rows(corpus)


def test_stage_2s_output_dir_does_as_well_as_its_partition_folder(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path, token_prob_dir=corpus.output_dir))
    assert all_bytes(tmp_path) == all_bytes(tries)


def test_no_token_above_the_threshold_is_an_empty_datastore(
    corpus: Corpus, tmp_path: Path, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path, tok_prob_threshold=0.75))
    assert "the datastore is empty" in capsys.readouterr().out
    folder = tmp_path / FOLDER.replace("0.5", "0.75")
    assert os.listdir(folder) == ["manifest.json"]
    assert read_json(tmp_path / "org_large_toy_train_all_phrases_0.75.json") == []
    assert find_trie_folder(tmp_path, "toy", "org/large", "small", "train", 0.75) == folder
    assert entry_token_ids(folder) == []


def test_a_finished_run_is_not_done_again_and_a_lost_file_is_made_again(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tries, tmp_path / "tries")
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries"))
    assert capsys.readouterr().out.startswith("Nothing to do")
    for name in (f"{FOLDER}/tok_pos_2.json", "org_large_toy_train_all_phrases_0.5.json"):
        (tmp_path / "tries" / name).unlink()
        run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries"))
        assert all_bytes(tmp_path / "tries") == all_bytes(tries)


def test_killed_at_any_file_and_run_again_it_leaves_the_same_bytes(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    flags = corpus.stage_3_flags(tmp_path / "killed")
    n_renames = len(all_bytes(tries)) + 2  # both manifests are written twice
    for n in range(n_renames):
        assert killed_before_rename(n, lambda: run_stage(SCRIPT, *flags))
        run_stage(SCRIPT, *flags)
        assert all_bytes(tmp_path / "killed") == all_bytes(tries)
        shutil.rmtree(tmp_path / "killed")
    # Killed again and again, each time a few files further.
    n_kills = 0
    while killed_before_rename(4, lambda: run_stage(SCRIPT, *flags)):
        n_kills += 1
        assert n_kills < n_renames
    assert n_kills >= 3
    assert all_bytes(tmp_path / "killed") == all_bytes(tries)


@pytest.mark.parametrize(("n_bytes", "name"), [(1200, "token_prob_list"), (30, "manifest.json")])
def test_a_full_disk_names_the_file_and_the_run_goes_on_later(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None], n_bytes: int, name: str
) -> None:
    flags = corpus.stage_3_flags(tmp_path)
    assert name in on_full_disk(n_bytes, lambda: run_stage(SCRIPT, *flags))
    run_stage(SCRIPT, *flags)
    assert all_bytes(tmp_path) == all_bytes(tries)


def test_processes_and_little_memory_leave_the_same_bytes(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "stage_2", gpt2_folder, [90, 40, 1, 60] * 30, n_ids=30)
    for name, max_workers in (("one", 1), ("two", 2)):
        # Many batches and units, of which the second run's are smaller than some tries.
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(chunk_lists, "BATCH_TOKENS", 10**6 if name == "one" else 500)
        monkeypatch.setattr(token_trie, "LEAST_UNIT_BYTES", 2**20 if name == "one" else 2000)
        monkeypatch.setattr(token_trie, "UNIT_BYTES", 2**20 if name == "one" else 2000)
        run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path / name, max_workers=max_workers, max_memory_gb=2))
    assert rows_on_disk(tmp_path / "one" / FOLDER) == expected_rows(corpus)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_what_a_killed_run_spilled_is_deleted(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    (tmp_path / FOLDER / ".rows").mkdir(parents=True)
    (tmp_path / FOLDER / ".rows/0.rows").write_bytes(b"half a fi")
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path))
    assert all_bytes(tmp_path) == all_bytes(tries)


def test_a_token_that_looks_like_the_space_between_rows_is_one_token(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    one = write_corpus(tmp_path / "stage_2", gpt2_folder, [5], n_ids=9)
    texts = ["a", "], [", '", 0.5, 0, 2, 3], ["', "🙂\n", "e"]
    write_token_probs(one.output_dir / "train", 0, one.ids[0], np.array([0, 0.9, 0.9, 0.9, 0.1]), texts)
    run_stage(SCRIPT, *one.stage_3_flags(tmp_path / "tries", skip_first_tokens=0))
    window = read_json(token_probs_path(one.output_dir / "train", 0))
    assert read_json(tmp_path / "tries/org_large_toy_train_all_filtered_tok_probs_0.5.json") == [window[:4]]


def test_datastores_of_one_text_share_its_lists(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    shutil.copytree(tries, tmp_path / "tries")
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries", model_gen="other"))
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries", tok_prob_threshold=0.2))
    before, after = all_bytes(tries), all_bytes(tmp_path / "tries")
    # The lists of the other γ have joined those that are listed.
    joined = {name for name in before if name.startswith("org_large_toy_train_") and before[name] != after[name]}
    assert joined == {"org_large_toy_train_manifest.json", "org_large_toy_train_checksums.txt"}
    assert {name: after[name] for name in before.keys() - joined} == {
        name: before[name] for name in before.keys() - joined
    }


# ---- Stage 3: what it refuses


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def token_probs(c: Corpus, window: int = 0) -> Path:
    return token_probs_path(c.output_dir / "train", window)


def swap_windows(c: Corpus) -> None:
    ids, probabilities = c.ids[3][::-1], c.probabilities[3]
    write_token_probs(c.output_dir / "train", 3, ids, probabilities, ["x"] * len(ids))


def set_value(path: Path, row: int, column: int, value: object) -> None:
    rows = json.loads(path.read_text())
    rows[row][column] = value
    path.write_text(json.dumps(rows))


REFUSED_INPUTS: dict[str, tuple[Callable[[Corpus], object], dict[str, object], str]] = {
    "folder missing": (lambda c: None, {"token_prob_dir": "nowhere"}, "nowhere: does not exist"),
    "file for folder": (lambda c: None, {"token_prob_dir": __file__}, "is not a folder"),
    "no manifest": (lambda c: (c.output_dir / "train_manifest.json").unlink(), {}, "train_manifest.json beside it"),
    "other partition": (lambda c: None, {"partition": "test"}, "folder of the partition test"),
    "stage 2 did not end": (
        lambda c: rewrite(c.output_dir / "train_manifest.json", lambda text: text.replace("true", "false")),
        {},
        "did not end",
    ),
    "manifest without counts": (
        lambda c: rewrite(c.output_dir / "train_manifest.json", lambda text: text.replace("n_windows", "n")),
        {},
        "no whole manifest",
    ),
    "window missing": (lambda c: token_probs(c, 3).unlink(), {}, r"token_probs_3\.json is missing, 1 of 8"),
    "folder of windows missing": (lambda c: shutil.rmtree(c.output_dir / "train"), {}, "does not exist"),
    "truncated": (lambda c: rewrite(token_probs(c), lambda text: text[:-9]), {}, r"token_probs_0\.json.*not whole"),
    "not UTF-8": (lambda c: token_probs(c).write_bytes(b'["\xff"]'), {}, "not UTF-8"),
    "UTF-16": (lambda c: token_probs(c).write_bytes("[]".encode("utf-16")), {}, "not UTF-8"),
    "no list": (lambda c: token_probs(c).write_text("{}"), {}, "is no list of"),
    "empty list": (lambda c: token_probs(c).write_text("[]"), {}, "is no list of"),
    "another window's": (lambda c: shutil.copy(token_probs(c, 6), token_probs(c, 7)), {}, "is no list of"),
    "probability above 1": (lambda c: set_value(token_probs(c), 3, 1, 1.5), {}, "probability in"),
    "probability NaN": (lambda c: set_value(token_probs(c), 3, 1, float("nan")), {}, "probability in"),
    "id is text": (lambda c: set_value(token_probs(c), 3, 4, "7"), {}, "is no list of"),
    "id is a fraction": (lambda c: set_value(token_probs(c), 3, 4, 2.5), {}, "is no list of"),
    "id is a path": (lambda c: set_value(token_probs(c), 3, 4, "../../7"), {}, "is no list of"),
    "id below 0": (lambda c: set_value(token_probs(c), 3, 4, -1), {}, "is no list of"),
    "id beyond the tokenizer": (lambda c: set_value(token_probs(c), 3, 4, 320), {}, "token id 320, .* end at 319"),
    "windows of another text": (swap_windows, {}, "its windows are not those"),
    "γ of 1": (lambda c: None, {"tok_prob_threshold": 1}, "--tok_prob_threshold: got '1'"),
    "γ below 0": (lambda c: None, {"tok_prob_threshold": -0.1}, "--tok_prob_threshold: got '-0.1'"),
    "γ NaN": (lambda c: None, {"tok_prob_threshold": "nan"}, "--tok_prob_threshold: got 'nan'"),
    "bound below 0": (lambda c: None, {"max_chunk_length": -1}, "--max_chunk_length: got '-1'"),
    "skip below 0": (lambda c: None, {"skip_first_tokens": -1}, "--skip_first_tokens: got '-1'"),
    "memory of nothing": (lambda c: None, {"max_memory_gb": 0}, "--max_memory_gb: got '0'"),
    "memory too little": (
        lambda c: None,
        {"max_memory_gb": 0.1, "max_workers": 1},
        "0.1: 1 processes need 0.65 of them",
    ),
    "tokenizer missing": (lambda c: None, {"model_name": "./nowhere"}, "nowhere: does not exist"),
    "output is a file": (lambda c: None, {"output_dir": __file__}, "cannot be made a folder"),
}


@pytest.mark.parametrize("row", REFUSED_INPUTS)
def test_stage_3_refuses_unusable_input(corpus: Corpus, tmp_path: Path, refusal: Callable[..., str], row: str) -> None:
    damage, flags, message = REFUSED_INPUTS[row]
    shutil.copytree(corpus.output_dir, tmp_path / "stage_2")
    damaged = Corpus(tmp_path / "stage_2", corpus.model, corpus.ids, corpus.probabilities, corpus.hidden_states)
    damage(damaged)
    said = refusal(SCRIPT, *damaged.stage_3_flags(tmp_path / "tries", **flags))
    assert re.search(message, said), said


def test_stage_3_refuses_another_tokenizer(
    corpus: Corpus, llama_folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    said = refusal(SCRIPT, *corpus.stage_3_flags(tmp_path, model_name=llama_folder))
    assert "its tokenizer is not the one" in said
    assert not list(tmp_path.iterdir())


def test_stage_3_refuses_what_lies_there_from_other_input(
    corpus: Corpus, tries: Path, gpt2_folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    shutil.copytree(tries, tmp_path / "tries")
    said = refusal(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries", max_chunk_length=3))
    assert "--max_chunk_length 64, this run has 3" in said
    other = write_corpus(tmp_path / "stage_2", gpt2_folder, LENGTHS, n_ids=4, seed=1)
    assert "windows fingerprint" in refusal(SCRIPT, *other.stage_3_flags(tmp_path / "tries"))
    # Another γ is another folder, but the list of all windows is the same file.
    said = refusal(SCRIPT, *other.stage_3_flags(tmp_path / "tries", tok_prob_threshold=0.2))
    assert "windows fingerprint" in said
    assert "--model_ds" in refusal(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries", model_ds="org_large"))
    shutil.rmtree(tmp_path / "tries" / FOLDER.replace("0.5", "0.2"))
    assert all_bytes(tmp_path / "tries") == all_bytes(tries)


@pytest.mark.parametrize("name", [f"{FOLDER}/manifest.json", "org_large_toy_train_manifest.json"])
def test_stage_3_refuses_files_that_no_manifest_speaks_for(
    corpus: Corpus, tries: Path, tmp_path: Path, refusal: Callable[..., str], name: str
) -> None:
    shutil.copytree(tries, tmp_path / "tries")
    (tmp_path / "tries" / name).unlink()
    assert "of unknown origin" in refusal(SCRIPT, *corpus.stage_3_flags(tmp_path / "tries"))


def test_stage_3_refuses_a_second_run_at_once(corpus: Corpus, tmp_path: Path, refusal: Callable[..., str]) -> None:
    with exclusive_lock(tmp_path, "token_tries"):
        assert "another run is writing" in refusal(SCRIPT, *corpus.stage_3_flags(tmp_path))


# ---- Finding the folder


def find(directory: Path, any_partition: bool = False, **others: object) -> Path:
    wanted = {**LABELS, "tok_prob_threshold": 0.5, **others}
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
def test_no_trie_folder_of_another_label_is_taken(tries: Path, label: str, value: object) -> None:
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


# ---- The files


def write(folder: Path, *parts: ChunkRows, unit_bytes: int = 2**20) -> int:
    """Write the tries of some windows' rows; returns how many."""
    with temporary_folder(folder / ".rows") as spill_folder:
        rows = SortRuns(Keys(int(max(part.token_ids.max() for part in parts)) + 1))
        for number, part in enumerate(parts):
            rows.add(spill(spill_folder / f"{number}.rows", part, rows.keys))
        return sum(len(written) for written in write_tries(folder, spill_folder, rows, unit_bytes=unit_bytes)) // 2


def three_rows(folder: Path) -> TrieRows:
    """Write the trie of entry token 7: 7 -> 5, 7 -> 6 and 7 -> 5 6, in two windows."""
    ids = np.array([7, 5, 6, 7, 6], dtype=np.int32)
    above = np.array([0, 1, 1, 0, 1])
    rows = find_chunks(ids, above, np.array([3, 2]), tok_prob_threshold=0.5, skip_first_tokens=0)
    assert write(folder, rows) == 2
    return read_trie_rows(folder, 7)


def write_vectors(folder: Path, rows: TrieRows, vectors: np.ndarray, n_block: int = 100) -> None:
    vector_type = (vectors.shape[1], vectors.dtype)
    write_context_vectors(folder, rows.entry_token_id, rows.depths, vector_type, lambda a, b: vectors[a:b], n_block)


@pytest.mark.parametrize("n_block", [3, 1000])
@pytest.mark.parametrize(
    ("n_rows", "hidden_size"),
    [([1], 8), ([8, 64, 2, 8, 1, 4], 8), ([64, 8, 64, 32, 16, 2, 32, 1], 4)],
    ids=["one depth", "HDF5 puts the second depth behind the third", "and another"],
)
def test_what_is_told_of_written_vectors_is_what_a_reader_finds(
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


def test_a_trie_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rows = three_rows(tmp_path)
    assert read_json(tmp_path / "7.json") == {"2": [[7, 6]], "3": [[7, 5, 6]]}
    assert read_json(tmp_path / "tok_pos_7.json") == {"2": [[1, 0]], "3": [[0, 0]]}
    assert rows.chunk_ids.tolist() == [6, 5, 6]
    assert rows.chunk_ids.dtype == np.int32
    assert rows.chunk_offsets.tolist() == [0, 1, 3]
    assert rows.windows.tolist() == [1, 0]
    assert rows.positions.tolist() == [0, 0]
    assert rows.depths == {2: 1, 3: 1}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_context_vectors_read_back_row_for_row(tmp_path: Path, dtype: type) -> None:
    rows = three_rows(tmp_path)
    assert entry_tokens_with_vectors(tmp_path) == []
    vectors = np.arange(10).reshape(2, 5).astype(dtype)
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


def test_a_huge_trie_is_written_in_blocks_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids, above = rng.integers(0, 2, 300, dtype=np.int32), rng.random(300)
    rows = find_chunks(ids, above, np.array([100] * 3), tok_prob_threshold=0.4, skip_first_tokens=0)
    for name in ("whole", "blocks"):
        folder = tmp_path / name
        folder.mkdir()
        n_ids, n_rows = (token_trie.BLOCK_IDS, 1000) if name == "whole" else (7, 3)
        monkeypatch.setattr(token_trie, "BLOCK_IDS", n_ids)
        assert write(folder, rows, unit_bytes=2**30 if name == "whole" else 200) == 2
        for token in entry_token_ids(folder):
            trie = read_trie_rows(folder, token)
            vectors = np.random.default_rng(token).random((len(trie.windows), 4)).astype(np.float32)
            write_vectors(folder, trie, vectors, n_rows)
    assert max(len(read_trie_rows(folder, token).windows) for token in (0, 1)) > 50
    assert all_bytes(tmp_path / "whole") == all_bytes(tmp_path / "blocks")


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


def test_large_files_read_as_small_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids, above = rng.integers(0, 2, 300, dtype=np.int32) * 1000, rng.random(300)
    write(tmp_path, find_chunks(ids, above, np.array([100] * 3), tok_prob_threshold=0.4, skip_first_tokens=0))
    read = {}
    for n_bytes in (10**9, 0):
        monkeypatch.setattr(token_trie, "LARGE_JSON_BYTES", n_bytes)
        read[n_bytes] = [read_trie_rows(tmp_path, token) for token in (0, 1000)]
    assert token_trie._parse_own_json((tmp_path / "0.json").read_bytes(), None)
    for one, other in zip(*read.values(), strict=True):
        for name in ("chunk_ids", "chunk_offsets", "windows", "positions"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist()


DAMAGED_TRIES: dict[str, tuple[str, str, str]] = {
    "cut off": ("7.json", '{"2": [[7, 6]], ', r"7\.json: is not whole JSON"),
    "no map": ("7.json", "[1]", r"7\.json: is no map of depths"),
    "empty": ("7.json", "{}", "is no map of depths"),
    "no rows": ("7.json", '{"2": [], "3": [[7, 5, 6]]}', "is no map of depths"),
    "ragged": ("7.json", '{"2": [[7, 6], [7]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "wrong depth": ("7.json", '{"2": [[7, 6, 5]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "depth 1": ("7.json", '{"1": [[7]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "depths out of order": ("7.json", '{"3": [[7, 5, 6]], "2": [[7, 6]]}', "is no map of depths"),
    "texts": ("7.json", '{"2": [["a", "b"]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "fractions": ("7.json", '{"2": [[7, 6.5]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "negative": ("7.json", '{"2": [[7, -6]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "huge": ("7.json", '{"2": [[7, 36893488147419103232]], "3": [[7, 5, 6]]}', "is no map of depths"),
    "other entry": ("7.json", '{"2": [[8, 6]], "3": [[7, 5, 6]]}', "rows of another entry token"),
    "more rows": ("7.json", '{"2": [[7, 6], [7, 6]], "3": [[7, 5, 6]]}', r"other rows than tok_pos_7\.json"),
    "positions cut off": ("tok_pos_7.json", '{"2": [[1, 0', r"tok_pos_7\.json: is not whole"),
    "own form, ragged": ("7.json", '{\n"2": [[7, 6], [7]],\n"3": [[7, 5, 6]]\n}\n', "is no map of depths"),
    "own form, no number": ("tok_pos_7.json", '{\n"2": [[1, ]],\n"3": [[0, 0]]\n}\n', "is not whole JSON"),
    "own form, huge": ("7.json", '{\n"2": [[7, 36893488147419103232]],\n"3": [[7, 5, 6]]\n}\n', "is no map of depths"),
    "own form, columns": ("tok_pos_7.json", '{\n"2": [[1], [0]],\n"3": [[0, 0]]\n}\n', "rows of 2 numbers"),
    "triples": ("tok_pos_7.json", '{"2": [[1, 0, 0]], "3": [[0, 0, 0]]}', "rows of 2 numbers"),
}


@pytest.mark.parametrize("large_json_bytes", [0, 10**9])
@pytest.mark.parametrize("row", DAMAGED_TRIES)
def test_a_damaged_trie_is_refused_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, large_json_bytes: int
) -> None:
    monkeypatch.setattr(token_trie, "LARGE_JSON_BYTES", large_json_bytes)
    three_rows(tmp_path)
    name, text, message = DAMAGED_TRIES[row]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_trie_rows(tmp_path, 7)


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
    "empty": (lambda path: path.write_bytes(b""), "is cut off or no .h5"),
    "no HDF5": (lambda path: path.write_bytes(b"hidden states"), "is cut off or no .h5"),
    "no group": (other_vectors({"2": ONE, "3": ONE}, "states"), "is cut off or no .h5"),
    "no depth": (other_vectors({"2": ONE, "three": ONE}), "is cut off or no .h5"),
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


@pytest.mark.parametrize("value", [{}, ["7"], [True], [-1], [1.5], [2**31], None])
def test_a_list_of_anything_but_token_ids_is_refused(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "list.json", value)
    with pytest.raises(InputError, match="is no list of token ids"):
        read_token_id_list(tmp_path / "list.json")


def test_a_token_probs_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    texts = ["a\n", "🙂", '"]']
    ids, probabilities = np.array([5, 7, 2]), np.array([0, 0.1, 1.0])
    write_token_probs(tmp_path, 4, ids, probabilities, texts)
    read = read_token_probs(tmp_path, 4)
    assert read[0] == texts
    assert read[1].tolist() == ids.tolist()
    assert read[2].tolist() == probabilities.tolist()
