"""Verified generation is lossless: whatever the drafts, the text is the one that plain generation gives."""

import itertools

import numpy as np
import pytest
import torch
from architectures import tiny_lm
from test_decoding import GREEDY, NO_EOS, PROMPTS, datastore_near_text, run, trie

from utils.decoding.acceptance import Acceptance
from utils.datastore.store import Datastore
from utils.decoding.loop import Decoding, Request, decode
from utils.decoding.draft import NOTHING, DraftSettings, DraftTree, RetrievalDrafter, vote_line, vote_tree
from utils.decoding.retriever import Retriever
from utils.lm.sampling import Sampler


class FixedDrafter:
    """Drafts what a function of the text says."""

    def __init__(self, tree_of):
        self.tree_of = tree_of

    def draft(self, key, token_ids, hidden_state, max_depth):
        return self.tree_of(key, token_ids, max_depth)

    def observe(self, key, token_ids, hidden_states):
        assert len(token_ids) == len(hidden_states)

    def end(self, key):
        pass


def line(token_ids: list[int]) -> DraftTree:
    return DraftTree(token_ids, list(range(-1, len(token_ids) - 1)), [1.0] * len(token_ids))


def verified(lm, prompts, n_new, drafter, batch_size=1, sampler=GREEDY, eos=NO_EOS, prefetch_all=None):
    requests = [Request(i, prompt, n_new) for i, prompt in enumerate(prompts)]
    decoding = Decoding(sampler, eos, None, batch_size, drafter, prefetch_all=prefetch_all)
    return sorted(decode(lm, requests, decoding), key=lambda generation: generation.index)


def tokens(generations):
    return [generation.new_token_ids for generation in generations]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom"])
def test_greedy_text_is_generates_for_any_datastore(name, batch_size):
    lm = tiny_lm(name)
    wanted = [
        lm.model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=24)[0].tolist()[len(p) :] for p in PROMPTS
    ]
    for wrong, live in itertools.product((False, True), ("off", "sequence", "session")):
        drafter = RetrievalDrafter(datastore_near_text(lm, PROMPTS, 24, wrong), DraftSettings(live=live))
        got = verified(lm, PROMPTS, 24, drafter, batch_size)
        assert tokens(got) == wanted
        if not wrong:
            assert sum(generation.stats.forward_passes for generation in got) < 5 * 24


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kind", ["right", "wrong", "wrong at the last", "right in a wrong tree", "end of text inside"])
def test_adversarial_drafts_change_nothing_but_the_forward_passes(kind, name):
    lm = tiny_lm(name)
    plain = tokens(run(lm, PROMPTS, 30))
    eos = frozenset({plain[0][17]}) if kind == "end of text inside" else NO_EOS
    wanted = tokens(run(lm, PROMPTS, 30, eos=eos))

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
        got = verified(lm, PROMPTS, 30, FixedDrafter(tree_of), batch_size, eos=eos)
        assert tokens(got) == wanted
        forward_passes = [generation.stats.forward_passes for generation in got]
        if kind == "wrong":
            assert forward_passes == [30] * 5
        elif kind in ("right", "right in a wrong tree"):
            # The prompt's, then 8 tokens a pass: 30 = 8 + 8 + 8 + 6.
            assert forward_passes == [5] * 5


@pytest.mark.parametrize("shape", ["tree", "line"])
def test_a_sample_is_token_for_token_what_the_seed_gives_without_drafts(shape):
    lm = tiny_lm("gpt2")
    store = datastore_near_text(lm, PROMPTS, 20)
    for sampler in (Sampler.from_settings(1.0, None, None), Sampler.from_settings(0.7, 10, 0.9)):
        plain = tokens(run(lm, PROMPTS, 40, sampler=sampler))
        for prefetch_all in (False, True):
            drafter = RetrievalDrafter(store, DraftSettings(shape=shape, live="session"))
            assert tokens(verified(lm, PROMPTS, 40, drafter, 3, sampler, prefetch_all=prefetch_all)) == plain


def exact_distribution(lm, prompt: list[int], n_new: int, vocabulary: int) -> dict[tuple[int, ...], float]:
    """p of every continuation, by asking the LM about each."""
    probabilities = {}
    for continuation in itertools.product(range(vocabulary), repeat=n_new):
        _, logits = lm.forward(torch.tensor([prompt + list(continuation)]), use_cache=False)
        log_p = logits[0].double().log_softmax(-1)
        probabilities[continuation] = float(
            sum(log_p[len(prompt) - 1 + i, t] for i, t in enumerate(continuation)).exp()
        )
    return probabilities


def total_variation(lm, prompt, n_draws, exact, **how) -> float:
    counts = dict.fromkeys(exact, 0)
    decoding = Decoding(Sampler.from_settings(1.0, None, None), NO_EOS, batch_size=500, **how)
    for generation in decode(lm, [Request(i, prompt, 3) for i in range(n_draws)], decoding):
        counts[tuple(generation.new_token_ids)] += 1
    return 0.5 * sum(abs(counts[c] / n_draws - p) for c, p in exact.items())


def noise_floor(exact, n_draws) -> float:
    """The largest total variation of 20 samples of this size drawn from the exact distribution itself."""
    rng = np.random.default_rng(0)
    p = np.array(list(exact.values()))
    return max(0.5 * np.abs(rng.multinomial(n_draws, p / p.sum()) / n_draws - p).sum() for _ in range(20))


def test_samples_follow_the_models_distribution_and_those_of_chunk_mode_do_not():
    """100,000 verified draws with good drafts, and as many with bad ones."""
    lm, prompt, n_draws = tiny_lm("five tokens"), [1, 2], 100_000
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


