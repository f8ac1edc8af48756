"""The chunks of a whole corpus as three JSON lists for people and scripts, made in one pass over stage 2's files.

    {model_ds}_{dataset}_{partition}_token_prob_list.json           one window a line: its token_probs_{i}.json
    {model_ds}_{dataset}_{partition}_all_phrases_{γ}.json           one plateau a line: token ids, the entry token first
    {model_ds}_{dataset}_{partition}_all_filtered_tok_probs_{γ}.json
                                            row for row: [[token_text, probability, chunk_id, position, token_id], …]
    {model_ds}_{dataset}_{partition}_manifest.json

A plateau is a maximal run above γ, or a marked span, with its entry token, not cut by any bound. The lists know nothing of `model_gen`:
datastores of one text that differ in it, or in γ, share what is the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from utils.chunks import ChunkRows, concatenate_rows, find_chunks
from utils.expert_spans import ExpertSpans
from utils.files import InputError, JsonText, json_list_writer
from utils.token_probs import read_token_probs_and_json
from utils.token_trie import in_name
from utils.windows import window_bytes

# Windows whose chunks are found at once: enough to make arrays worth while, few enough to hold their texts.
BATCH_WINDOWS = 256


@dataclass(frozen=True)
class ChunkListPaths:
    """Where the lists of one dataset, partition and `model_ds` lie."""

    output_dir: Path
    dataset: str
    model_ds: str
    partition: str
    tok_prob_threshold: float

    @property
    def _stem(self) -> str:
        return "_".join(map(in_name, (self.model_ds, self.dataset, self.partition)))

    @property
    def manifest(self) -> Path:
        return self.output_dir / f"{self._stem}_manifest.json"

    @property
    def token_prob_list(self) -> Path:
        return self.output_dir / f"{self._stem}_token_prob_list.json"

    @property
    def all_phrases(self) -> Path:
        return self.output_dir / f"{self._stem}_all_phrases_{float(self.tok_prob_threshold)}.json"

    @property
    def all_filtered(self) -> Path:
        return self.output_dir / f"{self._stem}_all_filtered_tok_probs_{float(self.tok_prob_threshold)}.json"

    @property
    def lists(self) -> tuple[Path, Path, Path]:
        return self.token_prob_list, self.all_phrases, self.all_filtered

    def require_no_strays(self) -> None:
        """Raise InputError where lists lie there without a manifest: nothing says what they were made from."""
        if not self.manifest.exists():
            for path in self.lists:
                if path.exists():
                    raise InputError(f"{path}: is of unknown origin (no {self.manifest.name} beside it); delete it")


@dataclass(frozen=True)
class ChunkRule:
    """What makes a chunk: see `find_chunks`."""

    tok_prob_threshold: float
    skip_first_tokens: int
    max_chunk_length: int
    source: str = "probability"  # or expert: the marked spans alone; or both


@dataclass(frozen=True)
class Corpus:
    """Stage 2's files of one partition, and what its manifest says of them."""

    token_prob_dir: Path
    n_windows: int
    windows_fingerprint: str
    n_token_ids: int  # the tokenizer's ids lie below
    expert_spans: ExpertSpans | None = None


@dataclass(frozen=True)
class _Batch:
    """Consecutive windows, one after the other: T tokens."""

    first_window: int
    lengths: list[int]
    texts: list[str]
    token_ids: np.ndarray  # (T,) int32
    probabilities: np.ndarray  # (T,) float64


