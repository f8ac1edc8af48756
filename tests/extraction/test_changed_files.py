"""A file of a finished stage 2 that was changed since, its size the same, is found before anything is made of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS

from utils.extraction.hidden_states import hidden_states_path, read_hidden_states
from utils.extraction.token_probs import token_probs_path, windows_with_token_probs

SCRIPT = "extract_token_probs_and_memmap.py"
RunStage = Callable[..., None]
Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: RunStage) -> Path:
    """A folder with a text, and a .npy of each of its windows in `out`. Not to be written to."""
    root = tmp_path_factory.mktemp("extraction")
    (root / "train.json").write_text(json.dumps([{"text": text} for text in TEXTS[:2]]))
    run_stage(SCRIPT, *flags(gpt2_folder, root), "--save_hidden_states")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it to work in, of later file dates."""
    return Path(shutil.copytree(made, tmp_path / "root", copy_function=shutil.copy))


def flags(model: Path, root: Path) -> list[object]:
    paths = ["--model_path", model, "--data_dir", root, "--output_dir", root / "out", "--partition", "train"]
    return [*paths, "--chunk_size", 24, "--stride", 18, "--min_length", 10, "--batch_size", 3, "--device", "cpu"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_byte(path: Path, at: int, keeps_date: bool = False) -> None:
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1
    path.write_bytes(content)
    if keeps_date:  # as a disk that fails, or a copy of another run
        os.utime(path, ns=(stat.st_atime_ns, 0))


@pytest.mark.parametrize("keeps_date", [False, True])
@pytest.mark.parametrize("at", [-1, 200])
def test_a_changed_npy_does_not_go_into_the_h5(
    root: Path, gpt2_folder: Path, run_stage: RunStage, refusal: Refusal, tmp_path: Path, at: int, keeps_date: bool
) -> None:
    given = flags(gpt2_folder, root)
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    run_stage(SCRIPT, *flags(gpt2_folder, whole), "--construct_memmap")
    path = hidden_states_path(root / "out/train", 5)
    set_byte(path, at, keeps_date)
    assert np.isfinite(read_hidden_states(root / "out/train", 5)).all()  # it looks like any other
    message = refusal(SCRIPT, *given, "--construct_memmap")
    assert message.startswith(f"{path}: was changed or is another run's (has the CRC-32 ")
    assert "delete it and run extract_token_probs_and_memmap.py again" in message
    assert not (root / "out/train.h5").exists()
    path.unlink()
    run_stage(SCRIPT, *given, "--save_hidden_states")
    run_stage(SCRIPT, *given, "--construct_memmap")
    assert contents(root / "out") == contents(whole / "out")


def test_two_windows_files_that_changed_places_are_found(root: Path, gpt2_folder: Path, refusal: Refusal) -> None:
    first, second = (hidden_states_path(root / "out/train", window) for window in (2, 3))
    assert first.stat().st_size == second.stat().st_size
    first.rename(first.with_suffix(".away"))
    second.rename(first)
    first.with_suffix(".away").rename(second)
    assert f"{first}: was changed" in refusal(SCRIPT, *flags(gpt2_folder, root), "--construct_memmap")


def test_a_changed_npy_is_found_also_where_the_h5_was_lost(
    root: Path, gpt2_folder: Path, run_stage: RunStage, refusal: Refusal
) -> None:
    given = (*flags(gpt2_folder, root), "--construct_memmap")
    run_stage(SCRIPT, *given)
    (root / "out/train.h5").unlink()
    set_byte(hidden_states_path(root / "out/train", 0), -1)
    assert "hidden_states_0.npy: was changed" in refusal(SCRIPT, *given)


def test_changed_probabilities_are_found_where_a_window_is_computed_again(
    root: Path, gpt2_folder: Path, run_stage: RunStage, refusal: Refusal
) -> None:
    """They would change the perplexity that the manifest is about to say again."""
    before = contents(root / "out")
    path, lost = token_probs_path(root / "out/train", 3), token_probs_path(root / "out/train", 0)
    text = path.read_text(encoding="utf-8")
    at = text.index("0.", text.index("],")) + 4  # a digit of a probability
    path.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :], encoding="utf-8")
    lost.unlink()
    assert f"{path}: was changed" in refusal(SCRIPT, *flags(gpt2_folder, root), "--save_hidden_states")
    path.unlink()
    run_stage(SCRIPT, *flags(gpt2_folder, root), "--save_hidden_states")
    assert contents(root / "out") == before
    assert len(windows_with_token_probs(root / "out/train")) > 10


def test_a_run_with_nothing_to_do_does_not_take_a_changed_file_for_its_own(
    root: Path, gpt2_folder: Path, run_stage: RunStage, refusal: Refusal
) -> None:
    given = (*flags(gpt2_folder, root), "--construct_memmap")
    run_stage(SCRIPT, *given)
    checksums = (root / "out/train_checksums.txt").read_bytes()
    for name in ("train/hidden_states_5.npy", "train/token_probs_5.json", "train.h5"):
        path = root / "out" / name
        whole = path.read_bytes()
        set_byte(path, -9)
        assert refusal(SCRIPT, *given).startswith(f"{path}: was changed")
        assert (root / "out/train_checksums.txt").read_bytes() == checksums
        path.write_bytes(whole)
        run_stage(SCRIPT, *given)  # newer, but the same
