"""How large a draft pays: the nodes whose expected gain is worth the longer forward pass, by what this run measured.

On a device where a forward pass over a few more tokens takes no longer, whole trees pay; on a CPU they often do not.
"""

from collections import defaultdict, deque

import numpy as np

from utils.drafting import DraftTree

# A drafter's shares of votes, in bins of which each learns how often its nodes are accepted.
SHARE_BINS = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95])
# What is believed of a bin before it was seen: the share itself, as strongly as this many nodes.
PRIOR_NODES = 4.0
N_KEPT_TIMES = 15
# These first drafts, and later each one after so many, are verified whole: what is never tried is never known to pay.
N_FIRST_WHOLE, WHOLE_EVERY = 12, 24


class DraftCosts:
    """Seconds of forward passes by their length, and acceptance of nodes by their share of votes."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(_recent))
        self._n_asked = 0
        n_bins = len(SHARE_BINS) + 1
        self._nodes, self._shares, self._accepted = np.zeros(n_bins), np.zeros(n_bins), np.zeros(n_bins)

    def saw_pass(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A forward pass over n_tokens tokens of each of n_rows sequences took so long."""
        self._seconds[n_rows][n_tokens].append(seconds)

    def saw_draft(self, tree: DraftTree, accepted: list[int]) -> None:
        """Of the tree's nodes these were accepted."""
        bins = np.searchsorted(SHARE_BINS, tree.shares)
        np.add.at(self._nodes, bins, 1)
        np.add.at(self._shares, bins, tree.shares)
        np.add.at(self._accepted, bins[accepted], 1)

    def paying_part(self, tree: DraftTree, n_rows: int) -> DraftTree:
        """The part of the tree that brings the most tokens a second; now and then all of it, to find out."""
        timed = self._seconds.get(n_rows)
        if not tree.token_ids:
            return tree
        self._n_asked += 1
        if not timed or self._n_asked <= N_FIRST_WHOLE or self._n_asked % WHOLE_EVERY == 0:
            return tree
        chances = self._chances(tree)
        # A parent stands before its children and is as likely at least, so any first part of the order is a tree.
        order = np.argsort(-chances, kind="stable")
        lengths = sorted(timed)
        medians = np.maximum.accumulate([float(np.median(timed[length])) for length in lengths])
        seconds = np.interp(np.arange(1, len(order) + 2), lengths, medians)
        expected = 1 + np.concatenate([[0.0], np.cumsum(chances[order])])
        return tree.part(sorted(order[: int(np.argmax(expected / seconds))].tolist()))

    def _chances(self, tree: DraftTree) -> np.ndarray:
        """(n_nodes,) probability that each node is accepted, none above its parent's."""
        bins = np.searchsorted(SHARE_BINS, tree.shares)
        # How much more often than its share says a bin's nodes were accepted, held to 1 while little was seen.
        factor = (self._accepted + PRIOR_NODES) / (self._shares + PRIOR_NODES)
        chances = np.minimum(np.array(tree.shares) * factor[bins], 1.0)
        for node, parent in enumerate(tree.parents):
            if parent >= 0 and chances[node] > chances[parent]:
                chances[node] = chances[parent]
        return chances


def _recent() -> deque[float]:
    return deque(maxlen=N_KEPT_TIMES)
