"""Result files that runs share, the figures over prompts, the table, and generations with their chunks marked."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.evaluation.summary import format_example, format_table, mark_chunks
from utils.tables import use_colour
from utils.files import InputError
from utils.decoding.types import AcceptedChunk, Generation, GenerationStats, StepRecord, ProposalRecord, Trace, text_pieces
from utils.evaluation.results import BASELINE, SESSION, pending_runs, prompt_path, read_run, run_name, save_run, typical_prompt, write_summary

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


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


# ---- One prompt's file


def test_run_is_named_by_what_decodes_and_its_threshold() -> None:
    assert run_name("baseline", 0.5) == "baseline_generation"
    assert run_name("chunk", 0.5) == "generation_t0.5"
    assert run_name("chunk", 1) == "generation_t1.0"
    assert run_name("chunk", -0.0) == "generation_t0.0"
    assert run_name("verify", 0.8) == "verify_generation_t0.8"


def test_prompt_file_holds_both_runs_and_their_figures(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    save_baseline(tmp_path)
    assert stored(tmp_path) == {
        "generation": {
            "prefix": "ab",
            "baseline_generation_text": "cdef",
            "baseline_generation_tokens": [0, 1, 2, 3, 4, 5],
            "generation_t0.5_text": "cdefgh",
            "generation_t0.5_tokens": [0, 1, 2, 3, 4, 5, 6, 7],
            "generation_t0.5_retrieved_phrases": [
                {"position": 3, "token_ids": [3, 4], "text": "de", "similarity": 0.75},
                {"position": 6, "token_ids": [6, 7], "text": "gh", "similarity": 0.5},
            ],
        },
        "time": {"baseline_generation_time": 2.0, "generation_t0.5": 1.5},
        "metrics": {
            "baseline_generation": {
                "prompt_tokens": 2,
                "new_tokens": 4,
                "forward_passes": 4,
                "fps": 0.0,
                "seconds": 2.0,
                "lm_seconds": 0.875,
                "retrieval_seconds": 0.0,
                "chunks_accepted": 0,
                "tokens_from_chunks": 0,
                "mean_chunk_length": None,
                "tokens_per_forward": 1.0,
            },
            "generation_t0.5": {
                "prompt_tokens": 2,
                "new_tokens": 6,
                "forward_passes": 4,
                "fps": 1 - 4 / 6,
                "seconds": 1.5,
                "lm_seconds": 1.0,
                "retrieval_seconds": 0.25,
                "chunks_accepted": 2,
                "tokens_from_chunks": 4,
                "mean_chunk_length": 2.0,
                "tokens_per_forward": 1.5,
                "tts": 0.5,  # 1.5 s / 6 tokens against 2.0 s / 4 tokens: 0.25 against 0.5
            },
        },
        "settings": SETTINGS,
        "session": {BASELINE: SESSION, CHUNK: SESSION},
        "trace": {
            CHUNK: {
                "tokens": [2, 3, 5, 6, 8],
                "draft_tokens": [0, 0, 0, 0, 0],
                "proposal_positions": [3, 5, 6],
                "proposal_rows": [17, 0, 4],
                "proposal_similarities": [0.75, -0.125, 0.5],
                "lm_us": [250_000, 250_000, 250_000, 250_000, 0],
                "retrieval_us": [0, 0, 125_000, 62_500, 62_500],
                "rest_us": [0, 1, 1, 0, 2],
            }
        },
    }


def test_a_run_is_read_as_it_was_saved_with_every_step_and_proposal(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    save_baseline(tmp_path)
    found = read_run(tmp_path, 0, CHUNK)
    assert found.trace is not None
    assert found.trace.proposals == TRACE.proposals
    for got, saved in zip(found.trace.moments, TRACE.moments, strict=True):
        assert tuple(got) == pytest.approx(tuple(saved), abs=1e-12)
    assert (found.token_ids, found.chunks) == (chunk_generation().token_ids, chunk_generation().chunks)
    assert read_run(tmp_path, 0, BASELINE).trace is None


def test_a_file_of_before_traces_were_kept_is_read_and_added_to(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    old = stored(tmp_path)
    del old["trace"]
    prompt_path(tmp_path, 0).write_text(json.dumps(old))
    assert read_run(tmp_path, 0, CHUNK).trace is None
    save_baseline(tmp_path)
    assert stored(tmp_path)["trace"] == {}


def test_file_is_the_same_whichever_run_came_first(tmp_path: Path) -> None:
    for name, saves in {"one": (save_chunk, save_baseline), "other": (save_baseline, save_chunk)}.items():
        for save in saves:
            save(tmp_path / name)
    assert prompt_path(tmp_path / "one", 0).read_bytes() == prompt_path(tmp_path / "other", 0).read_bytes()


def test_token_ids_stand_on_one_line_and_no_text_is_changed(tmp_path: Path) -> None:
    text = "[\n  1,\n  2\n] 🙂\u2028"
    generation = baseline_generation()
    save_run(tmp_path, BASELINE, generation, text, SHARED, lambda token_ids: text * len(token_ids))
    assert '"baseline_generation_tokens": [0, 1, 2, 3, 4, 5]' in prompt_path(tmp_path, 0).read_text(encoding="utf-8")
    assert stored(tmp_path)["generation"]["prefix"] == text
    assert stored(tmp_path)["generation"]["baseline_generation_text"] == text * 4


def test_run_keeps_keys_that_are_not_its_own(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    results = stored(tmp_path)
    results["judge"] = {"score": 9}
    results["generation"]["note"] = "kept"
    prompt_path(tmp_path, 0).write_text(json.dumps(results))
    save_baseline(tmp_path)
    assert stored(tmp_path)["judge"] == {"score": 9}
    assert stored(tmp_path)["generation"]["note"] == "kept"
    assert stored(tmp_path)["generation"]["generation_t0.5_text"] == "cdefgh"


@pytest.mark.parametrize("changed", [{"temperature": 1.0}, {"device": "cuda"}])
def test_time_is_compared_only_with_a_baseline_of_the_same_settings(tmp_path: Path, changed: dict[str, Any]) -> None:
    save_chunk(tmp_path)
    save_baseline(tmp_path, **changed)
    assert "tts" not in stored(tmp_path)["metrics"][CHUNK]
    save_baseline(tmp_path)
    assert stored(tmp_path)["metrics"][CHUNK]["tts"] == 0.5


def test_time_is_compared_only_on_the_same_prompt_tokens(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    wrapped = Generation(0, [9, 0, 1], [2], [], GenerationStats(1, 1.0, 1.0, 0.0))
    save_run(tmp_path, BASELINE, wrapped, "ab", SHARED, letters)
    assert "tts" not in stored(tmp_path)["metrics"][CHUNK]


def test_perplexity_is_that_of_the_new_tokens(tmp_path: Path) -> None:
    save_run(tmp_path, BASELINE, baseline_generation(), "ab", SHARED, letters, nll=8.0)
    metrics = stored(tmp_path)["metrics"][BASELINE]
    assert metrics["nll"] == 8.0
    assert metrics["perplexity"] == pytest.approx(7.389056)  # e^(8 / 4)


def test_generation_that_ends_at_once_has_no_ratios(tmp_path: Path) -> None:
    save_run(
        tmp_path, BASELINE, Generation(0, [0, 1], [], [], GenerationStats(1, 0.1, 0.1, 0.0)), "ab", {}, letters, 0.0
    )
    metrics = stored(tmp_path)["metrics"][BASELINE]
    assert metrics["fps"] is None
    assert metrics["perplexity"] is None
    assert write_summary(tmp_path)["runs"][BASELINE]["spread"]["fps"] is None


def test_stored_run_is_read_back(tmp_path: Path) -> None:
    save_chunk(tmp_path, index=3)
    assert read_run(tmp_path, 3, CHUNK) == chunk_generation(index=3)
    with pytest.raises(InputError, match="holds no baseline_generation"):
        read_run(tmp_path, 3, BASELINE)


# ---- Runs that are there already

PROMPT = ("ab", [0, 1])


def test_what_is_done_with_the_same_settings_is_not_pending(tmp_path: Path) -> None:
    assert pending_runs(tmp_path / "new", [PROMPT] * 2, SETTINGS) == [[BASELINE, CHUNK]] * 2
    save_chunk(tmp_path, index=0)
    save_baseline(tmp_path, index=2)
    save_chunk(tmp_path, index=2)
    assert pending_runs(tmp_path, [PROMPT] * 3, SETTINGS) == [[BASELINE], [BASELINE, CHUNK], []]
    assert pending_runs(tmp_path, [PROMPT] * 3, SETTINGS, overwrite=True) == [[BASELINE], [BASELINE, CHUNK], []]


def test_run_cut_off_in_a_write_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    save_chunk(tmp_path / "whole")
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / ".prompt_0.json.tmp").write_text('{"generation": {"prefix": "a')
    assert pending_runs(folder, [PROMPT], {CHUNK: SETTINGS[CHUNK]}) == [[CHUNK]]
    save_chunk(folder)
    assert [path.name for path in folder.iterdir()] == ["prompt_0.json"]
    assert prompt_path(folder, 0).read_bytes() == prompt_path(tmp_path / "whole", 0).read_bytes()


@pytest.mark.parametrize(
    ("prompts", "changed", "message"),
    [
        (
            [PROMPT],
            {"temperature": 0.5},
            "generation_t0.5 was made with temperature 0.8, this run has 0.5; .*--overwrite",
        ),
        ([PROMPT], {"seed": 1}, "was made with seed None, this run has 1; .*--overwrite"),
        ([("ab", [0, 2])], {}, "generation_t0.5 was made from another prompt; .*--overwrite"),
        ([("xy", [0, 1])], {}, "generation_t0.5 was made from another prompt; .*--overwrite"),
        ([], {"temperature": 0.5}, "was made with temperature 0.8"),
    ],
    ids=["setting", "new_setting", "prompt_tokens", "prompt_text", "prompt_beyond_the_list"],
)
def test_other_settings_under_a_name_are_refused_and_replaced_by_overwrite(
    tmp_path: Path, prompts: list[tuple[str, list[int]]], changed: dict[str, Any], message: str
) -> None:
    save_chunk(tmp_path)
    before = prompt_path(tmp_path, 0).read_bytes()
    runs = {CHUNK: SETTINGS[CHUNK] | changed}
    with pytest.raises(InputError, match=message) as refusal:
        pending_runs(tmp_path, prompts, runs)
    assert str(prompt_path(tmp_path, 0)) in str(refusal.value)
    assert prompt_path(tmp_path, 0).read_bytes() == before
    assert pending_runs(tmp_path, prompts, runs, overwrite=True) == [[CHUNK]] * len(prompts)
    assert not prompt_path(tmp_path, 0).exists()


def test_overwrite_drops_no_other_run(tmp_path: Path) -> None:
    save_baseline(tmp_path)
    alone = prompt_path(tmp_path, 0).read_bytes()
    save_chunk(tmp_path)
    pending_runs(tmp_path, [PROMPT], {CHUNK: SETTINGS[CHUNK] | {"q_max": 0.5}}, overwrite=True)
    assert prompt_path(tmp_path, 0).read_bytes() == alone


def test_folder_of_other_prompts_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"holds {CHUNK} of another prompt; choose another --save_dir"):
            pending_runs(tmp_path, [("xy", [23, 24])], {BASELINE: SHARED}, overwrite)
    assert stored(tmp_path)["generation"]["generation_t0.5_text"] == "cdefgh"


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(results: dict[str, Any]) -> None:
        for key in keys[:-1]:
            results = results[key]
        del results[keys[-1]]

    return change


def _with(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(results: dict[str, Any]) -> None:
        for key in keys[:-1]:
            results = results[key]
        results[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("metrics"),
        _without("time"),
        _without("generation", "prefix"),
        _without("generation", "generation_t0.5_tokens"),
        _without("metrics", CHUNK),
        _without("metrics", CHUNK, "seconds"),
        _without("settings", CHUNK),
        _without("session"),
        _without("session", CHUNK),
        _with([], "settings"),
        _with(3, "settings", CHUNK),
        _with(3, "generation", "generation_t0.5_text"),
        _with(["a"], "generation", "generation_t0.5_tokens"),
        _with([0, 1, 2], "generation", "generation_t0.5_tokens"),
        _with([{"position": 3}], "generation", "generation_t0.5_retrieved_phrases"),
        _with(3, "generation", "generation_t0.5_retrieved_phrases"),
        _with("2", "metrics", CHUNK, "new_tokens"),
        _with("fast", "metrics", CHUNK, "tts"),
        _with(None, "metrics", CHUNK, "nll"),
        _with(5, "metrics", CHUNK, "drafts"),
        _with([], "trace"),
        _with({}, "trace", CHUNK),
        _with([2, 3], "trace", CHUNK, "tokens"),
        _with([3, 5], "trace", CHUNK, "proposal_positions"),
        _with(["a", 0.5, 0.5], "trace", CHUNK, "proposal_similarities"),
        _with([0.5, 1, 2], "trace", CHUNK, "proposal_rows"),
    ],
)
def test_damaged_file_is_refused_with_its_path(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    save_chunk(tmp_path)
    results = stored(tmp_path)
    change(results)
    path = prompt_path(tmp_path, 0)
    path.write_text(json.dumps(results))
    for read in (write_summary, lambda folder: pending_runs(folder, [PROMPT], SETTINGS)):
        with pytest.raises(InputError, match="is no whole result file") as refusal:
            read(tmp_path)
        assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b'{"generation": ', b"\xff", b"[]", b"null"])
def test_file_that_is_no_result_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = prompt_path(tmp_path, 0)
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        write_summary(tmp_path)
    assert str(refusal.value).startswith(f"{path}: ")


# ---- All prompts


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    """Prompt 0: 1.5 s against 2.0 s. Prompt 1: 3.0 s against 1.0 s. Prompt 10: chunk mode alone, 6.0 s."""
    for index, seconds in ((0, 1.5), (1, 3.0), (10, 6.0)):
        save_chunk(tmp_path, index, seconds)
    save_baseline(tmp_path, 0, 2.0)
    save_baseline(tmp_path, 1, 1.0)
    return write_summary(tmp_path)


def test_summary_is_over_tokens_not_a_mean_of_ratios(tmp_path: Path, summary: dict[str, Any]) -> None:
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["n_prompts"] == 3
    assert list(summary["runs"]) == [BASELINE, CHUNK]
    run = summary["runs"][CHUNK]
    assert (run["prompts"], run["new_tokens"], run["forward_passes"]) == (3, 18, 12)
    assert run["fps"] == 1 - 12 / 18
    assert run["tokens_per_forward"] == 1.5
    assert run["seconds"] == 10.5
    assert run["rest_seconds"] == 10.5 - 3.0 - 0.75
    assert run["seconds_per_token"] == 10.5 / 18
    # Over prompts 0 and 1, which the baseline has too: 4.5 s / 12 tokens against 3.0 s / 8 tokens, which is the same.
    assert run["tts"] == 0.0
    assert run["tts_prompts"] == 2
    assert run["tts_same_run"]
    assert run["share_from_chunks"] == 12 / 18
    assert run["mean_chunk_length"] == 2.0
    assert run["settings"] == SETTINGS[CHUNK]
    assert "perplexity" not in run
    assert "tts" not in summary["runs"][BASELINE]


def test_spread_is_over_prompts(summary: dict[str, Any]) -> None:
    spread = summary["runs"][CHUNK]["spread"]
    assert spread["seconds_per_token"] == {
        "min": 0.25,
        "lower_quartile": 0.375,
        "median": 0.5,
        "upper_quartile": 0.75,
        "max": 1.0,
    }
    # Prompt 0: 0.25 s against 0.5 s a token; prompt 1: 0.5 s against 0.25 s.
    assert (spread["tts"]["min"], spread["tts"]["median"], spread["tts"]["max"]) == (-1.0, -0.25, 0.5)
    assert summary["runs"][BASELINE]["spread"]["mean_chunk_length"] is None


def test_summary_perplexity_is_token_weighted(tmp_path: Path) -> None:
    save_run(tmp_path, CHUNK, chunk_generation(0), "ab", SETTINGS[CHUNK], letters, nll=6.0)
    short = Generation(1, [0], [1, 2], [], GenerationStats(2, 1.0, 1.0, 0.0))
    save_run(tmp_path, CHUNK, short, "a", SETTINGS[CHUNK], letters, nll=10.0)
    run = write_summary(tmp_path)["runs"][CHUNK]
    assert run["perplexity"] == pytest.approx(7.389056)  # e^((6 + 10) / (6 + 2))
    assert run["perplexity_prompts"] == 2


def test_table_says_where_the_baseline_was_timed_by_another_command(tmp_path: Path) -> None:
    save_run(tmp_path, CHUNK, chunk_generation(), "ab", SETTINGS[CHUNK], letters, session="yesterday")
    save_baseline(tmp_path)
    summary = write_summary(tmp_path)
    assert summary["runs"][CHUNK]["tts"] == 0.5
    assert summary["runs"][CHUNK]["tts_same_run"] is False
    assert "TTS of generation_t0.5: the baseline was timed by another command" in format_table(summary)


def test_example_to_show_has_the_median_share_from_chunks(tmp_path: Path) -> None:
    for index, n_from_chunks in enumerate((0, 4, 2)):
        chunks = [AcceptedChunk(2, [2] * n_from_chunks, 0.9)] if n_from_chunks else []
        generation = Generation(index, [0, 1], [2] * 5, chunks, GenerationStats(4, 1.0, 1.0, 0.0))
        save_run(tmp_path, CHUNK, generation, "ab", {}, letters)
    assert typical_prompt(tmp_path, CHUNK) == 2
    with pytest.raises(InputError, match="holds no baseline_generation"):
        typical_prompt(tmp_path, BASELINE)


# ---- On the terminal


def test_table_aligns_numbers_on_the_right_with_units_in_the_labels(summary: dict[str, Any]) -> None:
    assert format_table(summary).splitlines() == [
        "                                      baseline_generation          generation_t0.5",
        "prompts                                                 2                        3",
        "new tokens                                              8                       18",
        "forward passes                                          8                       12",
        "FPS, forward passes saved (%)                         0.0                     33.3",
        "TTS, time per token saved (%)                           -                      0.0",
        "time per new token (ms)                            375.00                   583.33",
        "time in all (s)                                      3.00                    10.50",
        "  in the LM (s)                                      1.75                     3.00",
        "  in retrieval (s)                                   0.00                     0.75",
        "  in the rest (s)                                    1.25                     6.75",
        "tokens per forward pass                              1.00                     1.50",
        "chunks accepted                                         0                        6",
        "tokens from chunks (% of new)                         0.0                     66.7",
        "mean chunk length (tokens)                              -                     2.00",
        "over prompts: median [quartiles]",
        "  FPS (%)                                  0.0 [0.0, 0.0]        33.3 [33.3, 33.3]",
        "  TTS (%)                                               -      -25.0 [-62.5, 12.5]",
        "  time per new token (ms)         375.00 [312.50, 437.50]  500.00 [375.00, 750.00]",
        "  tokens per forward pass               1.00 [1.00, 1.00]        1.50 [1.50, 1.50]",
        "  tokens from chunks (% of new)            0.0 [0.0, 0.0]        66.7 [66.7, 66.7]",
        "  mean chunk length (tokens)                            -        2.00 [2.00, 2.00]",
    ]


def test_table_of_many_runs_is_cut_into_groups(tmp_path: Path) -> None:
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, -0.5):
        save_run(tmp_path, run_name("chunk", threshold), chunk_generation(), "ab", {}, letters)
    headings = [group.splitlines()[0].split() for group in format_table(write_summary(tmp_path)).split("\n\n")]
    assert headings == [
        ["generation_t-0.5", "generation_t0.5", "generation_t0.6", "generation_t0.7"],
        ["generation_t0.8", "generation_t0.9"],
    ]


def test_chunks_stand_in_brackets() -> None:
    generation = chunk_generation()
    assert mark_chunks(generation.token_ids, generation.chunks, letters) == "abc⟦de⟧f⟦gh⟧"
    assert mark_chunks(generation.token_ids, generation.chunks, letters, n_prompt=2) == "c⟦de⟧f⟦gh⟧"
    assert mark_chunks([0, 1], [], letters) == "ab"


def test_neighbouring_chunks_stay_apart() -> None:
    chunks = [AcceptedChunk(3, [3], 0.5), AcceptedChunk(1, [1, 2], 0.5)]
    assert mark_chunks([0, 1, 2, 3], chunks, letters) == "a⟦bc⟧⟦d⟧"


def test_colour_is_stronger_where_more_similar_and_ends_with_each_line() -> None:
    chunks = [AcceptedChunk(1, [1], 0.5), AcceptedChunk(2, [2, 3], 0.9)]
    marked = mark_chunks([0, 1, 2, 3], chunks, lambda token_ids: "ab\nc"[: len(token_ids)], colour=True)
    weak, strong, end = "\x1b[38;5;16;48;5;194m", "\x1b[38;5;16;48;5;83m", "\x1b[0m"
    strong_too = strong.replace("[", "[4;")  # underlined, to stand apart from the chunk that it touches
    assert marked == f"a{weak}b{end}{strong_too}↵{end}\n{strong_too}c{end}"


def test_character_parted_by_a_chunk_border_stays_whole(gpt2_folder: Path) -> None:
    tokenizer = tokenizer_of(gpt2_folder)
    text = "x 🦜 y"
    token_ids = tokenizer.encode(text)
    parrot = next(i for i in range(len(token_ids)) if tokenizer.decode(token_ids[: i + 1]).endswith("\ufffd"))
    inside = AcceptedChunk(parrot + 1, token_ids[parrot + 1 : parrot + 2], 0.9)
    rest = AcceptedChunk(parrot + 2, token_ids[parrot + 2 :], 0.9)
    assert mark_chunks(token_ids, [inside, rest], tokenizer.decode) == "x ⟦⟧⟦🦜 y⟧"


def test_leading_space_of_a_chunk_is_kept(llama_folder: Path) -> None:
    tokenizer = tokenizer_of(llama_folder)
    token_ids = tokenizer.encode("the cat sat on the mat", add_special_tokens=False)
    chunk = AcceptedChunk(1, token_ids[1:3], 0.9)
    marked = mark_chunks(token_ids, [chunk], tokenizer.decode)
    assert marked.replace("⟦", "").replace("⟧", "") == "the cat sat on the mat"
    assert "⟦ cat" in marked


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(token_ids=st.lists(st.integers(0, 319), max_size=20), borders=st.lists(st.integers(0, 22), max_size=5))
def test_pieces_join_to_the_whole_text(gpt2_folder: Path, token_ids: list[int], borders: list[int]) -> None:
    tokenizer = tokenizer_of(gpt2_folder)
    pieces = text_pieces(token_ids, sorted(borders), tokenizer.decode)
    assert len(pieces) == len(borders) + 1
    assert "".join(pieces) == tokenizer.decode(token_ids)


def test_generation_cannot_command_the_terminal() -> None:
    text = "\x1b[2J\ta\r\nb\x07\x9b\x7f"
    marked = mark_chunks(list(range(len(text))), [], lambda token_ids: text[: len(token_ids)])
    assert marked == "␛[2J\ta␍\nb␇\ufffd␡"


def test_example_shows_the_prompt_the_chunks_and_their_count() -> None:
    assert format_example(chunk_generation(), CHUNK, letters) == (
        "--- prompt 0\nab\n--- generation_t0.5, chunks in ⟦⟧: 4 of 6 tokens are from 2 chunks\nc⟦de⟧f⟦gh⟧\n---"
    )
    coloured = format_example(chunk_generation(), CHUNK, letters, colour=True)
    assert "\x1b[2mab\x1b[0m" in coloured
    assert "⟦" not in coloured


def test_colour_needs_a_terminal_and_no_veto(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert use_colour(Terminal())
    assert not use_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")
    assert use_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not use_colour(Terminal())
