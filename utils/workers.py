"""Worker processes: one kind of work on many tasks, shared out over the cores, with little in memory at a time."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from types import ModuleType
from typing import Any, TypeVar

from utils.files import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
Item = TypeVar("Item")

# Workers are not forked from this process, which may have threads, but from a server without any.
_CONTEXT = get_context("forkserver")
# What the start of workers takes, in seconds (benchmarks/build.py): each has to have as much to do, or none is started.
START_S = 0.4
# Tasks handed out per worker: one at work, one that waits for it, so that no worker waits for the parent.
TASKS_AHEAD = 2
_INTERRUPTS = {signal.SIGINT, signal.SIGTERM}


def n_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_workers_for(seconds: float, max_workers: int | None = None) -> int:
    """How many processes pay for work that takes one of them so long: at most `max_workers`, at most one per core."""
    return max(min(int(seconds / START_S), n_cores(), max_workers or n_cores()), 1)


def pack(sizes: Mapping[Item, int], max_size: int, max_items: int) -> list[list[Item]]:
    """Group items, the largest first, into tasks of at most `max_size` together, or one item, and `max_items`."""
    tasks: list[list[Item]] = []
    total = 0
    for item, size in sorted(sizes.items(), key=lambda entry: -entry[1]):
        if not tasks or total + size > max_size or len(tasks[-1]) == max_items:
            tasks.append([])
            total = 0
        tasks[-1].append(item)
        total += size
    return tasks


def in_processes(
    prepare: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    n_workers: int,
    *,
    where: str,
    in_order: bool = False,
) -> Iterator[Result]:
    """Yield the results of some tasks, done by `n_workers` processes; by this process itself where that is 1.

    prepare: called once in each process, returns the function that does a task; pickled, like tasks and results.
    in_order: yield results in the order of the tasks instead of as they end. At most `TASKS_AHEAD` tasks per worker are
    handed out at a time. Raises what a task raises, and InputError, which begins with `where`, if a worker was killed.
    """
    n_workers = min(n_workers, len(tasks))
    if n_workers <= 1:
        if tasks:
            yield from map(prepare(), tasks)
        return
    # Has an effect before the first worker starts: what the server has imported, its workers need not.
    _CONTEXT.set_forkserver_preload([__name__, getattr(prepare, "func", prepare).__module__])
    waiting = deque(tasks)
    pending: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(n_workers, _CONTEXT, _start_worker, (prepare,)) as pool:

        def submit(n_tasks: int) -> None:
            with _interrupts_held(), _main_hidden():  # submitting a task may start a process
                pending.extend(pool.submit(_do_task, waiting.popleft()) for _ in range(min(n_tasks, len(waiting))))

        try:
            submit(TASKS_AHEAD * n_workers)
            while pending:
                done = pending[0] if in_order else next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
                pending.remove(done)
                result = done.result()
                submit(1)
                yield result
        except BrokenProcessPool as error:
            message = f"{where}: a worker process was killed, perhaps for lack of memory"
            raise InputError(f"{message}; run again with fewer --max_workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C and SIGTERM waiting while processes start; these inherit the mask, and leave Ctrl-C to the parent.

    A worker that is not yet known to its pool when that closes would end with a traceback. The mask alone does not
    hold a signal: another thread, such as tqdm's, may take it, and Python then calls the handler in the main thread.
    """
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # handlers are set and called in no other
        handlers = {number: signal.signal(number, lambda got, _: came.append(got)) for number in _INTERRUPTS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep processes that start from running the main script, of which they need nothing.

    It may have no `if __name__ == "__main__":`, and then would start processes in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_work: Callable[[Any], Any] | None = None  # of a worker process


def _start_worker(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # by which a pool ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _work = prepare()


def _exit_with_parent() -> None:
    # A worker that outlived its killed parent would write beside the next run.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do_task(task: Any) -> Any:
    assert _work is not None
    return _work(task)
