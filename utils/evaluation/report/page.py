"""One page about a run for people to look at: `eval.py --report report.html`.

The page is `report.html`, `report.css` and `report.js` beside this file with the data put in, so it needs no network and
no server. Text from models and corpora is embedded as data only: JSON in which no character can end the element that
holds it, and the script makes text nodes of it. The page's own policy lets nothing run but that script.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.datastore.provenance import Segment, SourceWindow, find_windows, read_windows, segments_around
from utils.decoding.acceptance import AcceptanceMap, would_repeat
from utils.decoding.types import Detokenize, Generation, StepRecord, TokenTexts
from utils.evaluation.report.rescore import RescoredProposal, RescoredText
from utils.evaluation.results import BASELINE
from utils.evaluation.summary import figure_rows
from utils.files import InputError, replacing

# New tokens of the texts on a page, all together; what comes after is left out and said to be.
MAX_TOKENS = 150_000
# Tokens of source text on a page: some 2 MB. Whose sources, and how many tokens on each side: the first that fits.
SOURCE_TOKENS = 500_000
CONTEXTS = (("all", 60), ("all", 30), ("accepted", 60), ("accepted", 30), ("accepted", 12), ("accepted", 6))
HISTOGRAM_BINS = 40
# Verdicts about a proposal, beside 0: the similarity rejected it. report.js has them too.
ACCEPTED, VETOED, REPEATS = 1, 2, 3

# What could end the element that holds the data, what old parsers take for a line's end, what is no character, and
# what an editor would not show.
_UNSAFE = re.compile("[<>&\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ud800-\\udfff]")


@dataclass(frozen=True)
class ReportRun:
    """What a page is about: the run's name, its labels and settings to show, and how it decided."""

    name: str
    title: str
    facts: list[tuple[str, str]]
    similarity_threshold: float
    min_first_token_prob: float
    reject_repeats: bool
    policy: str
    acceptance_map: AcceptanceMap | None  # g; None where nothing is proposed
    is_fitted: bool  # not from θ
    corpus: str  # what the chunks are of
    trie_folder: Path | None


# Rescores a text of chunk mode.
Rescore = Callable[[Generation], RescoredText]


