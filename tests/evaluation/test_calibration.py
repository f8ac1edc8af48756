"""θ and δ are chosen by what chunk mode saves and costs on a text, which naive loops give too."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import tiny_lm
from conftest import TEXTS
from decoding_cases import PROMPTS, datastore_near_text, generate, repeats, trie
from pipelines import Pipeline, build

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.retriever import Retriever
from utils.evaluation import calibration
from utils.evaluation.calibration import (
    CalibrationWindow,
    Candidates,
    choose,
    chunk_costs,
    find_candidates,
    windows_of_datastore,
)
from utils.lm.model import CausalLM


def naive_cost(lm: CausalLM, text: list[int], chunk: list[int], temperature: float) -> float:
    """Token by token, by a pass over all of the text before it."""
    cost = 0.0
    for ahead, token in enumerate(chunk):
        with torch.inference_mode():
            logits = lm.forward(torch.tensor([text + chunk[:ahead]]))[1][0, -1].double()
        p = logits.softmax(-1)
        drawn = (logits / temperature).softmax(-1) if temperature else torch.eye(len(p))[int(p.argmax())]
        cost += float(-p[token].log() + (drawn * p.log()).sum())
    return cost


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom"])
def test_the_cost_of_a_chunk_is_how_much_less_likely_it_is_than_what_is_drawn(name, temperature, monkeypatch):
    lm = tiny_lm(name)
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    ends = [1, 3, 3, 8, 5, 8]
    chunks = [[4], [9, 9, 2], [1, 2, 3, 4, 5], [7, 7], [3], [50, 60, 70]]
    wanted = [naive_cost(lm, text[:end], chunk, temperature) for end, chunk in zip(ends, chunks, strict=True)]
    assert chunk_costs(lm, text, ends, chunks, temperature) == pytest.approx(wanted, abs=1e-4)
    monkeypatch.setattr(calibration, "NODES_AT_ONCE", 4)
    assert chunk_costs(lm, text, ends, chunks, temperature) == pytest.approx(wanted, abs=1e-4)
    assert chunk_costs(lm, text, [], [], temperature) == []


def test_what_the_lm_draws_itself_costs_nothing_in_expectation():
    lm = tiny_lm("five tokens")
    text = [1, 2, 3]
    with torch.inference_mode():
        p = (lm.forward(torch.tensor([text]))[1][0, -1].double() / 0.7).softmax(-1).tolist()
    costs = chunk_costs(lm, text, [3] * 5, [[token] for token in range(5)], 0.7)
    assert sum(share * cost for share, cost in zip(p, costs, strict=True)) == pytest.approx(0.0, abs=1e-5)


def naive_candidate(lm: CausalLM, store: Datastore, window: list[int], at: int, least: float, left_out: set[int]):
    """The nearest row that may propose: its similarity and its chunk, cut at the window's end; None: there is none."""
    found = store.trie(window[at])
    if found is None:
        return None
    with torch.inference_mode():
        hidden_states, logits = lm.forward(torch.tensor([window[: at + 1]]))
    query, p = hidden_states[0, -1].double(), logits[0, -1].double().softmax(-1)
    best = None
    for row in range(len(found.windows)):
        chunk = found.chunk(row)
        if int(found.windows[row]) in left_out or p[chunk[0]] < least * p.max() * (1 - 1e-6):
            continue
        similarity = float(found.context_vectors[row].double() @ query / query.norm())
        if best is None or similarity > best[0]:
            best = similarity, chunk[: len(window) - at - 1]
    return best


