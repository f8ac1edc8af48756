"""Drafts for verified generation: what the datastore and the text so far expect after the next token, as a tree.

The rows of the entry token whose chunk begins with the next token are one range of the prefix-sorted trie. The k most
similar of them, and the earlier places of the running text (`live`), vote for their continuations with the weight
exp((s - s_max) / t); the weights add up on the prefix tree of the continuations, whose heaviest nodes are the draft.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.datastore import Datastore

# Places of texts that are over, which `--live session` keeps: about 256 MB at 1,000 dimensions.
MAX_SESSION_PLACES = 65_536


@dataclass(frozen=True)
class DraftTree:
    """Tokens that may follow a token that is certain. parents[i] < i is a node, or -1: the certain token itself.

    shares[i] in [0, 1]: the share of all votes that node i got, the drafter's estimate that it is accepted.
    """

    token_ids: list[int]
    parents: list[int]
    shares: list[float]

    def heaviest_line(self) -> "DraftTree":
        """The branch from the root that takes the heaviest child at every node."""
        line: list[int] = []
        while children := [i for i, parent in enumerate(self.parents) if parent == (line[-1] if line else -1)]:
            line.append(max(children, key=lambda i: self.shares[i]))
        return self.part(line)

    def part(self, nodes: list[int]) -> "DraftTree":
        """Some of the nodes, ascending, each with its parent."""
        index = {node: i for i, node in enumerate(nodes)} | {-1: -1}
        return DraftTree(
            [self.token_ids[node] for node in nodes],
            [index[self.parents[node]] for node in nodes],
            [self.shares[node] for node in nodes],
        )


NOTHING = DraftTree([], [], [])


class Drafter(Protocol):
    """What verified generation asks for drafts. `key` names a sequence as long as it runs."""

    def draft(self, key: int, token_ids: list[int], hidden_state: Tensor, max_depth: int) -> DraftTree:
        """A tree over token_ids[-1], whose entry token token_ids[-2] has this hidden state (D,); any tree is right."""
        ...

    def observe(self, key: int, token_ids: list[int], hidden_states: Tensor) -> None:
        """The next tokens of a sequence, the prompt's first, with their hidden states (n, D)."""
        ...

    def end(self, key: int) -> None:
        """The sequence is over."""
        ...


@dataclass(frozen=True)
class DraftSettings:
    """max_tokens: nodes of a tree; neighbors: rows that vote; temperature t of the votes, in cosine similarity."""

    shape: Literal["tree", "line"] = "tree"
    max_tokens: int = 16
    neighbors: int = 64
    temperature: float = 0.05
    max_depth: int = 16
    live: Literal["off", "sequence", "session"] = "sequence"


