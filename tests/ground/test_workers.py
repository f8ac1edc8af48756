"""Sharing work out over processes: who does it, in what order results come, and what an error does."""

import math
import os
import time
from functools import partial

import pytest

from utils import workers
from utils.files import InputError
from utils.workers import in_processes

HERE = "/some/folder"


def do(task: int) -> tuple[int, int]:
    """The task and who did it; negative ones end badly."""
    if task == -1:
        raise InputError(f"{HERE}: task {task}")
    if task == -2:
        os._exit(1)
    time.sleep(0.001 * (task % 3))
    return task, os.getpid()


def run(tasks: list[int], max_workers: int, in_order: bool = False) -> list[tuple[int, int]]:
    return list(in_processes(partial(partial, do), tasks, max_workers, where=HERE, in_order=in_order))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 50])
@pytest.mark.parametrize("max_workers", [1, 3])
def test_every_task_is_done_once_and_in_order_where_asked(max_workers: int, n_tasks: int, in_order: bool) -> None:
    found = [task for task, _ in run(list(range(n_tasks)), max_workers, in_order)]
    assert sorted(found) == list(range(n_tasks))
    assert found == sorted(found) or not in_order


def test_work_goes_to_others_where_there_are_several_tasks_and_processes() -> None:
    assert {who for _, who in run(list(range(20)), 1)} == {os.getpid()}
    assert {who for _, who in run([5], 3)} == {os.getpid()}
    assert os.getpid() not in {who for _, who in run(list(range(20)), 2)}


def test_until_the_others_have_started_this_process_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_server_ready_at", math.inf)
    monkeypatch.setattr(workers, "START_S", 0.1)
    found = run([2] * 200, 2)  # 2 ms each
    n_alone = sum(who == os.getpid() for _, who in found)
    assert 1 <= n_alone < 200
    assert found[n_alone - 1][1] == os.getpid() != found[n_alone][1]


@pytest.mark.parametrize("max_workers", [1, 2])
def test_an_error_is_raised_here(max_workers: int) -> None:
    with pytest.raises(InputError, match="task -1"):
        run([1, 2, -1, 3], max_workers)


def test_a_process_that_dies_is_told_of() -> None:
    with pytest.raises(InputError, match=f"{HERE}: a worker process was ended from outside"):
        run([1, -2, 3, 4], 2)
