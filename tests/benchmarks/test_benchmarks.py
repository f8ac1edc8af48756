"""What the benchmarks share: spreads, the clock and tables; and what a benchmark refuses."""

import pytest
import torch

from benchmarks import common, decoding
from benchmarks.common import Spread, copy_bandwidth, measure, seconds_of, table
from utils.files import InputError


def test_a_spread_gives_median_and_quartiles_and_ratios_repeat_by_repeat() -> None:
    spread = Spread((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (spread.median, spread.quartiles) == (3.0, (2.0, 4.0))
    assert spread.over(Spread((2.0, 1.0, 1.0, 1.0, 5.0))).values == (2.0, 1.0, 2.0, 3.0, 1.0)
    assert spread.as_json() == {"median": 3.0, "low_quartile": 2.0, "high_quartile": 4.0, "repeats": 5}
    assert Spread((0.0012345,)).text(1e3) == "1.23 (1.23 to 1.23)"


class Clock:
    """Stands for the module `time`: seconds pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(common, "time", clock)
    return clock


def test_runs_are_measured_in_turn_without_warm_up_and_what_is_before(clock: Clock) -> None:
    done: list[str] = []

    def run(name: str, seconds: float) -> None:
        done.append(name)
        clock.wait(seconds * len(done))

    runs = {"a": lambda: run("a", 1), "b": lambda: run("b", 100)}
    seconds = measure(runs, repeats=2, warm_up=1, before=lambda: run("-", 10_000))
    assert "".join(done) == "-a-b" * 3
    assert {name: spread.values for name, spread in seconds.items()} == {"a": (6, 10), "b": (800, 1200)}


def test_one_run_is_timed_from_its_start_to_its_end(clock: Clock) -> None:
    clock.wait(5)
    assert seconds_of(lambda: clock.wait(2)) == 2


def test_copy_bandwidth_counts_bytes_read_and_written(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: clock.wait(0.5))
    assert copy_bandwidth(torch.device("cpu"), n_bytes=1000, repeats=3).values == (4000, 4000, 4000)


def test_tables_align_their_columns() -> None:
    assert table(["way", "ms"], [["a", 1], ["long", 22]]) == "way   ms\n----  --\na      1\nlong  22"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_7b_workload_is_refused_politely_without_a_cuda_device() -> None:
    with pytest.raises(InputError, match="--workload llama-7b: is measured on a CUDA device, and cpu is none"):
        decoding.main(["--workload", "llama-7b"])
