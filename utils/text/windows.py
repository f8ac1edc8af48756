"""Windows: the slices of a passage that the LM reads in one forward pass, and the batches in which it reads them.

A window starts every `stride` tokens of a passage and holds at most `chunk_size`; one that would hold no new token is
not made. What is to be read is planned before anything is computed (`plan_windows`, `plan_batches`), so that the plan
depends on the text, the tokenizer and the flags alone, and never on what an earlier run left on disk.

    {stage 2's output_dir}/{partition}_plan.npy    a plan that several processes share, until stage 2 is done; four
        arrays one after the other, as np.save writes them: JSON in bytes (n,) uint8, starts and lengths (N, 2) int64,
        rows of the expert spans (P, 4) int64, token ids of the passages (T,) int32
"""

import hashlib
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from utils.files import InputError, replacing
from utils.progress import ProgressBar
from utils.text.expert_spans import ExpertSpans, token_bounds
from utils.text.prompts import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from utils.text.corpora import Passage

LOGGER = logging.getLogger(__name__)
# Passages are tokenised together until they hold this many characters: enough for all of a fast tokenizer's threads.
TOKENIZED_CHARACTERS = 1 << 18
# Token ids that are copied at a time when a plan is saved.
COPIED_TOKENS = 1 << 20


@dataclass(frozen=True)
class WindowShape:
    """How passages are cut and read: most tokens of a window, tokens from one start to the next, tokens of the shortest
    passage, and whether the LM reads the tokenizer's BOS, if it adds one, before each window."""

    chunk_size: int
    stride: int
    min_length: int
    with_bos: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.chunk_size:
            message = f"--stride {self.stride}: expected 1 to the --chunk_size of {self.chunk_size}"
            raise InputError(f"{message}, or tokens between two windows would be left out")

    def bounds(self, n_tokens: int) -> list[tuple[int, int]]:
        """First token and end of each window of a passage; empty where the passage is too short."""
        if n_tokens < max(self.min_length, 1):
            return []
        # A window after the first is made only where the one before stops short of the passage's end.
        starts = range(0, max(n_tokens - self.chunk_size + self.stride, 1), self.stride)
        return [(start, min(start + self.chunk_size, n_tokens)) for start in starts]


class TokenFile:
    """Token ids, int32, in an open file, which is closed with this object.

    Read piece by piece, not mapped: mapped pages would count as this process's memory, 4 bytes a token.
    """

    def __init__(self, file: IO[bytes], offset: int = 0) -> None:
        """offset: of the first token id, in bytes."""
        self._file, self._offset = file, offset

    def read(self, first: int, n_tokens: int) -> np.ndarray:
        """(n_tokens,) int32 from the `first` on; read-only. Raises InputError where the disk fails."""
        itemsize = np.dtype(np.int32).itemsize
        try:
            found = os.pread(self._file.fileno(), n_tokens * itemsize, self._offset + first * itemsize)
        except OSError as error:
            raise InputError(f"the text's token ids cannot be read back ({error.strerror}); check the disk") from error
        return np.frombuffer(found, dtype=np.int32)


