"""The benchmark of retrieval runs, and its numbers are what they say."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import retrieval
from utils.files import InputError


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
