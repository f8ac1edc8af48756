"""The search for a proposal: the row of the entry token's trie whose context vector is most similar (paper section 4)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.acceptance import Acceptance
from utils.datastore import Datastore

# A float32 product of unit vectors of up to some 10,000 dimensions is off by less than this.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Proposal:
    """A chunk that may follow the entry token: its token ids, the cosine similarity, its row in the token trie."""

    token_ids: list[int]
    similarity: float
    row: int


@dataclass(frozen=True)
class Retriever:
    """A datastore with a rule of acceptance: what the decode loop asks before each token."""

    datastore: Datastore
    acceptance: Acceptance
    similarities: list[float] = field(default_factory=list)  # of every proposal so far, accepted or not

    def chunk(self, entry_token_id: int, hidden_state: Tensor, uniform: float) -> Proposal | None:
        """The chunk to emit after the entry token, or None. hidden_state (D,) at it; uniform in [0, 1) for bernoulli."""
        if self.acceptance.never:
            return None
        trie = self.datastore.trie(entry_token_id)
        if trie is None:
            return None
        row, similarity = nearest_row(hidden_state, trie.context_vectors)
        self.similarities.append(similarity)
        if not self.acceptance.accepts(similarity, uniform):
            return None
        return Proposal(trie.chunk(row), similarity, row)


def nearest_row(query: Tensor, context_vectors: Tensor) -> tuple[int, float]:
    """The row most similar to the query and its cosine similarity in [-1, 1]; ties go to the lowest row.

    query (D,) of any float dtype and length; context_vectors (N, D) float32 unit rows, N >= 1. The product over all
    rows is float32; the rows within its rounding of the best are compared in float64, so equal rows tie exactly.
    """
    query = query.double()
    query = query / query.norm().clamp_min(1e-30)
    similarities = torch.mv(context_vectors, query.float())
    close = (similarities >= similarities.max() - ROUNDING).nonzero()[:, 0]
    exact = (context_vectors[close].double() * query).sum(dim=1)
    best = int(exact.argmax())
    return int(close[best]), min(max(float(exact[best]), -1.0), 1.0)
