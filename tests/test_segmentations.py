"""The sum over segmentations equals their enumeration, and EM finds the map that made a text."""

import itertools

import numpy as np
import pytest

from utils.acceptance import AcceptanceMap
from utils.segmentations import Proposals, fit_map, log_likelihoods, posteriors


def random_proposals(rng: np.random.Generator, lengths: list[int]) -> Proposals:
    n = sum(lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])
    chunk_lengths = np.minimum(rng.integers(0, 5, n), left)
    matches = (chunk_lengths > 0) & (rng.random(n) < 0.6)
    similarities = np.where(chunk_lengths > 0, rng.uniform(-1, 1, n), np.nan)
    return Proposals(np.array(lengths), np.log(rng.uniform(0.01, 1, n)), similarities, chunk_lengths, matches)


def enumerated(log_probs, chunk_lengths, matches, q) -> float:
    """Every way to cut the window into chunks and tokens, one by one."""
    n, total = len(log_probs), 0.0
    for accepted in itertools.product((False, True), repeat=n):
        at, probability, used = 0, 1.0, []
        while at < n:
            used.append(at)
            if accepted[at]:
                if not matches[at] or not chunk_lengths[at]:
                    probability = 0.0
                    break
                probability *= q[at]
                at += int(chunk_lengths[at])
            else:
                probability *= (1 - q[at]) * np.exp(log_probs[at])
                at += 1
        # Decisions at positions that a chunk skips are not made: count each segmentation once.
        if probability and not any(accepted[i] for i in range(n) if i not in used):
            total += probability
    return float(np.log(total))


@pytest.mark.parametrize("seed", range(8))
def test_the_sum_equals_an_enumeration_of_every_segmentation(seed):
    rng = np.random.default_rng(seed)
    lengths = [1, 7, 4, 9, 2]
    proposals = random_proposals(rng, lengths)
    q = rng.uniform(0, 1, (3, sum(lengths))) * (proposals.chunk_lengths > 0)
    q[2] *= rng.random(sum(lengths)) < 0.5
    got = log_likelihoods(proposals, q)
    for s in range(3):
        for w, part in enumerate(proposals.windows()):
            wanted = enumerated(
                proposals.log_probs[part], proposals.chunk_lengths[part], proposals.matches[part], q[s, part]
            )
            assert got[s, w] == pytest.approx(wanted, abs=1e-12)


def test_nothing_accepted_is_the_base_lm_to_the_last_digit():
    proposals = random_proposals(np.random.default_rng(0), [5, 300, 17])
    got = log_likelihoods(proposals, np.zeros((1, 322)))
    assert got[0].tolist() == pytest.approx([proposals.log_probs[part].sum() for part in proposals.windows()], abs=1e-9)


def test_probabilities_of_all_continuations_add_up_to_one():
    """A vocabulary of 3, texts of 5 tokens, a chunk for every token, a map of its own for each."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(3), size=3), rng.uniform(0.1, 0.9, 3)
    chunks = [(1, 2), (0,), (2, 2, 0, 1, 1, 1)]
    total = 0.0
    for text in itertools.product(range(3), repeat=5):
        entries = (0, *text[:-1])
        cut = [chunks[entry][: 5 - i] for i, entry in enumerate(entries)]
        proposals = Proposals(
            np.array([5]),
            np.log([p[entry, token] for entry, token in zip(entries, text, strict=True)]),
            np.zeros(5),
            np.array([len(chunk) for chunk in cut]),
            np.array([text[i : i + len(chunk)] == chunk for i, chunk in enumerate(cut)]),
        )
        total += float(np.exp(log_likelihoods(proposals, q[None, list(entries)])[0, 0]))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_posteriors_are_those_of_the_enumeration():
    rng = np.random.default_rng(3)
    proposals = random_proposals(rng, [6])
    q = rng.uniform(0.1, 0.9, 6) * (proposals.chunk_lengths > 0)
    found = posteriors(proposals, q)
    whole = np.exp(found.log_likelihood)
    for n in range(6):
        forbidden = q.copy()
        forbidden[n] = 0
        without = np.exp(log_likelihoods(proposals, forbidden[None])[0, 0])
        # With z_n never 1 the rejected share is scaled by 1 / (1 - q_n).
        rest = 1 - found.accepted[n] - found.rejected[n]
        assert without / whole == pytest.approx(rest + found.rejected[n] / (1 - q[n]))


def sampled(g: AcceptanceMap, n_windows: int, rng: np.random.Generator) -> Proposals:
    """Texts from a CD-LM with a known g over 50 tokens: chunks of 3 that only an accepted proposal brings."""
    parts = []
    for _ in range(n_windows):
        length, at = 60, 0
        similarities = rng.uniform(0, 1, length)
        matches = np.zeros(length, dtype=bool)
        while at < length:
            if rng.random() < g(similarities[at]):
                matches[at] = True
                at += 3
            else:
                at += 1
        left = np.arange(length, 0, -1)
        parts.append((np.full(length, np.log(0.02)), similarities, np.minimum(3, left), matches))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Proposals(np.full(n_windows, 60), *columns)


def test_em_never_lowers_the_likelihood_and_finds_the_map_that_made_the_text():
    g = AcceptanceMap((0.0, 0.5, 1.0), (0.05, 0.2, 0.8))
    proposals = sampled(g, 400, np.random.default_rng(0))
    fitted, history = fit_map(proposals, 0.999, n_knots=9)
    assert all(after >= before - 1e-7 for before, after in itertools.pairwise(history))
    assert list(fitted.probabilities) == sorted(fitted.probabilities)
    at = np.linspace(0.05, 0.95, 10)
    # About 1,300 positions decide each knot: three standard errors of a share are 0.04.
    assert np.abs(fitted(at) - g(at)).max() < 0.05
    constant, _ = fit_map(proposals, 0.999, n_knots=1)
    likelihood = [
        log_likelihoods(proposals, each(proposals.similarities)[None]).sum() for each in (fitted, constant, g)
    ]
    assert likelihood[0] > likelihood[1]
    assert likelihood[0] >= likelihood[2] - 1e-6


def test_em_on_chunks_that_never_match_or_a_text_without_proposals():
    rng = np.random.default_rng(5)
    never = random_proposals(rng, [30, 30])
    never = Proposals(never.lengths, never.log_probs, never.similarities, never.chunk_lengths, np.zeros(60, dtype=bool))
    fitted, history = fit_map(never, 0.999)
    assert max(fitted.probabilities) < 1e-3
    assert history[-1] == pytest.approx(never.log_probs.sum(), abs=1e-2)
    nothing = Proposals(never.lengths, never.log_probs, np.full(60, np.nan), np.zeros(60, dtype=int), never.matches)
    with pytest.raises(ValueError, match="proposes nothing"):
        fit_map(nothing, 0.999)
