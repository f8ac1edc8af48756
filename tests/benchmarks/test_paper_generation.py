"""The pure parts of the paper's tables of generated text, and where their datastores lie."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding_cases import PROMPTS, datastore_near_text

from benchmarks.paper import datastores, distance, efficiency, expert, sensitivity
from benchmarks.paper.datastores import Work, add_work, work_of
from benchmarks.paper.generating import (
    BASELINE,
    Asking,
    figures_over_seeds,
    forward_passes_saved,
    over_seeds,
    repeated_ngrams,
    require_seeds,
)
from benchmarks.paper.rouge import rouge_l, words
from utils.cli import Parser
from utils.decoding.types import AcceptedChunk, Generation, GenerationStats
from utils.files import InputError
from utils.lm.model import load_lm, load_tokenizer


def generation(prompt: list[int], new: list[int], chunks: list[AcceptedChunk], forward_passes: int = 1) -> Generation:
    return Generation(0, prompt, new, chunks, GenerationStats(forward_passes, 1.0, 0.0, 0.0))


# ---- Figures


def test_an_interval_over_three_seeds_is_students() -> None:
    # Mean 2, standard deviation 1, t 4.303: half the width is 4.303 / √3.
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.value, found.by_seed) == (2.0, (1.0, 2.0, 3.0))
    assert (found.upper - 2, 2 - found.lower) == pytest.approx((2.48434, 2.48434), abs=1e-4)
    both = figures_over_seeds([{"a": 1.0, "b": 5.0}, {"a": 1.0, "b": 7.0}])
    assert (both["a"].lower, both["a"].upper, both["b"].value) == (1.0, 1.0, 6.0)


@pytest.mark.parametrize("seeds", [[0], [1, 1], list(range(11))])
def test_seeds_that_give_no_interval_are_refused(seeds: list[int]) -> None:
    with pytest.raises(InputError, match="expected two to ten different ones"):
        require_seeds(seeds)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words() -> None:
    # "police killed gunman" of 4 and 4 words has "the gunman" and "police the gunman" in common: LCS 2 and 3.
    assert words("The  Cat's `x_1`, 9") == ["the", "cat", "s", "x_1", "9"]
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    # LCS "a c" of 3 and 2 words: precision 2/3, recall 1.
    assert rouge_l("a b c", "a c") == pytest.approx(4 / 5)
    assert rouge_l("A, b!", "a b") == 1
    assert rouge_l("a", "b") == 0


def test_n_grams_are_counted_over_texts_and_within_them() -> None:
    # Pairs: (1 2) (2 1) (1 2) and (1 2): 2 of 4 differ; within the first text 1 of 3 stood before.
    assert distance.distinct_share([[1, 2, 1, 2], [1, 2]], 2) == 0.5
    assert distance.distinct_share([[1, 2, 1, 2], [1, 2]], 1) == pytest.approx(2 / 6)
    assert distance.distinct_share([[1]], 2) == 0
    assert distance.repeated_share([1, 2, 1, 2], 2) == pytest.approx(1 / 3)
    assert distance.repeated_share([1], 2) == 0


def test_only_tokens_of_chunks_add_to_the_divergence() -> None:
    # New tokens from position 2 on; chunks are the first two of them and the last.
    chunks = [AcceptedChunk(2, [7, 8], 0.9), AcceptedChunk(5, [9], 0.9)]
    log_probs = np.array([-1.0, -0.5, -100.0, -0.25])
    assert distance.chunk_nats(generation([1, 2], [7, 8, 3, 9], chunks), log_probs) == 1.75


def test_scores_are_log_softmax_at_the_temperature_with_its_entropy(gpt2_folder: Path) -> None:
    lm = load_lm(str(gpt2_folder), "cpu", "float32")
    prompt, new = [5, 6, 7], [9, 3]
    log_probs, entropies = distance.score(lm, generation(prompt, new, []), temperature=0.5)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([prompt + new])).logits[0].double()
    for i, token in enumerate(new):
        p = torch.softmax(logits[len(prompt) - 1 + i] / 0.5, dim=0)
        assert log_probs[i] == pytest.approx(float(p[token].log()), abs=1e-4)
        assert entropies[i] == pytest.approx(-float((p * p.log()).sum()), abs=1e-4)


def test_forward_passes_saved_is_of_all_tokens_together() -> None:
    texts = [generation([1], [2] * 10, [], forward_passes=5), generation([1], [2] * 30, [], forward_passes=25)]
    assert forward_passes_saved(texts) == 0.25


def test_shares_of_expert_answers_come_by_way_and_kind() -> None:
    def run(right: int) -> dict[str, list[dict[str, object]]]:
        return {"table": [{"way": "LM", "asked_in": "all", "n": 8, "right": right, "false": 2, "share": right / 8}]}

    found = expert.figures([expert.shares(run(2)), expert.shares(run(4))])
    assert found["LM", "all"]["right"].by_seed == (0.25, 0.5)
    assert found["LM", "all"]["false"].value == 0.25


def test_a_threshold_that_disables_retrieval_is_no_part_of_the_grid() -> None:
    with pytest.raises(InputError, match="1 disables retrieval"):
        sensitivity.main(["--thetas", "0.5", "1"])


@pytest.fixture
def asking(gpt2_folder: Path) -> Asking:
    """Asks a small model, with two seeds, to go on from some prompts."""
    lm, tokenizer = load_lm(str(gpt2_folder), "cpu", "float32"), load_tokenizer(str(gpt2_folder))
    args = argparse.Namespace(seeds=[0, 1], max_new_tokens=8, temperature=1.0, prompt_batch_size=3)
    return Asking(lm, tokenizer, PROMPTS[:3], args)


def test_only_chunks_take_a_text_away_from_the_lms_distribution(asking: Asking) -> None:
    datastore = datastore_near_text(asking.lm, asking.prompts, 8)
    rows = distance.figures(asking, asking.generate(distance.ways(asking, datastore, [-1.0, 1.0])))
    assert list(rows) == [BASELINE, "chunk, θ -1", "chunk, θ 1", "verify"]
    for exact in (BASELINE, "chunk, θ 1", "verify"):
        assert (rows[exact]["kl"].value, rows[exact]["same_text"].value) == (0, 1)
        assert rows[exact]["surprise"] == pytest.approx(rows[BASELINE]["surprise"])
    assert rows["chunk, θ -1"]["kl"].value > 0.5
    assert rows["chunk, θ -1"]["fps"].value > 0 == rows[BASELINE]["fps"].value


def test_efficiency_is_compared_with_the_baselines_of_its_prompt(asking: Asking) -> None:
    datastore = datastore_near_text(asking.lm, asking.prompts, 8, wrong=True)
    vars(asking.args).update(similarity_thresholds=[1.0, -1.0], min_first_token_probs=[0.0, 1.0], reject_repeats=False)
    vars(asking.args).update(tok_prob_thresholds=[0.5])
    settings = efficiency.grid(asking.args)
    ways = {each.name: partial(asking.chunk_mode, datastore, each.acceptance) for each in settings}
    generations = asking.generate({BASELINE: asking.decoding} | ways)
    rows = efficiency.figures(asking, generations)
    gated = ["γ 0.5, θ -1, δ 1", "γ 0.5, θ 1, δ 1"]
    assert list(rows) == [BASELINE, "γ 0.5, θ -1", "γ 0.5, θ 1", *gated]
    # Accepting nothing is the baseline: as alike to its other samples as it is itself.
    assert rows["γ 0.5, θ 1"]["rouge_l"] == rows[BASELINE]["rouge_l"]
    assert rows["γ 0.5, θ 1"]["fps"].value == 0
    assert rows["γ 0.5, θ 1"]["perplexity"] == rows[BASELINE]["perplexity"]
    baseline = generations[BASELINE]
    alike = efficiency.mean_rouge(asking, baseline[0], baseline[1])
    assert rows[BASELINE]["rouge_l"].value == pytest.approx(alike)
    assert alike < 1
    assert rows["γ 0.5, θ -1"]["fps"].value > 0
    assert rows["γ 0.5, θ -1"]["chunk_length"].value > 1
    assert rows["γ 0.5, θ -1, δ 1"]["accepted"].value < rows["γ 0.5, θ -1"]["accepted"].value == 1
    assert rows["γ 0.5, θ -1, δ 1"]["perplexity"].value < rows["γ 0.5, θ -1"]["perplexity"].value


def test_the_table_of_efficiency_has_a_row_for_what_auto_chooses(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_stage: Callable[..., None], capsys
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["The quick brown fox", "def add(a, b):"]))
    for module in (datastores, efficiency):
        monkeypatch.setattr(module, "run_script" if module is datastores else "run_stage", run_stage)
    models = ["--model_ds", gpt2_folder, "--model_gen", gpt2_folder, "--device", "cpu", "--work", tmp_path / "work"]
    models += ["--chunk_size", 64, "--stride", 48]
    sizes = ["--prompt_file", prompts, "--max_new_tokens", 30, "--n_answers", 2, "--seeds", 0, 1]
    flags = ["--tok_prob_thresholds", 0.001, "--similarity_thresholds", 0.5, "--max_costs", 5, "--min_chunk_length", 2]
    efficiency.main([str(flag) for flag in (*models, *sizes, *flags, "--output", tmp_path / "table.json")])
    results = json.loads((tmp_path / "table.json").read_text())["results"]
    (auto,) = (name for name in results["rows"] if "auto 5" in name)
    assert list(results["rows"]) == [BASELINE, "γ 0.001, θ 0.5", auto]
    assert results["rows"][auto]["from_chunks"]["value"] > 0
    assert results["settings"][auto]["auto"] == 5
    assert results["settings"][auto]["reject_repeats"]
    assert f"θ {results['settings'][auto]['similarity_threshold']:g}" in auto
    assert f"{auto}, expected: " in capsys.readouterr().out


def test_repeated_ngrams_are_those_that_stand_earlier_in_the_text() -> None:
    def of(*token_ids: int) -> Generation:
        return Generation(0, [9, 9, 9, 9, 9], list(token_ids), [], GenerationStats(1, 1.0, 1.0, 0.0))

    assert repeated_ngrams([of(*[7] * 13)]) == 0.9
    assert repeated_ngrams([of(1, 2, 3, 4, 5, 1, 2, 3, 4)]) == pytest.approx(1 / 6)
    assert repeated_ngrams([of(1, 2, 3), of(*range(20))]) == 0


# ---- Datastores


def flags(*argv: str) -> argparse.Namespace:
    parser = Parser("")
    add_work(parser)
    return parser.parse_args(list(argv))


def test_a_work_folder_takes_the_users_text_and_models() -> None:
    work = work_of(flags())
    assert (work.dataset, work.model_ds, work.data_flags) == ("python-docs", datastores.LARGE, ())
    work = work_of(
        flags("--input_files", "a.txt", "b", "--max_passages", "9", "--model_gen", "gpt2", "--min_length", "1")
    )
    assert (work.dataset, work.model_gen, work.window_flags) == ("local", "gpt2", ("--min_length", "1"))
    assert work.data_flags == ("--input_files", "a.txt", "b", "--max_passages", "9")


def test_two_models_of_one_name_are_refused_as_folders_bear_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="have one name"):
        Work(tmp_path, model_ds="a/gpt2", model_gen="b/gpt2").tries(0.5)


def test_a_stage_that_fails_is_told_with_its_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"preprocess_dataset\.py failed, see above; the command was .*--dataset none"):
        Work(tmp_path, dataset="none").data()
    assert "--dataset" in capfd.readouterr().err
