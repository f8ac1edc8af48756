"""Retrieval of a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4).

Beyond the paper, the K most similar rows may propose: one is drawn, and how much of its chunk (`NeighborMixture`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.datastore.search import Search
from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.acceptance import Acceptance, would_repeat
from utils.lm.scoring import relative_log_probs


@dataclass(frozen=True)
class Proposal:
    """A chunk that may follow the entry token: its token ids, the cosine similarity, its row in the token trie.

    first_token_prob: what the LM gives to the chunk's first token, relative to its likeliest; None where it was not
    asked.
    """

    token_ids: list[int]
    similarity: float
    row: int
    accepted: bool
    first_token_prob: float | None = None


@dataclass(frozen=True)
class ProposalSearch:
    """A search of a token trie that has been started."""

    trie: TokenTrie
    index_search: Search | None  # None: `neighbors` has what was found
    neighbors: tuple[np.ndarray, np.ndarray] | None = None  # K rows and similarities, most similar first
    first_log_probs: Tensor | None = None  # (N,) `relative_log_probs` of each row's first token; None: not asked for

    @property
    def is_pending(self) -> bool:
        """Whether its result is on the device."""
        return self.index_search is not None and self.index_search.pending is not None


@dataclass(frozen=True)
class Retriever:
    """A datastore with a rule of acceptance, from which the decode loop gets a proposal before each token."""

    datastore: Datastore
    acceptance: Acceptance

    def start_search(self, entry_token_id: int, hidden_state: Tensor, logits: Tensor) -> ProposalSearch | None:
        """Start to search the entry token's trie; None where there is no trie.

        For one row it does not wait for a device, for several it does. hidden_state (D,) and logits (V,) at the entry token.
        """
        if self.acceptance.never:
            return None
        trie = self.datastore.trie(entry_token_id)
        if trie is None:
            return None
        log_probs = allowed = None
        if self.acceptance.asks_lm:
            log_probs = relative_log_probs(logits[None], trie.first_ids[None].to(logits.device))[0]
            log_probs = log_probs.to(trie.first_ids.device)
        if log_probs is not None and self.acceptance.min_first_token_prob > 0:
            allowed = log_probs.exp() >= self.acceptance.min_first_token_prob
        if self.acceptance.mixture is None:
            return ProposalSearch(trie, trie.index.search(hidden_state, allowed), first_log_probs=log_probs)
        mask = None if allowed is None else allowed[None]
        rows, similarities = trie.index.nearest_k(hidden_state[None], self.acceptance.n_neighbors, mask)
        found = rows[0].cpu().numpy(), similarities[0].cpu().numpy()
        return ProposalSearch(trie, None, found, log_probs)

    def results(self, searches: Sequence[ProposalSearch]) -> Tensor:
        """(n, 4 or 5) float64 on the device: what `proposal` needs of pending searches, to be copied to the host at once."""
        pending = []
        for search in searches:
            assert search.index_search is not None
            found = search.index_search.pending
            assert found is not None
            if search.first_log_probs is not None:
                found = torch.cat([found, search.first_log_probs[found[:1].long()].to(found)])
            pending.append(found)
        return torch.stack(pending)

    def proposal(
        self, search: ProposalSearch, values: list[float] | None, uniforms: tuple[float, float], token_ids: list[int]
    ) -> Proposal | None:
        """The most similar row, or the one that is drawn of several, and whether its chunk is accepted.

        values: its row of `results`, None where it is not pending; uniforms: two in [0, 1), of which the first decides
        under `bernoulli` and the second draws the row; token_ids: the text so far, which ends in the entry token. None
        where the LM lets no row propose.
        """
        if search.index_search is None:
            return self._drawn(search, uniforms)
        log_prob: float | None = None
        if values is not None and search.first_log_probs is not None:
            *values, log_prob = values
        row, similarity = search.index_search.result(values)
        if row < 0:
            return None
        if search.first_log_probs is not None and (log_prob is None or values is None or row != values[0]):
            log_prob = float(search.first_log_probs[row])  # the host decided between rows that are almost equal
        chunk = search.trie.chunk(row)
        accepted = self.acceptance.accepts(similarity, uniforms[0])
        if accepted and self.acceptance.reject_repeats:
            accepted = not would_repeat(token_ids, chunk)
        return Proposal(chunk, similarity, row, accepted, None if log_prob is None else math.exp(log_prob))

    def _drawn(self, search: ProposalSearch, uniforms: tuple[float, float]) -> Proposal | None:
        """Of several rows one is drawn, and how much of its chunk; the most similar one says whether it is accepted."""
        mixture, trie = self.acceptance.mixture, search.trie
        assert mixture is not None
        assert search.neighbors is not None
        rows, similarities = (each[~np.isnan(search.neighbors[1])] for each in search.neighbors)
        if not len(rows):
            return None
        log_probs: np.ndarray | None = None
        if search.first_log_probs is not None:
            log_probs = search.first_log_probs[torch.from_numpy(rows)].cpu().numpy()
        chosen, n_tokens = 0, None
        is_accepted = self.acceptance.accepts(float(similarities[0]), uniforms[0])
        if is_accepted:
            chosen, n_tokens = mixture.draw(similarities, log_probs, trie.chunk_lengths(rows), uniforms[1])
        row, similarity = int(rows[chosen]), float(similarities[chosen])
        prob = None if log_probs is None else float(np.exp(log_probs[chosen]))
        return Proposal(trie.chunk(row)[:n_tokens], similarity, row, is_accepted, prob)
