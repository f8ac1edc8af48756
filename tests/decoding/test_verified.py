"""Verified generation is lossless: whatever the drafts, the text is the one that plain generation gives."""

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from architectures import tiny_lm
from decoding_cases import NO_EOS, PROMPTS, datastore_near_text, generate, line, new_tokens, trie

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.draft import NOTHING, DraftSettings, DraftTree, RetrievalDrafter
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Request
from utils.lm.sampling import Sampler


class FixedDrafter:
    """Drafts what a function of the text says."""

    def __init__(self, tree_of):
        self.tree_of = tree_of

    def hint(self, token_ids):
        return 1.0

    def draft(self, key, token_ids, hidden_state, max_depth):
        return self.tree_of(key, token_ids, max_depth)

    def observe(self, key, token_ids, hidden_states):
        assert len(token_ids) == len(hidden_states)

    def end(self, key):
        pass


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom"])
def test_greedy_text_equals_generate_for_any_datastore(name, batch_size):
    lm = tiny_lm(name)
    wanted = [
        lm.model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=24)[0].tolist()[len(p) :] for p in PROMPTS
    ]
    kinds: tuple[Literal["off", "sequence", "session"], ...] = ("off", "sequence", "session")
    for wrong, live in itertools.product((False, True), kinds):
        drafter = RetrievalDrafter(datastore_near_text(lm, PROMPTS, 24, wrong), DraftSettings(live=live))
        got = generate(lm, PROMPTS, 24, drafter=drafter, batch_size=batch_size)
        assert new_tokens(got) == wanted
        if not wrong:
            assert sum(generation.stats.forward_passes for generation in got) < 5 * 24


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kind", ["right", "wrong", "wrong at the last", "right in a wrong tree", "end of text inside"])
def test_adversarial_drafts_change_only_the_forward_passes(kind, name):
    lm = tiny_lm(name)
    plain = new_tokens(generate(lm, PROMPTS, 30))
    eos = frozenset({plain[0][17]}) if kind == "end of text inside" else NO_EOS
    wanted = new_tokens(generate(lm, PROMPTS, 30, eos=eos))

    def tree_of(key, token_ids, max_depth):
        rest = plain[key][len(token_ids) - len(PROMPTS[key]) :][:7]
        other = [(token + 1) % 100 for token in rest]
        if not rest:
            return NOTHING
        if kind == "right in a wrong tree":
            # Two branches at each depth, the right one second.
            token_ids, parents = [], []
            for depth, (bad, good) in enumerate(zip(other, rest, strict=True)):
                token_ids += [bad, good]
                parents += [2 * depth - 1] * 2
            return DraftTree(token_ids, parents, [1.0] * len(parents))
        drafted = {"wrong": other, "wrong at the last": rest[:-1] + other[-1:]}.get(kind, rest)
        return line(drafted)

    for batch_size in (1, 5):
        got = generate(lm, PROMPTS, 30, drafter=FixedDrafter(tree_of), batch_size=batch_size, eos=eos)
        assert new_tokens(got) == wanted
        forward_passes = [generation.stats.forward_passes for generation in got]
        if kind == "wrong":
            assert forward_passes == [30] * 5
        elif kind in ("right", "right in a wrong tree"):
            # The prompt's, then 8 tokens a pass: 30 = 8 + 8 + 8 + 6.
            assert forward_passes == [5] * 5


@pytest.mark.parametrize("shape", ["tree", "line"])
def test_a_seeds_sample_is_the_same_with_and_without_drafts(shape):
    lm = tiny_lm("gpt2")
    store = datastore_near_text(lm, PROMPTS, 20)
    for sampler in (Sampler.from_settings(1.0, None, None), Sampler.from_settings(0.7, 10, 0.9)):
        plain = new_tokens(generate(lm, PROMPTS, 40, sampler=sampler))
        for prefetch_all in (False, True):
            drafter = RetrievalDrafter(store, DraftSettings(shape=shape, live="session"))
            how: dict[str, Any] = {
                "batch_size": 3,
                "sampler": sampler,
                "drafter": drafter,
                "prefetch_all": prefetch_all,
            }
            assert new_tokens(generate(lm, PROMPTS, 40, **how)) == plain


def exact_distribution(lm, prompt: list[int], n_new: int, vocabulary: int) -> dict[tuple[int, ...], float]:
    """p of every continuation, by asking the LM about each."""
    probabilities = {}
    for continuation in itertools.product(range(vocabulary), repeat=n_new):
        _, logits = lm.forward(torch.tensor([prompt + list(continuation)]))
        log_p = logits[0].double().log_softmax(-1)
        probabilities[continuation] = float(
            sum(log_p[len(prompt) - 1 + i, t] for i, t in enumerate(continuation)).exp()
        )
    return probabilities


def total_variation(lm, prompt, n_draws, exact, **how) -> float:
    counts = dict.fromkeys(exact, 0)
    decoding = Decoding(Sampler.from_settings(1.0, None, None), NO_EOS, batch_size=2000, **how)
    for generation in decode(lm, [Request(i, prompt, 3) for i in range(n_draws)], decoding):
        counts[tuple(generation.new_token_ids)] += 1
    return 0.5 * sum(abs(counts[c] / n_draws - p) for c, p in exact.items())


def noise_floor(exact, n_draws) -> float:
    """The largest total variation of 20 samples of this size drawn from the exact distribution itself."""
    rng = np.random.default_rng(0)
    p = np.array(list(exact.values()))
    return max(0.5 * np.abs(rng.multinomial(n_draws, p / p.sum()) / n_draws - p).sum() for _ in range(20))


def test_samples_follow_the_lms_distribution_unlike_chunk_modes():
    """40,000 verified draws with good drafts, and as many with bad ones."""
    lm, prompt, n_draws = tiny_lm("five tokens"), [1, 2], 40_000
    with torch.inference_mode():
        exact = exact_distribution(lm, prompt, 3, 5)
    floor = noise_floor(exact, n_draws)
    likeliest = sorted(exact, key=exact.__getitem__)
    for draft in (likeliest[-1], likeliest[0]):
        fixed = FixedDrafter(lambda key, ids, depth, draft=draft: line(list(draft[len(ids) - len(prompt) :])))
        assert total_variation(lm, prompt, n_draws, exact, drafter=fixed) < 1.1 * floor
    vectors = [np.eye(1, lm.hidden_size, i)[0] for i in range(5)]
    tries = [trie(entry, [(vector, list(likeliest[-1])) for vector in vectors]) for entry in range(5)]
    chunks = Retriever(Datastore.of(tries, lm.hidden_size), Acceptance(0.1))
    assert total_variation(lm, prompt, 5_000, exact, retriever=chunks) > 3 * noise_floor(exact, 5_000)


def test_draft_counts_say_how_far_drafts_reached_and_held():
    lm = tiny_lm("llama")
    plain = new_tokens(generate(lm, [PROMPTS[0]], 10))[0]
    fixed = FixedDrafter(lambda key, ids, depth: line([*plain[len(ids) - 4 :][:2], 99]) if depth > 3 else NOTHING)
    (generation,) = generate(lm, [PROMPTS[0]], 10, drafter=fixed)
    # Tokens 0 and 3 are drawn with two more accepted, 6 to 9 one by one, the last of which is not read.
    assert generation.stats.forward_passes == 1 + 2 + 3
    drafts = generation.stats.drafts
    assert drafts is not None
    assert (drafts.n_drafts, drafts.draft_tokens, drafts.accepted_tokens) == (2, 6, 4)
    assert (drafts.drafted, drafts.accepted) == ([2, 2, 2], [2, 2, 0])
