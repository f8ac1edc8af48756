"""Stage 3 through its command line: the datastore is the one that loops over every token give, or input is refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic_corpus import (
    LENGTHS,
    Corpus,
    all_bytes,
    expected_rows,
    make_tries,
    rows_on_disk,
    write_corpus,
    write_manifest,
)
from synthetic_corpus import TRIE_FOLDER as FOLDER

from benchmarks.faults.processes import killed_before_rename, on_full_disk
from utils.datastore.trie_files import entry_token_ids, find_trie_folder
from utils.extraction.token_probs import token_probs_path, write_token_probs
from utils.files import exclusive_lock
from utils.json_io import read_json

SCRIPT = "save_token_trie_info.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stage_2", gpt2_folder, LENGTHS, n_ids=4)


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """The --output_dir of a stage 3 that ended. Not to be written to."""
    return make_tries(corpus, tmp_path_factory.mktemp("tries"))


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


def test_runs_that_a_killed_run_left_are_deleted(
    corpus: Corpus, tries: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    (tmp_path / FOLDER / ".rows").mkdir(parents=True)
    (tmp_path / FOLDER / ".rows/0.rows").write_bytes(b"half a fi")
    run_stage(SCRIPT, *corpus.stage_3_flags(tmp_path))
    assert all_bytes(tmp_path) == all_bytes(tries)


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


# ---- What it refuses


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
        "is not a complete manifest",
    ),
    "window missing": (lambda c: token_probs(c, 3).unlink(), {}, r"token_probs_3\.json is missing, 1 of 8"),
    "folder of windows missing": (lambda c: shutil.rmtree(c.output_dir / "train"), {}, "does not exist"),
    "truncated": (
        lambda c: rewrite(token_probs(c), lambda text: text[:-9]),
        {},
        r"token_probs_0\.json.*not valid JSON",
    ),
    "not UTF-8": (lambda c: token_probs(c).write_bytes(b'["\xff"]'), {}, "not UTF-8"),
    "UTF-16": (lambda c: token_probs(c).write_bytes("[]".encode("utf-16")), {}, "not UTF-8"),
    "no list": (lambda c: token_probs(c).write_text("{}"), {}, "is not a list of"),
    "empty list": (lambda c: token_probs(c).write_text("[]"), {}, "is not a list of"),
    "another window's": (lambda c: shutil.copy(token_probs(c, 6), token_probs(c, 7)), {}, "is not a list of"),
    "probability above 1": (lambda c: set_value(token_probs(c), 3, 1, 1.5), {}, "probability in"),
    "probability NaN": (lambda c: set_value(token_probs(c), 3, 1, float("nan")), {}, "probability in"),
    "id is text": (lambda c: set_value(token_probs(c), 3, 4, "7"), {}, "is not a list of"),
    "id is a fraction": (lambda c: set_value(token_probs(c), 3, 4, 2.5), {}, "is not a list of"),
    "id is a path": (lambda c: set_value(token_probs(c), 3, 4, "../../7"), {}, "is not a list of"),
    "id below 0": (lambda c: set_value(token_probs(c), 3, 4, -1), {}, "is not a list of"),
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
