"""The chunks of a whole corpus as three JSON lists for people and scripts, made in one pass over stage 2's files.

    {model_ds}_{dataset}_{partition}_token_prob_list.json           one window a line: its token_probs_{i}.json
    {model_ds}_{dataset}_{partition}_all_phrases_{γ}.json           one plateau a line: token ids, the entry token first
    {model_ds}_{dataset}_{partition}_all_filtered_tok_probs_{γ}.json
                                            row for row: [[token_text, probability, chunk_id, position, token_id], …]
    {model_ds}_{dataset}_{partition}_manifest.json

A plateau is a maximal run above γ with its entry token, not cut by any bound. The lists know nothing of `model_gen`:
datastores of one text that differ in it, or in γ, share what is the same.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.chunks import ChunkRows, concatenate_rows, find_chunks
from utils.files import InputError, json_list_writer
from utils.token_probs import read_token_probs_and_json
from utils.token_trie import in_name
from utils.windows import window_bytes

# Windows whose chunks are found at once: enough to make arrays worth while, few enough to hold their texts.
BATCH_WINDOWS = 256
Writer = Callable[[Any], None]


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


@dataclass(frozen=True)
class Corpus:
    """Stage 2's files of one partition, and what its manifest says of them."""

    token_prob_dir: Path
    n_windows: int
    windows_fingerprint: str
    n_token_ids: int  # the tokenizer's ids lie below


@dataclass(frozen=True)
class _Window:
    number: int
    texts: list[str]
    token_ids: np.ndarray  # (L,) int32
    probabilities: np.ndarray  # (L,) float64


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
        writers = [None if path.exists() else stack.enter_context(json_list_writer(path)) for path in paths.lists]
        for windows in _batches(corpus, progress, writers[0]):
            rows = _find_in(windows, rule)
            _write_plateaus(windows, rows, writers[1], writers[2])
            parts.append(rows)
    return concatenate_rows(parts)


def _batches(
    corpus: Corpus, progress: Callable[[Iterable[int]], Iterable[int]], write: Writer | None
) -> Iterator[list[_Window]]:
    """All windows in order, `BATCH_WINDOWS` at a time and none twice; `write` gets each one's JSON."""
    digest, batch = hashlib.sha256(), []
    for number in progress(range(corpus.n_windows)):
        texts, token_ids, probabilities, line = read_token_probs_and_json(corpus.token_prob_dir, number)
        _require_known(corpus, number, token_ids)
        digest.update(window_bytes(token_ids))
        if write is not None:
            write(line)
        batch.append(_Window(number, texts, token_ids, probabilities))
        if len(batch) == BATCH_WINDOWS:
            yield batch
            batch = []
    if digest.hexdigest() != corpus.windows_fingerprint:
        where = f"{corpus.token_prob_dir}: its windows are not those that its manifest was written for"
        raise InputError(f"{where}; run stage 2 again in an empty folder")
    if batch:
        yield batch


def _require_known(corpus: Corpus, window: int, token_ids: np.ndarray) -> None:
    if (largest := int(token_ids.max())) >= corpus.n_token_ids:
        got = f"window {window} holds token id {largest}, but the tokenizer's ids end at {corpus.n_token_ids - 1}"
        raise InputError(f"{corpus.token_prob_dir}: {got}; give the tokenizer of stage 2 as --model_name")


def _find_in(windows: list[_Window], rule: ChunkRule) -> ChunkRows:
    return find_chunks(
        np.concatenate([window.token_ids for window in windows]),
        np.concatenate([window.probabilities for window in windows]),
        np.array([len(window.token_ids) for window in windows]),
        tok_prob_threshold=rule.tok_prob_threshold,
        skip_first_tokens=rule.skip_first_tokens,
        max_chunk_length=rule.max_chunk_length,
        first_window=windows[0].number,
    )


def _write_plateaus(
    windows: list[_Window], rows: ChunkRows, write_ids: Writer | None, write_rows: Writer | None
) -> None:
    if write_ids is None and write_rows is None:
        return
    heads = rows.plateaus
    places = (rows.windows[heads], rows.positions[heads], rows.positions[heads] + rows.run_lengths[heads] + 1)
    for number, first, end in zip(*(place.tolist() for place in places), strict=True):
        window = windows[number - windows[0].number]
        token_ids = window.token_ids[first:end].tolist()
        if write_ids is not None:
            write_ids(token_ids)
        if write_rows is not None:
            probabilities = window.probabilities[first:end].tolist()
            texts, n = window.texts[first:end], end - first
            write_rows(list(zip(texts, probabilities, [number] * n, range(first, end), token_ids, strict=True)))
