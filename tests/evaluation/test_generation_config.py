"""What a model's generation_config.json says: stage 5 generates as `generate` does, and its flags win."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS
from pipelines import Pipeline, build

from utils.evaluation.results import BASELINE, read_run
from utils.files import InputError
from utils.lm.model import load_lm, load_tokenizer

N_NEW = 12
N_PROMPTS = 4
GREEDY = ("--max_new_tokens", N_NEW, "--temperature", 0)
RunStage = Callable[..., None]


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: RunStage) -> Pipeline:
    return build(gpt2_folder, tmp_path_factory.mktemp("generation_config"), run_stage, TEXTS)


@pytest.fixture(scope="module")
def plain(made: Pipeline) -> list[list[int]]:
    """The new tokens of each prompt without any settings."""
    return by_generate(made)


def by_generate(pipeline: Pipeline) -> list[list[int]]:
    """What `generate` gives with the settings of the model's own generation config."""
    lm, tokenizer = load_lm(str(pipeline.model), "cpu"), load_tokenizer(str(pipeline.model))
    generate: Any = lm.model.generate
    new = []
    for text in json.loads((pipeline.root / "prompts.json").read_text(encoding="utf-8")):
        prompt = torch.tensor([tokenizer(text)["input_ids"]])
        mask = torch.ones_like(prompt)
        found = generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=N_NEW, pad_token_id=0)
        new.append(found[0, prompt.shape[1] :].tolist())
    return new


def with_config(pipeline: Pipeline, folder: Path, **config: Any) -> Pipeline:
    """The same pipeline with a model whose generation_config.json says this too."""
    shutil.copytree(pipeline.model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return Pipeline(folder, pipeline.root)


def new_tokens(save_dir: Path, name: str) -> list[list[int]]:
    return [read_run(save_dir, index, name).new_token_ids for index in range(N_PROMPTS)]


def settings(save_dir: Path, name: str = BASELINE) -> dict[str, Any]:
    return json.loads((save_dir / "prompt_0.json").read_text(encoding="utf-8"))["settings"][name]


CONFIGS: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "repetition penalty": lambda plain: {"repetition_penalty": 1.5},
    "suppressed tokens": lambda plain: {"suppress_tokens": sorted({tokens[1] for tokens in plain})},
    "suppressed at the beginning": lambda plain: {"begin_suppress_tokens": [tokens[0] for tokens in plain]},
    "bad words": lambda plain: {"bad_words_ids": [tokens[2:4] for tokens in plain]},
    "bias": lambda plain: {"sequence_bias": [[[tokens[1]], -9.0] for tokens in plain]},
    "no repeated bigram": lambda plain: {"no_repeat_ngram_size": 2},
    "at least so many tokens": lambda plain: {"eos_token_id": plain[0][2], "min_new_tokens": 7},
    "EOS at the end": lambda plain: {"forced_eos_token_id": plain[0][0]},
    "two of them": lambda plain: {"repetition_penalty": 1.3, "suppress_tokens": [plain[0][3]]},
}


@pytest.mark.parametrize("row", CONFIGS)
def test_greedy_text_is_what_generate_makes_of_the_config(
    made: Pipeline, plain: list[list[int]], run_stage: RunStage, tmp_path: Path, row: str
) -> None:
    pipeline = with_config(made, tmp_path / "model", **CONFIGS[row](plain))
    wanted = by_generate(pipeline)
    assert wanted != plain
    # θ = 1: the datastore is read and nothing of it accepted.
    without_chunks = ("--compare_baseline", "--similarity_threshold", 1, "--batch_size", 3)
    run_stage("eval.py", *pipeline.eval_flags(tmp_path / "chunks", *without_chunks, *GREEDY))
    verify = ("--decoding", "verify", "--draft_growth", "full")
    run_stage("eval.py", *pipeline.eval_flags(tmp_path / "verify", *verify, *GREEDY))
    assert new_tokens(tmp_path / "chunks", BASELINE) == wanted
    assert new_tokens(tmp_path / "chunks", "generation_t1.0") == wanted
    assert new_tokens(tmp_path / "verify", "verify_generation_t0.5") == wanted


def test_a_token_between_chunks_is_drawn_after_the_processors(
    made: Pipeline, plain: list[list[int]], run_stage: RunStage, tmp_path: Path
) -> None:
    suppressed = sorted({token for tokens in plain for token in tokens[:6]})
    pipeline = with_config(made, tmp_path / "model", suppress_tokens=suppressed)
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, "--similarity_threshold", 0.6, *GREEDY))
    runs = [read_run(tmp_path, index, "generation_t0.6") for index in range(N_PROMPTS)]
    assert any(run.chunks for run in runs)
    for run in runs:
        first = len(run.prompt_ids)
        of_chunks = {chunk.position + i for chunk in run.chunks for i in range(len(chunk.token_ids))}
        drawn = {token for at, token in enumerate(run.new_token_ids, first) if at not in of_chunks}
        assert not drawn & set(suppressed)


SAMPLED = {"do_sample": True, "temperature": 0.3, "top_k": 7, "top_p": 0.9}


