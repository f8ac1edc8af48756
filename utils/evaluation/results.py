"""`prompt_{i}.json`: every run of one prompt.

    generation   prefix (the prompt's text); turn, where it is a later one of a conversation, counted from 0; per run {run}_text (what follows it), {run}_tokens (one flat list, the prompt's
                 first) and in chunk mode {run}_retrieved_phrases
    time         seconds per run
    metrics      per run, counts and what follows from them: FPS and TTS of the paper's section 6 among them
    settings     per run, all that decides its tokens
    session      per run, the process that timed it, since times of two processes compare badly
    trace        per run, columns of steps and proposals: `tokens` (of the flat list, when the prompt was read and after
                 each step), what each took, every proposal, accepted or not. Files written before traces existed have none.

A run adds its own keys and never drops another's.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.decoding.types import (
    AcceptedChunk,
    Detokenize,
    DraftCounts,
    Generation,
    GenerationStats,
    ProposalRecord,
    StepRecord,
    Trace,
    text_pieces,
)
from utils.files import InputError, make_folder, replacing
from utils.json_io import read_json

BASELINE = "baseline_generation"
TURN = "turn"
FIRST_TOKEN_PROBS = "proposal_first_token_probs"
SECTIONS = ("generation", "time", "metrics", "settings", "session", "trace")
COUNTS = ("prompt_tokens", "new_tokens", "forward_passes", "chunks_accepted", "tokens_from_chunks")
DRAFT_COUNTS = ("drafts", "draft_tokens", "accepted_tokens")
SECONDS = ("seconds", "lm_seconds", "retrieval_seconds")

# This process, by its start and number.
SESSION = f"{datetime.now(UTC).isoformat(timespec='seconds')} {os.getpid()}"

Results = dict[str, dict[str, Any]]

_FILE_NAME = re.compile(r"prompt_(0|[1-9]\d*)\.json")
_RUN_NAME = re.compile(r"(verify_)?generation_t(-?\d+\.?\d*(?:e-?\d+)?)")
_LIST_OF_NUMBERS = re.compile(r"\[\n([-\d.e,\s]+)\]")


def run_name(decoding: Literal["baseline", "chunk", "verify"], similarity_threshold: float) -> str:
    """`baseline_generation`, or `generation_t{θ}` and `verify_generation_t{θ}` with θ as Python writes a float."""
    if decoding == "baseline":
        return BASELINE
    # Adding zero makes -0.0 the 0.0 that it equals.
    name = f"generation_t{float(similarity_threshold) + 0.0}"
    return f"verify_{name}" if decoding == "verify" else name


def prompt_path(save_dir: Path, index: int) -> Path:
    return save_dir / f"prompt_{index}.json"


# ---- What is there already


def pending_runs(
    save_dir: Path,
    texts: Sequence[str],
    prompt_ids: Mapping[str, Mapping[int, list[int]]],
    runs: Mapping[str, Mapping[str, Any]],
    overwrite: bool = False,
) -> dict[str, list[int]]:
    """The indices of the prompts that each run still lacks, by the run's name.

    texts: of all prompts, by index; prompt_ids: by a run's name and the prompt's index, for those that are to be
    generated; runs: the settings of each run by its name. With `overwrite`, runs of these
    names that have other settings are taken out of the files at once, so call this when all else is checked. Raises
    InputError, before anything is taken out, where such runs are there without `overwrite`, a file holds other runs
    of another prompt, or a file is damaged.
    """
    stale: dict[int, list[str]] = {}
    done: set[tuple[str, int]] = set()
    for index, results in stored_results(save_dir):
        path = prompt_path(save_dir, index)
        text = texts[index] if index < len(texts) else None
        for name in [name for name in runs if name in results["settings"]]:
            difference = _difference(results, name, runs[name], text, prompt_ids[name].get(index))
            if difference is None:
                done.add((name, index))
            elif overwrite:
                stale.setdefault(index, []).append(name)
            else:
                raise InputError(f"{path}: {name} {difference}; give --overwrite to replace it, or another --save_dir")
        others = sorted(results["settings"].keys() - runs.keys())
        if others and text is not None and text != results["generation"]["prefix"]:
            raise InputError(f"{path}: holds {others[0]} of another prompt; choose another --save_dir")
    for index, names in stale.items():
        _drop_runs(save_dir, index, names)
    return {name: [index for index in prompt_ids[name] if (name, index) not in done] for name in runs}


def stored_threads(save_dir: Path) -> int | None:
    """How many threads torch computed the first stored run with; None where none is stored."""
    metrics = (run for _, results in stored_results(save_dir) for run in results["metrics"].values())
    return next((run["threads"] for run in metrics if isinstance(run.get("threads"), int) and run["threads"] > 0), None)


def _difference(
    results: Results, name: str, settings: Mapping[str, Any], text: str | None, prompt_ids: list[int] | None
) -> str | None:
    """What sets a stored run apart from this one; None where they are the same. text and ids None: they do not count."""
    found, wanted = results["settings"][name], _as_stored(settings)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            return f"was made with {key} {_shown(found.get(key))}, this run has {_shown(wanted.get(key))}"
    if text is not None and results["generation"]["prefix"] != text:
        return "was made from another prompt"
    if prompt_ids is not None and _prompt_ids(results, name) != prompt_ids:
        return "was made from another prompt"
    return None


def _as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _prompt_ids(results: Results, name: str) -> list[int]:
    return results["generation"][f"{name}_tokens"][: results["metrics"][name]["prompt_tokens"]]


def _drop_runs(save_dir: Path, index: int, names: Sequence[str]) -> None:
    path = prompt_path(save_dir, index)
    results = _read(path)
    for name in names:
        for section in SECTIONS:
            for key in _keys(section, name):
                results[section].pop(key, None)
    if results["settings"]:
        _write(path, results)
    else:
        path.unlink()


def _keys(section: str, name: str) -> list[str]:
    """A run's keys in one part of a prompt's file."""
    if section == "generation":
        return [f"{name}_text", f"{name}_tokens", f"{name}_retrieved_phrases"]
    return [_time_key(name) if section == "time" else name]


def _time_key(name: str) -> str:
    return f"{name}_time" if name == BASELINE else name


# ---- One prompt's file


def save_run(
    save_dir: Path,
    name: str,
    generation: Generation,
    prefix: str,
    settings: Mapping[str, Any],
    decode: Detokenize,
    nll: float | None = None,
    n_threads: int | None = None,
    session: str = SESSION,
    turn: int = 0,
) -> None:
    """Add a run to its prompt's file.

    prefix: the prompt's text. settings: what decides the run's tokens and speed, of values that JSON holds. The
    baseline's are to be those that every run has, since a run is compared with a baseline whose settings are all
    among its own. nll: of the new tokens under the base LM, in nats. n_threads: that torch computed with. turn: of the prompt in its conversation. Raises ValueError where the file there is of
    another prompt, which `pending_runs` would have refused.
    """
    path = prompt_path(make_folder(save_dir), generation.index)
    results: Results = _read(path) if path.exists() else {section: {} for section in SECTIONS}
    if results["generation"].setdefault("prefix", prefix) != prefix:
        raise ValueError(f"{path} is of another prompt")
    if turn:
        results["generation"][TURN] = turn
    results["generation"][f"{name}_text"] = text_pieces(generation.token_ids, [len(generation.prompt_ids)], decode)[1]
    results["generation"][f"{name}_tokens"] = generation.token_ids
    if name.startswith("generation_t"):
        results["generation"][f"{name}_retrieved_phrases"] = [
            {
                "position": chunk.position,
                "token_ids": chunk.token_ids,
                "text": decode(chunk.token_ids),
                "similarity": chunk.similarity,
            }
            for chunk in generation.chunks
        ]
    results["time"][_time_key(name)] = generation.stats.seconds
    results["metrics"][name] = _metrics(generation, nll) | ({"threads": n_threads} if n_threads else {})
    results["settings"][name] = _as_stored(settings)
    results["session"][name] = session
    if generation.trace is not None:
        results["trace"][name] = _trace_columns(generation.trace)
    _write(path, results)


def _trace_columns(trace: Trace) -> dict[str, list[Any]]:
    tokens, lm, retrieval, rest, drafted = zip(*trace.steps, strict=True)
    positions, rows, similarities, probs = zip(*trace.proposals, strict=True) if trace.proposals else ((), (), (), ())
    columns = {"tokens": tokens, "draft_tokens": drafted}
    columns |= {"proposal_positions": positions, "proposal_rows": rows, "proposal_similarities": similarities}
    if any(prob is not None for prob in probs):  # the LM was asked about some
        columns[FIRST_TOKEN_PROBS] = probs
    seconds = {"lm_us": lm, "retrieval_us": retrieval, "rest_us": rest}
    microseconds = {key: np.diff(np.rint(np.array(so_far) * 1e6), prepend=0) for key, so_far in seconds.items()}
    listed = {key: column.astype(np.int64).tolist() for key, column in microseconds.items()}
    return {key: list(column) for key, column in columns.items()} | listed


def _trace_of(columns: Mapping[str, list[Any]]) -> Trace:
    seconds = [np.cumsum(columns[key]) / 1e6 for key in ("lm_us", "retrieval_us", "rest_us")]
    steps = zip(columns["tokens"], *(so_far.tolist() for so_far in seconds), columns["draft_tokens"], strict=True)
    names = ("proposal_positions", "proposal_rows", "proposal_similarities")
    of_proposals = [columns[name] for name in names]
    probs = columns.get(FIRST_TOKEN_PROBS, [None] * len(of_proposals[0]))
    proposals = zip(*of_proposals, probs, strict=True)
    return Trace([StepRecord(*step) for step in steps], [ProposalRecord(*proposal) for proposal in proposals])


def _metrics(generation: Generation, nll: float | None) -> dict[str, Any]:
    stats, n_new = generation.stats, len(generation.new_token_ids)
    tokens_from_chunks = sum(len(chunk.token_ids) for chunk in generation.chunks)
    metrics: dict[str, Any] = {
        "prompt_tokens": len(generation.prompt_ids),
        "new_tokens": n_new,
        "forward_passes": stats.forward_passes,
        "fps": saved(stats.forward_passes, n_new),
        "seconds": stats.seconds,
        "lm_seconds": stats.lm_seconds,
        "retrieval_seconds": stats.retrieval_seconds,
        "chunks_accepted": len(generation.chunks),
        "tokens_from_chunks": tokens_from_chunks,
        "mean_chunk_length": ratio(tokens_from_chunks, len(generation.chunks)),
        "tokens_per_forward": ratio(n_new, stats.forward_passes),
    }
    if stats.drafts is not None:
        metrics |= {
            "drafts": stats.drafts.n_drafts,
            "draft_tokens": stats.drafts.draft_tokens,
            "accepted_tokens": stats.drafts.accepted_tokens,
            "drafted_by_position": stats.drafts.drafted,
            "accepted_by_position": stats.drafts.accepted,
        }
    return metrics if nll is None else metrics | {"nll": nll, "perplexity": perplexity_of(nll, n_new)}


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def saved(cost: float, whole: float) -> float | None:
    return 1 - cost / whole if whole else None


def perplexity_of(nll: float, n_tokens: int) -> float | None:
    # Past e^700 a float overflows, and such a text needs no second digit.
    return math.exp(min(nll / n_tokens, 700)) if n_tokens else None


def _set_tts(results: Results) -> None:
    """TTS of every run, where the baseline ran on the same prompt with the same settings, whichever came first."""
    for name, metrics in results["metrics"].items():
        metrics.pop("tts", None)
        if name != BASELINE and _is_comparable(results, name):
            baseline = results["metrics"][BASELINE]
            metrics["tts"] = time_saved(metrics, baseline)


def _is_comparable(results: Results, name: str) -> bool:
    if BASELINE not in results["settings"]:
        return False
    has_same_settings = results["settings"][BASELINE].items() <= results["settings"][name].items()
    # A later turn of a conversation has each run's own answers before it.
    has_same_prompt = _prompt_ids(results, BASELINE) == _prompt_ids(results, name)
    return has_same_settings and (TURN in results["generation"] or has_same_prompt)


def time_saved(totals: Mapping[str, Any], baseline: Mapping[str, Any]) -> float | None:
    """TTS: what a new token costs less than the baseline's, as a share of it."""
    cost, whole = (ratio(run["seconds"], run["new_tokens"]) for run in (totals, baseline))
    return saved(cost, whole) if cost is not None and whole is not None else None


