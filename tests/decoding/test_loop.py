"""The decode loop equals a naive decoder that keeps nothing, and where nothing is retrieved, `model.generate`."""

import math

import numpy as np
import pytest
import torch
from architectures import tiny_lm

from utils.decoding.acceptance import Acceptance
from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.loop import Decoding, Request, decode
from utils.lm.model import CausalLM
from utils.decoding.retriever import Retriever
from utils.lm.sampling import Sampler

GREEDY = Sampler.from_settings(0, None, None)
NO_EOS: frozenset[int] = frozenset()
PROMPTS = [[5, 6, 7, 8], [50], [20, 21, 22, 23, 24, 25, 26], [7, 3], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    return tiny_lm("gpt2")


def datastore_near_text(lm: CausalLM, prompts: list[list[int]], n_new: int, wrong: bool = False) -> Datastore:
    """Rows at every position of the greedy continuations, a little off: the text that follows, or other tokens."""
    rng = np.random.default_rng(0)
    rows: dict[int, list[tuple[np.ndarray, list[int]]]] = {}
    with torch.inference_mode():
        for prompt in prompts:
            text = list(prompt)
            for _ in range(n_new):
                text.append(int(lm.forward(torch.tensor([text]), use_cache=False)[1][0, -1].argmax()))
            hidden_states, _ = lm.forward(torch.tensor([text]), use_cache=False)
            for at in range(len(text) - 1):
                chunk = (
                    [int(t) for t in rng.integers(0, 100, 3)]
                    if wrong
                    else text[at + 1 : at + 1 + int(rng.integers(1, 5))]
                )
                vector = hidden_states[0, at].numpy() + rng.normal(0, 0.3, lm.hidden_size)
                rows.setdefault(text[at], []).append((vector / np.linalg.norm(vector), chunk))
    return Datastore.of([trie(entry, entries) for entry, entries in rows.items()], lm.hidden_size)


def trie(entry: int, entries: list[tuple[np.ndarray, list[int]]]) -> TokenTrie:
    entries = sorted(entries, key=lambda entry: entry[1])
    offsets = np.cumsum([0] + [len(chunk) for _, chunk in entries])
    vectors = torch.tensor(np.array([vector for vector, _ in entries]), dtype=torch.float32)
    places = np.zeros(len(entries), dtype=np.int64)
    return TokenTrie(entry, vectors, np.concatenate([chunk for _, chunk in entries]), offsets, places, places)


def naive(lm: CausalLM, prompt: list[int], n_new: int, store: Datastore, theta: float, eos: frozenset[int] = NO_EOS):
    """Recomputes the whole text for every step and looks at every row of every trie in Python."""
    text, n_forward = list(prompt), 0
    chunks: list[tuple[int, list[int]]] = []
    with torch.inference_mode():
        while len(text) - len(prompt) < n_new and not (len(text) > len(prompt) and text[-1] in eos):
            hidden_states, logits = lm.forward(torch.tensor([text]), use_cache=False)
            n_forward += 1
            query = hidden_states[0, -1].double()
            best, found = -math.inf, None
            token_trie = store.trie(text[-1])
            for row in range(len(token_trie.windows)) if token_trie else ():
                vector = token_trie.context_vectors[row].double()
                similarity = float(query @ vector / query.norm())
                if similarity > best:
                    best, found = similarity, token_trie.chunk(row)
            emitted = found if found and best >= theta and theta < 1 else [int(logits[0, -1].argmax())]
            kept = []
            for token in emitted:
                if len(text) + len(kept) - len(prompt) < n_new:
                    kept.append(token)
                    if token in eos:
                        break
            if emitted is found:
                chunks.append((len(text), kept))
            text += kept
    return text[len(prompt) :], chunks, n_forward


def run(lm: CausalLM, prompts, n_new, retriever=None, batch_size=1, sampler=GREEDY, eos=NO_EOS):
    requests = [Request(i, prompt, n_new) for i, prompt in enumerate(prompts)]
    generations = list(decode(lm, requests, Decoding(sampler, eos, retriever, batch_size)))
    return sorted(generations, key=lambda generation: generation.index)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("theta", [-1.0, 0.5, 0.9, 0.97, 1.0])
def test_chunk_mode_equals_a_naive_decoder_token_for_token(lm, theta, batch_size):
    store = datastore_near_text(lm, PROMPTS, 20, wrong=theta < 0.9)
    eos = frozenset({int(store.trie(7).chunk(0)[-1])})
    got = run(lm, PROMPTS, 30, Retriever(store, Acceptance(theta)), batch_size, eos=eos)
    for generation, prompt in zip(got, PROMPTS, strict=True):
        tokens, chunks, n_forward = naive(lm, prompt, 30, store, theta, eos)
        assert generation.new_token_ids == tokens
        assert [(chunk.position, chunk.token_ids) for chunk in generation.chunks] == chunks
        assert generation.stats.forward_passes == n_forward
    assert any(generation.chunks for generation in got) == (theta < 1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_trace_has_every_step_and_every_proposal_accepted_or_not(lm, batch_size):
    store = datastore_near_text(lm, PROMPTS, 20)
    got = run(lm, PROMPTS, 30, Retriever(store, Acceptance(0.95)), batch_size)
    for generation, prompt in zip(got, PROMPTS, strict=True):
        moments, proposals, stats = generation.trace.moments, generation.trace.proposals, generation.stats
        lengths = {chunk.position: len(chunk.token_ids) for chunk in generation.chunks}
        ends = [len(prompt)]
        while ends[-1] < len(generation.token_ids):
            ends.append(ends[-1] + lengths.get(ends[-1], 1))
        assert [moment.n_tokens for moment in moments] == ends
        assert [position for position, _, _ in proposals] == [
            end for end in ends[:-1] if generation.token_ids[end - 1] in store.n_rows
        ]
        assert [(seen.position, seen.similarity) for seen in proposals if seen.similarity >= 0.95] == [
            (chunk.position, chunk.similarity) for chunk in generation.chunks
        ]
        seconds = [moment.lm_seconds + moment.retrieval_seconds + moment.rest_seconds for moment in moments]
        assert seconds == sorted(seconds)
        assert seconds[-1] == stats.seconds
        assert 0 < len(generation.chunks) < len(proposals)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("theta", [0.5, 0.9, 0.97])
def test_what_a_step_may_need_gives_the_same_text_when_it_comes_from_the_device_at_once(lm, theta, temperature):
    store = datastore_near_text(lm, PROMPTS, 20)
    sampler = Sampler.from_settings(temperature, None, None)

    def texts(prefetch_all: bool) -> dict[int, list[int]]:
        requests = [Request(i, prompt, 30) for i, prompt in enumerate(PROMPTS)]
        how = Decoding(sampler, NO_EOS, Retriever(store, Acceptance(theta)), batch_size=3, prefetch_all=prefetch_all)
        return {generation.index: generation.new_token_ids for generation in decode(lm, requests, how)}

    wanted = texts(prefetch_all=False)
    for entry in store.n_rows:
        store.trie(entry).index._array = None  # as if the rows were on a device
    assert texts(prefetch_all=False) == texts(prefetch_all=True) == wanted


def test_similarity_threshold_one_and_an_empty_datastore_equal_the_baseline(lm):
    store = datastore_near_text(lm, PROMPTS, 20)
    baseline = [generation.new_token_ids for generation in run(lm, PROMPTS, 25)]
    for retriever in (Retriever(store, Acceptance(1.0)), Retriever(Datastore.of([], 32), Acceptance(-1.0))):
        got = run(lm, PROMPTS, 25, retriever)
        assert [generation.new_token_ids for generation in got] == baseline
        assert all(generation.stats.forward_passes == 25 and not generation.chunks for generation in got)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom"])
def test_greedy_baseline_equals_generate(name):
    lm = tiny_lm(name)
    for generation, prompt in zip(run(lm, PROMPTS, 20, batch_size=2), PROMPTS, strict=True):
        wanted = lm.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        assert prompt + generation.new_token_ids == wanted[0].tolist()


def test_a_prompt_gives_the_same_text_in_any_batch(lm):
    retriever = Retriever(datastore_near_text(lm, PROMPTS, 10), Acceptance(0.9))
    for sampler in (GREEDY, Sampler.from_settings(0.8, 20, 0.9)):
        alone = [generation.new_token_ids for generation in run(lm, PROMPTS, 40, retriever, sampler=sampler)]
        for batch_size in (2, 5, 8):
            got = run(lm, PROMPTS, 40, retriever, batch_size, sampler)
            assert [generation.new_token_ids for generation in got] == alone


def test_seed_and_prompt_decide_the_sample(lm):
    sampler = Sampler.from_settings(1.0, None, None)

    def sample(seed: int, index: int) -> list[int]:
        (generation,) = decode(lm, [Request(index, [5, 6], 30, seed)], Decoding(sampler, NO_EOS))
        return generation.new_token_ids

    assert sample(0, 0) == sample(0, 0)
    assert len({tuple(sample(seed, index)) for seed in (0, 1) for index in (0, 1)}) == 4


def test_generation_ends_inside_a_chunk_at_end_of_text_or_at_the_last_token(lm):
    vector = np.ones(32) / math.sqrt(32)
    tries = [trie(entry, [(vector, [11, 12, 13, 14])]) for entry in range(100)]
    retriever = Retriever(Datastore.of(tries, 32), Acceptance(-1.0))
    (generation,) = run(lm, [[5]], 6, retriever)
    assert generation.new_token_ids == [11, 12, 13, 14, 11, 12]
    assert [chunk.token_ids for chunk in generation.chunks] == [[11, 12, 13, 14], [11, 12]]
    assert generation.stats.forward_passes == 2
    (generation,) = run(lm, [[5]], 6, retriever, eos=frozenset({13}))
    assert generation.new_token_ids == [11, 12, 13]
    assert generation.stats.forward_passes == 1


def test_generation_reaches_the_models_last_position_and_refuses_to_pass_it(lm):
    (generation,) = run(lm, [[5] * 120], 8)
    assert len(generation.new_token_ids) == 8
    with pytest.raises(ValueError, match="reads 128"):
        run(lm, [[5] * 120], 9)


def test_bernoulli_accepts_as_often_as_g_says(lm):
    vector = lm.forward(torch.tensor([[5]]), use_cache=False)[0][0, -1].detach().numpy()
    store = Datastore.of([trie(5, [(vector / np.linalg.norm(vector), [1])])], 32)
    retriever = Retriever(store, Acceptance(0.5, "bernoulli", q_max=0.3))
    requests = [Request(i, [5], 1) for i in range(2000)]
    n_accepted = sum(len(g.chunks) for g in decode(lm, requests, Decoding(GREEDY, NO_EOS, retriever, batch_size=50)))
    assert abs(n_accepted / 2000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


def test_tokens_are_reported_as_they_come(lm):
    seen: dict[int, list[int]] = {}
    requests = [Request(i, prompt, 10) for i, prompt in enumerate(PROMPTS)]
    decoding = Decoding(
        GREEDY, NO_EOS, batch_size=2, on_tokens=lambda index, ids, _: seen.setdefault(index, []).extend(ids)
    )
    for generation in decode(lm, requests, decoding):
        assert seen[generation.index] == generation.new_token_ids


def test_each_token_is_read_once(lm):
    """A decoder without a KV cache reads the whole text for every token."""
    retriever = Retriever(datastore_near_text(lm, PROMPTS, 20), Acceptance(0.9))
    run(lm, [PROMPTS[2]], 1)  # looks for the cache that fits the model, which reads a few tokens more
    n_read = []
    handle = lm.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: n_read.append(inputs[0].numel())
    )
    try:
        (generation,) = run(lm, [PROMPTS[2]], 20, retriever)
    finally:
        handle.remove()
    assert generation.chunks
    assert n_read[0] == len(PROMPTS[2])
    assert len(n_read) == generation.stats.forward_passes
    # All but what the last step brought, which no one needs to read.
    assert 20 - 4 <= sum(n_read[1:]) < 20
