"""The command that measures a CUDA GPU, tried on the CPU."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu
from utils.files import InputError


def test_the_dry_run_takes_every_step(gpt2_folder: Path, tmp_path: Path) -> None:
    command = [ROOT / "benchmarks/gpu.sh", "--dry_run", "--output", tmp_path / "gpu.json", "--steps", "retrieval"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    step = json.loads((tmp_path / "gpu.json").read_text())["results"]["steps"]["retrieval"]
    assert step["status"] == "done"
    assert step["results"]
    for dry_run in (False, True):
        steps = gpu.steps_of("cuda", dry_run, gpt2_folder, tmp_path)
        assert sum(step.seconds for step in steps) <= 720
        for step in steps:
            script = next(str(word) for word in step.command if str(word).endswith(".py"))
            assert (ROOT / script).is_file()


def test_a_step_that_fails_or_takes_too_long_is_said_to(tmp_path: Path) -> None:
    python = gpu.sys.executable
    slow = gpu.run(gpu.Step("slow", 1, [python, "-c", "import time; time.sleep(60)"], "slow.json"), tmp_path)
    failed = gpu.run(gpu.Step("failed", 9, [python, "-c", "raise SystemExit(3)"], "failed.json"), tmp_path)
    assert (slow["status"], slow["results"]) == ("timed out", None)
    assert failed["status"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_before_anything_runs() -> None:
    with pytest.raises(InputError, match="there is no CUDA device here; --dry_run"):
        gpu.main([])
    with pytest.raises(InputError, match="--steps: there is no 'all'"):
        gpu.main(["--dry_run", "--steps", "all"])
