"""Plots: each kind of file is drawn with its numbers, in the same bytes each time, and others are refused."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from utils.files import InputError

pytest.importorskip("matplotlib", reason="matplotlib, of requirements-dev.txt, is not installed")


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return importlib.import_module("benchmarks.plots")


def setting(perplexity: float) -> dict[str, float]:
    ratio = perplexity / 50
    return {"perplexity": perplexity, "ratio_lower": ratio - 0.01, "ratio_upper": ratio + 0.01}


def over_seeds(value: float) -> dict[str, float]:
    return {"value": value, "lower": value - 0.05, "upper": value + 0.05}


def quartiles(value: float) -> dict[str, float]:
    return {"median": value, "lower_quartile": value - 0.1, "upper_quartile": value + 0.1}


def run(fps: float, **others: Any) -> dict[str, Any]:
    return {"fps": fps, "tts": fps / 2, "spread": {"fps": quartiles(fps), "tts": quartiles(fps / 2)}, **others}


def case(rows: int, seconds: float) -> dict[str, Any]:
    spread = {"median": seconds, "low_quartile": seconds, "high_quartile": seconds}
    times = {"torch.mv": spread, "ours": spread}
    return {"vectors": "hidden", "rows": rows, "dimensions": 768, "seconds": times}


def size(tokens: int, seconds: float) -> dict[str, Any]:
    times = {"median": seconds, "low_quartile": seconds - 0.1, "high_quartile": seconds + 0.1}
    stage = {"seconds": times, "start_seconds": {"median": 1.0}}
    return {"tokens": tokens, "stage 3": stage, "stage 4": stage, "flattening": stage}


SEED_ROW = {"fps": over_seeds(0.31), "perplexity_ratio": over_seeds(1.25), "repeated": over_seeds(0.17)}


def rule(gamma: float, theta: float, least: float, auto: float | None = None) -> dict[str, Any]:
    """A setting of the table of efficiency."""
    how = {"similarity_threshold": theta, "min_first_token_prob": least, "reject_repeats": auto is not None}
    return {"gamma": gamma, "auto": auto} | how


DOCUMENTS: dict[str, Any] = {
    "perplexity": {
        "text": {"file": "test.json"},
        "base": {"perplexity": 50.0, "tokens": 12345},
        "cdlm": {"0.5": setting(90), "0.9": setting(51), "constant": setting(49.5), "fitted": setting(48.25)},
    },
    "summary": {"runs": {"baseline_generation": {}, "generation_t0.5": run(0.4), "generation_t0.9": run(0.1)}},
    "efficiency": {
        "results": {
            "rows": {"baseline": {}, "a": SEED_ROW, "b": SEED_ROW, "c": SEED_ROW, "d": SEED_ROW},
            "settings": {
                "a": rule(0.3, 0.7, 0),
                "b": rule(0.3, 0.9, 0),
                "c": rule(0.3, 0.9, 0.1),
                "d": rule(0.3, 0.4, 0.2, auto=0.05),
            },
        }
    },
    "sensitivity": {
        "results": {
            "gammas": [0.1, 0.3],
            "thetas": [0.5, 0.8, 0.9],
            "base": {"perplexity": 50.0},
            "perplexity": [[100, 75, 50], [60, 55, 50]],
            "constant": [{"perplexity": 49.0}, {"perplexity": 49.5}],
            "fitted": [{"perplexity": 46.0}, {"perplexity": 48.5}],
            "fps": [[0.41, 0.2, 0.1], [0.3, 0.17, 0.02]],
        }
    },
    "build": {"results": {"sizes": [size(100_000, 2.0), size(1_000_000, 9.0)]}},
    "retrieval": {"results": {"copy_bytes_per_second": {}, "cases": [case(100, 1e-4), case(10_000, 3e-3)]}},
}
SHOWN = {
    "perplexity": ("12,345 tokens of test.json", "LM alone, 50.00", "fitted map, 48.25", "best constant q, 49.50"),
    "summary": ("forward passes saved (%)", "time per token saved (%)"),
    "efficiency": (
        "forward passes saved (%)",
        "perplexity / the plain text's",
        "repeated 4-grams (%)",
        "γ 0.3, δ 0",
        "γ 0.3, δ 0.1",
        *("31", "1.25", "17"),
    ),
    "sensitivity": ("2.00", "1.50", "0.92", "fitted", "41", "17", "γ"),
    "build": ("tokens/s", "4, context vectors"),
    "retrieval": ("768 dimensions", "rows of a token trie", "exact search here"),
}


def written(folder: Path, name: str, document: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_kind_of_file_is_drawn_with_its_words_and_numbers(plots: ModuleType, tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, DOCUMENTS[name])
    for folder in ("one", "other"):
        plots.main([str(path), "--output_dir", str(tmp_path / folder)])
    drawn = (tmp_path / f"one/{name}.svg").read_bytes()
    assert drawn == (tmp_path / f"other/{name}.svg").read_bytes()
    text = " ".join("".join(each.itertext()) for each in ElementTree.fromstring(drawn).iter())
    for words in SHOWN[name]:
        assert words in text
    assert b"<dc:date>" not in drawn


def test_plot_has_no_background_and_no_ink_that_one_page_swallows(plots: ModuleType, tmp_path: Path) -> None:
    path = written(tmp_path, "perplexity", DOCUMENTS["perplexity"])
    plots.main([str(path), "--output_dir", str(tmp_path)])
    inks = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", (tmp_path / "perplexity.svg").read_text()))
    assert inks

    def luminance(colour: str) -> float:
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for page in ("#ffffff", "#0d1117"):
        for ink in inks - {"#ffffff"}:  # which fills the transparent background, at no opacity
            darker, lighter = sorted((luminance(page), luminance(ink)))
            assert (lighter + 0.05) / (darker + 0.05) > 2.9, (page, ink)


def test_only_the_runs_that_were_timed_together_show_time_saved(plots: ModuleType, tmp_path: Path) -> None:
    lone = {"runs": {"generation_t0.5": run(0.4, tts_same_run=False)}}
    plots.main([str(written(tmp_path, "summary", lone)), "--output_dir", str(tmp_path)])
    assert (tmp_path / "summary.svg").exists()


def test_other_files_are_refused_in_one_sentence(plots: ModuleType, tmp_path: Path) -> None:
    damaged = {**DOCUMENTS["perplexity"], "cdlm": {"0.5": {}}}
    other = tmp_path / "folder"
    other.mkdir()
    good = written(tmp_path, "perplexity", DOCUMENTS["perplexity"])
    for files, message in (
        ([written(tmp_path, "no", {"a": 1})], "of no kind that is plotted"),
        ([written(tmp_path, "list", [1])], "of no kind that is plotted"),
        ([written(tmp_path, "damaged", damaged)], "lacks what its plot shows"),
        ([written(tmp_path, "none", {"runs": {"baseline_generation": {}}})], "no run in chunk mode"),
        ([tmp_path / "missing.json"], "does not exist"),
        ([good, written(other, "perplexity", DOCUMENTS["perplexity"])], "two files have this name"),
    ):
        with pytest.raises(InputError, match=message):
            plots.main([*map(str, files), "--output_dir", str(tmp_path / "out")])