@pytest.mark.parametrize(
    ("config", "flags", "drawing"),
    [
        (SAMPLED, {}, (0.3, 7, 0.9)),
        (SAMPLED, {"temperature": 0.8}, (0.8, 7, 0.9)),
        (SAMPLED, {"top_k": 0, "top_p": 0.5}, (0.3, 0, 0.5)),
        (SAMPLED, {"temperature": 1.0, "top_k": 3, "top_p": 1.0}, (1.0, 3, 1.0)),
        ({"do_sample": True, "top_p": 0.4}, {}, (1.0, 50, 0.4)),  # as generate
        ({**SAMPLED, "do_sample": False}, {}, (1.0, 0, 1.0)),  # as generate which does not sample, does not say
    ],
)
def test_text_is_drawn_as_the_config_says_where_no_flag_says_otherwise(
    made: Pipeline,
    run_stage: RunStage,
    tmp_path: Path,
    config: dict[str, Any],
    flags: dict[str, float],
    drawing: tuple[float, int, float],
) -> None:
    pipeline = with_config(made, tmp_path / "model", **config)
    given = [word for name, value in flags.items() for word in (f"--{name}", value)]
    short = ("--gen_baseline_only", "--max_new_tokens", N_NEW)
    run_stage("eval.py", *pipeline.eval_flags(tmp_path / "a", *short, *given))
    found = settings(tmp_path / "a")
    assert (found["temperature"], found["top_k"], found["top_p"]) == drawing
    all_flags = [
        word
        for name, value in zip(("temperature", "top_k", "top_p"), drawing, strict=True)
        for word in (f"--{name}", value)
    ]
    run_stage("eval.py", *made.eval_flags(tmp_path / "b", *short, *all_flags))
    assert new_tokens(tmp_path / "a", BASELINE) == new_tokens(tmp_path / "b", BASELINE)


def test_temperature_0_is_greedy_whatever_the_config_says(
    made: Pipeline, plain: list[list[int]], run_stage: RunStage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Several texts are more than greedy decoding takes, and the processor lets generate see the config.
    pipeline = with_config(made, tmp_path / "model", **SAMPLED, num_return_sequences=3, repetition_penalty=1.0001)
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, "--gen_baseline_only", *GREEDY))
    assert new_tokens(tmp_path, BASELINE) == plain
    assert "[transformers]" not in capfd.readouterr().err  # which warns of flags that greedy decoding has no use for


def test_processors_are_among_the_settings_that_may_not_change(
    made: Pipeline, run_stage: RunStage, refusal: Callable[..., str], tmp_path: Path
) -> None:
    flags = ("--gen_baseline_only", *GREEDY)
    run_stage("eval.py", *made.eval_flags(tmp_path, *flags))
    assert "processors" not in settings(tmp_path)
    pipeline = with_config(made, tmp_path / "model", repetition_penalty=1.5)
    assert "--overwrite" in refusal("eval.py", *pipeline.eval_flags(tmp_path, *flags))
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, *flags, "--overwrite"))
    assert settings(tmp_path)["processors"] == {"repetition_penalty": 1.5}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"guidance_scale": 2.0, "stop_strings": ["x"]}, "guidance_scale, stop_strings"),
        ({"watermarking_config": {"greenlist_ratio": 0.25}, "max_time": 9.0}, "watermarking_config, max_time"),
        ({"num_beams": 1, "guidance_scale": 1.0}, ""),
    ],
)
def test_what_goes_with_the_steps_of_generate_is_left_out_and_named(
    made: Pipeline,
    run_stage: RunStage,
    tmp_path: Path,
    config: dict[str, Any],
    names: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    others = {"repetition_penalty": 1.3, "max_length": 7, "cache_implementation": "static"}
    pipeline = with_config(made, tmp_path / "model", **config, **others)
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, "--gen_baseline_only", *GREEDY))
    said = [f"{pipeline.model}: its generation config sets {names}, not honoured here"] if names else []
    assert caplog.messages == said
    assert settings(tmp_path)["processors"] == {"repetition_penalty": 1.3}
    only_penalty = with_config(made, tmp_path / "penalty", repetition_penalty=1.3)
    assert new_tokens(tmp_path, BASELINE) == by_generate(only_penalty)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"repetition_penalty": -1.0}, "`penalty` has to be a strictly positive float, but is -1.0"),
        ({"do_sample": True, "temperature": -1.0}, r"`temperature` \(=-1.0\) has to be"),
        ({"do_sample": True, "top_k": -3}, "`top_k` has to be a strictly positive integer"),
        ({"bad_words_ids": 3}, "bad_words_ids"),
    ],
)
def test_a_config_that_generate_does_not_take_is_refused(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    pipeline = with_config(made, tmp_path / "model", **config)
    message = (
        rf"^{pipeline.model}: its generation config cannot be used \(.*{reason}.*\); correct its generation_config"
    )
    with pytest.raises(InputError, match=message):
        run_stage("eval.py", *pipeline.eval_flags(tmp_path, "--gen_baseline_only"))
