"""The search for a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4)."""

from dataclasses import dataclass, field

from torch import Tensor

from utils.acceptance import Acceptance
from utils.datastore import Datastore, TokenTrie
from utils.search import Search


@dataclass(frozen=True)
class Proposal:
    """A chunk that may follow the entry token: its token ids, the cosine similarity, its row in the token trie."""

    token_ids: list[int]
    similarity: float
    row: int
    accepted: bool


@dataclass(frozen=True)
class Lookup:
    """A search of a token trie under way; `values` is what it comes to on the device, None where the host knows it."""

    trie: TokenTrie
    search: Search

    @property
    def values(self) -> Tensor | None:
        return self.search.values


@dataclass(frozen=True)
class Retriever:
    """A datastore with a rule of acceptance: what the decode loop asks before each token."""

    datastore: Datastore
    acceptance: Acceptance
    similarities: list[float] = field(default_factory=list)  # of every proposal so far, accepted or not

    def look_up(self, entry_token_id: int, hidden_state: Tensor) -> Lookup | None:
        """Begin to look for the most similar row of the entry token's trie; None where there is none.

        hidden_state (D,) at the entry token.
        """
        if self.acceptance.never:
            return None
        trie = self.datastore.trie(entry_token_id)
        return None if trie is None else Lookup(trie, trie.index.search(hidden_state))

    def proposal(self, lookup: Lookup, values: list[float] | None, uniform: float) -> Proposal:
        """What was found, and whether it is to be emitted. values: the lookup's; uniform in [0, 1) for bernoulli."""
        row, similarity = lookup.search.result(values)
        self.similarities.append(similarity)
        return Proposal(lookup.trie.chunk(row), similarity, row, self.acceptance.accepts(similarity, uniform))
