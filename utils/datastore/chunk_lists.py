"""Stage 3: the chunks of a whole corpus, found in one pass over stage 2's files, and three JSON lists to read.

    {model_ds}_{dataset}_{partition}_token_prob_list.json           one window a line: its token_probs_{i}.json
    {model_ds}_{dataset}_{partition}_all_phrases_{γ}.json           one plateau a line: token ids, the entry token first
    {model_ds}_{dataset}_{partition}_all_filtered_tok_probs_{γ}.json
                                            row for row: [[token_text, probability, chunk_id, position, token_id], …]
    {model_ds}_{dataset}_{partition}_manifest.json

A plateau has its entry token in front and is not cut by --max_chunk_length. The lists do not depend on `model_gen`, so
datastores of one text that differ in that, or in γ, share the lists that are the same.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from utils.datastore.chunks import ChunkRows, find_chunks
from utils.datastore.external_sort import Keys, SortRun, SortRuns, write_run
from utils.datastore.trie_files import sanitize_label
from utils.extraction.token_probs import WindowTokenProbs, read_window
from utils.files import InputError
from utils.json_io import JsonBytes, json_list_writer
from utils.text.expert_spans import ExpertSpans
from utils.text.windows import window_bytes
from utils.workers import in_processes, n_workers_for

# Tokens of the windows whose chunks are found at once: enough to make arrays worth while, few enough to hold their texts.
BATCH_TOKENS = 1 << 15
# Tokens whose chunks one process finds in a second (benchmarks/build.py).
TOKENS_PER_S = 400_000
# Bytes of a file's name: file systems allow 255, and a file is written under its name with a dot and .tmp around it.
LONGEST_NAME = 250


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
        return "_".join(map(sanitize_label, (self.model_ds, self.dataset, self.partition)))

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

    @property
    def files(self) -> list[Path]:
        """All lists in the folder, those of other γ too."""
        kinds = ("token_prob_list.json", "all_phrases_", "all_filtered_tok_probs_")
        starts = tuple(f"{self._stem}_{kind}" for kind in kinds)
        return [path for path in self.output_dir.iterdir() if path.name.startswith(starts)]

    def require_names_fit(self) -> None:
        """Raise InputError where the labels make a longer file name than file systems allow."""
        longest = max((path.name for path in self.lists), key=len)
        if len(os.fsencode(longest)) > LONGEST_NAME:
            raise InputError(
                f"{longest[:60]}…: the labels make a file name of {len(os.fsencode(longest))} bytes, expected at most "
                f"{LONGEST_NAME}; give a shorter --dataset_name, --model_ds or --partition"
            )

    def refuse_files_without_manifest(self) -> None:
        """Raise InputError where there are lists without a manifest: nothing says what they were made from."""
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
    extracted: dict[str, Any]  # the manifest's results
    n_token_ids: int  # the tokenizer's ids lie below
    expert_spans: ExpertSpans | None = None

    @property
    def batches(self) -> list[range]:
        """The windows whose chunks are found at once."""
        n_windows = self.extracted["n_windows"]
        n_of_batch = max(BATCH_TOKENS * n_windows // self.extracted["n_tokens"], 1)
        return [range(first, min(first + n_of_batch, n_windows)) for first in range(0, n_windows, n_of_batch)]


@dataclass
class CorpusChunks:
    """The chunks of a corpus: their rows as sorted runs, and counts."""

    runs: SortRuns
    n_windows: int = 0
    n_tokens: int = 0
    n_plateaus: int = 0
    expert_spans: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # with a token in a chunk

    def add(self, found: "_Found") -> None:
        self.runs.add(found.run)
        self.n_windows += len(found.windows)
        self.n_tokens += found.n_tokens
        self.n_plateaus += found.n_plateaus
        self.expert_spans = np.union1d(self.expert_spans, found.expert_spans)


@dataclass(frozen=True)
class _Found:
    """What was found in some windows: entries of the lists, bytes of the fingerprint, rows and counts."""

    windows: range
    lists: tuple[list[bytes], ...]  # entries of the lists that are wanted
    fingerprinted: bytes
    run: SortRun
    n_tokens: int
    n_plateaus: int
    expert_spans: np.ndarray


def find_all_chunks(
    corpus: Corpus,
    rule: ChunkRule,
    paths: ChunkListPaths,
    runs_folder: Path,
    max_workers: int,
    progress: Callable[[int], object] = lambda n_windows: None,
) -> CorpusChunks:
    """Find the chunks of all windows, write their rows as sorted runs, and the lists that are not there yet.

    progress is called with the number of windows that were done. Raises InputError where a window's file is missing or
    damaged, holds an id the tokenizer does not have, or the windows are not those of the manifest's fingerprint.
    """
    keys = Keys(corpus.n_token_ids)
    wanted = tuple(not path.exists() for path in paths.lists)
    prepare = partial(_Finder, corpus, rule, keys, runs_folder, wanted)
    n_workers = n_workers_for(corpus.extracted["n_tokens"] / TOKENS_PER_S, max_workers)
    chunks, digest = CorpusChunks(SortRuns(keys)), hashlib.sha256()
    with ExitStack() as stack:
        writers = [stack.enter_context(json_list_writer(path)) for path in compress(paths.lists, wanted)]
        where = str(corpus.token_prob_dir)
        for found in in_processes(prepare, corpus.batches, n_workers, where=where, in_order=True):
            for write, entries in zip(writers, found.lists, strict=True):
                if entries:
                    write(JsonBytes(b",\n".join(entries)))
            digest.update(found.fingerprinted)
            chunks.add(found)
            progress(len(found.windows))
        if digest.hexdigest() != corpus.extracted["windows_fingerprint"]:
            message = f"{where}: its windows are not those that its manifest was written for"
            raise InputError(f"{message}; run stage 2 again in an empty folder")
    return chunks


# ---- Some windows


@dataclass(frozen=True)
class _Finder:
    """Finds the chunks of some windows; wanted: which of the three lists are to be written."""

    corpus: Corpus
    rule: ChunkRule
    keys: Keys
    runs_folder: Path
    wanted: tuple[bool, ...]

    def __call__(self, windows: range) -> _Found:
        read = [self._read(window) for window in windows]
        token_ids = np.concatenate([window.token_ids for window in read])
        probabilities = np.concatenate([window.probabilities for window in read])
        rows = self._find(windows, token_ids, probabilities, np.array([len(window.token_ids) for window in read]))
        token_prob_list, all_phrases, all_filtered = self.wanted
        lists = []
        if token_prob_list:
            lists.append([window.json for window in read])
        if all_phrases or all_filtered:
            heads = rows.plateaus
            firsts = rows.starts[heads] - 1
            bounds = list(zip(firsts.tolist(), (firsts + rows.uncut_lengths[heads] + 1).tolist(), strict=True))
            if all_phrases:
                ids = list(map(b"%d".__mod__, token_ids.tolist()))
                lists.append([b"[%b]" % b", ".join(ids[first:end]) for first, end in bounds])
            if all_filtered:
                texts = [row for window in read for row in window.row_texts]
                lists.append([b"[[%b]]" % b"], [".join(texts[first:end]) for first, end in bounds])
        spans = self.corpus.expert_spans
        return _Found(
            windows,
            tuple(lists),
            b"".join(window_bytes(window.token_ids) for window in read),
            write_run(self.runs_folder / f"{windows.start}.rows", rows, self.keys),
            len(token_ids),
            len(rows.plateaus),
            np.zeros(0, dtype=np.int64) if spans is None else spans.spans_at(rows.windows, rows.positions + 1),
        )

    def _read(self, window: int) -> WindowTokenProbs:
        read = read_window(self.corpus.token_prob_dir, window)
        if (largest := int(read.token_ids.max())) >= self.corpus.n_token_ids:
            got = f"window {window} holds token id {largest}, but the tokenizer's ids end at"
            remedy = "give the tokenizer of stage 2 as --model_name"
            raise InputError(f"{self.corpus.token_prob_dir}: {got} {self.corpus.n_token_ids - 1}; {remedy}")
        return read

    def _find(self, windows: range, token_ids: np.ndarray, probabilities: np.ndarray, lengths: np.ndarray) -> ChunkRows:
        spans = None
        if self.rule.source != "probability":
            assert self.corpus.expert_spans is not None
            spans = self.corpus.expert_spans.of_tokens(windows.start, lengths)
        return find_chunks(
            token_ids,
            np.zeros(len(token_ids)) if self.rule.source == "expert" else probabilities,
            lengths,
            tok_prob_threshold=self.rule.tok_prob_threshold,
            skip_first_tokens=self.rule.skip_first_tokens,
            max_chunk_length=self.rule.max_chunk_length,
            first_window=windows.start,
            spans=spans,
        )
