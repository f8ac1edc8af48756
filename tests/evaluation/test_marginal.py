"""The sum over segmentations equals their enumeration, and EM finds the map that made a text."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from utils.decoding.acceptance import AcceptanceMap, NeighborMixture
from utils.evaluation.marginal import (
    Neighbors,
    Proposals,
    expected_chunk_tokens,
    fit_map,
    gains,
    log_likelihoods,
    posteriors,
)


def random_proposals(rng: np.random.Generator, lengths: list[int]) -> Proposals:
    n = sum(lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])
    chunk_lengths = np.minimum(rng.integers(0, 5, n), left)
    agreeing = np.where(rng.random(n) < 0.6, chunk_lengths, rng.integers(0, np.maximum(chunk_lengths, 1)))
    similarities = np.where(chunk_lengths > 0, rng.uniform(-1, 1, n), np.nan)
    return Proposals(np.array(lengths), np.log(rng.uniform(0.01, 1, n)), similarities, chunk_lengths, agreeing)


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


def test_accepting_nothing_gives_the_base_lm_to_the_last_digit():
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
            np.array([len(chunk) * (text[i : i + len(chunk)] == chunk) for i, chunk in enumerate(cut)]),
        )
        of_entries = q[list(entries)]
        got = float(log_likelihoods(proposals, of_entries[None])[0, 0])
        columns = (proposals.log_probs, proposals.chunk_lengths, proposals.matches)
        assert got == pytest.approx(enumerated(*columns, of_entries), abs=1e-12)
        total += float(np.exp(got))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_posteriors_equal_those_of_forbidding_each_proposal():
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


def sampled(g: AcceptanceMap, n_windows: int, rng: np.random.Generator, n_ids: int = 5) -> Proposals:
    """Texts drawn from a CD-LM with a known g: random chunks of two tokens, and an LM that finds all tokens alike.

    What is rejected agrees with the text by chance all the same, so that z is not to be seen.
    """
    length = 60
    similarities = rng.uniform(0, 1, (n_windows, length))
    chunks = rng.integers(0, n_ids, (n_windows, length, 2))
    text = rng.integers(0, n_ids, (n_windows, length + 2))
    for window in range(n_windows):
        at = 0
        while at < length:
            if rng.random() < g(similarities[window, at]):
                text[window, at : at + 2] = chunks[window, at]
                at += 2
            else:
                at += 1
    left = np.minimum(np.arange(length, 0, -1), 2)
    same = np.stack([chunks[:, :, i] == text[:, i : length + i] for i in range(2)], axis=2)
    agreeing = np.minimum(same.cumprod(axis=2).sum(axis=2), left)
    n = n_windows * length
    columns = (np.full(n, -np.log(n_ids)), similarities.ravel(), np.tile(left, n_windows), agreeing.ravel())
    return Proposals(np.full(n_windows, length), *columns)


KNOWN = AcceptanceMap((0.0, 0.5, 1.0), (0.05, 0.2, 0.8))


def test_em_never_lowers_the_likelihood_and_beats_every_other_map():
    proposals = sampled(KNOWN, 200, np.random.default_rng(0))
    fitted, history = fit_map(proposals, 0.999, n_knots=9)
    assert all(after >= before - 1e-7 for before, after in itertools.pairwise(history))
    assert list(fitted.probabilities) == sorted(fitted.probabilities)
    constant, of_constant = fit_map(proposals, 0.999, n_knots=1)
    assert all(after >= before - 1e-7 for before, after in itertools.pairwise(of_constant))
    likelihood = [log_likelihoods(proposals, g(proposals.similarities)[None]).sum() for g in (fitted, constant, KNOWN)]
    assert likelihood[0] > likelihood[1]
    assert likelihood[0] >= likelihood[2] - 1


def test_em_finds_the_map_that_made_the_text():
    """The interval of 99.9% around the mean of the maps fitted to twelve texts, at ten similarities."""
    rng = np.random.default_rng(1)
    at = np.linspace(0.05, 0.95, 10)
    found = np.stack([fit_map(sampled(KNOWN, 80, rng), 0.999, n_knots=5)[0](at) for _ in range(12)])
    errors = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - KNOWN(at)) < 4.4 * errors).all()
    assert errors.max() < 0.02


def test_gains_add_up_to_the_distance_from_the_base_lm():
    rng = np.random.default_rng(2)
    proposals = random_proposals(rng, [40, 1, 25])
    q = rng.uniform(0, 1, 66) * (proposals.chunk_lengths > 0)
    found = gains(proposals, q)
    total = log_likelihoods(proposals, q[None])[0]
    for window, part in enumerate(proposals.windows()):
        assert found[part].sum() == pytest.approx(total[window] - proposals.log_probs[part].sum(), abs=1e-9)
    wrong = ~proposals.matches
    assert found[wrong] == pytest.approx(np.log1p(-q[wrong]))
    only = np.where(np.arange(66) == np.flatnonzero(proposals.matches[:40])[0], q, 0)
    assert np.flatnonzero(np.abs(gains(proposals, only)) > 1e-9).tolist() == np.flatnonzero(only).tolist()


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_cut_chunks_are_those_of_a_datastore_of_short_chunks(n_tokens):
    proposals = random_proposals(np.random.default_rng(4), [300])
    cut = proposals.cut(n_tokens)
    assert cut.chunk_lengths.tolist() == [min(n, n_tokens) for n in proposals.chunk_lengths.tolist()]
    agree = proposals.agreeing >= cut.chunk_lengths
    assert cut.matches.tolist() == (agree & (proposals.chunk_lengths > 0)).tolist()
    assert (cut.matches >= proposals.matches).all()
    assert cut.matches.sum() > proposals.matches.sum()


def test_em_rejects_chunks_that_never_match():
    never = random_proposals(np.random.default_rng(5), [30, 30])
    never = replace(never, agreeing=np.zeros(60, dtype=int))
    fitted, history = fit_map(never, 0.999)
    assert max(fitted.probabilities) < 1e-3
    assert history[-1] == pytest.approx(never.log_probs.sum(), abs=1e-2)


def test_em_refuses_a_text_without_proposals():
    lengths = np.array([30, 30])
    nothing = Proposals(lengths, np.full(60, -1.0), np.full(60, np.nan), *np.zeros((2, 60), dtype=int))
    with pytest.raises(ValueError, match="proposes nothing"):
        fit_map(nothing, 0.999)


# ---- K rows that propose


def random_neighbors(rng: np.random.Generator, lengths: list[int], k: int) -> Proposals:
    """As `random_proposals`, of up to k rows, most similar first."""
    n = sum(lengths)
    left = np.concatenate([np.arange(length, 0, -1) for length in lengths])[:, None]
    n_rows = rng.integers(0, k + 1, n)
    there = np.arange(k) < n_rows[:, None]
    chunk_lengths = np.where(there, np.minimum(rng.integers(1, 5, (n, k)), left), 0)
    agreeing = np.minimum(np.where(rng.random((n, k)) < 0.5, 4, rng.integers(0, 3, (n, k))), chunk_lengths)
    similarities = np.where(there, -np.sort(-rng.uniform(-1, 1, (n, k)), axis=1), np.nan)
    log_probs = np.log(rng.uniform(0.01, 1, n))
    columns = (similarities, chunk_lengths, agreeing)
    neighbors = Neighbors(*columns, np.log(rng.uniform(0.01, 1, (n, k))))
    return Proposals(np.array(lengths), log_probs, *(each[:, 0] for each in columns), neighbors)


def length_probability(n_tokens: int, chunk_length: int, continuation: tuple[float, ...]) -> float:
    """That of a chunk the first tokens are proposed, by one decision after the other."""
    rho = [continuation[min(j, len(continuation) - 1)] for j in range(chunk_length - 1)]
    going_on = float(np.prod(rho[: n_tokens - 1]))
    return going_on if n_tokens == chunk_length else going_on * (1 - rho[n_tokens - 1])


def summed_over_rows(
    neighbors: Neighbors, log_probs: np.ndarray, q: np.ndarray, mixture: NeighborMixture, at: int = 0
) -> float:
    """The probability of the text from a position on: every row and length that may be drawn, one by one."""
    if at == len(log_probs):
        return 1.0
    total = (1 - q[at]) * np.exp(log_probs[at]) * summed_over_rows(neighbors, log_probs, q, mixture, at + 1)
    known = ~np.isnan(neighbors.similarities[at])
    weights = np.exp(neighbors.similarities[at][known] / mixture.temperature)
    weights *= np.exp(neighbors.first_log_probs[at][known]) ** mixture.lm_power
    for k, weight in enumerate(weights / weights.sum()):
        for n_tokens in range(1, int(neighbors.agreeing[at, k]) + 1):
            drawn = weight * length_probability(n_tokens, neighbors.chunk_lengths[at, k], mixture.continuation)
            total += q[at] * drawn * summed_over_rows(neighbors, log_probs, q, mixture, at + n_tokens)
    return total


@pytest.mark.parametrize("lm_power", [0.0, 0.25, 1.5])
@pytest.mark.parametrize("continuation", [(1.0,), (0.6,), (0.3, 0.9, 0.5)])
def test_the_sum_over_rows_and_lengths_equals_one_by_one(continuation, lm_power):
    rng = np.random.default_rng(6)
    mixture = NeighborMixture(3, 0.4, continuation, lm_power)
    proposals = random_neighbors(rng, [1, 6, 3, 8], 3)
    q = rng.uniform(0, 1, (2, 18)) * (proposals.chunk_lengths > 0)
    got = log_likelihoods(proposals, q, mixture)
    neighbors = proposals.neighbors
    for s in range(2):
        for w, part in enumerate(proposals.windows()):
            of_window = neighbors.map(lambda values, part=part: values[part])
            wanted = summed_over_rows(of_window, proposals.log_probs[part], q[s, part], mixture)
            assert got[s, w] == pytest.approx(np.log(wanted), abs=1e-12)
    assert gains(proposals, q[0], mixture).sum() == pytest.approx(got[0].sum() - proposals.log_probs.sum(), abs=1e-9)


def test_one_row_and_whole_chunks_are_the_papers_rule_to_the_last_digit():
    rng = np.random.default_rng(7)
    proposals = random_neighbors(rng, [60, 5, 33], 4)
    q = rng.uniform(0, 1, (2, 98)) * (proposals.chunk_lengths > 0)
    one = NeighborMixture(1)
    assert log_likelihoods(proposals.nearest(1), q, one).tolist() == log_likelihoods(proposals, q).tolist()
    found, wanted = posteriors(proposals.nearest(1), q[0], one), posteriors(proposals, q[0])
    assert found.accepted.tolist() == wanted.accepted.tolist()
    brought = wanted.accepted @ proposals.chunk_lengths
    assert expected_chunk_tokens(proposals, q[0]) == pytest.approx(brought, abs=1e-9)


def toy_chunks(rng: np.random.Generator) -> tuple[list[list[tuple[int, ...]]], np.ndarray]:
    """Of a vocabulary of 3: up to three chunks of each entry token, and their similarities, descending."""
    chunks = [[(1, 2), (1,), (0, 0, 2)], [(0,), (2, 2, 0, 1, 1, 1)], [(2, 1, 0)]]
    similarities = np.full((3, 3), np.nan)
    for entry, of_entry in enumerate(chunks):
        similarities[entry, : len(of_entry)] = -np.sort(-rng.uniform(0, 1, len(of_entry)))
    return chunks, similarities


def of_text(text, entries, chunks, similarities, p) -> Proposals:
    n = len(text)
    columns = np.zeros((2, n, 3), dtype=int)
    for i, entry in enumerate(entries):
        for k, chunk in enumerate(chunks[entry]):
            cut = chunk[: n - i]
            columns[0, i, k] = len(cut)
            pairs = zip(cut, text[i:], strict=False)
            columns[1, i, k] = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    neighbors = Neighbors(similarities[list(entries)], *columns, np.zeros((n, 3)))
    log_probs = np.log([p[entry, token] for entry, token in zip(entries, text, strict=True)])
    return Proposals(np.array([n]), log_probs, neighbors.similarities[:, 0], *columns[:, :, 0], neighbors)


def test_with_k_rows_the_probabilities_of_all_continuations_add_up_to_one_and_are_those_of_the_generator():
    rng = np.random.default_rng(8)
    p, q = rng.dirichlet(np.ones(3), size=3), rng.uniform(0.2, 0.9, 3)
    chunks, similarities = toy_chunks(rng)
    mixture = NeighborMixture(3, 0.3, (0.7, 0.4))
    wanted = {}
    for text in itertools.product(range(3), repeat=4):
        entries = (0, *text[:-1])
        proposals = of_text(text, entries, chunks, similarities, p)
        wanted[text] = float(np.exp(log_likelihoods(proposals, q[None, list(entries)], mixture)[0, 0]))
    assert sum(wanted.values()) == pytest.approx(1.0, abs=1e-12)
    n_draws = 40_000
    counts = dict.fromkeys(wanted, 0)
    for _ in range(n_draws):
        text = [0]
        while len(text) < 5:
            entry = text[-1]
            if rng.random() < q[entry]:
                lengths = np.array([len(chunk) for chunk in chunks[entry]])
                row, n_tokens = mixture.draw(similarities[entry, : len(lengths)], None, lengths, rng.random())
                text += chunks[entry][row][:n_tokens]
            else:
                text.append(int(rng.choice(3, p=p[entry])))
        counts[tuple(text[1:5])] += 1
    statistic = sum((counts[text] - n_draws * share) ** 2 / (n_draws * share) for text, share in wanted.items())
    assert statistic < 80 + 4 * np.sqrt(2 * 80)  # χ² of 80 degrees of freedom


def test_em_of_a_mixture_never_lowers_the_likelihood_and_beats_one_row():
    rng = np.random.default_rng(9)
    proposals = random_neighbors(rng, [50] * 30, 4)
    fitted, history = fit_map(proposals, 0.999, n_knots=5, n_neighbors=4, prefixes=True)
    assert all(after >= before - 1e-7 for before, after in itertools.pairwise(history))
    assert fitted.mixture is not None
    assert fitted.mixture.n_neighbors == 4
    assert all(0 <= rho <= 1 for rho in fitted.mixture.continuation)
    q = np.where(np.isnan(proposals.similarities), 0, fitted(proposals.similarities))
    assert log_likelihoods(proposals, q[None], fitted.mixture).sum() == pytest.approx(history[-1], abs=1e-6)
    for rho in fitted.mixture.continuation[:3]:
        for other in (rho - 0.05, rho + 0.05):
            tried = tuple(min(max(other, 0), 1) if each == rho else each for each in fitted.mixture.continuation)
            worse = log_likelihoods(proposals, q[None], replace(fitted.mixture, continuation=tried)).sum()
            assert worse <= history[-1] + 1e-2  # EM stops within 1e-8 a position
    assert history[-1] > fit_map(proposals, 0.999, n_knots=5)[1][-1]
