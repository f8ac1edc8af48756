"""Sharing work out over processes: how many, who does it, in what order results come, and what an error does."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from utils import workers
from utils.files import InputError
from utils.workers import TASKS_AHEAD, in_processes, n_cores, n_workers_for, pack

# Not conftest's: worker processes import this module for `do`, and should not import torch for it.
ROOT = Path(__file__).resolve().parents[2]
HERE = "/some/folder"


# ---- How the work is cut


@pytest.mark.parametrize(
    ("seconds", "max_workers", "expected"),
    [
        (0, None, 1),
        (0.39, None, 1),
        (0.79, None, 1),
        (0.81, None, 2),
        (1e9, None, 8),
        (1e9, 3, 3),
        (1e9, 100, 8),
        (1e9, 1, 1),
    ],
)
def test_processes_are_as_many_as_have_the_cost_of_their_start_to_do(
    seconds: float, max_workers: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "START_S", 0.4)
    monkeypatch.setattr(workers, "n_cores", lambda: 8)
    assert n_workers_for(seconds, max_workers) == expected


def test_cores_are_those_that_this_process_may_run_on() -> None:
    asks = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from utils.workers import *; print(n_cores())"
    done = subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert n_cores() == len(os.sched_getaffinity(0))


def test_tasks_hold_every_item_once_within_both_bounds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randrange(30) for _ in range(rng.randrange(20))]
        max_size, max_items = rng.randint(1, 40), rng.randint(1, 5)
        tasks = pack(dict(enumerate(sizes)), max_size, max_items)
        items = [item for task in tasks for item in task]
        assert sorted(items) == list(range(len(sizes)))
        assert [sizes[item] for item in items] == sorted(sizes, reverse=True)
        totals = [sum(sizes[item] for item in task) for task in tasks]
        for task, total in zip(tasks, totals, strict=True):
            assert len(task) == 1 or (total <= max_size and len(task) <= max_items)
        for task, total, after in zip(tasks, totals, tasks[1:], strict=False):
            # It is full: not even the next item would have gone in.
            assert total + sizes[after[0]] > max_size or len(task) == max_items


# ---- Who does it


def do(task: int) -> tuple[int, int]:
    """The task and who did it; negative ones end badly."""
    if task == -1:
        raise InputError(f"{HERE}: task {task}")
    if task == -2:
        os._exit(1)
    time.sleep(0.001 * (task % 3))
    return task, os.getpid()


def run(tasks: list[int], n_workers: int, in_order: bool = False) -> list[tuple[int, int]]:
    return list(in_processes(partial(partial, do), tasks, n_workers, where=HERE, in_order=in_order))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 50])
@pytest.mark.parametrize("n_workers", [1, 3])
def test_every_task_is_done_once_and_in_order_where_asked(n_workers: int, n_tasks: int, in_order: bool) -> None:
    found = [task for task, _ in run(list(range(n_tasks)), n_workers, in_order)]
    assert sorted(found) == list(range(n_tasks))
    assert found == sorted(found) or not in_order


def test_work_goes_to_others_where_there_are_several_tasks_and_processes() -> None:
    assert {who for _, who in run(list(range(20)), 1)} == {os.getpid()}
    assert {who for _, who in run([5], 3)} == {os.getpid()}
    assert os.getpid() not in {who for _, who in run(list(range(20)), 2)}


@pytest.mark.parametrize("n_workers", [1, 2])
def test_few_tasks_are_done_before_their_results_are_taken(n_workers: int, tmp_path: Path) -> None:
    names = [str(tmp_path / str(n)) for n in range(100)]
    results: Iterator[None] = in_processes(partial(partial, os.mkdir), names, n_workers, where=HERE)
    next(results)
    results.close()  # type: ignore[attr-defined]
    # Those handed out at first, and one more with the result that was taken.
    assert 1 <= len(list(tmp_path.iterdir())) <= (1 if n_workers == 1 else TASKS_AHEAD * n_workers + 1)


# ---- Ends


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_is_raised_here(n_workers: int) -> None:
    with pytest.raises(InputError, match="task -1"):
        run([1, 2, -1, 3], n_workers)


def test_a_process_that_dies_is_told_of() -> None:
    with pytest.raises(InputError, match=f"{HERE}: a worker process was killed"):
        run([1, -2, 3, 4], 2)


# A task that notes who does it, and then lasts until there is a file `go`.
TASK = "import os, time\nopen(f'worker {os.getpid()}', 'w')\nwhile not os.path.exists('go'): time.sleep(0.01)"
IDLE = "import os\nopen(f'worker {os.getpid()}', 'w')"


@pytest.fixture
def script(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A script in a session of its own, with two workers at work in the folder tmp_path and one that has nothing left."""
    program = (
        "from functools import partial; from utils.cli import run_script; from utils.workers import in_processes\n"
    )
    program += f"run_script(lambda: list(in_processes(partial(partial, exec), [{TASK!r}, {TASK!r}, {IDLE!r}], 3, where='here')))"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_until(lambda: len(list(tmp_path.glob("worker *"))) == 3)
        yield process
        (tmp_path / "go").touch()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Returns once it is so; a minute is more than any test needs."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_end_with_a_parent_that_is_killed(script: subprocess.Popen[str], tmp_path: Path) -> None:
    pids = [path.name.split()[1] for path in tmp_path.glob("worker *")]
    assert all(Path("/proc", pid).exists() for pid in pids)
    script.kill()
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in pids))


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_to_the_script_ends_all_with_one_line(
    number: signal.Signals, status: int, word: str, script: subprocess.Popen[str], tmp_path: Path
) -> None:
    # As the terminal does for Ctrl-C, and as schedulers may do.
    os.killpg(script.pid, number) if number == signal.SIGINT else script.send_signal(number)
    (tmp_path / "go").touch()
    _, said = script.communicate()
    assert said.splitlines() == [f"-c: {word}; run the same command again and it goes on from here"]
    assert script.returncode == status
