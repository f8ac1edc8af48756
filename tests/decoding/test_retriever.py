"""A proposal is the most similar row of the entry token's trie, accepted as the rule says."""

import math

import numpy as np
import pytest
import torch
from architectures import tiny_lm
from decoding_cases import GREEDY, NO_EOS, trie

from utils.datastore.store import Datastore
from utils.decoding.acceptance import Acceptance
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Proposal, Retriever
from utils.decoding.types import Request

# Of length 1, their cosines with (1, 0) are 0.6, 1 and 0.8.
ROWS = [(np.array([0.6, 0.8]), [1]), (np.array([1.0, 0.0]), [2, 3]), (np.array([0.8, 0.6]), [4])]


# Under them, tokens 1, 2 and 4 are 1/2, 1/4 and 1 times as likely as the likeliest.
LOGITS = torch.log(torch.tensor([0.1, 0.2, 0.1, 0.2, 0.4]))


def proposed(retriever: Retriever, hidden_state: torch.Tensor, uniform: float = 0.0) -> Proposal:
    search = retriever.start_search(7, hidden_state, LOGITS)
    assert search is not None
    assert not search.is_pending
    return retriever.proposal(search, None, (uniform, 0.0), [7])


def test_the_proposal_is_the_most_similar_row_whatever_the_querys_length() -> None:
    retriever = Retriever(Datastore.of([trie(7, ROWS)], 2), Acceptance(0.9))
    for length in (0.1, 1.0, 30.0):
        assert proposed(retriever, torch.tensor([length, 0.0])) == Proposal([2, 3], 1.0, 1, accepted=True)
    other = proposed(retriever, torch.tensor([0.0, 5.0]))
    assert (other.token_ids, other.row, other.accepted) == ([1], 0, False)
    assert other.similarity == pytest.approx(0.8)


def test_nothing_is_searched_without_a_trie_or_at_threshold_one() -> None:
    datastore = Datastore.of([trie(7, ROWS)], 2)
    assert Retriever(datastore, Acceptance(0.5)).start_search(8, torch.ones(2), LOGITS) is None
    assert Retriever(datastore, Acceptance(1.0)).start_search(7, torch.ones(2), LOGITS) is None


def test_bernoulli_accepts_a_proposal_where_the_uniform_number_is_below_g() -> None:
    # η = 0, so that g(s) = s up to q_max.
    retriever = Retriever(Datastore.of([trie(7, ROWS[:1])], 2), Acceptance(0.5, "bernoulli"))
    query = torch.tensor([1.0, 0.0])
    assert proposed(retriever, query, uniform=0.599).accepted
    assert not proposed(retriever, query, uniform=0.601).accepted


def test_bernoulli_accepts_as_often_as_g_says() -> None:
    lm = tiny_lm("gpt2")
    vector = lm.forward(torch.tensor([[5]]))[0][0, -1].detach().numpy()
    store = Datastore.of([trie(5, [(vector / np.linalg.norm(vector), [1])])], 32)
    retriever = Retriever(store, Acceptance(0.5, "bernoulli", q_max=0.3))
    requests = [Request(i, [5], 1) for i in range(2000)]
    n_accepted = sum(len(g.chunks) for g in decode(lm, requests, Decoding(GREEDY, NO_EOS, retriever, batch_size=50)))
    assert abs(n_accepted / 2000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)


@pytest.mark.parametrize(
    ("least", "wanted"), [(0.24, ([2, 3], 1.0, 0.25)), (0.26, ([4], 0.8, 1.0)), (1.0, ([4], 0.8, 1.0))]
)
def test_the_nearest_row_is_found_whose_chunk_the_lm_would_begin(least: float, wanted: tuple) -> None:
    retriever = Retriever(Datastore.of([trie(7, ROWS)], 2), Acceptance(0.75, min_first_token_prob=least))
    found = proposed(retriever, torch.tensor([1.0, 0.0]))
    assert found.token_ids == wanted[0]
    assert (found.similarity, found.first_token_prob) == pytest.approx(wanted[1:])
    assert found.accepted
    too_far = proposed(retriever, torch.tensor([0.0, -5.0]))
    assert not too_far.accepted


def test_nothing_is_proposed_where_the_lm_would_begin_no_chunk() -> None:
    retriever = Retriever(Datastore.of([trie(7, ROWS[:2])], 2), Acceptance(-1, min_first_token_prob=0.6))
    search = retriever.start_search(7, torch.tensor([1.0, 0.0]), LOGITS)
    assert search is not None
    assert retriever.proposal(search, None, (0.0, 0.0), [7]) is None


def test_the_lms_likeliest_token_passes_any_gate() -> None:
    retriever = Retriever(Datastore.of([trie(7, ROWS[2:])], 2), Acceptance(-1, min_first_token_prob=1.0))
    assert proposed(retriever, torch.tensor([1.0, 0.0])).accepted
