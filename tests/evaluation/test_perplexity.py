"""Perplexity of the base LM and of CD-LM, by the module and by the command."""

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import tiny_lm
from conftest import TEXTS
from decoding_cases import PROMPTS, datastore_near_text, repeats, trie
from pipelines import Pipeline, build

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance, NeighborMixture
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Request
from utils.evaluation import perplexity
from utils.evaluation.marginal import Proposals
from utils.evaluation.perplexity import (
    TextSize,
    base_figures,
    base_log_likelihoods,
    cdlm_figures,
    find_proposals,
    setting_log_likelihoods,
)
from utils.lm.model import CausalLM, load_lm, load_tokenizer
from utils.lm.sampling import Sampler
from utils.text.corpora import Passage
from utils.text.windows import TokenFile, WindowPlan, WindowShape, plan_windows


@pytest.fixture(scope="module")
def plan_of(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[list[int]]], WindowPlan]:
    """A plan of these windows, given as token ids."""
    folder = tmp_path_factory.mktemp("plan")
    plan = plan_windows([Passage(TEXTS[0])], load_tokenizer(str(gpt2_folder)), WindowShape(50, 50, 2), folder)

    def make(windows: list[list[int]]) -> WindowPlan:
        tokens = np.concatenate([np.array(window, dtype=np.int32) for window in windows])
        lengths = np.array([len(window) for window in windows])
        file = tempfile.TemporaryFile()  # noqa: SIM115 (it goes with the plan)
        file.write(tokens.tobytes())
        file.flush()
        return replace(plan, passage_tokens=TokenFile(file), starts=np.cumsum(lengths) - lengths, lengths=lengths)

    return make


