"""How much a stage shows on stderr: bars by default, nothing under --quiet, lines beside the bars under --verbose."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, STAGES

from utils.progress import LOGGER, ProgressBar, phase, set_verbosity


@pytest.fixture(autouse=True)
def usual_verbosity() -> Iterator[None]:
    handlers = LOGGER.handlers.copy()
    yield
    LOGGER.handlers[:] = handlers
    set_verbosity(quiet=False, verbose=False)


def shown_by(n_items: int, capsys: pytest.CaptureFixture[str]) -> str:
    with phase("counting"):
        for _ in ProgressBar(range(n_items), desc="items", unit="item"):
            pass
    return capsys.readouterr().err


def test_bar_shows_rate_and_unit_apart(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by(3, capsys)
    assert "items: 100%" in shown
    assert " item/s]" in shown
    assert "counting" not in shown


def test_quiet_shows_neither_bars_nor_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "")
    set_verbosity(quiet=True, verbose=False)
    assert shown_by(3, capsys) == ""
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_verbose_adds_one_set_of_lines_however_often_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        set_verbosity(quiet=False, verbose=True)
    shown = shown_by(3, capsys)
    assert "items: 100%" in shown
    assert shown.count("counting …") == 1
    assert shown.count("counting: 0.0") == 1


def test_log_file_gets_few_states_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by(10_000, capsys)
    assert shown.count("\r") <= 3


def test_bar_of_unknown_length_ends_full(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(total=60, desc="items", unit="item") as bar:
        bar.update(24)
        bar.end()
    assert "100%" in capsys.readouterr().err.split("\r")[-1]


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_takes_both_flags_but_not_at_once(script: str, refusal: Callable[..., str]) -> None:
    assert "not allowed with argument" in refusal(script, "--quiet", "--verbose")


def test_stage_shows_bars_lines_or_neither(
    run_stage: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"text": f"passage {i}"} for i in range(9)]))
    shown = {}
    for flags in ((), ("--quiet",), ("--verbose",)):
        folder = tmp_path / f"out{flags}"
        run_stage("preprocess_dataset.py", "--dataset", "local", "--input_files", text, "--output_dir", folder, *flags)
        output, shown[flags] = capsys.readouterr()
        assert "train.json: " in output
    assert "passages/s" in shown[()]
    assert shown["--quiet",] == ""
    assert "passages/s" in shown["--verbose",]
    assert "reading local from" in shown["--verbose",]
    assert "reading local" not in shown[()]


def test_terminal_sees_the_bar_move_and_fit_its_width() -> None:
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from utils.progress import ProgressBar\n"
        "for _ in ProgressBar(range(5), desc='items', unit='item'): time.sleep(0.12)"
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    subprocess.run([sys.executable, "-c", program, ROOT], stderr=child, check=True)
    os.close(child)
    states = os.read(parent, 65536).decode().split("\r")
    os.close(parent)
    assert len([state for state in states if "item/s" in state]) >= 4
    assert max(len(state.strip()) for state in states) <= 60
