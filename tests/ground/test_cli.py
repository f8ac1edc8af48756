"""Command lines: what a flag takes, how a wrong one is answered, and how a script ends."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from conftest import ROOT, STAGES

from utils.cli import COSINE, NON_NEGATIVE_INT, POSITIVE_INT, Parser, Range, StageParser, boolean, file_name

INF = float("inf")
NUMBERS = ["-inf", "-1e300", "-2", "-1.5", "-1", "-0.5", "0", "1e-9", "0.5", "1", "1.5", "2", "256", "1e300", "inf"]


@pytest.mark.parametrize(
    ("bounds", "belongs", "words"),
    [
        ({"least": -1}, lambda x: -1 <= x < INF, "a number of at least -1"),
        ({"above": -1}, lambda x: -1 < x < INF, "a number above -1"),
        ({"least": 0, "most": 1}, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
        ({"least": 0, "below": 1}, lambda x: 0 <= x < 1, "a number in [0, 1)"),
        ({"above": 0, "most": 1}, lambda x: 0 < x <= 1, "a number in (0, 1]"),
        ({"above": 0, "below": 1}, lambda x: 0 < x < 1, "a number in (0, 1)"),
        ({"least": -1.5, "most": 2}, lambda x: -1.5 <= x <= 2, "a number in [-1.5, 2]"),
    ],
)
def test_a_range_takes_the_numbers_between_its_bounds(
    bounds: dict[str, float], belongs: Callable[[float], bool], words: str
) -> None:
    flag = Range(float, **bounds)
    for text in NUMBERS:
        value = float(text)
        if belongs(value):
            assert flag(text) == value
        else:
            with pytest.raises(argparse.ArgumentTypeError) as refused:
                flag(text)
            assert str(refused.value) == f"got {text!r}, expected {words}"


@pytest.mark.parametrize(
    ("flag", "belongs", "words"),
    [
        (POSITIVE_INT, lambda n: n >= 1, "a whole number of at least 1"),
        (NON_NEGATIVE_INT, lambda n: n >= 0, "a whole number of at least 0"),
        (Range(int, least=1, most=256), lambda n: 1 <= n <= 256, "a whole number in [1, 256]"),
        (Range(int, above=1), lambda n: n > 1, "a whole number above 1"),
    ],
)
def test_a_range_of_whole_numbers_takes_no_others(flag: Range, belongs: Callable[[int], bool], words: str) -> None:
    for number in (-1, 0, 1, 2, 256, 257, 10**400):
        if belongs(number):
            assert flag(str(number)) == number
            assert isinstance(flag(str(number)), int)
        else:
            with pytest.raises(argparse.ArgumentTypeError, match=f"^got '{number}', expected "):
                flag(str(number))
    for text in ("1.0", "1e2", "two", "", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            flag(text)
        assert str(refused.value) == f"got {text!r}, expected {words}"


@pytest.mark.parametrize("text", ["nan", "-nan", "NaN", "inf", "-inf", "1e999", "x", "", "0,5", "0x1"])
def test_what_is_no_finite_number_is_in_no_range(text: str) -> None:
    for flag in (COSINE, Range(float, least=0), Range(float, above=0), Range(float, least=0, below=1), Range(float)):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^got {text!r}, expected a number"):
            flag(text)


def test_a_cosine_is_between_minus_one_and_one() -> None:
    assert (COSINE("-1"), COSINE("0.3"), COSINE("1")) == (-1, 0.3, 1)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^got '1\.01', expected a number in \[-1, 1\]"):
        COSINE("1.01")


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (boolean, "True", True),
        (boolean, "false", False),
        (boolean, "1", "True or False"),
        (boolean, "", "True or False"),
        (file_name, "train", "train"),
        (file_name, "..a", "..a"),
        *((file_name, text, "a name without a slash") for text in ("", ".", "..", "a/b", "/a")),
    ],
)
def test_words_of_flags(kind: Callable[[str], Any], text: str, expected: object) -> None:
    if isinstance(expected, bool) or expected == text:
        assert kind(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^got {text!r}, expected {expected}"):
            kind(text)


def test_a_wrong_flag_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("Does something.")
    parser.add_argument("--share", type=Range(float, least=0, below=1), default=0.5, help="of all")
    for flags, message in (
        (["--share", "1"], "argument --share: got '1', expected a number in [0, 1)"),
        (["--sha", "0"], "unrecognized arguments: --sha 0"),  # never guessed
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(flags)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"{parser.prog}: error: {message} (see --help)\n"
    assert parser.parse_args([]).share == 0.5


def test_help_names_defaults_once_and_quiet_and_verbose_last(capsys: pytest.CaptureFixture[str]) -> None:
    parser = StageParser("Does\n  something.")
    parser.add_argument("--share", type=float, default=0.5, help="of all")
    parser.add_argument("--size", type=int, default=3, help="of one (default: three)")
    parser.add_argument("--all", action="store_true", help="of them")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "Does\n  something." in shown
    assert "of all (default: 0.5)" in shown
    assert "of one (default: three)\n" in shown
    assert "of them\n" in shown
    assert shown.index("--all") < shown.index("--quiet") < shown.index("--verbose")


# ---- How a script ends


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("pass", 0, []),
        ("raise InputError('a.json: is\\nempty')", 2, ["-c: error: a.json: is empty"]),
        ("raise KeyboardInterrupt", 130, ["-c: interrupted; run the same command again and it goes on from here"]),
        (
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
            143,
            ["-c: terminated; run the same command again and it goes on from here"],
        ),
    ],
)
def test_an_end_that_a_user_can_act_on_is_one_line(body: str, status: int, said: list[str]) -> None:
    done = run_as_script(body)
    assert (done.returncode, done.stderr.splitlines()) == (status, said)


def test_of_a_path_that_is_too_long_the_longest_part_is_named() -> None:
    done = run_as_script("open('/' + 'x' * 300 + '/a.json')")
    said = f"-c: error: {'x' * 60}…: is too long for the name of a file; give a shorter name or label\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_bug_keeps_its_traceback() -> None:
    done = run_as_script("1 / 0")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_bar_that_an_error_left_open_is_closed_before_the_message() -> None:
    done = run_as_script("bar = ProgressBar(total=9, desc='reading', unit='item'); raise InputError('a: is empty')")
    assert done.stderr.splitlines()[-1] == "-c: error: a: is empty"
    assert "reading" in done.stderr.splitlines()[-2]


def test_a_second_signal_ends_at_once_without_a_traceback() -> None:
    # It is held where it closes the bars, just before its last line.
    held = "utils.cli.close_bars = lambda: (os.write(1, b'!'), time.sleep(600)); raise KeyboardInterrupt"
    with start_as_script(held) as script:
        assert script.stdout is not None
        assert script.stdout.read(1) == "!"
        script.send_signal(signal.SIGTERM)
        assert script.communicate() == ("", "")
        assert script.returncode == -signal.SIGTERM


# ---- Where it prints to


ASCII = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


@pytest.mark.parametrize("variables", ASCII, ids=["PYTHONIOENCODING", "LC_ALL"])
def test_what_a_terminal_cannot_show_is_escaped(variables: dict[str, str]) -> None:
    body = r"print('\u03b3 \u27e6\xe9\u27e7'); raise InputError('\u03b8.json: is empty')"
    done = run_as_script(body, variables)
    assert (done.returncode, done.stdout) == (2, "\\u03b3 \\u27e6\\xe9\\u27e7\n")
    assert done.stderr == "-c: error: \\u03b8.json: is empty\n"


@pytest.mark.parametrize("script", STAGES)
def test_help_is_shown_on_any_terminal_from_any_folder(script: str, tmp_path: Path) -> None:
    """Without docstrings, and without the script's folder on the path, too."""
    command = [sys.executable, "-OO", "-P", str(ROOT / script), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, env=os.environ | ASCII[0], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: {script} ")
    assert ("\\u03b3 in [0, 1)" in shown.stdout) == ("--tok_prob_threshold" in shown.stdout)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("raise InputError('a: is empty')", 2)])
