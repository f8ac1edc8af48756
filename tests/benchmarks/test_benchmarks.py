"""The benchmarks run, and their numbers are what they say."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import decoding, retrieval
from benchmarks.common import Spread, copy_bandwidth, measure, table
from utils.files import InputError


def test_a_spread_gives_median_and_quartiles_and_ratios_repeat_by_repeat() -> None:
    spread = Spread((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (spread.median, spread.quartiles) == (3.0, (2.0, 4.0))
    assert spread.over(Spread((2.0, 1.0, 1.0, 1.0, 5.0))).values == (2.0, 1.0, 2.0, 3.0, 1.0)
    assert spread.as_json() == {"median": 3.0, "low_quartile": 2.0, "high_quartile": 4.0, "repeats": 5}
    assert Spread((0.0012345,)).text(1e3) == "1.23 (1.23 to 1.23)"


def test_runs_are_measured_in_turn_without_warm_up_and_what_is_before() -> None:
    done: list[str] = []
    runs = {"a": lambda: done.append("a"), "b": lambda: (done.append("b"), time.sleep(0.01))}
    seconds = measure(runs, repeats=2, warm_up=1, before=lambda: (done.append("-"), time.sleep(0.03)))
    assert "".join(done) == "-a-b" * 3
    assert [len(spread.values) for spread in seconds.values()] == [2, 2]
    assert max(seconds["a"].values) < 0.03
    assert min(seconds["b"].values) >= 0.01


def test_copy_bandwidth_counts_bytes_read_and_written() -> None:
    assert copy_bandwidth(torch.device("cpu"), n_bytes=1000, repeats=3).median > 2000


def test_tables_align_their_columns() -> None:
    assert table(["way", "ms"], [["a", 1], ["long", 22]]) == "way   ms\n----  --\na      1\nlong  22"


def test_the_benchmark_of_retrieval_measures_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "retrieval.json"
    argv = ["--rows", "70", "--dims", "20", "--repeats", "2", "--caches", "hot", "--output", str(output)]
    retrieval.main(argv)
    shown = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["argv"][1:] == argv
    assert {"torch", "numpy"} <= written["versions"].keys()
    assert written["hardware"]["threads"] == torch.get_num_threads()
    cases = written["results"]["cases"]
    assert [(case["vectors"], case["rows"], case["bytes"]) for case in cases] == [
        ("hidden", 70, 70 * 20 * 4),
        ("random", 70, 70 * 20 * 4),
    ]
    ways = ["torch.mv", "product", "half", "bounded", "ours"]
    for case in cases:
        assert list(case["seconds"]) == ways
        assert case["index_bytes"] == {
            "product": 0,
            "half": 70 * 20 * 2,
            "bounded": 70 * 21 * 4 + 20 * 20 * 8,
            "ours": 0,
        }
    assert all(way in shown for way in ways)


def test_the_benchmark_of_retrieval_refuses_a_file_that_is_not_there() -> None:
    with pytest.raises(InputError, match="does not exist"):
        retrieval.main(["--vectors", "nowhere.h5"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_7b_workload_is_refused_politely_without_a_cuda_device() -> None:
    with pytest.raises(InputError, match="--workload llama-7b: is measured on a CUDA device, and cpu is none"):
        decoding.main(["--workload", "llama-7b"])
