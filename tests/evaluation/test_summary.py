"""The figures over prompts, their table, and generated text with its chunks marked."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from saved_runs import CHUNK, SETTINGS, chunk_generation, letters, save_baseline, save_chunk
from transformers import AutoTokenizer

from utils.decoding.types import AcceptedChunk, Generation, GenerationStats
from utils.evaluation.results import BASELINE, run_name, save_run
from utils.evaluation.summary import (
    TokenStream,
    format_example,
    format_table,
    mark_chunks,
    typical_prompt,
    write_summary,
)
from utils.files import InputError


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# ---- All prompts


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    """Prompt 0: 1.5 s against 2.0 s. Prompt 1: 3.0 s against 1.0 s. Prompt 10: chunk mode alone, 6.0 s."""
    for index, seconds in ((0, 1.5), (1, 3.0), (10, 6.0)):
        save_chunk(tmp_path, index, seconds)
    save_baseline(tmp_path, 0, 2.0)
    save_baseline(tmp_path, 1, 1.0)
    return write_summary(tmp_path)


def test_the_summary_is_over_tokens_not_a_mean_of_ratios(tmp_path: Path, summary: dict[str, Any]) -> None:
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


def test_the_spread_is_over_prompts(summary: dict[str, Any]) -> None:
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


def test_the_summarys_perplexity_is_token_weighted(tmp_path: Path) -> None:
    save_run(tmp_path, CHUNK, chunk_generation(0), "ab", SETTINGS[CHUNK], letters, nll=6.0)
    short = Generation(1, [0], [1, 2], [], GenerationStats(2, 1.0, 1.0, 0.0))
    save_run(tmp_path, CHUNK, short, "a", SETTINGS[CHUNK], letters, nll=10.0)
    run = write_summary(tmp_path)["runs"][CHUNK]
    assert run["perplexity"] == pytest.approx(7.389056)  # e^((6 + 10) / (6 + 2))
    assert run["perplexity_prompts"] == 2


def test_the_table_says_when_another_command_timed_the_baseline(tmp_path: Path) -> None:
    save_run(tmp_path, CHUNK, chunk_generation(), "ab", SETTINGS[CHUNK], letters, session="yesterday")
    save_baseline(tmp_path)
    summary = write_summary(tmp_path)
    assert summary["runs"][CHUNK]["tts"] == 0.5
    assert summary["runs"][CHUNK]["tts_same_run"] is False
    assert "TTS of generation_t0.5: the baseline was timed by another command" in format_table(summary)


def test_the_typical_prompt_has_the_median_share_from_chunks(tmp_path: Path) -> None:
    for index, n_from_chunks in enumerate((0, 4, 2)):
        chunks = [AcceptedChunk(2, [2] * n_from_chunks, 0.9)] if n_from_chunks else []
        generation = Generation(index, [0, 1], [2] * 5, chunks, GenerationStats(4, 1.0, 1.0, 0.0))
        save_run(tmp_path, CHUNK, generation, "ab", {}, letters)
    assert typical_prompt(tmp_path, CHUNK) == 2
    with pytest.raises(InputError, match="holds no baseline_generation"):
        typical_prompt(tmp_path, BASELINE)


# ---- On the terminal


def test_the_table_aligns_numbers_right_with_units_in_labels(summary: dict[str, Any]) -> None:
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


def test_a_table_of_many_runs_is_cut_into_groups(tmp_path: Path) -> None:
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, -0.5):
        save_run(tmp_path, run_name("chunk", threshold), chunk_generation(), "ab", {}, letters)
    headings = [group.splitlines()[0].split() for group in format_table(write_summary(tmp_path)).split("\n\n")]
    assert headings == [
        ["generation_t-0.5", "generation_t0.5", "generation_t0.6", "generation_t0.7"],
        ["generation_t0.8", "generation_t0.9"],
    ]


def test_chunks_are_marked_with_brackets() -> None:
    generation = chunk_generation()
    assert mark_chunks(generation.token_ids, generation.chunks, letters) == "abc⟦de⟧f⟦gh⟧"
    assert mark_chunks(generation.token_ids, generation.chunks, letters, n_prompt=2) == "c⟦de⟧f⟦gh⟧"
    assert mark_chunks([0, 1], [], letters) == "ab"


def test_neighbouring_chunks_stay_apart() -> None:
    chunks = [AcceptedChunk(3, [3], 0.5), AcceptedChunk(1, [1, 2], 0.5)]
    assert mark_chunks([0, 1, 2, 3], chunks, letters) == "a⟦bc⟧⟦d⟧"


def test_colour_grows_with_similarity_and_ends_with_each_line() -> None:
    chunks = [AcceptedChunk(1, [1], 0.5), AcceptedChunk(2, [2, 3], 0.9)]
    marked = mark_chunks([0, 1, 2, 3], chunks, lambda token_ids: "ab\nc"[: len(token_ids)], colour=True)
    weak, strong, end = "\x1b[38;5;16;48;5;194m", "\x1b[38;5;16;48;5;83m", "\x1b[0m"
    strong_too = strong.replace("[", "[4;")  # underlined, to stand apart from the chunk that it touches
    assert marked == f"a{weak}b{end}{strong_too}↵{end}\n{strong_too}c{end}"


def test_a_character_split_by_a_chunk_border_stays_whole(gpt2_folder: Path) -> None:
    tokenizer = tokenizer_of(gpt2_folder)
    text = "x 🦜 y"
    token_ids = tokenizer.encode(text)
    parrot = next(i for i in range(len(token_ids)) if tokenizer.decode(token_ids[: i + 1]).endswith("\ufffd"))
    inside = AcceptedChunk(parrot + 1, token_ids[parrot + 1 : parrot + 2], 0.9)
    rest = AcceptedChunk(parrot + 2, token_ids[parrot + 2 :], 0.9)
    assert mark_chunks(token_ids, [inside, rest], tokenizer.decode) == "x ⟦⟧⟦🦜 y⟧"


def test_a_chunks_leading_space_is_kept(llama_folder: Path) -> None:
    tokenizer = tokenizer_of(llama_folder)
    token_ids = tokenizer.encode("the cat sat on the mat", add_special_tokens=False)
    chunk = AcceptedChunk(1, token_ids[1:3], 0.9)
    marked = mark_chunks(token_ids, [chunk], tokenizer.decode)
    assert marked.replace("⟦", "").replace("⟧", "") == "the cat sat on the mat"
    assert "⟦ cat" in marked


def test_generation_cannot_command_the_terminal() -> None:
    text = "\x1b[2J\ta\r\nb\x07\x9b\x7f"
    marked = mark_chunks(list(range(len(text))), [], lambda token_ids: text[: len(token_ids)])
    assert marked == "␛[2J\ta␍\nb␇\ufffd␡"


def test_the_example_shows_the_prompt_the_chunks_and_their_count() -> None:
    assert format_example(chunk_generation(), CHUNK, letters) == (
        "--- prompt 0\nab\n--- generation_t0.5, chunks in ⟦⟧: 4 of 6 tokens are from 2 chunks\nc⟦de⟧f⟦gh⟧\n---"
    )
    coloured = format_example(chunk_generation(), CHUNK, letters, colour=True)
    assert "\x1b[2mab\x1b[0m" in coloured
    assert "⟦" not in coloured


def utf8(token_ids: list[int]) -> str:
    """A tokenizer with a token for every byte."""
    return bytes(token_ids).decode(errors="replace")


def test_a_stream_shows_each_text_as_it_comes() -> None:
    shown = io.StringIO()
    stream = TokenStream(shown, utf8, colour=False)
    stream.begin("run", {0: list(b"ab"), 1: list(b"x")})
    for token_ids, chunk, so_far in (
        (b"c", None, "\n--- prompt 0, run\nabc"),
        (b"\xc3", None, "\n--- prompt 0, run\nabc"),  # the first half of é
        (b"\xa9", None, "\n--- prompt 0, run\nabcé"),
        (b"de", "a chunk", "\n--- prompt 0, run\nabcé⟦de⟧"),
        (b"\x1b[2J", None, "\n--- prompt 0, run\nabcé⟦de⟧␛[2J"),
    ):
        stream.write(0, list(token_ids), chunk)
        assert shown.getvalue() == so_far
    stream.write(1, list(b"y"), None)
    assert shown.getvalue().endswith("⟦de⟧␛[2J\n--- prompt 1, run\nxy")
    stream.begin("other", {1: list(b"x")})
    stream.write(1, list(b"z"), None)
    assert shown.getvalue().endswith("xy\n--- prompt 1, other\nxz")


def test_a_stream_underlines_every_second_of_the_chunks_that_touch() -> None:
    shown = io.StringIO()
    stream = TokenStream(shown, utf8, colour=True)
    stream.begin("run", {0: list(b"a")})
    for letter, chunk in (("b", 1), ("c", 1), ("d", 1), ("e", None), ("f", 1)):
        stream.write(0, list(letter.encode()), chunk)
    plain, underlined, end = "\x1b[38;5;16;48;5;83m", "\x1b[4;38;5;16;48;5;83m", "\x1b[0m"
    coloured = f"{plain}b{end}{underlined}c{end}{plain}d{end}e{plain}f{end}"
    assert shown.getvalue() == f"\n--- prompt 0, run\n\x1b[2ma{end}{coloured}"
