"""Chunks: the runs of tokens that the LM was sure of, as rows of (entry token, chunk, where it stands).

Where `p[j + 1] > γ` in a window, position j is an entry token and its chunk is the run of tokens above γ that follows
it. Tokens that an expert marked form runs too, one for each marked span. One row for each such position gives every maximal run with the token before it (a plateau) and all its suffixes.
Everything here is arrays over a whole corpus at once: rows index into one flat array of token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChunkRows:
    """N rows in corpus order (by window, then position), chunks as slices of one flat array of token ids."""

    token_ids: np.ndarray  # (T,) int32, the windows one after the other
    windows: np.ndarray  # (N,) int32
    positions: np.ndarray  # (N,) int32, of the entry token in its window: there its context vector is taken
    starts: np.ndarray  # (N,) int64, index in token_ids of the chunk's first token; the entry token is before it
    run_lengths: np.ndarray  # (N,) int32, tokens from there to the end of the run
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
        return np.minimum(self.run_lengths, self.max_chunk_length) if self.max_chunk_length else self.run_lengths

    @property
    def plateaus(self) -> np.ndarray:
        """Indices, ascending, of the rows that begin a maximal run; the rows up to the next one are its suffixes."""
        # Of a run's rows the last one has one token left. Runs may touch: spans do, which are runs of their own.
        return np.flatnonzero(np.concatenate([[1], self.run_lengths[:-1]])[: len(self)] == 1)


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
    int64, sum T. The first `skip_first_tokens` positions of a window are neither entry nor chunk. The next one can be
    an entry only, whatever its own probability. max_chunk_length 0: chunks are not cut. spans (T,) integer: the number
    of the marked span that a token is in, which makes it a chunk's whatever its probability, or -1; where two spans
    touch, the second begins a run of its own, with the last token of the first as its entry token.
    """
    window_starts = np.cumsum(window_lengths) - window_lengths
    positions = np.arange(len(token_ids)) - np.repeat(window_starts, window_lengths)  # (T,)
    is_sure, begins_span = probabilities > tok_prob_threshold, np.zeros(len(token_ids), dtype=bool)
    if spans is not None:
        is_sure |= spans >= 0
        begins_span[1:] = (spans[1:] != spans[:-1]) & (spans[1:] >= 0) & (spans[:-1] >= 0)
    starts = np.flatnonzero(is_sure & (positions > skip_first_tokens))  # (N,)
    goes_on = (np.diff(starts, append=-1) == 1) & ~np.append(begins_span[starts[1:]], True)[: len(starts)]
    run_ends = np.flatnonzero(~goes_on)  # the last row of each run
    rows_of_run = np.diff(run_ends, prepend=-1)
    run_lengths = np.repeat(run_ends, rows_of_run) - np.arange(len(starts)) + 1
    windows = np.repeat(np.arange(first_window, first_window + len(window_lengths)), window_lengths)
    return ChunkRows(
        token_ids=token_ids,
        windows=windows[starts].astype(np.int32),
        positions=(positions[starts] - 1).astype(np.int32),
        starts=starts,
        run_lengths=run_lengths.astype(np.int32),
        max_chunk_length=max_chunk_length,
    )


def concatenate_rows(parts: Sequence[ChunkRows]) -> ChunkRows:
    """The rows of one corpus from those of its pieces, in their order; at least one piece."""
    offsets = np.cumsum([0] + [len(part.token_ids) for part in parts[:-1]])
    return ChunkRows(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        windows=np.concatenate([part.windows for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        starts=np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=True)]),
        run_lengths=np.concatenate([part.run_lengths for part in parts]),
        max_chunk_length=parts[0].max_chunk_length,
    )


# ---- Prefix-sorting


def sort_by_entry_and_length(rows: ChunkRows) -> np.ndarray:
    """The order (N,) int64 of the token tries: by entry id, chunk length, chunk, window, position."""
    ranks = _ranks_of(rows)
    return np.lexsort((ranks, rows.lengths, rows.entry_ids))  # stable, and the rows come by window and position


def sort_by_entry(rows: ChunkRows) -> np.ndarray:
    """The prefix-sorted order (N,) int64: by entry id, then chunk, then window, then position."""
    return np.lexsort((_ranks_of(rows), rows.entry_ids))


def _ranks_of(rows: ChunkRows) -> np.ndarray:
    # The suffixes of a run are rows too, and stand one after the other: what `_prefix_ranks` asks for.
    return _prefix_ranks(rows.token_ids[rows.starts], rows.run_lengths, rows.max_chunk_length)


def sort_chunks(chunk_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The prefix-sorted order (N,) int64 of the chunks of one entry token; equal chunks stay in their order.

    chunk_ids (M,) integer, the chunks one after the other; offsets (N + 1,) ascending without gaps, chunk n is
    `chunk_ids[offsets[n]:offsets[n + 1]]`, none of them empty.
    """
    tails = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(chunk_ids))
    return np.argsort(_prefix_ranks(chunk_ids, tails)[offsets[:-1]], kind="stable")


def _prefix_ranks(token_ids: np.ndarray, tails: np.ndarray, max_length: int = 0) -> np.ndarray:
    """Ranks (M,) int64 of the strings `token_ids[m : m + min(tails[m], max_length)]`; equal strings, equal ranks.

    token_ids (M,) integer; tails (M,) tokens from m to the end of its string, so `tails[m + 1] == tails[m] - 1` where
    that is not 0. A prefix ranks before what it is a prefix of. max_length 0: no bound. Prefix doubling (Manber and
    Myers' suffix arrays): the rank over 2w tokens is that of the pair of ranks over w tokens, here and w further on.
    """
    if not len(token_ids):
        return np.zeros(0, dtype=np.int64)
    longest = int(tails.max())
    bound = min(max_length or longest, longest)
    doubled = np.unique(token_ids, return_inverse=True)[1].astype(np.int64)
    # Of the first w tokens of each string, for w the binary digits of the bound met so far.
    combined: np.ndarray | None = None
    width = 1
    while True:
        if doubled.max() == len(token_ids) - 1:
            return doubled  # all strings differ within the width: more tokens change nothing
        if bound & width:
            combined = doubled if combined is None else _pair_ranks(doubled, combined, tails, width)
        if 2 * width > bound:
            assert combined is not None
            return combined
        doubled = _pair_ranks(doubled, doubled, tails, width)
        width *= 2


def _pair_ranks(first: np.ndarray, second: np.ndarray, tails: np.ndarray, width: int) -> np.ndarray:
    """Ranks (M,) int64 of the pairs `first[m], second[m + width]`; a string that ends before that comes first."""
    keys = first * (len(first) + 1)
    goes_on = np.flatnonzero(tails > width)
    keys[goes_on] += second[goes_on + width] + 1
    return np.unique(keys, return_inverse=True)[1]
