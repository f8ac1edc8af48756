"""Whatever ends a stage, started again it leaves the bytes of an undisturbed run. benchmarks/kills.py does it at length."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults.crashes import Crash, Ended, Stage, build_stages, count_operations, difference

NAMES = (
    "1 preprocess",
    "2 extract",
    "2 extract, discard",
    "2 extract, 2 shards, merge",
    "3 tries",
    "4 vectors",
    "4 vectors, 2 workers",
    "3 tries, 2 workers",
    "5 flatten, generate",
    "5 flatten, 2 workers",
    "5 generate, verify",
    "5 fit, perplexity",
)
WITH_WORKERS = [name for name in NAMES if name.endswith("workers")]


@pytest.fixture(scope="module")
def stages(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    found = {stage.name: stage for stage in build_stages(gpt2_folder, tmp_path_factory.mktemp("stages"))}
    assert set(found) == set(NAMES)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_killed_between_and_within_writes_it_goes_on_to_the_same_bytes(
    stages: dict[str, Stage], tmp_path: Path, name: str
) -> None:
    stage = stages[name]
    wanted = stage.undisturbed(tmp_path)
    with stage.copy(tmp_path) as folder:
        n = count_operations(lambda: stage.run(folder), folder)
    assert n >= 7
    crashes = [
        Crash(at_operation=n // 2),
        Crash(at_operation=n // 4),
        Crash(within_bytes=700),
        Crash(at_operation=3),
    ]
    found, ends = stage.crashed_and_run_again(tmp_path, crashes)
    assert [end.status for end in ends[:2]] == [-signal.SIGKILL, -signal.SIGKILL], [end.stderr for end in ends]
    # Worker processes meet the bound as a full disk does.
    assert ends[2].status in (0, -signal.SIGXFSZ, 2 if stage.n_workers > 1 else 0), ends[2].stderr
    assert ends[3].status in (0, -signal.SIGKILL), ends[3].stderr
    assert not difference(found, wanted)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_a_killed_worker_ends_the_stage_in_one_line_and_costs_little(
    stages: dict[str, Stage], tmp_path: Path, name: str
) -> None:
    stage = stages[name]
    found, (end,) = stage.crashed_and_run_again(tmp_path, [Crash(at_operation=0, of_workers=True)])
    assert end.status == 2
    assert "struck before" in end.stderr
    assert "a worker process was killed" in end.last_line
    assert not difference(found, stage.undisturbed(tmp_path))


SIGNALS = pytest.mark.parametrize(
    ("by", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)


def require_one_line(end: Ended, status: int, word: str) -> None:
    assert end.status == status, end.stderr
    assert end.last_line.endswith(f": {word}; run the same command again and it goes on from here"), end.stderr
    assert "Traceback" not in end.stderr


@SIGNALS
@pytest.mark.parametrize("name", ["1 preprocess", "2 extract", "3 tries", "5 generate, verify"])
def test_ctrl_c_and_sigterm_end_in_one_line_and_the_next_run_goes_on(
    stages: dict[str, Stage], tmp_path: Path, name: str, by: int, status: int, word: str
) -> None:
    stage = stages[name]
    with stage.copy(tmp_path) as folder:
        n = count_operations(lambda: stage.run(folder), folder)
    found, (end,) = stage.crashed_and_run_again(tmp_path, [Crash(at_operation=n // 2, by=by)])
    require_one_line(end, status, word)
    assert not difference(found, stage.undisturbed(tmp_path))


@SIGNALS
@pytest.mark.parametrize("name", WITH_WORKERS)
@pytest.mark.parametrize(
    "crash", [Crash(at_event="socket.connect"), Crash(at_operation=1, of_workers=True)], ids=["starting", "at work"]
)
def test_signals_end_a_run_in_one_line_while_its_workers_start_and_work(
    stages: dict[str, Stage], tmp_path: Path, crash: Crash, name: str, by: int, status: int, word: str
) -> None:
    # A process is started through the socket of the server that forks it.
    stage = stages[name]
    found, (end,) = stage.crashed_and_run_again(tmp_path, [replace(crash, by=by)])
    require_one_line(end, status, word)
    assert not difference(found, stage.undisturbed(tmp_path))


@pytest.mark.parametrize("name", ["1 preprocess", "2 extract", "3 tries", "4 vectors", "5 flatten, generate"])
def test_a_full_disk_is_named_in_one_line_and_the_next_run_goes_on(
    stages: dict[str, Stage], tmp_path: Path, name: str
) -> None:
    stage = stages[name]
    found, (end,) = stage.crashed_and_run_again(tmp_path, [Crash(within_bytes=300, disk_full=True)])
    assert end.status == 2, end.stderr
    assert "cannot be written" in end.last_line
    assert "Traceback" not in end.stderr
    assert not difference(found, stage.undisturbed(tmp_path))
