"""A second look at a finished text: what the LM thought of each token, and which chunks came next after each proposal.

Generation keeps the proposals themselves. Their rivals would cost it time, so they are found afterwards: one forward
pass over the whole text gives the hidden state at every entry token again, up to rounding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.datastore import Datastore, TokenTrie
from utils.extraction import score_windows
from utils.generation import Generation, Seen
from utils.models import CausalLM

N_RIVALS = 3
# Rows looked at for rivals: many have the same chunk.
ROWS_FOR_RIVALS = 64
SCORES_AT_ONCE = 2**24  # 64 MB


@dataclass(frozen=True)
class SeenChunk:
    """A proposal with its chunk: its row stands for token `place` of `window`, rivals are the next-best chunks."""

    seen: Seen
    entry_token_id: int
    token_ids: list[int]
    window: int
    place: int
    rivals: list[tuple[list[int], float]]  # other chunks, each with its best row's similarity, which descends


@dataclass(frozen=True)
class SecondReading:
    """log_probs (T,): of each token but the first under the LM, 0 for that; proposals in the order of the text."""

    log_probs: np.ndarray
    proposals: list[SeenChunk]


@torch.inference_mode()
def read_again(lm: CausalLM, datastore: Datastore, generation: Generation) -> SecondReading:
    """Look at a generation of chunk mode again; where no trace was kept, its proposals are found anew too."""
    scores = score_windows(lm, np.array([generation.token_ids]), np.dtype(np.float32))
    assert scores.hidden_states is not None
    states = torch.from_numpy(scores.hidden_states[0])
    if generation.trace is not None:
        seen = generation.trace.proposals
    else:
        seen = [Seen(position, -1, 0.0) for position in _steps(generation)]
    by_entry: dict[int, list[Seen]] = {}
    for proposal in seen:
        by_entry.setdefault(generation.token_ids[proposal.position - 1], []).append(proposal)
    found: list[SeenChunk] = []
    for entry_token_id, proposals in by_entry.items():
        trie = datastore.trie(entry_token_id)
        if trie is not None:
            queries = states[[proposal.position - 1 for proposal in proposals]].to(trie.context_vectors.device)
            queries = torch.nn.functional.normalize(queries, dim=1)
            step = max(SCORES_AT_ONCE // len(trie.windows), 1)
            for first in range(0, len(proposals), step):
                found += _look_up(trie, proposals[first : first + step], queries[first : first + step])
    return SecondReading(scores.log_probs[0], sorted(found, key=lambda chunk: chunk.seen.position))


def _steps(generation: Generation) -> list[int]:
    """The positions at which a proposal was asked for: all but those inside a chunk."""
    inside = {chunk.position + ahead for chunk in generation.chunks for ahead in range(1, len(chunk.token_ids))}
    n_prompt = len(generation.prompt_ids)
    return [position for position in range(n_prompt, len(generation.token_ids)) if position not in inside]


def _look_up(trie: TokenTrie, proposals: list[Seen], queries: Tensor) -> list[SeenChunk]:
    """The proposals of one entry token; queries (n, D) of length 1."""
    top = torch.topk(queries @ trie.context_vectors.T, min(ROWS_FOR_RIVALS, len(trie.windows)), dim=1)
    found = []
    for seen, similarities, rows in zip(proposals, top.values.tolist(), top.indices.tolist(), strict=True):
        if seen.row < 0:
            seen = Seen(seen.position, rows[0], similarities[0])
        token_ids = trie.chunk(seen.row)
        rivals: dict[tuple[int, ...], float] = {}
        for row, similarity in zip(rows, similarities, strict=True):
            chunk = tuple(trie.chunk(row))
            if list(chunk) != token_ids:
                rivals.setdefault(chunk, similarity)
            if len(rivals) == N_RIVALS:
                break
        window, place = int(trie.windows[seen.row]), int(trie.positions[seen.row])
        rivals_found = [(list(chunk), similarity) for chunk, similarity in rivals.items()]
        found.append(SeenChunk(seen, trie.entry_token_id, token_ids, window, place, rivals_found))
    return found
