"""Acceptance maps: from a threshold, and from files, whole or spoiled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.decoding.acceptance import AcceptanceMap, read_map, save_map
from utils.files import InputError
from utils.json_io import write_json


def test_a_map_of_a_threshold_is_a_line_from_2_theta_less_1_to_q_max() -> None:
    found = AcceptanceMap.from_threshold(0.9, 0.999)(np.array([-1, 0.8, 0.9, 0.95, 1, np.nan]))
    assert found == pytest.approx([0, 0, 0.5, 0.75, 0.999, 0], abs=1e-3)


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
def test_what_is_no_map_is_refused(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "map.json", value)
    with pytest.raises(InputError, match=r"map\.json: is no acceptance map of ascending knots in \[0, 1\); fit one"):
        read_map(tmp_path / "map.json")
