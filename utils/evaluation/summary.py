"""Results to read: statistics over all prompts, their table, and generated text with its chunks marked."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from utils.decoding.types import AcceptedChunk, Detokenize, Generation, text_pieces
from utils.evaluation.results import (
    BASELINE,
    COUNTS,
    DRAFT_COUNTS,
    SECONDS,
    Results,
    perplexity_of,
    ratio,
    run_order,
    saved,
    stored_results,
    time_saved,
)
from utils.files import InputError
from utils.json_io import write_json
from utils.tables import align, format_number, visible

SUMMARY = "summary.json"
RUNS_PER_TABLE = 4
# Label, key, scale and decimals of each row over all prompts, and of each spread.
TOTAL_ROWS = (
    ("prompts", "prompts", 1, 0),
    ("new tokens", "new_tokens", 1, 0),
    ("forward passes", "forward_passes", 1, 0),
    ("FPS, forward passes saved (%)", "fps", 100, 1),
    ("TTS, time per token saved (%)", "tts", 100, 1),
    ("time per new token (ms)", "seconds_per_token", 1000, 2),
    ("time in all (s)", "seconds", 1, 2),
    ("  in the LM (s)", "lm_seconds", 1, 2),
    ("  in retrieval (s)", "retrieval_seconds", 1, 2),
    ("  in the rest (s)", "rest_seconds", 1, 2),
    ("tokens per forward pass", "tokens_per_forward", 1, 2),
    ("chunks accepted", "chunks_accepted", 1, 0),
    ("tokens from chunks (% of new)", "share_from_chunks", 100, 1),
    ("mean chunk length (tokens)", "mean_chunk_length", 1, 2),
    ("drafts verified", "drafts", 1, 0),
    ("drafted tokens per draft", "draft_length", 1, 2),
    ("accepted tokens per draft", "accepted_per_draft", 1, 2),
    ("perplexity under the base LM", "perplexity", 1, 2),
)
SPREAD_ROWS = (
    ("  FPS (%)", "fps", 100, 1),
    ("  TTS (%)", "tts", 100, 1),
    ("  time per new token (ms)", "seconds_per_token", 1000, 2),
    ("  tokens per forward pass", "tokens_per_forward", 1, 2),
    ("  tokens from chunks (% of new)", "share_from_chunks", 100, 1),
    ("  mean chunk length (tokens)", "mean_chunk_length", 1, 2),
)
SPREAD_HEADING = "over prompts: median [quartiles]"
BRACKETS = "⟦", "⟧"
LINE_END = "↵"
RESET, DIM = "\x1b[0m", "\x1b[2m"
# Backgrounds of the 256-colour palette from the least to the most similar chunk, under black text.
SHADES = (194, 157, 120, 83)


# ---- Statistics


def write_summary(save_dir: Path) -> dict[str, Any]:
    """Sum up every run over all prompts in the folder into `summary.json`, and return that.

    `n_prompts`, and `runs`: by name, totals with what follows from them, `spread` over prompts of each figure in
    SPREAD (median, quartiles, lowest and highest) and the run's `settings`. `tts_same_run` says whether one process timed
    the baseline too: over two, TTS also holds what else the machine did. Raises InputError where a file is damaged.
    """
    by_run: dict[str, list[Results]] = {}
    n_prompts = 0
    for _, results in stored_results(save_dir):
        n_prompts += 1
        for name in results["settings"]:
            # Token ids and texts are not kept, so memory grows with the number of prompts alone.
            kept = {key: results[key] for key in ("metrics", "session")} | {"settings": results["settings"][name]}
            by_run.setdefault(name, []).append(kept)
    runs = {name: _summarize_run(name, by_run[name]) for name in sorted(by_run, key=run_order)}
    summary = {"n_prompts": n_prompts, "runs": runs}
    write_json(save_dir / SUMMARY, summary, indent=2)
    return summary


def _summarize_run(name: str, stored: Sequence[Results]) -> dict[str, Any]:
    metrics = [results["metrics"][name] for results in stored]
    total = {key: sum(prompt[key] for prompt in metrics) for key in (*COUNTS, *SECONDS)}
    run = {
        "prompts": len(metrics),
        **total,
        "rest_seconds": max(total["seconds"] - total["lm_seconds"] - total["retrieval_seconds"], 0.0),
        "fps": saved(total["forward_passes"], total["new_tokens"]),
        "tokens_per_forward": ratio(total["new_tokens"], total["forward_passes"]),
        "seconds_per_token": ratio(total["seconds"], total["new_tokens"]),
        "share_from_chunks": ratio(total["tokens_from_chunks"], total["new_tokens"]),
        "mean_chunk_length": ratio(total["tokens_from_chunks"], total["chunks_accepted"]),
    }
    run |= _compare_times(name, [results for results in stored if results["metrics"][name].get("tts") is not None])
    if scored := [prompt for prompt in metrics if "nll" in prompt]:
        nll, n_tokens = sum(prompt["nll"] for prompt in scored), sum(prompt["new_tokens"] for prompt in scored)
        run |= {"nll": nll, "perplexity": perplexity_of(nll, n_tokens), "perplexity_prompts": len(scored)}
    run |= _sum_drafts([prompt for prompt in metrics if "drafts" in prompt])
    spread = {key: _spread([figure(prompt) for prompt in metrics]) for key, figure in SPREAD.items()}
    return run | {"spread": spread, "settings": stored[0]["settings"]}


def _sum_drafts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Drafts of verified generation, and the share accepted of those that reached 1, 2, … tokens ahead."""
    if not metrics:
        return {}
    total = {key: sum(prompt[key] for prompt in metrics) for key in DRAFT_COUNTS}
    drafted, accepted = (
        [sum(counts) for counts in zip_longest(*(prompt[f"{kind}_by_position"] for prompt in metrics), fillvalue=0)]
        for kind in ("drafted", "accepted")
    )
    by_position = [ratio(part, whole) for part, whole in zip(accepted, drafted, strict=True)]
    return total | {
        "draft_length": ratio(total["draft_tokens"], total["drafts"]),
        "accepted_per_draft": ratio(total["accepted_tokens"], total["drafts"]),
        "acceptance_by_position": by_position,
    }


