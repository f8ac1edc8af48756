"""Ranks: the processes of one run that torchrun started on one machine or several, and what they tell each other.

They share a file system and talk through torch's key-value store alone, the one that its process groups meet in too:
a value that the first rank found, what each found for the first, how far all are, that one failed, and that each is
still there. So nothing waits for a rank that has gone, also where no launcher ends the others: every wait, and every
batch, looks whether another has failed or fallen silent.
"""

import os
import pickle
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING, TypeVar

from utils.files import InputError

if TYPE_CHECKING:
    from torch.distributed import Store

Value = TypeVar("Value")

POLL_S = 0.1
# What torchrun, or another launcher, says to each process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a rank that ends waits for the others to notice, before the store that it may hold is gone.
FAREWELL_S = 10
# How often a rank shows that it is still there, and how long it may keep silent.
BEAT_S, SILENCE_S = 5, 120
# Nothing is waited for in the store itself, only looked for; so this bounds one look.
STORE_TIMEOUT = timedelta(minutes=5)


class AnotherFailed(Exception):
    """Another rank has failed, and has said why."""


class Ranks:
    """The ranks of a run as one of them sees them; a process by itself is the first and only one."""

    def __init__(self, rank: int = 0, n_ranks: int = 1, local_rank: int = 0, store: "Store | None" = None) -> None:
        self.rank, self.n_ranks, self.local_rank, self._store = rank, n_ranks, local_rank, store
        self._counts: Counter[str] = Counter()
        self._beats: dict[int, tuple[int, float]] = {}  # of other ranks: the last one and when it was first seen
        self._listen_at = 0.0
        self._has_left = threading.Event()
        if store is not None:
            threading.Thread(target=self._beat, daemon=True).start()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def require_alone(self, flags: dict[str, bool]) -> None:
        """Raise InputError where one of these flags is given to ranks."""
        for flag, is_given in flags.items():
            if is_given and self.n_ranks > 1:
                raise InputError(f"{flag}: torchrun shares the windows out itself; give the flag without torchrun")

    def share(self, name: str, find: Callable[[], Value]) -> Value:
        """What the first rank finds, for all; each name is used once."""
        if self._store is None:
            return find()
        if self.is_first:
            found = find()
            self._store.set(name, pickle.dumps(found))  # type: ignore[arg-type]
            return found
        value: Value = pickle.loads(self._get(name, lambda: None))
        return value

    def gather(self, name: str, found: Value, meanwhile: Callable[[], object] = lambda: None) -> list[Value]:
        """What every rank found, in their order, for the first; empty for the others. meanwhile: called while waiting."""
        if self._store is None:
            return [found]
        self._store.set(f"{name}/{self.rank}", pickle.dumps(found))  # type: ignore[arg-type]
        if not self.is_first:
            return []
        return [pickle.loads(self._get(f"{name}/{rank}", meanwhile)) for rank in range(self.n_ranks)]

    def add(self, name: str, n: int) -> int:
        """Add to a count of all ranks; returns what it is then. Raises AnotherFailed."""
        if self._store is None:
            self._counts[name] += n
            return self._counts[name]
        self.check()
        return int(self._store.add(name, n))

    def check(self) -> None:
        """Raise AnotherFailed where another rank has failed, InputError where one that is needed has gone without a word."""
        if self._store is not None and self._store.check(["failed"]):
            raise AnotherFailed
        self._listen()

    def _beat(self) -> None:
        assert self._store is not None
        with suppress(RuntimeError):  # the store is gone, which the main thread will notice
            while not self._has_left.wait(BEAT_S):
                self._store.add(f"beats/{self.rank}", 1)

    def _listen(self) -> None:
        """The first rank listens to all others, they to the first."""
        now = time.monotonic()
        if self._store is None or now < self._listen_at:
            return
        self._listen_at = now + BEAT_S
        for rank in range(1, self.n_ranks) if self.is_first else (0,):
            beat = int(self._store.add(f"beats/{rank}", 0))
            last, since = self._beats.get(rank, (-1, now))
            if beat != last:
                self._beats[rank] = beat, now
            elif now - since > SILENCE_S and not self._store.check([f"left/{rank}"]):
                message = f"rank {rank}: has not been heard of for {SILENCE_S} s, it was ended from outside perhaps"
                raise InputError(f"{message}; look at what it wrote last and run again, it goes on from here")

    def device(self, name: str) -> str:
        """The torch device of this rank where the same one, or none, is asked for by all.

        Raises InputError where there are fewer GPUs than ranks on this machine.
        """
        import torch

        if self._store is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local_rank >= (n_devices := torch.cuda.device_count()):
            got = f"rank {self.local_rank} of this machine has no GPU of its own, there are {n_devices}"
            raise InputError(f"--nproc_per_node: {got}; start at most that many processes, or give a --device")
        return f"cuda:{self.local_rank}"

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """End all ranks where one fails; only the first to fail says why."""
        if self._store is None:
            yield
            return
        try:
            yield
        except AnotherFailed:
            self._leave()
            sys.exit(2)
        except _store_error() as error:
            message = f"rank {self.rank}: rank 0 cannot be reached any more, it was ended from outside perhaps"
            raise InputError(f"{message}; look at what it wrote last and run again, it goes on from here") from error
        except BaseException as error:
            is_first_to_fail = self._store.compare_set("failed", "", str(self.rank)).decode() == str(self.rank)
            self._leave()
            # A bug keeps its traceback, whoever was first.
            if is_first_to_fail or not isinstance(error, (InputError, KeyboardInterrupt)):
                raise
            sys.exit(2)
        self._leave()

    @contextmanager
    def first_speaks(self) -> Iterator[None]:
        """Keep what all would say alike, such as that a flag is wrong, to the first rank's stderr."""
        if self.is_first:
            yield
        else:
            with redirect_stderr(StringIO()):
                yield

    def _get(self, name: str, meanwhile: Callable[[], object]) -> bytes:
        assert self._store is not None
        while not self._store.check([name]):
            self.check()
            meanwhile()
            time.sleep(POLL_S)
        return bytes(self._store.get(name))

    def _leave(self) -> None:
        """Say that nothing more will be asked, and wait a while where others still have to notice something.

        All are to notice a failure by themselves, before a launcher ends them; and the first, which may hold the store,
        goes last.
        """
        assert self._store is not None
        until = time.monotonic() + FAREWELL_S
        has_failed = self._store.check(["failed"])
        self._has_left.set()
        self._store.set(f"left/{self.rank}", "")
        all_left = [f"left/{rank}" for rank in range(self.n_ranks)]
        while has_failed and not self._store.check(all_left) and time.monotonic() < until:
            time.sleep(POLL_S)
        if not self.is_first:
            self._store.add("gone", 1)
            return
        while self._store.add("gone", 0) < self.n_ranks - 1 and time.monotonic() < until:
            time.sleep(POLL_S)


def _store_error() -> type[Exception]:
    """What the store raises where it cannot be reached."""
    from torch.distributed import DistError

    return DistError


def join_ranks() -> Ranks:
    """This process among the ranks that a launcher started; by itself where none did.

    Raises InputError where the variables of the launcher are wrong or the first rank cannot be reached.
    """
    if not all(os.environ.get(name) for name in VARIABLES):
        return Ranks()
    try:
        rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE: expected whole numbers ({error}); start with torchrun") from error
    if n_ranks == 1:
        return Ranks()
    from torch.distributed import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, n_ranks, timeout=STORE_TIMEOUT))
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"{address}: rank {rank} cannot reach the first one there ({error})") from error
    return Ranks(rank, n_ranks, local_rank, store)
