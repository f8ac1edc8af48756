"""Flags that would do nothing are refused, and so are devices that decoding cannot use, before anything is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from pipelines import build

from eval import parse_args
from utils.evaluation.results import read_run

EVAL = ("--model_path", "m", "--save_dir", "s")
STORE = ("--token_trie_dir", "t", "--dataset", "d", "--model_ds", "m", "--partition", "p", "--tok_prob_threshold", 0.5)
PROMPTS, TEXT, FIT = ("--prompt_file", "p.json"), ("--perplexity_file", "x.json"), ("--fit_acceptance", "f.json")
ALONE, VERIFY = ("--gen_baseline_only",), ("--decoding", "verify")
NEEDS_TEXT = "is about texts, so it needs --perplexity_file or --fit_acceptance"
NEEDS_DRAFTS = "is about drafts, so it needs --decoding verify"
NO_CHUNKS = "is about the acceptance of chunks, of which there is none here"
FOR_CHUNKS = "auto is for chunks that are generated; give --prompt_file and a datastore"
CHOSEN = "is not for --similarity_threshold auto, which chooses how chunks are accepted"
NEEDS_PROMPTS = "is about generation, so it needs --prompt_file"

OF_TEXTS: tuple[str, ...] = (
    *("--sweep_similarity_threshold 0.5 0.9", "--max_windows 3", "--perplexity_window 64"),
    *("--perplexity_batch_size 2", "--no_bos"),
)
OF_DRAFTS: tuple[str, ...] = (
    *("--draft_shape line", "--max_draft_tokens 4", "--draft_neighbors 4", "--draft_temperature 0.1"),
    *("--live off", "--draft_growth full"),
)
OF_ACCEPTANCE = (
    *("--acceptance bernoulli", "--q_max 0.5", "--acceptance_map g.json", "--min_first_token_prob 0.1"),
    *("--neighbors 4", "--reject_repeats"),
)
HAS_ITS_OWN = "says nothing where one row proposes, and where a map is fitted that has its own"
OF_GENERATION: tuple[str, ...] = (
    *("--prompt_template {prompt}", "--chat", "--max_new_tokens 5", "--temperature 1", "--top_k 5", "--top_p 0.5"),
    *("--seed 3", "--batch_size 2", "--decoding verify", "--cuda_graphs", "--stream", "--compare_baseline"),
    *("--num_return_sequences 2", "--overwrite"),
)

IDLE = [
    *((flag, (*STORE, *PROMPTS), NEEDS_TEXT) for flag in OF_TEXTS),
    *((flag, (*STORE, *PROMPTS), NEEDS_DRAFTS) for flag in OF_DRAFTS),
    *((flag, (*STORE, *PROMPTS, "--decoding", "chunk"), NEEDS_DRAFTS) for flag in OF_DRAFTS[:1]),
    *((flag, (*PROMPTS, *ALONE), NEEDS_DRAFTS) for flag in OF_DRAFTS[:1]),
    *((flag, (*PROMPTS, *ALONE), NO_CHUNKS) for flag in OF_ACCEPTANCE),
    *((flag, (*STORE, *PROMPTS, *VERIFY), NO_CHUNKS) for flag in OF_ACCEPTANCE),
    ("--sweep_similarity_threshold 0.5", (*TEXT, *ALONE), NO_CHUNKS),
    ("--min_chunk_length 2", (*PROMPTS, *ALONE), "is about a datastore, which is not read here"),
    ("--max_cost 0.1", (*STORE, *PROMPTS), "needs --similarity_threshold auto"),
    ("--threshold_text x.json", (*STORE, *PROMPTS), "needs --similarity_threshold auto"),
    ("--similarity_threshold auto", (*STORE, *TEXT), FOR_CHUNKS),
    ("--similarity_threshold auto", (*STORE, *PROMPTS, *VERIFY), FOR_CHUNKS),
    ("--similarity_threshold auto", (*PROMPTS, *ALONE), FOR_CHUNKS),
    ("--min_first_token_prob 0.2", (*STORE, *PROMPTS, "--similarity_threshold", "auto"), CHOSEN),
    ("--neighbors 3", (*STORE, *PROMPTS, "--similarity_threshold", "auto"), CHOSEN),
    ("--neighbor_temperature 0.1", (*STORE, *PROMPTS), HAS_ITS_OWN),
    ("--neighbor_temperature 0.1", (*STORE, *FIT, "--neighbors", 4), HAS_ITS_OWN),
    ("--neighbors 4", (*STORE, *PROMPTS, "--acceptance_map", "g.json"), "is in the --acceptance_map"),
    ("--reject_repeats", (*STORE, *PROMPTS, "--neighbors", 4), "is about one proposal, so it needs --neighbors 1"),
    *((flag, (*STORE, *TEXT), NEEDS_PROMPTS) for flag in OF_GENERATION),
    ("--max_new_tokens 5", (*STORE, *FIT), NEEDS_PROMPTS),
    ("--decoding verify", (*PROMPTS, *ALONE), "says nothing with --gen_baseline_only, which proposes nothing"),
    ("--top_k 5", (*STORE, *PROMPTS, "--temperature", 0), "says nothing at --temperature 0, which draws nothing"),
    ("--top_p 0.5", (*STORE, *PROMPTS, "--temperature", 0.0), "says nothing at --temperature 0, which draws nothing"),
    (
        "--num_return_sequences 3",
        (*STORE, *PROMPTS, "--temperature", 0),
        "at --temperature 0 all texts of a prompt are the same",
    ),
    (
        "--num_return_sequences 3",
        (*PROMPTS, *ALONE, "--temperature", 0),
        "at --temperature 0 all texts of a prompt are the same",
    ),
    ("--huge_trie_rows 9", (*STORE, *PROMPTS), "says nothing without --exclude_huge_token_tries"),
]


@pytest.mark.parametrize(("flag", "others", "reason"), IDLE)
def test_a_flag_of_stage_5_that_would_do_nothing_is_refused(
    refusal: Callable[..., str], flag: str, others: tuple[object, ...], reason: str
) -> None:
    name = flag.split()[0]
    message = refusal("eval.py", *EVAL, *others, *flag.split())
    assert message.split(": error: ")[1] == f"{name}: {reason} (see --help)"


@pytest.mark.parametrize(
    "flags",
    [
        *((*STORE, *TEXT, *flag.split()) for flag in OF_TEXTS),
        (*STORE, *FIT, "--max_windows", 3, "--q_max", 0.5),
        *((*STORE, *PROMPTS, *VERIFY, *flag.split()) for flag in OF_DRAFTS),
        *((*STORE, *PROMPTS, *flag.split()) for flag in OF_ACCEPTANCE),
        *((*STORE, *PROMPTS, *TEXT, *VERIFY, *flag.split()) for flag in OF_ACCEPTANCE),  # for the text
        *((*STORE, *PROMPTS, *flag.split()) for flag in OF_GENERATION),
        (*STORE, *PROMPTS, "--num_return_sequences", 1, "--temperature", 0),
        (*STORE, *PROMPTS, "--num_return_sequences", 3),
        (*STORE, *PROMPTS, "--exclude_huge_token_tries", "--huge_trie_rows", 9),
        # As the authors' README says to do: everything about the datastore stays in the command.
        (*STORE, *PROMPTS, *ALONE, "--similarity_threshold", 0.5, "--no_reprocessing", "--move_trie_to_gpu"),
    ],
)
def test_a_flag_that_does_something_is_taken(flags: tuple[object, ...]) -> None:
    parse_args([str(flag) for flag in (*EVAL, *flags)])


def test_what_bernoulli_accepts_at_temperature_0_differs_between_the_texts_of_a_prompt(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None]
) -> None:
    pipeline = build(gpt2_folder, tmp_path / "pipeline", run_stage, TEXTS)
    (tmp_path / "prompts.json").write_text(json.dumps(["The quick brown fox"]))
    how = ("--acceptance", "bernoulli", "--similarity_threshold", 0.2, "--temperature", 0)
    flags = (*how, "--num_return_sequences", 3, "--max_new_tokens", 12, "--prompt_file", tmp_path / "prompts.json")
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, *flags))
    texts = {tuple(read_run(tmp_path, index, "generation_t0.2").new_token_ids) for index in range(3)}
    assert len(texts) > 1


# ---- Stage 2


EXTRACT = ("--model_path", "m", "--data_dir", "d", "--output_dir", "o", "--partition", "train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep_dat",), "--keep_dat: is about the .h5, so it needs --construct_memmap"),
        (("--discard_intermediates",), "--discard_intermediates: is about the .h5, so it needs --construct_memmap"),
        (("--hidden_dtype", "float16"), "--hidden_dtype: no hidden states are written without --save_hidden_states"),
        (("--num_shards", 2), "--num_shards: says nothing without --shard or --merge_only"),
        (("--device_map", "auto", "--device", "cpu"), "--device_map: takes all GPUs, so it goes without --device"),
    ],
)
def test_a_flag_of_stage_2_that_would_do_nothing_is_refused(
    refusal: Callable[..., str], flags: tuple[object, ...], message: str
) -> None:
    assert message in refusal("extract_token_probs_and_memmap.py", *EXTRACT, *flags)


# ---- Devices


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.json").write_text(json.dumps([{"text": TEXTS[0]}]))
    (folder / "prompts.json").write_text('["a"]')
    return folder


@pytest.mark.parametrize("script", ["eval.py", "extract_token_probs_and_memmap.py"])
@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("meta", "is not supported; use cpu or cuda"),
        ("mps", "is not supported" if torch.backends.mps.is_available() else "not available here"),
        ("toaster", "not available here"),
    ],
)
def test_a_device_that_decoding_cannot_use_is_refused_in_one_sentence(
    script: str, device: str, reason: str, refusal: Callable[..., str], gpt2_folder: Path, text: Path, tmp_path: Path
) -> None:
    extract = ("--data_dir", text, "--output_dir", tmp_path, "--partition", "train")
    sizes = ("--chunk_size", 32, "--stride", 24, "--min_length", 10)
    generate = ("--prompt_file", text / "prompts.json", "--save_dir", tmp_path, "--gen_baseline_only")
    flags = generate if script == "eval.py" else (*extract, *sizes)
    message = refusal(script, "--model_path", gpt2_folder, *flags, "--device", device)
    assert message.startswith(f"--device {device}: {reason}")
