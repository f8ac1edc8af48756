"""A prompt's result file: what runs write into it, what is still pending, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_runs import (
    CHUNK,
    SETTINGS,
    SHARED,
    TRACE,
    baseline_generation,
    chunk_generation,
    letters,
    save_baseline,
    save_chunk,
    stored,
)

from utils.decoding.types import Generation, GenerationStats
from utils.evaluation.results import BASELINE, SESSION, pending_runs, prompt_path, read_run, run_name, save_run
from utils.evaluation.summary import write_summary
from utils.files import InputError

# ---- One prompt's file


def test_a_run_is_named_after_its_decoding_and_threshold() -> None:
    assert run_name("baseline", 0.5) == "baseline_generation"
    assert run_name("chunk", 0.5) == "generation_t0.5"
    assert run_name("chunk", 1) == "generation_t1.0"
    assert run_name("chunk", -0.0) == "generation_t0.0"
    assert run_name("verify", 0.8) == "verify_generation_t0.8"


def test_a_prompts_file_holds_both_runs_and_their_figures(tmp_path: Path) -> None:
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


def test_a_run_is_read_with_every_step_and_proposal(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    save_baseline(tmp_path)
    found = read_run(tmp_path, 0, CHUNK)
    assert found.trace is not None
    assert found.trace.proposals == TRACE.proposals
    for got, saved in zip(found.trace.steps, TRACE.steps, strict=True):
        assert tuple(got) == pytest.approx(tuple(saved), abs=1e-12)
    assert (found.token_ids, found.chunks) == (chunk_generation().token_ids, chunk_generation().chunks)
    assert read_run(tmp_path, 0, BASELINE).trace is None


def test_a_file_without_traces_is_read_and_added_to(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    old = stored(tmp_path)
    del old["trace"]
    prompt_path(tmp_path, 0).write_text(json.dumps(old))
    assert read_run(tmp_path, 0, CHUNK).trace is None
    save_baseline(tmp_path)
    assert stored(tmp_path)["trace"] == {}


def test_a_file_is_the_same_whichever_run_came_first(tmp_path: Path) -> None:
    for name, saves in {"one": (save_chunk, save_baseline), "other": (save_baseline, save_chunk)}.items():
        for save in saves:
            save(tmp_path / name)
    assert prompt_path(tmp_path / "one", 0).read_bytes() == prompt_path(tmp_path / "other", 0).read_bytes()


def test_token_ids_stand_on_one_line_and_texts_are_unchanged(tmp_path: Path) -> None:
    text = "[\n  1,\n  2\n] 🙂\u2028"
    generation = baseline_generation()
    save_run(tmp_path, BASELINE, generation, text, SHARED, lambda token_ids: text * len(token_ids))
    assert '"baseline_generation_tokens": [0, 1, 2, 3, 4, 5]' in prompt_path(tmp_path, 0).read_text(encoding="utf-8")
    assert stored(tmp_path)["generation"]["prefix"] == text
    assert stored(tmp_path)["generation"]["baseline_generation_text"] == text * 4


def test_a_run_keeps_keys_that_are_not_its_own(tmp_path: Path) -> None:
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
def test_times_are_compared_only_with_a_baseline_of_equal_settings(tmp_path: Path, changed: dict[str, Any]) -> None:
    save_chunk(tmp_path)
    save_baseline(tmp_path, **changed)
    assert "tts" not in stored(tmp_path)["metrics"][CHUNK]
    save_baseline(tmp_path)
    assert stored(tmp_path)["metrics"][CHUNK]["tts"] == 0.5


def test_times_are_compared_only_on_the_same_prompt_tokens(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    wrapped = Generation(0, [9, 0, 1], [2], [], GenerationStats(1, 1.0, 1.0, 0.0))
    save_run(tmp_path, BASELINE, wrapped, "ab", SHARED, letters)
    assert "tts" not in stored(tmp_path)["metrics"][CHUNK]


def test_perplexity_is_that_of_the_new_tokens(tmp_path: Path) -> None:
    save_run(tmp_path, BASELINE, baseline_generation(), "ab", SHARED, letters, nll=8.0)
    metrics = stored(tmp_path)["metrics"][BASELINE]
    assert metrics["nll"] == 8.0
    assert metrics["perplexity"] == pytest.approx(7.389056)  # e^(8 / 4)


def test_a_generation_without_tokens_has_no_ratios(tmp_path: Path) -> None:
    save_run(
        tmp_path, BASELINE, Generation(0, [0, 1], [], [], GenerationStats(1, 0.1, 0.1, 0.0)), "ab", {}, letters, 0.0
    )
    metrics = stored(tmp_path)["metrics"][BASELINE]
    assert metrics["fps"] is None
    assert metrics["perplexity"] is None
    assert write_summary(tmp_path)["runs"][BASELINE]["spread"]["fps"] is None


def test_a_stored_run_is_read_back(tmp_path: Path) -> None:
    save_chunk(tmp_path, index=3)
    assert read_run(tmp_path, 3, CHUNK) == chunk_generation(index=3)
    with pytest.raises(InputError, match="holds no baseline_generation"):
        read_run(tmp_path, 3, BASELINE)


# ---- Runs that are there already

PROMPT = ("ab", [0, 1])


def pending(
    save_dir: Path,
    prompts: list[tuple[str, list[int]]],
    runs: dict[str, dict[str, Any]],
    overwrite: bool = False,
) -> dict[str, list[int]]:
    """The prompts, text and token ids of each, that the runs lack, where every run reads the same token ids."""
    texts, prompt_ids = [text for text, _ in prompts], dict(enumerate(token_ids for _, token_ids in prompts))
    return pending_runs(save_dir, texts, dict.fromkeys(runs, prompt_ids), runs, overwrite)


def test_runs_done_with_the_same_settings_are_not_pending(tmp_path: Path) -> None:
    assert pending(tmp_path / "new", [PROMPT] * 2, SETTINGS) == {BASELINE: [0, 1], CHUNK: [0, 1]}
    save_chunk(tmp_path, index=0)
    save_baseline(tmp_path, index=2)
    save_chunk(tmp_path, index=2)
    for overwrite in (False, True):
        assert pending(tmp_path, [PROMPT] * 3, SETTINGS, overwrite) == {BASELINE: [0, 1], CHUNK: [1]}


def test_a_run_cut_off_in_a_write_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    save_chunk(tmp_path / "whole")
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / ".prompt_0.json.tmp").write_text('{"generation": {"prefix": "a')
    assert pending(folder, [PROMPT], {CHUNK: SETTINGS[CHUNK]}) == {CHUNK: [0]}
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
def test_other_settings_are_refused_and_replaced_with_overwrite(
    tmp_path: Path, prompts: list[tuple[str, list[int]]], changed: dict[str, Any], message: str
) -> None:
    save_chunk(tmp_path)
    before = prompt_path(tmp_path, 0).read_bytes()
    runs = {CHUNK: SETTINGS[CHUNK] | changed}
    with pytest.raises(InputError, match=message) as refusal:
        pending(tmp_path, prompts, runs)
    assert str(prompt_path(tmp_path, 0)) in str(refusal.value)
    assert prompt_path(tmp_path, 0).read_bytes() == before
    assert pending(tmp_path, prompts, runs, overwrite=True) == {CHUNK: list(range(len(prompts)))}
    assert not prompt_path(tmp_path, 0).exists()


def test_overwrite_drops_no_other_run(tmp_path: Path) -> None:
    save_baseline(tmp_path)
    alone = prompt_path(tmp_path, 0).read_bytes()
    save_chunk(tmp_path)
    pending(tmp_path, [PROMPT], {CHUNK: SETTINGS[CHUNK] | {"q_max": 0.5}}, overwrite=True)
    assert prompt_path(tmp_path, 0).read_bytes() == alone


def test_a_folder_of_other_prompts_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    save_chunk(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"holds {CHUNK} of another prompt; choose another --save_dir"):
            pending(tmp_path, [("xy", [23, 24])], {BASELINE: SHARED}, overwrite)
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
def test_a_damaged_file_is_refused_with_its_path(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    save_chunk(tmp_path)
    results = stored(tmp_path)
    change(results)
    path = prompt_path(tmp_path, 0)
    path.write_text(json.dumps(results))
    for read in (write_summary, lambda folder: pending(folder, [PROMPT], SETTINGS)):
        with pytest.raises(InputError, match="is not a complete result file") as refusal:
            read(tmp_path)
        assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b'{"generation": ', b"\xff", b"[]", b"null"])
def test_a_file_that_is_no_result_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = prompt_path(tmp_path, 0)
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        write_summary(tmp_path)
    assert str(refusal.value).startswith(f"{path}: ")
