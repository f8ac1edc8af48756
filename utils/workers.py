"""Worker processes: the same work on many tasks, shared out over the cores, with little in memory at a time.

Workers are forked from a server that has loaded what the script itself has, never torch where it does not: such a
worker starts in milliseconds and takes few megabytes.
"""

import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process
from types import ModuleType
from typing import Any, TypeVar

from utils.files import InputError, n_cores

# Workers are not forked from this process: it may have threads.
_CONTEXT = get_context("forkserver")
Task = TypeVar("Task")
Result = TypeVar("Result")

# Seconds in which the server of worker processes starts. Until then this process works alone, which may be enough.
START_S = 0.3
# Tasks handed out per process: one at work, one that waits for it, so that no process waits for the parent.
TASKS_AHEAD = 2


def n_workers_for(max_workers: int | None) -> int:
    """How many processes to use: never more than there are cores."""
    return min(max_workers or n_cores(), n_cores())


def in_processes(
    prepare: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    max_workers: int,
    *,
    where: str,
    in_order: bool = False,
) -> Iterator[Result]:
    """Yield the results of some tasks, done by at most `max_workers` processes; by this one alone where there is little to do.

    tasks: the largest first, where they differ; prepare: called once in each process, gives the function that does a
    task; pickled, like tasks and results; in_order: results come in the order of the tasks, else as they end. At most
    `TASKS_AHEAD` tasks per process are handed out at a time. An error of a task is raised here; InputError, which begins
    with `where`, if a process died.
    """
    waiting = deque(tasks)
    if not waiting:
        return
    n_workers = min(max_workers, len(waiting))
    alone_until = math.inf if n_workers == 1 else start_server(getattr(prepare, "func", prepare).__module__)
    if time.monotonic() < alone_until:
        work = prepare()
        # Small ones first, so that it is soon done with what it has begun.
        take = waiting.popleft if in_order or n_workers == 1 else waiting.pop
        while waiting and time.monotonic() < alone_until:
            yield work(take())
        del work
    if not waiting:
        return
    n_workers = min(n_workers, len(waiting))
    with ProcessPoolExecutor(n_workers, _CONTEXT, _start_worker, (prepare,)) as pool:
        under_way: deque[Future[Result]] = deque()

        def hand_out(n_tasks: int) -> None:
            under_way.extend(pool.submit(_work_on, waiting.popleft()) for _ in range(min(n_tasks, len(waiting))))

        try:
            with _without_main(), _interrupted_afterwards():
                hand_out(TASKS_AHEAD * n_workers)
            while under_way:
                done = under_way[0] if in_order else next(iter(wait(under_way, return_when=FIRST_COMPLETED).done))
                under_way.remove(done)
                result = done.result()
                hand_out(1)
                yield result
        except BrokenProcessPool as error:
            message = f"{where}: a worker process was ended from outside, for lack of memory perhaps"
            raise InputError(f"{message}; run again with fewer --max_workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


_server_ready_at = math.inf  # on time.monotonic's clock


def start_server(module: str) -> float:
    """Have the server of worker processes start, if it has not yet, and load the module that their work is in.

    Returns when it is likely to be ready, on `time.monotonic`'s clock. Called early, it starts while this process does
    what it has to do first.
    """
    global _server_ready_at
    if _server_ready_at == math.inf:
        _CONTEXT.set_forkserver_preload([__name__, module])
        # It answers Ctrl-C with a traceback until it has started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with _without_main():
            forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _server_ready_at = time.monotonic() + START_S
    return _server_ready_at


@contextmanager
def _without_main() -> Iterator[None]:
    """While processes start: spare them the imports of the script, of which they need nothing; eval.py's are torch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM for the end of the block: a worker whose pool goes while it starts dies with a traceback."""
    if threading.current_thread() is not threading.main_thread():  # which signals never reach
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda got, _: came.append(got))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


_work: Callable[[Any], Any] | None = None  # of a worker process


def _start_worker(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = prepare()


def _end_with_parent() -> None:
    # A worker that outlived its killed parent would write beside the run that goes on.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_on(task: Any) -> Any:
    assert _work is not None
    return _work(task)