def test_closed_streams_change_neither_status_nor_files(closed: str, end: str, status: int, tmp_path: Path) -> None:
    """As under cron: a file that is opened later gets none of what is printed, here or by another process."""
    path = tmp_path / "a.json"
    prints = "import os; os.write(1, b'raw'); os.write(2, b'raw')"
    body = (
        f"file = open({str(path)!r}, 'w'); print('result'); print('said', file=sys.stderr); sys.stdin.read(); {prints}; "
        f"subprocess.run([sys.executable, '-c', {prints!r}], check=True, close_fds=False); file.write('[]'); {end}"
    )
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", program_of(body)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert path.read_text() == "[]"
    shown = {">&-": (True, False), "2>&-": (False, True)}.get(closed, (False, False))
    assert ("said" in done.stderr, "result" in done.stdout) == shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_closes_the_pipe_ends_a_script_quietly(unbuffered: str) -> None:
    with start_as_script("for i in range(10**6): print(i)", {"PYTHONUNBUFFERED": unbuffered}) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "0\n"
        script.stdout.close()
        assert script.stderr is not None
        assert script.stderr.read() == ""
    assert script.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("raise InputError('a: is empty')", 2),
        ("print('said', file=sys.stderr, flush=True)", 128 + signal.SIGPIPE),
        ("print('result')", 128 + signal.SIGPIPE),
    ],
)
def test_a_script_that_nobody_reads_has_its_status(body: str, status: int, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-c", program_of(body)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=writing, stderr=writing)
    finally:
        os.close(writing)
    assert done.returncode == status


def start_as_script(body: str, variables: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program_of(body)],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def program_of(body: str) -> str:
    imports = "import os, signal, subprocess, sys, time, utils.cli\nfrom utils.cli import run_script\n"
    imports += "from utils.files import InputError\nfrom utils.progress import ProgressBar\n"
    return f"{imports}def main():\n    {body}\nrun_script(main)"


def run_as_script(body: str, variables: Mapping[str, str] = MappingProxyType({})) -> "subprocess.CompletedProcess[str]":
    with start_as_script(body, variables) as script:
        out, err = script.communicate()
    return subprocess.CompletedProcess(script.args, script.returncode, out, err)
