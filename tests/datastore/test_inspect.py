"""The inspector: its figures against loops over the same rows, its tree against the chunks it was made of, its views."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from synthetic_corpus import Corpus, all_bytes, expected_rows, write_corpus

from utils.datastore import inspect as inspector
from utils.datastore.inspect import (
    Branch,
    find_datastore,
    heaviest,
    prefix_tree,
    proposals_in,
    read_chunks,
    sample_neighbors,
    survey,
    weighted_quantiles,
)
from utils.files import InputError
from utils.lm.model import load_lm

N_IDS = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder, gpt2_folder, [12, 12, 9, 12], N_IDS, hidden_size=32)


@pytest.fixture(scope="module")
def tries(corpus: Corpus) -> Path:
    """The --output_dir of stage 3, with the context vectors of stage 4."""
    import make_token_trie
    import save_token_trie_info

    into = corpus.output_dir / "tries"
    save_token_trie_info.main([str(flag) for flag in corpus.stage_3_flags(into)])
    make_token_trie.main([str(flag) for flag in corpus.stage_4_flags(into)])
    return into


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the inspector in this process; returns what it prints."""

    def run(*flags: object) -> str:
        inspector.main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return run


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    try:
        inspector.main([str(flag) for flag in flags])
    except InputError as error:
        return str(error)
    except SystemExit as stop:
        assert stop.code == 2  # noqa: PT017
        return capsys.readouterr().err
    raise AssertionError(f"{flags} were not refused")


# ---- Figures


def test_survey_counts_what_loops_over_the_corpus_count(corpus: Corpus, tries: Path) -> None:
    rows, found = expected_rows(corpus), survey(find_datastore(tries))
    by_token = Counter(entry for entry, *_ in rows)
    assert dict(zip(found.entry_token_ids.tolist(), found.rows.tolist(), strict=True)) == by_token
    by_length = Counter(len(chunk) for _, chunk, *_ in rows)
    assert dict(zip(found.chunk_lengths.tolist(), found.chunks_of_length.tolist(), strict=True)) == by_length
    files = [path for path in find_datastore(tries).rglob("*") if path.is_file()]
    assert sum(found.n_bytes.values()) == sum(path.stat().st_size for path in files)
    assert [by_token[found.entry_token_ids[i]] for i in found.largest] == sorted(by_token.values(), reverse=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_weighted_quantiles_are_those_of_the_values_written_out(values: list[int]) -> None:
    counts = Counter(values)
    kept = np.array(sorted(counts))
    found = weighted_quantiles(kept, np.array([counts[value] for value in kept.tolist()]))
    expected = np.quantile(values, [0.0, 0.25, 0.5, 0.75, 0.95, 1.0], method="inverted_cdf")
    assert found == expected.tolist()


def test_neighbors_are_those_that_comparing_all_pairs_finds(corpus: Corpus, tries: Path) -> None:
    folder = find_datastore(tries)
    found = sample_neighbors(folder, survey(folder), n_sampled=10**6)
    rows = expected_rows(corpus)
    expected = []
    for n, (entry, chunk, window, position) in enumerate(rows):
        vector = corpus.hidden_state(window, position).astype(np.float64)
        others = []
        for m, (other_entry, other_chunk, *place) in enumerate(rows):
            if other_entry == entry and m != n:
                other = corpus.hidden_state(*place).astype(np.float64)
                cosine = vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)
                fits = all(a == b for a, b in zip(chunk, other_chunk, strict=False))
                others.append((cosine, chunk[0] == other_chunk[0], fits))
        if others:
            expected.append(max(others))
    assert found.n_drawn == len(rows)
    got = sorted(zip(found.similarities.tolist(), found.begins_alike.tolist(), found.fits.tolist(), strict=True))
    for (similarity, *flags), (cosine, *expected_flags) in zip(got, sorted(expected), strict=True):
        assert similarity == pytest.approx(cosine, abs=1e-6)
        assert flags == expected_flags
    groups = list(found.groups())
    assert sum(n for _, _, n, *_ in groups) == len(expected)
    assert [lowest for lowest, *_ in groups] == sorted(lowest for lowest, *_ in groups)


def test_fewer_chunks_are_drawn_where_fewer_are_asked_for(tries: Path) -> None:
    folder = find_datastore(tries)
    overview = survey(folder)
    assert sample_neighbors(folder, overview, 5).n_drawn == 5
    first, again = (sample_neighbors(folder, overview, 5).similarities for _ in range(2))
    assert np.array_equal(first, again)


