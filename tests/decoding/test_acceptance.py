"""Which similarities are accepted, and acceptance maps: from a threshold, and from files, whole or spoiled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.decoding.acceptance import (
    LONGEST_REPEAT,
    Acceptance,
    AcceptanceMap,
    ends_in_repeat,
    holds,
    read_map,
    save_map,
    would_repeat,
)
from utils.files import InputError
from utils.json_io import write_json


def test_thetas_map_is_a_line_from_2_theta_minus_1_to_q_max() -> None:
    found = AcceptanceMap.from_threshold(0.9, 0.999)(np.array([-1, 0.8, 0.9, 0.95, 1, np.nan]))
    assert found == pytest.approx([0, 0, 0.5, 0.75, 0.999, 0], abs=1e-3)


def test_threshold_accepts_from_theta_on_and_bernoulli_below_g() -> None:
    threshold = Acceptance(0.75)
    assert [threshold.accepts(s, uniform=0.999) for s in (0.75, np.nextafter(0.75, 0), np.nan)] == [True, False, False]
    bernoulli = Acceptance(0.75, "bernoulli")  # g(s) = 2 s - 1
    assert [bernoulli.accepts(0.8, uniform) for uniform in (0.0, 0.59, 0.61)] == [True, True, False]
    assert not bernoulli.accepts(0.5, uniform=0.0)


def test_at_theta_one_nothing_is_accepted_unless_a_map_was_fitted() -> None:
    for policy in ("threshold", "bernoulli"):
        never = Acceptance(1.0, policy)
        assert never.never
        assert not never.accepts(1.0, uniform=0.0)
        assert never.probability(np.array([1.0, np.nan])).tolist() == [0.0, 0.0]
    assert not Acceptance(1.0, fitted=AcceptanceMap((0.0, 1.0), (0.0, 0.9))).never


def test_a_fitted_map_takes_thetas_place_and_accepts_from_one_half_on() -> None:
    fitted = AcceptanceMap((0.0, 0.5, 1.0), (0.0, 0.5, 0.75))
    threshold = Acceptance(0.9, fitted=fitted)
    assert [threshold.accepts(s, uniform=0.999) for s in (0.5, 0.49)] == [True, False]
    bernoulli = Acceptance(0.9, "bernoulli", fitted=fitted)
    assert [bernoulli.accepts(1.0, uniform) for uniform in (0.74, 0.76)] == [True, False]


def test_threshold_counts_as_accepting_with_q_max() -> None:
    similarities = np.array([0.4, 0.5, 0.9, np.nan])
    assert Acceptance(0.5, q_max=0.9).probability(similarities).tolist() == [0.0, 0.9, 0.9, 0.0]
    assert Acceptance(0.5, "bernoulli", q_max=0.8).probability(similarities) == pytest.approx([0.4, 0.5, 0.8, 0.0])


def test_a_map_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = AcceptanceMap((-0.5, 0.25, 1.0), (0.0, 0.5, 0.5), {"text": "abc"})
    save_map(tmp_path / "map.json", saved)
    assert read_map(tmp_path / "map.json") == saved


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"similarities": [0.5], "probabilities": [0.5]},
        {"similarities": [0.5, 0.5], "probabilities": [0.1, 0.2], "origin": {}},
        {"similarities": [0.4, 0.5], "probabilities": [0.2, 0.1], "origin": {}},
        {"similarities": [0.4, 0.5], "probabilities": [0.2, 1.0], "origin": {}},
        {"similarities": [0.4, 0.5], "probabilities": [-0.2, 0.1], "origin": {}},
        {"similarities": [0.4, 0.5], "probabilities": [0.2], "origin": {}},
        {"similarities": [0.5, 0.4], "probabilities": 0.2, "origin": {}},
        {"similarities": 0.5, "probabilities": 0.2, "origin": {}},
        {"similarities": [[0.5]], "probabilities": [[0.2]], "origin": {}},
        {"similarities": [], "probabilities": [], "origin": {}},
        {"similarities": [0.5], "probabilities": ["a"], "origin": {}},
        {"similarities": [0.5], "probabilities": [0.5], "origin": 5},
        {"similarities": [float("-inf")], "probabilities": [0.5], "origin": {}},
    ],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "map.json", value)
    with pytest.raises(
        InputError, match=r"map\.json: is not an acceptance map of ascending knots in \[0, 1\); fit one"
    ):
        read_map(tmp_path / "map.json")


# ---- Repeats


@given(st.lists(st.integers(0, 2), max_size=80))
def test_a_repeat_is_the_same_tokens_twice_at_the_end(token_ids: list[int]) -> None:
    lengths = range(2, min(LONGEST_REPEAT, len(token_ids) // 2) + 1)
    expected = any(token_ids[-n:] == token_ids[-2 * n : -n] for n in lengths)
    assert ends_in_repeat(token_ids) == expected


def test_a_repeat_may_be_as_long_as_32_tokens_and_no_longer() -> None:
    for n, expected in ((31, True), (32, True), (33, False)):
        text = list(range(n))
        assert ends_in_repeat([99, *text, *text]) == expected
    assert not ends_in_repeat([])


@pytest.mark.parametrize(
    ("token_ids", "chunk", "expected"),
    [
        ([5, 1, 2, 3, 9, 1], [2, 3], True),  # 1 2 3 stands there already
        ([5, 1, 2, 3, 9, 1], [2, 4], False),
        ([5, 1, 2, 3, 9, 8], [2, 3], False),  # after another token
        ([5, 1, 2, 9, 1], [2], False),  # one token alone is no repeat
        ([1, 2, 1], [2], True),  # but the same two twice in a row are
        ([2**24, 1, 2**16, 1], [2**16, 256], False),  # no token begins within another one's bytes
        ([256, 1, 7, 256], [1, 7], True),
        ([7, 7], [7, 7], True),
        ([7], [7, 7], False),
    ],
)
def test_a_chunk_repeats_what_the_text_holds(token_ids, chunk, expected):
    assert would_repeat(token_ids, chunk) == expected


def test_runs_are_found_as_a_loop_finds_them():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = rng.choice([0, 1, 256, 65536], 12).tolist()
        run = rng.choice([0, 1, 256, 65536], int(rng.integers(1, 4))).tolist()
        assert holds(text, run) == any(text[i : i + len(run)] == run for i in range(len(text) - len(run) + 1))
