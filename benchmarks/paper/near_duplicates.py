"""Which passages say much of what another text says, by the runs of tokens that they share; a datastore without them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from utils.datastore.store import Datastore, TokenTrie

# Odd, so that no power of it loses a token's bits; a run is a number in its base, modulo 2^64.
BASE = np.uint64(0x9E3779B97F4A7C15)


def runs_of(token_ids: np.ndarray, n_tokens: int) -> np.ndarray:
    """A number for each distinct run of n_tokens, uint64 ascending; empty where the passage is shorter."""
    if len(token_ids) < n_tokens:
        return np.zeros(0, dtype=np.uint64)
    powers = np.cumprod(np.full(n_tokens, BASE))
    # One more than the id, or runs that begin with token 0 would be like others.
    return np.unique(sliding_window_view(token_ids.astype(np.uint64) + np.uint64(1), n_tokens) @ powers)


class SharedRuns:
    """The runs of some passages, to be looked for in others."""

    def __init__(self, passages: Iterable[np.ndarray], n_tokens: int) -> None:
        """passages: each one's token ids."""
        self._n_tokens = n_tokens
        runs = [found for token_ids in passages if len(found := runs_of(token_ids, n_tokens))]
        every = np.concatenate([np.zeros(0, dtype=np.uint64), *runs])
        order = np.argsort(every, kind="stable")
        self._counts = np.array([len(found) for found in runs], dtype=np.int64)
        self._runs, self._passages = every[order], np.repeat(np.arange(len(runs)), self._counts)[order]

    def overlap(self, token_ids: np.ndarray) -> float:
        """Share of the passage's runs that are in these passages, or of one of theirs that is in it, if that is more."""
        own = runs_of(token_ids, self._n_tokens)
        if not len(own) or not len(self._runs):
            return 0.0
        firsts, ends = (np.searchsorted(self._runs, own, side=side) for side in ("left", "right"))
        counts = ends - firsts
        places = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        of_passages = np.bincount(self._passages[places], minlength=len(self._counts)) / self._counts
        return float(max((counts > 0).mean(), of_passages.max()))


class PartOfDatastore(Datastore):
    """A datastore without the rows of some windows: the same as one made of a text without these windows' passages."""

    def __init__(self, whole: Datastore, is_left_out: np.ndarray) -> None:
        """is_left_out (W,) bool of each window of the text that the whole one was made of."""
        super().__init__(Path(), {}, whole.hidden_size, torch.device("cpu"), 2**63)
        self._whole, self._is_kept = whole, ~is_left_out

    def trie(self, entry_token_id: int) -> TokenTrie | None:
        trie = self._whole.trie(entry_token_id)
        return None if trie is None else trie.where(self._is_kept[trie.windows])