@dataclass(frozen=True)
class WindowPlan:
    """All windows of a text, numbered in its order; the token ids are in a file, the bounds in memory."""

    passage_tokens: TokenFile  # the passages one after the other
    starts: np.ndarray  # (N,) int64: where each window begins in them
    lengths: np.ndarray  # (N,) int64
    n_passages: int  # that have windows
    n_short_passages: int  # left out
    n_short_spans: int  # marked in them
    largest_id: int
    fingerprint: str  # SHA-256 over each window's length and ids, in order
    prefix_ids: list[int]  # that the LM reads before each window, and that are not of the text: BOS as a rule, or none
    expert_spans: ExpertSpans  # marked in the text
    n_bytes: np.ndarray | None = None  # (N,) int64: of the text, in UTF-8, after each window's first token

    @property
    def n_windows(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows: those that two windows share count twice."""
        return int(self.lengths.sum())

    @cached_property
    def first_counted(self) -> np.ndarray:
        """(N,) int64: the first token of each window that counts in a perplexity, so that each of the text counts once.

        It is the first that the window before does not hold too, and the second of a window at the earliest: nothing of
        the text stands before a window's first token.
        """
        ends = self.starts + self.lengths
        return np.maximum(np.concatenate([[0], ends[:-1]]) - self.starts, 1)

    def token_ids(self, window: int) -> np.ndarray:
        """(L,) int32, one window's."""
        return self.passage_tokens.read(int(self.starts[window]), int(self.lengths[window]))

    def batch_token_ids(self, windows: np.ndarray) -> np.ndarray:
        """(B, L) int32, the windows of one batch, which are equally long."""
        return np.stack([self.token_ids(window) for window in windows])


def window_bytes(token_ids: np.ndarray) -> bytes:
    """What a window, token_ids (L,), adds to the fingerprint of all windows: its length and its ids."""
    return len(token_ids).to_bytes(8, "little") + token_ids.astype("<i4").tobytes()


# ---- Planning


def plan_windows(
    passages: Iterable["Passage"],
    tokenizer: "PreTrainedTokenizerBase",
    shape: WindowShape,
    folder: Path,
    n_bytes: int | None = None,
    counts_bytes: bool = False,
) -> WindowPlan:
    """Tokenise a text and cut it into windows, in memory that holds a few passages and 16 bytes a window.

    The ids go to an unnamed file in `folder`, 4 bytes each, which disappears with the plan or the process. n_bytes: the
    text's size, for the progress bar; None: no bar. counts_bytes: fill in the plan's `n_bytes`. Raises InputError where
    no passage is long enough, a span touches no token, or the folder's disk is full.
    """
    bar = ProgressBar(total=n_bytes, desc="tokenising", unit="B", unit_scale=True, disable=n_bytes is None)
    try:
        with bar:
            prefix_ids = added_tokens(tokenizer)[0] if shape.with_bos else []
            draft = _Draft(shape, prefix_ids, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 (it is closed with the plan)
            for group in _grouped(passages):
                for token_ids, bounds, ends in _tokenized(group, tokenizer, draft.n_seen, counts_bytes):
                    draft.add(np.array(token_ids, dtype=np.int32), bounds, ends)
                bar.update(sum(len(passage.text) for passage in group))
            bar.update(max((n_bytes or 0) - bar.n, 0))  # what JSON adds to the text, escapes and braces
            plan = draft.plan()
    except OSError as error:
        message = f"{folder}: the text's token ids cannot be written there ({error.strerror})"
        raise InputError(f"{message}; free space or choose another folder") from error
    LOGGER.debug("%s passages, %s windows, %s tokens", plan.n_passages, plan.n_windows, plan.n_tokens)
    return plan


@dataclass
class _Draft:
    """A plan that grows by one passage at a time."""

    shape: WindowShape
    prefix_ids: list[int]
    file: IO[bytes]
    n_written: int = 0
    n_passages: int = 0
    n_short_passages: int = 0
    n_short_spans: int = 0
    n_spans: int = 0
    n_longest: int = 0
    largest_id: int = 0
    starts: array = field(default_factory=lambda: array("q"))
    lengths: array = field(default_factory=lambda: array("q"))
    n_bytes: array = field(default_factory=lambda: array("q"))
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    marked: array = field(default_factory=lambda: array("q"))  # window, first, end and span of each piece in turn

    @property
    def n_seen(self) -> int:
        return self.n_passages + self.n_short_passages

    def add(self, token_ids: np.ndarray, span_bounds: np.ndarray, byte_ends: np.ndarray | None) -> None:
        """token_ids (T,) of a passage; span_bounds (S, 2): first token and end of each marked span; byte_ends (T,): where
        in the passage's UTF-8 each token ends, None: not counted."""
        bounds = self.shape.bounds(len(token_ids))
        self.n_longest = max(self.n_longest, len(token_ids))
        if not bounds:
            self.n_short_passages += 1
            self.n_short_spans += len(span_bounds)
            return
        self.n_passages += 1
        self.largest_id = max(self.largest_id, int(token_ids.max()))
        self._mark(span_bounds, bounds)
        for start, end in bounds:
            self.digest.update(window_bytes(token_ids[start:end]))
            self.starts.append(self.n_written + start)
            self.lengths.append(end - start)
            if byte_ends is not None:
                self.n_bytes.append(int(byte_ends[end - 1] - byte_ends[start]))
        self.file.write(token_ids.tobytes())
        self.n_written += len(token_ids)
        self.n_spans += len(span_bounds)

    def _mark(self, span_bounds: np.ndarray, bounds: list[tuple[int, int]]) -> None:
        """Note which of a passage's spans its windows, the next ones, hold.

        A fact that a window's end cuts short would be a wrong one. So a span is marked in the windows that hold it
        whole, with the token before it; one that no window holds so, in all windows that hold a part of it.
        """
        if not len(span_bounds):
            return
        firsts, ends = span_bounds.T
        whole = [((start < firsts) | (firsts == 0)) & (ends <= end) & (start <= firsts) for start, end in bounds]
        is_whole_somewhere = np.logical_or.reduce(whole)
        for n, (start, end) in enumerate(bounds):
            pieces = span_bounds.clip(start, end) - start  # (S, 2)
            held = np.flatnonzero((pieces[:, 0] < pieces[:, 1]) & (whole[n] | ~is_whole_somewhere))
            window = np.full(len(held), len(self.starts) + n)
            rows = np.column_stack([window, pieces[held], self.n_spans + held])
            self.marked.frombytes(rows.astype(np.int64).tobytes())

    def plan(self) -> WindowPlan:
        if not self.starts:
            longest = f"the longest of its {self.n_short_passages} passages has {self.n_longest}"
            wanted = f"the {self.shape.min_length} tokens of --min_length"
            raise InputError(f"the text has no passage of {wanted} ({longest}); lower it or give another text")
        self.file.flush()
        return WindowPlan(
            TokenFile(self.file),
            np.array(self.starts),
            np.array(self.lengths),
            self.n_passages,
            self.n_short_passages,
            self.n_short_spans,
            self.largest_id,
            self.digest.hexdigest(),
            self.prefix_ids,
            ExpertSpans.of_rows(np.array(self.marked, dtype=np.int64).reshape(-1, 4)),
            np.array(self.n_bytes) if self.n_bytes else None,
        )


def _grouped(passages: Iterable["Passage"]) -> Iterator[list["Passage"]]:
    """The passages in order, as many at a time as make up `TOKENIZED_CHARACTERS`."""
    group: list[Passage] = []
    n_characters = 0
    for passage in passages:
        group.append(passage)
        n_characters += len(passage.text)
        if n_characters >= TOKENIZED_CHARACTERS:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def _tokenized(
    group: list["Passage"], tokenizer: "PreTrainedTokenizerBase", n_before: int, counts_bytes: bool
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None]]:
    """The token ids of each passage, the token bounds (S, 2) of its spans, and where in its bytes each token ends.

    n_before: passages before the group; counts_bytes False: the last is None.
    """
    # Offsets only where they are needed: they take as long as the ids.
    with_offsets = tokenizer.is_fast and (counts_bytes or any(passage.spans for passage in group))
    encoded = tokenizer(
        [passage.text for passage in group],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )
    for i, passage in enumerate(group):
        token_ids, bounds = encoded["input_ids"][i], np.zeros((0, 2), dtype=np.int64)
        if passage.spans:
            offsets = encoded["offset_mapping"][i] if with_offsets else None
            where = f"passage {n_before + i + 1} of the text"
            bounds = token_bounds(where, passage.text, passage.spans, token_ids, tokenizer, offsets)
        ends = None
        if counts_bytes:
            offsets = encoded["offset_mapping"][i] if with_offsets else None
            ends = _byte_ends(passage.text, token_ids, tokenizer, offsets)
        yield token_ids, bounds, ends


def _byte_ends(
    text: str, token_ids: list[int], tokenizer: "PreTrainedTokenizerBase", offsets: list[tuple[int, int]] | None
) -> np.ndarray:
    """(T,) int64: where in the UTF-8 of a passage each token ends.

    Without offsets, of tokenizers written in Python, the bytes are shared out as the tokens' own texts are long.
    """
    n_bytes = np.array([len(character.encode()) for character in text], dtype=np.int64)
    if offsets is not None:
        ends = np.array([end for _, end in offsets], dtype=np.int64)
        return np.concatenate([[0], np.cumsum(n_bytes)])[np.maximum.accumulate(ends)] if len(ends) else ends
    sizes = np.cumsum([len(str(tokenizer.decode([token])).encode()) for token in token_ids])
    return np.rint(sizes * (n_bytes.sum() / max(int(sizes[-1]), 1))).astype(np.int64) if len(sizes) else sizes


# ---- A plan that processes share


COUNTS = ("n_passages", "n_short_passages", "n_short_spans", "largest_id", "fingerprint", "prefix_ids")


def save_plan(path: Path, plan: WindowPlan, made_from: dict[str, Any]) -> None:
    """Write a plan for other processes; made_from: what it depends on, JSON. Raises InputError where the disk is full."""
    about = json.dumps({"made_from": made_from} | {name: getattr(plan, name) for name in COUNTS})
    n_tokens = int((plan.starts + plan.lengths).max())
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.frombuffer(about.encode(), dtype=np.uint8))
        np.save(file, np.column_stack([plan.starts, plan.lengths]))
        np.save(file, plan.expert_spans.rows)
        npy.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (n_tokens,)})
        for first in range(0, n_tokens, COPIED_TOKENS):
            file.write(plan.passage_tokens.read(first, min(COPIED_TOKENS, n_tokens - first)).astype("<i4").tobytes())