def test_candidates_are_the_nearest_rows_of_other_passages_that_the_lm_lets_propose():
    lm = tiny_lm("llama")
    store = datastore_near_text(lm, PROMPTS, 20)
    for entry in store.n_rows:
        of_entry = store.trie(entry)
        assert of_entry is not None
        of_entry.windows[:] = np.arange(len(of_entry.windows)) % 3
    windows = [[*PROMPTS[2], 70, 10, 5, 15], list(range(1, 12))]
    left_out: list[set[int]] = [{1}, set()]
    given = [CalibrationWindow(np.array(w), frozenset(o)) for w, o in zip(windows, left_out, strict=True)]
    found = find_candidates(lm, store, given, 0.7)
    assert found.lengths == [len(window) - 1 for window in windows]
    places = [(w, at) for w, window in enumerate(windows) for at in range(len(window) - 1)]
    n_none = 0
    for (column, least), (n, (w, at)) in itertools.product(
        enumerate(calibration.MIN_FIRST_TOKEN_PROBS), enumerate(places)
    ):
        wanted = naive_candidate(lm, store, windows[w], at, least, left_out[w])
        if wanted is None:
            assert np.isnan(found.similarities[column, n])
            n_none += 1
            continue
        similarity, chunk = wanted
        assert found.similarities[column, n] == pytest.approx(similarity, abs=1e-5)
        assert found.chunk_lengths[column, n] == len(chunk)
        assert found.costs[column, n] == pytest.approx(naive_cost(lm, windows[w][: at + 1], chunk, 0.7), abs=1e-3)
    assert 0 < n_none < found.similarities.size


def random_candidates(rng: np.random.Generator) -> Candidates:
    lengths = [30, 1, 17]
    shape = len(calibration.MIN_FIRST_TOKEN_PROBS), sum(lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])
    similarities = np.where(rng.random(shape) < 0.8, rng.uniform(-1, 1, shape), np.nan)
    costs = rng.normal(0.3, 0.5, shape)
    return Candidates(lengths, similarities, np.minimum(rng.integers(1, 5, shape), left), costs)


def walked(candidates: Candidates, theta: float, least: float) -> tuple[float, float]:
    n_passes, nats, first = 0, 0.0, 0
    column = calibration.MIN_FIRST_TOKEN_PROBS.index(least)
    for length in candidates.lengths:
        at = first
        while at < first + length:
            n_passes += 1
            if candidates.similarities[column, at] >= theta:
                nats += candidates.costs[column, at]
                at += int(candidates.chunk_lengths[column, at])
            else:
                at += 1
        assert at == first + length, "chunks are cut at a window's end"
        first += length
    return 1 - n_passes / first, nats / first


@pytest.mark.parametrize("max_cost", [1e-9, 0.05, 0.2, 10.0])
def test_what_is_chosen_saves_most_of_all_that_cost_no_more(max_cost):
    candidates = random_candidates(np.random.default_rng(3))
    choice = choose(candidates, max_cost)
    assert choice.cost <= max_cost
    assert choice.saved > 0
    of_choice = choice.similarity_threshold, choice.min_first_token_prob
    assert walked(candidates, *of_choice) == pytest.approx((choice.saved, choice.cost))
    # Every θ that tells proposals apart, with every δ of the grid: those between the grid's θ save little more.
    for least, similarities in zip(calibration.MIN_FIRST_TOKEN_PROBS, candidates.similarities, strict=True):
        for theta in similarities[~np.isnan(similarities)]:
            saved, cost = walked(candidates, float(theta), least)
            assert cost > max_cost or saved <= choice.saved + 0.05


def test_nothing_is_accepted_where_every_chunk_costs_too_much():
    candidates = random_candidates(np.random.default_rng(3))
    dear = replace(candidates, costs=np.full_like(candidates.costs, 5.0))
    assert choose(dear, 0.01) == calibration.Choice(1.0, 1.0, 0.0, 0.0)
    nothing = replace(candidates, similarities=np.full_like(candidates.costs, np.nan))
    assert choose(nothing, 9.0).similarity_threshold == 1.0