def test_base_perplexity_equals_the_loss_that_labels_give(gpt2_folder, tmp_path):
    lm, tokenizer = load_lm(str(gpt2_folder), "cpu"), load_tokenizer(str(gpt2_folder))
    plan = plan_windows([Passage(text) for text in TEXTS], tokenizer, WindowShape(50, 50, 2), tmp_path)
    proposals = find_proposals(lm, None, plan, 4)
    total = 0.0
    for window in range(plan.n_windows):
        ids = torch.tensor(plan.token_ids(window)[None].astype(np.int64))
        with torch.inference_mode():
            total += float(lm.model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    figures = base_figures(proposals, TextSize(int(proposals.lengths.sum()), 1))
    assert figures["nll"] == pytest.approx(total, rel=1e-6)
    assert figures["tokens"] == plan.n_tokens - plan.n_windows
    assert figures["perplexity"] == pytest.approx(math.exp(total / figures["tokens"]), rel=1e-6)
    assert figures["perplexity_lower"] < figures["perplexity"] < figures["perplexity_upper"]


def test_without_retrieval_perplexity_is_the_base_lms(plan_of):
    lm = tiny_lm("gpt2")
    plan = plan_of([list(range(1, 40)), list(range(50, 80))])
    store = datastore_near_text(lm, PROMPTS, 20)
    size = TextSize(67, 100)
    base = base_figures(find_proposals(lm, None, plan, 2), size)
    with_store = find_proposals(lm, store, plan, 2)
    (never,) = cdlm_figures(with_store, [Acceptance(1.0)], size)
    assert never["nll"] == pytest.approx(base["nll"], abs=1e-9)
    assert never["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert never["from_chunks"] == 0.0


def test_proposals_equal_those_found_position_by_position(plan_of):
    lm = tiny_lm("llama")
    store = datastore_near_text(lm, PROMPTS, 20)
    with torch.inference_mode():
        text = list(PROMPTS[0])
        for _ in range(20):
            text.append(int(lm.forward(torch.tensor([text]))[1][0, -1].argmax()))
    windows = [text, [5, 6, 7, 8], text[3:15], [20, 21, 22, 23, 24]]
    found = find_proposals(lm, store, plan_of(windows), 2)
    at = 0
    for window in windows:
        with torch.inference_mode():
            hidden_states, logits = lm.forward(torch.tensor([window]))
        for i in range(len(window) - 1):
            log_p = logits[0, i].double().log_softmax(-1)[window[i + 1]]
            assert found.log_probs[at] == pytest.approx(float(log_p), abs=1e-5)
            token_trie = store.trie(window[i])
            if token_trie is None:
                assert np.isnan(found.similarities[at])
                assert found.chunk_lengths[at] == 0
            else:
                query = hidden_states[0, i].double()
                cosines = token_trie.context_vectors.double() @ query / query.norm()
                chunk = token_trie.chunk(int(cosines.argmax()))
                rest = window[i + 1 :]
                assert found.similarities[at] == pytest.approx(float(cosines.max()), abs=1e-6)
                assert found.chunk_lengths[at] == min(len(chunk), len(rest))
                assert found.matches[at] == (chunk[: len(rest)] == rest[: len(chunk)])
                pairs = zip(chunk, rest, strict=False)
                assert found.agreeing[at] == sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            at += 1
    assert at == len(found.log_probs)
    assert 0 < found.matches.sum() < at


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"min_first_token_prob": 0.6},
        {"neighbors": NeighborMixture(3, 0.2)},
        {"neighbors": NeighborMixture(4, 0.3, (0.6, 0.3))},
        {"neighbors": NeighborMixture(4, 0.3, (0.6, 0.3), lm_power=2.0)},
        {"neighbors": NeighborMixture(3, 0.2, (0.5,)), "min_first_token_prob": 0.6},
    ],
    ids=["the paper's", "δ", "rows", "rows and prefixes", "weighed by the LM", "rows, prefixes and δ"],
)
def test_marginal_probabilities_are_the_generators_frequencies(rule, plan_of):
    """No importance weights: texts of three tokens over a vocabulary of five, drawn 30,000 times."""
    lm, prompt, n_draws = tiny_lm("five tokens"), [1, 2], 30_000
    rng = np.random.default_rng(0)
    tries = []
    for entry in range(5):
        vectors = rng.normal(size=(4, lm.hidden_size))
        rows = [(v / np.linalg.norm(v), rng.integers(0, 5, int(rng.integers(1, 4))).tolist()) for v in vectors]
        tries.append(trie(entry, rows))
    store, acceptance = Datastore.of(tries, lm.hidden_size), Acceptance(0.3, "bernoulli", **rule)
    counts: dict[tuple[int, ...], int] = {}
    decoding = Decoding(Sampler.from_settings(1.0, None, None), frozenset(), Retriever(store, acceptance), 500)
    for generation in decode(lm, [Request(i, prompt, 3) for i in range(n_draws)], decoding):
        counts[tuple(generation.new_token_ids)] = counts.get(tuple(generation.new_token_ids), 0) + 1
    texts = [[*prompt, a, b, c] for a in range(5) for b in range(5) for c in range(5)]
    proposals = find_proposals(lm, store, plan_of(texts), 25, acceptance)
    # The prompt's own second token is given, not generated: it is not summed over.
    of_prompt = np.arange(0, len(proposals.log_probs), 4)
    kept = np.setdiff1d(np.arange(len(proposals.log_probs)), of_prompt)
    values = (proposals.log_probs, proposals.similarities, proposals.chunk_lengths, proposals.agreeing)
    neighbors = None
    if proposals.neighbors is not None:
        neighbors = proposals.neighbors.map(lambda values: values[kept])
    cut = Proposals(np.full(125, 3), *(column[kept] for column in values), neighbors)
    p = np.exp(setting_log_likelihoods([acceptance], cut)[0])
    assert p.sum() == pytest.approx(1.0, abs=1e-6)
    got = np.array([counts.get(tuple(text[2:]), 0) for text in texts]) / n_draws
    floor = max(0.5 * np.abs(rng.multinomial(n_draws, p / p.sum()) / n_draws - p).sum() for _ in range(20))
    assert 0.5 * np.abs(got - p).sum() < 1.15 * floor
    assert sum(proposals.matches) > 0


# ---- The command


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    pipeline = build(gpt2_folder, tmp_path_factory.mktemp("perplexity"), run_stage, TEXTS)
    for name, text in (("validation", TEXTS[0] + TEXTS[3]), ("test", TEXTS[3] + TEXTS[1])):
        (pipeline.root / "data" / f"{name}.json").write_text(json.dumps([{"text": text}]))
    return pipeline


def text_flags(pipeline: Pipeline, save_dir: Path, *flags: object) -> list[object]:
    given = pipeline.eval_flags(save_dir, "--perplexity_window", 60, *flags)
    at = given.index("--prompt_file")
    return given[:at] + given[at + 2 :]


