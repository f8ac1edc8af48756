"""Rescoring of a finished text: what the LM gave to each token, and which chunks came next after each proposal.

Generation records the proposals themselves. Their rivals, the next-best chunks, would cost it time, so they are found
afterwards: one forward pass over the whole text gives the hidden state at every entry token again, up to rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.types import Generation, ProposalRecord
from utils.lm.model import CausalLM
from utils.lm.scoring import relative_probs, score_windows

N_RIVALS = 3
# Rows that are compared to find rivals: many have the same chunk.
ROWS_FOR_RIVALS = 64
# Similarities that are computed at a time: 64 MB.
SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class RescoredProposal:
    """A proposal with its chunk: its row stands for token `place` of `window`, rivals are the next-best chunks.

    first_token_prob: what the LM gives to the chunk's first token, relative to its likeliest.
    """

    record: ProposalRecord
    entry_token_id: int
    token_ids: list[int]
    window: int
    place: int
    rivals: list[tuple[list[int], float]]  # other chunks, each with its best row's similarity, which descends
    first_token_prob: float


@dataclass(frozen=True)
class RescoredText:
    """log_probs (T,): of each token under the LM, 0 for the first; proposals in the order of the text."""

    log_probs: np.ndarray
    proposals: list[RescoredProposal]


@torch.inference_mode()
def rescore(lm: CausalLM, datastore: Datastore, generation: Generation) -> RescoredText:
    """Rescore a generation of chunk mode. Where no proposal is recorded, the most similar row is found again."""
    scores = score_windows(lm, np.array([generation.token_ids]), np.dtype(np.float32), keep_logits=True)
    assert scores.hidden_states is not None
    assert scores.logits is not None
    states = torch.from_numpy(scores.hidden_states[0])
    # Without a trace none is, and with one none where the LM let no row propose.
    recorded = {} if generation.trace is None else {each.position: each for each in generation.trace.proposals}
    records = [recorded.get(at, ProposalRecord(at, -1, 0.0)) for at in _search_positions(generation)]
    by_entry: dict[int, list[ProposalRecord]] = {}
    for record in records:
        by_entry.setdefault(generation.token_ids[record.position - 1], []).append(record)
    found: list[RescoredProposal] = []
    for entry_token_id, of_entry in by_entry.items():
        trie = datastore.trie(entry_token_id)
        if trie is not None:
            places_of = [record.position - 1 for record in of_entry]
            queries = states[places_of].to(trie.context_vectors.device)
            queries = torch.nn.functional.normalize(queries, dim=1)
            step = max(SCORES_AT_ONCE // len(trie.windows), 1)
            for first in range(0, len(of_entry), step):
                records, places = of_entry[first : first + step], places_of[first : first + step]
                found += _find_rivals(trie, records, queries[first : first + step], scores.logits[0, places])
    return RescoredText(scores.log_probs[0], sorted(found, key=lambda proposal: proposal.record.position))


def _search_positions(generation: Generation) -> list[int]:
    """The positions at which there was a search for a proposal: all but those inside a chunk."""
    inside = {chunk.position + ahead for chunk in generation.chunks for ahead in range(1, len(chunk.token_ids))}
    n_prompt = len(generation.prompt_ids)
    return [position for position in range(n_prompt, len(generation.token_ids)) if position not in inside]


def _find_rivals(
    trie: TokenTrie, records: list[ProposalRecord], queries: Tensor, logits: Tensor
) -> list[RescoredProposal]:
    """The proposals of one entry token; queries (n, D) of length 1, logits (n, V)."""
    top = torch.topk(queries @ trie.context_vectors.T, min(ROWS_FOR_RIVALS, len(trie.windows)), dim=1)
    records = [
        record if record.row >= 0 else ProposalRecord(record.position, rows[0], similarities[0])
        for record, similarities, rows in zip(records, top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    first_ids = trie.first_ids[[record.row for record in records]].to(logits.device)
    probs = relative_probs(logits, first_ids[:, None])[:, 0].tolist()
    found = []
    for record, similarities, rows, prob in zip(records, top.values.tolist(), top.indices.tolist(), probs, strict=True):
        token_ids = trie.chunk(record.row)
        best: dict[tuple[int, ...], float] = {}
        for row, similarity in zip(rows, similarities, strict=True):
            chunk = tuple(trie.chunk(row))
            if list(chunk) != token_ids:
                best.setdefault(chunk, similarity)
            if len(best) == N_RIVALS:
                break
        window, place = int(trie.windows[record.row]), int(trie.positions[record.row])
        rivals = [(list(chunk), similarity) for chunk, similarity in best.items()]
        found.append(RescoredProposal(record, trie.entry_token_id, token_ids, window, place, rivals, prob))
    return found
