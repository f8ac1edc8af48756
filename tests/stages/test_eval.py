"""Stage 5 through its command line: runs that join, resume, repeat, and input that is refused."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS
from pipelines import LABELS, Pipeline, build

from benchmarks.faults.processes import killed_before_rename
from utils.lm.model import load_lm

SHORT = ("--max_new_tokens", 8, "--temperature", 0)


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    pipeline = build(gpt2_folder, tmp_path_factory.mktemp("eval"), run_stage, TEXTS)
    run_stage("eval.py", *pipeline.eval_flags(pipeline.root / "first", *SHORT))
    return pipeline


@pytest.fixture
def pipeline(made: Pipeline, tmp_path: Path) -> Pipeline:
    """A copy that a test may spoil."""
    shutil.copytree(made.root, tmp_path / "pipeline")
    return Pipeline(made.model, tmp_path / "pipeline")


def results(save_dir: Path, i: int = 0) -> dict:
    return json.loads((save_dir / f"prompt_{i}.json").read_text(encoding="utf-8"))


def without_times(save_dir: Path) -> list[dict]:
    kept = []
    for path in sorted(save_dir.glob("prompt_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for metrics in found["metrics"].values():
            for key in ("seconds", "lm_seconds", "retrieval_seconds", "tts"):
                metrics.pop(key, None)
        kept.append({key: found[key] for key in ("generation", "metrics", "settings")})
    return kept


def test_a_baseline_run_joins_the_chunk_runs_file_and_equals_generate(made, run_stage, tmp_path):
    run_stage("eval.py", *made.eval_flags(tmp_path, *SHORT))
    chunk_run = results(tmp_path)["generation"]
    flags = ("--prompt_file", made.root / "prompts.json", "--save_dir", tmp_path, "--device", "cpu")
    run_stage("eval.py", "--model_path", made.model, *flags, "--gen_baseline_only", *SHORT)
    lm = load_lm(str(made.model), "cpu")
    for i in range(4):
        joined = results(tmp_path, i)
        tokens = joined["generation"]["baseline_generation_tokens"]
        prompt = torch.tensor([tokens[: len(tokens) - joined["metrics"]["baseline_generation"]["new_tokens"]]])
        wanted = lm.model.generate(prompt, do_sample=False, max_new_tokens=8, pad_token_id=0)
        assert tokens == wanted[0].tolist()
        assert set(joined["metrics"]) == {"baseline_generation", "generation_t0.5"}
        assert set(joined["time"]) == {"baseline_generation_time", "generation_t0.5"}
    assert {key: joined for key, joined in results(tmp_path)["generation"].items() if key in chunk_run} == chunk_run


def test_compare_baseline_makes_both_and_prints_the_efficiency_figures(made, run_stage, tmp_path, capsys):
    run_stage("eval.py", *made.eval_flags(tmp_path, "--compare_baseline", "--similarity_threshold", 0.2, *SHORT))
    shown = capsys.readouterr().out
    for figure in ("FPS", "TTS", "in retrieval", "mean chunk length", "perplexity", "Best similarity of", "⟦"):
        assert figure in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    chunk, baseline = summary["runs"]["generation_t0.2"], summary["runs"]["baseline_generation"]
    assert baseline["fps"] == 0
    assert chunk["fps"] == pytest.approx(1 - chunk["forward_passes"] / chunk["new_tokens"])
    per_token = [run["seconds"] / run["new_tokens"] for run in (chunk, baseline)]
    assert chunk["tts"] == pytest.approx(1 - per_token[0] / per_token[1])


def test_the_same_seed_gives_the_same_text_and_another_seed_another(made, run_stage, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_stage(
            "eval.py",
            *made.eval_flags(tmp_path / name, "--max_new_tokens", 20, "--similarity_threshold", 0.9, "--seed", seed),
        )
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    texts = [results(tmp_path / name)["generation"]["generation_t0.9_tokens"] for name in "ac"]
    assert texts[0] != texts[1]


def test_batches_and_tries_on_the_device_and_a_tiny_cache_change_no_text(made, run_stage, tmp_path):
    texts = []
    variants: list[tuple[object, ...]] = [(), ("--batch_size", 3), ("--move_trie_to_gpu",), ("--trie_cache_gb", 1e-9)]
    variants += [("--no_reprocessing",), ("--cuda_graphs",)]
    for i, flags in enumerate(variants):
        run_stage("eval.py", *made.eval_flags(tmp_path / str(i), *flags, *SHORT))
        texts.append([results(tmp_path / str(i), k)["generation"]["generation_t0.5_tokens"] for k in range(4)])
    assert all(found == texts[0] for found in texts)


def test_excluded_tries_are_never_used(made, run_stage, tmp_path):
    run_stage("eval.py", *made.eval_flags(tmp_path / "all", "--similarity_threshold", -1, *SHORT))
    used = {
        results(tmp_path / "all", i)["generation"]["generation_t-1.0_tokens"][phrase["position"] - 1]
        for i in range(4)
        for phrase in results(tmp_path / "all", i)["generation"]["generation_t-1.0_retrieved_phrases"]
    }
    assert used
    (tmp_path / "excluded.json").write_text(json.dumps([int(path.stem) for path in made.tries.glob("*.h5")]))
    none = ("--excluded_tries_prior", tmp_path / "excluded.json")
    for flags in (none, ("--exclude_huge_token_tries", "--huge_trie_rows", 1)):
        save_dir = tmp_path / flags[0].strip("-")
        run_stage("eval.py", *made.eval_flags(save_dir, "--similarity_threshold", -1, *flags, *SHORT))
    assert not results(tmp_path / "excluded_tries_prior")["generation"]["generation_t-1.0_retrieved_phrases"]


def test_the_paper_authors_partition_label_need_not_name_the_folder(made, run_stage, tmp_path):
    flags = made.eval_flags(tmp_path, *SHORT)
    flags[flags.index("train")] = "test"
    run_stage("eval.py", *flags)
    assert (tmp_path / "prompt_0.json").exists()


@pytest.mark.parametrize("n_renames", [0, 1, 3])
def test_killed_between_prompts_the_next_run_leaves_the_same_results(made, run_stage, tmp_path, n_renames):
    run_stage("eval.py", *made.eval_flags(tmp_path / "whole", "--compare_baseline", *SHORT))
    cut = made.eval_flags(tmp_path / "cut", "--compare_baseline", *SHORT)
    assert killed_before_rename(n_renames, lambda: run_stage("eval.py", *cut))
    run_stage("eval.py", *cut)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


def test_no_reprocessing_refuses_what_a_rebuilt_datastore_left(pipeline, run_stage, refusal):
    path = pipeline.tries / "hidden_states_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["numpy"] = "another"
    path.write_text(json.dumps(manifest))
    flags = pipeline.eval_flags(pipeline.root / "again", *SHORT)
    assert "made from another datastore" in refusal("eval.py", *flags, "--no_reprocessing")
    run_stage("eval.py", *flags)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("of numpy's arrays", r"\.pkl: is no pickle of arrays \(it asks for numpy"), ("cut off", r"\.pkl: has .* bytes")],
)
def test_a_spoiled_pickle_is_refused_with_its_path(pipeline, refusal, kind, message):
    for path in (pipeline.tries / "individual_flattened_tries").glob("*.pkl"):
        n_bytes = path.stat().st_size
        other = pickle.dumps(np.zeros(n_bytes, dtype=np.uint8), protocol=2)[:n_bytes]
        path.write_bytes(other if kind == "of numpy's arrays" else path.read_bytes()[:-20])
    flags = pipeline.eval_flags(pipeline.root / "again", *SHORT)
    assert re.search(message, refusal("eval.py", *flags, "--no_reprocessing"))


def replaced(flags: list[object], name: str, value: object) -> list[object]:
    at = flags.index(name)
    return [*flags[: at + 1], value, *flags[at + 2 :]]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


REFUSED: dict[str, tuple[Callable[[Pipeline, list[object]], list[object]], str]] = {
    "θ above 1": (lambda p, f: [*f, "--similarity_threshold", 1.1], r"\[-1, 1\]"),
    "θ not a number": (lambda p, f: [*f, "--similarity_threshold", "nan"], r"\[-1, 1\]"),
    "γ 1": (lambda p, f: replaced(f, "--tok_prob_threshold", 1), r"\[0, 1\)"),
    "no new tokens": (lambda p, f: [*f, "--max_new_tokens", 0], "at least 1"),
    "both baselines": (lambda p, f: [*f, "--gen_baseline_only", "--compare_baseline"], "one of them"),
    "no datastore": (lambda p, f: f[: f.index("--token_trie_dir")] + f[f.index("--dataset") :], "--token_trie_dir"),
    "model missing": (lambda p, f: replaced(f, "--model_path", p.root / "none"), "none: does not exist"),
    "model without weights": (lambda p, f: replaced(f, "--model_path", without(p, "model.safetensors")), "weights"),
    "model without tokenizer": (lambda p, f: replaced(f, "--model_path", without(p, "tokenizer.json")), "tokenizer"),
    "another model": (lambda p, f: replaced(f, "--model_path", other_model(p)), "another model"),
    "trie folder missing": (lambda p, f: replaced(f, "--token_trie_dir", p.root / "none"), "none: does not exist"),
    "a file for a folder": (lambda p, f: replaced(f, "--token_trie_dir", p.root / "prompts.json"), "not a folder"),
    "another γ": (lambda p, f: replaced(f, "--tok_prob_threshold", 0.5), "train_0.5"),
    "another dataset": (lambda p, f: replaced(f, "--dataset", "other"), "token_trie_other"),
    "stage 4 not run": (lambda p, f: drop(f, p.tries / "hidden_states_manifest.json"), "make_token_trie.py"),
    "prompts missing": (lambda p, f: replaced(f, "--prompt_file", p.root / "none.json"), "none.json: does not exist"),
    "prompts a folder": (lambda p, f: replaced(f, "--prompt_file", p.root), "not a file"),
    "prompts empty": (lambda p, f: replaced(f, "--prompt_file", write(p.root / "p", "")), "is empty"),
    "empty prompt": (lambda p, f: replaced(f, "--prompt_file", write(p.root / "p", '["a", ""]')), "prompt 1"),
    "prompts truncated": (lambda p, f: replaced(f, "--prompt_file", write(p.root / "p", '["a", "b')), "not valid JSON"),
    "prompts not UTF-8": (lambda p, f: replaced(f, "--prompt_file", write(p.root / "p", b'["\xff"]')), "not UTF-8"),
    "prompt too long": (lambda p, f: [*f[:-4], "--max_new_tokens", 126], "128 positions"),
    "template without place": (lambda p, f: [*f, "--prompt_template", "Q:"], r"no \{prompt\}"),
    "no chat template": (lambda p, f: [*f, "--chat"], "no chat template"),
    "save_dir a file": (lambda p, f: replaced(f, "--save_dir", p.root / "prompts.json"), "folder"),
    "excluded not a list": (lambda p, f: [*f, "--excluded_tries_prior", write(p.root / "e", '{"a": 1}')], "token ids"),
    "other settings": (lambda p, f: [*replaced(f, "--save_dir", p.root / "first"), "--seed", 5], "--overwrite"),
    "no such device": (lambda p, f: [*replaced(f, "--device", "cuda:99")], "--device cuda:99"),
}


def without(pipeline: Pipeline, name: str) -> Path:
    folder = pipeline.root / "spoiled"
    shutil.copytree(pipeline.model, folder)
    (folder / name).unlink()
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    return folder


def other_model(pipeline: Pipeline) -> Path:
    folder = pipeline.root / "other"
    shutil.copytree(pipeline.model, folder)
    lm = load_lm(str(folder), "cpu")
    with torch.no_grad():
        next(lm.model.parameters()).add_(0.1)
    lm.model.save_pretrained(folder)
    return folder


def drop(flags: list[object], path: Path) -> list[object]:
    path.unlink()
    return flags


@pytest.mark.parametrize("row", REFUSED)
def test_unusable_input_is_refused_in_one_sentence_and_nothing_is_lost(pipeline, refusal, row):
    make_flags, message = REFUSED[row]
    before = results(pipeline.root / "first")
    flags = make_flags(pipeline, pipeline.eval_flags(pipeline.root / "again", *SHORT))
    assert re.search(message, refusal("eval.py", *flags))
    assert results(pipeline.root / "first") == before


def test_a_second_run_in_the_same_folder_is_refused(pipeline, refusal):
    from utils.files import exclusive_lock

    with exclusive_lock(pipeline.root / "first", "eval"):
        message = refusal("eval.py", *pipeline.eval_flags(pipeline.root / "first", *SHORT))
    assert "another run is writing here" in message


def test_labels_are_as_in_the_datastore(made, refusal, tmp_path):
    flags = made.eval_flags(tmp_path, *SHORT)
    assert "token_trie_texts_DSother" in refusal("eval.py", *replaced(flags, "--model_ds", "other"))
    assert LABELS[1] == "ds"


def test_verified_text_is_the_baselines_and_its_drafts_are_counted(made, run_stage, tmp_path, capsys):
    verify = ("--decoding", "verify", "--compare_baseline", "--draft_growth", "full", "--live", "session")
    for name, flags in (("greedy", ("--temperature", 0)), ("sampled", ("--seed", 7)), ("graphs", ("--cuda_graphs",))):
        run_stage(
            "eval.py", *made.eval_flags(tmp_path / name, *verify, "--max_new_tokens", 20, "--batch_size", 2, *flags)
        )
        for i in range(4):
            generation = results(tmp_path / name, i)["generation"]
            assert generation["verify_generation_t0.5_tokens"] == generation["baseline_generation_tokens"]
        run = json.loads((tmp_path / name / "summary.json").read_text())["runs"]["verify_generation_t0.5"]
        assert run["drafts"] > 0
        assert len(run["acceptance_by_position"]) > 0
        # A text that ends with an accepted token has one pass less than one that ends with a drawn one.
        assert 0 <= run["accepted_tokens"] - (run["new_tokens"] - run["forward_passes"]) <= 4
    shown = capsys.readouterr().out
    assert "accepted tokens per draft" in shown
    assert "Drafted tokens accepted, by how far ahead" in shown


def test_a_stream_shows_each_text_as_it_comes_with_its_chunks_marked(made, run_stage, tmp_path, capsys):
    run_stage("eval.py", *made.eval_flags(tmp_path, "--stream", "--similarity_threshold", 0.2, *SHORT))
    shown = capsys.readouterr().out
    for i in range(4):
        generation = results(tmp_path, i)["generation"]
        assert f"--- prompt {i}, generation_t0.2" in shown
        for phrase in generation["generation_t0.2_retrieved_phrases"]:
            if phrase["text"].isascii() and phrase["text"].isprintable():
                assert f"⟦{phrase['text']}⟧" in shown
