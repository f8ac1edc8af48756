"""How large a draft pays: the nodes whose expected gain is worth the longer forward pass, by what this run measured.

On a device where a forward pass over a few more tokens takes no longer, whole trees pay; on a CPU they often do not.
"""

from bisect import bisect
from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

from utils.drafting import DraftTree

# What a node has of its parent's share of votes, in bins of which each learns how often its nodes are accepted.
SHARE_BINS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92])
# What is believed of a bin before it was seen: the share itself, as strongly as this many nodes.
PRIOR_NODES = 4.0
N_KEPT_TIMES = 15
# What is never tried is never known to pay: in the first passes every third draft is verified whole, every third in part
# and every third not at all, and later in one of so many that there are drafts for whole.
N_FIRST, WHOLE_EVERY = 18, 48
# Searches are judged apart by the drafter's hint, in these bins. Each that leaves a bin's searches costing more than they
# bring doubles the passes to the next, up to so many. How much the last search counts.
HINT_BINS = (0.1, 0.2, 0.3, 0.45, 0.6)
LONGEST_WAIT, LAST_SEARCH = 64, 0.05


@dataclass
class _Searches:
    """Those of one bin: what they brought on average, in tokens, and the passes from one to the next."""

    gain: float = 0.0
    wait: int = 1
    n_passes: int = 0  # since the last


class DraftCosts:
    """Seconds of forward passes by their length, and acceptance of nodes by their part of their parent's votes."""

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(_recent))
        self._n_passes: dict[int, int] = defaultdict(int)  # by the number of rows
        self._n_drafted = 0  # passes for which there was a draft
        self._searches = [_Searches() for _ in range(len(HINT_BINS) + 1)]
        n_bins = len(SHARE_BINS) + 1
        self._shares, self._accepted = np.zeros(n_bins), np.zeros(n_bins)

    def saw_pass(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A forward pass over n_tokens tokens of each of n_rows sequences took so long."""
        self._seconds[n_rows][n_tokens].append(seconds)
        self._n_passes[n_rows] += 1

    def asks(self, hint: float) -> bool:
        """Whether to look for a draft, of which the drafter says what its best first token is likely worth.

        True where the last searches of such hints brought more than they took, or one is due again.
        """
        searches = self._searches[bisect(HINT_BINS, hint)]
        searches.n_passes += 1
        return searches.n_passes >= searches.wait

    def saw_search(self, hint: float, n_rows: int, n_tokens: int, n_accepted: int, seconds: float) -> None:
        """A search of so long came to a pass over n_tokens, of which n_accepted drafted ones were accepted."""
        searches, timed = self._searches[bisect(HINT_BINS, hint)], self._seconds[n_rows]
        searches.n_passes = 0
        if self._n_passes[n_rows] <= N_FIRST or 1 not in timed or n_tokens not in timed:
            return
        plain, drafted = _median(timed[1]), _median(timed[n_tokens])
        # In tokens. A pass serves all rows, a search one.
        gain = n_accepted + 1 - drafted / plain - seconds * n_rows / plain
        searches.gain += LAST_SEARCH * (gain - searches.gain)
        searches.wait = 1 if searches.gain >= 0 else min(2 * searches.wait, LONGEST_WAIT)

    def saw_draft(self, tree: DraftTree, accepted: list[int]) -> None:
        """Of the tree's nodes these were accepted, a path. It tells about them and their siblings, which it left."""
        parts = _parts(tree)
        bins = np.searchsorted(SHARE_BINS, parts)
        reached = np.isin(tree.parents, [-1, *accepted])
        np.add.at(self._shares, bins[reached], parts[reached])
        np.add.at(self._accepted, bins[accepted], 1)

    def paying_parts(self, trees: list[DraftTree]) -> list[DraftTree]:
        """Of one tree a row, the parts that bring the most tokens a second; now and then all, to find out.

        The longest sets the seconds of a pass, so all may be as long as what pays for all together.
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
