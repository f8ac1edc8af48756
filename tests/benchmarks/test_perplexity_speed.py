"""The benchmark of perplexity's speed runs, and looks up what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import perplexity_speed


def test_every_step_is_timed_part_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed.json"
    sizes = ["--windows", "3", "--window", "20", "--parts", "2", "--rows", "4000", "--layers", "1"]
    perplexity_speed.main([*sizes, "--output", str(output)])
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())["results"]
    assert set(found["seconds"]) == {"LM", "proposals", "sum", "figures"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["ratio_to_lm"]["proposals"]["repeats"] == 2
    assert 0.2 < found["coverage"] < 1
    assert found["largest_trie_rows"] < 4000
    assert "3 windows of 20 tokens in 2 parts; 4,000 rows" in shown
