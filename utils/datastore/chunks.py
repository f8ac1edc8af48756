"""Chunks: tokens that the LM gave a probability above γ, as rows of (entry token, chunk, window, position).

A maximal run of tokens above γ, or a span that an expert marked, is a plateau. Where `p[j + 1] > γ` in a window, position
j is an entry token, and its chunk is the rest of the plateau after it. So a plateau and all its suffixes are rows, and a
plateau can be entered anywhere. Everything is arrays over many windows: rows index into one flat array of token ids.
"""

from dataclasses import dataclass

import numpy as np

TOKENS_AT_ONCE = 2  # of a chunk that are compared as one number


@dataclass(frozen=True)
class ChunkRows:
    """N rows in corpus order (by window, then position), chunks as slices of one flat array of token ids."""

    token_ids: np.ndarray  # (T,) int32, the windows one after the other
    windows: np.ndarray  # (N,) int32
    positions: np.ndarray  # (N,) int32, of the entry token in its window: there its context vector is taken
    starts: np.ndarray  # (N,) int64, index in token_ids of the chunk's first token; the entry token is before it
    uncut_lengths: np.ndarray  # (N,) int32, tokens from there to the end of the plateau
    max_chunk_length: int  # tokens at which a chunk is cut; 0: not cut

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def entry_ids(self) -> np.ndarray:
        """(N,) int32."""
        return self.token_ids[self.starts - 1]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int32, tokens of each chunk."""
        return np.minimum(self.uncut_lengths, self.max_chunk_length) if self.max_chunk_length else self.uncut_lengths

    @property
    def plateaus(self) -> np.ndarray:
        """Indices, ascending, of the rows that begin a plateau; the rows up to the next one are its suffixes."""
        # The last row of a plateau has one token left. Plateaus may touch: each marked span is one of its own.
        return np.flatnonzero(np.concatenate([[1], self.uncut_lengths[:-1]])[: len(self)] == 1)


def find_chunks(
    token_ids: np.ndarray,
    probabilities: np.ndarray,
    window_lengths: np.ndarray,
    *,
    tok_prob_threshold: float,
    skip_first_tokens: int,
    max_chunk_length: int = 0,
    first_window: int = 0,
    spans: np.ndarray | None = None,
) -> ChunkRows:
    """The rows of consecutive windows, the first of them numbered `first_window`.

    token_ids (T,) int32 and probabilities (T,) float in [0, 1], the windows one after the other; window_lengths (W,)
    int64, sum T. The first `skip_first_tokens` positions of a window are neither entry nor chunk; the next one can be
    an entry token only, whatever its probability. max_chunk_length 0: chunks are not cut. spans (T,) integer: the
    number of the marked span that a token is in, which puts it into a chunk whatever its probability, or -1. Where two
    spans touch, the second begins a plateau of its own, and the last token of the first is its entry token.
    """
    window_starts = np.cumsum(window_lengths) - window_lengths
    positions = np.arange(len(token_ids)) - np.repeat(window_starts, window_lengths)  # (T,)
    is_sure, begins_span = probabilities > tok_prob_threshold, np.zeros(len(token_ids), dtype=bool)
    if spans is not None:
        is_sure |= spans >= 0
        begins_span[1:] = (spans[1:] != spans[:-1]) & (spans[1:] >= 0) & (spans[:-1] >= 0)
    starts = np.flatnonzero(is_sure & (positions > skip_first_tokens))  # (N,)
    goes_on = (np.diff(starts, append=-1) == 1) & ~np.append(begins_span[starts[1:]], True)[: len(starts)]
    last_rows = np.flatnonzero(~goes_on)  # of each plateau
    n_rows = np.diff(last_rows, prepend=-1)
    uncut_lengths = np.repeat(last_rows, n_rows) - np.arange(len(starts)) + 1
    windows = np.repeat(np.arange(first_window, first_window + len(window_lengths)), window_lengths)
    return ChunkRows(
        token_ids=token_ids,
        windows=windows[starts].astype(np.int32),
        positions=(positions[starts] - 1).astype(np.int32),
        starts=starts,
        uncut_lengths=uncut_lengths.astype(np.int32),
        max_chunk_length=max_chunk_length,
    )


# ---- Sorting


def take_chunks(token_ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chunks `token_ids[starts[n]:starts[n] + lengths[n]]`, one after the other, and where each begins, (N + 1,)."""
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # A token of the new flat array comes from its chunk's start plus its place in the chunk.
    return token_ids[np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets


def sort_chunks(chunk_ids: np.ndarray, offsets: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
    """The order (N,) int64 that sorts chunks by key, then by their tokens; equal chunks stay in their order.

    chunk_ids (M,) ids in [0, 2**31), the chunks one after the other; offsets (N + 1,) ascending without gaps: chunk n is
    `chunk_ids[offsets[n]:offsets[n + 1]]`; keys (N,) integer, None for one key. A prefix goes before what it is a
    prefix of.
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    at = 0
    if keys is None:
        keys, at = _words(chunk_ids, starts, lengths, 0), TOKENS_AT_ONCE
    order = np.argsort(keys, kind="stable")
    places, keys = np.arange(len(order)), keys[order]
    begins_group = _differs(keys)
    while len(places):
        # Chunks that are equal so far form groups. Only groups of several, not all ended, are compared further.
        firsts = np.flatnonzero(begins_group)
        sizes = np.diff(firsts, append=len(places))
        goes_on = (sizes > 1) & (np.maximum.reduceat(lengths[order[places]], firsts) > at)
        places = places[np.repeat(goes_on, sizes)]
        groups = np.repeat(firsts[goes_on], sizes[goes_on])
        rows = order[places]
        words = _words(chunk_ids, starts[rows], lengths[rows], at)
        by_word = np.lexsort((words, groups))
        order[places] = rows[by_word]
        begins_group = _differs(groups) | _differs(words[by_word])
        at += TOKENS_AT_ONCE
    return order


def _words(chunk_ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, at: int) -> np.ndarray:
    """(N,) uint64: the next tokens of each chunk from place `at` on as one number; an ended chunk is less than any token."""
    words = np.zeros(len(starts), dtype=np.uint64)
    for place in range(at, at + TOKENS_AT_ONCE):
        words <<= np.uint64(32)
        inside = np.flatnonzero(lengths > place)
        words[inside] += chunk_ids[starts[inside] + place].astype(np.uint64) + np.uint64(1)
    return words


def _differs(values: np.ndarray) -> np.ndarray:
    """(N,) bool: whether each value differs from the one before it; True for the first."""
    return np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]