@pytest.mark.parametrize("max_cost", [0.1, 50.0])
def test_no_loop_of_a_chunk_that_proposes_itself_gets_through(max_cost):
    """The datastore has nothing but runs of one token after itself, near every hidden state; whatever may be given away."""
    lm = tiny_lm("llama")
    newline, vectors = 9, np.eye(32)
    store = Datastore.of([trie(newline, [(vector, [newline] * 8) for vector in [*vectors, *-vectors]])], 32)
    windows = [CalibrationWindow(np.array([5, newline, 7, 8, newline, newline, newline, 3]))]
    choice = choose(find_candidates(lm, store, windows, 1.0), max_cost)
    rule = Acceptance(
        choice.similarity_threshold, min_first_token_prob=choice.min_first_token_prob, reject_repeats=True
    )
    (found,) = generate(lm, [[5, 6, newline]], 40, Retriever(store, rule))
    assert not found.chunks
    (looping,) = generate(lm, [[5, 6, newline]], 40, Retriever(store, Acceptance(-1.0)))
    assert repeats(looping.token_ids, 1)


# ---- The command


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    return build(gpt2_folder, tmp_path_factory.mktemp("calibration"), run_stage, TEXTS)


def test_windows_of_the_datastores_text_know_those_of_their_passage(made, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_TOKENS", 10**6)
    windows = windows_of_datastore(made.tries, 64)
    lists = next((made.root / "tries").glob("*_token_prob_list.json"))
    of_window = [[row[4] for row in rows] for rows in json.loads(lists.read_text())]
    assert [window.token_ids.tolist() for window in windows] == of_window
    # Windows of 64 tokens that begin 48 tokens after each other are of one passage; TEXTS have no window in common.
    groups: list[list[int]] = []
    for n, ids in enumerate(of_window):
        if groups and len(of_window[n - 1]) == 64 and of_window[n - 1][48:] == ids[:16]:
            groups[-1].append(n)
        else:
            groups.append([n])
    assert any(len(group) > 1 for group in groups)
    assert len(groups) > 1
    for group in groups:
        for n in group:
            assert windows[n].left_out == frozenset(group)


def test_fewer_windows_are_read_of_a_long_text(made, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_TOKENS", 200)
    windows = windows_of_datastore(made.tries, 20)
    assert 8 <= len(windows) <= 10
    assert all(len(window.token_ids) <= 20 for window in windows)


@pytest.mark.parametrize("with_text", [False, True])
def test_the_command_chooses_once_and_says_what_it_expects(made, run_stage, tmp_path, capsys, monkeypatch, with_text):
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"text": TEXTS[1] + TEXTS[0]}]), encoding="utf-8")
    flags = ["--similarity_threshold", "auto", "--max_cost", 9, "--max_new_tokens", 6, "--seed", 4]
    flags += ["--threshold_text", text] if with_text else []
    run_stage("eval.py", *made.eval_flags(tmp_path / "out", *flags))
    shown = capsys.readouterr().out
    said = re.search(r"θ (\S+) and δ (\S+), chosen by the text of (.+); expected there: (\S+)% of the forward", shown)
    assert said is not None
    assert (str(text) in said[3]) == with_text
    saved = json.loads((tmp_path / "out" / "threshold.json").read_text())["choice"]
    assert float(said[1]) == pytest.approx(saved["similarity_threshold"])
    assert saved["saved"] > 0
    results = json.loads((tmp_path / "out" / "prompt_0.json").read_text())
    assert f"generation_t{saved['similarity_threshold']}_text" in results["generation"]
    monkeypatch.setattr(calibration, "find_candidates", None)  # not asked again
    monkeypatch.setattr("utils.evaluation.runner.candidates_for", None)
    run_stage("eval.py", *made.eval_flags(tmp_path / "out", *flags))
    assert said[0] in capsys.readouterr().out


def test_a_text_without_passages_is_refused(made, refusal, tmp_path):
    text = tmp_path / "text.json"
    text.write_text("[]")
    auto = ("--similarity_threshold", "auto", "--threshold_text", text)
    assert "has no passage" in refusal("eval.py", *made.eval_flags(tmp_path / "out", *auto))
