"""Live texts find what a search over every pair of positions finds."""

import numpy as np
import pytest
import torch

from utils.decoding.draft import NO_TOKEN, LiveTexts

DEPTH = 4


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
def test_the_most_similar_places_of_ended_texts_and_of_one_read_in_parts(n_best):
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


def test_too_many_tokens_cost_the_oldest_half():
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