def write_chunk_lists(
    corpus: Corpus,
    rule: ChunkRule,
    paths: ChunkListPaths,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> ChunkRows:
    """Find the chunks of all windows and write the lists that are not there yet; returns the chunks as rows.

    progress wraps the list of windows that are gone through. Raises InputError where a window's file is missing or
    damaged, holds an id the tokenizer does not have, or the windows are not those of the manifest's fingerprint.
    """
    parts = []
    with ExitStack() as stack:
        write_window, write_ids, write_rows = (
            _skip if path.exists() else stack.enter_context(json_list_writer(path)) for path in paths.lists
        )
        for batch in _batches(corpus, progress, write_window):
            rows = _find_in(batch, rule, corpus.expert_spans)
            if (write_ids, write_rows) != (_skip, _skip):
                _write_plateaus(batch, rows, write_ids, write_rows)
            parts.append(rows)
    return concatenate_rows(parts)


def _skip(_: Any) -> None:
    """The writer of a list that is there."""


def _batches(
    corpus: Corpus, progress: Callable[[Iterable[int]], Iterable[int]], write: Callable[[Any], None]
) -> Iterator[_Batch]:
    """All windows in order, `BATCH_WINDOWS` at a time; `write` gets each one's JSON."""
    digest = hashlib.sha256()
    numbers = iter(progress(range(corpus.n_windows)))
    # The next number is taken when its window's turn has come, which is what the progress bar shows.
    for first in range(0, corpus.n_windows, BATCH_WINDOWS):
        texts, token_ids, probabilities = [], [], []
        for number in islice(numbers, BATCH_WINDOWS):
            window_texts, ids, probs, line = read_token_probs_and_json(corpus.token_prob_dir, number)
            _require_known(corpus, number, ids)
            digest.update(window_bytes(ids))
            write(line)
            texts += window_texts
            token_ids.append(ids)
            probabilities.append(probs)
        yield _Batch(first, list(map(len, token_ids)), texts, np.concatenate(token_ids), np.concatenate(probabilities))
    if digest.hexdigest() != corpus.windows_fingerprint:
        where = f"{corpus.token_prob_dir}: its windows are not those that its manifest was written for"
        raise InputError(f"{where}; run stage 2 again in an empty folder")


def _require_known(corpus: Corpus, window: int, token_ids: np.ndarray) -> None:
    if (largest := int(token_ids.max())) >= corpus.n_token_ids:
        got = f"window {window} holds token id {largest}, but the tokenizer's ids end at {corpus.n_token_ids - 1}"
        raise InputError(f"{corpus.token_prob_dir}: {got}; give the tokenizer of stage 2 as --model_name")


def _find_in(batch: _Batch, rule: ChunkRule, expert_spans: ExpertSpans | None) -> ChunkRows:
    lengths, spans = np.array(batch.lengths), None
    if rule.source != "probability":
        assert expert_spans is not None
        spans = expert_spans.of_tokens(batch.first_window, lengths)
    return find_chunks(
        batch.token_ids,
        np.zeros(len(batch.token_ids)) if rule.source == "expert" else batch.probabilities,
        lengths,
        tok_prob_threshold=rule.tok_prob_threshold,
        skip_first_tokens=rule.skip_first_tokens,
        max_chunk_length=rule.max_chunk_length,
        first_window=batch.first_window,
        spans=spans,
    )


def _write_plateaus(
    batch: _Batch, rows: ChunkRows, write_ids: Callable[[Any], None], write_rows: Callable[[Any], None]
) -> None:
    # Python writes numbers as JSON does; put together here, the lists take half the time of encoding each.
    token_ids, probabilities, texts = batch.token_ids.tolist(), batch.probabilities.tolist(), batch.texts
    heads = rows.plateaus
    firsts = rows.starts[heads] - 1
    ends = firsts + rows.run_lengths[heads] + 1
    places = (rows.windows[heads], rows.positions[heads], firsts, ends)
    for window, position, first, end in zip(*(place.tolist() for place in places), strict=True):
        write_ids(JsonText(token_ids[first:end]))
        lines = [
            f"[{_quoted(texts[i])}, {probabilities[i]!r}, {window}, {position + i - first}, {token_ids[i]}]"
            for i in range(first, end)
        ]
        write_rows(JsonText(f"[{', '.join(lines)}]"))


@lru_cache(maxsize=1 << 17)
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
