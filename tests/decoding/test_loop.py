"""The decode loop equals a naive decoder that keeps nothing, and where nothing is retrieved, `model.generate`."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import Scripted, tiny_lm
from decoding_cases import GREEDY, NO_EOS, PROMPTS, datastore_near_text, generate, new_tokens, repeats, trie

from utils.datastore.store import Datastore
from utils.decoding import timing
from utils.decoding.acceptance import Acceptance
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Generation, Request
from utils.files import InputError
from utils.lm.kv_cache import SlotKVCache
from utils.lm.model import CausalLM
from utils.lm.sampling import Sampler
from utils.lm.scoring import relative_probs


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return tiny_lm("gpt2")


def naive(
    lm: CausalLM,
    prompt: list[int],
    n_new: int,
    store: Datastore,
    theta: float,
    eos: frozenset[int] = NO_EOS,
    delta: float = 0.0,
    reject_repeats: bool = False,
):
    """Recomputes the whole text for every step and looks at every row of every trie in Python."""
    text, n_forward = list(prompt), 0
    chunks: list[tuple[int, list[int]]] = []
    with torch.inference_mode():
        while len(text) - len(prompt) < n_new and not (len(text) > len(prompt) and text[-1] in eos):
            hidden_states, logits = lm.forward(torch.tensor([text]))
            n_forward += 1
            query = hidden_states[0, -1].double()
            best, found = -math.inf, None
            probs = logits[0, -1].double().softmax(-1)
            token_trie = store.trie(text[-1])
            for row in range(len(token_trie.windows)) if token_trie else ():
                assert token_trie is not None
                if float(probs[token_trie.chunk(row)[0]]) < delta * float(probs.max()) * (1 - 1e-6):
                    continue
                vector = token_trie.context_vectors[row].double()
                similarity = float(query @ vector / query.norm())
                if similarity > best:
                    best, found = similarity, token_trie.chunk(row)
            accepted = found and best >= theta and theta < 1
            if accepted and reject_repeats:
                accepted = not repeats(text + found, len(found))
            emitted = found if found and accepted else [int(logits[0, -1].argmax())]
            kept: list[int] = []
            for token in emitted:
                if len(text) + len(kept) - len(prompt) < n_new:
                    kept.append(token)
                    if token in eos:
                        break
            if emitted is found:
                chunks.append((len(text), kept))
            text += kept
    return text[len(prompt) :], chunks, n_forward


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("theta", [-1.0, 0.5, 0.9, 0.97, 1.0])
def test_chunk_mode_equals_a_naive_decoder_token_for_token(lm, theta, batch_size):
    store = datastore_near_text(lm, PROMPTS, 20, wrong=theta < 0.9)
    of_7 = store.trie(7)
    assert of_7 is not None
    eos = frozenset({of_7.chunk(0)[-1]})
    got = generate(lm, PROMPTS, 30, Retriever(store, Acceptance(theta)), batch_size, eos=eos)
    for generation, prompt in zip(got, PROMPTS, strict=True):
        tokens, chunks, n_forward = naive(lm, prompt, 30, store, theta, eos)
        assert generation.new_token_ids == tokens
        assert [(chunk.position, chunk.token_ids) for chunk in generation.chunks] == chunks
        assert generation.stats.forward_passes == n_forward
    assert any(generation.chunks for generation in got) == (theta < 1)


def require_naive(lm: CausalLM, got: list[Generation], store: Datastore, **rules: Any) -> None:
    """Fail where 25 new tokens of PROMPTS at θ 0.5 are not the naive decoder's, or the rules change no text."""
    for generation, prompt in zip(got, PROMPTS, strict=True):
        tokens, chunks, n_forward = naive(lm, prompt, 25, store, 0.5, **rules)
        assert generation.new_token_ids == tokens
        assert generation.stats.forward_passes == n_forward
        assert [(chunk.position, chunk.token_ids) for chunk in generation.chunks] == chunks
    without = generate(lm, PROMPTS, 25, Retriever(store, Acceptance(0.5)))
    assert new_tokens(got) != new_tokens(without)


