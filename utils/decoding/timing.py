"""Where the time of the decode loop goes: seconds in the LM, in retrieval, and altogether.

On CUDA the timers measure between events of the stream, which are read when a sequence ends, so no step waits for the
device in order to be timed. Elsewhere they use the host's clock.
"""

import time
from typing import Any

import torch


class Timer:
    """Seconds spent inside `with timer:`, any number of times."""

    def __init__(self, on_cuda: bool) -> None:
        self._on_cuda, self._started = on_cuda, 0.0
        self._seconds = 0.0
        self._events: list[Any] = []  # begin, end, begin, end, …

    def __enter__(self) -> None:
        if self._on_cuda:
            self._record_event()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_cuda:
            self._record_event()
        else:
            self._seconds += time.perf_counter() - self._started

    def _record_event(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    @property
    def seconds(self) -> float:
        while self._events:
            end, begin = self._events.pop(), self._events.pop()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        return self._seconds


class StepTimer:
    """The time of one step, from its creation to `stop`, of which each sequence in the step gets an equal share."""

    def __init__(self, n_sequences: int, device: torch.device) -> None:
        self.lm, self.retrieval = Timer(device.type == "cuda"), Timer(device.type == "cuda")
        self._n_sequences, self._started = n_sequences, time.perf_counter()
        self._seconds: float | None = None

    def stop(self) -> None:
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._started

    def share(self) -> tuple[float, float, float]:
        """Of one sequence: seconds altogether, in the LM, in retrieval. On CUDA the LM's may exceed the step's, whose
        kernels may still run when it ends."""
        assert self._seconds is not None
        n = self._n_sequences
        return self._seconds / n, self.lm.seconds / n, self.retrieval.seconds / n
