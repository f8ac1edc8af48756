"""How large a draft pays: the nodes whose expected gain is worth the longer forward pass, by what this run measured.

On a device where a forward pass over a few more tokens takes no longer, whole trees pay; on a CPU they often do not.
"""

from collections import defaultdict, deque

import numpy as np

from utils.drafting import DraftTree

# What a node has of its parent's share of votes, in bins of which each learns how often its nodes are accepted.
SHARE_BINS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92])
# What is believed of a bin before it was seen: the share itself, as strongly as this many nodes.
PRIOR_NODES = 4.0
N_KEPT_TIMES = 15
# What is never tried is never known to pay: of the first drafts every third is verified whole, every third in part and
# every third not at all, and later one after so many is whole.
N_FIRST, WHOLE_EVERY = 18, 48
# Where searches have cost more than their drafts brought, one in so many goes on. How much the last search counts.
ASK_EVERY, LAST_SEARCH = 12, 0.1


class DraftCosts:
    """Seconds of forward passes by their length, and acceptance of nodes by their part of their parent's votes."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(_recent))
        self._n_asked = 0
        self._gain, self._n_not_asked = 0.0, 0
        n_bins = len(SHARE_BINS) + 1
        self._shares, self._accepted = np.zeros(n_bins), np.zeros(n_bins)

    def saw_pass(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A forward pass over n_tokens tokens of each of n_rows sequences took so long."""
        self._seconds[n_rows][n_tokens].append(seconds)

    def asks(self) -> bool:
        """Whether to look for a draft: whether the last searches brought more than they took, or one is due again."""
        if self._gain >= 0:
            return True
        self._n_not_asked += 1
        return self._n_not_asked % ASK_EVERY == 0

    def saw_search(self, n_rows: int, n_tokens: int, n_accepted: int, seconds: float) -> None:
        """A search of so long came to a pass over n_tokens, of which n_accepted drafted ones were accepted."""
        timed = self._seconds[n_rows]
        if self._n_asked <= N_FIRST or 1 not in timed or n_tokens not in timed:
            return
        plain, drafted = _median(timed[1]), _median(timed[n_tokens])
        # In tokens. A pass serves all rows, a search one.
        gain = n_accepted + 1 - drafted / plain - seconds * n_rows / plain
        self._gain += LAST_SEARCH * (gain - self._gain)

    def saw_draft(self, tree: DraftTree, accepted: list[int]) -> None:
        """Of the tree's nodes these were accepted, a path. It tells about them and their siblings, which it left."""
        parts = _parts(tree)
        bins = np.searchsorted(SHARE_BINS, parts)
        reached = np.isin(tree.parents, [-1, *accepted])
        np.add.at(self._shares, bins[reached], parts[reached])
        np.add.at(self._accepted, bins[accepted], 1)

    def paying_part(self, tree: DraftTree, n_rows: int) -> DraftTree:
        """The part of the tree that brings the most tokens a second; now and then all of it, to find out."""
        timed = self._seconds.get(n_rows)
        if not tree.token_ids:
            return tree
        self._n_asked += 1
        if not timed or self._n_asked % WHOLE_EVERY == 0:
            return tree
        if self._n_asked <= N_FIRST:
            n_nodes = len(tree.token_ids)
            return tree.part(list(range((n_nodes, 0, -(-n_nodes // 4))[self._n_asked % 3])))
        chances = self._chances(tree)
        # A parent stands before its children and is as likely at least, so any first part of the order is a tree.
        order = np.argsort(-chances, kind="stable")
        lengths = sorted(timed)
        medians = np.maximum.accumulate([_median(timed[length]) for length in lengths])
        seconds = np.interp(np.arange(1, len(order) + 2), lengths, medians)
        expected = 1 + np.concatenate([[0.0], np.cumsum(chances[order])])
        return tree.part(sorted(order[: int(np.argmax(expected / seconds))].tolist()))

    def _chances(self, tree: DraftTree) -> np.ndarray:
        """(n_nodes,) probability that each node is accepted, none above its parent's."""
        # How much more often than its part says a bin's nodes were accepted, held to 1 while little was seen.
        factor = (self._accepted + PRIOR_NODES) / (self._shares + PRIOR_NODES)
        parts = _parts(tree)
        chances = np.minimum(parts * factor[np.searchsorted(SHARE_BINS, parts)], 1.0)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                chances[node] *= chances[parent]
        return chances


def _parts(tree: DraftTree) -> np.ndarray:
    """(n_nodes,) each node's share of the votes over its parent's."""
    return np.array(tree.shares) / np.array([*tree.shares, 1.0])[tree.parents]


def _recent() -> deque[float]:
    return deque(maxlen=N_KEPT_TIMES)


def _median(seconds: deque[float]) -> float:
    """The upper one where there are two; numpy's takes longer than all else of a step's bookkeeping."""
    return sorted(seconds)[len(seconds) // 2]