def test_the_command_fits_a_map_and_evaluates_every_setting(made, run_stage, tmp_path, capsys):
    data = made.root / "data"
    files = ("--fit_acceptance", data / "validation.json", "--perplexity_file", data / "test.json")
    run_stage(
        "eval.py",
        *text_flags(made, tmp_path, *files, "--sweep_similarity_threshold", 0.5, 1, "--acceptance", "bernoulli"),
    )
    shown = capsys.readouterr().out
    assert "fitted map" in shown
    assert "base LM" in shown
    report = json.loads((tmp_path / "perplexity.json").read_text())
    assert set(report["cdlm"]) == {"0.5", "1.0", "constant", "fitted"}
    assert report["cdlm"]["1.0"]["nll"] == pytest.approx(report["base"]["nll"], abs=1e-9)
    origin = json.loads((tmp_path / "acceptance_map.json").read_text())["origin"]
    assert origin["log_likelihood_fitted"] >= origin["log_likelihood_constant"] - 1e-6
    # A later command takes the saved map, to generate too.
    again = ("--acceptance_map", tmp_path / "acceptance_map.json", "--perplexity_file", data / "test.json")
    run_stage("eval.py", *text_flags(made, tmp_path / "again", *again))
    later = json.loads((tmp_path / "again" / "perplexity.json").read_text())
    assert later["cdlm"]["fitted"] == report["cdlm"]["fitted"]
    generate = (
        "--acceptance_map",
        tmp_path / "acceptance_map.json",
        "--acceptance",
        "bernoulli",
        "--max_new_tokens",
        4,
    )
    run_stage("eval.py", *made.eval_flags(tmp_path / "generated", *generate))


def test_the_command_fits_and_takes_a_mixture_of_rows(made, run_stage, refusal, tmp_path, capsys):
    data = made.root / "data"
    files = ("--fit_acceptance", data / "validation.json", "--perplexity_file", data / "test.json")
    run_stage("eval.py", *text_flags(made, tmp_path, *files, "--neighbors", 4))
    assert "4 rows propose, at temperature" in capsys.readouterr().out
    report = json.loads((tmp_path / "perplexity.json").read_text())
    saved = json.loads((tmp_path / "acceptance_map.json").read_text())
    assert report["mixture"] == saved["mixture"]
    assert saved["mixture"]["n_neighbors"] == 4
    fitted = ("--acceptance_map", tmp_path / "acceptance_map.json")
    run_stage("eval.py", *text_flags(made, tmp_path / "again", *fitted, "--perplexity_file", data / "test.json"))
    again = json.loads((tmp_path / "again" / "perplexity.json").read_text())
    assert again["cdlm"]["fitted"] == report["cdlm"]["fitted"]
    at_random = ("--acceptance", "bernoulli", "--max_new_tokens", 20, "--seed", 1)
    run_stage("eval.py", *made.eval_flags(tmp_path / "generated", *fitted, *at_random))
    settings = json.loads((tmp_path / "generated" / "prompt_0.json").read_text())
    assert "n_neighbors" in json.dumps(settings)
    assert "leave out --reject_repeats" in refusal(
        "eval.py", *made.eval_flags(tmp_path / "refused", *fitted, "--reject_repeats")
    )


def test_the_base_lm_alone_needs_no_datastore(made, run_stage, tmp_path):
    flags = ("--gen_baseline_only", "--perplexity_file", made.root / "data" / "test.json", "--save_dir", tmp_path)
    run_stage("eval.py", "--model_path", made.model, *flags, "--perplexity_window", 60, "--device", "cpu")
    report = json.loads((tmp_path / "perplexity.json").read_text())
    assert report["cdlm"] == {}
    assert report["base"]["perplexity"] > 1


def test_a_map_is_never_tested_on_the_text_it_was_fitted_to(made, refusal, tmp_path):
    data = made.root / "data"
    shutil.copy(data / "test.json", tmp_path / "copy.json")
    files = ("--fit_acceptance", data / "test.json", "--perplexity_file", tmp_path / "copy.json")
    assert "fitted to this text" in refusal("eval.py", *text_flags(made, tmp_path, *files))


