"""Drafts are the heaviest part of a vote, and live texts find what a search over every pair of positions finds."""

import itertools

import numpy as np
import pytest
import torch
from decoding_cases import trie

from utils.datastore.store import Datastore
from utils.decoding.draft import NO_TOKEN, NOTHING, DraftSettings, LiveTexts, RetrievalDrafter, vote_line, vote_tree

DEPTH = 4


# ---- Votes


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


def test_live_texts_draft_what_followed_the_same_pair_before():
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


def test_the_last_token_alone_drafts_where_the_pair_is_new():
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


# ---- Live texts


def brute_force(texts: list[tuple[list[int], np.ndarray]], entry, following, query, with_pair: bool):
    """(similarity, continuation) of each place of use, over separate texts."""
    found = []
    for token_ids, vectors in texts:
        for at in range(len(token_ids) - 2):
            if token_ids[at + 1] == following and (token_ids[at] == entry) == with_pair:
                after = token_ids[at + 2 : at + 2 + DEPTH]
                found.append((float(vectors[at] @ query), after + [NO_TOKEN] * (DEPTH - len(after))))
    return sorted(found, reverse=True)


def as_pairs(places):
    return sorted(zip(places[0].tolist(), places[1].tolist(), strict=True), reverse=True)


def random_text(rng, n: int) -> tuple[list[int], np.ndarray]:
    vectors = rng.normal(size=(n, 8)).astype(np.float32)
    return rng.integers(0, 3, n).tolist(), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("n_best", [3, 1000])
def test_live_texts_find_what_a_search_over_all_pairs_finds(n_best):
    rng = np.random.default_rng(0)
    texts = [random_text(rng, n) for n in (40, 1, 2, 300)]
    together = LiveTexts()
    for n_texts, (token_ids, vectors) in enumerate(texts, 1):
        one = LiveTexts()
        for start in range(0, len(token_ids), 7):
            # Vectors come in the length that the LM gives them.
            one.extend(token_ids[start : start + 7], 5 * torch.from_numpy(vectors[start : start + 7]))
        query = rng.normal(size=8).astype(np.float32)
        together.add_text(one, 10_000)
        for entry in range(3):
            context = (entry, 1, torch.from_numpy(query), DEPTH, n_best)
            for with_pair, search in ((True, "after_pair"), (False, "after_others")):
                for live, among in ((one, [(token_ids, vectors)]), (together, texts[:n_texts])):
                    wanted = brute_force(among, entry, 1, query, with_pair)[:n_best]
                    got = as_pairs(getattr(live, search)(*context))
                    assert [row for _, row in got] == [row for _, row in wanted]
                    assert np.allclose([s for s, _ in got], [s for s, _ in wanted], atol=1e-5)


def test_a_full_session_drops_its_oldest_half():
    session = LiveTexts()
    for token in range(10):
        text = LiveTexts()
        text.extend([token, 20, 30], torch.ones(3, 4))
        session.add_text(text, max_tokens=16)
        assert session.n_tokens <= 16
    query = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert session.after_pair(9, 20, query, 1, 5)[1].tolist() == [[30]]
    assert session.after_pair(8, 20, query, 1, 5)[1].tolist() == [[30]]
    assert session.after_pair(0, 20, query, 1, 5)[1].tolist() == []