def _write(path: Path, results: Results) -> None:
    """The file, with its runs in one order, whichever ran first, and a list of token ids on one line."""
    _set_tts(results)
    names = sorted(results["settings"], key=run_order)
    ordered = {}
    for section, entries in results.items():
        keys = ["prefix", *(key for name in names for key in _keys(section, name))]
        ordered[section] = {key: entries[key] for key in keys if key in entries} | entries
    text = json.dumps(ordered, ensure_ascii=False, indent=2)
    # A line end inside a JSON string is escaped, so no string is touched.
    text = _LIST_OF_NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def run_order(name: str) -> tuple[int, float, str]:
    """The baseline, then chunk mode by θ, then verified generation by θ."""
    match = _RUN_NAME.fullmatch(name)
    if not match:
        return (0 if name == BASELINE else 3), 0.0, name
    return (2 if match[1] else 1), float(match[2]), name


def stored_results(save_dir: Path) -> Iterator[tuple[int, Results]]:
    """The prompts' files in a folder, by index."""
    if not save_dir.is_dir():
        return
    matches = (_FILE_NAME.fullmatch(path.name) for path in save_dir.iterdir())
    for index in sorted(int(match[1]) for match in matches if match):
        yield index, _read(prompt_path(save_dir, index))


def _read(path: Path) -> Results:
    """A prompt's file; raises InputError where it is damaged or something else."""
    results = read_json(path)
    try:
        results.setdefault("trace", {})
        is_sound = isinstance(results["generation"]["prefix"], str)
        is_sound &= all(isinstance(results[section], dict) for section in SECTIONS)
        is_sound &= all(_is_sound_run(results, name) for name in results["settings"])
        is_sound &= results["metrics"].keys() == results["settings"].keys() == results["session"].keys()
        is_sound &= all(_is_sound_trace(columns) for columns in results["trace"].values())
    except (KeyError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{path}: is not a complete result file of eval.py; delete it and run eval.py again")
    return results


def _is_sound_run(results: Results, name: str) -> bool:
    generation, metrics = results["generation"], results["metrics"][name]
    token_ids, phrases = generation[f"{name}_tokens"], generation.get(f"{name}_retrieved_phrases", [])
    has_tokens = isinstance(generation[f"{name}_text"], str) and _are_ids(token_ids)
    has_counts = _are_ids([metrics[key] for key in COUNTS])
    has_seconds = all(_is_number(metrics[key]) for key in SECONDS)
    has_seconds &= (metrics.get("tts") is None or _is_number(metrics["tts"])) and _is_number(metrics.get("nll", 0))
    has_drafts = "drafts" not in metrics or _are_sound_drafts(metrics)
    has_phrases = all(
        _are_ids([phrase["position"], *phrase["token_ids"]]) and _is_number(phrase["similarity"]) for phrase in phrases
    )
    has_settings = isinstance(results["settings"][name], dict)
    if not (has_tokens and has_counts and has_seconds and has_drafts and has_phrases and has_settings):
        return False
    return metrics["prompt_tokens"] + metrics["new_tokens"] == len(token_ids)


def _are_sound_drafts(metrics: Mapping[str, Any]) -> bool:
    by_position = [metrics[f"{kind}_by_position"] for kind in ("drafted", "accepted")]
    has_counts = all(map(_are_ids, ([metrics[key] for key in DRAFT_COUNTS], *by_position)))
    return has_counts and len(by_position[0]) == len(by_position[1])


def _is_sound_trace(columns: Mapping[str, Any]) -> bool:
    of_steps = [columns[key] for key in ("tokens", "draft_tokens", "lm_us", "retrieval_us", "rest_us")]
    of_proposals = [columns[key] for key in ("proposal_positions", "proposal_rows", "proposal_similarities")]
    probs = columns.get(FIRST_TOKEN_PROBS)
    groups = (of_steps, of_proposals if probs is None else [*of_proposals, probs])
    is_even = all(len({len(column) for column in group}) == 1 for group in groups)
    has_numbers = all(_is_number(value) for value in columns["proposal_similarities"])
    has_numbers &= all(value is None or _is_number(value) for value in probs or ())
    return is_even and has_numbers and all(map(_are_ids, (*of_steps, *of_proposals[:2])))


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _is_number(value: Any) -> bool:
    # Neither NaN nor what cannot be summed up.
    return isinstance(value, int | float) and abs(value) < 1e300


def read_run(save_dir: Path, index: int, name: str) -> Generation:
    """A stored run; raises InputError where it is not there or the file is damaged."""
    path = prompt_path(save_dir, index)
    results = _read(path)
    if name not in results["settings"]:
        raise InputError(f"{path}: holds no {name}; run eval.py with the settings of that run")
    metrics, generation = results["metrics"][name], results["generation"]
    prompt_ids = _prompt_ids(results, name)
    phrases = generation.get(f"{name}_retrieved_phrases", [])
    chunks = [AcceptedChunk(phrase["position"], phrase["token_ids"], phrase["similarity"]) for phrase in phrases]
    seconds, lm_seconds, retrieval_seconds = (float(metrics[key]) for key in SECONDS)
    drafts = None
    if "drafts" in metrics:
        by_position = metrics["drafted_by_position"], metrics["accepted_by_position"]
        drafts = DraftCounts(metrics["drafts"], metrics["draft_tokens"], *by_position)
    stats = GenerationStats(metrics["forward_passes"], seconds, lm_seconds, retrieval_seconds, drafts)
    trace = _trace_of(results["trace"][name]) if name in results["trace"] else None
    return Generation(index, prompt_ids, generation[f"{name}_tokens"][len(prompt_ids) :], chunks, stats, trace)


def read_baseline(save_dir: Path, index: int, name: str) -> Generation | None:
    """The baseline's run that another run is compared with: of the same prompt and settings; None where there is none."""
    if name == BASELINE or not _is_comparable(_read(prompt_path(save_dir, index)), name):
        return None
    return read_run(save_dir, index, BASELINE)
