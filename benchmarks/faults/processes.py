"""Ways to run a stage so that it dies: killed at a chosen file, or on a disk that is full."""

import os
import resource
import signal
import sys
from collections.abc import Callable

from utils.files import InputError


def use_one_thread_in_forks() -> None:
    """Here too: a fork of a process whose torch has started threads may hang. And a fork makes its own anew, which
    fails where two of its threads are the first to ask for them."""
    import torch

    torch.set_num_threads(1)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def in_child(run: Callable[[], object]) -> tuple[int, str]:
    """Run in a fork of this process, which may then spoil what it likes.

    Returns the signal that ended it or 0, and the message of the InputError it ended with or "".
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (ends with the process)
        try:
            run()
        except InputError as error:
            os.write(write_end, str(error).encode())
            os._exit(2)
        except BaseException as error:
            os.write(write_end, repr(error).encode())
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        message = pipe.read().decode()
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), message


def die_before_rename(n_renames: int) -> None:
    """Let this process be killed when it is about to rename its file number n_renames (from 0)."""
    rename, done = os.replace, 0

    def replace(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        nonlocal done
        if done == n_renames:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        rename(source, target)

    os.replace = replace  # type: ignore[assignment]


def killed_before_rename(n_renames: int, run: Callable[[], object]) -> bool:
    """Run in a child that is killed when it is about to rename its file number n_renames (from 0); False: it ended."""

    def run_and_die() -> None:
        die_before_rename(n_renames)
        run()

    killed_by, message = in_child(run_and_die)
    assert killed_by in (0, signal.SIGKILL)
    assert not message, message
    return killed_by == signal.SIGKILL


def on_full_disk(n_bytes: int, run: Callable[[], object]) -> str:
    """The refusal of a run that can write no file longer than n_bytes."""

    def run_limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        run()

    killed_by, message = in_child(run_limited)
    assert killed_by == 0
    return message
