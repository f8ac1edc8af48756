"""A tokenizer's BOS stands before every window that is read, as before every prompt, and is no token of the text."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS
from pipelines import Pipeline, build
from synthetic_corpus import all_bytes

from utils.evaluation.results import BASELINE, read_run
from utils.evaluation.runner import LACKS_BOS
from utils.extraction.hidden_states import read_hidden_states
from utils.extraction.token_probs import read_token_probs, token_probs_path, windows_with_token_probs
from utils.lm.model import CausalLM, load_lm, load_tokenizer
from utils.text.prompts import Prompt, encode_prompts

EXTRACT = "extract_token_probs_and_memmap.py"
SIZES = ("--partition", "train", "--min_length", 10, "--device", "cpu", "--save_hidden_states")
WINDOW, STRIDE = 40, 30
RunStage = Callable[..., None]
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return folder


def extract(run: Callable[..., Any], model: Path, data: Path, out: Path, *flags: object) -> Any:
    sizes = (*SIZES, "--chunk_size", WINDOW, "--stride", STRIDE)
    return run(EXTRACT, "--model_path", model, "--data_dir", data, "--output_dir", out, *sizes, *flags)


@pytest.fixture(scope="module")
def with_bos(llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: RunStage) -> Path:
    out = tmp_path_factory.mktemp("with_bos")
    extract(run_stage, llama_folder, data, out)
    return out


@pytest.fixture(scope="module")
def without_bos(llama_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: RunStage) -> Path:
    out = tmp_path_factory.mktemp("without_bos")
    extract(run_stage, llama_folder, data, out, "--no_bos")
    return out


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "train_manifest.json").read_text())


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


@torch.inference_mode()
def hidden_states_of(lm: CausalLM, token_ids: list[int]) -> np.ndarray:
    return lm.forward(torch.tensor([token_ids]))[0][0].numpy()


# ---- Stage 2


def test_a_passages_vectors_are_those_that_it_has_as_a_prompt(
    llama_folder: Path, with_bos: Path, without_bos: Path
) -> None:
    lm, tokenizer = load_lm(str(llama_folder), "cpu"), load_tokenizer(str(llama_folder))
    (prompt_ids,) = encode_prompts([Prompt(TEXTS[0], 0, Path("p"))], tokenizer)
    _, window_ids, _ = read_token_probs(with_bos / "train", 0)
    assert prompt_ids[: WINDOW + 1] == [tokenizer.bos_token_id, *window_ids.tolist()]
    of_prompt = hidden_states_of(lm, prompt_ids)[1 : WINDOW + 1]
    assert cosines(read_hidden_states(with_bos / "train", 0), of_prompt).min() > 0.9999
    assert cosines(read_hidden_states(without_bos / "train", 0), of_prompt).min() < 0.9


def test_later_windows_begin_with_bos_too(llama_folder: Path, with_bos: Path, without_bos: Path) -> None:
    lm, tokenizer = load_lm(str(llama_folder), "cpu"), load_tokenizer(str(llama_folder))
    for window in windows_with_token_probs(with_bos / "train"):
        window_ids = read_token_probs(with_bos / "train", window)[1].tolist()
        for out, prefix in ((with_bos, [tokenizer.bos_token_id]), (without_bos, [])):
            expected = hidden_states_of(lm, prefix + window_ids)[len(prefix) :]
            np.testing.assert_allclose(read_hidden_states(out / "train", window), expected, rtol=1e-4, atol=1e-4)


def test_bos_changes_what_the_lm_gives_and_nothing_else(with_bos: Path, without_bos: Path) -> None:
    windows = windows_with_token_probs(with_bos / "train")
    assert windows == windows_with_token_probs(without_bos / "train")
    for window in windows:
        rows, others = (
            json.loads(token_probs_path(out / "train", window).read_text(encoding="utf-8"))
            for out in (with_bos, without_bos)
        )
        assert [[row[0], *row[2:]] for row in rows] == [[row[0], *row[2:]] for row in others]
        assert rows[0][1] == others[0][1] == 0
        assert all(row[1] != other[1] for row, other in zip(rows[1:5], others[1:5], strict=True))
    found, other = manifest(with_bos)["results"], manifest(without_bos)["results"]
    assert {name for name in found if found[name] != other[name]} == {"perplexity"}


def test_the_manifest_knows_and_another_way_is_refused(
    llama_folder: Path, data: Path, with_bos: Path, without_bos: Path, refusal: Refusal
) -> None:
    assert manifest(with_bos)["arguments"]["no_bos"] is False
    assert manifest(without_bos)["arguments"]["no_bos"] is True
    message = extract(refusal, llama_folder, data, without_bos)
    assert "was made with --no_bos True, this run has False" in message


def test_a_tokenizer_without_bos_gives_the_same_bytes_either_way(
    gpt2_folder: Path, data: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    for name, flags in (("a", ()), ("b", ("--no_bos",))):
        extract(run_stage, gpt2_folder, data, tmp_path / name, *flags)
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")
    assert "no_bos" not in manifest(tmp_path / "a")["arguments"]
    lm = load_lm(str(gpt2_folder), "cpu")
    window_ids = read_token_probs(tmp_path / "a/train", 3)[1].tolist()
    expected = hidden_states_of(lm, window_ids)
    np.testing.assert_allclose(read_hidden_states(tmp_path / "a/train", 3), expected, rtol=1e-4, atol=1e-4)


def test_shards_read_bos_as_one_run_does(
    llama_folder: Path, data: Path, with_bos: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    for shard in (("--shard", 0), ("--shard", 1), ("--merge_only",)):
        extract(run_stage, llama_folder, data, tmp_path, "--num_shards", 2, *shard)
    assert all_bytes(tmp_path) == all_bytes(with_bos)


def test_bos_takes_one_of_the_models_positions(
    llama_folder: Path, data: Path, tmp_path: Path, refusal: Refusal
) -> None:
    flags = ("--model_path", llama_folder, "--data_dir", data, "--output_dir", tmp_path, *SIZES)
    message = refusal(EXTRACT, *flags, "--chunk_size", 256, "--stride", 200)
    assert "reads 256 tokens at most, 1 for BOS; give --chunk_size and --stride of at most 255" in message


# ---- Stage 5


@pytest.fixture(scope="module")
def made(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: RunStage) -> Pipeline:
    pipeline = build(llama_folder, tmp_path_factory.mktemp("llama"), run_stage, TEXTS)
    for name, text in (("validation", TEXTS[0] + TEXTS[3]), ("test", TEXTS[3] + TEXTS[1])):
        (pipeline.root / "data" / f"{name}.json").write_text(json.dumps([{"text": text}]))
    return pipeline


def text_flags(pipeline: Pipeline, save_dir: Path, *flags: object) -> list[object]:
    given = pipeline.eval_flags(save_dir, "--perplexity_window", 50, *flags)
    at = given.index("--prompt_file")
    return given[:at] + given[at + 2 :]


@torch.inference_mode()
def by_hand(lm: CausalLM, windows: list[list[int]], prefix: list[int]) -> float:
    """Negative log-likelihood of the windows' tokens from the second on."""
    total = 0.0
    for window in windows:
        log_p = lm.forward(torch.tensor([prefix + window]))[1][0].double().log_softmax(-1)[len(prefix) :]
        total -= sum(float(log_p[i, token]) for i, token in enumerate(window[1:]))
    return total


