"""The LM mixed with n-grams of a text: the control that says what a datastore's vectors bring beyond its words.

    p_0 = p_LM,    p_o(x) = λ · count(c, x) / count(c) + (1 - λ) · p_{o-1}(x)

where c are the o - 1 tokens before x, of those that stand in the text, and λ is that of the order o and of how often c
stands there. All λ are those under which another text, the validation split, is likeliest, by EM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 9
# Contexts that stand in the text so often share a λ: once, twice, 3 to 4, 5 to 8, … times.
N_BUCKETS = 8
EM_STEPS = 100


@dataclass(frozen=True)
class NGramCounts:
    """How often contexts and n-grams of one order stand in a text; sorted hashes (C,) and counts (C,) of each."""

    contexts: np.ndarray
    context_counts: np.ndarray
    ngrams: np.ndarray
    ngram_counts: np.ndarray

    @classmethod
    def of(cls, passages: Sequence[np.ndarray], order: int) -> "NGramCounts":
        """passages: token ids of each; an n-gram lies within one."""
        contexts, ngrams = (np.concatenate(parts) for parts in zip(*(_hashes(p, order) for p in passages), strict=True))
        found = [np.unique(each, return_counts=True) for each in (contexts, ngrams)]
        return cls(*found[0], *found[1])

    def lookup(self, window: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        """(L - 1,) each: how often the context before each token but the first stands in the text, and with that token.

        0 where the window has fewer tokens before it.
        """
        found = np.zeros((2, len(window) - 1), dtype=np.int64)
        contexts, ngrams = _hashes(window, order)
        # A context of no token stands before the first one too, which nothing predicts.
        skipped = len(contexts) - (len(window) - max(order - 1, 1))
        first = max(order - 2, 0)
        found[0, first:] = _counts_of(contexts[skipped:], self.contexts, self.context_counts)
        found[1, first:] = _counts_of(ngrams[skipped:], self.ngrams, self.ngram_counts)
        return found[0], found[1]


def _hashes(token_ids: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """(max(L - order + 1, 0),) uint64 each: of the order - 1 tokens before each n-gram's last, and of all of it."""
    n = max(len(token_ids) - order + 1, 0)
    ids = token_ids.astype(np.uint64) + np.uint64(1)
    found = np.zeros(n, dtype=np.uint64)
    for ahead in range(order - 1):
        found = _mixed(found, ids[ahead : ahead + n])
    return found, _mixed(found, ids[order - 1 : order - 1 + n])


def _mixed(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The next hashes; splitmix64's steps, so that two that differ collide with a probability of about 2^-64."""
    z = (hashes ^ ids) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _counts_of(wanted: np.ndarray, hashes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    return np.where(hashes[at] == wanted, counts[at], 0)


@dataclass(frozen=True)
class NGramLM:
    """The mixture; weights (ORDERS, N_BUCKETS): λ of each order and bucket."""

    counts: tuple[NGramCounts, ...]
    weights: np.ndarray

    def log_probs(self, windows: Sequence[np.ndarray], of_lm: np.ndarray) -> np.ndarray:
        """(N,) log p of each window's tokens but the first, the windows one after the other; of_lm (N,): the LM's."""
        buckets, shares = _shares(self.counts, windows)
        return _mix(buckets, shares, self.weights, of_lm)[-1]


def fit(
    passages: Sequence[np.ndarray], windows: Sequence[np.ndarray], of_lm: np.ndarray, orders: int = ORDERS
) -> NGramLM:
    """The n-grams of some passages, with the λ under which the windows are likeliest; of_lm (N,) as of `log_probs`."""
    counts = tuple(NGramCounts.of(passages, order) for order in range(1, orders + 1))
    buckets, shares = _shares(counts, windows)
    weights = np.full((orders, N_BUCKETS), 0.2)
    for _ in range(EM_STEPS):
        below = _mix(buckets, shares, weights, of_lm)
        # From the highest order down: how likely it was that this one or a lower one gave the token.
        reached = np.ones(len(of_lm))
        for order in range(orders - 1, -1, -1):
            of_bucket = weights[order, np.maximum(buckets[order], 0)]
            is_known = buckets[order] >= 0
            here = np.where(is_known, of_bucket * shares[order] / np.exp(below[order + 1]), 0.0) * reached
            totals = np.bincount(buckets[order][is_known], reached[is_known], N_BUCKETS)
            taken = np.bincount(buckets[order][is_known], here[is_known], N_BUCKETS)
            weights[order] = np.where(totals > 0, taken / np.maximum(totals, 1e-300), weights[order]).clip(
                1e-9, 1 - 1e-9
            )
            reached = reached - here
    return NGramLM(counts, weights)


def _shares(counts: Sequence[NGramCounts], windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(ORDERS, N) each: the bucket of each token's context, -1 where it is unknown, and count(c, x) / count(c)."""
    found = [
        [np.concatenate(parts) for parts in zip(*(of.lookup(window, order) for window in windows), strict=True)]
        for order, of in enumerate(counts, start=1)
    ]
    contexts, ngrams = (np.stack([each[i] for each in found]) for i in range(2))
    buckets = np.ceil(np.log2(np.maximum(contexts, 1))).astype(int).clip(max=N_BUCKETS - 1)
    return np.where(contexts > 0, buckets, -1), ngrams / np.maximum(contexts, 1)


def _mix(buckets: np.ndarray, shares: np.ndarray, weights: np.ndarray, of_lm: np.ndarray) -> np.ndarray:
    """(ORDERS + 1, N) log p_o of each order, the LM's first."""
    found = [np.exp(of_lm)]
    for bucket, share, of_order in zip(buckets, shares, weights, strict=True):
        weight = np.where(bucket >= 0, of_order[np.maximum(bucket, 0)], 0.0)
        found.append(weight * share + (1 - weight) * found[-1])
    return np.log(np.stack(found))
