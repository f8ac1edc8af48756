"""Chat turns: the model's answers to the earlier ones are the context of the next, in each run its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS
from pipelines import Pipeline, build
from transformers import PreTrainedTokenizerBase

from benchmarks.faults.processes import killed_before_rename
from utils.evaluation.results import BASELINE, read_run
from utils.lm.model import load_lm, load_tokenizer
from utils.text.prompts import read_prompts

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QUESTIONS = [["The quick brown fox", "and the dog?", "the cat"], ["def add(a, b):"], ["東京は", "the mat"]]
PLACES = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]  # question and turn of each prompt
CHUNK = "generation_t0.6"
SHORT = ("--chat", "--max_new_tokens", 6, "--temperature", 0, "--similarity_threshold", 0.6)
RunStage = Callable[..., None]


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: RunStage) -> Pipeline:
    """A pipeline whose model has a chat template and whose prompts are conversations."""
    root = tmp_path_factory.mktemp("conversations")
    model = Path(shutil.copytree(gpt2_folder, root / "model"))
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    pipeline = build(model, root / "pipeline", run_stage, TEXTS)
    write_questions(pipeline.root / "prompts.json", QUESTIONS)
    return pipeline


def write_questions(path: Path, questions: list[list[str]]) -> None:
    lines = [json.dumps({"question_id": i, "turns": turns}, ensure_ascii=False) for i, turns in enumerate(questions)]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def tokenizer(made: Pipeline) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(made.model))


def stored(save_dir: Path, index: int) -> dict[str, Any]:
    return json.loads((save_dir / f"prompt_{index}.json").read_text(encoding="utf-8"))


def as_chat(tokenizer: PreTrainedTokenizerBase, turns: list[str], answers: list[str]) -> list[int]:
    text = ""
    for n, turn in enumerate(turns):
        text += f"[user] {turn}\n" + "".join(f"[assistant] {answer}\n" for answer in answers[n : n + 1])
    return tokenizer.encode(f"{text}[assistant] ", add_special_tokens=False)


def test_answers_are_the_context_of_later_turns_in_each_run_its_own(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run_stage("eval.py", *made.eval_flags(tmp_path, *SHORT, "--compare_baseline"))
    texts_of: dict[str, list[list[int]]] = {}
    for name in (BASELINE, CHUNK):
        answers: list[list[str]] = [[], [], []]
        for index, (question, turn) in enumerate(PLACES):
            run = read_run(tmp_path, index, name)
            assert run.prompt_ids == as_chat(tokenizer, QUESTIONS[question][: turn + 1], answers[question])
            answers[question].append(str(tokenizer.decode(run.new_token_ids, skip_special_tokens=True)))
            texts_of.setdefault(name, []).append(run.new_token_ids)
            assert stored(tmp_path, index)["generation"]["prefix"] == QUESTIONS[question][turn]
    # The runs answer the first turns differently, so later ones have other prompts.
    assert texts_of[BASELINE][0] != texts_of[CHUNK][0]
    assert read_run(tmp_path, 1, BASELINE).prompt_ids != read_run(tmp_path, 1, CHUNK).prompt_ids


def test_each_turn_is_generated_as_its_prompt_alone_would_be(
    made: Pipeline, run_stage: RunStage, tmp_path: Path
) -> None:
    run_stage("eval.py", *made.eval_flags(tmp_path, *SHORT, "--gen_baseline_only", "--batch_size", 2))
    generate: Any = load_lm(str(made.model), "cpu").model.generate
    for index in range(len(PLACES)):
        run = read_run(tmp_path, index, BASELINE)
        prompt = torch.tensor([run.prompt_ids])
        mask = torch.ones_like(prompt)
        wanted = generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert run.token_ids == wanted[0].tolist()


def test_every_turn_is_reported(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.html"
    run_stage("eval.py", *made.eval_flags(tmp_path, *SHORT, "--compare_baseline", "--report", report))
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n_prompts"] == len(PLACES)
    new_tokens = [stored(tmp_path, index)["metrics"][CHUNK]["new_tokens"] for index in range(len(PLACES))]
    assert summary["runs"][CHUNK]["new_tokens"] == sum(new_tokens)
    assert summary["runs"][CHUNK]["tts_prompts"] == len(PLACES)
    assert all("tts" in stored(tmp_path, index)["metrics"][CHUNK] for index in range(len(PLACES)))
    assert f"{len(PLACES)}" in next(line for line in shown.splitlines() if line.startswith("prompts "))
    assert "and the dog?" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("n_renames", [1, 4, 7])
def test_a_killed_command_goes_on_with_the_answers_that_are_there(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, n_renames: int
) -> None:
    whole, cut = (made.eval_flags(tmp_path / name, *SHORT, "--compare_baseline") for name in ("whole", "cut"))
    run_stage("eval.py", *whole)
    assert killed_before_rename(n_renames, lambda: run_stage("eval.py", *cut))
    run_stage("eval.py", *cut)
    for index in range(len(PLACES)):
        assert stored(tmp_path / "cut", index)["generation"] == stored(tmp_path / "whole", index)["generation"]


def test_a_lost_answer_is_generated_again_before_the_turns_after_it(
    made: Pipeline, run_stage: RunStage, tmp_path: Path
) -> None:
    flags = made.eval_flags(tmp_path, *SHORT)
    run_stage("eval.py", *flags)
    wanted = [stored(tmp_path, index)["generation"] for index in range(len(PLACES))]
    (tmp_path / "prompt_0.json").unlink()
    run_stage("eval.py", *flags)
    assert [stored(tmp_path, index)["generation"] for index in range(len(PLACES))] == wanted


def test_texts_of_a_conversation_are_generated_several_times_with_their_own_answers(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_questions(tmp_path / "questions.jsonl", QUESTIONS[:1])
    sampled = ("--chat", "--max_new_tokens", 6, "--num_return_sequences", 2, "--gen_baseline_only")
    corpus = ("--save_as_corpus", tmp_path / "corpus", "--prompt_file", tmp_path / "questions.jsonl")
    run_stage("eval.py", *made.eval_flags(tmp_path / "out", *sampled, *corpus))
    runs = [read_run(tmp_path / "out", index, BASELINE) for index in range(6)]
    answers = [str(tokenizer.decode(run.new_token_ids, skip_special_tokens=True)) for run in runs]
    assert answers[0] != answers[3]
    for first in (0, 3):
        for turn in range(3):
            wanted = as_chat(tokenizer, QUESTIONS[0][: turn + 1], answers[first : first + turn])
            assert runs[first + turn].prompt_ids == wanted
    # One passage for each conversation, the last turn with all before it.
    passages = json.loads((tmp_path / "corpus/train.json").read_text(encoding="utf-8"))
    assert len(passages) == 2
    assert all(turn in passage["text"] for passage in passages for turn in QUESTIONS[0])


def test_later_turns_must_fit_with_the_longest_answers(
    made: Pipeline, refusal: Callable[..., str], tmp_path: Path
) -> None:
    flags = made.eval_flags(tmp_path, "--chat", "--max_new_tokens", 40)
    message = refusal("eval.py", *flags)
    assert "prompt 2 (counted from 0) has " in message
    assert "tokens, the answers before it included, the model's 128 positions less 40 new tokens leave 88" in message


def test_without_chat_only_first_turns_are_used_which_is_said(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_stage("eval.py", *made.eval_flags(tmp_path, "--max_new_tokens", 2))
    path = made.root / "prompts.json"
    said = f"{path}: only the first turn of each prompt is used, 3 are left out; --chat uses all"
    assert caplog.messages == [said]
    texts = [stored(tmp_path, index)["generation"]["prefix"] for index in range(3)]
    assert texts == [turns[0] for turns in QUESTIONS]
    assert not (tmp_path / "prompt_3.json").exists()


@pytest.mark.parametrize("key", ["turns", "prompt"])
def test_a_prompt_that_is_a_list_is_a_conversation(tmp_path: Path, key: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{key: ["a", "b"]}, "c", {"text": "d"}]))
    found = read_prompts(path, all_turns=True, n_copies=2)
    assert [prompt.index for prompt in found] == list(range(8))
    wanted = [("a", 0), ("b", 1), ("a", 0), ("b", 1), ("c", 0), ("c", 0), ("d", 0), ("d", 0)]
    assert [(prompt.text, prompt.turn) for prompt in found] == wanted
