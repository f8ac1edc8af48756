"""Stages on machines that are not as usual: a file system without locks, cores that other work keeps busy."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import TEXTS
from pipelines import build

from utils import files


def test_every_stage_goes_on_without_locks_and_says_what_is_unguarded(
    gpt2_folder: Path,
    tmp_path: Path,
    run_stage: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a network drive without a lock daemon."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files, "flock", refuse)
    monkeypatch.setattr(files, "lockf", refuse)
    run_stage("preprocess_dataset.py", "--dataset", "python-docs", "--max_passages", 1, "--output_dir", tmp_path / "p")
    pipeline = build(gpt2_folder, tmp_path / "pipeline", run_stage, TEXTS)
    run_stage("eval.py", *pipeline.eval_flags(tmp_path / "results", "--max_new_tokens", 2))
    assert (tmp_path / "results/summary.json").exists()
    unguarded = "so nothing stops two runs from writing here at the same time"
    written = {tmp_path / name for name in ("p", "pipeline/extracted", "pipeline/tries", "results")} | {pipeline.tries}
    assert {message for message in caplog.messages if "locks" in message} == {
        f"{folder}: its file system has no locks (No locks available), {unguarded}" for folder in written
    }


@pytest.fixture
def default_threads() -> Iterator[int]:
    """The number that torch computes with where nothing says another."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_a_run_goes_on_with_the_threads_that_it_began_with(
    gpt2_folder: Path, tmp_path: Path, run_stage: Callable[..., None], default_threads: int
) -> None:
    (tmp_path / "train.json").write_text(json.dumps([{"text": TEXTS[0]}]))
    extract = ("--model_path", gpt2_folder, "--data_dir", tmp_path, "--output_dir", tmp_path, "--partition", "train")
    extract += ("--chunk_size", 64, "--stride", 48)
    prompts = ("--model_path", gpt2_folder, "--gen_baseline_only", "--prompt_file", tmp_path / "prompts.json")
    generate = (*prompts, "--save_dir", tmp_path / "results", "--max_new_tokens", 3)

    def results() -> tuple[int, list[int]]:
        paths = sorted((tmp_path / "results").glob("prompt_*.json"))
        runs = [json.loads(path.read_text())["metrics"]["baseline_generation"] for path in paths]
        manifest = json.loads((tmp_path / "train_manifest.json").read_text())
        return manifest["results"]["threads"], [run["threads"] for run in runs]

    (tmp_path / "prompts.json").write_text('["a"]')
    run_stage("extract_token_probs_and_memmap.py", *extract, "--threads", 2)
    run_stage("eval.py", *generate, "--threads", 2)
    assert results() == (2, [2])
    for flags, expected in (((), 2), (("--threads", 1), 1)):
        torch.set_num_threads(default_threads)
        run_stage("extract_token_probs_and_memmap.py", *extract, "--save_hidden_states", *flags)
        assert torch.get_num_threads() == expected
        for path in tmp_path.glob("train/hidden_states_*.npy"):
            path.unlink()
    (tmp_path / "prompts.json").write_text('["a", "b"]')
    torch.set_num_threads(default_threads)
    run_stage("eval.py", *generate)
    assert results()[1] == [2, 2]