@pytest.mark.parametrize("flags", [(), ("--no_bos",)])
def test_perplexity_and_the_fit_read_bos_before_each_window_and_do_not_count_it(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    lm, tokenizer = load_lm(str(made.model), "cpu"), load_tokenizer(str(made.model))
    files = {name: made.root / "data" / f"{name}.json" for name in ("validation", "test")}
    given = ("--fit_acceptance", files["validation"], "--perplexity_file", files["test"], *flags)
    run_stage("eval.py", *text_flags(made, tmp_path, *given))
    base = json.loads((tmp_path / "perplexity.json").read_text())["base"]
    origin = json.loads((tmp_path / "acceptance_map.json").read_text())["origin"]
    prefix = [] if flags else [tokenizer.bos_token_id]
    for name, tokens, nll in (
        ("test", base["tokens"], base["nll"]),
        ("validation", origin["tokens"], -origin["log_likelihood_base"]),
    ):
        text = json.loads(files[name].read_text())[0]["text"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        windows = [ids[first : first + 50] for first in range(0, len(ids), 50)]
        assert tokens == sum(len(window) - 1 for window in windows)
        assert nll == pytest.approx(by_hand(lm, windows, prefix), rel=1e-5)
        if name == "test":
            # The text is ASCII, so what decodes to it is as long in bytes. A window's first token is not predicted.
            ends = [len(tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
            starts = [*range(0, len(ids), 50), len(ids)]
            n_bytes = sum(ends[end] - ends[start + 1] for start, end in pairwise(starts))
            assert base["bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6)


def test_a_window_of_perplexity_leaves_a_position_for_bos(made: Pipeline, refusal: Refusal, tmp_path: Path) -> None:
    flags = ("--perplexity_file", made.root / "data/test.json", "--perplexity_window", 256)
    message = refusal("eval.py", *text_flags(made, tmp_path, *flags))
    assert "reads 256 tokens at most, 1 for BOS; give --perplexity_window of at most 255" in message


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_stage_2_and_stage_5_give_a_text_the_same_perplexity(
    folder: str, request: pytest.FixtureRequest, data: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    model = request.getfixturevalue(folder)
    sizes = (*SIZES, "--chunk_size", WINDOW, "--stride", WINDOW)
    run_stage(EXTRACT, "--model_path", model, "--data_dir", data, "--output_dir", tmp_path, *sizes)
    text = ("--perplexity_file", data / "train.json", "--perplexity_window", WINDOW, "--gen_baseline_only")
    run_stage("eval.py", "--model_path", model, *text, "--save_dir", tmp_path / "eval", "--device", "cpu")
    base = json.loads((tmp_path / "eval/perplexity.json").read_text())["base"]
    assert manifest(tmp_path)["results"]["perplexity"] == pytest.approx(base["perplexity"], rel=1e-6)


SHORT = ("--max_new_tokens", 4, "--temperature", 0)


def test_a_datastore_that_lacks_the_bos_of_prompts_is_used_with_a_warning(
    made: Pipeline, run_stage: RunStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_stage("eval.py", *made.eval_flags(tmp_path / "with", *SHORT))
    assert caplog.messages == []
    warning = f"{made.tries}: was made without the BOS that is read here, so that {LACKS_BOS}"
    text = ("--perplexity_file", made.root / "data/test.json")
    path = made.tries / "hidden_states_manifest.json"
    whole = path.read_text()
    try:
        for extraction in ('"no_bos": true', '"other": 0'):  # --no_bos, or of a time before it
            assert whole.count('"no_bos": false') == 1
            path.write_text(whole.replace('"no_bos": false', extraction))
            caplog.clear()
            run_stage("eval.py", *made.eval_flags(tmp_path / extraction, *SHORT))
            run_stage("eval.py", *text_flags(made, tmp_path / "texts", *text))
            assert caplog.messages == [warning] * 2
            run_stage("eval.py", *text_flags(made, tmp_path / "texts", *text, "--no_bos"))
            assert len(caplog.messages) == 2
    finally:
        path.write_text(whole)


def test_a_tokenizer_without_bos_needs_none_in_its_datastore(
    gpt2_folder: Path, run_stage: RunStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = build(gpt2_folder, tmp_path / "gpt2", run_stage, TEXTS[:1])
    run_stage("eval.py", *pipeline.eval_flags(tmp_path, *SHORT))
    assert caplog.messages == []


def test_a_corpus_of_generated_texts_has_no_bos_that_stage_2_would_read_twice(
    made: Pipeline, run_stage: RunStage, tmp_path: Path
) -> None:
    run_stage("eval.py", *made.eval_flags(tmp_path / "out", *SHORT, "--save_as_corpus", tmp_path / "corpus"))
    tokenizer = load_tokenizer(str(made.model))
    passages = json.loads((tmp_path / "corpus/train.json").read_text(encoding="utf-8"))
    for index, passage in enumerate(passages):
        run = read_run(tmp_path / "out", index, "generation_t0.5")
        assert run.token_ids[0] == tokenizer.bos_token_id
        assert "<s>" not in passage["text"]
        assert passage["text"] == tokenizer.decode(run.token_ids[1:])


# ---- EOS


def test_a_prompt_does_not_end_in_the_eos_that_a_tokenizer_adds(
    llama_folder: Path, tmp_path: Path, run_stage: RunStage, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    tokenizer: Any = load_tokenizer(str(model))
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    tokenizer.save_pretrained(model)
    text = "The quick brown fox"
    assert tokenizer(text)["input_ids"][-1] == tokenizer.eos_token_id
    (tmp_path / "prompts.json").write_text(json.dumps([text, "the cat sat on"]))
    runs = []
    for name, folder in (("model", model), ("plain", llama_folder)):
        flags = ("--model_path", folder, "--prompt_file", tmp_path / "prompts.json", "--gen_baseline_only")
        run_stage("eval.py", *flags, "--save_dir", tmp_path / name / "out", "--device", "cpu", *SHORT)
        runs.append([read_run(tmp_path / name / "out", index, BASELINE).token_ids for index in range(2)])
    assert runs[0] == runs[1]
    said = "the tokenizer adds '</s>' after a text, which is left out: prompts are to be continued"
    assert caplog.messages == [said]
