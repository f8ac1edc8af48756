"""Rescoring equals what loops over the trie and one forward pass find, with a trace and without."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from pipelines import Pipeline, build

from utils.datastore.store import Datastore, open_datastore
from utils.decoding.types import Generation
from utils.evaluation.report.rescore import rescore
from utils.evaluation.results import read_run
from utils.lm.model import CausalLM, load_lm

THETA = 0.7  # of which some proposals are above and some below
N_PROMPTS = 4


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    pipeline = build(gpt2_folder, tmp_path_factory.mktemp("rescore"), run_stage, TEXTS)
    flags = ("--similarity_threshold", THETA, "--max_new_tokens", 24, "--temperature", 0)
    run_stage("eval.py", *pipeline.eval_flags(pipeline.root / "results", *flags))
    return pipeline


@pytest.fixture(scope="module")
def lm(made: Pipeline) -> CausalLM:
    return load_lm(str(made.model), "cpu")


@pytest.fixture(scope="module")
def store(made: Pipeline, lm: CausalLM) -> Datastore:
    return open_datastore(made.tries, device=lm.device, max_bytes=2**30)


@pytest.fixture(scope="module")
def generations(made: Pipeline) -> list[Generation]:
    found = [read_run(made.root / "results", index, f"generation_t{THETA}") for index in range(N_PROMPTS)]
    assert any(generation.chunks for generation in found)
    return found


def test_rescored_log_probs_are_those_of_one_forward_pass(lm, store, generations) -> None:
    for generation in generations:
        with torch.inference_mode():
            _, logits = lm.forward(torch.tensor([generation.token_ids]))
        log_p = logits[0].double().log_softmax(dim=1)
        wanted = [float(log_p[i, token]) for i, token in enumerate(generation.token_ids[1:])]
        found = rescore(lm, store, generation).log_probs
        assert found[0] == 0
        assert found[1:] == pytest.approx(wanted, abs=1e-4)


def test_rivals_are_the_next_best_chunks(lm, store, generations) -> None:
    for generation in generations:
        with torch.inference_mode():
            states, _ = lm.forward(torch.tensor([generation.token_ids]))
        rescored = rescore(lm, store, generation)
        assert [proposal.record for proposal in rescored.proposals] == generation.trace.proposals
        for proposal in rescored.proposals:
            row = proposal.record.row
            trie = store.trie(proposal.entry_token_id)
            cosines = torch.cosine_similarity(trie.context_vectors, states[0, proposal.record.position - 1], dim=1)
            assert float(cosines[row]) == pytest.approx(proposal.record.similarity, abs=1e-5)
            best: dict[tuple[int, ...], float] = {}
            for i in cosines.argsort(descending=True).tolist():
                best.setdefault(tuple(trie.chunk(i)), float(cosines[i]))
            best.pop(tuple(proposal.token_ids))
            expected = sorted(best.values(), reverse=True)[:3]
            assert [similarity for _, similarity in proposal.rivals] == pytest.approx(expected, abs=1e-5)
            assert (int(trie.windows[row]), int(trie.positions[row])) == (proposal.window, proposal.place)


def test_proposals_of_a_text_without_a_trace_are_found_again(lm, store, generations) -> None:
    for generation in generations:
        untraced = Generation(
            generation.index, generation.prompt_ids, generation.new_token_ids, generation.chunks, generation.stats
        )
        wanted, found = (rescore(lm, store, text).proposals for text in (generation, untraced))
        assert [proposal.record.position for proposal in found] == [proposal.record.position for proposal in wanted]
        for new, old in zip(found, wanted, strict=True):
            assert new.record.similarity == pytest.approx(old.record.similarity, abs=1e-5)