def test_proposals_are_the_most_similar_rows_and_count_what_follows(
    corpus: Corpus, tries: Path, gpt2_folder: Path
) -> None:
    lm, folder = load_lm(str(gpt2_folder)), find_datastore(tries)
    token_ids = [*range(N_IDS), 300, *corpus.ids[0].tolist()]
    with torch.inference_mode():
        states = lm.forward(torch.tensor([token_ids]))[0][0].double().numpy()
    by_token: dict[int, list[tuple[list[int], np.ndarray]]] = {}
    for entry, chunk, window, position in expected_rows(corpus):
        by_token.setdefault(entry, []).append((list(chunk), corpus.hidden_state(window, position).astype(np.float64)))
    for proposal, state in zip(proposals_in(folder, lm, token_ids), states, strict=True):
        there = by_token.get(proposal.entry_token_id, [])
        if not there:
            assert math.isnan(proposal.similarity)
            assert (proposal.chunk_ids, proposal.n_right, proposal.n_known) == ([], 0, 0)
            continue
        cosines = [vector @ state / np.linalg.norm(vector) / np.linalg.norm(state) for _, vector in there]
        assert proposal.similarity == pytest.approx(max(cosines), abs=1e-6)
        assert proposal.chunk_ids == there[int(np.argmax(cosines))][0]
        following = token_ids[proposal.position + 1 :][: len(proposal.chunk_ids)]
        assert proposal.n_known == len(following)
        assert proposal.chunk_ids[: proposal.n_right] == following[: proposal.n_right]
        assert proposal.n_right == proposal.n_known or (
            proposal.chunk_ids[proposal.n_right] != following[proposal.n_right]
        )


def test_text_longer_than_the_model_reads_is_refused(tries: Path, gpt2_folder: Path) -> None:
    with pytest.raises(InputError, match=r"is 129 tokens, .* reads 128 at most"):
        proposals_in(find_datastore(tries), load_lm(str(gpt2_folder)), [1] * 129)


# ---- The tree


def chunks_of(branches: list[Branch], before: tuple[int, ...] = ()) -> list[list[int]]:
    found = []
    for branch in branches:
        path = (*before, *branch.token_ids)
        found += [list(path)] * branch.n_ending + chunks_of(branch.branches, path)
    return found


CHUNKS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30)


@given(CHUNKS, st.integers(1, 12))
def test_tree_holds_exactly_the_chunks_it_was_made_of(chunks: list[list[int]], n_branches: int) -> None:
    tree = prefix_tree(sorted(chunks))
    assert sorted(chunks_of(tree)) == sorted(chunks)
    everything: dict[int, tuple[Branch, Branch | None]] = {}
    stack: list[tuple[Branch, Branch | None]] = [(branch, None) for branch in tree]
    while stack:
        branch, parent = stack.pop()
        assert branch.n_rows == branch.n_ending + sum(child.n_rows for child in branch.branches)
        assert branch.n_ending or len(branch.branches) > 1, "a branch goes on as long as it can"
        counts = [child.n_rows for child in branch.branches]
        assert counts == sorted(counts, reverse=True)
        everything[id(branch)] = (branch, parent)
        stack += [(child, branch) for child in branch.branches]
    kept = heaviest(tree, n_branches)
    assert len(kept) == min(n_branches, len(everything))
    for branch, parent in everything.values():
        if id(branch) in kept and parent is not None:
            assert id(parent) in kept


def test_chunks_of_an_entry_token_come_prefix_sorted(corpus: Corpus, tries: Path) -> None:
    rows = expected_rows(corpus)
    entry = rows[0][0]
    assert read_chunks(find_datastore(tries), entry, "") == sorted(list(chunk) for e, chunk, *_ in rows if e == entry)


# ---- What is printed


def test_overview_says_sizes_and_writes_nothing(corpus: Corpus, tries: Path, inspect: Callable[..., str]) -> None:
    before = all_bytes(tries)
    shown = inspect(tries, "--sample", 20)
    rows = expected_rows(corpus)
    assert f"{len(rows)} chunks of" in shown
    assert "hidden states of small, 32 numbers in float32" in shown
    assert "for 20 chunks drawn at random" in shown
    token, n = Counter(entry for entry, *_ in rows).most_common(1)[0]
    largest = next(line.split() for line in shown.splitlines() if line.startswith(f"{token} "))
    assert largest[:3] == [str(token), str(token), str(n)]
    assert all_bytes(tries) == before


def test_the_documented_command_starts_the_inspector_and_no_torch(tries: Path) -> None:
    code = "import runpy, sys; runpy.run_module('utils.inspect_datastore', run_name='__main__')"
    code += "; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tries), "--sample", "0"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(str(find_datastore(tries)))
    assert "largest tries" in shown.stdout


