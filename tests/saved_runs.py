"""Two runs of a made-up prompt, saved as eval.py saves them."""

import json
from pathlib import Path
from typing import Any

from utils.decoding.types import AcceptedChunk, Generation, GenerationStats, ProposalRecord, StepRecord, Trace
from utils.evaluation.results import BASELINE, prompt_path, save_run

CHUNK = "generation_t0.5"
SHARED = {"model": "abc", "temperature": 0.8, "max_new_tokens": 6}
SETTINGS = {BASELINE: SHARED, CHUNK: SHARED | {"similarity_threshold": 0.5}}
# The prompt, then c, de, f, gh; before f a row was found and not taken.
TRACE = Trace(
    [
        StepRecord(2, 0.25, 0.0, 0.0, 0),
        StepRecord(3, 0.5, 0.0, 0.000001, 0),
        StepRecord(5, 0.75, 0.125, 0.000002, 0),
        StepRecord(6, 1.0, 0.1875, 0.000002, 0),
        StepRecord(8, 1.0, 0.25, 0.000004, 0),
    ],
    [ProposalRecord(3, 17, 0.75), ProposalRecord(5, 0, -0.125), ProposalRecord(6, 4, 0.5)],
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(token_ids: list[int]) -> str:
    return "".join(LETTERS[token_id] for token_id in token_ids)


def chunk_generation(index: int = 0, seconds: float = 1.5) -> Generation:
    """Prompt "ab", then 6 new tokens in 4 forward passes: c, the chunk de, f, the chunk gh cut to length."""
    chunks = [AcceptedChunk(3, [3, 4], 0.75), AcceptedChunk(6, [6, 7], 0.5)]
    stats = GenerationStats(4, seconds, 1.0, 0.25)
    return Generation(index, [0, 1], [2, 3, 4, 5, 6, 7], chunks, stats, TRACE)


def baseline_generation(index: int = 0, seconds: float = 2.0) -> Generation:
    return Generation(index, [0, 1], [2, 3, 4, 5], [], GenerationStats(4, seconds, 0.875, 0.0))


def save_chunk(folder: Path, index: int = 0, seconds: float = 1.5, **changed: Any) -> None:
    save_run(folder, CHUNK, chunk_generation(index, seconds), "ab", SETTINGS[CHUNK] | changed, letters)


def save_baseline(folder: Path, index: int = 0, seconds: float = 2.0, **changed: Any) -> None:
    save_run(folder, BASELINE, baseline_generation(index, seconds), "ab", SHARED | changed, letters)


def stored(folder: Path, index: int = 0) -> dict[str, Any]:
    return json.loads(prompt_path(folder, index).read_text(encoding="utf-8"))
