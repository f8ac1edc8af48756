"""Drafts for verified generation: what the datastore and the text so far expect after the next token, as a tree.

The rows of the entry token whose chunk begins with the next token are one range of the prefix-sorted trie. The k most
similar of them, and the earlier places of the live texts (the running one and, with `--live session`, those before), vote for their continuations with the weight
exp((s - s_max) / t). The weights add up on the prefix tree of the continuations, whose heaviest nodes are the draft.

Four sources vote: the datastore and the running text, each by the last two tokens and, since a pair is often new, by
the last token alone. All rows of a source share its weight. A vote for a token further ahead counts less.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from utils.datastore.store import Datastore, TokenTrie
from utils.lm.model import to_host, upload

# Tokens of finished texts that `--live session` keeps: about 256 MB at 1,000 dimensions.
MAX_SESSION_TOKENS = 65_536
# Common continuations of a token: so many nodes, from so many rows spread evenly over its trie, kept for so many tokens.
COMMON_NODES, COMMON_ROWS, COMMON_TOKENS = 32, 256, 4096


NO_TOKEN = -1  # between two live texts and after the last token
# Result of a search: similarities (n,) to the query and continuations (n, depth), NO_TOKEN where the text ends.
Places = tuple[np.ndarray, np.ndarray]


class Source(NamedTuple):
    """The weight of all votes of a source together, and the factor on a vote for each token further ahead."""

    weight: float
    decay: float


# Chosen on prompts of the example's validation split, greedy and at temperature 0.8; tokens per forward pass change by
# at most 3% where one of them is halved or doubled.
STORED = Source(1.0, 0.6)
OWN_TEXT = Source(3.0, 0.9)
OWN_TEXT_LAST_TOKEN = Source(0.3, 0.9)
STORED_LAST_TOKEN = Source(1.0, 0.6)


@dataclass(frozen=True)
class DraftTree:
    """Tokens that may follow the last token of the text. parents[i] < i is a node, or -1: the last token itself.

    shares[i] in [0, 1]: the share of all votes that node i got.
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

    def depths(self) -> list[int]:
        """How many tokens ahead each node is, 1 for the first."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return depths

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
    """Where verified generation gets its drafts from. `key` names a sequence while it is generated.

    Hidden states are on the host.
    """

    def hint(self, token_ids: list[int]) -> float:
        """A cheap estimate, in [0, 1], of how likely a draft's best first token is, without a search."""
        ...

    def draft(self, key: int, token_ids: list[int], hidden_state: Tensor, max_depth: int) -> DraftTree:
        """A tree after token_ids[-1]; the entry token token_ids[-2] has the hidden state (D,). Any tree is correct."""
        ...

    def observe(self, key: int, token_ids: list[int], hidden_states: Tensor) -> None:
        """Take note of the next tokens of a sequence, the prompt's first, and their hidden states (n, D)."""
        ...

    def end(self, key: int) -> None:
        """Take note that the sequence has ended."""
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
    """Drafts from a datastore (None: from the live texts alone) and from live texts."""

    def __init__(self, datastore: Datastore | None, settings: DraftSettings) -> None:
        self._datastore, self._settings = datastore, settings
        self._running: dict[int, LiveTexts] = {}
        self._observed: dict[int, list[tuple[list[int], Tensor]]] = {}  # not yet in the running texts
        self._session = LiveTexts()
        self._common = lru_cache(COMMON_TOKENS)(self._find_common)
        self._share_of_commonest = lru_cache(COMMON_TOKENS)(self._find_share_of_commonest)

    def hint(self, token_ids: list[int]) -> float:
        """The share of the most common token after the last one, in the datastore."""
        return self._share_of_commonest(token_ids[-1])

    def draft(self, key: int, token_ids: list[int], hidden_state: Tensor, max_depth: int) -> DraftTree:
        depth = min(max_depth, self._settings.max_depth)
        if depth < 1:
            return NOTHING
        (query,) = to_host(torch.nn.functional.normalize(hidden_state.float(), dim=0))
        context = (token_ids[-2], token_ids[-1], query, depth, self._settings.neighbors)
        votes = [self._weighed(self._stored_rows(*context), STORED), self._common_rows(token_ids[-1], depth)]
        text = self._text(key)
        if text is not None:
            votes.append(self._weighed(text.after_pair(*context), OWN_TEXT))
            votes.append(self._weighed(text.after_others(*context), OWN_TEXT_LAST_TOKEN))
        table, weights, decay = (np.concatenate(parts) for parts in zip(*votes, strict=True))
        if not len(table):
            return NOTHING
        vote = vote_line if self._settings.shape == "line" else vote_tree
        return vote(table, weights, self._settings.max_tokens, decay)

    def observe(self, key: int, token_ids: list[int], hidden_states: Tensor) -> None:
        if self._settings.live != "off":
            # A copy: the next forward pass may write over them.
            self._observed.setdefault(key, []).append((token_ids, to_host(hidden_states)[0].clone()))

    def end(self, key: int) -> None:
        if self._settings.live == "session" and (text := self._text(key)) is not None:
            self._session.add_text(text, MAX_SESSION_TOKENS)
        self._observed.pop(key, None)
        self._running.pop(key, None)

    def _text(self, key: int) -> "LiveTexts | None":
        """The running text so far. It is brought up to date here, since not every step drafts."""
        if read := self._observed.pop(key, []):
            token_ids = [token for tokens, _ in read for token in tokens]
            self._running.setdefault(key, LiveTexts()).extend(token_ids, torch.cat([states for _, states in read]))
        return self._running.get(key)

    def _weighed(self, found: Places, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The votes of rows: their continuations, weights that add up to the source's, and the decay of each row."""
        similarities, table = found
        weights = np.exp((similarities - similarities.max(initial=-1.0)) / self._settings.temperature)
        return table, source.weight * weights / max(weights.sum(), 1e-30), np.full(len(table), source.decay)

    def _stored_rows(self, entry_token_id: int, token_id: int, query: Tensor, depth: int, n_best: int) -> Places:
        """The rows most similar to the query among the datastore's and the session's places."""
        places = self._session.after_pair(entry_token_id, token_id, query, depth, n_best)
        trie = self._datastore.trie(entry_token_id) if self._datastore is not None else None
        rows = trie.rows_beginning_with(token_id) if trie is not None else slice(0, 0)
        if trie is None or rows.start == rows.stop:
            return places
        found = torch.mv(trie.context_vectors[rows], upload(query, trie.context_vectors.device))
        values, indices = to_host(*torch.topk(found, min(n_best, rows.stop - rows.start)))
        table = trie.continuations(indices.numpy() + rows.start, depth)
        similarities = np.concatenate([values.numpy(), places[0]])
        table = np.concatenate([table, places[1]])
        best = np.argsort(-similarities, kind="stable")[:n_best]
        return similarities[best], table[best]

    def _common_rows(self, token_id: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table, weights = self._common(token_id)
        return table[:, :depth], weights, np.full(len(table), STORED_LAST_TOKEN.decay)

    def _find_common(self, token_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Common continuations of a token, whatever was before it: rows (n, max_depth) and weights (n,).

        The weights of the rows add up, on their prefix tree, to those of the heaviest nodes of all chunks' prefix tree.
        """
        trie = self._datastore.trie(token_id) if self._datastore is not None else None
        if trie is None:
            return np.empty((0, self._settings.max_depth), dtype=np.int64), np.empty(0)
        rows = _spread_rows(trie)
        chunks = trie.continuations(rows, self._settings.max_depth, first=0)
        tree = vote_tree(chunks, np.ones(len(rows)), COMMON_NODES)
        table = np.full((len(tree.token_ids), self._settings.max_depth), -1, dtype=np.int64)
        weights = np.array(tree.shares)
        for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths(), strict=True)):
            if parent >= 0:
                table[node] = table[parent]
                weights[parent] -= tree.shares[node]
            table[node, depth - 1] = tree.token_ids[node]
        return table, STORED_LAST_TOKEN.weight * weights.clip(min=0)

    def _find_share_of_commonest(self, token_id: int) -> float:
        trie = self._datastore.trie(token_id) if self._datastore is not None else None
        if trie is None:
            return 0.0
        first = trie.continuations(_spread_rows(trie), 1, first=0)[:, 0]
        # Rows are prefix-sorted, so equal tokens are neighbours. A single row says nothing.
        ends = np.flatnonzero(np.append(first[1:] != first[:-1], True))
        return float((np.diff(ends, prepend=-1).max() - 1) / len(first))


def _spread_rows(trie: TokenTrie) -> np.ndarray:
    """All rows of a trie, or COMMON_ROWS spread evenly: the rows are sorted, so every branch is there in proportion."""
    n_rows = len(trie.windows)
    return np.arange(n_rows) if n_rows <= COMMON_ROWS else np.linspace(0, n_rows - 1, COMMON_ROWS).astype(np.int64)


def vote_tree(table: np.ndarray, weights: np.ndarray, max_tokens: int, decay: np.ndarray | None = None) -> DraftTree:
    """The heaviest nodes of the prefix tree of the rows, parents before children.

    table (n, depth) token ids, -1 after a row's end; weights (n,) not negative, in all positive; decay (n,) in (0, 1]:
    what is left of a row's weight with each token further on, None for all of it. Of equal weights the shallower node,
    then the one of the lower token ids, goes first; a parent weighs at least what its children do, so the nodes are a
    tree.
    """
    order = np.lexsort(table.T[::-1])
    table, at_depth = table[order], _weights_at_depths(table, weights, decay)[order]
    # A row begins a node at a depth where it differs from the row above, there or before.
    begins = np.ones(table.shape, dtype=bool)
    begins[1:] = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
    node_of = np.cumsum(begins.T.ravel()).reshape(table.shape[::-1]).T - 1
    depths, rows = np.nonzero(begins.T)
    totals = np.bincount(node_of.ravel(), weights=at_depth.ravel())
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


def vote_line(table: np.ndarray, weights: np.ndarray, max_tokens: int, decay: np.ndarray | None = None) -> DraftTree:
    """The heaviest branch: from the root to the heaviest child, again and again. Arguments as for vote_tree."""
    at_depth = _weights_at_depths(table, weights, decay)
    token_ids: list[int] = []
    shares: list[float] = []
    for depth in range(min(max_tokens, table.shape[1])):
        tokens, inverse = np.unique(table[:, depth], return_inverse=True)
        votes = np.bincount(inverse, weights=at_depth[:, depth])
        if tokens[0] == -1:
            votes[0] = 0
        best = int(np.argmax(np.round(votes, 12)))
        if votes[best] == 0:
            break
        token_ids.append(int(tokens[best]))
        shares.append(float(votes[best]))
        follows = inverse == best
        table, at_depth = table[follows], at_depth[follows]
    return DraftTree(token_ids, list(range(-1, len(token_ids) - 1)), shares)


def _weights_at_depths(table: np.ndarray, weights: np.ndarray, decay: np.ndarray | None) -> np.ndarray:
    """(n, depth) what each row's vote weighs at each of its tokens, as a share of all votes."""
    shares = (weights / weights.sum())[:, None]
    if decay is None:
        return np.repeat(shares, table.shape[1], axis=1)
    return np.asarray(shares * decay[:, None] ** np.arange(table.shape[1]))


# ---- Live texts


class LiveTexts:
    """One text that grows, or texts one after the other, with the places at which tokens stand in them.

    A place is the position of an entry token. The LM has read what follows it, so its context vector and continuation
    are known, and the texts of a run are a datastore that costs nothing to make.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.n_tokens = 0  # with those between texts
        self._token_ids = np.empty(0, dtype=np.int64)  # more than there are tokens, as are the vectors
        self._vectors = torch.empty(0, 0)
        self._after_pair: dict[tuple[int, int], list[int]] = {}  # entry token and the one after it: places
        self._before: dict[int, list[int]] = {}  # the token after the entry token: places

    def extend(self, token_ids: list[int], vectors: Tensor) -> None:
        """Append tokens and their context vectors (n, D), on the host, of any length."""
        start, end = self.n_tokens, self.n_tokens + len(token_ids)
        self._make_room(end, vectors)
        self._token_ids[start:end] = token_ids
        self._vectors[start:end] = torch.nn.functional.normalize(vectors.float(), dim=1)
        last = int(self._token_ids[start - 1]) if start else NO_TOKEN
        for place, (entry, following) in enumerate(zip([last, *token_ids], token_ids, strict=False), start - 1):
            if entry != NO_TOKEN and following != NO_TOKEN:
                self._after_pair.setdefault((entry, following), []).append(place)
                self._before.setdefault(following, []).append(place)
        self.n_tokens = end

    def add_text(self, text: "LiveTexts", max_tokens: int) -> None:
        """Add a finished text. Where that makes more than max_tokens, the oldest half is dropped."""
        end = text._vectors.new_zeros(1, text._vectors.shape[1])
        self.extend(
            [*text._token_ids[: text.n_tokens].tolist(), NO_TOKEN], torch.cat([text._vectors[: text.n_tokens], end])
        )
        if self.n_tokens > max_tokens:
            kept = slice(self.n_tokens - max_tokens // 2, self.n_tokens)
            token_ids, vectors = self._token_ids[kept].tolist(), self._vectors[kept].clone()
            self._clear()
            self.extend(token_ids, vectors)

    def after_pair(self, entry: int, following: int, query: Tensor, depth: int, n_best: int) -> Places:
        """The places where these two tokens stand together: the n_best most similar to the query, a unit vector (D,)."""
        return self._nearest(self._after_pair.get((entry, following), []), query, depth, n_best)

    def after_others(self, entry: int, following: int, query: Tensor, depth: int, n_best: int) -> Places:
        """The places where the second token stands after a token other than the first."""
        places = [place for place in self._before.get(following, []) if self._token_ids[place] != entry]
        return self._nearest(places, query, depth, n_best)

    def _nearest(self, places: list[int], query: Tensor, depth: int, n_best: int) -> Places:
        at = np.array(places, dtype=np.int64)
        if len(at):
            # A place is useful once something after the pair is known.
            is_known = at + 2 < self.n_tokens
            at = at[is_known & (self._token_ids[np.where(is_known, at + 2, 0)] != NO_TOKEN)]
        if not len(at):
            return np.empty(0, dtype=np.float32), np.empty((0, depth), dtype=np.int64)
        similarities = torch.mv(self._vectors[torch.from_numpy(at)], query).numpy()
        if len(at) > n_best:
            best = np.argpartition(-similarities, n_best - 1)[:n_best]
            at, similarities = at[best], similarities[best]
        positions = at[:, None] + np.arange(2, 2 + depth)
        following = self._token_ids[np.minimum(positions, self.n_tokens - 1)]
        has_ended = np.logical_or.accumulate((positions >= self.n_tokens) | (following == NO_TOKEN), axis=1)
        return similarities, np.where(has_ended, NO_TOKEN, following)

    def _make_room(self, n_tokens: int, vectors: Tensor) -> None:
        if n_tokens <= len(self._token_ids):
            return
        n_room = max(2 * n_tokens, 256)
        token_ids = np.full(n_room, NO_TOKEN, dtype=np.int64)
        token_ids[: self.n_tokens] = self._token_ids[: self.n_tokens]
        grown = torch.zeros(n_room, vectors.shape[1])
        if self.n_tokens:
            grown[: self.n_tokens] = self._vectors[: self.n_tokens]
        self._token_ids, self._vectors = token_ids, grown
