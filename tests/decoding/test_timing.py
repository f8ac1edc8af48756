"""Timers add up, and the sequences of a step share its time equally. The clock is the test's own."""

from types import SimpleNamespace

import pytest
import torch

from utils.decoding import timing
from utils.decoding.timing import StepTimer, Timer

CPU = torch.device("cpu")


class Clock:
    """Stands still but where the test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_a_timer_adds_up_what_passes_inside_it(clock: Clock) -> None:
    timer = Timer(on_cuda=False)
    for seconds in (0.5, 0.25):
        with timer:
            clock.now += seconds
        clock.now += 10
    assert timer.seconds == 0.75


def test_a_timer_counts_a_block_that_raises(clock: Clock) -> None:
    timer = Timer(on_cuda=False)

    def fail() -> None:
        with timer:
            clock.now += 0.5
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert timer.seconds == 0.5


def test_each_sequence_of_a_step_gets_an_equal_share(clock: Clock) -> None:
    step = StepTimer(4, CPU)
    with step.lm:
        clock.now += 2
    with step.retrieval:
        clock.now += 1
    clock.now += 5
    step.stop()
    assert step.share() == (2.0, 0.5, 0.25)


def test_a_step_ends_at_its_first_stop(clock: Clock) -> None:
    step = StepTimer(1, CPU)
    clock.now += 3
    step.stop()
    clock.now += 10
    step.stop()
    assert step.share() == (3.0, 0.0, 0.0)
