"""The gain of CD-LM over its base LM, position by position, in groups of positions that have something in common."""

from typing import Any

import numpy as np

from benchmarks.paper.common import Maps, mean_interval
from utils.datastore.store import Datastore
from utils.evaluation.marginal import Proposals, gains
from utils.evaluation.perplexity import setting_probabilities
from utils.text.windows import WindowPlan

LENGTHS = (1, 2, 3, 5, 9, 17)  # of chunks: the least of each group
ENTRY_ROWS = (1, 10, 100, 1000, 10_000)


def groups_of(proposals: Proposals, entry_rows: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Positions (N,) bool by what they have in common; entry_rows (N,): rows of the entry token's trie."""
    known = proposals.chunk_lengths > 0
    return {
        "proposal": {
            "what the text says": proposals.matches,
            "begins like the text": known & ~proposals.matches & (proposals.agreeing > 0),
            "wrong from its first token": known & (proposals.agreeing == 0),
        },
        "tokens of the chunk": _in_groups(proposals.chunk_lengths, LENGTHS),
        "rows of the entry token's trie": _in_groups(np.where(known, entry_rows, 0), ENTRY_ROWS),
    }


def _in_groups(values: np.ndarray, least: tuple[int, ...]) -> dict[str, np.ndarray]:
    ends = [*(value - 1 for value in least[1:]), None]
    names = [_range_in_words(first, end) for first, end in zip(least, ends, strict=True)]
    group = np.searchsorted(least, values, side="right") - 1
    return {name: group == i for i, name in enumerate(names)}


def _range_in_words(first: int, end: int | None) -> str:
    return f"{first:,} or more" if end is None else f"{first:,}" if end == first else f"{first:,} to {end:,}"


def entry_rows_of(plan: WindowPlan, datastore: Datastore) -> np.ndarray:
    """(N,) rows of the entry token's trie at each position of some windows, 0 where it has none."""
    entries = np.concatenate([plan.token_ids(window)[:-1] for window in range(plan.n_windows)])
    n_rows = np.zeros(int(entries.max()) + 1, dtype=np.int64)
    for token_id, n in datastore.n_rows.items():
        if token_id < len(n_rows):
            n_rows[token_id] = n
    return n_rows[entries]


def composition(proposals: Proposals, maps: Maps, entry_rows: np.ndarray) -> dict[str, Any]:
    """For each group its share of the positions, how many matched, and its gain under each map."""
    by_map = {
        name: gains(proposals, setting_probabilities(each, proposals), each.mixture) for name, each in maps.items()
    }
    n = proposals.lengths
    firsts = np.cumsum(n) - n

    def per_thousand(gained: np.ndarray) -> dict[str, float]:
        return vars(mean_interval(1000 * np.add.reduceat(gained, firsts) / n, n))

    def described(members: np.ndarray) -> dict[str, Any]:
        return {
            "share": float(members.mean()),
            "matched": float(proposals.matches[members].mean()) if members.any() else None,
            "gain": {name: per_thousand(np.where(members, gained, 0)) for name, gained in by_map.items()},
        }

    groups: dict[str, Any] = {"": {"all positions": described(np.ones(n.sum(), dtype=bool))}}
    for kind, members_of in groups_of(proposals, entry_rows).items():
        groups[kind] = {name: described(members) for name, members in members_of.items()}
    return groups
