"""How much of a draft pays: the nodes whose expected gain is worth the longer forward pass, as measured in this run.

Where a forward pass over a few more tokens takes no longer, whole trees pay; on a CPU they often do not.
"""

from bisect import bisect
from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

from utils.decoding.draft import DraftTree

# Bins of a node's share of its parent's votes; for each, the policy learns how often its nodes are accepted.
SHARE_BINS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92])
# The prior of a bin: nodes are accepted as often as their share says, with the weight of so many observed nodes.
PRIOR_NODES = 4.0
N_KEPT_TIMES = 15
# Only what is tried can turn out to pay. Of the first passes every third verifies the whole draft, every third a part of
# it and every third none; later one in WHOLE_EVERY verifies it whole.
N_FIRST, WHOLE_EVERY = 18, 48
# Searches for drafts are judged separately in bins of the drafter's hint. While a bin's searches cost more than they
# bring, each doubles the passes until the next, up to LONGEST_WAIT. LAST_SEARCH is the weight of the last search.
HINT_BINS = (0.1, 0.2, 0.3, 0.45, 0.6)
LONGEST_WAIT, LAST_SEARCH = 64, 0.05


@dataclass
class _Searches:
    """Those of one bin: their average gain in tokens, and the passes from one to the next."""

    gain: float = 0.0
    wait: int = 1
    n_passes: int = 0  # since the last


class DraftPolicy:
    """Learns how long forward passes of each length take, and how often nodes are accepted; decides what to draft."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(_recent))
        self._n_passes: dict[int, int] = defaultdict(int)  # by the number of rows
        self._n_drafted = 0  # passes for which there was a draft
        self._searches = [_Searches() for _ in range(len(HINT_BINS) + 1)]
        n_bins = len(SHARE_BINS) + 1
        self._shares, self._accepted = np.zeros(n_bins), np.zeros(n_bins)

    def record_pass(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """Take note of the time of a forward pass over n_tokens tokens of each of n_rows sequences."""
        self._seconds[n_rows][n_tokens].append(seconds)
        self._n_passes[n_rows] += 1

    def should_draft(self, hint: float) -> bool:
        """Whether to search for a draft; hint: the drafter's estimate for its best first token, in [0, 1].

        True where the last searches with such hints brought more than they cost, or where one is due again.
        """
        searches = self._searches[bisect(HINT_BINS, hint)]
        searches.n_passes += 1
        return searches.n_passes >= searches.wait

    def record_search(self, hint: float, n_rows: int, n_tokens: int, n_accepted: int, seconds: float) -> None:
        """Take note of a search that led to a pass over n_tokens, with n_accepted accepted drafted tokens."""
        searches, timed = self._searches[bisect(HINT_BINS, hint)], self._seconds[n_rows]
        searches.n_passes = 0
        if self._n_passes[n_rows] <= N_FIRST or 1 not in timed or n_tokens not in timed:
            return
        plain, drafted = _median(timed[1]), _median(timed[n_tokens])
        # In tokens. A pass serves all rows, a search one.
        gain = n_accepted + 1 - drafted / plain - seconds * n_rows / plain
        searches.gain += LAST_SEARCH * (gain - searches.gain)
        searches.wait = 1 if searches.gain >= 0 else min(2 * searches.wait, LONGEST_WAIT)

    def record_draft(self, tree: DraftTree, accepted: list[int]) -> None:
        """Take note of the accepted nodes of a tree, a path; their siblings were rejected, the other nodes not reached."""
        shares = _shares_of_parent(tree)
        bins = np.searchsorted(SHARE_BINS, shares)
        reached = np.isin(tree.parents, [-1, *accepted])
        np.add.at(self._shares, bins[reached], shares[reached])
        np.add.at(self._accepted, bins[accepted], 1)

    def paying_parts(self, trees: list[DraftTree]) -> list[DraftTree]:
        """Of one tree per row, the shares that bring the most tokens a second; now and then whole trees, to try them.

        The longest tree determines the time of the pass, so all get the size that pays for all together.
        """
        n_nodes = max((len(tree.token_ids) for tree in trees), default=0)
        timed = self._seconds.get(len(trees))
        if not n_nodes or not timed:
            return trees
        n_passes = self._n_passes[len(trees)]
        self._n_drafted += 1
        if self._n_drafted % WHOLE_EVERY == 0:
            return trees
        chances = [self._chances(tree) for tree in trees]
        # A parent stands before its children and is as likely at least, so any first part of an order is a tree.
        orders = [np.argsort(-each, kind="stable") for each in chances]
        if n_passes < N_FIRST:
            n_kept = (n_nodes, 0, -(-n_nodes // 4))[n_passes % 3]
        else:
            gains = np.zeros(n_nodes)
            for each, order in zip(chances, orders, strict=True):
                gains[: len(order)] += each[order]
            lengths = sorted(timed)
            medians = np.maximum.accumulate([_median(timed[length]) for length in lengths])
            seconds = np.interp(np.arange(1, n_nodes + 2), lengths, medians)
            n_kept = int(np.argmax((len(trees) + np.concatenate([[0.0], np.cumsum(gains)])) / seconds))
        return [tree.part(sorted(order[:n_kept].tolist())) for tree, order in zip(trees, orders, strict=True)]

    def _chances(self, tree: DraftTree) -> np.ndarray:
        """(n_nodes,) probability that each node is accepted, none above its parent's."""
        # How much more often than their shares say a bin's nodes were accepted; close to 1 after few observations.
        factor = (self._accepted + PRIOR_NODES) / (self._shares + PRIOR_NODES)
        shares = _shares_of_parent(tree)
        chances = np.minimum(shares * factor[np.searchsorted(SHARE_BINS, shares)], 1.0)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                chances[node] *= chances[parent]
        return chances


def _shares_of_parent(tree: DraftTree) -> np.ndarray:
    """(n_nodes,) each node's share of its parent's votes."""
    return np.array(tree.shares) / np.array([*tree.shares, 1.0])[tree.parents]


def _recent() -> deque[float]:
    return deque(maxlen=N_KEPT_TIMES)


def _median(seconds: deque[float]) -> float:
    """The upper median. numpy's takes longer than the rest of a step's bookkeeping."""
    return sorted(seconds)[len(seconds) // 2]
