"""Retrieval of a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4).

Beyond the paper, the K most similar rows may propose: one is drawn, and how much of its chunk (`NeighborMixture`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.datastore.search import Search
from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.acceptance import LONGEST_REPEAT, Acceptance, ends_in_repeat, tail_of
from utils.lm.scoring import relative_log_probs, relative_probs


@dataclass(frozen=True)
class Proposal:
    """A chunk that may follow the entry token: its token ids, the cosine similarity, its row in the token trie.

    first_token_prob: what the LM gives to the chunk's first token, relative to its likeliest; None where it was not
    asked, since the similarity alone had decided.
    """

    token_ids: list[int]
    similarity: float
    row: int
    accepted: bool
    first_token_prob: float | None = None


@dataclass(frozen=True)
class ProposalSearch:
    """A search of a token trie that has been started, and the logits (V,) of the LM at the entry token."""

    trie: TokenTrie
    index_search: Search | None  # None: `neighbors` has what was found
    logits: Tensor
    neighbors: tuple[np.ndarray, np.ndarray] | None = None  # K rows and similarities, most similar first

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
        if self.acceptance.mixture is None:
            return ProposalSearch(trie, trie.index.search(hidden_state), logits)
        rows, similarities = trie.index.nearest_k(hidden_state[None], self.acceptance.n_neighbors)
        return ProposalSearch(trie, None, logits, (rows[0].cpu().numpy(), similarities[0].cpu().numpy()))

    def results(self, searches: Sequence[ProposalSearch]) -> Tensor:
        """(n, K) float64 on the device: what `proposal` needs of pending searches, to be copied to the host at once."""
        started = [search.index_search for search in searches if search.index_search is not None]
        found = torch.stack([search.pending for search in started if search.pending is not None])
        if not self.acceptance.asks_lm:
            return found
        first_ids = torch.stack(
            [search.trie.first_ids[row] for search, row in zip(searches, found[:, 0].long(), strict=True)]
        )
        probs = relative_probs(
            torch.stack([search.logits for search in searches]), first_ids[:, None].to(searches[0].logits.device)
        )
        return torch.cat([found, probs.to(found)], dim=1)

    def proposal(
        self, search: ProposalSearch, values: list[float] | None, uniforms: tuple[float, float], token_ids: list[int]
    ) -> Proposal:
        """The most similar row, or the one that is drawn of several, and whether its chunk is accepted.

        values: its row of `results`, None where it is not pending; uniforms: two in [0, 1), of which the first decides
        under `bernoulli` and the second draws the row; token_ids: the text so far, which ends in the entry token.
        """
        if search.index_search is None:
            return self._drawn(search, uniforms)
        uniform, _ = uniforms
        prob: float | None = None
        if values is not None and self.acceptance.asks_lm:
            *values, prob = values
        row, similarity = search.index_search.result(values)
        chunk = search.trie.chunk(row)
        if not self.acceptance.accepts(similarity, uniform):
            return Proposal(chunk, similarity, row, accepted=False)
        accepted = True
        if self.acceptance.asks_lm:
            if (
                prob is None or values is None or row != values[0]
            ):  # the host decided between rows that are almost equal
                first_id = search.trie.first_ids[row : row + 1].to(search.logits.device)
                prob = float(relative_probs(search.logits[None], first_id[None]))
            accepted = prob >= self.acceptance.min_first_token_prob
        if accepted and self.acceptance.reject_repeats:
            accepted = not ends_in_repeat(tail_of(token_ids[-2 * LONGEST_REPEAT :] + chunk))[0]
        return Proposal(chunk, similarity, row, bool(accepted), prob)

    def _drawn(self, search: ProposalSearch, uniforms: tuple[float, float]) -> Proposal:
        """Of several rows one is drawn, and how much of its chunk; the most similar one says whether it is accepted."""
        mixture, trie = self.acceptance.mixture, search.trie
        assert mixture is not None
        assert search.neighbors is not None
        rows, similarities = search.neighbors
        log_probs: np.ndarray | None = None
        is_accepted = True
        if self.acceptance.asks_lm:
            first_ids = trie.first_ids[torch.from_numpy(rows).to(trie.first_ids.device)].to(search.logits.device)
            log_probs = relative_log_probs(search.logits[None], first_ids[None])[0].cpu().numpy()
            is_likely = np.exp(log_probs) >= self.acceptance.min_first_token_prob
            is_accepted = bool(is_likely.any())
            if is_accepted:
                rows, similarities, log_probs = rows[is_likely], similarities[is_likely], log_probs[is_likely]
        chosen, n_tokens = 0, None
        is_accepted = is_accepted and self.acceptance.accepts(float(similarities[0]), uniforms[0])
        if is_accepted:
            chosen, n_tokens = mixture.draw(similarities, log_probs, trie.chunk_lengths(rows), uniforms[1])
        row, similarity = int(rows[chosen]), float(similarities[chosen])
        prob = None if log_probs is None else float(np.exp(log_probs[chosen]))
        return Proposal(trie.chunk(row)[:n_tokens], similarity, row, is_accepted, prob)
