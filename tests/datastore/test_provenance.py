"""Where chunks come from: windows are read back as stage 2 wrote them, and what is shown of them overlaps nowhere."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS
from pipelines import Pipeline, build

from utils.datastore.provenance import Segment, find_windows, read_windows, segments_around
from utils.files import InputError


@pytest.fixture(scope="module")
def made(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Callable[..., None]) -> Pipeline:
    return build(gpt2_folder, tmp_path_factory.mktemp("provenance"), run_stage, TEXTS)


def test_windows_are_read_back_as_stage_2_wrote_them(made: Pipeline) -> None:
    path = find_windows(made.tries)
    found = read_windows(path, [0, 2])
    assert set(found) == {0, 2}
    for number, window in found.items():
        tokens = json.loads((made.windows / f"token_probs_{number}.json").read_text(encoding="utf-8"))
        assert window.token_ids.tolist() == [token[4] for token in tokens]
        assert window.probabilities.tolist() == [token[1] for token in tokens]


def test_a_window_that_is_not_there_is_refused(made: Pipeline) -> None:
    with pytest.raises(InputError, match="has no window 10000"):
        read_windows(find_windows(made.tries), [10_000])


def test_overlapping_stretches_of_a_window_are_one_segment() -> None:
    windows, firsts, ends = np.array([[4, 5, 9], [2, 0, 3], [4, 9, 12], [4, 0, 6], [4, 20, 22]]).T
    segments, holder = segments_around(windows, firsts, ends)
    assert segments == [Segment(2, 0, 3), Segment(4, 0, 12), Segment(4, 20, 22)]
    assert holder.tolist() == [1, 0, 1, 1, 2]