def pretend_on_device(store: Datastore) -> None:
    """Let searches go as if the rows were on a device."""
    for entry in store.n_rows:
        token_trie = store.trie(entry)
        assert token_trie is not None
        token_trie.index._array = None


@pytest.mark.parametrize("prefetch_all", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("delta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_gate_equals_a_naive_decoder_token_for_token(lm, delta, batch_size, prefetch_all, on_device):
    store = datastore_near_text(lm, PROMPTS, 20, wrong=True)
    if on_device:
        pretend_on_device(store)
    retriever = Retriever(store, Acceptance(0.5, min_first_token_prob=delta))
    got = generate(lm, PROMPTS, 25, retriever, batch_size, prefetch_all=prefetch_all)
    require_naive(lm, got, store, delta=delta)


def test_a_newline_that_proposes_itself_for_ever_is_stopped_by_the_lm(lm):
    """The datastore has nothing but chunks of one token after itself, which are similar enough to every hidden state."""
    with torch.inference_mode():
        probs = [
            relative_probs(lm.forward(torch.tensor([[5, 6, v]]))[1][0, -1:], torch.tensor([[v]])) for v in range(100)
        ]
    newline, vectors = int(torch.cat(probs).argmin()), np.eye(32)
    store = Datastore.of([trie(newline, [(vector, [newline] * 8) for vector in [*vectors, *-vectors]])], 32)
    prompt = [5, 6, newline]
    (looping,) = generate(lm, [prompt], 24, Retriever(store, Acceptance(-1.0)))
    assert looping.new_token_ids == [newline] * 24
    (plain,) = generate(lm, [prompt], 24)
    (gated,) = generate(lm, [prompt], 24, Retriever(store, Acceptance(-1.0, min_first_token_prob=0.3)))
    (no_repeats,) = generate(lm, [prompt], 24, Retriever(store, Acceptance(-1.0, reject_repeats=True)))
    assert gated.new_token_ids != looping.new_token_ids
    assert no_repeats.new_token_ids != looping.new_token_ids
    assert plain.new_token_ids != looping.new_token_ids


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rejected_repeats_equal_a_naive_decoder_token_for_token(lm, batch_size):
    store = datastore_near_text(lm, PROMPTS, 20)  # of texts that repeat themselves
    how = Acceptance(0.5, reject_repeats=True)
    got = generate(lm, PROMPTS, 25, Retriever(store, how), batch_size)
    require_naive(lm, got, store, reject_repeats=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_trace_holds_every_step_and_every_proposal(lm, batch_size):
    store = datastore_near_text(lm, PROMPTS, 20)
    got = generate(lm, PROMPTS, 30, Retriever(store, Acceptance(0.95)), batch_size)
    for generation, prompt in zip(got, PROMPTS, strict=True):
        assert generation.trace is not None
        steps, proposals, stats = generation.trace.steps, generation.trace.proposals, generation.stats
        lengths = {chunk.position: len(chunk.token_ids) for chunk in generation.chunks}
        ends = [len(prompt)]
        while ends[-1] < len(generation.token_ids):
            ends.append(ends[-1] + lengths.get(ends[-1], 1))
        assert [step.n_tokens for step in steps] == ends
        assert [found.position for found in proposals] == [
            end for end in ends[:-1] if generation.token_ids[end - 1] in store.n_rows
        ]
        assert [(found.position, found.similarity) for found in proposals if found.similarity >= 0.95] == [
            (chunk.position, chunk.similarity) for chunk in generation.chunks
        ]
        seconds = [step.lm_seconds + step.retrieval_seconds + step.rest_seconds for step in steps]
        assert seconds == sorted(seconds)
        assert seconds[-1] == stats.seconds
        assert 0 < len(generation.chunks) < len(proposals)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("theta", [0.5, 0.9, 0.97])
def test_prefetching_from_a_device_changes_no_text(lm, theta, temperature):
    store = datastore_near_text(lm, PROMPTS, 20)
    sampler = Sampler.from_settings(temperature, None, None)

    def texts(prefetch_all: bool) -> dict[int, list[int]]:
        requests = [Request(i, prompt, 30) for i, prompt in enumerate(PROMPTS)]
        how = Decoding(sampler, NO_EOS, Retriever(store, Acceptance(theta)), batch_size=3, prefetch_all=prefetch_all)
        return {generation.index: generation.new_token_ids for generation in decode(lm, requests, how)}

    wanted = texts(prefetch_all=False)
    pretend_on_device(store)
    assert texts(prefetch_all=False) == texts(prefetch_all=True) == wanted


def test_threshold_one_and_an_empty_datastore_equal_the_baseline(lm):
    store = datastore_near_text(lm, PROMPTS, 20)
    baseline = new_tokens(generate(lm, PROMPTS, 25))
    for retriever in (Retriever(store, Acceptance(1.0)), Retriever(Datastore.of([], 32), Acceptance(-1.0))):
        got = generate(lm, PROMPTS, 25, retriever)
        assert new_tokens(got) == baseline
        assert all(generation.stats.forward_passes == 25 and not generation.chunks for generation in got)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom"])
def test_greedy_baseline_equals_generate(name):
    lm = tiny_lm(name)
    for generation, prompt in zip(generate(lm, PROMPTS, 20, batch_size=2), PROMPTS, strict=True):
        wanted = lm.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        assert prompt + generation.new_token_ids == wanted[0].tolist()


def test_a_prompt_gives_the_same_text_in_any_batch(lm):
    retriever = Retriever(datastore_near_text(lm, PROMPTS, 10), Acceptance(0.9))
    for sampler in (GREEDY, Sampler.from_settings(0.8, 20, 0.9)):
        alone = new_tokens(generate(lm, PROMPTS, 40, retriever, sampler=sampler))
        for batch_size in (2, 5, 8):
            got = generate(lm, PROMPTS, 40, retriever, batch_size, sampler)
            assert new_tokens(got) == alone


def test_the_row_of_a_sequence_that_ends_goes_to_the_next_request(lm):
    lengths = [2, 20, 3, 5, 4, 6]
    n_rows: list[int] = []

    class CountingCache(SlotKVCache):
        def forward(self, blocks, keep_all):
            n_rows.append(len(blocks))
            return super().forward(blocks, keep_all)

    requests = [Request(i, [5, 6], n_new) for i, n_new in enumerate(lengths)]
    generations = list(decode(lm, requests, Decoding(GREEDY, NO_EOS, cache=CountingCache(lm, 2, 30))))
    assert {generation.index: len(generation.new_token_ids) for generation in generations} == dict(enumerate(lengths))
    # While the longest runs in one row the others pass through the other: 20 = 2 + 3 + 5 + 4 + 6. The last token of a
    # text needs no pass, and the pass of the step in which a text ends has one row.
    assert n_rows == [2, 1, 2, 2, 1, 2, 2, 2, 2, 1, 2, 2, 2, 1, 2, 2, 2, 2, 2]


def test_seed_and_prompt_decide_the_sample(lm):
    sampler = Sampler.from_settings(1.0, None, None)

    def sample(seed: int, index: int) -> list[int]:
        (generation,) = decode(lm, [Request(index, [5, 6], 30, seed)], Decoding(sampler, NO_EOS))
        return generation.new_token_ids

    assert sample(0, 0) == sample(0, 0)
    assert len({tuple(sample(seed, index)) for seed in (0, 1) for index in (0, 1)}) == 4


def test_generation_ends_inside_a_chunk_at_eos_or_the_token_limit(lm):
    vector = np.ones(32) / math.sqrt(32)
    tries = [trie(entry, [(vector, [11, 12, 13, 14])]) for entry in range(100)]
    retriever = Retriever(Datastore.of(tries, 32), Acceptance(-1.0))
    (generation,) = generate(lm, [[5]], 6, retriever)
    assert generation.new_token_ids == [11, 12, 13, 14, 11, 12]
    assert [chunk.token_ids for chunk in generation.chunks] == [[11, 12, 13, 14], [11, 12]]
    assert generation.stats.forward_passes == 2
    (generation,) = generate(lm, [[5]], 6, retriever, eos=frozenset({13}))
    assert generation.new_token_ids == [11, 12, 13]
    assert generation.stats.forward_passes == 1


def test_generation_reaches_the_last_position_and_refuses_to_pass_it(lm):
    (generation,) = generate(lm, [[5] * 120], 8)
    assert len(generation.new_token_ids) == 8
    with pytest.raises(ValueError, match="reads 128"):
        generate(lm, [[5] * 120], 9)


def test_tokens_are_reported_as_they_come(lm):
    seen: dict[int, list[int]] = {}
    requests = [Request(i, prompt, 10) for i, prompt in enumerate(PROMPTS)]
    decoding = Decoding(
        GREEDY, NO_EOS, batch_size=2, on_tokens=lambda index, ids, _: seen.setdefault(index, []).extend(ids)
    )
    for generation in decode(lm, requests, decoding):
        assert seen[generation.index] == generation.new_token_ids


def test_time_between_two_generations_counts_for_neither(lm, monkeypatch):
    """Runs that take turns pause each other; the clock stands still but for these pauses."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    requests = [Request(i, [5, 6], n_new) for i, n_new in enumerate((2, 9, 4))]
    seconds = []
    for generation in decode(lm, requests, Decoding(GREEDY, NO_EOS, batch_size=2)):
        seconds.append(generation.stats.seconds)
        now[0] += 1000.0
    assert seconds == [0.0, 0.0, 0.0]


def test_each_token_is_read_once(lm):
    """A decoder without a KV cache reads the whole text for every token."""
    retriever = Retriever(datastore_near_text(lm, PROMPTS, 20), Acceptance(0.9))
    generate(lm, [PROMPTS[2]], 1)  # looks for the cache that fits the model, which reads a few tokens more
    n_read = []
    handle = lm.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: n_read.append(inputs[0].numel())
    )
    try:
        (generation,) = generate(lm, [PROMPTS[2]], 20, retriever)
    finally:
        handle.remove()
    assert generation.chunks
    assert n_read[0] == len(PROMPTS[2])
    assert len(n_read) == generation.stats.forward_passes
    # All but what the last step brought, which no one needs to read.
    assert 20 - 4 <= sum(n_read[1:]) < 20


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logits_that_rule_out_every_token_are_refused_at_their_step(batch_size, value, temperature):
    """Neither the last token of the vocabulary nor the end of the text comes in the place of a token."""
    n_passes = [0]

    def spoil(_: torch.Tensor, logits: torch.Tensor) -> None:
        n_passes[0] += 1
        if n_passes[0] > 8:
            logits[-1, -1] = value

    model = Scripted(tiny_lm("llama"), spoil)
    found = []
    with pytest.raises(
        InputError, match=r"prompt \d: the model computed NaN, or ruled out every token; use another --d"
    ):
        found += generate(
            model, PROMPTS, 30, batch_size=batch_size, sampler=Sampler.from_settings(temperature, None, None)
        )
    assert not found


def test_a_temperature_that_leaves_no_number_is_refused():
    sampler = Sampler.from_settings(1e-40, None, None)
    with pytest.raises(InputError, match="another --temperature"):
        generate(tiny_lm("llama"), PROMPTS, 3, sampler=sampler)


def test_infinite_hidden_states_are_refused_before_a_chunk_is_looked_up(lm):
    store = datastore_near_text(lm, PROMPTS, 20)

    def spoil(hidden_states: torch.Tensor, _: torch.Tensor) -> None:
        hidden_states[:] = math.nan

    with pytest.raises(InputError, match="NaN"):
        generate(Scripted(tiny_lm("gpt2"), spoil), PROMPTS, 9, Retriever(store, Acceptance(0.5)))
