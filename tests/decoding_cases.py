"""What the tests of decoding share: prompts, datastores near what a tiny model writes, and calls of the decode loop."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from utils.datastore.store import Datastore, TokenTrie
from utils.decoding.draft import Drafter, DraftTree
from utils.decoding.loop import Decoding, decode
from utils.decoding.retriever import Retriever
from utils.decoding.types import Generation, Request
from utils.lm.model import CausalLM
from utils.lm.sampling import Sampler

GREEDY = Sampler.from_settings(0, None, None)
NO_EOS: frozenset[int] = frozenset()
PROMPTS = [[5, 6, 7, 8], [50], [20, 21, 22, 23, 24, 25, 26], [7, 3], [5, 6, 7, 8]]


def trie(entry_token_id: int, rows: Sequence[tuple[np.ndarray, list[int]]]) -> TokenTrie:
    """A token trie of (context vector, chunk) rows, in any order."""
    rows = sorted(rows, key=lambda row: row[1])
    offsets = np.cumsum([0] + [len(chunk) for _, chunk in rows])
    vectors = torch.tensor(np.array([vector for vector, _ in rows]), dtype=torch.float32)
    places = np.zeros(len(rows), dtype=np.int64)
    return TokenTrie(entry_token_id, vectors, np.concatenate([chunk for _, chunk in rows]), offsets, places, places)


def repeats(token_ids: list[int], n_new: int) -> bool:
    """Whether the last n_new tokens repeat the text before them, by trying each length and each place.

    With them the text ends in the same 2 to 32 tokens twice in a row; or it holds them already, two or more, after the
    same token.
    """
    lengths = range(2, min(32, len(token_ids) // 2) + 1)
    if any(token_ids[-n:] == token_ids[-2 * n : -n] for n in lengths):
        return True
    before, run = token_ids[:-n_new], token_ids[-n_new - 1 :]
    return n_new > 1 and any(before[i : i + len(run)] == run for i in range(len(before) - len(run) + 1))


def datastore_near_text(lm: CausalLM, prompts: list[list[int]], n_new: int, wrong: bool = False) -> Datastore:
    """Rows at every position of the greedy continuations, a little off: the text that follows, or other tokens."""
    rng = np.random.default_rng(0)
    rows: dict[int, list[tuple[np.ndarray, list[int]]]] = {}
    with torch.inference_mode():
        for prompt in prompts:
            text = list(prompt)
            for _ in range(n_new):
                text.append(int(lm.forward(torch.tensor([text]))[1][0, -1].argmax()))
            hidden_states, _ = lm.forward(torch.tensor([text]))
            for at in range(len(text) - 1):
                chunk = (
                    [int(t) for t in rng.integers(0, 100, 3)]
                    if wrong
                    else text[at + 1 : at + 1 + int(rng.integers(1, 5))]
                )
                vector = hidden_states[0, at].numpy() + rng.normal(0, 0.3, lm.hidden_size)
                rows.setdefault(text[at], []).append((vector / np.linalg.norm(vector), chunk))
    return Datastore.of([trie(entry, entries) for entry, entries in rows.items()], lm.hidden_size)


def line(token_ids: list[int]) -> DraftTree:
    """A draft without branches."""
    return DraftTree(token_ids, list(range(-1, len(token_ids) - 1)), [1.0] * len(token_ids))


def generate(
    lm: CausalLM,
    prompts: list[list[int]],
    n_new: int,
    retriever: Retriever | None = None,
    batch_size: int = 1,
    sampler: Sampler = GREEDY,
    eos: frozenset[int] = NO_EOS,
    drafter: Drafter | None = None,
    prefetch_all: bool | None = None,
) -> list[Generation]:
    """The generations of `decode`, in the order of the prompts."""
    requests = [Request(i, prompt, n_new) for i, prompt in enumerate(prompts)]
    decoding = Decoding(sampler, eos, retriever, batch_size, drafter, prefetch_all=prefetch_all)
    return sorted(decode(lm, requests, decoding), key=lambda generation: generation.index)


def new_tokens(generations: Iterable[Generation]) -> list[list[int]]:
    return [generation.new_token_ids for generation in generations]
