"""The chunks of a whole corpus and the three lists of them: all windows, all plateaus, in any number of processes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from synthetic_corpus import LENGTHS, Corpus, all_bytes, expected_rows, make_tries, write_corpus

from utils.datastore import chunk_lists
from utils.datastore.chunk_lists import ChunkListPaths, ChunkRule, CorpusChunks, find_all_chunks
from utils.datastore.external_sort import cut_evenly, read_sorted
from utils.extraction.token_probs import token_probs_path, write_token_probs
from utils.files import InputError, make_folder, replacing
from utils.json_io import read_json

N_IDS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stage_2", gpt2_folder, LENGTHS, n_ids=N_IDS)


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """The --output_dir of a stage 3 that ended. Not to be written to."""
    return make_tries(corpus, tmp_path_factory.mktemp("tries"))


def paths_in(folder: Path, threshold: float = 0.5) -> ChunkListPaths:
    return ChunkListPaths(folder, "toy", "org/large", "train", threshold)


def find(corpus: Corpus, folder: Path, max_workers: int = 1, fingerprint: str | None = None) -> CorpusChunks:
    extracted = dict(read_json(corpus.output_dir / "train_manifest.json")["results"])
    extracted["windows_fingerprint"] = fingerprint or extracted["windows_fingerprint"]
    found = chunk_lists.Corpus(corpus.output_dir / "train", extracted, N_IDS)
    runs_folder = make_folder(folder / "runs")
    return find_all_chunks(found, ChunkRule(0.5, 2, 64), paths_in(folder), runs_folder, max_workers)


# ---- The lists


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


def test_a_token_that_looks_like_the_space_between_rows_is_one_token(gpt2_folder: Path, tmp_path: Path) -> None:
    one = write_corpus(tmp_path / "stage_2", gpt2_folder, [5], n_ids=9)
    texts = ["a", "], [", '", 0.5, 0, 2, 3], ["', "🙂\n", "e"]
    write_token_probs(one.output_dir / "train", 0, one.ids[0], np.array([0, 0.9, 0.9, 0.9, 0.1]), texts)
    make_tries(one, tmp_path / "tries", skip_first_tokens=0)
    window = read_json(token_probs_path(one.output_dir / "train", 0))
    assert read_json(tmp_path / "tries/org_large_toy_train_all_filtered_tok_probs_0.5.json") == [window[:4]]


def test_a_list_that_is_there_stays_and_the_others_are_made(corpus: Corpus, tries: Path, tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    for kept in paths.lists:
        kept.write_text("kept")
        find(corpus, tmp_path)
        assert kept.read_text() == "kept"
        for path in set(paths.lists) - {kept}:
            assert path.read_bytes() == (tries / path.name).read_bytes()
            path.unlink()
        kept.unlink()


def test_lists_of_every_threshold_are_known_by_name(tries: Path, tmp_path: Path) -> None:
    assert {path.name for path in paths_in(tries).files} == {path.name for path in paths_in(tries).lists}
    for name in (*paths_in(tmp_path, 0.2).lists, *paths_in(tmp_path).lists):
        name.touch()
    (tmp_path / "org_large_other_train_all_phrases_0.5.json").touch()
    assert len(paths_in(tmp_path).files) == 5  # the windows are the same for both


def test_lists_without_a_manifest_are_of_unknown_origin(tmp_path: Path) -> None:
    paths = paths_in(tmp_path)
    paths.refuse_files_without_manifest()
    paths.all_phrases.touch()
    paths_in(tmp_path, 0.9).refuse_files_without_manifest()
    with pytest.raises(InputError, match=r"all_phrases_0\.5\.json: is of unknown origin \(no org_large_toy_train_man"):
        paths.refuse_files_without_manifest()
    paths.manifest.touch()
    paths.refuse_files_without_manifest()


@pytest.mark.parametrize(("letter", "n_bytes"), [("x", 1), ("é", 2), ("東", 3)])
def test_labels_that_make_too_long_a_file_name_are_refused_before_anything_is_made(
    letter: str, n_bytes: int, tmp_path: Path
) -> None:
    rest = len("m__train_all_filtered_tok_probs_0.5.json")  # the longest of the three
    fits = (chunk_lists.LONGEST_NAME - rest) // n_bytes
    for n in (fits, fits + 1):
        paths = ChunkListPaths(tmp_path, letter * n, "m", "train", 0.5)
        if n == fits:
            paths.require_names_fit()
            for path in paths.lists:
                with replacing(path) as temporary:
                    temporary.touch()
        else:
            got = f"make a file name of {rest + n * n_bytes} bytes, expected at most {chunk_lists.LONGEST_NAME}"
            with pytest.raises(InputError, match=f"{got}; give a shorter --dataset_name, --model_ds or --partition"):
                paths.require_names_fit()


# ---- The chunks


@pytest.mark.parametrize("max_workers", [1, 2])
@pytest.mark.parametrize("batch_tokens", [1, 25, 10**6])
def test_batches_and_processes_change_neither_lists_nor_rows(
    corpus: Corpus, tries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_workers: int, batch_tokens: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(chunk_lists, "BATCH_TOKENS", batch_tokens)
    found = find(corpus, tmp_path, max_workers)
    assert (found.n_windows, found.n_tokens) == (len(LENGTHS), sum(LENGTHS))
    assert found.n_plateaus == len(read_json(paths_in(tries).all_phrases))
    assert found.runs.n_rows == len(expected_rows(corpus))
    for path in paths_in(tmp_path).lists:
        assert path.read_bytes() == (tries / path.name).read_bytes()
    entries = []
    for unit in sorted(found.runs.units(10**6)):
        for part in cut_evenly(found.runs.files, unit):
            entries += found.runs.keys.entry_ids(read_sorted(found.runs.files, part).keys).tolist()
    assert entries == [row[0] for row in expected_rows(corpus)]


def test_windows_of_another_fingerprint_leave_no_list(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its windows are not those that its manifest was written for"):
        find(corpus, tmp_path, fingerprint="0" * 64)
    assert not [name for name in all_bytes(tmp_path) if name.endswith(".json")]