def write_report(
    path: Path,
    run: ReportRun,
    summary: Mapping[str, Any],
    texts: Iterable[tuple[Generation, Generation | None]],
    decode: Detokenize,
    rescore: Rescore | None = None,
) -> None:
    """Write the page; raises InputError where `path` cannot be written.

    summary: as `write_summary` gives it; texts: each with the baseline's of the same prompt and settings, if there is
    one, in the order of the page; rescore: rescores a text of chunk mode; None where nothing was proposed.
    """
    data = _Page(run, summary, decode, rescore).data(texts)
    folder = Path(__file__).parent
    page, style, script = (
        (folder / f"report.{kind}").read_text(encoding="utf-8").strip() for kind in ("html", "css", "js")
    )
    policy = f"default-src 'none'; style-src {_hash_of(style)}; script-src {_hash_of(script)}; base-uri 'none'; form-action 'none'"
    parts = {"title": _as_html(run.title), "policy": policy, "style": style, "script": script, "data": as_data(data)}
    # All at once, so that nothing in one part is taken for the place of another.
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def as_data(value: Any) -> str:
    """JSON that a `<script type="application/json">` can hold, whatever the strings are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _hash_of(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(f"\n{text}\n".encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _as_html(text: str) -> str:
    return re.sub(r"[^\w .,:;()/=+-]", lambda match: f"&#{ord(match[0])};", text)


# ---- What the page shows


@dataclass
class _Page:
    """Gathers the page's data, text by text."""

    run: ReportRun
    summary: Mapping[str, Any]
    decode: Detokenize
    rescore: Rescore | None
    rows: dict[tuple[int, int], int] = field(default_factory=dict)  # entry token and row: their place in `chunks`
    chunks: list[RescoredProposal] = field(default_factory=list)
    accepted: set[int] = field(default_factory=set)  # of them
    strings: dict[str, int] = field(default_factory=dict)
    similarities: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # rejected, accepted
    chunk_lengths: Counter[int] = field(default_factory=Counter)
    n_left_out: int = 0

    def __post_init__(self) -> None:
        self._texts = TokenTexts(self.decode)

    def data(self, texts: Iterable[tuple[Generation, Generation | None]]) -> dict[str, Any]:
        shown: list[dict[str, Any]] = []
        n_tokens = 0
        for generation, baseline in texts:
            n_tokens += len(generation.new_token_ids)
            is_shown = n_tokens <= MAX_TOKENS or not shown
            rescored = self.rescore(generation) if is_shown and self.rescore else None
            self._count(generation, rescored)
            if is_shown:
                shown.append(self._text(generation, rescored) | self._baseline(baseline))
            else:
                self.n_left_out += 1
        segments, rows, source_note = self._sources()
        run = self.summary["runs"].get(self.run.name, {})
        return {
            "title": self.run.title,
            "run": self.run.name,
            "figures": run,
            "baseline": self.summary["runs"].get(BASELINE) if "tts" in run else None,
            "facts": self.run.facts,
            "table": figure_rows(self.summary["runs"]),
            "timesOfTwoCommands": [
                name for name, figures in self.summary["runs"].items() if not figures.get("tts_same_run", True)
            ],
            "theta": self.run.similarity_threshold,
            "minFirstTokenProb": self.run.min_first_token_prob,
            "policy": self.run.policy,
            "corpus": self.run.corpus,
            "map": self._map(),
            "fitted": self.run.is_fitted,
            "histogram": self._histogram(),
            "lengths": sorted(self.chunk_lengths.items()),
            "leftOut": self.n_left_out,
            "sourceNote": source_note,
            "texts": shown,
            "rows": rows,
            "segments": segments,
            "strings": list(self.strings),
        }

    def _map(self) -> list[tuple[float, ...]] | None:
        g = self.run.acceptance_map
        return None if g is None else [g.similarities, g.probabilities]

    def _count(self, generation: Generation, rescored: RescoredText | None) -> None:
        """Into the histograms, which are of all texts."""
        self.chunk_lengths.update(len(chunk.token_ids) for chunk in generation.chunks)
        taken = {chunk.position for chunk in generation.chunks}
        proposals = [chunk.record for chunk in rescored.proposals] if rescored else []
        for proposal in generation.trace.proposals if generation.trace is not None else proposals:
            self.similarities[proposal.position in taken].append(proposal.similarity)

    def _histogram(self) -> dict[str, Any] | None:
        rejected, accepted = self.similarities
        if not rejected and not accepted:
            return None
        found = np.array(rejected + accepted)
        # Steps of 0.005, 0.01, 0.02, …: as fine as makes HISTOGRAM_BINS of them at most.
        width = next(w for w in (0.005, 0.01, 0.02, 0.05, 0.1) if np.ptp(found) / w < HISTOGRAM_BINS)
        first = int(np.floor(found.min() / width + 1e-9))
        edges = (np.arange(first, int(np.floor(found.max() / width + 1e-9)) + 2)) * width
        counts = [np.histogram(group, edges)[0].tolist() for group in (rejected, accepted)]
        return {"first": round(float(edges[0]), 4), "width": width, "rejected": counts[0], "accepted": counts[1]}

    def _text(self, generation: Generation, rescored: RescoredText | None) -> dict[str, Any]:
        n_prompt = len(generation.prompt_ids)
        pieces = self._texts.cut(generation.token_ids)
        return {
            "index": generation.index,
            "prompt": "".join(pieces[:n_prompt]),
            "entry": pieces[n_prompt - 1],
            "tokens": pieces[n_prompt:],
            "passes": generation.stats.forward_passes,
            "seconds": round(generation.stats.seconds, 4),
            "chunks": [
                [chunk.position - n_prompt, len(chunk.token_ids), _millionths(chunk.similarity)]
                for chunk in generation.chunks
            ],
            "proposals": self._proposals(generation, rescored) if rescored else [],
            "steps": _steps(generation),
        }

    def _baseline(self, baseline: Generation | None) -> dict[str, Any]:
        if baseline is None:
            return {}
        text = {
            "text": "".join(self._texts.cut(baseline.token_ids)[len(baseline.prompt_ids) :]),
            "tokens": len(baseline.new_token_ids),
            "seconds": round(baseline.stats.seconds, 4),
        }
        return {"baseline": text}

    def _proposals(self, generation: Generation, rescored: RescoredText) -> list[list[Any]]:
        """[position after the prompt, similarity, row, verdict, tokens that the text agrees with, p of the first token
        relative to the likeliest, log p, rivals]

        verdict: ACCEPTED, VETOED by the LM, REPEATS or 0; log p: of the chunk as it was emitted, under the LM; rivals: [string,
        similarity], for accepted ones.
        """
        n_prompt, token_ids = len(generation.prompt_ids), generation.token_ids
        taken = {chunk.position: len(chunk.token_ids) for chunk in generation.chunks}
        proposals = []
        for chunk in rescored.proposals:
            at = chunk.record.position
            row = self._row(chunk)
            written = token_ids[at : at + len(chunk.token_ids)]
            agreeing = next(
                (i for i, (a, b) in enumerate(zip(written, chunk.token_ids, strict=False)) if a != b), len(written)
            )
            verdict = ACCEPTED if at in taken else self._rejection(chunk, token_ids[:at])
            proposal: list[Any] = [at - n_prompt, _millionths(chunk.record.similarity), row, verdict, agreeing]
            proposal.append(_millionths(chunk.first_token_prob))
            if at in taken:
                self.accepted.add(row)
                log_p = float(rescored.log_probs[at : at + taken[at]].sum())
                rivals = [[self._string(self.decode(ids)), _millionths(s)] for ids, s in chunk.rivals]
                proposal += [round(log_p, 2), rivals]
            proposals.append(proposal)
        return proposals

    def _rejection(self, chunk: RescoredProposal, text: list[int]) -> int:
        """What rejected a proposal after this text: VETOED, REPEATS, or 0 for its similarity."""
        run, recorded = self.run, chunk.record.first_token_prob
        if chunk.record.similarity < run.similarity_threshold:
            return 0
        if (chunk.first_token_prob if recorded is None else recorded) < run.min_first_token_prob:
            return VETOED
        return REPEATS if run.reject_repeats and would_repeat(text, chunk.token_ids) else 0

    def _row(self, chunk: RescoredProposal) -> int:
        key = (chunk.entry_token_id, chunk.record.row)
        if key not in self.rows:
            self.rows[key] = len(self.chunks)
            self.chunks.append(chunk)
        return self.rows[key]

    def _string(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    # ---- Sources

    def _sources(self) -> tuple[list[list[Any]], list[list[Any]], str]:
        """Segments [window, first token, text], rows [string, tokens, window, place, …], and what there is to say.

        A row that has its source goes on with [segment, start of the entry token, of the chunk, its end, lowest p].
        """
        rows = [
            [self._string(self.decode(chunk.token_ids)), len(chunk.token_ids), chunk.window, chunk.place]
            for chunk in self.chunks
        ]
        if not self.chunks or self.run.trie_folder is None:
            return [], rows, ""
        whose, segments, holder, note = self._choose_segments()
        try:
            windows = read_windows(find_windows(self.run.trie_folder), {segment.window for segment in segments})
        except InputError as error:
            return [], rows, f"The texts that chunks come from are not shown. {error}"
        texts = []
        cuts: list[np.ndarray] = []
        for segment in segments:
            pieces = self._texts.cut(windows[segment.window].token_ids[segment.first : segment.end].tolist())
            texts.append([segment.window, segment.first, "".join(pieces)])
            cuts.append(np.cumsum([0, *map(_utf16_length, pieces)]))
        for i, at in zip(whose.tolist(), holder.tolist(), strict=True):
            rows[i] += self._place(self.chunks[i], at, segments[at], cuts[at], windows[segments[at].window])
        return texts, rows, note

    def _place(
        self, chunk: RescoredProposal, number: int, segment: Segment, cuts: np.ndarray, window: SourceWindow
    ) -> list[Any]:
        first, end = chunk.place - segment.first, chunk.place - segment.first + 1 + len(chunk.token_ids)
        own = slice(chunk.place, chunk.place + 1 + len(chunk.token_ids))
        if window.token_ids[own].tolist() != [chunk.entry_token_id, *chunk.token_ids]:
            return []
        lowest = round(float(window.probabilities[own][1:].min()), 3)
        return [number, *cuts[[first, first + 1, end]].tolist(), lowest]

    def _choose_segments(self) -> tuple[np.ndarray, list[Segment], np.ndarray, str]:
        """Which chunks get their source, the segments, which of them each has, and what that leaves out."""
        windows, places, lengths = (
            np.array(column, dtype=np.int64)
            for column in zip(*((c.window, c.place, len(c.token_ids)) for c in self.chunks), strict=True)
        )
        for of, context in CONTEXTS:
            whose = np.arange(len(self.chunks)) if of == "all" else np.array(sorted(self.accepted), dtype=np.int64)
            firsts = np.maximum(places[whose] - context, 0)
            segments, holder = segments_around(windows[whose], firsts, places[whose] + 1 + lengths[whose] + context)
            if sum(segment.end - segment.first for segment in segments) <= SOURCE_TOKENS:
                break
        note = "" if of == "all" else "To keep the page small, the source is shown for accepted chunks alone."
        return whose, segments, holder, note


def _steps(generation: Generation) -> dict[str, list[int]] | None:
    """Of the prompt's pass and each step after it: tokens, microseconds in the LM, retrieval and the rest, draft nodes."""
    if generation.trace is None or not generation.trace.steps:
        return None
    start = StepRecord(len(generation.prompt_ids), 0, 0, 0, 0)
    steps = np.diff(np.array([start, *generation.trace.steps], dtype=np.float64), axis=0)  # (S, 5)
    steps[:, 1:4] *= 1e6
    names = ("tokens", "lm", "retrieval", "rest", "drafted")
    columns = dict(zip(names, np.rint(steps).astype(np.int64).T.tolist(), strict=True))
    if not any(columns["drafted"]):
        del columns["drafted"]
    return columns


def _millionths(similarity: float) -> int:
    """Rounded down, so that it is at or above θ where the similarity is."""
    return math.floor(similarity * 1e6 + 1e-6)


def _utf16_length(text: str) -> int:
    """What JavaScript counts."""
    return len(text) + sum(character > "\uffff" for character in text)