def test_token_is_found_by_its_text_and_shown_with_it(
    corpus: Corpus, tries: Path, gpt2_folder: Path, inspect: Callable[..., str]
) -> None:
    from utils.lm.model import load_tokenizer

    tokenizer = load_tokenizer(str(gpt2_folder))
    entry = expected_rows(corpus)[0][0]
    text = tokenizer.decode([entry])
    by_text = inspect(tries, "--token", text, "--model_path", gpt2_folder)
    n_rows = sum(e == entry for e, *_ in expected_rows(corpus))
    assert f'"{text}" ({entry}): {n_rows} chunks' in by_text
    by_id = inspect(tries, "--token_id", entry, "--branches", 1)
    assert f"token id {entry}: {n_rows} chunks" in by_id
    assert len(by_id.splitlines()) <= 5
    assert "other way" in by_id


def test_tries_without_context_vectors_are_shown_as_far_as_they_are(
    corpus: Corpus, tmp_path: Path, run_stage: Callable[..., None], inspect: Callable[..., str]
) -> None:
    run_stage("save_token_trie_info.py", *corpus.stage_3_flags(tmp_path))
    assert "run make_token_trie.py" in inspect(tmp_path)


def test_empty_datastore_says_so(
    corpus: Corpus, tmp_path: Path, run_stage: Callable[..., None], inspect: Callable[..., str]
) -> None:
    run_stage("save_token_trie_info.py", *corpus.stage_3_flags(tmp_path, tok_prob_threshold=0.99))
    assert "It is empty" in inspect(tmp_path)


def test_unusable_input_is_refused_in_one_sentence(
    corpus: Corpus, tries: Path, tmp_path: Path, gpt2_folder: Path, llama_folder: Path, run_stage: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert "does not exist" in refused(capsys, tmp_path / "none")
    assert "holds no datastore" in refused(capsys, tmp_path)
    for threshold in (0.3, 0.5):
        run_stage("save_token_trie_info.py", *corpus.stage_3_flags(tmp_path, tok_prob_threshold=threshold))
    assert "holds 2 datastores" in refused(capsys, tmp_path)
    assert "no chunk follows token id 319" in refused(capsys, tries, "--token_id", 319)
    several = refused(capsys, tries, "--token", "zq", "--model_path", gpt2_folder)
    assert "is 2 tokens for" in several
    assert '"z" (' in several
    assert "--token needs --model_path" in refused(capsys, tries, "--token", "a")
    assert "--text needs --model_path" in refused(capsys, tries, "--text", "a")
    assert "--text is empty" in refused(capsys, tries, "--text", "")
    assert "another tokenizer" in refused(capsys, tries, "--model_path", llama_folder)
    assert "those of another model" in refused(capsys, tries, "--text", "the cat", "--model_path", gpt2_folder)


def test_hostile_tokens_cannot_command_the_terminal(gpt2_folder: Path) -> None:
    from utils.lm.model import load_tokenizer

    shown = inspector.quoted_by(load_tokenizer(str(gpt2_folder)))
    ids = load_tokenizer(str(gpt2_folder)).encode("\x1b[31m\x9b5m\n", add_special_tokens=False)
    assert not set(shown(ids)) & {"\x1b", "\x9b", "\n"}


def test_text_view_names_every_token(
    tmp_path: Path, gpt2_folder: Path, run_stage: Callable[..., None], inspect: Callable[..., str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, the dog sat on the log. " * 12)
    run_stage("preprocess_dataset.py", "--dataset", "local", "--input_files", text, "--output_dir", tmp_path / "data",
              "--validation_fraction", 0, "--test_fraction", 0)  # fmt: skip
    run_stage("extract_token_probs_and_memmap.py", "--model_path", gpt2_folder, "--data_dir", tmp_path / "data",
              "--output_dir", tmp_path / "out", "--partition", "train", "--construct_memmap", "--chunk_size", 64,
              "--stride", 60)  # fmt: skip
    labels = ("--dataset_name", "d", "--model_ds", "m", "--model_gen", "m", "--partition", "train")
    run_stage("save_token_trie_info.py", "--token_prob_dir", tmp_path / "out/train", "--output_dir", tmp_path / "tries",
              "--model_name", gpt2_folder, *labels, "--tok_prob_threshold", 0)  # fmt: skip
    run_stage("make_token_trie.py", "--save_dir", tmp_path / "tries", *labels, "--tok_prob_threshold", 0,
              "--idx_to_seqlen_path", tmp_path / "out/train_index_to_seqlen.json",
              "--index_to_acc_index_path", tmp_path / "out/train_index_to_acc_index.json",
              "--all_hidden_states_path", tmp_path / "out/train.h5")  # fmt: skip
    inspect(tmp_path / "tries")
    shown = inspect(tmp_path / "tries", "--text", "the cat sat on the", "--model_path", gpt2_folder)
    lines = shown.splitlines()
    assert lines[1].split("  ")[0] == ""
    assert [line.split()[0] for line in lines[2:-3]] == [str(n) for n in range(len(lines) - 5)]
    assert "at its end" in lines[-4]
    assert f"of {len(lines) - 5} tokens have a proposal" in lines[-2]
    assert lines[-1].startswith("first token: the probability")