def load_plan(path: Path, made_from: dict[str, Any]) -> WindowPlan | None:
    """A plan that was saved; None where there is none, a damaged one, or one that was made from something else."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (it is closed with the plan)
    except OSError:
        return None
    try:
        about = json.loads(np.load(file).tobytes())
        starts, lengths = np.load(file).T.copy()
        spans = ExpertSpans.of_rows(np.load(file))
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        is_whole = shape == (int((starts + lengths).max()),) and dtype == np.dtype("<i4")
        is_whole &= path.stat().st_size == file.tell() + shape[0] * dtype.itemsize
        if is_whole and about["made_from"] == made_from:
            counts = {name: about[name] for name in COUNTS}
            tokens = TokenFile(file, file.tell())
            return WindowPlan(passage_tokens=tokens, starts=starts, lengths=lengths, expert_spans=spans, **counts)
    except (ValueError, TypeError, KeyError, EOFError, TokenError, OSError) as error:
        LOGGER.debug("%s: is damaged (%s) and made anew", path, error)
    file.close()
    return None


# ---- Batches


def plan_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The windows in batches of at most `batch_size` equally long ones, so that no token is padding.

    lengths (N,). Each batch is int64, ascending; batches come in the order of their first windows. A function of the
    arguments alone: the last bits of what a model computes depend on the windows in its batch, so a run that continues
    an interrupted one must form the same batches to write the same bytes.
    """
    order = np.argsort(lengths, kind="stable")
    changes = np.flatnonzero(np.diff(lengths[order])) + 1
    batches = [
        windows[first : first + batch_size]
        for windows in np.split(order, changes)
        for first in range(0, len(windows), batch_size)
    ]
    return sorted(batches, key=lambda windows: int(windows[0]))