REFUSED = {
    "nothing to do": ((), "needs --prompt_file"),
    "file missing": (("--perplexity_file", "none.json"), "none.json: does not exist"),
    "window of one": (("--perplexity_file", "{data}/test.json", "--perplexity_window", 1), "at least 2"),
    "no map": (("--perplexity_file", "{data}/test.json", "--acceptance_map", "{data}/test.json"), "acceptance map"),
    "two maps": (("--fit_acceptance", "{data}/test.json", "--acceptance_map", "x"), "takes the place"),
    "q_max 1": (("--perplexity_file", "{data}/test.json", "--q_max", 1), r"in (0, 1)"),
    "corpus of nothing": (("--perplexity_file", "{data}/test.json", "--save_as_corpus", "x"), "--prompt_file"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_unusable_input_is_refused_in_one_sentence(made, refusal, tmp_path, row):
    flags, message = REFUSED[row]
    filled = [str(flag).format(data=made.root / "data") for flag in flags]
    assert message in refusal("eval.py", *text_flags(made, tmp_path, *filled))


@pytest.mark.parametrize("n_numbers", [1, 70, 10**7])
def test_the_bootstrap_is_the_same_in_blocks_of_any_size(n_numbers, plan_of, monkeypatch):
    windows = np.random.default_rng(5).integers(0, 100, (12, 9)).tolist()
    found = find_proposals(
        tiny_lm("llama"), None, plan_of([window[: 3 + i % 7] for i, window in enumerate(windows)]), 4
    )
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=2000)
    resampled = np.exp(-(counts @ base_log_likelihoods(found)) / (counts @ found.lengths))
    monkeypatch.setattr(perplexity, "RESAMPLED_NUMBERS", n_numbers)
    figures = base_figures(found, TextSize(10, 10))
    got = figures["perplexity_lower"], figures["perplexity_upper"]
    assert got == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), rel=1e-12)


def nearest_chunks(
    lm: CausalLM, store: Datastore, windows: list[list[int]], least: float = 0.0
) -> Iterator[tuple[int, list[int], tuple[float, list[int]] | None]]:
    """Of each position whose entry token has a trie: its number, the text so far, and the similarity and chunk of the
    nearest row whose first token the LM finds likely enough, None where there is none; one by one."""
    at = 0
    for window in windows:
        with torch.inference_mode():
            hidden_states, logits = lm.forward(torch.tensor([window]))
        for i in range(len(window) - 1):
            token_trie = store.trie(window[i])
            if token_trie is not None:
                probs, best = logits[0, i].double().softmax(-1), None
                for row in range(len(token_trie.windows)):
                    chunk = token_trie.chunk(row)
                    query, vector = hidden_states[0, i].double(), token_trie.context_vectors[row].double()
                    similarity = float(query @ vector / query.norm())
                    is_likely = float(probs[chunk[0]]) >= least * float(probs.max()) * (1 - 1e-6)
                    if is_likely and (best is None or similarity > best[0]):
                        best = similarity, chunk
                yield at, window[: i + 1], best
            at += 1


@pytest.mark.parametrize("delta", [0.05, 0.5, 1.0])
def test_only_rows_propose_whose_chunk_the_lm_would_begin(delta, plan_of):
    lm = tiny_lm("llama")
    store = datastore_near_text(lm, PROMPTS, 20, wrong=True)
    windows = [[*PROMPTS[2], 70, 10, 5, 15], list(range(1, 12)), [5, 6, 7, 8, 22, 15]]
    plan = plan_of(windows)
    every, found = (
        find_proposals(lm, store, plan, 2, Acceptance(0, min_first_token_prob=least)) for least in (0.0, delta)
    )
    np.testing.assert_array_equal(found.log_probs, every.log_probs)
    texts = [window[i + 1 :] for window in windows for i in range(len(window) - 1)]
    n_none = 0
    for at, _, best in nearest_chunks(lm, store, windows, delta):
        if best is None:
            assert np.isnan(found.similarities[at])
            assert (found.chunk_lengths[at], found.agreeing[at]) == (0, 0)
            n_none += 1
            continue
        similarity, chunk = best
        assert found.similarities[at] == pytest.approx(similarity, abs=1e-6)
        assert found.chunk_lengths[at] == min(len(chunk), len(texts[at]))
        pairs = zip(chunk, texts[at], strict=False)
        assert found.agreeing[at] == sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert n_none


def test_proposals_that_repeat_the_text_are_left_out(plan_of):
    lm = tiny_lm("llama")
    store = datastore_near_text(lm, PROMPTS, 20)
    with torch.inference_mode():
        text = list(PROMPTS[0])
        for _ in range(30):
            text.append(int(lm.forward(torch.tensor([text]))[1][0, -1].argmax()))
    windows = [text, [5, 6, 5, 6, 7, 8, 5, 6], [7, 3] * 40]
    plan = plan_of(windows)
    every, found = (find_proposals(lm, store, plan, 2, how) for how in (None, Acceptance(0, reject_repeats=True)))
    n_left_out = 0
    for at, text, best in nearest_chunks(lm, store, windows):
        assert best is not None
        is_repeat = repeats(text + best[1], len(best[1]))
        assert np.isnan(found.similarities[at]) == is_repeat
        assert found.chunk_lengths[at] == (0 if is_repeat else every.chunk_lengths[at])
        n_left_out += is_repeat
    assert 0 < n_left_out < len(found.log_probs)