def _compare_times(name: str, stored: Sequence[Results]) -> dict[str, Any]:
    """TTS over prompts that the baseline has too; nothing where there are none."""
    if not stored:
        return {}
    tts = time_saved(_total(stored, name), _total(stored, BASELINE))
    is_same = all(results["session"][name] == results["session"][BASELINE] for results in stored)
    return {"tts": tts, "tts_prompts": len(stored), "tts_same_run": is_same}


def _total(stored: Sequence[Results], name: str) -> dict[str, float]:
    return {key: sum(results["metrics"][name][key] for results in stored) for key in ("seconds", "new_tokens")}


# Figures of one prompt whose spread over prompts is reported.
SPREAD: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "fps": lambda metrics: saved(metrics["forward_passes"], metrics["new_tokens"]),
    "tts": lambda metrics: metrics.get("tts"),
    "seconds_per_token": lambda metrics: ratio(metrics["seconds"], metrics["new_tokens"]),
    "tokens_per_forward": lambda metrics: ratio(metrics["new_tokens"], metrics["forward_passes"]),
    "share_from_chunks": lambda metrics: ratio(metrics["tokens_from_chunks"], metrics["new_tokens"]),
    "mean_chunk_length": lambda metrics: ratio(metrics["tokens_from_chunks"], metrics["chunks_accepted"]),
}
QUANTILES = {"min": 0, "lower_quartile": 25, "median": 50, "upper_quartile": 75, "max": 100}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = np.percentile(known, list(QUANTILES.values()))
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def typical_prompt(save_dir: Path, name: str) -> int:
    """The prompt with the median share of tokens from chunks in a run, to show as the example."""
    shares = []
    for index, results in stored_results(save_dir):
        if metrics := results["metrics"].get(name):
            shares.append((metrics["tokens_from_chunks"] / max(metrics["new_tokens"], 1), index))
    if not shares:
        raise InputError(f"{save_dir}: holds no {name}; run eval.py with the settings of that run")
    return sorted(shares)[len(shares) // 2][1]


# ---- The table


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary as a table for a terminal: a row per figure with its unit, a column per run, numbers on the right."""
    runs = list(summary["runs"].items())
    groups = [runs[start : start + RUNS_PER_TABLE] for start in range(0, len(runs), RUNS_PER_TABLE)]
    return "\n\n".join(_format_group(dict(group)) for group in groups)


def _format_group(runs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = align(figure_rows(runs))
    if apart := [name for name, run in runs.items() if not run.get("tts_same_run", True)]:
        lines.append(
            f"TTS of {', '.join(apart)}: the baseline was timed by another command; time both by one to compare"
        )
    return "\n".join(lines)


def figure_rows(runs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The summary's runs as a table: the names of the runs, then a label and the figures of each."""
    rows = [("", *runs)]
    for label, key, scale, decimals in TOTAL_ROWS:
        if any(run.get(key) is not None for run in runs.values()):
            rows.append((label, *(format_number(run.get(key), scale, decimals) for run in runs.values())))
    rows.append((SPREAD_HEADING, *("" for _ in runs)))
    for label, key, scale, decimals in SPREAD_ROWS:
        if any(run["spread"][key] for run in runs.values()):
            rows.append((label, *(_quartiles(run["spread"][key], scale, decimals) for run in runs.values())))
    return rows


def _quartiles(spread: Mapping[str, float] | None, scale: float, decimals: int) -> str:
    if spread is None:
        return "-"
    median, lower, upper = (
        format_number(spread[key], scale, decimals) for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} [{lower}, {upper}]"


# ---- Text with its chunks marked


def format_example(generation: Generation, name: str, decode: Detokenize, colour: bool = False) -> str:
    """One generation to read: the prompt, then what follows it with its chunks marked."""
    n_prompt, chunks = len(generation.prompt_ids), generation.chunks
    prompt = visible(text_pieces(generation.token_ids, [n_prompt], decode)[0])
    marked = mark_chunks(generation.token_ids, chunks, decode, n_prompt=n_prompt, colour=colour)
    n_from_chunks = sum(len(chunk.token_ids) for chunk in chunks)
    counted = f"{n_from_chunks} of {len(generation.new_token_ids)} tokens are from {len(chunks)} chunks"
    marking = "coloured, the stronger the more similar" if colour else f"in {''.join(BRACKETS)}"
    headings = f"prompt {generation.index}", f"{name}, chunks {marking}: {counted}"
    if colour:
        prompt = _coloured(prompt, DIM)
    return f"--- {headings[0]}\n{prompt}\n--- {headings[1]}\n{marked}\n---"


def mark_chunks(
    token_ids: Sequence[int],
    chunks: Sequence[AcceptedChunk],
    decode: Detokenize,
    *,
    n_prompt: int = 0,
    colour: bool = False,
) -> str:
    """The text of `token_ids` after the first `n_prompt` of them, its chunks in brackets or, with `colour`, coloured.

    A character whose bytes a border parts belongs to the piece that completes it. Control characters are shown as
    symbols, so that a generation cannot command the terminal.
    """
    chunks = sorted(chunks, key=lambda chunk: chunk.position)
    borders = [n_prompt]
    for chunk in chunks:
        borders += [chunk.position, chunk.position + len(chunk.token_ids)]
    pieces = [visible(piece) for piece in text_pieces(token_ids, borders, decode)][1:]
    similarities = [chunk.similarity for chunk in chunks]
    lowest, highest = min(similarities, default=0.0), max(similarities, default=0.0)
    underlined, end = False, -1
    for number, chunk in enumerate(chunks):
        rank = (chunk.similarity - lowest) / (highest - lowest) if highest > lowest else 1.0
        shade = SHADES[round(rank * (len(SHADES) - 1))]
        # Of chunks that touch every second one is underlined, or they would look like one.
        underlined = chunk.position == end and not underlined
        end = chunk.position + len(chunk.token_ids)
        pieces[2 * number + 1] = _marked(pieces[2 * number + 1], shade, colour, underlined)
    return "".join(pieces)


class TokenStream:
    """Prints a text while it is generated, one prompt after the other, its chunks marked."""

    def __init__(self, stream: TextIO, decode: Detokenize, colour: bool) -> None:
        self._stream, self._decode, self._colour = stream, decode, colour
        self._name, self._prompts = "", dict[int, list[int]]()
        self._index, self._token_ids, self._n_shown = -1, list[int](), 0
        self._follows_chunk = self._underlined = False

    def begin(self, name: str, prompts: Mapping[int, list[int]]) -> None:
        """The texts that come next: the run's name and the prompts' token ids by their index."""
        self._name, self._prompts, self._index = name, dict(prompts), -1

    def write(self, index: int, token_ids: list[int], chunk: object | None) -> None:
        """The next tokens of a prompt's text; `chunk` is not None where they are a retrieved one."""
        if index != self._index:
            self._index, self._token_ids = index, list(self._prompts[index])
            prompt = self._decode(self._token_ids)
            self._n_shown, self._follows_chunk, self._underlined = len(prompt), False, False
            shown = visible(prompt)
            self._stream.write(
                f"\n--- prompt {index}, {self._name}\n{_coloured(shown, DIM) if self._colour else shown}"
            )
        self._token_ids += token_ids
        text = self._decode(self._token_ids)
        # A character whose last bytes are still to come decodes to replacement characters until then.
        end = len(text.rstrip("\ufffd")) if len(text) - len(text.rstrip("\ufffd")) <= 3 else len(text)
        piece, self._n_shown = visible(text[self._n_shown : end]), max(end, self._n_shown)
        if chunk is not None:
            self._underlined = self._follows_chunk and not self._underlined
            piece = _marked(piece, SHADES[-1], self._colour, self._underlined)
        self._follows_chunk = chunk is not None
        self._stream.write(piece)
        self._stream.flush()


def _marked(piece: str, shade: int, colour: bool, underlined: bool = False) -> str:
    left, right = BRACKETS
    if not colour:
        return f"{left}{piece}{right}"
    # A line end has no colour of its own, and may be all that a chunk is.
    return _coloured(piece.replace("\n", f"{LINE_END}\n"), f"\x1b[{'4;' if underlined else ''}38;5;16;48;5;{shade}m")


def _coloured(text: str, code: str) -> str:
    # The colour ends before each line does: many terminals fill the rest of the line with it.
    return "\n".join(f"{code}{line}{RESET}" if line else "" for line in text.split("\n"))
