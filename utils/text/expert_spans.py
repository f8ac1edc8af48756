"""Expert spans: the chunks that a person marked in a text, from its characters to the tokens of its windows.

    {stage 2's output_dir}/{partition}_expert_spans.json    [[window, first, end, span], …], one row a line

A row says that the tokens `first` to `end` - 1 of a window lie in a marked span. Spans are numbered through the text;
a span has a row for each window that holds it whole, with the token before it; one that no window does, for each that
holds a part. No token is in two spans. The file is there only where the text has spans.
"""

import json
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.files import InputError, file_fingerprint, require_file
from utils.json_io import iter_json_list, write_json_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES = ("probability", "expert", "both")
# Keys of stage 2's results: how many spans its windows hold, and the SHA-256 of the file, None where there is none.
N_SPANS, FINGERPRINT = "n_expert_spans", "expert_spans"
ZERO_WIDTH_JOINER = "\u200d"


@dataclass(frozen=True)
class ExpertSpans:
    """The P rows of the file in their order, by window, then token."""

    windows: np.ndarray  # (P,) int64
    firsts: np.ndarray  # (P,) int64
    ends: np.ndarray  # (P,) int64
    spans: np.ndarray  # (P,) int64, ascending within a window

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "ExpertSpans":
        """rows (P, 4) int64."""
        return cls(*rows.T.copy())

    @property
    def rows(self) -> np.ndarray:
        """(P, 4) int64."""
        return np.column_stack([self.windows, self.firsts, self.ends, self.spans])

    @property
    def n_spans(self) -> int:
        return len(np.unique(self.spans))

    @property
    def is_sound(self) -> bool:
        """Whether the rows are in order and no token is in two of them."""
        is_after = (self.windows[1:] > self.windows[:-1]) | (
            (self.windows[1:] == self.windows[:-1]) & (self.firsts[1:] >= self.ends[:-1])
        )
        bounds = (self.windows, self.firsts, self.ends, self.spans)
        is_small = all(bool(((column >= 0) & (column < 2**31)).all()) for column in bounds)
        return is_small and bool((self.firsts < self.ends).all() and is_after.all())

    def of_tokens(self, first_window: int, window_lengths: np.ndarray) -> np.ndarray:
        """(T,) int64: the span of each token of consecutive windows (W,), one after the other; -1 outside of spans.

        Raises InputError where a span reaches beyond its window.
        """
        starts_of_windows = np.cumsum(window_lengths) - window_lengths
        ids = np.full(int(window_lengths.sum()), -1, dtype=np.int64)
        here = slice(*np.searchsorted(self.windows, [first_window, first_window + len(window_lengths)]))
        windows, firsts, ends = self.windows[here] - first_window, self.firsts[here], self.ends[here]
        if len(rows := np.flatnonzero(ends > window_lengths[windows])):
            row = rows[0]
            got = f"an expert span reaches to token {ends[row]} of window {self.windows[here][row]}, which has"
            remedy = "delete stage 2's …_expert_spans.json and run stage 2 again"
            raise InputError(f"{got} {window_lengths[windows[row]]}; {remedy}")
        lengths = ends - firsts
        starts = starts_of_windows[windows] + firsts
        places = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        ids[places] = np.repeat(self.spans[here], lengths)
        return ids

    def spans_at(self, windows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The spans that have a token among these (N,) places, ascending."""
        longest = int(max(self.ends.max(initial=0), positions.max(initial=0))) + 1
        keys = windows.astype(np.int64) * longest + positions
        rows = np.searchsorted(self.windows * longest + self.firsts, keys, side="right") - 1
        rows, keys = rows[rows >= 0], keys[rows >= 0]
        return np.unique(self.spans[rows[keys < (self.windows * longest + self.ends)[rows]]])


# ---- Characters


def cuts_character(text: str, offset: int) -> bool:
    """Whether a border at a character offset divides what a reader sees as one character.

    Offsets count Unicode code points, so none can part a surrogate pair or the bytes of one code point. What is left
    are Unicode's grapheme clusters (UAX 29, without its rule for Indic conjuncts): a letter and its combining marks,
    emoji joined or modified, a flag's two letters, a syllable of Hangul jamo, CR LF.
    """
    if not 0 < offset < len(text):
        return False
    before, after = text[offset - 1], text[offset]
    if before in "\r\n" or after in "\r\n" or unicodedata.category(before) == "Cc":
        return before + after == "\r\n"
    if unicodedata.category(after)[0] == "M" or after in "\u200c\u200d" or "\U0001f3fb" <= after <= "\U0001f3ff":
        return True
    if before == ZERO_WIDTH_JOINER:
        return unicodedata.category(after) == "So"
    if _is_flag_letter(before) and _is_flag_letter(after):
        n_letters = next((n for n in range(offset) if not _is_flag_letter(text[offset - 1 - n])), offset)
        return n_letters % 2 == 1
    return _is_later_jamo(after) and (_is_later_jamo(before) or unicodedata.name(before, "").startswith("HANGUL"))


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _is_later_jamo(character: str) -> bool:
    """Whether a character is a vowel or a final consonant that joins the syllable before it."""
    return "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7fb"


# ---- Tokens


def token_bounds(
    where: str,
    text: str,
    spans: list[tuple[int, int]],
    token_ids: list[int],
    tokenizer: "PreTrainedTokenizerBase",
    offsets: list[tuple[int, int]] | None,
) -> np.ndarray:
    """(S, 2) int64: first token and end of each span of a passage; spans ascend and do not overlap.

    offsets: where each token stands in the text; None where the tokenizer does not say. A token that two spans overlap
    is the first one's. Raises InputError, with the passage's place `where`, where a span has no token of its own.
    """
    borders = np.array(spans, dtype=np.int64).reshape(-1, 2)
    if offsets is None:
        bounds = _bounds_by_decoding(where, text, borders, token_ids, tokenizer)
    else:
        bounds = _bounds_by_offsets(borders, np.array(offsets, dtype=np.int64).reshape(-1, 2))
    touched = bounds.copy()
    bounds[1:, 0] = np.maximum(bounds[1:, 0], np.maximum.accumulate(bounds[:-1, 1]))
    for (start, end), (first, stop), (touched_first, touched_stop) in zip(spans, bounds, touched, strict=True):
        if first >= stop:
            reason = "touches no token" if touched_first >= touched_stop else "has no token but the span's before it"
            raise InputError(f"{where}: its span [{start}, {end}] ({_shown(text[start:end])}) {reason}; mark more")
    return bounds


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:39] + "…", ensure_ascii=False)


def _bounds_by_offsets(borders: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """borders (S, 2) and offsets (T, 2), both half-open. Tokens of no width, such as a mark of the start, touch none."""
    tokens = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    firsts = np.searchsorted(offsets[tokens, 1], borders[:, 0], side="right")
    stops = np.searchsorted(offsets[tokens, 0], borders[:, 1], side="left")
    found = np.append(tokens, len(offsets))
    return np.stack([found[firsts], np.where(stops > firsts, found[stops - 1] + 1, found[firsts])], axis=1)


def _bounds_by_decoding(
    where: str, text: str, borders: np.ndarray, token_ids: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> np.ndarray:
    """The same, for tokenizers written in Python, from how much of the text the first k tokens decode to.

    A token belongs to a span unless the tokens up to it end before the span, or those before it end after. Where only
    white space comes back otherwise (words joined by one space), only the other characters count. Raises InputError
    where more is lost: then no alignment is sure.
    """
    compared = text
    if (whole := _decode(tokenizer, token_ids)) != text:
        compared = _without_space(text)
        if _without_space(whole) != compared:
            reason = "its tokenizer gives neither character offsets nor the text back"
            raise InputError(f"{where}: has spans, but {reason}; give a model with a fast tokenizer")
        before = np.cumsum([0] + [not character.isspace() for character in text])
        borders = before[borders]

    @cache
    def n_alike(n_tokens: int) -> int:
        given = _decode(tokenizer, token_ids[:n_tokens])
        given = given if compared is text else _without_space(given)
        pairs = enumerate(zip(given, compared, strict=False))
        return next((n for n, (a, b) in pairs if a != b), min(len(given), len(compared)))

    def n_characters(n_tokens: int) -> int:
        """The number of characters of the text that the first tokens decode to."""
        # A cut character has three bytes at most, which may spoil the characters before it.
        return max(map(n_alike, range(max(n_tokens - 3, 0), n_tokens + 1)))

    counts = range(len(token_ids) + 1)
    bounds = []
    for start, end in borders.tolist():
        first = bisect_left(counts, start, key=n_characters)
        first -= n_characters(first) > start  # the token before reaches into the span
        stop = bisect_left(counts, end, key=n_characters) if end > start else first
        bounds.append((first, stop))
    return np.array(bounds, dtype=np.int64).reshape(-1, 2)


def _decode(tokenizer: "PreTrainedTokenizerBase", token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


def _without_space(text: str) -> str:
    return "".join(text.split())


# ---- The file


def expert_spans_path(folder: Path) -> Path:
    """folder: stage 2's {output_dir}/{partition}, which the file lies beside."""
    return folder.with_name(f"{folder.name}_expert_spans.json")


def expert_spans_are_written(folder: Path, results: dict[str, object]) -> bool:
    """Whether the results of stage 2 in this folder count the text's spans, and their file is there."""
    return N_SPANS in results and (not results[N_SPANS] or expert_spans_path(folder).exists())


def write_expert_spans(folder: Path, spans: ExpertSpans) -> dict[str, int | str | None]:
    """Write the file, where there are spans; returns what the results of stage 2 say about it."""
    path = expert_spans_path(folder)
    if not len(spans.windows):
        return {N_SPANS: 0, FINGERPRINT: None}
    write_json_list(path, spans.rows.tolist())
    return {N_SPANS: spans.n_spans, FINGERPRINT: file_fingerprint(path)}


def read_expert_spans(folder: Path, results: dict[str, object]) -> ExpertSpans:
    """The spans of a text, as the results of stage 2 count them.

    Raises InputError where the text has none, or the file is missing or not the one that stage 2 wrote.
    """
    path = expert_spans_path(folder)
    if not results.get(N_SPANS):
        wanted = "expert chunks need passages with 'spans' in stage 1's files"
        raise InputError(f"{folder}: no span is marked in its text; {wanted}, then stage 2 again")
    require_file(path, "extract_token_probs_and_memmap.py writes; run it again, it goes on where it was")
    if file_fingerprint(path) != results[FINGERPRINT]:
        raise InputError(f"{path}: is not what stage 2 wrote; delete it and run stage 2 again")
    rows = list(iter_json_list(path))
    if not all(isinstance(row, list) and len(row) == 4 and all(type(n) is int for n in row) for row in rows):
        raise InputError(f"{path}: is not a list of [window, first, end, span]; delete it and run stage 2 again")
    try:
        spans = ExpertSpans.of_rows(np.array(rows, dtype=np.int64).reshape(-1, 4))
        is_sound = spans.is_sound
    except OverflowError:
        is_sound = False
    if not is_sound:
        raise InputError(f"{path}: its spans are not in order, overlap or are none; delete it and run stage 2 again")
    return spans