def test_votes_add_up_on_the_prefix_tree():
    table = np.array([[1, 2, 3], [1, 2, 4], [6, -1, -1], [1, 5, -1], [-1, -1, -1]])
    weights = np.array([4.0, 3.0, 1.0, 2.0, 2.0])
    tree = vote_tree(table, weights, 4)
    assert (tree.token_ids, tree.parents) == ([1, 2, 3, 4], [-1, 0, 1, 1])
    assert np.allclose(tree.shares, [9 / 12, 7 / 12, 4 / 12, 3 / 12])
    whole = vote_tree(table, weights, 10)
    assert (whole.token_ids, whole.parents) == ([1, 6, 2, 5, 3, 4], [-1, -1, 0, 0, 2, 2])
    heaviest = vote_line(table, weights, 10)
    assert (heaviest.token_ids, heaviest.parents) == ([1, 2, 3], [-1, 0, 1])
    assert whole.heaviest_line().token_ids == [1, 2, 3]
    assert vote_tree(np.full((2, 3), -1), np.ones(2), 4) == NOTHING
    assert vote_line(np.full((2, 3), -1), np.ones(2), 4) == NOTHING


def brute_force_nodes(table: np.ndarray, weights: np.ndarray, max_tokens: int) -> dict[tuple[int, ...], float]:
    shares: dict[tuple[int, ...], float] = {}
    for row, weight in zip(table.tolist(), (weights / weights.sum()).tolist(), strict=True):
        path = tuple(itertools.takewhile(lambda token: token >= 0, row))
        for n in range(1, len(path) + 1):
            shares[path[:n]] = shares.get(path[:n], 0.0) + weight
    heaviest = sorted(shares, key=lambda path: (-round(shares[path], 12), len(path), path))[:max_tokens]
    return {path: shares[path] for path in heaviest}


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_holds_the_heaviest_prefixes(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 3, (30, 6))
    for row in table:
        row[rng.integers(0, 7) :] = -1
    weights = rng.random(30) if seed % 2 else np.ones(30)
    tree = vote_tree(table, weights, 12)
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.token_ids, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    wanted = brute_force_nodes(table, weights, 12)
    assert dict(zip(paths, tree.shares, strict=True)) == pytest.approx(wanted)


def test_live_places_draft_what_followed_the_same_pair_before():
    drafter = RetrievalDrafter(None, DraftSettings(live="session", max_tokens=3))
    vectors = torch.eye(8)
    drafter.observe(0, [1, 2, 3, 4, 5, 1, 2], vectors[:7])
    assert drafter.draft(0, [1, 2], vectors[0], 5).token_ids == [3, 4, 5]
    assert drafter.draft(1, [1, 2], vectors[0], 5) == NOTHING
    drafter.end(0)
    assert drafter.draft(1, [1, 2], vectors[0], 2).token_ids == [3, 4]
    sequence_only = RetrievalDrafter(None, DraftSettings(live="sequence"))
    sequence_only.observe(0, [1, 2, 3, 4], vectors[:4])
    sequence_only.end(0)
    assert sequence_only.draft(1, [1, 2], vectors[0], 5) == NOTHING


def test_a_vote_counts_less_the_further_ahead_it_looks():
    table, weights, decay = np.array([[1, 2, 3], [4, 5, 6]]), np.array([3.0, 1.0]), np.array([0.5, 1.0])
    tree = vote_tree(table, weights, 4, decay)
    # Shares 3/4, 3/8, 3/16 of the first row and 1/4 at each token of the second.
    assert (tree.token_ids, tree.parents) == ([1, 4, 2, 5], [-1, -1, 0, 1])
    assert np.allclose(tree.shares, [0.75, 0.25, 0.375, 0.25])
    line = vote_line(table, weights, 2, decay)
    assert (line.token_ids, line.parents) == ([1, 2], [-1, 0])
    assert np.allclose(line.shares, [0.75, 0.375])


def test_where_the_last_two_tokens_are_new_together_the_last_one_alone_drafts():
    vector = np.eye(1, 8)[0]
    store = Datastore.of([trie(1, [(vector, [2, 3])]), trie(2, [(vector, [7, 8]), (vector, [7, 9])])], 8)
    drafter = RetrievalDrafter(store, DraftSettings(live="sequence"))
    tree = drafter.draft(0, [5, 2], torch.ones(8), 5)
    assert (tree.token_ids, tree.parents) == ([7, 8, 9], [-1, 0, 0])
    assert np.allclose(tree.shares, [1, 0.3, 0.3])
    # Both know something: each source half of the votes.
    both = drafter.draft(0, [1, 2], torch.ones(8), 1)
    assert (both.token_ids, both.parents) == ([3, 7], [-1, -1])
    assert np.allclose(both.shares, [0.5, 0.5])


def test_draft_counts_tell_how_far_drafts_reached_and_were_accepted():
    lm = tiny_lm("llama")
    plain = tokens(run(lm, [PROMPTS[0]], 10))[0]
    fixed = FixedDrafter(lambda key, ids, depth: line([*plain[len(ids) - 4 :][:2], 99]) if depth > 3 else NOTHING)
    (generation,) = verified(lm, [PROMPTS[0]], 10, fixed)
    # Tokens 0 and 3 are drawn with two more accepted, 6 to 9 one by one, the last of which is not read.
    assert generation.stats.forward_passes == 1 + 2 + 3
    drafts = generation.stats.drafts
    assert (drafts.n_drafts, drafts.draft_tokens, drafts.accepted_tokens) == (2, 6, 4)
    assert (drafts.drafted, drafts.accepted) == ([2, 2, 2], [2, 2, 0])