class RetrievalDrafter:
    """Drafts from a datastore (None: from the live texts alone) and from what has been generated."""

    def __init__(self, datastore: Datastore | None, settings: DraftSettings) -> None:
        self._datastore, self._settings = datastore, settings
        self._running: dict[int, _LiveText] = {}
        self._session: OrderedDict[int, _LiveText] = OrderedDict()
        self._n_session_places = 0
        self._n_ended = 0

    def draft(self, key: int, token_ids: list[int], hidden_state: Tensor, max_depth: int) -> DraftTree:
        depth = min(max_depth, self._settings.max_depth)
        if depth < 1:
            return NOTHING
        query = torch.nn.functional.normalize(hidden_state.float(), dim=0)
        found = self._stored_rows(token_ids[-2], token_ids[-1], query, depth)
        for text in self._live_texts(key):
            found += text.rows(token_ids[-2], token_ids[-1], query, depth)
        if not found:
            return NOTHING
        similarities = np.concatenate([similarities for similarities, _ in found])
        table = np.concatenate([table for _, table in found])
        if len(similarities) > self._settings.neighbors:
            best = np.argpartition(-similarities, self._settings.neighbors - 1)[: self._settings.neighbors]
            similarities, table = similarities[best], table[best]
        weights = np.exp((similarities - similarities.max()) / self._settings.temperature)
        vote = vote_line if self._settings.shape == "line" else vote_tree
        return vote(table, weights, self._settings.max_tokens)

    def observe(self, key: int, token_ids: list[int], hidden_states: Tensor) -> None:
        if self._settings.live == "off":
            return
        self._running.setdefault(key, _LiveText()).extend(token_ids, hidden_states)

    def end(self, key: int) -> None:
        text = self._running.pop(key, None)
        if text is None or self._settings.live != "session":
            return
        self._session[self._n_ended] = text
        self._n_ended += 1
        self._n_session_places += len(text.token_ids)
        while self._n_session_places > MAX_SESSION_PLACES and len(self._session) > 1:
            self._n_session_places -= len(self._session.popitem(last=False)[1].token_ids)

    def _live_texts(self, key: int) -> list["_LiveText"]:
        running = [self._running[key]] if key in self._running else []
        return running + list(self._session.values())

    def _stored_rows(
        self, entry_token_id: int, token_id: int, query: Tensor, depth: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Similarities (n,) and continuations (n, depth), -1 where they have ended, of at most `neighbors` rows."""
        trie = self._datastore.trie(entry_token_id) if self._datastore is not None else None
        if trie is None:
            return []
        rows = trie.rows_beginning_with(token_id)
        if rows.start == rows.stop:
            return []
        similarities = torch.mv(trie.context_vectors[rows], query)
        n_best = min(self._settings.neighbors, rows.stop - rows.start)
        top = torch.topk(similarities, n_best)
        return [(top.values.cpu().numpy(), trie.continuations(top.indices.cpu().numpy() + rows.start, depth))]


@dataclass
class _LiveText:
    """A text's tokens, their hidden states, and where each pair of tokens stands in it."""

    token_ids: list[int] = field(default_factory=list)
    places: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    vectors: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # unit rows; more than there are tokens

    def extend(self, token_ids: list[int], hidden_states: Tensor) -> None:
        start, end = len(self.token_ids), len(self.token_ids) + len(token_ids)
        if end > len(self.vectors):
            grown = hidden_states.new_zeros(max(2 * end, 256), hidden_states.shape[1], dtype=torch.float32)
            grown[:start] = self.vectors[:start] if start else grown[:0]
            self.vectors = grown
        self.vectors[start:end] = torch.nn.functional.normalize(hidden_states.float(), dim=1)
        self.token_ids += token_ids
        for i in range(max(start, 1), end):
            self.places.setdefault((self.token_ids[i - 1], self.token_ids[i]), []).append(i - 1)

    def rows(
        self, entry_token_id: int, token_id: int, query: Tensor, depth: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As the datastore's rows; places whose continuation is not there yet are left out."""
        places = [at for at in self.places.get((entry_token_id, token_id), ()) if at + 2 < len(self.token_ids)]
        if not places:
            return []
        table = np.full((len(places), depth), -1, dtype=np.int64)
        for row, at in enumerate(places):
            following = self.token_ids[at + 2 : at + 2 + depth]
            table[row, : len(following)] = following
        similarities = torch.mv(self.vectors[torch.tensor(places, device=self.vectors.device)], query)
        return [(similarities.cpu().numpy(), table)]


def vote_tree(table: np.ndarray, weights: np.ndarray, max_tokens: int) -> DraftTree:
    """The heaviest nodes of the prefix tree of the rows, parents before children.

    table (n, depth) token ids, -1 after a row's end; weights (n,) positive. Of equal weights the shallower node, then
    the one of the lower token ids, goes first; a parent weighs at least what its children do, so the nodes are a tree.
    """
    order = np.lexsort(table.T[::-1])
    table, weights = table[order], weights[order] / weights.sum()
    # A row begins a node at a depth where it differs from the row above, there or before.
    begins = np.ones(table.shape, dtype=bool)
    begins[1:] = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
    node_of = np.cumsum(begins.T.ravel()).reshape(table.shape[::-1]).T - 1
    depths, rows = np.nonzero(begins.T)
    totals = np.bincount(node_of.ravel(), weights=np.repeat(weights, table.shape[1]))
    is_token = table[rows, depths] >= 0
    candidates = np.nonzero(is_token)[0]
    # Nodes are numbered by depth, then by token ids; the stable sort keeps that order among equal weights.
    chosen = np.sort(candidates[np.argsort(-np.round(totals[candidates], 12), kind="stable")][:max_tokens])
    index = {int(node): i for i, node in enumerate(chosen)}
    parents = [
        index[int(node_of[row, depth - 1])] if depth else -1
        for row, depth in zip(rows[chosen], depths[chosen], strict=True)
    ]
    return DraftTree(table[rows[chosen], depths[chosen]].tolist(), parents, totals[chosen].tolist())


def vote_line(table: np.ndarray, weights: np.ndarray, max_tokens: int) -> DraftTree:
    """The heaviest branch: from the root to the heaviest child, again and again."""
    total, token_ids, shares = weights.sum(), [], []
    for column in table.T[:max_tokens]:
        tokens, inverse = np.unique(column, return_inverse=True)
        votes = np.bincount(inverse, weights=weights)
        if tokens[0] == -1:
            votes[0] = 0
        best = int(np.argmax(np.round(votes / total, 12)))
        if votes[best] == 0:
            break
        token_ids.append(int(tokens[best]))
        shares.append(float(votes[best] / total))
        weights = np.where(column == tokens[best], weights, 0)
    return DraftTree(token_ids, list(range(-1, len(token_ids) - 1)), shares)
