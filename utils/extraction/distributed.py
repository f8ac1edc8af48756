"""The ranks of one run of stage 2: processes that torchrun started, on one machine or several with one file system.

They meet in a gloo process group of `torch.distributed`, which works on every machine, and exchange little: what rank 0
found out, for all, and what each found out, for rank 0. Where a rank ends, its connections close, and the others learn
of it when they next exchange something.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from typing import Any, TypeVar

from utils.files import InputError

Value = TypeVar("Value")

# What torchrun, or another launcher, tells each process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank may wait for the slowest one's share of the windows, or for rank 0 to tokenise a large text.
TIMEOUT = timedelta(days=1)
# From when on a rank says that it waits for the others to start.
NOTICE_S = 5


class AnotherRankFailed(Exception):
    """Rank 0 has failed and printed why, so there is nothing more to say."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run as one of them sees them; a process by itself is rank 0 of 1."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0  # its number among the ranks of its machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def refuse_flags(self, flags: dict[str, bool]) -> None:
        """Raise InputError where one of these flags, by name, is given to several ranks."""
        for flag, is_given in flags.items():
            if is_given and self.n_ranks > 1:
                raise InputError(f"{flag}: torchrun shares the windows out itself; give the flag without torchrun")

    def broadcast(self, find: Callable[[], Value]) -> Value:
        """What `find` returns on rank 0, for all ranks; the others do not call it.

        Where it raises InputError, the other ranks raise AnotherRankFailed.
        """
        if self.n_ranks == 1:
            return find()
        sent: list[Any] = [None, None]
        if not self.is_first:
            self._exchange(lambda dist: dist.broadcast_object_list(sent, src=0))
            if not sent[0]:
                raise AnotherRankFailed
            return sent[1]
        try:
            sent = [True, find()]
        except InputError:
            self._exchange(lambda dist: dist.broadcast_object_list([False, None], src=0))
            raise
        self._exchange(lambda dist: dist.broadcast_object_list(sent, src=0))
        return sent[1]

    def gather(self, found: Value) -> list[Value]:
        """What every rank found, in their order, for rank 0; empty for the others."""
        if self.n_ranks == 1:
            return [found]
        gathered: list[Any] | None = [None] * self.n_ranks if self.is_first else None
        self._exchange(lambda dist: dist.gather_object(found, gathered, dst=0))
        return gathered or []

    def _exchange(self, exchange: Callable[[Any], object]) -> None:
        import torch.distributed as dist

        try:
            _interruptible(lambda: exchange(dist))
        except RuntimeError as error:
            message = f"rank {self.rank}: another rank has ended ({_reason(error)})"
            raise InputError(f"{message}; see what it printed and run again, it goes on from here") from error

    def device(self, name: str) -> str:
        """The torch device of this rank: the GPU of its number where all are given `auto` or `cuda`.

        Raises InputError where this machine has fewer GPUs than ranks.
        """
        import torch

        if self.n_ranks == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local_rank >= (n_devices := torch.cuda.device_count()):
            got = f"rank {self.local_rank} of this machine has no GPU of its own, there are {n_devices}"
            raise InputError(f"--nproc_per_node: {got}; start at most that many processes, or give a --device")
        return f"cuda:{self.local_rank}"

    @contextmanager
    def quiet_but_first(self) -> Iterator[None]:
        """Let rank 0 alone print what all ranks would print alike, such as that a flag is wrong."""
        if self.is_first:
            yield
            return
        with redirect_stderr(StringIO()):
            try:
                yield
            except InputError as error:
                raise AnotherRankFailed from error


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process among the ranks that a launcher started, or by itself where none did; the group ends with the block.

    While others are missing it says so on stderr. Raises InputError where the launcher's variables are wrong or the
    ranks cannot meet.
    """
    ranks = _ranks_of_environment()
    if ranks.n_ranks == 1:
        yield ranks
        return
    import torch.distributed as dist

    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    notice = f"rank {ranks.rank}: waiting at {address} for all {ranks.n_ranks} ranks to start"
    try:
        _interruptible(lambda: dist.init_process_group("gloo", timeout=TIMEOUT), notice)
    except (RuntimeError, ValueError, OSError) as error:
        message = f"{address}: rank {ranks.rank} cannot meet the others there ({_reason(error)})"
        raise InputError(f"{message}; check --nnodes, --rdzv_endpoint and the network") from error
    try:
        yield ranks
    except AnotherRankFailed:
        sys.exit(2)
    finally:
        dist.destroy_process_group()


def _ranks_of_environment() -> Ranks:
    if not all(os.environ.get(name) for name in VARIABLES):
        return Ranks()
    try:
        return Ranks(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE: expected whole numbers ({error}); start with torchrun") from error


def _reason(error: Exception) -> str:
    """The first line of an error of torch's, without the place in gloo's sources and gloo's advice to developers."""
    return re.sub(r"^\[\S+\] |\. This is typically caused by .*", "", str(error).splitlines()[0])


def _interruptible(work: Callable[[], object], notice: str | None = None) -> None:
    """Do `work`, which blocks outside of Python, in a thread, so that this one can be interrupted meanwhile.

    notice: printed on stderr where it takes longer than NOTICE_S.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if notice:
        thread.join(NOTICE_S)
        if thread.is_alive():
            print(notice, file=sys.stderr, flush=True)
    thread.join()
    if errors:
        raise errors[0]
