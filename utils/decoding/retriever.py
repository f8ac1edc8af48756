"""Retrieval of a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4)."""

from dataclasses import dataclass

from torch import Tensor

from utils.datastore.search import Search
from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.acceptance import Acceptance


@dataclass(frozen=True)
class Proposal:
    """A chunk that may follow the entry token: its token ids, the cosine similarity, its row in the token trie."""

    token_ids: list[int]
    similarity: float
    row: int
    accepted: bool


@dataclass(frozen=True)
class ProposalSearch:
    """A search of a token trie that has been started. `pending`: its result on the device; None where the host has it."""

    trie: TokenTrie
    index_search: Search

    @property
    def pending(self) -> Tensor | None:
        return self.index_search.pending


@dataclass(frozen=True)
class Retriever:
    """A datastore with a rule of acceptance, from which the decode loop gets a proposal before each token."""

    datastore: Datastore
    acceptance: Acceptance

    def start_search(self, entry_token_id: int, hidden_state: Tensor) -> ProposalSearch | None:
        """Start to search the entry token's trie, without waiting for a device; None where there is no trie.

        hidden_state (D,) at the entry token.
        """
        if self.acceptance.never:
            return None
        trie = self.datastore.trie(entry_token_id)
        return None if trie is None else ProposalSearch(trie, trie.index.search(hidden_state))

    def proposal(self, search: ProposalSearch, values: list[float] | None, uniform: float) -> Proposal:
        """The most similar row, and whether its chunk is accepted.

        values: `pending` copied to the host, None where it is None; uniform: in [0, 1), decides under `bernoulli`.
        """
        row, similarity = search.index_search.result(values)
        return Proposal(search.trie.chunk(row), similarity, row, self.acceptance.accepts(similarity, uniform))
