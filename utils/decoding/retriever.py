"""Retrieval of a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.datastore.search import Search
from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.acceptance import LONGEST_REPEAT, Acceptance, ends_in_repeat, tail_of
from utils.lm.scoring import relative_probs


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
    index_search: Search
    logits: Tensor

    @property
    def is_pending(self) -> bool:
        """Whether its result is on the device."""
        return self.index_search.pending is not None


@dataclass(frozen=True)
class Retriever:
    """A datastore with a rule of acceptance, from which the decode loop gets a proposal before each token."""

    datastore: Datastore
    acceptance: Acceptance

    def start_search(self, entry_token_id: int, hidden_state: Tensor, logits: Tensor) -> ProposalSearch | None:
        """Start to search the entry token's trie, without waiting for a device; None where there is no trie.

        hidden_state (D,) and logits (V,) at the entry token.
        """
        if self.acceptance.never:
            return None
        trie = self.datastore.trie(entry_token_id)
        return None if trie is None else ProposalSearch(trie, trie.index.search(hidden_state), logits)

    def results(self, searches: Sequence[ProposalSearch]) -> Tensor:
        """(n, K) float64 on the device: what `proposal` needs of pending searches, to be copied to the host at once."""
        found = torch.stack(
            [search.index_search.pending for search in searches if search.index_search.pending is not None]
        )
        if not self.acceptance.asks_lm:
            return found
        first_ids = torch.stack(
            [search.trie.first_ids[row] for search, row in zip(searches, found[:, 0].long(), strict=True)]
        )
        probs = relative_probs(
            torch.stack([search.logits for search in searches]), first_ids.to(searches[0].logits.device)
        )
        return torch.cat([found, probs[:, None].to(found)], dim=1)

    def proposal(
        self, search: ProposalSearch, values: list[float] | None, uniform: float, token_ids: list[int]
    ) -> Proposal:
        """The most similar row, and whether its chunk is accepted.

        values: its row of `results`, None where it is not pending; uniform: in [0, 1), decides under `bernoulli`;
        token_ids: the text so far, which ends in the entry token.
        """
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
                prob = float(relative_probs(search.logits[None], first_id))
            accepted = prob >= self.acceptance.min_first_token_prob
        if accepted and self.acceptance.reject_repeats:
            accepted = not ends_in_repeat(tail_of(token_ids[-2 * LONGEST_REPEAT :] + chunk))[0]
        return Proposal(chunk, similarity, row, bool(accepted), prob)
