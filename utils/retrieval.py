"""The search for a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4)."""

from dataclasses import dataclass, field

from torch import Tensor

from utils.acceptance import Acceptance
from utils.datastore import Datastore


@dataclass(frozen=True)
class Proposal:
    """A chunk that may follow the entry token: its token ids, the cosine similarity, its row in the token trie."""

    token_ids: list[int]
    similarity: float
    row: int
    accepted: bool


@dataclass(frozen=True)
class Retriever:
    """A datastore with a rule of acceptance: what the decode loop asks before each token."""

    datastore: Datastore
    acceptance: Acceptance
    similarities: list[float] = field(default_factory=list)  # of every proposal so far, accepted or not

    def propose(self, entry_token_id: int, hidden_state: Tensor, uniform: float) -> Proposal | None:
        """The chunk most similar after the entry token, and whether it is to be emitted; None where there is none.

        hidden_state (D,) at the entry token; uniform in [0, 1) for bernoulli.
        """
        if self.acceptance.never:
            return None
        trie = self.datastore.trie(entry_token_id)
        if trie is None:
            return None
        row, similarity = trie.index.nearest(hidden_state)
        self.similarities.append(similarity)
        return Proposal(trie.chunk(row), similarity, row, self.acceptance.accepts(similarity, uniform))
